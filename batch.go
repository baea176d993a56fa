package steadymq

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Batches: how deliveries are collected for a handler that takes several at once, and how each of
// them gets its outcome. The workers of a pool do both.

// BatchHandler handles several deliveries at once, at least one and at most the size of
// [WithBatch]. Its error decides their outcomes: nil acks all of them; a [*BatchError] holds the
// error of each; any other error, and a panic, is that of all. What an error makes of a message is
// what it does under a [Handler], for each on its own: [Discard], [Requeue], [RequeueAfter], [Park]
// and [Later] are followed, a plain error holds it ([WithRequeueDelay]) or is for the policy of
// [WithRetry]. What the handler has settled by hand stays so. Each message has an ack of its own
// (multiple=false).
//
// The deliveries are in the order in which they came, and all of one session. [WithConcurrency] is
// how many batches are handled at once; one batch is collected at a time, and only by a worker that
// handles none. The slice belongs to the handler, which may change and keep it.
//
// A message that has failed before, as far as [Delivery.Attempt] tells (it is above 1), comes in a
// batch of its own. So one that makes its batch fail does so to the others once. Brokers count a lost
// session as well, so what was prefetched then comes one by one.
//
// ctx is that of a Handler: it ends when the session is lost, after [WithHandlerTimeout], which is
// for a batch as a whole, and at the drain limit, but not with the context of [Consumer.RunBatch]. A
// stop, and a basic.cancel of the broker, end the collecting: the handler is called at once with
// what there is. What was collected when the session is lost is dropped without a call: the broker
// delivers it again.
//
// [Hooks].HandlerFailed is called for each message that failed, with the error that decided it. Where
// that is the error of all, those that the handler has settled by hand did not fail.
type BatchHandler func(ctx context.Context, batch []*Delivery) error

// BatchError is the error of a [BatchHandler] that has an outcome for each message. It may be
// returned as a value or as a pointer, and wrapped.
type BatchError struct {
	// Errs has one entry for each delivery of the batch, in its order as the handler was given it:
	// nil acks, [Discard], [Requeue], [RequeueAfter] and [Park] are followed, and any other error is
	// a failure. A message for which there is no entry has failed; entries beyond the batch mean
	// nothing. Both are logged.
	Errs []error
}

// Error tells how many have failed, and the first error.
func (e BatchError) Error() string {
	failed := e.Unwrap()
	if len(failed) == 0 {
		return fmt.Sprintf("steadymq: none of %d messages failed", len(e.Errs))
	}
	return fmt.Sprintf("steadymq: %d of %d messages failed, the first with: %v", len(failed), len(e.Errs), failed[0])
}

// Unwrap returns the errors that are not nil, for [errors.Is] and [errors.As].
func (e BatchError) Unwrap() []error {
	return slices.DeleteFunc(slices.Clone(e.Errs), func(err error) bool { return err == nil })
}

// errNoEntry is the failure of a message that the handler forgot.
var errNoEntry = errors.New("steadymq: the BatchError of the handler has no entry for this message; Errs needs one for each delivery of the batch, nil for those that are done")

// each returns the errors of a BatchError, and whether err is one.
func each(err error) ([]error, bool) {
	var pointer *BatchError
	if errors.As(err, &pointer) && pointer != nil {
		return pointer.Errs, true
	}
	var value BatchError
	found := errors.As(err, &value)
	return value.Errs, found
}

// batches is how the workers of a pool take several deliveries at once. One of them collects at a
// time, so that two do not share a trickle: it has the baton. Then it handles, while another one
// collects.
type batches struct {
	pool    *pool
	handler BatchHandler
	baton   chan struct{} // holds a value while a worker has it
	timer   *time.Timer   // of the batch that is collected; belongs to who has the baton
}

func newBatches(p *pool, h BatchHandler) *batches {
	timer := time.NewTimer(p.config.batchWait)
	timer.Stop()
	return &batches{pool: p, handler: h, baton: make(chan struct{}, 1), timer: timer}
}

// handleAll handles the deliveries of s until there are no more. It is the loop of a worker.
func (b *batches) handleAll(s *session) {
	var batch []*Delivery
	for more := true; more; {
		batch, more = b.collect(s, batch[:0])
		switch {
		case len(batch) == 0:
		case s.closed.Load(): // the broker has it already
			leave(s, batch)
			b.pool.valve.entered(batch[0], false)
		default:
			b.handle(s, batch)
		}
		clear(batch)
	}
}

// collect waits for deliveries of s and appends them to batch, until that is full or has waited long
// enough. They have passed the gate, so a stop waits for them. It returns false once there is none
// any more; what it has by then is a batch, too.
func (b *batches) collect(s *session, batch []*Delivery) (_ []*Delivery, more bool) {
	select {
	case b.baton <- struct{}{}:
		defer func() { <-b.baton }()
	case <-s.end.Done():
		return batch, false
	}
	batch, more = b.gather(s, batch)
	if len(batch) > 0 && b.pool.valve.withholds(batch[0]) { // it was shut meanwhile
		b.putBack(s, batch)
		batch = batch[:0]
	}
	return batch, more
}

// gather is collect for who has the baton.
func (b *batches) gather(s *session, batch []*Delivery) (_ []*Delivery, more bool) {
	defer b.timer.Stop()
	defer s.collected.Store(0)
	var limit <-chan time.Time // starts with the first delivery
	for len(batch) < b.pool.config.batchSize {
		if len(batch) > 0 && b.pool.valve.shut() { // a try of a breaker is one message
			return batch, true
		}
		d, open := s.inbox.takeBefore(limit)
		if d == nil {
			return batch, open
		}
		d.init(s.settler) // Attempt asks for the queue
		alone := d.Attempt() > 1
		if alone && len(batch) > 0 {
			s.postpone(d)
			return batch, true
		}
		if admit := b.admission(batch); !admit(s, d) {
			return batch, false
		}
		batch = append(batch, d)
		s.collected.Store(int64(len(batch)))
		if alone {
			return batch, true
		}
		if limit == nil {
			b.timer.Reset(b.pool.config.batchWait)
			limit = b.timer.C
		}
	}
	return batch, true
}

// admission returns what lets a delivery into the batch: the first one waits for the valve, which
// counts a batch as one, and the others go along.
func (b *batches) admission(batch []*Delivery) func(*session, *Delivery) bool {
	if len(batch) == 0 {
		return b.pool.admit
	}
	return b.pool.enter
}

// putBack lets a batch be collected anew, because its handler may not start now.
func (b *batches) putBack(s *session, batch []*Delivery) {
	b.pool.valve.entered(batch[0], false)
	for _, d := range slices.Backward(batch) {
		s.gate.leave()
		s.postpone(d)
	}
}

// handle runs the handler for a batch and settles each delivery by its error.
func (b *batches) handle(s *session, batch []*Delivery) {
	c := &batchCall{pool: b.pool, session: s, handler: b.handler, batch: batch}
	c.begin()
	defer c.tell()
	defer func() { b.pool.valve.returned(b.pool.ctx, batch[0], c.failure(), s) }()
	defer leave(s, batch) // even if the hook that conclude calls ends the goroutine
	defer c.conclude()
	c.err = guarded(b.pool, s, batch[0], c.call, batch, &c.err)
}

// leave lets a batch leave the gate of its session.
func leave(s *session, batch []*Delivery) {
	for range batch {
		s.gate.leave()
	}
}

// batchCall is one call of a BatchHandler, on the goroutine of a worker.
type batchCall struct {
	pool      *pool
	session   *session
	handler   BatchHandler
	batch     []*Delivery
	originals []amqp.Delivery // the messages as they came, under WithRetry; see keptMessage
	err       error           // of all
	errs      []error         // of each, if err is nil; nil if none has one
	failed    []failedInBatch
}

// failedInBatch is a delivery that failed, and what became of it.
type failedInBatch struct {
	delivery *Delivery
	became   conclusion
	err      error
}

func (c *batchCall) begin() {
	c.pool.stats.delivered.Add(uint64(len(c.batch)))
	c.pool.stats.handling.Add(int64(len(c.batch)))
	if c.pool.config.retry == nil {
		return
	}
	c.originals = make([]amqp.Delivery, len(c.batch))
	for i, d := range c.batch {
		c.originals[i] = d.Delivery
		d.showAsPublished()
	}
}

// call calls the handler with a slice of its own.
func (c *batchCall) call(ctx context.Context, batch []*Delivery) error {
	err := c.handler(ctx, slices.Clone(batch))
	given, ok := each(err)
	if !ok {
		return err
	}
	errs := make([]error, len(batch))
	for i := range errs {
		errs[i] = errNoEntry
		if i < len(given) {
			errs[i] = safeError(given[i]) // one that cannot be read is no failure of the others
		}
	}
	if len(given) != len(batch) {
		c.tellCount(len(given))
	}
	c.errs = errs // only now: if one of them ends the goroutine all have failed
	return nil
}

func (c *batchCall) tellCount(entries int) {
	if left, ok := c.session.notices.miscounted.allow(time.Minute); ok {
		c.session.warn("a handler of batches returned a BatchError that has not one entry for each message: those without one have failed, entries beyond the batch mean nothing",
			slog.Int("entries", entries), slog.Int("messages", len(c.batch)), suppressed(left))
	}
}

// conclude settles the batch.
func (c *batchCall) conclude() {
	c.pool.stats.handling.Add(-int64(len(c.batch)))
	c.concludeFrom(0)
}

// concludeFrom settles the rest even if a hook ends the goroutine.
func (c *batchCall) concludeFrom(i int) {
	defer func() {
		if i < len(c.batch) {
			c.concludeFrom(i + 1)
		}
	}()
	for ; i < len(c.batch); i++ {
		c.concludeOne(i)
	}
}

func (c *batchCall) concludeOne(i int) {
	d, s, err := c.batch[i], c.session, c.err
	if err == nil && c.errs != nil {
		err = c.errs[i]
	}
	if err == nil {
		err = d.overlooked()
	}
	if err != nil && c.originals != nil {
		d.fence.kept.Store(&keptMessage{original: c.originals[i]})
	}
	failed := err != nil && !isLater(err) && !s.cutOff(err)
	became := s.conclude(d, err)
	if failed && (c.err == nil || !became.byHandler) {
		c.failed = append(c.failed, failedInBatch{d, became, err})
	}
}

// failure is what a breaker has to know: the error of all, or else the first one of a message.
func (c *batchCall) failure() error {
	if c.err == nil && len(c.failed) > 0 {
		return c.failed[0].err
	}
	return c.err
}

// tell reports what has failed. An error of all is told at least once.
func (c *batchCall) tell() {
	if c.err != nil && len(c.failed) == 0 && !isLater(c.err) && !c.session.cutOff(c.err) {
		c.failed = append(c.failed, failedInBatch{c.batch[0], conclusion{byHandler: true}, c.err})
	}
	for _, f := range c.failed {
		c.pool.failed(c.session, f.delivery, f.became, f.err)
	}
}
