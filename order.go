package steadymq

import (
	"context"
	"errors"
	"hash/maphash"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Order by key: which delivery may start, and which waits for an earlier one of its key.

// order is the keys of a Consumer. It outlives sessions and Runs, because a handler that is still at
// work holds its key. It is nil without WithOrderingKey. Workers find out the keys, side by side;
// each delivery then gets its place after those that the broker delivered before it. mu guards all
// of it, and the places of the sessions.
type order struct {
	key   func(*Delivery) string
	limit time.Duration // how long a delivery may be here and still be tried again in place
	start time.Time     // what arrivals count from
	seed  maphash.Seed

	mu       sync.Mutex
	lines    map[string]*line
	spare    []*line // to be used again
	returned []*line // that expect something, or did; oldest first
}

func newOrder(c *config) *order {
	if c.orderingKey == nil {
		return nil
	}
	return &order{
		key: c.orderingKey, limit: c.consumerTimeout() / 2, start: time.Now(),
		seed: maphash.MakeSeed(), lines: make(map[string]*line),
	}
}

// line is the deliveries of one key. It exists while somebody holds the key, and while what went back
// is expected.
type line struct {
	key string

	holder  *Delivery // whose turn it is; nil if nobody's
	of      *session  // of the holder
	working bool      // a worker has the holder
	settled bool      // the holder is
	body    []byte    // of the holder as it came, since its handler may change it
	id      string    // likewise

	waiting fifo     // later ones
	session *session // theirs

	expected []expected  // what went back, in the order of the queue; nothing else comes before it
	since    time.Time   // when the first of it did
	outgoing []goingBack // behind what is expected already
	sending  bool        // somebody sends outgoing
	blocked  bool        // nobody may: the holder goes back first
	listed   bool        // in order.returned

	fault error // why the key is not known; such a line is in no map
}

// expected is a message that went back to its queue.
type expected struct {
	sum    uint64 // its fingerprint
	behind bool   // it went back after all before it
	times  int    // that it went back since one before it came
}

// lineOf returns the line that d is in, nil if it has no key.
func lineOf(d *Delivery) *line {
	l, _ := d.fence.turn.(*line)
	return l
}

func (l *line) unknown() error { return l.fault }

// goingBack is a delivery that goes back to its queue and was never started.
type goingBack struct {
	session *session
	tag     uint64
}

// places are the part of a session in the order of its Consumer.
type places struct {
	wake *Delivery // no delivery; in the inbox it tells a worker that one is ready

	ended  bool
	placed uint64           // deliveries up to this one have their place
	early  map[uint64]keyed // later ones whose key was found sooner
	ready  fifo             // those that may start, in the order of the queue
	any    atomic.Bool      // ready has some; read without mu
	timer  *time.Timer      // looks for a key function that hangs; nil if nobody waits for one
	seen   uint64           // placed at its last look
}

// keyed is a delivery with its key, or with the reason why there is none.
type keyed struct {
	delivery *Delivery
	key      string
	fault    error
}

// effects is what is to be done without mu.
type effects struct {
	wake  *session // that has deliveries which are ready
	ready int      // how many
	send  []*line  // whose outgoing is to be sent
}

// slowKey is how long deliveries wait for the key of an earlier one.
const slowKey = time.Second

var errSlowKey = errors.New("WithOrderingKey: the function took longer than a second, so later messages did not wait for this one")

// take waits for a delivery of s that may start, as far as its key is concerned. What was held up by
// its key comes first, because it is older than what no worker has taken yet.
func (o *order) take(s *session) (*Delivery, bool) {
	if o == nil {
		return s.inbox.take()
	}
	for {
		if d := o.takeReady(s); d != nil {
			return d, true
		}
		d, ok := s.inbox.take()
		switch {
		case !ok:
			return nil, false
		case d == s.places.wake:
		case o.place(s, d):
			return d, true
		}
	}
}

func (o *order) takeReady(s *session) *Delivery {
	t := s.places
	if !t.any.Load() {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	d := t.ready.pop()
	t.any.Store(t.ready.head < len(t.ready.all))
	if d == nil {
		return nil
	}
	if l := lineOf(d); l != nil {
		l.working = true
	}
	return d
}

// place finds out the key of d and gives d its place. It reports whether the caller starts with d. A
// function that panics or ends its goroutine leaves d without a key: then d fails, in no order.
func (o *order) place(s *session, d *Delivery) (mine bool) {
	d.init(s.settler) // the function may ask where d comes from
	k := keyed{delivery: d}
	returned := false
	defer func() {
		if returned {
			return
		}
		value := recover()
		k.fault = panicked(value)
		d.DeliveryTag = d.fence.tag
		if mine = o.admit(s, k); mine && value == nil { // this goroutine ends
			mine = false
			o.giveAway(s, d)
		}
	}()
	k.key = o.key(d)
	returned = true
	d.DeliveryTag = d.fence.tag // in case the function changed it
	return o.admit(s, k)
}

// giveAway leaves d, which may start, to another worker.
func (o *order) giveAway(s *session, d *Delivery) {
	var e effects
	o.mu.Lock()
	s.places.enqueue(d, &e, s)
	o.mu.Unlock()
	o.do(e)
}

// admit gives a delivery its place, or lets it wait until all before it have theirs.
func (o *order) admit(s *session, k keyed) (mine bool) {
	var e effects
	o.mu.Lock()
	t, n := s.places, k.delivery.fence.number
	switch {
	case t.ended:
		o.mu.Unlock()
		s.unstarted(k.delivery)
		return false
	case n > t.placed+1:
		o.awaitEarlier(s, k)
		o.mu.Unlock()
		return false
	case n == t.placed+1:
		t.placed = n
	case n > 0:
		k.fault = errSlowKey
	}
	mine = o.claim(s, k, &e)
	if l := lineOf(k.delivery); mine && l != nil {
		l.working = true
	}
	o.admitEarly(s, &e)
	o.mu.Unlock()
	o.do(e)
	return mine
}

// awaitEarlier lets a delivery wait whose key was found before that of an earlier one.
func (o *order) awaitEarlier(s *session, k keyed) {
	t := s.places
	if t.early == nil {
		t.early = make(map[uint64]keyed)
	}
	t.early[k.delivery.fence.number] = k
	if t.timer == nil {
		t.seen = t.placed
		t.timer = time.AfterFunc(slowKey, func() { o.look(s) })
	}
}

// admitEarly places those that waited for nothing but what has its place now.
func (o *order) admitEarly(s *session, e *effects) {
	t := s.places
	for {
		k, ok := t.early[t.placed+1]
		if !ok {
			return
		}
		t.placed++
		delete(t.early, t.placed)
		if o.claim(s, k, e) {
			t.enqueue(k.delivery, e, s)
		}
	}
}

// look steps over a delivery whose key is not found. It keeps its worker until the function returns.
func (o *order) look(s *session) {
	var e effects
	o.mu.Lock()
	t := s.places
	hangs := len(t.early) > 0 && t.placed == t.seen
	if hangs {
		t.placed++
		o.admitEarly(s, &e)
	}
	if t.seen = t.placed; len(t.early) == 0 {
		t.timer = nil
	} else {
		t.timer.Reset(slowKey)
	}
	o.mu.Unlock()
	o.do(e)
	if !hangs {
		return
	}
	if left, ok := s.notices.slowKey.allow(time.Minute); ok {
		s.warn("the function of WithOrderingKey has not returned for a second: later messages no longer wait for its message, which keeps a worker and then fails", suppressed(left))
	}
}

// claim reports whether a delivery may start. If not it waits for its key, or goes back.
func (o *order) claim(s *session, k keyed, e *effects) bool {
	d := k.delivery
	switch {
	case k.fault != nil:
		d.fence.turn = &line{fault: k.fault}
		return true
	case k.key == "":
		return true
	}
	l := o.lineFor(k.key)
	d.fence.turn = l
	switch {
	case !l.accepts(o, s, d):
		l.send(e)
		return false
	case l.holder != nil:
		l.waiting.push(d)
		l.session = s
		return false
	}
	l.hold(d, s)
	return true
}

func (o *order) lineFor(key string) *line {
	l := o.lines[key]
	switch n := len(o.spare); {
	case l != nil:
		return l
	case n > 0:
		l = o.spare[n-1]
		o.spare = o.spare[:n-1]
	default:
		l = new(line)
	}
	l.key = key
	o.lines[key] = l
	return l
}

func (l *line) hold(d *Delivery, s *session) {
	l.holder, l.of, l.working = d, s, false
	l.settled = d.Outcome() != Unsettled
	l.body, l.id = d.Body, d.MessageId
}

// pass gives the turn to the next of the key. It is called when the holder is done with.
func (o *order) pass(l *line, e *effects) {
	l.holder, l.of, l.working, l.blocked, l.body, l.id = nil, nil, false, false, nil, ""
	if d := l.waiting.pop(); d != nil {
		l.hold(d, l.session)
		l.session.places.enqueue(d, e, l.session)
		return
	}
	o.tidy(l)
}

// tidy forgets a line that nothing depends on.
func (o *order) tidy(l *line) {
	if l.holder != nil || l.sending || len(l.outgoing) > 0 || len(l.expected) > 0 || o.lines[l.key] != l {
		return
	}
	delete(o.lines, l.key)
	l.key, l.session = "", nil
	if len(o.spare) < mostSpare {
		o.spare = append(o.spare, l)
	}
}

// mostSpare is how many lines are kept to be used again.
const mostSpare = 1024

// enqueue makes d ready. Most often it is the youngest.
func (t *places) enqueue(d *Delivery, e *effects, s *session) {
	t.ready.push(d)
	all := t.ready.all
	for i := len(all) - 1; i > t.ready.head && all[i-1].fence.number > d.fence.number; i-- {
		all[i], all[i-1] = all[i-1], all[i]
	}
	t.any.Store(true)
	e.wake = s
	e.ready++
}

// do does what could not be done under mu.
func (o *order) do(e effects) {
	for range e.ready {
		e.wake.inbox.put(e.wake.places.wake)
	}
	for _, l := range e.send {
		o.sendBack(l)
	}
}

// settling is called before a settlement of d is sent. If d goes back to the queue, so do those that
// wait for it, behind it.
func (o *order) settling(s *session, d *Delivery, outcome Outcome) {
	if o == nil || outcome != Requeued || s.stream != nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if l := lineOf(d); l != nil && l.holder == d && !s.places.ended {
		o.goBack(l)
	}
}

// settled is called when a settlement of d was sent. One that was not changes nothing: the end of
// the session follows.
func (o *order) settled(s *session, d *Delivery, outcome Outcome) {
	if o == nil {
		return
	}
	var e effects
	o.mu.Lock()
	l := lineOf(d)
	if l != nil && l.holder == d && (s.stream == nil || outcome != Requeued) { // else it is tried again in place
		l.settled, l.blocked = true, false
		if outcome != Requeued && s.places.ended && !s.closed.Load() {
			l.unexpect(o)
		}
		l.send(&e)
		o.release(l, &e)
	}
	o.mu.Unlock()
	o.do(e)
}

// left is called when a worker is done with d. If that is settled too, the next of its key may
// start. This worker comes for it, unless d was of an earlier session.
func (o *order) left(s *session, d *Delivery) {
	if o == nil {
		return
	}
	var e effects
	o.mu.Lock()
	if l := lineOf(d); l != nil && l.holder == d {
		l.working = false
		o.release(l, &e)
	}
	o.mu.Unlock()
	if e.wake == s {
		e.ready = 0
	}
	o.do(e)
}

// release lets the line go on once its holder is done with: no worker has it, and it is settled or
// cannot be any more. A session that is closed and has its places still is about to end them, and
// has to find there what it leaves unsettled.
func (o *order) release(l *line, e *effects) {
	if !l.working && (l.settled || l.of.places.ended && l.of.closed.Load()) {
		o.pass(l, e)
	}
}

// leaves reports whether s lets the end of its channel put back what is unsettled. That keeps the
// order on every broker; after a basic.reject up to RabbitMQ 3.13 a quorum queue without a delivery
// limit has the message at its end.
func (o *order) leaves(s *session) bool {
	if o == nil {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return s.places.ended
}

// end ends the places of a session that lets no more handlers start. What it has delivered and no
// handler has goes back with its channel, in order. Once the session is closed nothing of it holds a
// key but a handler that is still at work.
func (o *order) end(s *session) {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if t := s.places; !t.ended {
		t.ended, t.ready, t.early = true, fifo{}, nil
		for _, l := range o.lines {
			l.endWait(o, s)
		}
	}
	if !s.closed.Load() {
		return
	}
	var none effects // nobody waits but in a session that follows this one
	for _, l := range o.lines {
		if l.of == s && !l.working {
			o.pass(l, &none)
		}
	}
}

// endWait ends the wait of deliveries of s.
func (l *line) endWait(o *order, s *session) {
	l.expectUnsettled(o, s)
	if l.session == s {
		l.waiting, l.session = fifo{}, nil
	}
}

// again lets next take the turn of d, which is tried again in place.
func (o *order) again(s *session, d, next *Delivery) {
	if o == nil {
		s.inbox.put(next)
		return
	}
	var e effects
	o.mu.Lock()
	l := lineOf(d)
	switch {
	case l == nil || l.fault != nil: // of no order
		defer s.inbox.put(next)
	case l.holder == d && !s.places.ended:
		next.fence.turn, next.fence.number, next.fence.arrived = l, d.fence.number, d.fence.arrived
		l.waiting.pushFront(next)
		l.session, l.settled = s, true
		o.release(l, &e)
	}
	o.mu.Unlock()
	o.do(e)
}

// decide returns what becomes of a failed delivery: with a key a plain error is tried again in place,
// as long as the broker lets the delivery be unsettled.
func (o *order) decide(d *Delivery, err error, v verdict) verdict {
	if o == nil || err == nil || v.outcome != Requeued || v.delay == 0 {
		return v
	}
	l := lineOf(d)
	if asked, explicit := OutcomeOf(err); l == nil || l.fault != nil || explicit && asked == Requeued {
		return v
	}
	if v.inPlace = time.Since(o.start)-d.fence.arrived+v.delay < o.limit; !v.inPlace {
		v.delay = 0
	}
	return v
}

// arrive notes when d arrived, and how many deliveries of its session have.
func (o *order) arrive(d *Delivery, count *uint64) {
	if o == nil {
		return
	}
	*count++
	d.fence.number, d.fence.arrived = *count, time.Since(o.start)
}

// What goes back. A message that is put back comes again, and what came after it and is here, or on
// its way, would overtake it. So all of that goes back too, and until it comes again nothing else of
// its key starts. AMQP gives messages no identity; two that do not differ may change places.

// expectFor is how long what went back is expected: another consumer may have got it.
const expectFor = 5 * time.Minute

// goBack lets those that wait follow the holder back into the queue, once that is sent.
func (o *order) goBack(l *line) {
	earlier := l.expected
	l.expected = []expected{{sum: o.fingerprint(l.body, l.id), behind: true}}
	for d := l.waiting.pop(); d != nil; d = l.waiting.pop() {
		l.expected = append(l.expected, expected{sum: o.fingerprint(d.Body, d.MessageId), behind: true})
		l.outgoing = append(l.outgoing, goingBack{l.session, d.fence.tag})
	}
	l.expectAnew(earlier)
	l.blocked = true
	l.since = time.Now()
	if !l.listed {
		l.listed = true
		o.returned = append(o.returned, l)
	}
	o.forgetReturned()
}

// expectAnew expects what went back earlier, now behind what else is expected. The broker may still
// deliver it before that.
func (l *line) expectAnew(earlier []expected) {
	for _, e := range earlier {
		l.expected = append(l.expected, expected{sum: e.sum})
	}
}

// forgetReturned gives up on what has not come back for long.
func (o *order) forgetReturned() {
	for len(o.returned) > 0 && time.Since(o.returned[0].since) > expectFor {
		l := o.returned[0]
		o.returned = o.returned[1:]
		l.listed, l.expected = false, nil
		o.tidy(l)
	}
}

// accepts reports whether d may come next, as far as is expected what went back. If it may not it
// goes back too, behind that. What comes again although others went back before it shows that those
// have gone elsewhere: to another consumer, or out of the queue.
func (l *line) accepts(o *order, s *session, d *Delivery) bool {
	if len(l.expected) == 0 {
		return true
	}
	sum := o.fingerprint(d.Body, d.MessageId)
	i := slices.IndexFunc(l.expected, func(e expected) bool { return e.sum == sum })
	if i >= 0 { // what is behind it waits for good reason, and goes back as often as it takes
		for j := range l.expected[i+1:] {
			l.expected[i+1+j].times = 0
		}
	}
	switch {
	case i == 0, i > 0 && (l.expected[i].behind || l.expected[i].times == mostReturns):
		l.expected = slices.Delete(l.expected, 0, i+1)
		return true
	case time.Since(l.since) > expectFor:
		l.expected = nil
		return true
	case i < 0:
		i = len(l.expected)
		l.expected = append(l.expected, expected{sum: sum})
	}
	e := &l.expected[i]
	e.times++
	e.behind = !slices.ContainsFunc(l.expected[:i], func(e expected) bool { return !e.behind })
	l.outgoing = append(l.outgoing, goingBack{s, d.fence.tag})
	return false
}

// mostReturns is how often a message goes back because of those before it while none of them comes:
// they may have gone elsewhere, and the broker may count that.
const mostReturns = 3

// expectUnsettled expects what its session leaves unsettled at its end, before what went back
// earlier: a quorum queue may deliver that first.
func (l *line) expectUnsettled(o *order, s *session) {
	earlier := l.expected
	if len(earlier) == 0 {
		return
	}
	l.expected = nil
	if l.of == s && !l.settled {
		l.expected = append(l.expected, expected{sum: o.fingerprint(l.body, l.id)})
	}
	if l.session == s {
		for _, d := range l.waiting.all[l.waiting.head:] {
			l.expected = append(l.expected, expected{sum: o.fingerprint(d.Body, d.MessageId)})
		}
	}
	l.expectAnew(earlier)
}

// unexpect no longer expects the holder, which its ending session has settled.
func (l *line) unexpect(o *order) {
	if len(l.expected) > 0 && l.expected[0].sum == o.fingerprint(l.body, l.id) {
		l.expected = l.expected[1:]
	}
}

// send lets what is to go back be sent, unless somebody does that already.
func (l *line) send(e *effects) {
	if len(l.outgoing) > 0 && !l.sending && !l.blocked {
		l.sending = true
		e.send = append(e.send, l)
	}
}

// sendBack sends what is to go back, in order. The broker's flow control may make it wait.
func (o *order) sendBack(l *line) {
	for {
		o.mu.Lock()
		var all []goingBack
		if !l.blocked {
			all, l.outgoing = l.outgoing, nil
		}
		if l.sending = len(all) > 0; !l.sending {
			o.tidy(l)
		}
		o.mu.Unlock()
		if len(all) == 0 {
			return
		}
		for _, back := range all {
			if !back.session.closed.Load() {
				_ = back.session.wire.Requeue(back.tag)
			}
		}
	}
}

func (o *order) fingerprint(body []byte, id string) uint64 {
	var h maphash.Hash
	h.SetSeed(o.seed)
	_, _ = h.WriteString(id)
	_ = h.WriteByte(0)
	_, _ = h.Write(body)
	return h.Sum64()
}

// fifo is a queue of deliveries that reuses its memory.
type fifo struct {
	all  []*Delivery
	head int
}

func (q *fifo) push(d *Delivery) {
	if q.head > 0 && len(q.all) == cap(q.all) {
		n := copy(q.all, q.all[q.head:])
		clear(q.all[n:])
		q.all, q.head = q.all[:n], 0
	}
	q.all = append(q.all, d)
}

func (q *fifo) pushFront(d *Delivery) {
	if q.head == 0 {
		q.all = slices.Insert(q.all, 0, d)
		return
	}
	q.head--
	q.all[q.head] = d
}

// pop returns nil if there is none.
func (q *fifo) pop() *Delivery {
	if q.head == len(q.all) {
		return nil
	}
	d := q.all[q.head]
	q.all[q.head] = nil
	if q.head++; q.head == len(q.all) {
		q.all, q.head = q.all[:0], 0
	}
	return d
}

// withKey is the handler of a consumer with keys. A delivery without one fails. One that fails is
// kept as it came, for the next try in place.
func withKey(c *config, next Handler) Handler {
	if c.orderingKey == nil {
		return next
	}
	return func(ctx context.Context, d *Delivery) (err error) {
		if l := lineOf(d); l != nil && l.fault != nil {
			return l.fault
		}
		original := d.Delivery
		failed := true
		defer func() { // also if the handler panics
			if failed && d.fence.kept.Load() == nil {
				kept := original
				d.fence.kept.Store(&keptMessage{original: kept})
			}
		}()
		err = next(ctx, d)
		failed = err != nil || d.overlooked() != nil
		return err
	}
}
