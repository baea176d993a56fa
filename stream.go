package steadymq

import (
	"errors"
	"maps"
	"math"
	"strconv"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// position is how far a stream has been handled, over all sessions of one Run. A stream keeps its
// messages and starts a consumer where the consumer asks for. So without a position the successor
// of a lost session would skip what was published meanwhile. A nil position is that of a queue: it
// does nothing. Tries, workers and timers use it, all under mu.
type position struct {
	mu        sync.Mutex
	queue     string    // the name of the stream
	from      any       // where to resume while next is unknown; nil before the first subscription
	begun     bool      // there has been a subscription
	lookups   int       // how often the position was looked up
	known     bool      // next is set
	guessed   bool      // next comes from the first deliveries, of which none is settled yet
	next      int64     // offset of the first message that is not settled for good
	doubted   bool      // the broker has cancelled the consumer, so the stream may be about to end
	silent    int       // length of the stream when nothing came from here although it had grown, else 0
	comparing int       // the same, while a lookup finds out whether it is another stream
	session   uint64    // the try of the session that settled and acked are about
	settled   watermark // what handlers are done with
	acked     watermark // of these, what the broker was told

	restored string        // the stream whose place the store was asked for
	looked   int           // how often the message before a place of the store was looked for
	unproved bool          // next comes from the store, and nobody has looked whether the stream reaches it
	sure     bool          // next comes from an ack, a lookup or the store
	unsaved  bool          // it has moved since moved was called
	moves    chan struct{} // gets a value when it moves; nil without WithStreamOffsets
}

const offsetKey = "x-stream-offset"

// unknownOffset stands for the offset of a message whose headers cannot be read. It is higher than
// that of the message before, which is all that is known of it.
const unknownOffset = -1

func newPosition(c *config) *position {
	if !c.stream() {
		return nil
	}
	return &position{settled: newWatermark(), acked: newWatermark()}
}

// watermark is a set of delivery tags with their offsets: all tags up to low, and some above it.
type watermark struct {
	low   uint64           // all tags up to this one
	above map[uint64]int64 // tags above low, with their offsets
}

func newWatermark() watermark { return watermark{above: make(map[uint64]int64)} }

// add adds a tag. It returns the tags that low has moved over now, because none is missing below
// them any more.
func (w *watermark) add(d settledAt) (unbroken []settledAt) {
	w.above[d.tag] = d.offset
	for {
		offset, ok := w.above[w.low+1]
		if !ok {
			return unbroken
		}
		w.low++
		delete(w.above, w.low)
		unbroken = append(unbroken, settledAt{w.low, offset})
	}
}

// settledAt is a delivery of a stream and its offset.
type settledAt struct {
	tag    uint64
	offset int64
}

// maxLookups is how often a lookup is tried that is cut off: the stream may hold more than the path
// can carry within the setup limit.
const maxLookups = 2

// needsLookup records which stream the position is about. It returns the offset that has to be
// looked up before a session subscribes, and whether there is one: a shifting offset, until the
// stream has a position. For the offset last, after a lookup that was cut off, it returns the time
// of that lookup, so that what came since is found, or else still the last message. For a position
// from which nothing came, although the stream has grown, it returns the beginning.
func (p *position) needsLookup(queue string, given any) (offset any, ok bool) {
	if p == nil {
		return nil, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.turnTo(queue)
	if p.unproved {
		return restored(p.next - 1), true
	}
	if p.fresh() {
		return given, shifts(given, time.Now())
	}
	if p.silent > 0 {
		p.silent, p.comparing = 0, p.silent
		return "first", true
	}
	return p.from, given == "last" && !p.known && !p.begun && p.lookups < maxLookups
}

// turnTo forgets the position in another stream. It is called with mu held.
func (p *position) turnTo(queue string) {
	if p.queue != queue {
		p.queue, p.from, p.known, p.begun, p.lookups = queue, nil, false, false, 0
		p.silent, p.comparing = 0, 0 // of the stream before
		p.restored, p.unproved, p.sure, p.unsaved = "", false, false, false
	}
}

// place is how far a stream was handled.
type place struct {
	stream string
	next   int64 // the offset to go on at
}

// restored is the offset of the message before the place that a store had.
type restored int64

// isRestored reports whether the store need not be asked for the place in that stream.
func (p *position) isRestored(queue string) bool {
	if p == nil {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.queue == queue && p.restored == queue
}

// restore sets the position to what the store had, if that had any.
func (p *position) restore(queue string, next int64, found bool) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.turnTo(queue)
	p.restored, p.looked = queue, 0
	if found {
		p.next, p.known, p.sure = next, true, true
		p.unproved = next > 0
	}
}

// lookedFor counts the looks for the message before the place of the store, and returns how many
// there were.
func (p *position) lookedFor() int {
	if p == nil {
		return 1
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.looked++
	return p.looked
}

// verified records that the stream reaches the place of the store.
func (p *position) verified() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unproved = false
}

// moved returns the place to save, and whether it has moved since the last call.
func (p *position) moved() (at place, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ok, p.unsaved = p.unsaved, false
	return place{p.queue, p.next}, ok
}

// move asks for a save of the position, if that can be relied on. It is called with mu held.
func (p *position) move() {
	if p.moves != nil && p.sure {
		p.unsaved = true
		p.again()
	}
}

// again asks for a save of what could not be saved.
func (p *position) again() {
	select {
	case p.moves <- struct{}{}:
	default: // it is asked for already
	}
}

// fresh reports whether nothing is known about the position yet. It is called with mu held.
func (p *position) fresh() bool { return p.from == nil && !p.known }

// resume returns the arguments of the basic.consume of a new session. asked says that this session
// has just looked its position up; if the lookup has found no message, the session begins at the
// offset that the user gave.
func (p *position) resume(session uint64, args amqp.Table, asked bool) amqp.Table {
	args = maps.Clone(args)
	if p == nil {
		return args
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.session, p.settled, p.acked, p.doubted = session, newWatermark(), newWatermark(), false
	p.silent, p.comparing = 0, 0
	p.guessed = false
	if !p.known && (asked || p.from == nil) {
		return args
	}
	if args == nil {
		args = amqp.Table{}
	}
	args[offsetKey] = p.from
	if p.known {
		args[offsetKey] = p.next
	}
	return args
}

// subscribed records a consume-ok, and where the first session begins.
func (p *position) subscribed(offset any) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.begun = true
	if p.fresh() {
		p.from = offset
	}
}

// assume sets the position to a time, until a message gives it. The function that it returns is to
// be called with the broker's answer: if the broker refuses the consumer, there is no position.
// After any other failure it is not known whether the broker has taken the consumer.
func (p *position) assume(since time.Time) (answered func(error) error) {
	if p == nil {
		return func(err error) error { return err }
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lookups++
	mine := p.lookups
	if !p.fresh() {
		return func(err error) error { return err }
	}
	since = since.Add(-clockMargin)
	if epoch := time.Unix(0, 0); since.Before(epoch) {
		since = epoch
	}
	p.from = since
	return func(err error) error {
		var brokerErr *amqp.Error
		if errors.As(err, &brokerErr) && brokerErr.Server {
			p.mu.Lock()
			defer p.mu.Unlock()
			if !p.begun && p.lookups == mine { // no later session and no later lookup
				p.from = nil
			}
		}
		return err
	}
}

// locate sets the position, unless the offset is unknown.
func (p *position) locate(offset int64) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case offset == unknownOffset:
	case p.comparing == 0:
		p.next, p.known, p.sure = offset, true, true
		p.move()
	case offset == 0 && int64(p.comparing) < p.next: // past the end, so this is another stream
		p.next, p.session, p.sure = 0, 0, true
		p.move()
	}
	p.comparing = 0
}

// ahead reports whether a stream of that length may not have reached the position yet, because the
// consumer was told to begin at a future message.
func (p *position) ahead(length int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := headerInt(p.from)
	return ok && !p.known && int64(length) <= at
}

// startOver records that the stream does not exist any more. The next stream of its name counts
// from 0 again: asked for the old position, a broker would wait until the stream has that many
// messages, and skip all of them.
func (p *position) startOver() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doubted = false
	if p.fresh() {
		return
	}
	p.known, p.next = true, 0
	p.sure, p.unproved = true, false
	p.session = 0 // late settlements of the old stream do not count any more
	p.move()
}

// doubt records that the broker has cancelled the consumer, so the stream may be about to end.
func (p *position) doubt() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doubted = true
}

// fallSilent records that nothing came from the position although the stream has grown to this
// length. A stream that has dropped nothing, and is not as long as that, is another one: it was
// made anew unnoticed, and a broker waits until it is so long.
func (p *position) fallSilent(length int) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.known {
		p.silent = length
	}
}

// setupFailed records that a session could not be set up. If the reason is that the stream does not
// exist, the position starts over. A topology function may also have asked for another queue, whose
// absence changes nothing.
func (p *position) setupFailed(err error) {
	if p == nil {
		return
	}
	p.mu.Lock()
	queue := p.queue
	p.mu.Unlock()
	if noQueue(err, queue) {
		p.startOver()
	}
}

// began records a delivery that a handler is given: even if none is ever settled, the next session
// must not start after it.
func (p *position) began(session uint64, d *Delivery) {
	if p == nil {
		return
	}
	if d.fence.tries == 0 { // later tries in place have the original and its offset already
		d.keepOriginal()
		kept := d.fence.kept.Load()
		kept.offset, kept.hasOffset = headerInt(d.Headers[offsetKey])
	}
	kept := d.fence.kept.Load()
	offset, ok := kept.offset, kept.hasOffset
	p.mu.Lock()
	defer p.mu.Unlock()
	if !ok || session != p.session {
		return
	}
	// Tags count from 1, and a worker that has an earlier one may not have come here yet. If a
	// filter leaves gaps, that worker may lower the position still.
	at := max(offset-int64(d.fence.tag)+1, 0)
	if !p.known || p.guessed && at < p.next {
		p.known, p.guessed, p.next = true, true, at
	}
}

// ready records that a delivery is done for good, and returns the deliveries to ack now. None is
// acked before all that came earlier are done. The reason is that a broker sends one more message
// for each ack: while one handler is slow, any number of later messages could be done, and the next
// session, which resumes at the slow one, would be given all of them again.
func (p *position) ready(session uint64, d *Delivery) []settledAt {
	p.mu.Lock()
	defer p.mu.Unlock()
	kept := d.fence.kept.Load()
	if !kept.hasOffset || session != p.session {
		return []settledAt{{tag: d.fence.tag}}
	}
	return p.settled.add(settledAt{d.fence.tag, kept.offset})
}

// acknowledged records that an ack was sent, which moves the position to resume at.
func (p *position) acknowledged(session uint64, d settledAt) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if session != p.session {
		return
	}
	for _, d := range p.acked.add(d) {
		p.guessed = false
		if d.offset == unknownOffset {
			p.next++
			p.move()
			continue
		}
		p.next = d.offset + 1
		p.sure = true
		p.move()
	}
}

// clockMargin is how far the clocks of broker and client may differ where a time has to stand for a
// position. Messages that were published that long before the subscription may then be delivered.
const clockMargin = 5 * time.Minute

// shifts reports whether an offset stands for another message each time it is asked for: next,
// last, an interval such as 1h, and a time that has not passed yet, which RabbitMQ takes for next.
// Asked for a second time, it skips what was published since the first time.
func shifts(offset any, now time.Time) bool {
	switch at := offset.(type) {
	case nil:
		return true
	case string:
		return at != "first"
	case time.Time:
		return at.After(now.Add(-clockMargin))
	}
	return false
}

func offsetOf(d *Delivery) int64 {
	if at, ok := headerInt(d.Headers[offsetKey]); ok {
		return at
	}
	return unknownOffset
}

// assignOffset gives d an offset if it has none because the broker's cannot be read.
func assignOffset(d *Delivery) {
	if m := d.fence.kept.Load(); !m.hasOffset {
		m.offset, m.hasOffset = unknownOffset, true
	}
}

// interval reads an offset such as 1h, as RabbitMQ does. It returns 0 for last.
func interval(offset any) time.Duration {
	text, _ := offset.(string)
	if text == "" {
		return 0
	}
	const day = 24 * time.Hour
	unit := map[byte]time.Duration{
		'Y': 365 * day, 'M': 30 * day, 'D': day, 'h': time.Hour, 'm': time.Minute, 's': time.Second,
	}[text[len(text)-1]]
	n, err := strconv.ParseUint(text[:len(text)-1], 10, 63)
	if err != nil || unit == 0 {
		return 0
	}
	return time.Duration(min(n, uint64(math.MaxInt64/unit))) * unit
}
