package house

import (
	_ "github.com/steadymq/steadymq/scripts/floors/testdata/house/harness"
	_ "there.is/none"
)

func (b *base) add() { b.count += limit }
