package steadymq

import (
	"log/slog"
	"sync"
	"time"
)

// What becomes of a delivery whose handler has returned Later: who settles it, and what is said if
// nobody does.

// laters are the deliveries of a session that were kept for later and that nobody has settled. Each
// holds the gate of its session open, as a running handler does, so that a stop waits for it.
// Workers add to them, whoever settles one takes it out, and the session's goroutine releases the
// rest once the session is lost; all of it under mu.
type laters struct {
	session *session

	mu       sync.Mutex
	all      map[*Delivery]struct{}
	released bool        // none is kept any more
	settled  uint64      // how many were taken out
	before   uint64      // settled at the last look
	timer    *time.Timer // for the next look; nil while none is due
}

// keep leaves a delivery to whoever settles it. It is called within the gate.
func (l *laters) keep(d *Delivery) {
	l.session.gate.stay()
	if !l.add(d) {
		l.session.gate.leave()
		_ = d.Requeue() // which is stale, unless somebody has settled it meanwhile
	}
}

// add reports whether d is kept: neither is its session lost, nor has anybody settled it.
func (l *laters) add(d *Delivery) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.released || !d.fence.outcome.CompareAndSwap(uint32(Unsettled), uint32(keptLater)) {
		return false
	}
	if l.all == nil {
		l.all = make(map[*Delivery]struct{})
	}
	l.all[d] = struct{}{}
	l.session.stats.later.Add(1)
	if l.timer == nil {
		l.before = l.settled
		l.timer = time.AfterFunc(lookAtLaters, l.look)
	}
	return true
}

// remove takes out what was settled.
func (l *laters) remove(d *Delivery) {
	l.mu.Lock()
	delete(l.all, d)
	l.settled++
	l.session.stats.later.Add(-1)
	l.mu.Unlock()
	l.session.gate.leave()
}

// release makes stale what nobody has settled when the session is lost.
func (l *laters) release(by *collectingSettler) {
	l.mu.Lock()
	left, timer := l.all, l.timer
	l.all, l.timer, l.released = nil, nil, true
	l.mu.Unlock()
	if timer != nil {
		timer.Stop()
	}
	for d := range left {
		if !d.fence.outcome.CompareAndSwap(uint32(keptLater), uint32(Stale)) {
			continue // whoever has claimed it leaves the gate
		}
		by.deliveries = append(by.deliveries, d)
		by.stats.stale.Add(1)
		l.remove(d)
	}
}

// lookAtLaters is how long nothing may be settled, at least, where what is kept takes up the whole
// prefetch, until that is told.
const lookAtLaters = time.Minute

// look warns if what is kept takes up the prefetch and nobody settles it.
func (l *laters) look() {
	s := l.session
	l.mu.Lock()
	kept, stuck := len(l.all), l.settled == l.before && l.fill()
	l.before = l.settled
	switch {
	case l.released:
	case kept == 0:
		l.timer = nil
	default:
		l.timer.Reset(lookAtLaters)
	}
	l.mu.Unlock()
	if !stuck {
		return
	}
	if left, ok := s.notices.later.allow(tellAgain); ok {
		s.warn("deliveries that are kept to be settled later take up the prefetch, and none was settled for a while: nothing else is delivered; settle them, or raise WithPrefetch",
			slog.Int("kept", kept), slog.Int("prefetch", s.config.prefetch), suppressed(left))
	}
}

// fill reports whether what is kept takes up the whole prefetch. On a stream one may be enough,
// because what is done after it cannot be acked before it. It is called with mu held.
func (l *laters) fill() bool {
	taken := int64(len(l.all))
	if taken > 0 && l.session.stream != nil {
		taken = l.session.wire.Unsettled()
	}
	return taken >= int64(l.session.config.prefetch)
}
