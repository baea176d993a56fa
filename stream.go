package steadymq

import (
	"errors"
	"maps"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const offsetKey = "x-stream-offset"

// unknownOffset is that of a message whose headers cannot be read: behind the one
// before, at least.
const unknownOffset = -1

// placed gives d an offset if the broker's cannot be read.
func placed(d *Delivery) {
	if m := d.fence.stream; !m.placed {
		m.offset, m.placed = unknownOffset, true
	}
}

// position remembers how far a stream has been handled, over the sessions of one
// Run: a stream keeps its messages and starts a consumer where the consumer says,
// so without it the successor of a lost session would skip what was published
// meanwhile. A nil position is that of a queue: it does nothing.
type position struct {
	mu      sync.Mutex
	queue   string    // the stream it is about
	from    any       // where to resume as long as next is not known; nil before the first subscription
	begun   bool      // there has been a subscription
	looks   int       // how often the place was looked up
	known   bool      // next is set
	guessed bool      // from the first deliveries, of which none is settled yet
	next    int64     // offset of the first message not settled for good
	doubted bool      // the broker has cancelled the consumer, so the stream may be on its way out
	session uint64    // the try of the session that the rows are about
	settled watermark // what handlers are done with
	acked   watermark // of that, what the broker was told
}

// watermark is delivery tags and their offsets: all up to low, and some above it.
type watermark struct {
	low   uint64
	above map[uint64]int64
}

func newWatermark() watermark { return watermark{above: make(map[uint64]int64)} }

// add notes a tag, and returns those that now follow low without a gap, which low
// has moved over.
func (r *watermark) add(d settledAt) (unbroken []settledAt) {
	r.above[d.tag] = d.offset
	for {
		offset, ok := r.above[r.low+1]
		if !ok {
			return unbroken
		}
		r.low++
		delete(r.above, r.low)
		unbroken = append(unbroken, settledAt{r.low, offset})
	}
}

// settledAt is a delivery of a stream, and its place there.
type settledAt struct {
	tag    uint64
	offset int64
}

func newPosition(c *config) *position {
	if !c.stream() {
		return nil
	}
	return &position{settled: newWatermark(), acked: newWatermark()}
}

// maxLooks is how often a look that is cut off is tried again: what the stream holds may be more
// than the path can carry within the setup limit.
const maxLooks = 2

// about notes which stream it is about, and returns the offset that has to be looked up before a
// session subscribes, if there is one: what shifts, until the stream has a place. If that is last
// and the look was cut off, it is what came since, or else still the last.
func (p *position) about(queue string, given any) (offset any, ok bool) {
	if p == nil {
		return nil, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.queue != queue {
		p.queue, p.from, p.known, p.begun, p.looks = queue, nil, false, false, 0
	}
	if p.fresh() {
		return given, shifts(given, time.Now())
	}
	return p.from, given == "last" && !p.known && !p.begun && p.looks < maxLooks
}

// fresh is called with mu held.
func (p *position) fresh() bool { return p.from == nil && !p.known }

// resume returns the arguments of the basic.consume of a new session. The first one, which has
// just asked where to begin, and was not told, begins where it was given to.
func (p *position) resume(session uint64, args amqp.Table, asked bool) amqp.Table {
	args = maps.Clone(args)
	if p == nil {
		return args
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.session, p.settled, p.acked, p.doubted = session, newWatermark(), newWatermark(), false
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

// subscribed notes a consume-ok, and where the first one begins.
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

// assume takes a time for the place, as long as no message tells it. The function it returns is
// called with what the broker answers: if it does not take the consumer, there is no place.
// Any other failure does not tell whether it has.
func (p *position) assume(since time.Time) (answered func(error) error) {
	if p == nil {
		return func(err error) error { return err }
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.looks++
	mine := p.looks
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
			if !p.begun && p.looks == mine { // nobody has subscribed or looked since
				p.from = nil
			}
		}
		return err
	}
}

// locate sets the place, unless the offset is unknown.
func (p *position) locate(offset int64) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if offset != unknownOffset {
		p.next, p.known = offset, true
	}
}

// ahead tells whether a stream of that length may not have come to the place yet, because the
// consumer was told to begin at a message of the future.
func (p *position) ahead(length int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := headerInt(p.from)
	return ok && !p.known && int64(length) <= at
}

// startOver notes that the stream is gone. The one that will have its name
// counts from 0 again: asked for the old place, a broker would wait until it has
// that many messages and skip them all.
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
	p.session = 0 // what late handlers of the old one settle counts no more
}

// doubt notes that the broker has cancelled the consumer.
func (p *position) doubt() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doubted = true
}

// gone notes that a session could not be set up because the stream is not there. A
// topology function may also have asked for another queue.
func (p *position) gone(err error) {
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

// noQueue tells that there is no queue of that name, from one whose node is down.
func noQueue(err error, name string) bool {
	var brokerErr *amqp.Error
	if !errors.As(err, &brokerErr) || !brokerErr.Server || brokerErr.Code != amqp.NotFound {
		return false
	}
	text, cut := wording(brokerErr)
	want := "no queue '" + name + "' in vhost '"
	if cut {
		text = strings.TrimSuffix(text, "...")
		want = want[:min(len(want), len(text))]
	}
	return strings.HasPrefix(text, want)
}

// began notes a delivery that a handler is given: even if none is ever settled,
// the next session must not start behind it.
func (p *position) began(session uint64, d *Delivery) {
	if p == nil {
		return
	}
	if d.fence.tries == 0 { // the others have what it was, and its place
		d.keep()
		d.fence.stream.offset, d.fence.stream.placed = headerInt(d.Headers[offsetKey])
	}
	offset, ok := d.fence.stream.offset, d.fence.stream.placed
	p.mu.Lock()
	defer p.mu.Unlock()
	if !ok || session != p.session {
		return
	}
	// Tags count from 1: a worker with an earlier one may not be here yet. A filter leaves gaps, so
	// that one may lower the place still.
	at := max(offset-int64(d.fence.tag)+1, 0)
	if !p.known || p.guessed && at < p.next {
		p.known, p.guessed, p.next = true, true, at
	}
}

// ready notes that a delivery is done for good and returns those to ack now: none
// before all that came earlier are done. A broker sends one more for every ack, so
// behind one slow handler any number of messages would be done that the next
// session, which resumes at the slow one, is given again.
func (p *position) ready(session uint64, d *Delivery) []settledAt {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !d.fence.stream.placed || session != p.session {
		return []settledAt{{tag: d.fence.tag}}
	}
	return p.settled.add(settledAt{d.fence.tag, d.fence.stream.offset})
}

// toldAcked notes that the broker was told, which moves the place to resume at.
func (p *position) toldAcked(session uint64, d settledAt) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if session != p.session {
		return
	}
	for _, d := range p.acked.add(d) {
		p.guessed = false
		if d.offset == unknownOffset {
			p.next++
			continue
		}
		p.next = d.offset + 1
	}
}

// clockMargin is how far the clocks of broker and client may be apart where a time has to stand
// for a place. Messages from as long before the subscription may come then.
const clockMargin = 5 * time.Minute

// shifts tells whether an offset stands for another message each time it is asked for: next, last,
// an interval such as 1h, and a time that is not over yet, which RabbitMQ takes for next. Asked for
// a second time, it skips what was published since the first.
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

// interval reads an offset such as 1h, as RabbitMQ does. It is 0 for last.
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
