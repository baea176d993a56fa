package steadymq_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The planted bugs show that the simulation can fail. Each is a change of the
// library's source that exists in a temporary overlay only.
//
//	go test -run 'TestMutants$' -mutants -timeout 60m -v .
var (
	mutantsRun   = flag.Bool("mutants", false, "plant each bug and see whether the simulation catches it")
	mutantsSeeds = flag.Int("mutantseeds", 200, "how many seeds may be needed to catch a planted bug")
	mutantsOnly  = flag.String("mutant", "", "plant only the bugs whose name contains this")
)

// mutant is a planted bug: texts that stand in the source exactly once, and what
// stands there instead.
type mutant struct {
	name  string
	edits []edit
	// test names the quick test that has to fail, of a slip where the simulation
	// never goes; "" leaves it to the simulation.
	test string
}

type edit struct{ file, old, new string }

func change(name, file, before, after string) mutant {
	return mutant{name: name, edits: []edit{{file, before, after}}}
}

// inTest is a planted bug that the test has to catch, not the simulation.
func inTest(test string, m mutant) mutant {
	m.test = test
	return m
}

var mutants = []mutant{
	// Settling.
	change("every ack is sent twice", "session.go",
		"{ return s.lane.settle(basicAck, tag, 0) }",
		"{\n\t_ = s.lane.settle(basicAck, tag, 0)\n\treturn s.lane.settle(basicAck, tag, 0)\n}"),
	change("acks are multiple", "session.go",
		"s.lane.settle(basicAck, tag, 0)", "s.lane.settle(basicAck, tag, 1)"),
	change("a delivery may be settled twice", "ack.go",
		"if !d.outcome.CompareAndSwap(uint32(Unsettled), uint32(o)) {",
		"if d.outcome.Store(uint32(o)); false {"),
	{name: "late acks go to the newest session", edits: []edit{
		{
			"session.go", "func (s *session) settle(d *Delivery, o Outcome) error {",
			"var newest sync.Map\n\nfunc (s *session) settle(d *Delivery, o Outcome) error {\n\tif n, ok := newest.Load(s.config); ok && s.over.Load() {\n\t\treturn n.(*session).send(d, o)\n\t}",
		},
		{"session.go", "\ts.since = time.Now()\n", "\ts.since = time.Now()\n\tnewest.Store(s.config, s)\n"},
	}},
	{name: "late acks are sent", edits: []edit{
		{"session.go", "\tif s.over.Load() {\n\t\ts.stats.stale.Add(1)\n\t\treturn ErrStale", "\tif false {\n\t\treturn ErrStale"},
		{"lane.go", "if l.closed || s.out.off", "if s.out.off"},
	}},
	change("settlements go to channel 1", "lane.go",
		"binary.BigEndian.PutUint16(frame[1:], l.channel)", "binary.BigEndian.PutUint16(frame[1:], 1)"),
	change("acks before the handler has returned", "worker.go",
		"\terr = p.invoke(s.ctx, d, &err)", "\t_ = d.Ack()\n\terr = p.invoke(s.ctx, d, &err)"),
	change("a failed message is acked", "ack.go",
		"return Requeued, jitter(requeueDelay)", "return Acked, 0"),
	change("a failed message goes back at once", "ack.go",
		"return Requeued, jitter(requeueDelay)", "return Requeued, 0"),
	change("discard requeues", "ack.go",
		"func Discard(err error) error { return &verdict{outcome: Discarded,", "func Discard(err error) error { return &verdict{outcome: Requeued,"),
	change("forgets to settle after a panic", "worker.go",
		"\t\ts.conclude(d, err)\n", "\t\tif !errors.As(err, new(*PanicError)) {\n\t\t\ts.conclude(d, err)\n\t\t}\n"),
	{name: "handlers start for sessions that are over", edits: []edit{
		{"worker.go", "if !s.gate.enter() {", "if s.gate.count.Add(2); false {"},
	}},

	// Workers and contexts.
	change("a worker is lost after Goexit", "worker.go",
		"\t\t\tgo p.work(at)\n\t\t\treturn\n", "\t\t\treturn\n"),
	change("one worker too many", "worker.go", "for range n {", "for range n + 1 {"),
	change("handlers never learn of a lost session", "session.go",
		"\ts.shut()\n\ts.cancel(cause)\n", "\ts.shut()\n"),
	change("a stop cancels running handlers", "consumer.go",
		"handlers: context.WithoutCancel(ctx)", "handlers: ctx"),
	change("no handler timeout", "worker.go",
		"if p.config.handlerTimeout > 0 {", "if p.config.handlerTimeout < 0 {"),

	// Sessions.
	change("ignores basic.cancel", "session.go",
		"\t\tif cancelled {\n\t\t\treturn s.lost(errCancelled)\n\t\t}\n\tcase <-s.conn.end.ended:\n\tcase <-s.driver:\n",
		"\t\tif cancelled {\n\t\t\tselect {\n\t\t\tcase e := <-s.closes:\n\t\t\t\treturn s.lost(s.diagnose(errorOrNil(e)))\n\t\t\tcase <-s.conn.end.ended:\n\t\t\t\treturn s.lost(s.diagnose(nil))\n\t\t\tcase <-s.stop:\n\t\t\t\treturn nil\n\t\t\t}\n\t\t}\n\tcase <-s.conn.end.ended:\n"),
	change("ignores the end of its channel", "session.go",
		"\tcase e := <-s.closes:\n\t\terr = errorOrNil(e)\n\tcase _, cancelled := <-s.cancels:\n\t\tif cancelled {\n\t\t\treturn s.lost(errCancelled)\n\t\t}\n\tcase <-s.conn.end.ended:\n\tcase <-s.driver:\n",
		"\tcase <-s.conn.end.ended:\n"),
	change("a cancelled session gives its handlers no time", "session.go",
		"\t\ts.retire(cause)\n", "\t\ts.lose(cause)\n"),
	change("no prefetch", "session.go", "s.channel.Qos(s.config.prefetch, 0, false)", "s.channel.Qos(0, 0, false)"),
	change("the consumer tag is used again", "consumer.go",
		`tag := fmt.Sprintf("%s.%d-%d", s.tag, s.tries.Add(1), number)`, `tag := s.tag + "-1"`),

	// Reconnecting.
	change("no setup limit", "consumer.go",
		"context.WithTimeoutCause(s.ctx, s.config.setupTimeout, errSetupTimeout)", "context.WithCancel(s.ctx)"),
	change("the setup limit does not close the socket", "session.go",
		"unguard := context.AfterFunc(ctx, func() { c.socket.kill(context.Cause(ctx)) })", "unguard := context.AfterFunc(ctx, func() {})"),
	change("gives up on a refusal after the first session", "reconnect.go",
		"if r.proven {", "if r.proven && false {"),
	change("gives up on 404", "reconnect.go",
		"case amqp.NotAllowed, amqp.AccessRefused, amqp.PreconditionFailed,", "case amqp.NotFound, amqp.NotAllowed, amqp.AccessRefused, amqp.PreconditionFailed,"),
	change("retries in a hot loop", "reconnect.go",
		"\tr.failures++\n", "\tif r.failures++; r.failures > 0 {\n\t\treturn time.Millisecond\n\t}\n"),
	change("the backoff has no cap", "reconnect.go",
		"return p.floor + rand.N(top-p.floor+1)", "return p.floor + p.initial<<min(p.failures, 12)"),
	change("no cap while dials are refused", "reconnect.go",
		"r.pace(0, c.retryInitial, time.Second)", "r.pace(0, c.retryInitial, c.retryCap)"),
	inTest("TestMissingQueueIsConsumedWithin5500msOfItsReturn", change("a missing queue is asked for as seldom as an operator mends", "reconnect.go",
		"time.Second, 5*time.Second)", "time.Second, operatorCap)")),
	inTest("TestNoWaitExceedsAGivenLimit", change("the limit of WithBackoff binds one class only", "reconnect.go",
		"limit = min(limit, r.limit)", "limit = min(limit, max(r.limit, time.Second))")),
	inTest("TestRefusedDialsDoNotQuickenThePaceOfWhatAnOperatorMends", change("a refused dial resets the pace of the operator's", "reconnect.go",
		"\trule.failures++\n", "\tif rule.failures++; kind == classRefused {\n\t\tr.rules[classOperator].failures, r.passed = 0, nil\n\t}\n")),
	inTest("TestLockIsNoYoungerForWhatFailsMeanwhile", change("what fails beside a lock makes it young again", "reconnect.go",
		"\trule := r.rules[kind]\n", "\tif rule := classify(err); rule != classLocked {\n\t\tr.lockSeen = time.Time{}\n\t}\n\trule := r.rules[kind]\n")),
	inTest("TestNamesDecideNoClass", change("a word that a name may hold decides the class", "phrases.go",
		"strings.HasPrefix(text, p.start) && (cut || strings.HasSuffix(text, p.end))", "(cut || strings.Contains(text, p.start) && strings.Contains(text, p.end))")),
	inTest("TestNamesDecideNoClass", change("a phrase is not held to its end", "phrases.go",
		"(cut || strings.HasSuffix(text, p.end))", "(cut || strings.Contains(text, p.end))")),
	inTest("TestTextThatWasCutOffIsTakenForWhatPasses", change("a text that was cut off is none of the phrases", "phrases.go",
		"(cut || strings.HasSuffix(text, p.end))", "(cut && false || strings.HasSuffix(text, p.end))")),
	inTest("TestStreamStartsOverOnlyIfItIsGoneItself", change("a stream starts over because of another queue", "stream.go",
		`want := "no queue '" + name + "' in vhost '"`, `want := "no queue '"`)),
	inTest("TestHostThatSaidItClosesRefusedOrFellSilentGoesLastForAMinute", change("a host that fell silent is as good as any", "hosts.go",
		"\treturn fellSilent(err)\n}", "\treturn false\n}")),
	inTest("TestLastGoodHostIsTriedAgainBeforeOneThatFellSilent", change("a host that fell silent is tried before the last good one", "hosts.go",
		"return round + 1, until", "return round, until")),
	inTest("TestHostThatFellSilentBetweenSessionsGoesLast", change("a connection that dies in backoff leaves its host good", "consumer.go",
		"\t\ts.hosts.failed(s.conn.host, s.conn.end.cause(), time.Now())\n", "")),
	inTest("TestEveryHostHasItsTurnHoweverTheOthersFail", change("a host that goes last has no turn", "hosts.go",
		"return round + 1, until", "return round + 1000, until")),
	inTest("TestMissingQueueIsAskedForOnOneConnection", change("a missing queue replaces its connection", "consumer.go",
		"|| kind == classAbsent && len(s.hosts.endpoints) < 2", "")),
	inTest("TestCredentialsAreRefreshedOverTheWholeRangeOfTheirExpiry", change("the life of credentials overflows", "connection.go",
		"time.Until(expires) / 10 * 7", "time.Until(expires) * 7 / 10")),
	inTest("TestCredentialsAreRefreshedOverTheWholeRangeOfTheirExpiry", change("expired credentials are refreshed every second", "connection.go",
		"time.Until(expires) > minRefresh", "true")),
	inTest("TestIssuerThatFailsIsAskedEverMoreSlowly", change("a failing issuer is asked every second", "connection.go",
		"\t\tagain.failures++\n", "\t\tagain.failures = 1\n")),
	inTest("TestStopAfterHoursOfHealthTellsNoFailures", change("a stop tells of failures long past", "consumer.go",
		"\tcase <-s.ctx.Done():\n\t\ts.proved(s.session)\n", "\tcase <-s.ctx.Done():\n")),
	inTest("TestChangesCutOffByTheEndAreCounted", change("changes cut off by the end are not counted", "notify.go",
		"\t\tr.dropped.Add(uint64(len(r.events)))\n", "")),
	inTest("TestTimesThatAMQPCannotCarryAreRefused", change("times before 1970 become those of the far future", "options.go",
		"return v.Unix() < 0", "return false")),
	change("consume-ok resets the backoff", "reconnect.go",
		"\tr.proven = true\n", "\tr.proven, r.failures = true, 0\n"),
	change("consume-ok makes all hosts untried", "hosts.go",
		"\tdelete(h.avoid, address)\n}", "\tdelete(h.avoid, address)\n\tclear(h.tries)\n}"),
	change("hosts are not rotated", "hosts.go",
		"order := slices.Clone(h.endpoints)", "order := h.endpoints[:1]"),

	// Sockets and connections.
	change("no inbound watchdog", "connection.go", "idleTimeout:  2 * c.heartbeat,", "idleTimeout:  0,"),
	change("the driver does not hear of deliveries", "inbound.go", "if in.took && in.pass == 0 &&", "if false && in.pass == 0 &&"),
	change("a channel closed by the broker still delivers", "lane.go", "\tif l.refused {\n\t\treturn\n\t}\n", ""),
	change("the old connection is not closed", "connection.go", "\t\tc.leave <- limit\n", ""),
	change("the password is in an error", "connection.go",
		"return nil, &SessionError{Host: e.address, Op: op, Err: err}", `return nil, &SessionError{Op: op, Err: fmt.Errorf("%s: %w", e.uri, err)}`),

	// Stopping.
	change("a stop drops the session instead of draining it", "session.go",
		"\t\ts.drain()\n", "\t\ts.lose(errStopped)\n"),
	change("the drain does not wait for handlers", "session.go",
		"\tselect {\n\tcase <-s.gate.empty:\n\t\treturn\n", "\tselect {\n\tdefault:\n\t\treturn\n\tcase <-s.gate.empty:\n\t\treturn\n"),
	change("no drain limit", "session.go",
		"func (s *session) drain() {\n\tlimit := time.NewTimer(s.config.drainTimeout)", "func (s *session) drain() {\n\tlimit := time.NewTimer(24 * time.Hour)"),
	change("held messages are not released by the drain", "session.go",
		"\ts.ended.notify(errStopped)\n\ts.holds.release()\n", "\ts.ended.notify(errStopped)\n"),
	change("messages that were not started are not handed back", "session.go",
		"\t\treturn s.lost(s.diagnose(nil))\n\t}\n\ts.handBackRest()\n", "\t\treturn s.lost(s.diagnose(nil))\n\t}\n"),
	{name: "close-ok is not awaited", edits: []edit{
		{"session.go", "\terr := s.channel.Close()\n", "\tvar err error\n"},
		{"connection.go", "\t\t_ = c.amqp.CloseDeadline(time.Now().Add(limit))\n", "\t\tgo func() { _ = c.amqp.CloseDeadline(time.Now().Add(limit)) }()\n"},
	}},
	change("a lost connection hides handlers left behind", "consumer.go", "\tcase err != nil:\n\t\ts.err = errors.Join(s.err, err)\n", ""),
	change("a hook is called after Run", "worker.go", " || p.reporter.muted.Load() {", " {"),
}

// TestMutantsMatchTheSource keeps the table from rotting.
func TestMutantsMatchTheSource(t *testing.T) {
	for _, m := range mutants {
		for _, e := range m.edits {
			source, err := os.ReadFile(e.file)
			require.NoError(t, err)
			assert.Equal(t, 1, strings.Count(string(source), e.old),
				"planted bug %q: this text must be in %s exactly once, change the table:\n%s", m.name, e.file, e.old)
		}
	}
}

// TestMutants prints a table: which invariant caught which planted bug, and how
// many seeds that took.
func TestMutants(t *testing.T) {
	if !*mutantsRun {
		t.Skip("takes minutes; ask for it by -mutants")
	}
	caught, all := 0, 0
	for _, m := range mutants {
		if !strings.Contains(m.name, *mutantsOnly) {
			continue
		}
		all++
		r := m.try(t)
		if r.by != "" {
			caught++
		}
		fmt.Printf("| %-55s | %-28s | %5d | %4.0fs |\n", m.name, cmp.Or(r.by, "NOT CAUGHT"), r.seeds, r.took.Seconds())
	}
	fmt.Printf("%d of %d planted bugs caught within %d seeds\n", caught, all, *mutantsSeeds)
	assert.GreaterOrEqual(t, float64(caught), 0.95*float64(all))
}

type mutantResult struct {
	by    string // the invariant, empty if it was not caught
	seeds int
	took  time.Duration
}

// try plants the bug, builds the tests and lets the simulation run.
func (m *mutant) try(t *testing.T) mutantResult {
	start := time.Now()
	dir := t.TempDir()
	program := filepath.Join(dir, "mutant.test")
	build := exec.Command("go", "test", "-vet=off", "-overlay", m.overlay(t, dir), "-c", "-o", program, ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Errorf("planted bug %q does not compile, change the table: %v\n%s", m.name, err, out)
		return mutantResult{}
	}
	run := exec.Command(program, "-test.run", "TestSim$", "-test.timeout", "10m", "-seeds", strconv.Itoa(*mutantsSeeds),
		"-failures", "1", "-shrink=false", "-stuck", "20s", "-progress")
	if m.test != "" {
		run = exec.Command(program, "-test.run", "^"+m.test+"$", "-test.timeout", "2m", "-test.v")
	}
	var out bytes.Buffer
	run.Stdout, run.Stderr = &out, &out
	err := run.Run()
	r := mutantResult{seeds: strings.Count(out.String(), "sim: seed "), took: time.Since(start)}
	switch {
	case m.test != "" && !strings.Contains(out.String(), "=== RUN   "+m.test):
		t.Errorf("planted bug %q: there is no test %s", m.name, m.test)
	case err != nil && m.test != "":
		r.by = m.test
	case err != nil:
		r.by = invariantOf(out.String())
	}
	return r
}

// overlay writes the changed files and the list of them for the compiler.
func (m *mutant) overlay(t *testing.T, dir string) string {
	files := make(map[string]string)
	for _, e := range m.edits {
		if files[e.file] == "" {
			source, err := os.ReadFile(e.file)
			require.NoError(t, err)
			files[e.file] = string(source)
		}
		require.Equal(t, 1, strings.Count(files[e.file], e.old), "%s: %s", m.name, e.old)
		files[e.file] = strings.Replace(files[e.file], e.old, e.new, 1)
	}
	replace := make(map[string]string)
	for name, text := range files {
		original, err := filepath.Abs(name)
		require.NoError(t, err)
		replace[original] = filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(replace[original], []byte(text), 0o600))
	}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	require.NoError(t, err)
	path := filepath.Join(dir, "overlay.json")
	require.NoError(t, os.WriteFile(path, list, 0o600))
	return path
}

var invariantLine = regexp.MustCompile(`(?m)^\s*([A-Za-z0-9]+) at [0-9a-z.]+: `)

// invariantOf finds out what the simulation complained about.
func invariantOf(out string) string {
	if found := invariantLine.FindStringSubmatch(out); found != nil {
		return found[1]
	}
	switch {
	case strings.Contains(out, "time stands still"):
		return "I8 (time stands still)"
	case strings.Contains(out, "blocked goroutines remain"):
		return "I8 (goroutines left)"
	case strings.Contains(out, "panic: "):
		_, text, _ := strings.Cut(out, "panic: ")
		text, _, _ = strings.Cut(text, "\n")
		return "panic: " + text[:min(len(text), 20)]
	}
	return "failed"
}
