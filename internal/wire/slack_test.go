package wire

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// later lets the broker send a heartbeat after d. What the socket makes of it is done on return.
func later(t *testing.T, far interface{ Write([]byte) (int, error) }, d time.Duration) {
	t.Helper()
	time.Sleep(d)
	_, err := far.Write(heartbeatFrame)
	require.NoError(t, err)
	synctest.Wait()
}

func TestReadBufferFollowsTheTraffic(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 10_000)
		later(t, far, 0)
		in := &sub.socket.in
		require.Len(t, in.buf, idleBuffer, "new")

		later(t, far, 5*time.Second)
		deliver(t, far, 10)
		assert.Len(t, in.buf, idleBuffer, "what fits lets it as it is")

		deliver(t, far, 10_000)
		require.Equal(t, readBuffer, len(in.buf), "reads that fill it let it grow, and no further")

		later(t, far, slackAfter/2)
		assert.Len(t, in.buf, readBuffer, "the next burst may be near")
		later(t, far, slackAfter)
		assert.Len(t, in.buf, idleBuffer, "a heartbeat finds it too large")
		deliver(t, far, 10_000)
		assert.Len(t, in.buf, readBuffer, "and the next burst lets it grow again")
	})
}

func TestReadBufferStaysLargeWhileBurstsCome(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 10_000)
		deliver(t, far, 10_000)
		buffer := &sub.socket.in.buf[0]
		for range 20 {
			later(t, far, slackAfter*9/10)
			deliver(t, far, 1000)
		}
		assert.Same(t, buffer, &sub.socket.in.buf[0])
	})
}

func TestReadBufferKeepsWhatIsUnreadWhenItGrows(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 10)
		body := make([]byte, 3*idleBuffer)
		for i := range body {
			body[i] = byte(i % 251)
		}
		stream := slicesOf(deliveryOf(1, body), deliveryOf(2, body[:idleBuffer-100]), deliveryOf(3, body))
		for len(stream) > 0 { // reads end anywhere in a frame
			n := min(1000, len(stream))
			_, err := far.Write(stream[:n])
			require.NoError(t, err)
			stream = stream[n:]
		}
		for _, want := range [][]byte{body, body[:idleBuffer-100], body} {
			assert.Equal(t, want, sub.take().Body)
		}
	})
}

func TestWriteBuffersBecomeSmallOnAnIdleSocket(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, w, far := pipe(t, socketLimits)
		collect(far)
		beat := func() {
			_, err := s.Write(heartbeatFrame)
			require.NoError(t, err)
			synctest.Wait()
		}
		largest := func() int {
			s.out.mu.Lock()
			defer s.out.mu.Unlock()
			return max(cap(s.out.pending), cap(s.out.spare))
		}
		gate := make(chan struct{})
		w.gate = gate
		beat() // occupies the writer
		for range 2000 {
			_, err := s.Write(heartbeatFrame)
			require.NoError(t, err)
		}
		close(gate)
		synctest.Wait()
		require.Greater(t, largest(), 2*idleBuffer)
		time.Sleep(slackAfter / 2)
		beat()
		beat()
		assert.Greater(t, largest(), 2*idleBuffer, "the next burst may be near")
		time.Sleep(slackAfter)
		beat()
		beat()
		assert.LessOrEqual(t, largest(), idleBuffer)
	})
}
