package middleware_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/middleware"
)

// message is an order at its n-th try, as a quorum queue counts.
func message(n int) *steadymq.Delivery {
	return steadymq.NewDelivery(amqp.Delivery{
		MessageId:     "order-7",
		CorrelationId: "cart-3",
		Body:          []byte("tea"),
		Redelivered:   n > 1,
		Headers:       amqp.Table{"x-delivery-count": int64(n - 1)},
	})
}

// The order in which middleware is given: what looks stands before what decides.
func Example() {
	logger := slog.New(middleware.LogHandler(textHandler()))
	errNoSuchCustomer := errors.New("no such customer")
	option := steadymq.WithMiddleware(
		middleware.Correlation,                  // outermost: what is inside can log the ids
		middleware.Log(logger),                  // sees what the policies have decided
		middleware.ParkAfter(5),                 // gives up on what has failed five times
		middleware.Permanent(errNoSuchCustomer), // gives up at once on what cannot get better
	)
	_, err := steadymq.New("amqp://localhost/", "orders", option)
	fmt.Println(err)
	// Output: <nil>
}

// textHandler writes to the standard output, without what differs from run to run.
func textHandler() slog.Handler {
	return slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == "took" {
				return slog.Attr{}
			}
			return a
		},
	})
}

func ExampleDiscardAfter() {
	handle := func(context.Context, *steadymq.Delivery) error { return errors.New("not today") }
	busy := func(context.Context, *steadymq.Delivery) error {
		return steadymq.Requeue(errors.New("for another worker"))
	}
	policy := middleware.DiscardAfter(3)
	ctx := context.Background()
	fmt.Println(steadymq.Invoke(ctx, policy(handle), message(2)))
	fmt.Println(steadymq.Invoke(ctx, policy(handle), message(3)))
	fmt.Println(steadymq.Invoke(ctx, policy(busy), message(3)))
	// Output:
	// requeued not today
	// discarded not today
	// requeued for another worker
}

func ExampleParkAfter() {
	handle := func(_ context.Context, d *steadymq.Delivery) error {
		fields := []string{string(d.Body)}
		fmt.Println("price:", fields[len(d.Body)]) // a bug
		return nil
	}
	policy := middleware.ParkAfter(3)
	for _, n := range []int{1, 2, 3} {
		outcome, err := steadymq.Invoke(context.Background(), policy(handle), message(n))
		fmt.Printf("attempt %d: %v, %v\n", n, outcome, err)
	}
	// Output:
	// attempt 1: requeued, steadymq: panic: runtime error: index out of range [3] with length 1
	// attempt 2: requeued, steadymq: panic: runtime error: index out of range [3] with length 1
	// attempt 3: parked, steadymq: panic: runtime error: index out of range [3] with length 1
}

func ExamplePermanent() {
	errNoSuchCustomer := errors.New("no such customer")
	handle := func(_ context.Context, d *steadymq.Delivery) error {
		if d.Attempt() == 1 {
			return errors.New("the database is away")
		}
		return fmt.Errorf("%s: %w", d.MessageId, errNoSuchCustomer)
	}
	policy := middleware.Permanent(errNoSuchCustomer)
	fmt.Println(steadymq.Invoke(context.Background(), policy(handle), message(1)))
	fmt.Println(steadymq.Invoke(context.Background(), policy(handle), message(2)))
	// Output:
	// requeued the database is away
	// parked order-7: no such customer
}

// What only the type of an error tells.
func ExamplePermanentFunc() {
	type order struct{ Item string }
	handle := steadymq.Decode(json.Unmarshal, func(context.Context, *steadymq.Delivery, order) error { return nil })
	policy := middleware.PermanentFunc(func(err error) bool {
		return errors.As(err, new(*steadymq.DecodeError))
	})
	fmt.Println(steadymq.Invoke(context.Background(), policy(handle), message(1)))
	// Output: parked steadymq: the body of message "order-7" (3 bytes) does not decode into middleware_test.order: *json.SyntaxError at byte 2
}

// Log stands before the policy, so it tells what the policy has decided.
func ExampleLog() {
	logger := slog.New(textHandler())
	handle := func(context.Context, *steadymq.Delivery) error { return errors.New("not today") }
	logged := middleware.Log(logger)(middleware.DiscardAfter(2)(handle))
	_, _ = steadymq.Invoke(context.Background(), logged, message(1))
	_, _ = steadymq.Invoke(context.Background(), logged, message(2))
	// Output:
	// level=WARN msg="handler failed" queue="" message_id=order-7 attempt=1 outcome=requeued error="not today"
	// level=ERROR msg="handler failed" queue="" message_id=order-7 attempt=2 outcome=discarded error="not today"
}

// The ids for a call of another service, and in each line that is logged meanwhile.
func ExampleCorrelation() {
	logger := slog.New(middleware.LogHandler(textHandler()))
	handle := func(ctx context.Context, _ *steadymq.Delivery) error {
		fmt.Println("X-Correlation-Id:", middleware.CorrelationID(ctx))
		fmt.Println("Idempotency-Key:", middleware.MessageID(ctx))
		logger.InfoContext(ctx, "paid", "amount", 320)
		return nil
	}
	_, _ = steadymq.Invoke(context.Background(), middleware.Correlation(handle), message(1))
	// Output:
	// X-Correlation-Id: cart-3
	// Idempotency-Key: order-7
	// level=INFO msg=paid message_id=order-7 correlation_id=cart-3 amount=320
}

// The ids stand at the top, also where the logger has a group.
func ExampleLogHandler() {
	logger := slog.New(middleware.LogHandler(textHandler())).With("service", "shop").WithGroup("payment")
	handle := func(ctx context.Context, _ *steadymq.Delivery) error {
		logger.InfoContext(ctx, "paid", "amount", 320)
		return nil
	}
	_, _ = steadymq.Invoke(context.Background(), middleware.Correlation(handle), message(1))
	// Output: level=INFO msg=paid service=shop message_id=order-7 correlation_id=cart-3 payment.amount=320
}
