package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/middleware"
	"github.com/steadymq/steadymq/steadymqtest"
)

// keptOnes keeps deliveries for later.
type keptOnes struct {
	mu  sync.Mutex
	all []*steadymq.Delivery
}

func (s *keptOnes) keep(_ context.Context, d *steadymq.Delivery) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, d)
	return fmt.Errorf("kept: %w", steadymq.Later)
}

// kept are the deliveries so far.
func (s *keptOnes) kept(r *rig.Rig, want int) []*steadymq.Delivery {
	r.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	require.Len(r, s.all, want)
	return s.all
}

func TestDeliveryThatIsKeptForLaterIsSettledByAnybody(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var keptOnes keptOnes
		told := make(map[string]steadymq.Outcome)
		r.Consuming(keptOnes.keep, steadymq.WithHooks(steadymq.Hooks{
			HandlerFailed: func(*steadymq.Delivery, error) { assert.Fail(r, "it is no failure") },
			Settled:       func(d *steadymq.Delivery, o steadymq.Outcome) { told[string(d.Body)] = o },
		}))
		for _, body := range []string{"tea", "milk", "salt"} {
			r.Broker.Publish(rig.Queue, body)
		}
		r.Wait(time.Minute)
		all := keptOnes.kept(r, 3)
		for _, d := range all {
			assert.Equal(r, steadymq.Unsettled, d.Outcome())
			assert.NoError(r, d.Context().Err())
		}
		stats := r.Consumer.Stats()
		assert.Equal(r, 3, stats.Later)
		assert.Zero(r, stats.Handling)
		assert.Zero(r, stats.Failed)
		assert.Zero(r, stats.Held)
		assert.Empty(r, told)
		assert.Empty(r, r.Broker.Ledger().Settlements)
		assert.NotContains(r, r.Log.String(), "WARN")

		done := make(chan error, 1)
		go func() { done <- all[2].Ack() }() // in any order
		require.NoError(r, <-done)
		require.NoError(r, all[0].Discard())
		byValue := *all[1]
		require.NoError(r, byValue.Nack(false, false))
		r.Wait(time.Second)
		for _, d := range all {
			assert.ErrorIs(r, d.Ack(), steadymq.ErrSettled)
		}
		stats = r.Consumer.Stats()
		assert.Zero(r, stats.Later)
		assert.EqualValues(r, 1, stats.Acked)
		assert.EqualValues(r, 2, stats.Discarded)
		assert.Equal(r, map[string]steadymq.Outcome{"tea": steadymq.Discarded, "milk": steadymq.Discarded, "salt": steadymq.Acked}, told)
		assert.Len(r, r.Broker.Ledger().Settlements, 3)
		assert.NoError(r, r.Stop())
	})
}

// On a stream it holds up the acks behind it, and a requeue by hand is a try in place.
func TestDeliveryThatIsKeptForLaterOfEachKindOfQueue(t *testing.T) {
	for _, kind := range rig.QueueTypes {
		t.Run(kind, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue(kind)
				var keptOnes keptOnes
				r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					if string(d.Body) == "first" && d.Attempt() == 1 {
						return keptOnes.keep(ctx, d)
					}
					return nil
				}, rig.OfType(kind)...)
				r.Broker.Publish(rig.Queue, "first")
				r.Broker.Publish(rig.Queue, "second")
				r.Wait(time.Second)
				acks := 1
				if kind == "stream" {
					acks = 0
				}
				assert.Len(r, r.Broker.Ledger().Settlements, acks)
				require.NoError(r, keptOnes.kept(r, 1)[0].Requeue())
				r.Wait(time.Second)
				assert.Zero(r, r.Consumer.Stats().Later)
				assert.EqualValues(r, 1, r.Consumer.Stats().Requeued)
				assert.EqualValues(r, 2, r.Consumer.Stats().Acked)
				assert.NoError(r, r.Stop())
			})
		})
	}
}

func TestSettlementByHandRacesWithTheReturnOfTheHandler(t *testing.T) {
	b := steadymqtest.NewBroker(t)
	b.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
	const messages = 2000
	for range messages {
		b.Publish(rig.Queue, "x")
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var won, lost, handled atomic.Int64
	var settling sync.WaitGroup
	settle := func(d *steadymq.Delivery, how func(*steadymq.Delivery) error) {
		settling.Go(func() {
			switch err := how(d); {
			case err == nil:
				won.Add(1)
			case errors.Is(err, steadymq.ErrSettled):
				lost.Add(1)
			default:
				assert.NoError(t, err)
			}
		})
	}
	c, err := steadymq.New(b.URL, rig.Queue, steadymq.WithDialer(b.Dialer()), steadymq.WithConcurrency(4))
	require.NoError(t, err)
	require.NoError(t, c.Run(ctx, func(_ context.Context, d *steadymq.Delivery) error {
		byValue := *d
		settle(d, (*steadymq.Delivery).Ack)
		settle(&byValue, (*steadymq.Delivery).Discard)
		if handled.Add(1) == messages {
			stop()
		}
		return steadymq.Later
	}))
	settling.Wait()
	assert.EqualValues(t, messages, won.Load())
	assert.EqualValues(t, messages, lost.Load())
	stats := c.Stats()
	assert.Zero(t, stats.Later)
	assert.EqualValues(t, messages, stats.Acked+stats.Discarded)
	assert.Empty(t, b.Violations())
	assert.Zero(t, b.QueueLen(rig.Queue))
}

// readLater is Later in an error that settles the delivery when it is read for the n-th time, and so
// at a moment of its own among all that follow the return of the handler.
type readLater struct {
	d    *steadymq.Delivery
	n    int
	errs []error
}

func (e *readLater) Error() string { return "x" }

func (e *readLater) Unwrap() error {
	e.n--
	if e.n == 0 {
		e.errs = append(e.errs, e.d.Ack(), e.d.Discard())
	}
	return steadymq.Later
}

func TestSettlementByHandAtEveryMomentOfTheReturnOfTheHandler(t *testing.T) {
	moments := 0
	for n := range 10 {
		rig.Bubble(t, func(r *rig.Rig) {
			var read *readLater
			r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
				read = &readLater{d: d, n: n + 1}
				return read
			})
			r.Broker.Publish(rig.Queue, "x")
			r.Wait(time.Second)
			stats := r.Consumer.Stats()
			assert.Zero(r, stats.Failed)
			if len(read.errs) == 0 { // it is not read so often
				assert.Equal(r, 1, stats.Later)
				require.NoError(r, read.d.Ack())
			} else {
				moments++
				assert.Zero(r, stats.Later)
				assert.NoError(r, read.errs[0])
				assert.ErrorIs(r, read.errs[1], steadymq.ErrSettled)
			}
			began := time.Now()
			assert.NoError(r, r.Stop())
			assert.Less(r, time.Since(began), time.Second)
			assert.Zero(r, r.Consumer.Stats().Later)
			assert.Len(r, r.Broker.Ledger().Settlements, 1)
		})
	}
	assert.GreaterOrEqual(t, moments, 3)
}

func TestDeliveryThatIsKeptForLaterIsStaleOnceItsSessionIsLost(t *testing.T) {
	losses := map[string]func(*rig.Rig){
		"reset":   func(r *rig.Rig) { r.Broker.Reset() },
		"channel": func(r *rig.Rig) { r.Broker.CloseChannels(406, "x") },
	}
	for name, lose := range losses {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var keptOnes keptOnes
				var stale atomic.Int64
				r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					if d.Redelivered {
						return nil
					}
					return keptOnes.keep(ctx, d)
				}, steadymq.WithHooks(steadymq.Hooks{Settled: func(_ *steadymq.Delivery, o steadymq.Outcome) {
					if o == steadymq.Stale {
						stale.Add(1)
					}
				}}))
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(time.Second)
				d := keptOnes.kept(r, 1)[0]
				lose(r)
				r.Wait(time.Second)
				var session *steadymq.SessionError
				require.ErrorAs(r, context.Cause(d.Context()), &session)
				assert.Equal(r, "lost", session.Op)
				assert.Equal(r, steadymq.Stale, d.Outcome())
				assert.ErrorIs(r, d.Ack(), steadymq.ErrStale)
				assert.ErrorIs(r, d.Requeue(), steadymq.ErrStale)
				stats := r.Consumer.Stats()
				assert.Zero(r, stats.Later)
				assert.EqualValues(r, 1, stats.Stale)
				assert.EqualValues(r, 1, stats.Acked, "delivered again")
				assert.EqualValues(r, 1, stale.Load(), "told once")
				assert.NoError(r, r.Stop(), "nobody waits for it")
			})
		})
	}
}

// The handler returns Later although its session is lost already, so nobody will settle it.
func TestDeliveryIsStaleThatIsKeptForLaterByAHandlerOfALostSession(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if d.Redelivered {
				return nil
			}
			<-ctx.Done()
			return steadymq.Later
		})
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		r.Broker.Reset()
		r.Wait(time.Second)
		stats := r.Consumer.Stats()
		assert.Zero(r, stats.Later)
		assert.EqualValues(r, 1, stats.Stale)
		assert.Zero(r, stats.Failed)
		assert.NoError(r, r.Stop())
	})
}

func TestDeliveryThatIsKeptForLaterCanBeSettledAfterABrokerCancel(t *testing.T) {
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprint("late ", late), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var keptOnes keptOnes
				r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					if d.Redelivered {
						return nil
					}
					return keptOnes.keep(ctx, d)
				}, steadymq.WithDrainTimeout(10*time.Second))
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(time.Second)
				r.Broker.CancelConsumers(rig.Queue)
				r.Wait(5 * time.Second)
				d := keptOnes.kept(r, 1)[0]
				require.Equal(r, steadymq.Consuming, r.Consumer.State(), "in the next session")
				assert.NoError(r, d.Context().Err())
				if late {
					r.Wait(6 * time.Second)
					assert.ErrorIs(r, d.Ack(), steadymq.ErrStale)
					assert.Error(r, d.Context().Err())
				} else {
					assert.NoError(r, d.Ack())
				}
				r.Wait(time.Second)
				assert.Zero(r, r.Consumer.Stats().Later)
				assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
				assert.Zero(r, r.Broker.QueueLen(rig.Queue))
				assert.NoError(r, r.Stop())
			})
		})
	}
}

func TestStopWaitsForWhatIsKeptForLater(t *testing.T) {
	for _, grouped := range []bool{false, true} {
		t.Run(fmt.Sprint("grouped ", grouped), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var keptOnes keptOnes
				stop := aloneOrGrouped(r, grouped, keptOnes.keep)
				r.PublishMany(2, "x")
				r.Wait(time.Second)
				all := keptOnes.kept(r, 2)
				for i, after := range []time.Duration{3 * time.Second, 5 * time.Second} {
					time.AfterFunc(after, func() { assert.NoError(r, all[i].Ack()) })
				}
				began := time.Now()
				assert.NoError(r, stop())
				assert.InDelta(r, 5*time.Second, time.Since(began), float64(100*time.Millisecond))
				assert.Zero(r, r.Broker.QueueLen(rig.Queue))
			})
		})
	}
}

// aloneOrGrouped runs a consumer of the queue, by itself or in a group, and returns how to stop it.
func aloneOrGrouped(r *rig.Rig, inGroup bool, h steadymq.Handler, options ...steadymq.Option) (stop func() error) {
	r.Helper()
	if !inGroup {
		r.Consuming(h, options...)
		return r.Stop
	}
	p := grouped(r, 1)
	c, err := p.group.Handle(rig.Queue, h, options...)
	require.NoError(r, err)
	r.Consumer = c
	p.start()
	return func() error {
		p.cancel()
		return <-p.result
	}
}

func TestStopTellsWhatWasKeptForLaterAndNotSettled(t *testing.T) {
	for _, inGroup := range []bool{false, true} {
		t.Run(fmt.Sprint("grouped ", inGroup), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var keptOnes keptOnes
				stop := aloneOrGrouped(r, inGroup, keptOnes.keep, steadymq.WithDrainTimeout(2*time.Second))
				r.PublishMany(3, "x")
				r.Wait(time.Second)
				all := keptOnes.kept(r, 3)
				require.NoError(r, all[1].Ack())
				began := time.Now()
				err := stop()
				assert.InDelta(r, 2*time.Second, time.Since(began), float64(100*time.Millisecond))
				var drain *steadymq.DrainError
				require.ErrorAs(r, err, &drain)
				assert.Equal(r, steadymq.DrainError{Unsettled: 2, Limit: 2 * time.Second}, *drain)
				assert.ErrorContains(r, err, "2 deliveries kept for later and not settled after 2s")
				assert.ErrorIs(r, context.Cause(all[0].Context()), steadymq.ErrDrainTimeout)
				assert.ErrorIs(r, all[0].Ack(), steadymq.ErrStale)
				assert.Equal(r, 2, r.Broker.QueueLen(rig.Queue))
				assert.Zero(r, r.Consumer.Stats().Later)
				assert.EqualValues(r, 2, r.Consumer.Stats().Stale)
			})
		})
	}
}

func TestStopTellsOfHandlersAndOfWhatTheyKept(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var keptOnes keptOnes
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "long" {
				<-ctx.Done()
				return steadymq.Later
			}
			return keptOnes.keep(ctx, d)
		}, steadymq.WithDrainTimeout(time.Second))
		r.Broker.Publish(rig.Queue, "short")
		r.Broker.Publish(rig.Queue, "long")
		r.Wait(time.Second)
		var drain *steadymq.DrainError
		err := r.Stop()
		require.ErrorAs(r, err, &drain)
		assert.Equal(r, steadymq.DrainError{Handlers: 1, Unsettled: 1, Limit: time.Second}, *drain)
		assert.ErrorContains(r, err, "1 handler still running and 1 delivery kept for later and not settled after 1s")
		assert.Zero(r, r.Consumer.Stats().Later)
	})
}

// A stop during the backoff waits for what a session keeps that the broker has cancelled.
func TestStopWaitsForWhatACancelledSessionKeeps(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var keptOnes keptOnes
		r.Consuming(keptOnes.keep)
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(time.Second)
		time.AfterFunc(4*time.Second, func() { assert.NoError(r, keptOnes.kept(r, 1)[0].Ack()) })
		began := time.Now()
		assert.NoError(r, r.Stop())
		assert.InDelta(r, 4*time.Second, time.Since(began), float64(100*time.Millisecond))
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
	})
}

func TestLaterIsAnOutcomeAndNoFailure(t *testing.T) {
	for _, err := range []error{steadymq.Later, fmt.Errorf("x: %w", steadymq.Later)} {
		o, explicit := steadymq.OutcomeOf(err)
		assert.Equal(t, steadymq.Unsettled, o)
		assert.True(t, explicit)
	}
	var sent settlements
	d := steadymq.NewDelivery(amqp.Delivery{Acknowledger: &sent})
	o, err := steadymq.Invoke(t.Context(), func(context.Context, *steadymq.Delivery) error { return steadymq.Later }, d)
	assert.Equal(t, steadymq.Unsettled, o)
	assert.ErrorIs(t, err, steadymq.Later)
	assert.Zero(t, sent)
	assert.NoError(t, d.Context().Err())
	assert.Nil(t, d.Context().Done())
	assert.Nil(t, new(steadymq.Delivery).Context().Value("x"))
	assert.NoError(t, d.Discard())
	assert.Equal(t, steadymq.Discarded, d.Outcome())
	assert.EqualValues(t, 1, sent)
}

// settlements counts the settlements of a Delivery of NewDelivery.
type settlements int

func (f *settlements) Ack(uint64, bool) error { *f++; return nil }

func (f *settlements) Nack(uint64, bool, bool) error { *f++; return nil }

func (f *settlements) Reject(uint64, bool) error { *f++; return nil }

// Nobody settles what a panic has ended.
func TestPanicWithLaterIsAFailure(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if d.Redelivered {
				return nil
			}
			panic(steadymq.Later)
		}, steadymq.WithRequeueDelay(time.Second, time.Second))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Minute)
		assert.EqualValues(r, 1, r.Consumer.Stats().Failed)
		assert.Zero(r, r.Consumer.Stats().Later)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
	})
}

func TestMiddlewareLooksThroughLater(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var keptOnes keptOnes
		r.Consuming(keptOnes.keep, steadymq.WithMiddleware(
			middleware.Correlation, middleware.Log(slog.New(slog.NewTextHandler(r.Log, nil))),
			middleware.ParkAfter(1), middleware.DiscardAfter(1), middleware.Permanent(steadymq.Later),
			middleware.PermanentFunc(func(error) bool { return true })))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Minute)
		assert.Equal(r, 1, r.Consumer.Stats().Later)
		assert.NotContains(r, r.Log.String(), "handler failed")
		assert.NotContains(r, r.Log.String(), "WARN")
		assert.NoError(r, keptOnes.kept(r, 1)[0].Ack())
	})
}

// What is settled by hand is settled: no copy of it is sent.
func TestPolicyHasNoPartInWhatIsKeptForLater(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var keptOnes keptOnes
		r.Consuming(keptOnes.keep, steadymq.WithRetry(steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Second}, Park: "parked"}))
		r.PublishMany(2, "x")
		r.Wait(time.Second)
		all := keptOnes.kept(r, 2)
		require.NoError(r, all[0].Discard())
		require.NoError(r, all[1].Requeue())
		r.Wait(time.Minute)
		require.NoError(r, keptOnes.kept(r, 3)[2].Ack())
		r.Wait(time.Second)
		stats := r.Consumer.Stats()
		assert.Zero(r, stats.Delayed+stats.Parked)
		assert.EqualValues(r, 1, stats.Discarded)
		assert.EqualValues(r, 1, stats.Requeued)
		assert.EqualValues(r, 1, stats.Acked)
	})
}

type valueKey struct{}

func TestContextOfADeliveryEndsWithItsSessionAndNotWithTheHandler(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var keptOnes keptOnes
		var given context.Context
		r.Consumer = r.New(steadymq.WithHandlerTimeout(time.Minute))
		ctx, stop := context.WithCancel(context.WithValue(r.Context(), valueKey{}, "value"))
		result := make(chan error, 1)
		go func() {
			result <- r.Consumer.Run(ctx, func(ctx context.Context, d *steadymq.Delivery) error {
				given = ctx
				return keptOnes.keep(ctx, d)
			})
		}()
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(2 * time.Minute)
		d := keptOnes.kept(r, 1)[0]
		assert.Error(r, given.Err(), "that with the limit ends when the handler returns")
		assert.NoError(r, d.Context().Err())
		assert.Equal(r, "value", d.Context().Value(valueKey{}))
		stop()
		r.Wait(time.Second)
		assert.NoError(r, d.Context().Err(), "a stop does not end it")
		assert.NoError(r, d.Ack())
		assert.NoError(r, <-result)
		assert.Error(r, d.Context().Err())
	})
}

func TestDeliveriesThatAreKeptForLaterTakeUpThePrefetchAndThatIsTold(t *testing.T) {
	for _, kind := range rig.QueueTypes {
		t.Run(kind, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue(kind)
				var keptOnes keptOnes
				kept := 4
				if kind == "stream" {
					kept = 1 // which holds up all others
				}
				r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					if d.DeliveryTag <= uint64(kept) {
						return keptOnes.keep(ctx, d)
					}
					return nil
				}, append(rig.OfType(kind), steadymq.WithPrefetch(4), steadymq.WithStallDetector(10*time.Second))...)
				r.PublishMany(kept-1, "x")
				r.Wait(10 * time.Minute)
				assert.Empty(r, r.Warnings("settled later"), "there is room")
				r.PublishMany(10, "x")
				r.Wait(3 * time.Minute)
				assert.Len(r, r.Warnings("kept to be settled later take up the prefetch"), 1)
				r.Wait(time.Hour)
				assert.LessOrEqual(r, len(r.Warnings("kept to be settled later take up the prefetch")), 13)
				assert.EqualValues(r, 1, r.Consumer.Stats().Sessions, "it is no stall")
				for _, d := range keptOnes.kept(r, kept) {
					assert.NoError(r, d.Ack())
				}
				r.Wait(time.Second)
				assert.EqualValues(r, kept-1+10, r.Consumer.Stats().Acked)
				told := len(r.Warnings("settled later"))
				r.Wait(10 * time.Minute)
				assert.Len(r, r.Warnings("settled later"), told)
			})
		})
	}
}

// Somebody settles all the time, so nothing is stuck although the prefetch is always taken up.
func TestBusyUserOfLaterIsNotWarned(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.PublishMany(1000, "x")
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			time.AfterFunc(20*time.Second, func() { assert.NoError(r, d.Ack()) })
			return steadymq.Later
		}, steadymq.WithPrefetch(2))
		r.Wait(time.Hour)
		assert.Empty(r, r.Warnings("settled later"))
		assert.NotZero(r, r.Consumer.Stats().Acked)
	})
}

// Each message is settled in force in the end, whatever happens to sessions and whoever settles,
// and a delivery only once.
func TestWhatIsKeptForLaterSurvivesRandomFaults(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				random := rand.New(rand.NewPCG(seed, 1))
				var draw sync.Mutex
				n := func(most int) int {
					draw.Lock()
					defer draw.Unlock()
					return random.IntN(most)
				}
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					outcome := []func() error{d.Ack, d.Ack, d.Requeue}[n(3)]
					for range 1 + n(2) {
						time.AfterFunc(time.Duration(n(3000))*time.Millisecond, func() {
							err := outcome()
							assert.True(r, err == nil || errors.Is(err, steadymq.ErrStale) || errors.Is(err, steadymq.ErrSettled), "%v", err)
						})
					}
					time.Sleep(time.Duration(n(1000)) * time.Millisecond)
					return steadymq.Later
				}, steadymq.WithConcurrency(1+n(4)), steadymq.WithPrefetch(4+n(8)), steadymq.WithDrainTimeout(4*time.Second))
				for range 20 {
					r.PublishMany(1+n(3), "x")
					r.Wait(time.Duration(n(800)) * time.Millisecond)
					switch n(6) {
					case 0:
						r.Broker.Reset()
					case 1:
						r.Broker.CancelConsumers(rig.Queue)
					case 2:
						r.Broker.CloseChannels(406, "x")
					}
				}
				r.Wait(5 * time.Minute)
				assert.Zero(r, r.Broker.QueueLen(rig.Queue))
				stats := r.Consumer.Stats()
				assert.Zero(r, stats.Later)
				assert.Zero(r, stats.Failed)
				assert.Equal(r, stats.Delivered, stats.Acked+stats.Requeued+stats.Stale)
				assert.NoError(r, r.Stop())
			})
		})
	}
}
