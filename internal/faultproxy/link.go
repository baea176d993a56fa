package faultproxy

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// link is one client connection and the broker connection behind it.
type link struct {
	p      *Proxy
	id     int
	client *net.TCPConn
	up     *pipe
	down   *pipe

	mu     sync.Mutex
	broker *net.TCPConn

	clientGone, brokerGone atomic.Bool
	ended                  chan struct{}
	end                    sync.Once
}

func newLink(p *Proxy, id int, client *net.TCPConn) *link {
	l := &link{p: p, id: id, client: client, ended: make(chan struct{})}
	conv := p.log.converse(id)
	l.up = newPipe(l, ToBroker, conv)
	l.down = newPipe(l, ToClient, conv)
	l.brokerGone.Store(true)
	for i, pipe := range []*pipe{l.up, l.down} {
		pipe.cutAt.Store(p.weather[i].cutAfter) // the caller holds p.mu
	}
	return l
}

// run dials the broker, as the network would: through a hole there is nobody to dial, and the client hangs.
func (l *link) run() {
	defer l.p.forget(l)
	defer l.reset()
	l.p.mu.Lock()
	target := l.p.target
	l.p.mu.Unlock()
	conn, err := net.DialTimeout("tcp", target, dialLimit)
	if err != nil {
		l.reset()
		l.p.probe()
		return
	}
	l.attach(conn.(*net.TCPConn))
	var pumps sync.WaitGroup
	pumps.Go(func() { l.up.pump(l.client, l.broker, &l.clientGone) })
	pumps.Go(func() { l.down.pump(l.broker, l.client, &l.brokerGone) })
	pumps.Wait()
}

func (l *link) attach(broker *net.TCPConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broker = broker
	l.brokerGone.Store(false)
	select {
	case <-l.ended:
		rst(broker)
		l.brokerGone.Store(true)
	default:
	}
}

func (l *link) reset() { l.finish(rst) }

func (l *link) fin() { l.finish(func(c *net.TCPConn) { _ = c.Close() }) }

func (l *link) finish(closing func(*net.TCPConn)) {
	l.end.Do(func() {
		close(l.ended)
		l.mu.Lock()
		defer l.mu.Unlock()
		closing(l.client)
		l.clientGone.Store(true)
		if l.broker != nil {
			closing(l.broker)
			l.brokerGone.Store(true)
		}
	})
}

func rst(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// wait sleeps, and says whether the link still lives.
func (l *link) wait(d time.Duration) bool {
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-l.ended:
		return false
	}
}

// settled waits until cond is false for the direction's weather, and says whether the link still lives.
func (l *link) settled(d Direction, cond func(weather) bool) bool {
	for {
		w, changed := l.p.now(d)
		if !cond(w) {
			return true
		}
		select {
		case <-changed:
		case <-l.ended:
			return false
		}
	}
}

var errCut = errors.New("faultproxy: cut")
