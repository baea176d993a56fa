package behaviour_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/internal/table"
	"github.com/steadymq/steadymq/steadymqtest"
)

const parked = "orders.parked"

var errPoison = fmt.Errorf("order 7: %w", io.ErrUnexpectedEOF)

func park(context.Context, *steadymq.Delivery) error { return steadymq.Park(errPoison) }

// parking is the option of a consumer that only parks.
func parking() steadymq.Option { return steadymq.WithRetry(steadymq.Retry{Attempts: 1, Park: parked}) }

// taken returns the messages of a queue, by a client that consumes all of it.
func taken(r *rig.Rig, queue string) []amqp.Delivery {
	r.Helper()
	conn, err := amqp.DialConfig(r.Broker.URL, amqp.Config{Dial: r.Broker.Dial})
	require.NoError(r, err)
	ch, err := conn.Channel()
	require.NoError(r, err)
	deliveries, err := ch.Consume(queue, "", true, false, false, false, nil)
	require.NoError(r, err)
	var all []amqp.Delivery
	for {
		select {
		case d := <-deliveries:
			all = append(all, d)
			continue
		case <-time.After(time.Second):
		}
		require.NoError(r, conn.Close())
		return all
	}
}

func TestParkedMessageKeepsItsContentAndItsCause(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		id := r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: []byte("seven"), Headers: amqp.Table{
			"tenant": "blue", "x-stream-offset": int64(7), "CC": []any{"elsewhere"},
		}})
		r.Wait(10 * time.Second)
		assert.Equal(r, uint64(1), r.Consumer.Stats().Parked)
		assert.Zero(r, r.Consumer.Stats().Held)
		assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
		require.NoError(r, r.Stop())

		all := taken(r, parked)
		require.Len(r, all, 1)
		m := all[0]
		assert.Equal(r, "seven", string(m.Body))
		assert.Equal(r, id, m.MessageId)
		assert.Equal(r, "blue", m.Headers["tenant"])
		assert.NotContains(r, m.Headers, "CC")
		assert.NotContains(r, m.Headers, "x-stream-offset")
		assert.Equal(r, int32(1), m.Headers["steadymq-attempt"])
		assert.Equal(r, "order 7: unexpected EOF", m.Headers["steadymq-error"])
		assert.Equal(r, "*errors.errorString", m.Headers["steadymq-error-type"])
		assert.Equal(r, rig.Queue, m.Headers["steadymq-queue"])
		assert.Equal(r, rig.Queue, m.Headers["steadymq-routing-key"])
		assert.Equal(r, "", m.Headers["steadymq-exchange"])
		assert.IsType(r, time.Time{}, m.Headers["steadymq-time"])
		assert.NotEmpty(r, m.Headers["steadymq-host"])
		assert.NotEmpty(r, m.Headers["steadymq-consumer"])
	})
}

func TestNothingIsAckedBeforeItsCopyIsConfirmed(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.Publish(rig.Queue, "0") // an alarm concerns those that have published
		r.Wait(time.Second)
		r.Broker.Blocked("low on memory")
		r.Broker.Publish(rig.Queue, "1", "2", "3")
		r.Wait(5 * time.Minute)
		assert.Equal(r, uint64(1), r.Consumer.Stats().Parked)
		assert.Equal(r, 3, r.Consumer.Stats().Held)
		assert.Equal(r, 3, r.Broker.Unsettled(rig.Queue))
		r.Broker.Unblocked()
		r.Wait(10 * time.Second)
		assert.Equal(r, uint64(4), r.Consumer.Stats().Parked)
		assert.Equal(r, 4, r.Broker.QueueLen(parked))
		assert.LessOrEqual(r, len(r.Warnings("cannot be parked")), 6, "a line a minute")
	})
}

// While the copies of a message do not arrive, it stays in its queue and is tried again; once they
// do it is acked.
func TestCopyThatIsNotConfirmedIsTriedAgain(t *testing.T) {
	for name, row := range map[string]struct {
		fault  func(r *rig.Rig, on bool)
		copies bool // the queue has them, though nobody has said so
		cause  string
	}{
		"confirm lost":     {func(r *rig.Rig, on bool) { r.Broker.Host(0).LoseConfirms(on) }, true, "has not confirmed a copy in time"},
		"confirm negative": {func(r *rig.Rig, on bool) { r.Broker.Host(0).NackConfirms(on) }, true, "basic.nack"},
		"queue full":       {func(r *rig.Rig, on bool) { r.Broker.FillQueue(parked, on) }, false, "basic.nack"},
		"unroutable":       {func(r *rig.Rig, on bool) { r.Broker.Host(0).Unroutable(on) }, false, "does not exist"},
		"may not publish": {func(r *rig.Rig, on bool) {
			write := ".*"
			if on {
				write = "^orders$"
			}
			r.Broker.SetPermissions("app", ".*", write, ".*")
		}, false, "write access to exchange 'amq.default'"},
		"no connection": {func(r *rig.Rig, on bool) { r.Broker.Host(0).Refuse(on) }, false, "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(park, parking())
				row.fault(r, true)
				r.Broker.Publish(rig.Queue, "1", "2", "3")
				r.Wait(3 * time.Minute)
				stats := r.Consumer.Stats()
				assert.Zero(r, stats.Parked)
				assert.Equal(r, 3, stats.Held)
				assert.Equal(r, uint64(1), stats.Sessions, "the consumer goes on")
				assert.Equal(r, 3, r.Broker.Unsettled(rig.Queue))
				assert.Equal(r, row.copies, r.Broker.QueueLen(parked) > 0)
				assert.NotEmpty(r, r.Warnings(row.cause))
				assert.LessOrEqual(r, len(r.Warnings("")), 12, r.Log.String())
				row.fault(r, false)
				r.Wait(time.Minute)
				assert.Equal(r, uint64(3), r.Consumer.Stats().Parked)
				assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
				assert.GreaterOrEqual(r, r.Broker.QueueLen(parked), 3)
				if !row.copies {
					assert.Equal(r, 3, r.Broker.QueueLen(parked))
				}
			})
		})
	}
}

func TestLateConfirmIsWaitedFor(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.Host(0).LateConfirms(10 * time.Second)
		r.PublishMany(20, "x")
		r.Wait(9 * time.Second)
		assert.Equal(r, 20, r.Broker.Unsettled(rig.Queue))
		r.Wait(2 * time.Second)
		assert.Equal(r, uint64(20), r.Consumer.Stats().Parked)
		assert.Equal(r, 20, r.Broker.QueueLen(parked), "no duplicates")
		assert.Empty(r, r.Warnings("held and tried again"))
	})
}

func TestRetryQueueThatMayNotBeDeclaredIsTakenIfItIsThere(t *testing.T) {
	policy := steadymq.WithRetry(steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Second}, Park: parked})
	onEachGeneration(t, func(r *rig.Rig, _ int) {
		r.Broker.DeclareQueue("orders.retry.1s", steadymqtest.QueueOptions{Args: amqp.Table{
			"x-message-ttl": int32(1000), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": rig.Queue,
		}})
		r.Broker.DeclareQueue(parked, steadymqtest.QueueOptions{})
		r.Broker.SetPermissions("app", "", "^amq[.]default$", "^orders")
		r.Consuming(park, policy)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Second)
		assert.Equal(r, 1, r.Broker.QueueLen(parked))
		require.NoError(r, r.Stop())

		r.Broker.DeleteQueue("orders.retry.1s")
		r.Run(park, policy)
		err := <-r.Result
		r.Result = nil
		require.Error(r, err)
		assert.Contains(r, err.Error(), `queue "orders.retry.1s" of WithRetry: it does not exist, and the user lacks a permission that its declaration needs: 403`)
	})
}

func TestStopWaitsForTheConfirmOfACopy(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.Publish(rig.Queue, "1", "2", "3")
		r.Wait(time.Millisecond)
		require.NoError(r, r.Stop())
		assert.Equal(r, 3, r.Broker.QueueLen(parked)+r.Broker.QueueLen(rig.Queue), "each is in one queue")
		assert.Zero(r, r.OpenConnections())
	})
}

func TestParkWithoutAParkQueueHoldsTheMessage(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Hour)
		assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
		assert.NotEmpty(r, r.Warnings("WithRetry"))
		assert.LessOrEqual(r, len(r.Warnings("WithRetry")), 60)
	})
}

func TestParkQueueThatIsDeletedIsDeclaredAnew(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.DeleteQueue(parked)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Minute)
		assert.Equal(r, 1, r.Broker.QueueLen(parked))
		assert.Equal(r, uint64(1), r.Consumer.Stats().Parked)
		assert.Len(r, r.Warnings("does not get into the queue"), 1)
	})
}

func TestIdlePublisherClosesItsConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		assert.Equal(r, 1, r.OpenConnections(), "nothing has failed yet")
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(30 * time.Second)
		assert.Equal(r, 2, r.OpenConnections())
		r.Wait(time.Minute)
		assert.Equal(r, 1, r.OpenConnections())
		r.Broker.Publish(rig.Queue, "2")
		r.Wait(time.Second)
		assert.Equal(r, 2, r.Broker.QueueLen(parked))
	})
}

func TestSessionThatIsLostBeforeTheConfirmLosesNothing(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		for range 20 {
			r.Broker.Publish(rig.Queue, "1", "2", "3", "4", "5")
			r.Wait(3 * time.Millisecond)
			r.Broker.Host(0).CloseConnections(320, "CONNECTION_FORCED")
			r.Wait(5 * time.Second)
		}
		r.Wait(time.Minute)
		assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
		assert.GreaterOrEqual(r, r.Broker.QueueLen(parked), 100)
		seen := make(map[string]bool)
		for _, m := range taken(r, parked) {
			seen[m.MessageId] = true
		}
		assert.Len(r, seen, 100)
	})
}

func TestRetryThatCannotWorkIsRefused(t *testing.T) {
	second := []time.Duration{time.Second}
	for name, row := range map[string]struct {
		retry  steadymq.Retry
		more   []steadymq.Option
		reason string
	}{
		"no policy at all":    {steadymq.Retry{}, nil, "Attempts must be between 1 and 1000, got 0"},
		"no attempts":         {steadymq.Retry{Delays: second, Park: "p"}, nil, "Attempts must be between 1 and 1000, got 0"},
		"fewer than none":     {steadymq.Retry{Attempts: -1, Park: "p"}, nil, "Attempts must be between 1 and 1000, got -1"},
		"nothing to do":       {steadymq.Retry{Attempts: 1}, nil, "would be discarded"},
		"no delay":            {steadymq.Retry{Attempts: 3}, nil, "Delays is empty"},
		"delays that shrink":  {steadymq.Retry{Attempts: 3, Delays: []time.Duration{time.Minute, time.Second}}, nil, "Delays must grow"},
		"delays that stay":    {steadymq.Retry{Attempts: 3, Delays: []time.Duration{time.Second, time.Second}}, nil, "Delays must grow"},
		"a delay too short":   {steadymq.Retry{Attempts: 2, Delays: []time.Duration{30}}, nil, "write 30*time.Second"},
		"a delay too long":    {steadymq.Retry{Attempts: 2, Delays: []time.Duration{25 * time.Hour}}, nil, "between 100ms and 24h"},
		"half a millisecond":  {steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Second + time.Microsecond}}, nil, "whole milliseconds"},
		"more than retries":   {steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Second, time.Minute}}, nil, "Delays may be 1 at most, one before each further attempt of 2; got 2"},
		"too many delays":     {steadymq.Retry{Attempts: 30, Delays: delaysOf(17)}, nil, "may be 16 at most"},
		"park is the queue":   {steadymq.Retry{Attempts: 1, Park: rig.Queue}, nil, "is the queue"},
		"park is a delay":     {steadymq.Retry{Attempts: 2, Delays: second, Park: "orders.retry.1s"}, nil, "the queue of a delay"},
		"park of the broker":  {steadymq.Retry{Attempts: 1, Park: "amq.park"}, nil, "amq."},
		"park with a newline": {steadymq.Retry{Attempts: 1, Park: "a\nb"}, nil, "line break"},
		"a stream": {
			steadymq.Retry{Attempts: 1, Park: "p"},
			[]steadymq.Option{steadymq.WithQueue(steadymq.Queue{Type: "stream"})},
			"not for streams",
		},
		"an exclusive queue": {
			steadymq.Retry{Attempts: 1, Park: "p"},
			[]steadymq.Option{steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true})},
			"not for exclusive and auto-delete queues",
		},
		"two ways to delay": {
			steadymq.Retry{Attempts: 2, Delays: second},
			[]steadymq.Option{steadymq.WithQueue(steadymq.Queue{RetryMin: time.Second, RetryMax: time.Minute})},
			"leave one out",
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := steadymq.New("amqp://localhost", rig.Queue, append(row.more, steadymq.WithRetry(row.retry))...)
			var refused *steadymq.OptionError
			require.ErrorAs(t, err, &refused)
			assert.Equal(t, "WithRetry", refused.Option)
			assert.Contains(t, err.Error(), row.reason)
		})
	}
}

func TestBrokerDelaysWhatComesBackFromItsVersionOn(t *testing.T) {
	for version, can := range map[[2]int]bool{{3, 13}: false, {4, 2}: false, {4, 3}: true, {4, 4}: true, {5, 0}: true} {
		t.Run(fmt.Sprint(version), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeleteQueue(rig.Queue)
				q := steadymq.Queue{RetryMin: time.Second, RetryMax: time.Minute}
				r.Consuming(func(context.Context, *steadymq.Delivery) error { return errPoison }, steadymq.WithQueue(q))
				r.Broker.Publish(rig.Queue, "1")
				r.Wait(100 * time.Millisecond)
				assert.Equal(r, can, len(r.Warnings("cannot delay")) == 0)
				assert.Equal(r, !can, r.Consumer.Stats().Held == 1)
			}, steadymqtest.WithVersion(version[0], version[1]))
		})
	}
}

func delaysOf(n int) []time.Duration {
	delays := make([]time.Duration, n)
	for i := range delays {
		delays[i] = time.Duration(i+1) * time.Second
	}
	return delays
}

var _ = errors.New

// tryOf is one call of a handler.
type tryOf struct {
	attempt       int
	exchange, key string
	at            time.Duration
}

// failingFor is a handler that fails n times with each message, and notes what it sees.
func failingFor(n int, seen *[]tryOf) steadymq.Handler {
	start := time.Now()
	return func(_ context.Context, d *steadymq.Delivery) error {
		*seen = append(*seen, tryOf{d.Attempt(), d.Exchange, d.RoutingKey, time.Since(start)})
		if d.Attempt() <= n {
			return errPoison
		}
		return nil
	}
}

func TestFailedMessageComesBackAfterItsDelays(t *testing.T) {
	kinds := map[string][]steadymq.Option{
		"quorum":  {steadymq.WithQueue(steadymq.Queue{Bindings: []steadymq.Binding{{Key: "new"}}, Exchange: &steadymq.Exchange{Name: "shop"}})},
		"classic": {steadymq.WithQueue(steadymq.Queue{Type: "classic", Bindings: []steadymq.Binding{{Key: "new"}}, Exchange: &steadymq.Exchange{Name: "shop"}})},
	}
	for kind, options := range kinds {
		t.Run(kind, func(t *testing.T) {
			onEachGeneration(t, func(r *rig.Rig, _ int) {
				var seen []tryOf
				c := r.NewFor(jobs, append(options, steadymq.WithRetry(steadymq.Retry{
					Attempts: 4, Delays: []time.Duration{time.Second, 10 * time.Second}, Park: parked,
				}))...)
				r.Consumer = c
				r.Start(failingFor(10, &seen))
				r.Wait(time.Second)
				r.Broker.PublishExchange("shop", "new", steadymqtest.Message{Body: []byte("1")})
				r.Wait(time.Minute)
				require.Len(r, seen, 4)
				for i, h := range seen {
					assert.Equal(r, i+1, h.attempt)
					assert.Equal(r, "shop", h.exchange)
					assert.Equal(r, "new", h.key)
				}
				assert.InDelta(r, 1, (seen[1].at - seen[0].at).Seconds(), 0.1)
				assert.InDelta(r, 10, (seen[2].at - seen[1].at).Seconds(), 0.1)
				assert.InDelta(r, 10, (seen[3].at - seen[2].at).Seconds(), 0.1)
				stats := c.Stats()
				assert.Equal(r, uint64(3), stats.Delayed)
				assert.Equal(r, uint64(1), stats.Parked)
				assert.Equal(r, uint64(4), stats.Delivered)
				assert.Equal(r, 1, r.Broker.QueueLen(parked))
				for _, q := range []string{jobs, "jobs.retry.1s", "jobs.retry.10s"} {
					assert.Zero(r, r.Broker.QueueLen(q)+r.Broker.Unsettled(q), q)
				}
				assert.Len(r, r.Warnings("handler failed, and its message is given up"), 1)
			})
		})
	}
}

func TestHealthyMessagesPassThoseThatFail(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		healthy := 0
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "poison" {
				return errPoison
			}
			healthy++
			return nil
		}, steadymq.WithRetry(steadymq.Retry{Attempts: 3, Delays: []time.Duration{10 * time.Second}, Park: parked}))
		r.PublishMany(500, "poison")
		r.PublishMany(100, "healthy")
		r.Wait(10 * time.Second)
		assert.Equal(r, 100, healthy, "within the first delay")
		r.Wait(time.Minute)
		assert.Equal(r, 500, r.Broker.QueueLen(parked))
	})
}

func TestRetryQueueOfAnotherDelayIsRefusedByName(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("orders.retry.1s", steadymqtest.QueueOptions{Args: amqp.Table{
			"x-queue-type": "quorum", "x-message-ttl": int32(5000), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": rig.Queue,
		}})
		r.Run(rig.Ack, steadymq.WithRetry(steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Second}, Park: parked}))
		err := <-r.Result
		r.Result = nil
		var at *steadymq.SessionError
		require.ErrorAs(r, err, &at)
		assert.Contains(r, err.Error(), `queue "orders.retry.1s" of WithRetry`)
		assert.Contains(r, err.Error(), "x-message-ttl")
	})
}

func TestQueueThatCannotDelayIsRefusedByName(t *testing.T) {
	for name, args := range map[string]amqp.Table{
		"stream": {"x-queue-type": "stream"},
		"x-expires": {
			"x-queue-type": "quorum", "x-expires": int32(60_000), "x-message-ttl": int32(5000),
			"x-dead-letter-exchange": "", "x-dead-letter-routing-key": rig.Queue,
		},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeclareQueue("orders.retry.1s", steadymqtest.QueueOptions{Args: args})
				r.Run(rig.Ack, steadymq.WithRetry(steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Second}, Park: parked}))
				r.Wait(time.Minute)
				require.NotEmpty(r, r.Result, "Run returns")
				err := <-r.Result
				r.Result = nil
				assert.ErrorContains(r, err, `queue "orders.retry.1s" of WithRetry`)
				assert.ErrorContains(r, err, name)
			})
		})
	}
}

func TestHeadersOfACopyLeaveRoomForThoseOfTheBroker(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		for _, size := range []int{130_000, 130_500, 130_700, 130_850} {
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Headers: amqp.Table{"h": strings.Repeat("h", size)}})
		}
		r.Wait(10 * time.Second)
		assert.Equal(r, uint64(4), r.Consumer.Stats().Parked)
		assert.Equal(r, uint64(2), r.Consumer.Stats().Connections)
		require.NoError(r, r.Stop())
		for _, m := range taken(r, parked) {
			assert.Less(r, table.Size(m.Headers)+len(m.MessageId), frameMax-100)
			assert.NotEmpty(r, m.Headers["steadymq-attempt"])
		}
	})
}

// frameMax is what the kit, and RabbitMQ by default, agrees on.
const frameMax = 131_072

func TestHeadersWithoutRoomForThoseOfACopyHarmNoOtherMessage(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Headers: amqp.Table{"h": strings.Repeat("h", 130_985)}})
		for range 20 {
			r.Broker.Publish(rig.Queue, "1")
			r.Wait(time.Second)
		}
		assert.Equal(r, uint64(20), r.Consumer.Stats().Parked)
		assert.Equal(r, 1, r.Consumer.Stats().Held)
		assert.Equal(r, uint64(2), r.Consumer.Stats().Connections, "none is lost")
		assert.Len(r, r.Warnings("leave no room"), 1)
	})
}

func TestAttemptsAreCountedHoweverLittleRoomTheHeadersLeave(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		tries := make(map[string]int)
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			tries[d.MessageId]++
			return errPoison
		}, steadymq.WithRetry(steadymq.Retry{Attempts: 3, Delays: []time.Duration{time.Second}, Park: parked}))
		for size := 130_700; size < 130_990; size += 10 {
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Headers: amqp.Table{"h": strings.Repeat("h", size)}})
		}
		r.Wait(time.Minute)
		stats := r.Consumer.Stats()
		assert.Len(r, tries, 29)
		for id, n := range tries {
			assert.LessOrEqual(r, n, 3, id)
		}
		assert.Equal(r, 29, int(stats.Parked)+stats.Held)
		assert.NotZero(r, stats.Held)
		assert.Greater(r, stats.Parked, uint64(15))
	})
}

func TestQueuesOfRetryThatExistInAnotherFormAreUsed(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("orders.retry.1s", steadymqtest.QueueOptions{Args: amqp.Table{
			"x-message-ttl": int32(1000), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": rig.Queue,
		}})
		r.Broker.DeclareQueue(parked, steadymqtest.QueueOptions{})
		var seen []tryOf
		r.Consuming(failingFor(5, &seen), steadymq.WithRetry(steadymq.Retry{Attempts: 3, Delays: []time.Duration{time.Second}, Park: parked}))
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Minute)
		assert.Len(r, seen, 3)
		assert.Equal(r, 1, r.Broker.QueueLen(parked))
	})
}

func TestLastFailureIsDiscardedWithoutAParkQueue(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var seen []tryOf
		r.Consuming(failingFor(5, &seen), steadymq.WithRetry(steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Second}}))
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Minute)
		assert.Len(r, seen, 2)
		assert.Equal(r, uint64(1), r.Consumer.Stats().Discarded)
		assert.Len(r, r.Warnings("is given up"), 1)
		assert.Contains(r, r.Warnings("is given up")[0], "outcome=discarded")
	})
}

func TestWhatTheHandlerAsksForComesBeforeThePolicy(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			switch string(d.Body) {
			case "discard":
				return steadymq.Discard(errPoison)
			case "park":
				return fmt.Errorf("wrapped: %w", steadymq.Park(errPoison))
			case "requeue":
				if d.Redelivered {
					return nil
				}
				return steadymq.RequeueAfter(errPoison, time.Second)
			}
			return nil
		}, steadymq.WithRetry(steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Minute}, Park: parked}))
		r.Broker.Publish(rig.Queue, "discard", "park", "requeue")
		r.Wait(10 * time.Second)
		stats := r.Consumer.Stats()
		assert.Equal(r, []uint64{1, 1, 1, 1, 0}, []uint64{stats.Discarded, stats.Parked, stats.Requeued, stats.Acked, stats.Delayed})
	})
}

// With more in flight than the driver has room for returns, its reader would wait for who is
// waiting for a confirm.
func TestNoMoreCopiesAreInFlightThanTheirAnswersHaveRoomFor(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking(), steadymq.WithPrefetch(1000), steadymq.WithRequeueDelay(time.Second, time.Second))
		r.Broker.LateConfirms(5 * time.Second)
		r.PublishMany(600, "poison")
		r.Wait(4 * time.Second)
		published := len(r.Broker.Ledger().Publications)
		assert.Positive(r, published)
		assert.LessOrEqual(r, published, 256)
		assert.Equal(r, 600, r.Consumer.Stats().Held)
		r.Broker.LateConfirms(0)
		r.Wait(time.Minute)
		assert.Equal(r, 600, r.Broker.QueueLen(parked), "no one twice")
		assert.Equal(r, uint64(600), r.Consumer.Stats().Parked)
	})
}

// The broker delivers the message again, so each copy that is still sent is one too many.
func TestCopyOfASessionThatIsLostIsNotSent(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.DropSYN(true) // the publisher's dial hangs
		r.Broker.Publish(rig.Queue, "1", "2", "3")
		r.Wait(100 * time.Millisecond)
		r.Broker.Reset()
		r.Wait(100 * time.Millisecond)
		r.Broker.DropSYN(false)
		r.Wait(time.Minute)
		assert.Equal(r, 3, r.Broker.QueueLen(parked))
		assert.Len(r, r.Broker.Ledger().Publications, 3)
		assert.Equal(r, uint64(3), r.Consumer.Stats().Parked)
	})
}

func TestPathOfCopiesThatIsAwayForAnHourCostsNothing(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking(), steadymq.WithPrefetch(20))
		r.Broker.Refuse(true) // what is connected stays so
		r.PublishMany(500, "poison")
		r.Wait(5 * time.Minute)
		before, lines := runtime.NumGoroutine(), len(r.Warnings(""))
		dials := len(r.Broker.Ledger().Dials)
		r.Wait(time.Hour)
		assert.LessOrEqual(r, runtime.NumGoroutine(), before+5)
		assert.Less(r, runtime.NumGoroutine(), 20, "none for each message that waits")
		assert.Equal(r, 20, r.Consumer.Stats().Held)
		assert.Equal(r, 480, r.Broker.QueueLen(rig.Queue), "no more than the prefetch waits")
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.LessOrEqual(r, len(r.Warnings(""))-lines, 100)
		assert.LessOrEqual(r, len(r.Broker.Ledger().Dials)-dials, 7500, "two a second, as those of consumers")
		r.Broker.Refuse(false)
		r.Wait(time.Minute)
		assert.Equal(r, 500, r.Broker.QueueLen(parked))
		require.NoError(r, r.Stop())
		assert.Zero(r, r.OpenConnections())
	})
}

func TestConfirmThatIsLostCostsOneCopyMore(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.LoseConfirms(true)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(10 * time.Second)
		assert.Equal(r, 1, r.Broker.QueueLen(parked))
		assert.Equal(r, 1, r.Broker.Unsettled(rig.Queue), "nobody knows that the copy is safe")
		r.Broker.LoseConfirms(false)
		r.Wait(5 * time.Minute)
		assert.Equal(r, uint64(1), r.Consumer.Stats().Parked)
		assert.Equal(r, 2, r.Broker.QueueLen(parked))
		assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
	})
}

// A nack may be for a copy that is in its queue all the same: then there are two, and never none.
func TestCopyThatIsNackedIsSentAgain(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.FillQueue(parked, true)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Minute)
		assert.Zero(r, r.Consumer.Stats().Parked)
		assert.Zero(r, r.Broker.QueueLen(parked))
		assert.Equal(r, 1, r.Broker.Unsettled(rig.Queue))
		assert.Len(r, r.Warnings("does not get into the queue"), 1, "at most one in a minute")
		r.Broker.FillQueue(parked, false)
		r.Wait(time.Minute)
		assert.Equal(r, uint64(1), r.Consumer.Stats().Parked)
		assert.Equal(r, 1, r.Broker.QueueLen(parked))
	})
}

func TestPolicyWithoutAttemptsParksOnlyWhatIsToBeParked(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		decode := steadymq.Decode(json.Unmarshal, func(_ context.Context, d *steadymq.Delivery, n int) error {
			if n == 1 {
				return steadymq.Park(errPoison)
			}
			return errPoison
		})
		r.Consuming(decode, steadymq.WithRetry(steadymq.Retry{Park: parked}))
		r.Broker.Publish(rig.Queue, "1", "2", "tea")
		r.Wait(time.Hour)
		stats := r.Consumer.Stats()
		assert.Equal(r, uint64(2), stats.Parked, "what asks for it, and what does not decode")
		assert.Equal(r, 2, r.Broker.QueueLen(parked))
		assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
		assert.Greater(r, stats.Failed, uint64(10), "it is tried again and again")
	})
}

// Both find that there is no such queue, one declares it, and the other is told that it is of
// another kind.
func TestParkQueueThatSomebodyElseDeclaresMeanwhileIsUsed(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.SetLatency(10 * time.Millisecond)
		ctx, stop := context.WithCancel(context.Background())
		ends := make(chan error, 2)
		for _, kind := range []string{"classic", "quorum"} {
			c := r.NewFor(kind, steadymq.WithQueue(steadymq.Queue{Type: kind}), parking())
			go func() { ends <- c.Run(ctx, park) }()
		}
		r.Wait(10 * time.Second)
		stop()
		require.NoError(r, <-ends)
		require.NoError(r, <-ends)
	})
}

func TestParkedMessageOutlivesItsExpiration(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: []byte("1"), Expiration: "60000"})
		r.Wait(time.Hour)
		assert.Equal(r, 1, r.Broker.QueueLen(parked))
	})
}

func TestWrongNameOfAQueueLeavesNoQueuesOfRetryBehind(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consumer = r.NewFor("ordres", steadymq.WithRetry(steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Second}, Park: parked}))
		r.Start(rig.Ack)
		r.Wait(time.Minute)
		assert.NotEmpty(r, r.Warnings("no queue 'ordres'"))
		assert.Equal(r, []string{rig.Queue}, r.Broker.Queues())
		r.Broker.DeclareQueue("ordres", steadymqtest.QueueOptions{})
		r.Wait(10 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Len(r, r.Broker.Queues(), 4)
	})
}

// A message that is given up is worth a line, however many others fail at the same time.
func TestMessageThatIsGivenUpIsToldBesideOthersThatFail(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "hopeless" {
				return steadymq.Park(errPoison)
			}
			return errPoison
		}, steadymq.WithRetry(steadymq.Retry{Attempts: 9, Delays: []time.Duration{time.Second}, Park: parked}))
		r.PublishMany(20, "failing")
		r.Wait(500 * time.Millisecond)
		r.Broker.Publish(rig.Queue, "hopeless")
		r.Wait(100 * time.Millisecond)
		require.Len(r, r.Warnings("is given up"), 1)
		assert.Contains(r, r.Warnings("is given up")[0], "outcome=parked")
	})
}

// Each try ends the channel, and has to end nothing else.
func TestCopiesThatMayNotBePublishedKeepTheirConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.SetPermissions("app", ".*", "^orders$", ".*")
		r.Broker.DeclareQueue(parked, steadymqtest.QueueOptions{})
		r.Consuming(park, parking())
		r.Broker.Publish(rig.Queue, "1", "2", "3")
		r.Wait(5 * time.Minute)
		assert.Len(r, r.Broker.Connections(), 2)
		assert.Equal(r, 3, r.Consumer.Stats().Held)
		r.Broker.SetPermissions("app", ".*", ".*", ".*")
		r.Wait(time.Minute)
		assert.Equal(r, 3, r.Broker.QueueLen(parked))
		r.Wait(2 * time.Minute)
		assert.Equal(r, 1, r.OpenConnections(), "an idle publisher has none")
	})
}

func TestPolicyOfAGroupIsSwitchedOffForOneQueue(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		fail := func(context.Context, *steadymq.Delivery) error { return errors.New("never") }
		p := grouped(r, 0, parking())
		p.add(fail)
		off := p.add(fail, steadymq.WithRetry(steadymq.Retry{}))
		p.start()
		r.Broker.Publish(p.name(0), "x")
		r.Broker.Publish(p.name(1), "x")
		r.Wait(100 * time.Millisecond)
		assert.EqualValues(t, 1, p.consumers[0].Stats().Parked)
		assert.Equal(t, 1, off.Stats().Held, "it is held, as without a policy")
		require.NoError(t, p.stop())
	})
}
