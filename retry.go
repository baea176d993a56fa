package steadymq

import (
	"strings"
	"time"

	"github.com/steadymq/steadymq/internal/retryqueue"
)

// The policy of WithRetry, and what New refuses of it. What it makes of a failed delivery is in
// transfer.go.

// Retry is the policy of [WithRetry].
type Retry struct {
	// Attempts is how often a handler is given a message before the message is given up, the first
	// time included. Range 1 to 1,000; 1 retries nothing. 0, with a Park queue and no Delays, gives
	// nothing up by itself: a plain error is held as without a policy ([WithRequeueDelay]), and only
	// [Park] and a [*DecodeError] park.
	Attempts int
	// Delays are the waits before the second attempt, the third and so on; the last one repeats.
	// Each has a queue of its own. From 100 ms to 24 h in whole milliseconds, each longer than the
	// one before, 16 at most and no more than there are retries.
	Delays []time.Duration
	// Park is the queue that keeps messages which are given up, with their cause. "" discards them:
	// they are dropped, or dead-lettered if the queue has a dead-letter exchange.
	Park string
}

const (
	maxAttempts = 1000
	maxDelays   = 16
	minDelay    = 100 * time.Millisecond
)

// checkRetry checks the policy with what it meets.
func (c *config) checkRetry() {
	r := c.retry
	if r == nil {
		return
	}
	refuse := func(format string, args ...any) { c.refuse("WithRetry", format, args...) }
	if !r.onlyParks() && (r.Attempts < 1 || r.Attempts > maxAttempts) {
		refuse("Attempts must be between 1 and %d, got %d (or 0 beside nothing but Park, which then takes what a handler wants to be parked)", maxAttempts, r.Attempts)
	}
	c.checkDelays(r)
	c.shortString("WithRetry", "Park", r.Park)
	switch {
	case strings.ContainsAny(r.Park, "\r\n"):
		refuse("Park %q has a line break, and RabbitMQ takes those out of the names of queues", r.Park)
	case namedByBroker(r.Park):
		refuse("Park %q begins with amq., which RabbitMQ keeps for names of its own", r.Park)
	case r.Attempts == 1 && r.Park == "":
		refuse("Attempts is 1 and Park is empty, so every message that fails once would be discarded; name a Park queue, or return Discard from the handler")
	}
	if c.by != "NewGroup" { // there the queue is not known yet
		c.checkRetryOf(c.queue, r)
	}
}

// onlyParks reports whether the policy is for what a handler wants to be parked, and nothing else.
func (r *Retry) onlyParks() bool { return r.Attempts == 0 && len(r.Delays) == 0 && r.Park != "" }

func (c *config) checkDelays(r *Retry) {
	refuse := func(format string, args ...any) { c.refuse("WithRetry", format, args...) }
	switch {
	case len(r.Delays) == 0 && r.Attempts > 1:
		refuse("Delays is empty, and a message that failed needs one to come back after, such as []time.Duration{time.Second, time.Minute}")
	case len(r.Delays) > maxDelays:
		refuse("Delays may be %d at most, each has a queue; got %d", maxDelays, len(r.Delays))
	case r.Attempts >= 1 && len(r.Delays) > r.Attempts-1:
		refuse("Delays may be %d at most, one before each further attempt of %d; got %d", r.Attempts-1, r.Attempts, len(r.Delays))
	}
	for i, d := range r.Delays {
		switch {
		case d < minDelay, d > maxDuration, d%time.Millisecond != 0:
			refuse("Delays[%d] must be between %v and %v in whole milliseconds, got %v (a bare number counts nanoseconds: write 30*time.Second)", i, minDelay, maxDuration, d)
		case i > 0 && d <= r.Delays[i-1]:
			refuse("Delays must grow, but Delays[%d] is %v after %v", i, d, r.Delays[i-1])
		}
	}
}

// checkRetryOf checks the policy with its queue.
func (c *config) checkRetryOf(queue string, r *Retry) {
	refuse := func(format string, args ...any) { c.refuse("WithRetry", format, args...) }
	q := c.declare
	switch {
	case c.stream():
		refuse("is not for streams: nothing can be taken out of one. A failed message of a stream is tried again in place")
	case q != nil && (q.Exclusive || q.AutoDelete), queue == "" && c.topology == nil:
		refuse("is not for exclusive and auto-delete queues, nor for those that the broker names: the delayed messages would have nowhere to come back to")
	case queue != "" && r.Park == queue:
		refuse("Park is the queue %q itself", queue)
	}
	for _, d := range r.Delays {
		name := retryqueue.DelayName(queue, d)
		if name == r.Park {
			refuse("Park is %q, the queue of a delay", name)
		}
		if q != nil && q.DeadLetter != nil && q.DeadLetter.Queue == name {
			refuse("%q is the queue of a delay and cannot be the dead-letter queue", name)
		}
		c.shortString("WithRetry", "the name of the delay queue "+name, name)
	}
	if q != nil && !r.onlyParks() && (q.RetryMin > 0 || q.RetryMax > 0) {
		refuse("Attempts and Queue.RetryMin say in two ways what follows a failure; leave one out")
	}
}
