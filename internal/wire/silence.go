package wire

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// What a socket makes of silence: the watchdog ends it when its peer has sent nothing at all for
// too long, and silenceLimit bounds one call to the broker.

// WatchPeer begins to watch for a peer that falls silent. It is called once, after the handshake:
// before that, silence can be an answer, and the limit of the set-up bounds it.
func (s *Socket) WatchPeer() {
	if idle := s.opts.IdleTimeout; idle > 0 {
		s.dog.idle, s.dog.due = idle, time.Since(s.start)+idle
		s.lookAgain(idle)
	}
}

// watch ends the socket when Read has read nothing for too long. That covers a silent peer and a
// driver that stopped reading alike. It is the function of the timer: a socket that is idle needs
// no goroutine for it.
func (s *Socket) watch() {
	now := time.Since(s.start)
	if s.dog.expired(now, time.Duration(s.in.heard.Load())) {
		s.Kill(fmt.Errorf("%w for %v: the peer or the path to it is dead, or the driver stopped reading", ErrWatchdog, s.dog.idle))
		return
	}
	s.lookAgain(s.dog.due - now)
}

// lookAgain starts the timer, which the end of the socket stops: either the end has come and is
// seen here, or it comes later.
func (s *Socket) lookAgain(after time.Duration) {
	s.dogTimer.Reset(after)
	if s.end.closed.Load() {
		s.dogTimer.Stop()
	}
}

// watchdog decides what a fired timer means; its times count from the start of the socket.
type watchdog struct {
	idle time.Duration
	due  time.Duration // when to look again
}

// expired reports whether the peer was silent for too long; heard is its last sign of life.
func (d *watchdog) expired(now, heard time.Duration) bool {
	if next := heard + d.idle; next > now {
		d.due = next
		return false
	}
	// A timer this late means that the machine stood still, not the peer: what the peer sent
	// meanwhile may lie unread.
	if now-d.due >= d.idle/2 {
		d.due = now + d.idle/2
		return false
	}
	return true
}

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
