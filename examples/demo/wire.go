package main

import (
	"context"
	"io"
	"net"
	"sync"
	"syscall"
)

// wire is the network between the consumer and the broker, which the demo cuts. It
// relays, so that what it does reaches the consumer from outside, as a router's
// reset does.
type wire struct {
	mu   sync.Mutex
	down bool
	far  []*net.TCPConn // the ends of the consumer's connections
}

// DialContext is what the consumer dials with.
func (w *wire) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	w.mu.Lock()
	down := w.down
	w.mu.Unlock()
	if down {
		return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
	}
	broker, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	near, far, err := pair(ctx)
	if err != nil {
		_ = broker.Close()
		return nil, err
	}
	go relay(far, broker)
	go relay(broker, far)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.far = append(w.far, far)
	return near, nil
}

// pair returns both ends of a TCP connection.
func pair(ctx context.Context) (near net.Conn, far *net.TCPConn, err error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if near, err = new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String()); err != nil {
		return nil, nil, err
	}
	accepted, err := l.Accept()
	if err != nil {
		_ = near.Close()
		return nil, nil, err
	}
	return near, accepted.(*net.TCPConn), nil
}

// relay ends with either side.
func relay(to, from net.Conn) {
	_, _ = io.Copy(to, from)
	_ = to.Close()
}

// reset ends all connections as a router or firewall does that has lost them.
func (w *wire) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.far {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
	w.far = nil
}

// cut resets all connections and refuses new ones, mend ends that.
func (w *wire) cut() {
	w.mu.Lock()
	w.down = true
	w.mu.Unlock()
	w.reset()
}

func (w *wire) mend() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down = false
}
