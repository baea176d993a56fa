package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"
)

// report is everything that one run of the program found.
type report struct {
	opts       options
	throughput []comparison
	recovery   []healing
	idle       []idling
	groups     groups
	retries    []comparison
	batches    []comparison
}

// folder is where the results live, from the root of the repository.
const folder = "bench"

func (r report) deliver() error {
	r.print(os.Stdout)
	if !r.opts.write {
		return nil
	}
	var b strings.Builder
	r.markdown(&b)
	if r.opts.amqp != "" { // a broker of its own kind, beside the replay server's results
		return os.WriteFile(filepath.Join(folder, "BROKER.md"), []byte(b.String()), 0o644)
	}
	if err := os.WriteFile(filepath.Join(folder, "RESULTS.md"), []byte(b.String()), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, "throughput.svg"), []byte(chart(r.throughput)), 0o644)
}

func (r report) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer tw.Flush()
	for _, c := range r.throughput {
		fmt.Fprintf(tw, "\n%s\n", c.workload)
		fmt.Fprintln(tw, strings.Join(throughputHead, "\t"))
		for _, o := range c.outcomes {
			fmt.Fprintln(tw, strings.Join(o.cells(), "\t"))
		}
	}
	if len(r.recovery) > 0 {
		fmt.Fprintf(tw, "\n%s\n", strings.Join(recoveryHead, "\t"))
	}
	for _, h := range r.recovery {
		fmt.Fprintln(tw, strings.Join(h.cells(), "\t"))
	}
	if len(r.idle) > 0 {
		fmt.Fprintf(tw, "\n%s\n", strings.Join(idleHead, "\t"))
	}
	for _, i := range r.idle {
		fmt.Fprintln(tw, strings.Join(i.cells(), "\t"))
	}
	r.groups.print(tw)
	for _, c := range r.batches {
		fmt.Fprintf(tw, "\nbatches, %s\n", c.workload)
		for _, row := range append([][]string{throughputHead}, rowsOf(c.outcomes, outcome.cells)...) {
			fmt.Fprintln(tw, strings.Join(row, "\t"))
		}
	}
	for _, c := range r.retries {
		fmt.Fprintf(tw, "\nretries, %s\n", c.workload)
		for _, row := range append([][]string{retryHead}, rowsOf(c.outcomes, outcome.retryCells)...) {
			fmt.Fprintln(tw, strings.Join(row, "\t"))
		}
	}
}

var throughputHead = []string{"consumer", "messages/s", "ratio", "min–max", "user µs", "system µs", "CPU ratio", "allocs", "bytes", "server µs", "server reads"}

func (o outcome) cells() []string {
	return []string{
		o.variant.label, grouped(o.rate), fmt.Sprintf("%.2f", o.rateRatio), fmt.Sprintf("%.2f–%.2f", o.rateMin, o.rateMax),
		fmt.Sprintf("%.2f", o.user), fmt.Sprintf("%.2f", o.system), fmt.Sprintf("%.2f", o.cpuRatio),
		fmt.Sprintf("%.1f", o.mallocs), fmt.Sprintf("%.0f", o.bytes), fmt.Sprintf("%.2f", o.server), fmt.Sprintf("%.3f", o.reads),
	}
}

var recoveryHead = []string{"fault", "consumer", "p50", "p99", "max", "never within 30 s"}

func (h healing) cells() []string {
	cells := []string{faultText[h.fault], h.variant.label, "–", "–", "–", fmt.Sprintf("%d of %d", h.never, h.never+len(h.times))}
	if len(h.times) > 0 {
		cells[2], cells[3], cells[4] = span(h.quantile(0.5)), span(h.quantile(0.99)), span(h.quantile(1))
	}
	return cells
}

var idleHead = []string{"idle", "consumer", "KiB", "of these stacks", "goroutines"}

func (i idling) cells() []string {
	return []string{
		i.lull.Name, i.variant.label, fmt.Sprintf("%.1f", (i.Heap+i.Stacks)/1024), fmt.Sprintf("%.1f", i.Stacks/1024), fmt.Sprintf("%.2f", i.Goroutines),
	}
}

var faultText = map[string]string{
	"rst":          "TCP reset",
	"fin":          "socket closed",
	"conn-close":   "connection.close 320",
	"chan-close":   "channel.close 406",
	"basic-cancel": "basic.cancel",
	"restart":      "server away for 3 s, from its return",
}

func (r report) markdown(w io.Writer) {
	fmt.Fprintf(w, "# Benchmark results\n\n")
	fmt.Fprintf(w, "Written by `%s` on %s; do not edit by hand.\n\n", r.opts.command, time.Now().UTC().Format("2006-01-02"))
	fmt.Fprintf(w, "Machine: %d cores, %s/%s, %s, amqp091-go %s. ", runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, runtime.Version(), driverVersion())
	fmt.Fprintf(w, "The server and each client are processes of their own and share these cores.\n")
	if len(r.throughput) > 0 {
		r.throughputMarkdown(w)
	}
	if len(r.recovery) > 0 {
		r.recoveryMarkdown(w)
	}
	if len(r.idle) > 0 {
		r.idleMarkdown(w)
	}
	r.groups.markdown(w)
	if len(r.batches) > 0 {
		r.batchesMarkdown(w)
	}
	if len(r.retries) > 0 {
		r.retriesMarkdown(w)
	}
}

func (r report) throughputMarkdown(w io.Writer) {
	where := "a replay server that keeps the prefetch window full and checks every acknowledgement"
	if r.opts.amqp != "" {
		where = fmt.Sprintf("a broker, %s queue, %d persistent messages", r.opts.queueType, r.opts.messages)
	}
	fmt.Fprintf(w, "\n## Throughput\n\nAgainst %s. Medians of %d alternating rounds", where, r.opts.rounds)
	if r.opts.amqp == "" {
		fmt.Fprintf(w, " of %v", r.opts.window)
	}
	fmt.Fprintf(w, "; a ratio compares neighbours in one round with the first line. CPU, allocations and bytes are the client process's, per message. "+
		"steadymq and *ack each* send one acknowledgement per message; *ack multiple* sends one with `multiple=true` per 100 messages (half the prefetch, if that is less). "+
		"The server's own CPU and reads (over TLS: records) per message show that it is not what is measured, and how many acknowledgements share a write.\n")
	for _, c := range r.throughput {
		fmt.Fprintf(w, "\n### %s\n\n", c.workload)
		table(w, throughputHead, func(yield func([]string)) {
			for _, o := range c.outcomes {
				yield(o.cells())
			}
		})
	}
}

func (r report) recoveryMarkdown(w io.Writer) {
	fmt.Fprintf(w, "\n## Recovery\n\nTime from the fault to the first new delivery in the handler, %d consumers for each line, "+
		"one message every 5 ms, prefetch 16. The *reconnect loop* watches `Connection.NotifyClose` and sleeps %v before it dials again.\n\n",
		r.opts.samples, loopDelay)
	table(w, recoveryHead, func(yield func([]string)) {
		for _, h := range r.recovery {
			yield(h.cells())
		}
	})
}

func (r report) idleMarkdown(w io.Writer) {
	fmt.Fprintf(w, "\n## Idle\n\nWhat each of %d consumers takes in one process, each with a connection of its own, "+
		"while nothing is delivered: heap after a collection, and stacks. The server is a process of its own; what the kernel keeps for a socket does not count. "+
		"The burst was %v long, and ended %v before.\n\n", idleConsumers, burst, settleDown)
	table(w, idleHead, func(yield func([]string)) {
		for _, i := range r.idle {
			yield(i.cells())
		}
	})
}

var retryHead = []string{"consumer", "messages/s", "ratio", "min–max", "CPU µs", "CPU ratio", "allocs"}

func (o outcome) retryCells() []string {
	return []string{
		o.variant.label, grouped(o.rate), fmt.Sprintf("%.2f", o.rateRatio), fmt.Sprintf("%.2f–%.2f", o.rateMin, o.rateMax),
		fmt.Sprintf("%.2f", o.user+o.system), fmt.Sprintf("%.2f", o.cpuRatio), fmt.Sprintf("%.1f", o.mallocs),
	}
}

func (r report) retriesMarkdown(w io.Writer) {
	fmt.Fprintf(w, "\n## Retries\n\nOne message in %d fails the first time, is published to a delay queue and comes back after %v, on the broker of "+
		"steadymqtest over TCP in a process of its own. Medians of %d alternating rounds of %s messages; a ratio compares neighbours in one "+
		"round with the first line. The broker's work is part of the time.\n",
		failEvery, retryDelay, r.opts.rounds, grouped(retryMessages))
	for _, c := range r.retries {
		fmt.Fprintf(w, "\n### %s\n\n", c.workload)
		table(w, retryHead, func(yield func([]string)) {
			for _, o := range c.outcomes {
				yield(o.retryCells())
			}
		})
	}
}

func table(w io.Writer, head []string, rows func(yield func([]string))) {
	line := func(cells []string) { fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | ")) }
	line(head)
	rule := make([]string, len(head))
	for i := range rule {
		rule[i] = "---:"
	}
	rule[0] = "---"
	line(rule)
	rows(line)
}

func driverVersion() string {
	info, _ := debug.ReadBuildInfo()
	if info != nil {
		for _, d := range info.Deps {
			if d.Path == "github.com/rabbitmq/amqp091-go" {
				return d.Version
			}
		}
	}
	return "(unknown)"
}

// span prints a duration with the precision that a reader uses.
func span(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%.0f ms", float64(d)/float64(time.Millisecond))
	default:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
}

// grouped prints 1234567 as "1,234,567".
func grouped(v float64) string {
	s := fmt.Sprintf("%.0f", v)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func bytesText(n int) string {
	if n >= 1024 && n%1024 == 0 {
		return fmt.Sprintf("%d KiB", n/1024)
	}
	return fmt.Sprintf("%d B", n)
}

func count(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprintf("%d %s", n, noun)
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// logf tells how far the run is, apart from the results.
func logf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
