package steadymq_test

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
	"github.com/steadymq/steadymq/steadymqtest"
)

// Streams.

func streamOptions(offset any) []steadymq.Option {
	return opts(
		steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": offset}),
		steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "log", nil }),
	)
}

func TestStreamResumesAtTheFirstUnsettledMessage(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		finished := make(map[string]int)
		b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "m5" && d.Session() == 1 {
				<-ctx.Done()
				return ctx.Err()
			}
			finished[string(d.Body)]++
			return nil
		}, streamOptions("next")...)
		for i := range 10 {
			b.broker.Publish("log", fmt.Sprint("m", i))
		}
		b.wait(time.Second)
		require.Len(b, finished, 5)
		b.broker.Reset()
		b.broker.Publish("log", "m10") // while away: "next" would skip it
		b.wait(time.Second)
		assert.Len(b, finished, 11)
		for body, n := range finished {
			assert.Equal(b, 1, n, body)
		}
	})
}

func TestStreamMessageThatFailsIsDeliveredAgainNotSkipped(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		var order []string
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			order = append(order, string(d.Body))
			switch {
			case string(d.Body) == "b" && d.Attempt() == 1:
				return errors.New("not yet")
			case string(d.Body) == "c":
				return steadymq.Discard(nil)
			}
			return nil
		}, append(streamOptions("first"), steadymq.WithPrefetch(1))...)
		b.broker.Publish("log", "a", "b", "c", "d")
		b.wait(10 * time.Second)
		assert.Equal(b, []string{"a", "b", "b", "c", "d"}, order)
		assert.Empty(b, b.causes(), "it is tried again in place")
	})
}

func TestSlowHandlerOfAStreamCostsNoMoreDuplicatesThanThePrefetch(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		var mu sync.Mutex
		finished := make(map[string]int)
		b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
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
			b.broker.Publish("log", fmt.Sprint("m", i))
		}
		b.wait(time.Second)
		assert.Len(b, finished, 6, "m0, m1 and the four that fit beside m2")
		b.broker.Reset()
		b.wait(time.Second)
		require.Len(b, finished, 100)
		again := 0
		for _, n := range finished {
			again += n - 1
		}
		assert.LessOrEqual(b, again, 5)
	})
}

// reading consumes a stream of the queue's name and returns what was finished.
func (b *bench) reading(opts ...steadymq.Option) *[]string {
	b.Helper()
	b.broker.DeleteQueue(queue)
	b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{Type: "stream"})
	finished := new([]string)
	b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
		*finished = append(*finished, string(d.Body))
		return nil
	}, opts...)
	return finished
}

func TestStreamMadeAnewIsReadFromItsBeginning(t *testing.T) {
	for name, options := range map[string][]steadymq.Option{
		"declared by us":      opts(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}), steadymq.WithQueue(steadymq.Queue{Type: "stream"})),
		"declared by another": opts(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"})),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				finished := b.reading(options...)
				b.broker.Publish(queue, "old 0", "old 1", "old 2")
				b.wait(time.Second)
				b.broker.DeleteQueue(queue)
				if name == "declared by another" {
					b.wait(2 * time.Second)
					b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{Type: "stream"})
				}
				b.wait(10 * time.Second)
				b.broker.Publish(queue, "new 0", "new 1")
				b.wait(10 * time.Second)
				assert.Equal(b, []string{"old 0", "old 1", "old 2", "new 0", "new 1"}, *finished)
				b.broker.Reset() // and resumes at its place in the new one
				b.broker.Publish(queue, "new 2")
				b.wait(10 * time.Second)
				assert.Equal(b, []string{"old 0", "old 1", "old 2", "new 0", "new 1", "new 2"}, *finished)
			})
		})
	}
}

// A busy broker may cancel the consumers of a stream before it forgets the stream.
func TestStreamThatIsGoneSoonAfterTheCancelIsReadFromItsBeginning(t *testing.T) {
	for late := time.Duration(0); late < 60*time.Millisecond; late += time.Millisecond { // some hit the moment between look and declare
		t.Run(late.String(), func(t *testing.T) {
			bubble(t, func(b *bench) {
				finished := b.reading(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}), steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
				b.broker.Publish(queue, "old 0", "old 1", "old 2")
				b.wait(time.Second)
				b.broker.SetLatency(2 * time.Millisecond)
				b.broker.CancelConsumers(queue)
				b.wait(late)
				b.broker.DeleteQueue(queue)
				b.wait(10 * time.Second)
				b.broker.Publish(queue, "new 0", "new 1")
				b.wait(10 * time.Second)
				assert.Equal(b, []string{"old 0", "old 1", "old 2", "new 0", "new 1"}, *finished)
			})
		})
	}
}

// Stall detector.

func TestStalledConsumerIsReplaced(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithStallDetector(time.Minute))
		b.wait(10 * time.Minute)
		require.Empty(b, b.causes(), "an empty queue is no stall")
		b.broker.QuorumStall(queue, true)
		b.broker.Publish(queue, "stuck")
		b.wait(3 * time.Minute)
		require.NotEmpty(b, b.causes())
		assert.ErrorContains(b, b.causes()[0], "stalled")
		assert.ErrorContains(b, b.causes()[0], "1 messages")
		b.broker.QuorumStall(queue, false)
		b.wait(3 * time.Minute)
		assert.Zero(b, b.broker.QueueLen(queue)+b.broker.Unsettled(queue))
	})
}

func TestHostThatFellSilentIsTriedLast(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack)
		host := b.broker.Host(b.hostInUse())
		host.BlackHole(true, true)
		b.wait(15*time.Second + 500*time.Millisecond) // one and a half heartbeats; a dial to the same host would take 5 s or 15 s more
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.NotEqual(b, host, b.broker.Host(b.hostInUse()))
	}, steadymqtest.WithHosts(3))
}

func TestStalledConsumerGoesToAnotherHost(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, opts(steadymq.WithStallDetector(time.Minute))...)
		was := b.hostInUse()
		b.broker.QuorumStall(queue, true)
		b.broker.Publish(queue, "m0")
		b.wait(90 * time.Second)
		require.Len(b, b.causes(), 1)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.NotEqual(b, was, b.hostInUse())
	}, steadymqtest.WithHosts(3))
}

// hostInUse is the index of the host the consumer said it consumes from.
func (b *bench) hostInUse() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	last := b.changes[len(b.changes)-1].Host
	for i := range len(b.broker.URLs()) {
		if b.broker.Host(i).Addr() == last {
			return i
		}
	}
	return -1
}

func TestIdleConsumerBehindASingleActiveOneIsLeftInPeace(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DeleteQueue(queue)
		b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{Args: map[string]any{"x-single-active-consumer": true}})
		block := make(chan struct{})
		first := b.make(steadymq.WithPrefetch(1))
		ctx, stop := context.WithCancel(b.Context())
		done := make(chan error, 1)
		go func() {
			done <- first.Run(ctx, func(context.Context, *steadymq.Delivery) error { <-block; return nil })
		}()
		b.wait(time.Second)
		b.broker.Publish(queue, "1", "2", "3")
		b.consuming(ack, steadymq.WithStallDetector(10*time.Second))
		b.wait(10 * time.Minute)
		assert.EqualValues(b, 1, b.consumer.Stats().Sessions)
		close(block)
		stop()
		require.NoError(b, <-done)
	})
}

func TestBusyConsumerIsNoStall(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(5 * time.Minute); return nil },
			steadymq.WithPrefetch(1), steadymq.WithStallDetector(10*time.Second))
		b.broker.Publish(queue, "1", "2")
		b.wait(11 * time.Minute)
		assert.EqualValues(b, 1, b.consumer.Stats().Sessions)
		assert.Zero(b, b.broker.QueueLen(queue)+b.broker.Unsettled(queue))
	})
}

// busy is what must not be taken for a stall by a detector of 10 s.
func (b *bench) busy(d time.Duration) {
	b.Helper()
	b.wait(d)
	assert.Empty(b, b.causes())
	assert.EqualValues(b, 1, b.consumer.Stats().Sessions)
}

func TestPrefetchFullOfWhatWaitsForAWorkerIsNoStall(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(5 * time.Minute); return nil },
			steadymq.WithConcurrency(1), steadymq.WithPrefetch(2), steadymq.WithStallDetector(10*time.Second))
		b.broker.Publish(queue, "1", "2", "3", "4")
		b.busy(21 * time.Minute)
		assert.EqualValues(b, 4, b.consumer.Stats().Acked)
	})
}

func TestPrefetchFullOfWhatWaitsForItsRequeueIsNoStall(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "poison" && !d.Redelivered {
				return steadymq.RequeueAfter(errors.New("not yet"), 5*time.Minute)
			}
			return nil
		}, steadymq.WithPrefetch(1), steadymq.WithStallDetector(10*time.Second))
		b.broker.Publish(queue, "poison", "2")
		b.busy(6 * time.Minute)
		assert.EqualValues(b, 2, b.consumer.Stats().Acked)
	})
}

func TestBurstAtTheMomentOfTheLookIsNoStall(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithPrefetch(1), steadymq.WithStallDetector(10*time.Second))
		b.mu.Lock()
		look := b.changes[len(b.changes)-1].Time.Add(10 * time.Second)
		b.mu.Unlock()
		b.wait(time.Until(look) + 500*time.Microsecond) // the question is on its way, and takes longer than a delivery
		for range 10 {
			b.broker.Publish(queue, "m")
		}
		b.busy(time.Minute)
	})
}

func TestQueueThatForgotForAMomentIsNoStall(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.Host(0).CutOff(true) // it says what RabbitMQ says in an election, too: no messages and no consumers
		b.consuming(ack, steadymq.WithStallDetector(10*time.Second))
		b.wait(12 * time.Second)
		b.broker.Host(0).CutOff(false)
		b.busy(time.Minute)
	})
}

func TestConsumerTheQueueForgotIsReplaced(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.Host(0).CutOff(true) // before the consumer came
		b.consuming(ack, steadymq.WithStallDetector(10*time.Second))
		b.wait(16 * time.Second)
		require.Len(b, b.causes(), 1)
		assert.ErrorContains(b, b.causes()[0], "stalled: nothing delivered for 10s and the queue knows of no consumer")
	})
}

func TestConsumerOnAHostThatIsCutOffGoesToAnother(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithStallDetector(10*time.Second))
		b.wait(time.Minute)
		require.Empty(b, b.causes(), "an empty queue is no stall, wherever one asks")
		was := b.hostInUse()
		b.broker.Host(was).CutOff(true)
		b.broker.Publish(queue, "1", "2", "3")
		b.wait(26 * time.Second)
		require.Len(b, b.causes(), 1)
		assert.ErrorContains(b, b.causes()[0], "stalled")
		assert.ErrorContains(b, b.causes()[0], "cut off")
		assert.NotEqual(b, was, b.hostInUse())
		assert.EqualValues(b, 3, b.consumer.Stats().Acked)
		b.wait(10 * time.Minute)
		assert.Len(b, b.causes(), 1, "the host that is cut off does not overrule the others")
	}, steadymqtest.WithHosts(3))
}

func TestAHostThatIsCutOffDoesNotOverruleTheOthers(t *testing.T) {
	for _, hosts := range []int{2, 3} {
		t.Run(fmt.Sprint(hosts, " hosts"), func(t *testing.T) {
			bubble(t, func(b *bench) {
				block := make(chan struct{})
				b.consuming(func(context.Context, *steadymq.Delivery) error { <-block; return nil },
					steadymq.WithPrefetch(1), steadymq.WithStallDetector(10*time.Second))
				b.broker.Publish(queue, "1", "2", "3")
				b.wait(time.Second)
				other := b.broker.Host((b.hostInUse() + 1) % hosts)
				other.CutOff(true) // and goes on saying that two messages wait
				close(block)
				b.busy(10 * time.Minute)
				assert.EqualValues(b, 3, b.consumer.Stats().Acked)
			}, steadymqtest.WithHosts(hosts))
		})
	}
}

func TestStopDoesNotWaitForAQuestionToAnotherHost(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithStallDetector(10*time.Second))
		for i := range 3 {
			if i != b.hostInUse() {
				b.broker.Host(i).HangAt(steadymqtest.StageStart, true)
			}
		}
		b.wait(10 * time.Second) // the first look is waiting for another host's answer
		at := time.Now()
		require.NoError(b, b.stop())
		assert.Less(b, time.Since(at), time.Second)
	}, steadymqtest.WithHosts(3))
}

func TestHostsThatDoNotAnswerAreNoStall(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithStallDetector(10*time.Second))
		was := b.hostInUse()
		b.broker.Host((was+1)%3).HangAt(steadymqtest.StageDeclare, true)
		b.broker.Host((was + 2) % 3).Refuse(true)
		b.busy(10 * time.Minute)
	}, steadymqtest.WithHosts(3))
}

// stream is a bench's consumer of a stream under a detector of 10 s.
func (b *bench) stream(h steadymq.Handler, options ...steadymq.Option) {
	b.Helper()
	b.broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
	b.consuming(h, append(append(streamOptions("first"), steadymq.WithStallDetector(10*time.Second)), options...)...)
}

func TestStreamThatGrowsWithoutADeliveryIsAStall(t *testing.T) {
	bubble(t, func(b *bench) {
		b.stream(ack)
		b.broker.Publish("log", "1", "2", "3")
		b.busy(10 * time.Minute) // a stream keeps its messages: that it has some is no stall
		b.broker.QuorumStall("log", true)
		for range 36 {
			b.broker.Publish("log", "more")
			b.wait(time.Second)
		}
		require.NotEmpty(b, b.causes())
		assert.ErrorContains(b, b.causes()[0], "stalled: nothing delivered for 10s though the stream has grown")
		b.broker.QuorumStall("log", false)
		b.wait(10 * time.Second)
		assert.EqualValues(b, 39, b.consumer.Stats().Acked)
	})
}

func TestStreamOnAHostThatIsCutOffIsReadFromAnother(t *testing.T) {
	bubble(t, func(b *bench) {
		b.stream(ack)
		b.broker.Publish("log", "1", "2", "3")
		b.wait(10 * time.Minute)
		require.Empty(b, b.causes())
		was := b.hostInUse()
		b.broker.Host(was).CutOff(true)
		b.broker.Publish("log", "4")
		b.wait(26 * time.Second)
		require.Len(b, b.causes(), 1)
		assert.NotEqual(b, was, b.hostInUse())
		assert.EqualValues(b, 4, b.consumer.Stats().Acked)
	}, steadymqtest.WithHosts(3))
}

func TestPrefetchFullOfWhatWaitsForItsTurnIsNoStall(t *testing.T) {
	bubble(t, func(b *bench) {
		b.stream(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "0" {
				time.Sleep(5 * time.Minute)
			}
			return nil
		}, steadymq.WithConcurrency(2), steadymq.WithPrefetch(4))
		for i := range 400 {
			b.broker.Publish("log", fmt.Sprint(i))
			b.wait(time.Second)
		}
		b.busy(time.Minute)
		assert.EqualValues(b, 400, b.consumer.Stats().Acked)
	})
}

// Credentials.

func TestCredentialsAreFreshForEveryDial(t *testing.T) {
	bubble(t, func(b *bench) {
		current := atomic.Pointer[string]{}
		set := func(p string) { current.Store(&p); b.broker.SetPassword("app", p) }
		set("one")
		b.consuming(ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			return steadymq.Credentials{Username: "app", Password: *current.Load()}, nil
		}))
		set("two")
		b.broker.Reset()
		b.wait(time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		assert.NotContains(b, fmt.Sprintf("%v %+v %#v", steadymq.Credentials{Password: "two"}, &steadymq.Credentials{Password: "two"}, steadymq.Credentials{Password: "two"}), "two")
	})
}

func TestExpiringCredentialsAreRenewedOnTheStandingConnection(t *testing.T) {
	bubble(t, func(b *bench) {
		var asked atomic.Int32
		b.consuming(ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			if n := asked.Add(1); n%3 == 2 {
				return steadymq.Credentials{}, errors.New("token service is down")
			}
			return steadymq.Credentials{Username: "app", Password: password, Expires: time.Now().Add(time.Hour)}, nil
		}))
		b.wait(5 * time.Hour)
		assert.EqualValues(b, 1, b.consumer.Stats().Connections, "never out of date")
		assert.Greater(b, asked.Load(), int32(6))
		assert.Less(b, asked.Load(), int32(30))
	})
}

func TestWrongPasswordIsToldFromACutHandshake(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.DropAt(steadymqtest.StageTune, true)
		b.run(ack)
		b.wait(time.Minute)
		require.Empty(b, b.result, "a lost socket is no refusal: keep trying")
		assert.ErrorContains(b, b.causes()[0], "lost while logging in")
		b.broker.DropAt(steadymqtest.StageTune, false)
		b.wait(11 * time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
	})
}

// TLS.

func TestTLSIsVerifiedPerHost(t *testing.T) {
	bubble(t, func(b *bench) {
		config := b.broker.TLSConfig()
		b.consuming(ack, steadymq.WithTLSConfig(config))
		for i := range 2 {
			b.wait(time.Minute)
			b.broker.Host(i).Kill()
			b.wait(5 * time.Second)
			assert.Equal(b, steadymq.Consuming, b.consumer.State())
			b.broker.Host(i).Restart()
		}
		assert.Empty(b, config.ServerName, "the caller's config is untouched")
		for _, cause := range b.causes() {
			assert.NotContains(b, cause.Error(), "certificate")
		}
	}, steadymqtest.WithTLS(), steadymqtest.WithHosts(2))
}

func TestUntrustedCertificateIsNamedAndRetried(t *testing.T) {
	bubble(t, func(b *bench) {
		b.run(ack)
		b.wait(10 * time.Second)
		require.Empty(b, b.result)
		require.NotEmpty(b, b.causes())
		assert.ErrorContains(b, b.causes()[0], "certificate")
		assert.GreaterOrEqual(b, b.shortestWait(), time.Second)
	}, steadymqtest.WithTLS())
}

func TestPeerOfAnotherProtocolIsNamedAndRetried(t *testing.T) {
	bubble(t, func(b *bench) {
		b.run(ack, steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return impersonated(), nil }))
		b.wait(10 * time.Second)
		require.Empty(b, b.result)
		require.NotEmpty(b, b.causes())
		assert.ErrorContains(b, b.causes()[0], "amqps URL")
		assert.GreaterOrEqual(b, b.shortestWait(), time.Second)
	})
}

func TestHostThatIsNoBrokerCostsNoTime(t *testing.T) {
	bubble(t, func(b *bench) {
		dial, wrong := b.broker.Dialer(), b.broker.Host(1).Addr()
		b.consuming(ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			if address == wrong {
				return impersonated(), nil
			}
			return dial(ctx, network, address)
		}))
		for n := range 20 {
			b.wait(2 * time.Minute)
			dying := b.broker.Host(n % 2 * 2)
			dying.Kill()
			b.wait(time.Second)
			assert.Equal(b, steadymq.Consuming, b.consumer.State())
			if b.consumer.Stats().Sessions > 1 {
				assert.LessOrEqual(b, b.outage(), 100*time.Millisecond)
			}
			dying.Restart()
		}
		assert.Greater(b, b.consumer.Stats().Sessions, uint64(5), "it was on a host that died")
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
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithStallDetector(10*time.Second), steadymq.WithSetupTimeout(2*time.Minute))
		b.broker.HangAt(steadymqtest.StageDeclare, true)
		b.wait(11 * time.Second)
		since := time.Now()
		require.NoError(b, b.stop())
		assert.Less(b, time.Since(since), time.Second)
	})
}

func TestQuestionOfALostSessionLeavesTheNextOneAlone(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithStallDetector(time.Minute))
		b.broker.HangAt(steadymqtest.StageDeclare, true)
		b.wait(61 * time.Second)
		b.broker.CancelConsumers(queue)
		b.wait(time.Second)
		b.broker.HangAt(steadymqtest.StageDeclare, false)
		b.wait(50 * time.Second)
		assert.EqualValues(b, 1, b.consumer.Stats().Connections)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
	})
}

func TestLostSessionsLeaveNoMessagesInMemory(t *testing.T) {
	bubble(t, func(b *bench) {
		body := strings.Repeat("x", 1<<20)
		for range 8 {
			b.broker.Publish(queue, body)
		}
		untilLost := func(ctx context.Context, _ *steadymq.Delivery) error { <-ctx.Done(); return nil }
		b.consuming(untilLost, steadymq.WithPrefetch(8))
		var heap [8]uint64
		for i := range heap {
			b.broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 7")
			b.wait(40 * time.Second)
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			heap[i] = m.HeapAlloc >> 20
		}
		assert.EqualValues(b, 1, b.consumer.Stats().Connections)
		assert.Less(b, heap[7], heap[0]+20, "MiB: %v", heap)
	})
}
