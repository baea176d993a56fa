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
	once sync.Once
	done chan struct{} // closed once there is a cause
	err  error         // written before ended is closed
}

func newNotifier() *notifier {
	return &notifier{done: make(chan struct{})}
}

// notify ends it with cause, unless it has ended already. It never blocks.
func (n *notifier) notify(cause error) {
	n.once.Do(func() {
		n.err = cause
		close(n.done)
	})
}

// Done returns what is closed once there is a cause.
func (n *notifier) Done() <-chan struct{} { return n.done }

// Cause returns the first cause, nil while there is none.
func (n *notifier) Cause() error {
	select {
	case <-n.done:
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

const (
	reportBacklog = 1024
	reportGrace   = 500 * time.Millisecond
)

// reporter tells hooks and log, on one goroutine of its own: neither a slow hook
// nor a blocked log pipe may delay healing.
type reporter struct {
	hooks   Hooks
	journal *journal

	events   chan func() // what to tell, in order
	stopping chan struct{}
	done     chan struct{}
	muted    atomic.Bool
	dropped  *atomic.Uint64
	fault    *notifier // ended by the first panic of a hook or of the log handler
}

func newReporter(ctx context.Context, c *config, dropped *atomic.Uint64) *reporter {
	r := &reporter{
		hooks:    c.hooks,
		journal:  newJournal(ctx, c.logger),
		events:   make(chan func(), reportBacklog),
		stopping: make(chan struct{}),
		done:     make(chan struct{}),
		dropped:  dropped,
		fault:    newNotifier(),
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
		case <-r.stopping:
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
	close(r.stopping)
	select {
	case <-r.done:
	case <-time.After(reportGrace):
		r.dropped.Add(uint64(len(r.events)))
	}
	r.muted.Store(true)
}

// hook calls a hook, unless one has panicked before.
func (r *reporter) hook(f func()) {
	if r.fault.Cause() == nil {
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
			r.fault.notify(&faultError{option, what, panicked(recover())})
		}
	}()
	f()
	returned = true
}

// faultError is the OptionError of a hook or a log handler that panicked.
type faultError struct {
	option, what string
	panicked     *PanicError
}

func (e *faultError) Error() string {
	return e.refused(": " + e.panicked.Error()).Error()
}

func (e *faultError) Unwrap() []error { return []error{e.refused(""), e.panicked} }

func (e *faultError) refused(why string) *OptionError {
	return &OptionError{e.option, e.what + " panicked, mend it and make a new Consumer" + why}
}
