package behaviour_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

// What is easily overlooked when failed messages are delayed and parked.

// The handler has left something behind that reads the delivery. Only the race detector judges.
func TestDeliveryMayBeReadWhileItIsParked(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var reading sync.WaitGroup
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			reading.Go(func() {
				for range 100 {
					_ = d.Attempt()
				}
			})
			return errPoison
		}, parking())
		r.PublishMany(20, "1")
		r.Wait(10 * time.Second)
		reading.Wait()
		assert.Equal(r, 20, r.Broker.QueueLen(parked))
	})
}
