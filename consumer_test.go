package steadymq_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	queue     = "orders"
	password  = "canary-swordfish"
	heartbeat = 10 * time.Second
)

// bench is one consumer on one in-process broker inside a bubble.
type bench struct {
	*testing.T
	broker   *steadymqtest.Broker
	consumer *steadymq.Consumer
	stopRun  context.CancelFunc
	result   chan error
	log      *logBuffer

	mu      sync.Mutex
	changes []steadymq.StateChange
}

// bubble runs test in virtual time with a broker that has the queue.
func bubble(t *testing.T, test func(b *bench), opts ...steadymqtest.Option) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		opts = append([]steadymqtest.Option{steadymqtest.WithUser("app", password), steadymqtest.WithLatency(time.Millisecond)}, opts...)
		b := &bench{T: t, broker: steadymqtest.NewBroker(t, opts...), log: new(logBuffer)}
		b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{})
		test(b)
		b.stop()
		assert.Empty(t, b.broker.Violations(), "no tag settled twice, unknown or multiple")
		assert.NotContains(t, b.log.String(), password, "no password in the log")
	})
}

// run starts the consumer; opts come after those every test needs.
func (b *bench) run(h steadymq.Handler, opts ...steadymq.Option) {
	b.Helper()
	b.consumer = b.make(opts...)
	b.start(h)
}

func (b *bench) make(opts ...steadymq.Option) *steadymq.Consumer {
	b.Helper()
	return b.makeFor(queue, opts...)
}

func (b *bench) makeFor(queue string, opts ...steadymq.Option) *steadymq.Consumer {
	b.Helper()
	urls := b.broker.URLs()
	all := []steadymq.Option{
		steadymq.WithDialer(b.broker.Dialer()),
		steadymq.WithLogger(slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug}))),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: b.changed}),
	}
	if len(urls) > 1 {
		all = append(all, steadymq.WithURLs(urls[1:]...))
	}
	c, err := steadymq.New(urls[0], queue, append(all, opts...)...)
	require.NoError(b, err)
	return c
}

func (b *bench) start(h steadymq.Handler) {
	ctx, cancel := context.WithCancel(b.Context())
	b.stopRun = cancel
	b.result = make(chan error, 1)
	go func() { b.result <- b.consumer.Run(ctx, h) }()
}

// consuming runs the consumer and waits for its first session.
func (b *bench) consuming(h steadymq.Handler, opts ...steadymq.Option) {
	b.Helper()
	b.run(h, opts...)
	b.wait(100 * time.Millisecond)
	require.Equal(b, steadymq.Consuming, b.consumer.State())
}

// wait lets virtual time pass.
func (b *bench) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// stop ends Run, if it runs, and returns its error.
func (b *bench) stop() error {
	if b.result == nil {
		return nil
	}
	b.stopRun()
	err := <-b.result
	b.result = nil
	return err
}

func (b *bench) changed(c steadymq.StateChange) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.changes = append(b.changes, c)
}

// causes returns why the consumer went into backoff, in order.
func (b *bench) causes() (causes []error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.changes {
		if c.To == steadymq.Backoff {
			causes = append(causes, c.Cause)
		}
	}
	return causes
}

// shortestWait returns the shortest time the consumer has waited in backoff.
func (b *bench) shortestWait() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	shortest := time.Hour
	for _, c := range b.changes {
		if c.To == steadymq.Backoff {
			shortest = min(shortest, c.RetryIn)
		}
	}
	return shortest
}

// outage returns how long the consumer was not consuming, the last time.
func (b *bench) outage() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	var lost, back time.Time
	for _, c := range b.changes {
		if c.From == steadymq.Consuming {
			lost = c.Time
		}
		if c.To == steadymq.Consuming {
			back = c.Time
		}
	}
	return back.Sub(lost)
}

// open returns the connections the broker has not seen the end of.
func (b *bench) open() (n int) {
	for _, c := range b.broker.Connections() {
		if c.Ended.IsZero() {
			n++
		}
	}
	return n
}

func ack(context.Context, *steadymq.Delivery) error { return nil }

// hold is a handler that waits until it is let go, whatever its context says.
func hold(started chan<- *steadymq.Delivery, release <-chan struct{}) steadymq.Handler {
	return func(_ context.Context, d *steadymq.Delivery) error {
		started <- d
		<-release
		return nil
	}
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// The origin story.

func TestChannelClosedByBrokerWhileConnectionStaysUpIsReplacedOnTheSameConnection(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.wait(11 * time.Second)
		require.Equal(b, 1, b.broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 7"))
		b.wait(50 * time.Millisecond)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		b.broker.Publish(queue, "after")
		b.wait(50 * time.Millisecond)
		assert.Zero(b, b.broker.QueueLen(queue)+b.broker.Unsettled(queue))
		assert.EqualValues(b, 1, b.consumer.Stats().Connections)
		assert.EqualValues(b, 2, b.consumer.Stats().Sessions)
		assert.LessOrEqual(b, b.outage(), 50*time.Millisecond)
		var said *amqp.Error
		require.ErrorAs(b, b.causes()[0], &said)
		assert.Equal(b, 406, said.Code)
	})
}

func TestTwoAcksOfOneDeliveryPutOneFrameOnTheWire(t *testing.T) {
	bubble(t, func(b *bench) {
		errs := make(chan error, 2)
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			var both sync.WaitGroup
			for range 2 {
				both.Go(func() { errs <- d.Ack() })
			}
			both.Wait()
			return nil
		})
		b.broker.Publish(queue, "once")
		b.wait(time.Second)
		results := []error{<-errs, <-errs}
		assert.Contains(b, results, error(nil))
		assert.Contains(b, results, steadymq.ErrSettled)
		assert.Len(b, b.broker.Ledger().Settlements, 1)
		assert.EqualValues(b, 1, b.consumer.Stats().Acked)
	})
}

func TestMultipleAcksAreRefusedAndSettleNothing(t *testing.T) {
	bubble(t, func(b *bench) {
		release := make(chan struct{})
		errs := make(chan error, 8)
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			errs <- d.Delivery.Ack(true)
			errs <- d.Nack(true, true)
			errs <- d.Acknowledger.Ack(d.DeliveryTag, true)
			<-release
			return d.Ack()
		}, steadymq.WithConcurrency(2))
		b.broker.Publish(queue, "a", "b")
		b.wait(time.Second)
		assert.Empty(b, b.broker.Ledger().Settlements)
		for range 6 {
			require.ErrorIs(b, <-errs, steadymq.ErrMultiple)
		}
		close(release)
		b.wait(time.Second)
		assert.Len(b, b.broker.Ledger().Settlements, 2)
	})
}

func TestChangedDeliveryTagCannotSettleAnotherDelivery(t *testing.T) {
	bubble(t, func(b *bench) {
		errs := make(chan error, 2)
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			d.DeliveryTag++
			errs <- d.Delivery.Ack(false)
			errs <- d.Ack()
			return nil
		})
		b.broker.Publish(queue, "a")
		b.wait(time.Second)
		assert.ErrorContains(b, <-errs, "tag was changed")
		assert.NoError(b, <-errs)
		require.Len(b, b.broker.Ledger().Settlements, 1)
		assert.EqualValues(b, 1, b.broker.Ledger().Settlements[0].Tag)
	})
}

func TestDeadPathLeavesNeitherSocketNorGoroutinesBehind(t *testing.T) {
	bubble(t, func(b *bench) {
		sockets := &countingDialer{dial: b.broker.Dialer()}
		b.consuming(ack, steadymq.WithDialer(sockets.DialContext))
		before := driverGoroutines()
		b.broker.BlackHole(true, true)
		b.wait(heartbeat * 3 / 2) // the path is dead for new connections, too
		b.wait(time.Second)
		assert.NotEqual(b, steadymq.Consuming, b.consumer.State())
		b.broker.Heal()
		b.wait(5*time.Second + 16*time.Second) // close limit; one hung setup and its backoff
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.EqualValues(b, 1, sockets.open.Load(), "the old socket is closed")
		assert.Equal(b, before, driverGoroutines(), "the old connection's goroutines are gone")
	})
}

// countingDialer counts the sockets that are open on this side.
type countingDialer struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)
	open atomic.Int64
}

func (d *countingDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := d.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	d.open.Add(1)
	return &countedConn{Conn: conn, closed: sync.OnceFunc(func() { d.open.Add(-1) })}, nil
}

type countedConn struct {
	net.Conn
	closed func()
}

func (c *countedConn) Close() error {
	c.closed()
	return c.Conn.Close()
}

func driverGoroutines() int {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	n := 0
	for g := range strings.SplitSeq(string(stacks), "\n\n") {
		if strings.Contains(g, "amqp091-go.") {
			n++
		}
	}
	return n
}

// Late settlements.

func TestLateAckIsStaleAndTheRedeliveredMessageStays(t *testing.T) {
	bubble(t, func(b *bench) {
		started := make(chan *steadymq.Delivery, 2)
		release := make(chan struct{})
		b.consuming(hold(started, release), steadymq.WithConcurrency(2))
		b.broker.Publish(queue, "x")
		late := <-started
		b.broker.Reset()
		b.wait(time.Second)
		again := <-started
		require.Equal(b, late.MessageId, again.MessageId)
		require.Equal(b, late.DeliveryTag, again.DeliveryTag, "the tags collide: this is what the fence is for")
		assert.NotEqual(b, late.Session(), again.Session())
		require.ErrorIs(b, late.Ack(), steadymq.ErrStale)
		require.ErrorIs(b, late.Delivery.Ack(false), steadymq.ErrStale)
		b.wait(time.Second)
		assert.Empty(b, b.broker.Ledger().Settlements, "nothing on the wire")
		assert.Equal(b, 1, b.broker.Unsettled(queue))
		close(release)
		b.wait(time.Second)
		assert.Zero(b, b.broker.Unsettled(queue)+b.broker.QueueLen(queue))
		assert.EqualValues(b, 1, b.consumer.Stats().Stale)
		assert.EqualValues(b, 1, b.consumer.Stats().Acked)
	})
}

func TestDriverRecoverySettlesAnotherMessageWithALateAck(t *testing.T) {
	// What amqp.Config.Recovery does, and why this library never uses it: the
	// channel is reused, tags start at 1 again, and the late ack of the first
	// message settles the second one, which no handler has finished.
	synctest.Test(t, func(t *testing.T) {
		broker := steadymqtest.NewBroker(t)
		broker.DeclareQueue(queue, steadymqtest.QueueOptions{})
		conn, err := amqp.DialConfig(broker.URL, amqp.Config{
			Heartbeat: heartbeat,
			Recovery:  &amqp.Recovery{},
			Dial:      func(network, addr string) (net.Conn, error) { return broker.Dialer()(t.Context(), network, addr) },
		})
		require.NoError(t, err)
		defer conn.Close()
		channel, err := conn.Channel()
		require.NoError(t, err)
		require.NoError(t, channel.Qos(2, 0, false))
		deliveries, err := channel.Consume(queue, "app", false, false, false, false, nil)
		require.NoError(t, err)
		ids := broker.Publish(queue, "first", "second", "third")
		done := <-deliveries
		require.NoError(t, done.Ack(false))
		late := <-deliveries // its handler is still at work when the connection is lost
		require.Equal(t, ids[1], late.MessageId)
		time.Sleep(time.Second)

		broker.Reset()
		time.Sleep(time.Minute)
		var working []string
		for len(working) < 2 { // what the broker sends now, behind what the driver still had
			if d := <-deliveries; d.DeliveryTag <= 2 {
				working = append(working, d.MessageId)
			}
		}
		require.Equal(t, []string{ids[1], ids[2]}, working, "delivered again, at work, not settled")
		assert.NoError(t, late.Ack(false), "the driver reports no error")
		time.Sleep(time.Second)
		ledger := broker.Ledger()
		assert.Equal(t, steadymqtest.Unacked, ledger.With(ids[1])[0].Fate, "the message it finished is not settled")
		assert.Equal(t, steadymqtest.Acked, ledger.With(ids[2])[0].Fate, "a message nobody finished is gone")
	})
}

func TestDeliveriesOfADeadSessionThatNoHandlerStartedAreDropped(t *testing.T) {
	bubble(t, func(b *bench) {
		started := make(chan *steadymq.Delivery, 100)
		release := make(chan struct{})
		b.consuming(hold(started, release), steadymq.WithPrefetch(10))
		b.broker.Publish(queue, "1", "2", "3", "4", "5")
		first := <-started
		b.broker.CloseChannels(406, "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out")
		b.wait(time.Second)
		close(release)
		b.wait(time.Second)
		close(started)
		for d := range started {
			assert.Equal(b, first.Session()+1, d.Session())
		}
		assert.EqualValues(b, 6, b.consumer.Stats().Delivered)
		assert.Zero(b, b.broker.Unsettled(queue)+b.broker.QueueLen(queue))
	})
}

func TestHandlerContextEndsWithItsSessionAndTellsWhy(t *testing.T) {
	type key struct{}
	bubble(t, func(b *bench) {
		causes := make(chan error, 2)
		value := make(chan any, 2)
		b.consumer = b.make()
		ctx, cancel := context.WithCancel(context.WithValue(b.Context(), key{}, "kept"))
		b.stopRun, b.result = cancel, make(chan error, 1)
		go func() {
			b.result <- b.consumer.Run(ctx, func(ctx context.Context, _ *steadymq.Delivery) error {
				value <- ctx.Value(key{})
				select {
				case <-ctx.Done():
					causes <- context.Cause(ctx)
				case <-time.After(time.Second):
				}
				return nil
			})
		}()
		b.broker.Publish(queue, "x")
		b.wait(100 * time.Millisecond)
		b.broker.CloseConnections(320, "CONNECTION_FORCED - bye")
		b.wait(20 * time.Millisecond)
		var lost *steadymq.SessionError
		require.ErrorAs(b, <-causes, &lost)
		assert.Equal(b, "lost", lost.Op)
		assert.EqualValues(b, 1, lost.Session)
		assert.Equal(b, "kept", <-value)
		b.wait(time.Minute)
	})
}

// Other ends of a session.

func TestConnectionFailuresHealAtOnceAndNameTheirCause(t *testing.T) {
	faults := []struct {
		name   string
		strike func(*steadymqtest.Broker)
		cause  string
	}{
		{"connection.close", func(b *steadymqtest.Broker) { b.CloseConnections(320, "CONNECTION_FORCED - closed by operator") }, "closed by operator"},
		{"RST", func(b *steadymqtest.Broker) { b.Reset() }, "reset"},
		{"FIN", func(b *steadymqtest.Broker) { b.FIN() }, "peer closed the connection"},
		{"internal error", func(b *steadymqtest.Broker) { b.CloseConnections(541, "INTERNAL_ERROR") }, "INTERNAL_ERROR"},
		{"garbage", func(b *steadymqtest.Broker) { b.Garbage(99, 0, 1, 0, 0, 0, 0, 0xce) }, ""},
	}
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.consuming(ack)
				f.strike(b.broker)
				b.wait(200 * time.Millisecond)
				require.Equal(b, steadymq.Consuming, b.consumer.State())
				assert.LessOrEqual(b, b.outage(), 100*time.Millisecond)
				assert.ErrorContains(b, b.causes()[0], f.cause)
				b.broker.Publish(queue, "after")
				b.wait(time.Second)
				assert.Zero(b, b.broker.Unsettled(queue)+b.broker.QueueLen(queue))
				assert.Equal(b, 1, b.open())
			})
		})
	}
}

func TestDeliveryBehindAChannelCloseCostsNoConnection(t *testing.T) {
	// RabbitMQ 3.10 sends it now and then, and the driver would answer by
	// closing the connection.
	bubble(t, func(b *bench) {
		b.consuming(ack)
		require.Equal(b, 1, b.broker.StrayDelivery())
		b.wait(200 * time.Millisecond)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		b.broker.Publish(queue, "after")
		b.wait(time.Second)
		assert.Zero(b, b.broker.Unsettled(queue)+b.broker.QueueLen(queue))
		assert.EqualValues(b, 1, b.consumer.Stats().Connections)
	})
}

func TestDeletedQueueIsConsumedAgainOnceItIsBack(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.broker.DeleteQueue(queue)
		b.wait(time.Minute)
		assert.NotEqual(b, steadymq.Consuming, b.consumer.State())
		b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{})
		b.wait(31 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.Len(b, b.broker.Consumers(queue), 1)
		assert.ErrorContains(b, b.causes()[0], "basic.cancel")
	})
}

func TestCancelledConsumerKeepsItsOldChannelForRunningHandlers(t *testing.T) {
	bubble(t, func(b *bench) {
		started := make(chan *steadymq.Delivery, 9)
		release := make(chan struct{})
		b.consuming(hold(started, release), steadymq.WithConcurrency(2), steadymq.WithPrefetch(4))
		b.broker.Publish(queue, "1", "2", "3", "4")
		b.wait(time.Second)
		b.broker.CancelConsumers(queue)
		b.wait(time.Second)
		require.Equal(b, steadymq.Consuming, b.consumer.State())
		require.EqualValues(b, 2, b.consumer.Stats().Sessions)
		close(release)
		b.wait(time.Second)
		assert.Zero(b, b.broker.Unsettled(queue)+b.broker.QueueLen(queue))
		assert.EqualValues(b, 4, b.consumer.Stats().Delivered, "no needless duplicates")
		assert.EqualValues(b, 4, b.consumer.Stats().Acked)
		assert.EqualValues(b, 1, b.consumer.Stats().Connections)
	})
}

func TestThreeChannelFailuresWithin30sReplaceTheConnection(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		for range 3 {
			b.broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 1")
			b.wait(3 * time.Second)
		}
		assert.EqualValues(b, 2, b.consumer.Stats().Connections)
		assert.EqualValues(b, 4, b.consumer.Stats().Sessions)
		assert.Equal(b, 1, b.open())
	})
}

func TestSilentPeersAreNoticed(t *testing.T) {
	faults := []struct {
		name  string
		fault func(*steadymqtest.Broker)
		bound time.Duration
	}{
		{"black hole both ways", func(b *steadymqtest.Broker) { b.BlackHole(true, true) }, heartbeat*3/2 + 500*time.Millisecond},
		{"nothing arrives", func(b *steadymqtest.Broker) { b.BlackHole(false, true) }, heartbeat*3/2 + 500*time.Millisecond},
		{"parked reader", func(b *steadymqtest.Broker) { b.StrayReply(true) }, heartbeat * 5 / 2},
	}
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.consuming(ack)
				b.wait(30 * time.Second)
				f.fault(b.broker)
				b.wait(f.bound)
				assert.NotEmpty(b, b.causes(), "noticed within %v", f.bound)
				b.broker.Heal()
				b.wait(26 * time.Second)
				assert.Equal(b, steadymq.Consuming, b.consumer.State())
				assert.Equal(b, 1, b.open())
			})
		})
	}
}

func TestPeerThatDiesRightAfterOpenOkEndsByTheSetupLimit(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.SilentAfterOpen(true)
		b.run(ack)
		b.wait(15*time.Second + 100*time.Millisecond)
		require.NotEmpty(b, b.causes())
		assert.ErrorContains(b, b.causes()[0], "setup limit")
		b.broker.SilentAfterOpen(false)
		b.wait(26 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.Equal(b, 1, b.open())
	})
}

func TestEveryStageOfTheSetupIsBoundedAndCanBeStopped(t *testing.T) {
	for _, stage := range steadymqtest.Stages() {
		if stage == steadymqtest.StageTLS || stage == steadymqtest.StageDeclare {
			continue
		}
		t.Run(stage.String(), func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.HangAt(stage, true)
				b.run(ack)
				b.wait(16 * time.Second)
				require.NotEmpty(b, b.causes(), "a hung setup is given up")
				b.wait(11 * time.Second)
				since := time.Now()
				require.NoError(b, b.stop())
				assert.LessOrEqual(b, time.Since(since), 6*time.Second)
				b.wait(time.Minute)
				assert.Zero(b, b.open())
			})
		})
	}
}

// Start, retry, give up.

func TestBrokerAndQueueAbsentAtStartAreWaitedFor(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeleteQueue(queue)
		b.broker.Refuse(true)
		b.run(ack)
		b.wait(time.Minute)
		dials := len(b.broker.Ledger().Dials)
		assert.Greater(b, dials, 60, "refused dials cost nothing: the cap is 1s")
		assert.Less(b, dials, 300, "but it is no hot loop")
		b.broker.Refuse(false)
		b.wait(time.Minute)
		assert.Contains(b, b.causes()[len(b.causes())-1].Error(), "404")
		b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{})
		b.wait(31 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
	})
}

func TestAfterAnOutageConsumesWithin1200msOfTheFirstAcceptedDial(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.broker.Kill()
		b.wait(40 * time.Second)
		b.broker.Restart()
		b.wait(1200 * time.Millisecond)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
	})
}

func TestAnotherHostIsTriedAtOnceAndTheDrainedOneLast(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		for range 5 {
			b.wait(time.Minute)
			for i := range 3 {
				host := b.broker.Host(i)
				if host.CloseConnections(320, "CONNECTION_FORCED - Node was put into maintenance mode") > 0 {
					host.Refuse(true)
					b.wait(100 * time.Millisecond)
					assert.Equal(b, steadymq.Consuming, b.consumer.State())
					host.Refuse(false)
					break
				}
			}
		}
		assert.LessOrEqual(b, len(b.causes()), 10)
	}, steadymqtest.WithHosts(3))
}

func TestBeforeTheFirstSessionRunGivesUpOnWhatTheBrokerStatesPlainly(t *testing.T) {
	cases := []struct {
		name  string
		fault func(*steadymqtest.Broker)
		want  string
		after time.Duration
	}{
		{"no such vhost", func(b *steadymqtest.Broker) { b.RefuseVhost(530, "NOT_ALLOWED - vhost x not found") }, "vhost x not found", time.Second},
		{"no permission", func(b *steadymqtest.Broker) {
			b.RefuseConsume(403, "ACCESS_REFUSED - access to queue 'orders' in vhost '/' refused for user 'app'")
		}, "refused for user", time.Second},
		{"wrong password", func(b *steadymqtest.Broker) { b.RefuseLogin(true) }, "check user name, password", 20 * time.Second},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				c.fault(b.broker)
				b.run(ack)
				b.wait(c.after)
				require.Len(b, b.result, 1, "Run has returned")
				err := b.stop()
				assert.ErrorContains(b, err, c.want)
				assert.ErrorAs(b, err, new(*steadymq.SessionError))
				assert.NotContains(b, err.Error(), password)
				assert.Equal(b, steadymq.Stopped, b.consumer.State())
				assert.Zero(b, b.open())
			})
		})
	}
}

func TestAfterTheFirstSessionRunNeverGivesUp(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.broker.RefuseLogin(true)
		b.broker.Reset()
		b.wait(10 * time.Minute)
		require.Empty(b, b.result)
		b.broker.Heal()
		b.broker.RefuseVhost(530, "NOT_ALLOWED - vhost x not found")
		b.wait(10 * time.Minute)
		require.Empty(b, b.result)
		b.broker.Heal()
		b.broker.RefuseVhost(0, "")
		b.wait(31 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
	})
}

func TestTransientRefusalsBeforeTheFirstSessionAreRetried(t *testing.T) {
	for _, refusal := range []struct {
		code int
		text string
	}{
		{404, "NOT_FOUND - no queue 'orders' in vhost '/'"},
		{405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'orders'"},
		{403, "ACCESS_REFUSED - queue 'orders' in vhost '/' in exclusive use"},
	} {
		t.Run(refusal.text, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.RefuseConsume(refusal.code, refusal.text)
				b.run(ack)
				b.wait(20 * time.Second)
				require.Empty(b, b.result)
				b.broker.RefuseConsume(0, "")
				b.wait(31 * time.Second)
				assert.Equal(b, steadymq.Consuming, b.consumer.State())
			})
		})
	}
}

func TestFatalDecidesAlone(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithFatal(func(err error) bool {
			var said *amqp.Error
			return errors.As(err, &said) && said.Code == 320
		}))
		b.broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 1")
		b.wait(time.Second)
		require.Empty(b, b.result)
		b.broker.CloseConnections(320, "CONNECTION_FORCED - credential expired")
		b.wait(time.Second)
		require.Len(b, b.result, 1)
		assert.ErrorContains(b, b.stop(), "credential expired")
	})
}

func TestUserFunctionThatIgnoresItsContextHoldsUpNothing(t *testing.T) {
	bubble(t, func(b *bench) {
		block := make(chan struct{})
		var calls atomic.Int32
		b.run(ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			if calls.Add(1) == 1 {
				<-block
			}
			return queue, nil
		}))
		b.wait(30 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.EqualValues(b, 1, b.consumer.Stats().Abandoned)
		close(block)
		b.wait(10 * time.Second)
		assert.Equal(b, 1, b.open())
	})
}

func TestTopologyRunsForEverySessionAndMayPanic(t *testing.T) {
	bubble(t, func(b *bench) {
		var calls atomic.Int32
		b.run(ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			if calls.Add(1) == 1 {
				panic("first time")
			}
			q, err := ch.QueueDeclare("", false, true, true, false, nil)
			return q.Name, err
		}))
		b.wait(5 * time.Second)
		require.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.ErrorContains(b, b.causes()[0], "first time")
		b.broker.Reset()
		b.wait(5 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.EqualValues(b, 4, calls.Load(), "one more on a new connection, for the first may have left a queue behind")
	})
}

// Outcomes.

func TestOutcomeFollowsTheHandlersError(t *testing.T) {
	boom := errors.New("boom")
	cases := []struct {
		name   string
		handle func(d *steadymq.Delivery) error
		kind   steadymqtest.Kind
		again  bool
		after  time.Duration
	}{
		{"nil acks", func(*steadymq.Delivery) error { return nil }, steadymqtest.Ack, false, 0},
		{"an error requeues after the hold", func(*steadymq.Delivery) error { return boom }, steadymqtest.Reject, true, 500 * time.Millisecond},
		{"Requeue at once", func(*steadymq.Delivery) error { return fmt.Errorf("w: %w", steadymq.Requeue(boom)) }, steadymqtest.Reject, true, 0},
		{"RequeueAfter", func(*steadymq.Delivery) error { return steadymq.RequeueAfter(boom, 3*time.Second) }, steadymqtest.Reject, true, 3 * time.Second},
		{"Discard", func(*steadymq.Delivery) error { return steadymq.Discard(boom) }, steadymqtest.Reject, false, 0},
		{"a panic requeues", func(*steadymq.Delivery) error { panic(boom) }, steadymqtest.Reject, true, 500 * time.Millisecond},
		{"Goexit requeues", func(*steadymq.Delivery) error { runtime.Goexit(); return nil }, steadymqtest.Reject, true, 500 * time.Millisecond},
		{"settled by hand", func(d *steadymq.Delivery) error { _ = d.Discard(); return boom }, steadymqtest.Reject, false, 0},
		{"the driver's own Nack", func(d *steadymq.Delivery) error { _ = d.Nack(false, true); return nil }, steadymqtest.Reject, true, 0},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				var calls atomic.Int32
				b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if calls.Add(1) > 1 {
						return nil
					}
					return c.handle(d)
				})
				b.broker.Publish(queue, "x")
				published := time.Now()
				b.wait(10 * time.Second)
				first := b.broker.Ledger().Settlements[0]
				assert.Equal(b, c.kind, first.Kind)
				assert.Equal(b, c.again, first.Requeue)
				assert.GreaterOrEqual(b, first.Time.Sub(published), c.after)
				assert.Less(b, first.Time.Sub(published), c.after+1100*time.Millisecond)
				assert.Zero(b, b.broker.Unsettled(queue)+b.broker.QueueLen(queue))
				b.broker.Publish(queue, "the worker lives")
				b.wait(time.Second)
				assert.Zero(b, b.broker.Unsettled(queue)+b.broker.QueueLen(queue))
				stats := b.consumer.Stats()
				assert.Equal(b, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale)
			})
		})
	}
}

func TestPanicIsReportedWithItsStack(t *testing.T) {
	bubble(t, func(b *bench) {
		failed := make(chan error, 1)
		b.consuming(func(context.Context, *steadymq.Delivery) error { panic("kaputt") },
			steadymq.WithHooks(steadymq.Hooks{HandlerFailed: func(_ *steadymq.Delivery, err error) { failed <- err }}),
			steadymq.WithRequeueDelay(time.Hour, time.Hour))
		b.broker.Publish(queue, "x")
		b.wait(time.Second)
		var p *steadymq.PanicError
		require.ErrorAs(b, <-failed, &p)
		assert.Equal(b, "kaputt", p.Value)
		assert.Contains(b, string(p.Stack), "consumer_test.go")
		assert.Contains(b, b.log.String(), "kaputt")
	})
}

func TestHeldMessagesOccupyNoWorkerAndGoBackWhenTheConsumerStops(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "bad" {
				return steadymq.RequeueAfter(nil, time.Hour)
			}
			return nil
		})
		b.broker.Publish(queue, "bad", "good")
		b.wait(time.Second)
		assert.EqualValues(b, 1, b.consumer.Stats().Acked)
		assert.Equal(b, 1, b.broker.Unsettled(queue))
		since := time.Now()
		require.NoError(b, b.stop())
		assert.Less(b, time.Since(since), time.Second)
		assert.Equal(b, 1, b.broker.QueueLen(queue))
	})
}

func TestHandlerTimeoutEndsTheContextWithItsCause(t *testing.T) {
	bubble(t, func(b *bench) {
		causes := make(chan error, 1)
		b.consuming(func(ctx context.Context, _ *steadymq.Delivery) error {
			<-ctx.Done()
			causes <- context.Cause(ctx)
			return nil
		}, steadymq.WithHandlerTimeout(3*time.Second))
		b.broker.Publish(queue, "x")
		b.wait(4 * time.Second)
		assert.ErrorIs(b, <-causes, steadymq.ErrHandlerTimeout)
		assert.EqualValues(b, 1, b.consumer.Stats().Acked)
	})
}

func TestMiddlewareWrapsFromTheOutsideAndDecidesTheOutcome(t *testing.T) {
	bubble(t, func(b *bench) {
		var order []string
		layer := func(name string) steadymq.Middleware {
			return func(next steadymq.Handler) steadymq.Handler {
				return func(ctx context.Context, d *steadymq.Delivery) error {
					order = append(order, name)
					if err := next(ctx, d); err != nil {
						return steadymq.Discard(err)
					}
					return nil
				}
			}
		}
		b.consuming(func(context.Context, *steadymq.Delivery) error { return errors.New("poison") },
			steadymq.WithMiddleware(layer("outer"), layer("inner")))
		b.broker.Publish(queue, "x")
		b.wait(time.Second)
		assert.Equal(b, []string{"outer", "inner"}, order)
		assert.EqualValues(b, 1, b.consumer.Stats().Discarded)
	})
}

func TestConcurrencyHoldsAcrossReconnects(t *testing.T) {
	bubble(t, func(b *bench) {
		var running, most atomic.Int64
		b.consuming(func(context.Context, *steadymq.Delivery) error {
			n := running.Add(1)
			defer running.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			time.Sleep(5 * time.Second)
			return nil
		}, steadymq.WithConcurrency(3))
		for i := range 30 {
			b.broker.Publish(queue, fmt.Sprint(i))
		}
		for range 10 {
			b.wait(time.Second)
			b.broker.Reset()
		}
		b.wait(5 * time.Minute)
		assert.EqualValues(b, 3, most.Load())
		assert.Zero(b, b.broker.Unsettled(queue)+b.broker.QueueLen(queue))
	})
}

// Stop.

func TestStopAcksWhatRunsAndHandsBackWhatWasNotStarted(t *testing.T) {
	bubble(t, func(b *bench) {
		started := make(chan *steadymq.Delivery, 40)
		release := make(chan struct{})
		b.consuming(hold(started, release), steadymq.WithConcurrency(20), steadymq.WithPrefetch(30))
		for i := range 30 {
			b.broker.Publish(queue, fmt.Sprint(i))
		}
		b.wait(time.Second)
		require.Len(b, started, 20)
		b.stopRun()
		b.wait(time.Second)
		assert.Equal(b, steadymq.Draining, b.consumer.State())
		assert.Equal(b, 10, b.broker.QueueLen(queue))
		close(release)
		require.NoError(b, b.stop())
		assert.Len(b, started, 20, "no new work")
		ledger := b.broker.Ledger()
		assert.Equal(b, 20, ledger.Count(queue, steadymqtest.Acked))
		assert.Equal(b, 10, ledger.Count(queue, steadymqtest.Ready))
		for _, s := range ledger.Settlements {
			if s.Requeue {
				assert.Equal(b, steadymqtest.Nack, s.Kind, "never started: must not count as a failure")
			}
		}
		b.wait(time.Second)
		assert.Zero(b, b.open())
	})
}

func TestDrainLimitReportsTheHandlersLeftAndLeavesTheirDeliveriesUnsettled(t *testing.T) {
	bubble(t, func(b *bench) {
		started := make(chan *steadymq.Delivery, 3)
		release := make(chan struct{})
		cause := make(chan error, 1)
		b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			started <- d
			if string(d.Body) == "polite" {
				<-ctx.Done()
				cause <- context.Cause(ctx)
				return ctx.Err()
			}
			<-release
			return nil
		}, steadymq.WithConcurrency(2))
		b.broker.Publish(queue, "polite", "rude")
		b.wait(time.Second)
		since := time.Now()
		err := b.stop()
		assert.LessOrEqual(b, time.Since(since), 36*time.Second)
		require.ErrorIs(b, err, steadymq.ErrDrainTimeout)
		var left *steadymq.DrainError
		require.ErrorAs(b, err, &left)
		assert.Equal(b, 2, left.Handlers)
		require.ErrorIs(b, <-cause, steadymq.ErrDrainTimeout)
		close(release)
		b.wait(time.Second)
		assert.Empty(b, b.broker.Ledger().Settlements)
		assert.Equal(b, 2, b.broker.QueueLen(queue))
	})
}

func TestStopIsBoundedOnADeadPathAndBySlowCloseOk(t *testing.T) {
	faults := map[string]func(*steadymqtest.Broker){
		"black hole":     func(b *steadymqtest.Broker) { b.BlackHole(true, true) },
		"no close-ok":    func(b *steadymqtest.Broker) { b.NoCloseOk(true) },
		"slow close-ok":  func(b *steadymqtest.Broker) { b.SlowCloseOk(4900 * time.Millisecond) },
		"zero window":    func(b *steadymqtest.Broker) { b.ZeroWindow(true) },
		"parked reader":  func(b *steadymqtest.Broker) { b.StrayReply(true) },
		"power off":      func(b *steadymqtest.Broker) { b.PowerOff() },
		"stray, channel": func(b *steadymqtest.Broker) { b.StrayReply(false) },
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.consuming(ack)
				fault(b.broker)
				b.wait(time.Millisecond)
				since := time.Now()
				_ = b.stop()
				assert.LessOrEqual(b, time.Since(since), 6*time.Second)
				b.wait(time.Minute)
				assert.Zero(b, b.open())
			})
		})
	}
}

func TestStopWhileTheConnectionIsLostSaysThatAcksMayBeLost(t *testing.T) {
	bubble(t, func(b *bench) {
		started := make(chan *steadymq.Delivery, 2)
		release := make(chan struct{})
		b.consuming(hold(started, release))
		b.broker.Publish(queue, "x")
		<-started
		b.stopRun()
		b.wait(time.Second)
		b.broker.Reset()
		b.wait(time.Second)
		close(release)
		var lost *steadymq.SessionError
		require.ErrorAs(b, b.stop(), &lost)
		assert.Equal(b, "lost", lost.Op)
	})
}

// Run and hooks.

func TestRunRefusesMisuseBeforeDialling(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consumer = b.make()
		var refused *steadymq.OptionError
		require.ErrorAs(b, b.consumer.Run(b.Context(), nil), &refused)
		assert.Equal(b, "Run", refused.Option)
		assert.Empty(b, b.broker.Ledger().Dials)
		assert.Equal(b, steadymq.Idle, b.consumer.State())
		b.start(ack)
		b.wait(time.Second)
		require.ErrorIs(b, b.consumer.Run(b.Context(), ack), steadymq.ErrRunning)
		require.NoError(b, b.stop())
		b.start(ack)
		b.wait(time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State(), "a stopped consumer may run again")
	})
}

func TestHookThatPanicsEndsRunAndEveryLaterOne(t *testing.T) {
	bubble(t, func(b *bench) {
		b.run(ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			if c.To == steadymq.Consuming {
				panic("bad hook")
			}
		}}))
		b.broker.Publish(queue, "kept")
		b.wait(time.Second)
		require.Len(b, b.result, 1)
		check := func(err error) {
			var refused *steadymq.OptionError
			require.ErrorAs(b, err, &refused)
			assert.Equal(b, "WithHooks", refused.Option)
			var p *steadymq.PanicError
			require.ErrorAs(b, err, &p)
			assert.Equal(b, "bad hook", p.Value)
		}
		check(b.stop())
		dials := len(b.broker.Ledger().Dials)
		check(b.consumer.Run(b.Context(), ack))
		assert.Len(b, b.broker.Ledger().Dials, dials)
		ledger := b.broker.Ledger()
		assert.Equal(b, 1, ledger.Count(queue, steadymqtest.Acked)+ledger.Count(queue, steadymqtest.Ready), "nothing lost")
	})
}

func TestSlowHookDelaysNoRecoveryAndNoStop(t *testing.T) {
	bubble(t, func(b *bench) {
		block := make(chan struct{})
		b.consuming(ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) { <-block }}))
		b.broker.Reset()
		b.wait(time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		since := time.Now()
		require.NoError(b, b.stop())
		assert.LessOrEqual(b, time.Since(since), time.Second)
		close(block)
	})
}

func TestEveryTransitionIsToldOnceInOrder(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.broker.CloseConnections(320, "CONNECTION_FORCED - bye")
		b.wait(time.Second)
		require.NoError(b, b.stop())
		var got []steadymq.State
		at := steadymq.Idle
		for _, c := range b.changes {
			assert.Equal(b, at, c.From)
			at = c.To
			got = append(got, c.To)
		}
		assert.Equal(b, []steadymq.State{
			steadymq.Connecting, steadymq.Consuming, steadymq.Backoff, steadymq.Connecting,
			steadymq.Consuming, steadymq.Draining, steadymq.Stopped,
		}, got)
		lines := strings.Split(strings.TrimSpace(b.log.String()), "\n")
		assert.Len(b, lines, len(got), "one line each, none per message")
		assert.Contains(b, lines[2], "retry_in=")
		assert.Contains(b, lines[2], "bye")
		assert.Contains(b, lines[2], "session=1")
	})
}

// New.

func TestNewRefusesBadInputAllAtOnceWithoutShowingTheURL(t *testing.T) {
	cases := []struct {
		name   string
		url    string
		queue  string
		opts   []steadymq.Option
		option []string
	}{
		{"empty queue", "amqp://h/", "", nil, []string{"New"}},
		{"unknown scheme", "http://u:" + password + "@h/", "q", nil, []string{"New"}},
		{"URL that does not parse", "amqp://u:" + password + "%zz@h/", "q", nil, []string{"New"}},
		{"URL with a space", "amqp://u:" + password + " @h/", "q", nil, []string{"New"}},
		{"port out of range", "amqp://u:" + password + "@h:99999/", "q", nil, []string{"New"}},
		{"no heartbeats", "amqp://u:" + password + "@h/?heartbeat=0", "q", nil, []string{"New"}},
		{"second URL", "amqp://h/", "q", opts(steadymq.WithURLs("amqp://u:" + password + "%zz@h/")), []string{"WithURLs"}},
		{"concurrency", "amqp://h/", "q", opts(steadymq.WithConcurrency(0)), []string{"WithConcurrency"}},
		{"prefetch 0", "amqp://h/", "q", opts(steadymq.WithPrefetch(0)), []string{"WithPrefetch"}},
		{"prefetch below concurrency", "amqp://h/", "q", opts(steadymq.WithPrefetch(2), steadymq.WithConcurrency(3)), []string{"WithPrefetch"}},
		{
			"durations", "amqp://h/", "q", opts(
				steadymq.WithDialTimeout(0), steadymq.WithSetupTimeout(-1), steadymq.WithCloseTimeout(0), steadymq.WithDrainTimeout(5),
				steadymq.WithHandlerTimeout(0), steadymq.WithRequeueDelay(-time.Second, time.Minute), steadymq.WithHeartbeat(1500*time.Millisecond),
				steadymq.WithBackoff(0, 0), steadymq.WithWriteDelay(-1), steadymq.WithMaxMessageSize(0)),
			[]string{
				"WithDialTimeout", "WithSetupTimeout", "WithCloseTimeout", "WithDrainTimeout", "WithHandlerTimeout",
				"WithRequeueDelay", "WithHeartbeat", "WithBackoff", "WithBackoff", "WithWriteDelay", "WithMaxMessageSize",
			},
		},
		{
			"nils", "amqp://h/", "q", opts(
				nil, steadymq.WithLogger(nil), steadymq.WithHooks(steadymq.Hooks{}), steadymq.WithFatal(nil), steadymq.WithTopology(nil), steadymq.WithURLs(),
				steadymq.WithTLSConfig(nil), steadymq.WithSASL(), steadymq.WithDialer(nil), steadymq.WithMiddleware(nil), steadymq.WithURLFunc(nil)),
			[]string{
				"New", "WithLogger", "WithHooks", "WithFatal", "WithTopology", "WithURLs", "WithTLSConfig", "WithSASL",
				"WithDialer", "WithMiddleware", "WithURLFunc",
			},
		},
		{
			"names", "amqp://h/", strings.Repeat("q", 256), opts(steadymq.WithConsumerTag(""), steadymq.WithConnectionName(strings.Repeat("x", 256))),
			[]string{"WithConsumerTag", "WithConnectionName", "New"},
		},
		{"transient shared queue", "amqp://h/", "q", opts(steadymq.WithQueue(steadymq.Queue{Type: "classic", Transient: true})), []string{"WithQueue"}},
		{"exclusive quorum queue", "amqp://h/", "q", opts(steadymq.WithQueue(steadymq.Queue{Exclusive: true})), []string{"WithQueue"}},
		{"exclusive consumer of a quorum queue", "amqp://h/", "q", opts(steadymq.WithExclusive(), steadymq.WithQueue(steadymq.Queue{})), []string{"WithExclusive"}},
		{
			"stall detector on a filtered stream", "amqp://h/", "q",
			opts(steadymq.WithStallDetector(time.Minute), steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first", "x-stream-filter": "eu"})),
			[]string{"WithStallDetector"},
		},
		{"unverified TLS", "amqps://h/", "q", opts(steadymq.WithTLSConfig(&tls.Config{InsecureSkipVerify: true})), []string{"WithTLSConfig"}},
		{"TLS on a plain URL", "amqp://h/", "q", opts(steadymq.WithTLSConfig(new(tls.Config))), []string{"WithTLSConfig"}},
		{"credentials twice", "amqp://h/", "q", opts(steadymq.WithSASL(&amqp.ExternalAuth{}), steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			return steadymq.Credentials{}, nil
		})), []string{"WithCredentials"}},
		{"unknown queue type", "amqp://h/", "q", opts(steadymq.WithQueue(steadymq.Queue{Type: "fast"})), []string{"WithQueue"}},
		{"bad argument", "amqp://h/", "q", opts(steadymq.WithConsumeArgs(amqp.Table{"x": struct{}{}})), []string{"WithConsumeArgs"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := steadymq.New(c.url, c.queue, c.opts...)
			require.Error(t, err)
			assert.NotContains(t, fmt.Sprintf("%v %+v %#v", err, err, err), password)
			var got []string
			for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
				var refused *steadymq.OptionError
				require.ErrorAs(t, e, &refused)
				got = append(got, refused.Option)
			}
			assert.Equal(t, c.option, got)
		})
	}
}

func opts(o ...steadymq.Option) []steadymq.Option { return o }

func TestConsumerPrintsNoPassword(t *testing.T) {
	c, err := steadymq.New("amqp://app:"+password+"@localhost/", "q")
	require.NoError(t, err)
	assert.NotContains(t, fmt.Sprintf("%v %+v %#v", c, c, c), password)
}

func TestNewDeliveryServesHandlerTests(t *testing.T) {
	d := steadymq.NewDelivery(amqp.Delivery{Body: []byte("x"), Redelivered: true, Headers: amqp.Table{"x-delivery-count": int64(3)}})
	assert.Equal(t, 4, d.Attempt())
	assert.Equal(t, steadymq.Unsettled, d.Outcome())
	require.NoError(t, d.Ack())
	require.ErrorIs(t, d.Discard(), steadymq.ErrSettled)
	assert.Equal(t, steadymq.Acked, d.Outcome())
	assert.Zero(t, d.Session())
}
