package steadymqtest

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"
)

// quorumPrefetch is what an unlimited prefetch means for a quorum queue.
const quorumPrefetch = 2000

// consumer is one basic.consume.
type consumer struct {
	ch        *channel
	q         *queue
	tag       string
	noAck     bool
	exclusive bool
	priority  int
	prefetch  int // 0: no limit
	timeout   time.Duration
	started   time.Time
	unacked   int
	turn      uint64 // when it was served last
	offset    int    // of the next message of a stream
	mute      bool   // a fault: it never gets anything
	record    int    // in the ledger, -1 without one
	gone      bool
}

func (ch *channel) consume(d *decoder) *refusal {
	d.short()
	name, tag, bits := d.shortstr(), d.shortstr(), d.octet()
	noAck, exclusive, noWait := bits&2 != 0, bits&4 != 0, bits&8 != 0
	args := d.table()
	if d.bad {
		return refuse(502, "basic.consume cannot be read")
	}
	if ch.stage(StageConsume) {
		return nil
	}
	q, r := ch.consumable(name, tag, exclusive)
	if r != nil {
		return r
	}
	if tag == "" {
		ch.c.b.lastName++
		tag = fmt.Sprintf("amq.ctag-%022d", ch.c.b.lastName)
	}
	cons := &consumer{ch: ch, q: q, tag: tag, noAck: noAck, exclusive: exclusive, prefetch: ch.prefetch, record: -1}
	cons.priority, _ = integer(args["x-priority"])
	cons.timeout = ch.c.b.timeoutOf(q, args)
	if r := cons.fit(args); r != nil {
		return r
	}
	ch.reply(noWait, basicConsumeOk, appendShortstr(nil, tag)...)
	cons.add()
	ch.leaderless(cons)
	return nil
}

// consumable finds the queue and refuses what RabbitMQ refuses before it looks at the kind of queue.
func (ch *channel) consumable(name, tag string, exclusive bool) (*queue, *refusal) {
	if r := ch.c.host.wire.refuseConsume; r != nil {
		return nil, r
	}
	if tag != "" && (slices.Contains(ch.timedOut, tag) || slices.ContainsFunc(ch.consumers, func(c *consumer) bool { return c.tag == tag })) {
		return nil, refuse(530, "attempt to reuse consumer tag '%s'", tag)
	}
	q, r := ch.findFor(accessRead, name)
	if r != nil {
		return nil, r
	}
	for _, other := range q.consumers {
		if exclusive || other.exclusive {
			return nil, refuse(403, "queue '%s' in vhost '/' in exclusive use", q.name)
		}
	}
	return q, nil
}

// timeoutOf is how long this consumer may hold a delivery: its own argument (in the newer form only), that of the queue (since 3.12),
// or that of the broker.
func (b *Broker) timeoutOf(q *queue, args map[string]any) time.Duration {
	arguments := []map[string]any{args, q.args}
	switch {
	case b.cfg.timeoutForm == FormCancel && q.kind != kindQuorum:
		return 0
	case b.cfg.timeoutForm == FormCancel:
	case b.since(3, 12):
		arguments = arguments[1:]
	default:
		arguments = nil
	}
	for _, t := range arguments {
		if ms, ok := integer(t["x-consumer-timeout"]); ok {
			return time.Duration(ms) * time.Millisecond
		}
	}
	return b.cfg.consumerTimeout
}

// fit refuses what the kind of queue cannot do and finds the place where a stream consumer begins.
func (c *consumer) fit(args map[string]any) *refusal {
	q := c.q
	if q.kind != kindClassic && c.ch.total > 0 {
		return refuse(540, "queue '%s' in vhost '/' does not support global qos", q.name)
	}
	if q.kind == kindQuorum && c.prefetch == 0 {
		c.prefetch = quorumPrefetch
	}
	if q.kind != kindStream {
		return nil
	}
	noAck, noPrefetch := "stream queue '%s' in vhost '/'", "stream queue '%s' in vhost '/'"
	if !c.ch.c.b.since(4, 0) {
		noAck, noPrefetch = "stream queues queue '%s' in vhost '/'", "'queue '%s' in vhost '/''"
	}
	if c.noAck {
		return refuse(540, "automatic acknowledgement not supported by "+noAck, q.name)
	}
	if c.prefetch == 0 {
		return refuse(406, "consumer prefetch count is not set for "+noPrefetch, q.name)
	}
	return c.seek(args["x-stream-offset"])
}

func (c *consumer) add() {
	b := c.ch.c.b
	c.ch.consumers = append(c.ch.consumers, c)
	c.q.consumers = append(c.q.consumers, c)
	c.queueUp()
	c.q.touch()
	c.started = b.now
	r := c.describe()
	if !b.ledger.off {
		c.record = len(b.ledger.consumers)
		b.ledger.consumers = append(b.ledger.consumers, r)
	}
	if call := b.cfg.hooks.Consuming; call != nil {
		b.events = append(b.events, func() { call(r) })
	}
}

// queueUp puts the consumer behind all others that wait for a message.
func (c *consumer) queueUp() {
	c.q.served++
	c.turn = c.q.served
}

func (c *consumer) describe() ConsumerRecord {
	return ConsumerRecord{
		Tag: c.tag, Queue: c.q.name, Host: c.ch.c.host.address, Connection: c.ch.c.record.ID, Channel: c.ch.id,
		Session: c.ch.session, Started: c.started,
	}
}

// room reports whether the consumer takes another delivery.
func (c *consumer) room() bool {
	switch {
	case c.mute, c.ch.deaf, c.ch.c.deaf, c.ch.c.host.wire.cutOff != nil:
		return false
	case c.noAck:
		return true
	}
	return (c.prefetch == 0 || c.unacked < c.prefetch) && (c.ch.total == 0 || c.ch.held < c.ch.total)
}

func (c *consumer) deliver(e *entry) {
	c.queueUp()
	redelivered, props := e.redelivered, e.properties()
	tag := c.ch.deliver(e, c, c.noAck)
	conn := c.ch.c
	if conn.deaf || conn.state == stateEnded {
		return
	}
	out, mark := openMethod(conn.out, c.ch.id, basicDeliver)
	out = appendShortstr(out, c.tag)
	out = binary.BigEndian.AppendUint64(out, tag)
	out = append(out, bit(redelivered, 0))
	out = appendShortstr(appendShortstr(out, e.msg.exchange), e.msg.key)
	conn.out = appendContent(closeFrame(out, mark), c.ch.id, props, e.msg.body, conn.frameMax)
	conn.sent = true
	conn.touch()
}

// remove takes the consumer off its channel and its queue; what it holds stays with the channel.
func (c *consumer) remove(cause string) {
	if c.gone {
		return
	}
	c.gone = true
	same := func(other *consumer) bool { return other == c }
	c.ch.consumers = slices.DeleteFunc(c.ch.consumers, same)
	c.q.consumers = slices.DeleteFunc(c.q.consumers, same)
	c.q.touch()
	b := c.ch.c.b
	b.ledger.endConsumer(c.record, b.now, cause)
	if call := b.cfg.hooks.Cancelled; call != nil {
		r := c.describe()
		r.Ended, r.Cause = b.now, cause
		b.events = append(b.events, func() { call(r) })
	}
	if c.q.autoDelete && len(c.q.consumers) == 0 && !c.q.gone {
		c.q.delete("last consumer gone")
	}
}

// cancel removes the consumer and tells the client.
func (c *consumer) cancel(cause string) {
	if c.gone {
		return
	}
	c.remove(cause)
	conn := c.ch.c
	if !conn.cancels || c.ch.deaf {
		return
	}
	conn.send(func(out []byte) []byte {
		out, mark := openMethod(out, c.ch.id, basicCancel)
		return closeFrame(append(appendShortstr(out, c.tag), 1), mark)
	})
}

// cancel is the client's basic.cancel. A tag that is not known is answered as one that is.
func (ch *channel) cancel(d *decoder) *refusal {
	tag, noWait := d.shortstr(), d.octet()&1 != 0
	for _, c := range ch.consumers {
		if c.tag == tag {
			c.remove("cancelled by the client")
			break
		}
	}
	ch.timedOut = slices.DeleteFunc(ch.timedOut, func(other string) bool { return other == tag })
	ch.reply(noWait, basicCancelOk, appendShortstr(nil, tag)...)
	return nil
}

// watch makes sure that somebody looks when a delivery of c is overdue.
func (ch *channel) watch(c *consumer) {
	if c.timeout > 0 && ch.overdue == nil {
		ch.overdue = ch.c.b.after(c.timeout, ch.checkOverdue)
	}
}

// checkOverdue acts on deliveries that were held for too long, and comes back for the next.
func (ch *channel) checkOverdue() {
	if ch.ended {
		return
	}
	ch.overdue = nil
	b := ch.c.b
	var next time.Duration
	for i := range ch.unacked {
		o := &ch.unacked[i]
		if o.settled || o.returned || o.by == nil || o.by.timeout <= 0 {
			continue
		}
		left := o.by.timeout - b.now.Sub(o.at)
		if left > 0 {
			if next == 0 || left < next {
				next = left
			}
			continue
		}
		if b.cfg.timeoutForm == Form406 {
			ch.fail(refuse(406, "delivery acknowledgement on channel %d timed out. Timeout value used: %d ms. This timeout value can be configured, see consumers doc guide to learn more", ch.id, o.by.timeout.Milliseconds()), 0)
			return
		}
		// Only what is overdue goes back; the rest may still be settled. RabbitMQ keeps the consumer, and its tag, until the channel
		// or the client ends it.
		late := o.by
		if !late.gone {
			ch.timedOut = append(ch.timedOut, late.tag)
		}
		late.cancel("consumer timeout")
		ch.takeBack(false, func(o *outstanding) bool { return o.by == late && b.now.Sub(o.at) >= late.timeout })
	}
	if next > 0 {
		ch.overdue = b.after(next, ch.checkOverdue)
	}
}

// Consumers returns the consumers of a queue, in the order they came, as far as the broker knows.
func (b *Broker) Consumers(queue string) []ConsumerRecord {
	b.lock()
	defer b.unlock()
	q := b.queues[queue]
	if q == nil {
		return nil
	}
	var records []ConsumerRecord
	for _, c := range q.consumers {
		records = append(records, c.describe())
	}
	return records
}
