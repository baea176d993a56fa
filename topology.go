package steadymq

import (
	"context"
	"errors"
	"fmt"

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
		queue, err = declareQueue(s.channel, s.config.queue, s.config.declare)
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

func declareQueue(ch *amqp.Channel, name string, q *Queue) (string, error) {
	args := cloneTable(q.Args)
	if args == nil {
		args = amqp.Table{}
	}
	args["x-queue-type"] = q.Type
	declared, err := ch.QueueDeclare(name, !q.Transient, q.AutoDelete, q.Exclusive, false, args)
	if err != nil {
		return "", err
	}
	for _, b := range q.Bindings {
		if err := ch.QueueBind(declared.Name, b.Key, b.Exchange, false, b.Args); err != nil {
			return "", fmt.Errorf("bind to exchange %q: %w", b.Exchange, err)
		}
	}
	return declared.Name, nil
}
