package steadymq

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// What a consumer is lent: a loan is its use of a connection, and a lease the use by one of its
// sessions, or by the try for one.

// loan is what a consumer is lent: a connection, for one session after the other.
type loan struct {
	*connection
	keeper *keeper // that lends it

	channelFailures  []time.Time  // recent ones, for the escalation; only the supervisor uses it
	served           bool         // it has had a session; only the supervisor uses it
	queue            string       // of its sessions, "" before it has a name; only the try uses it
	topologyFailures atomic.Int32 // failures of a TopologyFunc; tries write, the supervisor reads
}

// tooManyChannelFailures records a failure at channel level and reports whether the connection has
// to be replaced, too.
func (l *loan) tooManyChannelFailures(now time.Time) bool {
	recent := l.channelFailures[:0]
	for _, t := range l.channelFailures {
		if now.Sub(t) < escalateWithin {
			recent = append(recent, t)
		}
	}
	l.channelFailures = append(recent, now)
	return len(l.channelFailures) >= escalateAfter
}

// own records the queue of the sessions on the connection. The tries on it follow one another, so
// nobody else writes it at the same time.
func (l *loan) own(queue string) { l.queue = queue }

// owned returns the queue that the broker has named for an earlier session of the connection, "" if
// there is none.
func (l *loan) owned(of *config) string {
	if of.declare == nil || of.queue != "" {
		return ""
	}
	return l.queue
}

// sameQueue refuses the queue of a TopologyFunc if the function has left another one on this
// connection. As a rule the broker has named that one, and it would live on, bound and unread.
func (l *loan) sameQueue(queue string) error {
	left := l.queue != queue
	if l.queue == "" {
		left = l.topologyFailures.Load() > 0 && strings.HasPrefix(queue, "amq.") // a prefix that only a broker may use
	}
	if left {
		return &orphanedQueueError{was: l.queue, is: queue}
	}
	l.own(queue)
	return nil
}

// tooManyTopologyFailures reports whether a TopologyFunc has failed so often on the connection that
// the connection has to be replaced: each failure may have left a queue behind, and those queues
// end with the connection.
func (l *loan) tooManyTopologyFailures() bool {
	return l.topologyFailures.Load() >= escalateAfter
}

// turns let at most so many consumers be set up at the same time on a connection, because a slow
// broker would not answer all of them within their limits. One that the broker may have closed a
// connection for is set up beside no other such one, so that the next time tells which it was.
type turns struct {
	any     chan struct{}
	suspect chan struct{}
}

// mostSetups is how many consumers are set up at the same time on a connection.
const mostSetups = 32

func newTurns() *turns {
	return &turns{any: make(chan struct{}, mostSetups), suspect: make(chan struct{}, 1)}
}

// turn is a place among those who are set up.
type turn []chan struct{}

// take waits for a turn, or for the end of ctx.
func (t *turns) take(ctx context.Context, suspect bool) turn {
	var taken turn
	places := []chan struct{}{t.any}
	if suspect {
		places = []chan struct{}{t.suspect, t.any}
	}
	for _, place := range places {
		select {
		case place <- struct{}{}:
			taken = append(taken, place)
		case <-ctx.Done():
			return taken
		}
	}
	return taken
}

func (t turn) giveBack() {
	for _, place := range t {
		<-place
	}
}

// leases are the sessions that a connection is lent to. After a basic.cancel there are two for a
// while: the old one, whose handlers may still settle, and its successor. What one of them does to
// the connection waits until the other has given it back. A connection is retired when it must take
// no more sessions; it then ends with its last lease. Sessions, tries and the owner of the
// connection use leases at the same time, under mu.
type leases struct {
	mu       sync.Mutex
	lent     int
	retired  error         // why the connection takes no more sessions; nil as long as it does
	returned chan struct{} // closed when the last lease has ended; nil until watch waits for that
}

// retire is called when no answer has come to a call that belongs to no lease. The connection takes
// no more sessions, and ends now if it is lent to none.
func (c *connection) retire(cause error) {
	if end := c.leases.retire(cause); end != nil {
		c.socket.Kill(end)
	}
}

func (l *leases) retire(cause error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.due(cause)
}

// due retires the connection if there is a cause. It returns why the connection has to end now, or
// nil if it does not have to. It is called with mu held.
func (l *leases) due(cause error) error {
	if l.retired == nil {
		l.retired = cause
	}
	if l.lent > 0 {
		return nil
	}
	return l.retired
}

// lease is the use of a connection by one session, or by the try for one. Its methods are safe for
// concurrent use, and the first one called ends it.
type lease struct {
	conn  *connection
	ended bool // guarded by the mutex of the connection's leases
}

// lend lends the connection to one more session.
func (c *connection) lend() *lease {
	c.leases.mu.Lock()
	defer c.leases.mu.Unlock()
	c.leases.lent++
	return &lease{conn: c}
}

// giveBack ends the lease. A retired connection ends with its last one.
func (l *lease) giveBack() { l.end(nil) }

// giveUp ends the lease of a session when one of its calls has outlasted its limit, and retires the
// connection: the driver's calls take no context, so only the end of the connection ends them.
func (l *lease) giveUp(cause error) { l.end(cause) }

func (l *lease) end(cause error) {
	if end := l.conn.leases.take(l, cause); end != nil {
		go l.conn.socket.Kill(end) // a user's connection may hang in its Close
	}
}

// take takes a lease back, once. It returns why the connection has to end now, or nil if it does
// not have to.
func (l *leases) take(one *lease, cause error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if one.ended {
		return nil
	}
	one.ended = true
	l.lent--
	if l.lent == 0 && l.returned != nil {
		close(l.returned)
		l.returned = nil
	}
	return l.due(cause)
}

// allReturned returns a channel that is closed once the connection is lent to nobody any more. Only
// watch asks, once, after the owner has lent the connection for the last time.
func (l *leases) allReturned() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	returned := make(chan struct{})
	if l.lent == 0 {
		close(returned)
		return returned
	}
	l.returned = returned
	return returned
}

// isRetired reports whether the connection takes no more sessions.
func (l *leases) isRetired() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.retired != nil
}

// orphanedQueueError says that a TopologyFunc has left a queue behind on the connection.
type orphanedQueueError struct{ was, is string }

func (e *orphanedQueueError) Error() string {
	return fmt.Sprintf("the topology function returned the queue %q, and has left another one behind on the same connection", e.is)
}
