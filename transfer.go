package steadymq

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/retryqueue"
	"github.com/steadymq/steadymq/internal/table"
)

// What becomes of a delivery whose handler has returned, and how a copy of a failed one gets into
// another queue before that is acked. Workers ask for the verdict; the publisher sends the copies.

// verdict is what becomes of a delivery.
type verdict struct {
	outcome Outcome
	delay   time.Duration     // how long it is held before that; of Delayed how long its copy waits
	to      *retryqueue.Queue // where its copy goes, nil if there is none
	last    bool              // the policy gives it up
	inPlace bool              // it is tried again in place after the delay
}

// verdictOn returns what becomes of d, whose handler has returned err. What the handler asks for
// comes before the policy.
func (s *session) verdictOn(d *Delivery, err error) verdict {
	if err == nil {
		return verdict{outcome: Acked}
	}
	asked := askedBy(err)
	switch explicit := asked != nil; {
	case s.ctx.Err() != nil && (!explicit || asked.outcome == Parked): // it is stale
		return verdict{outcome: Requeued}
	case s.config.retry == nil:
		return s.verdictAlone(d, asked)
	case !explicit:
		return s.retried(d, err)
	case asked.outcome == Parked && s.destinations.park != nil:
		return verdict{outcome: Parked, to: s.destinations.park, last: true}
	}
	return s.verdictAlone(d, asked)
}

// verdictAlone is verdictOn without a policy; asked is nil for a plain error.
func (s *session) verdictAlone(d *Delivery, asked *outcomeError) verdict {
	switch {
	case asked == nil && s.brokerDelays:
		return verdict{outcome: Requeued}
	case asked == nil:
		return verdict{outcome: Requeued, delay: holdFor(d.Attempt(), s.config)}
	case asked.outcome == Parked: // never lost, whatever is missing
		s.warnOfNoPark()
		return verdict{outcome: Requeued, delay: holdFor(d.Attempt(), s.config)}
	}
	return verdict{outcome: asked.outcome, delay: asked.delay}
}

// tellAgain is how long a line about copies keeps further ones like it back. That of the handler
// comes every minute already, and both together may be 100 in an hour.
const tellAgain = 5 * time.Minute

func (s *session) warnOfNoPark() {
	if left, ok := s.notices.noPark.allow(tellAgain); ok {
		s.warn("a handler asks to park its message, and there is no queue for that, so the message is held and put back: name one by WithRetry", suppressed(left))
	}
}

// retried is the verdict of the policy on a delivery that failed with a plain error.
func (s *session) retried(d *Delivery, err error) verdict {
	r := s.config.retry
	failed := d.failedBefore() + 1
	hopeless := errors.As(err, new(*DecodeError))
	if r.onlyParks() && !hopeless {
		return s.verdictAlone(d, nil)
	}
	if failed < r.Attempts && !hopeless {
		i := min(failed, len(r.Delays)) - 1
		return verdict{outcome: Delayed, delay: r.Delays[i], to: s.destinations.delays[i]}
	}
	if s.destinations.park == nil {
		return verdict{outcome: Discarded, last: true}
	}
	return verdict{outcome: Parked, to: s.destinations.park, last: true}
}

// asPublished is the handler of a consumer with a policy. A message that comes back from a delay
// has come by the default exchange: the handler sees what it was published with. If it fails, the
// message is kept as it came, because the handler may have changed its exported fields.
func asPublished(c *config, next Handler) Handler {
	if c.retry == nil {
		return next
	}
	return func(ctx context.Context, d *Delivery) (err error) {
		original := d.Delivery
		failed := true
		defer func() { // also if the handler panics
			if failed {
				kept := original
				d.fence.kept.Store(&keptMessage{original: kept})
			}
		}()
		d.showAsPublished()
		err = next(ctx, d)
		failed = err != nil || d.overlooked() != nil
		return err
	}
}

// transfer is the way of a failed delivery into another queue: its copy is published, and only once
// the broker has confirmed that is the delivery acked. Until then it is unsettled and occupies one
// place of the prefetch. It holds the gate of its session open, as a running handler does, so that
// a stop waits for it.
//
// One goroutine at a time has it: a worker, a timer of the session's holds, or the publisher's.
type transfer struct {
	session    *session
	delivery   *Delivery
	outcome    Outcome
	to         *retryqueue.Queue
	text       string    // of the failure
	kind       string    // Go type of its innermost error
	at         time.Time // when the handler failed
	failures   int       // of the transfer, in a row
	unanswered int       // confirms that it has waited for in vain
	alone      bool      // it is sent while no other is in flight
}

// transfer sends a copy of d, whose handler has just failed. It is called within the gate.
func (s *session) transfer(d *Delivery, v verdict, cause error) {
	t := &transfer{
		session: s, delivery: d, outcome: v.outcome, to: v.to, at: time.Now(),
		// Read here and once: the error is the user's, and may change or panic when it is read later.
		text: shorten(errtext.OneLine(fmt.Sprint(cause)), maxErrorText),
		kind: fmt.Sprintf("%T", innermost(cause)),
	}
	if k := d.fence.kept.Load(); k != nil {
		k.copied.Store(true)
	}
	s.gate.stay()
	t.start()
}

// again starts a transfer once more, if its session still takes part in that.
func (t *transfer) again() {
	if !t.session.gate.enter() {
		_ = t.delivery.Requeue()
		return
	}
	t.start()
}

func (t *transfer) start() {
	if !t.session.transfers.add(t) {
		_ = t.delivery.Requeue() // which is stale
		t.session.gate.leave()
		return
	}
	if err := t.session.publisher.send(t); err != nil {
		t.failed(err)
	}
}

// confirmed ends a transfer whose copy is safe.
func (t *transfer) confirmed() {
	defer t.over()
	_ = t.delivery.settle(t.outcome)
}

// failed holds the delivery until the next try, because its copy has not arrived. If the session
// holds nothing any more the delivery goes back to its queue.
func (t *transfer) failed(err error) {
	defer t.over()
	t.failures++
	s := t.session
	switch {
	case t.delivery.Outcome() != Unsettled: // by hand, meanwhile
		return
	case s.closed.Load():
		_ = t.delivery.Requeue() // which is stale
		return
	}
	wait := transferWait(t.failures)
	var away *awayError
	if errors.As(err, &away) {
		wait = max(away.left, minDuration) + jitter(firstRetry)
		s.publisher.tellAway(t, away)
	} else {
		t.tell(err)
	}
	if time.Since(t.at)+wait > s.config.consumerTimeout()/2 {
		// Before the broker takes the session for it, with all its handlers.
		_ = t.delivery.Requeue()
		return
	}
	s.holds.add(t.delivery, wait, t.again)
}

// tell warns of a copy that does not arrive. What concerns all copies the publisher tells.
func (t *transfer) tell(err error) {
	left, ok := t.session.notices.transfer.allow(tellAgain)
	if !ok {
		return
	}
	t.session.warn("a failed message does not get into the queue that it is to go to, so it is held and tried again",
		slog.String("to", t.to.Name), messageID(t.delivery.original().MessageId), slog.Int("tried", t.failures),
		suppressed(left), slog.String("cause", errtext.Brief(err)))
}

func (t *transfer) over() {
	t.session.transfers.remove(t)
	t.session.gate.leave()
}

// transfers are those of a session that are under way. Workers and timers of the session's holds
// add to them, who ends one takes it out, and the session's goroutine releases the rest.
type transfers struct {
	mu       sync.Mutex
	all      map[*transfer]struct{}
	released bool // none is under way any more
}

// add reports whether a transfer may begin.
func (s *transfers) add(t *transfer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.released {
		return false
	}
	if s.all == nil {
		s.all = make(map[*transfer]struct{})
	}
	s.all[t] = struct{}{}
	t.session.stats.held.Add(1)
	return true
}

func (s *transfers) remove(t *transfer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.all[t]; ok {
		delete(s.all, t)
		t.session.stats.held.Add(-1)
	}
}

// release settles, as stale, what is under way when its session is lost: who learns later what
// became of the copy cannot tell it any more, since Run may have returned.
func (s *transfers) release(by *collectingSettler) {
	s.mu.Lock()
	all := s.all
	s.all, s.released = nil, true
	s.mu.Unlock()
	by.stats.held.Add(-int64(len(all)))
	for t := range all {
		_ = t.delivery.fence.settle(by, t.outcome)
	}
}

// longestTransferWait is the longest hold of a delivery whose copy does not arrive.
const longestTransferWait = 30 * time.Second

func transferWait(failures int) time.Duration {
	wait := longestTransferWait
	if failures <= bits.Len(uint(longestTransferWait/time.Second)) {
		wait = min(time.Second<<(failures-1), longestTransferWait)
	}
	return min(jitter(wait), longestTransferWait)
}

// message returns the copy: body and properties as they came, but for what would send further
// copies, be refused or end it, and the headers that say what happened. What the library adds is
// shortened so that the frame of the headers has no more than frameMax bytes, if it can be; cut is
// which headers that concerns.
func (t *transfer) message(id string, frameMax int) (p amqp.Publishing, cut []string) {
	d := t.delivery.original()
	p = amqp.Publishing{
		Headers:         t.headers(id, d),
		ContentType:     d.ContentType,
		ContentEncoding: d.ContentEncoding,
		DeliveryMode:    d.DeliveryMode,
		Priority:        d.Priority,
		CorrelationId:   d.CorrelationId,
		ReplyTo:         d.ReplyTo,
		MessageId:       d.MessageId,
		Timestamp:       d.Timestamp,
		Type:            d.Type,
		AppId:           d.AppId,
		Body:            d.Body,
	}
	cut = fit(&p, frameMax-brokerRoom)
	return p, cut
}

// tellCut warns of a copy that does not tell all, because the message's own headers fill the frame.
func (t *transfer) tellCut(cut []string) {
	if len(cut) == 0 {
		return
	}
	if left, ok := t.session.notices.cut.allow(tellAgain); ok {
		t.session.warn("the headers of a failed message leave no room in their frame (frame_max) for all that its copy is to tell, so that is shortened or left out",
			slog.String("headers", strings.Join(cut, " ")), slog.String("to", t.to.Name),
			messageID(t.delivery.original().MessageId), suppressed(left))
	}
}

// brokerRoom is left free in the frame of the headers: a quorum queue counts deliveries in headers
// that it adds, and clients have to be able to read the message with those, too.
const brokerRoom = 128

// tooLargeError says that the headers of a copy need a longer frame than the broker takes, which
// would end the connection, and all copies in flight on it.
type tooLargeError struct{ size, most int }

func (e *tooLargeError) Error() string {
	return fmt.Sprintf("the headers of the message leave no room for those of its copy: they would need a frame of %d bytes, and the broker takes %d (frame_max)", e.size, e.most)
}

// headers returns the headers of a copy. Those of brokers are left out, since they would be taken
// for what they are not, and so are CC and BCC, which would send the copy elsewhere, too.
func (t *transfer) headers(id string, d *amqp.Delivery) amqp.Table {
	s := t.session
	headers := make(amqp.Table, len(d.Headers)+10)
	for name, value := range d.Headers {
		if name != "CC" && name != "BCC" && !strings.HasPrefix(name, "x-") {
			headers[name] = value
		}
	}
	failed := t.delivery.failedBefore() + 1
	if !t.delivery.fromHere() { // else there is what it was first published with
		headers[exchangeHeader], headers[routingKeyHeader] = d.Exchange, d.RoutingKey
	}
	headers[attemptHeader] = int32(failed)
	headers[errorHeader] = t.text
	headers[errorTypeHeader] = t.kind
	headers[queueHeader] = s.queue
	headers[timeHeader] = t.at.UTC().Truncate(time.Second)
	headers[hostHeader] = s.conn.host
	headers[consumerHeader] = s.tag
	headers[copyHeader] = id
	return headers
}

// maxErrorText is how many bytes of an error's text a copy carries.
const maxErrorText = 1024

// fit shortens what the library has added until the frame of the headers has no more than most
// bytes, and returns which headers that concerns. What attempts are counted by stays.
func fit(p *amqp.Publishing, most int) (cut []string) {
	if most <= 0 { // no limit was agreed on
		return nil
	}
	for _, name := range []string{errorHeader, errorTypeHeader, consumerHeader, hostHeader, timeHeader, exchangeHeader, routingKeyHeader} {
		over := headerFrame(p) - most
		if over <= 0 {
			break
		}
		cut = append(cut, name)
		text, _ := p.Headers[name].(string)
		if left := len(text) - over; left > 0 && name == errorHeader {
			p.Headers[name] = shorten(text, left)
			continue
		}
		delete(p.Headers, name)
	}
	return cut
}

// headerFrame returns the size of the frame of the headers (AMQP 0-9-1, 2.3.5.2 and 4.2.6.1).
func headerFrame(p *amqp.Publishing) int {
	const frame, fixed = 8, 2 + 2 + 8 + 2
	size := frame + fixed + table.Size(p.Headers) + 1 + 1 + 8 // delivery mode, priority, timestamp
	for _, text := range []string{p.ContentType, p.ContentEncoding, p.CorrelationId, p.ReplyTo, p.MessageId, p.Type, p.AppId} {
		size += 1 + len(text)
	}
	return size
}

// shorten returns at most n bytes of text, without half a character.
func shorten(text string, n int) string {
	text = strings.ToValidUTF8(text, "\uFFFD")
	if len(text) <= n {
		return text
	}
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n]
}

// innermost returns the error that the others wrap. Of joined errors it follows the first.
func innermost(err error) error {
	for {
		next := errors.Unwrap(err)
		if joined, ok := err.(interface{ Unwrap() []error }); ok {
			if all := joined.Unwrap(); len(all) > 0 { // asked once: it is the user's
				next = all[0]
			}
		}
		if next == nil {
			return err
		}
		err = next
	}
}
