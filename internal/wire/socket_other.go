//go:build !linux

package wire

import (
	"syscall"
	"time"
)

// userTimeoutControl does nothing: without TCP_USER_TIMEOUT a path that loses
// only what we send is noticed when the broker gives up, at 2-3 heartbeats.
func userTimeoutControl(time.Duration) func(network, address string, c syscall.RawConn) error {
	return nil
}
