package steadymqtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
)

// The frame types and sizes of AMQP 0-9-1.
const (
	frameMethod    = 1
	frameHeader    = 2
	frameBody      = 3
	frameHeartbeat = 8
	frameEnd       = 0xCE

	frameOverhead = 8 // seven bytes before the payload, one after it
	frameMinSize  = 4096
	frameMaxSize  = 131072
)

var protocolHeader = []byte{'A', 'M', 'Q', 'P', 0, 0, 9, 1}

var (
	errFrameEnd  = errors.New("frame without its end byte")
	errFrameType = errors.New("unknown frame type")
)

// frame is one frame as it came; payload points into the read buffer.
type frame struct {
	typ     byte
	channel uint16
	payload []byte
}

// nextFrame cuts one frame off the front of buf and says how long it was; zero when more bytes are needed.
func nextFrame(buf []byte, frameMax int) (frame, int, error) {
	if len(buf) < 7 {
		return frame{}, 0, nil
	}
	size := int(binary.BigEndian.Uint32(buf[3:]))
	if frameMax > 0 && size > frameMax-frameOverhead {
		return frame{}, 0, fmt.Errorf("type %d, all octets = <<>>: {frame_too_large,%d,%d}", buf[0], size, frameMax-frameOverhead)
	}
	switch buf[0] {
	case frameMethod, frameHeader, frameBody, frameHeartbeat:
	default:
		return frame{}, 0, errFrameType
	}
	total := 7 + size + 1
	if len(buf) < total {
		return frame{}, 0, nil
	}
	if buf[total-1] != frameEnd {
		return frame{}, 0, errFrameEnd
	}
	return frame{typ: buf[0], channel: binary.BigEndian.Uint16(buf[1:]), payload: buf[7 : total-1]}, total, nil
}

// openFrame starts a frame at the end of out; closeFrame with the same mark completes its size.
func openFrame(out []byte, typ byte, channel uint16) (grown []byte, mark int) {
	mark = len(out)
	return append(out, typ, byte(channel>>8), byte(channel), 0, 0, 0, 0), mark
}

func closeFrame(out []byte, mark int) []byte {
	binary.BigEndian.PutUint32(out[mark+3:], uint32(len(out)-mark-7))
	return append(out, frameEnd)
}

// openMethod starts a method frame; close it with closeFrame.
func openMethod(out []byte, channel uint16, m method) (grown []byte, mark int) {
	out, mark = openFrame(out, frameMethod, channel)
	return binary.BigEndian.AppendUint32(out, uint32(m)), mark
}

// appendMethod writes a method whose arguments are already encoded.
func appendMethod(out []byte, channel uint16, m method, args ...byte) []byte {
	out, mark := openMethod(out, channel, m)
	return closeFrame(append(out, args...), mark)
}

func appendHeartbeat(out []byte) []byte {
	out, mark := openFrame(out, frameHeartbeat, 0)
	return closeFrame(out, mark)
}

// appendContent writes the header frame and the body frames of a message.
func appendContent(out []byte, channel uint16, props, body []byte, frameMax int) []byte {
	out, mark := openFrame(out, frameHeader, channel)
	out = append(out, 0, classBasic, 0, 0)
	out = binary.BigEndian.AppendUint64(out, uint64(len(body)))
	out = closeFrame(append(out, props...), mark)
	if frameMax <= frameOverhead {
		frameMax = frameMaxSize
	}
	for len(body) > 0 {
		n := min(len(body), frameMax-frameOverhead)
		out, mark = openFrame(out, frameBody, channel)
		out = closeFrame(append(out, body[:n]...), mark)
		body = body[n:]
	}
	return out
}

func appendShortstr(out []byte, s string) []byte {
	if len(s) > 255 {
		s = s[:255]
	}
	return append(append(out, byte(len(s))), s...)
}

func appendLongstr(out []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(out, uint32(len(s))), s...)
}

// appendTable writes a field table, keys in order so that the same table always gives the same bytes.
func appendTable(out []byte, t map[string]any) []byte { return appendRawTable(out, nil, t) }

// appendRawTable writes a field table with entries that are already encoded before the others.
func appendRawTable(out, raw []byte, t map[string]any) []byte {
	mark := len(out)
	out = append(append(out, 0, 0, 0, 0), raw...)
	keys := make([]string, 0, len(t))
	for k := range t {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		out = appendField(appendShortstr(out, k), t[k])
	}
	binary.BigEndian.PutUint32(out[mark:], uint32(len(out)-mark-4))
	return out
}

func appendArray(out []byte, values []any) []byte {
	mark := len(out)
	out = append(out, 0, 0, 0, 0)
	for _, v := range values {
		out = appendField(out, v)
	}
	binary.BigEndian.PutUint32(out[mark:], uint32(len(out)-mark-4))
	return out
}

// appendField writes one value with its type letter. A value of a type that AMQP does not know is written as its text.
func appendField(out []byte, v any) []byte {
	be := binary.BigEndian
	switch v := v.(type) {
	case nil:
		return append(out, 'V')
	case bool:
		return append(out, 't', bit(v, 0))
	case uint8:
		return append(out, 'B', v)
	case int8:
		return append(out, 'b', byte(v))
	case int16:
		return be.AppendUint16(append(out, 's'), uint16(v))
	case uint16:
		return be.AppendUint16(append(out, 'u'), v)
	case int32:
		return be.AppendUint32(append(out, 'I'), uint32(v))
	case uint32:
		return be.AppendUint32(append(out, 'i'), v)
	case int:
		return be.AppendUint64(append(out, 'l'), uint64(v))
	case int64:
		return be.AppendUint64(append(out, 'l'), uint64(v))
	case float32:
		return be.AppendUint32(append(out, 'f'), math.Float32bits(v))
	case float64:
		return be.AppendUint64(append(out, 'd'), math.Float64bits(v))
	case decimal:
		return be.AppendUint32(append(out, 'D', v.scale), v.value)
	case string:
		return appendLongstr(append(out, 'S'), v)
	case []byte:
		return appendLongstr(append(out, 'x'), string(v))
	case time.Time:
		return be.AppendUint64(append(out, 'T'), uint64(v.Unix()))
	case []any:
		return appendArray(append(out, 'A'), v)
	case map[string]any:
		return appendTable(append(out, 'F'), v)
	}
	return appendLongstr(append(out, 'S'), fmt.Sprint(v))
}

// decimal keeps a value that nobody computes with, so that it passes through unchanged.
type decimal struct {
	scale byte
	value uint32
}

// bit is v at position n of an octet of flags.
func bit(v bool, n uint) byte {
	if v {
		return 1 << n
	}
	return 0
}

// decoder reads the arguments of a method. After the first error every read gives zero values and bad is true: one check at the
// end is enough, whatever bytes a client sends.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || n < 0 || n > len(d.b) {
		d.bad = true
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
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

func (d *decoder) shortstr() string { return string(d.take(int(d.octet()))) }

func (d *decoder) longstr() string { return string(d.take(int(d.long()))) }

// maxDepth bounds how deep tables may nest: hostile input must not exhaust the stack. No frame of 128 KiB can hold a deeper one.
const maxDepth = 32 << 10

func (d *decoder) table() map[string]any { return d.tableAt(0) }

// headers reads a table. If that cannot be read it returns what is in it, as it came.
func (d *decoder) headers() (t map[string]any, raw []byte) {
	whole := *d
	if t = d.table(); !d.bad {
		return t, nil
	}
	raw = whole.take(int(whole.long()))
	*d = whole
	return nil, raw
}

func (d *decoder) tableAt(depth int) map[string]any {
	in := decoder{b: d.take(int(d.long())), bad: d.bad || depth > maxDepth}
	t := make(map[string]any)
	for len(in.b) > 0 && !in.bad {
		k := in.shortstr()
		t[k] = in.field(depth)
	}
	d.bad = d.bad || in.bad
	return t
}

func (d *decoder) arrayAt(depth int) []any {
	in := decoder{b: d.take(int(d.long())), bad: d.bad || depth > maxDepth}
	var values []any
	for len(in.b) > 0 && !in.bad {
		values = append(values, in.field(depth))
	}
	d.bad = d.bad || in.bad
	return values
}

func (d *decoder) field(depth int) any {
	switch d.octet() {
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
	case 'l', 'L':
		return int64(d.longlong())
	case 'f':
		return math.Float32frombits(d.long())
	case 'd':
		return math.Float64frombits(d.longlong())
	case 'D':
		return decimal{scale: d.octet(), value: d.long()}
	case 'S':
		return d.longstr()
	case 'x':
		return []byte(d.longstr())
	case 'T':
		return time.Unix(int64(d.longlong()), 0)
	case 'A':
		return d.arrayAt(depth + 1)
	case 'F':
		return d.tableAt(depth + 1)
	case 'V':
		return nil
	}
	d.bad = true
	return nil
}
