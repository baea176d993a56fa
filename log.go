package steadymq

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// silence is the longest that nothing is told of what goes on.
	silence = time.Minute
	// calm is how long a consumer has to be consuming to be well again. Sessions that
	// last longer are told one by one: two lines each, at most 80 an hour.
	calm = 90 * time.Second
	// failureGap is the shortest time between two lines about handlers.
	failureGap = time.Second
	// causesKept is how many causes are counted apart. What a broker or a user's
	// function says may be different each time.
	causesKept = 8
	// newsKept lines may be told beside one a minute, and after newsEvery one more: a new
	// cause at once, but not a flood of them.
	newsKept  = 12
	newsEvery = 5 * time.Minute
)

// journal writes the log, as much of it as somebody may want to read: of what
// repeats the 1st, 2nd, 4th, 8th ... time and once a minute. Its owner is the
// reporter's goroutine.
type journal struct {
	ctx    context.Context // for the values a slog.Handler may look for
	logger *slog.Logger

	causes map[string]*cause // failures since the consumer was last well
	told   time.Time         // when the last of them was
	news   allowance         // of those told sooner than after a minute
	again  series            // consuming, since then
	since  time.Time         // since when it is consuming, zero if it is not
	owed   *slog.Record      // a "consuming" that was left out
	calm   *time.Timer       // runs while one is owed

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
		calm:   time.NewTimer(calm),
		quiet:  time.NewTimer(silence),
	}
	j.calm.Stop()
	j.quiet.Stop()
	return j
}

// stop leaves no timer behind.
func (j *journal) stop() {
	j.calm.Stop()
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
	record.AddAttrs(attrs...)
	return record
}

func (j *journal) write(record slog.Record) {
	if j.logger.Enabled(j.ctx, record.Level) {
		_ = j.logger.Handler().Handle(j.ctx, record)
	}
}

// changed writes one line for a change of state. Tries, and what is left out, are for
// debugging.
func (j *journal) changed(c StateChange) {
	j.well(c.Time)
	level := slog.LevelInfo
	attrs := c.attrs()
	switch c.To {
	case Connecting:
		if c.From == Backoff {
			level = slog.LevelDebug
		}
	case Backoff:
		level, attrs = j.failing(c, attrs)
	case Stopped:
		j.sum()
		if c.Cause != nil {
			level = slog.LevelWarn
		}
	}
	if c.Cause != nil {
		attrs = append(attrs, slog.String("cause", reasonOf(c.Cause)))
	}
	record := newRecord(c.Time, level, c.To.String(), attrs...)
	if c.To == Consuming {
		j.consuming(record)
		return
	}
	j.since, j.owed = time.Time{}, nil
	j.calm.Stop()
	j.write(record)
}

func (c *StateChange) attrs() []slog.Attr {
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
		attrs = append(attrs, slog.Duration("retry_in", c.RetryIn))
	}
	return attrs
}

// failing counts a failure with those of the same cause.
func (j *journal) failing(c StateChange, attrs []slog.Attr) (slog.Level, []slog.Attr) {
	same := j.cause(causeKey(c), c.Time)
	level := slog.LevelDebug
	overdue := c.Time.Sub(j.told) >= silence
	if same.step(overdue) && (overdue || j.news.spend(c.Time)) {
		level, j.told = slog.LevelWarn, c.Time
	}
	if !j.since.IsZero() {
		attrs = append(attrs, slog.Duration("up", c.Time.Sub(j.since)))
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

func (a *allowance) spend(now time.Time) bool {
	for ; a.used > 0 && now.Sub(a.at) >= newsEvery; a.used-- {
		a.at = a.at.Add(newsEvery)
	}
	if a.used == 0 {
		a.at = now
	}
	if a.used == newsKept {
		return false
	}
	a.used++
	return true
}

// consuming tells that the consumer is consuming, or owes that if it was so often
// before.
func (j *journal) consuming(record slog.Record) {
	j.since = record.Time
	if !j.again.step(false) {
		owed := record.Clone()
		j.owed = &owed
		j.calm.Reset(calm)
		record.Level = slog.LevelDebug
	}
	j.write(record)
}

// well begins anew once the consumer has been consuming for long enough, and tells
// that it is if that was left out.
func (j *journal) well(now time.Time) {
	if j.since.IsZero() || now.Sub(j.since) < calm {
		return
	}
	if j.owed != nil {
		j.write(*j.owed)
	}
	j.owed, j.again = nil, series{}
	clear(j.causes)
}

// failure is what came of a handler that returned an error or panicked.
type failure struct {
	session  *session
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
	f.left, f.last, f.told, f.attrs = 0, nil, now, what.session.attrs()
	return left, true
}

func (f failure) attrs(left uint64) []slog.Attr {
	d := f.delivery
	attrs := append(f.session.attrs(),
		slog.String("exchange", d.Exchange), slog.String("routing_key", d.RoutingKey),
		slog.Uint64("delivery_tag", d.DeliveryTag), slog.Int("attempt", d.Attempt()), slog.Bool("redelivered", d.Redelivered))
	if f.held > 0 {
		attrs = append(attrs, slog.Duration("held", f.held))
	} else {
		attrs = append(attrs, slog.String("outcome", d.Outcome().String()))
	}
	if left > 0 {
		attrs = append(attrs, slog.Uint64("suppressed", left))
	}
	attrs = append(attrs, slog.String("error", brief(f.err)))
	if f.panicked != nil {
		attrs = append(attrs, slog.String("stack", string(f.panicked.Stack)))
	}
	return attrs
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
		j.writeFailure(newRecord(now, level, message, append(attrs, slog.Uint64("suppressed", left), slog.String("error", brief(last)))...))
	}
}
