package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// suite is a package of tests.
type suite struct {
	folder  string // relative to the root
	program string // what `go test -c` names its program
	args    []string
	limit   time.Duration // a run that takes longer is caught
}

// judge builds the tests with a slip in them and runs them.
type judge struct {
	root, dir         string
	wire, top, behave *suite
	simulation        *suite // nil for none
}

// errDoesNotBuild says that the compiler refuses the slip, which is no slip then.
var errDoesNotBuild = errors.New("it does not build")

// newJudge lets the tests run without a slip: they must pass, and show how long they take.
func newJudge(ctx context.Context, root string, seeds int) (*judge, error) {
	dir, err := os.MkdirTemp("", "slips")
	if err != nil {
		return nil, err
	}
	quick := []string{"-test.short", "-test.failfast", "-test.v"}
	j := &judge{
		root: root, dir: dir,
		wire:   &suite{folder: "internal/wire", program: "wire.test", args: quick},
		top:    &suite{folder: ".", program: "steadymq.test", args: quick},
		behave: &suite{folder: "internal/behaviour", program: "behaviour.test", args: quick},
	}
	if seeds > 0 {
		j.simulation = &suite{
			folder: "internal/sim", program: "sim.test", limit: time.Minute + time.Duration(seeds)*6*time.Second,
			args: []string{"-test.v", "-test.run", "^TestSim$", "-seeds", strconv.Itoa(seeds), "-failures", "1", "-shrink=false", "-stuck", "60s"},
		}
	}
	all := []*suite{j.wire, j.top, j.behave}
	err = j.build(ctx, dir, "", all...)
	for _, s := range all {
		if err != nil {
			break
		}
		s.limit = 10 * time.Minute
		start := time.Now()
		by := ""
		if by, err = j.run(ctx, dir, s); err == nil && by != "" {
			err = fmt.Errorf("%s fails without any slip: %s", s.folder, by)
		}
		s.limit = time.Minute + 3*time.Since(start) // the machine may have other things to do
	}
	if err != nil {
		j.close()
		return nil, err
	}
	return j, nil
}

func (j *judge) close() { _ = os.RemoveAll(j.dir) }

// verdict is what came of a slip.
type verdict struct {
	by   string // the test that caught it, "" if none did
	once bool   // and did not catch it again when it ran alone
	took time.Duration
}

var topTest = regexp.MustCompile(` ((?:Test|Example|Fuzz)\w+)(?:/\S*?)?(?:, which does not end)?$`)

// onlyOnce says whether the test that caught a slip, or did not end, lets it through when it runs
// alone: then it may have been the machine and not the slip.
func (j *judge) onlyOnce(ctx context.Context, dir string, s *suite, by string) (bool, error) {
	found := topTest.FindStringSubmatch(by)
	if found == nil || s == j.simulation || found[1] == "TestMain" {
		return false, nil
	}
	alone := *s
	alone.args = append(slices.Clone(s.args), "-test.run", "^"+found[1]+"$")
	again, err := j.run(ctx, dir, &alone)
	return again == "", err
}

// try plants the slip and lets the tests run, the cheap ones first. The simulation gets what they
// let through, if it should.
func (j *judge) try(ctx context.Context, s *slip, simulate bool) (v verdict, err error) {
	start := time.Now()
	defer func() { v.took = time.Since(start) }()
	dir, err := os.MkdirTemp(j.dir, "slip")
	if err != nil {
		return v, err
	}
	defer os.RemoveAll(dir)
	overlay, err := s.overlay(dir)
	if err != nil {
		return v, err
	}
	rounds := [][]*suite{{j.top, j.behave}} // each built in one go
	if strings.HasPrefix(s.file.name, j.wire.folder+"/") {
		rounds = [][]*suite{{j.wire}, {j.top, j.behave}}
	}
	if simulate && j.simulation != nil {
		rounds = append(rounds, []*suite{j.simulation})
	}
	for _, round := range rounds {
		if err := j.build(ctx, dir, overlay, round...); err != nil {
			return v, err
		}
		for _, tests := range round {
			if v.by, err = j.run(ctx, dir, tests); err != nil {
				return v, err
			}
			if v.by != "" {
				v.once, err = j.onlyOnce(ctx, dir, tests, v.by)
				return v, err
			}
		}
	}
	return v, nil
}

// overlay writes the changed file and the list of it for the compiler.
func (s *slip) overlay(dir string) (string, error) {
	changed := filepath.Join(dir, "changed.go")
	if err := os.WriteFile(changed, []byte(s.changed()), 0o600); err != nil {
		return "", err
	}
	list, err := json.Marshal(map[string]any{"Replace": map[string]string{s.file.path: changed}})
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "overlay.json")
	return path, os.WriteFile(path, list, 0o600)
}

func (j *judge) build(ctx context.Context, dir, overlay string, suites ...*suite) error {
	args := []string{"test", "-c", "-vet=off", "-ldflags=-s -w", "-o", dir + string(filepath.Separator)}
	if overlay != "" {
		args = append(args, "-overlay", overlay)
	}
	for _, s := range suites {
		args = append(args, "./"+s.folder)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Env = j.root, append(os.Environ(), "GOTMPDIR="+j.dir)
	ownGroup(cmd)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("%w: %w\n%s", errDoesNotBuild, err, out)
	}
	return nil
}

// run returns the first test that failed, "" if all passed.
func (j *judge) run(ctx context.Context, dir string, s *suite) (by string, err error) {
	limited, cancel := context.WithTimeout(ctx, s.limit+30*time.Second) // if its own limit does not end it
	defer cancel()
	cmd := withMemoryLimit(limited, filepath.Join(dir, s.program), append([]string{"-test.timeout", s.limit.String()}, s.args...)...)
	cmd.Dir = filepath.Join(j.root, filepath.FromSlash(s.folder))
	cmd.Env = append(os.Environ(), "TMPDIR="+dir) // what a killed test leaves goes with the slip
	cmd.WaitDelay = 5 * time.Second
	ownGroup(cmd)
	out, in := io.Pipe()
	cmd.Stdout, cmd.Stderr = in, in
	o := new(outcome)
	read := make(chan struct{})
	go func() {
		defer close(read)
		o.read(out)
	}()
	err = cmd.Run()
	_ = in.Close()
	<-read
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err == nil:
		return "", nil
	case limited.Err() != nil, errors.As(err, &exit), errors.Is(err, exec.ErrWaitDelay):
		return o.name(s.folder), nil
	}
	return "", err
}

// outcome is what the output of a test program says.
type outcome struct {
	running string // the test that began last
	failed  string // the first that failed
	judged  string // what the simulation complained about
	fatal   string // what ended the program
}

var (
	runLine     = regexp.MustCompile(`^=== (?:RUN|CONT|NAME)\s+(\S+)`)
	failLine    = regexp.MustCompile(`^\s*--- FAIL: (\S+)`)
	hungLine    = regexp.MustCompile(`^\t+((?:Test|Example|Fuzz)\S+) \(.*\)$`)
	judgedLine  = regexp.MustCompile(`^\s*([A-Za-z0-9]+) at [0-9a-z.]+: `)
	leakLine    = "goleak: Errors on successful test run"
	fatalPrefix = []string{"panic: ", "fatal error: "}
)

func (o *outcome) read(r io.Reader) {
	for lines := bufio.NewReader(r); ; {
		line, err := lines.ReadString('\n')
		o.line(strings.TrimRight(line, "\r\n"))
		if err != nil {
			return
		}
	}
}

func (o *outcome) line(line string) {
	if found := runLine.FindStringSubmatch(line); found != nil {
		o.running = found[1]
	}
	if found := failLine.FindStringSubmatch(line); found != nil && (o.failed == "" || strings.HasPrefix(found[1], o.failed+"/")) {
		o.failed = found[1]
	}
	if found := hungLine.FindStringSubmatch(line); found != nil && o.fatal != "" {
		o.running = found[1]
	}
	if found := judgedLine.FindStringSubmatch(line); found != nil && o.judged == "" {
		o.judged = found[1]
	}
	for _, prefix := range fatalPrefix {
		if o.fatal == "" && strings.HasPrefix(line, prefix) {
			o.fatal = short(line)
		}
	}
	if o.fatal == "" && strings.Contains(line, leakLine) {
		o.fatal, o.running = "goroutines left", "TestMain"
	}
}

// name says which test it was, and of which package.
func (o *outcome) name(folder string) string {
	name := cmp.Or(o.failed, o.running, "no test")
	switch {
	case strings.HasPrefix(name, "TestSim"):
		if o.judged != "" {
			name += ", " + o.judged
		}
	case strings.Contains(o.fatal, "test timed out"):
		name += ", which does not end"
	}
	return folder + " " + name
}
