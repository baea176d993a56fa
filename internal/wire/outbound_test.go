package wire

import (
	"bytes"
	"errors"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// settleInto settles until the socket takes no more; the peer must not read.
func settleInto(s *Socket, acks int) <-chan error {
	sub := openSubscription(s, 1, 1)
	result := make(chan error, 1)
	go func() {
		for tag := range acks {
			if err := sub.settle(basicAck, uint64(tag+1), 0); err != nil {
				result <- err
				return
			}
		}
		result <- nil
	}()
	return result
}

func TestZeroWindowUnderAHundredThousandAcks(t *testing.T) {
	t.Run("memory is bounded and the write deadline ends it", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			s, _, _ := pipe(t, socketLimits)
			began := time.Now()
			written := settleInto(s, 100_000)
			synctest.Wait()
			s.out.mu.Lock()
			assert.LessOrEqual(t, len(s.out.pending), maxPending)
			s.out.mu.Unlock()
			assert.ErrorIs(t, <-written, ErrWriteTimeout)
			assert.Equal(t, 10*time.Second, time.Since(began))
		})
	})
	t.Run("kill ends it at once", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			s, w, _ := pipe(t, socketLimits)
			written := settleInto(s, 100_000)
			time.Sleep(time.Second)
			began, reason := time.Now(), errors.New("setup limit")
			s.Kill(reason)
			assert.ErrorIs(t, <-written, reason)
			s.Wait()
			assert.Zero(t, time.Since(began))
			assert.True(t, w.linger, "a FIN would wait behind what the peer does not take")
		})
	})
	t.Run("Close is bounded", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			s, _, _ := pipe(t, socketLimits)
			written := settleInto(s, 100_000)
			time.Sleep(3 * time.Second)
			began := time.Now()
			assert.ErrorIs(t, s.Close(), ErrWriteTimeout)
			assert.Error(t, <-written)
			s.Wait()
			assert.LessOrEqual(t, time.Since(began), 10*time.Second)
		})
	})
	t.Run("kill ends a Close that waits", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			s, _, _ := pipe(t, socketLimits)
			settleInto(s, 100_000)
			synctest.Wait()
			reason := errors.New("close limit")
			time.AfterFunc(2*time.Second, func() { s.Kill(reason) })
			began := time.Now()
			assert.ErrorIs(t, s.Close(), reason)
			assert.Equal(t, 2*time.Second, time.Since(began))
		})
	})
}

func TestZeroWindowUnderTheDriverOnARealSocket(t *testing.T) {
	near, far := tcpPair(t)
	s := NewSocket(near, socketLimits)
	conn := open(t, s, far)
	go func() { _, _ = far.Write(methodOf(1, 20, 11, 0, 0, 0, 0)) }()
	channel, err := conn.Channel()
	require.NoError(t, err)

	settled := make(chan error, 1)
	go func() {
		for tag := uint64(1); ; tag++ { // until kernel and socket take no more
			if err := channel.Ack(tag, false); err != nil {
				settled <- err
				return
			}
		}
	}()
	require.Eventually(t, func() bool {
		s.out.mu.Lock()
		defer s.out.mu.Unlock()
		return s.out.room != nil
	}, 30*time.Second, time.Millisecond, "Ack blocks")

	began := time.Now()
	s.Kill(errors.New("stop"))
	assert.Error(t, <-settled)
	_ = conn.Close()
	s.Wait()
	assert.Less(t, time.Since(began), 2*time.Second)
}

func TestSlowReaderStaysAlive(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		o := socketLimits
		o.IdleTimeout = 0
		s, _, far := pipe(t, o)
		body := make([]byte, maxPending-len(frameOf(frameBody, 1)))
		_, _ = mathrand.NewChaCha8([32]byte{1}).Read(body)
		sent := frameOf(frameBody, 1, body...)
		written, err := s.Write(sent)
		require.NoError(t, err)
		require.Equal(t, len(sent), written)

		var got bytes.Buffer
		for got.Len() < len(sent) { // each takes a chunk in just less than the deadline
			_, err := io.CopyN(&got, far, writeChunk)
			require.NoError(t, err)
			time.Sleep(9 * time.Second)
		}
		assert.Equal(t, sent, got.Bytes())
		assert.NoError(t, s.Cause())
	})
}

func TestLoneSettlementLeavesAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, w, far := consumer(t, socketLimits, 1)
		arrived := collect(far)
		began := time.Now()
		for tag := range uint64(10) {
			deliver(t, far, 1)
			require.NoError(t, sub.settle(basicAck, tag+1, 0))
			synctest.Wait()
			assert.Len(t, arrived.bytes(), int(tag+1)*settlementSize)
		}
		assert.Zero(t, time.Since(began))
		assert.Equal(t, 10, w.writes())
	})
}

func TestSettlementOfASlowHandlerLeavesAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 32)
		arrived := collect(far)
		deliver(t, far, 32)
		for tag := range uint64(10) {
			time.Sleep(2 * time.Millisecond)
			require.NoError(t, sub.settle(basicAck, tag+1, 0))
			synctest.Wait()
			assert.Len(t, arrived.bytes(), int(tag+1)*settlementSize, "no company comes within the write delay")
		}
	})
}

func TestBurstOfSettlementsSharesWrites(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, w, far := consumer(t, socketLimits, 256)
		arrived := collect(far)
		deliver(t, far, 256)
		began := time.Now()
		for tag := range uint64(256) {
			require.NoError(t, sub.settle(basicAck, tag+1, 0))
			synctest.Wait() // the writer is never behind
		}
		assert.Len(t, arrived.bytes(), 256*settlementSize, "the last one waits for nobody")
		assert.Zero(t, time.Since(began))
		assert.LessOrEqual(t, w.writes(), 4, "half a window each")
	})
}

func TestSettlementWaitsNoLongerThanTheWriteDelay(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 100)
		arrived := collect(far)
		deliver(t, far, 100)
		began := time.Now()
		for tag := range uint64(10) {
			require.NoError(t, sub.settle(basicAck, tag+1, 0))
		}
		synctest.Wait()
		require.Less(t, len(arrived.bytes()), 10*settlementSize)
		time.Sleep(time.Millisecond)
		synctest.Wait()
		assert.Len(t, arrived.bytes(), 10*settlementSize)
		assert.Equal(t, time.Millisecond, time.Since(began))
	})
}

func TestLostChannelDoesNotMakeTheNextOneWait(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		first, _, far := consumer(t, socketLimits, 100)
		arrived := collect(far)
		deliver(t, far, 100)
		closed := methodOf(1, 20, 41)
		_, err := first.socket.Write(closed) // before they are settled
		require.NoError(t, err)
		second := openSubscription(first.socket, 2, 100)
		_, err = far.Write(slicesOf(messageOf(2, 1, []byte{0, 0}), messageOf(2, 2, []byte{0, 0})))
		require.NoError(t, err)
		synctest.Wait()
		for tag := range uint64(2) {
			require.NoError(t, second.settle(basicAck, tag+1, 0))
		}
		synctest.Wait()
		assert.Len(t, arrived.bytes(), len(closed)+2*settlementSize)
	})
}

func TestOtherFramesTakeHeldSettlementsAlong(t *testing.T) {
	for name, frame := range map[string][]byte{
		"heartbeat":        heartbeatFrame,
		"channel.close":    methodOf(1, 20, 40, 0, 200, 0, 0, 0, 0, 0),
		"connection.close": methodOf(0, 10, 50, 0, 200, 0, 0, 0, 0, 0),
		"half a frame":     frameOf(frameBody, 1, make([]byte, 100)...)[:50],
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				sub, _, far := consumer(t, socketLimits, 100)
				arrived := collect(far)
				deliver(t, far, 100)
				want := slicesOf(ackOf(1), ackOf(2), ackOf(3), frame)
				began := time.Now()
				for tag := range uint64(3) {
					require.NoError(t, sub.settle(basicAck, tag+1, 0))
				}
				_, err := sub.socket.Write(frame)
				require.NoError(t, err)
				synctest.Wait()
				assert.Equal(t, want, arrived.bytes(), "in order")
				assert.Zero(t, time.Since(began))
			})
		})
	}
}

func TestWriteDelayZeroNeverWaits(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		o := socketLimits
		o.WriteDelay = 0
		sub, _, far := consumer(t, o, 100)
		arrived := collect(far)
		deliver(t, far, 100)
		for tag := range uint64(5) {
			require.NoError(t, sub.settle(basicAck, tag+1, 0))
			synctest.Wait()
			assert.Len(t, arrived.bytes(), int(tag+1)*settlementSize)
		}
	})
}

func TestFramesWrittenDuringAWriteShareTheNext(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, w, far := pipe(t, socketLimits)
		gate := make(chan struct{})
		w.gate = gate
		arrived := collect(far)
		for range 1000 {
			_, err := s.Write(heartbeatFrame)
			require.NoError(t, err)
			synctest.Wait()
		}
		close(gate)
		synctest.Wait()
		assert.Equal(t, bytes.Repeat(heartbeatFrame, 1000), arrived.bytes())
		assert.Equal(t, 2, w.writes())
	})
}

// A broker that closes says why and hangs up: the write that runs into that must not keep the
// driver from reading it.
func TestFailedWriteLeavesTheBrokersLastWords(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, w, far := pipe(t, socketLimits)
		conn := open(t, s, far)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))

		w.mu.Lock()
		w.broken = syscall.EPIPE
		w.mu.Unlock()
		_, err := s.Write(heartbeatFrame)
		require.NoError(t, err)
		synctest.Wait()
		words := "CONNECTION_FORCED - shutdown"
		goodbye := append([]byte{1, 64, byte(len(words))}, words...)
		go func() { _, _ = far.Write(methodOf(0, 10, 50, append(goodbye, 0, 0, 0, 0)...)) }()

		told := <-closed
		require.NotNil(t, told)
		assert.Equal(t, 320, told.Code)
		assert.True(t, told.Server)
		<-s.Done()
		assert.ErrorIs(t, s.Cause(), ErrPeerReset)
	})
}

func TestFailedWriteEndsTheSocketWithinTheGrace(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, w, _ := pipe(t, socketLimits)
		w.broken = syscall.ECONNRESET
		began := time.Now()
		_, err := s.Write(heartbeatFrame)
		require.NoError(t, err)
		<-s.Done()
		assert.Equal(t, drainGrace, time.Since(began))
		assert.ErrorIs(t, s.Cause(), ErrPeerReset)
		_, err = s.Write(heartbeatFrame)
		assert.ErrorIs(t, err, ErrPeerReset)
	})
}

// FuzzWrites checks order and integrity under random frames, delays and partial writes.
func FuzzWrites(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 1, 2, 3}, uint64(1))
	f.Add(bytes.Repeat([]byte{0}, 300), uint64(2))
	f.Add([]byte{5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 7, 0, 0, 6, 0}, uint64(3))
	f.Add([]byte{4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0}, uint64(4))
	f.Fuzz(func(t *testing.T, script []byte, seed uint64) {
		if len(script) > 400 {
			script = script[:400]
		}
		inBubble(t, func(t *testing.T) { playWrites(t, script, mathrand.New(mathrand.NewPCG(seed, 0))) })
	})
}

func playWrites(t *testing.T, script []byte, r *mathrand.Rand) {
	near, far := net.Pipe()
	s := NewSocket(&faultyConn{Conn: near, cut: mathrand.New(mathrand.NewPCG(r.Uint64(), 0))}, socketLimits)
	sub := openSubscription(s, 1, 100)
	go func() { _, _ = io.Copy(io.Discard, s) }()
	var got bytes.Buffer
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 1+r.IntN(5000))
		for {
			n, err := far.Read(buf)
			got.Write(buf[:n])
			if err != nil {
				return
			}
		}
	}()

	var want []byte
	for i, op := range script {
		var frame []byte
		switch op % 8 {
		case 3:
			frame = heartbeatFrame
		case 4:
			frame = frameOf(frameBody, 1, bytes.Repeat([]byte{op}, 1+i*257)...)
		case 5:
			deliver(t, far, 1+int(op))
		case 6:
			time.Sleep(time.Duration(op) * 10 * time.Microsecond)
		case 7:
			synctest.Wait()
		}
		if frame == nil {
			want = append(want, ackOf(uint64(i+1))...)
			require.NoError(t, sub.settle(basicAck, uint64(i+1), 0))
			continue
		}
		want = append(want, frame...)
		n, err := s.Write(frame)
		require.NoError(t, err)
		require.Equal(t, len(frame), n)
	}
	require.NoError(t, s.Close())
	<-ended
	require.True(t, bytes.Equal(want, got.Bytes()), "every byte once and in order")
	s.Wait()
}

// swallow is a connection that takes everything and costs nothing.
type swallow struct{ net.Conn }

func (swallow) Write(p []byte) (int, error)      { return len(p), nil }
func (swallow) SetWriteDeadline(time.Time) error { return nil }

// BenchmarkSubscriptionSettle is one ack put on its way.
func BenchmarkSubscriptionSettle(b *testing.B) {
	near, far := net.Pipe()
	defer far.Close()
	s := NewSocket(swallow{near}, socketLimits)
	defer s.Wait()
	defer s.Kill(nil)
	sub := openSubscription(s, 1, 1000)
	b.ReportAllocs()
	for b.Loop() {
		if err := sub.settle(basicAck, 1, 0); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSocketWriteHeartbeat is a frame that never waits.
func BenchmarkSocketWriteHeartbeat(b *testing.B) {
	near, far := net.Pipe()
	defer far.Close()
	s := NewSocket(swallow{near}, socketLimits)
	defer s.Wait()
	defer s.Kill(nil)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Write(heartbeatFrame); err != nil {
			b.Fatal(err)
		}
	}
}

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
					require.ErrorIs(t, err, errDriverGarbled)
					<-sub.socket.Done()
					assert.ErrorIs(t, sub.socket.Cause(), errDriverGarbled)
					assert.ErrorIs(t, sub.settle(basicAck, 1, 0), errDriverGarbled)
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

func TestCutPathIsToldWhereverItIsNoticed(t *testing.T) {
	for err, want := range map[error]error{
		syscall.ETIMEDOUT: ErrUnconfirmed, syscall.ECONNRESET: ErrPeerReset, syscall.EPIPE: ErrPeerReset, os.ErrDeadlineExceeded: ErrWriteTimeout,
	} {
		assert.ErrorIs(t, writeCause(&net.OpError{Op: "write", Err: err}, socketLimits.WriteTimeout), want)
	}
}
