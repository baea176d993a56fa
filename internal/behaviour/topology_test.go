package behaviour_test

import (
	"context"
	"errors"
	"log/slog"
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

// The broker repeats the names of queues in what it says.
func TestQueueNamedLikeARefusalIsNotTakenAsItIs(t *testing.T) {
	const name = "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue "
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue(name, steadymqtest.QueueOptions{Type: "quorum", Args: map[string]any{"x-message-ttl": int32(1), "x-delivery-limit": int32(-1)}})
		c, err := steadymq.New(r.Broker.URL, name, steadymq.WithQueue(steadymq.Queue{}), steadymq.WithDialer(r.Broker.Dialer()),
			steadymq.WithLogger(slog.New(slog.DiscardHandler)))
		require.NoError(r, err)
		r.Consumer = c
		r.Start(rig.Ack)
		r.Wait(time.Second)
		assert.NotEqual(r, steadymq.Consuming, r.Consumer.State(), "its time to live is another one")
	})
}

// What an operator has to mend is named by what was declared.
func TestRefusedDeclarationNamesWhatWasDeclared(t *testing.T) {
	for reason, c := range map[string]struct {
		queue  steadymq.Queue
		before func(r *rig.Rig)
	}{
		`: exchange "events": `: {
			steadymq.Queue{Exchange: &steadymq.Exchange{Name: "events", Kind: "topic"}, Bindings: []steadymq.Binding{{Key: "k"}}},
			func(r *rig.Rig) { r.Broker.DeclareExchange("events", "fanout") },
		},
		`: binding to exchange "nowhere": `: {
			steadymq.Queue{Type: "classic", Bindings: []steadymq.Binding{{Exchange: "nowhere"}}},
			func(r *rig.Rig) { r.Broker.DeleteQueue(rig.Queue) },
		},
		`: dead-letter queue "amq.dead": `: {
			steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "amq.dead"}},
			func(r *rig.Rig) { r.Broker.DeleteQueue(rig.Queue) },
		},
	} {
		t.Run(reason, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				c.before(r)
				r.Run(rig.Ack, steadymq.WithQueue(c.queue), steadymq.WithFatal(func(error) bool { return true }))
				r.Wait(time.Minute)
				err := r.Stop()
				var said *amqp.Error
				require.ErrorAs(r, err, &said)
				assert.ErrorContains(r, err, reason)
				assert.ErrorContains(r, err, rig.Queue)
			}, steadymqtest.WithVersion(4, 0))
		})
	}
}

func TestTopologyThatNamesNoQueueIsToldSo(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c, err := steadymq.New(r.Broker.URL, "", steadymq.WithDialer(r.Broker.Dialer()),
			steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "", nil }),
			steadymq.WithFatal(func(error) bool { return true }))
		require.NoError(r, err)
		assert.ErrorContains(r, c.Run(r.Context(), rig.Ack), "the topology function returned none and New was given none")
		assert.Empty(r, c.Queue())
	})
}

func TestTopologyRunsForEverySessionAndMayPanic(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var calls atomic.Int32
		r.Run(rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			if calls.Add(1) == 1 {
				panic("first time")
			}
			q, err := ch.QueueDeclare("", false, true, true, false, nil)
			return q.Name, err
		}))
		r.Wait(5 * time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.ErrorContains(r, r.Causes()[0], "first time")
		r.Broker.Reset()
		r.Wait(5 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.EqualValues(r, 4, calls.Load(), "one more on a new connection, for the first may have left a queue behind")
	})
}
