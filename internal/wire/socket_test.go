package wire

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPeerThatDiesRightAfterOpenIsNoticed(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		conn := open(t, s, far)
		collect(far) // reads, and never says a word again
		synctest.Wait()
		// The driver clears its deadline after open-ok, and arms it with the next frame only, if
		// its heartbeater did not come late by chance.
		require.NoError(t, s.SetReadDeadline(time.Time{}))
		began := time.Now()

		_, err := conn.Channel()

		require.Error(t, err)
		assert.Equal(t, 20*time.Second, time.Since(began))
		assert.ErrorIs(t, s.Cause(), ErrWatchdog)
		assert.ErrorContains(t, s.Cause(), "20s")
	})
}

func TestParkedReaderIsNoticed(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		conn := open(t, s, far)
		collect(far)
		began := time.Now()
		go func() { // a stray reply, and heartbeats as if nothing had happened
			_, _ = far.Write(methodOf(0, 10, 41, 0))
			beat(s, far)
		}()

		<-s.Done()

		assert.Equal(t, 20*time.Second, time.Since(began))
		assert.ErrorIs(t, s.Cause(), ErrWatchdog)
		_ = conn.Close()
		assert.LessOrEqual(t, time.Since(began), 25*time.Second)
		s.Wait()
	})
}

// The driver forgets a channel whose open is answered with something else, without closing it, so
// its reader could wait for ever for somebody to take the answer that comes next.
func TestAnswerOnAChannelThatIsNotOpenEndsTheSocket(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		conn := open(t, s, far)
		claim, err := s.ClaimChannel(t.Context())
		require.NoError(t, err)
		defer claim.Release()
		began := time.Now()
		go func() {
			_, _ = far.Read(make([]byte, 64))                                                 // channel.open
			_, _ = far.Write(append(methodOf(1, 60, 11), methodOf(1, 20, 11, 0, 0, 0, 0)...)) // qos-ok, open-ok
			_, _ = io.Copy(io.Discard, far)
		}()

		_, err = conn.Channel()

		require.Error(t, err)
		assert.Less(t, time.Since(began), time.Second)
		assert.ErrorContains(t, s.Cause(), "a channel that is not open yet")
		s.Wait()
	})
}

// After a stray reply to its close the driver uses the number again, before the broker has confirmed
// the close. It would take that for the answer to its open.
func TestNumberOfAChannelWaitsForTheCloseOkBehindAStrayReply(t *testing.T) { // seed 6808
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		conn := openWith(t, s, far, 1)
		openOk := methodOf(1, 20, 11, 0, 0, 0, 0)
		go func() {
			frame := make([]byte, 64)
			_, _ = far.Read(frame) // channel.open
			_, _ = far.Write(openOk)
			_, _ = far.Read(frame)                // channel.close
			_, _ = far.Write(methodOf(1, 60, 11)) // qos-ok
			time.Sleep(time.Second)
			_, _ = far.Write(methodOf(1, 20, 41)) // close-ok
			_, _ = far.Read(frame)                // channel.open
			_, _ = far.Write(openOk)
			_, _ = io.Copy(io.Discard, far)
		}()
		began := time.Now()
		claim, err := s.ClaimChannel(t.Context())
		require.NoError(t, err)
		channel, err := conn.Channel()
		require.NoError(t, err)
		claim.Release()
		require.Error(t, channel.Close())
		claim, err = s.ClaimChannel(t.Context())
		require.NoError(t, err)
		_, err = conn.Channel()
		require.NoError(t, err)
		claim.Release()

		assert.Equal(t, time.Second, time.Since(began))
		require.NoError(t, s.Cause())
		s.Kill(io.EOF)
		s.Wait()
	})
}

func TestWatchdogIsFedByWhatTheDriverReads(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		go func() { _, _ = io.Copy(io.Discard, s) }()
		for range 100 {
			time.Sleep(19 * time.Second)
			_, err := far.Write(heartbeatFrame)
			require.NoError(t, err)
		}
		require.NoError(t, s.Cause())
		began := time.Now()
		<-s.Done()
		assert.Equal(t, 20*time.Second, time.Since(began))
	})
}

func TestSocketThatHasEndedIsNotWatched(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, _ := pipe(t, socketLimits)
		s.Kill(nil)
		assert.False(t, s.dogTimer.Stop(), "a timer would keep the socket in memory")
		s.WatchPeer() // the end may come before it
		assert.False(t, s.dogTimer.Stop())
	})
}

func TestWatchdogForgivesAMachineThatStoodStill(t *testing.T) {
	dog := watchdog{idle: 20 * time.Second, due: 20 * time.Second}
	assert.False(t, dog.expired(20*time.Second, 7*time.Second), "fed meanwhile")
	assert.Equal(t, 27*time.Second, dog.due)
	assert.False(t, dog.expired(300*time.Second, 7*time.Second), "timer far too late")
	assert.Equal(t, 310*time.Second, dog.due, "half an interval more")
	assert.True(t, dog.expired(310*time.Second, 7*time.Second), "still nothing")

	dog = watchdog{idle: 20 * time.Second, due: 20 * time.Second}
	assert.True(t, dog.expired(21*time.Second, 0), "a timer a little late is not forgiven")
}

func TestBlackHole(t *testing.T) {
	for name, hole := range map[string]struct {
		hears, speaks bool // the peer
		after         time.Duration
		cause         error
	}{
		"both ways":       {after: 15 * time.Second, cause: ErrWriteTimeout},
		"to the broker":   {speaks: true, after: 15 * time.Second, cause: ErrWriteTimeout},
		"from the broker": {hears: true, after: 20 * time.Second, cause: ErrWatchdog},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				s, _, far := pipe(t, socketLimits)
				if hole.hears {
					collect(far)
				}
				go beat(s, s)
				if hole.speaks {
					go beat(s, far)
				}
				go func() { _, _ = io.Copy(io.Discard, s) }()
				began := time.Now()

				<-s.Done()

				assert.Equal(t, hole.after, time.Since(began))
				assert.ErrorIs(t, s.Cause(), hole.cause)
			})
		})
	}
}

func TestCloseFlushesWhatIsHeld(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, w, far := consumer(t, socketLimits, 100)
		s := sub.socket
		arrived := collect(far)
		deliver(t, far, 100)
		var want []byte
		for tag := range uint64(20) {
			want = append(want, ackOf(tag+1)...)
			require.NoError(t, sub.settle(basicAck, tag+1, 0))
		}
		require.NoError(t, s.Close())
		<-arrived.ended
		assert.Equal(t, want, arrived.bytes())
		assert.NoError(t, s.Cause())
		assert.False(t, w.linger, "a plain close is no reset")
		_, err := s.Read(make([]byte, 1))
		assert.ErrorIs(t, err, net.ErrClosed)
		_, err = s.Write(heartbeatFrame)
		assert.ErrorIs(t, err, net.ErrClosed)
		require.NoError(t, s.Close(), "again")
		s.Wait()
	})
}

func TestFirstCauseWins(t *testing.T) {
	first, second := errors.New("first"), errors.New("second")
	t.Run("kill after kill", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			s, _, _ := pipe(t, socketLimits)
			s.Kill(first)
			s.Kill(second)
			assert.Equal(t, first, s.Cause())
		})
	})
	t.Run("end of file after kill", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			s, _, far := pipe(t, socketLimits)
			s.Kill(first)
			_ = far.Close()
			_, err := s.Read(make([]byte, 1))
			assert.Equal(t, first, err, "the driver is told the cause too")
			assert.Equal(t, first, s.Cause())
		})
	})
	t.Run("kill after end of file", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			s, _, far := pipe(t, socketLimits)
			_ = far.Close()
			_, err := s.Read(make([]byte, 1))
			assert.ErrorIs(t, err, io.EOF)
			s.Kill(second)
			assert.ErrorIs(t, s.Cause(), ErrPeerClosed)
			assert.ErrorContains(t, s.Cause(), "the peer closed the connection")
		})
	})
	t.Run("kill after a plain close", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			s, _, _ := pipe(t, socketLimits)
			require.NoError(t, s.Close())
			s.Kill(second)
			assert.NoError(t, s.Cause())
		})
	})
	t.Run("the driver's read deadline", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			s, _, _ := pipe(t, socketLimits)
			require.NoError(t, s.SetReadDeadline(time.Now().Add(15*time.Second)))
			began := time.Now()
			_, err := s.Read(make([]byte, 1))
			assert.ErrorIs(t, err, ErrReadTimeout)
			assert.Equal(t, 15*time.Second, time.Since(began))
		})
	})
	t.Run("the driver's write deadline", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			s, _, _ := pipe(t, socketLimits)
			require.NoError(t, s.SetDeadline(time.Now().Add(2*time.Second)))
			_, err := s.Write(heartbeatFrame)
			require.NoError(t, err)
			began := time.Now()
			<-s.Done()
			assert.ErrorIs(t, s.Cause(), ErrWriteTimeout)
			assert.Equal(t, 2*time.Second, time.Since(began))
		})
	})
	t.Run("a reset", func(t *testing.T) {
		assert.ErrorIs(t, readCause(&net.OpError{Op: "read", Err: syscall.ECONNRESET}), ErrPeerReset)
		assert.ErrorIs(t, readCause(&net.OpError{Op: "read", Err: syscall.ETIMEDOUT}), ErrUnconfirmed)
	})
}

func TestManyCallersAgreeOnOneCause(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, _ := pipe(t, socketLimits)
		var killers sync.WaitGroup
		for i := range 50 {
			killers.Go(func() { s.Kill(fmt.Errorf("cause %d", i)) })
		}
		killers.Go(func() { _ = s.Close() })
		<-s.Done()
		cause := s.Cause()
		killers.Wait()
		assert.Equal(t, cause, s.Cause())
	})
}

func TestKillOverTLSDoesNotWaitForThePeer(t *testing.T) {
	near, far := tcpPair(t)
	server, client := certificates(t)
	shaken := make(chan error, 1)
	go func() { shaken <- tls.Server(far, server).HandshakeContext(t.Context()) }()
	client.ServerName = "127.0.0.1"
	secured := tls.Client(near, client)
	require.NoError(t, secured.HandshakeContext(t.Context()))
	require.NoError(t, <-shaken)
	s := NewSocket(secured, socketLimits)
	written := make(chan error, 1)
	go func() {
		for {
			if _, err := s.Write(frameOf(frameBody, 1, make([]byte, 1<<16)...)); err != nil {
				written <- err
				return
			}
		}
	}()
	require.Eventually(t, func() bool {
		s.out.mu.Lock()
		defer s.out.mu.Unlock()
		return s.out.room != nil
	}, 30*time.Second, time.Millisecond, "the peer takes no more")

	began, reason := time.Now(), errors.New("stop")
	s.Kill(reason)
	s.Wait()
	assert.ErrorIs(t, <-written, reason)
	assert.Less(t, time.Since(began), 2*time.Second)
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
