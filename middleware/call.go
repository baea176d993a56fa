package middleware

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"

	"github.com/steadymq/steadymq"
)

// What all policies share: the call of the next handler, and what its error says.

// call calls next and turns a panic into an error, which policies decide about like any other.
func call(ctx context.Context, next steadymq.Handler, d *steadymq.Delivery) (err error) {
	defer func() {
		if value := recover(); value != nil {
			err = panicked(value)
		}
	}()
	return next(ctx, d)
}

// panicked is called by a deferred function, so that the stack is that of the panic.
func panicked(value any) *steadymq.PanicError {
	return &steadymq.PanicError{Value: value, Stack: debug.Stack()}
}

// guarded calls a function of the user that decides nothing about the message. If it panics, that
// is told with the handler's error, whose outcome stays.
func guarded(err error, what string, f func()) (joined error) {
	joined = err
	defer func() {
		if value := recover(); value != nil {
			joined = errors.Join(err, fmt.Errorf("%s: %w", what, panicked(value)))
		}
	}()
	f()
	return joined
}

// explicit reports whether err itself says what becomes of the message, as nil does. An error that
// panics when it is read says nothing.
func explicit(err error) (yes bool) {
	defer func() {
		if recover() != nil {
			yes = false
		}
	}()
	_, yes = steadymq.OutcomeOf(err)
	return yes
}

// isLater reports whether the handler has left its delivery to be settled by hand, which is no
// failure.
func isLater(err error) bool {
	if !explicit(err) {
		return false
	}
	o, _ := steadymq.OutcomeOf(err)
	return o == steadymq.Unsettled
}

// cutOff reports whether err came after the session was lost or the drain limit had passed, which
// is no failure. A panic is a failure whenever it comes.
func cutOff(ctx context.Context, err error) bool {
	cause := context.Cause(ctx)
	if !errors.As(cause, new(*steadymq.SessionError)) && !errors.Is(cause, steadymq.ErrDrainTimeout) {
		return false
	}
	_, panicked := err.(*steadymq.PanicError) //nolint:errorlint // as call has made it
	return !panicked
}

// refused returns a middleware that Run refuses.
func refused(function, reason string, args ...any) steadymq.Middleware {
	return func(steadymq.Handler) steadymq.Handler {
		panic(&steadymq.OptionError{Option: "middleware." + function, Reason: fmt.Sprintf(reason, args...)})
	}
}
