package steadymq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
)

// session is one *amqp.Channel with one consumer on it. It is never repaired, only replaced. A
// fresh channel per session is what fences late acks: the channel of a dead session answers
// ErrClosed, and its delivery tags mean nothing on any other.
//
// The goroutine of the try makes it and hands it to the supervisor, which waits for the first sign of
// its end (consume) and then lets it end (finish): run does that on a goroutine of its own. As long
// as it consumes it has none, for a consumer may be idle for hours. Only these three write its plain
// fields, one after the other. Workers take from inbox, pass gate and settle; the supervisor reads
// end, done and, once done is closed, drainErr and closeTook.
//
// run leads it to one of these ends:
//
//	consuming -> lost                    channel or connection gone
//	          -> retired, then over      basic.cancel: running handlers may still settle
//	          -> drained, then over      stop was asked
type session struct {
	*scope
	id   uint64 // counts the sessions of a Run
	try  uint64 // counts the tries of a Run, so no other session has the same
	conn *loan

	channel     *amqp.Channel
	wire        *wire.Subscription // carries deliveries and settlements
	inbox       *inbox             // deliveries that no worker has taken yet
	aside       *aside             // deliveries that no handler can be given
	queue       string
	tag         string
	cancels     chan string // the driver's NotifyCancel
	channelEnd  channelEnd
	lease       *lease      // of the connection
	declaration declaration // what its declaration asks for
	limit       int         // delivery limit of its queue, 0 if none drops messages
	limitKnown  bool        // limit is no guess

	destinations destinations // of failed messages, under WithRetry
	brokerDelays bool         // what goes back waits at the broker (x-delayed-retry-type)

	ctx    context.Context // parent of the handlers' contexts
	cancel context.CancelCauseFunc

	gate      gate          // handlers of this session that are running
	holds     holds         // failed deliveries that wait to go back
	laters    laters        // deliveries that were kept by Later
	transfers transfers     // failed deliveries whose copies are under way
	places    *places       // of its deliveries, under the mutex of order; nil without one
	backlog   backlog       // whether handlers keep up with the prefetch
	collected atomic.Int64  // deliveries of the batch that is being collected, which are in the gate
	stall     *notifier     // set by the prober: why it wants another session; nil if there is none
	end       *notifier     // why there are no more deliveries
	closed    atomic.Bool   // no settlement is sent any more
	settled   atomic.Bool   // a settlement was sent, which makes the session healthy sooner
	done      chan struct{} // made by finish; closed when nothing of it is left
	since     time.Time     // when consume-ok came

	settler  settler       // the session itself, or a hookSettler around it
	received atomic.Uint64 // deliveries given to handlers, for the stall detector

	finishing bool          // run has started
	givenUp   bool          // a call on the channel was not answered in time; only run uses it
	drainErr  error         // why acks may be lost, or handlers did not end; read after done
	closeTook time.Duration // how long the close took; read after done
}

// scope is what all sessions of one Run share. newSupervisor makes it, and its plain fields do not
// change after that.
type scope struct {
	config    *config
	from      *connections
	stats     *counters
	reporter  *reporter
	handlers  context.Context // parent of the contexts of handlers
	running   func() int64    // returns how many workers have not returned
	hire      func() bool     // starts one more worker; true once there may be no more
	stream    *position       // where to resume, nil unless the queue is a stream
	saver     *saver          // keeps that over restarts, nil without WithStreamOffsets; made by supervisor.run
	order     *order          // of keys, that of the Consumer; nil without WithOrderingKey
	notices   *notices
	valve     *valve
	grouped   bool          // others may share the connection
	asked     atomic.Value  // string: the queue whose destinations have been declared
	publisher *publisher    // of the copies of failed messages
	tries     atomic.Uint64 // so far; two may overlap if one was abandoned
}

// begin returns the number of a new try.
func (s *scope) begin() uint64 { return s.tries.Add(1) }

// streamPosition returns the position of the session in its stream. It is nil if the queue is no
// stream, or if another try has begun since: then this try has been abandoned, and what it finds
// out must not change the position.
func (s *session) streamPosition() *position {
	if s.tries.Load() != s.try {
		return nil
	}
	return s.stream
}

// abandoned counts a user's function that did not return and was left running.
func (s *scope) abandoned() { s.stats.abandoned.Add(1) }

func (s *scope) drainError() error {
	return &DrainError{Handlers: int(s.running()), Unsettled: int(s.stats.later.Load()), Limit: s.config.drainTimeout}
}

// notDone is the error of a drain whose limit has passed: handlers are still running, or what they
// kept for later is not settled, or only copies of failed messages are not confirmed.
func (s *session) notDone() error {
	if s.running() > 0 || s.stats.later.Load() > 0 {
		return s.drainError()
	}
	return s.lost(errUnconfirmed)
}

// openSession opens a channel on c, sets it up and subscribes, all within ctx. The driver's calls
// take no context. So the end of ctx ends the connection under them or, if that is lent to another
// session too, the channel.
func openSession(ctx context.Context, c *loan, of *scope, id, try uint64, tag string, step *step) (*session, error) {
	lease := c.lend()
	unguard := context.AfterFunc(ctx, func() { lease.giveUp(causeOf(ctx)) })
	if of.grouped {
		c.keepNoOrphans(ctx, of.config)
	}

	t := declaration{limit: firstLimit(c.connection, of.config.declare), owned: c.owned(of.config)}
	for {
		s, err := trySession(ctx, c, of, id, try, tag, t, lease, step)
		if err != nil && t.relax(err) {
			continue
		}
		inTime := unguard()
		if err == nil && !inTime { // ctx ended first, and the lease with it
			s.close()
			err = s.failure(step.String(), context.Cause(ctx))
		}
		if err == nil {
			return s, nil
		}
		if lease.givenUp() { // what the driver says of it is not the reason
			of.stats.givenUp.Add(1)
			err = &SessionError{Queue: of.config.queue, Host: c.host, Op: step.String(), Session: id, Err: causeOf(ctx)}
		}
		lease.giveBack()
		return nil, err
	}
}

// trySession is one round of openSession: it asks for what t says.
func trySession(ctx context.Context, c *loan, of *scope, id, try uint64, tag string, t declaration, lease *lease, step *step) (*session, error) {
	step.at("channel")
	channel, err := c.openChannel(ctx, lease.use, c.queues)
	if err != nil {
		return nil, &SessionError{Queue: of.config.queue, Host: c.host, Op: "channel", Session: id, Err: c.explain(err)}
	}
	s := &session{
		scope:       of,
		id:          id,
		try:         try,
		conn:        c,
		channel:     channel,
		tag:         tag,
		declaration: t,
		lease:       lease,
		channelEnd:  channelEnd{closes: channel.NotifyClose(make(chan *amqp.Error, 1))},
		cancels:     channel.NotifyCancel(make(chan string, 2)), // a lookup has two consumers
		end:         newNotifier(),
	}
	s.holds.session, s.laters.session = s, s
	if s.order != nil {
		s.places = &places{wake: newDelivery()}
	}
	s.settler = s
	if of.config.stallAfter > 0 {
		s.stall = newNotifier()
	}
	if of.config.hooks.Settled != nil {
		s.settler = hookSettler{s}
	}
	s.receive()
	if op, err := s.subscribe(ctx, step); err != nil {
		s.closeFailed()
		s.forget()
		err = s.channelCause(err)
		s.streamPosition().setupFailed(err)
		return nil, s.failure(op, c.explain(err))
	}
	s.since = time.Now()
	s.limit, s.limitKnown = s.deliveryLimit()
	s.warnOfKeptLimit()
	s.ctx, s.cancel = context.WithCancelCause(of.handlers)
	s.watchBacklog()
	return s, nil
}

// closeFailed closes the channel of a round that has failed, or whose question has used it up.
// Nothing depends on the broker's answer, so without one the channel is given up, and the next
// round need not wait as long as a set-up may take. ctx ends the wait, too.
func (s *session) closeFailed() {
	limit := s.config.closeTimeout
	giveUp := func() {
		s.stats.givenUp.Add(1)
		s.conn.giveUp(s.lease.inUse(), errCloseTimeout)
	}
	defer s.conn.socket.AfterSilence(limit, max(limit, s.config.setupTimeout), giveUp)()
	_ = s.channel.Close()
}

// receive registers where the deliveries of the consumer with the session's tag go.
func (s *session) receive() {
	s.inbox, s.aside = newInbox(s.config.prefetch, s.hire), newAside()
	r := &receiver{inbox: s.inbox, aside: s.aside, config: s.config}
	if s.order != nil { // a nil order is no nil interface
		r.order = s.order
	}
	s.wire = s.conn.socket.Subscribe(s.tag, s.config.prefetch, r)
}

// forget unregisters a consumer that does not exist, or not any more.
func (s *session) forget() {
	s.inbox.close()
	s.clear()
	s.wire.Forget()
}

// clear takes what no worker has taken, once the inbox is closed.
func (s *session) clear() []*Delivery {
	all := s.inbox.clear()
	for _, m := range s.aside.take() {
		all = append(all, m.delivery)
	}
	return all
}

// subscribe declares and consumes. It returns the step that failed, and why.
func (s *session) subscribe(ctx context.Context, step *step) (op string, err error) {
	step.at("topology")
	s.queue, err = s.topology(ctx)
	if err != nil {
		return "topology", err
	}
	if op, err := s.declareDestinations(); err != nil {
		return op, err
	}
	step.at("offsets")
	if err := s.restore(ctx); err != nil {
		return "offsets", err
	}
	step.at("consume")
	if offset, unclear := s.streamPosition().needsLookup(s.queue, s.config.consumeArgs[offsetKey]); unclear && s.declaration.queue == "" {
		if err := s.locate(ctx, offset); err != nil {
			return "consume", err
		}
		return "consume", &freshChannelError{queue: s.queue}
	}
	// The prefetch is per consumer (global=false): RabbitMQ refuses or ignores the other form.
	step.at("qos")
	if err := s.channel.Qos(s.config.prefetch, 0, false); err != nil {
		return "qos", err
	}
	step.at("consume")
	args := s.streamPosition().resume(s.try, s.config.consumeArgs, s.declaration.queue != "")
	_, err = s.channel.Consume(s.queue, s.tag, false, s.config.exclusive, false, false, args)
	if err == nil {
		s.streamPosition().subscribed(args[offsetKey])
	}
	if s.config.declare != nil { // an auto-delete queue may have ended with its last consumer
		err = gone(err, s.queue)
	}
	return "consume", err
}

// channelCause returns, in place of the driver's ErrClosed, what the broker said when it closed the
// channel, if it did.
func (s *session) channelCause(err error) error {
	if !errors.Is(err, amqp.ErrClosed) {
		return err
	}
	// ErrClosed says that the cause is about to come.
	if brokerErr := s.channelEnd.await(); !errors.Is(brokerErr, errChannelEnded) {
		return brokerErr
	}
	return err
}

// channelEnd is why the driver's channel ended. It belongs to the goroutine of the try, and then to
// run.
type channelEnd struct {
	// closes is the driver's NotifyClose. It gets one value at most before it is closed, and has
	// room for it, so the driver never waits for us.
	closes <-chan *amqp.Error
	cause  error // what the broker said, else errChannelEnded; nil while nobody has read closes
}

// record notes what was read from closes.
func (c *channelEnd) record(said *amqp.Error) {
	switch {
	case c.cause != nil: // the first one stays
	case said != nil:
		c.cause = said
	default:
		c.cause = errChannelEnded
	}
}

// await waits for the end of the channel and returns its cause.
func (c *channelEnd) await() error {
	c.record(<-c.closes)
	return c.cause
}

// Cause returns the cause, nil while the channel has not ended.
func (c *channelEnd) Cause() error {
	select {
	case said := <-c.closes:
		c.record(said)
	default:
	}
	return c.cause
}

// sign is what is waited for while a session consumes.
type sign int

const (
	signUnreadable sign = iota // messages were set aside
	signLost                   // the channel or the connection ends
	signCancelled              // basic.cancel
	signStalled                // the prober wants another session
	signStop                   // a drain is asked for
	signRetiring               // the connection is to go
	signProven                 // the consumer was healthy for a while
	signTurned                 // the valve stands otherwise
	signHeld                   // the valve is shut for so long that what is held has to go back
)

// signals are those that concern a session and do not come from it.
type signals struct {
	stop, retiring <-chan struct{}
	proven         <-chan time.Time
	shut           *shutTime // of the session
	looks          int       // how often the session has stayed
}

// consume waits for the next sign. The driver promises no order among its signs.
func (s *session) consume(from *signals) sign {
	select {
	case <-s.aside.more:
		return signUnreadable
	case said := <-s.channelEnd.closes:
		s.channelEnd.record(said)
	case _, cancelled := <-s.cancels:
		if cancelled {
			return signCancelled
		}
	case <-s.conn.end.Done():
	case <-s.stall.Done():
		return signStalled
	case <-from.stop:
		return signStop
	case <-from.retiring:
		return signRetiring
	case <-from.proven:
		return signProven
	case <-from.shut.changed:
		return signTurned
	case <-from.shut.over:
		return signHeld
	}
	return signLost
}

// finish lets the session end, unless it ends already. done is closed when it has. signStop asks for
// a drain.
func (s *session) finish(first sign) {
	if !s.finishing {
		s.finishing, s.done = true, make(chan struct{})
		go s.run(first)
	}
}

// close asks for a drain, if the session has not begun to end, and waits until it has ended.
func (s *session) close() {
	s.finish(signStop)
	<-s.done
}

// run ends the session, up to close-ok or its limit.
func (s *session) run(first sign) {
	defer close(s.done)
	cause := s.causeAt(first)
	hardLimit := s.config.drainTimeout
	switch {
	case cause == nil:
		hardLimit = s.config.closeTimeout // no deliveries can hold up close-ok any more
		s.drain()
	case errors.Is(cause, errCancelled):
		s.stream.doubt()
		s.retire(cause)
	case errors.Is(cause, errMoved), errors.Is(cause, errPaused):
		s.retire(cause)
	default:
		s.lose(cause)
	}
	s.closeChannel(hardLimit)
	s.lose(cmp.Or(cause, error(errStopped)))
	s.clear()
	s.wire.LeaveTombstone()
	s.lease.giveBack()
}

// causeAt returns why the session ends at its first sign, nil if a drain is asked for. Which of
// several signs was seen first says little, so the cause of a loss is found from the state after it.
func (s *session) causeAt(first sign) error {
	switch first {
	case signStop:
		return nil
	case signCancelled:
		return s.lost(errCancelled)
	case signStalled:
		return s.lost(s.stall.Cause())
	case signRetiring, signProven:
		return s.lost(errMoved)
	case signHeld:
		return s.lost(errPaused)
	}
	return s.lost(s.diagnose())
}

func (s *session) lost(err error) error { return s.failure("lost", err) }

// acksLost is lost for a session that was ending anyway: nothing proves any more that its last
// settlements arrived.
func (s *session) acksLost(err error) error {
	return s.lost(fmt.Errorf("%w; this was while stopping: the last acks may be lost, and their messages come again", err))
}

func (s *session) failure(op string, err error) error {
	return &SessionError{Queue: cmp.Or(s.queue, s.config.queue), Host: s.conn.host, Session: s.id, Op: op, Err: err}
}

// attrs name the session in a log line.
func (s *session) attrs() []slog.Attr {
	return []slog.Attr{
		slog.String("queue", s.queue), slog.String("consumer", s.tag),
		slog.Uint64("session", s.id), slog.String("host", s.conn.host),
	}
}

// warn logs what an operator should know and what no change of state reports.
func (s *session) warn(message string, attrs ...slog.Attr) {
	s.reporter.warn(message, append(s.attrs(), attrs...)...)
}

// diagnose returns why the session was lost. Several signs of one end may have come; the cause of
// the connection's end counts before that of the channel's.
func (s *session) diagnose() error {
	if s.conn.amqp.IsClosed() || s.conn.end.Cause() != nil {
		<-s.conn.end.Done() // bounded: the connection is ending
		return s.conn.end.Cause()
	}
	// NotifyCancel was closed without a value. Either the close of the channel follows at once, or
	// the connection is about to end.
	select {
	case said := <-s.channelEnd.closes:
		s.channelEnd.record(said)
	case <-s.conn.end.Done():
	case <-time.After(s.config.closeTimeout):
	}
	return cmp.Or(s.conn.end.Cause(), s.channelEnd.Cause(), error(errChannelEnded))
}

// takeNoMore lets no more handlers start.
func (s *session) takeNoMore() {
	s.gate.close()
	s.backlog.stop()
	s.inbox.close()
	s.order.end(s)
}

// lose ends a session whose channel is gone: the contexts of running handlers end, and nothing that
// they settle from now on reaches the wire.
func (s *session) lose(cause error) {
	s.closed.Store(true)
	s.takeNoMore()
	s.cancel(cause)
	s.end.notify(cause)
	s.releaseHeld()
}

// movesLate reports whether the successor would have to wait until handlers have finished: that of
// a stream resumes behind what they work on, and with keys it would overtake that.
func (s *session) movesLate() bool { return (s.stream != nil || s.order != nil) && s.gate.busy() }

// retire ends a session that the broker has cancelled, or that moves. Its channel still works, so
// running handlers may settle, which saves needless duplicates; the successor consumes meanwhile.
// Where the session of a stream moves the successor waits for them: it begins where they are. What
// no handler has started goes back at once.
func (s *session) retire(cause error) {
	s.takeNoMore()
	if s.order == nil && (s.stream == nil || !errors.Is(cause, errMoved)) {
		s.end.notify(cause)
	}
	// RabbitMQ 4.3 serves the cancelled consumer again once its overdue deliveries are settled. The
	// driver no longer knows that consumer, so those messages would be stuck until the channel
	// closes. Other versions ignore an unknown tag.
	_ = s.channel.Cancel(s.tag, true)
	s.handBackRest()
	s.releaseHeld()
	limit := time.NewTimer(s.config.drainTimeout)
	defer limit.Stop()
	select {
	case <-s.gate.done: // closeChannel proves their settlements
		if s.order == nil {
			s.end.notify(cause)
		}
		return
	case said := <-s.channelEnd.closes:
		s.channelEnd.record(said)
		s.drainErr = s.acksLost(s.diagnose())
	case <-s.conn.end.Done():
		s.drainErr = s.acksLost(s.conn.end.Cause())
	case <-limit.C:
	}
	s.lose(cause)
}

// drain ends a session in order: no new deliveries, the unstarted ones back to the queue, running
// handlers within the limit. closeChannel then proves their acks by its close-ok.
func (s *session) drain() {
	limit := time.NewTimer(s.config.drainTimeout)
	defer limit.Stop()
	s.takeNoMore()
	s.end.notify(errStopped)
	s.drainErr = s.unsubscribe(limit.C)
	s.releaseHeld() // after basic.cancel, or the broker would deliver them here again
	if s.drainErr == nil {
		s.drainErr = s.awaitHandlers(limit.C)
	}
	if s.drainErr != nil {
		s.lose(s.drainErr)
	}
}

// unsubscribe sends basic.cancel and hands back what no worker took.
func (s *session) unsubscribe(limit <-chan time.Time) error {
	err := s.call(limit, func() error { return s.channel.Cancel(s.tag, false) })
	switch {
	case err == nil:
		s.handBackRest()
		return nil
	case errors.Is(err, errDrainLimit) && s.gate.busy():
		return s.notDone()
	case errors.Is(err, errDrainLimit), errors.Is(err, errCloseTimeout):
		return s.acksLost(errCloseTimeout)
	case !s.channel.IsClosed(): // an unexpected reply, so later ones would be, too
		s.giveUp(err)
		return s.acksLost(err)
	}
	return s.acksLost(s.diagnose())
}

func (s *session) awaitHandlers(limit <-chan time.Time) error {
	select {
	case <-s.gate.done:
		return nil
	case said := <-s.channelEnd.closes:
		s.channelEnd.record(said)
		return s.acksLost(s.diagnose())
	case <-s.conn.end.Done():
		return s.acksLost(s.conn.end.Cause())
	case <-limit:
		return s.notDone()
	}
}

// call bounds a call of the driver on the session's channel by the close limit, which counts
// silence. limit ends the wait in any case. A call that is not answered in time occupies the
// channel for good, so the session gives the channel up.
func (s *session) call(limit <-chan time.Time, f func() error) error {
	answer := make(chan error, 1)
	go func() { answer <- f() }()
	silent := make(chan struct{})
	defer s.conn.socket.AfterSilence(s.config.closeTimeout, maxDuration, func() { close(silent) })()
	overdue := errCloseTimeout
	select {
	case err := <-answer:
		return err
	case <-silent:
	case <-limit:
		overdue = errDrainLimit
	}
	s.giveUp(errCloseTimeout)
	return overdue
}

// giveUp ends the channel, by itself or with its connection.
func (s *session) giveUp(cause error) {
	s.givenUp = true
	s.stats.givenUp.Add(1)
	s.lease.giveUp(cause)
}

// handBackRest returns to the queue what was delivered and no worker took. basic.nack says that it
// was never started, so it does not count towards a delivery limit (up to RabbitMQ 4.2 it does).
func (s *session) handBackRest() {
	for _, d := range s.clear() {
		s.handBack(d.DeliveryTag)
	}
}

// unstarted takes back what a worker took and may not start. It goes to the queue with the others,
// after the basic.cancel: before that the broker would deliver it to this consumer once more.
func (s *session) unstarted(d *Delivery) {
	s.order.left(s, d)
	if !s.inbox.takeBack(d) {
		s.handBack(d.DeliveryTag)
	}
}

// postpone lets what a worker took last be taken next.
func (s *session) postpone(d *Delivery) {
	if !s.inbox.putFirst(d) {
		s.handBack(d.DeliveryTag)
	}
}

// handBack returns a delivery that no handler has seen. If the session is over, the broker has
// taken back everything by itself. A stream has nothing to return to. With keys the end of the
// channel returns all that is unsettled, in order.
func (s *session) handBack(tag uint64) {
	if s.closed.Load() || s.stream != nil || s.order != nil {
		return
	}
	_ = s.wire.Requeue(tag)
}

// closeChannel closes the channel and waits for close-ok, which is the only proof in AMQP 0-9-1
// that the acks before it arrived. The limit is the close limit, counted in silence: the deliveries
// of a successor may hold up close-ok, for as long as hardLimit. The driver's Close returns nil for
// a channel that has ended already, so the reason why it ended decides.
func (s *session) closeChannel(hardLimit time.Duration) {
	since := time.Now()
	over := time.NewTimer(max(hardLimit, s.config.closeTimeout))
	defer over.Stop()
	err := error(errCloseTimeout)
	if !s.givenUp {
		err = s.call(over.C, s.channel.Close)
	}
	s.closeTook = time.Since(since)
	if s.givenUp { // its goroutines end with the connection
		err = errCloseTimeout
		go drain(s.cancels)
	} else {
		cause := s.channelEnd.await()
		drain(s.cancels)
		if !errors.Is(cause, errChannelEnded) {
			err = s.diagnose()
		}
	}
	if err != nil && !s.closed.Load() {
		s.drainErr = s.acksLost(err)
	}
}

// began records that a handler is given d, where that matters.
func (s *session) began(d *Delivery) {
	if s.config.stallAfter > 0 {
		s.received.Add(1)
	}
	s.stream.began(s.try, d)
	if d.Redelivered && s.limit > 0 {
		s.warnNearLimit(d)
	}
}

// number implements settler.
func (s *session) number() uint64 { return s.id }

// sent implements settler.
func (s *session) sent(d *Delivery, o Outcome) { s.order.settled(s, d, o) }

// source implements settler.
func (s *session) source() (queue, host string) { return s.queue, s.conn.host }

// context implements settler.
func (s *session) context() context.Context { return s.ctx }

// settledLater implements settler.
func (s *session) settledLater(d *Delivery) { s.laters.remove(d) }

// settle implements settler: it puts one settlement on the wire of this session's channel, or none
// if the session is over. A failed message is sent as a reject, which counts towards a quorum
// queue's delivery limit; one whose copy could not be sent as a nack, which from RabbitMQ 4.3 on does
// not.
func (s *session) settle(d *Delivery, o Outcome) error {
	s.order.settling(s, d, o)
	if s.closed.Load() {
		s.stats.stale.Add(1)
		return ErrStale
	}
	if err := s.send(d, o); err != nil {
		s.stats.stale.Add(1)
		return fmt.Errorf("%w (%w)", ErrStale, err)
	}
	s.stats.outcomes[o].Add(1)
	if !s.settled.Load() {
		s.settled.Store(true)
	}
	return nil
}

// hookSettler is a session whose settlements are reported to Hooks.Settled.
type hookSettler struct{ *session }

func (s hookSettler) settle(d *Delivery, o Outcome) error {
	err := s.session.settle(d, o)
	if err != nil {
		o = Stale
		d.fence.outcome.Store(uint32(Stale))
	}
	s.reporter.settled(d, o)
	return err
}

// releaseHeld settles the deliveries that are held and, once the session is lost, those whose
// copies are under way and those that were kept for later. Hooks.Settled is called elsewhere,
// because it must not delay the session's own goroutine.
func (s *session) releaseHeld() {
	held := &collectingSettler{session: s}
	s.holds.release(held)
	if s.closed.Load() {
		s.transfers.release(held)
		s.laters.release(held)
	}
	s.reporter.released(held.deliveries)
}

// collectingSettler is a session that records what it settles. Only releaseHeld uses it, on one
// goroutine.
type collectingSettler struct {
	*session
	deliveries []*Delivery
}

func (c *collectingSettler) settle(d *Delivery, o Outcome) error {
	c.deliveries = append(c.deliveries, d)
	return c.session.settle(d, o)
}

func (s *session) send(d *Delivery, o Outcome) error {
	switch {
	case o == Requeued && s.order.leaves(s): // the end of the channel puts it back
		return nil
	case s.stream == nil && o.acks():
		return s.wire.Ack(d.fence.tag)
	case s.stream == nil && o == Requeued && d.fence.isCopied(): // no handler has failed anew
		return s.wire.Requeue(d.fence.tag)
	case s.stream == nil:
		return s.wire.Reject(d.fence.tag, o == Requeued)
	case o == Requeued: // a stream takes any settlement as an ack
		s.tryAgain(d)
		return nil
	}
	for _, done := range s.stream.ready(s.try, d) {
		if err := s.wire.Ack(done.tag); err != nil {
			return err
		}
		s.stream.acknowledged(s.try, done)
	}
	return nil
}

// againAfter is the wait before a try in place, which would otherwise spin.
const againAfter = 10 * time.Millisecond

// tryAgain gives the message of d to a worker once more, in place. To the broker it is the same
// delivery; the handler gets another Delivery, so that nothing left over from the earlier try can
// settle it. Once the session has ended no worker takes it any more.
func (s *session) tryAgain(d *Delivery) {
	again := d.again()
	time.AfterFunc(againAfter, func() { s.order.again(s, d, again) })
}

// retryInPlace gives the message of a held delivery to a worker once more. To the broker nothing has
// happened.
func (s *session) retryInPlace(d *Delivery) {
	switch {
	case s.closed.Load():
		_ = d.Requeue() // which is stale
		return
	case !d.fence.outcome.CompareAndSwap(uint32(Unsettled), uint32(Requeued)):
		return
	}
	s.stats.outcomes[Requeued].Add(1)
	s.tryAgain(d)
	if s.config.hooks.Settled != nil {
		s.reporter.settled(d, Requeued)
	}
}

// conclude settles a delivery by its handler's error, unless the handler has settled it by itself.
func (s *session) conclude(d *Delivery, err error) conclusion {
	if d.Outcome() != Unsettled {
		return conclusion{byHandler: true}
	}
	v := s.order.decide(d, err, s.verdictOn(d, err))
	became := conclusion{held: v.delay, last: v.last}
	switch {
	case v.outcome == Unsettled:
		s.laters.keep(d)
	case v.to != nil:
		became.pending = v.outcome
		s.transfer(d, v, err)
	case v.delay == 0:
		_ = d.settle(v.outcome)
	case v.inPlace && s.holds.add(d, v.delay, func() { s.retryInPlace(d) }):
	case !s.holds.add(d, v.delay, func() { _ = d.Requeue() }):
		became.held = 0
	}
	return became
}

// healthy reports whether the session has proved that the broker works. consume-ok does not prove
// it: a quorum queue without a leader answers consume-ok and fails 65 s later.
func (s *session) healthy(now time.Time) bool {
	up := now.Sub(s.since)
	return up >= healthyAfter || up >= 10*time.Second && s.settled.Load()
}

// gate counts the handlers at work, the deliveries that they have kept for later, and the failed
// ones whose copies are on their way. Once it is closed none enters any more, and done is closed when
// the last one has left. Workers, transfers and those who settle later enter and leave; the session's
// goroutine closes it.
type gate struct {
	count atomic.Int64  // twice the number of handlers inside, plus one once it is closed
	done  chan struct{} // made by close
	once  sync.Once
}

func (g *gate) enter() bool {
	if g.count.Add(2)&1 == 1 {
		g.leave()
		return false
	}
	return true
}

// stay enters a gate that the caller is inside of, for what goes on after it has left.
func (g *gate) stay() { g.count.Add(2) }

func (g *gate) leave() {
	if g.count.Add(-2) == 1 {
		g.once.Do(func() { close(g.done) })
	}
}

// busy reports whether a handler is inside.
func (g *gate) busy() bool { return g.count.Load() > 1 }

// holds reports whether more than n are inside.
func (g *gate) holds(n int64) bool { return g.count.Load()>>1 > n }

// close may be called more than once, but only by the session's own goroutine.
func (g *gate) close() {
	if g.count.Load()&1 == 1 {
		return
	}
	g.done = make(chan struct{})
	if g.count.Add(1) == 1 {
		g.once.Do(func() { close(g.done) })
	}
}

// watchTry logs that a try takes long, and at which step it is, unless shared tells it for all who
// wait. The function that it returns is to be called at the end of the try.
func (s *scope) watchTry(try slowTry, shared func(slowTry) bool) (over func()) {
	timer := time.AfterFunc(slowConnect, func() {
		if !shared(try) {
			try.tell(s.reporter, &s.notices.connecting, slog.String("queue", s.config.queue))
		}
	})
	return func() { timer.Stop() }
}

// overdueGrace is how long a handler may still run after its context has ended, before it counts as
// overdue.
const overdueGrace = time.Second

// overdue watches a handler that has a timeout. The function that it returns is to be called when
// the handler has returned.
func (s *session) overdue(d *Delivery) (returned func()) {
	limit, id := s.config.handlerTimeout, d.MessageId // copied because the handler may change it
	timer := time.AfterFunc(limit+overdueGrace, func() {
		now := s.stats.overdue.Add(1)
		if left, ok := s.notices.overdue.allow(time.Minute); ok {
			s.warn("a handler is running past its timeout, it ignores the end of its context",
				durationAttr("timeout", limit), messageID(id), slog.Uint64("delivery_tag", d.fence.tag),
				slog.Int64("overdue", now), suppressed(left))
		}
	})
	return func() {
		if !timer.Stop() {
			s.stats.overdue.Add(-1)
		}
	}
}

// backlog checks, a few times within a consumer timeout, whether deliveries wait too long for a
// worker. That costs nothing per delivery, and it finds handlers that are too slow together, not a
// single slow one. Its timer's goroutine uses base and arrived; timer is used under mu.
type backlog struct {
	session *session
	timeout time.Duration
	base    uint64                      // deliveries given to handlers before this session
	arrived [looksPerTimeout / 2]uint64 // deliveries of the session at the last checks, oldest first

	mu    sync.Mutex
	timer *time.Timer // nil once there are no more checks
}

// looksPerTimeout is how often backlog checks within a consumer timeout.
const looksPerTimeout = 8

func (s *session) watchBacklog() {
	p := &s.backlog
	p.session, p.timeout, p.base = s, s.config.consumerTimeout(), s.stats.delivered.Load()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !s.notices.slow.Load() {
		p.timer = time.AfterFunc(p.every(), p.look)
	}
}

func (p *backlog) every() time.Duration { return max(p.timeout/looksPerTimeout, time.Second) }

// look checks whether a delivery is still waiting that was there half a consumer timeout ago.
func (p *backlog) look() {
	s := p.session
	taken := s.stats.delivered.Load() - p.base // read first, so that nothing counts twice
	late := taken < p.arrived[0] && !s.valve.shutWithin(p.timeout/2)
	copy(p.arrived[:], p.arrived[1:])
	p.arrived[len(p.arrived)-1] = taken + uint64(s.inbox.waiting())
	if late && s.notices.slow.CompareAndSwap(false, true) {
		s.warn("handlers are so slow that deliveries wait for them longer than half of the consumer timeout, "+
			"after which the broker takes them back: lower WithPrefetch, or raise WithConcurrency",
			durationAttr("consumer_timeout", p.timeout), slog.Int("prefetch", s.config.prefetch),
			slog.Int("concurrency", s.config.concurrency))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil && !s.notices.slow.Load() {
		p.timer.Reset(p.every())
	}
}

func (p *backlog) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
}

// cutOff reports whether a handler returned err because its session was lost or the drain limit
// passed. That is no failure of the handler, and the broker has the message already. A panic is a
// failure whenever it comes.
func (s *session) cutOff(err error) bool {
	return s.ctx.Err() != nil && !errors.As(err, new(*PanicError))
}

// attempt is the result of one try to set up a session, or only a connection. The supervisor and
// the prober make tries, by runBounded.
type attempt struct {
	conn     *loan  // of the session
	giveBack func() // gives conn back, if this try has opened it
	session  *session
	path     *path // of the publisher
	err      error
}

var errNoResult = errors.New("the try ended without a result: did a function of yours call runtime.Goexit?")

// tryGrace is how long a try may outlive its context: a little longer than a user's function in it
// may.
const tryGrace = abandonGrace + 100*time.Millisecond

// runBounded runs try and returns its result, or an error if try does not return after ctx has
// ended. A call of the driver that hangs returns at the end of its connection, which may wait until
// no other session has borrowed it. A result that comes too late is discarded. step says how far
// the try has come.
func runBounded(ctx context.Context, try func() attempt, step *step) attempt {
	result := make(chan attempt)
	give := make(chan struct{})
	go func() {
		a := attempt{err: &SessionError{Op: step.String(), Err: errNoResult}} // after a runtime.Goexit
		defer func() {
			select {
			case result <- a:
			case <-give:
				a.discard()
			}
		}()
		a = try()
	}()
	select {
	case a := <-result:
		return a
	case <-ctx.Done():
	}
	grace := time.NewTimer(tryGrace)
	defer grace.Stop()
	select {
	case a := <-result:
		return a
	case <-grace.C:
		close(give)
		return attempt{err: &SessionError{Op: step.String(), Err: causeOf(ctx)}}
	}
}

// discard closes what a late try has opened. A connection that the try was given belongs to the
// supervisor.
func (a attempt) discard() {
	if a.session != nil {
		a.session.close()
	}
	if a.path != nil {
		a.path.lease.giveBack()
	}
	if a.giveBack != nil {
		a.giveBack()
	}
}
