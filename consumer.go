package steadymq

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
)

// Consumer keeps one subscription to one queue alive. Make it with [New], run it with
// [Consumer.Run]. All methods are safe for concurrent use.
type Consumer struct {
	config *config
	state  atomic.Int32
	stats  *counters
	valve  *valve
	fault  atomic.Pointer[faultError]

	grouped bool // a Group runs it

	order *order // of keys, made by the first Run; nil without WithOrderingKey

	mu      sync.Mutex
	stop    context.CancelFunc // ends the Run under way; nil if there is none
	done    chan struct{}      // closed when that Run has returned; nil if nobody waits for that
	err     error              // of the last Run
	stopped atomic.Bool        // Stop was called
}

// New checks url, queue and options and returns a [Consumer]. It dials nothing. The error joins one
// [*OptionError] per problem; it never holds the URL.
//
// url is amqp://user:password@host:port/vhost, or amqps for TLS, see
// https://www.rabbitmq.com/docs/uri-spec. Without a port it is 5672, or 5671 for TLS. Special
// characters in user, password and vhost are percent-encoded ([net/url.UserPassword] does it); a
// URL that one of them may have cut wrongly is refused. These parameters count
// (https://www.rabbitmq.com/docs/uri-query-parameters), others are refused:
//
//   - heartbeat (1 to 600 s) and connection_timeout (ms), see [WithHeartbeat] and
//     [WithDialTimeout];
//   - channel_max (0 to 65535);
//   - auth_mechanism (plain, amqplain, external; several times, best first);
//   - with amqps cacertfile, certfile with keyfile, server_name_indication, verify=verify_peer.
//
// queue must exist when the consumer subscribes (until then it is asked for again), unless
// [WithQueue] or [WithTopology] declares it. It may be "" if a [TopologyFunc] names it, or the
// broker does: that is an exclusive classic [Queue].
func New(url, queue string, opts ...Option) (*Consumer, error) {
	c, err := build(url, queue, opts)
	if err != nil {
		return nil, err
	}
	return &Consumer{config: c, stats: new(counters), valve: newValve(c)}, nil
}

// Consume is [New] and [Consumer.Run] in one call. Its error is that of either.
func Consume(ctx context.Context, url, queue string, h Handler, opts ...Option) error {
	c, err := New(url, queue, opts...)
	if err != nil {
		return err
	}
	return c.Run(ctx, h)
}

// Run consumes until ctx ends, and heals from everything on the way. It blocks. A Consumer may be
// run again after Run has returned.
//
// h is called by up to [WithConcurrency] goroutines at once; its contexts carry the values of ctx
// but do not end with it, see [Handler]. When ctx ends, Run takes no new work (basic.cancel), puts
// back what no handler has started, waits for running handlers within the limit of
// [WithDrainTimeout], has their acks confirmed by the broker's close-ok, closes the connection and
// returns nil. A RabbitMQ node may still drop acks for a quorum queue that come by the dozen within
// milliseconds before the end: such messages come again.
//
// Any other end is an error. It may join several; use [errors.Is] and [errors.As]:
//
//   - [ErrDrainTimeout] if handlers were still running at the drain limit, or deliveries that they
//     kept by [Later] not settled ([*DrainError] tells how many); the broker delivers their messages
//     again.
//   - [*SessionError] with Op "lost" if the connection was lost while draining: the last acks may
//     not have arrived, and their messages come again.
//   - [*SessionError] before the first session, if the broker says plainly that the configuration
//     cannot work (refused login, no such virtual host, no permission, inequivalent queue, refused
//     combination), or refuses the login three times in a row if it does so without a word, or if
//     [WithURLFunc] or [WithCredentials] give the login, see [ErrLoginRefused]. Once there has been
//     a session Run never gives up. [WithFatal] replaces this rule.
//   - [*OptionError] if ctx or h is nil or a [Middleware] returns a nil handler, or if a hook or
//     the log handler has panicked (with the [*PanicError]).
//   - [*PanicError] if the making of a middleware, or the function of WithFatal, has panicked; an
//     error that names the option if one of them does not return within the limit of
//     [WithSetupTimeout].
//   - [ErrRunning] if the Consumer is running already.
func (c *Consumer) Run(ctx context.Context, h Handler) error {
	var err error
	if h == nil {
		err = &OptionError{"Run", "the handler must not be nil"}
	}
	if c.config.batches {
		err = errors.Join(err, &OptionError{"WithBatch", "has no effect on Run, whose handler takes one delivery; leave it out, or call RunBatch"})
	}
	if err != nil {
		return err
	}
	return c.runAlone(ctx, "Run", work{handler: h, config: c.config})
}

// RunBatch is [Consumer.Run] with a handler that takes several deliveries at once, see
// [BatchHandler]; [WithBatch] says how many. It refuses the options that WithBatch names, with an
// [*OptionError] for each.
func (c *Consumer) RunBatch(ctx context.Context, h BatchHandler) error {
	config, err := c.config.inBatches()
	if h == nil {
		err = errors.Join(err, &OptionError{"RunBatch", "the handler must not be nil"})
	}
	if err != nil {
		return err
	}
	return c.runAlone(ctx, "RunBatch", work{batch: h, config: config})
}

// runAlone is Run with what workers do; by is the method that was called.
func (c *Consumer) runAlone(ctx context.Context, by string, w work) error {
	if ctx == nil {
		return &OptionError{by, "the context must not be nil"}
	}
	if c.grouped {
		return &OptionError{by, "this Consumer belongs to a Group, whose Run runs it; make one with New"}
	}
	if fault := c.fault.Load(); fault != nil {
		return fault
	}
	of := newConnections(c.config, c.stats)
	return c.run(ctx, w, of.join(), newPublisher(of))
}

// work is what the workers of a Run do with deliveries: handler takes them one by one, or batch in
// its place takes several at once.
type work struct {
	handler Handler
	batch   BatchHandler
	config  *config
}

// run is Run as a borrower of connections that others may share.
func (c *Consumer) run(ctx context.Context, w work, b *borrower, publisher *publisher) error {
	defer b.leave()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if !c.begin(stop) {
		return ErrRunning
	}
	var err error
	if w.handler != nil {
		w.handler, err = wrap(ctx, w.config, w.handler, func() { c.stats.abandoned.Add(1) })
	}
	if err == nil {
		s := newSupervisor(ctx, c, w, b, publisher)
		s.reporter.faulted = stop
		err = s.run()
	}
	c.end(err)
	return err
}

func (c *Consumer) begin(stop context.CancelFunc) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stop != nil {
		return false
	}
	c.stop = stop
	if !c.grouped {
		c.stopped.Store(false)
	} else if c.stopped.Load() {
		stop()
	}
	return true
}

func (c *Consumer) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stop, c.err = nil, err
	if c.done != nil {
		close(c.done)
		c.done = nil
	}
}

// Stop ends the Run of this Consumer alone, as the end of its context does, waits until it has
// drained, and returns what Run returns, or, if ctx ends first, the cause of that; the drain goes
// on. A Consumer of a [Group] leaves the group; once its Run has ended Stop returns what that has
// returned. Else there is nothing to wait for without a Run, and Stop returns nil; a Consumer of a
// group whose Run has not begun never starts then. Stop waits for the consumer's own handlers and
// hooks, so those must not call it but on a goroutine of its own. It is an [*OptionError] if ctx is
// nil.
func (c *Consumer) Stop(ctx context.Context) error {
	if ctx == nil {
		return &OptionError{"Stop", "the context must not be nil"}
	}
	c.mu.Lock()
	c.stopped.Store(true)
	if c.stop != nil && c.done == nil {
		c.done = make(chan struct{})
	}
	stop, done, last := c.stop, c.done, c.err
	c.mu.Unlock()
	switch {
	case stop != nil:
	case c.grouped: // nobody else is told
		return last
	default:
		return nil
	}
	stop()
	select {
	case <-done:
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Queue returns the queue given to [New], "" if a [TopologyFunc] or the broker names it.
func (c *Consumer) Queue() string { return c.config.queue }

// State returns what the Consumer is doing. A Consumer whose Run has returned is [Stopped].
func (c *Consumer) State() State { return c.orPaused(State(c.state.Load())) }

// Stats returns the counters, over all Runs. They are read one after the other, not at one instant.
func (c *Consumer) Stats() Stats {
	n := c.stats
	return Stats{
		State:         c.State(),
		Sessions:      n.sessions.Load(),
		Connections:   n.connections.Load(),
		Dials:         n.dials.Load(),
		Handling:      int(n.handling.Load()),
		Held:          int(n.held.Load()),
		Later:         int(n.later.Load()),
		Overdue:       max(int(n.overdue.Load()), 0), // a handler may return while it is counted
		Delivered:     n.delivered.Load(),
		Acked:         n.outcomes[Acked].Load(),
		Requeued:      n.outcomes[Requeued].Load(),
		Discarded:     n.outcomes[Discarded].Load(),
		Parked:        n.outcomes[Parked].Load(),
		Delayed:       n.outcomes[Delayed].Load(),
		Stale:         n.stale.Load(),
		Failed:        n.failed.Load(),
		Unreadable:    n.unreadable.Load(),
		GivenUp:       n.givenUp.Load(),
		Abandoned:     n.abandoned.Load(),
		OffsetsFailed: n.offsetsFailed.Load(),
		EventsDropped: n.eventsDropped.Load(),
		Throttled:     c.valve.throttled(),
		BreakerOpen:   c.valve.broken(),
		BreakerOpened: c.valve.opened.Load(),
	}
}

// supervisor is one Run. It belongs to the goroutine that calls Run, which alone reads and writes
// its fields, but for open and connect: they run on the goroutine of a try and only read what does
// not change. There is one function per state, and each returns the next.
type supervisor struct {
	consumer *Consumer
	config   *config
	stats    *counters
	ctx      context.Context // of Run; its end asks for the stop

	retry    *retry
	borrower *borrower // of connections
	pool     *pool
	reporter *reporter

	conn    *loan           // for the next session too; nil if that needs another connection
	dial    *dial           // that this supervisor is to make, or makes
	session *session        // that is consuming, else nil
	probed  <-chan struct{} // closed by the session's prober at its end; nil if there is none
	number  uint64          // of the current or last session
	scope   *scope          // what all sessions of this Run share
	tag     string          // prefix of all consumer tags
	host    string          // address of the current or last connection, for reports

	shownBy *BreakerError // why the state is Paused, as far as it was told; nil for Pause
	away    away          // what has failed since the last session
	hung    int           // set-ups in a row that hung
	strikes int           // connections that the broker closed during this consumer's set-up
	struck  time.Time     // when it last did
	closing []closer      // what is ending and has to end before Run returns
	cause   error         // of the last failure
	retryIn time.Duration // wait before the next try
	err     error         // what Run will return
}

type stateFunc func() stateFunc

func newSupervisor(ctx context.Context, c *Consumer, w work, b *borrower, publisher *publisher) *supervisor {
	random := make([]byte, 4)
	_, _ = rand.Read(random) // never fails
	reporter := newReporter(ctx, w.config, &c.stats.eventsDropped)
	if c.order == nil {
		c.order = newOrder(c.config)
	}
	workers := &pool{
		handler:  w.handler,
		config:   w.config,
		stats:    c.stats,
		reporter: reporter,
		ctx:      ctx,
		valve:    c.valve,
	}
	workers.loop = workers.handleAll
	if w.batch != nil {
		workers.loop = newBatches(workers, w.batch).handleAll
	}
	c.valve.begin()
	return &supervisor{
		consumer: c,
		config:   w.config,
		stats:    c.stats,
		ctx:      ctx,
		retry:    newRetry(w.config),
		borrower: b,
		reporter: reporter,
		pool:     workers,
		scope: &scope{
			config:    w.config,
			from:      b.of,
			stats:     c.stats,
			reporter:  reporter,
			handlers:  context.WithoutCancel(ctx), // the values of ctx, without its end
			running:   workers.alive.Load,
			hire:      workers.hire,
			stream:    newPosition(w.config),
			order:     c.order,
			notices:   new(notices),
			valve:     c.valve,
			grouped:   c.grouped,
			publisher: publisher,
		},
		tag: w.config.tagPrefix + "-" + hex.EncodeToString(random),
	}
}

func (s *supervisor) run() error {
	s.scope.saver = newSaver(s.ctx, s.scope)
	for state := s.connecting; state != nil; {
		state = state()
	}
	if !s.consumer.grouped {
		s.scope.publisher.end()
	}
	s.enter(Stopped, s.result())
	s.reporter.stop()
	return s.result()
}

// result returns Run's error, as far as it is known. The panic of a hook or of the log handler
// comes before everything else.
func (s *supervisor) result() error {
	if fault := s.reporter.fault.Load(); fault != nil {
		s.consumer.fault.Store(fault)
		return errtext.Join(fault, s.err)
	}
	return s.err
}

// connecting asks for a connection, unless there is one from the last session.
func (s *supervisor) connecting() stateFunc {
	if s.ctx.Err() != nil {
		return s.draining
	}
	if s.conn != nil && !s.usable() { // it ended during the backoff
		s.borrower.blame(s.conn.host, s.conn.end.Cause(), time.Now())
		s.dropConnection()
	}
	if s.conn != nil {
		return s.settingUp
	}
	offer := s.borrower.borrow(time.Now())
	switch {
	case offer.loan != nil:
		s.conn, s.host = offer.loan, offer.loan.host
		return s.settingUp
	case offer.own != nil:
		s.dial, s.host = offer.own, offer.own.address // "" until WithURLFunc has named it
		return s.settingUp
	case offer.others != nil:
		s.host = offer.others.address
		return waitFor(s, offer.others.done)
	case offer.failed != nil:
		return s.told(offer.failed, offer.wait)
	}
	return waitFor(s, time.After(offer.wait))
}

// settingUp tries once to set up a session, on the connection that there is or on a new one.
func (s *supervisor) settingUp() stateFunc {
	conn, dial, number := s.conn, s.dial, s.number+1
	s.enterConnecting()
	if conn != nil {
		defer conn.takeTurn(s.ctx, s.strikes > 0).giveBack()
		if !s.usable() { // it ended meanwhile, which others have to answer for
			return s.connecting
		}
	}
	ctx, cancel := s.tryContext()
	defer cancel()
	step := newStep("dial")
	defer s.scope.watchTry(slowTry{s.host, step}, func(t slowTry) bool { return s.borrower.tellsSlow(dial, t) })()
	try := s.scope.begin()
	suspect := s.strikes > 0
	a := runBounded(ctx, func() attempt { return s.open(ctx, conn, dial, suspect, number, try, step) }, step)
	if a.conn != nil {
		s.conn, s.host, s.dial = a.conn, a.conn.host, nil
		s.retry.heartbeat = max(s.retry.heartbeat, a.conn.heartbeat)
	}
	if s.replacedForOrphan(a.err) {
		return s.connecting
	}
	if a.err != nil {
		var at *SessionError
		if errors.As(a.err, &at) {
			at.Session = number
			at.Queue = cmp.Or(at.Queue, s.config.queue)
			s.host = cmp.Or(s.host, at.Host)
		}
		return s.failed(a.err)
	}
	if a.session == nil {
		return s.paused
	}
	s.number, s.session, s.probed = number, a.session, probe(a.session)
	s.strikes, s.hung = 0, 0
	return s.consuming
}

// tryContext returns the context of a try. On a connection that exists already, deliveries for
// other sessions may hold up the answers, so there the limit counts silence.
func (s *supervisor) tryContext() (context.Context, context.CancelFunc) {
	if s.conn != nil {
		return s.conn.socket.WithSilence(s.ctx, s.config.setupTimeout, s.config.setupPassed())
	}
	return context.WithTimeoutCause(s.ctx, s.config.setupTimeout, s.config.setupPassed())
}

// open is one try. It runs on a goroutine of its own, which may outlive its limit, so it touches
// nothing of the supervisor that changes.
func (s *supervisor) open(ctx context.Context, conn *loan, dial *dial, suspect bool, number, try uint64, step *step) attempt {
	var giveBack func()
	if conn == nil {
		var err error
		var turn turn
		if conn, turn, err = s.borrower.connect(ctx, dial, suspect, step); err != nil {
			return attempt{err: err}
		}
		defer turn.giveBack()
		giveBack = func() { s.borrower.giveBack(conn, closeRequest{limit: s.config.closeTimeout}) }
	}
	if is, _ := s.consumer.valve.look(); !is.wants(time.Now()) {
		return attempt{conn: conn, giveBack: giveBack}
	}
	// A tag is never used again, not even by the next try for the same session.
	tag := fmt.Sprintf("%s.%d-%d", s.tag, try, number)
	session, err := openSession(ctx, conn, s.scope, number, try, tag, step)
	return attempt{conn: conn, giveBack: giveBack, session: session, err: err}
}

// consuming waits for the first sign of the session's end, or for the end of Run's context.
func (s *supervisor) consuming() stateFunc {
	s.stats.sessions.Add(1)
	s.conn.served = true
	if s.consumer.grouped && s.owns() {
		s.conn.keep()
	}
	s.retry.consuming()
	s.borrower.praise(s.host)
	shut := s.watchValve() // first: a handler may ask for the state
	s.away = away{}
	s.pool.serve(s.session)
	from := s.reasonsToMove()
	from.stop, from.shut = s.ctx.Done(), shut
	for {
		first := s.session.consume(&from)
		switch first {
		case signUnreadable:
			s.session.setAside()
			continue
		case signTurned:
			s.turned(shut)
			continue
		case signHeld:
			if s.holdsOn(shut) {
				continue
			}
		case signProven:
			if !s.comesBack() {
				from.proven = time.After(lookAgain)
				continue
			}
		case signRetiring:
			if s.staysBusy(&from) {
				continue
			}
		case signStop:
			s.recordHealth(s.session)
			return s.draining
		}
		s.session.finish(first)
		return s.ending
	}
}

// ending waits until its successor may follow a session that ends: at once, unless that moves and
// its handlers have to finish first.
func (s *supervisor) ending() stateFunc {
	session := s.session
	select {
	case <-session.end.Done():
	case <-s.ctx.Done():
		s.recordHealth(session)
		return s.draining
	}
	s.release()
	s.recordHealth(session)
	if errors.Is(session.end.Cause(), errPaused) {
		return s.paused
	}
	if errors.Is(session.end.Cause(), errMoved) {
		s.dropConnection()
		return s.connecting
	}
	return s.failed(session.end.Cause())
}

// comesBack moves a consumer that was kept apart, and is healthy, to a connection that others share.
// It reports whether there is one.
func (s *supervisor) comesBack() bool {
	if s.session.movesLate() || !s.borrower.share() {
		return false
	}
	s.reporter.info("the consumer has been healthy on a connection of its own, so it shares one again",
		slog.String("queue", s.session.queue), slog.String("host", s.host))
	return true
}

// mostLooks is how often a busy session of a stream is looked at, lookAgain apart, before it has to
// leave a connection that is to go.
const mostLooks = 12

// staysBusy lets the session of a stream stay on a connection that is to go while its handlers are
// at work: to move, all its workers would have to wait for the slowest one. A stream that is busy
// all the time moves in the end.
func (s *supervisor) staysBusy(from *signals) bool {
	if !s.session.movesLate() || from.looks == mostLooks {
		return false
	}
	from.looks++
	later := make(chan struct{})
	time.AfterFunc(lookAgain, func() { close(later) })
	from.retiring = later
	return true
}

// provenApart is how long a session lasts on a connection of its own, until its consumer shares one
// again.
const provenApart = 70 * time.Second

// lookAgain is how long it takes until a consumer that cannot share a connection yet looks again.
const lookAgain = 5 * time.Second

// reasonsToMove returns what tells that the session's successor does better on another connection:
// its own is to go, or a consumer that was kept apart is healthy. A queue that would end with the
// connection stays.
func (s *supervisor) reasonsToMove() (from signals) {
	if s.owns() || s.consumer.grouped && namedByBroker(s.session.queue) {
		return from
	}
	if s.borrower.isolated() {
		from.proven = time.After(provenApart)
	}
	from.retiring = s.conn.retiring.Done()
	return from
}

// recordHealth records how well the session did that is ending now.
func (s *supervisor) recordHealth(session *session) {
	now := time.Now()
	healthy := session.healthy(now)
	if healthy {
		s.retry.healthy()
	}
	s.borrower.proved(healthy, now.Sub(session.since) >= provenAfter)
}

// release takes the session away from the workers and lets it end by itself.
func (s *supervisor) release() {
	s.closing = append(s.closing, closer{done: s.session.done, session: s.session})
	s.awaitProber()
	s.pool.serve(nil)
	s.session = nil
}

// awaitProber lets Run wait for the session's prober, if there is one.
func (s *supervisor) awaitProber() {
	if s.probed != nil {
		s.closing = append(s.closing, closer{done: s.probed})
	}
}

// failed decides what follows a failure: whether it ends Run, whether it ends the connection, and
// when the next try is.
func (s *supervisor) failed(err error) stateFunc {
	now := time.Now()
	if s.over(now) {
		return s.draining
	}
	s.borrower.blame(s.host, err, now)
	err = s.unproven(err)
	s.away.add(s.concernsAll(err))
	moved := s.keepOrReplace(err, now)
	gives := s.givesUp(err)
	switch {
	case moved && errors.Is(err, amqp.ErrChannelMax): // to where there is room, which is no failure
		return s.connecting
	case moved:
		return s.decide(err, gives, s.retry.shortDelay())
	case s.conn != nil:
		return s.decide(err, gives, s.retry.wait(err, now, false))
	}
	wait := s.borrower.wait(s.retry, dialFailure{err: err, host: s.host, final: gives}, s.dial, s.away.last, now)
	s.dial = nil
	return s.decide(err, gives, s.sooner(err, wait, now))
}

// trustedAfter is how long a consumer that has ended connections by its set-up waits for one of its
// own, before it tries again on one that others share.
const trustedAfter = 10 * time.Minute

// sooner shortens the wait after a dial that the broker has refused because of a limit on
// connections, if another connection has room for this consumer.
func (s *supervisor) sooner(err error, wait time.Duration, now time.Time) time.Duration {
	var at *SessionError
	switch {
	case !errors.As(err, &at) || at.Op != "open" || classify(err) != classLocked,
		s.strikes > 1 && now.Sub(s.struck) < trustedAfter,
		!s.borrower.share():
		return wait
	}
	return s.retry.shortDelay()
}

// told is failed for a dial that another consumer has made.
func (s *supervisor) told(f *dialFailure, wait time.Duration) stateFunc {
	now := time.Now()
	if s.over(now) {
		return s.draining
	}
	s.host = f.host
	s.away.add(true)
	err := s.asOwn(f.err)
	_ = s.retry.wait(err, now, f.fresh)
	return s.decide(err, s.givesUp(err), s.sooner(err, wait, now))
}

// asOwn returns the failure of a dial as this consumer tells it.
func (s *supervisor) asOwn(err error) error {
	var at *SessionError
	if !errors.As(err, &at) {
		return err
	}
	own := *at
	own.Queue, own.Session = s.config.queue, s.number+1
	return &own
}

// decide ends Run because of err, if gives or WithFatal says so, or lets it wait for the next try.
// A WithFatal that panics or does not return in time ends Run, too.
func (s *supervisor) decide(err error, gives bool, wait time.Duration) stateFunc {
	var fault error
	if s.config.fatal != nil {
		gives, fault = isFatal(s.ctx, s.config, err, s.scope.abandoned)
	}
	if gives || fault != nil {
		s.addError(fault)
		s.addError(err)
		return s.draining
	}
	s.cause, s.retryIn = err, wait
	return s.backoff
}

// waitFor waits for a moment at which a connection may be had, while others dial.
func waitFor[T any](s *supervisor, moment <-chan T) stateFunc {
	s.enterConnecting()
	select {
	case <-moment:
		return s.connecting
	case <-s.ctx.Done():
		return s.draining
	}
}

// concernsAll reports whether err is a failure of a connection that others share.
func (s *supervisor) concernsAll(err error) bool {
	return (noConnection(err) || s.conn != nil && !s.usable()) && !s.borrower.isolated()
}

// noConnection reports whether no connection could be opened.
func noConnection(err error) bool {
	var at *SessionError
	return errors.As(err, &at) && (at.Op == "dial" || at.Op == "open")
}

// away is what has failed since a consumer's last session.
type away struct {
	last bool // the last failure was that of a connection that others share
	own  bool // another one was the consumer's own
}

func (a *away) add(concernsAll bool) {
	a.last = concernsAll
	a.own = a.own || !concernsAll
}

// tellsGroup reports whether the Group's log tells of a change to that state, for all consumers.
func (a away) tellsGroup(to State) bool {
	switch to {
	case Connecting:
		return true
	case Backoff:
		return a.last
	case Consuming:
		return a.last && !a.own
	}
	return false
}

// over reports whether Run's context has ended, or its deadline has passed: a dial that has the
// same deadline may end a moment before the context does.
func (s *supervisor) over(now time.Time) bool {
	limit, ok := s.ctx.Deadline()
	return s.ctx.Err() != nil || ok && !now.Before(limit)
}

// givesUp reports whether err ends Run, unless WithFatal decides that. No refusal of a connection
// does where others have consumed over one.
func (s *supervisor) givesUp(err error) bool {
	gives := s.retry.givesUp(err)
	return gives && s.config.fatal == nil && !(noConnection(err) && s.borrower.served())
}

// keepOrReplace closes the connection after a failure, unless the next session does better to use
// it: it is alive, leads to a node that serves its queues, no topology function has failed on it
// too often, and either it has not failed its sessions too often or it owns a queue that would be
// lost with it. It reports whether the consumer goes on on another one that it shares, because this
// one has no channel left for it, or because it is kept apart no more.
func (s *supervisor) keepOrReplace(err error, now time.Time) (moved bool) {
	if s.conn == nil {
		return false
	}
	alive := s.usable()
	keep := alive && !s.conn.tooManyTopologyFailures() && !leavesNode(err) && !s.hangs(err) && !errors.Is(err, errChannelsHeld)
	switch {
	case s.borrower.hasLeft(s.conn): // its session was lost as it was about to move
		moved = true
	case errors.Is(err, amqp.ErrChannelMax) && !s.owns() && s.overflows():
		moved = true
	case keep && (s.owns() || s.blameless(classify(err)) || !s.conn.tooManyChannelFailures(now)):
		return false
	case alive, s.strikes > 1:
		s.isolate() // what it does to a connection must not concern others
	}
	s.dropConnection()
	return moved
}

// mostHangs is how many set-ups in a row may hang on a connection that others share.
const mostHangs = 2

// hangs reports whether a set-up has hung, so that the next one does better on another connection.
// Where others share the connection, and live on it, it takes a second one to say so: for a while a
// broker may be slow for all of them.
func (s *supervisor) hangs(err error) bool {
	if !errors.Is(err, errSetupTimeout) {
		return false
	}
	s.hung++
	return !s.borrower.sharing(s.conn) || s.hung >= mostHangs && s.conn.leases.any()
}

// unproven marks err if the broker has closed a connection that others share while this consumer
// was set up on it: any of them may be the reason. It counts how often that happened.
func (s *supervisor) unproven(err error) error {
	var at *SessionError
	var brokerErr *amqp.Error
	switch {
	case !errors.As(err, &at), at.Op == "dial", at.Op == "open", at.Op == "lost",
		!errors.As(err, &brokerErr), !brokerErr.Server, brokerErr.Recover, brokerErr.Code == amqp.ConnectionForced,
		s.conn == nil, !s.borrower.sharing(s.conn):
		return err
	}
	s.strikes, s.struck = s.strikes+1, time.Now()
	own := *at
	own.Err = &unprovenError{at.Err}
	return &own
}

// overflows moves the consumer to another connection, if it shares one that has no channel left.
func (s *supervisor) overflows() bool {
	moved, further := s.borrower.overflow()
	if further {
		s.reporter.warn("the connection has no channel left for all consumers, so a further connection is opened: raise channel_max, or set WithConnections",
			slog.String("queue", s.config.queue), slog.String("host", s.host))
	}
	return moved
}

// leavesNode reports whether the next session would fail in the same way on the same node, while
// another node may do better. There may be other nodes even behind a single URL: a load balancer,
// or a function of the user, may choose the node of each dial.
func leavesNode(err error) bool { return errors.Is(err, errStalled) }

// blameless reports whether a session would fail in the same way on another connection: because of
// a lock or of the store of WithStreamOffsets, or because the queue is missing or cannot be
// reached, where no other host may know better.
func (s *supervisor) blameless(kind class) bool {
	elsewhere := len(s.borrower.of.hosts.endpoints) > 1
	return kind == classLocked || kind == classStore || (kind == classAbsent || kind == classUnreachable) && !elsewhere
}

// dropConnection closes the connection, or leaves it to others without the consumer's queues. The
// close waits until the handlers of a session that the broker has cancelled have settled on it, for
// the drain limit at most.
func (s *supervisor) dropConnection() {
	if names := s.left(); names.any() {
		ctx, cancel := s.conn.socket.WithSilence(context.WithoutCancel(s.ctx), s.config.closeTimeout, errCloseTimeout)
		s.closing = append(s.closing, closer{done: s.conn.deleteQueues(ctx, cancel, names, s.config)})
	}
	s.closeConnection(closeRequest{grace: s.config.drainTimeout + s.config.closeTimeout, limit: s.config.closeTimeout})
	s.forgetClosed()
}

func (s *supervisor) closeConnection(d closeRequest) {
	if s.conn == nil {
		return
	}
	if s.borrower.giveBack(s.conn, d) {
		s.closing = append(s.closing, closer{done: s.conn.done, conn: s.conn.connection})
	}
	s.conn = nil
}

// closer is a session, a connection or a prober that is ending.
type closer struct {
	done    <-chan struct{}
	session *session    // nil if it is no session
	conn    *connection // nil if it is no connection
}

func (l closer) isDone() bool { return isClosed(l.done) }

// forgetClosed forgets what has ended, so that a long Run does not collect it.
func (s *supervisor) forgetClosed() { s.closing = slices.DeleteFunc(s.closing, closer.isDone) }

// backoff waits for the next try.
func (s *supervisor) backoff() stateFunc {
	s.enter(Backoff, s.cause)
	timer := time.NewTimer(s.retryIn)
	defer timer.Stop()
	select {
	case <-timer.C:
		s.forgetClosed()
		return s.connecting
	case <-s.ctx.Done():
		return s.draining
	}
}

// draining stops in order: the session within the drain limit, every handler within the same limit,
// then the connection, and all that is still closing, within the close limit.
func (s *supervisor) draining() stateFunc {
	s.enter(Draining, s.result())
	s.forgetClosed()
	s.shortenCloses()
	s.borrower.withdraw(s.dial)
	limit := time.NewTimer(s.config.drainTimeout)
	defer limit.Stop()
	s.pool.end()
	left := s.config.closeTimeout
	if s.session != nil {
		s.session.close() // bounded by the drain limit and the close limit
		s.awaitProber()
		s.addError(s.session.drainErr)
		left -= s.session.closeTook
	}
	switch {
	case s.handlersDone(limit.C):
		s.awaitRetired(limit.C)
	case !errors.Is(s.err, ErrDrainTimeout):
		s.addError(s.scope.drainError())
	}
	left = max(left, time.Millisecond)
	awaitSaver := s.scope.saver.end(max(left, teardownGrace))
	s.leaveQueuesAtLast(left)
	s.closeConnection(closeRequest{grace: left / 2, limit: left / 2})
	s.awaitClosing()
	awaitSaver()
	return nil
}

// shortenCloses makes connections that are closing already keep to the limits of the stop.
func (s *supervisor) shortenCloses() {
	for _, l := range s.closing {
		if l.conn != nil {
			l.conn.shortenClose(closeRequest{grace: s.config.drainTimeout, limit: s.config.closeTimeout})
		}
	}
}

// addError adds err to Run's error: a connection lost while draining does not hide that handlers
// were still running.
func (s *supervisor) addError(err error) {
	switch {
	case s.err == nil:
		s.err = err
	case err != nil:
		s.err = errtext.Join(s.err, err)
	}
}

// handlersDone waits for all workers, those of dead sessions included, until the drain limit.
// Handlers whose context has just ended get teardownGrace more.
func (s *supervisor) handlersDone(limit <-chan time.Time) bool {
	var drain *DrainError
	if !errors.As(s.err, &drain) {
		select {
		case <-s.pool.done:
			return true
		case <-limit:
		}
	}
	grace := time.NewTimer(teardownGrace)
	defer grace.Stop()
	select {
	case <-s.pool.done:
		return true
	case <-grace.C:
		return false
	}
}

// awaitRetired waits until the copies of failed messages of earlier sessions that may still settle
// are confirmed, until the drain limit. Their handlers have returned.
func (s *supervisor) awaitRetired(limit <-chan time.Time) {
	for _, l := range s.closing {
		if l.session == nil || l.session.closed.Load() {
			continue
		}
		select {
		case <-l.session.gate.done:
		case <-l.done:
		case <-limit:
			return
		}
	}
}

// awaitClosing waits until nothing is left of any session or connection, and counts what outlasts
// the limit. One that hangs says nothing about those behind it.
func (s *supervisor) awaitClosing() {
	awaitTeardowns(s.config.closeTimeout, s.closing, func(l closer) <-chan struct{} { return l.done })
	for _, l := range s.closing {
		switch {
		case !l.isDone():
			s.stats.abandoned.Add(1)
		case l.session != nil:
			s.addError(l.session.drainErr)
		}
	}
}

// enterConnecting does not tell of a try on another connection as a change of state.
func (s *supervisor) enterConnecting() {
	if s.consumer.State() != Connecting {
		s.enter(Connecting, nil)
	}
}

// enter changes the state and reports it.
func (s *supervisor) enter(to State, cause error) {
	from := State(s.consumer.state.Swap(int32(to)))
	change := StateChange{
		Time:    time.Now(),
		From:    from,
		To:      to,
		Queue:   s.config.queue,
		Session: s.number,
		Host:    s.host,
		Attempt: s.retry.failures,
		Cause:   cause,
	}
	change.shared = s.consumer.grouped && s.away.tellsGroup(to)
	if s.session != nil {
		change.Queue, change.ConsumerTag = s.session.queue, s.session.tag
	}
	if to == Backoff {
		change.RetryIn = s.retryIn
	}
	s.reporter.changed(change)
}

// replacedForOrphan closes the connection and returns true if err says that the session would leave
// another queue behind on it. The next try has a new connection, without such a queue, and follows
// at once.
func (s *supervisor) replacedForOrphan(err error) bool {
	var left *orphanedQueueError
	if s.ctx.Err() != nil || !errors.As(err, &left) {
		return false
	}
	if left.was != "" && !s.scope.notices.renamed.Swap(true) {
		s.reporter.warn("the topology function names another queue for every session, so every session gets a connection of its own; "+
			"what is in a queue that the broker has named is lost with the session. WithQueue keeps such a queue as long as the connection lives",
			slog.String("queue", left.is), slog.String("before", left.was), slog.String("host", s.host))
	}
	if namedByBroker(left.was) { // both are deleted
		s.borrower.isolate()
	} else {
		s.isolate()
	}
	s.dropConnection()
	return true
}

// owns reports whether a queue would end with the connection that has been consumed from: WithQueue
// has declared it, or, where others share the connection, a TopologyFunc.
func (s *supervisor) owns() bool {
	return s.conn != nil && s.conn.served && (s.config.declaresOwned() || s.consumer.grouped && s.conn.queues.Any())
}

// usable reports whether the next session may be opened on the connection. One that is to go
// because of others takes that of a consumer whose queue would go with it.
func (s *supervisor) usable() bool {
	return s.conn.alive() || s.consumer.grouped && s.owns() && s.conn.stands()
}

// isolate lets the consumer go on on a connection of its own.
func (s *supervisor) isolate() {
	if !s.borrower.isolate() {
		return
	}
	s.reporter.warn("the consumer cannot keep a session, so it goes on on a connection of its own, where it disturbs no other",
		slog.String("queue", s.config.queue), slog.String("host", s.host))
}

// left returns the queues that the consumer has declared on its connection, if that lives on without
// it. They would end with the connection, and stay bound and unread there, and locked for their own
// consumer.
func (s *supervisor) left() (queues leftQueues) {
	if s.conn == nil || !s.consumer.grouped || !s.conn.stands() || !s.borrower.outlived(s.conn) {
		return queues
	}
	queues.certain = s.conn.queues.Names()
	if s.conn.asked.Load() && !slices.Contains(queues.certain, s.config.queue) {
		queues.doubtful = s.config.queue
	}
	return queues
}

// leaveQueuesAtLast deletes what the last session has left behind, within the limit of the stop. If
// its own channel had no answer in time nothing is left of that limit, and nobody waits.
func (s *supervisor) leaveQueuesAtLast(limit time.Duration) {
	names := s.left()
	if !names.any() {
		return
	}
	waits := s.session == nil || s.session.drainErr == nil
	if !waits {
		limit = s.config.closeTimeout
	}
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(s.ctx), limit, errCloseTimeout)
	if done := s.conn.deleteQueues(ctx, cancel, names, s.config); waits {
		s.closing = append(s.closing, closer{done: done})
	}
}

// isFatal asks the user's function whether err ends Run. Nothing heals meanwhile, so the function
// has a limit.
func isFatal(ctx context.Context, c *config, err error, left func()) (bool, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.setupTimeout, errNoAnswer)
	defer cancel()
	return userCall[bool]{
		option: "WithFatal",
		f:      func(context.Context) (bool, error) { return c.fatal(err), nil },
		left:   left,
	}.run(ctx)
}

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
	if by == nil { // which would be no nil error
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
	if s.session.gate.holds(s.session.collected.Load()) && !t.usedUp(s.consumer.valve, time.Now()) {
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
