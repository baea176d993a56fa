//go:build !unix

package replay

import "time"

// CPUTime is not measured here; the CPU columns read 0.
func CPUTime() (user, system time.Duration) { return 0, 0 }
