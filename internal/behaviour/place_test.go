package behaviour_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"slices"
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

// quietStream consumes a stream to which nothing has been published for ten minutes.
func quietStream(r *rig.Rig, g rig.Beginning, options ...steadymq.Option) *[]string {
	r.Helper()
	r.RemakeQueue("stream")
	r.Wait(time.Hour)
	r.Broker.Publish(rig.Queue, "old 0", "old 1", "old 2")
	r.Wait(3 * time.Hour)
	r.Broker.Publish(rig.Queue, "old 3")
	r.Wait(10 * time.Minute)
	handled := new([]string)
	r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
		*handled = append(*handled, string(d.Body))
		return nil
	}, append(g.Options(), options...)...)
	r.Wait(time.Minute)
	require.Equal(r, g.Old, *handled)
	return handled
}

// publishAway loses the connection, and publishes before it can be opened again.
func publishAway(r *rig.Rig, d time.Duration, bodies ...string) {
	r.Broker.Refuse(true)
	r.Broker.Reset()
	r.Broker.Publish(rig.Queue, bodies...)
	r.Wait(d)
	r.Broker.Refuse(false)
	r.Wait(time.Minute)
}

func TestQuietStreamSkipsNothingThatIsPublishedWhileAway(t *testing.T) {
	for _, g := range rig.Beginnings {
		t.Run(g.Name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				handled := quietStream(r, g)
				publishAway(r, 20*time.Minute, "while", "away") // longer than the intervals
				r.Broker.Publish(rig.Queue, "after")
				r.Wait(time.Minute)
				assert.Equal(r, append(slices.Clone(g.Old), "while", "away", "after"), *handled)
			})
		})
	}
}

func TestEmptyStreamSkipsNothingThatIsPublishedWhileAway(t *testing.T) {
	for _, g := range rig.Beginnings {
		if g.Name == "number" {
			continue
		}
		t.Run(g.Name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				handled := reading(r, g.Options()...)
				publishAway(r, 20*time.Minute, "while away 0", "while away 1") // longer than the intervals
				publishAway(r, time.Minute, "while away 2")
				r.Broker.Publish(rig.Queue, "after")
				r.Wait(time.Minute)
				assert.Equal(r, []string{"while away 0", "while away 1", "while away 2", "after"}, *handled)
			})
		})
	}
}

func TestQuietStreamThatIsMadeAnewIsReadFromItsBeginning(t *testing.T) {
	for _, g := range rig.Beginnings {
		for _, declared := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, declared by us: %t", g.Name, declared), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					var options []steadymq.Option
					if declared {
						options = rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
					}
					handled := quietStream(r, g, options...)
					r.Broker.DeleteQueue(rig.Queue)
					r.Wait(2 * time.Second)
					r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "stream"}) // where nobody else did
					r.Broker.Publish(rig.Queue, "new 0", "new 1")
					r.Wait(time.Minute)
					r.Broker.Publish(rig.Queue, "new 2")
					r.Wait(time.Minute)
					assert.Equal(r, append(slices.Clone(g.Old), "new 0", "new 1", "new 2"), *handled)
				})
			})
		}
	}
}

func TestStreamMadeAnewIsReadFromItsBeginningAlsoByWhoWaitsForAMessageOfTheFuture(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		handled := reading(r, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": 5}))
		r.Broker.Publish(rig.Queue, "old 0", "old 1")
		r.Wait(time.Minute)
		r.Broker.DeleteQueue(rig.Queue)
		r.Wait(2 * time.Second)
		r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "stream"})
		r.Broker.Publish(rig.Queue, "new 0", "new 1")
		r.Wait(time.Minute)
		assert.Equal(r, []string{"new 0", "new 1"}, *handled)
	})
}

// The first message may be anywhere when the session is lost: on the wire, in the buffer, with a
// handler.
func TestStreamSkipsNothingBehindAFirstMessageThatIsUnderWay(t *testing.T) {
	for _, g := range rig.Beginnings {
		for late := time.Duration(0); late < 8*time.Millisecond; late += time.Millisecond {
			t.Run(fmt.Sprint(g.Name, ", lost after ", late), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.Broker.SetLatency(2 * time.Millisecond)
					r.RemakeQueue("stream")
					if g.Name == "number" {
						r.Broker.Publish(rig.Queue, "old 0", "old 1")
					}
					var handled []string
					r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
						select {
						case <-time.After(4 * time.Millisecond):
						case <-ctx.Done():
							return ctx.Err()
						}
						handled = append(handled, string(d.Body))
						return nil
					}, g.Options()...)
					r.Wait(10 * time.Minute)
					r.Broker.Publish(rig.Queue, "first", "second")
					r.Wait(late)
					publishAway(r, time.Minute, "while", "away")
					assert.Subset(r, handled, []string{"first", "second", "while", "away"})
					assert.True(r, slices.IsSorted(indexes(handled)), "in order: %v", handled)
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
	cuts := map[string]func(*rig.Rig){
		"reset":    func(r *rig.Rig) { r.Broker.Reset() },
		"silence":  func(r *rig.Rig) { r.Broker.Silence() },
		"channels": func(r *rig.Rig) { r.Broker.CloseChannels(541, "INTERNAL_ERROR") },
		"cancel":   func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) },
	}
	for _, g := range []rig.Beginning{rig.Beginnings[1], rig.Beginnings[2], {Name: "interval", Offset: func() any { return "15m" }, Old: []string{"old"}}} {
		for name, cut := range cuts {
			for late := time.Duration(0); late < 70*time.Millisecond; late += time.Millisecond {
				t.Run(fmt.Sprint(g.Name, ", ", name, " after ", late), func(t *testing.T) {
					rig.Bubble(t, func(r *rig.Rig) {
						r.RemakeQueue("stream")
						r.Broker.Publish(rig.Queue, "old")
						r.Wait(10 * time.Minute)
						var handled []string
						r.Run(func(_ context.Context, d *steadymq.Delivery) error {
							handled = append(handled, string(d.Body))
							return nil
						}, g.Options()...)
						r.Wait(late)
						consuming := r.Consumer.State() == steadymq.Consuming
						there := consuming || len(r.Broker.Consumers(rig.Queue)) > 0
						cut(r)
						r.Broker.Publish(rig.Queue, "while")
						r.Wait(2 * time.Minute)
						r.Broker.Publish(rig.Queue, "after")
						r.Wait(time.Minute)
						want := []string{"while", "after"}
						if !there && len(handled) == 1 { // it has not begun before
							want = want[1:]
						}
						if g.Name == "interval" || g.Name == "last" && (consuming || handled[0] == "old") {
							want = slices.Insert(want, 0, "old")
						}
						assert.Equal(r, want, rig.Firsts(handled))
					})
				})
			}
		}
	}
}

func TestEmptyStreamMayCancelTheConsumerThatLooksForItsEnd(t *testing.T) {
	for _, g := range rig.Beginnings[:3] {
		for late := time.Duration(0); late < 80*time.Millisecond; late += time.Millisecond {
			t.Run(fmt.Sprint(g.Name, ", cancelled after ", late), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.RemakeQueue("stream")
					var handled []string
					r.Run(func(_ context.Context, d *steadymq.Delivery) error {
						handled = append(handled, string(d.Body))
						return nil
					}, g.Options()...)
					r.Wait(late)
					there := r.Broker.CancelConsumers(rig.Queue) > 0
					r.Broker.Publish(rig.Queue, "1", "2")
					r.Wait(time.Minute)
					if there && (g.Name != "last" || late < 40*time.Millisecond) { // after that it has done looking, and may not consume yet
						assert.Equal(r, []string{"1", "2"}, handled)
					}
				})
			})
		}
	}
}

func TestLastMessageOfAStreamIsGivenAlsoIfTheSetUpWasCut(t *testing.T) {
	for late := time.Duration(0); late < 40*time.Millisecond; late += time.Millisecond {
		t.Run(late.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("stream")
				r.Broker.Publish(rig.Queue, "old", "last")
				r.Wait(time.Hour)
				var handled []string
				r.Run(func(_ context.Context, d *steadymq.Delivery) error {
					handled = append(handled, string(d.Body))
					return nil
				}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "last"}))
				r.Wait(late)
				r.Broker.Reset()
				r.Wait(time.Minute)
				r.Broker.Publish(rig.Queue, "new")
				r.Wait(time.Minute)
				assert.Equal(r, []string{"last", "new"}, handled)
			})
		})
	}
}

// Where nothing tells the place, it is by the clock; but not for the session that has just asked.
func TestIntervalWithoutMessagesBeginsWithTheNext(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		r.Broker.Publish(rig.Queue, "old")
		r.Wait(time.Minute)
		var handled []string
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			handled = append(handled, string(d.Body))
			return nil
		}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "30s"}))
		r.Wait(time.Minute)
		r.Broker.Publish(rig.Queue, "new")
		r.Wait(time.Minute)
		assert.Equal(r, []string{"new"}, handled)
	})
}

// Nothing was promised to a consumer that the broker did not take.
// A lookup wants one message. A broker that may send more does so at the path's pace, before the
// session has begun.
func TestLookupOfAFirstMessageIsGivenNoOther(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		r.PublishMany(50, "old")
		r.Consuming(rig.Ack, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "1h"}))
		looked := 0
		for _, d := range r.Broker.Ledger().Deliveries {
			if strings.HasSuffix(d.ConsumerTag, ".look") {
				looked++
			}
		}
		assert.Equal(r, 1, looked)
	})
}

// chunked is a connection to a broker that begins with the last chunk where it is asked for the last
// message, as RabbitMQ does: the kit's chunks hold one message each. The offset of the chunk takes
// the place of the text, and is as long.
type chunked struct {
	net.Conn
	first int64
}

func (c chunked) Write(p []byte) (int, error) {
	text := []byte("S\x00\x00\x00\x04last")
	number := binary.BigEndian.AppendUint64([]byte{'l'}, uint64(c.first))
	if _, err := c.Conn.Write(bytes.Replace(p, text, number, 1)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Whoever looks for the end of a stream is given the whole last chunk: the end is behind all of it.
func TestEndOfAStreamIsBehindTheWholeLastChunk(t *testing.T) {
	for _, size := range []int{1, 2, 5} {
		rig.Bubble(t, func(r *rig.Rig) {
			r.RemakeQueue("stream")
			r.PublishMany(10, "old")
			r.Wait(time.Hour)
			var handled []string
			r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
				handled = append(handled, string(d.Body))
				return nil
			}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "next"}),
				steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
					conn, err := r.Broker.Dialer()(ctx, network, address)
					return chunked{conn, int64(10 - size)}, err
				}))
			r.Wait(time.Minute)
			require.Empty(r, handled)
			publishAway(r, time.Second, "new")
			assert.Equal(r, []string{"new"}, handled, "a chunk of %d", size)
		})
	}
}

func TestNextIsThatOfTheFirstSubscriptionTheBrokerTook(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		r.Broker.RefuseConsume(403, "access to queue 'orders' in vhost '/' refused for user 'app'")
		var handled []string
		r.Run(func(_ context.Context, d *steadymq.Delivery) error {
			handled = append(handled, string(d.Body))
			return nil
		}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "next"}), steadymq.WithFatal(func(error) bool { return false }))
		r.Wait(time.Minute)
		r.Broker.Publish(rig.Queue, "before")
		r.Broker.Heal()
		r.Wait(time.Minute)
		r.Broker.Publish(rig.Queue, "after")
		r.Wait(time.Minute)
		assert.Equal(r, []string{"after"}, handled)
	})
}

// A test, or an operator, may take the first consumer that the broker shows for the subscription.
func TestStreamSkipsNothingOnceTheBrokerShowsItsConsumer(t *testing.T) {
	for _, g := range rig.Beginnings[:3] {
		t.Run(g.Name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("stream")
				var handled []string
				r.Run(func(_ context.Context, d *steadymq.Delivery) error {
					handled = append(handled, string(d.Body))
					return nil
				}, g.Options()...)
				require.NoError(r, r.Broker.WaitConsumers(r.Context(), rig.Queue, 1))
				r.Broker.Publish(rig.Queue, "at once")
				r.Wait(time.Second)
				assert.Equal(r, []string{"at once"}, handled)
			})
		})
	}
}

// The old session of a cancelled consumer still settles while its successor consumes.
func TestStreamKeepsItsPlaceWithTwoSessionsAlive(t *testing.T) {
	for _, workers := range []int{1, 2} {
		t.Run(fmt.Sprint(workers, " workers"), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var mu sync.Mutex
				handled := make(map[string]int)
				handle := func(body string) (before int) {
					mu.Lock()
					defer mu.Unlock()
					handled[body]++
					return handled[body] - 1
				}
				slow := make(chan struct{})
				r.RemakeQueue("stream")
				r.Broker.Publish(rig.Queue, "old")
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if body := string(d.Body); handle(body) == 0 && body == "first" {
						<-slow
					}
					return nil
				}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "next"}), steadymq.WithConcurrency(workers), steadymq.WithPrefetch(10))
				r.Wait(time.Minute)
				r.Broker.Publish(rig.Queue, "first", "second")
				r.Wait(time.Second)
				r.Broker.CancelConsumers(rig.Queue)
				r.Wait(time.Second)
				r.Broker.Publish(rig.Queue, "third")
				close(slow) // settles the old session's first
				r.Wait(time.Second)
				publishAway(r, time.Minute, "while")
				for _, body := range []string{"first", "second", "third", "while"} {
					assert.Positive(r, handled[body], body)
				}
				assert.LessOrEqual(r, handled["third"], 1, "settled before the outage")
				assert.Zero(r, handled["old"])
			})
		})
	}
}

func TestAnotherStreamOfTheTopologyHasAPlaceOfItsOwn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("one", steadymqtest.QueueOptions{Type: "stream"})
		r.Broker.DeclareQueue("two", steadymqtest.QueueOptions{Type: "stream"})
		r.Broker.Publish("one", "1", "2", "3", "4", "5")
		r.Broker.Publish("two", "1")
		r.Wait(time.Hour)
		name, calls := "one", 0
		var handled []string
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			handled = append(handled, d.Queue()+" "+string(d.Body))
			return nil
		}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "next"}),
			steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
				calls++
				return name, nil
			}))
		assert.Equal(r, 1, calls, "once for a session")
		name = "two"
		publishAway(r, time.Minute)
		r.Broker.Publish("one", "6")
		r.Broker.Publish("two", "2")
		r.Wait(time.Minute)
		r.Broker.Refuse(true)
		r.Broker.Reset()
		r.Broker.Publish("two", "3")
		r.Wait(time.Minute)
		r.Broker.Refuse(false)
		r.Wait(time.Minute)
		assert.Equal(r, []string{"two 2", "two 3"}, handled)
	})
}

// One channel at a time is enough.

// oneChannel makes a consumer whose connections have one channel each.
func oneChannel(r *rig.Rig, options ...steadymq.Option) {
	r.Helper()
	c, err := steadymq.New(r.Broker.URL+"?channel_max=1", rig.Queue, append(options, steadymq.WithDialer(r.Broker.Dialer()),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: r.Changed}), steadymq.WithLogger(slog.New(slog.DiscardHandler)))...)
	require.NoError(r, err)
	r.Consumer = c
}

func TestStreamHealsWithOneChannelPerConnection(t *testing.T) {
	for _, g := range rig.Beginnings {
		t.Run(g.Name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("stream")
				r.Broker.Publish(rig.Queue, "old 0", "old 1")
				var handled []string
				var declares []steadymq.Option // so that it looks for the stream
				if g.Name != "default" {
					declares = rig.Options(steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
						_, err := ch.QueueDeclare(rig.Queue, true, false, false, false, amqp.Table{"x-queue-type": "stream"})
						return rig.Queue, err
					}))
				}
				oneChannel(r, append(g.Options(), declares...)...)
				r.Start(func(_ context.Context, d *steadymq.Delivery) error {
					handled = append(handled, string(d.Body))
					return nil
				})
				r.Wait(time.Minute)
				require.Equal(r, steadymq.Consuming, r.Consumer.State())
				handled = nil
				publishAway(r, time.Minute, "reset")
				r.Broker.CancelConsumers(rig.Queue)
				r.Broker.Publish(rig.Queue, "cancelled")
				r.Wait(time.Minute)
				r.Broker.CloseChannels(541, "INTERNAL_ERROR")
				r.Broker.Publish(rig.Queue, "closed")
				r.Wait(time.Minute)
				r.Broker.DeleteQueue(rig.Queue)
				r.Wait(time.Minute)
				r.Broker.Publish(rig.Queue, "new 0", "new 1")
				r.Wait(time.Minute)
				assert.Equal(r, []string{"reset", "cancelled", "closed", "new 0", "new 1"}, handled)
			})
		})
	}
}

func TestCancelledConsumerWaitsForTheOnlyChannelItsHandlersHold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		oneChannel(r, steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
		var handled []string
		r.Start(func(ctx context.Context, d *steadymq.Delivery) error {
			select {
			case <-time.After(5 * time.Second):
				handled = append(handled, string(d.Body))
			case <-ctx.Done():
			}
			return nil
		})
		r.Wait(time.Minute)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Second)
		r.Broker.CancelConsumers(rig.Queue)
		r.Broker.Publish(rig.Queue, "2")
		r.Wait(time.Minute)
		assert.Contains(r, handled, "1")
		assert.Contains(r, handled, "2")
	})
}

// Silence that is meant.

func TestStreamConsumerAtAMessageOfTheFutureIsNoStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		r.Broker.Publish(rig.Queue, "0", "1")
		var handled []string
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			handled = append(handled, string(d.Body))
			return nil
		}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": 5}), steadymq.WithStallDetector(10*time.Second))
		for i := 2; i < 5; i++ {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
			busyFor(r, time.Minute)
		}
		r.Broker.Reset()
		r.Wait(time.Minute)
		r.Broker.Publish(rig.Queue, "5", "6")
		r.Wait(time.Minute)
		assert.Equal(r, []string{"5", "6"}, handled)
		assert.Len(r, r.Causes(), 1)
	})
}

func TestQuietStreamThatGrowsWithoutADeliveryIsAStall(t *testing.T) {
	for _, offset := range []any{"next", 2} {
		t.Run(fmt.Sprint(offset), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("stream")
				r.Broker.Publish(rig.Queue, "0", "1")
				r.Run(rig.Ack, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": offset}), steadymq.WithStallDetector(10*time.Second))
				busyFor(r, time.Minute)
				r.Broker.QuorumStall(rig.Queue, true)
				r.Broker.Publish(rig.Queue, "2")
				r.Wait(time.Minute)
				require.NotEmpty(r, r.Causes())
				assert.ErrorContains(r, r.Causes()[0], "though the stream has grown")
			})
		})
	}
}

// A try that was left behind goes on with the number of the session that came after it, and takes
// its place in the stream.
func TestTryThatWasLeftBehindDoesNotTouchTheStreamsPlace(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "slow" && d.Session() == 1 {
				return rig.Hold(started, release)(ctx, d)
			}
			return nil
		}, steadymq.WithConcurrency(2), steadymq.WithPrefetch(4), steadymq.WithSetupTimeout(5*time.Second), steadymq.WithDrainTimeout(time.Minute),
			steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
		first := r.Broker.Host(0)
		if r.OpenConnections() == 1 && r.Broker.Connections()[0].Host != first.Addr() {
			first = r.Broker.Host(1)
		}
		r.Broker.Publish(rig.Queue, "slow", "a", "b")
		<-started
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(500 * time.Millisecond) // the successor is being set up
		first.Stall()
		r.Wait(10 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State(), "on the other host")
		first.Unstall()
		r.Wait(5 * time.Second)
		close(release)
		for range 20 {
			r.Broker.Publish(rig.Queue, "good")
			r.Wait(time.Second)
		}
		assert.EqualValues(r, 2, r.Consumer.Stats().Sessions)
		assert.GreaterOrEqual(r, r.Consumer.Stats().Acked, uint64(23), "all of them")
		assert.Zero(r, r.Broker.Unsettled(rig.Queue))
		delivered := r.Consumer.Stats().Delivered
		r.Broker.Reset()
		r.Wait(10 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Equal(r, delivered, r.Consumer.Stats().Delivered, "the place moved with what was acked")
	}, steadymqtest.WithHosts(2))
}

func TestStreamGoesOnThoughAHandlerReplacesTheHeaders(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "3" {
				d.Headers = nil
			}
			return nil
		}, steadymq.WithPrefetch(4))
		for i := range 20 {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
		}
		r.Wait(time.Minute)
		assert.EqualValues(r, 20, r.Consumer.Stats().Delivered)
		assert.Len(r, r.Broker.Ledger().Settlements, 20)
	})
}

func TestStreamKeepsItsPlaceThoughAHandlerReplacesTheHeaders(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		r.PublishMany(100, "old")
		var seen atomic.Int32
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			seen.Add(1)
			d.Headers = nil
			return nil
		}, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": int64(50)}))
		r.Wait(time.Second)
		require.EqualValues(r, 50, seen.Load())
		r.Broker.Reset()
		r.Wait(time.Minute)
		assert.EqualValues(r, 50, seen.Load(), "each once, but for the prefetch")
	})
}

// Middleware that unpacks a body sees its own work at the second try.
func TestTryInPlaceGetsTheMessageAsItCame(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
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
		streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
			if d.Attempt() < 3 {
				return errAway
			}
			return nil
		}, steadymq.WithMiddleware(unpack))
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Minute)
		assert.Equal(r, []string{"tea", "tea", "tea"}, bodies)
	})
}

// A handler that forwards a message takes the broker's own headers out first.
func TestStreamGoesOnThoughAHandlerTakesTheOffsetOutOfTheHeaders(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		handled := make(map[string]bool)
		streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
			delete(d.Headers, "x-stream-offset")
			if string(d.Body) == "3" && d.Attempt() == 1 {
				return errAway
			}
			handled[string(d.Body)] = true
			return nil
		}, steadymq.WithPrefetch(4), steadymq.WithConcurrency(1))
		for i := range 20 {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
		}
		r.Wait(time.Hour)
		assert.Len(r, handled, 20)
	})
}
