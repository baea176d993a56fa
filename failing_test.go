package steadymq_test

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
	"github.com/steadymq/steadymq/steadymqtest"
)

var errAway = errors.New("the database is away")

// generations are the versions of RabbitMQ that count deliveries differently.
var generations = [][2]int{{3, 10}, {4, 0}, {4, 3}}

// of makes the queue one of another kind.
func (b *bench) of(kind string) {
	b.broker.DeleteQueue(queue)
	b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{Type: kind})
}

// holds returns how long each delivery was held before it went back.
func (b *bench) holds() (all []time.Duration) {
	for _, d := range b.broker.Ledger().Deliveries {
		if d.Kind == steadymqtest.Reject && d.Requeue {
			all = append(all, d.Settled.Sub(d.Time))
		}
	}
	return all
}

// publish puts n messages into the queue.
func (b *bench) publish(n int, body string) {
	for range n {
		b.broker.Publish(queue, body)
	}
}

func TestFailedMessageIsHeldTwiceAsLongEachTime(t *testing.T) {
	for _, v := range generations {
		t.Run(fmt.Sprint(v), func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.of("quorum")
				b.consuming(func(context.Context, *steadymq.Delivery) error { return errAway })
				b.broker.Publish(queue, "x")
				b.wait(2 * time.Hour)
				holds := b.holds()
				require.GreaterOrEqual(b, len(holds), 12)
				for i, hold := range holds {
					want := min(time.Second<<i, 15*time.Minute)
					assert.GreaterOrEqual(b, hold, want/2, "hold %d", i+1)
					assert.LessOrEqual(b, hold, min(want*3/2, 15*time.Minute)+10*time.Millisecond, "hold %d", i+1)
				}
				assert.Equal(b, 1, b.broker.QueueLen(queue)+b.broker.Unsettled(queue), "it is there after two hours")
			}, steadymqtest.WithVersion(v[0], v[1]))
		})
	}
}

func TestHoldsStayWithinWhatWasAsked(t *testing.T) {
	bubble(t, func(b *bench) {
		b.of("quorum")
		b.consuming(func(context.Context, *steadymq.Delivery) error { return errAway },
			steadymq.WithRequeueDelay(10*time.Second, 40*time.Second))
		b.broker.Publish(queue, "x")
		b.wait(5 * time.Minute)
		for i, hold := range b.holds() {
			want := min(10*time.Second<<i, 40*time.Second)
			assert.GreaterOrEqual(b, hold, want/2)
			assert.LessOrEqual(b, hold, 40*time.Second+10*time.Millisecond)
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
	bubble(t, func(b *bench) {
		b.consuming(func(context.Context, *steadymq.Delivery) error { return errAway })
		b.broker.Publish(queue, "x")
		b.wait(10 * time.Minute)
		assert.GreaterOrEqual(b, len(b.holds()), 200)
		for _, hold := range b.holds() {
			assert.LessOrEqual(b, hold, 3*time.Second+10*time.Millisecond)
		}
	})
}

func TestOutageOfADependencyLosesNothing(t *testing.T) {
	for _, v := range generations {
		for _, outage := range []time.Duration{45 * time.Second, time.Hour} {
			t.Run(fmt.Sprint(v, outage), func(t *testing.T) {
				bubble(t, func(b *bench) {
					b.of("quorum") // with RabbitMQ's own limit, 20 since 4.0
					back := time.Now().Add(outage)
					b.consuming(func(context.Context, *steadymq.Delivery) error {
						if time.Now().Before(back) {
							return errAway
						}
						return nil
					})
					b.publish(50, "m")
					b.wait(outage + time.Hour)
					assert.EqualValues(b, 50, b.consumer.Stats().Acked)
					assert.Zero(b, b.broker.QueueLen(queue)+b.broker.Unsettled(queue))
				}, steadymqtest.WithVersion(v[0], v[1]))
			})
		}
	}
}

// Streams.

// streaming consumes a stream of the queue's name.
func (b *bench) streaming(h steadymq.Handler, options ...steadymq.Option) {
	b.of("stream")
	b.consuming(h, append(opts(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"})), options...)...)
}

func TestStreamMessageIsTriedAgainInPlaceAfterTheSameHolds(t *testing.T) {
	bubble(t, func(b *bench) {
		var tries []time.Time
		b.streaming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) != "bad" {
				return nil
			}
			tries = append(tries, time.Now())
			assert.Equal(b, len(tries), d.Attempt())
			d.DeliveryTag = 99 // it is the handler's to change
			if len(tries) < 7 {
				return errAway
			}
			return nil
		})
		b.broker.Publish(queue, "good", "bad", "good", "good")
		b.wait(2 * time.Second)
		assert.Equal(b, 1, len(b.broker.Ledger().Settlements), "no ack overtakes it")
		b.wait(5 * time.Minute)
		require.Len(b, tries, 7)
		for i := 1; i < len(tries); i++ {
			hold, want := tries[i].Sub(tries[i-1]), time.Second<<(i-1)
			assert.GreaterOrEqual(b, hold, want/2)
			assert.LessOrEqual(b, hold, want*3/2+20*time.Millisecond)
		}
		assert.Len(b, b.broker.Ledger().Deliveries, 4, "the broker delivered each once")
		require.Len(b, b.broker.Ledger().Settlements, 4)
		for i, s := range b.broker.Ledger().Settlements {
			assert.EqualValues(b, i+1, s.Tag, "in the order of the stream")
		}
		stats := b.consumer.Stats()
		assert.EqualValues(b, 4, stats.Acked)
		assert.EqualValues(b, 6, stats.Failed)
		assert.EqualValues(b, 1, stats.Sessions)
		assert.Equal(b, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale)
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
			bubble(t, func(b *bench) {
				var tries []time.Time
				var kept *steadymq.Delivery
				b.streaming(func(_ context.Context, d *steadymq.Delivery) error {
					if tries = append(tries, time.Now()); len(tries) == 1 {
						kept = d
						return c.handle(d)
					}
					assert.ErrorIs(b, kept.Ack(), steadymq.ErrSettled, "the try before cannot settle this one")
					return nil
				})
				b.broker.Publish(queue, "x")
				b.wait(2 * time.Minute)
				require.Len(b, tries, c.tries)
				if c.tries > 1 {
					assert.InDelta(b, c.after, tries[1].Sub(tries[0]), float64(time.Millisecond))
				}
				assert.Len(b, b.broker.Ledger().Settlements, 1)
				assert.Empty(b, b.causes())
			})
		})
	}
}

func TestTriesInPlaceOccupyNoWorkerAndHonourTheConcurrency(t *testing.T) {
	bubble(t, func(b *bench) {
		var running, most atomic.Int64
		b.streaming(func(_ context.Context, d *steadymq.Delivery) error {
			n := running.Add(1)
			defer running.Add(-1)
			most.Store(max(most.Load(), n))
			time.Sleep(time.Second)
			if d.Attempt() < 3 {
				return errAway
			}
			return nil
		}, steadymq.WithConcurrency(2))
		b.publish(20, "x")
		b.wait(40 * time.Second)
		assert.EqualValues(b, 20, b.consumer.Stats().Acked, "60 tries of a second by two workers, the holds cost them nothing")
		assert.EqualValues(b, 2, most.Load())
	})
}

func TestTriesInPlaceEndWithTheirSession(t *testing.T) {
	cases := map[string]func(b *bench){
		"lost":    func(b *bench) { b.broker.Reset() },
		"stopped": func(b *bench) { require.NoError(b, b.stop()) },
	}
	for name, end := range cases {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				var sessions []uint64
				b.streaming(func(_ context.Context, d *steadymq.Delivery) error {
					sessions = append(sessions, d.Session())
					if d.Session() > 1 {
						assert.Equal(b, 1, d.Attempt())
						return nil
					}
					return errAway
				}, steadymq.WithRequeueDelay(time.Minute, time.Hour))
				b.broker.Publish(queue, "x")
				b.wait(time.Second)
				assert.Equal(b, 1, b.consumer.Stats().Held)
				end(b)
				b.wait(time.Hour)
				want := []uint64{1}
				if name == "lost" {
					want = []uint64{1, 2}
				}
				assert.Equal(b, want, sessions)
				stats := b.consumer.Stats()
				assert.Zero(b, stats.Held)
				assert.Equal(b, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale)
				assert.EqualValues(b, len(want)-1, stats.Acked)
			})
		})
	}
}

// Handlers that are cut off.

func TestErrorOfAHandlerThatWasCutOffIsNoFailure(t *testing.T) {
	cases := map[string]func(b *bench){
		"session lost":    func(b *bench) { b.broker.Reset() },
		"drain limit":     func(b *bench) { require.ErrorIs(b, b.stop(), steadymq.ErrDrainTimeout) },
		"handler timeout": func(b *bench) { b.wait(time.Minute) },
	}
	for name, end := range cases {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				var failed atomic.Int64
				b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					if d.Redelivered {
						return nil
					}
					<-ctx.Done()
					return fmt.Errorf("query: %w", ctx.Err())
				}, steadymq.WithHandlerTimeout(time.Minute), steadymq.WithHooks(steadymq.Hooks{
					HandlerFailed: func(*steadymq.Delivery, error) { failed.Add(1) },
				}))
				b.broker.Publish(queue, "x")
				b.wait(time.Second)
				end(b)
				b.wait(time.Second)
				want := 0
				if name == "handler timeout" {
					want = 1
				}
				assert.EqualValues(b, want, failed.Load())
				assert.EqualValues(b, want, b.consumer.Stats().Failed)
				assert.EqualValues(b, 1-want, b.consumer.Stats().Stale, "it was left to the broker")
			})
		})
	}
}

func TestPanicOfAHandlerThatWasCutOffIsTold(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if !d.Redelivered {
				<-ctx.Done()
				panic("kaputt")
			}
			return nil
		})
		b.broker.Publish(queue, "x")
		b.wait(time.Second)
		b.broker.Reset()
		b.wait(time.Second)
		assert.EqualValues(b, 1, b.consumer.Stats().Failed)
		assert.Contains(b, b.log.String(), "kaputt")
	})
}

func TestHandlerThatStopsItsConsumerIsTheLast(t *testing.T) {
	for _, options := range [][]steadymq.Option{nil, opts(steadymq.WithPrefetch(1)), opts(steadymq.WithPrefetch(2))} {
		for _, takes := range []time.Duration{0, 5 * time.Millisecond} {
			for range 20 {
				bubble(t, func(b *bench) {
					b.publish(20, "job")
					handled := 0
					b.run(func(context.Context, *steadymq.Delivery) error {
						handled++
						time.Sleep(takes)
						b.stopRun() // this one and no other
						return nil
					}, options...)
					require.NoError(b, <-b.result)
					b.result = nil
					assert.Equal(b, 1, handled)
					b.wait(time.Second)
					assert.Equal(b, 19, b.broker.QueueLen(queue))
				})
			}
		}
	}
}

// The same beside real time: the broker's next message is there before Run knows.
func TestHandlerThatStopsItsConsumerIsTheLastInRealTime(t *testing.T) {
	for range 30 {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue(queue, steadymqtest.QueueOptions{})
		for range 20 {
			b.Publish(queue, "job")
		}
		ctx, cancel := context.WithCancel(t.Context())
		var handled atomic.Int64
		require.NoError(t, steadymq.Consume(ctx, b.URL, queue, func(context.Context, *steadymq.Delivery) error {
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
		bubble(t, func(b *bench) {
			b.of("quorum")
			b.publish(20, "job")
			b.run(func(context.Context, *steadymq.Delivery) error { b.stopRun(); return nil })
			require.NoError(b, <-b.result)
			b.result = nil
			for _, m := range b.broker.Ledger().Messages {
				assert.Equal(b, 1, m.Deliveries)
			}
		}, steadymqtest.WithVersion(4, 0))
	}
}

func TestDrainLimitFitsIntoTheGraceOfKubernetes(t *testing.T) {
	bubble(t, func(b *bench) {
		release := make(chan struct{})
		b.consuming(hold(make(chan *steadymq.Delivery, 1), release))
		b.broker.Publish(queue, "x")
		b.wait(time.Second)
		since := time.Now()
		var drain *steadymq.DrainError
		require.ErrorAs(b, b.stop(), &drain)
		assert.Equal(b, 20*time.Second, drain.Limit)
		assert.Less(b, time.Since(since), 30*time.Second)
		close(release)
	})
}

// What is told.

// told counts the lines of the log that hold text.
func (b *bench) told(text string) int {
	return strings.Count(b.log.String(), text)
}

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
			bubble(t, func(b *bench) {
				b.of(c.kind)
				b.publish(c.bad, "bad")
				b.publish(100, "good")
				h := func(_ context.Context, d *steadymq.Delivery) error {
					if string(d.Body) == "bad" {
						return errAway
					}
					return nil
				}
				if c.kind == "stream" {
					b.consuming(h, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
				} else {
					b.consuming(h)
				}
				b.wait(59 * time.Minute)
				stats := b.consumer.Stats()
				assert.InDelta(b, c.bad, stats.Held, 5, "but for those on their way there and back")
				assert.EqualValues(b, c.acked, stats.Acked)
				assert.Equal(b, c.told, b.told("failed messages are held"), b.log)
				require.NoError(b, b.stop())
				assert.Zero(b, b.consumer.Stats().Held)
			})
		})
	}
}

func TestHeldMessagesOfManySessionsAreToldOnceAMinute(t *testing.T) {
	bubble(t, func(b *bench) {
		b.publish(32, "bad")
		b.consuming(func(context.Context, *steadymq.Delivery) error { return errAway })
		for range 10 {
			b.wait(12 * time.Second)
			b.broker.Reset()
		}
		assert.Equal(b, 2, b.told("failed messages are held"))
	})
}

func TestHandlerPastItsTimeoutIsToldAndCounted(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "deaf" {
				time.Sleep(30 * time.Second)
			}
			return nil
		}, steadymq.WithHandlerTimeout(10*time.Second), steadymq.WithConcurrency(4))
		b.publish(3, "deaf")
		b.publish(20, "good")
		b.wait(10 * time.Second)
		assert.Zero(b, b.consumer.Stats().Overdue, "a handler gets a moment to return in")
		b.wait(2 * time.Second)
		assert.Equal(b, 3, b.consumer.Stats().Overdue)
		b.wait(20 * time.Second)
		assert.Zero(b, b.consumer.Stats().Overdue)
		assert.Equal(b, 1, b.told("running past its timeout"))
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
			bubble(t, func(b *bench) {
				b.consuming(func(_ context.Context, d *steadymq.Delivery) error { return c.handle(d) })
				b.publish(50, "x")
				b.wait(500 * time.Millisecond)
				assert.Equal(b, c.told, b.told("settled its message by itself"))
				if c.told == 0 {
					return
				}
				b.wait(time.Second)
				b.publish(1, "x")
				b.wait(time.Second)
				assert.Equal(b, 1, b.told("suppressed=49"))
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
		{"enough workers", time.Minute, 2 * time.Hour, 0, opts(steadymq.WithConcurrency(4))},
		{"a longer timeout", time.Minute, 2 * time.Hour, 0, opts(steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": int64(2 * time.Hour / 1e6)}))},
		{"a shorter timeout", 10 * time.Second, 5 * time.Minute, 1, opts(steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": int64(7 * time.Minute / 1e6)}))},
		{"of the queue", 10 * time.Second, 5 * time.Minute, 1, opts(steadymq.WithQueue(steadymq.Queue{
			Type: "classic", Args: amqp.Table{"x-consumer-timeout": int64(7 * time.Minute / 1e6)},
		}))},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.DeleteQueue(queue)
				if c.name != "of the queue" {
					b.of("classic")
				}
				b.consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(c.takes); return nil }, c.options...)
				b.publish(2000, "x")
				b.wait(c.within)
				assert.Equal(b, c.told, b.told("lower WithPrefetch"))
				b.wait(time.Hour)
				assert.Equal(b, c.told, b.told("lower WithPrefetch"), "once")
				b.stopRun()
				synctest.Wait()
			}, steadymqtest.WithConsumerTimeout(24*time.Hour, steadymqtest.FormOfVersion))
		})
	}
}

func TestOneHeldMessageOfAStreamThatStopsItIsTold(t *testing.T) {
	bubble(t, func(b *bench) {
		b.streaming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "bad" {
				return steadymq.RequeueAfter(errAway, 2*time.Hour)
			}
			return nil
		})
		b.broker.Publish(queue, "bad")
		b.wait(time.Second)
		b.publish(100, "good")
		b.wait(time.Hour)
		require.EqualValues(b, 32, b.consumer.Stats().Delivered, "the stream stands still")
		assert.NotZero(b, b.told("failed messages are held"))
	})
}

func TestHeldMessageThatIsSettledByHandIsHeldNoMore(t *testing.T) {
	bubble(t, func(b *bench) {
		got := make(chan *steadymq.Delivery, 1)
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			got <- d
			return steadymq.RequeueAfter(nil, time.Hour)
		}, steadymq.WithPrefetch(1))
		b.broker.Publish(queue, "tea")
		require.NoError(b, (<-got).Ack())
		b.wait(10 * time.Minute)
		assert.Zero(b, b.consumer.Stats().Held)
		assert.LessOrEqual(b, b.told("failed messages are held"), 1, "it is told for hours")
	})
}

func TestFailureAtTheDrainSaysWhatBecameOfTheMessage(t *testing.T) {
	bubble(t, func(b *bench) {
		started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
		b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			_ = hold(started, release)(ctx, d)
			return errAway
		})
		b.broker.Publish(queue, "tea")
		<-started
		b.stopRun()
		b.wait(time.Second)
		close(release)
		b.stop()
		line := b.warnings("handler failed")
		require.Len(b, line, 1)
		assert.NotContains(b, line[0], "held=", "it went back at once")
		assert.Contains(b, line[0], "outcome=requeued")
	})
}

func TestWarningOfHeldMessagesSaysSinceWhenTheyAreTooMany(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			switch {
			case string(d.Body) == "bad":
				return steadymq.RequeueAfter(errAway, time.Hour)
			case !d.Redelivered:
				return steadymq.RequeueAfter(errAway, 5*time.Second)
			}
			return nil
		}, steadymq.WithPrefetch(4))
		b.publish(2, "soon well")
		b.wait(110 * time.Second)
		require.Zero(b, b.consumer.Stats().Held)
		again := time.Now()
		b.publish(2, "bad")
		b.wait(5 * time.Minute)
		lines := b.warnings("failed messages are held")
		require.Greater(b, len(lines), 1)
		_, since, _ := strings.Cut(lines[len(lines)-1], "since=")
		at, err := time.Parse(time.RFC3339, strings.TrimSpace(since))
		require.NoError(b, err)
		assert.WithinRange(b, at, again, again.Add(time.Second), "for 105 s nothing was held")
	})
}
