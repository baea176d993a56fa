package matrix_test

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
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

var soakFor = flag.Duration("soak", 0, "how long to soak")

const (
	soakEnv      = "STEADYMQ_SOAK_CONSUMERS"
	soakPrefetch = 16
	soakSample   = 2 * time.Second
	// soakFlat is how much the heap after a collection may have grown from the first fifth after
	// the warm-up to the last one.
	soakFlat = 2 << 20
)

// soaker is one consumer of the soak, as the process that runs it is told.
type soaker struct {
	Queue string
	URLs  []string
	Kind  kind
	Group string // the consumers with the same one are of one Group; "" for one alone
}

// TestSoak runs several consumers on a cluster for a long time, with a random fault every few
// seconds. The consumers live in a process of their own, so that its memory, goroutines and
// descriptors are the library's and not the verifier's.
func TestSoak(t *testing.T) {
	if *soakFor == 0 {
		t.Skip("runs for as long as it is told: -soak 30m")
	}
	s := newSoak(t)
	s.begin()
	s.trouble(time.Now().Add(*soakFor))
	s.judge()
}

// soak is the verifier's side.
type soak struct {
	*testing.T
	cluster *rabbit.Cluster
	trials  []*trial
	group   *scenario.Group // that the last ones of them are of
	child   *exec.Cmd
	stdin   io.Closer
	done    chan error
	begun   time.Time

	mu      sync.Mutex
	samples []sample
	final   map[string]string // what the process said at its end
	faults  []soakFault
}

// sample is the state of the consumers' process.
type sample struct {
	At                   time.Time
	Heap                 uint64
	Goroutines, Files    int
	Sessions, Duplicates uint64
}

type soakFault struct {
	at   time.Time
	name string
	took time.Duration
}

func newSoak(t *testing.T) *soak {
	c := rabbit.NewCluster(t, 3, rabbit.Config{Generation: rabbit.Gen43, ChannelTick: time.Second, NetTick: 8 * time.Second})
	s := &soak{T: t, cluster: c, done: make(chan error, 1), final: map[string]string{}}
	m := newMatrix("soak")
	for i, k := range []kind{quorum, quorum, quorum, classic, stream} {
		s.trials = append(s.trials, m.newClusterTrial(t, rabbit.Gen43, c, place{kind: k, home: i % 3, at: i % 3, feed: i % 3}))
	}
	s.addGroup(quorum, classic, stream)
	return s
}

// addGroup adds a trial for each consumer of a Group, which share their proxies.
func (s *soak) addGroup(of ...kind) {
	var queues []amqp.Table
	for _, k := range of {
		queues = append(queues, amqp.Table{"x-queue-type": string(k)})
	}
	nodes := s.cluster.Nodes
	s.group = scenario.NewGroup(s.T, nodes[0], new(scenario.Results), queues...)
	proxies, _ := beside(s.T, s.group.Proxy(), nodes, 0)
	for i, member := range s.group.Members {
		member.Feeder.URL = nodes[i%len(nodes)].URL()
		s.trials = append(s.trials, &trial{
			Scenario: member, gen: rabbit.Gen43, kind: of[i], vhost: "/", nodes: nodes, proxies: proxies, group: s.group.Name(),
		})
	}
}

// begin starts the process and the publishers.
func (s *soak) begin() {
	var spec []soaker
	for _, r := range s.trials {
		var urls []string
		for i, p := range r.proxies {
			urls = append(urls, p.URL(s.cluster.Nodes[i].URL()))
		}
		spec = append(spec, soaker{Queue: r.Queue, URLs: urls, Kind: r.kind, Group: r.group})
	}
	text, err := json.Marshal(spec)
	require.NoError(s, err)
	self, err := os.Executable()
	require.NoError(s, err)
	s.child = exec.Command(self, "-test.run", "^TestSoakConsumers$", "-test.timeout", "0")
	s.child.Env = append(os.Environ(), soakEnv+"="+string(text))
	s.child.Stderr = os.Stderr
	s.stdin, err = s.child.StdinPipe()
	require.NoError(s, err)
	out, err := s.child.StdoutPipe()
	require.NoError(s, err)
	require.NoError(s, s.child.Start())
	go func() {
		s.listen(out)
		s.done <- s.child.Wait()
	}()
	s.Cleanup(func() { _ = s.stdin.Close() })
	for _, r := range s.trials {
		r.Feeder.Start()
		s.Cleanup(r.Feeder.Stop)
	}
	s.begun = time.Now()
	s.flows(time.Now(), time.Minute)
}

// listen reads what the process tells: a line for each finished message before the library can ack
// it, and samples.
func (s *soak) listen(out io.Reader) {
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		switch {
		case len(f) == 6 && f[0] == "finished":
			s.finished(f[1:])
		case len(f) == 2 && f[0] == "sample":
			var one sample
			if json.Unmarshal([]byte(f[1]), &one) == nil {
				s.mu.Lock()
				s.samples = append(s.samples, one)
				s.mu.Unlock()
			}
		case len(f) > 2 && f[0] == "final":
			s.mu.Lock()
			s.final[f[1]] = strings.Join(f[2:], " ")
			s.mu.Unlock()
		}
	}
}

func (s *soak) finished(f []string) {
	i, _ := strconv.Atoi(f[0])
	session, _ := strconv.ParseUint(f[1], 10, 64)
	tag, _ := strconv.ParseUint(f[2], 10, 64)
	n, _ := strconv.Atoi(f[3])
	at, _ := strconv.ParseInt(f[4], 10, 64)
	s.trials[i].Ledger.FinishedElsewhere(session, tag, n, time.Unix(0, at))
}

// flows waits until every consumer has handled a message since.
func (s *soak) flows(since time.Time, limit time.Duration) {
	s.Helper()
	for _, r := range s.trials {
		assert.True(s, r.Holds(limit, func() bool { return !r.Ledger.FirstAfter(since).IsZero() }), "%s %s hears nothing", r.kind, r.Queue)
	}
}

// trouble lets one fault after the other happen.
func (s *soak) trouble(until time.Time) {
	ctx := s.Context()
	for time.Now().Before(until) {
		rest(ctx, 2*time.Second+rand.N(4*time.Second))
		names := slices.Sorted(maps.Keys(s.kinds()))
		name := names[rand.N(len(names))]
		at := time.Now()
		if err := s.kinds()[name](ctx); err != nil {
			s.Logf("%s: %v", name, err)
		}
		s.mu.Lock()
		s.faults = append(s.faults, soakFault{at, name, time.Since(at)})
		s.mu.Unlock()
	}
}

// kinds are the faults. Those of nodes take one node at a time and end before the next.
func (s *soak) kinds() map[string]func(context.Context) error {
	r := s.trials[rand.N(len(s.trials))]
	node := s.cluster.Nodes[rand.N(3)]
	path := r.proxies[rand.N(3)]
	all := func(do func(*faultproxy.Proxy)) func(context.Context) error {
		return func(context.Context) error {
			for _, r := range s.trials {
				for _, p := range r.proxies {
					do(p)
				}
			}
			return nil
		}
	}
	through := func(begin func(), d time.Duration, end func()) func(context.Context) error {
		return func(ctx context.Context) error { begin(); rest(ctx, d); end(); return nil }
	}
	node2 := func(begin func(context.Context) error, d time.Duration, end func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error { _, err := during(begin, d, end)(ctx); return err }
	}
	return map[string]func(context.Context) error{
		"all connections reset":        all((*faultproxy.Proxy).Reset),
		"all connections ended (FIN)":  all((*faultproxy.Proxy).FIN),
		"a path swallows both ways":    through(func() { path.BlackHole(faultproxy.Both) }, 5*time.Second, path.Heal),
		"a path swallows what we send": through(func() { path.BlackHole(faultproxy.ToBroker) }, 8*time.Second, path.Heal),
		"a path stalls":                through(func() { path.Pause(faultproxy.Both) }, scenario.Heartbeat, path.Heal),
		"a path in slices of 7 bytes":  through(func() { path.Slice(faultproxy.Both, 7, 100*time.Microsecond) }, 3*time.Second, path.Heal),
		"an operator closes connections": func(ctx context.Context) error {
			_, err := node.CloseNamed(ctx, "steadymq-test", "soak")
			return err
		},
		"channels crash": func(ctx context.Context) error { _, err := node.CrashChannels(ctx, "steadymq-test"); return err },
		"a node frozen":  node2(freeze(node), 5*time.Second, node.Unpause),
		"a node drained": node2(node.Drain, 3*time.Second, node.Revive),
		"a node killed":  node2(node.Kill, time.Second, node.Start),
		"a node stopped": node2(node.Stop, time.Second, node.Start),
	}
}

// judge ends the soak.
func (s *soak) judge() {
	for _, r := range s.trials {
		for _, p := range r.proxies {
			p.Heal()
		}
	}
	rest(s.Context(), 15*time.Second)
	s.flows(time.Now(), time.Minute)
	lost, confirmed, twice := 0, 0, 0
	for _, r := range s.trials {
		r.Feeder.Stop()
		r.Holds(2*time.Minute, func() bool { return len(r.Ledger.Missing()) == 0 })
		counts := r.Ledger.Counts()
		lost, confirmed, twice = lost+len(r.Ledger.Missing()), confirmed+counts.Confirmed, twice+counts.Twice
		assert.Empty(s, r.Ledger.Missing(), "%s: confirmed messages that no handler finished", r.kind)
		r.quiet()
	}
	rest(s.Context(), 2*soakSample) // the last samples are of consumers at rest
	assert.NoError(s, s.stdin.Close())
	select {
	case err := <-s.done:
		assert.NoError(s, err, "the process of the consumers")
	case <-time.After(time.Minute):
		_ = s.child.Process.Kill()
		assert.Fail(s, "the consumers do not stop")
	}
	for _, r := range s.trials {
		r.AcksAreRight()
		if r.kind != stream {
			r.QueueEmpty()
		}
	}
	s.group.WireIsOurs()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resources()
	s.report(lost, confirmed, twice)
}

// resources holds the process against its beginning.
func (s *soak) resources() {
	assert.Equal(s, strings.TrimSpace(strings.Repeat("<nil> ", len(s.trials))), s.final["errors"], "what Run returned")
	assert.Equal(s, s.final["goroutines-before"], s.final["goroutines-after"], "goroutines, before the first Run and after the last")
	assert.Equal(s, s.final["files-before"], s.final["files-after"], "descriptors")
	assert.Equal(s, "0", s.final["abandoned"])
	first, last := s.fifths()
	assert.LessOrEqual(s, last, first+soakFlat, "heap, median of the first fifth after the warm-up and of the last")
	sessions, _ := strconv.Atoi(s.final["sessions"])
	twice := 0
	for _, r := range s.trials {
		twice += r.Ledger.Counts().Twice
	}
	assert.LessOrEqual(s, twice, soakPrefetch*sessions, "duplicates: prefetch per lost session at most")
}

// fifths are the median heaps of the first and of the last fifth after the warm-up, which is the
// first fifth of all.
func (s *soak) fifths() (first, last uint64) {
	n := len(s.samples) / 5
	if n == 0 {
		return 0, 0
	}
	median := func(part []sample) uint64 {
		part = slices.Clone(part)
		slices.SortFunc(part, func(a, b sample) int { return int(int64(a.Heap) - int64(b.Heap)) })
		return part[len(part)/2].Heap
	}
	return median(s.samples[n : 2*n]), median(s.samples[len(s.samples)-n:])
}

// ---- the process of the consumers ----

// TestSoakConsumers is the other process of TestSoak.
func TestSoakConsumers(t *testing.T) {
	text := os.Getenv(soakEnv)
	if text == "" {
		t.Skip("is the other process of TestSoak")
	}
	var spec []soaker
	require.NoError(t, json.Unmarshal([]byte(text), &spec))
	var mu sync.Mutex
	tell := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Printf(format+"\n", args...)
	}
	// The runtime opens descriptors of its own for the first socket.
	if lis, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		_ = lis.Close()
	}
	goroutines, files := runtime.NumGoroutine(), openFiles()
	ctx, stop := context.WithCancel(context.Background())
	consumers, errs := make([]*steadymq.Consumer, len(spec)), make([]error, len(spec))
	groups := map[string]*steadymq.Group{}
	var all sync.WaitGroup
	for i, one := range spec {
		handle := func(_ context.Context, d *steadymq.Delivery) error {
			tell("finished %d %d %d %s %d", i, d.Session(), d.DeliveryTag, d.MessageId, time.Now().UnixNano())
			return nil
		}
		if one.Group == "" {
			consumers[i] = one.consumer(t)
			all.Go(func() { errs[i] = consumers[i].Run(ctx, handle) })
			continue
		}
		g := groups[one.Group]
		if g == nil { // its Run's error stands in the place of its first consumer
			g = one.newGroup(t)
			groups[one.Group] = g
			all.Go(func() { errs[i] = g.Run(ctx) })
		}
		consumers[i] = one.of(t, g, handle)
	}
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // until the verifier closes it
		close(ended)
	}()
	for sampling := true; sampling; {
		select {
		case <-ended:
			sampling = false
		case <-time.After(soakSample):
			text, _ := json.Marshal(takeSample(consumers))
			tell("sample %s", text)
		}
	}
	stop()
	all.Wait()
	// A goroutine that has returned ends a moment later.
	rest(context.Background(), 200*time.Millisecond)
	total := takeSample(consumers)
	var abandoned uint64
	for _, c := range consumers {
		abandoned += c.Stats().Abandoned
	}
	for _, g := range groups {
		abandoned += g.Stats().Abandoned
	}
	tell("final goroutines-before %d", goroutines)
	tell("final goroutines-after %d", runtime.NumGoroutine())
	tell("final files-before %d", files)
	tell("final files-after %d", openFiles())
	tell("final sessions %d", total.Sessions)
	tell("final abandoned %d", abandoned)
	tell("final errors %s", strings.Trim(fmt.Sprint(errs), "[]"))
}

func (one soaker) consumer(t *testing.T) *steadymq.Consumer {
	c, err := steadymq.New(one.URLs[0], one.Queue, append(one.path(), one.options()...)...)
	require.NoError(t, err)
	return c
}

func (one soaker) newGroup(t *testing.T) *steadymq.Group {
	g, err := steadymq.NewGroup(one.URLs[0], one.path()...)
	require.NoError(t, err)
	return g
}

func (one soaker) of(t *testing.T, g *steadymq.Group, h steadymq.Handler) *steadymq.Consumer {
	c, err := g.Handle(one.Queue, h, one.options()...)
	require.NoError(t, err)
	return c
}

// path are the options of the connection.
func (one soaker) path() []steadymq.Option {
	return []steadymq.Option{
		steadymq.WithURLs(one.URLs[1:]...), steadymq.WithConnectionName(one.Queue), steadymq.WithHeartbeat(scenario.Heartbeat),
		steadymq.WithLogger(slog.New(slog.DiscardHandler)),
	}
}

// options are the others.
func (one soaker) options() []steadymq.Option {
	opts := []steadymq.Option{
		steadymq.WithConcurrency(4), steadymq.WithPrefetch(soakPrefetch),
		steadymq.WithSetupTimeout(scenario.SetupTimeout), steadymq.WithCloseTimeout(scenario.CloseTimeout),
		steadymq.WithStallDetector(5 * time.Second),
	}
	if one.Kind == stream {
		opts = append(opts, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
	}
	return opts
}

func takeSample(consumers []*steadymq.Consumer) sample {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	s := sample{At: time.Now(), Heap: m.HeapAlloc, Goroutines: runtime.NumGoroutine(), Files: openFiles()}
	for _, c := range consumers {
		s.Sessions += c.Stats().Sessions
	}
	return s
}

// openFiles counts descriptors, -1 where the system does not tell.
func openFiles() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	return len(entries)
}

// ---- the report ----

func (s *soak) report(lost, confirmed, twice int) {
	first, last := s.fifths()
	verdict := "PASSED"
	if s.Failed() {
		verdict = "FAILED"
	}
	var b strings.Builder
	fmt.Fprintf(&b, soakHead, verdict, time.Since(s.begun).Round(time.Second), s.cluster.Nodes[0].Version(), len(s.faults), confirmed, lost, twice,
		s.final["sessions"], soakPrefetch, mib(first), mib(last), s.final["goroutines-before"], s.final["goroutines-after"],
		s.final["files-before"], s.final["files-after"], s.final["errors"])
	counts := map[string]int{}
	for _, f := range s.faults {
		counts[f.name]++
	}
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		fmt.Fprintf(&b, "| %s | %d |\n", name, counts[name])
	}
	s.Log("\n" + b.String())
	assert.NoError(s, os.MkdirAll(docs, 0o755))
	assert.NoError(s, os.WriteFile(filepath.Join(docs, "SOAK.md"), []byte(b.String()), 0o644))
	assert.NoError(s, os.WriteFile(filepath.Join(docs, "soak.svg"), []byte(s.chart()), 0o644))
}

func mib(n uint64) string { return fmt.Sprintf("%.2f MiB", float64(n)/(1<<20)) }

const soakHead = `# The soak

Written by ` + "`make soak`" + `. Verdict: **%s**.

Eight consumers in a process of their own, on a cluster of three nodes, behind proxies that read every ack: five with a connection each
(three quorum queues, a classic one, a stream) and three of one Group (a quorum queue, a classic one, a stream), for %v on RabbitMQ %s, with one random fault after the other, two to six seconds apart: %d in all.

| | |
|---|---|
| messages confirmed to their publishers | %d |
| of them lost | %d |
| acks that no handler had earned, or sent twice | none (else the verdict is FAILED) |
| messages handled twice | %d |
| sessions | %s, so at most %d duplicates each |
| heap after a collection, median of the first fifth after the warm-up | %s |
| the same of the last fifth | %s |
| goroutines before the first Run and after the last | %s, %s |
| descriptors before and after | %s, %s |
| what the Runs returned, that of the group and its members in three places | %s |

![heap, goroutines and descriptors over time](soak.svg)

| fault | times |
|---|---|
`

// chart draws the samples; the faults are ticks at the bottom.
func (s *soak) chart() string {
	const width, height, left, top = 900, 120, 60, 20
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", width+2*left, 3*(height+40)+40)
	if len(s.samples) < 2 {
		return b.String() + "</svg>\n"
	}
	begin, span := s.samples[0].At, s.samples[len(s.samples)-1].At.Sub(s.samples[0].At)
	x := func(at time.Time) float64 { return left + width*at.Sub(begin).Seconds()/span.Seconds() }
	for i, series := range []struct {
		name  string
		value func(sample) float64
	}{
		{"heap after a collection, MiB", func(s sample) float64 { return float64(s.Heap) / (1 << 20) }},
		{"goroutines", func(s sample) float64 { return float64(s.Goroutines) }},
		{"descriptors", func(s sample) float64 { return float64(s.Files) }},
	} {
		base := top + i*(height+40)
		most := 0.0
		for _, one := range s.samples {
			most = max(most, series.value(one))
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d">%s</text><text x="5" y="%d">%.4g</text><text x="5" y="%d">0</text>`+"\n", left, base-4, series.name, base+10, most, base+height)
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" fill="none" stroke="#ccc"/><polyline fill="none" stroke="#246" points="`, left, base, width, height)
		for _, one := range s.samples {
			fmt.Fprintf(&b, "%.1f,%.1f ", x(one.At), float64(base+height)-float64(height)*series.value(one)/max(most, 1))
		}
		b.WriteString(`"/>` + "\n")
	}
	bottom := top + 3*(height+40)
	for _, f := range s.faults {
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#c33"><title>%s</title></line>`, x(f.at), x(f.at), bottom-30, bottom-20, f.name)
	}
	fmt.Fprintf(&b, "\n"+`<text x="%d" y="%d">faults, over %v</text></svg>`+"\n", left, bottom-4, span.Round(time.Second))
	return b.String()
}
