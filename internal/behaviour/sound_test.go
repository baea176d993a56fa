package behaviour_test

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
	"github.com/steadymq/steadymq/internal/rig"
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
			"WithTopology":    steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return rig.Queue, fail() }),
			"WithURLFunc":     steadymq.WithURLFunc(func(context.Context) (string, error) { return "", fail() }),
			"WithCredentials": steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) { return steadymq.Credentials{}, fail() }),
			"WithDialer":      steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return nil, fail() }),
		} {
			t.Run(where+", "+name, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.Run(rig.Ack, option)
					r.Wait(time.Minute)
					require.Greater(r, len(r.Causes()), 1, "it goes on")
					var panicked *steadymq.PanicError
					require.ErrorAs(r, r.Causes()[0], &panicked)
					assert.NotEmpty(r, panicked.Stack)
					assert.ErrorContains(r, r.Causes()[0], where)
					assert.ErrorContains(r, r.Causes()[0], "panics when it is read; is it a nil pointer")
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
				rig.Bubble(t, func(r *rig.Rig) {
					var told []error
					r.Consuming(h, steadymq.WithHooks(steadymq.Hooks{
						HandlerFailed: func(_ *steadymq.Delivery, err error) { told = append(told, err) },
					}))
					r.Broker.Publish(rig.Queue, "tea")
					r.Wait(10 * time.Second)
					require.Greater(r, len(told), 1, "the message comes again")
					require.ErrorAs(r, told[0], new(*steadymq.PanicError))
					assert.ErrorContains(r, told[0], "panics when it is read")
					assert.NotEmpty(r, r.Log.Lines("handler panicked"))

					o, err := steadymq.Invoke(r.Context(), h, steadymq.NewDelivery(amqp.Delivery{}))
					assert.Equal(r, steadymq.Requeued, o)
					assert.ErrorAs(r, err, new(*steadymq.PanicError))
				})
			})
		}
	}
}

// A message that is to be dropped must not come back for ever.
func TestOutcomeStaysThoughTheErrorInItCannotBeRead(t *testing.T) {
	for name, broken := range brokenErrors() {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.Discard(broken) })
				r.Broker.Publish(rig.Queue, "tea")
				r.Wait(time.Second)
				assert.EqualValues(r, 1, r.Consumer.Stats().Discarded)
				assert.EqualValues(r, 1, r.Consumer.Stats().Failed)
			})
		})
	}
}

func TestCauseOfRunsContextThatCannotBeReadEndsNoProcess(t *testing.T) {
	for name, broken := range brokenErrors() {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				ctx, stop := context.WithCancelCause(r.Context())
				ended := make(chan error, 1)
				c := r.New(steadymq.WithTopology(func(ctx context.Context, _ *amqp.Channel) (string, error) {
					<-ctx.Done()
					time.Sleep(50 * time.Millisecond) // the connection has ended for that cause
					return "", errAway
				}))
				go func() { ended <- c.Run(ctx, rig.Ack) }()
				r.Wait(time.Second)
				stop(broken)
				assert.NoError(r, <-ended)
			})
		})
	}
}

func TestDialerThatReturnsNoConnectionIsAFailureThatSaysSo(t *testing.T) {
	for name, conn := range map[string]net.Conn{"nil": nil, "a nil pointer": (*net.TCPConn)(nil)} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Run(rig.Ack, steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return conn, nil }))
				r.Wait(time.Minute)
				require.Greater(r, len(r.Causes()), 1)
				assert.ErrorContains(r, r.Causes()[0], "WithDialer: the function returned neither a connection nor an error")
			})
		})
	}
}

func TestConnectionThatComesWithAnErrorIsClosed(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		sockets := &rig.CountingDialer{Dial: r.Broker.Dialer()}
		r.Run(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, _ := sockets.DialContext(ctx, network, address)
			var err *net.OpError
			return conn, err
		}))
		r.Wait(time.Minute)
		assert.Zero(r, sockets.Open.Load())
	})
}

func TestNewRefusesANilPointerForALoginMechanism(t *testing.T) {
	_, err := steadymq.New("amqp://h/", rig.Queue, steadymq.WithSASL((*amqp.PlainAuth)(nil)))
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
				rig.Bubble(t, func(r *rig.Rig) {
					dials := 0
					r.Run(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
						dials++
						conn, err := r.Broker.Dialer()(ctx, network, address)
						if dials > 1 || err != nil {
							return conn, err
						}
						c := &brittle{conn, func() {}, func() {}, func() {}}
						map[string]func(){"Read": func() { c.read = fault }, "Write": func() { c.write = fault }, "Close": func() { c.shut = fault }}[where]()
						return c, nil
					}))
					r.Wait(5 * time.Second)
					r.Broker.Reset()
					r.Wait(time.Minute)
					assert.Equal(r, steadymq.Consuming, r.Consumer.State())
					assert.GreaterOrEqual(r, dials, 2)
					if where != "Close" {
						assert.ErrorAs(r, r.Causes()[0], new(*steadymq.PanicError))
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
				rig.Bubble(t, func(r *rig.Rig) {
					sockets := &rig.CountingDialer{Dial: r.Broker.Dialer()}
					config := r.Broker.TLSConfig()
					plant(config)
					r.Run(rig.Ack, steadymq.WithDialer(sockets.DialContext), steadymq.WithTLSConfig(config))
					r.Wait(5 * time.Minute)
					require.Greater(r, len(r.Causes()), 1, "it goes on")
					var panicked *steadymq.PanicError
					require.ErrorAs(r, r.Causes()[0], &panicked)
					assert.ErrorContains(r, r.Causes()[0], "TLS")
					assert.LessOrEqual(r, sockets.Open.Load(), int64(1))
					r.Stop()
					assert.Zero(r, sockets.Open.Load(), "open sockets after Run")
				}, steadymqtest.WithTLS())
			})
		}
	}
}

func TestTLSCallbackThatHangsIsLeftBehindAndCounted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		var calls atomic.Int32 // no sync.Once: a second try that waited for its mutex would stop the clock
		hang := func() {
			if calls.Add(1) == 1 {
				<-release
			}
		}
		config := r.Broker.TLSConfig()
		config.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { hang(); return nil }
		r.Run(rig.Ack, steadymq.WithTLSConfig(config), steadymq.WithSetupTimeout(2*time.Second))
		r.Wait(2*time.Second + 450*time.Millisecond)
		assert.EqualValues(r, 1, r.Consumer.Stats().Abandoned)
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "WithTLSConfig")
		close(release)
		r.Wait(time.Minute)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	}, steadymqtest.WithTLS())
}
