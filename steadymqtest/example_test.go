package steadymqtest_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
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
