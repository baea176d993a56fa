package sim_test

import (
	"time"

	"github.com/steadymq/steadymq/steadymqtest"
)

// simStream is what a stream holds. A message is noted before it is published.
type simStream struct {
	published []time.Time
	unfit     map[int]bool
}

// simReading is how far a Run has read a stream.
type simReading struct {
	known bool         // there has been a session, so there is a place
	from  int          // the first message that it has to handle ...
	since time.Time    // ... of those published then or later
	done  map[int]bool // handled for good
	acked map[int]bool // and the broker knows
	next  int          // all that have to be handled before it are done
	told  int          // the same of acked
}

// streamOf returns the stream that c reads, nil if it reads none.
func (j *simJudge) streamOf(c *simConsumer) *simStream { return j.streams[c.plan.queue] }

// place notes where a session of a stream would begin with the next message, and what the broker
// knows to be done. That must not come again, unless the session before may still settle.
func (j *simJudge) place(x *simSession) {
	stream, before := j.streamOf(x.consumer), x.consumer.latest
	if stream == nil {
		return
	}
	x.end = len(stream.published)
	if before == nil || before.run != x.run || before.record.Ended.IsZero() || handlersGoOn(before.record.Cause) {
		return
	}
	r := &x.run.reading
	for r.acked[r.told] {
		r.told++
	}
	if r.told > r.from { // else it may have no place but by its clock
		x.told = r.told
	}
}

// begins notes where the first session of a Run, of which the consumer knows, begins.
func (j *simJudge) begins(run *simRun, x *simSession) {
	r, stream := &run.reading, j.streamOf(x.consumer)
	if stream == nil || r.known {
		return
	}
	r.known = true
	switch p := x.consumer.plan; p.offset {
	case "next":
		r.from = x.end
	case "last":
		r.from = max(0, x.end-1)
	case "number":
		r.from = p.place
	case "time":
		r.since = simEpoch.Add(p.since)
		for r.from < x.end && stream.published[r.from].Before(r.since) {
			r.from++
		}
	}
	run.restore()
	r.next, r.told = r.from, r.from
}

// offset is the place of a message in its stream.
func (j *simJudge) offset(id string) int { return j.offsets[id] }

// resumes judges the first delivery of a session: it is not behind a message that is still to be
// handled, nor before those of which the broker knows that they have been.
func (j *simJudge) resumes(x *simSession, id string) {
	stream := j.streamOf(x.consumer)
	first := !x.resumed
	x.resumed = true
	if stream == nil || !first || !x.run.reading.known || j.s.plan.queues[x.consumer.plan.queue].purged {
		return
	}
	r, at := &x.run.reading, j.offset(id)
	if at < r.from { // the look for the place was cut off, so the clock stands for it
		r.from, r.next, r.told, x.told = at, at, at, at
	}
	done := func(n int) bool { return r.done[n] || stream.unfit[n] }
	for r.next < len(stream.published) && (done(r.next) || stream.published[r.next].Before(r.since)) {
		r.next++
	}
	if at > r.next {
		j.note("I2", "session %s of a stream begins at %d, message %d has not been handled", x.record.Tag, at, r.next)
	}
	if at < x.told {
		j.note("I5", "session %s of a stream begins at %d again, the broker has acks up to %d", x.record.Tag, at, x.told)
	}
}

// ackedInStream judges a settlement of a stream's consumer.
func (j *simJudge) ackedInStream(x *simSession, h *simHandled, r *steadymqtest.SettlementRecord) {
	stream, at := j.streamOf(x.consumer), j.offset(r.ID)
	switch {
	case r.Kind != steadymqtest.Ack:
		j.note("I1", "a stream has no way back: %+v", r)
	case h == nil && !stream.unfit[at]:
		j.note("I3", "an ack of a message that no handler had in that session: %+v", r)
	case h != nil && h.id != r.ID:
		j.note("I3", "an ack of message %s, its handler had %s: %+v", r.ID, h.id, r)
	case h != nil && !h.done:
		j.note("I3", "an ack of a message whose handler has not decided so (%b): %+v", h.allowed, r)
	}
	if x == x.consumer.latest { // its successor is given what an old one has still to settle
		x.run.reading.acked[at] = true
	}
	if h != nil {
		h.settled = true
	}
}

// behind returns the first message that c has still to handle, -1 if there is none.
func (j *simJudge) behind(c *simConsumer) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	stream := j.streamOf(c)
	if stream == nil || j.s.plan.queues[c.plan.queue].purged {
		return -1
	}
	if c.run == nil || !c.run.reading.known {
		return 0
	}
	r := &c.run.reading
	for n := r.next; n < len(stream.published); n++ {
		if !r.done[n] && !stream.unfit[n] && !stream.published[n].Before(r.since) {
			return n
		}
	}
	return -1
}
