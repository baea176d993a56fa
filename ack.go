package steadymq

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// What becomes of a delivery: the outcomes, the fence that lets it settle only once, and the errors
// by which a Handler asks for an outcome. Workers give deliveries to handlers, and sessions send
// the settlements.

// Outcome is what became of a [Delivery].
type Outcome uint32

const (
	// Unsettled: no settlement yet. The broker holds the message for this session.
	Unsettled Outcome = iota
	// Acked: the message is done (basic.ack).
	Acked
	// Requeued: the message goes back to its queue (basic.reject with requeue). Of a stream nothing
	// is sent: the message is given to a handler again.
	Requeued
	// Discarded: the message is dropped, or dead-lettered if its queue has a dead-letter exchange
	// (basic.reject without requeue).
	Discarded
	// Stale: the session ended first and nothing was sent. The broker delivers the message again.
	Stale
	// Parked: the message is given up and kept, with its cause, in the park queue of [WithRetry]
	// (its copy was confirmed there, then basic.ack).
	Parked
	// Delayed: the message waits in the queue of a delay of [WithRetry] and comes back then (its
	// copy was confirmed there, then basic.ack).
	Delayed

	outcomes // how many there are

	keptLater // what Unsettled is once its handler has returned Later; nobody outside sees it
)

// String returns the outcome in lower case.
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
	case Parked:
		return "parked"
	case Delayed:
		return "delayed"
	}
	return "unknown"
}

// fence is what a delivery shares with its copies, so that all of them together settle once. It is
// the Acknowledger of their amqp.Delivery. The goroutine that reads from the socket makes it.
// Whoever takes the delivery, a worker or, if no handler can be given it, the session, then sets
// tag and settler. After that only the atomic fields change, on any goroutine.
type fence struct {
	origin Delivery // the delivery itself, in one allocation with its fence
	// tag is a copy, because the exported DeliveryTag belongs to the caller, who may change it.
	tag     uint64
	outcome atomic.Uint32
	tries   uint32 // tries in place before this one
	settler settler
	refused atomic.Pointer[error]       // why a settlement by hand was refused, which left it unsettled
	kept    atomic.Pointer[keptMessage] // of a stream, or of a try that failed under WithRetry or with a key; else nil

	turn    keyTurn       // among those of its key, under the mutex of its order; nil if it has no key
	number  uint64        // its place among the deliveries of its session, from 1; 0 without an order
	arrived time.Duration // when it did, as its order counts
}

// keptMessage is a message as the broker delivered it, because its handler may change the exported
// fields: for all tries in place of a message of a stream, or for the copy of one that failed. The
// worker stores it, of a stream before the handler runs, else after that, when something that the
// handler has left behind may read the delivery.
type keptMessage struct {
	original  amqp.Delivery
	offset    int64       // in the stream
	hasOffset bool        // offset is set
	copied    atomic.Bool // it has a transfer, so it goes back as one that was never started
}

// isCopied reports whether the delivery has a transfer.
func (f *fence) isCopied() bool {
	k := f.kept.Load()
	return k != nil && k.copied.Load()
}

// keyTurn is the turn of a delivery among those of its key.
type keyTurn interface {
	unknown() error // why its key is not known; nil if it is
}

var _ amqp.Acknowledger = (*fence)(nil)

// settler puts one settlement on the wire. settle is called once per delivery, and sent after it if
// it has returned nil.
type settler interface {
	settle(d *Delivery, o Outcome) error
	sent(d *Delivery, o Outcome)
	number() uint64
	source() (queue, host string)
	context() context.Context
	settledLater(d *Delivery) // called once settle has been, for a delivery that was kept for later
}

// Ack settles the delivery as done (basic.ack). It returns nil when the frame was handed to the
// connection. It does not wait for the broker, for basic.ack has no reply: only a clean stop proves
// it, see [Consumer.Run]. Where the connection takes no more bytes Ack waits for room, until the
// connection is given up.
//
// The error is, by [errors.Is], [ErrStale] if the session is over, and [ErrSettled] if the delivery
// was settled before. Then nothing was sent.
func (d *Delivery) Ack() error { return d.settle(Acked) }

// Requeue puts the message back into its queue at once (basic.reject with requeue, which counts
// towards a quorum queue's delivery limit). A stream has nothing to requeue into: there a handler
// gets the message again after 10 ms, as another [Delivery] with [Delivery.Attempt] one higher. The
// errors are those of [Delivery.Ack].
func (d *Delivery) Requeue() error { return d.settle(Requeued) }

// Discard drops the message, or dead-letters it if its queue has a dead-letter exchange
// (basic.reject without requeue, https://www.rabbitmq.com/docs/dlx). The errors are those of
// [Delivery.Ack].
func (d *Delivery) Discard() error { return d.settle(Discarded) }

func (d *Delivery) settle(o Outcome) error {
	if d.fence == nil {
		return errUndelivered
	}
	return d.fence.settle(d.fence.settler, o)
}

// settle claims the delivery by compare-and-swap and only then sends, so of two settlements at the
// same moment one frame reaches the wire.
func (f *fence) settle(by settler, o Outcome) error {
	if !f.outcome.CompareAndSwap(uint32(Unsettled), uint32(o)) {
		return f.settleKept(by, o)
	}
	return f.send(by, o)
}

// settleKept is settle for a delivery that is not unsettled, unless it was kept for later.
func (f *fence) settleKept(by settler, o Outcome) error {
	switch {
	case f.outcome.CompareAndSwap(uint32(keptLater), uint32(o)):
		defer by.settledLater(&f.origin) // even if the hook that is told ends the goroutine
		return f.send(by, o)
	case f.origin.Outcome() == Stale:
		return ErrStale
	}
	return ErrSettled
}

func (f *fence) send(by settler, o Outcome) error {
	err := by.settle(&f.origin, o)
	switch {
	case err == nil:
		by.sent(&f.origin, o)
	case errors.Is(err, ErrStale):
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

// refuse notes why a settlement was refused, for the case that the handler ignores the error.
func (f *fence) refuse(reason *error) error {
	f.refused.Store(reason)
	return *reason
}

// overlooked returns the error of a handler that returned nil although its settlement of d by hand
// was refused: an ack is not what such a handler asked for. It returns nil if no settlement was
// refused, or if another one succeeded.
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

// detached settles the deliveries of NewDelivery, which belong to no session.
type detached struct{ to amqp.Acknowledger }

func (a detached) number() uint64 { return 0 }

func (a detached) sent(*Delivery, Outcome) {}

func (a detached) source() (queue, host string) { return "", "" }

func (a detached) context() context.Context { return noContext{} }

func (a detached) settledLater(*Delivery) {}

func (a detached) settle(d *Delivery, o Outcome) error {
	if a.to == nil {
		return nil
	}
	if o.acks() {
		return a.to.Ack(d.fence.tag, false)
	}
	return a.to.Reject(d.fence.tag, o == Requeued)
}

// acks reports whether the outcome is sent as basic.ack.
func (o Outcome) acks() bool { return o == Acked || o == Parked || o == Delayed }

// outcomeError carries an outcome in a handler's error.
type outcomeError struct {
	outcome Outcome
	delay   time.Duration
	err     error
}

func (e *outcomeError) Error() string {
	if e.err == nil {
		return "steadymq: message " + e.outcome.String()
	}
	return e.err.Error()
}

func (e *outcomeError) Unwrap() error { return e.err }

// Requeue returns an error that makes a [Handler] put its message back at once, without the hold of
// [WithRequeueDelay]. The message may come straight back, to this consumer too: use it for "another
// consumer should take this". On a quorum queue with a delivery limit (20 by default since RabbitMQ
// 4.0) that many tries take milliseconds, and then the broker drops the message. A message of a
// stream is tried again in place after 10 ms.
//
// err may be nil. [errors.Is] and [errors.As] see through to it.
func Requeue(err error) error { return &outcomeError{outcome: Requeued, err: err} }

// RequeueAfter returns an error that makes a [Handler] put its message back after d, or try it
// again in place if it is one of a stream. It counts towards a delivery limit like any other way
// back. Until then the message stays unsettled and occupies one place of the prefetch (see
// [WithRequeueDelay]), but no worker. When the consumer stops it goes back at once.
//
// Keep d well below the broker's consumer timeout (30 min by default). A d of zero or less means at
// once. err may be nil. [errors.Is] and [errors.As] see through to it.
func RequeueAfter(err error, d time.Duration) error {
	return &outcomeError{outcome: Requeued, delay: max(d, 0), err: err}
}

// Discard returns an error that makes a [Handler] drop its message, or dead-letter it if the queue
// has a dead-letter exchange. err may be nil. [errors.Is] and [errors.As] see through to it.
func Discard(err error) error { return &outcomeError{outcome: Discarded, err: err} }

// Park returns an error that makes a [Handler] give its message up without losing it: a copy goes
// into the park queue of [WithRetry], with err as its cause, and once the broker has confirmed that
// the message is acked. Where no park queue is named the message is held and put back, as after a
// plain error, and a line in the log says so; on a stream it is tried again in place. err may be
// nil. [errors.Is] and [errors.As] see through to it. The program in examples/unpark brings parked
// messages back to their queue.
func Park(err error) error { return &outcomeError{outcome: Parked, err: err} }

// Later is what a [Handler] returns, wrapped or not, to leave its delivery unsettled: somebody else
// settles it, by [Delivery.Ack], [Delivery.Requeue] or [Delivery.Discard] on any goroutine, before
// or after the handler has returned. The worker is free for the next delivery. It is no failure:
// neither hook nor log tells of it, and [WithRetry] has no part in what follows.
//
// Until then the delivery takes up one place of the prefetch, and [Stats].Later counts it. As many
// as the prefetch stop everything behind them, as one does on a stream, where no ack overtakes it;
// a line in the log says so after a minute or two. A stop waits for it within the limit of
// [WithDrainTimeout], as for a running handler, and a [*DrainError] tells how many were left. When
// its session is lost, or that limit has passed, it is [Stale]: settling it returns [ErrStale], and
// the broker delivers the message again. If the broker cancels the consumer it can be settled for
// as long as that limit. [Delivery.Context] ends then; the context that the handler was given does
// so too, but with [WithHandlerTimeout] that ends when the handler returns.
//
// Settle it well before the broker's consumer timeout (30 min by default), which ends the session
// with all of its deliveries. One that nobody settles, such as that of a panic elsewhere, stays
// unsettled until then. A handler that panics with Later has failed like any other.
var Later error = &outcomeError{outcome: Unsettled, err: errors.New("steadymq: the delivery is settled later")}

// OutcomeOf returns the outcome that a handler's error asks for, and whether it does so explicitly:
// true for nil, which acks, for [Later], which leaves the delivery [Unsettled], and for what
// [Discard], [Park], [Requeue] and [RequeueAfter] return, wrapped or not; false for any other
// error, which puts the message back after a hold, or is for the policy of [WithRetry]. A
// [Middleware] that has a policy for failures leaves the explicit ones alone.
func OutcomeOf(err error) (o Outcome, explicit bool) {
	if err == nil {
		return Acked, true
	}
	if v := askedBy(err); v != nil {
		return v.outcome, true
	}
	return Requeued, false
}

// askedBy returns the outcome that a handler's error asks for, nil if it is a plain one. Nobody
// settles later what a panic has ended.
func askedBy(err error) *outcomeError {
	var v *outcomeError
	if !errors.As(err, &v) || v.outcome == Unsettled && errors.As(err, new(*PanicError)) {
		return nil
	}
	return v
}

// isLater reports whether a handler's error is Later, which is no failure.
func isLater(err error) bool {
	o, explicit := OutcomeOf(err)
	return explicit && o == Unsettled
}

// Handler handles one delivery. Its error decides the outcome: nil acks the message; [Discard]
// drops or dead-letters it; [Requeue] and [RequeueAfter] put it back; [Park] keeps it in a queue
// for those that are given up; [Later] leaves it to be settled by hand; any other error, and a
// panic, puts it back after the hold of [WithRequeueDelay], which grows with every failure. With
// [WithRetry] such a message waits in a queue of its delay instead, outside of the prefetch, and is
// given up after the last attempt. The library drops nothing unless the handler says so, or a
// [Retry] without a Park queue.
//
// Up to [WithConcurrency] handlers run at once. ctx carries the values of Run's context. It ends
// when the delivery's session is lost ([context.Cause] is a [*SessionError]), after
// [WithHandlerTimeout] ([ErrHandlerTimeout]), or when the drain limit has passed ([*DrainError]).
// It does not end with Run's context, so that running handlers can finish. Work done for a session
// that was lost is done again, since the broker delivers the message once more: make it idempotent.
// An error returned after ctx has ended because the session was lost, or the drain limit has
// passed, is no failure: the broker has the message back already.
//
// A failed message comes later than those behind it, also with one worker. Without [WithRetry] it
// is held until then: as many failing messages as the prefetch stop everything behind them. A
// stream has no way back: there a message that was not acked or discarded is given to a handler
// again, in place, with [Delivery.Attempt] one higher, and no ack overtakes it.
//
// RabbitMQ itself may drop a message: a quorum queue with a delivery limit
// (https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling), which is 20 by default
// since RabbitMQ 4.0 and none before, drops a message that was put back more often, or dead-letters
// it. Up to 4.2 every way back counts, also that of messages that no handler has seen; since 4.3
// only what a handler has failed with. With the default holds a message that always fails gets
// there after two to three hours. Classic queues and streams do not count. A queue that [WithQueue]
// declares has no such limit unless you give one.
type Handler func(ctx context.Context, d *Delivery) error

// Middleware wraps a [Handler], see [WithMiddleware]; the first one given is the outermost. It may
// look at the error and replace it, and with it the outcome; see [OutcomeOf]. It is called once in
// every Run, in that of a [Group] once for each consumer, and the handler it returns by several
// goroutines at once. One that was made with wrong arguments may panic with an [*OptionError] when
// it is called: Run then returns that error before it dials, with those of the others.
type Middleware func(next Handler) Handler

// Handlers that take a decoded body, and the error of a body that does not decode.

// Decode returns a [Handler] that decodes the body of each message into a T for h:
//
//	steadymq.Decode(json.Unmarshal, func(ctx context.Context, d *steadymq.Delivery, o Order) error {
//		return store(ctx, o)
//	})
//
// An error of unmarshal becomes a [*DecodeError], without a call of h. Such a body never gets
// better, so a consumer that has a place for messages that are given up on sends it there at once.
// Any other takes it for a plain error: the message is held for longer and longer, and is not lost.
//
// What says nothing about the body is no DecodeError. An error of unmarshal that asks for an
// outcome is returned as it is: [RequeueAfter] for a schema that could not be fetched, [Discard]
// for a body that nobody wants to see. A panic of unmarshal is a failure like a panic of h: a bug
// of the decoder may be mended.
//
// unmarshal is called once for each try, by several goroutines at once. It is given a copy of the
// body, which it may change and keep; that of the delivery stays as it came. T may be any type:
//
//   - For a pointer type unmarshal is given a pointer to a new zero value, and h gets that pointer,
//     which is never nil. A JSON null leaves the value zero.
//   - For an interface type unmarshal is given a pointer to a nil interface. [json.Unmarshal] fills
//     an any, and refuses every interface that has methods.
//   - For all others it is given a pointer to a zero value.
//
// If unmarshal or h is nil, so is the Handler, which [Consumer.Run] and [Group.Handle] refuse with
// an [*OptionError].
func Decode[T any](unmarshal func([]byte, any) error, h func(context.Context, *Delivery, T) error) Handler {
	if unmarshal == nil || h == nil {
		return nil
	}
	kind := reflect.TypeFor[T]()
	return func(ctx context.Context, d *Delivery) error {
		v := new(T)
		into := any(v)
		if kind.Kind() == reflect.Pointer {
			made := reflect.New(kind.Elem())
			reflect.ValueOf(v).Elem().Set(made)
			into = made.Interface()
		}
		if err := unmarshal(bytes.Clone(d.Body), into); err != nil {
			return undecoded(d, kind, err)
		}
		return h(ctx, d, *v)
	}
}

// undecoded returns the error of a handler whose unmarshal has returned err.
func undecoded(d *Delivery, into reflect.Type, err error) error {
	err = safeError(err)
	if _, explicit := OutcomeOf(err); explicit || errors.As(err, new(*PanicError)) {
		return err // the second is one that panics when it is read, often a nil pointer meant as no error
	}
	return &DecodeError{Queue: d.Queue(), MessageID: d.MessageId, Size: len(d.Body), Into: into.String(), Err: err}
}

// DecodeError tells of a body that [Decode] could not decode. [errors.As] finds it in what a
// middleware or [Hooks].HandlerFailed is given.
type DecodeError struct {
	// Queue is the queue that the message came from, "" for a Delivery of NewDelivery.
	Queue string
	// MessageID is the message's id as its publisher has set it, or "".
	MessageID string
	// Size is the number of bytes of the body.
	Size int
	// Into is the Go type that was to be filled.
	Into string
	// Err is what the decoder returned. Its text may quote the body, and with it a secret: those of
	// encoding/json do.
	Err error `json:"-"`
}

// Error tells queue, message, size and type, and of Err only its type and, for encoding/json, the
// place. It quotes nothing of the body.
func (e *DecodeError) Error() string {
	where, message := "", "a message"
	if e.Queue != "" {
		where = "queue " + e.Queue + ": "
	}
	if e.MessageID != "" {
		message = fmt.Sprintf("message %q", e.MessageID)
	}
	return fmt.Sprintf("steadymq: %sthe body of %s (%d bytes) does not decode into %s: %s", where, message, e.Size, e.Into, blind(e.Err))
}

// Unwrap returns what the decoder returned.
func (e *DecodeError) Unwrap() error { return e.Err }

// blind describes an error without its text: by the innermost type, for those around it are of fmt
// and errors and say nothing.
func blind(err error) string {
	var syntax *json.SyntaxError
	var mismatch *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return fmt.Sprintf("%T at byte %d", syntax, syntax.Offset)
	case errors.As(err, &mismatch):
		return fmt.Sprintf("%T (%v) at byte %d", mismatch, mismatch.Type, mismatch.Offset)
	}
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return fmt.Sprintf("%T", err)
}
