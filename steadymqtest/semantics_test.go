package steadymqtest_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/steadymqtest"
)

func TestExchangesRoute(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		ch := open(t, dial(t, b), 0)
		cases := []struct {
			kind, bound, key string
			arrives          bool
		}{
			{"direct", "a", "a", true},
			{"direct", "a", "b", false},
			{"fanout", "", "anything", true},
			{"topic", "a.*", "a.b", true},
			{"topic", "a.*", "a.b.c", false},
			{"topic", "a.#", "a", true},
			{"topic", "a.#", "a.b.c", true},
			{"topic", "#.c", "a.b.c", true},
			{"topic", "*", "", false},
			{"topic", "#", "", true},
			{"topic", "a.#.c", "a.c", true},
			{"topic", "a.#.c", "a.b", false},
		}
		for i, c := range cases {
			x := fmt.Sprintf("x%d", i)
			require.NoError(t, ch.ExchangeDeclare(x, c.kind, true, false, false, false, nil))
			q, err := ch.QueueDeclare("", false, false, true, false, nil)
			require.NoError(t, err)
			require.NoError(t, ch.QueueBind(q.Name, c.bound, x, false, nil))
			require.NoError(t, ch.PublishWithContext(t.Context(), x, c.key, false, false, amqp.Publishing{}))
			_, ok, err := ch.Get(q.Name, true)
			require.NoError(t, err)
			require.Equal(t, c.arrives, ok, "%+v", c)
			require.NoError(t, ch.QueueUnbind(q.Name, c.bound, x, nil))
			require.NoError(t, ch.PublishWithContext(t.Context(), x, c.key, false, false, amqp.Publishing{}))
			_, ok, err = ch.Get(q.Name, true)
			require.NoError(t, err)
			require.False(t, ok)
			require.NoError(t, ch.ExchangeDelete(x, false, false))
		}
	})
}

func TestExchangesBindToExchanges(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareExchange("in", "fanout")
		b.DeclareExchange("out", "topic")
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		require.True(t, b.Bind("q", "out", "a.#"))
		ch := open(t, dial(t, b), 0)
		require.NoError(t, ch.ExchangeBind("out", "", "in", false, nil))
		require.NoError(t, ch.ExchangeBind("in", "#", "out", false, nil), "a cycle must not hang the broker")
		_, n := b.PublishExchange("in", "a.b", steadymqtest.Message{Body: []byte("1")})
		require.Equal(t, 1, n)
		require.NoError(t, ch.ExchangeUnbind("out", "", "in", false, nil))
		_, n = b.PublishExchange("in", "a.b", steadymqtest.Message{})
		require.Zero(t, n)
	})
}

func TestConfirmsAndReturns(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{Args: map[string]any{"x-max-length": 1, "x-overflow": "reject-publish"}})
		ch := open(t, dial(t, b), 0)
		require.NoError(t, ch.Confirm(false))
		returns := ch.NotifyReturn(make(chan amqp.Return, 1))
		publish := func(key string) bool {
			c, err := ch.PublishWithDeferredConfirmWithContext(t.Context(), "", key, true, false, amqp.Publishing{Body: []byte("x"), Headers: amqp.Table{"n": int32(1)}})
			require.NoError(t, err)
			return c.Wait()
		}
		require.True(t, publish("q"))
		require.False(t, publish("q"), "full")
		require.True(t, publish("nowhere"))
		r := <-returns
		require.Equal(t, uint16(312), r.ReplyCode)
		require.Equal(t, "NO_ROUTE", r.ReplyText)
		require.Equal(t, int32(1), r.Headers["n"])
	})
}

func TestMessagesPassUnchanged(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{Type: "quorum"})
		ch := open(t, dial(t, b), 10)
		sent := amqp.Publishing{
			Headers: amqp.Table{
				"s": "text", "i": int32(-3), "l": int64(1 << 40), "b": true, "f": 1.5, "nil": nil, "bytes": []byte{1, 2},
				"at": time.Unix(1000, 0), "t": amqp.Table{"in": int16(4)}, "a": []any{"x", int32(1)}, "d": amqp.Decimal{Scale: 2, Value: 314},
				"u8": uint8(1), "i8": int8(-1), "u32": uint32(7), "f32": float32(2.5), "u16": uint16(9),
			},
			ContentType: "text/plain", ContentEncoding: "gzip", DeliveryMode: amqp.Persistent, Priority: 4, CorrelationId: "c", ReplyTo: "r",
			MessageId: "id", Timestamp: time.Unix(2000, 0), Type: "kind", UserId: "guest", AppId: "app", Body: make([]byte, 300_000),
		}
		require.NoError(t, ch.PublishWithContext(t.Context(), "", "q", false, false, sent))
		ds := consume(t, ch, "q", "")
		got := next(t, ds)
		require.Equal(t, sent.Headers, got.Headers)
		require.NoError(t, got.Reject(true))
		got = next(t, ds)
		require.Equal(t, int64(1), got.Headers["x-delivery-count"])
		delete(got.Headers, "x-delivery-count")
		delete(got.Headers, "x-acquired-count")
		require.Equal(t, sent.Headers, got.Headers, "also when the broker writes the headers anew")
		require.Equal(t, sent.Body, got.Body)
		require.Equal(t, []any{sent.ContentType, sent.ContentEncoding, sent.DeliveryMode, sent.Priority, sent.CorrelationId, sent.ReplyTo, sent.MessageId, sent.Timestamp, sent.Type, sent.UserId, sent.AppId},
			[]any{got.ContentType, got.ContentEncoding, got.DeliveryMode, got.Priority, got.CorrelationId, got.ReplyTo, got.MessageId, got.Timestamp, got.Type, got.UserId, got.AppId})
	})
}

func TestConsumersTakeTurns(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		ch := open(t, dial(t, b), 10)
		one, two := consume(t, ch, "q", "one"), consume(t, ch, "q", "two")
		b.Publish("q", "1", "2", "3", "4")
		for _, want := range []string{"1", "3"} {
			require.Equal(t, want, string(next(t, one).Body))
		}
		for _, want := range []string{"2", "4"} {
			require.Equal(t, want, string(next(t, two).Body))
		}
	})
}

func TestPriorityAndSingleActiveConsumers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.DeclareQueue("single", steadymqtest.QueueOptions{Args: map[string]any{"x-single-active-consumer": true}})
		ch := open(t, dial(t, b), 1)
		low := consume(t, ch, "q", "low")
		high, err := ch.Consume("q", "high", false, false, false, false, amqp.Table{"x-priority": int32(5)})
		require.NoError(t, err)
		b.Publish("q", "1", "2")
		require.Equal(t, "1", string(next(t, high).Body))
		require.Equal(t, "2", string(next(t, low).Body))

		active, waiting := consume(t, ch, "single", "active"), consume(t, ch, "single", "waiting")
		b.Publish("single", "1", "2")
		next(t, active)
		none(t, waiting, time.Second)
		require.NoError(t, ch.Cancel("active", false))
		require.Equal(t, "2", string(next(t, waiting).Body))
	})
}

func TestExclusiveConsumersAndQueues(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		mine, other := dial(t, b), dial(t, b)
		ch := open(t, mine, 1)
		_, err := ch.Consume("q", "", false, true, false, false, nil)
		require.NoError(t, err)
		_, err = open(t, other, 1).Consume("q", "", false, false, false, false, nil)
		c, text, _ := code(t, err)
		require.Equal(t, 403, c)
		require.Equal(t, "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use", text)

		_, err = ch.QueueDeclare("mine", false, false, true, false, nil)
		require.NoError(t, err)
		_, err = open(t, other, 1).Consume("mine", "", false, false, false, false, nil)
		c, text, _ = code(t, err)
		require.Equal(t, 405, c)
		require.Contains(t, text, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'mine' in vhost '/'.")
		require.NoError(t, mine.Close())
		_, err = open(t, other, 1).Consume("mine", "", false, false, false, false, nil)
		c, text, _ = code(t, err)
		require.Equal(t, 404, c)
		require.Equal(t, "NOT_FOUND - no queue 'mine' in vhost '/'", text)
		consume(t, open(t, other, 1), "q", "")
	})
}

func TestAnExclusiveQueueStaysLockedUntilTheBrokerBuriesItsOwner(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t, steadymqtest.WithHosts(2))
		owner := dialHost(t, b, 0)
		_, err := open(t, owner, 1).QueueDeclare("mine", false, false, true, false, nil)
		require.NoError(t, err)
		time.Sleep(20 * time.Second)
		b.Host(0).BlackHole(true, true)
		again := dialHost(t, b, 1)
		start := time.Now()
		for {
			_, err := open(t, again, 1).QueueDeclare("mine", false, false, true, false, nil)
			if err == nil {
				break
			}
			c, _, _ := code(t, err)
			require.Equal(t, 405, c)
			time.Sleep(time.Second)
		}
		require.InDelta(t, 25, time.Since(start).Seconds(), 6)
	})
}

func TestQueuesGoWithTheirLastConsumerOrByCommand(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("auto", steadymqtest.QueueOptions{AutoDelete: true})
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1", "2")
		ch := open(t, dial(t, b), 1)
		consume(t, ch, "auto", "c")
		require.NoError(t, ch.Cancel("c", false))
		require.Equal(t, -1, b.QueueLen("auto"))

		cancelled := ch.NotifyCancel(make(chan string, 1))
		d := next(t, consume(t, ch, "q", "c2"))
		require.True(t, b.DeleteQueue("q"))
		require.Equal(t, "c2", <-cancelled)
		require.NoError(t, d.Ack(false))
		require.NoError(t, ch.Qos(1, 0, false), "a late ack has no effect and no error")
		require.Equal(t, steadymqtest.Late, b.Ledger().Settlements[0].Verdict)
		require.Equal(t, 2, b.Ledger().Count("q", steadymqtest.Dropped))
		require.Empty(t, b.Publish("q", "lost")[0])
	})
}

func TestAReusedConsumerTagEndsTheConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		conn := dial(t, b)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		nc := open(t, conn, 1)
		consume(t, nc, "q", "same")
		go nc.Consume("q", "same", false, false, false, false, nil)
		err := <-closed
		require.Equal(t, 530, err.Code)
		require.Equal(t, "NOT_ALLOWED - attempt to reuse consumer tag 'same'", err.Reason)
	})
}

func TestDeadLettersCarryTheirStory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("dead", steadymqtest.QueueOptions{})
		b.DeclareQueue("retry", steadymqtest.QueueOptions{DeadLetter: "work", Args: map[string]any{"x-message-ttl": 5000}})
		b.DeclareQueue("work", steadymqtest.QueueOptions{DeadLetter: "retry"})
		id := b.Publish("work", "poison")[0]
		ds := consume(t, open(t, dial(t, b), 1), "work", "")
		require.NoError(t, next(t, ds).Reject(false))
		within(t, 5*time.Second, 0, func() {
			d := next(t, ds)
			deaths := d.Headers["x-death"].([]any)
			require.Len(t, deaths, 2)
			latest := deaths[0].(amqp.Table)
			require.Equal(t, "expired", latest["reason"])
			require.Equal(t, "retry", latest["queue"])
			require.Equal(t, "rejected", deaths[1].(amqp.Table)["reason"])
			require.Equal(t, "work", d.Headers["x-first-death-queue"])
			require.NoError(t, d.Nack(false, false))
		})
		d := next(t, ds)
		require.Equal(t, int64(2), d.Headers["x-death"].([]any)[0].(amqp.Table)["count"])
		require.Equal(t, id, d.MessageId)
		require.Len(t, b.Ledger().With(id), 5)
	})
}

func TestDeliveryLimitOfQuorumQueues(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("dead", steadymqtest.QueueOptions{})
		b.DeclareQueue("q", steadymqtest.QueueOptions{Type: "quorum", DeliveryLimit: 3, DeadLetter: "dead"})
		b.Publish("q", "1")
		ds := consume(t, open(t, dial(t, b), 1), "q", "")
		for _, count := range []any{nil, int64(1), int64(2)} {
			d := next(t, ds)
			require.Equal(t, count, d.Headers["x-delivery-count"])
			require.NoError(t, d.Nack(false, true))
			d = next(t, ds)
			require.Equal(t, count, d.Headers["x-delivery-count"], "4.3 does not count a nack")
			require.NoError(t, d.Reject(true))
		}
		d := next(t, ds)
		require.Equal(t, int64(3), d.Headers["x-delivery-count"])
		b.Reset() // a lost session counts
		require.Equal(t, 0, b.QueueLen("q"))
		require.Equal(t, 1, b.QueueLen("dead"))
		require.Equal(t, 1, b.Ledger().Count("q", steadymqtest.DeadLettered))
	})
}

func TestConsumerTimeoutInItsTwoForms(t *testing.T) {
	t.Run("406", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			b := steadymqtest.NewBroker(t, steadymqtest.WithConsumerTimeout(30*time.Second, steadymqtest.Form406))
			b.DeclareQueue("q", steadymqtest.QueueOptions{})
			b.Publish("q", "1", "2")
			ch := open(t, dial(t, b), 2)
			closed := ch.NotifyClose(make(chan *amqp.Error, 1))
			ds := consume(t, ch, "q", "")
			require.NoError(t, next(t, ds).Ack(false))
			next(t, ds)
			time.Sleep(20 * time.Second)
			b.Publish("q", "3")
			within(t, 10*time.Second, 0, func() {
				err := <-closed
				require.Equal(t, 406, err.Code)
				require.Contains(t, err.Reason, "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 30000 ms.")
			})
			require.Equal(t, 2, b.QueueLen("q"))
		})
	})
	t.Run("basic.cancel", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			b := steadymqtest.NewBroker(t, steadymqtest.WithConsumerTimeout(30*time.Second, steadymqtest.FormCancel))
			b.DeclareQueue("q", steadymqtest.QueueOptions{Type: "quorum"})
			b.DeclareQueue("classic", steadymqtest.QueueOptions{})
			b.Publish("q", "1")
			b.Publish("classic", "1")
			ch := open(t, dial(t, b), 2)
			cancelled := ch.NotifyCancel(make(chan string, 1))
			next(t, consume(t, ch, "classic", "no timeout"))
			d := next(t, consume(t, ch, "q", "slow"))
			within(t, 30*time.Second, 0, func() { require.Equal(t, "slow", <-cancelled) })
			require.Equal(t, 1, b.QueueLen("q"))
			require.NoError(t, d.Ack(false))
			require.NoError(t, ch.Qos(1, 0, false))
			require.Equal(t, 1, b.QueueLen("q"))
			require.Equal(t, steadymqtest.Late, b.Ledger().Settlements[0].Verdict)
			time.Sleep(time.Minute)
			require.Equal(t, 1, b.Unsettled("classic"))
		})
	})
}

func TestStreamsAreReadFromAnOffset(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("s", steadymqtest.QueueOptions{Type: "stream"})
		b.Publish("s", "0", "1")
		time.Sleep(time.Hour)
		b.Publish("s", "2", "3")
		conn := dial(t, b)
		for _, c := range []struct {
			offset any
			first  int64
		}{{"first", 0}, {"last", 3}, {int64(2), 2}, {time.Now().Add(-time.Minute), 2}} {
			ch := open(t, conn, 10)
			ds, err := ch.Consume("s", "", false, false, false, false, amqp.Table{"x-stream-offset": c.offset})
			require.NoError(t, err)
			for n := c.first; n < 4; n++ {
				d := next(t, ds)
				require.Equal(t, n, d.Headers["x-stream-offset"])
				require.Equal(t, fmt.Sprint(n), string(d.Body))
				require.False(t, d.Redelivered)
				require.NoError(t, d.Ack(false))
			}
			require.NoError(t, b.WaitSettled(soon(t), "s"))
			require.NoError(t, ch.Close())
		}
		ds := consume(t, open(t, conn, 1), "s", "")
		none(t, ds, time.Second)
		b.Publish("s", "4", "5")
		d := next(t, ds)
		require.Equal(t, "4", string(d.Body))
		none(t, ds, time.Second)
		require.NoError(t, d.Nack(false, true), "credit, in 4.x")
		require.Equal(t, "5", string(next(t, ds).Body))
		require.Equal(t, 6, b.QueueLen("s"))

		_, err := open(t, conn, 0).Consume("s", "", false, false, false, false, nil)
		c, _, _ := code(t, err)
		require.Equal(t, 406, c, "a stream consumer needs a prefetch")
		_, err = open(t, conn, 1).Consume("s", "", true, false, false, false, nil)
		require.Error(t, err)
		require.True(t, conn.IsClosed(), "auto-ack on a stream ends the connection")
	})
}

func TestGetPurgeAndRecover(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1", "2", "3")
		ch := open(t, dial(t, b), 0)
		d, ok, err := ch.Get("q", false)
		require.NoError(t, err)
		require.True(t, ok)
		require.Equal(t, uint32(2), d.MessageCount)
		//lint:ignore SA1019 deprecated, and still part of the protocol
		require.NoError(t, ch.Recover(true))
		d, _, err = ch.Get("q", true)
		require.NoError(t, err)
		require.Equal(t, "1", string(d.Body))
		require.True(t, d.Redelivered)
		n, err := ch.QueuePurge("q", false)
		require.NoError(t, err)
		require.Equal(t, 2, n)
		_, ok, err = ch.Get("q", false)
		require.NoError(t, err)
		require.False(t, ok)
		n, err = ch.QueueDelete("q", true, true, false)
		require.NoError(t, err)
		require.Zero(t, n)
	})
}

func TestMessagesExpireAndQueuesOverflow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("short", steadymqtest.QueueOptions{Args: map[string]any{"x-max-length": int32(2)}})
		b.Publish("short", "1", "2", "3")
		require.Equal(t, 2, b.QueueLen("short"))
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.PublishMessage("q", steadymqtest.Message{Expiration: "1000"})
		b.Publish("q", "stays")
		time.Sleep(1001 * time.Millisecond)
		require.Equal(t, 1, b.QueueLen("q"))
		require.Equal(t, 1, b.Ledger().Count("q", steadymqtest.Dropped))
	})
}

func TestWaitsEndWithTheirContextAndSayWhatWasLeft(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := b.WaitSettled(ctx, "q")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "1 ready, 0 unsettled, 0 consumers")
		require.Error(t, b.WaitConsumers(ctx, "q", 1))
		done := make(chan error)
		go func() { done <- b.WaitConsumers(context.Background(), "q", 1) }()
		time.Sleep(time.Second)
		b.Close()
		require.ErrorContains(t, <-done, "broker closed")
	})
}

func TestHooksComeInOrderAndMayCallTheBroker(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var b *steadymqtest.Broker
		var seen []string
		b = steadymqtest.NewBroker(t, steadymqtest.WithoutLedger(), steadymqtest.WithHooks(steadymqtest.Hooks{
			Opened:    func(r steadymqtest.ConnectionRecord) { seen = append(seen, "opened "+r.Host) },
			Closed:    func(r steadymqtest.ConnectionRecord) { seen = append(seen, "closed: "+r.Cause) },
			Consuming: func(r steadymqtest.ConsumerRecord) { seen = append(seen, "consuming "+r.Tag) },
			Cancelled: func(r steadymqtest.ConsumerRecord) { seen = append(seen, "cancelled "+r.Tag) },
			Delivered: func(r steadymqtest.DeliveryRecord) { seen = append(seen, "delivered "+r.ID) },
			Settled: func(r steadymqtest.SettlementRecord) {
				seen = append(seen, fmt.Sprintf("%s %s", r.Kind, r.ID))
				b.CloseConnections(320, "enough")
			},
		}))
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1")
		conn := dial(t, b)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		d := next(t, consume(t, open(t, conn, 1), "q", "c"))
		require.NoError(t, d.Ack(false))
		require.Equal(t, 320, (<-closed).Code)
		synctest.Wait() // the last hooks may still be running
		require.Equal(t, []string{
			"opened mq1.test:5672", "consuming c", "delivered m1", "ack m1", "cancelled c", "closed: 320 CONNECTION_FORCED - enough",
		}, seen)
		require.Empty(t, b.Ledger().Deliveries)
	})
}

func TestABrokerThatIsClosedLeavesNothing(t *testing.T) {
	bubble(t, func(t *testing.T) { // the bubble panics if a goroutine is left
		b := steadymqtest.NewBroker(nil, steadymqtest.WithLatency(time.Second))
		b.DropSYN(true)
		done := make(chan error)
		go func() {
			_, err := b.Dial("tcp", b.Host(0).Addr())
			done <- err
		}()
		time.Sleep(500 * time.Millisecond)
		b.Close()
		b.Close()
		require.Error(t, <-done)
		_, err := b.Dial("tcp", b.Host(0).Addr())
		require.Error(t, err)
	})
}
