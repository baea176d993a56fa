package steadymq_test

import (
	"context"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
)

// A flag of its own would let each copy write a frame with the same tag, and the
// broker closes the channel by 406.
func TestCopiesOfADeliverySettleOnce(t *testing.T) {
	bubble(t, func(b *bench) {
		process := func(d steadymq.Delivery) error { return d.Ack() }
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			driver := d.Delivery
			copied := *d
			copied.DeliveryTag = 99 // the copy's own business
			assert.NoError(b, process(copied))
			assert.Equal(b, steadymq.Acked, d.Outcome())
			assert.ErrorIs(b, process(*d), steadymq.ErrSettled)
			assert.ErrorIs(b, driver.Ack(false), steadymq.ErrSettled)
			return nil
		})
		b.broker.Publish(queue, "once")
		b.wait(time.Second)
		assert.Len(b, b.broker.Ledger().Settlements, 1, "frames on the wire")
		assert.EqualValues(b, 1, b.consumer.Stats().Sessions, "the session stays")
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
