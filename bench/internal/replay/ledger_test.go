package replay

import (
	"math/rand/v2"
	"testing"
)

func TestLedgerSettlesEachTagOnce(t *testing.T) {
	l := newLedger()
	if first := l.deliver(3); first != 1 {
		t.Fatalf("first tag %d, want 1", first)
	}
	steps := []struct {
		tag      uint64
		multiple bool
		want     int
	}{{2, false, 1}, {2, false, 0}, {0, false, 0}, {4, false, 0}, {3, true, 2}, {3, true, 0}}
	for _, s := range steps {
		if got := l.settle(s.tag, s.multiple); got != s.want {
			t.Errorf("settle(%d, %t) = %d, want %d", s.tag, s.multiple, got, s.want)
		}
	}
	if l.outstanding != 0 {
		t.Errorf("outstanding %d, want 0", l.outstanding)
	}
}

// One tag that stays open keeps the span growing; every other tag must still
// be known, and known once.
func TestLedgerGrowsPastAStuckTag(t *testing.T) {
	l := newLedger()
	stuck := l.deliver(1)
	open := map[uint64]bool{}
	for range 5000 {
		open[l.deliver(1)] = true
		for tag := range open {
			if rand.IntN(2) == 0 {
				continue
			}
			if l.settle(tag, false) != 1 || l.settle(tag, false) != 0 {
				t.Fatalf("tag %d is not settled exactly once", tag)
			}
			delete(open, tag)
		}
		if l.outstanding != len(open)+1 {
			t.Fatalf("outstanding %d, want %d", l.outstanding, len(open)+1)
		}
	}
	if l.settle(stuck, false) != 1 {
		t.Error("the stuck tag was lost")
	}
}
