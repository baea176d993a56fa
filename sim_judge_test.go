package steadymq_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// simCanary is in every password of the simulation and may be in no output.
const simCanary = "c4nAry"

// simJudge sees what the broker sees, and what handlers do, and holds both
// against the invariants. It never asks the library; what the library tells its
// hooks is judged, too.
type simJudge struct {
	s *sim

	mu         sync.Mutex
	violations []string
	sessions   map[uint64]*simSession       // by the broker's number
	byTag      map[string]*simSession       // the same, by consumer tag
	handled    map[simKey]*simHandled       // deliveries that a handler got
	tries      map[string]int               // how often handlers got a message
	acked      map[string]bool              // messages that a handler has finished or settled
	discarded  map[string]bool              // messages that a handler has discarded
	cancelled  map[string]time.Time         // when the handlers' context of a consumer tag ended
	watched    map[string]bool              // consumer tags of which that is looked for
	used       map[string]bool              // consumer tags that handlers have seen
	deliveries map[uint64]map[uint64]string // session -> tag -> message
}

// simSession is one consumer as the broker knows it.
type simSession struct {
	record      steadymqtest.ConsumerRecord
	consumer    *simConsumer
	run         *simRun
	outstanding int
	settled     time.Time // first settlement
	marks       int64     // sim.disturbed when it ended
}

// simHandled is one delivery that a handler got.
type simHandled struct {
	id      string
	allowed uint8 // bit set of outcomes
	settled bool
	held    time.Time // not to be requeued before, while all is well
}

func newSimJudge(s *sim) *simJudge {
	return &simJudge{
		s:          s,
		sessions:   make(map[uint64]*simSession),
		byTag:      make(map[string]*simSession),
		handled:    make(map[simKey]*simHandled),
		tries:      make(map[string]int),
		acked:      make(map[string]bool),
		discarded:  make(map[string]bool),
		cancelled:  make(map[string]time.Time),
		watched:    make(map[string]bool),
		used:       make(map[string]bool),
		deliveries: make(map[uint64]map[uint64]string),
	}
}

// violate notes that an invariant does not hold.
func (j *simJudge) violate(invariant, format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.note(invariant, format, args...)
}

func (j *simJudge) note(invariant, format string, args ...any) {
	if len(j.violations) < 10 {
		j.violations = append(j.violations, fmt.Sprintf("%s at %v: ", invariant, j.s.now())+fmt.Sprintf(format, args...))
	}
	j.s.failed.Store(true)
}

// canary is I10.
func (j *simJudge) canary(where string, what any) {
	if text := fmt.Sprintf("%v %+v", what, what); strings.Contains(text, simCanary) {
		j.violate("I10", "a password in %s: %s", where, text)
	}
}

// hooks lets the judge see what the broker sees.
func (j *simJudge) hooks() steadymqtest.Hooks {
	return steadymqtest.Hooks{Consuming: j.consuming, Cancelled: j.gone, Delivered: j.delivered, Settled: j.settled}
}

func (j *simJudge) consuming(r steadymqtest.ConsumerRecord) {
	j.mu.Lock()
	defer j.mu.Unlock()
	c := j.s.consumerOf(r.Tag)
	if c == nil {
		j.note("I1", "a consumer with a tag of nobody: %s", r.Tag)
		return
	}
	if j.byTag[r.Tag] != nil && j.used[r.Tag] { // one of a setup that failed may come again
		j.note("I1", "the consumer tag %s is used a second time", r.Tag)
	}
	x := &simSession{record: r, consumer: c, run: c.run}
	j.sessions[r.Session], j.byTag[r.Tag] = x, x
	j.deliveries[r.Session] = make(map[uint64]string)
	c.latest = x
	c.live++
	faults := j.s.strikes.recent(j.s.now(), time.Minute)
	if c.consumes.add(j.s.now(), time.Minute) > j.s.plan.hosts*(c.plan.connects()+10*faults) {
		j.note("I7", "%s subscribed %d times within a minute", c.plan.name, c.consumes.count())
	}
	j.s.flap()
}

func (j *simJudge) gone(r steadymqtest.ConsumerRecord) {
	j.mu.Lock()
	defer j.mu.Unlock()
	x := j.sessions[r.Session]
	if x == nil {
		return
	}
	x.record.Ended, x.record.Cause, x.marks = r.Ended, r.Cause, -1
	if x.consumer.lone && j.s.strikes.recent(j.s.now(), time.Minute) < 3 { // else the connection is replaced too
		x.marks = j.s.disturbed.Load()
	}
	x.consumer.live--
	if strings.Contains(r.Cause, "timed out. Timeout value used: "+fmt.Sprint(j.s.plan.hold.Milliseconds())) || r.Cause == "consumer timeout" {
		x.consumer.trouble(j.s.now())
	}
}

func (j *simJudge) delivered(r steadymqtest.DeliveryRecord) {
	j.mu.Lock()
	defer j.mu.Unlock()
	x := j.sessions[r.Session]
	if x == nil {
		return
	}
	j.deliveries[r.Session][r.Tag] = r.ID
	if x.outstanding++; x.outstanding > x.consumer.plan.prefetch {
		j.note("I6", "%d unsettled deliveries of session %s, the prefetch is %d", x.outstanding, r.ConsumerTag, x.consumer.plan.prefetch)
	}
}

func outcomeOf(r *steadymqtest.SettlementRecord) steadymq.Outcome {
	switch {
	case r.Kind == steadymqtest.Ack:
		return steadymq.Acked
	case r.Requeue:
		return steadymq.Requeued
	}
	return steadymq.Discarded
}

func (j *simJudge) settled(r steadymqtest.SettlementRecord) {
	j.mu.Lock()
	defer j.mu.Unlock()
	x := j.sessions[r.Session]
	if r.Multiple || r.Verdict == steadymqtest.Double || r.Verdict == steadymqtest.Unknown || x == nil {
		j.note("I1", "a bad settlement: %+v", r)
		return
	}
	x.outstanding--
	if x.settled.IsZero() {
		x.settled = r.Time
	}
	h := j.handled[simKey{x.record.Tag, r.Tag}]
	o := outcomeOf(&r)
	switch {
	case r.Kind == steadymqtest.Nack && h == nil && r.Requeue: // no handler had it
	case h == nil:
		j.note("I3", "%v of a message that no handler had in that session: %+v", o, r)
	case h.id != r.ID:
		j.note("I3", "%v of message %s, its handler had %s: %+v", o, r.ID, h.id, r)
	case r.Kind == steadymqtest.Nack:
		j.note("I3", "handed back as never started, but a handler had it: %+v", r)
	case h.allowed&(1<<o) == 0:
		j.note("I3", "%v of a message whose handler has not decided so (%b): %+v", o, h.allowed, r)
	case r.Time.Before(h.held) && x.record.Ended.IsZero() && !x.consumer.stopping:
		j.note("hold", "a failed message went back %v too early: %+v", h.held.Sub(r.Time), r)
	}
	if h != nil {
		h.settled = true
	}
}

// started is called first in every handler; it returns which try this is.
func (j *simJudge) started(h *simHandling, ctx context.Context) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	c := h.c
	if !c.running || c.run != h.run {
		j.note("I9", "a handler of %s started after Run had returned", c.plan.name)
	}
	if h.run.asked >= 0 && j.s.now() > h.run.asked {
		j.note("I8", "a handler of %s started %v after the stop", c.plan.name, j.s.now()-h.run.asked)
	}
	if h.run.inFlight++; h.run.inFlight > c.plan.concurrency {
		j.note("I6", "%d handlers of %s at once, %d are allowed", h.run.inFlight, c.plan.name, c.plan.concurrency)
	}
	if ctx.Value(simRunKey{}) != h.run {
		j.note("ctx", "a handler's context has not the values of Run's")
	}
	if j.handled[h.key] != nil {
		j.note("I3", "the delivery %v was handled twice", h.key)
	}
	j.notLate(h, ctx)
	j.used[h.key.consumer] = true
	h.run.handled = true
	j.handled[h.key] = &simHandled{id: h.d.MessageId}
	j.tries[h.d.MessageId]++
	return j.tries[h.d.MessageId]
}

// notLate sees to it that no handler gets a delivery of a session that is known
// to be lost.
func (j *simJudge) notLate(h *simHandling, ctx context.Context) {
	tag := h.key.consumer
	if at, ok := j.cancelled[tag]; ok && time.Now().After(at) {
		j.note("I3", "a handler started for %v, whose session was known to be lost %v before", h.key, time.Since(at))
	}
	if j.watched[tag] || h.c.plan.handlerTimeout > 0 {
		return
	}
	j.watched[tag] = true
	context.AfterFunc(ctx, func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.cancelled[tag] = time.Now()
	})
}

// allow notes that a handler is about to settle by hand.
func (j *simJudge) allow(key simKey, o steadymq.Outcome) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.decide(j.handled[key], o)
}

func (j *simJudge) decide(h *simHandled, o steadymq.Outcome) {
	h.allowed |= 1 << o
	switch o {
	case steadymq.Acked:
		j.acked[h.id] = true
	case steadymq.Discarded:
		j.discarded[h.id] = true
	}
}

// returned is called last in every handler.
func (j *simJudge) returned(h *simHandling, act simAct, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	h.run.inFlight--
	x := j.handled[h.key]
	switch {
	case x.allowed != 0: // it has settled by hand
	case err == nil && act != actMultiple:
		j.decide(x, steadymq.Acked)
	case act == actDiscard:
		j.decide(x, steadymq.Discarded)
	default:
		j.decide(x, steadymq.Requeued)
		if act == actFail || act == actPanic || act == actGoexit || act == actMultiple {
			x.held = time.Now().Add(h.c.plan.hold / 2)
		}
	}
	j.notNeedless(h, x)
}

// notNeedless sees to it that a handler whose consumer the broker has cancelled,
// and nothing else has happened, may still settle.
func (j *simJudge) notNeedless(h *simHandling, x *simHandled) {
	session := j.byTag[h.key.consumer]
	if j.s.plan.hold > 0 || session == nil || session.record.Cause != "cancelled by the broker" || h.c.stopping ||
		time.Since(session.record.Ended) > h.c.plan.drain-time.Second {
		return
	}
	marks := session.marks
	time.AfterFunc(j.s.plan.fast(), func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		if !x.settled && !h.c.stopping && h.c.run == h.run && j.s.disturbed.Load() == marks {
			j.note("I5", "a needless duplicate: %v was not settled on its cancelled consumer's channel", h.key)
		}
	})
}

// ended is called when a handler sees the end of its context.
func (j *simJudge) ended(h *simHandling, ctx context.Context) {
	cause := context.Cause(ctx)
	j.canary("a context's cause", cause)
	var lost *steadymq.SessionError
	var drain *steadymq.DrainError
	switch {
	case errors.As(cause, &drain), errors.Is(cause, steadymq.ErrHandlerTimeout):
	case errors.As(cause, &lost) && lost.Op == "lost" && lost.Err != nil:
	default:
		j.violate("ctx", "the context of handler %v ended with the cause %v", h.key, cause)
	}
}

// outlived is called when a handler's context did not end while it waited. The
// session may then not have been lost long before.
func (j *simJudge) outlived(h *simHandling, waited time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if limit := h.c.plan.handlerTimeout; limit > 0 && waited > limit+time.Second {
		j.note("ctx", "the context of handler %v goes on after the handler timeout", h.key)
	}
	x := j.byTag[h.key.consumer]
	if x == nil || x.record.Ended.IsZero() {
		return
	}
	switch x.record.Cause {
	case "cancelled by the client", "cancelled by the broker", "queue deleted", "consumer timeout", "broker killed":
		return // handlers may go on
	}
	if late := time.Since(x.record.Ended); late > 5*h.c.plan.heartbeat/2+2*time.Second {
		j.note("ctx", "the context of handler %v goes on %v after its session was lost (%s)", h.key, late, x.record.Cause)
	}
}

// tick looks at all consumers; it is called often, and only when nothing else
// can happen at that moment.
func (j *simJudge) tick() {
	j.mu.Lock()
	defer j.mu.Unlock()
	now := j.s.now()
	for _, c := range j.s.consumers {
		if !c.running || c.stopping || now < c.resumeBy {
			continue
		}
		j.resumed(c, now)
	}
}

func (j *simJudge) resumed(c *simConsumer, now time.Duration) {
	if c.live == 0 {
		j.note("I4", "%s is not consuming, it had until %v", c.plan.name, c.resumeBy)
		return
	}
	// A connection that was replaced stays for the running handlers of a cancelled session.
	if n := int(c.sockets.Load()); n > 1 && now > c.resumeBy+c.plan.drain+c.plan.shut+time.Second {
		j.note("I8", "%s has %d sockets open", c.plan.name, n)
	}
	if c.live > 1 && now > c.resumeBy+3*c.plan.heartbeat+c.plan.drain+c.plan.shut+2*time.Second {
		j.note("I8", "%s has %d consumers", c.plan.name, c.live)
	}
	if c.keep != nil && now <= c.keepUntil && c.latest != c.keep {
		j.note("I4", "%s has replaced its session without need", c.plan.name)
	}
}

// expect sets the bounds by which all must have healed from a burst that is
// about to begin.
func (j *simJudge) expect(b *simBurst) {
	j.mu.Lock()
	defer j.mu.Unlock()
	now := j.s.now()
	for _, c := range j.s.consumers {
		j.expectOf(c, b, now)
	}
}

func (j *simJudge) expectOf(c *simConsumer, b *simBurst, now time.Duration) {
	p := j.s.plan
	loose := b.healed(p, c.plan, true)
	quiet := now >= c.resumeBy
	c.looseBy = max(c.looseBy, loose)
	c.lone = quiet && len(b.faults) == 1 && b.faults[0].last == 0
	switch {
	case !c.running || c.stopping:
	case quiet && c.healthy(now):
		c.keep = nil
		if len(b.faults) == 1 && simKinds[b.faults[0].kind].harmless {
			if p.hold == 0 {
				c.keep, c.keepUntil = c.latest, b.faults[0].end()+time.Second
			}
			return
		}
		c.resumeBy = max(c.resumeBy, b.healed(p, c.plan, false))
	default:
		c.resumeBy, c.keep = max(c.resumeBy, loose), nil
	}
}
