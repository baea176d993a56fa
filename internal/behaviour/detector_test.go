package behaviour_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// A node may stop answering questions as well.
func TestNodeThatDoesNotAnswerTheDetectorIsLeft(t *testing.T) {
	for _, stage := range []steadymqtest.Stage{steadymqtest.StageChannel, steadymqtest.StageDeclare} {
		t.Run(stage.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				runOne(r, r.Broker.URLs()[0], rig.Ack, balanced(r, 3), steadymq.WithStallDetector(time.Minute))
				r.Broker.Host(0).CutOff(true)
				r.Broker.Host(0).HangAt(stage, true)
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(90 * time.Second)
				assert.Zero(r, r.Broker.QueueLen(rig.Queue))
				require.Len(r, r.Causes(), 1)
				assert.ErrorContains(r, r.Causes()[0], "stalled: nothing delivered for 1m0s and the queue does not answer")
				r.Wait(time.Minute)
				assert.Equal(r, 1, r.OpenConnections(), "open connections")
			}, steadymqtest.WithHosts(3))
		})
	}
}

// The detector's question is not worth the handlers of a session that the broker has cancelled.
func TestQuestionThatIsNotAnsweredLeavesTheOtherSessionsAlone(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var cut atomic.Int32
		started := make(chan struct{}, 1)
		r.Consuming(func(ctx context.Context, _ *steadymq.Delivery) error {
			started <- struct{}{}
			select {
			case <-time.After(4 * time.Minute):
			case <-ctx.Done():
				cut.Add(1)
			}
			return nil
		}, steadymq.WithStallDetector(time.Minute), steadymq.WithDrainTimeout(10*time.Minute))
		r.Broker.Publish(rig.Queue, "x")
		<-started
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(time.Second)
		require.EqualValues(r, 2, r.Consumer.Stats().Sessions)
		r.Broker.HangAt(steadymqtest.StageDeclare, true)
		r.Wait(90 * time.Second)
		require.Len(r, r.Causes(), 2)
		assert.ErrorContains(r, r.Causes()[1], "the queue does not answer")
		r.Broker.HangAt(steadymqtest.StageDeclare, false)
		r.Wait(3 * time.Minute)
		assert.Zero(r, cut.Load(), "handlers cut off")
		assert.Equal(r, 1, r.Broker.Ledger().Count(rig.Queue, steadymqtest.Acked))
		assert.Zero(r, r.Broker.Ledger().Redelivered(rig.Queue), "duplicates")
		assert.Equal(r, 1, r.OpenConnections(), "open connections")
	})
}

func TestConnectionWithAQuestionThatIsNotAnsweredTakesNoMoreSessions(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithStallDetector(time.Minute))
		r.Broker.HangAt(steadymqtest.StageDeclare, true)
		r.Wait(61 * time.Second)
		r.Broker.CancelConsumers(rig.Queue) // the question is on its way, and nobody waits for it
		r.Wait(20 * time.Second)
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
		r.Broker.HangAt(steadymqtest.StageDeclare, false)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(20 * time.Second)
		assert.EqualValues(r, 2, r.Consumer.Stats().Connections)
		assert.Equal(r, 1, r.OpenConnections(), "open connections")
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
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
			rig.Bubble(t, func(r *rig.Rig) {
				to, opts := rig.Queue, append(c.opts, slowly(r, c.rate))
				if c.stream {
					to = "log"
					r.Broker.DeclareQueue(to, steadymqtest.QueueOptions{Type: "stream"})
					opts = append(opts, streamOptions("first")...)
				}
				consumingSlowly(r, rig.Ack, opts...)
				total := 0
				for _, size := range c.sizes {
					r.Broker.PublishMessage(to, steadymqtest.Message{Body: make([]byte, size)})
					total += size
				}
				r.Broker.Publish(to, "next")
				r.Wait(time.Duration(total/c.rate)*time.Second*5/4 + 2*time.Minute)
				busyFor(r, 0)
				stats := r.Consumer.Stats()
				assert.EqualValues(r, len(c.sizes)+1-c.unfit, stats.Acked)
				assert.EqualValues(r, c.unfit, stats.Unreadable)
			}, steadymqtest.WithoutLedger())
		})
	}
}

// A header frame comes in one piece, up to 1 MiB of it.
func TestHeadersThatTakeLongToArriveAreNoStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		consumingSlowly(r, rig.Ack, slowly(r, 10_000), steadymq.WithStallDetector(10*time.Second), steadymq.WithHeartbeat(time.Second), steadymq.WithPrefetch(2))
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Headers: map[string]any{"x": strings.Repeat("x", 900_000)}, Body: []byte("x")})
		r.Wait(3 * time.Minute)
		busyFor(r, 0)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
	}, steadymqtest.WithoutLedger())
}

// The question is on its way when a large message comes, and is answered behind it.
func TestAnswerToTheDetectorBehindALargeMessageIsNotLate(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		consumingSlowly(r, rig.Ack, slowly(r, 100_000), steadymq.WithStallDetector(10*time.Second))

		look := r.Changes()[len(r.Changes())-1].Time.Add(10 * time.Second)

		r.Wait(time.Until(look) + 500*time.Microsecond)
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: make([]byte, 8*mebi)})
		busyFor(r, 10*time.Minute)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(10 * time.Second)
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections, "the connection is as good as new")
		assert.EqualValues(r, 2, r.Consumer.Stats().Sessions)
	}, steadymqtest.WithoutLedger())
}

func TestFreshCredentialsMayBeTakenBehindALargeMessage(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		consumingSlowly(r, rig.Ack, slowly(r, 100_000), steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: time.Now().Add(time.Hour)}, nil
		}))
		r.Wait(40 * time.Minute)
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: make([]byte, 16*mebi)})
		r.Wait(time.Minute)
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: make([]byte, 16*mebi)})
		r.Wait(20 * time.Minute)
		busyFor(r, 0)
		assert.EqualValues(r, 2, r.Consumer.Stats().Acked)
	}, steadymqtest.WithoutLedger())
}

func TestDetectorThatMayNotAskSaysSoOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithStallDetector(10*time.Second))
		r.Broker.RefuseDeclare(403, "access to queue 'orders' in vhost '/' refused for user 'app'")
		busyFor(r, 10*time.Minute)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(10 * time.Minute)
		assert.Equal(r, 1, strings.Count(r.Log.String(), "the stall detector cannot ask for the queue"))
		assert.Contains(r, r.Log.String(), "configure permission")
		assert.Contains(r, r.Log.String(), "ACCESS_REFUSED")
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
	})
}

// asked counts the queue.declare that the client sends.
type asked struct {
	net.Conn
	times *atomic.Int32
}

func (a asked) Write(p []byte) (int, error) {
	a.times.Add(int32(bytes.Count(p, []byte("\x00\x32\x00\x0a\x00\x00\x06"+rig.Queue))))
	return a.Conn.Write(p)
}

// A broker's log has a line of every refusal.
func TestDetectorThatMayNotAskIsRefusedOncePerSession(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var times atomic.Int32
		dial := r.Broker.Dialer()
		r.Broker.RefuseDeclare(403, "access to queue 'orders' in vhost '/' refused for user 'app'")
		r.Consuming(rig.Ack, steadymq.WithStallDetector(10*time.Second), steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := dial(ctx, network, address)
			return asked{c, &times}, err
		}))
		busyFor(r, 10*time.Minute)
		assert.EqualValues(r, 1, times.Load())
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(10 * time.Minute)
		assert.EqualValues(r, 2, times.Load())
	})
}

func TestDetectorWithoutAChannelSaysSoOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c, err := steadymq.New(r.Broker.URLs()[0]+"?channel_max=1", rig.Queue, steadymq.WithDialer(r.Broker.Dialer()),
			steadymq.WithStallDetector(10*time.Second), steadymq.WithLogger(slog.New(slog.NewTextHandler(r.Log, nil))), steadymq.WithHooks(steadymq.Hooks{StateChanged: r.Changed}))
		require.NoError(r, err)
		r.Consumer = c
		r.Start(rig.Ack)
		busyFor(r, 10*time.Minute)
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		assert.EqualValues(r, 1, c.Stats().Acked)
		assert.Equal(r, 1, strings.Count(r.Log.String(), "the stall detector cannot ask for the queue"))
		assert.Contains(r, r.Log.String(), "channel_max")
	})
}

// The detector never ends a session that makes progress, however slow the path, the handlers and
// the queue are.
func TestDetectorLeavesEverySessionAloneThatMakesProgress(t *testing.T) {
	for seed := range uint64(40) {
		rig.Bubble(t, func(r *rig.Rig) {
			random := rand.New(rand.NewPCG(seed, 1))
			rate := 5_000 << random.IntN(5)
			slowest := time.Duration(random.IntN(40)) * time.Second
			again := random.IntN(4) == 0
			consumingSlowly(r, func(_ context.Context, d *steadymq.Delivery) error {
				if slowest > 0 {
					time.Sleep(time.Duration(rand.Int64N(int64(slowest))))
				}
				if again && !d.Redelivered {
					return steadymq.RequeueAfter(errors.New("not yet"), slowest)
				}
				return nil
			}, slowly(r, rate), steadymq.WithStallDetector(time.Duration(1+random.IntN(60))*time.Second),
				steadymq.WithPrefetch(3+random.IntN(6)), steadymq.WithConcurrency(1+random.IntN(3)),
				steadymq.WithSetupTimeout(time.Duration(5+random.IntN(20))*time.Second), steadymq.WithHeartbeat(time.Duration(1+random.IntN(10))*time.Second))
			n := 1 + random.IntN(8)
			for range n {
				r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: make([]byte, random.IntN(rate*60))})
				r.Wait(time.Duration(random.IntN(60)) * time.Second)
			}
			r.Wait(time.Duration(n) * 4 * time.Minute)
			assert.Empty(r, r.Causes(), "seed %d", seed)
			assert.EqualValues(r, n, r.Consumer.Stats().Acked, "seed %d", seed)
		}, steadymqtest.WithoutLedger())
		if t.Failed() {
			break
		}
	}
}

// It leaves every node that serves nothing, behind whatever address, in twice its time, 5 s and the
// time of the answers.
func TestDetectorLeavesEveryNodeThatServesNothing(t *testing.T) {
	for seed := range uint64(40) {
		rig.Bubble(t, func(r *rig.Rig) {
			random := rand.New(rand.NewPCG(seed, 2))
			after := time.Duration(1+random.IntN(60)) * time.Second
			rate := 100_000 << random.IntN(6)
			dial := r.Broker.Dialer()
			var turn atomic.Int32
			runOne(r, r.Broker.URLs()[0], func(context.Context, *steadymq.Delivery) error {
				time.Sleep(time.Second)
				return nil
			}, steadymq.WithStallDetector(after), steadymq.WithPrefetch(1+random.IntN(4)), steadymq.WithDialer(func(ctx context.Context, network, _ string) (net.Conn, error) {
				return dial(ctx, network, r.Broker.Host(int(turn.Add(1)-1)%2).Addr())
			}))
			for range 8 + random.IntN(8) {
				r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: make([]byte, random.IntN(rate))})
			}
			r.Wait(time.Duration(random.IntN(5000)) * time.Millisecond)
			bad := r.Broker.Host(0)
			bad.CutOff(true) // with messages that wait
			if random.IntN(2) == 0 {
				bad.HangAt([]steadymqtest.Stage{steadymqtest.StageChannel, steadymqtest.StageDeclare}[random.IntN(2)], true)
			}
			r.Wait(2*after + 5*time.Second + 15*time.Second + 10*time.Second)
			assert.Len(r, r.Causes(), 1, "seed %d", seed)
			r.Wait(time.Minute)
			assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue), "seed %d", seed)
			assert.Equal(r, 1, r.OpenConnections(), "seed %d", seed)
		}, steadymqtest.WithHosts(2))
		if t.Failed() {
			break
		}
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

// The detectors of a group look at the same moments. A connection for each question would be a herd.
func TestQuestionsToAnotherHostShareAConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 10, steadymq.WithStallDetector(10*time.Second)).start()
		own := len(r.Broker.Ledger().Dials)
		r.Wait(15 * time.Second)
		asked := len(r.Broker.Ledger().Dials) - own
		assert.Positive(t, asked, "they have asked")
		assert.LessOrEqual(t, asked, 2, "dials to the two other hosts")
		assert.Equal(t, own, r.OpenConnections(), "nothing is left of the questions")
		require.NoError(t, p.stop())
	}, steadymqtest.WithHosts(3))
}

func TestQuestionThatAnotherHostDoesNotAnswerLeavesNothingBehind(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithStallDetector(10*time.Second))
		for i := range 3 {
			if i != r.HostInUse() {
				r.Broker.Host(i).HangAt(steadymqtest.StageDeclare, true)
			}
		}
		r.Wait(12 * time.Second)
		require.Equal(r, 2, r.OpenConnections(), "it asks")
		for i := range 3 {
			r.Broker.Host(i).HangAt(steadymqtest.StageDeclare, false)
		}
		r.Wait(15 * time.Second)
		assert.Equal(r, 1, r.OpenConnections(), "open connections")
		assert.Empty(r, r.Causes())
	}, steadymqtest.WithHosts(3))
}
