package steadymq_test

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
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/steadymqtest"
)

// jobs is a queue that only its consumer declares.
const jobs = "jobs"

// onEachGeneration runs test on a broker of each.
func onEachGeneration(t *testing.T, test func(b *bench, major int)) {
	t.Helper()
	for _, v := range [][2]int{{3, 10}, {4, 0}, {4, 3}} {
		t.Run(fmt.Sprintf("%d.%d", v[0], v[1]), func(t *testing.T) {
			bubble(t, func(b *bench) { test(b, v[0]) }, steadymqtest.WithVersion(v[0], v[1]))
		})
	}
}

// declaring runs a consumer of the queue jobs that declares it; url parameters may be added.
func (b *bench) declaring(h steadymq.Handler, q steadymq.Queue, params string) {
	b.Helper()
	c, err := steadymq.New(b.broker.URL+params, jobs,
		steadymq.WithQueue(q), steadymq.WithDialer(b.broker.Dialer()),
		steadymq.WithLogger(slog.New(slog.NewTextHandler(b.log, nil))),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: b.changed}))
	require.NoError(b, err)
	b.consumer = c
	b.start(h)
	b.wait(time.Second)
}

// warnings are the lines of the log that hold text.
func (b *bench) warnings(text string) (lines []string) {
	for line := range strings.Lines(b.log.String()) {
		if strings.Contains(line, "WARN") && strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	return lines
}

func fail(context.Context, *steadymq.Delivery) error { return errors.New("the database is away") }

// failEvery is fail with a steady pace.
func failEvery(d time.Duration) steadymq.Handler {
	return func(context.Context, *steadymq.Delivery) error {
		return steadymq.RequeueAfter(errors.New("the database is away"), d)
	}
}

func TestHandlerThatFailsForADayLosesNothing(t *testing.T) {
	onEachGeneration(t, func(b *bench, _ int) {
		b.declaring(fail, steadymq.Queue{}, "")
		b.broker.Publish(jobs, "1")
		b.wait(24 * time.Hour)
		assert.Equal(b, 1, b.broker.QueueLen(jobs)+b.broker.Unsettled(jobs), "nothing lost")
		assert.Greater(b, b.consumer.Stats().Failed, uint64(21), "and failed more often than the default limit allows")
		assert.Empty(b, b.warnings("limit"))
		require.NoError(b, b.stop())
		assert.Equal(b, 1, b.broker.QueueLen(jobs))
	})
}

func TestOutageOfADependencyLosesNothingOfADeclaredQueue(t *testing.T) {
	onEachGeneration(t, func(b *bench, _ int) {
		start := time.Now()
		handled := 0
		b.declaring(func(context.Context, *steadymq.Delivery) error {
			if time.Since(start) < 45*time.Second {
				return errors.New("the database is away")
			}
			handled++
			return nil
		}, steadymq.Queue{}, "")
		for range 50 {
			b.broker.Publish(jobs, "m")
		}
		b.wait(5 * time.Minute)
		require.NoError(b, b.stop())
		assert.Equal(b, 50, handled+b.broker.QueueLen(jobs), "nothing lost")
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
				bubble(t, func(b *bench) {
					b.broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum", Args: args})
					b.broker.DeclareExchange("events", "topic")
					b.declaring(ack, steadymq.Queue{Bindings: []steadymq.Binding{{Exchange: "events", Key: "#"}}}, params)
					require.Equal(b, steadymq.Consuming, b.consumer.State())
					for range 3 {
						b.broker.Reset()
						b.wait(time.Minute)
					}
					assert.Equal(b, steadymq.Consuming, b.consumer.State())
					assert.EqualValues(b, 4, b.consumer.Stats().Sessions)
					assert.EqualValues(b, 4, b.consumer.Stats().Connections)
					assert.Len(b, b.causes(), 3, "no failure but the resets")
					_, took := b.broker.PublishExchange("events", "k", steadymqtest.Message{})
					assert.Equal(b, 1, took, "its bindings are made")
					if name == "none" {
						assert.Empty(b, b.warnings("delivery limit"))
						return
					}
					told := b.warnings("delivery limit")
					require.Len(b, told, 1, "once in a Run")
					assert.Contains(b, told[0], "queue="+jobs)
					assert.Contains(b, told[0], "policy")
				})
			})
		}
	}
}

func TestQueueThatIsGoneIsDeclaredAnewWithoutALimit(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum"})
		b.declaring(failEvery(time.Minute), steadymq.Queue{}, "")
		b.broker.DeleteQueue(jobs)
		b.wait(time.Minute)
		b.broker.Publish(jobs, "1")
		b.wait(time.Hour)
		assert.Equal(b, 1, b.broker.QueueLen(jobs)+b.broker.Unsettled(jobs))
	})
}

func TestOtherInequivalenceIsTheOperators(t *testing.T) {
	for name, there := range map[string]steadymqtest.QueueOptions{
		"another type":               {},
		"a time to live":             {Type: "quorum", Args: map[string]any{"x-message-ttl": int32(1)}},
		"a time to live and a limit": {Type: "quorum", Args: map[string]any{"x-message-ttl": int32(1), "x-delivery-limit": int32(-1)}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.DeclareQueue(jobs, there)
				b.declaring(ack, steadymq.Queue{}, "")
				var said *amqp.Error
				require.ErrorAs(b, <-b.result, &said)
				b.result = nil
				assert.Equal(b, amqp.PreconditionFailed, said.Code)
				assert.Contains(b, said.Reason, "inequivalent")
			})
		})
	}
	t.Run("a limit that the user gives", func(t *testing.T) {
		bubble(t, func(b *bench) {
			b.broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum"})
			b.declaring(ack, steadymq.Queue{Args: amqp.Table{"x-delivery-limit": 5}}, "")
			require.ErrorContains(b, <-b.result, "x-delivery-limit")
			b.result = nil
		})
	})
}

// The limit that the user has set takes the message, and so does the default one where there is a dead-letter target.
func TestDeadLettersGoWhereTheQueueSays(t *testing.T) {
	onEachGeneration(t, func(b *bench, major int) {
		b.declaring(fail, steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "jobs.dead"}, Args: amqp.Table{"x-delivery-limit": 3}}, "")
		b.broker.Publish(jobs, "poison")
		b.wait(time.Hour)
		assert.Equal(b, 1, b.broker.QueueLen("jobs.dead"))
		assert.EqualValues(b, 4, b.consumer.Stats().Failed)

		// There it has no limit, however often it comes back.
		require.NoError(b, b.stop())
		c, err := steadymq.New(b.broker.URL, "jobs.dead", steadymq.WithDialer(b.broker.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler)))
		require.NoError(b, err)
		b.consumer = c
		b.start(failEvery(time.Minute))
		b.wait(time.Hour)
		assert.Equal(b, 1, b.broker.QueueLen("jobs.dead")+b.broker.Unsettled("jobs.dead"))
	})
}

func TestDefaultLimitHoldsWhereThereIsADeadLetterTarget(t *testing.T) {
	bubble(t, func(b *bench) {
		b.declaring(fail, steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "jobs.dead"}}, "")
		b.broker.Publish(jobs, "poison")
		b.wait(24 * time.Hour)
		assert.Equal(b, 1, b.broker.QueueLen("jobs.dead"))
		assert.EqualValues(b, 21, b.consumer.Stats().Failed)
		assert.Empty(b, b.warnings("limit"), "that is what it is for")
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
			bubble(t, func(b *bench) {
				b.broker.DeclareQueue("jobs.dead", there)
				b.broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum", DeadLetter: "jobs.dead"})
				b.declaring(func(context.Context, *steadymq.Delivery) error { return steadymq.Discard(nil) },
					steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "jobs.dead"}}, "?channel_max=1")
				b.broker.Publish(jobs, "1")
				b.wait(time.Second)
				require.Equal(b, steadymq.Consuming, b.consumer.State(), b.log)
				assert.Equal(b, 1, b.broker.QueueLen("jobs.dead"))
				assert.Empty(b, b.causes())
			})
		})
	}
}

func TestDeadLetterExchangeIsTheUsers(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeclareExchange("dead", "direct")
		b.broker.DeclareQueue("theirs", steadymqtest.QueueOptions{})
		b.broker.Bind("theirs", "dead", "k")
		b.declaring(func(context.Context, *steadymq.Delivery) error { return steadymq.Discard(nil) },
			steadymq.Queue{Type: "classic", DeadLetter: &steadymq.DeadLetter{Exchange: "dead", Key: "k"}}, "")
		b.broker.Publish(jobs, "1")
		b.wait(time.Second)
		assert.Equal(b, 1, b.broker.QueueLen("theirs"))
	})
}

func TestExchangeIsDeclaredBeforeItsBindings(t *testing.T) {
	bubble(t, func(b *bench) {
		b.declaring(ack, steadymq.Queue{
			Exchange: &steadymq.Exchange{Name: "events", Kind: "topic"},
			Bindings: []steadymq.Binding{{Key: "order.*"}, {Exchange: "amq.direct", Key: "k"}},
		}, "")
		require.Equal(b, steadymq.Consuming, b.consumer.State())
		for exchange, key := range map[string]string{"events": "order.paid", "amq.direct": "k"} {
			_, took := b.broker.PublishExchange(exchange, key, steadymqtest.Message{})
			assert.Equal(b, 1, took, exchange)
		}
		b.broker.Reset()
		b.wait(time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State(), "and again")
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
	onEachGeneration(t, func(b *bench, major int) {
		b.broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum"})
		c, err := steadymq.New(b.broker.URL, jobs, steadymq.WithDialer(b.broker.Dialer()),
			steadymq.WithLogger(slog.New(slog.NewTextHandler(b.log, nil))))
		require.NoError(b, err)
		b.consumer = c
		b.start(failEvery(10 * time.Second))
		b.wait(time.Second)
		for range 30 {
			b.broker.Publish(jobs, "1")
		}
		b.wait(time.Hour)
		told := b.warnings("come back often")
		if major < 4 {
			assert.Empty(b, told)
			return
		}
		require.NotEmpty(b, told)
		assert.LessOrEqual(b, len(told), 12, "one a second, of 180")
		assert.Contains(b, told[0], "if this queue has RabbitMQ's default delivery limit of 20")
		assert.Contains(b, told[0], "returns=15 ")
		assert.NotContains(b, strings.Join(told, ""), "limit=", "nobody knows")
		assert.NotContains(b, told[0], "suppressed")
		assert.Contains(b, told[0], "queue="+jobs)
		assert.Contains(b, told[1], "suppressed=29", "the others are counted")
	})
}

// Since 4.3 a dead letter brings its count along, and the first return from a queue with a limit drops it.
func TestDeadLetterThatArrivesBeyondTheLimitIsTold(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeclareQueue(jobs, steadymqtest.QueueOptions{Type: "quorum"})
		b.broker.DeclareQueue("before", steadymqtest.QueueOptions{Type: "quorum", DeadLetter: jobs})
		before, err := steadymq.New(b.broker.URL, "before", steadymq.WithDialer(b.broker.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler)))
		require.NoError(b, err)
		b.consumer = before
		b.start(failEvery(time.Second))
		b.broker.Publish("before", "1")
		b.wait(time.Minute)
		require.NoError(b, b.stop())
		require.Equal(b, 1, b.broker.QueueLen(jobs))
		b.declaring(failEvery(time.Second), steadymq.Queue{}, "")
		b.wait(time.Minute)
		require.Len(b, b.warnings("come back often"), 1)
		assert.Contains(b, b.log.String(), "returns=21 ")
		assert.Zero(b, b.broker.QueueLen(jobs)+b.broker.Unsettled(jobs), "it is gone")
	})
}

func TestMessageNearTheUsersOwnLimitIsTold(t *testing.T) {
	bubble(t, func(b *bench) {
		b.declaring(failEvery(time.Second), steadymq.Queue{Args: amqp.Table{"x-delivery-limit": 3}}, "")
		b.broker.Publish(jobs, "1")
		b.wait(time.Hour)
		require.Len(b, b.warnings("come back so often"), 1)
		assert.Contains(b, b.log.String(), "returns=3 limit=3")
	})
}

// TestDeliveryLimitOnRealBrokers lets a message come back 25 times, to a queue that the consumer declares, and to one that exists with
// the default limit, and to such a one under the policy that the warning names.
func TestDeliveryLimitOnRealBrokers(t *testing.T) {
	if testing.Short() {
		t.Skip("starts brokers")
	}
	var configs []rabbit.Config
	for _, g := range rabbit.Generations() {
		configs = append(configs, rabbit.Config{Generation: g})
	}
	for _, b := range rabbit.StartAll(t, configs...) {
		old := strings.HasPrefix(b.Version(), "3.")
		for name, test := range map[string]struct {
			exists, policy bool
			kept           bool
		}{
			"declared":       {kept: true},
			"exists":         {exists: true, kept: old},
			"exists, policy": {exists: true, policy: true, kept: !old},
		} {
			t.Run(b.Version()+"/"+name, func(t *testing.T) {
				if test.policy && old {
					t.Skip("before 4.0 a policy cannot say so")
				}
				queue := "limit-" + strings.ReplaceAll(strings.ReplaceAll(name, ",", ""), " ", "-")
				if test.exists {
					require.NoError(t, b.DeclareQueue(queue, amqp.Table{"x-queue-type": "quorum"}))
				}
				if test.policy {
					rabbit.NeedCommands(t, b)
					require.NoError(t, b.PolicyOn(t.Context(), "/", "unlimited", "^"+queue+"$", `{"delivery-limit": -1}`))
				}
				log := new(logBuffer)
				assert.Equal(t, test.kept, comesBack(t, b, queue, 25, log))
				assert.Equal(t, test.exists && !old, strings.Contains(log.String(), "which stays"))
				require.NoError(t, b.DeleteQueue(queue))
			})
		}
	}
}

// comesBack tells whether a message is delivered again after n returns.
func comesBack(t *testing.T, b *rabbit.Broker, queue string, n int, log *logBuffer) bool {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	returned := make(chan int, n+1)
	seen := 0
	handle := func(context.Context, *steadymq.Delivery) error {
		if seen++; seen > n {
			returned <- seen
			return nil
		}
		return steadymq.Requeue(nil)
	}
	c, err := steadymq.New(b.URL(), queue, steadymq.WithQueue(steadymq.Queue{}), steadymq.WithLogger(slog.New(slog.NewTextHandler(log, nil))))
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, handle) }()
	require.Eventually(t, func() bool { return c.State() == steadymq.Consuming }, 20*time.Second, 10*time.Millisecond)
	conn, err := amqp.Dial(b.URL())
	require.NoError(t, err)
	defer conn.Close()
	ch, err := conn.Channel()
	require.NoError(t, err)
	require.NoError(t, ch.PublishWithContext(ctx, "", queue, false, false, amqp.Publishing{DeliveryMode: amqp.Persistent}))
	came := false
	select {
	case <-returned:
		came = true
	case <-time.After(5 * time.Second):
	}
	stop()
	require.NoError(t, <-done)
	return came
}

// Since 4.3 a quorum queue counts failures only, and says of what came back otherwise no more than
// that it was acquired.
func TestMessageThatNoHandlerHasSeenIsAtItsFirstAttempt(t *testing.T) {
	bubble(t, func(b *bench) {
		b.of("quorum")
		b.publish(2, "m")
		release := make(chan struct{})
		b.consuming(func(context.Context, *steadymq.Delivery) error { <-release; return nil }, steadymq.WithConcurrency(1))
		b.wait(time.Second)
		go func() { b.wait(time.Second); close(release) }()
		assert.NoError(b, b.stop())
		var attempts []int
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			attempts = append(attempts, d.Attempt())
			return nil
		})
		b.wait(time.Second)
		assert.Equal(b, []int{1}, attempts)
	})
}
