package steadymq_test

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
)

// What the broker itself does to a connection, it also does to one that has nothing in between: a proxy, and a port that a container engine
// publishes, turn a RST into a FIN and answer for a broker that is not there. So whoever logs in, is refused or is ended by the broker does so
// twice: behind the proxy, which reads every ack, and directly at the broker's own socket.

// directly takes the proxy away. What the wire would show, the consumer's own account shows, and that is held against the handlers'.
func (s *scenario) directly() {
	s.Helper()
	if why := rabbit.NoDirectWay(s.Context(), s.broker); why != "" {
		s.Skip(why)
	}
	require.NoError(s, s.proxy.Close())
	s.proxy = nil
}

// bothWays are two scenarios that suffer the same: one behind a proxy, and one that dials the broker itself if that can be.
func bothWays(t *testing.T, b *rabbit.Broker, table *results) []*scenario {
	t.Helper()
	both := []*scenario{newScenario(t, b, table)}
	if why := rabbit.NoDirectWay(t.Context(), b); why != "" {
		t.Log(why)
		return both
	}
	s := newScenario(t, b, table)
	s.directly()
	return append(both, s)
}

// by is an address of the broker by the scenario's way: what a direct one dials does not depend on it.
func (s *scenario) by(url string) string {
	if s.proxy == nil {
		return url
	}
	return s.proxy.URL(url)
}

func (s *scenario) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if s.proxy == nil {
		var err error
		if address, err = s.directAddr(ctx); err != nil {
			return nil, err
		}
	}
	return s.sockets.dial(ctx, network, address)
}

// directAddr is where the consumer is led, or the broker's own socket. While the broker's container is down its address is gone, as a name is
// from the DNS.
func (s *scenario) directAddr(ctx context.Context) (string, error) {
	if led, ok := s.elsewhere.Load().(string); ok {
		return led, nil
	}
	addr, err := s.own(ctx, s.tls != nil)
	if err != nil {
		err = &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: s.broker.Addr(), IsNotFound: true}}
	}
	return addr, err
}

// own is the broker's own socket, for TLS or without.
func (s *scenario) own(ctx context.Context, overTLS bool) (string, error) {
	if overTLS {
		return s.broker.Direct(ctx, 5671)
	}
	return s.broker.Direct(ctx, 5672)
}

// plainDial is that of the driver beside ours.
func (s *scenario) plainDial(network, address string) (net.Conn, error) {
	const limit = 2 * time.Second
	if s.proxy == nil {
		var err error
		if address, err = s.directAddr(s.Context()); err != nil {
			return nil, err
		}
	}
	return amqp.DefaultDial(limit)(network, address)
}

// lead sends the next dials to another address.
func (s *scenario) lead(addr string) {
	if s.proxy == nil {
		s.elsewhere.Store(addr)
		return
	}
	s.proxy.SetTarget(addr)
}

// plainAddr and tlsAddr are the listeners that a dial can be led to.
func (s *scenario) plainAddr() string { return s.listener(s.broker.Addr(), false) }
func (s *scenario) tlsAddr() string   { return s.listener(s.broker.TLSAddr(), true) }

func (s *scenario) listener(published string, overTLS bool) string {
	if s.proxy != nil {
		return published
	}
	addr, err := s.own(s.Context(), overTLS)
	require.NoError(s, err)
	return addr
}

// cut ends the connection, if there is one at the moment, without a word: by a RST of the proxy, or the broker's own.
func (s *scenario) cut() {
	s.Helper()
	if s.proxy == nil {
		s.aborted()
		return
	}
	s.proxy.Reset()
}

// abort has the broker end the connection without a word.
func (s *scenario) abort() {
	s.Helper()
	require.Equal(s, "1", s.aborted(), "connections of the consumer")
}

func (s *scenario) aborted() (connections string) {
	s.Helper()
	n, err := s.broker.AbortNamed(s.Context(), s.queue)
	require.NoError(s, err)
	return n
}

// timed is when a fault began and when it had happened: a command to the broker takes its time, and somewhere in it the fault strikes.
func (s *scenario) timed(fault func()) (lost, done time.Time) {
	lost = time.Now()
	fault()
	return lost, time.Now()
}

// abandon ends the connection from our side.
func (s *scenario) abandon() {
	if s.proxy != nil {
		s.proxy.Reset()
		return
	}
	s.sockets.close()
}

func (s *sockets) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, conn := range s.all {
		_ = conn.Close()
	}
}

// ---- what the wire would show ----

// readsTheWire says whether the proxy sees acks and deliveries.
func (s *scenario) readsTheWire() bool { return s.proxy != nil && s.tls == nil }

func (s *scenario) settlements() []faultproxy.Settlement {
	if s.proxy == nil {
		return nil
	}
	return s.proxy.Log().Settlements()
}

func (s *scenario) deliveries() []faultproxy.Delivery {
	if s.proxy == nil {
		return nil
	}
	return s.proxy.Log().Deliveries()
}

// delivered counts what has come from the broker.
func (s *scenario) delivered() int {
	if s.readsTheWire() {
		return len(s.deliveries())
	}
	return int(s.consumer.Stats().Delivered) //nolint:gosec // thousands
}

// messagesToldAcked are the finished messages, once the consumer tells as many acks as there were handlings that could be acked.
func (s *scenario) messagesToldAcked() []int {
	stats := s.consumer.Stats()
	if stats.Acked+stats.Stale < uint64(s.ledger.handlings()) {
		return nil
	}
	return s.ledger.finishedMessages()
}

// ---- refused at the start ----

// startCells are logins that the broker refuses, from the first or after a while.
func startCells() []cell {
	return []cell{
		{fault: "wrong password at the start", rows: "5", by: bothWay, test: wrongPassword},
		{fault: "vhost missing at the start", rows: "6", by: bothWay, test: vhostMissing},
		{fault: "vhost forbidden at the start", rows: "6", by: bothWay, test: vhostForbiddenAtStart},
		{fault: "read forbidden at the start", rows: "43", by: bothWay, test: readForbiddenAtStart},
		{fault: "user deleted and made again", rows: "5, 76", by: bothWay, test: userDeleted},
	}
}

// patient is a set-up limit beyond the 3 s after which RabbitMQ ends a refused login in silence.
const patient = 8 * time.Second

// refusedAtOnce holds Run against the figure for a consumer that cannot work: it says so by its error, at once, with what the broker said.
func (r *trial) refusedAtOnce(reason string) {
	r.Helper()
	r.refusedWithin(atOnce, reason)
}

func (r *trial) refusedWithin(limit time.Duration, reason string) {
	r.Helper()
	r.opts = append(r.opts, steadymq.WithSetupTimeout(patient))
	began := time.Now()
	r.start()
	var err error
	select {
	case err = <-r.result:
	case <-time.After(5 * patient):
		require.FailNow(r, "Run does not give up")
	}
	took := time.Since(began)
	require.Error(r, err)
	assert.Contains(r, strings.ToLower(err.Error()), reason)
	assert.Contains(r, err.Error(), r.queue, "the error names the queue")
	r.inTime(took, limit, "time until it is told")
	r.note("Run tells after %s", inWords(took))
	assert.Zero(r, r.consumer.Stats().Sessions)
	r.nothingLeft()
	r.row(0)
}

// wrongPassword: one that a function gives may be about to change, so it is asked for three times, 1 s and up to 2 s apart. That of a URL is
// refused once, see TestRefusedByARealBroker.
func wrongPassword(r *trial) {
	asked := 0
	r.asUser(r.userOf(), func() string { asked++; return "wrong" })
	r.refusedWithin(3*time.Second+atOnce, "login")
	assert.Equal(r, 3, asked)
}

func vhostMissing(r *trial) {
	r.opts = append(r.opts, steadymq.WithURLFunc(func(context.Context) (string, error) {
		return r.by(r.broker.URLFor("guest", "guest", "missing")), nil
	}))
	r.refusedAtOnce("not found")
}

func vhostForbiddenAtStart(r *trial) {
	user := r.userOf()
	r.ok(r.broker.Forbid(r.Context(), user, r.vhost))
	r.asUser(user, firstPassword)
	r.refusedAtOnce("access to vhost")
}

func readForbiddenAtStart(r *trial) {
	user := r.userOf()
	r.ok(r.broker.Permit(r.Context(), user, r.vhost, ".*", ".*", "^$"))
	r.asUser(user, firstPassword)
	r.refusedAtOnce("refused for user")
}

// userDeleted: credentials of a store that makes users anew. The broker ends the connections of the old one.
func userDeleted(r *trial) {
	user := r.userOf()
	r.asUser(user, firstPassword)
	r.opts = append(r.opts, steadymq.WithSetupTimeout(patient))
	r.begin()
	at := time.Now()
	r.ok(r.broker.DropUser(r.Context(), user))
	change := r.awaitLost(0, at, time.Since(at)+atOnce)
	assert.ErrorContains(r, change.Cause, "is deleted")
	r.toldOfLogin(at, 5*time.Second)
	healed := time.Now()
	r.ok(r.broker.NewUser(r.Context(), user, firstPassword()))
	r.ok(r.broker.Permit(r.Context(), user, r.vhost, ".*", ".*", ".*"))
	r.resumedSince(healed, time.Now(), 4*time.Second+operatorPace) // a refusal may take 3 s, and the next try is the third
	r.judge()
}

// toldOfLogin waits until a refused login was reported.
func (r *trial) toldOfLogin(since time.Time, limit time.Duration) {
	r.Helper()
	began := time.Now()
	var told time.Time
	r.must(limit+10*time.Second, "a refused login", func() bool {
		for _, c := range r.history() {
			if c.Cause != nil && c.Time.After(since) && strings.Contains(strings.ToLower(c.Cause.Error()), "login") {
				told = c.Time
				return true
			}
		}
		return false
	})
	r.inTime(told.Sub(began), limit, "time until a refused login is told")
}
