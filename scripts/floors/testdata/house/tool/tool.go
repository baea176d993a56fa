// Package tool links the tests.
package tool

import _ "github.com/steadymq/steadymq/scripts/floors/testdata/house/harness"
