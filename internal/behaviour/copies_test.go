package behaviour_test

import (
	"context"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

// A flag of its own would let each copy write a frame with the same tag, and the
// broker closes the channel by 406.
func TestCopiesOfADeliverySettleOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		process := func(d steadymq.Delivery) error { return d.Ack() }
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			driver := d.Delivery
			copied := *d
			copied.DeliveryTag = 99 // the copy's own business
			assert.NoError(r, process(copied))
			assert.Equal(r, steadymq.Acked, d.Outcome())
			assert.ErrorIs(r, process(*d), steadymq.ErrSettled)
			assert.ErrorIs(r, driver.Ack(false), steadymq.ErrSettled)
			return nil
		})
		r.Broker.Publish(rig.Queue, "once")
		r.Wait(time.Second)
		assert.Len(r, r.Broker.Ledger().Settlements, 1, "frames on the wire")
		assert.EqualValues(r, 1, r.Consumer.Stats().Sessions, "the session stays")
	})
}

// Such a Delivery has no fence and no broker.
func TestDeliveryThatNobodyDeliveredRefusesToSettle(t *testing.T) {
	d := &steadymq.Delivery{Delivery: amqp.Delivery{Body: []byte("x")}}
	require.ErrorContains(t, d.Ack(), "NewDelivery")
	assert.Equal(t, steadymq.Unsettled, d.Outcome())
	assert.Zero(t, d.Session())
	assert.Empty(t, d.Queue())
	assert.Empty(t, d.Host())
}
