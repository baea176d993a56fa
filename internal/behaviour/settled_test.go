package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
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

// outcomes notes what Hooks.Settled tells.
type outcomes struct {
	mu   sync.Mutex
	told []string // session, body and outcome
}

func (o *outcomes) hook(d *steadymq.Delivery, what steadymq.Outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if d.Outcome() != what {
		o.told = append(o.told, "the delivery says "+d.Outcome().String())
	}
	o.told = append(o.told, fmt.Sprintf("%d %s %v", d.Session(), d.Body, what))
}

func (o *outcomes) all() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]string(nil), o.told...)
}

func (o *outcomes) option() steadymq.Option {
	return steadymq.WithHooks(steadymq.Hooks{Settled: o.hook})
}

func TestSettledTellsEveryOutcomeOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var o outcomes
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if d.Redelivered {
				return nil
			}
			switch string(d.Body) {
			case "discard":
				return fmt.Errorf("wrapped: %w", steadymq.Discard(nil))
			case "requeue":
				return steadymq.Requeue(nil)
			case "later":
				return steadymq.RequeueAfter(nil, 10*time.Second)
			case "panic":
				panic("boom")
			case "by hand":
				_ = d.Ack()
				_ = d.Discard()
				return errors.New("ignored")
			case "driver":
				_ = d.Delivery.Nack(true, false) // refused, not settled
				_ = d.Delivery.Nack(false, false)
			case "copy":
				copied := *d
				_ = copied.Discard()
			}
			return nil
		}, o.option())
		for body, want := range map[string][]string{
			"ack":     {"1 ack acked"},
			"discard": {"1 discard discarded"},
			"requeue": {"1 requeue requeued", "1 requeue acked"},
			"by hand": {"1 by hand acked"},
			"driver":  {"1 driver discarded"},
			"copy":    {"1 copy discarded"},
			"panic":   {"1 panic requeued", "1 panic acked"},
		} {
			o.told = nil
			r.Broker.Publish(rig.Queue, body)
			r.Wait(5 * time.Second)
			assert.Equal(r, want, o.all(), body)
		}
		o.told = nil
		r.Broker.Publish(rig.Queue, "later")
		r.Wait(9 * time.Second)
		assert.Empty(r, o.all(), "held")
		r.Wait(2 * time.Second)
		assert.Equal(r, []string{"1 later requeued", "1 later acked"}, o.all())
	})
}

func TestSettledTellsHeldMessagesWhenTheirSessionEnds(t *testing.T) {
	for name, stop := range map[string]bool{"requeued": true, "stale": false} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var o outcomes
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					return steadymq.RequeueAfter(nil, time.Hour)
				}, o.option())
				r.Broker.Publish(rig.Queue, "a", "b")
				r.Wait(time.Second)
				require.Empty(r, o.all())
				if stop {
					require.NoError(r, r.Stop())
				} else {
					r.Broker.Reset()
					r.Wait(time.Second)
				}
				assert.ElementsMatch(r, []string{"1 a " + name, "1 b " + name}, o.all())
			})
		})
	}
}

func TestSettledTellsOfASettlementThatCameTooLate(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var o outcomes
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if d.Session() == 1 {
				<-ctx.Done()
			}
			return nil
		}, o.option())
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.ElementsMatch(r, []string{"1 tea stale", "2 tea acked"}, o.all())
		assert.EqualValues(r, 1, r.Consumer.Stats().Stale)
	})
}

func TestSettledTellsNothingOnceRunHasReturned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var o outcomes
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
		b.Publish(rig.Queue, "tea")
		c, err := steadymq.New(b.URL, rig.Queue, steadymq.WithDialer(b.Dialer()), steadymq.WithDrainTimeout(time.Second), o.option())
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err = c.Run(ctx, func(context.Context, *steadymq.Delivery) error {
			time.Sleep(time.Minute)
			return nil
		})
		require.ErrorIs(t, err, steadymq.ErrDrainTimeout)
		time.Sleep(2 * time.Minute)
		assert.Empty(t, o.all())
		assert.EqualValues(t, 1, c.Stats().Stale)
	})
}

// A hook is a function of the user: whatever it does, Run ends in order and leaves no
// message between the chairs.
func TestSettledThatPanicsOrExitsEndsRunInOrder(t *testing.T) {
	for name, misbehave := range map[string]func(){"panic": func() { panic("boom") }, "Goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if string(d.Body) == "held" {
						return steadymq.RequeueAfter(nil, time.Hour)
					}
					return nil
				}, steadymq.WithHooks(steadymq.Hooks{Settled: func(*steadymq.Delivery, steadymq.Outcome) { misbehave() }}))
				r.Broker.Publish(rig.Queue, "held", "tea")
				r.Wait(10 * time.Second)
				require.Equal(r, steadymq.Stopped, r.Consumer.State())
				err := r.Stop()
				var panicked *steadymq.PanicError
				require.ErrorAs(r, err, &panicked)
				assert.NotErrorIs(r, err, steadymq.ErrDrainTimeout)
				assert.Zero(r, r.Broker.Unsettled(rig.Queue))
				assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue), "the held one is back")
			})
		})
	}
}

func TestStateChangedThatExitsEndsRunInOrder(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			if c.To == steadymq.Consuming {
				runtime.Goexit()
			}
		}}))
		r.Wait(10 * time.Second)
		require.Equal(r, steadymq.Stopped, r.Consumer.State())
		var refused *steadymq.OptionError
		require.ErrorAs(r, r.Stop(), &refused)
		assert.Equal(r, "WithHooks", refused.Option)
		assert.Contains(r, r.Log.Last(), "stopped", "the log goes on")
	})
}

// What a handler's error asks for.

func TestOutcomeOfRespectsWhatTheErrorSays(t *testing.T) {
	cause := errors.New("cause")
	for _, c := range []struct {
		err      error
		want     steadymq.Outcome
		explicit bool
	}{
		{nil, steadymq.Acked, true},
		{steadymq.Discard(nil), steadymq.Discarded, true},
		{fmt.Errorf("order 7: %w", steadymq.Discard(cause)), steadymq.Discarded, true},
		{errors.Join(cause, steadymq.Requeue(cause)), steadymq.Requeued, true},
		{steadymq.RequeueAfter(cause, time.Second), steadymq.Requeued, true},
		{cause, steadymq.Requeued, false},
	} {
		o, explicit := steadymq.OutcomeOf(c.err)
		assert.Equal(t, c.want, o, "%v", c.err)
		assert.Equal(t, c.explicit, explicit, "%v", c.err)
	}
}

func TestInvokeDecidesAsAConsumerDoes(t *testing.T) {
	for name, c := range map[string]struct {
		handler steadymq.Handler
		want    steadymq.Outcome
	}{
		"nil":     {rig.Ack, steadymq.Acked},
		"error":   {func(context.Context, *steadymq.Delivery) error { return errors.New("away") }, steadymq.Requeued},
		"discard": {func(context.Context, *steadymq.Delivery) error { return steadymq.Discard(nil) }, steadymq.Discarded},
		"panic":   {func(context.Context, *steadymq.Delivery) error { panic("boom") }, steadymq.Requeued},
		"by hand": {func(_ context.Context, d *steadymq.Delivery) error {
			_ = d.Discard()
			return errors.New("away")
		}, steadymq.Discarded},
	} {
		d := steadymq.NewDelivery(amqp.Delivery{Body: []byte("tea")})
		o, err := steadymq.Invoke(t.Context(), c.handler, d)
		assert.Equal(t, c.want, o, name)
		assert.Equal(t, c.want, d.Outcome(), name)
		assert.Equal(t, name == "nil", err == nil && o == steadymq.Acked, name)
		assert.Equal(t, name == "panic", errors.As(err, new(*steadymq.PanicError)), name)
	}
}

// FailNow of a test inside a handler ends the test, as everywhere.
func TestInvokeLetsGoexitPass(t *testing.T) {
	d := steadymq.NewDelivery(amqp.Delivery{})
	passed := make(chan bool, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = steadymq.Invoke(t.Context(), func(context.Context, *steadymq.Delivery) error {
			runtime.Goexit()
			return nil
		}, d)
		passed <- true
	}()
	<-done
	assert.Empty(t, passed)
	assert.Equal(t, steadymq.Requeued, d.Outcome())
}
