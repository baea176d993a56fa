package steadymq_test

import (
	"context"
	"errors"
	"fmt"
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
	"github.com/steadymq/steadymq/internal/scenario"
)

// TestOnARealBroker runs every fault that a command or a broken network can cause. Each scenario
// has its own queue and its own proxy, so they run side by side; those that stop or change the
// broker have a broker of their own. What judges them is package scenario.
func TestOnARealBroker(t *testing.T) {
	if testing.Short() {
		t.Skip("takes minutes")
	}
	var table scenario.Results
	t.Cleanup(func() { t.Log(table.String()) })
	// This comes first, because a broker that starts uses all processors.
	brokers := rabbit.StartAll(t,
		rabbit.Config{},
		rabbit.Config{},
		rabbit.Config{},
		rabbit.Config{Generation: rabbit.Gen310, ConsumerTimeout: 3 * time.Second, ChannelTick: time.Second},
	)

	// Subtests run in goroutines, not by t.Parallel, which would run only as many as there are
	// processors: they wait far more than they work.
	var all sync.WaitGroup
	run := func(name string, test func(*scenario.Scenario)) {
		all.Go(func() {
			t.Run(name, func(t *testing.T) { test(scenario.New(t, brokers[0], &table)) })
		})
	}
	for name, test := range map[string]func(*scenario.Scenario){
		"an operator closes the connection":                  operatorCloses,
		"the connection is reset":                            func(s *scenario.Scenario) { instant(s, s.Proxy.Reset) },
		"the connection is ended politely":                   func(s *scenario.Scenario) { instant(s, s.Proxy.FIN) },
		"an ack is sent twice behind our back":               doubleAck,
		"the queue is deleted and declared by us":            queueDeletedOurs,
		"the queue is deleted and declared by another":       queueDeletedTheirs,
		"the path swallows both ways for 32 s":               func(s *scenario.Scenario) { silence(s, faultproxy.Both, scenario.SilentPeer) },
		"the path swallows what the broker sends for 32 s":   func(s *scenario.Scenario) { silence(s, faultproxy.ToClient, scenario.SilentPeer) },
		"the path swallows what we send for 32 s":            func(s *scenario.Scenario) { silence(s, faultproxy.ToBroker, scenario.HalfOpen) },
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
	for name, test := range map[string]func(*scenario.Scenario){
		"an operator closes the connection":             operatorCloses,
		"the broker aborts the connection":              func(s *scenario.Scenario) { instant(s, s.Cut) },
		"the queue is deleted and declared by us":       queueDeletedOurs,
		"the queue is deleted and declared by another":  queueDeletedTheirs,
		"the queue is absent at the start":              queueAbsentAtStart,
		"20 connections are killed half a second apart": twentyKills,
		"handlers panic":                                handlersPanic,
		"a stop with 20 handlers running":               gracefulStop,
	} {
		run(name+", direct", func(s *scenario.Scenario) {
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

// instant is any fault that both sides notice at once.
func instant(s *scenario.Scenario, fault func()) {
	s.StartConsuming()
	s.Feed()
	lost, done := s.Timed(fault)
	s.ResumedSince(lost, done, scenario.AtOnce)
	s.Verify()
}

func operatorCloses(s *scenario.Scenario) {
	rabbit.NeedCommands(s.T, s.Broker)
	s.StartConsuming()
	s.Feed()
	_, err := s.Broker.CloseConnectionsNamed(s.Context(), s.Queue, "an operator's reason", 1, 0)
	require.NoError(s, err)
	change := s.AwaitLost(0, time.Now(), scenario.AtOnce)
	assert.ErrorContains(s, change.Cause, "an operator's reason")
	s.Resumed(change.Time, scenario.AtOnce)
	s.Verify()
}

func doubleAck(s *scenario.Scenario) {
	s.StartConsuming()
	s.Publish(100)
	s.AwaitFinished()
	s.Must(scenario.AtOnce, "a hundred acks", func() bool { return len(s.Proxy.Log().Settlements()) == 100 })
	last := s.Proxy.Log().Settlements()[99]
	s.Feed()
	at := time.Now()
	require.Equal(s, 1, s.Proxy.Inject(faultproxy.ToBroker, faultproxy.AckFrame(last.Channel, last.Tag, false)))
	change := s.AwaitLost(0, at, scenario.AtOnce)
	assert.ErrorContains(s, change.Cause, "unknown delivery tag")
	s.Resumed(at, scenario.AtOnce)
	s.KeptConnection()
	s.Verify()
}

func queueDeletedOurs(s *scenario.Scenario) {
	s.Options = append(s.Options, steadymq.WithQueue(steadymq.Queue{Type: "classic"}))
	s.StartConsuming()
	s.Publish(200)
	s.SettledAll()
	at := time.Now()
	require.NoError(s, s.Broker.DeleteQueue(s.Queue))
	s.Resumed(at, scenario.AtOnce)
	s.Feed()
	s.Verify()
}

func queueDeletedTheirs(s *scenario.Scenario) {
	s.StartConsuming()
	s.Publish(200)
	s.SettledAll()
	deleted := time.Now()
	require.NoError(s, s.Broker.DeleteQueue(s.Queue))
	s.AwaitLost(0, deleted, scenario.AtOnce)
	s.Pause(2 * time.Second)
	at := time.Now()
	require.NoError(s, s.Broker.DeclareQueue(s.Queue, nil))
	s.Resumed(at, scenario.OperatorPace)
	s.Feed()
	s.Verify()
}

// silence makes the path swallow for 32 s, which is long past every heartbeat, while messages are
// published.
func silence(s *scenario.Scenario, d faultproxy.Direction, detected time.Duration) {
	s.StartConsuming()
	s.Feed()
	at := time.Now()
	s.Proxy.BlackHole(d)
	change := s.AwaitLost(0, at, detected)
	s.Note("noticed after %v", change.Time.Sub(at).Round(10*time.Millisecond))
	s.Pause(time.Until(at.Add(32 * time.Second)))
	healed := time.Now()
	s.Proxy.Heal()
	s.Resumed(healed, scenario.AfterSilence)
	s.Verify()
}

func shortStall(s *scenario.Scenario) {
	s.StartConsuming()
	s.Feed()
	s.Proxy.Pause(faultproxy.Both)
	s.Pause(scenario.Heartbeat)
	s.Proxy.Heal()
	s.Verify()
	assert.Zero(s, s.LostSessions(), "bytes were late, none were lost: nothing to heal")
}

func queueAbsentAtStart(s *scenario.Scenario) {
	require.NoError(s, s.Broker.DeleteQueue(s.Queue))
	s.Start()
	s.Pause(2 * time.Second)
	assert.NotEqual(s, steadymq.Consuming, s.Consumer.State())
	at := time.Now()
	require.NoError(s, s.Broker.DeclareQueue(s.Queue, nil))
	s.Resumed(at, scenario.OperatorPace)
	s.Feed()
	s.Verify()
}

func twentyKills(s *scenario.Scenario) {
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

func handlersPanic(s *scenario.Scenario) {
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

func lateAcks(s *scenario.Scenario) {
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
	s.Resumed(at, scenario.AtOnce)
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

func gracefulStop(s *scenario.Scenario) {
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
	s.Stopped(time.Until(stopping.Add(scenario.DrainTimeout + scenario.CloseTimeout + time.Second)))
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

// plainDriverLateAck documents why steadymq never uses amqp.Config.Recovery: with the driver's own
// recovery the same late ack returns nil and settles another message, which nobody has handled and
// nobody will see again.
func plainDriverLateAck(s *scenario.Scenario) {
	conn, err := amqp.DialConfig(s.Proxy.URL(s.Broker.URL()), amqp.Config{
		Heartbeat: scenario.Heartbeat,
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
	scenario.CloseWithin(conn, 2*time.Second)
	left := s.TakeAll(s.Queue)
	assert.NotContains(s, left, 4, "message 4 is lost")
	assert.Contains(s, left, 2, "and message 2, which was handled, comes again")
	s.Note("a message was lost and its ack returned nil")
	s.AddRow(0)
}

func brokerDownLong(t *testing.T, b *rabbit.Broker, table *scenario.Results) {
	rabbit.NeedCommands(t, b)
	both := scenario.BothWays(t, b, table)
	for _, s := range both {
		s.StartConsuming()
		s.Feed()
	}
	at := time.Now()
	require.NoError(t, b.Restart(t.Context(), 40*time.Second))
	healed := time.Now()
	for _, s := range both {
		s.ResumedSince(at, healed, scenario.AfterRefusals)
		s.Verify()
	}
}

func brokerDownShort(t *testing.T, b *rabbit.Broker, table *scenario.Results) {
	rabbit.NeedCommands(t, b)
	t.Run("stopped for 10 s", func(t *testing.T) {
		both := scenario.BothWays(t, b, table)
		for _, s := range both {
			s.StartConsuming()
			s.Feed()
		}
		at := time.Now()
		require.NoError(t, b.StopApp(t.Context()))
		for _, s := range both {
			s.AwaitLost(0, time.Now(), scenario.AtOnce)
		}
		both[0].Pause(10 * time.Second)
		require.NoError(t, b.StartApp(t.Context()))
		healed := time.Now()
		for _, s := range both {
			s.ResumedSince(at, healed, scenario.AfterRefusals)
			s.Verify()
		}
	})
	t.Run("absent at the start", func(t *testing.T) {
		both := scenario.BothWays(t, b, table)
		require.NoError(t, b.Stop(t.Context()))
		at := time.Now()
		for _, s := range both {
			s.Start()
		}
		both[0].Pause(3 * time.Second)
		require.NoError(t, b.Start(t.Context()))
		healed := time.Now()
		for _, s := range both {
			s.ResumedSince(at, healed, scenario.AfterRefusals)
			s.Feed()
			s.Verify()
		}
	})
}

func timeoutAndAlarm(t *testing.T, b *rabbit.Broker, table *scenario.Results) {
	rabbit.NeedCommands(t, b)
	t.Run("a consumer timeout closes the channel", func(t *testing.T) { consumerTimeout(scenario.New(t, b, table)) })
	t.Run("a memory alarm", func(t *testing.T) { memoryAlarm(scenario.New(t, b, table)) })
}

func consumerTimeout(s *scenario.Scenario) {
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
	s.Resumed(change.Time, scenario.AtOnce)
	s.KeptConnection()
	s.Verify()
	s.OverdueIsStale()
}

func memoryAlarm(s *scenario.Scenario) {
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

// A consumer that stops in order and comes back as another process goes on at the very next message
// of its stream, and begins at the first of a stream that was made anew meanwhile.
func TestStreamGoesOnOverRestartsOnARealBroker(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a broker")
	}
	broker := rabbit.Start(t, rabbit.Config{})
	if !broker.HasStreams() {
		t.Skip("this broker has no streams")
	}
	const stream = "steadymq-restarts"
	conn, err := amqp.Dial(broker.URL())
	require.NoError(t, err)
	defer scenario.CloseWithin(conn, time.Second)
	ch, err := conn.Channel()
	require.NoError(t, err)
	require.NoError(t, ch.Confirm(false))
	anew := func() {
		_, _ = ch.QueueDelete(stream, false, false, false)
		_, err := ch.QueueDeclare(stream, true, false, false, false, amqp.Table{"x-queue-type": "stream"})
		require.NoError(t, err)
	}
	var published []string
	publish := func(what string, n int) {
		var last *amqp.DeferredConfirmation
		for range n {
			body := fmt.Sprint(what, len(published))
			published = append(published, body)
			last, err = ch.PublishWithDeferredConfirm("", stream, true, false, amqp.Publishing{Body: []byte(body)})
			require.NoError(t, err)
		}
		_, err := last.WaitContext(t.Context())
		require.NoError(t, err)
	}

	store := &placesInMemory{next: make(map[string]int64)}
	var mu sync.Mutex
	var handled []string
	life := func(until func(handled int) bool) (consuming time.Duration) {
		began := time.Now()
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		c, err := steadymq.New(broker.URL(), stream, steadymq.WithStreamOffsets(store),
			steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}),
			steadymq.WithHooks(steadymq.Hooks{StateChanged: func(s steadymq.StateChange) {
				if s.To == steadymq.Consuming {
					consuming = time.Since(began)
				}
			}}))
		require.NoError(t, err)
		result := make(chan error)
		go func() {
			result <- c.Run(ctx, func(_ context.Context, d *steadymq.Delivery) error {
				mu.Lock()
				defer mu.Unlock()
				handled = append(handled, string(d.Body))
				return nil
			})
		}()
		require.Eventually(t, func() bool {
			mu.Lock()
			defer mu.Unlock()
			return c.State() == steadymq.Consuming && until(len(handled))
		}, 30*time.Second, time.Millisecond)
		stop()
		require.NoError(t, <-result)
		assert.Equal(t, int64(len(handled)), store.next[stream])
		return consuming
	}

	anew()
	publish("old ", 2000)
	for i := range 5 { // stopped anywhere in between
		life(func(handled int) bool { return handled > 200*i })
		publish("old ", 50)
	}
	life(func(handled int) bool { return handled == len(published) })
	assert.Equal(t, published, handled, "each once, in order")
	took := life(func(int) bool { return true }) // there is nothing more
	t.Log("consuming after", took)
	assert.Len(t, handled, len(published))

	anew()
	published, handled = nil, nil
	publish("new ", 20)
	took = life(func(handled int) bool { return handled == len(published) })
	t.Log("a stream made anew is consumed after", took)
	assert.Equal(t, published, handled)
	publish("new ", 20)
	life(func(handled int) bool { return handled == len(published) })
	assert.Equal(t, published, handled)
}
