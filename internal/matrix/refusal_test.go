package matrix_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/internal/scenario"
)

// toldWithin bounds what is between the broker's answer to a login and Run's error.
const toldWithin = 100 * time.Millisecond

// TestRefusedByARealBroker tries to log in at the broker's own socket, with nothing in between that would make a FIN of its RST, and by the
// ways that do: a published port, and TLS.
func TestRefusedByARealBroker(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a minute")
	}
	ca := scenario.NewAuthority(t)
	shown := ca.Sign(t)
	var cfgs []rabbit.Config
	for _, g := range rabbit.Generations() {
		cfgs = append(cfgs, rabbit.Config{
			Generation: g, TLS: &shown,
			Plugins: []string{"rabbitmq_management", "rabbitmq_stream", "rabbitmq_mqtt", "rabbitmq_stomp"},
		})
	}
	brokers := rabbit.StartAll(t, cfgs...)
	for _, b := range brokers {
		rabbit.NeedCommands(t, b)
	}
	var all sync.WaitGroup
	for _, b := range brokers {
		all.Go(func() { t.Run(b.Version(), func(t *testing.T) { refusals(t, b, ca.Pool()) }) })
	}
	all.Wait()
}

func refusals(t *testing.T, b *rabbit.Broker, roots *x509.CertPool) {
	direct := directly(t, b, 5672)
	wrong := url.UserPassword("guest", "wrong-"+rig.Password)
	overTLS := steadymq.WithTLSConfig(&tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, ServerName: "127.0.0.1"})
	for name, c := range map[string]struct {
		address string
		opts    []steadymq.Option
	}{
		"PLAIN, directly":             {amqpURL("amqp", wrong, direct, ""), nil},
		"AMQPLAIN, directly":          {amqpURL("amqp", wrong, direct, "auth_mechanism=amqplain"), nil},
		"PLAIN, directly, TLS":        {amqpURL("amqps", wrong, directly(t, b, 5671), ""), []steadymq.Option{overTLS}},
		"PLAIN, a published port":     {amqpURL("amqp", wrong, b.Addr(), ""), nil},
		"PLAIN, a published TLS port": {amqpURL("amqps", wrong, b.TLSAddr(), ""), []steadymq.Option{overTLS}},
	} {
		t.Run(name, func(t *testing.T) {
			r := logIn(t, c.address, c.opts...)
			var said *amqp.Error
			require.ErrorIs(t, r.err, steadymq.ErrLoginRefused)
			require.ErrorAs(t, r.err, &said)
			assert.True(t, said.Server)
			assert.ErrorContains(t, r.err, "own host only")
			assert.NotContains(t, r.err.Error(), rig.Password)
			assert.Less(t, r.told, toldWithin)
		})
	}
	t.Run("a mechanism that is not offered", func(t *testing.T) {
		r := logIn(t, amqpURL("amqp", wrong, direct, "auth_mechanism=external"))
		require.ErrorIs(t, r.err, steadymq.ErrLoginRefused)
		assert.ErrorContains(t, r.err, "PLAIN")
		assert.Less(t, r.told, toldWithin)
	})
	t.Run("in silence", func(t *testing.T) {
		s := loginSocket{quiet: true}
		r := s.logIn(t, amqpURL("amqp", wrong, direct, ""), steadymq.WithHeartbeat(time.Second))
		require.ErrorIs(t, r.err, steadymq.ErrLoginRefused)
		assert.ErrorContains(t, r.err, "3s of silence")
		assert.True(t, r.reset, "the broker resets its socket")
		assert.EqualValues(t, 3, r.dials)
		assert.Less(t, r.told, toldWithin)
	})
	t.Run("guest from elsewhere", func(t *testing.T) {
		require.NoError(t, b.Do(t.Context(), `application:set_env(rabbit, loopback_users, [<<"guest">>])`))
		r := logIn(t, amqpURL("amqp", url.UserPassword("guest", "guest"), direct, ""))
		require.NoError(t, b.Do(t.Context(), `application:set_env(rabbit, loopback_users, [])`))
		require.ErrorIs(t, r.err, steadymq.ErrLoginRefused)
		assert.ErrorContains(t, r.err, "own host only")
	})
	for _, port := range []int{15672, 5552, 1883, 61613, 25672, 4369} {
		t.Run("port "+strconv.Itoa(port), func(t *testing.T) {
			t.Parallel()
			r := logIn(t, amqpURL("amqp", wrong, directly(t, b, port), ""), steadymq.WithFatal(func(error) bool { return true }))
			assert.ErrorContains(t, r.err, fmt.Sprintf("port %d is RabbitMQ's port", port))
		})
	}
}

func directly(t *testing.T, b *rabbit.Broker, port int) string {
	t.Helper()
	addr, err := b.Direct(t.Context(), port)
	require.NoError(t, err)
	return addr
}

func amqpURL(scheme string, user *url.Userinfo, host, query string) string {
	u := url.URL{Scheme: scheme, User: user, Host: host, Path: "/", RawQuery: query}
	return u.String()
}

// refused is how Run ended without a session.
type refused struct {
	err         error
	total, told time.Duration // since its begin, and since the broker's last sign
	reset       bool          // the socket ended by an RST
	dials       int64
}

func logIn(t *testing.T, address string, opts ...steadymq.Option) refused {
	t.Helper()
	return new(loginSocket).logIn(t, address, opts...)
}

func (s *loginSocket) logIn(t *testing.T, address string, opts ...steadymq.Option) refused {
	t.Helper()
	opts = append([]steadymq.Option{
		steadymq.WithLogger(slog.New(slog.DiscardHandler)), steadymq.WithDialer(s.dial),
	}, opts...)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	err := steadymq.Consume(ctx, address, "steadymq-nowhere", rig.Ack, opts...)
	r := refused{
		err: err, total: time.Since(began), told: time.Since(time.Unix(0, s.last.Load())),
		reset: s.reset.Load(), dials: s.dials.Load(),
	}
	t.Logf("Run returned after %v, %v after the broker's last sign, reset %t: %v", r.total, r.told, r.reset, r.err)
	require.Error(t, err)
	return r
}

// loginSocket dials, and notes when and how the broker spoke last.
type loginSocket struct {
	quiet bool // the broker does not hear that we want to be told of a refusal
	last  atomic.Int64
	reset atomic.Bool
	dials atomic.Int64
}

func (s *loginSocket) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	s.dials.Add(1)
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &loginConn{conn, s}, nil
}

type loginConn struct {
	net.Conn
	socket *loginSocket
}

func (c *loginConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 || !errors.Is(err, net.ErrClosed) {
		c.socket.last.Store(time.Now().UnixNano())
	}
	if errors.Is(err, syscall.ECONNRESET) {
		c.socket.reset.Store(true)
	}
	return n, err
}

func (c *loginConn) Write(p []byte) (int, error) {
	if c.socket.quiet {
		p = bytes.Replace(bytes.Clone(p), []byte("authentication_failure_close"), []byte("authentication_failure_quiet"), 1)
	}
	return c.Conn.Write(p)
}
