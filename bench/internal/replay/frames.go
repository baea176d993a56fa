package replay

import (
	"encoding/binary"
	"errors"
	"time"
)

// frameMax is what RabbitMQ proposes: a 64 KiB body then fits one frame.
const frameMax = 131072

const (
	frameMethod    = 1
	frameHeader    = 2
	frameBody      = 3
	frameHeartbeat = 8
	frameEnd       = 0xCE
	frameOverhead  = 8 // type, channel, size before the payload; the end octet after it
)

// A method is its class and method id, as one comparable value.
type method uint32

const (
	connectionStart   method = 10<<16 | 10
	connectionStartOk method = 10<<16 | 11
	connectionTune    method = 10<<16 | 30
	connectionTuneOk  method = 10<<16 | 31
	connectionOpen    method = 10<<16 | 40
	connectionOpenOk  method = 10<<16 | 41
	connectionClose   method = 10<<16 | 50
	connectionCloseOk method = 10<<16 | 51
	channelOpen       method = 20<<16 | 10
	channelOpenOk     method = 20<<16 | 11
	channelClose      method = 20<<16 | 40
	channelCloseOk    method = 20<<16 | 41
	queueDeclare      method = 50<<16 | 10
	queueDeclareOk    method = 50<<16 | 11
	basicQos          method = 60<<16 | 10
	basicQosOk        method = 60<<16 | 11
	basicConsume      method = 60<<16 | 20
	basicConsumeOk    method = 60<<16 | 21
	basicCancel       method = 60<<16 | 30
	basicCancelOk     method = 60<<16 | 31
	basicDeliver      method = 60<<16 | 60
	basicAck          method = 60<<16 | 80
	basicReject       method = 60<<16 | 90
	basicNack         method = 60<<16 | 120
)

var errShort = errors.New("replay: frame shorter than its method")

// appendMethod appends a method frame whose arguments are already encoded.
func appendMethod(b []byte, channel uint16, m method, args []byte) []byte {
	b = append(b, frameMethod)
	b = binary.BigEndian.AppendUint16(b, channel)
	b = binary.BigEndian.AppendUint32(b, uint32(4+len(args)))
	b = binary.BigEndian.AppendUint32(b, uint32(m))
	b = append(b, args...)
	return append(b, frameEnd)
}

func appendHeartbeat(b []byte) []byte {
	return append(b, frameHeartbeat, 0, 0, 0, 0, 0, 0, frameEnd)
}

func appendShortstr(b []byte, s string) []byte {
	return append(append(b, byte(len(s))), s...)
}

func appendLongstr(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// startArgs encodes connection.start with the capabilities a consumer looks at.
func startArgs() []byte {
	var caps []byte
	for _, name := range []string{"basic.nack", "consumer_cancel_notify", "authentication_failure_close"} {
		caps = append(appendShortstr(caps, name), 't', 1)
	}
	props := append(appendShortstr(nil, "capabilities"), 'F')
	props = appendLongstr(props, string(caps))
	b := appendLongstr([]byte{0, 9}, string(props))
	b = appendLongstr(b, "PLAIN AMQPLAIN")
	return appendLongstr(b, "en_US")
}

func tuneArgs() []byte {
	b := binary.BigEndian.AppendUint16(nil, 2047)
	b = binary.BigEndian.AppendUint32(b, frameMax)
	return binary.BigEndian.AppendUint16(b, 60)
}

// closeArgs encodes the arguments connection.close and channel.close share.
func closeArgs(code uint16, text string) []byte {
	b := binary.BigEndian.AppendUint16(nil, code)
	b = appendShortstr(b, text)
	return append(b, 0, 0, 0, 0)
}

// args reads method arguments; the first short read sticks.
type args struct {
	b   []byte
	err error
}

func (a *args) take(n int) []byte {
	if a.err != nil || n > len(a.b) {
		a.err = errShort
		return make([]byte, min(n, 8))
	}
	v := a.b[:n]
	a.b = a.b[n:]
	return v
}

func (a *args) u8() byte         { return a.take(1)[0] }
func (a *args) u16() uint16      { return binary.BigEndian.Uint16(a.take(2)) }
func (a *args) u64() uint64      { return binary.BigEndian.Uint64(a.take(8)) }
func (a *args) shortstr() string { return string(a.take(int(a.u8()))) }

// template holds copies of one delivery, back to back, ready to be sent:
// per message only the delivery tag is written into it.
type template struct {
	buf    []byte
	stride int // length of one delivery
	tagAt  int // offset of the delivery tag in it
	bodyAt int // offset of the body in it, 0 if that has no room for a time
	copies int
}

// templateBytes bounds one write: large enough that the system call costs
// nothing per message, small enough to stay in the second-level cache.
const (
	templateBytes  = 128 << 10
	templateCopies = 512
)

// newTemplate makes most copies at most: a window never takes more.
func newTemplate(channel uint16, consumerTag, queue string, size int, generation uint64, most int) template {
	var t template
	margs := appendShortstr(nil, consumerTag)
	t.tagAt = frameOverhead - 1 + 4 + len(margs)
	margs = append(margs, make([]byte, 8)...)
	margs = append(margs, 0) // redelivered
	margs = appendShortstr(margs, "")
	margs = appendShortstr(margs, queue)
	one := appendMethod(nil, channel, basicDeliver, margs)
	one = appendContent(one, channel, size, generation)
	t.stride = len(one)
	if size >= 16 && size <= frameMax-frameOverhead {
		t.bodyAt = t.stride - 1 - size
	}
	t.copies = max(1, min(templateCopies, most, templateBytes/t.stride))
	for range t.copies {
		t.buf = append(t.buf, one...)
	}
	return t
}

// appendContent appends the header (delivery-mode 2, as a durable message has)
// and the body frames. The body begins with the generation of the subscription.
func appendContent(b []byte, channel uint16, size int, generation uint64) []byte {
	h := binary.BigEndian.AppendUint32(nil, 60<<16)
	h = binary.BigEndian.AppendUint64(h, uint64(size))
	h = binary.BigEndian.AppendUint16(h, 1<<12)
	h = append(h, 2)
	b = appendFrame(b, frameHeader, channel, h)
	body := make([]byte, size)
	if size >= 8 {
		binary.BigEndian.PutUint64(body, generation)
	}
	for len(body) > 0 {
		n := min(len(body), frameMax-frameOverhead)
		b = appendFrame(b, frameBody, channel, body[:n])
		body = body[n:]
	}
	return b
}

func appendFrame(b []byte, kind byte, channel uint16, payload []byte) []byte {
	b = append(b, kind)
	b = binary.BigEndian.AppendUint16(b, channel)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	b = append(b, payload...)
	return append(b, frameEnd)
}

// stamp writes consecutive tags into the first n copies and returns their bytes.
func (t *template) stamp(first uint64, n int) []byte {
	for i := range n {
		binary.BigEndian.PutUint64(t.buf[i*t.stride+t.tagAt:], first+uint64(i))
	}
	return t.buf[:n*t.stride]
}

// stampTime writes the time into the first copy, behind the generation of the subscription: what is
// sent now and then tells how long it was on its way.
func (t *template) stampTime(now time.Time) {
	if t.bodyAt > 0 {
		binary.BigEndian.PutUint64(t.buf[t.bodyAt+8:], uint64(now.UnixNano()))
	}
}
