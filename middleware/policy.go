package middleware

import (
	"context"
	"errors"
	"slices"

	"github.com/steadymq/steadymq"
)

// Policies: when a message that has failed is given up on.

// DiscardAfter drops a message, or dead-letters it if its queue has a dead-letter exchange, when
// its n-th try has failed or a later one: a plain error at [steadymq.Delivery.Attempt] >= n becomes
// [steadymq.Discard]. Explicit outcomes stay.
//
// Attempt is at most 2 on a classic queue, unless a dead-letter exchange leads back to it. There an
// n of 3 or more never fires, and 2 discards at the first failure after any redelivery: use
// WithRetry, which counts by itself. Where a dead-letter exchange does lead back, Discard is one
// more round and no end: use [ParkAfter]. n must be at least 1, which discards every plain error.
func DiscardAfter(n int) steadymq.Middleware {
	return after("DiscardAfter", n, steadymq.Discard)
}

// ParkAfter gives up on a message and keeps it with its cause, when its n-th try has failed or a
// later one: a plain error at [steadymq.Delivery.Attempt] >= n becomes [steadymq.Park]. Explicit
// outcomes stay. A consumer that has no place for parked messages (WithRetry names one) goes on
// holding the message as after a plain error.
//
// For n the same holds as for [DiscardAfter], but that a parked message is out of every dead-letter
// loop.
func ParkAfter(n int) steadymq.Middleware {
	return after("ParkAfter", n, steadymq.Park)
}

func after(function string, n int, giveUp func(error) error) steadymq.Middleware {
	if n < 1 {
		return refused(function, "n must be at least 1, got %d", n)
	}
	return policy(func(d *steadymq.Delivery, err error) error {
		if d.Attempt() >= n {
			return giveUp(err)
		}
		return err
	})
}

// Permanent gives up at once on a message whose failure cannot get better: a plain error that is
// one of errs, by [errors.Is], becomes [steadymq.Park]. Explicit outcomes stay. A consumer that has
// no place for parked messages (WithRetry names one) holds the message as after a plain error.
//
// errs must not be empty, and none of them nil.
func Permanent(errs ...error) steadymq.Middleware {
	switch {
	case len(errs) == 0:
		return refused("Permanent", "no errors are given: no message would be parked")
	case slices.Contains(errs, nil):
		return refused("Permanent", "error %d of %d is nil, which is no failure", slices.Index(errs, nil)+1, len(errs))
	}
	errs = slices.Clone(errs)
	return permanent("an error given to middleware.Permanent, or the handler's own", func(err error) bool {
		return slices.ContainsFunc(errs, func(target error) bool { return errors.Is(err, target) })
	})
}

// PermanentFunc is [Permanent] for what a list of errors cannot say, such as the type of an error:
//
//	middleware.PermanentFunc(func(err error) bool {
//		return errors.As(err, new(*steadymq.DecodeError))
//	})
//
// is is asked about plain errors only, never about nil, and by several goroutines at once. If it
// panics, the message fails as it would without it, and the error tells the panic, too. It must not
// be nil.
func PermanentFunc(is func(err error) bool) steadymq.Middleware {
	if is == nil {
		return refused("PermanentFunc", "the function must not be nil")
	}
	return permanent("the function given to middleware.PermanentFunc", is)
}

func permanent(what string, is func(error) bool) steadymq.Middleware {
	return policy(func(_ *steadymq.Delivery, err error) error {
		yes := false
		told := guarded(err, what, func() { yes = is(err) })
		if yes {
			return steadymq.Park(err)
		}
		return told
	})
}

// policy returns a middleware that lets decide replace plain errors of failed messages.
func policy(decide func(d *steadymq.Delivery, err error) error) steadymq.Middleware {
	return func(next steadymq.Handler) steadymq.Handler {
		return func(ctx context.Context, d *steadymq.Delivery) error {
			err := call(ctx, next, d)
			if explicit(err) || cutOff(ctx, err) {
				return err
			}
			return decide(d, err)
		}
	}
}
