package behaviour_test

import (
	"context"
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

func heap() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// A hot standby (WithExclusive) is refused again and again on one connection, for a lock never
// replaces it.
func TestRefusedTriesLeaveNothingInMemory(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.RefuseConsume(403, "queue 'orders' in vhost '/' in exclusive use")
		r.Run(rig.Ack, steadymq.WithExclusive(), steadymq.WithPrefetch(10000))
		r.Wait(time.Minute)
		before, sessions := heap(), triesOf(r)
		r.Wait(6 * time.Hour)
		tries := triesOf(r) - sessions
		require.Greater(r, tries, 500)
		require.EqualValues(r, 1, r.Consumer.Stats().Connections)
		assert.Less(r, (heap()-before)/tries, 4000, "bytes kept per refused try, of %d", tries)
	}, steadymqtest.WithoutLedger())
}

func triesOf(r *rig.Rig) int { return len(r.Causes()) }

// The worker of a handler that does not return belongs to an old session, and must not hold on to
// those that came after it.
func TestHandlerThatHangsKeepsNoLaterSessionsInMemory(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started := make(chan *steadymq.Delivery, 2)
		release := make(chan struct{})
		r.Consuming(rig.Hold(started, release), steadymq.WithConcurrency(2))
		r.Broker.Publish(rig.Queue, "x")
		d := <-started
		require.NotNil(r, d)
		cycle := func(n int) {
			for range n {
				r.Wait(11 * time.Second)
				r.Broker.Reset()
				r.Broker.PurgeQueue(rig.Queue)
			}
		}
		cycle(10)
		before := heap()
		cycle(300)
		kept := (heap() - before) / 300
		assert.Less(r, kept, 8000, "bytes kept per lost session")
		close(release)
		cycle(2)
		t.Logf("%d bytes per session while the handler hangs, %d after it has returned", kept, (heap()-before)/300)
	}, steadymqtest.WithoutLedger())
}

// What a session has used is gone with it: whatever keeps a piece of each is found after months.
func TestLostSessionsLeaveNothingInMemory(t *testing.T) {
	for name, lose := range map[string]func(r *rig.Rig){
		"with their connection": func(r *rig.Rig) { r.Broker.Reset() },
		"with their channel":    func(r *rig.Rig) { r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 7") },
		"by basic.cancel":       func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				quiet := steadymq.Hooks{HandlerFailed: func(*steadymq.Delivery, error) {}}
				r.Consuming(rig.Ack, steadymq.WithPrefetch(1000), steadymq.WithStallDetector(time.Minute),
					steadymq.WithLogger(slog.New(slog.DiscardHandler)), steadymq.WithHooks(quiet)) // those of the rig keep all
				cycle := func(n int) {
					for range n {
						r.Wait(11 * time.Second)
						r.Broker.Publish(rig.Queue, "tea")
						r.Wait(time.Second)
						lose(r)
					}
					r.Wait(time.Minute) // what is on its way out is gone
				}
				cycle(20)
				before, sessions := heap(), r.Consumer.Stats().Sessions
				cycle(300)
				kept := (heap() - before) / 300
				require.EqualValues(r, 300, r.Consumer.Stats().Sessions-sessions)
				t.Logf("%d bytes kept per lost session", kept)
				assert.Less(r, kept, 2500, "bytes kept per lost session: what the kit remembers")
			}, steadymqtest.WithoutLedger())
		})
	}
}

// The goroutines of a consumer: the caller of Run and one for the connection;
// the writer of the socket; the driver's reader, heartbeater and buffer. A worker starts with a
// delivery that none waits for.
const idleGoroutines = 6

// The bound is generous, for what the broker in the same process keeps for a consumer counts as
// well. bench tells how much it is without that.
func TestIdleConsumerIsSmall(t *testing.T) {
	for name, o := range map[string]struct {
		options    []steadymq.Option
		deliveries int
		goroutines int
	}{
		"by default":            {nil, 0, idleGoroutines},
		"with much room":        {rig.Options(steadymq.WithPrefetch(10_000), steadymq.WithConcurrency(64)), 0, idleGoroutines},
		"behind its deliveries": {nil, 1, idleGoroutines + 1},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				const consumers = 50
				quiet := append(o.options, steadymq.WithLogger(slog.New(slog.DiscardHandler)))
				r.Consuming(rig.Ack, quiet...)
				before, goroutines := heapAndStacks(), rig.ClientGoroutines()
				stops := make([]func() error, consumers)
				for i := range consumers {
					other := &rig.Rig{T: r.T, Broker: r.Broker, Log: r.Log}
					other.Run(rig.Ack, quiet...)
					stops[i] = other.Stop
				}
				r.Wait(time.Minute)
				for range (consumers + 1) * o.deliveries {
					r.Broker.Publish(rig.Queue, "tea") // to each in turn
					r.Wait(time.Millisecond)
				}
				r.Wait(time.Minute)
				each := (heapAndStacks() - before) / consumers
				t.Logf("an idle consumer has %d bytes, with the broker's share", each)
				assert.Less(r, each, 128<<10)
				assert.Equal(r, consumers*o.goroutines, rig.ClientGoroutines()-goroutines-(o.goroutines-idleGoroutines))
				for _, stop := range stops {
					require.NoError(r, stop())
				}
			}, steadymqtest.WithoutLedger())
		})
	}
}

func heapAndStacks() int {
	var m runtime.MemStats
	for range 3 { // each halves the stacks that are too large
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}

func TestWorkerStartsForADeliveryThatNoneWaitsFor(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "long" {
				<-release
			}
			return nil
		}, steadymq.WithConcurrency(3))
		r.Wait(time.Second)
		workers := func(bodies ...string) int {
			for _, body := range bodies {
				r.Broker.Publish(rig.Queue, body)
			}
			r.Wait(time.Second)
			return rig.ClientGoroutines() - idleGoroutines
		}
		assert.Equal(r, 0, workers())
		assert.Equal(r, 1, workers("short"))
		assert.Equal(r, 1, workers("short"), "one waits for it")
		assert.Equal(r, 2, workers("long", "long"), "one waits for one of them")
		assert.Equal(r, 3, workers("long", "long"), "no more than the concurrency")
		assert.Equal(r, 3, r.Consumer.Stats().Handling)
		r.Broker.Reset()
		assert.Equal(r, 3, workers("short"), "whatever becomes of the session")
		assert.EqualValues(r, 2, r.Consumer.Stats().Acked, "they are busy with messages of the old session")
		close(release)
		assert.Equal(r, 3, workers())
		assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
	})
}

func TestStopBeforeAnyDeliveryIsPrompt(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		since := time.Now()
		require.NoError(r, r.Stop())
		assert.Less(r, time.Since(since), time.Second)
	})
}

// Options bring goroutines, timers and places of their own to each session.
func TestSessionsLeaveNothingInMemoryWhateverTheOptions(t *testing.T) {
	expiring := func(context.Context) (steadymq.Credentials, error) {
		return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: time.Now().Add(5 * time.Second)}, nil
	}
	for name, of := range map[string]struct {
		queue string
		opts  []steadymq.Option
	}{
		"stream":       {"log", rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "stream"}), steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))},
		"server-named": {"", rig.Options(steadymq.WithQueue(events))},
		"exclusive":    {"mine", rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true}))},
		"credentials":  {rig.Queue, rig.Options(steadymq.WithCredentials(expiring))},
		"topology":     {"", rig.Options(steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return rig.Queue, nil }))},
		"few channels": {rig.Queue, rig.Options(steadymq.WithURLFunc(func(context.Context) (string, error) {
			return "amqp://app:" + rig.Password + "@mq1.test?channel_max=2", nil
		}))},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeclareExchange("events", "fanout")
				quiet := steadymq.Hooks{HandlerFailed: func(*steadymq.Delivery, error) {}}
				r.Consumer = r.NewFor(of.queue, append(of.opts, steadymq.WithStallDetector(5*time.Second),
					steadymq.WithLogger(slog.New(slog.DiscardHandler)), steadymq.WithHooks(quiet))...)
				r.Start(rig.Ack)
				r.Wait(time.Second)
				cycle := func(n int) {
					for range n {
						for _, lose := range []func(){
							func() { r.Broker.Reset() },
							func() { r.Broker.CloseChannels(406, "unknown delivery tag 7") },
							func() { r.Broker.CancelConsumers("") },
						} {
							r.Wait(40 * time.Second) // three in a row would replace the connection
							lose()
						}
					}
					r.Wait(time.Minute)
				}
				cycle(10)
				before, sessions := heap(), r.Consumer.Stats().Sessions
				cycle(70)
				lost := int(r.Consumer.Stats().Sessions - sessions)
				require.GreaterOrEqual(r, lost, 200)
				kept := (heap() - before) / lost
				t.Logf("%d bytes kept per lost session", kept)
				assert.Less(r, kept, 2500, "bytes kept per lost session: what the kit remembers")
			}, steadymqtest.WithoutLedger())
		})
	}
}

// Room for the whole prefetch is the largest piece of a session. A connection remembers the channels
// that were closed on it for long, and must not remember that.
func TestClosedChannelsKeepNoRoomForMessages(t *testing.T) {
	for name, lose := range map[string]func(r *rig.Rig){
		"by the broker":   func(r *rig.Rig) { r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 7") },
		"by basic.cancel": func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack, steadymq.WithPrefetch(60000))
				before := heap()
				for range 16 {
					lose(r)
					r.Wait(40 * time.Second) // three in a row would replace the connection
				}
				require.EqualValues(r, 1, r.Consumer.Stats().Connections)
				require.EqualValues(r, 17, r.Consumer.Stats().Sessions)
				assert.Less(r, heap()-before, 2*mebi, "bytes kept of 16 sessions with room for 60,000 messages each")
			}, steadymqtest.WithoutLedger())
		})
	}
}

func TestLostSessionsLeaveNoMessagesInMemory(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		body := strings.Repeat("x", 1<<20)
		for range 8 {
			r.Broker.Publish(rig.Queue, body)
		}
		untilLost := func(ctx context.Context, _ *steadymq.Delivery) error { <-ctx.Done(); return nil }
		r.Consuming(untilLost, steadymq.WithPrefetch(8))
		var heap [8]uint64
		for i := range heap {
			r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 7")
			r.Wait(40 * time.Second)
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			heap[i] = m.HeapAlloc >> 20
		}
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
		assert.Less(r, heap[7], heap[0]+20, "MiB: %v", heap)
	})
}

// A consumer may be idle for hours behind its last message.
func TestMessageThatIsDoneWithIsNotKeptInMemory(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		before := heap()
		r.Broker.Publish(rig.Queue, strings.Repeat("x", 16*mebi))
		r.Wait(time.Minute)
		require.EqualValues(r, 2, r.Consumer.Stats().Acked)
		assert.Less(r, heap()-before, 4*mebi, "bytes kept of a message that was acked")
	}, steadymqtest.WithoutLedger())
}
