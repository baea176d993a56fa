package steadymq_test

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
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
			bubble(t, func(b *bench) {
				b.run(ack, steadymq.WithLogger(slog.New(handler)))
				b.wait(time.Second)
				require.Len(b, b.result, 1, "Run has returned")
				err := <-b.result
				b.result = nil
				var refused *steadymq.OptionError
				require.ErrorAs(b, err, &refused)
				assert.Equal(b, "WithLogger", refused.Option)
				assert.ErrorAs(b, err, new(*steadymq.PanicError))
				assert.ErrorContains(b, err, "WithLogger: the log handler panicked, mend it and make a new Consumer: ")
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
	bubble(t, func(b *bench) {
		b.consuming(func(context.Context, *steadymq.Delivery) error { return errAway }, steadymq.WithLogger(slog.New(leveled{slog.DiscardHandler})))
		b.broker.Publish(queue, "tea")
		b.wait(time.Second)
		var refused *steadymq.OptionError
		require.ErrorAs(b, b.stop(), &refused)
		assert.Equal(b, "WithLogger", refused.Option)
	})
}

func TestNoHookIsCalledAfterOneHasPanicked(t *testing.T) {
	bubble(t, func(b *bench) {
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		var calls atomic.Int32
		fault := func() { calls.Add(1); panic("user") }
		b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			_ = hold(started, release)(ctx, d)
			return errAway
		}, steadymq.WithConcurrency(3), steadymq.WithHooks(steadymq.Hooks{
			HandlerFailed: func(*steadymq.Delivery, error) { fault() },
			Settled:       func(*steadymq.Delivery, steadymq.Outcome) { fault() },
		}))
		b.publish(3, "tea")
		for range 3 {
			<-started
		}
		for range 3 {
			release <- struct{}{}
			b.wait(100 * time.Millisecond)
		}
		assert.Error(b, b.stop())
		assert.EqualValues(b, 1, calls.Load())
	})
}
