package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// The frames of AMQP 0-9-1, as far as the wire reads and writes them: their layout, the decoder of
// their payload, and the scanner that follows a stream of them.
const (
	frameMethod = 1
	frameHeader = 2
	frameBody   = 3
	frameBeat   = 8
	frameEnd    = 0xCE

	// class and method in one, as on the wire
	connectionStart   = 10<<16 | 10
	connectionClose   = 10<<16 | 50
	connectionCloseOk = 10<<16 | 51
	channelOpen       = 20<<16 | 10
	channelOpenOk     = 20<<16 | 11
	channelClose      = 20<<16 | 40
	channelCloseOk    = 20<<16 | 41
	queueDeclare      = 50<<16 | 10
	queueDeclareOk    = 50<<16 | 11
	basicConsume      = 60<<16 | 20
	basicPublish      = 60<<16 | 40
	basicDeliver      = 60<<16 | 60
	basicAck          = 60<<16 | 80
	basicReject       = 60<<16 | 90
	basicNack         = 60<<16 | 120
	txSelect          = 90<<16 | 10

	frameHead  = 7              // type, channel, size
	methodHead = frameHead + 4  // and class, method
	headerHead = frameHead + 12 // and class, weight, body size

	settlementSize = 21 // of ack, nack and reject alike
)

// FrameSize is what the driver's own dial asks for. A broker that proposes no limit would get none
// otherwise.
const FrameSize = 128 << 10

// heartbeat is a whole heartbeat frame.
var heartbeat = []byte{frameBeat, 0, 0, 0, 0, 0, 0, frameEnd}

// methodID returns class and method of the frame that p begins with; 0 if it is no method frame.
func methodID(p []byte) uint32 {
	if len(p) < methodHead || p[0] != frameMethod {
		return 0
	}
	return binary.BigEndian.Uint32(p[frameHead:])
}

// needed is how many bytes of a frame of this type tell what to do with it; 0 means that there is
// no such type.
func needed(typ byte) int {
	switch typ {
	case frameMethod:
		return methodHead
	case frameHeader:
		return headerHead
	case frameBody, frameBeat:
		return frameHead
	}
	return 0
}

// decoder reads the payload of a frame. It takes what the driver takes, and gives values the same
// Go types. It takes more, for the driver refuses headers that RabbitMQ accepts: any number of
// them, nested deeper, of the type L.
//
// What judges the library (steadymqtest, internal/faultproxy, bench/internal/replay) reads frames
// with code of its own, on purpose: with a decoder in common it would share its mistakes.
type decoder struct {
	b   []byte
	err error // the first one; what is read after it is zero
}

func (d *decoder) take(n int) []byte {
	switch {
	case d.err != nil:
	case n <= len(d.b):
		p := d.b[:n]
		d.b = d.b[n:]
		return p
	case len(d.b) == 0:
		d.err = io.EOF
	default:
		d.err = io.ErrUnexpectedEOF
	}
	return nil
}

func (d *decoder) octet() byte {
	if p := d.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (d *decoder) short() uint16 {
	if p := d.take(2); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

func (d *decoder) long() uint32 {
	if p := d.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (d *decoder) longlong() uint64 {
	if p := d.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

func (d *decoder) timestamp() time.Time {
	seconds := int64(d.longlong())
	if d.err != nil {
		return time.Time{}
	}
	return time.Unix(seconds, 0)
}

func (d *decoder) shortstr() []byte { return d.take(int(d.octet())) }

func (d *decoder) longstr() []byte { return d.take(d.size()) }

// size reads the size of a string, table or array.
func (d *decoder) size() int {
	n := d.long()
	if n > math.MaxInt32 {
		d.fail(errSize)
		return 0
	}
	return int(n)
}

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.err = err
	}
}

// maxDepth is how deep tables and arrays may nest: deeper than fits into a frame of 128 KiB, the
// largest that RabbitMQ takes by default, at 5 bytes a level. It bounds the stack, here and in
// whatever goes over the headers later.
const maxDepth = 32 << 10

func (d *decoder) table(depth int) amqp.Table {
	if depth > maxDepth {
		d.fail(errDepth)
		return nil
	}
	inner := decoder{b: d.longstr()}
	inner.err = d.err
	t := make(amqp.Table)
	for len(inner.b) > 0 && inner.err == nil {
		key := string(inner.shortstr())
		t[key] = inner.value(depth)
	}
	d.err = inner.err
	return t
}

// array ends where a value is missing, as the driver's does.
func (d *decoder) array(depth int) []any {
	if depth > maxDepth {
		d.fail(errDepth)
		return nil
	}
	size := min(d.size(), len(d.b))
	if d.err != nil {
		return nil
	}
	inner := decoder{b: d.b[:size]}
	var all []any
	for {
		value := inner.value(depth)
		if errors.Is(inner.err, io.EOF) {
			d.b = d.b[size-len(inner.b):]
			return all
		}
		if inner.err != nil {
			d.err = inner.err
			return nil
		}
		all = append(all, value)
	}
}

func (d *decoder) value(depth int) any {
	switch typ := d.octet(); typ {
	case 't':
		return d.octet() != 0
	case 'B':
		return d.octet()
	case 'b':
		return int8(d.octet())
	case 's':
		return int16(d.short())
	case 'u':
		return d.short()
	case 'I':
		return int32(d.long())
	case 'i':
		return d.long()
	case 'l', 'L': // L is in the specification, and no client of today writes it
		return int64(d.longlong())
	case 'f':
		return math.Float32frombits(d.long())
	case 'd':
		return math.Float64frombits(d.longlong())
	case 'D':
		return amqp.Decimal{Scale: d.octet(), Value: int32(d.long())}
	case 'S':
		return string(d.longstr())
	case 'T':
		return d.timestamp()
	case 'A':
		return d.array(depth + 1)
	case 'F':
		return d.table(depth + 1)
	case 'x':
		return append([]byte{}, d.longstr()...)
	case 'V':
		return nil
	default:
		d.fail(fmt.Errorf("a field is of the unknown type %q", typ))
	}
	return nil
}

// interned spares the copy of a text that is the same in most messages.
type interned string

func (i *interned) text(b []byte) string {
	if string(b) != string(*i) {
		*i = interned(b)
	}
	return string(*i)
}

// interner keeps the texts of one consumer's messages, each for its field.
type interner struct {
	exchange, routingKey, contentType, contentEncoding, replyTo, kind, user, app interned
}

// deliver reads a basic.deliver behind its consumer tag.
func (i *interner) deliver(d *decoder, m *amqp.Delivery) {
	m.DeliveryTag = d.longlong()
	m.Redelivered = d.octet()&1 != 0
	m.Exchange = i.exchange.text(d.shortstr())
	m.RoutingKey = i.routingKey.text(d.shortstr())
}

// properties reads a content header behind its body size. The highest bit of the flags is the first
// property (AMQP 0-9-1, 4.2.6.1).
func (i *interner) properties(d *decoder, m *amqp.Delivery) {
	flags := d.short()
	has := func(bit int) bool { return flags&(1<<bit) != 0 && d.err == nil }
	if has(15) {
		m.ContentType = i.contentType.text(d.shortstr())
	}
	if has(14) {
		m.ContentEncoding = i.contentEncoding.text(d.shortstr())
	}
	if has(13) {
		m.Headers = d.table(0)
	}
	if has(12) {
		m.DeliveryMode = d.octet()
	}
	if has(11) {
		m.Priority = d.octet()
	}
	if has(10) {
		m.CorrelationId = string(d.shortstr())
	}
	if has(9) {
		m.ReplyTo = i.replyTo.text(d.shortstr())
	}
	if has(8) {
		m.Expiration = string(d.shortstr())
	}
	if has(7) {
		m.MessageId = string(d.shortstr())
	}
	if has(6) {
		m.Timestamp = d.timestamp()
	}
	if has(5) {
		m.Type = i.kind.text(d.shortstr())
	}
	if has(4) {
		m.UserId = i.user.text(d.shortstr())
	}
	if has(3) {
		m.AppId = i.app.text(d.shortstr())
	}
	if has(2) {
		d.shortstr() // reserved
	}
}

// mechanismsOf reads what a connection.start offers; "" if b is none.
func mechanismsOf(b []byte) string {
	if methodID(b) != connectionStart {
		return ""
	}
	d := decoder{b: b[methodHead:]}
	d.short()   // version
	d.longstr() // the server's properties
	return string(d.longstr())
}

// scanner follows the frames in a stream, by their first bytes only.
type scanner struct {
	onFrame func(start []byte) (pass bool) // sees the beginning of each frame, and keeps it back or not
	pass    bool                           // the current frame
	skip    uint64                         // bytes to the next frame
	part    [headerHead]byte               // the beginning of a frame that a write cut, before onFrame saw it
	have    int                            // bytes in part
	opaque  bool                           // the stream holds no frames any more
}

// next goes over the following bytes of the stream. It appends to out what is not kept back.
func (c *scanner) next(out, b []byte) []byte {
	for len(b) > 0 && !c.opaque {
		if c.skip > 0 {
			n := c.skipRest(b)
			if c.pass {
				out = append(out, b[:n]...)
			}
			b = b[n:]
			continue
		}
		start := c.frameStart(b)
		if start == nil {
			break
		}
		length := uint64(binary.BigEndian.Uint32(start[3:]))
		need := needed(start[0])
		if need == 0 || length+frameHead < uint64(need) {
			c.opaque = true
			break
		}
		if c.pass = c.onFrame(start); c.pass {
			out = append(out, start[:need]...)
		}
		b = b[need-c.have:]
		c.have = 0
		c.skip = length + frameHead + 1 - uint64(need)
	}
	return out
}

// betweenFrames tells whether the next byte begins a frame.
func (c *scanner) betweenFrames() bool { return c.skip == 0 && c.have == 0 && !c.opaque }

// withinFrame tells whether the rest of a frame is still to come.
func (c *scanner) withinFrame() bool { return !c.opaque && (c.skip > 0 || c.have > 0) }

// skipRest goes over the rest of a frame.
func (c *scanner) skipRest(b []byte) int {
	n := int(min(c.skip, uint64(len(b))))
	c.skip -= uint64(n)
	if c.skip == 0 && b[n-1] != frameEnd {
		c.opaque = true
	}
	return n
}

// frameStart returns the beginning of a frame, joined where a write cut it; nil as long as too
// little of it is there.
func (c *scanner) frameStart(b []byte) []byte {
	if c.have == 0 && len(b) >= len(c.part) {
		return b
	}
	have := c.have + copy(c.part[c.have:], b)
	if have < frameHead || have < needed(c.part[0]) {
		c.have = have
		return nil
	}
	return c.part[:]
}
