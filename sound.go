package steadymq

import (
	"context"
	"fmt"
	"runtime/debug"
)

// Errors of the user are read on the library's goroutines, where a panic ends the process: their
// text, and by errors.Is and errors.As what they wrap. The common trap is a nil pointer, which as
// an error is not nil (https://go.dev/doc/faq#nil_error).

// sound returns an error of the user as it is if it can be read, else a *PanicError in its place.
// What Discard, Requeue and RequeueAfter ask for stays.
func sound(err error) error {
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
	broken := &PanicError{
		Value: fmt.Sprintf("the error %T panics when it is read; is it a nil pointer, which is an error that is not nil?", r.at),
		Stack: stack,
	}
	if v := r.verdict; v != nil {
		return &verdict{outcome: v.outcome, delay: v.delay, err: broken}
	}
	return broken
}

// causeOf is context.Cause: the context may be Run's, and its cause the user's.
func causeOf(ctx context.Context) error { return sound(context.Cause(ctx)) }

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
	at      error    // the one it has come to
	verdict *verdict // the first one on the way
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
	if v, ok := err.(*verdict); ok && r.verdict == nil { //nolint:errorlint // every error of the tree is looked at
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
