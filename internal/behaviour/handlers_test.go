package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestErrorOfAHandlerThatWasCutOffIsNoFailure(t *testing.T) {
	cases := map[string]func(r *rig.Rig){
		"session lost":    func(r *rig.Rig) { r.Broker.Reset() },
		"drain limit":     func(r *rig.Rig) { require.ErrorIs(r, r.Stop(), steadymq.ErrDrainTimeout) },
		"handler timeout": func(r *rig.Rig) { r.Wait(time.Minute) },
	}
	for name, end := range cases {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var failed atomic.Int64
				r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					if d.Redelivered {
						return nil
					}
					<-ctx.Done()
					return fmt.Errorf("query: %w", ctx.Err())
				}, steadymq.WithHandlerTimeout(time.Minute), steadymq.WithHooks(steadymq.Hooks{
					HandlerFailed: func(*steadymq.Delivery, error) { failed.Add(1) },
				}))
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(time.Second)
				end(r)
				r.Wait(time.Second)
				want := 0
				if name == "handler timeout" {
					want = 1
				}
				assert.EqualValues(r, want, failed.Load())
				assert.EqualValues(r, want, r.Consumer.Stats().Failed)
				assert.EqualValues(r, 1-want, r.Consumer.Stats().Stale, "it was left to the broker")
			})
		})
	}
}

func TestPanicOfAHandlerThatWasCutOffIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if !d.Redelivered {
				<-ctx.Done()
				panic("kaputt")
			}
			return nil
		})
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.EqualValues(r, 1, r.Consumer.Stats().Failed)
		assert.Contains(r, r.Log.String(), "kaputt")
	})
}

func TestHandlerThatStopsItsConsumerIsTheLast(t *testing.T) {
	for _, options := range [][]steadymq.Option{nil, rig.Options(steadymq.WithPrefetch(1)), rig.Options(steadymq.WithPrefetch(2))} {
		for _, takes := range []time.Duration{0, 5 * time.Millisecond} {
			for range 20 {
				rig.Bubble(t, func(r *rig.Rig) {
					r.PublishMany(20, "job")
					handled := 0
					r.Run(func(context.Context, *steadymq.Delivery) error {
						handled++
						time.Sleep(takes)
						r.Cancel() // this one and no other
						return nil
					}, options...)
					require.NoError(r, <-r.Result)
					r.Result = nil
					assert.Equal(r, 1, handled)
					r.Wait(time.Second)
					assert.Equal(r, 19, r.Broker.QueueLen(rig.Queue))
				})
			}
		}
	}
}

// The same beside real time: the broker's next message is there before Run knows.
func TestHandlerThatStopsItsConsumerIsTheLastInRealTime(t *testing.T) {
	for range 30 {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
		for range 20 {
			b.Publish(rig.Queue, "job")
		}
		ctx, cancel := context.WithCancel(t.Context())
		var handled atomic.Int64
		require.NoError(t, steadymq.Consume(ctx, b.URL, rig.Queue, func(context.Context, *steadymq.Delivery) error {
			handled.Add(1)
			cancel()
			return nil
		}, steadymq.WithDialer(b.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler))))
		assert.EqualValues(t, 1, handled.Load())
		b.Close()
	}
}

func TestHandlerPastItsTimeoutIsToldAndCounted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "deaf" {
				time.Sleep(30 * time.Second)
			}
			return nil
		}, steadymq.WithHandlerTimeout(10*time.Second), steadymq.WithConcurrency(4))
		r.PublishMany(3, "deaf")
		r.PublishMany(20, "good")
		r.Wait(10 * time.Second)
		assert.Zero(r, r.Consumer.Stats().Overdue, "a handler gets a moment to return in")
		r.Wait(2 * time.Second)
		assert.Equal(r, 3, r.Consumer.Stats().Overdue)
		r.Wait(20 * time.Second)
		assert.Zero(r, r.Consumer.Stats().Overdue)
		assert.Equal(r, 1, r.TimesLogged("running past its timeout"))
	})
}

func TestHandlerThatSettledAndThenFailedIsTold(t *testing.T) {
	cases := []struct {
		name   string
		handle func(d *steadymq.Delivery) error
		told   int
	}{
		{"acked", func(d *steadymq.Delivery) error { _ = d.Ack(); return errAway }, 1},
		{"discarded", func(d *steadymq.Delivery) error { _ = d.Discard(); return errAway }, 1},
		{"discarded twice", func(d *steadymq.Delivery) error { _ = d.Discard(); return steadymq.Discard(errAway) }, 0},
		{"put back", func(d *steadymq.Delivery) error {
			if d.Redelivered {
				return nil
			}
			_ = d.Requeue()
			return errAway
		}, 0},
		{"no error", func(d *steadymq.Delivery) error { _ = d.Ack(); return nil }, 0},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error { return c.handle(d) })
				r.PublishMany(50, "x")
				r.Wait(500 * time.Millisecond)
				assert.Equal(r, c.told, r.TimesLogged("settled its message by itself"))
				if c.told == 0 {
					return
				}
				r.Wait(time.Second)
				r.PublishMany(1, "x")
				r.Wait(time.Second)
				assert.Equal(r, 1, r.TimesLogged("suppressed=49"))
			})
		})
	}
}

func TestHandlersTooSlowForThePrefetchAreToldBeforeTheConsumerTimeout(t *testing.T) {
	cases := []struct {
		name    string
		takes   time.Duration
		within  time.Duration
		told    int
		options []steadymq.Option
	}{
		{"too slow", time.Minute, 19 * time.Minute, 1, nil},
		{"slow", 25 * time.Second, 2 * time.Hour, 0, nil},
		{"enough workers", time.Minute, 2 * time.Hour, 0, rig.Options(steadymq.WithConcurrency(4))},
		{"a longer timeout", time.Minute, 2 * time.Hour, 0, rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": int64(2 * time.Hour / 1e6)}))},
		{"a shorter timeout", 10 * time.Second, 5 * time.Minute, 1, rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": int64(7 * time.Minute / 1e6)}))},
		{"of the queue", 10 * time.Second, 5 * time.Minute, 1, rig.Options(steadymq.WithQueue(steadymq.Queue{
			Type: "classic", Args: amqp.Table{"x-consumer-timeout": int64(7 * time.Minute / 1e6)},
		}))},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeleteQueue(rig.Queue)
				if c.name != "of the queue" {
					r.RemakeQueue("classic")
				}
				r.Consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(c.takes); return nil }, c.options...)
				r.PublishMany(2000, "x")
				r.Wait(c.within)
				assert.Equal(r, c.told, r.TimesLogged("lower WithPrefetch"))
				r.Wait(time.Hour)
				assert.Equal(r, c.told, r.TimesLogged("lower WithPrefetch"), "once")
				r.Cancel()
				synctest.Wait()
			}, steadymqtest.WithConsumerTimeout(24*time.Hour, steadymqtest.FormOfVersion))
		})
	}
}

// The warning is about a session that still waits for its handlers. Of one that was lost a moment
// before it was due the broker has everything back.
func TestHandlersOfALostSessionAreNotToldAsTooSlow(t *testing.T) {
	for name, c := range map[string]struct {
		lost time.Duration
		told int
	}{"lost": {17 * time.Minute, 0}, "not lost": {20 * time.Minute, 1}} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				untilLost := func(ctx context.Context, _ *steadymq.Delivery) error { <-ctx.Done(); return nil }
				r.Consuming(untilLost)
				r.PublishMany(10, "slow")
				r.Wait(c.lost)
				r.Broker.Refuse(true)
				r.Broker.Reset()
				r.Wait(5 * time.Minute)
				assert.Equal(r, c.told, r.TimesLogged("lower WithPrefetch"))
			}, steadymqtest.WithConsumerTimeout(24*time.Hour, steadymqtest.FormOfVersion))
		})
	}
}

func TestLongConsumerTimeoutIsNotTakenForTheDefault(t *testing.T) {
	for _, ms := range []int64{48 * time.Hour.Milliseconds(), math.MaxInt64} {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(2 * time.Minute); return nil },
				steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": ms}), steadymq.WithDrainTimeout(time.Hour))
			r.PublishMany(100, "slow")
			r.Wait(3 * time.Hour)
			assert.Zero(r, r.TimesLogged("handlers are so slow"))
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
		assert.Contains(r, string(p.Stack), "handlers_test.go")
		assert.Contains(r, r.Log.String(), "kaputt")
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
