package steadymq_test

import (
	"log/slog"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
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
	bubble(t, func(b *bench) {
		b.broker.RefuseConsume(403, "queue 'orders' in vhost '/' in exclusive use")
		b.run(ack, steadymq.WithExclusive(), steadymq.WithPrefetch(10000))
		b.wait(time.Minute)
		before, sessions := heap(), b.tries()
		b.wait(6 * time.Hour)
		tries := b.tries() - sessions
		require.Greater(b, tries, 500)
		require.EqualValues(b, 1, b.consumer.Stats().Connections)
		assert.Less(b, (heap()-before)/tries, 4000, "bytes kept per refused try, of %d", tries)
	}, steadymqtest.WithoutLedger())
}

func (b *bench) tries() int { return len(b.causes()) }

// The worker of a handler that does not return belongs to an old session, and must not hold on to
// those that came after it.
func TestHandlerThatHangsKeepsNoLaterSessionsInMemory(t *testing.T) {
	bubble(t, func(b *bench) {
		started := make(chan *steadymq.Delivery, 2)
		release := make(chan struct{})
		b.consuming(hold(started, release), steadymq.WithConcurrency(2))
		b.broker.Publish(queue, "x")
		d := <-started
		require.NotNil(b, d)
		cycle := func(n int) {
			for range n {
				b.wait(11 * time.Second)
				b.broker.Reset()
				b.broker.PurgeQueue(queue)
			}
		}
		cycle(10)
		before := heap()
		cycle(300)
		kept := (heap() - before) / 300
		assert.Less(b, kept, 8000, "bytes kept per lost session")
		close(release)
		cycle(2)
		t.Logf("%d bytes per session while the handler hangs, %d after it has returned", kept, (heap()-before)/300)
	}, steadymqtest.WithoutLedger())
}

// What a session has used is gone with it: whatever keeps a piece of each is found after months.
func TestLostSessionsLeaveNothingInMemory(t *testing.T) {
	for name, lose := range map[string]func(b *bench){
		"with their connection": func(b *bench) { b.broker.Reset() },
		"with their channel":    func(b *bench) { b.broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 7") },
		"by basic.cancel":       func(b *bench) { b.broker.CancelConsumers(queue) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				quiet := steadymq.Hooks{HandlerFailed: func(*steadymq.Delivery, error) {}}
				b.consuming(ack, steadymq.WithPrefetch(1000), steadymq.WithStallDetector(time.Minute),
					steadymq.WithLogger(slog.New(slog.DiscardHandler)), steadymq.WithHooks(quiet)) // those of the bench keep all
				cycle := func(n int) {
					for range n {
						b.wait(11 * time.Second)
						b.broker.Publish(queue, "tea")
						b.wait(time.Second)
						lose(b)
					}
					b.wait(time.Minute) // what is on its way out is gone
				}
				cycle(20)
				before, sessions := heap(), b.consumer.Stats().Sessions
				cycle(300)
				kept := (heap() - before) / 300
				require.EqualValues(b, 300, b.consumer.Stats().Sessions-sessions)
				t.Logf("%d bytes kept per lost session", kept)
				assert.Less(b, kept, 2500, "bytes kept per lost session: what the kit remembers")
			}, steadymqtest.WithoutLedger())
		})
	}
}

// An idle consumer has a connection, a session and its queue of events; what the broker in the
// same process keeps for it counts here as well.
func TestIdleConsumerIsSmall(t *testing.T) {
	bubble(t, func(b *bench) {
		const consumers = 50
		b.consuming(ack)
		before, goroutines := heap(), runtime.NumGoroutine()
		stops := make([]func() error, consumers)
		for i := range consumers {
			other := &bench{T: b.T, broker: b.broker, log: b.log}
			other.run(ack)
			stops[i] = other.stop
		}
		b.wait(time.Minute)
		each := (heap() - before) / consumers
		t.Logf("an idle consumer has %d bytes and %d goroutines, with the broker's share", each, (runtime.NumGoroutine()-goroutines)/consumers)
		assert.Less(b, each, 256<<10)
		for _, stop := range stops {
			require.NoError(b, stop())
		}
	}, steadymqtest.WithoutLedger())
}
