package wire

import (
	"encoding/binary"
	"net"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The driver writes a frame of more than 4 KiB, such as a renewed token, in several parts: no
// settlement may come between these.
func TestSubscriptionKeepsOutOfALongFrame(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		arrived := collect(far)
		consume := methodOf(1, 60, 20, 0, 0, 1, 'q', 1, 't', 0, 0, 0, 0, 0)
		long := methodOf(0, 10, 70, make([]byte, 6000)...)
		sub := s.Subscribe("t", 1, &kept{})
		_, err := s.Write(consume)
		require.NoError(t, err)
		_, err = s.Write(long[:4096])
		require.NoError(t, err)
		settled := make(chan error, 1)
		go func() { settled <- sub.settle(basicAck, 7, 0) }()
		synctest.Wait()
		assert.Empty(t, settled, "it waits for the rest of the frame")
		closing := methodOf(1, 20, 40, 0, 200, 0, 0, 0, 0, 0)
		_, err = s.Write(slicesOf(long[4096:], closing))
		require.NoError(t, err)
		assert.ErrorIs(t, <-settled, net.ErrClosed, "and is no ack behind the close of its channel")
		synctest.Wait()
		assert.Equal(t, slicesOf(consume, long, closing), arrived.bytes())
	})
}

// Several frames may share a write of the driver: a subscription ends with any of them.
func TestSubscriptionEndsWithACloseThatSharesAWrite(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		collect(far)
		sub := openSubscription(s, 1, 1)
		_, err := s.Write(slicesOf(frameOf(frameBody, 2, 1, 2, 3), methodOf(1, 20, 40, 0, 200, 0, 0, 0, 0, 0)))
		require.NoError(t, err)
		assert.ErrorIs(t, sub.settle(basicAck, 7, 0), net.ErrClosed)
	})
}

func TestSubscriptionIsClosedForGoodWithItsChannel(t *testing.T) {
	ends := map[string][]byte{
		"channel.close":       methodFrame(1, channelClose),
		"channel.close-ok":    methodFrame(1, channelCloseOk),
		"connection.close":    methodFrame(0, connectionClose),
		"connection.close-ok": methodFrame(0, connectionCloseOk),
		"channel.open":        methodFrame(1, channelOpen, 0),
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			onSocket(t, func(s *Socket, written func() []byte) {
				write := func(p []byte) {
					_, err := s.Write(p)
					require.NoError(t, err)
				}
				write(methodFrame(1, channelOpen, 0))
				first := s.Subscribe("first", 1, &kept{})
				require.ErrorIs(t, first.settle(basicAck, 1, 0), net.ErrClosed, "it opens with its basic.consume")
				write(consumeFrame(1, "first"))
				require.NoError(t, first.settle(basicAck, 1, 0))
				write(end)
				require.ErrorIs(t, first.settle(basicAck, 2, 0), net.ErrClosed)
				write(methodFrame(1, channelOpen, 0))
				second := s.Subscribe("second", 1, &kept{})
				write(consumeFrame(1, "second"))
				require.ErrorIs(t, first.settle(basicAck, 3, 0), net.ErrClosed, "its number is used again, it is not")
				require.NoError(t, second.settle(basicReject, 1, rejectRequeue))
				var settled []byte
				for p := written(); len(p) > 0; {
					n := frameHead + int(binary.BigEndian.Uint32(p[3:])) + 1
					if id := methodID(p[:n]); id == basicAck || id == basicReject {
						settled = append(settled, p[methodHead+7])
					}
					p = p[n:]
				}
				assert.Equal(t, []byte{1, 1}, settled, "tag 1 of each, and nothing else")
			})
		})
	}
}

func TestSubscriptionIsUsedAfterTheDriverCutAFrame(t *testing.T) {
	onSocket(t, func(s *Socket, written func() []byte) {
		long := methodFrame(1, channelOpen, make([]byte, 5000)...)
		_, err := s.Write(long[:4096])
		require.NoError(t, err)
		_, err = s.Write(long[4096:])
		require.NoError(t, err)
		sub := s.Subscribe("tag", 1, &kept{})
		_, err = s.Write(consumeFrame(1, "tag"))
		require.NoError(t, err)
		assert.NoError(t, sub.settle(basicAck, 1, 0), "the frame is complete")
		written()
	})
}

func TestSubscriptionWritesTheFramesTheDriverWrites(t *testing.T) {
	onSocket(t, func(s *Socket, written func() []byte) {
		before := consumeFrame(7, "tag")
		sub := s.Subscribe("tag", 1, &kept{})
		_, err := s.Write(before)
		require.NoError(t, err)
		require.NoError(t, sub.settle(basicAck, 0x0102, 0))
		require.NoError(t, sub.settle(basicNack, 3, nackRequeue))
		want := append(methodFrame(7, basicAck, 0, 0, 0, 0, 0, 0, 1, 2, 0), methodFrame(7, basicNack, 0, 0, 0, 0, 0, 0, 0, 3, 2)...)
		assert.Equal(t, want, written()[len(before):])
	})
}
