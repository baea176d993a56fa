package steadymq

import (
	"context"
	"log/slog"
	"runtime/debug"
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
	for range c { //nolint:revive // the values are known already, only the end counts
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

// Hooks are told what happens. Any of them may be nil. A hook must not call Run.
//
// A panic in a hook is a fault of the program, not of the path to the broker: it
// is recovered, Run drains and returns an *OptionError for WithHooks with the
// *PanicError inside, and so does every later Run of that Consumer.
type Hooks struct {
	// StateChanged is called for every change of state, in order and never
	// concurrently, on a goroutine of its own: a slow hook delays no
	// recovery. If it falls 1,024 changes behind, further ones are dropped
	// and counted in Stats.EventsDropped. The last call, with To == Stopped,
	// is made before Run returns; none comes after.
	StateChanged func(StateChange)

	// HandlerFailed is called when a handler returned an error or panicked
	// (*PanicError), on the goroutine of its worker, concurrently with other
	// workers, after the outcome was decided. It delays that worker.
	HandlerFailed func(d *Delivery, err error)
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
	// Cause is why: a *SessionError in Backoff, Run's error in Stopped.
	Cause error
}

const (
	reportBacklog = 1024
	reportGrace   = 500 * time.Millisecond
)

// reporter tells hook and log, on one goroutine of its own: neither a slow hook
// nor a blocked log pipe may delay healing.
type reporter struct {
	ctx    context.Context // for the values a slog.Handler may look for
	logger *slog.Logger
	hook   func(StateChange)

	events  chan report
	quit    chan struct{}
	done    chan struct{}
	muted   atomic.Bool
	dropped *atomic.Uint64
	broken  *notifier // ended by the first panic of a hook
}

// report is a change of state or, with one of the others set, a handler's panic or
// a warning.
type report struct {
	change   StateChange
	panicked *PanicError
	warning  *slog.Record
}

func newReporter(ctx context.Context, c *config, dropped *atomic.Uint64) *reporter {
	r := &reporter{
		ctx:     context.WithoutCancel(ctx),
		logger:  c.logger,
		hook:    c.hooks.StateChanged,
		events:  make(chan report, reportBacklog),
		quit:    make(chan struct{}),
		done:    make(chan struct{}),
		dropped: dropped,
		broken:  newNotifier(),
	}
	go r.run()
	return r
}

// warn logs one line in its place among the changes of state. It never blocks.
func (r *reporter) warn(message string, attrs ...slog.Attr) {
	record := slog.NewRecord(time.Now(), slog.LevelWarn, "steadymq: "+message, 0)
	record.AddAttrs(attrs...)
	r.tell(report{warning: &record})
}

// tell queues e and never blocks.
func (r *reporter) tell(e report) {
	select {
	case r.events <- e:
	default:
		r.dropped.Add(1)
	}
}

func (r *reporter) run() {
	defer close(r.done)
	for {
		select {
		case e := <-r.events:
			r.deliver(e)
		case <-r.quit:
			for len(r.events) > 0 {
				r.deliver(<-r.events)
			}
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

func (r *reporter) deliver(e report) {
	if r.muted.Load() {
		return
	}
	defer r.guard()
	r.log(e)
	if e.panicked == nil && e.warning == nil && r.hook != nil && r.broken.cause() == nil {
		r.hook(e.change)
	}
}

// guard turns a panic of a hook (or of the logger) into the end of Run.
func (r *reporter) guard() {
	if v := recover(); v != nil {
		r.broken.notify(&hookError{PanicError{Value: v, Stack: debug.Stack()}})
	}
}

// hookError is the OptionError of a hook that panicked.
type hookError struct{ panicked PanicError }

func (e *hookError) Error() string {
	return (&OptionError{"WithHooks", "a hook panicked, mend it and make a new Consumer: " + e.panicked.Error()}).Error()
}

func (e *hookError) Unwrap() []error {
	return []error{&OptionError{"WithHooks", "a hook panicked"}, &e.panicked}
}

// log writes one line for a change of state, none for a step that is only on
// the way to the next one.
func (r *reporter) log(e report) {
	if e.panicked != nil {
		r.logger.LogAttrs(r.ctx, slog.LevelError, "steadymq: handler panicked",
			slog.Any("panic", e.panicked.Error()), slog.String("stack", string(e.panicked.Stack)))
		return
	}
	if e.warning != nil {
		if r.logger.Enabled(r.ctx, e.warning.Level) {
			_ = r.logger.Handler().Handle(r.ctx, *e.warning)
		}
		return
	}
	c := e.change
	level := slog.LevelInfo
	switch {
	case c.To == Connecting && c.From == Backoff:
		level = slog.LevelDebug
	case c.To == Backoff, c.To == Stopped && c.Cause != nil:
		level = slog.LevelWarn
	}
	if !r.logger.Enabled(r.ctx, level) {
		return
	}
	record := slog.NewRecord(c.Time, level, "steadymq: "+c.To.String(), 0)
	record.AddAttrs(slog.String("queue", c.Queue))
	if c.ConsumerTag != "" {
		record.AddAttrs(slog.String("consumer", c.ConsumerTag))
	}
	record.AddAttrs(slog.Uint64("session", c.Session))
	if c.Host != "" {
		record.AddAttrs(slog.String("host", c.Host))
	}
	if c.Attempt > 0 {
		record.AddAttrs(slog.Int("attempt", c.Attempt))
	}
	if c.To == Backoff {
		record.AddAttrs(slog.Duration("retry_in", c.RetryIn))
	}
	if c.Cause != nil {
		record.AddAttrs(slog.String("cause", c.Cause.Error()))
	}
	_ = r.logger.Handler().Handle(r.ctx, record)
}
