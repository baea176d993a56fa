package steadymq

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

// arguments copies a table that the user gives, so that nothing changes what is sent later, and
// finds in it what AMQP cannot carry. Whatever New takes as a table goes through it.
type arguments struct {
	size     int // of what was copied, in bytes of a frame
	problems []string
	over     bool // too much of it: no further look
}

func noShortString(text string) string {
	switch {
	case len(text) > maxShortString:
		return fmt.Sprintf("has %d bytes, AMQP allows %d", len(text), maxShortString)
	case !utf8.ValidString(text):
		return fmt.Sprintf("is no UTF-8, which RabbitMQ refuses: %q", text)
	}
	return ""
}

func (a *arguments) refuse(format string, args ...any) {
	a.problems = append(a.problems, fmt.Sprintf(format, args...))
}

// grow counts bytes. It returns false once there are too many.
func (a *arguments) grow(size int) bool {
	if a.size += size; a.size > maxArguments && !a.over {
		a.over = true
		a.refuse("has more than %d bytes, which no frame holds", maxArguments)
	}
	return !a.over
}

func (a *arguments) descend(depth int) bool {
	if depth > maxNesting && !a.over {
		a.over = true
		a.refuse("nests tables and arrays deeper than %d levels; does one hold itself?", maxNesting)
	}
	return !a.over
}

// table copies t, found at place.
func (a *arguments) table(t amqp.Table, place string, depth int) amqp.Table {
	if !a.descend(depth) {
		return nil
	}
	copied := make(amqp.Table, len(t))
	for _, key := range slices.Sorted(maps.Keys(t)) {
		if !a.grow(1 + len(key)) {
			break
		}
		if len(key) > maxShortString {
			a.refuse("%skey %.20q... has %d bytes, AMQP allows %d", place, key, len(key), maxShortString)
			continue
		}
		copied[key] = a.value(t[key], fmt.Sprintf("%skey %q", place, key), depth)
	}
	return copied
}

func (a *arguments) array(all []any, place string, depth int) []any {
	if !a.descend(depth) {
		return nil
	}
	copied := make([]any, 0, len(all))
	for i, v := range all {
		if a.over {
			break
		}
		copied = append(copied, a.value(v, fmt.Sprintf("%selement %d", place, i), depth))
	}
	return copied
}

// value copies v. The types are those that the driver can write.
func (a *arguments) value(v any, place string, depth int) any {
	if !a.grow(sizeOf(v)) {
		return nil
	}
	switch v := v.(type) {
	case amqp.Table:
		return a.table(v, place+", ", depth+1)
	case []any:
		return a.array(v, place+", ", depth+1)
	case []byte:
		return bytes.Clone(v)
	case int: // the driver sends the lower 32 bits of it
		if int(int32(v)) != v {
			return int64(v)
		}
	case time.Time: // AMQP counts seconds from 1970, unsigned
		if v.Unix() < 0 {
			a.refuse("%s holds a time before 1970, which AMQP cannot carry", place)
		}
	case nil, bool, byte, int8, int16, int32, int64, uint16, uint32, float32, float64, string, amqp.Decimal:
	default:
		a.refuse("%s holds a value of type %T, which AMQP cannot carry; it carries bool, int, int8 to int64, "+
			"uint8 to uint32, float32, float64, string, []byte, time.Time, amqp.Decimal, amqp.Table and []any", place, v)
	}
	return v
}

// sizeOf is what a value takes up in a frame, with its type; of a table or an array without
// what it holds.
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

const (
	maxShortString = 255 // bytes, of what AMQP calls a short string

	// maxArguments is how large a table may be. It is sent in one frame, with at most
	// three short strings beside it; a broker closes the connection for a longer one.
	maxArguments = wire.FrameSize - 1<<10

	// maxNesting ends the look at a table that holds itself.
	maxNesting = 100
)
