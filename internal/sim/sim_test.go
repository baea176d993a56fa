package sim_test

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/goleak"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// The simulation runs consumers in virtual time against the kit's broker under random faults, and
// judges them by what the broker saw. See simJudge for the invariants, simKinds for the faults and
// simPlan for what a seed decides.
//
//	go test -run 'TestSim$' -seeds 500 ./internal/sim
//	go test -run 'TestSim$' -seed 17 -v ./internal/sim
var (
	simSeed     = flag.Uint64("seed", 0, "simulate this seed only")
	simSeeds    = flag.Int("seeds", 20, "how many seeds to simulate")
	simFirst    = flag.Uint64("first", 1, "the first of the seeds to simulate")
	simVirtual  = flag.Duration("virtual", 10*time.Minute, "how long a seed lasts, in virtual time")
	simKeep     = flag.String("keep", "", "numbers of the faults to keep, of a failure that was shrunk; with -seed")
	simStuck    = flag.Duration("stuck", 30*time.Second, "how long time may stand still before the simulation gives up")
	simMax      = flag.Int("failures", 5, "stop after so many seeds that fail")
	simShow     = flag.Bool("show", false, "print the log lines")
	simProgress = flag.Bool("progress", false, "print each seed before it runs, to see which one crashes")
	simOfWays   = flag.Bool("ways", false, "draw keys, batches, loops, pauses and the like, too, whose invariants (I19 to I27) are not settled yet")
	simGroups   = flag.Bool("groups", false, "leave out the seeds without a Group")
	simShrink   = flag.Bool("shrink", true, "look for fewer faults that make a seed fail")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSim(t *testing.T) {
	next, last := new(atomic.Uint64), *simFirst+uint64(*simSeeds)-1
	next.Store(*simFirst - 1)
	if *simSeed != 0 {
		next.Store(*simSeed - 1)
		last = *simSeed
	}
	failed := new(atomic.Int64)
	for i := range runtime.GOMAXPROCS(0) {
		t.Run("worker="+strconv.Itoa(i), func(t *testing.T) {
			t.Parallel()
			for seed := next.Add(1); seed <= last && failed.Load() < int64(*simMax); seed = next.Add(1) {
				if *simGroups && newSimPlan(seed, *simVirtual).group == nil {
					continue
				}
				if *simProgress {
					fmt.Fprintln(os.Stderr, "sim: seed", seed)
				}
				if !simulate(t, seed) {
					failed.Add(1)
				}
			}
		})
	}
}

// simulate runs one seed and, if it fails, finds out how.
func simulate(t *testing.T, seed uint64) bool {
	keep := parseKeep(t)
	violations := simOnce(t, seed, keep)
	if len(violations) == 0 {
		return true
	}
	if keep == nil {
		for _, f := range newSimPlan(seed, *simVirtual).faults() {
			keep = append(keep, f.number)
		}
	}
	again := 0
	for range 10 {
		if len(simOnce(t, seed, keep)) > 0 {
			again++
		}
	}
	if *simShrink {
		keep, violations = shrink(t, seed, keep, violations)
	}
	plan := newSimPlan(seed, *simVirtual)
	plan.keep(contains(keep))
	t.Errorf("seed %d violates:\n  %s\nfails again in %d of 10 reruns; replay it with\n  go test -run 'TestSim$' -seed %d -virtual %v -keep %s ./internal/sim\n%v",
		seed, strings.Join(violations, "\n  "), again, seed, *simVirtual, formatKeep(keep), plan)
	return false
}

func parseKeep(t *testing.T) []int {
	if *simKeep == "" {
		return nil
	}
	keep := []int{-1} // not nil when there is no fault left
	for s := range strings.SplitSeq(*simKeep, ",") {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal("-keep wants numbers with commas between:", err)
		}
		keep = append(keep, n)
	}
	return keep
}

func formatKeep(keep []int) string {
	s := "-1"
	for _, n := range keep {
		if n >= 0 {
			s += "," + strconv.Itoa(n)
		}
	}
	return s
}

func contains(keep []int) func(int) bool {
	set := make(map[int]bool)
	for _, n := range keep {
		set[n] = true
	}
	return func(n int) bool { return set[n] }
}

// shrink drops one fault after the other while the seed still fails, within a minute.
func shrink(t *testing.T, seed uint64, keep []int, violations []string) ([]int, []string) {
	end := time.Now().Add(time.Minute)
	for i := 0; i < len(keep) && time.Now().Before(end); {
		fewer := append(append([]int{-1}, keep[:i]...), keep[i+1:]...)
		var found []string
		for range 3 {
			if found = simOnce(t, seed, fewer); len(found) > 0 {
				break
			}
		}
		if len(found) == 0 {
			i++
			continue
		}
		keep, violations = fewer[1:], found
	}
	return keep, violations
}

// simOnce runs a seed once, with the faults of keep or with all, and returns what it violates.
func simOnce(t *testing.T, seed uint64, keep []int) (violations []string) {
	plan := newSimPlan(seed, *simVirtual)
	if keep != nil {
		plan.keep(contains(keep))
	}
	s := newSim(plan)
	done := make(chan struct{})
	defer close(done)
	go s.watchStuck(done)
	defer func() {
		if v := recover(); v != nil { // synctest's: blocked goroutines are left
			violations = append(s.judge.violations, fmt.Sprintf("I8 at the end: %v\n%s", v, bubbleStacks("")))
		}
	}()
	synctest.Test(t, func(*testing.T) { s.run() })
	return s.judge.violations
}

// watchStuck is the way out when virtual time stands still: somebody waits for a mutex, or runs in
// circles.
func (s *sim) watchStuck(done <-chan struct{}) {
	last, since := int64(-1), time.Now()
	for {
		select {
		case <-done:
			return
		case <-time.After(time.Second):
		}
		if now := s.progress.Load(); now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) < *simStuck {
			continue
		}
		buf := make([]byte, 8<<20)
		fmt.Fprintf(os.Stderr, "I8: seed %d: time stands still at %v\n%s\n", s.plan.seed, time.Duration(last), buf[:runtime.Stack(buf, true)])
		os.Exit(1)
	}
}

// sim is one run of a seed.
type sim struct {
	plan      *simPlan
	judge     *simJudge
	broker    *steadymqtest.Broker
	consumers []*simConsumer
	group     *simGroup // nil if the consumers are alone
	start     time.Time

	work     sync.WaitGroup // what handlers and faults have started
	runs     sync.WaitGroup
	over     chan struct{} // closed when all shall stop
	progress atomic.Int64
	failed   atomic.Bool
	calm     atomic.Bool
	retries  bool // somebody has a policy

	strikes       simRate
	disturbed     atomic.Int64 // counts faults that began or ended
	active        atomic.Int64 // faults that last
	refused       atomic.Int64 // when the last fault that refuses ended, or will
	flaps         atomic.Int32
	away          atomic.Int32 // faults of a dependency
	strays        [numFuncs]atomic.Int32
	topologyFails atomic.Int32
	password      atomic.Value
	rotation      atomic.Uint64

	// The judge's mutex guards these.
	lastMark  time.Duration     // when the last fault began or ended
	confirmed time.Duration     // until when confirms may be missing
	cut       map[string]simCut // hosts that are cut off
	aims      map[int]string    // the queue that a fault has struck, by its number
	minted    int               // messages so far
	current   map[int]simFault  // faults that have begun and go on, by number
}

// simCut is what a host knows that is cut off.
type simCut int

const (
	cutNot simCut = iota
	cutUnseen
	cutWaiting // that messages wait
)

func newSim(p *simPlan) *sim {
	s := &sim{plan: p, retries: p.retries(), cut: make(map[string]simCut), aims: make(map[int]string), current: make(map[int]simFault)}
	s.refused.Store(-1)
	s.password.Store(simCanary + "/Pa55 w0rd")
	s.judge = newSimJudge(s)
	return s
}

// now is the time since the start.
func (s *sim) now() time.Duration { return time.Since(s.start) }

// queue is the one that a fault strikes, or an empty name that is no queue's.
func (s *sim) queue(f simFault) string {
	if s.plan.queues[f.queue].kind != "named" {
		return s.plan.queues[f.queue].name
	}
	j := s.judge
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, c := range s.consumers {
		if c.plan.queue == f.queue && c.latest != nil {
			return c.latest.record.Queue
		}
	}
	return "none yet"
}

// aim is queue for a fault that lasts, aimed the queue that it has struck then.
func (s *sim) aim(f simFault) string {
	name := s.queue(f)
	s.judge.mu.Lock()
	defer s.judge.mu.Unlock()
	s.aims[f.number] = name
	return name
}

func (s *sim) aimed(f simFault) string {
	s.judge.mu.Lock()
	defer s.judge.mu.Unlock()
	return s.aims[f.number]
}

func (s *sim) deleteQueue(f simFault) {
	s.broker.DeleteQueue(s.queue(f))
	s.judge.mu.Lock()
	defer s.judge.mu.Unlock()
	if stream := s.judge.streams[f.queue]; stream != nil {
		*stream = simStream{unfit: make(map[int]bool)}
	}
}

// run is the whole story of a seed, in its bubble.
func (s *sim) run() {
	s.start = time.Now()
	s.over = make(chan struct{})
	s.broker = steadymqtest.NewBroker(nil, s.brokerOptions()...)
	s.broker.DeclareQueue("dead", steadymqtest.QueueOptions{Type: "classic"})
	s.broker.DeclareQueue("copied", steadymqtest.QueueOptions{Type: "classic"})
	for i, q := range s.plan.queues {
		s.declare(q)
		if q.kind == "stream" {
			s.judge.streams[i] = &simStream{unfit: make(map[int]bool)}
		}
		if q.kind == "named" {
			s.broker.DeclareExchange(q.exchangeName(), q.exchange)
		}
	}
	s.makeConsumers()
	s.chaos()
	s.finale()
	s.stop()
	s.broker.Close()
	s.mend()
	s.work.Wait()
	for _, c := range s.consumers {
		c.idle()
	}
	s.leftovers()
}

// makeConsumers makes the consumers and lets them begin, in a group if the plan has one.
func (s *sim) makeConsumers() {
	if s.plan.group != nil {
		s.group = newSimGroup(s)
		s.runs.Go(s.group.story)
		return
	}
	for i := range s.plan.consumers {
		s.consumers = append(s.consumers, newSimConsumer(s, &s.plan.consumers[i]))
	}
	for _, c := range s.consumers {
		s.runs.Go(c.story)
	}
}

func (s *sim) brokerOptions() []steadymqtest.Option {
	p := s.plan
	o := []steadymqtest.Option{
		steadymqtest.WithHosts(p.hosts),
		steadymqtest.WithLatency(p.latency),
		steadymqtest.WithUser("sim", s.password.Load().(string)),
		steadymqtest.WithHooks(s.judge.hooks()),
		steadymqtest.WithDeadLetterRetry(20 * time.Second),
	}
	if p.tls {
		o = append(o, steadymqtest.WithTLS())
	}
	o = append(o, steadymqtest.WithVersion(p.version[0], p.version[1]))
	if p.hold > 0 {
		form := steadymqtest.Form406
		if p.cancels {
			form = steadymqtest.FormCancel
		}
		o = append(o, steadymqtest.WithConsumerTimeout(p.hold, form))
	}
	return o
}

// args are those of a broker; an old one has no limit unless it is told, and -1 would drop
// everything.
func (q *simQueuePlan) args(old bool) map[string]any {
	if q.own() {
		return map[string]any{}
	}
	args := map[string]any{"x-queue-type": q.kind}
	if q.kind == "quorum" && (q.limit >= 0 || !old) {
		args["x-delivery-limit"] = q.limit
	}
	if q.dead {
		args["x-dead-letter-exchange"] = ""
		args["x-dead-letter-routing-key"] = "dead"
	}
	return args
}

// args are those that the consumer is told: of the limit it knows by itself.
func (c *simConsumer) args() map[string]any {
	q := &c.s.plan.queues[c.plan.queue]
	args := q.args(c.s.plan.old)
	if q.limit < 0 && !q.dead {
		delete(args, "x-delivery-limit")
	}
	return args
}

// declare makes a queue that is not for its consumers to declare.
func (s *sim) declare(q simQueuePlan) {
	if q.theirs || q.own() {
		return
	}
	s.broker.DeclareQueue(q.name, steadymqtest.QueueOptions{Args: q.args(s.plan.old)})
}

// simEvent is something that happens at a time that the plan has set.
type simEvent struct {
	at time.Duration
	do func()
}

// chaos lets everything happen that the plan has in store.
func (s *sim) chaos() {
	events := s.events()
	for s.now() < s.plan.chaos() && !s.failed.Load() {
		next := s.now() + 200*time.Millisecond
		if len(events) > 0 {
			next = min(next, events[0].at)
		}
		s.sleepUntil(next)
		s.judge.tick()
		for len(events) > 0 && events[0].at <= s.now() {
			events[0].do()
			events = events[1:]
		}
	}
}

func (s *sim) sleepUntil(at time.Duration) {
	time.Sleep(at - s.now())
	s.progress.Store(int64(s.now()))
}

func (s *sim) events() []simEvent {
	var events []simEvent
	add := func(at time.Duration, do func()) { events = append(events, simEvent{at, do}) }
	for i := range s.plan.bursts {
		b := &s.plan.bursts[i]
		add(b.at, func() { s.judge.expect(b) })
		for _, f := range b.faults {
			add(f.at, func() { s.begin(f) })
			if f.last > 0 {
				add(f.end(), func() { s.end(f) })
			}
		}
	}
	for _, x := range s.plan.publishes {
		add(x.at, func() { s.publish(x) })
	}
	if g := s.plan.group; g != nil {
		add(g.badUntil, s.mend)
	}
	s.pauseEvents(add)
	sortEvents(events)
	return events
}

func (s *sim) begin(f simFault) {
	s.mark()
	s.strikes.add(s.now(), time.Minute)
	if f.last > 0 {
		s.active.Add(1)
	}
	if f.refuses() {
		s.refused.Store(max(s.refused.Load(), int64(f.end())))
	}
	s.strike(f)
	s.cutOff(f, true)
	if f.last > 0 {
		s.judge.mu.Lock()
		s.current[f.number] = f
		s.judge.mu.Unlock()
	}
}

func (s *sim) end(f simFault) {
	s.mark()
	s.active.Add(-1)
	s.heal(f)
	s.cutOff(f, false)
	s.judge.mu.Lock()
	defer s.judge.mu.Unlock()
	delete(s.current, f.number)
}

// mark notes that a fault begins or ends.
func (s *sim) mark() {
	s.disturbed.Add(1)
	s.judge.mu.Lock()
	defer s.judge.mu.Unlock()
	s.lastMark = s.now()
}

// cutOff notes which hosts are.
func (s *sim) cutOff(f simFault, on bool) {
	if simKinds[f.kind].name != "cut off" {
		return
	}
	s.judge.mu.Lock()
	defer s.judge.mu.Unlock()
	host := s.broker.Host(f.host).Addr()
	switch {
	case !on:
		s.cut[host] = cutNot
	case f.dice%2 == 0:
		s.cut[host] = cutWaiting
	default:
		s.cut[host] = cutUnseen
	}
}

// backlog publishes more than the consumers of a queue take.
func (s *sim) backlog(f simFault) {
	n := 5
	for _, c := range s.plan.users(f.queue) {
		n += c.prefetch
	}
	if !s.plan.queues[f.queue].own() {
		s.publish(simPublish{queue: f.queue, count: n})
	}
}

// publish returns how many messages have reached a queue.
func (s *sim) publish(x simPublish) (routed int) {
	for i := range x.count {
		m := steadymqtest.Message{Body: []byte("work"), Transient: x.transient}
		if x.body > 0 && (i == 0 || x.unfit) {
			m.Body = make([]byte, x.body)
		}
		odd := i % 8 // headers that the driver refuses
		if s.group != nil && s.plan.queues[x.queue].kind == "stream" {
			odd = 0 // it reads for the consumer that looks where a stream ends, and the connection ends for all
		}
		switch odd {
		case 3:
			m.RawHeaders = rig.NestedArrays(40)
		case 6:
			m.RawHeaders = rig.HeaderTable('L', 0, 0, 0, 0, 0, 0, 0, 1)
		}
		if x.unfit && x.body == 0 {
			m.RawHeaders = rig.HeaderTable('?')
		}
		s.specialize(&x, i, &m)
		if s.send(x, m) {
			routed++
		}
	}
	return routed
}

// send publishes a message as its queue wants it, and tells the judge before.
func (s *sim) send(x simPublish, m steadymqtest.Message) (routed bool) {
	q, j := &s.plan.queues[x.queue], s.judge
	j.mu.Lock()
	s.minted++
	m.ID = fmt.Sprint("m", s.minted)
	j.unfit[m.ID] = x.unfit
	j.published(x.queue, m.ID)
	stream := j.streams[x.queue]
	if stream != nil {
		at := len(stream.published)
		j.offsets[m.ID], stream.unfit[at] = at, x.unfit
		stream.published = append(stream.published, time.Now())
	}
	j.mu.Unlock()
	if q.exchange == "" {
		routed = s.broker.PublishMessage(q.name, m) != ""
	} else {
		_, n := s.broker.PublishExchange(q.exchangeName(), simKeyOf(q), m)
		routed = n > 0
	}
	if stream != nil && !routed {
		j.mu.Lock()
		stream.published = stream.published[:len(stream.published)-1]
		j.mu.Unlock()
	}
	return routed
}

// simKeyOf is the key that messages to q have.
func simKeyOf(q *simQueuePlan) string {
	if q.exchange == "topic" {
		return "work.1"
	}
	return "work"
}

// flap ends a session right after its beginning. It is called by a hook.
func (s *sim) flap() {
	kind := s.flaps.Load()
	if kind == 0 {
		return
	}
	time.AfterFunc(time.Duration(kind)*7*time.Millisecond, func() {
		switch kind {
		case 1:
			s.broker.CloseChannels(406, "delivery acknowledgement on channel 1 timed out")
		case 2:
			s.broker.CloseConnections(320, "a fault")
		case 3:
			s.broker.CancelConsumers("")
		}
	})
}

// rotate changes the password for logins to come.
func (s *sim) rotate(f simFault) {
	if s.plan.urlFunc || s.plan.login != loginByURL {
		word := fmt.Sprintf("%s%d", simCanary, f.dice%1000)
		s.broker.SetPassword("sim", word)
		s.password.Store(word)
	}
}

// finale takes all faults back and waits until everything has healed and every message is settled.
func (s *sim) finale() {
	s.broker.Heal()
	s.broker.Restart()
	s.broker.SetLatency(s.plan.latency)
	s.broker.Unblocked()
	s.flaps.Store(0)
	s.topologyFails.Store(0)
	s.away.Store(0)
	for i := range s.strays {
		s.strays[i].Store(0)
	}
	s.mend()
	s.calm.Store(true)
	for _, name := range s.broker.Queues() {
		s.broker.QuorumStall(name, false)
		s.broker.FillQueue(name, false)
	}
	limit := s.now() + 2*time.Minute
	for _, c := range s.consumers {
		limit = max(limit, c.looseBy+2*time.Minute+c.plan.longest+4*c.plan.lag+s.plan.backlog(c.plan)+c.plan.pauses.slack())
	}
	for i, q := range s.plan.queues {
		s.declare(q)
		s.last(i, limit)
	}
	for i := range s.plan.queues {
		s.drained(i, limit)
	}
	s.judge.tick()
}

// last publishes to a queue for the last time, and knows that nothing of it is lost.
func (s *sim) last(i int, limit time.Duration) {
	q := &s.plan.queues[i]
	theirs := q.theirs || q.own() || q.exchange != ""
	if theirs {
		s.until(limit, func() string {
			if c := s.idler(i); c != "" {
				return c + " does not consume"
			}
			return ""
		})
	}
	if n := s.publish(simPublish{queue: i, count: 5}); n < 5 && !s.failed.Load() {
		s.judge.violate("I2", "of 5 messages %d reach the queue %s", n, q.name)
	}
}

// backlog is how long a consumer on a slow path needs for all that is published to its queue.
func (p *simPlan) backlog(c *simConsumerPlan) time.Duration {
	if c.bandwidth == 0 {
		return 0
	}
	bytes := 0
	for _, x := range p.publishes {
		if x.queue == c.queue {
			bytes += x.count * (x.body + 200)
		}
	}
	return time.Duration(bytes) * time.Second / time.Duration(c.bandwidth)
}

// idler is a consumer of the queue that has not been in session since its Run began, "" if there is
// none.
func (s *sim) idler(queue int) string {
	s.judge.mu.Lock()
	defer s.judge.mu.Unlock()
	for _, c := range s.consumers {
		if c.plan.queue == queue && (c.live == 0 || c.state != steadymq.Consuming && c.state != steadymq.Paused) {
			return c.plan.name
		}
	}
	return ""
}

// until waits until nothing is wrong any more, and says what is when the limit has passed.
func (s *sim) until(limit time.Duration, wrong func() string) {
	for !s.failed.Load() {
		what := wrong()
		if what == "" {
			return
		}
		if s.now() > limit {
			s.judge.violate("I2", "after all faults: %s", what)
			return
		}
		s.sleepUntil(s.now() + 3*time.Second)
	}
}

// drained waits until a queue is empty and nothing delivered from it unsettled.
func (s *sim) drained(i int, limit time.Duration) {
	q := &s.plan.queues[i]
	unfit := slices.ContainsFunc(s.plan.publishes, func(x simPublish) bool { return x.queue == i && x.unfit })
	switch {
	case s.failed.Load():
	case s.plan.retryOf(i) != nil:
		s.until(limit+30*time.Minute, func() string { return cmp.Or(s.left(q), s.beside(q)) })
	case q.kind == "stream":
		s.until(limit, func() string { return s.unread(i) })
	case unfit || q.kind == "named":
		s.until(limit, func() string { return s.left(q) })
	default:
		s.settled(q.name, limit)
	}
}

// unread tells of a message of a stream that somebody has not handled.
func (s *sim) unread(queue int) string {
	for _, c := range s.consumers {
		if c.plan.queue != queue {
			continue
		}
		if n := s.judge.behind(c); n >= 0 {
			return fmt.Sprintf("%s has not handled message %d of the stream", c.plan.name, n)
		}
	}
	return ""
}

// left tells of a message that is not settled and can be read.
func (s *sim) left(q *simQueuePlan) string {
	l := s.broker.Ledger()
	s.judge.mu.Lock()
	defer s.judge.mu.Unlock()
	for _, m := range l.Messages {
		waits := m.Fate == steadymqtest.Ready || m.Fate == steadymqtest.Unacked
		if waits && !s.judge.unfit[m.ID] && (m.Queue == q.name || q.kind == "named" && isNamed(m.Queue)) {
			return fmt.Sprintf("a message is left: %+v", m)
		}
	}
	return ""
}

func (s *sim) settled(queue string, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit-s.now())
	defer cancel()
	if err := s.broker.WaitSettled(ctx, queue); err != nil {
		s.judge.violate("I2", "after all faults: %v", err)
	}
	s.progress.Store(int64(s.now()))
}

// stop stops all consumers and checks that nothing is left.
func (s *sim) stop() {
	failed := s.failed.Load()
	s.pauseAtStop()
	close(s.over)
	s.runs.Wait()
	if failed {
		return
	}
	time.Sleep(time.Second)
	if len(s.broker.Connections()) > 0 { // one whose end was lost on the way: the broker buries it after 3 heartbeats
		time.Sleep(30 * time.Second)
	}
	if left := s.broker.Connections(); len(left) > 0 {
		s.judge.violate("I8", "the broker still has connections: %+v", left)
	}
	for _, name := range s.broker.Queues() {
		if isNamed(name) || slices.ContainsFunc(s.plan.queues, func(q simQueuePlan) bool { return q.own() && q.name == name }) {
			s.judge.violate("own", "the queue %s, which lives as long as its connection, is left", name)
		}
	}
	s.judge.conserved(s.broker.Ledger())
	for _, c := range s.consumers {
		c.toldAll()
	}
}

// conserved is I2: nothing is lost.
func (j *simJudge) conserved(l steadymqtest.Ledger) {
	j.mu.Lock() // handlers that were left behind may still be at it
	defer j.mu.Unlock()
	j.counted(&l)
	j.transferred(&l)
	j.ordered(&l)
	queues := make(map[string]*simQueuePlan)
	for i := range j.s.plan.queues {
		queues[j.s.plan.queues[i].name] = &j.s.plan.queues[i]
	}
	for _, m := range l.Messages {
		q := queues[m.Queue]
		if q == nil || q.kind == "stream" {
			continue
		}
		ok := j.unfit[m.ID] && m.Fate == steadymqtest.Ready
		switch m.Fate {
		case steadymqtest.Acked:
			ok = j.acked[m.ID] || j.moved[m.ID]
		case steadymqtest.Discarded, steadymqtest.DeadLettered:
			ok = j.discarded[m.ID] || q.kind == "quorum" && q.limit >= 0 && m.Deliveries > int(q.limit)
		case steadymqtest.Dropped:
			ok = q.purged || j.s.plan.transient(q.name)
		}
		if !ok {
			j.note("I2", "the message ends wrongly: %+v", m)
		}
	}
}

// transient tells whether the queue's messages may be lost when all hosts are killed.
func (p *simPlan) transient(queue string) bool {
	for _, x := range p.publishes {
		if x.transient && p.queues[x.queue].name == queue {
			return true
		}
	}
	return false
}

// leftovers is the last of I8: no goroutine is left.
func (s *sim) leftovers() {
	synctest.Wait()
	buf := make([]byte, 64)
	header := string(buf[:runtime.Stack(buf, false)])
	_, bubble, _ := strings.Cut(header, "synctest bubble ")
	bubble, _, _ = strings.Cut(bubble, "]")
	if left := bubbleStacks("synctest bubble " + bubble + "]"); left != "" {
		s.judge.violate("I8", "goroutines are left:\n%s", left)
	}
}

// bubbleStacks returns the stacks of a bubble's goroutines but those of the test itself.
func bubbleStacks(bubble string) string {
	buf := make([]byte, 1<<20)
	var left []string
	for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		header, _, _ := strings.Cut(stack, "\n")
		if strings.Contains(header, bubble) && strings.Contains(header, "synctest bubble") &&
			!strings.Contains(header, "[synctest.Run") && !strings.Contains(stack, "bubbleStacks") && !strings.Contains(stack, "testingSynctestTest(") {
			left = append(left, stack)
		}
	}
	return strings.Join(left, "\n\n")
}

// simConsumer is one Consumer and the story of its Runs.
type simConsumer struct {
	*simPath
	s        *sim
	plan     *simConsumerPlan
	consumer *steadymq.Consumer
	past     []*steadymq.Consumer // of Runs of a group that are over
	breaks   atomic.Bool          // the middleware, when a handler is made

	// The judge's mutex guards these.
	running, stopping bool
	run               *simRun
	latest            *simSession
	live              int           // consumers that the broker knows
	resumeBy          time.Duration // when it must be consuming
	looseBy           time.Duration // the same, if it were started in the middle of everything
	keep              *simSession   // the session that must last until keepUntil
	keepUntil         time.Duration
	lone              bool // the last fault came alone
	consumes          simRate
	starved           time.Duration // since when it has not been on a host that is cut off while messages wait
	troubles          int
	state             steadymq.State // as the hook says
	clean             bool           // the last Run ended well
	told              map[weak.Pointer[steadymq.Delivery]]bool
	unsure            bool    // a Run has left handlers behind, who tell nothing
	hits              int     // sessions that the bad consumer of the group has cost it, in this Run
	lines             simRate // about copies
	valve             simValve
}

// simPath is how a consumer alone, or all of a group, get connections.
type simPath struct {
	s       *sim
	plan    *simConsumerPlan // whose options of the connection count
	group   *simGroup        // that shares them, nil for a consumer alone
	sockets atomic.Int64
	dialled atomic.Int64        // dials under way
	asks    simRate             // for credentials
	tries   simRate             // to dial
	dials   map[string]*simRate // the dialer's, by address
	dialing sync.Mutex
}

func newSimPath(s *sim, p *simConsumerPlan) *simPath {
	return &simPath{s: s, plan: p, dials: make(map[string]*simRate)}
}

// simRun is one Run.
type simRun struct {
	inFlight int
	byItself bool // nobody has asked it to stop
	sessions int  // that the Consumer says it had: of a consume-ok that is lost on the way it knows nothing
	handled  bool // a handler was called, so there was one, whatever it says
	start    time.Duration
	asked    time.Duration // when its context was cancelled, -1 before
	healthy  bool          // the environment was, at that moment
	session  *simSession   // that was live at that moment
	marks    int64         // sim.disturbed at that moment
	troubles int
	reading  simReading  // of a stream
	trip     atomic.Bool // the next handler is to end its context ...
	stop     func()
	closed   bool          // ... and has
	broken   bool          // a middleware panics
	atOnce   int           // batches
	key      any           // the value of the context that handlers have to see
	alone    bool          // Consumer.Stop ends it, not the Run of the group
	cause    error         // that it had then
	ended    time.Duration // when a consumer of a group said that it had stopped, 0 before
	tag      string        // of the last session that it was told of
	left     bool          // the body has left its loop
	loaded   int           // the place that the store had for it, -1 for none
}

type simRunKey struct{}

func newSimRun() *simRun {
	run := &simRun{asked: -1, loaded: -1}
	run.reading.done, run.reading.acked = make(map[int]bool), make(map[int]bool)
	return run
}

func newSimConsumer(s *sim, p *simConsumerPlan) *simConsumer {
	c := &simConsumer{simPath: newSimPath(s, p), s: s, plan: p}
	c.reset()
	c.told = make(map[weak.Pointer[steadymq.Delivery]]bool)
	first, options := c.access()
	var err error
	c.consumer, err = steadymq.New(first, s.plan.queues[p.queue].queueName(), append(options, c.options()...)...)
	if err != nil {
		panic(err)
	}
	s.judge.canary("a Consumer", c.consumer)
	return c
}

// reset is for a new Consumer.
func (c *simConsumer) reset() {
	c.clean, c.state = true, steadymq.Idle
	c.resetPauses()
}

// access returns the first URL, and the options of the connection.
func (c *simPath) access() (first string, o []steadymq.Option) {
	p := c.plan
	o = []steadymq.Option{
		steadymq.WithConnectionName(p.name),
		steadymq.WithDialer(c.dial),
		steadymq.WithHeartbeat(p.heartbeat),
		steadymq.WithDialTimeout(p.dial),
		steadymq.WithBackoff(p.initial, p.limit),
		steadymq.WithWriteDelay(p.writeDelay),
	}
	if c.s.plan.login != loginByURL {
		o = append(o, steadymq.WithCredentials(c.credentials))
	}
	if c.s.plan.tls {
		o = append(o, steadymq.WithTLSConfig(c.s.broker.TLSConfig()))
	}
	if c.s.plan.urlFunc {
		return "", append(o, steadymq.WithURLFunc(c.nextURL))
	}
	urls := c.s.urls()
	if p.channelMax > 0 {
		for i := range urls {
			urls[i] += fmt.Sprint("?channel_max=", p.channelMax)
		}
	}
	if len(urls) > 1 && !p.balanced {
		o = append(o, steadymq.WithURLs(urls[1:]...))
	}
	return urls[0], o
}

func (c *simConsumer) options() []steadymq.Option {
	p := c.plan
	o := []steadymq.Option{
		steadymq.WithConsumerTag(p.name),
		steadymq.WithPrefetch(p.prefetch),
		steadymq.WithSetupTimeout(p.setup),
		steadymq.WithCloseTimeout(p.shut),
		steadymq.WithDrainTimeout(p.drain),
		steadymq.WithLogger(slog.New(&simLog{c: c})),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: c.changed, HandlerFailed: c.handlerFailed, Settled: c.settled}),
	}
	return append(append(o, c.handlersOptions()...), c.moreOptions()...)
}

func (c *simConsumer) moreOptions() []steadymq.Option {
	o := c.s.plan.options(c.plan)
	if c.plan.middleware {
		o = append(o, steadymq.WithMiddleware(c.wrap))
	}
	if c.plan.handlerTimeout > 0 {
		o = append(o, steadymq.WithHandlerTimeout(c.plan.handlerTimeout))
	}
	q := &c.s.plan.queues[c.plan.queue]
	if c.plan.alone && (!c.plan.declare || q.kind == "classic") { // New refuses it elsewhere
		o = append(o, steadymq.WithExclusive())
	}
	if c.plan.declare {
		o = append(o, steadymq.WithQueue(c.queueOption()))
	}
	if c.plan.topology {
		o = append(o, steadymq.WithTopology(c.topology))
	}
	return o
}

// topology declares the queue, or does what a user's function may do wrong.
func (c *simConsumer) topology(ctx context.Context, ch *amqp.Channel) (string, error) {
	c.s.work.Add(1)
	defer c.s.work.Done()
	switch c.s.topologyFails.Load() {
	case 1:
		return "", errors.New("the topology failed")
	case 2:
		<-ctx.Done()
		return "", ctx.Err()
	case 3:
		panic("the topology panics")
	case 4:
		time.Sleep(c.plan.setup + 2*time.Second)
		return "", errors.New("the topology came too late")
	}
	if err := c.stray(ctx, funcTopology); err != nil {
		return "", err
	}
	if err := c.misbehave(ctx, ch); err != nil {
		return "", err
	}
	q := &c.s.plan.queues[c.plan.queue]
	declared, err := ch.QueueDeclare(q.queueName(), true, false, q.own(), false, q.args(c.s.plan.old))
	if err == nil && q.exchange != "" {
		err = ch.QueueBind(declared.Name, simKeyTo(q), q.exchangeName(), false, nil)
	}
	return declared.Name, err
}

func (s *sim) urls() []string {
	var urls []string
	scheme, user := "amqp", url.UserPassword("sim", s.password.Load().(string))
	if s.plan.login != loginByURL { // the credentials take its place
		user = url.UserPassword("sim", simCanary+"-of-old")
	}
	if s.plan.tls {
		scheme = "amqps"
	}
	for i := range s.plan.hosts {
		u := url.URL{Scheme: scheme, User: user, Host: s.broker.Host(i).Addr(), Path: "/"}
		urls = append(urls, u.String())
	}
	return urls
}

func (s *sim) consumerOf(tag string) *simConsumer {
	for _, c := range s.consumers {
		if strings.HasPrefix(tag, c.plan.name+"-") {
			return c
		}
	}
	return nil
}

// simRate counts what happened within some time.
type simRate struct {
	mu    sync.Mutex
	times []time.Duration
}

// add counts one more at now and returns how many there were within the window.
func (r *simRate) add(now, window time.Duration) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.times = append(r.times, now)
	return r.since(now - window)
}

func (r *simRate) recent(now, window time.Duration) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.since(now - window)
}

func (r *simRate) since(from time.Duration) int {
	for len(r.times) > 0 && r.times[0] < from {
		r.times = r.times[1:]
	}
	return len(r.times)
}

func (r *simRate) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.times)
}

// connects is how often a minute may see a connect to one host: the mean of full jitter is half the
// limit; a third more for chance, and 40 for the way there.
func (p *simConsumerPlan) connects() int {
	n := max(40, int(2*time.Minute/p.limit)*4/3)
	if p.stall > 0 {
		n += 30 // the detector asks other hosts, and replaces sessions
	}
	return n
}

// dial counts dials, I7, and sockets, I8.
func (c *simPath) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c.s.work.Add(1)
	defer c.s.work.Done()
	c.tries.add(c.s.now(), time.Minute)
	if err := c.stray(ctx, funcDial); err != nil {
		return nil, err
	}
	if c.plan.balanced {
		address = c.s.broker.Host(int(c.s.rotation.Add(1) % uint64(c.s.plan.hosts))).Addr()
	}
	c.dialing.Lock()
	all, made := c.dials[address], c.dials["made "+address]
	if all == nil {
		all, made = new(simRate), new(simRate)
		c.dials[address], c.dials["made "+address] = all, made
	}
	c.dialing.Unlock()
	faults, most := 10*c.s.strikes.recent(c.s.now(), time.Minute), c.connections()
	if n := all.add(c.s.now(), time.Minute); n > most*(180+faults) {
		c.s.judge.violate("I7", "%s dialled %s %d times within a minute", c.plan.name, address, n)
		pause(ctx)
	}
	conn, err := c.reach(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if n := made.add(c.s.now(), time.Minute); n > most*(c.plan.connects()+faults) {
		c.s.judge.violate("I7", "%s connected to %s %d times within a minute", c.plan.name, address, n)
		pause(ctx)
	}
	c.sockets.Add(1)
	return &simConn{Conn: conn, c: c}, nil
}

// pause lets time go on for one who dials in a hot loop.
func pause(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	<-ctx.Done()
}

type simConn struct {
	net.Conn
	c    *simPath
	once sync.Once
}

// Read takes its time on a slow path.
func (s *simConn) Read(p []byte) (int, error) {
	pace := s.c.plan.bandwidth
	if pace == 0 {
		return s.Conn.Read(p)
	}
	n, err := s.Conn.Read(p[:min(len(p), 4096)])
	time.Sleep(time.Duration(n) * time.Second / time.Duration(pace))
	return n, err
}

func (s *simConn) Close() error {
	s.once.Do(func() { s.c.sockets.Add(-1) })
	return s.Conn.Close()
}

// simLog looks at log lines: no password, none after Run.
type simLog struct{ c *simConsumer }

func (l *simLog) Enabled(context.Context, slog.Level) bool { return true }
func (l *simLog) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *simLog) WithGroup(string) slog.Handler            { return l }

func (l *simLog) Handle(_ context.Context, r slog.Record) error {
	l.c.callback("a log line: " + r.Message)
	l.c.retryLine(r.Message)
	if *simShow {
		printRecord(l.c.s.now(), l.c.plan.name, r)
	}
	r.Attrs(func(a slog.Attr) bool {
		l.c.s.judge.canary("a log line", a)
		return true
	})
	return nil
}

// printRecord shows what happens when a seed is replayed.
func printRecord(at time.Duration, of string, r slog.Record) {
	line := fmt.Sprintf("%v %s %s", at, of, r.Message)
	r.Attrs(func(a slog.Attr) bool {
		if a.Key != "stack" {
			line += " " + a.String()
		}
		return true
	})
	fmt.Fprintln(os.Stderr, line)
}

// callback is I9: nothing is told after Run.
func (c *simConsumer) callback(what string) {
	j := c.s.judge
	j.mu.Lock()
	defer j.mu.Unlock()
	if !c.running {
		j.note("I9", "%s of %s after Run had returned", what, c.plan.name)
	}
}

func (c *simConsumer) handlerFailed(d *steadymq.Delivery, err error) {
	c.callback("HandlerFailed")
	c.s.judge.canary("HandlerFailed", err)
}

// settled is I9: each delivery is told once, with its last outcome.
func (c *simConsumer) settled(d *steadymq.Delivery, o steadymq.Outcome) {
	c.callback("Settled")
	j := c.s.judge
	j.mu.Lock()
	defer j.mu.Unlock()
	before := c.told[weak.Make(d)] // weak, or the bodies of all deliveries would pile up
	if before || o == steadymq.Unsettled || o != d.Outcome() {
		j.note("I9", "told again (%v), or not the outcome %v: %v of %s", before, d.Outcome(), o, c.plan.name)
	}
	c.told[weak.Make(d)] = true
}

// lagging tells that its path is so slow that an answer may stand behind more than a limit.
func (c *simConsumer) lagging() bool { return c.plan.lag > c.plan.drain || c.plan.lag > c.plan.setup/2 }

// idle is the last of I9: nothing is counted that is over.
func (c *simConsumer) idle() {
	n := c.stats()
	c.noneKept(n)
	if n.Handling != 0 || n.Held != 0 || n.Overdue != 0 {
		c.s.judge.violate("I9", "%s still counts %+v", c.plan.name, n)
	}
}

// toldAll is I9: no settled delivery is missing.
func (c *simConsumer) toldAll() {
	j := c.s.judge
	j.mu.Lock()
	defer j.mu.Unlock()
	n := c.stats()
	c.tally(&n)
	settled := n.Acked + n.Requeued + n.Discarded + n.Parked + n.Delayed + n.Stale
	if told := uint64(len(c.told)); told > settled || told < settled && !c.unsure {
		j.note("I9", "%d outcomes of %s were told, %d deliveries are settled", told, c.plan.name, settled)
	}
}

// changed checks that the states follow each other as they may.
func (c *simConsumer) changed(x steadymq.StateChange) {
	c.callback("StateChanged")
	j := c.s.judge
	j.canary("StateChanged", x)
	if x.Cause != nil {
		j.canary("StateChanged", x.Cause)
		j.stalled(c, x.Cause)
	}
	var at *steadymq.SessionError
	switch {
	case x.From != c.state:
		j.violate("I9", "a change from %v after one to %v", x.From, c.state)
	case x.To == steadymq.Backoff && (!errors.As(x.Cause, &at) || at.Err == nil):
		j.violate("I9", "backoff with the cause %v", x.Cause)
	case x.To == steadymq.Consuming && x.From != steadymq.Connecting && x.From != steadymq.Paused:
		j.violate("I9", "from %v to consuming", x.From)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	c.state = x.To
	c.changedInGroup(x)
	if c.entered(x) {
		c.run.sessions++
		if session := j.byTag[x.ConsumerTag]; session != nil {
			j.begins(c.run, session)
		}
	}
}

// story runs the Consumer as often as the plan says.
func (c *simConsumer) story() {
	for i, w := range c.plan.runs {
		if !c.sleepUntil(w.start) {
			return
		}
		last := i == len(c.plan.runs)-1
		for c.once(&w, last) {
			w.broken = false
			if !c.sleepUntil(c.s.now() + time.Second) {
				return
			}
		}
	}
}

// sleepUntil reports whether that time comes before the end of everything.
func (c *simConsumer) sleepUntil(at time.Duration) bool {
	timer := time.NewTimer(at - c.s.now())
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-c.s.over:
		return false
	}
}

// once calls Run and has it stopped; it reports whether Run gave up before.
func (c *simConsumer) once(w *simWindow, last bool) (again bool) {
	run := newSimRun()
	run.start, run.broken, run.key = c.s.now(), w.broken, run
	c.breaks.Store(w.broken)
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), simRunKey{}, run))
	defer cancel()
	run.stop = sync.OnceFunc(func() {
		c.ask(run)
		cancel()
	})
	c.begin(run)
	done := make(chan struct{})
	timer := time.NewTimer(w.stop - c.s.now())
	if last {
		timer.Stop()
	}
	c.s.work.Go(func() {
		select {
		case <-timer.C:
			if w.byHandler && !c.tripped(run, ctx) {
				return
			}
		case <-c.s.over:
		case <-done:
			return
		}
		run.stop()
	})
	err := c.take(ctx, run)
	c.returned(run, err)
	close(done)
	return ctx.Err() == nil
}

// tripped waits a while for a handler that ends the context of its Run, and tells whether none has.
func (c *simConsumer) tripped(run *simRun, ctx context.Context) bool {
	run.trip.Store(true)
	timer := time.NewTimer(5 * time.Second)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-c.s.over:
		return true
	case <-ctx.Done():
		return false
	}
}

func (c *simConsumer) begin(run *simRun) {
	j := c.s.judge
	j.mu.Lock()
	defer j.mu.Unlock()
	c.run, c.running, c.stopping, c.keep, c.hits = run, true, false, nil, 0
	c.resumeBy = max(run.start+c.s.plan.fast(c.plan), c.looseBy)
	if c.s.active.Load() > 0 {
		c.resumeBy = max(c.resumeBy, c.looseBy, run.start+c.s.plan.fast(c.plan))
	}
	if c.s.plan.owns(c.plan) && !c.clean {
		c.resumeBy += 3*c.plan.heartbeat + 2*time.Second
	}
	c.valve.trying = nil
	c.beginInGroup(run)
}

// trouble notes a loss of the session that no fault has caused.
func (c *simConsumer) trouble(now time.Duration) {
	c.troubles++
	c.resumeBy = max(c.resumeBy, now+2*(c.plan.limit+c.plan.slowest())+time.Second+c.plan.inTurn())
	c.keep = nil
}

// healthy tells whether the session has proved itself, so that its loss is followed by a retry at
// once.
func (c *simConsumer) healthy(now time.Duration) bool {
	x := c.latest
	return x != nil && c.live > 0 && x.record.Ended.IsZero() && !x.settled.IsZero() &&
		c.s.start.Add(now).Sub(x.record.Started) > 10*time.Second+c.s.plan.connect()
}

// ask is called right before Run's context is cancelled.
func (c *simConsumer) ask(run *simRun) {
	j := c.s.judge
	j.mu.Lock()
	defer j.mu.Unlock()
	if run.left {
		return
	}
	now := c.s.now()
	run.asked, c.stopping = now, true
	run.marks, run.troubles = c.s.disturbed.Load(), c.troubles
	run.healthy = c.s.plan.hold == 0 && now >= c.resumeBy && now >= run.start+c.s.plan.fast(c.plan) && !c.lagging() && c.s.active.Load() == 0 && c.live > 0
	run.healthy = run.healthy && (c.plan.retry == nil || now >= c.s.confirmed)
	if run.healthy {
		run.session = c.latest
	}
}

// returned judges what Run returned, and when.
func (c *simConsumer) returned(run *simRun, err error) {
	sockets := c.sockets.Load()
	now := c.s.now()
	j := c.s.judge
	j.mu.Lock()
	c.running, c.stopping = false, false
	if sockets != 0 && c.group == nil {
		j.note("I8", "%s has %d sockets open after Run had returned %v", c.plan.name, sockets, err)
	}
	inFlight := run.inFlight
	j.mu.Unlock()
	j.canary("Run's error", err)
	time.Sleep(time.Nanosecond) // the broker's hooks are done then
	j.mu.Lock()
	defer j.mu.Unlock()
	if c.group != nil && run.ended > 0 { // the others may have taken longer
		now = run.ended
	}
	c.clean = err == nil
	switch {
	case run.broken:
		c.brokenRun(run, err, now)
		return
	case run.asked < 0:
		c.gaveUp(run, err, now)
		return
	}
	c.stopped(run, err, now-run.asked, inFlight)
}

// gaveUp is a Run that ended by itself: only before its first session, and only when the broker has
// refused.
func (c *simConsumer) gaveUp(run *simRun, err error, now time.Duration) {
	var at *steadymq.SessionError
	refused := time.Duration(c.s.refused.Load()) >= run.start
	if run.sessions > 0 || run.handled || !refused || c.plan.never || !errors.As(err, &at) {
		c.s.judge.note("I4", "Run of %s gave up after %d sessions: %v", c.plan.name, run.sessions, err)
	}
	var said *amqp.Error
	if errors.As(err, &said) && (said.Code == amqp.NotFound || said.Code == amqp.ResourceLocked) {
		c.s.judge.note("I4", "Run of %s gave up for what passes: %v", c.plan.name, err)
	}
}

// stopped is I8 and I5 for a Run that was asked to stop.
func (c *simConsumer) stopped(run *simRun, err error, took time.Duration, inFlight int) {
	j, p := c.s.judge, c.plan
	if took > p.drain+p.shut+time.Second {
		j.note("I8", "%s took %v to stop, the limits are %v and %v", p.name, took, p.drain, p.shut)
	}
	j.waitedFor(c, run, err, took)
	var drain *steadymq.DrainError
	switch {
	case errors.As(err, &drain):
		if took < p.drain {
			j.note("I8", "%s gave its handlers only %v to finish: %v", p.name, took, err)
		}
	case inFlight > 0: // also when it says that the session was lost
		j.note("I8", "%s returned %v with %d handlers running", p.name, err, inFlight)
	}
	c.unsure = c.unsure || drain != nil
	x := run.session
	undisturbed := run.healthy && run.marks == c.s.disturbed.Load() && run.troubles == c.troubles
	if undisturbed && err != nil && drain == nil {
		j.note("I8", "%s did not stop cleanly on a healthy path: %v", p.name, err)
	}
	if undisturbed && x.record.Cause != "cancelled by the client" {
		j.note("I5", "%s was stopped, its consumer ended by %q", p.name, x.record.Cause)
	}
	if x == nil && c.latest != nil && c.latest.run == run { // also under faults nil says that all is well
		x = c.latest
	}
	if x != nil && !x.record.Ended.IsZero() && x.record.Ended.Before(c.s.start.Add(run.asked)) {
		return // it had moved before, and its connection may have been lost since then
	}
	if x != nil && !strings.HasSuffix(x.record.Tag, fmt.Sprint("-", run.sessions)) {
		return // the stop came in the middle of its set-up
	}
	if err == nil && x != nil && x.record.Cause == "cancelled by the client" && j.unsettled(x) > 0 && c.s.judge.streamOf(c) == nil {
		j.note("I5", "%s stopped cleanly, but %d of its deliveries were not settled", p.name, j.unsettled(x))
	}
}
