package steadymq_test

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
			bubble(t, func(b *bench) {
				b.broker.RefuseVhost(530, text)
				b.run(ack)
				b.wait(5 * time.Minute)
				assert.LessOrEqual(b, len(b.broker.Ledger().Dials), 1, "dials")
				require.Len(b, b.result, 1, "Run returns what the broker states plainly")
			})
		})
	}
}

// Hosts.

func TestLastGoodHostIsTriedAgainBeforeOneThatFellSilent(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.wait(11 * time.Second)
		silent := b.hostInUse()
		b.broker.Host(silent).BlackHole(true, true)
		b.wait(16 * time.Second)
		require.Equal(b, steadymq.Consuming, b.consumer.State())
		require.Equal(b, 1-silent, b.hostInUse())
		b.wait(2 * time.Second)
		b.broker.Host(1 - silent).Reset()
		b.wait(20 * time.Second)
		require.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.Equal(b, 1-silent, b.hostInUse())
		assert.LessOrEqual(b, b.outage(), 300*time.Millisecond, "the second retry of a row")
	}, steadymqtest.WithHosts(2))
}

// A connection may also end while it waits for the next try of a session.
func TestHostThatFellSilentBetweenSessionsGoesLast(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.wait(11 * time.Second)
		b.broker.RefuseConsume(405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'orders' in vhost '/'")
		b.broker.CancelConsumers(queue)
		for b.consumer.State() != steadymq.Backoff || b.lastWait() < 25*time.Second {
			b.wait(100 * time.Millisecond)
		}
		silent, dials := b.hostInUse(), len(b.broker.Ledger().Dials)
		b.broker.Host(silent).BlackHole(true, true)
		b.broker.RefuseConsume(0, "")
		b.wait(31 * time.Second)
		require.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.Equal(b, 1-silent, b.hostInUse())
		assert.Len(b, b.broker.Ledger().Dials, dials+1, "the silent one is not dialled")
	}, steadymqtest.WithHosts(2))
}

// Pace.

func TestMissingQueueIsConsumedWithin5500msOfItsReturn(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		for range 20 {
			b.broker.DeleteQueue(queue)
			b.wait(10 * time.Minute)
			require.NotEqual(b, steadymq.Consuming, b.consumer.State())
			b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{})
			b.wait(5500 * time.Millisecond)
			require.Equal(b, steadymq.Consuming, b.consumer.State())
		}
	})
}

func TestMissingQueueIsAskedForOnOneConnection(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.broker.DeleteQueue(queue)
		b.wait(time.Hour)
		assert.EqualValues(b, 1, b.consumer.Stats().Connections, "a channel is enough to ask")
	})
}

func TestMissingQueueIsAskedForOnAllHosts(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.wait(time.Minute)
		forgetful := b.hostInUse()
		b.broker.Host(forgetful).RefuseConsume(404, "NOT_FOUND - no queue 'orders' in vhost '/'")
		b.broker.CancelConsumers(queue)
		b.wait(20 * time.Second)
		require.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.Equal(b, 1-forgetful, b.hostInUse())
	}, steadymqtest.WithHosts(2))
}

func TestWaitsOfARunKeepToTheLimitOfWithBackoff(t *testing.T) {
	for name, fault := range map[string]func(b *bench){
		"no queue":     func(b *bench) { b.broker.DeleteQueue(queue) },
		"no vhost":     func(b *bench) { b.broker.RefuseVhost(530, "vhost / not found"); b.broker.Reset() },
		"wrong login":  func(b *bench) { b.broker.RefuseLogin(true); b.broker.Reset() },
		"locked":       func(b *bench) { b.broker.RefuseConsume(405, "locked"); b.broker.Reset() },
		"dials fail":   func(b *bench) { b.broker.Kill() },
		"no handshake": func(b *bench) { b.broker.DropAt(steadymqtest.StageTune, true); b.broker.Reset() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.consuming(ack, steadymq.WithBackoff(10*time.Millisecond, 200*time.Millisecond))
				fault(b)
				b.wait(time.Minute)
				assert.Greater(b, len(b.causes()), 10)
				assert.LessOrEqual(b, b.longestWait(), 200*time.Millisecond)
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
			bubble(t, func(b *bench) {
				var asked atomic.Int32
				b.consuming(ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
					asked.Add(1)
					return steadymq.Credentials{Username: "app", Password: password, Expires: c.expires(time.Now())}, nil
				}))
				b.wait(day)
				assert.EqualValues(b, 1, b.consumer.Stats().Connections)
				assert.GreaterOrEqual(b, asked.Load(), c.least)
				assert.LessOrEqual(b, asked.Load(), c.most)
			})
		})
	}
}

func TestIssuerThatFailsIsAskedEverMoreSlowly(t *testing.T) {
	bubble(t, func(b *bench) {
		var asked atomic.Int32
		var works atomic.Bool
		works.Store(true)
		b.consuming(ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			asked.Add(1)
			if !works.Load() {
				return steadymq.Credentials{}, errors.New("token service is down")
			}
			return steadymq.Credentials{Username: "app", Password: password, Expires: time.Now().Add(time.Hour)}, nil
		}))
		works.Store(false)
		b.wait(time.Hour)
		assert.Less(b, asked.Load(), int32(15), "in 70 % of what is left")
		asked.Store(0)
		b.wait(10 * time.Hour)
		assert.Less(b, asked.Load(), int32(3600), "then every 15 s on average")
		assert.Greater(b, asked.Load(), int32(1200), "but at least every 30 s")

		works.Store(true)
		b.wait(31 * time.Second)
		asked.Store(0)
		b.wait(10 * time.Hour)
		assert.LessOrEqual(b, asked.Load(), int32(15), "every 42 minutes again")
	})
}

func TestExpiredCredentialsAtTheDialAreLeftToTheBroker(t *testing.T) {
	bubble(t, func(b *bench) {
		var asked atomic.Int32
		b.consuming(ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			asked.Add(1)
			return steadymq.Credentials{Username: "app", Password: password, Expires: time.Now().Add(-time.Hour)}, nil
		}))
		b.broker.RefuseLogin(true)
		b.broker.Reset()
		asked.Store(0)
		b.wait(10 * time.Hour)
		assert.Less(b, asked.Load(), int32(3600))
		b.broker.Heal()
		b.wait(35 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
	})
}

func TestMessageIsHeldForAnyDuration(t *testing.T) {
	for _, c := range []struct {
		hold      time.Duration
		deliverer int // deliveries in a minute, at the least
	}{{math.MinInt64, 100}, {-1, 100}, {0, 100}, {1, 100}, {10 * time.Second, 6}, {math.MaxInt64, 1}} {
		t.Run(c.hold.String(), func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.Publish(queue, "again")
				b.consuming(func(context.Context, *steadymq.Delivery) error {
					time.Sleep(10 * time.Millisecond)
					return steadymq.RequeueAfter(nil, c.hold)
				})
				b.wait(time.Minute)
				assert.GreaterOrEqual(b, b.consumer.Stats().Delivered, uint64(c.deliverer))
				assert.LessOrEqual(b, b.consumer.Stats().Delivered, uint64(c.deliverer*60))
				require.NoError(b, b.stop(), "the held message goes back at once")
				assert.Equal(b, 1, b.broker.QueueLen(queue))
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
			_, err := steadymq.New("amqp://h/", queue, option)
			var refused *steadymq.OptionError
			require.ErrorAs(t, err, &refused)
			assert.Equal(t, name, refused.Option)
			assert.Contains(t, refused.Reason, "before 1970")
		}
	}
	for _, fine := range []time.Time{time.Unix(0, 0), time.Now(), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)} {
		_, err := steadymq.New("amqp://h/", queue, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": fine}))
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
			_, err := steadymq.New("amqp://h/", queue, option(d))
			var refused *steadymq.OptionError
			require.ErrorAs(t, err, &refused, "%s(%v)", name, d)
			assert.Equal(t, name, refused.Option)
		}
	}
}

// What is told.

func TestStopAfterHoursOfHealthTellsNoFailures(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		b.broker.Reset()
		b.wait(5 * time.Hour)
		require.NoError(b, b.stop())
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, change := range b.changes {
			if change.To == steadymq.Draining || change.To == steadymq.Stopped {
				assert.Zero(b, change.Attempt, "%v", change.To)
			}
		}
	})
}

func TestChangesCutOffByTheEndAreCounted(t *testing.T) {
	bubble(t, func(b *bench) {
		release := make(chan struct{})
		defer close(release)
		var told atomic.Int32
		b.consuming(ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) {
			told.Add(1)
			<-release
		}}))
		require.NoError(b, b.stop())
		assert.EqualValues(b, 1, told.Load(), "connecting")
		assert.EqualValues(b, 3, b.consumer.Stats().EventsDropped, "consuming, draining, stopped")
	})
}

// lastWait returns the wait of the last backoff.
func (b *bench) lastWait() (wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.changes {
		if c.To == steadymq.Backoff {
			wait = c.RetryIn
		}
	}
	return wait
}

// longestWait returns the longest time the consumer has waited in backoff.
func (b *bench) longestWait() (longest time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.changes {
		longest = max(longest, c.RetryIn)
	}
	return longest
}
