// Package wire imports what stands above it.
package wire

import (
	_ "github.com/steadymq/steadymq/scripts/floors/testdata/house"
	_ "github.com/steadymq/steadymq/scripts/floors/testdata/house/wire/inner"
)
