package steadymq_test

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
	"github.com/steadymq/steadymq/steadymqtest"
)

// A channel like that looks healthy: it delivers, and its acks are lost without a word.
func TestTopologyFunctionThatMakesTheChannelTransactionalIsRefused(t *testing.T) {
	bubble(t, func(b *bench) {
		var mended atomic.Bool
		b.broker.Publish(queue, "tea")
		b.run(ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			if mended.Load() {
				return queue, nil
			}
			return queue, ch.Tx()
		}))
		b.wait(time.Minute)
		assert.Zero(b, b.consumer.Stats().Delivered)
		require.NotEmpty(b, b.causes())
		assert.Less(b, len(b.causes()), 40)
		for _, cause := range b.causes() {
			var at *steadymq.SessionError
			require.ErrorAs(b, cause, &at)
			assert.Equal(b, "topology", at.Op)
			assert.ErrorContains(b, cause, "WithTopology: the function has made the channel transactional")
		}
		mended.Store(true)
		b.wait(time.Minute)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.Zero(b, b.broker.QueueLen(queue)+b.broker.Unsettled(queue))
	})
}

// It is forbidden. Refused, its messages would be taken back with every try, and counted by a
// delivery limit; so it is told, and costs no more than what it has taken.
func TestTopologyFunctionThatConsumesIsToldOnce(t *testing.T) {
	bubble(t, func(b *bench) {
		b.run(ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			_, err := ch.Consume(queue, "", false, false, false, false, nil)
			return queue, err
		}))
		b.wait(time.Second)
		require.Equal(b, steadymq.Consuming, b.consumer.State())
		b.broker.Publish(queue, "a", "b", "c", "d")
		b.wait(time.Second)
		assert.EqualValues(b, 2, b.consumer.Stats().Acked, "its own")
		assert.Equal(b, 2, b.broker.Unsettled(queue))
		b.broker.Reset()
		b.wait(time.Second)
		assert.Equal(b, 1, strings.Count(b.log.String(), "has consumed on the session's channel"))
		assert.Contains(b, b.log.String(), "queue=orders")
	})
}

func TestQueueThatAMQPCannotCarryIsNotSent(t *testing.T) {
	for reason, name := range map[string]string{"has 256 bytes": strings.Repeat("q", 256), "is no UTF-8": "\xff"} {
		bubble(t, func(b *bench) {
			b.run(ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return name, nil }))
			b.wait(time.Minute)
			require.NotEmpty(b, b.causes())
			for _, cause := range b.causes() {
				assert.ErrorContains(b, cause, "WithTopology: the queue's name "+reason)
			}
		})
	}
}

// What a session asks for while it is set up shares the socket with acks of the one before.
func TestTopologyFunctionThatPublishesDisturbsNoAck(t *testing.T) {
	bubble(t, func(b *bench) {
		const messages = 40
		b.broker.DeclareQueue("large", steadymqtest.QueueOptions{})
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
			return queue, nil
		}
		b.run(func(_ context.Context, d *steadymq.Delivery) error {
			if d.Session() == 1 {
				<-setUp // of the next
				setUp <- struct{}{}
				time.Sleep(time.Duration(d.DeliveryTag) * time.Millisecond)
			}
			return nil
		}, steadymq.WithTopology(topology), steadymq.WithConcurrency(messages))
		b.wait(time.Second)
		<-setUp
		b.broker.Publish(queue, make([]string, messages)...)
		b.wait(time.Second)
		b.broker.CancelConsumers(queue)
		b.wait(time.Second)
		b.broker.Publish(queue, "for the next")
		b.wait(time.Second)
		assert.EqualValues(b, 2, b.consumer.Stats().Sessions)
		assert.EqualValues(b, messages+1, b.consumer.Stats().Acked)
		assert.Zero(b, b.broker.QueueLen(queue)+b.broker.Unsettled(queue))
		assert.Equal(b, 2*messages, b.broker.QueueLen("large"))
		assert.EqualValues(b, 1, b.consumer.Stats().Connections)
	})
}
