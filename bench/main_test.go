package main

import (
	"encoding/binary"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/steadymq/steadymq/bench/internal/replay"
)

func TestRatiosCompareNeighbours(t *testing.T) {
	second := func(n uint64) measurement { return measurement{Messages: n, Elapsed: time.Second, User: time.Second} }
	// The machine is ten times slower in the last two rounds: the medians of
	// the rates alone would say 20, the rounds say 2.
	base := []measurement{second(100), second(10), second(10)}
	o := summarize(variant{}, []measurement{second(200), second(200), second(20)}, base)
	if o.rateRatio != 2 || o.rateMin != 2 || o.rateMax != 20 {
		t.Errorf("ratio %v (%v to %v), want 2 (2 to 20)", o.rateRatio, o.rateMin, o.rateMax)
	}
	if o.cpuRatio != 0.5 {
		t.Errorf("CPU ratio %v, want 0.5", o.cpuRatio)
	}
}

func TestMedian(t *testing.T) {
	for want, vs := range map[float64][]float64{0: nil, 3: {3}, 2: {3, 1, 2}, 2.5: {4, 1, 2, 3}} {
		if got := median(vs); got != want {
			t.Errorf("median(%v) = %v, want %v", vs, got, want)
		}
	}
}

func TestWorkloadFlags(t *testing.T) {
	ws, err := workloads("16,256", "", "1,64", "tls", false, false)
	if err != nil {
		t.Fatal(err)
	}
	want := []workload{
		{Prefetch: 16, Body: 100, Workers: 1, TLS: true},
		{Prefetch: 256, Body: 100, Workers: 1, TLS: true},
		{Prefetch: 256, Body: 100, Workers: 64, TLS: true},
	}
	if !slices.Equal(ws, want) {
		t.Errorf("got %v, want %v", ws, want)
	}
	for _, bad := range []string{"0", "-1", "many", "1,,2"} {
		if _, err := workloads(bad, "", "", "", false, false); err == nil {
			t.Errorf("prefetch %q passed", bad)
		}
	}
	if _, err := pick(throughputVariants, "driver,nobody"); err == nil {
		t.Error("an unknown variant passed")
	}
}

func TestGrouped(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := grouped(v); got != want {
			t.Errorf("grouped(%v) = %q, want %q", v, got, want)
		}
	}
}

func TestChartIsWellFormed(t *testing.T) {
	o := outcome{variant: throughputVariants[1], rate: 123456, rateRatio: 3.2}
	svg := chart([]comparison{{workload: workload{Prefetch: 64, Body: 100, Workers: 1}, outcomes: []outcome{o}}})
	dec := xml.NewDecoder(strings.NewReader(svg))
	for {
		_, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"3.2×", "123,456", "prefers-color-scheme: dark"} {
		if !strings.Contains(svg, want) {
			t.Errorf("the chart lacks %q", want)
		}
	}
}

func TestGoalIsReachedByLaterArrivalsOnly(t *testing.T) {
	var a arrivals
	a.one()
	g := a.more(2)
	a.one()
	select {
	case <-g.done:
		t.Fatal("one of two has come")
	default:
	}
	a.one()
	a.one() // more than asked for
	if at, err := g.wait(t.Context()); err != nil || at.IsZero() {
		t.Errorf("reached at %v, %v", at, err)
	}
}

func TestGroupsAreInTheReport(t *testing.T) {
	g := groups{
		throughput: []comparison{{workload: workload{Prefetch: 64, Body: 100, Consumers: 1000}, outcomes: []outcome{{variant: groupVariants[1], rate: 123456, ofOne: 0.97}}}},
		further:    []furtherRow{{crowd: crowds[1], further: 1000, cost: furtherCost{Bytes: 12345, Goroutines: 3, Took: 1500 * time.Millisecond}}},
		herds:      []herdRow{{label: "a herd of ten", took: []time.Duration{3 * time.Second, time.Second, 2 * time.Second}}},
		beside:     []besideRow{{crowd: crowds[1], alone: []time.Duration{time.Millisecond}, beside: []time.Duration{2 * time.Millisecond}}},
	}
	var b strings.Builder
	report{groups: g}.markdown(&b)
	for _, want := range []string{
		"## Groups", "### 1000 consumers on one connection", "| 123,456 |", "| 0.97 |", "| 12,345 | 3.0 | 1000 after 1.5 s |",
		"| a herd of ten | 2.0 s | 3.0 s |", "| 1.0 ms | 1.0 ms | 2.0 ms | 2.0 ms |",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, b.String())
		}
	}
	b.Reset()
	report{}.markdown(&b)
	if strings.Contains(b.String(), "Groups") {
		t.Error("the report tells of groups that were not measured")
	}
}

func TestOnlyTheSlowOnesLatenciesCount(t *testing.T) {
	sent := func(size int, ago time.Duration) []byte {
		body := make([]byte, size)
		binary.BigEndian.PutUint64(body[8:], uint64(time.Now().Add(-ago).UnixNano()))
		return body
	}
	var l latencies
	l.each(sent(101, time.Hour)) // before it begins
	l.begin()
	l.each(sent(100, time.Hour)) // the fast one's
	l.each(sent(101, time.Minute))
	if took := l.end(); len(took) != 1 || took[0] < time.Minute || took[0] > 2*time.Minute {
		t.Errorf("latencies %v, want one of a minute", took)
	}
}

// The figure to reach is 16 KiB. Since there are keys, pauses and the like it is 17.2 KiB; the rest is
// for what differs from run to run. The benchmark's own processes measure, built without -race, which
// needs larger stacks.
func TestFurtherConsumerThatIdlesIsSmall(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the benchmark")
	}
	const limitBytes, limitGoroutines = 18 << 10, 2.1
	self := filepath.Join(t.TempDir(), "bench")
	if out, err := exec.Command("go", "build", "-o", self, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	server, err := replay.Start(exec.Command(self, "replay"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	}()
	config, err := json.Marshal(furtherConfig{Variant: "group", Control: server.Control, Further: 500})
	if err != nil {
		t.Fatal(err)
	}
	costs := make([]furtherCost, 3)
	for i := range costs {
		child := exec.Command(self, "further", string(config))
		child.Stderr = os.Stderr
		out, err := child.Output()
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(out, &costs[i]); err != nil {
			t.Fatal(err)
		}
	}
	each := medianCost(costs)
	t.Logf("%.0f bytes, %.2f goroutines", each.Bytes, each.Goroutines)
	if each.Bytes > limitBytes || each.Goroutines > limitGoroutines {
		t.Errorf("%.0f bytes and %.2f goroutines for each further consumer, at most %d and %v", each.Bytes, each.Goroutines, limitBytes, limitGoroutines)
	}
}

func TestRetriesAreInTheReport(t *testing.T) {
	c := comparison{workload: workload{Prefetch: 256, Body: 100, Workers: 16}, outcomes: []outcome{{variant: retryVariants[1], rate: 123456, rateRatio: 0.97}}}
	var b strings.Builder
	report{retries: []comparison{c}, opts: options{rounds: 9}}.markdown(&b)
	for _, want := range []string{"## Retries", "1 % fails once | 123,456 | 0.97 |", "9 alternating rounds of 400,000 messages"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, b.String())
		}
	}
}

func TestOneMessageInAHundredFails(t *testing.T) {
	failing := 0
	for n := range 10_000 {
		failing += int(kitConfig{Body: 100}.body(n)[0])
	}
	if failing != 100 {
		t.Errorf("%d of 10,000 messages fail, want 100", failing)
	}
}
