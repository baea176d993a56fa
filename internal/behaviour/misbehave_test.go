package behaviour_test

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
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// nameless is a mechanism that panics before it has said a word.
type nameless struct{ amqp.ExternalAuth }

func (*nameless) Mechanism() string { panic("no name") }

// What is asked for before a login is the user's: it costs its own try, and is named.
func TestLoginThatMisbehavesCostsItsOwnTry(t *testing.T) {
	for reason, option := range map[string]func(r *rig.Rig) steadymq.Option{
		"WithCredentials: the vault is sealed": func(*rig.Rig) steadymq.Option {
			return steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
				return steadymq.Credentials{}, errors.New("the vault is sealed")
			})
		},
		"the name of a login mechanism: WithSASL": func(*rig.Rig) steadymq.Option { return steadymq.WithSASL(new(nameless)) },
		"WithTLSConfig: ": func(r *rig.Rig) steadymq.Option {
			config := r.Broker.TLSConfig()
			config.VerifyConnection = func(tls.ConnectionState) error { panic("no look") }
			return steadymq.WithTLSConfig(config)
		},
	} {
		t.Run(reason, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				opts := []steadymq.Option{steadymq.WithTLSConfig(r.Broker.TLSConfig()), option(r)}
				r.Run(rig.Ack, opts...)
				r.Wait(time.Minute)
				require.NotEmpty(r, r.Causes())
				assert.Less(r, len(r.Causes()), 60)
				var at *steadymq.SessionError
				require.ErrorAs(r, r.Causes()[0], &at)
				assert.Equal(r, "open", at.Op)
				assert.ErrorContains(r, at, reason)
				assert.Zero(r, r.OpenConnections())
			}, steadymqtest.WithTLS())
		})
	}
}
