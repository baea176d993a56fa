package steadymq

import (
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
)

func streamAt(tag uint64, offset int64) *Delivery {
	d := newDelivery()
	d.DeliveryTag, d.Headers = tag, amqp.Table{offsetKey: offset}
	d.fence.tag = tag
	return d
}

// With x-stream-filter the offsets of what comes have gaps. Workers begin in any order.
func TestPlaceIsThatOfTheFirstMessageThoughAFilterLeavesGaps(t *testing.T) {
	p := &position{settled: newRow(), acked: newRow()}
	p.resume(1, amqp.Table{offsetKey: "first"}, false)
	p.subscribed("first")
	p.began(1, streamAt(2, 100))
	p.began(1, streamAt(1, 0))
	assert.LessOrEqual(t, p.resume(2, nil, false)[offsetKey], int64(0))
}

// An answer to the look of a try that was left behind may come when its successor has subscribed.
func TestLateRefusalOfALookLeavesThePlaceOfALaterSession(t *testing.T) {
	p := &position{settled: newRow(), acked: newRow()}
	p.about("s", "next")
	answered := p.assume(time.Now())
	p.about("s", "next")
	from := p.resume(2, nil, false)[offsetKey]
	p.subscribed(from)
	_ = answered(&amqp.Error{Code: 541, Server: true})
	assert.Equal(t, from, p.resume(3, nil, false)[offsetKey])
}
