package steadymq

import (
	"context"
	"errors"
	"runtime/debug"
	"sync/atomic"
)

// pool is the workers. They outlive sessions, so that the concurrency holds
// across reconnects: a handler still busy with a delivery of a dead session
// occupies its worker until it returns.
type pool struct {
	handler  Handler
	config   *config
	stats    *counters
	reporter *reporter
	ctx      context.Context // of Run, as it was given: no handler starts once it has ended

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
		if p.ctx.Err() != nil || !s.gate.enter() {
			s.unstarted(d)
			return
		}
		d.init(s)
		s.began(d)
		p.handle(s, d)
	}
}

// handle runs the handler for d and settles d by its error.
func (p *pool) handle(s *session, d *Delivery) {
	p.stats.delivered.Add(1)
	p.stats.handling.Add(1)
	var err error
	defer func() {
		p.stats.handling.Add(-1)
		failed := err != nil && !s.cutOff(err)
		s.conclude(d, err)
		s.gate.leave()
		if failed {
			p.failed(d, err)
		}
	}()
	err = p.invoke(s, d, &err)
}

// invoke turns a panic into an error. goexit is set for a handler that ends its
// goroutine, which runs deferred functions but returns nothing.
func (p *pool) invoke(s *session, d *Delivery, goexit *error) (err error) {
	ctx := s.ctx
	if p.config.handlerTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, p.config.handlerTimeout, ErrHandlerTimeout)
		defer cancel()
		defer s.overdue(d)()
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

// cutOff tells whether a handler returned err because its session was lost or the
// drain limit passed: that is no failure of its own, and the broker has the message
// already. A panic is one whenever it comes.
func (s *session) cutOff(err error) bool {
	return s.ctx.Err() != nil && !errors.As(err, new(*PanicError))
}

// failed reports what a handler returned; a panic is logged as well, for it is a
// fault of the program that no handler could log itself.
func (p *pool) failed(d *Delivery, err error) {
	p.stats.failed.Add(1)
	var panicked *PanicError
	if errors.As(err, &panicked) {
		p.reporter.tell(report{panicked: panicked})
	}
	if p.config.hooks.HandlerFailed == nil || p.reporter.muted.Load() {
		return // nothing is told once Run has returned
	}
	defer p.reporter.guard()
	p.config.hooks.HandlerFailed(d, err)
}
