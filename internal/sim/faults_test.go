package sim_test

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/steadymq/steadymq/steadymqtest"
)

// simPace is how soon retries follow each other once a fault is noticed, which bounds how long
// after its end a consumer may need (docs/FAULTS.md has the paces).
type simPace int

const (
	paceNow      simPace = iota // the first retry of a healthy session
	paceRefused                 // dials fail: cap 1 s
	paceDial                    // dials hang: the dial limit, then cap 1 s
	paceSlow                    // handshake or setup fails: the backoff's cap
	paceHang                    // the setup limit, then the backoff's cap
	paceAbsent                  // cap 5 s
	paceLocked                  // 0.5-1 s for 3 heartbeats + 5 s, then as operator
	paceOperator                // cap 30 s
)

const (
	absentLimit   = 5 * time.Second
	operatorLimit = 30 * time.Second
	silentRefusal = 3 * time.Second // what a try takes to be refused, at most
)

// simKind is one kind of fault of docs/FAULTS.md.
type simKind struct {
	name     string
	longest  time.Duration       // 0: it strikes at one moment
	common   bool                // it has no host
	stalls   bool                // a stall detector has to see it
	needs    func(*simPlan) bool // nil: it is for all plans
	loses    bool                // messages may be dropped by the broker
	harmless bool                // no session may end because of it
	hinders  bool                // but none may begin
	refuses  []uint64            // codes[dice%codes] for which a Run without a session may give up
	codes    uint64
	kick     bool // it needs new connections to be met
	pace     simPace
	lingers  bool                                 // the broker keeps the old consumer for up to 3 heartbeats
	after    time.Duration                        // what it started goes on for so long
	detect   func(*simConsumerPlan) time.Duration // since its start, until the consumer knows
	brief    func(*simConsumerPlan) time.Duration // detect, where it ends before the broker's next heartbeat
	escape   func(*simConsumerPlan) time.Duration // when it strikes one host of several: until the next is tried
	on       func(*sim, simFault, steadymqtest.Faults)
	off      func(*sim, simFault, steadymqtest.Faults)
}

func halfBeats(n time.Duration) func(*simConsumerPlan) time.Duration {
	return func(c *simConsumerPlan) time.Duration { return n*c.heartbeat/2 + 500*time.Millisecond }
}

func escapeIn(d time.Duration) func(*simConsumerPlan) time.Duration {
	return func(*simConsumerPlan) time.Duration { return d }
}

func escapeDial(c *simConsumerPlan) time.Duration  { return c.dial + 200*time.Millisecond }
func escapeSetup(c *simConsumerPlan) time.Duration { return c.slowest() + time.Second }

type faultsOf = steadymqtest.Faults

// simKinds are all faults: simFirstKinds, of which every seed enables a random half, and
// simMoreKinds and simRetryKinds, which come in place of some.
var simKinds = slices.Concat(simFirstKinds, simMoreKinds, simRetryKinds)

// simFirstKinds are the kit's faults. What they are and their order is part of a seed's meaning.
var simFirstKinds = []simKind{
	{name: "connection.close 320", on: func(s *sim, f simFault, at faultsOf) {
		at.CloseConnections(320, "broker forced connection closure with reason 'shutdown'")
	}},
	{name: "connection.close 5xx", on: func(s *sim, f simFault, at faultsOf) {
		at.CloseConnections([]int{501, 502, 503, 504, 505, 506, 541}[f.dice%7], "a fault")
	}},
	{name: "channel.close 406 timeout", common: true, on: func(s *sim, f simFault, at faultsOf) {
		at.CloseChannels(406, "delivery acknowledgement on channel 1 timed out. Timeout value used: 1 ms")
	}},
	{name: "channel.close 4xx", codes: 4, refuses: []uint64{0, 3}, pace: paceLocked, on: func(s *sim, f simFault, at faultsOf) {
		at.CloseChannels([]int{403, 404, 405, 406}[f.dice%4], "a fault")
	}},
	{name: "cancel", common: true, on: func(s *sim, f simFault, at faultsOf) { at.CancelConsumers(s.queue(f)) }},
	{name: "cancel and take back", common: true, on: func(s *sim, f simFault, at faultsOf) { at.ReleaseConsumers(s.queue(f)) }},
	{name: "cancel on a host", on: func(s *sim, f simFault, at faultsOf) { at.CancelConsumers("") }},
	{name: "reset", on: func(s *sim, f simFault, at faultsOf) { at.Reset() }},
	{name: "fin", on: func(s *sim, f simFault, at faultsOf) { at.FIN() }},
	{name: "silence", detect: halfBeats(3), on: func(s *sim, f simFault, at faultsOf) { at.Silence() }},
	{name: "stray reply on channel", detect: halfBeats(5), on: func(s *sim, f simFault, at faultsOf) { at.StrayReply(false) }},
	{name: "stray reply on connection", detect: halfBeats(5), on: func(s *sim, f simFault, at faultsOf) {
		at.StrayReply(!s.plan.renews()) // the next renewal would take it for its answer, and never get its own
	}},
	{name: "delivery behind channel.close", codes: 1, refuses: []uint64{0}, on: func(s *sim, f simFault, at faultsOf) { at.StrayDelivery() }},
	{name: "garbage", on: func(s *sim, f simFault, at faultsOf) { at.Garbage() }},
	{name: "random bytes", detect: halfBeats(5), on: func(s *sim, f simFault, at faultsOf) { at.Garbage(randomBytes(f.dice)...) }},
	{name: "rotate the password", common: true, kick: true, codes: 1, refuses: []uint64{0}, on: func(s *sim, f simFault, at faultsOf) { s.rotate(f) }},
	{name: "purge", common: true, loses: true, harmless: true, on: func(s *sim, f simFault, at faultsOf) { s.broker.PurgeQueue(s.queue(f)) }},

	{
		name: "refuse dials", longest: 40 * time.Second, kick: true, pace: paceRefused, escape: escapeIn(200 * time.Millisecond),
		on:  func(s *sim, f simFault, at faultsOf) { at.Refuse(true) },
		off: func(s *sim, f simFault, at faultsOf) { at.Refuse(false) },
	},
	{
		name: "drop SYNs", longest: 40 * time.Second, kick: true, pace: paceDial, escape: escapeDial,
		on:  func(s *sim, f simFault, at faultsOf) { at.DropSYN(true) },
		off: func(s *sim, f simFault, at faultsOf) { at.DropSYN(false) },
	},
	{
		name: "no name", longest: 40 * time.Second, kick: true, pace: paceRefused, escape: escapeIn(200 * time.Millisecond),
		on:  func(s *sim, f simFault, at faultsOf) { at.DNSFailure(true) },
		off: func(s *sim, f simFault, at faultsOf) { at.DNSFailure(false) },
	},
	{
		// A brief one may lose what we send and nothing of the broker's: that is one to the broker.
		name: "black hole both ways", longest: 40 * time.Second, detect: halfBeats(3), brief: halfBeats(7), pace: paceDial, lingers: true, escape: escapeDial,
		on:  func(s *sim, f simFault, at faultsOf) { at.BlackHole(true, true) },
		off: func(s *sim, f simFault, at faultsOf) { at.BlackHole(false, false) },
	},
	{
		name: "black hole to client", longest: 40 * time.Second, detect: halfBeats(3), pace: paceDial, lingers: true, escape: escapeDial,
		on:  func(s *sim, f simFault, at faultsOf) { at.BlackHole(false, true) },
		off: func(s *sim, f simFault, at faultsOf) { at.BlackHole(false, false) },
	},
	{
		name: "black hole to broker", longest: 40 * time.Second, detect: halfBeats(7), pace: paceDial, lingers: true, escape: escapeDial,
		on:  func(s *sim, f simFault, at faultsOf) { at.BlackHole(true, false) },
		off: func(s *sim, f simFault, at faultsOf) { at.BlackHole(false, false) },
	},
	{
		name: "short stall", longest: 900 * time.Millisecond, harmless: true,
		on:  func(s *sim, f simFault, at faultsOf) { at.Stall() },
		off: func(s *sim, f simFault, at faultsOf) { at.Unstall() },
	},
	{
		name: "long stall", longest: 40 * time.Second, detect: halfBeats(3), pace: paceDial, lingers: true, escape: escapeDial,
		on:  func(s *sim, f simFault, at faultsOf) { at.Stall() },
		off: func(s *sim, f simFault, at faultsOf) { at.Unstall() },
	},
	{
		name: "kill", longest: 30 * time.Second, pace: paceRefused, escape: escapeIn(200 * time.Millisecond),
		on:  func(s *sim, f simFault, at faultsOf) { at.Kill() },
		off: func(s *sim, f simFault, at faultsOf) { at.Restart() },
	},
	{
		name: "power off", longest: 40 * time.Second, detect: halfBeats(3), pace: paceDial, escape: escapeDial,
		on:  func(s *sim, f simFault, at faultsOf) { at.PowerOff() },
		off: func(s *sim, f simFault, at faultsOf) { at.Restart() },
	},
	{
		name: "stop the node", longest: 40 * time.Second, pace: paceRefused, escape: escapeIn(200 * time.Millisecond),
		on: func(s *sim, f simFault, at faultsOf) {
			at.Refuse(true)
			at.CloseConnections(320, "broker forced connection closure with reason 'shutdown'")
		},
		off: func(s *sim, f simFault, at faultsOf) { at.Refuse(false) },
	},
	{
		name: "hang at a stage", longest: 30 * time.Second, kick: true, pace: paceHang, escape: escapeSetup,
		on:  func(s *sim, f simFault, at faultsOf) { at.HangAt(stageOf(f), true) },
		off: func(s *sim, f simFault, at faultsOf) { at.HangAt(stageOf(f), false) },
	},
	{
		name: "drop at a stage", longest: 30 * time.Second, kick: true, pace: paceSlow,
		on:  func(s *sim, f simFault, at faultsOf) { at.DropAt(stageOf(f), true) },
		off: func(s *sim, f simFault, at faultsOf) { at.DropAt(stageOf(f), false) },
	},
	{
		name: "refuse the login", longest: 30 * time.Second, kick: true, codes: 1, refuses: []uint64{0}, pace: paceOperator, escape: escapeIn(10 * time.Second),
		on: func(s *sim, f simFault, at faultsOf) {
			at.SetLoginRefusal(steadymqtest.LoginRefusal(f.dice % 4))
			at.RefuseLogin(true)
		},
		off: func(s *sim, f simFault, at faultsOf) { at.RefuseLogin(false) },
	},
	{
		name: "refuse the vhost", longest: 30 * time.Second, kick: true, codes: 2, refuses: []uint64{0}, pace: paceOperator,
		on: func(s *sim, f simFault, at faultsOf) {
			at.RefuseVhost([]int{530, 541}[f.dice%2], "vhost / not found")
		},
		off: func(s *sim, f simFault, at faultsOf) { at.RefuseVhost(0, "") },
	},
	{
		name: "connection limit", longest: 15 * time.Second, kick: true, pace: paceLocked,
		on: func(s *sim, f simFault, at faultsOf) {
			at.RefuseVhost(530, "access to vhost '/' refused for user 'sim': connection limit (1) is reached")
		},
		off: func(s *sim, f simFault, at faultsOf) { at.RefuseVhost(0, "") },
	},
	{
		name: "refuse the consume", longest: 40 * time.Second, kick: true, codes: 5, refuses: []uint64{0, 2, 3}, pace: paceOperator,
		on: func(s *sim, f simFault, at faultsOf) {
			at.RefuseConsume([]int{403, 404, 406, 540, 541}[f.dice%5], "a fault")
		},
		off: func(s *sim, f simFault, at faultsOf) { at.RefuseConsume(0, "") },
	},
	{
		name: "locked", longest: 11 * time.Second, kick: true, pace: paceLocked,
		on: func(s *sim, f simFault, at faultsOf) {
			if f.dice%2 == 0 {
				at.RefuseConsume(405, "cannot obtain exclusive access to locked queue")
				return
			}
			at.RefuseConsume(403, "queue 'q0' in vhost '/' in exclusive use")
		},
		off: func(s *sim, f simFault, at faultsOf) { at.RefuseConsume(0, "") },
	},
	{
		name: "late 541", longest: 10 * time.Second, kick: true, pace: paceSlow, after: 65 * time.Second,
		on:  func(s *sim, f simFault, at faultsOf) { at.Late541(true) },
		off: func(s *sim, f simFault, at faultsOf) { at.Late541(false) },
	},
	{
		name: "slow close-ok", longest: 60 * time.Second, harmless: true,
		on: func(s *sim, f simFault, at faultsOf) {
			at.SlowCloseOk(time.Duration(f.dice%10000) * time.Millisecond)
		},
		off: func(s *sim, f simFault, at faultsOf) { at.SlowCloseOk(0) },
	},
	{
		name: "no close-ok", longest: 60 * time.Second, harmless: true,
		on:  func(s *sim, f simFault, at faultsOf) { at.NoCloseOk(true) },
		off: func(s *sim, f simFault, at faultsOf) { at.NoCloseOk(false) },
	},
	{
		name: "zero window", longest: 40 * time.Second, detect: halfBeats(7), pace: paceSlow, lingers: true,
		on:  func(s *sim, f simFault, at faultsOf) { at.ZeroWindow(true) },
		off: func(s *sim, f simFault, at faultsOf) { at.ZeroWindow(false) },
	},
	{
		name: "latency", longest: 30 * time.Second, harmless: true,
		on: func(s *sim, f simFault, at faultsOf) {
			at.SetLatency(time.Duration(f.dice%200) * time.Millisecond)
		},
		off: func(s *sim, f simFault, at faultsOf) { at.SetLatency(s.plan.latency) },
	},
	{
		name: "cut after n bytes", longest: 20 * time.Second, pace: paceSlow,
		on:  func(s *sim, f simFault, at faultsOf) { at.CutAfter(int(f.dice % 3000)) },
		off: func(s *sim, f simFault, at faultsOf) { at.CutAfter(-1) },
	},
	{
		name: "cut after n bytes to broker", longest: 20 * time.Second, pace: paceSlow,
		on:  func(s *sim, f simFault, at faultsOf) { at.CutClientAfter(int(f.dice % 1500)) },
		off: func(s *sim, f simFault, at faultsOf) { at.CutClientAfter(-1) },
	},
	{
		name: "no majority", longest: 30 * time.Second, common: true, harmless: true, stalls: true,
		on:  func(s *sim, f simFault, at faultsOf) { s.broker.QuorumStall(s.aim(f), true) },
		off: func(s *sim, f simFault, at faultsOf) { s.broker.QuorumStall(s.aimed(f), false) },
	},
	{
		name: "memory alarm", longest: 30 * time.Second, common: true, harmless: true,
		on:  func(s *sim, f simFault, at faultsOf) { s.broker.Blocked("low on memory") },
		off: func(s *sim, f simFault, at faultsOf) { s.broker.Unblocked() },
	},
	{
		name: "delete the queue", longest: 30 * time.Second, common: true, loses: true, pace: paceAbsent,
		on:  func(s *sim, f simFault, at faultsOf) { s.deleteQueue(f) },
		off: func(s *sim, f simFault, at faultsOf) { s.declare(s.plan.queues[f.queue]) },
	},
	{
		name: "sessions flap", longest: 40 * time.Second, common: true, kick: true, pace: paceSlow,
		on:  func(s *sim, f simFault, at faultsOf) { s.flaps.Store(1 + int32(f.dice%3)) },
		off: func(s *sim, f simFault, at faultsOf) { s.flaps.Store(0) },
	},
	{
		name: "the topology fails", longest: 30 * time.Second, common: true, kick: true, pace: paceHang,
		on:  func(s *sim, f simFault, at faultsOf) { s.topologyFails.Store(1 + int32(f.dice%4)) },
		off: func(s *sim, f simFault, at faultsOf) { s.topologyFails.Store(0) },
	},
}

func stageOf(f simFault) steadymqtest.Stage {
	all := steadymqtest.Stages()
	return all[f.dice%uint64(len(all))]
}

func randomBytes(dice uint64) []byte {
	r := rand.New(rand.NewPCG(dice, 1))
	p := make([]byte, 1+r.IntN(64))
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

// refuses tells whether the broker says by this fault that the configuration cannot work.
func (f simFault) refuses() bool {
	k := &simKinds[f.kind]
	return k.codes > 0 && slices.Contains(k.refuses, f.dice%k.codes)
}

// strike starts a fault.
func (s *sim) strike(f simFault) {
	k, at := &simKinds[f.kind], s.faultsAt(f)
	k.on(s, f, at)
	if !k.kick {
		return
	}
	switch f.dice / 1024 % 3 {
	case 0:
		at.Reset()
	case 1:
		at.FIN()
	case 2:
		at.CloseConnections(320, "CONNECTION_FORCED - Closed via management plugin")
	}
}

// heal ends a lasting fault.
func (s *sim) heal(f simFault) {
	if off := simKinds[f.kind].off; off != nil {
		off(s, f, s.faultsAt(f))
	}
}

func (s *sim) faultsAt(f simFault) steadymqtest.Faults {
	if f.host < 0 {
		return s.broker.Faults
	}
	return s.broker.Host(f.host).Faults
}

// connect is how long a dial and a setup take on a healthy path that is not slow.
func (p *simPlan) connect() time.Duration {
	if p.retries() { // the queues beside are asked for, too
		return 70*p.latency + 50*time.Millisecond
	}
	return 30*p.latency + 50*time.Millisecond
}

// fast is the bound of a resume when the session was healthy and the broker is there.
func (p *simPlan) fast(c *simConsumerPlan) time.Duration {
	fast := 500*time.Millisecond + p.connect() + c.lag
	if p.queues[c.queue].kind == "stream" {
		fast += 2500 * time.Millisecond // it looks whether the stream is still there
	}
	return fast
}

// healed is when c must be consuming again if nothing else happens: the bound of the fault, or,
// loosely, that of faults that overlap or follow too soon.
func (b *simBurst) healed(p *simPlan, c *simConsumerPlan, loosely bool) time.Duration {
	if len(b.faults) == 1 && !loosely && !p.roundabout(c) {
		return b.faults[0].healed(p, c)
	}
	var noticed time.Duration
	for _, f := range b.faults {
		noticed = max(noticed, f.noticed(c), f.at+5*c.heartbeat/2+time.Second)
	}
	if p.owns(c) {
		noticed += 3*c.heartbeat + 2*time.Second
	}
	if p.queues[c.queue].own() { // an old connection stays until its handlers have finished
		noticed += c.drain + c.shut + time.Second
	}
	return noticed + p.tail(c)
}

// tail is what a consumer may need, once nothing is wrong any more, after faults that overlap.
func (p *simPlan) tail(c *simConsumerPlan) time.Duration {
	return 2*(c.slowest()+time.Second+c.limit+c.lag) + p.connect() + c.inTurn()
}

// noticed is when the fault is over and c knows of it at the latest.
func (f simFault) noticed(c *simConsumerPlan) time.Duration {
	k := &simKinds[f.kind]
	return max(f.at+f.detect(c), f.end()+k.after+c.patience(k))
}

// patience is how much longer than its limit a set-up may hang where others share the connection: the
// limit counts silence, and deliveries for them break that, ten times at most.
func (c *simConsumerPlan) patience(k *simKind) time.Duration {
	if c.others > 0 && k.pace == paceHang {
		return 9 * c.slowest()
	}
	return 0
}

func (f simFault) detect(c *simConsumerPlan) time.Duration {
	k := &simKinds[f.kind]
	switch {
	case k.brief != nil && f.last <= c.heartbeat/2:
		return k.brief(c)
	case k.detect != nil:
		return k.detect(c)
	}
	return 0
}

// healed is the bound of a single fault that strikes a healthy session.
func (f simFault) healed(p *simPlan, c *simConsumerPlan) time.Duration {
	k := &simKinds[f.kind]
	noticed, pace := f.noticed(c), k.pace
	if k.stalls && c.stall > 0 { // its detector may have tried again and again
		noticed, pace = noticed+time.Second, paceSlow
	}
	if k.escape != nil && f.host >= 0 && p.hosts > 1 && !p.urlFunc && !c.balanced {
		noticed, pace = f.at+f.detect(c)+k.escape(c), paceNow
		if c.others > 0 && k.pace == paceHang { // it leaves a connection that others share after a second one
			noticed += 2 * c.slowest()
		}
	}
	if p.owns(c) && k.lingers { // the broker buries the old connection first
		noticed = max(noticed, f.at+3*c.heartbeat+time.Second)
		pace = max(pace, paceRefused)
	}
	return noticed + f.wait(p, c, pace) + f.inTurn(c)
}

func (f simFault) wait(p *simPlan, c *simConsumerPlan, pace simPace) time.Duration {
	wait := p.fast(c)
	switch pace {
	case paceNow:
	case paceRefused:
		wait += time.Second
	case paceDial:
		wait += time.Second + c.dial
	case paceSlow:
		wait += c.limit
	case paceHang:
		wait += c.slowest() + time.Second + c.limit
	case paceAbsent:
		wait += min(absentLimit, c.limit)
	case paceLocked:
		wait += time.Second
		if f.last > 3*c.heartbeat+5*time.Second {
			wait += min(operatorLimit, c.limit)
		}
	case paceOperator:
		wait += silentRefusal + min(operatorLimit, c.limit)
	}
	return wait
}
