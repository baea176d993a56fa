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
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/retryqueue"
)

// Who publishes the copies of failed messages, see WithRetry in config.go. A Consumer alone has a
// publisher, and all consumers of a Group have one together. It has a connection of its own,
// because a broker that is short of memory or disk stops reading from connections that have
// published, acks included.

// publisher sends transfers, on one channel after the other. Its goroutine begins with the first
// one, and ends, with the connection, when there have been none for a while or the broker cannot be
// reached. In that case the sessions hold their transfers, and the first that is due begins another
// goroutine. So nobody dials for nothing, and what waits is bounded by the prefetch.
type publisher struct {
	of   *connections // of the consumers
	wake chan struct{}
	told atomic.Bool // a line says that copies cannot be sent
	slow rateLimited // those lines

	mu       sync.Mutex
	waiting  []*transfer
	inFlight int                // sent and not confirmed
	to       map[string]int     // those, by their queue
	alone    bool               // what is in flight may make the broker close the channel
	blocked  string             // why the broker takes no copies, "" while it does
	until    time.Time          // nobody dials before
	cause    error              // why that is so
	gone     map[string]bool    // destinations that have to be declared again
	conn     *connection        // that it publishes on; nil if there is none
	running  bool               // there is a goroutine
	ended    bool               // end was called
	cancel   context.CancelFunc // ends the goroutine

	begun sync.WaitGroup // the goroutine, and all that it has begun

	// Only the goroutine uses these. There is never more than one, for it begins and ends under mu.
	from     *connections // that it publishes on
	borrower *borrower
	loan     *loan // for the next channel; nil if that needs another connection
	retry    *retry
	asking   retryqueue.Asking // for destinations that have gone
	copies   string            // what the ids of copies begin with
	number   uint64            // of the last copy
}

const (
	// mostInFlight is how many copies may be sent and not confirmed.
	mostInFlight = 256
	// mostToOne is how many of them may be for one queue: one that confirms nothing, as a quorum
	// queue without its majority, must not keep the copies for others waiting.
	mostToOne = 32
	// publisherIdle is how long the connection stays open without a copy to send.
	publisherIdle = time.Minute
	// publisherClose is how long the end of a Run waits for the connection to close.
	publisherClose = 300 * time.Millisecond
	// blockedWait is how long a transfer is held while the broker takes no copies.
	blockedWait = 2 * time.Second
)

func newPublisher(of *connections) *publisher {
	return &publisher{of: of, wake: make(chan struct{}, 1), gone: make(map[string]bool), to: make(map[string]int)}
}

// awayError says that no copy can be sent now.
type awayError struct {
	left time.Duration // until it makes sense to try again
	err  error
}

func (e *awayError) Error() string { return e.err.Error() }

func (e *awayError) Unwrap() error { return e.err }

// send takes a transfer, unless no copy can be sent now. It never blocks.
func (p *publisher) send(t *transfer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch left := time.Until(p.until); {
	case p.ended:
		return errStopped
	case p.blocked != "":
		return p.blockedError()
	case left > 0:
		return &awayError{left, p.cause}
	}
	p.waiting = append(p.waiting, t)
	p.attend(t)
	return nil
}

var (
	errNoPublisher = errors.New("there is no connection to publish on")
	errNacked      = errors.New("the broker has refused the copy (basic.nack): the queue is full, or cannot store it")
)

func (p *publisher) blockedError() *awayError {
	return &awayError{blockedWait, fmt.Errorf("the broker takes no messages now (connection.blocked: %s)", p.blocked)}
}

// attend makes the goroutine look again, or begins one. It is called with mu held.
func (p *publisher) attend(t *transfer) {
	if p.running {
		p.look()
		return
	}
	p.prepare()
	ctx, cancel := context.WithCancel(t.session.handlers)
	p.running, p.cancel = true, cancel
	p.begun.Add(1)
	go p.run(ctx)
}

func (p *publisher) look() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run is the publisher's goroutine.
func (p *publisher) run(ctx context.Context) {
	defer p.begun.Done()
	for !p.over() {
		if away := p.serve(ctx); away != nil {
			p.refuse(away)
			p.rest(ctx)
		}
	}
}

// prepare makes what the first goroutine of a Run needs.
func (p *publisher) prepare() {
	if p.from != nil {
		return
	}
	own := *p.of.config
	own.connectionName = cmp.Or(own.connectionName, "steadymq") + " (retry)"
	own.connections = 1
	p.from = newConnections(&own, p.of.stats)
	p.borrower, p.retry = p.from.join(), newRetry(&own)
	random := make([]byte, 8)
	_, _ = rand.Read(random) // never fails
	p.copies = hex.EncodeToString(random) + "-"
}

// rest waits for a transfer after the end of a channel alone, for those that are held try again soon
// and may have the same connection.
func (p *publisher) rest(ctx context.Context) {
	if p.loan == nil {
		return
	}
	idle := time.NewTimer(publisherIdle)
	defer idle.Stop()
	for p.idle() {
		select {
		case <-p.wake:
			continue
		case <-p.loan.end.Done():
		case <-idle.C:
		case <-ctx.Done():
		}
		return
	}
}

// over ends the goroutine, and the connection, if there is nothing to send.
func (p *publisher) over() bool {
	if p.idle() {
		p.disconnect()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiting) > 0 {
		return false
	}
	p.running = false
	p.cancel()
	return true
}

func (p *publisher) idle() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting) == 0
}

// disconnect closes the connection, if there is one.
func (p *publisher) disconnect() {
	if p.loan == nil {
		return
	}
	p.mu.Lock()
	limit := p.from.config.closeTimeout
	if p.ended {
		limit = publisherClose
	}
	p.conn, p.blocked = nil, ""
	p.mu.Unlock()
	p.borrower.giveBack(p.loan, closeRequest{limit: limit})
	p.loan = nil
}

// refuse lets the sessions hold what waits, because no copy can be sent.
func (p *publisher) refuse(away *awayError) {
	p.mu.Lock()
	p.until, p.cause = time.Now().Add(away.left), away.err
	waiting := p.waiting
	p.waiting = nil
	p.mu.Unlock()
	for _, t := range waiting {
		p.failed(t, away)
	}
}

// failed gives a transfer back to its session, on a goroutine of its own: that may have to settle
// it, and a hook or a connection that is stuck must not keep other sessions from publishing.
func (p *publisher) failed(t *transfer, err error) {
	p.begun.Go(func() { t.failed(err) })
}

// serve opens a channel and publishes on it until it ends. It returns why that happened, nil if
// there was nothing to send any more.
func (p *publisher) serve(ctx context.Context) *awayError {
	path, away := p.open(ctx)
	if away != nil {
		return away
	}
	err := p.publish(ctx, path)
	path.end.notify(cmp.Or(err, error(errStopped)))
	path.lease.giveBack()
	if path.proved.Load() {
		p.retry.healthy()
	}
	if err == nil {
		return nil
	}
	now := time.Now()
	p.borrower.blame(p.loan.host, err, now)
	if !p.loan.alive() {
		p.disconnect()
		return &awayError{p.borrower.wait(p.retry, dialFailure{err: err}, nil, true, now), err}
	}
	return &awayError{p.retry.wait(err, now, true), err}
}

// path is one channel in confirm mode.
type path struct {
	loan    *loan
	lease   *lease
	channel *amqp.Channel
	closes  <-chan *amqp.Error // the driver's NotifyClose, with room for its one value
	end     *notifier          // why no more copies are sent
	proved  atomic.Bool        // a copy was confirmed
	givenUp atomic.Bool        // a confirm has not come in time

	// returns is the driver's NotifyReturn. It has room for one value for each copy in flight. A
	// return comes before the confirm of its copy, so who has seen the confirm finds it here.
	returns  <-chan amqp.Return
	mu       sync.Mutex
	returned map[string]string // why, by the id of the copy
}

// open opens a channel, on the connection of the last one if that stands, within the set-up limit.
func (p *publisher) open(ctx context.Context) (*path, *awayError) {
	if p.loan != nil && !p.loan.alive() {
		p.disconnect()
	}
	var d *dial
	if p.loan == nil {
		offer := p.borrower.borrow(time.Now())
		if d = offer.own; d == nil {
			return nil, &awayError{offer.wait, errNoPublisher}
		}
	}
	limit, cancel := context.WithTimeoutCause(ctx, p.from.config.setupTimeout, p.from.config.setupPassed())
	defer cancel()
	step := newStep("dial")
	a := runBounded(limit, func() attempt { return p.try(limit, p.loan, d, step) }, step)
	if a.conn != nil {
		p.use(a.conn)
		d = nil
	}
	if a.err == nil {
		p.borrower.praise(a.conn.host)
		return a.path, nil
	}
	return nil, p.notOpened(a.err, d)
}

// use records the connection, and listens to whether the broker takes messages on it.
func (p *publisher) use(l *loan) {
	if p.loan != nil {
		return
	}
	p.loan = l
	p.mu.Lock()
	p.conn = l.connection
	p.mu.Unlock()
	p.begun.Go(func() { p.listen(l.connection) })
}

// notOpened returns how long to wait after a failure to open a channel; d is the dial that has
// failed, if it was that.
func (p *publisher) notOpened(err error, d *dial) *awayError {
	now := time.Now()
	var at *SessionError
	if errors.As(err, &at) {
		p.borrower.blame(at.Host, err, now)
	}
	if p.loan != nil && p.loan.alive() {
		return &awayError{p.retry.wait(err, now, true), err}
	}
	p.disconnect()
	return &awayError{p.borrower.wait(p.retry, dialFailure{err: err}, d, true, now), err}
}

// try is open on a goroutine of its own, which may outlive its limit.
func (p *publisher) try(ctx context.Context, l *loan, d *dial, step *step) attempt {
	var giveBack func()
	if l == nil {
		var turn turn
		var err error
		if l, turn, err = p.borrower.connect(ctx, d, false, step); err != nil {
			return attempt{err: err}
		}
		turn.giveBack()
		giveBack = func() { p.borrower.giveBack(l, closeRequest{limit: publisherClose}) }
	}
	step.at("channel")
	lease := l.lend()
	unguard := context.AfterFunc(ctx, func() { lease.giveUp(causeOf(ctx)) })
	channel, err := l.openChannel(ctx, lease.use, nil)
	if err == nil {
		err = channel.Confirm(false)
	}
	if inTime := unguard(); err == nil && !inTime {
		err = causeOf(ctx)
	}
	if err != nil {
		lease.giveBack()
		return attempt{conn: l, giveBack: giveBack, err: &SessionError{Host: l.host, Op: "channel", Err: l.explain(err)}}
	}
	return attempt{conn: l, giveBack: giveBack, path: &path{
		loan: l, lease: lease, channel: channel, end: newNotifier(), returned: make(map[string]string),
		closes:  channel.NotifyClose(make(chan *amqp.Error, 1)),
		returns: channel.NotifyReturn(make(chan amqp.Return, mostInFlight)),
	}}
}

// listen records whether the broker takes messages on a connection. It ends with the connection.
func (p *publisher) listen(c *connection) {
	for b := range c.amqp.NotifyBlocked(make(chan amqp.Blocking, 8)) {
		reason := ""
		if b.Active {
			reason = cmp.Or(errtext.OneLine(b.Reason), "no reason given")
		}
		p.mu.Lock()
		if p.conn == c {
			p.blocked = reason
		}
		p.mu.Unlock()
		p.look()
	}
}

// publish sends copies until the channel ends, and returns why it did; nil if there is nothing to
// send any more.
func (p *publisher) publish(ctx context.Context, on *path) error {
	idle := time.NewTimer(publisherIdle)
	defer idle.Stop()
	for {
		t, blocked := p.next()
		switch {
		case blocked != nil:
			p.refuse(blocked)
		case t != nil:
			idle.Reset(publisherIdle)
			p.copy(ctx, on, t)
			continue
		}
		select {
		case <-p.wake:
		case said := <-on.closes:
			return p.lost(on, said)
		case <-on.loan.end.Done():
			return p.lost(on, nil)
		case <-idle.C:
			if p.quiet() {
				return nil
			}
			idle.Reset(publisherIdle)
		case <-ctx.Done():
			return nil
		}
	}
}

// next returns what to send next, nil if there is nothing or no room for more in flight. While the
// broker takes nothing it returns why.
func (p *publisher) next() (*transfer, *awayError) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.blocked != "" && len(p.waiting) > 0:
		return nil, p.blockedError()
	case len(p.waiting) == 0, p.inFlight >= mostInFlight, p.inFlight > 0 && (p.alone || p.waiting[0].alone):
		return nil, nil
	}
	at := slices.IndexFunc(p.waiting, func(t *transfer) bool { return p.to[t.to.Name] < mostToOne })
	if at < 0 || p.inFlight > 0 && p.waiting[at].alone {
		return nil, nil
	}
	t := p.waiting[at]
	p.alone = t.alone
	if at == 0 {
		p.waiting[0] = nil // the array outlives it
		p.waiting = p.waiting[1:]
	} else {
		p.waiting = slices.Delete(p.waiting, at, at+1)
	}
	return t, nil
}

// quiet reports whether there is nothing to send and nothing to be confirmed. While the broker
// takes nothing the connection stays: a new one would get a copy through, as each does that has not
// published yet, and nobody wants that of it now.
func (p *publisher) quiet() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting) == 0 && p.inFlight == 0 && p.blocked == ""
}

// lost returns why a channel ended. What the broker has said about the connection comes first.
func (p *publisher) lost(on *path, said *amqp.Error) error {
	cause := error(errChannelEnded)
	if said != nil {
		cause = said
	}
	if on.loan.amqp.IsClosed() {
		<-on.loan.end.Done() // bounded: the connection is ending
		cause = on.loan.end.Cause()
	}
	return &SessionError{Host: on.loan.host, Op: "lost", Err: cause}
}

// copy publishes the copy of one transfer. Another goroutine waits for the confirm.
func (p *publisher) copy(ctx context.Context, on *path, t *transfer) {
	if t.session.closed.Load() { // the broker delivers it again
		p.failed(t, errStopped)
		return
	}
	if t.delivery.Outcome() != Unsettled { // by hand, meanwhile
		t.over()
		return
	}
	if err := p.find(ctx, on, t.to); err != nil {
		p.failed(t, err)
		return
	}
	p.number++
	id := p.copies + strconv.FormatUint(p.number, 10)
	frameMax := on.loan.amqp.Config.FrameSize
	m, cut := t.message(id, frameMax)
	if size := headerFrame(&m); frameMax > 0 && size > frameMax {
		p.failed(t, &tooLargeError{size, frameMax})
		return
	}
	t.tellCut(cut)
	p.count(t, 1)
	confirmed, err := on.channel.PublishWithDeferredConfirm("", t.to.Name, true, false, m)
	if err != nil {
		p.count(t, -1)
		p.failed(t, on.loan.explain(err))
		return
	}
	p.begun.Go(func() { p.await(on, t, id, confirmed) })
}

func (p *publisher) count(t *transfer, more int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inFlight += more
	if p.to[t.to.Name] += more; p.to[t.to.Name] == 0 {
		delete(p.to, t.to.Name)
	}
}

// missing records that a destination may be gone, so that it is declared before the next copy for it.
// That is so also where the channel has ended: the driver ends the connection for a message that the
// broker returns and that it cannot read, and nobody is told of the return.
func (p *publisher) missing(d *retryqueue.Queue) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone[d.Name] = true
}

// find declares a destination that may be missing, once more.
func (p *publisher) find(ctx context.Context, on *path, d *retryqueue.Queue) error {
	p.mu.Lock()
	gone := p.gone[d.Name]
	p.mu.Unlock()
	if !gone {
		return nil
	}
	limit, cancel := context.WithTimeoutCause(ctx, p.from.config.setupTimeout, p.from.config.setupPassed())
	defer cancel()
	err := p.ask(limit, on, d)
	for refused := (*retryqueue.Refused)(nil); errors.As(err, &refused) && p.asking.Relax(refused); {
		err = p.ask(limit, on, d)
	}
	p.asking.Forget(d) // it may be mended
	if err == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.gone, d.Name)
	}
	return err
}

// ask declares a destination on a channel of its own, because a refusal ends the channel, and with
// it all copies in flight.
func (p *publisher) ask(ctx context.Context, on *path, d *retryqueue.Queue) error {
	lease := on.loan.lend()
	defer lease.giveBack()
	defer context.AfterFunc(ctx, func() { lease.giveUp(causeOf(ctx)) })()
	channel, err := on.loan.openChannel(ctx, lease.use, nil)
	if errors.Is(err, amqp.ErrChannelMax) {
		return p.asking.Declare(on.channel, d)
	}
	if err != nil {
		return on.loan.explain(err)
	}
	if err = p.asking.Declare(channel, d); err == nil {
		_ = channel.Close() // the end of ctx ends that, too
	}
	return err
}

// await waits for the confirm of a copy. A broker that says nothing for long, although it takes
// messages, has lost it: the channel is given up. It always ends, because the driver ends all waits
// at the end of the channel.
func (p *publisher) await(on *path, t *transfer, id string, confirmed *amqp.DeferredConfirmation) {
	patience := confirmWait(p.from.config.setupTimeout, t.unanswered)
	limit := time.NewTimer(patience)
	defer limit.Stop()
	for waiting := true; waiting; {
		select {
		case <-confirmed.Done():
			waiting = false
		case <-limit.C:
			if away := p.refusal(); away != nil {
				p.tellAway(t, away)
				limit.Reset(patience)
				continue
			}
			t.unanswered++
			if !on.givenUp.Swap(true) { // others may wait as long
				p.of.stats.givenUp.Add(1)
				on.lease.giveUp(errNoConfirm)
			}
		}
	}
	err := on.outcome(id, confirmed)
	p.count(t, -1)
	p.look()
	if err != nil {
		if !errors.Is(err, errNacked) {
			p.missing(t.to)
		}
		t.alone = closesChannel(err)
		t.failed(err)
		return
	}
	on.proved.Store(true)
	p.tellRecovered(t)
	t.confirmed()
}

// closesChannel reports whether the broker has closed the channel, or the connection, for something
// that was sent. Any copy that was in flight may be the reason, so each of them is sent alone the
// next time: then it shows which, and the others do not suffer again.
func closesChannel(err error) bool {
	var said *amqp.Error
	return errors.As(err, &said) && said.Server && said.Code != amqp.ConnectionForced
}

var errNoConfirm = errors.New("the broker has not confirmed a copy in time: can its queue store messages?")

// confirmWait returns how long to wait for a confirm after so many that have not come. A queue that
// is slow, or has no majority, may still store the copy, and each further one would be a duplicate:
// so the wait is long, and twice as long each time.
func confirmWait(setup time.Duration, unanswered int) time.Duration {
	return 4 * setup << min(unanswered, 4)
}

// refusal returns why the broker takes no messages now, nil while it does.
func (p *publisher) refusal() *awayError {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.blocked == "" {
		return nil
	}
	return p.blockedError()
}

// returnedError says that a copy could not be routed.
type returnedError struct{ reason string }

func (e *returnedError) Error() string {
	return "the broker has returned the copy, because the queue does not exist: " + e.reason
}

// outcome returns nil if the copy is safe, once there is an answer. RabbitMQ confirms what it
// returns, too.
func (on *path) outcome(id string, confirmed *amqp.DeferredConfirmation) error {
	on.mu.Lock()
	for read := true; read; {
		select {
		case r, open := <-on.returns:
			if read = open; open {
				of, _ := r.Headers[copyHeader].(string)
				on.returned[of] = fmt.Sprintf("%d %s", r.ReplyCode, r.ReplyText)
			}
		default:
			read = false
		}
	}
	reason, returned := on.returned[id]
	delete(on.returned, id)
	on.mu.Unlock()
	switch {
	case returned:
		return &returnedError{reason: reason}
	case confirmed.Acked():
		return nil
	case !on.channel.IsClosed():
		return errNacked
	}
	<-on.end.Done()
	return on.end.Cause()
}

// tellAway warns, once in a while, that copies cannot be sent, in the words of one of the sessions.
func (p *publisher) tellAway(t *transfer, away *awayError) {
	left, ok := p.slow.allow(tellAgain)
	if !ok {
		return
	}
	p.told.Store(true)
	t.session.reporter.warn("failed messages cannot be parked or delayed now, so they are held and tried again",
		append(t.session.attrs(), durationAttr("retry_in", away.left), suppressed(left), slog.String("cause", errtext.Brief(away.err)))...)
}

// tellRecovered ends what tellAway began.
func (p *publisher) tellRecovered(t *transfer) {
	if p.told.Load() && p.told.CompareAndSwap(true, false) {
		t.session.reporter.info("failed messages can be parked and delayed again", slog.String("queue", t.session.queue))
	}
}

// end ends the publisher with its Run. Nobody sends any more, and what is not confirmed by now
// comes again.
func (p *publisher) end() {
	p.mu.Lock()
	p.ended = true
	cancel, conn, waiting := p.cancel, p.conn, p.waiting
	p.waiting = nil
	p.mu.Unlock()
	if cancel == nil {
		return
	}
	for _, t := range waiting {
		p.failed(t, errStopped)
	}
	defer time.AfterFunc(publisherClose, func() { // a write may be stuck, and so may an earlier close
		if conn != nil {
			conn.socket.Kill(errStopped)
		}
		p.from.abort(errStopped)
	}).Stop()
	cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.begun.Wait()
	}()
	limit := time.NewTimer(publisherClose + teardownGrace)
	defer limit.Stop()
	select {
	case <-done:
		p.from.await(0) // the sockets are killed by now, and the close of a user's may hang
	case <-limit.C:
		p.of.abandoned()
	}
}
