package steadymqtest

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"
)

// TB is the part of *testing.T that a broker uses.
type TB interface {
	Helper()
	Cleanup(func())
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Broker is an in-process AMQP 0-9-1 broker for tests and demos. Make one with [NewBroker].
//
// All methods may be called by any number of goroutines. None blocks but Close, the Wait methods, and dialing. The embedded
// [Faults] act on all hosts; those of one host are at [Broker.Host].
type Broker struct {
	Faults

	// URL is the AMQP URL of the first host, with the credentials of the first user. It works only with [Broker.Dialer]: the
	// name does not exist outside this process. For real TCP see [Broker.Listen].
	URL string

	cfg   config
	all   []*Host
	users []string
	certs *certificates
	done  chan struct{}
	wg    sync.WaitGroup // every goroutine of the broker

	// mu guards everything below and the state of hosts, connections, channels and queues. It is held for short moments only,
	// never while a goroutine blocks.
	mu        sync.Mutex
	now       time.Time // when mu was taken
	closed    bool
	queues    map[string]*queue
	exchanges map[string]*exchange
	conns     []*conn
	pumps     []*queue // queues that may have something to deliver
	flushes   []*conn  // connections with something to send
	waiters   []*waiter
	ledger    ledger
	ports     int
	lastConn  uint64
	lastChan  uint64
	lastMsg   uint64
	lastName  uint64
	listeners []*relayListener

	blockReason string                 // not empty: an alarm is on
	alarms      int                    // how many there were
	permissions map[string]permissions // by user; who is not in it may do all

	events      []func() // hooks to call, in order
	dispatching bool
}

// NewBroker starts a broker that listens on its own in-memory network. With t it closes itself when the test ends; t may be nil,
// then the caller must call Close. It panics on options that make no sense.
//
// In a synctest bubble make it inside the bubble.
func NewBroker(t TB, opts ...Option) *Broker {
	cfg := config{hosts: 1, users: map[string]string{}, heartbeat: 60, major: 4, minor: 3, timeoutForm: FormOfVersion, deadRetry: deadRetry}
	var order []string
	for _, o := range opts {
		before := len(cfg.users)
		o(&cfg)
		if len(cfg.users) > before {
			order = append(order, newKey(cfg.users, order))
		}
	}
	if cfg.timeoutForm == FormOfVersion {
		cfg.timeoutForm = Form406
		if cfg.since(4, 3) {
			cfg.timeoutForm = FormCancel
		}
	}
	if cfg.hosts < 1 {
		panic(fmt.Sprintf("steadymqtest: WithHosts(%d): a broker has at least one host", cfg.hosts))
	}
	if len(order) == 0 {
		cfg.users["guest"] = "guest"
		order = []string{"guest"}
	}
	b := &Broker{cfg: cfg, users: order, done: make(chan struct{}), queues: map[string]*queue{}, exchanges: map[string]*exchange{}}
	b.ledger.off = cfg.noLedger
	b.addHosts()
	b.addExchanges()
	if cfg.tls {
		b.certs = newCertificates(b.hostNames())
	}
	b.URL = b.URLs()[0]
	if t != nil {
		t.Helper()
		t.Cleanup(b.Close)
	}
	return b
}

// newKey is the user that is not in order yet.
func newKey(users map[string]string, order []string) string {
	for name := range users {
		if !slices.Contains(order, name) {
			return name
		}
	}
	return ""
}

func (b *Broker) addHosts() {
	port := ":5672"
	if b.cfg.tls {
		port = ":5671"
	}
	for i := range b.cfg.hosts {
		name := "mq" + strconv.Itoa(i+1) + ".test"
		h := &Host{name: name, address: name + port}
		h.net = netFaults{latency: b.cfg.latency, cutToClient: -1, cutToBroker: -1}
		h.Faults = Faults{b: b, hosts: []*Host{h}}
		b.all = append(b.all, h)
	}
	b.Faults = Faults{b: b, hosts: b.all}
}

func (b *Broker) hostNames() []string {
	var names []string
	for _, h := range b.all {
		names = append(names, h.name)
	}
	return names
}

// URLs returns the AMQP URL of every host, in order, with the password that is valid now. See the field URL.
func (b *Broker) URLs() []string {
	b.lock()
	defer b.unlock()
	var urls []string
	for _, h := range b.all {
		urls = append(urls, b.urlOf(h.address))
	}
	return urls
}

func (b *Broker) urlOf(address string) string {
	u := url.URL{Scheme: "amqp", Host: address, Path: "/", User: url.UserPassword(b.users[0], b.cfg.users[b.users[0]])}
	if b.cfg.tls {
		u.Scheme = "amqps"
	}
	return u.String()
}

// SetPassword changes the password of a user, or adds the user: the next login needs it, open connections stay. An empty
// password locks the user out.
func (b *Broker) SetPassword(user, password string) {
	b.lock()
	defer b.unlock()
	b.cfg.users[user] = password
}

// Host is one address of the broker. Its [Faults] act on the connections that use this address.
type Host struct {
	Faults
	name, address string
	net           netFaults
	wire          wireFaults
	conns         []*conn
}

// Host returns the i-th host, counted from 0. It panics when there is none.
func (b *Broker) Host(i int) *Host { return b.all[i] }

// Addr returns the host's address on the in-memory network, such as "mq1.test:5672".
func (h *Host) Addr() string { return h.address }

// Close ends all connections without a word, as a killed process does, and returns when every goroutine of the broker has ended.
// Waiting and dialing calls return an error. Closing twice is fine.
func (b *Broker) Close() {
	b.lock()
	if !b.closed {
		b.closed = true
		close(b.done)
		for _, l := range b.listeners {
			l.close()
		}
		for _, c := range slices.Clone(b.conns) {
			c.abort("broker closed")
		}
		for _, q := range b.queues {
			q.stopTimers()
		}
	}
	b.unlock()
	b.wg.Wait()
}

// lock takes the broker's mutex. Whoever has it changes state and calls unlock, which does all that follows from the change.
func (b *Broker) lock() {
	b.mu.Lock()
	b.now = time.Now()
}

// unlock delivers what can be delivered, sends what is to be sent, wakes who waited, lets the mutex go and calls the hooks.
func (b *Broker) unlock() {
	b.deliver()
	for _, c := range b.flushes {
		c.flush()
	}
	b.flushes = b.flushes[:0]
	b.wake()
	if len(b.events) == 0 || b.dispatching {
		b.mu.Unlock()
		return
	}
	b.dispatch()
}

// deliver gives the consumers what the queues have for them.
func (b *Broker) deliver() {
	for len(b.pumps) > 0 {
		q := b.pumps[0]
		b.pumps = b.pumps[1:]
		q.pending = false
		q.pump()
	}
	b.pumps = nil
}

// dispatch calls the hooks; whoever comes meanwhile leaves its own for this loop, which keeps them in order.
func (b *Broker) dispatch() {
	b.dispatching = true
	for len(b.events) > 0 {
		events := b.events
		b.events = nil
		b.mu.Unlock()
		for _, call := range events {
			call()
		}
		b.mu.Lock()
	}
	b.dispatching = false
	b.mu.Unlock()
}

// after runs f under the broker's lock after d, unless the broker has been closed by then.
func (b *Broker) after(d time.Duration, f func()) *time.Timer {
	return time.AfterFunc(d, func() {
		b.lock()
		defer b.unlock()
		if !b.closed {
			f()
		}
	})
}

// waiter is a call that waits for a condition.
type waiter struct {
	met  func() bool
	done chan struct{}
}

func (b *Broker) wake() {
	b.waiters = slices.DeleteFunc(b.waiters, func(w *waiter) bool {
		if !w.met() {
			return false
		}
		close(w.done)
		return true
	})
}

// wait blocks until the condition is met; what names it in the error.
func (b *Broker) wait(ctx context.Context, what func() string, met func() bool) error {
	w := &waiter{met: met, done: make(chan struct{})}
	b.lock()
	b.waiters = append(b.waiters, w)
	b.unlock()
	var err error
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-b.done:
		err = errBrokerClosed
	}
	b.lock()
	defer b.unlock()
	b.waiters = slices.DeleteFunc(b.waiters, func(other *waiter) bool { return other == w })
	return fmt.Errorf("steadymqtest: waiting for %s: %w", what(), err)
}

var errBrokerClosed = fmt.Errorf("broker closed")

// WaitSettled blocks until the queue is empty and nothing delivered from it is unsettled; for a stream, until every consumer has
// settled its last message. It returns an error, with what was left, when ctx or the broker ends first, or there is no such queue then.
// Publish first: an untouched queue is settled already.
func (b *Broker) WaitSettled(ctx context.Context, queue string) error {
	what := func() string {
		q := b.queues[queue]
		if q == nil {
			return fmt.Sprintf("queue %q, which does not exist,", queue)
		}
		return fmt.Sprintf("queue %q to be settled (%d ready, %d unsettled, %d consumers)", queue, q.length(), q.unacked, len(q.consumers))
	}
	return b.wait(ctx, what, func() bool {
		q := b.queues[queue]
		return q != nil && q.settled()
	})
}

// WaitConsumers blocks until the queue has exactly n consumers. A queue that does not exist has none.
func (b *Broker) WaitConsumers(ctx context.Context, queue string, n int) error {
	count := func() int {
		if q := b.queues[queue]; q != nil {
			return len(q.consumers)
		}
		return 0
	}
	what := func() string { return fmt.Sprintf("%d consumers of queue %q (%d)", n, queue, count()) }
	return b.wait(ctx, what, func() bool { return count() == n })
}

// WaitConnections blocks until exactly n connections are open.
func (b *Broker) WaitConnections(ctx context.Context, n int) error {
	what := func() string { return fmt.Sprintf("%d connections (%d)", n, b.openConns()) }
	return b.wait(ctx, what, func() bool { return b.openConns() == n })
}

func (b *Broker) openConns() int {
	n := 0
	for _, c := range b.conns {
		if c.state == stateOpen {
			n++
		}
	}
	return n
}

// Connections returns the connections that are open as far as the broker knows, oldest first. A client that fell silent is among
// them for two to three heartbeats, as on a real broker.
func (b *Broker) Connections() []ConnectionRecord {
	b.lock()
	defer b.unlock()
	var open []ConnectionRecord
	for _, c := range b.conns {
		if c.state == stateOpen {
			open = append(open, c.record)
		}
	}
	return open
}
