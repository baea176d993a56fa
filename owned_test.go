package steadymq_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
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

// events is a queue for what is published to the fanout exchange of that name.
var events = steadymq.Queue{Type: "classic", Exclusive: true, Bindings: []steadymq.Binding{{Exchange: "events"}}}

// subscribed runs a consumer of a queue that the broker names, and waits for its first session.
func (b *bench) subscribed(h steadymq.Handler, opts ...steadymq.Option) {
	b.Helper()
	b.broker.DeclareExchange("events", "fanout")
	b.consumer = b.makeFor("", opts...)
	b.start(h)
	b.wait(100 * time.Millisecond)
	require.Equal(b, steadymq.Consuming, b.consumer.State())
}

func (b *bench) publishEvents(n int) {
	for range n {
		b.broker.PublishExchange("events", "", steadymqtest.Message{Body: []byte("x")})
	}
}

// failChannels closes every channel, n times at the given interval.
func (b *bench) failChannels(n int, every time.Duration) {
	for i := range n {
		b.broker.CloseChannels(406, fmt.Sprint("delivery acknowledgement timed out ", i))
		b.wait(every)
	}
}

// named returns the queues that the broker has named.
func (b *bench) named() (names []string) {
	for _, name := range b.broker.Queues() {
		if strings.HasPrefix(name, "amq.gen-") {
			names = append(names, name)
		}
	}
	return names
}

// counting is a handler that counts.
func counting(n *atomic.Int32) steadymq.Handler {
	return func(context.Context, *steadymq.Delivery) error {
		n.Add(1)
		return nil
	}
}

func TestServerNamedQueueIsConsumedAgainOnItsConnection(t *testing.T) {
	bubble(t, func(b *bench) {
		var handled atomic.Int32
		release := make(chan struct{})
		b.subscribed(func(ctx context.Context, d *steadymq.Delivery) error {
			select {
			case <-release:
				handled.Add(1)
			case <-ctx.Done():
			}
			return nil
		}, steadymq.WithQueue(events))
		before := b.named()
		require.Len(b, before, 1)
		b.publishEvents(10)
		b.failChannels(1, 0)
		b.publishEvents(1) // while nobody consumes
		b.wait(time.Second)
		assert.Equal(b, before, b.named())
		assert.Equal(b, before[0], b.lastChange().Queue)
		close(release)
		b.wait(time.Minute)
		assert.EqualValues(b, 11, handled.Load())
		assert.EqualValues(b, 1, b.consumer.Stats().Connections)
	})
}

func TestServerNamedQueuesDoNotPileUp(t *testing.T) {
	for name, failures := range map[string]struct {
		n     int
		every time.Duration
	}{
		"116 in an hour":  {116, 31 * time.Second},
		"10 in 10 s":      {10, time.Second},
		"50 in a second":  {50, 20 * time.Millisecond},
		"100 in a minute": {100, 600 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				var handled atomic.Int32
				b.subscribed(counting(&handled), steadymq.WithQueue(events))
				before := b.named()
				for range failures.n {
					b.publishEvents(1)
					b.failChannels(1, 0)
					b.publishEvents(1)
					b.wait(failures.every)
					require.Equal(b, before, b.named())
				}
				b.wait(11 * time.Second)
				assert.EqualValues(b, 1, b.consumer.Stats().Connections)
				assert.Zero(b, b.broker.QueueLen(before[0])+b.broker.Unsettled(before[0]))
				assert.GreaterOrEqual(b, int(handled.Load()), 2*failures.n, "each message is handled")
			})
		})
	}
}

func TestServerNamedQueueThatIsDeletedIsDeclaredAnewAtOnce(t *testing.T) {
	for name, strike := range map[string]func(b *bench, queue string){
		"while consuming":         func(b *bench, queue string) { b.broker.DeleteQueue(queue) },
		"as the channel fails":    func(b *bench, queue string) { b.failChannels(1, 0); b.broker.DeleteQueue(queue) },
		"as the consumer is gone": func(b *bench, queue string) { b.broker.CancelConsumers(queue); b.broker.DeleteQueue(queue) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				var handled atomic.Int32
				b.subscribed(counting(&handled), steadymq.WithQueue(events))
				b.wait(time.Minute)
				before := b.named()
				strike(b, before[0])
				b.wait(50 * time.Millisecond)
				assert.Equal(b, steadymq.Consuming, b.consumer.State())
				after := b.named()
				require.Len(b, after, 1)
				assert.NotEqual(b, before, after)
				b.publishEvents(3)
				b.wait(50 * time.Millisecond)
				assert.EqualValues(b, 3, handled.Load())
				assert.EqualValues(b, 1, b.consumer.Stats().Connections)
				assert.Len(b, b.causes(), 1)
			})
		})
	}
}

func TestQueueThatGoesJustBeforeTheConsumeIsDeclaredAnewAtOnce(t *testing.T) {
	for name, queueName := range map[string]string{"named by the broker": "", "named by us": "mine"} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				var handled atomic.Int32
				var strike atomic.Bool
				dial := func(ctx context.Context, network, address string) (net.Conn, error) {
					c, err := b.broker.Dialer()(ctx, network, address)
					return beforeConsume{c, func() {
						if strike.Swap(false) {
							b.broker.DeleteQueue(b.consumerQueue(queueName))
						}
					}}, err
				}
				b.broker.DeclareExchange("events", "fanout")
				b.consumer = b.makeFor(queueName, steadymq.WithQueue(events), steadymq.WithDialer(dial))
				b.start(counting(&handled))
				b.wait(time.Minute)
				count := len(b.broker.Queues())
				strike.Store(true)
				b.failChannels(1, 80*time.Millisecond)
				require.False(b, strike.Load())
				assert.Equal(b, steadymq.Consuming, b.consumer.State())
				assert.Len(b, b.broker.Queues(), count)
				b.publishEvents(1)
				b.wait(time.Second)
				assert.EqualValues(b, 1, handled.Load())
				assert.Len(b, b.causes(), 1)
			})
		})
	}
}

func (b *bench) consumerQueue(given string) string {
	if given != "" {
		return given
	}
	return b.named()[0]
}

// beforeConsume is a connection that calls before it sends a basic.consume.
type beforeConsume struct {
	net.Conn
	call func()
}

func (c beforeConsume) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte{0, 60, 0, 20}) {
		c.call()
	}
	return c.Conn.Write(p)
}

func TestHandlersOfACancelledSessionSettleBesideTheNextOneOfTheSameQueue(t *testing.T) {
	bubble(t, func(b *bench) {
		started, release := make(chan *steadymq.Delivery, 10), make(chan struct{})
		b.subscribed(hold(started, release), steadymq.WithQueue(events), steadymq.WithConcurrency(2))
		before := b.named()
		b.publishEvents(1)
		<-started
		b.broker.CancelConsumers("")
		b.wait(time.Second)
		b.publishEvents(1)
		<-started
		assert.Equal(b, before, b.named())
		close(release)
		b.wait(time.Second)
		stats := b.consumer.Stats()
		assert.EqualValues(b, 2, stats.Acked)
		assert.Zero(b, stats.Stale)
		assert.EqualValues(b, 1, stats.Connections)
		assert.EqualValues(b, 2, stats.Delivered)
	})
}

func TestServerNamedQueueIsDeclaredAnewOnANewConnection(t *testing.T) {
	bubble(t, func(b *bench) {
		var handled atomic.Int32
		b.subscribed(counting(&handled), steadymq.WithQueue(events))
		for i := range 3 {
			b.broker.CloseConnections(320, "shutdown")
			b.wait(2 * time.Second)
			require.Len(b, b.named(), 1)
			b.publishEvents(1)
			b.wait(time.Second)
			require.EqualValues(b, i+1, handled.Load())
		}
	})
}

func TestNoQueueOfTheBrokersNamingIsLeftAfterRun(t *testing.T) {
	bubble(t, func(b *bench) {
		var handled atomic.Int32
		b.subscribed(counting(&handled), steadymq.WithQueue(events))
		for i := range 3 {
			b.failChannels(2, time.Second)
			require.NoError(b, b.stop())
			require.Empty(b, b.named())
			b.start(counting(&handled))
			b.wait(time.Second)
			b.publishEvents(1)
			b.wait(time.Second)
			require.EqualValues(b, i+1, handled.Load())
		}
	})
}

func TestAutoDeleteQueueThatWentWithItsConsumerIsDeclaredAnewAtOnce(t *testing.T) {
	for name, queueName := range map[string]string{"named by the broker": "", "named by us": "mine"} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.DeclareExchange("events", "fanout")
				var handled atomic.Int32
				own := events
				own.AutoDelete = true
				b.consumer = b.makeFor(queueName, steadymq.WithQueue(own))
				b.start(counting(&handled))
				b.wait(time.Minute)
				count := len(b.broker.Queues())
				b.failChannels(1, 50*time.Millisecond)
				assert.Equal(b, steadymq.Consuming, b.consumer.State())
				assert.Len(b, b.broker.Queues(), count)
				b.publishEvents(1)
				b.wait(time.Second)
				assert.EqualValues(b, 1, handled.Load())
			})
		})
	}
}

func TestMissingExchangeLeavesOneQueue(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consumer = b.makeFor("", steadymq.WithQueue(events))
		b.start(ack)
		for range 600 {
			b.wait(time.Second)
			require.Len(b, b.named(), 1)
		}
		assert.EqualValues(b, 1, b.consumer.Stats().Connections)
	})
}

func TestQueueThatCannotBeBoundYetIsDeclaredOnce(t *testing.T) {
	bubble(t, func(b *bench) {
		var handled atomic.Int32
		b.consumer = b.makeFor("", steadymq.WithQueue(events))
		b.start(counting(&handled))
		b.wait(time.Minute) // the exchange is missing
		b.broker.DeclareExchange("events", "fanout")
		b.wait(6 * time.Second)
		b.publishEvents(1)
		b.wait(time.Second)
		assert.EqualValues(b, 1, handled.Load(), "it is bound")
		require.Len(b, b.named(), 1)
	})
}

func TestFailuresDoNotReplaceAConnectionThatOwnsItsQueue(t *testing.T) {
	for name, queueName := range map[string]string{"named by the broker": "", "named by us": "mine"} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.DeclareExchange("events", "fanout")
				var handled atomic.Int32
				b.consumer = b.makeFor(queueName, steadymq.WithQueue(events))
				b.start(counting(&handled))
				b.wait(100 * time.Millisecond)
				for range 5 {
					b.failChannels(1, 0)
					b.publishEvents(1)
					b.wait(2 * time.Second)
				}
				b.wait(10 * time.Second)
				assert.EqualValues(b, 5, handled.Load())
				assert.EqualValues(b, 1, b.consumer.Stats().Connections)
			})
		})
	}
}

func TestFailuresReplaceAConnectionThatOwnsNothing(t *testing.T) {
	for name, q := range map[string]steadymq.Queue{"shared": {Type: "classic"}, "auto-delete": {Type: "classic", AutoDelete: true}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.consumer = b.makeFor("shared", steadymq.WithQueue(q))
				b.start(ack)
				b.wait(100 * time.Millisecond)
				b.failChannels(3, 2*time.Second)
				assert.EqualValues(b, 2, b.consumer.Stats().Connections)
			})
		})
	}
}

// A TopologyFunc.

// serverNames lets the broker name a queue each time it is called, and counts that.
func serverNames(calls *atomic.Int32) steadymq.Option {
	return steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
		calls.Add(1)
		q, err := ch.QueueDeclare("", true, false, true, false, amqp.Table{"x-queue-type": "classic"})
		if err != nil {
			return "", err
		}
		return q.Name, ch.QueueBind(q.Name, "", "events", false, nil)
	})
}

func TestTopologyThatNamesAnotherQueueGetsAnotherConnection(t *testing.T) {
	bubble(t, func(b *bench) {
		var calls, handled atomic.Int32
		b.subscribed(counting(&handled), serverNames(&calls))
		for i := range 5 {
			b.wait(time.Minute)
			b.failChannels(1, 100*time.Millisecond)
			require.Equal(b, steadymq.Consuming, b.consumer.State())
			require.Len(b, b.named(), 1)
			b.publishEvents(1)
			b.wait(time.Second)
			require.EqualValues(b, i+1, handled.Load())
		}
		assert.EqualValues(b, 11, calls.Load(), "one that is in vain for each failure")
		assert.EqualValues(b, 6, b.consumer.Stats().Connections)
		assert.Len(b, b.causes(), 5, "the failures of the channel, and no others")
		assert.Equal(b, 1, strings.Count(b.log.String(), "the topology function names another queue"))
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, c := range b.changes {
			assert.NotEqual(b, c.From, c.To, "no change that is none")
		}
	})
}

func TestTopologyThatNamesAnotherQueueIsNoHotLoop(t *testing.T) {
	bubble(t, func(b *bench) {
		var calls atomic.Int32
		b.subscribed(ack, serverNames(&calls))
		for range 12000 { // every session of a minute is lost at once
			if b.consumer.State() == steadymq.Consuming {
				b.failChannels(1, 0)
			}
			b.wait(5 * time.Millisecond)
		}
		assert.Greater(b, int(calls.Load()), 10)
		assert.LessOrEqual(b, int(calls.Load()), 80)
		b.wait(11 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.Len(b, b.named(), 1)
	})
}

func TestTopologyThatNamesAnotherQueueLeavesHandlersOfACancelledSessionAlone(t *testing.T) {
	bubble(t, func(b *bench) {
		var calls atomic.Int32
		started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
		b.subscribed(hold(started, release), serverNames(&calls))
		b.publishEvents(1)
		<-started
		b.broker.CancelConsumers("")
		b.wait(10 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.Equal(b, 2, b.open())
		close(release)
		b.wait(time.Second)
		assert.EqualValues(b, 1, b.consumer.Stats().Acked)
		assert.Equal(b, 1, b.open())
		assert.Len(b, b.named(), 1)
	})
}

func TestTopologyThatNamesTheSameQueueStaysOnItsConnection(t *testing.T) {
	declared := func(_ context.Context, ch *amqp.Channel) (string, error) {
		q, err := ch.QueueDeclare("mine", true, false, true, false, nil)
		return q.Name, err
	}
	for name, topology := range map[string]steadymq.TopologyFunc{
		"a name":             declared,
		"the one of New":     func(context.Context, *amqp.Channel) (string, error) { return "", nil },
		"New's, said or not": alternately("", queue),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.consuming(ack, steadymq.WithTopology(topology))
				b.failChannels(10, 31*time.Second)
				assert.EqualValues(b, 1, b.consumer.Stats().Connections)
				assert.EqualValues(b, 11, b.consumer.Stats().Sessions)
			})
		})
	}
}

func alternately(names ...string) steadymq.TopologyFunc {
	var calls int
	return func(context.Context, *amqp.Channel) (string, error) {
		calls++
		return names[calls%len(names)], nil
	}
}

func TestTopologyThatFailedFirstLeavesNoQueueBehind(t *testing.T) {
	bubble(t, func(b *bench) {
		var calls atomic.Int32
		b.consumer = b.makeFor("", serverNames(&calls))
		b.start(ack)
		b.wait(100 * time.Millisecond) // it has failed once, for the exchange is missing
		b.broker.DeclareExchange("events", "fanout")
		b.wait(6 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.Len(b, b.named(), 1)
	})
}

// It may have let the broker name a queue each time, before it failed.
func TestTopologyThatFailsLeavesFewQueuesBehind(t *testing.T) {
	bubble(t, func(b *bench) {
		var calls, handled atomic.Int32
		b.consumer = b.makeFor("", serverNames(&calls))
		b.start(counting(&handled))
		for range 600 {
			b.wait(time.Second)
			require.LessOrEqual(b, len(b.named()), 3) // the exchange is missing
		}
		b.broker.DeclareExchange("events", "fanout")
		b.wait(6 * time.Second)
		b.publishEvents(1)
		b.wait(time.Second)
		assert.EqualValues(b, 1, handled.Load())
	})
}
