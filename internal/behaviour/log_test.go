package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// flap resets the connection again and again for an hour.
func flap(r *rig.Rig, every time.Duration) {
	for end := time.Now().Add(time.Hour); time.Now().Before(end); {
		r.Wait(every)
		r.Broker.Reset()
	}
}

// comeAndGo has a session and an outage, one after the other, for an hour.
func comeAndGo(r *rig.Rig, up, down time.Duration) {
	for end := time.Now().Add(time.Hour); time.Now().Before(end); {
		r.Wait(up)
		r.Broker.Refuse(true)
		r.Broker.Reset()
		r.Wait(down)
		r.Broker.Refuse(false)
	}
}

func TestHourOfOutageIsAtMost100Lines(t *testing.T) {
	const most = 100
	outages := map[string]func(r *rig.Rig){
		"dials are refused": func(r *rig.Rig) {
			r.Broker.Refuse(true)
			r.Broker.Reset()
			r.Wait(time.Hour)
			last := r.Log.Last("level=WARN", "backoff", "repeated=")
			assert.Contains(r, last, `cause="dial: connection refused"`)
			r.Broker.Refuse(false)
			r.Wait(2 * time.Second)
			assert.Contains(r, r.Log.Last(), "consuming", "that it is well again is told at once")
		},
		"logins are refused": func(r *rig.Rig) {
			r.Broker.RefuseLogin(true)
			r.Broker.Reset()
			r.Wait(time.Hour)
			assert.Contains(r, r.Log.Last("level=WARN"), "login refused")
		},
		"the queue is absent": func(r *rig.Rig) {
			r.Broker.DeleteQueue(rig.Queue)
			r.Wait(time.Hour)
			assert.Contains(r, r.Log.Last("level=WARN"), "404 NOT_FOUND - no queue")
		},
		"sessions last a second": func(r *rig.Rig) { flap(r, time.Second) },
		"sessions last 11 s":     func(r *rig.Rig) { flap(r, 11*time.Second) },
		"sessions last 61 s":     func(r *rig.Rig) { flap(r, 61*time.Second) },
		"sessions last 89 s":     func(r *rig.Rig) { flap(r, 89*time.Second) },
		"sessions last 91 s":     func(r *rig.Rig) { flap(r, 91*time.Second) },
		"sessions and outages":   func(r *rig.Rig) { comeAndGo(r, 11*time.Second, 12*time.Second) },
		"long ones": func(r *rig.Rig) {
			comeAndGo(r, 100*time.Second, 30*time.Second)
			assert.Regexp(r, `repeated=\d\d`, r.Log.Last("backoff", "lost:"), "counting goes on")
		},
	}
	for name, outage := range outages {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack)
				r.Wait(2 * time.Minute)
				before := len(r.Log.Lines())
				outage(r)
				lines := r.Log.Lines()[before:]
				assert.LessOrEqual(r, len(lines), most)
				assert.Greater(r, len(lines), 30, "at least one a minute, or two")
				for _, line := range lines {
					assert.Contains(r, line, "queue=orders")
				}
				for _, line := range r.Log.Lines("consuming") {
					assert.Contains(r, line, "consumer=steadymq-")
				}
			})
		})
	}
}

func TestHourOfCausesThatAreAllDifferentIsAtMost100Lines(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		tries := 0
		r.Run(rig.Ack, steadymq.WithURLFunc(func(context.Context) (string, error) {
			tries++
			return "", fmt.Errorf("vault: request %s", strings.Repeat("x", tries%2000))
		}))
		r.Wait(time.Hour)
		assert.LessOrEqual(r, len(r.Log.Lines()), 100)
		assert.Less(r, len(r.Log.Last()), 1000, "the text is bounded")
	})
}

// The same failure on two hosts is one row, or every change of the host would start the counting
// anew.
func TestFailureOnTwoHostsIsOneCause(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.Refuse(true)
		r.Broker.Reset()
		r.Wait(time.Hour)
		assert.LessOrEqual(r, len(r.Log.Lines()), 100)
		mq1, mq2 := r.Log.Lines("dial", "host=mq1.test"), r.Log.Lines("dial", "host=mq2.test")
		assert.NotEmpty(r, mq1)
		assert.NotEmpty(r, mq2)
		refused := 0
		for _, err := range r.Causes() {
			if strings.Contains(err.Error(), "refused") {
				refused++
			}
		}
		r.Wait(time.Minute + time.Second)
		var told int
		_, text, _ := strings.Cut(r.Log.Last("repeated="), "repeated=")
		_, err := fmt.Sscan(text, &told)
		require.NoError(r, err)
		assert.GreaterOrEqual(r, told, refused)
	}, steadymqtest.WithHosts(2))
}

// A failed handler.

func TestHandlersErrorIsToldWithItsMessage(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareExchange("shop", "topic")
		r.Broker.Bind(rig.Queue, "shop", "#")
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			switch {
			case d.Redelivered:
				return nil
			case string(d.Body) == "poison":
				return steadymq.Discard(errors.New("not a\nnumber"))
			case string(d.Body) == "done":
				_ = d.Ack()
			}
			return errors.New("database is away")
		})
		r.Broker.PublishExchange("shop", "order.new", steadymqtest.Message{Body: []byte("tea")})
		r.Wait(3 * time.Second)
		line := r.Log.Last("level=WARN")
		for _, text := range []string{
			`"steadymq: handler failed"`, "queue=orders", "consumer=steadymq-", "session=1", "exchange=shop", "routing_key=order.new",
			"delivery_tag=1", "attempt=1", "redelivered=false", "retry_in=", "message_id=m1", `error="database is away"`,
		} {
			assert.Contains(r, line, text)
		}
		r.Broker.Publish(rig.Queue, "poison")
		r.Wait(3 * time.Second)
		line = r.Log.Last("level=WARN")
		assert.Contains(r, line, "outcome=discarded")
		assert.Contains(r, line, `error="not a; number"`)
		r.Broker.Publish(rig.Queue, "done")
		r.Wait(time.Second)
		r.Broker.Publish(rig.Queue, "done")
		r.Wait(2 * time.Second)
		assert.Contains(r, r.Log.Last("level=WARN"), "handler settled its message by itself and then failed")
	})
}

// See TestHourOfFailuresIsAtMost100Lines for the hour.
func TestFailingHandlersDoNotFloodTheLog(t *testing.T) {
	handlers := map[string]steadymq.Handler{
		"error": func(context.Context, *steadymq.Delivery) error { return errors.New("database is away") },
		"panic": func(context.Context, *steadymq.Delivery) error { panic("nil map") },
	}
	for name, h := range handlers {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(h, steadymq.WithPrefetch(100))
				for i := range 100 {
					r.Broker.Publish(rig.Queue, fmt.Sprint(i))
				}
				r.Wait(5 * time.Minute)
				require.Greater(r, r.Consumer.Stats().Failed, uint64(10_000))
				told := r.Log.Lines("suppressed=")
				assert.LessOrEqual(r, len(r.Log.Lines()), 20)
				assert.GreaterOrEqual(r, len(told), 8, "more at first, then one a minute")
				assert.Contains(r, told[len(told)-1], "delivery_tag=")
				assert.Equal(r, name == "panic", strings.Contains(told[0], "level=ERROR") && strings.Contains(told[0], "stack="))
				assert.Zero(r, r.Consumer.Stats().EventsDropped, "changes of state are not crowded out")
			})
		})
	}
}

func TestFailuresThatWereLeftOutAreToldAtLast(t *testing.T) {
	for _, stop := range []bool{false, true} {
		t.Run(fmt.Sprint("stop=", stop), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					return steadymq.Discard(errors.New(string(d.Body)))
				})
				r.Broker.Publish(rig.Queue, "1", "2", "3", "4")
				r.Wait(time.Second / 2)
				require.Len(r, r.Log.Lines("level=WARN"), 1)
				if stop {
					require.NoError(r, r.Stop())
				} else {
					r.Wait(time.Minute + 2*time.Second)
				}
				require.Len(r, r.Log.Lines("level=WARN"), 2)
				line := r.Log.Last("level=WARN")
				assert.Contains(r, line, `"steadymq: more handlers failed"`)
				assert.Contains(r, line, "queue=orders")
				assert.Contains(r, line, "suppressed=3 error=4")
			})
		})
	}
}

// An error that only says that the session was lost is no failure of the handler.
func TestHandlerCutOffByALostSessionIsNotToldAsFailed(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if d.Session() > 1 {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		})
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Empty(r, r.Log.Lines("handler failed"))
	})
}

// A user's error is not to be trusted with the worker.
func TestErrorThatPanicsIsToldAndEndsNothing(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.Discard((*nilError)(nil)) })
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		assert.NotEmpty(r, r.Log.Lines("handler panicked", "outcome=discarded", "the error *behaviour_test.nilError panics when it is read"))
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	})
}

type nilError struct{ text string }

func (u *nilError) Error() string { return u.text }

func TestDefaultLoggerIsLookedUpWhenRunBegins(t *testing.T) {
	before, writer, flags := slog.Default(), log.Writer(), log.Flags()
	defer func() { // SetDefault turns the log package to its handler as well
		slog.SetDefault(before)
		log.SetOutput(writer)
		log.SetFlags(flags)
	}()
	synctest.Test(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
		atNew, atRun := new(rig.LogBuffer), new(rig.LogBuffer)
		slog.SetDefault(slog.New(slog.NewTextHandler(atNew, nil)))
		c, err := steadymq.New(b.URL, rig.Queue, steadymq.WithDialer(b.Dialer()))
		require.NoError(t, err)
		slog.SetDefault(slog.New(slog.NewTextHandler(atRun, nil)))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.NoError(t, c.Run(ctx, rig.Ack))
		assert.Contains(t, atRun.String(), "steadymq: consuming")
		assert.Empty(t, atNew.String())
	})
}

// failingWith runs a consumer whose credentials fail every second with what cause says of the n-th
// try.
func failingWith(r *rig.Rig, cause func(n int) string) {
	n := 0
	r.Run(rig.Ack, steadymq.WithBackoff(time.Second, time.Second), steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
		n++
		return steadymq.Credentials{}, errors.New(cause(n - 1))
	}))
}

func TestNewCauseThatDiffersByAShortNumberIsToldAtOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var status atomic.Int32
		status.Store(503)
		failingWith(r, func(int) string { return fmt.Sprintf("the vault answered with status %d", status.Load()) })
		r.Wait(40 * time.Second)
		status.Store(401)
		r.Wait(5 * time.Second)
		assert.NotEmpty(r, r.Warnings("status 401"), "a new cause, five seconds later")
	})
}

func TestEachNewCauseIsToldAtOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		words := []string{"one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"}
		failingWith(r, func(n int) string { return "cause " + words[min(n, len(words)-1)] })
		r.Wait(20 * time.Second)
		for _, word := range words {
			assert.NotEmpty(r, r.Warnings("cause "+word), word)
		}
	})
}

func TestCauseThatDiffersInAddressOrLongNumberIsTheSame(t *testing.T) {
	for name, cause := range map[string]func(n int) string{
		"port":    func(n int) string { return fmt.Sprintf("read 10.0.0.7:%d: away", 40000+n) },
		"address": func(n int) string { return fmt.Sprintf("dial 10.0.%d.%d:5672: away", n%200, n%250) },
		"IPv6":    func(n int) string { return fmt.Sprintf("dial [fe80::%x%%eth0]:5672: away", n) },
		"request": func(n int) string { return fmt.Sprintf("request %d: away", 1_000_000+n*1000) },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				failingWith(r, func(n int) string { return cause(n) })
				r.Wait(50 * time.Second)
				assert.LessOrEqual(r, len(r.Warnings("away")), 8, "1st, 2nd, 4th ... of some 100")
			})
		})
	}
}

// What comes in turns is forgotten and new again, in any order.
func TestHourOfCausesInAnyOrderIsAtMost100Lines(t *testing.T) {
	for name, cause := range map[string]func(n int) string{
		"always new":      func(n int) string { return fmt.Sprintf("cause %d", n%1000) },
		"each twice":      func(n int) string { return fmt.Sprintf("cause %d", n/2%1000) },
		"many in turns":   func(n int) string { return fmt.Sprintf("cause %d", n%20) },
		"some in turns":   func(n int) string { return fmt.Sprintf("cause %d", n%5) },
		"each four times": func(n int) string { return fmt.Sprintf("cause %d", n/4%100) },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				failingWith(r, cause)
				r.Wait(time.Hour)
				assert.LessOrEqual(r, len(r.Log.Lines()), 100)
				assert.Greater(r, len(r.Log.Lines()), 58, "at least one a minute")
			})
		})
	}
}

// Hosts have names that differ in a digit, which is no new cause.
func TestNameOfTheHostMakesNoCause(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithBackoff(time.Second, time.Second), steadymq.WithDialer(func(_ context.Context, _, address string) (net.Conn, error) {
			host, _, _ := net.SplitHostPort(address)
			return nil, fmt.Errorf("lookup %s: away", host)
		}))
		r.Wait(3 * time.Second)
		assert.Greater(r, len(r.Causes()), 20)
		assert.LessOrEqual(r, len(r.Warnings("away")), 8, "1st, 2nd, 4th ... of some 50")
	}, steadymqtest.WithHosts(8))
}
