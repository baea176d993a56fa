package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	amqp "github.com/rabbitmq/amqp091-go"
)

// findings are what was in the park queue, and what became of it.
type findings struct {
	looked  int
	returns int64 // how often the broker has put back the message that was put back most often
	by      map[cause]*numbers
}

type numbers struct {
	matched, moved, failed int
	why                    error // of the last failure
}

func newFindings() *findings { return &findings{by: make(map[cause]*numbers)} }

func (f *findings) look(d amqp.Delivery) {
	f.looked++
	returns, _ := d.Headers["x-delivery-count"].(int64)
	f.returns = max(f.returns, returns)
}

func (f *findings) of(c cause) *numbers {
	if f.by[c] == nil {
		f.by[c] = new(numbers)
	}
	return f.by[c]
}

func (n *numbers) fail(why error) { n.failed, n.why = n.failed+1, why }

func (f *findings) matched() int { return f.sum(func(n *numbers) int { return n.matched }) }
func (f *findings) moved() int   { return f.sum(func(n *numbers) int { return n.moved }) }
func (f *findings) failed() int  { return f.sum(func(n *numbers) int { return n.failed }) }

func (f *findings) sum(of func(*numbers) int) int {
	total := 0
	for _, n := range f.by {
		total += of(n)
	}
	return total
}

// manyReturns is half of RabbitMQ's default delivery limit.
const manyReturns = 10

// print writes a line for each cause, the most frequent first.
func (f *findings) print(out io.Writer, w wish) {
	causes := slices.SortedFunc(maps.Keys(f.by), func(a, b cause) int {
		if more := f.by[b].matched - f.by[a].matched; more != 0 {
			return more
		}
		return strings.Compare(a.queue+a.kind+a.text, b.queue+b.kind+b.text)
	})
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	if len(causes) > 0 {
		fmt.Fprintln(table, "MATCHED\tMOVED\tFAILED\tQUEUE\tERROR TYPE\tERROR")
	}
	for _, c := range causes {
		n := f.by[c]
		// Anybody may publish to a park queue, so its texts are quoted for the terminal.
		fmt.Fprintf(table, "%d\t%d\t%d\t%s\t%s\t%q\n", n.matched, n.moved, n.failed, plain(c.queue), plain(c.kind), c.text)
	}
	_ = table.Flush()
	for _, c := range causes {
		if n := f.by[c]; n.why != nil {
			fmt.Fprintf(out, "failed, last because: %v\n", n.why)
		}
	}
	fmt.Fprintf(out, "%s: %d looked at, %d match, %d moved, %d failed\n", w.park, f.looked, f.matched(), f.moved(), f.failed())
	if f.returns >= manyReturns {
		fmt.Fprintf(out, "warning: messages have been put back into %s up to %d times; if it has a delivery limit (20 by default since RabbitMQ 4.0), it drops them soon\n", w.park, f.returns)
	}
}

// plain is text without what a terminal or the table would take for something else.
func plain(text string) string {
	quoted := fmt.Sprintf("%q", text)
	return quoted[1 : len(quoted)-1]
}
