package steadymq

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

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
	handlers  map[*Consumer]work
	run       *groupRun // nil before Run
	ended     bool      // Run takes no more consumers
}

// groupRun is the Run of a Group. Its fields do not change, but for errs.
type groupRun struct {
	ctx         context.Context
	end         context.CancelFunc
	connections *connections
	publisher   *publisher
	fault       atomic.Pointer[faultError] // the first panic of the log handler in a line about a connection
	running     sync.WaitGroup             // the consumers' goroutines; added to under the mutex of the group
	errs        []error                    // of consumers; guarded by the mutex of the group
}

// NewGroup checks url and options and returns a [Group]. It dials nothing. The options hold for all
// consumers, unless [Group.Handle] is given others for one of them; those of the connection belong
// to the group alone: URL, login, TLS, name, dialer, the limit of a dial, heartbeat, write delay,
// back-off. The error joins one [*OptionError] per problem, as that of [New], which also says what
// url is.
//
// Functions in options serve all consumers: they are called by several goroutines at once, hooks
// and [WithFatal] included, which are called one at a time for each consumer only. A [Middleware]
// is called once for each consumer.
func NewGroup(url string, opts ...Option) (*Group, error) {
	c, err := buildGroup(url, opts)
	if err != nil {
		return nil, err
	}
	return &Group{config: c, stats: new(counters), handlers: make(map[*Consumer]work)}, nil
}

// Handle adds a consumer of queue to the group and returns it. It dials nothing and does not block.
// Before [Group.Run] the consumer waits for that; during Run it starts at once. A queue that is
// added again gets one more consumer. queue and opts are those of [New]. An option takes the place
// of the group's, [WithHooks] with all its hooks; only [WithMiddleware] adds up, inside the
// group's.
//
// The error joins one [*OptionError] per problem, with the name of the queue: nil handlers, options
// of the connection, whatever New refuses, and every call once Run has begun to end.
//
// [Consumer.Stop] of the consumer ends it alone. Its Run is refused: the group runs it.
func (g *Group) Handle(queue string, h Handler, opts ...Option) (*Consumer, error) {
	config, err := buildMember(g.config, queue, false, opts)
	return g.add(queue, work{handler: h, config: config}, err)
}

// HandleBatch is [Group.Handle] with a handler that takes several deliveries at once, see
// [BatchHandler]; [WithBatch], of the group or of the consumer, says how many.
func (g *Group) HandleBatch(queue string, h BatchHandler, opts ...Option) (*Consumer, error) {
	config, err := buildMember(g.config, queue, true, opts)
	return g.add(queue, work{batch: h, config: config}, err)
}

// add adds a consumer whose configuration has the problems err.
func (g *Group) add(queue string, w work, err error) (*Consumer, error) {
	by := w.config.by
	if w.handler == nil && w.batch == nil {
		err = errors.Join(err, named(&OptionError{by, "the handler must not be nil"}, queue))
	}
	if err != nil {
		return nil, err
	}
	c := &Consumer{config: w.config, stats: new(counters), valve: newValve(w.config), grouped: true}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended {
		return nil, named(&OptionError{by, "the group's Run has ended; make another group with NewGroup"}, queue)
	}
	if err := refuseSharedPlace(g.consumers, w.config); err != nil {
		return nil, err
	}
	g.consumers = append(g.consumers, c)
	g.handlers[c] = w
	if g.run != nil {
		g.start(c, g.run.connections.join())
	}
	return c, nil
}

// refuseSharedPlace refuses a second consumer of a Group that keeps the same place.
func refuseSharedPlace(all []*Consumer, c *config) error {
	for _, other := range all {
		if c.sharesPlace(other.config) {
			return named(&OptionError{"WithStreamOffsets", "another consumer of the group keeps the place of this stream in the same store; of two, the faster one would take the other's messages for handled: give each a store of its own, or one that adds a name to the key"}, c.queue)
		}
	}
	return nil
}

// Run runs all consumers of the group until ctx ends. It blocks. When ctx ends all drain side by
// side, each within its limit of [WithDrainTimeout], and the connections close after them; then Run
// returns nil. A group without consumers waits for [Group.Handle]. A group runs once.
//
// Run ends earlier, after it has drained all, if the Run of one consumer ends with an error: its
// set-up is refused for good before its first session, the login is before the first session of
// all, [WithFatal] says so, or a hook has panicked; see [Consumer.Run]. The error joins those of
// all consumers, each with the name of its queue, except of consumers that [Consumer.Stop] has
// ended. A failure of a connection is told once, without a queue. A panic of the log handler ends
// Run, too.
//
// It is an [*OptionError] if ctx is nil, and wraps [ErrRunning] if Run was called before.
func (g *Group) Run(ctx context.Context) error {
	if ctx == nil {
		return &OptionError{"Run", "the context must not be nil"}
	}
	run, err := g.begin(ctx)
	if err != nil {
		return err
	}
	<-run.ctx.Done()
	g.mu.Lock()
	g.ended = true
	g.mu.Unlock()
	run.running.Wait()
	run.publisher.end()
	run.connections.await(g.config.closeTimeout)
	run.end()
	run.connections.stopTelling()
	errs := toldOnce(run.errs)
	if fault := run.fault.Load(); fault != nil {
		errs = append(errs, fault)
	}
	return errtext.Join(errs...)
}

func (g *Group) begin(ctx context.Context) (*groupRun, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.run != nil {
		return nil, errRanBefore{}
	}
	ctx, end := context.WithCancel(ctx)
	run := &groupRun{ctx: ctx, end: end, connections: newConnections(g.config, g.stats)}
	quiet := *g.config
	quiet.hooks = Hooks{} // they are told of consumers
	run.publisher = newPublisher(run.connections)
	run.connections.report = func() *reporter {
		r := newReporter(ctx, &quiet, &g.stats.eventsDropped)
		r.fault, r.faulted = &run.fault, end
		return r
	}
	g.run = run
	borrowers := make([]*borrower, len(g.consumers))
	for i := range borrowers { // all of them before the first line tells how many they are
		borrowers[i] = run.connections.join()
	}
	for i, c := range g.consumers {
		g.start(c, borrowers[i])
	}
	return run, nil
}

// errRanBefore is [ErrRunning] in the words of a Group.
type errRanBefore struct{}

func (errRanBefore) Error() string {
	return "steadymq: this Group runs already or has run; make another group with NewGroup"
}

func (errRanBefore) Unwrap() error { return ErrRunning }

// start runs c on a goroutine of its own. It is called with mu held.
func (g *Group) start(c *Consumer, b *borrower) {
	run, w := g.run, g.handlers[c]
	run.running.Go(func() { g.left(c, c.run(run.ctx, w, b, run.publisher)) })
}

// left takes the result of a consumer's Run.
func (g *Group) left(c *Consumer, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.stopped.Load() {
		delete(g.handlers, c)
		g.consumers = slices.DeleteFunc(g.consumers, func(other *Consumer) bool { return other == c })
		return
	}
	if err != nil {
		g.run.errs = append(g.run.errs, ofConsumer(err, c.config))
		g.run.end()
	}
}

// Consumers returns the consumers of the group, in the order of [Group.Handle], but for those that
// [Consumer.Stop] has ended.
func (g *Group) Consumers() []*Consumer {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(g.consumers), func(c *Consumer) bool { return g.run == nil && c.stopped.Load() })
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
	// EventsDropped counts lines of the log about connections that were not told, because the
	// logger was too slow.
	EventsDropped uint64
}

// Stats returns the counters of what the consumers share. Those of each consumer are in its own
// [Consumer.Stats].
func (g *Group) Stats() GroupStats {
	s := GroupStats{
		Connections:   g.stats.connections.Load(),
		Dials:         g.stats.dials.Load(),
		Abandoned:     g.stats.abandoned.Load(),
		EventsDropped: g.stats.eventsDropped.Load(),
	}
	g.mu.Lock()
	run := g.run
	g.mu.Unlock()
	if run != nil {
		s.Open, s.Isolated = run.connections.count()
	}
	return s
}

// ofConsumer returns err with the queue that it is about. Where the queue has no name of the
// user's, the consumer tag has to do.
func ofConsumer(err error, c *config) error {
	if c.queue == "" && !errors.As(err, new(*SessionError)) {
		return fmt.Errorf("consumer %s: %w", c.tagPrefix, err)
	}
	return named(err, c.queue)
}

// toldOnce leaves out what repeats an earlier failure of the same connection. Such a failure is
// about no queue, whichever consumer was told of it first.
func toldOnce(errs []error) []error {
	type failure struct{ op, host, reason string }
	seen := make(map[failure]bool)
	var told []error
	for _, err := range errs {
		if at, ok := err.(*SessionError); ok && (at.Op == "dial" || at.Op == "open") { //nolint:errorlint // joined with others it tells more than this failure
			f := failure{at.Op, at.Host, at.Err.Error()}
			if seen[f] {
				continue
			}
			seen[f] = true
			common := *at
			common.Queue = ""
			err = &common
		}
		told = append(told, err)
	}
	return told
}
