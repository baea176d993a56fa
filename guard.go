package steadymq

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"runtime/debug"
	"time"
)

// Calls of the user's functions and reads of the user's errors, so that one that panics, hangs or
// ends its goroutine becomes an error and does no harm. Everything that calls a function of an
// option goes through it, and so do the workers.

// userCall is a call of a function that the user has given by an option.
type userCall[T any] struct {
	option string
	f      func(context.Context) (T, error)
	left   func()  // called when the function is left behind
	late   func(T) // takes what the function returns after that; nil if nothing is to be done
	bare   bool    // its own errors are not named, such as a dialer's "connection refused"
}

// abandonGrace is how long a user's function may outlive its context before it is left behind.
const abandonGrace = 400 * time.Millisecond

// run calls the function on a goroutine of its own, because the function may panic, end its
// goroutine or ignore its context. run returns when the function does, and at the latest
// abandonGrace after ctx has ended. Its errors name the option.
func (c userCall[T]) run(ctx context.Context) (T, error) {
	done := make(chan answer[T], 1)
	go c.answer(ctx, done)
	select {
	case a := <-done:
		return a.value, c.returned(a.err)
	case <-ctx.Done():
	}
	grace := time.NewTimer(abandonGrace)
	defer grace.Stop()
	select {
	case a := <-done:
		return a.value, c.returned(a.err)
	case <-grace.C:
	}
	c.left()
	if c.late != nil {
		go func() {
			if a := <-done; a.err == nil {
				c.late(a.value)
			}
		}()
	}
	var none T
	return none, c.named(fmt.Errorf("%w: %w", causeOf(ctx), errIgnoresContext))
}

// answer is the result of a user's function.
type answer[T any] struct {
	value T
	err   error
}

func (c userCall[T]) answer(ctx context.Context, done chan<- answer[T]) {
	var a answer[T]
	returned := false
	defer func() {
		if !returned { // after a runtime.Goexit recover returns nil
			a.err = panicked(recover())
		}
		done <- a
	}()
	a.value, a.err = c.f(ctx)
	a.err = safeError(a.err)
	returned = true
}

func (c userCall[T]) returned(err error) error {
	if c.bare && !errors.As(err, new(*PanicError)) {
		return err
	}
	return c.named(err)
}

func (c userCall[T]) named(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", c.option, err)
}

var errIgnoresContext = errors.New("the function did not return when its context ended and was left behind")

// errNoAnswer is the reason of a call that passed its limit. The function has no context to watch.
var errNoAnswer = errors.New("no answer within the setup limit (WithSetupTimeout)")

// isNil reports whether a value of the user is nil, or is a nil pointer in an interface, which does
// not compare equal to nil.
func isNil(value any) bool {
	v := reflect.ValueOf(value)
	return !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil()
}

// guardedIO calls Read or Write of a connection that may be the user's, or may run callbacks of the
// user's TLS configuration. A panic there, or the end of the goroutine, ends the socket: transfer
// calls fault with an error that says so, and returns it.
func guardedIO(f func([]byte) (int, error), p []byte, fault func(error)) (n int, err error) {
	returned := false
	defer func() {
		if !returned {
			n, err = 0, fmt.Errorf("a function of the connection or of its TLS configuration: %w", panicked(recover()))
			fault(err)
		}
	}()
	n, err = f(p)
	err = safeError(err)
	returned = true
	return n, err
}

// safeError returns an error of the user unchanged if it can be read, else a *PanicError in its
// place. The outcome that Discard, Park, Requeue and RequeueAfter ask for is kept.
func safeError(err error) error {
	if err == nil {
		return nil
	}
	return readable(err)
}

func readable(err error) error {
	var r reading
	stack := r.all(err)
	if stack == nil {
		return err
	}
	fault := &PanicError{
		Value: fmt.Sprintf("the error %T panics when it is read; is it a nil pointer, which is an error that is not nil?", r.at),
		Stack: stack,
	}
	if v := r.outcome; v != nil {
		return &outcomeError{outcome: v.outcome, delay: v.delay, err: fault}
	}
	return fault
}

// causeOf is context.Cause for contexts whose cause may be the user's, as that of Run's context is.
func causeOf(ctx context.Context) error { return safeError(context.Cause(ctx)) }

// panicked returns the error of a panic, from what recover returned.
func panicked(value any) *PanicError {
	e := &PanicError{Value: value, Stack: debug.Stack()}
	if new(reading).all(e) != nil {
		e.Value = fmt.Sprintf("a %T that panics when it is read", value)
	}
	return e
}

// reading visits an error and all errors that it wraps.
type reading struct {
	at      error         // the error it has come to
	outcome *outcomeError // the first outcome on the way
}

// all reads err. If that panics it returns the stack of the panic.
func (r *reading) all(err error) (stack []byte) {
	defer func() {
		if recover() != nil {
			stack = debug.Stack()
		}
	}()
	r.read(err, 0)
	return nil
}

// maxChain is how deep errors may wrap one another, for one that wraps itself has no end.
const maxChain = 1000

// read calls every method that fmt, errors.Is and errors.As call.
func (r *reading) read(err error, depth int) {
	if err == nil {
		return
	}
	r.at = err
	if v, ok := err.(*outcomeError); ok && r.outcome == nil { //nolint:errorlint // every error of the tree is looked at
		r.outcome = v
	}
	if depth > maxChain {
		panic("an error without an end")
	}
	if e, ok := err.(interface{ Is(error) bool }); ok {
		e.Is(errUnmatchable)
	}
	if e, ok := err.(interface{ As(any) bool }); ok {
		e.As(new(*unmatchable))
	}
	switch e := err.(type) { //nolint:errorlint // as above
	case interface{ Unwrap() error }:
		r.read(e.Unwrap(), depth+1)
	case interface{ Unwrap() []error }:
		for _, inner := range e.Unwrap() {
			r.read(inner, depth+1)
		}
	}
	r.at = err
	_ = err.Error() // after the errors that it wraps, whose texts it may ask for
}

// unmatchable is an error that no other error equals.
type unmatchable struct{ error }

var errUnmatchable = &unmatchable{}
