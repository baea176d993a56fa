package scenario

import (
	"context"
	"net"
	"sync"
)

// Sockets remembers what the consumer dialled, and counts what of it is still open. It does not
// stand in between: the library sees the kernel's own connection.
type Sockets struct {
	mu  sync.Mutex
	all []*net.TCPConn
}

// Dial dials without a limit of its own.
func (s *Sockets) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, conn.(*net.TCPConn))
	return conn, nil
}

// Open counts those that nobody has closed.
func (s *Sockets) Open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, conn := range s.all {
		raw, err := conn.SyscallConn()
		if err == nil && raw.Control(func(uintptr) {}) == nil {
			n++
		}
	}
	return n
}

func (s *Sockets) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, conn := range s.all {
		_ = conn.Close()
	}
}
