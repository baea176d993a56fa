package steadymq

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/steadymq/steadymq/internal/errtext"
)

// What keeps workers from starting handlers: Pause, WithBreaker and WithRate. A delivery passes the
// valve when a worker has taken it; until then it stays unsettled and takes up the prefetch. What
// the session and the connection do meanwhile is in consumer.go.

// Breaker stops handing out messages while handlers only fail, see [WithBreaker].
type Breaker struct {
	// Failures is how many handlers in a row have to fail until the breaker opens, 1 to 1,000,000.
	Failures int
	// Wait is how long it stays open before one message is let through, 1 ms to 24 h. Each wait is
	// drawn from half to one and a half of that, and doubles with every message let through that
	// fails, up to the longer of Wait and a minute.
	Wait time.Duration
	// Counts chooses the errors that count as failures of what handlers depend on; one for which it
	// returns false counts neither as a failure nor as a success. It is called for every error but
	// [Later] that a handler, with its middleware, has returned, and for panics ([*PanicError]), on a
	// goroutine of its own, by several workers at once, and delays that worker. One that panics, or
	// does not return within the limit of [WithSetupTimeout], counts as true.
	//
	// nil: all errors but those that ask for [Discard] or [Park] and a [*DecodeError], for these are
	// about their message.
	Counts func(error) bool
}

// BreakerError is why a breaker has opened: the [StateChange].Cause of [Paused].
type BreakerError struct {
	// Failures is how many handlers in a row have failed.
	Failures int
	// Wait is the time until one message is let through for the first time.
	Wait time.Duration
	// Err is what the last of them returned.
	Err error
}

// Error tells number, wait and the last failure.
func (e *BreakerError) Error() string {
	return errtext.OneLine(fmt.Sprintf("steadymq: breaker open for %v, handlers in a row that failed: %d, the last: %v", e.Wait.Round(time.Millisecond), e.Failures, e.Err))
}

// Unwrap returns the last failure.
func (e *BreakerError) Unwrap() error { return e.Err }

const (
	maxStarts = 1_000_000 // of Breaker.Failures and of WithRate

	// steadyWait is how long a breaker with a short wait waits at most.
	steadyWait = time.Minute
	// briefHold is how long what was prefetched is held during a pause, and while a breaker with a
	// long wait is open.
	briefHold = time.Minute
)

func (c *config) checkBreaker(b *Breaker) {
	if b.Failures < 1 || b.Failures > maxStarts {
		c.refuse("WithBreaker", "Failures must be between 1 and %d, got %d", maxStarts, b.Failures)
	}
	if b.Wait < minDuration || b.Wait > maxDuration {
		c.refuse("WithBreaker", "Wait must be between %v and %v, got %v (a bare number counts nanoseconds: write 30*time.Second)", minDuration, maxDuration, b.Wait)
	}
}

// rate is what WithRate was given.
type rate struct {
	n   int
	per time.Duration
}

func (c *config) checkRateItself(r *rate) {
	if r.n < 1 || r.n > maxStarts {
		c.refuse("WithRate", "n must be between 1 and %d, got %d", maxStarts, r.n)
	}
	if r.per < minDuration || r.per > maxDuration {
		c.refuse("WithRate", "per must be between %v and %v, got %v (a bare number counts nanoseconds: write time.Second)", minDuration, maxDuration, r.per)
	}
}

// checkRate checks the rate with the broker's patience: what is prefetched has to start before the
// consumer timeout. Unless the prefetch was given it is as small as that needs.
func (c *config) checkRate() {
	r := c.rate
	if r == nil || r.n < 1 || r.per < minDuration {
		return
	}
	half := c.consumerTimeout() / 2
	if each := r.per / time.Duration(r.n); each > half {
		c.refuse("WithRate", "one message in %v is slower than half of the broker's consumer timeout (%v), after which it takes back what waits: raise the rate, or the timeout of the queue (x-consumer-timeout)", each, 2*half)
		return
	}
	if !c.set.prefetch && !c.batches {
		inTime := int(min(float64(c.prefetch), float64(half/2)/float64(r.per)*float64(r.n)))
		c.prefetch = max(inTime, c.concurrency, 1)
	}
}

// valve lets deliveries through to handlers, or not. It belongs to a Consumer, over all its Runs.
// Workers pass it, the supervisor looks at it, and any goroutine may pause it.
type valve struct {
	flags   atomic.Uint32 // shutFlags and flagRate; 0 lets everything through
	timeout time.Duration // of the broker for what is unsettled
	setUp   time.Duration // limit of Counts
	opened  atomic.Uint64 // how often the breaker has opened
	faulty  atomic.Bool   // a fault of Counts was told

	mu      sync.Mutex // guards all that follows
	paused  bool
	breaker *breaker      // nil without WithBreaker
	rate    *bucket       // nil without WithRate
	changed chan struct{} // closed at the next change; nil if nobody waits for that
	openAt  time.Time     // when it was last shut no more
}

const (
	flagPaused uint32 = 1 << iota
	flagBreaker
	flagRate

	shutFlags = flagPaused | flagBreaker
)

func newValve(c *config) *valve {
	v := &valve{timeout: c.consumerTimeout(), setUp: c.setupTimeout}
	if c.breaker != nil {
		v.breaker = &breaker{Breaker: *c.breaker}
	}
	if r := c.rate; r != nil {
		v.rate = newBucket(r.n, r.per)
		v.flags.Store(flagRate)
	}
	return v
}

// begin forgets a message of an earlier Run that was let through: its handler may never return.
func (v *valve) begin() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.breaker != nil {
		v.breaker.trial = nil
	}
}

// pass waits until a handler may start with d. It returns false if stop or end, that of the
// session, is closed first.
func (v *valve) pass(stop, end <-chan struct{}, d *Delivery) bool {
	return v.flags.Load() == 0 || v.await(stop, end, d)
}

func (v *valve) await(stop, end <-chan struct{}, d *Delivery) bool {
	if v.rate != nil {
		defer v.rate.waiting.Add(-1)
		v.rate.waiting.Add(1)
		select {
		case v.rate.turn <- struct{}{}: // one waits for the next token, the others for their turn
			defer func() { <-v.rate.turn }()
		case <-stop:
			return false
		case <-end:
			return false
		}
	}
	for {
		changed, in := v.admit(d, time.Now())
		if changed == nil {
			return true
		}
		var token <-chan time.Time
		if in > 0 {
			token = time.After(in)
		}
		select {
		case <-token:
		case <-changed:
		case <-stop:
			return false
		case <-end:
			return false
		}
	}
}

// admit lets d through, or returns what to wait for: a change and, if it is only the rate, how long.
func (v *valve) admit(d *Delivery, now time.Time) (changed <-chan struct{}, in time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.paused || v.breaker != nil && !v.breaker.lets(now) {
		return v.change(), 0
	}
	if v.rate != nil {
		if in = v.rate.take(now); in > 0 {
			return v.change(), in
		}
	}
	if v.breaker != nil && v.breaker.open != nil {
		v.breaker.trial = d
	}
	return nil, 0
}

// entered takes back what pass has let through, if the session has taken it no more.
func (v *valve) entered(d *Delivery, ok bool) bool {
	if !ok && v.breaker != nil {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.tried(d)
	}
	return ok
}

// tried lets another message through in place of d. It is called with mu held.
func (v *valve) tried(d *Delivery) {
	if v.breaker.trial == d {
		v.breaker.trial = nil
		v.announce()
	}
}

// change returns a channel that is closed at the next change. It is called with mu held.
func (v *valve) change() <-chan struct{} {
	if v.changed == nil {
		v.changed = make(chan struct{})
	}
	return v.changed
}

// announce tells all who wait that something has changed. It is called with mu held.
func (v *valve) announce() {
	was, is := v.flags.Load(), v.flags.Load()&flagRate
	if v.paused {
		is |= flagPaused
	}
	if v.breaker != nil && v.breaker.open != nil {
		is |= flagBreaker
	}
	if was&shutFlags != 0 && is&shutFlags == 0 {
		v.openAt = time.Now()
	}
	v.flags.Store(is)
	if v.changed != nil {
		close(v.changed)
		v.changed = nil
	}
}

// pause pauses or resumes.
func (v *valve) pause(on bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.paused != on {
		v.paused = on
		v.announce()
	}
}

// shut reports whether the valve is shut, but for the message that an open breaker lets through.
func (v *valve) shut() bool { return v.flags.Load()&shutFlags != 0 }

// withholds reports whether no handler may start with d any more, which was let through.
func (v *valve) withholds(d *Delivery) bool {
	if !v.shut() {
		return false
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.paused || v.breaker != nil && v.breaker.open != nil && v.breaker.trial != d
}

// shutWithin reports whether the valve is shut, or was within that time.
func (v *valve) shutWithin(d time.Duration) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.shut() || !v.openAt.IsZero() && time.Since(v.openAt) < d
}

// broken reports whether the breaker is open.
func (v *valve) broken() bool { return v.flags.Load()&flagBreaker != 0 }

// throttled returns how many deliveries wait for the rate.
func (v *valve) throttled() int {
	if v.rate == nil {
		return 0
	}
	return int(v.rate.waiting.Load())
}

// standing is what the supervisor has to know of a valve.
type standing struct {
	paused bool
	open   *BreakerError // nil unless the breaker is open
	next   time.Time     // with open: no message is let through before
	long   bool          // with open: the breaker waits for so long that it is no use to hold messages
}

func (s standing) shut() bool { return s.paused || s.open != nil }

// wants reports whether there should be a session: one that cannot hand out what it is sent would
// only keep it from others.
func (s standing) wants(now time.Time) bool {
	return !s.paused && (s.open == nil || !now.Before(s.next))
}

// reason returns what a change of state to Paused tells as its cause.
func (s standing) reason() *BreakerError {
	if s.paused {
		return nil
	}
	return s.open
}

// look returns how the valve stands, and a channel that is closed when that changes.
func (v *valve) look() (standing, <-chan struct{}) {
	v.mu.Lock()
	defer v.mu.Unlock()
	is := standing{paused: v.paused}
	if b := v.breaker; b != nil {
		is.open, is.next, is.long = b.open, b.next, b.Wait > steadyWait
	}
	return is, v.change()
}

// shutTime is how long the valve has been shut during one session. What the broker has sent ahead
// must not wait here until the consumer timeout, so all of it together has a limit. Only the
// supervisor uses it.
type shutTime struct {
	changed <-chan struct{}  // closed when the valve stands otherwise
	over    <-chan time.Time // what is held has to go back; nil while the valve is open
	until   time.Time        // when that is
	since   time.Time        // since when the valve is shut; zero while it is open
	spent   time.Duration    // how long it was shut before that
}

// look takes note of how the valve stands now.
func (t *shutTime) look(v *valve, now time.Time) standing {
	var is standing
	is, t.changed = v.look()
	t.spent, t.over = t.spent+t.lasts(now), nil
	if !is.shut() {
		t.since, t.until = time.Time{}, time.Time{}
		return is
	}
	left := v.timeout/2 - t.spent
	if is.paused || is.long {
		left = min(left, briefHold)
	}
	if until := now.Add(left); t.until.IsZero() || until.Before(t.until) {
		t.until = until
	}
	t.since, t.over = now, time.After(t.until.Sub(now))
	return is
}

func (t *shutTime) lasts(now time.Time) time.Duration {
	if t.since.IsZero() {
		return 0
	}
	return now.Sub(t.since)
}

// usedUp reports whether nothing may be held any longer.
func (t *shutTime) usedUp(v *valve, now time.Time) bool { return t.spent+t.lasts(now) >= v.timeout/2 }

// breaker is a Breaker at work. The valve's mutex guards it.
type breaker struct {
	Breaker
	row   int           // failures in a row
	open  *BreakerError // nil while it is closed
	tries int           // messages let through in a row that failed
	next  time.Time     // when one is let through
	trial *Delivery     // it, until its handler has returned
	timer *time.Timer   // tells those who wait that next has come
}

// lets reports whether a delivery may pass.
func (b *breaker) lets(now time.Time) bool {
	return b.open == nil || b.trial == nil && !now.Before(b.next)
}

// wait draws the wait before the next message is let through.
func (b *breaker) wait() time.Duration {
	longest, d := max(b.Wait, steadyWait), b.Wait
	for range b.tries {
		if d = min(2*d, longest); d == longest {
			break
		}
	}
	return min(d/2+rand.N(d), longest)
}

// witness is the session of a delivery whose handler has returned.
type witness interface {
	cutOff(err error) bool
	abandoned()
	warn(message string, attrs ...slog.Attr)
}

// returned takes note of what the handler of d has returned.
func (v *valve) returned(ctx context.Context, d *Delivery, err error, by witness) {
	if v.breaker == nil {
		return
	}
	counts := err != nil && !isLater(err) && !by.cutOff(err) && v.counts(ctx, err, by)
	v.mu.Lock()
	defer v.mu.Unlock()
	b := v.breaker
	switch {
	case b.open != nil && b.trial != d: // it began before the breaker opened
	case counts:
		v.failed(err)
	case err != nil: // it says nothing, so another one has to
		v.tried(d)
	default:
		b.row = 0
		v.succeeded()
	}
}

// failed opens the breaker, or keeps it open, if it is time. It is called with mu held.
func (v *valve) failed(err error) {
	b := v.breaker
	b.row++
	switch {
	case b.open != nil:
		b.tries++
	case b.row < b.Failures:
		return
	}
	in := b.wait()
	if b.open == nil {
		b.open = &BreakerError{Failures: b.row, Wait: in, Err: err}
		v.opened.Add(1)
	}
	b.trial, b.next = nil, time.Now().Add(in)
	b.timer = time.AfterFunc(in, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.announce()
	})
	v.announce()
}

// succeeded closes the breaker. It is called with mu held.
func (v *valve) succeeded() {
	b := v.breaker
	if b.open == nil {
		return
	}
	b.timer.Stop()
	b.open, b.trial, b.tries = nil, nil, 0
	v.announce()
}

// counts reports whether err is a failure of what handlers depend on.
func (v *valve) counts(ctx context.Context, err error, by witness) bool {
	if v.breaker.Counts == nil {
		return countsAsFailure(err)
	}
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), v.setUp, errNoAnswer)
	defer cancel()
	counts, fault := userCall[bool]{
		option: "WithBreaker",
		f:      func(context.Context) (bool, error) { return v.breaker.Counts(err), nil },
		left:   by.abandoned,
	}.run(ctx)
	if fault != nil && v.faulty.CompareAndSwap(false, true) {
		by.warn("the function of WithBreaker that says which errors count has failed, so this one counts, as will all for which it fails",
			slog.String("error", errtext.Brief(fault)))
	}
	return counts || fault != nil
}

// countsAsFailure is Breaker.Counts where none is given.
func countsAsFailure(err error) bool {
	if o, explicit := OutcomeOf(err); explicit && o != Requeued {
		return false
	}
	return !errors.As(err, new(*DecodeError))
}

// bucket lets n deliveries through in each per, and a tenth of n at once after a time without. The
// valve's mutex guards the fields that change.
type bucket struct {
	n, burst int64
	per      time.Duration
	turn     chan struct{} // has a value while somebody waits for a token
	waiting  atomic.Int64  // those who wait, for a token or for their turn

	// Everything that was let through has had its share of the time at since and count shares more.
	since time.Time
	count int64 // below n
}

func newBucket(n int, per time.Duration) *bucket {
	return &bucket{n: int64(n), burst: max(1, int64(n)/10), per: per, turn: make(chan struct{}, 1)}
}

// take takes a token and returns 0, or returns how long it is until there is one.
func (b *bucket) take(now time.Time) time.Duration {
	full := b.since.Add(b.shares(b.count, b.n-1))
	if !now.Before(full) {
		b.since, b.count, full = now, 0, now
	}
	if in := full.Sub(now) - b.shares(b.burst-1, 0); in > 0 {
		return in
	}
	if b.count++; b.count == b.n {
		b.since, b.count = b.since.Add(b.per), 0
	}
	return 0
}

// shares returns count times per/n; up is n-1 to round it up, and 0 to round it down.
func (b *bucket) shares(count, up int64) time.Duration {
	whole, rest := int64(b.per)/b.n, int64(b.per)%b.n
	return time.Duration(whole*count + (rest*count+up)/b.n)
}
