package steadymq

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"runtime/debug"
	"time"
)

// abandonGrace is how long a user's function may outlive its context before it is left behind.
const abandonGrace = 400 * time.Millisecond

var errIgnoresContext = errors.New("the function did not return when its context ended and was left behind")

// userCall is a call of a function that the user has given by an option.
type userCall[T any] struct {
	option string
	f      func(context.Context) (T, error)
	left   func()  // is told when the function is left behind
	late   func(T) // takes what it returns after that; nil if nothing is to be done
	bare   bool    // what it returns itself is not named, as a dialer's "connection refused"
}

// run calls the function on a goroutine of its own, for it may panic, end its goroutine or
// ignore its context. It returns when the function does, and at the latest abandonGrace after
// ctx has ended. Its errors name the option.
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

// answer is what a user's function has returned.
type answer[T any] struct {
	value T
	err   error
}

func (c userCall[T]) answer(ctx context.Context, done chan<- answer[T]) {
	var a answer[T]
	returned := false
	defer func() {
		if !returned { // recover gives nil after a runtime.Goexit
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

// errNoAnswer ends a function that has no context to watch.
var errNoAnswer = errors.New("no answer within the setup limit (WithSetupTimeout)")

// isNil tells whether a value of the user is nil, or a nil pointer in an interface, which is not.
func isNil(value any) bool {
	v := reflect.ValueOf(value)
	return !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil()
}

// transfer calls Read or Write of a connection that may be the user's, or run callbacks of the
// user's TLS configuration. What panics there, or ends the goroutine, ends the socket: broken is
// told why, and it is the error of a panic.
func transfer(f func([]byte) (int, error), p []byte, fault func(error)) (n int, err error) {
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

// safeError returns an error of the user as it is if it can be read, else a *PanicError in its place.
// What Discard, Requeue and RequeueAfter ask for stays.
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
	if v := r.verdict; v != nil {
		return &outcomeError{outcome: v.outcome, delay: v.delay, err: fault}
	}
	return fault
}

// causeOf is context.Cause: the context may be Run's, and its cause the user's.
func causeOf(ctx context.Context) error { return safeError(context.Cause(ctx)) }

// panicked makes the error of a panic out of what recover returned.
func panicked(value any) *PanicError {
	e := &PanicError{Value: value, Stack: debug.Stack()}
	if new(reading).all(e) != nil {
		e.Value = fmt.Sprintf("a %T that panics when it is read", value)
	}
	return e
}

// reading goes over an error and all that it wraps.
type reading struct {
	at      error         // the one it has come to
	verdict *outcomeError // the first one on the way
}

// all reads err, and returns the stack of the panic if that panics.
func (r *reading) all(err error) (stack []byte) {
	defer func() {
		if recover() != nil {
			stack = debug.Stack()
		}
	}()
	r.read(err, 0)
	return nil
}

// maxChain is how deep errors may wrap each other; one that wraps itself has no end.
const maxChain = 1000

// read calls all that fmt, errors.Is and errors.As do.
func (r *reading) read(err error, depth int) {
	if err == nil {
		return
	}
	r.at = err
	if v, ok := err.(*outcomeError); ok && r.verdict == nil { //nolint:errorlint // every error of the tree is looked at
		r.verdict = v
	}
	if depth > maxChain {
		panic("an error without an end")
	}
	if e, ok := err.(interface{ Is(error) bool }); ok {
		e.Is(errNobodys)
	}
	if e, ok := err.(interface{ As(any) bool }); ok {
		e.As(new(*nobodys))
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
	_ = err.Error() // after those it wraps, whose texts it may ask for
}

// nobodys is an error that no other one is.
type nobodys struct{ error }

var errNobodys = &nobodys{}
