package steadymqtest

import (
	"encoding/binary"
	"maps"
	"slices"
	"time"
)

// Message is a message to publish, see [Broker.PublishMessage]. The zero value of a field leaves that property out.
type Message struct {
	// ID becomes the message-id property. Empty: the broker makes one, so that every message can be told apart in the [Ledger].
	ID      string
	Body    []byte
	Headers map[string]any
	// RawHeaders are encoded headers, each a name and a value, that are delivered as they are in front of Headers. So a test can
	// send what no client would write and some clients cannot read: a type they do not know, a table cut off in the middle, more
	// than fits into a frame. From a publisher on the network the broker takes, as RabbitMQ does, only what it can read.
	RawHeaders      []byte
	ContentType     string
	ContentEncoding string
	CorrelationID   string
	ReplyTo         string
	Expiration      string
	Type            string
	UserID          string
	AppID           string
	Timestamp       time.Time
	Priority        uint8
	// Transient makes the message one that a restart of the whole broker loses, see [Faults.Kill]. The default is persistent.
	Transient bool
}

// The property flags of a basic content header.
const (
	propContentType     = 1 << 15
	propContentEncoding = 1 << 14
	propHeaders         = 1 << 13
	propDeliveryMode    = 1 << 12
	propPriority        = 1 << 11
	propCorrelationID   = 1 << 10
	propReplyTo         = 1 << 9
	propExpiration      = 1 << 8
	propMessageID       = 1 << 7
	propTimestamp       = 1 << 6
	propType            = 1 << 5
	propUserID          = 1 << 4
	propAppID           = 1 << 3
	propClusterID       = 1 << 2
)

// appendProperties encodes the property flags and list of m.
func appendProperties(out []byte, m *Message) []byte {
	mark := len(out)
	out = append(out, 0, 0)
	var flags uint16
	text := func(flag uint16, s string) {
		if s != "" {
			flags |= flag
			out = appendShortstr(out, s)
		}
	}
	text(propContentType, m.ContentType)
	text(propContentEncoding, m.ContentEncoding)
	if len(m.Headers) > 0 || len(m.RawHeaders) > 0 {
		flags |= propHeaders
		out = appendRawTable(out, m.RawHeaders, m.Headers)
	}
	flags |= propDeliveryMode
	out = append(out, 2-bit(m.Transient, 0))
	if m.Priority > 0 {
		flags |= propPriority
		out = append(out, m.Priority)
	}
	text(propCorrelationID, m.CorrelationID)
	text(propReplyTo, m.ReplyTo)
	text(propExpiration, m.Expiration)
	text(propMessageID, m.ID)
	if !m.Timestamp.IsZero() {
		flags |= propTimestamp
		out = binary.BigEndian.AppendUint64(out, uint64(m.Timestamp.Unix()))
	}
	text(propType, m.Type)
	text(propUserID, m.UserID)
	text(propAppID, m.AppID)
	binary.BigEndian.PutUint16(out[mark:], flags)
	return out
}

// decodeProperties reads flags and list as a client or appendProperties wrote them. Headers that cannot be read are in RawHeaders.
func decodeProperties(props []byte) (Message, bool) {
	d := decoder{b: props}
	flags := d.short()
	m := Message{Transient: true}
	text := func(flag uint16, s *string) {
		if flags&flag != 0 {
			*s = d.shortstr()
		}
	}
	text(propContentType, &m.ContentType)
	text(propContentEncoding, &m.ContentEncoding)
	if flags&propHeaders != 0 {
		m.Headers, m.RawHeaders = d.headers()
	}
	if flags&propDeliveryMode != 0 {
		m.Transient = d.octet() != 2
	}
	if flags&propPriority != 0 {
		m.Priority = d.octet()
	}
	text(propCorrelationID, &m.CorrelationID)
	text(propReplyTo, &m.ReplyTo)
	text(propExpiration, &m.Expiration)
	text(propMessageID, &m.ID)
	if flags&propTimestamp != 0 {
		m.Timestamp = time.Unix(int64(d.longlong()), 0)
	}
	text(propType, &m.Type)
	text(propUserID, &m.UserID)
	text(propAppID, &m.AppID)
	var cluster string
	text(propClusterID, &cluster)
	return m, !d.bad
}

// message is what was published once; several queues may hold it. It never changes after it was published.
type message struct {
	id         string // message-id, or a made-up name for the ledger
	exchange   string
	key        string
	props      []byte // flags and list as on the wire, written again only when a header has to be added
	body       []byte
	transient  bool
	expiration string
	delivered  int // by the quorum queues that dead-lettered it
	acquired   int // by the classic queue that dead-lettered it last

	extra  []string // further routing keys, those of CC and then those of BCC
	blind  int      // how many of them are of BCC
	deaths []any    // what x-death says since 4.0, where a client's own header does not count

	publication int    // in the ledger, -1: it did not come from a client
	from        int    // in the ledger, the record that it was dead-lettered from, -1 without one
	digest      uint64 // of the body, for the ledger
}

func newMessage(m *Message, exchange, key string) *message {
	return &message{
		id: m.ID, exchange: exchange, key: key, props: appendProperties(nil, m), body: slices.Clone(m.Body), transient: m.Transient,
		expiration: m.Expiration, publication: -1, from: -1,
	}
}

// withHeader is the property list of m with one header more, or with another value of it.
func (m *message) withHeader(key string, value any) []byte {
	p, _ := decodeProperties(m.props)
	p.Headers = maps.Clone(p.Headers)
	if p.Headers == nil {
		p.Headers = make(map[string]any)
	}
	p.Headers[key] = value
	return appendProperties(nil, &p)
}
