package behaviour_test

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
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// events is a queue for what is published to the fanout exchange of that name.
var events = steadymq.Queue{Type: "classic", Exclusive: true, Bindings: []steadymq.Binding{{Exchange: "events"}}}

// subscribed runs a consumer of a queue that the broker names, and waits for its first session.
func subscribed(r *rig.Rig, h steadymq.Handler, opts ...steadymq.Option) {
	r.Helper()
	r.Broker.DeclareExchange("events", "fanout")
	r.Consumer = r.NewFor("", opts...)
	r.Start(h)
	r.Wait(100 * time.Millisecond)
	require.Equal(r, steadymq.Consuming, r.Consumer.State())
}

func publishEvents(r *rig.Rig, n int) {
	for range n {
		r.Broker.PublishExchange("events", "", steadymqtest.Message{Body: []byte("x")})
	}
}

// failChannels closes every channel, n times at the given interval.
func failChannels(r *rig.Rig, n int, every time.Duration) {
	for i := range n {
		r.Broker.CloseChannels(406, fmt.Sprint("delivery acknowledgement timed out ", i))
		r.Wait(every)
	}
}

// namedByBroker returns the queues that the broker has named.
func namedByBroker(r *rig.Rig) (names []string) {
	for _, name := range r.Broker.Queues() {
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
	rig.Bubble(t, func(r *rig.Rig) {
		var handled atomic.Int32
		release := make(chan struct{})
		subscribed(r, func(ctx context.Context, d *steadymq.Delivery) error {
			select {
			case <-release:
				handled.Add(1)
			case <-ctx.Done():
			}
			return nil
		}, steadymq.WithQueue(events))
		before := namedByBroker(r)
		require.Len(r, before, 1)
		publishEvents(r, 10)
		failChannels(r, 1, 0)
		publishEvents(r, 1) // while nobody consumes
		r.Wait(time.Second)
		assert.Equal(r, before, namedByBroker(r))
		assert.Equal(r, before[0], r.LastChange().Queue)
		close(release)
		r.Wait(time.Minute)
		assert.EqualValues(r, 11, handled.Load())
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
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
			rig.Bubble(t, func(r *rig.Rig) {
				var handled atomic.Int32
				subscribed(r, counting(&handled), steadymq.WithQueue(events))
				before := namedByBroker(r)
				for range failures.n {
					publishEvents(r, 1)
					failChannels(r, 1, 0)
					publishEvents(r, 1)
					r.Wait(failures.every)
					require.Equal(r, before, namedByBroker(r))
				}
				r.Wait(11 * time.Second)
				assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
				assert.Zero(r, r.Broker.QueueLen(before[0])+r.Broker.Unsettled(before[0]))
				assert.GreaterOrEqual(r, int(handled.Load()), 2*failures.n, "each message is handled")
			})
		})
	}
}

func TestServerNamedQueueThatIsDeletedIsDeclaredAnewAtOnce(t *testing.T) {
	for name, strike := range map[string]func(r *rig.Rig, queue string){
		"while consuming":         func(r *rig.Rig, queue string) { r.Broker.DeleteQueue(queue) },
		"as the channel fails":    func(r *rig.Rig, queue string) { failChannels(r, 1, 0); r.Broker.DeleteQueue(queue) },
		"as the consumer is gone": func(r *rig.Rig, queue string) { r.Broker.CancelConsumers(queue); r.Broker.DeleteQueue(queue) },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var handled atomic.Int32
				subscribed(r, counting(&handled), steadymq.WithQueue(events))
				r.Wait(time.Minute)
				before := namedByBroker(r)
				strike(r, before[0])
				r.Wait(50 * time.Millisecond)
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
				after := namedByBroker(r)
				require.Len(r, after, 1)
				assert.NotEqual(r, before, after)
				publishEvents(r, 3)
				r.Wait(50 * time.Millisecond)
				assert.EqualValues(r, 3, handled.Load())
				assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
				assert.Len(r, r.Causes(), 1)
			})
		})
	}
}

func TestQueueThatGoesJustBeforeTheConsumeIsDeclaredAnewAtOnce(t *testing.T) {
	for name, queueName := range map[string]string{"named by the broker": "", "named by us": "mine"} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var handled atomic.Int32
				var strike atomic.Bool
				dial := func(ctx context.Context, network, address string) (net.Conn, error) {
					c, err := r.Broker.Dialer()(ctx, network, address)
					return beforeConsume{c, func() {
						if strike.Swap(false) {
							r.Broker.DeleteQueue(consumerQueue(r, queueName))
						}
					}}, err
				}
				r.Broker.DeclareExchange("events", "fanout")
				r.Consumer = r.NewFor(queueName, steadymq.WithQueue(events), steadymq.WithDialer(dial))
				r.Start(counting(&handled))
				r.Wait(time.Minute)
				count := len(r.Broker.Queues())
				strike.Store(true)
				failChannels(r, 1, 80*time.Millisecond)
				require.False(r, strike.Load())
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
				assert.Len(r, r.Broker.Queues(), count)
				publishEvents(r, 1)
				r.Wait(time.Second)
				assert.EqualValues(r, 1, handled.Load())
				assert.Len(r, r.Causes(), 1)
			})
		})
	}
}

func consumerQueue(r *rig.Rig, given string) string {
	if given != "" {
		return given
	}
	return namedByBroker(r)[0]
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
	rig.Bubble(t, func(r *rig.Rig) {
		started, release := make(chan *steadymq.Delivery, 10), make(chan struct{})
		subscribed(r, rig.Hold(started, release), steadymq.WithQueue(events), steadymq.WithConcurrency(2))
		before := namedByBroker(r)
		publishEvents(r, 1)
		<-started
		r.Broker.CancelConsumers("")
		r.Wait(time.Second)
		publishEvents(r, 1)
		<-started
		assert.Equal(r, before, namedByBroker(r))
		close(release)
		r.Wait(time.Second)
		stats := r.Consumer.Stats()
		assert.EqualValues(r, 2, stats.Acked)
		assert.Zero(r, stats.Stale)
		assert.EqualValues(r, 1, stats.Connections)
		assert.EqualValues(r, 2, stats.Delivered)
	})
}

func TestServerNamedQueueIsDeclaredAnewOnANewConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var handled atomic.Int32
		subscribed(r, counting(&handled), steadymq.WithQueue(events))
		for i := range 3 {
			r.Broker.CloseConnections(320, "shutdown")
			r.Wait(2 * time.Second)
			require.Len(r, namedByBroker(r), 1)
			publishEvents(r, 1)
			r.Wait(time.Second)
			require.EqualValues(r, i+1, handled.Load())
		}
	})
}

func TestNoQueueOfTheBrokersNamingIsLeftAfterRun(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var handled atomic.Int32
		subscribed(r, counting(&handled), steadymq.WithQueue(events))
		for i := range 3 {
			failChannels(r, 2, time.Second)
			require.NoError(r, r.Stop())
			require.Empty(r, namedByBroker(r))
			r.Start(counting(&handled))
			r.Wait(time.Second)
			publishEvents(r, 1)
			r.Wait(time.Second)
			require.EqualValues(r, i+1, handled.Load())
		}
	})
}

func TestAutoDeleteQueueThatWentWithItsConsumerIsDeclaredAnewAtOnce(t *testing.T) {
	for name, queueName := range map[string]string{"named by the broker": "", "named by us": "mine"} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeclareExchange("events", "fanout")
				var handled atomic.Int32
				own := events
				own.AutoDelete = true
				r.Consumer = r.NewFor(queueName, steadymq.WithQueue(own))
				r.Start(counting(&handled))
				r.Wait(time.Minute)
				count := len(r.Broker.Queues())
				failChannels(r, 1, 50*time.Millisecond)
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
				assert.Len(r, r.Broker.Queues(), count)
				publishEvents(r, 1)
				r.Wait(time.Second)
				assert.EqualValues(r, 1, handled.Load())
			})
		})
	}
}

func TestMissingExchangeLeavesOneQueue(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consumer = r.NewFor("", steadymq.WithQueue(events))
		r.Start(rig.Ack)
		for range 600 {
			r.Wait(time.Second)
			require.Len(r, namedByBroker(r), 1)
		}
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
	})
}

func TestQueueThatCannotBeBoundYetIsDeclaredOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var handled atomic.Int32
		r.Consumer = r.NewFor("", steadymq.WithQueue(events))
		r.Start(counting(&handled))
		r.Wait(time.Minute) // the exchange is missing
		r.Broker.DeclareExchange("events", "fanout")
		r.Wait(6 * time.Second)
		publishEvents(r, 1)
		r.Wait(time.Second)
		assert.EqualValues(r, 1, handled.Load(), "it is bound")
		require.Len(r, namedByBroker(r), 1)
	})
}

func TestFailuresDoNotReplaceAConnectionThatOwnsItsQueue(t *testing.T) {
	for name, queueName := range map[string]string{"named by the broker": "", "named by us": "mine"} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeclareExchange("events", "fanout")
				var handled atomic.Int32
				r.Consumer = r.NewFor(queueName, steadymq.WithQueue(events))
				r.Start(counting(&handled))
				r.Wait(100 * time.Millisecond)
				for range 5 {
					failChannels(r, 1, 0)
					publishEvents(r, 1)
					r.Wait(2 * time.Second)
				}
				r.Wait(10 * time.Second)
				assert.EqualValues(r, 5, handled.Load())
				assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
			})
		})
	}
}

func TestFailuresReplaceAConnectionThatOwnsNothing(t *testing.T) {
	for name, q := range map[string]steadymq.Queue{"shared": {Type: "classic"}, "auto-delete": {Type: "classic", AutoDelete: true}} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consumer = r.NewFor("shared", steadymq.WithQueue(q))
				r.Start(rig.Ack)
				r.Wait(100 * time.Millisecond)
				failChannels(r, 3, 2*time.Second)
				assert.EqualValues(r, 2, r.Consumer.Stats().Connections)
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
	rig.Bubble(t, func(r *rig.Rig) {
		var calls, handled atomic.Int32
		subscribed(r, counting(&handled), serverNames(&calls))
		for i := range 5 {
			r.Wait(time.Minute)
			failChannels(r, 1, 100*time.Millisecond)
			require.Equal(r, steadymq.Consuming, r.Consumer.State())
			require.Len(r, namedByBroker(r), 1)
			publishEvents(r, 1)
			r.Wait(time.Second)
			require.EqualValues(r, i+1, handled.Load())
		}
		assert.EqualValues(r, 11, calls.Load(), "one that is in vain for each failure")
		assert.EqualValues(r, 6, r.Consumer.Stats().Connections)
		assert.Len(r, r.Causes(), 5, "the failures of the channel, and no others")
		assert.Equal(r, 1, strings.Count(r.Log.String(), "the topology function names another queue"))

		for _, c := range r.Changes() {
			assert.NotEqual(r, c.From, c.To, "no change that is none")
		}
	})
}

func TestTopologyThatNamesAnotherQueueIsNoHotLoop(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var calls atomic.Int32
		subscribed(r, rig.Ack, serverNames(&calls))
		for range 12000 { // every session of a minute is lost at once
			if r.Consumer.State() == steadymq.Consuming {
				failChannels(r, 1, 0)
			}
			r.Wait(5 * time.Millisecond)
		}
		assert.Greater(r, int(calls.Load()), 10)
		assert.LessOrEqual(r, int(calls.Load()), 80)
		r.Wait(11 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Len(r, namedByBroker(r), 1)
	})
}

func TestTopologyThatNamesAnotherQueueLeavesHandlersOfACancelledSessionAlone(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var calls atomic.Int32
		started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
		subscribed(r, rig.Hold(started, release), serverNames(&calls))
		publishEvents(r, 1)
		<-started
		r.Broker.CancelConsumers("")
		r.Wait(10 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Equal(r, 2, r.OpenConnections())
		close(release)
		r.Wait(time.Second)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
		assert.Equal(r, 1, r.OpenConnections())
		assert.Len(r, namedByBroker(r), 1)
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
		"New's, said or not": alternately("", rig.Queue),
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack, steadymq.WithTopology(topology))
				failChannels(r, 10, 31*time.Second)
				assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
				assert.EqualValues(r, 11, r.Consumer.Stats().Sessions)
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
	rig.Bubble(t, func(r *rig.Rig) {
		var calls atomic.Int32
		r.Consumer = r.NewFor("", serverNames(&calls))
		r.Start(rig.Ack)
		r.Wait(100 * time.Millisecond) // it has failed once, for the exchange is missing
		r.Broker.DeclareExchange("events", "fanout")
		r.Wait(6 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Len(r, namedByBroker(r), 1)
	})
}

// It may have let the broker name a queue each time, before it failed.
func TestTopologyThatFailsLeavesFewQueuesBehind(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var calls, handled atomic.Int32
		r.Consumer = r.NewFor("", serverNames(&calls))
		r.Start(counting(&handled))
		for range 600 {
			r.Wait(time.Second)
			require.LessOrEqual(r, len(namedByBroker(r)), 3) // the exchange is missing
		}
		r.Broker.DeclareExchange("events", "fanout")
		r.Wait(6 * time.Second)
		publishEvents(r, 1)
		r.Wait(time.Second)
		assert.EqualValues(r, 1, handled.Load())
	})
}

func TestQueueOfTheBrokersNamingIsKeptWhateverElseIsMissing(t *testing.T) { // seed 174
	rig.Bubble(t, func(r *rig.Rig) {
		subscribed(r, rig.Ack, steadymq.WithQueue(events))
		before := namedByBroker(r)
		r.Broker.RefuseConsume(404, "home node 'rabbit@a' of queue '"+before[0]+"' in vhost '/' is down or inaccessible")
		failChannels(r, 1, 0)
		r.Wait(time.Minute)
		assert.Equal(r, before, namedByBroker(r))
		r.Broker.RefuseConsume(0, "")
		r.Wait(10 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Equal(r, before, namedByBroker(r))
	})
}
