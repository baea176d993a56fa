package wire

import (
	"encoding/binary"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// methodFrame is a frame as the driver writes it.
func methodFrame(channel uint16, id uint32, payload ...byte) []byte {
	p := binary.BigEndian.AppendUint16([]byte{frameMethod}, channel)
	p = binary.BigEndian.AppendUint32(p, uint32(4+len(payload)))
	p = binary.BigEndian.AppendUint32(p, id)
	return append(append(p, payload...), frameEnd)
}

func consumeFrame(channel uint16, tag string) []byte {
	payload := append([]byte{0, 0, 1, 'q', byte(len(tag))}, tag...)
	return methodFrame(channel, basicConsume, append(payload, 0, 0, 0, 0, 0)...)
}

// onSocket runs test with a socket whose peer keeps what it reads.
func onSocket(t *testing.T, test func(s *Socket, written func() []byte)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		s := NewSocket(ours, Options{WriteTimeout: time.Second})
		got := make(chan []byte, 1)
		go func() {
			all, _ := io.ReadAll(theirs)
			got <- all
		}()
		test(s, func() []byte {
			_ = s.Close()
			s.Wait()
			return <-got
		})
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
