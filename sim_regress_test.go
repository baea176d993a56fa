package steadymq_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// Tests of what the simulation has found, reduced.

func TestSessionsLostRightAfterConsumeOkBackOffOnSeveralHostsToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b *steadymqtest.Broker
		b = steadymqtest.NewBroker(t, steadymqtest.WithHosts(2), steadymqtest.WithHooks(steadymqtest.Hooks{
			Consuming: func(steadymqtest.ConsumerRecord) {
				time.AfterFunc(10*time.Millisecond, func() { b.CloseConnections(320, "flaps") })
			},
		}))
		b.DeclareQueue(queue, steadymqtest.QueueOptions{})
		c, err := steadymq.New(b.URLs()[0], queue, steadymq.WithURLs(b.URLs()[1:]...), steadymq.WithDialer(b.Dialer()))
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		require.NoError(t, c.Run(ctx, ack))
		assert.Less(t, len(b.Ledger().Dials), 60, "no hot loop")
	})
}

// leftBehind runs a consumer whose only handler outlasts the drain limit, does
// something to the broker while it drains, and returns how often
// HandlerFailed was called by the end of the handler, and the error of Run.
func leftBehind(t *testing.T, meanwhile func(*steadymqtest.Broker)) (failed int, err error) {
	b := steadymqtest.NewBroker(t)
	b.DeclareQueue(queue, steadymqtest.QueueOptions{})
	b.Publish(queue, "work")
	done := make(chan struct{})
	c, err := steadymq.New(b.URL, queue, steadymq.WithDialer(b.Dialer()), steadymq.WithDrainTimeout(2*time.Second),
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
