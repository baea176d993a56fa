package matrix_test

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
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
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

// TestMatrix runs every fault of a consumer that a command or a broken path can cause, on every
// generation of RabbitMQ and every kind of queue: on one node in node_test.go, on a cluster in
// cluster_test.go. STEADYMQ_MATRIX=full runs all of it and writes docs/MATRIX.md; without, it is
// one cell per fault, on the newest generation. To look at a part of it, name the parts:
// STEADYMQ_MATRIX="node group retry whole cluster herd 3.10 4.0 4.3".
func TestMatrix(t *testing.T) {
	if testing.Short() {
		t.Skip("takes minutes")
	}
	m := newMatrix(os.Getenv("STEADYMQ_MATRIX"))
	t.Cleanup(func() { m.report(t) })
	gens := slices.DeleteFunc(rabbit.Generations(), func(g rabbit.Generation) bool { return !m.wants(string(g), g == rabbit.Gen43) })
	// The cells that wait for nothing but their own fault come first: starting brokers takes all
	// processors.
	if m.wants("node", true) {
		t.Run("a node", func(t *testing.T) { m.runCells(t, gens) })
	}
	if m.wants("group", true) {
		t.Run("a group", func(t *testing.T) { m.runGroups(t, gens) })
	}
	if m.wants("retry", true) {
		t.Run("retry", func(t *testing.T) { m.runRetries(t, gens) })
	}
	var heavy sync.WaitGroup
	if m.wants("whole", true) {
		for _, g := range gens {
			heavy.Go(func() { t.Run("a whole node "+string(g), func(t *testing.T) { m.runEvents(t, g) }) })
		}
	}
	if m.wants("cluster", true) {
		m.runClusters(t, &heavy, rabbit.Gen43)
	}
	heavy.Wait()
	if m.wants("cluster", false) { // 18 nodes at a time are too many
		m.runClusters(t, &heavy, rabbit.Gen310, rabbit.Gen40)
		heavy.Wait()
	}
	if m.wants("herd", false) { // alone: it needs the machine
		for _, h := range herds {
			t.Run(fmt.Sprintf("a herd on %d connections", h.connections), func(t *testing.T) { m.add("%s", h.run(t)) })
		}
	}
}

// runClusters begins the faults on two clusters of each generation that is wanted, in the short
// form on one.
func (m *matrix) runClusters(t *testing.T, all *sync.WaitGroup, gens ...rabbit.Generation) {
	for _, g := range gens {
		if !m.wants(string(g), g == rabbit.Gen43) {
			continue
		}
		all.Go(func() { t.Run("a cluster "+string(g), func(t *testing.T) { m.runCluster(t, g, 0) }) })
		if m.parts != "" {
			all.Go(func() { t.Run("another cluster "+string(g), func(t *testing.T) { m.runCluster(t, g, 1) }) })
		}
	}
}

// kind is a kind of queue.
type kind string

const (
	classic kind = "classic"
	quorum  kind = "quorum"
	stream  kind = "stream"
)

func kinds() []kind { return []kind{classic, quorum, stream} }

// cell is one fault on one kind of queue of one broker. Those of a fault differ in nothing but
// that.
type cell struct {
	fault string
	rows  string // of docs/FAULTS.md
	// not says why the fault does not exist there, "" if it does.
	not func(rabbit.Generation, kind) string
	by  way
	// vhost asks for a virtual host of its own, args are those of a queue that is not the default
	// one.
	vhost bool
	args  amqp.Table
	test  func(*trial)
}

// way is how a cell's consumer reaches the broker.
type way int

const (
	proxied way = iota
	bothWay     // two cells: one behind the proxy, and one at the broker's own socket
	direct
)

func (c cell) impossible(g rabbit.Generation, k kind) string {
	if c.not == nil {
		return ""
	}
	return c.not(g, k)
}

// somewhere says whether the fault exists at all.
func (c cell) somewhere() bool {
	for _, g := range rabbit.Generations() {
		for _, k := range kinds() {
			if c.impossible(g, k) == "" {
				return true
			}
		}
	}
	return false
}

func only(reason string, possible ...kind) func(rabbit.Generation, kind) string {
	return func(_ rabbit.Generation, k kind) string {
		if slices.Contains(possible, k) {
			return ""
		}
		return reason
	}
}

// trial is the scenario of a cell.
type trial struct {
	*scenario.Scenario
	gen     rabbit.Generation
	kind    kind
	vhost   string
	own     scenario.Results
	nodes   []*rabbit.Broker
	proxies []*faultproxy.Proxy // by node, of a cluster
	group   string              // that its consumer belongs to, "" if it is alone
}

var trials atomic.Int64

// newTrial makes the queue and what the scenario needs.
func (m *matrix) newTrial(t *testing.T, g rabbit.Generation, k kind, b *rabbit.Broker, c cell) *trial {
	t.Helper()
	r := &trial{gen: g, kind: k, vhost: "/", nodes: []*rabbit.Broker{b}}
	if c.vhost {
		r.vhost = fmt.Sprintf("matrix-%d", trials.Add(1))
		require.NoError(t, b.NewVhost(t.Context(), r.vhost))
		b = b.As("guest", "guest", r.vhost)
		t.Cleanup(func() { _ = b.DropVhost(context.Background(), r.vhost) })
	}
	var args amqp.Table
	if k != classic || c.args != nil {
		args = amqp.Table{"x-queue-type": string(k)}
		maps.Copy(args, c.args)
	}
	r.Scenario = scenario.NewOn(t, b, &r.own, args)
	if c.by == direct {
		r.Directly()
	}
	if k == stream {
		r.Options = append(r.Options, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
	}
	return r
}

func rest(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// begin is a consumer at work, and messages on their way.
func (r *trial) begin() {
	r.Helper()
	r.Start()
	r.consuming()
	r.Feed()
}

func (r *trial) consuming() {
	r.Helper()
	r.Must(20*time.Second, "consuming", func() bool { return r.Consumer.State() == steadymq.Consuming })
}

// told waits until a failure was reported whose text contains reason, and holds the time from now
// until then against the limit.
func (r *trial) told(reason string, limit time.Duration) steadymq.StateChange {
	r.Helper()
	var found steadymq.StateChange
	since := time.Now()
	r.Must(limit+10*time.Second, fmt.Sprintf("a failure that says %q", reason), func() bool {
		for _, c := range r.History() {
			if c.Cause != nil && strings.Contains(c.Cause.Error(), reason) {
				found = c
				return true
			}
		}
		return false
	})
	r.InTime(found.Time.Sub(since), limit, fmt.Sprintf("time until it is told of %q", reason))
	return found
}

// judge ends the trial and verifies it. A stream keeps its messages, and a passive declare does not
// count its consumers.
func (r *trial) judge() {
	r.Helper()
	r.Feeder.Stop()
	r.AwaitFinished()
	if r.kind != stream {
		r.OneConsumer()
		r.quiet()
		r.Verify()
		return
	}
	r.oneStreamConsumer()
	r.quiet()
	r.Cancel()
	r.Stopped(scenario.DrainTimeout + scenario.CloseTimeout + time.Second)
	r.NothingLeft()
	r.AcksAreRight()
	r.StatsAddUp()
	r.AddRow(r.Duplicates())
}

func (r *trial) oneStreamConsumer() {
	r.Helper()
	var n int
	r.Holds(scenario.HalfOpen+scenario.CloseTimeout+5*time.Second, func() bool {
		n = r.consumersByName()
		return n == 1 && r.Sockets.Open() == 1
	})
	assert.Equal(r, 1, n, "consumers on the stream")
	assert.Equal(r, 1, r.Sockets.Open(), "open sockets")
}

// consumersByName counts on every node, because each knows its own clients only; -1 if one does not
// answer.
func (r *trial) consumersByName() (sum int) {
	for _, node := range r.nodes {
		text, err := node.ConsumersOf(r.Context(), r.Queue)
		n, errText := strconv.Atoi(text)
		if err != nil || errText != nil {
			return -1
		}
		sum += n
	}
	return sum
}

// quiet waits until the broker has stopped delivering: what a dead connection held comes back when
// the broker has closed it, which may be after the queue has reported one consumer.
func (r *trial) quiet() {
	r.Helper()
	last, since := -1, time.Now()
	r.Must(scenario.HalfOpen+10*time.Second, "the broker has delivered everything", func() bool {
		if n := r.Delivered(); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > time.Second
	})
}

// ok ends the trial where a command fails.
func (r *trial) ok(err error) {
	r.Helper()
	require.NoError(r, err)
}

// ---- the table ----

// matrix collects what every cell showed.
type matrix struct {
	parts string // of STEADYMQ_MATRIX
	full  bool
	begun time.Time
	slots chan struct{}

	mu      sync.Mutex
	order   []string // faults as they are told
	rows    map[string]string
	results map[string]map[string]map[kind]entry // fault, broker, kind
	brokers []string
	extra   []string
	groups  scenario.Results // a row for each group
	retries scenario.Results // and for each consumer that delays and parks
}

type entry struct {
	text string
	note string
	bad  bool
}

// atOnceTrials bounds how many trials share the machine: their bounds are a second.
const atOnceTrials = 24

func newMatrix(parts string) *matrix {
	return &matrix{
		parts: parts, full: parts == "full", begun: time.Now(), slots: make(chan struct{}, atOnceTrials),
		rows: map[string]string{}, results: map[string]map[string]map[kind]entry{},
	}
}

// wants says whether a part is to run: in the whole, in the short form, or because STEADYMQ_MATRIX
// names it, as in "node whole cluster 3.10".
func (m *matrix) wants(part string, short bool) bool {
	switch m.parts {
	case "full":
		return true
	case "":
		return short
	}
	return slices.Contains(strings.Fields(m.parts), part)
}

func (m *matrix) set(fault, rows, broker string, k kind, e entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.results[fault] == nil {
		m.results[fault] = map[string]map[kind]entry{}
		m.order = append(m.order, fault)
		m.rows[fault] = rows
	}
	if m.results[fault][broker] == nil {
		m.results[fault][broker] = map[kind]entry{}
	}
	if !slices.Contains(m.brokers, broker) {
		m.brokers = append(m.brokers, broker)
	}
	m.results[fault][broker][k] = e
}

// record notes how a trial went; it runs after the trial, failed or not.
func (m *matrix) record(r *trial, t *testing.T, fault, rows, broker string, k kind) {
	e := entry{bad: t.Failed()}
	if r != nil && len(r.own.Rows()) > 0 {
		row := r.own.Rows()[0]
		e.note = row.Note
		e.text = "nothing to heal"
		if row.Resumed > 0 || row.Lost > 0 {
			e.text = fmt.Sprintf("%s, %d", inWords(row.Resumed), row.Duplicates)
		}
	}
	if e.bad {
		e.text = "FAILED " + e.text
	}
	m.set(fault, rows, broker, k, e)
}

func inWords(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return "at once"
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func (m *matrix) add(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.extra = append(m.extra, fmt.Sprintf(format, args...))
}

// report prints the table, and writes it down when it is whole.
func (m *matrix) report(t *testing.T) {
	text := m.String()
	t.Log("\n" + text)
	if !m.full || t.Failed() {
		return
	}
	assert.NoError(t, os.MkdirAll(docs, 0o755))
	assert.NoError(t, os.WriteFile(filepath.Join(docs, "MATRIX.md"), []byte(text), 0o644))
}

func (m *matrix) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var b strings.Builder
	cells, failed, reasons := 0, 0, map[string][]string{}
	var table strings.Builder
	table.WriteString("| fault | rows | RabbitMQ | classic | quorum | stream | notes |\n|---|---|---|---|---|---|---|\n")
	slices.Sort(m.brokers)
	slices.Sort(m.order)
	for _, fault := range m.order {
		for _, broker := range m.brokers {
			byKind, ok := m.results[fault][broker]
			if !ok {
				continue
			}
			fmt.Fprintf(&table, "| %s | %s | %s |", fault, m.rows[fault], broker)
			var notes []string
			for _, k := range kinds() {
				e := byKind[k]
				switch {
				case e.text == "" && e.note != "":
					reasons[e.note] = append(reasons[e.note], fmt.Sprintf("%s (%s, %s)", fault, broker, k))
					table.WriteString(" – |")
					continue
				case e.text == "":
					table.WriteString("  |")
					continue
				}
				cells++
				if e.bad {
					failed++
				}
				if e.note != "" && !slices.Contains(notes, e.note) {
					notes = append(notes, e.note)
				}
				fmt.Fprintf(&table, " %s |", e.text)
			}
			fmt.Fprintf(&table, " %s |\n", strings.Join(notes, "; "))
		}
	}
	fmt.Fprintf(&b, matrixHead, cells, failed, time.Since(m.begun).Round(time.Second), runtime.NumCPU())
	b.WriteString(table.String())
	if len(m.groups.Rows()) > 0 {
		b.WriteString(groupsHead + m.groups.String())
	}
	if len(m.retries.Rows()) > 0 {
		b.WriteString(retriesHead + m.retries.String())
	}
	if len(m.extra) > 0 {
		b.WriteString("\n" + strings.Join(m.extra, "\n") + "\n")
	}
	b.WriteString("\n## Cells that do not exist\n\n")
	for _, reason := range slices.Sorted(mapKeys(reasons)) {
		fmt.Fprintf(&b, "- %s: %d cells, such as %s.\n", reason, len(reasons[reason]), reasons[reason][0])
	}
	b.WriteString(matrixTail)
	rows, _ := judgedBy() // another test reads it, too
	for i, judged := range rows {
		if reason, ok := strings.CutPrefix(judged, "no cell: "); ok {
			fmt.Fprintf(&b, "- Row %d: %s.\n", i+1, reason)
		}
	}
	return b.String()
}

func mapKeys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

const matrixHead = `# The matrix

Written by ` + "`make matrix`" + `: %d cells, %d failed, in %v on %d processors. Each cell is one consumer on one queue behind one
proxy that reads every ack, with messages published and confirmed over another connection. Every cell was held to this: no confirmed
message lost, no ack that no handler had earned, none twice, at most prefetch (16) messages delivered again per lost session, one consumer
and one socket at the end, an empty queue, no goroutine or socket left after the stop, and consuming again within the bound of the fault.

A fault that ends in "direct" is the same at the broker's own socket, the address of its container or its port on this machine: no proxy and
no published port, which answer for a broker that is not there and make a FIN of its RST. Whatever logs in, is refused, or is ended by
the broker runs in both ways. While a container is down its address is gone, as a name that has gone from the DNS. Nobody reads the
wire there, nor over TLS: the consumer's own account of its acks is held against the handlers'.

A field holds the time until the consumer was consuming again and the number of messages that were handled twice. The time counts from the
fault where nothing has to be restored first, else from the moment the path, the broker or the permission was back. Heartbeats are 2 s,
the setup limit 3 s, the prefetch 16, with 4 workers. "Nothing to heal" means that the session lived through it, as it should, or
that Run told at the start why there can be none. Rows are those of the table of faults in FAULTS.md.

`

const groupsHead = `
## Groups

Each row is a Group of ten consumers (twenty where it says so) on queues of every kind, on one connection, with a publisher for each queue.
What concerns one of them, such as its channel, its queue or its topology, must cost no other a session. The time is that of the last one to
consume again; sessions, messages and those handled twice are of all.
`

const retriesHead = `
## Retry and park

Each row is a consumer under WithRetry, on a quorum queue with a delivery limit of 5 or on a classic one. One message in five fails in
each attempt. Every message has to end either handled or parked; the queues are looked at by another client. A message whose copy was
stored when a connection was lost before its ack may end twice, one for each place of the prefetch at most. No policy discards anything
here, and what the publisher suffers costs the consumer no session. Handled twice counts what is parked twice, too.
`

const matrixTail = `
Hosts that vanish and packet filters between the broker and us (a forgotten connection, SYN drops) are in ROUTER.md. Here the proxy
swallows bytes, and tests in virtual time over steadymqtest do the rest. The OAuth 2 provider of the rows about tokens is the test itself:
the broker has its key.

## Rows without a cell

`

const (
	module = "../.."          // the module's own folder
	docs   = module + "/docs" // what the tests write goes there
	// faultTable is the file with the table of faults.
	faultTable = docs + "/FAULTS.md"
)

var (
	faultLine = regexp.MustCompile(`(?m)^\| (\d+) \| .* \| ([^|]*) \|$`)
	cellName  = regexp.MustCompile(`\*([^*]+)\*`)
	testName  = regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w+`)
)

// judgedBy reads the last column of the table of faults, by row.
func judgedBy() (rows []string, err error) {
	text, err := os.ReadFile(faultTable)
	if err != nil {
		return nil, err
	}
	for _, line := range faultLine.FindAllStringSubmatch(string(text), -1) {
		if line[1] != strconv.Itoa(len(rows)+1) {
			return nil, fmt.Errorf("%s: row %s where %d was expected", faultTable, line[1], len(rows)+1)
		}
		rows = append(rows, line[2])
	}
	return rows, nil
}

// cellsByRow are the names of the cells of each row of the table.
func cellsByRow() map[string][]string {
	cells := map[string][]string{}
	note := func(fault, rows string) {
		fault = strings.TrimSuffix(fault, ", direct")
		for row := range strings.SplitSeq(rows, ", ") {
			if !slices.Contains(cells[row], fault) {
				cells[row] = append(cells[row], fault)
			}
		}
	}
	for _, c := range allCells(nil) {
		if c.somewhere() {
			note(c.fault, c.rows)
		}
	}
	for _, e := range wholeNode(nil) {
		if (cell{not: e.not}).somewhere() {
			note(e.fault, e.rows)
		}
	}
	for _, g := range rabbit.Generations() {
		for _, e := range clusterEvents(&rabbit.Cluster{Nodes: make([]*rabbit.Broker, 3)}, g) {
			note(e.fault, e.rows)
		}
	}
	return cells
}

func TestEveryRowOfTheFaultTableIsACellOrSaysWhyNot(t *testing.T) {
	rows, err := judgedBy()
	require.NoError(t, err)
	cells := cellsByRow()
	tests := sourceOfTests(t)
	for i, judged := range rows {
		row := strconv.Itoa(i + 1)
		var named []string
		for _, m := range cellName.FindAllStringSubmatch(judged, -1) {
			named = append(named, m[1])
		}
		assert.ElementsMatch(t, cells[row], named, "row %s: the matrix has the one, %s names the other", row, faultTable)
		assert.Equal(t, len(cells[row]) == 0, strings.HasPrefix(judged, "no cell: "), "row %s: a cell or the reason why there is none", row)
		for _, name := range testName.FindAllString(judged, -1) {
			assert.True(t, strings.Contains(tests, "\nfunc "+name+"("), "row %s: there is no %s", row, name)
		}
		delete(cells, row)
	}
	assert.Empty(t, cells, "rows that %s does not have", faultTable)
}

// sourceOfTests is that of every test of the module.
func sourceOfTests(t *testing.T) string {
	var tests strings.Builder
	require.NoError(t, filepath.WalkDir(module, func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir():
			if entry.Name() == "testdata" || entry.Name() == ".git" {
				return filepath.SkipDir
			}
			return nil
		case !strings.HasSuffix(name, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(name)
		tests.Write(text)
		return err
	}))
	return tests.String()
}
