package faultproxy

import (
	"encoding/binary"
	"slices"
	"sync"
	"time"
)

const (
	classChannel = 20
	classBasic   = 60

	channelOpen  = 10
	basicDeliver = 60
	basicGetOK   = 71
	basicAck     = 80
	basicReject  = 90
	basicNack    = 120
)

// bodyPrefix is how much of a message is kept.
const bodyPrefix = 64

// Ref is the identity of a delivery. Tags restart on every channel and channel numbers are used again, so it takes all four.
type Ref struct {
	Conn    int    // which connection through the proxy, from 1
	Channel uint16 // its number
	Opened  int    // how often that number had been opened on that connection
	Tag     uint64
}

// Delivery is a basic.deliver or basic.get-ok the broker sent.
type Delivery struct {
	Ref
	At          time.Time
	Consumer    string
	Redelivered bool
	Exchange    string
	RoutingKey  string
	MessageID   string
	Body        []byte // its first bytes
	Swallowed   bool   // the client never got it
}

// Verb is how a delivery was settled.
type Verb string

// The verbs.
const (
	Ack    Verb = "ack"
	Nack   Verb = "nack"
	Reject Verb = "reject"
)

// Settlement is a basic.ack, basic.nack or basic.reject the client sent.
type Settlement struct {
	Ref
	At        time.Time
	Verb      Verb
	Multiple  bool
	Requeue   bool
	Swallowed bool // the broker never got it
}

// Method is any method that passed.
type Method struct {
	At            time.Time
	Conn          int
	Channel       uint16
	Dir           Direction
	Class, Method uint16
	Swallowed     bool
}

// Log is what passed through a proxy, in the order it passed.
type Log struct {
	mu          sync.Mutex
	deliveries  []Delivery
	settlements []Settlement
	methods     []Method
}

func newLog() *Log { return &Log{} }

// Deliveries are all deliveries so far. A body may not be complete yet on the last one.
func (l *Log) Deliveries() []Delivery {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.deliveries)
}

// Settlements are all settlements so far.
func (l *Log) Settlements() []Settlement {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.settlements)
}

// Methods are all methods so far but deliveries and settlements.
func (l *Log) Methods() []Method {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.methods)
}

// conversation follows both directions of one connection.
type conversation struct {
	log    *Log
	conn   int
	opened map[uint16]int
	open   map[uint16]int // delivery whose content is under way, as an index
}

func (l *Log) converse(conn int) *conversation {
	return &conversation{log: l, conn: conn, opened: map[uint16]int{}, open: map[uint16]int{}}
}

func (c *conversation) frame(dir Direction, f frame, swallowed bool) {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	switch {
	case f.kind == frameMethod && len(f.payload) >= 4:
		c.method(dir, f, swallowed)
	case dir == ToClient && f.kind == frameHeader:
		c.content(f.channel, func(d *Delivery) { d.MessageID = messageID(f.payload) })
	case dir == ToClient && f.kind == frameBody:
		c.content(f.channel, func(d *Delivery) {
			room := min(bodyPrefix-len(d.Body), len(f.payload))
			d.Body = append(d.Body, f.payload[:room]...)
		})
	}
}

func (c *conversation) content(channel uint16, fill func(*Delivery)) {
	if i, ok := c.open[channel]; ok {
		fill(&c.log.deliveries[i])
	}
}

func (c *conversation) method(dir Direction, f frame, swallowed bool) {
	r := reader{b: f.payload}
	class, method := r.short(), r.short()
	now := time.Now()
	if dir == ToClient {
		delete(c.open, f.channel)
	}
	if class == classBasic && dir == ToClient && (method == basicDeliver || method == basicGetOK) {
		c.delivery(&r, f.channel, method, now, swallowed)
		return
	}
	if class == classBasic && dir == ToBroker && (method == basicAck || method == basicNack || method == basicReject) {
		c.settlement(&r, f.channel, method, now, swallowed)
		return
	}
	if class == classChannel && method == channelOpen {
		c.opened[f.channel]++
	}
	c.log.methods = append(c.log.methods, Method{now, c.conn, f.channel, dir, class, method, swallowed})
}

func (c *conversation) delivery(r *reader, channel, method uint16, now time.Time, swallowed bool) {
	d := Delivery{At: now, Swallowed: swallowed}
	if method == basicDeliver {
		d.Consumer = r.text()
	}
	d.Ref = Ref{c.conn, channel, c.opened[channel], r.long()}
	d.Redelivered = r.octet()&1 != 0
	d.Exchange, d.RoutingKey = r.text(), r.text()
	c.open[channel] = len(c.log.deliveries)
	c.log.deliveries = append(c.log.deliveries, d)
}

func (c *conversation) settlement(r *reader, channel, method uint16, now time.Time, swallowed bool) {
	s := Settlement{At: now, Swallowed: swallowed, Ref: Ref{c.conn, channel, c.opened[channel], r.long()}}
	bits := r.octet()
	switch method {
	case basicAck:
		s.Verb, s.Multiple = Ack, bits&1 != 0
	case basicNack:
		s.Verb, s.Multiple, s.Requeue = Nack, bits&1 != 0, bits&2 != 0
	case basicReject:
		s.Verb, s.Requeue = Reject, bits&1 != 0
	}
	c.log.settlements = append(c.log.settlements, s)
}

// messageID finds the message-id in a content header: properties come in the order of their flags.
func messageID(payload []byte) string {
	r := reader{b: payload}
	r.skip(2 + 2 + 8) // class, weight, body size
	flags := r.short()
	for more := flags; more&1 != 0; {
		more = r.short()
	}
	const contentType, encoding, headers, mode, priority, correlation, replyTo, expiration, message = 15, 14, 13, 12, 11, 10, 9, 8, 7
	has := func(bit int) bool { return flags&(1<<bit) != 0 }
	for _, bit := range []int{contentType, encoding} {
		if has(bit) {
			r.text()
		}
	}
	if has(headers) {
		r.skip(int(r.word()))
	}
	for _, bit := range []int{mode, priority} {
		if has(bit) {
			r.octet()
		}
	}
	for _, bit := range []int{correlation, replyTo, expiration} {
		if has(bit) {
			r.text()
		}
	}
	if has(message) {
		return r.text()
	}
	return ""
}

// reader takes values off a payload; past its end everything is zero.
type reader struct{ b []byte }

func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.b = nil
		return make([]byte, 8)
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) skip(n int) { r.take(n) }

func (r *reader) octet() byte   { return r.take(1)[0] }
func (r *reader) short() uint16 { return binary.BigEndian.Uint16(r.take(2)) }
func (r *reader) word() uint32  { return binary.BigEndian.Uint32(r.take(4)) }
func (r *reader) long() uint64  { return binary.BigEndian.Uint64(r.take(8)) }

func (r *reader) text() string {
	n := int(r.octet())
	if n > len(r.b) {
		r.b = nil
		return ""
	}
	return string(r.take(n))
}
