package behaviour_test

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
	"github.com/steadymq/steadymq/internal/rig"
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
func logins() map[string]func(*rig.Rig) steadymq.Option {
	url := func(mechanism string) func(*rig.Rig) steadymq.Option {
		return func(r *rig.Rig) steadymq.Option {
			return steadymq.WithURLFunc(func(context.Context) (string, error) {
				return r.Broker.URL + "?auth_mechanism=" + mechanism, nil
			})
		}
	}
	sasl := func(mechanism amqp.Authentication) func(*rig.Rig) steadymq.Option {
		return func(*rig.Rig) steadymq.Option { return steadymq.WithSASL(mechanism) }
	}
	return map[string]func(*rig.Rig) steadymq.Option{
		"PLAIN of the URL":    url("plain"),
		"AMQPLAIN of the URL": url("amqplain"),
		"EXTERNAL of the URL": url("external"),
		"PLAIN of credentials": func(*rig.Rig) steadymq.Option {
			return steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
				return steadymq.Credentials{Username: "app", Password: rig.Password}, nil
			})
		},
		"AMQPLAIN of the driver":  sasl(&amqp.AMQPlainAuth{Username: "app", Password: rig.Password}),
		"EXTERNAL of the driver":  sasl(&amqp.ExternalAuth{}),
		"PLAIN of the user's own": sasl(mechanism{"PLAIN", func() string { return "\x00app\x00" + rig.Password }}),
	}
}

// ended waits for the end of Run and returns its error.
func ended(r *rig.Rig, limit time.Duration) error {
	r.Helper()
	r.Wait(limit)
	require.Len(r, r.Result, 1, "Run has returned")
	return r.Stop()
}

func TestRefusedLoginIsToldAtOnce(t *testing.T) {
	for name, login := range logins() {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.RefuseLogin(true)
				r.Run(rig.Ack, login(r))
				r.Wait(10 * time.Millisecond)
				var err error
				if asked := strings.HasSuffix(name, " of the URL") || strings.HasSuffix(name, " of credentials"); asked {
					require.Len(r, r.Causes(), 1, "told")
					err = ended(r, 4*time.Second) // what a function gives may be better the next time
					assert.Len(r, r.Causes(), 2, "the third ends Run")
				} else {
					err = ended(r, 0)
				}
				require.ErrorIs(r, err, steadymq.ErrLoginRefused)
				var said *amqp.Error
				require.ErrorAs(r, err, &said)
				assert.Equal(r, amqp.AccessRefused, said.Code)
				assert.True(r, said.Server)
				used, _, _ := strings.Cut(name, " ")
				assert.ErrorContains(r, err, "using authentication mechanism "+used)
				assert.ErrorContains(r, err, "open mq1.test:5672: login refused")
				assert.NotContains(r, err.Error(), rig.Password)
				assert.NotContains(r, err.Error(), "\n")
			})
		})
	}
}

func TestEveryLoginIsLetIn(t *testing.T) {
	for name, login := range logins() {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				for range 2 { // a mechanism is used for every dial
					r.Consuming(rig.Ack, login(r))
					r.Broker.Reset()
					r.Wait(time.Second)
					assert.Equal(r, steadymq.Consuming, r.Consumer.State())
					require.NoError(r, r.Stop())
				}
			})
		})
	}
}

func TestWrongPasswordIsToldAtOnceAndNotShown(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		const wrong = "wrong-" + rig.Password
		r.Run(rig.Ack, steadymq.WithSASL(&amqp.PlainAuth{Username: "app", Password: wrong}))
		err := ended(r, 10*time.Millisecond)
		assert.ErrorIs(r, err, steadymq.ErrLoginRefused)
		assert.NotContains(r, err.Error(), wrong)
		assert.NotContains(r, err.Error(), "guest", "only guest is told about guest")
	})
}

func TestSilentRefusalIsRecognisedHoweverTheSocketEnds(t *testing.T) {
	ways := map[string]steadymqtest.LoginRefusal{"RST": steadymqtest.RefusalByReset, "FIN": steadymqtest.RefusalByFIN}
	for name, how := range ways {
		for _, heartbeat := range []time.Duration{time.Second, 2 * time.Second, 10 * time.Second} {
			t.Run(name+" at "+heartbeat.String(), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.Broker.SetLoginRefusal(how)
					r.Broker.RefuseLogin(true)
					r.Run(rig.Ack, steadymq.WithHeartbeat(heartbeat))
					err := ended(r, 3*3*time.Second+2*2*time.Second)
					assert.ErrorContains(r, err, "refuses a login")
					require.Len(r, r.Causes(), 2, "the third refusal is the last")
					for _, cause := range append(r.Causes(), err) {
						assert.ErrorIs(r, cause, steadymq.ErrLoginRefused)
					}
				})
			})
		}
	}
}

func TestSilentRefusalIsRecognisedOverTLS(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.SetLoginRefusal(steadymqtest.RefusalByFIN)
		r.Broker.RefuseLogin(true)
		r.Run(rig.Ack, steadymq.WithTLSConfig(r.Broker.TLSConfig()), steadymq.WithHeartbeat(time.Second))
		assert.ErrorIs(r, ended(r, 13*time.Second+100*time.Millisecond), steadymq.ErrLoginRefused)
	}, steadymqtest.WithTLS())
}

func TestSocketLostWhileLoggingInIsNoRefusal(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DropAt(steadymqtest.StageTune, true)
		r.Run(rig.Ack)
		r.Wait(time.Minute)
		require.Empty(r, r.Result)
		assert.ErrorContains(r, r.Causes()[0], "lost while logging in")
		assert.NotErrorIs(r, r.Causes()[0], steadymq.ErrLoginRefused)
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

func TestSocketLostInTheHandshakeSaysWhere(t *testing.T) {
	for stage, where := range map[steadymqtest.Stage]string{
		steadymqtest.StageTune: "lost while logging in: ",
		steadymqtest.StageOpen: "lost while opening the virtual host: ",
	} {
		t.Run(stage.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DropAt(stage, true)
				r.Run(rig.Ack)
				r.Wait(time.Second)
				require.NotEmpty(r, r.Causes())
				assert.ErrorContains(r, r.Causes()[0], where)
			})
		})
	}
}

func TestSlowGreetingDoesNotMakeALostLoginARefusal(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DropAt(steadymqtest.StageTune, true)
		dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := r.Broker.Dialer()(ctx, network, addr)
			return slowToGreet{conn, new(sync.Once)}, err
		}
		r.Run(rig.Ack, steadymq.WithDialer(dial))
		r.Wait(time.Minute)
		require.Empty(r, r.Result)
		assert.NotErrorIs(r, r.Causes()[0], steadymq.ErrLoginRefused)
		r.Stop()
		r.Wait(5 * time.Second) // until its last read is back
	})
}

func TestMechanismTheBrokerDoesNotOfferIsARefusedLogin(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		none := func() string { return rig.Password }
		r.Run(rig.Ack, steadymq.WithSASL(mechanism{"SCRAM-SHA-256", none}, mechanism{"GSSAPI", none}))
		err := ended(r, 10*time.Millisecond)
		assert.ErrorIs(r, err, steadymq.ErrLoginRefused)
		assert.ErrorContains(r, err, `the broker offers the login mechanisms "PLAIN AMQPLAIN EXTERNAL" and none of "SCRAM-SHA-256 GSSAPI"`)
	})
}

func TestRefusedGuestIsToldOfLoopback(t *testing.T) {
	for name, auth := range map[string]amqp.Authentication{
		"PLAIN":    &amqp.PlainAuth{Username: "guest", Password: "guest"},
		"AMQPLAIN": &amqp.AMQPlainAuth{Username: "guest", Password: "guest"},
	} {
		for _, how := range []steadymqtest.LoginRefusal{steadymqtest.RefusalOfRabbitMQ, steadymqtest.RefusalByReset} {
			t.Run(name, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.Broker.SetLoginRefusal(how)
					r.Run(rig.Ack, steadymq.WithSASL(auth))
					assert.ErrorContains(r, ended(r, 13*time.Second), "lets the user guest in from its own host only")
				})
			})
		}
	}
}

func TestRefusedLoginIsAskedSlowlyAfterTheFirstSession(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.RefuseLogin(true)
		r.Broker.Reset()
		r.Wait(5 * time.Minute)
		require.Empty(r, r.Result)
		assert.Less(r, len(r.Causes()), 40, "up to 30 s apart")
		r.Broker.RefuseLogin(false)
		r.Wait(30*time.Second + 100*time.Millisecond)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	})
}

func TestLoginMechanismOfAUserThatFails(t *testing.T) {
	failures := map[string]func() string{
		"panics": func() string { panic("no token") },
		"exits":  func() string { runtime.Goexit(); return "" },
	}
	for name, fail := range failures {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Run(rig.Ack, steadymq.WithSASL(mechanism{"PLAIN", fail}))
				r.Wait(time.Second)
				require.NotEmpty(r, r.Causes())
				var panicked *steadymq.PanicError
				require.ErrorAs(r, r.Causes()[0], &panicked)
				assert.NotEmpty(r, panicked.Stack)
				assert.ErrorContains(r, r.Causes()[0], "the response of the login mechanism PLAIN")
				assert.NotErrorIs(r, r.Causes()[0], steadymq.ErrLoginRefused)
				assert.Zero(r, r.OpenConnections())
			})
		})
	}
	t.Run("hangs", func(t *testing.T) {
		rig.Bubble(t, func(r *rig.Rig) {
			release := make(chan struct{})
			r.Run(rig.Ack, steadymq.WithSetupTimeout(time.Second), steadymq.WithSASL(mechanism{"PLAIN", func() string {
				<-release
				return ""
			}}))
			r.Wait(1600 * time.Millisecond)
			require.NotEmpty(r, r.Causes())
			assert.ErrorContains(r, r.Causes()[0], "setup limit")
			r.Stop()
			assert.Zero(r, r.OpenConnections())
			close(release)
		})
	})
}

func TestWrongPasswordIsToldFromACutHandshake(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DropAt(steadymqtest.StageTune, true)
		r.Run(rig.Ack)
		r.Wait(time.Minute)
		require.Empty(r, r.Result, "a lost socket is no refusal: keep trying")
		assert.ErrorContains(r, r.Causes()[0], "lost while logging in")
		r.Broker.DropAt(steadymqtest.StageTune, false)
		r.Wait(11 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	})
}
