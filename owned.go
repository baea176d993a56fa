package steadymq

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
)

// Exclusive queues, and with them all that the broker names, belong to a connection: they live
// as long as it does, whatever becomes of its sessions. So the next session on it consumes from
// the same queue, and a connection that owns one is not given up lightly.

// own notes the queue of the sessions of c. The tries on c come one after the other.
func (c *connection) own(queue string) { c.queue = queue }

// owned is the queue that the broker has named for an earlier session of c, "" if there is none.
func (c *connection) owned(of *config) string {
	if of.declare == nil || of.queue != "" {
		return ""
	}
	return c.queue
}

// goneError is a 404 about a queue that was there a moment ago.
type goneError struct{ error }

func (e *goneError) Unwrap() error { return e.error }

// gone marks a refusal that says that there is no such queue. A 404 may say something else, as that
// its node is down: then the queue lives, and another one beside it would be left behind.
func gone(err error, queue string) error {
	if !noQueue(err, queue) {
		return err
	}
	return &goneError{err}
}

// sameQueue refuses the queue of a TopologyFunc if that has left another one behind on this
// connection: as a rule one that the broker has named, which would live on, bound and unread.
func (c *connection) sameQueue(queue string) error {
	left := c.queue != queue
	if c.queue == "" {
		left = c.litter.Load() > 0 && strings.HasPrefix(queue, "amq.") // which only a broker names
	}
	if left {
		return &leftBehindError{was: c.queue, is: queue}
	}
	c.own(queue)
	return nil
}

// littered tells whether a TopologyFunc has failed so often on the connection that the queues it
// may have left behind, one each time, have to go with it.
func (c *connection) littered() bool { return c.litter.Load() >= escalateAfter }

// leftBehindError is a TopologyFunc that has left a queue behind on the connection.
type leftBehindError struct{ was, is string }

func (e *leftBehindError) Error() string {
	return fmt.Sprintf("the topology function returned the queue %q, and has left another one behind on the same connection", e.is)
}

// leftBehind tells whether err is a queue that would be left behind on the connection, and gives
// that up. A new one leaves nothing behind, so the next try goes there, at once.
func (s *supervisor) leftBehind(err error) bool {
	var left *leftBehindError
	if s.ctx.Err() != nil || !errors.As(err, &left) {
		return false
	}
	if left.was != "" && !s.scope.told.renamed.Swap(true) {
		s.reporter.warn("the topology function names another queue for every session, so every session gets a connection of its own; "+
			"what is in a queue that the broker has named is lost with the session. WithQueue keeps such a queue as long as the connection lives",
			slog.String("queue", left.is), slog.String("before", left.was), slog.String("host", s.host))
	}
	s.dropConnection()
	return true
}

// owns tells whether the end of the connection would take a queue with it that WithQueue has
// declared and that has been consumed from.
func (s *supervisor) owns() bool {
	return s.conn != nil && s.conn.served && s.config.declare != nil && s.config.declare.Exclusive
}
