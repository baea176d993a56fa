package behaviour_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// Options bring goroutines, timers and places of their own to each session.
func TestSessionsLeaveNothingInMemoryWhateverTheOptions(t *testing.T) {
	expiring := func(context.Context) (steadymq.Credentials, error) {
		return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: time.Now().Add(5 * time.Second)}, nil
	}
	for name, of := range map[string]struct {
		queue string
		opts  []steadymq.Option
	}{
		"stream":       {"log", rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "stream"}), steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))},
		"server-named": {"", rig.Options(steadymq.WithQueue(events))},
		"exclusive":    {"mine", rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true}))},
		"credentials":  {rig.Queue, rig.Options(steadymq.WithCredentials(expiring))},
		"topology":     {"", rig.Options(steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return rig.Queue, nil }))},
		"few channels": {rig.Queue, rig.Options(steadymq.WithURLFunc(func(context.Context) (string, error) {
			return "amqp://app:" + rig.Password + "@mq1.test?channel_max=2", nil
		}))},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeclareExchange("events", "fanout")
				quiet := steadymq.Hooks{HandlerFailed: func(*steadymq.Delivery, error) {}}
				r.Consumer = r.NewFor(of.queue, append(of.opts, steadymq.WithStallDetector(5*time.Second),
					steadymq.WithLogger(slog.New(slog.DiscardHandler)), steadymq.WithHooks(quiet))...)
				r.Start(rig.Ack)
				r.Wait(time.Second)
				cycle := func(n int) {
					for range n {
						for _, lose := range []func(){
							func() { r.Broker.Reset() },
							func() { r.Broker.CloseChannels(406, "unknown delivery tag 7") },
							func() { r.Broker.CancelConsumers("") },
						} {
							r.Wait(40 * time.Second) // three in a row would replace the connection
							lose()
						}
					}
					r.Wait(time.Minute)
				}
				cycle(10)
				before, sessions := heap(), r.Consumer.Stats().Sessions
				cycle(70)
				lost := int(r.Consumer.Stats().Sessions - sessions)
				require.GreaterOrEqual(r, lost, 200)
				kept := (heap() - before) / lost
				t.Logf("%d bytes kept per lost session", kept)
				assert.Less(r, kept, 2500, "bytes kept per lost session: what the kit remembers")
			}, steadymqtest.WithoutLedger())
		})
	}
}
