package main

import (
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
)

// candidates are the slips of each file that no planted bug is like.
func candidates(packages []*pkg, planted []edit) map[*source][]*slip {
	all := make(map[*source][]*slip)
	for _, p := range packages {
		for _, f := range p.files {
			slips := slices.DeleteFunc(f.slips(), func(s *slip) bool {
				return slices.ContainsFunc(planted, func(e edit) bool { return e.like(s) })
			})
			if len(slips) > 0 {
				all[f] = slips
			}
		}
	}
	return all
}

// only leaves those whose line in the list contains the text. It comes before the drawing, which
// compiles what it draws: drawing all to find those of one line takes many minutes.
func only(all map[*source][]*slip, text string) map[*source][]*slip {
	left := make(map[*source][]*slip)
	for f, slips := range all {
		slips = slices.DeleteFunc(slices.Clone(slips), func(s *slip) bool { return !strings.Contains(s.listed(), text) })
		if len(slips) > 0 {
			left[f] = slips
		}
	}
	return left
}

// drawer draws slips that compile, each once. The order within a file depends on the seed and on
// that file only.
type drawer struct {
	seed  uint64
	files []*source // in the order of their names
	sizes []int     // of the files: how many lines there are where a slip can happen
	left  map[*source][]*slip
}

func newDrawer(all map[*source][]*slip, seed uint64) *drawer {
	d := &drawer{seed: seed, left: make(map[*source][]*slip)}
	d.files = slices.SortedFunc(maps.Keys(all), func(a, b *source) int { return strings.Compare(a.name, b.name) })
	for _, f := range d.files {
		lines := make(map[int]bool)
		for _, s := range all[f] {
			lines[s.line] = true
		}
		d.sizes = append(d.sizes, len(lines))
		d.left[f] = shuffled(all[f], rand.New(rand.NewPCG(seed, hash(f.name))))
	}
	return d
}

func hash(text string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(text))
	return h.Sum64()
}

// shuffled takes one slip of each kind in turn, so that the kinds with few are not drowned.
func shuffled(slips []*slip, r *rand.Rand) (mixed []*slip) {
	byKind := make(map[kind][]*slip)
	for _, s := range slips {
		byKind[s.kind] = append(byKind[s.kind], s)
	}
	kinds := slices.Sorted(maps.Keys(byKind))
	r.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	for _, k := range kinds {
		of := byKind[k]
		r.Shuffle(len(of), func(i, j int) { of[i], of[j] = of[j], of[i] })
	}
	for i := 0; len(mixed) < len(slips); i++ {
		for _, k := range kinds {
			if i < len(byKind[k]) {
				mixed = append(mixed, byKind[k][i])
			}
		}
	}
	return mixed
}

// next is another slip of the file, nil if there is none.
func (d *drawer) next(f *source) *slip {
	for len(d.left[f]) > 0 {
		s := d.left[f][0]
		d.left[f] = d.left[f][1:]
		if f.compiles(s.changed()) {
			return s
		}
	}
	return nil
}

// draw draws n slips, from each file as many as its size asks for.
func (d *drawer) draw(n int) (drawn []*slip) {
	for i, many := range d.shares(n) {
		for range many {
			if s := d.next(d.files[i]); s != nil {
				drawn = append(drawn, s)
			}
		}
	}
	return drawn
}

// shares spreads n over the files by size: at equal steps along all their lines, one behind the
// other. If n is large enough, each file gets one before that.
func (d *drawer) shares(n int) []int {
	shares := make([]int, len(d.files))
	if n >= 2*len(d.files) {
		for i := range shares {
			shares[i] = 1
		}
		n -= len(d.files)
	}
	total := 0
	for _, size := range d.sizes {
		total += size
	}
	if n <= 0 || total == 0 {
		return shares
	}
	step := float64(total) / float64(n)
	at := rand.New(rand.NewPCG(d.seed, 0)).Float64() * step
	end := 0
	for i, size := range d.sizes {
		end += size
		for ; at < float64(end); at += step {
			shares[i]++
		}
	}
	return shares
}
