//go:build !unix

package main

import "time"

// cpuTime is not measured here; the CPU columns read 0.
func cpuTime() (user, system time.Duration) { return 0, 0 }
