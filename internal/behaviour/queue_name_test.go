package behaviour_test

import (
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// The broker repeats the names of queues in what it says.
func TestQueueNamedLikeARefusalIsNotTakenAsItIs(t *testing.T) {
	const name = "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue "
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue(name, steadymqtest.QueueOptions{Type: "quorum", Args: map[string]any{"x-message-ttl": int32(1), "x-delivery-limit": int32(-1)}})
		c, err := steadymq.New(r.Broker.URL, name, steadymq.WithQueue(steadymq.Queue{}), steadymq.WithDialer(r.Broker.Dialer()),
			steadymq.WithLogger(slog.New(slog.DiscardHandler)))
		require.NoError(r, err)
		r.Consumer = c
		r.Start(rig.Ack)
		r.Wait(time.Second)
		assert.NotEqual(r, steadymq.Consuming, r.Consumer.State(), "its time to live is another one")
	})
}
