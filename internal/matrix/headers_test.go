package matrix_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

// largeHeaders is nearly as much as a publisher can send: a frame has 131,072 bytes.
const largeHeaders = 130_900

// TestHeadersOfARealBrokerAreRead publishes headers that the driver cannot read to every generation
// and type of queue, between good messages.
func TestHeadersOfARealBrokerAreRead(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	var configs []rabbit.Config
	for _, g := range rabbit.Generations() {
		configs = append(configs, rabbit.Config{Generation: g})
	}
	for _, broker := range rabbit.StartAll(t, configs...) {
		for _, k := range kinds() {
			t.Run(broker.Version()+", "+string(k), func(t *testing.T) { strangeHeaders(t, broker, k) })
		}
	}
}

func strangeHeaders(t *testing.T, broker *rabbit.Broker, k kind) {
	many := amqp.Table{}
	for i := range 9000 {
		many[fmt.Sprint(i)] = true
	}
	deep := amqp.Table{}
	for range 40 {
		deep = amqp.Table{"t": deep}
	}
	name := "strange headers " + string(k)
	conn, err := amqp.DialConfig(broker.URL(), amqp.Config{Dial: func(network, address string) (net.Conn, error) {
		c, err := net.DialTimeout(network, address, 5*time.Second)
		return oldIntegers{c}, err
	}})
	require.NoError(t, err)
	defer scenario.CloseWithin(conn, time.Second)
	ch, err := conn.Channel()
	require.NoError(t, err)
	require.NoError(t, ch.Confirm(false))
	_, err = ch.QueueDeclare(name, true, false, false, false, amqp.Table{"x-queue-type": string(k)})
	require.NoError(t, err)
	before, err := ch.QueueDeclare(name+" before", true, false, false, false, amqp.Table{
		"x-dead-letter-exchange": "", "x-dead-letter-routing-key": name, "x-message-ttl": int32(1),
	})
	require.NoError(t, err)
	publish := func(queue, body string, headers amqp.Table) {
		confirm, err := ch.PublishWithDeferredConfirm("", queue, true, false, amqp.Publishing{Headers: headers, Body: []byte(body)})
		require.NoError(t, err)
		confirmed, err := confirm.WaitContext(t.Context())
		require.NoError(t, err, body)
		require.True(t, confirmed, body)
	}
	publish(name, "good 1", nil)
	publish(name, "9,000 headers", many)
	publish(name, "40 deep", deep)
	publish(name, "type L", amqp.Table{"marker": int64(-2)})
	bodies := []string{"good 1", "9,000 headers", "40 deep", "type L", "good 2"}
	// No stream of 3.10 gets dead letters.
	if k != stream || !strings.HasPrefix(broker.Version(), "3.10") {
		publish(before.Name, "over frame_max", amqp.Table{"large": strings.Repeat("x", largeHeaders)})
		bodies = append(bodies, "over frame_max")
	}
	publish(name, "good 2", nil)

	var mu sync.Mutex
	got := map[string][]amqp.Table{}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	options := []steadymq.Option{steadymq.WithLogger(slog.New(slog.DiscardHandler))}
	if k == stream {
		options = append(options, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
	}
	c, err := steadymq.New(broker.URL(), name, options...)
	require.NoError(t, err)
	require.NoError(t, c.Run(ctx, func(_ context.Context, d *steadymq.Delivery) error {
		mu.Lock()
		defer mu.Unlock()
		got[string(d.Body)] = append(got[string(d.Body)], d.Headers)
		if len(got) == len(bodies) {
			cancel()
		}
		return nil
	}))
	for _, body := range bodies {
		assert.Len(t, got[body], 1, body)
	}
	require.False(t, t.Failed())
	assert.GreaterOrEqual(t, len(got["9,000 headers"][0]), 9000)
	assert.EqualValues(t, -2, got["type L"][0]["marker"])
	for _, headers := range got["over frame_max"] {
		assert.Len(t, headers["large"], largeHeaders)
		assert.NotEmpty(t, headers["x-death"])
	}
	depth := 0
	for in, ok := got["40 deep"][0], true; ok; depth++ {
		in, ok = in["t"].(amqp.Table)
	}
	if k != stream { // which keeps messages as AMQP 1.0, without tables in tables since 4.0
		assert.Equal(t, 41, depth)
	}
	assert.EqualValues(t, 1, c.Stats().Sessions)
	assert.Zero(t, c.Stats().Unreadable)
	for _, queue := range []string{name, before.Name} {
		_, err := ch.QueueDelete(queue, false, false, false)
		assert.NoError(t, err)
	}
}

// oldIntegers writes the header "marker" as the type L of AMQP 0-9, which the driver never does.
type oldIntegers struct{ net.Conn }

func (c oldIntegers) Write(p []byte) (int, error) {
	return c.Conn.Write(bytes.ReplaceAll(p, []byte("\x06markerl"), []byte("\x06markerL")))
}
