// Package inner is part of the wire.
package inner
