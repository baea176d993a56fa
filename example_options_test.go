package steadymq_test

import (
	"context"
	"crypto/tls"
	"errors"
	"expvar"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/middleware"
	"github.com/steadymq/steadymq/steadymqtest"
)

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
