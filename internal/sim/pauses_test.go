package sim_test

import (
	"context"
	"errors"
	"hash/fnv"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"

	"github.com/steadymq/steadymq"
)

// Pause and Resume, WithBreaker, WithRate, loops over Deliveries and WithStreamOffsets: what a seed
// decides about them, and I23 to I27.

// The streams that they are drawn from, one each, so that a seed without one of them is what it was.
const (
	simPauseStream   = 0x9a05e
	simBreakerStream = 0xb4ea4
	simRateStream    = 0x4a7e5
	simLoopStream    = 0x100b5
	simStoreStream   = 0x5704e
)

// simPausesPlan is what a seed decides about one consumer.
type simPausesPlan struct {
	pauses  []simSpan
	atStop  bool // and one from right before the last stop
	breaker *steadymq.Breaker
	ill     []simSpan // when all of its handlers fail
	starts  int       // of WithRate, 0 for none
	per     time.Duration
	loop    bool
	store   bool
}

// none reports whether nothing of it was drawn.
func (p *simPausesPlan) none() bool {
	return len(p.pauses) == 0 && !p.atStop && p.breaker == nil && p.starts == 0 && !p.loop && !p.store
}

type simSpan struct{ from, to time.Duration }

func (s simSpan) has(at time.Duration) bool { return s.from <= at && at < s.to }

func (p *simPlan) drawPauses() {
	of := func(stream uint64) *rand.Rand { return rand.New(rand.NewPCG(p.seed, stream)) }
	pauses, breaker, rate, loop, store := of(simPauseStream), of(simBreakerStream), of(simRateStream), of(simLoopStream), of(simStoreStream)
	for i := range p.consumers {
		c := &p.consumers[i]
		p.drawLoop(loop, c)
		p.drawPause(pauses, c)
		p.drawBreaker(breaker, c)
		p.drawRate(rate, c)
		c.pauses.store = oneIn(store, 8) && p.queues[c.queue].kind == "stream" || oneIn(store, 2) && p.queues[c.queue].kind == "stream"
	}
}

// drawPause draws some pauses at random, and some across the beginning and the end of a Run.
func (p *simPlan) drawPause(r *rand.Rand, c *simConsumerPlan) {
	if !oneIn(r, 8) {
		return
	}
	w := &c.pauses
	for at := between(r, 0, time.Minute); ; at += between(r, 0, 2*time.Minute) {
		if run := pick(r, c.runs...); oneIn(r, 3) {
			at = max(at, pick(r, run.start, run.stop)-between(r, 0, 2*time.Second))
		}
		span := simSpan{at, at + between(r, 0, pick(r, time.Second, 10*time.Second, time.Minute, 4*time.Minute))}
		if span.to > p.chaos() {
			break
		}
		w.pauses = append(w.pauses, span)
		at = span.to
	}
	w.atStop = oneIn(r, 3)
}

func (p *simPlan) drawBreaker(r *rand.Rand, c *simConsumerPlan) {
	// A message that always fails would open it for ever.
	if !oneIn(r, 8) || c.pauses.loop || c.retry != nil && p.poison > 0 {
		return
	}
	w := &c.pauses
	w.breaker = &steadymq.Breaker{Failures: 1 + r.IntN(5), Wait: between(r, time.Second, pick(r, 3*time.Second, 30*time.Second, 3*time.Minute))}
	for at := between(r, 0, time.Minute); at < p.chaos(); at += between(r, 5*time.Second, 2*time.Minute) {
		w.ill = append(w.ill, simSpan{at, at + between(r, time.Second, time.Minute)})
		at = w.ill[len(w.ill)-1].to
	}
}

func (p *simPlan) drawRate(r *rand.Rand, c *simConsumerPlan) {
	starts, per, use := 1+r.IntN(pick(r, 10, 100, 1000)), between(r, 10*time.Millisecond, pick(r, 100*time.Millisecond, time.Second, 10*time.Second)), oneIn(r, 8)
	// One that is slower could not keep up with what is published.
	if slowest := int(per/(500*time.Millisecond)) + 1; starts < slowest {
		starts = slowest
	}
	// Nor shall what waits for it meet a consumer timeout of which the library has not been told.
	if use && p.hold == 0 {
		c.pauses.starts, c.pauses.per = starts, per
	}
}

// drawLoop lets a consumer alone be a loop, without the options that are about handlers.
func (p *simPlan) drawLoop(r *rand.Rand, c *simConsumerPlan) {
	if !oneIn(r, 8) || p.group != nil || c.retry != nil {
		return
	}
	c.pauses.loop = true
	c.concurrency, c.handlerTimeout, c.middleware = 1, 0, false
	for i := range c.runs {
		c.runs[i].broken = false
	}
}

// slack is how much longer a consumer may need for its last messages.
func (w *simPausesPlan) slack() (d time.Duration) {
	if w.breaker != nil {
		d += w.breaker.Wait + 2*time.Minute
	}
	if w.starts > 0 {
		d += 15 * time.Minute
	}
	return d
}

// handlersOptions are those that a loop does not have, and those of this file.
func (c *simConsumer) handlersOptions() (o []steadymq.Option) {
	p, w := c.plan, &c.plan.pauses
	if !w.loop {
		o = append(o, steadymq.WithConcurrency(p.concurrency), steadymq.WithRequeueDelay(p.hold, p.longest))
	}
	if w.breaker != nil {
		o = append(o, steadymq.WithBreaker(*w.breaker))
	}
	if w.starts > 0 {
		o = append(o, steadymq.WithRate(w.starts, w.per))
	}
	if w.store {
		if c.valve.store == nil {
			c.valve.store = &simStore{c: c}
		}
		o = append(o, steadymq.WithStreamOffsets(c.valve.store))
	}
	return o
}

// simValve is what the judge knows of what keeps a consumer from starting handlers. Its mutex guards
// it.
type simValve struct {
	store  *simStore // lasts
	paused bool
	since  time.Duration // when it was last paused or resumed

	open      *steadymq.BreakerError // as the hook has told it
	closed    *steadymq.BreakerError // that was open before
	opened    time.Duration          // when it was told that
	unsure    bool                   // one has succeeded that may have begun before it opened
	trying    *simHandling           // the one let through
	failed    int                    // handlers since it was last open
	succeeded time.Duration          // when one last has
	freed     time.Duration          // when it was last neither paused nor open

	starts []time.Duration // of late, where there is a rate
}

// resetPauses is for a new Consumer.
func (c *simConsumer) resetPauses() {
	c.s.judge.mu.Lock()
	defer c.s.judge.mu.Unlock()
	c.consumer, c.valve = nil, simValve{store: c.valve.store}
}

// pauseEvents are the pauses at their times.
func (s *sim) pauseEvents(add func(time.Duration, func())) {
	for _, c := range s.consumers {
		for _, span := range c.plan.pauses.pauses {
			add(span.from, c.pause)
			add(span.to, c.resume)
		}
	}
}

func (c *simConsumer) pause() {
	j := c.s.judge
	j.mu.Lock()
	consumer := c.consumer
	if consumer != nil {
		c.valve.paused, c.valve.since = true, c.s.now()
	}
	j.mu.Unlock()
	if consumer != nil { // else it is in no group
		consumer.Pause()
	}
}

func (c *simConsumer) resume() {
	j := c.s.judge
	j.mu.Lock()
	consumer, was := c.consumer, c.valve.paused
	if was {
		c.valve.paused, c.valve.since = false, c.s.now()
		c.free()
	}
	j.mu.Unlock()
	if was {
		consumer.Resume()
	}
}

// pauseAtStop pauses some right before the end.
func (s *sim) pauseAtStop() {
	for _, c := range s.consumers {
		if c.plan.pauses.atStop {
			c.pause()
		}
	}
}

// withheld tells that c need not consume now: it is paused, or its breaker is open. It is called with
// mu held.
func (c *simConsumer) withheld(now time.Duration) bool {
	v := &c.valve
	if v.paused || v.open != nil || v.unsure {
		return true
	}
	if c.state == steadymq.Paused && c.running && !c.stopping && now > v.freed {
		c.s.judge.note("I23", "%s is still paused, and was to go on at %v", c.plan.name, v.freed)
	}
	return false
}

// free gives c the time to consume again: on the connection that there is, or as after a fault that
// is near. It is called with mu held.
func (c *simConsumer) free() {
	now, p := c.s.now(), c.s.plan
	c.valve.freed, c.starved, c.keep = now, now, nil
	by := now + p.fast(c.plan)
	if c.s.active.Load() > 0 || now < c.looseBy || p.roundabout(c.plan) || now < c.resumeBy {
		by = max(c.looseBy, now+p.tail(c.plan))
	}
	c.resumeBy = max(c.resumeBy, by)
}

// entered tells that a change of state is the first one that tells of a session. It is called with
// mu held.
func (c *simConsumer) entered(x steadymq.StateChange) bool {
	paused := x.To == steadymq.Paused || x.To == steadymq.Consuming && x.From == steadymq.Paused
	is := x.To == steadymq.Consuming && !paused || paused && x.ConsumerTag != "" && x.ConsumerTag != c.run.tag
	c.run.tag = x.ConsumerTag
	c.turned(x)
	return is
}

// turned follows what the hook tells of the breaker, which says in the cause why it has opened.
func (c *simConsumer) turned(x steadymq.StateChange) {
	v := &c.valve
	open := new(steadymq.BreakerError)
	switch {
	case x.To == steadymq.Stopped && c.group == nil:
		c.run.cause = x.Cause
	case x.To == steadymq.Consuming && v.open != nil:
		// One that opened during a pause is told at the moment at which it lets one through.
		if v.succeeded != v.opened && c.s.now() > v.opened {
			c.s.judge.note("I24", "the breaker of %s has closed without a success", c.plan.name)
		}
		v.open = nil
		c.free()
	case x.To == steadymq.Consuming && v.unsure:
		v.unsure = false
		c.free()
	case x.To == steadymq.Paused && v.unsure && errors.As(x.Cause, &open) && open == v.closed:
		v.open, v.unsure = open, false
	case x.To == steadymq.Paused && errors.As(x.Cause, &open) && open != v.open && open != v.closed:
		v.open, v.opened, v.unsure = open, c.s.now(), false
		b := c.plan.pauses.breaker
		if b == nil || v.failed < b.Failures || open.Failures < b.Failures {
			c.s.judge.note("I24", "the breaker of %s has opened after %d failures: %v", c.plan.name, v.failed, open)
		}
		v.failed = 0
	}
}

// lets judges the start of a handler.
func (j *simJudge) lets(h *simHandling) {
	now, v := j.s.now(), &h.c.valve
	h.began = now
	if v.paused && now > v.since { // else its call was under way
		j.note("I23", "a handler of %s started %v after Pause", h.c.plan.name, now-v.since)
	}
	if v.open == nil || now == v.opened {
		return
	}
	if v.trying != nil {
		j.note("I24", "the open breaker of %s lets %v through, and %v has not come back", h.c.plan.name, h.key, v.trying.key)
	}
	v.trying = h
}

// tells follows the breaker by what handlers return.
func (j *simJudge) tells(h *simHandling, act simAct, err error) {
	v := &h.c.valve
	if err != nil || act == actMultiple { // which is refused
		v.failed++
	} else {
		v.succeeded = j.s.now()
	}
	if v.trying == h {
		v.trying = nil
	} else if v.open == nil || h.began < v.opened || h.run != h.c.run {
		return
	}
	if err == nil && act != actMultiple && v.open != nil {
		v.unsure = h.began == v.opened
		v.closed, v.open = v.open, nil
		v.failed = 0
		h.c.free()
	}
}

// sicken makes the handlers of a consumer with a breaker fail for a while.
func (c *simConsumer) sicken(act simAct) simAct {
	for _, span := range c.plan.pauses.ill {
		if span.has(c.s.now()) && !c.s.calm.Load() {
			return actFail
		}
	}
	return act
}

// simWindows are the windows that starts are counted in, in times of the rate's own.
var simWindows = []int{1, 2, 3, 5, 10, 30, 100}

// paced judges the start of a handler by WithRate.
func (c *simConsumer) paced() {
	w := &c.plan.pauses
	if w.starts == 0 {
		return
	}
	j := c.s.judge
	j.mu.Lock()
	defer j.mu.Unlock()
	v, now := &c.valve, c.s.now()
	v.starts = append(v.starts, now)
	for _, k := range simWindows {
		first, _ := slices.BinarySearch(v.starts, now-time.Duration(k)*w.per+1)
		most := k*w.starts + max(1, w.starts/10)
		if n := len(v.starts) - first; n > most {
			j.note("I25", "%d handlers of %s have started within %v, %d may", n, c.plan.name, time.Duration(k)*w.per, most)
		}
		if k == simWindows[len(simWindows)-1] {
			v.starts = slices.Delete(v.starts, 0, first)
		}
	}
}

// take is one Run, or one loop in its place.
func (c *simConsumer) take(ctx context.Context, run *simRun) error {
	if !c.plan.pauses.loop {
		return c.work(ctx, run)
	}
	l := &simLoop{c: c, run: run}
	return l.read(ctx)
}

// simLoop is one loop over Deliveries.
type simLoop struct {
	c     *simConsumer
	run   *simRun
	given []*steadymq.Delivery // and not settled
}

func (l *simLoop) read(ctx context.Context) (err error) {
	j, name, over := l.c.s.judge, l.c.plan.name, false
	for d, failed := range l.c.consumer.Deliveries(ctx) {
		if over || (d == nil) == (failed == nil) {
			j.violate("I26", "a loop of %s is given %v and %v, over %t", name, d, failed, over)
		}
		if failed != nil {
			err, over = failed, true
			continue
		}
		if l.turn(d) {
			l.leave()
			break
		}
	}
	for _, d := range l.given {
		if d.Outcome() == steadymq.Unsettled {
			j.violate("I26", "a loop of %s has ended, and delivery %d of %s is neither settled nor stale", name, d.DeliveryTag, d.ConsumerTag)
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if l.run.left { // nothing can be told to a body that has left
		return l.run.cause
	}
	return err
}

// leave notes that the body is about to leave the loop.
func (l *simLoop) leave() {
	l.c.ask(l.run)
	l.c.s.judge.mu.Lock()
	defer l.c.s.judge.mu.Unlock()
	l.run.left = true
}

// turn is the body.
func (l *simLoop) turn(d *steadymq.Delivery) (leaves bool) {
	c, j := l.c, l.c.s.judge
	h := &simHandling{s: c.s, c: c, run: l.run, d: d, key: simKey{d.ConsumerTag, d.DeliveryTag}}
	try := j.started(h, d.Context())
	c.paced()
	l.given = append(slices.DeleteFunc(l.given, func(d *steadymq.Delivery) bool { return d.Outcome() != steadymq.Unsettled }), d)
	h.dice = c.s.dice(d.MessageId, try)
	r := rand.New(rand.NewPCG(h.dice, 3))
	way, leaves := r.IntN(14), oneIn(r, 40) && !c.s.calm.Load()
	if try > 4 || c.s.calm.Load() {
		way = 0
	}
	if l.run.trip.Swap(false) {
		j.closes(l.run, c)
		l.run.stop()
	}
	l.body(h, way)
	j.mu.Lock()
	defer j.mu.Unlock()
	l.run.inFlight--
	return leaves
}

// body settles, or leaves that to a goroutine.
func (l *simLoop) body(h *simHandling, way int) {
	ack := func() { h.settleAs(steadymq.Acked, h.d.Ack) }
	switch way {
	case 0, 1, 2, 3:
		ack()
	case 4, 5:
		time.Sleep(h.span(500 * time.Millisecond))
		ack()
	case 6:
		_ = h.wait(h.d.Context(), h.span(8*time.Second))
		ack()
	case 7, 8, 9:
		h.s.work.Go(func() {
			time.Sleep(h.span(10 * time.Second))
			ack()
		})
	case 10: // as late as can be
		h.s.work.Go(func() {
			_ = h.wait(h.d.Context(), h.span(40*time.Second))
			ack()
		})
	case 11:
		h.settleAs(steadymq.Requeued, h.d.Requeue)
	case 12:
		h.settleAs(steadymq.Discarded, h.d.Discard)
	case 13:
		ack()
		h.expect(h.d.Requeue(), steadymq.ErrSettled, steadymq.ErrStale)
	}
}

func (h *simHandling) settleAs(o steadymq.Outcome, settle func() error) {
	h.expect(h.try(o, settle), nil, steadymq.ErrStale)
}

// simStore keeps the place of one consumer, over all of its Runs. The judge's mutex guards it.
type simStore struct {
	c     *simConsumer
	next  int64
	found bool
	calls uint64
}

// simStoreIll is how a call of the store is ill.
type simStoreIll int

const (
	storeFails simStoreIll = iota
	storePanics
	storeExits
	storeHangs
	storeLies // it does its work and fails
	numStoreIll
)

var errSimStore = errors.New("the store is away")

// dice tells whether a call goes wrong, and how.
func (st *simStore) dice() (how simStoreIll, ill bool) {
	st.calls++
	name := fnv.New64a()
	_, _ = name.Write([]byte(st.c.plan.name))
	r := rand.New(rand.NewPCG(st.c.s.plan.seed^name.Sum64(), st.calls))
	how = simStoreIll(r.IntN(int(numStoreIll)))
	return how, oneIn(r, 5) && !st.c.s.calm.Load()
}

func (how simStoreIll) strike(ctx context.Context) error {
	switch how {
	case storePanics:
		panic("the store panics")
	case storeExits:
		runtime.Goexit()
	case storeHangs:
		<-ctx.Done()
		return ctx.Err()
	}
	return errSimStore
}

func (st *simStore) Load(ctx context.Context, _ string) (next int64, found bool, err error) {
	c, j := st.c, st.c.s.judge
	c.s.work.Add(1)
	defer c.s.work.Done()
	j.mu.Lock()
	how, ill := st.dice()
	next, found = st.next, st.found
	if ill {
		c.trouble(c.s.now())
	} else if found {
		c.run.loaded = int(next)
	}
	j.mu.Unlock()
	if ill {
		return 0, false, how.strike(ctx)
	}
	return next, found, nil
}

func (st *simStore) Save(ctx context.Context, _ string, next int64) error {
	c, j := st.c, st.c.s.judge
	c.s.work.Add(1)
	defer c.s.work.Done()
	j.mu.Lock()
	how, ill := st.dice()
	j.saves(c, int(next))
	if !ill || how == storeLies {
		st.next, st.found = next, true
	}
	j.mu.Unlock()
	if ill {
		return how.strike(ctx)
	}
	return nil
}

// handledUpTo returns the first message from a place on that is still to be handled, or to.
func (j *simJudge) handledUpTo(c *simConsumer, run *simRun, from, to int) int {
	r, stream := &run.reading, j.streamOf(c)
	for n := from; n < to; n++ {
		if n < len(stream.published) && !r.done[n] && !stream.unfit[n] && !stream.published[n].Before(r.since) {
			return n
		}
	}
	return to
}

// saves judges a place that is saved: it is never ahead of what was handled.
func (j *simJudge) saves(c *simConsumer, next int) {
	run := c.run
	if j.s.plan.queues[c.plan.queue].purged {
		return
	}
	from := run.reading.from
	switch {
	case run.loaded >= 0:
		from = run.loaded
		if next < from {
			j.note("I27", "the place of %s has gone back from %d to %d", c.plan.name, from, next)
		}
	case !run.reading.known:
		return
	}
	if n := j.handledUpTo(c, run, from, next); n < next {
		j.note("I27", "%s has saved the place %d, message %d has not been handled", c.plan.name, next, n)
	}
}

// restored judges the first delivery of a session by what the store had for its Run.
func (j *simJudge) restored(x *simSession, id string) {
	c, from := x.consumer, x.run.loaded
	if x.resumed || from < 0 || j.s.plan.queues[c.plan.queue].purged {
		return
	}
	at := j.offset(id)
	if n := j.handledUpTo(c, x.run, from, at); at < from || n < at {
		j.note("I27", "session %s begins at %d, the store had %d, message %d has not been handled", x.record.Tag, at, from, n)
	}
}

// restore lets a Run read from what the store had for it.
func (run *simRun) restore() {
	if run.loaded >= 0 {
		run.reading.from, run.reading.since = run.loaded, time.Time{}
	}
}
