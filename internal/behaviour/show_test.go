package behaviour_test

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"math"
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

// The Acknowledger of the embedded amqp.Delivery leads back to the delivery, so the exported fields
// are a cycle.
func TestDeliveryCanBeMarshalledAndLogged(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var got *steadymq.Delivery
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			got = d
			return nil
		})
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{
			Body: []byte(`{"cup":1}`), ID: "m1",
		})
		r.Wait(time.Second)
		for name, v := range map[string]any{"pointer": got, "value": *got, "inside": map[string]any{"d": got}} {
			text, err := json.Marshal(v)
			require.NoError(r, err, name)
			for _, part := range []string{`"queue":"orders"`, `"routing_key":"orders"`, `"delivery_tag":1`, `"attempt":1`, `"body":"{\"cup\":1}"`, `"message_id":"m1"`, `"outcome":"acked"`} {
				assert.Contains(r, string(text), part, name)
			}
			assert.NotContains(r, string(text), rig.Password)
			var log bytes.Buffer
			slog.New(slog.NewJSONHandler(&log, nil)).Info("got", "delivery", v)
			assert.NotContains(r, log.String(), "!ERROR", name)
			assert.Contains(r, log.String(), `"delivery_tag":1`, name)
			assert.NotContains(r, fmt.Sprintf("%v %+v %#v", v, v, v)+log.String(), rig.Password)
		}
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Info("got", "delivery", got)
		assert.Contains(r, log.String(), "delivery.body_size=9")
		assert.NotContains(r, log.String(), "cup")
	})
}

// A publisher may put anything there.
func TestHostileMessageCanBeMarshalled(t *testing.T) {
	d := steadymq.NewDelivery(amqp.Delivery{
		Body:      []byte{0xff, 0x00},
		Timestamp: time.Unix(1<<60, 0),
		Headers: amqp.Table{
			"nan": math.NaN(), "inf": []any{float32(math.Inf(1)), math.Inf(-1), 1.5},
			"when": time.Unix(1<<59, 0), "then": time.Unix(0, 0),
			"x-death": []any{amqp.Table{"count": int64(3), "\xff": []byte{1}}},
		},
	})
	text, err := json.Marshal(d)
	require.NoError(t, err)
	var back map[string]any
	require.NoError(t, json.Unmarshal(text, &back))
	assert.Equal(t, "/wA=", back["body_base64"])
	assert.NotContains(t, back, "body")
	headers := back["headers"].(map[string]any)
	assert.Equal(t, "NaN", headers["nan"])
	assert.Equal(t, []any{"+Inf", "-Inf", 1.5}, headers["inf"])
	assert.Equal(t, "1970-01-01T00:00:00Z", headers["then"])
	assert.InDelta(t, 1<<60, back["timestamp"], 1)
	empty, err := json.Marshal(steadymq.Delivery{})
	require.NoError(t, err)
	assert.Contains(t, string(empty), `"outcome":"unsettled"`)
	var none *steadymq.Delivery
	text, err = json.Marshal(none)
	require.NoError(t, err)
	assert.Equal(t, "null", string(text))
}

func TestCredentialsNeverShowThePassword(t *testing.T) {
	c := steadymq.Credentials{Username: "app", Password: rig.Password, Expires: time.Unix(0, 0).UTC()}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("login", "as", c, "also", &c, "in", map[string]any{"c": c})
	slog.New(slog.NewTextHandler(&log, nil)).Info("login", "as", c, "also", &c)
	for _, v := range []any{c, &c, struct{ C steadymq.Credentials }{c}, []steadymq.Credentials{c}} {
		text, err := json.Marshal(v)
		require.NoError(t, err)
		log.Write(text)
		fmt.Fprintf(&log, "%v %+v %#v %s %q %x", v, v, v, v, v, v)
	}
	text, err := xml.Marshal(c)
	require.NoError(t, err)
	log.Write(text)
	assert.NotContains(t, log.String(), rig.Password)
	assert.NotContains(t, log.String(), fmt.Sprintf("%x", rig.Password))
	assert.Contains(t, log.String(), "app (password not shown, expires 1970-01-01T00:00:00Z)")
}

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
