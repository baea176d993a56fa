package steadymq_test

import (
	"context"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// mechanism is one of the user's own.
type mechanism struct {
	name     string
	response func() string
}

func (m mechanism) Mechanism() string { return m.name }
func (m mechanism) Response() string  { return m.response() }

// logins are the ways to name a mechanism, by its name.
func logins() map[string]func(*bench) steadymq.Option {
	url := func(mechanism string) func(*bench) steadymq.Option {
		return func(b *bench) steadymq.Option {
			return steadymq.WithURLFunc(func(context.Context) (string, error) {
				return b.broker.URL + "?auth_mechanism=" + mechanism, nil
			})
		}
	}
	sasl := func(mechanism amqp.Authentication) func(*bench) steadymq.Option {
		return func(*bench) steadymq.Option { return steadymq.WithSASL(mechanism) }
	}
	return map[string]func(*bench) steadymq.Option{
		"PLAIN of the URL":    url("plain"),
		"AMQPLAIN of the URL": url("amqplain"),
		"EXTERNAL of the URL": url("external"),
		"PLAIN of credentials": func(*bench) steadymq.Option {
			return steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
				return steadymq.Credentials{Username: "app", Password: password}, nil
			})
		},
		"AMQPLAIN of the driver":  sasl(&amqp.AMQPlainAuth{Username: "app", Password: password}),
		"EXTERNAL of the driver":  sasl(&amqp.ExternalAuth{}),
		"PLAIN of the user's own": sasl(mechanism{"PLAIN", func() string { return "\x00app\x00" + password }}),
	}
}

// ended waits for the end of Run and returns its error.
func (b *bench) ended(limit time.Duration) error {
	b.Helper()
	b.wait(limit)
	require.Len(b, b.result, 1, "Run has returned")
	return b.stop()
}

func TestRefusedLoginIsToldAtOnce(t *testing.T) {
	for name, login := range logins() {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.RefuseLogin(true)
				b.run(ack, login(b))
				b.wait(10 * time.Millisecond)
				var err error
				if asked := strings.HasSuffix(name, " of the URL") || strings.HasSuffix(name, " of credentials"); asked {
					require.Len(b, b.causes(), 1, "told")
					err = b.ended(4 * time.Second) // what a function gives may be better the next time
					assert.Len(b, b.causes(), 2, "the third ends Run")
				} else {
					err = b.ended(0)
				}
				require.ErrorIs(b, err, steadymq.ErrLoginRefused)
				var said *amqp.Error
				require.ErrorAs(b, err, &said)
				assert.Equal(b, amqp.AccessRefused, said.Code)
				assert.True(b, said.Server)
				used, _, _ := strings.Cut(name, " ")
				assert.ErrorContains(b, err, "using authentication mechanism "+used)
				assert.ErrorContains(b, err, "open mq1.test:5672: login refused")
				assert.NotContains(b, err.Error(), password)
				assert.NotContains(b, err.Error(), "\n")
			})
		})
	}
}

func TestEveryLoginIsLetIn(t *testing.T) {
	for name, login := range logins() {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				for range 2 { // a mechanism is used for every dial
					b.consuming(ack, login(b))
					b.broker.Reset()
					b.wait(time.Second)
					assert.Equal(b, steadymq.Consuming, b.consumer.State())
					require.NoError(b, b.stop())
				}
			})
		})
	}
}

func TestWrongPasswordIsToldAtOnceAndNotShown(t *testing.T) {
	bubble(t, func(b *bench) {
		const wrong = "wrong-" + password
		b.run(ack, steadymq.WithSASL(&amqp.PlainAuth{Username: "app", Password: wrong}))
		err := b.ended(10 * time.Millisecond)
		assert.ErrorIs(b, err, steadymq.ErrLoginRefused)
		assert.NotContains(b, err.Error(), wrong)
		assert.NotContains(b, err.Error(), "guest", "only guest is told about guest")
	})
}

func TestSilentRefusalIsRecognisedHoweverTheSocketEnds(t *testing.T) {
	ways := map[string]steadymqtest.LoginRefusal{"RST": steadymqtest.RefusalByReset, "FIN": steadymqtest.RefusalByFIN}
	for name, how := range ways {
		for _, heartbeat := range []time.Duration{time.Second, 2 * time.Second, 10 * time.Second} {
			t.Run(name+" at "+heartbeat.String(), func(t *testing.T) {
				bubble(t, func(b *bench) {
					b.broker.SetLoginRefusal(how)
					b.broker.RefuseLogin(true)
					b.run(ack, steadymq.WithHeartbeat(heartbeat))
					err := b.ended(3*3*time.Second + 2*2*time.Second)
					assert.ErrorContains(b, err, "refuses a login")
					require.Len(b, b.causes(), 2, "the third refusal is the last")
					for _, cause := range append(b.causes(), err) {
						assert.ErrorIs(b, cause, steadymq.ErrLoginRefused)
					}
				})
			})
		}
	}
}

func TestSilentRefusalIsRecognisedOverTLS(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.SetLoginRefusal(steadymqtest.RefusalByFIN)
		b.broker.RefuseLogin(true)
		b.run(ack, steadymq.WithTLSConfig(b.broker.TLSConfig()), steadymq.WithHeartbeat(time.Second))
		assert.ErrorIs(b, b.ended(13*time.Second+100*time.Millisecond), steadymq.ErrLoginRefused)
	}, steadymqtest.WithTLS())
}

func TestSocketLostWhileLoggingInIsNoRefusal(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DropAt(steadymqtest.StageTune, true)
		b.run(ack)
		b.wait(time.Minute)
		require.Empty(b, b.result)
		assert.ErrorContains(b, b.causes()[0], "lost while logging in")
		assert.NotErrorIs(b, b.causes()[0], steadymq.ErrLoginRefused)
	})
}

// slowToGreet is a connection whose first bytes come late.
type slowToGreet struct {
	net.Conn
	first *sync.Once
}

func (c slowToGreet) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.first.Do(func() { time.Sleep(5 * time.Second) })
	return n, err
}

func TestSlowGreetingDoesNotMakeALostLoginARefusal(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DropAt(steadymqtest.StageTune, true)
		dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := b.broker.Dialer()(ctx, network, addr)
			return slowToGreet{conn, new(sync.Once)}, err
		}
		b.run(ack, steadymq.WithDialer(dial))
		b.wait(time.Minute)
		require.Empty(b, b.result)
		assert.NotErrorIs(b, b.causes()[0], steadymq.ErrLoginRefused)
		b.stop()
		b.wait(5 * time.Second) // until its last read is back
	})
}

func TestMechanismTheBrokerDoesNotOfferIsARefusedLogin(t *testing.T) {
	bubble(t, func(b *bench) {
		none := func() string { return password }
		b.run(ack, steadymq.WithSASL(mechanism{"SCRAM-SHA-256", none}, mechanism{"GSSAPI", none}))
		err := b.ended(10 * time.Millisecond)
		assert.ErrorIs(b, err, steadymq.ErrLoginRefused)
		assert.ErrorContains(b, err, `the broker offers the login mechanisms "PLAIN AMQPLAIN EXTERNAL" and none of "SCRAM-SHA-256 GSSAPI"`)
	})
}

func TestRefusedGuestIsToldOfLoopback(t *testing.T) {
	for name, auth := range map[string]amqp.Authentication{
		"PLAIN":    &amqp.PlainAuth{Username: "guest", Password: "guest"},
		"AMQPLAIN": &amqp.AMQPlainAuth{Username: "guest", Password: "guest"},
	} {
		for _, how := range []steadymqtest.LoginRefusal{steadymqtest.RefusalOfRabbitMQ, steadymqtest.RefusalByReset} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(b *bench) {
					b.broker.SetLoginRefusal(how)
					b.run(ack, steadymq.WithSASL(auth))
					assert.ErrorContains(b, b.ended(13*time.Second), "lets the user guest in from its own host only")
				})
			})
		}
	}
}

func TestRefusedLoginIsAskedSlowlyAfterTheFirstSession(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.broker.RefuseLogin(true)
		b.broker.Reset()
		b.wait(5 * time.Minute)
		require.Empty(b, b.result)
		assert.Less(b, len(b.causes()), 40, "up to 30 s apart")
		b.broker.RefuseLogin(false)
		b.wait(30*time.Second + 100*time.Millisecond)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
	})
}

func TestLoginMechanismOfAUserThatFails(t *testing.T) {
	failures := map[string]func() string{
		"panics": func() string { panic("no token") },
		"exits":  func() string { runtime.Goexit(); return "" },
	}
	for name, fail := range failures {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.run(ack, steadymq.WithSASL(mechanism{"PLAIN", fail}))
				b.wait(time.Second)
				require.NotEmpty(b, b.causes())
				var panicked *steadymq.PanicError
				require.ErrorAs(b, b.causes()[0], &panicked)
				assert.NotEmpty(b, panicked.Stack)
				assert.ErrorContains(b, b.causes()[0], "the response of the login mechanism PLAIN")
				assert.NotErrorIs(b, b.causes()[0], steadymq.ErrLoginRefused)
				assert.Zero(b, b.open())
			})
		})
	}
	t.Run("hangs", func(t *testing.T) {
		bubble(t, func(b *bench) {
			release := make(chan struct{})
			b.run(ack, steadymq.WithSetupTimeout(time.Second), steadymq.WithSASL(mechanism{"PLAIN", func() string {
				<-release
				return ""
			}}))
			b.wait(1600 * time.Millisecond)
			require.NotEmpty(b, b.causes())
			assert.ErrorContains(b, b.causes()[0], "setup limit")
			b.stop()
			assert.Zero(b, b.open())
			close(release)
		})
	})
}
