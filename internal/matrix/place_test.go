package matrix_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

// TestQuietStreamOfARealBrokerSkipsNothingThatIsPublishedWhileAway loses consumers of every
// generation before their first delivery, with a user who may not configure the stream and a
// connection that may have one channel.
func TestQuietStreamOfARealBrokerSkipsNothingThatIsPublishedWhileAway(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	var configs []rabbit.Config
	for _, g := range rabbit.Generations() {
		configs = append(configs, rabbit.Config{Generation: g})
	}
	for _, broker := range rabbit.StartAll(t, configs...) {
		rabbit.NeedCommands(t, broker)
		require.NoError(t, broker.AddUser(t.Context(), "reader", "reader"))
		require.NoError(t, broker.SetPermissions(t.Context(), "/", "reader", "", "", ".*"))
		for _, g := range beginnings {
			for _, old := range []int{0, 500} {
				t.Run(fmt.Sprintf("%s, %s, %d old messages", broker.Version(), g.name, old), func(t *testing.T) {
					t.Parallel()
					lostBeforeTheFirst(t, broker, g, old)
				})
			}
		}
	}
}

// beginning is what a stream's consumer asks for.
type beginning struct {
	name   string
	offset func() any
}

var beginnings = []beginning{
	{"default", func() any { return nil }},
	{"next", func() any { return "next" }},
	{"last", func() any { return "last" }},
	{"interval", func() any { return "15m" }},
	{"time now", func() any { return time.Now() }},
}

// options name the stream as one: x-stream-offset does, and WithQueue does where there is none.
func (g beginning) options() []steadymq.Option {
	if at := g.offset(); at != nil {
		return []steadymq.Option{steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": at})}
	}
	return []steadymq.Option{steadymq.WithQueue(steadymq.Queue{Type: "stream"})}
}

func lostBeforeTheFirst(t *testing.T, broker *rabbit.Broker, g beginning, old int) {
	name := "quiet stream " + strings.NewReplacer(" ", "-").Replace(t.Name())
	conn, err := amqp.Dial(broker.URL())
	require.NoError(t, err)
	defer scenario.CloseWithin(conn, time.Second)
	ch, err := conn.Channel()
	require.NoError(t, err)
	require.NoError(t, ch.Confirm(false))
	_, err = ch.QueueDeclare(name, true, false, false, false, amqp.Table{"x-queue-type": "stream"})
	require.NoError(t, err)
	defer func() { _, _ = ch.QueueDelete(name, false, false, false) }()
	publish := func(what string, n int) (bodies []string) {
		var last *amqp.DeferredConfirmation
		for i := range n {
			body := fmt.Sprint(what, " ", i)
			bodies = append(bodies, body)
			last, err = ch.PublishWithDeferredConfirm("", name, true, false, amqp.Publishing{Body: []byte(body)})
			require.NoError(t, err)
		}
		if last != nil {
			_, err := last.WaitContext(t.Context())
			require.NoError(t, err)
		}
		return bodies
	}
	before := publish("old", old)
	time.Sleep(1100 * time.Millisecond) // times have whole seconds

	proxy, err := faultproxy.New(broker.Addr())
	require.NoError(t, err)
	defer proxy.Close()
	consuming := make(chan struct{}, 100)
	options := append(g.options(), steadymq.WithLogger(slog.New(slog.DiscardHandler)), steadymq.WithPrefetch(500), steadymq.WithConcurrency(1),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			if c.To == steadymq.Consuming {
				consuming <- struct{}{}
			}
		}}))
	login := broker.URLFor("reader", "reader", "/")
	if g.offset() == nil { // declared, which the reader may not
		login = broker.URL()
	}
	c, err := steadymq.New(proxy.URL(login)+"?channel_max=1", name, options...)
	require.NoError(t, err)
	var mu sync.Mutex
	var handled []string
	got := func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(handled)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- c.Run(ctx, func(_ context.Context, d *steadymq.Delivery) error {
			mu.Lock()
			defer mu.Unlock()
			handled = append(handled, string(d.Body))
			return nil
		})
	}()
	defer func() {
		stop()
		assert.NoError(t, <-done)
	}()
	awaited := func() {
		t.Helper()
		select {
		case <-consuming:
		case <-time.After(20 * time.Second):
			require.Fail(t, "not consuming")
		}
	}
	awaited()
	time.Sleep(300 * time.Millisecond)
	first := got()
	require.True(t, slices.Equal(first, before[len(before)-len(first):]), "the last of what was there: %v", first)
	if g.name == "default" || g.name == "next" || strings.HasPrefix(g.name, "time ") {
		require.Empty(t, first)
	}

	want := first
	for i := range 2 {
		proxy.Refuse()
		proxy.Reset()
		want = append(want, publish(fmt.Sprint("while away ", i), 20)...)
		proxy.Heal()
		awaited()
	}
	want = append(want, publish("after", 3)...)
	require.Eventually(t, func() bool { return slices.Contains(got(), "after 2") }, 20*time.Second, 10*time.Millisecond)
	assert.Equal(t, want, firsts(got())) // what was not acked comes again
}

// firsts are the messages in the order in which each was handled first.
func firsts(handled []string) (all []string) {
	for _, body := range handled {
		if !slices.Contains(all, body) {
			all = append(all, body)
		}
	}
	return all
}
