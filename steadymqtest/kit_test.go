package steadymqtest_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/steadymqtest"
)

// bubble runs a test in virtual time.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// dial connects the plain driver to the first host.
func dial(t *testing.T, b *steadymqtest.Broker) *amqp.Connection {
	t.Helper()
	return dialHost(t, b, 0)
}

func dialHost(t *testing.T, b *steadymqtest.Broker, host int) *amqp.Connection {
	t.Helper()
	conn, err := tryDial(b, host, 10*time.Second)
	require.NoError(t, err)
	t.Cleanup(func() { conn.CloseDeadline(time.Now().Add(time.Second)) })
	return conn
}

func tryDial(b *steadymqtest.Broker, host int, heartbeat time.Duration) (*amqp.Connection, error) {
	return amqp.DialConfig(b.URLs()[host], amqp.Config{Dial: b.Dial, Heartbeat: heartbeat, TLSClientConfig: b.TLSConfig()})
}

func open(t *testing.T, conn *amqp.Connection, prefetch int) *amqp.Channel {
	t.Helper()
	ch, err := conn.Channel()
	require.NoError(t, err)
	if prefetch > 0 {
		require.NoError(t, ch.Qos(prefetch, 0, false))
	}
	return ch
}

func consume(t *testing.T, ch *amqp.Channel, queue, tag string) <-chan amqp.Delivery {
	t.Helper()
	ds, err := ch.Consume(queue, tag, false, false, false, false, nil)
	require.NoError(t, err)
	return ds
}

// soon is a context that ends after a virtual minute.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// next is the next delivery within a virtual minute.
func next(t *testing.T, ds <-chan amqp.Delivery) amqp.Delivery {
	t.Helper()
	select {
	case d, ok := <-ds:
		require.True(t, ok, "the delivery channel is closed")
		return d
	case <-time.After(time.Minute):
		require.FailNow(t, "no delivery within a minute")
		return amqp.Delivery{}
	}
}

// none checks that nothing is delivered for d.
func none(t *testing.T, ds <-chan amqp.Delivery, d time.Duration) {
	t.Helper()
	select {
	case m, ok := <-ds:
		require.False(t, ok, "unexpected delivery %q", m.Body)
	case <-time.After(d):
	}
}

// frames counts the bytes that a broker sends.
type frames struct {
	b     *steadymqtest.Broker
	bytes atomic.Int64
}

func countFrames(b *steadymqtest.Broker) *frames { return &frames{b: b} }

func (f *frames) dial(network, addr string) (net.Conn, error) {
	nc, err := f.b.Dial(network, addr)
	return &countedConn{Conn: nc, f: f}, err
}

type countedConn struct {
	net.Conn
	f *frames
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.f.bytes.Add(int64(n))
	return n, err
}
