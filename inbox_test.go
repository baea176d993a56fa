package steadymq

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMoreThanThePrefetchIsKept(t *testing.T) {
	box := newInbox(2)
	to := &receiver{inbox: box, aside: newAside()}
	for tag := range uint64(100) { // a stream's chunk
		d := to.New()
		d.DeliveryTag = tag + 1
		to.Put(d)
	}
	for tag := range uint64(100) {
		d, ok := box.take()
		require.True(t, ok)
		require.Equal(t, tag+1, d.DeliveryTag, "in order")
	}
}

func TestInboxUnderManyHands(t *testing.T) {
	const workers, messages = 4, 20_000
	for _, size := range []int{1, 3, 256} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			box := newInbox(size)
			var mu sync.Mutex
			seen := make(map[uint64]int)
			var working sync.WaitGroup
			for range workers {
				working.Go(func() {
					for {
						d, ok := box.take()
						if !ok {
							return
						}
						mu.Lock()
						seen[d.DeliveryTag]++
						if d.DeliveryTag == messages/2 {
							box.close()
						}
						mu.Unlock()
					}
				})
			}
			for tag := range uint64(messages) {
				d := &Delivery{}
				d.DeliveryTag = tag
				box.put(d)
			}
			working.Wait()
			for _, d := range box.clear() {
				seen[d.DeliveryTag]++
			}
			assert.Len(t, seen, messages)
			for tag, n := range seen {
				require.Equal(t, 1, n, tag)
			}
		})
	}
}

// What waited beyond the prefetch is not kept after it was taken.
func TestInboxForgetsWhatWasTaken(t *testing.T) {
	box := newInbox(1)
	freed := make(chan struct{}, 100)
	for range 100 {
		d := &Delivery{}
		runtime.AddCleanup(d, func(ended chan struct{}) { ended <- struct{}{} }, freed)
		box.put(d)
	}
	for range 50 {
		_, _ = box.take()
	}
	runtime.GC()
	for range 40 { // what is still in the channel and on the stack aside
		select {
		case <-freed:
		case <-time.After(10 * time.Second):
			t.Fatal("taken deliveries are kept")
		}
	}
	runtime.KeepAlive(box)
}

func TestInboxThatIsClearedKeepsNothing(t *testing.T) {
	box := newInbox(10)
	for range 15 {
		box.put(&Delivery{})
	}
	box.close()
	assert.Len(t, box.clear(), 15)
	assert.Empty(t, box.next)
	assert.Empty(t, box.rest)
}
