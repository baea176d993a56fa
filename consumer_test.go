package steadymq_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
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
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The origin story.

func TestChannelClosedByBrokerWhileConnectionStaysUpIsReplacedOnTheSameConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Wait(11 * time.Second)
		require.Equal(r, 1, r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 7"))
		r.Wait(50 * time.Millisecond)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		r.Broker.Publish(rig.Queue, "after")
		r.Wait(50 * time.Millisecond)
		assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
		assert.EqualValues(r, 2, r.Consumer.Stats().Sessions)
		assert.LessOrEqual(r, r.Outage(), 50*time.Millisecond)
		var said *amqp.Error
		require.ErrorAs(r, r.Causes()[0], &said)
		assert.Equal(r, 406, said.Code)
	})
}

func TestTwoAcksOfOneDeliveryPutOneFrameOnTheWire(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		errs := make(chan error, 2)
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			var both sync.WaitGroup
			for range 2 {
				both.Go(func() { errs <- d.Ack() })
			}
			both.Wait()
			return nil
		})
		r.Broker.Publish(rig.Queue, "once")
		r.Wait(time.Second)
		results := []error{<-errs, <-errs}
		assert.Contains(r, results, error(nil))
		assert.Contains(r, results, steadymq.ErrSettled)
		assert.Len(r, r.Broker.Ledger().Settlements, 1)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
	})
}

func TestMultipleAcksAreRefusedAndSettleNothing(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		errs := make(chan error, 8)
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			errs <- d.Delivery.Ack(true)
			errs <- d.Nack(true, true)
			errs <- d.Acknowledger.Ack(d.DeliveryTag, true)
			<-release
			return d.Ack()
		}, steadymq.WithConcurrency(2))
		r.Broker.Publish(rig.Queue, "a", "b")
		r.Wait(time.Second)
		assert.Empty(r, r.Broker.Ledger().Settlements)
		for range 6 {
			require.ErrorIs(r, <-errs, steadymq.ErrMultiple)
		}
		close(release)
		r.Wait(time.Second)
		assert.Len(r, r.Broker.Ledger().Settlements, 2)
	})
}

func TestChangedDeliveryTagCannotSettleAnotherDelivery(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		errs := make(chan error, 2)
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			d.DeliveryTag++
			errs <- d.Delivery.Ack(false)
			errs <- d.Ack()
			return nil
		})
		r.Broker.Publish(rig.Queue, "a")
		r.Wait(time.Second)
		assert.ErrorContains(r, <-errs, "tag was changed")
		assert.NoError(r, <-errs)
		require.Len(r, r.Broker.Ledger().Settlements, 1)
		assert.EqualValues(r, 1, r.Broker.Ledger().Settlements[0].Tag)
	})
}

func TestDeadPathLeavesNeitherSocketNorGoroutinesBehind(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		sockets := &rig.CountingDialer{Dial: r.Broker.Dialer()}
		r.Consuming(rig.Ack, steadymq.WithDialer(sockets.DialContext))
		before := rig.DriverGoroutines()
		r.Broker.BlackHole(true, true)
		r.Wait(rig.Heartbeat * 3 / 2) // the path is dead for new connections, too
		r.Wait(time.Second)
		assert.NotEqual(r, steadymq.Consuming, r.Consumer.State())
		r.Broker.Heal()
		r.Wait(5*time.Second + 16*time.Second) // close limit; one hung setup and its backoff
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.EqualValues(r, 1, sockets.Open.Load(), "the old socket is closed")
		assert.Equal(r, before, rig.DriverGoroutines(), "the old connection's goroutines are gone")
	})
}

// Late settlements.

func TestLateAckIsStaleAndTheRedeliveredMessageStays(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started := make(chan *steadymq.Delivery, 2)
		release := make(chan struct{})
		r.Consuming(rig.Hold(started, release), steadymq.WithConcurrency(2))
		r.Broker.Publish(rig.Queue, "x")
		late := <-started
		r.Broker.Reset()
		r.Wait(time.Second)
		again := <-started
		require.Equal(r, late.MessageId, again.MessageId)
		require.Equal(r, late.DeliveryTag, again.DeliveryTag, "the tags collide: this is what the fence is for")
		assert.NotEqual(r, late.Session(), again.Session())
		require.ErrorIs(r, late.Ack(), steadymq.ErrStale)
		require.ErrorIs(r, late.Delivery.Ack(false), steadymq.ErrStale)
		r.Wait(time.Second)
		assert.Empty(r, r.Broker.Ledger().Settlements, "nothing on the wire")
		assert.Equal(r, 1, r.Broker.Unsettled(rig.Queue))
		close(release)
		r.Wait(time.Second)
		assert.Zero(r, r.Broker.Unsettled(rig.Queue)+r.Broker.QueueLen(rig.Queue))
		assert.EqualValues(r, 1, r.Consumer.Stats().Stale)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
	})
}

func TestDriverRecoverySettlesAnotherMessageWithALateAck(t *testing.T) {
	// What amqp.Config.Recovery does, and why this library never uses it: the channel is reused,
	// tags start at 1 again, and the late ack of the first message settles the second one, which no
	// handler has finished.
	synctest.Test(t, func(t *testing.T) {
		broker := steadymqtest.NewBroker(t)
		broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
		conn, err := amqp.DialConfig(broker.URL, amqp.Config{
			Heartbeat: rig.Heartbeat,
			Recovery:  &amqp.Recovery{},
			Dial:      func(network, addr string) (net.Conn, error) { return broker.Dialer()(t.Context(), network, addr) },
		})
		require.NoError(t, err)
		defer conn.Close()
		channel, err := conn.Channel()
		require.NoError(t, err)
		require.NoError(t, channel.Qos(2, 0, false))
		deliveries, err := channel.Consume(rig.Queue, "app", false, false, false, false, nil)
		require.NoError(t, err)
		ids := broker.Publish(rig.Queue, "first", "second", "third")
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
	rig.Bubble(t, func(r *rig.Rig) {
		started := make(chan *steadymq.Delivery, 100)
		release := make(chan struct{})
		r.Consuming(rig.Hold(started, release), steadymq.WithPrefetch(10))
		r.Broker.Publish(rig.Queue, "1", "2", "3", "4", "5")
		first := <-started
		r.Broker.CloseChannels(406, "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out")
		r.Wait(time.Second)
		close(release)
		r.Wait(time.Second)
		close(started)
		for d := range started {
			assert.Equal(r, first.Session()+1, d.Session())
		}
		assert.EqualValues(r, 6, r.Consumer.Stats().Delivered)
		assert.Zero(r, r.Broker.Unsettled(rig.Queue)+r.Broker.QueueLen(rig.Queue))
	})
}

func TestHandlerContextEndsWithItsSessionAndTellsWhy(t *testing.T) {
	type key struct{}
	rig.Bubble(t, func(r *rig.Rig) {
		causes := make(chan error, 2)
		value := make(chan any, 2)
		r.Consumer = r.New()
		ctx, cancel := context.WithCancel(context.WithValue(r.Context(), key{}, "kept"))
		r.Cancel, r.Result = cancel, make(chan error, 1)
		go func() {
			r.Result <- r.Consumer.Run(ctx, func(ctx context.Context, _ *steadymq.Delivery) error {
				value <- ctx.Value(key{})
				select {
				case <-ctx.Done():
					causes <- context.Cause(ctx)
				case <-time.After(time.Second):
				}
				return nil
			})
		}()
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(100 * time.Millisecond)
		r.Broker.CloseConnections(320, "CONNECTION_FORCED - bye")
		r.Wait(20 * time.Millisecond)
		var lost *steadymq.SessionError
		require.ErrorAs(r, <-causes, &lost)
		assert.Equal(r, "lost", lost.Op)
		assert.EqualValues(r, 1, lost.Session)
		assert.Equal(r, "kept", <-value)
		r.Wait(time.Minute)
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
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack)
				f.strike(r.Broker)
				r.Wait(200 * time.Millisecond)
				require.Equal(r, steadymq.Consuming, r.Consumer.State())
				assert.LessOrEqual(r, r.Outage(), 100*time.Millisecond)
				assert.ErrorContains(r, r.Causes()[0], f.cause)
				r.Broker.Publish(rig.Queue, "after")
				r.Wait(time.Second)
				assert.Zero(r, r.Broker.Unsettled(rig.Queue)+r.Broker.QueueLen(rig.Queue))
				assert.Equal(r, 1, r.OpenConnections())
			})
		})
	}
}

// Start, retry, give up.

func TestBrokerAndQueueAbsentAtStartAreWaitedFor(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeleteQueue(rig.Queue)
		r.Broker.Refuse(true)
		r.Run(rig.Ack)
		r.Wait(time.Minute)
		dials := len(r.Broker.Ledger().Dials)
		assert.Greater(r, dials, 60, "refused dials cost nothing: the cap is 1s")
		assert.Less(r, dials, 300, "but it is no hot loop")
		r.Broker.Refuse(false)
		r.Wait(time.Minute)
		assert.Contains(r, r.Causes()[len(r.Causes())-1].Error(), "404")
		r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
		r.Wait(31 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	})
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
			rig.Bubble(t, func(r *rig.Rig) {
				c.fault(r.Broker)
				r.Run(rig.Ack)
				r.Wait(c.after)
				require.Len(r, r.Result, 1, "Run has returned")
				err := r.Stop()
				assert.ErrorContains(r, err, c.want)
				assert.ErrorAs(r, err, new(*steadymq.SessionError))
				assert.NotContains(r, err.Error(), rig.Password)
				assert.Equal(r, steadymq.Stopped, r.Consumer.State())
				assert.Zero(r, r.OpenConnections())
			})
		})
	}
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
			rig.Bubble(t, func(r *rig.Rig) {
				var calls atomic.Int32
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if calls.Add(1) > 1 {
						return nil
					}
					return c.handle(d)
				})
				r.Broker.Publish(rig.Queue, "x")
				published := time.Now()
				r.Wait(10 * time.Second)
				first := r.Broker.Ledger().Settlements[0]
				assert.Equal(r, c.kind, first.Kind)
				assert.Equal(r, c.again, first.Requeue)
				assert.GreaterOrEqual(r, first.Time.Sub(published), c.after)
				assert.Less(r, first.Time.Sub(published), c.after+1100*time.Millisecond)
				assert.Zero(r, r.Broker.Unsettled(rig.Queue)+r.Broker.QueueLen(rig.Queue))
				r.Broker.Publish(rig.Queue, "the worker lives")
				r.Wait(time.Second)
				assert.Zero(r, r.Broker.Unsettled(rig.Queue)+r.Broker.QueueLen(rig.Queue))
				stats := r.Consumer.Stats()
				assert.Equal(r, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale)
			})
		})
	}
}

func TestConcurrencyHoldsAcrossReconnects(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var running, most atomic.Int64
		r.Consuming(func(context.Context, *steadymq.Delivery) error {
			n := running.Add(1)
			defer running.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			time.Sleep(5 * time.Second)
			return nil
		}, steadymq.WithConcurrency(3))
		for i := range 30 {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
		}
		for range 10 {
			r.Wait(time.Second)
			r.Broker.Reset()
		}
		r.Wait(5 * time.Minute)
		assert.EqualValues(r, 3, most.Load())
		assert.Zero(r, r.Broker.Unsettled(rig.Queue)+r.Broker.QueueLen(rig.Queue))
	})
}

// Stop.

func TestStopAcksWhatRunsAndHandsBackWhatWasNotStarted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started := make(chan *steadymq.Delivery, 40)
		release := make(chan struct{})
		r.Consuming(rig.Hold(started, release), steadymq.WithConcurrency(20), steadymq.WithPrefetch(30))
		for i := range 30 {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
		}
		r.Wait(time.Second)
		require.Len(r, started, 20)
		r.Cancel()
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Draining, r.Consumer.State())
		assert.Equal(r, 10, r.Broker.QueueLen(rig.Queue))
		close(release)
		require.NoError(r, r.Stop())
		assert.Len(r, started, 20, "no new work")
		ledger := r.Broker.Ledger()
		assert.Equal(r, 20, ledger.Count(rig.Queue, steadymqtest.Acked))
		assert.Equal(r, 10, ledger.Count(rig.Queue, steadymqtest.Ready))
		for _, s := range ledger.Settlements {
			if s.Requeue {
				assert.Equal(r, steadymqtest.Nack, s.Kind, "never started: must not count as a failure")
			}
		}
		r.Wait(time.Second)
		assert.Zero(r, r.OpenConnections())
	})
}
