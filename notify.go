package steadymq

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// notifier records why something ended. Any goroutine may notify it or read it. The first cause
// wins: neither what the driver reports later about the same end, nor what the teardown itself
// causes, hides it.
type notifier struct {
	once sync.Once
	done chan struct{} // closed once there is a cause
	err  error         // written before done is closed
}

func newNotifier() *notifier {
	return &notifier{done: make(chan struct{})}
}

// notify records cause, unless there is one already. It never blocks.
func (n *notifier) notify(cause error) {
	n.once.Do(func() {
		n.err = cause
		close(n.done)
	})
}

// Done returns a channel that is closed once there is a cause. It is nil if n is.
func (n *notifier) Done() <-chan struct{} {
	if n == nil {
		return nil
	}
	return n.done
}

// Cause returns the first cause, nil while there is none.
func (n *notifier) Cause() error {
	select {
	case <-n.done:
		return n.err
	default:
		return nil
	}
}

// drain reads a Notify channel of the driver to its end. The driver must never wait for us: an
// unread Notify channel once kept the socket of a dead connection open.
func drain[T any](c <-chan T) {
	for range c { // the values are known already, and only the end counts
	}
}

const (
	reportBacklog = 1024
	reportGrace   = 500 * time.Millisecond
)

// reporter calls hooks and writes the log, on a goroutine of its own, because neither a slow hook
// nor a blocked log pipe may delay healing. Every goroutine of a Run may give it events; only its
// own uses the journal, but for the failures of handlers.
//
// That goroutine exists only while there is something to report, or a timer of the journal runs.
// There is never more than one, for it begins and ends under mu: it ends where it finds nothing to
// do, and the next event begins another one, which finds the journal as the last one has left it.
type reporter struct {
	hooks   *Hooks
	journal *journal

	mu       sync.Mutex
	events   []func() // what to report, in order
	running  bool     // there is a goroutine, and the journal is its own
	stopping bool     // stop was called

	wake    chan struct{} // has a value once the goroutine has to look again; made with it
	done    chan struct{} // made by stop; closed when nothing is left to report
	muted   atomic.Bool   // Run has returned, so nothing of the user is called
	dropped *atomic.Uint64
	fault   *atomic.Pointer[faultError] // the first panic of a hook or of the log handler; the supervisor reads it
	own     atomic.Pointer[faultError]  // that, unless several reporters share one
	faulted func()                      // called at each; run sets it before there is an event
}

func newReporter(ctx context.Context, c *config, dropped *atomic.Uint64) *reporter {
	r := &reporter{
		hooks:   &c.hooks,
		journal: newJournal(ctx, c.logger),
		dropped: dropped,
	}
	r.fault = &r.own
	return r
}

// changed reports a change of state.
func (r *reporter) changed(c StateChange) {
	r.tell(func() {
		r.log(func() { r.journal.changed(c) })
		if r.hooks.StateChanged != nil {
			r.hook(func() { r.hooks.StateChanged(c) })
		}
	})
}

// warn logs one line, in its place among the changes of state. It never blocks.
func (r *reporter) warn(message string, attrs ...slog.Attr) {
	r.line(slog.LevelWarn, message, attrs)
}

// info is warn for what may be nobody's fault.
func (r *reporter) info(message string, attrs ...slog.Attr) {
	r.line(slog.LevelInfo, message, attrs)
}

func (r *reporter) line(level slog.Level, message string, attrs []slog.Attr) {
	record := newRecord(time.Now(), level, message, attrs...)
	r.tell(func() { r.log(func() { r.journal.write(record) }) })
}

// failed logs what a handler returned, unless that is left out. What is left out is not queued
// either, because it must not crowd out changes of state.
func (r *reporter) failed(f failure) {
	if record, due := r.journal.failed(f); due {
		r.tell(func() { r.log(func() { r.journal.writeFailure(record) }) })
	}
}

// unreadable reports a message that no handler can be given to the hook.
func (r *reporter) unreadable(e *MessageError) {
	if hook := r.hooks.Unreadable; hook != nil {
		r.tell(func() { r.hook(func() { hook(e) }) })
	}
}

// settled reports an outcome to the hook, on the goroutine that settles.
func (r *reporter) settled(d *Delivery, o Outcome) {
	r.hook(func() { r.hooks.Settled(d, o) })
}

// released reports held messages that have been settled to the hook. It is called by the session's
// goroutine, which a hook must not delay, so it queues them.
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

// tell queues an event. It never blocks: if the queue is full the event is dropped and counted.
func (r *reporter) tell(what func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.events) >= reportBacklog {
		r.dropped.Add(1)
		return
	}
	r.events = append(r.events, what)
	r.attend()
}

// attend makes the goroutine look again, or begins one. It is called with mu held.
func (r *reporter) attend() {
	if !r.running {
		r.running, r.wake = true, make(chan struct{}, 1)
		go r.run()
		return
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *reporter) run() {
	ended := false
	defer func() {
		if !ended { // a hook called runtime.Goexit
			go r.run()
		}
	}()
	for {
		what, more := r.next()
		if !more {
			ended = true
			return
		}
		what()
	}
}

// next returns what to do next. It returns false if there is nothing: then the goroutine ends.
func (r *reporter) next() (what func(), more bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case len(r.events) > 0:
		what = r.events[0]
		r.events[0] = nil // the array outlives the event
		if r.events = r.events[1:]; len(r.events) == 0 {
			r.events = nil
		}
		return what, true
	case r.stopping: // running stays true, so no other one follows
		r.journal.stop()
		close(r.done)
	case r.journal.waiting():
		return r.await, true
	default:
		r.running, r.wake = false, nil
	}
	return nil, false
}

// await waits for a timer of the journal, or for the next event.
func (r *reporter) await() {
	select {
	case <-r.wake:
	case now := <-r.journal.stableTimer.rings():
		r.log(func() { r.journal.stable(now) })
	case <-r.journal.summaryTimer.rings():
		r.log(r.journal.summarize)
	}
}

// stop reports what is queued and returns, at the latest after the grace that a hook gets that does
// not return. Nothing is reported after that.
func (r *reporter) stop() {
	r.mu.Lock()
	r.stopping, r.done = true, make(chan struct{})
	r.attend()
	r.mu.Unlock()
	select {
	case <-r.done:
	case <-time.After(reportGrace):
		r.mu.Lock()
		r.dropped.Add(uint64(len(r.events)))
		r.mu.Unlock()
	}
	r.muted.Store(true)
}

// hook calls a hook, unless one has panicked before.
func (r *reporter) hook(f func()) {
	if r.fault.Load() == nil {
		r.call(f, "WithHooks", "a hook")
	}
}

// log calls the log handler. It does so even after a panic: how the Run ends is worth a line.
func (r *reporter) log(f func()) { r.call(f, "WithLogger", "the log handler") }

// call calls a function of the user, unless Run has returned. It turns a panic, and the end of the
// goroutine, into a fault, which ends Run.
func (r *reporter) call(f func(), option, what string) {
	if r.muted.Load() {
		return
	}
	returned := false
	defer func() {
		if !returned {
			r.fault.CompareAndSwap(nil, &faultError{option, what, panicked(recover())})
			r.faulted()
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
