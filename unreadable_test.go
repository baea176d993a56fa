package steadymq_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// header is an encoded header with the name k.
func header(typ byte, value ...byte) []byte { return append([]byte{1, 'k', typ}, value...) }

// nestedArrays is a header with arrays in arrays, which takes the fewest bytes a level.
func nestedArrays(depth int) []byte {
	b := make([]byte, 0, 5*depth)
	for inside := 5 * (depth - 1); inside >= 0; inside -= 5 {
		b = binary.BigEndian.AppendUint32(append(b, 'A'), uint32(inside))
	}
	return append([]byte{1, 'k'}, b...)
}

// among publishes a message between two good ones to a queue of the type.
func (b *bench) among(queueType string, m steadymqtest.Message) {
	b.broker.DeleteQueue(queue)
	b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{Type: queueType})
	m.Body = []byte("between")
	b.broker.Publish(queue, "good 1")
	b.broker.PublishMessage(queue, m)
	b.broker.Publish(queue, "good 2")
}

// handled is a handler that notes what it is given, by one worker at a time.
type handled []*steadymq.Delivery

func (h *handled) handle(_ context.Context, d *steadymq.Delivery) error {
	*h = append(*h, d)
	return nil
}

func (h *handled) bodies() (bodies []string) {
	for _, d := range *h {
		bodies = append(bodies, string(d.Body))
	}
	return bodies
}

// ofType are options for a queue of the type.
func ofType(queueType string) []steadymq.Option {
	if queueType == "stream" {
		return opts(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
	}
	return nil
}

var queueTypes = []string{"classic", "quorum", "stream"}

func TestHeadersThatRabbitMQAcceptsAreRead(t *testing.T) {
	many := make(map[string]any)
	for i := range 10_000 {
		many[fmt.Sprint(i)] = int64(i)
	}
	list := make([]any, 10_000)
	deep := map[string]any{}
	for range 1000 {
		deep = map[string]any{"t": deep}
	}
	for name, m := range map[string]steadymqtest.Message{
		"10,000 headers":          {Headers: many},
		"10,000 in one array":     {Headers: map[string]any{"list": list}},
		"tables 1,000 deep":       {Headers: deep},
		"arrays 26,000 deep":      {RawHeaders: nestedArrays(26_000)},
		"a 64-bit integer of 0-9": {RawHeaders: header('L', 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFE)},
		"300 KB, over frame_max":  {Headers: map[string]any{"large": strings.Repeat("x", 300_000)}},
		"just under 1 MiB":        {Headers: map[string]any{"large": strings.Repeat("x", 1<<20-300)}},
	} {
		for _, queueType := range queueTypes {
			t.Run(name+", "+queueType, func(t *testing.T) {
				bubble(t, func(b *bench) {
					b.among(queueType, m)
					var got handled
					b.consuming(got.handle, ofType(queueType)...)
					b.wait(time.Second)
					require.Equal(b, []string{"good 1", "between", "good 2"}, got.bodies())
					if m.Headers != nil {
						assert.Len(b, got[1].Headers, len(m.Headers)+len(got[0].Headers))
					} else if queueType == "classic" {
						assert.Len(b, got[1].Headers, 1)
					}
					if v, ok := got[1].Headers["k"].(int64); ok {
						assert.EqualValues(b, -2, v)
					}
					assert.Zero(b, b.consumer.Stats().Unreadable)
					assert.EqualValues(b, 1, b.consumer.Stats().Sessions)
				})
			})
		}
	}
}

// unreadable are headers that nobody can read.
var unreadable = map[string]struct {
	raw    []byte
	reason string
}{
	"a type that does not exist":     {header('?', 1, 2, 3), "its headers cannot be read: a field is of the unknown type '?'"},
	"a string longer than the table": {header('S', 0, 0, 9, 9, 'x'), "its headers cannot be read: something is cut off"},
	"a name longer than the table":   {[]byte{200, 'k'}, "its headers cannot be read: something is cut off"},
	"a negative size":                {header('x', 0x80, 0, 0, 0), "its headers cannot be read: a size is negative"},
	"arrays 200,000 deep":            {nestedArrays(200_000), "its headers cannot be read: tables nest deeper than 32768 levels"},
	"more than 1 MiB of them":        {header('S', append([]byte{0, 0x10, 0, 0}, make([]byte, 1<<20)...)...), "its headers are larger than 1048576 bytes"},
}

func TestMessageThatCannotBeReadStopsNothing(t *testing.T) {
	for name, test := range unreadable {
		for _, queueType := range queueTypes[:2] {
			t.Run(name+", "+queueType, func(t *testing.T) {
				bubble(t, func(b *bench) {
					b.among(queueType, steadymqtest.Message{RawHeaders: test.raw})
					var got handled
					var told []*steadymq.MessageError
					b.consuming(got.handle, steadymq.WithHooks(steadymq.Hooks{
						StateChanged: b.changed,
						Unreadable:   func(e *steadymq.MessageError) { told = append(told, e) },
					}))
					b.wait(7 * time.Minute)
					require.Equal(b, []string{"good 1", "good 2"}, got.bodies(), "each once, in order")
					require.Len(b, told, 1)
					assert.EqualError(b, told[0].Err, test.reason)
					assert.EqualError(b, told[0], `steadymq: queue orders: the message with delivery tag 2 (exchange "", routing key "orders", 7 bytes) is given to no handler: `+test.reason)
					told[0].Err = nil
					assert.Equal(b, steadymq.MessageError{
						Queue: queue, Host: "mq1.test:5672", Session: 1, RoutingKey: queue, DeliveryTag: 2, Size: 7,
					}, *told[0])
					assert.Equal(b, 1, b.broker.Unsettled(queue), "it is held")

					b.wait(16 * time.Minute)
					again := len(told)
					assert.Contains(b, []int{2, 3}, again, "it was put back and came again, after 7.5 to 22.5 minutes")
					back := b.broker.Ledger().Settlements[2]
					assert.Equal(b, steadymqtest.Nack, back.Kind, "which no delivery limit counts, where it can be helped")
					assert.True(b, back.Requeue)

					stats := b.consumer.Stats()
					assert.EqualValues(b, again, stats.Unreadable)
					assert.EqualValues(b, 1, stats.Sessions)
					assert.EqualValues(b, 2, stats.Delivered)
					assert.EqualValues(b, 2, stats.Acked)
					assert.Zero(b, stats.Requeued)
					assert.Equal(b, again, strings.Count(b.log.String(), "a message cannot be read"))
					assert.Contains(b, b.log.String(), `exchange="" routing_key=orders delivery_tag=2 size=7 reason="`+strings.ReplaceAll(test.reason, `"`, `\"`))
					require.NoError(b, b.stop())
					assert.Equal(b, 1, b.broker.QueueLen(queue), "a stop puts it back")
				})
			})
		}
	}
}

// A stream keeps its messages, so there is nothing to put back.
func TestStreamStepsOverAMessageThatCannotBeRead(t *testing.T) {
	for name, test := range unreadable {
		for _, offset := range []string{"first", "next"} {
			t.Run(name+", "+offset, func(t *testing.T) {
				bubble(t, func(b *bench) {
					b.broker.DeleteQueue(queue)
					b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{Type: "stream"})
					b.broker.Publish(queue, "old")
					var got handled
					b.consuming(got.handle, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": offset}), steadymq.WithPrefetch(2))
					got = nil // of "old"
					for i := range 10 {
						b.broker.Publish(queue, fmt.Sprint("good ", i))
						b.broker.PublishMessage(queue, steadymqtest.Message{RawHeaders: test.raw})
					}
					b.wait(time.Second)
					b.broker.Reset()
					b.broker.Publish(queue, "good 10")
					b.wait(time.Minute)
					var want []string
					for i := range 11 {
						want = append(want, fmt.Sprint("good ", i))
					}
					assert.Equal(b, want, got.bodies(), "each once, in order")
					assert.Zero(b, b.broker.Unsettled(queue))
					assert.EqualValues(b, 10, b.consumer.Stats().Unreadable)
					assert.EqualValues(b, 2, b.consumer.Stats().Sessions)
					assert.Contains(b, b.log.String(), "it is stepped over")
				})
			})
		}
	}
}

func TestMessageOverTheSizeLimitStopsNothing(t *testing.T) {
	for _, queueType := range queueTypes {
		t.Run(queueType, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.broker.DeleteQueue(queue)
				b.broker.DeclareQueue(queue, steadymqtest.QueueOptions{Type: queueType})
				b.broker.Publish(queue, strings.Repeat("x", 1000), strings.Repeat("x", 1001), "good", strings.Repeat("x", 300_000), "good")
				var got handled
				var told []*steadymq.MessageError
				b.consuming(got.handle, append(ofType(queueType), steadymq.WithMaxMessageSize(1000), steadymq.WithHooks(steadymq.Hooks{
					Unreadable: func(e *steadymq.MessageError) { told = append(told, e) },
				}))...)
				b.wait(time.Minute)
				assert.Equal(b, []string{strings.Repeat("x", 1000), "good", "good"}, got.bodies())
				require.Len(b, told, 2)
				for i, size := range []uint64{1001, 300_000} {
					assert.ErrorIs(b, told[i], steadymq.ErrMessageTooLarge)
					assert.Equal(b, size, told[i].Size)
				}
				assert.ErrorContains(b, told[0], "1001 bytes) is given to no handler: the message is larger than the limit (WithMaxMessageSize) of 1000 bytes")
				assert.EqualValues(b, 1, b.consumer.Stats().Sessions)
				held := 2
				if queueType == "stream" {
					held = 0
				}
				assert.Equal(b, held, b.broker.Unsettled(queue))
			})
		})
	}
}

// The workers may all be busy, for hours.
func TestUnreadableMessageIsToldThoughAllWorkersAreBusy(t *testing.T) {
	bubble(t, func(b *bench) {
		b.among("classic", steadymqtest.Message{RawHeaders: header('?')})
		b.consuming(func(ctx context.Context, _ *steadymq.Delivery) error { <-ctx.Done(); return nil }, steadymq.WithDrainTimeout(time.Second))
		b.wait(time.Second)
		assert.EqualValues(b, 1, b.consumer.Stats().Unreadable)
		_ = b.stop()
	})
}

func TestUnreadableMessagesGoBackWithACancelledSession(t *testing.T) {
	bubble(t, func(b *bench) {
		b.among("quorum", steadymqtest.Message{RawHeaders: header('?')})
		b.consuming(ack)
		b.wait(time.Second)
		b.broker.CancelConsumers(queue)
		b.wait(time.Second)
		assert.EqualValues(b, 2, b.consumer.Stats().Sessions)
		assert.EqualValues(b, 2, b.consumer.Stats().Unreadable, "the next session was given it")
		assert.Equal(b, 1, b.broker.Unsettled(queue))
	})
}

func TestManyUnreadableMessagesMakeOneLogLineASecond(t *testing.T) {
	bubble(t, func(b *bench) {
		told := 0
		b.consuming(ack, steadymq.WithPrefetch(100), steadymq.WithHooks(steadymq.Hooks{Unreadable: func(*steadymq.MessageError) { told++ }}))
		for range 50 {
			b.broker.PublishMessage(queue, steadymqtest.Message{RawHeaders: header('?')})
			b.wait(100 * time.Millisecond)
		}
		assert.Equal(b, 50, told)
		assert.InDelta(b, 5, strings.Count(b.log.String(), "a message cannot be read"), 1)
		assert.Contains(b, b.log.String(), "suppressed=9")
	})
}

func TestPanicOfTheUnreadableHookEndsRun(t *testing.T) {
	bubble(t, func(b *bench) {
		b.among("classic", steadymqtest.Message{RawHeaders: header('?')})
		b.run(ack, steadymq.WithHooks(steadymq.Hooks{Unreadable: func(*steadymq.MessageError) { panic("mine") }}))
		b.wait(time.Second)
		var refused *steadymq.OptionError
		require.ErrorAs(b, b.stop(), &refused)
		assert.Equal(b, "WithHooks", refused.Option)
	})
}

// Acks wait a moment for company. Garbage that ends the socket must not take them along.
func TestAcksArriveBeforeASessionIsEndedForGarbage(t *testing.T) {
	for name, garbage := range map[string]func(consumerTag string) []byte{
		"a delivery whose frame does not end": func(tag string) []byte {
			args := append([]byte{0, 60, 0, 60, byte(len(tag))}, tag...)
			args = append(args, 0, 0, 0, 0, 0, 0, 0, 99, 0, 0, 0)
			return append(binary.BigEndian.AppendUint32([]byte{1, 0, 1}, uint32(len(args))), append(args, 'X')...)
		},
		"a delivery without a tag": func(tag string) []byte {
			args := append([]byte{0, 60, 0, 60, byte(len(tag))}, tag...)
			return append(binary.BigEndian.AppendUint32([]byte{1, 0, 1}, uint32(len(args))), append(args, 0xCE)...)
		},
		"no frame at all":      func(string) []byte { return nil },
		"a frame on channel 0": func(string) []byte { return []byte{1, 0, 0, 0, 0, 0, 4, 0, 99, 0, 99, 0xCE} },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				busy := make(chan struct{})
				b.consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					if string(d.Body) == "slow" && d.Session() == 1 {
						<-ctx.Done()
						<-busy
					}
					return nil
				}, steadymq.WithConcurrency(20), steadymq.WithPrefetch(1000), steadymq.WithWriteDelay(100*time.Millisecond))
				b.broker.Publish(queue, "slow", "a", "b", "c", "d", "e", "f", "g", "h", "i")
				b.wait(10 * time.Millisecond)
				require.Less(b, len(b.broker.Ledger().Settlements), 5, "most of them wait for company")
				b.broker.Garbage(garbage(b.broker.Ledger().Deliveries[0].ConsumerTag)...)
				b.wait(30 * time.Second)
				close(busy)
				assert.GreaterOrEqual(b, b.consumer.Stats().Sessions, uint64(2))
				for _, m := range b.broker.Ledger().Messages {
					want := 1
					if m.ID == "m1" {
						want = 2
					}
					assert.Equal(b, want, m.Deliveries, m.ID)
					assert.Equal(b, steadymqtest.Acked, m.Fate, m.ID)
				}
			})
		})
	}
}
