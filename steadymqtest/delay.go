package steadymqtest

import (
	"slices"
	"time"
)

// retryDelay is what a quorum queue of 4.3 does to messages that come back: x-delayed-retry-type, -min and -max.
type retryDelay struct {
	failed, returned bool // which of them it is for
	least, most      time.Duration
}

// waiting is an entry that came back and must not be delivered yet.
type waiting struct {
	e     *entry
	until time.Time
}

// readDelay understands x-delayed-retry-*. Before 4.3 RabbitMQ takes these arguments and does nothing.
func (q *queue) readDelay() {
	least, ok := integer(q.args["x-delayed-retry-min"])
	if !ok || q.kind != kindQuorum || !q.b.since(4, 3) {
		return
	}
	kind, _ := q.args["x-delayed-retry-type"].(string)
	q.delay.failed = kind == "failed" || kind == "all"
	q.delay.returned = kind == "returned" || kind == "all"
	q.delay.least, q.delay.most = time.Duration(least)*time.Millisecond, time.Duration(1<<63-1)
	if most, ok := integer(q.args["x-delayed-retry-max"]); ok {
		q.delay.most = time.Duration(most) * time.Millisecond
	}
}

// holdBack delays an entry that came back, and reports whether it did.
func (q *queue) holdBack(e *entry, failure bool) bool {
	if failure && !q.delay.failed || !failure && !q.delay.returned {
		return false
	}
	d, count := q.delay.most, time.Duration(max(1, e.failures))
	if q.delay.least <= d/count {
		d = q.delay.least * count
	}
	if d <= 0 {
		return false
	}
	w := waiting{e: e, until: q.b.now.Add(d)}
	i := slices.IndexFunc(q.delayed, func(other waiting) bool { return other.until.After(w.until) })
	if i < 0 {
		i = len(q.delayed)
	}
	q.delayed = slices.Insert(q.delayed, i, w)
	q.wakeDelayed()
	return true
}

// wakeDelayed makes what has waited long enough ready, and comes back for the next.
func (q *queue) wakeDelayed() {
	if q.delayTimer != nil {
		q.delayTimer.Stop()
	}
	for len(q.delayed) > 0 {
		w := q.delayed[0]
		if left := w.until.Sub(q.b.now); left > 0 {
			q.delayTimer = q.b.after(left, q.wakeDelayed)
			return
		}
		q.delayed = slices.Delete(q.delayed, 0, 1)
		q.putBack(w.e)
	}
	q.delayed = nil
}
