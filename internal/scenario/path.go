package scenario

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/rabbit"
)

// The way from the consumer to its broker. What the broker itself does to a connection, it also
// does to one that has nothing in between: a proxy, and a port that a container engine publishes,
// turn a RST into a FIN and answer for a broker that is not there. So whoever logs in, is refused
// or is ended by the broker does so twice: behind the proxy, which reads every ack, and directly at
// the broker's own socket.

// Directly takes the proxy away. Nobody reads the wire then: the consumer's own account of its acks
// is held against the handlers'.
func (s *Scenario) Directly() {
	s.Helper()
	if why := rabbit.NoDirectWay(s.Context(), s.Broker); why != "" {
		s.Skip(why)
	}
	require.NoError(s, s.Proxy.Close())
	s.Proxy = nil
}

// BothWays are two scenarios that suffer the same: one behind a proxy, and one that dials the
// broker itself, if that is possible.
func BothWays(t *testing.T, b *rabbit.Broker, table *Results) []*Scenario {
	t.Helper()
	both := []*Scenario{New(t, b, table)}
	if why := rabbit.NoDirectWay(t.Context(), b); why != "" {
		t.Log(why)
		return both
	}
	s := New(t, b, table)
	s.Directly()
	return append(both, s)
}

// address is the broker's URL by the way of the scenario.
func (s *Scenario) address() string {
	address := s.By(s.Broker.URL())
	if s.TLS != nil {
		address = "amqps" + strings.TrimPrefix(address, "amqp")
	}
	return address
}

// By is a URL of the broker by the way of the scenario. What a direct consumer dials does not
// depend on it.
func (s *Scenario) By(url string) string {
	if s.Proxy == nil {
		return url
	}
	return s.Proxy.URL(url)
}

func (s *Scenario) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if s.Proxy == nil {
		var err error
		if address, err = s.directAddr(ctx); err != nil {
			return nil, err
		}
	}
	return s.Sockets.Dial(ctx, network, address)
}

// directAddr is where the consumer is led, or the broker's own socket. While the broker's container
// is down its address is gone, as a name can be from the DNS.
func (s *Scenario) directAddr(ctx context.Context) (string, error) {
	if led, ok := s.elsewhere.Load().(string); ok {
		return led, nil
	}
	addr, err := s.own(ctx, s.TLS != nil)
	if err != nil {
		err = &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: s.Broker.Addr(), IsNotFound: true}}
	}
	return addr, err
}

// own is the broker's own socket, for TLS or without.
func (s *Scenario) own(ctx context.Context, overTLS bool) (string, error) {
	if overTLS {
		return s.Broker.Direct(ctx, 5671)
	}
	return s.Broker.Direct(ctx, 5672)
}

// plainDial is for the plain driver, by the way of the scenario.
func (s *Scenario) plainDial(network, address string) (net.Conn, error) {
	const limit = 2 * time.Second
	if s.Proxy == nil {
		var err error
		if address, err = s.directAddr(s.Context()); err != nil {
			return nil, err
		}
	}
	return amqp.DefaultDial(limit)(network, address)
}

// Lead sends the next dials to another address.
func (s *Scenario) Lead(addr string) {
	if s.Proxy == nil {
		s.elsewhere.Store(addr)
		return
	}
	s.Proxy.SetTarget(addr)
}

// PlainAddr is the broker's listener without TLS, for Lead.
func (s *Scenario) PlainAddr() string { return s.listener(s.Broker.Addr(), false) }

// TLSAddr is the broker's listener for TLS, for Lead.
func (s *Scenario) TLSAddr() string { return s.listener(s.Broker.TLSAddr(), true) }

func (s *Scenario) listener(published string, overTLS bool) string {
	if s.Proxy != nil {
		return published
	}
	addr, err := s.own(s.Context(), overTLS)
	require.NoError(s, err)
	return addr
}

// Cut ends the connection, if there is one at the moment, without a word: by a RST of the proxy, or
// of the broker.
func (s *Scenario) Cut() {
	s.Helper()
	if s.Proxy == nil {
		s.aborted()
		return
	}
	s.Proxy.Reset()
}

// Abort has the broker end the connection without a word.
func (s *Scenario) Abort() {
	s.Helper()
	require.Equal(s, "1", s.aborted(), "connections of the consumer")
}

func (s *Scenario) aborted() (connections string) {
	s.Helper()
	n, err := s.Broker.AbortNamed(s.Context(), s.Queue)
	require.NoError(s, err)
	return n
}

// abandon ends the connection from our side.
func (s *Scenario) abandon() {
	if s.Proxy != nil {
		s.Proxy.Reset()
		return
	}
	s.Sockets.close()
}
