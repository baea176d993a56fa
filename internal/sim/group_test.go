package sim_test

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
	"weak"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq"
)

// simGroupPlan is what a seed decides about a Group. Its consumers are those of the plan, whose
// runs are the times from Group.Handle to Consumer.Stop.
type simGroupPlan struct {
	connections int
	consumer    simConsumerPlan // for the options of the connection
	runs        []simWindow     // of the Group
	bad         int             // the consumer that is as bad as one can be, -1 for none
	how         simBadness
	badSince    time.Duration
	badUntil    time.Duration
}

// simBadness is how one consumer of a Group is bad.
type simBadness int

const (
	badChannel    simBadness = iota // makes the broker close its channel after a second
	badConnection                   // makes the broker close the connection when it is set up
	badHang                         // does not come back from its set-up before the limit
	badIgnore                       // nor then
	badPanic
	badExit
	badError
	badHandler // comes back from no handler
	numBadness
)

// hangs tells that its set-up lasts for the limit.
func (b simBadness) hangs() bool { return b == badHang || b == badIgnore }

// simGroupStream is the stream that groups are drawn from. Whether there is one is its first draw,
// so that no seed of single consumers depends on what groups draw.
const simGroupStream = 0x96045

func drawsGroup(r *rand.Rand) bool { return r.IntN(10) < 3 }

// drawGroup draws a group and its consumers.
func (p *simPlan) drawGroup(r *rand.Rand) {
	n := 2 + r.IntN(7)
	if oneIn(r, 10) {
		n = pick(r, 1, 12, 20, 30)
	}
	p.group = &simGroupPlan{connections: pick(r, 1, 1, 1, 2, 3), runs: p.drawRuns(r), bad: -1}
	for i := range n - r.IntN(n/3+1) {
		p.drawQueue(r, i)
	}
	p.drawConsumersOf(r, n)
	for i := range p.consumers {
		p.consumers[i].runs = p.drawMembership(r)
	}
	p.drawBad(r)
}

// drawMembership draws when a consumer is in the group: before its Run or from a moment on, and
// some leave it and come back.
func (p *simPlan) drawMembership(r *rand.Rand) []simWindow {
	last := p.group.runs[len(p.group.runs)-1]
	at := time.Duration(0)
	if oneIn(r, 3) {
		at = min(between(r, 0, last.start+p.chaos()/4), p.chaos()-10*time.Second)
	}
	var runs []simWindow
	for oneIn(r, 3) {
		stop := at + between(r, 0, p.chaos()/2)
		if stop > p.chaos()-10*time.Second {
			break
		}
		runs = append(runs, simWindow{start: at, stop: stop})
		at = stop + between(r, 0, 20*time.Second)
	}
	return append(runs, simWindow{start: at, stop: simForEver})
}

// simForEver is after the end of everything.
const simForEver = 24 * time.Hour

func (p *simPlan) drawBad(r *rand.Rand) {
	g := p.group
	if len(p.consumers) < 2 || !oneIn(r, 2) {
		return
	}
	g.bad, g.how = r.IntN(len(p.consumers)), simBadness(r.IntN(int(numBadness)))
	if oneIn(r, 2) {
		g.badSince = between(r, 0, p.chaos()/4)
	}
	g.badUntil = g.badSince + between(r, 10*time.Second, p.chaos()/2)
	if c := &p.consumers[g.bad]; g.how != badHandler {
		c.topology, c.declare = true, false
	}
}

// shareOptions lets all consumers have the same options of the connection.
func (p *simPlan) shareOptions(r *rand.Rand) {
	g := p.group
	g.consumer = p.consumers[0]
	shared := &g.consumer
	shared.name, shared.bandwidth, shared.stall = "group", 0, 0
	if oneIn(r, 6) {
		shared.bandwidth = pick(r, 100_000, 500_000)
	}
	for i := range p.consumers {
		c := &p.consumers[i]
		shared.setup = max(shared.setup, c.setup)
		shared.stall = max(shared.stall, c.stall)
		c.heartbeat, c.dial, c.initial, c.limit = shared.heartbeat, shared.dial, shared.initial, shared.limit
		c.writeDelay, c.channelMax, c.balanced, c.bandwidth = shared.writeDelay, shared.channelMax, shared.balanced, 0
	}
	for i := range p.consumers {
		p.consumers[i].others = shared.setup
	}
	if g.bad >= 0 {
		p.consumers[g.bad].never = true
	}
}

// shareBandwidth makes a slow path one on which no answer stands behind more than two seconds of
// deliveries, to all of the group.
func (p *simPlan) shareBandwidth() {
	shared := &p.group.consumer
	if shared.bandwidth == 0 {
		return
	}
	ahead := 0
	for _, c := range p.consumers {
		ahead += c.prefetch * (p.queues[c.queue].body + 200)
	}
	shared.bandwidth = max(shared.bandwidth, ahead/2)
	for i := range p.consumers {
		p.consumers[i].lag = time.Second + time.Duration(ahead)*time.Second/time.Duration(shared.bandwidth)
	}
}

// slowest is the set-up limit of whoever dials for c.
func (c *simConsumerPlan) slowest() time.Duration { return max(c.setup, c.others) }

// simGroup is one Group after the other, with the same consumers.
type simGroup struct {
	s      *sim
	plan   *simGroupPlan
	path   *simPath
	mended chan struct{} // closed when the bad consumer is good again
	mend   func()

	// The judge's mutex guards these.
	group   *steadymq.Group
	run     *simGroupRun
	changed time.Duration // when the last consumer came or went
	apart   []simApart    // of late
}

// simApart is how many consumers a group has called isolated.
type simApart struct {
	at    time.Duration
	count int
}

// simGroupRun is one Run of a Group.
type simGroupRun struct {
	over     chan struct{}
	players  sync.WaitGroup
	asked    time.Duration // when its context was cancelled, or it began to end by itself; -1 before
	byItself bool
	culprit  *simConsumer // whose failure ends it
	returned bool
}

func newSimGroup(s *sim) *simGroup {
	g := &simGroup{s: s, plan: s.plan.group, mended: make(chan struct{})}
	g.mend = sync.OnceFunc(func() { close(g.mended) })
	g.path = newSimPath(s, &g.plan.consumer)
	g.path.group = g
	for i := range s.plan.consumers {
		c := &simConsumer{simPath: g.path, s: s, plan: &s.plan.consumers[i]}
		c.told = make(map[weak.Pointer[steadymq.Delivery]]bool)
		c.reset()
		s.consumers = append(s.consumers, c)
	}
	return g
}

// mend makes the bad consumer of a group good.
func (s *sim) mend() {
	if s.group != nil {
		s.group.mend()
	}
}

// story runs Groups as often as the plan says.
func (g *simGroup) story() {
	c := g.s.consumers[0]
	for i, w := range g.plan.runs {
		if !c.sleepUntil(w.start) {
			return
		}
		last := i == len(g.plan.runs)-1
		for g.once(&w, last) {
			if !c.sleepUntil(g.s.now() + time.Second) {
				return
			}
		}
	}
}

// once makes a Group, runs it and has it stopped; it reports whether Run gave up before.
func (g *simGroup) once(w *simWindow, last bool) (again bool) {
	run := &simGroupRun{over: make(chan struct{}), asked: -1}
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), simRunKey{}, run))
	defer cancel()
	g.make(run)
	timer := time.NewTimer(w.stop - g.s.now())
	if last {
		timer.Stop()
	}
	g.s.work.Go(func() {
		select {
		case <-timer.C:
		case <-g.s.over:
		case <-run.over:
			return
		}
		g.ask(run)
		cancel()
	})
	for _, c := range g.s.consumers {
		run.players.Go(func() { g.play(c, run) })
	}
	err := g.group.Run(ctx)
	close(run.over)
	run.players.Wait()
	g.s.judge.mu.Lock()
	run.returned = true
	g.s.judge.mu.Unlock()
	g.returned(run, err)
	return ctx.Err() == nil
}

// make makes the Group, with the consumers that are in it from the beginning.
func (g *simGroup) make(run *simGroupRun) {
	first, o := g.path.access()
	o = append(o, steadymq.WithConnections(g.plan.connections), steadymq.WithLogger(slog.New(&simGroupLog{g})))
	group, err := steadymq.NewGroup(first, o...)
	if err != nil {
		panic(err)
	}
	g.s.judge.canary("a Group", group)
	g.s.judge.mu.Lock()
	g.group, g.run = group, run
	g.s.judge.mu.Unlock()
	for _, c := range g.s.consumers {
		if slices.ContainsFunc(c.plan.runs, func(w simWindow) bool { return w.start <= g.s.now() && g.s.now() < w.stop }) {
			g.join(c, run)
		}
	}
}

// play lets a consumer come and go while the Group runs.
func (g *simGroup) play(c *simConsumer, run *simGroupRun) {
	for _, w := range c.plan.runs {
		if w.stop <= g.s.now() {
			continue
		}
		if !run.sleepUntil(w.start - g.s.now()) {
			return
		}
		if !c.isRunning() {
			g.join(c, run)
		}
		if !run.sleepUntil(w.stop - g.s.now()) {
			return
		}
		g.leave(c, run)
	}
}

// sleepUntil reports whether that time comes before the end of the Run.
func (r *simGroupRun) sleepUntil(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-r.over:
		return false
	}
}

func (c *simConsumer) isRunning() bool {
	c.s.judge.mu.Lock()
	defer c.s.judge.mu.Unlock()
	return c.running
}

// join gives the group one more consumer.
func (g *simGroup) join(c *simConsumer, of *simGroupRun) {
	run := newSimRun()
	run.start, run.key = g.s.now(), of
	c.reset()
	c.begin(run)
	consumer, err := g.handle(c, run)
	j := g.s.judge
	j.mu.Lock()
	defer j.mu.Unlock()
	g.changed = g.s.now()
	switch {
	case err == nil:
		c.consumer, c.past = consumer, append(c.past, consumer)
		if of.asked >= 0 && run.asked < 0 { // the group has begun to end meanwhile
			run.asked, c.stopping = of.asked, true
		}
	case of.asked >= 0:
		c.running = false
	default:
		panic(err)
	}
}

// leave stops a consumer alone.
func (g *simGroup) leave(c *simConsumer, of *simGroupRun) {
	j := g.s.judge
	j.mu.Lock()
	run := c.run
	stops := c.running && of.asked < 0
	if stops {
		run.alone, g.changed = true, g.s.now()
	}
	j.mu.Unlock()
	if !stops {
		return
	}
	c.ask(run)
	err := c.consumer.Stop(context.Background())
	c.returned(run, err)
	if slices.Contains(g.group.Consumers(), c.consumer) && of.asked < 0 {
		j.violate("I9", "%s was stopped and is still in the group", c.plan.name)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	g.changed = g.s.now()
}

// ask is called right before the context of the Group's Run is cancelled.
func (g *simGroup) ask(run *simGroupRun) {
	j := g.s.judge
	j.mu.Lock()
	ended := run.asked >= 0
	if !ended {
		run.asked = g.s.now()
	}
	j.mu.Unlock()
	for _, c := range g.s.consumers {
		if !ended && c.isRunning() && c.run.asked < 0 {
			c.ask(c.run)
		}
	}
}

// returned judges what the Group's Run returned, and when.
func (g *simGroup) returned(run *simGroupRun, err error) {
	j, now, limit := g.s.judge, g.s.now(), time.Duration(0)
	j.canary("the error of a group", err)
	if n := g.path.sockets.Load(); n != 0 {
		j.violate("I8", "the group has %d sockets open after Run had returned %v", n, err)
	}
	if n := g.group.Stats(); n.Open != 0 || n.Isolated != 0 {
		j.violate("I9", "the group still counts %+v", n)
	}
	g.names(err)
	for _, c := range g.s.consumers {
		limit = max(limit, c.plan.drain+c.plan.shut+time.Second)
		if c.isRunning() {
			g.tells(err, c)
			c.returned(c.run, c.run.cause)
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case run.asked < 0 || run.byItself && run.culprit == nil:
		j.note("I4", "Run of the group ended though nobody gave up: %v", err)
	case now-run.asked > limit:
		j.note("I8", "the group took %v to stop, the limit is %v", now-run.asked, limit)
	}
	if run.culprit != nil && err == nil {
		j.note("I9", "%s gave up, which the group's Run does not tell", run.culprit.plan.name)
	}
}

// names judges whether each of the errors that a Group's Run has joined names a queue.
func (g *simGroup) names(err error) {
	if err == nil {
		return
	}
	all := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		all = joined.Unwrap()
	}
	names := func(e error) bool {
		if at := new(*steadymq.SessionError); errors.As(e, at) && ((*at).Op == "dial" || (*at).Op == "open") {
			return true // a connection is that of all
		}
		return slices.ContainsFunc(g.s.consumers, func(c *simConsumer) bool { return c.named(e) })
	}
	if !names(err) || len(all) > 2 && !slices.ContainsFunc(all, names) {
		g.s.judge.violate("I9", "the error of the group names none of its queues: %v", err)
	}
}

// named tells whether an error names the consumer's queue.
func (c *simConsumer) named(err error) bool {
	text, q := err.Error(), &c.s.plan.queues[c.plan.queue]
	if q.kind == "named" {
		var at *steadymq.SessionError // before its first session nobody knows a name
		return strings.Contains(text, "amq.gen-") || strings.Contains(text, c.plan.name+":") || errors.As(err, &at) && at.Queue == ""
	}
	return strings.Contains(text+" ", q.name+" ") || strings.Contains(text, q.name+":") || strings.Contains(text, q.name+`"`) || strings.Contains(text, q.name+",")
}

// tells judges whether the error of a Group's Run has that of c's in it. What several say of one
// connection it tells once.
func (g *simGroup) tells(err error, c *simConsumer) {
	var at *steadymq.SessionError
	cause := c.run.cause
	if cause == nil || errors.As(cause, &at) && (at.Op == "dial" || at.Op == "open") {
		return
	}
	if err == nil || !strings.Contains(err.Error(), cause.Error()) {
		g.s.judge.violate("I9", "the error of the group leaves out that of %s, %v: %v", c.plan.name, cause, err)
	}
}

// stats are those of all Consumers that c has been.
func (c *simConsumer) stats() steadymq.Stats {
	if c.group == nil {
		return c.consumer.Stats()
	}
	var sum steadymq.Stats
	for _, past := range c.past {
		n := past.Stats()
		sum.Acked += n.Acked
		sum.Requeued += n.Requeued
		sum.Discarded += n.Discarded
		sum.Stale += n.Stale
		sum.Parked += n.Parked
		sum.Delayed += n.Delayed
		sum.Delivered += n.Delivered
		sum.Handling += n.Handling
		sum.Held += n.Held
		sum.Overdue += n.Overdue
	}
	return sum
}

// isBad tells whether c is the bad consumer of its group, and bad at that time.
func (c *simConsumer) isBad(now time.Duration) bool {
	g := c.group
	return g != nil && g.plan.bad >= 0 && c.plan == &c.s.plan.consumers[g.plan.bad] && g.plan.badSince <= now && now < g.plan.badUntil && !c.s.calm.Load()
}

// misbehave is called in the topology function.
func (c *simConsumer) misbehave(ctx context.Context, ch *amqp.Channel) error {
	if !c.isBad(c.s.now()) {
		return nil
	}
	switch c.group.plan.how {
	case badChannel:
		c.s.work.Go(func() {
			time.Sleep(time.Second)
			_, _ = ch.QueueDeclarePassive("nobody's", true, false, false, false, nil)
		})
	case badConnection:
		return ch.Qos(1, 1, false)
	case badHang:
		<-ctx.Done()
		return ctx.Err()
	case badIgnore:
		time.Sleep(c.plan.setup + 2*time.Second)
	case badPanic:
		panic("the topology of the bad consumer panics")
	case badExit:
		runtime.Goexit()
	case badError:
		return errSimStray
	}
	return nil
}

// getStuck is called in every handler.
func (c *simConsumer) getStuck() {
	if c.isBad(c.s.now()) && c.group.plan.how == badHandler {
		<-c.group.mended
	}
}

// beginInGroup is called when a consumer joins.
func (c *simConsumer) beginInGroup(run *simRun) {
	g := c.group
	if g == nil || g.plan.bad < 0 || run.start >= g.plan.badUntil {
		return
	}
	switch bad := &c.s.plan.consumers[g.plan.bad]; {
	case c.plan == bad:
		c.resumeBy = max(c.resumeBy, g.goodBy(c))
	case g.plan.how == badConnection: // its first two set-ups end the connection
		c.resumeBy = max(c.resumeBy, run.start+c.s.plan.tail(c.plan))
	}
}

// goodBy is when the bad consumer has to consume at the latest.
func (g *simGroup) goodBy(c *simConsumer) time.Duration {
	by := g.plan.badUntil + 2*g.s.plan.tail(c.plan) + c.plan.drain + c.plan.shut
	if g.plan.how.hangs() {
		by += c.plan.patience(&simKind{pace: paceHang})
	}
	if g.s.plan.owns(c.plan) {
		by += 3*c.plan.heartbeat + 2*time.Second
	}
	return by
}

// changedInGroup follows the states: one that drains unasked has given up, and the group with it.
func (c *simConsumer) changedInGroup(x steadymq.StateChange) {
	g := c.group
	if g == nil {
		return
	}
	now := c.s.now()
	switch x.To {
	case steadymq.Stopped:
		c.run.ended, c.run.cause = now, x.Cause
		if c.run.byItself {
			g.ends(now) // the others are asked only now
		}
	case steadymq.Draining:
		if c.run.asked >= 0 && g.run.culprit != nil {
			return
		}
		if x.Cause != nil && g.run.culprit == nil && !c.run.alone && (g.run.asked < 0 || g.run.asked == now && !c.run.healthy) {
			g.run.culprit = c
			c.gaveUp(c.run, x.Cause, now)
		}
		if c.run.asked < 0 {
			c.run.byItself = true
			c.asksItself(now)
		}
	}
}

// ends notes that a Group ends by itself.
func (g *simGroup) ends(now time.Duration) {
	if g.run.asked < 0 {
		g.run.asked, g.run.byItself = now, true
	}
	for _, c := range g.s.consumers {
		if c.running && c.run.asked < 0 {
			c.asksItself(now)
		}
	}
}

// asksItself notes that a consumer stops though nobody has asked it to.
func (c *simConsumer) asksItself(now time.Duration) {
	c.run.asked, c.stopping = now, true
	c.run.marks, c.run.troubles = c.s.disturbed.Load(), c.troubles
}

// goneInGroup is I11: nobody loses a session without a fault, but for the two connections that the
// bad consumer costs.
func (j *simJudge) goneInGroup(x *simSession) {
	c, g, now := x.consumer, j.s.group, j.s.now()
	if g != nil && x.record.Cause == "cancelled by the client" { // it moves to another connection
		if x == c.latest { // else its successor was faster
			c.resumeBy = max(c.resumeBy, now+j.s.plan.fast(c.plan))
		}
		return
	}
	if g != nil && g.endsConnections(now) {
		c.troubles++                                   // also of a stop
		if j.s.active.Load() > 0 || now <= c.looseBy { // and beside a fault that ends no session
			c.resumeBy = max(c.resumeBy, now+j.s.plan.tail(c.plan))
		}
	}
	if g == nil || !c.running || c.stopping || x.run != c.run || c.isBad(now) || now < c.resumeBy || now <= c.looseBy || j.s.active.Load() > 0 {
		return
	}
	switch cause := x.record.Cause; {
	case c.plan.stall > 0, j.s.plan.hold > 0:
		c.resumeBy = max(c.resumeBy, now+j.s.plan.tail(c.plan))
	case g.endsConnections(now):
		c.hits++
		c.resumeBy = max(c.resumeBy, now+j.s.plan.tail(c.plan))
		if c.healthy(now) {
			c.resumeBy = now + j.s.plan.fast(c.plan)
		}
		if c.hits > 2 {
			j.note("I11", "%s has lost %d sessions to the bad consumer, the last one by %q", c.plan.name, c.hits, cause)
		}
	default:
		j.note("I11", "%s has lost its session without a fault, by %q", c.plan.name, cause)
	}
}

// endsConnections tells whether the bad consumer may end a connection that others share.
func (g *simGroup) endsConnections(now time.Duration) bool {
	return g.plan.how == badConnection && g.plan.bad >= 0 && g.plan.badSince <= now && now < g.plan.badUntil
}

// connections is how many connections there may be at a time, besides those for a question.
func (c *simPath) connections() int {
	g := c.group
	if g == nil && c.plan.retry != nil {
		return 2
	}
	if g == nil {
		return 1
	}
	n := g.plan.connections
	if c.s.retries {
		n++ // the publisher's
	}
	if c.plan.channelMax > 0 {
		n += len(c.s.consumers)
	}
	j := c.s.judge
	j.mu.Lock()
	defer j.mu.Unlock()
	apart := 0
	if g.group != nil {
		apart = g.group.Stats().Isolated
	}
	return n + g.mostApart(apart)
}

// mostApart is the highest number of isolated consumers of late. It is called with mu held.
func (g *simGroup) mostApart(now int) int {
	for _, a := range g.apart {
		now = max(now, a.count)
	}
	return now
}

// reach dials, and counts who does at the same time.
func (c *simPath) reach(ctx context.Context, network, address string) (net.Conn, error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	n := int(c.dialled.Add(1))
	defer c.dialled.Add(-1)
	if most := c.connections(); c.group != nil && c.plan.stall == 0 && n > most {
		c.s.judge.violate("I12", "%d dials at a time, for %d connections", n, most)
	}
	return c.s.broker.Dialer()(ctx, network, address)
}

// connected is I12: there are no more connections than were asked for, those that a limit on
// channels makes necessary and those of isolated consumers; and isolation ends. It is called with
// mu held.
func (g *simGroup) connected(now time.Duration) {
	if g.group == nil || g.run.asked >= 0 || len(g.group.Consumers()) == 0 {
		return
	}
	p, n := g.s.plan, g.group.Stats()
	g.apart = append(g.apart, simApart{now, n.Isolated})
	for len(g.apart) > 1 && g.apart[0].at < now-2*time.Minute {
		g.apart = g.apart[1:]
	}
	allowed := g.plan.connections
	if g.plan.consumer.channelMax > 0 {
		allowed = max(allowed, len(g.s.consumers))
	}
	if g.s.retries {
		allowed++ // the publisher's
	}
	quiet, proven, pinned := g.s.active.Load() == 0, true, 0
	latest := time.Duration(0)
	for _, c := range g.s.consumers {
		if c.plan.stall > 0 {
			allowed++
		}
		if c.isBad(now) {
			pinned++
			allowed++
			quiet = quiet && !g.plan.how.hangs()
			continue
		}
		if !c.running {
			continue
		}
		settle := c.plan.drain + c.plan.shut + time.Second
		quiet = quiet && !c.stopping && c.live == 1 && c.state == steadymq.Consuming &&
			now > max(c.resumeBy, c.looseBy, g.changed)+settle
		if c.latest == nil {
			continue
		}
		began := c.latest.record.Started.Sub(g.s.start)
		latest = max(latest, began)
		proven = proven && now-began > 75*time.Second+c.plan.lag
		if q := &p.queues[c.plan.queue]; q.own() || q.kind == "stream" { // that of a stream moves when no handler is at work
			pinned++
		}
	}
	if !quiet {
		return
	}
	shares := g.plan.connections == 1 && g.plan.consumer.channelMax == 0 && n.Isolated < len(g.group.Consumers()) // else there may be nothing to share
	if proven && shares && n.Isolated > pinned {
		j := g.s.judge
		j.note("I11", "%d consumers are isolated, though all have been well for %v", n.Isolated, now-latest)
	}
	allowed += g.mostApart(n.Isolated)
	if open := g.open(); open > allowed {
		g.s.judge.note("I12", "%d connections are open, %d are allowed", open, allowed)
	}
}

// open counts connections. One that takes no more sessions may have some that go on.
func (g *simGroup) open() (n int) {
	used := make(map[uint64]bool)
	for _, x := range g.s.judge.sessions {
		if x.record.Ended.IsZero() {
			used[x.record.Connection] = true
		}
	}
	last := g.s.start.Add(g.s.lastMark)
	for _, c := range g.s.broker.Connections() {
		if c.Ended.IsZero() && !(used[c.ID] && c.Opened.Before(last)) {
			n++
		}
	}
	return n
}

// simGroupLog looks at what a Group logs about all of its consumers: no password.
type simGroupLog struct{ g *simGroup }

func (l *simGroupLog) Enabled(context.Context, slog.Level) bool { return true }
func (l *simGroupLog) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *simGroupLog) WithGroup(string) slog.Handler            { return l }

func (l *simGroupLog) Handle(_ context.Context, r slog.Record) error {
	j := l.g.s.judge
	j.mu.Lock()
	if l.g.run.returned {
		j.note("I9", "a log line of the group after Run had returned: %s", r.Message)
	}
	j.mu.Unlock()
	if *simShow {
		printRecord(l.g.s.now(), "group", r)
	}
	r.Attrs(func(a slog.Attr) bool {
		j.canary("a log line", a)
		return true
	})
	return nil
}
