package steadymq_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"expvar"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/middleware"
	"github.com/steadymq/steadymq/steadymqtest"
)

// exampleBroker is the broker of most examples, with a queue of orders and one for dead letters. It
// lives in this process and is reached by WithDialer; yours is at an AMQP URL and needs no such
// option.
func exampleBroker(orders ...string) *steadymqtest.Broker {
	broker := emptyBroker()
	broker.DeclareQueue("orders.dead", steadymqtest.QueueOptions{Type: "quorum"})
	broker.DeclareQueue("orders", steadymqtest.QueueOptions{Type: "quorum", DeadLetter: "orders.dead"})
	broker.Publish("orders", orders...)
	return broker
}

// emptyBroker has no queues. ExampleWithLogger shows what is logged, the others are quiet.
func emptyBroker(opts ...steadymqtest.Option) *steadymqtest.Broker {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	return steadymqtest.NewBroker(nil, opts...)
}

func ExampleConsume() {
	broker := exampleBroker("tea", "milk")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s\n", d.Body)
		if string(d.Body) == "milk" {
			stop()
		}
		return nil // nil acks, an error puts the message back
	}, steadymq.WithDialer(broker.Dialer()))
	fmt.Println("stopped:", err)
	// Output:
	// tea
	// milk
	// stopped: <nil>
}

// All problems are told at once, before anything is dialled.
func ExampleNew_refused() {
	_, err := steadymq.New("amqp://app:secret@mq1/", "orders",
		steadymq.WithPrefetch(0),
		steadymq.WithDrainTimeout(30))
	fmt.Println(err)
	// Output:
	// steadymq: WithPrefetch: must be between 1 and 65535, got 0
	// steadymq: WithDrainTimeout: must be between 1ms and 24h0m0s, got 30ns (a bare number counts nanoseconds: write 30*time.Second)
}

// At SIGTERM the running handler finishes and its ack is confirmed by the broker. What no handler
// has started goes back to the queue.
func ExampleConsumer_Run_gracefulStop() {
	broker := exampleBroker("tea", "milk", "bread")
	defer broker.Close()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c, err := steadymq.New(broker.URL, "orders", steadymq.WithDialer(broker.Dialer()))
	if err != nil {
		fmt.Println(err)
		return
	}
	err = c.Run(ctx, func(ctx context.Context, d *steadymq.Delivery) error {
		stop() // as if SIGTERM came now
		fmt.Printf("working on %s, context: %v\n", d.Body, ctx.Err())
		return nil
	})
	fmt.Println("stopped:", err)
	fmt.Println("acked:", c.Stats().Acked, "left for others:", broker.QueueLen("orders"))
	// Output:
	// working on tea, context: <nil>
	// stopped: <nil>
	// acked: 1 left for others: 2
}

// Many queues share one connection. A failure of one of them concerns no other.
func ExampleGroup() {
	broker := exampleBroker("tea", "milk")
	defer broker.Close()
	broker.DeclareQueue("invoices", steadymqtest.QueueOptions{Type: "quorum"})
	broker.Publish("invoices", "number 1", "number 2", "number 3")
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	g, err := steadymq.NewGroup(broker.URL, steadymq.WithDialer(broker.Dialer()))
	if err != nil {
		fmt.Println(err)
		return
	}
	var left sync.WaitGroup
	left.Add(5)
	handle := func(context.Context, *steadymq.Delivery) error {
		left.Done()
		return nil
	}
	for _, queue := range []string{"orders", "invoices"} {
		// Options that are given here are of this consumer alone.
		if _, err := g.Handle(queue, handle, steadymq.WithConcurrency(1)); err != nil {
			fmt.Println(err)
			return
		}
	}
	go func() {
		left.Wait()
		stop() // all drain side by side
	}()
	fmt.Println("stopped:", g.Run(ctx))
	for _, c := range g.Consumers() {
		fmt.Println("acked:", c.Stats().Acked)
	}
	fmt.Println("connections:", g.Stats().Connections)
	// Output:
	// stopped: <nil>
	// acked: 2
	// acked: 3
	// connections: 1
}

// A queue that is added while the group runs is consumed at once, on the connection that is there.
func ExampleGroup_Handle() {
	broker := exampleBroker("tea")
	defer broker.Close()
	broker.DeclareQueue("returns", steadymqtest.QueueOptions{Type: "quorum"})
	broker.Publish("returns", "sour milk")
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	g, err := steadymq.NewGroup(broker.URL, steadymq.WithDialer(broker.Dialer()))
	if err != nil {
		fmt.Println(err)
		return
	}
	returned := func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("returned: %s\n", d.Body)
		stop()
		return nil
	}
	ordered := func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("ordered: %s\n", d.Body)
		_, err := g.Handle("returns", returned) // the shop takes returns from now on
		return err
	}
	if _, err := g.Handle("orders", ordered); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("stopped:", g.Run(ctx))
	fmt.Println("connections:", g.Stats().Connections)
	// Output:
	// ordered: tea
	// returned: sour milk
	// stopped: <nil>
	// connections: 1
}

// All problems of one queue are told at once, with its name.
func ExampleGroup_Handle_refused() {
	g, err := steadymq.NewGroup("amqp://app:secret@mq1/", steadymq.WithConcurrency(16))
	fmt.Println(err)
	_, err = g.Handle("orders", nil,
		steadymq.WithPrefetch(8),
		steadymq.WithConnectionName("shop"))
	fmt.Println(err)
	// Output:
	// <nil>
	// queue orders: steadymq: WithConnectionName: belongs to the connection, which all consumers of a Group share: give it to NewGroup
	// queue orders: steadymq: WithPrefetch: must be at least the concurrency (16), got 8: workers would wait for nothing
	// queue orders: steadymq: Handle: the handler must not be nil
}

// One consumer of a group is drained, the others go on.
func ExampleConsumer_Stop() {
	broker := exampleBroker()
	defer broker.Close()
	broker.DeclareQueue("returns", steadymqtest.QueueOptions{Type: "quorum"})
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	g, err := steadymq.NewGroup(broker.URL, steadymq.WithDialer(broker.Dialer()))
	if err != nil {
		fmt.Println(err)
		return
	}
	handled := make(chan string)
	handle := func(_ context.Context, d *steadymq.Delivery) error {
		handled <- string(d.Body)
		return nil
	}
	orders, err1 := g.Handle("orders", handle)
	_, err2 := g.Handle("returns", handle)
	if err := errors.Join(err1, err2); err != nil {
		fmt.Println(err)
		return
	}
	stopped := make(chan error)
	go func() { stopped <- g.Run(ctx) }()
	broker.Publish("orders", "tea")
	fmt.Println(<-handled)

	fmt.Println("no more orders:", orders.Stop(ctx)) // its ack is confirmed
	broker.Publish("orders", "milk")
	broker.Publish("returns", "sour milk")
	fmt.Println(<-handled)
	fmt.Println("orders left:", broker.QueueLen("orders"), "consumers:", len(g.Consumers()))

	stop()
	fmt.Println("stopped:", <-stopped)
	// Output:
	// tea
	// no more orders: <nil>
	// sour milk
	// orders left: 1 consumers: 1
	// stopped: <nil>
}

// A readiness probe, such as Kubernetes sends.
func ExampleConsumer_Stats() {
	broker := exampleBroker()
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var c *steadymq.Consumer
	ready := func(w http.ResponseWriter, _ *http.Request) {
		stats := c.Stats()
		if stats.State != steadymq.Consuming {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		fmt.Fprintf(w, "%v, sessions: %d, acked: %d", stats.State, stats.Sessions, stats.Acked)
	}
	probe := func() {
		answer := httptest.NewRecorder()
		ready(answer, nil)
		fmt.Println(answer.Code, answer.Body)
	}
	changed := func(change steadymq.StateChange) {
		if change.To == steadymq.Consuming {
			probe()
			broker.Publish("orders", "tea")
		}
	}
	c, err := steadymq.New(broker.URL, "orders", steadymq.WithDialer(broker.Dialer()),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: changed}))
	if err != nil {
		fmt.Println(err)
		return
	}
	probe()
	_ = c.Run(ctx, func(context.Context, *steadymq.Delivery) error {
		stop()
		return nil
	})
	probe()
	// Output:
	// 503 idle, sessions: 0, acked: 0
	// 200 consuming, sessions: 1, acked: 0
	// 503 stopped, sessions: 1, acked: 1
}

// What a handler returns decides what becomes of the message.
func ExampleHandler() {
	broker := exampleBroker("tea", "large order", "early order", "no order")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	handle := func(_ context.Context, d *steadymq.Delivery) error {
		order, first := string(d.Body), d.Attempt() == 1
		fmt.Printf("%s, attempt %d\n", order, d.Attempt())
		switch {
		case order == "no order":
			return steadymq.Discard(errors.New("cannot be parsed")) // to the dead-letter queue
		case order == "large order" && first:
			return steadymq.Requeue(errors.New("for another worker")) // back at once
		case order == "early order" && first:
			return steadymq.RequeueAfter(errors.New("the shop is closed"), 50*time.Millisecond)
		case order == "early order":
			stop() // it is the last one
		}
		return nil // ack
	}
	err := steadymq.Consume(ctx, broker.URL, "orders", handle, steadymq.WithDialer(broker.Dialer()))
	fmt.Println("stopped:", err)
	fmt.Println("left:", broker.QueueLen("orders"), "dead:", broker.QueueLen("orders.dead"))
	// Output:
	// tea, attempt 1
	// large order, attempt 1
	// early order, attempt 1
	// no order, attempt 1
	// large order, attempt 2
	// early order, attempt 2
	// stopped: <nil>
	// left: 0 dead: 1
}

// The context ends with the session: the broker has the message back, so the work is given up.
func ExampleHandler_lostSession() {
	broker := exampleBroker("tea")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	paid := make(chan struct{}) // by a payment provider that takes its time
	handle := func(ctx context.Context, d *steadymq.Delivery) error {
		if d.Session() == 1 {
			broker.CloseConnections(320, "broker forced connection closure with reason 'shutdown'")
		} else {
			close(paid)
		}
		select {
		case <-paid:
			fmt.Printf("%s is paid in session %d\n", d.Body, d.Session())
			stop()
			return nil
		case <-ctx.Done():
			cause := context.Cause(ctx)
			var lost *steadymq.SessionError
			if errors.As(cause, &lost) {
				fmt.Printf("session %d is %s\n", lost.Session, lost.Op)
			}
			fmt.Println(cause)
			return cause // no failure of the handler
		}
	}
	err := steadymq.Consume(ctx, broker.URL, "orders", handle, steadymq.WithDialer(broker.Dialer()))
	fmt.Println("stopped:", err)
	// Output:
	// session 1 is lost
	// steadymq: queue orders: session 1: lost mq1.test:5672: 320 CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'
	// tea is paid in session 2
	// stopped: <nil>
}

// One instance does not serve all shops: the others are offered what is not for it.
func ExampleRequeue() {
	broker := exampleBroker()
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	serve := func(shop string) error {
		return steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) != "order of "+shop {
				return steadymq.Requeue(nil)
			}
			fmt.Printf("%s takes the %s\n", shop, d.Body)
			stop()
			return nil
		}, steadymq.WithDialer(broker.Dialer()), steadymq.WithPrefetch(1))
	}
	stopped := make(chan error)
	go func() { stopped <- serve("shop 1") }()
	go func() { stopped <- serve("shop 2") }()
	_ = broker.WaitConsumers(ctx, "orders", 2)
	broker.Publish("orders", "order of shop 2")
	fmt.Println(<-stopped, <-stopped)
	// Output:
	// shop 2 takes the order of shop 2
	// <nil> <nil>
}

// A provider that limits the rate says when to come again. No worker waits for it.
func ExampleRequeueAfter() {
	broker := exampleBroker("tea", "milk")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		if string(d.Body) == "tea" && d.Attempt() == 1 {
			retryAfter := 20 * time.Millisecond // of the answer
			return steadymq.RequeueAfter(errors.New("429 Too Many Requests"), retryAfter)
		}
		fmt.Printf("%s\n", d.Body)
		if string(d.Body) == "tea" {
			stop()
		}
		return nil
	}, steadymq.WithDialer(broker.Dialer()))
	fmt.Println("stopped:", err)
	// Output:
	// milk
	// tea
	// stopped: <nil>
}

func ExampleDiscard() {
	broker := exampleBroker("poison")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	c, err := steadymq.New(broker.URL, "orders", steadymq.WithDialer(broker.Dialer()))
	if err != nil {
		fmt.Println(err)
		return
	}
	_ = c.Run(ctx, func(context.Context, *steadymq.Delivery) error {
		stop()
		return steadymq.Discard(errors.New("cannot be parsed"))
	})
	fmt.Println("discarded:", c.Stats().Discarded)
	fmt.Println("left:", broker.QueueLen("orders"), "dead:", broker.QueueLen("orders.dead"))
	// Output:
	// discarded: 1
	// left: 0 dead: 1
}

// A policy of your own: what fails after a day is given up on. What the handler itself decides
// stays.
func ExampleOutcomeOf() {
	policy := func(next steadymq.Handler) steadymq.Handler {
		return func(ctx context.Context, d *steadymq.Delivery) error {
			err := next(ctx, d)
			if _, explicit := steadymq.OutcomeOf(err); !explicit && time.Since(d.Timestamp) > 24*time.Hour {
				return steadymq.Discard(err)
			}
			return err
		}
	}
	busy := policy(func(context.Context, *steadymq.Delivery) error { return steadymq.Requeue(nil) })
	broken := policy(func(context.Context, *steadymq.Delivery) error { return errors.New("sold out") })
	ctx, old := context.Background(), amqp.Delivery{Timestamp: time.Now().Add(-25 * time.Hour)}
	fmt.Println(steadymq.Invoke(ctx, busy, steadymq.NewDelivery(old)))
	fmt.Println(steadymq.Invoke(ctx, broken, steadymq.NewDelivery(old)))
	// Output:
	// requeued steadymq: message requeued
	// discarded sold out
}

// A message whose body does not decode never gets better. Its error tells why, and no secret of the
// body.
func ExampleDecode() {
	type order struct {
		Item  string
		Price int
	}
	handle := steadymq.Decode(json.Unmarshal, func(_ context.Context, _ *steadymq.Delivery, o order) error {
		fmt.Printf("%s for %d\n", o.Item, o.Price)
		return nil
	})
	for _, body := range []string{`{"item": "tea", "price": 320}`, `{"item": "tea", "price": "my password"}`} {
		d := steadymq.NewDelivery(amqp.Delivery{MessageId: "order-7", Body: []byte(body)})
		outcome, err := steadymq.Invoke(context.Background(), handle, d)
		fmt.Println(outcome, err)
		fmt.Println("cannot be decoded:", errors.As(err, new(*steadymq.DecodeError)))
	}
	// Output:
	// tea for 320
	// acked <nil>
	// cannot be decoded: false
	// requeued steadymq: the body of message "order-7" (39 bytes) does not decode into steadymq_test.order: *json.UnmarshalTypeError (int) at byte 38
	// cannot be decoded: true
}

// Given up on, and kept for someone to look at, with what it was and why it failed. The program in
// examples/unpark brings such messages back.
func ExamplePark() {
	broker := exampleBroker("7 teas")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	c, err := steadymq.New(broker.URL, "orders",
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithRetry(steadymq.Retry{Attempts: 1, Park: "orders.parked"}), // retries nothing
		steadymq.WithHooks(steadymq.Hooks{Settled: func(*steadymq.Delivery, steadymq.Outcome) { stop() }}))
	if err != nil {
		fmt.Println(err)
		return
	}
	err = c.Run(ctx, func(context.Context, *steadymq.Delivery) error {
		return steadymq.Park(errors.New("no such customer"))
	})
	fmt.Println("stopped:", err)
	fmt.Println("parked:", c.Stats().Parked)

	ctx, stop = context.WithCancel(context.Background())
	defer stop()
	_ = steadymq.Consume(ctx, broker.URL, "orders.parked", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s from %s: %s\n", d.Body, d.Headers["steadymq-queue"], d.Headers["steadymq-error"])
		stop()
		return steadymq.Requeue(nil) // leave it there
	}, steadymq.WithDialer(broker.Dialer()))
	// Output:
	// stopped: <nil>
	// parked: 1
	// 7 teas from orders: no such customer
}

// Settled by hand before work that must not be done twice: at most once in place of at least once.
func ExampleDelivery_Ack() {
	broker := exampleBroker("tea")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	handle := func(_ context.Context, d *steadymq.Delivery) error {
		defer stop()
		if err := d.Ack(); err != nil {
			return err // nothing was sent, the message comes again
		}
		fmt.Printf("%s is %v, a mail is sent\n", d.Body, d.Outcome())
		return nil // it is settled already, and that is respected
	}
	err := steadymq.Consume(ctx, broker.URL, "orders", handle, steadymq.WithDialer(broker.Dialer()))
	fmt.Println("stopped:", err)
	fmt.Println("left:", broker.QueueLen("orders"))
	// Output:
	// tea is acked, a mail is sent
	// stopped: <nil>
	// left: 0
}

// An ack that comes after the end of the session says so, and settles no other message.
func ExampleDelivery_Ack_stale() {
	broker := exampleBroker("tea")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	handle := func(ctx context.Context, d *steadymq.Delivery) error {
		if d.Session() == 1 {
			broker.Reset() // the connection is lost while the handler works
			<-ctx.Done()
		}
		err := d.Ack()
		if errors.Is(err, steadymq.ErrStale) {
			fmt.Printf("%s: too late, undo what was done\n", d.Body)
			return err
		}
		fmt.Printf("%s: %v in session %d\n", d.Body, d.Outcome(), d.Session())
		stop()
		return err
	}
	err := steadymq.Consume(ctx, broker.URL, "orders", handle, steadymq.WithDialer(broker.Dialer()))
	fmt.Println("stopped:", err)
	// Output:
	// tea: too late, undo what was done
	// tea: acked in session 2
	// stopped: <nil>
}

// A message that fails three times goes to the dead-letter queue. Package middleware has this as a
// policy for all handlers, DiscardAfter.
func ExampleDelivery_Attempt() {
	broker := exampleBroker("poison")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	handle := func(_ context.Context, d *steadymq.Delivery) error {
		err := errors.New("the database refuses it")
		fmt.Printf("attempt %d: %v\n", d.Attempt(), err)
		if d.Attempt() < 3 {
			return err // again, after a hold that grows
		}
		stop()
		return steadymq.Discard(err)
	}
	err := steadymq.Consume(ctx, broker.URL, "orders", handle,
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithRequeueDelay(10*time.Millisecond, time.Minute)) // default: 1 s, 15 min
	fmt.Println("stopped:", err)
	fmt.Println("left:", broker.QueueLen("orders"), "dead:", broker.QueueLen("orders.dead"))
	// Output:
	// attempt 1: the database refuses it
	// attempt 2: the database refuses it
	// attempt 3: the database refuses it
	// stopped: <nil>
	// left: 0 dead: 1
}

// A test of a handler and its policy needs no broker: what becomes of the message at the fifth
// attempt?
func ExampleNewDelivery() {
	handle := middleware.DiscardAfter(5)(func(context.Context, *steadymq.Delivery) error {
		return errors.New("not today")
	})
	fresh := steadymq.NewDelivery(amqp.Delivery{Body: []byte("tea")})
	tried := steadymq.NewDelivery(amqp.Delivery{
		Body:        []byte("tea"),
		Redelivered: true,
		Headers:     amqp.Table{"x-delivery-count": int64(4)},
	})
	for _, d := range []*steadymq.Delivery{fresh, tried} {
		outcome, err := steadymq.Invoke(context.Background(), handle, d)
		fmt.Printf("attempt %d: %v, %v\n", d.Attempt(), outcome, err)
	}
	// Output:
	// attempt 1: requeued, not today
	// attempt 5: discarded, not today
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

func ExamplePanicError() {
	handle := func(_ context.Context, d *steadymq.Delivery) error {
		fields := strings.Split(string(d.Body), ";")
		fmt.Println("price:", fields[1])
		return nil
	}
	tea := steadymq.NewDelivery(amqp.Delivery{Body: []byte("tea")})
	outcome, err := steadymq.Invoke(context.Background(), handle, tea)
	fmt.Println(outcome, err)
	var panicked *steadymq.PanicError
	if errors.As(err, &panicked) {
		fmt.Println("the stack is known:", len(panicked.Stack) > 0)
	}
	// Output:
	// requeued steadymq: panic: runtime error: index out of range [1] with length 1
	// the stack is known: true
}

// Before the first session Run gives up on what only an operator can mend.
func ExampleSessionError() {
	broker := exampleBroker()
	defer broker.Close()
	handle := func(context.Context, *steadymq.Delivery) error { return nil }
	err := steadymq.Consume(context.Background(), "amqp://guest:secert@mq1.test/", "orders", handle,
		steadymq.WithDialer(broker.Dialer()))
	var failed *steadymq.SessionError
	if errors.As(err, &failed) {
		fmt.Println("step:", failed.Op, "host:", failed.Host)
	}
	fmt.Println("login refused:", errors.Is(err, steadymq.ErrLoginRefused))
	fmt.Println(err)
	// Output:
	// step: open host: mq1.test:5672
	// login refused: true
	// steadymq: queue orders: session 1: open mq1.test:5672: login refused: 403 ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile: check user name, password and mechanism; RabbitMQ lets the user guest in from its own host only, so make another user (https://www.rabbitmq.com/docs/access-control#loopback-users)
}

// A handler that takes no notice of its context outlasts the drain limit.
func ExampleDrainError() {
	broker := exampleBroker("tea")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	stuck := make(chan struct{})
	defer close(stuck)
	err := steadymq.Consume(ctx, broker.URL, "orders", func(context.Context, *steadymq.Delivery) error {
		stop()
		<-stuck
		return nil
	}, steadymq.WithDialer(broker.Dialer()), steadymq.WithDrainTimeout(20*time.Millisecond))
	var left *steadymq.DrainError
	if errors.As(err, &left) {
		fmt.Println("handlers left:", left.Handlers)
	}
	fmt.Println(err)
	fmt.Println("back in the queue:", broker.QueueLen("orders"))
	// Output:
	// handlers left: 1
	// steadymq: drain limit passed: 1 handler still running after 20ms; what is unsettled goes back to the queue (let handlers end when their context does, or raise WithDrainTimeout)
	// back in the queue: 1
}

// A quorum queue, bound to an exchange, with a dead-letter queue: all declared for every session.
func ExampleWithQueue() {
	broker := emptyBroker()
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { // a publisher
		_ = broker.WaitConsumers(ctx, "orders", 1)
		broker.PublishExchange("shop", "order.paid", steadymqtest.Message{Body: []byte("tea")})
	}()
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s by %s, %s\n", d.Body, d.Exchange, d.RoutingKey)
		stop()
		return steadymq.Discard(errors.New("sold out"))
	},
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithQueue(steadymq.Queue{
			Type:       "quorum", // the default
			Exchange:   &steadymq.Exchange{Name: "shop", Kind: "topic"},
			Bindings:   []steadymq.Binding{{Key: "order.*"}},
			DeadLetter: &steadymq.DeadLetter{Queue: "orders.dead"},
			Args:       amqp.Table{"x-delivery-limit": 100},
		}))
	fmt.Println("stopped:", err)
	fmt.Println("dead:", broker.QueueLen("orders.dead"))
	// Output:
	// tea by shop, order.paid
	// stopped: <nil>
	// dead: 1
}

// Every instance of a service has a queue of its own, which the broker names, and gets all
// messages.
func ExampleWithQueue_broadcast() {
	broker := emptyBroker()
	defer broker.Close()
	broker.DeclareExchange("prices", "fanout")
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	publish := func(c steadymq.StateChange) {
		if c.To == steadymq.Consuming {
			broker.PublishExchange("prices", "", steadymqtest.Message{Body: []byte("tea 3.20")})
		}
	}
	err := steadymq.Consume(ctx, broker.URL, "", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s\n", d.Body)
		stop()
		return nil
	},
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithQueue(steadymq.Queue{
			Type:      "classic",
			Exclusive: true, // gone with its connection
			Bindings:  []steadymq.Binding{{Exchange: "prices"}},
		}),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: publish}))
	fmt.Println("stopped:", err)
	fmt.Println("queues:", broker.Queues())
	// Output:
	// tea 3.20
	// stopped: <nil>
	// queues: []
}

// A queue that waits: what is discarded comes back after its time to live, on brokers of all
// versions and without a place in the prefetch.
func ExampleWithTopology() {
	broker := emptyBroker()
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	declare := func(_ context.Context, ch *amqp.Channel) (queue string, err error) {
		_, err = ch.QueueDeclare("orders.wait", true, false, false, false, amqp.Table{
			"x-message-ttl": 30, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "orders",
		})
		if err != nil {
			return "", fmt.Errorf("queue that waits: %w", err)
		}
		_, err = ch.QueueDeclare("orders", true, false, false, false, amqp.Table{
			"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "orders.wait",
		})
		return "orders", err
	}
	go func() { // a publisher
		_ = broker.WaitConsumers(ctx, "orders", 1)
		broker.Publish("orders", "tea")
	}()
	err := steadymq.Consume(ctx, broker.URL, "", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s, attempt %d\n", d.Body, d.Attempt())
		if d.Attempt() < 3 {
			return steadymq.Discard(errors.New("not today")) // by way of orders.wait
		}
		stop()
		return nil
	}, steadymq.WithDialer(broker.Dialer()), steadymq.WithTopology(declare))
	fmt.Println("stopped:", err)
	// Output:
	// tea, attempt 1
	// tea, attempt 2
	// tea, attempt 3
	// stopped: <nil>
}

// Where a stream is consumed a lost session is resumed at the first message not settled.
func ExampleWithConsumeArgs() {
	broker := emptyBroker()
	defer broker.Close()
	broker.DeclareQueue("events", steadymqtest.QueueOptions{Type: "stream"})
	broker.Publish("events", "one", "two", "three")
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	err := steadymq.Consume(ctx, broker.URL, "events", func(ctx context.Context, d *steadymq.Delivery) error {
		fmt.Printf("session %d: %s\n", d.Session(), d.Body)
		switch {
		case d.Session() == 1 && string(d.Body) == "two":
			broker.Reset() // the connection is lost
			<-ctx.Done()
			return context.Cause(ctx)
		case string(d.Body) == "three":
			stop()
		}
		return nil
	},
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
	fmt.Println("stopped:", err)
	// Output:
	// session 1: one
	// session 1: two
	// session 2: two
	// session 2: three
	// stopped: <nil>
}

// Of a cluster all hosts are given. When one goes down the next is dialled at once.
func ExampleWithURLs() {
	broker := emptyBroker(steadymqtest.WithHosts(3))
	defer broker.Close()
	broker.DeclareQueue("orders", steadymqtest.QueueOptions{Type: "quorum"})
	broker.Publish("orders", "tea")
	broker.Host(0).Kill() // two of three hosts are down
	broker.Host(1).Kill()
	urls := broker.URLs()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	err := steadymq.Consume(ctx, urls[0], "orders", func(ctx context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s from %s\n", d.Body, d.Host())
		if d.Session() == 1 {
			broker.Host(1).Restart()
			broker.Host(2).Kill() // the one we are connected to
			<-ctx.Done()
			return context.Cause(ctx)
		}
		stop()
		return nil
	}, steadymq.WithDialer(broker.Dialer()), steadymq.WithURLs(urls[1:]...))
	fmt.Println("stopped:", err)
	// Output:
	// tea from mq3.test:5672
	// tea from mq2.test:5672
	// stopped: <nil>
}

// Where the broker is, a service discovery knows. It is asked before every dial.
func ExampleWithURLFunc() {
	broker := emptyBroker(steadymqtest.WithHosts(2))
	defer broker.Close()
	broker.DeclareQueue("orders", steadymqtest.QueueOptions{Type: "quorum"})
	var moved atomic.Bool
	discover := func(context.Context) (string, error) {
		if moved.Load() {
			return broker.URLs()[1], nil
		}
		return broker.URLs()[0], nil
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() {
		_ = broker.WaitConsumers(ctx, "orders", 1)
		moved.Store(true)
		broker.Host(0).Kill()
		broker.Publish("orders", "tea")
	}()
	err := steadymq.Consume(ctx, "", "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s from %s\n", d.Body, d.Host())
		stop()
		return nil
	}, steadymq.WithDialer(broker.Dialer()), steadymq.WithURLFunc(discover))
	fmt.Println("stopped:", err)
	// Output:
	// tea from mq2.test:5672
	// stopped: <nil>
}

// A password that rotates is read before every dial.
func ExampleWithCredentials() {
	broker := emptyBroker(steadymqtest.WithUser("shop", "spring"))
	defer broker.Close()
	broker.DeclareQueue("orders", steadymqtest.QueueOptions{Type: "quorum"})
	var secret atomic.Value // as your vault or a mounted file has it
	secret.Store("spring")
	credentials := func(context.Context) (steadymq.Credentials, error) {
		return steadymq.Credentials{Username: "shop", Password: secret.Load().(string)}, nil
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { // an operator
		_ = broker.WaitConsumers(ctx, "orders", 1)
		secret.Store("summer")
		broker.SetPassword("shop", "summer")
		broker.CloseConnections(320, "Closed via management plugin")
		broker.Publish("orders", "tea")
	}()
	err := steadymq.Consume(ctx, "amqp://mq1.test", "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s in session %d\n", d.Body, d.Session())
		stop()
		return nil
	}, steadymq.WithDialer(broker.Dialer()), steadymq.WithCredentials(credentials))
	fmt.Println("stopped:", err)
	// Output:
	// tea in session 2
	// stopped: <nil>
}

// The broker's certificate is of a company's own CA.
func ExampleWithTLSConfig() {
	broker := emptyBroker(steadymqtest.WithTLS())
	defer broker.Close()
	broker.DeclareQueue("orders", steadymqtest.QueueOptions{Type: "quorum"})
	broker.Publish("orders", "tea")
	roots := broker.TLSConfig().RootCAs // yours: x509.NewCertPool and AppendCertsFromPEM
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s from %s\n", d.Body, d.Host())
		stop()
		return nil
	},
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithTLSConfig(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}))
	fmt.Println("stopped:", err)
	// Output:
	// tea from mq1.test:5671
	// stopped: <nil>
}

// Without WithFatal a missing queue is asked for until somebody has declared it.
func ExampleWithFatal() {
	broker := emptyBroker()
	defer broker.Close()
	handle := func(context.Context, *steadymq.Delivery) error { return nil }
	missing := func(err error) bool {
		var said *amqp.Error
		return errors.As(err, &said) && said.Code == amqp.NotFound
	}
	err := steadymq.Consume(context.Background(), broker.URL, "oders", handle,
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithFatal(missing))
	fmt.Println(err)
	// Output:
	// steadymq: queue oders: session 1: consume mq1.test:5672: 404 NOT_FOUND - no queue 'oders' in vhost '/'; it is asked for again until someone has declared it, which WithQueue or WithTopology can do
}

// A policy is a middleware that rewrites the error. Package middleware has some; see [OutcomeOf]
// for one of your own.
func ExampleWithMiddleware() {
	broker := exampleBroker("flaky")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Println("attempt", d.Attempt())
		if d.Attempt() == 2 {
			stop()
		}
		return errors.New("not today")
	},
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithRequeueDelay(10*time.Millisecond, time.Minute), // default: 1 s, 15 min
		steadymq.WithMiddleware(middleware.DiscardAfter(2)))
	fmt.Println("stopped:", err)
	fmt.Println("dead:", broker.QueueLen("orders.dead"))
	// Output:
	// attempt 1
	// attempt 2
	// stopped: <nil>
	// dead: 1
}

// One message fails twice and comes back, the other one is given up and kept. Neither stands in the
// way of those behind it meanwhile.
func ExampleWithRetry() {
	broker := exampleBroker("flaky", "poison", "tea")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var left sync.WaitGroup
	left.Add(3)
	settled := func(_ *steadymq.Delivery, o steadymq.Outcome) {
		if o == steadymq.Acked || o == steadymq.Parked {
			left.Done()
		}
	}
	go func() {
		left.Wait()
		stop()
	}()
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		switch body := string(d.Body); {
		case body == "poison":
			return errors.New("no such customer")
		case body == "flaky" && d.Attempt() < 3:
			return errors.New("database is away")
		}
		fmt.Printf("%s in attempt %d\n", d.Body, d.Attempt())
		return nil
	},
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithRetry(steadymq.Retry{
			Attempts: 3,
			Delays:   []time.Duration{200 * time.Millisecond, 400 * time.Millisecond}, // usually seconds to hours
			Park:     "orders.parked",
		}),
		steadymq.WithHooks(steadymq.Hooks{Settled: settled}))
	fmt.Println("stopped:", err)
	fmt.Println("parked:", broker.QueueLen("orders.parked"))
	// Output:
	// tea in attempt 1
	// flaky in attempt 3
	// stopped: <nil>
	// parked: 1
}

// RabbitMQ 4.3 delays what comes back by itself: no other queue is needed, and a message that waits
// occupies no prefetch. An earlier broker makes the consumer hold it, as if it had not been asked.
func ExampleQueue_retryMin() {
	broker := emptyBroker(steadymqtest.WithVersion(4, 3))
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var failed time.Time
	handle := func(_ context.Context, d *steadymq.Delivery) error {
		if d.Attempt() == 1 {
			failed = time.Now()
			return errors.New("database is away")
		}
		fmt.Println("attempt", d.Attempt(), "after the delay:", time.Since(failed) >= 100*time.Millisecond)
		stop()
		return nil
	}
	c, err := steadymq.New(broker.URL, "orders",
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithQueue(steadymq.Queue{RetryMin: 100 * time.Millisecond, RetryMax: time.Minute}),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: func(s steadymq.StateChange) {
			if s.To == steadymq.Consuming {
				broker.Publish("orders", "tea")
			}
		}}))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("stopped:", c.Run(ctx, handle))
	fmt.Println("held by the consumer:", c.Stats().Held, "left:", broker.QueueLen("orders"))
	// Output:
	// attempt 2 after the delay: true
	// stopped: <nil>
	// held by the consumer: 0 left: 0
}

// What takes too long is given up, and is tried again later.
func ExampleWithHandlerTimeout() {
	broker := exampleBroker("tea")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	answers := make(chan string, 1) // of a service that others run
	handle := func(ctx context.Context, d *steadymq.Delivery) error {
		select {
		case answer := <-answers:
			fmt.Printf("%s: %s\n", d.Body, answer)
			stop()
			return nil
		case <-ctx.Done():
			cause := context.Cause(ctx)
			fmt.Println(cause, errors.Is(cause, steadymq.ErrHandlerTimeout))
			answers <- "there is some left"
			return cause
		}
	}
	err := steadymq.Consume(ctx, broker.URL, "orders", handle,
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithHandlerTimeout(100*time.Millisecond),
		steadymq.WithRequeueDelay(10*time.Millisecond, time.Minute)) // default: 1 s, 15 min
	fmt.Println("stopped:", err)
	// Output:
	// steadymq: handler timeout true
	// tea: there is some left
	// stopped: <nil>
}

// A message that is too large is given to no handler. It is told, held, and put back in the end.
func ExampleWithMaxMessageSize() {
	broker := exampleBroker("an order as long as a book")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	alarm := func(e *steadymq.MessageError) {
		fmt.Println(e)
		fmt.Println("too large:", errors.Is(e, steadymq.ErrMessageTooLarge))
		stop()
	}
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s\n", d.Body)
		return nil
	},
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithMaxMessageSize(10),
		steadymq.WithHooks(steadymq.Hooks{Unreadable: alarm}))
	fmt.Println("stopped:", err)
	fmt.Println("left:", broker.QueueLen("orders"))
	// Output:
	// steadymq: queue orders: the message with delivery tag 1 (exchange "", routing key "orders", 26 bytes) is given to no handler: the message is larger than the limit (WithMaxMessageSize) of 10 bytes: raise it, or take the message out of the queue
	// too large: true
	// stopped: <nil>
	// left: 1
}

// Metrics: what became of the messages, and whether the consumer is up.
func ExampleWithHooks() {
	broker := exampleBroker("tea", "milk", "poison")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	metrics := new(expvar.Map) // in a service: expvar.NewMap("orders")
	hooks := steadymq.Hooks{
		Settled:       func(_ *steadymq.Delivery, o steadymq.Outcome) { metrics.Add(o.String(), 1) },
		HandlerFailed: func(*steadymq.Delivery, error) { metrics.Add("failed", 1) },
		StateChanged: func(c steadymq.StateChange) {
			if c.To == steadymq.Consuming {
				metrics.Add("sessions", 1)
			}
		},
	}
	_ = steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		if string(d.Body) == "poison" {
			stop()
			return steadymq.Discard(errors.New("cannot be parsed"))
		}
		return nil
	}, steadymq.WithDialer(broker.Dialer()), steadymq.WithHooks(hooks))
	fmt.Println(metrics)
	// Output: {"acked": 2, "discarded": 1, "failed": 1, "sessions": 1}
}

func ExampleHooks_settled() {
	broker := exampleBroker("tea", "poison")
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
	}, steadymq.WithDialer(broker.Dialer()), steadymq.WithHooks(steadymq.Hooks{Settled: settled}))
	// Output:
	// tea: acked
	// poison: discarded
}

// The log of a consumer that is started before its broker.
func ExampleWithLogger() {
	broker := exampleBroker("tea")
	defer broker.Close()
	broker.Refuse(true)
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		defer broker.Heal() // the broker starts behind the first dial
		return broker.Dialer()(ctx, network, address)
	}
	logger := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			switch a.Key {
			case slog.TimeKey, "consumer", "retry_in", "down": // they differ from run to run
				return slog.Attr{}
			}
			return a
		},
	}))
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	_ = steadymq.Consume(ctx, broker.URL, "orders", func(context.Context, *steadymq.Delivery) error {
		stop()
		return nil
	}, steadymq.WithDialer(dial), steadymq.WithLogger(logger))
	// Output:
	// level=INFO msg="steadymq: connecting" queue=orders session=0 host=mq1.test:5672
	// level=WARN msg="steadymq: backoff" queue=orders session=0 host=mq1.test:5672 attempt=1 cause="dial: connection refused"
	// level=INFO msg="steadymq: consuming" queue=orders session=1 host=mq1.test:5672 attempt=1
	// level=INFO msg="steadymq: draining" queue=orders session=1 host=mq1.test:5672 attempt=1
	// level=INFO msg="steadymq: stopped" queue=orders session=1 host=mq1.test:5672 attempt=1
}

// A quorum queue without majority: the broker confirms the consumer and sends heartbeats, and no
// message comes. The queue is asked then, and the session is replaced, on another host if there is
// one.
func ExampleWithStallDetector() {
	broker := emptyBroker()
	defer broker.Close()
	broker.DeclareQueue("orders", steadymqtest.QueueOptions{Type: "quorum"})
	broker.Publish("orders", "tea")
	broker.QuorumStall("orders", true)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s in session %d\n", d.Body, d.Session())
		stop()
		return nil
	},
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithStallDetector(time.Second), // a good value is a minute
		steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			if c.To == steadymq.Backoff {
				fmt.Println(c.Cause)
				broker.QuorumStall("orders", false) // the majority is back
			}
		}}))
	fmt.Println("stopped:", err)
	// Output:
	// steadymq: queue orders: session 1: lost mq1.test:5672: stalled: nothing delivered for 1s though the queue has 1 messages and this is its only consumer
	// tea in session 2
	// stopped: <nil>
}

// placesInMemory is an OffsetStore for as long as the process lives. Real ones, with a file and with
// a database, are in examples/streamoffsets.
type placesInMemory struct {
	mu   sync.Mutex
	next map[string]int64 // by stream
}

func (p *placesInMemory) Load(_ context.Context, stream string) (next int64, found bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	next, found = p.next[stream]
	return next, found, nil
}

func (p *placesInMemory) Save(_ context.Context, stream string, next int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next[stream] = next
	return nil
}

// A consumer that goes on where the last one has stopped. Its "first" is for the first time ever.
func ExampleWithStreamOffsets() {
	broker := emptyBroker()
	defer broker.Close()
	broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
	broker.Publish("log", "tea", "milk", "sugar", "salt")
	store := &placesInMemory{next: make(map[string]int64)}
	for _, last := range []string{"milk", "salt"} {
		ctx, stop := context.WithCancel(context.Background())
		_ = steadymq.Consume(ctx, broker.URL, "log", func(_ context.Context, d *steadymq.Delivery) error {
			fmt.Println(string(d.Body))
			if string(d.Body) == last {
				stop()
			}
			return nil
		},
			steadymq.WithDialer(broker.Dialer()),
			steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}),
			steadymq.WithStreamOffsets(store))
		fmt.Println("stopped, to go on at", store.next["log"])
	}
	// Output:
	// tea
	// milk
	// stopped, to go on at 2
	// sugar
	// salt
	// stopped, to go on at 4
}

// One insert for up to a hundred messages. A message that fails is put back alone: a BatchError has an
// entry for each.
func ExampleConsumer_RunBatch() {
	broker := exampleBroker("tea", "milk", "?", "bread")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	consumer, err := steadymq.New(broker.URL, "orders", steadymq.WithDialer(broker.Dialer()))
	if err != nil {
		fmt.Println(err)
		return
	}
	err = consumer.RunBatch(ctx, func(_ context.Context, batch []*steadymq.Delivery) error {
		defer stop()
		errs := make([]error, len(batch)) // nil acks
		var rows []string
		for i, d := range batch {
			if string(d.Body) == "?" {
				errs[i] = steadymq.Discard(errors.New("not an order"))
				continue
			}
			rows = append(rows, string(d.Body))
		}
		fmt.Println("insert", rows) // an error of this would be that of all: return it
		return &steadymq.BatchError{Errs: errs}
	})
	fmt.Println("stopped:", err)
	fmt.Println("acked:", consumer.Stats().Acked, "discarded:", consumer.Stats().Discarded)
	// Output:
	// insert [tea milk bread]
	// stopped: <nil>
	// acked: 3 discarded: 1
}

// A message that has failed before comes in a batch of its own, so one that always fails takes the
// others along only once.
func ExampleWithBatch() {
	broker := exampleBroker("tea", "poison", "milk")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	consumer, err := steadymq.New(broker.URL, "orders", steadymq.WithDialer(broker.Dialer()),
		steadymq.WithBatch(3, time.Second),
		steadymq.WithRequeueDelay(10*time.Millisecond, time.Second))
	if err != nil {
		fmt.Println(err)
		return
	}
	handled := 0
	err = consumer.RunBatch(ctx, func(_ context.Context, batch []*steadymq.Delivery) error {
		fmt.Println(len(batch), "of", batch[0].Attempt())
		for _, d := range batch {
			if string(d.Body) == "poison" && d.Attempt() == 1 {
				return errors.New("one of them cannot be stored")
			}
		}
		if handled += len(batch); handled == 3 {
			stop()
		}
		return nil
	})
	fmt.Println("stopped:", err)
	// Output:
	// 3 of 1
	// 1 of 2
	// 1 of 2
	// 1 of 2
	// stopped: <nil>
}

// In a group some consumers take batches and others do not.
func ExampleGroup_HandleBatch() {
	broker := exampleBroker("tea", "milk")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	group, err := steadymq.NewGroup(broker.URL, steadymq.WithDialer(broker.Dialer()), steadymq.WithBatch(2, time.Second))
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = group.HandleBatch("orders", func(_ context.Context, batch []*steadymq.Delivery) error {
		fmt.Println(len(batch), "orders")
		stop()
		return nil
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = group.Handle("orders.dead", func(context.Context, *steadymq.Delivery) error { return nil })
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("stopped:", group.Run(ctx))
	// Output:
	// 2 orders
	// stopped: <nil>
}

// A handler that leaves its delivery to somebody else, who settles it when the answer has come.
func ExampleLater() {
	broker := exampleBroker("tea", "milk")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var waiting []*steadymq.Delivery // by one handler at a time
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		waiting = append(waiting, d)
		if len(waiting) < 2 {
			return steadymq.Later
		}
		for _, d := range waiting { // all together, this one too
			fmt.Printf("%s: %v\n", d.Body, d.Ack())
		}
		stop()
		return nil
	}, steadymq.WithDialer(broker.Dialer()))
	fmt.Println("stopped:", err)
	fmt.Println("left:", broker.QueueLen("orders"))
	// Output:
	// tea: <nil>
	// milk: <nil>
	// stopped: <nil>
	// left: 0
}

// Deliveries in a loop, where a handler would be in the way.
func ExampleConsumer_Deliveries() {
	broker := exampleBroker("tea", "milk", "poison")
	defer broker.Close()
	consumer, err := steadymq.New(broker.URL, "orders", steadymq.WithDialer(broker.Dialer()))
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	for d, err := range consumer.Deliveries(ctx) {
		if err != nil { // the last turn: the consumer has given up
			fmt.Println(err)
			continue
		}
		settle := d.Ack
		if string(d.Body) == "poison" {
			settle = d.Discard
			stop() // the loop ends, once it has drained
		}
		if err := settle(); err != nil {
			fmt.Println("it comes again:", err)
		}
		fmt.Printf("%s: %v\n", d.Body, d.Outcome())
	}
	fmt.Println("left:", broker.QueueLen("orders"))
	// Output:
	// tea: acked
	// milk: acked
	// poison: discarded
	// left: 0
}

// Take one message and leave: the others stay in the queue.
func ExampleConsumer_Deliveries_one() {
	broker := exampleBroker("tea", "milk")
	defer broker.Close()
	// No more is sent ahead than is taken: up to RabbitMQ 4.2 a quorum queue counts what goes back.
	consumer, err := steadymq.New(broker.URL, "orders", steadymq.WithDialer(broker.Dialer()), steadymq.WithPrefetch(1))
	if err != nil {
		fmt.Println(err)
		return
	}
	takeOne := func(ctx context.Context) (string, error) {
		for d, err := range consumer.Deliveries(ctx) {
			if err != nil {
				return "", err
			}
			return string(d.Body), d.Ack() // settled before the loop is left
		}
		return "", ctx.Err() // none has come in time
	}
	for range 3 {
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		fmt.Println(takeOne(ctx))
		cancel()
	}
	// Output:
	// tea <nil>
	// milk <nil>
	//  context deadline exceeded
}

// Empty the queue and leave. AMQP has no sign that a queue is empty. That nothing has happened for a
// while, though the consumer was there all the time, is the next best.
func ExampleConsumer_Deliveries_empty() {
	broker := exampleBroker("tea", "milk", "sugar")
	defer broker.Close()
	consumer, err := steadymq.New(broker.URL, "orders", steadymq.WithDialer(broker.Dialer()))
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() {
		ticks := time.Tick(200 * time.Millisecond) // a good value is some seconds
		for before := consumer.Stats(); ctx.Err() == nil; before = consumer.Stats() {
			<-ticks
			now := consumer.Stats()
			if now == before && now.State == steadymq.Consuming && now.Handling == 0 {
				stop()
			}
		}
	}()
	for d, err := range consumer.Deliveries(ctx) {
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Printf("%s\n", d.Body)
		if err := d.Ack(); err != nil {
			fmt.Println("it comes again:", err)
		}
	}
	fmt.Println("left:", broker.QueueLen("orders"))
	// Output:
	// tea
	// milk
	// sugar
	// left: 0
}

// Pause before a job that must have the database for itself, and go on after it. What was prefetched
// waits here for a minute, and at the broker after that.
func ExampleConsumer_Pause() {
	broker := exampleBroker("tea", "coffee")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	c, err := steadymq.New(broker.URL, "orders", steadymq.WithDialer(broker.Dialer()))
	if err != nil {
		fmt.Println(err)
		return
	}
	err = c.Run(ctx, func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s\n", d.Body)
		if string(d.Body) == "coffee" {
			stop()
			return nil
		}
		c.Pause()
		fmt.Println(c.State())
		time.AfterFunc(100*time.Millisecond, func() {
			fmt.Println("the job is done")
			c.Resume()
		})
		return nil
	})
	fmt.Println("stopped:", err)
	// Output:
	// tea
	// paused
	// the job is done
	// coffee
	// stopped: <nil>
}

// While the shop is down no message is tried but one from time to time.
func ExampleWithBreaker() {
	broker := exampleBroker("a", "b", "c")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	handled := 0
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		handled++
		switch handled {
		case 1, 2:
			return errors.New("the shop is down")
		case 5:
			stop()
		}
		return nil
	},
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithBreaker(steadymq.Breaker{
			Failures: 2,
			Wait:     50 * time.Millisecond, // a good value is some seconds
			Counts:   func(err error) bool { return !errors.Is(err, context.DeadlineExceeded) },
		}),
		steadymq.WithRequeueDelay(10*time.Millisecond, 10*time.Millisecond),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			var open *steadymq.BreakerError
			if errors.As(c.Cause, &open) {
				fmt.Printf("%v: %d in a row failed: %v\n", c.To, open.Failures, open.Err)
			}
			if c.From == steadymq.Paused {
				fmt.Println(c.To)
			}
		}}))
	fmt.Println("stopped:", err)
	// Output:
	// paused: 2 in a row failed: the shop is down
	// consuming
	// stopped: <nil>
}

// A service that allows 20 calls in a second is called no more often than that.
func ExampleWithRate() {
	broker := exampleBroker("a", "b", "c", "d", "e")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var first time.Time
	handled := 0
	err := steadymq.Consume(ctx, broker.URL, "orders", func(context.Context, *steadymq.Delivery) error {
		if handled++; handled == 1 {
			first = time.Now()
		}
		if handled == 5 {
			fmt.Println("two at once, three that waited 50 ms each:", time.Since(first) > 140*time.Millisecond)
			stop()
		}
		return nil
	}, steadymq.WithDialer(broker.Dialer()), steadymq.WithRate(20, time.Second))
	fmt.Println("stopped:", err)
	// Output:
	// two at once, three that waited 50 ms each: true
	// stopped: <nil>
}

// What concerns one customer is handled in the order of the queue, and customers side by side. A
// message that fails is tried again before the next of its customer.
func ExampleWithOrderingKey() {
	broker := emptyBroker()
	defer broker.Close()
	broker.DeclareQueue("orders", steadymqtest.QueueOptions{})
	broker.Publish("orders", "ada opens", "ada pays", "ada leaves")
	customer := func(d *steadymq.Delivery) string {
		name, _, _ := strings.Cut(string(d.Body), " ")
		return name
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	err := steadymq.Consume(ctx, broker.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s, attempt %d\n", d.Body, d.Attempt())
		switch {
		case string(d.Body) == "ada pays" && d.Attempt() == 1:
			return errors.New("the bank does not answer")
		case string(d.Body) == "ada leaves":
			stop()
		}
		return nil
	},
		steadymq.WithDialer(broker.Dialer()),
		steadymq.WithOrderingKey(customer),
		steadymq.WithConcurrency(8),
		steadymq.WithRequeueDelay(10*time.Millisecond, time.Minute))
	fmt.Println("stopped:", err)
	// Output:
	// ada opens, attempt 1
	// ada pays, attempt 1
	// ada pays, attempt 2
	// ada leaves, attempt 1
	// stopped: <nil>
}
