package steadymqtest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// addr is the address of an end of a connection on the in-memory network.
type addr string

func (addr) Network() string  { return "tcp" }
func (a addr) String() string { return string(a) }

// link is one connection of the in-memory network: two streams and the two ends that read and write them.
type link struct {
	host           *Host
	toBroker       *stream
	toClient       *stream
	client, broker *end
}

// end is the net.Conn of one side of a link.
type end struct {
	in, out       *stream
	local, remote addr
	once          sync.Once
	closed        func() // called once, after Close; may be nil
}

func newLink(h *Host, from addr) *link {
	l := &link{host: h, toBroker: newStream(h.net.latency), toClient: newStream(h.net.latency)}
	to := addr(h.address)
	l.client = &end{in: l.toClient, out: l.toBroker, local: from, remote: to}
	l.broker = &end{in: l.toBroker, out: l.toClient, local: to, remote: from}
	l.toClient.cut, l.toBroker.cut = h.net.cutToClient, h.net.cutToBroker
	l.toClient.onCut, l.toBroker.onCut = l.cutOff, l.cutOff
	l.toBroker.zero = h.net.zeroWindow
	l.toBroker.stalled, l.toClient.stalled = h.net.stalled, h.net.stalled
	return l
}

// reset aborts the connection as the broker's kernel does on close with linger zero. In a black hole the client never hears of it.
func (l *link) reset() {
	l.toClient.mu.Lock()
	heard := !l.toClient.hole && !l.toClient.lost
	l.toClient.mu.Unlock()
	l.toClient.reset(heard, true)
	l.toBroker.reset(true, heard)
	if !heard {
		l.toClient.update(func(s *stream) { s.lost = true })
		l.toBroker.update(func(s *stream) { s.lost = true })
	}
}

// cutOff breaks a connection that has carried the bytes it was allowed: the client reads them and then the end of the stream.
func (l *link) cutOff() {
	l.toClient.closeWrite()
	l.toBroker.reset(true, false)
	l.toBroker.update(func(s *stream) { s.lost = true })
}

func (e *end) Read(p []byte) (int, error) {
	n, err := e.in.read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // read returns it bare
		err = e.opError("read", err)
	}
	return n, err
}

func (e *end) Write(p []byte) (int, error) {
	if e.in.fin.Load() && e.out.abandoned() {
		return 0, e.opError("write", os.NewSyscallError("write", syscall.EPIPE))
	}
	n, err := e.out.write(p)
	if err != nil {
		err = e.opError("write", err)
	}
	return n, err
}

// abandoned reports whether the reading end has closed the stream: a write is answered with an RST then.
func (s *stream) abandoned() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.readClosed && !s.hole && !s.writeClosed && s.writeErr == nil
}

// CloseWrite sends a FIN and leaves the other direction open, as that of net.TCPConn does.
func (e *end) CloseWrite() error {
	e.out.closeWrite()
	return nil
}

// Close ends both directions. Closing twice is fine.
func (e *end) Close() error {
	err := e.opError("close", net.ErrClosed)
	e.once.Do(func() {
		e.out.closeWrite()
		e.in.closeRead()
		if e.closed != nil {
			e.closed()
		}
		err = nil
	})
	return err
}

func (e *end) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: e.local, Addr: e.remote, Err: err}
}

func (e *end) LocalAddr() net.Addr  { return e.local }
func (e *end) RemoteAddr() net.Addr { return e.remote }

func (e *end) SetDeadline(t time.Time) error {
	e.in.readLimit.set(t)
	e.out.writeLimit.set(t)
	return nil
}

func (e *end) SetReadDeadline(t time.Time) error {
	e.in.readLimit.set(t)
	return nil
}

func (e *end) SetWriteDeadline(t time.Time) error {
	e.out.writeLimit.set(t)
	return nil
}

// netFaults is the state of the network in front of one host.
type netFaults struct {
	refuse, dropSYN, dns       bool
	holeToBroker, holeToClient bool
	stalled, zeroWindow        bool
	latency                    time.Duration
	cutToClient, cutToBroker   int
}

// Dialer returns the dial function of the broker's in-memory network, with the signature of [net.Dialer.DialContext]. It knows
// the hosts of this broker and nothing else: no packet leaves the process. A dial takes one round trip (twice the latency) and
// fails as a real one does: *[net.OpError] holding ECONNREFUSED, a timeout or a *[net.DNSError].
//
// The function may be used by any number of goroutines, in the bubble in which the broker was made.
func (b *Broker) Dialer() func(ctx context.Context, network, addr string) (net.Conn, error) {
	return b.dial
}

// Dial is [Broker.Dialer] without a context: the signature of the Dial field of the driver's Config.
func (b *Broker) Dial(network, addr string) (net.Conn, error) {
	return b.dial(context.Background(), network, addr)
}

func (b *Broker) dial(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := b.tryDial(ctx, address)
	b.lock()
	b.ledger.dials = append(b.ledger.dials, Dial{Addr: address, Time: b.now, Err: err})
	b.unlock()
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: addr(address), Err: err}
	}
	return nc, nil
}

// synRetries is how many times Linux sends a SYN again: after 1, 3, 7, 15, 31 and 63 s, to give up at 127 s.
const synRetries = 6

func (b *Broker) tryDial(ctx context.Context, address string) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, dialError(err)
	}
	h := b.lookup(address)
	if h == nil {
		name, _, _ := net.SplitHostPort(address)
		return nil, &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
	}
	for retry := 0; ; retry++ {
		l, wait, err := h.syn()
		lost := l == nil && err == nil
		if lost {
			wait = time.Second << retry
		}
		if stop := b.pause(ctx, wait); stop != nil {
			if l != nil {
				l.client.Close()
			}
			return nil, dialError(stop)
		}
		if !lost {
			return connOf(l), err
		}
		if retry == synRetries {
			return nil, os.NewSyscallError("connect", syscall.ETIMEDOUT)
		}
	}
}

func connOf(l *link) net.Conn {
	if l == nil {
		return nil
	}
	return l.client
}

// lookup finds the host of an address.
func (b *Broker) lookup(address string) *Host {
	for _, h := range b.all {
		if h.address == address {
			return h
		}
	}
	return nil
}

// syn is one try to connect: a link or an error, with the time until the client knows of it; neither when the SYN was lost.
func (h *Host) syn() (*link, time.Duration, error) {
	b := h.b
	b.lock()
	defer b.unlock()
	switch {
	case h.net.dns:
		return nil, 0, &net.DNSError{Err: "server misbehaving", Name: h.name, IsTemporary: true}
	case b.closed || h.net.refuse && !h.net.dropSYN:
		return nil, 2 * h.net.latency, os.NewSyscallError("connect", syscall.ECONNREFUSED)
	case h.net.dropSYN || h.net.holeToBroker || h.net.holeToClient || h.net.stalled:
		return nil, 0, nil
	}
	b.ports++
	l := newLink(h, addr(clientAddress(b.ports)))
	b.accept(l)
	return l, 2 * h.net.latency, nil
}

// pause waits, unless ctx or the broker ends first.
func (b *Broker) pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-b.done:
		return os.NewSyscallError("connect", syscall.ECONNREFUSED)
	}
}

// dialError turns the end of a context into what package net returns for it.
func dialError(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return dialTimeout{}
	}
	if errors.Is(err, context.Canceled) {
		return dialCanceled{}
	}
	return err
}

type dialTimeout struct{}

func (dialTimeout) Error() string     { return "i/o timeout" }
func (dialTimeout) Timeout() bool     { return true }
func (dialTimeout) Temporary() bool   { return true }
func (dialTimeout) Is(err error) bool { return err == context.DeadlineExceeded }

type dialCanceled struct{}

func (dialCanceled) Error() string     { return "operation was canceled" }
func (dialCanceled) Is(err error) bool { return err == context.Canceled }
