// Package house breaks every rule of the floors.
package house

type base struct{ count int }

func (b *base) add() { b.count++ }

// low uses what stands above it.
func low(r *roof) int {
	r.raise()
	return r.height + limit
}
