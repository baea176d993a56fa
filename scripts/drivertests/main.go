// Command drivertests runs the integration tests of the driver, github.com/rabbitmq/amqp091-go, against the kit over TCP: what they
// ask of a RabbitMQ, the kit answers, too.
//
//	go run ./scripts/drivertests
//
// The tests run in a copy of the driver's module, as it is in go.mod, because the module cache is read-only.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/steadymq/steadymq/steadymqtest"
)

const driver = "github.com/rabbitmq/amqp091-go"

// limit is how long the tests may take.
const limit = "2m"

// leftOut are the tests that the kit cannot pass, each with the reason.
var leftOut = map[string]string{
	"TestIntegrationTxCommit":                      "the kit has no transactions",
	"TestIntegrationTxRollback":                    "the kit has no transactions",
	"TestConnection_Close_WhenMemoryAlarmIsActive": "needs rabbitmqctl",
	"TestConnectionRecovery.*":                     "drop their connections through the management API",
}

func main() {
	if err := run(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "drivertests:", err)
		os.Exit(1)
	}
}

func run(w io.Writer) error {
	dir, err := os.MkdirTemp("", "drivertests-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := copyModule(dir); err != nil {
		return err
	}
	names, err := integrationTests(dir)
	if err != nil {
		return err
	}
	chosen, err := choose(names, leftOut)
	if err != nil {
		return err
	}
	b := steadymqtest.NewBroker(nil, steadymqtest.WithoutLedger())
	defer b.Close()
	tests := exec.Command("go", "test", "-tags", "integration", "-count", "1", "-timeout", limit, "-v", "-run", "^("+strings.Join(chosen, "|")+")$", ".")
	tests.Dir = dir
	tests.Env = append(os.Environ(), "AMQP_URL="+b.Listen(), "GOFLAGS=", "GOWORK=off")
	out, err := tests.CombinedOutput()
	return judge(w, string(out), err, chosen)
}

// copyModule puts the source of the driver into dir.
func copyModule(dir string) error {
	out, err := exec.Command("go", "mod", "download", "-json", driver).Output()
	if err != nil {
		return fmt.Errorf("go mod download: %w", err)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		return fmt.Errorf("go mod download: %w", err)
	}
	if err := os.CopyFS(dir, os.DirFS(module.Dir)); err != nil {
		return fmt.Errorf("copying the driver: %w", err)
	}
	return nil
}

var (
	tagged   = regexp.MustCompile(`(?m)^//go:build integration$`)
	testFunc = regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)
)

// integrationTests are the tests in the files with that build tag.
func integrationTests(dir string) (names []string, err error) {
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if !tagged.Match(text) {
			continue
		}
		for _, m := range testFunc.FindAllSubmatch(text, -1) {
			names = append(names, string(m[1]))
		}
	}
	return names, nil
}

// choose takes those that are not left out. What leaves out nothing has lost its reason.
func choose(names []string, leftOut map[string]string) (chosen []string, err error) {
	used := map[string]bool{}
	for _, name := range names {
		out := false
		for pattern := range leftOut {
			if ok, _ := regexp.MatchString("^"+pattern+"$", name); ok {
				used[pattern], out = true, true
			}
		}
		if !out {
			chosen = append(chosen, name)
		}
	}
	for pattern, why := range leftOut {
		if !used[pattern] {
			return nil, fmt.Errorf("%s is left out (%s) and does not exist", pattern, why)
		}
	}
	if len(chosen) == 0 {
		return nil, errors.New("there are no integration tests")
	}
	return chosen, nil
}

// judge demands that every chosen test has passed.
func judge(w io.Writer, out string, err error, chosen []string) error {
	passed := regexp.MustCompile(`(?m)^--- PASS: (\w+) `).FindAllStringSubmatch(out, -1)
	missing := slices.DeleteFunc(slices.Clone(chosen), func(name string) bool {
		return slices.ContainsFunc(passed, func(m []string) bool { return m[1] == name })
	})
	if err != nil || len(missing) > 0 {
		fmt.Fprint(w, out)
		return errors.Join(err, fmt.Errorf("not passed: %s", strings.Join(missing, ", ")))
	}
	fmt.Fprintf(w, "%d integration tests of %s pass against the kit\n", len(chosen), driver)
	return nil
}
