package steadymq

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

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

const (
	slowConnect  = 2 * time.Second  // the longest that a try takes without a line about it
	slowInterval = 10 * time.Minute // between two such lines
)

// waiting tells of a try that takes its time, at which step it is. The function it returns is
// called at the end of the try.
func (s *scope) waiting(host string, step *step) (over func()) {
	timer := time.AfterFunc(slowConnect, func() {
		if left, ok := s.told.connecting.pass(slowInterval); ok {
			attrs := []slog.Attr{slog.String("queue", s.config.queue), slog.String("step", step.String()), lasting("for", slowConnect), suppressed(left)}
			if host != "" { // WithURLFunc has named it
				attrs = append(attrs, slog.String("host", host))
			}
			s.reporter.info("still connecting", attrs...)
		}
	})
	return func() { timer.Stop() }
}

// overdueGrace is what a handler is given to return in once its context has ended.
const overdueGrace = time.Second

// overdue watches a handler that has a timeout. The function it returns is called
// when the handler has returned.
func (s *session) overdue(d *Delivery) (returned func()) {
	limit, id := s.config.handlerTimeout, d.MessageId // the handler may change it
	timer := time.AfterFunc(limit+overdueGrace, func() {
		now := s.stats.overdue.Add(1)
		if left, ok := s.told.overdue.pass(time.Minute); ok {
			s.warn("a handler is running past its timeout, it ignores the end of its context",
				lasting("timeout", limit), messageID(id), slog.Uint64("delivery_tag", d.fence.tag),
				slog.Int64("overdue", now), suppressed(left))
		}
	})
	return func() {
		if !timer.Stop() {
			s.stats.overdue.Add(-1)
		}
	}
}

// defaultConsumerTimeout is how long RabbitMQ lets a delivery be unsettled.
const defaultConsumerTimeout = 30 * time.Minute

// consumerTimeout is what the broker will allow, as far as the consumer was told; a day at most.
func (c *config) consumerTimeout() time.Duration {
	limit := c.consumeArgs["x-consumer-timeout"]
	if limit == nil && c.declare != nil {
		limit = c.declare.Args["x-consumer-timeout"]
	}
	if ms, ok := headerInt(limit); ok && ms > 0 {
		return time.Duration(min(ms, maxDuration.Milliseconds())) * time.Millisecond
	}
	return defaultConsumerTimeout
}

// backlog looks, a few times within a consumer timeout, whether deliveries wait too
// long for a worker. That costs a delivery nothing, and sees how long handlers take
// together and not how long the odd one does.
type backlog struct {
	session *session
	timeout time.Duration
	base    uint64            // deliveries given to handlers before the session
	arrived [looks / 2]uint64 // deliveries of the session at the last looks, oldest first

	mu    sync.Mutex
	timer *time.Timer // nil when there are no more looks
}

// looks is how often within a consumer timeout.
const looks = 8

func (s *session) watchBacklog() {
	p := &s.backlog
	p.session, p.timeout, p.base = s, s.config.consumerTimeout(), s.stats.delivered.Load()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !s.told.slow.Load() {
		p.timer = time.AfterFunc(p.every(), p.look)
	}
}

func (p *backlog) every() time.Duration { return max(p.timeout/looks, time.Second) }

// look finds out whether a delivery waits that was there already half a consumer
// timeout ago.
func (p *backlog) look() {
	s := p.session
	taken := s.stats.delivered.Load() - p.base // first: what is taken meanwhile must not count twice
	late := taken < p.arrived[0]
	copy(p.arrived[:], p.arrived[1:])
	p.arrived[len(p.arrived)-1] = taken + uint64(s.inbox.waiting())
	if late && s.told.slow.CompareAndSwap(false, true) {
		s.warn("handlers are so slow that deliveries wait for them longer than half of the consumer timeout, "+
			"after which the broker takes them back: lower WithPrefetch, or raise WithConcurrency",
			lasting("consumer_timeout", p.timeout), slog.Int("prefetch", s.config.prefetch),
			slog.Int("concurrency", s.config.concurrency))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil && !s.told.slow.Load() {
		p.timer.Reset(p.every())
	}
}

func (p *backlog) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
}
