package steadymq_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestHoldOfAnUnreadableMessageIsItsOwn(t *testing.T) {
	for name, delays := range map[string][2]time.Duration{
		"short": {10 * time.Millisecond, 10 * time.Millisecond},
		"long":  {24 * time.Hour, 24 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.PublishMessage(queue, steadymqtest.Message{Body: []byte("large")})
				b.consuming(ack, steadymq.WithMaxMessageSize(1), steadymq.WithRequeueDelay(delays[0], delays[1]), steadymq.WithPrefetch(2))
				b.wait(7 * time.Minute)
				assert.EqualValues(b, 1, b.consumer.Stats().Unreadable)
				assert.Equal(b, 1, b.consumer.Stats().Held)
				assert.NotZero(b, b.told("take what cannot be read out of the queue with another client"))
				b.wait(9 * time.Minute)
				assert.Greater(b, b.consumer.Stats().Unreadable, uint64(1), "it has come again")
			})
		})
	}
}
