package steadymq

import (
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// What comes back from a handler without an ack, or could not be given to one: how long it is held,
// and what is said about it. The workers add to the holds; the session puts aside what cannot be
// read.

// holds are the failed deliveries of a session that are held until they go back to the queue or, on
// a stream, are tried again. Workers add to them, timers take from them, and the session's
// goroutine releases them; all of it under mu.
type holds struct {
	session *session

	mu           sync.Mutex
	timers       map[*Delivery]*time.Timer
	released     bool        // nothing is held any more
	crowdedSince time.Time   // since when they take up half of the prefetch; zero if they do not
	easedSince   time.Time   // since when they take up less again; zero if they do not
	timer        *time.Timer // for the next check or warning; nil before the first
}

// add holds d and calls then after delay, or requeues d at once if the session holds nothing any
// more. It reports whether d is held.
func (h *holds) add(d *Delivery, delay time.Duration, then func()) (held bool) {
	if delay > 0 && h.schedule(d, delay, then) {
		return true
	}
	_ = d.Requeue()
	return false
}

func (h *holds) schedule(d *Delivery, delay time.Duration, then func()) bool {
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
			then()
		}
	})
	h.session.stats.held.Add(1)
	h.check()
	return true
}

// check schedules a warning once too many messages are held. On a stream, others may pile up behind
// a held one later, so there it also schedules another check. It is called with mu held.
func (h *holds) check() {
	crowd := h.isCrowded()
	switch {
	case crowd && (h.crowdedSince.IsZero() || h.easedLongEnough()):
		h.crowdedSince = time.Now()
		h.checkIn(0, h.warn)
	case h.crowdedSince.IsZero() && h.session.stream != nil && len(h.timers) > 0:
		h.checkIn(warnAgainAfter/2, h.recheck)
	}
	if crowd {
		h.easedSince = time.Time{}
	}
}

// easedLongEnough reports whether there has been room for so long that the next crowd is a new one.
func (h *holds) easedLongEnough() bool {
	return !h.easedSince.IsZero() && time.Since(h.easedSince) >= easedAfter
}

func (h *holds) recheck() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.released {
		h.check()
	}
}

func (h *holds) checkIn(d time.Duration, f func()) {
	if h.timer != nil {
		h.timer.Stop()
	}
	h.timer = time.AfterFunc(d, f)
}

func (h *holds) remove(d *Delivery) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.timers[d]
	if ok {
		h.drop(d)
		if !h.isCrowded() && h.easedSince.IsZero() {
			h.easedSince = time.Now()
		}
	}
	return ok
}

// drop removes a held delivery. It is called with mu held.
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

// release ends all holds. Their session settles the deliveries at once: as requeued while it lives,
// and as stale after that.
func (h *holds) release(by settler) {
	h.mu.Lock()
	held, telling := h.timers, h.timer
	h.timers, h.timer, h.released = nil, nil, true
	h.session.stats.held.Add(-int64(len(held)))
	h.mu.Unlock()
	if telling != nil {
		telling.Stop()
	}
	for d, timer := range held {
		timer.Stop()
		if _, unreadable := d.fence.settler.(unreadableSettler); unreadable {
			_ = d.Requeue() // no hook is called, because no handler had it
			continue
		}
		_ = d.fence.settle(by, Requeued)
	}
}

// isCrowded reports whether half of the prefetch or more is held. On a stream one held message may
// be enough, because what is done after it cannot be acked before it. It is called with mu held.
func (h *holds) isCrowded() bool {
	taken := int64(len(h.timers))
	if taken > 0 && h.session.stream != nil && !h.session.valve.shut() {
		taken = h.session.wire.Unsettled()
	}
	return taken > 0 && 2*taken >= int64(h.session.config.prefetch)
}

// warnAgainAfter is the time to the second warning of held messages. After that each comes when
// they have been held for twice as long.
const warnAgainAfter = 2 * time.Minute

// easedAfter is how long there has to be room until the next crowd counts as a new one: messages
// that fail again and again are not held all the time.
const easedAfter = 10 * time.Second

// warn warns of held messages, again and again as long as there are too many.
func (h *holds) warn() {
	h.mu.Lock()
	h.dropSettled()
	held, since := len(h.timers), h.crowdedSince
	if h.released || since.IsZero() || !h.isCrowded() {
		h.crowdedSince = time.Time{}
		h.mu.Unlock()
		return
	}
	lasts := time.Since(since)
	h.checkIn(max(lasts, warnAgainAfter), h.warn)
	h.mu.Unlock()
	s := h.session
	if lasts < warnAgainAfter { // the first warning; an earlier session may just have warned
		if _, ok := s.notices.held.allow(time.Minute); !ok {
			return
		}
	}
	s.warn("failed messages are held and take up the prefetch, what stands behind them waits: mend what fails, "+
		"let it wait at the broker by WithRetry, return Discard for what never can succeed, take what cannot be read out of the queue with another client, or raise WithPrefetch",
		slog.Int("held", held), slog.Int("prefetch", s.config.prefetch), slog.Time("since", since))
}

// warnNearLimit warns of a redelivered message that the limit will soon take.
func (s *session) warnNearLimit(d *Delivery) {
	n, _ := d.count(deliveryCount)
	switch {
	case n == 0 || n < s.limit-s.limit/4:
		return
	case n > s.limit && !d.arrivesCounted(n), n > s.limit+1 && !s.limitKnown:
		return // a count beyond the limit shows that there is none
	}
	left, ok := s.notices.limit.allow(time.Second)
	if !ok {
		return
	}
	message, limit := "a message has come back so often that the queue's delivery limit will soon take it: it is then dropped, or dead-lettered", slog.Int("limit", s.limit)
	if !s.limitKnown {
		message, limit = "a message has come back often: if this queue has RabbitMQ's default delivery limit of 20, it is soon dropped, or dead-lettered", slog.Attr{}
	}
	s.warn(message+". See why its handler fails; Queue.DeadLetter or a policy with delivery-limit -1 keeps it",
		slog.Int("returns", n), limit, slog.String("exchange", d.Exchange), slog.String("routing_key", d.RoutingKey),
		messageID(d.MessageId), suppressed(left))
}

// unreadableHold is the longest that a message is held that no handler can be given: half of
// RabbitMQ's consumer timeout.
const unreadableHold = 15 * time.Minute

// setAside takes care of the messages that no handler can be given.
func (s *session) setAside() {
	for _, m := range s.aside.take() {
		m.err.Queue, m.err.Host, m.err.Session = s.queue, s.conn.host, s.id
		s.stats.unreadable.Add(1)
		s.reporter.unreadable(m.err)
		s.logUnreadable(m.err)
		d := m.delivery
		d.init(unreadableSettler{s})
		s.began(d)
		if s.stream != nil {
			assignOffset(d)
			_ = d.Ack()
			continue
		}
		d.Headers = nil // they may be large, and nobody reads them
		s.holds.add(d, min(jitter(unreadableHold), unreadableHold), func() { _ = d.Requeue() })
	}
}

// logUnreadable logs a message that no handler can be given, at most one in a second.
func (s *session) logUnreadable(e *MessageError) {
	leftOut, ok := s.notices.unreadable.allow(time.Second)
	if !ok {
		return
	}
	what := "a message cannot be read: no handler gets it, it is held and then put back into its queue"
	if s.stream != nil {
		what = "a message cannot be read: no handler gets it, it is stepped over"
	}
	s.warn(what, slog.String("exchange", e.Exchange), slog.String("routing_key", e.RoutingKey), slog.Uint64("delivery_tag", e.DeliveryTag),
		slog.Uint64("size", e.Size), slog.String("reason", e.Err.Error()), suppressed(leftOut))
}

// unreadableSettler settles messages that no handler was given, so they do not count as outcomes. A
// message of a stream is done with. Any other goes back as one that was never started, which a
// delivery limit counts up to RabbitMQ 4.2 only.
type unreadableSettler struct{ *session }

func (p unreadableSettler) settle(d *Delivery, _ Outcome) error {
	switch {
	case p.closed.Load():
		return ErrStale
	case p.stream != nil:
		return p.send(d, Acked)
	}
	return p.wire.Requeue(d.fence.tag)
}

// holdFor returns how long a message is held that has failed for the n-th time, as far as the
// broker counts: twice as long as the last time. Where the broker does not count, the hold stays
// short.
func holdFor(n int, c *config) time.Duration {
	d := c.requeueFirst
	for ; n > 1 && d < c.requeueLongest; n-- {
		d *= 2
	}
	return min(jitter(min(d, c.requeueLongest)), c.requeueLongest)
}

// jitter spreads d over [d/2, d*3/2), so that messages that failed together do not come back
// together.
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d/2 + rand.N(d)
}

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
	before   uint64      // progress at the last look
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
		l.before = l.progress()
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
	now := l.progress()
	kept, stuck := len(l.all), now == l.before && l.fill()
	l.before = now
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

// progress returns a number that changes with whatever shows that not all is stuck: what is settled
// and, with keys, what handlers are given of other ones. It is called with mu held.
func (l *laters) progress() uint64 {
	if l.session.order == nil {
		return l.settled
	}
	return l.settled + l.session.stats.delivered.Load()
}

// fill reports whether what is kept takes up the whole prefetch. On a stream one may be enough,
// because what is done after it cannot be acked before it, and so it is with keys, where others wait
// for it. It is called with mu held.
func (l *laters) fill() bool {
	taken := int64(len(l.all))
	if taken > 0 && (l.session.stream != nil || l.session.order != nil) {
		taken = l.session.wire.Unsettled()
	}
	return taken >= int64(l.session.config.prefetch)
}
