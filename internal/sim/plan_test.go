package sim_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// simPlan is everything that a seed decides before the clock starts. Only the scheduler and the
// library's own jitter are not in it.
type simPlan struct {
	seed      uint64
	virtual   time.Duration
	hosts     int
	tls       bool
	latency   time.Duration
	old       bool // a broker of the 3.x generation
	version   [2]int
	hold      time.Duration // the broker's consumer timeout, 0 for none
	cancels   bool          // and its form: basic.cancel, not 406
	urlFunc   bool
	login     simLogin
	queues    []simQueuePlan
	consumers []simConsumerPlan
	group     *simGroupPlan // in which all of them are, nil if they are alone
	bursts    []simBurst
	publishes []simPublish
	acts      [numActs]int // weights
	poison    uint64       // of so many messages one always fails under a policy, 0 for none
	special   bool         // some messages have properties that a copy must not have
}

type simQueuePlan struct {
	name   string
	kind   string // also "exclusive" and "named", classic queues that live as long as their connection
	limit  int32  // x-delivery-limit, -1 for none, quorum only
	dead   bool   // has a dead-letter queue
	purged bool   // a fault may drop what is in it
	simQueueOptions
}

type simConsumerPlan struct {
	name                     string
	queue                    int
	concurrency, prefetch    int
	heartbeat, dial, setup   time.Duration
	shut, drain              time.Duration
	initial, limit           time.Duration // backoff
	handlerTimeout, hold     time.Duration
	writeDelay               time.Duration
	declare, topology, alone bool // WithQueue, WithTopology, WithExclusive
	runs                     []simWindow
	simConsumerOptions
	pauses simPausesPlan
	simWays
}

// simWindow is one Run: when it is called and when its context ends, since the start.
type simWindow struct {
	start, stop time.Duration
	byHandler   bool // a handler ends the context
	broken      bool // a middleware panics when it is made: Run returns at once
}

type simPublish struct {
	at        time.Duration
	queue     int
	count     int
	transient bool
	body      int  // bytes, 0 for a few
	unfit     bool // no handler can be given it
}

// simBurst is a fault, or several that overlap.
type simBurst struct {
	at     time.Duration
	faults []simFault
}

type simFault struct {
	number int // its place in the plan, for -keep
	kind   int
	at     time.Duration
	last   time.Duration // 0 for a fault of one moment
	host   int           // -1 for all
	queue  int
	dice   uint64 // what else it has to choose
}

func (f simFault) end() time.Duration { return f.at + f.last }

func (f simFault) String() string {
	k := simKinds[f.kind]
	where := "all hosts"
	if f.host >= 0 {
		where = fmt.Sprintf("host %d", f.host)
	}
	s := fmt.Sprintf("#%d %v %s (%s, queue %d, dice %d)", f.number, f.at, k.name, where, f.queue, f.dice%100)
	if f.last > 0 {
		s += fmt.Sprintf(" for %v", f.last)
	}
	return s
}

func (p *simPlan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "hosts %d, tls %t, latency %v, version %v, consumer timeout %v (cancel %t), urlFunc %t, login %d\n",
		p.hosts, p.tls, p.latency, p.version, p.hold, p.cancels, p.urlFunc, p.login)
	for _, q := range p.queues {
		fmt.Fprintf(&b, "  queue %+v\n", q)
	}
	if p.group != nil {
		fmt.Fprintf(&b, "  group %+v\n", *p.group)
	}
	for _, c := range p.consumers {
		fmt.Fprintf(&b, "  consumer %+v\n", c)
		if c.retry != nil {
			fmt.Fprintf(&b, "    retry %+v\n", *c.retry)
		}
		if c.pauses.breaker != nil {
			fmt.Fprintf(&b, "    breaker %+v\n", *c.pauses.breaker)
		}
	}
	for _, burst := range p.bursts {
		for _, f := range burst.faults {
			fmt.Fprintf(&b, "  fault %v\n", f)
		}
	}
	return b.String()
}

// simFinale is the end of a run without faults, in which everything must heal.
const simFinale = 20 * time.Second

// newSimPlan draws a plan. The order of the draws is part of a seed's meaning.
func newSimPlan(seed uint64, virtual time.Duration) *simPlan {
	r := rand.New(rand.NewPCG(seed, 0x5eed))
	p := &simPlan{seed: seed, virtual: virtual, hosts: 1 + r.IntN(3)}
	p.tls = oneIn(r, 8)
	p.latency = pick(r, 0, 0, time.Millisecond, 5*time.Millisecond, 20*time.Millisecond)
	p.old = oneIn(r, 4)
	if oneIn(r, 5) {
		p.hold = pick(r, 30*time.Second, 60*time.Second)
		p.cancels = !p.old
	}
	p.urlFunc = oneIn(r, 6)
	if g := rand.New(rand.NewPCG(seed, simGroupStream)); drawsGroup(g) {
		p.drawGroup(g)
		r = g
	} else {
		p.drawQueues(r)
		p.drawConsumers(r)
	}
	p.drawActs(r)
	p.drawBursts(r)
	p.drawPublishes(r)
	p.drawStart(r)
	p.drawOptions(rand.New(rand.NewPCG(seed, 0x0b710)))
	p.drawRetry(rand.New(rand.NewPCG(seed, simRetryStream)))
	if *simOfWays {
		p.drawPauses()
		p.drawWays()
	}
	return p
}

func oneIn(r *rand.Rand, n int) bool { return r.IntN(n) == 0 }

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// between draws a duration in whole milliseconds.
func between(r *rand.Rand, from, to time.Duration) time.Duration {
	return from + time.Duration(r.Int64N(int64(to-from)/1e6+1))*time.Millisecond
}

func (p *simPlan) drawQueues(r *rand.Rand) {
	for i := range 1 + r.IntN(2) {
		p.drawQueue(r, i)
	}
}

func (p *simPlan) drawQueue(r *rand.Rand, i int) {
	q := simQueuePlan{name: fmt.Sprintf("q%d", i), kind: pick(r, "classic", "quorum"), limit: -1, dead: oneIn(r, 3)}
	if oneIn(r, 4) {
		q.limit = 20
	}
	p.queues = append(p.queues, q)
}

func (p *simPlan) drawConsumers(r *rand.Rand) { p.drawConsumersOf(r, 1+r.IntN(3)) }

func (p *simPlan) drawConsumersOf(r *rand.Rand, n int) {
	for i := range n {
		c := simConsumerPlan{
			name:        fmt.Sprintf("sim%d", i),
			queue:       i % len(p.queues),
			concurrency: pick(r, 1, 1, 2, 4, 8),
			heartbeat:   pick[time.Duration](r, 2, 5, 10, 10) * time.Second,
			dial:        pick[time.Duration](r, 2, 5, 5) * time.Second,
			setup:       pick[time.Duration](r, 8, 15, 15) * time.Second,
			shut:        pick[time.Duration](r, 1, 5, 5) * time.Second,
			drain:       pick[time.Duration](r, 2, 10, 30) * time.Second,
			initial:     250 * time.Millisecond,
			limit:       pick[time.Duration](r, 2, 10, 10) * time.Second,
			hold:        pick(r, 50*time.Millisecond, time.Second, time.Second),
			writeDelay:  pick(r, 0, 500*time.Microsecond, 500*time.Microsecond, 5*time.Millisecond),
		}
		c.prefetch = c.concurrency * pick(r, 1, 2, 4, 16)
		if oneIn(r, 3) {
			c.handlerTimeout = pick(r, 500*time.Millisecond, 3*time.Second)
		}
		switch r.IntN(4) {
		case 0:
			c.declare = true
		case 1:
			c.topology = true
		}
		c.alone = len(p.queues) == n && oneIn(r, 3)
		c.runs = p.drawRuns(r)
		p.consumers = append(p.consumers, c)
	}
	// A queue without a consumer could never be drained.
	p.queues = p.queues[:min(len(p.queues), n)]
}

func (p *simPlan) chaos() time.Duration { return p.virtual - simFinale }

func (p *simPlan) drawRuns(r *rand.Rand) []simWindow {
	var runs []simWindow
	at := between(r, 0, 5*time.Second)
	for range r.IntN(4) {
		stop := at + between(r, 0, p.chaos()/3)
		if stop > p.chaos()-10*time.Second {
			break
		}
		runs = append(runs, simWindow{start: at, stop: stop})
		at = stop + between(r, 0, 20*time.Second)
	}
	return append(runs, simWindow{start: at, stop: p.virtual}) // the last one ends after the finale
}

// drawActs gives every way a handler behaves a weight, many of them none.
func (p *simPlan) drawActs(r *rand.Rand) {
	p.acts[actOK] = 40
	for a := actOK + 1; a < numFirstActs; a++ {
		if oneIn(r, 2) {
			p.acts[a] = 1 + r.IntN(8)
		}
	}
}

// drawBursts draws the faults: a random half of the kinds, one at a time or several that overlap,
// and between most bursts time enough to heal.
func (p *simPlan) drawBursts(r *rand.Rand) {
	kinds := p.drawKinds(r)
	at := between(r, 3*time.Second, 15*time.Second)
	for number := 0; ; {
		burst := simBurst{at: at}
		n := pick(r, 1, 1, 1, 2, 3, 5)
		for range n {
			f := p.drawFault(r, number, pick(r, kinds...), at)
			number++
			burst.faults = append(burst.faults, f)
			at += between(r, 0, 8*time.Second)
		}
		slices.SortStableFunc(burst.faults, func(a, b simFault) int { return int(a.at - b.at) })
		end := burst.at
		for _, f := range burst.faults {
			end = max(end, f.end())
		}
		if end > p.chaos() {
			break
		}
		p.bursts = append(p.bursts, burst)
		at = p.nextBurst(r, &burst, end)
	}
	p.stopInFaults(r)
}

// drawStart lets one plan in four begin ill, for consumers that have not had a session yet.
func (p *simPlan) drawStart(r *rand.Rand) {
	if !oneIn(r, 4) || len(p.bursts) == 0 {
		return
	}
	var kinds []int
	for k, kind := range simFirstKinds {
		if kind.longest > 0 && !kind.loses && !kind.harmless {
			kinds = append(kinds, k)
		}
	}
	number := 0
	for _, b := range p.bursts {
		number += len(b.faults)
	}
	f := p.drawFault(r, number, pick(r, kinds...), 0)
	f.last = between(r, 100*time.Millisecond, min(simKinds[f.kind].longest, p.bursts[0].at))
	p.bursts = slices.Insert(p.bursts, 0, simBurst{faults: []simFault{f}})
}

func (p *simPlan) drawKinds(r *rand.Rand) []int {
	var kinds []int
	for k := range simFirstKinds {
		use := oneIn(r, 2)
		if use && !(simFirstKinds[k].loses && oneIn(r, 2)) {
			kinds = append(kinds, k)
		}
	}
	if len(kinds) == 0 {
		kinds = []int{0}
	}
	return kinds
}

func (p *simPlan) drawFault(r *rand.Rand, number, kind int, at time.Duration) simFault {
	f := simFault{number: number, kind: kind, at: at, host: -1, queue: r.IntN(len(p.queues)), dice: r.Uint64()}
	k := &simKinds[kind]
	if k.longest > 0 {
		f.last = between(r, min(k.longest, 100*time.Millisecond), k.longest)
	}
	if p.hosts > 1 && !k.common && !oneIn(r, 3) {
		f.host = r.IntN(p.hosts)
	}
	if k.loses {
		p.queues[f.queue].purged = true
	}
	return f
}

// nextBurst leaves enough time for all consumers to heal and be judged, most times.
func (p *simPlan) nextBurst(r *rand.Rand, b *simBurst, end time.Duration) time.Duration {
	if oneIn(r, 4) {
		return end + between(r, 0, 10*time.Second)
	}
	healed := end
	for i := range p.consumers {
		healed = max(healed, b.healed(p, &p.consumers[i], true))
	}
	return healed + between(r, time.Second, 15*time.Second)
}

// stopInFaults moves some stops to the moments at which a Consumer is most likely to be dialling,
// logging in, subscribing or waiting.
func (p *simPlan) stopInFaults(r *rand.Rand) {
	var all [][]simWindow
	for i := range p.consumers {
		all = append(all, p.consumers[i].runs)
	}
	if p.group != nil {
		all = append(all, p.group.runs)
	}
	for _, runs := range all {
		for j := range runs[:len(runs)-1] {
			if len(p.bursts) == 0 || oneIn(r, 3) {
				continue
			}
			b := pick(r, p.bursts...)
			f := pick(r, b.faults...)
			stop := f.at + between(r, 0, f.last+5*time.Second)
			if stop > runs[j].start && stop < runs[j+1].start {
				runs[j].stop = stop
			}
		}
	}
}

func (p *simPlan) drawPublishes(r *rand.Rand) {
	thin := time.Duration(max(1, len(p.queues)-1)) // many queues shall not cost more time than two
	for q := range p.queues {
		transient := oneIn(r, 6)
		for at := time.Duration(0); at < p.chaos(); at += thin * between(r, 500*time.Millisecond, 3*time.Second) {
			n := 1 + r.IntN(3)
			if oneIn(r, 40) {
				n = 60
			}
			p.publishes = append(p.publishes, simPublish{at: at, queue: q, count: n, transient: transient})
		}
	}
	slices.SortStableFunc(p.publishes, func(a, b simPublish) int { return int(a.at - b.at) })
}

// keep drops the faults for which ok is false.
func (p *simPlan) keep(ok func(number int) bool) {
	for i := range p.bursts {
		b := &p.bursts[i]
		b.faults = slices.DeleteFunc(slices.Clone(b.faults), func(f simFault) bool { return !ok(f.number) })
	}
	p.bursts = slices.DeleteFunc(p.bursts, func(b simBurst) bool { return len(b.faults) == 0 })
}

func (p *simPlan) faults() []simFault {
	var all []simFault
	for _, b := range p.bursts {
		all = append(all, b.faults...)
	}
	return all
}

func sortEvents(events []simEvent) {
	slices.SortStableFunc(events, func(a, b simEvent) int { return int(a.at - b.at) })
}
