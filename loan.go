package steadymq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
)

// What a consumer is lent: a loan is its use of a connection, and a lease the use by one of its
// sessions, or by the try for one.

// loan is what a consumer is lent: a connection, for one session after the other.
type loan struct {
	*connection
	keeper *keeper // that lends it

	channelFailures  []time.Time  // recent ones, for the escalation; only the supervisor uses it
	served           bool         // it has had a session; only the supervisor uses it
	queue            atomic.Value // string: of its sessions, "" before it has a name; tries write, the supervisor reads
	topologyFailures atomic.Int32 // failures of a TopologyFunc; as queue
	asked            atomic.Bool  // WithQueue's queue was declared, whatever became of that; as queue

	// queues live as long as the connection: this consumer has declared them there.
	queues *wire.Queues
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

// own records the queue of the sessions on the connection.
func (l *loan) own(queue string) { l.queue.Store(queue) }

// ofSessions returns the queue of the sessions on the connection, "" if there is none yet.
func (l *loan) ofSessions() string {
	queue, _ := l.queue.Load().(string)
	return queue
}

// owned returns the queue that the broker has named for an earlier session of the connection, "" if
// there is none.
func (l *loan) owned(of *config) string {
	if of.declare == nil || of.queue != "" {
		return ""
	}
	return l.ofSessions()
}

// sameQueue refuses the queue of a TopologyFunc if the function has left another one on this
// connection. As a rule the broker has named that one, and it would live on, bound and unread.
func (l *loan) sameQueue(queue string) error {
	was := l.ofSessions()
	left := was != queue
	if was == "" {
		left = l.topologyFailures.Load() > 0 && namedByBroker(queue)
	}
	if left {
		return &orphanedQueueError{was: was, is: queue}
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

// keepNoOrphans lets a queue go that the broker has named too late for its try, while others live on
// the connection: nobody would know of it.
func (l *loan) keepNoOrphans(ctx context.Context, of *config) {
	ctx = context.WithoutCancel(ctx)
	l.queues.OnOrphan(func(name string) {
		go func() {
			limited, cancel := l.socket.WithSilence(ctx, l.closeTimeout, errCloseTimeout)
			<-l.deleteQueues(limited, cancel, leftQueues{certain: []string{name}}, of)
		}()
	})
}

// deleteQueues deletes queues of a loan that live as long as the connection, which lives on without
// who has declared them: they would be bound and unread there, and locked. One that is not known to
// belong to the consumer alone is deleted only if nobody consumes from it. Where that fails, or is
// not answered within ctx, the connection is replaced. A queue of another consumer may keep it for
// long even so, hence the delete is tried again as long as it stands. cancel ends ctx; done is
// closed after the first try.
func (c *connection) deleteQueues(ctx context.Context, cancel context.CancelFunc, names leftQueues, of *config) (done chan struct{}) {
	done = make(chan struct{})
	lease := c.lend()
	go func() {
		defer close(done)
		left := c.tryDelete(ctx, lease, names, of)
		cancel()
		if left.any() {
			go c.deleteLater(context.WithoutCancel(ctx), left, of)
		}
	}()
	return done
}

// mostDeletes is how often the delete of a queue is tried again: a refusal may be final, as that of
// a queue that somebody consumes from.
const mostDeletes = 10

// deleteLater deletes queues on a connection that cannot be replaced yet.
func (c *connection) deleteLater(ctx context.Context, names leftQueues, of *config) {
	wait := time.Second
	for range mostDeletes {
		select {
		case <-c.end.Done():
			return
		case <-time.After(wait):
		}
		limited, cancel := c.socket.WithSilence(ctx, c.closeTimeout, errCloseTimeout)
		names = c.tryDelete(limited, c.lend(), names, of)
		cancel()
		if !names.any() {
			return
		}
		wait = min(2*wait, operatorCap)
	}
}

// tryDelete returns those that are left.
func (c *connection) tryDelete(ctx context.Context, lease *lease, names leftQueues, of *config) (left leftQueues) {
	unguard := context.AfterFunc(ctx, func() { lease.giveUp(causeOf(ctx)) })
	defer lease.giveBack()
	defer unguard()
	for names.any() {
		name, doubtful, rest := names.next()
		if err := deleteQueue(ctx, c, name, doubtful, of, lease.use); err != nil {
			c.replace(cmp.Or(causeOf(ctx), err))
			break
		}
		names = rest
	}
	return names
}

// leftQueues are those that a consumer leaves on a connection.
type leftQueues struct {
	certain  []string
	doubtful string // WithQueue's, if the answer to its declare is lost; else ""
}

func (l leftQueues) any() bool { return len(l.certain) > 0 || l.doubtful != "" }

func (l leftQueues) next() (name string, doubtful bool, rest leftQueues) {
	if len(l.certain) > 0 {
		return l.certain[0], false, leftQueues{l.certain[1:], l.doubtful}
	}
	return l.doubtful, true, leftQueues{}
}

func deleteQueue(ctx context.Context, c *connection, name string, doubtful bool, of *config, use func(*wire.Channel)) error {
	channel, err := c.openChannel(ctx, use, nil)
	if err != nil {
		return err
	}
	if doubtful { // only a declare tells that it is this connection's
		_, err = of.declareExclusive(channel)
		if isOthers(err) {
			return nil
		}
	}
	if err == nil {
		_, err = channel.QueueDelete(name, !isAlone(of, name), false, false)
	}
	if err == nil {
		_ = channel.Close() // the end of ctx ends that, too
	}
	return err
}

// isAlone reports whether a queue of the consumer's connection is known to be the consumer's alone:
// it is that of WithQueue, or the broker has named it.
func isAlone(of *config, queue string) bool { return of.declaresOwned() || namedByBroker(queue) }

// isOthers reports whether the broker says that a queue is locked by another connection.
func isOthers(err error) bool {
	var said *amqp.Error
	return errors.As(err, &said) && said.Server && said.Code == amqp.ResourceLocked
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

// takeTurn waits for a turn, or for the end of ctx, or until the connection takes no more sessions.
func (c *connection) takeTurn(ctx context.Context, suspect bool) turn {
	var taken turn
	places := []chan struct{}{c.turns.any}
	if suspect {
		places = []chan struct{}{c.turns.suspect, c.turns.any}
	}
	for _, place := range places {
		select {
		case place <- struct{}{}:
			taken = append(taken, place)
			continue
		case <-c.end.Done():
		case <-c.retiring.Done():
		case <-ctx.Done():
		}
		return taken
	}
	return taken
}

func (t turn) giveBack() {
	for _, place := range t {
		<-place
	}
}

// leases are the sessions that a connection is lent to, and the tries for sessions. What one of
// them does to the connection waits until the others have given it back. A connection is retired
// when it must take no more sessions; it ends with its last lease. Sessions, tries and the owner of
// the connection use leases at the same time, under mu.
type leases struct {
	mu       sync.Mutex
	lent     int
	retired  error         // why the connection takes no more sessions; nil as long as it does
	kept     bool          // a queue ends with the connection: that closes once it is no longer borrowed, and not before
	returned chan struct{} // closed when the last lease has ended; nil until watch waits for that
}

// mostGivenUp is how many channels of a connection may be given up, with no answer from the broker,
// before the connection is replaced.
const mostGivenUp = 3

// openChannel opens a channel. It tells use of it before the broker has answered, so that it can be
// given up meanwhile. What is declared on it is added to queues, if that is not nil.
func (c *connection) openChannel(ctx context.Context, use func(*wire.Channel), queues *wire.Queues) (*amqp.Channel, error) {
	claim, err := c.socket.ClaimChannel(ctx)
	if err != nil {
		return nil, err
	}
	defer claim.Release()
	if queues != nil {
		claim.Report(queues)
	}
	use(claim)
	limit := time.AfterFunc(c.closeTimeout, func() {
		if claim.Held() && c.leases.shared() {
			claim.GiveUp(amqp.ChannelError, errChannelsHeld.Error())
		}
	})
	defer limit.Stop()
	channel, err := c.amqp.Channel()
	if isHeld(err) {
		err = errChannelsHeld
	}
	return channel, err
}

// errChannelsHeld says that no number is left for a channel but those of channels that were given up.
var errChannelsHeld = fmt.Errorf("the channels that are left wait for the broker to confirm their end: %w", amqp.ErrChannelMax)

// isHeld reports whether err is what openChannel has told the driver.
func isHeld(err error) bool {
	var said *amqp.Error
	return errors.As(err, &said) && said.Reason == errChannelsHeld.Error()
}

// giveUp ends a channel on which a call was not answered in time, while others live on the
// connection. The connection is retired once there are too many of them.
func (c *connection) giveUp(channel *wire.Channel, cause error) {
	channel.GiveUp(amqp.InternalError, "given up: a call was not answered in time")
	if c.socket.GivenUp() >= mostGivenUp {
		c.replace(cause)
	}
}

// replace retires the connection and tells its sessions to move.
func (c *connection) replace(cause error) {
	c.retire(cause)
	c.retiring.notify(cause)
}

// retire lets the connection take no more sessions. It ends now if it is lent to none.
func (c *connection) retire(cause error) {
	if end := c.leases.retire(cause); end != nil {
		c.socket.Kill(end)
	}
}

func (l *leases) retire(cause error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.due(cause, l.kept)
}

// due retires the connection if there is a cause. It returns why the connection has to end now, or
// nil if it does not have to, or is kept. It is called with mu held.
func (l *leases) due(cause error, kept bool) error {
	if l.retired == nil {
		l.retired = cause
	}
	if l.lent > 0 || kept {
		return nil
	}
	return l.retired
}

// keep keeps a retired connection until nobody borrows it any more, although it is lent to no
// session.
func (c *connection) keep() {
	c.leases.mu.Lock()
	defer c.leases.mu.Unlock()
	c.leases.kept = true
}

// lease is the use of a connection by one session, or by the try for one. Its methods are safe for
// concurrent use. The first of giveBack and giveUp ends it.
type lease struct {
	conn    *connection
	channel *wire.Channel // in use; guarded by the mutex of the connection's leases, as the rest
	ended   bool
	up      bool // it ended by giveUp
}

// lend lends the connection to one more session.
func (c *connection) lend() *lease {
	c.leases.mu.Lock()
	defer c.leases.mu.Unlock()
	c.leases.lent++
	return &lease{conn: c}
}

// use tells the lease which channel is in use. One that has been given up meanwhile gets no
// further.
func (l *lease) use(channel *wire.Channel) {
	l.conn.leases.mu.Lock()
	l.channel = channel
	up := l.up
	l.conn.leases.mu.Unlock()
	if up {
		channel.GiveUp(amqp.InternalError, "given up: the try has taken too long")
	}
}

// givenUp reports whether the lease has ended by giveUp.
func (l *lease) givenUp() bool {
	l.conn.leases.mu.Lock()
	defer l.conn.leases.mu.Unlock()
	return l.up
}

// giveBack ends the lease. A retired connection ends with its last one.
func (l *lease) giveBack() {
	if last, end := l.conn.leases.take(l, nil); last {
		l.kill(end)
	}
}

// giveUp ends the lease when a call has outlasted its limit: the driver's calls take no context, so
// only the end of the channel ends them, or of the connection if it is lent to nobody else.
func (l *lease) giveUp(cause error) {
	last, end := l.conn.leases.take(l, cause)
	if last {
		l.kill(end)
	} else if channel := l.inUse(); channel != nil {
		l.conn.giveUp(channel, cause)
	}
}

// inUse returns the channel in use, nil if there is none yet.
func (l *lease) inUse() *wire.Channel {
	l.conn.leases.mu.Lock()
	defer l.conn.leases.mu.Unlock()
	return l.channel
}

// kill ends the connection if there is a cause.
func (l *lease) kill(cause error) {
	if cause != nil {
		go l.conn.socket.Kill(cause) // a user's connection may hang in its Close
	}
}

// take takes a lease back, once. It reports whether that was the last one, and why the connection
// has to end then, nil if it does not have to. A cause says that it was given up.
func (l *leases) take(one *lease, cause error) (last bool, end error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if one.ended {
		return true, nil
	}
	one.ended, one.up = true, cause != nil
	l.lent--
	if l.lent > 0 {
		return false, nil
	}
	if l.returned != nil {
		close(l.returned)
		l.returned = nil
	}
	return true, l.due(cause, l.kept && cause == nil) // nobody else lives on it, so no channel can be given up alone
}

// any reports whether the connection is lent to somebody.
func (l *leases) any() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lent > 0
}

// shared reports whether the connection is lent to more than one.
func (l *leases) shared() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lent > 1
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
