package steadymq_test

import (
	"context"
	"math/rand/v2"
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

// Cancel-ok stands behind what the broker has sent ahead, prefetch times size: on a path of 100 KB/s
// that takes far longer than the close limit, and bytes come in all the time.
func TestStopOnABusyPathLetsRunningHandlersFinish(t *testing.T) {
	bubble(t, func(b *bench) {
		var cut, done atomic.Int32
		b.consumingSlowly(func(ctx context.Context, _ *steadymq.Delivery) error {
			select {
			case <-time.After(8 * time.Second):
				done.Add(1)
			case <-ctx.Done():
				cut.Add(1)
			}
			return nil
		}, steadymq.WithDrainTimeout(time.Minute), b.slowly(100_000))
		for range 32 {
			b.broker.PublishMessage(queue, steadymqtest.Message{Body: make([]byte, 100_000)})
		}
		b.wait(3 * time.Second) // the first handler runs, 29 messages are on their way
		assert.EqualValues(b, 1, b.consumer.Stats().Handling)
		assert.NoError(b, b.stop())
		assert.Zero(b, cut.Load(), "handlers whose context ended")
		assert.Zero(b, b.consumer.Stats().Stale)
	})
}

// The driver's Channel.Close returns nil for a channel that is closed already, and of two signs that
// are ready at once a select takes either: with both slips it came to one lie in a thousand.
func TestRunTellsOfAcksThatWereLostWhileDraining(t *testing.T) {
	losses := map[string]func(*steadymqtest.Broker){
		"connection closed": func(b *steadymqtest.Broker) { b.CloseConnections(320, "bye") },
		"channel closed":    func(b *steadymqtest.Broker) { b.CloseChannels(406, "delivery acknowledgement on channel 1 timed out") },
	}
	for name, lose := range losses {
		t.Run(name, func(t *testing.T) {
			lied := 0
			for range 400 {
				if lied > 0 {
					break
				}
				bubble(t, func(b *bench) {
					started := make(chan struct{})
					b.consuming(func(_ context.Context, _ *steadymq.Delivery) error {
						close(started)
						time.Sleep(time.Second)
						for range rand.IntN(200) { // it arrives while the handler returns
							runtime.Gosched()
						}
						return nil
					}, steadymq.WithDrainTimeout(time.Minute))
					b.broker.Publish(queue, "x")
					<-started
					b.stopRun()
					time.Sleep(time.Second - time.Millisecond) // the latency
					lose(b.broker)
					err := b.stop()
					if err == nil && b.broker.Ledger().Count(queue, steadymqtest.Acked) == 0 {
						lied++
					}
				})
			}
			assert.Zero(t, lied, "Run returned nil and the message comes again")
		})
	}
}

// After a basic.cancel the running handlers keep their channel, while the next session is set up
// on the same connection. Neither a stop nor the set-up limit may take it from under them.
func TestHandlersOfACancelledSessionFinishWhateverBecomesOfItsSuccessor(t *testing.T) {
	for _, end := range []string{"stop", "setup limit"} {
		t.Run(end, func(t *testing.T) {
			bubble(t, func(b *bench) {
				var calls, cut atomic.Int32
				started := make(chan struct{}, 8)
				b.consuming(func(ctx context.Context, _ *steadymq.Delivery) error {
					started <- struct{}{}
					select {
					case <-time.After(10 * time.Second):
						return nil
					case <-ctx.Done():
						cut.Add(1)
						return ctx.Err()
					}
				}, steadymq.WithSetupTimeout(3*time.Second), steadymq.WithTopology(func(ctx context.Context, _ *amqp.Channel) (string, error) {
					if calls.Add(1) == 2 { // slow, and heeds its context
						<-ctx.Done()
						return "", ctx.Err()
					}
					return queue, nil
				}))
				b.broker.Publish(queue, "x")
				<-started
				b.broker.CancelConsumers(queue)
				b.wait(time.Second)
				require.EqualValues(b, 2, calls.Load())
				if end == "stop" {
					require.NoError(b, b.stop())
				}
				b.wait(12 * time.Second)
				assert.Zero(b, cut.Load(), "handlers cut off")
				assert.Equal(b, 1, b.broker.Ledger().Count(queue, steadymqtest.Acked))
				assert.Zero(b, b.broker.Ledger().Redelivered(queue), "duplicates")
			})
		})
	}
}

// The third failure of a channel within 30 s replaces the connection too.
func TestHandlersOfACancelledSessionFinishWhenItsConnectionIsReplaced(t *testing.T) {
	bubble(t, func(b *bench) {
		var cut atomic.Int32
		started := make(chan struct{}, 8)
		b.consuming(func(ctx context.Context, _ *steadymq.Delivery) error {
			started <- struct{}{}
			select {
			case <-time.After(10 * time.Second):
				return nil
			case <-ctx.Done():
				cut.Add(1)
				return ctx.Err()
			}
		})
		b.broker.Publish(queue, "x")
		<-started
		for range 3 {
			b.broker.CancelConsumers(queue)
			b.wait(time.Second)
		}
		require.EqualValues(b, 2, b.consumer.Stats().Connections, "the connection is replaced")
		b.wait(12 * time.Second)
		assert.Zero(b, cut.Load(), "handlers cut off")
		assert.Equal(b, 1, b.broker.Ledger().Count(queue, steadymqtest.Acked))
		assert.Zero(b, b.broker.Ledger().Redelivered(queue), "duplicates")
		assert.Equal(b, 1, b.open(), "open connections")
	})
}

func TestRunTellsOfAcksThatACancelledSessionLostWhileDraining(t *testing.T) {
	bubble(t, func(b *bench) {
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		b.consuming(hold(started, release), steadymq.WithConcurrency(2))
		b.broker.Publish(queue, "x")
		<-started
		b.broker.CancelConsumers(queue)
		b.wait(time.Second)
		b.stopRun()
		b.wait(time.Second)
		require.Empty(b, b.result, "the handler of the cancelled session is at work")
		b.broker.CloseConnections(320, "bye")
		b.wait(time.Second)
		close(release)
		var lost *steadymq.SessionError
		require.ErrorAs(b, b.stop(), &lost)
		assert.Equal(b, "lost", lost.Op)
	})
}

// What an earlier Run has left behind is not of this one.
func TestDrainErrorCountsTheHandlersOfItsOwnRun(t *testing.T) {
	bubble(t, func(b *bench) {
		release := make(chan struct{})
		ignores := func(context.Context, *steadymq.Delivery) error { <-release; return nil }
		b.consuming(ignores, steadymq.WithDrainTimeout(time.Second), steadymq.WithConcurrency(3))
		b.broker.Publish(queue, "a", "b")
		b.wait(time.Second)
		var drain *steadymq.DrainError
		require.ErrorAs(b, b.stop(), &drain)
		assert.Equal(b, 2, drain.Handlers)
		b.broker.PurgeQueue(queue)
		b.start(ignores)
		b.wait(time.Second)
		b.broker.Publish(queue, "c")
		b.wait(time.Second)
		require.ErrorAs(b, b.stop(), &drain)
		assert.Equal(b, 1, drain.Handlers)
		close(release)
	})
}

// narrow is a path that lets so many bytes pass in a tenth of a second.
type narrow struct {
	net.Conn
	tenth  int
	once   *sync.Once
	closed chan struct{}
}

func (n narrow) Read(p []byte) (int, error) {
	select {
	case <-time.After(100 * time.Millisecond):
	case <-n.closed:
	}
	return n.Conn.Read(p[:min(len(p), n.tenth)])
}

func (n narrow) Close() error {
	n.once.Do(func() { close(n.closed) })
	return n.Conn.Close()
}

// slowly is a dialer whose paths let so many bytes pass in a second.
func (b *bench) slowly(rate int) steadymq.Option {
	dial := b.broker.Dialer()
	return steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return narrow{c, rate / 10, new(sync.Once), make(chan struct{})}, nil
	})
}

func (b *bench) consumingSlowly(h steadymq.Handler, opts ...steadymq.Option) {
	b.run(h, opts...)
	b.wait(5 * time.Second)
}

// The reply to nothing is taken for the one to basic.cancel, and nothing more goes out: both steps
// of the stop would wait for the close limit, one after the other.
func TestStopWithAStrayReplyOnABlockedPathKeepsItsLimits(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithDrainTimeout(2*time.Second))
		b.broker.ZeroWindow(true)
		b.wait(time.Second)
		b.broker.StrayReply(false)
		b.wait(100 * time.Millisecond)
		since := time.Now()
		var lost *steadymq.SessionError
		require.ErrorAs(b, b.stop(), &lost)
		assert.LessOrEqual(b, time.Since(since), 8*time.Second)
	})
}

// A connection that was replaced waits for the sessions on it, which a stop cuts short.
func TestStopHurriesAConnectionThatIsOnItsWayOut(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithDrainTimeout(time.Second))
		b.broker.SlowCloseOk(4500 * time.Millisecond)
		for range 3 {
			b.broker.CancelConsumers(queue)
			b.wait(time.Second)
		}
		require.EqualValues(b, 2, b.consumer.Stats().Connections)
		since := time.Now()
		_ = b.stop()
		assert.LessOrEqual(b, time.Since(since), 7*time.Second, "drain limit, close limit and a second")
		assert.Zero(b, b.open(), "open connections")
	})
}

// A try that comes through within the moment it is given after the set-up limit has given its
// tenancy up already: with the retired session the connection goes, under its successor.
func TestSessionThatComesThroughAfterTheSetupLimitKeepsItsConnection(t *testing.T) {
	bubble(t, func(b *bench) {
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		var calls atomic.Int32
		b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "slow" {
				return hold(started, release)(ctx, d)
			}
			return nil
		}, steadymq.WithConcurrency(2), steadymq.WithSetupTimeout(2*time.Second),
			steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
				if calls.Add(1) == 2 {
					time.Sleep(2*time.Second + 200*time.Millisecond)
				}
				return queue, nil
			}))
		b.broker.Publish(queue, "slow")
		<-started
		b.broker.CancelConsumers(queue)
		b.wait(3 * time.Second)
		if b.consumer.Stats().Sessions < 2 || b.consumer.State() != steadymq.Consuming {
			close(release)
			return // the try failed, which is right, too
		}
		before := len(b.causes())
		close(release) // the last handler of the first session
		b.wait(5 * time.Second)
		for _, cause := range b.causes()[before:] {
			assert.NoError(b, cause, "the second session was consuming")
		}
	})
}

// The close of a retired session counts the silence of the whole socket, which its successor's
// deliveries break.
func TestRetiredSessionIsGivenUpThoughItsSuccessorIsBusy(t *testing.T) {
	bubble(t, func(b *bench) {
		b.consuming(ack, steadymq.WithCloseTimeout(2*time.Second))
		b.wait(11 * time.Second)
		b.broker.NoCloseOk(true)
		b.broker.CancelConsumers(queue)
		for range 600 {
			b.broker.Publish(queue, "tea")
			b.wait(time.Second)
		}
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		assert.Equal(b, 1, strings.Count(string(stacks), "(*session).run("), "ten minutes after a close limit of 2s")
		b.broker.NoCloseOk(false)
	})
}
