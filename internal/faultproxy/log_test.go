package faultproxy

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func shortstr(s string) []byte { return append([]byte{byte(len(s))}, s...) }

func deliver(channel uint16, tag uint64, redelivered bool, id, body string) []byte {
	args := append(shortstr("ctag"), binary.BigEndian.AppendUint64(nil, tag)...)
	args = append(args, bit(redelivered))
	args = append(append(args, shortstr("ex")...), shortstr("key")...)
	b := MethodFrame(channel, classBasic, basicDeliver, args)
	head := binary.BigEndian.AppendUint16(nil, classBasic)
	head = append(head, 0, 0)
	head = binary.BigEndian.AppendUint64(head, uint64(len(body)))
	head = binary.BigEndian.AppendUint16(head, 1<<15|1<<13|1<<12|1<<7)
	head = append(head, shortstr("text/plain")...)
	head = append(head, 0, 0, 0, 4, 1, 'k', 't', 1) // one header: k = true
	head = append(append(head, 2), shortstr(id)...)
	b = append(b, other(frameHeader, channel, head)...)
	for len(body) > 0 { // two body frames when there is enough
		n := (len(body) + 1) / 2
		b = append(b, other(frameBody, channel, []byte(body[:n]))...)
		body = body[n:]
	}
	return b
}

func other(kind byte, channel uint16, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{kind}, channel)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(append(b, payload...), frameEnd)
}

func settle(channel uint16, method uint16, tag uint64, bits byte) []byte {
	return MethodFrame(channel, classBasic, method, append(binary.BigEndian.AppendUint64(nil, tag), bits))
}

// An echo stands in for a broker: what the client sends passes in both directions, and each direction counts only its own methods.
func TestDeliveriesAndSettlementsAreReadFromTheWire(t *testing.T) {
	p, c := newPath(t)
	says(t, c, protocolHeader)
	open := MethodFrame(1, classChannel, channelOpen, []byte{0})
	stream := append(append([]byte(nil), open...), deliver(1, 7, true, "id-7", "hello world")...)
	stream = append(stream, settle(1, basicAck, 7, 1)...)
	stream = append(stream, settle(1, basicNack, 8, 2)...)
	stream = append(stream, settle(1, basicReject, 9, 1)...)
	p.Slice(ToBroker, 3, 0) // frames need not come in one piece
	says(t, c, string(stream))
	require.Eventually(t, func() bool { return len(p.Log().Settlements()) == 3 }, soon, time.Millisecond)

	got := p.Log().Settlements()
	assert.Equal(t, []Verb{Ack, Nack, Reject}, []Verb{got[0].Verb, got[1].Verb, got[2].Verb})
	assert.Equal(t, uint64(7), got[0].Tag)
	assert.True(t, got[0].Multiple)
	assert.True(t, got[1].Requeue && !got[1].Multiple)
	assert.True(t, got[2].Requeue)
}

func feedAll(conv *conversation, dir Direction, data []byte) {
	parser := parser{frame: func(f frame) { conv.frame(dir, f, false) }}
	parser.feed(data)
}

func TestADeliveryIsReadWhole(t *testing.T) {
	log := newLog()
	conv := log.converse(3)
	feedAll(conv, ToBroker, MethodFrame(1, classChannel, channelOpen, []byte{0}))
	feedAll(conv, ToClient, deliver(1, 7, true, "id-7", "hello world"))
	require.Len(t, log.Deliveries(), 1)
	d := log.Deliveries()[0]
	assert.Equal(t, Ref{Conn: 3, Channel: 1, Opened: 1, Tag: 7}, d.Ref)
	assert.Equal(t, "ctag ex key id-7 hello world", d.Consumer+" "+d.Exchange+" "+d.RoutingKey+" "+d.MessageID+" "+string(d.Body))
	assert.True(t, d.Redelivered)
}

func TestASettlementInTheMiddleOfADeliveryChangesNothing(t *testing.T) {
	log := newLog()
	conv := log.converse(1)
	whole := deliver(1, 2, false, "id-2", "body")
	method := 7 + 4 + len(shortstr("ctag")) + 8 + 1 + len(shortstr("ex")) + len(shortstr("key")) + 1
	feedAll(conv, ToClient, whole[:method])
	feedAll(conv, ToBroker, settle(1, basicAck, 1, 0))
	feedAll(conv, ToClient, whole[method:])
	require.Len(t, log.Deliveries(), 1)
	assert.Equal(t, "id-2", log.Deliveries()[0].MessageID)
	assert.Equal(t, "body", string(log.Deliveries()[0].Body))
}

func TestAChannelNumberUsedAgainIsAnotherChannel(t *testing.T) {
	log := newLog()
	conv := log.converse(1)
	for range 2 {
		feedAll(conv, ToBroker, MethodFrame(1, classChannel, channelOpen, []byte{0}))
		feedAll(conv, ToClient, deliver(1, 1, false, "m", "b"))
		feedAll(conv, ToBroker, settle(1, basicAck, 1, 0))
	}
	s, d := log.Settlements(), log.Deliveries()
	assert.NotEqual(t, s[0].Ref, s[1].Ref)
	assert.Equal(t, d[0].Ref, s[0].Ref)
	assert.Equal(t, d[1].Ref, s[1].Ref)
}

func TestOnlyTheFirstBytesOfABodyAreKept(t *testing.T) {
	log := newLog()
	feedAll(log.converse(1), ToClient, deliver(1, 1, false, "m", string(make([]byte, 1000))))
	assert.Len(t, log.Deliveries()[0].Body, bodyPrefix)
}

func TestWhatAHoleSwallowedIsMarked(t *testing.T) {
	p, c := newPath(t)
	says(t, c, protocolHeader)
	hears(t, c, protocolHeader)
	p.BlackHole(ToBroker)
	says(t, c, string(settle(1, basicAck, 5, 0)))
	require.Eventually(t, func() bool { return len(p.Log().Settlements()) == 1 }, soon, time.Millisecond)
	assert.True(t, p.Log().Settlements()[0].Swallowed)
}

func TestAnInjectedFrameGoesBetweenTwoFrames(t *testing.T) {
	p, c := newPath(t)
	says(t, c, protocolHeader)
	hears(t, c, protocolHeader)
	one, two, extra := string(settle(1, basicAck, 1, 0)), string(settle(1, basicAck, 2, 0)), AckFrame(1, 1, false)

	says(t, c, one)
	hears(t, c, one)
	assert.Equal(t, 1, p.Inject(ToBroker, extra))
	hears(t, c, string(extra))

	says(t, c, one[:5])
	hears(t, c, one[:5])
	assert.Equal(t, 1, p.Inject(ToBroker, extra), "held until the frame is whole")
	says(t, c, one[5:]+two)
	hears(t, c, one[5:]+string(extra)+two)
	assert.Len(t, p.Log().Settlements(), 3, "what was injected is not the client's")
}

func TestAStreamThatIsNotAMQPIsLeftAlone(t *testing.T) {
	p, c := newPath(t)
	says(t, c, "\x16\x03\x01 this is TLS, perhaps")
	hears(t, c, "\x16\x03\x01 this is TLS, perhaps")
	assert.Empty(t, p.Log().Methods())
	assert.Zero(t, p.Inject(ToBroker, AckFrame(1, 1, false)))
}

func FuzzTheParserNeverPanics(f *testing.F) {
	f.Add([]byte(protocolHeader + string(deliver(1, 1, false, "id", "body"))))
	f.Add(deliver(1, 1, false, "id", "body"))
	f.Add(settle(1, basicNack, 1, 3))
	f.Fuzz(func(_ *testing.T, data []byte) {
		for _, dir := range []Direction{ToBroker, ToClient} {
			conv := newLog().converse(1)
			p := parser{client: dir == ToBroker, frame: func(f frame) { conv.frame(dir, f, false) }}
			for i := range data {
				p.feed(data[i : i+1])
			}
		}
	})
}
