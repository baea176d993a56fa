package behaviour_test

import (
	"context"
	"errors"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
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
			rig.Bubble(t, func(r *rig.Rig) {
				var refusal, told error
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if !d.Redelivered {
						refusal = settle(d)
					}
					return nil
				}, steadymq.WithHooks(steadymq.Hooks{HandlerFailed: func(_ *steadymq.Delivery, err error) { told = err }}))
				r.Broker.Publish(rig.Queue, "tea")
				r.Wait(100 * time.Millisecond)
				require.Error(r, refusal)
				require.ErrorIs(r, told, refusal)
				assert.Equal(r, 1, r.Consumer.Stats().Held)
				assert.Len(r, r.Log.Lines("handler failed", "refused", "retry_in="), 1)
				r.Wait(3 * time.Second)
				n := r.Consumer.Stats()
				assert.Equal(r, []uint64{1, 1, 1}, []uint64{n.Failed, n.Requeued, n.Acked})
			})
		})
	}
}

func TestHandlerThatSettlesAfterARefusalIsRespected(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if errors.Is(d.Nack(true, false), steadymq.ErrMultiple) {
				return d.Discard()
			}
			return nil
		})
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		n := r.Consumer.Stats()
		assert.Equal(r, []uint64{0, 1}, []uint64{n.Failed, n.Discarded})
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
