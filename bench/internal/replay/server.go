// Package replay is a stand-in for a broker that costs next to nothing: it
// speaks just enough AMQP 0-9-1 for a consumer, sends precomputed deliveries as
// fast as the prefetch window allows, and checks every acknowledgement. It runs
// in a process of its own, so that what a benchmark measures is the client.
package replay

import (
	"crypto/tls"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Stats is what a server has seen. Wrong counts settles of a tag that was not
// open: twice, unknown, or on a channel that is gone. CPU is what the whole
// process has used so far.
type Stats struct {
	Delivered, Settled, Wrong, Multiple, Subscriptions uint64

	Reads uint64 // of the clients' sockets: how many writes the acks came in

	CPU time.Duration
}

type counters struct {
	delivered, settled, wrong, multiple, subscriptions, reads atomic.Uint64

	stopped atomic.Bool
}

func (c *counters) snapshot() Stats {
	user, system := CPUTime()
	return Stats{
		CPU: user + system, Delivered: c.delivered.Load(), Settled: c.settled.Load(), Wrong: c.wrong.Load(),
		Multiple: c.multiple.Load(), Subscriptions: c.subscriptions.Load(), Reads: c.reads.Load(),
	}
}

// load is what a queue name asks for: "size=100" is 100-byte messages at wire
// speed, "size=100,every=1ms" one of them each millisecond.
type load struct {
	size  int
	every time.Duration
}

func parseLoad(queue string) (l load, err error) {
	for part := range strings.SplitSeq(queue, ",") {
		key, value, _ := strings.Cut(part, "=")
		switch key {
		case "size":
			l.size, err = strconv.Atoi(value)
		case "every":
			l.every, err = time.ParseDuration(value)
		default:
			err = fmt.Errorf("unknown key %q", key)
		}
		if err != nil {
			return l, fmt.Errorf("replay: queue %q: %w", queue, err)
		}
	}
	return l, nil
}

// Server is one address that clients dial. Its counters outlive its
// connections and its restarts.
type Server struct {
	stats  counters
	config *tls.Config // nil: plain

	mu    sync.Mutex
	addr  string
	ln    net.Listener
	conns map[*conn]*net.TCPConn
}

// Listen opens a server on a free loopback port. A nil config means no TLS.
func Listen(config *tls.Config) (*Server, error) {
	s := &Server{config: config, conns: map[*conn]*net.TCPConn{}}
	return s, s.listen("127.0.0.1:0")
}

func (s *Server) listen(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.ln, s.addr = ln, ln.Addr().String()
	s.mu.Unlock()
	go s.accept(ln)
	return nil
}

// Addr is the host:port to dial; it stays the same over a restart.
func (s *Server) Addr() string { return s.addr }

// Stats returns what has happened so far.
func (s *Server) Stats() Stats { return s.stats.snapshot() }

// Stop ends deliveries; settles are still taken.
func (s *Server) Stop() { s.stats.stopped.Store(true) }

// Resume ends what Stop has begun: the windows of the consumers that are there
// are filled.
func (s *Server) Resume() {
	s.stats.stopped.Store(false)
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		go c.refill()
	}
}

// Close resets every connection and stops listening.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.ln.Close()
	for _, tcp := range s.conns {
		reset(tcp)
	}
}

func (s *Server) accept(ln net.Listener) {
	for {
		nc, err := ln.Accept()
		if err != nil {
			return
		}
		go s.serve(nc.(*net.TCPConn))
	}
}

func (s *Server) serve(tcp *net.TCPConn) {
	var nc net.Conn = tcp
	if s.config != nil {
		nc = tls.Server(tcp, s.config)
	}
	// What ends a connection shows in the counters and at the client.
	_ = serve(nc, &s.stats, func(c *conn) func() { return s.track(c, tcp) })
}

func (s *Server) track(c *conn, tcp *net.TCPConn) (untrack func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[c] = tcp
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.conns, c)
	}
}

// ServeConn plays the server on one connection that the caller made, until it
// ends; deliveries stop with it. For benchmarks in one process.
func ServeConn(nc net.Conn) error {
	return serve(nc, new(counters), func(*conn) func() { return func() {} })
}
