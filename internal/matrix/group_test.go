package matrix_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

// groupSize is the number of consumers of a group, each on a queue of its own: classic, quorum,
// stream, classic, and so on.
const groupSize = 10

// groupSlots bounds how many groups share the machine: each has ten consumers and ten publishers.
const groupSlots = 6

// groupCell is one fault of a group. Where it concerns one member, the others must not notice.
type groupCell struct {
	fault string
	by    way
	quick bool // part of the short matrix
	size  int  // groupSize if 0
	test  func(*joint)
}

// joint is the trial of a group.
type joint struct {
	*scenario.Group
	gen rabbit.Generation
}

func groupCells() []groupCell {
	return []groupCell{
		{fault: "operator closes the connection", by: bothWay, quick: true, test: groupClosed},
		{fault: "connection reset", quick: true, test: func(g *joint) { g.allSuffer(g.Proxy().Reset) }},
		{fault: "broker aborts the connection", by: direct, test: func(g *joint) { g.allSuffer(g.Members[0].Abort) }},
		{fault: "connection ended politely (FIN)", test: func(g *joint) { g.allSuffer(g.Proxy().FIN) }},
		{fault: "path swallows both ways", test: groupSilenced},
		{fault: "channel of one closed (406)", by: bothWay, quick: true, test: channelOfOneClosed},
		{fault: "queue of one deleted and declared again", by: bothWay, quick: true, test: queueOfOneDeleted},
		{fault: "one whose topology fails for ever", by: bothWay, quick: true, test: topologyOfOneFails},
		{fault: "one whose topology hangs", by: bothWay, test: topologyOfOneHangs},
		{fault: "one whose topology makes the broker close the connection", by: bothWay, test: topologyOfOneCloses},
		{fault: "one whose handler never returns", by: bothWay, test: handlerOfOneHangs},
		{fault: "20 queues of a user who may have 10 connections", by: bothWay, quick: true, size: 20, test: limitedUser},
		{fault: "three connections of a user who may have one", by: bothWay, test: fewerThanAsked},
	}
}

// runGroups runs the faults of groups on one node per generation, several at a time, and then those
// of the whole node.
func (m *matrix) runGroups(t *testing.T, gens []rabbit.Generation) {
	var cfgs []rabbit.Config
	for _, g := range gens {
		cfgs = append(cfgs, rabbit.Config{Generation: g, ChannelTick: time.Second})
	}
	brokers := rabbit.StartAll(t, cfgs...)
	slots := make(chan struct{}, groupSlots)
	run := func(cells []groupCell) {
		var all sync.WaitGroup
		for _, c := range cells {
			for i, gen := range gens {
				all.Go(func() {
					slots <- struct{}{}
					defer func() { <-slots }()
					t.Run(fmt.Sprintf("%s/%s", c.fault, gen), func(t *testing.T) { m.runGroup(t, gen, brokers[i], c) })
				})
			}
		}
		all.Wait()
	}
	run(m.groupsToRun(groupCells()))
	if m.parts == "" {
		return
	}
	for i, gen := range gens {
		rabbit.NeedCommands(t, brokers[i])
		t.Run("broker stopped and started/"+string(gen), func(t *testing.T) { m.groupsOutliveTheBroker(t, gen, brokers[i]) })
	}
}

// groupsToRun leaves out what is not part of the short form, and takes apart what runs in both
// ways.
func (m *matrix) groupsToRun(cells []groupCell) (all []groupCell) {
	for _, c := range cells {
		switch {
		case m.parts == "" && !c.quick:
			continue
		case c.by != bothWay:
			all = append(all, c)
			continue
		}
		again := c
		c.by, again.by = proxied, direct
		again.fault += ", direct"
		if all = append(all, c); m.parts != "" {
			all = append(all, again)
		}
	}
	return all
}

func (m *matrix) runGroup(t *testing.T, gen rabbit.Generation, b *rabbit.Broker, c groupCell) {
	rabbit.NeedCommands(t, b)
	c.test(m.newJoint(t, gen, b, c))
}

func (m *matrix) newJoint(t *testing.T, gen rabbit.Generation, b *rabbit.Broker, c groupCell) *joint {
	t.Helper()
	if c.size == 0 {
		c.size = groupSize
	}
	var queues []amqp.Table
	for i := range c.size {
		queues = append(queues, amqp.Table{"x-queue-type": string(kinds()[i%len(kinds())])})
	}
	g := &joint{scenario.NewGroup(t, b, &m.groups, queues...), gen}
	if c.by == direct {
		g.Directly()
	}
	return g
}

// begin is a group at work, and messages on their way to each of its queues.
func (g *joint) begin() {
	g.Helper()
	g.Start()
	g.Consuming(20 * time.Second)
	g.Feed()
}

// one is the member that a fault concerns.
func (g *joint) one() *scenario.Scenario { return g.Members[0] }

func (g *joint) ok(err error) {
	g.Helper()
	require.NoError(g, err)
}

// connections holds the group to n connections so far, each for all members.
func (g *joint) connections(n int) {
	g.Helper()
	assert.EqualValues(g, n, g.Group.Group.Stats().Connections, "connections: one for all members each time")
}

// ---- what concerns all ----

// allSuffer is a fault of the connection that both sides hear of at once.
func (g *joint) allSuffer(fault func()) {
	g.begin()
	lost, done := g.one().Timed(fault)
	g.Resumed(g.Members, lost, done, scenario.AtOnce)
	g.connections(2)
	g.Verify()
}

func groupClosed(g *joint) {
	g.begin()
	at := time.Now()
	n, err := g.Broker.CloseNamed(g.Context(), g.Name(), "an operator's reason")
	g.ok(err)
	require.Equal(g, "1", n)
	done := time.Now()
	for _, s := range g.Members {
		change := s.AwaitLost(0, done, scenario.AtOnce)
		assert.ErrorContains(g, change.Cause, "an operator's reason")
	}
	g.Resumed(g.Members, at, done, scenario.AtOnce)
	g.connections(2)
	g.Verify()
}

func groupSilenced(g *joint) {
	g.begin()
	at := time.Now()
	g.Proxy().BlackHole(faultproxy.Both)
	for _, s := range g.Members {
		s.AwaitLost(0, at, scenario.SilentPeer)
	}
	g.one().Pause(2 * time.Second)
	healed := time.Now()
	g.Proxy().Heal()
	g.Resumed(g.Members, healed, healed, setupPace)
	g.connections(2)
	g.Verify()
}

// groupsOutliveTheBroker stops the broker of two groups, one behind the proxy and one direct.
func (m *matrix) groupsOutliveTheBroker(t *testing.T, gen rabbit.Generation, b *rabbit.Broker) {
	ways := []groupCell{{by: proxied}, {by: direct}}
	if rabbit.NoDirectWay(t.Context(), b) != "" {
		ways = ways[:1]
	}
	var groups []*joint
	for _, c := range ways {
		groups = append(groups, m.newJoint(t, gen, b, c))
	}
	for _, g := range groups {
		g.begin()
	}
	when, err := during(b.Stop, time.Second, b.Start)(t.Context())
	require.NoError(t, err)
	for _, g := range groups {
		g.backSince(when)
		g.Verify()
	}
}

// backSince holds every member to the bound of a broker that accepts again, which begins when it
// no longer says that it cannot serve the member's queue.
func (g *joint) backSince(when times) {
	g.Helper()
	for _, s := range g.Members {
		s.Must(serves+scenario.AfterRefusals, "consuming again", func() bool {
			return slices.ContainsFunc(s.History(), func(c steadymq.StateChange) bool { return c.To == steadymq.Consuming && c.Time.After(when.at) })
		})
		ready := when.healed
		for _, c := range s.History() {
			var said *amqp.Error
			if c.Time.After(ready) && errors.As(c.Cause, &said) && said.Server {
				ready = c.Time
			}
		}
		s.ResumedSince(when.at, ready, scenario.AfterRefusals)
	}
}

// ---- what concerns one ----

// channelOfOneClosed has the broker close the channel of one member, for an ack that it does not
// know.
func channelOfOneClosed(g *joint) {
	one := g.one()
	var channel atomic.Pointer[amqp.Channel]
	one.Options = append(one.Options, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
		channel.Store(ch)
		return "", nil
	}))
	g.begin()
	at := time.Now()
	if g.Proxy() == nil {
		g.ok(channel.Load().Ack(1<<40, false))
	} else {
		require.Equal(g, 1, g.Proxy().Inject(faultproxy.ToBroker, faultproxy.AckFrame(channelOf(one), 1<<40, false)))
	}
	change := one.AwaitLost(0, at, scenario.AtOnce)
	assert.ErrorContains(g, change.Cause, "unknown delivery tag")
	one.Resumed(at, scenario.AtOnce)
	g.connections(1)
	g.Handles(g.Members, time.Now(), 10*time.Second)
	g.Untouched(g.Others(one)...)
	g.Verify()
}

// channelOf is the channel that a member's latest delivery came on.
func channelOf(s *scenario.Scenario) (channel uint16) {
	s.Must(10*time.Second, "a delivery", func() bool {
		for _, d := range s.Proxy.Log().Deliveries() {
			if d.RoutingKey == s.Queue {
				channel = d.Channel
			}
		}
		return channel != 0
	})
	return channel
}

func queueOfOneDeleted(g *joint) {
	one := g.one()
	g.begin()
	one.Feeder.Stop()
	one.SettledAll()
	g.ok(g.Broker.DeleteQueue(one.Queue))
	one.AwaitLost(0, time.Now(), scenario.AtOnce)
	one.Pause(2 * time.Second)
	at := time.Now()
	g.ok(g.Broker.DeclareQueue(one.Queue, nil))
	one.ResumedSince(at, time.Now(), scenario.OperatorPace+scenario.AtOnce)
	one.Feeder.Start()
	g.Handles(g.Members, time.Now(), 10*time.Second)
	g.Untouched(g.Others(one)...)
	g.Verify()
}

// topologyOfOneFails: the member that fails for ever goes to a connection of its own.
func topologyOfOneFails(g *joint) {
	one := g.misbehaves()
	one.Options = append(one.Options, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
		return "", errors.New("not today")
	}))
	g.begin()
	g.one().Pause(5 * time.Second)
	g.Handles(g.Others(one), time.Now(), 5*time.Second)
	g.Untouched(g.Others(one)...)
	assert.Equal(g, 1, g.Group.Group.Stats().Isolated)
	g.Sockets = 2 // one for all others, and one of its own
	g.Verify()
}

// misbehaves is the member that a test makes misbehave. It is not the first, which stands for the
// group.
func (g *joint) misbehaves() *scenario.Scenario {
	one := g.Members[3]
	g.Wrong[one] = true
	return one
}

// topologyOfOneHangs: while deliveries come for the others, a set-up may take ten times its limit,
// because an answer may stand behind them. Then it is given up.
func topologyOfOneHangs(g *joint) {
	one := g.misbehaves()
	one.Options = append(one.Options, steadymq.WithSetupTimeout(time.Second),
		steadymq.WithTopology(func(ctx context.Context, _ *amqp.Channel) (string, error) {
			<-ctx.Done()
			return "", context.Cause(ctx)
		}))
	g.begin()
	one.Must(10*time.Second+scenario.AtOnce, "a set-up has outlasted its limit", func() bool {
		return slices.ContainsFunc(one.History(), func(c steadymq.StateChange) bool {
			return c.Cause != nil && strings.Contains(c.Cause.Error(), "setup limit")
		})
	})
	g.Handles(g.Others(one), time.Now(), 5*time.Second)
	g.Untouched(g.Others(one)...)
	g.Sockets = 2 // it may be alone by then
	g.Verify()
}

// topologyOfOneCloses: two connections are lost for the member, which no other can be spared, and
// then it is alone with what it does.
func topologyOfOneCloses(g *joint) {
	one := g.misbehaves()
	one.Options = append(one.Options, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
		return "", ch.Qos(1, 1, false) // prefetch_size: 540, for which the broker closes the connection
	}), steadymq.WithFatal(func(error) bool { return false }))
	g.begin()
	g.one().Must(20*time.Second, "the member is alone", func() bool { return g.Group.Group.Stats().Isolated > 0 })
	g.Consuming(10 * time.Second)
	sessions := map[*scenario.Scenario]int{}
	for _, s := range g.Others(one) {
		sessions[s] = s.LostSessions()
		assert.LessOrEqual(g, sessions[s], 2, "sessions lost before the member is alone")
	}
	g.one().Pause(10 * time.Second)
	for _, s := range g.Others(one) {
		assert.Equal(g, sessions[s], s.LostSessions(), "sessions lost after the member is alone")
	}
	g.Handles(g.Others(one), time.Now(), 5*time.Second)
	assert.Equal(g, 1, g.Group.Group.Stats().Isolated, "nobody else is taken for the reason")
	g.Sockets = 2 // one for all others, and one of its own
	g.Verify()
}

// handlerOfOneHangs: every worker of one member hangs for good. The others go on, and stop in
// order; Run tells whose handlers are left.
func handlerOfOneHangs(g *joint) {
	one := g.misbehaves()
	release := make(chan struct{})
	freed := sync.OnceFunc(func() { close(release) })
	g.Cleanup(freed)
	one.Handle = func(context.Context, *steadymq.Delivery, int) error { <-release; return errors.New("too late") }
	one.Options = append(one.Options, steadymq.WithDrainTimeout(time.Second))
	g.Ends = func(err error) {
		var left *steadymq.DrainError
		require.ErrorAs(g, err, &left)
		assert.Equal(g, one.Workers, left.Handlers)
		assert.ErrorContains(g, err, one.Queue)
		freed()
	}
	g.begin()
	one.AwaitStarted(one.Workers)
	g.one().Pause(3 * scenario.Heartbeat)
	g.Handles(g.Others(one), time.Now(), 5*time.Second)
	g.Untouched(g.Members...)
	g.connections(1)
	g.Verify()
	q, err := g.Broker.Queue(one.Queue)
	g.ok(err)
	assert.Equal(g, one.Ledger.Counts().Confirmed, q.Ready, "nothing of it is acked")
}

// ---- limits ----

// limitedUser: a hosted plan with few connections serves all queues.
func limitedUser(g *joint) {
	g.as("limited", 10)
	g.begin()
	g.connections(1)
	g.Untouched(g.Members...)
	lost, done := g.one().Timed(g.one().Cut)
	g.Resumed(g.Members, lost, done, scenario.AtOnce)
	g.connections(2)
	g.Verify()
}

// fewerThanAsked: the connections that the user may not have are done without. RabbitMQ counts a
// connection a moment after it has let it in, so the first dial is given time.
func fewerThanAsked(g *joint) {
	g.as("lone", 1)
	var dials atomic.Int64
	g.Options = append(g.Options, steadymq.WithConnections(3),
		steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			if dials.Add(1) > 1 {
				rest(ctx, time.Second)
			}
			return g.Dial(ctx, network, address)
		}))
	g.begin()
	assert.Equal(g, 1, g.Group.Group.Stats().Open)
	g.Handles(g.Members, time.Now(), 10*time.Second)
	g.Verify()
}

// as logs the group in as a user of its own, who may have so many connections.
func (g *joint) as(name string, connections int) {
	g.Helper()
	user := name + "-user-of-" + g.Name()
	g.ok(g.Broker.NewUser(g.Context(), user, "secret"))
	g.Cleanup(func() { _ = g.Broker.DropUser(context.Background(), user) })
	g.ok(g.Broker.Permit(g.Context(), user, "/", ".*", ".*", ".*"))
	g.ok(g.Broker.LimitUser(g.Context(), user, connections))
	g.User = g.Broker.As(user, "secret", "/")
}

// ---- a cluster ----

// groupMoves puts the node that a group is connected to into maintenance, and brings it back when
// the group consumes from another one.
func (m *matrix) groupMoves(t *testing.T, gen rabbit.Generation, c *rabbit.Cluster) {
	g := m.newJoint(t, gen, c.Nodes[0], groupCell{})
	g.Nodes = c.Nodes
	proxies, others := beside(t, g.Proxy(), c.Nodes, 0)
	g.Options = append(g.Options, steadymq.WithURLs(others...), steadymq.WithDialer(firstTo(proxies, 0, g.Dial)))
	for _, s := range g.Members {
		s.Feeder.URL = c.Nodes[1].URL()
	}
	g.begin()
	require.Equal(g, len(g.Members), g.ConsumersOn(c.Nodes[0]))
	at := time.Now()
	g.ok(c.Nodes[0].Drain(g.Context()))
	for _, s := range g.Members {
		change := s.AwaitLost(0, time.Now(), scenario.AtOnce)
		s.Resumed(change.Time, elected)
	}
	g.Handles(g.Members, time.Now(), elected)
	assert.Equal(g, len(g.Members), g.ConsumersOn(c.Nodes[1:]...), "consumers on the other nodes")
	g.Note("all of them moved within %s of the command, by connection %d", inWords(time.Since(at)), g.Group.Group.Stats().Connections)
	g.ok(c.Nodes[0].Revive(g.Context()))
	g.Verify()
}
