package steadymq

import (
	"context"
	"encoding/json"
	"log/slog"
	"math"
	"time"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
)

// A Delivery, and what it says about itself: where it came from, its number of tries, read from the
// headers of brokers, and its forms in JSON, in a log and as text. Handlers, hooks and the log call
// these. How it is settled is in ack.go.

// Delivery is one message as one session delivered it. Its embedded [amqp.Delivery] has the body,
// headers and properties, which belong to the handler. On a stream, do not write into the bytes of
// Body or the entries of Headers: the next try in place is given the same ones.
//
// A delivery is settled at most once, with multiple=false, on the channel that delivered it and no
// other. All methods are safe for concurrent use. A copy of a Delivery, made by value, is the same
// delivery and shares its outcome. The Ack, Nack and Reject of the embedded amqp.Delivery are as
// safe, and refuse multiple=true with [ErrMultiple].
//
// Inside a [Handler] there is usually nothing to settle by hand: the handler's error decides. A
// handler that has settled its delivery is respected, whatever it returns. If a settlement by hand
// was refused, the delivery is still unsettled and the handler returns nil, then the handler has
// failed with that refusal: its message is put back, not acked.
type Delivery struct {
	amqp.Delivery

	fence *fence // shared by all copies, nil for one that nobody delivered
}

// newDelivery makes an empty delivery, for the wire to fill and for init to finish.
func newDelivery() *Delivery {
	f := new(fence)
	f.origin.fence = f
	return &f.origin
}

func (d *Delivery) init(s settler) {
	d.fence.tag = d.DeliveryTag
	d.fence.settler = s
	d.Acknowledger = d.fence
}

// keepOriginal notes the message as it came, because its handler may change all fields that are
// exported. The bytes of the body and the headers themselves are not copied.
func (d *Delivery) keepOriginal() {
	d.fence.kept.Store(&keptMessage{original: d.Delivery})
}

// again returns the delivery of the next try in place.
func (d *Delivery) again() *Delivery {
	next := newDelivery()
	kept := d.fence.kept.Load()
	next.fence.kept.Store(kept)
	next.Delivery = kept.original
	next.fence.tries = d.fence.tries + 1
	return next
}

// NewDelivery makes a [Delivery] of no session, for tests of handlers; see [Invoke]. If m has an
// Acknowledger the settlement is passed on to it, once; else it is only recorded, see
// [Delivery.Outcome]. For a [Delivery.Attempt] above 1 set Redelivered and the header
// "x-delivery-count", as a quorum queue does.
func NewDelivery(m amqp.Delivery) *Delivery {
	d := newDelivery()
	d.Delivery = m
	d.init(detached{m.Acknowledger})
	return d
}

// Outcome returns what became of the delivery so far. A message that is held (see
// [WithRequeueDelay]), or kept by [Later], is [Unsettled].
func (d *Delivery) Outcome() Outcome {
	if d.fence == nil {
		return Unsettled
	}
	o := Outcome(d.fence.outcome.Load())
	if o == keptLater {
		return Unsettled
	}
	return o
}

// Context returns a context that ends with the session that delivered the message, because nothing
// can be settled after that: for who settles by hand, see [Later] and [Consumer.Deliveries]. It
// carries the values of Run's context. [context.Cause] says why it has ended: a [*SessionError] if
// the session was lost, a [*DrainError] if the drain limit has passed; any other error is that of a
// session that has ended in order, after all of its deliveries were settled. It knows nothing of
// [WithHandlerTimeout], nor of the values that a [Middleware] adds. That of a delivery of
// [NewDelivery] never ends.
func (d *Delivery) Context() context.Context {
	if d.fence == nil {
		return noContext{}
	}
	return d.fence.settler.context()
}

// noContext is the context of a delivery that no session has delivered. It never ends and has no
// values.
type noContext struct{}

func (noContext) Deadline() (deadline time.Time, ok bool) { return time.Time{}, false }

func (noContext) Done() <-chan struct{} { return nil }

func (noContext) Err() error { return nil }

func (noContext) Value(any) any { return nil }

// Session returns the number of the session that delivered the message, counted from 1 in each Run;
// 0 for [NewDelivery]. Session and DeliveryTag together are the only identity that AMQP 0-9-1 gives
// a delivery.
func (d *Delivery) Session() uint64 {
	if d.fence == nil {
		return 0
	}
	return d.fence.settler.number()
}

// Queue returns the queue that the message came from, by the name that the broker has given it if
// New was given none; "" for [NewDelivery].
func (d *Delivery) Queue() string {
	if d.fence == nil {
		return ""
	}
	queue, _ := d.fence.settler.source()
	return queue
}

// Host returns the address (host:port) of the broker that delivered the message; "" for
// [NewDelivery].
func (d *Delivery) Host() string {
	if d.fence == nil {
		return ""
	}
	_, host := d.fence.settler.source()
	return host
}

// Attempt returns the number of this try, 1 for the first, as far as the broker tells. It is the
// highest of these, and one more for each try in place (on a stream):
//
//   - On a quorum queue, 1 + what the queue has counted (x-delivery-count).
//   - Where a dead-letter exchange leads back to the queue, by way of a queue that waits: 1 + how
//     often the message was rejected from this queue (x-death), on queues of all kinds.
//   - Under [WithRetry]: 1 + how many attempts have failed, on queues of all kinds. A copy that comes
//     back is another message to the broker, which counts it from 0.
//   - Else 2 for a redelivered message: a classic queue does not count.
//
// What the broker counts is not always a handler that has failed: up to RabbitMQ 4.2 a quorum queue
// counts every return, so one for each lost session, also for messages that were prefetched and
// that no handler has seen.
//
// A message that another queue has dead-lettered, or that was published again with its old headers,
// begins at 1, but for what no header tells. Since 4.3 a message that arrives on a classic queue
// after a handler had it elsewhere is marked as redelivered from the start, and counts 2. From 3.13
// to 4.2 the second delivery on a quorum queue still counts 1 if the message was rejected elsewhere
// once. A message that expired elsewhere, after it had been returned there, brings that count
// along.
//
// Publishers can forge the headers, and on classic queues nothing takes them out: use the number
// for policy, not for security.
func (d *Delivery) Attempt() int {
	n := max(d.returns(), d.failedBefore())
	if n == 0 && d.Redelivered {
		n = 1
		_, counted := d.count(deliveryCount)  // by another queue
		_, acquired := d.count(acquiredCount) // it came back without a failure
		if counted || acquired {
			n = 0
		}
	}
	if d.fence != nil {
		n += int(d.fence.tries)
	}
	return n + 1
}

// returns returns how often the message has come back to this queue.
//
// It relies on what RabbitMQ shows, which was measured; TestAttemptOnRealBrokers and the
// conformance scripts of steadymqtest notice when that changes. A quorum queue marks every message
// that it has counted as redelivered, so a count without the mark is from an earlier queue. With
// the mark, the first delivery of a dead-lettered message shows what the earlier queue has counted:
// from 3.13 to 4.2 how often the message was rejected there, since 4.3 every return, in both
// headers. Later deliveries show what this queue has counted: up to 4.2 in x-delivery-count, since
// 4.3 in x-acquired-count, while x-delivery-count goes on from the earlier queue.
func (d *Delivery) returns() int {
	here, elsewhere := d.rejections()
	n, _ := d.count(deliveryCount)
	acquired, known := d.count(acquiredCount)
	_, carries := d.Headers[lastDeath]
	switch {
	case !d.Redelivered:
		n = 0
	case elsewhere == 0 || !carries:
	case known && n == acquired, !known && n == here+elsewhere:
		n = 0
	case known:
		n = min(n, acquired)
	}
	return max(n, here)
}

// The headers in which brokers count. Publishers can write them, too.
const (
	deliveryCount = "x-delivery-count" // of a quorum queue
	acquiredCount = "x-acquired-count" // of a quorum queue since 4.3
	deathHeader   = "x-death"
	lastDeath     = "x-last-death-queue" // since 3.13
)

// The headers of a copy. They have no x- in front: RabbitMQ reads those of its own.
const (
	headerPrefix     = "steadymq-"
	attemptHeader    = headerPrefix + "attempt"     // how many attempts have failed
	errorHeader      = headerPrefix + "error"       // the text of the last failure
	errorTypeHeader  = headerPrefix + "error-type"  // the Go type of its innermost error
	queueHeader      = headerPrefix + "queue"       // the queue that the message came from
	exchangeHeader   = headerPrefix + "exchange"    // what it was published to there
	routingKeyHeader = headerPrefix + "routing-key" // with what key
	timeHeader       = headerPrefix + "time"        // when it failed
	hostHeader       = headerPrefix + "host"        // the broker
	consumerHeader   = headerPrefix + "consumer"    // the consumer tag
	copyHeader       = headerPrefix + "copy"        // tells copies apart, for what the broker returns
)

// arrivesCounted reports whether this is the first delivery of a message that another queue has
// dead-lettered with the count n, as since 4.3. The limit of this queue acts on that count.
func (d *Delivery) arrivesCounted(n int) bool {
	acquired, known := d.count(acquiredCount)
	_, elsewhere := d.rejections()
	return known && acquired == n && elsewhere > 0
}

// rejections counts in x-death how often the message was rejected from this queue, and how often
// from others, there also by the delivery limit. The newest entry of x-death is the first. If that
// is a rejection from this queue, then no broker has brought the message back: it was published
// again, with its old headers.
func (d *Delivery) rejections() (here, elsewhere int) {
	deaths, _ := d.Headers[deathHeader].([]any)
	for i, entry := range deaths {
		death, _ := entry.(amqp.Table)
		n, ok := headerInt(death["count"])
		if !ok || n < 0 || n > maxCount {
			continue
		}
		rejected := death["reason"] == "rejected"
		switch mine := death["queue"] == d.Queue(); {
		case mine && rejected && i > 0:
			here = int(n)
		case !mine && (rejected || death["reason"] == "delivery_limit"):
			elsewhere = min(elsewhere+int(n), maxCount)
		}
	}
	return here, elsewhere
}

const maxCount = 1<<31 - 2 // so that one more is an int everywhere

func (d *Delivery) count(header string) (n int, ok bool) {
	v, ok := headerInt(d.Headers[header])
	if !ok || v < 0 || v > maxCount {
		return 0, false
	}
	return int(v), true
}

// headerInt reads any of the integer types that a broker may choose for a header.
func headerInt(v any) (int64, bool) {
	switch n := v.(type) {
	case int64:
		return n, true
	case int32:
		return int64(n), true
	case int16:
		return int64(n), true
	case int8:
		return int64(n), true
	case int:
		return int64(n), true
	case uint8:
		return int64(n), true
	case uint16:
		return int64(n), true
	case uint32:
		return int64(n), true
	}
	return 0, false
}

// deliveryJSON is the form in which MarshalJSON shows a delivery.
type deliveryJSON struct {
	Queue           string         `json:"queue,omitempty"`
	Exchange        string         `json:"exchange"`
	RoutingKey      string         `json:"routing_key"`
	DeliveryTag     uint64         `json:"delivery_tag"`
	Redelivered     bool           `json:"redelivered"`
	Attempt         int            `json:"attempt"`
	Session         uint64         `json:"session,omitempty"`
	Outcome         string         `json:"outcome"`
	MessageID       string         `json:"message_id,omitempty"`
	CorrelationID   string         `json:"correlation_id,omitempty"`
	ReplyTo         string         `json:"reply_to,omitempty"`
	Type            string         `json:"type,omitempty"`
	AppID           string         `json:"app_id,omitempty"`
	UserID          string         `json:"user_id,omitempty"`
	Timestamp       any            `json:"timestamp,omitempty"`
	Expiration      string         `json:"expiration,omitempty"`
	Priority        uint8          `json:"priority,omitempty"`
	DeliveryMode    uint8          `json:"delivery_mode,omitempty"`
	ContentType     string         `json:"content_type,omitempty"`
	ContentEncoding string         `json:"content_encoding,omitempty"`
	Headers         map[string]any `json:"headers,omitempty"`
	Body            string         `json:"body,omitempty"`
	BodyBase64      []byte         `json:"body_base64,omitempty"`
}

// MarshalJSON implements [json.Marshaler]: the message, where it came from and what became of it. A
// body that is UTF-8 is in "body", any other in "body_base64". It takes whatever a publisher may
// have put into headers and properties. Where headers nest deeper than 100 levels "..." stands in
// place of the rest.
func (d Delivery) MarshalJSON() ([]byte, error) {
	j := deliveryJSON{
		Queue:           d.Queue(),
		Exchange:        d.Exchange,
		RoutingKey:      d.RoutingKey,
		DeliveryTag:     d.DeliveryTag,
		Redelivered:     d.Redelivered,
		Attempt:         d.Attempt(),
		Session:         d.Session(),
		Outcome:         d.Outcome().String(),
		MessageID:       d.MessageId,
		CorrelationID:   d.CorrelationId,
		ReplyTo:         d.ReplyTo,
		Type:            d.Type,
		AppID:           d.AppId,
		UserID:          d.UserId,
		Expiration:      d.Expiration,
		Priority:        d.Priority,
		DeliveryMode:    d.DeliveryMode,
		ContentType:     d.ContentType,
		ContentEncoding: d.ContentEncoding,
		Headers:         tableJSON(d.Headers, shownDepth),
	}
	if !d.Timestamp.IsZero() {
		j.Timestamp = valueJSON(d.Timestamp, 1)
	}
	if utf8.Valid(d.Body) {
		j.Body = string(d.Body)
	} else {
		j.BodyBase64 = d.Body
	}
	return json.Marshal(j)
}

// LogValue implements [slog.LogValuer]: what tells the message from others, without its content.
func (d Delivery) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("queue", d.Queue()),
		slog.String("exchange", d.Exchange),
		slog.String("routing_key", d.RoutingKey),
		slog.Uint64("delivery_tag", d.DeliveryTag),
		slog.Bool("redelivered", d.Redelivered),
		slog.Int("attempt", d.Attempt()),
		slog.String("message_id", d.MessageId),
		slog.Int("body_size", len(d.Body)),
	)
}

// String returns in one line what [Delivery.LogValue] tells.
func (d Delivery) String() string { return errtext.OneLine(d.LogValue().String()) }

// shownDepth is how deep headers are shown. encoding/json refuses what is deeper than 10,000
// levels.
const shownDepth = 100

func tableJSON(t amqp.Table, depth int) map[string]any {
	if t == nil {
		return nil
	}
	m := make(map[string]any, len(t))
	for k, v := range t {
		m[k] = valueJSON(v, depth-1)
	}
	return m
}

// valueJSON replaces what encoding/json refuses: times in a year that it cannot write, NaN and
// infinities, and what is nested deeper than depth.
func valueJSON(v any, depth int) any {
	switch v := v.(type) {
	case amqp.Table:
		if depth == 0 {
			return "..."
		}
		return tableJSON(v, depth)
	case []any:
		if depth == 0 {
			return "..."
		}
		list := make([]any, len(v))
		for i := range v {
			list[i] = valueJSON(v[i], depth-1)
		}
		return list
	case time.Time:
		if y := v.UTC().Year(); y < 0 || y > 9999 {
			return v.Unix()
		}
		return v.UTC()
	case float32:
		return floatJSON(float64(v), v)
	case float64:
		return floatJSON(v, v)
	}
	return v
}

func floatJSON(f float64, v any) any {
	switch {
	case math.IsNaN(f):
		return "NaN"
	case math.IsInf(f, 1):
		return "+Inf"
	case math.IsInf(f, -1):
		return "-Inf"
	}
	return v
}

// failedBefore returns how many attempts have failed before this one, as far as the policy counts.
func (d *Delivery) failedBefore() int {
	if !d.fromHere() {
		return 0
	}
	n, _ := headerInt(d.original().Headers[attemptHeader])
	return int(min(max(n, 0), maxCount))
}

// fromHere reports whether the message is the copy of one that has failed in the same queue. A copy
// that is consumed from a park queue is not.
func (d *Delivery) fromHere() bool {
	queue, ok := d.original().Headers[queueHeader].(string)
	return ok && queue == d.Queue()
}

// showAsPublished gives a message that comes back from a delay the exchange and the routing key that
// it was published with.
func (d *Delivery) showAsPublished() {
	if !d.fromHere() {
		return
	}
	if exchange, ok := d.Headers[exchangeHeader].(string); ok {
		d.Exchange = exchange
	}
	if key, ok := d.Headers[routingKeyHeader].(string); ok {
		d.RoutingKey = key
	}
}

// original returns the message as it came.
func (d *Delivery) original() *amqp.Delivery {
	if d.fence != nil {
		if kept := d.fence.kept.Load(); kept != nil {
			return &kept.original
		}
	}
	return &d.Delivery
}
