package steadymqtest_test

import (
	"context"
	"errors"
	"iter"
	"slices"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/steadymqtest"
)

// patience is how long a queue that dead-letters at least once waits in the scripts before it tries again.
const patience = 2 * time.Second

// persist makes the brokers try again that soon.
func persist(ctx context.Context, b *rabbit.Broker) error {
	return b.Do(ctx, "application:set_env(rabbit, dead_letter_worker_publisher_confirm_timeout, %d)", patience.Milliseconds())
}

// deadLetters is what becomes of messages on their way to a dead-letter exchange.
var deadLetters = []scenario{
	{name: "delay queue", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind})
			args := amqp.Table{
				"x-queue-type": "quorum", "x-message-ttl": int32(300), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": q,
				"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish",
			}
			if kind == "classic" {
				args = amqp.Table{"x-message-ttl": int32(300), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": q}
			}
			later := s.queue(ch, kind+"-later", args)
			p := s.publisher(conn)
			p.send("", q, amqp.Publishing{Body: []byte(kind), MessageId: "id", DeliveryMode: 2})
			ds := s.consume(s.open(conn, 1), q, "c")
			for range 3 {
				d := s.counted(ds)
				deaths(s, d)
				start := time.Now()
				p.send("", later, amqp.Publishing{Body: d.Body, MessageId: d.MessageId, DeliveryMode: 2, Headers: d.Headers})
				s.fails("ack", d.Ack(false))
				s.counted(ds).Reject(true)
				s.note("%s", waited(start, 0, 300))
			}
		}
	}},
	{
		name: "at least once without a target", arrange: persist, kit: []steadymqtest.Option{steadymqtest.WithDeadLetterRetry(patience)},
		script: func(s *script) {
			conn := s.dial()
			ch := s.open(conn, 0)
			q := s.queue(ch, "q", amqp.Table{
				"x-queue-type": "quorum", "x-message-ttl": int32(200), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": s.prefix + "dead",
				"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish",
			})
			start := time.Now()
			s.publish(conn, "", q, "1")
			time.Sleep(700 * time.Millisecond)
			s.ready(conn, q, 0)
			dead := s.queue(ch, "dead", nil)
			s.publish(conn, "", q, "2")
			ds := s.consume(s.open(conn, 10), dead, "d")
			d := s.next("dead", ds)
			s.note("%s", waited(start, 0, 2000))
			deaths(s, d)
			s.next("dead", ds)
			s.note("%s", waited(start, 0, 2000))
		},
	},
	{
		name: "at least once to a full target", arrange: persist, kit: []steadymqtest.Option{steadymqtest.WithDeadLetterRetry(patience)},
		script: func(s *script) {
			conn := s.dial()
			ch := s.open(conn, 0)
			dead := s.queue(ch, "dead", amqp.Table{"x-max-length": int32(1), "x-overflow": "reject-publish"})
			q := s.queue(ch, "q", amqp.Table{
				"x-queue-type": "quorum", "x-message-ttl": int32(200), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead,
				"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish", "x-max-length": int32(1),
			})
			s.publish(conn, "", dead, "in the way")
			p := s.publisher(conn)
			start := time.Now()
			p.send("", q, amqp.Publishing{Body: []byte("1")})
			p.send("", q, amqp.Publishing{Body: []byte("2")})
			time.Sleep(500 * time.Millisecond)
			s.ready(conn, q, 0)
			p.send("", q, amqp.Publishing{Body: []byte("3")}) // what is dead counts towards the length
			s.ready(conn, dead, 1)
			n, err := ch.QueuePurge(dead, false)
			s.fails("purge", err)
			s.note("%d", n)
			ds := s.consume(s.open(conn, 10), dead, "d")
			s.next("dead", ds).Ack(false)
			s.next("dead", ds).Ack(false)
			s.note("%s", waited(start, 0, 2000))
			time.Sleep(200 * time.Millisecond)
			p.send("", q, amqp.Publishing{Body: []byte("4")})
			s.next("dead", ds).Ack(false)
		},
	},
	{
		name: "at least once to a full quorum queue", arrange: persist, kit: []steadymqtest.Option{steadymqtest.WithDeadLetterRetry(patience)},
		script: func(s *script) {
			conn := s.dial()
			ch := s.open(conn, 0)
			dead := s.queue(ch, "dead", amqp.Table{"x-queue-type": "quorum", "x-max-length": int32(1), "x-overflow": "reject-publish"})
			q := s.queue(ch, "q", amqp.Table{
				"x-queue-type": "quorum", "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead,
				"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish",
			})
			s.publish(conn, "", q, "1", "2", "3", "4")
			ds := s.consume(s.open(conn, 10), q, "c")
			for range 4 {
				s.next("c", ds).Reject(false)
				time.Sleep(50 * time.Millisecond)
			}
			time.Sleep(300 * time.Millisecond)
			s.ready(conn, dead, 2)
			to := s.consume(s.open(conn, 10), dead, "d")
			for range 4 {
				s.next("dead", to).Ack(false)
			}
		},
	},
	{
		name: "at least once and a purge", arrange: persist, kit: []steadymqtest.Option{steadymqtest.WithDeadLetterRetry(patience)},
		script: func(s *script) {
			conn := s.dial()
			ch := s.open(conn, 0)
			q := s.queue(ch, "q", amqp.Table{
				"x-queue-type": "quorum", "x-message-ttl": int32(100), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": s.prefix + "dead",
				"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish",
			})
			s.publish(conn, "", q, "1", "2")
			time.Sleep(500 * time.Millisecond)
			n, err := ch.QueuePurge(q, false)
			s.fails("purge", err)
			s.note("%d", n)
			s.publish(conn, "", q, "3")
			ds := s.consume(s.open(conn, 10), s.queue(ch, "dead", nil), "d")
			var came []string
			for d := range arriving(ds, patience+time.Second) {
				came = append(came, string(d.Body))
			}
			slices.Sort(came)
			s.note("%q", came)
		},
	},
	{name: "conditions of a deletion", script: func(s *script) {
		for _, kind := range kinds {
			for _, flags := range [][2]bool{{true, false}, {false, true}, {true, true}} {
				conn := s.dial()
				q := s.queue(s.open(conn, 0), kind, amqp.Table{"x-queue-type": kind})
				_, err := s.open(conn, 0).QueueDelete(q, flags[0], flags[1], false)
				s.fails(kind, err)
				s.note("closed %t", conn.IsClosed())
			}
		}
	}},
	{name: "dead letters to nowhere", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": s.prefix + "x", "x-dead-letter-routing-key": "k"})
			s.publish(conn, "", q, "1")
			s.next("c", s.consume(s.open(conn, 1), q, "c")).Reject(false)
			time.Sleep(200 * time.Millisecond)
			s.ready(conn, q, 0)
		}
	}},
	{name: "repeated deaths", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		x := s.prefix + "x"
		require.NoError(s.t, ch.ExchangeDeclare(x, "fanout", true, false, false, false, nil))
		for _, kind := range kinds {
			name := s.prefix + kind
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": name + "-later"})
			s.queue(ch, kind+"-later", amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": q, "x-message-ttl": int32(1200)})
			require.NoError(s.t, ch.QueueBind(q, "", x, false, nil))
			p := s.publisher(conn)
			p.send(x, "first", amqp.Publishing{Expiration: "600000", Headers: amqp.Table{"CC": []any{"copy"}, "n": int32(1)}})
			require.NoError(s.t, ch.QueueUnbind(q, "", x, nil))
			ds := s.consume(s.open(conn, 1), q, "c")
			var first int64
			for i := range 3 {
				d := s.next("c", ds)
				deaths(s, d)
				s.note("expiration %q CC %v n %v", d.Expiration, d.Headers["CC"], d.Headers["n"])
				list, _ := d.Headers["x-death"].([]any)
				for _, v := range list {
					death := v.(amqp.Table)
					s.note("original %v", death["original-expiration"])
					if death["reason"] == "rejected" && i == 1 {
						first = death["time"].(time.Time).Unix()
					} else if death["reason"] == "rejected" {
						s.note("of the first time %t", first == death["time"].(time.Time).Unix())
					}
				}
				d.Reject(false)
			}
		}
	}},
	{name: "deaths published again", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		dead := s.queue(ch, "dead", nil)
		to := s.consume(s.open(conn, 1), dead, "d")
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
			for _, reason := range []string{"rejected", "expired"} {
				death := amqp.Table{"queue": q, "reason": reason, "count": int64(3), "exchange": "", "routing-keys": []any{q}, "time": time.Unix(1, 0)}
				s.publisher(conn).send("", q, amqp.Publishing{DeliveryMode: 2, Body: []byte(kind), Headers: amqp.Table{
					"x-death": []any{death}, "x-first-death-queue": "f", "x-first-death-reason": reason, "x-first-death-exchange": "e",
					"x-last-death-queue": "l", "x-last-death-reason": reason, "x-last-death-exchange": "m",
				}})
				one := s.open(conn, 1)
				s.counted(s.consume(one, q, "c")).Reject(false)
				d := s.counted(to)
				deaths(s, d)
				d.Ack(false)
				s.fails("close", one.Close())
			}
		}
	}},
	{name: "a cycle of deaths published again", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind})
			later := s.queue(ch, kind+"-later", amqp.Table{"x-queue-type": kind, "x-message-ttl": int32(100), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": q})
			ds := s.consume(s.open(conn, 1), q, "c")
			s.publish(conn, "", later, "m")
			for range 2 { // to the delay queue and back, with the headers as they came
				d := s.counted(ds)
				s.publisher(conn).send("", later, amqp.Publishing{Body: d.Body, Headers: d.Headers})
				s.fails("ack", d.Ack(false))
			}
			s.counted(ds)
		}
	}},
}

// arriving are the deliveries that come in that time.
func arriving(ds <-chan amqp.Delivery, d time.Duration) iter.Seq[amqp.Delivery] {
	return func(yield func(amqp.Delivery) bool) {
		end := time.After(d)
		for {
			select {
			case d := <-ds:
				if !yield(d) {
					return
				}
			case <-end:
				return
			}
		}
	}
}

// publishing is what a broker answers to those who publish.
var publishing = []scenario{
	{name: "confirms and returns", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		q := s.queue(ch, "q", nil)
		p := s.publisher(conn)
		p.send("", q, amqp.Publishing{})
		p.send("", s.prefix+"absent", amqp.Publishing{})
		p.send("amq.fanout", s.prefix+"absent", amqp.Publishing{Headers: amqp.Table{"CC": []any{q}}})
		p.send("amq.direct", "k", amqp.Publishing{Headers: amqp.Table{"CC": []any{q}}})
		p.send("", "k", amqp.Publishing{Headers: amqp.Table{"CC": []any{q}}})
		p.send("", "k", amqp.Publishing{Headers: amqp.Table{"BCC": []any{q}}})
		s.fails("select again", p.ch.Confirm(false))
		p.send("", q, amqp.Publishing{})
		s.ready(conn, q, 4)
	}},
	{name: "copies", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		dead := s.queue(ch, "dead", nil)
		x := s.prefix + "x"
		require.NoError(s.t, ch.ExchangeDeclare(x, "fanout", true, false, false, false, nil))
		require.NoError(s.t, ch.QueueBind(dead, "", x, false, nil))
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": x})
			q2 := s.queue(ch, kind+"-later", amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": x, "x-dead-letter-routing-key": "k"})
			s.publisher(conn).send("", q, amqp.Publishing{Body: []byte(kind), Headers: amqp.Table{"CC": []any{q2, "c"}, "BCC": []any{"b", q2}, "n": int32(1)}})
			for _, from := range []string{q, q2} {
				d := s.next(from, s.consume(s.open(conn, 1), from, "c"))
				s.note("%v exchange %q key %q", d.Headers, d.Exchange, d.RoutingKey)
				d.Reject(false)
				s.ready(conn, dead, 1)
				to := s.open(conn, 1)
				d = s.next("dead", s.consume(to, dead, "d"))
				deaths(s, d)
				s.note("CC %v BCC %v", d.Headers["CC"], d.Headers["BCC"])
				d.Ack(false)
				s.fails("close", to.Close())
			}
		}
	}},
	{name: "copies of dead letters", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		dead := s.queue(ch, "dead", nil)
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": "amq.direct"})
			for _, key := range []string{q, "copy", "blind"} {
				require.NoError(s.t, ch.QueueBind(dead, key, "amq.direct", false, nil))
				s.publisher(conn).send("", q, amqp.Publishing{Body: []byte(key), Headers: amqp.Table{"CC": []any{"copy"}, "BCC": []any{"blind"}}})
				one := s.open(conn, 1)
				s.next("c", s.consume(one, q, "c")).Reject(false)
				time.Sleep(100 * time.Millisecond)
				s.ready(conn, dead, 1)
				d, _, err := ch.Get(dead, true)
				s.fails("get", err)
				s.note("%v key %q", d.Headers["CC"], d.RoutingKey)
				require.NoError(s.t, ch.QueueUnbind(dead, key, "amq.direct", nil))
				s.fails("close", one.Close())
			}
		}
	}},
	{name: "messages refused", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		q := s.queue(ch, "q", nil)
		x := s.prefix + "x"
		require.NoError(s.t, ch.ExchangeDeclare(x, "fanout", true, false, true, false, nil))
		for _, p := range []amqp.Publishing{
			{UserId: "other"},
			{Expiration: "soon"},
			{Expiration: "-1"},
			{Expiration: "1.5"},
			{Expiration: "10s"},
			{Expiration: "99999999999999"},
			{Expiration: "4294967295"},
			{Expiration: "4294967296"},
			{Expiration: " 1"},
			{Expiration: "+1"},
			{Headers: amqp.Table{"CC": q}},
			{Headers: amqp.Table{"BCC": int32(1)}},
			{Headers: amqp.Table{"CC": []any{int32(1)}}},
			{Headers: amqp.Table{"CC": nil}},
			{UserId: "other", Expiration: "soon", Headers: amqp.Table{"CC": q}},
			{UserId: "other", Headers: amqp.Table{"CC": q}},
		} {
			s.publisher(conn).send("", q, p)
			s.publisher(conn).send(s.prefix+"nox", q, p)
		}
		s.publisher(conn).send(x, "", amqp.Publishing{})
		s.ready(conn, q, 4)
	}},
	{name: "message too big", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "q", nil)
		s.publisher(conn).send("", q, amqp.Publishing{Body: make([]byte, 16<<20)})
		s.publisher(conn).send("", q, amqp.Publishing{Body: make([]byte, 16<<20+1)})
	}},
	{name: "headers that fill a frame", script: func(s *script) {
		for _, size := range []int{frameMax - 100, frameMax, 2 * frameMax} {
			conn := s.dial()
			closed := conn.NotifyClose(make(chan *amqp.Error, 1))
			q := s.queue(s.open(conn, 0), "q", nil)
			p := s.publisher(conn)
			c := p.start("", q, amqp.Publishing{Headers: amqp.Table{"h": strings.Repeat("x", size)}})
			if size < frameMax {
				p.outcome(c)
				continue
			}
			s.closed("connection", closed)
		}
	}},
	{name: "immediate", script: func(s *script) {
		conn := s.dial()
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		q := s.queue(s.open(conn, 0), "q", nil)
		s.fails("publish", s.open(conn, 0).PublishWithContext(s.t.Context(), "", q, true, true, amqp.Publishing{Body: []byte("x")}))
		s.closed("connection", closed)
	}},
	{
		name: "write permission", arrange: allow(`^kit-[0-9-]+q$`, `^(kit-[0-9-]+x|amq\.fanout)$`, ".*"), prepare: permit(`^kit-[0-9-]+q$`, `^(kit-[0-9-]+x|amq\.fanout)$`, ".*"),
		script: func(s *script) {
			own := s.open(s.dial(), 0)
			require.NoError(s.t, own.ExchangeDeclare(s.prefix+"x", "fanout", true, false, false, false, nil))
			s.queue(own, "q2", nil)
			conn := s.dialAs(stranger)
			s.publisher(conn).send("", s.prefix+"q", amqp.Publishing{})
			s.publisher(conn).send("amq.fanout", "", amqp.Publishing{})
			s.publisher(conn).send("amq.direct", "", amqp.Publishing{})
			s.publisher(conn).send(s.prefix+"nox", "", amqp.Publishing{})
			s.publisher(conn).send("", s.prefix+"q", amqp.Publishing{UserId: "other"})
			declare := func(what, name string, args amqp.Table) {
				_, err := s.open(conn, 0).QueueDeclare(s.prefix+name, true, false, false, false, args)
				s.fails(what, err)
			}
			declare("mine", "q", nil)
			declare("there and not mine", "q2", nil)
			_, err := own.QueueDelete(s.prefix+"q", false, false, false)
			require.NoError(s.t, err)
			declare("dead letters by the default exchange", "q", amqp.Table{"x-dead-letter-exchange": ""})
			declare("dead letters by a forbidden exchange", "q", amqp.Table{"x-dead-letter-exchange": "amq.topic"})
			declare("dead letters", "q", amqp.Table{"x-dead-letter-exchange": s.prefix + "x"})
			s.fails("bind", s.open(conn, 0).QueueBind(s.prefix+"q", "", s.prefix+"x", false, nil))
			s.fails("exchange", s.open(conn, 0).ExchangeDeclare(s.prefix+"y", "fanout", true, false, false, false, nil))
			s.fails("exchange deletion", s.open(conn, 0).ExchangeDelete(s.prefix+"x", false, false))
			s.fails("exchange binding", s.open(conn, 0).ExchangeBind("amq.topic", "", s.prefix+"x", false, nil))
			_, err = s.open(conn, 0).QueueDelete(s.prefix+"q2", false, false, false)
			s.fails("delete", err)
			_, err = s.open(conn, 0).QueuePurge(s.prefix+"q2", false)
			s.fails("purge", err)
		},
	},
	{
		name: "read permission", arrange: allow("^$", ".*", "^$"), prepare: permit("^$", ".*", "^$"),
		script: func(s *script) {
			q := s.queue(s.open(s.dial(), 0), "q", nil)
			conn := s.dialAs(stranger)
			_, err := s.open(conn, 1).Consume(q, "c", false, false, false, false, nil)
			s.fails("consume", err)
			_, _, err = s.open(conn, 1).Get(q, true)
			s.fails("get", err)
			_, err = s.open(conn, 1).QueuePurge(q, false)
			s.fails("purge", err)
			_, err = s.open(conn, 1).QueueDeclarePassive(q, true, false, false, false, nil)
			s.fails("passive", err)
			_, err = s.open(conn, 1).QueueDeclarePassive(s.prefix+"absent", true, false, false, false, nil)
			s.fails("passive absent", err)
			s.fails("bind", s.open(conn, 0).QueueBind(q, "", "amq.fanout", false, nil))
			s.publisher(conn).send("", q, amqp.Publishing{})
			s.publisher(conn).send("", q, amqp.Publishing{UserId: stranger})
		},
	},
	{name: "memory alarm", arrange: patient, script: func(s *script) {
		conn, idle := s.dial(), s.dial()
		q := s.queue(s.open(conn, 0), "q", nil)
		ds := s.consume(s.open(idle, 10), q, "c")
		p := s.publisher(conn)
		p.send("", q, amqp.Publishing{Body: []byte("before")})
		s.next("c", ds).Ack(false)
		blocked := conn.NotifyBlocked(make(chan amqp.Blocking, 10))
		require.NoError(s.t, s.alarm(true))
		time.Sleep(300 * time.Millisecond)
		s.note("%d told", len(blocked))
		s.fails("qos", p.ch.Qos(1, 0, false))
		first := p.start("", q, amqp.Publishing{Body: []byte("first")})
		select {
		case b := <-blocked:
			s.note("blocked %t %q", b.Active, b.Reason)
		case <-time.After(5 * time.Second):
			s.note("not blocked")
		}
		second := p.start("", q, amqp.Publishing{Body: []byte("second")})
		s.none("c", ds)
		another := s.dial()
		s.fails("another that does not publish", s.open(another, 1).Qos(1, 0, false))
		select {
		case <-first.Done():
			s.note("the first is confirmed")
		case <-time.After(300 * time.Millisecond):
			s.note("the first is not confirmed")
		}
		require.NoError(s.t, s.alarm(false))
		select {
		case b := <-blocked:
			s.note("blocked %t %q", b.Active, b.Reason)
		case <-time.After(5 * time.Second):
			s.note("still blocked")
		}
		p.outcome(first)
		p.outcome(second)
		s.next("c", ds)
		s.next("c", ds)
	}},
	{name: "memory alarm and an empty body", arrange: patient, script: func(s *script) {
		conn, idle := s.dial(), s.dial()
		q := s.queue(s.open(conn, 0), "q", nil)
		ds := s.consume(s.open(idle, 10), q, "c")
		require.NoError(s.t, s.alarm(true))
		time.Sleep(300 * time.Millisecond)
		p := s.publisher(conn)
		first := p.start("", q, amqp.Publishing{})
		s.next("c", ds).Ack(false)
		p.outcome(first)
		second := p.start("", q, amqp.Publishing{})
		s.none("c", ds)
		require.NoError(s.t, s.alarm(false))
		p.outcome(second)
		s.next("c", ds)
	}},
	{name: "memory alarm and heartbeats", arrange: patient, script: func(s *script) {
		conn, err := amqp.DialConfig(s.url, amqp.Config{Heartbeat: time.Second, Dial: s.net})
		require.NoError(s.t, err)
		s.conns = append(s.conns, conn)
		q := s.queue(s.open(conn, 0), "q", nil)
		require.NoError(s.t, s.alarm(true))
		time.Sleep(300 * time.Millisecond)
		p := s.publisher(conn)
		first := p.start("", q, amqp.Publishing{Body: []byte("first")})
		time.Sleep(6 * time.Second) // the driver would miss the broker's heartbeats, the broker the driver's
		s.note("closed %t", conn.IsClosed())
		require.NoError(s.t, s.alarm(false))
		p.outcome(first)
	}},
}

// frameMax is what RabbitMQ suggests.
const frameMax = 128 << 10

// producer publishes mandatory messages on a channel with confirms.
type producer struct {
	s       *script
	ch      *amqp.Channel
	returns chan amqp.Return
	closed  chan *amqp.Error
}

func (s *script) publisher(conn *amqp.Connection) *producer {
	ch := s.open(conn, 0)
	require.NoError(s.t, ch.Confirm(false))
	return &producer{s: s, ch: ch, returns: ch.NotifyReturn(make(chan amqp.Return, 10)), closed: notifyClose(ch)}
}

// send publishes and writes down what became of it.
func (p *producer) send(exchange, key string, m amqp.Publishing) {
	if c := p.start(exchange, key, m); c != nil {
		p.outcome(c)
	}
	time.Sleep(20 * time.Millisecond) // a quorum queue tells its publishers that it is full, a moment after
}

func (p *producer) start(exchange, key string, m amqp.Publishing) *amqp.DeferredConfirmation {
	c, err := p.ch.PublishWithDeferredConfirmWithContext(p.s.t.Context(), exchange, key, true, false, m)
	if err != nil && !errors.Is(err, amqp.ErrClosed) {
		p.s.fails("publish", err)
	}
	return c
}

func (p *producer) outcome(c *amqp.DeferredConfirmation) {
	select {
	case <-c.Done():
	case e := <-p.closed:
		p.s.fails("publish", e)
		return
	case <-time.After(10 * time.Second):
		p.s.note("publish: no confirm in 10 s")
		return
	}
	select {
	case e := <-p.closed:
		p.s.fails("publish", e)
		return
	case <-time.After(time.Millisecond): // the driver ends the wait for confirms before it tells of the close
	}
	select {
	case r := <-p.returns:
		p.s.note("publish: returned %d %s %q %q, then ack %t", r.ReplyCode, r.ReplyText, r.Exchange, r.RoutingKey, c.Acked())
	default:
		p.s.note("publish: ack %t", c.Acked())
	}
}
