package steadymqtest_test

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq/internal/rabbit"
)

// refusedLogins are told to clients that ask for it. The end of the socket is seen without a proxy only, so it is compared with a broker that
// has an address of its own.
var refusedLogins = []scenario{
	{name: "refused login told", arrange: asItIs, script: func(s *script) {
		for _, auth := range []amqp.Authentication{
			&amqp.PlainAuth{Username: "guest", Password: "wrong"}, &amqp.PlainAuth{Username: "nobody", Password: "guest"},
			&amqp.AMQPlainAuth{Username: "guest", Password: "wrong"},
		} {
			s.logIn(func(properties amqp.Table) amqp.Authentication { return asksToBeTold{auth, properties} })
		}
	}},
	{name: "refused login not told", arrange: asItIs, script: func(s *script) {
		for _, auth := range []amqp.Authentication{
			&amqp.PlainAuth{Username: "guest", Password: "wrong"}, &amqp.AMQPlainAuth{Username: "guest", Password: "wrong"},
		} {
			s.logIn(func(amqp.Table) amqp.Authentication { return auth })
		}
	}},
}

func asItIs(context.Context, *rabbit.Broker) error { return nil }

// asksToBeTold adds its capability at the moment between the driver's own and the end of the frame.
type asksToBeTold struct {
	amqp.Authentication
	properties amqp.Table
}

func (a asksToBeTold) Response() string {
	a.properties["capabilities"].(amqp.Table)["authentication_failure_close"] = true
	return a.Authentication.Response()
}

// logIn writes down how a login ends, and its socket.
func (s *script) logIn(auth func(properties amqp.Table) amqp.Authentication) {
	properties := amqp.NewConnectionProperties()
	a := auth(properties)
	end := &endOfSocket{}
	start := time.Now()
	_, err := amqp.DialConfig(s.url, amqp.Config{
		SASL: []amqp.Authentication{a}, Properties: properties, Locale: "en_US",
		Dial: func(network, addr string) (net.Conn, error) {
			nc, err := s.net(network, addr)
			end.Conn = nc
			return end, err
		},
	})
	s.fails(a.Mechanism(), err)
	s.note("after %.0f s, reset by the broker %t", time.Since(start).Seconds(), end.reset.Load())
}

// endOfSocket notes whether the other side ended it by a reset.
type endOfSocket struct {
	net.Conn
	reset atomic.Bool
}

func (c *endOfSocket) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if errors.Is(err, syscall.ECONNRESET) {
		c.reset.Store(true)
	}
	return n, err
}

// directly dials a broker at its own address, where it has one.
func directly(ctx context.Context, b *rabbit.Broker) func(network, addr string) (net.Conn, error) {
	own, err := b.Direct(ctx, 5672)
	if err != nil {
		return net.Dial
	}
	return func(network, addr string) (net.Conn, error) {
		if addr == b.Addr() {
			addr = own
		}
		return net.Dial(network, addr)
	}
}
