package sim_test

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"runtime"
	"time"

	"github.com/steadymq/steadymq"
)

// simAct is how a handler behaves.
type simAct int

const (
	actOK     simAct = iota
	actSlow          // up to 500 ms
	actSlower        // up to 8 s
	actFail          // a plain error
	actPanic
	actGoexit
	actRequeue
	actRequeueAfter
	actDiscard
	actHang     // until its context ends, 40 s at most
	actIgnore   // does not look at its context for up to 20 s
	actAck      // settles by hand
	actAckTwice // twice
	actRace     // two goroutines settle at once
	actReject   // by hand through the driver's own methods
	actMultiple // asks for multiple=true, and takes no notice that it is refused
	actLate     // another goroutine acks after the handler has returned
	actStale    // acks after its context has ended
	numFirstActs

	actAckFail      simAct = iota - 1 // acks by hand, then returns an error
	actDiscardPanic                   // discards by hand, then panics
	actCutOff                         // waits for the end of its context, then returns an error of its own
	numMoreActs

	actPark simAct = iota - 2
	numActs
)

var errSimHandler = errors.New("the handler failed")

// dice is what a delivery decides for its handler: the same for the same seed, message and try,
// whatever the scheduler does.
func (s *sim) dice(id string, try int) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%d/%s/%d", s.plan.seed, id, try)
	return h.Sum64()
}

func (s *sim) act(dice uint64, try int) simAct {
	switch {
	case s.calm.Load():
		return actOK
	case s.away.Load() > 0:
		return actFail
	case try > 4:
		return actOK
	}
	sum := 0
	for _, w := range s.plan.acts {
		sum += w
	}
	n := int(dice % uint64(sum))
	for a, w := range s.plan.acts {
		if n -= w; n < 0 {
			return simAct(a)
		}
	}
	return actOK
}

// simKey is the identity of a delivery on the client's side.
type simKey struct {
	consumer string // tag
	delivery uint64
}

// simHandling is one call of a handler.
type simHandling struct {
	s    *sim
	c    *simConsumer
	run  *simRun
	d    *steadymq.Delivery
	key  simKey
	dice uint64

	failed int // how often the message has, as its copy says
	began  time.Duration
}

// span draws a duration from the handling's dice.
func (h *simHandling) span(limit time.Duration) time.Duration {
	return time.Duration(h.dice/7919%uint64(limit/1e6)+1) * time.Millisecond
}

// handle is the handler of one Run.
func (c *simConsumer) handle(run *simRun) steadymq.Handler {
	return func(ctx context.Context, d *steadymq.Delivery) (err error) {
		h := &simHandling{s: c.s, c: c, run: run, d: d, key: simKey{d.ConsumerTag, d.DeliveryTag}}
		try := c.s.judge.started(h, ctx)
		h.dice = c.s.dice(d.MessageId, try)
		c.paced()
		act := h.way(c.sicken(c.s.act(h.dice, try)))
		if c.plan.retry != nil && c.s.poisonous(d.MessageId) {
			act = pick(rand.New(rand.NewPCG(h.dice, 2)), actFail, actFail, actPanic)
		}
		if run.trip.Swap(false) {
			act = actOK
			c.s.judge.closes(run, c)
			run.stop()
		}
		returned := false
		c.s.work.Add(1)
		defer c.s.work.Done()
		defer func() {
			if returned {
				c.s.judge.returned(h, act, err)
			} else {
				c.s.judge.returned(h, act, errSimHandler) // a panic or Goexit
			}
		}()
		c.getStuck()
		err = h.behave(ctx, act)
		returned = true
		return err
	}
}

func (h *simHandling) behave(ctx context.Context, act simAct) error {
	switch act {
	case actSlow:
		time.Sleep(h.span(500 * time.Millisecond))
	case actSlower:
		return h.wait(ctx, h.span(8*time.Second))
	case actFail:
		return errSimHandler
	case actPanic:
		panic(fmt.Sprint("the handler panics for ", h.d.MessageId))
	case actGoexit:
		runtime.Goexit()
	case actRequeue:
		return steadymq.Requeue(errSimHandler)
	case actRequeueAfter:
		return steadymq.RequeueAfter(errSimHandler, h.span(5*time.Second))
	case actDiscard:
		return steadymq.Discard(nil)
	case actKeep:
		return h.keep()
	case actPark:
		return fmt.Errorf("wrapped: %w", steadymq.Park(errSimHandler))
	case actHang:
		return h.wait(ctx, 40*time.Second)
	case actIgnore:
		time.Sleep(h.span(20 * time.Second))
	default:
		return h.settle(ctx, act)
	}
	return nil
}

// wait works for d unless ctx ends first.
func (h *simHandling) wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		h.s.judge.outlived(h, d)
		return nil
	case <-ctx.Done():
		h.s.judge.ended(h, ctx)
		return ctx.Err()
	}
}

// settle is the ways to settle by hand.
func (h *simHandling) settle(ctx context.Context, act simAct) error {
	switch act {
	case actAck:
		h.expect(h.try(steadymq.Acked, h.d.Ack), nil, steadymq.ErrStale)
	case actAckTwice:
		h.expect(h.try(steadymq.Acked, h.d.Ack), nil, steadymq.ErrStale)
		h.expect(h.d.Ack(), steadymq.ErrSettled, steadymq.ErrStale)
		h.expect(h.d.Discard(), steadymq.ErrSettled, steadymq.ErrStale)
	case actRace:
		h.race()
	case actReject:
		h.expect(h.try(steadymq.Requeued, func() error { return h.d.Nack(false, true) }), nil, steadymq.ErrStale)
	case actMultiple:
		h.expect(h.d.Delivery.Ack(true), steadymq.ErrMultiple)
		h.expect(h.d.Nack(true, true), steadymq.ErrMultiple)
	case actLate:
		h.later()
	case actStale:
		return h.stale(ctx)
	case actAckFail:
		h.expect(h.try(steadymq.Acked, h.d.Ack), nil, steadymq.ErrStale)
		return errSimHandler
	case actDiscardPanic:
		h.expect(h.try(steadymq.Discarded, h.d.Discard), nil, steadymq.ErrStale)
		panic("the handler panics after it has discarded")
	case actCutOff:
		if err := h.wait(ctx, 40*time.Second); err != nil {
			return fmt.Errorf("%w: %w", errSimHandler, err)
		}
	}
	return nil
}

// try notes what is about to be settled before it is.
func (h *simHandling) try(o steadymq.Outcome, settle func() error) error {
	h.s.judge.allow(h.key, o)
	return settle()
}

func (h *simHandling) race() {
	first := make(chan error)
	go func() { first <- h.try(steadymq.Acked, h.d.Ack) }()
	second := h.try(steadymq.Requeued, h.d.Requeue)
	errs := []error{<-first, second}
	h.expect(errs[0], nil, steadymq.ErrSettled, steadymq.ErrStale)
	h.expect(errs[1], nil, steadymq.ErrSettled, steadymq.ErrStale)
	if errs[0] == nil && errs[1] == nil {
		h.s.judge.violate("I1", "both of two settlements of %v were accepted", h.key)
	}
}

// later settles from another goroutine, long after the handler.
func (h *simHandling) later() {
	h.s.work.Go(func() {
		time.Sleep(20*time.Millisecond + h.span(40*time.Second))
		h.expect(h.d.Ack(), steadymq.ErrSettled, steadymq.ErrStale)
	})
}

// stale waits for the end of its session and acks then.
func (h *simHandling) stale(ctx context.Context) error {
	if err := h.wait(ctx, 40*time.Second); err == nil {
		return nil
	}
	lost := errors.As(context.Cause(ctx), new(*steadymq.SessionError))
	time.Sleep(h.span(10 * time.Second))
	err := h.try(steadymq.Acked, h.d.Ack)
	if lost {
		h.expect(err, steadymq.ErrStale)
		return err
	}
	h.expect(err, nil, steadymq.ErrStale)
	return err
}

// expect checks what a settlement returned.
func (h *simHandling) expect(err error, want ...error) {
	h.s.judge.canary("a settlement's error", err)
	for _, w := range want {
		if errors.Is(err, w) || err == nil && w == nil {
			return
		}
	}
	h.s.judge.violate("I1", "settling %v by hand returned %v, want one of %v", h.key, err, want)
}
