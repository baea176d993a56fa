package behaviour_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

// randomTag is what makes a consumer tag unique, behind its prefix.
var randomTag = regexp.MustCompile(`-[0-9a-f]{8,}\.(\d+)-(\d+)`)

// tapped makes a consumer whose connections are listened to, at this URL.
func tapped(r *rig.Rig, url, queue string, options ...steadymq.Option) *wiretap {
	r.Helper()
	tap := &wiretap{dial: r.Broker.Dialer()}
	c, err := steadymq.New(url, queue, append(rig.Options(
		steadymq.WithDialer(tap.DialContext), steadymq.WithLogger(slog.New(slog.NewTextHandler(r.Log, nil))),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: r.Changed})), options...)...)
	require.NoError(r, err)
	r.Consumer = c
	return tap
}

// brokerURL is that of the rig with another path and parameters.
func brokerURL(r *rig.Rig, tail string) string { return strings.TrimSuffix(r.Broker.URL, "/") + tail }

// credentialsOf is the function of WithCredentials that always gives these.
func credentialsOf(user, password string) steadymq.Option {
	return steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
		return steadymq.Credentials{Username: user, Password: password}, nil
	})
}

func TestOptionsArriveOnTheWire(t *testing.T) {
	const (
		plain    = `mechanism=PLAIN response="\x00app\x00canary-swordfish" locale=en_US`
		external = `mechanism=EXTERNAL response="\x00*\x00*" locale=en_US` // the driver's
		known    = `capabilities={authentication_failure_close=true basic.nack=true connection.blocked=true consumer_cancel_notify=true publisher_confirms=true}`
		consume  = `consume "orders" tag=steadymq-R.1-1`
		tuned    = "tune-ok channel_max=2047 frame_max=131072 heartbeat="
		declared = `queue.declare "new" durable`
		unsaid   = ` {x-delivery-limit=int32(-1) x-queue-type="quorum"}`
	)
	queue := func(q steadymq.Queue) []steadymq.Option { return rig.Options(steadymq.WithQueue(q)) }
	topology := func(name string) steadymq.Option {
		return steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return name, nil })
	}
	for name, c := range map[string]struct {
		tail    string // of the URL
		queue   string // "": rig.Queue
		options []steadymq.Option
		kinds   string // of the methods that are looked at
		want    []string
	}{
		// Logging in.
		"nothing given": {
			kinds: "start-ok tune-ok open exchange.declare queue.declare queue.bind qos consume",
			want: []string{
				`start-ok properties={` + known + ` platform="golang" product="steadymq" version="V"} ` + plain,
				tuned + "10", `open "/"`, "qos size=0 count=32", consume,
			},
		},
		"WithConnectionName": {
			options: rig.Options(steadymq.WithConnectionName("shop-1")), kinds: "start-ok",
			want: []string{`start-ok properties={` + known + ` connection_name="shop-1" platform="golang" product="steadymq" version="V"} ` + plain},
		},
		"WithConnectionName twice": {
			options: rig.Options(steadymq.WithConnectionName("shop-1"), steadymq.WithConnectionName("shop-2")), kinds: "start-ok",
			want: []string{`start-ok properties={` + known + ` connection_name="shop-2" platform="golang" product="steadymq" version="V"} ` + plain},
		},
		"virtual host":                 {tail: "/a%2Fb", kinds: "open", want: []string{`open "a/b"`}},
		"virtual host, none":           {tail: "", kinds: "open", want: []string{`open "/"`}},
		"virtual host with parameters": {tail: "/v?heartbeat=3", kinds: "open tune-ok", want: []string{tuned + "3", `open "v"`}},
		"auth_mechanism amqplain": {
			tail: "?auth_mechanism=amqplain", kinds: "login",
			want: []string{`mechanism=AMQPLAIN response={LOGIN="app" PASSWORD="canary-swordfish"} locale=en_US`},
		},
		"auth_mechanism external":               {tail: "?auth_mechanism=external", kinds: "login", want: []string{external}},
		"auth_mechanism twice, the first first": {tail: "?auth_mechanism=external&auth_mechanism=plain", kinds: "login", want: []string{external}},
		"auth_mechanism twice, the other way":   {tail: "?auth_mechanism=plain&auth_mechanism=external", kinds: "login", want: []string{plain}},
		"WithCredentials":                       {options: rig.Options(credentialsOf("app", rig.Password)), kinds: "login", want: []string{plain}},
		"WithCredentials in place of the URL's": {options: rig.Options(credentialsOf("else", "x")), kinds: "login", want: []string{`mechanism=PLAIN response="\x00else\x00x" locale=en_US`}},
		"WithCredentials twice": {
			options: rig.Options(credentialsOf("else", "x"), credentialsOf("other", "y")), kinds: "login",
			want: []string{`mechanism=PLAIN response="\x00other\x00y" locale=en_US`},
		},
		"WithSASL": {
			options: rig.Options(steadymq.WithSASL(&amqp.PlainAuth{Username: "else", Password: "x"})), kinds: "login",
			want: []string{`mechanism=PLAIN response="\x00else\x00x" locale=en_US`},
		},
		"WithSASL, best first": {
			options: rig.Options(steadymq.WithSASL(mechanism{"GSSAPI", nil}, &amqp.ExternalAuth{}, &amqp.PlainAuth{})), kinds: "login",
			want: []string{external},
		},
		"WithSASL twice": {
			options: rig.Options(steadymq.WithSASL(&amqp.PlainAuth{Username: "x"}), steadymq.WithSASL(&amqp.ExternalAuth{})), kinds: "login",
			want: []string{external},
		},

		// Limits of the connection.
		"WithHeartbeat":                     {options: rig.Options(steadymq.WithHeartbeat(7 * time.Second)), kinds: "tune-ok", want: []string{tuned + "7"}},
		"WithHeartbeat above the broker's":  {options: rig.Options(steadymq.WithHeartbeat(10 * time.Minute)), kinds: "tune-ok", want: []string{tuned + "60"}},
		"WithHeartbeat twice":               {options: rig.Options(steadymq.WithHeartbeat(7*time.Second), steadymq.WithHeartbeat(4*time.Second)), kinds: "tune-ok", want: []string{tuned + "4"}},
		"WithHeartbeat of the default":      {tail: "?heartbeat=3", options: rig.Options(steadymq.WithHeartbeat(10 * time.Second)), kinds: "tune-ok", want: []string{tuned + "10"}},
		"heartbeat":                         {tail: "?heartbeat=3", kinds: "tune-ok", want: []string{tuned + "3"}},
		"heartbeat beside WithHeartbeat":    {tail: "?heartbeat=3", options: rig.Options(steadymq.WithHeartbeat(5 * time.Second)), kinds: "tune-ok", want: []string{tuned + "5"}},
		"heartbeat of WithURLFunc":          {tail: "?heartbeat=3", options: rig.Options(urlFuncOf("?heartbeat=4")), kinds: "tune-ok", want: []string{tuned + "4"}},
		"WithURLFunc twice":                 {options: rig.Options(urlFuncOf("?heartbeat=4"), urlFuncOf("?heartbeat=6")), kinds: "tune-ok", want: []string{tuned + "6"}},
		"channel_max":                       {tail: "?channel_max=5", kinds: "tune-ok", want: []string{"tune-ok channel_max=5 frame_max=131072 heartbeat=10"}},
		"channel_max above the broker's":    {tail: "?channel_max=65535", kinds: "tune-ok", want: []string{tuned + "10"}},
		"channel_max 0 is what it may be":   {tail: "?channel_max=0", kinds: "tune-ok", want: []string{tuned + "10"}},
		"heartbeat, channel_max and others": {tail: "/?heartbeat=9&channel_max=7&connection_timeout=100&auth_mechanism=plain", kinds: "tune-ok login", want: []string{plain, "tune-ok channel_max=7 frame_max=131072 heartbeat=9"}},

		// The subscription.
		"WithPrefetch":                       {options: rig.Options(steadymq.WithPrefetch(5)), kinds: "qos", want: []string{"qos size=0 count=5"}},
		"WithPrefetch, the most":             {options: rig.Options(steadymq.WithPrefetch(65535)), kinds: "qos", want: []string{"qos size=0 count=65535"}},
		"WithPrefetch twice":                 {options: rig.Options(steadymq.WithPrefetch(5), steadymq.WithPrefetch(6)), kinds: "qos", want: []string{"qos size=0 count=6"}},
		"WithConcurrency":                    {options: rig.Options(steadymq.WithConcurrency(32)), kinds: "qos", want: []string{"qos size=0 count=32"}},
		"WithConcurrency above the prefetch": {options: rig.Options(steadymq.WithConcurrency(33)), kinds: "qos", want: []string{"qos size=0 count=33"}},
		"WithConcurrency twice":              {options: rig.Options(steadymq.WithConcurrency(100), steadymq.WithConcurrency(2)), kinds: "qos", want: []string{"qos size=0 count=32"}},
		"WithConcurrency beside as large a WithPrefetch": {
			options: rig.Options(steadymq.WithPrefetch(3), steadymq.WithConcurrency(3)), kinds: "qos", want: []string{"qos size=0 count=3"},
		},
		"WithConsumerTag":       {options: rig.Options(steadymq.WithConsumerTag("shop")), kinds: "consume", want: []string{`consume "orders" tag=shop-R.1-1`}},
		"WithConsumerTag twice": {options: rig.Options(steadymq.WithConsumerTag("shop"), steadymq.WithConsumerTag("stall")), kinds: "consume", want: []string{`consume "orders" tag=stall-R.1-1`}},
		"WithExclusive":         {options: rig.Options(steadymq.WithExclusive()), kinds: "consume", want: []string{consume + " exclusive"}},
		"WithExclusive before WithQueue": {
			queue: "new", options: append(rig.Options(steadymq.WithExclusive()), queue(steadymq.Queue{Type: "classic"})...), kinds: "consume",
			want: []string{`consume "new" tag=steadymq-R.1-1 exclusive`},
		},
		"WithExclusive after WithQueue": {
			queue: "new", options: append(queue(steadymq.Queue{Type: "classic"}), steadymq.WithExclusive()), kinds: "consume",
			want: []string{`consume "new" tag=steadymq-R.1-1 exclusive`},
		},
		"WithConsumeArgs": {
			options: rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-priority": 7, "x-text": "a", "x-in": amqp.Table{"b": true}})), kinds: "consume",
			want: []string{consume + ` {x-in={b=true} x-priority=int32(7) x-text="a"}`},
		},
		"WithConsumeArgs twice": {
			options: rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-a": 7}), steadymq.WithConsumeArgs(amqp.Table{"x-b": 7})), kinds: "consume",
			want: []string{consume + ` {x-b=int32(7)}`},
		},
		"WithConsumeArgs and WithExclusive": {
			options: rig.Options(steadymq.WithExclusive(), steadymq.WithConsumeArgs(amqp.Table{"x-a": 7}), steadymq.WithConsumerTag("t")), kinds: "consume",
			want: []string{`consume "orders" tag=t-R.1-1 exclusive {x-a=int32(7)}`},
		},

		// WithTopology.
		"WithTopology that names no queue":        {options: rig.Options(topology("")), kinds: "consume queue.declare", want: []string{consume}},
		"WithTopology that names the queue":       {queue: "none", options: rig.Options(topology("orders")), kinds: "consume queue.declare", want: []string{consume}},
		"WithTopology twice":                      {queue: "none", options: rig.Options(topology("none"), topology("orders")), kinds: "consume", want: []string{consume}},
		"WithTopology, and no queue given to New": {queue: "-", options: rig.Options(topology("orders")), kinds: "consume", want: []string{consume}},

		// Queue.
		"Queue, zero": {
			queue: "new", options: queue(steadymq.Queue{}), kinds: "exchange.declare queue.declare queue.bind consume",
			want: []string{declared + unsaid, `consume "new" tag=steadymq-R.1-1`},
		},
		"Queue twice":          {queue: "new", options: append(queue(steadymq.Queue{}), queue(steadymq.Queue{Type: "classic"})...), kinds: "queue.declare", want: []string{declared + ` {x-queue-type="classic"}`}},
		"Queue.Type quorum":    {queue: "new", options: queue(steadymq.Queue{Type: "quorum"}), kinds: "queue.declare", want: []string{declared + unsaid}},
		"Queue.Type classic":   {queue: "new", options: queue(steadymq.Queue{Type: "classic"}), kinds: "queue.declare", want: []string{declared + ` {x-queue-type="classic"}`}},
		"Queue.Exclusive":      {queue: "new", options: queue(steadymq.Queue{Type: "classic", Exclusive: true}), kinds: "queue.declare", want: []string{declared + ` exclusive {x-queue-type="classic"}`}},
		"Queue.AutoDelete":     {queue: "new", options: queue(steadymq.Queue{Type: "classic", AutoDelete: true}), kinds: "queue.declare", want: []string{declared + ` auto-delete {x-queue-type="classic"}`}},
		"Queue.Transient":      {queue: "new", options: queue(steadymq.Queue{Type: "classic", Transient: true, Exclusive: true}), kinds: "queue.declare", want: []string{`queue.declare "new" exclusive {x-queue-type="classic"}`}},
		"Queue, all its flags": {queue: "new", options: queue(steadymq.Queue{Type: "classic", Transient: true, Exclusive: true, AutoDelete: true}), kinds: "queue.declare", want: []string{`queue.declare "new" exclusive auto-delete {x-queue-type="classic"}`}},
		"Queue of the broker's naming": {
			queue: "-", options: queue(steadymq.Queue{Type: "classic", Exclusive: true, Bindings: []steadymq.Binding{{Exchange: "amq.topic", Key: "a.*"}}}),
			kinds: "queue.declare queue.bind consume",
			want: []string{
				`queue.declare "" durable exclusive {x-queue-type="classic"}`, `queue.bind "amq.gen-0000000000000000000001" to "amq.topic" key="a.*"`,
				`consume "amq.gen-0000000000000000000001" tag=steadymq-R.1-1`,
			},
		},
		"Queue.Args": {
			queue: "new", options: queue(steadymq.Queue{Args: amqp.Table{"x-message-ttl": 60000, "x-overflow": "reject-publish"}}), kinds: "queue.declare",
			want: []string{declared + ` {x-delivery-limit=int32(-1) x-message-ttl=int32(60000) x-overflow="reject-publish" x-queue-type="quorum"}`},
		},
		"Queue.Args with a limit": {queue: "new", options: queue(steadymq.Queue{Args: amqp.Table{"x-delivery-limit": 7}}), kinds: "queue.declare", want: []string{declared + ` {x-delivery-limit=int32(7) x-queue-type="quorum"}`}},
		"Queue.Args with the type": {
			queue: "new", options: queue(steadymq.Queue{Type: "classic", Args: amqp.Table{"x-queue-type": "classic"}}), kinds: "queue.declare",
			want: []string{declared + ` {x-queue-type="classic"}`},
		},
		"Queue and consume have arguments of their own": {
			queue: "new", options: append(queue(steadymq.Queue{Type: "classic", Args: amqp.Table{"x-a": 1}}), steadymq.WithConsumeArgs(amqp.Table{"x-b": 2})),
			kinds: "queue.declare consume", want: []string{declared + ` {x-a=int32(1) x-queue-type="classic"}`, `consume "new" tag=steadymq-R.1-1 {x-b=int32(2)}`},
		},

		// Exchange and Binding.
		"Exchange": {
			queue: "new", options: queue(steadymq.Queue{Type: "classic", Exchange: &steadymq.Exchange{Name: "shop"}, Bindings: []steadymq.Binding{{Key: "k"}}}),
			kinds: "exchange.declare queue.declare queue.bind consume",
			want: []string{
				`exchange.declare "shop" direct durable`, declared + ` {x-queue-type="classic"}`, `queue.bind "new" to "shop" key="k"`,
				`consume "new" tag=steadymq-R.1-1`,
			},
		},
		"Exchange.Kind": {
			queue: "new", options: queue(steadymq.Queue{Exchange: &steadymq.Exchange{Name: "shop", Kind: "topic"}, Bindings: []steadymq.Binding{{}}}),
			kinds: "exchange.declare queue.bind", want: []string{`exchange.declare "shop" topic durable`, `queue.bind "new" to "shop" key=""`},
		},
		"Exchange.Transient": {
			queue: "new", options: queue(steadymq.Queue{Exchange: &steadymq.Exchange{Name: "shop", Transient: true}, Bindings: []steadymq.Binding{{}}}),
			kinds: "exchange.declare", want: []string{`exchange.declare "shop" direct`},
		},
		"Exchange.Args": {
			queue: "new", options: queue(steadymq.Queue{Exchange: &steadymq.Exchange{Name: "shop", Args: amqp.Table{"alternate-exchange": "amq.fanout"}}, Bindings: []steadymq.Binding{{}}}),
			kinds: "exchange.declare", want: []string{`exchange.declare "shop" direct durable {alternate-exchange="amq.fanout"}`},
		},
		"Bindings, to several": {
			queue: "new", options: queue(steadymq.Queue{
				Exchange: &steadymq.Exchange{Name: "shop"},
				Bindings: []steadymq.Binding{{Exchange: "amq.topic", Key: "a.#"}, {Key: "k"}, {Exchange: "amq.direct", Args: amqp.Table{"x-match": "any"}}},
			}),
			kinds: "queue.bind", want: []string{
				`queue.bind "new" to "amq.topic" key="a.#"`, `queue.bind "new" to "shop" key="k"`, `queue.bind "new" to "amq.direct" key="" {x-match="any"}`,
			},
		},

		// DeadLetter.
		"DeadLetter.Queue": {
			queue: "new", options: queue(steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: "dead"}}), kinds: "queue.declare",
			want: []string{
				`queue.declare "dead" durable` + unsaid,
				declared + ` {x-dead-letter-exchange="" x-dead-letter-routing-key="dead" x-queue-type="quorum"}`,
			},
		},
		"DeadLetter.Queue of a classic queue": {
			queue: "new", options: queue(steadymq.Queue{Type: "classic", AutoDelete: true, Exclusive: true, DeadLetter: &steadymq.DeadLetter{Queue: "dead"}}), kinds: "queue.declare",
			want: []string{
				`queue.declare "dead" durable {x-queue-type="classic"}`,
				declared + ` exclusive auto-delete {x-dead-letter-exchange="" x-dead-letter-routing-key="dead" x-queue-type="classic"}`,
			},
		},
		"DeadLetter.Exchange": {
			queue: "new", options: queue(steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Exchange: "amq.fanout"}}), kinds: "queue.declare",
			want: []string{declared + ` {x-dead-letter-exchange="amq.fanout" x-queue-type="quorum"}`},
		},
		"DeadLetter.Key": {
			queue: "new", options: queue(steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Key: "dead"}}), kinds: "queue.declare",
			want: []string{declared + ` {x-dead-letter-exchange="" x-dead-letter-routing-key="dead" x-queue-type="quorum"}`},
		},
		"DeadLetter.Exchange and Key": {
			queue: "new", options: queue(steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Exchange: "amq.topic", Key: "dead"}}), kinds: "queue.declare",
			want: []string{declared + ` {x-dead-letter-exchange="amq.topic" x-dead-letter-routing-key="dead" x-queue-type="quorum"}`},
		},

		// What is of no concern to the broker puts nothing on the wire.
		"all others": {
			options: rig.Options(
				steadymq.WithDialTimeout(time.Second), steadymq.WithSetupTimeout(time.Second), steadymq.WithCloseTimeout(time.Second),
				steadymq.WithDrainTimeout(time.Second), steadymq.WithHandlerTimeout(time.Second), steadymq.WithWriteDelay(0),
				steadymq.WithMaxMessageSize(7), steadymq.WithRequeueDelay(time.Second, time.Second), steadymq.WithBackoff(time.Second, time.Second),
				steadymq.WithStallDetector(time.Second), steadymq.WithFatal(func(error) bool { return true }),
			),
			kinds: "start-ok tune-ok open exchange.declare queue.declare queue.bind qos consume",
			want: []string{
				`start-ok properties={` + known + ` platform="golang" product="steadymq" version="V"} ` + plain,
				tuned + "10", `open "/"`, "qos size=0 count=32", consume,
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				queue := map[string]string{"": rig.Queue, "-": ""}[c.queue]
				if c.queue != "" && c.queue != "-" {
					queue = c.queue
				}
				tap := tapped(r, brokerURL(r, c.tail), queue, c.options...)
				r.Start(rig.Ack)
				r.Wait(100 * time.Millisecond)
				got := only(wireText(tap.methods(0)), strings.Fields(c.kinds)...)
				for i := range got {
					got[i] = strings.TrimPrefix(got[i], "login ")
				}
				assert.Equal(r, c.want, got)
				assert.Equal(r, "mq1.test:5672", tap.asked()[0].address)
				assert.Equal(r, "tcp", tap.asked()[0].network)
			})
		})
	}
}

// urlFuncOf makes a function that gives the URL of the rig's broker with these parameters.
func urlFuncOf(parameters string) steadymq.Option {
	return steadymq.WithURLFunc(func(context.Context) (string, error) {
		return "amqp://app:" + rig.Password + "@mq1.test:5672/" + parameters, nil
	})
}

// wireText leaves out what is random or of the driver's version, and gives the mechanism and the
// response of start-ok a line of their own as well.
func wireText(lines []string) (all []string) {
	version := regexp.MustCompile(` version="[^"]*"`)
	for _, line := range lines {
		line = randomTag.ReplaceAllString(line, "-R.$1-$2")
		line = version.ReplaceAllString(line, ` version="V"`)
		all = append(all, line)
		if _, login, ok := strings.Cut(line, " mechanism="); ok {
			all = append(all, "login mechanism="+login)
		}
	}
	return all
}

// offering is a connection to a broker that offers fewer mechanisms than that of the rig.
type offering struct {
	net.Conn
	without string
}

func (o offering) Read(p []byte) (int, error) {
	n, err := o.Conn.Read(p)
	copy(p[:n], bytes.Replace(p[:n], []byte(o.without), bytes.Repeat([]byte("X"), len(o.without)), 1))
	return n, err
}

func TestFirstMechanismThatTheBrokerOffersIsUsed(t *testing.T) {
	for name, c := range map[string]struct {
		tail    string
		options []steadymq.Option
	}{
		"of the URL": {"?auth_mechanism=external&auth_mechanism=plain&auth_mechanism=amqplain", nil},
		"WithSASL":   {"", rig.Options(steadymq.WithSASL(&amqp.ExternalAuth{}, &amqp.PlainAuth{Username: "app", Password: rig.Password}, &amqp.AMQPlainAuth{}))},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				tap := tapped(r, brokerURL(r, c.tail), rig.Queue, c.options...)
				tap.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
					conn, err := r.Broker.Dialer()(ctx, network, address)
					return offering{conn, "EXTERNAL"}, err
				}
				r.Start(rig.Ack)
				r.Wait(time.Second)
				assert.Equal(r, []string{`login mechanism=PLAIN response="\x00app\x00canary-swordfish" locale=en_US`}, only(wireText(tap.methods(0)), "login"))
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
			})
		})
	}
}

func TestEachTagIsUnlikeAllOthers(t *testing.T) {
	seen := make(map[string]bool)
	for range 3 {
		rig.Bubble(t, func(r *rig.Rig) {
			tap := tapped(r, r.Broker.URL, rig.Queue, steadymq.WithConsumerTag(strings.Repeat("t", 200)))
			r.Start(rig.Ack)
			r.Wait(time.Second)
			r.Broker.Reset()
			r.Wait(time.Second)
			for n := range 2 {
				line := only(tap.methods(n), "consume")
				require.Len(r, line, 1)
				_, tag, _ := strings.Cut(line[0], "tag=")
				assert.LessOrEqual(r, len(tag), 255)
				assert.False(r, seen[tag], tag)
				assert.True(r, strings.HasSuffix(tag, fmt.Sprintf(".%d-%d", n+1, n+1)), tag)
				seen[tag] = true
			}
		})
	}
	assert.Len(t, seen, 6)
}
