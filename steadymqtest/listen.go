package steadymqtest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
)

// relayListener serves real TCP by carrying bytes to and from the in-memory network, so that every fault of that network applies.
type relayListener struct {
	b    *Broker
	host *Host
	tcp  net.Listener

	mu     sync.Mutex
	closed bool
	conns  []net.Conn
}

// Listen also serves real TCP, on a free port of 127.0.0.1, as another way to the first host, and returns its URL. The state and the faults
// are the same, as far as a socket can show them: a refused dial is accepted and then reset, one whose SYN is dropped
// is accepted and never answered, DNS does not fail. It may be called more than once. It panics when no port can be had.
//
// Sockets do not work in a synctest bubble.
func (b *Broker) Listen() string { return b.all[0].Listen() }

// Listen is [Broker.Listen] for this host.
func (h *Host) Listen() string {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(fmt.Sprintf("steadymqtest: %v", err))
	}
	b := h.b
	l := &relayListener{b: b, host: h, tcp: tcp}
	b.lock()
	defer b.unlock()
	b.listeners = append(b.listeners, l)
	b.wg.Add(1)
	go l.serve()
	if b.closed {
		l.close()
	}
	return b.urlOf(tcp.Addr().String())
}

// serve accepts until the listener is closed.
func (l *relayListener) serve() {
	defer l.b.wg.Done()
	for {
		nc, err := l.tcp.Accept()
		if err != nil {
			return
		}
		if !l.add(nc) {
			nc.Close()
			return
		}
		l.b.wg.Add(1)
		go l.relay(nc)
	}
}

func (l *relayListener) add(nc net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.conns = append(l.conns, nc)
	}
	return !l.closed
}

func (l *relayListener) remove(nc net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = slices.DeleteFunc(l.conns, func(other net.Conn) bool { return other == nc })
}

// relay carries one connection until both directions have ended.
func (l *relayListener) relay(nc net.Conn) {
	defer l.b.wg.Done()
	defer l.remove(nc)
	inner, err := l.b.Dial("tcp", l.host.address)
	if err != nil {
		abort(nc)
		return
	}
	up := make(chan struct{})
	go func() {
		defer close(up)
		if _, err := io.Copy(inner, nc); err != nil {
			abort(nc)
		}
		inner.Close() // also ends the other direction: a client that closes its side is done
	}()
	if _, err = io.Copy(nc, inner); errors.Is(err, syscall.ECONNRESET) {
		abort(nc)
	}
	nc.Close()
	inner.Close()
	<-up
}

// abort closes a socket by an RST.
func abort(nc net.Conn) {
	if tcp, ok := nc.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	nc.Close()
}

// close stops accepting and ends every relay.
func (l *relayListener) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	l.tcp.Close()
	for _, nc := range l.conns {
		nc.Close()
	}
}
