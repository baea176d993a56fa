package steadymq_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
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

// balanced makes every dial go to the next host, whatever address it asks for.
func (b *bench) balanced(hosts int) steadymq.Option {
	var turn atomic.Int32
	dial := b.broker.Dialer()
	return steadymq.WithDialer(func(ctx context.Context, network, _ string) (net.Conn, error) {
		return dial(ctx, network, b.broker.Host(int(turn.Add(1)-1)%hosts).Addr())
	})
}

// runOne starts a consumer that is given one URL, or none, of a broker with several hosts.
func (b *bench) runOne(url string, h steadymq.Handler, opts ...steadymq.Option) {
	c, err := steadymq.New(url, queue, append(opts, steadymq.WithHooks(steadymq.Hooks{StateChanged: b.changed}))...)
	require.NoError(b, err)
	b.consumer = c
	b.start(h)
	b.wait(time.Second)
	require.Equal(b, steadymq.Consuming, c.State())
}

func TestStalledConsumerBehindOneURLGoesToAnotherNode(t *testing.T) {
	for _, how := range []string{"load balancer", "WithURLFunc"} {
		t.Run(how, func(t *testing.T) {
			bubble(t, func(b *bench) {
				release := make(chan struct{})
				h := func(context.Context, *steadymq.Delivery) error { <-release; return nil }
				opts := []steadymq.Option{steadymq.WithStallDetector(time.Minute), steadymq.WithPrefetch(4)}
				for range 20 {
					b.broker.Publish(queue, "x")
				}
				if how == "WithURLFunc" {
					turn := 0
					b.runOne("", h, append(opts, steadymq.WithDialer(b.broker.Dialer()), steadymq.WithURLFunc(func(context.Context) (string, error) {
						turn++
						return b.broker.URLs()[(turn-1)%3], nil
					}))...)
				} else {
					b.runOne(b.broker.URLs()[0], h, append(opts, b.balanced(3))...)
				}
				b.broker.Host(0).CutOff(true)
				close(release)
				b.wait(3 * time.Minute)
				assert.Zero(b, b.broker.QueueLen(queue), "messages that wait")
				assert.EqualValues(b, 2, b.consumer.Stats().Connections)
				require.Len(b, b.causes(), 1)
				assert.ErrorContains(b, b.causes()[0], "stalled")
			}, steadymqtest.WithHosts(3))
		})
	}
}

// A node may stop answering questions as well.
func TestNodeThatDoesNotAnswerTheDetectorIsLeft(t *testing.T) {
	for _, stage := range []steadymqtest.Stage{steadymqtest.StageChannel, steadymqtest.StageDeclare} {
		t.Run(stage.String(), func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.runOne(b.broker.URLs()[0], ack, b.balanced(3), steadymq.WithStallDetector(time.Minute))
				b.broker.Host(0).CutOff(true)
				b.broker.Host(0).HangAt(stage, true)
				b.broker.Publish(queue, "x")
				b.wait(90 * time.Second)
				assert.Zero(b, b.broker.QueueLen(queue))
				require.Len(b, b.causes(), 1)
				assert.ErrorContains(b, b.causes()[0], "stalled: nothing delivered for 1m0s and the queue does not answer")
				b.wait(time.Minute)
				assert.Equal(b, 1, b.open(), "open connections")
			}, steadymqtest.WithHosts(3))
		})
	}
}

// The detector's question is not worth the handlers of a session that the broker has cancelled.
func TestQuestionThatIsNotAnsweredLeavesTheOtherSessionsAlone(t *testing.T) {
	bubble(t, func(b *bench) {
		var cut atomic.Int32
		started := make(chan struct{}, 1)
		b.consuming(func(ctx context.Context, _ *steadymq.Delivery) error {
			started <- struct{}{}
			select {
			case <-time.After(4 * time.Minute):
			case <-ctx.Done():
				cut.Add(1)
			}
			return nil
		}, steadymq.WithStallDetector(time.Minute), steadymq.WithDrainTimeout(10*time.Minute))
		b.broker.Publish(queue, "x")
		<-started
		b.broker.CancelConsumers(queue)
		b.wait(time.Second)
		require.EqualValues(b, 2, b.consumer.Stats().Sessions)
		b.broker.HangAt(steadymqtest.StageDeclare, true)
		b.wait(90 * time.Second)
		require.Len(b, b.causes(), 2)
		assert.ErrorContains(b, b.causes()[1], "the queue does not answer")
		b.broker.HangAt(steadymqtest.StageDeclare, false)
		b.wait(3 * time.Minute)
		assert.Zero(b, cut.Load(), "handlers cut off")
		assert.Equal(b, 1, b.broker.Ledger().Count(queue, steadymqtest.Acked))
		assert.Zero(b, b.broker.Ledger().Redelivered(queue), "duplicates")
		assert.Equal(b, 1, b.open(), "open connections")
	})
}

func TestConnectionWithAQuestionThatIsNotAnsweredTakesNoMoreSessions(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithStallDetector(time.Minute))
		b.broker.HangAt(steadymqtest.StageDeclare, true)
		b.wait(61 * time.Second)
		b.broker.CancelConsumers(queue) // the question is on its way, and nobody waits for it
		b.wait(20 * time.Second)
		assert.EqualValues(b, 1, b.consumer.Stats().Connections)
		b.broker.HangAt(steadymqtest.StageDeclare, false)
		b.broker.CancelConsumers(queue)
		b.wait(20 * time.Second)
		assert.EqualValues(b, 2, b.consumer.Stats().Connections)
		assert.Equal(b, 1, b.open(), "open connections")
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
	})
}

const mebi = 1 << 20

func TestMessageThatTakesLongToArriveIsNoStall(t *testing.T) {
	cases := map[string]struct {
		rate   int
		sizes  []int
		stream bool
		opts   []steadymq.Option
		unfit  int
	}{
		"without the detector":   {rate: 100_000, sizes: []int{16 * mebi}, opts: []steadymq.Option{steadymq.WithPrefetch(1)}},
		"one":                    {rate: 100_000, sizes: []int{16 * mebi}, opts: []steadymq.Option{steadymq.WithPrefetch(1), steadymq.WithStallDetector(time.Minute)}},
		"two, and room for both": {rate: 100_000, sizes: []int{16 * mebi, 16 * mebi}, opts: []steadymq.Option{steadymq.WithPrefetch(2), steadymq.WithStallDetector(time.Minute)}},
		"many":                   {rate: 100_000, sizes: []int{mebi, mebi, 8 * mebi, mebi, 8 * mebi}, opts: []steadymq.Option{steadymq.WithPrefetch(3), steadymq.WithStallDetector(time.Second)}},
		"of a stream":            {rate: 100_000, sizes: []int{16 * mebi, 16 * mebi}, stream: true, opts: []steadymq.Option{steadymq.WithStallDetector(time.Minute)}},
		"heartbeat of a second":  {rate: 20_000, sizes: []int{2 * mebi}, opts: []steadymq.Option{steadymq.WithStallDetector(10 * time.Second), steadymq.WithHeartbeat(time.Second)}},
		"too large for the limit": {
			rate: 1_000_000, sizes: []int{64 * mebi}, unfit: 1,
			opts: []steadymq.Option{steadymq.WithPrefetch(2), steadymq.WithStallDetector(10 * time.Second), steadymq.WithMaxMessageSize(mebi)},
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				to, opts := queue, append(c.opts, b.slowly(c.rate))
				if c.stream {
					to = "log"
					b.broker.DeclareQueue(to, steadymqtest.QueueOptions{Type: "stream"})
					opts = append(opts, streamOptions("first")...)
				}
				b.consumingSlowly(ack, opts...)
				total := 0
				for _, size := range c.sizes {
					b.broker.PublishMessage(to, steadymqtest.Message{Body: make([]byte, size)})
					total += size
				}
				b.broker.Publish(to, "next")
				b.wait(time.Duration(total/c.rate)*time.Second*5/4 + 2*time.Minute)
				b.busy(0)
				stats := b.consumer.Stats()
				assert.EqualValues(b, len(c.sizes)+1-c.unfit, stats.Acked)
				assert.EqualValues(b, c.unfit, stats.Unreadable)
			}, steadymqtest.WithoutLedger())
		})
	}
}

// A header frame comes in one piece, up to 1 MiB of it.
func TestHeadersThatTakeLongToArriveAreNoStall(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consumingSlowly(ack, b.slowly(10_000), steadymq.WithStallDetector(10*time.Second), steadymq.WithHeartbeat(time.Second), steadymq.WithPrefetch(2))
		b.broker.PublishMessage(queue, steadymqtest.Message{Headers: map[string]any{"x": strings.Repeat("x", 900_000)}, Body: []byte("x")})
		b.wait(3 * time.Minute)
		b.busy(0)
		assert.EqualValues(b, 1, b.consumer.Stats().Acked)
	}, steadymqtest.WithoutLedger())
}

// The question is on its way when a large message comes, and is answered behind it.
func TestAnswerToTheDetectorBehindALargeMessageIsNotLate(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consumingSlowly(ack, b.slowly(100_000), steadymq.WithStallDetector(10*time.Second))
		b.mu.Lock()
		look := b.changes[len(b.changes)-1].Time.Add(10 * time.Second)
		b.mu.Unlock()
		b.wait(time.Until(look) + 500*time.Microsecond)
		b.broker.PublishMessage(queue, steadymqtest.Message{Body: make([]byte, 8*mebi)})
		b.busy(10 * time.Minute)
		assert.EqualValues(b, 1, b.consumer.Stats().Acked)
		b.broker.CancelConsumers(queue)
		b.wait(10 * time.Second)
		assert.EqualValues(b, 1, b.consumer.Stats().Connections, "the connection is as good as new")
		assert.EqualValues(b, 2, b.consumer.Stats().Sessions)
	}, steadymqtest.WithoutLedger())
}

func TestFreshCredentialsMayBeTakenBehindALargeMessage(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consumingSlowly(ack, b.slowly(100_000), steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			return steadymq.Credentials{Username: "app", Password: password, Expires: time.Now().Add(time.Hour)}, nil
		}))
		b.wait(40 * time.Minute)
		b.broker.PublishMessage(queue, steadymqtest.Message{Body: make([]byte, 16*mebi)})
		b.wait(time.Minute)
		b.broker.PublishMessage(queue, steadymqtest.Message{Body: make([]byte, 16*mebi)})
		b.wait(20 * time.Minute)
		b.busy(0)
		assert.EqualValues(b, 2, b.consumer.Stats().Acked)
	}, steadymqtest.WithoutLedger())
}

func TestDetectorThatMayNotAskSaysSoOnce(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithStallDetector(10*time.Second))
		b.broker.RefuseDeclare(403, "access to queue 'orders' in vhost '/' refused for user 'app'")
		b.busy(10 * time.Minute)
		b.broker.CancelConsumers(queue)
		b.wait(10 * time.Minute)
		assert.Equal(b, 1, strings.Count(b.log.String(), "the stall detector cannot ask for the queue"))
		assert.Contains(b, b.log.String(), "configure permission")
		assert.Contains(b, b.log.String(), "ACCESS_REFUSED")
		assert.EqualValues(b, 1, b.consumer.Stats().Connections)
	})
}

// asked counts the queue.declare that the client sends.
type asked struct {
	net.Conn
	times *atomic.Int32
}

func (a asked) Write(p []byte) (int, error) {
	a.times.Add(int32(bytes.Count(p, []byte("\x00\x32\x00\x0a\x00\x00\x06"+queue))))
	return a.Conn.Write(p)
}

// A broker's log has a line of every refusal.
func TestDetectorThatMayNotAskIsRefusedOncePerSession(t *testing.T) {
	bubble(t, func(b *bench) {
		var times atomic.Int32
		dial := b.broker.Dialer()
		b.broker.RefuseDeclare(403, "access to queue 'orders' in vhost '/' refused for user 'app'")
		b.consuming(ack, steadymq.WithStallDetector(10*time.Second), steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := dial(ctx, network, address)
			return asked{c, &times}, err
		}))
		b.busy(10 * time.Minute)
		assert.EqualValues(b, 1, times.Load())
		b.broker.CancelConsumers(queue)
		b.wait(10 * time.Minute)
		assert.EqualValues(b, 2, times.Load())
	})
}

func TestDetectorWithoutAChannelSaysSoOnce(t *testing.T) {
	bubble(t, func(b *bench) {
		c, err := steadymq.New(b.broker.URLs()[0]+"?channel_max=1", queue, steadymq.WithDialer(b.broker.Dialer()),
			steadymq.WithStallDetector(10*time.Second), steadymq.WithLogger(slog.New(slog.NewTextHandler(b.log, nil))), steadymq.WithHooks(steadymq.Hooks{StateChanged: b.changed}))
		require.NoError(b, err)
		b.consumer = c
		b.start(ack)
		b.busy(10 * time.Minute)
		b.broker.Publish(queue, "x")
		b.wait(time.Second)
		assert.EqualValues(b, 1, c.Stats().Acked)
		assert.Equal(b, 1, strings.Count(b.log.String(), "the stall detector cannot ask for the queue"))
		assert.Contains(b, b.log.String(), "channel_max")
	})
}

func TestConsumerOfAStreamsFutureIsNoStall(t *testing.T) {
	for name, from := range map[string]any{"offset": int64(400), "time": time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC)} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
				b.consuming(ack, append(streamOptions("first"), steadymq.WithStallDetector(10*time.Second),
					steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": from}))...)
				for i := range 500 {
					b.broker.Publish("log", fmt.Sprint(i))
					b.wait(time.Second)
				}
				b.busy(0)
			})
		})
	}
}

// The detector never ends a session that makes progress, however slow the path, the handlers and
// the queue are.
func TestDetectorLeavesEverySessionAloneThatMakesProgress(t *testing.T) {
	for seed := range uint64(40) {
		bubble(t, func(b *bench) {
			r := rand.New(rand.NewPCG(seed, 1))
			rate := 5_000 << r.IntN(5)
			slowest := time.Duration(r.IntN(40)) * time.Second
			again := r.IntN(4) == 0
			b.consumingSlowly(func(_ context.Context, d *steadymq.Delivery) error {
				if slowest > 0 {
					time.Sleep(time.Duration(rand.Int64N(int64(slowest))))
				}
				if again && !d.Redelivered {
					return steadymq.RequeueAfter(errors.New("not yet"), slowest)
				}
				return nil
			}, b.slowly(rate), steadymq.WithStallDetector(time.Duration(1+r.IntN(60))*time.Second),
				steadymq.WithPrefetch(3+r.IntN(6)), steadymq.WithConcurrency(1+r.IntN(3)),
				steadymq.WithSetupTimeout(time.Duration(5+r.IntN(20))*time.Second), steadymq.WithHeartbeat(time.Duration(1+r.IntN(10))*time.Second))
			n := 1 + r.IntN(8)
			for range n {
				b.broker.PublishMessage(queue, steadymqtest.Message{Body: make([]byte, r.IntN(rate*60))})
				b.wait(time.Duration(r.IntN(60)) * time.Second)
			}
			b.wait(time.Duration(n) * 4 * time.Minute)
			assert.Empty(b, b.causes(), "seed %d", seed)
			assert.EqualValues(b, n, b.consumer.Stats().Acked, "seed %d", seed)
		}, steadymqtest.WithoutLedger())
		if t.Failed() {
			break
		}
	}
}

// It leaves every node that serves nothing, behind whatever address, in twice its time, 5 s and
// the time of the answers.
func TestDetectorLeavesEveryNodeThatServesNothing(t *testing.T) {
	for seed := range uint64(40) {
		bubble(t, func(b *bench) {
			r := rand.New(rand.NewPCG(seed, 2))
			after := time.Duration(1+r.IntN(60)) * time.Second
			rate := 100_000 << r.IntN(6)
			dial := b.broker.Dialer()
			var turn atomic.Int32
			b.runOne(b.broker.URLs()[0], func(context.Context, *steadymq.Delivery) error {
				time.Sleep(time.Second)
				return nil
			}, steadymq.WithStallDetector(after), steadymq.WithPrefetch(1+r.IntN(4)), steadymq.WithDialer(func(ctx context.Context, network, _ string) (net.Conn, error) {
				return dial(ctx, network, b.broker.Host(int(turn.Add(1)-1)%2).Addr())
			}))
			for range 8 + r.IntN(8) {
				b.broker.PublishMessage(queue, steadymqtest.Message{Body: make([]byte, r.IntN(rate))})
			}
			b.wait(time.Duration(r.IntN(5000)) * time.Millisecond)
			bad := b.broker.Host(0)
			bad.CutOff(true) // with messages that wait
			if r.IntN(2) == 0 {
				bad.HangAt([]steadymqtest.Stage{steadymqtest.StageChannel, steadymqtest.StageDeclare}[r.IntN(2)], true)
			}
			b.wait(2*after + 5*time.Second + 15*time.Second + 10*time.Second)
			assert.Len(b, b.causes(), 1, "seed %d", seed)
			b.wait(time.Minute)
			assert.Zero(b, b.broker.QueueLen(queue)+b.broker.Unsettled(queue), "seed %d", seed)
			assert.Equal(b, 1, b.open(), "seed %d", seed)
		}, steadymqtest.WithHosts(2))
		if t.Failed() {
			break
		}
	}
}
