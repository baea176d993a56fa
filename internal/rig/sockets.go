package rig

import (
	"context"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// CountingDialer counts the sockets that are open on this side.
type CountingDialer struct {
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	Open atomic.Int64
}

// DialContext is for WithDialer.
func (d *CountingDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := d.Dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	d.Open.Add(1)
	return &CountedConn{Conn: conn, Closed: sync.OnceFunc(func() { d.Open.Add(-1) })}, nil
}

// CountedConn is a connection that tells of its Close before it closes.
type CountedConn struct {
	net.Conn
	Closed func()
}

// Close calls Closed, then that of the connection.
func (c *CountedConn) Close() error {
	c.Closed()
	return c.Conn.Close()
}

// DriverGoroutines returns how many goroutines of the driver there are.
func DriverGoroutines() int { return goroutinesOf("amqp091-go.") }

// ClientGoroutines returns how many goroutines there are of the library and of the driver, those
// that call Run included.
func ClientGoroutines() int {
	return goroutinesOf("amqp091-go.", "github.com/steadymq/steadymq.(", "github.com/steadymq/steadymq/internal/wire.(")
}

// goroutinesOf returns how many goroutines are in a function whose name holds one of the texts.
func goroutinesOf(functions ...string) (n int) {
	stacks := make([]byte, 8<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for g := range strings.SplitSeq(string(stacks), "\n\n") {
		if slices.ContainsFunc(functions, func(name string) bool { return strings.Contains(g, name) }) {
			n++
		}
	}
	return n
}
