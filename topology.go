package steadymq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

// What a session declares before it consumes: by the function of WithTopology or as WithQueue says,
// what it asks for instead if the broker refuses, and which delivery limit its queue then has.
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
	if problem := shortStringProblem(queue); problem != "" {
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

	streamChecked bool   // the broker was asked whether the stream exists
	queue         string // has been declared by an earlier round
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
	switch {
	case !errors.As(err, &brokerErr) || !brokerErr.Server:
		return false
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
	args := maps.Clone(q.Args)
	args["x-queue-type"] = q.Type
	declare := s.channel.QueueDeclare
	switch s.declaration.limit {
	case limitOff:
		args[limitArg] = noLimit
	case limitExisting:
		declare = s.channel.QueueDeclarePassive
	}
	declared, err := declare(s.config.queue, !q.Transient, q.AutoDelete, q.Exclusive, false, args)
	if err == nil {
		s.conn.own(declared.Name)
	}
	return declared.Name, err
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
