package wire

import (
	"context"
	"sync"
	"time"
)

// An answer of the broker stands behind all that the broker has sent before it. On a slow path
// those are minutes of deliveries, and a limit that counted them would end what works. So the
// limit of a call counts the silence after the last bytes of a delivery.

// MostSilences is how many of its limits a call may take while deliveries come. Those of others
// come for ever, and an answer that is still not there by then is not on its way.
const MostSilences = 10

// patience is the limit of one call.
type patience struct {
	socket *Socket
	limit  time.Duration
	latest time.Time // whatever comes
	over   func()

	mu    sync.Mutex
	timer *time.Timer // nil once over was called, or is not to be called any more
}

// afterSilence calls over once no bytes of a delivery have come for as long as limit, counted from
// now on, and after most in any case. The function it returns calls that off.
func (s *Socket) AfterSilence(limit, most time.Duration, over func()) (stop func()) {
	p := &patience{socket: s, limit: limit, latest: time.Now().Add(most), over: over}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timer = time.AfterFunc(min(limit, most), p.look)
	return func() { p.stop() }
}

func (p *patience) look() {
	left := min(p.limit-p.socket.sinceDelivery(), time.Until(p.latest))
	if left > 0 {
		p.again(left)
	} else if p.stop() {
		p.over()
	}
}

func (p *patience) again(after time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Reset(after)
	}
}

// stop tells whether the limit still counted.
func (p *patience) stop() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer == nil {
		return false
	}
	p.timer.Stop()
	p.timer = nil
	return true
}

// withSilence returns a context that ends with cause after a silence as long as limit.
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
