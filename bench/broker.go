package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	amqp "github.com/rabbitmq/amqp091-go"
)

// brokerRunner measures on a real broker: each run gets a queue of its own,
// filled with confirmed messages before the client starts.
func brokerRunner(o options, vs []variant) *runner {
	place := func(ctx context.Context, w workload, c *clientConfig) (func() error, error) {
		conn, err := amqp.Dial(o.amqp)
		if err != nil {
			return nil, err
		}
		c.URL, c.Messages = o.amqp, uint64(o.messages)
		c.Queue = "steadymq-bench-" + rand.Text()
		done := func() error { return deleteQueue(conn, c.Queue) }
		if err := fill(ctx, conn, c.Queue, o.queueType, o.messages, w.Body); err != nil {
			return nil, errors.Join(err, done())
		}
		return done, nil
	}
	return &runner{opts: o, variants: vs, place: place}
}

func deleteQueue(conn *amqp.Connection, queue string) error {
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	_, err = ch.QueueDelete(queue, false, false, false)
	return err
}

// window is how many publishes may wait for their confirm.
const window = 2000

func fill(ctx context.Context, conn *amqp.Connection, queue, kind string, messages, size int) error {
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	defer ch.Close()
	if _, err := ch.QueueDeclare(queue, true, false, false, false, amqp.Table{"x-queue-type": kind}); err != nil {
		return err
	}
	if err := ch.Confirm(false); err != nil {
		return err
	}
	body := make([]byte, size)
	confirms := make([]*amqp.DeferredConfirmation, 0, window)
	for n := range messages {
		c, err := ch.PublishWithDeferredConfirmWithContext(ctx, "", queue, false, false,
			amqp.Publishing{DeliveryMode: amqp.Persistent, Body: body})
		if err != nil {
			return err
		}
		confirms = append(confirms, c)
		if len(confirms) == window || n == messages-1 {
			if err := allConfirmed(ctx, confirms); err != nil {
				return err
			}
			confirms = confirms[:0]
		}
	}
	return nil
}

func allConfirmed(ctx context.Context, confirms []*amqp.DeferredConfirmation) error {
	for _, c := range confirms {
		acked, err := c.WaitContext(ctx)
		if err != nil {
			return err
		}
		if !acked {
			return fmt.Errorf("the broker refused message %d", c.DeliveryTag)
		}
	}
	return nil
}
