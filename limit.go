package steadymq

import (
	"log/slog"
	"strconv"
	"strings"
	"time"
)

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

// major is the first number of the server's version, 0 if that cannot be read.
func (c *connection) major() int {
	version, _ := c.amqp.Properties["version"].(string)
	first, _, _ := strings.Cut(version, ".")
	major, _ := strconv.Atoi(first)
	return major
}

// limitTerm returns what a declaration asks for first.
func (c *connection) limitTerm(q *Queue) limitTerm {
	if q == nil || q.Type != "quorum" || c.major() < 4 || q.deadLetters() {
		return limitTheirs
	}
	if _, said := q.Args[limitArg]; said {
		return limitTheirs
	}
	return limitOff
}

// deadLetters tells whether the queue passes on what it would drop otherwise, as
// far as the arguments tell.
func (q *Queue) deadLetters() bool {
	_, leads := q.Args["x-dead-letter-exchange"]
	return leads
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
		if n, said := headerInt(q.Args[limitArg]); said {
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
