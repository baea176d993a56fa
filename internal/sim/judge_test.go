package sim_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// simCanary is in every password of the simulation and may be in no output.
const simCanary = "c4nAry"

// simJudge sees what the broker sees, and what handlers do, and holds both against the invariants.
// It never asks the library; what the library tells its hooks is judged, too.
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
	streams    map[int]*simStream           // by queue
	offsets    map[string]int               // of the messages of streams
	unfit      map[string]bool              // messages that no handler can be given
	attempts   map[string][]simAttempt      // by message, in its queue
	places     map[simKey]int               // attempts of a stream's deliveries
	looks      map[uint64]bool              // sessions for no handler
	delivering uint64                       // counts deliveries
	moves      map[string][]*simMove        // by message
	moved      map[string]bool              // messages that a copy was to be made of
	seen       map[string][]simSeen         // what handlers saw of copies, by message
	emptied    map[string]bool              // queues beside others that a fault has deleted
	simWayJudge
}

// simAttempt is what a delivery called itself.
type simAttempt struct {
	key   simKey
	count int
}

// simPlace is where a message is: of one that comes back as a copy each has a record of its own.
type simPlace struct {
	queue  string
	record int
}

// simSession is one consumer as the broker knows it.
type simSession struct {
	record      steadymqtest.ConsumerRecord
	consumer    *simConsumer
	run         *simRun
	outstanding int
	settled     time.Time // first settlement
	marks       int64     // sim.disturbed when it ended
	end         int       // of a stream, when it began
	told        int       // of a stream, what had been acked when it began
	resumed     bool      // there has been a delivery of a stream
	moved       time.Time // last delivery or settlement
	orders      map[uint64]uint64
}

// simHandled is one delivery that a handler got.
type simHandled struct {
	id      string
	allowed uint8 // bit set of outcomes
	settled bool
	held    time.Time // not to be requeued before, while all is well
	run     *simRun
	stream  bool
	done    bool     // of a stream: handled for good
	again   bool     // of a stream: to be tried again
	move    *simMove // its copy is to be published
	working bool     // with order by key
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
		streams:    make(map[int]*simStream),
		offsets:    make(map[string]int),
		unfit:      make(map[string]bool),
		attempts:   make(map[string][]simAttempt),
		places:     make(map[simKey]int),
		looks:      make(map[uint64]bool),
		moves:      make(map[string][]*simMove),
		moved:      make(map[string]bool),
		seen:       make(map[string][]simSeen),
		emptied:    make(map[string]bool),

		simWayJudge: newSimWayJudge(),
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
	if strings.Contains(r.Tag, ".look") { // it looks where a stream ends, and settles nothing
		return
	}
	c := j.s.consumerOf(r.Tag)
	if c == nil {
		j.note("I1", "a consumer with a tag of nobody: %s", r.Tag)
		return
	}
	if j.byTag[r.Tag] != nil && j.used[r.Tag] { // one of a setup that failed may come again
		j.note("I1", "the consumer tag %s is used a second time", r.Tag)
	}
	if strings.HasSuffix(r.Tag, ".next") || j.looks[r.Session] { // it looks where a stream ends
		j.looks[r.Session] = true
		return
	}
	x := &simSession{record: r, consumer: c, run: c.run, moved: r.Started, orders: make(map[uint64]uint64)}
	j.place(x)
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
	j.goneInGroup(x)
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
	j.delivering++
	x.orders[r.Tag], x.moved = j.delivering, r.Time
	j.restored(x, r.ID)
	j.sentTo(x, &r)
	j.resumes(x, r.ID)
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
	x.moved = r.Time
	if x.settled.IsZero() {
		x.settled = r.Time
	}
	h := j.handled[simKey{x.record.Tag, r.Tag}]
	if j.streamOf(x.consumer) != nil {
		j.ackedInStream(x, h, &r)
		return
	}
	o := outcomeOf(&r)
	switch {
	case r.Kind == steadymqtest.Nack && h == nil && r.Requeue: // no handler had it
	case j.unfit[r.ID]:
		j.note("I3", "%v of a message that cannot be read: %+v", o, r)
	case h == nil:
		j.note("I3", "%v of a message that no handler had in that session: %+v", o, r)
	case h.id != r.ID:
		j.note("I3", "%v of message %s, its handler had %s: %+v", o, r.ID, h.id, r)
	case r.Kind == steadymqtest.Nack && h.move == nil:
		j.note("I3", "handed back as never started, but a handler had it: %+v", r)
	case h.move != nil && !j.movedWrongly(x, h.move, &r):
	case h.allowed&(1<<o) == 0:
		j.note("I3", "%v of a message whose handler has not decided so (%b): %+v", o, h.allowed, r)
	case x.consumer.tooEarly(h, &r) && x.record.Ended.IsZero() && !x.consumer.stopping:
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
	if h.run.inFlight++; h.run.inFlight > c.plan.atOnce() {
		j.note("I6", "%d handlers of %s at once, %d are allowed", h.run.inFlight, c.plan.name, c.plan.atOnce())
	}
	if ctx.Value(simRunKey{}) != h.run.key {
		j.note("ctx", "a handler's context has not the values of Run's")
	}
	if h.run.closed {
		j.note("I8", "a handler of %s started after the one that has stopped the Run", c.plan.name)
	}
	stream := j.streamOf(c) != nil
	switch before := j.handled[h.key]; {
	case before == nil:
	case !stream && c.plan.keys == 0 || !before.again:
		j.note("I3", "the delivery %v was handled twice", h.key)
	case time.Now().Before(before.held):
		j.note("hold", "a failed message of a stream was tried again %v too early: %v", time.Until(before.held), h.key)
	}
	if j.unfit[h.d.MessageId] {
		j.note("I3", "a handler got a message that cannot be read: %v", h.key)
	}
	j.notLate(h, ctx)
	j.lets(h)
	j.arrives(h)
	j.attempt(h)
	j.used[h.key.consumer] = true
	h.run.handled = true
	j.handled[h.key] = &simHandled{id: h.d.MessageId, run: h.run, stream: stream}
	j.takesTurn(h)
	of := h.d.MessageId
	if stream {
		of += " by " + c.plan.name
	}
	j.tries[of]++
	return j.tries[of]
}

// attempt notes what a delivery calls itself.
func (j *simJudge) attempt(h *simHandling) {
	n := h.d.Attempt()
	_, acquired := h.d.Headers["x-acquired-count"] // since 4.3: it may have come back untried
	if n < 1 || n == 1 && h.d.Redelivered && !acquired {
		j.note("attempt", "a redelivered message says that this is attempt %d: %v", n, h.key)
	}
	if j.streamOf(h.c) == nil { // there are tries in place only
		if j.places[h.key] == 0 { // else it is one in place, with a key
			j.attempts[h.d.MessageId] = append(j.attempts[h.d.MessageId], simAttempt{h.key, n})
			j.places[h.key] = n
			return
		}
	}
	if before := j.places[h.key]; n != before+1 {
		j.note("attempt", "attempt %d of a message of a stream is followed by %d: %v", before, n, h.key)
	}
	j.places[h.key] = n
}

// counted sees to it that Attempt has never gone back while a message was in one queue. A copy that
// comes back to it is another message.
func (j *simJudge) counted(l *steadymqtest.Ledger) {
	records := make(map[simKey]int)
	if j.s.retries {
		for i := range l.Deliveries {
			records[simKey{l.Deliveries[i].ConsumerTag, l.Deliveries[i].Tag}] = l.Deliveries[i].Message
		}
	}
	for id, attempts := range j.attempts {
		slices.SortFunc(attempts, func(a, b simAttempt) int { return cmp.Compare(j.order(a.key), j.order(b.key)) })
		last := make(map[simPlace]simAttempt)
		for _, a := range attempts {
			x := j.byTag[a.key.consumer]
			if x == nil || j.order(a.key) == 0 {
				continue
			}
			in := simPlace{x.record.Queue, records[a.key]}
			if before := last[in]; a.count < before.count {
				j.note("attempt", "%s was attempt %d in %v and then %d in %v", id, before.count, before.key, a.count, a.key)
			}
			last[in] = a
		}
	}
}

// order is when the broker has sent a delivery, among all.
func (j *simJudge) order(key simKey) uint64 {
	if x := j.byTag[key.consumer]; x != nil {
		return x.orders[key.delivery]
	}
	return 0
}

// notLate sees to it that no handler gets a delivery of a session that is known to be lost.
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
	j.decided(h, o)
	if h.stream {
		h.again = h.again || o == steadymq.Requeued
		if o != steadymq.Requeued {
			h.done = true
			h.run.reading.done[j.offset(h.id)] = true
		}
	}
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
	j.tells(h, act, err)
	x := j.handled[h.key]
	x.working = false
	switch {
	case act == actKeep && !errors.Is(err, errSimHandler):
		j.keeps(h, x)
	case x.allowed != 0: // it has settled by hand
	case err == nil && act != actMultiple:
		j.decide(x, steadymq.Acked)
	case act == actDiscard:
		j.decide(x, steadymq.Discarded)
	case j.follows(h, act, err):
	default:
		j.decide(x, steadymq.Requeued)
		x.again = x.again || act != actRequeue && act != actRequeueAfter // in place, with a key
		if act == actPark || act == actFail || act == actPanic || act == actGoexit || act == actMultiple {
			x.held = time.Now().Add(h.c.plan.hold / 2)
		}
	}
	j.notNeedless(h, x)
}

// notNeedless sees to it that a handler whose consumer the broker has cancelled, and nothing else
// has happened, may still settle.
func (j *simJudge) notNeedless(h *simHandling, x *simHandled) {
	session := j.byTag[h.key.consumer]
	if j.s.plan.hold > 0 || session == nil || x.stream || x.move != nil || h.c.lagging() || session.record.Cause != "cancelled by the broker" || h.c.stopping ||
		time.Since(session.record.Ended) > h.c.plan.drain-time.Second {
		return
	}
	marks := session.marks
	time.AfterFunc(j.s.plan.fast(h.c.plan), func() {
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

// outlived is called when a handler's context did not end while it waited. The session may then not
// have been lost long before.
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
	if handlersGoOn(x.record.Cause) || x.record.Cause == "broker killed" {
		return
	}
	// The end stands behind what is on its way to the client.
	if late := time.Since(x.record.Ended); late > 5*h.c.plan.heartbeat/2+2*time.Second+h.c.plan.lag {
		j.note("ctx", "the context of handler %v goes on %v after its session was lost (%s)", h.key, late, x.record.Cause)
	}
}

// tick looks at all consumers; it is called often, and only when nothing else can happen at that
// moment.
func (j *simJudge) tick() {
	j.mu.Lock()
	defer j.mu.Unlock()
	now := j.s.now()
	for _, c := range j.s.consumers {
		if !c.running || c.stopping || c.withheld(now) || now < c.resumeBy {
			continue
		}
		j.resumed(c, now)
		j.unstalled(c, now)
	}
	j.orphans(now)
	if g := j.s.group; g != nil {
		g.connected(now)
	}
}

func (j *simJudge) resumed(c *simConsumer, now time.Duration) {
	if c.live == 0 {
		j.note("I4", "%s is not consuming, it had until %v", c.plan.name, c.resumeBy)
		return
	}
	// A connection that was replaced stays for the running handlers of a cancelled session.
	most := 1
	if c.plan.retry != nil {
		most += 2 // its publisher's, and an earlier one that closes slowly
	}
	if c.plan.stall > 0 {
		most++ // it asks another host
	}
	if n := int(c.sockets.Load()); c.group == nil && n > most && now > c.resumeBy+c.plan.drain+c.plan.shut+time.Second {
		j.note("I8", "%s has %d sockets open", c.plan.name, n)
	}
	if c.live > 1 && now > c.resumeBy+3*c.plan.heartbeat+c.plan.drain+c.plan.shut+2*time.Second {
		j.note("I8", "%s has %d consumers", c.plan.name, c.live)
	}
	moved := c.group != nil && c.keep != nil && c.keep.record.Cause == "cancelled by the client" // to another connection
	if c.keep != nil && now <= c.keepUntil && c.latest != c.keep && !moved {
		j.note("I4", "%s has replaced its session without need", c.plan.name)
	}
}

// expect sets the bounds by which all must have healed from a burst that is about to begin.
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
	for _, f := range j.s.current {
		if !f.harmless(c.plan) || simKinds[f.kind].hinders {
			loose, quiet = max(loose, f.noticed(c.plan)+p.tail(c.plan)), false
		}
	}
	if p.hold > 0 { // which ends sessions beside a fault that only keeps new ones from beginning
		for _, f := range b.faults {
			if simKinds[f.kind].hinders {
				loose, quiet = max(loose, f.noticed(c.plan)+p.tail(c.plan)), false
			}
		}
	}
	c.looseBy = max(c.looseBy, loose)
	c.lone = quiet && len(b.faults) == 1 && b.faults[0].last == 0
	switch {
	case !c.running || c.stopping:
	case quiet && c.healthy(now):
		c.keep = nil
		if len(b.faults) == 1 && b.faults[0].harmless(c.plan) {
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

// harmless tells that no session of c may end because of f.
func (f simFault) harmless(c *simConsumerPlan) bool {
	k := &simKinds[f.kind]
	return k.harmless && !(k.stalls && c.stall > 0)
}

// stalled judges a session that the stall detector has ended: without a fault there is no stall.
func (j *simJudge) stalled(c *simConsumer, cause error) {
	if !strings.Contains(cause.Error(), "stalled: ") {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if q := &j.s.plan.queues[c.plan.queue]; q.kind == "stream" && q.purged {
		// It may wait at its old place in a stream that others have declared anew, where the detector
		// ends each session.
		c.resumeBy = max(c.resumeBy, j.s.now()+j.s.plan.tail(c.plan))
		return
	}
	calm := j.s.now() - j.s.lastMark
	if strings.Contains(cause.Error(), "does not answer") { // its limit counts silence, too
		calm -= c.plan.patience(&simKind{pace: paceHang})
	}
	if j.s.active.Load() == 0 && calm > 2*c.plan.stall+c.plan.setup+10*time.Second+c.plan.lag {
		j.note("stall", "a session of %s was ended though nothing has happened for %v: %v", c.plan.name, calm, cause)
	}
}

// unstalled sees to it that the stall detector leaves a host that is cut off while messages wait.
// It is judged only where one can know that: the host's own word, or that of two others.
func (j *simJudge) unstalled(c *simConsumer, now time.Duration) {
	x, p := c.latest, j.s.plan
	if c.plan.stall == 0 || c.plan.channelMax == 1 || c.group != nil && c.plan.channelMax > 0 || x == nil || c.live != 1 || p.queues[c.plan.queue].kind == "stream" || len(p.users(c.plan.queue)) > 1 ||
		j.s.cut[x.record.Host] == cutNot || x.outstanding >= c.plan.prefetch || c.lagging() || j.s.active.Load() > 1 {
		c.starved = now
		return
	}
	plain := p.hosts == 3 && !p.urlFunc && !c.plan.balanced
	if !plain && (j.s.cut[x.record.Host] != cutWaiting || p.hosts == 1) || j.s.broker.QueueLen(x.record.Queue) <= 0 {
		c.starved = now
		return
	}
	since := max(c.starved, x.moved.Sub(j.s.start))
	if limit := 2*c.plan.stall + 5*time.Second + time.Second + 2*p.connect(); now-since > limit {
		j.note("stall", "%s stays on %s, which has been cut off for %v while messages wait", c.plan.name, x.record.Host, now-since)
	}
}

// orphans sees to it that no queue of the broker's naming is left behind.
func (j *simJudge) orphans(now time.Duration) {
	if !slices.ContainsFunc(j.s.plan.queues, func(q simQueuePlan) bool { return q.kind == "named" }) {
		return
	}
	for _, c := range j.s.consumers {
		p := c.plan
		if !c.running || c.stopping || c.withheld(now) || now < c.resumeBy+3*p.heartbeat+p.drain+p.shut+2*time.Second {
			return
		}
	}
	for _, name := range j.s.broker.Queues() {
		if isNamed(name) && len(j.s.broker.Consumers(name)) == 0 {
			j.note("own", "nobody consumes from the queue %s, which the broker has named", name)
		}
	}
}

// closes notes that a handler ends the context of its Run: with one worker it is the last.
func (j *simJudge) closes(run *simRun, c *simConsumer) {
	j.mu.Lock()
	defer j.mu.Unlock()
	run.closed = c.plan.concurrency == 1
}

// handlersGoOn tells that a session has ended in such a way that its handlers may still settle.
func handlersGoOn(cause string) bool {
	switch cause {
	case "cancelled by the client", "cancelled by the broker", "queue deleted", "consumer timeout":
		return true
	}
	return false
}
