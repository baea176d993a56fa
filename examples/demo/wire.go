package main

import (
	"context"
	"net"
	"sync"
	"syscall"
)

// wire is the network between the consumer and the broker, which the demo cuts.
type wire struct {
	mu    sync.Mutex
	down  bool
	conns []*net.TCPConn
}

// DialContext is what the consumer dials with.
func (w *wire) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	w.mu.Lock()
	down := w.down
	w.mu.Unlock()
	if down {
		return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns = append(w.conns, conn.(*net.TCPConn))
	return conn, nil
}

// reset closes all connections without a word.
func (w *wire) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.conns {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
	w.conns = nil
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
