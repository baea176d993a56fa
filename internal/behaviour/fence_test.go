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

// Old handlers settle through the driver's own methods.
func TestDriversOwnSettlementsDecideOnce(t *testing.T) {
	for name, c := range map[string]struct {
		settle func(d amqp.Delivery) error
		want   steadymq.Outcome
	}{
		"Ack":             {func(d amqp.Delivery) error { return d.Ack(false) }, steadymq.Acked},
		"Nack":            {func(d amqp.Delivery) error { return d.Nack(false, false) }, steadymq.Discarded},
		"Reject":          {func(d amqp.Delivery) error { return d.Reject(false) }, steadymq.Discarded},
		"Nack, requeue":   {func(d amqp.Delivery) error { return d.Nack(false, true) }, steadymq.Requeued},
		"Reject, requeue": {func(d amqp.Delivery) error { return d.Reject(true) }, steadymq.Requeued},
		"the Acknowledger": {func(d amqp.Delivery) error {
			return d.Acknowledger.Reject(d.DeliveryTag, false)
		}, steadymq.Discarded},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if d.Redelivered {
						return nil
					}
					assert.NoError(r, c.settle(d.Delivery))
					assert.Equal(r, c.want, d.Outcome())
					assert.Equal(r, "mq1.test:5672", d.Host())
					assert.ErrorIs(r, d.Reject(false), steadymq.ErrSettled)
					assert.ErrorIs(r, d.Ack(), steadymq.ErrSettled)
					return nil
				})
				r.Broker.Publish(rig.Queue, "tea")
				r.Wait(time.Second)
				assert.EqualValues(r, map[bool]int{true: 2, false: 1}[c.want == steadymq.Requeued], r.Consumer.Stats().Delivered)
				assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
			})
		})
	}
}

// acks notes what reaches the Acknowledger of a test.
type acks []string

func (a *acks) Ack(uint64, bool) error        { *a = append(*a, "ack"); return nil }
func (a *acks) Nack(uint64, bool, bool) error { *a = append(*a, "nack"); return nil }
func (a *acks) Reject(_ uint64, requeue bool) error {
	*a = append(*a, map[bool]string{true: "requeue", false: "discard"}[requeue])
	return nil
}

func TestDeliveryOfATestPassesItsSettlementOnOnce(t *testing.T) {
	for want, settle := range map[string]func(d *steadymq.Delivery) error{
		"ack": (*steadymq.Delivery).Ack, "requeue": (*steadymq.Delivery).Requeue, "discard": (*steadymq.Delivery).Discard,
	} {
		var to acks
		d := steadymq.NewDelivery(amqp.Delivery{Acknowledger: &to, DeliveryTag: 7})
		require.NoError(t, settle(d))
		assert.ErrorIs(t, settle(d), steadymq.ErrSettled)
		assert.Equal(t, acks{want}, to)
		assert.Empty(t, d.Host())
		assert.Empty(t, d.Queue())
	}
}

// A flag of its own would let each copy write a frame with the same tag, and the broker closes the
// channel by 406.
func TestCopiesOfADeliverySettleOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		process := func(d steadymq.Delivery) error { return d.Ack() }
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			driver := d.Delivery
			copied := *d
			copied.DeliveryTag = 99 // the copy's own business
			assert.NoError(r, process(copied))
			assert.Equal(r, steadymq.Acked, d.Outcome())
			assert.ErrorIs(r, process(*d), steadymq.ErrSettled)
			assert.ErrorIs(r, driver.Ack(false), steadymq.ErrSettled)
			return nil
		})
		r.Broker.Publish(rig.Queue, "once")
		r.Wait(time.Second)
		assert.Len(r, r.Broker.Ledger().Settlements, 1, "frames on the wire")
		assert.EqualValues(r, 1, r.Consumer.Stats().Sessions, "the session stays")
	})
}

// Such a Delivery has no fence and no broker.
func TestDeliveryThatNobodyDeliveredRefusesToSettle(t *testing.T) {
	d := &steadymq.Delivery{Delivery: amqp.Delivery{Body: []byte("x")}}
	require.ErrorContains(t, d.Ack(), "NewDelivery")
	assert.Equal(t, steadymq.Unsettled, d.Outcome())
	assert.Zero(t, d.Session())
	assert.Empty(t, d.Queue())
	assert.Empty(t, d.Host())
}

// Handlers that settle by hand as with the driver, and look at no error.
var refusedByHand = map[string]func(d *steadymq.Delivery) error{
	"nack of several": func(d *steadymq.Delivery) error { return d.Nack(true, true) },
	"ack of several":  func(d *steadymq.Delivery) error { return d.Delivery.Ack(true) },
	"another tag": func(d *steadymq.Delivery) error {
		d.DeliveryTag++
		return d.Reject(true)
	},
}

func TestHandlerWhoseSettlementWasRefusedHasFailed(t *testing.T) {
	for name, settle := range refusedByHand {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var refusal, told error
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if !d.Redelivered {
						refusal = settle(d)
					}
					return nil
				}, steadymq.WithHooks(steadymq.Hooks{HandlerFailed: func(_ *steadymq.Delivery, err error) { told = err }}))
				r.Broker.Publish(rig.Queue, "tea")
				r.Wait(100 * time.Millisecond)
				require.Error(r, refusal)
				require.ErrorIs(r, told, refusal)
				assert.Equal(r, 1, r.Consumer.Stats().Held)
				assert.Len(r, r.Log.Lines("handler failed", "refused", "retry_in="), 1)
				r.Wait(3 * time.Second)
				n := r.Consumer.Stats()
				assert.Equal(r, []uint64{1, 1, 1}, []uint64{n.Failed, n.Requeued, n.Acked})
			})
		})
	}
}

func TestHandlerThatSettlesAfterARefusalIsRespected(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if errors.Is(d.Nack(true, false), steadymq.ErrMultiple) {
				return d.Discard()
			}
			return nil
		})
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		n := r.Consumer.Stats()
		assert.Equal(r, []uint64{0, 1}, []uint64{n.Failed, n.Discarded})
	})
}

func TestInvokeTellsOfASettlementThatWasRefused(t *testing.T) {
	for name, settle := range refusedByHand {
		t.Run(name, func(t *testing.T) {
			var refusal error
			o, err := steadymq.Invoke(t.Context(), func(_ context.Context, d *steadymq.Delivery) error {
				refusal = settle(d)
				return nil
			}, steadymq.NewDelivery(amqp.Delivery{DeliveryTag: 7}))
			require.ErrorIs(t, err, refusal)
			assert.Equal(t, steadymq.Requeued, o)
		})
	}
}

func TestInvokeRefusesADeliveryThatNewDeliveryDidNotMake(t *testing.T) {
	for name, d := range map[string]*steadymq.Delivery{"nil": nil, "a literal": {}} {
		t.Run(name, func(t *testing.T) {
			o, err := steadymq.Invoke(t.Context(), func(context.Context, *steadymq.Delivery) error {
				t.Error("called")
				return nil
			}, d)
			require.ErrorContains(t, err, "NewDelivery")
			assert.Equal(t, steadymq.Unsettled, o)
		})
	}
}

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
		{steadymq.Park(nil), steadymq.Parked, true},
		{fmt.Errorf("order 7: %w", steadymq.Park(cause)), steadymq.Parked, true},
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
		"park":    {func(context.Context, *steadymq.Delivery) error { return steadymq.Park(nil) }, steadymq.Parked},
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

// A parked message leaves its queue, and no dead-letter exchange may get it besides.
func TestParkIsAnAckToTheAcknowledgerOfATest(t *testing.T) {
	told := new(onlyAcks)
	cause := errors.New("cannot be read")
	o, err := steadymq.Invoke(t.Context(), func(context.Context, *steadymq.Delivery) error {
		return steadymq.Park(cause)
	}, steadymq.NewDelivery(amqp.Delivery{DeliveryTag: 7, Acknowledger: told}))
	assert.Equal(t, "parked", o.String())
	require.ErrorIs(t, err, cause)
	require.EqualError(t, err, "cannot be read")
	require.EqualError(t, steadymq.Park(nil), "steadymq: message parked")
	assert.Equal(t, []uint64{7}, told.tags)
}

// onlyAcks is an amqp.Acknowledger that refuses all but acks of one message.
type onlyAcks struct{ tags []uint64 }

func (a *onlyAcks) Ack(tag uint64, multiple bool) error {
	if multiple {
		return errors.New("several")
	}
	a.tags = append(a.tags, tag)
	return nil
}

func (a *onlyAcks) Nack(uint64, bool, bool) error { panic("nack") }

func (a *onlyAcks) Reject(uint64, bool) error { panic("reject") }

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

func TestNewDeliveryServesHandlerTests(t *testing.T) {
	d := steadymq.NewDelivery(amqp.Delivery{Body: []byte("x"), Redelivered: true, Headers: amqp.Table{"x-delivery-count": int64(3)}})
	assert.Equal(t, 4, d.Attempt())
	assert.Equal(t, steadymq.Unsettled, d.Outcome())
	require.NoError(t, d.Ack())
	require.ErrorIs(t, d.Discard(), steadymq.ErrSettled)
	assert.Equal(t, steadymq.Acked, d.Outcome())
	assert.Zero(t, d.Session())
}
