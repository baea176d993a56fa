package steadymq

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// notifier keeps why something ended. The first cause wins: what the driver
// reports later about the same end, or what the teardown itself causes, does not
// hide it.
type notifier struct {
	once  sync.Once
	ended chan struct{} // closed once there is a cause
	err   error         // written before ended is closed
}

func newNotifier() *notifier {
	return &notifier{ended: make(chan struct{})}
}

// notify ends it with cause, unless it has ended already. It never blocks.
func (n *notifier) notify(cause error) {
	n.once.Do(func() {
		n.err = cause
		close(n.ended)
	})
}

// cause returns the first cause, nil while there is none.
func (n *notifier) cause() error {
	select {
	case <-n.ended:
		return n.err
	default:
		return nil
	}
}

// drain reads a Notify chan of the driver to its end. Nothing the driver sends
// may ever wait for us: an unread Notify chan once kept a dead connection's
// socket open.
func drain[T any](c <-chan T) {
	for range c { // the values are known already, only the end counts
	}
}

// State is what a Consumer is doing.
type State int32

const (
	// Idle: Run has not been called yet.
	Idle State = iota
	// Connecting: dialling, logging in, or setting up a session.
	Connecting
	// Consuming: the broker has confirmed the consumer (consume-ok).
	Consuming
	// Backoff: waiting before the next try.
	Backoff
	// Draining: stopping; running handlers finish.
	Draining
	// Stopped: Run has returned, or is about to.
	Stopped
)

// String gives the state in lower case.
func (s State) String() string {
	switch s {
	case Idle:
		return "idle"
	case Connecting:
		return "connecting"
	case Consuming:
		return "consuming"
	case Backoff:
		return "backoff"
	case Draining:
		return "draining"
	case Stopped:
		return "stopped"
	}
	return "unknown"
}

// Hooks are told what happens. Any of them may be nil. A hook must not call Run, and
// none is called any more once Run has returned.
//
// A panic in a hook is a fault of the program, not of the path to the broker: it
// is recovered, no hook is called any more, Run drains and returns an *OptionError for
// WithHooks with the *PanicError inside, and so does every later Run of that Consumer.
// A panic in the handler of WithLogger ends Run likewise.
type Hooks struct {
	// StateChanged is called for every change of state, in order and never
	// concurrently, on a goroutine of its own: a slow hook delays no
	// recovery. If it falls 1,024 changes behind, further ones are dropped
	// and counted in Stats.EventsDropped. The last call, with To == Stopped,
	// is made before Run returns; none comes after.
	StateChanged func(StateChange)

	// HandlerFailed is called when a handler returned an error or panicked
	// (*PanicError), but not for an error after its session was lost or the drain
	// limit had passed. It is called on the goroutine of its worker, concurrently
	// with other workers, after the outcome was decided. It delays that worker.
	HandlerFailed func(d *Delivery, err error)

	// Unreadable is called for every delivery of a message that no handler can be
	// given, because its headers cannot be read or its body is too large. It is called
	// where StateChanged is, with the same limits. See MessageError for what becomes of
	// the message.
	Unreadable func(*MessageError)

	// Settled is called once for every delivery given to a handler, when its
	// outcome is decided: Acked, Requeued and Discarded when it is sent, by the
	// handler's error or by hand; Stale when it came too late and was not sent. A
	// held message (WithRequeueDelay, RequeueAfter) is told when it goes back, or as
	// Stale if its session ended first. d is the delivery that the handler got, also
	// where a copy of it was settled.
	//
	// On a stream Acked and Discarded tell that the handler is done with the message,
	// not yet that it was sent: acks go in the order of the stream, so the ack waits for
	// the messages before it, and if the session is lost meanwhile the message comes
	// again. Requeued tells of a try in place that follows, and nothing is sent;
	// where the consumer stops first, a later one starts at that message.
	//
	// It is called on the goroutine that settles, which it delays, concurrently
	// with others; for messages that were held when their session ended on that of
	// StateChanged, and with its limit. A delivery whose handler is still running
	// when Run returns is not told.
	Settled func(d *Delivery, o Outcome)
}

// StateChange is one change of a Consumer's state.
type StateChange struct {
	// Time is when it happened.
	Time time.Time
	// From and To are the states.
	From, To State
	// Queue is the queue consumed from: the one given to New until a session
	// knows better.
	Queue string
	// ConsumerTag is the tag of the current session's subscription, which the
	// broker's management page lists; "" where there is no session.
	ConsumerTag string
	// Session is the number of the current or last session, 0 before the first.
	Session uint64
	// Host is the broker's address, "" where none is involved.
	Host string
	// Attempt counts the failures in a row, 0 while all is well. A row ends with a
	// session that proves itself: by a settlement and 10 s, or by 70 s.
	Attempt int
	// RetryIn is the wait before the next try, in Backoff only.
	RetryIn time.Duration
	// Cause is why: a *SessionError in Backoff, why Run gives up in Draining (nil if its context
	// has ended), Run's error in Stopped.
	Cause error
}

const (
	reportBacklog = 1024
	reportGrace   = 500 * time.Millisecond
)

// reporter tells hooks and log, on one goroutine of its own: neither a slow hook
// nor a blocked log pipe may delay healing.
type reporter struct {
	hooks   Hooks
	journal *journal

	events  chan func() // what to tell, in order
	quit    chan struct{}
	done    chan struct{}
	muted   atomic.Bool
	dropped *atomic.Uint64
	broken  *notifier // ended by the first panic of a hook or of the log handler
}

func newReporter(ctx context.Context, c *config, dropped *atomic.Uint64) *reporter {
	r := &reporter{
		hooks:   c.hooks,
		journal: newJournal(ctx, c.logger),
		events:  make(chan func(), reportBacklog),
		quit:    make(chan struct{}),
		done:    make(chan struct{}),
		dropped: dropped,
		broken:  newNotifier(),
	}
	go r.run()
	return r
}

// changed tells a change of state.
func (r *reporter) changed(c StateChange) {
	r.tell(func() {
		r.log(func() { r.journal.changed(c) })
		if r.hooks.StateChanged != nil {
			r.hook(func() { r.hooks.StateChanged(c) })
		}
	})
}

// warn logs one line in its place among the changes of state. It never blocks.
func (r *reporter) warn(message string, attrs ...slog.Attr) {
	r.line(slog.LevelWarn, message, attrs)
}

// info is warn for what need not be anybody's fault.
func (r *reporter) info(message string, attrs ...slog.Attr) {
	r.line(slog.LevelInfo, message, attrs)
}

func (r *reporter) line(level slog.Level, message string, attrs []slog.Attr) {
	record := newRecord(time.Now(), level, message, attrs...)
	r.tell(func() { r.log(func() { r.journal.write(record) }) })
}

// failed logs what a handler returned, unless it is left out. What is left out is
// not queued either: it must not crowd out changes of state.
func (r *reporter) failed(f failure) {
	if record, due := r.journal.failed(f); due {
		r.tell(func() { r.log(func() { r.journal.writeFailure(record) }) })
	}
}

// unreadable tells the hook of a message that no handler can be given.
func (r *reporter) unreadable(e *MessageError) {
	if hook := r.hooks.Unreadable; hook != nil {
		r.tell(func() { r.hook(func() { hook(e) }) })
	}
}

// settled tells the hook of an outcome, on the goroutine that settles.
func (r *reporter) settled(d *Delivery, o Outcome) {
	r.hook(func() { r.hooks.Settled(d, o) })
}

// released tells the hook of held messages that have been settled, in the place of
// the session's goroutine, which a hook must not delay.
func (r *reporter) released(held []*Delivery) {
	if r.hooks.Settled == nil || len(held) == 0 {
		return
	}
	r.tell(func() {
		for _, d := range held {
			r.settled(d, d.Outcome())
		}
	})
}

// tell queues what is to be told and never blocks.
func (r *reporter) tell(what func()) {
	select {
	case r.events <- what:
	default:
		r.dropped.Add(1)
	}
}

func (r *reporter) run() {
	ended := false
	defer func() {
		if !ended { // a hook called runtime.Goexit
			go r.run()
			return
		}
		r.journal.stop()
		close(r.done)
	}()
	for {
		select {
		case what := <-r.events:
			what()
		case now := <-r.journal.settle.C:
			r.log(func() { r.journal.settled(now) })
		case <-r.journal.quiet.C:
			r.log(r.journal.sum)
		case <-r.quit:
			for len(r.events) > 0 {
				(<-r.events)()
			}
			ended = true
			return
		}
	}
}

// stop delivers what is queued and returns, at the latest after the grace a
// hook that never returns is given; nothing is told after that.
func (r *reporter) stop() {
	close(r.quit)
	select {
	case <-r.done:
	case <-time.After(reportGrace):
		r.dropped.Add(uint64(len(r.events)))
	}
	r.muted.Store(true)
}

// hook calls a hook, unless one has panicked before.
func (r *reporter) hook(f func()) {
	if r.broken.cause() == nil {
		r.call(f, "WithHooks", "a hook")
	}
}

// log calls the log handler. It goes on after a panic: how the Run ends is worth a line.
func (r *reporter) log(f func()) { r.call(f, "WithLogger", "the log handler") }

// call calls a function of the user, unless Run has returned. It turns a panic, and the
// end of the goroutine, into the end of Run.
func (r *reporter) call(f func(), option, what string) {
	if r.muted.Load() {
		return
	}
	returned := false
	defer func() {
		if !returned {
			r.broken.notify(&brokenError{option, what, panicked(recover())})
		}
	}()
	f()
	returned = true
}

// brokenError is the OptionError of a hook or a log handler that panicked.
type brokenError struct {
	option, what string
	panicked     *PanicError
}

func (e *brokenError) Error() string {
	return e.refused(": " + e.panicked.Error()).Error()
}

func (e *brokenError) Unwrap() []error { return []error{e.refused(""), e.panicked} }

func (e *brokenError) refused(why string) *OptionError {
	return &OptionError{e.option, e.what + " panicked, mend it and make a new Consumer" + why}
}
