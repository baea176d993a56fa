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
	conn *connection

	channel *amqp.Channel
	lane    *lane // the way of the deliveries and settlements
	queue   string
	tag     string
	closes  chan *amqp.Error     // the driver's NotifyClose
	cancels chan string          // the driver's NotifyCancel
	driver  <-chan amqp.Delivery // brings nothing, for all goes by the lane, but ends

	ctx    context.Context // of the handlers
	cancel context.CancelCauseFunc

	gate    *gate         // handlers of this session at work
	holds   holds         // deliveries that wait for their requeue
	broken  *notifier     // we ourselves want another session, and why
	stop    chan struct{} // closed to ask for the drain
	ended   *notifier     // no more deliveries, and why
	over    atomic.Bool   // no more settlements
	settled atomic.Bool   // one settlement at least: the session proved itself
	gone    chan struct{} // closed when nothing of it is left
	since   time.Time     // consume-ok
	probed  chan struct{} // closed when the stall detector has returned

	received atomic.Uint64 // deliveries given to handlers, for the stall detector

	drained error         // of the drain; read after gone
	closing time.Duration // what the close took of the close limit; read after gone
}

// scope is what the sessions of one Run share.
type scope struct {
	config   *config
	stats    *counters
	reporter *reporter
	handlers context.Context // what the contexts of handlers are made from
	stream   *position       // where to resume, nil unless it is a stream
}

// openSession opens a channel on c, sets it up and subscribes, all within ctx:
// the driver's calls take no context, so the end of ctx closes the socket under
// them.
func (c *connection) openSession(ctx context.Context, of *scope, id uint64, tag string) (*session, error) {
	unguard := context.AfterFunc(ctx, func() { c.socket.kill(context.Cause(ctx)) })
	defer unguard()

	channel, err := c.amqp.Channel()
	if err != nil {
		return nil, &SessionError{Queue: of.config.queue, Host: c.host, Op: "channel", Session: id, Err: c.explain(err)}
	}
	s := &session{
		scope:   of,
		id:      id,
		conn:    c,
		channel: channel,
		tag:     tag,
		closes:  channel.NotifyClose(make(chan *amqp.Error, 1)),
		cancels: channel.NotifyCancel(make(chan string, 1)),
		gate:    newGate(),
		broken:  newNotifier(),
		stop:    make(chan struct{}),
		ended:   newNotifier(),
		gone:    make(chan struct{}),
		probed:  make(chan struct{}),
	}
	s.lane = c.socket.lane(tag, of.config.prefetch)
	if op, err := s.subscribe(ctx); err != nil {
		s.lane.abandon()
		_ = channel.Close() // also bounded by ctx, through the socket
		err = s.said(err)
		s.stream.gone(err)
		return nil, s.failure(op, c.explain(err))
	}
	s.since = time.Now()
	s.ctx, s.cancel = context.WithCancelCause(of.handlers)
	go s.run()
	return s, nil
}

// subscribe returns the step that failed, and why.
func (s *session) subscribe(ctx context.Context) (op string, err error) {
	s.queue, err = s.topology(ctx)
	if err != nil {
		return "topology", err
	}
	// Per consumer (global=false): RabbitMQ refuses or ignores the other form.
	if err := s.channel.Qos(s.config.prefetch, 0, false); err != nil {
		return "qos", err
	}
	s.driver, err = s.channel.Consume(s.queue, s.tag, false, s.config.exclusive, false, false, s.stream.resume(s.id, s.queue, s.config.consumeArgs))
	return "consume", err
}

// said replaces the driver's ErrClosed by what the broker said when it closed
// the channel, if that has arrived.
func (s *session) said(err error) error {
	if !errors.Is(err, amqp.ErrClosed) {
		return err
	}
	select {
	case e := <-s.closes:
		if e != nil {
			return e
		}
	default:
	}
	return err
}

// run is the session's life after consume-ok.
func (s *session) run() {
	defer close(s.gone)
	if s.config.stallAfter > 0 {
		go s.probe()
	} else {
		close(s.probed)
	}
	cause := s.consume()
	switch {
	case cause == nil:
		s.drain()
	case errors.Is(cause, errCancelled):
		s.stream.doubt()
		s.retire(cause)
	default:
		s.lose(cause)
	}
	s.closeChannel()
	s.lane.bury()
}

// consume waits for the first sign of the session's end. The driver promises no
// order among its signs, so what ended is decided on the state after any of
// them. It returns nil when the drain was asked for.
func (s *session) consume() error {
	var err error
	select {
	case e := <-s.closes:
		err = errorOrNil(e)
	case _, cancelled := <-s.cancels:
		if cancelled {
			return s.lost(errCancelled)
		}
	case <-s.conn.end.ended:
	case <-s.driver:
	case <-s.broken.ended:
		return s.lost(s.broken.cause())
	case <-s.stop:
		return nil
	}
	return s.lost(s.diagnose(err))
}

func (s *session) lost(err error) error { return s.failure("lost", err) }

func (s *session) failure(op string, err error) error {
	return &SessionError{Queue: cmp.Or(s.queue, s.config.queue), Host: s.conn.host, Session: s.id, Op: op, Err: err}
}

// warn logs what an operator should know and no change of state tells.
func (s *session) warn(message string, attrs ...slog.Attr) {
	s.reporter.warn(message, append([]slog.Attr{
		slog.String("queue", s.queue), slog.String("consumer", s.tag),
		slog.Uint64("session", s.id), slog.String("host", s.conn.host),
	}, attrs...)...)
}

// diagnose finds the one cause. err is what the channel's NotifyClose said, nil
// if another sign came first.
func (s *session) diagnose(err error) error {
	if s.conn.amqp.IsClosed() || s.conn.end.cause() != nil {
		<-s.conn.end.ended // bounded: the connection is on its way down
		return s.conn.end.cause()
	}
	if err != nil {
		return err
	}
	// A deliveries chan or NotifyCancel that ended without a value: a cancel
	// or a close is right behind it, or we see a connection on its way down.
	select {
	case _, cancelled := <-s.cancels:
		if cancelled {
			return errCancelled
		}
	default:
	}
	select {
	case e := <-s.closes:
		if e != nil {
			return e
		}
	case <-s.conn.end.ended:
		return s.conn.end.cause()
	case <-time.After(s.config.closeTimeout):
	}
	if cause := s.conn.end.cause(); cause != nil {
		return cause
	}
	return errChannelEnded
}

// shut lets no more handlers start.
func (s *session) shut() {
	s.gate.shut()
	s.lane.close()
}

// lose ends a session whose channel is gone: running handlers are told, and
// nothing they settle from now on reaches the wire.
func (s *session) lose(cause error) {
	s.over.Store(true)
	s.shut()
	s.cancel(cause)
	s.ended.notify(cause)
	s.holds.release()
}

// retire ends a session that the broker cancelled. Its channel lives, so running
// handlers may settle, which saves needless duplicates; the successor consumes
// meanwhile. What no handler has started goes back at once.
func (s *session) retire(cause error) {
	s.shut()
	s.ended.notify(cause)
	// RabbitMQ 4.3 would serve the cancelled consumer again once its overdue
	// deliveries are settled, and the driver has forgotten it: those messages
	// would be stuck until the channel closes. Other versions ignore an unknown tag.
	_ = s.channel.Cancel(s.tag, true)
	s.handBackRest()
	s.holds.release()
	limit := time.NewTimer(s.config.drainTimeout)
	defer limit.Stop()
	select {
	case <-s.gate.empty:
	case <-s.closes:
	case <-s.conn.end.ended:
	case <-limit.C:
	}
	s.lose(cause)
}

// drain ends a session in order: no new deliveries, the unstarted ones back to
// the queue, running handlers within the limit. closeChannel then proves their
// acks by its close-ok.
func (s *session) drain() {
	limit := time.NewTimer(s.config.drainTimeout)
	defer limit.Stop()
	s.shut()
	s.ended.notify(errStopped)
	s.holds.release()
	if err := s.unsubscribe(); err != nil {
		s.drained = err
		s.lose(err)
		return
	}
	select {
	case <-s.gate.empty:
		return
	case e := <-s.closes:
		s.drained = s.lost(s.diagnose(errorOrNil(e)))
	case <-s.conn.end.ended:
		s.drained = s.lost(s.conn.end.cause())
	case <-limit.C:
		s.drained = &DrainError{Handlers: int(s.stats.handling.Load()), Limit: s.config.drainTimeout}
	}
	s.lose(s.drained)
}

// unsubscribe sends basic.cancel and hands back what no worker took.
func (s *session) unsubscribe() error {
	limit := time.AfterFunc(s.config.closeTimeout, func() { s.conn.socket.kill(errCloseTimeout) })
	defer limit.Stop()
	if err := s.channel.Cancel(s.tag, false); err != nil {
		return s.lost(s.diagnose(nil))
	}
	s.handBackRest()
	return nil
}

// handBackRest returns to the queue what was delivered and no worker took.
// basic.nack says "never started": it does not count towards a delivery limit.
func (s *session) handBackRest() {
	for _, d := range s.lane.clear() {
		s.handBack(d.DeliveryTag)
	}
}

// handBack returns a delivery that no handler saw. Of a session that is over the
// broker has taken back everything itself.
func (s *session) handBack(tag uint64) {
	if s.over.Load() || s.stream != nil {
		return
	}
	_ = s.lane.settle(basicNack, tag, nackRequeue)
}

// closeChannel waits for close-ok, the only proof AMQP 0-9-1 has that the acks
// before it arrived, within the close limit.
func (s *session) closeChannel() {
	limit := time.AfterFunc(s.config.closeTimeout, func() { s.conn.socket.kill(errCloseTimeout) })
	defer limit.Stop()
	since := time.Now()
	err := s.channel.Close()
	s.closing = time.Since(since)
	if err != nil && !s.over.Load() {
		s.drained = s.lost(s.diagnose(s.said(err)))
	}
	s.lose(errStopped)
	drain(s.closes)
	drain(s.cancels)
}

// began notes that a handler is given d, where that matters.
func (s *session) began(d *Delivery) {
	if s.config.stallAfter > 0 {
		s.received.Add(1)
	}
	s.stream.began(s.id, &d.Delivery)
}

// number implements settler.
func (s *session) number() uint64 { return s.id }

// source implements settler.
func (s *session) source() (queue, host string) { return s.queue, s.conn.host }

// settle implements settler: it puts one settlement on the wire of this
// session's channel, or none. A failed handler is a reject, which counts towards
// a quorum queue's delivery limit.
func (s *session) settle(d *Delivery, o Outcome) error {
	if s.over.Load() {
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

func (s *session) send(d *Delivery, o Outcome) error {
	switch {
	case s.stream == nil && o == Acked:
		return s.ack(d.tag)
	case s.stream == nil:
		return s.reject(d.tag, o == Requeued)
	case o == Requeued: // a stream would take it as done
		s.broken.notify(errStreamAgain)
		return nil
	}
	for _, done := range s.stream.ready(s.id, d) {
		if err := s.ack(done.tag); err != nil {
			return err
		}
		s.stream.told(s.id, done)
	}
	return nil
}

func (s *session) ack(tag uint64) error { return s.lane.settle(basicAck, tag, 0) }

func (s *session) reject(tag uint64, requeue bool) error {
	var bits byte
	if requeue {
		bits = rejectRequeue
	}
	return s.lane.settle(basicReject, tag, bits)
}

// conclude settles a delivery by its handler's error, unless the handler has
// settled it by itself.
func (s *session) conclude(d *Delivery, err error) {
	if d.Outcome() != Unsettled {
		return
	}
	o, delay := judge(err, s.config.requeueDelay)
	if delay > 0 {
		s.holds.add(d, delay)
		return
	}
	_ = d.settle(o)
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
	empty chan struct{}
	once  sync.Once
}

func newGate() *gate {
	return &gate{empty: make(chan struct{})}
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
		g.once.Do(func() { close(g.empty) })
	}
}

// shut may be called more than once, by the session's own goroutine only.
func (g *gate) shut() {
	if g.count.Load()&1 == 1 {
		return
	}
	if g.count.Add(1) == 1 {
		g.once.Do(func() { close(g.empty) })
	}
}
