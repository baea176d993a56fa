package steadymq_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io/fs"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// brokenErrors cannot be read without a panic. The first is the trap of `var err *fs.PathError; return err`.
func brokenErrors() map[string]error {
	return map[string]error{
		"a nil pointer":                    (*fs.PathError)(nil),
		"a nil pointer of the net":         (*net.OpError)(nil),
		"a wrapped nil pointer":            fmt.Errorf("away: %w", (*fs.PathError)(nil)),
		"a nil pointer beside another one": fmt.Errorf("%w, %w", errAway, (*fs.PathError)(nil)),
		"an empty error of the system":     fmt.Errorf("away: %w", &os.SyscallError{Syscall: "read"}),
		"one that panics with itself":      selfish{},
		"one whose Is panics":              picky{},
		"one that wraps itself":            circular{},
		"a nil pointer without any Unwrap": (*nilError)(nil),
	}
}

type selfish struct{}

func (s selfish) Error() string { panic(s) }

type picky struct{}

func (picky) Error() string { return "picky" }
func (picky) Is(error) bool { panic("user") }

type circular struct{}

func (circular) Error() string   { return "circular" }
func (c circular) Unwrap() error { return c }

func TestErrorThatCannotBeReadIsAFailureThatSaysSo(t *testing.T) {
	for name, broken := range brokenErrors() {
		fail := func() error { return broken }
		for where, option := range map[string]steadymq.Option{
			"WithTopology":    steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return queue, fail() }),
			"WithURLFunc":     steadymq.WithURLFunc(func(context.Context) (string, error) { return "", fail() }),
			"WithCredentials": steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) { return steadymq.Credentials{}, fail() }),
			"WithDialer":      steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return nil, fail() }),
		} {
			t.Run(where+", "+name, func(t *testing.T) {
				bubble(t, func(b *bench) {
					b.run(ack, option)
					b.wait(time.Minute)
					require.Greater(b, len(b.causes()), 1, "it goes on")
					var panicked *steadymq.PanicError
					require.ErrorAs(b, b.causes()[0], &panicked)
					assert.NotEmpty(b, panicked.Stack)
					assert.ErrorContains(b, b.causes()[0], where)
					assert.ErrorContains(b, b.causes()[0], "panics when it is read; is it a nil pointer")
				})
			})
		}
	}
}

func TestErrorOfAHandlerThatCannotBeReadIsAFailure(t *testing.T) {
	for name, broken := range brokenErrors() {
		for how, h := range map[string]steadymq.Handler{
			"returned":      func(context.Context, *steadymq.Delivery) error { return broken },
			"panicked with": func(context.Context, *steadymq.Delivery) error { panic(broken) },
		} {
			t.Run(how+" "+name, func(t *testing.T) {
				bubble(t, func(b *bench) {
					var told []error
					b.consuming(h, steadymq.WithHooks(steadymq.Hooks{
						HandlerFailed: func(_ *steadymq.Delivery, err error) { told = append(told, err) },
					}))
					b.broker.Publish(queue, "tea")
					b.wait(10 * time.Second)
					require.Greater(b, len(told), 1, "the message comes again")
					require.ErrorAs(b, told[0], new(*steadymq.PanicError))
					assert.ErrorContains(b, told[0], "panics when it is read")
					assert.NotEmpty(b, b.log.lines("handler panicked"))

					o, err := steadymq.Invoke(b.Context(), h, steadymq.NewDelivery(amqp.Delivery{}))
					assert.Equal(b, steadymq.Requeued, o)
					assert.ErrorAs(b, err, new(*steadymq.PanicError))
				})
			})
		}
	}
}

// A message that is to be dropped must not come back for ever.
func TestOutcomeStaysThoughTheErrorInItCannotBeRead(t *testing.T) {
	for name, broken := range brokenErrors() {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.Discard(broken) })
				b.broker.Publish(queue, "tea")
				b.wait(time.Second)
				assert.EqualValues(b, 1, b.consumer.Stats().Discarded)
				assert.EqualValues(b, 1, b.consumer.Stats().Failed)
			})
		})
	}
}

func TestCauseOfRunsContextThatCannotBeReadEndsNoProcess(t *testing.T) {
	for name, broken := range brokenErrors() {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				ctx, stop := context.WithCancelCause(b.Context())
				ended := make(chan error, 1)
				c := b.make(steadymq.WithTopology(func(ctx context.Context, _ *amqp.Channel) (string, error) {
					<-ctx.Done()
					time.Sleep(50 * time.Millisecond) // the connection has ended for that cause
					return "", errAway
				}))
				go func() { ended <- c.Run(ctx, ack) }()
				b.wait(time.Second)
				stop(broken)
				assert.NoError(b, <-ended)
			})
		})
	}
}

func TestDialerThatReturnsNoConnectionIsAFailureThatSaysSo(t *testing.T) {
	for name, conn := range map[string]net.Conn{"nil": nil, "a nil pointer": (*net.TCPConn)(nil)} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.run(ack, steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return conn, nil }))
				b.wait(time.Minute)
				require.Greater(b, len(b.causes()), 1)
				assert.ErrorContains(b, b.causes()[0], "WithDialer: the function returned neither a connection nor an error")
			})
		})
	}
}

func TestConnectionThatComesWithAnErrorIsClosed(t *testing.T) {
	bubble(t, func(b *bench) {
		sockets := &countingDialer{dial: b.broker.Dialer()}
		b.run(ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, _ := sockets.DialContext(ctx, network, address)
			var err *net.OpError
			return conn, err
		}))
		b.wait(time.Minute)
		assert.Zero(b, sockets.open.Load())
	})
}

func TestNewRefusesANilPointerForALoginMechanism(t *testing.T) {
	_, err := steadymq.New("amqp://h/", queue, steadymq.WithSASL((*amqp.PlainAuth)(nil)))
	var refused *steadymq.OptionError
	require.ErrorAs(t, err, &refused)
	assert.Equal(t, "WithSASL", refused.Option)
}

// Functions of a connection.

// brittle is a connection whose methods do what a user's may.
type brittle struct {
	net.Conn
	read, write, shut func()
}

func (c *brittle) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.read()
	return n, err
}

func (c *brittle) Write(p []byte) (int, error) { c.write(); return c.Conn.Write(p) }
func (c *brittle) Close() error                { defer c.shut(); return c.Conn.Close() }

func TestConnectionThatPanicsIsReplaced(t *testing.T) {
	for what, fault := range map[string]func(){"panic": func() { panic("user") }, "exit": runtime.Goexit} {
		for _, where := range []string{"Read", "Write", "Close"} {
			if where+what == "Closeexit" {
				continue
			}
			t.Run(where+", "+what, func(t *testing.T) {
				bubble(t, func(b *bench) {
					dials := 0
					b.run(ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
						dials++
						conn, err := b.broker.Dialer()(ctx, network, address)
						if dials > 1 || err != nil {
							return conn, err
						}
						c := &brittle{conn, func() {}, func() {}, func() {}}
						map[string]func(){"Read": func() { c.read = fault }, "Write": func() { c.write = fault }, "Close": func() { c.shut = fault }}[where]()
						return c, nil
					}))
					b.wait(5 * time.Second)
					b.broker.Reset()
					b.wait(time.Minute)
					assert.Equal(b, steadymq.Consuming, b.consumer.State())
					assert.GreaterOrEqual(b, dials, 2)
					if where != "Close" {
						assert.ErrorAs(b, b.causes()[0], new(*steadymq.PanicError))
					}
				})
			})
		}
	}
}

// TLS callbacks run in the handshake, and later while the driver reads.

// sessions is a cache that is asked in the handshake, and told after it.
type sessions struct{ put func() }

func (sessions) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (s sessions) Put(string, *tls.ClientSessionState)      { s.put() }

func TestTLSCallbackThatFailsLeavesNoSocket(t *testing.T) {
	for what, fault := range map[string]func(){"panics": func() { panic("user") }, "exits": runtime.Goexit} {
		for where, plant := range map[string]func(*tls.Config){
			"in the handshake": func(c *tls.Config) {
				c.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { fault(); return nil }
			},
			"later": func(c *tls.Config) { c.ClientSessionCache = sessions{fault} },
		} {
			t.Run(what+" "+where, func(t *testing.T) {
				bubble(t, func(b *bench) {
					sockets := &countingDialer{dial: b.broker.Dialer()}
					config := b.broker.TLSConfig()
					plant(config)
					b.run(ack, steadymq.WithDialer(sockets.DialContext), steadymq.WithTLSConfig(config))
					b.wait(5 * time.Minute)
					require.Greater(b, len(b.causes()), 1, "it goes on")
					var panicked *steadymq.PanicError
					require.ErrorAs(b, b.causes()[0], &panicked)
					assert.ErrorContains(b, b.causes()[0], "TLS")
					assert.LessOrEqual(b, sockets.open.Load(), int64(1))
					b.stop()
					assert.Zero(b, sockets.open.Load(), "open sockets after Run")
				}, steadymqtest.WithTLS())
			})
		}
	}
}

func TestTLSCallbackThatHangsIsLeftBehindAndCounted(t *testing.T) {
	bubble(t, func(b *bench) {
		release := make(chan struct{})
		var calls atomic.Int32 // no sync.Once: a second try that waited for its mutex would stop the clock
		hang := func() {
			if calls.Add(1) == 1 {
				<-release
			}
		}
		config := b.broker.TLSConfig()
		config.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { hang(); return nil }
		b.run(ack, steadymq.WithTLSConfig(config), steadymq.WithSetupTimeout(2*time.Second))
		b.wait(2*time.Second + 450*time.Millisecond)
		assert.EqualValues(b, 1, b.consumer.Stats().Abandoned)
		require.NotEmpty(b, b.causes())
		assert.ErrorContains(b, b.causes()[0], "WithTLSConfig")
		close(release)
		b.wait(time.Minute)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
	}, steadymqtest.WithTLS())
}
