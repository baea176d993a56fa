package sim_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestJudgeKnowsAConsumeOkFromASession(t *testing.T) {
	s := newSim(&simPlan{hosts: 1})
	s.start = time.Now()
	s.refused.Store(int64(time.Minute)) // a fault has refused
	c := &simConsumer{simPath: new(simPath), s: s, plan: &simConsumerPlan{name: "sim0", limit: time.Second}, state: steadymq.Connecting}
	c.run, c.running = &simRun{}, true
	s.consumers = []*simConsumer{c}
	refusal := &steadymq.SessionError{Op: "consume"}

	s.judge.consuming(steadymqtest.ConsumerRecord{Session: 1, Tag: "sim0-1"}) // the broker has sent it
	c.gaveUp(c.run, refusal, 0)
	assert.Empty(t, s.judge.violations)

	c.changed(steadymq.StateChange{From: steadymq.Connecting, To: steadymq.Consuming}) // it has arrived
	c.gaveUp(c.run, refusal, 0)
	require.Len(t, s.judge.violations, 1)
	assert.Contains(t, s.judge.violations[0], "I4")
}

// TestSeedsThatFoundFaults runs again what has found a fault of the library, each of which has a
// test of its own by now. What a seed means changes with the plan; it is as good as any other then.
func TestSeedsThatFoundFaults(t *testing.T) {
	for seed, found := range map[uint64]string{
		14:   "a stream that was quiet skips what is published while its session is lost",
		26:   "the renewal of credentials ends a connection on which a large message arrives",
		30:   "a stream with one channel does not heal",
		41:   "a queue that the broker has named is left behind with its messages",
		174:  "a queue that the broker has named is left behind by a 404 about something else",
		225:  "a driver that closes waits under its lock for the grace of a failed write",
		354:  "a frame that takes long to arrive is a silent peer",
		1078: "the stall detector's question holds up the stop",
		1100: "the outcome of a copy that is under way when its session is lost is told by nobody",
		1416: "a connection of a group tries a host twice that is away, because others have tried the other one",
		1860: "a queue of a topology function is left behind on a connection that another queue holds",
		1942: "a copy whose return cannot be read is sent again and again",
		2551: "a consumer waits for a channel that the broker does not let go",
		3157: "a set-up waits for the close of a channel that it has used up",
		3940: "an exclusive queue stays behind, locked, where its delete has failed or its declare was not answered",
		3971: "a consumer waits for a channel that the broker does not let go, after a restart",
		4242: "a copy that has failed often waits a quarter of an hour for a confirm that is lost",
		5019: "a copy whose return cannot be read is sent again and again, in a Group",
		5175: "a stream leaves a connection that is to go under its busy handlers",
		6808: "an answer to the close of a channel is taken for one to the open of the next, and a reader is left",
		9206: "a stop does not wait for the copies of sessions that the broker has cancelled",
	} {
		t.Run(found, func(t *testing.T) {
			t.Parallel()
			simulate(t, seed)
		})
	}
}
