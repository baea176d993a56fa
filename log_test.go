package steadymq_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// lines returns what was logged at INFO and above and holds all of the texts.
func (l *logBuffer) lines(texts ...string) (found []string) {
next:
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, "level=DEBUG") {
			continue
		}
		for _, text := range texts {
			if !strings.Contains(line, text) {
				continue next
			}
		}
		found = append(found, line)
	}
	return found
}

// last returns the last line with all of the texts, "" if there is none.
func (l *logBuffer) last(texts ...string) string {
	found := l.lines(texts...)
	if len(found) == 0 {
		return ""
	}
	return found[len(found)-1]
}

// flap resets the connection again and again for an hour.
func (b *bench) flap(every time.Duration) {
	for end := time.Now().Add(time.Hour); time.Now().Before(end); {
		b.wait(every)
		b.broker.Reset()
	}
}

// comeAndGo has a session and an outage, one after the other, for an hour.
func (b *bench) comeAndGo(up, down time.Duration) {
	for end := time.Now().Add(time.Hour); time.Now().Before(end); {
		b.wait(up)
		b.broker.Refuse(true)
		b.broker.Reset()
		b.wait(down)
		b.broker.Refuse(false)
	}
}

func TestHourOfOutageIsAtMost100Lines(t *testing.T) {
	const most = 100
	outages := map[string]func(b *bench){
		"dials are refused": func(b *bench) {
			b.broker.Refuse(true)
			b.broker.Reset()
			b.wait(time.Hour)
			last := b.log.last("level=WARN", "backoff", "repeated=")
			assert.Contains(b, last, `cause="dial: connection refused"`)
			b.broker.Refuse(false)
			b.wait(2 * time.Second)
			assert.Contains(b, b.log.last(), "consuming", "that it is well again is told at once")
		},
		"logins are refused": func(b *bench) {
			b.broker.RefuseLogin(true)
			b.broker.Reset()
			b.wait(time.Hour)
			assert.Contains(b, b.log.last("level=WARN"), "login refused")
		},
		"the queue is absent": func(b *bench) {
			b.broker.DeleteQueue(queue)
			b.wait(time.Hour)
			assert.Contains(b, b.log.last("level=WARN"), "404 NOT_FOUND - no queue")
		},
		"sessions last a second": func(b *bench) { b.flap(time.Second) },
		"sessions last 11 s":     func(b *bench) { b.flap(11 * time.Second) },
		"sessions last 61 s":     func(b *bench) { b.flap(61 * time.Second) },
		"sessions last 89 s":     func(b *bench) { b.flap(89 * time.Second) },
		"sessions last 91 s":     func(b *bench) { b.flap(91 * time.Second) },
		"sessions and outages":   func(b *bench) { b.comeAndGo(11*time.Second, 12*time.Second) },
		"long ones": func(b *bench) {
			b.comeAndGo(100*time.Second, 30*time.Second)
			assert.Regexp(b, `repeated=\d\d`, b.log.last("backoff", "lost:"), "counting goes on")
		},
	}
	for name, outage := range outages {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.consuming(ack)
				b.wait(2 * time.Minute)
				before := len(b.log.lines())
				outage(b)
				lines := b.log.lines()[before:]
				assert.LessOrEqual(b, len(lines), most)
				assert.Greater(b, len(lines), 30, "at least one a minute, or two")
				for _, line := range lines {
					assert.Contains(b, line, "queue=orders")
				}
				for _, line := range b.log.lines("consuming") {
					assert.Contains(b, line, "consumer=steadymq-")
				}
			})
		})
	}
}

func TestHourOfCausesThatAreAllDifferentIsAtMost100Lines(t *testing.T) {
	bubble(t, func(b *bench) {
		tries := 0
		b.run(ack, steadymq.WithURLFunc(func(context.Context) (string, error) {
			tries++
			return "", fmt.Errorf("vault: request %s", strings.Repeat("x", tries%2000))
		}))
		b.wait(time.Hour)
		assert.LessOrEqual(b, len(b.log.lines()), 100)
		assert.Less(b, len(b.log.last()), 1000, "the text is bounded")
	})
}

// The same failure on two hosts is one row, or every change of the host would start
// the counting anew.
func TestFailureOnTwoHostsIsOneCause(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.broker.Refuse(true)
		b.broker.Reset()
		b.wait(time.Hour)
		assert.LessOrEqual(b, len(b.log.lines()), 100)
		mq1, mq2 := b.log.lines("dial", "host=mq1.test"), b.log.lines("dial", "host=mq2.test")
		assert.NotEmpty(b, mq1)
		assert.NotEmpty(b, mq2)
		refused := 0
		for _, err := range b.causes() {
			if strings.Contains(err.Error(), "refused") {
				refused++
			}
		}
		b.wait(time.Minute + time.Second)
		var told int
		_, text, _ := strings.Cut(b.log.last("repeated="), "repeated=")
		_, err := fmt.Sscan(text, &told)
		require.NoError(b, err)
		assert.GreaterOrEqual(b, told, refused)
	}, steadymqtest.WithHosts(2))
}

// A failed handler.

func TestHandlersErrorIsToldWithItsMessage(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeclareExchange("shop", "topic")
		b.broker.Bind(queue, "shop", "#")
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
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
		b.broker.PublishExchange("shop", "order.new", steadymqtest.Message{Body: []byte("tea")})
		b.wait(3 * time.Second)
		line := b.log.last("level=WARN")
		for _, text := range []string{
			`"steadymq: handler failed"`, "queue=orders", "consumer=steadymq-", "session=1", "exchange=shop", "routing_key=order.new",
			"delivery_tag=1", "attempt=1", "redelivered=false", "retry_in=", "message_id=m1", `error="database is away"`,
		} {
			assert.Contains(b, line, text)
		}
		b.broker.Publish(queue, "poison")
		b.wait(3 * time.Second)
		line = b.log.last("level=WARN")
		assert.Contains(b, line, "outcome=discarded")
		assert.Contains(b, line, `error="not a; number"`)
		b.broker.Publish(queue, "done")
		b.wait(time.Second)
		b.broker.Publish(queue, "done")
		b.wait(2 * time.Second)
		assert.Contains(b, b.log.last("level=WARN"), "handler settled its message by itself and then failed")
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
			bubble(t, func(b *bench) {
				b.consuming(h, steadymq.WithPrefetch(100))
				for i := range 100 {
					b.broker.Publish(queue, fmt.Sprint(i))
				}
				b.wait(5 * time.Minute)
				require.Greater(b, b.consumer.Stats().Failed, uint64(10_000))
				told := b.log.lines("suppressed=")
				assert.LessOrEqual(b, len(b.log.lines()), 20)
				assert.GreaterOrEqual(b, len(told), 8, "more at first, then one a minute")
				assert.Contains(b, told[len(told)-1], "delivery_tag=")
				assert.Equal(b, name == "panic", strings.Contains(told[0], "level=ERROR") && strings.Contains(told[0], "stack="))
				assert.Zero(b, b.consumer.Stats().EventsDropped, "changes of state are not crowded out")
			})
		})
	}
}

func TestFailuresThatWereLeftOutAreToldAtLast(t *testing.T) {
	for _, stop := range []bool{false, true} {
		t.Run(fmt.Sprint("stop=", stop), func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
					return steadymq.Discard(errors.New(string(d.Body)))
				})
				b.broker.Publish(queue, "1", "2", "3", "4")
				b.wait(time.Second / 2)
				require.Len(b, b.log.lines("level=WARN"), 1)
				if stop {
					require.NoError(b, b.stop())
				} else {
					b.wait(time.Minute + 2*time.Second)
				}
				require.Len(b, b.log.lines("level=WARN"), 2)
				line := b.log.last("level=WARN")
				assert.Contains(b, line, `"steadymq: more handlers failed"`)
				assert.Contains(b, line, "queue=orders")
				assert.Contains(b, line, "suppressed=3 error=4")
			})
		})
	}
}

// An error that only says that the session was lost is no failure of the handler.
func TestHandlerCutOffByALostSessionIsNotToldAsFailed(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if d.Session() > 1 {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		})
		b.broker.Publish(queue, "tea")
		b.wait(time.Second)
		b.broker.Reset()
		b.wait(time.Second)
		assert.Empty(b, b.log.lines("handler failed"))
	})
}

// A user's error is not to be trusted with the worker.
func TestErrorThatPanicsIsToldAndEndsNothing(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.Discard((*nilError)(nil)) })
		b.broker.Publish(queue, "tea")
		b.wait(time.Second)
		assert.NotEmpty(b, b.log.lines("handler panicked", "outcome=discarded", "the error *steadymq_test.nilError panics when it is read"))
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
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
		b.DeclareQueue(queue, steadymqtest.QueueOptions{})
		atNew, atRun := new(logBuffer), new(logBuffer)
		slog.SetDefault(slog.New(slog.NewTextHandler(atNew, nil)))
		c, err := steadymq.New(b.URL, queue, steadymq.WithDialer(b.Dialer()))
		require.NoError(t, err)
		slog.SetDefault(slog.New(slog.NewTextHandler(atRun, nil)))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.NoError(t, c.Run(ctx, ack))
		assert.Contains(t, atRun.String(), "steadymq: consuming")
		assert.Empty(t, atNew.String())
	})
}
