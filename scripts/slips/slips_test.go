package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var loadSample = sync.OnceValues(func() ([]*pkg, error) {
	root, err := filepath.Abs("testdata/sample")
	if err != nil {
		return nil, err
	}
	return load(root, ".")
})

func sample(t *testing.T, planted ...edit) map[*source][]*slip {
	packages, err := loadSample()
	require.NoError(t, err)
	return candidates(packages, planted)
}

func lines(slips []*slip) (all []string) {
	for _, s := range slips {
		all = append(all, string(s.kind)+"; "+s.String())
	}
	return all
}

func TestSlipsOfEachKindAreMade(t *testing.T) {
	var made []string
	for f, slips := range sample(t) {
		if f.name == "sample.go" {
			made = lines(slips)
		}
	}
	for _, want := range []string{
		`wrong number; sample.go: package: const limit = 10 -> const limit = 0`,
		`wrong number; sample.go: package: const limit = 10 -> const limit = 20`,
		`wrong number; sample.go: package: const limit = 10 -> const limit = 5`,
		`off by one; sample.go: package: const limit = 10 -> const limit = 11`,
		`lost statement; sample.go: box.grow: b.mu.Lock() -> (nothing)`,
		`lost statement; sample.go: box.grow: defer b.mu.Unlock() -> (nothing)`,
		`lost defer or go; sample.go: box.grow: defer b.mu.Unlock() -> b.mu.Unlock()`,
		`negated condition; sample.go: box.grow: if by < 1 || by > most { -> if !(by < 1 || by > most) {`,
		`lost operand; sample.go: box.grow: if by < 1 || by > most { -> if by < 1 {`,
		`lost operand; sample.go: box.grow: if by < 1 || by > most { -> if by > most {`,
		`wrong comparison; sample.go: box.grow: if by < 1 || by > most { -> if by <= 1 || by > most {`,
		`wrong operator; sample.go: box.grow: if by < 1 || by > most { -> if by < 1 && by > most {`,
		`swallowed error; sample.go: box.grow: return errors.New("out of range") -> return nil`,
		`lost assignment; sample.go: box.grow: b.width = by + b.high -> (nothing)`,
		`wrong field; sample.go: box.grow: b.width = by + b.high -> b.width = by + b.width`,
		`wrong operator; sample.go: box.grow: b.width = by + b.high -> b.width = by - b.high`,
		`lost case or else; sample.go: fill: case 0: continue -> (nothing)`,
		`lost case or else; sample.go: fill: case 1, 2: -> case 2:`,
		`lost case or else; sample.go: fill: case 1, 2: -> case 1:`,
		`lost jump; sample.go: fill: continue -> (nothing)`,
		`lost element; sample.go: fill: boxes = append(boxes, &box{width: n, high: limit}) -> boxes = append(boxes, &box{ high: limit})`,
		`lost element; sample.go: fill: boxes = append(boxes, &box{width: n, high: limit}) -> boxes = append(boxes, &box{width: n})`,
		`wrong operator; sample.go: fill: return boxes[:min(len(boxes), limit)] -> return boxes[:max(len(boxes), limit)]`,
		`off by one; sample.go: fill: return boxes[:min(len(boxes), limit)] -> return boxes[:min(len(boxes), limit)+1]`,
	} {
		assert.Contains(t, made, want)
	}
	for f, slips := range sample(t) {
		if f.name == "other.go" {
			assert.Contains(t, lines(slips), `swapped arguments; other.go: first: `+
				`func first(b *box) bool { return b.grow(1, 2) == nil && b.high == 0 } -> `+
				`func first(b *box) bool { return b.grow(2, 1) == nil && b.high == 0 }`)
		}
	}
}

func TestNamesOfSlipsAreUnique(t *testing.T) {
	seen := make(map[string]bool)
	for _, slips := range sample(t) {
		for _, s := range slips {
			assert.False(t, seen[s.String()], "twice: %s", s)
			seen[s.String()] = true
		}
	}
}

func TestSeedDecidesWhatIsDrawn(t *testing.T) {
	drawn := func(seed uint64) []string { return lines(newDrawer(sample(t), seed).draw(12)) }
	assert.Len(t, drawn(1), 12)
	assert.Equal(t, drawn(1), drawn(1))
	assert.NotEqual(t, drawn(1), drawn(2))
}

func TestEveryFileIsDrawnFromAndEachSlipOnceAndCompiling(t *testing.T) {
	d := newDrawer(sample(t), 3)
	seen, files := make(map[string]bool), make(map[string]int)
	for _, s := range d.draw(20) {
		assert.False(t, seen[s.String()], "twice: %s", s)
		assert.True(t, s.file.compiles(s.changed()), "does not compile: %s", s)
		seen[s.String()] = true
		files[s.file.name]++
	}
	assert.Positive(t, files["other.go"])
	assert.Greater(t, files["sample.go"], files["other.go"])
}

func TestOnlySlipsOfTheLineThatIsAskedForAreDrawn(t *testing.T) {
	all := sample(t)
	wanted := newDrawer(all, 3).draw(20)[7].listed()
	require.Equal(t, []string{wanted}, listedOf(newDrawer(only(all, wanted), 1).draw(1)))
	for _, line := range listedOf(newDrawer(only(all, "other.go:"), 1).draw(20)) {
		assert.Contains(t, line, "other.go:")
	}
	assert.Len(t, only(all, ""), len(all))
	assert.Empty(t, only(all, "nowhere.go:"))
}

func listedOf(slips []*slip) (lines []string) {
	for _, s := range slips {
		lines = append(lines, s.listed())
	}
	return lines
}

func TestWhatDoesNotCompileIsNoSlip(t *testing.T) {
	for f := range sample(t) {
		assert.True(t, f.compiles(f.text))
		assert.False(t, f.compiles(f.text+"\nvar _ int = limit == 1\n"))
		assert.False(t, f.compiles(f.text+"}"))
	}
}

func TestPlantedBugsAreNoSlips(t *testing.T) {
	count := func(planted ...edit) (n int) {
		for _, slips := range sample(t, planted...) {
			n += len(slips)
		}
		return n
	}
	same := edit{"sample.go", "if by < 1 || by > most {", "if by < 1 {"}
	assert.Less(t, count(same), count())
	assert.Equal(t, count(), count(edit{"else.go", same.old, same.new}))
	assert.Equal(t, count(), count(edit{"sample.go", "is not there", ""}))
}

func TestTableOfPlantedBugsIsRead(t *testing.T) {
	edits, err := readPlanted(filepath.Join("..", "..", plantedTable))
	require.NoError(t, err)
	source, err := os.ReadFile(filepath.Join("..", "..", plantedTable))
	require.NoError(t, err)
	assert.Greater(t, len(edits), strings.Count(string(source), "\tchange("))
}

func write(t *testing.T, text string) string {
	path := filepath.Join(t.TempDir(), "equivalent.txt")
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func TestEquivalentsHaveReasons(t *testing.T) {
	all, err := readEquivalents(write(t, "# why\na.go: f: x -> y\n\tit is\n\tthe same\n\nb.go: g: x -> y\n\tso\n"))
	require.NoError(t, err)
	assert.Equal(t, equivalents{"a.go: f: x -> y": "it is the same", "b.go: g: x -> y": "so"}, all)
	for text, want := range map[string]string{
		"a: x\n":                "no reason",
		"\tso\n":                "belongs to no slip",
		"a: x\n\tso\na: x\n\ts": "twice",
	} {
		_, err := readEquivalents(write(t, text))
		assert.ErrorContains(t, err, want)
	}
}

func TestEquivalentsThatAreGoneAreRefused(t *testing.T) {
	all := sample(t)
	assert.NoError(t, equivalents{"sample.go: fill: continue -> (nothing)": "so"}.match(all))
	assert.ErrorContains(t, equivalents{"sample.go: fill: break -> (nothing)": "so"}.match(all), "sample.go: fill: break")
}

func TestEquivalentsOfTheLibraryHaveReasons(t *testing.T) {
	_, err := readEquivalents("equivalent.txt")
	assert.NoError(t, err)
}

func TestCatcherIsTheFirstTestThatFailed(t *testing.T) {
	for out, want := range map[string]string{
		"=== RUN   TestA\n--- FAIL: TestA (0.1s)\n    --- FAIL: TestA/b (0.1s)\n--- FAIL: TestC (0s)\n":           ". TestA/b",
		"=== RUN   TestA\npanic: oops\n\ngoroutine 1":                                                             ". TestA",
		"=== RUN   TestA\npanic: test timed out after 1s\n\trunning tests:\n\t\tTestB (1s)\n":                     ". TestB, which does not end",
		"PASS\ngoleak: Errors on successful test run: found\n":                                                    ". TestMain",
		"=== RUN   TestSim\n    I3 at 1m2s: message 4 came twice\n    I5 at 2m: lost\n--- FAIL: TestSim (1.0s)\n": ". TestSim, I3",
		"": ". no test",
	} {
		o := new(outcome)
		o.read(strings.NewReader(out))
		assert.Equal(t, want, o.name("."), out)
	}
}

func TestRateLeavesOutWhatChangesNothing(t *testing.T) {
	var made []*slip
	for f, slips := range sample(t) {
		if f.name == "sample.go" {
			made = slips
		}
	}
	var out strings.Builder
	var s sums
	for i, sl := range made[:11] {
		switch {
		case i == 0:
			s.add(&out, sl, verdict{}, "it is the same")
		case i == 1:
			s.add(&out, sl, verdict{}, "")
		default:
			s.add(&out, sl, verdict{by: ". TestA"}, "")
		}
	}
	assert.True(t, s.report(&out))
	assert.Contains(t, out.String(), "11 slips, 1 of them change nothing; 9 of the other 10 are caught: 90.0 %")
	assert.Contains(t, out.String(), "\nnot caught:\n"+made[1].String()+"\n")

	s.add(&out, made[11], verdict{}, "")
	assert.False(t, s.report(&out), "9 of 11 are too few")
}

func TestWrongEquivalentsFail(t *testing.T) {
	for _, made := range sample(t) {
		var out strings.Builder
		var s sums
		s.add(&out, made[0], verdict{by: ". TestA"}, "it is the same")
		assert.False(t, s.report(&out))
		assert.Contains(t, out.String(), "take them out of it:\n"+made[0].String())
	}
}

func TestCatchThatDoesNotHappenAgainDoesNotCountAndIsNamed(t *testing.T) {
	for _, made := range sample(t) {
		var out strings.Builder
		var s sums
		s.add(&out, made[0], verdict{by: ". TestA", once: true}, "")
		assert.False(t, s.report(&out))
		assert.Contains(t, out.String(), ". TestA, but not alone")
		assert.Contains(t, out.String(), "slip or the machine:\n"+made[0].String())
	}
	for by, want := range map[string]string{
		". TestA": "TestA", "internal/wire TestA/b": "TestA", ". ExampleNew_a": "ExampleNew_a",
		". TestA, which does not end": "TestA", ". no test": "",
	} {
		got := ""
		if found := topTest.FindStringSubmatch(by); found != nil {
			got = found[1]
		}
		assert.Equal(t, want, got, by)
	}
}

// TestWholeGroupEnds needs a shell: where there is none, a test's own processes outlive it.
func TestWholeGroupEnds(t *testing.T) {
	if _, err := exec.LookPath("sh"); err != nil {
		t.Skip("no shell here")
	}
	dir := t.TempDir()
	script := "#!/bin/sh\nsleep 600 &\necho started\nwait\n"
	require.NoError(t, os.WriteFile(filepath.Join(dir, "hung.test"), []byte(script), 0o700))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := (&judge{root: dir}).run(ctx, dir, &suite{folder: ".", program: "hung.test", limit: time.Hour})
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	assert.Less(t, time.Since(start), 4*time.Second, "the sleep holds the output open until it is killed too")
}
