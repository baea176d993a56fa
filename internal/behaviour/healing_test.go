package behaviour_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// Names.

func TestVirtualHostOrUserNamedLikeALimitIsNoLimit(t *testing.T) {
	for _, text := range []string{
		"vhost unlimited not found",
		"access to vhost '/' refused for user 'rate-limiter'",
		"access to vhost 'connection limit (5) is reached' refused for user 'app'",
	} {
		t.Run(text, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.RefuseVhost(530, text)
				r.Run(rig.Ack)
				r.Wait(5 * time.Minute)
				assert.LessOrEqual(r, len(r.Broker.Ledger().Dials), 1, "dials")
				require.Len(r, r.Result, 1, "Run returns what the broker states plainly")
			})
		})
	}
}

// Hosts.

func TestLastGoodHostIsTriedAgainBeforeOneThatFellSilent(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Wait(11 * time.Second)
		silent := r.HostInUse()
		r.Broker.Host(silent).BlackHole(true, true)
		r.Wait(16 * time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		require.Equal(r, 1-silent, r.HostInUse())
		r.Wait(2 * time.Second)
		r.Broker.Host(1 - silent).Reset()
		r.Wait(20 * time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Equal(r, 1-silent, r.HostInUse())
		assert.LessOrEqual(r, r.Outage(), 300*time.Millisecond, "the second retry of a row")
	}, steadymqtest.WithHosts(2))
}

// A connection may also end while it waits for the next try of a session.
func TestHostThatFellSilentBetweenSessionsGoesLast(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Wait(11 * time.Second)
		r.Broker.RefuseConsume(405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'orders' in vhost '/'")
		r.Broker.CancelConsumers(rig.Queue)
		for r.Consumer.State() != steadymq.Backoff || r.LastWait() < 25*time.Second {
			r.Wait(100 * time.Millisecond)
		}
		silent, dials := r.HostInUse(), len(r.Broker.Ledger().Dials)
		r.Broker.Host(silent).BlackHole(true, true)
		r.Broker.RefuseConsume(0, "")
		r.Wait(31 * time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Equal(r, 1-silent, r.HostInUse())
		assert.Len(r, r.Broker.Ledger().Dials, dials+1, "the silent one is not dialled")
	}, steadymqtest.WithHosts(2))
}

// Pace.

func TestMissingQueueIsConsumedWithin5500msOfItsReturn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		for range 20 {
			r.Broker.DeleteQueue(rig.Queue)
			r.Wait(10 * time.Minute)
			require.NotEqual(r, steadymq.Consuming, r.Consumer.State())
			r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
			r.Wait(5500 * time.Millisecond)
			require.Equal(r, steadymq.Consuming, r.Consumer.State())
		}
	})
}

func TestMissingQueueIsAskedForOnOneConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.DeleteQueue(rig.Queue)
		r.Wait(time.Hour)
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections, "a channel is enough to ask")
	})
}

func TestMissingQueueIsAskedForOnAllHosts(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Wait(time.Minute)
		forgetful := r.HostInUse()
		r.Broker.Host(forgetful).RefuseConsume(404, "NOT_FOUND - no queue 'orders' in vhost '/'")
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(20 * time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Equal(r, 1-forgetful, r.HostInUse())
	}, steadymqtest.WithHosts(2))
}

func TestWaitsOfARunKeepToTheLimitOfWithBackoff(t *testing.T) {
	for name, fault := range map[string]func(r *rig.Rig){
		"no queue":     func(r *rig.Rig) { r.Broker.DeleteQueue(rig.Queue) },
		"no vhost":     func(r *rig.Rig) { r.Broker.RefuseVhost(530, "vhost / not found"); r.Broker.Reset() },
		"wrong login":  func(r *rig.Rig) { r.Broker.RefuseLogin(true); r.Broker.Reset() },
		"locked":       func(r *rig.Rig) { r.Broker.RefuseConsume(405, "locked"); r.Broker.Reset() },
		"dials fail":   func(r *rig.Rig) { r.Broker.Kill() },
		"no handshake": func(r *rig.Rig) { r.Broker.DropAt(steadymqtest.StageTune, true); r.Broker.Reset() },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack, steadymq.WithBackoff(10*time.Millisecond, 200*time.Millisecond))
				fault(r)
				r.Wait(time.Minute)
				assert.Greater(r, len(r.Causes()), 10)
				assert.LessOrEqual(r, r.LongestWait(), 200*time.Millisecond)
			})
		})
	}
}

func TestSessionsLostRightAfterConsumeOkBackOffOnSeveralHostsToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b *steadymqtest.Broker
		b = steadymqtest.NewBroker(t, steadymqtest.WithHosts(2), steadymqtest.WithHooks(steadymqtest.Hooks{
			Consuming: func(steadymqtest.ConsumerRecord) {
				time.AfterFunc(10*time.Millisecond, func() { b.CloseConnections(320, "flaps") })
			},
		}))
		b.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
		c, err := steadymq.New(b.URLs()[0], rig.Queue, steadymq.WithURLs(b.URLs()[1:]...), steadymq.WithDialer(b.Dialer()))
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		require.NoError(t, c.Run(ctx, rig.Ack))
		assert.Less(t, len(b.Ledger().Dials), 60, "no hot loop")
	})
}

// What is told.

func TestStopAfterHoursOfHealthTellsNoFailures(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.Reset()
		r.Wait(5 * time.Hour)
		require.NoError(r, r.Stop())

		for _, change := range r.Changes() {
			if change.To == steadymq.Draining || change.To == steadymq.Stopped {
				assert.Zero(r, change.Attempt, "%v", change.To)
			}
		}
	})
}

func TestChangesCutOffByTheEndAreCounted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		defer close(release)
		var told atomic.Int32
		r.Consuming(rig.Ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) {
			told.Add(1)
			<-release
		}}))
		require.NoError(r, r.Stop())
		assert.EqualValues(r, 1, told.Load(), "connecting")
		assert.EqualValues(r, 3, r.Consumer.Stats().EventsDropped, "consuming, draining, stopped")
	})
}

// Ends of a session.

func TestDeliveryBehindAChannelCloseCostsNoConnection(t *testing.T) {
	// RabbitMQ 3.10 sends it now and then, and the driver would answer by closing the connection.
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

// Silence.

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

// After an outage.

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
