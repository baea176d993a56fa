package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

var errAway = errors.New("the database is away")

// generations are the versions of RabbitMQ that count deliveries differently.
var generations = [][2]int{{3, 10}, {4, 0}, {4, 3}}

// holdsOf returns how long each delivery was held before it went back.
func holdsOf(r *rig.Rig) (all []time.Duration) {
	for _, d := range r.Broker.Ledger().Deliveries {
		if d.Kind == steadymqtest.Reject && d.Requeue {
			all = append(all, d.Settled.Sub(d.Time))
		}
	}
	return all
}

func TestFailedMessageIsHeldTwiceAsLongEachTime(t *testing.T) {
	for _, v := range generations {
		t.Run(fmt.Sprint(v), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("quorum")
				r.Consuming(func(context.Context, *steadymq.Delivery) error { return errAway })
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(2 * time.Hour)
				holds := holdsOf(r)
				require.GreaterOrEqual(r, len(holds), 12)
				for i, hold := range holds {
					want := min(time.Second<<i, 15*time.Minute)
					assert.GreaterOrEqual(r, hold, want/2, "hold %d", i+1)
					assert.LessOrEqual(r, hold, min(want*3/2, 15*time.Minute)+10*time.Millisecond, "hold %d", i+1)
				}
				assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue), "it is there after two hours")
			}, steadymqtest.WithVersion(v[0], v[1]))
		})
	}
}

func TestHoldsStayWithinWhatWasAsked(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return errAway },
			steadymq.WithRequeueDelay(10*time.Second, 40*time.Second))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(5 * time.Minute)
		for i, hold := range holdsOf(r) {
			want := min(10*time.Second<<i, 40*time.Second)
			assert.GreaterOrEqual(r, hold, want/2)
			assert.LessOrEqual(r, hold, 40*time.Second+10*time.Millisecond)
		}
	})
	for _, bad := range [][2]time.Duration{{0, time.Second}, {time.Second, 25 * time.Hour}, {2 * time.Second, time.Second}} {
		_, err := steadymq.New("amqp://h/", "q", steadymq.WithRequeueDelay(bad[0], bad[1]))
		var refused *steadymq.OptionError
		require.ErrorAs(t, err, &refused)
		assert.Equal(t, "WithRequeueDelay", refused.Option)
	}
}

func TestHoldsStayShortWhereNothingIsCounted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return errAway })
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(10 * time.Minute)
		assert.GreaterOrEqual(r, len(holdsOf(r)), 200)
		for _, hold := range holdsOf(r) {
			assert.LessOrEqual(r, hold, 3*time.Second+10*time.Millisecond)
		}
	})
}

func TestOutageOfADependencyLosesNothing(t *testing.T) {
	for _, v := range generations {
		for _, outage := range []time.Duration{45 * time.Second, time.Hour} {
			t.Run(fmt.Sprint(v, outage), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.RemakeQueue("quorum") // with RabbitMQ's own limit, 20 since 4.0
					back := time.Now().Add(outage)
					r.Consuming(func(context.Context, *steadymq.Delivery) error {
						if time.Now().Before(back) {
							return errAway
						}
						return nil
					})
					r.PublishMany(50, "m")
					r.Wait(outage + time.Hour)
					assert.EqualValues(r, 50, r.Consumer.Stats().Acked)
					assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
				}, steadymqtest.WithVersion(v[0], v[1]))
			})
		}
	}
}

// Streams.

// streaming consumes a stream of the queue's name.
func streaming(r *rig.Rig, h steadymq.Handler, options ...steadymq.Option) {
	r.RemakeQueue("stream")
	r.Consuming(h, append(rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"})), options...)...)
}

func TestStreamMessageIsTriedAgainInPlaceAfterTheSameHolds(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var tries []time.Time
		streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) != "bad" {
				return nil
			}
			tries = append(tries, time.Now())
			assert.Equal(r, len(tries), d.Attempt())
			d.DeliveryTag = 99 // it is the handler's to change
			if len(tries) < 7 {
				return errAway
			}
			return nil
		})
		r.Broker.Publish(rig.Queue, "good", "bad", "good", "good")
		r.Wait(2 * time.Second)
		assert.Equal(r, 1, len(r.Broker.Ledger().Settlements), "no ack overtakes it")
		r.Wait(5 * time.Minute)
		require.Len(r, tries, 7)
		for i := 1; i < len(tries); i++ {
			hold, want := tries[i].Sub(tries[i-1]), time.Second<<(i-1)
			assert.GreaterOrEqual(r, hold, want/2)
			assert.LessOrEqual(r, hold, want*3/2+20*time.Millisecond)
		}
		assert.Len(r, r.Broker.Ledger().Deliveries, 4, "the broker delivered each once")
		require.Len(r, r.Broker.Ledger().Settlements, 4)
		for i, s := range r.Broker.Ledger().Settlements {
			assert.EqualValues(r, i+1, s.Tag, "in the order of the stream")
		}
		stats := r.Consumer.Stats()
		assert.EqualValues(r, 4, stats.Acked)
		assert.EqualValues(r, 6, stats.Failed)
		assert.EqualValues(r, 1, stats.Sessions)
		assert.Equal(r, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale)
	})
}

func TestHandlerOfAStreamSaysWhenItIsTriedAgain(t *testing.T) {
	cases := []struct {
		name   string
		handle func(d *steadymq.Delivery) error
		tries  int
		after  time.Duration
	}{
		{"Requeue", func(*steadymq.Delivery) error { return steadymq.Requeue(errAway) }, 2, 10 * time.Millisecond},
		{"RequeueAfter", func(*steadymq.Delivery) error { return steadymq.RequeueAfter(errAway, time.Minute) }, 2, time.Minute + 10*time.Millisecond},
		{"Discard", func(*steadymq.Delivery) error { return steadymq.Discard(errAway) }, 1, 0},
		{"by hand", func(d *steadymq.Delivery) error { return d.Requeue() }, 2, 10 * time.Millisecond},
		{"by the driver's own Nack", func(d *steadymq.Delivery) error { return d.Nack(false, true) }, 2, 10 * time.Millisecond},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var tries []time.Time
				var kept *steadymq.Delivery
				streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
					if tries = append(tries, time.Now()); len(tries) == 1 {
						kept = d
						return c.handle(d)
					}
					assert.ErrorIs(r, kept.Ack(), steadymq.ErrSettled, "the try before cannot settle this one")
					return nil
				})
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(2 * time.Minute)
				require.Len(r, tries, c.tries)
				if c.tries > 1 {
					assert.InDelta(r, c.after, tries[1].Sub(tries[0]), float64(time.Millisecond))
				}
				assert.Len(r, r.Broker.Ledger().Settlements, 1)
				assert.Empty(r, r.Causes())
			})
		})
	}
}

func TestTriesInPlaceOccupyNoWorkerAndHonourTheConcurrency(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var running, most atomic.Int64
		streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
			n := running.Add(1)
			defer running.Add(-1)
			most.Store(max(most.Load(), n))
			time.Sleep(time.Second)
			if d.Attempt() < 3 {
				return errAway
			}
			return nil
		}, steadymq.WithConcurrency(2))
		r.PublishMany(20, "x")
		r.Wait(40 * time.Second)
		assert.EqualValues(r, 20, r.Consumer.Stats().Acked, "60 tries of a second by two workers, the holds cost them nothing")
		assert.EqualValues(r, 2, most.Load())
	})
}

func TestTriesInPlaceEndWithTheirSession(t *testing.T) {
	cases := map[string]func(r *rig.Rig){
		"lost":    func(r *rig.Rig) { r.Broker.Reset() },
		"stopped": func(r *rig.Rig) { require.NoError(r, r.Stop()) },
	}
	for name, end := range cases {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var sessions []uint64
				streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
					sessions = append(sessions, d.Session())
					if d.Session() > 1 {
						assert.Equal(r, 1, d.Attempt())
						return nil
					}
					return errAway
				}, steadymq.WithRequeueDelay(time.Minute, time.Hour))
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(time.Second)
				assert.Equal(r, 1, r.Consumer.Stats().Held)
				end(r)
				r.Wait(time.Hour)
				want := []uint64{1}
				if name == "lost" {
					want = []uint64{1, 2}
				}
				assert.Equal(r, want, sessions)
				stats := r.Consumer.Stats()
				assert.Zero(r, stats.Held)
				assert.Equal(r, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale)
				assert.EqualValues(r, len(want)-1, stats.Acked)
			})
		})
	}
}

// Handlers that are cut off.

func TestErrorOfAHandlerThatWasCutOffIsNoFailure(t *testing.T) {
	cases := map[string]func(r *rig.Rig){
		"session lost":    func(r *rig.Rig) { r.Broker.Reset() },
		"drain limit":     func(r *rig.Rig) { require.ErrorIs(r, r.Stop(), steadymq.ErrDrainTimeout) },
		"handler timeout": func(r *rig.Rig) { r.Wait(time.Minute) },
	}
	for name, end := range cases {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var failed atomic.Int64
				r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					if d.Redelivered {
						return nil
					}
					<-ctx.Done()
					return fmt.Errorf("query: %w", ctx.Err())
				}, steadymq.WithHandlerTimeout(time.Minute), steadymq.WithHooks(steadymq.Hooks{
					HandlerFailed: func(*steadymq.Delivery, error) { failed.Add(1) },
				}))
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(time.Second)
				end(r)
				r.Wait(time.Second)
				want := 0
				if name == "handler timeout" {
					want = 1
				}
				assert.EqualValues(r, want, failed.Load())
				assert.EqualValues(r, want, r.Consumer.Stats().Failed)
				assert.EqualValues(r, 1-want, r.Consumer.Stats().Stale, "it was left to the broker")
			})
		})
	}
}

func TestPanicOfAHandlerThatWasCutOffIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if !d.Redelivered {
				<-ctx.Done()
				panic("kaputt")
			}
			return nil
		})
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.EqualValues(r, 1, r.Consumer.Stats().Failed)
		assert.Contains(r, r.Log.String(), "kaputt")
	})
}

func TestHandlerThatStopsItsConsumerIsTheLast(t *testing.T) {
	for _, options := range [][]steadymq.Option{nil, rig.Options(steadymq.WithPrefetch(1)), rig.Options(steadymq.WithPrefetch(2))} {
		for _, takes := range []time.Duration{0, 5 * time.Millisecond} {
			for range 20 {
				rig.Bubble(t, func(r *rig.Rig) {
					r.PublishMany(20, "job")
					handled := 0
					r.Run(func(context.Context, *steadymq.Delivery) error {
						handled++
						time.Sleep(takes)
						r.Cancel() // this one and no other
						return nil
					}, options...)
					require.NoError(r, <-r.Result)
					r.Result = nil
					assert.Equal(r, 1, handled)
					r.Wait(time.Second)
					assert.Equal(r, 19, r.Broker.QueueLen(rig.Queue))
				})
			}
		}
	}
}

// The same beside real time: the broker's next message is there before Run knows.
func TestHandlerThatStopsItsConsumerIsTheLastInRealTime(t *testing.T) {
	for range 30 {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
		for range 20 {
			b.Publish(rig.Queue, "job")
		}
		ctx, cancel := context.WithCancel(t.Context())
		var handled atomic.Int64
		require.NoError(t, steadymq.Consume(ctx, b.URL, rig.Queue, func(context.Context, *steadymq.Delivery) error {
			handled.Add(1)
			cancel()
			return nil
		}, steadymq.WithDialer(b.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler))))
		assert.EqualValues(t, 1, handled.Load())
		b.Close()
	}
}

// Up to RabbitMQ 4.2 every way back to the queue counts towards the delivery limit.
func TestStopCostsWhatWasNotStartedOneDelivery(t *testing.T) {
	for range 20 {
		rig.Bubble(t, func(r *rig.Rig) {
			r.RemakeQueue("quorum")
			r.PublishMany(20, "job")
			r.Run(func(context.Context, *steadymq.Delivery) error { r.Cancel(); return nil })
			require.NoError(r, <-r.Result)
			r.Result = nil
			for _, m := range r.Broker.Ledger().Messages {
				assert.Equal(r, 1, m.Deliveries)
			}
		}, steadymqtest.WithVersion(4, 0))
	}
}

func TestDrainLimitFitsIntoTheGraceOfKubernetes(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		r.Consuming(rig.Hold(make(chan *steadymq.Delivery, 1), release))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		since := time.Now()
		var drain *steadymq.DrainError
		require.ErrorAs(r, r.Stop(), &drain)
		assert.Equal(r, 20*time.Second, drain.Limit)
		assert.Less(r, time.Since(since), 30*time.Second)
		close(release)
	})
}

// What is told.

func TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn(t *testing.T) {
	cases := []struct {
		kind       string
		bad, acked int
		told       int // within an hour
	}{
		{"classic", 15, 100, 0},
		{"classic", 31, 100, 6}, // at 0, 2, 4, 8, 16 and 32 minutes
		{"classic", 32, 0, 6},
		{"quorum", 32, 0, 6},
		{"stream", 1, 31, 6}, // done, but behind one that is not
	}
	for _, c := range cases {
		t.Run(fmt.Sprint(c.kind, c.bad), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue(c.kind)
				r.PublishMany(c.bad, "bad")
				r.PublishMany(100, "good")
				h := func(_ context.Context, d *steadymq.Delivery) error {
					if string(d.Body) == "bad" {
						return errAway
					}
					return nil
				}
				if c.kind == "stream" {
					r.Consuming(h, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
				} else {
					r.Consuming(h)
				}
				r.Wait(59 * time.Minute)
				stats := r.Consumer.Stats()
				assert.InDelta(r, c.bad, stats.Held, 5, "but for those on their way there and back")
				assert.EqualValues(r, c.acked, stats.Acked)
				assert.Equal(r, c.told, r.TimesLogged("failed messages are held"), r.Log)
				require.NoError(r, r.Stop())
				assert.Zero(r, r.Consumer.Stats().Held)
			})
		})
	}
}

func TestHeldMessagesOfManySessionsAreToldOnceAMinute(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.PublishMany(32, "bad")
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return errAway })
		for range 10 {
			r.Wait(12 * time.Second)
			r.Broker.Reset()
		}
		assert.Equal(r, 2, r.TimesLogged("failed messages are held"))
	})
}

func TestHandlerPastItsTimeoutIsToldAndCounted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "deaf" {
				time.Sleep(30 * time.Second)
			}
			return nil
		}, steadymq.WithHandlerTimeout(10*time.Second), steadymq.WithConcurrency(4))
		r.PublishMany(3, "deaf")
		r.PublishMany(20, "good")
		r.Wait(10 * time.Second)
		assert.Zero(r, r.Consumer.Stats().Overdue, "a handler gets a moment to return in")
		r.Wait(2 * time.Second)
		assert.Equal(r, 3, r.Consumer.Stats().Overdue)
		r.Wait(20 * time.Second)
		assert.Zero(r, r.Consumer.Stats().Overdue)
		assert.Equal(r, 1, r.TimesLogged("running past its timeout"))
	})
}

func TestHandlerThatSettledAndThenFailedIsTold(t *testing.T) {
	cases := []struct {
		name   string
		handle func(d *steadymq.Delivery) error
		told   int
	}{
		{"acked", func(d *steadymq.Delivery) error { _ = d.Ack(); return errAway }, 1},
		{"discarded", func(d *steadymq.Delivery) error { _ = d.Discard(); return errAway }, 1},
		{"discarded twice", func(d *steadymq.Delivery) error { _ = d.Discard(); return steadymq.Discard(errAway) }, 0},
		{"put back", func(d *steadymq.Delivery) error {
			if d.Redelivered {
				return nil
			}
			_ = d.Requeue()
			return errAway
		}, 0},
		{"no error", func(d *steadymq.Delivery) error { _ = d.Ack(); return nil }, 0},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error { return c.handle(d) })
				r.PublishMany(50, "x")
				r.Wait(500 * time.Millisecond)
				assert.Equal(r, c.told, r.TimesLogged("settled its message by itself"))
				if c.told == 0 {
					return
				}
				r.Wait(time.Second)
				r.PublishMany(1, "x")
				r.Wait(time.Second)
				assert.Equal(r, 1, r.TimesLogged("suppressed=49"))
			})
		})
	}
}

func TestHandlersTooSlowForThePrefetchAreToldBeforeTheConsumerTimeout(t *testing.T) {
	cases := []struct {
		name    string
		takes   time.Duration
		within  time.Duration
		told    int
		options []steadymq.Option
	}{
		{"too slow", time.Minute, 19 * time.Minute, 1, nil},
		{"slow", 25 * time.Second, 2 * time.Hour, 0, nil},
		{"enough workers", time.Minute, 2 * time.Hour, 0, rig.Options(steadymq.WithConcurrency(4))},
		{"a longer timeout", time.Minute, 2 * time.Hour, 0, rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": int64(2 * time.Hour / 1e6)}))},
		{"a shorter timeout", 10 * time.Second, 5 * time.Minute, 1, rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": int64(7 * time.Minute / 1e6)}))},
		{"of the queue", 10 * time.Second, 5 * time.Minute, 1, rig.Options(steadymq.WithQueue(steadymq.Queue{
			Type: "classic", Args: amqp.Table{"x-consumer-timeout": int64(7 * time.Minute / 1e6)},
		}))},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeleteQueue(rig.Queue)
				if c.name != "of the queue" {
					r.RemakeQueue("classic")
				}
				r.Consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(c.takes); return nil }, c.options...)
				r.PublishMany(2000, "x")
				r.Wait(c.within)
				assert.Equal(r, c.told, r.TimesLogged("lower WithPrefetch"))
				r.Wait(time.Hour)
				assert.Equal(r, c.told, r.TimesLogged("lower WithPrefetch"), "once")
				r.Cancel()
				synctest.Wait()
			}, steadymqtest.WithConsumerTimeout(24*time.Hour, steadymqtest.FormOfVersion))
		})
	}
}

func TestOneHeldMessageOfAStreamThatStopsItIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "bad" {
				return steadymq.RequeueAfter(errAway, 2*time.Hour)
			}
			return nil
		})
		r.Broker.Publish(rig.Queue, "bad")
		r.Wait(time.Second)
		r.PublishMany(100, "good")
		r.Wait(time.Hour)
		require.EqualValues(r, 32, r.Consumer.Stats().Delivered, "the stream stands still")
		assert.NotZero(r, r.TimesLogged("failed messages are held"))
	})
}

func TestHeldMessageThatIsSettledByHandIsHeldNoMore(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		got := make(chan *steadymq.Delivery, 1)
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			got <- d
			return steadymq.RequeueAfter(nil, time.Hour)
		}, steadymq.WithPrefetch(1))
		r.Broker.Publish(rig.Queue, "tea")
		require.NoError(r, (<-got).Ack())
		r.Wait(10 * time.Minute)
		assert.Zero(r, r.Consumer.Stats().Held)
		assert.LessOrEqual(r, r.TimesLogged("failed messages are held"), 1, "it is told for hours")
	})
}

func TestFailureAtTheDrainSaysWhatBecameOfTheMessage(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			_ = rig.Hold(started, release)(ctx, d)
			return errAway
		})
		r.Broker.Publish(rig.Queue, "tea")
		<-started
		r.Cancel()
		r.Wait(time.Second)
		close(release)
		r.Stop()
		line := r.Warnings("handler failed")
		require.Len(r, line, 1)
		assert.NotContains(r, line[0], "held=", "it went back at once")
		assert.Contains(r, line[0], "outcome=requeued")
	})
}

func TestWarningOfHeldMessagesSaysSinceWhenTheyAreTooMany(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			switch {
			case string(d.Body) == "bad":
				return steadymq.RequeueAfter(errAway, time.Hour)
			case !d.Redelivered:
				return steadymq.RequeueAfter(errAway, 5*time.Second)
			}
			return nil
		}, steadymq.WithPrefetch(4))
		r.PublishMany(2, "soon well")
		r.Wait(110 * time.Second)
		require.Zero(r, r.Consumer.Stats().Held)
		again := time.Now()
		r.PublishMany(2, "bad")
		r.Wait(5 * time.Minute)
		lines := r.Warnings("failed messages are held")
		require.Greater(r, len(lines), 1)
		_, since, _ := strings.Cut(lines[len(lines)-1], "since=")
		at, err := time.Parse(time.RFC3339, strings.TrimSpace(since))
		require.NoError(r, err)
		assert.WithinRange(r, at, again, again.Add(time.Second), "for 105 s nothing was held")
	})
}
