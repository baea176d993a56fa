package steadymq

import (
	"context"
	"errors"
	"iter"
)

// A loop in place of a handler: the goroutine of the loop is the only worker of the Run under it.

// Deliveries returns an iterator that consumes as [Consumer.Run] does, heals as that does, and gives
// the deliveries to a loop in place of a [Handler]:
//
//	for d, err := range c.Deliveries(ctx) {
//		if err != nil {
//			return err // the last turn; d is nil
//		}
//		if err := store(d.Context(), d); err != nil {
//			return err // d goes back
//		}
//		if err := d.Ack(); err != nil {
//			log.Print(err) // the message comes again
//		}
//	}
//
// The body settles by hand, as do any other goroutines: [Delivery.Ack], [Delivery.Requeue] (or
// [Delivery.Reject]), [Delivery.Discard]. The step to the next delivery settles nothing. A delivery
// that is not settled yet is as one that a handler has kept by [Later], and what stands there is
// true for it: it takes up the prefetch, [Stats].Later counts it, it is [Stale] once its session is
// lost, and [Delivery.Context] ends then.
//
// Nothing is dialled before the loop begins, and no delivery is taken before the loop asks for it;
// those that are prefetched meanwhile wait. As long as the body works the connection is kept, and
// healed, all the same. The body gets one delivery at a time: for more, let it start goroutines that
// settle.
//
// The loop ends when ctx does or [Consumer.Stop] is called, or when the body leaves it, by break,
// return, a panic or [runtime.Goexit]. Then it drains, as Run does: nothing more is taken, what no
// body was given goes back, what is not settled has the limit of [WithDrainTimeout], and the acks are
// confirmed. It blocks meanwhile. So settle before you leave: what only the goroutine of the loop
// would settle, behind it, makes it wait for the whole limit and goes back to the queue. A panic goes
// on once that is done.
//
// An error is yielded once, in the last turn, with a nil delivery. It is what Run would have
// returned: a lost session is none. If that is nil, as after the end of ctx, nothing is yielded.
// Once the body has left, nothing can be yielded any more; what Run would have returned is then in
// the log, and with [Hooks].StateChanged the Cause of the change to [Stopped]. A [*DrainError]
// counts a body that is still at work as a handler.
//
// The iterator may be used again, and each loop is a Run of its own; one that begins while the
// Consumer is running gets [ErrRunning]. Of a Consumer of a [Group] the error is an [*OptionError],
// and so it is, one for each, if ctx is nil or if an option was given that is about handlers:
// [WithConcurrency], [WithBatch], [WithOrderingKey], [WithMiddleware], [WithHandlerTimeout],
// [WithBreaker], [WithRequeueDelay] and [WithRetry], for there are no errors of handlers to follow.
// [Hooks].HandlerFailed is never called.
func (c *Consumer) Deliveries(ctx context.Context) iter.Seq2[*Delivery, error] {
	return func(yield func(*Delivery, error) bool) {
		goesOn := true
		l, err := c.beginLoop(ctx)
		if err == nil {
			goesOn, err = l.run(yield)
		}
		if goesOn && err != nil {
			yield(nil, err)
		}
	}
}

// loop is the worker of a Run whose deliveries a loop is given. It belongs to the goroutine of the
// loop.
type loop struct {
	pool   *pool
	stop   context.CancelFunc // ends the Run
	result chan error         // of the Run
}

// beginLoop begins a Run for a loop, unless it refuses.
func (c *Consumer) beginLoop(ctx context.Context) (*loop, error) {
	if err := c.refusesLoop(ctx); err != nil {
		return nil, err
	}
	if fault := c.fault.Load(); fault != nil {
		return nil, fault
	}
	ctx, stop := context.WithCancel(ctx)
	if !c.begin(stop) {
		stop()
		return nil, ErrRunning
	}
	of := newConnections(c.config, c.stats)
	borrower := of.join()
	s := newSupervisor(ctx, c, work{config: c.config}, borrower, newPublisher(of))
	s.reporter.faulted = stop
	s.pool.alive.Add(1) // so no other worker starts
	s.pool.makeStop()
	l := &loop{pool: s.pool, stop: stop, result: make(chan error, 1)}
	go func() {
		err := s.run()
		c.end(err)
		borrower.leave()
		l.result <- err
	}()
	return l, nil
}

// run gives the body one delivery after the other, and then drains, however the body leaves the
// loop. It returns false if it has left.
func (l *loop) run(yield func(*Delivery, error) bool) (goesOn bool, err error) {
	defer func() { err = l.drain() }()
	return l.work(yield), nil
}

// work is pool.work on the goroutine of the loop.
func (l *loop) work(yield func(*Delivery, error) bool) (goesOn bool) {
	for {
		s, changed := l.pool.newest()
		if s != nil && !l.giveAll(s, yield) {
			return false
		}
		select {
		case <-changed:
		case <-l.pool.stop:
			return true
		}
	}
}

func (l *loop) giveAll(s *session, yield func(*Delivery, error) bool) (goesOn bool) {
	for {
		d, ok := l.pool.take(s)
		if !ok {
			return true
		}
		if !l.give(s, d, yield) {
			return false
		}
	}
}

// give lets the body have a delivery, which is kept for later unless it has been settled then. A
// panic of the body passes through.
func (l *loop) give(s *session, d *Delivery, yield func(*Delivery, error) bool) (goesOn bool) {
	l.pool.stats.delivered.Add(1)
	l.pool.stats.handling.Add(1)
	defer s.gate.leave()
	defer func() {
		l.pool.stats.handling.Add(-1)
		s.conclude(d, Later)
	}()
	return yield(d, nil)
}

// drain ends the Run and returns its error.
func (l *loop) drain() error {
	l.stop()
	<-l.pool.stop
	l.pool.alive.Add(-1)
	close(l.pool.done) // there was no other worker
	return <-l.result
}

// handlersOptions are the options that a loop refuses, because they are about handlers.
func handlersOptions(c *config) []handlersOption {
	return []handlersOption{
		{"WithConcurrency", c.set.concurrency, "the body is given one delivery at a time; start goroutines in it that settle"},
		{"WithBatch", c.batches, "collect in the body, or use RunBatch"},
		{"WithOrderingKey", c.orderingKey != nil, "the body is given the messages in the order of the queue"},
		{"WithMiddleware", len(c.middleware) > 0, "there is no handler to wrap; do it in the body"},
		{"WithHandlerTimeout", c.handlerTimeout > 0, "give what the body calls a context with a limit, made from d.Context()"},
		{"WithBreaker", c.breaker != nil, "there are no errors of handlers; call Pause and Resume"},
		{"WithRequeueDelay", c.set.requeueDelay, "there are no errors of handlers; call d.Requeue when the message is to go back"},
		{"WithRetry", c.retry != nil, "there are no errors of handlers; give the queue a dead-letter exchange and call d.Discard, or use Run"},
	}
}

type handlersOption struct {
	name   string
	given  bool
	advice string
}

// refusesLoop returns every reason against a loop.
func (c *Consumer) refusesLoop(ctx context.Context) error {
	var problems []error
	if ctx == nil {
		problems = append(problems, &OptionError{"Deliveries", "the context must not be nil"})
	}
	if c.grouped { // whose options are the group's, and right there
		return errors.Join(append(problems, &OptionError{"Deliveries", "this Consumer belongs to a Group, whose Run runs it; make one with New"})...)
	}
	for _, o := range handlersOptions(c.config) {
		if o.given {
			problems = append(problems, &OptionError{o.name, "is about handlers, and a loop over Deliveries has none: leave it out; " + o.advice})
		}
	}
	return errors.Join(problems...)
}
