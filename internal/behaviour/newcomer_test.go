package behaviour_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// What a new user does wrong first, and what he is told. New refuses what can be seen without a
// broker.
func TestNewcomersMistakesThatNewRefuses(t *testing.T) {
	const (
		good    = "amqp://app:secret@mq.example/"
		inNew   = "steadymq: New: "
		inQueue = "steadymq: WithQueue: "
		form    = "amqp:// or amqps://user:password@host:port/vhost"
	)
	queueOf := func(q steadymq.Queue) []steadymq.Option { return rig.Options(steadymq.WithQueue(q)) }
	for name, c := range map[string]struct {
		url, queue string
		opts       []steadymq.Option
		want       string
	}{
		"empty URL":           {"", "q", nil, inNew + "the URL is empty: want " + form + ", or WithURLFunc"},
		"no scheme":           {"mq.example:5672", "q", nil, inNew + "the URL has no scheme: it must begin with amqp:// or, for TLS, amqps://"},
		"URL of the HTTP API": {"http://app:" + rig.Password + "@mq.example:15672/", "q", nil, inNew + "http is for RabbitMQ's HTTP API: AMQP has amqp:// (port 5672) and, for TLS, amqps:// (port 5671)"},
		"unescaped #": {
			"amqp://app:" + rig.Password + "#1@mq.example/", "q", nil,
			inNew + "the URL seems to have an unescaped # in user or password: percent-encode it as %23 (net/url.UserPassword does it); an @ in the virtual host or a parameter is %40",
		},
		"unescaped @": {
			"amqp://app:" + rig.Password + "@1@mq.example/", "q", nil,
			inNew + "the URL has an unescaped @ in user or password: percent-encode it as %40 (net/url.UserPassword does it)",
		},
		"unescaped %": {
			"amqp://app:" + rig.Password + "%@mq.example/", "q", nil,
			inNew + "the URL has an unescaped % in user or password: percent-encode it as %25 (net/url.UserPassword does it)",
		},
		"line break from a file":    {good + "\n", "q", nil, inNew + "the URL begins or ends with a blank or line break, as a secret read from a file does: use strings.TrimSpace"},
		"hosts of a cluster":        {"amqp://app:secret@mq1.example,mq2.example/", "q", nil, inNew + "the URL names several hosts: give one URL to New and one for each further host to WithURLs"},
		"port that is none":         {"amqp://app:secret@mq.example:port/", "q", nil, inNew + "the port of the URL is no number (or the host is missing: user:password@host:port)"},
		"virtual host with a slash": {good + "/orders", "q", nil, inNew + "the virtual host in the URL has a further /: percent-encode it as %2F, or leave it out at the end"},
		"misspelt parameter":        {good + "?heart_beat=10", "q", nil, inNew + "a parameter of the URL is unknown: is heartbeat meant?"},
		"TLS parameter on amqp":     {good + "?cacertfile=/ca.pem", "q", nil, inNew + "the parameter cacertfile of the URL has no effect without TLS: use amqps"},
		"TLS configuration on amqp": {good, "q", rig.Options(steadymq.WithTLSConfig(new(tls.Config))), "steadymq: WithTLSConfig: the URL has the scheme amqp, which is not encrypted; use amqps"},

		"no queue":   {good, "", nil, inNew + "the queue name is empty; give it, or WithTopology, or WithQueue with an exclusive classic queue, whose name the broker may choose"},
		"prefetch 0": {good, "q", rig.Options(steadymq.WithPrefetch(0)), "steadymq: WithPrefetch: must be between 1 and 65535, got 0"},
		"prefetch too low": {
			good, "q", rig.Options(steadymq.WithConcurrency(8), steadymq.WithPrefetch(4)),
			"steadymq: WithPrefetch: must be at least the concurrency (8), got 4: workers would wait for nothing",
		},
		"no logger": {good, "q", rig.Options(steadymq.WithLogger(nil)), "steadymq: WithLogger: must not be nil; use slog.New(slog.DiscardHandler) for silence"},
		"no hook":   {good, "q", rig.Options(steadymq.WithHooks(steadymq.Hooks{})), "steadymq: WithHooks: all hooks are nil; set at least one or leave the option out"},
		"duration without a unit": {
			good, "q", rig.Options(steadymq.WithDrainTimeout(30)),
			"steadymq: WithDrainTimeout: must be between 1ms and 24h0m0s, got 30ns (a bare number counts nanoseconds: write 30*time.Second)",
		},
		"heartbeat in milliseconds": {good, "q", rig.Options(steadymq.WithHeartbeat(1500 * time.Millisecond)), "steadymq: WithHeartbeat: must be whole seconds between 1s and 10m, got 1.5s"},

		"queue declared twice": {
			good, "q", rig.Options(steadymq.WithQueue(steadymq.Queue{}), steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "", nil })),
			inQueue + "cannot be combined with WithTopology; declare the queue in the function",
		},
		"kind of queue that is none": {good, "q", queueOf(steadymq.Queue{Type: "durable"}), inQueue + `Type must be "quorum", "classic" or "stream", got "durable"`},
		"exclusive quorum queue":     {good, "q", queueOf(steadymq.Queue{Exclusive: true}), inQueue + "a quorum queue can be neither exclusive, auto-delete nor transient; use a classic queue"},
		"kind of queue in capitals":  {good, "q", queueOf(steadymq.Queue{Type: "Classic", Exclusive: true}), inQueue + `Type must be "quorum", "classic" or "stream", got "Classic"`},
		"transient queue for many":   {good, "q", queueOf(steadymq.Queue{Type: "classic", Transient: true}), inQueue + "a transient queue must be exclusive: RabbitMQ 4.3 refuses shared transient queues (541)"},
		"two kinds of queue":         {good, "q", queueOf(steadymq.Queue{Args: amqp.Table{"x-queue-type": "classic"}}), inQueue + `Args has x-queue-type classic, Type says "quorum"`},
		"argument AMQP cannot carry": {good, "q", queueOf(steadymq.Queue{Args: amqp.Table{"x-expires": time.Hour}}), inQueue + "Args: key \"x-expires\" holds a value of type time.Duration, which AMQP cannot carry; it carries bool, int, int8 to int64, uint8 to uint32, float32, float64, string, []byte, time.Time, amqp.Decimal, amqp.Table and []any"},
		"only consumer of a quorum queue": {
			good, "q", append(queueOf(steadymq.Queue{}), steadymq.WithExclusive()),
			"steadymq: WithExclusive: a quorum queue takes no notice of an exclusive consumer; declare it with Args x-single-active-consumer instead",
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := steadymq.New(c.url, c.queue, c.opts...)
			require.EqualError(t, err, c.want)
			assert.NotContains(t, err.Error(), rig.Password)
		})
	}
}

// mistake is one that only the path or the broker can tell.
type mistake struct {
	name   string
	broker []steadymqtest.Option
	make   func(r *rig.Rig) // makes the mistake, for a consumer that is all right
	url    func(string) string
	opts   []steadymq.Option
	says   []string
	within time.Duration // from the call of Run on
	ends   bool          // Run ends with it; else it goes on trying
}

// The latency is 1 ms, a round trip 2 ms. The first try is told when it has failed.
var mistakes = []mistake{
	{
		name: "wrong password",
		make: func(r *rig.Rig) { r.Broker.SetPassword("app", "another") },
		says: []string{"login refused", "403 ACCESS_REFUSED", "check user name, password and mechanism"},
		ends: true,
	},
	{
		name: "wrong virtual host",
		url:  func(url string) string { return url + "shop" },
		says: []string{"530", "vhost shop not found", "the path of the URL names the virtual host: it must exist, and the user needs permissions on it"},
		ends: true,
	},
	{
		name: "no permission on the virtual host",
		make: func(r *rig.Rig) { r.Broker.RefuseVhost(530, "access to vhost '/' refused for user 'app'") },
		says: []string{"530", "refused for user 'app'", "the user needs permissions on it"},
		ends: true,
	},
	{
		name: "missing queue",
		make: func(r *rig.Rig) { r.Broker.DeleteQueue(rig.Queue) },
		says: []string{"404", "no queue 'orders' in vhost '/'", "it is asked for again until someone has declared it, which WithQueue or WithTopology can do"},
	},
	{
		name: "queue declared otherwise",
		opts: rig.Options(steadymq.WithQueue(steadymq.Queue{})),
		says: []string{"406", "inequivalent arg 'x-queue-type' for queue 'orders'", "what exists was declared otherwise: declare it alike, or delete it"},
		ends: true,
	},
	{
		name: "binding to an exchange that is not there",
		opts: rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "classic", Bindings: []steadymq.Binding{{Exchange: "shop"}}})),
		says: []string{"404", "no exchange 'shop'", "until someone has declared it"},
	},
	{
		name: "no permission",
		make: func(r *rig.Rig) {
			r.Broker.RefuseConsume(403, "read access to queue 'orders' in vhost '/' refused for user 'app'")
		},
		says: []string{"403", "read access to queue 'orders'", "give the user the permission (rabbitmqctl set_permissions)"},
		ends: true,
	},
	{
		name: "another exclusive consumer",
		make: func(r *rig.Rig) {
			r.Broker.RefuseConsume(403, "queue 'orders' in vhost '/' in exclusive use")
		},
		opts: rig.Options(steadymq.WithExclusive()),
		says: []string{"403", "in exclusive use"},
	},
	{
		name: "TLS to the port without",
		url:  func(url string) string { return strings.Replace(url, "amqp:", "amqps:", 1) },
		says: []string{"the peer speaks AMQP without TLS; use its port for TLS (5671), or an amqp URL where the path is safe"},
	},
	{
		name:   "AMQP without TLS to the port for TLS",
		broker: []steadymqtest.Option{steadymqtest.WithTLS()},
		url:    func(url string) string { return strings.Replace(url, "amqps:", "amqp:", 1) },
		says:   []string{"port 5671 is RabbitMQ's port for AMQP over TLS, which takes an amqps URL"},
	},
	{
		name:   "certificate of the broker's own making",
		broker: []steadymqtest.Option{steadymqtest.WithTLS()},
		says:   []string{"failed to verify certificate", "trust its CA by cacertfile in the URL or by WithTLSConfig (RootCAs)"},
	},
	{
		name: "port of the HTTP API",
		opts: rig.Options(dialler(func() (net.Conn, error) { return answering("HTTP/1.1 400 Bad Request\r\n\r\n"), nil })),
		says: []string{"it answers with HTTP; use the port for AMQP (5672, over TLS 5671)"},
	},
	{
		name: "host that does not resolve",
		opts: rig.Options(dialler(func() (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "mq1.test", IsNotFound: true}}
		})),
		says: []string{"lookup mq1.test: no such host"},
	},
	{
		name: "nothing listens",
		make: func(r *rig.Rig) { r.Broker.Refuse(true) },
		says: []string{"connection refused"},
	},
	{
		name:   "firewall that drops",
		make:   func(r *rig.Rig) { r.Broker.DropSYN(true) },
		says:   []string{"i/o timeout", "dial mq1.test:5672"},
		within: 5 * time.Second,
	},
	{
		name:   "broker that answers nothing",
		make:   func(r *rig.Rig) { r.Broker.HangAt(steadymqtest.StageTune, true) },
		says:   []string{"setup limit of 15s passed", "is it reachable and not overloaded? (WithSetupTimeout)"},
		within: 15 * time.Second,
	},
	{
		name: "topology that fails",
		opts: rig.Options(steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "", errors.New("no exchange configured") })),
		says: []string{"topology", "no exchange configured"},
	},
}

func TestNewcomersMistakesThatRunTells(t *testing.T) {
	for _, m := range mistakes {
		t.Run(m.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) { m.play(r) }, m.broker...)
		})
	}
}

// play makes the mistake and looks at hook, log and Run's error.
func (m *mistake) play(r *rig.Rig) {
	if m.make != nil {
		m.make(r)
	}
	if m.url == nil {
		m.url = func(url string) string { return url }
	}
	own, begun := m.url(r.Broker.URL), time.Now()
	r.Consumer = r.New(append(rig.Options(steadymq.WithURLFunc(func(context.Context) (string, error) { return own, nil })), m.opts...)...)
	r.Start(rig.Ack)
	r.Wait(max(m.within, 20*time.Millisecond) + 5*time.Millisecond)
	told := firstCause(r)
	require.Error(r, told.Cause)
	assert.LessOrEqual(r, told.Time.Sub(begun), max(m.within, 20*time.Millisecond))
	for _, text := range append(m.says, "queue "+rig.Queue, told.Host) {
		assert.Contains(r, told.Cause.Error(), text)
	}
	assert.Contains(r, told.Host, "mq1.test:")
	assert.Equal(r, rig.Queue, told.Queue)
	assert.NotContains(r, told.Cause.Error(), "\n", "one line")
	assert.NotContains(r, told.Cause.Error(), rig.Password)
	r.Wait(30 * time.Second)
	assert.Contains(r, r.Log.String(), m.says[0], "the log says it as well")
	if !m.ends {
		assert.Empty(r, r.Result, "Run goes on")
		return
	}
	require.Len(r, r.Result, 1, "Run has ended")
	err := r.Stop()
	for _, text := range append(m.says, "queue "+rig.Queue, told.Host) {
		assert.ErrorContains(r, err, text)
	}
}

// firstCause is the first change of state that has a cause.
func firstCause(r *rig.Rig) steadymq.StateChange {
	for _, c := range r.Changes() {
		if c.Cause != nil {
			return c
		}
	}
	return steadymq.StateChange{}
}

// answering is a connection to what answers everything with text.
func answering(text string) net.Conn {
	near, far := net.Pipe()
	go func() {
		_, _ = far.Read(make([]byte, 8))
		_, _ = far.Write([]byte(text))
		_ = far.Close()
	}()
	return near
}

func TestNewcomersMistakesInTheCallOfRun(t *testing.T) {
	c, err := steadymq.New("amqp://app:"+rig.Password+"@mq.example/", "q")
	require.NoError(t, err)
	require.EqualError(t, c.Run(t.Context(), nil), "steadymq: Run: the handler must not be nil")
	var none context.Context
	require.EqualError(t, c.Run(none, rig.Ack), "steadymq: Run: the context must not be nil")

	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		require.EqualError(r, r.Consumer.Run(r.Context(), rig.Ack), "steadymq: this Consumer is already running; make another Consumer with New for a second subscription")
	})
}
