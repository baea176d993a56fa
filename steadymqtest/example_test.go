package steadymqtest_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// The plain driver, or any library on it, over the in-memory network.
func ExampleNewBroker() {
	b := steadymqtest.NewBroker(nil) // in a test: NewBroker(t), which also closes it
	defer b.Close()
	b.DeclareQueue("orders", steadymqtest.QueueOptions{})
	b.Publish("orders", "one coffee")

	conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	ch, _ := conn.Channel()
	deliveries, _ := ch.Consume("orders", "", false, false, false, false, nil)
	d := <-deliveries
	_ = d.Ack(false)

	fmt.Println(string(d.Body), b.WaitSettled(context.Background(), "orders"), b.Violations())
	// Output: one coffee <nil> []
}

// The library over the in-memory network: dialer and URL are all that differs from a real broker.
func ExampleBroker_Dialer() {
	b := steadymqtest.NewBroker(nil)
	defer b.Close()
	b.DeclareQueue("orders", steadymqtest.QueueOptions{Type: "quorum"})
	b.Publish("orders", "one coffee")

	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	err := steadymq.Consume(ctx, b.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s\n", d.Body)
		stop()
		return nil
	}, steadymq.WithDialer(b.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler)))
	fmt.Println("stopped:", err)
	// Output:
	// one coffee
	// stopped: <nil>
}

// A process of its own, in any language, reaches the broker by TCP.
func ExampleBroker_Listen() {
	b := steadymqtest.NewBroker(nil)
	defer b.Close()
	conn, err := amqp.Dial(b.Listen())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	ch, _ := conn.Channel()
	_, err = ch.QueueDeclare("orders", true, false, false, false, nil)
	fmt.Println(err, b.Queues())
	// Output: <nil> [orders]
}

// What is published to an exchange goes to the queues that are bound to it.
func ExampleBroker_PublishExchange() {
	b := steadymqtest.NewBroker(nil)
	defer b.Close()
	b.DeclareExchange("shop", "topic")
	b.DeclareQueue("orders", steadymqtest.QueueOptions{})
	b.DeclareQueue("audit", steadymqtest.QueueOptions{})
	b.Bind("orders", "shop", "order.*")
	b.Bind("audit", "shop", "#")

	_, queues := b.PublishExchange("shop", "order.new", steadymqtest.Message{
		Body:    []byte("one coffee"),
		Headers: map[string]any{"tenant": "north"},
	})
	fmt.Println("taken by", queues)
	_, queues = b.PublishExchange("shop", "price.changed", steadymqtest.Message{Body: []byte("coffee 3.20")})
	fmt.Println("taken by", queues)
	fmt.Println("orders:", b.QueueLen("orders"), "audit:", b.QueueLen("audit"))
	// Output:
	// taken by 2
	// taken by 1
	// orders: 1 audit: 2
}

// A mistake in settling that no broker tells while all goes well.
func ExampleBroker_Violations() {
	b := steadymqtest.NewBroker(nil)
	defer b.Close()
	b.DeclareQueue("orders", steadymqtest.QueueOptions{})
	b.Publish("orders", "one coffee", "two teas")

	conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	ch, _ := conn.Channel()
	deliveries, _ := ch.Consume("orders", "", false, false, false, false, nil)
	<-deliveries // another worker has it, and is not done yet
	second := <-deliveries
	_ = second.Ack(true) // acks that one, too

	_ = b.WaitSettled(context.Background(), "orders")
	for _, settled := range b.Ledger().Settlements {
		fmt.Println("tag:", settled.Tag, "multiple:", settled.Multiple)
	}
	fmt.Println("violations:", len(b.Violations())) // a test wants none
	// Output:
	// tag: 2 multiple: true
	// violations: 1
}

// The ledger has all that the broker has seen, and is the judge of a test.
func ExampleBroker_Ledger() {
	b := steadymqtest.NewBroker(nil)
	defer b.Close()
	b.DeclareQueue("failed", steadymqtest.QueueOptions{})
	b.DeclareQueue("orders", steadymqtest.QueueOptions{Type: "quorum", DeadLetter: "failed"})
	b.Publish("orders", "one coffee", "poison")

	conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	ch, _ := conn.Channel()
	deliveries, _ := ch.Consume("orders", "", false, false, false, false, nil)
	_ = (<-deliveries).Ack(false)
	_ = (<-deliveries).Reject(true)  // back into the queue
	_ = (<-deliveries).Reject(false) // to the dead-letter queue

	_ = b.WaitSettled(context.Background(), "orders")
	ledger := b.Ledger()
	fmt.Println("acked:", ledger.Count("orders", steadymqtest.Acked))
	fmt.Println("dead-lettered:", ledger.Count("orders", steadymqtest.DeadLettered))
	fmt.Println("redelivered:", ledger.Redelivered("orders"))
	for _, m := range ledger.Messages {
		fmt.Printf("%s in %s: %v after %d deliveries\n", m.ID, m.Queue, m.Fate, m.Deliveries)
	}
	// Output:
	// acked: 1
	// dead-lettered: 1
	// redelivered: 1
	// m1 in orders: acked after 1 deliveries
	// m2 in orders: dead-lettered after 2 deliveries
	// m2 in failed: ready after 0 deliveries
}

// An orderly shutdown of the broker, as a client sees it.
func ExampleFaults_CloseConnections() {
	b := steadymqtest.NewBroker(nil)
	defer b.Close()
	conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial})
	if err != nil {
		fmt.Println(err)
		return
	}
	closed := conn.NotifyClose(make(chan *amqp.Error, 1))
	fmt.Println(b.CloseConnections(320, "broker forced connection closure with reason 'shutdown'"))
	fmt.Println(<-closed)
	// Output:
	// 1
	// Exception (320) Reason: "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'"
}

// Of a cluster one host goes down and comes back.
func ExampleBroker_Host() {
	b := steadymqtest.NewBroker(nil, steadymqtest.WithHosts(2))
	defer b.Close()
	dial := func(url string) {
		conn, err := amqp.DialConfig(url, amqp.Config{Dial: b.Dial})
		if err != nil {
			fmt.Println(err, errors.Is(err, syscall.ECONNREFUSED))
			return
		}
		fmt.Println("connected to", b.Connections()[0].Host)
		_ = conn.Close()
		_ = b.WaitConnections(context.Background(), 0)
	}
	b.Host(0).Kill()
	dial(b.URLs()[0])
	dial(b.URLs()[1])
	b.Host(0).Restart()
	dial(b.URLs()[0])
	// Output:
	// dial tcp mq1.test:5672: connect: connection refused true
	// connected to mq2.test:5672
	// connected to mq1.test:5672
}

// The password of a user is changed: open connections stay, the next login needs the new one.
func ExampleBroker_SetPassword() {
	b := steadymqtest.NewBroker(nil, steadymqtest.WithUser("shop", "spring"))
	defer b.Close()
	b.SetLoginRefusal(steadymqtest.RefusalBy403) // at once; the default takes three seconds, as RabbitMQ does
	before := b.URL
	b.SetPassword("shop", "summer")
	for _, url := range []string{before, b.URLs()[0]} {
		conn, err := amqp.DialConfig(url, amqp.Config{Dial: b.Dial})
		fmt.Println(err)
		if err == nil {
			_ = conn.Close()
		}
	}
	// Output:
	// Exception (403) Reason: "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile."
	// <nil>
}

// Hooks tell of what happens as it happens, here what the consumer does with each message.
func ExampleWithHooks() {
	b := steadymqtest.NewBroker(nil, steadymqtest.WithHooks(steadymqtest.Hooks{
		Delivered: func(d steadymqtest.DeliveryRecord) { fmt.Println("delivered", d.ID, "redelivered:", d.Redelivered) },
		Settled: func(s steadymqtest.SettlementRecord) {
			fmt.Println("settled", s.ID, "by", s.Kind, "requeue:", s.Requeue)
		},
	}))
	defer b.Close()
	b.DeclareQueue("orders", steadymqtest.QueueOptions{})
	b.Publish("orders", "one coffee")

	conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial})
	if err != nil {
		fmt.Println(err)
		return
	}
	ch, _ := conn.Channel()
	deliveries, _ := ch.Consume("orders", "", false, false, false, false, nil)
	_ = (<-deliveries).Nack(false, true)
	_ = (<-deliveries).Ack(false)
	_ = b.WaitSettled(context.Background(), "orders")
	_ = conn.Close() // all hooks have been called
	// Output:
	// delivered m1 redelivered: false
	// settled m1 by nack requeue: true
	// delivered m1 redelivered: true
	// settled m1 by ack requeue: false
}

// shop is a service as there are many: it charges an order once, however often the message comes.
type shop struct {
	mu      sync.Mutex
	charged map[string]int // by message-id
	calls   int
}

var errUnreadable = errors.New("cannot read this order")

func (s *shop) handle(ctx context.Context, d *steadymq.Delivery) error {
	s.mu.Lock()
	s.calls++
	s.mu.Unlock()
	if string(d.Body) == "poison" {
		return errUnreadable
	}
	select { // the payment provider takes its time
	case <-time.After(5 * time.Second):
	case <-ctx.Done():
		return context.Cause(ctx) // the session is lost: the message comes again
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.charged[d.MessageId]++
	return nil
}

// serve runs the shop's handler until the test ends.
func serve(t *testing.T, b *steadymqtest.Broker, opts ...steadymq.Option) *shop {
	s := &shop{charged: map[string]int{}}
	c, err := steadymq.New(b.URL, "orders", append(opts, steadymq.WithDialer(b.Dialer()))...)
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, s.handle) }()
	t.Cleanup(func() {
		stop()
		require.NoError(t, <-done)
	})
	return s
}

// A connection is lost while the handler works: it is told, and the order is charged once.
func TestExampleLostConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("orders", steadymqtest.QueueOptions{})
		id := b.Publish("orders", "one coffee")[0]
		s := serve(t, b)

		time.Sleep(2 * time.Second) // the handler is at work
		b.CloseConnections(320, "broker forced connection closure with reason 'shutdown'")

		require.NoError(t, b.WaitSettled(t.Context(), "orders"))
		require.Equal(t, 2, s.calls)
		require.Equal(t, map[string]int{id: 1}, s.charged)
		require.Empty(t, b.Violations())
	})
}

// The broker is out of reach when the work is done: the ack is lost, the order comes again, the service must notice.
func TestExampleRedelivery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("orders", steadymqtest.QueueOptions{})
		id := b.Publish("orders", "one coffee")[0]
		s := serve(t, b)

		time.Sleep(2 * time.Second)
		b.BlackHole(true, true) // nothing arrives any more, and nobody is told
		time.Sleep(time.Minute)
		b.Heal()

		require.NoError(t, b.WaitSettled(t.Context(), "orders"))
		require.Equal(t, 1, b.Ledger().Redelivered("orders"))
		require.Equal(t, map[string]int{id: 2}, s.charged) // charged twice: this shop has a bug
	})
}

// A message that no handler can read ends in the dead-letter queue after three more tries, and holds up nobody.
func TestExamplePoison(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("failed", steadymqtest.QueueOptions{})
		b.DeclareQueue("orders", steadymqtest.QueueOptions{Type: "quorum", DeliveryLimit: 3, DeadLetter: "failed"})
		b.Publish("orders", "poison", "one coffee")
		s := serve(t, b, steadymq.WithConcurrency(2))

		require.NoError(t, b.WaitSettled(t.Context(), "orders"))
		require.Equal(t, 5, s.calls) // four times poison
		require.Equal(t, 1, b.QueueLen("failed"))
		require.Equal(t, 1, b.Ledger().Count("orders", steadymqtest.DeadLettered))
	})
}
