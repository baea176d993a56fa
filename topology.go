package steadymq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

// topology declares what the session needs and returns the queue to consume.
func (s *session) topology(ctx context.Context) (queue string, err error) {
	if s.terms.queue != "" {
		return s.terms.queue, nil
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
		s.conn.failedTopologies.Add(1)
		return "", err
	}
	return queue, s.conn.sameQueue(cmp.Or(queue, s.config.queue))
}

// askTopology calls the function, and looks at what it has done to the channel.
func (s *session) askTopology(ctx context.Context) (queue string, err error) {
	before := s.conn.socket.Misuse()
	call := userCall[string]{
		option: "WithTopology",
		f:      func(ctx context.Context) (string, error) { return s.config.topology(ctx, s.channel) },
		left:   s.abandoned,
	}
	if queue, err = call.run(ctx); err != nil {
		return "", err
	}
	if problem := noShortString(queue); problem != "" {
		return "", call.named(fmt.Errorf("the queue's name %s", problem))
	}
	switch now := s.conn.socket.Misuse(); {
	case now.Transactions > before.Transactions:
		return "", call.named(errTransactional)
	case now.Consumers > before.Consumers && s.told.consumed.CompareAndSwap(false, true):
		s.queue = cmp.Or(queue, s.config.queue) // for the line
		s.warn("the topology function has consumed on the session's channel: what is delivered to that consumer waits until the session ends")
	}
	return queue, nil
}

var errTransactional = errors.New("the function has made the channel transactional: acks on it would never take effect")

// terms are what the declaration of a session asks for. Where the broker refuses a
// part of it that is not worth failing for, the session asks for less, on a fresh
// channel, for the refusal has closed the first.
type terms struct {
	limit    limitTerm
	deadKept bool // the dead-letter queue exists in another form, which stays
	refusal  error
	owned    string // the queue of the connection, which is asked for and not declared
	anew     bool   // the queue was gone, and is declared anew

	looked bool   // the stream was looked for
	queue  string // that has been declared already
}

// freshChannelError ends a try of a session whose channel has served a question and is of no more use. What
// was found out holds for the next try, on a fresh channel: so a connection needs but one at a
// time, and its delivery tags count from 1.
type freshChannelError struct {
	looked bool
	queue  string
}

func (*freshChannelError) Error() string { return "a fresh channel is needed" }

// concede asks for less after err, if there is less to ask for, or goes on where a try has ended.
func (t *terms) concede(err error) bool {
	var next *freshChannelError
	if errors.As(err, &next) {
		t.looked, t.queue = t.looked || next.looked, next.queue
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
	case t.limit != limitUnsaid && t.limit != limitOff || !strings.HasPrefix(brokerErr.Reason, inequivalentLimit):
		return false
	default:
		t.limit++
		t.refusal = brokerErr
	}
	return true
}

// How RabbitMQ begins, before it comes to a name.
const (
	inequivalent      = "PRECONDITION_FAILED - inequivalent arg '"
	inequivalentLimit = inequivalent + limitArg + "' for queue "
)

// deadLetterError is about the dead-letter queue, not the queue itself.
type deadLetterError struct {
	queue string
	err   error
}

func (e *deadLetterError) Error() string {
	return fmt.Sprintf("dead-letter queue %q: %v", e.queue, e.err)
}

func (e *deadLetterError) Unwrap() error { return e.err }

// declareQueue declares what WithQueue says, in the order in which one needs the
// other.
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
	if q.DeadLetter == nil || q.DeadLetter.Queue == "" || s.terms.deadKept {
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
	if s.terms.owned != "" { // to declare a name of the broker's is forbidden
		_, err := s.channel.QueueDeclarePassive(s.terms.owned, false, false, false, false, nil)
		return s.terms.owned, gone(err, s.terms.owned)
	}
	q := s.config.declare
	args := maps.Clone(q.Args)
	args["x-queue-type"] = q.Type
	declare := s.channel.QueueDeclare
	switch s.terms.limit {
	case limitOff:
		args[limitArg] = noLimit
	case limitKept:
		declare = s.channel.QueueDeclarePassive
	}
	declared, err := declare(s.config.queue, !q.Transient, q.AutoDelete, q.Exclusive, false, args)
	if err == nil {
		s.conn.own(declared.Name)
	}
	return declared.Name, err
}

// goneError is a 404 about a queue that was there a moment ago.
type goneError struct{ error }

func (e *goneError) Unwrap() error { return e.error }

// gone marks a refusal that says that there is no such queue. A 404 may say something else, as that
// its node is down: then the queue lives, and another one beside it would be left behind.
func gone(err error, queue string) error {
	if !noQueue(err, queue) {
		return err
	}
	return &goneError{err}
}
