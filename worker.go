package steadymq

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// pool is the workers of one Run. They outlive sessions, so that the concurrency holds across
// reconnects: a handler that is still busy with a delivery of a dead session occupies its worker
// until it returns. A worker starts when a delivery finds none that waits for it, because a
// consumer may be idle for hours. The supervisor gives the pool sessions and stops it; the workers
// read session and changed, under mu.
type pool struct {
	handler  Handler
	config   *config
	stats    *counters
	reporter *reporter
	ctx      context.Context // of Run, as the user gave it: no handler starts once it has ended
	loop     func(*session)  // handles the deliveries of a session until there are no more
	valve    *valve

	mu      sync.Mutex
	session *session      // the newest session, nil while there is none
	changed chan struct{} // closed when there is another session; nil if nobody waits for that
	stopped bool          // stop is closed, so no worker starts any more

	stop  chan struct{} // made with the first worker; closed when no more sessions come
	alive atomic.Int64  // workers that have started and not returned; raised under mu
	done  chan struct{} // made by end; closed after stop, when no worker is left
}

// serve gives the workers a session, or takes the last one away from them. A worker that is busy
// with an older one takes it as soon as its handler returns.
func (p *pool) serve(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.session = s
	if s != nil && p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// newest returns the session to work for, and a channel that is closed when there is another one.
func (p *pool) newest() (*session, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.changed == nil {
		p.changed = make(chan struct{})
	}
	return p.session, p.changed
}

// hire starts one more worker, unless there are as many as may handle at once. It is called for
// each delivery that no worker was waiting for, until it returns true: there may be no more.
func (p *pool) hire() (all bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.full() && !p.stopped {
		p.alive.Add(1)
		p.makeStop()
		go p.work()
	}
	return p.full()
}

// makeStop makes stop, unless there is one. It is called with mu held.
func (p *pool) makeStop() {
	if p.stop == nil {
		p.stop = make(chan struct{})
	}
}

func (p *pool) full() bool { return p.alive.Load() >= int64(p.config.concurrency) }

// end lets the workers end: those that wait at once, the others when their handler has returned.
func (p *pool) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped, p.done = true, make(chan struct{})
	if p.alive.Load() == 0 {
		close(p.done)
	}
	p.makeStop()
	close(p.stop)
}

// work is a worker's goroutine: it serves one session after the other.
func (p *pool) work() {
	returned := false
	defer func() {
		if !returned { // the handler called runtime.Goexit, so another worker takes over
			go p.work()
			return
		}
		if p.alive.Add(-1) == 0 { // no more start, for only after end does one return
			close(p.done)
		}
	}()
	for {
		s, changed := p.newest()
		if s != nil {
			p.loop(s)
		}
		select {
		case <-changed:
			continue
		case <-p.stop:
		}
		returned = true
		return
	}
}

// handleAll handles the deliveries of s until there are no more.
func (p *pool) handleAll(s *session) {
	for {
		d, ok := p.take(s)
		if !ok {
			return
		}
		p.handle(s, d)
	}
}

// take waits for a delivery of s that a handler may start with. It returns false once there is none
// any more.
func (p *pool) take(s *session) (*Delivery, bool) {
	d, ok := s.order.take(s)
	return d, ok && p.admit(s, d)
}

// admit waits until a handler may start with d, which was taken from the inbox. If there is none any
// more it takes d back for s and returns false.
func (p *pool) admit(s *session, d *Delivery) bool {
	if !p.valve.pass(p.ctx.Done(), s.end.Done(), d) {
		s.unstarted(d)
		return false
	}
	return p.valve.entered(d, p.enter(s, d))
}

// enter lets d pass the gate of s, or takes it back and returns false. It is called for every
// delivery, also of a batch.
func (p *pool) enter(s *session, d *Delivery) bool {
	// What was delivered before the session ended is still in the inbox.
	if p.ctx.Err() != nil || !s.gate.enter() {
		s.unstarted(d)
		return false
	}
	d.init(s.settler)
	s.began(d)
	return true
}

// handle runs the handler for d and settles d by its error.
func (p *pool) handle(s *session, d *Delivery) {
	defer s.order.left(s, d)
	p.stats.delivered.Add(1)
	p.stats.handling.Add(1)
	var err error
	var became conclusion
	failed := false
	defer func() {
		if failed {
			p.failed(s, d, became, err)
		}
	}()
	defer func() { p.valve.returned(p.ctx, d, err, s) }()
	defer s.gate.leave() // even if the hook that conclude calls ends the goroutine
	defer func() {
		p.stats.handling.Add(-1)
		if err == nil {
			err = d.overlooked()
		}
		failed = err != nil && !isLater(err) && !s.cutOff(err)
		became = s.conclude(d, err)
	}()
	err = p.invoke(s, d, &err)
}

// invoke calls the handler.
func (p *pool) invoke(s *session, d *Delivery, goexit *error) error {
	return guarded(p, s, d, p.handler, d, goexit)
}

// guarded calls h with what it handles, of which d is the first, and turns a panic into an error. It
// sets goexit for a handler that ends its goroutine, because then deferred functions run but nothing
// is returned.
func guarded[T any](p *pool, s *session, d *Delivery, h func(context.Context, T) error, handled T, goexit *error) (err error) {
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
		err = panicked(recover())
		*goexit = err
	}()
	err = safeError(h(ctx, handled))
	returned = true
	return err
}

// failed reports what a handler returned.
func (p *pool) failed(s *session, d *Delivery, became conclusion, err error) {
	p.stats.failed.Add(1)
	var panicked *PanicError
	errors.As(err, &panicked)
	p.reporter.failed(failure{of: s, timeout: p.config.handlerTimeout, delivery: d, conclusion: became, err: err, panicked: panicked})
	if hook := p.config.hooks.HandlerFailed; hook != nil {
		p.reporter.hook(func() { hook(d, err) })
	}
}

// wrap returns the handler of a Run: the user's, with the middleware around it.
func wrap(ctx context.Context, c *config, h Handler, left func()) (Handler, error) {
	if len(c.middleware) == 0 {
		return asPublished(c, withKey(c, h)), nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.setupTimeout, errNoAnswer)
	defer cancel()
	var refused []error
	for i := len(c.middleware) - 1; i >= 0; i-- {
		made, err := userCall[Handler]{
			option: "WithMiddleware",
			f:      func(context.Context) (Handler, error) { return c.middleware[i](h), nil },
			left:   left,
		}.run(ctx)
		if v := (*OptionError)(nil); errors.As(err, &v) {
			refused = slices.Insert(refused, 0, error(v)) // in the order in which they were given
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("steadymq: %w", err)
		}
		if made == nil {
			return nil, &OptionError{"WithMiddleware", fmt.Sprintf("middleware %d of %d returned a nil handler", i+1, len(c.middleware))}
		}
		h = made
	}
	return asPublished(c, withKey(c, h)), errors.Join(refused...)
}

// Invoke runs h on d as a [Consumer] does, but without its holds, so that a test of a handler can
// assert what becomes of the message: a panic is an error ([*PanicError]), and the error settles d
// unless h has settled it by itself, or it is [Later]. It returns the outcome and the error. h gets
// ctx as it is. It knows no [WithRetry]: what that would delay or park is [Requeued] here.
//
// Make d with [NewDelivery]: any other is refused, without a call of h. [Middleware] wraps h
// before: Invoke(ctx, policy(handle), d).
func Invoke(ctx context.Context, h Handler, d *Delivery) (o Outcome, err error) {
	if d == nil || d.fence == nil {
		return Unsettled, errUndelivered
	}
	returned := false
	defer func() {
		if !returned {
			err = panicked(recover())
		}
		if err == nil {
			err = d.overlooked()
		}
		if d.Outcome() == Unsettled {
			wanted, _ := OutcomeOf(err)
			if _, ofNone := d.fence.settler.(detached); wanted == Parked && !ofNone {
				wanted = Requeued // only a Consumer has a park queue
			}
			if wanted != Unsettled {
				_ = d.settle(wanted)
			}
		}
		o = d.Outcome()
	}()
	err = safeError(h(ctx, d))
	returned = true
	return o, err
}
