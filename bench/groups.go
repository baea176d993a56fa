package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/steadymq/steadymq/bench/internal/replay"
)

// What many consumers on few connections cost: their throughput, what one that
// idles adds, how soon a thousand consume, and what a fast one does to a slow
// one on the same connection.

// groups is what that part of the benchmark found.
type groups struct {
	throughput []comparison
	further    []furtherRow
	herds      []herdRow
	beside     []besideRow
}

func (g groups) empty() bool {
	return len(g.throughput)+len(g.further)+len(g.herds)+len(g.beside) == 0
}

// groupPrefetch is that of each consumer. The further ones of a thousand have
// 64,000 messages under way together.
const groupPrefetch = 64

func benchGroups(ctx context.Context, o options, server *replay.Process) (g groups, err error) {
	if len(o.consumers) == 0 || o.amqp != "" {
		return g, nil
	}
	most := slices.Max(o.consumers)
	r := replayRunner(o, groupVariants, server)
	for _, n := range o.consumers {
		c, err := r.compare(ctx, workload{Prefetch: groupPrefetch, Body: 100, Workers: 1, Consumers: n})
		if err != nil {
			return g, err
		}
		g.throughput = append(g.throughput, c)
	}
	if g.further, err = benchFurther(ctx, o, server, most); err != nil {
		return g, err
	}
	if g.herds, err = benchHerds(ctx, o, server, most); err != nil {
		return g, err
	}
	g.beside, err = benchBeside(ctx, o, server)
	return g, err
}

// ---- what an idle one adds ----

// crowd is consumers that come one after the other, on one connection.
type crowd interface {
	// add adds n consumers of a queue and returns when all of them consume.
	add(ctx context.Context, queue string, n int) error
	close()
}

type crowdVariant struct {
	name, label string
	open        func(url string, each func([]byte)) (crowd, error)
}

var crowds = []crowdVariant{
	{name: "channels", label: "amqp091-go, a channel each", open: openDriverCrowd},
	{name: "group", label: "steadymq, of a Group", open: openGroupCrowd},
}

func findCrowd(name string) crowdVariant {
	return crowds[slices.IndexFunc(crowds, func(c crowdVariant) bool { return c.name == name })]
}

// furtherConfig tells a client process to add consumers to one that consumes.
type furtherConfig struct {
	Variant, Control string
	Further          int
}

// furtherCost is per further consumer, but for the time until all of them consume.
type furtherCost struct {
	Bytes, Goroutines float64
	Took              time.Duration
}

type furtherRow struct {
	crowd   crowdVariant
	further int
	cost    furtherCost // medians
}

func benchFurther(ctx context.Context, o options, server *replay.Process, n int) (rows []furtherRow, err error) {
	costs := make([][]furtherCost, len(crowds))
	for range furtherRounds(o) {
		for i, v := range crowds {
			var cost furtherCost
			if err := reexec(ctx, "further", furtherConfig{Variant: v.name, Control: server.Control, Further: n}, &cost); err != nil {
				return nil, fmt.Errorf("a further one, %s: %w", v.name, err)
			}
			logf("a further one, %-9s %6.0f bytes, %.1f goroutines, %d consume after %v", v.name, cost.Bytes, cost.Goroutines, n, cost.Took)
			costs[i] = append(costs[i], cost)
		}
	}
	for i, v := range crowds {
		rows = append(rows, furtherRow{crowd: v, further: n, cost: medianCost(costs[i])})
	}
	return rows, nil
}

func furtherRounds(o options) int { return min(3, o.rounds) }

func medianCost(costs []furtherCost) (m furtherCost) {
	of := func(f func(furtherCost) float64) float64 {
		var vs []float64
		for _, c := range costs {
			vs = append(vs, f(c))
		}
		return median(vs)
	}
	m.Bytes = of(func(c furtherCost) float64 { return c.Bytes })
	m.Goroutines = of(func(c furtherCost) float64 { return c.Goroutines })
	m.Took = time.Duration(of(func(c furtherCost) float64 { return float64(c.Took) }))
	return m
}

func (c furtherConfig) measure() (cost furtherCost, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	control, addr, done, err := openServer(c.Control)
	if err != nil {
		return cost, err
	}
	defer done()
	if err := control.Stop(addr); err != nil { // no message ever: they idle
		return cost, err
	}
	all, err := findCrowd(c.Variant).open("amqp://guest:guest@"+addr, func([]byte) {})
	if err != nil {
		return cost, err
	}
	defer all.close()
	if err := all.add(ctx, "size=100", 1); err != nil {
		return cost, err
	}
	before := atRest()
	began := time.Now()
	if err := all.add(ctx, "size=100", c.Further); err != nil {
		return cost, err
	}
	cost.Took = time.Since(began)
	more := atRest().each(before, c.Further)
	cost.Bytes, cost.Goroutines = more.Heap+more.Stacks, more.Goroutines
	return cost, nil
}

// openServer opens a fresh replay server. done forgets it.
func openServer(at string) (control *replay.Control, addr string, done func(), err error) {
	if control, err = replay.Dial(at); err != nil {
		return nil, "", nil, err
	}
	if addr, err = control.Open(false); err != nil {
		_ = control.Close()
		return nil, "", nil, err
	}
	return control, addr, func() {
		_ = control.CloseServer(addr)
		_ = control.Close()
	}, nil
}

// atRest is the footprint of a process whose last set-up is over.
func atRest() footprint {
	time.Sleep(300 * time.Millisecond)
	return takeFootprint()
}

// ---- a herd ----

// herdConfig tells a client process to lose all its consumers at once.
type herdConfig struct {
	Control     string
	Consumers   int
	Connections int // of the group; 0: each consumer has its own, without a group
}

type herdRow struct {
	label string
	took  []time.Duration // until all consume, of each round
}

func benchHerds(ctx context.Context, o options, server *replay.Process, n int) ([]herdRow, error) {
	kinds := []herdConfig{{Connections: 1}, {Connections: 10}, {Connections: 0}}
	rows := make([]herdRow, len(kinds))
	for range max(1, o.samples/10) {
		for i, c := range kinds {
			c.Control, c.Consumers = server.Control, n
			var took time.Duration
			if err := reexec(ctx, "herd", c, &took); err != nil {
				return nil, fmt.Errorf("herd, %s: %w", c, err)
			}
			logf("herd of %s: all consume after %v", c, took)
			rows[i].label = c.String()
			rows[i].took = append(rows[i].took, took)
		}
	}
	return rows, nil
}

func (c herdConfig) String() string {
	if c.Connections == 0 {
		return fmt.Sprintf("%s with a connection each", count(c.Consumers, "Consumer"))
	}
	return fmt.Sprintf("a Group of %s on %s", count(c.Consumers, "consumer"), count(c.Connections, "connection"))
}

func (c herdConfig) measure() (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	control, addr, done, err := openServer(c.Control)
	if err != nil {
		return 0, err
	}
	defer done()
	all, err := openHerd("amqp://guest:guest@"+addr, c.Connections)
	if err != nil {
		return 0, err
	}
	defer all.close()
	if err := all.add(ctx, "size=100,every=1h", c.Consumers); err != nil {
		return 0, err
	}
	again := all.arrivals().more(c.Consumers)
	if err := control.Fault(addr, replay.FaultRestart, outage); err != nil {
		return 0, err
	}
	since := time.Now() // nobody can be back before the server is
	at, err := again.wait(ctx)
	return max(0, at.Sub(since)), err
}

// arrivals counts how often a consumer has begun to consume.
type arrivals struct {
	mu    sync.Mutex
	count int
	goal  *goal
}

// goal is a number of arrivals that somebody waits for.
type goal struct {
	at   int
	done chan time.Time
}

func (a *arrivals) one() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.count++; a.goal != nil && a.count == a.goal.at {
		a.goal.done <- time.Now()
	}
}

// more is to be reached by n more arrivals.
func (a *arrivals) more(n int) *goal {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.goal = &goal{at: a.count + n, done: make(chan time.Time, 1)}
	return a.goal
}

func (g *goal) wait(ctx context.Context) (time.Time, error) {
	select {
	case at := <-g.done:
		return at, nil
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	}
}

// ---- a slow one beside a fast one ----

// besideConfig tells a client process to take the latency of a consumer that
// gets a message every 10 ms, alone on its connection or beside one that gets
// as many as it can.
type besideConfig struct {
	Variant, Control string
	Fast             bool
	Window           time.Duration
}

type besideRow struct {
	crowd         crowdVariant
	alone, beside []time.Duration // sorted
}

func benchBeside(ctx context.Context, o options, server *replay.Process) ([]besideRow, error) {
	var rows []besideRow
	for _, v := range crowds {
		rows = append(rows, besideRow{crowd: v})
	}
	for range o.rounds {
		for i := range rows {
			for _, fast := range []bool{false, true} {
				var took []time.Duration
				c := besideConfig{Variant: rows[i].crowd.name, Control: server.Control, Fast: fast, Window: 2 * o.window}
				if err := reexec(ctx, "beside", c, &took); err != nil {
					return nil, fmt.Errorf("a slow one, %s: %w", c.Variant, err)
				}
				if fast {
					rows[i].beside = append(rows[i].beside, took...)
				} else {
					rows[i].alone = append(rows[i].alone, took...)
				}
			}
		}
	}
	for _, r := range rows {
		slices.Sort(r.alone)
		slices.Sort(r.beside)
		logf("a slow one, %-9s alone p50 %v p99 %v, beside a fast one p50 %v p99 %v", r.crowd.name,
			at(r.alone, 0.5), at(r.alone, 0.99), at(r.beside, 0.5), at(r.beside, 0.99))
	}
	return rows, nil
}

// at is a quantile of what is sorted.
func at(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[int(q*float64(len(sorted)-1)+0.5)]
}

func (c besideConfig) measure() ([]time.Duration, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	_, addr, done, err := openServer(c.Control)
	if err != nil {
		return nil, err
	}
	defer done()
	var times latencies
	all, err := findCrowd(c.Variant).open("amqp://guest:guest@"+addr, times.each)
	if err != nil {
		return nil, err
	}
	defer all.close()
	if c.Fast {
		if err := all.add(ctx, "size=100", 1); err != nil {
			return nil, err
		}
	}
	if err := all.add(ctx, "size=101,every=10ms", 1); err != nil {
		return nil, err
	}
	time.Sleep(200 * time.Millisecond) // both are under way
	times.begin()
	time.Sleep(c.Window)
	return times.end(), nil
}

// latencies takes those of the slow consumer, whose bodies are one byte longer
// and carry the time they were sent at.
type latencies struct {
	mu      sync.Mutex
	counted bool
	took    []time.Duration
}

func (l *latencies) each(body []byte) {
	if len(body) != 101 {
		return
	}
	took := time.Since(time.Unix(0, int64(binary.BigEndian.Uint64(body[8:]))))
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.counted {
		l.took = append(l.took, took)
	}
}

func (l *latencies) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counted = true
}

func (l *latencies) end() []time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counted = false
	return l.took
}
