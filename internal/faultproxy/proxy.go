package faultproxy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"sync"
	"time"
)

// Direction says which way bytes go.
type Direction int

// The directions, and both of them.
const (
	ToBroker Direction = 1 << iota
	ToClient
	Both = ToBroker | ToClient
)

func (d Direction) String() string {
	return map[Direction]string{ToBroker: "to broker", ToClient: "to client", Both: "both"}[d]
}

const dialLimit = 5 * time.Second

// Proxy is one listening address in front of one broker.
type Proxy struct {
	addr string
	log  *Log

	mu         sync.Mutex
	target     string
	listener   net.Listener // nil while connections are refused
	refusing   bool         // asked for
	targetDown bool         // seen
	closed     bool
	weather    [2]weather // by direction index
	changed    chan struct{}
	links      map[*link]struct{}
	accepted   int
	wg         sync.WaitGroup
	done       chan struct{}
}

// weather is what one direction suffers.
type weather struct {
	hole      bool
	paused    bool
	latency   time.Duration
	bandwidth int // bytes a second, 0 is unlimited
	slice     int // bytes a write, 0 is unlimited
	sliceGap  time.Duration
	cutAfter  int64 // for connections to come, 0 is never
	cutFIN    bool
}

// index of a single direction in weather.
func (d Direction) index() int { return int(d) - 1 }

// New listens on loopback in front of target, a host:port.
func New(target string) (*Proxy, error) {
	p := &Proxy{
		target: target, log: newLog(), changed: make(chan struct{}), links: map[*link]struct{}{}, done: make(chan struct{}),
	}
	lis, err := listenLow()
	if err != nil {
		return nil, err
	}
	p.addr = lis.Addr().String()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.serve(lis)
	return p, nil
}

// listenLow takes a port below the range the system hands out: while the proxy refuses, nobody else may take it, and a client that dials
// it must not be given it as its own port and connect to itself.
func listenLow() (net.Listener, error) {
	var last error
	for range 200 {
		lis, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10000+rand.IntN(10000)))
		if err == nil {
			return lis, nil
		}
		last = err
	}
	return nil, fmt.Errorf("faultproxy: %w", last)
}

// Addr is the host:port clients dial.
func (p *Proxy) Addr() string { return p.addr }

// URL is the broker's URL with the proxy's address in it.
func (p *Proxy) URL(broker string) string {
	u, err := url.Parse(broker)
	if err != nil {
		return "amqp://" + p.addr // the text may hold a password: no part of it is passed on
	}
	u.Host = p.addr
	return u.String()
}

// Log is what passed.
func (p *Proxy) Log() *Log { return p.log }

// SetTarget sends later connections to another broker.
func (p *Proxy) SetTarget(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = target
}

// Counts are connections, seen from the proxy.
type Counts struct {
	Accepted int // ever
	Clients  int // sockets of clients that are open: a client that closed its own is not counted, whatever the path does
	Brokers  int // sockets to the broker that are open
}

// Counts says how many connections there are.
func (p *Proxy) Counts() Counts {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := Counts{Accepted: p.accepted}
	for l := range p.links {
		if !l.clientGone.Load() {
			c.Clients++
		}
		if !l.brokerGone.Load() {
			c.Brokers++
		}
	}
	return c
}

// Close ends every connection and waits for all goroutines.
func (p *Proxy) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	close(p.done)
	p.stopListening()
	for l := range p.links {
		l.reset()
	}
	p.mu.Unlock()
	p.wg.Wait()
	return nil
}

// serve accepts on lis; p.mu is held.
func (p *Proxy) serve(lis net.Listener) {
	p.listener = lis
	p.wg.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			p.accept(conn.(*net.TCPConn))
		}
	})
}

// stopListening makes the kernel refuse; p.mu is held.
func (p *Proxy) stopListening() {
	if p.listener != nil {
		_ = p.listener.Close()
		p.listener = nil
	}
}

// listenAgain undoes stopListening if nothing stands against it; p.mu is held. The port is still ours: nobody is given one from this range.
func (p *Proxy) listenAgain() {
	if p.closed || p.refusing || p.targetDown || p.listener != nil {
		return
	}
	for range 50 {
		lis, err := net.Listen("tcp", p.addr)
		if err == nil {
			p.serve(lis)
			return
		}
		time.Sleep(10 * time.Millisecond) // the old listener's last moment
	}
}

func (p *Proxy) accept(client *net.TCPConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.listener == nil {
		rst(client)
		return
	}
	p.accepted++
	l := newLink(p, p.accepted, client)
	p.links[l] = struct{}{}
	p.wg.Go(l.run)
}

func (p *Proxy) forget(l *link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.links, l)
}

// probe looks at the target after it ended a connection; while it is down the proxy refuses.
func (p *Proxy) probe() {
	p.mu.Lock()
	target, busy := p.target, p.closed || p.targetDown
	p.mu.Unlock()
	if busy || targetUp(target) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.targetDown {
		return
	}
	p.targetDown = true
	p.stopListening()
	p.wg.Go(p.awaitTarget)
}

func (p *Proxy) awaitTarget() {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-p.done:
			return
		case <-tick.C:
		}
		p.mu.Lock()
		target := p.target
		p.mu.Unlock()
		if targetUp(target) {
			p.mu.Lock()
			p.targetDown = false
			p.listenAgain()
			p.mu.Unlock()
			return
		}
	}
}

// targetUp sends a protocol header and looks for an answer: a container engine accepts for a broker that does not listen yet and then
// hangs up. Silence is not absence: a frozen broker is up.
func targetUp(target string) bool {
	conn, err := net.DialTimeout("tcp", target, dialLimit)
	if err != nil {
		var timeout net.Error
		return errors.As(err, &timeout) && timeout.Timeout()
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
	_, _ = conn.Write([]byte(protocolHeader))
	_, err = conn.Read(make([]byte, 1))
	var timeout net.Error
	return err == nil || errors.As(err, &timeout) && timeout.Timeout()
}
