package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
)

// graph is how much one room uses of another.
type graph [][]int // by floor: [from][to]

func (h *house) graph() graph {
	g := make(graph, len(h.rooms))
	for i := range g {
		g[i] = make([]int, len(h.rooms))
	}
	for _, a := range h.arrows {
		g[h.floor[a.from]][h.floor[a.to]] += len(a.uses)
	}
	return g
}

// String is the room's first file, and how many more there are.
func (r room) String() string {
	if len(r) == 1 {
		return r[0]
	}
	return fmt.Sprintf("%s+%d", r[0], len(r)-1)
}

// printAll prints every arrow between two rooms, and on how many names it rides.
func (h *house) printAll(w io.Writer) {
	n := 0
	for from, row := range h.graph() {
		for to, names := range row {
			if names == 0 {
				continue
			}
			n++
			mark := ""
			if from < to {
				mark = "  up"
			}
			fmt.Fprintf(w, "%s -> %s %d%s\n", h.rooms[from], h.rooms[to], names, mark)
		}
	}
	fmt.Fprintf(w, "arrows between %d rooms: %d\n", len(h.rooms), n)
}

// printOrder prints an order with few arrows up, as the list wants it. Rooms that use each other,
// directly or by others, stand together with a line before and after.
func (h *house) printOrder(w io.Writer) {
	g := h.graph()
	var all []int
	for _, circle := range g.circles() {
		g.settle(circle)
		if len(circle) > 1 {
			fmt.Fprintf(w, "\t// a circle of %d\n", len(circle))
		}
		for _, i := range circle {
			fmt.Fprintf(w, "\t{\"%s\"},\n", strings.Join(h.rooms[i], `", "`))
		}
		if len(circle) > 1 {
			fmt.Fprintln(w, "\t// its end")
		}
		all = append(all, circle...)
	}
	fmt.Fprintf(w, "arrows up in this order: %d\n", g.cost(all)/arrowUp)
}

// circles are the strongly connected components, what is used before its users (Tarjan).
func (g graph) circles() (circles [][]int) {
	index, low := make([]int, len(g)), make([]int, len(g))
	var stack []int
	on := make([]bool, len(g))
	next := 1
	var visit func(v int)
	visit = func(v int) {
		index[v], low[v] = next, next
		next++
		stack, on[v] = append(stack, v), true
		for to, n := range g[v] {
			switch {
			case n == 0:
			case index[to] == 0:
				visit(to)
				low[v] = min(low[v], low[to])
			case on[to]:
				low[v] = min(low[v], index[to])
			}
		}
		if low[v] < index[v] {
			return
		}
		at := slices.Index(stack, v)
		circle := slices.Clone(stack[at:])
		stack = stack[:at]
		for _, i := range circle {
			on[i] = false
		}
		slices.Sort(circle)
		circles = append(circles, circle)
	}
	for v := range g {
		if index[v] == 0 {
			visit(v)
		}
	}
	return circles
}

// settle orders the rooms of a circle, from several beginnings.
func (g graph) settle(order []int) {
	r := rand.New(rand.NewPCG(1, 2)) // the same each time
	for best, i := slices.Clone(order), 0; i < 40; i++ {
		g.improve(best)
		if i == 0 || g.cost(best) < g.cost(order) {
			copy(order, best)
		}
		r.Shuffle(len(best), func(i, j int) { best[i], best[j] = best[j], best[i] })
	}
}

// improve moves one room after the other to where fewest arrows run up, until no move helps.
func (g graph) improve(order []int) {
	for best, again := g.cost(order), true; again; {
		again = false
		for from := range order {
			for to := range order {
				moved := slices.Insert(slices.Delete(slices.Clone(order), from, from+1), to, order[from])
				if c := g.cost(moved); c < best {
					best, again = c, true
					copy(order, moved)
				}
			}
		}
	}
}

// arrowUp is what an arrow up costs, whatever rides on it.
const arrowUp = 10_000

// cost weighs an order by its arrows up, and those that are as many by what rides on them.
func (g graph) cost(order []int) (cost int) {
	for i, low := range order {
		for _, high := range order[i+1:] {
			if n := g[low][high]; n > 0 {
				cost += arrowUp + n
			}
		}
	}
	return cost
}
