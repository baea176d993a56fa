package main

import (
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const testdata = module + "/scripts/floors/testdata/"

func surveyed(t *testing.T, path string, rooms ...room) (*loaded, *house) {
	l, err := load(".", "./testdata/"+path+"/...")
	require.NoError(t, err)
	h, err := l.survey(testdata+path, rooms)
	require.NoError(t, err)
	return l, h
}

// broken is testdata/house with the order that it breaks.
func broken(t *testing.T) (*loaded, *house) {
	return surveyed(t, "house",
		room{"low.go", "low_plan9.go"}, room{"middle.go", "middle_too.go"}, room{"absent.go"}, room{"high.go"})
}

func TestEachBreakIsNamed(t *testing.T) {
	_, h := broken(t)
	var out strings.Builder
	assert.True(t, h.report(&out))
	assert.Equal(t, `up: low.go -> high.go: roof (low.go:9), roof.raise (low.go:10), roof.height (low.go:11), limit (low.go:11)
up: low_plan9.go -> high.go: limit (low_plan9.go:8)
astray: high.go: method astray of type base, which stands in low.go
unlisted.go: on no floor; give it one in scripts/floors/main.go
absent.go: has a floor in scripts/floors/main.go, and is not there
arrows up: 2, methods astray: 1
`, out.String())
}

func TestFileOnTwoFloorsIsNamed(t *testing.T) {
	_, h := surveyed(t, "sound", room{"low.go"}, room{"high.go"}, room{"low.go"})
	assert.Equal(t, []string{"low.go"}, h.twice)
	assert.True(t, h.report(io.Discard))
}

func TestWhatIsEmbeddedIsUsed(t *testing.T) {
	_, h := broken(t)
	for _, a := range h.arrows {
		if a.from == "high.go" && a.to == "middle.go" { // r.count goes through wall.base
			assert.Equal(t, "high.go -> middle.go: wall (high.go:6), base (high.go:12)", a.String())
			return
		}
	}
	t.Error("no arrow from high.go to middle.go")
}

func TestArrowsBetweenRoomsAreCounted(t *testing.T) {
	_, h := broken(t)
	var out strings.Builder
	h.printAll(&out)
	assert.Equal(t, `low.go+1 -> high.go 5  up
middle.go+1 -> low.go+1 2
high.go -> low.go+1 3
high.go -> middle.go+1 2
unlisted.go -> high.go 1
arrows between 5 rooms: 5
`, out.String())
}

func TestOrderHasFewArrowsUp(t *testing.T) {
	_, h := broken(t)
	var out strings.Builder
	h.printOrder(&out)
	assert.Equal(t, `	// a circle of 3
	{"low.go", "low_plan9.go"},
	{"middle.go", "middle_too.go"},
	{"high.go"},
	// its end
	{"absent.go"},
	{"unlisted.go"},
arrows up in this order: 1
`, out.String())
}

func TestSoundHouseHasNothingToReport(t *testing.T) {
	l, h := surveyed(t, "sound", room{"low.go"}, room{"high.go"})
	var out strings.Builder
	assert.False(t, h.report(&out))
	assert.Empty(t, out.String())
	wrong, err := l.imports(testdata+"sound", rules)
	require.NoError(t, err)
	assert.Empty(t, wrong)
}

func TestForbiddenImportsAreNamed(t *testing.T) {
	l, _ := broken(t)
	wrong, err := l.imports(strings.TrimSuffix(testdata, "/")+"/house", []rule{
		{patterns{"wire/..."}, patterns{"./...", "!wire/..."}, "it is the lowest"},
		{patterns{"./...", "!harness/..."}, patterns{"harness/..."}, "it is for tests"},
		{patterns{"harness"}, patterns{"."}, "it imports nothing"},
	})
	require.NoError(t, err)
	assert.ElementsMatch(t, []string{
		"package " + testdata + "house imports harness: it is for tests",
		"package wire imports " + testdata + "house: it is the lowest",
		"package tool imports harness: it is for tests",
	}, wrong)
}

func TestRuleForNobodyIsNamed(t *testing.T) {
	l, _ := broken(t)
	assert.Equal(t, []string{
		`rule "it has moved": no package matches wires/...`,
		`rule "it is gone": no package matches !gone`,
		`rule "it is the standard library's": no package matches fmt`,
	}, l.idle(strings.TrimSuffix(testdata, "/")+"/house", []rule{
		{patterns{"wire/..."}, patterns{"."}, "it is there"},
		{patterns{"wires/..."}, patterns{"./..."}, "it has moved"},
		{patterns{"."}, patterns{"./...", "!gone"}, "it is gone"},
		{patterns{"fmt"}, patterns{"."}, "it is the standard library's"},
	}))
}

func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		patterns patterns
		path     string
		want     bool
	}{
		{patterns{"."}, "m", true},
		{patterns{"."}, "m/a", false},
		{patterns{"./..."}, "m/a/b", true},
		{patterns{"./..."}, "mm", false},
		{patterns{"a"}, "m/a", true},
		{patterns{"a"}, "m/a/b", false},
		{patterns{"a/..."}, "m/a", true},
		{patterns{"a/..."}, "m/ab", false},
		{patterns{"./...", "!a/..."}, "m/a/b", false},
		{patterns{"./...", "!a/..."}, "fmt", false},
	} {
		assert.Equal(t, c.want, c.patterns.match("m", c.path), "%v %s", c.patterns, c.path)
	}
}
