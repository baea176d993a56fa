// Package sound keeps the order.
package sound

type base struct{ count int }
