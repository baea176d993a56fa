package replay

import (
	"encoding/binary"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// consumer is the plain driver on a fresh server.
type consumer struct {
	server     *Server
	conn       *amqp.Connection
	channel    *amqp.Channel
	deliveries <-chan amqp.Delivery
}

func newConsumer(t *testing.T, queue string, prefetch int) *consumer {
	t.Helper()
	s, err := Listen(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	conn, err := amqp.Dial("amqp://guest:guest@" + s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	c := &consumer{server: s, conn: conn}
	if c.channel, err = conn.Channel(); err != nil {
		t.Fatal(err)
	}
	if err := c.channel.Qos(prefetch, 0, false); err != nil {
		t.Fatal(err)
	}
	if c.deliveries, err = c.channel.Consume(queue, "", false, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *consumer) next(t *testing.T) amqp.Delivery {
	t.Helper()
	select {
	case d, ok := <-c.deliveries:
		if !ok {
			t.Fatal("the deliveries ended")
		}
		return d
	case <-time.After(5 * time.Second):
		t.Fatal("no delivery")
	}
	return amqp.Delivery{}
}

// settled waits until the server has seen what the driver wrote: a synchronous
// call on the channel comes back after it.
func (c *consumer) settled(t *testing.T) Stats {
	t.Helper()
	if err := c.channel.Qos(1, 0, false); err != nil {
		t.Fatal(err)
	}
	return c.server.Stats()
}

func TestDeliveriesStayInTheWindow(t *testing.T) {
	c := newConsumer(t, "size=100", 10)
	for tag := uint64(1); tag <= 10; tag++ {
		d := c.next(t)
		if d.DeliveryTag != tag || len(d.Body) != 100 || binary.BigEndian.Uint64(d.Body) != 1 {
			t.Fatalf("delivery %d: tag %d, %d bytes", tag, d.DeliveryTag, len(d.Body))
		}
	}
	c.server.Stop()
	if s := c.settled(t); s.Delivered != 10 {
		t.Errorf("%d delivered without an ack, want 10", s.Delivered)
	}
}

func TestAllWindowsAreFilledWhenDeliveriesBegin(t *testing.T) {
	s, err := Listen(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	s.Stop()
	conn, err := amqp.Dial("amqp://guest:guest@" + s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	var all []*consumer
	for range 3 {
		c := &consumer{server: s, conn: conn}
		if c.channel, err = conn.Channel(); err != nil {
			t.Fatal(err)
		}
		if err := c.channel.Qos(10, 0, false); err != nil {
			t.Fatal(err)
		}
		if c.deliveries, err = c.channel.Consume("size=100", "", false, false, false, false, nil); err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	if n := s.Stats().Delivered; n != 0 {
		t.Fatalf("%d delivered before they begin", n)
	}
	s.Resume()
	for range 1000 {
		for _, c := range all {
			if err := c.next(t).Ack(false); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := s.Stats().Wrong; n != 0 {
		t.Errorf("%d settles are wrong", n)
	}
}

func TestTimedMessagesTellWhenTheyWereSent(t *testing.T) {
	c := newConsumer(t, "size=100,every=1ms", 10)
	for range 5 {
		d := c.next(t)
		took := time.Since(time.Unix(0, int64(binary.BigEndian.Uint64(d.Body[8:]))))
		if took < 0 || took > 5*time.Second {
			t.Errorf("%v on its way", took)
		}
		if err := d.Ack(false); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLargeBodies(t *testing.T) {
	c := newConsumer(t, "size=300000", 2)
	for range 5 {
		d := c.next(t)
		if len(d.Body) != 300000 {
			t.Fatalf("body of %d bytes", len(d.Body))
		}
		if err := d.Ack(false); err != nil {
			t.Fatal(err)
		}
	}
}

// The check that makes a benchmark's figures worth anything.
func TestWrongSettlesAreCounted(t *testing.T) {
	c := newConsumer(t, "size=100", 10)
	d := c.next(t)
	c.server.Stop()
	for _, settle := range []func() error{
		func() error { return d.Ack(false) },
		func() error { return d.Ack(false) },
		func() error { return d.Reject(true) },
		func() error { return c.channel.Ack(999, false) },
		func() error { return c.channel.Ack(3, true) },
	} {
		if err := settle(); err != nil {
			t.Fatal(err)
		}
	}
	s := c.settled(t)
	if s.Settled != 3 || s.Wrong != 3 || s.Multiple != 1 {
		t.Errorf("settled %d, wrong %d, multiple %d, want 3, 3, 1", s.Settled, s.Wrong, s.Multiple)
	}
}

func TestFaultsShowAtTheClient(t *testing.T) {
	codes := map[string]int{FaultReset: 501, FaultFIN: 501, FaultConnClose: 320, FaultRestart: 501}
	for fault, code := range codes {
		t.Run(fault, func(t *testing.T) {
			c := newConsumer(t, "size=100,every=1ms", 10)
			closed := c.conn.NotifyClose(make(chan *amqp.Error, 1))
			c.next(t)
			if err := c.server.Inject(fault, time.Millisecond); err != nil {
				t.Fatal(err)
			}
			if err := receive(t, closed); err == nil || err.Code != code {
				t.Errorf("connection ended with %v, want %d", err, code)
			}
		})
	}
	t.Run(FaultChannelClose, func(t *testing.T) {
		c := newConsumer(t, "size=100", 10)
		closed := c.channel.NotifyClose(make(chan *amqp.Error, 1))
		c.next(t)
		if err := c.server.Inject(FaultChannelClose, 0); err != nil {
			t.Fatal(err)
		}
		if err := receive(t, closed); err == nil || err.Code != 406 {
			t.Errorf("channel ended with %v, want 406", err)
		}
	})
	t.Run(FaultCancel, func(t *testing.T) {
		c := newConsumer(t, "size=100", 10)
		cancelled := c.channel.NotifyCancel(make(chan string, 1))
		d := c.next(t)
		if err := c.server.Inject(FaultCancel, 0); err != nil {
			t.Fatal(err)
		}
		if tag := receive(t, cancelled); tag != d.ConsumerTag {
			t.Errorf("cancelled %q, want %q", tag, d.ConsumerTag)
		}
	})
}

func receive[T any](t *testing.T, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(5 * time.Second):
		t.Fatal("the fault did not show")
	}
	panic("unreachable")
}

func TestServerServesAgainAfterARestart(t *testing.T) {
	c := newConsumer(t, "size=100", 10)
	if err := c.server.Inject(FaultRestart, time.Millisecond); err != nil {
		t.Fatal(err)
	}
	conn, err := amqp.Dial("amqp://guest:guest@" + c.server.Addr())
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
}
