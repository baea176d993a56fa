package behaviour_test

import (
	"context"
	"crypto/tls"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
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
		_, err := steadymq.New("amqps://h/", rig.Queue, opts...)
		assert.ErrorContains(t, err, reason)
	}
	_, err := steadymq.New("amqps://h/", rig.Queue, blind, steadymq.WithInsecureSkipVerify())
	assert.NoError(t, err)
}

// What an operator has to mend is named by what was declared.
func TestRefusedDeclarationNamesWhatWasDeclared(t *testing.T) {
	for reason, c := range map[string]struct {
		queue  steadymq.Queue
		before func(r *rig.Rig)
	}{
		`: exchange "events": `: {
			steadymq.Queue{Exchange: &steadymq.Exchange{Name: "events", Kind: "topic"}, Bindings: []steadymq.Binding{{Key: "k"}}},
			func(r *rig.Rig) { r.Broker.DeclareExchange("events", "fanout") },
		},
		`: binding to exchange "nowhere": `: {
			steadymq.Queue{Type: "classic", Bindings: []steadymq.Binding{{Exchange: "nowhere"}}},
			func(r *rig.Rig) { r.Broker.DeleteQueue(rig.Queue) },
		},
		`: dead-letter queue "amq.dead": `: {
			steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "amq.dead"}},
			func(r *rig.Rig) { r.Broker.DeleteQueue(rig.Queue) },
		},
	} {
		t.Run(reason, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				c.before(r)
				r.Run(rig.Ack, steadymq.WithQueue(c.queue), steadymq.WithFatal(func(error) bool { return true }))
				r.Wait(time.Minute)
				err := r.Stop()
				var said *amqp.Error
				require.ErrorAs(r, err, &said)
				assert.ErrorContains(r, err, reason)
				assert.ErrorContains(r, err, rig.Queue)
			}, steadymqtest.WithVersion(4, 0))
		})
	}
}

func TestTopologyThatNamesNoQueueIsToldSo(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c, err := steadymq.New(r.Broker.URL, "", steadymq.WithDialer(r.Broker.Dialer()),
			steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "", nil }),
			steadymq.WithFatal(func(error) bool { return true }))
		require.NoError(r, err)
		assert.ErrorContains(r, c.Run(r.Context(), rig.Ack), "the topology function returned none and New was given none")
		assert.Empty(r, c.Queue())
	})
}

func TestConsumerWhoseHookPanickedSaysWhatToDo(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) { panic("boom") }}))
		r.Wait(time.Second)
		for range 2 {
			err := r.Stop()
			assert.ErrorContains(r, err, "WithHooks: a hook panicked, mend it and make a new Consumer")
			assert.ErrorContains(r, err, "boom")
			r.Start(rig.Ack)
			r.Wait(time.Second)
		}
		assert.Equal(r, rig.Queue, r.Consumer.Queue())
	})
}
