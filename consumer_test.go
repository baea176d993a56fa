package steadymq_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
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
	// What amqp.Config.Recovery does, and why this library never uses it: the
	// channel is reused, tags start at 1 again, and the late ack of the first
	// message settles the second one, which no handler has finished.
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

func TestDeliveryBehindAChannelCloseCostsNoConnection(t *testing.T) {
	// RabbitMQ 3.10 sends it now and then, and the driver would answer by
	// closing the connection.
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		require.Equal(r, 1, r.Broker.StrayDelivery())
		r.Wait(200 * time.Millisecond)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		r.Broker.Publish(rig.Queue, "after")
		r.Wait(time.Second)
		assert.Zero(r, r.Broker.Unsettled(rig.Queue)+r.Broker.QueueLen(rig.Queue))
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
	})
}

func TestDeletedQueueIsConsumedAgainOnceItIsBack(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.DeleteQueue(rig.Queue)
		r.Wait(time.Minute)
		assert.NotEqual(r, steadymq.Consuming, r.Consumer.State())
		r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
		r.Wait(31 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Len(r, r.Broker.Consumers(rig.Queue), 1)
		assert.ErrorContains(r, r.Causes()[0], "basic.cancel")
	})
}

func TestCancelledConsumerKeepsItsOldChannelForRunningHandlers(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started := make(chan *steadymq.Delivery, 9)
		release := make(chan struct{})
		r.Consuming(rig.Hold(started, release), steadymq.WithConcurrency(2), steadymq.WithPrefetch(4))
		r.Broker.Publish(rig.Queue, "1", "2", "3", "4")
		r.Wait(time.Second)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		require.EqualValues(r, 2, r.Consumer.Stats().Sessions)
		close(release)
		r.Wait(time.Second)
		assert.Zero(r, r.Broker.Unsettled(rig.Queue)+r.Broker.QueueLen(rig.Queue))
		assert.EqualValues(r, 4, r.Consumer.Stats().Delivered, "no needless duplicates")
		assert.EqualValues(r, 4, r.Consumer.Stats().Acked)
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
	})
}

func TestThreeChannelFailuresWithin30sReplaceTheConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		for range 3 {
			r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 1")
			r.Wait(3 * time.Second)
		}
		assert.EqualValues(r, 2, r.Consumer.Stats().Connections)
		assert.EqualValues(r, 4, r.Consumer.Stats().Sessions)
		assert.Equal(r, 1, r.OpenConnections())
	})
}

func TestSilentPeersAreNoticed(t *testing.T) {
	faults := []struct {
		name  string
		fault func(*steadymqtest.Broker)
		bound time.Duration
	}{
		{"black hole both ways", func(b *steadymqtest.Broker) { b.BlackHole(true, true) }, rig.Heartbeat*3/2 + 500*time.Millisecond},
		{"nothing arrives", func(b *steadymqtest.Broker) { b.BlackHole(false, true) }, rig.Heartbeat*3/2 + 500*time.Millisecond},
		{"parked reader", func(b *steadymqtest.Broker) { b.StrayReply(true) }, rig.Heartbeat * 5 / 2},
	}
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack)
				r.Wait(30 * time.Second)
				f.fault(r.Broker)
				r.Wait(f.bound)
				assert.NotEmpty(r, r.Causes(), "noticed within %v", f.bound)
				r.Broker.Heal()
				r.Wait(26 * time.Second)
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
				assert.Equal(r, 1, r.OpenConnections())
			})
		})
	}
}

func TestPeerThatDiesRightAfterOpenOkEndsByTheSetupLimit(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.SilentAfterOpen(true)
		r.Run(rig.Ack)
		r.Wait(15*time.Second + 100*time.Millisecond)
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "setup limit")
		r.Broker.SilentAfterOpen(false)
		r.Wait(26 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Equal(r, 1, r.OpenConnections())
	})
}

func TestEveryStageOfTheSetupIsBoundedAndCanBeStopped(t *testing.T) {
	for _, stage := range steadymqtest.Stages() {
		if stage == steadymqtest.StageTLS || stage == steadymqtest.StageDeclare {
			continue
		}
		t.Run(stage.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.HangAt(stage, true)
				r.Run(rig.Ack)
				r.Wait(16 * time.Second)
				require.NotEmpty(r, r.Causes(), "a hung setup is given up")
				r.Wait(11 * time.Second)
				since := time.Now()
				require.NoError(r, r.Stop())
				assert.LessOrEqual(r, time.Since(since), 6*time.Second)
				r.Wait(time.Minute)
				assert.Zero(r, r.OpenConnections())
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

func TestAfterAnOutageConsumesWithin1200msOfTheFirstAcceptedDial(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.Kill()
		r.Wait(40 * time.Second)
		r.Broker.Restart()
		r.Wait(1200 * time.Millisecond)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	})
}

func TestAnotherHostIsTriedAtOnceAndTheDrainedOneLast(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		for range 5 {
			r.Wait(time.Minute)
			for i := range 3 {
				host := r.Broker.Host(i)
				if host.CloseConnections(320, "CONNECTION_FORCED - Node was put into maintenance mode") > 0 {
					host.Refuse(true)
					r.Wait(100 * time.Millisecond)
					assert.Equal(r, steadymq.Consuming, r.Consumer.State())
					host.Refuse(false)
					break
				}
			}
		}
		assert.LessOrEqual(r, len(r.Causes()), 10)
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

func TestAfterTheFirstSessionRunNeverGivesUp(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.RefuseLogin(true)
		r.Broker.Reset()
		r.Wait(10 * time.Minute)
		require.Empty(r, r.Result)
		r.Broker.Heal()
		r.Broker.RefuseVhost(530, "NOT_ALLOWED - vhost x not found")
		r.Wait(10 * time.Minute)
		require.Empty(r, r.Result)
		r.Broker.Heal()
		r.Broker.RefuseVhost(0, "")
		r.Wait(31 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
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
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.RefuseConsume(refusal.code, refusal.text)
				r.Run(rig.Ack)
				r.Wait(20 * time.Second)
				require.Empty(r, r.Result)
				r.Broker.RefuseConsume(0, "")
				r.Wait(31 * time.Second)
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
			})
		})
	}
}

func TestFatalDecidesAlone(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithFatal(func(err error) bool {
			var said *amqp.Error
			return errors.As(err, &said) && said.Code == 320
		}))
		r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 1")
		r.Wait(time.Second)
		require.Empty(r, r.Result)
		r.Broker.CloseConnections(320, "CONNECTION_FORCED - credential expired")
		r.Wait(time.Second)
		require.Len(r, r.Result, 1)
		assert.ErrorContains(r, r.Stop(), "credential expired")
	})
}

func TestUserFunctionThatIgnoresItsContextHoldsUpNothing(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		block := make(chan struct{})
		var calls atomic.Int32
		r.Run(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			if calls.Add(1) == 1 {
				<-block
			}
			return rig.Queue, nil
		}))
		r.Wait(30 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.EqualValues(r, 1, r.Consumer.Stats().Abandoned)
		close(block)
		r.Wait(10 * time.Second)
		assert.Equal(r, 1, r.OpenConnections())
	})
}

func TestTopologyRunsForEverySessionAndMayPanic(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var calls atomic.Int32
		r.Run(rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			if calls.Add(1) == 1 {
				panic("first time")
			}
			q, err := ch.QueueDeclare("", false, true, true, false, nil)
			return q.Name, err
		}))
		r.Wait(5 * time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.ErrorContains(r, r.Causes()[0], "first time")
		r.Broker.Reset()
		r.Wait(5 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.EqualValues(r, 4, calls.Load(), "one more on a new connection, for the first may have left a queue behind")
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

func TestPanicIsReportedWithItsStack(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		failed := make(chan error, 1)
		r.Consuming(func(context.Context, *steadymq.Delivery) error { panic("kaputt") },
			steadymq.WithHooks(steadymq.Hooks{HandlerFailed: func(_ *steadymq.Delivery, err error) { failed <- err }}),
			steadymq.WithRequeueDelay(time.Hour, time.Hour))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		var p *steadymq.PanicError
		require.ErrorAs(r, <-failed, &p)
		assert.Equal(r, "kaputt", p.Value)
		assert.Contains(r, string(p.Stack), "consumer_test.go")
		assert.Contains(r, r.Log.String(), "kaputt")
	})
}

func TestHeldMessagesOccupyNoWorkerAndGoBackWhenTheConsumerStops(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "bad" {
				return steadymq.RequeueAfter(nil, time.Hour)
			}
			return nil
		})
		r.Broker.Publish(rig.Queue, "bad", "good")
		r.Wait(time.Second)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
		assert.Equal(r, 1, r.Broker.Unsettled(rig.Queue))
		since := time.Now()
		require.NoError(r, r.Stop())
		assert.Less(r, time.Since(since), time.Second)
		assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue))
	})
}

func TestHandlerTimeoutEndsTheContextWithItsCause(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		causes := make(chan error, 1)
		r.Consuming(func(ctx context.Context, _ *steadymq.Delivery) error {
			<-ctx.Done()
			causes <- context.Cause(ctx)
			return nil
		}, steadymq.WithHandlerTimeout(3*time.Second))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(4 * time.Second)
		assert.ErrorIs(r, <-causes, steadymq.ErrHandlerTimeout)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
	})
}

func TestMiddlewareWrapsFromTheOutsideAndDecidesTheOutcome(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
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
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return errors.New("poison") },
			steadymq.WithMiddleware(layer("outer"), layer("inner")))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		assert.Equal(r, []string{"outer", "inner"}, order)
		assert.EqualValues(r, 1, r.Consumer.Stats().Discarded)
	})
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

func TestDrainLimitReportsTheHandlersLeftAndLeavesTheirDeliveriesUnsettled(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started := make(chan *steadymq.Delivery, 3)
		release := make(chan struct{})
		cause := make(chan error, 1)
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			started <- d
			if string(d.Body) == "polite" {
				<-ctx.Done()
				cause <- context.Cause(ctx)
				return ctx.Err()
			}
			<-release
			return nil
		}, steadymq.WithConcurrency(2))
		r.Broker.Publish(rig.Queue, "polite", "rude")
		r.Wait(time.Second)
		since := time.Now()
		err := r.Stop()
		assert.LessOrEqual(r, time.Since(since), 36*time.Second)
		require.ErrorIs(r, err, steadymq.ErrDrainTimeout)
		var left *steadymq.DrainError
		require.ErrorAs(r, err, &left)
		assert.Equal(r, 2, left.Handlers)
		require.ErrorIs(r, <-cause, steadymq.ErrDrainTimeout)
		close(release)
		r.Wait(time.Second)
		assert.Empty(r, r.Broker.Ledger().Settlements)
		assert.Equal(r, 2, r.Broker.QueueLen(rig.Queue))
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
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack)
				fault(r.Broker)
				r.Wait(time.Millisecond)
				since := time.Now()
				_ = r.Stop()
				assert.LessOrEqual(r, time.Since(since), 6*time.Second)
				r.Wait(time.Minute)
				assert.Zero(r, r.OpenConnections())
			})
		})
	}
}

func TestStopWhileTheConnectionIsLostSaysThatAcksMayBeLost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started := make(chan *steadymq.Delivery, 2)
		release := make(chan struct{})
		r.Consuming(rig.Hold(started, release))
		r.Broker.Publish(rig.Queue, "x")
		<-started
		r.Cancel()
		r.Wait(time.Second)
		r.Broker.Reset()
		r.Wait(time.Second)
		close(release)
		var lost *steadymq.SessionError
		require.ErrorAs(r, r.Stop(), &lost)
		assert.Equal(r, "lost", lost.Op)
	})
}

// Run and hooks.

func TestRunRefusesMisuseBeforeDialling(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consumer = r.New()
		var refused *steadymq.OptionError
		require.ErrorAs(r, r.Consumer.Run(r.Context(), nil), &refused)
		assert.Equal(r, "Run", refused.Option)
		assert.Empty(r, r.Broker.Ledger().Dials)
		assert.Equal(r, steadymq.Idle, r.Consumer.State())
		r.Start(rig.Ack)
		r.Wait(time.Second)
		require.ErrorIs(r, r.Consumer.Run(r.Context(), rig.Ack), steadymq.ErrRunning)
		require.NoError(r, r.Stop())
		r.Start(rig.Ack)
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State(), "a stopped consumer may run again")
	})
}

func TestHookThatPanicsEndsRunAndEveryLaterOne(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			if c.To == steadymq.Consuming {
				panic("bad hook")
			}
		}}))
		r.Broker.Publish(rig.Queue, "kept")
		r.Wait(time.Second)
		require.Len(r, r.Result, 1)
		check := func(err error) {
			var refused *steadymq.OptionError
			require.ErrorAs(r, err, &refused)
			assert.Equal(r, "WithHooks", refused.Option)
			var p *steadymq.PanicError
			require.ErrorAs(r, err, &p)
			assert.Equal(r, "bad hook", p.Value)
		}
		check(r.Stop())
		dials := len(r.Broker.Ledger().Dials)
		check(r.Consumer.Run(r.Context(), rig.Ack))
		assert.Len(r, r.Broker.Ledger().Dials, dials)
		ledger := r.Broker.Ledger()
		assert.Equal(r, 1, ledger.Count(rig.Queue, steadymqtest.Acked)+ledger.Count(rig.Queue, steadymqtest.Ready), "nothing lost")
	})
}

func TestSlowHookDelaysNoRecoveryAndNoStop(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		block := make(chan struct{})
		r.Consuming(rig.Ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) { <-block }}))
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		since := time.Now()
		require.NoError(r, r.Stop())
		assert.LessOrEqual(r, time.Since(since), time.Second)
		close(block)
	})
}

func TestEveryTransitionIsToldOnceInOrder(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.CloseConnections(320, "CONNECTION_FORCED - bye")
		r.Wait(time.Second)
		require.NoError(r, r.Stop())
		var got []steadymq.State
		at := steadymq.Idle
		for _, c := range r.Changes() {
			assert.Equal(r, at, c.From)
			at = c.To
			got = append(got, c.To)
		}
		assert.Equal(r, []steadymq.State{
			steadymq.Connecting, steadymq.Consuming, steadymq.Backoff, steadymq.Connecting,
			steadymq.Consuming, steadymq.Draining, steadymq.Stopped,
		}, got)
		lines := strings.Split(strings.TrimSpace(r.Log.String()), "\n")
		assert.Len(r, lines, len(got), "one line each, none per message")
		assert.Contains(r, lines[2], "retry_in=")
		assert.Contains(r, lines[2], "bye")
		assert.Contains(r, lines[2], "session=1")
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
		{"unknown scheme", "http://u:" + rig.Password + "@h/", "q", nil, []string{"New"}},
		{"URL that does not parse", "amqp://u:" + rig.Password + "%zz@h/", "q", nil, []string{"New"}},
		{"URL with a space", "amqp://u:" + rig.Password + " @h/", "q", nil, []string{"New"}},
		{"port out of range", "amqp://u:" + rig.Password + "@h:99999/", "q", nil, []string{"New"}},
		{"no heartbeats", "amqp://u:" + rig.Password + "@h/?heartbeat=0", "q", nil, []string{"New"}},
		{"second URL", "amqp://h/", "q", rig.Options(steadymq.WithURLs("amqp://u:" + rig.Password + "%zz@h/")), []string{"WithURLs"}},
		{"concurrency", "amqp://h/", "q", rig.Options(steadymq.WithConcurrency(0)), []string{"WithConcurrency"}},
		{"prefetch 0", "amqp://h/", "q", rig.Options(steadymq.WithPrefetch(0)), []string{"WithPrefetch"}},
		{"prefetch below concurrency", "amqp://h/", "q", rig.Options(steadymq.WithPrefetch(2), steadymq.WithConcurrency(3)), []string{"WithPrefetch"}},
		{
			"durations", "amqp://h/", "q", rig.Options(
				steadymq.WithDialTimeout(0), steadymq.WithSetupTimeout(-1), steadymq.WithCloseTimeout(0), steadymq.WithDrainTimeout(5),
				steadymq.WithHandlerTimeout(0), steadymq.WithRequeueDelay(-time.Second, time.Minute), steadymq.WithHeartbeat(1500*time.Millisecond),
				steadymq.WithBackoff(0, 0), steadymq.WithWriteDelay(-1), steadymq.WithMaxMessageSize(0)),
			[]string{
				"WithDialTimeout", "WithSetupTimeout", "WithCloseTimeout", "WithDrainTimeout", "WithHandlerTimeout",
				"WithRequeueDelay", "WithHeartbeat", "WithBackoff", "WithBackoff", "WithWriteDelay", "WithMaxMessageSize",
			},
		},
		{
			"nils", "amqp://h/", "q", rig.Options(
				nil, steadymq.WithLogger(nil), steadymq.WithHooks(steadymq.Hooks{}), steadymq.WithFatal(nil), steadymq.WithTopology(nil), steadymq.WithURLs(),
				steadymq.WithTLSConfig(nil), steadymq.WithSASL(), steadymq.WithDialer(nil), steadymq.WithMiddleware(nil), steadymq.WithURLFunc(nil)),
			[]string{
				"New", "WithLogger", "WithHooks", "WithFatal", "WithTopology", "WithURLs", "WithTLSConfig", "WithSASL",
				"WithDialer", "WithMiddleware", "WithURLFunc",
			},
		},
		{
			"names", "amqp://h/", strings.Repeat("q", 256), rig.Options(steadymq.WithConsumerTag(""), steadymq.WithConnectionName(strings.Repeat("x", 256))),
			[]string{"WithConsumerTag", "WithConnectionName", "New"},
		},
		{"transient shared queue", "amqp://h/", "q", rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "classic", Transient: true})), []string{"WithQueue"}},
		{"exclusive quorum queue", "amqp://h/", "q", rig.Options(steadymq.WithQueue(steadymq.Queue{Exclusive: true})), []string{"WithQueue"}},
		{"exclusive consumer of a quorum queue", "amqp://h/", "q", rig.Options(steadymq.WithExclusive(), steadymq.WithQueue(steadymq.Queue{})), []string{"WithExclusive"}},
		{
			"stall detector on a filtered stream", "amqp://h/", "q",
			rig.Options(steadymq.WithStallDetector(time.Minute), steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first", "x-stream-filter": "eu"})),
			[]string{"WithStallDetector"},
		},
		{"unverified TLS", "amqps://h/", "q", rig.Options(steadymq.WithTLSConfig(&tls.Config{InsecureSkipVerify: true})), []string{"WithTLSConfig"}},
		{"TLS on a plain URL", "amqp://h/", "q", rig.Options(steadymq.WithTLSConfig(new(tls.Config))), []string{"WithTLSConfig"}},
		{"credentials twice", "amqp://h/", "q", rig.Options(steadymq.WithSASL(&amqp.ExternalAuth{}), steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			return steadymq.Credentials{}, nil
		})), []string{"WithCredentials"}},
		{"unknown queue type", "amqp://h/", "q", rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "fast"})), []string{"WithQueue"}},
		{"bad argument", "amqp://h/", "q", rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x": struct{}{}})), []string{"WithConsumeArgs"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := steadymq.New(c.url, c.queue, c.opts...)
			require.Error(t, err)
			assert.NotContains(t, fmt.Sprintf("%v %+v %#v", err, err, err), rig.Password)
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

func TestConsumerPrintsNoPassword(t *testing.T) {
	c, err := steadymq.New("amqp://app:"+rig.Password+"@localhost/", "q")
	require.NoError(t, err)
	assert.NotContains(t, fmt.Sprintf("%v %+v %#v", c, c, c), rig.Password)
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
