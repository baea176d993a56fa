package steadymq

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/steadymq/steadymq/internal/errtext"
)

const (
	// silence is the longest that nothing is told of what goes on.
	silence = time.Minute
	// calm is how long nothing is told of sessions that come and go. Outages further apart are told
	// one by one: two lines each, at most 80 an hour.
	calm = 90 * time.Second
	// well is how long a consumer has to be consuming for its failures to be counted anew.
	well = 10 * time.Minute
	// settling is how long a consumer has to be consuming for that to be told, if its last session
	// did not last as long.
	settling = 2 * time.Second
	// outage is how long a consumer has to be away for that to be told where its failures were not.
	outage = 5 * time.Second
	// failureGap is the shortest time between two lines about handlers.
	failureGap = time.Second
	// causesKept is how many causes are counted apart. What a broker or a user's
	// function says may be different each time.
	causesKept = 8
	// newsKept lines may be told beside those that it is time for, and after newsEvery one more: a
	// new cause at once, but not a flood of them. A failure that ends a session takes two.
	newsKept  = 12
	newsEvery = 5 * time.Minute
)

// journal writes the log, as much of it as somebody may want to read: of what
// repeats the 1st, 2nd, 4th, 8th ... time and once a minute. A failure that was told is never the
// last word about a consumer that is consuming. Its owner is the reporter's goroutine.
type journal struct {
	ctx    context.Context // for the values a slog.Handler may look for
	logger *slog.Logger

	causes map[string]*cause // failures since the consumer was last well
	told   time.Time         // when the last of them was
	news   allowance         // of lines told sooner than it is time for
	open   bool              // nobody was told yet that it is consuming, after what was told before
	since  time.Time         // since when it is consuming, zero if it is not
	away   time.Time         // since when it is not
	flaps  bool              // the last session ended within settling
	owed   *slog.Record      // a "consuming" to be told once it has settled
	settle *time.Timer       // runs while one is owed
	gaveUp bool              // Run ends by a failure, nobody has asked for it

	quiet    *time.Timer // runs after a line about handlers
	failures failures
	panics   failures
}

func newJournal(ctx context.Context, logger *slog.Logger) *journal {
	if logger == nil {
		logger = slog.Default()
	}
	j := &journal{
		ctx:    context.WithoutCancel(ctx),
		logger: logger,
		causes: make(map[string]*cause),
		open:   true,
		settle: time.NewTimer(settling),
		quiet:  time.NewTimer(silence),
	}
	j.settle.Stop()
	j.quiet.Stop()
	return j
}

// stop leaves no timer behind.
func (j *journal) stop() {
	j.settle.Stop()
	j.quiet.Stop()
}

// series counts what repeats.
type series struct {
	count uint64
	next  uint64 // the count to tell
}

// step counts one more, to be told if it is the 1st, 2nd, 4th ... or if it is time.
func (s *series) step(time bool) bool {
	s.count++
	if s.count < s.next && !time {
		return false
	}
	s.next = 2 * s.count
	return true
}

func newRecord(at time.Time, level slog.Level, message string, attrs ...slog.Attr) slog.Record {
	record := slog.NewRecord(at, level, "steadymq: "+message, 0)
	for _, a := range attrs {
		if !a.Equal(slog.Attr{}) {
			record.AddAttrs(a)
		}
	}
	return record
}

// lasting is a duration as a text: slog's JSON has a bare number of nanoseconds.
func lasting(key string, d time.Duration) slog.Attr {
	if d > 10*time.Millisecond {
		d = d.Round(time.Millisecond)
	}
	return slog.String(key, d.String())
}

// suppressed is how many lines were left out before this one, no attribute if there were none.
func suppressed(n uint64) slog.Attr {
	if n == 0 {
		return slog.Attr{}
	}
	return slog.Uint64("suppressed", n)
}

// messageID is no attribute if the message has none.
func messageID(id string) slog.Attr {
	if id == "" {
		return slog.Attr{}
	}
	return slog.String("message_id", id)
}

func (j *journal) write(record slog.Record) {
	if j.logger.Enabled(j.ctx, record.Level) {
		_ = j.logger.Handler().Handle(j.ctx, record)
	}
}

// changed writes one line for a change of state. Tries, and what is left out, are for
// debugging.
func (j *journal) changed(c StateChange) {
	if c.To == Consuming {
		j.consuming(c)
		return
	}
	if !j.since.IsZero() && c.Time.Sub(j.since) >= well {
		clear(j.causes)
	}
	level := slog.LevelInfo
	attrs := attrsOf(c)
	switch c.To {
	case Connecting:
		if c.From == Backoff {
			level = slog.LevelDebug
		}
	case Backoff:
		level, attrs = j.failing(c, attrs)
	case Draining:
		j.gaveUp = c.Cause != nil
		if c.Session == 0 { // there is nothing to drain
			level = slog.LevelDebug
		}
	case Stopped:
		j.sum()
		level = j.stopped(c.Cause)
	}
	if c.Cause != nil && c.To != Draining { // the line for Stopped has it
		attrs = append(attrs, slog.String("cause", reasonOf(c.Cause)))
	}
	j.left(c.Time)
	j.write(newRecord(c.Time, level, c.To.String(), attrs...))
}

// stopped is the level of the last line of a Run that ends with err.
func (j *journal) stopped(err error) slog.Level {
	switch {
	case err == nil:
		return slog.LevelInfo
	case j.gaveUp:
		return slog.LevelError
	}
	return slog.LevelWarn
}

// left notes that the consumer is not consuming.
func (j *journal) left(now time.Time) {
	if !j.since.IsZero() {
		j.flaps = now.Sub(j.since) < settling
	}
	if !j.since.IsZero() || j.away.IsZero() {
		j.away = now
	}
	j.since, j.owed = time.Time{}, nil
	j.settle.Stop()
}

func attrsOf(c StateChange) []slog.Attr {
	attrs := []slog.Attr{slog.String("queue", c.Queue)}
	if c.ConsumerTag != "" {
		attrs = append(attrs, slog.String("consumer", c.ConsumerTag))
	}
	attrs = append(attrs, slog.Uint64("session", c.Session))
	if c.Host != "" {
		attrs = append(attrs, slog.String("host", c.Host))
	}
	if c.Attempt > 0 {
		attrs = append(attrs, slog.Int("attempt", c.Attempt))
	}
	if c.To == Backoff {
		attrs = append(attrs, lasting("retry_in", c.RetryIn))
	}
	return attrs
}

// failing counts a failure with those of the same cause. One that begins an outage is told less
// often, for the end of the outage is told as well.
func (j *journal) failing(c StateChange, attrs []slog.Attr) (slog.Level, []slog.Attr) {
	same := j.cause(causeKey(c), c.Time)
	level, gap, lines := slog.LevelDebug, calm, 2
	if j.open {
		gap, lines = silence, 1
	}
	overdue := c.Time.Sub(j.told) >= gap
	if same.step(overdue) && (overdue || j.news.spend(c.Time, lines)) {
		level, j.told, j.open = slog.LevelWarn, c.Time, true
	}
	if !j.since.IsZero() {
		attrs = append(attrs, lasting("up", c.Time.Sub(j.since)))
	}
	if same.count > 1 {
		attrs = append(attrs, slog.Uint64("repeated", same.count))
	}
	return level, attrs
}

// cause is the failures of one cause.
type cause struct {
	series
	last time.Time
}

// cause returns the failures of the cause with that key. A new one may take the place of the
// one that has not been seen for the longest time.
func (j *journal) cause(key string, now time.Time) *cause {
	if j.causes[key] == nil && len(j.causes) >= causesKept {
		oldest := slices.MinFunc(slices.Collect(maps.Keys(j.causes)), func(a, b string) int {
			return j.causes[a].last.Compare(j.causes[b].last)
		})
		delete(j.causes, oldest)
	}
	if j.causes[key] == nil {
		j.causes[key] = new(cause)
	}
	j.causes[key].last = now
	return j.causes[key]
}

// passing matches what differs from one failure to the next of the same cause: IP addresses,
// and long numbers, such as ports and the numbers of requests. A short one, such as a status,
// makes another cause.
var passing = regexp.MustCompile(`\d+\.\d+\.\d+\.\d+|\[[[:xdigit:]:.]+(%\w+)?\]|\d{4,}`)

// causeKey is what failures have in common that are told as one: step and reason, whatever the
// host.
func causeKey(c StateChange) string {
	key := reasonOf(c.Cause)
	if host, _, err := net.SplitHostPort(c.Host); err == nil && host != "" {
		key = strings.ReplaceAll(key, host, "")
	}
	return passing.ReplaceAllString(key, "")
}

// allowance bounds the lines that are told beside one a minute.
type allowance struct {
	used int
	at   time.Time // from here on one is given back every newsEvery
}

func (a *allowance) spend(now time.Time, lines int) bool {
	for ; a.used > 0 && now.Sub(a.at) >= newsEvery; a.used-- {
		a.at = a.at.Add(newsEvery)
	}
	if a.used == 0 {
		a.at = now
	}
	if a.used+lines > newsKept {
		return false
	}
	a.used += lines
	return true
}

// consuming tells that the consumer is consuming, at once or when it has settled, if a failure was
// told before or it was away for long.
func (j *journal) consuming(c StateChange) {
	j.since = c.Time
	attrs := attrsOf(c)
	down := c.Time.Sub(j.away)
	if c.Attempt > 0 {
		attrs = append(attrs, lasting("down", down))
	}
	record := newRecord(c.Time, slog.LevelInfo, c.To.String(), attrs...)
	due := j.open || down >= outage && c.Time.Sub(j.told) >= calm
	if due && !j.flaps {
		j.recovered(record)
		return
	}
	if due {
		owed := record.Clone()
		j.owed = &owed
		j.settle.Reset(settling)
	}
	record.Level = slog.LevelDebug
	j.write(record)
}

// settled tells what consuming has put off, and since when it has been so.
func (j *journal) settled(now time.Time) {
	if j.owed == nil {
		return
	}
	record := *j.owed
	record.Time = now
	record.AddAttrs(lasting("up", now.Sub(j.since)))
	j.owed = nil
	j.recovered(record)
}

func (j *journal) recovered(record slog.Record) {
	if !j.open { // it stands for the failures, too
		j.told = record.Time
	}
	j.open = false
	j.write(record)
}

// source is what a line is about: its attributes name queue, consumer, session and host.
type source interface{ attrs() []slog.Attr }

// failure is what came of a handler that returned an error or panicked.
type failure struct {
	of       source
	timeout  time.Duration // of handlers, 0 for none
	delivery *Delivery
	held     time.Duration // until it goes back, 0 if it is settled
	err      error
	panicked *PanicError
}

// contradicts tells whether the handler had settled its message otherwise than its error asks
// for, which then changes nothing.
func (f failure) contradicts() bool {
	o := f.delivery.Outcome()
	wanted, _ := OutcomeOf(f.err)
	return f.held == 0 && o != wanted && o != Stale
}

// failures thins what handlers return, or their panics. Unlike the rest of the
// journal it is used by all workers.
type failures struct {
	mu     sync.Mutex
	series series
	told   time.Time
	left   uint64 // out since then
	last   error  // of those
	attrs  []slog.Attr
}

// failed makes the line for a failure if it is due.
func (j *journal) failed(f failure) (record slog.Record, due bool) {
	row, level, message := &j.failures, slog.LevelWarn, "handler failed"
	switch {
	case f.panicked != nil:
		row, level, message = &j.panics, slog.LevelError, "handler panicked"
	case f.contradicts():
		message = "handler settled its message by itself and then failed"
	}
	now := time.Now()
	left, due := row.step(now, f)
	if !due { // whether the logger wants it is asked on the reporter's goroutine
		return slog.Record{}, false
	}
	return newRecord(now, level, message, f.attrs(left)...), true
}

func (f *failures) step(now time.Time, what failure) (left uint64, due bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	passed := now.Sub(f.told)
	if passed >= silence && f.left == 0 {
		f.series = series{}
	}
	if passed < failureGap {
		f.series.count++
	} else {
		due = f.series.step(passed >= silence)
	}
	if !due {
		f.left++
		f.last = what.err
		return 0, false
	}
	left = f.left
	f.left, f.last, f.told, f.attrs = 0, nil, now, what.of.attrs()
	return left, true
}

func (f failure) attrs(left uint64) []slog.Attr {
	d := f.delivery
	attrs := append(f.of.attrs(),
		slog.String("exchange", d.Exchange), slog.String("routing_key", d.RoutingKey),
		messageID(d.MessageId), slog.Uint64("delivery_tag", d.fence.tag), slog.Int("attempt", d.Attempt()), slog.Bool("redelivered", d.Redelivered))
	if f.held > 0 {
		attrs = append(attrs, lasting("retry_in", f.held))
	} else {
		attrs = append(attrs, slog.String("outcome", d.Outcome().String()))
	}
	attrs = append(attrs, suppressed(left), slog.String("error", f.text()))
	if f.panicked != nil {
		attrs = append(attrs, slog.String("stack", string(f.panicked.Stack)))
	}
	return attrs
}

// text names the limit that the library's own error does not know.
func (f failure) text() string {
	text := errtext.Brief(f.err)
	if !strings.Contains(text, ErrHandlerTimeout.Error()) {
		return text
	}
	limit := fmt.Sprintf("%v after %v (WithHandlerTimeout)", ErrHandlerTimeout, f.timeout)
	return strings.Replace(text, ErrHandlerTimeout.Error(), limit, 1)
}

// writeFailure also sees to it that what is left out after it is told.
func (j *journal) writeFailure(record slog.Record) {
	j.quiet.Reset(silence + failureGap) // a failure that is due then says more
	j.write(record)
}

// sum tells what was left out and nothing came after.
func (j *journal) sum() {
	j.sumOf(&j.failures, slog.LevelWarn, "more handlers failed")
	j.sumOf(&j.panics, slog.LevelError, "more handlers panicked")
}

func (j *journal) sumOf(f *failures, level slog.Level, message string) {
	f.mu.Lock()
	left, last, attrs := f.left, f.last, f.attrs
	now := time.Now()
	if left > 0 {
		f.left, f.last, f.told = 0, nil, now
	}
	f.mu.Unlock()
	if left > 0 {
		j.writeFailure(newRecord(now, level, message, append(attrs, suppressed(left), slog.String("error", errtext.Brief(last)))...))
	}
}

// notices is what the sessions of one Run have told, so that a mistake that every
// message shows is no flood.
type notices struct {
	held, overdue, limit, unreadable thinned
	connecting                       thinned
	slow, limitKept, renamed         atomic.Bool
	blind, consumed                  atomic.Bool
}

// thinned lets one line pass at a time and counts the others.
type thinned struct {
	mu   sync.Mutex
	last time.Time
	left uint64
}

// pass tells whether a line may be told, at most one each interval, and how many
// were left out before it.
func (t *thinned) pass(interval time.Duration) (left uint64, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if !t.last.IsZero() && now.Sub(t.last) < interval {
		t.left++
		return 0, false
	}
	left, t.last, t.left = t.left, now, 0
	return left, true
}
