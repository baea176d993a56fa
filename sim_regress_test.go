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
