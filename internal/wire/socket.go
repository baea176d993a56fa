package wire

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/steadymq/steadymq/internal/errtext"
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

var (
	ErrPeerClosed   = errtext.Because(errors.New("the peer closed the connection"), io.EOF)
	ErrPeerReset    = errors.New("the peer reset the connection")
	ErrUnconfirmed  = errors.New("the path to the peer is dead: nothing sent is confirmed")
	ErrReadTimeout  = errors.New("the peer went silent: read deadline passed")
	ErrWatchdog     = errors.New("no byte from the broker")
	ErrWriteTimeout = errors.New("the peer takes no more data: write deadline passed")
	errAstray       = errors.New("the driver has written what is no AMQP frame: there is no place left for an ack")
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

// dismiss ends the socket for what the broker sent. The acks that handlers have
// given go out before, within drainGrace: a reset would take them along, and so would
// a plain close while there is more to read. Read's caller calls it.
func (s *Socket) dismiss(cause error) {
	s.blame(cause)
	limit := time.AfterFunc(drainGrace, func() { s.end(true) })
	defer limit.Stop()
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.nudge()
	select {
	case <-s.writer:
	case <-s.ended:
	}
	if c, ok := s.raw.(interface{ CloseWrite() error }); ok && s.in.begun {
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, s.raw)
	}
	s.end(false)
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

// readFailed ends the socket for the reason of a failed read.
func (s *Socket) readFailed(err error) error {
	if err == nil {
		return nil
	}
	s.blame(readCause(err))
	s.end(!errors.Is(err, io.EOF)) // a peer that is silent takes no FIN: the kernel would go on sending it
	return s.err()
}

func readCause(err error) error {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return ErrPeerClosed
	case errors.Is(err, syscall.ECONNRESET):
		return errtext.Because(ErrPeerReset, err)
	case errors.Is(err, syscall.ETIMEDOUT):
		return errtext.Because(ErrUnconfirmed, err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errtext.Because(ErrReadTimeout, err)
	}
	return err
}

// Write takes p for the wire. It blocks only while the buffer is full: the
// driver holds its locks meanwhile, so the wire must not.
func (s *Socket) Write(p []byte) (int, error) {
	s.mu.Lock()
	s.await(func() bool { return s.full(len(p)) })
	if s.closing || s.over.Load() {
		s.mu.Unlock()
		return 0, s.err()
	}
	s.follow(p)
	if s.out.off {
		s.mu.Unlock()
		s.Kill(errAstray)
		return 0, s.err()
	}
	s.pending = append(s.pending, p...)
	if !s.out.within() {
		s.letGo() // who waits for the end of a long frame
	}
	tell := s.flush.now()
	s.mu.Unlock()
	if tell {
		s.nudge()
	}
	return len(p), nil
}

// await returns once nothing is in the way of a frame, or the socket ends. It is
// called with mu held and gives it back while it waits.
func (s *Socket) await(blocked func() bool) {
	for blocked() && !s.closing && !s.over.Load() {
		if s.room == nil {
			s.room = make(chan struct{})
		}
		room := s.room
		s.mu.Unlock()
		select {
		case <-room:
		case <-s.ended:
		}
		s.mu.Lock()
	}
}

// idle tells whether no settlement can follow for now. It is called with mu held.
func (s *Socket) idle() bool { return s.resting.Load() && !s.lanes.busy() }

// rest is called before Read waits for the broker.
func (s *Socket) rest() {
	s.resting.Store(true)
	s.mu.Lock()
	tell := s.flush.rested()
	s.mu.Unlock()
	if tell {
		s.nudge()
	}
}

// follow looks at what the driver writes, except for its very first words,
// which are no frame.
func (s *Socket) follow(p []byte) {
	if s.out.between() && bytes.HasPrefix(p, []byte("AMQP")) {
		return
	}
	s.out.next(p)
}

func (s *Socket) full(n int) bool {
	return len(s.pending) > 0 && len(s.pending)+n > maxPending
}

// letGo lets those look again who wait in await.
func (s *Socket) letGo() {
	if s.room != nil {
		close(s.room)
		s.room = nil
	}
}

// nudge wakes the writer.
func (s *Socket) nudge() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// writeLoop puts what is pending on the wire until the socket ends, or is
// closing and nothing is left.
func (s *Socket) writeLoop() {
	defer close(s.writer)
	defer s.delay.Stop()
	for {
		batch, closing := s.take()
		if len(batch) > 0 {
			if err := s.writeOut(batch); err != nil {
				s.writeFailed(err)
				return
			}
			continue
		}
		if closing {
			s.farewell()
			return
		}
		select {
		case <-s.wake:
		case <-s.delay.C:
			s.expire()
		case <-s.ended:
			return
		}
	}
}

// farewell tells a TLS peer that nothing was cut off. Close bounds it.
func (s *Socket) farewell() {
	if c, ok := s.conn.(*tls.Conn); ok {
		_ = c.CloseWrite()
	}
}

// expire lets go out what has waited long enough.
func (s *Socket) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if wait := s.flush.expired(time.Since(s.start)); wait > 0 {
		s.delay.Reset(wait)
	}
}

// take swaps the buffers: what is pending goes out, the other fills up.
func (s *Socket) take() (batch []byte, closing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.flush.urgent && !s.closing {
		return nil, false
	}
	batch = s.pending
	s.pending, s.spare = s.spare[:0], batch
	s.flush.taken()
	s.letGo()
	return batch, s.closing
}

// writeOut writes in chunks, each under its own deadline.
func (s *Socket) writeOut(b []byte) error {
	for len(b) > 0 {
		s.armWrite()
		n, err := s.opts.transfer(s.conn.Write, b[:min(len(b), writeChunk)], s.Kill)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// armWrite begins the time of one write.
func (s *Socket) armWrite() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opts.WriteTimeout > 0 {
		s.limit = time.Now().Add(s.opts.WriteTimeout)
	}
	_ = s.conn.SetWriteDeadline(earlier(s.deadline, s.limit))
}

// earlier returns the earlier deadline; zero is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// writeFailed ends the socket for the reason of a failed write, after the
// reader had the chance to find the broker's own words for it.
func (s *Socket) writeFailed(err error) {
	s.blame(s.writeCause(err))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		grace := time.NewTimer(drainGrace)
		defer grace.Stop()
		select {
		case <-s.ended:
		case <-grace.C:
		}
	}
	s.end(true)
}

func (s *Socket) writeCause(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errtext.Because(fmt.Errorf("%w after %v", ErrWriteTimeout, s.opts.WriteTimeout), err)
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return errtext.Because(ErrPeerReset, err)
	case errors.Is(err, syscall.ETIMEDOUT):
		return errtext.Because(ErrUnconfirmed, err)
	}
	return err
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

func (s *Socket) LocalAddr() net.Addr  { return s.conn.LocalAddr() }
func (s *Socket) RemoteAddr() net.Addr { return s.conn.RemoteAddr() }

func (s *Socket) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

func (s *Socket) SetReadDeadline(t time.Time) error { return s.conn.SetReadDeadline(t) }

// SetWriteDeadline shortens the deadline of the write under way and of those that
// follow; it never lengthens the write timeout.
func (s *Socket) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deadline = t
	return s.conn.SetWriteDeadline(earlier(t, s.limit))
}

// scanner follows the frames in a stream, by their first bytes only. What makes no
// sense to it turns it off.
type scanner struct {
	visit func(head []byte) // sees each frame's beginning
	skip  uint64            // bytes to the next frame
	part  [headerHead]byte  // the beginning of a frame that a read cut
	have  int               // bytes in part
	off   bool              // what came were no frames
}

// next goes over the following bytes of the stream.
func (c *scanner) next(b []byte) {
	for len(b) > 0 && !c.off {
		if c.skip > 0 {
			b = b[c.pass(b):]
			continue
		}
		head := c.head(b)
		if head == nil {
			break
		}
		length := uint64(binary.BigEndian.Uint32(head[3:]))
		need := needed(head[0])
		if need == 0 || length+frameHead < uint64(need) {
			c.off = true
			break
		}
		c.visit(head)
		b = b[need-c.have:]
		c.have = 0
		c.skip = length + frameHead + 1 - uint64(need)
	}
}

// between tells whether the stream is between two frames.
func (c *scanner) between() bool { return c.skip == 0 && c.have == 0 && !c.off }

// within tells whether the rest of a frame is still to come.
func (c *scanner) within() bool { return !c.off && (c.skip > 0 || c.have > 0) }

// pass goes over the rest of a frame.
func (c *scanner) pass(b []byte) int {
	n := int(min(c.skip, uint64(len(b))))
	c.skip -= uint64(n)
	if c.skip == 0 && b[n-1] != frameEnd {
		c.off = true
	}
	return n
}

// head returns the beginning of a frame, joined where a read cut it; nil as
// long as too little of it is there.
func (c *scanner) head(b []byte) []byte {
	if c.have == 0 && len(b) >= len(c.part) {
		return b
	}
	have := c.have + copy(c.part[c.have:], b)
	if have < frameHead || have < needed(c.part[0]) {
		c.have = have
		return nil
	}
	return c.part[:]
}
