package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// collected is a consumer of batches, and what its handler has been given.
type collected struct {
	*rig.Rig
	then steadymq.BatchHandler // what the handler does; nil acks

	mu    sync.Mutex
	calls []batchSeen
}

// batchSeen is one call of a handler.
type batchSeen struct {
	at       time.Time
	bodies   []string
	attempts []int
	sessions []uint64
}

func (c *collected) handle(ctx context.Context, batch []*steadymq.Delivery) error {
	seen := batchSeen{at: time.Now()}
	for _, d := range batch {
		seen.bodies = append(seen.bodies, string(d.Body))
		seen.attempts = append(seen.attempts, d.Attempt())
		seen.sessions = append(seen.sessions, d.Session())
	}
	c.mu.Lock()
	c.calls = append(c.calls, seen)
	c.mu.Unlock()
	if c.then == nil {
		return nil
	}
	return c.then(ctx, batch)
}

func (c *collected) seen() []batchSeen {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.calls)
}

// bodies are those of each batch so far, as one text.
func (c *collected) bodies() (all []string) {
	for _, b := range c.seen() {
		all = append(all, strings.Join(b.bodies, " "))
	}
	return all
}

func (c *collected) outcomes() steadymq.Stats { return c.Consumer.Stats() }

// startBatch runs the consumer that is there.
func startBatch(r *rig.Rig, h steadymq.BatchHandler) {
	ctx, cancel := context.WithCancel(r.Context())
	r.Cancel, r.Result = cancel, make(chan error, 1)
	result, c := r.Result, r.Consumer
	go func() { result <- c.RunBatch(ctx, h) }()
}

// inBatches runs a consumer of batches and waits for its first session.
func inBatches(r *rig.Rig, then steadymq.BatchHandler, options ...steadymq.Option) *collected {
	r.Helper()
	c := &collected{Rig: r, then: then}
	r.Consumer = r.New(options...)
	startBatch(r, c.handle)
	r.Wait(100 * time.Millisecond)
	require.Equal(r, steadymq.Consuming, r.Consumer.State())
	return c
}

func TestBatchIsFullOrHasWaited(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, nil, steadymq.WithBatch(3, time.Second))
		r.Broker.Publish(rig.Queue, "1", "2", "3", "4", "5")
		r.Wait(10 * time.Millisecond)
		assert.Equal(r, []string{"1 2 3"}, c.bodies(), "a full one at once")
		r.Wait(980 * time.Millisecond)
		assert.Len(r, c.bodies(), 1)
		r.Wait(20 * time.Millisecond)
		assert.Equal(r, []string{"1 2 3", "4 5"}, c.bodies())
		assert.EqualValues(r, 5, c.outcomes().Acked)
		assert.EqualValues(r, 5, c.outcomes().Delivered)
		assert.Zero(r, c.outcomes().Handling)
	})
}

// A timer that starts again with each message never ends where they trickle.
func TestTrickleDoesNotStartTheWaitAgain(t *testing.T) {
	const wait = time.Second
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, func(context.Context, []*steadymq.Delivery) error {
			time.Sleep(10 * time.Millisecond)
			return nil
		}, steadymq.WithBatch(100, wait), steadymq.WithConcurrency(3))
		r.PublishMany(300, "x")
		r.Wait(2 * wait)
		require.Len(r, c.seen(), 3, "all workers have started")
		var published []time.Time
		for range 100 {
			published = append(published, time.Now())
			r.Broker.Publish(rig.Queue, fmt.Sprint(len(published)-1))
			r.Wait(70 * time.Millisecond)
		}
		r.Wait(2 * wait)
		handled := 0
		for _, b := range c.seen()[3:] {
			waited := b.at.Sub(published[handled])
			assert.InDelta(r, wait, waited, float64(wait)/10, "from the first of a batch to its handler")
			handled += len(b.bodies)
		}
		assert.Equal(r, 100, handled)
		assert.Len(r, c.seen(), 3+7, "one worker collects, so the others do not share the trickle")
	})
}

func TestNextBatchesAreOnTheirWayWhileSomeAreHandled(t *testing.T) {
	for _, v := range []struct {
		options  []steadymq.Option
		prefetch int
	}{
		{nil, 200},
		{rig.Options(steadymq.WithBatch(10, time.Second)), 32},
		{rig.Options(steadymq.WithBatch(50, time.Second), steadymq.WithConcurrency(4)), 400},
		{rig.Options(steadymq.WithBatch(10, time.Second), steadymq.WithPrefetch(10)), 10},
	} {
		rig.Bubble(t, func(r *rig.Rig) {
			release := make(chan struct{})
			inBatches(r, func(context.Context, []*steadymq.Delivery) error {
				<-release
				return nil
			}, v.options...)
			r.PublishMany(500, "x")
			r.Wait(5 * time.Second)
			assert.Equal(r, v.prefetch, r.Broker.Unsettled(rig.Queue))
			close(release)
		})
	}
}

func TestConcurrencyIsHowManyBatchesAreHandledAtOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		free := make(chan struct{})
		c := inBatches(r, func(context.Context, []*steadymq.Delivery) error {
			<-free
			return nil
		}, steadymq.WithBatch(5, time.Second), steadymq.WithConcurrency(3))
		r.PublishMany(60, "x")
		r.Wait(time.Minute)
		assert.Len(r, c.seen(), 3)
		assert.Equal(r, 15, c.outcomes().Handling, "messages in handlers")
		close(free)
		r.Wait(time.Second)
		assert.Len(r, c.seen(), 12)
		assert.EqualValues(r, 60, c.outcomes().Acked)
	})
}

// What each message of a batch of five gets.
func TestErrorOfABatchIsThatOfAllOrOfEach(t *testing.T) {
	plain, third := errors.New("away"), errors.New("third")
	mixed := []error{nil, steadymq.Discard(nil), third, nil, steadymq.Requeue(nil)}
	for name, v := range map[string]struct {
		err                              error
		acked, discarded, requeued, held int
	}{
		"nil":                {nil, 5, 0, 0, 0},
		"plain":              {plain, 0, 0, 0, 5},
		"discard":            {steadymq.Discard(plain), 0, 5, 0, 0},
		"pointer":            {&steadymq.BatchError{Errs: mixed}, 2, 1, 1, 1},
		"value":              {steadymq.BatchError{Errs: mixed}, 2, 1, 1, 1},
		"wrapped":            {fmt.Errorf("batch: %w", &steadymq.BatchError{Errs: mixed}), 2, 1, 1, 1},
		"wrapped value":      {fmt.Errorf("batch: %w", steadymq.BatchError{Errs: mixed}), 2, 1, 1, 1},
		"none failed":        {&steadymq.BatchError{Errs: make([]error, 5)}, 5, 0, 0, 0},
		"too short":          {&steadymq.BatchError{Errs: mixed[:2]}, 1, 1, 0, 3},
		"too long":           {&steadymq.BatchError{Errs: append(slices.Clone(mixed), plain)}, 2, 1, 1, 1},
		"empty":              {&steadymq.BatchError{}, 0, 0, 0, 5},
		"nil pointer":        {(*steadymq.BatchError)(nil), 0, 0, 0, 5},
		"one that is broken": {&steadymq.BatchError{Errs: []error{nil, (*nilError)(nil), nil, nil, nil}}, 4, 0, 0, 1},
		"one that panics":    {&steadymq.BatchError{Errs: []error{nil, panickyError{}, nil, nil, nil}}, 4, 0, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				first := true
				c := inBatches(r, func(context.Context, []*steadymq.Delivery) error {
					if !first {
						return nil
					}
					first = false
					return v.err
				}, steadymq.WithBatch(5, time.Second), steadymq.WithRequeueDelay(time.Hour, time.Hour))
				r.Broker.Publish(rig.Queue, "0", "1", "2", "3", "4")
				r.Wait(time.Second) // what was requeued has come again
				s := c.outcomes()
				assert.EqualValues(r, v.acked+v.requeued, s.Acked, "acked")
				assert.EqualValues(r, v.discarded, s.Discarded, "discarded")
				assert.EqualValues(r, v.requeued, s.Requeued, "requeued")
				assert.Equal(r, v.held, s.Held, "held")
				assert.EqualValues(r, v.held+v.discarded+v.requeued, s.Failed, "failed")
				said := strings.HasPrefix(name, "too") || name == "empty"
				assert.Equal(r, said, len(r.Warnings("not one entry for each message")) == 1, "the wrong number is told")
			})
		})
	}
}

// panickyError panics when it is looked into.
type panickyError struct{}

func (panickyError) Error() string { return "panics" }
func (panickyError) Unwrap() error { panic("boom") }

func TestHookIsToldOfEachMessageOfABatchThatFailed(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		told := make(map[string]string)
		settled := make(map[string]steadymq.Outcome)
		boom := errors.New("boom")
		c := inBatches(r, func(context.Context, []*steadymq.Delivery) error {
			return &steadymq.BatchError{Errs: []error{nil, boom, steadymq.Discard(errAway)}}
		}, steadymq.WithBatch(4, time.Second), steadymq.WithRequeueDelay(time.Hour, time.Hour), steadymq.WithHooks(steadymq.Hooks{
			StateChanged:  r.Changed,
			HandlerFailed: func(d *steadymq.Delivery, err error) { told[string(d.Body)] = err.Error() },
			Settled:       func(d *steadymq.Delivery, o steadymq.Outcome) { settled[string(d.Body)] = o },
		}))
		r.Broker.Publish(rig.Queue, "0", "1", "2", "3")
		r.Wait(2 * time.Second)
		require.Len(r, told, 3)
		assert.Equal(r, "boom", told["1"])
		assert.Equal(r, errAway.Error(), told["2"])
		assert.Contains(r, told["3"], "no entry for this message")
		assert.Equal(r, map[string]steadymq.Outcome{"0": steadymq.Acked, "2": steadymq.Discarded}, settled)
		assert.EqualValues(r, 3, c.outcomes().Failed)
	})
}

func TestFailedBatchIsOneLineOfTheLog(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, func(context.Context, []*steadymq.Delivery) error { return errAway },
			steadymq.WithRequeueDelay(time.Hour, time.Hour))
		r.PublishMany(100, "x")
		r.Wait(time.Second)
		assert.Len(r, c.seen(), 1)
		assert.EqualValues(r, 100, c.outcomes().Failed)
		assert.Len(r, r.Warnings("handler failed"), 1)
	})
}

func TestWhatTheHandlerOfABatchSettledItselfStays(t *testing.T) {
	for name, v := range map[string]struct {
		err          error
		held, failed int
	}{
		"nil":   {nil, 0, 0},
		"plain": {errAway, 2, 2},
		"each":  {&steadymq.BatchError{Errs: []error{nil, nil, errAway, nil}}, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				c := inBatches(r, func(_ context.Context, batch []*steadymq.Delivery) error {
					assert.NoError(r, batch[0].Ack())
					assert.NoError(r, batch[1].Discard())
					return v.err
				}, steadymq.WithBatch(4, time.Second), steadymq.WithRequeueDelay(time.Hour, time.Hour))
				r.Broker.Publish(rig.Queue, "0", "1", "2", "3")
				r.Wait(100 * time.Millisecond)
				s := c.outcomes()
				assert.EqualValues(r, 1, s.Discarded)
				assert.EqualValues(r, 3-v.held, s.Acked)
				assert.Equal(r, v.held, s.Held)
				assert.EqualValues(r, v.failed, s.Failed)
			})
		})
	}
}

func TestErrorAfterAllOfABatchWasSettledByHandIsToldOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, func(_ context.Context, batch []*steadymq.Delivery) error {
			for _, d := range batch {
				assert.NoError(r, d.Ack())
			}
			panic("boom")
		}, steadymq.WithBatch(4, time.Second))
		r.Broker.Publish(rig.Queue, "0", "1", "2", "3")
		r.Wait(100 * time.Millisecond)
		assert.EqualValues(r, 4, c.outcomes().Acked)
		assert.EqualValues(r, 1, c.outcomes().Failed)
		assert.Len(r, r.Log.Lines("handler panicked"), 1)
	})
}

func TestRefusedSettlementByHandFailsOnlyThatMessageOfABatch(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, func(_ context.Context, batch []*steadymq.Delivery) error {
			assert.ErrorIs(r, batch[2].Delivery.Ack(true), steadymq.ErrMultiple)
			return nil
		}, steadymq.WithBatch(4, time.Second), steadymq.WithRequeueDelay(time.Hour, time.Hour))
		r.Broker.Publish(rig.Queue, "0", "1", "2", "3")
		r.Wait(100 * time.Millisecond)
		assert.EqualValues(r, 3, c.outcomes().Acked)
		assert.Equal(r, 1, c.outcomes().Held)
		assert.EqualValues(r, 1, c.outcomes().Failed)
	})
}

func TestHandlerOfABatchMayPanicOrEndItsGoroutine(t *testing.T) {
	for name, end := range map[string]func(){
		"panic":  func() { panic("boom") },
		"Goexit": runtime.Goexit,
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				c := inBatches(r, func(_ context.Context, batch []*steadymq.Delivery) error {
					if len(batch) > 1 {
						assert.NoError(r, batch[1].Ack())
						end()
					}
					return nil
				}, steadymq.WithBatch(4, time.Second))
				r.Broker.Publish(rig.Queue, "0", "1", "2", "3")
				r.Wait(100 * time.Millisecond)
				assert.EqualValues(r, 1, c.outcomes().Acked)
				assert.EqualValues(r, 3, c.outcomes().Failed)
				assert.Equal(r, 3, c.outcomes().Held)
				r.Wait(time.Minute)
				assert.EqualValues(r, 4, c.outcomes().Acked, "a worker is there as before")
			})
		})
	}
}

// The hook Settled is called while a batch is concluded. One that ends its goroutine ends Run, and
// leaves no delivery behind.
func TestHookThatEndsItsGoroutineAmidABatchLeavesNoneUnsettled(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consumer = r.New(steadymq.WithBatch(4, time.Second), steadymq.WithHooks(steadymq.Hooks{
			Settled: func(*steadymq.Delivery, steadymq.Outcome) { runtime.Goexit() },
		}))
		startBatch(r, func(context.Context, []*steadymq.Delivery) error { return nil })
		r.Broker.Publish(rig.Queue, "0", "1", "2", "3")
		r.Wait(time.Second)
		require.Len(r, r.Result, 1, "the stop has not waited for the drain limit")
		assert.ErrorAs(r, <-r.Result, new(*steadymq.PanicError))
		r.Result = nil
		assert.EqualValues(r, 4, r.Consumer.Stats().Acked)
	})
}

// The handler does to its slice what it likes.
func TestSliceOfABatchBelongsToItsHandler(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var kept [][]*steadymq.Delivery
		c := inBatches(r, func(_ context.Context, batch []*steadymq.Delivery) error {
			kept = append(kept, slices.Clone(batch), batch)
			slices.Reverse(batch)
			batch[0] = nil
			kept = append(kept, slices.Clone(batch))
			return &steadymq.BatchError{Errs: []error{steadymq.Discard(nil), nil, nil}}
		}, steadymq.WithBatch(3, time.Second))
		for range 5 {
			r.Broker.Publish(rig.Queue, "0", "1", "2")
		}
		r.Wait(100 * time.Millisecond)
		require.Len(r, kept, 15)
		for i := 0; i < len(kept); i += 3 {
			assert.Equal(r, kept[i+2], kept[i+1], "nobody has written into it since")
			assert.Equal(r, steadymq.Discarded, kept[i][0].Outcome(), "the first in the order as it was given")
			assert.Equal(r, steadymq.Acked, kept[i][1].Outcome())
			assert.Equal(r, steadymq.Acked, kept[i][2].Outcome())
		}
		assert.EqualValues(r, 10, c.outcomes().Acked)
	})
}

// poisonous fails a batch in which there is a message "poison".
func poisonous(_ context.Context, batch []*steadymq.Delivery) error {
	if slices.ContainsFunc(batch, func(d *steadymq.Delivery) bool { return string(d.Body) == "poison" }) {
		return errAway
	}
	return nil
}

func TestPoisonMessageFailsTheOthersOfItsBatchOnce(t *testing.T) {
	for _, kind := range rig.QueueTypes {
		t.Run(kind, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue(kind)
				c := inBatches(r, poisonous, append(rig.OfType(kind), steadymq.WithRequeueDelay(time.Second, time.Minute))...)
				for i := range 99 {
					r.Broker.Publish(rig.Queue, fmt.Sprint(i))
				}
				r.Broker.Publish(rig.Queue, "poison")
				r.Wait(20 * time.Second)
				r.Broker.Publish(rig.Queue, "next", "next")
				r.Wait(time.Minute)
				calls := c.seen()
				require.Greater(r, len(calls), 104)
				assert.Len(r, calls[0].bodies, 100)
				times := make(map[string]int)
				for _, b := range calls {
					for i, body := range b.bodies {
						times[body]++
						assert.True(r, b.attempts[i] == 1 || len(b.bodies) == 1, "what has failed comes alone")
					}
				}
				for body, n := range times {
					switch body {
					case "poison":
						assert.Greater(r, n, 3)
					case "next":
						assert.Equal(r, 2, n)
					default:
						assert.Equal(r, 2, n, "it fails once with the others, and is handled alone")
					}
				}
				assert.EqualValues(r, 101, c.outcomes().Acked)
			})
		})
	}
}

// One that failed before meets others that are being collected: these are handled at once, and it
// comes next, by whichever worker is free.
func TestMessageThatFailedBeforeEndsTheBatchBeforeIt(t *testing.T) {
	for _, workers := range []int{1, 2} {
		rig.Bubble(t, func(r *rig.Rig) {
			c := inBatches(r, func(context.Context, []*steadymq.Delivery) error {
				time.Sleep(time.Second)
				return nil
			}, steadymq.WithBatch(10, time.Minute), steadymq.WithConcurrency(workers))
			r.Broker.Publish(rig.Queue, "1", "2")
			r.Wait(time.Second)
			r.Broker.PublishMessage(rig.Queue, deadLettered("again"))
			r.Wait(10 * time.Millisecond)
			want := []string{"1 2", "again"}
			assert.Equal(r, want[:workers], c.bodies(), "another worker takes it at once")
			r.Broker.Publish(rig.Queue, "3", "4")
			r.Wait(time.Second)
			assert.Equal(r, want, c.bodies())
			r.Wait(2 * time.Minute)
			assert.Equal(r, append(want, "3 4"), c.bodies())
		})
	}
}

// The worker that collects meets it, and no other one has started yet.
func TestWorkerStartsForAMessageThatComesAloneInABatch(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, func(context.Context, []*steadymq.Delivery) error {
			time.Sleep(5 * time.Second)
			return nil
		}, steadymq.WithBatch(10, time.Minute), steadymq.WithConcurrency(2))
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Second)
		r.Broker.PublishMessage(rig.Queue, deadLettered("again"))
		r.Wait(time.Second)
		assert.Equal(r, []string{"1", "again"}, c.bodies())
	})
}

// deadLettered is a message that was rejected from the queue before.
func deadLettered(body string) steadymqtest.Message {
	return steadymqtest.Message{Body: []byte(body), Headers: map[string]any{"x-death": []any{
		map[string]any{"queue": "wait", "reason": "expired", "count": int64(1)},
		map[string]any{"queue": rig.Queue, "reason": "rejected", "count": int64(1)},
	}}}
}

func TestStopHandlesWhatWasCollected(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, func(ctx context.Context, _ []*steadymq.Delivery) error {
			assert.NoError(r, ctx.Err())
			time.Sleep(time.Second)
			return nil
		}, steadymq.WithBatch(100, 15*time.Minute))
		r.Broker.Publish(rig.Queue, "1", "2")
		r.Wait(time.Second)
		began := time.Now()
		require.NoError(r, r.Stop())
		assert.Equal(r, []string{"1 2"}, c.bodies())
		assert.Less(r, time.Since(began), 2*time.Second)
		assert.EqualValues(r, 2, c.outcomes().Acked)
		assert.Equal(r, 2, r.Broker.Ledger().Count(rig.Queue, steadymqtest.Acked))
	})
}

// A message that failed before and waits for its turn has not started, so it goes back.
func TestStopPutsBackWhatWasToComeAlone(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, func(context.Context, []*steadymq.Delivery) error {
			time.Sleep(time.Second)
			return nil
		}, steadymq.WithBatch(10, time.Minute))
		r.Broker.Publish(rig.Queue, "1")
		r.Broker.PublishMessage(rig.Queue, deadLettered("again"))
		r.Wait(100 * time.Millisecond)
		require.Equal(r, []string{"1"}, c.bodies())
		require.NoError(r, r.Stop())
		assert.Equal(r, []string{"1"}, c.bodies())
		assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue))
		settlements := r.Broker.Ledger().Settlements
		assert.Equal(r, steadymqtest.Nack, settlements[0].Kind, "as one that was never started")
	})
}

func TestDrainLimitEndsTheContextOfABatch(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var cause error
		c := inBatches(r, func(ctx context.Context, _ []*steadymq.Delivery) error {
			<-ctx.Done()
			cause = context.Cause(ctx)
			return ctx.Err()
		}, steadymq.WithBatch(10, time.Minute), steadymq.WithDrainTimeout(3*time.Second))
		r.Broker.Publish(rig.Queue, "1", "2", "3")
		r.Wait(time.Second)
		err := r.Stop()
		var drain *steadymq.DrainError
		require.ErrorAs(r, err, &drain)
		assert.Equal(r, 1, drain.Handlers, "batches")
		require.ErrorIs(r, cause, steadymq.ErrDrainTimeout)
		assert.Zero(r, c.outcomes().Failed)
		assert.EqualValues(r, 3, c.outcomes().Stale)
		assert.Equal(r, 3, r.Broker.QueueLen(rig.Queue))
	})
}

func TestTimeoutIsThatOfTheWholeBatch(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, func(ctx context.Context, batch []*steadymq.Delivery) error {
			if batch[0].Attempt() > 1 {
				return nil
			}
			<-ctx.Done()
			assert.ErrorIs(r, context.Cause(ctx), steadymq.ErrHandlerTimeout)
			time.Sleep(5 * time.Second)
			assert.Equal(r, 1, r.Consumer.Stats().Overdue)
			return context.Cause(ctx)
		}, steadymq.WithBatch(3, time.Second), steadymq.WithHandlerTimeout(time.Second))
		r.Broker.Publish(rig.Queue, "1", "2", "3")
		r.Wait(7 * time.Second)
		assert.EqualValues(r, 3, c.outcomes().Failed)
		assert.Zero(r, c.outcomes().Overdue)
		assert.Len(r, r.Warnings("running past its timeout"), 1)
	})
}

// losses end a session in every way.
var losses = map[string]func(*steadymqtest.Broker){
	"reset":            func(b *steadymqtest.Broker) { b.Reset() },
	"connection close": func(b *steadymqtest.Broker) { b.CloseConnections(320, "bye") },
	"channel close":    func(b *steadymqtest.Broker) { b.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 7") },
}

func TestLostSessionDropsWhatWasCollected(t *testing.T) {
	for name, lose := range losses {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				c := inBatches(r, nil, steadymq.WithBatch(100, time.Minute))
				r.Broker.Publish(rig.Queue, "1", "2")
				r.Wait(time.Second)
				lose(r.Broker)
				r.Wait(time.Second)
				assert.Equal(r, []string{"1", "2"}, c.bodies(), "as for all that comes again, each alone")
				for _, b := range c.seen() {
					assert.Equal(r, []uint64{2}, b.sessions, "no handler for what the broker has back")
				}
				assert.EqualValues(r, 2, c.outcomes().Delivered)
				assert.EqualValues(r, 2, c.outcomes().Acked)
				assert.Zero(r, c.outcomes().Stale)
			})
		})
	}
}

func TestContextOfABatchEndsWithItsSession(t *testing.T) {
	for name, lose := range losses {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var lost *steadymq.SessionError
				c := inBatches(r, func(ctx context.Context, batch []*steadymq.Delivery) error {
					if batch[0].Session() > 1 {
						return nil
					}
					<-ctx.Done()
					assert.ErrorAs(r, context.Cause(ctx), &lost)
					return ctx.Err()
				}, steadymq.WithBatch(2, time.Second))
				r.Broker.Publish(rig.Queue, "1", "2")
				r.Wait(time.Second)
				lose(r.Broker)
				r.Wait(10 * time.Second)
				require.NotNil(r, lost)
				assert.Zero(r, c.outcomes().Failed)
				assert.EqualValues(r, 2, c.outcomes().Stale)
				assert.EqualValues(r, 2, c.outcomes().Acked)
			})
		})
	}
}

// After a basic.cancel the channel still works: what was collected is handled and acked on it.
func TestCancelledConsumerHandlesWhatWasCollected(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, nil, steadymq.WithBatch(100, time.Minute))
		r.Broker.Publish(rig.Queue, "1", "2")
		r.Wait(time.Second)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(time.Second)
		assert.Equal(r, []string{"1 2"}, c.bodies())
		assert.EqualValues(r, 2, c.outcomes().Acked)
		r.Broker.Publish(rig.Queue, "3")
		r.Wait(2 * time.Minute)
		assert.Equal(r, []string{"1 2", "3"}, c.bodies())
		assert.Equal(r, uint64(2), c.seen()[1].sessions[0])
		assert.Zero(r, c.outcomes().Stale)
	})
}

// Two sessions are alive after a basic.cancel: a handler of the first one keeps its worker, and
// another one collects for the second.
func TestBatchNeverHoldsMessagesOfTwoSessions(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		c := inBatches(r, func(_ context.Context, batch []*steadymq.Delivery) error {
			if string(batch[0].Body) == "1" {
				<-release
			}
			return nil
		}, steadymq.WithBatch(4, 5*time.Second), steadymq.WithConcurrency(2))
		r.Broker.Publish(rig.Queue, "1", "1", "1", "1", "2", "2")
		r.Wait(time.Second)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(100 * time.Millisecond)
		r.Broker.Publish(rig.Queue, "3", "3", "3")
		r.Wait(10 * time.Second)
		close(release)
		r.Wait(time.Second)
		assert.Equal(r, []string{"1 1 1 1", "2 2", "3 3 3"}, c.bodies())
		assert.EqualValues(r, 9, c.outcomes().Acked)
	})
}

// With two sessions alive, the worker of the first must not wait for that which collects for the
// second, nor the other way round.
func TestWorkersOfTwoSessionsDoNotWaitForEachOther(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, func(_ context.Context, batch []*steadymq.Delivery) error {
			if string(batch[0].Body) == "slow" {
				time.Sleep(10 * time.Second)
			}
			return nil
		}, steadymq.WithBatch(1, time.Second), steadymq.WithConcurrency(2))
		r.Broker.Publish(rig.Queue, "slow")
		r.Wait(time.Second)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(20 * time.Second) // one collects for the second session, the other one comes from the first
		r.Broker.Publish(rig.Queue, "slow", "slow")
		r.Wait(time.Second)
		assert.Equal(r, 2, c.outcomes().Handling)
		assert.NoError(r, r.Stop())
	})
}

func TestGroupHandlesBatches(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1, steadymq.WithBatch(3, time.Second))
		c := &collected{Rig: r}
		r.Broker.DeclareQueue("many", steadymqtest.QueueOptions{})
		own, err := p.group.HandleBatch("many", c.handle)
		require.NoError(r, err)
		p.consumers = append(p.consumers, own)
		p.start()
		r.Broker.Publish(p.name(0), "a", "b")
		r.Broker.Publish("many", "1", "2", "3", "4")
		r.Wait(100 * time.Millisecond)
		assert.EqualValues(r, 2, p.consumers[0].Stats().Acked, "the others take one at a time")
		assert.Equal(r, []string{"1 2 3"}, c.bodies())
		r.Broker.Reset()
		r.Wait(5 * time.Second)
		assert.Equal(r, []string{"1 2 3", "4"}, c.bodies(), "what was collected is dropped, and comes again")
		assert.EqualValues(r, 4, own.Stats().Acked)
		require.NoError(r, p.stop())
	})
}

func TestBatchOfAStreamIsAckedInOrderAndFailedOnesComeAlone(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		failed := false
		c := inBatches(r, func(_ context.Context, batch []*steadymq.Delivery) error {
			if failed {
				return nil
			}
			failed = true
			return &steadymq.BatchError{Errs: []error{nil, errAway, nil}}
		}, append(rig.OfType("stream"), steadymq.WithBatch(3, time.Second))...)
		r.Broker.Publish(rig.Queue, "0", "1", "2", "3")
		r.Wait(10 * time.Millisecond)
		assert.Len(r, r.Broker.Ledger().Settlements, 1, "no ack overtakes the one that failed")
		r.Wait(5 * time.Second)
		assert.ElementsMatch(r, []string{"0 1 2", "1", "3"}, c.bodies())
		assert.Len(r, r.Broker.Ledger().Settlements, 4)
		r.Broker.Reset()
		r.Wait(time.Second)
		r.Broker.Publish(rig.Queue, "4")
		r.Wait(2 * time.Second)
		assert.Equal(r, "4", c.bodies()[3], "it goes on where it was")
	})
}

// A stream that is lost while some are collected goes on with these.
func TestStreamGoesOnWithWhatWasCollected(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		c := inBatches(r, nil, append(rig.OfType("stream"), steadymq.WithBatch(3, time.Second))...)
		r.Broker.Publish(rig.Queue, "0", "1", "2", "3", "4")
		r.Wait(100 * time.Millisecond)
		r.Broker.Reset()
		r.Wait(5 * time.Second)
		assert.Equal(r, []string{"0 1 2", "3 4"}, c.bodies())
	})
}

func TestEachMessageOfABatchIsRetriedOnItsOwn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var exchanges []string
		first := true
		c := inBatches(r, func(_ context.Context, batch []*steadymq.Delivery) error {
			if first {
				first = false
				for _, d := range batch {
					d.Body, d.RoutingKey = []byte("scribbled over"), "elsewhere"
				}
				return &steadymq.BatchError{Errs: []error{nil, errAway, steadymq.Park(errAway), steadymq.Discard(nil)}}
			}
			for _, d := range batch {
				exchanges = append(exchanges, d.Exchange+"/"+d.RoutingKey)
			}
			return nil
		}, steadymq.WithBatch(4, time.Second),
			steadymq.WithRetry(steadymq.Retry{Attempts: 3, Delays: []time.Duration{5 * time.Second}, Park: "parked"}))
		r.Broker.DeclareExchange("shop", "topic")
		r.Broker.Bind(rig.Queue, "shop", "#")
		for i := range 4 {
			r.Broker.PublishExchange("shop", "eu.orders", steadymqtest.Message{Body: fmt.Append(nil, i)})
		}
		r.Wait(time.Second)
		s := c.outcomes()
		assert.Equal(r, []uint64{1, 1, 1, 1}, []uint64{s.Acked, s.Delayed, s.Parked, s.Discarded})
		r.Wait(10 * time.Second)
		assert.Equal(r, []string{"0 1 2 3", "1"}, c.bodies(), "the copy is of the message as it came")
		assert.Equal(r, []string{"shop/eu.orders"}, exchanges)
		assert.Equal(r, 1, r.Broker.QueueLen("parked"))
		assert.EqualValues(r, 2, c.outcomes().Acked)
	})
}

func TestWhatBatchesCannotBeIsRefused(t *testing.T) {
	handler := func(context.Context, []*steadymq.Delivery) error { return nil }
	policy := func(next steadymq.Handler) steadymq.Handler { return next }
	made := func(opts ...steadymq.Option) error {
		_, err := steadymq.New("amqp://h/", "orders", opts...)
		return err
	}
	run := func(opts ...steadymq.Option) error {
		c, err := steadymq.New("amqp://h/", "orders", opts...)
		require.NoError(t, err)
		return c.RunBatch(t.Context(), handler)
	}
	group := func(batch bool, of []steadymq.Option, opts ...steadymq.Option) error {
		g, err := steadymq.NewGroup("amqp://h/", of...)
		require.NoError(t, err)
		if batch {
			_, err = g.HandleBatch("orders", handler, opts...)
		} else {
			_, err = g.Handle("orders", rig.Ack, opts...)
		}
		return err
	}
	batch := steadymq.WithBatch(10, time.Second)
	for name, v := range map[string]struct {
		err  error
		want []string
	}{
		"size 0":                   {made(steadymq.WithBatch(0, time.Second)), []string{"WithBatch: size must be between 1 and 65535, got 0"}},
		"size and wait":            {made(steadymq.WithBatch(65536, 0)), []string{"got 65536", "WithBatch: wait must be between 1ms and 15m0s, got 0s"}},
		"wait too long":            {made(steadymq.WithBatch(1, time.Hour)), []string{"got 1h0m0s"}},
		"prefetch":                 {made(batch, steadymq.WithConcurrency(3), steadymq.WithPrefetch(29)), []string{"WithPrefetch: must be at least size times concurrency (30)", "got 29"}},
		"prefetch of the default":  {run(steadymq.WithPrefetch(99)), []string{"WithPrefetch", "(100)"}},
		"too many":                 {made(steadymq.WithBatch(1000, time.Second), steadymq.WithConcurrency(66)), []string{"WithBatch: size times concurrency (66) must be at most 65535", "got 66000"}},
		"wait beyond the broker's": {made(steadymq.WithBatch(1, time.Minute), steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": 60_000})), []string{"WithBatch: wait must be at most half of x-consumer-timeout, here 30s, got 1m0s"}},
		"middleware":               {made(batch, steadymq.WithMiddleware(policy)), []string{"WithMiddleware: wraps a Handler"}},
		"key":                      {run(steadymq.WithOrderingKey(func(*steadymq.Delivery) string { return "" })), []string{"WithOrderingKey: orders single deliveries", "or use Run, in a Group Handle"}},
		"middleware and RunBatch":  {run(steadymq.WithMiddleware(policy), steadymq.WithPrefetch(1)), []string{"WithMiddleware", "WithPrefetch"}},
		"Run": {func() error {
			c, err := steadymq.New("amqp://h/", "orders", batch)
			require.NoError(t, err)
			return c.Run(t.Context(), rig.Ack)
		}(), []string{"WithBatch: has no effect on Run", "RunBatch"}},
		"no handler": {func() error {
			c, err := steadymq.New("amqp://h/", "orders", steadymq.WithMiddleware(policy))
			require.NoError(t, err)
			return c.RunBatch(t.Context(), nil)
		}(), []string{"RunBatch: the handler must not be nil", "WithMiddleware"}},
		"no handler in a group": {func() error {
			g, err := steadymq.NewGroup("amqp://h/")
			require.NoError(t, err)
			_, err = g.HandleBatch("orders", nil)
			return err
		}(), []string{"HandleBatch: the handler must not be nil", "orders"}},
		"no queue in a group": {func() error {
			g, err := steadymq.NewGroup("amqp://h/")
			require.NoError(t, err)
			_, err = g.HandleBatch("", handler)
			return err
		}(), []string{"HandleBatch: the queue name is empty"}},
		"Handle":                  {group(false, nil, batch), []string{"WithBatch: has no effect on Handle", "HandleBatch"}},
		"middleware of the group": {group(true, rig.Options(steadymq.WithMiddleware(policy))), []string{"WithMiddleware"}},
		"prefetch of the group":   {group(true, rig.Options(steadymq.WithPrefetch(50))), []string{"WithPrefetch", "(100)"}},
	} {
		var refused *steadymq.OptionError
		require.ErrorAs(t, v.err, &refused, name)
		for _, text := range v.want {
			require.ErrorContains(t, v.err, text, name)
		}
	}
	assert.NoError(t, group(false, rig.Options(batch)), "of the group, for the others")
	assert.NoError(t, group(true, rig.Options(batch, steadymq.WithPrefetch(10))))
	assert.NoError(t, made(steadymq.WithMiddleware(policy)))
}

func TestRunBatchIsRefusedAsRunIs(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, nil)
		assert.ErrorIs(r, r.Consumer.RunBatch(r.Context(), c.handle), steadymq.ErrRunning)
		require.NoError(r, r.Stop())
		var none context.Context
		assert.ErrorContains(r, r.Consumer.RunBatch(none, c.handle), "RunBatch: the context must not be nil")
		r.Start(rig.Ack) // the same consumer may take one at a time in its next Run
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		assert.EqualValues(r, 1, c.outcomes().Acked)
		require.NoError(r, r.Stop())
	})
}

func TestBatchErrorTellsWhatFailed(t *testing.T) {
	err := &steadymq.BatchError{Errs: []error{nil, errAway, nil, amqp.ErrClosed}}
	require.EqualError(t, err, "steadymq: 2 of 4 messages failed, the first with: "+errAway.Error())
	require.ErrorIs(t, err, amqp.ErrClosed)
	assert.Equal(t, []error{errAway, amqp.ErrClosed}, err.Unwrap())
	require.EqualError(t, steadymq.BatchError{Errs: make([]error, 3)}, "steadymq: none of 3 messages failed")
}

func TestDoneBatchIsNotKeptInMemory(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		acked := 0
		r.Consumer = r.New()
		startBatch(r, func(_ context.Context, batch []*steadymq.Delivery) error {
			acked += len(batch)
			return nil
		})
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		before := heap()
		r.Broker.Publish(rig.Queue, strings.Repeat("x", 16*mebi))
		r.Wait(time.Minute)
		require.Equal(r, 2, acked)
		assert.Less(r, heap()-before, 4*mebi, "bytes kept of a message that was acked")
	}, steadymqtest.WithoutLedger())
}

// A stop at every moment of a batch's life: whatever was started is acked, whatever was not is back.
func TestStopAtEveryMomentOfABatch(t *testing.T) {
	for at := time.Duration(0); at <= 40*time.Millisecond; at += 500 * time.Microsecond {
		rig.Bubble(t, func(r *rig.Rig) {
			c := inBatches(r, func(context.Context, []*steadymq.Delivery) error {
				time.Sleep(7 * time.Millisecond)
				return nil
			}, steadymq.WithBatch(4, 10*time.Millisecond), steadymq.WithConcurrency(2))
			for i := range 10 {
				if i == 6 {
					r.Broker.PublishMessage(rig.Queue, deadLettered("again"))
				}
				r.Broker.Publish(rig.Queue, fmt.Sprint(i))
			}
			time.Sleep(at)
			require.NoError(r, r.Stop(), "at %v", at)
			handled := len(strings.Fields(strings.Join(c.bodies(), " ")))
			assert.Equal(r, handled, r.Broker.Ledger().Count(rig.Queue, steadymqtest.Acked), "at %v", at)
			assert.Equal(r, 11-handled, r.Broker.QueueLen(rig.Queue), "at %v", at)
			assert.Zero(r, r.Broker.Unsettled(rig.Queue))
			assert.EqualValues(r, handled, c.outcomes().Delivered)
		})
	}
}

// However the messages come: what does not fill waits as long as it may from its first message on,
// and no longer.
func TestRandomTricklesKeepTheWait(t *testing.T) {
	for seed := range uint64(40) {
		dice := rand.New(rand.NewPCG(seed, 17))
		size, wait := 1+dice.IntN(20), time.Duration(50+dice.IntN(500))*time.Millisecond
		rig.Bubble(t, func(r *rig.Rig) {
			c := inBatches(r, nil, steadymq.WithBatch(size, wait), steadymq.WithConcurrency(1+dice.IntN(4)))
			var published []time.Time
			for range 120 {
				published = append(published, time.Now())
				r.Broker.Publish(rig.Queue, "x")
				time.Sleep(time.Duration(dice.IntN(60)) * time.Millisecond)
			}
			r.Wait(time.Second)
			handled := 0
			for _, b := range c.seen() {
				waited := b.at.Sub(published[handled])
				handled += len(b.bodies)
				assert.LessOrEqual(r, waited, wait+wait/10, "seed %d", seed)
				if len(b.bodies) < size {
					assert.GreaterOrEqual(r, waited, wait, "seed %d", seed)
				}
			}
			assert.Equal(r, 120, handled)
		})
	}
}

// A random trial: whatever happens, no batch holds two sessions or more than its size, none waits
// longer than it may, no message is lost, and the counters come out even.
func TestBatchesUnderRandomFaults(t *testing.T) {
	for seed := range uint64(25) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { batchTrial(t, rand.New(rand.NewPCG(seed, 16))) })
	}
}

func batchTrial(t *testing.T, dice *rand.Rand) {
	size, workers := 1+dice.IntN(12), 1+dice.IntN(3)
	wait := time.Duration(1+dice.IntN(200)) * time.Millisecond
	kind := rig.QueueTypes[dice.IntN(len(rig.QueueTypes))]
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue(kind)
		options := append(rig.OfType(kind), steadymq.WithBatch(size, wait), steadymq.WithConcurrency(workers),
			steadymq.WithRequeueDelay(10*time.Millisecond, time.Second), steadymq.WithBackoff(time.Millisecond, 50*time.Millisecond))
		if kind != "stream" && dice.IntN(3) == 0 {
			options = append(options, steadymq.WithRetry(steadymq.Retry{Attempts: 50, Delays: []time.Duration{100 * time.Millisecond}, Park: "parked"}))
		}
		var mu sync.Mutex // of dice
		draw := func(n int) int {
			mu.Lock()
			defer mu.Unlock()
			return dice.IntN(n)
		}
		c := inBatches(r, func(ctx context.Context, batch []*steadymq.Delivery) error { return fickleBatch(ctx, batch, draw) }, options...)
		const messages = 150
		for i := range messages {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
			time.Sleep(time.Duration(draw(20)) * time.Millisecond)
			if draw(25) == 0 {
				disturb(r, draw)
			}
		}
		r.Wait(2 * time.Minute)
		require.NoError(r, r.Stop())
		c.judge(size)
		handled := make(map[string]bool)
		for _, b := range c.seen() {
			for _, body := range b.bodies {
				handled[body] = true
			}
		}
		assert.Len(r, handled, messages, "every message had its handler")
		if kind != "stream" {
			assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue), "none is left")
		}
		s := c.outcomes()
		assert.Equal(r, s.Delivered, s.Acked+s.Requeued+s.Discarded+s.Parked+s.Delayed+s.Stale)
		assert.Zero(r, s.Handling+s.Held)
	})
}

// fickleBatch is a handler of batches that does anything that handlers do.
func fickleBatch(ctx context.Context, batch []*steadymq.Delivery, draw func(int) int) error {
	select {
	case <-time.After(time.Duration(draw(50)) * time.Millisecond):
	case <-ctx.Done():
		return ctx.Err()
	}
	errs := make([]error, len(batch))
	for i := range errs {
		switch draw(10) {
		case 0:
			errs[i] = errAway
		case 1:
			errs[i] = steadymq.Requeue(nil)
		case 2:
			_ = batch[i].Ack()
		}
	}
	switch draw(12) {
	case 0:
		return errAway
	case 1:
		panic("boom")
	case 2:
		runtime.Goexit()
	case 3:
		errs = errs[:draw(len(errs)+1)]
	}
	return &steadymq.BatchError{Errs: errs}
}

func disturb(r *rig.Rig, draw func(int) int) {
	switch draw(5) {
	case 0:
		r.Broker.Reset()
	case 1:
		r.Broker.CancelConsumers(rig.Queue)
	case 2:
		r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 7")
	case 3:
		r.Broker.CloseConnections(320, "bye")
	case 4:
		r.Broker.FIN()
	}
}

// judge judges each batch alone.
func (c *collected) judge(size int) {
	for _, b := range c.seen() {
		assert.LessOrEqual(c, len(b.bodies), size)
		assert.NotEmpty(c, b.bodies)
		for i, session := range b.sessions {
			assert.Equal(c, b.sessions[0], session, "one session")
			assert.True(c, b.attempts[i] == 1 || len(b.bodies) == 1, "what failed before comes alone")
		}
	}
}

func TestPauseHoldsABatchThatIsBeingCollected(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, nil, steadymq.WithBatch(3, time.Second))
		r.Broker.Publish(rig.Queue, "1", "2")
		r.Wait(500 * time.Millisecond)
		c.Consumer.Pause()
		r.Wait(10 * time.Second)
		assert.Empty(r, c.bodies(), "it has not started")
		c.Consumer.Resume()
		r.Wait(2 * time.Second)
		assert.Equal(r, []string{"1 2"}, c.bodies())
		c.Consumer.Pause()
		r.Broker.Publish(rig.Queue, "3", "4", "5")
		r.Wait(5 * time.Second)
		require.NoError(r, r.Stop())
		assert.Len(r, c.seen(), 1, "a stop starts nothing during a pause")
		assert.Equal(r, 3, r.Broker.QueueLen(rig.Queue))
	})
}

func TestTryOfABreakerIsABatchOfOne(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		down := true
		c := inBatches(r, func(context.Context, []*steadymq.Delivery) error {
			if down {
				return steadymq.Discard(errors.New("down"))
			}
			return nil
		}, steadymq.WithBatch(3, 10*time.Millisecond), steadymq.WithBreaker(steadymq.Breaker{
			Failures: 1, Wait: 10 * time.Second, Counts: func(error) bool { return true },
		}))
		r.Broker.Publish(rig.Queue, "1", "2", "3")
		r.Wait(time.Second)
		require.True(r, c.outcomes().BreakerOpen)
		require.Len(r, c.seen(), 1, "one failure of a batch is one failure")
		down = false
		r.Broker.Publish(rig.Queue, "4", "5", "6", "7")
		r.Wait(20 * time.Second)
		assert.False(r, c.outcomes().BreakerOpen)
		assert.Len(r, c.seen()[1].bodies, 1, "the try")
		assert.EqualValues(r, 4, c.outcomes().Acked)
	})
}

func TestRateCountsBatches(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, nil, steadymq.WithBatch(10, 100*time.Millisecond), steadymq.WithRate(1, time.Second))
		r.PublishMany(100, "x")
		r.Wait(12 * time.Second)
		assert.Len(r, c.seen(), 10)
		assert.EqualValues(r, 100, c.outcomes().Acked)
	})
}

func TestLaterOfABatchIsNoFailure(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var kept []*steadymq.Delivery
		then := func(_ context.Context, batch []*steadymq.Delivery) error {
			kept = append(kept, batch...)
			if string(batch[0].Body) == "all" {
				return fmt.Errorf("kept: %w", steadymq.Later)
			}
			return steadymq.BatchError{Errs: []error{steadymq.Later, nil}}
		}
		c := inBatches(r, then, steadymq.WithBatch(2, time.Second), steadymq.WithHooks(steadymq.Hooks{
			HandlerFailed: func(*steadymq.Delivery, error) { assert.Fail(r, "it is no failure") },
		}))
		r.Broker.Publish(rig.Queue, "all", "of", "each", "one")
		r.Wait(time.Minute)
		n := c.outcomes()
		assert.Zero(r, n.Failed)
		assert.Equal(r, 3, n.Later)
		assert.NotContains(r, r.Log.String(), "WARN")
		require.Len(r, kept, 4)
		for _, d := range kept[:3] {
			require.NoError(r, d.Ack())
		}
		assert.NoError(r, r.Stop())
	})
}

// A batch that is collected for long does not keep the others of a paused consumer.
func TestPauseGivesBackABatchThatIsCollectedForLong(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := inBatches(r, nil, steadymq.WithBatch(3, 10*time.Minute))
		r.Broker.Publish(rig.Queue, "1", "2")
		r.Wait(time.Second)
		c.Consumer.Pause()
		r.Wait(2 * time.Minute)
		assert.Equal(r, 2, r.Broker.QueueLen(rig.Queue))
		assert.NoError(r, r.Stop())
	})
}

func TestMessagesOfABatchThatAreKeptForLaterHaveNotFailed(t *testing.T) {
	for name, err := range map[string]error{
		"all":  steadymq.Later,
		"each": &steadymq.BatchError{Errs: []error{steadymq.Later, steadymq.Later}},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var batch []*steadymq.Delivery
				c := inBatches(r, func(_ context.Context, b []*steadymq.Delivery) error {
					batch = b
					return err
				}, steadymq.WithBatch(2, time.Second), steadymq.WithHooks(steadymq.Hooks{
					HandlerFailed: func(*steadymq.Delivery, error) { assert.Fail(r, "it is no failure") },
				}))
				r.Broker.Publish(rig.Queue, "0", "1")
				r.Wait(time.Minute)
				require.Len(r, batch, 2)
				assert.Equal(r, 2, c.outcomes().Later)
				assert.Zero(r, c.outcomes().Failed)
				for _, d := range batch {
					assert.NoError(r, d.Ack())
				}
				assert.EqualValues(r, 2, c.outcomes().Acked)
			})
		})
	}
}
