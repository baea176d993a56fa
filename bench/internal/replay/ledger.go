package replay

// ledger knows which delivery tags of one channel are not settled yet. It is a
// ring over the span from the oldest of them to the newest, so that one settle
// costs one byte looked at however many tags have passed.
type ledger struct {
	open        []bool // open[tag & (len-1)]
	oldest      uint64 // no tag below it is open
	next        uint64 // the tag the next delivery gets
	outstanding int
}

func newLedger() *ledger {
	return &ledger{open: make([]bool, 1024), oldest: 1, next: 1}
}

// deliver opens the next n tags and returns the first.
func (l *ledger) deliver(n int) (first uint64) {
	for l.next+uint64(n)-l.oldest > uint64(len(l.open)) {
		l.grow()
	}
	first = l.next
	mask := uint64(len(l.open) - 1)
	for range n {
		l.open[l.next&mask] = true
		l.next++
	}
	l.outstanding += n
	return first
}

func (l *ledger) grow() {
	bigger := make([]bool, 2*len(l.open))
	for tag := l.oldest; tag < l.next; tag++ {
		bigger[tag&uint64(len(bigger)-1)] = l.open[tag&uint64(len(l.open)-1)]
	}
	l.open = bigger
}

// settle closes one tag, or with multiple every open tag up to it, and says
// how many that were: 0 is a tag that was never delivered or is settled already.
func (l *ledger) settle(tag uint64, multiple bool) (n int) {
	if tag < l.oldest || tag >= l.next {
		return 0
	}
	first := tag
	if multiple {
		first = l.oldest
	}
	mask := uint64(len(l.open) - 1)
	for t := first; t <= tag; t++ {
		if l.open[t&mask] {
			l.open[t&mask] = false
			n++
		}
	}
	for l.oldest < l.next && !l.open[l.oldest&mask] {
		l.oldest++
	}
	l.outstanding -= n
	return n
}
