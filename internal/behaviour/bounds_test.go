package behaviour_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

// bound is what an option takes and what it refuses, at the edges of its range.
type bound struct {
	option  string
	legal   []steadymq.Option
	illegal []steadymq.Option
	// with are options that the edge needs beside it.
	with []steadymq.Option
}

func bounds() []bound {
	const ms, day = time.Millisecond, 24 * time.Hour
	var all []bound
	for name, f := range map[string]func(time.Duration) steadymq.Option{
		"WithDialTimeout":    steadymq.WithDialTimeout,
		"WithSetupTimeout":   steadymq.WithSetupTimeout,
		"WithCloseTimeout":   steadymq.WithCloseTimeout,
		"WithDrainTimeout":   steadymq.WithDrainTimeout,
		"WithHandlerTimeout": steadymq.WithHandlerTimeout,
	} {
		all = append(all, bound{option: name, legal: rig.Options(f(ms), f(day)), illegal: rig.Options(f(0), f(ms-1), f(day+1))})
	}
	delay, backoff, prefetch, concurrency := steadymq.WithRequeueDelay, steadymq.WithBackoff, steadymq.WithPrefetch, steadymq.WithConcurrency
	long := func(n int) string { return strings.Repeat("n", n) }
	queue := func(q steadymq.Queue) steadymq.Option { return steadymq.WithQueue(q) }
	args := func(n int) amqp.Table { return amqp.Table{"k": long(n)} } // 7 bytes more in a frame
	const room = 128<<10 - 1<<10 - 7
	nested := func(levels int) amqp.Table { // besides the outermost
		t := amqp.Table{}
		for range levels {
			t = amqp.Table{"t": t}
		}
		return t
	}
	bindings := []steadymq.Binding{{}}
	exchange := func(x steadymq.Exchange) steadymq.Option {
		return queue(steadymq.Queue{Exchange: &x, Bindings: bindings})
	}
	dead := func(d steadymq.DeadLetter) steadymq.Option { return queue(steadymq.Queue{DeadLetter: &d}) }
	bind := func(b steadymq.Binding) steadymq.Option {
		return queue(steadymq.Queue{Bindings: []steadymq.Binding{b}})
	}
	return append(all, []bound{
		{option: "WithHeartbeat", legal: rig.Options(steadymq.WithHeartbeat(time.Second), steadymq.WithHeartbeat(10*time.Minute)), illegal: rig.Options(
			steadymq.WithHeartbeat(0), steadymq.WithHeartbeat(time.Second-1), steadymq.WithHeartbeat(time.Second+1), steadymq.WithHeartbeat(10*time.Minute-1),
			steadymq.WithHeartbeat(10*time.Minute+1), steadymq.WithHeartbeat(10*time.Minute+time.Second), steadymq.WithHeartbeat(999*ms), steadymq.WithHeartbeat(1500*ms),
		)},
		{option: "WithWriteDelay", legal: rig.Options(steadymq.WithWriteDelay(0), steadymq.WithWriteDelay(1), steadymq.WithWriteDelay(100*ms)), illegal: rig.Options(
			steadymq.WithWriteDelay(-1), steadymq.WithWriteDelay(100*ms+1),
		)},
		{option: "WithStallDetector", legal: rig.Options(steadymq.WithStallDetector(time.Second), steadymq.WithStallDetector(day)), illegal: rig.Options(
			steadymq.WithStallDetector(0), steadymq.WithStallDetector(time.Second-1), steadymq.WithStallDetector(day+1),
		)},
		{option: "WithRequeueDelay", legal: rig.Options(delay(ms, ms), delay(day, day), delay(ms, day), delay(time.Second, time.Second)), illegal: rig.Options(
			delay(ms-1, time.Second), delay(0, 0), delay(time.Second, day+1), delay(day+1, day+1), delay(time.Second, time.Second-1), delay(time.Second, 0),
		)},
		{option: "WithBackoff", legal: rig.Options(backoff(ms, ms), backoff(day, day), backoff(ms, day), backoff(time.Second, time.Second)), illegal: rig.Options(
			backoff(ms-1, time.Second), backoff(0, 0), backoff(time.Second, day+1), backoff(day+1, day+1), backoff(time.Second, time.Second-1), backoff(time.Second, 0),
		)},
		{option: "WithConcurrency", legal: rig.Options(concurrency(1), concurrency(65535)), illegal: rig.Options(concurrency(0), concurrency(-1), concurrency(65536))},
		{option: "WithPrefetch", legal: rig.Options(prefetch(1), prefetch(65535)), illegal: rig.Options(prefetch(0), prefetch(-1), prefetch(65536))},
		{option: "WithPrefetch", with: rig.Options(concurrency(7)), legal: rig.Options(prefetch(7), prefetch(8)), illegal: rig.Options(prefetch(6), prefetch(1))},
		{option: "WithPrefetch", with: rig.Options(concurrency(65535)), legal: rig.Options(prefetch(65535)), illegal: rig.Options(prefetch(65534))},
		{option: "WithMaxMessageSize", legal: rig.Options(steadymq.WithMaxMessageSize(1), steadymq.WithMaxMessageSize(1<<63-1)), illegal: rig.Options(
			steadymq.WithMaxMessageSize(0), steadymq.WithMaxMessageSize(-1), steadymq.WithMaxMessageSize(-1<<63),
		)},
		{option: "WithConnectionName", legal: rig.Options(steadymq.WithConnectionName("n"), steadymq.WithConnectionName(long(255))), illegal: rig.Options(
			steadymq.WithConnectionName(""), steadymq.WithConnectionName(long(256)),
		)},
		{option: "WithConsumerTag", legal: rig.Options(steadymq.WithConsumerTag("n"), steadymq.WithConsumerTag(long(200)), steadymq.WithConsumerTag(strings.Repeat("ä", 100))), illegal: rig.Options(
			steadymq.WithConsumerTag(""), steadymq.WithConsumerTag(long(201)), steadymq.WithConsumerTag(strings.Repeat("ä", 101)), steadymq.WithConsumerTag("\xff"),
		)},
		{option: "WithConsumeArgs", legal: rig.Options(
			steadymq.WithConsumeArgs(nil), steadymq.WithConsumeArgs(amqp.Table{long(255): 1}), steadymq.WithConsumeArgs(args(room)), steadymq.WithConsumeArgs(nested(100)),
		), illegal: rig.Options(
			steadymq.WithConsumeArgs(amqp.Table{long(256): 1}), steadymq.WithConsumeArgs(args(room+1)), steadymq.WithConsumeArgs(nested(101)),
		)},
		{option: "WithQueue", legal: rig.Options(
			queue(steadymq.Queue{Args: args(room)}),
			exchange(steadymq.Exchange{Name: long(255)}), exchange(steadymq.Exchange{Name: "n", Kind: "headers"}), exchange(steadymq.Exchange{Name: "n", Kind: "x-" + long(253)}),
			exchange(steadymq.Exchange{Name: "n", Args: args(room)}),
			bind(steadymq.Binding{Exchange: long(255), Key: long(255), Args: args(room)}),
			dead(steadymq.DeadLetter{Queue: long(255)}), dead(steadymq.DeadLetter{Exchange: long(255), Key: long(255)}),
			queue(steadymq.Queue{Type: "classic", Transient: true, Exclusive: true}),
			queue(steadymq.Queue{Type: "stream", Args: amqp.Table{"x-queue-type": "stream"}}),
			dead(steadymq.DeadLetter{Exchange: "e", Key: rig.Queue}), // an exchange may lead elsewhere
		), illegal: rig.Options(
			queue(steadymq.Queue{Args: args(room + 1)}),
			queue(steadymq.Queue{Type: "Classic"}), queue(steadymq.Queue{Type: "stream", Exclusive: true}), queue(steadymq.Queue{Type: "stream", AutoDelete: true}),
			queue(steadymq.Queue{Type: "stream", Transient: true}), queue(steadymq.Queue{AutoDelete: true}), queue(steadymq.Queue{Type: "quorum", Exclusive: true}),
			queue(steadymq.Queue{Type: "classic", Transient: true}), queue(steadymq.Queue{Type: "classic", Transient: true, AutoDelete: true}),
			queue(steadymq.Queue{Args: amqp.Table{"x-queue-type": "classic"}}), queue(steadymq.Queue{Type: "stream", Args: amqp.Table{"x-queue-type": "quorum"}}),
			exchange(steadymq.Exchange{}), exchange(steadymq.Exchange{Name: long(256)}), exchange(steadymq.Exchange{Name: "n", Kind: "Direct"}), exchange(steadymq.Exchange{Name: "n", Kind: "xdirect"}),
			exchange(steadymq.Exchange{Name: "n", Kind: "x-" + long(254)}), exchange(steadymq.Exchange{Name: "n", Args: args(room + 1)}), exchange(steadymq.Exchange{Name: "\xff"}),
			queue(steadymq.Queue{Exchange: &steadymq.Exchange{Name: "n"}}),
			queue(steadymq.Queue{Exchange: &steadymq.Exchange{Name: "n"}, Bindings: []steadymq.Binding{{Exchange: "else"}}}),
			bind(steadymq.Binding{}), bind(steadymq.Binding{Exchange: long(256)}), bind(steadymq.Binding{Exchange: "e", Key: long(256)}), bind(steadymq.Binding{Exchange: "e", Args: args(room + 1)}),
			dead(steadymq.DeadLetter{}), dead(steadymq.DeadLetter{Queue: long(256)}), dead(steadymq.DeadLetter{Exchange: long(256)}), dead(steadymq.DeadLetter{Exchange: "e", Key: long(256)}),
			dead(steadymq.DeadLetter{Queue: "q", Exchange: "e"}), dead(steadymq.DeadLetter{Queue: "q", Key: "k"}),
			dead(steadymq.DeadLetter{Queue: rig.Queue}), dead(steadymq.DeadLetter{Key: rig.Queue}),
			queue(steadymq.Queue{Type: "stream", DeadLetter: &steadymq.DeadLetter{Queue: "dead"}}),
			queue(steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "dead"}, Args: amqp.Table{"x-dead-letter-exchange": ""}}),
			queue(steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Exchange: "dead"}, Args: amqp.Table{"x-dead-letter-routing-key": "k"}}),
		)},
		{option: "WithExclusive", with: rig.Options(steadymq.WithExclusive()), legal: rig.Options(queue(steadymq.Queue{Type: "classic"})), illegal: rig.Options(
			queue(steadymq.Queue{}), queue(steadymq.Queue{Type: "quorum"}), queue(steadymq.Queue{Type: "stream"}),
		)},
		{option: "WithQueue", with: rig.Options(steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "", nil })), illegal: rig.Options(
			queue(steadymq.Queue{}),
		)},
		{option: "WithTLSConfig", legal: rig.Options(
			steadymq.WithTLSConfig(new(tls.Config)), steadymq.WithTLSConfig(&tls.Config{MinVersion: tls.VersionTLS12}), steadymq.WithTLSConfig(&tls.Config{MaxVersion: tls.VersionTLS12}),
			steadymq.WithTLSConfig(&tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { return nil }}),
			steadymq.WithTLSConfig(&tls.Config{InsecureSkipVerify: true, VerifyPeerCertificate: verifyNothing}),
		), illegal: rig.Options(
			steadymq.WithTLSConfig(nil), steadymq.WithTLSConfig(&tls.Config{MinVersion: tls.VersionTLS11}), steadymq.WithTLSConfig(&tls.Config{MaxVersion: tls.VersionTLS11}),
			steadymq.WithTLSConfig(&tls.Config{InsecureSkipVerify: true}),
		)},
		{option: "WithStallDetector", with: rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-stream-filter": "eu"})), illegal: rig.Options(
			steadymq.WithStallDetector(time.Minute),
		)},
		{option: "WithSASL", illegal: rig.Options(steadymq.WithSASL(), steadymq.WithSASL(nil), steadymq.WithSASL(&amqp.ExternalAuth{}, nil))},
		{option: "WithURLs", legal: rig.Options(steadymq.WithURLs("amqps://b")), illegal: rig.Options(steadymq.WithURLs(), steadymq.WithURLs(""), steadymq.WithURLs("amqps://b", "b"))},
		{option: "WithHooks", illegal: rig.Options(steadymq.WithHooks(steadymq.Hooks{})), legal: rig.Options(
			steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) {}}), steadymq.WithHooks(steadymq.Hooks{HandlerFailed: func(*steadymq.Delivery, error) {}}),
			steadymq.WithHooks(steadymq.Hooks{Unreadable: func(*steadymq.MessageError) {}}), steadymq.WithHooks(steadymq.Hooks{Settled: func(*steadymq.Delivery, steadymq.Outcome) {}}),
		)},
		{option: "WithMiddleware", illegal: rig.Options(steadymq.WithMiddleware(nil), steadymq.WithMiddleware(func(h steadymq.Handler) steadymq.Handler { return h }, nil)), legal: rig.Options(steadymq.WithMiddleware())},
	}...)
}

func verifyNothing([][]byte, [][]*x509.Certificate) error { return nil }

func TestOptionsAreTakenUpToTheirBoundsAndNoFurther(t *testing.T) {
	for _, b := range bounds() {
		for i, legal := range b.legal {
			_, err := steadymq.New("amqps://h", rig.Queue, append(b.with, legal)...)
			assert.NoError(t, err, "%s, legal %d", b.option, i)
		}
		for i, illegal := range b.illegal {
			place := fmt.Sprintf("%s, illegal %d", b.option, i)
			_, err := steadymq.New("amqps://h", rig.Queue, append(b.with, illegal)...)
			for _, one := range problemsOf(t, err, place) {
				assert.Equal(t, b.option, one.Option, place)
				assert.NotEmpty(t, one.Reason, place)
			}
		}
	}
}

// problemsOf are the errors that New has joined, of which there is at least one.
func problemsOf(t *testing.T, err error, place string) (all []*steadymq.OptionError) {
	t.Helper()
	require.Error(t, err, place)
	for _, one := range err.(interface{ Unwrap() []error }).Unwrap() {
		var refused *steadymq.OptionError
		require.ErrorAs(t, one, &refused, place)
		all = append(all, refused)
	}
	require.NotEmpty(t, all, place)
	return all
}

func TestParametersOfTheURLAreTakenUpToTheirBoundsAndNoFurther(t *testing.T) {
	for parameter, c := range map[string]struct{ legal, illegal []string }{
		"heartbeat":          {[]string{"1", "600"}, []string{"0", "-1", "601", "1.5", "99999999999999999999", "5&heartbeat=5"}},
		"connection_timeout": {[]string{"1", "86400000"}, []string{"0", "-1", "86400001", "1.5", "99999999999999999999", "5&connection_timeout=5"}},
		"channel_max":        {[]string{"0", "1", "65535"}, []string{"-1", "65536", "99999999999999999999", "5&channel_max=5"}},
		"auth_mechanism":     {[]string{"plain", "PLAIN", "amqplain", "EXTERNAL"}, []string{"", "plai", "scram-sha-256"}},
		"verify":             {[]string{"verify_peer"}, []string{"verify_none", "Verify_Peer"}},
	} {
		for _, value := range c.legal {
			_, err := steadymq.New("amqps://h?"+parameter+"="+value, rig.Queue)
			assert.NoError(t, err, "%s=%s", parameter, value)
			_, err = steadymq.New("amqps://h", rig.Queue, steadymq.WithURLs("amqps://h/?"+parameter+"="+value))
			assert.NoError(t, err, "%s=%s", parameter, value)
		}
		for _, value := range c.illegal {
			place := parameter + "=" + value
			_, err := steadymq.New("amqps://h?"+place, rig.Queue)
			problems := problemsOf(t, err, place)
			assert.Equal(t, "New", problems[0].Option, place)
			assert.Contains(t, problems[0].Reason, parameter)
			_, err = steadymq.New("amqps://h", rig.Queue, steadymq.WithURLs("amqps://h", "amqps://h?"+place))
			problems = problemsOf(t, err, place)
			assert.Equal(t, "WithURLs", problems[0].Option, place)
			assert.Contains(t, problems[0].Reason, "URL 2: ", place)
		}
	}
}

func TestNamesOfQueuesAreTakenUpToTheirBoundsAndNoFurther(t *testing.T) {
	topology := steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return rig.Queue, nil })
	exclusive := steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true})
	for place, c := range map[string]struct {
		queue   string
		options []steadymq.Option
		legal   bool
	}{
		"one byte":                           {"q", nil, true},
		"255 bytes":                          {strings.Repeat("q", 255), nil, true},
		"256 bytes":                          {strings.Repeat("q", 256), nil, false},
		"none":                               {"", nil, false},
		"none, beside WithTopology":          {"", rig.Options(topology), true},
		"none, of the broker's naming":       {"", rig.Options(exclusive), true},
		"none, of a quorum queue":            {"", rig.Options(steadymq.WithQueue(steadymq.Queue{})), false},
		"none, of a shared classic queue":    {"", rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "classic"})), false},
		"none, of an exclusive quorum queue": {"", rig.Options(steadymq.WithQueue(steadymq.Queue{Exclusive: true})), false},
		"CR":                                 {"a\rb", nil, false},
		"LF":                                 {"a\n", nil, false},
		"no UTF-8":                           {"\xff", nil, false},
	} {
		_, err := steadymq.New("amqp://h", c.queue, c.options...)
		if c.legal {
			assert.NoError(t, err, place)
			continue
		}
		assert.Equal(t, "New", problemsOf(t, err, place)[0].Option, place)
	}
}

// What is refused stays refused where a later option of the same name is fine.
func TestProblemOfAnOptionThatIsOverriddenIsTold(t *testing.T) {
	fine := rig.Options(
		steadymq.WithHeartbeat(time.Second), steadymq.WithDialTimeout(time.Second), steadymq.WithWriteDelay(0), steadymq.WithBackoff(time.Second, time.Second),
		steadymq.WithRequeueDelay(time.Second, time.Second), steadymq.WithStallDetector(time.Second), steadymq.WithPrefetch(7), steadymq.WithConcurrency(7),
		steadymq.WithMaxMessageSize(7), steadymq.WithConnectionName("n"), steadymq.WithConsumerTag("n"), steadymq.WithTLSConfig(new(tls.Config)),
		steadymq.WithURLs("amqps://b"), steadymq.WithConsumeArgs(nil), steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) {}}),
	)
	_, err := steadymq.New("amqps://h", rig.Queue, fine...)
	require.NoError(t, err)
	for i, c := range []struct {
		option  string
		earlier steadymq.Option
	}{
		{"WithHeartbeat", steadymq.WithHeartbeat(0)},
		{"WithDialTimeout", steadymq.WithDialTimeout(0)},
		{"WithWriteDelay", steadymq.WithWriteDelay(-1)},
		{"WithBackoff", steadymq.WithBackoff(2*time.Second, time.Second)},
		{"WithRequeueDelay", steadymq.WithRequeueDelay(2*time.Second, time.Second)},
		{"WithStallDetector", steadymq.WithStallDetector(0)},
		{"WithPrefetch", steadymq.WithPrefetch(0)},
		{"WithConcurrency", steadymq.WithConcurrency(0)},
		{"WithMaxMessageSize", steadymq.WithMaxMessageSize(0)},
		{"WithConnectionName", steadymq.WithConnectionName("")},
		{"WithConsumerTag", steadymq.WithConsumerTag("")},
		{"WithTLSConfig", steadymq.WithTLSConfig(nil)},
		{"WithURLs", steadymq.WithURLs()},
		{"WithConsumeArgs", steadymq.WithConsumeArgs(amqp.Table{"k": struct{}{}})},
		{"WithHooks", steadymq.WithHooks(steadymq.Hooks{})},
	} {
		place := fmt.Sprintf("%d: %s", i, c.option)
		_, err := steadymq.New("amqps://h", rig.Queue, append(rig.Options(c.earlier), fine...)...)
		problems := problemsOf(t, err, place)
		require.Len(t, problems, 1, place)
		assert.Equal(t, c.option, problems[0].Option)
	}
}
