package behaviour_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// encoding/json refuses what is deeper than 10,000 levels, and a publisher may send 32,768.
func TestDeepHeadersAreShownDownToALevel(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		texts := make(chan string, 1)
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{RawHeaders: rig.NestedArrays(12_000)})
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			text, err := json.Marshal(d)
			assert.NoError(r, err)
			texts <- string(text)
			return nil
		})
		assert.Contains(r, <-texts, strings.Repeat("[", 99)+`"..."`+strings.Repeat("]", 99))
	})
	table := amqp.Table{"end": 1}
	for range 200 {
		table = amqp.Table{"k": table}
	}
	text, err := json.Marshal(steadymq.NewDelivery(amqp.Delivery{Headers: table}))
	require.NoError(t, err)
	assert.Equal(t, 100, strings.Count(string(text), `{"k":`))
	assert.Contains(t, string(text), `{"k":"..."}`)
}
