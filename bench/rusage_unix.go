//go:build unix

package main

import (
	"syscall"
	"time"
)

// cpuTime is what this process has used, all threads together.
func cpuTime() (user, system time.Duration) {
	var ru syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &ru) != nil {
		return 0, 0
	}
	return time.Duration(ru.Utime.Nano()), time.Duration(ru.Stime.Nano())
}
