package steadymqtest

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"
)

// channel is one incarnation of a channel: a channel that is closed and opened again is another one, with another session number.
type channel struct {
	c       *conn
	id      uint16
	session uint64
	closing bool // channel.close was sent: everything but close-ok is ignored
	ended   bool
	deaf    bool // a fault: the channel answers nothing any more

	prefetch  int // for consumers to come
	total     int // prefetch of all consumers together, 0: none
	consumers []*consumer
	timedOut  []string // tags of consumers that were cancelled by the timeout: not free yet

	firstTag uint64        // of unacked[0]
	unacked  []outstanding // by tag, without gaps; settled ones at the front are cut off
	held     int           // how many of them are not settled
	overdue  *time.Timer   // looks for deliveries that were not settled in time

	lastQueue  string // what an empty queue name means
	confirm    bool
	tx         bool // settlements take effect with tx.commit, which is not implemented
	confirmTag uint64
	unanswered []confirm // what a fault keeps from being confirmed at once, by tag
	incoming   *publication
	permitted  []access // what the user was found to be allowed last
}

// outstanding is a delivery on a channel.
type outstanding struct {
	e        *entry
	by       *consumer // nil for basic.get
	record   int       // in the ledger, -1 without one
	at       time.Time
	settled  bool
	returned bool // the broker has taken it back
}

func (c *conn) channel(id uint16) *channel {
	for _, ch := range c.channels {
		if ch.id == id {
			return ch
		}
	}
	return nil
}

// onChannel handles a frame of any channel but 0.
func (c *conn) onChannel(f frame) {
	ch := c.channel(f.channel)
	if f.typ == frameMethod {
		d := decoder{b: f.payload}
		c.onMethod(ch, f.channel, method(d.long()), &d)
		return
	}
	if ch == nil || ch.closing || ch.deaf {
		if ch == nil {
			c.fail(refuse(504, "expected 'channel.open'"), 0)
		}
		return
	}
	if err := ch.content(f); err != nil {
		c.reject(ch, err, basicPublish)
	}
}

func (c *conn) onMethod(ch *channel, id uint16, m method, d *decoder) {
	switch {
	case m == channelOpen:
		c.openChannel(ch, id)
	case ch == nil && m == channelCloseOk: // an answer to a close that a fault made us forget
	case ch == nil:
		c.fail(refuse(504, "expected 'channel.open'"), m)
	case ch.closing && m == channelCloseOk:
		c.forget(ch)
	case ch.closing && m == channelClose: // it is answered, and the broker's own is still to be
		c.closeOk(func() { c.method(id, channelCloseOk) })
	case m == channelClose:
		ch.end("closed by the client")
		c.closeOk(func() {
			c.method(id, channelCloseOk)
			c.forget(ch)
		})
	case ch.closing || ch.ended || ch.deaf:
	case ch.incoming != nil:
		c.fail(refuse(505, "expected content for method %d.%d", m.class(), m.id()), m)
	default:
		if r := ch.handle(m, d); r != nil {
			c.reject(ch, r, m)
		}
	}
}

func (c *conn) openChannel(ch *channel, id uint16) {
	if ch != nil {
		c.fail(refuse(504, "second 'channel.open' seen"), channelOpen)
		return
	}
	c.b.lastChan++
	ch = &channel{c: c, id: id, session: c.b.lastChan, firstTag: 1}
	c.channels = append(c.channels, ch)
	if ch.stage(StageChannel) {
		return
	}
	c.method(id, channelOpenOk, 0, 0, 0, 0)
}

func (c *conn) forget(ch *channel) {
	ch.end("closed")
	c.channels = slices.DeleteFunc(c.channels, func(other *channel) bool { return other == ch })
}

// reject closes the channel or, for a hard code, the connection.
func (c *conn) reject(ch *channel, r *refusal, cause method) {
	if r.hard() {
		c.fail(r, cause)
		return
	}
	ch.fail(r, cause)
}

// fail sends channel.close; what the channel held is free at once.
func (ch *channel) fail(r *refusal, cause method) {
	if ch.closing || ch.ended {
		return
	}
	text := replyText(r.code, r.text)
	ch.c.send(func(out []byte) []byte { return appendClose(out, ch.id, channelClose, r.code, text, cause) })
	ch.closing = true
	ch.end(fmt.Sprintf("%d %s", r.code, text))
}

// end cancels the consumers and puts back what is not settled, in the order it was delivered.
func (ch *channel) end(cause string) {
	if ch.ended {
		return
	}
	ch.ended = true
	if ch.overdue != nil {
		ch.overdue.Stop()
	}
	for _, cons := range slices.Clone(ch.consumers) {
		cons.remove(cause)
	}
	ch.takeBack(true, func(*outstanding) bool { return true })
	ch.unacked, ch.unanswered = nil, nil
	for _, q := range ch.c.b.queues {
		delete(q.writers, ch)
	}
}

// takeBack requeues the unsettled deliveries that match, as failures if the delivery limit counts them.
func (ch *channel) takeBack(failure bool, match func(*outstanding) bool) {
	for i := range ch.unacked {
		o := &ch.unacked[i]
		if o.settled || o.returned || !match(o) {
			continue
		}
		o.returned = true
		ch.free(o)
		o.e.q.requeue(o.e, failure)
	}
}

// free takes a delivery off the counts of its channel, its consumer and its queue.
func (ch *channel) free(o *outstanding) {
	full := o.by != nil && !o.by.room()
	ch.held--
	if o.by != nil {
		o.by.unacked--
	}
	if full && o.by.room() { // it waits again, behind those that have waited longer
		o.by.queueUp()
	}
	o.e.q.unacked--
	o.e.q.touch()
	if ch.total > 0 {
		for _, cons := range ch.consumers {
			cons.q.touch()
		}
	}
}

// handle does what a method asks and replies, or refuses.
func (ch *channel) handle(m method, d *decoder) *refusal {
	switch m {
	case basicAck:
		return ch.settle(d.longlong(), d.octet()&1 != 0, Ack, false)
	case basicNack:
		tag, flags := d.longlong(), d.octet()
		return ch.settle(tag, flags&1 != 0, Nack, flags&2 != 0)
	case basicReject:
		return ch.settle(d.longlong(), false, Reject, d.octet()&1 != 0)
	case basicPublish:
		return ch.publish(d)
	case basicQos:
		return ch.qos(d)
	case basicConsume:
		return ch.consume(d)
	case basicCancel:
		return ch.cancel(d)
	case basicGet:
		return ch.get(d)
	case basicRecover, basicRecoverAsync:
		return ch.recover(m, d)
	case confirmSelect:
		ch.confirm = true
		ch.reply(d.octet()&1 != 0, confirmSelectOk)
		return nil
	case txSelect:
		ch.tx = true
		ch.c.method(ch.id, txSelectOk)
		return nil
	case channelFlow:
		if d.octet()&1 == 0 {
			return refuse(540, "active=false")
		}
		ch.c.method(ch.id, channelFlowOk, 1)
		return nil
	case channelCloseOk:
		return nil
	}
	return ch.declare(m, d)
}

// declare handles the methods of exchanges and queues.
func (ch *channel) declare(m method, d *decoder) *refusal {
	var r *refusal
	switch m {
	case exchangeDeclare:
		r = ch.exchangeDeclare(d)
	case exchangeDelete:
		r = ch.exchangeDelete(d)
	case exchangeBind, exchangeUnbind:
		r = ch.exchangeBind(m, d)
	case queueDeclare:
		r = ch.queueDeclare(d)
	case queueBind, queueUnbind:
		r = ch.queueBind(m, d)
	case queuePurge:
		r = ch.queuePurge(d)
	case queueDelete:
		r = ch.queueDelete(d)
	default:
		return refuse(540, "method %d.%d", m.class(), m.id())
	}
	if r == nil && d.bad {
		return refuse(502, "arguments of method %d.%d cannot be read", m.class(), m.id())
	}
	return r
}

// reply answers unless the client asked for no answer.
func (ch *channel) reply(noWait bool, m method, args ...byte) {
	if !noWait {
		ch.c.method(ch.id, m, args...)
	}
}

// settle is an ack, a nack or a reject.
func (ch *channel) settle(tag uint64, multiple bool, kind Kind, requeue bool) *refusal {
	if ch.tx {
		return nil
	}
	b := ch.c.b
	record := SettlementRecord{
		Delivery: -1, Connection: ch.c.record.ID, Channel: ch.id, Session: ch.session,
		Tag: tag, Kind: kind, Multiple: multiple, Requeue: requeue, Time: b.now,
	}
	if multiple {
		b.violation(&record, "multiple=true")
		return ch.settleUpTo(&record)
	}
	o := ch.outstanding(tag)
	if o == nil || o.settled {
		record.Verdict = Unknown
		if tag > 0 && tag < ch.nextTag() {
			record.Verdict = Double
		}
		b.violation(&record, record.Verdict.String()+" tag")
		b.settled(record)
		return refuse(406, "unknown delivery tag %d", tag)
	}
	record.ID, record.Delivery = o.e.msg.id, o.record
	if o.returned || o.e.q.gone {
		record.Verdict = Late
	}
	r := ch.settleOne(o, &record)
	ch.trim()
	b.settled(record)
	return r
}

// settleUpTo settles everything up to a tag, or everything for tag 0.
func (ch *channel) settleUpTo(record *SettlementRecord) *refusal {
	defer func() { ch.c.b.settled(*record) }()
	if o := ch.outstanding(record.Tag); record.Tag != 0 && (o == nil || o.settled) {
		record.Verdict = Unknown
		return refuse(406, "unknown delivery tag %d", record.Tag)
	}
	for i := range ch.unacked {
		if record.Tag != 0 && ch.firstTag+uint64(i) > record.Tag {
			break
		}
		if o := &ch.unacked[i]; !o.settled {
			if r := ch.settleOne(o, record); r != nil {
				return r
			}
		}
	}
	ch.trim()
	return nil
}

func (ch *channel) settleOne(o *outstanding, record *SettlementRecord) *refusal {
	b := ch.c.b
	o.settled = true
	if o.record >= 0 {
		dr := &b.ledger.deliveries[o.record]
		dr.Settled, dr.Kind, dr.Requeue = b.now, record.Kind, record.Requeue
	}
	if o.returned {
		return nil
	}
	ch.free(o)
	q := o.e.q
	switch {
	case q.gone:
	case q.kind == kindStream:
		return q.settleStream(o.e, record.Kind)
	case record.Kind == Ack:
		b.ledger.setFate(o.e.record, Acked)
	case record.Requeue:
		q.requeue(o.e, record.Kind == Reject || !b.since(4, 3))
	default:
		q.discard(o.e, "rejected")
	}
	return nil
}

func (ch *channel) nextTag() uint64 { return ch.firstTag + uint64(len(ch.unacked)) }

// outstanding is the delivery with a tag, nil if there is none that may still be settled.
func (ch *channel) outstanding(tag uint64) *outstanding {
	if tag < ch.firstTag || tag >= ch.nextTag() {
		return nil
	}
	return &ch.unacked[tag-ch.firstTag]
}

// trim cuts the settled deliveries off the front.
func (ch *channel) trim() {
	n := 0
	for n < len(ch.unacked) && ch.unacked[n].settled {
		ch.unacked[n] = outstanding{}
		n++
	}
	ch.unacked = ch.unacked[n:]
	ch.firstTag += uint64(n)
}

func (b *Broker) settled(r SettlementRecord) {
	if !b.ledger.off {
		b.ledger.settlements = append(b.ledger.settlements, r)
	}
	if call := b.cfg.hooks.Settled; call != nil {
		b.events = append(b.events, func() { call(r) })
	}
}

func (b *Broker) violation(r *SettlementRecord, what string) {
	b.ledger.violations = append(b.ledger.violations,
		fmt.Sprintf("%s: %s of tag %d on connection %d channel %d (session %d) at %s",
			what, r.Kind, r.Tag, r.Connection, r.Channel, r.Session, r.Time.Format("15:04:05.000")))
}

// deliver appends a delivery to what the connection sends and returns its tag.
func (ch *channel) deliver(e *entry, by *consumer, noAck bool) uint64 {
	b := ch.c.b
	tag := ch.nextTag()
	record := -1
	consumerTag := ""
	if by != nil {
		consumerTag = by.tag
	}
	if !b.ledger.off || b.cfg.hooks.Delivered != nil {
		record = b.delivered(DeliveryRecord{
			ID: e.msg.id, Message: e.record, Queue: e.q.name, Connection: ch.c.record.ID, Channel: ch.id, Session: ch.session,
			ConsumerTag: consumerTag, Tag: tag, Redelivered: e.redelivered, Time: b.now,
		})
	}
	o := outstanding{e: e, by: by, record: record, at: b.now, settled: noAck}
	ch.unacked = append(ch.unacked, o)
	if noAck {
		b.ledger.setFate(e.record, Acked)
		ch.trim()
		return tag
	}
	ch.held++
	e.q.unacked++
	b.ledger.setFate(e.record, Unacked)
	if by != nil {
		by.unacked++
		ch.watch(by)
	}
	return tag
}

// delivered writes the record and returns its index.
func (b *Broker) delivered(r DeliveryRecord) int {
	if call := b.cfg.hooks.Delivered; call != nil {
		b.events = append(b.events, func() { call(r) })
	}
	l := &b.ledger
	if l.off {
		return -1
	}
	if r.Message >= 0 {
		l.messages[r.Message].Deliveries++
	}
	l.deliveries = append(l.deliveries, r)
	return len(l.deliveries) - 1
}

func (ch *channel) qos(d *decoder) *refusal {
	size, count, global := d.long(), int(d.short()), d.octet()&1 != 0
	if size != 0 {
		return refuse(540, "prefetch_size!=0 (%d)", size)
	}
	if ch.stage(StageQos) {
		return nil
	}
	// 4.3 has no prefetch for a channel as a whole: it takes the flag for its opposite and says nothing.
	if global && !ch.c.b.since(4, 3) {
		ch.total = count
	} else {
		ch.prefetch = count
	}
	ch.c.method(ch.id, basicQosOk)
	return nil
}

func (ch *channel) get(d *decoder) *refusal {
	d.short()
	name, noAck := d.shortstr(), d.octet()&1 != 0
	q, r := ch.findFor(accessRead, name)
	if r != nil {
		return r
	}
	if q.kind == kindStream {
		return refuse(540, "basic.get not supported by stream queues queue '%s' in vhost '/'", name)
	}
	e := q.pop()
	if e == nil {
		ch.c.method(ch.id, basicGetEmpty, 0)
		return nil
	}
	redelivered, props := e.redelivered, e.properties()
	if q.kind == kindQuorum && e.failures == 0 && !ch.c.b.since(4, 0) {
		props = e.msg.withHeader("x-delivery-count", int64(0)) // of a consumer's delivery it says nothing then
	}
	tag := ch.deliver(e, nil, noAck)
	left := q.length()
	ch.c.send(func(out []byte) []byte {
		out, mark := openMethod(out, ch.id, basicGetOk)
		out = binary.BigEndian.AppendUint64(out, tag)
		out = append(out, bit(redelivered, 0))
		out = appendShortstr(appendShortstr(out, e.msg.exchange), e.msg.key)
		out = binary.BigEndian.AppendUint32(out, uint32(left))
		return appendContent(closeFrame(out, mark), ch.id, props, e.msg.body, ch.c.frameMax)
	})
	return nil
}

func (ch *channel) recover(m method, d *decoder) *refusal {
	if d.octet()&1 == 0 {
		return refuse(540, "requeue=false")
	}
	for i := range ch.unacked {
		if o := &ch.unacked[i]; !o.settled && !o.returned {
			ch.free(o)
			o.settled = true
			o.e.q.requeue(o.e, !ch.c.b.since(4, 3))
		}
	}
	ch.trim()
	if m == basicRecover {
		ch.c.method(ch.id, basicRecoverOk)
	}
	return nil
}
