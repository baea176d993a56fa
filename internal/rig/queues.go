package rig

import (
	"encoding/binary"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq"
)

// QueueTypes are those of RabbitMQ.
var QueueTypes = []string{"classic", "quorum", "stream"}

// OfType are options for a queue of the type: a stream is read from its first message.
func OfType(queueType string) []steadymq.Option {
	if queueType == "stream" {
		return Options(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
	}
	return nil
}

// Beginning is what a stream consumer asks for, and what it is given of a stream that holds "old 0"
// to "old 2", three hours old, and "old 3", ten minutes old.
type Beginning struct {
	Name   string
	Offset func() any
	Old    []string
}

// Beginnings are all that a stream consumer may ask for.
var Beginnings = []Beginning{
	{"default", func() any { return nil }, nil},
	{"next", func() any { return "next" }, nil},
	{"last", func() any { return "last" }, []string{"old 3"}},
	{"first", func() any { return "first" }, []string{"old 0", "old 1", "old 2", "old 3"}},
	{"number", func() any { return 2 }, []string{"old 2", "old 3"}},
	{"interval", func() any { return "15m" }, []string{"old 3"}},
	{"interval without messages", func() any { return "30s" }, nil},
	{"interval of thousands of years", func() any { return "9000Y" }, []string{"old 0", "old 1", "old 2", "old 3"}},
	{"time", func() any { return time.Now().Add(-time.Hour) }, []string{"old 3"}},
	{"time now", func() any { return time.Now() }, nil},
	{"time to come", func() any { return time.Now().Add(time.Hour) }, nil},
}

// Options name the stream as one; x-stream-offset does, and WithQueue does where there is none.
func (b Beginning) Options() []steadymq.Option {
	if at := b.Offset(); at != nil {
		return Options(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": at}))
	}
	return Options(steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
}

// Firsts leaves of what was handled each message's first time.
func Firsts(handled []string) (all []string) {
	for _, body := range handled {
		if !slices.Contains(all, body) {
			all = append(all, body)
		}
	}
	return all
}

// HeaderTable is the bytes of a table with one header, whose name is k.
func HeaderTable(typ byte, value ...byte) []byte { return append([]byte{1, 'k', typ}, value...) }

// NestedArrays is the bytes of a table with arrays in arrays, which takes the fewest bytes a level.
func NestedArrays(depth int) []byte {
	b := make([]byte, 0, 5*depth)
	for inside := 5 * (depth - 1); inside >= 0; inside -= 5 {
		b = binary.BigEndian.AppendUint32(append(b, 'A'), uint32(inside))
	}
	return append([]byte{1, 'k'}, b...)
}
