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
	realHeartbeat = 2 * time.Second
	realSetup     = 3 * time.Second
	realClose     = 5 * time.Second // the default: a busy broker needs more than one
	realDrain     = 20 * time.Second

	// atOnce bounds healing from what the broker or the kernel tells us about. The figure to reach is half of it; the machine is shared.
	atOnce = time.Second
	// silentPeer bounds noticing that nothing arrives any more, halfOpen that nothing of ours does: the second is the broker's to
	// notice, in 2 to 3 heartbeats, because an in-process proxy acknowledges our bytes to the kernel.
	silentPeer = 3*realHeartbeat/2 + 500*time.Millisecond
	deadReader = 5*realHeartbeat/2 + 500*time.Millisecond // of the driver, which then sees no heartbeats either
	halfOpen   = 3*realHeartbeat + time.Second
	// afterRefusals bounds resuming once a broker that refused accepts; afterSilence once one that swallowed answers.
	afterRefusals = 1200*time.Millisecond + 300*time.Millisecond // the proxy needs a moment to see it, too
	afterSilence  = realSetup + 10*time.Second + time.Second
	// operatorPace bounds the next try after two seconds of a missing queue.
	operatorPace = 5 * time.Second
)

// TestOnARealBroker runs every fault that has a command or a network to break. Each scenario has its own queue and its own proxy, so they
// run side by side; those that stop or change the broker have a broker of their own.
func TestOnARealBroker(t *testing.T) {
	if testing.Short() {
		t.Skip("takes minutes")
	}
	var table results
	t.Cleanup(func() { t.Log(table.String()) })
	brokers := rabbit.StartAll(t, // first of all, because a broker that starts takes all processors
		rabbit.Config{},
		rabbit.Config{},
		rabbit.Config{},
		rabbit.Config{Generation: rabbit.Gen310, ConsumerTimeout: 3 * time.Second, ChannelTick: time.Second},
	)

	// Subtests from goroutines, not t.Parallel: they wait far more than they work, and that would run only as many as there are processors.
	var all sync.WaitGroup
	run := func(name string, test func(*scenario)) {
		all.Go(func() {
			t.Run(name, func(t *testing.T) { test(newScenario(t, brokers[0], &table)) })
		})
	}
	for name, test := range map[string]func(*scenario){
		"an operator closes the connection":                  operatorCloses,
		"the connection is reset":                            func(s *scenario) { instant(s, s.proxy.Reset) },
		"the connection is ended politely":                   func(s *scenario) { instant(s, s.proxy.FIN) },
		"an ack is sent twice behind our back":               doubleAck,
		"the queue is deleted and declared by us":            queueDeletedOurs,
		"the queue is deleted and declared by another":       queueDeletedTheirs,
		"the path swallows both ways for 32 s":               func(s *scenario) { silence(s, faultproxy.Both, silentPeer) },
		"the path swallows what the broker sends for 32 s":   func(s *scenario) { silence(s, faultproxy.ToClient, silentPeer) },
		"the path swallows what we send for 32 s":            func(s *scenario) { silence(s, faultproxy.ToBroker, halfOpen) },
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
	for name, test := range map[string]func(*scenario){
		"an operator closes the connection":             operatorCloses,
		"the broker aborts the connection":              func(s *scenario) { instant(s, s.cut) },
		"the queue is deleted and declared by us":       queueDeletedOurs,
		"the queue is deleted and declared by another":  queueDeletedTheirs,
		"the queue is absent at the start":              queueAbsentAtStart,
		"20 connections are killed half a second apart": twentyKills,
		"handlers panic":                                handlersPanic,
		"a stop with 20 handlers running":               gracefulStop,
	} {
		run(name+", direct", func(s *scenario) {
			s.directly()
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
func instant(s *scenario, fault func()) {
	s.run()
	s.feed()
	lost, done := s.timed(fault)
	s.resumedSince(lost, done, atOnce)
	s.verify()
}

func operatorCloses(s *scenario) {
	rabbit.NeedCommands(s.T, s.broker)
	s.run()
	s.feed()
	_, err := s.broker.CloseConnectionsNamed(s.Context(), s.queue, "an operator's reason", 1, 0)
	require.NoError(s, err)
	change := s.awaitLost(0, time.Now(), atOnce)
	assert.ErrorContains(s, change.Cause, "an operator's reason")
	s.resumed(change.Time, atOnce)
	s.verify()
}

func doubleAck(s *scenario) {
	s.run()
	s.publish(100)
	s.awaitFinished()
	s.must(atOnce, "a hundred acks", func() bool { return len(s.proxy.Log().Settlements()) == 100 })
	last := s.proxy.Log().Settlements()[99]
	s.feed()
	at := time.Now()
	require.Equal(s, 1, s.proxy.Inject(faultproxy.ToBroker, faultproxy.AckFrame(last.Channel, last.Tag, false)))
	change := s.awaitLost(0, at, atOnce)
	assert.ErrorContains(s, change.Cause, "unknown delivery tag")
	s.resumed(at, atOnce)
	s.keptConnection()
	s.verify()
}

func queueDeletedOurs(s *scenario) {
	s.opts = append(s.opts, steadymq.WithQueue(steadymq.Queue{Type: "classic"}))
	s.run()
	s.publish(200)
	s.settledAll()
	at := time.Now()
	require.NoError(s, s.broker.DeleteQueue(s.queue))
	s.resumed(at, atOnce)
	s.feed()
	s.verify()
}

func queueDeletedTheirs(s *scenario) {
	s.run()
	s.publish(200)
	s.settledAll()
	deleted := time.Now()
	require.NoError(s, s.broker.DeleteQueue(s.queue))
	s.awaitLost(0, deleted, atOnce)
	s.pause(2 * time.Second)
	at := time.Now()
	require.NoError(s, s.broker.DeclareQueue(s.queue, nil))
	s.resumed(at, operatorPace)
	s.feed()
	s.verify()
}

// silence makes the path swallow for 32 s, which is long past every heartbeat, while messages are published.
func silence(s *scenario, d faultproxy.Direction, detected time.Duration) {
	s.run()
	s.feed()
	at := time.Now()
	s.proxy.BlackHole(d)
	change := s.awaitLost(0, at, detected)
	s.note("noticed after %v", change.Time.Sub(at).Round(10*time.Millisecond))
	s.pause(time.Until(at.Add(32 * time.Second)))
	healed := time.Now()
	s.proxy.Heal()
	s.resumed(healed, afterSilence)
	s.verify()
}

func shortStall(s *scenario) {
	s.run()
	s.feed()
	s.proxy.Pause(faultproxy.Both)
	s.pause(realHeartbeat)
	s.proxy.Heal()
	s.verify()
	assert.Zero(s, s.lostSessions(), "bytes were late, none were lost: nothing to heal")
}

func queueAbsentAtStart(s *scenario) {
	require.NoError(s, s.broker.DeleteQueue(s.queue))
	s.start()
	s.pause(2 * time.Second)
	assert.NotEqual(s, steadymq.Consuming, s.consumer.State())
	at := time.Now()
	require.NoError(s, s.broker.DeclareQueue(s.queue, nil))
	s.resumed(at, operatorPace)
	s.feed()
	s.verify()
}

func twentyKills(s *scenario) {
	s.run()
	s.feed()
	var last time.Time
	for range 20 {
		last, _ = s.timed(s.cut)
		s.pause(500 * time.Millisecond)
	}
	s.resumed(last, 11*time.Second)
	s.verify()
}

func handlersPanic(s *scenario) {
	var panics atomic.Int64
	s.opts = append(s.opts, steadymq.WithRequeueDelay(50*time.Millisecond, time.Second), steadymq.WithHooks(steadymq.Hooks{
		StateChanged: s.changed,
		HandlerFailed: func(_ *steadymq.Delivery, err error) {
			var p *steadymq.PanicError
			if errors.As(err, &p) && len(p.Stack) > 0 {
				panics.Add(1)
			}
		},
	}))
	s.handle = func(_ context.Context, d *steadymq.Delivery, n int) error {
		if n%10 == 0 && !d.Redelivered {
			panic(fmt.Sprintf("message %d", n))
		}
		return nil
	}
	s.run()
	s.publish(100)
	s.verify()
	assert.EqualValues(s, 10, panics.Load())
	assert.Zero(s, s.lostSessions())
}

func lateAcks(s *scenario) {
	const n = 8
	s.workers, s.prefetch = n, n
	first, second := make(chan struct{}), make(chan struct{})
	var stale, told atomic.Int64
	s.handle = func(ctx context.Context, d *steadymq.Delivery, n int) error {
		if d.Session() > 1 {
			<-second
			return nil
		}
		<-first
		var lost *steadymq.SessionError
		if errors.As(context.Cause(ctx), &lost) {
			told.Add(1)
		}
		s.ledger.finish(n, d)
		if errors.Is(d.Ack(), steadymq.ErrStale) && errors.Is(d.Delivery.Ack(false), steadymq.ErrStale) {
			stale.Add(1)
		}
		return nil
	}
	s.run()
	s.publish(n)
	s.awaitStarted(n)
	at := time.Now()
	s.proxy.Reset()
	s.resumed(at, atOnce)
	close(first)
	s.awaitStarted(2 * n)
	assert.EqualValues(s, n, stale.Load(), "every late ack is refused")
	assert.EqualValues(s, n, told.Load(), "every handler's context says why")
	assert.Empty(s, s.proxy.Log().Settlements(), "nothing on the wire")
	if s.broker.Commandable() {
		counts, err := s.broker.QueueCounts(s.Context(), "/", s.queue)
		require.NoError(s, err)
		assert.Equal(s, rabbit.QueueCounts{Unacked: n, Consumers: 1}, counts, "the redelivered messages stay")
	}
	close(second)
	s.verify()
}

func gracefulStop(s *scenario) {
	s.workers, s.prefetch = 20, 40
	release := make(chan struct{})
	s.handle = func(ctx context.Context, _ *steadymq.Delivery, _ int) error {
		<-release
		return ctx.Err() // Run's end must not end the handlers' context
	}
	s.run()
	s.publish(60)
	s.awaitStarted(20)
	stopping := time.Now()
	s.cancel()
	s.pause(500 * time.Millisecond)
	close(release)
	s.stopped(time.Until(stopping.Add(realDrain + realClose + time.Second)))
	s.note("stopped %v after the handlers", time.Since(stopping.Add(500*time.Millisecond)).Round(time.Millisecond))
	s.nothingLeft()
	s.acksAreRight()

	acked := s.ackedMessages()
	assert.Len(s, acked, 20, "every running handler's ack, and no other")
	left := s.takeAll(s.queue)
	assert.Len(s, left, 40)
	for _, n := range left {
		assert.NotContains(s, acked, n, "an acked message came again")
	}
	s.row(0)
}

// plainDriverLateAck documents why steadymq never uses amqp.Config.Recovery: the same late ack, with the driver's own recovery, is answered
// nil and settles another message, which nobody has handled and nobody will see again.
func plainDriverLateAck(s *scenario) {
	conn, err := amqp.DialConfig(s.proxy.URL(s.broker.URL()), amqp.Config{
		Heartbeat: realHeartbeat,
		Recovery:  &amqp.Recovery{ReconnectionConfig: &amqp.ReconnectionConfig{MaxRetryCount: 10, RetryInterval: 200 * time.Millisecond}},
	})
	require.NoError(s, err)
	ch, err := conn.Channel()
	require.NoError(s, err)
	require.NoError(s, ch.Qos(4, 0, false))
	deliveries, err := ch.Consume(s.queue, "", false, false, false, false, nil)
	require.NoError(s, err)

	s.publish(6) // 0 and 1 are done before the connection is lost; 2 to 5 are being handled
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
	s.proxy.Reset()
	require.Equal(s, "2", next().MessageId, "delivered again: message 2 is tag 1 now, and tag 3 is message 4")

	require.NoError(s, late.Ack(false), "the driver says all is well")
	s.must(5*time.Second, "the third ack", func() bool { return len(s.ackedMessages()) == 3 })
	assert.Contains(s, s.ackedMessages(), 4, "message 4, which nobody has handled, was acknowledged")
	closeWithin(conn, 2*time.Second)
	left := s.takeAll(s.queue)
	assert.NotContains(s, left, 4, "message 4 is lost")
	assert.Contains(s, left, 2, "and message 2, which was handled, comes again")
	s.note("a message was lost and its ack returned nil")
	s.row(0)
}

func brokerDownLong(t *testing.T, b *rabbit.Broker, table *results) {
	rabbit.NeedCommands(t, b)
	both := bothWays(t, b, table)
	for _, s := range both {
		s.run()
		s.feed()
	}
	at := time.Now()
	require.NoError(t, b.Restart(t.Context(), 40*time.Second))
	healed := time.Now()
	for _, s := range both {
		s.resumedSince(at, healed, afterRefusals)
		s.verify()
	}
}

func brokerDownShort(t *testing.T, b *rabbit.Broker, table *results) {
	rabbit.NeedCommands(t, b)
	t.Run("stopped for 10 s", func(t *testing.T) {
		both := bothWays(t, b, table)
		for _, s := range both {
			s.run()
			s.feed()
		}
		at := time.Now()
		require.NoError(t, b.StopApp(t.Context()))
		for _, s := range both {
			s.awaitLost(0, time.Now(), atOnce)
		}
		both[0].pause(10 * time.Second)
		require.NoError(t, b.StartApp(t.Context()))
		healed := time.Now()
		for _, s := range both {
			s.resumedSince(at, healed, afterRefusals)
			s.verify()
		}
	})
	t.Run("absent at the start", func(t *testing.T) {
		both := bothWays(t, b, table)
		require.NoError(t, b.Stop(t.Context()))
		at := time.Now()
		for _, s := range both {
			s.start()
		}
		both[0].pause(3 * time.Second)
		require.NoError(t, b.Start(t.Context()))
		healed := time.Now()
		for _, s := range both {
			s.resumedSince(at, healed, afterRefusals)
			s.feed()
			s.verify()
		}
	})
}

func timeoutAndAlarm(t *testing.T, b *rabbit.Broker, table *results) {
	rabbit.NeedCommands(t, b)
	t.Run("a consumer timeout closes the channel", func(t *testing.T) { consumerTimeout(newScenario(t, b, table)) })
	t.Run("a memory alarm", func(t *testing.T) { memoryAlarm(newScenario(t, b, table)) })
}

func consumerTimeout(s *scenario) {
	s.handle = func(_ context.Context, d *steadymq.Delivery, n int) error {
		if n == 0 && !d.Redelivered {
			s.pause(7 * time.Second) // does not look at its context, as many do not
		}
		return nil
	}
	s.run()
	s.publish(1)
	s.awaitStarted(1)
	started := time.Now()
	s.feed()
	change := s.awaitLost(0, started, 6*time.Second) // 3 s, a tick of 1 s at worst twice
	var closed *amqp.Error
	require.ErrorAs(s, change.Cause, &closed)
	assert.Equal(s, 406, closed.Code)
	s.resumed(change.Time, atOnce)
	s.keptConnection()
	s.verify()
	s.overdueIsStale()
}

// overdueIsStale: the overdue handler's ack was not sent, nor were those of messages that the other workers had at hand when the channel closed.
func (s *scenario) overdueIsStale() {
	s.Helper()
	stale := s.consumer.Stats().Stale
	assert.GreaterOrEqual(s, stale, uint64(1), "the overdue handler's ack was not sent")
	assert.LessOrEqual(s, stale, uint64(s.workers), "one for each worker at most")
}

func memoryAlarm(s *scenario) {
	s.handle = func(context.Context, *steadymq.Delivery, int) error { s.pause(20 * time.Millisecond); return nil }
	s.run()
	s.publish(400) // about two seconds of work
	require.NoError(s, s.broker.SetMemoryWatermark(s.Context(), 0.00001))
	s.settledAll()
	assert.Equal(s, steadymq.Consuming, s.consumer.State(), "an alarm stops publishers, not consumers")
	require.NoError(s, s.broker.SetMemoryWatermark(s.Context(), 0.6))
	s.feed()
	s.verify()
	assert.Zero(s, s.lostSessions())
}

// ---- the verifier ----

// scenario is one consumer on one real queue behind one proxy, and all that is needed to judge it.
type scenario struct {
	*testing.T
	broker *rabbit.Broker
	proxy  *faultproxy.Proxy // nil where the consumer dials the broker itself, see directly
	queue  string
	table  *results
	notes  []string
	resume time.Duration

	workers, prefetch int
	handle            func(ctx context.Context, d *steadymq.Delivery, n int) error
	opts              []steadymq.Option
	tls               *tls.Config  // nil for plain amqp
	elsewhere         atomic.Value // an address, for who dials the broker itself

	consumer *steadymq.Consumer
	cancel   context.CancelFunc
	result   chan error
	label    string
	sockets  sockets
	log      *logBuffer
	ledger   *ledger
	feeder   *feeder

	mu      sync.Mutex
	changes []steadymq.StateChange
}

var scenarios atomic.Int64

func newScenario(t *testing.T, b *rabbit.Broker, table *results) *scenario {
	t.Helper()
	return newScenarioOn(t, b, table, nil)
}

// newScenarioOn is newScenario on a queue that is not the default one. It has its kind from the start: a quorum queue or a stream that has the
// name of a classic queue that was deleted may be marked as stopped by stop_app, for good (404; seen on 4.0 and 4.3, over 3 minutes, another
// stop_app and a restart of the node).
func newScenarioOn(t *testing.T, b *rabbit.Broker, table *results, args amqp.Table) *scenario {
	t.Helper()
	id := scenarios.Add(1)
	s := &scenario{
		T: t, broker: b, table: table, queue: fmt.Sprintf("steadymq-test-%d-%d", time.Now().UnixNano(), id),
		workers: 4, prefetch: 16, log: new(logBuffer), ledger: newLedger(), label: fmt.Sprintf("scenario-%d", id),
	}
	var err error
	s.proxy, err = faultproxy.New(b.Addr())
	require.NoError(t, err)
	s.feeder = newFeeder(b.URL(), s.queue, s.ledger)
	require.NoError(t, b.DeclareQueue(s.queue, args))
	t.Cleanup(s.cleanup)
	return s
}

func (s *scenario) cleanup() {
	s.feeder.stop()
	if s.cancel != nil {
		s.cancel()
		s.abandon() // whatever went wrong, Run comes back from a dead connection
		<-s.result
	}
	if s.proxy != nil {
		assert.NoError(s, s.proxy.Close())
	}
	_ = s.broker.DeleteQueue(s.queue)
	if s.Failed() {
		s.Logf("log of the consumer:\n%s", s.log.String())
	}
}

// start runs the consumer under a profiler label: every goroutine that comes of it carries the label, whoever starts it.
func (s *scenario) start() {
	s.Helper()
	all := append([]steadymq.Option{
		steadymq.WithConcurrency(s.workers), steadymq.WithPrefetch(s.prefetch),
		steadymq.WithHeartbeat(realHeartbeat), steadymq.WithSetupTimeout(realSetup), steadymq.WithCloseTimeout(realClose),
		steadymq.WithDrainTimeout(realDrain), steadymq.WithConnectionName(s.queue), steadymq.WithDialer(s.dial),
		steadymq.WithLogger(slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: s.changed}),
	}, s.opts...)
	if s.tls != nil {
		all = append(all, steadymq.WithTLSConfig(s.tls))
	}
	c, err := steadymq.New(s.address(), s.queue, all...)
	require.NoError(s, err)
	ctx, cancel := context.WithCancel(context.Background())
	s.consumer, s.cancel, s.result = c, cancel, make(chan error, 1)
	go pprof.Do(ctx, pprof.Labels("scenario", s.label), func(ctx context.Context) {
		s.result <- c.Run(ctx, s.deliver)
		close(s.result)
	})
}

// address is the broker's URL by the scenario's way.
func (s *scenario) address() string {
	address := s.by(s.broker.URL())
	if s.tls != nil {
		address = "amqps" + strings.TrimPrefix(address, "amqp")
	}
	return address
}

// run is start, and waits until the consumer consumes.
func (s *scenario) run() {
	s.Helper()
	s.start()
	s.must(5*time.Second, "consuming", func() bool { return s.consumer.State() == steadymq.Consuming })
}

// deliver is the handler: what it finishes goes into the ledger before the library can ack it.
func (s *scenario) deliver(ctx context.Context, d *steadymq.Delivery) error {
	n, err := strconv.Atoi(d.MessageId)
	if err != nil {
		return steadymq.Discard(err)
	}
	s.ledger.start()
	if s.handle != nil {
		err = s.handle(ctx, d, n)
	} else {
		s.pause(2 * time.Millisecond)
	}
	if err == nil {
		s.ledger.finish(n, d)
	}
	return err
}

func (s *scenario) changed(c steadymq.StateChange) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes = append(s.changes, c)
}

func (s *scenario) history() []steadymq.StateChange {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.changes)
}

// losses are the ends of sessions that nobody asked for.
func (s *scenario) losses() []steadymq.StateChange {
	return slices.DeleteFunc(s.history(), func(c steadymq.StateChange) bool {
		return c.From != steadymq.Consuming || c.To == steadymq.Draining
	})
}

func (s *scenario) lostSessions() int { return len(s.losses()) }

// awaitLost waits for one more lost session than there were, holds the time since at against the limit, and returns how it was told.
func (s *scenario) awaitLost(were int, at time.Time, limit time.Duration) steadymq.StateChange {
	s.Helper()
	s.must(limit+5*time.Second, "the loss is noticed", func() bool { return s.lostSessions() > were })
	change := s.losses()[were]
	s.inTime(change.Time.Sub(at), limit, "time to notice")
	return change
}

// resumed waits until a session that began after at consumes, and notes how long it took.
func (s *scenario) resumed(at time.Time, limit time.Duration) {
	s.Helper()
	s.resumedSince(at, at, limit)
}

// resumedSince waits until a session that began after lost consumes, and holds the time since healed against the limit: a broker accepts
// before we hear that it does.
func (s *scenario) resumedSince(lost, healed time.Time, limit time.Duration) {
	s.Helper()
	var took time.Duration
	s.must(limit+5*time.Second, "consuming again", func() bool {
		for _, c := range s.history() {
			if c.To == steadymq.Consuming && c.Time.After(lost) {
				took = max(c.Time.Sub(healed), 0)
				return true
			}
		}
		return false
	})
	s.inTime(took, limit, "time to resume")
	s.resume = max(took, time.Nanosecond) // zero is "did not have to"
}

// inTime holds a time against its limit. A limit is for a machine that has time: on one that has not, the plain driver's own way to a
// consumer, on the same path and at the same moment, says by how much.
func (s *scenario) inTime(took, limit time.Duration, what string) {
	s.Helper()
	if took > limit {
		slack := 3 * s.plainSetup()
		s.note("%s %v, limit %v and %v for the load of the machine", what, took.Round(time.Millisecond), limit, slack.Round(time.Millisecond))
		limit += slack
	}
	assert.LessOrEqual(s, took, limit, what)
}

// plainSetup is how long the driver alone needs from dial to consume-ok now, 0 if it does not get there. Where the scenario's path is broken, or
// so slow that it looks like it, the broker's published port says what the machine is like.
func (s *scenario) plainSetup() time.Duration {
	if took := setUpPlain(s.address(), amqp.Config{TLSClientConfig: s.tls.Clone(), Dial: s.plainDial}); took > 0 {
		return took
	}
	return setUpPlain(s.broker.URL(), amqp.Config{Dial: amqp.DefaultDial(10 * time.Second)})
}

func setUpPlain(address string, config amqp.Config) time.Duration {
	start := time.Now()
	conn, err := amqp.DialConfig(address, config)
	if err != nil {
		return 0
	}
	defer closeWithin(conn, time.Second)
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
func (s *scenario) holds(limit time.Duration, cond func() bool) bool {
	for end := time.Now().Add(limit); ; {
		last := time.Now().After(end)
		if cond() {
			return true
		}
		if last {
			return false
		}
		s.pause(10 * time.Millisecond)
	}
}

func (s *scenario) must(limit time.Duration, what string, cond func() bool) {
	s.Helper()
	if !s.holds(limit, cond) {
		require.FailNow(s, "did not come true within "+limit.String()+": "+what)
	}
}

func (s *scenario) pause(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	<-timer.C
}

func (s *scenario) note(format string, args ...any) {
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

// publish sends n messages and has them confirmed.
func (s *scenario) publish(n int) {
	s.Helper()
	require.NoError(s, s.feeder.publish(s.Context(), n, 0))
}

// feed publishes in the background until the end of the scenario, whatever happens to the broker, and waits for the first fifty messages.
func (s *scenario) feed() {
	s.Helper()
	s.feeder.start()
	was := s.ledger.counts().confirmed
	s.must(20*time.Second, "messages are published", func() bool { return s.ledger.counts().confirmed > was+50 })
}

func (s *scenario) awaitStarted(n int) {
	s.Helper()
	s.must(10*time.Second, "handlers have started", func() bool { return s.ledger.counts().started >= n })
}

func (s *scenario) awaitFinished() {
	s.Helper()
	s.must(40*time.Second, "every confirmed message is finished", func() bool { return len(s.ledger.missing()) == 0 })
}

// settledAll waits until every message is finished and its ack is on the wire.
func (s *scenario) settledAll() {
	s.Helper()
	s.awaitFinished()
	s.must(5*time.Second, "every ack is on the wire", func() bool { return len(s.ackedMessages()) == s.ledger.counts().finished })
}

// verify ends the scenario and judges it.
func (s *scenario) verify() {
	s.Helper()
	s.feeder.stop()
	s.awaitFinished()
	s.oneConsumer()
	s.cancel()
	s.stopped(realDrain + realClose + time.Second)
	s.nothingLeft()
	s.queueEmpty()
	s.acksAreRight()
	s.statsAddUp()
	s.row(s.duplicates())
}

// oneConsumer waits until the broker, which may have to notice a death itself, and this process hold one consumer and one socket.
func (s *scenario) oneConsumer() {
	s.Helper()
	var q rabbit.Queue
	var err error
	s.holds(halfOpen+realClose, func() bool {
		q, err = s.broker.Queue(s.queue)
		return err == nil && q.Consumers == 1 && s.sockets.open() == 1
	})
	assert.NoError(s, err)
	assert.Equal(s, 1, q.Consumers, "consumers on the queue")
	assert.Equal(s, 1, s.sockets.open(), "open sockets")
}

// stopped waits for Run.
func (s *scenario) stopped(limit time.Duration) {
	s.Helper()
	select {
	case err := <-s.result:
		assert.NoError(s, err)
	case <-time.After(limit):
		require.FailNow(s, "Run does not return")
	}
	assert.Equal(s, steadymq.Stopped, s.consumer.State())
}

// nothingLeft looks for what Run left behind. The runtime needs a moment to end a goroutine that has returned.
func (s *scenario) nothingLeft() {
	s.Helper()
	var left string
	s.holds(time.Second, func() bool { left = labelled(s.label); return left == "" })
	assert.Empty(s, left, "goroutines")
	assert.Zero(s, s.sockets.open(), "open sockets")
	assert.Zero(s, s.consumer.Stats().Abandoned, "what outlasted its limit")
}

func (s *scenario) queueEmpty() {
	s.Helper()
	var q rabbit.Queue
	s.holds(5*time.Second, func() bool {
		var err error
		q, err = s.broker.Queue(s.queue)
		return err == nil && q == rabbit.Queue{}
	})
	assert.Equal(s, rabbit.Queue{}, q, "the queue is empty and free")
}

// acksAreRight holds what the wire shows against what the handlers did: an ack settles one delivery, once, that its own session's handler
// had finished before.
func (s *scenario) acksAreRight() {
	s.Helper()
	if !s.readsTheWire() {
		return // statsAddUp holds the consumer's own account against the handlers'
	}
	if s.ledger.counts().finished > 0 {
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
			at, finished := s.ledger.finishedAt(d)
			assert.True(s, finished && !at.After(settled.At), "acked, but no handler had finished it: %+v of %+v", settled, d)
		}
	}
}

// ackedMessages are the numbers of the messages whose ack reached the broker.
func (s *scenario) ackedMessages() []int {
	if !s.readsTheWire() {
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

// duplicates counts second handlings, and holds them and the broker's redeliveries against the lost sessions.
func (s *scenario) duplicates() int {
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
	limit := s.prefetch * s.lostSessions()
	assert.LessOrEqual(s, again, limit+requeued, "delivered again: prefetch per lost session at most")
	twice := s.ledger.counts().twice
	assert.LessOrEqual(s, twice, limit, "handled again: prefetch per lost session at most")
	return twice
}

// statsAddUp checks the library's own account against itself and against the wire.
func (s *scenario) statsAddUp() {
	s.Helper()
	stats := s.consumer.Stats()
	assert.Equal(s, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale, "%+v", stats)
	assert.EqualValues(s, s.lostSessions()+1, stats.Sessions, "%+v", stats)
	assert.LessOrEqual(s, stats.Acked, uint64(s.ledger.handlings()), "no ack that no handler had earned")
	assert.Zero(s, stats.Handling)
	assert.Zero(s, stats.EventsDropped)
}

// takeAll takes what is left on a queue.
func (s *scenario) takeAll(queue string) []int {
	s.Helper()
	conn, err := amqp.Dial(s.broker.URL())
	require.NoError(s, err)
	defer closeWithin(conn, 2*time.Second)
	ch, err := conn.Channel()
	require.NoError(s, err)
	var numbers []int
	for empty := 0; empty < 5; { // what was put back a moment ago may take another
		d, ok, err := ch.Get(queue, true)
		require.NoError(s, err)
		if !ok {
			empty++
			s.pause(50 * time.Millisecond)
			continue
		}
		n, err := strconv.Atoi(d.MessageId)
		require.NoError(s, err)
		numbers = append(numbers, n)
	}
	return numbers
}

func (s *scenario) row(duplicates int) {
	_, name, _ := strings.Cut(s.Name(), "/")
	if s.proxy == nil && !strings.HasSuffix(name, "direct") {
		name += ", direct"
	}
	s.table.add(result{
		fault:      name,
		broker:     s.broker.Version(),
		resumed:    s.resume,
		lost:       s.lostSessions(),
		duplicates: duplicates,
		messages:   s.ledger.counts().confirmed,
		note:       strings.Join(s.notes, "; "),
	})
}

// ---- its parts ----

// ledger is what was published and what handlers finished.
type ledger struct {
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

func newLedger() *ledger {
	return &ledger{confirmed: map[int]bool{}, finished: map[int]int{}, work: map[piece]time.Time{}}
}

func (l *ledger) confirm(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.confirmed[n] = true
}

func (l *ledger) start() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.started++
}

// finish notes a handling once, however often it is told.
func (l *ledger) finish(n int, d *steadymq.Delivery) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := piece{d.Session(), d.DeliveryTag, n}
	if _, noted := l.work[p]; noted {
		return
	}
	l.work[p] = time.Now()
	l.finished[n]++
}

// told notes a handling that another process tells of.
func (l *ledger) told(session, tag uint64, n int, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.work[piece{session, tag, n}] = at
	l.finished[n]++
}

// finishedAt says when the handling that belongs to a delivery on the wire was finished. The consumer tag ends with the session's number.
func (l *ledger) finishedAt(d faultproxy.Delivery) (time.Time, bool) {
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

// handlings counts finished ones, second ones included.
func (l *ledger) handlings() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.work)
}

// missing are the confirmed messages that no handler has finished.
func (l *ledger) missing() []int {
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

// confirmedMessages are the numbers of the messages that the broker has confirmed.
func (l *ledger) confirmedMessages() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.confirmed))
}

// finishedMessages are the numbers of the messages that a handler has finished.
func (l *ledger) finishedMessages() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.finished))
}

type ledgerCounts struct{ confirmed, started, finished, twice int }

func (l *ledger) counts() ledgerCounts {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := ledgerCounts{confirmed: len(l.confirmed), started: l.started, finished: len(l.finished)}
	for _, times := range l.finished {
		c.twice += times - 1
	}
	return c
}

// feeder publishes numbered messages with confirms over a connection of its own. A number is published once: one whose confirm is lost is
// given up, because publishing it again would be a duplicate that is not the consumer's.
type feeder struct {
	url, queue string
	ledger     *ledger
	next       int // owned by whoever publishes
	quit       context.CancelFunc
	wg         sync.WaitGroup
}

func newFeeder(url, queue string, l *ledger) *feeder {
	return &feeder{url: url, queue: queue, ledger: l}
}

// start publishes until stop.
func (f *feeder) start() {
	f.stop()
	ctx, cancel := context.WithCancel(context.Background())
	f.quit = cancel
	f.wg.Go(func() {
		for ctx.Err() == nil {
			_ = f.publish(ctx, math.MaxInt, 20*time.Millisecond)
			retry := time.NewTimer(100 * time.Millisecond)
			select {
			case <-retry.C:
			case <-ctx.Done():
				retry.Stop()
			}
		}
	})
}

func (f *feeder) stop() {
	if f.quit != nil {
		f.quit()
	}
	f.wg.Wait()
}

// publish sends the next n messages, each confirmed before the next, gap apart.
func (f *feeder) publish(ctx context.Context, n int, gap time.Duration) error {
	conn, err := amqp.DialConfig(f.url, amqp.Config{Heartbeat: realHeartbeat, Dial: amqp.DefaultDial(2 * time.Second)})
	if err != nil {
		return err
	}
	defer closeWithin(conn, time.Second)
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

// number is that of the next message.
func (f *feeder) number() int {
	n := f.next
	f.next++
	return n
}

func (f *feeder) one(ctx context.Context, ch *amqp.Channel, returned <-chan amqp.Return) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	number := f.number()
	text := strconv.Itoa(number)
	confirm, err := ch.PublishWithDeferredConfirmWithContext(ctx, "", f.queue, true, false, amqp.Publishing{
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
	case <-returned: // confirmed and in no queue
		return errors.New("returned")
	default:
	}
	f.ledger.confirm(number)
	return nil
}

func closeWithin(conn *amqp.Connection, d time.Duration) { _ = conn.CloseDeadline(time.Now().Add(d)) }

// sockets remembers what the consumer dialled, without standing between: the library sees the kernel's own connection.
type sockets struct {
	mu  sync.Mutex
	all []*net.TCPConn
}

func (s *sockets) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, conn.(*net.TCPConn))
	return conn, nil
}

// open counts those that nobody has closed.
func (s *sockets) open() int {
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

// results is the table the suite prints.
type results struct {
	mu   sync.Mutex
	rows []result
}

type result struct {
	fault, broker              string
	resumed                    time.Duration
	lost, duplicates, messages int
	note                       string
}

func (r *results) add(row result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rows = append(r.rows, row)
}

func (r *results) all() []result {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.rows)
}

func (r *results) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	slices.SortFunc(r.rows, func(a, b result) int { return strings.Compare(a.fault, b.fault) })
	var b strings.Builder
	b.WriteString("\n| fault | RabbitMQ | consuming again after | sessions lost | messages | handled twice | notes |\n|---|---|---|---|---|---|---|\n")
	for _, row := range r.rows {
		resumed := "-"
		if row.resumed > 0 {
			resumed = row.resumed.Round(100 * time.Microsecond).String()
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %d | %d | %d | %s |\n",
			strings.ReplaceAll(row.fault, "_", " "), row.broker, resumed, row.lost, row.messages, row.duplicates, row.note)
	}
	return b.String()
}
