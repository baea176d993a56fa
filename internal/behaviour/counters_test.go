package behaviour_test

import (
	"context"
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

// everyHook are hooks that do nothing: what is counted must not depend on whether it is told.
var everyHook = steadymq.WithHooks(steadymq.Hooks{
	StateChanged:  func(steadymq.StateChange) {},
	HandlerFailed: func(*steadymq.Delivery, error) {},
	Unreadable:    func(*steadymq.MessageError) {},
	Settled:       func(*steadymq.Delivery, steadymq.Outcome) {},
})

var oneHook = steadymq.WithHooks(steadymq.Hooks{Unreadable: func(*steadymq.MessageError) {}})

// counted is a handler that does with a message what its body says, at its first attempt.
func counted(ctx context.Context, d *steadymq.Delivery) error {
	if d.Attempt() > 1 {
		return nil
	}
	switch string(d.Body) {
	case "discard":
		return steadymq.Discard(errAway)
	case "requeue":
		return steadymq.Requeue(nil)
	case "later":
		return steadymq.RequeueAfter(errAway, 10*time.Second)
	case "fail":
		return errAway
	case "panic":
		panic("x")
	case "acked by hand":
		return d.Ack()
	case "discarded by hand":
		_ = d.Discard()
		_ = d.Ack()
		return errAway
	case "requeued by hand":
		return d.Requeue()
	case "refused by hand":
		_ = d.Delivery.Ack(true)
	case "cut off":
		<-ctx.Done()
		return ctx.Err()
	case "late": // done, though its session is lost
		<-ctx.Done()
	case "late panic":
		<-ctx.Done()
		panic("x")
	case "late by hand":
		<-ctx.Done()
		_ = d.Discard()
		_ = d.Ack()
	case "deaf":
		time.Sleep(7 * time.Second)
	}
	return nil
}

// counterStep is something that happens, and what the counters say after it.
type counterStep struct {
	what   string
	happen func(r *rig.Rig)
	change func(s *steadymq.Stats)
}

func publish(bodies ...string) func(r *rig.Rig) {
	return func(r *rig.Rig) { r.Broker.Publish(rig.Queue, bodies...) }
}

func unreadableMessage(r *rig.Rig) {
	r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{RawHeaders: rig.HeaderTable('?', 1)})
}

// follow takes the steps, a second and a half each.
func follow(r *rig.Rig, steps []counterStep) {
	var want steadymq.Stats
	for _, step := range steps {
		step.happen(r)
		r.Wait(1500 * time.Millisecond)
		step.change(&want)
		require.Equal(r, want, r.Consumer.Stats(), step.what)
	}
}

func connected(s *steadymq.Stats) {
	s.State, s.Sessions, s.Connections, s.Dials = steadymq.Consuming, s.Sessions+1, s.Connections+1, s.Dials+1
}

func TestCountersOfAQueueAreExact(t *testing.T) {
	for name, hooks := range map[string]steadymq.Option{"all hooks": everyHook, "one": oneHook} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				options := rig.Options(hooks, steadymq.WithConcurrency(4), steadymq.WithRequeueDelay(time.Minute, time.Minute),
					steadymq.WithHandlerTimeout(5*time.Second), steadymq.WithBackoff(10*time.Millisecond, 10*time.Millisecond), steadymq.WithPrefetch(100))
				r.Consumer = r.New(options...)
				follow(r, []counterStep{
					{"before Run", func(*rig.Rig) {}, func(*steadymq.Stats) {}},
					{"started", func(r *rig.Rig) { r.Start(counted) }, connected},
					{"acked", publish("a", "b", "acked by hand"), func(s *steadymq.Stats) { s.Delivered += 3; s.Acked += 3 }},
					{"discarded", publish("discard"), func(s *steadymq.Stats) { s.Delivered++; s.Discarded++; s.Failed++ }},
					{"discarded by hand", publish("discarded by hand"), func(s *steadymq.Stats) { s.Delivered++; s.Discarded++; s.Failed++ }},
					{"requeued", publish("requeue"), func(s *steadymq.Stats) { s.Delivered += 2; s.Requeued++; s.Failed++; s.Acked++ }},
					{"requeued by hand", publish("requeued by hand"), func(s *steadymq.Stats) { s.Delivered += 2; s.Requeued++; s.Acked++ }},
					{"held", publish("later", "later"), func(s *steadymq.Stats) { s.Delivered += 2; s.Failed += 2; s.Held += 2 }},
					{"held no more", func(r *rig.Rig) { r.Wait(10 * time.Second) }, func(s *steadymq.Stats) { s.Delivered += 2; s.Held = 0; s.Requeued += 2; s.Acked += 2 }},
					{"unreadable", unreadableMessage, func(s *steadymq.Stats) { s.Unreadable++; s.Held++ }},
					{"failed", publish("fail", "panic", "refused by hand"), func(s *steadymq.Stats) { s.Delivered += 3; s.Failed += 3; s.Held += 3 }},
					{"deaf", publish("deaf"), func(s *steadymq.Stats) { s.Delivered++; s.Handling++ }},
					{"deaf and overdue", func(r *rig.Rig) { r.Wait(4 * time.Second) }, func(s *steadymq.Stats) { s.Overdue++ }},
					{"deaf no more", func(r *rig.Rig) { r.Wait(time.Second) }, func(s *steadymq.Stats) { s.Overdue, s.Handling = 0, 0; s.Acked++ }},
					{"under way", publish("cut off", "late", "late by hand", "late panic"), func(s *steadymq.Stats) { s.Delivered += 4; s.Handling += 4 }},
					{"reset", func(r *rig.Rig) { r.Broker.Reset() }, func(s *steadymq.Stats) {
						connected(s)
						s.Stale += 4 + 3 // those under way, and those held, though not the unreadable
						s.Failed++       // the panic
						s.Handling, s.Held = 0, 1
						s.Unreadable++
						s.Delivered += 4 + 3
						s.Acked += 4 + 3
					}},
					{"cancelled", func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) }, func(s *steadymq.Stats) { s.Sessions++; s.Unreadable++ }},
					{"channel closed", func(r *rig.Rig) { r.Broker.CloseChannels(406, "unknown delivery tag 9") }, func(s *steadymq.Stats) { s.Sessions++; s.Unreadable++ }},
					{"dials that fail", func(r *rig.Rig) {
						r.Broker.PurgeQueue(rig.Queue)
						r.Broker.Refuse(true)
						r.Broker.Reset()
						for dials := r.Consumer.Stats().Dials; r.Consumer.Stats().Dials < dials+3; {
							r.Wait(time.Millisecond)
						}
						r.Broker.Refuse(false)
					}, func(s *steadymq.Stats) { connected(s); s.Dials += 3; s.Unreadable++ }},
					{"stopped", func(r *rig.Rig) { require.NoError(r, r.Stop()) }, func(s *steadymq.Stats) { s.State, s.Held = steadymq.Stopped, 0 }},
					{"started again", func(r *rig.Rig) { r.Start(counted) }, func(s *steadymq.Stats) { connected(s); s.Unreadable++; s.Held++ }},
					{"stopped again", func(r *rig.Rig) { require.NoError(r, r.Stop()) }, func(s *steadymq.Stats) { s.State, s.Held = steadymq.Stopped, 0 }},
				})
				balanced := r.Consumer.Stats()
				assert.Equal(r, balanced.Delivered, balanced.Acked+balanced.Requeued+balanced.Discarded+balanced.Stale)
			})
		})
	}
}

func TestCountersOfAStreamAreExact(t *testing.T) {
	for name, hooks := range map[string]steadymq.Option{"all hooks": everyHook, "one": oneHook} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("stream")
				r.Consumer = r.New(append(rig.OfType("stream"), hooks, steadymq.WithConcurrency(3), steadymq.WithRequeueDelay(time.Minute, time.Minute), quick)...)
				follow(r, []counterStep{
					{"started", func(r *rig.Rig) { r.Start(counted) }, connected},
					{"acked", publish("a", "acked by hand"), func(s *steadymq.Stats) { s.Delivered += 2; s.Acked += 2 }},
					{"discarded", publish("discard"), func(s *steadymq.Stats) { s.Delivered++; s.Discarded++; s.Failed++ }},
					{"tried again", publish("requeue", "requeued by hand"), func(s *steadymq.Stats) { s.Delivered += 4; s.Requeued += 2; s.Acked += 2; s.Failed++ }},
					{"unreadable", unreadableMessage, func(s *steadymq.Stats) { s.Unreadable++ }},
					{"held", publish("later"), func(s *steadymq.Stats) { s.Delivered++; s.Failed++; s.Held++ }},
					{"behind it", publish("a", "b"), func(s *steadymq.Stats) { s.Delivered += 2; s.Acked += 2 }},
					{"held no more", func(r *rig.Rig) { r.Wait(8 * time.Second) }, func(s *steadymq.Stats) { s.Held--; s.Delivered++; s.Requeued++; s.Acked++ }},
					{"under way", publish("late", "fail"), func(s *steadymq.Stats) { s.Delivered += 2; s.Failed++; s.Held++; s.Handling++ }},
					{"behind them", publish("a"), func(s *steadymq.Stats) { s.Delivered++; s.Acked++ }},
					{"reset", func(r *rig.Rig) { r.Broker.Reset() }, func(s *steadymq.Stats) { // each comes again, as at its first attempt
						connected(s)
						s.Stale += 2
						s.Delivered += 3
						s.Failed++
						s.Acked++
					}},
					{"cancelled", func(r *rig.Rig) {
						r.Broker.CancelConsumers(rig.Queue)
						r.Wait(10 * time.Second) // it is seen whether the stream has gone
					}, func(s *steadymq.Stats) {
						s.Sessions++
						s.Requeued++
						s.Delivered += 3
						s.Failed++
						s.Acked++
						s.Handling = 2
					}},
					{"stopped", func(r *rig.Rig) { require.ErrorIs(r, r.Stop(), steadymq.ErrDrainTimeout) }, func(s *steadymq.Stats) {
						s.State, s.Handling, s.Held = steadymq.Stopped, 0, 0
						s.Stale += 2
						s.Requeued++
					}},
				})
			})
		})
	}
}

// What is left behind is counted: a function of the user that ignores the end of its context, and a
// teardown that outlasts its limit.
func TestWhatIsLeftBehindIsCountedOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		var calls atomic.Int32
		r.Run(rig.Ack, steadymq.WithSetupTimeout(2*time.Second), quick, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			if calls.Add(1) <= 3 {
				<-release
			}
			return rig.Queue, nil
		}))
		r.Wait(2*time.Second + 395*time.Millisecond)
		assert.Zero(r, r.Consumer.Stats().Abandoned, "it has a moment")
		r.Wait(50 * time.Millisecond)
		assert.EqualValues(r, 1, r.Consumer.Stats().Abandoned)
		r.Wait(time.Minute)
		assert.Equal(r, steadymq.Stats{State: steadymq.Consuming, Sessions: 1, Connections: 4, Dials: 4, GivenUp: 3, Abandoned: 3}, r.Consumer.Stats())
		close(release)
		r.Wait(time.Minute)
		require.NoError(r, r.Stop())
		assert.Equal(r, steadymq.Stats{State: steadymq.Stopped, Sessions: 1, Connections: 4, Dials: 4, GivenUp: 3, Abandoned: 3}, r.Consumer.Stats())
	})
}

func TestDialIsCountedWhenItBeginsAndItsConnectionWhenItStands(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DropSYN(true)
		r.Run(rig.Ack)
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Stats{State: steadymq.Connecting, Dials: 1}, r.Consumer.Stats())
	})
}
