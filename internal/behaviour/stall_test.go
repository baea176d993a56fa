package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"net"
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

func TestStalledConsumerIsReplaced(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithStallDetector(time.Minute))
		r.Wait(10 * time.Minute)
		require.Empty(r, r.Causes(), "an empty queue is no stall")
		r.Broker.QuorumStall(rig.Queue, true)
		r.Broker.Publish(rig.Queue, "stuck")
		r.Wait(3 * time.Minute)
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "stalled")
		assert.ErrorContains(r, r.Causes()[0], "1 messages")
		r.Broker.QuorumStall(rig.Queue, false)
		r.Wait(3 * time.Minute)
		assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
	})
}

func TestHostThatFellSilentIsTriedLast(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		host := r.Broker.Host(r.HostInUse())
		host.BlackHole(true, true)
		r.Wait(15*time.Second + 500*time.Millisecond) // one and a half heartbeats; a dial to the same host would take 5 s or 15 s more
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.NotEqual(r, host, r.Broker.Host(r.HostInUse()))
	}, steadymqtest.WithHosts(3))
}

func TestStalledConsumerGoesToAnotherHost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, rig.Options(steadymq.WithStallDetector(time.Minute))...)
		was := r.HostInUse()
		r.Broker.QuorumStall(rig.Queue, true)
		r.Broker.Publish(rig.Queue, "m0")
		r.Wait(90 * time.Second)
		require.Len(r, r.Causes(), 1)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.NotEqual(r, was, r.HostInUse())
	}, steadymqtest.WithHosts(3))
}

func TestIdleConsumerBehindASingleActiveOneIsLeftInPeace(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeleteQueue(rig.Queue)
		r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Args: map[string]any{"x-single-active-consumer": true}})
		block := make(chan struct{})
		first := r.New(steadymq.WithPrefetch(1))
		ctx, stop := context.WithCancel(r.Context())
		done := make(chan error, 1)
		go func() {
			done <- first.Run(ctx, func(context.Context, *steadymq.Delivery) error { <-block; return nil })
		}()
		r.Wait(time.Second)
		r.Broker.Publish(rig.Queue, "1", "2", "3")
		r.Consuming(rig.Ack, steadymq.WithStallDetector(10*time.Second))
		r.Wait(10 * time.Minute)
		assert.EqualValues(r, 1, r.Consumer.Stats().Sessions)
		close(block)
		stop()
		require.NoError(r, <-done)
	})
}

func TestBusyConsumerIsNoStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(5 * time.Minute); return nil },
			steadymq.WithPrefetch(1), steadymq.WithStallDetector(10*time.Second))
		r.Broker.Publish(rig.Queue, "1", "2")
		r.Wait(11 * time.Minute)
		assert.EqualValues(r, 1, r.Consumer.Stats().Sessions)
		assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
	})
}

// busyFor is what must not be taken for a stall by a detector of 10 s.
func busyFor(r *rig.Rig, d time.Duration) {
	r.Helper()
	r.Wait(d)
	assert.Empty(r, r.Causes())
	assert.EqualValues(r, 1, r.Consumer.Stats().Sessions)
}

func TestPrefetchFullOfWhatWaitsForAWorkerIsNoStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(5 * time.Minute); return nil },
			steadymq.WithConcurrency(1), steadymq.WithPrefetch(2), steadymq.WithStallDetector(10*time.Second))
		r.Broker.Publish(rig.Queue, "1", "2", "3", "4")
		busyFor(r, 21*time.Minute)
		assert.EqualValues(r, 4, r.Consumer.Stats().Acked)
	})
}

func TestPrefetchFullOfWhatWaitsForItsRequeueIsNoStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "poison" && !d.Redelivered {
				return steadymq.RequeueAfter(errors.New("not yet"), 5*time.Minute)
			}
			return nil
		}, steadymq.WithPrefetch(1), steadymq.WithStallDetector(10*time.Second))
		r.Broker.Publish(rig.Queue, "poison", "2")
		busyFor(r, 6*time.Minute)
		assert.EqualValues(r, 2, r.Consumer.Stats().Acked)
	})
}

func TestBurstAtTheMomentOfTheLookIsNoStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithPrefetch(1), steadymq.WithStallDetector(10*time.Second))

		look := r.Changes()[len(r.Changes())-1].Time.Add(10 * time.Second)

		r.Wait(time.Until(look) + 500*time.Microsecond) // the question is on its way, and takes longer than a delivery
		for range 10 {
			r.Broker.Publish(rig.Queue, "m")
		}
		busyFor(r, time.Minute)
	})
}

func TestQueueThatForgotForAMomentIsNoStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.Host(0).CutOff(true) // it says what RabbitMQ says in an election, too: no messages and no consumers
		r.Consuming(rig.Ack, steadymq.WithStallDetector(10*time.Second))
		r.Wait(12 * time.Second)
		r.Broker.Host(0).CutOff(false)
		busyFor(r, time.Minute)
	})
}

func TestConsumerTheQueueForgotIsReplaced(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.Host(0).CutOff(true) // before the consumer came
		r.Consuming(rig.Ack, steadymq.WithStallDetector(10*time.Second))
		r.Wait(16 * time.Second)
		require.Len(r, r.Causes(), 1)
		assert.ErrorContains(r, r.Causes()[0], "stalled: nothing delivered for 10s and the queue knows of no consumer")
	})
}

func TestConsumerOnAHostThatIsCutOffGoesToAnother(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithStallDetector(10*time.Second))
		r.Wait(time.Minute)
		require.Empty(r, r.Causes(), "an empty queue is no stall, wherever one asks")
		was := r.HostInUse()
		r.Broker.Host(was).CutOff(true)
		r.Broker.Publish(rig.Queue, "1", "2", "3")
		r.Wait(26 * time.Second)
		require.Len(r, r.Causes(), 1)
		assert.ErrorContains(r, r.Causes()[0], "stalled")
		assert.ErrorContains(r, r.Causes()[0], "cut off")
		assert.NotEqual(r, was, r.HostInUse())
		assert.EqualValues(r, 3, r.Consumer.Stats().Acked)
		r.Wait(10 * time.Minute)
		assert.Len(r, r.Causes(), 1, "the host that is cut off does not overrule the others")
	}, steadymqtest.WithHosts(3))
}

func TestAHostThatIsCutOffDoesNotOverruleTheOthers(t *testing.T) {
	for _, hosts := range []int{2, 3} {
		t.Run(fmt.Sprint(hosts, " hosts"), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				block := make(chan struct{})
				r.Consuming(func(context.Context, *steadymq.Delivery) error { <-block; return nil },
					steadymq.WithPrefetch(1), steadymq.WithStallDetector(10*time.Second))
				r.Broker.Publish(rig.Queue, "1", "2", "3")
				r.Wait(time.Second)
				other := r.Broker.Host((r.HostInUse() + 1) % hosts)
				other.CutOff(true) // and goes on saying that two messages wait
				close(block)
				busyFor(r, 10*time.Minute)
				assert.EqualValues(r, 3, r.Consumer.Stats().Acked)
			}, steadymqtest.WithHosts(hosts))
		})
	}
}

func TestHostsThatDoNotAnswerAreNoStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithStallDetector(10*time.Second))
		was := r.HostInUse()
		r.Broker.Host((was+1)%3).HangAt(steadymqtest.StageDeclare, true)
		r.Broker.Host((was + 2) % 3).Refuse(true)
		busyFor(r, 10*time.Minute)
	}, steadymqtest.WithHosts(3))
}

// streamUnderDetector is a consumer of a stream under a detector of 10 s.
func streamUnderDetector(r *rig.Rig, h steadymq.Handler, options ...steadymq.Option) {
	r.Helper()
	r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
	r.Consuming(h, append(append(streamOptions("first"), steadymq.WithStallDetector(10*time.Second)), options...)...)
}

func TestStreamThatGrowsWithoutADeliveryIsAStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		streamUnderDetector(r, rig.Ack)
		r.Broker.Publish("log", "1", "2", "3")
		busyFor(r, 10*time.Minute) // a stream keeps its messages: that it has some is no stall
		r.Broker.QuorumStall("log", true)
		for range 36 {
			r.Broker.Publish("log", "more")
			r.Wait(time.Second)
		}
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "stalled: nothing delivered for 10s though the stream has grown")
		r.Broker.QuorumStall("log", false)
		r.Wait(10 * time.Second)
		assert.EqualValues(r, 39, r.Consumer.Stats().Acked)
	})
}

// What a handler is given is progress, also if it settles nothing: these are held.
func TestHandlersThatBeginAreNoStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(context.Context, *steadymq.Delivery) error {
			time.Sleep(4 * time.Second)
			return steadymq.RequeueAfter(nil, time.Hour)
		}, steadymq.WithStallDetector(5*time.Second), steadymq.WithPrefetch(20))
		r.PublishMany(12, "held")
		r.Wait(time.Second)
		r.Broker.QuorumStall(rig.Queue, true)
		r.PublishMany(1, "waits")
		r.Wait(48 * time.Second)
		assert.Empty(r, r.Causes(), "as long as handlers begin")
		r.Wait(20 * time.Second)
		assert.NotEmpty(r, r.Causes(), "not for ever")
	})
}

// A stream may be empty when the detector looks first.
func TestEmptyStreamThatGrowsWithoutADeliveryIsAStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		streamUnderDetector(r, rig.Ack)
		r.Wait(25 * time.Second)
		r.Broker.QuorumStall("log", true)
		r.Broker.Publish("log", "1", "2", "3")
		r.Wait(20 * time.Second)
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "though the stream has grown")
		r.Broker.QuorumStall("log", false)
		r.Wait(10 * time.Second)
		assert.EqualValues(r, 3, r.Consumer.Stats().Acked)
	})
}

// A stream that had grown without a delivery for a moment says nothing about a stall that comes
// later for another reason: taken for another stream, it would be read once more from its beginning.
func TestStreamThatGrewForAMomentIsNotReadAnewAfterALaterStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		streamUnderDetector(r, rig.Ack)
		r.Broker.Publish("log", "1", "2", "3")
		r.Wait(15 * time.Second)
		r.Broker.QuorumStall("log", true)
		for range 34 { // the detector looks after 20 and 30 s, and suspects a stall
			r.Wait(500 * time.Millisecond)
			r.Broker.Publish("log", "more")
		}
		r.Broker.QuorumStall("log", false)
		r.Wait(time.Second)
		require.EqualValues(r, 37, r.Consumer.Stats().Acked)
		require.Empty(r, r.Causes())
		r.Wait(30 * time.Second)
		r.Broker.HangAt(steadymqtest.StageChannel, true)
		r.Wait(5 * time.Minute)
		r.Broker.HangAt(steadymqtest.StageChannel, false)
		r.Wait(time.Minute)
		require.NotEmpty(r, r.Causes())
		require.ErrorContains(r, r.Causes()[0], "does not answer")
		r.Broker.Publish("log", "last")
		r.Wait(time.Second)
		assert.EqualValues(r, 38, r.Consumer.Stats().Acked)
	})
}

// Nobody has told the consumer: at its old place the broker waits until the new stream is so long.
func TestStreamMadeAnewWhileTheConsumerWasAwayIsReadFromItsBeginningOnceItStalls(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var handled []string
		streamUnderDetector(r, func(_ context.Context, d *steadymq.Delivery) error {
			handled = append(handled, string(d.Body))
			return nil
		})
		old := make([]string, 100)
		for i := range old {
			old[i] = fmt.Sprint("old ", i)
		}
		r.Broker.Publish("log", old...)
		r.Wait(time.Second)
		require.Len(r, handled, 100)
		r.Broker.Host(0).Kill()
		r.Broker.DeleteQueue("log")
		r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		r.Broker.Host(0).Restart()
		var made []string
		for i := range 60 {
			made = append(made, fmt.Sprint("new ", i))
			r.Broker.Publish("log", made[i])
			r.Wait(time.Second)
		}
		assert.Equal(r, append(old, made...), handled)
	})
}

func TestStreamOnAHostThatIsCutOffIsReadFromAnother(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		streamUnderDetector(r, rig.Ack)
		r.Broker.Publish("log", "1", "2", "3")
		r.Wait(10 * time.Minute)
		require.Empty(r, r.Causes())
		was := r.HostInUse()
		r.Broker.Host(was).CutOff(true)
		r.Broker.Publish("log", "4")
		r.Wait(26 * time.Second)
		require.Len(r, r.Causes(), 1)
		assert.NotEqual(r, was, r.HostInUse())
		assert.EqualValues(r, 4, r.Consumer.Stats().Acked)
	}, steadymqtest.WithHosts(3))
}

func TestPrefetchFullOfWhatWaitsForItsTurnIsNoStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		streamUnderDetector(r, func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "0" {
				time.Sleep(5 * time.Minute)
			}
			return nil
		}, steadymq.WithConcurrency(2), steadymq.WithPrefetch(4))
		for i := range 400 {
			r.Broker.Publish("log", fmt.Sprint(i))
			r.Wait(time.Second)
		}
		busyFor(r, time.Minute)
		assert.EqualValues(r, 400, r.Consumer.Stats().Acked)
	})
}

// balanced makes every dial go to the next host, whatever address it asks for.
func balanced(r *rig.Rig, hosts int) steadymq.Option {
	var turn atomic.Int32
	dial := r.Broker.Dialer()
	return steadymq.WithDialer(func(ctx context.Context, network, _ string) (net.Conn, error) {
		return dial(ctx, network, r.Broker.Host(int(turn.Add(1)-1)%hosts).Addr())
	})
}

// runOne starts a consumer that is given one URL, or none, of a broker with several hosts.
func runOne(r *rig.Rig, url string, h steadymq.Handler, opts ...steadymq.Option) {
	c, err := steadymq.New(url, rig.Queue, append(opts, steadymq.WithHooks(steadymq.Hooks{StateChanged: r.Changed}))...)
	require.NoError(r, err)
	r.Consumer = c
	r.Start(h)
	r.Wait(time.Second)
	require.Equal(r, steadymq.Consuming, c.State())
}

func TestStalledConsumerBehindOneURLGoesToAnotherNode(t *testing.T) {
	for _, how := range []string{"load balancer", "WithURLFunc"} {
		t.Run(how, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				release := make(chan struct{})
				h := func(context.Context, *steadymq.Delivery) error { <-release; return nil }
				opts := []steadymq.Option{steadymq.WithStallDetector(time.Minute), steadymq.WithPrefetch(4)}
				for range 20 {
					r.Broker.Publish(rig.Queue, "x")
				}
				if how == "WithURLFunc" {
					turn := 0
					runOne(r, "", h, append(opts, steadymq.WithDialer(r.Broker.Dialer()), steadymq.WithURLFunc(func(context.Context) (string, error) {
						turn++
						return r.Broker.URLs()[(turn-1)%3], nil
					}))...)
				} else {
					runOne(r, r.Broker.URLs()[0], h, append(opts, balanced(r, 3))...)
				}
				r.Broker.Host(0).CutOff(true)
				close(release)
				r.Wait(3 * time.Minute)
				assert.Zero(r, r.Broker.QueueLen(rig.Queue), "messages that wait")
				assert.EqualValues(r, 2, r.Consumer.Stats().Connections)
				require.Len(r, r.Causes(), 1)
				assert.ErrorContains(r, r.Causes()[0], "stalled")
			}, steadymqtest.WithHosts(3))
		})
	}
}

func TestConsumerOfAStreamsFutureIsNoStall(t *testing.T) {
	for name, from := range map[string]any{"offset": int64(400), "time": time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC)} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
				r.Consuming(rig.Ack, append(streamOptions("first"), steadymq.WithStallDetector(10*time.Second),
					steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": from}))...)
				for i := range 500 {
					r.Broker.Publish("log", fmt.Sprint(i))
					r.Wait(time.Second)
				}
				busyFor(r, 0)
			})
		})
	}
}
