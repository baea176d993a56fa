package steadymq_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// Options bring goroutines, timers and places of their own to each session.
func TestSessionsLeaveNothingInMemoryWhateverTheOptions(t *testing.T) {
	expiring := func(context.Context) (steadymq.Credentials, error) {
		return steadymq.Credentials{Username: "app", Password: password, Expires: time.Now().Add(5 * time.Second)}, nil
	}
	for name, of := range map[string]struct {
		queue string
		opts  []steadymq.Option
	}{
		"stream":       {"log", opts(steadymq.WithQueue(steadymq.Queue{Type: "stream"}), steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))},
		"server-named": {"", opts(steadymq.WithQueue(events))},
		"exclusive":    {"mine", opts(steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true}))},
		"credentials":  {queue, opts(steadymq.WithCredentials(expiring))},
		"topology":     {"", opts(steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return queue, nil }))},
		"few channels": {queue, opts(steadymq.WithURLFunc(func(context.Context) (string, error) {
			return "amqp://app:" + password + "@mq1.test?channel_max=2", nil
		}))},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.DeclareExchange("events", "fanout")
				quiet := steadymq.Hooks{HandlerFailed: func(*steadymq.Delivery, error) {}}
				b.consumer = b.makeFor(of.queue, append(of.opts, steadymq.WithStallDetector(5*time.Second),
					steadymq.WithLogger(slog.New(slog.DiscardHandler)), steadymq.WithHooks(quiet))...)
				b.start(ack)
				b.wait(time.Second)
				cycle := func(n int) {
					for range n {
						for _, lose := range []func(){
							func() { b.broker.Reset() },
							func() { b.broker.CloseChannels(406, "unknown delivery tag 7") },
							func() { b.broker.CancelConsumers("") },
						} {
							b.wait(40 * time.Second) // three in a row would replace the connection
							lose()
						}
					}
					b.wait(time.Minute)
				}
				cycle(10)
				before, sessions := heap(), b.consumer.Stats().Sessions
				cycle(70)
				lost := int(b.consumer.Stats().Sessions - sessions)
				require.GreaterOrEqual(b, lost, 200)
				kept := (heap() - before) / lost
				t.Logf("%d bytes kept per lost session", kept)
				assert.Less(b, kept, 2500, "bytes kept per lost session: what the kit remembers")
			}, steadymqtest.WithoutLedger())
		})
	}
}
