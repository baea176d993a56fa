//go:build linux

package router

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"regexp"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/steadymqtest"
)

var write = flag.Bool("write", false, "write docs/ROUTER.md")

const (
	heartbeat = 2 * time.Second
	// silent bounds consuming again after a path that fell silent, where another is free: the figure of the design.
	silent = 3*heartbeat/2 + 500*time.Millisecond
	// buried is when the kernel must have forgotten the old socket, from the cut on.
	buried = 2*heartbeat + 5*time.Second
	// awaitSYN bounds consuming again once SYNs pass: a dial repeats its SYN after 1 s and 3 s, gives up after 5 s, and the next comes
	// within a second.
	awaitSYN = 3*time.Second + 500*time.Millisecond
	// outage is how long those faults last that end: until after the kernel must have forgotten, so that nothing but its own time tells it.
	outage = buried + time.Second
	// awaitHost is awaitSYN, and a second for the router to find the host again.
	awaitHost = awaitSYN + time.Second
	prefetch  = 16
)

// fault is what happens to the network of one case.
type fault struct {
	name   string
	second bool // host, for who knows of it
	own    bool // dialer, which tells the kernel no limit
	story  bool // with a service of the plain driver that also publishes
	cut    func(n *Net, host int) error
	heal   func(n *Net, host int) error // after the outage; nil where consuming again must not wait for it
	limit  time.Duration                // from the cut, or from healing, to consuming again
}

var newest = rabbit.Config{Generation: rabbit.Gen43}

func faults() []fault {
	forget := func(n *Net, _ int) error { return n.Forget() }
	forgetAndDrop := func(n *Net, host int) error { return errors.Join(n.DropSYN(host), n.Forget()) }
	heal := func(n *Net, _ int) error { return n.Heal() }
	return []fault{
		{name: "the router forgets the connection, new ones pass", story: true, cut: forget, limit: silent},
		{name: "the same, with a dialer of the user's own", own: true, cut: forget, limit: silent},
		{name: "the router forgets the connection and swallows SYNs for 10 s", cut: forgetAndDrop, heal: heal, limit: awaitSYN},
		{name: "the router forgets the connection and swallows SYNs, a second host is known", second: true, cut: forgetAndDrop, limit: silent},
		{name: "the host vanishes for 10 s", cut: (*Net).Vanish, heal: (*Net).Return, limit: awaitHost},
		{name: "the host vanishes, a second host is known", second: true, cut: (*Net).Vanish, limit: silent},
	}
}

// TestThroughARouter is what a proxy cannot show, packet by packet: a router that forgets a connection and swallows it, as firewalls with a
// table do, SYNs that are not answered, and a host that is gone. Beside our consumer stands one of the plain driver, as services write it.
func TestThroughARouter(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	if why := Missing(); why != "" {
		t.Skip(why)
	}
	var table rows
	var brokers []*rabbit.Broker
	if rabbit.Required() { // first of all, because a broker that starts takes all processors
		brokers = rabbit.StartAll(t, newest, newest, newest)
	}
	var all sync.WaitGroup
	taken := 0
	for i, f := range faults() {
		all.Go(func() {
			t.Run("kit/"+f.name, func(t *testing.T) { newCase(t, f, kitBroker(t, f.second)).judge(&table, 2*i) })
		})
		if f.second || f.own {
			continue // one broker is no cluster, and the dialer is the client's
		}
		mine := taken
		taken++
		all.Go(func() {
			t.Run("RabbitMQ 4.3/"+f.name, func(t *testing.T) {
				if brokers == nil {
					rabbit.Start(t, newest) // skips
				}
				newCase(t, f, realBroker(t, brokers[mine])).judge(&table, 2*i+1)
			})
		})
	}
	all.Wait()
	text := table.String()
	t.Log("\n" + text)
	if *write { // failures, too: their rows say so
		require.NoError(t, os.WriteFile("../../docs/ROUTER.md", []byte(text), 0o644))
	}
}

// ---- brokers ----

// broker is behind the router.
type broker struct {
	name    string
	net     *Net
	urls    []string
	publish func(queue, body string) error
}

// queues are one for each client.
var queues = []string{"ours", "plain", "busy"}

// kitBroker is the kit's, with its listeners in the hosts' namespaces.
func kitBroker(t *testing.T, second bool) *broker {
	hosts := []Host{{}}
	if second {
		hosts = append(hosts, Host{})
	}
	b := &broker{name: "kit", net: New(t, hosts...)}
	kit := steadymqtest.NewBroker(t, steadymqtest.WithHosts(len(hosts)), steadymqtest.WithoutLedger())
	for i := range hosts {
		serve(t, b.net, i, kit, kit.Host(i).Addr())
		b.urls = append(b.urls, "amqp://guest:guest@"+b.net.Addr(i)+"/")
	}
	for _, q := range queues {
		kit.DeclareQueue(q, steadymqtest.QueueOptions{})
	}
	b.publish = func(queue, body string) error { kit.Publish(queue, body); return nil }
	return b
}

// serve carries a host's connections to the kit.
func serve(t *testing.T, n *Net, host int, kit *steadymqtest.Broker, addr string) {
	lis, err := n.Listen(host)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		_ = lis.Close()
		all.Wait()
	})
	carry := func(client net.Conn) {
		inner, err := kit.Dialer()(ctx, "tcp", addr)
		if err != nil {
			_ = client.Close()
			return
		}
		stop := context.AfterFunc(ctx, func() { _ = errors.Join(client.Close(), inner.Close()) })
		defer stop()
		var both sync.WaitGroup
		for _, way := range [][2]net.Conn{{client, inner}, {inner, client}} {
			both.Go(func() {
				_, _ = io.Copy(way[0], way[1])
				_ = errors.Join(client.Close(), inner.Close())
			})
		}
		both.Wait()
	}
	all.Go(func() {
		for {
			client, err := lis.Accept()
			if err != nil {
				return
			}
			all.Go(func() { carry(client) })
		}
	})
}

// realBroker is a container whose network has one more link: to the router. Messages are published past the router.
func realBroker(t *testing.T, node *rabbit.Broker) *broker {
	pid, err := node.PID(t.Context())
	if err != nil {
		t.Skip(err)
	}
	b := &broker{name: "RabbitMQ " + node.Version(), net: New(t, Host{PID: pid})}
	b.urls = []string{"amqp://guest:guest@" + b.net.Addr(0) + "/"}
	for _, q := range queues {
		require.NoError(t, node.DeclareQueue(q, nil))
	}
	conn, err := amqp.Dial(node.URL())
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.CloseDeadline(time.Now().Add(time.Second)) })
	ch, err := conn.Channel()
	require.NoError(t, err)
	require.NoError(t, ch.Confirm(false))
	var one sync.Mutex
	b.publish = func(queue, body string) error {
		one.Lock()
		defer one.Unlock()
		confirm, err := ch.PublishWithDeferredConfirm("", queue, true, false, amqp.Publishing{MessageId: body, Body: []byte(body)})
		if err != nil {
			return err
		}
		if ok, err := confirm.WaitContext(t.Context()); err != nil || !ok {
			return errors.Join(err, errors.New("not confirmed"))
		}
		return nil
	}
	return b
}

// ---- consumers ----

// witness is what one consumer tells and what the machine tells of it.
type witness struct {
	label, queue string
	client       int
	net          *Net
	urls         []string
	userTimeout  time.Duration
	work         time.Duration // the plain driver's with a message
	result       []byte        // of every message, which the plain driver publishes on the connection that consumes

	mu        sync.Mutex
	handled   map[string]int
	noticed   []time.Time
	consuming []time.Time
	dialled   []ends
	conns     []net.Conn
}

// ends are the addresses of a connection.
type ends struct{ local, remote string }

func newWitness(b *broker, id, client int) *witness {
	queue := queues[client]
	return &witness{
		label: fmt.Sprintf("%s %d", queue, id), queue: queue, client: client, net: b.net, urls: b.urls, handled: map[string]int{},
	}
}

func (w *witness) locked(do func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	do()
}

func (w *witness) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := w.net.Dialer(w.client, w.userTimeout)(ctx, network, address)
	if err == nil {
		w.locked(func() {
			w.conns = append(w.conns, conn)
			w.dialled = append(w.dialled, ends{conn.LocalAddr().String(), conn.RemoteAddr().String()})
		})
	}
	return conn, err
}

// current are those of the newest socket.
func (w *witness) current() (e ends) {
	w.locked(func() { e = w.dialled[len(w.dialled)-1] })
	return e
}

func (w *witness) handle(body string) { w.locked(func() { w.handled[body]++ }) }

// after is the first moment of a list that is not before t.
func (w *witness) after(list *[]time.Time, t time.Time) (at time.Time) {
	w.locked(func() {
		if i := slices.IndexFunc(*list, func(x time.Time) bool { return x.After(t) }); i >= 0 {
			at = (*list)[i]
		}
	})
	return at
}

func (w *witness) counts() (messages, twice int) {
	w.locked(func() {
		messages = len(w.handled)
		for _, n := range w.handled {
			twice += n - 1
		}
	})
	return messages, twice
}

func (w *witness) missing(published []string) (missing []string) {
	w.locked(func() {
		for _, body := range published {
			if w.handled[body] == 0 {
				missing = append(missing, body)
			}
		}
	})
	return missing
}

var profileEntry = regexp.MustCompile(`(?m)^(\d+) @ .*\n# labels: (.*)\n((?:#.*\n)*)`)

// goroutines are those that came of this consumer, whoever started them: how many, and where they are. Its workers do not count: each starts
// with the first delivery that finds none waiting, and they outlive sessions.
func (w *witness) goroutines() (n int, where string) {
	var profile bytes.Buffer
	_ = pprof.Lookup("goroutine").WriteTo(&profile, 1)
	for _, m := range profileEntry.FindAllStringSubmatch(profile.String(), -1) {
		if strings.Contains(m[2], strconv.Quote(w.label)) && !strings.Contains(m[3], "steadymq.(*pool).work") {
			count, _ := strconv.Atoi(m[1])
			n += count
			where += m[0] + "\n"
		}
	}
	return n, where
}

// socket is what the kernel knows of an own address.
func (w *witness) socket(t *testing.T, local string) (Socket, bool) {
	all, err := w.net.Sockets(w.client)
	require.NoError(t, err)
	if i := slices.IndexFunc(all, func(s Socket) bool { return s.Local == local }); i >= 0 {
		return all[i], true
	}
	return Socket{}, false
}

// ours runs the library's consumer until ctx ends.
func (w *witness) ours(ctx context.Context, log io.Writer) (*steadymq.Consumer, func() error, error) {
	opts := []steadymq.Option{
		steadymq.WithConcurrency(4), steadymq.WithPrefetch(prefetch), steadymq.WithHeartbeat(heartbeat),
		steadymq.WithDialer(w.dial), steadymq.WithCloseTimeout(time.Second),
		steadymq.WithLogger(slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			w.locked(func() {
				if c.From == steadymq.Consuming {
					w.noticed = append(w.noticed, c.Time)
				}
				if c.To == steadymq.Consuming {
					w.consuming = append(w.consuming, c.Time)
				}
			})
		}}),
	}
	if len(w.urls) > 1 {
		opts = append(opts, steadymq.WithURLs(w.urls[1:]...))
	}
	c, err := steadymq.New(w.urls[0], w.queue, opts...)
	if err != nil {
		return nil, nil, err
	}
	result := make(chan error, 1)
	go pprof.Do(ctx, pprof.Labels("consumer", w.label), func(ctx context.Context) {
		result <- c.Run(ctx, func(_ context.Context, d *steadymq.Delivery) error { w.handle(string(d.Body)); return nil })
	})
	return c, func() error { return <-result }, nil
}

// plain runs the driver as a service that trusts its notifiers does: both are watched, both are unbuffered, and whichever tells first is the
// last that is read of the connection. Then it dials again, every second. It ends with ctx; stop ends what the driver cannot.
func (w *witness) plain(ctx context.Context) (stop func()) {
	done := make(chan struct{})
	go pprof.Do(ctx, pprof.Labels("consumer", w.label), func(ctx context.Context) {
		defer close(done)
		for ctx.Err() == nil {
			w.plainSession(ctx)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	})
	return func() {
		<-done
		w.locked(func() {
			for _, conn := range w.conns {
				_ = conn.Close()
			}
		})
	}
}

func (w *witness) plainSession(ctx context.Context) {
	conn, err := amqp.DialConfig(w.urls[0], amqp.Config{Heartbeat: heartbeat, Dial: func(network, address string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		conn, err := w.dial(ctx, network, address)
		if err == nil {
			err = conn.SetDeadline(time.Now().Add(5 * time.Second)) // as the driver's own dial does
		}
		return conn, err
	}})
	if err != nil {
		return
	}
	connClosed := conn.NotifyClose(make(chan *amqp.Error))
	ch, err := conn.Channel()
	if err != nil {
		return
	}
	channelClosed := ch.NotifyClose(make(chan *amqp.Error))
	if ch.Qos(prefetch, 0, false) != nil {
		return
	}
	deliveries, err := ch.Consume(w.queue, "", false, false, false, false, nil)
	if err != nil {
		return
	}
	w.locked(func() { w.consuming = append(w.consuming, time.Now()) })
	go func() {
		for d := range deliveries {
			time.Sleep(w.work)
			w.handle(string(d.Body))
			if w.result != nil {
				_ = ch.PublishWithContext(ctx, "amq.fanout", "", false, false, amqp.Publishing{Body: w.result})
			}
			_ = d.Ack(false)
		}
	}()
	select {
	case <-connClosed:
	case <-channelClosed:
	case <-ctx.Done():
		_ = conn.CloseDeadline(time.Now().Add(time.Second))
		return
	}
	w.locked(func() { w.noticed = append(w.noticed, time.Now()) })
}

// ---- a case ----

type trial struct {
	*testing.T
	fault  fault
	broker *broker
	seen   *Capture

	late        atomic.Int64 // time the machine took, in nanoseconds
	ours        *witness
	plain       []*witness
	log         *lockedBuffer
	stopFeeding context.CancelFunc
	feeding     sync.WaitGroup
	published   []string
}

var labels = struct {
	sync.Mutex
	n int
}{}

func newCase(t *testing.T, f fault, b *broker) *trial {
	labels.Lock()
	labels.n++
	id := labels.n
	labels.Unlock()
	seen, err := b.net.Capture()
	require.NoError(t, err)
	t.Cleanup(seen.Close)
	c := &trial{
		T: t, fault: f, broker: b, seen: seen, log: new(lockedBuffer),
		ours: newWitness(b, id, 0),
	}
	if !f.own {
		c.ours.userTimeout = 3 * heartbeat / 2 // as the library's own dialer tells the kernel
	}
	if !f.second { // the plain driver knows one host
		c.plain = append(c.plain, newWitness(b, id, 1))
	}
	if f.story {
		busy := newWitness(b, id, 2)
		busy.work, busy.result = 100*time.Millisecond, make([]byte, 512<<10)
		c.plain = append(c.plain, busy)
	}
	return c
}

// feed publishes to both queues, fifty a second.
func (c *trial) feed() {
	ctx, cancel := context.WithCancel(c.Context())
	c.stopFeeding = cancel
	c.feeding.Go(func() { c.watchLateness(ctx) })
	c.feeding.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for n := 0; ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			body := strconv.Itoa(n)
			for _, q := range queues {
				if err := c.broker.publish(q, body); err != nil {
					c.Errorf("publish: %v", err)
					return
				}
			}
			c.published = append(c.published, body)
		}
	})
}

// holds polls on this goroutine. The last look is past the limit, so that a machine that was away for a while condemns nobody.
func (c *trial) holds(limit time.Duration, cond func() bool) bool {
	for end := time.Now().Add(limit); ; {
		last := time.Now().After(end)
		if cond() {
			return true
		}
		if last {
			return false
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (c *trial) must(limit time.Duration, what string, cond func() bool) {
	c.Helper()
	if !c.holds(limit, cond) {
		require.FailNow(c, "did not come true within "+limit.String()+": "+what)
	}
}

// inTime holds a time against its limit. A limit is for a machine that has time: on one that has not, the time by which timers were late
// since the cut says by how much.
func (c *trial) inTime(took, limit time.Duration, what string) {
	c.Helper()
	if took > limit {
		slack := time.Duration(c.late.Load())
		c.Logf("%s %v, limit %v and %v for the load of the machine", what, took, limit, slack)
		limit += slack
	}
	assert.LessOrEqual(c, took, limit, what)
}

// watchLateness adds up in c.late how late timers are.
func (c *trial) watchLateness(ctx context.Context) {
	const step = 5 * time.Millisecond
	timer := time.NewTimer(step)
	defer timer.Stop()
	for {
		due := time.Now().Add(step)
		timer.Reset(step)
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if late := time.Since(due); late > step {
			c.late.Add(int64(late))
		}
	}
}

// sockets waits until the kernel has so many of ours.
func (c *trial) sockets(want int) {
	c.Helper()
	var all []Socket
	c.holds(time.Second, func() (ok bool) {
		var err error
		all, err = c.broker.net.Sockets(0)
		return err == nil && len(all) == want
	})
	assert.Len(c, all, want, "our sockets in the kernel")
}

// judge runs both consumers through the fault and notes what was seen.
func (c *trial) judge(table *rows, order int) {
	ctx, cancel := context.WithCancel(context.Background())
	defer func() {
		if c.Failed() {
			c.Logf("log of the consumer:\n%s", c.log.String())
		}
	}()
	consumer, result, err := c.ours.ours(ctx, c.log)
	require.NoError(c, err)
	for _, w := range c.plain {
		for n := range 200 {
			if w.result != nil { // it is never without work
				require.NoError(c, c.broker.publish(w.queue, fmt.Sprintf("early %d", n)))
			}
		}
		defer w.plain(ctx)()
	}
	defer cancel()
	c.feed()
	defer c.feeding.Wait()
	defer c.stopFeeding()
	for _, w := range append([]*witness{c.ours}, c.plain...) {
		c.must(20*time.Second, w.label+" consumes", func() bool { n, _ := w.counts(); return n > 20 })
	}
	r := row{order: order, fault: c.fault.name, broker: c.broker.name}
	defer func() {
		r.failed = c.Failed()
		table.add(r)
	}()
	old := c.ours.current()
	host := c.broker.net.HostOf(old.remote)
	baseline, _ := c.ours.goroutines()
	var looks []func(cut, silence time.Time) plainRow
	for _, w := range c.plain {
		looks = append(looks, c.lookAt(w))
	}

	c.late.Store(0)
	cut := time.Now()
	require.NoError(c, c.fault.cut(c.broker.net, host))
	silence := time.Now().Add(200 * time.Millisecond) // what was on its way is past
	r.gone = c.forgotten(cut, old.local)
	r.noticed = c.ours.after(&c.ours.noticed, cut).Sub(cut)
	c.inTime(r.noticed, silent, "time to notice")
	r.wire = c.packets(cut, silence, old.local)
	for _, look := range looks {
		r.plain = append(r.plain, look(cut, silence))
	}
	r.consuming = c.healed(cut, host)
	c.must(5*time.Second, "goroutines at the baseline", func() bool { n, _ := c.ours.goroutines(); return n <= baseline })
	r.goroutines = fmt.Sprintf("%d, %d", baseline, baseline)

	c.stopFeeding()
	c.feeding.Wait()
	c.must(30*time.Second, "every message is handled", func() bool { return len(c.ours.missing(c.published)) == 0 })
	r.messages, r.twice = c.ours.counts()
	assert.LessOrEqual(c, r.twice, prefetch, "handled again: prefetch per lost session at most")
	c.sockets(1)

	cancel()
	require.NoError(c, result())
	var where string
	c.must(2*time.Second, "no goroutine is left", func() bool {
		var n int
		n, where = c.ours.goroutines()
		return n == 0
	})
	assert.Empty(c, where)
	assert.Zero(c, consumer.Stats().Abandoned)
	c.sockets(0)
}

// forgotten looks on until the old socket must be gone from the kernel, and returns when it was.
func (c *trial) forgotten(cut time.Time, old string) (gone time.Duration) {
	c.Helper()
	last := Socket{}
	for time.Since(cut) < buried {
		s, there := c.ours.socket(c.T, old)
		if !there && gone == 0 {
			gone = time.Since(cut)
		}
		if there && s.State != last.State {
			c.Logf("%s after the cut the old socket is %s, %d bytes unacknowledged", inWords(time.Since(cut)), s.State, s.Unsent)
		}
		last = s
		time.Sleep(200 * time.Millisecond)
	}
	assert.Positive(c, gone, "the old socket is still in the kernel %v after the cut: %+v", buried, last)
	return gone
}

// healed holds consuming again against its limit: from the cut on, or from healing where the fault leaves no other way.
func (c *trial) healed(cut time.Time, host int) time.Duration {
	c.Helper()
	from := cut
	if c.fault.heal != nil {
		assert.True(c, c.ours.after(&c.ours.consuming, cut).IsZero(), "there was no way to the broker")
		time.Sleep(time.Until(cut.Add(outage)))
		from = time.Now()
		require.NoError(c, c.fault.heal(c.broker.net, host))
	}
	var at time.Time
	c.must(c.fault.limit+10*time.Second, "consuming again", func() bool {
		at = c.ours.after(&c.ours.consuming, cut)
		return !at.IsZero()
	})
	took := at.Sub(from)
	c.inTime(took, c.fault.limit, "time to consume again")
	return took
}

// lookAt remembers what a plain driver's consumer has, and returns the look at it at the moment when ours must have left nothing.
func (c *trial) lookAt(w *witness) (again func(cut, silence time.Time) plainRow) {
	old := w.current().local
	baseline, _ := w.goroutines()
	return func(cut, silence time.Time) plainRow {
		r := plainRow{
			client: "plain driver", socket: "gone",
			noticed: since(cut, w.after(&w.noticed, cut)), consuming: since(cut, w.after(&w.consuming, cut)),
		}
		if w.result != nil {
			r.client += " that publishes, too"
		}
		if s, there := w.socket(c.T, old); there {
			r.socket = fmt.Sprintf("%s, %d bytes unacknowledged", s.State, s.Unsent)
			if !s.Owned {
				r.socket += ", of no process"
			}
		}
		n, where := w.goroutines()
		r.goroutines = fmt.Sprintf("%d, %d", baseline, n)
		r.wire = c.packets(cut, silence, old)
		c.Logf("%s %v after the cut: %s, goroutines %s\n%s", r.client, buried, r.socket, r.goroutines, where)
		return r
	}
}

// packets holds the wire against the story: nothing of the old connection came through. It tells what was sent into the silence.
func (c *trial) packets(cut, silence time.Time, local string) string {
	c.Helper()
	counts, err := c.broker.net.Counts()
	require.NoError(c, err)
	assert.Zero(c, counts.Resets, "no RST told the client")
	var sent []Packet
	for _, p := range c.seen.Of(local, silence) {
		if assert.True(c, p.Out, "%s after the cut the old connection reaches the client: %v", inWords(p.At.Sub(cut)), p) {
			sent = append(sent, p)
		}
	}
	if len(sent) == 0 {
		return "none"
	}
	last := sent[len(sent)-1]
	return fmt.Sprintf("%d, the last: %s after %s", len(sent), last.Flags, inWords(last.At.Sub(cut)))
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// ---- the table ----

type row struct {
	order                    int
	fault, broker            string
	noticed, consuming, gone time.Duration
	goroutines, wire         string
	messages, twice          int
	failed                   bool
	plain                    []plainRow
}

type plainRow struct{ client, noticed, consuming, socket, goroutines, wire string }

type rows struct {
	mu  sync.Mutex
	all []row
}

func (r *rows) add(one row) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, one)
}

func (r *rows) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	slices.SortFunc(r.all, func(a, b row) int { return a.order - b.order })
	var b strings.Builder
	b.WriteString(head)
	for _, x := range r.all {
		client, gone := "steadymq", "still there"
		if x.failed {
			client += " FAILED"
		}
		if x.gone > 0 {
			gone = "gone after " + inWords(x.gone)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s |\n",
			x.fault, x.broker, client, inWords(x.noticed), inWords(x.consuming), gone, x.goroutines, x.wire)
		for _, p := range x.plain {
			fmt.Fprintf(&b, "| | | %s | %s | %s | %s | %s | %s |\n", p.client, p.noticed, p.consuming, p.socket, p.goroutines, p.wire)
		}
	}
	return b.String()
}

const head = `# Through a router

Written by ` + "`make router`" + `. A client, a router and the hosts of a broker are network namespaces of one Linux machine, joined by veth pairs; the
router forwards for connections that it has seen begin and swallows all else without a word, as firewalls with a table of connections
do (nftables). The faults are the router's and the links': no proxy takes part, and every packet on the client's link is read.

- *The router forgets the connection*: its table is emptied (` + "`conntrack -F`" + `). Packets of the old connection are swallowed in both
  directions, no RST and no ICMP, while new connections pass. A connection that idles longer than a firewall remembers, a failover of
  the firewall and its restart look like that.
- *It swallows SYNs*: new connections to the host get no answer, either.
- *The host vanishes*: its link is down, and nobody says so.

"kit" is the broker of package steadymqtest, listening in the host's namespace; RabbitMQ is a container whose network has a link to the
router. 50 messages a second are published past the router. Heartbeats are 2 s, the prefetch is 16.

Each case held steadymq to this: consuming again within 1.5 heartbeats and 0.5 s (3.5 s) of the cut where there is a way to the broker,
else within 3.5 s of the moment when SYNs are answered (a dial repeats its SYN after 1 s and 3 s and gives up after 5 s; 4.5 s
where the router has to find the host again); the old socket gone from the kernel, as ` + "`ss`" + ` shows it, within 2 heartbeats and 5 s (9 s)
of the cut; as many goroutines as before; no message lost and at most 16 handled again; one socket while it runs, none and no goroutine
after it stopped.

The plain driver stands beside it, on the same router and at the same moment, in the way services use it: both notifiers unbuffered, the
first that tells is the last that is read, then a new connection, one try a second. "That publishes, too" has a result of 512 KiB for each
message and sends it on the connection that consumes: the path falls silent while it has results to send, and its writer blocks. It holds
the channel's lock, the driver's shutdown waits for that lock before it closes the socket, and so socket and goroutines stay until
the kernel gives up the write (tcp_retries2, about a quarter of an hour). Without it, the driver (1.16) closes in good order: what the peer has
not acknowledged stays with the kernel, which goes on sending it (FIN-WAIT-1).

Times count from the cut; "consuming again" counts from the end of the fault where it lasts 10 s.

| fault | broker | client | noticed after | consuming again | old socket, 9 s after the cut | goroutines before, after | sent on the old connection |
|---|---|---|---|---|---|---|---|
`

func since(from, at time.Time) string {
	if at.IsZero() {
		return "not yet"
	}
	return inWords(at.Sub(from))
}

func inWords(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
