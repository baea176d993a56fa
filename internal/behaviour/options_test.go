package behaviour_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
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

func TestTimesThatAMQPCannotCarryAreRefused(t *testing.T) {
	for _, table := range []amqp.Table{
		{"x-stream-offset": time.Time{}},
		{"x-stream-offset": time.Unix(-1, 0)},
		{"a": amqp.Table{"b": time.Time{}}},
		{"a": []any{1, time.Time{}}},
	} {
		for name, option := range map[string]steadymq.Option{
			"WithConsumeArgs": steadymq.WithConsumeArgs(table),
			"WithQueue":       steadymq.WithQueue(steadymq.Queue{Args: table}),
		} {
			_, err := steadymq.New("amqp://h/", rig.Queue, option)
			var refused *steadymq.OptionError
			require.ErrorAs(t, err, &refused)
			assert.Equal(t, name, refused.Option)
			assert.Contains(t, refused.Reason, "before 1970")
		}
	}
	for _, fine := range []time.Time{time.Unix(0, 0), time.Now(), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)} {
		_, err := steadymq.New("amqp://h/", rig.Queue, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": fine}))
		assert.NoError(t, err)
	}
}

func TestDurationsOfOptionsAreCheckedOverTheirWholeRange(t *testing.T) {
	for name, option := range map[string]func(time.Duration) steadymq.Option{
		"WithHeartbeat":      steadymq.WithHeartbeat,
		"WithDialTimeout":    steadymq.WithDialTimeout,
		"WithSetupTimeout":   steadymq.WithSetupTimeout,
		"WithCloseTimeout":   steadymq.WithCloseTimeout,
		"WithDrainTimeout":   steadymq.WithDrainTimeout,
		"WithHandlerTimeout": steadymq.WithHandlerTimeout,
		"WithStallDetector":  steadymq.WithStallDetector,
		"WithWriteDelay":     steadymq.WithWriteDelay,
		"WithBackoff":        func(d time.Duration) steadymq.Option { return steadymq.WithBackoff(d, d) },
	} {
		for _, d := range []time.Duration{math.MinInt64, -time.Hour, -1, 24*time.Hour + 1, math.MaxInt64 / 2, math.MaxInt64} {
			_, err := steadymq.New("amqp://h/", rig.Queue, option(d))
			var refused *steadymq.OptionError
			require.ErrorAs(t, err, &refused, "%s(%v)", name, d)
			assert.Equal(t, name, refused.Option)
		}
	}
}

func TestNewRefusesBadInputAllAtOnceWithoutShowingTheURL(t *testing.T) {
	cases := []struct {
		name   string
		url    string
		queue  string
		opts   []steadymq.Option
		option []string
	}{
		{"empty queue", "amqp://h/", "", nil, []string{"New"}},
		{"unknown scheme", "http://u:" + rig.Password + "@h/", "q", nil, []string{"New"}},
		{"URL that does not parse", "amqp://u:" + rig.Password + "%zz@h/", "q", nil, []string{"New"}},
		{"URL with a space", "amqp://u:" + rig.Password + " @h/", "q", nil, []string{"New"}},
		{"port out of range", "amqp://u:" + rig.Password + "@h:99999/", "q", nil, []string{"New"}},
		{"no heartbeats", "amqp://u:" + rig.Password + "@h/?heartbeat=0", "q", nil, []string{"New"}},
		{"second URL", "amqp://h/", "q", rig.Options(steadymq.WithURLs("amqp://u:" + rig.Password + "%zz@h/")), []string{"WithURLs"}},
		{"concurrency", "amqp://h/", "q", rig.Options(steadymq.WithConcurrency(0)), []string{"WithConcurrency"}},
		{"prefetch 0", "amqp://h/", "q", rig.Options(steadymq.WithPrefetch(0)), []string{"WithPrefetch"}},
		{"prefetch below concurrency", "amqp://h/", "q", rig.Options(steadymq.WithPrefetch(2), steadymq.WithConcurrency(3)), []string{"WithPrefetch"}},
		{
			"durations", "amqp://h/", "q", rig.Options(
				steadymq.WithDialTimeout(0), steadymq.WithSetupTimeout(-1), steadymq.WithCloseTimeout(0), steadymq.WithDrainTimeout(5),
				steadymq.WithHandlerTimeout(0), steadymq.WithRequeueDelay(-time.Second, time.Minute), steadymq.WithHeartbeat(1500*time.Millisecond),
				steadymq.WithBackoff(0, 0), steadymq.WithWriteDelay(-1), steadymq.WithMaxMessageSize(0)),
			[]string{
				"WithDialTimeout", "WithSetupTimeout", "WithCloseTimeout", "WithDrainTimeout", "WithHandlerTimeout",
				"WithRequeueDelay", "WithHeartbeat", "WithBackoff", "WithBackoff", "WithWriteDelay", "WithMaxMessageSize",
			},
		},
		{
			"nils", "amqp://h/", "q", rig.Options(
				nil, steadymq.WithLogger(nil), steadymq.WithHooks(steadymq.Hooks{}), steadymq.WithFatal(nil), steadymq.WithTopology(nil), steadymq.WithURLs(),
				steadymq.WithTLSConfig(nil), steadymq.WithSASL(), steadymq.WithDialer(nil), steadymq.WithMiddleware(nil), steadymq.WithURLFunc(nil)),
			[]string{
				"New", "WithLogger", "WithHooks", "WithFatal", "WithTopology", "WithURLs", "WithTLSConfig", "WithSASL",
				"WithDialer", "WithMiddleware", "WithURLFunc",
			},
		},
		{
			"names", "amqp://h/", strings.Repeat("q", 256), rig.Options(steadymq.WithConsumerTag(""), steadymq.WithConnectionName(strings.Repeat("x", 256))),
			[]string{"WithConsumerTag", "WithConnectionName", "New"},
		},
		{"transient shared queue", "amqp://h/", "q", rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "classic", Transient: true})), []string{"WithQueue"}},
		{"exclusive quorum queue", "amqp://h/", "q", rig.Options(steadymq.WithQueue(steadymq.Queue{Exclusive: true})), []string{"WithQueue"}},
		{"exclusive consumer of a quorum queue", "amqp://h/", "q", rig.Options(steadymq.WithExclusive(), steadymq.WithQueue(steadymq.Queue{})), []string{"WithExclusive"}},
		{
			"stall detector on a filtered stream", "amqp://h/", "q",
			rig.Options(steadymq.WithStallDetector(time.Minute), steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first", "x-stream-filter": "eu"})),
			[]string{"WithStallDetector"},
		},
		{"unverified TLS", "amqps://h/", "q", rig.Options(steadymq.WithTLSConfig(&tls.Config{InsecureSkipVerify: true})), []string{"WithTLSConfig"}},
		{"TLS on a plain URL", "amqp://h/", "q", rig.Options(steadymq.WithTLSConfig(new(tls.Config))), []string{"WithTLSConfig"}},
		{"credentials twice", "amqp://h/", "q", rig.Options(steadymq.WithSASL(&amqp.ExternalAuth{}), steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			return steadymq.Credentials{}, nil
		})), []string{"WithCredentials"}},
		{"unknown queue type", "amqp://h/", "q", rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "fast"})), []string{"WithQueue"}},
		{"bad argument", "amqp://h/", "q", rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x": struct{}{}})), []string{"WithConsumeArgs"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := steadymq.New(c.url, c.queue, c.opts...)
			require.Error(t, err)
			assert.NotContains(t, fmt.Sprintf("%v %+v %#v", err, err, err), rig.Password)
			var got []string
			for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
				var refused *steadymq.OptionError
				require.ErrorAs(t, e, &refused)
				got = append(got, refused.Option)
			}
			assert.Equal(t, c.option, got)
		})
	}
}

func TestConsumerPrintsNoPassword(t *testing.T) {
	c, err := steadymq.New("amqp://app:"+rig.Password+"@localhost/", "q")
	require.NoError(t, err)
	assert.NotContains(t, fmt.Sprintf("%v %+v %#v", c, c, c), rig.Password)
}
