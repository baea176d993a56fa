package behaviour_test

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
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// Whoever reads the log must not take a consumer that is consuming for one that is not.
func TestFailureThatWasToldIsNotTheLastWord(t *testing.T) {
	for _, every := range []time.Duration{time.Second, 3 * time.Second, 11 * time.Second, 61 * time.Second, 2 * time.Minute} {
		t.Run(every.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack)
				for n := range 40 {
					r.Wait(every)
					r.Broker.Reset()
					if n%5 > 0 {
						continue
					}
					nextSession(r)
					r.Wait(2*time.Second + 100*time.Millisecond)
					last := r.Log.Last()
					require.Contains(r, last, "consuming", n)
					if n > 0 {
						require.Contains(r, last, " down=", n)
					}
				}
			})
		})
	}
}

// nextSession waits until the consumer is consuming once more.
func nextSession(r *rig.Rig) {
	for sessions := r.Consumer.Stats().Sessions; r.Consumer.Stats().Sessions == sessions; {
		r.Wait(10 * time.Millisecond)
	}
}

func TestRecoveryIsToldAtOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		assert.NotContains(r, r.Log.Last("consuming"), "down=", "it never was")
		for range 3 {
			r.Wait(20 * time.Second)
			r.Broker.Refuse(true)
			r.Broker.Reset()
			r.Wait(30 * time.Second)
			r.Broker.Refuse(false)
			r.Wait(1500 * time.Millisecond)
			assert.Contains(r, r.Log.Last(), "level=INFO msg=\"steadymq: consuming\"")
			assert.Contains(r, r.Log.Last(), " down=3", "30 s and a little")
			assert.NotContains(r, r.Log.Last(), " up=")
		}
	})
}

// quick is a backoff that takes no time.
var quick = steadymq.WithBackoff(time.Millisecond, time.Millisecond)

func TestSessionsThatEndAtOnceAreNotToldAsRecovered(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, quick)
		for range 20 {
			r.Wait(time.Second)
			r.Broker.Reset()
			nextSession(r)
		}
		assert.Len(r, r.Log.Lines("consuming"), 1, "the first")
		since := time.Now()
		r.Wait(3 * time.Second)
		last := r.Log.Last()
		require.Contains(r, last, "consuming")
		assert.Contains(r, last, " up=2s", "it is told late, and says so")
		_, text, _ := strings.Cut(last, "time=")
		text, _, _ = strings.Cut(text, " ")
		at, err := time.Parse(time.RFC3339, text)
		require.NoError(r, err)
		assert.InDelta(r, 2, at.Sub(since).Seconds(), 0.1, "not dated back")
	})
}

// Its failures may be too many to be told, but not that it was away.
func TestLongOutageIsToldAtItsEndAtLeast(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var path atomic.Int64 // its delay
		dial := r.Broker.Dialer()
		r.Consuming(rig.Ack, quick, steadymq.WithDialTimeout(14*time.Second), steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			time.Sleep(time.Duration(path.Load()))
			return dial(ctx, network, address)
		}))
		flap := func() {
			r.Wait(3 * time.Second)
			r.Broker.Reset()
			nextSession(r)
		}
		told := func() int { return len(r.Log.Lines("level=WARN", "backoff")) }
		for range 50 { // so that what fails next is told every 90 s only
			flap()
		}
		for before := told(); told() == before; {
			flap()
		}
		for begun := time.Now(); time.Since(begun) < 80*time.Second; {
			flap()
		}
		warned, consuming := told(), len(r.Log.Lines("consuming"))
		r.Wait(2 * time.Second)
		path.Store(int64(11 * time.Second))
		r.Broker.Reset()
		nextSession(r)
		r.Wait(3 * time.Second)
		require.Equal(r, warned, told(), "it was one try")
		assert.Len(r, r.Log.Lines("consuming"), consuming+1)
		assert.Contains(r, r.Log.Last("consuming"), " down=1")
	})
}

func TestRunThatGivesUpIsToldAsAnError(t *testing.T) {
	t.Run("before its first session", func(t *testing.T) {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Broker.RefuseLogin(true)
			r.Run(rig.Ack)
			require.ErrorIs(r, <-r.Result, steadymq.ErrLoginRefused)
			r.Result = nil
			assert.Empty(r, r.Log.Lines("draining"), "there is nothing to drain")
			assert.Len(r, r.Log.Lines("level=ERROR", "steadymq: stopped", "login refused"), 1)
		})
	})
	t.Run("by WithFatal", func(t *testing.T) {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Consuming(rig.Ack, steadymq.WithFatal(func(error) bool { return true }))
			r.Broker.Reset()
			require.Error(r, <-r.Result)
			r.Result = nil
			assert.Len(r, r.Log.Lines("draining"), 1)
			assert.Len(r, r.Log.Lines("level=ERROR", "steadymq: stopped", "cause="), 1)
			assert.Len(r, r.Log.Lines("cause="), 1, "the cause is told once")
		})
	})
	t.Run("not where it was asked to stop", func(t *testing.T) {
		rig.Bubble(t, func(r *rig.Rig) {
			started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
			r.Consuming(rig.Hold(started, release))
			r.Broker.Publish(rig.Queue, "tea")
			<-started
			time.AfterFunc(time.Minute, func() { close(release) })
			require.ErrorIs(r, r.Stop(), steadymq.ErrDrainTimeout)
			assert.Len(r, r.Log.Lines("level=WARN", "steadymq: stopped"), 1)
			assert.Empty(r, r.Log.Lines("level=ERROR"))
			r.Wait(time.Minute)
		})
	})
}

func TestDurationsAreTextsInJSON(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var log rig.LogBuffer
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return errors.New("database is away") },
			steadymq.WithLogger(slog.New(slog.NewJSONHandler(&log, nil))))
		r.Wait(10 * time.Second)
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		r.Broker.Reset()
		r.Wait(10 * time.Second)
		seen := make(map[string]bool)
		for line := range strings.Lines(log.String()) {
			var attrs map[string]any
			require.NoError(r, json.Unmarshal([]byte(line), &attrs))
			for _, key := range []string{"retry_in", "up", "down"} {
				if text, ok := attrs[key].(string); ok {
					_, err := time.ParseDuration(text)
					assert.NoError(r, err)
					seen[key] = true
				} else {
					assert.Nil(r, attrs[key], key)
				}
			}
		}
		assert.Len(r, seen, 3)
	})
}

func TestLinesNameTheLimitThatPassed(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if d.Redelivered {
				return nil
			}
			d.MessageId += "-changed"
			time.Sleep(5 * time.Second)
			return fmt.Errorf("pay: %w", context.Cause(ctx))
		}, steadymq.WithHandlerTimeout(time.Second))
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m7"})
		r.Wait(6 * time.Second)
		assert.Contains(r, r.Log.Last("handler failed"), `error="pay: steadymq: handler timeout after 1s (WithHandlerTimeout)"`)
		assert.Contains(r, r.Log.Last("past its timeout"), "timeout=1s message_id=m7 ")
	})
}

// A host that takes connections and says nothing would be a silent log for as long as the set-up
// limit.
func TestTryThatTakesItsTimeIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.HangAt(steadymqtest.StageTune, true)
		r.Run(rig.Ack)
		r.Wait(3 * time.Second)
		line := r.Log.Last()
		for _, text := range []string{"level=INFO", `"steadymq: still connecting"`, "queue=orders", "host=mq1.test:5672", "step=open", "for=2s"} {
			assert.Contains(r, line, text)
		}
		r.Wait(5 * time.Minute)
		assert.Len(r, r.Log.Lines("still connecting"), 1)
		r.Wait(time.Hour)
		assert.LessOrEqual(r, len(r.Log.Lines("still connecting")), 7)
		assert.Contains(r, r.Log.Last("still connecting"), "suppressed=")
	})
}

// early is a context whose deadline is a moment before its end, as a dial may see it.
type early struct {
	context.Context
	limit time.Time
}

func (e early) Deadline() (time.Time, bool) { return e.limit, true }

func TestDeadlineOfRunThatEndsADialIsNoFailure(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		limit := time.Now().Add(time.Second)
		c := r.New(steadymq.WithDialer(func(ctx context.Context, _, _ string) (net.Conn, error) {
			at, _ := ctx.Deadline()
			time.Sleep(time.Until(at))
			return nil, errors.New("i/o timeout")
		}))
		ctx, cancel := context.WithTimeout(r.Context(), time.Second+time.Millisecond)
		defer cancel()
		require.NoError(r, c.Run(early{ctx, limit}, rig.Ack))
		assert.Empty(r, r.Log.Lines("backoff"))
	})
}

func TestWithQueueIsToldAsDeclare(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue(jobs, steadymqtest.QueueOptions{})
		declaring(r, rig.Ack, steadymq.Queue{}, "")
		err := <-r.Result
		r.Result = nil
		var at *steadymq.SessionError
		require.ErrorAs(r, err, &at)
		assert.Equal(r, "topology", at.Op)
		assert.ErrorContains(r, err, ": declare mq1.test:5672: 406 PRECONDITION_FAILED - ")
		assert.ErrorContains(r, err, "or delete it (its messages go with it)")
		assert.NotEmpty(r, r.Log.Lines("stopped", `cause="declare: 406`, "its messages go with it"))
	})
}

func TestRunTellsThatLastAcksMayBeLost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
		r.Consuming(rig.Hold(started, release))
		r.Broker.Publish(rig.Queue, "tea")
		<-started
		r.Cancel()
		r.Wait(time.Second)
		r.Broker.Reset()
		close(release)
		err := <-r.Result
		r.Result = nil
		assert.ErrorContains(r, err, "lost mq1.test:5672: ")
		assert.ErrorContains(r, err, "while stopping: the last acks may be lost, and their messages come again")
	})
}

func TestMessageBeyondTheDefaultLimitIsNotTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var counts []any
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			counts = append(counts, d.Headers["x-delivery-count"])
			if d.Redelivered {
				return nil
			}
			return steadymq.Requeue(nil)
		})
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Headers: map[string]any{
			"x-delivery-count": int64(25), "x-acquired-count": int64(25),
			"x-death": []any{map[string]any{"queue": "before", "reason": "rejected", "count": int64(25)}},
		}})
		r.Wait(time.Second)
		require.Equal(r, []any{int64(25), int64(25)}, counts)
		assert.Empty(r, r.Warnings("limit"))
	}, steadymqtest.WithVersion(4, 3))
}

func TestDeliveryPrintsShortly(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var got *steadymq.Delivery
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			got = d
			return nil
		})
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m\n1", Body: bytes.Repeat([]byte("cup "), 100)})
		r.Wait(time.Second)
		for _, text := range []string{fmt.Sprint(got), fmt.Sprint(*got), fmt.Sprintf("%+v", got), fmt.Sprintf("%s", []any{got})} {
			assert.Contains(r, text, "queue=orders")
			assert.Contains(r, text, "body_size=400")
			assert.NotContains(r, text, "cup")
			assert.NotContains(r, text, "\n")
			assert.Less(r, len(text), 200)
		}
	})
}
