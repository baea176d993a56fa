package sim_test

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/retryqueue"
	"github.com/steadymq/steadymq/steadymqtest"
)

// What is judged of messages that are delayed or parked, I13 to I17: by what their handlers have
// said and by the ledger.

// simMove is a delivery whose copy has to get into another queue before it is acked.
type simMove struct {
	c       *simConsumer
	id      string
	key     simKey
	outcome steadymq.Outcome
	to      string
	failed  int // how often the message had failed before
	at      time.Time
}

// simSeen is what a handler saw of a copy.
type simSeen struct {
	key    simKey
	failed int
}

// headerOf is the attempt header of a delivery: how often it has failed.
func headerOf(d *steadymq.Delivery) int {
	n, _ := d.Headers["steadymq-attempt"].(int32)
	return int(n)
}

// follows decides what the policy makes of a delivery that its handler has not settled.
func (j *simJudge) follows(h *simHandling, act simAct, err error) (moves bool) {
	policy, x := h.c.plan.retry, j.handled[h.key]
	_, explicit := steadymq.OutcomeOf(err)
	if policy == nil || err != nil && explicit && act != actPark || act == actPark && policy.Park == "" {
		return false
	}
	m := &simMove{c: h.c, id: h.d.MessageId, key: h.key, failed: h.failed, at: time.Now(), outcome: steadymq.Parked, to: policy.Park}
	if failed := h.failed + 1; act != actPark && failed < policy.Attempts {
		m.outcome = steadymq.Delayed
		m.to = retryqueue.DelayName(j.s.plan.queues[h.c.plan.queue].name, policy.Delays[min(failed, len(policy.Delays))-1])
	}
	if m.to == "" {
		j.decide(x, steadymq.Discarded)
		return true
	}
	j.decide(x, m.outcome)
	x.move = m
	j.moves[m.id] = append(j.moves[m.id], m)
	j.moved[m.id] = true
	return true
}

// movedWrongly judges what came for a delivery whose copy had to be published first: an ack, or back to the
// queue, uncounted, when its session has taken no more part. The copy itself is judged at the end.
func (j *simJudge) movedWrongly(x *simSession, m *simMove, r *steadymqtest.SettlementRecord) bool {
	if r.Kind == steadymqtest.Ack {
		return false
	}
	if !r.Requeue || r.Kind != steadymqtest.Nack { // a reject would count as one more failure of a handler
		return true
	}
	if x.record.Ended.IsZero() && !x.consumer.stopping {
		j.note("I13", "%v is what became of it, and it went back: %+v", m.outcome, *r)
	}
	return false
}

// arrives judges what a handler sees of a copy that has come back.
func (j *simJudge) arrives(h *simHandling) {
	policy, d := h.c.plan.retry, h.d
	h.failed = headerOf(d)
	_, copied := d.Headers["steadymq-attempt"]
	if copied && h.failed < 1 {
		j.note("I16", "a copy of %s has failed %d times", d.MessageId, h.failed)
	}
	if copied {
		j.seen[d.MessageId] = append(j.seen[d.MessageId], simSeen{h.key, h.failed})
	}
	if policy == nil || h.failed == 0 {
		return
	}
	_, cc := d.Headers["CC"]
	_, bcc := d.Headers["BCC"]
	switch {
	case h.failed >= policy.Attempts:
		j.note("I16", "a handler gets %s after %d failures, of %d attempts", d.MessageId, h.failed, policy.Attempts)
	case d.Attempt() < h.failed+1:
		j.note("I16", "%s has failed %d times and is attempt %d", d.MessageId, h.failed, d.Attempt())
	case cc || bcc || d.Expiration != "" || d.UserId != "":
		j.note("I14", "the copy of %s has what sends, ends or refuses it: CC %t, BCC %t, expiration %q, user %q", d.MessageId, cc, bcc, d.Expiration, d.UserId)
	}
}

// simTransfers is what the ledger has of copies.
type simTransfers struct {
	j          *simJudge
	l          *steadymqtest.Ledger
	sent       map[string][]int         // publications by message
	deliveries map[simKey]int           // of moved messages
	consumed   map[uint64]bool          // connections that have had a consumer
	ended      map[uint64]time.Time     // connections
	delays     map[string]time.Duration // by queue
	back       map[string]string        // from a queue of a delay to that of its messages
	arrived    map[int]int              // from a record in the queue of a delay to the one that it became
}

// transferred judges all copies, once everything is over.
func (j *simJudge) transferred(l *steadymqtest.Ledger) {
	if !j.s.retries {
		return
	}
	t := newSimTransfers(j, l)
	for i := range l.Publications {
		t.published(&l.Publications[i])
	}
	for id, moves := range j.moves {
		t.judge(id, moves)
	}
	for i := range l.Messages {
		t.conserved(i, &l.Messages[i])
	}
}

func newSimTransfers(j *simJudge, l *steadymqtest.Ledger) *simTransfers {
	t := &simTransfers{
		j: j, l: l, sent: make(map[string][]int), deliveries: make(map[simKey]int), consumed: make(map[uint64]bool),
		ended: make(map[uint64]time.Time), delays: make(map[string]time.Duration), back: make(map[string]string), arrived: make(map[int]int),
	}
	for i, p := range l.Publications {
		t.sent[p.ID] = append(t.sent[p.ID], i)
	}
	for i := range l.Deliveries {
		if d := &l.Deliveries[i]; j.moved[d.ID] {
			t.deliveries[simKey{d.ConsumerTag, d.Tag}] = i
		}
	}
	for _, c := range l.Consumers {
		t.consumed[c.Connection] = true
	}
	for _, c := range l.Connections {
		t.ended[c.ID] = c.Ended
	}
	for i, m := range l.Messages {
		if m.From >= 0 {
			t.arrived[m.From] = i
		}
	}
	for i, q := range j.s.plan.queues {
		if policy := j.s.plan.retryOf(i); policy != nil {
			for _, d := range policy.Delays {
				name := retryqueue.DelayName(q.name, d)
				t.delays[name], t.back[name] = d, q.name
			}
		}
	}
	return t
}

// published judges one copy by itself.
func (t *simTransfers) published(p *steadymqtest.PublicationRecord) {
	j := t.j
	switch {
	case t.consumed[p.Connection]:
		j.note("I13", "a copy was published on a connection that consumes, where an alarm stops the acks: %+v", *p)
	case !j.moved[p.ID]:
		j.note("I14", "a copy of a message that no handler has failed with: %+v", *p)
	case p.Queues > 1:
		j.note("I14", "a copy went to %d queues: %+v", p.Queues, *p)
	case !p.Mandatory || p.Sequence == 0 && p.Refused == 0:
		j.note("I13", "a copy was published without asking for what becomes of it: %+v", *p)
	}
}

// safe tells that the broker has said so.
func safe(p *steadymqtest.PublicationRecord) bool {
	return !p.Confirmed.IsZero() && !p.Nacked && !p.Returned && p.Queues > 0 && p.Full == 0
}

// stored tells that there is a copy, whatever was said of it.
func stored(p *steadymqtest.PublicationRecord) bool { return p.Refused == 0 && p.Queues > p.Full }

// judge judges the copies of one message: each ack has one of its own, and there are no more without a
// reason.
func (t *simTransfers) judge(id string, moves []*simMove) {
	var acked []*simMove
	reasons := 0
	for _, m := range moves {
		i, ok := t.deliveries[m.key]
		switch d := &t.l.Deliveries[i]; {
		case !ok:
		case d.Settled.IsZero(): // its session was lost
			reasons++
		case d.Kind == steadymqtest.Ack:
			acked = append(acked, m)
		}
	}
	of := t.match(acked)
	for i, m := range acked {
		if of[i] < 0 {
			t.j.note("I13", "%s of %s was acked as %v without a copy that is safe in %s: %+v", m.key.consumer, id, m.outcome, m.to, t.l.Deliveries[t.deliveries[m.key]])
			return
		}
		t.inTime(m, of[i])
	}
	copies := 0
	for _, i := range t.sent[id] {
		p := &t.l.Publications[i]
		if stored(p) {
			copies++
			if t.doubtful(p) {
				reasons++
			}
		}
		t.counted(i, p, moves)
	}
	if copies > len(acked)+reasons {
		t.j.note("I15", "%d copies of %s are stored, for %d acks and %d reasons to send another", copies, id, len(acked), reasons)
	}
}

// doubtful tells that the publisher may not have learned that a copy is stored.
func (t *simTransfers) doubtful(p *steadymqtest.PublicationRecord) bool {
	patience := time.Duration(0)
	for i := range t.j.s.plan.consumers {
		c := &t.j.s.plan.consumers[i]
		patience = max(patience, c.slowest()+3*c.heartbeat+2*time.Second+c.lag)
	}
	ended := t.ended[p.Connection]
	return p.Confirmed.IsZero() || p.Nacked || p.Returned || p.Confirmed.Sub(p.Time) >= 30*time.Second || !ended.IsZero() && ended.Sub(p.Time) < patience
}

// match finds for each ack a copy that was safe before it, -1 if there is none left.
func (t *simTransfers) match(acked []*simMove) []int {
	taken := make(map[int]int) // which ack has a publication
	of := make([]int, len(acked))
	var find func(i int, tried map[int]bool) bool
	find = func(i int, tried map[int]bool) bool {
		m := acked[i]
		d := &t.l.Deliveries[t.deliveries[m.key]]
		for _, n := range t.sent[m.id] {
			p := &t.l.Publications[n]
			if tried[n] || !safe(p) || p.RoutingKey != m.to || p.Time.Before(m.at) || p.Confirmed.After(d.Settled) {
				continue
			}
			tried[n] = true
			if other, has := taken[n]; !has || find(other, tried) {
				taken[n], of[i] = i, n
				return true
			}
		}
		return false
	}
	for i := range acked {
		of[i] = -1
	}
	for i := range acked {
		find(i, make(map[int]bool))
	}
	return of
}

// counted judges what a copy calls itself, as the handlers see it that it comes back to: one more than a
// handler saw that has failed with it before.
func (t *simTransfers) counted(n int, p *steadymqtest.PublicationRecord, moves []*simMove) {
	if !slices.ContainsFunc(moves, func(m *simMove) bool { return m.to == p.RoutingKey && !m.at.After(p.Time) }) {
		t.j.note("I14", "a copy is published where nobody has sent it: %+v", *p)
	}
	for _, h := range t.j.seen[p.ID] {
		i, ok := t.deliveries[h.key]
		if !ok || t.cameBy(t.l.Deliveries[i].Message) != n {
			continue
		}
		if !slices.ContainsFunc(moves, func(m *simMove) bool {
			return m.to == p.RoutingKey && m.failed == h.failed-1 && !m.at.After(p.Time)
		}) {
			t.j.note("I16", "%s comes back from %s and has failed %d times, which no handler has seen", p.ID, p.RoutingKey, h.failed)
		}
	}
}

// cameBy returns the publication of the copy that a record in a queue was, -1 if it was none.
func (t *simTransfers) cameBy(record int) int {
	m := &t.l.Messages[record]
	if m.From < 0 || t.back[t.l.Messages[m.From].Queue] != m.Queue {
		return -1
	}
	return t.l.Messages[m.From].Publication
}

// conserved is I14 for what is in the queues beside.
func (t *simTransfers) conserved(i int, m *steadymqtest.MessageRecord) {
	j := t.j
	delay, delays := t.delays[m.Queue]
	if !delays && m.Publication < 0 {
		return
	}
	ok := m.Fate == steadymqtest.Ready && !delays
	next, came := t.arrived[i]
	gone := j.s.plan.purgedQueue(t.back[m.Queue])
	switch {
	case m.Fate == steadymqtest.Dropped:
		ok = j.emptied[m.Queue] || j.transientBeside(m.Queue)
	case delays && m.Fate == steadymqtest.DeadLettered:
		ok = m.Death == "expired" && (came || gone)
	}
	if !ok {
		j.note("I14", "a copy ends wrongly: %+v", *m)
	}
	if !came || !delays {
		return
	}
	waited := t.l.Messages[next].Published.Sub(m.Published)
	if waited < delay*9/10 || waited > delay*11/10+100*time.Millisecond && !gone {
		j.note("I17", "%s was to wait for %v and has waited for %v in %s", m.ID, delay, waited, m.Queue)
	}
}

// inTime judges how long the copy of a delivery took to be published.
func (t *simTransfers) inTime(m *simMove, n int) {
	p := &t.l.Publications[n]
	s, c := t.j.s, m.c.plan
	if took := p.Time.Sub(m.at); took > 2*time.Second+2*s.plan.connect()+4*c.lag && s.calmIn(m.at.Sub(s.start), p.Time.Sub(s.start)) {
		t.j.note("I17", "the copy of %s was published %v after its handler had failed, and nothing was in the way", m.id, took)
	}
}

// calmIn tells that no fault was near.
func (s *sim) calmIn(from, to time.Duration) bool {
	return !slices.ContainsFunc(s.plan.faults(), func(f simFault) bool {
		return f.at <= to && f.end()+simKinds[f.kind].after+2*time.Minute >= from
	})
}

// purgedQueue tells that a fault drops what is in a queue.
func (p *simPlan) purgedQueue(name string) bool {
	return slices.ContainsFunc(p.queues, func(q simQueuePlan) bool { return q.name == name && q.purged })
}

// transientBeside is transient for the queues beside others.
func (j *simJudge) transientBeside(name string) bool {
	return slices.ContainsFunc(j.s.plan.queues, func(q simQueuePlan) bool {
		return j.s.plan.transient(q.name) && (strings.HasPrefix(name, q.name+".") || name == "parked")
	})
}

// tally is I18: each delivery counts once.
func (c *simConsumer) tally(n *steadymq.Stats) {
	settled := n.Acked + n.Requeued + n.Discarded + n.Parked + n.Delayed + n.Stale
	if settled > n.Delivered || settled < n.Delivered && !c.unsure {
		c.s.judge.note("I18", "%d deliveries of %s, and %d outcomes: %s", n.Delivered, c.plan.name, settled, fmt.Sprintf("%+v", *n))
	}
}

// retryLine judges how many lines there are about copies.
func (c *simConsumer) retryLine(message string) {
	for _, text := range []string{"parked", "does not get into the queue"} {
		if strings.Contains(message, text) {
			if n := c.lines.add(c.s.now(), time.Minute); n > 6 {
				c.s.judge.violate("I18", "%s has logged %d lines about copies within a minute, the last one: %s", c.plan.name, n, message)
			}
			return
		}
	}
}
