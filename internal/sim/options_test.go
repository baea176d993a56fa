package sim_test

import (
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq"
)

// simQueueOptions is what a seed decides about a queue besides faults.
type simQueueOptions struct {
	theirs   bool   // only its consumers declare it
	exchange string // kind of the exchange that they bind it to, "" for none
	deadBy   simDeadBy
	body     int // bytes of large messages
}

// simDeadBy is how WithQueue says where dead letters go.
type simDeadBy int

const (
	deadByArgs simDeadBy = iota
	deadByQueue
	deadByKey
	numDeadBy
)

// own tells a queue that lives as long as its connection.
func (q *simQueuePlan) own() bool { return q.kind == "exclusive" || q.kind == "named" }

func (q *simQueuePlan) exchangeName() string { return "x-" + q.name }

// simConsumerOptions is what a seed decides about a consumer besides faults.
type simConsumerOptions struct {
	offset     string        // of a stream: first, last, next, number, time
	place      int           // the number
	since      time.Duration // the time, since the start
	stall      time.Duration // of the stall detector, 0 for none
	channelMax int           // 0 for no limit of ours
	balanced   bool          // one URL, of a balancer before all hosts
	bandwidth  int           // bytes a second to the client, 0 for no limit
	lag        time.Duration // what may be on its way at that pace
	maxMessage int64
	longest    time.Duration // of WithRequeueDelay
	middleware bool
	never      bool            // WithFatal says that nothing is fatal
	others     time.Duration   // the longest set-up limit of those in the same group
	retry      *steadymq.Retry // nil for none
}

// simLogin is where the password comes from.
type simLogin int

const (
	loginByURL simLogin = iota
	loginForEver
	loginExpires
	loginExpired // the issuer's clock is wrong
	loginFarAway
)

// renews tells that the broker is told of fresh credentials while a connection lives.
func (p *simPlan) renews() bool { return p.login == loginExpires || p.login == loginExpired }

// owns tells that nobody else may have the queue until the broker has buried c's old connection.
func (p *simPlan) owns(c *simConsumerPlan) bool {
	return c.alone || p.queues[c.queue].kind == "exclusive"
}

// roundabout tells that c may need several tries even after a single fault: a channel that is still
// there leaves none for the next, or its queue comes back with another connection only.
func (p *simPlan) roundabout(c *simConsumerPlan) bool {
	return c.channelMax == 1 || c.channelMax == 2 || p.group != nil && c.channelMax > 0 || p.queues[c.queue].own()
}

// users are the consumers of queue q.
func (p *simPlan) users(q int) (users []*simConsumerPlan) {
	for i := range p.consumers {
		if p.consumers[i].queue == q {
			users = append(users, &p.consumers[i])
		}
	}
	return users
}

// drawOptions draws from a stream of its own, so that it changes nothing of what was drawn before.
func (p *simPlan) drawOptions(r *rand.Rand) {
	p.version = pick(r, [2]int{4, 3}, [2]int{4, 3}, [2]int{4, 0})
	if p.old {
		p.version = pick(r, [2]int{3, 13}, [2]int{3, 10})
	}
	p.cancels = p.cancels && p.version == [2]int{4, 3}
	p.login = pick(r, loginByURL, loginByURL, loginByURL, loginForEver, loginExpires, loginExpires, loginExpired, loginFarAway)
	for a := numFirstActs; a < numMoreActs; a++ {
		if oneIn(r, 2) {
			p.acts[a] = 1 + r.IntN(8)
		}
	}
	for i := range p.consumers {
		p.drawConsumerOptions(r, &p.consumers[i])
	}
	if p.group != nil {
		p.shareOptions(r)
	}
	for i := range p.queues {
		p.drawQueueOptions(r, i)
	}
	if p.group != nil {
		p.shareBandwidth()
	} else {
		for i := range p.consumers {
			p.drawRunOptions(r, &p.consumers[i])
		}
	}
	p.drawMoreFaults(r)
	for i := range p.queues {
		p.queues[i].purged = p.queues[i].own() || slices.ContainsFunc(p.faults(), func(f simFault) bool {
			return f.queue == i && simKinds[f.kind].loses
		})
	}
}

func (p *simPlan) drawConsumerOptions(r *rand.Rand, c *simConsumerPlan) {
	c.offset = pick(r, "first", "first", "last", "next", "next", "number", "time")
	c.place, c.since = r.IntN(20), between(r, 0, time.Minute).Truncate(time.Second)
	if oneIn(r, 4) {
		c.stall = pick[time.Duration](r, 5, 15, 30) * time.Second
	}
	if oneIn(r, 4) {
		c.channelMax = 1 + r.IntN(3)
	}
	c.balanced = oneIn(r, 4) && p.hosts > 1 && !p.urlFunc
	if oneIn(r, 6) {
		c.bandwidth = pick(r, 20_000, 100_000, 500_000)
	}
	if oneIn(r, 3) {
		c.hold = pick(r, 10*time.Millisecond, 200*time.Millisecond, 3*time.Second)
	}
	c.longest = c.hold * pick[time.Duration](r, 1, 8, 8, 20)
	c.middleware, c.never = oneIn(r, 3), oneIn(r, 8)
}

// drawQueueOptions also fits the options of its consumers to it.
func (p *simPlan) drawQueueOptions(r *rand.Rand, i int) {
	q, users := &p.queues[i], p.users(i)
	kind := pick(r, "", "", "", "", "", "stream", "stream", "exclusive", "named")
	theirs, exchange := oneIn(r, 3), pick(r, "", "", "direct", "topic", "fanout")
	q.deadBy = simDeadBy(r.IntN(int(numDeadBy)))
	q.body = pick(r, 0, 0, 0, 5_000, 50_000, 1_500_000)
	unfit := pick(r, 0, 0, 1, 2)
	tooLarge := oneIn(r, 2)

	if kind == "exclusive" && len(users) > 1 {
		kind = "named"
	}
	kind = p.ownInGroup(kind, users)
	if kind != "" {
		q.kind = kind
	}
	declared, known := true, true
	for _, c := range users {
		p.fit(q, c)
		declared = declared && c.declare
		known = known && (c.declare || c.topology)
	}
	if q.kind == "stream" || q.own() {
		q.dead, q.limit = false, -1
	}
	q.theirs = theirs && known && !q.own()
	if q.kind == "named" {
		q.exchange = "fanout"
	} else if declared {
		q.exchange = exchange
	}
	if p.group != nil && q.kind == "stream" {
		unfit = 0 // see publish
	}
	p.drawLarge(r, i)
	p.drawUnfit(r, i, unfit, tooLarge && q.body == 0)
}

// ownInGroup leaves exclusive queues with a name to WithQueue: of what a topology function has declared
// the library knows nothing, and a connection that is shared is not replaced for it. No consumer of
// such a queue comes and goes unless the library declares it.
func (p *simPlan) ownInGroup(kind string, users []*simConsumerPlan) string {
	if p.group == nil || kind != "exclusive" && kind != "named" {
		return kind
	}
	for _, c := range users {
		if p.group.bad >= 0 && c == &p.consumers[p.group.bad] && c.topology {
			return ""
		}
	}
	for _, c := range users {
		if kind == "exclusive" || len(c.runs) > 1 {
			c.declare, c.topology = true, false
		}
	}
	return kind
}

// fit makes c one that can consume q.
func (p *simPlan) fit(q *simQueuePlan, c *simConsumerPlan) {
	if q.own() {
		c.declare = c.declare || !c.topology
	}
	if q.kind == "stream" || q.own() {
		c.alone = false
	}
	if q.kind != "stream" {
		c.offset = ""
	}
}

// drawLarge makes every tenth message large, or a few so large that one takes longer than any
// limit.
func (p *simPlan) drawLarge(r *rand.Rand, i int) {
	q, users := &p.queues[i], p.users(i)
	slow := slices.ContainsFunc(users, func(c *simConsumerPlan) bool { return c.bandwidth > 0 })
	rare := slow && q.body > 1_000_000 && p.hold == 0 // else the broker gives it no time to arrive
	if q.body > 1_000_000 && !rare {
		q.body = 50_000
	}
	for n := range p.publishes {
		x := &p.publishes[n]
		if x.queue == i && oneIn(r, map[bool]int{false: 10, true: 80}[rare]) {
			x.body = q.body
			if rare {
				x.count = 1
			}
		}
	}
	for _, c := range users {
		if c.bandwidth == 0 {
			continue
		}
		if rare { // what is ahead of an answer is as long as the prefetch
			c.concurrency, c.prefetch = min(c.concurrency, 2), min(c.concurrency, 2)
			c.bandwidth = max(c.bandwidth/2, 30_000)
		} else {
			c.bandwidth = max(c.bandwidth, c.prefetch*(q.body/4+200))
		}
		c.lag = time.Second + time.Duration(c.prefetch*(q.body+200))*time.Second/time.Duration(c.bandwidth)
	}
}

// drawUnfit lets a few messages be those that no handler can be given. They take up the prefetch
// for ever.
func (p *simPlan) drawUnfit(r *rand.Rand, i, n int, tooLarge bool) {
	users := p.users(i)
	stream := p.queues[i].kind == "stream"
	for _, c := range users {
		if c.prefetch < 8 && !stream {
			n = 0
		}
	}
	if stream {
		n *= 4
	}
	if n > 0 && tooLarge {
		for _, c := range users {
			c.maxMessage = simTooLarge - 1
		}
	}
	for range n {
		x := simPublish{at: between(r, 0, p.chaos()), queue: i, count: 1, unfit: true}
		if tooLarge {
			x.body = simTooLarge
		}
		p.publishes = append(p.publishes, x)
	}
	slices.SortStableFunc(p.publishes, func(a, b simPublish) int { return int(a.at - b.at) })
}

// simTooLarge is the size of a message for consumers with WithMaxMessageSize.
const simTooLarge = 4000

func (p *simPlan) drawRunOptions(r *rand.Rand, c *simConsumerPlan) {
	for i := range c.runs[:len(c.runs)-1] {
		w := &c.runs[i]
		w.byHandler, w.broken = oneIn(r, 3), c.middleware && oneIn(r, 3)
	}
}

// drawMoreFaults puts faults of simMoreKinds in the place of some.
func (p *simPlan) drawMoreFaults(r *rand.Rand) {
	var kinds []int
	for k := range simMoreKinds {
		use := oneIn(r, 2)
		if use && simMoreKinds[k].met(p) {
			kinds = append(kinds, len(simFirstKinds)+k)
		}
	}
	for i := range p.bursts {
		for j := range p.bursts[i].faults {
			f := &p.bursts[i].faults[j]
			kind, last, use := r.IntN(1<<30), r.Float64(), oneIn(r, 3)
			if !use || len(kinds) == 0 {
				continue
			}
			f.kind = kinds[kind%len(kinds)]
			if k := &simKinds[f.kind]; k.common {
				f.host = -1
			} else if f.host < 0 {
				f.host = r.IntN(p.hosts)
			}
			longest := min(simKinds[f.kind].longest, p.chaos()-f.at)
			f.last = time.Duration(last * float64(longest)).Truncate(time.Millisecond)
			if longest > 0 {
				f.last = max(f.last, time.Millisecond) // at 0 it would never end
			}
		}
	}
}

// met tells whether a fault of the kind is one for somebody in the plan.
func (k *simKind) met(p *simPlan) bool { return k.needs == nil || k.needs(p) }

// options are those of c that depend on nothing but the plan.
func (p *simPlan) options(c *simConsumerPlan) []steadymq.Option {
	q := &p.queues[c.queue]
	var o []steadymq.Option
	if c.stall > 0 {
		o = append(o, steadymq.WithStallDetector(c.stall))
	}
	if c.maxMessage > 0 {
		o = append(o, steadymq.WithMaxMessageSize(c.maxMessage))
	}
	if c.never {
		o = append(o, steadymq.WithFatal(func(error) bool { return false }))
	}
	o = append(o, p.ways(c)...)
	if c.retry != nil {
		o = append(o, steadymq.WithRetry(*c.retry))
	}
	if q.kind == "stream" && (!c.declare || c.offset != "next") {
		o = append(o, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": c.offsetArg()}))
	}
	return o
}

// simEpoch is when every bubble begins.
var simEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

func (c *simConsumerPlan) offsetArg() any {
	switch c.offset {
	case "number":
		return int64(c.place)
	case "time":
		return simEpoch.Add(c.since)
	}
	return c.offset
}

// queueOption is what WithQueue is told of q.
func (c *simConsumer) queueOption() steadymq.Queue {
	q := &c.s.plan.queues[c.plan.queue]
	o := steadymq.Queue{Type: q.kind, Args: c.args()}
	if q.own() {
		o.Type, o.Exclusive = "classic", true
	}
	if q.dead && q.deadBy != deadByArgs {
		delete(o.Args, "x-dead-letter-exchange")
		delete(o.Args, "x-dead-letter-routing-key")
		o.DeadLetter = &steadymq.DeadLetter{Queue: "dead"}
		if q.deadBy == deadByKey {
			o.DeadLetter = &steadymq.DeadLetter{Key: "dead"}
		}
	}
	if q.exchange != "" {
		o.Exchange = &steadymq.Exchange{Name: q.exchangeName(), Kind: q.exchange}
		o.Bindings = []steadymq.Binding{{Key: simKeyTo(q)}}
	}
	return o
}

// simKeyTo is the key that q is bound by.
func simKeyTo(q *simQueuePlan) string {
	if q.exchange == "topic" {
		return "work.#"
	}
	return "work"
}

// queueName is what New is told.
func (q *simQueuePlan) queueName() string {
	if q.kind == "named" {
		return ""
	}
	return q.name
}

// isNamed tells a queue that the broker has named.
func isNamed(queue string) bool { return strings.HasPrefix(queue, "amq.gen-") }
