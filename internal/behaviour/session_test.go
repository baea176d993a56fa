package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
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

// Streams.

func streamOptions(offset any) []steadymq.Option {
	return rig.Options(
		steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": offset}),
		steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "log", nil }),
	)
}

func TestStreamResumesAtTheFirstUnsettledMessage(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		finished := make(map[string]int)
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "m5" && d.Session() == 1 {
				<-ctx.Done()
				return ctx.Err()
			}
			finished[string(d.Body)]++
			return nil
		}, streamOptions("next")...)
		for i := range 10 {
			r.Broker.Publish("log", fmt.Sprint("m", i))
		}
		r.Wait(time.Second)
		require.Len(r, finished, 5)
		r.Broker.Reset()
		r.Broker.Publish("log", "m10") // while away: "next" would skip it
		r.Wait(time.Second)
		assert.Len(r, finished, 11)
		for body, n := range finished {
			assert.Equal(r, 1, n, body)
		}
	})
}

func TestStreamMessageThatFailsIsDeliveredAgainNotSkipped(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		var order []string
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			order = append(order, string(d.Body))
			switch {
			case string(d.Body) == "b" && d.Attempt() == 1:
				return errors.New("not yet")
			case string(d.Body) == "c":
				return steadymq.Discard(nil)
			}
			return nil
		}, append(streamOptions("first"), steadymq.WithPrefetch(1))...)
		r.Broker.Publish("log", "a", "b", "c", "d")
		r.Wait(10 * time.Second)
		assert.Equal(r, []string{"a", "b", "b", "c", "d"}, order)
		assert.Empty(r, r.Causes(), "it is tried again in place")
	})
}

func TestSlowHandlerOfAStreamCostsNoMoreDuplicatesThanThePrefetch(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		var mu sync.Mutex
		finished := make(map[string]int)
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "m2" && d.Session() == 1 {
				<-ctx.Done()
				return ctx.Err()
			}
			mu.Lock()
			defer mu.Unlock()
			finished[string(d.Body)]++
			return nil
		}, append(streamOptions("first"), steadymq.WithPrefetch(5), steadymq.WithConcurrency(2))...)
		for i := range 100 {
			r.Broker.Publish("log", fmt.Sprint("m", i))
		}
		r.Wait(time.Second)
		assert.Len(r, finished, 6, "m0, m1 and the four that fit beside m2")
		r.Broker.Reset()
		r.Wait(time.Second)
		require.Len(r, finished, 100)
		again := 0
		for _, n := range finished {
			again += n - 1
		}
		assert.LessOrEqual(r, again, 5)
	})
}

// reading consumes a stream of the queue's name and returns what was finished.
func reading(r *rig.Rig, opts ...steadymq.Option) *[]string {
	r.Helper()
	r.Broker.DeleteQueue(rig.Queue)
	r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "stream"})
	finished := new([]string)
	r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
		*finished = append(*finished, string(d.Body))
		return nil
	}, opts...)
	return finished
}

func TestStreamMadeAnewIsReadFromItsBeginning(t *testing.T) {
	for name, options := range map[string][]steadymq.Option{
		"declared by us":      rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}), steadymq.WithQueue(steadymq.Queue{Type: "stream"})),
		"declared by another": rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"})),
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				finished := reading(r, options...)
				r.Broker.Publish(rig.Queue, "old 0", "old 1", "old 2")
				r.Wait(time.Second)
				r.Broker.DeleteQueue(rig.Queue)
				if name == "declared by another" {
					r.Wait(2 * time.Second)
					r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "stream"})
				}
				r.Wait(10 * time.Second)
				r.Broker.Publish(rig.Queue, "new 0", "new 1")
				r.Wait(10 * time.Second)
				assert.Equal(r, []string{"old 0", "old 1", "old 2", "new 0", "new 1"}, *finished)
				r.Broker.Reset() // and resumes at its place in the new one
				r.Broker.Publish(rig.Queue, "new 2")
				r.Wait(10 * time.Second)
				assert.Equal(r, []string{"old 0", "old 1", "old 2", "new 0", "new 1", "new 2"}, *finished)
			})
		})
	}
}

// A busy broker may cancel the consumers of a stream before it forgets the stream.
func TestStreamThatIsGoneSoonAfterTheCancelIsReadFromItsBeginning(t *testing.T) {
	for late := time.Duration(0); late < 60*time.Millisecond; late += time.Millisecond { // some hit the moment between look and declare
		t.Run(late.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				finished := reading(r, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}), steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
				r.Broker.Publish(rig.Queue, "old 0", "old 1", "old 2")
				r.Wait(time.Second)
				r.Broker.SetLatency(2 * time.Millisecond)
				r.Broker.CancelConsumers(rig.Queue)
				r.Wait(late)
				r.Broker.DeleteQueue(rig.Queue)
				r.Wait(10 * time.Second)
				r.Broker.Publish(rig.Queue, "new 0", "new 1")
				r.Wait(10 * time.Second)
				assert.Equal(r, []string{"old 0", "old 1", "old 2", "new 0", "new 1"}, *finished)
			})
		})
	}
}

// Stall detector.

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

func TestStopDoesNotWaitForAQuestionToAnotherHost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithStallDetector(10*time.Second))
		for i := range 3 {
			if i != r.HostInUse() {
				r.Broker.Host(i).HangAt(steadymqtest.StageStart, true)
			}
		}
		r.Wait(10 * time.Second) // the first look is waiting for another host's answer
		at := time.Now()
		require.NoError(r, r.Stop())
		assert.Less(r, time.Since(at), time.Second)
	}, steadymqtest.WithHosts(3))
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

// Credentials.

func TestCredentialsAreFreshForEveryDial(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		current := atomic.Pointer[string]{}
		set := func(p string) { current.Store(&p); r.Broker.SetPassword("app", p) }
		set("one")
		r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			return steadymq.Credentials{Username: "app", Password: *current.Load()}, nil
		}))
		set("two")
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.NotContains(r, fmt.Sprintf("%v %+v %#v", steadymq.Credentials{Password: "two"}, &steadymq.Credentials{Password: "two"}, steadymq.Credentials{Password: "two"}), "two")
	})
}

func TestExpiringCredentialsAreRenewedOnTheStandingConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var asked atomic.Int32
		r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			if n := asked.Add(1); n%3 == 2 {
				return steadymq.Credentials{}, errors.New("token service is down")
			}
			return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: time.Now().Add(time.Hour)}, nil
		}))
		r.Wait(5 * time.Hour)
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections, "never out of date")
		assert.Greater(r, asked.Load(), int32(6))
		assert.Less(r, asked.Load(), int32(30))
	})
}

func TestWrongPasswordIsToldFromACutHandshake(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DropAt(steadymqtest.StageTune, true)
		r.Run(rig.Ack)
		r.Wait(time.Minute)
		require.Empty(r, r.Result, "a lost socket is no refusal: keep trying")
		assert.ErrorContains(r, r.Causes()[0], "lost while logging in")
		r.Broker.DropAt(steadymqtest.StageTune, false)
		r.Wait(11 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	})
}

// TLS.

func TestTLSIsVerifiedPerHost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		config := r.Broker.TLSConfig()
		r.Consuming(rig.Ack, steadymq.WithTLSConfig(config))
		for i := range 2 {
			r.Wait(time.Minute)
			r.Broker.Host(i).Kill()
			r.Wait(5 * time.Second)
			assert.Equal(r, steadymq.Consuming, r.Consumer.State())
			r.Broker.Host(i).Restart()
		}
		assert.Empty(r, config.ServerName, "the caller's config is untouched")
		for _, cause := range r.Causes() {
			assert.NotContains(r, cause.Error(), "certificate")
		}
	}, steadymqtest.WithTLS(), steadymqtest.WithHosts(2))
}

func TestUntrustedCertificateIsNamedAndRetried(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack)
		r.Wait(10 * time.Second)
		require.Empty(r, r.Result)
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "certificate")
		assert.GreaterOrEqual(r, r.ShortestWait(), time.Second)
	}, steadymqtest.WithTLS())
}

func TestPeerOfAnotherProtocolIsNamedAndRetried(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return impersonated(), nil }))
		r.Wait(10 * time.Second)
		require.Empty(r, r.Result)
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "amqps URL")
		assert.GreaterOrEqual(r, r.ShortestWait(), time.Second)
	})
}

func TestHostThatIsNoBrokerCostsNoTime(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		dial, wrong := r.Broker.Dialer(), r.Broker.Host(1).Addr()
		r.Consuming(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			if address == wrong {
				return impersonated(), nil
			}
			return dial(ctx, network, address)
		}))
		for n := range 20 {
			r.Wait(2 * time.Minute)
			dying := r.Broker.Host(n % 2 * 2)
			dying.Kill()
			r.Wait(time.Second)
			assert.Equal(r, steadymq.Consuming, r.Consumer.State())
			if r.Consumer.Stats().Sessions > 1 {
				assert.LessOrEqual(r, r.Outage(), 100*time.Millisecond)
			}
			dying.Restart()
		}
		assert.Greater(r, r.Consumer.Stats().Sessions, uint64(5), "it was on a host that died")
	}, steadymqtest.WithHosts(3))
}

// impersonated is a connection to a listener that wants TLS.
func impersonated() net.Conn {
	const alert = "\x15\x03\x03\x00\x02\x02\x46" // its answer to a protocol header
	near, far := net.Pipe()
	go func() {
		_, _ = far.Read(make([]byte, 8))
		_, _ = far.Write([]byte(alert))
		_ = far.Close()
	}()
	return near
}

// Limits.

func TestStopDoesNotWaitForAQuestionToThisHost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithStallDetector(10*time.Second), steadymq.WithSetupTimeout(2*time.Minute))
		r.Broker.HangAt(steadymqtest.StageDeclare, true)
		r.Wait(11 * time.Second)
		since := time.Now()
		require.NoError(r, r.Stop())
		assert.Less(r, time.Since(since), time.Second)
	})
}

func TestQuestionOfALostSessionLeavesTheNextOneAlone(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithStallDetector(time.Minute))
		r.Broker.HangAt(steadymqtest.StageDeclare, true)
		r.Wait(61 * time.Second)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(time.Second)
		r.Broker.HangAt(steadymqtest.StageDeclare, false)
		r.Wait(50 * time.Second)
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	})
}

func TestLostSessionsLeaveNoMessagesInMemory(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		body := strings.Repeat("x", 1<<20)
		for range 8 {
			r.Broker.Publish(rig.Queue, body)
		}
		untilLost := func(ctx context.Context, _ *steadymq.Delivery) error { <-ctx.Done(); return nil }
		r.Consuming(untilLost, steadymq.WithPrefetch(8))
		var heap [8]uint64
		for i := range heap {
			r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 7")
			r.Wait(40 * time.Second)
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			heap[i] = m.HeapAlloc >> 20
		}
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
		assert.Less(r, heap[7], heap[0]+20, "MiB: %v", heap)
	})
}
