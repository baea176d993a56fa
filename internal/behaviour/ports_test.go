package behaviour_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// stranger is a peer that is no broker: it reads a greeting, gives an answer and ends the socket,
// by a reset if it is to, or keeps it and says nothing more.
type stranger struct {
	answer       string
	reset, keeps bool
}

func (s stranger) dial(context.Context, string, string) (net.Conn, error) {
	near, far := net.Pipe()
	go func() {
		defer func() { _ = far.Close() }()
		_, _ = far.Read(make([]byte, 1024))
		_, _ = io.WriteString(far, s.answer)
		if s.keeps {
			_, _ = io.Copy(io.Discard, far)
		}
	}()
	if s.reset {
		return resetConn{near}, nil
	}
	return near, nil
}

// resetConn is a connection whose peer ends it by a reset.
type resetConn struct{ net.Conn }

func (c resetConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		err = &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
	}
	return n, err
}

// failures runs a consumer for a while and returns its changes to backoff.
func failures(t *testing.T, during time.Duration, url string, dial func(context.Context, string, string) (net.Conn, error), opts ...steadymq.Option) []steadymq.StateChange {
	t.Helper()
	r := &rig.Rig{T: t}
	ctx, cancel := context.WithTimeout(t.Context(), during)
	defer cancel()
	opts = append([]steadymq.Option{
		steadymq.WithDialer(dial), steadymq.WithHooks(steadymq.Hooks{StateChanged: r.Changed}), steadymq.WithLogger(slog.New(slog.DiscardHandler)),
	}, opts...)
	require.NoError(t, steadymq.Consume(ctx, url, rig.Queue, rig.Ack, opts...))
	var back []steadymq.StateChange
	for _, c := range r.Changes() {
		if c.To == steadymq.Backoff {
			back = append(back, c)
		}
	}
	require.NotEmpty(t, back)
	return back
}

func TestPortThatIsNotForAMQPIsNamed(t *testing.T) {
	ports := map[string]string{
		"15672": "HTTP (management)", "15671": "HTTPS (management)", "5552": "streams", "5551": "streams over TLS", "1883": "MQTT",
		"8883": "MQTT over TLS", "61613": "STOMP", "61614": "STOMP over TLS", "25672": "nodes of the cluster", "4369": "epmd",
	}
	peers := map[string]stranger{
		"ends":           {},
		"resets":         {reset: true},
		"is silent":      {keeps: true},
		"answers HTTP":   {answer: "HTTP/1.1 400 Bad Request\r\n\r\n"},
		"answers in TLS": {answer: "\x15\x03\x03\x00\x02\x02\x46"},
	}
	for port, use := range ports {
		for name, peer := range peers {
			for _, scheme := range []string{"amqp", "amqps"} {
				t.Run(scheme+" "+port+" "+name, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						for _, c := range failures(t, time.Minute, scheme+"://app:"+rig.Password+"@mq.test:"+port+"/", peer.dial) {
							assert.ErrorContains(t, c.Cause, "port "+port+" is RabbitMQ's port")
							assert.ErrorContains(t, c.Cause, use)
							assert.ErrorContains(t, c.Cause, "AMQP is 5672, or 5671 with TLS")
							assert.NotContains(t, c.Cause.Error(), rig.Password)
							assert.GreaterOrEqual(t, c.RetryIn, time.Second, "it is asked slowly")
						}
					})
				})
			}
		}
	}
}

func TestPortForAMQPIsNotCalledWrong(t *testing.T) {
	for name, peer := range map[string]stranger{"ends": {}, "resets": {reset: true}, "is silent": {keeps: true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				for _, c := range failures(t, time.Minute, "amqp://mq.test:5672/", peer.dial) {
					assert.NotContains(t, c.Cause.Error(), "port")
				}
			})
		})
	}
}

func TestBrokerOnAPortOfAnotherProtocolIsNotCalledWrong(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DropAt(steadymqtest.StageTune, true)
		dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
			return r.Broker.Dialer()(ctx, network, r.Broker.Host(0).Addr())
		}
		for _, c := range failures(r.T, time.Minute, "amqp://app:"+rig.Password+"@mq.test:1883/", dial) {
			assert.NotContains(r, c.Cause.Error(), "port")
		}
	})
}

func TestHostBehindAWrongPortGoesLast(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
			if addr == "mq.test:15672" {
				return stranger{}.dial(ctx, network, addr)
			}
			return r.Broker.Dialer()(ctx, network, addr)
		}
		r.Run(rig.Ack, steadymq.WithURLs("amqp://mq.test:15672/"), steadymq.WithDialer(dial))
		r.Wait(100 * time.Millisecond)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State(), "another host is tried at once")
		before := len(r.Causes())
		r.Wait(20 * time.Second)
		r.Broker.Reset()
		r.Wait(100 * time.Millisecond)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Len(r, r.Causes(), before+1, "the wrong port has no turn")
	})
}

func TestTLSAtThePortWithoutSaysSo(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
			return r.Broker.Dialer()(ctx, network, r.Broker.Host(0).Addr())
		}
		for _, c := range failures(r.T, time.Minute, "amqps://mq.test:5672/", dial, steadymq.WithTLSConfig(&tls.Config{MinVersion: tls.VersionTLS12})) {
			assert.ErrorContains(r, c.Cause, "the peer speaks AMQP without TLS; use its port for TLS (5671)")
		}
	})
}

func TestPlainAMQPAtThePortForTLSSaysSo(t *testing.T) {
	for name, peer := range map[string]stranger{
		"ends": {}, "resets": {reset: true}, "is silent": {keeps: true}, "answers in TLS": {answer: "\x15\x03\x03\x00\x02\x02\x46"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				for _, c := range failures(t, time.Minute, "amqp://mq.test:5671/", peer.dial) {
					assert.ErrorContains(t, c.Cause, "port 5671 is RabbitMQ's port for AMQP over TLS, which takes an amqps URL")
				}
			})
		})
	}
}

func TestPeerOfAnotherProtocolIsNamedAndRetried(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return impersonated(), nil }))
		r.Wait(10 * time.Second)
		require.Empty(r, r.Result)
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "amqps URL")
		assert.GreaterOrEqual(r, r.ShortestWait(), time.Second)
	})
}

func TestHostThatIsNoBrokerCostsNoTime(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		dial, wrong := r.Broker.Dialer(), r.Broker.Host(1).Addr()
		r.Consuming(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			if address == wrong {
				return impersonated(), nil
			}
			return dial(ctx, network, address)
		}))
		for n := range 20 {
			r.Wait(2 * time.Minute)
			dying := r.Broker.Host(n % 2 * 2)
			dying.Kill()
			r.Wait(time.Second)
			assert.Equal(r, steadymq.Consuming, r.Consumer.State())
			if r.Consumer.Stats().Sessions > 1 {
				assert.LessOrEqual(r, r.Outage(), 100*time.Millisecond)
			}
			dying.Restart()
		}
		assert.Greater(r, r.Consumer.Stats().Sessions, uint64(5), "it was on a host that died")
	}, steadymqtest.WithHosts(3))
}

// impersonated is a connection to a listener that wants TLS.
func impersonated() net.Conn {
	const alert = "\x15\x03\x03\x00\x02\x02\x46" // its answer to a protocol header
	near, far := net.Pipe()
	go func() {
		_, _ = far.Read(make([]byte, 8))
		_, _ = far.Write([]byte(alert))
		_ = far.Close()
	}()
	return near
}
