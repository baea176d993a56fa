package scenario

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// Results is the table that a suite prints, a [Result] for each scenario.
type Results struct {
	mu   sync.Mutex
	rows []Result
}

// Result is a row of the table.
type Result struct {
	Fault, Broker              string
	Resumed                    time.Duration
	Lost, Duplicates, Messages int
	Note                       string
}

// Add appends a row.
func (r *Results) Add(row Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rows = append(r.rows, row)
}

// Rows are those that were added so far.
func (r *Results) Rows() []Result {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.rows)
}

func (r *Results) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	slices.SortFunc(r.rows, func(a, b Result) int { return strings.Compare(a.Fault, b.Fault) })
	var b strings.Builder
	b.WriteString("\n| fault | RabbitMQ | consuming again after | sessions lost | messages | handled twice | notes |\n|---|---|---|---|---|---|---|\n")
	for _, row := range r.rows {
		resumed := "-"
		if row.Resumed > 0 {
			resumed = row.Resumed.Round(100 * time.Microsecond).String()
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %d | %d | %d | %s |\n",
			strings.ReplaceAll(row.Fault, "_", " "), row.Broker, resumed, row.Lost, row.Messages, row.Duplicates, row.Note)
	}
	return b.String()
}
