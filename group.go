package steadymq

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/steadymq/steadymq/internal/errtext"
)

// Group is many consumers on few connections. Make it with [NewGroup], give it queues with
// [Group.Handle], run it with [Group.Run]. All methods are safe for concurrent use.
//
// The consumers share one connection ([WithConnections] for more), and nothing else: each has its
// channel, its workers, its limits and its healing. A connection that is lost is dialled once for
// all of them. A consumer that cannot keep a session (three failures within 30 s), or during whose
// set-up the broker closes the connection twice, goes on on a connection of its own, so that it
// disturbs the others no more, and comes back when it has been healthy for 70 s.
type Group struct {
	config *config
	stats  *counters // of the connections

	mu        sync.Mutex
	consumers []*Consumer
	handlers  map[*Consumer]Handler
	run       *groupRun // nil before Run
	ended     bool      // Run takes no more consumers
}

// groupRun is the Run of a Group. Its fields do not change, but for errs.
type groupRun struct {
	ctx         context.Context
	end         context.CancelFunc
	connections *connections
	reporter    *reporter
	running     sync.WaitGroup // the consumers' goroutines; added to under the mutex of the group
	errs        []error        // of consumers; guarded by the mutex of the group
}

// NewGroup checks url and options and returns a [Group]. It dials nothing. The options hold for all
// consumers, unless [Group.Handle] is given others for one of them; those of the connection (URL,
// login, TLS, heartbeat, back-off) belong to the group alone. The error joins one [*OptionError] per
// problem, as that of [New], which also says what url is.
func NewGroup(url string, opts ...Option) (*Group, error) {
	c, err := buildGroup(url, opts)
	if err != nil {
		return nil, err
	}
	return &Group{config: c, stats: new(counters), handlers: make(map[*Consumer]Handler)}, nil
}

// Handle adds a consumer of queue to the group and returns it. It dials nothing and does not block.
// Before [Group.Run] the consumer waits for that; during Run it starts at once. The same queue may be
// added several times. queue and opts are those of [New]; opts come after those of the group.
//
// The error joins one [*OptionError] per problem: nil handlers, options of the connection, whatever
// New refuses, and every call once Run has begun to end.
//
// [Consumer.Stop] of the consumer ends it alone. Its Run is refused: the group runs it.
func (g *Group) Handle(queue string, h Handler, opts ...Option) (*Consumer, error) {
	config, err := buildMember(g.config, queue, opts)
	if h == nil {
		err = errors.Join(err, &OptionError{"Handle", "the handler must not be nil"})
	}
	if err != nil {
		return nil, err
	}
	c := &Consumer{config: config, stats: new(counters), grouped: true}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended {
		return nil, &OptionError{"Handle", "the group's Run has ended; make another group with NewGroup"}
	}
	g.consumers = append(g.consumers, c)
	g.handlers[c] = h
	if g.run != nil {
		g.start(c)
	}
	return c, nil
}

// Run runs all consumers of the group until ctx ends. It blocks. When ctx ends all drain side by
// side, each within its limit of [WithDrainTimeout], and the connections close after them; then Run
// returns nil. A group without consumers waits for [Group.Handle]. A group runs once.
//
// Run ends earlier, after it has drained all, if the Run of one consumer ends with an error: its
// set-up is refused for good before its first session, or [WithFatal] says so, or a hook has
// panicked; see [Consumer.Run]. The error joins those of all consumers, each with the name of its
// queue, except of consumers that [Consumer.Stop] has ended. A failure of a connection that ends
// several is told once.
//
// It is an [*OptionError] if ctx is nil, and [ErrRunning] if Run was called before.
func (g *Group) Run(ctx context.Context) error {
	if ctx == nil {
		return &OptionError{"Run", "the context must not be nil"}
	}
	run, err := g.begin(ctx)
	if err != nil {
		return err
	}
	select {
	case <-run.ctx.Done():
	case <-run.reporter.fault.Done():
		run.end()
	}
	g.mu.Lock()
	g.ended = true
	g.mu.Unlock()
	run.running.Wait()
	run.connections.await()
	run.end()
	run.reporter.stop()
	return errtext.Join(append(toldOnce(run.errs), run.reporter.fault.Cause())...)
}

func (g *Group) begin(ctx context.Context) (*groupRun, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.run != nil {
		return nil, ErrRunning
	}
	ctx, end := context.WithCancel(ctx)
	quiet := *g.config
	quiet.hooks = Hooks{} // they are told of consumers
	reporter := newReporter(ctx, &quiet, &g.stats.eventsDropped)
	connections := newConnections(g.config, g.stats)
	connections.told = reporter
	g.run = &groupRun{ctx: ctx, end: end, connections: connections, reporter: reporter}
	for _, c := range g.consumers {
		g.start(c)
	}
	return g.run, nil
}

// start runs c on a goroutine of its own. It is called with mu held.
func (g *Group) start(c *Consumer) {
	run, h := g.run, g.handlers[c]
	run.running.Go(func() {
		err := c.run(run.ctx, h, run.connections)
		g.mu.Lock()
		defer g.mu.Unlock()
		if c.stopped.Load() {
			delete(g.handlers, c)
			g.consumers = slices.DeleteFunc(g.consumers, func(other *Consumer) bool { return other == c })
			return
		}
		if err != nil {
			run.errs = append(run.errs, named(err, c.config))
			run.end()
		}
	})
}

// Consumers returns the consumers of the group, in the order of [Group.Handle], but for those that
// [Consumer.Stop] has ended.
func (g *Group) Consumers() []*Consumer {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.consumers)
}

// GroupStats is a snapshot of what the consumers of a [Group] share, see [Group.Stats].
type GroupStats struct {
	// Connections counts the connections opened, Dials the tries to open one.
	Connections, Dials uint64
	// Open is the number of connections that are lent now, Isolated that of the consumers which
	// have one of their own, because they could not keep a session.
	Open, Isolated int
	// Abandoned counts functions of the connection's options that ignored the end of their context.
	Abandoned uint64
}

// Stats returns the counters of what the consumers share. Those of each consumer are in its own
// [Consumer.Stats].
func (g *Group) Stats() GroupStats {
	s := GroupStats{
		Connections: g.stats.connections.Load(),
		Dials:       g.stats.dials.Load(),
		Abandoned:   g.stats.abandoned.Load(),
	}
	g.mu.Lock()
	run := g.run
	g.mu.Unlock()
	if run != nil {
		s.Open, s.Isolated = run.connections.count()
	}
	return s
}

// named returns err with the queue that it is about, which a SessionError tells by itself. Where the
// queue has no name of the user's, the consumer tag has to do.
func named(err error, c *config) error {
	switch {
	case errors.As(err, new(*SessionError)):
		return err
	case c.queue == "":
		return fmt.Errorf("consumer %s: %w", c.tagPrefix, err)
	}
	return fmt.Errorf("queue %s: %w", c.queue, err)
}

// toldOnce leaves out what repeats an earlier failure of the same connection.
func toldOnce(errs []error) []error {
	type failure struct{ op, host, reason string }
	seen := make(map[failure]bool)
	return slices.DeleteFunc(errs, func(err error) bool {
		at, ok := err.(*SessionError) //nolint:errorlint // joined with others it tells more than this failure
		if !ok || at.Op != "dial" && at.Op != "open" {
			return false
		}
		f := failure{at.Op, at.Host, at.Err.Error()}
		repeated := seen[f]
		seen[f] = true
		return repeated
	})
}
