package wire

import (
	"context"
	"sync"
	"time"
)

// silenceLimit is the limit of one call to the broker. An answer stands behind everything that the
// broker has sent before it. On a slow path that is minutes of deliveries, and a limit that counted
// them would end what works. So it counts the silence after the last bytes of a delivery.
type silenceLimit struct {
	socket *Socket
	limit  time.Duration
	latest time.Time // whatever comes
	over   func()

	mu    sync.Mutex
	timer *time.Timer // nil once over was called, or must not be called any more
}

// MostSilences is how many of its limits a call may take while deliveries come. Those of others may
// come for ever, and an answer that is still not there by then is not on its way.
const MostSilences = 10

// AfterSilence calls over once no bytes of a delivery have come for as long as limit, counted from
// now on, and after most in any case. The function it returns calls that off.
func (s *Socket) AfterSilence(limit, most time.Duration, over func()) (stop func()) {
	l := &silenceLimit{socket: s, limit: limit, latest: time.Now().Add(most), over: over}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.timer = time.AfterFunc(min(limit, most), l.look)
	return func() { l.stop() }
}

func (l *silenceLimit) look() {
	left := min(l.limit-l.socket.in.sinceDelivery(), time.Until(l.latest))
	if left > 0 {
		l.again(left)
	} else if l.stop() {
		l.over()
	}
}

func (l *silenceLimit) again(after time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer != nil {
		l.timer.Reset(after)
	}
}

// stop tells whether the limit was still in force.
func (l *silenceLimit) stop() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer == nil {
		return false
	}
	l.timer.Stop()
	l.timer = nil
	return true
}

// WithSilence returns a context that ends with cause after a silence as long as limit.
func (s *Socket) WithSilence(ctx context.Context, limit time.Duration, cause error) (context.Context, context.CancelFunc) {
	ctx, end := context.WithCancelCause(ctx)
	ctx, cancel := context.WithTimeoutCause(ctx, MostSilences*limit, cause) // users may ask for the deadline
	stop := s.AfterSilence(limit, MostSilences*limit, func() { end(cause) })
	return ctx, func() {
		stop()
		cancel()
		end(nil)
	}
}
