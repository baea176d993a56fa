package rig

import (
	"context"

	"github.com/steadymq/steadymq"
)

// Ack is a handler that succeeds.
func Ack(context.Context, *steadymq.Delivery) error { return nil }

// Hold is a handler that waits until it is let go, whatever its context says.
func Hold(started chan<- *steadymq.Delivery, release <-chan struct{}) steadymq.Handler {
	return func(_ context.Context, d *steadymq.Delivery) error {
		started <- d
		<-release
		return nil
	}
}

// Options makes a list of its arguments.
func Options(o ...steadymq.Option) []steadymq.Option { return o }
