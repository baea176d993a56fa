package steadymqtest_test

import (
	"errors"
	"maps"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"
)

// limits is what queues are declared with, and what becomes of what is too much or too late.
var limits = []scenario{
	{name: "inequivalent arguments", script: func(s *script) {
		conn := s.dial()
		for _, kind := range kinds {
			base := amqp.Table{
				"x-queue-type": kind, "x-message-ttl": int32(1000), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "a",
				"x-overflow": "reject-publish", "x-max-length": int32(10), "x-expires": int32(600_000), "x-single-active-consumer": true,
			}
			if kind == "quorum" {
				base["x-dead-letter-strategy"], base["x-delivery-limit"] = "at-least-once", int32(5)
			}
			q := s.queue(s.open(conn, 0), kind, base)
			again := func(what string, change amqp.Table, without ...string) {
				args := maps.Clone(base)
				maps.Copy(args, change)
				for _, key := range without {
					delete(args, key)
				}
				_, err := s.open(conn, 0).QueueDeclare(q, true, false, false, false, args)
				s.fails(kind+" "+what, err)
			}
			again("the same", nil)
			again("as int64", amqp.Table{"x-message-ttl": int64(1000)})
			again("another ttl", amqp.Table{"x-message-ttl": int32(2000)})
			again("another ttl as int64", amqp.Table{"x-message-ttl": int64(2000)})
			again("another key", amqp.Table{"x-dead-letter-routing-key": "b"})
			again("no expiry", nil, "x-expires")
			again("no overflow", nil, "x-overflow")
			again("another strategy", amqp.Table{"x-dead-letter-strategy": "at-most-once"})
			again("another limit", amqp.Table{"x-delivery-limit": int32(6)})
			again("ttl and key", amqp.Table{"x-message-ttl": int32(2000), "x-dead-letter-routing-key": "b"})
			again("ttl and length", amqp.Table{"x-message-ttl": int32(2000), "x-max-length": int32(11)})
			again("length and overflow", amqp.Table{"x-overflow": "drop-head", "x-max-length": int32(11)})
			again("overflow and consumer", amqp.Table{"x-overflow": "drop-head", "x-single-active-consumer": false})
			again("consumer and ttl", amqp.Table{"x-message-ttl": int32(2000), "x-single-active-consumer": false})
			again("not single", amqp.Table{"x-single-active-consumer": false})
			_, err := s.open(conn, 0).QueueDeclare(q, true, false, false, false, nil)
			s.fails(kind+" without any", err)
			_, err = s.open(conn, 0).QueueDeclare(q, true, true, false, false, nil)
			s.fails(kind+" without any and auto-delete", err)
			_, err = s.open(conn, 0).QueueDeclare(q, false, false, false, false, nil)
			s.fails(kind+" without any and not durable", err)
			other := map[string]string{"quorum": "classic", "classic": "quorum"}[kind]
			again("of another kind", amqp.Table{"x-queue-type": other})
			again("of another kind and ttl", amqp.Table{"x-queue-type": other, "x-message-ttl": int32(2000)})
			again("of another kind and consumer", amqp.Table{"x-queue-type": other, "x-single-active-consumer": false})
		}
	}},
	{name: "invalid arguments", script: func(s *script) {
		conn := s.dial()
		for _, c := range []struct {
			what string
			args amqp.Table
		}{
			{"ttl negative", amqp.Table{"x-message-ttl": int32(-1)}},
			{"ttl text", amqp.Table{"x-message-ttl": "1000"}},
			{"ttl too big", amqp.Table{"x-message-ttl": int64(1) << 40}},
			{"ttl zero", amqp.Table{"x-message-ttl": int32(0)}},
			{"expires zero", amqp.Table{"x-expires": int32(0)}},
			{"length negative", amqp.Table{"x-max-length": int32(-1)}},
			{"length text", amqp.Table{"x-max-length": "1"}},
			{"key without exchange", amqp.Table{"x-dead-letter-routing-key": "a"}},
			{"exchange no text", amqp.Table{"x-dead-letter-exchange": int32(1)}},
			{"key no text", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": int32(1)}},
			{"unknown overflow", amqp.Table{"x-overflow": "other"}},
			{"overflow no text", amqp.Table{"x-overflow": int32(1)}},
			{"overflow dead-letters", amqp.Table{"x-overflow": "reject-publish-dlx"}},
			{"unknown strategy", amqp.Table{"x-dead-letter-strategy": "other"}},
			{"strategy", amqp.Table{"x-dead-letter-strategy": "at-least-once"}},
			{"consumer no bool", amqp.Table{"x-single-active-consumer": "true"}},
			{"delivery limit", amqp.Table{"x-delivery-limit": int32(3)}},
			{"delivery limit text", amqp.Table{"x-delivery-limit": "3"}},
			{"priorities", amqp.Table{"x-max-priority": int32(3)}},
			{"unknown argument", amqp.Table{"x-unknown": "1"}},
			{"kind no text", amqp.Table{"x-queue-type": int32(1)}},
			{"retry min", amqp.Table{"x-delayed-retry-min": int32(1)}},
			{"retry min text", amqp.Table{"x-delayed-retry-min": "1"}},
			{"retry without min", amqp.Table{"x-delayed-retry-type": "failed"}},
			{"retry of an unknown type", amqp.Table{"x-delayed-retry-type": "other"}},
		} {
			for _, kind := range kinds {
				args := amqp.Table{"x-queue-type": kind}
				maps.Copy(args, c.args)
				ch := s.open(conn, 0)
				_, err := ch.QueueDeclare(s.prefix+"bad", true, false, false, false, args)
				s.fails(kind+" "+c.what, err)
				if err == nil {
					_, err = ch.QueueDelete(s.prefix+"bad", false, false, false)
					require.NoError(s.t, err)
				}
			}
		}
	}},
	{name: "length limit rejects quorum", script: func(s *script) {
		conn := s.dial()
		q := s.queue(s.open(conn, 0), "q", amqp.Table{"x-queue-type": "quorum", "x-max-length": int32(10), "x-overflow": "reject-publish"})
		p := s.publisher(conn)
		for range 13 {
			p.send("", q, amqp.Publishing{})
		}
		ch := s.open(conn, 0)
		take := func(n int) {
			for range n {
				_, ok, err := ch.Get(q, true)
				require.NoError(s.t, err)
				require.True(s.t, ok)
			}
			time.Sleep(200 * time.Millisecond)
		}
		take(2)
		s.ready(conn, q, 9)
		p.send("", q, amqp.Publishing{})
		s.publisher(conn).send("", q, amqp.Publishing{})
		s.ready(conn, q, 10)
		take(2)
		p.send("", q, amqp.Publishing{})
		s.ready(conn, q, 9)
	}},
	{name: "length limit drops the head", differs: returnedLater, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		dead := s.queue(ch, "dead", nil)
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-max-length": int32(2), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
			s.publish(conn, "", q, "1", "2", "3")
			one := s.open(conn, 2)
			ds := s.consume(one, q, "c")
			first, second := s.next("c", ds), s.next("c", ds)
			s.publish(conn, "", q, "4", "5", "6")
			s.fails("cancel", one.Cancel("c", false))
			s.fails("requeue", errors.Join(first.Reject(true), second.Reject(true)))
			time.Sleep(200 * time.Millisecond)
			s.ready(conn, q, 2)
			to := s.open(conn, 10)
			gone := s.consume(to, dead, "d")
			for range 4 {
				s.next("dead", gone).Ack(false)
			}
			s.fails("close", to.Close())
			ds = s.consume(s.open(conn, 10), q, "c2")
			s.next("left", ds).Ack(false)
			s.next("left", ds).Ack(false)
		}
	}},
	{name: "length limit dead-letters", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		dead := s.queue(ch, "dead", nil)
		q := s.queue(ch, "q", amqp.Table{"x-max-length": int32(1), "x-overflow": "reject-publish-dlx", "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
		p := s.publisher(conn)
		p.send("", q, amqp.Publishing{Body: []byte("1")})
		p.send("", q, amqp.Publishing{Body: []byte("2")})
		deaths(s, s.next("dead", s.consume(s.open(conn, 10), dead, "d")))
		// What is dead-lettered into a full queue.
		q2 := s.queue(ch, "q2", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": q})
		s.publish(conn, "", q2, "3")
		s.next("q2", s.consume(s.open(conn, 1), q2, "c")).Reject(false)
		time.Sleep(200 * time.Millisecond)
		s.ready(conn, q, 1)
	}},
	{name: "dead letters into a full queue", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		for _, kind := range kinds {
			full := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-max-length": int32(1), "x-overflow": "reject-publish"})
			q := s.queue(ch, kind+"-later", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": full})
			p := s.publisher(conn)
			for range 3 {
				p.send("", full, amqp.Publishing{})
			}
			s.publish(conn, "", q, "1", "2")
			ds := s.consume(s.open(conn, 2), q, "c")
			s.next("c", ds).Reject(false)
			s.next("c", ds).Reject(false)
			time.Sleep(200 * time.Millisecond)
			q2, err := s.open(conn, 0).QueueDeclarePassive(full, true, false, false, false, nil)
			s.fails("passive", err)
			s.note("%s: %d messages", kind, q2.Messages)
		}
	}},
	{name: "time to live at the head", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		dead := s.queue(ch, "dead", nil)
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
			p := s.publisher(conn)
			p.send("", q, amqp.Publishing{Body: []byte("long"), Expiration: "1500"})
			p.send("", q, amqp.Publishing{Body: []byte("short"), Expiration: "300"})
			start := time.Now()
			to := s.open(conn, 10)
			ds := s.consume(to, dead, "d")
			for range 2 {
				d := s.next("dead", ds)
				s.note("after %t, expiration %q", inWindow(start, 1500*time.Millisecond), d.Expiration)
				deaths(s, d)
				d.Ack(false)
			}
			s.fails("close", to.Close())
		}
	}},
	{name: "time to live of a queue and of a message", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		dead := s.queue(ch, "dead", nil)
		ds := s.consume(s.open(conn, 10), dead, "d")
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-message-ttl": int32(600), "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
			for _, expiration := range []string{"", "200", "60000"} {
				p := s.publisher(conn)
				start := time.Now()
				p.send("", q, amqp.Publishing{Body: []byte("m" + expiration), Expiration: expiration})
				d := s.next("dead", ds)
				s.note("after 0.2 s %t, after 0.6 s %t", inWindow(start, 200*time.Millisecond), inWindow(start, 600*time.Millisecond))
				deaths(s, d)
				d.Ack(false)
			}
		}
	}},
	{name: "time to live of zero", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		dead := s.queue(ch, "dead", nil)
		gone := s.consume(s.open(conn, 10), dead, "d")
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
			p := s.publisher(conn)
			p.send("", q, amqp.Publishing{Body: []byte("nobody there"), Expiration: "0"})
			s.next("dead", gone).Ack(false)
			ds := s.consume(s.open(conn, 1), q, "c")
			p.send("", q, amqp.Publishing{Body: []byte("somebody there"), Expiration: "0"})
			s.next("c", ds)
			p.send("", q, amqp.Publishing{Body: []byte("nobody free"), Expiration: "0"})
			s.next("dead", gone).Ack(false)
		}
	}},
	{name: "delayed retry", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		for _, retry := range []string{"failed", "returned", "all", "disabled"} {
			q := s.queue(ch, "q", amqp.Table{
				"x-queue-type": "quorum", "x-delayed-retry-type": retry, "x-delayed-retry-min": int32(300), "x-delayed-retry-max": int32(700),
			})
			s.publish(conn, "", q, "m")
			one := s.open(conn, 1)
			ds := s.consume(one, q, "c")
			d := s.next("c", ds)
			for _, c := range []struct {
				what   string
				settle func() error
			}{
				{"reject", func() error { return d.Reject(true) }},
				{"reject", func() error { return d.Reject(true) }},
				{"nack", func() error { return d.Nack(false, true) }},
				{"reject", func() error { return d.Reject(true) }},
				{"nack", func() error { return d.Nack(false, true) }},
			} {
				start := time.Now()
				s.fails(retry+" "+c.what, c.settle())
				d = s.next("c", ds)
				s.note("%s", waited(start, 0, 300, 600, 700))
			}
			s.fails("close", one.Close())
			start := time.Now()
			one = s.open(conn, 1)
			s.next("again", s.consume(one, q, "c"))
			s.note("%s", waited(start, 0, 300, 600, 700))
			s.fails("close", one.Close())
			_, err := ch.QueueDelete(q, false, false, false)
			s.fails("delete", err)
		}
	}},
	{name: "delayed messages", from: 403, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		q := s.queue(ch, "q", amqp.Table{
			"x-queue-type": "quorum", "x-delayed-retry-type": "failed", "x-delayed-retry-min": int32(1000), "x-max-length": int32(2),
		})
		s.publish(conn, "", q, "1", "2")
		ds := s.consume(s.open(conn, 2), q, "c")
		first, second := s.next("c", ds), s.next("c", ds)
		s.fails("reject", second.Reject(true))
		s.fails("reject", first.Reject(true))
		time.Sleep(200 * time.Millisecond)
		s.ready(conn, q, 0)
		s.next("c", ds)
		s.next("c", ds)
		s.publish(conn, "", q, "3")
		s.ready(conn, q, 1)
		n, err := ch.QueuePurge(q, false)
		s.fails("purge", err)
		s.note("%d", n)
	}},
	{name: "delayed messages purged", from: 403, script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 0)
		q := s.queue(ch, "q", amqp.Table{"x-queue-type": "quorum", "x-delayed-retry-type": "failed", "x-delayed-retry-min": int32(500), "x-message-ttl": int32(60_000)})
		s.publish(conn, "", q, "1", "2")
		ds := s.consume(s.open(conn, 1), q, "c")
		s.next("c", ds).Reject(true)
		s.next("c", ds)
		n, err := ch.QueuePurge(q, false)
		s.fails("purge", err)
		s.note("%d", n)
		_, err = ch.QueueDelete(q, false, true, false)
		s.fails("delete if empty", err)
	}},
}

// inWindow reports whether so much time has gone by, and not much more.
func inWindow(start time.Time, d time.Duration) bool {
	got := time.Since(start)
	return got > d-20*time.Millisecond && got < d+250*time.Millisecond
}

// waited names the longest of these times, in milliseconds, that have gone by.
func waited(start time.Time, steps ...int) string {
	got, name := time.Since(start)+20*time.Millisecond, ""
	for _, ms := range steps {
		if d := time.Duration(ms) * time.Millisecond; got >= d {
			name = "after " + d.String()
		}
	}
	return name
}
