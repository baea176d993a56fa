package steadymq

import (
	"cmp"
	"time"
)

// What a Run does about its session and its connection while the valve is shut: a Pause, or an open
// breaker.

// Pause lets no handler start until [Consumer.Resume]. Running handlers finish and settle; one whose
// call is under way as Pause returns counts as running. The state is [Paused]. It never blocks, may
// be called from anywhere, handlers and hooks included, and twice is as once. It holds for all Runs
// of the Consumer: before Run it makes that begin paused. Stop, and the end of Run's context, work in
// it as ever.
//
// What was prefetched is held for a minute, or until running handlers have finished, up to half of
// the consumer timeout (15 min by default). Then it goes back to the queue (basic.cancel, basic.nack)
// and nothing is consumed; the connection stays. A connection that is lost meanwhile is healed, and
// nothing is consumed on it. On a RabbitMQ up to 4.2 the way back counts towards the delivery limit
// of a quorum queue (20 by default since 4.0), for every prefetched message.
//
// A Run that begins paused connects and does not look at the queue: what is wrong with that ends Run
// only after Resume. An exclusive queue is kept, unread, and a stream is read on from where its
// handlers are. Two kinds of queue would be gone with their consumer, an auto-delete one of
// [WithQueue] and one that the broker names for a [TopologyFunc]: there the subscription stays, and
// a pause must end before the broker's consumer timeout. An exclusive consumer ([WithExclusive]) and
// the active one of several leave their place to another.
func (c *Consumer) Pause() { c.valve.pause(true) }

// Resume ends a [Consumer.Pause]: handlers start at once with what is held, or else a new session
// begins, on the connection that there is. An open breaker ([WithBreaker]) stays as it is. It never
// blocks, may be called from anywhere, and without a Pause does nothing.
func (c *Consumer) Resume() { c.valve.pause(false) }

// orPaused returns the state that the supervisor has entered, or Paused if it is about to enter that.
func (c *Consumer) orPaused(entered State) State {
	if entered == Consuming && c.valve.shut() {
		return Paused
	}
	return entered
}

// watchValve enters the state of a session that has just begun.
func (s *supervisor) watchValve() *shutTime {
	t := new(shutTime)
	s.turned(t)
	return t
}

// turned enters the state that belongs to how the valve stands.
func (s *supervisor) turned(t *shutTime) { s.show(t.look(s.consumer.valve, time.Now())) }

// show enters Consuming or Paused, unless that was told already.
func (s *supervisor) show(is standing) {
	to, by := Consuming, is.reason()
	if is.shut() {
		to = Paused
	}
	if State(s.consumer.state.Load()) == to && s.shownBy == by {
		return
	}
	s.shownBy = by
	if by == nil {
		s.enter(to, nil)
		return
	}
	s.enter(to, by)
}

// holdsOn reports whether the session stays although the valve has been shut for long: while handlers
// run, whose channel it is, and where its queue would end with it.
func (s *supervisor) holdsOn(t *shutTime) bool {
	if s.endsWithConsumer() {
		t.over = nil
		return true
	}
	if s.session.gate.busy() && !t.usedUp(s.consumer.valve, time.Now()) {
		t.over = time.After(lookAgain)
		return true
	}
	return false
}

// endsWithConsumer reports whether the queue of the session is gone once nobody consumes from it, or
// would not be found again.
func (s *supervisor) endsWithConsumer() bool {
	declared := s.config.declare
	return declared != nil && declared.AutoDelete || s.config.topology != nil && namedByBroker(s.session.queue)
}

// paused keeps a connection, without a session, until there should be one.
func (s *supervisor) paused() stateFunc {
	since := time.Now()
	for {
		is, changed := s.consumer.valve.look()
		if is.wants(time.Now()) || s.conn == nil {
			return s.connecting
		}
		s.show(is)
		s.away = away{}
		var retiring <-chan struct{}
		if !s.owns() {
			retiring = s.conn.retiring.Done()
		}
		select {
		case <-changed:
		case <-s.ctx.Done():
			return s.draining
		case <-retiring:
			s.dropConnection()
			return s.connecting
		case <-s.conn.end.Done():
			return s.lostWhilePaused(since)
		}
	}
}

// lostWhilePaused is what follows the end of a connection that had no session.
func (s *supervisor) lostWhilePaused(since time.Time) stateFunc {
	if time.Since(since) >= healthyAfter {
		s.retry.healthy()
		s.borrower.proved(true, true)
	}
	return s.failed(&SessionError{
		Queue: cmp.Or(s.conn.ofSessions(), s.config.queue), Host: s.conn.host, Session: s.number, Op: "lost", Err: s.conn.end.Cause(),
	})
}
