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

// session is one *amqp.Channel with one consumer on it. It is never repaired,
// only replaced, and a fresh channel per session is what fences late acks: the
// channel of a dead session answers ErrClosed, and its delivery tags mean
// nothing on any other.
//
// One goroutine, run, owns its life:
//
//	consuming -> lost                    channel or connection gone
//	          -> retired, then over      basic.cancel: running handlers may still settle
//	          -> drained, then over      stop was asked
type session struct {
	*scope
	id   uint64
	try  uint64 // its number, which no other has
	conn *connection

	channel    *amqp.Channel
	wire       *wire.Subscription // the way of the deliveries and settlements
	inbox      *inbox             // what was delivered and no worker has taken
	aside      *aside             // what was delivered and no handler can be given
	queue      string
	tag        string
	cancels    chan string // the driver's NotifyCancel
	channelEnd *notifier   // what its NotifyClose said, errChannelEnded if that was nothing
	lease      *lease      // of the connection
	terms      terms       // of its declaration
	limit      int         // delivery limit of its queue, 0 for none that takes messages away
	limitKnown bool        // it was declared by us

	ctx    context.Context // of the handlers
	cancel context.CancelCauseFunc

	gate    *gate         // handlers of this session at work
	holds   holds         // deliveries that failed and wait
	backlog backlog       // whether handlers keep up with the prefetch
	stall   *notifier     // we ourselves want another session, and why
	stop    chan struct{} // closed to ask for the drain
	end     *notifier     // no more deliveries, and why
	closed  atomic.Bool   // no more settlements
	settled atomic.Bool   // one settlement at least: the session proved itself
	done    chan struct{} // closed when nothing of it is left
	since   time.Time     // consume-ok

	settler  settler       // itself, or what tells Hooks.Settled as well
	received atomic.Uint64 // deliveries given to handlers, for the stall detector

	givenUp   bool          // a call on the channel was not answered in time
	drained   error         // why acks may not have arrived, or handlers were left; read after gone
	closeTook time.Duration // what the close took of the close limit; read after gone
}

// scope is what the sessions of one Run share.
type scope struct {
	config   *config
	stats    *counters
	reporter *reporter
	handlers context.Context // what the contexts of handlers are made from
	running  func() int64    // how many workers are at work, once the pool has been stopped
	stream   *position       // where to resume, nil unless it is a stream
	told     *notices
	tries    atomic.Uint64 // for sessions so far: two may overlap if one was left behind
}

// begin returns the number of a new try.
func (s *scope) begin() uint64 { return s.tries.Add(1) }

// place is where the session stands in its stream, nil where there is none or another try has begun
// since: what a try that was left behind finds out is of no interest.
func (s *session) place() *position {
	if s.tries.Load() != s.try {
		return nil
	}
	return s.stream
}

// abandoned counts a user's function that had to be left behind.
func (s *scope) abandoned() { s.stats.abandoned.Add(1) }

func (s *scope) drainError() error {
	return &DrainError{Handlers: int(s.running()), Limit: s.config.drainTimeout}
}

// openSession opens a channel on c, sets it up and subscribes, all within ctx:
// the driver's calls take no context, so the end of ctx ends the connection under them, or the
// stay there if another session lives on it.
func openSession(ctx context.Context, c *connection, of *scope, id, try uint64, tag string, step *step) (*session, error) {
	lease := c.lend()
	unguard := context.AfterFunc(ctx, func() { lease.giveUp(causeOf(ctx)) })

	t := terms{limit: firstTerm(c, of.config.declare), owned: c.owned(of.config)}
	for {
		s, err := trySession(ctx, c, of, id, try, tag, t, lease, step)
		if err != nil && t.concede(err) {
			continue
		}
		if inTime := unguard(); err == nil && !inTime { // its lease has ended
			close(s.stop)
			<-s.done
			err = s.failure(step.String(), context.Cause(ctx))
		}
		if err != nil {
			lease.giveBack()
			return nil, err
		}
		return s, nil
	}
}

// trySession is openSession on these terms.
func trySession(ctx context.Context, c *connection, of *scope, id, try uint64, tag string, t terms, lease *lease, step *step) (*session, error) {
	step.at("channel")
	channel, err := c.amqp.Channel()
	if err != nil {
		return nil, &SessionError{Queue: of.config.queue, Host: c.host, Op: "channel", Session: id, Err: c.explain(err)}
	}
	s := &session{
		scope:      of,
		id:         id,
		try:        try,
		conn:       c,
		channel:    channel,
		tag:        tag,
		terms:      t,
		lease:      lease,
		channelEnd: newNotifier(),
		cancels:    channel.NotifyCancel(make(chan string, 2)), // two consumers while a place is looked for
		gate:       newGate(),
		stall:      newNotifier(),
		stop:       make(chan struct{}),
		end:        newNotifier(),
		done:       make(chan struct{}),
	}
	s.holds.session = s
	go s.watchChannel(channel.NotifyClose(make(chan *amqp.Error, 1)))
	s.settler = s
	if of.config.hooks.Settled != nil {
		s.settler = observed{s}
	}
	s.receive()
	if op, err := s.subscribe(ctx, step); err != nil {
		_ = channel.Close() // also bounded by ctx, through the socket
		s.forget()
		err = s.saidByBroker(err)
		s.place().gone(err)
		return nil, s.failure(op, c.explain(err))
	}
	s.since = time.Now()
	s.limit, s.limitKnown = s.deliveryLimit()
	s.keepsLimit()
	s.ctx, s.cancel = context.WithCancelCause(of.handlers)
	s.watchBacklog()
	go s.run()
	return s, nil
}

// receive makes the way for the deliveries of the consumer with the session's tag.
func (s *session) receive() {
	s.inbox, s.aside = newInbox(s.config.prefetch), newAside()
	s.wire = s.conn.socket.Subscribe(s.tag, s.config.prefetch, &receiver{inbox: s.inbox, aside: s.aside})
}

// forget ends the way of a consumer that there is not.
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

// subscribe returns the step that failed, and why.
func (s *session) subscribe(ctx context.Context, step *step) (op string, err error) {
	step.at("topology")
	s.queue, err = s.topology(ctx)
	if err != nil {
		return "topology", err
	}
	step.at("consume")
	if offset, unclear := s.place().about(s.queue, s.config.consumeArgs[offsetKey]); unclear && s.terms.queue == "" {
		if err := s.locate(ctx, offset); err != nil {
			return "consume", err
		}
		return "consume", &freshChannelError{queue: s.queue}
	}
	// Per consumer (global=false): RabbitMQ refuses or ignores the other form.
	step.at("qos")
	if err := s.channel.Qos(s.config.prefetch, 0, false); err != nil {
		return "qos", err
	}
	step.at("consume")
	args := s.place().resume(s.try, s.config.consumeArgs, s.terms.queue != "")
	_, err = s.channel.Consume(s.queue, s.tag, false, s.config.exclusive, false, false, args)
	if err == nil {
		s.place().subscribed(args[offsetKey])
	}
	if s.config.declare != nil { // an auto-delete queue goes with its last consumer, maybe just now
		err = gone(err, s.queue)
	}
	return "consume", err
}

// saidByBroker replaces the driver's ErrClosed by what the broker said when it closed
// the channel, if that has arrived.
func (s *session) saidByBroker(err error) error {
	if !errors.Is(err, amqp.ErrClosed) {
		return err
	}
	<-s.channelEnd.Done() // ErrClosed says that it is on its way
	if brokerErr := s.channelEnd.Cause(); !errors.Is(brokerErr, errChannelEnded) {
		return brokerErr
	}
	return err
}

// watchChannel keeps why the driver's channel ended, and reads its NotifyClose to the end.
func (s *session) watchChannel(closes <-chan *amqp.Error) {
	if e := <-closes; e != nil {
		s.channelEnd.notify(e)
	}
	s.channelEnd.notify(errChannelEnded)
	drain(closes)
}

// run is the session's life after consume-ok.
func (s *session) run() {
	defer close(s.done)
	cause := s.consume()
	hardLimit := s.config.drainTimeout
	switch {
	case cause == nil:
		hardLimit = s.config.closeTimeout // nothing more is delivered, so nothing is in the way
		s.drain()
	case errors.Is(cause, errCancelled):
		s.stream.doubt()
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

// consume waits for the first sign of the session's end. The driver promises no
// order among its signs, so what ended is decided on the state after any of
// them. It returns nil when the drain was asked for.
func (s *session) consume() error {
	for {
		select {
		case <-s.aside.more:
			s.setAside()
			continue
		case <-s.channelEnd.Done():
		case _, cancelled := <-s.cancels:
			if cancelled {
				return s.lost(errCancelled)
			}
		case <-s.conn.end.Done():
		case <-s.stall.Done():
			return s.lost(s.stall.Cause())
		case <-s.stop:
			return nil
		}
		return s.lost(s.diagnose())
	}
}

func (s *session) lost(err error) error { return s.failure("lost", err) }

// acksLost is lost while stopping, or on the way out: nothing proves any more what was settled.
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

// warn logs what an operator should know and no change of state tells.
func (s *session) warn(message string, attrs ...slog.Attr) {
	s.reporter.warn(message, append(s.attrs(), attrs...)...)
}

// diagnose finds the one cause.
func (s *session) diagnose() error {
	if s.conn.amqp.IsClosed() || s.conn.end.Cause() != nil {
		<-s.conn.end.Done() // bounded: the connection is on its way down
		return s.conn.end.Cause()
	}
	// A NotifyCancel that ended without a value: a close is right behind it, or we see a
	// connection on its way down.
	select {
	case <-s.channelEnd.Done():
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
}

// lose ends a session whose channel is gone: running handlers are told, and
// nothing they settle from now on reaches the wire.
func (s *session) lose(cause error) {
	s.closed.Store(true)
	s.takeNoMore()
	s.cancel(cause)
	s.end.notify(cause)
	s.releaseHeld()
}

// retire ends a session that the broker cancelled. Its channel lives, so running
// handlers may settle, which saves needless duplicates; the successor consumes
// meanwhile. What no handler has started goes back at once.
func (s *session) retire(cause error) {
	s.takeNoMore()
	s.end.notify(cause)
	// RabbitMQ 4.3 would serve the cancelled consumer again once its overdue
	// deliveries are settled, and the driver has forgotten it: those messages
	// would be stuck until the channel closes. Other versions ignore an unknown tag.
	_ = s.channel.Cancel(s.tag, true)
	s.handBackRest()
	s.releaseHeld()
	limit := time.NewTimer(s.config.drainTimeout)
	defer limit.Stop()
	select {
	case <-s.gate.done: // closeChannel proves what they have settled
		return
	case <-s.channelEnd.Done():
		s.drained = s.acksLost(s.diagnose())
	case <-s.conn.end.Done():
		s.drained = s.acksLost(s.conn.end.Cause())
	case <-limit.C:
	}
	s.lose(cause)
}

// drain ends a session in order: no new deliveries, the unstarted ones back to the queue,
// running handlers within the limit. closeChannel then proves their acks by its close-ok.
func (s *session) drain() {
	limit := time.NewTimer(s.config.drainTimeout)
	defer limit.Stop()
	s.takeNoMore()
	s.end.notify(errStopped)
	s.drained = s.unsubscribe(limit.C)
	s.releaseHeld() // behind basic.cancel, or they would come back
	if s.drained == nil {
		s.drained = s.awaitHandlers(limit.C)
	}
	if s.drained != nil {
		s.lose(s.drained)
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
		return s.drainError()
	case errors.Is(err, errDrainLimit), errors.Is(err, errCloseTimeout):
		return s.acksLost(errCloseTimeout)
	case !s.channel.IsClosed(): // a reply to nothing, so the next one would be taken for another, too
		s.giveUp(err)
		return s.acksLost(err)
	}
	return s.acksLost(s.diagnose())
}

func (s *session) awaitHandlers(limit <-chan time.Time) error {
	select {
	case <-s.gate.done:
		return nil
	case <-s.channelEnd.Done():
		return s.acksLost(s.diagnose())
	case <-s.conn.end.Done():
		return s.acksLost(s.conn.end.Cause())
	case <-limit:
		return s.drainError()
	}
}

// call bounds a call of the driver on the session's channel by the close limit, which counts
// silence; limit ends the wait in any case. A call that is not answered in time holds
// the channel for good, and the session gives it up.
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

// giveUp leaves the channel behind, which ends with its connection.
func (s *session) giveUp(cause error) {
	s.givenUp = true
	s.lease.giveUp(cause)
}

// handBackRest returns to the queue what was delivered and no worker took.
// basic.nack says "never started": it does not count towards a delivery limit.
func (s *session) handBackRest() {
	for _, d := range s.clear() {
		s.handBack(d.DeliveryTag)
	}
}

// unstarted takes back what a worker took and may not start. It goes to the queue
// with the others, behind the basic.cancel: before it the broker would give it to
// this consumer once more.
func (s *session) unstarted(d *Delivery) {
	if !s.inbox.takeBack(d) {
		s.handBack(d.DeliveryTag)
	}
}

// handBack returns a delivery that no handler saw. Of a session that is over the
// broker has taken back everything itself.
func (s *session) handBack(tag uint64) {
	if s.closed.Load() || s.stream != nil {
		return
	}
	_ = s.wire.Requeue(tag)
}

// closeChannel waits for close-ok, the only proof AMQP 0-9-1 has that the acks before it arrived,
// within the close limit; the deliveries of a successor may be in the way, for as long as hardLimit.
// The driver's Close returns nil for a channel that has ended already,
// so what counts is why it ended.
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
		<-s.channelEnd.Done()
		drain(s.cancels)
		if cause := s.channelEnd.Cause(); !errors.Is(cause, errChannelEnded) {
			err = s.diagnose()
		}
	}
	if err != nil && !s.closed.Load() {
		s.drained = s.acksLost(err)
	}
}

// began notes that a handler is given d, where that matters.
func (s *session) began(d *Delivery) {
	if s.config.stallAfter > 0 {
		s.received.Add(1)
	}
	s.stream.began(s.try, d)
	if d.Redelivered && s.limit > 0 {
		s.nearsLimit(d)
	}
}

// number implements settler.
func (s *session) number() uint64 { return s.id }

// source implements settler.
func (s *session) source() (queue, host string) { return s.queue, s.conn.host }

// settle implements settler: it puts one settlement on the wire of this
// session's channel, or none. A failed handler is a reject, which counts towards
// a quorum queue's delivery limit.
func (s *session) settle(d *Delivery, o Outcome) error {
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

// observed is a session whose settlements are told to Hooks.Settled.
type observed struct{ *session }

func (s observed) settle(d *Delivery, o Outcome) error {
	err := s.session.settle(d, o)
	if err != nil {
		o = Stale
		d.fence.outcome.Store(uint32(Stale))
	}
	s.reporter.settled(d, o)
	return err
}

// releaseHeld settles the deliveries that wait for their requeue. A hook must not
// delay the session's own goroutine.
func (s *session) releaseHeld() {
	held := &collecting{session: s}
	s.holds.release(held)
	s.reporter.released(held.deliveries)
}

// collecting is a session that notes what it settles.
type collecting struct {
	*session
	deliveries []*Delivery
}

func (c *collecting) settle(d *Delivery, o Outcome) error {
	c.deliveries = append(c.deliveries, d)
	return c.session.settle(d, o)
}

func (s *session) send(d *Delivery, o Outcome) error {
	switch {
	case s.stream == nil && o == Acked:
		return s.wire.Ack(d.fence.tag)
	case s.stream == nil:
		return s.wire.Reject(d.fence.tag, o == Requeued)
	case o == Requeued: // a stream would take it as done
		s.tryAgain(d)
		return nil
	}
	for _, done := range s.stream.ready(s.try, d) {
		if err := s.wire.Ack(done.tag); err != nil {
			return err
		}
		s.stream.toldAcked(s.try, done)
	}
	return nil
}

// againAfter keeps a message that is tried again at once from spinning.
const againAfter = 10 * time.Millisecond

// tryAgain gives the message of d to a worker once more, in place: to the broker it
// is the same delivery, to the handler one of its own, so that nothing of the try
// before can settle it. Once the session has ended nobody takes it any more.
func (s *session) tryAgain(d *Delivery) {
	again := d.again()
	time.AfterFunc(againAfter, func() { s.inbox.put(again) })
}

// conclude settles a delivery by its handler's error, unless the handler has
// settled it by itself. It returns how long the delivery is held before that.
func (s *session) conclude(d *Delivery, err error) (held time.Duration) {
	if d.Outcome() != Unsettled {
		return 0
	}
	o, delay := decide(err, d, s.config)
	if delay > 0 {
		if !s.holds.add(d, delay) {
			return 0
		}
		return delay
	}
	_ = d.settle(o)
	return 0
}

// healthy tells whether the session has proved that a broker works: consume-ok
// proves nothing, for a quorum queue without a leader answers it and fails 65 s
// later.
func (s *session) healthy(now time.Time) bool {
	up := now.Sub(s.since)
	return up >= 70*time.Second || up >= 10*time.Second && s.settled.Load()
}

// gate counts the handlers at work. Once shut nothing enters any more, and empty
// closes when the last one has left.
type gate struct {
	count atomic.Int64 // twice the number inside, plus one when shut
	done  chan struct{}
	once  sync.Once
}

func newGate() *gate {
	return &gate{done: make(chan struct{})}
}

func (g *gate) enter() bool {
	if g.count.Add(2)&1 == 1 {
		g.leave()
		return false
	}
	return true
}

func (g *gate) leave() {
	if g.count.Add(-2) == 1 {
		g.once.Do(func() { close(g.done) })
	}
}

// busy tells whether a handler is inside.
func (g *gate) busy() bool { return g.count.Load() > 1 }

// close may be called more than once, by the session's own goroutine only.
func (g *gate) close() {
	if g.count.Load()&1 == 1 {
		return
	}
	if g.count.Add(1) == 1 {
		g.once.Do(func() { close(g.done) })
	}
}

const (
	slowConnect  = 2 * time.Second  // the longest that a try takes without a line about it
	slowInterval = 10 * time.Minute // between two such lines
)

// waiting tells of a try that takes its time, at which step it is. The function it returns is
// called at the end of the try.
func (s *scope) waiting(host string, step *step) (over func()) {
	timer := time.AfterFunc(slowConnect, func() {
		if left, ok := s.told.connecting.pass(slowInterval); ok {
			attrs := []slog.Attr{slog.String("queue", s.config.queue), slog.String("step", step.String()), lasting("for", slowConnect), suppressed(left)}
			if host != "" { // WithURLFunc has named it
				attrs = append(attrs, slog.String("host", host))
			}
			s.reporter.info("still connecting", attrs...)
		}
	})
	return func() { timer.Stop() }
}

// overdueGrace is what a handler is given to return in once its context has ended.
const overdueGrace = time.Second

// overdue watches a handler that has a timeout. The function it returns is called
// when the handler has returned.
func (s *session) overdue(d *Delivery) (returned func()) {
	limit, id := s.config.handlerTimeout, d.MessageId // the handler may change it
	timer := time.AfterFunc(limit+overdueGrace, func() {
		now := s.stats.overdue.Add(1)
		if left, ok := s.told.overdue.pass(time.Minute); ok {
			s.warn("a handler is running past its timeout, it ignores the end of its context",
				lasting("timeout", limit), messageID(id), slog.Uint64("delivery_tag", d.fence.tag),
				slog.Int64("overdue", now), suppressed(left))
		}
	})
	return func() {
		if !timer.Stop() {
			s.stats.overdue.Add(-1)
		}
	}
}

// backlog looks, a few times within a consumer timeout, whether deliveries wait too
// long for a worker. That costs a delivery nothing, and sees how long handlers take
// together and not how long the odd one does.
type backlog struct {
	session *session
	timeout time.Duration
	base    uint64            // deliveries given to handlers before the session
	arrived [looks / 2]uint64 // deliveries of the session at the last looks, oldest first

	mu    sync.Mutex
	timer *time.Timer // nil when there are no more looks
}

// looks is how often within a consumer timeout.
const looks = 8

func (s *session) watchBacklog() {
	p := &s.backlog
	p.session, p.timeout, p.base = s, s.config.consumerTimeout(), s.stats.delivered.Load()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !s.told.slow.Load() {
		p.timer = time.AfterFunc(p.every(), p.look)
	}
}

func (p *backlog) every() time.Duration { return max(p.timeout/looks, time.Second) }

// look finds out whether a delivery waits that was there already half a consumer
// timeout ago.
func (p *backlog) look() {
	s := p.session
	taken := s.stats.delivered.Load() - p.base // first: what is taken meanwhile must not count twice
	late := taken < p.arrived[0]
	copy(p.arrived[:], p.arrived[1:])
	p.arrived[len(p.arrived)-1] = taken + uint64(s.inbox.waiting())
	if late && s.told.slow.CompareAndSwap(false, true) {
		s.warn("handlers are so slow that deliveries wait for them longer than half of the consumer timeout, "+
			"after which the broker takes them back: lower WithPrefetch, or raise WithConcurrency",
			lasting("consumer_timeout", p.timeout), slog.Int("prefetch", s.config.prefetch),
			slog.Int("concurrency", s.config.concurrency))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil && !s.told.slow.Load() {
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

// cutOff tells whether a handler returned err because its session was lost or the
// drain limit passed: that is no failure of its own, and the broker has the message
// already. A panic is one whenever it comes.
func (s *session) cutOff(err error) bool {
	return s.ctx.Err() != nil && !errors.As(err, new(*PanicError))
}
