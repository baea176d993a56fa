package steadymq

import (
	"errors"
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

// The delivery limit of a quorum queue drops a message, or dead-letters it, once it
// has come back more often than that: 20 times by default since RabbitMQ 4.0. A
// handler whose database is away for a while would lose all it is given.
const (
	limitArg     = "x-delivery-limit"
	defaultLimit = 20

	// noLimit switches it off from 4.0 on. Before, where there is none by default,
	// it drops a message at its first return.
	noLimit int32 = -1
)

// limitTerm is what the declaration of a queue says about its limit. Each one asks
// for less than the one before.
type limitTerm int

const (
	limitTheirs limitTerm = iota // what the user says, if anything
	limitOff                     // switched off
	limitUnsaid                  // the queue exists with a limit, most likely the default one
	limitKept                    // with one that was declared: it is taken as it is
)

// firstTerm returns what a declaration asks for first.
func firstTerm(c *connection, q *Queue) limitTerm {
	if q == nil || q.Type != "quorum" || c.major() < 4 || q.deadLetters() {
		return limitTheirs
	}
	if _, brokerErr := q.Args[limitArg]; brokerErr {
		return limitTheirs
	}
	return limitOff
}

// deliveryLimit is the limit that takes messages away from this session's queue, 0 for none, and
// whether that is known: of a queue that others have declared it is a guess.
func (s *session) deliveryLimit() (limit int, known bool) {
	q := s.config.declare
	switch {
	case s.stream != nil, s.terms.limit == limitOff:
		return 0, true
	case q != nil && (q.Type != "quorum" || q.deadLetters()):
		return 0, true
	}
	if q != nil {
		if n, brokerErr := headerInt(q.Args[limitArg]); brokerErr {
			return int(min(max(n, 0), maxCount)), true
		}
	}
	if s.conn.major() < 4 {
		return 0, false
	}
	return defaultLimit, false
}

// keepsLimit tells, once in a Run, of a queue that exists with a limit.
func (s *session) keepsLimit() {
	if s.terms.limit <= limitOff || s.told.limitKept.Swap(true) {
		return
	}
	s.warn("the queue was declared before with a delivery limit, which stays: a message that comes back more often is dropped. "+
		"Switch it off by a policy with delivery-limit -1, or delete the queue so that it is declared anew; "+
		"or say what is meant by Queue.DeadLetter or "+limitArg+" in Queue.Args",
		slog.String("broker", s.terms.refusal.Error()))
}

// nearsLimit tells of a redelivered message that the limit will soon take away.
func (s *session) nearsLimit(d *Delivery) {
	n, _ := d.count(deliveryCount)
	switch {
	case n == 0 || n < s.limit-s.limit/4:
		return
	case n > s.limit && !d.arrivesCounted(n), n > s.limit+1 && !s.limitKnown:
		return // more than the limit shows that there is none
	}
	left, ok := s.told.limit.pass(time.Second)
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

// unreadableHold is the longest that a message is held which no handler can be given: half of
// RabbitMQ's consumer timeout.
const unreadableHold = 15 * time.Minute

// setAside sees to the messages that no handler can be given.
func (s *session) setAside() {
	for _, m := range s.aside.take() {
		m.err.Queue, m.err.Host, m.err.Session = s.queue, s.conn.host, s.id
		s.stats.unreadable.Add(1)
		s.reporter.unreadable(m.err)
		s.complain(m.err)
		d := m.delivery
		d.init(passed{s})
		s.began(d)
		if s.stream != nil {
			placed(d)
			_ = d.Ack()
			continue
		}
		d.Headers = nil // they may be large, and nobody is going to read them
		s.holds.add(d, min(jitter(unreadableHold), unreadableHold))
	}
}

// complain logs a message that no handler can be given, one in a second at most.
func (s *session) complain(e *MessageError) {
	leftOut, ok := s.told.unreadable.pass(time.Second)
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

// passed settles what no handler was given, so the outcomes do not count it. A
// stream's message is done with; any other goes back as one that was never started,
// which a delivery limit counts up to RabbitMQ 4.2 only.
type passed struct{ *session }

func (p passed) settle(d *Delivery, _ Outcome) error {
	switch {
	case p.closed.Load():
		return ErrStale
	case p.stream != nil:
		return p.send(d, Acked)
	}
	return p.wire.Requeue(d.fence.tag)
}

// decide turns a handler's error into an outcome and how long to hold d before it.
func decide(err error, d *Delivery, c *config) (Outcome, time.Duration) {
	if err == nil {
		return Acked, 0
	}
	var v *outcomeError
	if errors.As(err, &v) {
		return v.outcome, v.delay
	}
	return Requeued, c.hold(d.Attempt())
}
