package middleware

import (
	"context"
	"log/slog"
	"slices"

	"github.com/steadymq/steadymq"
)

// Ids of the message in the context of its handler, and in all that is logged with that context.

const (
	messageIDKey     = "message_id"
	correlationIDKey = "correlation_id"
)

// ids are what Correlation puts into the context.
type ids struct{ message, correlation string }

type idsKey struct{}

// Correlation is a [steadymq.Middleware] that puts the message's id and its correlation id into the
// context of the handler, for [MessageID] and [CorrelationID], and for all that is logged with that
// context by way of [LogHandler]. It goes by the properties message-id and correlation-id as they
// are when it is called, and makes up none that the publisher has left out.
//
// Give it first, so that the other middleware has the ids, too. Publishers can write into these
// properties whatever they like.
func Correlation(next steadymq.Handler) steadymq.Handler {
	return func(ctx context.Context, d *steadymq.Delivery) error {
		return next(context.WithValue(ctx, idsKey{}, ids{d.MessageId, d.CorrelationId}), d)
	}
}

// MessageID returns the id of the message that is handled with ctx. It is "" if the message has
// none, and where no [Correlation] has put it into ctx.
func MessageID(ctx context.Context) string { return idsOf(ctx).message }

// CorrelationID returns the correlation id of the message that is handled with ctx. It is "" if the
// message has none, and where no [Correlation] has put it into ctx.
func CorrelationID(ctx context.Context) string { return idsOf(ctx).correlation }

func idsOf(ctx context.Context) ids {
	found, _ := ctx.Value(idsKey{}).(ids)
	return found
}

// LogHandler returns a [slog.Handler] that adds message_id and correlation_id to every record which
// is logged with the context of a handler, and passes it on to next:
//
//	logger := slog.New(middleware.LogHandler(slog.NewJSONHandler(os.Stderr, nil)))
//
// An id that the message does not have is left out, and so is one that the record has by itself.
// The ids stand at the top, outside of all groups. A record of another context passes unchanged.
// next must not be nil: LogHandler panics.
func LogHandler(next slog.Handler) slog.Handler {
	if next == nil {
		panic("steadymq: middleware.LogHandler: the handler must not be nil")
	}
	return &logHandler{Handler: next, top: next}
}

type logHandler struct {
	slog.Handler              // with all that WithAttrs and WithGroup have added
	top          slog.Handler // with what was added before the first group
	inside       []func(slog.Handler) slog.Handler
}

// Handle implements slog.Handler.
func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	attrs := h.missing(idsOf(ctx), r)
	if len(attrs) == 0 {
		return h.Handler.Handle(ctx, r)
	}
	next := h.top.WithAttrs(attrs)
	for _, add := range h.inside {
		next = add(next)
	}
	return next.Handle(ctx, r)
}

// missing returns the ids that are known and that r does not have at the top.
func (h *logHandler) missing(known ids, r slog.Record) (attrs []slog.Attr) {
	grouped := len(h.inside) > 0 // so what r has is not at the top
	for _, a := range []slog.Attr{slog.String(messageIDKey, known.message), slog.String(correlationIDKey, known.correlation)} {
		if a.Value.String() != "" && (grouped || !has(r, a.Key)) {
			attrs = append(attrs, a)
		}
	}
	return attrs
}

func has(r slog.Record, key string) (found bool) {
	r.Attrs(func(a slog.Attr) bool {
		found = a.Key == key
		return !found
	})
	return found
}

// WithAttrs implements slog.Handler.
func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return h.with(func(next slog.Handler) slog.Handler { return next.WithAttrs(attrs) }, len(h.inside) > 0)
}

// WithGroup implements slog.Handler.
func (h *logHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	return h.with(func(next slog.Handler) slog.Handler { return next.WithGroup(name) }, true)
}

func (h *logHandler) with(add func(slog.Handler) slog.Handler, inGroup bool) slog.Handler {
	made := &logHandler{Handler: add(h.Handler), top: h.top, inside: h.inside}
	if inGroup {
		made.inside = append(slices.Clone(h.inside), add)
	} else {
		made.top = made.Handler
	}
	return made
}
