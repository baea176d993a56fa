package sim_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestNumbersOfTheREADMEAreThoseOfTheTests(t *testing.T) {
	text, err := os.ReadFile(inRoot("README.md"))
	require.NoError(t, err)
	scripts, err := filepath.Glob(inRoot("steadymqtest/testdata/rabbitmq-4.3/*.txt"))
	require.NoError(t, err)
	for _, number := range []string{
		fmt.Sprintf("faults of %d kinds", len(simKinds)),
		fmt.Sprintf("| %d slips", len(mutants)),
		fmt.Sprintf("| %d scripts", len(scripts)),
	} {
		assert.True(t, strings.Contains(string(text), number), "the README does not say %q", number)
	}
}

// Users look for an option in the README's table and in the list of go doc.
func TestEveryOptionIsListedForUsers(t *testing.T) {
	source, err := os.ReadFile(inRoot("options.go"))
	require.NoError(t, err)
	options := regexp.MustCompile(`(?m)^func (With\w+)\(`).FindAllStringSubmatch(string(source), -1)
	require.NotEmpty(t, options)
	for file, form := range map[string]string{"README.md": "`%s`", "doc.go": "//   - [%s] "} {
		text, err := os.ReadFile(inRoot(file))
		require.NoError(t, err)
		list := string(text)
		if file == "README.md" {
			_, list, _ = strings.Cut(list, "\n## Options\n")
			list, _, _ = strings.Cut(list, "\n## ")
		}
		for _, option := range options {
			assert.True(t, strings.Contains(list, fmt.Sprintf(form, option[1])), "%s is not in the list of options in %s", option[1], file)
		}
	}
}

// goBlocks returns the Go code of a document.
func goBlocks(t *testing.T, path string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	var blocks []string
	for _, found := range regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		blocks = append(blocks, found[1])
	}
	return blocks
}

// asProgram makes a file of a block: one that is a whole program as it is, declarations and
// statements with what they need around them.
func asProgram(block string, number int) string {
	if strings.HasPrefix(block, "package ") {
		return block
	}
	const imports = `package readme

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/middleware"
	"github.com/steadymq/steadymq/steadymqtest"
)

var (
	_ context.Context
	_ *testing.T
	_ = synctest.Test
	_ *steadymq.Consumer
	_ *steadymqtest.Broker
	_ time.Duration
	_ = middleware.Permanent
)

`
	if strings.HasPrefix(block, "func ") {
		return imports + block
	}
	used := strings.Replace(block, "// ... run it, then:", "_, _ = c, err", 1)
	return imports + fmt.Sprintf("func example%d(t *testing.T) {\n%s}\n", number, used)
}

func TestGoCodeOfTheREADMECompiles(t *testing.T) {
	blocks := goBlocks(t, inRoot("README.md"))
	require.NotEmpty(t, blocks)
	dir, err := os.MkdirTemp(inRoot("examples"), "readme-") // inside the module, so that imports are found
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	for i, block := range blocks {
		of := filepath.Join(dir, strconv.Itoa(i))
		require.NoError(t, os.Mkdir(of, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(of, "code.go"), []byte(asProgram(block, i)), 0o600))
		out, err := exec.Command("go", "vet", "./"+of).CombinedOutput()
		assert.NoError(t, err, "block %d of the README:\n%s\n%s", i+1, block, out)
	}
}
