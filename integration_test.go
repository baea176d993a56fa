package steadymq_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"regexp"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
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

// Limits of the scenarios. The heartbeat is short because detection scales with it; the bounds below are those of docs/FAULTS.md, computed from these.
const (
	Heartbeat    = 2 * time.Second
	SetupTimeout = 3 * time.Second
	CloseTimeout = 5 * time.Second // the default: a busy broker needs more than one
	DrainTimeout = 20 * time.Second

	// AtOnce bounds healing from what the broker or the kernel tells us about. The figure to reach is half of it; the machine is shared.
	AtOnce = time.Second
	// SilentPeer bounds noticing that nothing arrives any more, halfOpen that nothing of ours does: the second is the broker's to
	// notice, in 2 to 3 heartbeats, because an in-process proxy acknowledges our bytes to the kernel.
	SilentPeer = 3*Heartbeat/2 + 500*time.Millisecond
	DeadReader = 5*Heartbeat/2 + 500*time.Millisecond // of the driver, which then sees no heartbeats either
	HalfOpen   = 3*Heartbeat + time.Second
	// AfterRefusals bounds resuming once a broker that refused accepts; afterSilence once one that swallowed answers.
	AfterRefusals = 1200*time.Millisecond + 300*time.Millisecond // the proxy needs a moment to see it, too
	AfterSilence  = SetupTimeout + 10*time.Second + time.Second
	// OperatorPace bounds the next try after two seconds of a missing queue.
	OperatorPace = 5 * time.Second
)

// TestOnARealBroker runs every fault that has a command or a network to break. Each scenario has its own queue and its own proxy, so they
// run side by side; those that stop or change the broker have a broker of their own.
func TestOnARealBroker(t *testing.T) {
	if testing.Short() {
		t.Skip("takes minutes")
	}
	var table Results
	t.Cleanup(func() { t.Log(table.String()) })
	brokers := rabbit.StartAll(t, // first of all, because a broker that starts takes all processors
		rabbit.Config{},
		rabbit.Config{},
		rabbit.Config{},
		rabbit.Config{Generation: rabbit.Gen310, ConsumerTimeout: 3 * time.Second, ChannelTick: time.Second},
	)

	// Subtests from goroutines, not t.Parallel: they wait far more than they work, and that would run only as many as there are processors.
	var all sync.WaitGroup
	run := func(name string, test func(*Scenario)) {
		all.Go(func() {
			t.Run(name, func(t *testing.T) { test(NewScenario(t, brokers[0], &table)) })
		})
	}
	for name, test := range map[string]func(*Scenario){
		"an operator closes the connection":                  operatorCloses,
		"the connection is reset":                            func(s *Scenario) { instant(s, s.Proxy.Reset) },
		"the connection is ended politely":                   func(s *Scenario) { instant(s, s.Proxy.FIN) },
		"an ack is sent twice behind our back":               doubleAck,
		"the queue is deleted and declared by us":            queueDeletedOurs,
		"the queue is deleted and declared by another":       queueDeletedTheirs,
		"the path swallows both ways for 32 s":               func(s *Scenario) { silence(s, faultproxy.Both, SilentPeer) },
		"the path swallows what the broker sends for 32 s":   func(s *Scenario) { silence(s, faultproxy.ToClient, SilentPeer) },
		"the path swallows what we send for 32 s":            func(s *Scenario) { silence(s, faultproxy.ToBroker, HalfOpen) },
		"the path stalls for less than a heartbeat":          shortStall,
		"the queue is absent at the start":                   queueAbsentAtStart,
		"20 connections are killed half a second apart":      twentyKills,
		"handlers panic":                                     handlersPanic,
		"handlers run over a reconnect and ack then":         lateAcks,
		"a stop with 20 handlers running":                    gracefulStop,
		"the late ack of the plain driver with its recovery": plainDriverLateAck,
	} {
		run(name, test)
	}
	for name, test := range map[string]func(*Scenario){
		"an operator closes the connection":             operatorCloses,
		"the broker aborts the connection":              func(s *Scenario) { instant(s, s.Cut) },
		"the queue is deleted and declared by us":       queueDeletedOurs,
		"the queue is deleted and declared by another":  queueDeletedTheirs,
		"the queue is absent at the start":              queueAbsentAtStart,
		"20 connections are killed half a second apart": twentyKills,
		"handlers panic":                                handlersPanic,
		"a stop with 20 handlers running":               gracefulStop,
	} {
		run(name+", direct", func(s *Scenario) {
			s.Directly()
			test(s)
		})
	}
	for name, group := range map[string]func(*testing.T){
		"a broker down for 40 s":                  func(t *testing.T) { brokerDownLong(t, brokers[1], &table) },
		"a broker down for 10 s, then at start":   func(t *testing.T) { brokerDownShort(t, brokers[2], &table) },
		"a consumer timeout, then a memory alarm": func(t *testing.T) { timeoutAndAlarm(t, brokers[3], &table) },
	} {
		all.Go(func() { t.Run(name, group) })
	}
	all.Wait()
}

// ---- the scenarios ----

// instant is any fault that both sides hear of at once.
func instant(s *Scenario, fault func()) {
	s.StartConsuming()
	s.Feed()
	lost, done := s.Timed(fault)
	s.ResumedSince(lost, done, AtOnce)
	s.Verify()
}

func operatorCloses(s *Scenario) {
	rabbit.NeedCommands(s.T, s.Broker)
	s.StartConsuming()
	s.Feed()
	_, err := s.Broker.CloseConnectionsNamed(s.Context(), s.Queue, "an operator's reason", 1, 0)
	require.NoError(s, err)
	change := s.AwaitLost(0, time.Now(), AtOnce)
	assert.ErrorContains(s, change.Cause, "an operator's reason")
	s.Resumed(change.Time, AtOnce)
	s.Verify()
}

func doubleAck(s *Scenario) {
	s.StartConsuming()
	s.Publish(100)
	s.AwaitFinished()
	s.Must(AtOnce, "a hundred acks", func() bool { return len(s.Proxy.Log().Settlements()) == 100 })
	last := s.Proxy.Log().Settlements()[99]
	s.Feed()
	at := time.Now()
	require.Equal(s, 1, s.Proxy.Inject(faultproxy.ToBroker, faultproxy.AckFrame(last.Channel, last.Tag, false)))
	change := s.AwaitLost(0, at, AtOnce)
	assert.ErrorContains(s, change.Cause, "unknown delivery tag")
	s.Resumed(at, AtOnce)
	s.KeptConnection()
	s.Verify()
}

func queueDeletedOurs(s *Scenario) {
	s.Options = append(s.Options, steadymq.WithQueue(steadymq.Queue{Type: "classic"}))
	s.StartConsuming()
	s.Publish(200)
	s.SettledAll()
	at := time.Now()
	require.NoError(s, s.Broker.DeleteQueue(s.Queue))
	s.Resumed(at, AtOnce)
	s.Feed()
	s.Verify()
}

func queueDeletedTheirs(s *Scenario) {
	s.StartConsuming()
	s.Publish(200)
	s.SettledAll()
	deleted := time.Now()
	require.NoError(s, s.Broker.DeleteQueue(s.Queue))
	s.AwaitLost(0, deleted, AtOnce)
	s.Pause(2 * time.Second)
	at := time.Now()
	require.NoError(s, s.Broker.DeclareQueue(s.Queue, nil))
	s.Resumed(at, OperatorPace)
	s.Feed()
	s.Verify()
}

// silence makes the path swallow for 32 s, which is long past every heartbeat, while messages are published.
func silence(s *Scenario, d faultproxy.Direction, detected time.Duration) {
	s.StartConsuming()
	s.Feed()
	at := time.Now()
	s.Proxy.BlackHole(d)
	change := s.AwaitLost(0, at, detected)
	s.Note("noticed after %v", change.Time.Sub(at).Round(10*time.Millisecond))
	s.Pause(time.Until(at.Add(32 * time.Second)))
	healed := time.Now()
	s.Proxy.Heal()
	s.Resumed(healed, AfterSilence)
	s.Verify()
}

func shortStall(s *Scenario) {
	s.StartConsuming()
	s.Feed()
	s.Proxy.Pause(faultproxy.Both)
	s.Pause(Heartbeat)
	s.Proxy.Heal()
	s.Verify()
	assert.Zero(s, s.LostSessions(), "bytes were late, none were lost: nothing to heal")
}

func queueAbsentAtStart(s *Scenario) {
	require.NoError(s, s.Broker.DeleteQueue(s.Queue))
	s.Start()
	s.Pause(2 * time.Second)
	assert.NotEqual(s, steadymq.Consuming, s.Consumer.State())
	at := time.Now()
	require.NoError(s, s.Broker.DeclareQueue(s.Queue, nil))
	s.Resumed(at, OperatorPace)
	s.Feed()
	s.Verify()
}

func twentyKills(s *Scenario) {
	s.StartConsuming()
	s.Feed()
	var last time.Time
	for range 20 {
		last, _ = s.Timed(s.Cut)
		s.Pause(500 * time.Millisecond)
	}
	s.Resumed(last, 11*time.Second)
	s.Verify()
}

func handlersPanic(s *Scenario) {
	var panics atomic.Int64
	s.Options = append(s.Options, steadymq.WithRequeueDelay(50*time.Millisecond, time.Second), steadymq.WithHooks(steadymq.Hooks{
		StateChanged: s.Changed,
		HandlerFailed: func(_ *steadymq.Delivery, err error) {
			var p *steadymq.PanicError
			if errors.As(err, &p) && len(p.Stack) > 0 {
				panics.Add(1)
			}
		},
	}))
	s.Handle = func(_ context.Context, d *steadymq.Delivery, n int) error {
		if n%10 == 0 && !d.Redelivered {
			panic(fmt.Sprintf("message %d", n))
		}
		return nil
	}
	s.StartConsuming()
	s.Publish(100)
	s.Verify()
	assert.EqualValues(s, 10, panics.Load())
	assert.Zero(s, s.LostSessions())
}

func lateAcks(s *Scenario) {
	const n = 8
	s.Workers, s.Prefetch = n, n
	first, second := make(chan struct{}), make(chan struct{})
	var stale, told atomic.Int64
	s.Handle = func(ctx context.Context, d *steadymq.Delivery, n int) error {
		if d.Session() > 1 {
			<-second
			return nil
		}
		<-first
		var lost *steadymq.SessionError
		if errors.As(context.Cause(ctx), &lost) {
			told.Add(1)
		}
		s.Ledger.Finish(n, d)
		if errors.Is(d.Ack(), steadymq.ErrStale) && errors.Is(d.Delivery.Ack(false), steadymq.ErrStale) {
			stale.Add(1)
		}
		return nil
	}
	s.StartConsuming()
	s.Publish(n)
	s.AwaitStarted(n)
	at := time.Now()
	s.Proxy.Reset()
	s.Resumed(at, AtOnce)
	close(first)
	s.AwaitStarted(2 * n)
	assert.EqualValues(s, n, stale.Load(), "every late ack is refused")
	assert.EqualValues(s, n, told.Load(), "every handler's context says why")
	assert.Empty(s, s.Proxy.Log().Settlements(), "nothing on the wire")
	if s.Broker.Commandable() {
		counts, err := s.Broker.QueueCounts(s.Context(), "/", s.Queue)
		require.NoError(s, err)
		assert.Equal(s, rabbit.QueueCounts{Unacked: n, Consumers: 1}, counts, "the redelivered messages stay")
	}
	close(second)
	s.Verify()
}

func gracefulStop(s *Scenario) {
	s.Workers, s.Prefetch = 20, 40
	release := make(chan struct{})
	s.Handle = func(ctx context.Context, _ *steadymq.Delivery, _ int) error {
		<-release
		return ctx.Err() // Run's end must not end the handlers' context
	}
	s.StartConsuming()
	s.Publish(60)
	s.AwaitStarted(20)
	stopping := time.Now()
	s.Cancel()
	s.Pause(500 * time.Millisecond)
	close(release)
	s.Stopped(time.Until(stopping.Add(DrainTimeout + CloseTimeout + time.Second)))
	s.Note("stopped %v after the handlers", time.Since(stopping.Add(500*time.Millisecond)).Round(time.Millisecond))
	s.NothingLeft()
	s.AcksAreRight()

	acked := s.AckedMessages()
	assert.Len(s, acked, 20, "every running handler's ack, and no other")
	left := s.TakeAll(s.Queue)
	assert.Len(s, left, 40)
	for _, n := range left {
		assert.NotContains(s, acked, n, "an acked message came again")
	}
	s.AddRow(0)
}

// plainDriverLateAck documents why steadymq never uses amqp.Config.Recovery: the same late ack, with the driver's own recovery, is answered
// nil and settles another message, which nobody has handled and nobody will see again.
func plainDriverLateAck(s *Scenario) {
	conn, err := amqp.DialConfig(s.Proxy.URL(s.Broker.URL()), amqp.Config{
		Heartbeat: Heartbeat,
		Recovery:  &amqp.Recovery{ReconnectionConfig: &amqp.ReconnectionConfig{MaxRetryCount: 10, RetryInterval: 200 * time.Millisecond}},
	})
	require.NoError(s, err)
	ch, err := conn.Channel()
	require.NoError(s, err)
	require.NoError(s, ch.Qos(4, 0, false))
	deliveries, err := ch.Consume(s.Queue, "", false, false, false, false, nil)
	require.NoError(s, err)

	s.Publish(6) // 0 and 1 are done before the connection is lost; 2 to 5 are being handled
	next := func() amqp.Delivery {
		select {
		case d := <-deliveries:
			return d
		case <-time.After(15 * time.Second):
			require.FailNow(s, "no delivery")
			panic("unreachable")
		}
	}
	for range 2 {
		d := next()
		require.NoError(s, d.Ack(false))
	}
	late := next() // message 2, tag 3
	require.Equal(s, "2", late.MessageId)
	for range 3 {
		next()
	}
	s.Proxy.Reset()
	require.Equal(s, "2", next().MessageId, "delivered again: message 2 is tag 1 now, and tag 3 is message 4")

	require.NoError(s, late.Ack(false), "the driver says all is well")
	s.Must(5*time.Second, "the third ack", func() bool { return len(s.AckedMessages()) == 3 })
	assert.Contains(s, s.AckedMessages(), 4, "message 4, which nobody has handled, was acknowledged")
	CloseWithin(conn, 2*time.Second)
	left := s.TakeAll(s.Queue)
	assert.NotContains(s, left, 4, "message 4 is lost")
	assert.Contains(s, left, 2, "and message 2, which was handled, comes again")
	s.Note("a message was lost and its ack returned nil")
	s.AddRow(0)
}

func brokerDownLong(t *testing.T, b *rabbit.Broker, table *Results) {
	rabbit.NeedCommands(t, b)
	both := BothWays(t, b, table)
	for _, s := range both {
		s.StartConsuming()
		s.Feed()
	}
	at := time.Now()
	require.NoError(t, b.Restart(t.Context(), 40*time.Second))
	healed := time.Now()
	for _, s := range both {
		s.ResumedSince(at, healed, AfterRefusals)
		s.Verify()
	}
}

func brokerDownShort(t *testing.T, b *rabbit.Broker, table *Results) {
	rabbit.NeedCommands(t, b)
	t.Run("stopped for 10 s", func(t *testing.T) {
		both := BothWays(t, b, table)
		for _, s := range both {
			s.StartConsuming()
			s.Feed()
		}
		at := time.Now()
		require.NoError(t, b.StopApp(t.Context()))
		for _, s := range both {
			s.AwaitLost(0, time.Now(), AtOnce)
		}
		both[0].Pause(10 * time.Second)
		require.NoError(t, b.StartApp(t.Context()))
		healed := time.Now()
		for _, s := range both {
			s.ResumedSince(at, healed, AfterRefusals)
			s.Verify()
		}
	})
	t.Run("absent at the start", func(t *testing.T) {
		both := BothWays(t, b, table)
		require.NoError(t, b.Stop(t.Context()))
		at := time.Now()
		for _, s := range both {
			s.Start()
		}
		both[0].Pause(3 * time.Second)
		require.NoError(t, b.Start(t.Context()))
		healed := time.Now()
		for _, s := range both {
			s.ResumedSince(at, healed, AfterRefusals)
			s.Feed()
			s.Verify()
		}
	})
}

func timeoutAndAlarm(t *testing.T, b *rabbit.Broker, table *Results) {
	rabbit.NeedCommands(t, b)
	t.Run("a consumer timeout closes the channel", func(t *testing.T) { consumerTimeout(NewScenario(t, b, table)) })
	t.Run("a memory alarm", func(t *testing.T) { memoryAlarm(NewScenario(t, b, table)) })
}

func consumerTimeout(s *Scenario) {
	s.Handle = func(_ context.Context, d *steadymq.Delivery, n int) error {
		if n == 0 && !d.Redelivered {
			s.Pause(7 * time.Second) // does not look at its context, as many do not
		}
		return nil
	}
	s.StartConsuming()
	s.Publish(1)
	s.AwaitStarted(1)
	started := time.Now()
	s.Feed()
	change := s.AwaitLost(0, started, 6*time.Second) // 3 s, a tick of 1 s at worst twice
	var closed *amqp.Error
	require.ErrorAs(s, change.Cause, &closed)
	assert.Equal(s, 406, closed.Code)
	s.Resumed(change.Time, AtOnce)
	s.KeptConnection()
	s.Verify()
	s.OverdueIsStale()
}

// OverdueIsStale: the overdue handler's ack was not sent, nor were those of messages that the other workers had at hand when the channel closed.
func (s *Scenario) OverdueIsStale() {
	s.Helper()
	stale := s.Consumer.Stats().Stale
	assert.GreaterOrEqual(s, stale, uint64(1), "the overdue handler's ack was not sent")
	assert.LessOrEqual(s, stale, uint64(s.Workers), "one for each worker at most")
}

func memoryAlarm(s *Scenario) {
	s.Handle = func(context.Context, *steadymq.Delivery, int) error { s.Pause(20 * time.Millisecond); return nil }
	s.StartConsuming()
	s.Publish(400) // about two seconds of work
	require.NoError(s, s.Broker.SetMemoryWatermark(s.Context(), 0.00001))
	s.SettledAll()
	assert.Equal(s, steadymq.Consuming, s.Consumer.State(), "an alarm stops publishers, not consumers")
	require.NoError(s, s.Broker.SetMemoryWatermark(s.Context(), 0.6))
	s.Feed()
	s.Verify()
	assert.Zero(s, s.LostSessions())
}

// ---- the verifier ----

// Scenario is one consumer on one real queue behind one proxy, and all that is needed to judge it.
type Scenario struct {
	*testing.T
	Broker       *rabbit.Broker
	Proxy        *faultproxy.Proxy // nil where the consumer dials the broker itself, see directly
	Queue        string
	table        *Results
	notes        []string
	ResumedAfter time.Duration

	Workers, Prefetch int
	Handle            func(ctx context.Context, d *steadymq.Delivery, n int) error
	Options           []steadymq.Option
	TLS               *tls.Config  // nil for plain amqp
	elsewhere         atomic.Value // an address, for who dials the broker itself

	Consumer    *steadymq.Consumer
	Cancel      context.CancelFunc
	Result      chan error
	label       string
	Sockets     Sockets
	ConsumerLog *logBuffer
	Ledger      *Ledger
	Feeder      *Feeder

	mu      sync.Mutex
	changes []steadymq.StateChange
}

var scenarios atomic.Int64

func NewScenario(t *testing.T, b *rabbit.Broker, table *Results) *Scenario {
	t.Helper()
	return NewScenarioOn(t, b, table, nil)
}

// NewScenarioOn is newScenario on a queue that is not the default one. It has its kind from the start: a quorum queue or a stream that has the
// name of a classic queue that was deleted may be marked as stopped by stop_app, for good (404; seen on 4.0 and 4.3, over 3 minutes, another
// stop_app and a restart of the node).
func NewScenarioOn(t *testing.T, b *rabbit.Broker, table *Results, args amqp.Table) *Scenario {
	t.Helper()
	id := scenarios.Add(1)
	s := &Scenario{
		T: t, Broker: b, table: table, Queue: fmt.Sprintf("steadymq-test-%d-%d", time.Now().UnixNano(), id),
		Workers: 4, Prefetch: 16, ConsumerLog: new(logBuffer), Ledger: NewLedger(), label: fmt.Sprintf("scenario-%d", id),
	}
	var err error
	s.Proxy, err = faultproxy.New(b.Addr())
	require.NoError(t, err)
	s.Feeder = NewFeeder(b.URL(), s.Queue, s.Ledger)
	require.NoError(t, b.DeclareQueue(s.Queue, args))
	t.Cleanup(s.cleanup)
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

// start runs the consumer under a profiler label: every goroutine that comes of it carries the label, whoever starts it.
func (s *Scenario) Start() {
	s.Helper()
	all := append([]steadymq.Option{
		steadymq.WithConcurrency(s.Workers), steadymq.WithPrefetch(s.Prefetch),
		steadymq.WithHeartbeat(Heartbeat), steadymq.WithSetupTimeout(SetupTimeout), steadymq.WithCloseTimeout(CloseTimeout),
		steadymq.WithDrainTimeout(DrainTimeout), steadymq.WithConnectionName(s.Queue), steadymq.WithDialer(s.dial),
		steadymq.WithLogger(slog.New(slog.NewTextHandler(s.ConsumerLog, &slog.HandlerOptions{Level: slog.LevelDebug}))),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: s.Changed}),
	}, s.Options...)
	if s.TLS != nil {
		all = append(all, steadymq.WithTLSConfig(s.TLS))
	}
	c, err := steadymq.New(s.address(), s.Queue, all...)
	require.NoError(s, err)
	ctx, cancel := context.WithCancel(context.Background())
	s.Consumer, s.Cancel, s.Result = c, cancel, make(chan error, 1)
	go pprof.Do(ctx, pprof.Labels("scenario", s.label), func(ctx context.Context) {
		s.Result <- c.Run(ctx, s.deliver)
		close(s.Result)
	})
}

// address is the broker's URL by the scenario's way.
func (s *Scenario) address() string {
	address := s.By(s.Broker.URL())
	if s.TLS != nil {
		address = "amqps" + strings.TrimPrefix(address, "amqp")
	}
	return address
}

// StartConsuming is start, and waits until the consumer consumes.
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

func (s *Scenario) Changed(c steadymq.StateChange) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes = append(s.changes, c)
}

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

func (s *Scenario) LostSessions() int { return len(s.losses()) }

// AwaitLost waits for one more lost session than there were, holds the time since at against the limit, and returns how it was told.
func (s *Scenario) AwaitLost(were int, at time.Time, limit time.Duration) steadymq.StateChange {
	s.Helper()
	s.Must(limit+5*time.Second, "the loss is noticed", func() bool { return s.LostSessions() > were })
	change := s.losses()[were]
	s.InTime(change.Time.Sub(at), limit, "time to notice")
	return change
}

// Resumed waits until a session that began after at consumes, and notes how long it took.
func (s *Scenario) Resumed(at time.Time, limit time.Duration) {
	s.Helper()
	s.ResumedSince(at, at, limit)
}

// ResumedSince waits until a session that began after lost consumes, and holds the time since healed against the limit: a broker accepts
// before we hear that it does.
func (s *Scenario) ResumedSince(lost, healed time.Time, limit time.Duration) {
	s.Helper()
	var took time.Duration
	s.Must(limit+5*time.Second, "consuming again", func() bool {
		for _, c := range s.History() {
			if c.To == steadymq.Consuming && c.Time.After(lost) {
				took = max(c.Time.Sub(healed), 0)
				return true
			}
		}
		return false
	})
	s.InTime(took, limit, "time to resume")
	s.ResumedAfter = max(took, time.Nanosecond) // zero is "did not have to"
}

// inTime holds a time against its limit. A limit is for a machine that has time: on one that has not, the plain driver's own way to a
// Consumer, on the same path and at the same moment, says by how much.
func (s *Scenario) InTime(took, limit time.Duration, what string) {
	s.Helper()
	if took > limit {
		slack := 3 * s.PlainSetup()
		s.Note("%s %v, limit %v and %v for the load of the machine", what, took.Round(time.Millisecond), limit, slack.Round(time.Millisecond))
		limit += slack
	}
	assert.LessOrEqual(s, took, limit, what)
}

// PlainSetup is how long the driver alone needs from dial to consume-ok now, 0 if it does not get there. Where the scenario's path is broken, or
// so slow that it looks like it, the broker's published port says what the machine is like.
func (s *Scenario) PlainSetup() time.Duration {
	if took := setUpPlain(s.address(), amqp.Config{TLSClientConfig: s.TLS.Clone(), Dial: s.plainDial}); took > 0 {
		return took
	}
	return setUpPlain(s.Broker.URL(), amqp.Config{Dial: amqp.DefaultDial(10 * time.Second)})
}

func setUpPlain(address string, config amqp.Config) time.Duration {
	start := time.Now()
	conn, err := amqp.DialConfig(address, config)
	if err != nil {
		return 0
	}
	defer CloseWithin(conn, time.Second)
	ch, err := conn.Channel()
	if err != nil {
		return 0
	}
	q, err := ch.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		return 0
	}
	if _, err := ch.Consume(q.Name, "", true, true, false, false, nil); err != nil {
		return 0
	}
	return time.Since(start)
}

// holds polls on this goroutine; testify's Eventually goes on in another after it has given up. The last look is past the limit, so that a
// machine that was away for a while condemns nobody.
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

func (s *Scenario) Must(limit time.Duration, what string, cond func() bool) {
	s.Helper()
	if !s.Holds(limit, cond) {
		require.FailNow(s, "did not come true within "+limit.String()+": "+what)
	}
}

func (s *Scenario) Pause(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	<-timer.C
}

func (s *Scenario) Note(format string, args ...any) {
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

// publish sends n messages and has them confirmed.
func (s *Scenario) Publish(n int) {
	s.Helper()
	require.NoError(s, s.Feeder.Publish(s.Context(), n, 0))
}

// feed publishes in the background until the end of the scenario, whatever happens to the broker, and waits for the first fifty messages.
func (s *Scenario) Feed() {
	s.Helper()
	s.Feeder.Start()
	was := s.Ledger.Counts().Confirmed
	s.Must(20*time.Second, "messages are published", func() bool { return s.Ledger.Counts().Confirmed > was+50 })
}

func (s *Scenario) AwaitStarted(n int) {
	s.Helper()
	s.Must(10*time.Second, "handlers have started", func() bool { return s.Ledger.Counts().Started >= n })
}

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

// Verify ends the scenario and judges it.
func (s *Scenario) Verify() {
	s.Helper()
	s.Feeder.Stop()
	s.AwaitFinished()
	s.OneConsumer()
	s.Cancel()
	s.Stopped(DrainTimeout + CloseTimeout + time.Second)
	s.NothingLeft()
	s.QueueEmpty()
	s.AcksAreRight()
	s.StatsAddUp()
	s.AddRow(s.Duplicates())
}

// OneConsumer waits until the broker, which may have to notice a death itself, and this process hold one consumer and one socket.
func (s *Scenario) OneConsumer() {
	s.Helper()
	var q rabbit.Queue
	var err error
	s.Holds(HalfOpen+CloseTimeout, func() bool {
		q, err = s.Broker.Queue(s.Queue)
		return err == nil && q.Consumers == 1 && s.Sockets.Open() == 1
	})
	assert.NoError(s, err)
	assert.Equal(s, 1, q.Consumers, "consumers on the queue")
	assert.Equal(s, 1, s.Sockets.Open(), "open sockets")
}

// Stopped waits for Run.
func (s *Scenario) Stopped(limit time.Duration) {
	s.Helper()
	select {
	case err := <-s.Result:
		assert.NoError(s, err)
	case <-time.After(limit):
		require.FailNow(s, "Run does not return")
	}
	assert.Equal(s, steadymq.Stopped, s.Consumer.State())
}

// nothingLeft looks for what Run left behind. The runtime needs a moment to end a goroutine that has returned.
func (s *Scenario) NothingLeft() {
	s.Helper()
	var left string
	s.Holds(time.Second, func() bool { left = labelled(s.label); return left == "" })
	assert.Empty(s, left, "goroutines")
	assert.Zero(s, s.Sockets.Open(), "open sockets")
	assert.Zero(s, s.Consumer.Stats().Abandoned, "what outlasted its limit")
}

func (s *Scenario) QueueEmpty() {
	s.Helper()
	var q rabbit.Queue
	s.Holds(5*time.Second, func() bool {
		var err error
		q, err = s.Broker.Queue(s.Queue)
		return err == nil && q == rabbit.Queue{}
	})
	assert.Equal(s, rabbit.Queue{}, q, "the queue is empty and free")
}

// acksAreRight holds what the wire shows against what the handlers did: an ack settles one delivery, once, that its own session's handler
// had finished before.
func (s *Scenario) AcksAreRight() {
	s.Helper()
	if !s.ReadsTheWire() {
		return // statsAddUp holds the consumer's own account against the handlers'
	}
	if s.Ledger.Counts().Finished > 0 {
		assert.NotEmpty(s, s.settlements(), "the wire was read")
	}
	delivered := map[faultproxy.Ref]faultproxy.Delivery{}
	for _, d := range s.deliveries() {
		delivered[d.Ref] = d
	}
	seen := map[faultproxy.Ref]bool{}
	for _, settled := range s.settlements() {
		d, known := delivered[settled.Ref]
		assert.True(s, known, "settled what was never delivered: %+v", settled)
		assert.False(s, seen[settled.Ref], "settled twice: %+v", settled)
		assert.False(s, settled.Multiple, "multiple: %+v", settled)
		seen[settled.Ref] = true
		if settled.Verb == faultproxy.Ack {
			at, finished := s.Ledger.finishedAt(d)
			assert.True(s, finished && !at.After(settled.At), "acked, but no handler had finished it: %+v of %+v", settled, d)
		}
	}
}

// AckedMessages are the numbers of the messages whose ack reached the broker.
func (s *Scenario) AckedMessages() []int {
	if !s.ReadsTheWire() {
		return s.messagesToldAcked()
	}
	id := map[faultproxy.Ref]string{}
	for _, d := range s.deliveries() {
		id[d.Ref] = d.MessageID
	}
	acked := map[int]bool{}
	for _, settled := range s.settlements() {
		if settled.Verb == faultproxy.Ack && !settled.Swallowed {
			n, err := strconv.Atoi(id[settled.Ref])
			require.NoError(s, err)
			acked[n] = true
		}
	}
	return slices.Sorted(maps.Keys(acked))
}

// Duplicates counts second handlings, and holds them and the broker's redeliveries against the lost sessions.
func (s *Scenario) Duplicates() int {
	s.Helper()
	requeued := 0
	for _, settled := range s.settlements() {
		if settled.Requeue {
			requeued++
		}
	}
	deliveries := map[string]int{}
	again := 0
	for _, d := range s.deliveries() {
		if deliveries[d.MessageID]++; deliveries[d.MessageID] > 1 {
			again++
		}
	}
	limit := s.Prefetch * s.LostSessions()
	assert.LessOrEqual(s, again, limit+requeued, "delivered again: prefetch per lost session at most")
	twice := s.Ledger.Counts().Twice
	assert.LessOrEqual(s, twice, limit, "handled again: prefetch per lost session at most")
	return twice
}

// statsAddUp checks the library's own account against itself and against the wire.
func (s *Scenario) StatsAddUp() {
	s.Helper()
	stats := s.Consumer.Stats()
	assert.Equal(s, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale, "%+v", stats)
	assert.EqualValues(s, s.LostSessions()+1, stats.Sessions, "%+v", stats)
	assert.LessOrEqual(s, stats.Acked, uint64(s.Ledger.Handlings()), "no ack that no handler had earned")
	assert.Zero(s, stats.Handling)
	assert.Zero(s, stats.EventsDropped)
}

// TakeAll takes what is left on a queue.
func (s *Scenario) TakeAll(queue string) []int {
	s.Helper()
	conn, err := amqp.Dial(s.Broker.URL())
	require.NoError(s, err)
	defer CloseWithin(conn, 2*time.Second)
	ch, err := conn.Channel()
	require.NoError(s, err)
	var numbers []int
	for empty := 0; empty < 5; { // what was put back a moment ago may take another
		d, ok, err := ch.Get(queue, true)
		require.NoError(s, err)
		if !ok {
			empty++
			s.Pause(50 * time.Millisecond)
			continue
		}
		n, err := strconv.Atoi(d.MessageId)
		require.NoError(s, err)
		numbers = append(numbers, n)
	}
	return numbers
}

func (s *Scenario) AddRow(duplicates int) {
	_, name, _ := strings.Cut(s.Name(), "/")
	if s.Proxy == nil && !strings.HasSuffix(name, "direct") {
		name += ", direct"
	}
	s.table.Add(Result{
		Fault:      name,
		Broker:     s.Broker.Version(),
		Resumed:    s.ResumedAfter,
		Lost:       s.LostSessions(),
		Duplicates: duplicates,
		Messages:   s.Ledger.Counts().Confirmed,
		Note:       strings.Join(s.notes, "; "),
	})
}

// ---- its parts ----

// Ledger is what was published and what handlers finished.
type Ledger struct {
	mu        sync.Mutex
	confirmed map[int]bool // a message whose confirm was lost may be there or not: it is in no list
	started   int
	finished  map[int]int
	work      map[piece]time.Time
}

// piece is one handling: tags restart in every session, and the number proves that the tag means the same message on both sides.
type piece struct {
	session uint64
	tag     uint64
	message int
}

func NewLedger() *Ledger {
	return &Ledger{confirmed: map[int]bool{}, finished: map[int]int{}, work: map[piece]time.Time{}}
}

func (l *Ledger) Confirm(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.confirmed[n] = true
}

func (l *Ledger) Start() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.started++
}

// Finish notes a handling once, however often it is told.
func (l *Ledger) Finish(n int, d *steadymq.Delivery) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := piece{d.Session(), d.DeliveryTag, n}
	if _, noted := l.work[p]; noted {
		return
	}
	l.work[p] = time.Now()
	l.finished[n]++
}

// FinishedElsewhere notes a handling that another process tells of.
func (l *Ledger) FinishedElsewhere(session, tag uint64, n int, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.work[piece{session, tag, n}] = at
	l.finished[n]++
}

// finishedAt says when the handling that belongs to a delivery on the wire was finished. The consumer tag ends with the session's number.
func (l *Ledger) finishedAt(d faultproxy.Delivery) (time.Time, bool) {
	session, err1 := strconv.ParseUint(d.Consumer[strings.LastIndexByte(d.Consumer, '-')+1:], 10, 64)
	n, err2 := strconv.Atoi(d.MessageID)
	if errors.Join(err1, err2) != nil {
		return time.Time{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	at, ok := l.work[piece{session, d.Tag, n}]
	return at, ok
}

// Handlings counts finished ones, second ones included.
func (l *Ledger) Handlings() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.work)
}

// Missing are the confirmed messages that no handler has finished.
func (l *Ledger) Missing() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []int
	for n := range l.confirmed {
		if l.finished[n] == 0 {
			out = append(out, n)
		}
	}
	return out
}

// Confirmed are the numbers of the messages that the broker has confirmed.
func (l *Ledger) Confirmed() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.confirmed))
}

// Finished are the numbers of the messages that a handler has finished.
func (l *Ledger) Finished() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.finished))
}

type Counts struct{ Confirmed, Started, Finished, Twice int }

func (l *Ledger) Counts() Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := Counts{Confirmed: len(l.confirmed), Started: l.started, Finished: len(l.finished)}
	for _, times := range l.finished {
		c.Twice += times - 1
	}
	return c
}

// feeder publishes numbered messages with confirms over a connection of its own. A number is published once: one whose confirm is lost is
// given up, because publishing it again would be a duplicate that is not the consumer's.
type Feeder struct {
	URL, Queue string
	ledger     *Ledger
	next       int // owned by whoever publishes
	quit       context.CancelFunc
	wg         sync.WaitGroup
}

func NewFeeder(url, queue string, l *Ledger) *Feeder {
	return &Feeder{URL: url, Queue: queue, ledger: l}
}

// start publishes until stop.
func (f *Feeder) Start() {
	f.Stop()
	ctx, cancel := context.WithCancel(context.Background())
	f.quit = cancel
	f.wg.Go(func() {
		for ctx.Err() == nil {
			_ = f.Publish(ctx, math.MaxInt, 20*time.Millisecond)
			retry := time.NewTimer(100 * time.Millisecond)
			select {
			case <-retry.C:
			case <-ctx.Done():
				retry.Stop()
			}
		}
	})
}

func (f *Feeder) Stop() {
	if f.quit != nil {
		f.quit()
	}
	f.wg.Wait()
}

// publish sends the next n messages, each confirmed before the next, gap apart.
func (f *Feeder) Publish(ctx context.Context, n int, gap time.Duration) error {
	conn, err := amqp.DialConfig(f.URL, amqp.Config{Heartbeat: Heartbeat, Dial: amqp.DefaultDial(2 * time.Second)})
	if err != nil {
		return err
	}
	defer CloseWithin(conn, time.Second)
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := ch.Confirm(false); err != nil {
		return err
	}
	returned := ch.NotifyReturn(make(chan amqp.Return, 1))
	for range n {
		if err := f.one(ctx, ch, returned); err != nil {
			return err
		}
		select {
		case <-time.After(gap):
		case <-ctx.Done():
		}
	}
	return nil
}

// NextNumber is that of the next message.
func (f *Feeder) NextNumber() int {
	n := f.next
	f.next++
	return n
}

func (f *Feeder) one(ctx context.Context, ch *amqp.Channel, returned <-chan amqp.Return) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	number := f.NextNumber()
	text := strconv.Itoa(number)
	confirm, err := ch.PublishWithDeferredConfirmWithContext(ctx, "", f.Queue, true, false, amqp.Publishing{
		MessageId: text, Body: []byte(text), DeliveryMode: amqp.Persistent,
	})
	if err != nil {
		return err
	}
	ok, err := confirm.WaitContext(ctx)
	if err != nil || !ok {
		return errors.Join(err, errors.New("not confirmed"))
	}
	select {
	case <-returned: // Confirmed and in no queue
		return errors.New("returned")
	default:
	}
	f.ledger.Confirm(number)
	return nil
}

func CloseWithin(conn *amqp.Connection, d time.Duration) { _ = conn.CloseDeadline(time.Now().Add(d)) }

// Sockets remembers what the consumer dialled, without standing between: the library sees the kernel's own connection.
type Sockets struct {
	mu  sync.Mutex
	all []*net.TCPConn
}

func (s *Sockets) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, conn.(*net.TCPConn))
	return conn, nil
}

// Open counts those that nobody has closed.
func (s *Sockets) Open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, conn := range s.all {
		raw, err := conn.SyscallConn()
		if err == nil && raw.Control(func(uintptr) {}) == nil {
			n++
		}
	}
	return n
}

var profileEntry = regexp.MustCompile(`(?m)^\d+ @ .*\n# labels: (.*)\n(?:#.*\n)*`)

// labelled is the stacks of the goroutines that carry the label, "" if there are none.
func labelled(label string) string {
	var profile bytes.Buffer
	_ = pprof.Lookup("goroutine").WriteTo(&profile, 1)
	var found []string
	for _, m := range profileEntry.FindAllStringSubmatch(profile.String(), -1) {
		if strings.Contains(m[1], `"`+label+`"`) {
			found = append(found, m[0])
		}
	}
	return strings.Join(found, "\n")
}

// Results is the table the suite prints.
type Results struct {
	mu   sync.Mutex
	rows []Result
}

type Result struct {
	Fault, Broker              string
	Resumed                    time.Duration
	Lost, Duplicates, Messages int
	Note                       string
}

func (r *Results) Add(row Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rows = append(r.rows, row)
}

func (r *Results) Rows() []Result {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.rows)
}

func (r *Results) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	slices.SortFunc(r.rows, func(a, b Result) int { return strings.Compare(a.Fault, b.Fault) })
	var b strings.Builder
	b.WriteString("\n| fault | RabbitMQ | consuming again after | sessions lost | messages | handled twice | notes |\n|---|---|---|---|---|---|---|\n")
	for _, row := range r.rows {
		resumed := "-"
		if row.Resumed > 0 {
			resumed = row.Resumed.Round(100 * time.Microsecond).String()
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %d | %d | %d | %s |\n",
			strings.ReplaceAll(row.Fault, "_", " "), row.Broker, resumed, row.Lost, row.Messages, row.Duplicates, row.Note)
	}
	return b.String()
}
