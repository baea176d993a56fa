package steadymq_test

import (
	"context"
	"errors"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
)

// Handlers that settle by hand as with the driver, and look at no error.
var refusedByHand = map[string]func(d *steadymq.Delivery) error{
	"nack of several": func(d *steadymq.Delivery) error { return d.Nack(true, true) },
	"ack of several":  func(d *steadymq.Delivery) error { return d.Delivery.Ack(true) },
	"another tag": func(d *steadymq.Delivery) error {
		d.DeliveryTag++
		return d.Reject(true)
	},
}

func TestHandlerWhoseSettlementWasRefusedHasFailed(t *testing.T) {
	for name, settle := range refusedByHand {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				var refusal, told error
				b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if !d.Redelivered {
						refusal = settle(d)
					}
					return nil
				}, steadymq.WithHooks(steadymq.Hooks{HandlerFailed: func(_ *steadymq.Delivery, err error) { told = err }}))
				b.broker.Publish(queue, "tea")
				b.wait(100 * time.Millisecond)
				require.Error(b, refusal)
				require.ErrorIs(b, told, refusal)
				assert.Equal(b, 1, b.consumer.Stats().Held)
				assert.Len(b, b.log.lines("handler failed", "refused", "retry_in="), 1)
				b.wait(3 * time.Second)
				n := b.consumer.Stats()
				assert.Equal(b, []uint64{1, 1, 1}, []uint64{n.Failed, n.Requeued, n.Acked})
			})
		})
	}
}

func TestHandlerThatSettlesAfterARefusalIsRespected(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if errors.Is(d.Nack(true, false), steadymq.ErrMultiple) {
				return d.Discard()
			}
			return nil
		})
		b.broker.Publish(queue, "tea")
		b.wait(time.Second)
		n := b.consumer.Stats()
		assert.Equal(b, []uint64{0, 1}, []uint64{n.Failed, n.Discarded})
	})
}

func TestInvokeTellsOfASettlementThatWasRefused(t *testing.T) {
	for name, settle := range refusedByHand {
		t.Run(name, func(t *testing.T) {
			var refusal error
			o, err := steadymq.Invoke(t.Context(), func(_ context.Context, d *steadymq.Delivery) error {
				refusal = settle(d)
				return nil
			}, steadymq.NewDelivery(amqp.Delivery{DeliveryTag: 7}))
			require.ErrorIs(t, err, refusal)
			assert.Equal(t, steadymq.Requeued, o)
		})
	}
}

func TestInvokeRefusesADeliveryThatNewDeliveryDidNotMake(t *testing.T) {
	for name, d := range map[string]*steadymq.Delivery{"nil": nil, "a literal": {}} {
		t.Run(name, func(t *testing.T) {
			o, err := steadymq.Invoke(t.Context(), func(context.Context, *steadymq.Delivery) error {
				t.Error("called")
				return nil
			}, d)
			require.ErrorContains(t, err, "NewDelivery")
			assert.Equal(t, steadymq.Unsettled, o)
		})
	}
}
