package steadymq

import (
	"math"
	"syscall"
	"testing"
	"time"

	"github.com/steadymq/steadymq/internal/wire"
	"github.com/stretchr/testify/assert"
)

// oneOfEach is a failure of every class.
var oneOfEach = map[class]error{
	classNetwork:  at("open", wire.ErrPeerClosed),
	classRefused:  at("dial", syscall.ECONNREFUSED),
	classForced:   at("open", said(320, "CONNECTION_FORCED - closed")),
	classChannel:  at("consume", said(406, "PRECONDITION_FAILED - unknown delivery tag 5")),
	classAbsent:   at("consume", said(404, "NOT_FOUND - no queue 'q' in vhost '/'")),
	classLocked:   at("consume", said(405, "RESOURCE_LOCKED - locked")),
	classOperator: at("consume", said(403, "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'")),
	classPeer:     at("open", &wire.NotAMQPError{First: 'H'}),
}

func TestEveryClassHasAPace(t *testing.T) {
	r := newTestRetry()
	for kind := classNetwork; kind <= classPeer; kind++ {
		assert.NotNil(t, r.rules[kind].pace, "class %d", kind)
		assert.Equal(t, kind, classify(oneOfEach[kind]))
	}
}

func TestNoWaitExceedsAGivenLimit(t *testing.T) {
	for _, limits := range [][2]time.Duration{
		{minDuration, minDuration},
		{minDuration, 100 * time.Millisecond},
		{100 * time.Millisecond, 100 * time.Millisecond},
		{minDuration, 700 * time.Millisecond},
		{2 * time.Second, 3 * time.Second},
		{time.Second, 20 * time.Second},
		{minDuration, maxDuration},
		{maxDuration, maxDuration},
	} {
		initial, limit := limits[0], limits[1]
		for kind, err := range oneOfEach {
			c := defaults("amqp://h/", "q")
			WithBackoff(initial, limit)(c)
			assert.Empty(t, c.problems)
			r := newRetry(c)
			now := time.Now()
			for range 200 {
				for _, fresh := range []bool{true, false} {
					wait := r.wait(err, now, fresh)
					assert.GreaterOrEqual(t, wait, time.Duration(0))
					assert.LessOrEqual(t, wait, limit, "class %d with %v", kind, limits)
					now = now.Add(wait)
				}
			}
			r.healthy()
			assert.LessOrEqual(t, r.wait(at("lost", wire.ErrPeerReset), now, false), limit)
		}
	}
}

func TestLimitsOfOneClassStandWithoutWithBackoff(t *testing.T) {
	for kind, limit := range map[class]time.Duration{
		classNetwork: 10 * time.Second, classForced: 10 * time.Second, classChannel: 10 * time.Second,
		classRefused: time.Second, classAbsent: 5 * time.Second, classOperator: 30 * time.Second, classPeer: 30 * time.Second,
	} {
		_, most := longest(oneOfEach[kind], 40)
		assert.LessOrEqual(t, most, limit, "class %d", kind)
		assert.Greater(t, most, limit*8/10, "class %d", kind)
	}
}

func TestPaceIsDrawnWithoutOverflow(t *testing.T) {
	for _, p := range []pace{
		{0, 0, 0, 0},
		{0, 1, math.MaxInt64 - 1, math.MaxInt},
		{0, math.MaxInt64 - 1, math.MaxInt64 - 1, math.MaxInt},
		{time.Second, time.Second, math.MaxInt64, math.MaxInt},
		{0, maxDuration, maxDuration, 1 << 40},
	} {
		for range 100 {
			wait := p.draw()
			assert.GreaterOrEqual(t, wait, p.floor)
			assert.LessOrEqual(t, wait, p.limit)
		}
	}
}

func TestRefusedDialsDoNotQuickenThePaceOfWhatAnOperatorMends(t *testing.T) {
	for _, kind := range []class{classOperator, classPeer} {
		var total time.Duration
		for range 100 {
			r := newTestRetry()
			for n := range 10 {
				wait := r.wait(oneOfEach[kind], time.Now(), true) // the next host refuses
				wait += r.wait(oneOfEach[classRefused], time.Now(), false)
				if n == 9 {
					total += wait
				}
			}
		}
		assert.Greater(t, total/100, 10*time.Second, "class %d: about half of its limit", kind)
	}
}

func TestWhatConsumeOkProvesStartsAnew(t *testing.T) {
	for _, kind := range []class{classAbsent, classOperator} {
		r := newTestRetry()
		for range 10 {
			r.wait(oneOfEach[kind], time.Now(), false)
		}
		r.consuming()
		assert.Equal(t, time.Second, r.wait(oneOfEach[kind], time.Now(), false))
	}
}

func TestLockIsNoYoungerForWhatFailsMeanwhile(t *testing.T) {
	r := newTestRetry()
	now := time.Now()
	var most time.Duration
	for range 200 { // of two hosts one refuses dials
		now = now.Add(r.wait(oneOfEach[classRefused], now, false))
		wait := r.wait(oneOfEach[classLocked], now, false)
		now, most = now.Add(wait), max(most, wait)
	}
	assert.Greater(t, most, 10*time.Second, "it is the operator's in the end")

	now = now.Add(time.Hour)
	assert.LessOrEqual(t, r.wait(oneOfEach[classLocked], now, false), time.Second, "another lock, an hour later")
}

func TestLockOfShortHeartbeatsIsTheOperatorsForGood(t *testing.T) {
	c := defaults("amqp://h/", "q")
	c.heartbeat = time.Second
	r := newRetry(c)
	now := time.Now()
	for r.rules[classOperator].failures < 8 {
		now = now.Add(r.wait(oneOfEach[classLocked], now, false))
	}
	for range 100 {
		wait := r.wait(oneOfEach[classLocked], now, false)
		assert.GreaterOrEqual(t, wait, time.Second)
		now = now.Add(wait)
	}
}
