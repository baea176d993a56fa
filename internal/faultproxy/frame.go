package faultproxy

import (
	"bytes"
	"encoding/binary"
)

const protocolHeader = "AMQP\x00\x00\x09\x01"

const (
	frameMethod, frameHeader, frameBody = 1, 2, 3
	frameOverhead                       = 8
	frameEnd                            = 0xCE
	maxFrame                            = 16 << 20 // more than that is no AMQP
)

type frame struct {
	kind    byte
	channel uint16
	payload []byte
}

// parser cuts one direction's bytes into frames. A stream that is not AMQP (TLS, say) is left alone.
type parser struct {
	client bool // the protocol header comes first
	frame  func(frame)
	buf    []byte
	opaque bool
	begun  bool // the header is past
}

// feed takes the next bytes and returns the offset in them of the first end of a frame, -1 if there is none.
func (p *parser) feed(data []byte) int {
	first := -1
	if p.opaque {
		return first
	}
	before := len(p.buf)
	p.buf = append(p.buf, data...)
	used := 0
	for {
		n := p.next(p.buf[used:])
		if n == 0 {
			break
		}
		used += n
		if first < 0 {
			first = used - before
		}
	}
	p.buf = append(p.buf[:0], p.buf[used:]...)
	return first
}

// next takes one frame off b and returns its length, 0 if it is not complete.
func (p *parser) next(b []byte) int {
	if p.client && !p.begun {
		return p.header(b)
	}
	if len(b) < frameOverhead {
		return 0
	}
	size := int(binary.BigEndian.Uint32(b[3:7]))
	if b[0] == 0 || b[0] > 8 || size > maxFrame {
		p.opaque, p.buf = true, nil
		return 0
	}
	total := size + frameOverhead
	if len(b) < total {
		return 0
	}
	p.frame(frame{b[0], binary.BigEndian.Uint16(b[1:3]), b[7 : total-1]})
	return total
}

func (p *parser) header(b []byte) int {
	n := min(len(b), len(protocolHeader))
	if !bytes.Equal(b[:min(n, 4)], []byte(protocolHeader)[:min(n, 4)]) {
		p.opaque, p.buf = true, nil
		return 0
	}
	if n < len(protocolHeader) {
		return 0
	}
	p.begun = true
	return n
}

// between says whether a frame may be put in here.
func (p *parser) between() bool { return len(p.buf) == 0 && (!p.client || p.begun) }

// MethodFrame builds a frame to inject.
func MethodFrame(channel, class, method uint16, args []byte) []byte {
	b := []byte{frameMethod}
	b = binary.BigEndian.AppendUint16(b, channel)
	b = binary.BigEndian.AppendUint32(b, uint32(4+len(args)))
	b = binary.BigEndian.AppendUint16(b, class)
	b = binary.BigEndian.AppendUint16(b, method)
	return append(append(b, args...), frameEnd)
}

// AckFrame builds a basic.ack: one that the client never sent, for example for a delivery it has acknowledged already.
func AckFrame(channel uint16, tag uint64, multiple bool) []byte {
	args := binary.BigEndian.AppendUint64(nil, tag)
	return MethodFrame(channel, classBasic, basicAck, append(args, bit(multiple)))
}

func bit(on bool) byte {
	if on {
		return 1
	}
	return 0
}
