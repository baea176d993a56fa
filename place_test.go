package steadymq_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// beginning is what a stream consumer asks for, and what it is given of a stream that holds
// "old 0" to "old 2", three hours old, and "old 3", ten minutes old.
type beginning struct {
	name   string
	offset func() any
	old    []string
}

var beginnings = []beginning{
	{"default", func() any { return nil }, nil},
	{"next", func() any { return "next" }, nil},
	{"last", func() any { return "last" }, []string{"old 3"}},
	{"first", func() any { return "first" }, []string{"old 0", "old 1", "old 2", "old 3"}},
	{"number", func() any { return 2 }, []string{"old 2", "old 3"}},
	{"interval", func() any { return "15m" }, []string{"old 3"}},
	{"interval without messages", func() any { return "30s" }, nil},
	{"interval of thousands of years", func() any { return "9000Y" }, []string{"old 0", "old 1", "old 2", "old 3"}},
	{"time", func() any { return time.Now().Add(-time.Hour) }, []string{"old 3"}},
	{"time now", func() any { return time.Now() }, nil},
	{"time to come", func() any { return time.Now().Add(time.Hour) }, nil},
}

// options name the stream as one; x-stream-offset does, and WithQueue does where there is none.
func (g beginning) options() []steadymq.Option {
	if at := g.offset(); at != nil {
		return opts(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": at}))
	}
	return opts(steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
}

// quiet consumes a stream to which nothing has been published for ten minutes.
func (b *bench) quiet(g beginning, options ...steadymq.Option) *[]string {
	b.Helper()
	b.of("stream")
	b.wait(time.Hour)
	b.broker.Publish(queue, "old 0", "old 1", "old 2")
	b.wait(3 * time.Hour)
	b.broker.Publish(queue, "old 3")
	b.wait(10 * time.Minute)
	handled := new([]string)
	b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
		*handled = append(*handled, string(d.Body))
		return nil
	}, append(g.options(), options...)...)
	b.wait(time.Minute)
	require.Equal(b, g.old, *handled)
	return handled
}

// publishAway loses the connection, and publishes before it can be opened again.
func (b *bench) publishAway(d time.Duration, bodies ...string) {
	b.broker.Refuse(true)
	b.broker.Reset()
	b.broker.Publish(queue, bodies...)
	b.wait(d)
	b.broker.Refuse(false)
	b.wait(time.Minute)
}

func TestQuietStreamSkipsNothingThatIsPublishedWhileAway(t *testing.T) {
	for _, g := range beginnings {
		t.Run(g.name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				handled := b.quiet(g)
				b.publishAway(20*time.Minute, "while", "away") // longer than the intervals
				b.broker.Publish(queue, "after")
				b.wait(time.Minute)
				assert.Equal(b, append(slices.Clone(g.old), "while", "away", "after"), *handled)
			})
		})
	}
}

func TestEmptyStreamSkipsNothingThatIsPublishedWhileAway(t *testing.T) {
	for _, g := range beginnings {
		if g.name == "number" {
			continue
		}
		t.Run(g.name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				handled := b.reading(g.options()...)
				b.publishAway(20*time.Minute, "while away 0", "while away 1") // longer than the intervals
				b.publishAway(time.Minute, "while away 2")
				b.broker.Publish(queue, "after")
				b.wait(time.Minute)
				assert.Equal(b, []string{"while away 0", "while away 1", "while away 2", "after"}, *handled)
			})
		})
	}
}

func TestQuietStreamThatIsMadeAnewIsReadFromItsBeginning(t *testing.T) {
	for _, g := range beginnings {
		for _, declared := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, declared by us: %t", g.name, declared), func(t *testing.T) {
				bubble(t, func(b *bench) {
					var options []steadymq.Option
					if declared {
						options = opts(steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
					}
					handled := b.quiet(g, options...)
					b.broker.DeleteQueue(queue)
					b.wait(2 * time.Second)
					b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{Type: "stream"}) // where nobody else did
					b.broker.Publish(queue, "new 0", "new 1")
					b.wait(time.Minute)
					b.broker.Publish(queue, "new 2")
					b.wait(time.Minute)
					assert.Equal(b, append(slices.Clone(g.old), "new 0", "new 1", "new 2"), *handled)
				})
			})
		}
	}
}

func TestStreamMadeAnewIsReadFromItsBeginningAlsoByWhoWaitsForAMessageOfTheFuture(t *testing.T) {
	bubble(t, func(b *bench) {
		handled := b.reading(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": 5}))
		b.broker.Publish(queue, "old 0", "old 1")
		b.wait(time.Minute)
		b.broker.DeleteQueue(queue)
		b.wait(2 * time.Second)
		b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{Type: "stream"})
		b.broker.Publish(queue, "new 0", "new 1")
		b.wait(time.Minute)
		assert.Equal(b, []string{"new 0", "new 1"}, *handled)
	})
}

// The first message may be anywhere when the session is lost: on the wire, in the buffer, with a
// handler.
func TestStreamSkipsNothingBehindAFirstMessageThatIsUnderWay(t *testing.T) {
	for _, g := range beginnings {
		for late := time.Duration(0); late < 8*time.Millisecond; late += time.Millisecond {
			t.Run(fmt.Sprint(g.name, ", lost after ", late), func(t *testing.T) {
				bubble(t, func(b *bench) {
					b.broker.SetLatency(2 * time.Millisecond)
					b.of("stream")
					if g.name == "number" {
						b.broker.Publish(queue, "old 0", "old 1")
					}
					var handled []string
					b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
						select {
						case <-time.After(4 * time.Millisecond):
						case <-ctx.Done():
							return ctx.Err()
						}
						handled = append(handled, string(d.Body))
						return nil
					}, g.options()...)
					b.wait(10 * time.Minute)
					b.broker.Publish(queue, "first", "second")
					b.wait(late)
					b.publishAway(time.Minute, "while", "away")
					assert.Subset(b, handled, []string{"first", "second", "while", "away"})
					assert.True(b, slices.IsSorted(indexes(handled)), "in order: %v", handled)
				})
			})
		}
	}
}

// indexes are the places of the last time each message was handled.
func indexes(handled []string) (all []int) {
	seen := slices.Clone(handled)
	for _, want := range []string{"first", "second", "while", "away"} {
		slices.Reverse(seen)
		all = append(all, len(seen)-slices.Index(seen, want))
		slices.Reverse(seen)
	}
	return all
}

// Whenever the set-up is cut: what is published once the consumer has said that it is consuming is
// handled, and what was there before is not.
func TestStreamSetUpMayBeCutAnywhere(t *testing.T) {
	cuts := map[string]func(*bench){
		"reset":    func(b *bench) { b.broker.Reset() },
		"silence":  func(b *bench) { b.broker.Silence() },
		"channels": func(b *bench) { b.broker.CloseChannels(541, "INTERNAL_ERROR") },
		"cancel":   func(b *bench) { b.broker.CancelConsumers(queue) },
	}
	for _, g := range []beginning{beginnings[1], beginnings[2], {"interval", func() any { return "15m" }, []string{"old"}}} {
		for name, cut := range cuts {
			for late := time.Duration(0); late < 70*time.Millisecond; late += time.Millisecond {
				t.Run(fmt.Sprint(g.name, ", ", name, " after ", late), func(t *testing.T) {
					bubble(t, func(b *bench) {
						b.of("stream")
						b.broker.Publish(queue, "old")
						b.wait(10 * time.Minute)
						var handled []string
						b.run(func(_ context.Context, d *steadymq.Delivery) error {
							handled = append(handled, string(d.Body))
							return nil
						}, g.options()...)
						b.wait(late)
						consuming := b.consumer.State() == steadymq.Consuming
						there := consuming || len(b.broker.Consumers(queue)) > 0
						cut(b)
						b.broker.Publish(queue, "while")
						b.wait(2 * time.Minute)
						b.broker.Publish(queue, "after")
						b.wait(time.Minute)
						want := []string{"while", "after"}
						if !there && len(handled) == 1 { // it has not begun before
							want = want[1:]
						}
						if g.name == "interval" || g.name == "last" && (consuming || handled[0] == "old") {
							want = slices.Insert(want, 0, "old")
						}
						assert.Equal(b, want, firsts(handled))
					})
				})
			}
		}
	}
}

func TestEmptyStreamMayCancelTheConsumerThatLooksForItsEnd(t *testing.T) {
	for _, g := range beginnings[:3] {
		for late := time.Duration(0); late < 80*time.Millisecond; late += time.Millisecond {
			t.Run(fmt.Sprint(g.name, ", cancelled after ", late), func(t *testing.T) {
				bubble(t, func(b *bench) {
					b.of("stream")
					var handled []string
					b.run(func(_ context.Context, d *steadymq.Delivery) error {
						handled = append(handled, string(d.Body))
						return nil
					}, g.options()...)
					b.wait(late)
					there := b.broker.CancelConsumers(queue) > 0
					b.broker.Publish(queue, "1", "2")
					b.wait(time.Minute)
					if there && (g.name != "last" || late < 40*time.Millisecond) { // after that it has done looking, and may not consume yet
						assert.Equal(b, []string{"1", "2"}, handled)
					}
				})
			})
		}
	}
}

func TestLastMessageOfAStreamIsGivenAlsoIfTheSetUpWasCut(t *testing.T) {
	for late := time.Duration(0); late < 40*time.Millisecond; late += time.Millisecond {
		t.Run(late.String(), func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.of("stream")
				b.broker.Publish(queue, "old", "last")
				b.wait(time.Hour)
				var handled []string
				b.run(func(_ context.Context, d *steadymq.Delivery) error {
					handled = append(handled, string(d.Body))
					return nil
				}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "last"}))
				b.wait(late)
				b.broker.Reset()
				b.wait(time.Minute)
				b.broker.Publish(queue, "new")
				b.wait(time.Minute)
				assert.Equal(b, []string{"last", "new"}, handled)
			})
		})
	}
}

// Where nothing tells the place, it is by the clock; but not for the session that has just asked.
func TestIntervalWithoutMessagesBeginsWithTheNext(t *testing.T) {
	bubble(t, func(b *bench) {
		b.of("stream")
		b.broker.Publish(queue, "old")
		b.wait(time.Minute)
		var handled []string
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			handled = append(handled, string(d.Body))
			return nil
		}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "30s"}))
		b.wait(time.Minute)
		b.broker.Publish(queue, "new")
		b.wait(time.Minute)
		assert.Equal(b, []string{"new"}, handled)
	})
}

// Nothing was promised to a consumer that the broker did not take.
func TestNextIsThatOfTheFirstSubscriptionTheBrokerTook(t *testing.T) {
	bubble(t, func(b *bench) {
		b.of("stream")
		b.broker.RefuseConsume(403, "access to queue 'orders' in vhost '/' refused for user 'app'")
		var handled []string
		b.run(func(_ context.Context, d *steadymq.Delivery) error {
			handled = append(handled, string(d.Body))
			return nil
		}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "next"}), steadymq.WithFatal(func(error) bool { return false }))
		b.wait(time.Minute)
		b.broker.Publish(queue, "before")
		b.broker.Heal()
		b.wait(time.Minute)
		b.broker.Publish(queue, "after")
		b.wait(time.Minute)
		assert.Equal(b, []string{"after"}, handled)
	})
}

// A test, or an operator, may take the first consumer that the broker shows for the subscription.
func TestStreamSkipsNothingOnceTheBrokerShowsItsConsumer(t *testing.T) {
	for _, g := range beginnings[:3] {
		t.Run(g.name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.of("stream")
				var handled []string
				b.run(func(_ context.Context, d *steadymq.Delivery) error {
					handled = append(handled, string(d.Body))
					return nil
				}, g.options()...)
				require.NoError(b, b.broker.WaitConsumers(b.Context(), queue, 1))
				b.broker.Publish(queue, "at once")
				b.wait(time.Second)
				assert.Equal(b, []string{"at once"}, handled)
			})
		})
	}
}

// The old session of a cancelled consumer still settles while its successor consumes.
func TestStreamKeepsItsPlaceWithTwoSessionsAlive(t *testing.T) {
	for _, workers := range []int{1, 2} {
		t.Run(fmt.Sprint(workers, " workers"), func(t *testing.T) {
			bubble(t, func(b *bench) {
				var mu sync.Mutex
				handled := make(map[string]int)
				handle := func(body string) (before int) {
					mu.Lock()
					defer mu.Unlock()
					handled[body]++
					return handled[body] - 1
				}
				slow := make(chan struct{})
				b.of("stream")
				b.broker.Publish(queue, "old")
				b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if body := string(d.Body); handle(body) == 0 && body == "first" {
						<-slow
					}
					return nil
				}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "next"}), steadymq.WithConcurrency(workers), steadymq.WithPrefetch(10))
				b.wait(time.Minute)
				b.broker.Publish(queue, "first", "second")
				b.wait(time.Second)
				b.broker.CancelConsumers(queue)
				b.wait(time.Second)
				b.broker.Publish(queue, "third")
				close(slow) // settles the old session's first
				b.wait(time.Second)
				b.publishAway(time.Minute, "while")
				for _, body := range []string{"first", "second", "third", "while"} {
					assert.Positive(b, handled[body], body)
				}
				assert.LessOrEqual(b, handled["third"], 1, "settled before the outage")
				assert.Zero(b, handled["old"])
			})
		})
	}
}

func TestAnotherStreamOfTheTopologyHasAPlaceOfItsOwn(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeclareQueue("one", steadymqtest.QueueOptions{Type: "stream"})
		b.broker.DeclareQueue("two", steadymqtest.QueueOptions{Type: "stream"})
		b.broker.Publish("one", "1", "2", "3", "4", "5")
		b.broker.Publish("two", "1")
		b.wait(time.Hour)
		name, calls := "one", 0
		var handled []string
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			handled = append(handled, d.Queue()+" "+string(d.Body))
			return nil
		}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "next"}),
			steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
				calls++
				return name, nil
			}))
		assert.Equal(b, 1, calls, "once for a session")
		name = "two"
		b.publishAway(time.Minute)
		b.broker.Publish("one", "6")
		b.broker.Publish("two", "2")
		b.wait(time.Minute)
		b.broker.Refuse(true)
		b.broker.Reset()
		b.broker.Publish("two", "3")
		b.wait(time.Minute)
		b.broker.Refuse(false)
		b.wait(time.Minute)
		assert.Equal(b, []string{"two 2", "two 3"}, handled)
	})
}

// One channel at a time is enough.

// oneChannel makes a consumer whose connections have one channel each.
func (b *bench) oneChannel(options ...steadymq.Option) {
	b.Helper()
	c, err := steadymq.New(b.broker.URL+"?channel_max=1", queue, append(options, steadymq.WithDialer(b.broker.Dialer()),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: b.changed}), steadymq.WithLogger(slog.New(slog.DiscardHandler)))...)
	require.NoError(b, err)
	b.consumer = c
}

func TestStreamHealsWithOneChannelPerConnection(t *testing.T) {
	for _, g := range beginnings {
		t.Run(g.name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.of("stream")
				b.broker.Publish(queue, "old 0", "old 1")
				var handled []string
				var declares []steadymq.Option // so that it looks for the stream
				if g.name != "default" {
					declares = opts(steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
						_, err := ch.QueueDeclare(queue, true, false, false, false, amqp.Table{"x-queue-type": "stream"})
						return queue, err
					}))
				}
				b.oneChannel(append(g.options(), declares...)...)
				b.start(func(_ context.Context, d *steadymq.Delivery) error {
					handled = append(handled, string(d.Body))
					return nil
				})
				b.wait(time.Minute)
				require.Equal(b, steadymq.Consuming, b.consumer.State())
				handled = nil
				b.publishAway(time.Minute, "reset")
				b.broker.CancelConsumers(queue)
				b.broker.Publish(queue, "cancelled")
				b.wait(time.Minute)
				b.broker.CloseChannels(541, "INTERNAL_ERROR")
				b.broker.Publish(queue, "closed")
				b.wait(time.Minute)
				b.broker.DeleteQueue(queue)
				b.wait(time.Minute)
				b.broker.Publish(queue, "new 0", "new 1")
				b.wait(time.Minute)
				assert.Equal(b, []string{"reset", "cancelled", "closed", "new 0", "new 1"}, handled)
			})
		})
	}
}

func TestCancelledConsumerWaitsForTheOnlyChannelItsHandlersHold(t *testing.T) {
	bubble(t, func(b *bench) {
		b.of("stream")
		b.oneChannel(steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
		var handled []string
		b.start(func(ctx context.Context, d *steadymq.Delivery) error {
			select {
			case <-time.After(5 * time.Second):
				handled = append(handled, string(d.Body))
			case <-ctx.Done():
			}
			return nil
		})
		b.wait(time.Minute)
		b.broker.Publish(queue, "1")
		b.wait(time.Second)
		b.broker.CancelConsumers(queue)
		b.broker.Publish(queue, "2")
		b.wait(time.Minute)
		assert.Contains(b, handled, "1")
		assert.Contains(b, handled, "2")
	})
}

// Silence that is meant.

func TestStreamConsumerAtAMessageOfTheFutureIsNoStall(t *testing.T) {
	bubble(t, func(b *bench) {
		b.of("stream")
		b.broker.Publish(queue, "0", "1")
		var handled []string
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			handled = append(handled, string(d.Body))
			return nil
		}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": 5}), steadymq.WithStallDetector(10*time.Second))
		for i := 2; i < 5; i++ {
			b.broker.Publish(queue, fmt.Sprint(i))
			b.busy(time.Minute)
		}
		b.broker.Reset()
		b.wait(time.Minute)
		b.broker.Publish(queue, "5", "6")
		b.wait(time.Minute)
		assert.Equal(b, []string{"5", "6"}, handled)
		assert.Len(b, b.causes(), 1)
	})
}

func TestQuietStreamThatGrowsWithoutADeliveryIsAStall(t *testing.T) {
	for _, offset := range []any{"next", 2} {
		t.Run(fmt.Sprint(offset), func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.of("stream")
				b.broker.Publish(queue, "0", "1")
				b.run(ack, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": offset}), steadymq.WithStallDetector(10*time.Second))
				b.busy(time.Minute)
				b.broker.QuorumStall(queue, true)
				b.broker.Publish(queue, "2")
				b.wait(time.Minute)
				require.NotEmpty(b, b.causes())
				assert.ErrorContains(b, b.causes()[0], "though the stream has grown")
			})
		})
	}
}

// A try that was left behind goes on with the number of the session that came after it, and
// takes its place in the stream.
func TestTryThatWasLeftBehindDoesNotTouchTheStreamsPlace(t *testing.T) {
	bubble(t, func(b *bench) {
		b.of("stream")
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "slow" && d.Session() == 1 {
				return hold(started, release)(ctx, d)
			}
			return nil
		}, steadymq.WithConcurrency(2), steadymq.WithPrefetch(4), steadymq.WithSetupTimeout(5*time.Second), steadymq.WithDrainTimeout(time.Minute),
			steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
		first := b.broker.Host(0)
		if b.open() == 1 && b.broker.Connections()[0].Host != first.Addr() {
			first = b.broker.Host(1)
		}
		b.broker.Publish(queue, "slow", "a", "b")
		<-started
		b.broker.CancelConsumers(queue)
		b.wait(500 * time.Millisecond) // the successor is being set up
		first.Stall()
		b.wait(10 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State(), "on the other host")
		first.Unstall()
		b.wait(5 * time.Second)
		close(release)
		for range 20 {
			b.broker.Publish(queue, "good")
			b.wait(time.Second)
		}
		assert.EqualValues(b, 2, b.consumer.Stats().Sessions)
		assert.GreaterOrEqual(b, b.consumer.Stats().Acked, uint64(23), "all of them")
		assert.Zero(b, b.broker.Unsettled(queue))
	}, steadymqtest.WithHosts(2))
}

func TestStreamGoesOnThoughAHandlerReplacesTheHeaders(t *testing.T) {
	bubble(t, func(b *bench) {
		b.streaming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "3" {
				d.Headers = nil
			}
			return nil
		}, steadymq.WithPrefetch(4))
		for i := range 20 {
			b.broker.Publish(queue, fmt.Sprint(i))
		}
		b.wait(time.Minute)
		assert.EqualValues(b, 20, b.consumer.Stats().Delivered)
		assert.Len(b, b.broker.Ledger().Settlements, 20)
	})
}

func TestStreamKeepsItsPlaceThoughAHandlerReplacesTheHeaders(t *testing.T) {
	bubble(t, func(b *bench) {
		b.of("stream")
		b.publish(100, "old")
		var seen atomic.Int32
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			seen.Add(1)
			d.Headers = nil
			return nil
		}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": int64(50)}))
		b.wait(time.Second)
		require.EqualValues(b, 50, seen.Load())
		b.broker.Reset()
		b.wait(time.Minute)
		assert.EqualValues(b, 50, seen.Load(), "each once, but for the prefetch")
	})
}

// Middleware that unpacks a body sees its own work at the second try.
func TestTryInPlaceGetsTheMessageAsItCame(t *testing.T) {
	bubble(t, func(b *bench) {
		var mu sync.Mutex
		var bodies []string
		unpack := func(next steadymq.Handler) steadymq.Handler {
			return func(ctx context.Context, d *steadymq.Delivery) error {
				mu.Lock()
				bodies = append(bodies, string(d.Body))
				mu.Unlock()
				d.Body = []byte("unpacked " + string(d.Body))
				return next(ctx, d)
			}
		}
		b.streaming(func(_ context.Context, d *steadymq.Delivery) error {
			if d.Attempt() < 3 {
				return errAway
			}
			return nil
		}, steadymq.WithMiddleware(unpack))
		b.broker.Publish(queue, "tea")
		b.wait(time.Minute)
		assert.Equal(b, []string{"tea", "tea", "tea"}, bodies)
	})
}
