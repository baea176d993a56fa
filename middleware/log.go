package middleware

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/steadymq/steadymq"
)

// Log writes one line for each message that has failed: whose handler returned an error or
// panicked. The attributes are queue, message_id, attempt, took (how long what stands inside has
// worked), outcome and error, and stack for a panic. The body is never written, nor are headers.
// The level says whether somebody has to look:
//
//   - Error: the message is given up on ([steadymq.Discard], [steadymq.Park]).
//   - Warn: a plain error or a panic, so it is tried again. The outcome is "requeued", also where
//     WithRetry sends it by way of a queue that waits.
//   - Info: the handler has asked for another try ([steadymq.Requeue], [steadymq.RequeueAfter]),
//     or had acked or requeued the message by hand before it failed.
//
// The outcome is what the error asks for, or what the handler has settled by hand. Put Log before
// the policies, so that it sees what they have decided. An error that the handler returned because
// its session was lost or the drain limit has passed is no failure, and not written; nor is
// [steadymq.Later].
//
// The library logs failures as well, at most one in a second; Log writes all of them, by the worker
// and before the message is settled. A logger that blocks delays both. One that panics does not
// change the outcome; the error then tells the panic, too. logger must not be nil.
func Log(logger *slog.Logger) steadymq.Middleware {
	if logger == nil {
		return refused("Log", "the logger must not be nil; leave the middleware out for silence")
	}
	return func(next steadymq.Handler) steadymq.Handler {
		return func(ctx context.Context, d *steadymq.Delivery) error {
			began := time.Now()
			err := call(ctx, next, d)
			if err == nil || isLater(err) || cutOff(ctx, err) {
				return err
			}
			took := time.Since(began)
			return guarded(err, "the logger given to middleware.Log", func() { logFailure(ctx, logger, d, took, err) })
		}
	}
}

func logFailure(ctx context.Context, logger *slog.Logger, d *steadymq.Delivery, took time.Duration, err error) {
	outcome, asked := steadymq.OutcomeOf(err)
	if settled := d.Outcome(); settled != steadymq.Unsettled {
		outcome, asked = settled, true
	}
	attrs := []slog.Attr{
		slog.String("queue", d.Queue()), slog.String(messageIDKey, d.MessageId), slog.Int("attempt", d.Attempt()),
		slog.Duration("took", took), slog.String("outcome", outcome.String()), slog.Any("error", err),
	}
	message := "handler failed"
	if panicked := (*steadymq.PanicError)(nil); errors.As(err, &panicked) {
		message = "handler panicked"
		attrs = append(attrs, slog.String("stack", string(panicked.Stack)))
	}
	logger.LogAttrs(ctx, levelOf(outcome, asked), message, attrs...)
}

func levelOf(o steadymq.Outcome, asked bool) slog.Level {
	switch {
	case o == steadymq.Discarded || o == steadymq.Parked:
		return slog.LevelError
	case asked:
		return slog.LevelInfo
	}
	return slog.LevelWarn
}
