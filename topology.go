package steadymq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/retryqueue"
	"github.com/steadymq/steadymq/internal/table"
)

// What a session asks a broker before it consumes. First, what it declares: by the function of
// WithTopology or as WithQueue says, what it asks for instead if the broker refuses, and which
// delivery limit its queue then has. Then, of a stream, where it is.
// openSession keeps the declaration from one round to the next; subscribe calls topology.

// topology declares what the session needs and returns the queue to consume from.
func (s *session) topology(ctx context.Context) (queue string, err error) {
	if s.declaration.queue != "" {
		return s.declaration.queue, nil
	}
	if err := s.checkStream(ctx); err != nil {
		return "", err
	}
	switch {
	case s.config.topology != nil:
		queue, err = s.callTopology(ctx)
	case s.config.declare != nil:
		if queue, err = s.declareQueue(); err != nil {
			err = &declareError{err}
		}
	}
	if queue == "" && err == nil {
		queue = s.config.queue
	}
	if queue == "" && err == nil {
		err = errors.New("no queue: the topology function returned none and New was given none")
	}
	return queue, err
}

func (s *session) callTopology(ctx context.Context) (queue string, err error) {
	queue, err = s.askTopology(ctx)
	if err != nil {
		s.conn.topologyFailures.Add(1)
		return "", err
	}
	err = s.conn.sameQueue(cmp.Or(queue, s.config.queue))
	s.dropOrphans(err)
	return queue, err
}

// dropOrphans deletes what the function has left behind on a connection that others keep. Only of a
// queue that the broker has named it is known that nobody else means it.
func (s *session) dropOrphans(err error) {
	var left *orphanedQueueError
	if !s.grouped || !errors.As(err, &left) {
		return
	}
	for _, queue := range []string{left.was, left.is} {
		if namedByBroker(queue) {
			_, _ = s.channel.QueueDelete(queue, true, false, true) // close-ok follows
		}
	}
}

// askTopology calls the user's function, and checks what it has done to the channel.
func (s *session) askTopology(ctx context.Context) (queue string, err error) {
	before := s.lease.inUse().Misuse()
	call := userCall[string]{
		option: "WithTopology",
		f:      func(ctx context.Context) (string, error) { return s.config.topology(ctx, s.channel) },
		left:   s.abandoned,
	}
	queue, err = call.run(ctx)
	if err != nil {
		return "", err
	}
	if problem := table.ShortString(queue); problem != "" {
		return "", call.named(fmt.Errorf("the queue's name %s", problem))
	}
	switch now := s.lease.inUse().Misuse(); {
	case now.Transactions > before.Transactions:
		return "", call.named(errTransactional)
	case now.Consumers > before.Consumers && s.notices.consumed.CompareAndSwap(false, true):
		s.queue = cmp.Or(queue, s.config.queue) // for the log line
		s.warn("the topology function has consumed on the session's channel: what is delivered to that consumer waits until the session ends")
	}
	return queue, nil
}

var errTransactional = errors.New("the function has made the channel transactional: acks on it would never take effect")

// declaration is what a session asks for when it declares. If the broker refuses a part that is not
// worth failing for, the session asks for less, on a fresh channel, because the refusal has closed
// the first one. Only the try uses it.
type declaration struct {
	limit    limitMode // what it says about the delivery limit
	deadKept bool      // the dead-letter queue exists in another form and is taken as it is
	refusal  error     // of the delivery limit, for the warning
	owned    string    // named by the broker for this connection: asked for, not declared
	anew     bool      // the queue did not exist any more and is declared again

	streamChecked bool              // the broker was asked whether the stream exists
	queue         string            // has been declared by an earlier round
	beside        retryqueue.Asking // for the queues of WithRetry
}

// freshChannelError ends a round of a try after a question that has used the channel up. The next
// round, on a fresh channel, knows the answer. So a connection needs only one channel at a time,
// and the delivery tags of the session count from 1.
type freshChannelError struct {
	streamChecked bool
	queue         string
}

func (*freshChannelError) Error() string { return "a fresh channel is needed" }

// relax changes the declaration after err, so that another round makes sense: it asks for less, or
// keeps the answer that the round has found. It returns false if there is nothing to change.
func (t *declaration) relax(err error) bool {
	var next *freshChannelError
	if errors.As(err, &next) {
		t.streamChecked, t.queue = t.streamChecked || next.streamChecked, next.queue
		return true
	}
	var brokerErr *amqp.Error
	var beside *retryqueue.Refused
	switch {
	case !errors.As(err, &brokerErr) || !brokerErr.Server:
		return false
	case errors.As(err, &beside):
		return t.beside.Relax(beside)
	case brokerErr.Code == amqp.NotFound && errors.As(err, new(*goneError)) && !t.anew:
		t.owned, t.queue, t.anew = "", "", true
		return true
	case brokerErr.Code != amqp.PreconditionFailed:
		return false
	}
	var dead *deadLetterError
	switch {
	case errors.As(err, &dead):
		if t.deadKept || !strings.HasPrefix(brokerErr.Reason, inequivalent) {
			return false
		}
		t.deadKept = true
	case t.limit != limitOmitted && t.limit != limitOff || !strings.HasPrefix(brokerErr.Reason, inequivalentLimit):
		return false
	default:
		t.limit++
		t.refusal = brokerErr
	}
	return true
}

// These are the beginnings of RabbitMQ's refusals, up to the first name in them.
const (
	inequivalent      = "PRECONDITION_FAILED - inequivalent arg '"
	inequivalentLimit = inequivalent + limitArg + "' for queue "
)

// deadLetterError is a refusal of the dead-letter queue, not of the queue itself.
type deadLetterError struct {
	queue string
	err   error
}

func (e *deadLetterError) Error() string {
	return fmt.Sprintf("dead-letter queue %q: %v", e.queue, e.err)
}

func (e *deadLetterError) Unwrap() error { return e.err }

// declareQueue declares what WithQueue asks for, in the order in which one needs the other.
func (s *session) declareQueue() (string, error) {
	q := s.config.declare
	if x := q.Exchange; x != nil {
		if err := s.channel.ExchangeDeclare(x.Name, x.Kind, !x.Transient, false, false, false, x.Args); err != nil {
			return "", fmt.Errorf("exchange %q: %w", x.Name, err)
		}
	}
	if err := s.declareDeadLetter(); err != nil {
		return "", err
	}
	name, err := s.declareItself()
	if err != nil {
		return "", err
	}
	for _, b := range q.Bindings {
		if err := s.channel.QueueBind(name, b.Key, b.Exchange, false, b.Args); err != nil {
			return "", fmt.Errorf("binding to exchange %q: %w", b.Exchange, err)
		}
	}
	return name, nil
}

func (s *session) declareDeadLetter() error {
	q := s.config.declare
	if q.DeadLetter == nil || q.DeadLetter.Queue == "" || s.declaration.deadKept {
		return nil
	}
	args := amqp.Table{"x-queue-type": q.Type}
	if q.Type == "quorum" && s.conn.major() >= 4 {
		args[limitArg] = noLimit
	}
	if _, err := s.channel.QueueDeclare(q.DeadLetter.Queue, true, false, false, false, args); err != nil {
		return &deadLetterError{q.DeadLetter.Queue, err}
	}
	return nil
}

func (s *session) declareItself() (string, error) {
	if s.declaration.owned != "" { // a name that the broker has given must not be declared
		_, err := s.channel.QueueDeclarePassive(s.declaration.owned, false, false, false, false, nil)
		return s.declaration.owned, gone(err, s.declaration.owned)
	}
	q := s.config.declare
	if q.Exclusive {
		s.conn.asked.Store(true)
		declared, err := s.config.declareExclusive(s.channel)
		if err == nil {
			s.conn.own(declared.Name)
		}
		return declared.Name, err
	}
	args := q.args()
	s.delayRetries(args)
	declare := s.channel.QueueDeclare
	switch s.declaration.limit {
	case limitOff:
		args[limitArg] = noLimit
	case limitExisting:
		declare = s.channel.QueueDeclarePassive
	}
	declared, err := declare(s.config.queue, !q.Transient, q.AutoDelete, false, false, args)
	if err == nil {
		s.conn.own(declared.Name)
	}
	return declared.Name, err
}

// declareDestinations declares the queues of WithRetry, or finds them, once in a Run: what becomes
// of them later the publisher finds out. It looks for the queue itself first, unless that was just
// declared, so that a wrong name leaves no queues behind. It returns the step that failed, and why.
func (s *session) declareDestinations() (op string, err error) {
	r := s.config.retry
	if r == nil {
		return "", nil
	}
	if namedByBroker(s.queue) {
		return "topology", &OptionError{"WithRetry", fmt.Sprintf("the queue %q has a name of the broker's: delayed messages would have nowhere to come back to", s.queue)}
	}
	classic := s.config.declare != nil && s.config.declare.Type == "classic"
	s.destinations = newDestinations(r, s.queue, classic, s.conn.major() >= 4)
	if s.asked.Load() == s.queue {
		return "", nil
	}
	if s.config.declare == nil && s.config.topology == nil {
		if _, err := s.channel.QueueDeclarePassive(s.queue, true, false, false, false, nil); err != nil {
			return "consume", err
		}
	}
	for _, d := range s.destinations.all() {
		if err := s.declaration.beside.Declare(s.channel, d); err != nil {
			return "topology", err
		}
	}
	s.asked.Store(s.queue)
	return "", nil
}

// delayRetries asks the broker to delay what comes back to the queue, if it can.
func (s *session) delayRetries(args amqp.Table) {
	q := s.config.declare
	if q.RetryMin == 0 {
		return
	}
	s.queue = s.config.queue // for the log line
	if !s.conn.delaysRetries() {
		if !s.notices.delayedHere.Swap(true) {
			s.warn("this broker cannot delay what comes back to a queue (RabbitMQ can since 4.3), so Queue.RetryMin has no effect and failed messages are held here")
		}
		return
	}
	s.brokerDelays = true
	args[delayedRetryArg+"type"] = "failed"
	args[delayedRetryArg+"min"] = q.RetryMin.Milliseconds()
	args[delayedRetryArg+"max"] = q.RetryMax.Milliseconds()
}

// destinations are where the copies of failed messages of a queue go.
type destinations struct {
	delays []*retryqueue.Queue
	park   *retryqueue.Queue // nil if there is none
}

func newDestinations(r *Retry, queue string, classic, unlimited bool) destinations {
	var all destinations
	for _, d := range r.Delays {
		all.delays = append(all.delays, retryqueue.Delay(queue, d, classic))
	}
	if r.Park != "" {
		all.park = retryqueue.Park(r.Park, classic, unlimited)
	}
	return all
}

// all returns every destination.
func (d *destinations) all() []*retryqueue.Queue {
	if d.park == nil {
		return d.delays
	}
	return append(slices.Clip(d.delays), d.park)
}

// goneError is a 404 for a queue that existed a moment ago.
type goneError struct{ error }

func (e *goneError) Unwrap() error { return e.error }

// gone marks a refusal that says that the queue does not exist. Other 404s do not say so, such as
// that the queue's node is down: then the queue still exists, and declaring another one would leave
// it behind.
func gone(err error, queue string) error {
	if !noQueue(err, queue) {
		return err
	}
	return &goneError{err}
}

// A quorum queue drops a message, or dead-letters it, once it has come back more often than the
// queue's delivery limit: 20 times by default since RabbitMQ 4.0. A handler whose database is down
// for a while would lose all messages that it is given.
const (
	limitArg     = "x-delivery-limit"
	defaultLimit = 20

	// noLimit switches the limit off from RabbitMQ 4.0 on. Before that, when there was no limit by
	// default, it drops a message at its first return.
	noLimit int32 = -1
)

// limitMode is what the declaration of a queue says about its delivery limit. Each mode asks for
// less than the one before.
type limitMode int

const (
	limitAsGiven  limitMode = iota // as the user says, if anything
	limitOff                       // switched off
	limitOmitted                   // not mentioned: the queue has a limit, most likely the default
	limitExisting                  // the queue has a limit that was declared, and is taken as it is
)

// firstLimit returns what a declaration asks for first.
func firstLimit(c *connection, q *Queue) limitMode {
	if q == nil || q.Type != "quorum" || c.major() < 4 || q.deadLetters() {
		return limitAsGiven
	}
	if _, given := q.Args[limitArg]; given {
		return limitAsGiven
	}
	return limitOff
}

// deliveryLimit returns the limit at which this session's queue drops messages, 0 for none, and
// whether that is known: for a queue that others have declared it is a guess.
func (s *session) deliveryLimit() (limit int, known bool) {
	q := s.config.declare
	switch {
	case s.stream != nil, s.declaration.limit == limitOff:
		return 0, true
	case q != nil && (q.Type != "quorum" || q.deadLetters()):
		return 0, true
	}
	if q != nil {
		if n, ok := headerInt(q.Args[limitArg]); ok {
			return int(min(max(n, 0), maxCount)), true
		}
	}
	if s.conn.major() < 4 {
		return 0, false
	}
	return defaultLimit, false
}

// warnOfKeptLimit warns, once in a Run, of a queue that exists with a limit.
func (s *session) warnOfKeptLimit() {
	if s.declaration.limit <= limitOff || s.notices.limitKept.Swap(true) {
		return
	}
	s.warn("the queue was declared before with a delivery limit, which stays: a message that comes back more often is dropped. "+
		"Switch it off by a policy with delivery-limit -1, or delete the queue so that it is declared anew; "+
		"or say what is meant by Queue.DeadLetter or "+limitArg+" in Queue.Args",
		slog.String("broker", s.declaration.refusal.Error()))
}

// How a session finds its position in a stream that it has not consumed from yet: what offsets such
// as next, last or 1h stand for, and whether the stream still exists. subscribe and topology call
// it, within the set-up of a session; stream.go remembers the result.

// locate finds out, before the first subscription, which message a shifting offset stands for. No
// method of AMQP 0-9-1 says so: the count of a passive declare is up to 5 s old (RabbitMQ 3.10, 4.0
// and 4.3), and does not count what the stream has dropped. But each message of a stream carries
// its offset, and stays in place when the channel that has consumed it is closed. From the first
// basic.consume on there is a position to resume at; until a message gives it, it is a time.
func (s *session) locate(ctx context.Context, offset any) error {
	s.forget() // the consumers of a lookup are not the session's, and have tags of their own
	s.tag += lookupSuffix
	s.receive()
	if before, saved := offset.(restored); saved {
		return s.verify(ctx, int64(before))
	}
	if _, text := offset.(string); offset == "next" || !text && shifts(offset, time.Now()) {
		return s.locateEnd(ctx, offset)
	}
	if err := s.channel.Qos(1, 0, false); err != nil {
		return err
	}
	since := time.Now()
	answered := s.streamPosition().assume(since.Add(-interval(offset)))
	if err := answered(s.sample(offset)); err != nil {
		return err
	}
	first, err := s.awaitSample(ctx, time.Since(since), 0)
	if first != nil {
		s.streamPosition().locate(offsetOf(first))
	}
	return err
}

// What a stream holds arrives within a few milliseconds after consume-ok, and a broker does not say
// that a stream holds nothing. So the wait for a first message is this long, plus this many times
// as long as consume-ok took.
const (
	locateWait  = 25 * time.Millisecond
	locateTrips = 4
)

// locateEnd finds the position after the last message: the offset of the first message that a
// consumer of that offset is given or, if none comes, the offset after the messages that exist
// already.
func (s *session) locateEnd(ctx context.Context, offset any) error {
	if err := s.channel.Qos(math.MaxUint16, 0, false); err != nil {
		return err
	}
	since := time.Now()
	answered := s.streamPosition().assume(since)
	behind, err := s.listen(offset)
	if answered(err) != nil {
		return err
	}
	since = time.Now()
	if err := s.sample("last"); err != nil {
		return err
	}
	first, err := s.awaitSample(ctx, time.Since(since), 0)
	if err != nil {
		return err
	}
	// The order matters: a message that the sample has, and that came after the other consumer
	// began, was delivered to that consumer, too. What the broker has sent is here before its
	// answer.
	_ = s.channel.Cancel(s.tag, true)
	if err := s.channel.Cancel(s.tag+listenerSuffix, false); err != nil {
		return err
	}
	if s.cancelled() {
		return errCancelled
	}
	s.inbox.close()
	end := int64(unknownOffset)
	if first != nil {
		end = offsetOf(first)
	}
	for _, d := range s.inbox.clear() {
		end = max(end, offsetOf(d))
	}
	if next, ok := <-behind; ok {
		s.streamPosition().locate(next)
	} else if end != unknownOffset {
		s.streamPosition().locate(end + 1)
	}
	return nil
}

// sample consumes messages to learn their offsets. They come by the session's subscription, which
// can read whatever a broker sends.
func (s *session) sample(offset any) error {
	args := amqp.Table{offsetKey: offset}
	_, err := s.channel.Consume(s.queue, s.tag, false, false, false, false, args)
	return err
}

// awaitSample returns the first message of the sample, nil if none comes. One that is on its way,
// on a slow path, is waited for, for longest at most.
func (s *session) awaitSample(ctx context.Context, trip, longest time.Duration) (*Delivery, error) {
	silent := make(chan struct{})
	wait := locateWait + locateTrips*trip
	defer s.conn.socket.AfterSilence(wait, max(wait, longest), func() { close(silent) })()
	select {
	case d := <-s.inbox.next():
		return d, nil
	case <-s.aside.more: // a message that cannot be read
	case <-silent:
	case <-s.cancels:
		s.streamPosition().doubt()
		return nil, errCancelled
	case said := <-s.channelEnd.closes:
		s.channelEnd.record(said)
		return nil, amqp.ErrClosed
	case <-s.conn.end.Done():
		return nil, amqp.ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return nil, nil
}

// cancelled reports whether the broker has cancelled one of the two consumers.
func (s *session) cancelled() bool {
	select {
	case <-s.cancels:
		s.streamPosition().doubt()
		return true
	default:
		return false
	}
}

// The consumers of a lookup add these to the tag of the session: all of them the first, and the
// second consumer on the same channel the other one, too.
const (
	lookupSuffix   = ".look"
	listenerSuffix = ".next"
)

// listen consumes from an offset at the end of the stream. It returns the offset of the first
// message, on a channel that is closed without a value if nothing came before the consumer was
// cancelled.
func (s *session) listen(offset any) (first <-chan int64, err error) {
	args := amqp.Table{}
	if offset != nil {
		args[offsetKey] = offset
	}
	deliveries, err := s.channel.Consume(s.queue, s.tag+listenerSuffix, false, false, false, false, args)
	if err != nil {
		return nil, err
	}
	got := make(chan int64, 1)
	go func() {
		defer close(got)
		for d := range deliveries {
			if at, ok := headerInt(d.Headers[offsetKey]); ok && len(got) == 0 {
				got <- at
			}
		}
	}()
	return got, nil
}

// A busy broker may cancel the consumers of a stream that is deleted a moment before the stream is
// gone. So after a cancel checkStream asks again and again: for streamDoubt, and for half of the
// setup limit at most.
const (
	streamDoubt   = 2 * time.Second
	streamRecheck = 20 * time.Millisecond
)

// checkStream asks whether the stream still exists, before it is declared: after that a new stream
// looks like the old one. If it does not exist, or if the question is not allowed, the broker
// closes the channel, and the session needs another one.
func (s *session) checkStream(ctx context.Context) error {
	if s.streamPosition() == nil || s.declaration.streamChecked {
		return nil
	}
	s.stream.mu.Lock()
	queue, fresh, doubted := s.stream.queue, s.stream.fresh(), s.stream.doubted
	s.stream.mu.Unlock()
	declares := s.config.topology != nil || s.config.declare != nil
	if fresh || !declares && !doubted {
		return nil
	}
	for since := time.Now(); ; {
		_, err := s.channel.QueueDeclarePassive(queue, true, false, false, false, amqp.Table{})
		switch {
		case err != nil:
			if noQueue(s.channelCause(err), queue) {
				s.streamPosition().startOver()
			}
			return &freshChannelError{streamChecked: true}
		case !doubted, time.Since(since) >= min(streamDoubt, s.config.setupTimeout/2):
			return nil
		}
		if err := sleep(ctx, streamRecheck); err != nil {
			return err
		}
	}
}

// sleep waits for d, or returns why ctx has ended.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return causeOf(ctx)
	}
}
