package steadymq

import (
	"context"
	"errors"
	"fmt"
	"reflect"
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
	a.err = sound(a.err)
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
	ctx, cancel := context.WithTimeoutCause(ctx, c.setupTimeout, errNoAnswer)
	defer cancel()
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

// errNoAnswer ends a function that has no context to watch.
var errNoAnswer = errors.New("no answer within the setup limit (WithSetupTimeout)")

// isFatal asks the user's function whether err ends Run. Nothing heals meanwhile.
func (c *config) isFatal(ctx context.Context, err error, left func()) (bool, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.setupTimeout, errNoAnswer)
	defer cancel()
	return userCall[bool]{
		option: "WithFatal",
		f:      func(context.Context) (bool, error) { return c.fatal(err), nil },
		left:   left,
	}.run(ctx)
}

// isNil tells whether a value of the user is nil, or a nil pointer in an interface, which is not.
func isNil(value any) bool {
	v := reflect.ValueOf(value)
	return !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil()
}

// transfer calls Read or Write of a connection that may be the user's, or run callbacks of the
// user's TLS configuration. What panics there, or ends the goroutine, ends the socket: broken is
// told why, and it is the error of a panic.
func transfer(f func([]byte) (int, error), p []byte, broken func(error)) (n int, err error) {
	returned := false
	defer func() {
		if !returned {
			n, err = 0, fmt.Errorf("a function of the connection or of its TLS configuration: %w", panicked(recover()))
			broken(err)
		}
	}()
	n, err = f(p)
	err = sound(err)
	returned = true
	return n, err
}
