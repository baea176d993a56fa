package sim_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// What a seed decides about the ways to take work, order by key, batches and what is settled later,
// and what is judged of them, I19 to I21.

// The streams that they are drawn from, so that a seed without one is what it was.
const (
	simKeyStream   = 0x0bde6
	simBatchStream = 0xba7c4
	simLaterStream = 0x1a7e6
)

// simWays is how a consumer takes its work.
type simWays struct {
	keys  int           // hot keys beside many others, 0 for no order
	batch int           // the size, 0 for no batches
	wait  time.Duration // of a batch
	later bool          // some deliveries are settled when their handler has long returned
}

func (p *simPlan) drawWays() {
	keys, batches := rand.New(rand.NewPCG(p.seed, simKeyStream)), rand.New(rand.NewPCG(p.seed, simBatchStream))
	later := rand.New(rand.NewPCG(p.seed, simLaterStream))
	for i := range p.consumers {
		c := &p.consumers[i]
		if !c.pauses.none() {
			continue // one at a time: the judges of two would have to know of each other
		}
		if n := 1 + keys.IntN(3); oneIn(keys, 6) && (c.retry == nil || len(c.retry.Delays) == 0) {
			c.keys = n
		}
		p.drawBatch(batches, c)
		c.later = oneIn(later, 8) && c.batch == 0
	}
}

// drawBatch leaves out what New refuses. A prefetch that bounds what may be ahead of an answer on a
// slow path stays.
func (p *simPlan) drawBatch(r *rand.Rand, c *simConsumerPlan) {
	size, wait := pick(r, 1, 2, 5, 10, 50, 1+r.IntN(50)), between(r, 5*time.Millisecond, pick(r, 50*time.Millisecond, 2*time.Second))
	if !oneIn(r, 5) || c.middleware || c.keys > 0 {
		return
	}
	if c.bandwidth > 0 || c.lag > 0 {
		size = min(size, c.prefetch/c.concurrency)
	}
	c.batch, c.wait, c.prefetch = size, wait, max(c.prefetch, size*c.concurrency)
}

// atOnce is how many messages may be with handlers.
func (c *simConsumerPlan) atOnce() int { return c.concurrency * max(1, c.batch) }

func (p *simPlan) ways(c *simConsumerPlan) (o []steadymq.Option) {
	if c.keys > 0 {
		o = append(o, steadymq.WithOrderingKey(func(d *steadymq.Delivery) string { return p.keyOf(c, d.MessageId) }))
	}
	if c.batch > 0 {
		o = append(o, steadymq.WithBatch(c.batch, c.wait))
	}
	return o
}

// keyOf is the key of a message: one of a few, one of many, or none.
func (p *simPlan) keyOf(c *simConsumerPlan, id string) string {
	s := sim{plan: p}
	switch dice := int(s.dice(id, -1) >> 8 & 0xffff); {
	case dice%10 == 0:
		return ""
	case dice%10 < 6:
		return "hot" + strconv.Itoa(dice/10%c.keys)
	default:
		return strconv.Itoa(dice / 10 % 60)
	}
}

// work calls the Run that fits the handler.
func (c *simConsumer) work(ctx context.Context, run *simRun) error {
	if c.plan.batch > 0 {
		return c.consumer.RunBatch(ctx, c.handleBatch(run))
	}
	return c.consumer.Run(ctx, c.handle(run))
}

// handle gives the group the handler that fits.
func (g *simGroup) handle(c *simConsumer, run *simRun) (*steadymq.Consumer, error) {
	queue := g.s.plan.queues[c.plan.queue].queueName()
	if c.plan.batch > 0 {
		return g.group.HandleBatch(queue, c.handleBatch(run), c.options()...)
	}
	return g.group.Handle(queue, c.handle(run), c.options()...)
}

// simWayJudge is what the judge knows of the ways to take work.
type simWayJudge struct {
	turns    map[simLine]*simTurn
	queued   map[simLine][]string // messages as they were published, none that is done at the front
	lineOf   map[string]simLine   // by message
	final    map[string]bool      // messages whose handlers have decided for good
	doubts   []simDoubt
	doubted  map[string]int
	sent     map[simKey]time.Time // deliveries to consumers with batches
	batching map[*simRun]*simBatching
	kept     map[simKey]*simKept
}

func newSimWayJudge() simWayJudge {
	return simWayJudge{
		turns: make(map[simLine]*simTurn), queued: make(map[simLine][]string), lineOf: make(map[string]simLine), final: make(map[string]bool),
		doubted: make(map[string]int), sent: make(map[simKey]time.Time), batching: make(map[*simRun]*simBatching), kept: make(map[simKey]*simKept),
	}
}

// sentTo notes when the broker has sent a delivery.
func (j *simJudge) sentTo(x *simSession, r *steadymqtest.DeliveryRecord) {
	if x.consumer.plan.batch > 0 {
		j.sent[simKey{r.ConsumerTag, r.Tag}] = r.Time
	}
}

// Order by key.

// simLine is the messages of one key, as a Consumer sees them. A new one knows nothing of an old
// one.
type simLine struct {
	queue int
	of    *simRun // in a group, where each Run has a Consumer of its own
	key   string
}

// simTurn is whose turn it was last.
type simTurn struct {
	key     simKey
	handled *simHandled
}

// simDoubt is a message that has started although an earlier one of its key was not done: it may
// have been lost, or with somebody else.
type simDoubt struct {
	id, earlier string
	key         simKey
	at          time.Time
}

// published notes the order of the messages in a queue that one consumer has for itself.
func (j *simJudge) published(queue int, id string) {
	users := j.s.plan.users(queue)
	if j.unfit[id] || len(users) != 1 || users[0].keys == 0 || j.streams[queue] != nil {
		return
	}
	if key := j.s.plan.keyOf(users[0], id); key != "" {
		line := simLine{queue: queue, key: key}
		j.lineOf[id] = line
		j.queued[line] = append(j.queued[line], id)
	}
}

// takesTurn judges a start: of its key nobody else is at work, nor held, nor is anybody before it in
// the queue.
func (j *simJudge) takesTurn(h *simHandling) {
	c, id := h.c, h.d.MessageId
	if c.plan.keys == 0 {
		return
	}
	x := j.handled[h.key]
	x.working = true
	key := j.s.plan.keyOf(c.plan, id)
	if key == "" {
		return
	}
	line := simLine{queue: c.plan.queue, key: key + " of " + c.plan.name}
	if c.group != nil {
		line.of = h.run
	}
	if last := j.turns[line]; last != nil {
		j.follow(h, last)
	}
	j.turns[line] = &simTurn{h.key, x}
	j.final[id] = false
	j.overtakes(h)
}

// follow judges a start by the one before it.
func (j *simJudge) follow(h *simHandling, last *simTurn) {
	before := last.handled
	session := j.byTag[last.key.consumer]
	switch {
	case before.working:
		j.note("I19", "%v starts as %s, and %v of its key is still at work as %s", h.key, h.d.MessageId, last.key, before.id)
	case last.key == h.key, last.key.consumer != h.key.consumer, before.settled, before.allowed&finals != 0, session == nil, !session.record.Ended.IsZero():
	default:
		j.note("I19", "%v starts as %s, and %v of its key is not settled as %s", h.key, h.d.MessageId, last.key, before.id)
	}
}

// overtakes notes which messages of its key should have come before this one, as far as the
// handlers know.
func (j *simJudge) overtakes(h *simHandling) {
	line, ok := j.lineOf[h.d.MessageId]
	if !ok {
		return
	}
	all := j.queued[line]
	for len(all) > 0 && j.final[all[0]] && j.doubted[all[0]] == 0 && all[0] != h.d.MessageId {
		all = all[1:]
	}
	for _, earlier := range all {
		if earlier == h.d.MessageId {
			break
		}
		if !j.final[earlier] && j.doubted[earlier] < mostDoubts {
			j.doubted[earlier]++
			j.doubts = append(j.doubts, simDoubt{h.d.MessageId, earlier, h.key, time.Now()})
		}
	}
}

// mostDoubts is enough: what was dropped is behind all that come later.
const mostDoubts = 20

// decided notes what is done for good.
func (j *simJudge) decided(h *simHandled, o steadymq.Outcome) {
	if _, ok := j.lineOf[h.id]; ok && o != steadymq.Requeued {
		j.final[h.id] = true
	}
}

// ordered is the rest of I19: by the ledger nobody was overtaken who was there.
func (j *simJudge) ordered(l *steadymqtest.Ledger) {
	if len(j.doubts) == 0 {
		return
	}
	gone := make(map[string]bool)
	for i := range l.Messages {
		m := &l.Messages[i]
		if line, ok := j.lineOf[m.ID]; ok && m.Queue == j.s.plan.queues[line.queue].name {
			gone[m.ID] = m.Fate == steadymqtest.Dropped || m.Death == "delivery_limit" || m.Death == "expired"
		}
	}
	deliveries, of := make(map[simKey]*steadymqtest.DeliveryRecord), make(map[string][]*steadymqtest.DeliveryRecord)
	for i := range l.Deliveries {
		d := &l.Deliveries[i]
		deliveries[simKey{d.ConsumerTag, d.Tag}] = d
		if j.doubted[d.ID] > 0 {
			of[d.ID] = append(of[d.ID], d)
		}
	}
	for _, doubt := range j.doubts {
		d := deliveries[doubt.key]
		lost, known := gone[doubt.earlier]
		if d == nil || lost || !known || j.elsewhere(of[doubt.earlier], d) || j.givenUp(l, d) {
			continue
		}
		j.note("I19", "%s starts at %v as %v, and %s of its key, which is before it, is not done", doubt.id, doubt.at.Sub(j.s.start), doubt.key, doubt.earlier)
		return
	}
}

// elsewhere tells that a message was with another session when the broker sent d: one whose end the
// broker had not noticed, so that it sent what comes after.
func (j *simJudge) elsewhere(all []*steadymqtest.DeliveryRecord, d *steadymqtest.DeliveryRecord) bool {
	var held *steadymqtest.DeliveryRecord
	for _, other := range all {
		if !other.Time.After(d.Time) {
			held = other
		}
	}
	if held == nil || held.ConsumerTag == d.ConsumerTag || !held.Settled.IsZero() && !held.Settled.After(d.Time) {
		return false
	}
	x := j.byTag[held.ConsumerTag]
	if x == nil || x.record.Ended.IsZero() || x.record.Ended.After(d.Time) {
		return true
	}
	// The consumer was gone, its channel was not: that the library waits for, unless faults go on.
	return handlersGoOn(x.record.Cause) && !j.s.calmIn(x.record.Ended.Sub(j.s.start), d.Time.Sub(j.s.start))
}

// inTurn is how long a consumer with order by key may wait before it consumes anew, where its handlers
// may still settle on the old channel: they have to finish first.
func (c *simConsumerPlan) inTurn() time.Duration {
	if c.keys == 0 {
		return 0
	}
	return c.drain + c.shut
}

func (f simFault) inTurn(c *simConsumerPlan) time.Duration {
	for _, cancels := range []string{"cancel", "delete the queue", "flap"} {
		if strings.Contains(simKinds[f.kind].name, cancels) {
			return c.inTurn()
		}
	}
	return 0
}

// givenUp tells that the library may have let a message go on because it came again and again before the
// one that is expected: after three ways back that one may be elsewhere. Only a queue that puts back at
// its end keeps two messages in the wrong order for so long.
func (j *simJudge) givenUp(l *steadymqtest.Ledger, d *steadymqtest.DeliveryRecord) bool {
	q, before := &j.s.plan.queues[j.lineOf[d.ID].queue], 0
	for i := range l.Deliveries {
		if other := &l.Deliveries[i]; other.ID == d.ID && other.Queue == d.Queue && other.Time.Before(d.Time) {
			before++
		}
	}
	return q.kind == "quorum" && q.limit < 0 && before >= 3
}

// tooEarly tells whether a failed message is not back too early. One with a key that has been here for
// half of the consumer timeout goes back at once.
func (c *simConsumer) tooEarly(h *simHandled, r *steadymqtest.SettlementRecord) bool {
	return r.Time.Before(h.held) && (c.plan.keys == 0 || c.s.now() < 15*time.Minute)
}

// Batches.

// simBatching is how the batches of a Run are collected.
type simBatching struct {
	now   int       // with handlers
	free  time.Time // since when somebody may collect
	early string    // the last one was not full and had not waited: a message that comes alone has to follow
	tag   string    // of its session
}

func (j *simJudge) batchingOf(run *simRun) *simBatching {
	b := j.batching[run]
	if b == nil {
		b = &simBatching{free: j.s.start.Add(run.start)}
		j.batching[run] = b
	}
	return b
}

// collected judges a batch when its handler is called.
func (j *simJudge) collected(c *simConsumer, run *simRun, batch []*steadymq.Delivery) {
	j.mu.Lock()
	defer j.mu.Unlock()
	b, first, tags := j.batchingOf(run), batch[0], make(map[string]bool)
	for _, d := range batch {
		tags[d.ConsumerTag] = true
	}
	if b.now++; b.now > c.plan.concurrency {
		j.note("I20", "%d batches of %s at once, %d are allowed", b.now, c.plan.name, c.plan.concurrency)
	}
	if len(batch) > c.plan.batch {
		j.note("I20", "a batch of %s has %d messages, its size is %d", c.plan.name, len(batch), c.plan.batch)
	}
	if len(tags) > 1 {
		j.note("I20", "a batch of %s has messages of %d sessions", c.plan.name, len(tags))
	}
	if b.early != "" && b.tag == first.ConsumerTag && first.Attempt() == 1 && run.asked < 0 {
		j.note("I20", "a batch of %s has not waited: %s", c.plan.name, b.early)
	}
	j.waited(c, run, batch)
	if b.now < c.plan.concurrency {
		b.free = time.Now()
	}
}

// waited judges how long a batch was collected: since its first message has come and somebody was
// there to take it.
func (j *simJudge) waited(c *simConsumer, run *simRun, batch []*steadymq.Delivery) {
	b, first := j.batchingOf(run), batch[0]
	key := simKey{first.ConsumerTag, first.DeliveryTag}
	b.early, b.tag = "", first.ConsumerTag
	sent := j.sent[key]
	if sent.IsZero() || j.handled[key] != nil || first.Attempt() > 1 {
		return
	}
	since := sent
	if b.free.After(since) {
		since = b.free
	}
	took, x := time.Since(since), j.byTag[first.ConsumerTag]
	calm := j.s.active.Load() == 0 && j.s.now()-j.s.lastMark > c.plan.wait+10*time.Second && c.plan.lag == 0
	if calm && took > c.plan.wait*11/10+4*j.s.plan.latency+20*time.Millisecond {
		j.note("I20", "a batch of %s was collected for %v, its wait is %v", c.plan.name, took, c.plan.wait)
	}
	whole := len(batch) == c.plan.batch || time.Since(sent) >= c.plan.wait*9/10
	if !whole && run.asked < 0 && x != nil && x.record.Ended.IsZero() {
		b.early = strconv.Itoa(len(batch)) + " messages after " + time.Since(sent).String()
	}
}

// released notes that a worker may collect again.
func (j *simJudge) released(run *simRun) {
	j.mu.Lock()
	defer j.mu.Unlock()
	b := j.batchingOf(run)
	if b.now == run.atOnce {
		b.free = time.Now()
	}
	b.now--
}

// handleBatch is the handler of one Run that takes batches. It does something with all, or something
// quick with each.
func (c *simConsumer) handleBatch(run *simRun) steadymq.BatchHandler {
	run.atOnce = c.plan.concurrency
	return func(ctx context.Context, batch []*steadymq.Delivery) (err error) {
		c.s.judge.collected(c, run, batch)
		all := make([]*simHandling, len(batch))
		acts, errs := make([]simAct, len(batch)), make([]error, len(batch))
		for i, d := range batch {
			h := &simHandling{s: c.s, c: c, run: run, d: d, key: simKey{d.ConsumerTag, d.DeliveryTag}}
			try := c.s.judge.started(h, ctx)
			h.dice = c.s.dice(d.MessageId, try)
			all[i], acts[i], errs[i] = h, c.s.act(h.dice, try), errSimHandler
		}
		if run.trip.Swap(false) {
			acts[0] = actOK
			c.s.judge.closes(run, c)
			run.stop()
		}
		c.s.work.Add(1)
		defer c.s.work.Done()
		defer func() {
			for i, h := range all {
				c.s.judge.returned(h, acts[i], errs[i])
			}
			c.s.judge.released(run)
		}()
		c.getStuck()
		if act := acts[0]; forAll(act) {
			for i := range acts {
				acts[i] = act
			}
			err = all[0].behave(ctx, act)
			for i := range errs {
				errs[i] = err
			}
			return err
		}
		for i, h := range all {
			if !forEach(acts[i]) {
				acts[i] = actOK
			}
			errs[i] = h.behave(ctx, acts[i])
		}
		return &steadymq.BatchError{Errs: errs}
	}
}

// forAll tells an act that is one of a batch as a whole.
func forAll(act simAct) bool {
	switch act {
	case actSlow, actSlower, actFail, actPanic, actGoexit, actHang, actIgnore, actCutOff, actPark:
		return true
	}
	return false
}

// forEach tells one that each message of a batch may have, whatever the others have.
func forEach(act simAct) bool {
	switch act {
	case actOK, actFail, actRequeue, actRequeueAfter, actDiscard, actAck, actAckTwice, actRace, actReject, actMultiple, actLate, actAckFail, actPark:
		return true
	}
	return false
}

// What is settled later.

// actKeep is not among the weights: consumers have it or not.
const actKeep = numActs + 1

// simKept is a delivery that a handler has kept.
type simKept struct {
	run     *simRun
	handled *simHandled
}

// way lets a third of the deliveries of a consumer that does so be kept.
func (h *simHandling) way(act simAct) simAct {
	if h.c.plan.later && h.dice>>16%3 == 0 && !h.s.calm.Load() && act != actPark {
		return actKeep
	}
	return act
}

// keep returns Later. One in forty is not settled before its session ends.
func (h *simHandling) keep() error {
	r := rand.New(rand.NewPCG(h.dice, 3))
	after, never := between(r, time.Millisecond, pick(r, 100*time.Millisecond, 2*time.Second, 20*time.Second)), oneIn(r, 40)
	outcome := pick(r, steadymq.Acked, steadymq.Acked, steadymq.Acked, steadymq.Discarded, steadymq.Requeued)
	h.s.work.Go(func() {
		time.Sleep(after)
		for never && h.d.Context().Err() == nil && !h.s.calm.Load() {
			time.Sleep(time.Second)
		}
		lost := errors.As(context.Cause(h.d.Context()), new(*steadymq.SessionError))
		settle := map[steadymq.Outcome]func() error{steadymq.Acked: h.d.Ack, steadymq.Discarded: h.d.Discard, steadymq.Requeued: h.d.Requeue}
		err := h.try(outcome, settle[outcome])
		if lost {
			h.expect(err, steadymq.ErrStale)
			return
		}
		h.expect(err, nil, steadymq.ErrStale)
		if err == nil {
			h.expect(h.d.Ack(), steadymq.ErrSettled, steadymq.ErrStale)
		}
	})
	return steadymq.Later
}

// keeps notes what a handler has kept. Nobody may settle it but who has it.
func (j *simJudge) keeps(h *simHandling, x *simHandled) {
	j.kept[h.key] = &simKept{h.run, x}
}

// waitedFor judges whether a stop that was clean has waited for what was kept, on the session that
// it has ended.
func (j *simJudge) waitedFor(c *simConsumer, run *simRun, err error, took time.Duration) {
	left := 0
	for key, k := range j.kept {
		if k.run != run {
			continue
		}
		x := j.byTag[key.consumer]
		if x != nil && k.handled.owed(j.streamOf(c) != nil) && x.record.Cause == "cancelled by the client" && !x.record.Ended.Before(j.s.start.Add(run.asked)) {
			left++
		}
		delete(j.kept, key)
	}
	if err == nil && left > 0 {
		j.note("I21", "%s stopped after %v, and %d of its deliveries are kept and not settled", c.plan.name, took, left)
	}
}

// finals are the outcomes after which a message does not come again.
const finals = uint8(1<<steadymq.Acked | 1<<steadymq.Discarded | 1<<steadymq.Parked)

// owed tells that the broker has still to be told, or that nothing is decided. The acks of a stream go
// as far as all before them are done; a message with a key that goes back at a stop may be left to the
// end of the channel.
func (h *simHandled) owed(stream bool) bool {
	return h.allowed == 0 || !stream && !h.settled && h.allowed&finals != 0
}

// unsettled is how many deliveries of a session that has ended well the broker should know to be
// settled. With order by key what goes back does so with the channel: that keeps the order.
func (j *simJudge) unsettled(x *simSession) (n int) {
	if x.consumer.plan.keys == 0 {
		return x.outstanding
	}
	for tag := range j.deliveries[x.record.Session] {
		if h := j.handled[simKey{x.record.Tag, tag}]; h != nil && h.move == nil && h.owed(false) { // a copy that is not safe lets it go back, too
			n++
		}
	}
	return n
}

// noneKept is the last of I21: nothing is counted that is over.
func (c *simConsumer) noneKept(n steadymq.Stats) {
	if n.Later != 0 {
		c.s.judge.violate("I21", "%s still counts %d kept deliveries", c.plan.name, n.Later)
	}
}
