package rabbit

import (
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestShortCommandsWorkOnEveryGeneration(t *testing.T) {
	if testing.Short() {
		t.Skip("starts brokers")
	}
	for _, g := range Generations() {
		t.Run(string(g), func(t *testing.T) {
			t.Parallel()
			b := Start(t, Config{Generation: g})
			NeedCommands(t, b)
			ctx := t.Context()
			require.NoError(t, b.NewVhost(ctx, "v"))
			require.NoError(t, b.NewUser(ctx, "u", "p"))
			require.NoError(t, b.Permit(ctx, "u", "v", ".*", ".*", ".*"))
			view := b.As("u", "p", "v")
			require.NoError(t, view.DeclareQueue("q", nil))

			require.NoError(t, b.PolicyOn(ctx, "v", "lower", ".*", `{"max-length": 1000}`))
			require.NoError(t, b.PolicyOff(ctx, "v", "lower"))
			require.NoError(t, b.NewPassword(ctx, "u", "another"))
			view = b.As("u", "another", "v")
			_, err := view.Queue("q")
			require.NoError(t, err)

			require.NoError(t, b.LimitVhost(ctx, "v", 0))
			_, err = view.Queue("q")
			require.ErrorContains(t, err, "limit")
			require.NoError(t, b.LimitVhost(ctx, "v", -1))
			require.NoError(t, b.LimitUser(ctx, "u", 0))
			_, err = view.Queue("q")
			require.ErrorContains(t, err, "limit")
			require.NoError(t, b.LimitUser(ctx, "u", -1))

			require.NoError(t, b.Forbid(ctx, "u", "v"))
			_, err = view.Queue("q")
			require.ErrorContains(t, err, "refused")
			require.NoError(t, b.DropUser(ctx, "u"))

			guest := b.As("guest", "guest", "v")
			require.NoError(t, guest.DeclareQueue("stream", amqp.Table{"x-queue-type": "stream"}))
			n, err := b.ConsumersOf(ctx, "nobody's")
			require.NoError(t, err)
			assert.Equal(t, "0", n)
			n, err = b.CrashChannels(ctx, "nobody's")
			require.NoError(t, err)
			assert.Equal(t, "0", n)
			n, err = b.CloseNamed(ctx, "nobody's", "a reason")
			require.NoError(t, err)
			assert.Equal(t, "0", n)
			require.NoError(t, b.DefaultTimeout(ctx, 1000000))
			require.NoError(t, b.DropVhost(ctx, "v"))
			_, err = b.Call(ctx, "erlang:error(oops)")
			require.Error(t, err)
		})
	}
}
