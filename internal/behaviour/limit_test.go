package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// jobs is a queue that only its consumer declares.
const jobs = "jobs"

// onEachGeneration runs test on a broker of each.
func onEachGeneration(t *testing.T, test func(r *rig.Rig, major int)) {
	t.Helper()
	for _, v := range [][2]int{{3, 10}, {4, 0}, {4, 3}} {
		t.Run(fmt.Sprintf("%d.%d", v[0], v[1]), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) { test(r, v[0]) }, steadymqtest.WithVersion(v[0], v[1]))
		})
	}
}

// declaring runs a consumer of the queue jobs that declares it; url parameters may be added.
func declaring(r *rig.Rig, h steadymq.Handler, q steadymq.Queue, params string) {
	r.Helper()
	c, err := steadymq.New(r.Broker.URL+params, jobs,
		steadymq.WithQueue(q), steadymq.WithDialer(r.Broker.Dialer()),
		steadymq.WithLogger(slog.New(slog.NewTextHandler(r.Log, nil))),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: r.Changed}))
	require.NoError(r, err)
	r.Consumer = c
	r.Start(h)
	r.Wait(time.Second)
}

func fail(context.Context, *steadymq.Delivery) error { return errors.New("the database is away") }

// failEvery is fail with a steady pace.
func failEvery(d time.Duration) steadymq.Handler {
	return func(context.Context, *steadymq.Delivery) error {
		return steadymq.RequeueAfter(errors.New("the database is away"), d)
	}
}

func TestHandlerThatFailsForADayLosesNothing(t *testing.T) {
	onEachGeneration(t, func(r *rig.Rig, _ int) {
		declaring(r, fail, steadymq.Queue{}, "")
		r.Broker.Publish(jobs, "1")
		r.Wait(24 * time.Hour)
		assert.Equal(r, 1, r.Broker.QueueLen(jobs)+r.Broker.Unsettled(jobs), "nothing lost")
		assert.Greater(r, r.Consumer.Stats().Failed, uint64(21), "and failed more often than the default limit allows")
		assert.Empty(r, r.Warnings("limit"))
		require.NoError(r, r.Stop())
		assert.Equal(r, 1, r.Broker.QueueLen(jobs))
	})
}

func TestOutageOfADependencyLosesNothingOfADeclaredQueue(t *testing.T) {
	onEachGeneration(t, func(r *rig.Rig, _ int) {
		start := time.Now()
		handled := 0
		declaring(r, func(context.Context, *steadymq.Delivery) error {
			if time.Since(start) < 45*time.Second {
				return errors.New("the database is away")
			}
			handled++
			return nil
		}, steadymq.Queue{}, "")
		for range 50 {
			r.Broker.Publish(jobs, "m")
		}
		r.Wait(5 * time.Minute)
		require.NoError(r, r.Stop())
		assert.Equal(r, 50, handled+r.Broker.QueueLen(jobs), "nothing lost")
	})
}

func TestQueueWithALimitIsTakenAsItIs(t *testing.T) {
	for name, args := range map[string]map[string]any{
		"the default one": nil,
		"its own":         {"x-delivery-limit": int32(7)},
		"none":            {"x-delivery-limit": int32(-1)},
	} {
		for _, params := range []string{"", "?channel_max=1"} {
			t.Run(name+params, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.Broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum", Args: args})
					r.Broker.DeclareExchange("events", "topic")
					declaring(r, rig.Ack, steadymq.Queue{Bindings: []steadymq.Binding{{Exchange: "events", Key: "#"}}}, params)
					require.Equal(r, steadymq.Consuming, r.Consumer.State())
					for range 3 {
						r.Broker.Reset()
						r.Wait(time.Minute)
					}
					assert.Equal(r, steadymq.Consuming, r.Consumer.State())
					assert.EqualValues(r, 4, r.Consumer.Stats().Sessions)
					assert.EqualValues(r, 4, r.Consumer.Stats().Connections)
					assert.Len(r, r.Causes(), 3, "no failure but the resets")
					_, took := r.Broker.PublishExchange("events", "k", steadymqtest.Message{})
					assert.Equal(r, 1, took, "its bindings are made")
					if name == "none" {
						assert.Empty(r, r.Warnings("delivery limit"))
						return
					}
					told := r.Warnings("delivery limit")
					require.Len(r, told, 1, "once in a Run")
					assert.Contains(r, told[0], "queue="+jobs)
					assert.Contains(r, told[0], "policy")
				})
			})
		}
	}
}

func TestQueueThatIsGoneIsDeclaredAnewWithoutALimit(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum"})
		declaring(r, failEvery(time.Minute), steadymq.Queue{}, "")
		r.Broker.DeleteQueue(jobs)
		r.Wait(time.Minute)
		r.Broker.Publish(jobs, "1")
		r.Wait(time.Hour)
		assert.Equal(r, 1, r.Broker.QueueLen(jobs)+r.Broker.Unsettled(jobs))
	})
}

func TestOtherInequivalenceIsTheOperators(t *testing.T) {
	for name, there := range map[string]steadymqtest.QueueOptions{
		"another type":               {},
		"a time to live":             {Type: "quorum", Args: map[string]any{"x-message-ttl": int32(1)}},
		"a time to live and a limit": {Type: "quorum", Args: map[string]any{"x-message-ttl": int32(1), "x-delivery-limit": int32(-1)}},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeclareQueue(jobs, there)
				declaring(r, rig.Ack, steadymq.Queue{}, "")
				var said *amqp.Error
				require.ErrorAs(r, <-r.Result, &said)
				r.Result = nil
				assert.Equal(r, amqp.PreconditionFailed, said.Code)
				assert.Contains(r, said.Reason, "inequivalent")
			})
		})
	}
	t.Run("a limit that the user gives", func(t *testing.T) {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum"})
			declaring(r, rig.Ack, steadymq.Queue{Args: amqp.Table{"x-delivery-limit": 5}}, "")
			require.ErrorContains(r, <-r.Result, "x-delivery-limit")
			r.Result = nil
		})
	})
}

// The limit that the user has set takes the message, and so does the default one where there is a
// dead-letter target.
func TestDeadLettersGoWhereTheQueueSays(t *testing.T) {
	onEachGeneration(t, func(r *rig.Rig, major int) {
		declaring(r, fail, steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "jobs.dead"}, Args: amqp.Table{"x-delivery-limit": 3}}, "")
		r.Broker.Publish(jobs, "poison")
		r.Wait(time.Hour)
		assert.Equal(r, 1, r.Broker.QueueLen("jobs.dead"))
		assert.EqualValues(r, 4, r.Consumer.Stats().Failed)

		// There it has no limit, however often it comes back.
		require.NoError(r, r.Stop())
		c, err := steadymq.New(r.Broker.URL, "jobs.dead", steadymq.WithDialer(r.Broker.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler)))
		require.NoError(r, err)
		r.Consumer = c
		r.Start(failEvery(time.Minute))
		r.Wait(time.Hour)
		assert.Equal(r, 1, r.Broker.QueueLen("jobs.dead")+r.Broker.Unsettled("jobs.dead"))
	})
}

func TestDefaultLimitHoldsWhereThereIsADeadLetterTarget(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		declaring(r, fail, steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "jobs.dead"}}, "")
		r.Broker.Publish(jobs, "poison")
		r.Wait(24 * time.Hour)
		assert.Equal(r, 1, r.Broker.QueueLen("jobs.dead"))
		assert.EqualValues(r, 21, r.Consumer.Stats().Failed)
		assert.Empty(r, r.Warnings("limit"), "that is what it is for")
	})
}

func TestDeadLetterQueueOfAnotherKindIsTakenAsItIs(t *testing.T) {
	for name, there := range map[string]steadymqtest.QueueOptions{
		"classic":    {},
		"with limit": {Type: "quorum"},
		"transient":  {Transient: true},
		"stream":     {Type: "stream"},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeclareQueue("jobs.dead", there)
				r.Broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum", DeadLetter: "jobs.dead"})
				declaring(r, func(context.Context, *steadymq.Delivery) error { return steadymq.Discard(nil) },
					steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "jobs.dead"}}, "?channel_max=1")
				r.Broker.Publish(jobs, "1")
				r.Wait(time.Second)
				require.Equal(r, steadymq.Consuming, r.Consumer.State(), r.Log)
				assert.Equal(r, 1, r.Broker.QueueLen("jobs.dead"))
				assert.Empty(r, r.Causes())
			})
		})
	}
}

// Only a queue that exists in another form is taken as it is.
func TestDeadLetterQueueThatIsRefusedIsTheOperators(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.RefuseDeclare(406, "PRECONDITION_FAILED - invalid arg 'x-queue-type' for queue 'orders.dead' in vhost '/'")
		r.Run(rig.Ack, steadymq.WithQueue(steadymq.Queue{Type: "quorum", DeadLetter: &steadymq.DeadLetter{Queue: "orders.dead"}}))
		r.Wait(time.Second)
		assert.ErrorContains(r, r.Stop(), `dead-letter queue "orders.dead"`)
	})
}

func TestDeadLetterExchangeIsTheUsers(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareExchange("dead", "direct")
		r.Broker.DeclareQueue("theirs", steadymqtest.QueueOptions{})
		r.Broker.Bind("theirs", "dead", "k")
		declaring(r, func(context.Context, *steadymq.Delivery) error { return steadymq.Discard(nil) },
			steadymq.Queue{Type: "classic", DeadLetter: &steadymq.DeadLetter{Exchange: "dead", Key: "k"}}, "")
		r.Broker.Publish(jobs, "1")
		r.Wait(time.Second)
		assert.Equal(r, 1, r.Broker.QueueLen("theirs"))
	})
}

func TestExchangeIsDeclaredBeforeItsBindings(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		declaring(r, rig.Ack, steadymq.Queue{
			Exchange: &steadymq.Exchange{Name: "events", Kind: "topic"},
			Bindings: []steadymq.Binding{{Key: "order.*"}, {Exchange: "amq.direct", Key: "k"}},
		}, "")
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		for exchange, key := range map[string]string{"events": "order.paid", "amq.direct": "k"} {
			_, took := r.Broker.PublishExchange(exchange, key, steadymqtest.Message{})
			assert.Equal(r, 1, took, exchange)
		}
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State(), "and again")
	})
}

func TestNewRefusesDeclarationsThatCannotWork(t *testing.T) {
	long := strings.Repeat("x", 256)
	for reason, q := range map[string]steadymq.Queue{
		"DeadLetter is empty":       {DeadLetter: &steadymq.DeadLetter{}},
		"not for streams":           {Type: "stream", DeadLetter: &steadymq.DeadLetter{Queue: "d"}},
		"leave one out":             {DeadLetter: &steadymq.DeadLetter{Queue: "d"}, Args: amqp.Table{"x-dead-letter-exchange": ""}},
		"say the same":              {DeadLetter: &steadymq.DeadLetter{Queue: "d"}, Args: amqp.Table{"x-dead-letter-routing-key": "d"}},
		"either Queue":              {DeadLetter: &steadymq.DeadLetter{Queue: "d", Exchange: "x"}},
		"which exist already":       {DeadLetter: &steadymq.DeadLetter{Queue: "d", Key: "k"}},
		"leads back into the queue": {DeadLetter: &steadymq.DeadLetter{Queue: jobs}},
		"at once and for ever":      {DeadLetter: &steadymq.DeadLetter{Key: jobs}},
		"DeadLetter.Queue has 256":  {DeadLetter: &steadymq.DeadLetter{Queue: long}},
		"DeadLetter.Exchange has":   {DeadLetter: &steadymq.DeadLetter{Exchange: long}},
		"DeadLetter.Key has 256":    {DeadLetter: &steadymq.DeadLetter{Exchange: "x", Key: long}},
		"Exchange needs a Name":     {Exchange: &steadymq.Exchange{Kind: "topic"}, Bindings: []steadymq.Binding{{}}},
		`got "tpoic"`:               {Exchange: &steadymq.Exchange{Name: "x", Kind: "tpoic"}, Bindings: []steadymq.Binding{{}}},
		"Exchange.Name has 256":     {Exchange: &steadymq.Exchange{Name: long}, Bindings: []steadymq.Binding{{}}},
		"Exchange.Args: key":        {Exchange: &steadymq.Exchange{Name: "x", Args: amqp.Table{"x": struct{}{}}}, Bindings: []steadymq.Binding{{}}},
		"none of Bindings uses it":  {Exchange: &steadymq.Exchange{Name: "x"}},
		"Bindings[0] names no":      {Bindings: []steadymq.Binding{{Key: "k"}}},
		"Bindings[0].Key has 256":   {Bindings: []steadymq.Binding{{Exchange: "x", Key: long}}},
		"Bindings[0].Exchange has":  {Bindings: []steadymq.Binding{{Exchange: long}}},
	} {
		t.Run(reason, func(t *testing.T) {
			_, err := steadymq.New("amqp://h/", jobs, steadymq.WithQueue(q))
			require.ErrorContains(t, err, reason)
			var refused *steadymq.OptionError
			require.ErrorAs(t, err, &refused)
			assert.Equal(t, "WithQueue", refused.Option)
		})
	}
}

func TestOneOptionServesManyConsumers(t *testing.T) {
	option := steadymq.WithQueue(steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "d"}, Exchange: &steadymq.Exchange{Name: "x"}, Bindings: []steadymq.Binding{{Key: "k"}}})
	for range 2 {
		_, err := steadymq.New("amqp://h/", jobs, option)
		require.NoError(t, err)
	}
}

func TestMessageNearTheLimitOfOthersIsTold(t *testing.T) {
	onEachGeneration(t, func(r *rig.Rig, major int) {
		r.Broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum"})
		c, err := steadymq.New(r.Broker.URL, jobs, steadymq.WithDialer(r.Broker.Dialer()),
			steadymq.WithLogger(slog.New(slog.NewTextHandler(r.Log, nil))))
		require.NoError(r, err)
		r.Consumer = c
		r.Start(failEvery(10 * time.Second))
		r.Wait(time.Second)
		for range 30 {
			r.Broker.Publish(jobs, "1")
		}
		r.Wait(time.Hour)
		told := r.Warnings("come back often")
		if major < 4 {
			assert.Empty(r, told)
			return
		}
		require.NotEmpty(r, told)
		assert.LessOrEqual(r, len(told), 12, "one a second, of 180")
		assert.Contains(r, told[0], "if this queue has RabbitMQ's default delivery limit of 20")
		assert.Contains(r, told[0], "returns=15 ")
		assert.NotContains(r, strings.Join(told, ""), "limit=", "nobody knows")
		assert.NotContains(r, told[0], "suppressed")
		assert.Contains(r, told[0], "queue="+jobs)
		assert.Contains(r, told[1], "suppressed=29", "the others are counted")
	})
}

// Since 4.3 a dead letter brings its count along, and the first return from a queue with a limit
// drops it.
func TestDeadLetterThatArrivesBeyondTheLimitIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum"})
		r.Broker.DeclareQueue("before", steadymqtest.QueueOptions{Type: "quorum", DeadLetter: jobs})
		before, err := steadymq.New(r.Broker.URL, "before", steadymq.WithDialer(r.Broker.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler)))
		require.NoError(r, err)
		r.Consumer = before
		r.Start(failEvery(time.Second))
		r.Broker.Publish("before", "1")
		r.Wait(time.Minute)
		require.NoError(r, r.Stop())
		require.Equal(r, 1, r.Broker.QueueLen(jobs))
		declaring(r, failEvery(time.Second), steadymq.Queue{}, "")
		r.Wait(time.Minute)
		require.Len(r, r.Warnings("come back often"), 1)
		assert.Contains(r, r.Log.String(), "returns=21 ")
		assert.Zero(r, r.Broker.QueueLen(jobs)+r.Broker.Unsettled(jobs), "it is gone")
	})
}

func TestMessageNearTheUsersOwnLimitIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		declaring(r, failEvery(time.Second), steadymq.Queue{Args: amqp.Table{"x-delivery-limit": 3}}, "")
		r.Broker.Publish(jobs, "1")
		r.Wait(time.Hour)
		require.Len(r, r.Warnings("come back so often"), 1)
		assert.Contains(r, r.Log.String(), "returns=3 limit=3")
	})
}

// Since 4.3 a quorum queue counts failures only, and says of what came back otherwise no more than
// that it was acquired.
func TestMessageThatNoHandlerHasSeenIsAtItsFirstAttempt(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		r.PublishMany(2, "m")
		release := make(chan struct{})
		r.Consuming(func(context.Context, *steadymq.Delivery) error { <-release; return nil }, steadymq.WithConcurrency(1))
		r.Wait(time.Second)
		go func() { r.Wait(time.Second); close(release) }()
		assert.NoError(r, r.Stop())
		var attempts []int
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			attempts = append(attempts, d.Attempt())
			return nil
		})
		r.Wait(time.Second)
		assert.Equal(r, []int{1}, attempts)
	})
}
