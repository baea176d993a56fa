package steadymq_test

import (
	"context"
	"crypto/tls"
	"errors"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// nameless is a mechanism that panics before it has said a word.
type nameless struct{ amqp.ExternalAuth }

func (*nameless) Mechanism() string { panic("no name") }

// What is asked for before a login is the user's: it costs its own try, and is named.
func TestLoginThatMisbehavesCostsItsOwnTry(t *testing.T) {
	for reason, option := range map[string]func(b *bench) steadymq.Option{
		"WithCredentials: the vault is sealed": func(*bench) steadymq.Option {
			return steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
				return steadymq.Credentials{}, errors.New("the vault is sealed")
			})
		},
		"the name of a login mechanism: WithSASL": func(*bench) steadymq.Option { return steadymq.WithSASL(new(nameless)) },
		"WithTLSConfig: ": func(b *bench) steadymq.Option {
			config := b.broker.TLSConfig()
			config.VerifyConnection = func(tls.ConnectionState) error { panic("no look") }
			return steadymq.WithTLSConfig(config)
		},
	} {
		t.Run(reason, func(t *testing.T) {
			bubble(t, func(b *bench) {
				opts := []steadymq.Option{steadymq.WithTLSConfig(b.broker.TLSConfig()), option(b)}
				b.run(ack, opts...)
				b.wait(time.Minute)
				require.NotEmpty(b, b.causes())
				assert.Less(b, len(b.causes()), 60)
				var at *steadymq.SessionError
				require.ErrorAs(b, b.causes()[0], &at)
				assert.Equal(b, "open", at.Op)
				assert.ErrorContains(b, at, reason)
				assert.Zero(b, b.open())
			}, steadymqtest.WithTLS())
		})
	}
}
