package behaviour_test

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
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

// A topology function that ends its goroutine (require in a test, runtime.Goexit) takes the try
// with it: within never gets its result, nobody owns the connection any more, and its guard is
// switched off by the deferred unguard. Every retry leaves one more open connection behind.
func TestTopologyThatCallsGoexitLeaksNoConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			runtime.Goexit()
			return "", nil
		}))
		r.Wait(5 * time.Second)
		require.NotEmpty(r, r.Causes(), "it is told at once")
		assert.ErrorAs(r, r.Causes()[0], new(*steadymq.PanicError))
		r.Wait(5 * time.Minute)
		assert.LessOrEqual(r, r.OpenConnections(), 1, "open connections")
		r.Stop()
		r.Wait(time.Minute)
		assert.Zero(r, r.OpenConnections(), "open connections after Run")
		r.Broker.Reset()
	})
}

// A topology function that panics is a failed try (*PanicError). The other functions of the user
// run on goroutines of the library too, where no user can recover: a panic in WithURLFunc,
// WithCredentials or WithDialer ends the process.
func TestPanicInAUsersFunctionEndsNoProcess(t *testing.T) {
	if which := os.Getenv("STEADYMQ_PANIC_IN"); which != "" {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		opt := map[string]steadymq.Option{
			"WithURLFunc":     steadymq.WithURLFunc(func(context.Context) (string, error) { panic("user") }),
			"WithCredentials": steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) { panic("user") }),
			"WithDialer":      steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { panic("user") }),
		}[which]
		c, err := steadymq.New(b.URL, "q", steadymq.WithDialer(b.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler)), opt)
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		_ = c.Run(ctx, rig.Ack)
		return
	}
	for _, which := range []string{"WithURLFunc", "WithCredentials", "WithDialer"} {
		t.Run(which, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-test.run=^TestPanicInAUsersFunctionEndsNoProcess$")
			cmd.Env = append(os.Environ(), "STEADYMQ_PANIC_IN="+which)
			out, err := cmd.CombinedOutput()
			assert.NoError(t, err, "%s", strings.SplitN(string(out), "\n", 2)[0])
		})
	}
}

// A try that is left behind (its topology function ignores the context) on the supervisor's own
// connection closes that connection once it returns: attempt.discard calls connection.close, which
// is "its owner's" and has no lock. Run with -race.
func TestLateTryDoesNotTouchTheSupervisorsConnection(t *testing.T) {
	for range 40 { // the detector sees it in two runs of five
		lateTry(t)
	}
}

func lateTry(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		var calls atomic.Int32
		r.Consuming(rig.Ack, steadymq.WithSetupTimeout(2*time.Second), steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			if calls.Add(1) == 2 {
				<-release
			}
			return rig.Queue, nil
		}))
		r.Broker.CloseChannels(406, "x timed out") // the second session is set up on the same connection
		time.Sleep(2*time.Second + 505*time.Millisecond)
		close(release)
		r.Wait(10 * time.Second)
	})
}

func TestDialerThatIgnoresItsContextIsLeftBehindAndWhatItOpensLateIsClosed(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		sockets := &rig.CountingDialer{Dial: r.Broker.Dialer()}
		var calls atomic.Int32
		r.Run(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			if calls.Add(1) == 1 {
				time.Sleep(time.Minute)
			}
			return sockets.DialContext(context.WithoutCancel(ctx), network, addr)
		}))
		r.Wait(5*time.Second + 399*time.Millisecond)
		assert.Empty(r, r.Causes(), "it has the dial limit and a moment more")
		r.Wait(5 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.ErrorContains(r, r.Causes()[0], "WithDialer")
		assert.EqualValues(r, 1, r.Consumer.Stats().Abandoned)
		r.Wait(55 * time.Second) // the broker would close an idle one 10 s after it has come
		assert.EqualValues(r, 1, sockets.Open.Load(), "open sockets")
	})
}

func TestFunctionOfTheUserThatPanicsIsAnErrorThatNamesIt(t *testing.T) {
	for name, option := range map[string]steadymq.Option{
		"WithMiddleware": steadymq.WithMiddleware(func(steadymq.Handler) steadymq.Handler { panic("user") }),
		"WithFatal":      steadymq.WithFatal(func(error) bool { panic("user") }),
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.RefuseConsume(404, "no queue 'orders' in vhost '/'")
				r.Run(rig.Ack, option)
				r.Wait(time.Minute)
				require.Len(r, r.Result, 1, "Run has returned")
				err := <-r.Result
				r.Result = nil
				assert.ErrorContains(r, err, name)
				var panicked *steadymq.PanicError
				require.ErrorAs(r, err, &panicked)
				assert.Contains(r, string(panicked.Stack), "guard_test.go")
			})
		})
	}
}

func TestMiddlewareThatMakesNoHandlerIsRefusedByRun(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithMiddleware(func(steadymq.Handler) steadymq.Handler { return nil }))
		r.Wait(time.Second)
		require.Len(r, r.Result, 1)
		var option *steadymq.OptionError
		require.ErrorAs(r, <-r.Result, &option)
		r.Result = nil
		assert.Equal(r, "WithMiddleware", option.Option)
		assert.Empty(r, r.Broker.Ledger().Dials)
	})
}

// What makes a middleware has no error to return, so the middleware says it.
func TestMiddlewareMadeWithWrongArgumentsIsRefusedByRun(t *testing.T) {
	refuse := func(name string) steadymq.Middleware {
		return func(steadymq.Handler) steadymq.Handler { panic(&steadymq.OptionError{Option: name, Reason: "no"}) }
	}
	fine := func(next steadymq.Handler) steadymq.Handler { return next }
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithMiddleware(refuse("outer"), fine, refuse("inner")))
		r.Wait(time.Second)
		require.Len(r, r.Result, 1)
		err := <-r.Result
		r.Result = nil
		require.EqualError(r, err, "steadymq: outer: no\nsteadymq: inner: no")
		require.ErrorAs(r, err, new(*steadymq.OptionError))
		assert.NotErrorAs(r, err, new(*steadymq.PanicError))
		assert.Empty(r, r.Broker.Ledger().Dials)
	})
}

func TestFunctionThatHangsEndsRunAfterTheSetupLimit(t *testing.T) {
	release := make(chan struct{})
	for name, option := range map[string]steadymq.Option{
		"WithFatal":      steadymq.WithFatal(func(error) bool { <-release; return false }),
		"WithMiddleware": steadymq.WithMiddleware(func(h steadymq.Handler) steadymq.Handler { <-release; return h }),
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				release = make(chan struct{}) // of this bubble
				r.Run(rig.Ack, option, steadymq.WithSetupTimeout(2*time.Second))
				r.Wait(time.Second)
				r.Broker.Reset()
				r.Wait(5 * time.Second)
				require.Len(r, r.Result, 1, "Run has returned")
				err := <-r.Result
				r.Result = nil
				assert.ErrorContains(r, err, name+": no answer within the setup limit (WithSetupTimeout)")
				assert.EqualValues(r, 1, r.Consumer.Stats().Abandoned)
				close(release)
			})
		})
	}
}

// nameless is a mechanism that panics before it has said a word.
type nameless struct{ amqp.ExternalAuth }

func (*nameless) Mechanism() string { panic("no name") }

// What is asked for before a login is the user's: it costs its own try, and is named.
func TestLoginThatMisbehavesCostsItsOwnTry(t *testing.T) {
	for reason, option := range map[string]func(r *rig.Rig) steadymq.Option{
		"WithCredentials: the vault is sealed": func(*rig.Rig) steadymq.Option {
			return steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
				return steadymq.Credentials{}, errors.New("the vault is sealed")
			})
		},
		"the name of a login mechanism: WithSASL": func(*rig.Rig) steadymq.Option { return steadymq.WithSASL(new(nameless)) },
		"WithTLSConfig: ": func(r *rig.Rig) steadymq.Option {
			config := r.Broker.TLSConfig()
			config.VerifyConnection = func(tls.ConnectionState) error { panic("no look") }
			return steadymq.WithTLSConfig(config)
		},
	} {
		t.Run(reason, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				opts := []steadymq.Option{steadymq.WithTLSConfig(r.Broker.TLSConfig()), option(r)}
				r.Run(rig.Ack, opts...)
				r.Wait(time.Minute)
				require.NotEmpty(r, r.Causes())
				assert.Less(r, len(r.Causes()), 60)
				var at *steadymq.SessionError
				require.ErrorAs(r, r.Causes()[0], &at)
				assert.Equal(r, "open", at.Op)
				assert.ErrorContains(r, at, reason)
				assert.Zero(r, r.OpenConnections())
			}, steadymqtest.WithTLS())
		})
	}
}

func TestUserFunctionThatIgnoresItsContextHoldsUpNothing(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		block := make(chan struct{})
		var calls atomic.Int32
		r.Run(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			if calls.Add(1) == 1 {
				<-block
			}
			return rig.Queue, nil
		}))
		r.Wait(30 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.EqualValues(r, 1, r.Consumer.Stats().Abandoned)
		close(block)
		r.Wait(10 * time.Second)
		assert.Equal(r, 1, r.OpenConnections())
	})
}

// badDeadlines is a connection of the user's whose deadlines panic from some moment on.
type badDeadlines struct {
	net.Conn
	read, write *atomic.Bool
}

func (c badDeadlines) SetReadDeadline(t time.Time) error {
	if c.read.Load() {
		panic("read deadline")
	}
	return c.Conn.SetReadDeadline(t)
}

func (c badDeadlines) SetWriteDeadline(t time.Time) error {
	if c.write.Load() {
		panic("write deadline")
	}
	return c.Conn.SetWriteDeadline(t)
}

func TestPanicInADeadlineOfAUsersConnectionEndsTheConnectionAndNoProcess(t *testing.T) {
	for _, which := range []string{"read", "write"} {
		t.Run(which, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var read, write atomic.Bool
				r.Consuming(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
					c, err := r.Broker.Dialer()(ctx, network, addr)
					return badDeadlines{c, &read, &write}, err
				}))
				read.Store(which == "read")
				write.Store(which == "write")
				r.Broker.Publish(rig.Queue, "m")
				r.Wait(30 * time.Second)
				require.NotEmpty(r, r.Causes())
				assert.ErrorContains(r, r.Causes()[0], which+" deadline")
				read.Store(false)
				write.Store(false)
				r.Wait(time.Minute)
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
			})
		})
	}
}
