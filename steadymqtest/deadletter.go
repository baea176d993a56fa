package steadymqtest

import (
	"maps"
	"slices"
	"time"
)

// deadRetry is how long a queue that dead-letters at least once waits before it tries again: for a target that is not there, and for
// a confirm (dead_letter_worker_publisher_confirm_timeout of RabbitMQ).
const deadRetry = 180 * time.Second

// undelivered is a dead message that stays in its queue until every target has taken it: x-dead-letter-strategy at-least-once.
type undelivered struct {
	e      *entry
	m      *message
	reason string
	took   []*queue  // targets that have it
	tried  time.Time // zero: there was no target yet
}

// deadLetter sends a message to the dead-letter exchange of its queue, if it has one.
func (q *queue) deadLetter(e *entry, reason string) {
	q.b.ledger.died(e.record, reason)
	if !q.deadLetters {
		return
	}
	m := q.b.dead(e, reason)
	if q.atLeastOnce {
		u := &undelivered{e: e, m: m, reason: reason}
		q.b.ledger.setFate(e.record, AwaitsTarget)
		q.dead = append(q.dead, u)
		q.forward(u)
		q.retryLater()
		return
	}
	q.b.ledger.setFate(e.record, DeadLettered)
	for _, target := range q.b.deadTargets(m, reason) {
		target.publish(m, nil)
	}
}

// forward publishes to the targets that do not have the message yet. It is off its queue when all have taken it.
func (q *queue) forward(u *undelivered) {
	targets := q.b.deadTargets(u.m, u.reason)
	if len(targets) == 0 {
		return
	}
	u.tried = q.b.now
	all := true
	for _, target := range targets {
		switch {
		case slices.Contains(u.took, target):
		case target.publish(u.m, q):
			u.took = append(u.took, target)
		default:
			all = false
		}
	}
	if all {
		q.dead = slices.DeleteFunc(q.dead, func(other *undelivered) bool { return other == u })
		q.b.ledger.setFate(u.e.record, DeadLettered)
	}
}

// retryLater makes sure that somebody comes back for what has no target.
func (q *queue) retryLater() {
	if len(q.dead) > 0 && q.retry == nil {
		q.retry = q.b.after(q.b.cfg.deadRetry, func() {
			q.retry = nil
			if q.gone {
				return
			}
			for _, u := range slices.Clone(q.dead) {
				if q.b.now.Sub(u.tried) >= q.b.cfg.deadRetry {
					q.forward(u)
				}
			}
			q.retryLater()
		})
	}
}

// dead is the message that a dead one becomes on its way to the dead-letter exchange.
func (b *Broker) dead(e *entry, reason string) *message {
	q, old := e.q, e.msg
	props, _ := decodeProperties(old.props)
	props.Body = old.body
	var deaths []any
	props.Headers, deaths = deathHeaders(props.Headers, e, reason, b.now)
	props.Expiration = "" // x-death keeps it
	key, extra, blind := old.key, old.extra, old.blind
	if q.deadKey != "" {
		key, extra, blind = q.deadKey, nil, 0
		if !b.since(4, 0) {
			delete(props.Headers, "CC")
		}
	}
	m := newMessage(&props, q.deadExchange, key)
	m.id, m.extra, m.blind, m.deaths, m.from, m.digest = old.id, extra, blind, deaths, e.record, old.digest
	m.delivered, m.acquired = e.carried(reason)
	return m
}

// deadTargets are the queues that a dead message goes to. One that comes back to a queue without ever having been rejected is
// dropped: RabbitMQ breaks such cycles.
func (b *Broker) deadTargets(m *message, reason string) []*queue {
	targets := b.route(m)
	if reason == "rejected" {
		return targets
	}
	return slices.DeleteFunc(targets, func(q *queue) bool { return cycles(m.deaths, q.name) })
}

// carried is what a dead-lettered message takes along: the deliveries that quorum queues have counted, which stay with it, and since
// 4.3 those of a classic queue, which the next queue is told.
func (e *entry) carried(reason string) (delivered, acquired int) {
	rejected := 0
	if reason == "rejected" {
		rejected = 1
	}
	old := e.msg.delivered
	switch b := e.q.b; {
	case !b.since(4, 0):
		return 0, 0
	case e.q.kind == kindClassic && !b.since(4, 3):
		return old, 0
	case e.q.kind == kindClassic:
		return old, e.acquired + rejected
	case b.since(4, 3):
		return e.failures + rejected, 0
	case reason == "expired" && e.acquired > 0: // one for each queue that it was taken from
		return old + 1, 0
	}
	return old + rejected, 0
}

// cycles reports whether the message has been in this queue before and was never rejected since.
func cycles(deaths []any, queue string) bool {
	for _, d := range deaths {
		death, _ := d.(map[string]any)
		if death["reason"] == "rejected" {
			return false
		}
		if death["queue"] == queue {
			return true
		}
	}
	return false
}

// deathHeaders adds a death to x-death: the latest first, one entry for each queue and reason, which keeps what the first of these
// deaths wrote and counts. Since 4.0 only the broker's own x-death counts, not one that a client has published.
func deathHeaders(headers map[string]any, e *entry, reason string, now time.Time) (next map[string]any, deaths []any) {
	next = make(map[string]any, len(headers)+8)
	maps.Copy(next, headers)
	old := e.msg.deaths
	known := old != nil
	if !e.q.b.since(4, 0) {
		old, _ = headers["x-death"].([]any)
		_, known = headers["x-first-death-queue"]
	}
	deaths = []any{e.death(reason, now)}
	for _, d := range old {
		before, _ := d.(map[string]any)
		if before["queue"] == e.q.name && before["reason"] == reason {
			again := maps.Clone(before)
			n, _ := integer(before["count"])
			again["count"] = int64(n + 1)
			deaths[0] = again
			continue
		}
		deaths = append(deaths, d)
	}
	next["x-death"] = deaths
	if !known {
		next["x-first-death-queue"], next["x-first-death-reason"], next["x-first-death-exchange"] = e.q.name, reason, e.msg.exchange
	}
	if e.q.b.since(3, 13) {
		next["x-last-death-queue"], next["x-last-death-reason"], next["x-last-death-exchange"] = e.q.name, reason, e.msg.exchange
	}
	return next, deaths
}

// openKeys are the further routing keys that may be told: those of CC. RabbitMQ used to count them, since 4.0 it takes every key of BCC
// once off all of them, which is another order for a key that is in both.
func (m *message) openKeys(takenOff bool) []string {
	open, blind := m.extra[:len(m.extra)-m.blind], m.extra[len(m.extra)-m.blind:]
	if !takenOff || !slices.ContainsFunc(blind, func(key string) bool { return slices.Contains(open, key) }) {
		return open
	}
	all := slices.Clone(m.extra)
	for _, key := range blind {
		i := slices.Index(all, key)
		all = slices.Delete(all, i, i+1)
	}
	return all
}

// death is the first one in this queue and for this reason.
func (e *entry) death(reason string, now time.Time) map[string]any {
	keys := []any{e.msg.key}
	for _, key := range e.msg.openKeys(e.q.b.since(4, 0)) {
		keys = append(keys, key)
	}
	death := map[string]any{
		"count": int64(1), "reason": reason, "queue": e.q.name, "time": now, "exchange": e.msg.exchange, "routing-keys": keys,
	}
	if e.msg.expiration != "" {
		death["original-expiration"] = e.msg.expiration
	}
	return death
}
