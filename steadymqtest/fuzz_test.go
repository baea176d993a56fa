package steadymqtest_test

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq/steadymqtest"
)

// FuzzClientBytes: whatever a client sends, before or after a proper beginning, the broker does not panic, still serves others and
// its Close returns.
func FuzzClientBytes(f *testing.F) {
	session := recordSession(f)
	for _, p := range session {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		b := newFuzzBroker()
		defer b.Close()
		for _, from := range []int{0, 1, 4, len(session)} { // nothing, header, open, channel with consumer
			nc, err := b.Dial("tcp", b.Host(0).Addr())
			if err != nil {
				t.Fatal(err)
			}
			for _, q := range session[:from] {
				nc.Write(q)
			}
			nc.Write(p)
			nc.(interface{ CloseWrite() error }).CloseWrite()
			io.Copy(io.Discard, nc)
			nc.Close()
		}
		conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial})
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	})
}

func newFuzzBroker() *steadymqtest.Broker {
	b := steadymqtest.NewBroker(nil)
	b.DeclareQueue("q", steadymqtest.QueueOptions{Type: "quorum"})
	b.Publish("q", "1", "2")
	return b
}

// recordSession is what the driver writes in a session that does a bit of everything, one Write after the other.
func recordSession(f *testing.F) [][]byte {
	b := newFuzzBroker()
	defer b.Close()
	var tap tappedConn
	conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: func(network, addr string) (net.Conn, error) {
		nc, err := b.Dial(network, addr)
		tap.Conn = nc
		return &tap, err
	}})
	if err != nil {
		f.Fatal(err)
	}
	ch, err := conn.Channel()
	if err != nil {
		f.Fatal(err)
	}
	_, err = ch.QueueDeclare("other", true, false, false, false, amqp.Table{"x-max-length": int32(1), "x-dead-letter-exchange": ""})
	if err == nil {
		err = ch.Qos(1, 0, false)
	}
	if err == nil {
		err = ch.PublishWithContext(context.Background(), "", "q", true, false, amqp.Publishing{Headers: amqp.Table{"a": []any{nil, true}}, Body: []byte("3")})
	}
	ds, consumeErr := ch.Consume("q", "c", false, false, false, false, nil)
	if err != nil || consumeErr != nil {
		f.Fatal(err, consumeErr)
	}
	(<-ds).Nack(false, true)
	(<-ds).Ack(false)
	tap.mu.Lock()
	session := tap.writes
	tap.writes = nil
	tap.mu.Unlock()
	conn.Close()
	return session
}

// tappedConn remembers what was written.
type tappedConn struct {
	net.Conn
	mu     sync.Mutex
	writes [][]byte
}

func (c *tappedConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.writes = append(c.writes, append([]byte(nil), p...))
	c.mu.Unlock()
	return c.Conn.Write(p)
}
