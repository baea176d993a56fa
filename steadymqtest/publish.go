package steadymqtest

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// publication is a basic.publish whose content is still arriving.
type publication struct {
	exchange, key string
	mandatory     bool
	immediate     bool
	props         []byte
	body          []byte
	size          uint64
	headed        bool
}

// publish starts a publication; its content follows in frames of its own, and only then it is looked at.
func (ch *channel) publish(d *decoder) *refusal {
	d.short()
	p := &publication{exchange: d.shortstr(), key: d.shortstr()}
	bits := d.octet()
	p.mandatory, p.immediate = bits&1 != 0, bits&2 != 0
	if d.bad {
		return refuse(502, "basic.publish cannot be read")
	}
	ch.incoming = p
	return nil
}

// content handles a header or body frame.
func (ch *channel) content(f frame) *refusal {
	p := ch.incoming
	switch {
	case p == nil, f.typ == frameHeader == p.headed:
		return refuse(505, "content frame not expected on channel %d", ch.id)
	case f.typ == frameHeader:
		d := decoder{b: f.payload}
		d.long()
		p.size, p.headed = d.longlong(), true
		if d.bad || len(d.b) < 2 {
			return refuse(502, "content header cannot be read")
		}
		if most := ch.c.b.maxSize(); p.size > most {
			return refuse(406, "message size %d is larger than configured max size %d", p.size, most)
		}
		p.props = slices.Clone(d.b)
	default:
		p.body = append(p.body, f.payload...)
	}
	if b := ch.c.b; b.blockReason != "" {
		ch.c.block(b.blockReason) // with what is still to come of this message
	}
	if uint64(len(p.body)) < p.size {
		return nil
	}
	ch.incoming = nil
	return ch.published(p)
}

// maxSize is the size of the biggest message.
func (b *Broker) maxSize() uint64 {
	if b.since(4, 0) {
		return 16 << 20
	}
	return 128 << 20
}

// published routes a complete message, returns it if it must be returned, and confirms it.
func (ch *channel) published(p *publication) *refusal {
	b := ch.c.b
	m := &message{exchange: p.exchange, key: p.key, props: p.props, body: p.body, publication: -1, from: -1}
	props, ok := decodeProperties(p.props)
	if m.id = props.ID; m.id == "" {
		b.lastMsg++
		m.id = "#" + strconv.FormatUint(b.lastMsg, 10)
	}
	m.transient, m.expiration = props.Transient, props.Expiration
	if !b.ledger.off {
		m.digest, m.publication = digestOf(m.body), len(b.ledger.publications)
	}
	r := PublicationRecord{
		ID: m.id, Exchange: m.exchange, RoutingKey: m.key, User: ch.c.user, Connection: ch.c.record.ID, Channel: ch.id, Session: ch.session,
		Mandatory: p.mandatory, Time: b.now,
	}
	var refused *refusal
	if ok = ok && props.RawHeaders == nil; ok {
		refused = ch.publishable(p, m, &props)
	} else {
		refused = refuse(502, "content header cannot be read")
	}
	if refused != nil {
		r.Refused = refused.code
		b.published(r)
		return refused
	}
	ch.deal(m, &r)
	b.published(r)
	if ch.confirm {
		ch.answer(confirm{tag: r.Sequence, nack: r.Full > 0, record: m.publication})
	}
	return nil
}

// deal gives a message to its queues, or back if it has none and must have one.
func (ch *channel) deal(m *message, r *PublicationRecord) {
	if ch.confirm {
		ch.confirmTag++
		r.Sequence = ch.confirmTag
	}
	targets := ch.c.b.route(m)
	if ch.c.host.wire.unroutable {
		targets = nil
	}
	r.Queues = len(targets)
	if r.Returned = r.Mandatory && r.Queues == 0; r.Returned {
		ch.giveBack(m)
	}
	for _, q := range targets {
		if !q.publish(m, ch) {
			r.Full++
		}
	}
}

// published writes the record of a publication.
func (b *Broker) published(r PublicationRecord) {
	if !b.ledger.off {
		b.ledger.publications = append(b.ledger.publications, r)
	}
	if call := b.cfg.hooks.Published; call != nil {
		kept := r // so that r itself stays on the stack
		b.events = append(b.events, func() { call(kept) })
	}
}

// publishable refuses what RabbitMQ refuses, in its order.
func (ch *channel) publishable(p *publication, m *message, props *Message) *refusal {
	if p.immediate {
		return refuse(540, "immediate=true")
	}
	if r := ch.c.host.wire.refusePublish; r != nil {
		return r
	}
	if r := ch.may(accessWrite, "exchange", p.exchange); r != nil {
		return r
	}
	x := ch.c.b.exchanges[p.exchange]
	switch {
	case x == nil:
		return refuse(404, "no exchange '%s' in vhost '/'", p.exchange)
	case x.internal:
		return refuse(403, "cannot publish to internal exchange '%s' in vhost '/'", p.exchange)
	}
	impostor := ch.impostor(props.UserID)
	if impostor != nil && !ch.c.b.since(4, 0) {
		return impostor
	}
	if why := badExpiration(props.Expiration); why != "" {
		return refuse(406, "invalid expiration '%s': %s", props.Expiration, why)
	}
	if r := m.takeCopies(props); r != nil {
		return r
	}
	return impostor
}

// impostor refuses a message that claims to be of another user.
func (ch *channel) impostor(user string) *refusal {
	if user == "" || user == ch.c.user {
		return nil
	}
	return refuse(406, "user_id property set to '%s' but authenticated user was '%s'", user, ch.c.user)
}

// badExpiration is what RabbitMQ says of a time to live that is no number of milliseconds; empty for a good one.
func badExpiration(s string) string {
	if s == "" {
		return ""
	}
	rest := strings.TrimLeft(strings.TrimLeft(s[:1], "+-")+s[1:], "0123456789")
	n, err := strconv.Atoi(strings.TrimSuffix(s, rest))
	switch {
	case err != nil:
		return "no_integer"
	case rest != "":
		return fmt.Sprintf("{leftover_string,%q}", rest)
	}
	return badTime(n)
}

// badTime is what RabbitMQ says of such a number.
func badTime(ms int) string {
	const tenYears = 315_360_000_000
	switch {
	case ms < 0:
		return fmt.Sprintf("{value_negative,%d}", ms)
	case ms > tenYears:
		return fmt.Sprintf("{value_too_large,%d}", ms)
	}
	return ""
}

// giveBack is basic.return.
func (ch *channel) giveBack(m *message) {
	ch.c.send(func(out []byte) []byte {
		out, mark := openMethod(out, ch.id, basicReturn)
		out = append(out, 312>>8, 312&0xff)
		out = appendShortstr(appendShortstr(appendShortstr(out, "NO_ROUTE"), m.exchange), m.key)
		return appendContent(closeFrame(out, mark), ch.id, m.props, m.body, ch.c.frameMax)
	})
}

// confirm is the answer to one publication.
type confirm struct {
	tag    uint64
	nack   bool
	lost   bool      // it never comes
	due    time.Time // when it may be sent
	record int       // in the ledger, -1 without one
}

// answer confirms a publication, now or as the host's faults say.
func (ch *channel) answer(a confirm) {
	w := &ch.c.host.wire
	a.nack = a.nack || w.nackConfirms
	if !w.loseConfirms && w.confirmDelay == 0 {
		ch.sendConfirm(a, a.tag, false)
		return
	}
	if a.lost = w.loseConfirms; a.lost {
		if n := len(ch.unanswered); n > 0 && ch.unanswered[n-1].lost {
			return // one is enough to know that nothing behind it may be confirmed together with what is before it
		}
	}
	a.due = ch.c.b.now.Add(w.confirmDelay)
	ch.unanswered = append(ch.unanswered, a)
	if !a.lost {
		ch.c.b.after(w.confirmDelay, ch.sendDue)
	}
}

// sendDue sends the confirms that are due: as RabbitMQ does, acks of all that is unanswered up to a tag in one, the others alone.
func (ch *channel) sendDue() {
	if ch.ended || ch.closing {
		return
	}
	n := 0
	for n < len(ch.unanswered) && ch.unanswered[n].ready(ch.c.b.now) && !ch.unanswered[n].nack {
		n++
	}
	for i, a := range ch.unanswered[:n] {
		if i == n-1 {
			ch.sendConfirm(a, a.tag, n > 1)
			break
		}
		ch.noteConfirm(a)
	}
	ch.unanswered = slices.DeleteFunc(ch.unanswered[n:], func(a confirm) bool {
		ready := a.ready(ch.c.b.now)
		if ready {
			ch.sendConfirm(a, a.tag, false)
		}
		return ready
	})
}

func (a *confirm) ready(now time.Time) bool { return !a.lost && !a.due.After(now) }

func (ch *channel) sendConfirm(a confirm, tag uint64, multiple bool) {
	ch.noteConfirm(a)
	m := basicAck
	if a.nack {
		m = basicNack
	}
	var args [9]byte
	binary.BigEndian.PutUint64(args[:], tag)
	args[8] = bit(multiple, 0)
	ch.c.method(ch.id, m, args[:]...)
}

func (ch *channel) noteConfirm(a confirm) {
	if p := ch.c.b.ledger.publication(a.record); p != nil {
		p.Confirmed, p.Nacked = ch.c.b.now, a.nack
	}
}
