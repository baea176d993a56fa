package behaviour_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestConsumeOkThatIsLostOnTheWayIsNoSession(t *testing.T) {
	var broker *steadymqtest.Broker
	confirmed := 0
	rig.Bubble(t, func(r *rig.Rig) {
		broker = r.Broker
		r.Run(rig.Ack)
		err := <-r.Result // a plain refusal before the first session
		r.Result = nil
		var at *steadymq.SessionError
		require.ErrorAs(r, err, &at)
		assert.Equal(r, "consume", at.Op)
		assert.ErrorContains(r, err, "406")
		assert.Zero(r, r.Consumer.Stats().Sessions)
		assert.Equal(r, 3, confirmed)
	}, steadymqtest.WithHooks(steadymqtest.Hooks{Consuming: func(steadymqtest.ConsumerRecord) {
		if confirmed++; confirmed == 3 {
			broker.RefuseConsume(406, "inequivalent arg")
		}
		broker.Reset() // consume-ok is still under way
	}}))
}

func TestAfterTheFirstSessionRunNeverGivesUp(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.RefuseLogin(true)
		r.Broker.Reset()
		r.Wait(10 * time.Minute)
		require.Empty(r, r.Result)
		r.Broker.Heal()
		r.Broker.RefuseVhost(530, "NOT_ALLOWED - vhost x not found")
		r.Wait(10 * time.Minute)
		require.Empty(r, r.Result)
		r.Broker.Heal()
		r.Broker.RefuseVhost(0, "")
		r.Wait(31 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	})
}

func TestTransientRefusalsBeforeTheFirstSessionAreRetried(t *testing.T) {
	for _, refusal := range []struct {
		code int
		text string
	}{
		{404, "NOT_FOUND - no queue 'orders' in vhost '/'"},
		{405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'orders'"},
		{403, "ACCESS_REFUSED - queue 'orders' in vhost '/' in exclusive use"},
	} {
		t.Run(refusal.text, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.RefuseConsume(refusal.code, refusal.text)
				r.Run(rig.Ack)
				r.Wait(20 * time.Second)
				require.Empty(r, r.Result)
				r.Broker.RefuseConsume(0, "")
				r.Wait(31 * time.Second)
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
			})
		})
	}
}

func TestFatalDecidesAlone(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithFatal(func(err error) bool {
			var said *amqp.Error
			return errors.As(err, &said) && said.Code == 320
		}))
		r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 1")
		r.Wait(time.Second)
		require.Empty(r, r.Result)
		r.Broker.CloseConnections(320, "CONNECTION_FORCED - credential expired")
		r.Wait(time.Second)
		require.Len(r, r.Result, 1)
		assert.ErrorContains(r, r.Stop(), "credential expired")
	})
}

func TestRunRefusesMisuseBeforeDialling(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consumer = r.New()
		var refused *steadymq.OptionError
		require.ErrorAs(r, r.Consumer.Run(r.Context(), nil), &refused)
		assert.Equal(r, "Run", refused.Option)
		assert.Empty(r, r.Broker.Ledger().Dials)
		assert.Equal(r, steadymq.Idle, r.Consumer.State())
		r.Start(rig.Ack)
		r.Wait(time.Second)
		require.ErrorIs(r, r.Consumer.Run(r.Context(), rig.Ack), steadymq.ErrRunning)
		require.NoError(r, r.Stop())
		r.Start(rig.Ack)
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State(), "a stopped consumer may run again")
	})
}

func TestEveryTransitionIsToldOnceInOrder(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.CloseConnections(320, "CONNECTION_FORCED - bye")
		r.Wait(time.Second)
		require.NoError(r, r.Stop())
		var got []steadymq.State
		at := steadymq.Idle
		for _, c := range r.Changes() {
			assert.Equal(r, at, c.From)
			at = c.To
			got = append(got, c.To)
		}
		assert.Equal(r, []steadymq.State{
			steadymq.Connecting, steadymq.Consuming, steadymq.Backoff, steadymq.Connecting,
			steadymq.Consuming, steadymq.Draining, steadymq.Stopped,
		}, got)
		lines := strings.Split(strings.TrimSpace(r.Log.String()), "\n")
		assert.Len(r, lines, len(got), "one line each, none per message")
		assert.Contains(r, lines[2], "retry_in=")
		assert.Contains(r, lines[2], "bye")
		assert.Contains(r, lines[2], "session=1")
	})
}
