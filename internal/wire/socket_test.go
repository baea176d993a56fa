package wire

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var socketLimits = Options{
	IdleTimeout:  20 * time.Second,
	WriteTimeout: 10 * time.Second,
	WriteDelay:   time.Millisecond,
}

// faultyConn is the connection under a socket: it counts writes and can fail, cut
// and stop them.
type faultyConn struct {
	net.Conn
	mu     sync.Mutex
	sizes  []int
	broken error           // what the next writes return
	cut    *mathrand.Rand  // takes random parts of each write
	linger bool            // SetLinger(0) was called
	gate   <-chan struct{} // writes wait for it
}

func (w *faultyConn) Write(p []byte) (int, error) {
	w.mu.Lock()
	broken, gate := w.broken, w.gate
	w.sizes = append(w.sizes, len(p))
	if w.cut != nil && len(p) > 0 {
		p = p[:1+w.cut.IntN(len(p))]
	}
	w.mu.Unlock()
	if gate != nil {
		<-gate
	}
	if broken != nil {
		return 0, broken
	}
	return w.Conn.Write(p)
}

func (w *faultyConn) SetLinger(int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.linger = true
	return nil
}

func (w *faultyConn) writes() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.sizes)
}

// pipe returns a socket on an in-memory connection without buffers, and its
// peer's end: a peer that does not read is a zero window.
func pipe(t *testing.T, o Options) (*Socket, *faultyConn, net.Conn) {
	t.Helper()
	near, far := net.Pipe()
	w := &faultyConn{Conn: near}
	s := NewSocket(w, o)
	s.WatchPeer()
	t.Cleanup(func() {
		s.Kill(nil)
		s.Wait()
		_ = far.Close()
	})
	return s, w, far
}

// inBubble runs test in virtual time. The bubble fails if a goroutine stays.
func inBubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, test)
}

func frameOf(typ byte, channel uint16, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{typ}, channel)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(append(b, payload...), frameEnd)
}

func methodOf(channel, class, method uint16, args ...byte) []byte {
	id := binary.BigEndian.AppendUint16(nil, class)
	id = binary.BigEndian.AppendUint16(id, method)
	return frameOf(frameMethod, channel, append(id, args...)...)
}

func ackOf(tag uint64) []byte {
	return methodOf(1, 60, 80, append(binary.BigEndian.AppendUint64(nil, tag), 0)...)
}

func headerOf(size uint64) []byte {
	p := binary.BigEndian.AppendUint64([]byte{0, 60, 0, 0}, size)
	return frameOf(frameHeader, 1, append(p, 0, 0)...)
}

func deliveryOf(tag uint64, body []byte) []byte {
	args := binary.BigEndian.AppendUint64([]byte{1, 't'}, tag)
	b := methodOf(1, 60, 60, append(args, 0, 0, 1, 'q')...)
	b = append(b, headerOf(uint64(len(body)))...)
	if len(body) > 0 {
		b = append(b, frameOf(frameBody, 1, body...)...)
	}
	return b
}

var heartbeatFrame = frameOf(frameBeat, 0)

// consumed is a subscription and what came of it.
type consumed struct {
	*Subscription
	*kept
}

// kept is a Receiver that keeps all.
type kept struct {
	more chan struct{} // has a value once there is something

	mu    sync.Mutex
	all   []*amqp.Delivery
	aside []unfit
}

// unfit is a message that no handler can be given.
type unfit struct {
	delivery *amqp.Delivery
	size     uint64
	err      error
}

func (k *kept) New() *amqp.Delivery { return new(amqp.Delivery) }

func (k *kept) Put(d *amqp.Delivery) {
	k.mu.Lock()
	k.all = append(k.all, d)
	k.mu.Unlock()
	select {
	case k.more <- struct{}{}:
	default:
	}
}

func (k *kept) PutAside(d *amqp.Delivery, size uint64, reason error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.aside = append(k.aside, unfit{d, size, reason})
}

// take waits for the next one.
func (k *kept) take() *amqp.Delivery {
	for {
		k.mu.Lock()
		if len(k.all) > 0 {
			d := k.all[0]
			k.all = k.all[1:]
			k.mu.Unlock()
			return d
		}
		k.mu.Unlock()
		<-k.more
	}
}

// count is how many wait.
func (k *kept) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.all)
}

var errTooLarge = errors.New("too large")

// atMost refuses larger bodies.
func atMost(limit uint64) func(uint64) error {
	return func(size uint64) error {
		if size <= limit {
			return nil
		}
		return errTooLarge
	}
}

// openSubscription is the subscription of consumer t on a channel, as if the driver had just
// written its basic.consume.
func openSubscription(s *Socket, channel uint16, prefetch int) *consumed {
	k := &kept{more: make(chan struct{}, 1)}
	sub := &consumed{s.Subscribe("t", prefetch, k), k}
	s.out.mu.Lock()
	defer s.out.mu.Unlock()
	s.out.subscriptions.learn(consumeFrame(channel, "t"))
	return sub
}

// consumer is a socket with a driver that reads and a subscription on channel 1.
func consumer(t *testing.T, o Options, prefetch int) (*consumed, *faultyConn, net.Conn) {
	t.Helper()
	s, w, far := pipe(t, o)
	go func() { _, _ = io.Copy(io.Discard, s) }()
	return openSubscription(s, 1, prefetch), w, far
}

// deliver returns once n deliveries have reached their subscription, in a bubble.
func deliver(t *testing.T, far net.Conn, n int) {
	t.Helper()
	var b []byte
	for tag := range n {
		b = append(b, deliveryOf(uint64(tag+1), []byte("body"))...)
	}
	_, err := far.Write(b)
	require.NoError(t, err)
	synctest.Wait()
}

// collect reads all that arrives at far.
func collect(far net.Conn) *sink {
	k := &sink{ended: make(chan struct{})}
	go func() {
		defer close(k.ended)
		buf := make([]byte, 4096)
		for {
			n, err := far.Read(buf)
			k.mu.Lock()
			k.b = append(k.b, buf[:n]...)
			k.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return k
}

type sink struct {
	mu    sync.Mutex
	b     []byte
	ended chan struct{}
}

func (k *sink) bytes() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return bytes.Clone(k.b)
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
	head := make([]byte, frameHead)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, err
	}
	payload := make([]byte, binary.BigEndian.Uint32(head[3:])+1)
	if _, err := io.ReadFull(r, payload); err != nil || head[0] != frameMethod {
		return 0, err
	}
	return binary.BigEndian.Uint32(payload), nil
}

// open opens the driver on s against broker.
func open(t *testing.T, s *Socket, far net.Conn) *amqp.Connection {
	t.Helper()
	played := make(chan error, 1)
	go func() { played <- broker(far) }()
	conn, err := amqp.Open(s, amqp.Config{
		SASL:      []amqp.Authentication{&amqp.PlainAuth{Username: "guest", Password: "guest"}},
		Vhost:     "/",
		Heartbeat: 10 * time.Second,
	})
	require.NoError(t, err)
	require.NoError(t, <-played)
	return conn
}

func TestPeerThatDiesRightAfterOpenIsNoticed(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		conn := open(t, s, far)
		collect(far) // reads, and never says a word again
		synctest.Wait()
		// The driver clears its deadline after open-ok, and arms it with the
		// next frame only, if its heartbeater did not come late by chance.
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

// beat writes a heartbeat to w every 5 s until s ends.
func beat(s *Socket, w io.Writer) {
	ticker := time.NewTicker(5 * time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-s.Done():
			return
		case <-ticker.C:
			_, _ = w.Write(heartbeatFrame)
		}
	}
}

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

func slicesOf(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

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

// A broker that closes says why and hangs up: the write that runs into that
// must not keep the driver from reading it.
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

func TestTooLargeMessageOfNoSubscriptionNeverReachesTheDriver(t *testing.T) {
	o := socketLimits
	o.Refuse = atMost(1000)
	good := deliveryOf(1, make([]byte, 1000))
	bad := slicesOf(methodOf(1, 60, 60, 1, 't', 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 1, 'q'), headerOf(1<<63))
	stream := slicesOf(good, heartbeatFrame, bad)
	allowed := len(stream) - len(headerOf(0))

	for cut := 1; cut < len(stream); cut++ {
		inBubble(t, func(t *testing.T) {
			s, _, far := pipe(t, o)
			go func() {
				_, _ = far.Write(stream[:cut])
				_, _ = far.Write(stream[cut:])
			}()
			got, err := io.ReadAll(s)

			require.ErrorIs(t, err, errTooLarge)
			require.ErrorContains(t, err, "message of 9223372036854775808 bytes")
			require.GreaterOrEqual(t, len(got), allowed, "what came before is not lost")
			require.Less(t, len(got), allowed+headerHead, "the header is not complete")
			require.Equal(t, stream[:len(got)], got)
			assert.ErrorIs(t, s.Cause(), err)
		})
	}
}

func TestSizeLimitOffLetsEverythingPass(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		b := headerOf(1 << 63)
		go func() { _, _ = far.Write(b) }()
		_, err := io.ReadFull(s, make([]byte, len(b)))
		require.NoError(t, err)
	})
}

// FuzzWrites checks order and integrity under random frames, delays and
// partial writes.
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

func TestCauseOfAReadIsInTheChainOfWhatItMeans(t *testing.T) {
	reset := &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ECONNRESET)}
	assert.ErrorIs(t, readCause(reset), syscall.ECONNRESET)
	assert.ErrorIs(t, readCause(reset), ErrPeerReset)
	assert.ErrorIs(t, ErrPeerClosed, io.EOF)
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

// tcpPair returns both ends of a real connection.
func tcpPair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	near, err = DefaultDial(5*time.Second, 0)(t.Context(), "tcp", listener.Addr().String())
	require.NoError(t, err)
	far, err = listener.Accept()
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = near.Close()
		_ = far.Close()
	})
	return near, far
}

// certificates returns the configs of a server at 127.0.0.1 and of its client.
func certificates(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: roots}
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

// BenchmarkSubscriptionDeliver is one delivery made of its three frames and taken.
func BenchmarkSubscriptionDeliver(b *testing.B) {
	near, far := net.Pipe()
	defer far.Close()
	s := NewSocket(near, socketLimits)
	defer s.Wait()
	defer s.Kill(nil)
	sub := openSubscription(s, 1, 1)
	delivery := deliveryOf(1, make([]byte, 100))
	b.ReportAllocs()
	for b.Loop() {
		s.in.r, s.in.w = 0, copy(s.in.buf, delivery)
		if _, err := s.in.demux(nil); err != nil {
			b.Fatal(err)
		}
		if d := sub.take(); len(d.Body) != 100 {
			b.Fatal("not the delivery")
		}
	}
}

// The driver writes a frame of more than 4 KiB, such as a renewed token, in
// several parts: no settlement may come between these.
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

// lingering is a connection whose read deadline passes, and which notes how it is closed.
type lingering struct {
	net.Conn
	err   error
	reset *atomic.Bool
}

func (l lingering) Read([]byte) (int, error) { return 0, l.err }

func (l lingering) SetLinger(sec int) error {
	l.reset.Store(sec == 0)
	return nil
}

// The kernel goes on sending a FIN to a peer that confirms nothing, for minutes.
func TestSocketWhosePeerIsSilentIsResetNotClosed(t *testing.T) {
	for name, c := range map[string]struct {
		err   error
		reset bool
	}{
		"silent":      {os.ErrDeadlineExceeded, true},
		"unconfirmed": {syscall.ETIMEDOUT, true},
		"closed":      {io.EOF, false},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := net.Pipe()
			defer far.Close()
			s := NewSocket(lingering{near, c.err, new(atomic.Bool)}, Options{})
			_, err := s.Read(make([]byte, 1))
			require.Error(t, err)
			s.Kill(nil)
			s.Wait()
			assert.Equal(t, c.reset, s.raw.(lingering).reset.Load())
		})
	}
}
