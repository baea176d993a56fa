//go:build unix

package replay

import (
	"syscall"
	"time"
)

// CPUTime is what this process has used, all threads together.
func CPUTime() (user, system time.Duration) {
	var ru syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &ru) != nil {
		return 0, 0
	}
	return time.Duration(ru.Utime.Nano()), time.Duration(ru.Stime.Nano())
}
