package sim_test

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// repository is the root of the repository, from this folder, in which the judge's code is.
const repository = "../.."

var (
	printedInvariant = regexp.MustCompile(`(?:note|violate)\("(\w+)", "((?:[^"\\]|\\.)*)"`)
	printedElsewise  = regexp.MustCompile(`"(I\d+)(?: at the end|: seed)`)
	formatVerb       = regexp.MustCompile(`%\+?[a-z]`)
	describedHeading = regexp.MustCompile(`^## (\w+): `)
	describedAsARow  = regexp.MustCompile("^\\| `([^`]+)` \\|")
)

// invariants are the texts that can be printed, by the name of what they violate.
type invariants map[string][]string

func (all invariants) add(name string, texts ...string) {
	for _, text := range texts {
		if !slices.Contains(all[name], text) {
			all[name] = append(all[name], text)
		}
	}
	if len(texts) == 0 && all[name] == nil {
		all[name] = []string{}
	}
	slices.Sort(all[name])
}

// printedInvariants reads what the judge's code can print.
func printedInvariants(t *testing.T) invariants {
	files, err := filepath.Glob("*_test.go")
	require.NoError(t, err)
	all := make(invariants)
	for _, name := range files {
		code, err := os.ReadFile(name)
		require.NoError(t, err)
		for _, m := range printedInvariant.FindAllStringSubmatch(string(code), -1) {
			text := formatVerb.ReplaceAllString(m[2], "…")
			all.add(m[1], strings.ReplaceAll(text, `\n`, " "))
		}
		for _, m := range printedElsewise.FindAllStringSubmatch(string(code), -1) {
			all.add(m[1])
		}
	}
	return all
}

// describedInvariants reads what docs/INVARIANTS.md describes.
func describedInvariants(t *testing.T) invariants {
	text, err := os.ReadFile(filepath.Join(repository, "docs", "INVARIANTS.md"))
	require.NoError(t, err)
	all, name := make(invariants), ""
	for line := range strings.Lines(string(text)) {
		if m := describedHeading.FindStringSubmatch(line); m != nil {
			name = m[1]
			all.add(name)
		}
		if m := describedAsARow.FindStringSubmatch(line); m != nil {
			all.add(name, m[1])
		}
	}
	return all
}

func TestInvariantsAreDescribed(t *testing.T) {
	printed, described := printedInvariants(t), describedInvariants(t)
	require.Greater(t, len(printed), 10, "the judge's code is not where this test looks")
	assert.Equal(t, slices.Sorted(maps.Keys(printed)), slices.Sorted(maps.Keys(described)))
	for name, texts := range printed {
		assert.Equal(t, texts, described[name], "of %s, in the code and in docs/INVARIANTS.md", name)
	}
}
