// Package table copies the amqp.Tables that a user gives, and finds what AMQP cannot carry in them.
package table

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"time"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
)

// Copy copies t, so that later changes of it do not alter what is sent, and tells everything that
// AMQP cannot carry in it. What is wrong with one value begins with the value's place in t.
func Copy(t amqp.Table) (copied amqp.Table, problems []string) {
	var c copier
	copied = c.table(t, "", 0)
	return copied, c.problems
}

// ShortString returns what is wrong with a text that is to be a short string, "" if nothing is:
// RabbitMQ, or the driver, closes the connection for one that is wrong.
func ShortString(text string) (problem string) {
	switch {
	case len(text) > MaxShortString:
		return fmt.Sprintf("has %d bytes, AMQP allows %d", len(text), MaxShortString)
	case !utf8.ValidString(text):
		return fmt.Sprintf("is no UTF-8, which RabbitMQ refuses: %q", text)
	}
	return ""
}

// Size returns how many bytes t takes up in a frame as the driver writes it, its own length included.
// It is for a table that Copy has found nothing wrong with: for others the driver has no encoding.
func Size(t amqp.Table) int {
	size := 4
	for key, v := range t {
		size += 1 + len(key) + sizeWithin(v)
	}
	return size
}

// sizeWithin is sizeOf with all that v holds.
func sizeWithin(v any) int {
	switch v := v.(type) {
	case amqp.Table:
		return 1 + Size(v)
	case []any:
		size := sizeOf(v)
		for _, element := range v {
			size += sizeWithin(element)
		}
		return size
	}
	return sizeOf(v)
}

// copier makes one copy. The same goroutine uses it from beginning to end.
type copier struct {
	size     int // what was copied so far, in bytes of a frame
	problems []string
	over     bool // a limit was passed, so nothing more is copied
}

func (c *copier) refuse(format string, args ...any) {
	c.problems = append(c.problems, fmt.Sprintf(format, args...))
}

// grow counts bytes. It returns false once there are too many for a frame.
func (c *copier) grow(size int) bool {
	if c.size += size; c.size > maxSize && !c.over {
		c.over = true
		c.refuse("has more than %d bytes, which no frame holds", maxSize)
	}
	return !c.over
}

func (c *copier) descend(depth int) bool {
	if depth > maxNesting && !c.over {
		c.over = true
		c.refuse("nests tables and arrays deeper than %d levels; does one hold itself?", maxNesting)
	}
	return !c.over
}

// table copies t. place says where in the user's table t was found.
func (c *copier) table(t amqp.Table, place string, depth int) amqp.Table {
	if !c.descend(depth) {
		return nil
	}
	copied := make(amqp.Table, len(t))
	for _, key := range slices.Sorted(maps.Keys(t)) {
		if !c.grow(1 + len(key)) {
			break
		}
		if len(key) > MaxShortString {
			c.refuse("%skey %.20q... has %d bytes, AMQP allows %d", place, key, len(key), MaxShortString)
			continue
		}
		copied[key] = c.value(t[key], fmt.Sprintf("%skey %q", place, key), depth)
	}
	return copied
}

func (c *copier) array(all []any, place string, depth int) []any {
	if !c.descend(depth) {
		return nil
	}
	copied := make([]any, 0, len(all))
	for i, v := range all {
		if c.over {
			break
		}
		copied = append(copied, c.value(v, fmt.Sprintf("%selement %d", place, i), depth))
	}
	return copied
}

// value copies v. It takes the types that the driver can write.
func (c *copier) value(v any, place string, depth int) any {
	if !c.grow(sizeOf(v)) {
		return nil
	}
	switch v := v.(type) {
	case amqp.Table:
		return c.table(v, place+", ", depth+1)
	case []any:
		return c.array(v, place+", ", depth+1)
	case []byte:
		return bytes.Clone(v)
	case int: // the driver sends the lower 32 bits of it
		if int(int32(v)) != v {
			return int64(v)
		}
	case time.Time: // AMQP counts seconds from 1970, unsigned
		if v.Unix() < 0 {
			c.refuse("%s holds a time before 1970, which AMQP cannot carry", place)
		}
	case nil, bool, byte, int8, int16, int32, int64, uint16, uint32, float32, float64, string, amqp.Decimal:
	default:
		c.refuse("%s holds a value of type %T, which AMQP cannot carry; it carries bool, int, int8 to int64, "+
			"uint8 to uint32, float32, float64, string, []byte, time.Time, amqp.Decimal, amqp.Table and []any", place, v)
	}
	return v
}

// sizeOf returns how many bytes v takes up in a frame, its type included. The elements of a table
// or an array are not counted: they are counted when they are copied.
func sizeOf(v any) int {
	switch v := v.(type) {
	case nil:
		return 1
	case bool, byte, int8:
		return 2
	case int16, uint16:
		return 3
	case string:
		return 5 + len(v)
	case []byte:
		return 5 + len(v)
	case amqp.Decimal:
		return 6
	case int64, float64, time.Time:
		return 9
	}
	return 5
}

// MaxShortString is how many bytes what AMQP calls a short string may have.
const MaxShortString = 255

const (
	// maxSize is how large a table may be. It is sent in one frame, with at most three short
	// strings beside it, and a broker closes the connection for a longer frame.
	maxSize = wire.FrameSize - 1<<10

	// maxNesting ends the walk through a table that contains itself.
	maxNesting = 100
)
