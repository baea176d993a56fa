package behaviour_test

import (
	"context"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// Cancel-ok stands behind what the broker has sent ahead, prefetch times size: on a path of
// 100 KB/s that takes far longer than the close limit, and bytes come in all the time.
func TestStopOnABusyPathLetsRunningHandlersFinish(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var cut, done atomic.Int32
		consumingSlowly(r, func(ctx context.Context, _ *steadymq.Delivery) error {
			select {
			case <-time.After(8 * time.Second):
				done.Add(1)
			case <-ctx.Done():
				cut.Add(1)
			}
			return nil
		}, steadymq.WithDrainTimeout(time.Minute), slowly(r, 100_000))
		for range 32 {
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: make([]byte, 100_000)})
		}
		r.Wait(3 * time.Second) // the first handler runs, 29 messages are on their way
		assert.EqualValues(r, 1, r.Consumer.Stats().Handling)
		assert.NoError(r, r.Stop())
		assert.Zero(r, cut.Load(), "handlers whose context ended")
		assert.Zero(r, r.Consumer.Stats().Stale)
	})
}

// The driver's Channel.Close returns nil for a channel that is closed already, and of two signs
// that are ready at once a select takes either: with both slips it came to one lie in a thousand.
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
				rig.Bubble(t, func(r *rig.Rig) {
					started := make(chan struct{})
					r.Consuming(func(_ context.Context, _ *steadymq.Delivery) error {
						close(started)
						time.Sleep(time.Second)
						for range rand.IntN(200) { // it arrives while the handler returns
							runtime.Gosched()
						}
						return nil
					}, steadymq.WithDrainTimeout(time.Minute))
					r.Broker.Publish(rig.Queue, "x")
					<-started
					r.Cancel()
					time.Sleep(time.Second - time.Millisecond) // the latency
					lose(r.Broker)
					err := r.Stop()
					if err == nil && r.Broker.Ledger().Count(rig.Queue, steadymqtest.Acked) == 0 {
						lied++
					}
				})
			}
			assert.Zero(t, lied, "Run returned nil and the message comes again")
		})
	}
}

// After a basic.cancel the running handlers keep their channel, while the next session is set up on
// the same connection. Neither a stop nor the set-up limit may take it from under them.
func TestHandlersOfACancelledSessionFinishWhateverBecomesOfItsSuccessor(t *testing.T) {
	for _, end := range []string{"stop", "setup limit"} {
		t.Run(end, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var calls, cut atomic.Int32
				started := make(chan struct{}, 8)
				r.Consuming(func(ctx context.Context, _ *steadymq.Delivery) error {
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
					return rig.Queue, nil
				}))
				r.Broker.Publish(rig.Queue, "x")
				<-started
				r.Broker.CancelConsumers(rig.Queue)
				r.Wait(time.Second)
				require.EqualValues(r, 2, calls.Load())
				if end == "stop" {
					require.NoError(r, r.Stop())
				}
				r.Wait(12 * time.Second)
				assert.Zero(r, cut.Load(), "handlers cut off")
				assert.Equal(r, 1, r.Broker.Ledger().Count(rig.Queue, steadymqtest.Acked))
				assert.Zero(r, r.Broker.Ledger().Redelivered(rig.Queue), "duplicates")
			})
		})
	}
}

// The third failure of a channel within 30 s replaces the connection too.
func TestHandlersOfACancelledSessionFinishWhenItsConnectionIsReplaced(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var cut atomic.Int32
		started := make(chan struct{}, 8)
		r.Consuming(func(ctx context.Context, _ *steadymq.Delivery) error {
			started <- struct{}{}
			select {
			case <-time.After(10 * time.Second):
				return nil
			case <-ctx.Done():
				cut.Add(1)
				return ctx.Err()
			}
		})
		r.Broker.Publish(rig.Queue, "x")
		<-started
		for range 3 {
			r.Broker.CancelConsumers(rig.Queue)
			r.Wait(time.Second)
		}
		require.EqualValues(r, 2, r.Consumer.Stats().Connections, "the connection is replaced")
		r.Wait(12 * time.Second)
		assert.Zero(r, cut.Load(), "handlers cut off")
		assert.Equal(r, 1, r.Broker.Ledger().Count(rig.Queue, steadymqtest.Acked))
		assert.Zero(r, r.Broker.Ledger().Redelivered(rig.Queue), "duplicates")
		assert.Equal(r, 1, r.OpenConnections(), "open connections")
	})
}

func TestRunTellsOfAcksThatACancelledSessionLostWhileDraining(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		r.Consuming(rig.Hold(started, release), steadymq.WithConcurrency(2))
		r.Broker.Publish(rig.Queue, "x")
		<-started
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(time.Second)
		r.Cancel()
		r.Wait(time.Second)
		require.Empty(r, r.Result, "the handler of the cancelled session is at work")
		r.Broker.CloseConnections(320, "bye")
		r.Wait(time.Second)
		close(release)
		var lost *steadymq.SessionError
		require.ErrorAs(r, r.Stop(), &lost)
		assert.Equal(r, "lost", lost.Op)
	})
}

// What an earlier Run has left behind is not of this one.
func TestDrainErrorCountsTheHandlersOfItsOwnRun(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		ignores := func(context.Context, *steadymq.Delivery) error { <-release; return nil }
		r.Consuming(ignores, steadymq.WithDrainTimeout(time.Second), steadymq.WithConcurrency(3))
		r.Broker.Publish(rig.Queue, "a", "b")
		r.Wait(time.Second)
		var drain *steadymq.DrainError
		require.ErrorAs(r, r.Stop(), &drain)
		assert.Equal(r, 2, drain.Handlers)
		r.Broker.PurgeQueue(rig.Queue)
		r.Start(ignores)
		r.Wait(time.Second)
		r.Broker.Publish(rig.Queue, "c")
		r.Wait(time.Second)
		require.ErrorAs(r, r.Stop(), &drain)
		assert.Equal(r, 1, drain.Handlers)
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
func slowly(r *rig.Rig, rate int) steadymq.Option {
	dial := r.Broker.Dialer()
	return steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return narrow{c, rate / 10, new(sync.Once), make(chan struct{})}, nil
	})
}

func consumingSlowly(r *rig.Rig, h steadymq.Handler, opts ...steadymq.Option) {
	r.Run(h, opts...)
	r.Wait(5 * time.Second)
}

// The reply to nothing is taken for the one to basic.cancel, and nothing more goes out: both steps
// of the stop would wait for the close limit, one after the other.
func TestStopWithAStrayReplyOnABlockedPathKeepsItsLimits(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithDrainTimeout(2*time.Second))
		r.Broker.ZeroWindow(true)
		r.Wait(time.Second)
		r.Broker.StrayReply(false)
		r.Wait(100 * time.Millisecond)
		since := time.Now()
		var lost *steadymq.SessionError
		require.ErrorAs(r, r.Stop(), &lost)
		assert.LessOrEqual(r, time.Since(since), 8*time.Second)
	})
}

// A connection that was replaced waits for the sessions on it, which a stop cuts short.
func TestStopHurriesAConnectionThatIsOnItsWayOut(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithDrainTimeout(time.Second))
		r.Broker.SlowCloseOk(4500 * time.Millisecond)
		for range 3 {
			r.Broker.CancelConsumers(rig.Queue)
			r.Wait(time.Second)
		}
		require.EqualValues(r, 2, r.Consumer.Stats().Connections)
		since := time.Now()
		_ = r.Stop()
		assert.LessOrEqual(r, time.Since(since), 7*time.Second, "drain limit, close limit and a second")
		assert.Zero(r, r.OpenConnections(), "open connections")
	})
}

// A try that comes through within the moment it is given after the set-up limit has given its
// tenancy up already: with the retired session the connection goes, under its successor.
func TestSessionThatComesThroughAfterTheSetupLimitKeepsItsConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		var calls atomic.Int32
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "slow" {
				return rig.Hold(started, release)(ctx, d)
			}
			return nil
		}, steadymq.WithConcurrency(2), steadymq.WithSetupTimeout(2*time.Second),
			steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
				if calls.Add(1) == 2 {
					time.Sleep(2*time.Second + 200*time.Millisecond)
				}
				return rig.Queue, nil
			}))
		r.Broker.Publish(rig.Queue, "slow")
		<-started
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(3 * time.Second)
		if r.Consumer.Stats().Sessions < 2 || r.Consumer.State() != steadymq.Consuming {
			close(release)
			return // the try failed, which is right, too
		}
		before := len(r.Causes())
		close(release) // the last handler of the first session
		r.Wait(5 * time.Second)
		for _, cause := range r.Causes()[before:] {
			assert.NoError(r, cause, "the second session was consuming")
		}
	})
}

// The close of a retired session counts the silence of the whole socket, which its successor's
// deliveries break.
func TestRetiredSessionIsGivenUpThoughItsSuccessorIsBusy(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithCloseTimeout(2*time.Second))
		r.Wait(11 * time.Second)
		r.Broker.NoCloseOk(true)
		r.Broker.CancelConsumers(rig.Queue)
		for range 600 {
			r.Broker.Publish(rig.Queue, "tea")
			r.Wait(time.Second)
		}
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		assert.Equal(r, 0, strings.Count(string(stacks), "(*session).run("), "ten minutes after a close limit of 2s")
		r.Broker.NoCloseOk(false)
	})
}

// stuck is a connection of the user whose Close does not return.
type stuck struct {
	net.Conn
	release <-chan struct{}
}

func (s stuck) Close() error {
	<-s.release
	return s.Conn.Close()
}

// The session's own goroutine ends the connection when basic.cancel or channel.close is not
// answered. Stop has its limits whatever the Close of a user's connection does.
func TestStopKeepsItsLimitsThoughACloseOfTheUsersConnectionHangs(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		dial := r.Broker.Dialer()
		r.Consuming(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return stuck{c, release}, nil
		}), steadymq.WithCloseTimeout(2*time.Second), steadymq.WithDrainTimeout(10*time.Second))
		r.Broker.Stall()
		r.Cancel()
		r.Wait(13 * time.Second) // drain + close + 1 s
		select {
		case <-r.Result:
		default:
			assert.Fail(r, "Run has not returned within its limits")
			close(release)
			<-r.Result
			r.Result = nil
			return
		}
		close(release)
		r.Result = nil
	})
}

// What is held goes back when the consumer stops: once.
func TestHeldMessageComesBackOnceWhenTheConsumerStops(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.RequeueAfter(nil, time.Hour) })
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Minute)
		assert.NoError(r, r.Stop())
		assert.Len(r, r.Broker.Ledger().Deliveries, 1)
	}, steadymqtest.WithVersion(4, 0))
}

func TestDrainLimitFitsIntoTheGraceOfKubernetes(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		r.Consuming(rig.Hold(make(chan *steadymq.Delivery, 1), release))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		since := time.Now()
		var drain *steadymq.DrainError
		require.ErrorAs(r, r.Stop(), &drain)
		assert.Equal(r, 20*time.Second, drain.Limit)
		assert.Less(r, time.Since(since), 30*time.Second)
		close(release)
	})
}

// leftBehind runs a consumer whose only handler outlasts the drain limit, does something to the
// broker while it drains, and returns how often HandlerFailed was called by the end of the handler,
// and the error of Run.
func leftBehind(t *testing.T, meanwhile func(*steadymqtest.Broker)) (failed int, err error) {
	b := steadymqtest.NewBroker(t)
	b.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
	b.Publish(rig.Queue, "work")
	done := make(chan struct{})
	c, err := steadymq.New(b.URL, rig.Queue, steadymq.WithDialer(b.Dialer()), steadymq.WithDrainTimeout(2*time.Second),
		steadymq.WithHooks(steadymq.Hooks{HandlerFailed: func(*steadymq.Delivery, error) { failed++ }}))
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Second, cancel)
	time.AfterFunc(11*time.Second, func() { meanwhile(b) })
	err = c.Run(ctx, func(context.Context, *steadymq.Delivery) error {
		defer close(done)
		time.Sleep(time.Minute)
		return assert.AnError
	})
	<-done
	synctest.Wait()
	return failed, err
}

func TestHandlerLeftBehindAtTheDrainLimitCallsNoHookAfterRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed, err := leftBehind(t, func(*steadymqtest.Broker) {})
		require.ErrorIs(t, err, steadymq.ErrDrainTimeout)
		assert.Zero(t, failed)
	})
}

func TestConnectionLostWhileDrainingDoesNotHideHandlersLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, err := leftBehind(t, func(b *steadymqtest.Broker) { b.Reset() })
		require.ErrorIs(t, err, steadymq.ErrDrainTimeout)
		var lost *steadymq.SessionError
		require.ErrorAs(t, err, &lost)
		assert.Equal(t, "lost", lost.Op)
	})
}

func TestDrainLimitReportsTheHandlersLeftAndLeavesTheirDeliveriesUnsettled(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started := make(chan *steadymq.Delivery, 3)
		release := make(chan struct{})
		cause := make(chan error, 1)
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			started <- d
			if string(d.Body) == "polite" {
				<-ctx.Done()
				cause <- context.Cause(ctx)
				return ctx.Err()
			}
			<-release
			return nil
		}, steadymq.WithConcurrency(2))
		r.Broker.Publish(rig.Queue, "polite", "rude")
		r.Wait(time.Second)
		since := time.Now()
		err := r.Stop()
		assert.LessOrEqual(r, time.Since(since), 36*time.Second)
		require.ErrorIs(r, err, steadymq.ErrDrainTimeout)
		var left *steadymq.DrainError
		require.ErrorAs(r, err, &left)
		assert.Equal(r, 2, left.Handlers)
		require.ErrorIs(r, <-cause, steadymq.ErrDrainTimeout)
		close(release)
		r.Wait(time.Second)
		assert.Empty(r, r.Broker.Ledger().Settlements)
		assert.Equal(r, 2, r.Broker.QueueLen(rig.Queue))
	})
}

func TestStopIsBoundedOnADeadPathAndBySlowCloseOk(t *testing.T) {
	faults := map[string]func(*steadymqtest.Broker){
		"black hole":     func(b *steadymqtest.Broker) { b.BlackHole(true, true) },
		"no close-ok":    func(b *steadymqtest.Broker) { b.NoCloseOk(true) },
		"slow close-ok":  func(b *steadymqtest.Broker) { b.SlowCloseOk(4900 * time.Millisecond) },
		"zero window":    func(b *steadymqtest.Broker) { b.ZeroWindow(true) },
		"parked reader":  func(b *steadymqtest.Broker) { b.StrayReply(true) },
		"power off":      func(b *steadymqtest.Broker) { b.PowerOff() },
		"stray, channel": func(b *steadymqtest.Broker) { b.StrayReply(false) },
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack)
				fault(r.Broker)
				r.Wait(time.Millisecond)
				since := time.Now()
				_ = r.Stop()
				assert.LessOrEqual(r, time.Since(since), 6*time.Second)
				r.Wait(time.Minute)
				assert.Zero(r, r.OpenConnections())
			})
		})
	}
}

func TestStopWhileTheConnectionIsLostSaysThatAcksMayBeLost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started := make(chan *steadymq.Delivery, 2)
		release := make(chan struct{})
		r.Consuming(rig.Hold(started, release))
		r.Broker.Publish(rig.Queue, "x")
		<-started
		r.Cancel()
		r.Wait(time.Second)
		r.Broker.Reset()
		r.Wait(time.Second)
		close(release)
		var lost *steadymq.SessionError
		require.ErrorAs(r, r.Stop(), &lost)
		assert.Equal(r, "lost", lost.Op)
	})
}
