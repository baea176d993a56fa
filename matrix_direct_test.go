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
// Twice: behind the proxy, which reads every ack, and directly at the broker's own socket.

// Directly takes the proxy away. What the wire would show, the consumer's own account shows, and that is held against the handlers'.
func (s *Scenario) Directly() {
	s.Helper()
	if why := rabbit.NoDirectWay(s.Context(), s.Broker); why != "" {
		s.Skip(why)
	}
	require.NoError(s, s.Proxy.Close())
	s.Proxy = nil
}

// BothWays are two scenarios that suffer the same: one behind a proxy, and one that dials the broker itself if that can be.
func BothWays(t *testing.T, b *rabbit.Broker, table *Results) []*Scenario {
	t.Helper()
	both := []*Scenario{NewScenario(t, b, table)}
	if why := rabbit.NoDirectWay(t.Context(), b); why != "" {
		t.Log(why)
		return both
	}
	s := NewScenario(t, b, table)
	s.Directly()
	return append(both, s)
}

// By is an address of the broker by the scenario's way: what a direct one dials does not depend on it.
func (s *Scenario) By(url string) string {
	if s.Proxy == nil {
		return url
	}
	return s.Proxy.URL(url)
}

func (s *Scenario) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if s.Proxy == nil {
		var err error
		if address, err = s.directAddr(ctx); err != nil {
			return nil, err
		}
	}
	return s.Sockets.Dial(ctx, network, address)
}

// directAddr is where the consumer is led, or the broker's own socket. While the broker's container is down its address is gone, as a name is
// from the DNS.
func (s *Scenario) directAddr(ctx context.Context) (string, error) {
	if led, ok := s.elsewhere.Load().(string); ok {
		return led, nil
	}
	addr, err := s.own(ctx, s.TLS != nil)
	if err != nil {
		err = &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: s.Broker.Addr(), IsNotFound: true}}
	}
	return addr, err
}

// own is the broker's own socket, for TLS or without.
func (s *Scenario) own(ctx context.Context, overTLS bool) (string, error) {
	if overTLS {
		return s.Broker.Direct(ctx, 5671)
	}
	return s.Broker.Direct(ctx, 5672)
}

// plainDial is that of the driver beside ours.
func (s *Scenario) plainDial(network, address string) (net.Conn, error) {
	const limit = 2 * time.Second
	if s.Proxy == nil {
		var err error
		if address, err = s.directAddr(s.Context()); err != nil {
			return nil, err
		}
	}
	return amqp.DefaultDial(limit)(network, address)
}

// lead sends the next dials to another address.
func (s *Scenario) Lead(addr string) {
	if s.Proxy == nil {
		s.elsewhere.Store(addr)
		return
	}
	s.Proxy.SetTarget(addr)
}

// PlainAddr and tlsAddr are the listeners that a dial can be led to.
func (s *Scenario) PlainAddr() string { return s.listener(s.Broker.Addr(), false) }
func (s *Scenario) TLSAddr() string   { return s.listener(s.Broker.TLSAddr(), true) }

func (s *Scenario) listener(published string, overTLS bool) string {
	if s.Proxy != nil {
		return published
	}
	addr, err := s.own(s.Context(), overTLS)
	require.NoError(s, err)
	return addr
}

// Cut ends the connection, if there is one at the moment, without a word: by a RST of the proxy, or the broker's own.
func (s *Scenario) Cut() {
	s.Helper()
	if s.Proxy == nil {
		s.aborted()
		return
	}
	s.Proxy.Reset()
}

// abort has the broker end the connection without a word.
func (s *Scenario) Abort() {
	s.Helper()
	require.Equal(s, "1", s.aborted(), "connections of the consumer")
}

func (s *Scenario) aborted() (connections string) {
	s.Helper()
	n, err := s.Broker.AbortNamed(s.Context(), s.Queue)
	require.NoError(s, err)
	return n
}

// Timed is when a fault began and when it had happened: a command to the broker takes its time, and somewhere in it the fault strikes.
func (s *Scenario) Timed(fault func()) (lost, done time.Time) {
	lost = time.Now()
	fault()
	return lost, time.Now()
}

// abandon ends the connection from our side.
func (s *Scenario) abandon() {
	if s.Proxy != nil {
		s.Proxy.Reset()
		return
	}
	s.Sockets.close()
}

func (s *Sockets) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, conn := range s.all {
		_ = conn.Close()
	}
}

// ---- what the wire would show ----

// ReadsTheWire says whether the proxy sees acks and deliveries.
func (s *Scenario) ReadsTheWire() bool { return s.Proxy != nil && s.TLS == nil }

func (s *Scenario) settlements() []faultproxy.Settlement {
	if s.Proxy == nil {
		return nil
	}
	return s.Proxy.Log().Settlements()
}

func (s *Scenario) deliveries() []faultproxy.Delivery {
	if s.Proxy == nil {
		return nil
	}
	return s.Proxy.Log().Deliveries()
}

// Delivered counts what has come from the broker.
func (s *Scenario) Delivered() int {
	if s.ReadsTheWire() {
		return len(s.deliveries())
	}
	return int(s.Consumer.Stats().Delivered) //nolint:gosec // thousands
}

// messagesToldAcked are the finished messages, once the consumer tells as many acks as there were handlings that could be acked.
func (s *Scenario) messagesToldAcked() []int {
	stats := s.Consumer.Stats()
	if stats.Acked+stats.Stale < uint64(s.Ledger.Handlings()) {
		return nil
	}
	return s.Ledger.Finished()
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
	r.refusedWithin(AtOnce, reason)
}

func (r *trial) refusedWithin(limit time.Duration, reason string) {
	r.Helper()
	r.Options = append(r.Options, steadymq.WithSetupTimeout(patient))
	began := time.Now()
	r.Start()
	var err error
	select {
	case err = <-r.Result:
	case <-time.After(5 * patient):
		require.FailNow(r, "Run does not give up")
	}
	took := time.Since(began)
	require.Error(r, err)
	assert.Contains(r, strings.ToLower(err.Error()), reason)
	assert.Contains(r, err.Error(), r.Queue, "the error names the queue")
	r.InTime(took, limit, "time until it is told")
	r.Note("Run tells after %s", inWords(took))
	assert.Zero(r, r.Consumer.Stats().Sessions)
	r.NothingLeft()
	r.AddRow(0)
}

// wrongPassword: one that a function gives may be about to change, so it is asked for three times, 1 s and up to 2 s apart. That of a URL is
// refused once, see TestRefusedByARealBroker.
func wrongPassword(r *trial) {
	asked := 0
	r.asUser(r.userOf(), func() string { asked++; return "wrong" })
	r.refusedWithin(3*time.Second+AtOnce, "login")
	assert.Equal(r, 3, asked)
}

func vhostMissing(r *trial) {
	r.Options = append(r.Options, steadymq.WithURLFunc(func(context.Context) (string, error) {
		return r.By(r.Broker.URLFor("guest", "guest", "missing")), nil
	}))
	r.refusedAtOnce("not found")
}

func vhostForbiddenAtStart(r *trial) {
	user := r.userOf()
	r.ok(r.Broker.Forbid(r.Context(), user, r.vhost))
	r.asUser(user, firstPassword)
	r.refusedAtOnce("access to vhost")
}

func readForbiddenAtStart(r *trial) {
	user := r.userOf()
	r.ok(r.Broker.Permit(r.Context(), user, r.vhost, ".*", ".*", "^$"))
	r.asUser(user, firstPassword)
	r.refusedAtOnce("refused for user")
}

// userDeleted: credentials of a store that makes users anew. The broker ends the connections of the old one.
func userDeleted(r *trial) {
	user := r.userOf()
	r.asUser(user, firstPassword)
	r.Options = append(r.Options, steadymq.WithSetupTimeout(patient))
	r.begin()
	at := time.Now()
	r.ok(r.Broker.DropUser(r.Context(), user))
	change := r.AwaitLost(0, at, time.Since(at)+AtOnce)
	assert.ErrorContains(r, change.Cause, "is deleted")
	r.toldOfLogin(at, 5*time.Second)
	healed := time.Now()
	r.ok(r.Broker.NewUser(r.Context(), user, firstPassword()))
	r.ok(r.Broker.Permit(r.Context(), user, r.vhost, ".*", ".*", ".*"))
	r.ResumedSince(healed, time.Now(), 4*time.Second+OperatorPace) // a refusal may take 3 s, and the next try is the third
	r.judge()
}

// toldOfLogin waits until a refused login was reported.
func (r *trial) toldOfLogin(since time.Time, limit time.Duration) {
	r.Helper()
	began := time.Now()
	var told time.Time
	r.Must(limit+10*time.Second, "a refused login", func() bool {
		for _, c := range r.History() {
			if c.Cause != nil && c.Time.After(since) && strings.Contains(strings.ToLower(c.Cause.Error()), "login") {
				told = c.Time
				return true
			}
		}
		return false
	})
	r.InTime(told.Sub(began), limit, "time until a refused login is told")
}
