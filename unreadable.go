package steadymq

import (
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// unreadable is a message that no handler can be given, and why.
type unreadable struct {
	delivery *Delivery
	err      *MessageError
}

// aside is where the socket's Read puts what is unreadable. It goes past the workers,
// who may all be busy, to the session.
type aside struct {
	more chan struct{} // has a value once there is something

	mu  sync.Mutex
	all []unreadable
}

func newAside() *aside { return &aside{more: make(chan struct{}, 1)} }

// put never blocks.
func (a *aside) put(d *Delivery, err *MessageError) {
	a.mu.Lock()
	a.all = append(a.all, unreadable{d, err})
	a.mu.Unlock()
	select {
	case a.more <- struct{}{}:
	default:
	}
}

func (a *aside) take() []unreadable {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := a.all
	a.all = nil
	return all
}

// tooLarge says why a body is not kept.
func (c *config) tooLarge(size uint64) error {
	if c.maxMessage == 0 || size <= c.maxMessage {
		return nil
	}
	return fmt.Errorf("%w of %d bytes: raise it, or take the message out of the queue", ErrMessageTooLarge, c.maxMessage)
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
	case p.over.Load():
		return ErrStale
	case p.stream != nil:
		return p.send(d, Acked)
	}
	return p.wire.Requeue(d.fence.tag)
}
