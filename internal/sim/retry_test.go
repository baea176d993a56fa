package sim_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/retryqueue"
	"github.com/steadymq/steadymq/steadymqtest"
)

// What a seed decides about WithRetry, and what goes wrong with it. What is judged is in
// transfers_test.go.

// simRetryStream is the stream that policies are drawn from, so that a seed without one is what it
// was.
const simRetryStream = 0x9e7a1

// retries tells whether somebody in the plan has a policy.
func (p *simPlan) retries() bool {
	return slices.ContainsFunc(p.consumers, func(c simConsumerPlan) bool { return c.retry != nil })
}

// retryOf is the policy of a queue's consumers, nil if none of them has one.
func (p *simPlan) retryOf(queue int) *steadymq.Retry {
	for _, c := range p.users(queue) {
		if c.retry != nil {
			return c.retry
		}
	}
	return nil
}

// drawRetry gives a third of the consumers a policy, the same to all of one queue.
func (p *simPlan) drawRetry(r *rand.Rand) {
	for i := range p.queues {
		q, policy, use := &p.queues[i], drawPolicy(r), oneIn(r, 2)
		if policy.Park == "" && policy.Attempts > 1 {
			policy.Park = pick(r, "", "parked", q.name+".parked")
		} else {
			policy.Park = pick(r, "parked", q.name+".parked")
		}
		for _, c := range p.users(i) {
			if mine := !oneIn(r, 3); use && mine && q.kind != "stream" && !q.own() {
				c.retry = policy
			}
		}
	}
	if !p.retries() {
		return
	}
	p.acts[actPark] = r.IntN(8)
	p.poison = pick[uint64](r, 0, 50, 12, 4)
	p.special = oneIn(r, 2)
	p.drawRetryFaults(r)
}

func drawPolicy(r *rand.Rand) *steadymq.Retry {
	policy := &steadymq.Retry{Attempts: 1 + r.IntN(5)}
	for range min(1+r.IntN(3), policy.Attempts-1) {
		policy.Delays = append(policy.Delays, between(r, 100*time.Millisecond, pick(r, time.Second, 5*time.Second, 20*time.Second)))
	}
	slices.Sort(policy.Delays)
	policy.Delays = slices.Compact(policy.Delays)
	return policy
}

// drawRetryFaults puts faults of simRetryKinds in the place of some.
func (p *simPlan) drawRetryFaults(r *rand.Rand) {
	var queues []int
	for i := range p.queues {
		if p.retryOf(i) != nil {
			queues = append(queues, i)
		}
	}
	for i := range p.bursts {
		for j := range p.bursts[i].faults {
			f := &p.bursts[i].faults[j]
			kind, queue, last, use := r.IntN(len(simRetryKinds)), pick(r, queues...), r.Float64(), oneIn(r, 4)
			if !use {
				continue
			}
			f.kind, f.queue, f.host = len(simFirstKinds)+len(simMoreKinds)+kind, queue, -1
			longest := min(simKinds[f.kind].longest, p.chaos()-f.at)
			f.last = time.Duration(last * float64(longest)).Truncate(time.Millisecond)
			if longest > 0 {
				f.last = max(f.last, time.Millisecond)
			}
		}
	}
}

// destinations are the queues beside queue i, the parked ones last.
func (p *simPlan) destinations(i int) (names []string) {
	policy := p.retryOf(i)
	if policy == nil {
		return nil
	}
	for _, d := range policy.Delays {
		names = append(names, retryqueue.DelayName(p.queues[i].name, d))
	}
	if policy.Park != "" {
		names = append(names, policy.Park)
	}
	return names
}

// destination is the one that a fault strikes.
func (s *sim) destination(f simFault) string {
	names := s.plan.destinations(f.queue)
	return names[f.dice%uint64(len(names))]
}

// simRetryKinds are faults of the way that copies take. No consumer loses its session by any.
var simRetryKinds = []simKind{
	{
		name: "confirms are late", longest: 90 * time.Second, harmless: true,
		on: func(s *sim, f simFault, at faultsOf) {
			late := time.Duration(1+f.dice%90000) * time.Millisecond
			s.confirmsBy(f.last + late)
			at.LateConfirms(late)
		},
		off: func(s *sim, f simFault, at faultsOf) { at.LateConfirms(0) },
	},
	{
		name: "confirms are lost", longest: time.Minute, harmless: true,
		on: func(s *sim, f simFault, at faultsOf) {
			s.confirmsBy(f.last + confirmPatience)
			at.LoseConfirms(true)
		},
		off: func(s *sim, f simFault, at faultsOf) { at.LoseConfirms(false) },
	},
	{
		name: "confirms are negative", longest: 30 * time.Second, harmless: true,
		on:  func(s *sim, f simFault, at faultsOf) { at.NackConfirms(true) },
		off: func(s *sim, f simFault, at faultsOf) { at.NackConfirms(false) },
	},
	{
		name: "copies have no queue", longest: 30 * time.Second, harmless: true,
		on:  func(s *sim, f simFault, at faultsOf) { at.Unroutable(true) },
		off: func(s *sim, f simFault, at faultsOf) { at.Unroutable(false) },
	},
	{
		name: "copies are refused", longest: 30 * time.Second, harmless: true,
		on: func(s *sim, f simFault, at faultsOf) {
			at.RefusePublish([]int{403, 404, 541}[f.dice%3], "a fault")
		},
		off: func(s *sim, f simFault, at faultsOf) { at.RefusePublish(0, "") },
	},
	{
		// It comes back empty when the next copy is on its way.
		name: "a queue beside is deleted", common: true, harmless: true,
		on: func(s *sim, f simFault, at faultsOf) {
			s.judge.mu.Lock()
			s.judge.emptied[s.destination(f)] = true
			s.judge.mu.Unlock()
			s.broker.DeleteQueue(s.destination(f))
		},
	},
	{
		name: "a queue beside is full", longest: time.Minute, common: true, harmless: true,
		on:  func(s *sim, f simFault, at faultsOf) { s.broker.FillQueue(s.destination(f), true) },
		off: func(s *sim, f simFault, at faultsOf) { s.broker.FillQueue(s.destination(f), false) },
	},
	{
		name: "an alarm for minutes", longest: 4 * time.Minute, common: true, harmless: true,
		on:  func(s *sim, f simFault, at faultsOf) { s.broker.Blocked("low on disk") },
		off: func(s *sim, f simFault, at faultsOf) { s.broker.Unblocked() },
	},
	{
		// Confirms are on their way when it ends.
		name: "publishers lose their connection", longest: 10 * time.Second, harmless: true,
		on: func(s *sim, f simFault, at faultsOf) {
			s.confirmsBy(f.last + 12*time.Second)
			at.LateConfirms(12 * time.Second)
		},
		off: func(s *sim, f simFault, at faultsOf) {
			at.LateConfirms(0)
			s.cutPublishers(simCutting(f.dice%uint64(numCuttings)), at)
		},
	},
}

// confirmPatience is how long a lost confirm is waited for the first time.
const confirmPatience = time.Minute

// confirmsBy records that confirms may be missing for that long: a stop meanwhile cannot be clean for
// those who wait for them.
func (s *sim) confirmsBy(last time.Duration) {
	s.judge.mu.Lock()
	defer s.judge.mu.Unlock()
	s.confirmed = max(s.confirmed, s.now()+last)
}

// simCutting is how a connection is cut.
type simCutting int

const (
	cutBySilence simCutting = iota
	cutByFIN
	cutByReset
	cutByClose
	cutChannel
	numCuttings
)

// cutPublishers ends the connections that copies are published on, and no others.
func (s *sim) cutPublishers(how simCutting, at faultsOf) {
	names := []string{"group"}
	for _, c := range s.plan.consumers {
		names = append(names, c.name)
	}
	for _, name := range names {
		struck := at.Named(name + " (retry)")
		switch how {
		case cutBySilence:
			struck.Silence()
		case cutByFIN:
			struck.FIN()
		case cutByReset:
			struck.Reset()
		case cutByClose:
			struck.CloseConnections(320, "CONNECTION_FORCED - Closed via management plugin")
		case cutChannel:
			struck.CloseChannels(406, "a fault")
		}
	}
}

// poisonous tells a message that every handler fails with which the policy takes it from.
func (s *sim) poisonous(id string) bool {
	return s.plan.poison > 0 && s.dice(id, 0)%s.plan.poison == 0
}

// specialize gives some messages what a copy must not have.
func (s *sim) specialize(x *simPublish, i int, m *steadymqtest.Message) {
	if !s.plan.special || s.plan.retryOf(x.queue) == nil {
		return
	}
	switch i % 5 {
	case 1:
		m.Headers = map[string]any{"CC": []any{"copied"}, "BCC": []any{"copied"}, "tenant": "blue"}
	case 2:
		m.Expiration = "86400000"
	case 4:
		m.UserID = "somebody"
	}
}

// beside tells of a message that waits in a queue of a delay, "" if there is none.
func (s *sim) beside(q *simQueuePlan) string {
	l := s.broker.Ledger()
	for _, m := range l.Messages {
		waits := m.Fate == steadymqtest.Ready || m.Fate == steadymqtest.Unacked || m.Fate == steadymqtest.AwaitsTarget
		if waits && strings.HasPrefix(m.Queue, q.name+".retry.") {
			return fmt.Sprintf("a message has not come back: %+v", m)
		}
	}
	return ""
}
