package steadymq_test

import (
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
