package behaviour_test

import (
	"context"
	"log/slog"
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

// panicking is a log handler with a fault.
type panicking struct {
	slog.Handler
	enabled, handle func()
}

func (p panicking) Enabled(context.Context, slog.Level) bool  { p.enabled(); return true }
func (p panicking) Handle(context.Context, slog.Record) error { p.handle(); return nil }

func TestLogHandlerThatPanicsEndsRunAndIsNamed(t *testing.T) {
	nothing, fault := func() {}, func() { panic("user") }
	for name, handler := range map[string]panicking{
		"Enabled": {slog.DiscardHandler, fault, nothing},
		"Handle":  {slog.DiscardHandler, nothing, fault},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Run(rig.Ack, steadymq.WithLogger(slog.New(handler)))
				r.Wait(time.Second)
				require.Len(r, r.Result, 1, "Run has returned")
				err := <-r.Result
				r.Result = nil
				var refused *steadymq.OptionError
				require.ErrorAs(r, err, &refused)
				assert.Equal(r, "WithLogger", refused.Option)
				assert.ErrorAs(r, err, new(*steadymq.PanicError))
				assert.ErrorContains(r, err, "WithLogger: the log handler panicked, mend it and make a new Consumer: ")
			})
		})
	}
}

// leveled panics when it is asked whether a warning is wanted.
type leveled struct{ slog.Handler }

func (leveled) Enabled(_ context.Context, l slog.Level) bool {
	if l >= slog.LevelWarn {
		panic("user")
	}
	return false
}

// The line is made by the worker, where a panic would end the process.
func TestLogHandlerThatPanicsForAFailedHandlerEndsRun(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return errAway }, steadymq.WithLogger(slog.New(leveled{slog.DiscardHandler})))
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		var refused *steadymq.OptionError
		require.ErrorAs(r, r.Stop(), &refused)
		assert.Equal(r, "WithLogger", refused.Option)
	})
}

func TestNoHookIsCalledAfterOneHasPanicked(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		var calls atomic.Int32
		fault := func() { calls.Add(1); panic("user") }
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			_ = rig.Hold(started, release)(ctx, d)
			return errAway
		}, steadymq.WithConcurrency(3), steadymq.WithHooks(steadymq.Hooks{
			HandlerFailed: func(*steadymq.Delivery, error) { fault() },
			Settled:       func(*steadymq.Delivery, steadymq.Outcome) { fault() },
		}))
		r.PublishMany(3, "tea")
		for range 3 {
			<-started
		}
		for range 3 {
			release <- struct{}{}
			r.Wait(100 * time.Millisecond)
		}
		assert.Error(r, r.Stop())
		assert.EqualValues(r, 1, calls.Load())
	})
}

func TestConsumerWhoseHookPanickedSaysWhatToDo(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) { panic("boom") }}))
		r.Wait(time.Second)
		for range 2 {
			err := r.Stop()
			assert.ErrorContains(r, err, "WithHooks: a hook panicked, mend it and make a new Consumer")
			assert.ErrorContains(r, err, "boom")
			r.Start(rig.Ack)
			r.Wait(time.Second)
		}
		assert.Equal(r, rig.Queue, r.Consumer.Queue())
	})
}

// A hook is a function of the user: whatever it does, Run ends in order and leaves no message
// between the chairs.
func TestSettledThatPanicsOrExitsEndsRunInOrder(t *testing.T) {
	for name, misbehave := range map[string]func(){"panic": func() { panic("boom") }, "Goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if string(d.Body) == "held" {
						return steadymq.RequeueAfter(nil, time.Hour)
					}
					return nil
				}, steadymq.WithHooks(steadymq.Hooks{Settled: func(*steadymq.Delivery, steadymq.Outcome) { misbehave() }}))
				r.Broker.Publish(rig.Queue, "held", "tea")
				r.Wait(10 * time.Second)
				require.Equal(r, steadymq.Stopped, r.Consumer.State())
				err := r.Stop()
				var panicked *steadymq.PanicError
				require.ErrorAs(r, err, &panicked)
				assert.NotErrorIs(r, err, steadymq.ErrDrainTimeout)
				assert.Zero(r, r.Broker.Unsettled(rig.Queue))
				assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue), "the held one is back")
			})
		})
	}
}

func TestStateChangedThatExitsEndsRunInOrder(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			if c.To == steadymq.Consuming {
				runtime.Goexit()
			}
		}}))
		r.Wait(10 * time.Second)
		require.Equal(r, steadymq.Stopped, r.Consumer.State())
		var refused *steadymq.OptionError
		require.ErrorAs(r, r.Stop(), &refused)
		assert.Equal(r, "WithHooks", refused.Option)
		assert.Contains(r, r.Log.Last(), "stopped", "the log goes on")
	})
}

func TestHookThatPanicsEndsRunAndEveryLaterOne(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			if c.To == steadymq.Consuming {
				panic("bad hook")
			}
		}}))
		r.Broker.Publish(rig.Queue, "kept")
		r.Wait(time.Second)
		require.Len(r, r.Result, 1)
		check := func(err error) {
			var refused *steadymq.OptionError
			require.ErrorAs(r, err, &refused)
			assert.Equal(r, "WithHooks", refused.Option)
			var p *steadymq.PanicError
			require.ErrorAs(r, err, &p)
			assert.Equal(r, "bad hook", p.Value)
		}
		check(r.Stop())
		dials := len(r.Broker.Ledger().Dials)
		check(r.Consumer.Run(r.Context(), rig.Ack))
		assert.Len(r, r.Broker.Ledger().Dials, dials)
		ledger := r.Broker.Ledger()
		assert.Equal(r, 1, ledger.Count(rig.Queue, steadymqtest.Acked)+ledger.Count(rig.Queue, steadymqtest.Ready), "nothing lost")
	})
}

func TestSlowHookDelaysNoRecoveryAndNoStop(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		block := make(chan struct{})
		r.Consuming(rig.Ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) { <-block }}))
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		since := time.Now()
		require.NoError(r, r.Stop())
		assert.LessOrEqual(r, time.Since(since), time.Second)
		close(block)
	})
}
