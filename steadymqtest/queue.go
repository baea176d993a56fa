package steadymqtest

import (
	"container/heap"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

type queueKind string

const (
	kindClassic queueKind = "classic"
	kindQuorum  queueKind = "quorum"
	kindStream  queueKind = "stream"
)

// defaultDeliveryLimit is that of quorum queues since RabbitMQ 4.0.
const defaultDeliveryLimit = 20

// queue holds messages in the order they came.
type queue struct {
	b          *Broker
	name       string
	kind       queueKind
	durable    bool
	autoDelete bool
	owner      *conn // not nil: exclusive
	args       map[string]any

	fresh    []*entry // never delivered, oldest first
	returned returned // requeued: these go first
	log      []*entry // what a stream has instead
	lastKey  uint64
	unacked  int
	expiry   *time.Timer
	expires  time.Time // when that is due

	consumers []*consumer // in the order they came
	served    uint64
	single    bool // x-single-active-consumer

	deadExchange   string
	deadKey        string
	deadLetters    bool
	atLeastOnce    bool           // x-dead-letter-strategy
	dead           []*undelivered // what has no target yet
	retry          *time.Timer    // comes back for it
	limited        bool           // by the delivery limit
	limit          int
	maxLength      int // -1: none
	rejectWhenFull bool
	deadWhenFull   bool          // what is rejected then is dead-lettered
	writers        map[any]bool  // who has published to a quorum queue that rejects when it is full; true: no more until there is room
	ttl            time.Duration // -1: none

	delay      retryDelay
	delayed    []waiting // by the time when they are ready
	delayTimer *time.Timer

	stalled bool // a fault: no majority, nothing is delivered
	jammed  bool // a fault: full, whatever it holds
	pending bool // in the broker's list of pumps
	gone    bool
}

// entry is a message in a queue.
type entry struct {
	msg         *message
	q           *queue
	key         uint64 // its place in the queue
	redelivered bool
	failures    int // what the delivery limit counts, and x-delivery-count says
	acquired    int // how often it was taken from this queue before
	expires     time.Time
	at          time.Time // when it was published
	record      int       // in the ledger, -1 without one
}

// returned is a heap of requeued entries, lowest key first.
type returned []*entry

func (r returned) Len() int           { return len(r) }
func (r returned) Less(i, j int) bool { return r[i].key < r[j].key }
func (r returned) Swap(i, j int)      { r[i], r[j] = r[j], r[i] }
func (r *returned) Push(x any)        { *r = append(*r, x.(*entry)) }
func (r *returned) Pop() any {
	old := *r
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*r = old[:len(old)-1]
	return e
}

// newQueue reads the arguments that the broker understands.
func (b *Broker) newQueue(name string, args map[string]any) *queue {
	q := &queue{b: b, name: name, kind: kindClassic, args: args, maxLength: -1, ttl: -1}
	if kind, ok := args["x-queue-type"].(string); ok {
		q.kind = queueKind(kind)
	}
	if q.kind == kindQuorum && b.since(4, 0) {
		q.limit, q.limited = defaultDeliveryLimit, true
	}
	if n, ok := integer(args["x-delivery-limit"]); ok && q.kind == kindQuorum {
		q.limit, q.limited = n, n >= 0 || !b.since(4, 0) // before 4.0 any count is more than -1
	}
	if n, ok := integer(args["x-max-length"]); ok {
		q.maxLength = n
	}
	if n, ok := integer(args["x-message-ttl"]); ok {
		q.ttl = time.Duration(n) * time.Millisecond
	}
	q.deadExchange, q.deadLetters = args["x-dead-letter-exchange"].(string)
	q.deadKey, _ = args["x-dead-letter-routing-key"].(string)
	q.single, _ = args["x-single-active-consumer"].(bool)
	q.deadWhenFull = args["x-overflow"] == "reject-publish-dlx" && q.kind == kindClassic
	q.rejectWhenFull = args["x-overflow"] == "reject-publish" || q.deadWhenFull
	q.atLeastOnce = q.kind == kindQuorum && args["x-dead-letter-strategy"] == "at-least-once" && args["x-overflow"] == "reject-publish"
	q.readDelay()
	return q
}

// integer reads a number of whatever integer type the client chose.
func integer(v any) (int, bool) {
	switch n := v.(type) {
	case int:
		return n, true
	case int8:
		return int(n), true
	case int16:
		return int(n), true
	case int32:
		return int(n), true
	case int64:
		return int(n), true
	case uint8:
		return int(n), true
	case uint16:
		return int(n), true
	case uint32:
		return int(n), true
	case uint64:
		return int(n), true
	}
	return 0, false
}

func (b *Broker) sortedQueues() []*queue {
	queues := make([]*queue, 0, len(b.queues))
	for _, q := range b.queues {
		queues = append(queues, q)
	}
	slices.SortFunc(queues, func(x, y *queue) int { return strings.Compare(x.name, y.name) })
	return queues
}

// length is the number of messages that are ready.
func (q *queue) length() int { return len(q.fresh) + len(q.returned) + len(q.log) }

// settled reports whether nothing waits and nothing is unsettled.
func (q *queue) settled() bool {
	if q.unacked > 0 || len(q.delayed) > 0 || len(q.dead) > 0 {
		return false
	}
	if q.kind != kindStream {
		return q.length() == 0
	}
	for _, c := range q.consumers {
		if c.offset < len(q.log) {
			return false
		}
	}
	return len(q.consumers) > 0 || len(q.log) == 0
}

// touch makes unlock look whether the queue can deliver.
func (q *queue) touch() {
	if !q.pending && !q.gone {
		q.pending = true
		q.b.pumps = append(q.b.pumps, q)
	}
}

// publish adds a message and reports whether the queue took it. by is who publishes: a channel, a queue that dead-letters at least
// once, the broker itself; nil does not ask whether a quorum queue is full.
func (q *queue) publish(m *message, by any) bool {
	if q.jammed || q.maxLength >= 0 && q.refuses(by) {
		if q.deadWhenFull {
			e := &entry{msg: m, q: q, record: q.b.ledger.addMessage(m, q.name, q.b.now)}
			q.b.ledger.setFate(e.record, Dropped)
			q.deadLetter(e, "maxlen")
		}
		return false
	}
	q.lastKey++
	e := &entry{msg: m, q: q, key: q.lastKey, at: q.b.now, record: q.b.ledger.addMessage(m, q.name, q.b.now)}
	if q.kind == kindQuorum || q.b.since(4, 3) && !q.idle() { // a classic queue forgets it of what it can deliver at once
		e.redelivered = m.delivered+m.acquired > 0
	}
	if q.b.since(4, 3) {
		e.failures = max(m.delivered, m.acquired)
	}
	q.touch()
	if q.kind == kindStream {
		q.log = append(q.log, e)
		return true
	}
	if ttl := q.ttlOf(m); ttl > 0 || ttl == 0 && !q.idle() {
		e.expires = q.b.now.Add(ttl)
	}
	q.fresh = append(q.fresh, e)
	q.dropSurplus()
	q.shut(by)
	return true
}

// idle reports whether a message that comes now goes out at once, so that a time to live of zero does not matter.
func (q *queue) idle() bool { return q.length() == 0 && !q.stalled && q.next() != nil }

func (q *queue) ttlOf(m *message) time.Duration {
	ttl := q.ttl
	if n, err := strconv.Atoi(m.expiration); err == nil && m.expiration != "" {
		if own := time.Duration(n) * time.Millisecond; ttl < 0 || own < ttl {
			ttl = own
		}
	}
	return ttl
}

// head is the next entry to deliver, nil if there is none.
func (q *queue) head() *entry {
	switch {
	case len(q.returned) > 0:
		return q.returned[0]
	case len(q.fresh) > 0:
		return q.fresh[0]
	}
	return nil
}

// pop takes the head off the queue, after what has expired.
func (q *queue) pop() *entry {
	q.expire()
	return q.take()
}

func (q *queue) take() *entry {
	if len(q.returned) > 0 {
		return heap.Pop(&q.returned).(*entry)
	}
	if len(q.fresh) == 0 {
		return nil
	}
	e := q.fresh[0]
	q.fresh[0] = nil
	if q.fresh = q.fresh[1:]; len(q.fresh) == 0 {
		q.fresh = nil
	}
	return e
}

// expire drops what is overdue at the head of the queue, and comes back when the next head is.
func (q *queue) expire() {
	for {
		e := q.head()
		if e == nil || e.expires.IsZero() {
			return
		}
		if wait := e.expires.Sub(q.b.now); wait > 0 {
			q.expireAt(e.expires, wait)
			return
		}
		q.dropHead("expired")
	}
}

// expireAt comes back at a time, unless that is due already: each message that is published looks.
func (q *queue) expireAt(due time.Time, wait time.Duration) {
	if due.Equal(q.expires) {
		return
	}
	if q.expiry != nil {
		q.expiry.Stop()
	}
	q.expires, q.expiry = due, q.b.after(wait, q.touch)
}

func (q *queue) dropHead(reason string) {
	e := q.take()
	q.b.ledger.setFate(e.record, Dropped)
	q.deadLetter(e, reason)
}

func (q *queue) stopTimers() {
	for _, t := range []*time.Timer{q.expiry, q.retry, q.delayTimer} {
		if t != nil {
			t.Stop()
		}
	}
}

// requeue puts a delivered entry back: a classic queue where it was, a quorum queue behind what was returned before. A failure
// counts towards the delivery limit.
func (q *queue) requeue(e *entry, failure bool) {
	if q.gone || q.kind == kindStream {
		return
	}
	e.redelivered = true
	e.acquired++
	if q.kind == kindQuorum {
		if failure {
			e.failures++
		}
		if q.limited && e.failures > q.limit {
			q.discard(e, "delivery_limit")
			return
		}
		if q.holdBack(e, failure) {
			q.b.ledger.setFate(e.record, Delayed)
			return
		}
	}
	q.putBack(e)
}

// putBack makes an entry ready again.
func (q *queue) putBack(e *entry) {
	if q.kind == kindQuorum {
		q.lastKey++
		e.key = q.lastKey
	}
	q.b.ledger.setFate(e.record, Ready)
	heap.Push(&q.returned, e)
	q.touch()
	q.dropSurplus()
}

// discard drops an entry or sends it to the dead-letter exchange.
func (q *queue) discard(e *entry, reason string) {
	q.b.ledger.setFate(e.record, Discarded)
	q.deadLetter(e, reason)
}

// properties is the property list of a delivery, with the headers that the queue adds.
func (e *entry) properties() []byte {
	switch {
	case e.q.kind == kindStream:
		return e.msg.withHeader("x-stream-offset", int64(e.key-1))
	case e.q.kind == kindQuorum && e.redelivered:
		return e.counted()
	}
	return e.msg.props
}

// counted adds what the broker counts. Of a message that another queue has dead-lettered the first delivery shows what it counted there;
// up to 4.2 the later ones forget that.
func (e *entry) counted() []byte {
	count, acquired := e.failures, e.acquired
	if e.acquired == 0 {
		count = max(e.msg.delivered, e.msg.acquired)
		acquired = count
	}
	m := e.msg
	if count > 0 {
		m = &message{props: m.withHeader("x-delivery-count", int64(count))}
	}
	if e.q.b.since(4, 3) {
		return m.withHeader("x-acquired-count", int64(acquired))
	}
	return m.props
}

// pump delivers as much as the consumers take.
func (q *queue) pump() {
	if q.gone || q.stalled {
		return
	}
	if q.kind == kindStream {
		q.pumpStream()
		return
	}
	for q.expire(); q.head() != nil; q.expire() {
		c := q.next()
		if c == nil {
			return
		}
		c.deliver(q.take())
	}
}

// next is the consumer whose turn it is: of those with room the ones of highest priority, of these the one that has waited longest.
func (q *queue) next() *consumer {
	candidates := q.consumers
	if q.single && len(candidates) > 1 {
		candidates = candidates[:1]
	}
	var best *consumer
	for _, c := range candidates {
		if !c.room() {
			continue
		}
		if best == nil || c.priority > best.priority || c.priority == best.priority && c.turn < best.turn {
			best = c
		}
	}
	return best
}

// delete removes the queue: consumers are cancelled, messages are gone, what is unsettled may be settled without effect.
func (q *queue) delete(cause string) {
	if q.gone {
		return
	}
	q.gone = true
	q.stopTimers()
	delete(q.b.queues, q.name)
	for _, x := range q.b.exchanges {
		x.unbindAll(q)
	}
	for _, c := range slices.Clone(q.consumers) {
		c.cancel(cause)
	}
	q.purge()
	q.dropUnsettled()
}

// dropUnsettled notes in the ledger that what was delivered from a deleted queue will never be settled.
func (q *queue) dropUnsettled() {
	for _, c := range q.b.conns {
		for _, ch := range c.channels {
			for i := range ch.unacked {
				if o := &ch.unacked[i]; !o.settled && o.e.q == q && q.kind != kindStream {
					q.b.ledger.setFate(o.e.record, Dropped)
				}
			}
		}
	}
}

// purge drops what waits and returns how many that were.
func (q *queue) purge() int {
	n := 0
	for e := q.take(); e != nil; e = q.take() {
		q.b.ledger.setFate(e.record, Dropped)
		n++
	}
	for _, w := range q.delayed {
		q.b.ledger.setFate(w.e.record, Dropped)
	}
	n += len(q.delayed)
	q.delayed = nil
	if q.b.since(4, 3) {
		n += len(q.dead) // though they go on to their targets
	}
	if q.gone {
		for _, u := range q.dead {
			q.b.ledger.setFate(u.e.record, Dropped)
		}
		q.log, q.dead = nil, nil
	}
	return n
}

// The methods of AMQP on queues.

// find returns a queue that this connection may use.
func (ch *channel) find(name string) (*queue, *refusal) {
	if name == "" {
		name = ch.lastQueue
	}
	q := ch.c.b.queues[name]
	if q == nil {
		return nil, refuse(404, "no queue '%s' in vhost '/'", name)
	}
	if q.owner != nil && q.owner != ch.c {
		return nil, locked(name)
	}
	return q, nil
}

// findFor is find for those with a permission.
func (ch *channel) findFor(permission int, name string) (*queue, *refusal) {
	if name == "" {
		name = ch.lastQueue
	}
	if r := ch.may(permission, "queue", name); r != nil {
		return nil, r
	}
	return ch.find(name)
}

func locked(name string) *refusal {
	return refuse(405, "cannot obtain exclusive access to locked queue '%s' in vhost '/'. It could be originally declared on another connection or the exclusive property value does not match that of the original declaration.", name)
}

// queueFlags are the bits of queue.declare.
type queueFlags struct{ passive, durable, exclusive, autoDelete, noWait bool }

func (ch *channel) queueDeclare(d *decoder) *refusal {
	d.short()
	name, bits := d.shortstr(), d.octet()
	flags := queueFlags{bits&1 != 0, bits&2 != 0, bits&4 != 0, bits&8 != 0, bits&16 != 0}
	args := d.table()
	if d.bad {
		return nil // reported by the caller
	}
	if ch.stage(StageDeclare) {
		return nil
	}
	if r := ch.c.host.wire.refuseDeclare; r != nil {
		return r
	}
	if r := ch.mayDeclare(name, flags.passive); r != nil {
		return r
	}
	q, r := ch.declareQueue(name, flags, args)
	if r != nil {
		return r
	}
	ch.lastQueue = q.name
	out := appendShortstr(nil, q.name)
	counts := [2]int{q.length(), len(q.consumers)}
	if old, ok := ch.c.host.wire.cutOff[q.name]; ok {
		counts = old
	}
	out = binary.BigEndian.AppendUint32(out, uint32(counts[0]))
	out = binary.BigEndian.AppendUint32(out, uint32(counts[1]))
	ch.reply(flags.noWait, queueDeclareOk, out...)
	return nil
}

func (ch *channel) declareQueue(name string, flags queueFlags, args map[string]any) (*queue, *refusal) {
	b := ch.c.b
	if flags.passive {
		return ch.find(name)
	}
	if strings.HasPrefix(name, "amq.") { // even if the broker itself has named a queue so
		return nil, refuse(403, "queue name '%s' contains reserved prefix 'amq.*'", name)
	}
	if q := b.queues[name]; q != nil && name != "" {
		return q, q.equivalent(ch.c, flags, args)
	}
	if r := ch.mayDeadLetter(name, args); r != nil {
		return nil, r
	}
	if r := b.declarable(name, flags, args); r != nil {
		return nil, r
	}
	if name == "" {
		b.lastName++
		name = fmt.Sprintf("amq.gen-%022d", b.lastName)
	}
	q := b.newQueue(name, args)
	q.durable, q.autoDelete = flags.durable, flags.autoDelete
	if flags.exclusive {
		q.owner = ch.c
	}
	b.queues[name] = q
	return q, nil
}

// declarable refuses what RabbitMQ refuses for a queue that does not exist yet.
func (b *Broker) declarable(name string, flags queueFlags, args map[string]any) *refusal {
	kind, r := kindOf(name, args)
	if r == nil {
		r = b.badArgument(name, kind, args)
	}
	switch {
	case r != nil:
		return r
	case kind == kindClassic && !flags.durable && !flags.exclusive && b.since(4, 3):
		return refuse(541, "Feature `transient_nonexcl_queues` is deprecated.\nThis feature is not permitted by default.")
	case kind == kindClassic:
		return nil
	case name == "":
		return refuse(406, "Cannot declare a server-named queue for type rabbit_%s_queue", kind)
	case !flags.durable:
		return refuse(406, "invalid property 'non-durable' for queue '%s' in vhost '/'", name)
	case flags.exclusive:
		return refuse(406, "invalid property 'exclusive-owner' for queue '%s' in vhost '/'", name)
	case flags.autoDelete:
		return refuse(406, "invalid property 'auto-delete' for queue '%s' in vhost '/'", name)
	}
	return nil
}

// equivalent refuses a declaration that differs from the queue that is there.
func (q *queue) equivalent(c *conn, flags queueFlags, args map[string]any) *refusal {
	if q.owner != nil && q.owner != c || flags.exclusive && q.owner == nil || !flags.exclusive && q.owner != nil {
		return locked(q.name)
	}
	if flags.durable != q.durable && q.owner == nil { // of an exclusive queue it does not count
		return q.inequivalent("durable", flags.durable, q.durable)
	}
	if flags.autoDelete != q.autoDelete {
		return q.inequivalent("auto_delete", flags.autoDelete, q.autoDelete)
	}
	for _, key := range checkedArguments(q.kind) {
		if key == "x-queue-type" {
			if r := q.equivalentKind(args); r != nil {
				return r
			}
			continue
		}
		was, is := describe(q.args[key], args[key] == nil), describe(args[key], q.args[key] == nil)
		if was != is {
			return refuse(406, "inequivalent arg '%s' for queue '%s' in vhost '/': received %s but current is %s", key, q.name, is, was)
		}
	}
	return nil
}

// equivalentKind: no kind means classic; since 4.0 the texts say so.
func (q *queue) equivalentKind(args map[string]any) *refusal {
	const key = "x-queue-type"
	was, is := q.args[key], args[key]
	if q.b.since(4, 0) {
		if was == nil {
			was = string(kindClassic)
		}
		if is == nil {
			is = string(kindClassic)
		}
	}
	if is == was || is == nil && was == string(kindClassic) || was == nil && is == string(kindClassic) {
		return nil
	}
	return refuse(406, "inequivalent arg '%s' for queue '%s' in vhost '/': received %s but current is %s", key, q.name, describe(is, was == nil), describe(was, is == nil))
}

func (q *queue) inequivalent(what string, is, was bool) *refusal {
	return refuse(406, "inequivalent arg '%s' for queue '%s' in vhost '/': received '%t' but current is '%t'", what, q.name, is, was)
}

// describe names a value as RabbitMQ's texts do: with its type only if the other side has none.
func describe(v any, typed bool) string {
	switch {
	case v == nil:
		return "none"
	case !typed:
		return fmt.Sprintf("'%v'", v)
	}
	return fmt.Sprintf("the value '%v' of type '%s'", v, typeName(v))
}

// typeName is what RabbitMQ calls the type of a field.
func typeName(v any) string {
	switch v.(type) {
	case string:
		return "longstr"
	case []byte:
		return "binary"
	case bool:
		return "bool"
	case int, int64:
		return "long"
	case int16:
		return "short"
	case uint8:
		return "unsignedbyte"
	case int8:
		return "byte"
	case uint16:
		return "unsignedshort"
	case uint32:
		return "unsignedint"
	case float64:
		return "double"
	case float32:
		return "float"
	case time.Time:
		return "timestamp"
	case []any:
		return "array"
	case map[string]any:
		return "table"
	case nil:
		return "void"
	}
	return "signedint"
}

func (ch *channel) queuePurge(d *decoder) *refusal {
	d.short()
	name, noWait := d.shortstr(), d.octet()&1 != 0
	q, r := ch.findFor(accessRead, name)
	if r != nil {
		return r
	}
	if q.kind == kindStream {
		return refuse(540, "queue.purge not supported by stream queues queue '%s' in vhost '/'", name)
	}
	ch.reply(noWait, queuePurgeOk, binary.BigEndian.AppendUint32(nil, uint32(q.purge()))...)
	return nil
}

func (ch *channel) queueDelete(d *decoder) *refusal {
	d.short()
	name, bits := d.shortstr(), d.octet()
	ifUnused, ifEmpty, noWait := bits&1 != 0, bits&2 != 0, bits&4 != 0
	q, r := ch.findFor(accessConfigure, name)
	if r != nil && r.code != 404 {
		return r
	}
	n := 0
	if q != nil {
		if r := q.deletableIf(ifUnused, ifEmpty); r != nil {
			return r
		}
		if ifUnused && len(q.consumers) > 0 {
			return refuse(406, "queue '%s' in vhost '/' in use", q.name)
		}
		if n = q.length(); ifEmpty && n > 0 {
			return refuse(406, "queue '%s' in vhost '/' not empty", q.name)
		}
		q.delete("queue deleted")
	}
	ch.reply(noWait, queueDeleteOk, binary.BigEndian.AppendUint32(nil, uint32(n))...)
	return nil
}

// deletableIf refuses the conditions of queue.delete that a quorum queue does not know.
func (q *queue) deletableIf(unused, empty bool) *refusal {
	flag := "if-unused"
	switch {
	case q.kind != kindQuorum || !unused && !empty:
		return nil
	case !unused:
		flag = "if-empty"
	}
	return refuse(540, "cannot delete queue '%s' in vhost '/'. queue.delete operations with %s flag set are not supported by quorum queues", q.name, flag)
}

// What a test does to queues.

// QueueOptions describes a queue to [Broker.DeclareQueue]. The zero value is a durable classic queue.
type QueueOptions struct {
	Type          string // "classic" (the default), "quorum" or "stream"
	Transient     bool   // not durable: lost when the whole broker restarts
	AutoDelete    bool   // deleted when its last consumer goes
	DeliveryLimit int    // of a quorum queue; 0: the default of the version, see [WithVersion]
	// DeadLetter is the queue that rejected, expired and surplus messages go to, through the default exchange. For another
	// exchange set x-dead-letter-exchange in Args.
	DeadLetter string
	// Args are further arguments: x-message-ttl, x-max-length, x-overflow (drop-head, reject-publish, reject-publish-dlx),
	// x-dead-letter-exchange, x-dead-letter-routing-key, x-dead-letter-strategy (at-least-once needs a quorum queue and
	// reject-publish), x-single-active-consumer, x-delivery-limit, x-consumer-timeout, x-queue-type, and for quorum queues
	// of 4.3 x-delayed-retry-type, x-delayed-retry-min, x-delayed-retry-max.
	Args map[string]any
}

func (o *QueueOptions) arguments() map[string]any {
	args := maps.Clone(o.Args)
	if args == nil {
		args = make(map[string]any)
	}
	if o.Type != "" {
		args["x-queue-type"] = o.Type
	}
	if o.DeliveryLimit > 0 {
		args["x-delivery-limit"] = int32(o.DeliveryLimit)
	}
	if o.DeadLetter != "" {
		args["x-dead-letter-exchange"] = ""
		args["x-dead-letter-routing-key"] = o.DeadLetter
	}
	return args
}

// DeclareQueue makes a queue, at once. A queue that exists stays as it is, whatever the options.
func (b *Broker) DeclareQueue(name string, o QueueOptions) {
	b.lock()
	defer b.unlock()
	if b.queues[name] != nil {
		return
	}
	q := b.newQueue(name, o.arguments())
	q.durable, q.autoDelete = !o.Transient, o.AutoDelete
	b.queues[name] = q
}

// DeleteQueue deletes a queue as an operator does: its consumers get basic.cancel, its messages are gone, settlements of what
// was delivered are accepted and have no effect, the next consume is refused by 404. It reports whether there was such a queue.
func (b *Broker) DeleteQueue(name string) bool {
	b.lock()
	defer b.unlock()
	q := b.queues[name]
	if q != nil {
		q.delete("queue deleted")
	}
	return q != nil
}

// Publish puts one persistent message per body at the end of a queue and returns their IDs, which are their message-id
// properties. Publishing to a queue that does not exist loses the messages, as with a real broker; so does a queue that is full and
// rejects. The IDs of lost messages are empty.
func (b *Broker) Publish(queue string, bodies ...string) []string {
	ids := make([]string, 0, len(bodies))
	b.lock()
	defer b.unlock()
	for _, body := range bodies {
		ids = append(ids, b.publishTo(queue, Message{Body: []byte(body)}))
	}
	return ids
}

// PublishMessage puts a message at the end of a queue and returns its ID, empty if it was lost, see [Broker.Publish].
func (b *Broker) PublishMessage(queue string, m Message) string {
	b.lock()
	defer b.unlock()
	return b.publishTo(queue, m)
}

func (b *Broker) publishTo(queue string, m Message) string {
	if m.ID == "" {
		b.lastMsg++
		m.ID = "m" + strconv.FormatUint(b.lastMsg, 10)
	}
	q := b.queues[queue]
	if q == nil || !q.publish(b.ownMessage(&m, "", queue), b) {
		return ""
	}
	return m.ID
}

// ownMessage is one that the test publishes itself.
func (b *Broker) ownMessage(p *Message, exchange, key string) *message {
	m := newMessage(p, exchange, key)
	if !b.ledger.off {
		m.digest = digestOf(m.body)
	}
	return m
}

// PublishExchange routes a message through an exchange and returns its ID and how many queues took it.
func (b *Broker) PublishExchange(exchange, key string, m Message) (id string, queues int) {
	b.lock()
	defer b.unlock()
	if m.ID == "" {
		b.lastMsg++
		m.ID = "m" + strconv.FormatUint(b.lastMsg, 10)
	}
	msg := b.ownMessage(&m, exchange, key)
	if msg.takeCopies(&m) != nil {
		return m.ID, 0
	}
	for _, q := range b.route(msg) {
		if q.publish(msg, b) {
			queues++
		}
	}
	return m.ID, queues
}

// QueueLen returns how many messages wait in a queue (in a stream: how many it holds), -1 if there is no such queue.
func (b *Broker) QueueLen(queue string) int {
	b.lock()
	defer b.unlock()
	if q := b.queues[queue]; q != nil {
		return q.length()
	}
	return -1
}

// Unsettled returns how many messages of a queue are delivered and not settled, as far as the broker knows; -1 if there is no
// such queue.
func (b *Broker) Unsettled(queue string) int {
	b.lock()
	defer b.unlock()
	if q := b.queues[queue]; q != nil {
		return q.unacked
	}
	return -1
}

// Queues returns the names of all queues, sorted.
func (b *Broker) Queues() []string {
	b.lock()
	defer b.unlock()
	var names []string
	for _, q := range b.sortedQueues() {
		names = append(names, q.name)
	}
	return names
}
