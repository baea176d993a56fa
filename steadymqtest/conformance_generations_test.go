package steadymqtest_test

import (
	"context"
	"errors"
	"net/url"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/steadymqtest"
)

// stranger is a user who may consume and may not configure, and the password too.
const stranger = "kit-stranger"

// heldFor is the consumer timeout of the scripts that wait for it. RabbitMQ looks at it in the ticks of the channel.
const heldFor = 3 * time.Second

var returnedLater = difference{why: "before 4.0 returned messages of a quorum queue may come after new ones", until: 400}

// allow makes the stranger, with these permissions.
func allow(configure, write, read string) func(context.Context, *rabbit.Broker) error {
	return func(ctx context.Context, b *rabbit.Broker) error {
		if err := b.NewUser(ctx, stranger, stranger); err != nil && b.NewPassword(ctx, stranger, stranger) != nil {
			return err
		}
		return b.Permit(ctx, stranger, "/", configure, write, read)
	}
}

// permit is allow for the kit.
func permit(configure, write, read string) func(*steadymqtest.Broker) {
	return func(b *steadymqtest.Broker) { b.SetPermissions(stranger, configure, write, read) }
}

// alarm raises a memory alarm, or ends it.
func alarm(ctx context.Context, b *rabbit.Broker, on bool) error {
	if on {
		return b.Do(ctx, "rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []})")
	}
	return b.Do(ctx, "rabbit_alarm:clear_alarm({resource_limit, memory, node()})")
}

// hurry sets the consumer timeout of all brokers whose channels are opened from now on.
func hurry(ctx context.Context, b *rabbit.Broker) error {
	return b.DefaultTimeout(ctx, int(heldFor.Milliseconds()))
}

func patient(ctx context.Context, b *rabbit.Broker) error {
	return b.DefaultTimeout(ctx, int((30 * time.Minute).Milliseconds()))
}

// byGeneration is what the generations of RabbitMQ do differently, or what the kit leaves out.
var byGeneration = []scenario{
	{name: "channel close requeues quorum", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 10)
		q := s.queue(ch, "q", quorum)
		s.publish(conn, "", q, "1", "2", "3", "4", "5")
		one := s.open(conn, 4)
		ds := s.consume(one, q, "c")
		for range 4 {
			s.next("c", ds)
		}
		s.fails("close", one.Close())
		s.ready(conn, q, 5)
		ds = s.consume(ch, q, "c2")
		for range 5 {
			s.next("c2", ds)
		}
	}},
	{name: "nack counts quorum", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		dead := s.queue(ch, "dead", nil)
		q := s.queue(ch, "q", amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(2), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
		s.publish(conn, "", q, "poison")
		ds := s.consume(ch, q, "c")
		for range 5 {
			d := s.next("c", ds)
			if d.DeliveryTag == 3 {
				break
			}
			d.Nack(false, true)
		}
	}},
	{name: "nacks and rejects mixed", from: 403, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(2)})
		s.publish(conn, "", q, "poison")
		ds := s.consume(ch, q, "c")
		for i := range 8 {
			d := s.next("c", ds)
			if d.Acknowledger == nil {
				break
			}
			if i%2 == 0 {
				d.Nack(false, true)
			} else {
				d.Reject(true)
			}
		}
	}},
	{name: "lost sessions count", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 1), "q", amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(10)})
		s.publish(conn, "", q, "1")
		again := func(what string, end func(ch *amqp.Channel, own *amqp.Connection) error) {
			own := s.dial()
			ch := s.open(own, 1)
			s.next(what, s.consume(ch, q, "c"))
			s.fails(what, end(ch, own))
			s.ready(conn, q, 1)
		}
		again("channel closed", func(ch *amqp.Channel, _ *amqp.Connection) error { return ch.Close() })
		again("connection closed", func(_ *amqp.Channel, own *amqp.Connection) error { return own.Close() })
		again("cancelled, then channel closed", func(ch *amqp.Channel, _ *amqp.Connection) error {
			return errors.Join(ch.Cancel("c", false), ch.Close())
		})
		again("recovered", func(ch *amqp.Channel, _ *amqp.Connection) error {
			//lint:ignore SA1019 deprecated, and still part of the protocol
			return errors.Join(ch.Cancel("c", false), ch.Recover(true))
		})
		again("nacked", func(ch *amqp.Channel, _ *amqp.Connection) error {
			return errors.Join(ch.Cancel("c", false), ch.Nack(0, true, true))
		})
		again("the last", func(*amqp.Channel, *amqp.Connection) error { return nil })
	}},
	{name: "gets count", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		q := s.queue(ch, "q", quorum)
		s.publish(conn, "", q, "1")
		for range 3 {
			d, ok, err := ch.Get(q, false)
			s.fails("get", err)
			s.note("%t redelivered %t count %v acquired %v", ok, d.Redelivered, d.Headers["x-delivery-count"], d.Headers["x-acquired-count"])
			s.fails("reject", d.Reject(true))
		}
	}},
	{name: "default delivery limit", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", quorum)
		s.publish(conn, "", q, "poison")
		ds := s.consume(ch, q, "c")
		n := 0
		for ; n < 25; n++ {
			select {
			case d := <-ds:
				d.Reject(true)
				continue
			case <-time.After(3 * time.Second):
			}
			break
		}
		s.note("delivered %d times", n)
	}},
	{name: "no delivery limit", from: 400, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q, err := ch.QueueDeclare(s.prefix+"q", true, false, false, false, amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(-1)})
		s.fails("declare", err)
		if err != nil {
			return
		}
		s.publish(conn, "", q.Name, "poison")
		ds := s.consume(ch, q.Name, "c")
		for range 25 {
			s.next0(ds).Reject(true)
		}
		s.next("c", ds)
	}},
	{name: "dead letters between kinds", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		dead := s.queue(ch, "dead", quorum)
		for _, kind := range []string{"classic", "quorum"} {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
			one := s.open(conn, 1)
			s.publish(conn, "", q, kind+" at once", kind+" later")
			ds := s.consume(one, q, "c")
			s.next0(ds).Reject(false)
			s.next0(ds).Reject(true)
			s.next0(ds).Reject(false)
			s.ready(conn, dead, 2)
			to := s.open(conn, 10)
			ds = s.consume(to, dead, "d")
			s.next("dead", ds).Ack(false)
			s.next("dead", ds).Ack(false)
			s.fails("close", to.Close())
		}
	}},
	{name: "dead letter moved twice", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		dead := s.queue(ch, "dead", nil)
		q2 := s.queue(ch, "q2", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead, "x-message-ttl": int32(50)})
		q := s.queue(ch, "q", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": q2})
		s.publish(conn, "", q, "m")
		s.next("c", s.consume(ch, q, "c")).Reject(false)
		d := s.next("dead", s.consume(s.open(conn, 1), dead, "d"))
		deaths(s, d)
	}},
	{name: "transient queues", differs: difference{
		why: "4.3.0 to 4.3.5 refuse transient queues that are not exclusive by 541, as the kit does; 4.3.6 as packaged by Debian lets them pass", from: 403,
	}, script: func(s *script) {
		conn := s.dial()
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		ch := s.open(conn, 1)
		_, err := ch.QueueDeclare(s.prefix+"mine", false, false, true, false, nil)
		s.fails("exclusive", err)
		_, err = ch.QueueDeclare(s.prefix+"q", false, false, false, false, nil)
		s.fails("shared", err)
		if err != nil {
			s.closed("connection", closed)
		}
	}},
	{name: "auto-delete durable", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		name := s.prefix + "q"
		_, err := ch.QueueDeclare(name, true, true, false, false, nil)
		s.fails("declare", err)
		s.consume(ch, name, "c")
		s.fails("cancel", ch.Cancel("c", false))
		time.Sleep(100 * time.Millisecond)
		s.ready(conn, name, 0)
	}},
	{name: "classic by name", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", amqp.Table{"x-queue-type": "classic"})
		_, err := ch.QueueDeclare(q, true, false, false, false, nil)
		s.fails("without a name", err)
		q2 := s.queue(s.open(conn, 1), "q2", nil)
		_, err = s.open(conn, 1).QueueDeclare(q2, true, false, false, false, amqp.Table{"x-queue-type": "classic"})
		s.fails("with a name", err)
		_, err = s.open(conn, 1).QueueDeclare(q2, true, false, false, false, quorum)
		s.fails("as a quorum queue", err)
	}},
	{name: "frame size", script: func(s *script) {
		conn, err := amqp.DialConfig(s.url, amqp.Config{FrameSize: 4096, Dial: s.net})
		s.fails("dial", err)
		if err == nil {
			s.fails("close", conn.Close())
		}
	}},
	{
		name: "passive declare of a stranger", arrange: allow("^$", ".*", ".*"), prepare: permit("^$", ".*", ".*"),
		script: func(s *script) {
			q := s.queue(s.open(s.dial(), 0), "q", nil)
			conn := s.dialAs(stranger)
			_, err := s.open(conn, 1).QueueDeclarePassive(q, true, false, false, false, nil)
			s.fails("passive", err)
			_, err = s.open(conn, 1).Consume(q, "c", false, false, false, false, nil)
			s.fails("consume", err)
		},
	},
	{
		name: "permissions", arrange: allow("^$", "^$", "^$"), prepare: permit("^$", "^$", "^$"),
		script: func(s *script) {
			q := s.queue(s.open(s.dial(), 0), "q", nil)
			conn := s.dialAs(stranger)
			_, err := s.open(conn, 1).QueueDeclare(s.prefix+"q2", true, false, false, false, nil)
			s.fails("declare", err)
			_, err = s.open(conn, 1).QueueDeclarePassive(q, true, false, false, false, nil)
			s.fails("passive", err)
			_, err = s.open(conn, 1).Consume(q, "c", false, false, false, false, nil)
			s.fails("consume", err)
		},
	},
	{name: "global qos from 4.3", from: 403, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		q, q2 := s.queue(ch, "q", nil), s.queue(ch, "q2", quorum)
		s.publish(conn, "", q, "1", "2", "3", "4", "5")
		s.publish(conn, "", q2, "1", "2", "3")
		s.fails("qos", ch.Qos(2, 0, true))
		for _, tag := range []string{"one", "two"} {
			ds := s.consume(ch, q, tag)
			s.next(tag, ds)
			s.next(tag, ds)
			s.none(tag, ds)
		}
		ds := s.consume(ch, q2, "three")
		s.next("three", ds)
		s.next("three", ds)
		s.none("three", ds)
	}},
	{name: "stream nack from 4.0", from: 400, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "s", amqp.Table{"x-queue-type": "stream"})
		ds := s.consume(ch, q, "c")
		s.publish(conn, "", q, "1", "2", "3", "4")
		s.fails("nack and requeue", s.next("c", ds).Nack(false, true))
		s.fails("reject and requeue", s.next("c", ds).Reject(true))
		s.fails("reject", s.next("c", ds).Reject(false))
		s.next("c", ds)
		s.none("c", ds)
	}},
	{name: "stream offsets", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "s", amqp.Table{"x-queue-type": "stream"})
		s.publish(conn, "", q, "0", "1", "2")
		begin := func(what string, offset any) {
			ch := s.open(conn, 5)
			ds, err := ch.Consume(q, "c", false, false, false, false, amqp.Table{"x-stream-offset": offset})
			s.fails(what, err)
			if err == nil {
				s.next(what, ds)
				s.fails("close", ch.Close())
			}
		}
		begin("int32", int32(1))
		begin("long ago", time.Now().Add(-time.Hour).Truncate(time.Second))
		begin("interval", "1h")
		begin("interval in months", "15M")
		begin("nonsense", "nonsense")
	}},
	{name: "the end of a stream", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "s", amqp.Table{"x-queue-type": "stream"})
		// The last offset and that of the first message published after the consumer of the end came, as far as the broker says
		// before it answers that the consumers are cancelled.
		end := func(what string, ahead any, publish ...string) {
			ch := s.open(conn, 1000)
			from := func(tag string, offset any) <-chan amqp.Delivery {
				ds, err := ch.Consume(q, tag, false, false, false, false, amqp.Table{"x-stream-offset": offset})
				s.fails(what+" "+tag, err)
				return ds
			}
			behind, sample := from("ahead", ahead), from("last", "last")
			s.publish(conn, "", q, publish...)
			time.Sleep(300 * time.Millisecond)
			require.NoError(s.t, ch.Cancel("last", true))
			require.NoError(s.t, ch.Cancel("ahead", false))
			last, first := int64(-1), int64(-1)
			for d := range sample {
				last = max(last, d.Headers["x-stream-offset"].(int64))
			}
			for d := range behind {
				if first < 0 {
					first = d.Headers["x-stream-offset"].(int64)
				}
			}
			s.note("%s: the last offset is %d, the first behind the end %d", what, last, first)
			s.fails("close", ch.Close())
		}
		end("empty", "next")
		end("empty", "next", "0", "1")
		end("next", "next")
		end("a time to come", time.Now().Add(time.Hour).Truncate(time.Second))
		end("next", "next", "2", "3")
		end("a time to come", time.Now().Add(time.Hour).Truncate(time.Second), "4")
		begin := func(what string, offset any, publish ...string) {
			ch := s.open(conn, 1)
			ds, err := ch.Consume(q, "c", false, false, false, false, amqp.Table{"x-stream-offset": offset})
			s.fails(what, err)
			if len(publish) > 0 {
				s.none(what, ds)
				s.publish(conn, "", q, publish...)
			}
			d := s.next(what, ds)
			s.note("offset %v", d.Headers["x-stream-offset"])
			s.fails("close", ch.Close())
		}
		begin("the end", int64(5), "5")
		begin("behind the end", int64(8), "6", "7", "8")
		begin("long ago", time.Now().Add(-time.Hour).Truncate(time.Second))
	}},
	{
		name: "consumer timeout", until: 403, arrange: hurry,
		kit: []steadymqtest.Option{steadymqtest.WithConsumerTimeout(heldFor, steadymqtest.Form406)},
		script: func(s *script) {
			conn := s.dial()
			q := s.queue(s.open(conn, 0), "q", nil)
			s.publish(conn, "", q, "1", "2", "3")
			ch := s.open(conn, 2)
			closed := notifyClose(ch)
			ds := s.consume(ch, q, "c")
			d := s.next("c", ds)
			s.next("c", ds)
			s.closedLate("channel", closed)
			s.fails("late ack", d.Ack(false))
			s.ready(conn, q, 3)
			ds = s.consume(s.open(conn, 3), q, "c2")
			for range 3 {
				s.next("c2", ds)
			}
		},
	},
	{
		name: "consumer timeout quorum", arrange: hurry,
		kit: []steadymqtest.Option{steadymqtest.WithConsumerTimeout(heldFor, steadymqtest.FormOfVersion)},
		script: func(s *script) {
			held(s, quorum, nil)
		},
	},
	{
		name: "no timeout of a classic queue", from: 403, arrange: hurry,
		kit: []steadymqtest.Option{steadymqtest.WithConsumerTimeout(heldFor, steadymqtest.FormOfVersion)},
		script: func(s *script) {
			conn := s.dial()
			ch := s.open(conn, 2)
			q := s.queue(ch, "q", nil)
			s.publish(conn, "", q, "1")
			d := s.next("c", s.consume(ch, q, "c"))
			closed := notifyClose(ch)
			s.closedLate("channel", closed)
			s.fails("ack", d.Ack(false))
			s.ready(conn, q, 0)
		},
	},
	{name: "consumer timeout of a queue", from: 312, arrange: patient, script: func(s *script) {
		held(s, amqp.Table{"x-queue-type": "quorum", "x-consumer-timeout": int32(heldFor.Milliseconds())}, nil)
	}},
	{name: "consumer timeout of a consumer", from: 312, arrange: patient, script: func(s *script) {
		held(s, quorum, amqp.Table{"x-consumer-timeout": int32(heldFor.Milliseconds())})
	}},
	{name: "consumer timeout of both", from: 312, arrange: patient, script: func(s *script) {
		held(s, amqp.Table{"x-queue-type": "quorum", "x-consumer-timeout": int32(heldFor.Milliseconds())}, amqp.Table{"x-consumer-timeout": int32(60_000)})
	}},
	{name: "only what is overdue", from: 403, arrange: patient, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 2)
		q := s.queue(ch, "q", quorum)
		cancelled := ch.NotifyCancel(make(chan string, 1))
		ds, err := ch.Consume(q, "c", false, false, false, false, amqp.Table{"x-consumer-timeout": int32(heldFor.Milliseconds())})
		s.fails("consume", err)
		s.publish(conn, "", q, "1")
		s.next("c", ds)
		time.Sleep(heldFor / 2)
		s.publish(conn, "", q, "2")
		d := s.next("c", ds)
		s.note("cancelled %s", <-cancelled)
		s.fails("ack of the other", d.Ack(false))
		one := s.consume(s.open(conn, 10), q, "c2")
		s.next("c2", one)
		s.none("c2", one)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		go ch.Consume(q, "c", false, false, false, false, nil)
		s.closed("the same tag again", closed)
	}},
	{
		name: "late ack revives", from: 403, arrange: patient,
		differs: difference{why: "a timed-out consumer is back, behind the client's back, once its overdue deliveries are settled; in the kit it is gone"},
		script: func(s *script) {
			conn := s.dial()
			ch := s.open(conn, 1)
			q := s.queue(ch, "q", quorum)
			cancelled := ch.NotifyCancel(make(chan string, 1))
			ds, err := ch.Consume(q, "c", false, false, false, false, amqp.Table{"x-consumer-timeout": int32(heldFor.Milliseconds())})
			s.fails("consume", err)
			s.publish(conn, "", q, "1")
			d := s.next("c", ds)
			s.note("cancelled %s", <-cancelled)
			s.ready(conn, q, 1)
			s.fails("late ack", d.Ack(false))
			s.ready(conn, q, 0) // not acked: delivered again, to a consumer that the client has forgotten
			s.fails("close", ch.Close())
			s.ready(conn, q, 1)
			s.next("c2", s.consume(s.open(conn, 1), q, "c2"))
		},
	},
	{name: "cancel after the timeout", from: 403, arrange: patient, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", quorum)
		cancelled := ch.NotifyCancel(make(chan string, 1))
		ds, err := ch.Consume(q, "c", false, false, false, false, amqp.Table{"x-consumer-timeout": int32(heldFor.Milliseconds())})
		s.fails("consume", err)
		s.publish(conn, "", q, "1")
		d := s.next("c", ds)
		s.note("cancelled %s", <-cancelled)
		s.fails("cancel too", ch.Cancel("c", false))
		s.fails("late ack", d.Ack(false))
		s.ready(conn, q, 1)
		_, err = ch.Consume(q, "c", false, false, false, false, nil)
		s.fails("the same tag again", err)
	}},
	{name: "queue expiry", differs: difference{why: "the kit keeps x-expires and does not act on it"}, script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "q", amqp.Table{"x-expires": int32(200)})
		time.Sleep(2 * time.Second)
		s.ready(conn, q, 0)
	}},
	{name: "exchange auto-delete", differs: difference{why: "the kit keeps the flag and does not act on it"}, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		x, q := s.prefix+"x", s.queue(ch, "q", nil)
		s.fails("declare", ch.ExchangeDeclare(x, "direct", true, true, false, false, nil))
		s.fails("bind", ch.QueueBind(q, "k", x, false, nil))
		s.fails("unbind", ch.QueueUnbind(q, "k", x, nil))
		time.Sleep(200 * time.Millisecond)
		s.fails("passive", ch.ExchangeDeclarePassive(x, "direct", true, true, false, false, nil))
	}},
	{name: "message priorities", differs: difference{why: "the kit has one order for all priorities"}, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 5)
		q := s.queue(ch, "q", amqp.Table{"x-max-priority": int32(5)})
		for i, body := range []string{"low", "high"} {
			require.NoError(s.t, ch.PublishWithContext(s.t.Context(), "", q, false, false, amqp.Publishing{Priority: uint8(1 + i), Body: []byte(body)}))
		}
		s.ready(conn, q, 2)
		ds := s.consume(ch, q, "c")
		s.next("c", ds)
		s.next("c", ds)
	}},
	{name: "transactions", differs: difference{why: "the kit begins them and says 540 to a commit"}, script: func(s *script) {
		ch := s.open(s.dial(), 0)
		s.fails("select", ch.Tx())
		s.fails("commit", ch.TxCommit())
	}},
	{name: "acks without a commit", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", nil)
		s.publish(conn, "", q, "1", "2")
		s.fails("select", ch.Tx())
		ds := s.consume(ch, q, "c")
		d := s.next("c", ds)
		s.fails("ack", d.Ack(false))
		s.none("c", ds)
		s.fails("close", ch.Close())
		s.next("d", s.consume(s.open(conn, 1), q, "d"))
	}},
}

// held waits with a delivery for the consumer timeout and shows what becomes of it.
func held(s *script, queueArgs, consumerArgs amqp.Table) {
	conn := s.dial()
	q := s.queue(s.open(conn, 0), "q", queueArgs)
	s.publish(conn, "", q, "1", "2")
	ch := s.open(conn, 2)
	closed, cancelled := notifyClose(ch), ch.NotifyCancel(make(chan string, 1))
	ds, err := ch.Consume(q, "c", false, false, false, false, consumerArgs)
	s.fails("consume", err)
	d := s.next("c", ds)
	s.next("c", ds)
	select {
	case e := <-closed:
		s.fails("channel", e)
	case tag, ok := <-cancelled:
		if !ok { // the channel was closed, and the driver says this first
			s.closedLate("channel", closed)
			break
		}
		s.note("cancelled %q", tag)
	case <-time.After(4 * heldFor):
		s.note("nothing came of it")
	}
	s.fails("late ack", d.Ack(false))
	ds = s.consume(s.open(conn, 3), q, "c2")
	s.next("c2", ds).Ack(false)
	s.next("c2", ds).Ack(false)
	s.none("c2", ds)
}

// closedLate is closed for an end that takes the consumer timeout.
func (s *script) closedLate(what string, c chan *amqp.Error) {
	select {
	case e := <-c:
		s.fails(what, e)
	case <-time.After(3 * heldFor):
		s.note("%s: not closed", what)
	}
}

// dialAs is dial for another user, who is his own password.
func (s *script) dialAs(user string) *amqp.Connection {
	u, err := url.Parse(s.url)
	require.NoError(s.t, err)
	u.User = url.UserPassword(user, user)
	conn, err := amqp.DialConfig(u.String(), amqp.Config{Dial: s.net})
	require.NoError(s.t, err)
	s.conns = append(s.conns, conn)
	return conn
}
