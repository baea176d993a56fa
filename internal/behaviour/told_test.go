package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"runtime"
	"strings"
	"sync"
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

// The order of the changes.

var tagPrefix = regexp.MustCompile(`^steadymq-[0-9a-f]{8}\.`)

// told is a change of state as a text. The tag is that of the try and the session, the wait only
// whether there is one.
func told(c steadymq.StateChange) string {
	text := fmt.Sprintf("%v to %v, queue %s, session %d", c.From, c.To, c.Queue, c.Session)
	if c.ConsumerTag != "" {
		text += ", tag " + tagPrefix.ReplaceAllString(c.ConsumerTag, "")
	}
	text += fmt.Sprintf(", host %s, attempt %d", c.Host, c.Attempt)
	if c.RetryIn > 0 {
		text += ", waits"
	}
	if c.Cause != nil {
		text += ": " + c.Cause.Error()
	}
	return text
}

const (
	lostOrders  = ": steadymq: queue orders: session 1: lost mq1.test:5672: "
	started     = "idle to connecting, queue orders, session 0, host mq1.test:5672, attempt 0"
	confirmed   = "connecting to consuming, queue orders, session 1, tag 1-1, host mq1.test:5672, attempt 0"
	lost        = "consuming to backoff, queue orders, session 1, host mq1.test:5672, attempt 1, waits" + lostOrders
	tried       = "backoff to connecting, queue orders, session 1, host mq1.test:5672, attempt 1"
	confirmed2  = "connecting to consuming, queue orders, session 2, tag 2-2, host mq1.test:5672, attempt 1"
	asked2      = "consuming to draining, queue orders, session 2, tag 2-2, host mq1.test:5672, attempt 1"
	over2       = "draining to stopped, queue orders, session 2, tag 2-2, host mq1.test:5672, attempt 1"
	refusedBy   = ": steadymq: queue orders: session 1: open mq1.test:5672: login refused: 403 ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile: check user name, password and mechanism"
	wasCanceled = "the broker cancelled the consumer (basic.cancel): the queue was deleted or moved, or a delivery was held longer than the consumer timeout"
)

func TestChangesOfStateAreToldInTheirOrderWithAllThatTheyHold(t *testing.T) {
	for name, c := range map[string]struct {
		happens func(r *rig.Rig)
		options []steadymq.Option
		want    []string
	}{
		"first connect and stop": {
			happens: func(r *rig.Rig) { r.Wait(time.Second) },
			want: []string{
				started, confirmed,
				"consuming to draining, queue orders, session 1, tag 1-1, host mq1.test:5672, attempt 0",
				"draining to stopped, queue orders, session 1, tag 1-1, host mq1.test:5672, attempt 0",
			},
		},
		"loss of the channel": {
			happens: func(r *rig.Rig) {
				r.Wait(time.Second)
				r.Broker.CloseChannels(406, "delivery acknowledgement on channel 1 timed out")
				r.Wait(time.Second)
			},
			want: []string{started, confirmed, lost + "406 PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out", tried, confirmed2, asked2, over2},
		},
		"loss of the connection": {
			happens: func(r *rig.Rig) { r.Wait(time.Second); r.Broker.Reset(); r.Wait(time.Second) },
			want:    []string{started, confirmed, lost + "the peer reset the connection", tried, confirmed2, asked2, over2},
		},
		"close of the connection": {
			happens: func(r *rig.Rig) { r.Wait(time.Second); r.Broker.CloseConnections(320, "bye"); r.Wait(time.Second) },
			want:    []string{started, confirmed, lost + "320 CONNECTION_FORCED - bye", tried, confirmed2, asked2, over2},
		},
		"basic.cancel": {
			happens: func(r *rig.Rig) { r.Wait(time.Second); r.Broker.CancelConsumers(rig.Queue); r.Wait(time.Second) },
			want:    []string{started, confirmed, lost + wasCanceled, tried, confirmed2, asked2, over2},
		},
		"refused login": {
			happens: func(r *rig.Rig) { r.Broker.RefuseLogin(true); r.Wait(time.Second) },
			want: []string{
				started,
				"connecting to draining, queue orders, session 0, host mq1.test:5672, attempt 1" + refusedBy,
				"draining to stopped, queue orders, session 0, host mq1.test:5672, attempt 1" + refusedBy,
			},
		},
		"stop in backoff": {
			happens: func(r *rig.Rig) { r.Broker.DeleteQueue(rig.Queue); r.Wait(500 * time.Millisecond) },
			want: []string{
				started,
				"connecting to backoff, queue orders, session 0, host mq1.test:5672, attempt 1, waits: steadymq: queue orders: session 1: consume mq1.test:5672: 404 NOT_FOUND - no queue 'orders' in vhost '/'" +
					"; it is asked for again until someone has declared it, which WithQueue or WithTopology can do",
				"backoff to draining, queue orders, session 0, host mq1.test:5672, attempt 1",
				"draining to stopped, queue orders, session 0, host mq1.test:5672, attempt 1",
			},
		},
		"stop in a set-up": {
			happens: func(r *rig.Rig) { r.Broker.HangAt(steadymqtest.StageTune, true); r.Wait(time.Second) },
			want: []string{
				started,
				"connecting to draining, queue orders, session 0, host mq1.test:5672, attempt 0",
				"draining to stopped, queue orders, session 0, host mq1.test:5672, attempt 0",
			},
		},
		"end by WithFatal": {
			happens: func(r *rig.Rig) { r.Wait(time.Second); r.Broker.CloseConnections(320, "bye"); r.Wait(time.Second) },
			options: rig.Options(steadymq.WithFatal(func(error) bool { return true })),
			want: []string{
				started, confirmed,
				"consuming to draining, queue orders, session 1, host mq1.test:5672, attempt 1" + lostOrders + "320 CONNECTION_FORCED - bye",
				"draining to stopped, queue orders, session 1, host mq1.test:5672, attempt 1" + lostOrders + "320 CONNECTION_FORCED - bye",
			},
		},
		"a queue that the topology names": {
			happens: func(r *rig.Rig) { r.Broker.DeclareQueue("tea", steadymqtest.QueueOptions{}); r.Wait(time.Second) },
			options: rig.Options(steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "tea", nil })),
			want: []string{
				started,
				"connecting to consuming, queue tea, session 1, tag 1-1, host mq1.test:5672, attempt 0",
				"consuming to draining, queue tea, session 1, tag 1-1, host mq1.test:5672, attempt 0",
				"draining to stopped, queue tea, session 1, tag 1-1, host mq1.test:5672, attempt 0",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Run(rig.Ack, append(c.options, steadymq.WithConsumerTag("steadymq"))...)
				c.happens(r)
				err := r.Stop()
				var got []string
				last := time.Time{}
				for _, change := range r.Changes() {
					got = append(got, told(change))
					assert.False(r, change.Time.Before(last), "in order")
					last = change.Time
				}
				assert.Equal(r, c.want, got)
				assert.Equal(r, err, r.LastChange().Cause, "Run's error is told")
				r.Wait(time.Minute)
				assert.Len(r, r.Changes(), len(c.want), "nothing is told once Run has returned")
			})
		})
	}
}

// Where Run gives up it has told why before it has stopped.
func TestEachRunTellsFromTheStateOfTheLast(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		for range 2 {
			if r.Consumer == nil {
				r.Consumer = r.New()
			}
			r.Start(rig.Ack)
			r.Wait(time.Second)
			require.NoError(r, r.Stop())
		}
		all := r.Changes()
		require.Len(r, all, 8)
		assert.Equal(r, steadymq.Idle, all[0].From)
		assert.Equal(r, steadymq.Stopped, all[4].From)
		assert.Zero(r, all[4].Session, "counted from 1 in each Run")
		assert.EqualValues(r, 1, all[5].Session)
		assert.NotEqual(r, all[1].ConsumerTag, all[5].ConsumerTag, "a tag is never used again")
		assert.EqualValues(r, 2, r.Consumer.Stats().Sessions, "over all Runs")
	})
}

// Hooks that misbehave.

// misuse has each hook called, with the fault in that one.
func misuse(r *rig.Rig, which string, fault func()) (calls *atomic.Int32) {
	calls = new(atomic.Int32)
	call := func(hook string) {
		if hook == which {
			calls.Add(1)
			fault()
		}
	}
	r.Run(func(_ context.Context, d *steadymq.Delivery) error {
		switch string(d.Body) {
		case "held":
			return steadymq.RequeueAfter(nil, time.Hour)
		case "fails":
			return steadymq.Discard(errAway)
		}
		return nil
	}, steadymq.WithHooks(steadymq.Hooks{
		StateChanged:  func(c steadymq.StateChange) { call("StateChanged, " + c.To.String()) },
		HandlerFailed: func(*steadymq.Delivery, error) { call("HandlerFailed") },
		Unreadable:    func(*steadymq.MessageError) { call("Unreadable") },
		Settled:       func(_ *steadymq.Delivery, o steadymq.Outcome) { call("Settled, " + o.String()) },
	}))
	r.Wait(time.Second)
	return calls
}

func TestEachHookThatPanicsOrExitsEndsRunInOrderAndIsCalledOnce(t *testing.T) {
	for what, fault := range map[string]func(){"panic": func() { panic(errAway) }, "exit": runtime.Goexit} {
		for hook, provoke := range map[string]func(r *rig.Rig){
			"StateChanged, connecting": func(*rig.Rig) {},
			"StateChanged, backoff":    func(r *rig.Rig) { r.Broker.Reset() },
			"StateChanged, draining":   func(r *rig.Rig) { r.Cancel() },
			"StateChanged, stopped":    func(r *rig.Rig) { r.Cancel() },
			"HandlerFailed":            func(r *rig.Rig) { r.Broker.Publish(rig.Queue, "fails", "fails") },
			"Unreadable": func(r *rig.Rig) {
				r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{RawHeaders: rig.HeaderTable('?', 1)})
			},
			"Settled, acked":     func(r *rig.Rig) { r.Broker.Publish(rig.Queue, "tea") },
			"Settled, discarded": func(r *rig.Rig) { r.Broker.Publish(rig.Queue, "fails") },
			"Settled, requeued": func(r *rig.Rig) { // as the stop lets them go
				r.Broker.Publish(rig.Queue, "held", "held")
				r.Wait(time.Second)
				r.Cancel()
			},
			"Settled, stale": func(r *rig.Rig) { // as their session ends
				r.Broker.Publish(rig.Queue, "held", "held")
				r.Wait(time.Second)
				r.Broker.Reset()
			},
		} {
			t.Run(hook+", "+what, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					calls := misuse(r, hook, fault)
					if r.Consumer.State() != steadymq.Stopped {
						provoke(r)
					}
					r.Wait(time.Second)
					require.Equal(r, steadymq.Stopped, r.Consumer.State())
					err := r.Stop()
					var refused *steadymq.OptionError
					require.ErrorAs(r, err, &refused)
					assert.Equal(r, steadymq.OptionError{Option: "WithHooks", Reason: "a hook panicked, mend it and make a new Consumer"}, *refused)
					var panicked *steadymq.PanicError
					require.ErrorAs(r, err, &panicked)
					assert.Equal(r, what == "panic", errors.Is(err, errAway), "the panic's own error")
					assert.NotEmpty(r, panicked.Stack)
					assert.EqualValues(r, 1, calls.Load(), "no hook is called after one has panicked")
					assert.Zero(r, r.Broker.Unsettled(rig.Queue))
					assert.Zero(r, r.Consumer.Stats().Handling)
					assert.Equal(r, err, r.Consumer.Run(r.Context(), rig.Ack), "every later Run")
					assert.Contains(r, r.Log.Last(), "stopped", "the log goes on")
				})
			})
		}
	}
}

// Hooks that are slow.

func TestSlowHookDelaysItsWorkerAndNothingElse(t *testing.T) {
	for name, c := range map[string]struct {
		hooks   func(wait func()) steadymq.Hooks
		body    string
		settled bool // while the hook is at work
	}{
		"HandlerFailed": {func(wait func()) steadymq.Hooks {
			return steadymq.Hooks{HandlerFailed: func(*steadymq.Delivery, error) { wait() }}
		}, "fails", true},
		"Settled": {func(wait func()) steadymq.Hooks {
			return steadymq.Hooks{Settled: func(_ *steadymq.Delivery, o steadymq.Outcome) {
				if o == steadymq.Discarded {
					wait()
				}
			}}
		}, "fails", true},
		"Unreadable": {func(wait func()) steadymq.Hooks {
			return steadymq.Hooks{Unreadable: func(*steadymq.MessageError) { wait() }}
		}, "unreadable", false},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				block, entered := make(chan struct{}), make(chan struct{}, 9)
				r.Consuming(failWith, steadymq.WithConcurrency(2), steadymq.WithHooks(c.hooks(func() { entered <- struct{}{}; <-block })),
					steadymq.WithDrainTimeout(5*time.Second))
				m := steadymqtest.Message{Body: []byte("discard:x")}
				if c.body == "unreadable" {
					m.RawHeaders = rig.HeaderTable('?', 1)
				}
				r.Broker.PublishMessage(rig.Queue, m)
				r.Wait(time.Second)
				require.Len(r, entered, 1)
				if c.settled {
					assert.Zero(r, r.Broker.Unsettled(rig.Queue), "the outcome is sent before it is told")
				}
				r.Broker.Publish(rig.Queue, "acked:x")
				r.Wait(time.Second)
				assert.EqualValues(r, 1, r.Consumer.Stats().Acked, "the other worker goes on")
				r.Broker.Reset()
				r.Wait(time.Second)
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
				assert.EqualValues(r, 2, r.Consumer.Stats().Sessions)
				since := time.Now()
				r.Cancel()
				_ = r.Stop()
				assert.LessOrEqual(r, time.Since(since), 6*time.Second)
				close(block)
				r.Wait(time.Second)
				assert.LessOrEqual(r, len(entered), 2)
			})
		})
	}
}

// 1,024 events wait for a slow hook; what comes then is dropped and counted, and what was kept is
// told in order.
func TestEventsBehindASlowHookAreKeptInOrderOrCounted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		block := make(chan struct{})
		var mu sync.Mutex
		var got []steadymq.StateChange
		r.Consuming(rig.Ack, quick, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			<-block
			mu.Lock()
			defer mu.Unlock()
			got = append(got, c)
		}}))
		for range 400 {
			r.Broker.Reset()
			r.Wait(50 * time.Millisecond)
		}
		require.EqualValues(r, 401, r.Consumer.Stats().Sessions)
		const all, kept = 2 + 3*400, 1 + 1024
		assert.EqualValues(r, all-kept, r.Consumer.Stats().EventsDropped)
		assert.Empty(r, got)
		close(block)
		r.Wait(time.Second)
		require.Len(r, got, kept)
		for i := 1; i < kept; i++ {
			require.Equal(r, got[i-1].To, got[i].From, i)
		}
		require.NoError(r, r.Stop())
		assert.Len(r, got, kept+2, "draining, stopped")
		assert.EqualValues(r, all-kept, r.Consumer.Stats().EventsDropped)
	})
}

// Whatever waits behind a hook that does not return is not told once Run has returned.
func TestNoHookIsCalledOnceRunHasReturned(t *testing.T) {
	for name, from := range map[string]steadymq.State{"from the start": steadymq.Connecting, "from the stop": steadymq.Draining} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				block := make(chan struct{})
				var late atomic.Bool
				var calls []string
				call := func(hook string) {
					if late.Load() {
						calls = append(calls, hook)
					}
				}
				r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					switch string(d.Body) {
					case "held":
						return steadymq.RequeueAfter(nil, time.Hour)
					case "hangs":
						time.Sleep(time.Minute)
						return errAway
					case "panics":
						time.Sleep(time.Minute)
						panic("late")
					}
					return nil
				}, steadymq.WithConcurrency(4), steadymq.WithDrainTimeout(time.Second), steadymq.WithHooks(steadymq.Hooks{
					StateChanged: func(c steadymq.StateChange) {
						call("StateChanged " + c.To.String())
						if c.To == from {
							<-block
						}
					},
					HandlerFailed: func(*steadymq.Delivery, error) { call("HandlerFailed") },
					Unreadable:    func(*steadymq.MessageError) { call("Unreadable") },
					Settled:       func(*steadymq.Delivery, steadymq.Outcome) { call("Settled") },
				}))
				r.Broker.Publish(rig.Queue, "held", "hangs", "panics")
				r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{RawHeaders: rig.HeaderTable('?', 1)})
				r.Wait(time.Second)
				require.ErrorIs(r, r.Stop(), steadymq.ErrDrainTimeout)
				late.Store(true)
				close(block)
				r.Wait(2 * time.Minute)
				assert.Empty(r, calls)
				assert.NotContains(r, strings.Join(r.Log.Lines(), ""), "late")
			})
		})
	}
}
