package wire

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/steadymq/steadymq/internal/errtext"
)

// outbound is the write side of a socket, the twin of inbound. The driver and the workers append to
// a buffer, and the writer, a goroutine of the socket, puts it on the connection: many acks share
// one system call.
type outbound struct {
	socket *Socket

	wake  chan struct{} // tells the writer to look again
	delay *time.Timer   // tells the writer that the batched settlements are due
	done  chan struct{} // closed when the writer has returned

	readerIdle atomic.Bool // Read waits for the broker

	mu            sync.Mutex    // held for memory only, never across a blocking call
	pending       []byte        // waits for the connection
	spare         []byte        // the other of the two buffers that take swaps
	slack         slack         // when they become small again
	flush         flushPolicy   // when pending goes out
	room          chan struct{} // closed when there may be room again; nil if nobody waits
	scanner       scanner       // follows the driver's frames
	subscriptions subscriptions
	channels      channels
	closed        bool      // takes nothing more; what is pending still goes out
	deadline      time.Time // the driver's own write deadline
	limit         time.Time // the deadline of the write under way; zero before the first
}

const (
	// maxPending bounds what waits for the connection. It holds some 50,000 acks: a peer that reads
	// at all never fills it, and one that does not is ended by the write deadline.
	maxPending = 1 << 20

	// writeChunk is what one write deadline covers. A slow reader that takes this much per deadline
	// is alive, however much is still waiting.
	writeChunk = 64 << 10

	// drainGrace is how long the reader may go on after a failed write: a broker that closes says
	// why first, and that frame may still be unread.
	drainGrace = 100 * time.Millisecond
)

func (o *outbound) init(s *Socket) {
	o.socket = s
	o.wake = make(chan struct{}, 1)
	o.delay = time.NewTimer(time.Hour)
	o.delay.Stop()
	o.done = make(chan struct{})
	o.subscriptions.init()
	o.channels.init()
	o.scanner.onFrame = o.learn
	o.flush = flushPolicy{delay: s.opts.WriteDelay, idle: o.idle}
}

// Write takes p for the connection. It blocks only while the buffer is full: the driver holds its
// locks meanwhile, so the connection must not block it.
func (s *Socket) Write(p []byte) (int, error) { return s.out.write(p) }

func (o *outbound) write(p []byte) (int, error) {
	s := o.socket
	o.mu.Lock()
	o.await(func() bool { return o.full(len(p)) })
	if o.closed || s.end.closed.Load() {
		o.mu.Unlock()
		return 0, s.err()
	}
	o.append(p)
	if o.scanner.opaque {
		o.mu.Unlock()
		s.Kill(errDriverGarbled)
		return 0, s.err()
	}
	o.insertPending()
	if !o.scanner.withinFrame() {
		o.signalRoom() // settlements wait for the end of a long frame
	}
	wake, tell := o.flush.flushNow(), len(o.channels.toDriver) > 0
	o.mu.Unlock()
	if wake {
		o.wakeWriter()
	}
	if tell {
		s.in.wake()
	}
	return len(p), nil
}

// settle takes a settlement of sub, a whole frame, and never puts it into a frame of the driver. It
// may wait to share a write.
func (o *outbound) settle(sub *Subscription, frame []byte) error {
	s := o.socket
	o.mu.Lock()
	o.await(func() bool { return o.full(len(frame)) || o.scanner.withinFrame() })
	if sub.closed || o.closed || s.end.closed.Load() {
		o.mu.Unlock()
		return s.err()
	}
	sub.unsettled.Add(-1)
	o.pending = append(o.pending, frame...)
	wake, wait := o.flush.settled(time.Since(s.start), sub.prefetch)
	if wait > 0 {
		o.delay.Reset(wait)
	}
	o.mu.Unlock()
	if wake {
		o.wakeWriter()
	}
	return nil
}

// await returns once nothing blocks a frame any more, or the socket ends. The caller holds mu,
// which is released while await waits.
func (o *outbound) await(blocked func() bool) {
	s := o.socket
	for blocked() && !o.closed && !s.end.closed.Load() {
		if o.room == nil {
			o.room = make(chan struct{})
		}
		room := o.room
		o.mu.Unlock()
		select {
		case <-room:
		case <-s.end.done:
		}
		o.mu.Lock()
	}
}

// full tells whether n more bytes have to wait. One frame is always taken, however long it is.
func (o *outbound) full(n int) bool {
	return len(o.pending) > 0 && len(o.pending)+n > maxPending
}

// signalRoom makes all who wait in await look again. The caller holds mu.
func (o *outbound) signalRoom() {
	if o.room != nil {
		close(o.room)
		o.room = nil
	}
}

// append adds what the driver writes and the broker is to get. The driver's very first words are no
// frame.
func (o *outbound) append(p []byte) {
	if o.scanner.betweenFrames() && bytes.HasPrefix(p, []byte("AMQP")) {
		o.pending = append(o.pending, p...)
		return
	}
	o.pending = o.scanner.next(o.pending, p)
}

// learn takes a frame that the driver writes, or at least its beginning. It returns false if the
// broker must not get it.
func (o *outbound) learn(p []byte) (pass bool) {
	if pass = o.channels.learn(p); pass {
		o.subscriptions.learn(p)
	}
	return pass
}

// idle tells whether no settlement can follow for now. The caller holds mu.
func (o *outbound) idle() bool { return o.readerIdle.Load() && !o.subscriptions.busy() }

// flushIfIdle is called before Read waits for the broker.
func (o *outbound) flushIfIdle() {
	o.readerIdle.Store(true)
	o.mu.Lock()
	wake := o.flush.flushIfIdle()
	o.mu.Unlock()
	if wake {
		o.wakeWriter()
	}
}

// stop asks the writer to end once everything pending has gone out.
func (o *outbound) stop() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.wakeWriter()
}

func (o *outbound) wakeWriter() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// writeLoop is the writer. It puts what is pending on the connection until the socket ends, or
// until it was asked to stop and nothing is left.
func (o *outbound) writeLoop() {
	defer close(o.done)
	defer o.delay.Stop()
	for {
		batch, closed := o.take()
		if len(batch) > 0 {
			if err := o.writeOut(batch); err != nil {
				o.writeFailed(err)
				return
			}
			continue
		}
		if closed {
			o.closeNotify()
			return
		}
		select {
		case <-o.wake:
		case <-o.delay.C:
			o.expire()
		case <-o.socket.end.done:
			return
		}
	}
}

// closeNotify tells a TLS peer that nothing was cut off. Close bounds it.
func (o *outbound) closeNotify() {
	if c, ok := o.socket.conn.(*tls.Conn); ok {
		_ = c.CloseWrite()
	}
}

// expire flushes settlements that have waited long enough.
func (o *outbound) expire() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if wait := o.flush.expired(time.Since(o.socket.start)); wait > 0 {
		o.delay.Reset(wait)
	}
}

// take swaps the buffers: what is pending goes out, the other one fills up.
func (o *outbound) take() (batch []byte, closed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.flush.requested && !o.closed {
		return nil, false
	}
	batch = o.pending
	if idle := o.slack.over(len(batch), time.Since(o.socket.start)); idle && cap(o.spare) > idleBuffer {
		o.spare = nil
	}
	o.pending, o.spare = o.spare[:0], batch
	o.flush.taken()
	o.signalRoom()
	return batch, o.closed
}

// writeOut writes in chunks, each under its own deadline.
func (o *outbound) writeOut(b []byte) error {
	s := o.socket
	for len(b) > 0 {
		o.armWrite()
		n, err := s.opts.transfer(s.conn.Write, b[:min(len(b), writeChunk)], s.Kill)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// armWrite begins the time of one write. Setting a deadline does not block, and under mu none that
// is out of date can overwrite a later one.
func (o *outbound) armWrite() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if timeout := o.socket.opts.WriteTimeout; timeout > 0 {
		o.limit = time.Now().Add(timeout)
	}
	_ = o.socket.setDeadline(net.Conn.SetWriteDeadline, earlier(o.deadline, o.limit))
}

// SetWriteDeadline shortens the deadline of the write under way and of those that follow; it never
// lengthens the write timeout.
func (s *Socket) SetWriteDeadline(t time.Time) error { return s.out.setDeadline(t) }

func (o *outbound) setDeadline(t time.Time) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.deadline = t
	return o.socket.setDeadline(net.Conn.SetWriteDeadline, earlier(t, o.limit))
}

// earlier returns the earlier deadline; zero is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// writeFailed ends the socket because a write failed, after the reader had the chance to find the
// broker's own words for it.
func (o *outbound) writeFailed(err error) {
	s := o.socket
	s.end.blame(writeCause(err, s.opts.WriteTimeout))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		o.awaitReader()
	}
	s.disconnect(true)
}

// awaitReader lets the reader go on for the grace, unless the socket is being closed: the driver holds
// its lock meanwhile, and nobody waits for the broker's words any more.
func (o *outbound) awaitReader() {
	grace := time.NewTimer(drainGrace)
	defer grace.Stop()
	for !o.isStopped() {
		select {
		case <-o.socket.end.done:
		case <-grace.C:
		case <-o.wake: // stop wakes the writer, too
			continue
		}
		return
	}
}

func (o *outbound) isStopped() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.closed
}

func writeCause(err error, timeout time.Duration) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errtext.Because(fmt.Errorf("%w after %v", ErrWriteTimeout, timeout), err)
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return errtext.Because(ErrPeerReset, err)
	case errors.Is(err, syscall.ETIMEDOUT):
		return errtext.Because(ErrUnconfirmed, err)
	}
	return err
}
