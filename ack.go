package steadymq

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Outcome is what became of a delivery.
type Outcome uint32

const (
	// Unsettled: no settlement yet. The broker holds the message for this session.
	Unsettled Outcome = iota
	// Acked: basic.ack, the message is done.
	Acked
	// Requeued: basic.reject with requeue, the message goes back to its queue. Of a
	// stream nothing is sent: the message is given to a handler again.
	Requeued
	// Discarded: basic.reject without requeue, the message is dropped or, if
	// its queue has a dead-letter exchange, dead-lettered.
	Discarded
	// Stale: the session ended first. The broker delivers the message again.
	Stale
)

// String gives the outcome in lower case.
func (o Outcome) String() string {
	switch o {
	case Unsettled:
		return "unsettled"
	case Acked:
		return "acked"
	case Requeued:
		return "requeued"
	case Discarded:
		return "discarded"
	case Stale:
		return "stale"
	}
	return "unknown"
}

// Delivery is one message as one session delivered it. Its embedded
// amqp.Delivery has the body, headers and properties.
//
// A delivery is settled at most once, with multiple=false, on the channel that
// delivered it and no other; all methods are safe for concurrent use. A copy of a
// Delivery, made by value, is the same delivery and shares its outcome. The
// embedded Acknowledger is the same fence, so amqp.Delivery's own Ack, Nack and
// Reject are safe too, and refuse multiple=true with ErrMultiple.
//
// Inside a Handler there is usually nothing to settle by hand: the handler's
// error decides. A handler that settles by itself is respected. One that was refused that and
// returns nil has failed, with that refusal: its message is put back, not acked.
type Delivery struct {
	amqp.Delivery

	fence *fence // shared by all copies, nil for one that nobody delivered
}

// fence is what a delivery shares with its copies, so that all of them together
// settle once. It is the Acknowledger of their amqp.Delivery.
type fence struct {
	origin Delivery // in one allocation with its fence
	// tag is a copy: the exported DeliveryTag belongs to the caller, who may
	// change it.
	tag     uint64
	outcome atomic.Uint32
	tries   uint32 // in place, before this one
	settler settler
	refused atomic.Pointer[error] // why a settlement by hand was refused, which left it unsettled
	stream  *streamed             // nil for a queue's
}

// streamed is what is kept of a message of a stream, for all its tries.
type streamed struct {
	came   amqp.Delivery // as it was when its handler was first given it
	offset int64         // its place
	placed bool          // it has one
}

var _ amqp.Acknowledger = (*fence)(nil)

// settler puts one settlement on the wire. It is called once per delivery.
type settler interface {
	settle(d *Delivery, o Outcome) error
	number() uint64
	source() (queue, host string)
}

// newDelivery makes one that is still to be filled and given to init.
func newDelivery() *Delivery {
	f := new(fence)
	f.origin.fence = f
	return &f.origin
}

func (d *Delivery) init(s settler) {
	d.fence.tag = d.DeliveryTag
	d.fence.settler = s
	d.Acknowledger = d.fence
}

// keep notes what the handler is given, which may change all that is exported. The bytes of the
// body and the headers themselves are not copied.
func (d *Delivery) keep() {
	d.fence.stream = &streamed{came: d.Delivery}
}

// again returns the delivery of the next try in place.
func (d *Delivery) again() *Delivery {
	next := newDelivery()
	next.fence.stream = d.fence.stream
	next.Delivery = next.fence.stream.came
	next.DeliveryTag = d.fence.tag
	next.fence.tries = d.fence.tries + 1
	return next
}

// NewDelivery makes a Delivery of no session, for testing handlers. If m has an
// Acknowledger the settlement is passed on to it, once; else it is only
// recorded, see Outcome. For an Attempt above 1 set Redelivered too, as a broker
// does.
func NewDelivery(m amqp.Delivery) *Delivery {
	d := newDelivery()
	d.Delivery = m
	d.init(detached{m.Acknowledger})
	return d
}

// Ack settles the delivery as done. It returns nil when the frame was handed to
// the connection: basic.ack has no reply, only a clean stop proves it (see Run).
// It returns ErrStale if the session is over and ErrSettled if the delivery was
// settled before. It does not wait for the broker.
func (d *Delivery) Ack() error { return d.settle(Acked) }

// Requeue puts the message back into its queue at once (basic.reject with
// requeue, which counts towards a quorum queue's delivery limit). Errors as Ack.
// A stream has nothing to requeue into; there a handler gets the message again, as
// another Delivery with Attempt one higher, after 10 ms.
func (d *Delivery) Requeue() error { return d.settle(Requeued) }

// Discard drops the message, or dead-letters it if its queue has a dead-letter
// exchange (basic.reject without requeue). Errors as Ack.
func (d *Delivery) Discard() error { return d.settle(Discarded) }

// Outcome returns what became of the delivery so far.
func (d *Delivery) Outcome() Outcome {
	if d.fence == nil {
		return Unsettled
	}
	return Outcome(d.fence.outcome.Load())
}

// Session returns the number of the session that delivered the message, counted
// from 1 in each Run; 0 for NewDelivery. (Session, DeliveryTag) is the only
// identity AMQP 0-9-1 gives a delivery.
func (d *Delivery) Session() uint64 {
	if d.fence == nil {
		return 0
	}
	return d.fence.settler.number()
}

// Queue returns the queue the message came from, the broker's own name for it if
// it has one; "" for NewDelivery.
func (d *Delivery) Queue() string {
	if d.fence == nil {
		return ""
	}
	queue, _ := d.fence.settler.source()
	return queue
}

// Host returns the address of the broker that delivered the message; "" for
// NewDelivery.
func (d *Delivery) Host() string {
	if d.fence == nil {
		return ""
	}
	_, host := d.fence.settler.source()
	return host
}

func (d *Delivery) settle(o Outcome) error {
	if d.fence == nil {
		return errUndelivered
	}
	return d.fence.settle(d.fence.settler, o)
}

// settle claims the delivery by compare-and-swap and only then sends: of two
// settlements at the same moment one frame reaches the wire.
func (f *fence) settle(by settler, o Outcome) error {
	if !f.outcome.CompareAndSwap(uint32(Unsettled), uint32(o)) {
		if f.origin.Outcome() == Stale {
			return ErrStale
		}
		return ErrSettled
	}
	err := by.settle(&f.origin, o)
	if errors.Is(err, ErrStale) {
		f.outcome.Store(uint32(Stale))
	}
	return err
}

// claim checks a settlement that came through the amqp.Acknowledger interface.
func (f *fence) claim(tag uint64, multiple bool, o Outcome) error {
	if multiple {
		return f.refuse(&ErrMultiple)
	}
	if tag != f.tag {
		return f.refuse(&errOtherTag)
	}
	return f.settle(f.settler, o)
}

// refuse notes it, for a handler that takes no notice.
func (f *fence) refuse(reason *error) error {
	f.refused.Store(reason)
	return *reason
}

// overlooked is the error of a handler that returned none, but has tried to settle d by hand and
// was refused: an ack would not be what it meant. It is nil if there is nothing of the kind.
func (d *Delivery) overlooked() error {
	reason := d.fence.refused.Load()
	if reason == nil || d.Outcome() != Unsettled {
		return nil
	}
	return fmt.Errorf("the handler returned no error, and what it settled by hand was refused: %w", *reason)
}

var (
	errOtherTag    = errors.New("steadymq: the delivery tag was changed; a delivery can only settle itself; nothing was sent")
	errUndelivered = errors.New("steadymq: this Delivery was not made by NewDelivery, which tests have for that; nothing was sent")
)

// Ack implements amqp.Acknowledger.
func (f *fence) Ack(tag uint64, multiple bool) error {
	return f.claim(tag, multiple, Acked)
}

// Nack implements amqp.Acknowledger.
func (f *fence) Nack(tag uint64, multiple, requeue bool) error {
	return f.claim(tag, multiple, rejected(requeue))
}

// Reject implements amqp.Acknowledger.
func (f *fence) Reject(tag uint64, requeue bool) error {
	return f.claim(tag, false, rejected(requeue))
}

func rejected(requeue bool) Outcome {
	if requeue {
		return Requeued
	}
	return Discarded
}

// detached settles the deliveries of NewDelivery.
type detached struct{ to amqp.Acknowledger }

func (l detached) number() uint64 { return 0 }

func (l detached) source() (queue, host string) { return "", "" }

func (l detached) settle(d *Delivery, o Outcome) error {
	if l.to == nil {
		return nil
	}
	if o == Acked {
		return l.to.Ack(d.fence.tag, false)
	}
	return l.to.Reject(d.fence.tag, o == Requeued)
}

// outcomeError is an outcome that travels in a handler's error.
type outcomeError struct {
	outcome Outcome
	delay   time.Duration
	err     error
}

func (v *outcomeError) Error() string {
	if v.err == nil {
		return "steadymq: message " + v.outcome.String()
	}
	return v.err.Error()
}

func (v *outcomeError) Unwrap() error { return v.err }

// Requeue returns an error that makes a handler put its message back at once,
// without the hold of WithRequeueDelay. The message may come straight back, to
// this consumer too: use it for "another consumer should take this". On a quorum
// queue with a delivery limit (20 by default since RabbitMQ 4.0) that many tries
// take milliseconds, and then the broker drops the message. A message of a stream
// is tried again in place after 10 ms. err may be nil; errors.Is and errors.As see
// through to it.
func Requeue(err error) error { return &outcomeError{outcome: Requeued, err: err} }

// RequeueAfter returns an error that makes a handler put its message back, or try
// it again in place if it is one of a stream, after d. It counts towards a delivery
// limit like any other way back. Until then the message stays unsettled and occupies
// one place of the prefetch (see WithRequeueDelay), but no worker. When the consumer
// stops it goes back at once. Keep d well below the broker's consumer timeout (30
// minutes by default). A d of zero or less means at once. err may be nil.
func RequeueAfter(err error, d time.Duration) error {
	return &outcomeError{outcome: Requeued, delay: max(d, 0), err: err}
}

// Discard returns an error that makes a handler drop its message, or
// dead-letter it if the queue has a dead-letter exchange. err may be nil.
func Discard(err error) error { return &outcomeError{outcome: Discarded, err: err} }

// OutcomeOf returns the outcome that a handler's error asks for, and whether it does
// so explicitly: true for nil, which acks, and for what Discard, Requeue and
// RequeueAfter return, wrapped or not; false for any other error, which puts the
// message back after a hold. A middleware that has a policy for failures leaves the
// explicit ones alone.
func OutcomeOf(err error) (o Outcome, explicit bool) {
	if err == nil {
		return Acked, true
	}
	if v := (*outcomeError)(nil); errors.As(err, &v) {
		return v.outcome, true
	}
	return Requeued, false
}

// Handler handles one delivery. Its error decides the outcome: nil acks the
// message; Discard drops or dead-letters it; Requeue and RequeueAfter put it
// back; any other error, and a panic, puts it back after the hold of
// WithRequeueDelay, which grows with every failure. The library drops nothing
// unless the handler says so.
//
// RabbitMQ does: a quorum queue with a delivery limit, which is 20 by default since
// RabbitMQ 4.0 (none before), drops a message, or dead-letters it, that was put back
// more often. Up to 4.2 every way back counts, also that of messages no handler has
// seen; since 4.3 only what a handler failed with. With the default holds a message
// that always fails gets there after some hours. Classic queues and streams count
// nothing.
//
// A failed message comes later than those behind it, also with one worker, and is
// held until then: as many failing messages as the prefetch stop everything behind
// them (see WithRequeueDelay). A stream has no way back: there a message that was not
// acked or discarded is given to a handler again, in place, with Attempt one higher,
// and no ack overtakes it.
//
// An error returned after ctx ended because the session was lost or the drain limit
// passed is no failure: the broker has the message back already.
//
// Up to WithConcurrency handlers run at once. ctx carries the values of Run's
// context and ends when the delivery's session is lost (context.Cause is a
// *SessionError), after WithHandlerTimeout (ErrHandlerTimeout), or when the drain
// limit has passed (*DrainError); it does not end with Run's context, so that
// running handlers can finish. Work done after the session is lost is done
// again, for the broker delivers the message once more: make it idempotent.
type Handler func(ctx context.Context, d *Delivery) error

// Middleware wraps a handler. The first one given is the outermost. It may look
// at and replace the error, and with it the outcome.
type Middleware func(next Handler) Handler
