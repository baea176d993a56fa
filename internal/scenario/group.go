package scenario

import (
	"context"
	"net"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
)

// Group is scenarios whose consumers are of one [steadymq.Group]. Each member has a queue, a ledger
// and a publisher of its own and is judged by them as one alone is; the connections, their way to
// the broker, the log and Run are the group's.
type Group struct {
	*testing.T
	Broker  *rabbit.Broker
	Nodes   []*rabbit.Broker // of its cluster
	Members []*Scenario

	// For a test to change before Start.
	Options []steadymq.Option
	User    *rabbit.Broker     // whom the group logs in as, the broker's own user if nil
	Ends    func(error)        // looks at what Run returns, which is nothing if this is nil
	Wrong   map[*Scenario]bool // members that misbehave: only that they disturb no other is looked at
	Streams map[*Scenario]bool // members whose queue keeps its messages
	Sockets int                // open connections at the end, at most
	Group   *steadymq.Group    // made by Start
	Cancel  context.CancelFunc // made by Start
	Result  chan error         // of Run
	path    *Scenario          // the way to the broker
	table   *Results
}

// memberGap is the pause between the messages of a member: ten members are not to be ten times the
// load.
const memberGap = 100 * time.Millisecond

// NewGroup makes a group with a member for each queue, of which the arguments are given. Its row
// goes into the table.
func NewGroup(t *testing.T, b *rabbit.Broker, table *Results, queues ...amqp.Table) *Group {
	t.Helper()
	g := &Group{T: t, Broker: b, Nodes: []*rabbit.Broker{b}, table: table, Wrong: map[*Scenario]bool{}, Streams: map[*Scenario]bool{}, Sockets: 1}
	proxy, err := faultproxy.New(b.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { g.cleanup(proxy) })
	for _, args := range queues {
		s := newBehind(t, b, proxy, args)
		s.group, s.Feeder.Gap = g, memberGap
		g.Members = append(g.Members, s)
		if args["x-queue-type"] == "stream" {
			g.Streams[s] = true
			s.Options = append(s.Options, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
		}
	}
	g.path = g.Members[0]
	for _, s := range g.Members {
		s.ConsumerLog, s.label = g.path.ConsumerLog, g.path.label
	}
	return g
}

func (g *Group) cleanup(proxy *faultproxy.Proxy) {
	g.stopFeeding()
	if g.Cancel != nil {
		g.Cancel()
		g.path.abandon() // whatever went wrong, Run comes back from dead connections
		<-g.Result
	}
	if g.path.Proxy != nil {
		assert.NoError(g, proxy.Close())
	}
	for _, s := range g.Members {
		_ = g.Broker.DeleteQueue(s.Queue)
	}
	if g.Failed() {
		g.Logf("log of the group:\n%s", g.path.ConsumerLog.String())
	}
}

// Directly takes the proxy away, see [Scenario.Directly].
func (g *Group) Directly() {
	g.Helper()
	g.path.Directly()
	for _, s := range g.Members {
		s.Proxy = nil
	}
}

// Proxy is in front of the broker, nil after Directly.
func (g *Group) Proxy() *faultproxy.Proxy { return g.path.Proxy }

// Dial dials by the way of the group, and remembers the socket.
func (g *Group) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return g.path.dial(ctx, network, address)
}

// Name begins the name of every connection of the group.
func (g *Group) Name() string { return g.path.Queue }

// Others are the members but these.
func (g *Group) Others(but ...*Scenario) []*Scenario {
	return slices.DeleteFunc(slices.Clone(g.Members), func(s *Scenario) bool { return slices.Contains(but, s) })
}

// good are the members that do not misbehave.
func (g *Group) good() []*Scenario {
	return slices.DeleteFunc(slices.Clone(g.Members), func(s *Scenario) bool { return g.Wrong[s] })
}

// Start runs the group, under a profiler label as [Scenario.Start] does.
func (g *Group) Start() {
	g.Helper()
	as := g.Broker
	if g.User != nil {
		as = g.User
	}
	options := slices.Concat(g.path.pathOptions(), []steadymq.Option{steadymq.WithLogger(g.path.logger())}, g.Options)
	var err error
	g.Group, err = steadymq.NewGroup(g.path.By(as.URL()), options...)
	require.NoError(g, err)
	for _, s := range g.Members {
		s.Consumer, err = g.Group.Handle(s.Queue, s.deliver, s.options()...)
		require.NoError(g, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	g.Cancel, g.Result = cancel, make(chan error, 1)
	go pprof.Do(ctx, pprof.Labels("scenario", g.path.label), func(ctx context.Context) {
		g.Result <- g.Group.Run(ctx)
		close(g.Result)
	})
}

// Consuming waits until all members that do not misbehave consume.
func (g *Group) Consuming(limit time.Duration) {
	g.Helper()
	g.path.Must(limit, "all are consuming", func() bool {
		return !slices.ContainsFunc(g.good(), func(s *Scenario) bool { return s.Consumer.State() != steadymq.Consuming })
	})
}

// Feed publishes to every member in the background, and waits for the first ten messages of each.
func (g *Group) Feed() {
	g.Helper()
	were := map[*Scenario]int{}
	for _, s := range g.Members {
		were[s] = s.Ledger.Counts().Confirmed
		s.Feeder.Start()
	}
	for _, s := range g.Members {
		s.Must(20*time.Second, "messages are published", func() bool { return s.Ledger.Counts().Confirmed > were[s]+10 })
	}
}

func (g *Group) stopFeeding() {
	for _, s := range g.Members {
		s.Feeder.Stop()
	}
}

// Note adds to the last column of the group's row.
func (g *Group) Note(format string, args ...any) { g.path.Note(format, args...) }

// ---- what a group is held to ----

// Resumed is [Scenario.ResumedSince] for these members.
func (g *Group) Resumed(members []*Scenario, lost, healed time.Time, limit time.Duration) {
	g.Helper()
	for _, s := range members {
		s.ResumedSince(lost, healed, limit)
	}
}

// Untouched holds these members to having had one session.
func (g *Group) Untouched(members ...*Scenario) {
	g.Helper()
	for _, s := range members {
		assert.Zero(g, s.LostSessions(), "%s has lost a session for what concerns another: %+v", s.Queue, s.losses())
		assert.EqualValues(g, 1, s.Consumer.Stats().Sessions, "%s", s.Queue)
	}
}

// Handles waits until each of these members has handled a message since.
func (g *Group) Handles(members []*Scenario, since time.Time, limit time.Duration) {
	g.Helper()
	for _, s := range members {
		s.Must(limit, s.Queue+" handles messages", func() bool { return !s.Ledger.FirstAfter(since).IsZero() })
	}
}

// Verify ends the group and judges it and its members.
func (g *Group) Verify() {
	g.Helper()
	g.stopFeeding()
	for _, s := range g.good() {
		s.AwaitFinished()
	}
	g.oneConsumerEach()
	g.quiet()
	g.Cancel()
	g.stopped(DrainTimeout + CloseTimeout + time.Second)
	for _, s := range g.Members {
		assert.Equal(g, steadymq.Stopped, s.Consumer.State(), s.Queue)
	}
	g.nothingLeft()
	g.WireIsOurs()
	duplicates := 0
	for _, s := range g.good() {
		if !g.Streams[s] {
			s.QueueEmpty()
		}
		s.AcksAreRight()
		s.StatsAddUp()
		duplicates += s.Duplicates()
	}
	g.addRow(duplicates)
}

// oneConsumerEach waits until the broker holds one consumer on each queue, and this process as many
// sockets as the group may have. A passive declare knows no consumers of streams, so all of the
// connections' are counted, too.
func (g *Group) oneConsumerEach() {
	g.Helper()
	var held, onQueues, sockets int
	g.path.Holds(HalfOpen+CloseTimeout+5*time.Second, func() bool {
		onQueues = g.consumersOnQueues()
		sockets = g.path.Sockets.Open()
		held = g.ConsumersOn(g.Nodes...)
		return onQueues == g.queues() && held >= len(g.good()) && held <= len(g.Members) && sockets >= 1 && sockets <= g.Sockets
	})
	assert.Equal(g, g.queues(), onQueues, "queues with one consumer")
	assert.GreaterOrEqual(g, held, len(g.good()), "consumers on the broker")
	assert.LessOrEqual(g, held, len(g.Members), "consumers on the broker")
	assert.Positive(g, sockets, "open sockets")
	assert.LessOrEqual(g, sockets, g.Sockets, "open sockets")
}

// ConsumersOn counts the group's consumers on these nodes, each of which knows its own connections
// only.
func (g *Group) ConsumersOn(nodes ...*rabbit.Broker) (n int) {
	for _, node := range nodes {
		if text, err := node.ConsumersOf(g.Context(), g.Name()); err == nil {
			some, _ := strconv.Atoi(text)
			n += some
		}
	}
	return n
}

// queues counts those whose consumers a passive declare tells.
func (g *Group) queues() (n int) {
	for _, s := range g.good() {
		if !g.Streams[s] {
			n++
		}
	}
	return n
}

func (g *Group) consumersOnQueues() (n int) {
	for _, s := range g.good() {
		if g.Streams[s] {
			continue
		}
		if q, err := g.Broker.Queue(s.Queue); err == nil && q.Consumers == 1 {
			n++
		}
	}
	return n
}

// quiet waits until the broker has stopped delivering to the good members.
func (g *Group) quiet() {
	g.Helper()
	last, since := -1, time.Now()
	g.path.Must(HalfOpen+10*time.Second, "the broker has delivered everything", func() bool {
		n := 0
		for _, s := range g.good() {
			n += int(s.Consumer.Stats().Delivered)
		}
		if n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > time.Second
	})
}

func (g *Group) stopped(limit time.Duration) {
	g.Helper()
	select {
	case err := <-g.Result:
		if g.Ends == nil {
			assert.NoError(g, err)
		} else {
			g.Ends(err)
		}
	case <-time.After(limit):
		require.FailNow(g, "Run does not return")
	}
}

func (g *Group) nothingLeft() {
	g.Helper()
	var left string
	g.path.Holds(time.Second, func() bool { left = labelled(g.path.label); return left == "" })
	assert.Empty(g, left, "goroutines")
	assert.Zero(g, g.path.Sockets.Open(), "open sockets")
	stats := g.Group.Stats()
	assert.Zero(g, stats.Open, "connections")
	assert.Zero(g, stats.Isolated)
	assert.Zero(g, stats.Abandoned, "what outlasted its limit")
	for _, s := range g.good() {
		assert.Zero(g, s.Consumer.Stats().Abandoned, "what outlasted its limit")
	}
}

// WireIsOurs looks for settlements on the wire that belong to no member's deliveries.
func (g *Group) WireIsOurs() {
	g.Helper()
	if !g.path.ReadsTheWire() {
		return
	}
	all, of := len(g.path.Proxy.Log().Settlements()), 0
	for _, s := range g.Members {
		of += len(s.settlements())
	}
	assert.Equal(g, all, of, "settled what was never delivered to a member")
}

func (g *Group) addRow(duplicates int) {
	row := Result{Broker: g.Broker.Version(), Duplicates: duplicates, Note: strings.Join(g.path.notes, "; ")}
	row.Fault = g.T.Name()
	for range 2 { // of the test and of its part
		_, row.Fault, _ = strings.Cut(row.Fault, "/")
	}
	row.Fault, _, _ = strings.Cut(row.Fault, "/") // and of the generation
	if g.path.Proxy == nil && !strings.HasSuffix(row.Fault, "direct") {
		row.Fault += ", direct"
	}
	for _, s := range g.Members {
		row.Resumed = max(row.Resumed, s.ResumedAfter)
		row.Lost += s.LostSessions()
		row.Messages += s.Ledger.Counts().Confirmed
	}
	g.table.Add(row)
}
