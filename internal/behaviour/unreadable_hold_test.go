package behaviour_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestHoldOfAnUnreadableMessageIsItsOwn(t *testing.T) {
	for name, delays := range map[string][2]time.Duration{
		"short": {10 * time.Millisecond, 10 * time.Millisecond},
		"long":  {24 * time.Hour, 24 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: []byte("large")})
				r.Consuming(rig.Ack, steadymq.WithMaxMessageSize(1), steadymq.WithRequeueDelay(delays[0], delays[1]), steadymq.WithPrefetch(2))
				r.Wait(7 * time.Minute)
				assert.EqualValues(r, 1, r.Consumer.Stats().Unreadable)
				assert.Equal(r, 1, r.Consumer.Stats().Held)
				assert.NotZero(r, r.TimesLogged("take what cannot be read out of the queue with another client"))
				r.Wait(9 * time.Minute)
				assert.Greater(r, r.Consumer.Stats().Unreadable, uint64(1), "it has come again")
			})
		})
	}
}
