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
	channelClose      = 20<<16 | 40
	channelCloseOk    = 20<<16 | 41
	basicConsume      = 60<<16 | 20
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

// heartbeat is a whole heartbeat frame.
var heartbeat = []byte{frameBeat, 0, 0, 0, 0, 0, 0, frameEnd}

// errGarbled says that the broker's frames make no sense: where the next one begins,
// or which message is meant, is anybody's guess.
var errGarbled = errors.New("the broker sent frames that cannot be read")

// methodID returns class and method of the frame that p begins with; 0 if it
// is no method frame.
func methodID(p []byte) uint32 {
	if len(p) < methodHead || p[0] != frameMethod {
		return 0
	}
	return binary.BigEndian.Uint32(p[frameHead:])
}

// needed is how much of a frame of this type tells what to do with it; 0 means
// that there is no such type.
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

// NotAMQPError is a peer whose first octet begins no frame: a wrong port, mostly.
type NotAMQPError struct{ First byte }

func (e *NotAMQPError) Error() string {
	const text = "the peer does not speak AMQP 0-9-1"
	switch e.First {
	case 0x15: // the record of a TLS alert (RFC 8446, 5.1)
		return text + ": it answers with TLS; use an amqps URL, or the port for AMQP without TLS (5672)"
	case 'A': // a protocol header, the answer to a greeting that is not understood (AMQP 0-9-1, 4.2.2)
		return text + ", or did not understand our greeting; is there a proxy that puts bytes before it (PROXY protocol)?"
	case 'H':
		return text + ": it answers with HTTP; use the port for AMQP (5672, over TLS 5671)"
	}
	return fmt.Sprintf("%s: its first octet is %#x; check host and port", text, e.First)
}

// fields reads the payload of a frame. What the driver takes it takes too, and
// gives values the same Go types. It takes more, for the driver refuses headers
// that RabbitMQ accepts: any number of them, nested deeper, of the type L.
type fields struct {
	b   []byte
	err error // the first one; what is read after it is zero
}

func (f *fields) take(n int) []byte {
	switch {
	case f.err != nil:
	case n <= len(f.b):
		p := f.b[:n]
		f.b = f.b[n:]
		return p
	case len(f.b) == 0:
		f.err = io.EOF
	default:
		f.err = io.ErrUnexpectedEOF
	}
	return nil
}

func (f *fields) octet() byte {
	if p := f.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (f *fields) short() uint16 {
	if p := f.take(2); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

func (f *fields) long() uint32 {
	if p := f.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (f *fields) longlong() uint64 {
	if p := f.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

func (f *fields) timestamp() time.Time {
	seconds := int64(f.longlong())
	if f.err != nil {
		return time.Time{}
	}
	return time.Unix(seconds, 0)
}

func (f *fields) shortstr() []byte { return f.take(int(f.octet())) }

func (f *fields) longstr() []byte {
	return f.take(f.size())
}

// size reads that of a string, table or array.
func (f *fields) size() int {
	n := f.long()
	if n > math.MaxInt32 {
		f.fail(errSize)
		return 0
	}
	return int(n)
}

func (f *fields) fail(err error) {
	if f.err == nil {
		f.err = err
	}
}

// maxDepth is how deep tables and arrays may nest: deeper than fits into a frame of
// 128 KiB, the largest that RabbitMQ takes by default, at 5 bytes a level. It bounds
// the stack, of the reader here and of whoever goes over the headers later.
const maxDepth = 32 << 10

var (
	errDepth = fmt.Errorf("tables nest deeper than %d levels", maxDepth)
	errSize  = errors.New("a size is negative")
	errEnd   = errors.New("no end of the frame where it should be")
)

func (f *fields) table(depth int) amqp.Table {
	if depth > maxDepth {
		f.fail(errDepth)
		return nil
	}
	in := fields{b: f.longstr()}
	in.err = f.err
	t := make(amqp.Table)
	for len(in.b) > 0 && in.err == nil {
		key := string(in.shortstr())
		t[key] = in.value(depth)
	}
	f.err = in.err
	return t
}

// array ends, as the driver's does, where a value is missing.
func (f *fields) array(depth int) []any {
	if depth > maxDepth {
		f.fail(errDepth)
		return nil
	}
	size := min(f.size(), len(f.b))
	if f.err != nil {
		return nil
	}
	in := fields{b: f.b[:size]}
	var all []any
	for {
		value := in.value(depth)
		if errors.Is(in.err, io.EOF) {
			f.b = f.b[size-len(in.b):]
			return all
		}
		if in.err != nil {
			f.err = in.err
			return nil
		}
		all = append(all, value)
	}
}

func (f *fields) value(depth int) any {
	switch typ := f.octet(); typ {
	case 't':
		return f.octet() != 0
	case 'B':
		return f.octet()
	case 'b':
		return int8(f.octet())
	case 's':
		return int16(f.short())
	case 'u':
		return f.short()
	case 'I':
		return int32(f.long())
	case 'i':
		return f.long()
	case 'l', 'L': // L is in the specification, and no client of today writes it
		return int64(f.longlong())
	case 'f':
		return math.Float32frombits(f.long())
	case 'd':
		return math.Float64frombits(f.longlong())
	case 'D':
		return amqp.Decimal{Scale: f.octet(), Value: int32(f.long())}
	case 'S':
		return string(f.longstr())
	case 'T':
		return f.timestamp()
	case 'A':
		return f.array(depth + 1)
	case 'F':
		return f.table(depth + 1)
	case 'x':
		return append([]byte{}, f.longstr()...)
	case 'V':
		return nil
	default:
		f.fail(fmt.Errorf("a field is of the unknown type %q", typ))
	}
	return nil
}

// memo spares the copy of a text that is the same in most messages.
type memo string

func (m *memo) of(b []byte) string {
	if string(b) != string(*m) {
		*m = memo(b)
	}
	return string(*m)
}

// memos are of one consumer.
type memos struct {
	exchange, routingKey, contentType, contentEncoding, replyTo, kind, user, app memo
}

// deliver reads a basic.deliver behind its consumer tag.
func (m *memos) deliver(f *fields, d *amqp.Delivery) {
	d.DeliveryTag = f.longlong()
	d.Redelivered = f.octet()&1 != 0
	d.Exchange = m.exchange.of(f.shortstr())
	d.RoutingKey = m.routingKey.of(f.shortstr())
}

// properties reads a content header behind its body size. The highest bit of
// the flags is the first property (AMQP 0-9-1, 4.2.6.1).
func (m *memos) properties(f *fields, d *amqp.Delivery) {
	flags := f.short()
	has := func(bit int) bool { return flags&(1<<bit) != 0 && f.err == nil }
	if has(15) {
		d.ContentType = m.contentType.of(f.shortstr())
	}
	if has(14) {
		d.ContentEncoding = m.contentEncoding.of(f.shortstr())
	}
	if has(13) {
		d.Headers = f.table(0)
	}
	if has(12) {
		d.DeliveryMode = f.octet()
	}
	if has(11) {
		d.Priority = f.octet()
	}
	if has(10) {
		d.CorrelationId = string(f.shortstr())
	}
	if has(9) {
		d.ReplyTo = m.replyTo.of(f.shortstr())
	}
	if has(8) {
		d.Expiration = string(f.shortstr())
	}
	if has(7) {
		d.MessageId = string(f.shortstr())
	}
	if has(6) {
		d.Timestamp = f.timestamp()
	}
	if has(5) {
		d.Type = m.kind.of(f.shortstr())
	}
	if has(4) {
		d.UserId = m.user.of(f.shortstr())
	}
	if has(3) {
		d.AppId = m.app.of(f.shortstr())
	}
	if has(2) {
		f.shortstr() // reserved
	}
}

func garbled(err error) error { return fmt.Errorf("%w: %w", errGarbled, err) }

// unread says that what cannot be read, and why.
func unread(what string, why error) error {
	if errors.Is(why, io.EOF) || errors.Is(why, io.ErrUnexpectedEOF) {
		return fmt.Errorf("its %s cannot be read: something is cut off", what)
	}
	return fmt.Errorf("its %s cannot be read: %w", what, why)
}

// mechanismsOf reads what connection.start offers, "" where b is none.
func mechanismsOf(b []byte) string {
	if methodID(b) != connectionStart {
		return ""
	}
	f := fields{b: b[methodHead:]}
	f.short()   // version
	f.longstr() // the server's properties
	return string(f.longstr())
}

// FrameSize is what the driver's own dial asks for. A broker that proposes no
// limit would get none otherwise.
const FrameSize = 128 << 10

// scanner follows the frames in a stream, by their first bytes only. What makes no
// sense to it turns it off.
type scanner struct {
	visit func(head []byte) // sees each frame's beginning
	skip  uint64            // bytes to the next frame
	part  [headerHead]byte  // the beginning of a frame that a read cut
	have  int               // bytes in part
	off   bool              // what came were no frames
}

// next goes over the following bytes of the stream.
func (c *scanner) next(b []byte) {
	for len(b) > 0 && !c.off {
		if c.skip > 0 {
			b = b[c.pass(b):]
			continue
		}
		head := c.head(b)
		if head == nil {
			break
		}
		length := uint64(binary.BigEndian.Uint32(head[3:]))
		need := needed(head[0])
		if need == 0 || length+frameHead < uint64(need) {
			c.off = true
			break
		}
		c.visit(head)
		b = b[need-c.have:]
		c.have = 0
		c.skip = length + frameHead + 1 - uint64(need)
	}
}

// between tells whether the stream is between two frames.
func (c *scanner) between() bool { return c.skip == 0 && c.have == 0 && !c.off }

// within tells whether the rest of a frame is still to come.
func (c *scanner) within() bool { return !c.off && (c.skip > 0 || c.have > 0) }

// pass goes over the rest of a frame.
func (c *scanner) pass(b []byte) int {
	n := int(min(c.skip, uint64(len(b))))
	c.skip -= uint64(n)
	if c.skip == 0 && b[n-1] != frameEnd {
		c.off = true
	}
	return n
}

// head returns the beginning of a frame, joined where a read cut it; nil as
// long as too little of it is there.
func (c *scanner) head(b []byte) []byte {
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
