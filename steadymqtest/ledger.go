package steadymqtest

import (
	"fmt"
	"hash/maphash"
	"slices"
	"time"
)

// Fate says what has become of a message in a queue.
type Fate int

const (
	Ready        Fate = iota // waits in the queue
	Unacked                  // delivered, not settled
	Acked                    // acknowledged, or delivered to a consumer that does not acknowledge
	Discarded                // rejected without requeue, and the queue has no dead-letter exchange
	DeadLettered             // sent to the dead-letter exchange
	Dropped                  // gone with its queue, a purge, a restart, a time or a length limit
	Delayed                  // came back and is not ready yet: x-delayed-retry-type of RabbitMQ 4.3
	AwaitsTarget             // dead, and kept until its target takes it: x-dead-letter-strategy at-least-once
)

func (f Fate) String() string {
	names := [...]string{"ready", "unacked", "acked", "discarded", "dead-lettered", "dropped", "delayed", "awaits its target"}
	if f < 0 || int(f) >= len(names) {
		return fmt.Sprintf("Fate(%d)", int(f))
	}
	return names[f]
}

// Kind is the method that settled a delivery.
type Kind int

const (
	Ack    Kind = iota // basic.ack
	Nack               // basic.nack
	Reject             // basic.reject
)

func (k Kind) String() string {
	names := [...]string{"ack", "nack", "reject"}
	if k < 0 || int(k) >= len(names) {
		return fmt.Sprintf("Kind(%d)", int(k))
	}
	return names[k]
}

// Verdict is what the broker thought of a settlement.
type Verdict int

const (
	Valid   Verdict = iota // the tag was outstanding
	Late                   // the broker had taken the message back already, by a consumer timeout or with its queue; no effect, no error
	Double                 // the tag had been settled before: 406, the channel is closed
	Unknown                // the tag had never been delivered on that channel: 406, the channel is closed
)

func (v Verdict) String() string {
	names := [...]string{"valid", "late", "double", "unknown"}
	if v < 0 || int(v) >= len(names) {
		return fmt.Sprintf("Verdict(%d)", int(v))
	}
	return names[v]
}

// MessageRecord is one message in one queue. A message that is routed to two queues has two records, one that is dead-lettered has
// a new one in the queue it comes to, one that a client publishes again has a new publication and new records. [Ledger.With] and
// [Ledger.WithBody] follow it through all of them.
type MessageRecord struct {
	ID         string // the message-id property; "#n" for a message published without one
	Queue      string
	Exchange   string
	RoutingKey string
	Published  time.Time // when it came into this queue
	Deliveries int       // how often it was delivered
	Fate       Fate
	// Death is why it is dead, whether or not there was a dead-letter exchange: "rejected", "expired", "maxlen" or
	// "delivery_limit", as x-death says; empty for a message that is not.
	Death       string
	From        int // index of the record it was dead-lettered from, or -1
	Publication int // index in [Ledger.Publications], or -1: dead-lettered, or published by the test itself
	digest      uint64
}

// PublicationRecord is one basic.publish of a client, once its content was complete.
type PublicationRecord struct {
	ID         string // of the message, see [MessageRecord]
	Exchange   string
	RoutingKey string
	User       string // who was logged in
	Connection uint64
	Channel    uint16
	Session    uint64
	Sequence   uint64 // what confirms call it; 0 on a channel without confirms
	Mandatory  bool
	Time       time.Time
	Queues     int       // how many queues it was routed to; their records name this one
	Full       int       // how many of these did not take it
	Returned   bool      // sent back by basic.return
	Confirmed  time.Time // when basic.ack or basic.nack was sent; zero: not yet, or never
	Nacked     bool      // it was basic.nack
	Refused    int       // the code of the error that ended its channel or connection; 0: none
}

// DeliveryRecord is one basic.deliver or basic.get-ok.
type DeliveryRecord struct {
	ID          string // of the message
	Message     int    // index of its record in [Ledger.Messages]
	Queue       string
	Connection  uint64
	Channel     uint16
	Session     uint64 // counts every channel that was ever opened: (Session, Tag) is unique
	ConsumerTag string // empty for basic.get
	Tag         uint64
	Redelivered bool
	Time        time.Time
	Settled     time.Time // zero: not settled by the client
	Kind        Kind      // how, if settled
	Requeue     bool      // whether the settlement put it back
}

// SettlementRecord is one basic.ack, basic.nack or basic.reject as it came.
type SettlementRecord struct {
	ID         string // of the message; empty for an unknown tag
	Delivery   int    // index in [Ledger.Deliveries], or -1
	Connection uint64
	Channel    uint16
	Session    uint64
	Tag        uint64
	Kind       Kind
	Multiple   bool
	Requeue    bool
	Verdict    Verdict
	Time       time.Time
}

// ConsumerRecord is one basic.consume that was answered by consume-ok.
type ConsumerRecord struct {
	Tag        string
	Queue      string
	Host       string
	Connection uint64
	Channel    uint16
	Session    uint64
	Started    time.Time
	Ended      time.Time // zero: still there
	Cause      string    // why it ended
}

// ConnectionRecord is one connection whose TCP handshake was completed.
type ConnectionRecord struct {
	ID     uint64
	Name   string // the client's connection_name property
	Host   string
	Dialed time.Time
	Opened time.Time // when open-ok was sent; zero: never
	Ended  time.Time // when the broker knew that it was over; zero: still there
	Cause  string    // why it ended
}

// Dial is one call of the dial function.
type Dial struct {
	Addr string
	Time time.Time // when it returned
	Err  error
}

// Ledger is a copy of all that the broker has seen: the judge of a test. Records are in the order of their events.
type Ledger struct {
	Publications []PublicationRecord
	Messages     []MessageRecord
	Deliveries   []DeliveryRecord
	Settlements  []SettlementRecord
	Consumers    []ConsumerRecord
	Connections  []ConnectionRecord
	Dials        []Dial
}

// ledger is the broker's own; the broker's mutex guards it.
type ledger struct {
	off          bool // dials are kept all the same
	publications []PublicationRecord
	messages     []MessageRecord
	deliveries   []DeliveryRecord
	settlements  []SettlementRecord
	consumers    []ConsumerRecord
	connections  []ConnectionRecord
	dials        []Dial
	violations   []string
}

// Ledger returns a copy of everything seen so far. With [WithoutLedger] only Dials is kept.
func (b *Broker) Ledger() Ledger {
	b.lock()
	defer b.unlock()
	l := &b.ledger
	return Ledger{
		Publications: slices.Clone(l.publications),
		Messages:     slices.Clone(l.messages),
		Deliveries:   slices.Clone(l.deliveries),
		Settlements:  slices.Clone(l.settlements),
		Consumers:    slices.Clone(l.consumers),
		Connections:  slices.Clone(l.connections),
		Dials:        slices.Clone(l.dials),
	}
}

// Violations returns a line for every settlement that a correct consumer never sends: a tag settled twice, a tag that was never
// delivered on that channel, and multiple=true. It works with [WithoutLedger] too.
func (b *Broker) Violations() []string {
	b.lock()
	defer b.unlock()
	return slices.Clone(b.ledger.violations)
}

// With returns the records of one message, by its ID, in all queues.
func (l Ledger) With(id string) []MessageRecord {
	var found []MessageRecord
	for _, m := range l.Messages {
		if m.ID == id {
			found = append(found, m)
		}
	}
	return found
}

// WithBody returns the records of all messages with this body, in all queues: what becomes of a message that is published again
// without a message-id. The ledger keeps no bodies, only a number for each.
func (l Ledger) WithBody(body string) []MessageRecord {
	digest := digestOf([]byte(body))
	var found []MessageRecord
	for _, m := range l.Messages {
		if m.digest == digest {
			found = append(found, m)
		}
	}
	return found
}

// Published returns the publications of one message, by its ID.
func (l Ledger) Published(id string) []PublicationRecord {
	var found []PublicationRecord
	for _, p := range l.Publications {
		if p.ID == id {
			found = append(found, p)
		}
	}
	return found
}

var digestSeed = maphash.MakeSeed()

func digestOf(body []byte) uint64 { return maphash.Bytes(digestSeed, body) }

// Count returns how many messages of a queue have met a fate.
func (l Ledger) Count(queue string, fate Fate) int {
	n := 0
	for i := range l.Messages {
		if l.Messages[i].Queue == queue && l.Messages[i].Fate == fate {
			n++
		}
	}
	return n
}

// Redelivered returns how many deliveries from a queue had the redelivered flag.
func (l Ledger) Redelivered(queue string) int {
	n := 0
	for i := range l.Deliveries {
		if l.Deliveries[i].Queue == queue && l.Deliveries[i].Redelivered {
			n++
		}
	}
	return n
}

// addMessage starts the record of a message in a queue and returns its index, -1 when no ledger is kept.
func (l *ledger) addMessage(m *message, queue string, now time.Time) int {
	if l.off {
		return -1
	}
	l.messages = append(l.messages, MessageRecord{
		ID: m.id, Queue: queue, Exchange: m.exchange, RoutingKey: m.key, Published: now, From: m.from, Publication: m.publication, digest: m.digest,
	})
	return len(l.messages) - 1
}

func (l *ledger) setFate(record int, fate Fate) {
	if record >= 0 {
		l.messages[record].Fate = fate
	}
}

// publication is the record with this index, nil for -1.
func (l *ledger) publication(record int) *PublicationRecord {
	if record < 0 {
		return nil
	}
	return &l.publications[record]
}

func (l *ledger) died(record int, reason string) {
	if record >= 0 {
		l.messages[record].Death = reason
	}
}

func (l *ledger) endConsumer(record int, now time.Time, cause string) {
	if record >= 0 {
		l.consumers[record].Ended, l.consumers[record].Cause = now, cause
	}
}
