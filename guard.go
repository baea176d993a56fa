package steadymq

import (
	"context"
	"errors"
	"fmt"
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
	return none, c.named(fmt.Errorf("%w: %w", context.Cause(ctx), errIgnoresContext))
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
			a.err = &PanicError{Value: recover(), Stack: debug.Stack()}
		}
		done <- a
	}()
	a.value, a.err = c.f(ctx)
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

// wrap makes the handler of a Run out of the user's and the middleware around it.
func (c *config) wrap(ctx context.Context, h Handler, left func()) (Handler, error) {
	for i := len(c.middleware) - 1; i >= 0; i-- {
		made, err := userCall[Handler]{
			option: "WithMiddleware",
			f:      func(context.Context) (Handler, error) { return c.middleware[i](h), nil },
			left:   left,
		}.run(ctx)
		if err != nil {
			return nil, fmt.Errorf("steadymq: %w", err)
		}
		if made == nil {
			return nil, &OptionError{"WithMiddleware", fmt.Sprintf("middleware %d of %d returned a nil handler", i+1, len(c.middleware))}
		}
		h = made
	}
	return h, nil
}

// isFatal asks the user's function whether err ends Run.
func (c *config) isFatal(ctx context.Context, err error, left func()) (bool, error) {
	return userCall[bool]{
		option: "WithFatal",
		f:      func(context.Context) (bool, error) { return c.fatal(err), nil },
		left:   left,
	}.run(ctx)
}

// protect turns a panic of a function that the user has hidden in a value, such as a callback
// of a tls.Config, into an error.
func protect(option string, f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%s: %w", option, &PanicError{Value: v, Stack: debug.Stack()})
		}
	}()
	return f()
}
