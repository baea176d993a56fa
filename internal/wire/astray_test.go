package wire

import (
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Acks go between the driver's frames. Where those cannot be followed any more there is no place
// for acks, so the session must end, not go on without them.
func TestDriverWhoseFramesCannotBeFollowedEndsTheSocket(t *testing.T) {
	for name, written := range map[string][]byte{
		"no frame":                 []byte("GET / HTTP/1.1\r\n\r\n"),
		"no end where it should":   append(heartbeatFrame[:7:7], 0),
		"a method without a class": frameOf(frameMethod, 1, 0, 60),
		"behind a good frame":      slicesOf(heartbeatFrame, []byte{9, 9, 9, 9, 9, 9, 9, 9}),
	} {
		t.Run(name, func(t *testing.T) {
			for cut := range written {
				inBubble(t, func(t *testing.T) {
					sub, _, far := consumer(t, socketLimits, 10)
					collect(far)
					deliver(t, far, 1)
					var err error
					for _, part := range [][]byte{written[:cut], written[cut:], heartbeatFrame, heartbeatFrame} {
						if err == nil {
							_, err = sub.socket.Write(part)
						}
					}
					require.ErrorIs(t, err, errAstray)
					<-sub.socket.Done()
					assert.ErrorIs(t, sub.socket.Cause(), errAstray)
					assert.ErrorIs(t, sub.settle(basicAck, 1, 0), errAstray)
				})
			}
		})
	}
}

// The driver, or TLS, may set one as often as it likes.
func TestDeadlineOfTheDriverLengthensNoWriteUnderWay(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, _ := pipe(t, socketLimits) // its peer takes nothing
		began := time.Now()
		_, err := s.Write(heartbeatFrame)
		require.NoError(t, err)
		for range 20 {
			time.Sleep(time.Second)
			synctest.Wait()
			if s.end.closed.Load() {
				break
			}
			require.NoError(t, s.SetWriteDeadline(time.Now().Add(time.Hour)))
		}
		<-s.Done()
		assert.ErrorIs(t, s.Cause(), ErrWriteTimeout)
		assert.Equal(t, 10*time.Second, time.Since(began))
	})
}

func TestNoDeadlineOfTheDriverLeavesTheWriteTimeout(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, _ := pipe(t, socketLimits)
		began := time.Now()
		_, err := s.Write(heartbeatFrame)
		require.NoError(t, err)
		time.Sleep(time.Second)
		require.NoError(t, s.SetWriteDeadline(time.Time{}))
		<-s.Done()
		assert.Equal(t, 10*time.Second, time.Since(began))
	})
}

func TestEarlierDeadlineCounts(t *testing.T) {
	soon, late, none := time.Unix(1, 0), time.Unix(2, 0), time.Time{}
	for _, c := range []struct{ a, b, want time.Time }{
		{soon, late, soon}, {late, soon, soon}, {none, soon, soon}, {soon, none, soon}, {none, none, none},
	} {
		assert.Equal(t, c.want, earlier(c.a, c.b))
	}
}

// A peer that takes a little at a time never misses the deadline of one write.
func TestCloseToASlowReaderIsBounded(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		o := socketLimits
		o.IdleTimeout = 0
		s, _, far := pipe(t, o)
		_, err := s.Write(frameOf(frameBody, 1, make([]byte, maxPending/2)...))
		require.NoError(t, err)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				if _, err := io.CopyN(io.Discard, far, writeChunk); err != nil {
					return
				}
				time.Sleep(6 * time.Second)
			}
		}()
		time.Sleep(time.Second)
		began := time.Now()
		err = s.Close()
		assert.Equal(t, socketLimits.WriteTimeout, time.Since(began))
		require.ErrorIs(t, err, ErrWriteTimeout)
		assert.ErrorContains(t, err, "closed with data unsent")
		<-done
	})
}

// Acks are given a moment where the broker's frames make no sense, and no more.
func TestSocketDismissedUnderAFullPipeEndsWithinTheGrace(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 1) // its peer takes nothing
		deliver(t, far, 1)
		require.NoError(t, sub.settle(basicAck, 1, 0))
		began := time.Now()
		bad := deliveryOf(2, []byte("body"))
		bad[len(bad)-1] = 0
		_, err := far.Write(bad)
		require.NoError(t, err)
		<-sub.socket.Done()
		assert.ErrorIs(t, sub.socket.Cause(), errGarbled)
		assert.Equal(t, drainGrace, time.Since(began))
	})
}

func TestCutPathIsToldWhereverItIsNoticed(t *testing.T) {
	for err, want := range map[error]error{
		syscall.ETIMEDOUT: ErrUnconfirmed, syscall.ECONNRESET: ErrPeerReset, syscall.EPIPE: ErrPeerReset, os.ErrDeadlineExceeded: ErrWriteTimeout,
	} {
		assert.ErrorIs(t, writeCause(&net.OpError{Op: "write", Err: err}, socketLimits.WriteTimeout), want)
	}
}
