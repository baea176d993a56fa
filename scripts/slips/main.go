// Command slips plants slips into the library, one at a time, and tells which of them the quick
// tests catch: those of the root, of internal/wire and of internal/behaviour, and the simulation
// for what those let through. A slip is a small change as a tired hand makes it: a condition
// negated, an assignment forgotten, two arguments swapped. It is made from the source as it
// stands, by chance, so that it says how well the tests see what nobody thought of; the planted
// bugs of internal/sim are chosen by hand. The tree itself is never touched.
//
//	go run ./scripts/slips                   # 150 slips; exit status 1 if less than 90 % are caught
//	go run ./scripts/slips -n 20 -seed 7     # 20 others
//	go run ./scripts/slips -list             # only say which
//	go run ./scripts/slips -n 5 -only stats.go:3 # 5 of those whose line in the list holds this text
//
// What survives and changes nothing stands in equivalent.txt with the reason.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	// wanted is the part of the slips that has to be caught, in percent.
	wanted = 90

	plantedTable   = "internal/sim/mutants_test.go"
	equivalentFile = "scripts/slips/equivalent.txt"
)

type options struct {
	seed  uint64
	n     int
	seeds int
	jobs  int
	list  bool
	only  string
}

func main() {
	var o options
	flag.Uint64Var(&o.seed, "seed", 1, "draw the slips that belong to this number")
	flag.IntVar(&o.n, "n", 150, "how many slips to plant")
	flag.IntVar(&o.seeds, "seeds", 300, "how many seeds the simulation tries on what the tests let through; 0 for none")
	flag.IntVar(&o.jobs, "j", 1, "how many slips to try at the same time")
	flag.BoolVar(&o.list, "list", false, "only say which slips would be planted")
	flag.StringVar(&o.only, "only", "", "draw only from the slips whose line in the list contains this")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Stdout, o)
	stop()
	switch {
	case errors.Is(err, errTooFew):
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "slips:", err)
		os.Exit(2)
	}
}

// errTooFew says that too many slips survived; which has been printed.
var errTooFew = errors.New("too few slips are caught")

func run(ctx context.Context, w io.Writer, o options) error {
	root, err := filepath.Abs(".")
	if err != nil {
		return err
	}
	packages, err := load(root, ".", "./internal/wire")
	if err != nil {
		return err
	}
	planted, err := readPlanted(filepath.Join(root, plantedTable))
	if err != nil {
		return err
	}
	all := candidates(packages, planted)
	equivalents, err := readEquivalents(filepath.Join(root, equivalentFile))
	if err != nil {
		return err
	}
	if err := equivalents.match(all); err != nil {
		return err
	}
	if all = only(all, o.only); len(all) == 0 {
		return fmt.Errorf("there is no slip whose line in the list contains %q", o.only)
	}
	d := newDrawer(all, o.seed)
	drawn := d.draw(o.n)
	if o.list {
		for _, s := range drawn {
			fmt.Fprintln(w, s.listed())
		}
		return nil
	}
	j, err := newJudge(ctx, root, o.seeds)
	if err != nil {
		return err
	}
	defer j.close()
	return try(ctx, w, o, j, d, drawn, equivalents)
}

// try plants each slip and prints the table and what is left of it.
func try(ctx context.Context, w io.Writer, o options, j *judge, d *drawer, drawn []*slip, equivalents equivalents) error {
	var (
		mu       sync.Mutex
		s        sums
		workers  sync.WaitGroup
		failures []error
		turn     = make(chan *slip)
	)
	fmt.Fprintf(w, "| %-4s | slip | kind | before -> after | caught by | s |\n|---|---|---|---|---|---|\n", "#")
	another := func(f *source) *slip {
		mu.Lock()
		defer mu.Unlock()
		return d.next(f)
	}
	for range max(o.jobs, 1) {
		workers.Go(func() {
			for sl := range turn {
				sl, v, err := plant(ctx, j, sl, equivalents, another)
				mu.Lock()
				if err != nil {
					failures = append(failures, fmt.Errorf("%s: %w", sl, err))
				} else {
					s.add(w, sl, v, equivalents[sl.String()])
				}
				mu.Unlock()
			}
		})
	}
feed:
	for _, sl := range drawn {
		select {
		case turn <- sl:
		case <-ctx.Done():
			break feed
		}
	}
	close(turn)
	workers.Wait()
	enough := s.report(w)
	if ctx.Err() != nil {
		return errors.New("interrupted, the table is not complete")
	}
	if err := errors.Join(failures...); err != nil {
		return err
	}
	if !enough {
		return errTooFew
	}
	return nil
}

// plant tries a slip. One that the compiler refuses, though the types are right, is replaced by
// another of its file, a few times: then it is something else that does not build.
func plant(ctx context.Context, j *judge, sl *slip, equivalents equivalents, another func(*source) *slip) (*slip, verdict, error) {
	for left := 3; ; left-- {
		v, err := j.try(ctx, sl, equivalents[sl.String()] == "")
		if !errors.Is(err, errDoesNotBuild) || left == 0 {
			return sl, v, err
		}
		next := another(sl.file)
		if next == nil {
			return sl, v, err
		}
		sl = next
	}
}

// sums are the figures of a run.
type sums struct {
	all, caught int
	survivors   []*slip
	harmless    []*slip // survived, and equivalent.txt says why
	once        []*slip // caught, but not when the test ran alone, which does not count
	wrong       []*slip // equivalent.txt says that they change nothing, and a test caught them
}

func (s *sums) add(w io.Writer, sl *slip, v verdict, reason string) {
	s.all++
	by := v.by
	switch {
	case v.once:
		by += ", but not alone"
		s.once = append(s.once, sl)
	case v.by != "":
		s.caught++
		if reason != "" {
			s.wrong = append(s.wrong, sl)
		}
	case reason != "":
		by = "changes nothing"
		s.harmless = append(s.harmless, sl)
	default:
		by = "NOT CAUGHT"
		s.survivors = append(s.survivors, sl)
	}
	cell := func(text string) string { return strings.ReplaceAll(text, "|", `\|`) }
	fmt.Fprintf(w, "| %4d | %s | %s | %s | %s | %.0f |\n",
		s.all, sl.place(), sl.kind, cell(sl.change()), cell(by), v.took.Round(time.Second).Seconds())
}

// report prints what is left of the table, and says whether enough slips were caught.
func (s *sums) report(w io.Writer) bool {
	if len(s.survivors) > 0 {
		fmt.Fprintf(w, "\nnot caught:\n")
	}
	for _, sl := range s.survivors {
		fmt.Fprintf(w, "%s\n\tline %d, %s\n", sl, sl.line, sl.kind)
	}
	if len(s.wrong) > 0 {
		fmt.Fprintf(w, "\ncaught, though %s says that they change nothing; take them out of it:\n", equivalentFile)
	}
	for _, sl := range s.wrong {
		fmt.Fprintf(w, "%s\n", sl)
	}
	if len(s.once) > 0 {
		fmt.Fprintf(w, "\ncaught by a test that let them through when it ran alone, so they do not count; look whether it was the slip or the machine:\n")
	}
	for _, sl := range s.once {
		fmt.Fprintf(w, "%s\n", sl)
	}
	that := s.all - len(s.harmless)
	rate := 100.0
	if that > 0 {
		rate = 100 * float64(s.caught) / float64(that)
	}
	fmt.Fprintf(w, "\n%d slips, %d of them change nothing; %d of the other %d are caught: %.1f %%\n",
		s.all, len(s.harmless), s.caught, that, rate)
	return rate >= wanted && len(s.wrong) == 0
}
