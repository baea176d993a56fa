package wire

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What happens to a flushPolicy, at a time.
const (
	settles   = "a settlement"
	writes    = "another frame"
	idles     = "the reader waits"
	expires   = "the wait is over"
	goes      = "the writer takes all"
	goesFirst = "the writer was told and took all"
)

type flushStep struct {
	at   time.Duration
	what string
	tell bool          // the writer is to be told
	wait time.Duration // until expires, 0 for none
}

func TestAcksLeaveAtOnceOrShareTheirWrite(t *testing.T) {
	const (
		us = time.Microsecond
		ms = time.Millisecond
	)
	for name, c := range map[string]struct {
		prefetch int64
		delay    time.Duration
		idle     bool
		steps    []flushStep
	}{
		"one alone leaves at once": {100, ms, false, []flushStep{
			{10 * ms, settles, true, 0},
			{10 * ms, goes, false, 0},
			{12 * ms, settles, true, 0},
		}},
		"one with company waits for the write delay at most": {100, ms, false, []flushStep{
			{10 * ms, goesFirst, false, 0},
			{10*ms + 100*us, settles, false, ms},
			{10*ms + 300*us, settles, false, 0},
			{11*ms + 100*us, expires, true, 0},
		}},
		"one beside another that is about to leave goes along, and the next one waits no longer than it may": {100, ms, false, []flushStep{
			{10 * ms, settles, true, 0},
			{10*ms + 10*us, settles, false, 0},
			{10*ms + 20*us, goes, false, 0},
			{10*ms + 30*us, settles, false, ms},
			{11*ms + 30*us, expires, true, 0},
		}},
		"they leave together with any other frame": {100, ms, false, []flushStep{
			{10 * ms, goesFirst, false, 0},
			{10*ms + 100*us, settles, false, ms},
			{10*ms + 200*us, writes, true, 0},
			{10*ms + 300*us, settles, false, 0}, // the writer knows
			{10*ms + 300*us, goes, false, 0},
		}},
		"a wait that began for others counts from the first of the next": {100, ms, false, []flushStep{
			{10 * ms, goesFirst, false, 0},
			{10*ms + 100*us, settles, false, ms},
			{10*ms + 200*us, writes, true, 0},
			{10*ms + 200*us, goes, false, 0},
			{10*ms + 700*us, settles, false, 0}, // the timer runs still
			{11*ms + 100*us, expires, false, 600 * us},
			{11*ms + 700*us, expires, true, 0},
		}},
		"a wait for nothing ends": {100, ms, false, []flushStep{
			{10 * ms, goesFirst, false, 0},
			{10*ms + 100*us, settles, false, ms},
			{10*ms + 200*us, writes, true, 0},
			{10*ms + 200*us, goes, false, 0},
			{11*ms + 100*us, expires, false, 0},
			{11*ms + 200*us, goesFirst, false, 0},
			{11*ms + 300*us, settles, false, ms}, // and a new one begins
		}},
		"half of the prefetch leaves at once": {6, ms, false, []flushStep{
			{10 * ms, goesFirst, false, 0},
			{10*ms + 100*us, settles, false, ms},
			{10*ms + 200*us, settles, false, 0},
			{10*ms + 300*us, settles, true, 0},
		}},
		"a prefetch of one waits never": {1, ms, false, []flushStep{
			{10 * ms, goesFirst, false, 0},
			{10*ms + 1, settles, true, 0},
			{10*ms + 1, goes, false, 0},
			{10*ms + 2, settles, true, 0},
		}},
		"the last one on its way leaves at once": {100, ms, true, []flushStep{
			{10 * ms, goesFirst, false, 0},
			{10*ms + 1, settles, true, 0},
		}},
		"what waits leaves when the reader finds nothing more": {100, ms, false, []flushStep{
			{10 * ms, goesFirst, false, 0},
			{10*ms + 1, settles, false, ms},
			{10*ms + 2, idles, false, 0}, // others are at work still
			{10*ms + 3, "nobody is at work", false, 0},
			{10*ms + 4, idles, true, 0},
			{10*ms + 5, idles, false, 0}, // told already
		}},
		"a reader that idles sends nothing by itself": {100, ms, true, []flushStep{
			{10 * ms, idles, false, 0},
		}},
		"without a write delay none waits": {100, 0, false, []flushStep{
			{10 * ms, goesFirst, false, 0},
			{10 * ms, settles, true, 0},
			{10 * ms, settles, false, 0}, // told already
			{10 * ms, goes, false, 0},
			{10 * ms, settles, true, 0},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			idle := c.idle
			f := flushPolicy{delay: c.delay, idle: func() bool { return idle }}
			for i, step := range c.steps {
				var tell bool
				var wait time.Duration
				switch step.what {
				case settles:
					tell, wait = f.settled(step.at, c.prefetch)
				case writes:
					tell = f.flushNow()
				case idles:
					tell = f.flushIfIdle()
				case expires:
					wait = f.expired(step.at)
					tell = f.requested // the writer itself asks
				case goesFirst:
					f.settled(step.at, c.prefetch)
					f.taken()
				case goes:
					f.taken()
				default:
					idle = true
				}
				assert.Equal(t, step.tell, tell, "step %d, %s: the writer is told", i, step.what)
				assert.Equal(t, step.wait, wait, "step %d, %s: the wait", i, step.what)
			}
		})
	}
}

// Whatever happens in whatever order, what waits leaves when its time is over.
func TestNoAckWaitsLongerThanTheWriteDelay(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 0))
		f := flushPolicy{delay: time.Millisecond, idle: func() bool { return r.IntN(4) == 0 }}
		var at, timer, first time.Duration // timer, first: 0 for none
		for range 1000 {
			at += time.Duration(r.IntN(400)) * time.Microsecond
			for timer > 0 && timer <= at {
				now := timer
				timer = 0
				if wait := f.expired(now); wait > 0 {
					timer = now + wait
				}
			}
			if f.requested && r.IntN(3) > 0 { // the writer may take its time
				f.taken()
				first = 0
			}
			require.False(t, !f.requested && first > 0 && at > first+f.delay, "seed %d: one waits since %v, at %v", seed, first, at)
			if r.IntN(10) == 0 {
				f.flushNow()
				continue
			}
			if first == 0 {
				first = at
			}
			if _, wait := f.settled(at, 100); wait > 0 {
				require.Zero(t, timer, "seed %d: two timers", seed)
				timer = at + wait
			}
		}
	}
}
