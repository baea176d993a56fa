// Command benchdiff runs a benchmark of two checkouts alternately on this machine, and fails if
// the second has lost more than a limit against the first.
//
//	go run ./scripts/benchdiff ../base .
//
// Only what runs side by side can be compared: another machine, or the same an hour later, differs
// by more than what is looked for. The other lines of the benchmark are printed too: if they moved
// as much, it is the machine.
package main

import (
	"bufio"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

type options struct {
	pkg, bench, benchtime string
	unit, judged          string
	rounds                int
	limit                 float64
}

func main() {
	var o options
	flag.StringVar(&o.pkg, "pkg", "./bench", "the package of the benchmark")
	flag.StringVar(&o.bench, "bench", "^BenchmarkDispatch$", "the benchmark")
	flag.StringVar(&o.benchtime, "benchtime", "800000x", "how long each line runs in a round")
	flag.StringVar(&o.unit, "unit", "cpu-ns/op", "what is compared; less is better")
	flag.StringVar(&o.judged, "judged", "consumer=steadymq", "only lines whose name contains this are judged")
	flag.IntVar(&o.rounds, "rounds", 10, "how often each checkout runs")
	flag.Float64Var(&o.limit, "limit", 10, "the loss of the median that is borne, in percent")
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "usage: benchdiff [flags] BASE HEAD")
		os.Exit(2)
	}
	switch err := run(os.Stdout, o, flag.Arg(0), flag.Arg(1)); {
	case errors.Is(err, errLoss):
		fmt.Fprintln(os.Stderr, "benchdiff:", err)
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "benchdiff:", err)
		os.Exit(2)
	}
}

// errLoss says that the head has lost too much.
var errLoss = errors.New("the head is slower than the limit allows")

func run(w io.Writer, o options, base, head string) error {
	dir, err := os.MkdirTemp("", "benchdiff")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	sides := []*side{{name: "base", checkout: base}, {name: "head", checkout: head}}
	for _, s := range sides {
		if err := s.build(dir, o); err != nil {
			return err
		}
	}
	for range o.rounds {
		for _, s := range sides {
			if err := s.measure(o); err != nil {
				return err
			}
		}
		slices.Reverse(sides) // neither is always the first
	}
	slices.SortFunc(sides, func(a, b *side) int { return cmp.Compare(a.name, b.name) })
	return o.compare(w, sides[0].values, sides[1].values)
}

// side is one of the two checkouts.
type side struct {
	name, checkout string
	binary         string
	values         samples
}

// samples are the values of the unit, by the name of the line.
type samples map[string][]float64

// build compiles the benchmark once, so that no round measures a compiler beside it.
func (s *side) build(dir string, o options) error {
	s.binary, s.values = filepath.Join(dir, s.name), make(samples)
	cmd := exec.Command("go", "test", "-c", "-o", s.binary, o.pkg)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.checkout, os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: go test -c: %w", s.name, err)
	}
	return nil
}

// measure runs the benchmark once.
func (s *side) measure(o options) error {
	cmd := exec.Command(s.binary, "-test.run", "^$", "-test.bench", o.bench, "-test.benchtime", o.benchtime)
	cmd.Dir, cmd.Stderr = filepath.Join(s.checkout, o.pkg), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", s.name, err, out)
	}
	return s.values.read(strings.NewReader(string(out)), o.unit)
}

// read takes the values of a unit out of what a benchmark prints:
//
//	BenchmarkName-8   800000   1234 ns/op   567 cpu-ns/op
func (v samples) read(r io.Reader, unit string) error {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) < 4 || !strings.HasPrefix(words[0], "Benchmark") {
			continue
		}
		for i := 2; i+1 < len(words); i += 2 {
			if words[i+1] != unit {
				continue
			}
			value, err := strconv.ParseFloat(words[i], 64)
			if err != nil {
				return fmt.Errorf("%q: %w", lines.Text(), err)
			}
			v[words[0]] = append(v[words[0]], value)
		}
	}
	return lines.Err()
}

// compare prints the medians, and judges those that are to be judged.
func (o options) compare(w io.Writer, base, head samples) error {
	judged, lost := 0, false
	for _, name := range slices.Sorted(maps.Keys(head)) {
		if len(base[name]) == 0 {
			fmt.Fprintf(w, "%s: %.1f %s, new\n", name, median(head[name]), o.unit)
			continue
		}
		before, after := median(base[name]), median(head[name])
		loss := (after/before - 1) * 100
		verdict := "not judged"
		if strings.Contains(name, o.judged) {
			judged++
			verdict = "ok"
			if after > before*(1+o.limit/100) {
				verdict, lost = fmt.Sprintf("FAIL: more than %g %%", o.limit), true
			}
		}
		fmt.Fprintf(w, "%s: %.1f -> %.1f %s, %+.1f %%, %s\n", name, before, after, o.unit, loss, verdict)
	}
	for _, name := range slices.Sorted(maps.Keys(base)) {
		if len(head[name]) == 0 {
			fmt.Fprintf(w, "%s: %.1f %s, gone\n", name, median(base[name]), o.unit)
		}
	}
	switch {
	case judged == 0:
		return fmt.Errorf("nothing to compare: no line with %q and %s on both sides", o.judged, o.unit)
	case lost:
		return errLoss
	}
	return nil
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}
