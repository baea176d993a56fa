// Package harness is for tests.
package harness
