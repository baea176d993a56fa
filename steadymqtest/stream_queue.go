package steadymqtest

import (
	"strconv"
	"strings"
	"time"
)

// A stream keeps its messages: consumers read it from an offset on, settling gives them credit and removes nothing.

// seek finds the offset that x-stream-offset asks for. Without one a consumer begins with the next message to be published.
func (c *consumer) seek(spec any) *refusal {
	end := len(c.q.log)
	switch at := spec.(type) {
	case nil:
		c.offset = end
		return nil
	case string:
		switch at {
		case "first":
			c.offset = 0
			return nil
		case "last": // RabbitMQ begins with the last chunk; here every chunk is one message
			c.offset = max(0, end-1)
			return nil
		case "next":
			c.offset = end
			return nil
		}
		if age, ok := interval(at); ok {
			c.offset = c.q.since(c.ch.c.b.now.Add(-age))
			return nil
		}
	case time.Time:
		c.offset = c.q.since(at)
		return nil
	default:
		if n, ok := integer(spec); ok && n >= 0 {
			c.offset = n
			return nil
		}
	}
	if !c.ch.c.b.since(4, 3) {
		return refuse(541, "")
	}
	return refuse(406, "invalid arg 'x-stream-offset' for queue '%s' in vhost '/': {invalid_stream_offset_arg,{longstr,<<\"%v\">>}}", c.q.name, spec)
}

// since is the offset of the first message that is not older than a time. RabbitMQ begins with its chunk.
func (q *queue) since(at time.Time) int {
	for i, e := range q.log {
		if !e.at.Before(at) {
			return i
		}
	}
	return len(q.log)
}

// interval reads how far back an offset such as 1h begins.
func interval(text string) (time.Duration, bool) {
	const day = 24 * time.Hour
	for unit, length := range map[string]time.Duration{
		"Y": 365 * day, "M": 30 * day, "D": day, "h": time.Hour, "m": time.Minute, "s": time.Second,
	} {
		if number, ok := strings.CutSuffix(text, unit); ok {
			n, err := strconv.ParseUint(number, 10, 16)
			return time.Duration(n) * length, err == nil
		}
	}
	return 0, false
}

// pumpStream gives every consumer what it has credit for.
func (q *queue) pumpStream() {
	for _, c := range q.consumers {
		for c.offset < len(q.log) && c.room() {
			e := q.log[c.offset]
			c.offset++
			c.deliver(e)
		}
	}
}

// settleStream takes the credit back. Before 4.0 a nack was an error of the whole connection.
func (q *queue) settleStream(e *entry, kind Kind) *refusal {
	q.b.ledger.setFate(e.record, Acked)
	if kind != Ack && !q.b.since(4, 0) {
		return refuse(540, "basic.nack and basic.reject not supported by stream queues queue '%s' in vhost '/'", q.name)
	}
	return nil
}
