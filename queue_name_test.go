package steadymq_test

import (
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// The broker repeats the names of queues in what it says.
func TestQueueNamedLikeARefusalIsNotTakenAsItIs(t *testing.T) {
	const name = "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue "
	bubble(t, func(b *bench) {
		b.broker.DeclareQueue(name, steadymqtest.QueueOptions{Type: "quorum", Args: map[string]any{"x-message-ttl": int32(1), "x-delivery-limit": int32(-1)}})
		c, err := steadymq.New(b.broker.URL, name, steadymq.WithQueue(steadymq.Queue{}), steadymq.WithDialer(b.broker.Dialer()),
			steadymq.WithLogger(slog.New(slog.DiscardHandler)))
		require.NoError(b, err)
		b.consumer = c
		b.start(ack)
		b.wait(time.Second)
		assert.NotEqual(b, steadymq.Consuming, b.consumer.State(), "its time to live is another one")
	})
}
