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

// Socket is the only net.Conn that the driver is given. It closes the holes that only the owner of
// the socket can close: a silent peer is noticed, a blocked write ends, and the first cause is kept
// where the driver says "501".
//
// Only Write and a settlement (while the buffer is full), Read and Close block, and Kill ends those
// at once.
//
// This file is its life and death. What it reads is in inbound.go, what it writes in outbound.go,
// and how it notices that a peer is silent in silence.go.
type Socket struct {
	conn  net.Conn // what the frames go through
	raw   net.Conn // what Kill closes: conn, or the connection under its TLS
	opts  Options
	start time.Time // the socket's times count from here

	end          end
	disconnected chan struct{}  // closed when raw has been closed, soon after the end
	running      sync.WaitGroup // the socket's own goroutines
	dog          watchdog       // only WatchPeer uses it, and then watch
	dogTimer     *time.Timer    // calls watch

	out outbound
	_   [cacheLine]byte
	in  inbound
}

// cacheLine keeps apart what the reader writes for every message and what the workers read for
// every message: on one cache line they take turns, at the cost of half of the throughput. These
// are two lines of the usual size, because many processors fetch them in pairs.
const cacheLine = 128

// Options are the limits of one socket; zero switches a limit off.
type Options struct {
	// IdleTimeout ends a socket that has read nothing for so long, from WatchPeer on.
	IdleTimeout time.Duration
	// WriteTimeout is the deadline of every write to the connection.
	WriteTimeout time.Duration
	// WriteDelay is the longest that a settlement waits to share a write.
	WriteDelay time.Duration
	// Refuse says why a body of so many bytes is not kept, nil if it is, unless its Receiver is a
	// Refuser. Without it all are.
	Refuse func(size uint64) error
	// Transfer calls Read or Write of the connection, which may be the user's and panic. It tells
	// broken of a panic, even where that ends the goroutine. Without it they are called directly.
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

// DefaultDial dials within timeout, with keep-alive as a safety net under the heartbeats.
// userTimeout is how long sent data may stay unacknowledged before the kernel gives the connection
// up, where the system offers that.
func DefaultDial(timeout, userTimeout time.Duration) DialFunc {
	d := &net.Dialer{Timeout: timeout, Control: userTimeoutControl(userTimeout)}
	return d.DialContext
}

// NewSocket makes a connection a Socket, which owns it from then on, and starts its writer.
func NewSocket(conn net.Conn, o Options) *Socket {
	s := &Socket{
		conn:         conn,
		raw:          conn,
		opts:         o,
		start:        time.Now(),
		end:          end{done: make(chan struct{})},
		disconnected: make(chan struct{}),
	}
	s.in.init(s)
	s.out.init(s)
	if c, ok := conn.(*tls.Conn); ok {
		s.raw = c.NetConn()
	}
	s.dogTimer = time.AfterFunc(time.Hour, s.watch)
	s.dogTimer.Stop()
	s.running.Go(s.out.writeLoop)
	return s
}

// end is why a socket ends, and whether it has. The cause may be known for a moment before the end
// comes: what the broker or the driver still has to say gets that moment.
type end struct {
	first  atomic.Pointer[error] // the first cause stays; it is nil after a plain Close
	closed atomic.Bool           // nothing more goes in or out
	done   chan struct{}         // closed right after closed is set
}

// blame keeps the first cause.
func (e *end) blame(cause error) { e.first.CompareAndSwap(nil, &cause) }

// close reports whether this call was the end.
func (e *end) close() (first bool) {
	if first = e.closed.CompareAndSwap(false, true); first {
		close(e.done)
	}
	return first
}

func (e *end) cause() error {
	if cause := e.first.Load(); cause != nil {
		return *cause
	}
	return nil
}

// Done is closed when the socket ends.
func (s *Socket) Done() <-chan struct{} { return s.end.done }

// Cause says why the socket ended: nil while it lives and after a plain Close.
func (s *Socket) Cause() error { return s.end.cause() }

// err is what a call on an ended socket returns.
func (s *Socket) err() error {
	if cause := s.Cause(); cause != nil {
		return cause
	}
	return net.ErrClosed
}

// Kill ends the socket at once, from any goroutine and in any state. It takes no lock and waits for
// nobody.
func (s *Socket) Kill(cause error) {
	s.end.blame(cause)
	s.disconnect(true)
}

// Close flushes what is pending, for at most the write timeout, and closes.
func (s *Socket) Close() error {
	s.out.stop()
	var limit <-chan time.Time
	if s.opts.WriteTimeout > 0 {
		timer := time.NewTimer(s.opts.WriteTimeout)
		defer timer.Stop()
		limit = timer.C
	}
	select {
	case <-s.out.done:
		s.end.blame(nil)
		s.disconnect(false)
	case <-s.end.done:
	case <-limit:
		s.Kill(fmt.Errorf("%w after %v: closed with data unsent", ErrWriteTimeout, s.opts.WriteTimeout))
	}
	return s.Cause()
}

// disconnect closes the connection underneath, once. The end is told first: a user's connection may
// take its time to close, and the healing need not wait for it.
func (s *Socket) disconnect(reset bool) {
	if !s.end.close() {
		return
	}
	s.dogTimer.Stop()
	defer close(s.disconnected)
	if reset {
		Abort(s.raw)
		return
	}
	closeConn(s.raw)
}

// Wait blocks until nothing of a socket that ends is left: the connection underneath, which whoever
// ended the socket may still be closing, and the socket's own goroutines.
func (s *Socket) Wait() {
	<-s.disconnected
	s.running.Wait()
}

// Abort closes a connection without waiting for what it still has to send. A FIN would queue behind
// that; a reset goes out now and the broker frees the messages in flight.
func Abort(conn net.Conn) {
	if c, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		_ = c.SetLinger(0)
	}
	closeConn(conn)
}

// closeConn closes a connection, which may be the user's: nothing can be done about a Close that
// panics.
func closeConn(conn net.Conn) {
	defer func() { _ = recover() }()
	_ = conn.Close()
}

// Mechanisms are those that the broker offers for the login, with blanks between them.
func (s *Socket) Mechanisms() string {
	if offer := s.in.offer.Load(); offer != nil {
		return *offer
	}
	return ""
}

// LocalAddr implements net.Conn.
func (s *Socket) LocalAddr() net.Addr { return s.conn.LocalAddr() }

// RemoteAddr implements net.Conn.
func (s *Socket) RemoteAddr() net.Addr { return s.conn.RemoteAddr() }

// SetDeadline implements net.Conn. For writing it only shortens the write timeout.
func (s *Socket) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (s *Socket) SetReadDeadline(t time.Time) error { return s.in.setDeadline(t) }

// setDeadline sets a deadline of the connection, which may be the user's and panic: that ends the
// socket. It is called under a lock, so the end, which closes the connection, comes on a goroutine
// of its own.
func (s *Socket) setDeadline(set func(net.Conn, time.Time) error, t time.Time) (err error) {
	returned := false
	defer func() {
		if returned {
			return
		}
		value := recover()
		if value == nil {
			value = "runtime.Goexit was called"
		}
		_, err = s.opts.transfer(func([]byte) (int, error) { panic(value) }, nil, func(err error) { go s.Kill(err) })
	}()
	err = set(s.conn, t)
	returned = true
	return err
}
