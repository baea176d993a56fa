package wire

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// headersOf is a property list of nothing but a table with the entries.
func headersOf(entries []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0x20, 0}, uint32(len(entries))), entries...)
}

func nested(depth int) []byte {
	b := make([]byte, 0, 5*depth)
	for inside := 5 * (depth - 1); inside >= 0; inside -= 5 {
		b = binary.BigEndian.AppendUint32(append(b, 'A'), uint32(inside))
	}
	return append([]byte{1, 'k'}, b...)
}

// The driver has limits that RabbitMQ has not.
func TestHeadersThatTheDriverRefusesAreRead(t *testing.T) {
	array := func(entries int) []byte {
		return append(binary.BigEndian.AppendUint32([]byte{1, 'k', 'A'}, uint32(entries)), bytes.Repeat([]byte{'V'}, entries)...)
	}
	table := func(entries int) []byte {
		var b []byte
		for i := range entries {
			b = append(b, 3, byte(i), byte(i>>8), byte(i>>16), 'V')
		}
		return b
	}
	for name, test := range map[string]struct{ most, more, tooMuch []byte }{
		"nesting": {nested(32), nested(maxDepth), nested(maxDepth + 1)},
		"array":   {array(8192), array(maxHeader - 100), nil},
		"table":   {table(8192), table((maxHeader - 100) / 5), nil},
	} {
		t.Run(name, func(t *testing.T) {
			for i, entries := range [][]byte{test.most, test.more, test.tooMuch} {
				if entries == nil {
					continue
				}
				message := messageOf(1, 1, headersOf(entries))
				_, ours, unfit, cause := sortedAll(t, message, 0, whole)
				assert.ErrorIs(t, cause, ErrPeerClosed)
				assert.Equal(t, i < 2, len(ours) == 1)
				assert.Equal(t, i == 2, len(unfit) == 1)
				_, ok := driverReads(t, message)
				assert.Equal(t, i == 0, ok, "the driver")
			}
		})
	}
}

// Whoever goes over the headers later must not run out of stack either, which no recover could
// stop.
func TestDeepestHeadersAndTheirReaderNeedLittleStack(t *testing.T) {
	done := make(chan struct{})
	go func() { // a stack of its own
		defer close(done)
		d := decoder{b: headersOf(nested(maxDepth))[2:]}
		table := d.table(0)
		require.NoError(t, d.err)
		depth := 0
		for v, ok := table["k"].([]any); ok; depth++ {
			if len(v) == 0 {
				depth++
				break
			}
			v, ok = v[0].([]any)
		}
		assert.Equal(t, maxDepth, depth)
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		assert.Less(t, m.StackInuse, uint64(64<<20))
	}()
	<-done
}

func TestWhatCannotBeReadIsSkippedWhereverReadsCutIt(t *testing.T) {
	good := messageOf(1, 1, []byte{0, 0}, "good")
	method := len(methodOf(1, 60, 60, make([]byte, 17)...))
	garbledKey := bytes.Clone(messageOf(1, 2, []byte{0, 0}, "bo", "dy")) // the tag can be read, the routing key not
	garbledKey[method-5] = 200
	for name, test := range map[string]struct {
		bad    []byte
		reason string
	}{
		"properties cut off":       {messageOf(1, 2, []byte{0x80, 0, 9, 'a'}, "bo", "dy"), "its headers cannot be read: something is cut off"},
		"no flags":                 {messageOf(1, 2, nil, "bo", "dy"), "its headers cannot be read: something is cut off"},
		"an unknown kind of field": {messageOf(1, 2, headersOf([]byte{1, 'k', '\n'}), "bo", "dy"), `its headers cannot be read: a field is of the unknown type '\n'`},
		"headers over 1 MiB":       {messageOf(1, 2, headersOf(make([]byte, maxHeader)), "bo", "dy"), "its headers are larger than 1048576 bytes"},
		"a routing key cut off":    {garbledKey, "its exchange and routing key cannot be read: something is cut off"},
		"a large body":             {messageOf(1, 2, []byte{0, 0}, strings.Repeat("x", 5), strings.Repeat("x", 6)), errTooLarge.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) { // a slow machine makes the driver hear of deliveries beside
				stream := slicesOf(good, test.bad, heartbeatFrame, good)
				for _, piece := range []func(int) int{whole, func(left int) int { return min(left, 1+left/7) }, func(left int) int {
					if left < 200 {
						return 1
					}
					return min(left, 30_000)
				}} {
					driver, deliveries, unfit, cause := sortedAll(t, stream, 10, piece)
					assert.ErrorIs(t, cause, ErrPeerClosed, "nothing in a message ends the socket")
					assert.Equal(t, heartbeatFrame, driver)
					require.Len(t, deliveries, 2)
					assert.Equal(t, "good", string(deliveries[1].Body))
					require.Len(t, unfit, 1)
					assert.EqualValues(t, 2, unfit[0].delivery.DeliveryTag)
					assert.Equal(t, "x", unfit[0].delivery.Exchange)
					assert.True(t, unfit[0].delivery.Redelivered)
					assert.EqualError(t, unfit[0].err, test.reason)
					assert.NotZero(t, unfit[0].size)
				}
			})
		})
	}
}

func TestSkippedMessageStillHasToBeFrames(t *testing.T) {
	for name, stream := range map[string][]byte{
		"no end of a body":           append(messageOf(1, 1, []byte{0, 0}, "0123456789a")[:len(messageOf(1, 1, []byte{0, 0}, "0123456789a"))-1], 0),
		"no end of a large header":   append(messageOf(1, 1, headersOf(make([]byte, maxHeader)))[:len(messageOf(1, 1, headersOf(make([]byte, maxHeader))))-1], 0),
		"a body longer than it said": bytes.Replace(messageOf(1, 1, []byte{0, 0}, "0123456789ab"), []byte{0, 0, 0, 0, 0, 0, 0, 12}, []byte{0, 0, 0, 0, 0, 0, 0, 11}, 1),
	} {
		t.Run(name, func(t *testing.T) {
			_, deliveries, unfit, cause := sortedAll(t, stream, 10, whole)
			assert.ErrorIs(t, cause, errGarbled)
			assert.Empty(t, deliveries)
			assert.Empty(t, unfit)
		})
	}
}

func TestHeadersTakeMemoryAsTheyCome(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 1)
		message := messageOf(1, 1, headersOf(append([]byte{1, 'k', 'S', 0, 0x0E, 0, 0}, make([]byte, 0x0E0000)...)))
		_, err := far.Write(message[:100])
		require.NoError(t, err)
		synctest.Wait()
		assert.Len(t, sub.socket.in.buf, idleBuffer, "what is announced is not believed")
		_, err = far.Write(message[100:])
		require.NoError(t, err)
		_, err = far.Write(heartbeatFrame)
		require.NoError(t, err)
		d := sub.take()
		assert.Len(t, d.Headers["k"], 0x0E0000)
		synctest.Wait()
		assert.Len(t, sub.socket.in.buf, readBuffer, "and given back")
	})
}

func TestSkippedBodyTakesNoMemory(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		o := socketLimits
		o.Refuse = atMost(1000)
		sub, _, far := consumer(t, o, 1)
		part := strings.Repeat("x", 100_000)
		_, err := far.Write(messageOf(1, 1, []byte{0, 0}, part, part, part)[:250_000])
		require.NoError(t, err)
		synctest.Wait()
		assert.Nil(t, sub.message.Body)
		assert.Len(t, sub.socket.in.buf, readBuffer)
	})
}

// The broker may have sent so much behind the garbage that a plain close would be a reset, which
// takes along what we have written.
func TestGarbageEndsTheSocketWithinTheGrace(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 100)
		deliver(t, far, 2)
		began := time.Now()
		_, err := far.Write(frameOf(frameMethod, 1, 0, 60, 0, 60, 1, 't')) // a peer that reads nothing
		require.NoError(t, err)
		synctest.Wait()
		assert.ErrorIs(t, sub.settle(basicAck, 1, 0), errGarbled, "nothing more goes out")
		<-sub.socket.Done()
		assert.LessOrEqual(t, time.Since(began), drainGrace)
		assert.ErrorIs(t, sub.socket.Cause(), errGarbled)
	})
}

// A basic.deliver that is cut off in its exchange is refused before the size is known.
func TestSizeOfAnUnreadableMessageIsItsOwn(t *testing.T) {
	deliver := methodOf(1, 60, 60, append([]byte{1, 't'}, 0, 0, 0, 0, 0, 0, 0, 2, 1, 200, 'x')...)
	header := frameOf(frameHeader, 1, 0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0)
	stream := messageOf(1, 1, []byte{0, 0}, strings.Repeat("x", 1000)) // the one before
	for _, frame := range [][]byte{deliver, header, frameOf(frameBody, 1, 'a', 'b', 'c')} {
		stream = append(stream, frame...)
	}
	_, _, unfit, _ := sortedAll(t, stream, 0, func(left int) int { return left })
	require.Len(t, unfit, 1)
	assert.EqualValues(t, 3, unfit[0].size)
}
