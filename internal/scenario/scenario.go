package scenario

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"runtime/pprof"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
)

// Scenario is one consumer on one real queue behind one proxy, and all that is needed to judge it.
// This file has its life: it is made, started, fed and waited for.
type Scenario struct {
	*testing.T
	Broker *rabbit.Broker
	Proxy  *faultproxy.Proxy // nil where the consumer dials the broker itself, see Directly
	Queue  string

	// For a test to change before Start.
	Workers, Prefetch int
	Handle            func(ctx context.Context, d *steadymq.Delivery, n int) error // nil takes 2 ms
	Options           []steadymq.Option
	TLS               *tls.Config // nil for plain amqp

	// What Start makes, and what judges it.
	Consumer     *steadymq.Consumer
	Cancel       context.CancelFunc
	Result       chan error // of Run
	Sockets      Sockets
	ConsumerLog  *Log
	Ledger       *Ledger
	Feeder       *Feeder
	ResumedAfter time.Duration // zero if the consumer did not have to resume

	group     *Group // that the consumer belongs to, nil for a consumer alone
	table     *Results
	notes     []string
	label     string       // of the goroutines
	elsewhere atomic.Value // the address that Lead sends a direct consumer to

	mu      sync.Mutex
	changes []steadymq.StateChange
}

var scenarios atomic.Int64

// New makes a scenario on a classic queue of its own. Its row goes into the table.
func New(t *testing.T, b *rabbit.Broker, table *Results) *Scenario {
	t.Helper()
	return NewOn(t, b, table, nil)
}

// NewOn is New with a queue that is declared with arguments. The queue has its kind from the start:
// a quorum queue or a stream with the name of a classic queue that was deleted may be marked as
// stopped by stop_app, for good (404; seen on 4.0 and 4.3, over 3 minutes, another stop_app and a
// restart of the node).
func NewOn(t *testing.T, b *rabbit.Broker, table *Results, args amqp.Table) *Scenario {
	t.Helper()
	proxy, err := faultproxy.New(b.Addr())
	require.NoError(t, err)
	s := newBehind(t, b, proxy, args)
	s.table = table
	t.Cleanup(s.cleanup)
	return s
}

// newBehind makes a scenario behind a proxy, and its queue. Somebody has to clean it up.
func newBehind(t *testing.T, b *rabbit.Broker, proxy *faultproxy.Proxy, args amqp.Table) *Scenario {
	t.Helper()
	id := scenarios.Add(1)
	s := &Scenario{
		T: t, Broker: b, Proxy: proxy, Queue: fmt.Sprintf("steadymq-test-%d-%d", time.Now().UnixNano(), id),
		Workers: 4, Prefetch: 16, ConsumerLog: new(Log), Ledger: NewLedger(), label: fmt.Sprintf("scenario-%d", id),
	}
	s.Feeder = NewFeeder(b.URL(), s.Queue, s.Ledger)
	require.NoError(t, b.DeclareQueue(s.Queue, args))
	return s
}

func (s *Scenario) cleanup() {
	s.Feeder.Stop()
	if s.Cancel != nil {
		s.Cancel()
		s.abandon() // whatever went wrong, Run comes back from a dead connection
		<-s.Result
	}
	if s.Proxy != nil {
		assert.NoError(s, s.Proxy.Close())
	}
	_ = s.Broker.DeleteQueue(s.Queue)
	if s.Failed() {
		s.Logf("log of the consumer:\n%s", s.ConsumerLog.String())
	}
}

// Start runs the consumer under a profiler label, which every goroutine that comes of it carries,
// whoever starts it.
func (s *Scenario) Start() {
	s.Helper()
	all := slices.Concat(s.pathOptions(), s.options())
	c, err := steadymq.New(s.address(), s.Queue, all...)
	require.NoError(s, err)
	ctx, cancel := context.WithCancel(context.Background())
	s.Consumer, s.Cancel, s.Result = c, cancel, make(chan error, 1)
	go pprof.Do(ctx, pprof.Labels("scenario", s.label), func(ctx context.Context) {
		s.Result <- c.Run(ctx, s.deliver)
		close(s.Result)
	})
}

// pathOptions are those of the connection.
func (s *Scenario) pathOptions() []steadymq.Option {
	all := []steadymq.Option{steadymq.WithHeartbeat(Heartbeat), steadymq.WithConnectionName(s.Queue), steadymq.WithDialer(s.dial)}
	if s.TLS != nil {
		all = append(all, steadymq.WithTLSConfig(s.TLS))
	}
	return all
}

// options are the others.
func (s *Scenario) options() []steadymq.Option {
	return append([]steadymq.Option{
		steadymq.WithConcurrency(s.Workers), steadymq.WithPrefetch(s.Prefetch),
		steadymq.WithSetupTimeout(SetupTimeout), steadymq.WithCloseTimeout(CloseTimeout), steadymq.WithDrainTimeout(DrainTimeout),
		steadymq.WithLogger(s.logger()), steadymq.WithHooks(steadymq.Hooks{StateChanged: s.Changed}),
	}, s.Options...)
}

func (s *Scenario) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(s.ConsumerLog, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// StartConsuming is Start, and waits until the consumer consumes.
func (s *Scenario) StartConsuming() {
	s.Helper()
	s.Start()
	s.Must(5*time.Second, "consuming", func() bool { return s.Consumer.State() == steadymq.Consuming })
}

// deliver is the handler: what it finishes goes into the ledger before the library can ack it.
func (s *Scenario) deliver(ctx context.Context, d *steadymq.Delivery) error {
	n, err := strconv.Atoi(d.MessageId)
	if err != nil {
		return steadymq.Discard(err)
	}
	s.Ledger.Start()
	if s.Handle != nil {
		err = s.Handle(ctx, d, n)
	} else {
		s.Pause(2 * time.Millisecond)
	}
	if err == nil {
		s.Ledger.Finish(n, d)
	}
	return err
}

// Changed is the hook that History is told by. Whoever sets other hooks has to call it.
func (s *Scenario) Changed(c steadymq.StateChange) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes = append(s.changes, c)
}

// History is every change of the consumer's state so far.
func (s *Scenario) History() []steadymq.StateChange {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.changes)
}

// losses are the ends of sessions that nobody asked for.
func (s *Scenario) losses() []steadymq.StateChange {
	return slices.DeleteFunc(s.History(), func(c steadymq.StateChange) bool {
		return c.From != steadymq.Consuming || c.To == steadymq.Draining
	})
}

// LostSessions counts the sessions that ended though nobody asked for it.
func (s *Scenario) LostSessions() int { return len(s.losses()) }

// Publish sends n messages and has them confirmed.
func (s *Scenario) Publish(n int) {
	s.Helper()
	require.NoError(s, s.Feeder.Publish(s.Context(), n, 0))
}

// Feed publishes in the background until the end of the scenario, whatever happens to the broker,
// and waits for the first fifty messages.
func (s *Scenario) Feed() {
	s.Helper()
	s.Feeder.Start()
	was := s.Ledger.Counts().Confirmed
	s.Must(20*time.Second, "messages are published", func() bool { return s.Ledger.Counts().Confirmed > was+50 })
}

// Note adds to the last column of the scenario's row.
func (s *Scenario) Note(format string, args ...any) {
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

// Holds polls until a condition is true or the limit is over. It polls on this goroutine; testify's
// Eventually goes on in another one after it has given up. The last look is past the limit, so that
// a machine that was away for a while condemns nobody.
func (s *Scenario) Holds(limit time.Duration, cond func() bool) bool {
	for end := time.Now().Add(limit); ; {
		last := time.Now().After(end)
		if cond() {
			return true
		}
		if last {
			return false
		}
		s.Pause(10 * time.Millisecond)
	}
}

// Must ends the test if the condition does not come true within the limit.
func (s *Scenario) Must(limit time.Duration, what string, cond func() bool) {
	s.Helper()
	if !s.Holds(limit, cond) {
		require.FailNow(s, "did not come true within "+limit.String()+": "+what)
	}
}

// Pause lets time pass.
func (s *Scenario) Pause(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	<-timer.C
}

// AwaitStarted waits until handlers were given n messages.
func (s *Scenario) AwaitStarted(n int) {
	s.Helper()
	s.Must(10*time.Second, "handlers have started", func() bool { return s.Ledger.Counts().Started >= n })
}

// AwaitFinished waits until handlers have finished every confirmed message.
func (s *Scenario) AwaitFinished() {
	s.Helper()
	s.Must(40*time.Second, "every confirmed message is finished", func() bool { return len(s.Ledger.Missing()) == 0 })
}

// SettledAll waits until every message is finished and its ack is on the wire.
func (s *Scenario) SettledAll() {
	s.Helper()
	s.AwaitFinished()
	s.Must(5*time.Second, "every ack is on the wire", func() bool { return len(s.AckedMessages()) == s.Ledger.Counts().Finished })
}
