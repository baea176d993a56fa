package steadymq_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// Whoever reads the log must not take a consumer that is consuming for one that is not.
func TestFailureThatWasToldIsNotTheLastWord(t *testing.T) {
	for _, every := range []time.Duration{time.Second, 3 * time.Second, 11 * time.Second, 61 * time.Second, 2 * time.Minute} {
		t.Run(every.String(), func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.consuming(ack)
				for n := range 40 {
					b.wait(every)
					b.broker.Reset()
					if n%5 > 0 {
						continue
					}
					b.again()
					b.wait(2*time.Second + 100*time.Millisecond)
					last := b.log.last()
					require.Contains(b, last, "consuming", n)
					if n > 0 {
						require.Contains(b, last, " down=", n)
					}
				}
			})
		})
	}
}

// again waits until the consumer is consuming once more.
func (b *bench) again() {
	for sessions := b.consumer.Stats().Sessions; b.consumer.Stats().Sessions == sessions; {
		b.wait(10 * time.Millisecond)
	}
}

func TestRecoveryIsToldAtOnce(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		assert.NotContains(b, b.log.last("consuming"), "down=", "it never was")
		for range 3 {
			b.wait(20 * time.Second)
			b.broker.Refuse(true)
			b.broker.Reset()
			b.wait(30 * time.Second)
			b.broker.Refuse(false)
			b.wait(1500 * time.Millisecond)
			assert.Contains(b, b.log.last(), "level=INFO msg=\"steadymq: consuming\"")
			assert.Contains(b, b.log.last(), " down=3", "30 s and a little")
			assert.NotContains(b, b.log.last(), " up=")
		}
	})
}

// quick is a backoff that takes no time.
var quick = steadymq.WithBackoff(time.Millisecond, time.Millisecond)

func TestSessionsThatEndAtOnceAreNotToldAsRecovered(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, quick)
		for range 20 {
			b.wait(time.Second)
			b.broker.Reset()
			b.again()
		}
		assert.Len(b, b.log.lines("consuming"), 1, "the first")
		since := time.Now()
		b.wait(3 * time.Second)
		last := b.log.last()
		require.Contains(b, last, "consuming")
		assert.Contains(b, last, " up=2s", "it is told late, and says so")
		_, text, _ := strings.Cut(last, "time=")
		text, _, _ = strings.Cut(text, " ")
		at, err := time.Parse(time.RFC3339, text)
		require.NoError(b, err)
		assert.InDelta(b, 2, at.Sub(since).Seconds(), 0.1, "not dated back")
	})
}

// Its failures may be too many to be told, but not that it was away.
func TestLongOutageIsToldAtItsEndAtLeast(t *testing.T) {
	bubble(t, func(b *bench) {
		var path atomic.Int64 // its delay
		dial := b.broker.Dialer()
		b.consuming(ack, quick, steadymq.WithDialTimeout(14*time.Second), steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			time.Sleep(time.Duration(path.Load()))
			return dial(ctx, network, address)
		}))
		flap := func() {
			b.wait(3 * time.Second)
			b.broker.Reset()
			b.again()
		}
		told := func() int { return len(b.log.lines("level=WARN", "backoff")) }
		for range 50 { // so that what fails next is told every 90 s only
			flap()
		}
		for before := told(); told() == before; {
			flap()
		}
		for begun := time.Now(); time.Since(begun) < 80*time.Second; {
			flap()
		}
		warned, consuming := told(), len(b.log.lines("consuming"))
		b.wait(2 * time.Second)
		path.Store(int64(11 * time.Second))
		b.broker.Reset()
		b.again()
		b.wait(3 * time.Second)
		require.Equal(b, warned, told(), "it was one try")
		assert.Len(b, b.log.lines("consuming"), consuming+1)
		assert.Contains(b, b.log.last("consuming"), " down=1")
	})
}

func TestRunThatGivesUpIsToldAsAnError(t *testing.T) {
	t.Run("before its first session", func(t *testing.T) {
		bubble(t, func(b *bench) {
			b.broker.RefuseLogin(true)
			b.run(ack)
			require.ErrorIs(b, <-b.result, steadymq.ErrLoginRefused)
			b.result = nil
			assert.Empty(b, b.log.lines("draining"), "there is nothing to drain")
			assert.Len(b, b.log.lines("level=ERROR", "steadymq: stopped", "login refused"), 1)
		})
	})
	t.Run("by WithFatal", func(t *testing.T) {
		bubble(t, func(b *bench) {
			b.consuming(ack, steadymq.WithFatal(func(error) bool { return true }))
			b.broker.Reset()
			require.Error(b, <-b.result)
			b.result = nil
			assert.Len(b, b.log.lines("draining"), 1)
			assert.Len(b, b.log.lines("level=ERROR", "steadymq: stopped", "cause="), 1)
			assert.Len(b, b.log.lines("cause="), 1, "the cause is told once")
		})
	})
	t.Run("not where it was asked to stop", func(t *testing.T) {
		bubble(t, func(b *bench) {
			started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
			b.consuming(hold(started, release))
			b.broker.Publish(queue, "tea")
			<-started
			time.AfterFunc(time.Minute, func() { close(release) })
			require.ErrorIs(b, b.stop(), steadymq.ErrDrainTimeout)
			assert.Len(b, b.log.lines("level=WARN", "steadymq: stopped"), 1)
			assert.Empty(b, b.log.lines("level=ERROR"))
			b.wait(time.Minute)
		})
	})
}

func TestDurationsAreTextsInJSON(t *testing.T) {
	bubble(t, func(b *bench) {
		var log logBuffer
		b.consuming(func(context.Context, *steadymq.Delivery) error { return errors.New("database is away") },
			steadymq.WithLogger(slog.New(slog.NewJSONHandler(&log, nil))))
		b.wait(10 * time.Second)
		b.broker.Publish(queue, "tea")
		b.wait(time.Second)
		b.broker.Reset()
		b.wait(10 * time.Second)
		seen := make(map[string]bool)
		for line := range strings.Lines(log.String()) {
			var attrs map[string]any
			require.NoError(b, json.Unmarshal([]byte(line), &attrs))
			for _, key := range []string{"retry_in", "up", "down"} {
				if text, ok := attrs[key].(string); ok {
					_, err := time.ParseDuration(text)
					assert.NoError(b, err)
					seen[key] = true
				} else {
					assert.Nil(b, attrs[key], key)
				}
			}
		}
		assert.Len(b, seen, 3)
	})
}

func TestLinesNameTheLimitThatPassed(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if d.Redelivered {
				return nil
			}
			d.MessageId += "-changed"
			time.Sleep(5 * time.Second)
			return fmt.Errorf("pay: %w", context.Cause(ctx))
		}, steadymq.WithHandlerTimeout(time.Second))
		b.broker.PublishMessage(queue, steadymqtest.Message{ID: "m7"})
		b.wait(6 * time.Second)
		assert.Contains(b, b.log.last("handler failed"), `error="pay: steadymq: handler timeout after 1s (WithHandlerTimeout)"`)
		assert.Contains(b, b.log.last("past its timeout"), "timeout=1s message_id=m7 ")
	})
}

// A host that takes connections and says nothing would be a silent log for as long as the set-up limit.
func TestTryThatTakesItsTimeIsTold(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.HangAt(steadymqtest.StageTune, true)
		b.run(ack)
		b.wait(3 * time.Second)
		line := b.log.last()
		for _, text := range []string{"level=INFO", `"steadymq: still connecting"`, "queue=orders", "host=mq1.test:5672", "step=open", "for=2s"} {
			assert.Contains(b, line, text)
		}
		b.wait(5 * time.Minute)
		assert.Len(b, b.log.lines("still connecting"), 1)
		b.wait(time.Hour)
		assert.LessOrEqual(b, len(b.log.lines("still connecting")), 7)
		assert.Contains(b, b.log.last("still connecting"), "suppressed=")
	})
}

// early is a context whose deadline is a moment before its end, as a dial may see it.
type early struct {
	context.Context
	limit time.Time
}

func (e early) Deadline() (time.Time, bool) { return e.limit, true }

func TestDeadlineOfRunThatEndsADialIsNoFailure(t *testing.T) {
	bubble(t, func(b *bench) {
		limit := time.Now().Add(time.Second)
		c := b.make(steadymq.WithDialer(func(ctx context.Context, _, _ string) (net.Conn, error) {
			at, _ := ctx.Deadline()
			time.Sleep(time.Until(at))
			return nil, errors.New("i/o timeout")
		}))
		ctx, cancel := context.WithTimeout(b.Context(), time.Second+time.Millisecond)
		defer cancel()
		require.NoError(b, c.Run(early{ctx, limit}, ack))
		assert.Empty(b, b.log.lines("backoff"))
	})
}

func TestWithQueueIsToldAsDeclare(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeclareQueue(jobs, steadymqtest.QueueOptions{})
		b.declaring(ack, steadymq.Queue{}, "")
		err := <-b.result
		b.result = nil
		var at *steadymq.SessionError
		require.ErrorAs(b, err, &at)
		assert.Equal(b, "topology", at.Op)
		assert.ErrorContains(b, err, ": declare mq1.test:5672: 406 PRECONDITION_FAILED - ")
		assert.ErrorContains(b, err, "or delete it (its messages go with it)")
		assert.NotEmpty(b, b.log.lines("stopped", `cause="declare: 406`, "its messages go with it"))
	})
}

func TestRunTellsThatLastAcksMayBeLost(t *testing.T) {
	bubble(t, func(b *bench) {
		started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
		b.consuming(hold(started, release))
		b.broker.Publish(queue, "tea")
		<-started
		b.stopRun()
		b.wait(time.Second)
		b.broker.Reset()
		close(release)
		err := <-b.result
		b.result = nil
		assert.ErrorContains(b, err, "lost mq1.test:5672: ")
		assert.ErrorContains(b, err, "while stopping: the last acks may be lost, and their messages come again")
	})
}

func TestMessageBeyondTheDefaultLimitIsNotTold(t *testing.T) {
	bubble(t, func(b *bench) {
		var counts []any
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			counts = append(counts, d.Headers["x-delivery-count"])
			if d.Redelivered {
				return nil
			}
			return steadymq.Requeue(nil)
		})
		b.broker.PublishMessage(queue, steadymqtest.Message{Headers: map[string]any{
			"x-delivery-count": int64(25), "x-acquired-count": int64(25),
			"x-death": []any{map[string]any{"queue": "before", "reason": "rejected", "count": int64(25)}},
		}})
		b.wait(time.Second)
		require.Equal(b, []any{int64(25), int64(25)}, counts)
		assert.Empty(b, b.warnings("limit"))
	}, steadymqtest.WithVersion(4, 3))
}

func TestDeliveryPrintsShortly(t *testing.T) {
	bubble(t, func(b *bench) {
		var got *steadymq.Delivery
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			got = d
			return nil
		})
		b.broker.PublishMessage(queue, steadymqtest.Message{ID: "m\n1", Body: bytes.Repeat([]byte("cup "), 100)})
		b.wait(time.Second)
		for _, text := range []string{fmt.Sprint(got), fmt.Sprint(*got), fmt.Sprintf("%+v", got), fmt.Sprintf("%s", []any{got})} {
			assert.Contains(b, text, "queue=orders")
			assert.Contains(b, text, "body_size=400")
			assert.NotContains(b, text, "cup")
			assert.NotContains(b, text, "\n")
			assert.Less(b, len(text), 200)
		}
	})
}
