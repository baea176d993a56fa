package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// mostInAFrame is the longest payload of a frame that is as long as agreed.
const mostInAFrame = FrameSize - frameHead - 1

// patterned is a body in which no two places look alike.
func patterned(size int) string {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i*7 + i>>8 + i>>16)
	}
	return string(b)
}

// framed cuts a body as a broker does.
func framed(body string) (parts []string) {
	for len(body) > 0 {
		n := min(len(body), mostInAFrame)
		parts = append(parts, body[:n])
		body = body[n:]
	}
	return parts
}

func TestBodyOfAnyLengthArrivesWhole(t *testing.T) {
	pieces := map[string]func(int) int{
		"in one piece": whole,
		"in segments":  func(left int) int { return min(left, 1448) },
		"as long as the buffer": func(left int) int {
			return min(left, readBuffer)
		},
		"as long as a frame": func(left int) int { return min(left, FrameSize) },
		"unevenly":           func(left int) int { return min(left, 1+left%4099) },
	}
	for _, size := range []int{
		0, 1, readBuffer - 1, readBuffer, readBuffer + 1,
		mostInAFrame - 1, mostInAFrame, mostInAFrame + 1,
		FrameSize, 2 * mostInAFrame, 2*mostInAFrame + 1, 10*FrameSize + 3,
	} {
		body := patterned(size)
		stream := slicesOf(
			messageOf(1, 1, []byte{0, 0}, framed(body)...), heartbeatFrame,
			messageOf(1, 2, []byte{0, 0}, "next"),
		)
		for name, piece := range pieces {
			t.Run(fmt.Sprint(size, " bytes ", name), func(t *testing.T) {
				inBubble(t, func(t *testing.T) { // where no time passes, and the driver is told nothing beside
					driver, deliveries, unfit, cause := sortedAll(t, stream, 0, piece)
					require.ErrorIs(t, cause, ErrPeerClosed)
					require.Empty(t, unfit)
					require.Equal(t, heartbeatFrame, driver)
					require.Len(t, deliveries, 2)
					require.True(t, body == string(deliveries[0].Body), "the body is as it was sent")
					require.Equal(t, "next", string(deliveries[1].Body))
				})
			})
		}
	}
}

// A frame is the subscription's as long as it is no longer than agreed, and the driver's, which
// refuses it, from one byte more on.
func TestFramesAreReadUpToTheLengthAgreed(t *testing.T) {
	for length, ours := range map[int]bool{FrameSize - 1: true, FrameSize: true, FrameSize + 1: false} {
		inBubble(t, func(t *testing.T) {
			message := messageOf(1, 1, []byte{0, 0}, patterned(length-frameHead-1))
			driver, deliveries, cause := sorted(t, message, 0, whole)
			assert.ErrorIs(t, cause, ErrPeerClosed, "%d bytes", length)
			if ours {
				require.Len(t, deliveries, 1, "%d bytes", length)
				assert.Len(t, deliveries[0].Body, length-frameHead-1)
				assert.Empty(t, driver)
				return
			}
			assert.Empty(t, deliveries, "%d bytes", length)
			assert.Equal(t, message[len(message)-length:], driver)
		})
	}
}

func TestHeadersAreReadUpToTheirLimitToTheByte(t *testing.T) {
	const around = headerHead + 2 + 4 + 2 + 1 + 4 + 1 // the head, flags, size, k, S, size, end
	for length, ours := range map[int]bool{
		FrameSize: true, FrameSize + 1: true,
		maxHeader - 1: true, maxHeader: true, maxHeader + 1: false, 2 * maxHeader: false,
	} {
		inBubble(t, func(t *testing.T) {
			text := patterned(length - around)
			entry := binary.BigEndian.AppendUint32([]byte{1, 'k', 'S'}, uint32(len(text)))
			message := messageOf(1, 1, headersOf(append(entry, text...)), "bo", "dy")
			for _, piece := range []func(int) int{whole, func(left int) int { return min(left, 10_007) }} {
				driver, deliveries, unfit, cause := sortedAll(t, slicesOf(message, messageOf(1, 2, []byte{0, 0}, "next")), 0, piece)
				assert.ErrorIs(t, cause, ErrPeerClosed)
				assert.Empty(t, driver)
				require.NotEmpty(t, deliveries, "%d bytes", length)
				assert.Equal(t, "next", string(deliveries[len(deliveries)-1].Body))
				if ours {
					require.Len(t, deliveries, 2)
					assert.Empty(t, unfit)
					assert.True(t, text == deliveries[0].Headers["k"])
					assert.Equal(t, "body", string(deliveries[0].Body))
					continue
				}
				require.Len(t, unfit, 1)
				assert.Equal(t, errHeaderSize, unfit[0].err)
				assert.EqualValues(t, 4, unfit[0].size)
			}
		})
	}
}

// Two messages may alternate their frames on two channels, each longer than the buffer.
func TestLongBodiesOfTwoChannelsAlternate(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		first, _, far := consumer(t, socketLimits, 1)
		second := openSubscription(first.socket, 2, 1)
		bodies := []string{patterned(3*mostInAFrame + 5), strings.ToUpper(patterned(4 * mostInAFrame))}
		streams := [][]byte{messageOf(1, 1, []byte{0, 0}, framed(bodies[0])...), messageOf(2, 1, []byte{0, 0}, framed(bodies[1])...)}
		for len(streams[0])+len(streams[1]) > 0 {
			for i, b := range streams {
				if len(b) == 0 {
					continue
				}
				n := frameHead + int(binary.BigEndian.Uint32(b[3:])) + 1
				_, err := far.Write(b[:n])
				require.NoError(t, err)
				streams[i] = b[n:]
			}
		}
		assert.True(t, bodies[0] == string(first.take().Body))
		assert.True(t, bodies[1] == string(second.take().Body))
	})
}

// full is a property list with every property, whose texts and headers are made of one letter.
func full(letter string) []byte {
	text := func(size int) []byte { return append([]byte{byte(size)}, strings.Repeat(letter, size)...) }
	long := func(typ byte) []byte {
		return append([]byte{1, letter[0], typ, 0, 0, 0, 9}, strings.Repeat(letter, 9)...)
	}
	inner := slicesOf(long('S'), []byte{1, 'x'}, long('x')[2:])
	entries := slicesOf(
		[]byte{1, 'S'}, long('S')[2:], []byte{1, 'x'}, long('x')[2:],
		binary.BigEndian.AppendUint32([]byte{1, 'F', 'F'}, uint32(len(inner))), inner,
		binary.BigEndian.AppendUint32([]byte{1, 'A', 'A'}, uint32(len(long('S')[2:])*2)), long('S')[2:], long('x')[2:],
	)
	return slicesOf(
		[]byte{0xFF, 0xFC}, text(20), text(21),
		binary.BigEndian.AppendUint32(nil, uint32(len(entries))), entries,
		[]byte{letter[0], letter[0]}, text(22), text(23), text(24), text(25),
		bytes.Repeat([]byte{0}, 7), []byte{letter[0]}, text(26), text(27), text(28), text(29),
	)
}

// What a handler has been given is its own: nothing that is read later shows in it, and what it
// writes there shows nowhere else.
func TestWhatWasReadStaysAsItWas(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 1)
		send := func(letter string, tag uint64) *amqp.Delivery {
			t.Helper()
			// A body in two frames, the second in the same read as the first.
			_, err := far.Write(messageOf(1, tag, full(letter), strings.Repeat(letter, 30), strings.Repeat(letter, 31)))
			require.NoError(t, err)
			synctest.Wait()
			return sub.take()
		}
		want := func(letter string, tag uint64) amqp.Delivery {
			text := func(size int) string { return strings.Repeat(letter, size) }
			return amqp.Delivery{
				ConsumerTag: "t", DeliveryTag: tag, Redelivered: true, Exchange: "x", RoutingKey: "key",
				ContentType: text(20), ContentEncoding: text(21),
				Headers: amqp.Table{
					"S": text(9), "x": []byte(text(9)),
					"F": amqp.Table{letter: text(9), "x": []byte(text(9))},
					"A": []any{text(9), []byte(text(9))},
				},
				DeliveryMode: letter[0], Priority: letter[0], CorrelationId: text(22), ReplyTo: text(23), Expiration: text(24),
				MessageId: text(25), Timestamp: time.Unix(int64(letter[0]), 0), Type: text(26), UserId: text(27), AppId: text(28),
				Body: []byte(text(61)),
			}
		}
		first, second, third := send("a", 1), send("b", 2), send("a", 3)
		assert.Equal(t, want("a", 1), *first)
		assert.Equal(t, want("b", 2), *second)
		assert.Equal(t, want("a", 3), *third)

		for i := range second.Body {
			second.Body[i] = '!'
		}
		copy(second.Headers["x"].([]byte), "!!!!!!!!!")
		second.Headers["F"].(amqp.Table)["b"] = "!"
		fourth := send("b", 4)
		assert.Equal(t, want("a", 1), *first)
		assert.Equal(t, want("a", 3), *third)
		assert.Equal(t, want("b", 4), *fourth)
		assert.Equal(t, strings.Repeat("!", 61), string(second.Body), "and stays written")
	})
}

// A body that is longer than the first memory for it grows, and stays apart from the buffer too.
func TestLongBodyStaysAsItWas(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 1)
		var bodies []string
		var got []*amqp.Delivery
		for i := range 4 {
			body := strings.Repeat(string(rune('a'+i)), 2*mostInAFrame+i)
			_, err := far.Write(messageOf(1, uint64(i+1), []byte{0, 0}, framed(body)...))
			require.NoError(t, err)
			synctest.Wait()
			bodies, got = append(bodies, body), append(got, sub.take())
		}
		for i, d := range got {
			assert.True(t, bodies[i] == string(d.Body), "message %d", i)
		}
	})
}

func TestOfferOfTheBrokerStaysAsItWas(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 1)
		assert.Empty(t, sub.socket.Mechanisms(), "nothing was offered yet")
		long := func(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }
		start := methodOf(0, 10, 10, slicesOf([]byte{0, 9, 0, 0, 0, 0}, long("PLAIN EXTERNAL"), long("en_US"))...)
		_, err := far.Write(start)
		require.NoError(t, err)
		_, err = far.Write(deliveryOf(1, bytes.Repeat([]byte{'!'}, 1000)))
		require.NoError(t, err)
		sub.take()
		_, err = far.Write(methodOf(0, 10, 10, slicesOf([]byte{0, 9, 0, 0, 0, 0}, long("OTHER"), long("en_US"))...))
		require.NoError(t, err)
		synctest.Wait()
		assert.Equal(t, "PLAIN EXTERNAL", sub.socket.Mechanisms(), "the first word counts")
	})
}

// A greeting is read up to 4096 bytes, however reads cut it; one above is left to the driver.
func TestOfferIsReadUpToTheLengthOfAFirstFrame(t *testing.T) {
	long := func(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }
	for length, want := range map[int]string{firstFrame - 1: "PLAIN", firstFrame: "PLAIN", firstFrame + 1: ""} {
		greeting := func(properties int) []byte { // of the server, which stand before its offer
			return methodOf(0, 10, 10, slicesOf([]byte{0, 9}, long(strings.Repeat("p", properties)), long("PLAIN"), long("en_US"))...)
		}
		start := greeting(length - len(greeting(0)))
		require.Len(t, start, length)
		for _, n := range []int{length, 1000, 7} {
			inBubble(t, func(t *testing.T) {
				sub, _, far := consumer(t, socketLimits, 1)
				for b := start; len(b) > 0; b = b[min(n, len(b)):] {
					_, err := far.Write(b[:min(n, len(b))])
					require.NoError(t, err)
				}
				synctest.Wait()
				assert.Equal(t, want, sub.socket.Mechanisms(), "%d bytes, %d at a time", length, n)
			})
		}
	}
}

func TestEveryFieldIsReadAtItsLimits(t *testing.T) {
	be := binary.BigEndian
	long := func(v uint32) []byte { return be.AppendUint32(nil, v) }
	longlong := func(v uint64) []byte { return be.AppendUint64(nil, v) }
	sized := func(b string) []byte { return append(long(uint32(len(b))), b...) }
	field := func(typ byte, value ...[]byte) []byte { return append([]byte{typ}, slicesOf(value...)...) }
	longest := strings.Repeat("k", 255)
	for name, c := range map[string]struct {
		field []byte
		want  any
	}{
		"t false": {field('t', []byte{0}), false}, "t true": {field('t', []byte{1}), true}, "t any": {field('t', []byte{0x80}), true},
		"B least": {field('B', []byte{0}), byte(0)}, "B most": {field('B', []byte{255}), byte(255)},
		"b least": {field('b', []byte{0x80}), int8(-128)}, "b most": {field('b', []byte{0x7F}), int8(127)}, "b -1": {field('b', []byte{0xFF}), int8(-1)},
		"s least": {field('s', []byte{0x80, 0}), int16(math.MinInt16)}, "s most": {field('s', []byte{0x7F, 0xFF}), int16(math.MaxInt16)},
		"u least": {field('u', []byte{0, 0}), uint16(0)}, "u most": {field('u', []byte{0xFF, 0xFF}), uint16(math.MaxUint16)},
		"I least": {field('I', long(1<<31)), int32(math.MinInt32)}, "I most": {field('I', long(1<<31-1)), int32(math.MaxInt32)},
		"i least": {field('i', long(0)), uint32(0)}, "i most": {field('i', long(math.MaxUint32)), uint32(math.MaxUint32)},
		"l least": {field('l', longlong(1<<63)), int64(math.MinInt64)}, "l most": {field('l', longlong(1<<63-1)), int64(math.MaxInt64)},
		"L least": {field('L', longlong(1<<63)), int64(math.MinInt64)}, "L most": {field('L', longlong(1<<63-1)), int64(math.MaxInt64)},
		"f most":     {field('f', long(math.Float32bits(math.MaxFloat32))), float32(math.MaxFloat32)},
		"f smallest": {field('f', long(1)), float32(math.SmallestNonzeroFloat32)},
		"f infinite": {field('f', long(math.Float32bits(float32(math.Inf(-1))))), float32(math.Inf(-1))},
		"d most":     {field('d', longlong(math.Float64bits(math.MaxFloat64))), math.MaxFloat64},
		"d smallest": {field('d', longlong(1)), math.SmallestNonzeroFloat64},
		"d infinite": {field('d', longlong(math.Float64bits(math.Inf(1)))), math.Inf(1)},
		"D least":    {field('D', []byte{0}, long(1<<31)), amqp.Decimal{Scale: 0, Value: math.MinInt32}},
		"D most":     {field('D', []byte{255}, long(1<<31-1)), amqp.Decimal{Scale: 255, Value: math.MaxInt32}},
		"S empty":    {field('S', sized("")), ""}, "S one": {field('S', sized("\x00")), "\x00"},
		"S long":  {field('S', sized(patterned(70_000))), patterned(70_000)},
		"x empty": {field('x', sized("")), []byte{}}, "x long": {field('x', sized(patterned(70_000))), []byte(patterned(70_000))},
		"T least": {field('T', longlong(0)), time.Unix(0, 0)}, "T before 1970": {field('T', longlong(math.MaxUint64)), time.Unix(-1, 0)},
		"T most":  {field('T', longlong(1<<63-1)), time.Unix(math.MaxInt64, 0)},
		"V":       {field('V'), nil},
		"A empty": {field('A', sized("")), []any(nil)}, "A one": {field('A', sized("V")), []any{nil}},
		"A nested": {
			field('A', sized(string(slicesOf(field('A', sized("V")), field('F', sized("\x01aV")), field('A', sized("")), []byte("t\x01"))))),
			[]any{[]any{nil}, amqp.Table{"a": nil}, []any(nil), true},
		},
		"F empty": {field('F', sized("")), amqp.Table{}},
		"F nested": {
			field('F', sized(string(slicesOf([]byte("\x01a"), field('F', sized("\x01bt\x01")), []byte("\x01cV"))))),
			amqp.Table{"a": amqp.Table{"b": true}, "c": nil},
		},
	} {
		for _, key := range []string{"", "k", longest} {
			// Something follows it in the table: a field reads neither more nor less than its own.
			entries := slicesOf([]byte{byte(len(key))}, []byte(key), c.field, []byte("\x05aftert\x01"))
			_, deliveries, unfit, _ := sortedAll(t, messageOf(1, 1, headersOf(entries), "body"), 0, whole)
			require.Empty(t, unfit, name)
			require.Len(t, deliveries, 1, name)
			assert.Equal(t, amqp.Table{key: c.want, "after": true}, deliveries[0].Headers, name)
		}
		// One byte less is no field any more. An array ends where a value is missing, as the driver's.
		if len(c.field) > 1 && c.field[0] != 'A' {
			entries := slicesOf([]byte{1, 'k'}, c.field[:len(c.field)-1])
			_, deliveries, unfit, _ := sortedAll(t, messageOf(1, 1, headersOf(entries), "body"), 0, whole)
			assert.Empty(t, deliveries, name)
			if assert.Len(t, unfit, 1, name) {
				assert.ErrorContains(t, unfit[0].err, "something is cut off", name)
			}
		}
	}
}

func TestSizesOfHeadersAreReadUpToTheLargestPositive(t *testing.T) {
	for size, want := range map[uint32]string{1<<31 - 1: "something is cut off", 1 << 31: "a size is negative", math.MaxUint32: "a size is negative"} {
		for _, typ := range []byte("SxAF") {
			entries := binary.BigEndian.AppendUint32([]byte{1, 'k', typ}, size)
			_, deliveries, unfit, _ := sortedAll(t, messageOf(1, 1, headersOf(entries), "body"), 0, whole)
			if typ == 'A' && size == 1<<31-1 { // it ends where a value is missing, as the driver's does
				assert.Len(t, deliveries, 1)
				continue
			}
			assert.Empty(t, deliveries)
			if assert.Len(t, unfit, 1) {
				assert.ErrorContains(t, unfit[0].err, want, "%c of %d", typ, size)
			}
		}
	}
}

// Each property alone, and at its limits, sets its own field and no other.
func TestEveryPropertyHasItsOwnField(t *testing.T) {
	longest := strings.Repeat("p", 255)
	text := func(s string) []byte { return append([]byte{byte(len(s))}, s...) }
	fields := []struct {
		bit int
		set func(d *amqp.Delivery, s string)
	}{
		{15, func(d *amqp.Delivery, s string) { d.ContentType = s }},
		{14, func(d *amqp.Delivery, s string) { d.ContentEncoding = s }},
		{10, func(d *amqp.Delivery, s string) { d.CorrelationId = s }},
		{9, func(d *amqp.Delivery, s string) { d.ReplyTo = s }},
		{8, func(d *amqp.Delivery, s string) { d.Expiration = s }},
		{7, func(d *amqp.Delivery, s string) { d.MessageId = s }},
		{5, func(d *amqp.Delivery, s string) { d.Type = s }},
		{4, func(d *amqp.Delivery, s string) { d.UserId = s }},
		{3, func(d *amqp.Delivery, s string) { d.AppId = s }},
		{2, func(*amqp.Delivery, string) {}}, // reserved: read, and kept nowhere
	}
	check := func(properties []byte, set func(*amqp.Delivery)) {
		t.Helper()
		want := amqp.Delivery{
			ConsumerTag: "t", DeliveryTag: 1, Redelivered: true, Exchange: "x", RoutingKey: "key", Body: []byte("body"),
		}
		set(&want)
		_, deliveries, unfit, _ := sortedAll(t, messageOf(1, 1, properties, "body"), 0, whole)
		require.Empty(t, unfit)
		require.Len(t, deliveries, 1)
		assert.Equal(t, want, deliveries[0])
	}
	flags := func(bit int) []byte { return binary.BigEndian.AppendUint16(nil, 1<<bit) }
	check([]byte{0, 0}, func(*amqp.Delivery) {})
	for _, f := range fields {
		for _, s := range []string{"", "p", longest} {
			check(append(flags(f.bit), text(s)...), func(d *amqp.Delivery) { f.set(d, s) })
		}
		_, deliveries, unfit, _ := sortedAll(t, messageOf(1, 1, append(flags(f.bit), 2, 'p'), "body"), 0, whole)
		assert.Empty(t, deliveries, "bit %d, cut off", f.bit)
		assert.Len(t, unfit, 1, "bit %d, cut off", f.bit)
	}
	for _, b := range []byte{0, 1, 2, 255} {
		check(append(flags(12), b), func(d *amqp.Delivery) { d.DeliveryMode = b })
		check(append(flags(11), b), func(d *amqp.Delivery) { d.Priority = b })
	}
	for _, at := range []int64{0, 1, math.MaxInt64, -1} {
		check(binary.BigEndian.AppendUint64(flags(6), uint64(at)), func(d *amqp.Delivery) { d.Timestamp = time.Unix(at, 0) })
	}
	check(append(flags(13), 0, 0, 0, 0), func(d *amqp.Delivery) { d.Headers = amqp.Table{} })
}

func TestMethodOfADeliveryIsReadAtItsLimits(t *testing.T) {
	longest := strings.Repeat("n", 255)
	for _, name := range []string{"", "n", longest} {
		for _, key := range []string{"", "k", longest} {
			for bits, redelivered := range map[byte]bool{0: false, 1: true, 0xFE: false, 0xFF: true} {
				for _, tag := range []uint64{1, 1 << 32, math.MaxUint64} {
					args := binary.BigEndian.AppendUint64([]byte{1, 't'}, tag)
					args = append(append(args, bits, byte(len(name))), name...)
					args = append(append(args, byte(len(key))), key...)
					_, deliveries, unfit, _ := sortedAll(t, slicesOf(methodOf(1, 60, 60, args...), headerOf(0)), 0, whole)
					require.Empty(t, unfit)
					require.Len(t, deliveries, 1)
					d := deliveries[0]
					assert.Equal(t, []any{tag, redelivered, name, key}, []any{d.DeliveryTag, d.Redelivered, d.Exchange, d.RoutingKey})
				}
			}
		}
	}
}

// What may differ from message to message differs, though texts are kept between them.
func TestTextsOfAMessageAreItsOwnThoughTheyAreKept(t *testing.T) {
	var stream []byte
	names := []string{"a", "b", "", "b", "ab", "a", "a"}
	for i, name := range names {
		args := binary.BigEndian.AppendUint64([]byte{1, 't'}, uint64(i+1))
		text := append([]byte{byte(len(name))}, name...)
		stream = append(stream, methodOf(1, 60, 60, slicesOf(args, []byte{0}, text, text)...)...)
		properties := slicesOf([]byte{0xC2, 0x38}, text, text, text, text, text, text) // type, encoding, reply-to, type, user, app
		header := binary.BigEndian.AppendUint64([]byte{0, 60, 0, 0}, 0)
		stream = append(stream, frameOf(frameHeader, 1, append(header, properties...)...)...)
	}
	_, deliveries, unfit, _ := sortedAll(t, stream, 0, whole)
	require.Empty(t, unfit)
	require.Len(t, deliveries, len(names))
	for i, d := range deliveries {
		got := []string{d.Exchange, d.RoutingKey, d.ContentType, d.ContentEncoding, d.ReplyTo, d.Type, d.UserId, d.AppId}
		for _, text := range got {
			assert.Equal(t, names[i], text, "message %d", i)
		}
	}
}

// Names of any length are read from the driver's basic.consume.
func TestSubscriptionOpensWhateverItsNames(t *testing.T) {
	for _, queue := range []string{"", "q", strings.Repeat("q", 255)} {
		for _, tag := range []string{"t", strings.Repeat("t", 255)} {
			onSocket(t, func(s *Socket, written func() []byte) {
				sub := s.Subscribe(tag, 1, &kept{})
				payload := append(append([]byte{0, 0, byte(len(queue))}, queue...), byte(len(tag)))
				consume := methodFrame(7, basicConsume, append(append(payload, tag...), 0, 0, 0, 0, 0)...)
				_, err := s.Write(consume)
				require.NoError(t, err)
				require.NoError(t, sub.Ack(math.MaxUint64))
				require.NoError(t, sub.Reject(1, true))
				require.NoError(t, sub.Reject(2, false))
				require.NoError(t, sub.Requeue(3))
				most := bytes.Repeat([]byte{0xFF}, 8)
				assert.Equal(t, slicesOf(
					consume,
					methodFrame(7, basicAck, append(most, 0)...),
					methodFrame(7, basicReject, 0, 0, 0, 0, 0, 0, 0, 1, 1),
					methodFrame(7, basicReject, 0, 0, 0, 0, 0, 0, 0, 2, 0),
					methodFrame(7, basicNack, 0, 0, 0, 0, 0, 0, 0, 3, 2),
				), written())
			})
		}
	}
}

// Wherever two writes of the driver cut a frame, a settlement comes before or behind it.
func TestSettlementKeepsOutOfAFrameWhereverItIsCut(t *testing.T) {
	for name, frame := range map[string][]byte{
		"method":    methodOf(0, 10, 70, 1, 2, 3, 4, 5),
		"header":    headerOf(5),
		"body":      frameOf(frameBody, 3, 1, 2, 3, 4, 5),
		"no body":   frameOf(frameBody, 3),
		"heartbeat": heartbeatFrame,
	} {
		for cut := 1; cut < len(frame); cut++ {
			inBubble(t, func(t *testing.T) {
				s, _, far := pipe(t, socketLimits)
				arrived := collect(far)
				sub := openSubscription(s, 1, 1)
				_, err := s.Write(frame[:cut])
				require.NoError(t, err)
				settled := make(chan error, 1)
				go func() { settled <- sub.Ack(7) }()
				time.Sleep(time.Second)
				require.Empty(t, settled, "%s: it waits", name)
				_, err = s.Write(frame[cut:])
				require.NoError(t, err)
				synctest.Wait()
				require.Len(t, settled, 1, "%s: and is woken", name)
				require.NoError(t, <-settled)
				require.Equal(t, slicesOf(frame, ackOf(7)), arrived.bytes(), "%s cut at %d", name, cut)
			})
		}
	}
}
