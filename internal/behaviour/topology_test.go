package behaviour_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// A channel like that looks healthy: it delivers, and its acks are lost without a word.
func TestTopologyFunctionThatMakesTheChannelTransactionalIsRefused(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var mended atomic.Bool
		r.Broker.Publish(rig.Queue, "tea")
		r.Run(rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			if mended.Load() {
				return rig.Queue, nil
			}
			return rig.Queue, ch.Tx()
		}))
		r.Wait(time.Minute)
		assert.Zero(r, r.Consumer.Stats().Delivered)
		require.NotEmpty(r, r.Causes())
		assert.Less(r, len(r.Causes()), 40)
		for _, cause := range r.Causes() {
			var at *steadymq.SessionError
			require.ErrorAs(r, cause, &at)
			assert.Equal(r, "topology", at.Op)
			assert.ErrorContains(r, cause, "WithTopology: the function has made the channel transactional")
		}
		mended.Store(true)
		r.Wait(time.Minute)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
	})
}

// It is forbidden. Refused, its messages would be taken back with every try, and counted by a
// delivery limit; so it is told, and costs no more than what it has taken.
func TestTopologyFunctionThatConsumesIsToldOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			_, err := ch.Consume(rig.Queue, "", false, false, false, false, nil)
			return rig.Queue, err
		}))
		r.Wait(time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		r.Broker.Publish(rig.Queue, "a", "b", "c", "d")
		r.Wait(time.Second)
		assert.EqualValues(r, 2, r.Consumer.Stats().Acked, "its own")
		assert.Equal(r, 2, r.Broker.Unsettled(rig.Queue))
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Equal(r, 1, strings.Count(r.Log.String(), "has consumed on the session's channel"))
		assert.Contains(r, r.Log.String(), "queue=orders")
	})
}

func TestQueueThatAMQPCannotCarryIsNotSent(t *testing.T) {
	for reason, name := range map[string]string{"has 256 bytes": strings.Repeat("q", 256), "is no UTF-8": "\xff"} {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Run(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return name, nil }))
			r.Wait(time.Minute)
			require.NotEmpty(r, r.Causes())
			for _, cause := range r.Causes() {
				assert.ErrorContains(r, cause, "WithTopology: the queue's name "+reason)
			}
		})
	}
}

// What a session asks for while it is set up shares the socket with acks of the one before.
func TestTopologyFunctionThatPublishesDisturbsNoAck(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		const messages = 40
		r.Broker.DeclareQueue("large", steadymqtest.QueueOptions{})
		setUp := make(chan struct{}, 1)
		topology := func(ctx context.Context, ch *amqp.Channel) (string, error) {
			if err := ch.Confirm(false); err != nil {
				return "", err
			}
			setUp <- struct{}{}
			for range messages {
				confirm, err := ch.PublishWithDeferredConfirmWithContext(ctx, "", "large", true, false, amqp.Publishing{Body: make([]byte, 1<<20)})
				if err != nil {
					return "", err
				}
				if ok, err := confirm.WaitContext(ctx); err != nil || !ok {
					return "", errors.Join(err, errors.New("not confirmed"))
				}
			}
			return rig.Queue, nil
		}
		r.Run(func(_ context.Context, d *steadymq.Delivery) error {
			if d.Session() == 1 {
				<-setUp // of the next
				setUp <- struct{}{}
				time.Sleep(time.Duration(d.DeliveryTag) * time.Millisecond)
			}
			return nil
		}, steadymq.WithTopology(topology), steadymq.WithConcurrency(messages))
		r.Wait(time.Second)
		<-setUp
		r.Broker.Publish(rig.Queue, make([]string, messages)...)
		r.Wait(time.Second)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(time.Second)
		r.Broker.Publish(rig.Queue, "for the next")
		r.Wait(time.Second)
		assert.EqualValues(r, 2, r.Consumer.Stats().Sessions)
		assert.EqualValues(r, messages+1, r.Consumer.Stats().Acked)
		assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
		assert.Equal(r, 2*messages, r.Broker.QueueLen("large"))
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
	})
}
