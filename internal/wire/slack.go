package wire

import "time"

const (
	// idleBuffer is how large the buffers of a socket are while it is idle, as most are.
	idleBuffer = 4 << 10

	// slackAfter is how long a buffer stays large after it was last used so. The next traffic after
	// that, at the latest a heartbeat, finds it too large.
	slackAfter = time.Second
)

// slack decides when a buffer that has grown with the traffic becomes small again. Between two
// bursts it stays as it is, or each of them would let it grow anew.
type slack struct {
	busy time.Duration // when the buffer was last used beyond idleBuffer, since the socket's start
}

// over is told of each use of the buffer, and returns true if it need not be large any more.
func (s *slack) over(used int, at time.Duration) bool {
	if used > idleBuffer {
		s.busy = at
	}
	return at-s.busy >= slackAfter
}
