package scenario

import (
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
)

// Ledger keeps which messages the broker has confirmed and which handlings were finished, and when.
type Ledger struct {
	mu        sync.Mutex
	confirmed map[int]bool // without those whose confirm was lost, which may be there or not
	started   int
	finished  map[int]int
	work      map[piece]time.Time
}

// piece is one handling. Tags restart in every session; the number proves that the tag means the
// same message on the wire and in the handler.
type piece struct {
	session uint64
	tag     uint64
	message int
}

// NewLedger is empty.
func NewLedger() *Ledger {
	return &Ledger{confirmed: map[int]bool{}, finished: map[int]int{}, work: map[piece]time.Time{}}
}

// Confirm notes that the broker has a message.
func (l *Ledger) Confirm(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.confirmed[n] = true
}

// Start notes that a handler was given a message.
func (l *Ledger) Start() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.started++
}

// Finish notes a finished handling, once, however often it is called for it.
func (l *Ledger) Finish(n int, d *steadymq.Delivery) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := piece{d.Session(), d.DeliveryTag, n}
	if _, noted := l.work[p]; noted {
		return
	}
	l.work[p] = time.Now()
	l.finished[n]++
}

// FinishedElsewhere notes a finished handling that another process tells of.
func (l *Ledger) FinishedElsewhere(session, tag uint64, n int, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.work[piece{session, tag, n}] = at
	l.finished[n]++
}

// Forget takes a message out of those that have to be finished.
func (l *Ledger) Forget(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.confirmed, n)
}

// finishedAt says when the handling that belongs to a delivery on the wire was finished. The
// consumer tag ends with the number of the session.
func (l *Ledger) finishedAt(d faultproxy.Delivery) (time.Time, bool) {
	session, err1 := strconv.ParseUint(d.Consumer[strings.LastIndexByte(d.Consumer, '-')+1:], 10, 64)
	n, err2 := strconv.Atoi(d.MessageID)
	if errors.Join(err1, err2) != nil {
		return time.Time{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	at, ok := l.work[piece{session, d.Tag, n}]
	return at, ok
}

// FirstAfter is when the first handling after since was finished, zero if none was.
func (l *Ledger) FirstAfter(since time.Time) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	var first time.Time
	for _, at := range l.work {
		if at.After(since) && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// Handlings counts the finished handlings, second ones of a message included.
func (l *Ledger) Handlings() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.work)
}

// Missing are the confirmed messages that no handler has finished.
func (l *Ledger) Missing() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []int
	for n := range l.confirmed {
		if l.finished[n] == 0 {
			out = append(out, n)
		}
	}
	return out
}

// Confirmed are the numbers of the messages that the broker has confirmed.
func (l *Ledger) Confirmed() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.confirmed))
}

// Finished are the numbers of the messages that a handler has finished.
func (l *Ledger) Finished() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.finished))
}

// Counts are numbers of messages; Twice counts the handlings beyond the first.
type Counts struct{ Confirmed, Started, Finished, Twice int }

// Counts adds up what the ledger holds.
func (l *Ledger) Counts() Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := Counts{Confirmed: len(l.confirmed), Started: l.started, Finished: len(l.finished)}
	for _, times := range l.finished {
		c.Twice += times - 1
	}
	return c
}
