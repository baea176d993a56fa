package steadymq

import (
	"cmp"
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

// journal writes the log, as much of it as somebody may want to read: of what repeats, the 1st,
// 2nd, 4th, 8th ... time and once a minute. After a failure was logged, so is the recovery: a
// consumer that is consuming never ends its log with a failure. Only the reporter's goroutine uses
// a journal, but for failures and panics, which workers use, too.
type journal struct {
	ctx    context.Context // carries values that a slog.Handler may look for
	logger *slog.Logger

	causes         map[string]*cause // failures by cause, forgotten after forgetAfter
	lastLine       time.Time         // when a line about failures was last written
	extra          allowance         // lines before their time
	outageOpen     bool              // no recovery was logged since the last failure, or the start
	consumingSince time.Time         // since when the consumer is consuming; zero if it is not
	awaySince      time.Time         // since when it has not been consuming
	flapping       bool              // the last session ended within stableAfter
	lossTold       bool              // a failure, or the begin of a Run, was logged since the last change to Consuming or Paused
	pending        *slog.Record      // a "consuming" to write once the session is stable
	stableTimer    alarm             // runs while pending is set
	gaveUp         bool              // Run ends by a failure and not because its context has ended

	summaryTimer alarm // runs after a line about handlers, until a summary is due
	summaryDue   bool  // it runs
	failures     failures
	panics       failures
	givenUp      failures // those after which the policy of WithRetry gives the message up
}

func newJournal(ctx context.Context, logger *slog.Logger) *journal {
	if logger == nil {
		logger = slog.Default()
	}
	j := &journal{
		ctx:        context.WithoutCancel(ctx),
		logger:     logger,
		outageOpen: true,
	}
	return j
}

const (
	// longestSilence is the longest time without a line while failures of one cause go on.
	longestSilence = time.Minute
	// outageGap is the shortest time between the lines about two outages. Outages further apart are
	// logged one by one: two lines each, at most 80 an hour.
	outageGap = 90 * time.Second
	// forgetAfter is how long a consumer has to be consuming before its failures are counted anew.
	forgetAfter = 10 * time.Minute
	// stableAfter is how long a consumer has to be consuming before that is logged, if its last
	// session did not last as long.
	stableAfter = 2 * time.Second
	// longOutage is how long a consumer has to be away for its return to be logged although its
	// failures were not.
	longOutage = 5 * time.Second
	// failureGap is the shortest time between two lines about handlers.
	failureGap = time.Second
	// maxCauses is how many causes are counted separately. The text of a broker, or of a user's
	// function, may be different each time.
	maxCauses = 8
	// extraLines is how many lines may be logged before their time, and extraEvery how long it
	// takes until there is one more: a new cause is logged at once, but a flood of them is not. A
	// failure that ends a session takes two lines.
	extraLines = 12
	extraEvery = 5 * time.Minute
)

// waiting reports whether one of the timers runs.
func (j *journal) waiting() bool { return j.pending != nil || j.summaryDue }

// alarm is a timer that is made when it is first needed, because a consumer may never need it.
type alarm struct{ timer *time.Timer }

func (a *alarm) set(d time.Duration) {
	if a.timer == nil {
		a.timer = time.NewTimer(d)
		return
	}
	a.timer.Reset(d)
}

func (a *alarm) off() {
	if a.timer != nil {
		a.timer.Stop()
	}
}

// rings has the time once the alarm goes off.
func (a *alarm) rings() <-chan time.Time {
	if a.timer == nil {
		return nil
	}
	return a.timer.C
}

// stop leaves no timer behind.
func (j *journal) stop() {
	j.stableTimer.off()
	j.summaryTimer.off()
}

// series counts what repeats.
type series struct {
	count uint64
	next  uint64 // the count at which the next line is due
}

// add counts one more. It reports whether that is to be logged: it is the 1st, 2nd, 4th ..., or it
// is time.
func (s *series) add(time bool) bool {
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

// durationAttr is an attribute with a duration as text, because slog's JSON shows a bare number of
// nanoseconds.
func durationAttr(key string, d time.Duration) slog.Attr {
	if d > 10*time.Millisecond {
		d = d.Round(time.Millisecond)
	}
	return slog.String(key, d.String())
}

// suppressed is an attribute with the number of lines left out before this one, or none if there
// were none.
func suppressed(n uint64) slog.Attr {
	if n == 0 {
		return slog.Attr{}
	}
	return slog.Uint64("suppressed", n)
}

// messageID is an attribute with the id of a message, or none if the message has none.
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

// changed writes one line for a change of state. Tries, and what is left out, have the level Debug.
func (j *journal) changed(c StateChange) {
	if c.From == Idle || c.From == Stopped { // a Run that begins paused says so
		j.lossTold = true
	}
	if c.shared && (c.To != Consuming || !j.outageOpen) { // an outage that was told ends in the same log
		j.sharedChange(c)
		return
	}
	if c.To == Consuming {
		j.consuming(c)
		return
	}
	if !j.consumingSince.IsZero() && c.Time.Sub(j.consumingSince) >= forgetAfter {
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
		j.lossTold = j.lossTold || level == slog.LevelWarn
	case Paused:
		level, attrs = j.paused(c, attrs)
	case Draining:
		j.gaveUp = c.Cause != nil
		if c.Session == 0 { // there has been no session, so nothing to drain
			level = slog.LevelDebug
		}
	case Stopped:
		j.summarize()
		level = j.stopped(c.Cause)
	}
	if c.Cause != nil && c.To != Draining { // the line for Stopped has it
		attrs = append(attrs, slog.String("cause", reasonOf(c.Cause)))
	}
	j.notConsuming(c.Time)
	j.write(newRecord(c.Time, level, c.To.String(), attrs...))
}

// stopped returns the level of the last line of a Run that ends with err.
func (j *journal) stopped(err error) slog.Level {
	switch {
	case err == nil:
		return slog.LevelInfo
	case j.gaveUp:
		return slog.LevelError
	}
	return slog.LevelWarn
}

// notConsuming records that the consumer is not consuming.
func (j *journal) notConsuming(now time.Time) {
	if !j.consumingSince.IsZero() {
		j.flapping = now.Sub(j.consumingSince) < stableAfter
	}
	if !j.consumingSince.IsZero() || j.awaySince.IsZero() {
		j.awaySince = now
	}
	j.consumingSince, j.pending = time.Time{}, nil
	j.stableTimer.off()
}

// sharedChange tells at Debug what concerns a connection that others share: the Group's own log has
// a line for all of them.
func (j *journal) sharedChange(c StateChange) {
	attrs := attrsOf(c)
	if c.To == Consuming {
		attrs = append(attrs, durationAttr("down", c.Time.Sub(j.awaySince)))
		j.consumingSince = c.Time
	} else {
		j.notConsuming(c.Time)
	}
	if c.Cause != nil {
		attrs = append(attrs, slog.String("cause", reasonOf(c.Cause)))
	}
	j.write(newRecord(c.Time, slog.LevelDebug, c.To.String(), attrs...))
}

func attrsOf(c StateChange) []slog.Attr {
	var attrs []slog.Attr
	if c.consumers > 0 {
		attrs = sharers(c.consumers, c.connection)
	} else {
		attrs = append(attrs, slog.String("queue", c.Queue))
	}
	if c.ConsumerTag != "" {
		attrs = append(attrs, slog.String("consumer", c.ConsumerTag))
	}
	if c.consumers == 0 {
		attrs = append(attrs, slog.Uint64("session", c.Session))
	}
	if c.Host != "" {
		attrs = append(attrs, slog.String("host", c.Host))
	}
	if c.Attempt > 0 {
		attrs = append(attrs, slog.Int("attempt", c.Attempt))
	}
	if c.To == Backoff {
		attrs = append(attrs, durationAttr("retry_in", c.RetryIn))
	}
	return attrs
}

// sharers are the attributes of a line about a connection that so many consumers share.
func sharers(consumers, connection int) []slog.Attr {
	attrs := []slog.Attr{slog.Int("consumers", consumers)}
	if connection > 0 {
		attrs = append(attrs, slog.Int("connection", connection))
	}
	return attrs
}

// failing counts a failure with the earlier ones of the same cause, and returns the level of its
// line. The first failure of an outage has the longer gap, because the end of the outage is logged
// as well.
func (j *journal) failing(c StateChange, attrs []slog.Attr) (slog.Level, []slog.Attr) {
	same := j.cause(causeKey(c), c.Time)
	level, gap, lines := slog.LevelDebug, outageGap, 2
	if j.outageOpen {
		gap, lines = longestSilence, 1
	}
	overdue := c.Time.Sub(j.lastLine) >= gap
	if same.add(overdue) && (overdue || j.extra.spend(c.Time, lines)) {
		level, j.lastLine, j.outageOpen = slog.LevelWarn, c.Time, true
	}
	if !j.consumingSince.IsZero() {
		attrs = append(attrs, durationAttr("up", c.Time.Sub(j.consumingSince)))
	}
	if same.count > 1 {
		attrs = append(attrs, slog.Uint64("repeated", same.count))
	}
	return level, attrs
}

// cause counts the failures of one cause.
type cause struct {
	series
	last time.Time
}

// cause returns the counter of the cause with that key. A new one may take the place of the cause
// that has not been seen for the longest time.
func (j *journal) cause(key string, now time.Time) *cause {
	if j.causes[key] == nil && len(j.causes) >= maxCauses {
		oldest := slices.MinFunc(slices.Collect(maps.Keys(j.causes)), func(a, b string) int {
			return j.causes[a].last.Compare(j.causes[b].last)
		})
		delete(j.causes, oldest)
	}
	if j.causes == nil {
		j.causes = make(map[string]*cause)
	}
	if j.causes[key] == nil {
		j.causes[key] = new(cause)
	}
	j.causes[key].last = now
	return j.causes[key]
}

// paused returns the level of the line for a pause, which counts with earlier ones as failures do:
// an open breaker is one. A connection that is back during a pause is told if its loss was.
func (j *journal) paused(c StateChange, attrs []slog.Attr) (slog.Level, []slog.Attr) {
	healed := c.From == Connecting || c.From == Backoff
	told := j.lossTold || j.awaySince.IsZero()
	j.lossTold = false
	switch {
	case healed && told:
		return slog.LevelInfo, attrs
	case healed:
		return slog.LevelDebug, attrs
	}
	level, attrs := j.failing(c, attrs)
	if c.Cause == nil {
		level = min(level, slog.LevelInfo)
	}
	return level, attrs
}

// variablePart matches what differs between failures of the same cause: IP addresses, and long
// numbers, such as ports and the numbers of requests. A short number, such as a status, makes
// another cause.
var variablePart = regexp.MustCompile(`\d+\.\d+\.\d+\.\d+|\[[[:xdigit:]:.]+(%\w+)?\]|\d{4,}`)

// causeKey returns what the failures of one cause have in common: step and reason, whatever the
// host.
func causeKey(c StateChange) string {
	if c.To == Paused { // the texts of an open breaker differ by the message that has failed
		return fmt.Sprint(c.To, c.Cause != nil)
	}
	key := reasonOf(c.Cause)
	if host, _, err := net.SplitHostPort(c.Host); err == nil && host != "" {
		key = strings.ReplaceAll(key, host, "")
	}
	return variablePart.ReplaceAllString(key, "")
}

// allowance bounds the lines that are logged before their time.
type allowance struct {
	used int
	at   time.Time // since then one is given back every extraEvery
}

func (a *allowance) spend(now time.Time, lines int) bool {
	for ; a.used > 0 && now.Sub(a.at) >= extraEvery; a.used-- {
		a.at = a.at.Add(extraEvery)
	}
	if a.used == 0 {
		a.at = now
	}
	if a.used+lines > extraLines {
		return false
	}
	a.used += lines
	return true
}

// consuming logs that the consumer is consuming, at once or when it is stable, if a failure was
// logged before or the consumer was away for long.
func (j *journal) consuming(c StateChange) {
	j.consumingSince, j.lossTold = c.Time, false
	attrs := attrsOf(c)
	down := c.Time.Sub(j.awaySince)
	if c.Attempt > 0 {
		attrs = append(attrs, durationAttr("down", down))
	}
	record := newRecord(c.Time, slog.LevelInfo, c.To.String(), attrs...)
	if c.consumers > 0 {
		record = newRecord(c.Time, slog.LevelInfo, "connected", attrs...)
	}
	due := j.outageOpen || down >= longOutage && c.Time.Sub(j.lastLine) >= outageGap
	if due && !j.flapping {
		j.recovered(record)
		return
	}
	if due {
		owed := record.Clone()
		j.pending = &owed
		j.stableTimer.set(stableAfter)
	}
	record.Level = slog.LevelDebug
	j.write(record)
}

// stable logs that the consumer is consuming, if consuming has put that off, and how long it has
// been so.
func (j *journal) stable(now time.Time) {
	if j.pending == nil {
		return
	}
	record := *j.pending
	record.Time = now
	record.AddAttrs(durationAttr("up", now.Sub(j.consumingSince)))
	j.pending = nil
	j.recovered(record)
}

func (j *journal) recovered(record slog.Record) {
	if !j.outageOpen { // its line stands for the failures, too
		j.lastLine = record.Time
	}
	j.outageOpen = false
	j.write(record)
}

// source is what a line is about: its attributes name queue, consumer, session and host.
type source interface{ attrs() []slog.Attr }

// conclusion is what a session has made of a delivery whose handler has returned.
type conclusion struct {
	byHandler bool          // its handler has settled it
	held      time.Duration // until it goes back, or until its copy does; 0 if it is settled
	pending   Outcome       // once its copy is confirmed; Unsettled if there is none
	last      bool          // the policy has given it up
}

// failure is the result of a handler that returned an error or panicked.
type failure struct {
	of       source
	timeout  time.Duration // of handlers, 0 for none
	delivery *Delivery
	conclusion
	err      error
	panicked *PanicError
}

// contradicts reports whether the handler had settled its message in another way than its error
// asks for. The error then changes nothing.
func (f failure) contradicts() bool {
	o := f.delivery.Outcome()
	wanted, _ := OutcomeOf(f.err)
	return f.byHandler && o != wanted && o != Stale
}

// failures decides which errors of handlers, or which of their panics, are logged. Unlike the rest
// of the journal it is used by all workers, under mu.
type failures struct {
	mu         sync.Mutex
	series     series
	lastLine   time.Time
	suppressed uint64      // lines left out since then
	last       error       // the last error left out
	attrs      []slog.Attr // where it happened
}

// failed returns the line for a failure if one is due.
func (j *journal) failed(f failure) (record slog.Record, due bool) {
	group, level, message := &j.failures, slog.LevelWarn, "handler failed"
	switch {
	case f.panicked != nil:
		group, level, message = &j.panics, slog.LevelError, "handler panicked"
	case f.contradicts():
		message = "handler settled its message by itself and then failed"
	case f.last:
		group, message = &j.givenUp, "handler failed, and its message is given up"
	}
	now := time.Now()
	left, due := group.add(now, f)
	if !due { // the reporter's goroutine asks whether the logger wants it
		return slog.Record{}, false
	}
	return newRecord(now, level, message, f.attrs(left)...), true
}

func (f *failures) add(now time.Time, what failure) (left uint64, due bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	passed := now.Sub(f.lastLine)
	if passed >= longestSilence && f.suppressed == 0 {
		f.series = series{}
	}
	if passed < failureGap {
		f.series.count++
	} else {
		due = f.series.add(passed >= longestSilence)
	}
	if !due {
		f.suppressed++
		f.last, f.attrs = what.err, what.of.attrs()
		return 0, false
	}
	left = f.suppressed
	f.suppressed, f.last, f.lastLine, f.attrs = 0, nil, now, nil
	return left, true
}

func (f failure) attrs(left uint64) []slog.Attr {
	d := f.delivery
	attrs := append(f.of.attrs(),
		slog.String("exchange", d.Exchange), slog.String("routing_key", d.RoutingKey),
		messageID(d.MessageId), slog.Uint64("delivery_tag", d.fence.tag), slog.Int("attempt", d.Attempt()), slog.Bool("redelivered", d.Redelivered))
	if f.held > 0 {
		attrs = append(attrs, durationAttr("retry_in", f.held))
	} else {
		attrs = append(attrs, slog.String("outcome", cmp.Or(f.pending, d.Outcome()).String()))
	}
	attrs = append(attrs, suppressed(left), slog.String("error", f.text()))
	if f.panicked != nil {
		attrs = append(attrs, slog.String("stack", string(f.panicked.Stack)))
	}
	return attrs
}

// text returns the error's text, with the limit that ErrHandlerTimeout itself does not name.
func (f failure) text() string {
	text := errtext.Brief(f.err)
	if !strings.Contains(text, ErrHandlerTimeout.Error()) {
		return text
	}
	limit := fmt.Sprintf("%v after %v (WithHandlerTimeout)", ErrHandlerTimeout, f.timeout)
	return strings.Replace(text, ErrHandlerTimeout.Error(), limit, 1)
}

// writeFailure writes a line about handlers, and starts the timer after which what was left out
// since is summarized.
func (j *journal) writeFailure(record slog.Record) {
	j.summaryTimer.set(longestSilence + failureGap) // a failure that is due by then says more
	j.summaryDue = true
	j.write(record)
}

// summarize logs how much was left out since the last line about handlers, if no later line has
// said so.
func (j *journal) summarize() {
	j.summaryDue = false
	j.summarizeOne(&j.failures, slog.LevelWarn, "more handlers failed")
	j.summarizeOne(&j.panics, slog.LevelError, "more handlers panicked")
	j.summarizeOne(&j.givenUp, slog.LevelWarn, "more messages are given up")
}

func (j *journal) summarizeOne(f *failures, level slog.Level, message string) {
	f.mu.Lock()
	left, last, attrs := f.suppressed, f.last, f.attrs
	now := time.Now()
	if left > 0 {
		f.suppressed, f.last, f.lastLine = 0, nil, now
	}
	f.mu.Unlock()
	if left > 0 {
		j.writeFailure(newRecord(now, level, message, append(attrs, suppressed(left), slog.String("error", errtext.Brief(last)))...))
	}
}

// notices records which warnings the sessions of one Run have logged, so that a mistake that shows
// in every message does not flood the log. The sessions, their workers and their timers use it at
// the same time.
type notices struct {
	held, overdue, limit, unreadable rateLimited
	transfer, noPark, cut, later     rateLimited
	connecting, miscounted, slowKey  rateLimited
	slow, limitKept, renamed         atomic.Bool
	blind, consumed, delayedHere     atomic.Bool
}

// rateLimited lets one line pass in a while and counts the others.
type rateLimited struct {
	mu   sync.Mutex
	used *limited // nil before the first line, which most never see
}

type limited struct {
	last       time.Time
	suppressed uint64
}

// allow reports whether a line may be logged, at most one in each interval, and how many were left
// out before it.
func (t *rateLimited) allow(interval time.Duration) (left uint64, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	switch {
	case t.used == nil:
		t.used = new(limited)
	case now.Sub(t.used.last) < interval:
		t.used.suppressed++
		return 0, false
	}
	left, t.used.last, t.used.suppressed = t.used.suppressed, now, 0
	return left, true
}
