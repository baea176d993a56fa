package steadymqtest

// refuses reports whether the queue is full and rejects what is published.
//
// A classic queue is full at its length. A quorum queue tells its publishers to stop when it is longer than that, and to go on when
// four fifths are left: so it takes one more, and a publisher that has been told waits longer than one that comes only then.
func (q *queue) refuses(by any) bool {
	switch {
	case !q.rejectWhenFull, q.kind == kindStream:
		return false
	case q.kind == kindClassic:
		return q.length() >= q.maxLength && !q.idle()
	case by == nil:
		return false
	}
	if q.stored() <= q.maxLength-(q.maxLength+4)/5 {
		clear(q.writers)
	}
	told, known := q.writers[by]
	if !known {
		if q.writers == nil {
			q.writers = make(map[any]bool)
		}
		told = q.crowded()
		q.writers[by] = told
	}
	return told
}

// shut tells all who publish to a quorum queue that it is full, once it is.
func (q *queue) shut(by any) {
	if q.kind != kindQuorum || !q.rejectWhenFull || by == nil || !q.crowded() {
		return
	}
	for writer := range q.writers {
		q.writers[writer] = true
	}
}

// crowded reports whether the queue is longer than it may be.
func (q *queue) crowded() bool { return q.maxLength >= 0 && q.stored() > q.maxLength }

// stored is what counts towards the length: what is ready and, in a quorum queue, what will be and what has no target yet.
func (q *queue) stored() int { return q.length() + len(q.delayed) + len(q.dead) }

// dropSurplus drops the oldest of what is too much.
func (q *queue) dropSurplus() {
	for q.kind != kindStream && !q.rejectWhenFull && q.crowded() && q.length() > 0 {
		q.dropHead("maxlen")
	}
}
