package behaviour_test

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
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
