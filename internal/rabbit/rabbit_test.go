package rabbit

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	code := m.Run()
	CloseShared()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func TestConfigBecomesBothFiles(t *testing.T) {
	cfg := Config{
		ConsumerTimeout: 3 * time.Second, ChannelTick: time.Second, Heartbeat: 2 * time.Second, NetTick: 8 * time.Second,
		Conf: []string{"channel_max = 5"}, Advanced: []string{"{ra, []}"},
	}
	conf := cfg.rabbitConf("127.0.0.1:1", "127.0.0.1:2", "/dir")
	assert.Contains(t, conf, "listeners.tcp.default = 127.0.0.1:1\n")
	assert.Contains(t, conf, "consumer_timeout = 3000\nheartbeat = 2\nchannel_max = 5\n")
	assert.Equal(t, "[{ra, []},\n {rabbit, [{channel_tick_interval, 1000}]},\n {kernel, [{net_ticktime, 8}]}].\n", cfg.advancedConf())
	assert.Equal(t, "[].\n", Config{}.advancedConf())
	assert.NotContains(t, conf, "ssl")

	cfg = Config{Plugins: []string{"one", "two"}, TLS: &TLS{Key: []byte("a key")}}
	assert.Equal(t, "[one,two].\n", cfg.enabledPlugins())
	assert.Contains(t, cfg.rabbitConf("", "127.0.0.1:2", "/dir"), "listeners.ssl.default = 127.0.0.1:2\n")
	assert.Contains(t, cfg.rabbitConf("", "", "/dir"), "ssl_options.keyfile = /dir/key.pem\n")
	assert.Equal(t, "a key", string(cfg.tlsFiles()["key.pem"]))
}

func TestMirrorIsTheFirstDebianArchiveOfEitherFormat(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"deb822":        {"Types: deb\n# http://example.org/archive/debian\nURIs: http://example.org/debian\n", "http://example.org/debian"},
		"one line":      {"deb [signed-by=/k] https://example.org/debian/ bookworm main\n", "https://example.org/debian/"},
		"security only": {"deb http://example.org/debian-security bookworm-security main\n", ""},
		"another":       {"deb https://example.org/ubuntu noble main\n", ""},
		"sources":       {"deb-src http://example.org/debian bookworm main\n", ""},
	} {
		assert.Equal(t, c.want, mirrorIn(c.text), name)
	}
}

func TestGenerationsAreToldApartByTheirVersion(t *testing.T) {
	old, mid, cur := &Broker{version: "3.10.8"}, &Broker{version: "4.0.5"}, &Broker{version: "4.3.6"}
	assert.True(t, old.HasQuorum() && old.HasStreams() && old.TimeoutClosesChannel() && old.HasMirroring())
	assert.False(t, old.PerQueueTimeout() || old.HasDeliveryLimit() || old.TimeoutCancelsConsumer())
	assert.True(t, mid.PerQueueTimeout() && mid.HasDeliveryLimit() && mid.TimeoutClosesChannel())
	assert.True(t, cur.TimeoutCancelsConsumer())
	assert.False(t, cur.TimeoutClosesChannel() || cur.HasMirroring())
	assert.False(t, (&Broker{}).HasQuorum())
}

func TestABrokerThatIsSomebodyElsesIsNotCommanded(t *testing.T) {
	b := &Broker{}
	_, err := b.Ctl(t.Context(), "status")
	require.ErrorIs(t, err, ErrUnsupported)
	require.ErrorIs(t, b.Stop(t.Context()), ErrUnsupported)
	require.NoError(t, b.Close())
}

func TestAnUnusableURLIsRefusedWithoutItsPassword(t *testing.T) {
	t.Setenv("STEADYMQ_AMQP_URL", "amqp://u:canary%zz@h/")
	_, err := Find(t.Context(), Config{})
	require.Error(t, err)
	assert.NotContains(t, err.Error(), "canary")
}

func TestOnlyAnEndedProcessOfThisMachineLeavesOrphans(t *testing.T) {
	assert.False(t, orphaned(owner()), "this process lives")
	host, _ := os.Hostname()
	assert.True(t, orphaned(host+"/1/another-start"))
	assert.False(t, orphaned("elsewhere/1/another-start"))
	assert.False(t, orphaned(host+"/1/"), "unknown start")
	assert.False(t, orphaned("nonsense"))
}

// open connects under a name until the test ends.
func open(t *testing.T, b *Broker, name string) *amqp.Connection {
	t.Helper()
	conn, err := amqp.DialConfig(b.URL(), amqp.Config{
		Dial: amqp.DefaultDial(5 * time.Second), Properties: amqp.Table{"connection_name": name},
	})
	require.NoError(t, err)
	t.Cleanup(func() { closeConn(conn) })
	return conn
}

func TestEveryGenerationObeysItsCommands(t *testing.T) {
	if testing.Short() {
		t.Skip("starts three brokers")
	}
	for _, g := range Generations() {
		t.Run(string(g), func(t *testing.T) {
			t.Parallel()
			b := Start(t, Config{Generation: g, ChannelTick: time.Second, Heartbeat: 20 * time.Second})
			NeedCommands(t, b)
			ctx := t.Context()
			assert.Regexp(t, "^"+string(g)+`\.`, b.Version())

			out, err := b.Eval(ctx, "application:get_env(rabbit, channel_tick_interval).")
			require.NoError(t, err)
			assert.Contains(t, out, "1000", "advanced.config is read")

			require.NoError(t, b.DeclareQueue("q", amqp.Table{"x-queue-type": "quorum"}))
			q, err := b.Queue("q")
			require.NoError(t, err)
			assert.Equal(t, Queue{}, q)
			counts, err := b.QueueCounts(ctx, "/", "q")
			require.NoError(t, err)
			assert.Equal(t, QueueCounts{}, counts)

			stays, goes := open(t, b, "stays"), open(t, b, "goes-1")
			closed := goes.NotifyClose(make(chan *amqp.Error, 1))
			n, err := b.CloseConnectionsNamed(ctx, "goes", "because", 2, 10*time.Millisecond)
			require.NoError(t, err)
			assert.Equal(t, 1, n)
			assert.Equal(t, 320, (<-closed).Code)
			assert.False(t, stays.IsClosed())

			require.NoError(t, b.StopApp(ctx))
			_, err = probe(b.URL())
			require.Error(t, err)
			require.NoError(t, b.StartApp(ctx))
			require.NoError(t, b.Pause(ctx))
			require.NoError(t, b.Unpause(ctx))
			addr := b.Addr()
			require.NoError(t, b.Kill(ctx))
			_, err = probe(b.URL())
			require.Error(t, err)
			require.NoError(t, b.Start(ctx))
			assert.Equal(t, addr, b.Addr(), "the port survives a restart")
			_, err = b.Queue("q")
			require.NoError(t, err, "and so does the queue")
			require.NoError(t, b.DeleteQueue("q"))
		})
	}
}

func TestUsersVhostsAndLimits(t *testing.T) {
	b := Shared(t)
	NeedCommands(t, b)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	require.NoError(t, b.AddVhost(ctx, "v w", "guest"))
	require.NoError(t, b.AddUser(ctx, "u", "p@s"))
	require.NoError(t, b.SetPermissions(ctx, "v w", "u", ".*", ".*", ".*"))
	_, err := probe(b.URLFor("u", "p@s", "v w"))
	require.NoError(t, err)
	require.NoError(t, b.SetVhostLimits(ctx, "v w", `{"max-connections": 0}`))
	_, err = probe(b.URLFor("u", "p@s", "v w"))
	require.ErrorContains(t, err, "limit")
	require.NoError(t, b.SetVhostLimits(ctx, "v w", `{}`))
	require.NoError(t, b.SetPolicy(ctx, "v w", "p", ".*", `{"max-length": 10}`))
	require.NoError(t, b.ClearPolicy(ctx, "v w", "p"))
	require.NoError(t, b.ClearPermissions(ctx, "v w", "u"))
	_, err = probe(b.URLFor("u", "p@s", "v w"))
	require.Error(t, err)
	require.NoError(t, b.DeleteVhost(ctx, "v w"))
}
