package steadymq

import (
	"context"
	"errors"
	"runtime/debug"
	"sync/atomic"
	"time"
)

// pool is the workers. They outlive sessions, so that the concurrency holds
// across reconnects: a handler still busy with a delivery of a dead session
// occupies its worker until it returns.
type pool struct {
	handler  Handler
	config   *config
	stats    *counters
	reporter *reporter

	stop  chan struct{} // closed when there will be no more sessions
	alive atomic.Int64
	done  chan struct{} // closed when the last worker has returned
}

// link is one session in the row of sessions the workers walk along.
type link struct {
	session  *session
	next     *link
	replaced chan struct{} // closed once next is set
}

func newLink(s *session) *link {
	return &link{session: s, replaced: make(chan struct{})}
}

// follow makes s the session after this one.
func (l *link) follow(s *session) *link {
	l.next = newLink(s)
	close(l.replaced)
	return l.next
}

// start starts the workers, who wait for the session after first.
func (p *pool) start(first *link) {
	n := p.config.concurrency
	p.alive.Store(int64(n))
	for range n {
		go p.work(first)
	}
}

// work serves one session after the other.
func (p *pool) work(at *link) {
	returned := false
	defer func() {
		if !returned { // the handler called runtime.Goexit: another worker takes over
			go p.work(at)
			return
		}
		if p.alive.Add(-1) == 0 {
			close(p.done)
		}
	}()
	for {
		if at.session != nil {
			p.serve(at.session)
		}
		select {
		case <-at.replaced:
			at = at.next
			continue
		case <-p.stop:
		}
		returned = true
		return
	}
}

// serve handles the deliveries of s until there are no more.
func (p *pool) serve(s *session) {
	for {
		d, ok := s.lane.take()
		if !ok {
			return
		}
		// What had been delivered before the session ended is still there.
		if !s.gate.enter() {
			s.handBack(d.DeliveryTag)
			return
		}
		d.init(s.settler)
		s.began(d)
		p.handle(s, d)
	}
}

// handle runs the handler for d and settles d by its error.
func (p *pool) handle(s *session, d *Delivery) {
	p.stats.delivered.Add(1)
	p.stats.handling.Add(1)
	var err error
	var held time.Duration
	defer func() {
		if err != nil {
			p.failed(s, d, held, err)
		}
	}()
	defer s.gate.leave() // even if the hook that conclude calls ends the goroutine
	defer func() {
		p.stats.handling.Add(-1)
		held = s.conclude(d, err)
	}()
	err = p.invoke(s.ctx, d, &err)
}

// invoke turns a panic into an error. goexit is set for a handler that ends its
// goroutine, which runs deferred functions but returns nothing.
func (p *pool) invoke(ctx context.Context, d *Delivery, goexit *error) (err error) {
	if p.config.handlerTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, p.config.handlerTimeout, ErrHandlerTimeout)
		defer cancel()
	}
	returned := false
	defer func() {
		if returned {
			return
		}
		panicked := &PanicError{Value: recover(), Stack: debug.Stack()}
		err, *goexit = panicked, panicked
	}()
	err = p.handler(ctx, d)
	returned = true
	return err
}

// failed reports what a handler returned. An error of a handler whose context ended
// with its session is not logged: the message comes again whatever it says.
func (p *pool) failed(s *session, d *Delivery, held time.Duration, err error) {
	p.stats.failed.Add(1)
	var panicked *PanicError
	if errors.As(err, &panicked) || s.ctx.Err() == nil {
		p.reporter.failed(failure{session: s, delivery: d, held: held, err: err, panicked: panicked})
	}
	if hook := p.config.hooks.HandlerFailed; hook != nil {
		p.reporter.call(func() { hook(d, err) })
	}
}
