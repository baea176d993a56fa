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

// Old handlers settle through the driver's own methods.
func TestDriversOwnSettlementsDecideOnce(t *testing.T) {
	for name, c := range map[string]struct {
		settle func(d amqp.Delivery) error
		want   steadymq.Outcome
	}{
		"Ack":             {func(d amqp.Delivery) error { return d.Ack(false) }, steadymq.Acked},
		"Nack":            {func(d amqp.Delivery) error { return d.Nack(false, false) }, steadymq.Discarded},
		"Reject":          {func(d amqp.Delivery) error { return d.Reject(false) }, steadymq.Discarded},
		"Nack, requeue":   {func(d amqp.Delivery) error { return d.Nack(false, true) }, steadymq.Requeued},
		"Reject, requeue": {func(d amqp.Delivery) error { return d.Reject(true) }, steadymq.Requeued},
		"the Acknowledger": {func(d amqp.Delivery) error {
			return d.Acknowledger.Reject(d.DeliveryTag, false)
		}, steadymq.Discarded},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if d.Redelivered {
						return nil
					}
					assert.NoError(r, c.settle(d.Delivery))
					assert.Equal(r, c.want, d.Outcome())
					assert.Equal(r, "mq1.test:5672", d.Host())
					assert.ErrorIs(r, d.Reject(false), steadymq.ErrSettled)
					assert.ErrorIs(r, d.Ack(), steadymq.ErrSettled)
					return nil
				})
				r.Broker.Publish(rig.Queue, "tea")
				r.Wait(time.Second)
				assert.EqualValues(r, map[bool]int{true: 2, false: 1}[c.want == steadymq.Requeued], r.Consumer.Stats().Delivered)
				assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
			})
		})
	}
}

// acks notes what reaches the Acknowledger of a test.
type acks []string

func (a *acks) Ack(uint64, bool) error        { *a = append(*a, "ack"); return nil }
func (a *acks) Nack(uint64, bool, bool) error { *a = append(*a, "nack"); return nil }
func (a *acks) Reject(_ uint64, requeue bool) error {
	*a = append(*a, map[bool]string{true: "requeue", false: "discard"}[requeue])
	return nil
}

func TestDeliveryOfATestPassesItsSettlementOnOnce(t *testing.T) {
	for want, settle := range map[string]func(d *steadymq.Delivery) error{
		"ack": (*steadymq.Delivery).Ack, "requeue": (*steadymq.Delivery).Requeue, "discard": (*steadymq.Delivery).Discard,
	} {
		var to acks
		d := steadymq.NewDelivery(amqp.Delivery{Acknowledger: &to, DeliveryTag: 7})
		require.NoError(t, settle(d))
		assert.ErrorIs(t, settle(d), steadymq.ErrSettled)
		assert.Equal(t, acks{want}, to)
		assert.Empty(t, d.Host())
		assert.Empty(t, d.Queue())
	}
}
