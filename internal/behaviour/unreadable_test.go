package behaviour_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// among publishes a message between two good ones to a queue of the type.
func among(r *rig.Rig, queueType string, m steadymqtest.Message) {
	r.Broker.DeleteQueue(rig.Queue)
	r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: queueType})
	m.Body = []byte("between")
	r.Broker.Publish(rig.Queue, "good 1")
	r.Broker.PublishMessage(rig.Queue, m)
	r.Broker.Publish(rig.Queue, "good 2")
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
		"arrays 26,000 deep":      {RawHeaders: rig.NestedArrays(26_000)},
		"a 64-bit integer of 0-9": {RawHeaders: rig.HeaderTable('L', 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFE)},
		"300 KB, over frame_max":  {Headers: map[string]any{"large": strings.Repeat("x", 300_000)}},
		"just under 1 MiB":        {Headers: map[string]any{"large": strings.Repeat("x", 1<<20-300)}},
	} {
		for _, queueType := range rig.QueueTypes {
			t.Run(name+", "+queueType, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					among(r, queueType, m)
					var got handled
					r.Consuming(got.handle, rig.OfType(queueType)...)
					r.Wait(time.Second)
					require.Equal(r, []string{"good 1", "between", "good 2"}, got.bodies())
					if m.Headers != nil {
						assert.Len(r, got[1].Headers, len(m.Headers)+len(got[0].Headers))
					} else if queueType == "classic" {
						assert.Len(r, got[1].Headers, 1)
					}
					if v, ok := got[1].Headers["k"].(int64); ok {
						assert.EqualValues(r, -2, v)
					}
					assert.Zero(r, r.Consumer.Stats().Unreadable)
					assert.EqualValues(r, 1, r.Consumer.Stats().Sessions)
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
	"a type that does not exist":     {rig.HeaderTable('?', 1, 2, 3), "its headers cannot be read: a field is of the unknown type '?'"},
	"a string longer than the table": {rig.HeaderTable('S', 0, 0, 9, 9, 'x'), "its headers cannot be read: something is cut off"},
	"a name longer than the table":   {[]byte{200, 'k'}, "its headers cannot be read: something is cut off"},
	"a negative size":                {rig.HeaderTable('x', 0x80, 0, 0, 0), "its headers cannot be read: a size is negative"},
	"arrays 200,000 deep":            {rig.NestedArrays(200_000), "its headers cannot be read: tables nest deeper than 32768 levels"},
	"more than 1 MiB of them":        {rig.HeaderTable('S', append([]byte{0, 0x10, 0, 0}, make([]byte, 1<<20)...)...), "its headers are larger than 1048576 bytes"},
}

func TestMessageThatCannotBeReadStopsNothing(t *testing.T) {
	for name, test := range unreadable {
		for _, queueType := range rig.QueueTypes[:2] {
			t.Run(name+", "+queueType, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					among(r, queueType, steadymqtest.Message{RawHeaders: test.raw})
					var got handled
					var told []*steadymq.MessageError
					r.Consuming(got.handle, steadymq.WithHooks(steadymq.Hooks{
						StateChanged: r.Changed,
						Unreadable:   func(e *steadymq.MessageError) { told = append(told, e) },
					}))
					r.Wait(7 * time.Minute)
					require.Equal(r, []string{"good 1", "good 2"}, got.bodies(), "each once, in order")
					require.Len(r, told, 1)
					assert.EqualError(r, told[0].Err, test.reason)
					assert.EqualError(r, told[0], `steadymq: queue orders: the message with delivery tag 2 (exchange "", routing key "orders", 7 bytes) is given to no handler: `+test.reason)
					told[0].Err = nil
					assert.Equal(r, steadymq.MessageError{
						Queue: rig.Queue, Host: "mq1.test:5672", Session: 1, RoutingKey: rig.Queue, DeliveryTag: 2, Size: 7,
					}, *told[0])
					assert.Equal(r, 1, r.Broker.Unsettled(rig.Queue), "it is held")

					r.Wait(16 * time.Minute)
					again := len(told)
					assert.Contains(r, []int{2, 3}, again, "it was put back and came again, after 7.5 to 22.5 minutes")
					back := r.Broker.Ledger().Settlements[2]
					assert.Equal(r, steadymqtest.Nack, back.Kind, "which no delivery limit counts, where it can be helped")
					assert.True(r, back.Requeue)

					stats := r.Consumer.Stats()
					assert.EqualValues(r, again, stats.Unreadable)
					assert.EqualValues(r, 1, stats.Sessions)
					assert.EqualValues(r, 2, stats.Delivered)
					assert.EqualValues(r, 2, stats.Acked)
					assert.Zero(r, stats.Requeued)
					assert.Equal(r, again, strings.Count(r.Log.String(), "a message cannot be read"))
					assert.Contains(r, r.Log.String(), `exchange="" routing_key=orders delivery_tag=2 size=7 reason="`+strings.ReplaceAll(test.reason, `"`, `\"`))
					require.NoError(r, r.Stop())
					assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue), "a stop puts it back")
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
				rig.Bubble(t, func(r *rig.Rig) {
					r.Broker.DeleteQueue(rig.Queue)
					r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "stream"})
					r.Broker.Publish(rig.Queue, "old")
					var got handled
					r.Consuming(got.handle, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": offset}), steadymq.WithPrefetch(2))
					got = nil // of "old"
					for i := range 10 {
						r.Broker.Publish(rig.Queue, fmt.Sprint("good ", i))
						r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{RawHeaders: test.raw})
					}
					r.Wait(time.Second)
					r.Broker.Reset()
					r.Broker.Publish(rig.Queue, "good 10")
					r.Wait(time.Minute)
					var want []string
					for i := range 11 {
						want = append(want, fmt.Sprint("good ", i))
					}
					assert.Equal(r, want, got.bodies(), "each once, in order")
					assert.Zero(r, r.Broker.Unsettled(rig.Queue))
					assert.EqualValues(r, 10, r.Consumer.Stats().Unreadable)
					assert.EqualValues(r, 2, r.Consumer.Stats().Sessions)
					assert.Contains(r, r.Log.String(), "it is stepped over")
				})
			})
		}
	}
}

func TestMessageOverTheSizeLimitStopsNothing(t *testing.T) {
	for _, queueType := range rig.QueueTypes {
		t.Run(queueType, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeleteQueue(rig.Queue)
				r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: queueType})
				r.Broker.Publish(rig.Queue, strings.Repeat("x", 1000), strings.Repeat("x", 1001), "good", strings.Repeat("x", 300_000), "good")
				var got handled
				var told []*steadymq.MessageError
				r.Consuming(got.handle, append(rig.OfType(queueType), steadymq.WithMaxMessageSize(1000), steadymq.WithHooks(steadymq.Hooks{
					Unreadable: func(e *steadymq.MessageError) { told = append(told, e) },
				}))...)
				r.Wait(time.Minute)
				assert.Equal(r, []string{strings.Repeat("x", 1000), "good", "good"}, got.bodies())
				require.Len(r, told, 2)
				for i, size := range []uint64{1001, 300_000} {
					assert.ErrorIs(r, told[i], steadymq.ErrMessageTooLarge)
					assert.Equal(r, size, told[i].Size)
				}
				assert.ErrorContains(r, told[0], "1001 bytes) is given to no handler: the message is larger than the limit (WithMaxMessageSize) of 1000 bytes")
				assert.EqualValues(r, 1, r.Consumer.Stats().Sessions)
				held := 2
				if queueType == "stream" {
					held = 0
				}
				assert.Equal(r, held, r.Broker.Unsettled(rig.Queue))
			})
		})
	}
}

// The workers may all be busy, for hours.
func TestUnreadableMessageIsToldThoughAllWorkersAreBusy(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		among(r, "classic", steadymqtest.Message{RawHeaders: rig.HeaderTable('?')})
		r.Consuming(func(ctx context.Context, _ *steadymq.Delivery) error { <-ctx.Done(); return nil }, steadymq.WithDrainTimeout(time.Second))
		r.Wait(time.Second)
		assert.EqualValues(r, 1, r.Consumer.Stats().Unreadable)
		_ = r.Stop()
	})
}

func TestUnreadableMessagesGoBackWithACancelledSession(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		among(r, "quorum", steadymqtest.Message{RawHeaders: rig.HeaderTable('?')})
		r.Consuming(rig.Ack)
		r.Wait(time.Second)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(time.Second)
		assert.EqualValues(r, 2, r.Consumer.Stats().Sessions)
		assert.EqualValues(r, 2, r.Consumer.Stats().Unreadable, "the next session was given it")
		assert.Equal(r, 1, r.Broker.Unsettled(rig.Queue))
	})
}

func TestManyUnreadableMessagesMakeOneLogLineASecond(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		told := 0
		r.Consuming(rig.Ack, steadymq.WithPrefetch(100), steadymq.WithHooks(steadymq.Hooks{Unreadable: func(*steadymq.MessageError) { told++ }}))
		for range 50 {
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{RawHeaders: rig.HeaderTable('?')})
			r.Wait(100 * time.Millisecond)
		}
		assert.Equal(r, 50, told)
		assert.InDelta(r, 5, strings.Count(r.Log.String(), "a message cannot be read"), 1)
		assert.Contains(r, r.Log.String(), "suppressed=9")
	})
}

func TestPanicOfTheUnreadableHookEndsRun(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		among(r, "classic", steadymqtest.Message{RawHeaders: rig.HeaderTable('?')})
		r.Run(rig.Ack, steadymq.WithHooks(steadymq.Hooks{Unreadable: func(*steadymq.MessageError) { panic("mine") }}))
		r.Wait(time.Second)
		var refused *steadymq.OptionError
		require.ErrorAs(r, r.Stop(), &refused)
		assert.Equal(r, "WithHooks", refused.Option)
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
			rig.Bubble(t, func(r *rig.Rig) {
				busy := make(chan struct{})
				r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					if string(d.Body) == "slow" && d.Session() == 1 {
						<-ctx.Done()
						<-busy
					}
					return nil
				}, steadymq.WithConcurrency(20), steadymq.WithPrefetch(1000), steadymq.WithWriteDelay(100*time.Millisecond))
				r.Broker.Publish(rig.Queue, "slow", "a", "b", "c", "d", "e", "f", "g", "h", "i")
				r.Wait(10 * time.Millisecond)
				require.Less(r, len(r.Broker.Ledger().Settlements), 5, "most of them wait for company")
				r.Broker.Garbage(garbage(r.Broker.Ledger().Deliveries[0].ConsumerTag)...)
				r.Wait(30 * time.Second)
				close(busy)
				assert.GreaterOrEqual(r, r.Consumer.Stats().Sessions, uint64(2))
				for _, m := range r.Broker.Ledger().Messages {
					want := 1
					if m.ID == "m1" {
						want = 2
					}
					assert.Equal(r, want, m.Deliveries, m.ID)
					assert.Equal(r, steadymqtest.Acked, m.Fate, m.ID)
				}
			})
		})
	}
}

func TestHoldOfAnUnreadableMessageIsItsOwn(t *testing.T) {
	for name, delays := range map[string][2]time.Duration{
		"short": {10 * time.Millisecond, 10 * time.Millisecond},
		"long":  {24 * time.Hour, 24 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: []byte("large")})
				r.Consuming(rig.Ack, steadymq.WithMaxMessageSize(1), steadymq.WithRequeueDelay(delays[0], delays[1]), steadymq.WithPrefetch(2))
				r.Wait(7 * time.Minute)
				assert.EqualValues(r, 1, r.Consumer.Stats().Unreadable)
				assert.Equal(r, 1, r.Consumer.Stats().Held)
				assert.NotZero(r, r.TimesLogged("take what cannot be read out of the queue with another client"))
				r.Wait(9 * time.Minute)
				assert.Greater(r, r.Consumer.Stats().Unreadable, uint64(1), "it has come again")
			})
		})
	}
}
