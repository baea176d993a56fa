package steadymq

import (
	"context"
	"errors"
	"fmt"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

// topology declares what the session needs and returns the queue to consume.
func (s *session) topology(ctx context.Context) (queue string, err error) {
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
	return userCall[string]{
		option: "WithTopology",
		f:      func(ctx context.Context) (string, error) { return s.config.topology(ctx, s.channel) },
		left:   s.abandoned,
	}.run(ctx)
}

// terms are what the declaration of a session asks for. Where the broker refuses a
// part of it that is not worth failing for, the session asks for less, on a fresh
// channel, for the refusal has closed the first.
type terms struct {
	limit    limitTerm
	deadKept bool // the dead-letter queue exists in another form, which stays
	refusal  error
}

// concede asks for less after err, if there is less to ask for.
func (t *terms) concede(err error) bool {
	var said *amqp.Error
	if !errors.As(err, &said) || !said.Server || said.Code != amqp.PreconditionFailed {
		return false
	}
	var dead *deadLetterError
	switch {
	case errors.As(err, &dead):
		if t.deadKept || !strings.Contains(said.Reason, inequivalent) {
			return false
		}
		t.deadKept = true
	case t.limit != limitUnsaid && t.limit != limitOff || !strings.Contains(said.Reason, inequivalentLimit):
		return false
	default:
		t.limit++
		t.refusal = said
	}
	return true
}

// What RabbitMQ says before it comes to a name.
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

// declareError is a failure of what WithQueue declares.
type declareError struct{ err error }

func (e *declareError) Error() string { return e.err.Error() }
func (e *declareError) Unwrap() error { return e.err }

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
	q := s.config.declare
	args := cloneTable(q.Args)
	args["x-queue-type"] = q.Type
	declare := s.channel.QueueDeclare
	switch s.terms.limit {
	case limitOff:
		args[limitArg] = noLimit
	case limitKept:
		declare = s.channel.QueueDeclarePassive
	}
	declared, err := declare(s.config.queue, !q.Transient, q.AutoDelete, q.Exclusive, false, args)
	return declared.Name, err
}
