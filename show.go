package steadymq

import (
	"encoding/json"
	"log/slog"
	"math"
	"time"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
)

// deliveryJSON is what MarshalJSON shows.
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

// MarshalJSON implements json.Marshaler: the message, where it came from and what
// became of it. A body that is UTF-8 is in "body", any other in "body_base64". It
// takes whatever a publisher may have put into headers and properties. Of headers that nest
// deeper than 100 levels the rest is left out: "..." stands in its place.
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

// LogValue implements slog.LogValuer: what tells the message from others, without
// its content.
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

// String tells in one line what LogValue does.
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

// valueJSON replaces what encoding/json refuses: times of no year it can write, and
// numbers that are none, and what is nested deeper than depth.
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
