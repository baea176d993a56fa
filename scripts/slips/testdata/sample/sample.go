// Package sample is what the tests make slips of.
package sample

import (
	"errors"
	"sync"
)

const limit = 10

type box struct {
	mu          sync.Mutex
	width, high int
}

func (b *box) grow(by, most int) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if by < 1 || by > most {
		return errors.New("out of range")
	}
	b.width = by + b.high // grows
	return nil
}

func fill(all []int) (boxes []*box) {
	for _, n := range all {
		switch n {
		case 0:
			continue
		case 1, 2:
			boxes = append(boxes, &box{width: n, high: limit})
		}
	}
	return boxes[:min(len(boxes), limit)]
}
