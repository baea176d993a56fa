package steadymqtest_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/steadymqtest"
)

var record = flag.Bool("record", false, "write down what the brokers answer, and the table of docs/CONFORMANCE.md")

// generations are those whose answers are in testdata.
var generations = []string{"3.10", "4.0", "4.3"}

// TestConformance runs one script of operations against the kit and against a RabbitMQ, through the plain driver, and compares
// every answer: codes, texts, order, flags, counters. It does so for every generation: against a running broker where there is one,
// otherwise against what a 3.10.8, a 4.0.5 and a 4.3.6 answered once, in testdata. Brokers run with STEADYMQ_REQUIRE_BROKER=1, which
// fails without any, and the one at STEADYMQ_AMQP_URL is used if it is set.
func TestConformance(t *testing.T) {
	brokers := realBrokers(t)
	versions := slices.Clone(generations)
	for version := range brokers {
		if !slices.Contains(versions, version) {
			versions = append(versions, version)
		}
	}
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			for _, c := range conformance {
				t.Run(c.name, func(t *testing.T) { c.compare(t, version, brokers[version]) })
			}
		})
	}
}

// realBrokers starts what the environment asks for, by version such as 4.3.
func realBrokers(t *testing.T) map[string]*rabbit.Broker {
	brokers := map[string]*rabbit.Broker{}
	if !rabbit.Required() && os.Getenv("STEADYMQ_AMQP_URL") == "" {
		return brokers
	}
	config := func(g rabbit.Generation) rabbit.Config {
		return rabbit.Config{Generation: g, ChannelTick: time.Second} // a timeout is looked for every second, not every minute
	}
	all := []*rabbit.Broker{rabbit.Start(t, config(rabbit.Gen310))}
	if strings.HasPrefix(all[0].Source, "Docker") { // elsewhere there is one broker, whatever is asked for
		all = append(all, rabbit.StartAll(t, config(rabbit.Gen40), config(rabbit.Gen43))...)
	}
	for _, b := range all {
		major, minor := parseVersion(t, b.Version())
		brokers[fmt.Sprintf("%d.%d", major, minor)] = b
		t.Logf("comparing with RabbitMQ %s, %s", b.Version(), b.Source)
	}
	return brokers
}

func parseVersion(t *testing.T, version string) (major, minor int) {
	_, err := fmt.Sscanf(version, "%d.%d", &major, &minor)
	require.NoError(t, err, "version %q", version)
	return major, minor
}

// scenario is one script and what is to be known about it.
type scenario struct {
	name    string
	from    int // it applies from this version on; 403 is 4.3
	until   int // and before this one
	differs difference
	kit     []steadymqtest.Option
	arrange func(ctx context.Context, b *rabbit.Broker) error // commands to a real broker, which it needs then
	prepare func(b *steadymqtest.Broker)                      // the same for the kit
	script  func(*script)
}

// difference is one that is meant, with its reason; from and until as above.
type difference struct {
	why         string
	from, until int
}

func inRange(version, from, until int) bool {
	return version >= from && (until == 0 || version < until)
}

func (c *scenario) applies(version int) bool { return inRange(version, c.from, c.until) }

func (c *scenario) mayDiffer(version int) bool {
	return c.differs.why != "" && inRange(version, c.differs.from, c.differs.until)
}

// compare demands equal answers of the kit and of RabbitMQ, or different ones where that is meant.
func (c *scenario) compare(t *testing.T, version string, b *rabbit.Broker) {
	major, minor := parseVersion(t, version)
	number := major*100 + minor
	if !c.applies(number) {
		t.Skipf("does not apply to RabbitMQ %s", version)
	}
	want := c.expected(t, version, b)
	var got []string
	bubble(t, func(t *testing.T) {
		opts := []steadymqtest.Option{steadymqtest.WithVersion(major, minor), steadymqtest.WithUser("guest", "guest"), steadymqtest.WithUser(stranger, stranger)}
		b := steadymqtest.NewBroker(t, append(opts, c.kit...)...)
		if c.prepare != nil {
			c.prepare(b)
		}
		got = transcript(t, c.script, b.URL, b.Dial, func(on bool) error {
			if b.Unblocked(); on {
				b.Blocked("low on memory")
			}
			return nil
		})
	})
	if c.mayDiffer(number) {
		require.NotEqual(t, want, got, "they agree: the difference is no longer one")
		return
	}
	require.Equal(t, want, got)
}

// expected is what the real broker answers, now or when it was recorded.
func (c *scenario) expected(t *testing.T, version string, b *rabbit.Broker) []string {
	file := filepath.Join("testdata", "rabbitmq-"+version, strings.ReplaceAll(c.name, " ", "-")+".txt")
	if b == nil || c.arrange != nil && !b.Commandable() {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	}
	if c.arrange != nil {
		require.NoError(t, c.arrange(t.Context(), b))
	}
	lines := transcript(t, c.script, b.URL(), directly(t.Context(), b), func(on bool) error { return alarm(t.Context(), b, on) })
	if c.arrange != nil {
		require.NoError(t, patient(t.Context(), b))
	}
	if *record {
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o644))
	}
	return lines
}

// TestConformanceTable keeps docs/CONFORMANCE.md in step with the scripts; -record writes it.
func TestConformanceTable(t *testing.T) {
	file := filepath.Join("..", "docs", "CONFORMANCE.md")
	want := conformanceTable(t)
	if *record {
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, []byte(want), 0o644))
	}
	got, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, want, string(got), "write it anew: go test ./steadymqtest -run TestConformanceTable -record")
}

func conformanceTable(t *testing.T) string {
	const intro = `# Conformance of steadymqtest

What the broker of package steadymqtest answers, compared with RabbitMQ %s.
Every row is a script in the conformance tests of steadymqtest. It runs through the plain driver against the kit, in virtual time, and
against RabbitMQ; all codes, texts, orders, flags and counters that it shows must be equal. *agrees* means that they are; *differs* means
that they are not, that it is meant, and that the test fails as soon as they are; *n/a* means that this version has no such behaviour.

| script | %s |
| --- |%s
`
	const outro = `
Differences:

%s
To check it:

    go test ./steadymqtest -run TestConformance                                  # with the answers recorded in testdata: no broker, a second
    STEADYMQ_REQUIRE_BROKER=1 go test ./steadymqtest -run TestConformance        # with RabbitMQ 3.10, 4.0 and 4.3 in Docker
    STEADYMQ_AMQP_URL=... go test ./steadymqtest -run TestConformance            # with a broker of yours
    STEADYMQ_REQUIRE_BROKER=1 go test ./steadymqtest -run TestConformance -record    # writes the answers and this file anew

What the kit leaves out beyond these scripts is in the table of its package documentation. The recorded answers are those of RabbitMQ
3.10.8, 4.0.5 and 4.3.6. A broker at STEADYMQ_AMQP_URL cannot be commanded: there, scripts that need a short consumer timeout, another user
or an alarm are compared with the recorded answers.
`
	var rows, notes strings.Builder
	for _, c := range conformance {
		fmt.Fprintf(&rows, "| %s |", c.name)
		for _, version := range generations {
			major, minor := parseVersion(t, version)
			fmt.Fprintf(&rows, " %s |", c.verdict(major*100+minor))
		}
		rows.WriteByte('\n')
		if c.differs.why != "" {
			fmt.Fprintf(&notes, "- %s: %s.\n", c.name, c.differs.why)
		}
	}
	return fmt.Sprintf(intro, strings.Join(generations, ", "), strings.Join(generations, " | "), strings.Repeat(" --- |", len(generations))) +
		rows.String() + fmt.Sprintf(outro, notes.String())
}

func (c *scenario) verdict(version int) string {
	switch {
	case !c.applies(version):
		return "n/a"
	case c.mayDiffer(version):
		return "differs"
	}
	return "agrees"
}

// script runs operations and writes down what they show.
type script struct {
	t      *testing.T
	url    string
	vhost  string
	net    func(network, addr string) (net.Conn, error)
	prefix string
	alarm  func(on bool) error // a memory alarm
	lines  []string
	conns  []*amqp.Connection
	moves  int // queues that moved has made
}

var scripts atomic.Int64

func transcript(t *testing.T, run func(*script), target string, dial func(network, addr string) (net.Conn, error), alarm func(bool) error) []string {
	t.Helper()
	uri, err := amqp.ParseURI(target)
	if err != nil {
		t.Fatal("the broker's address does not parse") // without err: it may hold the password
	}
	s := &script{t: t, url: target, vhost: uri.Vhost, net: dial, alarm: alarm, prefix: fmt.Sprintf("kit-%d-%d-", os.Getpid(), scripts.Add(1))}
	defer s.clean()
	run(s)
	return s.lines
}

// note writes a line, with the names of this run made comparable.
func (s *script) note(format string, args ...any) {
	line := strings.ReplaceAll(fmt.Sprintf(format, args...), s.prefix, "")
	s.lines = append(s.lines, strings.ReplaceAll(line, "vhost '"+s.vhost+"'", "vhost '/'"))
}

// fails writes what an operation answered.
func (s *script) fails(what string, err error) {
	var e *amqp.Error
	switch {
	case err == nil:
		s.note("%s: ok", what)
	case errors.As(err, &e):
		text, _, _ := strings.Cut(e.Reason, "\n")
		s.note("%s: %d %s (server %t)", what, e.Code, text, e.Server)
	default:
		s.note("%s: %T", what, err)
	}
}

func (s *script) dial() *amqp.Connection {
	conn, err := amqp.DialConfig(s.url, amqp.Config{Heartbeat: 10 * time.Second, Dial: s.net})
	require.NoError(s.t, err)
	s.conns = append(s.conns, conn)
	return conn
}

func (s *script) open(conn *amqp.Connection, prefetch int) *amqp.Channel {
	ch, err := conn.Channel()
	require.NoError(s.t, err)
	if prefetch > 0 {
		require.NoError(s.t, ch.Qos(prefetch, 0, false))
	}
	return ch
}

// queue declares a durable queue with a name of this run.
func (s *script) queue(ch *amqp.Channel, name string, args amqp.Table) string {
	q, err := ch.QueueDeclare(s.prefix+name, true, false, false, false, args)
	require.NoError(s.t, err)
	return q.Name
}

// publish waits for the confirms, so that the queue has the messages when it returns.
func (s *script) publish(conn *amqp.Connection, exchange, key string, bodies ...string) {
	ch := s.open(conn, 0)
	defer ch.Close()
	require.NoError(s.t, ch.Confirm(false))
	for _, body := range bodies {
		c, err := ch.PublishWithDeferredConfirmWithContext(s.t.Context(), exchange, key, false, false, amqp.Publishing{Body: []byte(body), DeliveryMode: 2})
		require.NoError(s.t, err)
		c.Wait()
	}
}

func (s *script) consume(ch *amqp.Channel, queue, tag string) <-chan amqp.Delivery {
	ds, err := ch.Consume(queue, tag, false, false, false, false, nil)
	require.NoError(s.t, err)
	return ds
}

// next writes down the next delivery.
func (s *script) next(who string, ds <-chan amqp.Delivery) amqp.Delivery {
	select {
	case d, ok := <-ds:
		if !ok {
			s.note("%s: deliveries closed", who)
			return d
		}
		count := ""
		if n, ok := d.Headers["x-delivery-count"]; ok {
			count = fmt.Sprintf(" count %v", n)
		}
		if n, ok := d.Headers["x-acquired-count"]; ok {
			count += fmt.Sprintf(" acquired %v %T", n, n)
		}
		s.note("%s: %q tag %d redelivered %t%s", who, d.Body, d.DeliveryTag, d.Redelivered, count)
		return d
	case <-time.After(5 * time.Second):
		s.note("%s: nothing in 5 s", who)
		return amqp.Delivery{}
	}
}

// none writes down whether something comes that should not.
func (s *script) none(who string, ds <-chan amqp.Delivery) {
	select {
	case d, ok := <-ds:
		s.note("%s: unexpected %q (%t)", who, d.Body, ok)
	case <-time.After(150 * time.Millisecond):
		s.note("%s: nothing", who)
	}
}

// closed writes down the end of a channel or a connection.
func (s *script) closed(what string, c chan *amqp.Error) {
	select {
	case e := <-c:
		if e == nil {
			s.note("%s: closed without error", what)
			return
		}
		s.fails(what, e)
	case <-time.After(5 * time.Second):
		s.note("%s: not closed", what)
	}
}

// ready waits until a queue has n messages ready and writes down what a passive declare says.
func (s *script) ready(conn *amqp.Connection, queue string, n int) {
	var q amqp.Queue
	for range 50 {
		ch := s.open(conn, 0)
		var err error
		q, err = ch.QueueDeclarePassive(queue, false, false, false, false, nil)
		if err != nil {
			s.fails("passive", err)
			return
		}
		ch.Close()
		if q.Messages == n {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	s.note("%s: %d messages, %d consumers", queue, q.Messages, q.Consumers)
}

// clean removes what the script left on a broker that lives on.
func (s *script) clean() {
	for _, conn := range s.conns {
		conn.Close()
	}
	conn, err := amqp.DialConfig(s.url, amqp.Config{Dial: s.net})
	if err != nil {
		return
	}
	defer conn.Close()
	ch, err := conn.Channel()
	for _, name := range []string{"q", "q2", "dead", "mine", "s", "bad", "classic", "quorum", "classic-later", "quorum-later"} {
		if err == nil {
			_, err = ch.QueueDelete(s.prefix+name, false, false, false)
		}
	}
	for _, name := range []string{"x", "y"} {
		if err == nil {
			err = ch.ExchangeDelete(s.prefix+name, false, false)
		}
	}
}

func notifyClose(ch *amqp.Channel) chan *amqp.Error {
	return ch.NotifyClose(make(chan *amqp.Error, 1))
}

var quorum = amqp.Table{"x-queue-type": "quorum"}

var conformance = slices.Concat(common, byGeneration, counts, refusedLogins, owned, limits, deadLetters, publishing)

var common = []scenario{
	{name: "order and tags", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 10)
		q := s.queue(ch, "q", nil)
		s.publish(conn, "", q, "1", "2", "3")
		ds := s.consume(ch, q, "c")
		for range 3 {
			d := s.next("c", ds)
			s.note("exchange %q key %q tag %q", d.Exchange, d.RoutingKey, d.ConsumerTag)
			s.fails("ack", d.Ack(false))
		}
		s.none("c", ds)
		s.ready(conn, q, 0)
	}},
	{name: "requeue classic", script: func(s *script) { requeue(s, nil) }},
	{name: "requeue quorum", differs: returnedLater, script: func(s *script) { requeue(s, quorum) }},
	{name: "channel close requeues", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 10)
		q := s.queue(ch, "q", nil)
		s.publish(conn, "", q, "1", "2", "3", "4", "5")
		one := s.open(conn, 4)
		ds := s.consume(one, q, "c")
		for i := range 5 {
			if d := s.next("c", ds); i == 1 {
				d.Ack(false)
			}
		}
		s.fails("close", one.Close())
		ds = s.consume(ch, q, "c2")
		for range 4 {
			s.next("c2", ds)
		}
	}},
	{name: "connection loss requeues", script: func(s *script) {
		var sock net.Conn
		conn, err := amqp.DialConfig(s.url, amqp.Config{Dial: func(network, addr string) (net.Conn, error) {
			nc, err := s.net(network, addr)
			sock = nc
			return nc, err
		}})
		require.NoError(s.t, err)
		ch := s.open(conn, 2)
		q := s.queue(ch, "q", quorum)
		s.publish(conn, "", q, "1", "2", "3")
		ds := s.consume(ch, q, "c")
		s.next("c", ds)
		s.next("c", ds)
		sock.Close()
		again := s.dial()
		s.ready(again, q, 3)
		ds = s.consume(s.open(again, 10), q, "c")
		for range 3 {
			s.next("c", ds)
		}
	}},
	{name: "prefetch", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 2)
		q := s.queue(ch, "q", nil)
		s.publish(conn, "", q, "1", "2", "3", "4")
		ds := s.consume(ch, q, "c")
		s.next("c", ds)
		d := s.next("c", ds)
		s.none("c", ds)
		d.Ack(false)
		s.next("c", ds)
		s.none("c", ds)
	}},
	{name: "get", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		q := s.queue(ch, "q", nil)
		s.publish(conn, "", q, "1", "2")
		for range 3 {
			d, ok, err := ch.Get(q, false)
			s.fails("get", err)
			s.note("%t %q redelivered %t left %d tag %d", ok, d.Body, d.Redelivered, d.MessageCount, d.DeliveryTag)
		}
		//lint:ignore SA1019 deprecated, and still part of the protocol
		s.fails("recover", ch.Recover(true))
		d, ok, _ := ch.Get(q, true)
		s.note("%t %q redelivered %t left %d", ok, d.Body, d.Redelivered, d.MessageCount)
	}},
	{name: "declare", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "q", amqp.Table{"x-max-length": int32(10), "x-dead-letter-exchange": "dlx"})
		declare := func(what, name string, durable, autoDelete, exclusive bool, args amqp.Table) {
			got, err := s.open(conn, 0).QueueDeclare(name, durable, autoDelete, exclusive, false, args)
			s.fails(what, err)
			s.note("%d messages %d consumers", got.Messages, got.Consumers)
		}
		same := amqp.Table{"x-max-length": int32(10), "x-dead-letter-exchange": "dlx"}
		declare("same", q, true, false, false, same)
		declare("not durable", q, false, false, false, same)
		declare("auto-delete", q, true, true, false, same)
		declare("exclusive", q, true, false, true, same)
		declare("without arguments", q, true, false, false, nil)
		declare("other length", q, true, false, false, amqp.Table{"x-max-length": int32(11), "x-dead-letter-exchange": "dlx"})
		declare("other exchange", q, true, false, false, amqp.Table{"x-max-length": int32(10), "x-dead-letter-exchange": "other"})
		declare("reserved", "amq.mine", true, false, false, nil)
		_, err := s.open(conn, 0).QueueDeclarePassive(s.prefix+"absent", false, false, false, false, nil)
		s.fails("passive", err)
		_, err = s.open(conn, 0).QueueDeclarePassive(q, false, false, false, false, nil)
		s.fails("passive with other flags", err)
	}},
	{name: "declare other kinds", script: func(s *script) {
		conn := s.dial()
		declare := func(what, name string, durable, autoDelete, exclusive bool, args amqp.Table) {
			_, err := s.open(conn, 0).QueueDeclare(name, durable, autoDelete, exclusive, false, args)
			s.fails(what, err)
		}
		declare("server-named quorum", "", true, false, false, quorum)
		declare("transient quorum", s.prefix+"bad", false, false, false, quorum)
		declare("exclusive quorum", s.prefix+"bad", true, false, true, quorum)
		declare("auto-delete quorum", s.prefix+"bad", true, true, false, quorum)
		declare("unknown kind", s.prefix+"bad", true, false, false, amqp.Table{"x-queue-type": "other"})
		declare("quorum", s.prefix+"q", true, false, false, quorum)
		declare("quorum as classic", s.prefix+"q", true, false, false, nil)
	}},
	{name: "server-named queue", script: func(s *script) {
		ch := s.open(s.dial(), 0)
		q, err := ch.QueueDeclare("", false, false, true, false, nil)
		s.fails("declare", err)
		s.note("amq.gen: %t, %d characters", strings.HasPrefix(q.Name, "amq.gen-"), len(q.Name))
		s.fails("bind the last one", ch.QueueBind("", "key", "amq.direct", false, nil))
		_, err = ch.Consume("", "c", false, false, false, false, nil)
		s.fails("consume from the last one", err)
	}},
	{name: "exclusive queue", script: func(s *script) {
		owner, other := s.dial(), s.dial()
		ch := s.open(owner, 0)
		name := s.prefix + "mine"
		_, err := ch.QueueDeclare(name, false, false, true, false, nil)
		s.fails("declare", err)
		_, err = ch.QueueDeclare(name, false, false, true, false, nil)
		s.fails("declare again", err)
		_, err = s.open(other, 0).QueueDeclare(name, false, false, true, false, nil)
		s.fails("declare elsewhere", err)
		_, err = s.open(other, 0).QueueDeclarePassive(name, false, false, true, false, nil)
		s.fails("passive elsewhere", err)
		_, err = s.open(other, 0).Consume(name, "", false, false, false, false, nil)
		s.fails("consume elsewhere", err)
		_, err = s.open(other, 0).QueuePurge(name, false)
		s.fails("purge elsewhere", err)
		_, err = s.open(other, 0).QueueDelete(name, false, false, false)
		s.fails("delete elsewhere", err)
		s.fails("bind elsewhere", s.open(other, 0).QueueBind(name, "k", "amq.direct", false, nil))
		_, _, err = s.open(other, 0).Get(name, true)
		s.fails("get elsewhere", err)
		owner.Close()
		for range 100 { // a 4.3 may need a moment until the queue is gone
			_, err = s.open(other, 0).Consume(name, "", false, false, false, false, nil)
			if e := new(amqp.Error); !errors.As(err, &e) || e.Code != amqp.ResourceLocked {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		s.fails("consume when the owner is gone", err)
	}},
	{name: "exclusive consumer", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "q", nil)
		ch := s.open(conn, 1)
		consume := func(ch *amqp.Channel, tag string, exclusive bool) error {
			_, err := ch.Consume(q, tag, false, exclusive, false, false, nil)
			return err
		}
		s.fails("exclusive", consume(ch, "c", true))
		s.fails("another", consume(s.open(conn, 1), "c2", false))
		s.fails("another exclusive", consume(s.open(conn, 1), "c2", true))
		s.fails("cancel", ch.Cancel("c", false))
		s.fails("shared", consume(ch, "c", false))
		s.fails("exclusive now", consume(s.open(conn, 1), "c2", true))
	}},
	{name: "absent things", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "q", nil)
		_, err := s.open(conn, 1).Consume(s.prefix+"absent", "", false, false, false, false, nil)
		s.fails("consume", err)
		_, _, err = s.open(conn, 0).Get(s.prefix+"absent", true)
		s.fails("get", err)
		_, err = s.open(conn, 0).QueuePurge(s.prefix+"absent", false)
		s.fails("purge", err)
		n, err := s.open(conn, 0).QueueDelete(s.prefix+"absent", false, false, false)
		s.fails("delete", err)
		s.note("%d", n)
		s.fails("bind to an absent exchange", s.open(conn, 0).QueueBind(q, "k", s.prefix+"nox", false, nil))
		s.fails("bind an absent queue", s.open(conn, 0).QueueBind(s.prefix+"absent", "k", "amq.direct", false, nil))
		s.fails("bind to the default exchange", s.open(conn, 0).QueueBind(q, "k", "", false, nil))
		s.fails("unbind what is not bound", s.open(conn, 0).QueueUnbind(q, "k", "amq.direct", nil))
		s.fails("exchange bind", s.open(conn, 0).ExchangeBind(s.prefix+"nox", "k", "amq.direct", false, nil))
		s.fails("exchange delete", s.open(conn, 0).ExchangeDelete(s.prefix+"nox", false, false))
		s.fails("exchange passive", s.open(conn, 0).ExchangeDeclarePassive(s.prefix+"nox", "direct", true, false, false, false, nil))
		ch := s.open(conn, 0)
		closed := notifyClose(ch)
		s.fails("publish", ch.PublishWithContext(s.t.Context(), s.prefix+"nox", "k", false, false, amqp.Publishing{Body: []byte("x")}))
		s.closed("channel", closed)
	}},
	{name: "exchanges", script: func(s *script) {
		conn := s.dial()
		x := s.prefix + "x"
		declare := func(what, name, kind string, durable, autoDelete, internal bool) {
			s.fails(what, s.open(conn, 0).ExchangeDeclare(name, kind, durable, autoDelete, internal, false, nil))
		}
		declare("direct", x, "direct", true, false, false)
		declare("again", x, "direct", true, false, false)
		declare("fanout", x, "fanout", true, false, false)
		declare("not durable", x, "direct", false, false, false)
		declare("auto-delete", x, "direct", true, true, false)
		declare("internal", x, "direct", true, false, true)
		declare("reserved", "amq.mine", "direct", true, false, false)
		s.fails("delete a reserved one", s.open(conn, 0).ExchangeDelete("amq.direct", false, false))
		q := s.queue(s.open(conn, 0), "q", nil)
		s.fails("bind", s.open(conn, 0).QueueBind(q, "k", x, false, nil))
		s.fails("delete if unused", s.open(conn, 0).ExchangeDelete(x, true, false))
		s.fails("delete", s.open(conn, 0).ExchangeDelete(x, false, false))
	}},
	{name: "unknown exchange type", script: func(s *script) {
		ch := s.open(s.dial(), 0)
		s.fails("declare", ch.ExchangeDeclare(s.prefix+"y", "kit-no-such-type", true, false, false, false, nil))
	}},
	{name: "topics", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		x, q := s.prefix+"x", s.queue(ch, "q", nil)
		require.NoError(s.t, ch.ExchangeDeclare(x, "topic", true, false, false, false, nil))
		for _, bound := range []string{"a", "a.*", "a.#", "#", "*.b", "#.b", "a.#.b", "*", "#.#", ""} {
			require.NoError(s.t, ch.QueueBind(q, bound, x, false, nil))
			for _, key := range []string{"", "a", "a.b", "a.b.c", "a.c.b", "b", "."} {
				s.publish(conn, x, key, "m")
				n, err := ch.QueuePurge(q, false)
				require.NoError(s.t, err)
				s.note("%q %q %d", bound, key, n)
			}
			require.NoError(s.t, ch.QueueUnbind(q, bound, x, nil))
		}
	}},
	{name: "consumer tag reuse", script: func(s *script) {
		conn := s.dial()
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", nil)
		s.consume(ch, q, "same")
		go ch.Consume(q, "same", false, false, false, false, nil)
		s.closed("connection", closed)
	}},
	{name: "wrong tags", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "q", nil)
		// One message at a time: a RabbitMQ may send a delivery right after channel.close, for which the driver ends the connection.
		for _, c := range []struct {
			what   string
			settle func(ch *amqp.Channel) error
			left   int
		}{
			{"double ack", func(ch *amqp.Channel) error { ch.Ack(1, false); return ch.Ack(1, false) }, 0},
			{"unknown ack", func(ch *amqp.Channel) error { return ch.Ack(99, false) }, 1},
			{"unknown nack", func(ch *amqp.Channel) error { return ch.Nack(99, false, true) }, 1},
			{"unknown reject", func(ch *amqp.Channel) error { return ch.Reject(99, true) }, 1},
			{"unknown multiple", func(ch *amqp.Channel) error { return ch.Ack(99, true) }, 1},
			{"tag zero", func(ch *amqp.Channel) error { return ch.Ack(0, false) }, 1},
			{"double multiple", func(ch *amqp.Channel) error { ch.Reject(1, false); return ch.Ack(1, true) }, 0},
		} {
			ch := s.open(conn, 1)
			_, err := ch.QueuePurge(q, false)
			require.NoError(s.t, err)
			s.publish(conn, "", q, "1")
			closed := notifyClose(ch)
			s.next("c", s.consume(ch, q, "c"))
			s.fails(c.what, c.settle(ch))
			s.closed("channel", closed)
			s.ready(conn, q, c.left)
		}
	}},
	{name: "multiple", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 10)
		q := s.queue(ch, "q", nil)
		s.publish(conn, "", q, "1", "2", "3", "4")
		s.fails("everything of nothing", ch.Ack(0, true))
		ds := s.consume(ch, q, "c")
		for range 4 {
			s.next("c", ds)
		}
		s.fails("ack", ch.Ack(2, true))
		s.fails("nack", ch.Nack(0, true, true))
		s.next("c", ds)
		s.next("c", ds)
		s.none("c", ds)
	}},
	{name: "cancel", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", nil)
		s.publish(conn, "", q, "1")
		s.fails("unknown", ch.Cancel("unknown", false))
		ds := s.consume(ch, q, "c")
		d := s.next("c", ds)
		s.fails("cancel", ch.Cancel("c", false))
		s.next("c", ds)
		s.fails("ack", d.Ack(false))
		s.fails("qos", ch.Qos(1, 0, false))
		s.ready(conn, q, 0)
	}},
	{name: "queue deletion", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "q", nil)
		s.publish(conn, "", q, "1", "2")
		ch := s.open(conn, 1)
		cancelled := ch.NotifyCancel(make(chan string, 1))
		d := s.next("c", s.consume(ch, q, "c"))
		_, err := s.open(conn, 0).QueueDelete(q, true, false, false)
		s.fails("if unused", err)
		_, err = s.open(conn, 0).QueueDelete(q, false, true, false)
		s.fails("if empty", err)
		n, err := s.open(conn, 0).QueueDelete(q, false, false, false)
		s.fails("delete", err)
		s.note("%d", n)
		s.note("cancelled %s", <-cancelled)
		s.fails("late ack", d.Ack(false))
		s.fails("qos", ch.Qos(1, 0, false))
		_, err = ch.Consume(q, "c", false, false, false, false, nil)
		s.fails("consume", err)
	}},
	{name: "auto-delete", until: 403, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		name := s.prefix + "q"
		_, err := ch.QueueDeclare(name, false, true, false, false, nil)
		s.fails("declare", err)
		s.consume(ch, name, "c")
		s.fails("cancel", ch.Cancel("c", false))
		time.Sleep(100 * time.Millisecond)
		s.ready(conn, name, 0)
	}},
	{name: "dead letters", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		dead := s.queue(ch, "dead", nil)
		q := s.queue(ch, "q", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
		s.publish(conn, "", q, "rejected")
		ds := s.consume(ch, q, "c")
		s.next("c", ds).Reject(false)
		deaths(s, s.next("dead", s.consume(s.open(conn, 10), dead, "d")))
	}},
	{name: "expired and surplus", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		dead := s.queue(ch, "dead", nil)
		q := s.queue(ch, "q", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead, "x-message-ttl": int32(100), "x-max-length": int32(1)})
		s.publish(conn, "", q, "surplus")
		s.publish(conn, "", q, "expires")
		ds := s.consume(s.open(conn, 10), dead, "d")
		deaths(s, s.next("dead", ds))
		deaths(s, s.next("dead", ds))
	}},
	{name: "dead letter cycle", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		name := s.prefix + "q"
		q := s.queue(ch, "q", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": name, "x-message-ttl": int32(100)})
		s.publish(conn, "", q, "round")
		s.ready(conn, q, 0)
		time.Sleep(200 * time.Millisecond)
		s.ready(conn, q, 0)
	}},
	{name: "retry by dead letters", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		wait := s.queue(ch, "q2", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": s.prefix + "q", "x-message-ttl": int32(50)})
		q := s.queue(ch, "q", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": wait})
		s.publish(conn, "", q, "again")
		ds := s.consume(ch, q, "c")
		for range 3 {
			d := s.next("c", ds)
			deaths(s, d)
			d.Nack(false, false)
		}
	}},
	{name: "delivery limit", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		dead := s.queue(ch, "dead", nil)
		q := s.queue(ch, "q", amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(3), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
		s.publish(conn, "", q, "poison")
		ds := s.consume(ch, q, "c")
		for range 4 {
			s.next("c", ds).Reject(true)
		}
		s.none("c", ds)
		deaths(s, s.next("dead", s.consume(s.open(conn, 10), dead, "d")))
	}},
	{name: "nack counts before 4.3", until: 403, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(2)})
		s.publish(conn, "", q, "poison")
		ds := s.consume(ch, q, "c")
		for range 3 {
			s.next("c", ds).Nack(false, true)
		}
		s.none("c", ds)
		s.ready(conn, q, 0)
	}},
	{name: "length limit rejects", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		q := s.queue(ch, "q", amqp.Table{"x-max-length": int32(1), "x-overflow": "reject-publish"})
		require.NoError(s.t, ch.Confirm(false))
		for range 3 {
			c, err := ch.PublishWithDeferredConfirmWithContext(s.t.Context(), "", q, false, false, amqp.Publishing{Body: []byte("x")})
			require.NoError(s.t, err)
			s.note("confirmed %t", c.Wait())
		}
	}},
	{name: "mandatory", script: func(s *script) {
		ch := s.open(s.dial(), 0)
		require.NoError(s.t, ch.Confirm(false))
		returns := ch.NotifyReturn(make(chan amqp.Return, 1))
		c, err := ch.PublishWithDeferredConfirmWithContext(s.t.Context(), "amq.direct", "nowhere", true, false, amqp.Publishing{Body: []byte("x"), MessageId: "m"})
		require.NoError(s.t, err)
		s.note("confirmed %t", c.Wait())
		r := <-returns
		s.note("%d %s %q %q %q %q", r.ReplyCode, r.ReplyText, r.Exchange, r.RoutingKey, r.Body, r.MessageId)
	}},
	{name: "streams", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "s", amqp.Table{"x-queue-type": "stream"})
		s.publish(conn, "", q, "0", "1", "2", "3")
		for _, offset := range []any{"first", int64(2)} {
			ch := s.open(conn, 2)
			ds, err := ch.Consume(q, "c", false, false, false, false, amqp.Table{"x-stream-offset": offset})
			s.fails("consume", err)
			for n, _ := offset.(int64); n < 4; n++ {
				d := s.next("c", ds)
				s.note("offset %v %T", d.Headers["x-stream-offset"], d.Headers["x-stream-offset"])
				d.Ack(false)
			}
			s.fails("close", ch.Close())
		}
		ch := s.open(conn, 2)
		ds := s.consume(ch, q, "c")
		s.none("next", ds)
		s.publish(conn, "", q, "4")
		s.next("next", ds)
		_, err := s.open(conn, 0).Consume(q, "c", false, false, false, false, nil)
		s.fails("without prefetch", err)
	}},
	{name: "stream hard errors", script: func(s *script) {
		q := s.queue(s.open(s.dial(), 0), "s", amqp.Table{"x-queue-type": "stream"})
		for what, do := range map[string]func(*amqp.Channel) error{
			"get":   func(ch *amqp.Channel) error { _, _, err := ch.Get(q, false); return err },
			"purge": func(ch *amqp.Channel) error { _, err := ch.QueuePurge(q, false); return err },
			"auto-ack": func(ch *amqp.Channel) error {
				_, err := ch.Consume(q, "", true, false, false, false, nil)
				return err
			},
		} {
			conn := s.dial()
			closed := conn.NotifyClose(make(chan *amqp.Error, 1))
			s.fails(what, do(s.open(conn, 1)))
			s.closed(what+" connection", closed)
		}
		slices.Sort(s.lines)
	}},
	{name: "stream nack before 4.0", until: 400, script: func(s *script) {
		conn := s.dial()
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		q := s.queue(s.open(conn, 0), "s", amqp.Table{"x-queue-type": "stream"})
		ds := s.consume(s.open(conn, 1), q, "c")
		s.publish(conn, "", q, "1")
		s.next("c", ds).Nack(false, true)
		s.closed("connection", closed)
	}},
	{name: "qos", script: func(s *script) {
		conn := s.dial()
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		go s.open(conn, 0).Qos(1, 100, false)
		s.closed("prefetch size", closed)
	}},
	{name: "global qos before 4.3", until: 403, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		q, q2 := s.queue(ch, "q", nil), s.queue(ch, "q2", quorum)
		s.publish(conn, "", q, "1", "2", "3", "4")
		s.fails("qos", ch.Qos(2, 0, true))
		one := s.consume(ch, q, "one")
		s.next("one", one)
		d := s.next("one", one)
		two := s.consume(ch, q, "two")
		s.none("two", two)
		d.Ack(false)
		select { // which of them is not the point
		case <-one:
		case <-two:
		case <-time.After(5 * time.Second):
			s.note("nothing")
		}
		s.none("one", one)
		s.none("two", two)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		_, err := ch.Consume(q2, "", false, false, false, false, nil)
		s.fails("quorum", err)
		s.closed("connection", closed)
	}},
	{name: "turns", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 10)
		q := s.queue(ch, "q", nil)
		one, two, three := s.consume(ch, q, "one"), s.consume(ch, q, "two"), s.consume(ch, q, "three")
		s.publish(conn, "", q, "1", "2", "3", "4", "5", "6")
		for range 2 {
			s.next("one", one)
			s.next("two", two)
			s.next("three", three)
		}
	}},
	{name: "priorities", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", nil)
		low := s.consume(ch, q, "low")
		high, err := ch.Consume(q, "high", false, false, false, false, amqp.Table{"x-priority": int32(7)})
		s.fails("consume", err)
		s.publish(conn, "", q, "1", "2", "3")
		d := s.next("high", high)
		s.next("low", low)
		d.Ack(false)
		s.next("high", high)
	}},
	{name: "single active consumer", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		// Quorum: a classic queue of 3.10 forgets to go on with the next consumer.
		q := s.queue(ch, "q", amqp.Table{"x-queue-type": "quorum", "x-single-active-consumer": true})
		one, two := s.consume(ch, q, "one"), s.consume(s.open(conn, 1), q, "two")
		s.publish(conn, "", q, "1", "2")
		d := s.next("one", one)
		s.none("two", two)
		s.fails("cancel", ch.Cancel("one", false))
		s.fails("ack", d.Ack(false))
		s.next("two", two)
	}},
	{name: "logins", script: func(s *script) {
		u, err := url.Parse(s.url)
		require.NoError(s.t, err)
		good := u.User
		u.User = url.UserPassword(good.Username(), "wrong")
		start := time.Now()
		_, err = amqp.DialConfig(u.String(), amqp.Config{Dial: s.net})
		s.fails("wrong password", err)
		s.note("after %.0f s", time.Since(start).Seconds())
		u.User, u.Path = good, "/nowhere"
		_, err = amqp.DialConfig(u.String(), amqp.Config{Dial: s.net})
		s.fails("no such vhost", err)
	}},
	{name: "silent client", script: func(s *script) {
		var quiet atomic.Bool
		conn, err := amqp.DialConfig(s.url, amqp.Config{Heartbeat: time.Second, Dial: func(network, addr string) (net.Conn, error) {
			nc, err := s.net(network, addr)
			return &mutedConn{Conn: nc, quiet: &quiet}, err
		}})
		require.NoError(s.t, err)
		s.conns = append(s.conns, conn)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		time.Sleep(2 * time.Second)
		quiet.Store(true)
		start := time.Now()
		e := <-closed
		d := time.Since(start).Seconds()
		s.note("%d server %t, after two to three heartbeats: %t", e.Code, e.Server, d > 1 && d < 3.6)
	}},
	{name: "flow", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		s.fails("on", ch.Flow(true))
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		s.fails("off", ch.Flow(false))
		s.closed("connection", closed)
	}},
	{name: "update secret", script: func(s *script) {
		conn := s.dial()
		s.fails("update", conn.UpdateSecret("new", "because"))
		s.fails("channel", s.open(conn, 0).Close())
	}},
	{name: "no-ack", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", nil)
		s.publish(conn, "", q, "1", "2", "3")
		ds, err := ch.Consume(q, "c", true, false, false, false, nil)
		s.fails("consume", err)
		for range 3 {
			s.next("c", ds)
		}
		closed := notifyClose(ch)
		s.fails("ack", ch.Ack(1, false))
		s.closed("channel", closed)
	}},
	{name: "properties", script: func(s *script) {
		u, err := url.Parse(s.url)
		require.NoError(s.t, err)
		user := u.User.Username()
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", nil)
		p := amqp.Publishing{
			Headers:     amqp.Table{"i": int32(1), "l": int64(2), "s": "x", "b": true, "t": amqp.Table{"n": nil}, "a": []any{int32(1), "y"}},
			ContentType: "t", ContentEncoding: "e", DeliveryMode: 1, Priority: 3, CorrelationId: "c", ReplyTo: "r", Expiration: "60000",
			MessageId: "m", Timestamp: time.Unix(1000, 0), Type: "k", UserId: user, AppId: "a", Body: make([]byte, 200_000),
		}
		require.NoError(s.t, ch.PublishWithContext(context.Background(), "", q, false, false, p))
		d := s.next0(s.consume(ch, q, "c"))
		s.note("%v %d", d.Headers, len(d.Body))
		s.note("%s %s %d %d %s %s %s %s %d %s %t %s", d.ContentType, d.ContentEncoding, d.DeliveryMode, d.Priority, d.CorrelationId, d.ReplyTo, d.Expiration, d.MessageId, d.Timestamp.Unix(), d.Type, d.UserId == user, d.AppId)
	}},
}

// next0 is next without a line of its own.
func (s *script) next0(ds <-chan amqp.Delivery) amqp.Delivery {
	select {
	case d := <-ds:
		return d
	case <-time.After(5 * time.Second):
		s.note("nothing in 5 s")
		return amqp.Delivery{}
	}
}

// requeue returns messages in a mixed order, twice.
func requeue(s *script, args amqp.Table) {
	conn := s.dial()
	ch := s.open(conn, 10)
	q := s.queue(ch, "q", args)
	s.publish(conn, "", q, "1", "2", "3", "4", "5", "6")
	one := s.open(conn, 4)
	ds := s.consume(one, q, "c")
	var held []amqp.Delivery
	for range 4 {
		held = append(held, s.next("c", ds))
	}
	s.fails("cancel", one.Cancel("c", false))
	s.fails("nack 3", held[2].Nack(false, true))
	s.fails("reject 1", held[0].Reject(true))
	s.fails("ack 2", held[1].Ack(false))
	s.fails("nack 4", held[3].Nack(false, true))
	s.fails("qos", one.Qos(1, 0, false))
	s.ready(conn, q, 5)
	ds = s.consume(ch, q, "c2")
	held = nil
	for range 5 {
		held = append(held, s.next("c2", ds))
	}
	s.fails("reject", held[4].Reject(true))
	s.next("c2", ds)
}

// deaths writes down what the headers say about the deaths of a message.
func deaths(s *script, d amqp.Delivery) {
	list, _ := d.Headers["x-death"].([]any)
	for _, v := range list {
		death := v.(amqp.Table)
		_, timed := death["time"].(time.Time)
		s.note("%v %T %v in %v by %q keys %v time %t", death["count"], death["count"], death["reason"], death["queue"], death["exchange"], death["routing-keys"], timed)
	}
	if why, ok := d.Headers["x-last-death-reason"]; ok {
		s.note("last: %v %v %q", why, d.Headers["x-last-death-queue"], d.Headers["x-last-death-exchange"])
	}
	s.note("first: %v %v %q", d.Headers["x-first-death-reason"], d.Headers["x-first-death-queue"], d.Headers["x-first-death-exchange"])
	s.note("exchange %q key %q", d.Exchange, d.RoutingKey)
}

// mutedConn loses what is written to it once quiet is set.
type mutedConn struct {
	net.Conn
	quiet *atomic.Bool
}

func (c *mutedConn) Write(p []byte) (int, error) {
	if c.quiet.Load() {
		return len(p), nil
	}
	return c.Conn.Write(p)
}
