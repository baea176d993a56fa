package steadymq_test

import (
	"context"
	"crypto/tls"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	url := func(context.Context) (string, error) { return "", nil }
	blind := steadymq.WithTLSConfig(&tls.Config{InsecureSkipVerify: true})
	for reason, opts := range map[string][]steadymq.Option{
		"WithBackoff: the limit must not be below": {steadymq.WithBackoff(2*time.Second, time.Second)},
		"WithSASL: a mechanism is nil":             {steadymq.WithSASL(&amqp.PlainAuth{}, nil)},
		"WithCredentials: must not be nil":         {steadymq.WithCredentials(nil)},
		"WithTLSConfig: TLS below 1.2":             {steadymq.WithTLSConfig(&tls.Config{MaxVersion: tls.VersionTLS11})},
		"WithTLSConfig: InsecureSkipVerify":        {blind},
		"WithURLFunc: cannot be combined":          {steadymq.WithURLFunc(url), steadymq.WithURLs("amqps://h/")},
	} {
		_, err := steadymq.New("amqps://h/", queue, opts...)
		assert.ErrorContains(t, err, reason)
	}
	_, err := steadymq.New("amqps://h/", queue, blind, steadymq.WithInsecureSkipVerify())
	assert.NoError(t, err)
}

// What an operator has to mend is named by what was declared.
func TestRefusedDeclarationNamesWhatWasDeclared(t *testing.T) {
	for reason, c := range map[string]struct {
		queue  steadymq.Queue
		before func(b *bench)
	}{
		`: exchange "events": `: {
			steadymq.Queue{Exchange: &steadymq.Exchange{Name: "events", Kind: "topic"}, Bindings: []steadymq.Binding{{Key: "k"}}},
			func(b *bench) { b.broker.DeclareExchange("events", "fanout") },
		},
		`: binding to exchange "nowhere": `: {
			steadymq.Queue{Type: "classic", Bindings: []steadymq.Binding{{Exchange: "nowhere"}}},
			func(b *bench) { b.broker.DeleteQueue(queue) },
		},
		`: dead-letter queue "amq.dead": `: {
			steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "amq.dead"}},
			func(b *bench) { b.broker.DeleteQueue(queue) },
		},
	} {
		t.Run(reason, func(t *testing.T) {
			bubble(t, func(b *bench) {
				c.before(b)
				b.run(ack, steadymq.WithQueue(c.queue), steadymq.WithFatal(func(error) bool { return true }))
				b.wait(time.Minute)
				err := b.stop()
				var said *amqp.Error
				require.ErrorAs(b, err, &said)
				assert.ErrorContains(b, err, reason)
				assert.ErrorContains(b, err, queue)
			}, steadymqtest.WithVersion(4, 0))
		})
	}
}

func TestTopologyThatNamesNoQueueIsToldSo(t *testing.T) {
	bubble(t, func(b *bench) {
		c, err := steadymq.New(b.broker.URL, "", steadymq.WithDialer(b.broker.Dialer()),
			steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "", nil }),
			steadymq.WithFatal(func(error) bool { return true }))
		require.NoError(b, err)
		assert.ErrorContains(b, c.Run(b.Context(), ack), "the topology function returned none and New was given none")
		assert.Empty(b, c.Queue())
	})
}

func TestConsumerWhoseHookPanickedSaysWhatToDo(t *testing.T) {
	bubble(t, func(b *bench) {
		b.run(ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) { panic("boom") }}))
		b.wait(time.Second)
		for range 2 {
			err := b.stop()
			assert.ErrorContains(b, err, "WithHooks: a hook panicked, mend it and make a new Consumer")
			assert.ErrorContains(b, err, "boom")
			b.start(ack)
			b.wait(time.Second)
		}
		assert.Equal(b, queue, b.consumer.Queue())
	})
}
