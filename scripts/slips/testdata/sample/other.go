package sample

func first(b *box) bool { return b.grow(1, 2) == nil && b.high == 0 }
