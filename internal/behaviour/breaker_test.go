package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// dependency is what handlers need; down says whether they fail.
type dependency struct {
	diary
	down    atomic.Bool
	inside  atomic.Int64
	takes   time.Duration
	most    atomic.Int64
	failure error
}

var errDown = errors.New("the shop is down")

func (d *dependency) handle(_ context.Context, m *steadymq.Delivery) error {
	d.note(m)
	d.most.Store(max(d.most.Load(), d.inside.Add(1)))
	defer d.inside.Add(-1)
	time.Sleep(d.takes)
	if !d.down.Load() {
		return nil
	}
	if d.failure != nil {
		return d.failure
	}
	return errDown
}

func newDependency(down bool) *dependency {
	d := new(dependency)
	d.down.Store(down)
	return d
}

func breaker(failures int, wait time.Duration) steadymq.Option {
	return steadymq.WithBreaker(steadymq.Breaker{Failures: failures, Wait: wait})
}

func TestBreakerOpensLetsOneThroughAndCloses(t *testing.T) {
	for _, kind := range rig.QueueTypes {
		t.Run(kind, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue(kind)
				shop := newDependency(false)
				r.Consuming(shop.handle, append(rig.OfType(kind), breaker(3, 10*time.Second))...)
				r.PublishMany(5, "fine")
				r.Wait(time.Second)
				shop.down.Store(true)
				r.PublishMany(20, "tea")
				r.Wait(time.Second)
				assert.Equal(r, 5+3, shop.started())
				assert.Equal(r, steadymq.Paused, r.Consumer.State())
				var open *steadymq.BreakerError
				require.ErrorAs(r, r.LastChange().Cause, &open)
				assert.Equal(r, 3, open.Failures)
				require.ErrorIs(r, open, errDown)
				assert.Contains(r, open.Error(), "steadymq: breaker open for ")
				n := r.Consumer.Stats()
				assert.True(r, n.BreakerOpen)
				assert.EqualValues(r, 1, n.BreakerOpened)
				r.Wait(4 * time.Minute)
				tries := shop.times()[8:]
				assert.GreaterOrEqual(r, len(tries), 4)
				assert.LessOrEqual(r, len(tries), 9)
				for i := 1; i < len(tries); i++ {
					assert.LessOrEqual(r, tries[i].Sub(tries[i-1]), time.Minute)
					assert.GreaterOrEqual(r, tries[i].Sub(tries[i-1]), 10*time.Second)
				}
				assert.Zero(r, r.Broker.Ledger().Redelivered(rig.Queue)-int(r.Consumer.Stats().Requeued)*map[bool]int{false: 1}[kind == "stream"], "nothing but what has failed")
				shop.down.Store(false)
				r.Wait(2 * time.Minute)
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
				assert.EqualValues(r, 25, r.Consumer.Stats().Acked)
				n = r.Consumer.Stats()
				assert.False(r, n.BreakerOpen)
				assert.EqualValues(r, 1, n.BreakerOpened)
				assert.EqualValues(r, 1, n.Sessions)
				want := []steadymq.State{steadymq.Connecting, steadymq.Consuming, steadymq.Paused, steadymq.Consuming}
				assert.Equal(r, want, states(r), "each told once")
				assert.Len(r, r.Log.Lines("steadymq: paused", "the shop is down", "level=WARN"), 1)
				assert.Len(r, r.Log.Lines("steadymq: consuming"), 2)
			})
		})
	}
}

func TestBreakerLetsExactlyOneThroughWhateverHappens(t *testing.T) {
	faults := map[string]func(r *rig.Rig){
		"nothing":     func(*rig.Rig) {},
		"reset":       func(r *rig.Rig) { r.Broker.Reset() },
		"cancel":      func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) },
		"channels":    func(r *rig.Rig) { r.Broker.CloseChannels(406, "timed out") },
		"pause":       func(r *rig.Rig) { r.Consumer.Pause(); r.Wait(100 * time.Millisecond); r.Consumer.Resume() },
		"second run":  func(r *rig.Rig) { _ = r.Stop() },
		"long resets": func(r *rig.Rig) { r.Broker.Reset(); r.Broker.Refuse(true); r.Wait(20 * time.Second); r.Broker.Heal() },
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				shop := newDependency(true)
				shop.takes = 3 * time.Second
				r.PublishMany(200, "tea")
				r.Consuming(shop.handle, breaker(8, 5*time.Second), steadymq.WithConcurrency(8))
				r.Wait(4 * time.Second)
				require.Equal(r, steadymq.Paused, r.Consumer.State())
				r.Wait(3 * time.Second) // for those that began before it opened
				before := shop.started()
				shop.most.Store(0)
				for i := range 30 {
					r.Wait(4*time.Second + time.Duration(i)*100*time.Millisecond)
					fault(r)
					if r.Result == nil {
						r.Start(shop.handle)
					}
				}
				assert.EqualValues(r, 1, shop.most.Load(), "one at a time, also of two sessions")
				assert.Greater(r, shop.started(), before+1)
				assert.Less(r, shop.started(), before+30)
				shop.down.Store(false)
				r.Wait(30 * time.Minute)
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
				assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
			})
		})
	}
}

// What is prefetched waits for hours, and the broker never takes it back for that.
func TestOpenBreakerKeepsTheConsumerTimeout(t *testing.T) {
	for _, wait := range []time.Duration{time.Second, time.Minute, 10 * time.Minute, 3 * time.Hour} {
		for _, form := range []steadymqtest.TimeoutForm{steadymqtest.Form406, steadymqtest.FormOfVersion} {
			t.Run(fmt.Sprint(wait, form), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.RemakeQueue("quorum")
					shop := newDependency(true)
					r.PublishMany(100, "tea")
					r.Run(shop.handle, breaker(5, wait), steadymq.WithConcurrency(4), steadymq.WithStallDetector(time.Minute))
					r.Wait(5 * time.Hour)
					assert.Empty(r, r.Causes())
					assert.Equal(r, steadymq.Paused, r.Consumer.State())
					assert.Empty(r, r.Warnings("handlers are so slow"))
					shop.down.Store(false)
					r.Wait(max(wait+time.Minute, 20*time.Minute))
					assert.EqualValues(r, 100, r.Consumer.Stats().Acked)
					if wait <= time.Minute {
						assert.LessOrEqual(r, r.Consumer.Stats().Sessions, uint64(22), "V8: no more than 4 in an hour")
					}
				}, steadymqtest.WithConsumerTimeout(30*time.Minute, form))
			})
		}
	}
}

func TestBreakerOfALongWaitGivesBackLikeAPause(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		shop := newDependency(true)
		r.PublishMany(50, "tea")
		r.Run(shop.handle, breaker(1, time.Hour))
		r.Wait(50 * time.Second)
		assert.Equal(r, 1, consumers(r, rig.Queue))
		r.Wait(20 * time.Second)
		assert.Zero(r, consumers(r, rig.Queue))
		assert.Equal(r, steadymq.Paused, r.Consumer.State())
		r.Wait(time.Hour)
		assert.Equal(r, 2, shop.started(), "one is tried")
		shop.down.Store(false)
		r.Wait(time.Hour)
		assert.EqualValues(r, 50, r.Consumer.Stats().Acked)
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
	})
}

func TestWhatCountsAsAFailure(t *testing.T) {
	decoded := steadymq.Decode(func([]byte, any) error { return errDown }, func(context.Context, *steadymq.Delivery, int) error { return nil })
	returns := func(err error) steadymq.Handler {
		return func(context.Context, *steadymq.Delivery) error { return err }
	}
	for name, row := range map[string]struct {
		h     steadymq.Handler
		opens bool
	}{
		"nil":           {rig.Ack, false},
		"error":         {returns(errDown), true},
		"discard":       {returns(steadymq.Discard(errDown)), false},
		"park":          {returns(steadymq.Park(errDown)), false},
		"decode":        {decoded, false},
		"requeue":       {returns(steadymq.Requeue(errDown)), true},
		"requeue after": {returns(steadymq.RequeueAfter(errDown, time.Second)), true},
		"panic":         {func(context.Context, *steadymq.Delivery) error { panic("boom") }, true},
		"exit":          {func(context.Context, *steadymq.Delivery) error { runtime.Goexit(); return nil }, true},
		"settled":       {func(_ context.Context, d *steadymq.Delivery) error { _ = d.Discard(); return errDown }, true},
		"refused": {func(_ context.Context, d *steadymq.Delivery) error {
			_ = d.Delivery.Ack(true)
			return nil
		}, true},
		"timeout": {func(ctx context.Context, _ *steadymq.Delivery) error { <-ctx.Done(); return context.Cause(ctx) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.PublishMany(10, "tea")
				r.Run(row.h, breaker(2, time.Hour), steadymq.WithHandlerTimeout(time.Second))
				r.Wait(5 * time.Second)
				assert.Equal(r, row.opens, r.Consumer.Stats().BreakerOpen)
				if row.opens {
					assert.EqualValues(r, 2, r.Consumer.Stats().Delivered)
				}
			})
		})
	}
}

func TestFailuresOfLostSessionsAndOnesWithSuccessesBetweenDoNotOpen(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var n atomic.Int64
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			switch string(d.Body) {
			case "slow":
				if d.Redelivered {
					return steadymq.Discard(errDown)
				}
				<-ctx.Done()
				return ctx.Err()
			case "odd":
				return steadymq.Discard(errDown) // says nothing
			}
			if n.Add(1)%3 == 0 {
				return nil
			}
			return steadymq.Discard(fmt.Errorf("it counts: %w", errDown))
		}, steadymq.WithConcurrency(4), steadymq.WithBreaker(steadymq.Breaker{Failures: 3, Wait: time.Hour, Counts: func(err error) bool {
			return err.Error() != errDown.Error()
		}}))
		for range 20 {
			for _, body := range []string{"tea", "odd", "tea", "odd", "tea"} { // one after the other
				r.Broker.Publish(rig.Queue, body)
				r.Wait(100 * time.Millisecond)
			}
		}
		for range 5 {
			r.Broker.Publish(rig.Queue, "slow", "slow", "slow", "slow")
			r.Wait(time.Second)
			r.Broker.Reset()
			r.Wait(time.Second)
		}
		assert.Zero(r, r.Consumer.Stats().BreakerOpened)
		n.Store(2)
		r.Broker.Publish(rig.Queue, "tea") // succeeds, so the row begins anew
		r.Wait(time.Second)
		n.Store(0)
		r.Broker.Publish(rig.Queue, "tea", "odd", "tea")
		r.Wait(time.Second)
		n.Store(0)
		r.Broker.Publish(rig.Queue, "tea", "odd")
		r.Wait(time.Second)
		assert.EqualValues(r, 1, r.Consumer.Stats().BreakerOpened, "what says nothing does not end the row")
	})
}

func TestCountsThatPanicsExitsOrHangsCountsTrue(t *testing.T) {
	for name, counts := range map[string]func(error) bool{
		"panics": func(error) bool { panic("boom") },
		"exits":  func(error) bool { runtime.Goexit(); return false },
		"hangs":  func(error) bool { time.Sleep(time.Hour); return false },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.PublishMany(10, "tea")
				r.Run(newDependency(true).handle, steadymq.WithBreaker(steadymq.Breaker{Failures: 3, Wait: 30 * time.Minute, Counts: counts}))
				r.Wait(2 * time.Minute)
				assert.Equal(r, steadymq.Paused, r.Consumer.State())
				assert.EqualValues(r, 3, r.Consumer.Stats().Delivered)
				assert.Len(r, r.Warnings("the function of WithBreaker"), 1)
				if name == "hangs" {
					assert.EqualValues(r, 3, r.Consumer.Stats().Abandoned)
				}
				require.NoError(r, r.Stop())
				r.Wait(2 * time.Hour)
			})
		})
	}
}

func TestPauseComesBeforeTheBreaker(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		shop := newDependency(true)
		r.PublishMany(50, "tea")
		r.Run(shop.handle, breaker(2, 10*time.Second))
		r.Wait(time.Second)
		require.True(r, r.Consumer.Stats().BreakerOpen)
		r.Consumer.Pause()
		r.Wait(3 * time.Minute)
		assert.Equal(r, 2, shop.started())
		assert.NoError(r, r.LastChange().Cause)
		assert.Zero(r, consumers(r, rig.Queue))
		r.Consumer.Resume()
		r.Wait(time.Second)
		assert.Equal(r, 3, shop.started(), "one is tried, and the breaker is as it was")
		assert.Equal(r, steadymq.Paused, r.Consumer.State())
		require.ErrorIs(r, r.LastChange().Cause, errDown)
		shop.down.Store(false)
		r.Wait(2 * time.Minute)
		assert.EqualValues(r, 50, r.Consumer.Stats().Acked)
	})
}

func TestStopWhileABreakerIsOpenIsPrompt(t *testing.T) {
	for _, wait := range []time.Duration{10 * time.Second, time.Hour} {
		for _, after := range []time.Duration{0, time.Second, 2 * time.Minute} {
			t.Run(fmt.Sprint(wait, after), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.PublishMany(50, "tea")
					r.Run(newDependency(true).handle, breaker(2, wait), steadymq.WithConcurrency(4))
					r.Wait(100*time.Millisecond + after)
					began := time.Now()
					require.NoError(r, r.Stop())
					assert.Less(r, time.Since(began), 50*time.Millisecond)
					assert.Equal(r, 50, r.Broker.QueueLen(rig.Queue))
				})
			})
		}
	}
}

func TestBreakerWithRateAndInAGroup(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 0, breaker(3, 10*time.Second), steadymq.WithRate(5, time.Second))
		bad, good := newDependency(true), newDependency(false)
		one := p.add(bad.handle, steadymq.WithConcurrency(3))
		two := p.add(good.handle)
		p.start()
		for i := range 2 {
			for range 100 {
				r.Broker.Publish(p.name(i), "tea")
			}
		}
		r.Wait(30 * time.Second)
		assert.Equal(r, steadymq.Paused, one.State())
		assert.Equal(r, steadymq.Consuming, two.State())
		assert.Equal(r, 100, good.started())
		assert.LessOrEqual(r, bad.started(), 5+3)
		bad.down.Store(false)
		r.Wait(2 * time.Minute)
		assert.EqualValues(r, 100, one.Stats().Acked)
		assert.LessOrEqual(r, mostWithin(bad.times(), time.Second), 6)
		require.NoError(r, p.stop())
	})
}

func TestHandlersThatBeganBeforeABreakerOpenedChangeNothing(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.Publish(rig.Queue, "slow", "bad", "bad", "tea")
		r.Run(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "bad" {
				return errDown
			}
			time.Sleep(5 * time.Second)
			return nil
		}, breaker(2, time.Hour), steadymq.WithConcurrency(2))
		r.Wait(10 * time.Second)
		assert.True(r, r.Consumer.Stats().BreakerOpen)
		assert.EqualValues(r, 3, r.Consumer.Stats().Delivered)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked, "it settles as ever")
	})
}

func TestHandlerLeftBehindByARunDoesNotShutTheNextOne(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.PublishMany(5, "tea")
		var n atomic.Int64
		h := func(context.Context, *steadymq.Delivery) error {
			switch n.Add(1) {
			case 1:
				return errDown
			case 2:
				time.Sleep(time.Hour)
			}
			return nil
		}
		r.Run(h, breaker(1, time.Second), steadymq.WithDrainTimeout(time.Second))
		r.Wait(10 * time.Second)
		require.EqualValues(r, 2, n.Load())
		require.ErrorIs(r, r.Stop(), steadymq.ErrDrainTimeout)
		r.Start(h)
		r.Wait(10 * time.Second)
		assert.False(r, r.Consumer.Stats().BreakerOpen)
		assert.EqualValues(r, 5, r.Consumer.Stats().Acked)
		require.NoError(r, r.Stop())
		r.Wait(time.Hour)
	})
}

func TestLaterSaysNothingToABreaker(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var kept keptOnes
		asked := 0
		r.Consuming(kept.keep, steadymq.WithBreaker(steadymq.Breaker{Failures: 2, Wait: time.Second, Counts: func(error) bool { asked++; return true }}))
		r.PublishMany(5, "tea")
		r.Wait(time.Minute)
		assert.Zero(r, r.Consumer.Stats().BreakerOpened)
		assert.Zero(r, asked)
		for _, d := range kept.kept(r, 5) {
			require.NoError(r, d.Ack())
		}
		assert.NoError(r, r.Stop())
	})
}
