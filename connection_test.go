package steadymq

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The driver tells of the broker's connection.close before its close-ok is on the
// wire, and holds its mutex until then. Whoever closed the socket at once would
// lose the close-ok, and whoever waited for the mutex would stand still with the
// time of this test.
func TestBrokersCloseIsAnsweredHoweverSlowlyItReads(t *testing.T) {
	still := time.AfterFunc(20*time.Second, func() { panic("time stands still: a goroutine waits for the driver's mutex") })
	defer still.Stop()
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		c := defaults("amqp://guest:guest@mq.example/", "q")
		c.dial = func(context.Context, string, string) (net.Conn, error) { return near, nil }
		e, err := parseEndpoint(c.urls[0])
		require.NoError(t, err)
		played := make(chan error, 1)
		go func() { played <- broker(far) }()
		conn, err := openConnection(t.Context(), c, e, newStep("dial"), func() {})
		require.NoError(t, err)
		require.NoError(t, <-played)

		_, err = far.Write(methodOf(0, 10, 50, 1, 0x40, 3, 'b', 'y', 'e', 0, 0, 0, 0))
		require.NoError(t, err)
		time.Sleep(time.Second)
		said, err := io.ReadAll(far)
		require.NoError(t, err)
		<-conn.gone

		assert.Equal(t, methodOf(0, 10, 51), said)
		assert.ErrorContains(t, conn.end.cause(), "bye")
	})
}

// The frames of AMQP 0-9-1 are put together here, and read, by other code than the library's.

func frameOf(typ byte, channel uint16, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{typ}, channel)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(append(b, payload...), 0xCE)
}

func methodOf(channel, class, method uint16, args ...byte) []byte {
	id := binary.BigEndian.AppendUint16(nil, class)
	id = binary.BigEndian.AppendUint16(id, method)
	return frameOf(1, channel, append(id, args...)...)
}

func deliveryOf(tag uint64, body []byte) []byte {
	args := binary.BigEndian.AppendUint64([]byte{1, 't'}, tag)
	b := methodOf(1, 60, 60, append(args, 0, 0, 1, 'q')...)
	b = append(b, frameOf(2, 1, append(binary.BigEndian.AppendUint64([]byte{0, 60, 0, 0}, uint64(len(body))), 0, 0)...)...)
	if len(body) > 0 {
		b = append(b, frameOf(3, 1, body...)...)
	}
	return b
}

// broker plays the broker's half of the driver's handshake on far, answers
// what a consumer asks, and hands over the stream then.
func broker(far net.Conn) error {
	if _, err := io.ReadFull(far, make([]byte, 8)); err != nil {
		return err
	}
	long := func(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }
	start := append([]byte{0, 9, 0, 0, 0, 0}, append(long("PLAIN"), long("en_US")...)...)
	if _, err := far.Write(methodOf(0, 10, 10, start...)); err != nil {
		return err
	}
	replies := map[uint32][]byte{
		10<<16 | 11: methodOf(0, 10, 30, 0x07, 0xff, 0, 2, 0, 0, 0, 60),
		10<<16 | 40: methodOf(0, 10, 41, 0),
		20<<16 | 10: methodOf(1, 20, 11, 0, 0, 0, 0),
	}
	for {
		id, err := readMethod(far)
		if err != nil {
			return err
		}
		if _, err := far.Write(replies[id]); err != nil {
			return err
		}
		if id == 10<<16|40 {
			return nil
		}
	}
}

// readMethod returns the class and method of the next frame, 0 of a heartbeat.
func readMethod(r io.Reader) (uint32, error) {
	head := make([]byte, 7)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, err
	}
	payload := make([]byte, binary.BigEndian.Uint32(head[3:])+1)
	if _, err := io.ReadFull(r, payload); err != nil || head[0] != 1 {
		return 0, err
	}
	return binary.BigEndian.Uint32(payload), nil
}
