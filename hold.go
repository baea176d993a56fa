package steadymq

import (
	"log/slog"
	"sync"
	"time"
)

// holds are the deliveries of a session that failed and wait until they go back
// or, of a stream, are tried again.
type holds struct {
	session *session

	mu       sync.Mutex
	timers   map[*Delivery]*time.Timer
	released bool
	crowded  time.Time   // since when they take up half of the prefetch, zero if they do not
	eased    time.Time   // since when they take up less again, zero if they do not
	telling  *time.Timer // of that; there is none before
}

// hold returns how long a message waits that has failed for the n-th time, as far
// as the broker counts: twice as long as the last time. Where nothing is counted
// it stays short.
func (c *config) hold(n int) time.Duration {
	d := c.requeueFirst
	for ; n > 1 && d < c.requeueLongest; n-- {
		d *= 2
	}
	return min(jitter(min(d, c.requeueLongest)), c.requeueLongest)
}

// add requeues d after delay, or at once when the session no longer holds. It reports whether d
// is held.
func (h *holds) add(d *Delivery, delay time.Duration) (held bool) {
	if delay > 0 && h.keep(d, delay) {
		return true
	}
	_ = d.Requeue()
	return false
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
	h.session.stats.held.Add(1)
	h.look()
	return true
}

// look begins to tell of held messages once there are too many. Of a stream, others may pile up
// behind one later, so there it looks again. It is called with mu held.
func (h *holds) look() {
	crowd := h.crowd()
	switch {
	case crowd && (h.crowded.IsZero() || h.hadRoom()):
		h.crowded = time.Now()
		h.tellIn(0, h.tell)
	case h.crowded.IsZero() && h.session.stream != nil && len(h.timers) > 0:
		h.tellIn(heldAgain/2, h.lookAgain)
	}
	if crowd {
		h.eased = time.Time{}
	}
}

// hadRoom tells whether there has been room for long enough.
func (h *holds) hadRoom() bool { return !h.eased.IsZero() && time.Since(h.eased) >= heldEased }

func (h *holds) lookAgain() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.released {
		h.look()
	}
}

func (h *holds) tellIn(d time.Duration, f func()) {
	if h.telling != nil {
		h.telling.Stop()
	}
	h.telling = time.AfterFunc(d, f)
}

func (h *holds) remove(d *Delivery) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.timers[d]
	if ok {
		h.drop(d)
		if !h.crowd() && h.eased.IsZero() {
			h.eased = time.Now()
		}
	}
	return ok
}

// drop is called with mu held.
func (h *holds) drop(d *Delivery) {
	delete(h.timers, d)
	h.session.stats.held.Add(-1)
}

// dropSettled forgets what its handler has settled by hand meanwhile. It is called with mu held.
func (h *holds) dropSettled() {
	for d, timer := range h.timers {
		if d.Outcome() != Unsettled {
			timer.Stop()
			h.drop(d)
		}
	}
}

// release ends all holds: the deliveries are settled by their session at once, as
// requeued while it lives and as stale after it.
func (h *holds) release(by settler) {
	h.mu.Lock()
	held, telling := h.timers, h.telling
	h.timers, h.telling, h.released = nil, nil, true
	h.session.stats.held.Add(-int64(len(held)))
	h.mu.Unlock()
	if telling != nil {
		telling.Stop()
	}
	for d, timer := range held {
		timer.Stop()
		if _, unreadable := d.fence.settler.(passed); unreadable {
			_ = d.Requeue() // nobody is told: no handler had it
			continue
		}
		_ = d.fence.settle(by, Requeued)
	}
}

// crowd tells whether what is held leaves half of the prefetch or less. Of a
// stream one is enough: what is done behind it cannot be acked before it is. It is
// called with mu held.
func (h *holds) crowd() bool {
	taken := int64(len(h.timers))
	if taken > 0 && h.session.stream != nil {
		taken = h.session.wire.Unsettled()
	}
	return taken > 0 && 2*taken >= int64(h.session.config.prefetch)
}

// heldAgain is when a warning of held messages is first repeated; then after as
// long as they have been there.
const heldAgain = 2 * time.Minute

// heldEased is how long there has to be room for the next crowd to be another one: what fails again
// and again is on its way in between.
const heldEased = 10 * time.Second

// tell warns of held messages, again and again as long as there are too many.
func (h *holds) tell() {
	h.mu.Lock()
	h.dropSettled()
	held, since := len(h.timers), h.crowded
	if h.released || since.IsZero() || !h.crowd() {
		h.crowded = time.Time{}
		h.mu.Unlock()
		return
	}
	lasts := time.Since(since)
	h.tellIn(max(lasts, heldAgain), h.tell)
	h.mu.Unlock()
	s := h.session
	if lasts < heldAgain { // of this session; the last one may have told just now
		if _, ok := s.told.held.pass(time.Minute); !ok {
			return
		}
	}
	s.warn("failed messages are held and take up the prefetch, what stands behind them waits: mend what fails, "+
		"return Discard for what never can succeed, take what cannot be read out of the queue with another client, or raise WithPrefetch",
		slog.Int("held", held), slog.Int("prefetch", s.config.prefetch), slog.Time("since", since))
}
