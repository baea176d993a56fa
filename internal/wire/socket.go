package wire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxPending bounds what waits for the wire. It holds some 50,000 acks: a
	// peer that reads at all never fills it, and one that does not is ended by
	// the write deadline.
	maxPending = 1 << 20

	// writeChunk is what one write deadline covers. A slow reader that takes
	// this much per deadline is alive, however much is still waiting.
	writeChunk = 64 << 10

	// drainGrace is how long the reader may go on after a failed write: a
	// broker that closes says why first, and that frame may still be unread.
	drainGrace = 100 * time.Millisecond
)

// Options are the limits of one socket; zero switches a limit off.
type Options struct {
	// IdleTimeout ends a socket that has read nothing for so long, from WatchPeer on.
	IdleTimeout time.Duration
	// WriteTimeout is the deadline of every write to the connection.
	WriteTimeout time.Duration
	// WriteDelay is the longest that a settlement waits to share a write.
	WriteDelay time.Duration
	// Refuse says why a body of so many bytes is not kept, nil if it is. Without it all are.
	Refuse func(size uint64) error
	// Transfer calls Read or Write of the connection, which may be the user's and panic. It tells
	// broken of a panic, also where that ends the goroutine. Without it they are called as they are.
	Transfer func(f func([]byte) (int, error), p []byte, broken func(error)) (int, error)
}

func (o *Options) refuse(size uint64) error {
	if o.Refuse == nil {
		return nil
	}
	return o.Refuse(size)
}

func (o *Options) transfer(f func([]byte) (int, error), p []byte, broken func(error)) (int, error) {
	if o.Transfer == nil {
		return f(p)
	}
	return o.Transfer(f, p, broken)
}

// DialFunc is how a connection is made, as net.Dialer.DialContext does.
type DialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// DefaultDial dials within timeout, with keep-alive as the net under the
// heartbeats. userTimeout is how long sent data may stay unacknowledged
// before the kernel gives the connection up, where the system can tell.
func DefaultDial(timeout, userTimeout time.Duration) DialFunc {
	d := &net.Dialer{Timeout: timeout, Control: userTimeoutControl(userTimeout)}
	return d.DialContext
}

// Socket is the only net.Conn the driver is given. It closes the holes that
// only the owner of the socket can close: a silent peer is noticed, a blocked
// write ends, and the first cause is kept where the driver says "501".
//
// No method but Write and a lane's settle (full buffer), Read and Close blocks,
// and kill ends those at once.
type Socket struct {
	conn net.Conn // what the frames go through
	raw  net.Conn // what kill closes: conn, or the connection under its TLS
	opts Options

	start     time.Time
	heard     atomic.Int64 // when Read last read bytes, since start
	delivered atomic.Int64 // when bytes of a delivery last came, since start

	first   atomic.Pointer[ending] // why it ends; the first one stays
	over    atomic.Bool
	ended   chan struct{}  // closed once over
	shut    chan struct{}  // closed when raw has closed, soon after ended
	writer  chan struct{}  // closed when the writer has returned
	running sync.WaitGroup // the socket's own goroutines

	in      inbound                // touched by Read's caller only
	offer   atomic.Pointer[string] // the mechanisms of the broker's first frame, nil before it
	resting atomic.Bool            // Read waits for the broker

	wake  chan struct{} // tells the writer to look again
	delay *time.Timer   // tells the writer that what is held is due

	mu       sync.Mutex    // held for memory only, never across a blocking call
	pending  []byte        // waits for the wire
	spare    []byte        // the other of the two swap buffers
	flush    flushing      // when pending goes out
	room     chan struct{} // closed when there may be room again; nil if nobody waits
	out      scanner       // follows the driver's frames
	lanes    lanes
	closing  bool
	deadline time.Time // the driver's own write deadline
	limit    time.Time // the deadline of the write under way; zero before the first
}

// ending is why a socket ends; the cause is nil after a plain Close.
type ending struct {
	cause error
}

func NewSocket(conn net.Conn, o Options) *Socket {
	s := &Socket{
		conn:   conn,
		raw:    conn,
		opts:   o,
		start:  time.Now(),
		ended:  make(chan struct{}),
		shut:   make(chan struct{}),
		writer: make(chan struct{}),
		wake:   make(chan struct{}, 1),
		delay:  time.NewTimer(time.Hour),
		in:     inbound{buf: make([]byte, readBuffer)},
	}
	s.delay.Stop()
	s.lanes = lanes{expected: make(map[string]*Subscription), open: make(map[uint16]*Subscription), past: make(map[uint16]*Subscription)}
	s.out.visit = s.lanes.learn
	s.flush = flushing{delay: o.WriteDelay, idle: s.idle}
	if c, ok := conn.(*tls.Conn); ok {
		s.raw = c.NetConn()
	}
	s.running.Go(s.writeLoop)
	return s
}

// sinceDelivery returns how long ago bytes of a delivery last came.
func (s *Socket) sinceDelivery() time.Duration {
	return time.Since(s.start) - time.Duration(s.delivered.Load())
}

// watchPeer begins to watch for a peer that falls silent. It is called once, after
// the handshake: before, silence can be an answer, and the set-up limit bounds it.
func (s *Socket) WatchPeer() {
	if s.opts.IdleTimeout > 0 {
		s.running.Go(s.watch)
	}
}

func (s *Socket) Done() <-chan struct{} { return s.ended }

// offered is the mechanisms that the broker offers to log in, with blanks between them.
func (s *Socket) Mechanisms() string {
	if offer := s.offer.Load(); offer != nil {
		return *offer
	}
	return ""
}

// wait blocks until nothing of a socket that ends is left: the connection
// underneath, which whoever ended the socket may still be closing, and the
// socket's own goroutines.
func (s *Socket) Wait() {
	<-s.shut
	s.running.Wait()
}

// cause says why the socket ended: nil while it lives and after a plain Close.
func (s *Socket) Cause() error {
	if e := s.first.Load(); e != nil {
		return e.cause
	}
	return nil
}

// kill ends the socket at once, from any goroutine and in any state. It takes
// no lock and waits for nobody.
func (s *Socket) Kill(cause error) {
	s.blame(cause)
	s.end(true)
}

// blame keeps the first cause.
func (s *Socket) blame(cause error) {
	s.first.CompareAndSwap(nil, &ending{cause})
}

// end closes the connection underneath, once. It tells the end before: a user's
// connection may take its time to close, and the healing need not wait for it.
func (s *Socket) end(reset bool) {
	if !s.over.CompareAndSwap(false, true) {
		return
	}
	close(s.ended)
	defer close(s.shut)
	if reset {
		Abort(s.raw)
		return
	}
	hangUp(s.raw)
}

// Abort closes a connection without waiting for what it still has to send.
// A FIN would queue behind that; a reset goes out now and the broker frees
// the messages in flight.
func Abort(conn net.Conn) {
	if c, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		_ = c.SetLinger(0)
	}
	hangUp(conn)
}

// hangUp closes a connection, which may be the user's: there is nothing to be done about a Close
// that panics.
func hangUp(conn net.Conn) {
	defer func() { _ = recover() }()
	_ = conn.Close()
}

// err is what a call on an ended socket returns.
func (s *Socket) err() error {
	if cause := s.Cause(); cause != nil {
		return cause
	}
	return net.ErrClosed
}

// watch ends the socket when Read has read nothing for too long. That
// covers a silent peer and a driver that stopped reading alike.
func (s *Socket) watch() {
	dog := watchdog{idle: s.opts.IdleTimeout, due: time.Since(s.start) + s.opts.IdleTimeout}
	timer := time.NewTimer(dog.idle)
	defer timer.Stop()
	for {
		select {
		case <-s.ended:
			return
		case <-timer.C:
		}
		now := time.Since(s.start)
		if dog.bites(now, time.Duration(s.heard.Load())) {
			s.Kill(fmt.Errorf("%w for %v: the peer or the path to it is dead, or the driver stopped reading", ErrWatchdog, dog.idle))
			return
		}
		timer.Reset(dog.due - now)
	}
}

// watchdog decides what a fired timer means; all its times count from the
// start of the socket.
type watchdog struct {
	idle time.Duration
	due  time.Duration // when to look again
}

// bites reports whether the peer was silent for too long, heard being its last
// sign of life.
func (d *watchdog) bites(now, heard time.Duration) bool {
	if next := heard + d.idle; next > now {
		d.due = next
		return false
	}
	// A timer this late means that the machine stood still, not the peer: what
	// it sent meanwhile may lie unread.
	if now-d.due >= d.idle/2 {
		d.due = now + d.idle/2
		return false
	}
	return true
}

// Close flushes what is pending, for at most the write timeout, and closes.
func (s *Socket) Close() error {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.nudge()

	var limit <-chan time.Time
	if s.opts.WriteTimeout > 0 {
		timer := time.NewTimer(s.opts.WriteTimeout)
		defer timer.Stop()
		limit = timer.C
	}
	select {
	case <-s.writer:
		s.blame(nil)
		s.end(false)
	case <-s.ended:
	case <-limit:
		s.Kill(fmt.Errorf("%w after %v: closed with data unsent", ErrWriteTimeout, s.opts.WriteTimeout))
	}
	return s.Cause()
}

func (s *Socket) LocalAddr() net.Addr { return s.conn.LocalAddr() }

func (s *Socket) RemoteAddr() net.Addr { return s.conn.RemoteAddr() }

func (s *Socket) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

func (s *Socket) SetReadDeadline(t time.Time) error { return s.conn.SetReadDeadline(t) }
