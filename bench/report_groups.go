package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

var groupHead = []string{"consumers", "messages/s", "ratio", "min–max", "of one Consumer", "CPU µs", "CPU ratio", "allocs", "server µs"}

func (o outcome) groupCells() []string {
	return []string{
		o.variant.label, grouped(o.rate), fmt.Sprintf("%.2f", o.rateRatio), fmt.Sprintf("%.2f–%.2f", o.rateMin, o.rateMax),
		fmt.Sprintf("%.2f", o.ofOne), fmt.Sprintf("%.2f", o.user+o.system), fmt.Sprintf("%.2f", o.cpuRatio),
		fmt.Sprintf("%.1f", o.mallocs), fmt.Sprintf("%.2f", o.server),
	}
}

var furtherHead = []string{"a further consumer", "bytes", "goroutines", "all consume"}

func (r furtherRow) cells() []string {
	return []string{
		r.crowd.label, grouped(r.cost.Bytes), fmt.Sprintf("%.1f", r.cost.Goroutines),
		fmt.Sprintf("%d after %s", r.further, span(r.cost.Took)),
	}
}

var herdHead = []string{"herd", "all consume after", "at worst"}

func (r herdRow) cells() []string {
	took := slices.Sorted(slices.Values(r.took))
	return []string{r.label, span(at(took, 0.5)), span(at(took, 1))}
}

var besideHead = []string{"a message every 10 ms", "alone p50", "alone p99", "beside p50", "beside p99"}

func (r besideRow) cells() []string {
	return []string{
		r.crowd.label, span(at(r.alone, 0.5)), span(at(r.alone, 0.99)), span(at(r.beside, 0.5)), span(at(r.beside, 0.99)),
	}
}

// tables are those of the report, in its order.
func (g groups) tables(do func(title, text string, head []string, rows [][]string)) {
	for _, c := range g.throughput {
		do(c.workload.String(), "", groupHead, rowsOf(c.outcomes, outcome.groupCells))
	}
	do("A further consumer that idles", furtherText, furtherHead, rowsOf(g.further, furtherRow.cells))
	do("A herd", herdText, herdHead, rowsOf(g.herds, herdRow.cells))
	do("A slow consumer beside a fast one", besideText, besideHead, rowsOf(g.beside, besideRow.cells))
}

const (
	furtherText = "Heap and stacks after a collection, and goroutines, for each consumer that is added to one that consumes, " +
		"and the time until all of them do. The plain driver sets them up one after the other; no message ever comes."
	herdText   = "The server is away for 3 s, and all have lost their connection. The time is from its return until the last one consumes."
	besideText = "Time from the server's write to the handler, of a consumer that gets a message every 10 ms: alone on its connection, " +
		"and beside one on the same connection that gets as many as its window takes."
)

func rowsOf[T any](all []T, cells func(T) []string) (rows [][]string) {
	for _, one := range all {
		rows = append(rows, cells(one))
	}
	return rows
}

func (g groups) print(w io.Writer) {
	if g.empty() {
		return
	}
	g.tables(func(title, _ string, head []string, rows [][]string) {
		fmt.Fprintf(w, "\n%s\n", title)
		for _, row := range append([][]string{head}, rows...) {
			fmt.Fprintln(w, strings.Join(row, "\t"))
		}
	})
}

func (g groups) markdown(w io.Writer) {
	if g.empty() {
		return
	}
	fmt.Fprintf(w, "\n## Groups\n\nMany consumers on one connection: a Group, and the plain driver with a channel for each. Prefetch %d and one "+
		"worker each; *of one Consumer* is the rate against a single Consumer in the same round.\n", groupPrefetch)
	g.tables(func(title, text string, head []string, rows [][]string) {
		fmt.Fprintf(w, "\n### %s\n\n", title)
		if text != "" {
			fmt.Fprintf(w, "%s\n\n", text)
		}
		table(w, head, func(yield func([]string)) {
			for _, row := range rows {
				yield(row)
			}
		})
	})
}
