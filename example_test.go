package steadymq_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// The broker of these examples lives in this process; yours is at an AMQP URL.
func exampleBroker(bodies ...string) (*steadymqtest.Broker, []steadymq.Option) {
	broker := steadymqtest.NewBroker(nil)
	broker.DeclareQueue("orders", steadymqtest.QueueOptions{})
	broker.Publish("orders", bodies...)
	return broker, []steadymq.Option{
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithLogger(slog.New(slog.DiscardHandler)),
	}
}

func ExampleConsume() {
	broker, options := exampleBroker("tea", "milk")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s\n", d.Body)
		if string(d.Body) == "milk" {
			stop()
		}
		return nil // nil acks, an error puts the message back
	}, options...)
	fmt.Println("stopped:", err)
	// Output:
	// tea
	// milk
	// stopped: <nil>
}

func ExampleDiscard() {
	broker, options := exampleBroker("poison")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	c, err := steadymq.New(broker.URL, "orders", options...)
	if err != nil {
		fmt.Println(err)
		return
	}
	_ = c.Run(ctx, func(context.Context, *steadymq.Delivery) error {
		stop()
		return steadymq.Discard(errors.New("cannot be parsed"))
	})
	fmt.Println("discarded:", c.Stats().Discarded, "left:", broker.QueueLen("orders"))
	// Output: discarded: 1 left: 0
}

func ExampleWithMiddleware() {
	// A policy is a middleware that rewrites the error.
	discardAfter := func(n int) steadymq.Middleware {
		return func(next steadymq.Handler) steadymq.Handler {
			return func(ctx context.Context, d *steadymq.Delivery) error {
				err := next(ctx, d)
				if err != nil && d.Attempt() >= n {
					return steadymq.Discard(err)
				}
				return err
			}
		}
	}
	broker, options := exampleBroker("flaky")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	c, err := steadymq.New(broker.URL, "orders", append(options, steadymq.WithMiddleware(discardAfter(2)))...)
	if err != nil {
		fmt.Println(err)
		return
	}
	_ = c.Run(ctx, func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Println("attempt", d.Attempt())
		if d.Attempt() == 2 {
			stop()
		}
		return steadymq.Requeue(errors.New("not today"))
	})
	fmt.Println("discarded:", c.Stats().Discarded)
	// Output:
	// attempt 1
	// attempt 2
	// discarded: 1
}

func ExampleOutcomeOf() {
	// Gives up on what has failed often, but leaves alone what the handler decided.
	giveUpAfter := func(n int, next steadymq.Handler) steadymq.Handler {
		return func(ctx context.Context, d *steadymq.Delivery) error {
			err := next(ctx, d)
			if _, explicit := steadymq.OutcomeOf(err); !explicit && d.Attempt() >= n {
				return steadymq.Discard(err)
			}
			return err
		}
	}
	busy := giveUpAfter(1, func(context.Context, *steadymq.Delivery) error { return steadymq.Requeue(nil) })
	broken := giveUpAfter(1, func(context.Context, *steadymq.Delivery) error { return errors.New("cannot be parsed") })
	ctx := context.Background()
	fmt.Println(steadymq.Invoke(ctx, busy, steadymq.NewDelivery(amqp.Delivery{})))
	fmt.Println(steadymq.Invoke(ctx, broken, steadymq.NewDelivery(amqp.Delivery{})))
	// Output:
	// requeued steadymq: message requeued
	// discarded cannot be parsed
}

func ExampleInvoke() {
	// In a test of the handler: what becomes of this message?
	handle := func(_ context.Context, d *steadymq.Delivery) error {
		if len(d.Body) == 0 {
			return steadymq.Discard(errors.New("empty order"))
		}
		return nil
	}
	outcome, err := steadymq.Invoke(context.Background(), handle, steadymq.NewDelivery(amqp.Delivery{}))
	fmt.Println(outcome, err)
	// Output: discarded empty order
}

func ExampleHooks_settled() {
	broker, options := exampleBroker("tea", "poison")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	settled := func(d *steadymq.Delivery, o steadymq.Outcome) {
		fmt.Printf("%s: %v\n", d.Body, o)
		if string(d.Body) == "poison" {
			stop()
		}
	}
	_ = steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		if string(d.Body) == "poison" {
			return steadymq.Discard(nil)
		}
		return nil
	}, append(options, steadymq.WithHooks(steadymq.Hooks{Settled: settled}))...)
	// Output:
	// tea: acked
	// poison: discarded
}

func ExampleNew_refused() {
	_, err := steadymq.New("amqp://app:secret@mq1/", "orders",
		steadymq.WithPrefetch(0),
		steadymq.WithDrainTimeout(30))
	fmt.Println(err)
	// Output:
	// steadymq: WithPrefetch: must be between 1 and 65535, got 0
	// steadymq: WithDrainTimeout: must be between 1ms and 24h0m0s, got 30ns (a bare number counts nanoseconds: write 30*time.Second)
}
