package matrix_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
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

const (
	// elected bounds the election of a new leader of a quorum queue or a stream, which the broker
	// needs up to 10 s for.
	elected = 10 * time.Second
	// homeless bounds the next try for a classic queue whose node was away for half a minute: the
	// pace of what an operator has to mend.
	homeless = 31 * time.Second
	// stallAfter is the time of the detector. stallBound bounds leaving a host that seems to be
	// alive, counted from when the others can tell that it is not: three looks, an answer that does
	// not come, and a setup.
	stallAfter = 2 * time.Second
	stallBound = 3*stallAfter + 2*scenario.SetupTimeout + elected
	// streamStallBound is that of a stream, which takes one look more.
	streamStallBound = stallBound + stallAfter
	// partitioned is how long a node is cut off from the others: as long as they take to notice and
	// to elect, and then the bound.
	netTick     = 8 * time.Second
	partitioned = netTick*5/4 + elected + streamStallBound
)

// place is where a trial on a cluster has its queue, its consumer and its publisher.
type place struct {
	kind             kind
	args             amqp.Table // of the queue
	home, at, feed   int
	elsewhere, stall bool
	backlog          bool // more messages wait than the prefetch, for at least 20 s
	check            func(*trial, times)
}

// onCluster is an event and whom it happens to.
type onCluster struct {
	event
	quick  bool // part of the short matrix
	places []place
}

// runCluster runs one half of the faults on a cluster of its own, one after the other: each needs
// the whole cluster.
func (m *matrix) runCluster(t *testing.T, g rabbit.Generation, half int) {
	cfg := rabbit.Config{Generation: g, ChannelTick: time.Second, NetTick: tick(g)}
	if pauses(g) {
		cfg.Conf = []string{"cluster_partition_handling = pause_minority"}
	}
	c := rabbit.NewCluster(t, 3, cfg)
	for i, e := range clusterEvents(c, g) {
		if i%2 != half || m.parts == "" && !e.quick {
			continue
		}
		t.Run(e.fault, func(t *testing.T) {
			var parties []party
			for _, p := range e.places {
				parties = append(parties, party{
					name: p.label(g) + " " + string(p.kind), kind: p.kind, label: p.label(g), check: p.check,
					make: func(t *testing.T) *trial { return m.newClusterTrial(t, g, c, p) },
				})
			}
			m.happens(t, "", e.event, parties)
		})
	}
	if half == 0 && m.parts != "" {
		t.Run("group's node drained", func(t *testing.T) { m.groupMoves(t, g, c) })
	}
}

// pauses says whether a node without a majority stops serving clients. Up to 4.2 that is
// configured, here so that the cluster stays whole; since 4.3 it is not, and the node goes on.
func pauses(g rabbit.Generation) bool { return g != rabbit.Gen43 }

// tick is the heartbeat between the nodes. It is slower where a node that comes back after it would
// find the cluster split.
func tick(g rabbit.Generation) time.Duration {
	if pauses(g) {
		return 2 * netTick
	}
	return netTick
}

func (p place) label(g rabbit.Generation) string {
	text := string(g) + " x 3, "
	switch {
	case p.elsewhere:
		return text + "another node than the consumer's"
	case p.stall:
		return text + "the consumer's node, stall detector"
	}
	return text + "the consumer's node"
}

// newClusterTrial gives the consumer three hosts, each behind its own proxy. The first dial decides
// which address leads to which node, so that the consumer's first host is the one the place asks
// for, whichever address it chooses.
func (m *matrix) newClusterTrial(t *testing.T, g rabbit.Generation, c *rabbit.Cluster, p place) *trial {
	t.Helper()
	r := m.newTrial(t, g, p.kind, c.Nodes[p.home], cell{args: p.args})
	r.nodes = c.Nodes
	r.Feeder.URL = c.Nodes[p.feed].URL()
	var others []string
	r.proxies, others = beside(t, r.Proxy, c.Nodes, p.home)
	r.Options = append(r.Options, steadymq.WithURLs(others...), steadymq.WithDialer(firstTo(r.proxies, p.at, r.Sockets.Dial)))
	if p.stall {
		r.Options = append(r.Options, steadymq.WithStallDetector(stallAfter))
	}
	if p.backlog {
		r.Handle = func(context.Context, *steadymq.Delivery, int) error { r.Pause(80 * time.Millisecond); return nil }
		r.Publish(1000)
	}
	return r
}

// beside puts a proxy in front of every node but home, which has one, and returns all of them by
// node, and the URLs of the new ones.
func beside(t *testing.T, of *faultproxy.Proxy, nodes []*rabbit.Broker, home int) (proxies []*faultproxy.Proxy, others []string) {
	t.Helper()
	proxies = make([]*faultproxy.Proxy, len(nodes))
	for i, node := range nodes {
		if i == home {
			proxies[i] = of
			continue
		}
		other, err := of.Beside(node.Addr())
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, other.Close()) })
		proxies[i] = other
		others = append(others, other.URL(node.URL()))
	}
	return proxies, others
}

type dialer func(ctx context.Context, network, address string) (net.Conn, error)

func firstTo(proxies []*faultproxy.Proxy, at int, dial dialer) dialer {
	var mu sync.Mutex
	swap := map[string]string{}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		mu.Lock()
		if len(swap) == 0 {
			want := proxies[at].Addr()
			swap[address], swap[want] = want, address
		}
		if to, ok := swap[address]; ok {
			address = to
		}
		mu.Unlock()
		return dial(ctx, network, address)
	}
}

// ---- checks ----

// movesOn is the check after a host that says that it goes, or is gone: the consumer consumes on
// another one.
func movesOn(limit time.Duration) func(*trial, times) {
	return func(r *trial, when times) {
		change := r.AwaitLost(0, when.healed, 0) // it happened long ago
		r.Resumed(change.Time, limit)
		r.judge()
	}
}

// settles is the check after a time of faults: at its end, or within the limit, the consumer
// consumes for good.
func settles(limit time.Duration) func(*trial, times) {
	return func(r *trial, when times) {
		r.Must(limit+5*time.Second, "consuming", func() bool { return r.Consumer.State() == steadymq.Consuming })
		r.flows(when.healed, limit)
		r.judge()
	}
}

// flows waits for a message that was handled after since, and notes how long that took.
func (r *trial) flows(since time.Time, limit time.Duration) {
	r.Helper()
	var first time.Time
	r.Must(limit+5*time.Second, "messages are handled", func() bool {
		first = r.Ledger.FirstAfter(since)
		return !first.IsZero()
	})
	r.InTime(first.Sub(since), limit, "time to the first message")
	r.ResumedAfter = max(first.Sub(since), time.Nanosecond)
}

// ---- the faults ----

func clusterEvents(c *rabbit.Cluster, g rabbit.Generation) []onCluster {
	n := c.Nodes
	nothing := func(context.Context) (times, error) { return times{}, nil } // the check does it
	leader := func(k kind, check func(*trial, times)) place { return place{kind: k, feed: 1, check: check} }
	events := []onCluster{
		{
			event:  event{fault: "node cut off from its clients", rows: "12, 30", apply: nothing},
			quick:  true,
			places: []place{leader(quorum, cutFromClients), leader(stream, cutFromClients), leader(classic, cutFromClients)},
		},
		{
			event:  event{fault: "leader's node stopped and started", rows: "1, 33, 35", apply: during(n[0].Stop, 2*time.Second, n[0].Start)},
			places: []place{leader(quorum, movesOn(elected)), bystander(), leader(stream, movesOn(elected)), leader(classic, back(homeless))},
		},
		{
			event:  event{fault: "node drained and revived", rows: "3, 35", apply: during(n[0].Drain, 3*time.Second, n[0].Revive)},
			places: []place{leader(quorum, movesOn(elected)), bystander(), leader(stream, movesOn(elected)), leader(classic, movesOn(elected))},
		},
		{
			event: event{
				fault: fmt.Sprintf("node cut off from its peers for %d s", partitioned/time.Second), rows: "36, 37, 64",
				apply: during(
					func(ctx context.Context) error { return c.CutPeers(ctx, 0) }, partitioned,
					func(ctx context.Context) error { return errors.Join(c.JoinPeers(ctx, 0), n[0].WaitReady(ctx)) }),
			},
			places: cutOff(g),
		},
		{
			event: event{fault: "two of three nodes stopped and started", rows: "36", apply: during(
				both(n[0].Stop, n[1].Stop), 15*time.Second, both(n[0].Start, n[1].Start))},
			places: left(g),
		},
		{
			event:  event{fault: "leader's node frozen", rows: "17", apply: during(freeze(n[0]), frozenFor(g), n[0].Unpause)},
			places: []place{leader(quorum, movesOn(elected)), bystander(), leader(stream, settles(homeless)), leader(classic, settles(homeless))},
		},
		{
			event:  event{fault: "leader's node killed and started", rows: "4, 33, 35", apply: during(n[0].Kill, 2*time.Second, n[0].Start)},
			quick:  true,
			places: []place{leader(quorum, movesOn(elected)), bystander(), leader(stream, movesOn(elected)), leader(classic, back(homeless))},
		},
		{
			event:  event{fault: "rolling restart of all nodes", rows: "1, 3", apply: rolling(n)},
			places: []place{leader(quorum, settles(elected)), leader(stream, settles(homeless)), leader(classic, settles(homeless))},
		},
		{
			event:  event{fault: "stream without a replica on the first host", rows: "60", apply: nothing},
			places: []place{{kind: stream, args: amqp.Table{"x-initial-cluster-size": 1}, at: 1, elsewhere: true, check: noReplica}},
		},
		{
			event:  event{fault: "stream's replica removed", rows: "60", apply: nothing},
			places: removed(g),
		},
	}
	if g == rabbit.Gen310 {
		events = append(events, mirrored(n))
	}
	return events
}

// mirrored is a fault of mirrored queues, which exist up to 3.13: a mirror takes over, and a
// consumer that asked for it is told.
func mirrored(n []*rabbit.Broker) onCluster {
	const policy = "mirrored"
	unmirror := func(ctx context.Context) error {
		return errors.Join(n[0].Start(ctx), n[1].PolicyOff(ctx, "/", policy))
	}
	return onCluster{
		event: event{
			fault: "mirrored queue's leader stopped and started", rows: "38",
			before: func(ctx context.Context) error { return n[0].PolicyOn(ctx, "/", policy, ".*", `{"ha-mode": "all"}`) },
			prepare: func(r *trial) {
				r.Options = append(r.Options, steadymq.WithConsumeArgs(amqp.Table{"x-cancel-on-ha-failover": true}))
			},
			apply: during(n[0].Stop, 2*time.Second, unmirror),
		},
		places: []place{{kind: classic, at: 1, feed: 2, elsewhere: true, check: func(r *trial, when times) {
			change := r.AwaitLost(0, when.at, elected)
			assert.ErrorContains(r, change.Cause, "cancelled")
			r.Resumed(change.Time, elected)
			r.KeptConnection()
			r.judge()
		}}},
	}
}

// bystander is a consumer on another node than the one that suffers, though that one leads its
// queue.
func bystander() place {
	return place{kind: quorum, at: 1, feed: 2, elsewhere: true, check: unimpressed}
}

// cutOff are the places of a node that its peers cannot reach.
func cutOff(g rabbit.Generation) []place {
	elsewhere := place{kind: classic, home: 1, feed: 1, check: settles(homeless)}
	if pauses(g) {
		return []place{{kind: quorum, feed: 1, check: paused}, bystander(), {kind: stream, feed: 1, check: paused}, elsewhere}
	}
	return []place{
		{kind: quorum, feed: 1, check: minority},
		{kind: quorum, feed: 1, stall: true, check: leaves},
		bystander(),
		{kind: stream, feed: 1, check: forgotten},
		{kind: stream, feed: 1, stall: true, check: leaves},
		elsewhere,
	}
}

// frozenFor is long enough for the consumer to leave. Up to 4.2 it is also too short for the others
// to call the node down: it would come back to a cluster that is split for good, without having
// been in the minority.
func frozenFor(g rabbit.Generation) time.Duration {
	if pauses(g) {
		return tick(g) / 3
	}
	return tick(g) * 3 / 2
}

// removed is the place of a stream whose replica is taken away. RabbitMQ 3.10 does not tell the
// consumer.
func removed(g rabbit.Generation) []place {
	if g == rabbit.Gen310 {
		return []place{{kind: stream, at: 2, stall: true, check: replicaVanished}}
	}
	return []place{{kind: stream, at: 2, elsewhere: true, check: replicaRemoved}}
}

// left are the places on the last of three nodes.
func left(g rabbit.Generation) []place {
	on := func(k kind, limit time.Duration) place {
		return place{kind: k, home: 2, at: 2, feed: 2, check: settles(limit)}
	}
	if pauses(g) {
		return []place{on(quorum, homeless), on(stream, homeless), on(classic, homeless)}
	}
	return []place{
		on(quorum, elected),
		{kind: quorum, home: 2, at: 2, feed: 2, stall: true, backlog: true, check: told},
		on(stream, homeless),
		on(classic, homeless),
	}
}

func both(a, b func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		var errA, errB error
		var all sync.WaitGroup
		all.Go(func() { errA = a(ctx) })
		all.Go(func() { errB = b(ctx) })
		all.Wait()
		return errors.Join(errA, errB)
	}
}

func rolling(nodes []*rabbit.Broker) func(context.Context) (times, error) {
	return func(ctx context.Context) (times, error) {
		when := times{at: time.Now()}
		for i, n := range nodes {
			if err := n.Restart(ctx, 500*time.Millisecond); err != nil {
				return when, fmt.Errorf("node %d: %w", i, err)
			}
		}
		when.healed = time.Now()
		return when, nil
	}
}

// cutFromClients: the host is there, but nothing comes of it and dials hang. The consumer goes to
// another.
func cutFromClients(r *trial, _ times) {
	at := time.Now()
	r.proxies[0].BlackHole(faultproxy.Both)
	r.AwaitLost(0, at, scenario.SilentPeer)
	r.Resumed(at, scenario.SilentPeer+scenario.AtOnce)
	r.Pause(2 * time.Second)
	r.proxies[0].Heal()
	r.judge()
}

// paused: the node stops serving when it finds that it has no majority, and the others serve.
func paused(r *trial, when times) {
	change := r.AwaitLost(0, when.at, tick(r.gen)*5/4+elected)
	r.Note("the node stopped serving %s after the cut", inWords(change.Time.Sub(when.at)))
	r.Resumed(change.Time, elected)
	require.True(r, r.handledDuring(change.Time, when.healed), "while the node is cut off")
	r.judge()
}

// minority: the node lives, answers, and leads a quorum queue without a majority. Without a
// detector the consumer waits for the messages, which the others have by now, until the nodes see
// each other again.
func minority(r *trial, when times) {
	assert.False(r, r.handledDuring(when.at.Add(netTick+elected), when.healed), "a node without majority delivers")
	settles(elected)(r, when)
	r.Note("without a detector it is healed with the cluster")
}

// leaves: the detector finds out while the node is cut off, and the consumer goes to where the
// messages are.
func leaves(r *trial, when times) {
	change := r.told("stalled", time.Second)
	require.True(r, change.Time.Before(when.healed), "noticed while the node is cut off")
	require.True(r, r.handledDuring(change.Time, when.healed), "another host has a majority")
	r.flows(change.Time, elected)
	r.Note("noticed %s after the cut: %v", inWords(change.Time.Sub(when.at)), errors.Unwrap(change.Cause))
	r.judge()
}

// told: the backlog is there and does not move. No host has a majority: all the consumer can do is
// to tell, and to be there when there is one again.
func told(r *trial, when times) {
	change := r.told("though the queue has", time.Second)
	require.True(r, change.Time.Before(when.healed), "noticed while there is no majority")
	r.Note("noticed %s after the stop", inWords(change.Time.Sub(when.at)))
	settles(stallBound+elected)(r, when)
}

func (r *trial) handledDuring(from, to time.Time) bool {
	first := r.Ledger.FirstAfter(from)
	return !first.IsZero() && first.Before(to)
}

// forgotten: after a partition RabbitMQ may leave a consumer of a stream that it delivers nothing
// to any more, without a sign of it on the wire. The consumer knows its place in the stream:
// nothing is lost once anybody closes the connection.
func forgotten(r *trial, when times) {
	if !r.Holds(homeless, func() bool { return !r.Ledger.FirstAfter(when.healed).IsZero() }) {
		r.Note("RabbitMQ leaves the consumer silent; from an operator's closing the connection on")
		at := time.Now()
		for _, node := range r.nodes {
			_, err := node.CloseNamed(r.Context(), r.Queue, "silent")
			r.ok(err)
		}
		r.Resumed(at, elected)
		when.healed = at
	}
	r.flows(when.healed, homeless)
	r.judge()
}

// noReplica: the first host cannot serve the stream and says so; the next one asked can.
func noReplica(r *trial, _ times) {
	change := r.told("replica on the local node", time.Second)
	r.Resumed(change.Time, elected)
	r.judge()
}

func replicaRemoved(r *trial, _ times) {
	at := time.Now()
	r.ok(r.Broker.DeleteReplica(r.Context(), r.Queue, 2))
	change := r.AwaitLost(0, at, elected)
	assert.ErrorContains(r, change.Cause, "cancelled")
	r.Resumed(change.Time, elected)
	r.judge()
}

func replicaVanished(r *trial, _ times) {
	at := time.Now()
	r.ok(r.Broker.DeleteReplica(r.Context(), r.Queue, 2))
	change := r.told("the stream has grown", streamStallBound)
	r.Note("RabbitMQ does not tell; noticed %s after the removal", inWords(change.Time.Sub(at)))
	r.Resumed(change.Time, elected)
	r.judge()
}
