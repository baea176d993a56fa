package behaviour_test

import (
	"context"
	"errors"
	"math"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
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

// Time.

func TestCredentialsAreRefreshedOverTheWholeRangeOfTheirExpiry(t *testing.T) {
	const day = 24 * time.Hour
	for _, c := range []struct {
		name        string
		expires     func(now time.Time) time.Time
		least, most int32 // questions in a day, that of the dial included
	}{
		{"never", func(time.Time) time.Time { return time.Time{} }, 1, 1},
		{"the farthest time", func(time.Time) time.Time { return time.Unix(1<<62, 0) }, 1, 1},
		{"the year 9999", func(time.Time) time.Time { return time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) }, 1, 1},
		{"in 292 years", func(now time.Time) time.Time { return now.Add(math.MaxInt64) }, 1, 1},
		{"in 60 years", func(now time.Time) time.Time { return now.Add(60 * 365 * day) }, 1, 1},
		{"in 100 years", func(now time.Time) time.Time { return now.Add(100 * 365 * day) }, 1, 1},
		{"in an hour", func(now time.Time) time.Time { return now.Add(time.Hour) }, 34, 36},
		{"in a minute", func(now time.Time) time.Time { return now.Add(time.Minute) }, 2040, 2070},
		{"now", func(now time.Time) time.Time { return now }, 2000, 20000},
		{"a nanosecond ago", func(now time.Time) time.Time { return now.Add(-1) }, 2000, 20000},
		{"an hour ago", func(now time.Time) time.Time { return now.Add(-time.Hour) }, 2000, 20000},
		{"in 1970", func(time.Time) time.Time { return time.Unix(0, 0) }, 2000, 20000},
		{"before all times", func(time.Time) time.Time { return time.Unix(-1<<62, 0) }, 2000, 20000},
	} {
		t.Run(c.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var asked atomic.Int32
				r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
					asked.Add(1)
					return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: c.expires(time.Now())}, nil
				}))
				r.Wait(day)
				assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
				assert.GreaterOrEqual(r, asked.Load(), c.least)
				assert.LessOrEqual(r, asked.Load(), c.most)
			})
		})
	}
}

func TestIssuerThatFailsIsAskedEverMoreSlowly(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var asked atomic.Int32
		var works atomic.Bool
		works.Store(true)
		r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			asked.Add(1)
			if !works.Load() {
				return steadymq.Credentials{}, errors.New("token service is down")
			}
			return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: time.Now().Add(time.Hour)}, nil
		}))
		works.Store(false)
		r.Wait(time.Hour)
		assert.Less(r, asked.Load(), int32(15), "in 70 % of what is left")
		asked.Store(0)
		r.Wait(10 * time.Hour)
		assert.Less(r, asked.Load(), int32(3600), "then every 15 s on average")
		assert.Greater(r, asked.Load(), int32(1200), "but at least every 30 s")

		works.Store(true)
		r.Wait(31 * time.Second)
		asked.Store(0)
		r.Wait(10 * time.Hour)
		assert.LessOrEqual(r, asked.Load(), int32(15), "every 42 minutes again")
	})
}

func TestExpiredCredentialsAtTheDialAreLeftToTheBroker(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var asked atomic.Int32
		r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			asked.Add(1)
			return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: time.Now().Add(-time.Hour)}, nil
		}))
		r.Broker.RefuseLogin(true)
		r.Broker.Reset()
		asked.Store(0)
		r.Wait(10 * time.Hour)
		assert.Less(r, asked.Load(), int32(3600))
		r.Broker.Heal()
		r.Wait(35 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	})
}

func TestMessageIsHeldForAnyDuration(t *testing.T) {
	for _, c := range []struct {
		hold      time.Duration
		deliverer int // deliveries in a minute, at the least
	}{{math.MinInt64, 100}, {-1, 100}, {0, 100}, {1, 100}, {10 * time.Second, 6}, {math.MaxInt64, 1}} {
		t.Run(c.hold.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.Publish(rig.Queue, "again")
				r.Consuming(func(context.Context, *steadymq.Delivery) error {
					time.Sleep(10 * time.Millisecond)
					return steadymq.RequeueAfter(nil, c.hold)
				})
				r.Wait(time.Minute)
				assert.GreaterOrEqual(r, r.Consumer.Stats().Delivered, uint64(c.deliverer))
				assert.LessOrEqual(r, r.Consumer.Stats().Delivered, uint64(c.deliverer*60))
				require.NoError(r, r.Stop(), "the held message goes back at once")
				assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue))
			})
		})
	}
}

func TestTimesThatAMQPCannotCarryAreRefused(t *testing.T) {
	for _, table := range []amqp.Table{
		{"x-stream-offset": time.Time{}},
		{"x-stream-offset": time.Unix(-1, 0)},
		{"a": amqp.Table{"b": time.Time{}}},
		{"a": []any{1, time.Time{}}},
	} {
		for name, option := range map[string]steadymq.Option{
			"WithConsumeArgs": steadymq.WithConsumeArgs(table),
			"WithQueue":       steadymq.WithQueue(steadymq.Queue{Args: table}),
		} {
			_, err := steadymq.New("amqp://h/", rig.Queue, option)
			var refused *steadymq.OptionError
			require.ErrorAs(t, err, &refused)
			assert.Equal(t, name, refused.Option)
			assert.Contains(t, refused.Reason, "before 1970")
		}
	}
	for _, fine := range []time.Time{time.Unix(0, 0), time.Now(), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)} {
		_, err := steadymq.New("amqp://h/", rig.Queue, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": fine}))
		assert.NoError(t, err)
	}
}

func TestDurationsOfOptionsAreCheckedOverTheirWholeRange(t *testing.T) {
	for name, option := range map[string]func(time.Duration) steadymq.Option{
		"WithHeartbeat":      steadymq.WithHeartbeat,
		"WithDialTimeout":    steadymq.WithDialTimeout,
		"WithSetupTimeout":   steadymq.WithSetupTimeout,
		"WithCloseTimeout":   steadymq.WithCloseTimeout,
		"WithDrainTimeout":   steadymq.WithDrainTimeout,
		"WithHandlerTimeout": steadymq.WithHandlerTimeout,
		"WithStallDetector":  steadymq.WithStallDetector,
		"WithWriteDelay":     steadymq.WithWriteDelay,
		"WithBackoff":        func(d time.Duration) steadymq.Option { return steadymq.WithBackoff(d, d) },
	} {
		for _, d := range []time.Duration{math.MinInt64, -time.Hour, -1, 24*time.Hour + 1, math.MaxInt64 / 2, math.MaxInt64} {
			_, err := steadymq.New("amqp://h/", rig.Queue, option(d))
			var refused *steadymq.OptionError
			require.ErrorAs(t, err, &refused, "%s(%v)", name, d)
			assert.Equal(t, name, refused.Option)
		}
	}
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
