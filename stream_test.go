package steadymq

import (
	"math"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
)

func TestPlaceByTheClockAllowsForClocksThatDiffer(t *testing.T) {
	since := time.Unix(1_700_000_000, 0)
	for name, test := range map[string]struct {
		since time.Time
		want  time.Time
	}{
		"now":              {since, since.Add(-5 * time.Minute)},
		"before 1970":      {since.Add(-math.MaxInt64), time.Unix(0, 0)}, // AMQP has no such time
		"soon after 1970":  {time.Unix(60, 0), time.Unix(0, 0)},
		"an hour earlier":  {since.Add(-interval("1h")), since.Add(-65 * time.Minute)},
		"as last stands":   {since.Add(-interval("last")), since.Add(-5 * time.Minute)},
		"an age too large": {since.Add(-interval("99999999Y")), time.Unix(0, 0)},
	} {
		p := new(position)
		p.assume(test.since)
		assert.Equal(t, amqp.Table{offsetKey: test.want}, p.resume(1, nil, false), name)
		assert.NoError(t, p.resume(1, nil, false).Validate())
	}
}

func TestIntervalsAreThoseOfRabbitMQ(t *testing.T) {
	const day = 24 * time.Hour
	for text, want := range map[any]time.Duration{
		"1s": time.Second, "90s": 90 * time.Second, "2m": 2 * time.Minute, "1h": time.Hour, "3D": 3 * day, "1M": 30 * day, "1Y": 365 * day,
		"0h": 0, "": 0, "h": 0, "last": 0, "1": 0, "1H": 0, "1.5h": 0, "-1h": 0, "+1h": 0, nil: 0, 5: 0,
		"99999999999999999999h": 0, // no broker takes it
	} {
		assert.Equal(t, want, interval(text), text)
	}
	assert.GreaterOrEqual(t, interval("9000Y"), 290*365*day)
}

// What a stream holds may be more than a slow path carries within the setup limit.
func TestPlaceThatIsCutOffAgainAndAgainIsTakenFromTheClock(t *testing.T) {
	for given, want := range map[any]int{"last": maxLooks, "next": 1, "1h": 1, nil: 1, "first": 0, 5: 0} {
		p, looks := new(position), 0
		for range 5 {
			if _, unclear := p.about("log", given); unclear {
				looks++
				_ = p.assume(time.Now())
			}
		}
		assert.Equal(t, want, looks, given)
	}
}

func streamAt(tag uint64, offset int64) *Delivery {
	d := newDelivery()
	d.DeliveryTag, d.Headers = tag, amqp.Table{offsetKey: offset}
	d.fence.tag = tag
	return d
}

// With x-stream-filter the offsets of what comes have gaps. Workers begin in any order.
func TestPlaceIsThatOfTheFirstMessageThoughAFilterLeavesGaps(t *testing.T) {
	p := &position{settled: newWatermark(), acked: newWatermark()}
	p.resume(1, amqp.Table{offsetKey: "first"}, false)
	p.subscribed("first")
	p.began(1, streamAt(2, 100))
	p.began(1, streamAt(1, 0))
	assert.LessOrEqual(t, p.resume(2, nil, false)[offsetKey], int64(0))
}

// An answer to the look of a try that was left behind may come when its successor has subscribed.
func TestLateRefusalOfALookLeavesThePlaceOfALaterSession(t *testing.T) {
	p := &position{settled: newWatermark(), acked: newWatermark()}
	p.about("s", "next")
	answered := p.assume(time.Now())
	p.about("s", "next")
	from := p.resume(2, nil, false)[offsetKey]
	p.subscribed(from)
	_ = answered(&amqp.Error{Code: 541, Server: true})
	assert.Equal(t, from, p.resume(3, nil, false)[offsetKey])
}
