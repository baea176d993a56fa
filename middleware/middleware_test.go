package middleware_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/middleware"
)

var (
	errAway  = errors.New("away")
	errWrong = errors.New("wrong")
)

// at returns a message at its n-th try on a quorum queue.
func at(n int) *steadymq.Delivery {
	return steadymq.NewDelivery(amqp.Delivery{
		MessageId: "m-7", CorrelationId: "c-7", Body: []byte("hunter2"),
		Redelivered: n > 1, Headers: amqp.Table{"x-delivery-count": int64(n - 1), "password": "hunter2"},
	})
}

// returning is a handler that returns err.
func returning(err error) steadymq.Handler {
	return func(context.Context, *steadymq.Delivery) error { return err }
}

func panicking(context.Context, *steadymq.Delivery) error { panic("boom") }

// unreadable is an error that panics when it is read, in all its methods.
type unreadable struct{}

func (*unreadable) Error() string { panic("Error") }

func (*unreadable) Unwrap() error { panic("Unwrap") }

func (*unreadable) Is(error) bool { panic("Is") }

func (*unreadable) As(any) bool { panic("As") }

// never asks for nothing, so that what another decides can be seen.
func never(error) bool { return false }

func always(error) bool { return true }

func TestPolicyDecidesAboutPlainErrorsOnly(t *testing.T) {
	for name, c := range map[string]struct {
		policy  steadymq.Middleware
		attempt int
		plain   steadymq.Outcome // what becomes of a plain error
	}{
		"DiscardAfter, before":   {middleware.DiscardAfter(3), 2, steadymq.Requeued},
		"DiscardAfter, at":       {middleware.DiscardAfter(3), 3, steadymq.Discarded},
		"DiscardAfter, after":    {middleware.DiscardAfter(3), 4, steadymq.Discarded},
		"DiscardAfter, first":    {middleware.DiscardAfter(1), 1, steadymq.Discarded},
		"ParkAfter, before":      {middleware.ParkAfter(3), 2, steadymq.Requeued},
		"ParkAfter, at":          {middleware.ParkAfter(3), 3, steadymq.Parked},
		"ParkAfter, after":       {middleware.ParkAfter(3), 4, steadymq.Parked},
		"Permanent, this error":  {middleware.Permanent(errWrong, errAway), 1, steadymq.Parked},
		"Permanent, another":     {middleware.Permanent(errWrong), 9, steadymq.Requeued},
		"PermanentFunc, yes":     {middleware.PermanentFunc(always), 1, steadymq.Parked},
		"PermanentFunc, no":      {middleware.PermanentFunc(never), 9, steadymq.Requeued},
		"Log":                    {middleware.Log(slog.New(slog.DiscardHandler)), 9, steadymq.Requeued},
		"Correlation":            {middleware.Correlation, 9, steadymq.Requeued},
		"the inner one decides":  {chain(middleware.ParkAfter(1), middleware.DiscardAfter(1)), 1, steadymq.Discarded},
		"the outer one if alone": {chain(middleware.ParkAfter(1), middleware.DiscardAfter(5)), 1, steadymq.Parked},
	} {
		for _, f := range []struct {
			err  error
			want steadymq.Outcome
		}{
			{nil, steadymq.Acked},
			{errAway, c.plain},
			{fmt.Errorf("order 7: %w", errAway), c.plain},
			{steadymq.Discard(errAway), steadymq.Discarded},
			{steadymq.Park(errAway), steadymq.Parked},
			{steadymq.Requeue(errAway), steadymq.Requeued},
			{fmt.Errorf("order 7: %w", steadymq.RequeueAfter(errAway, time.Minute)), steadymq.Requeued},
		} {
			returned := c.policy(returning(f.err))(t.Context(), at(c.attempt))
			o, explicit := steadymq.OutcomeOf(returned)
			assert.Equal(t, f.want, o, "%s: %v", name, f.err)
			_, asked := steadymq.OutcomeOf(f.err)
			assert.Equal(t, asked || f.want != steadymq.Requeued, explicit, "%s: %v", name, f.err)
			if asked {
				assert.Equal(t, f.err, returned, "%s: as it was", name)
			}
			if f.err != nil {
				require.ErrorIs(t, returned, errAway, name)
				require.EqualError(t, returned, f.err.Error(), name)
			}
			settled, _ := steadymq.Invoke(t.Context(), c.policy(returning(f.err)), at(c.attempt))
			assert.Equal(t, f.want, settled, "%s: %v", name, f.err)
		}
	}
}

// chain applies middleware as WithMiddleware does.
func chain(all ...steadymq.Middleware) steadymq.Middleware {
	return func(next steadymq.Handler) steadymq.Handler {
		for _, m := range slices.Backward(all) {
			next = m(next)
		}
		return next
	}
}

func policies() map[string]steadymq.Middleware {
	return map[string]steadymq.Middleware{
		"DiscardAfter":  middleware.DiscardAfter(1),
		"ParkAfter":     middleware.ParkAfter(1),
		"PermanentFunc": middleware.PermanentFunc(always),
		"Permanent":     middleware.Permanent(errAway),
		"Log":           middleware.Log(slog.New(slog.NewTextHandler(io.Discard, nil))),
		"Correlation":   middleware.Correlation,
	}
}

func TestWhatTheHandlerHasSettledStays(t *testing.T) {
	for name, m := range policies() {
		o, err := steadymq.Invoke(t.Context(), m(func(_ context.Context, d *steadymq.Delivery) error {
			require.NoError(t, d.Ack())
			return errAway
		}), at(9))
		assert.Equal(t, steadymq.Acked, o, name)
		require.ErrorIs(t, err, errAway, name)
	}
}

func TestPanicCountsAsAPlainError(t *testing.T) {
	for name, want := range map[string]steadymq.Outcome{
		"DiscardAfter": steadymq.Discarded, "ParkAfter": steadymq.Parked, "PermanentFunc": steadymq.Parked,
		"Permanent": steadymq.Requeued, "Log": steadymq.Requeued, "Correlation": steadymq.Requeued,
	} {
		o, err := steadymq.Invoke(t.Context(), policies()[name](panicking), at(1))
		assert.Equal(t, want, o, name)
		var panicked *steadymq.PanicError
		require.ErrorAs(t, err, &panicked, name)
		assert.Equal(t, "boom", panicked.Value, name)
		assert.Contains(t, string(panicked.Stack), "middleware_test.panicking", name)
	}
}

func TestPanicWithAnErrorOfTheListIsPermanent(t *testing.T) {
	o, _ := steadymq.Invoke(t.Context(), middleware.Permanent(errAway)(func(context.Context, *steadymq.Delivery) error {
		panic(errAway)
	}), at(1))
	assert.Equal(t, steadymq.Parked, o)
}

func TestEndOfTheGoroutinePassesAll(t *testing.T) {
	for name, m := range policies() {
		d, passed, done := at(1), false, make(chan struct{})
		go func() {
			defer close(done)
			_ = m(func(context.Context, *steadymq.Delivery) error {
				runtime.Goexit()
				return nil
			})(t.Context(), d)
			passed = true
		}()
		<-done
		assert.False(t, passed, name)
		assert.Equal(t, steadymq.Unsettled, d.Outcome(), name)
	}
}

// An error that nobody can read is a failure, and never in the way of what gives up on it.
func TestErrorThatPanicsWhenItIsReadIsAPlainError(t *testing.T) {
	for name, want := range map[string]steadymq.Outcome{
		"DiscardAfter": steadymq.Discarded, "ParkAfter": steadymq.Parked, "PermanentFunc": steadymq.Parked,
		"Permanent": steadymq.Requeued, "Log": steadymq.Requeued, "Correlation": steadymq.Requeued,
	} {
		o, err := steadymq.Invoke(t.Context(), policies()[name](returning(new(unreadable))), at(1))
		assert.Equal(t, want, o, name)
		assert.ErrorAs(t, err, new(*steadymq.PanicError), name)
		o, _ = steadymq.Invoke(t.Context(), policies()[name](returning(steadymq.Discard(new(unreadable)))), at(1))
		assert.Equal(t, steadymq.Discarded, o, name)
	}
}

func TestErrorAfterTheEndOfTheSessionIsNoFailure(t *testing.T) {
	for name, m := range policies() {
		for _, cause := range []error{&steadymq.SessionError{Op: "lost"}, &steadymq.DrainError{Handlers: 1}} {
			ctx, end := context.WithCancelCause(t.Context())
			end(cause)
			returned := m(returning(errAway))(ctx, at(9))
			assert.Equal(t, errAway, returned, "%s: %v", name, cause)
		}
	}
	lost, end := context.WithCancelCause(t.Context())
	end(&steadymq.SessionError{Op: "lost"})
	o, _ := steadymq.OutcomeOf(middleware.DiscardAfter(1)(panicking)(lost, at(9)))
	assert.Equal(t, steadymq.Discarded, o, "a panic is a failure whenever it comes")
	late, end := context.WithCancelCause(t.Context())
	end(steadymq.ErrHandlerTimeout)
	o, _ = steadymq.OutcomeOf(middleware.DiscardAfter(1)(returning(errAway))(late, at(9)))
	assert.Equal(t, steadymq.Discarded, o, "a handler that was too slow has failed")
}

func TestFunctionThatPanicsDoesNotChangeTheOutcome(t *testing.T) {
	for name, c := range map[string]struct {
		m    steadymq.Middleware
		err  error
		want steadymq.Outcome
		told string
	}{
		"PermanentFunc": {middleware.PermanentFunc(func(error) bool { panic("oops") }), errAway, steadymq.Requeued, "the function given to middleware.PermanentFunc: steadymq: panic: oops"},
		"Permanent":     {middleware.Permanent(new(unreadable), errWrong), &asking{}, steadymq.Requeued, "middleware.Permanent"},
		"Log, plain":    {middleware.Log(slog.New(panickingLog{})), errAway, steadymq.Requeued, "the logger given to middleware.Log: steadymq: panic: oops"},
		"Log, discard":  {middleware.Log(slog.New(panickingLog{})), steadymq.Discard(errAway), steadymq.Discarded, "the logger given to middleware.Log: steadymq: panic: oops"},
	} {
		o, err := steadymq.Invoke(t.Context(), c.m(returning(c.err)), at(1))
		assert.Equal(t, c.want, o, name)
		require.ErrorIs(t, err, c.err, name)
		require.ErrorContains(t, err, c.told, name)
		require.ErrorAs(t, err, new(*steadymq.PanicError), name)
	}
	o, err := steadymq.Invoke(t.Context(), middleware.Log(slog.New(panickingLog{}))(returning(nil)), at(1))
	assert.Equal(t, steadymq.Acked, o)
	assert.NoError(t, err)
}

// asking is an error that asks the other one, as some do, but only where it is one of ours.
type asking struct{}

func (*asking) Error() string { return "asking" }

func (*asking) Is(target error) bool {
	if other, ok := target.(*unreadable); ok {
		return other.Is(nil)
	}
	return false
}

// panickingLog is a handler of slog that panics.
type panickingLog struct{ slog.Handler }

func (panickingLog) Enabled(context.Context, slog.Level) bool { return true }

func (panickingLog) Handle(context.Context, slog.Record) error { panic("oops") }

func TestWrongArgumentsAreRefusedWithAnOptionError(t *testing.T) {
	for want, m := range map[string]steadymq.Middleware{
		"steadymq: middleware.DiscardAfter: n must be at least 1, got 0":                             middleware.DiscardAfter(0),
		"steadymq: middleware.ParkAfter: n must be at least 1, got -1":                               middleware.ParkAfter(-1),
		"steadymq: middleware.Permanent: no errors are given: no message would be parked":            middleware.Permanent(),
		"steadymq: middleware.Permanent: error 2 of 2 is nil, which is no failure":                   middleware.Permanent(errAway, nil),
		"steadymq: middleware.PermanentFunc: the function must not be nil":                           middleware.PermanentFunc(nil),
		"steadymq: middleware.Log: the logger must not be nil; leave the middleware out for silence": middleware.Log(nil),
	} {
		require.NotNil(t, m, want)
		var refused *steadymq.OptionError
		func() {
			defer func() { refused, _ = recover().(*steadymq.OptionError) }()
			m(returning(nil))
		}()
		require.NotNil(t, refused, want)
		require.EqualError(t, refused, want)
	}
	assert.Panics(t, func() { middleware.LogHandler(nil) })
}

func TestPermanentKeepsTheListThatItWasGiven(t *testing.T) {
	list := []error{errAway}
	m := middleware.Permanent(list...)
	list[0] = errWrong
	o, _ := steadymq.Invoke(t.Context(), m(returning(errAway)), at(1))
	assert.Equal(t, steadymq.Parked, o)
}

// withoutTime is a logger into text without times.
func withoutTime(into io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(into, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == "stack" {
			return slog.Attr{}
		}
		return a
	}}))
}

func TestLogWritesOneLineForEachFailure(t *testing.T) {
	const ids = ` queue="" message_id=m-7 attempt=2 took=3s outcome=`
	for name, c := range map[string]struct {
		h    steadymq.Handler
		want string
	}{
		"nil":       {returning(nil), ""},
		"plain":     {returning(errAway), `level=WARN msg="handler failed"` + ids + "requeued error=away\n"},
		"discard":   {returning(steadymq.Discard(errAway)), `level=ERROR msg="handler failed"` + ids + "discarded error=away\n"},
		"park":      {returning(fmt.Errorf("order: %w", steadymq.Park(errAway))), `level=ERROR msg="handler failed"` + ids + "parked error=\"order: away\"\n"},
		"requeue":   {returning(steadymq.Requeue(errAway)), `level=INFO msg="handler failed"` + ids + "requeued error=away\n"},
		"panic":     {panicking, `level=WARN msg="handler panicked"` + ids + "requeued error=\"steadymq: panic: boom\"\n"},
		"policy":    {middleware.ParkAfter(2)(panicking), `level=ERROR msg="handler panicked"` + ids + "parked error=\"steadymq: panic: boom\"\n"},
		"by hand":   {settledAs((*steadymq.Delivery).Ack, errAway), `level=INFO msg="handler failed"` + ids + "acked error=away\n"},
		"discarded": {settledAs((*steadymq.Delivery).Discard, errAway), `level=ERROR msg="handler failed"` + ids + "discarded error=away\n"},
	} {
		synctest.Test(t, func(t *testing.T) {
			var out bytes.Buffer
			slow := func(ctx context.Context, d *steadymq.Delivery) error {
				time.Sleep(3 * time.Second)
				return c.h(ctx, d)
			}
			_, _ = steadymq.Invoke(t.Context(), middleware.Log(withoutTime(&out))(slow), at(2))
			assert.Equal(t, c.want, out.String(), name)
		})
	}
}

func settledAs(settle func(*steadymq.Delivery) error, err error) steadymq.Handler {
	return func(_ context.Context, d *steadymq.Delivery) error {
		_ = settle(d)
		return err
	}
}

func TestLogTellsTheStackOfAPanic(t *testing.T) {
	var out bytes.Buffer
	_, _ = steadymq.Invoke(t.Context(), middleware.Log(slog.New(slog.NewTextHandler(&out, nil)))(panicking), at(1))
	assert.Contains(t, out.String(), "middleware_test.panicking")
	assert.NotContains(t, out.String(), "hunter2")
}

func TestCorrelationPutsTheIdsIntoTheContext(t *testing.T) {
	for _, m := range []amqp.Delivery{{}, {MessageId: "m"}, {MessageId: "m", CorrelationId: "c"}} {
		called := false
		_, err := steadymq.Invoke(t.Context(), middleware.Correlation(func(ctx context.Context, _ *steadymq.Delivery) error {
			called = true
			assert.Equal(t, m.MessageId, middleware.MessageID(ctx))
			assert.Equal(t, m.CorrelationId, middleware.CorrelationID(ctx))
			return nil
		}), steadymq.NewDelivery(m))
		require.NoError(t, err)
		assert.True(t, called)
	}
	assert.Empty(t, middleware.MessageID(t.Context()))
	assert.Empty(t, middleware.CorrelationID(t.Context()))
}

func TestLogHandlerAddsTheIdsAtTheTop(t *testing.T) {
	const ids = " message_id=m-7 correlation_id=c-7"
	for name, c := range map[string]struct {
		log  func(ctx context.Context, l *slog.Logger)
		want string
	}{
		"plain":      {func(ctx context.Context, l *slog.Logger) { l.InfoContext(ctx, "x", "a", 1) }, "msg=x" + ids + " a=1"},
		"no context": {func(_ context.Context, l *slog.Logger) { l.Info("x", "a", 1) }, "msg=x a=1"},
		"with":       {func(ctx context.Context, l *slog.Logger) { l.With("b", 2).InfoContext(ctx, "x", "a", 1) }, "msg=x b=2" + ids + " a=1"},
		"group":      {func(ctx context.Context, l *slog.Logger) { l.WithGroup("g").InfoContext(ctx, "x", "a", 1) }, "msg=x" + ids + " g.a=1"},
		"with, groups": {func(ctx context.Context, l *slog.Logger) {
			l.With("b", 2).WithGroup("g").With("c", 3).WithGroup("").WithGroup("h").InfoContext(ctx, "x", "a", 1)
		}, "msg=x b=2" + ids + " g.c=3 g.h.a=1"},
		"group, none": {func(_ context.Context, l *slog.Logger) { l.WithGroup("g").With("c", 3).Info("x", "a", 1) }, "msg=x g.c=3 g.a=1"},
		"its own":     {func(ctx context.Context, l *slog.Logger) { l.InfoContext(ctx, "x", "message_id", "mine") }, "msg=x correlation_id=c-7 message_id=mine"},
		"in a group": {func(ctx context.Context, l *slog.Logger) {
			l.WithGroup("g").InfoContext(ctx, "x", "message_id", "mine")
		}, "msg=x" + ids + " g.message_id=mine"},
	} {
		var out bytes.Buffer
		logger := slog.New(middleware.LogHandler(withoutTime(&out).Handler()))
		_, err := steadymq.Invoke(t.Context(), middleware.Correlation(func(ctx context.Context, _ *steadymq.Delivery) error {
			c.log(ctx, logger)
			return nil
		}), at(1))
		require.NoError(t, err)
		assert.Equal(t, "level=INFO "+c.want+"\n", out.String(), name)
	}
}

func TestLogHandlerLeavesOutIdsThatAMessageDoesNotHave(t *testing.T) {
	var out bytes.Buffer
	logger := slog.New(middleware.LogHandler(withoutTime(&out).Handler()))
	_, _ = steadymq.Invoke(t.Context(), middleware.Correlation(func(ctx context.Context, _ *steadymq.Delivery) error {
		logger.InfoContext(ctx, "x")
		return nil
	}), steadymq.NewDelivery(amqp.Delivery{CorrelationId: "c"}))
	assert.Equal(t, "level=INFO msg=x correlation_id=c\n", out.String())
}

// Two loggers made from one must not write into each other's list of what was added.
func TestLogHandlersMadeFromOneAreApart(t *testing.T) {
	var out bytes.Buffer
	base := slog.New(middleware.LogHandler(withoutTime(&out).Handler())).WithGroup("g").With("a", 1).With("b", 2).With("c", 3)
	left, right := base.With("left", 1), base.With("right", 1)
	_, _ = steadymq.Invoke(t.Context(), middleware.Correlation(func(ctx context.Context, _ *steadymq.Delivery) error {
		left.InfoContext(ctx, "x")
		right.InfoContext(ctx, "x")
		return nil
	}), at(1))
	assert.Contains(t, out.String(), "g.c=3 g.left=1\n")
	assert.Contains(t, out.String(), "g.c=3 g.right=1\n")
}

func TestLogDoesNotTellTheIdTwice(t *testing.T) {
	var out bytes.Buffer
	logger := slog.New(middleware.LogHandler(withoutTime(&out).Handler()))
	_, _ = steadymq.Invoke(t.Context(), chain(middleware.Correlation, middleware.Log(logger))(returning(errAway)), at(1))
	assert.Equal(t, 1, bytes.Count(out.Bytes(), []byte("message_id=m-7")))
	assert.Equal(t, 1, bytes.Count(out.Bytes(), []byte("correlation_id=c-7")))
}
