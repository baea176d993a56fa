package steadymq

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
)

// Handlers that take a decoded body, and the error of a body that does not decode.

// Decode returns a [Handler] that decodes the body of each message into a T for h:
//
//	steadymq.Decode(json.Unmarshal, func(ctx context.Context, d *steadymq.Delivery, o Order) error {
//		return store(ctx, o)
//	})
//
// An error of unmarshal becomes a [*DecodeError], without a call of h. Such a body never gets
// better, so a consumer that has a place for messages that are given up on sends it there at once.
// Any other takes it for a plain error: the message is held for longer and longer, and is not lost.
//
// What says nothing about the body is no DecodeError. An error of unmarshal that asks for an
// outcome is returned as it is: [RequeueAfter] for a schema that could not be fetched, [Discard]
// for a body that nobody wants to see. A panic of unmarshal is a failure like a panic of h: a bug
// of the decoder may be mended.
//
// unmarshal is called once for each try, by several goroutines at once. It is given a copy of the
// body, which it may change and keep; that of the delivery stays as it came. T may be any type:
//
//   - For a pointer type unmarshal is given a pointer to a new zero value, and h gets that pointer,
//     which is never nil. A JSON null leaves the value zero.
//   - For an interface type unmarshal is given a pointer to a nil interface. [json.Unmarshal] fills
//     an any, and refuses every interface that has methods.
//   - For all others it is given a pointer to a zero value.
//
// If unmarshal or h is nil, so is the Handler, which [Consumer.Run] and [Group.Handle] refuse with
// an [*OptionError].
func Decode[T any](unmarshal func([]byte, any) error, h func(context.Context, *Delivery, T) error) Handler {
	if unmarshal == nil || h == nil {
		return nil
	}
	kind := reflect.TypeFor[T]()
	return func(ctx context.Context, d *Delivery) error {
		v := new(T)
		into := any(v)
		if kind.Kind() == reflect.Pointer {
			made := reflect.New(kind.Elem())
			reflect.ValueOf(v).Elem().Set(made)
			into = made.Interface()
		}
		if err := unmarshal(bytes.Clone(d.Body), into); err != nil {
			return undecoded(d, kind, err)
		}
		return h(ctx, d, *v)
	}
}

// undecoded returns the error of a handler whose unmarshal has returned err.
func undecoded(d *Delivery, into reflect.Type, err error) error {
	err = safeError(err)
	if _, explicit := OutcomeOf(err); explicit || errors.As(err, new(*PanicError)) {
		return err // the second is one that panics when it is read, often a nil pointer meant as no error
	}
	return &DecodeError{Queue: d.Queue(), MessageID: d.MessageId, Size: len(d.Body), Into: into.String(), Err: err}
}

// DecodeError tells of a body that [Decode] could not decode. [errors.As] finds it in what a
// middleware or [Hooks].HandlerFailed is given.
type DecodeError struct {
	// Queue is the queue that the message came from, "" for a Delivery of NewDelivery.
	Queue string
	// MessageID is the message's id as its publisher has set it, or "".
	MessageID string
	// Size is the number of bytes of the body.
	Size int
	// Into is the Go type that was to be filled.
	Into string
	// Err is what the decoder returned. Its text may quote the body, and with it a secret: those of
	// encoding/json do.
	Err error `json:"-"`
}

// Error tells queue, message, size and type, and of Err only its type and, for encoding/json, the
// place. It quotes nothing of the body.
func (e *DecodeError) Error() string {
	where, message := "", "a message"
	if e.Queue != "" {
		where = "queue " + e.Queue + ": "
	}
	if e.MessageID != "" {
		message = fmt.Sprintf("message %q", e.MessageID)
	}
	return fmt.Sprintf("steadymq: %sthe body of %s (%d bytes) does not decode into %s: %s", where, message, e.Size, e.Into, blind(e.Err))
}

// Unwrap returns what the decoder returned.
func (e *DecodeError) Unwrap() error { return e.Err }

// blind describes an error without its text: by the innermost type, for those around it are of fmt
// and errors and say nothing.
func blind(err error) string {
	var syntax *json.SyntaxError
	var mismatch *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return fmt.Sprintf("%T at byte %d", syntax, syntax.Offset)
	case errors.As(err, &mismatch):
		return fmt.Sprintf("%T (%v) at byte %d", mismatch, mismatch.Type, mismatch.Offset)
	}
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return fmt.Sprintf("%T", err)
}
