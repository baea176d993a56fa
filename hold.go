package steadymq

import (
	"sync"
	"time"
)

// holds are the deliveries of a session that wait for their requeue.
type holds struct {
	mu       sync.Mutex
	timers   map[*Delivery]*time.Timer
	released bool
}

// add requeues d after delay, or at once when the session no longer holds.
func (h *holds) add(d *Delivery, delay time.Duration) {
	if delay > 0 && h.keep(d, delay) {
		return
	}
	_ = d.Requeue()
}

func (h *holds) keep(d *Delivery, delay time.Duration) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.released {
		return false
	}
	if h.timers == nil {
		h.timers = make(map[*Delivery]*time.Timer)
	}
	h.timers[d] = time.AfterFunc(delay, func() {
		if h.remove(d) {
			_ = d.Requeue()
		}
	})
	return true
}

func (h *holds) remove(d *Delivery) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.timers[d]
	delete(h.timers, d)
	return ok
}

// release ends all holds: the deliveries are settled by their session at once, as
// requeued while it lives and as stale after it.
func (h *holds) release(by settler) {
	h.mu.Lock()
	held := h.timers
	h.timers, h.released = nil, true
	h.mu.Unlock()
	for d, timer := range held {
		timer.Stop()
		_ = d.fence.settle(by, Requeued)
	}
}
