package steadymqtest_test

import (
	"errors"
	"fmt"
	"maps"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"
)

// counts is what the generations of RabbitMQ count, and what they show of it: the number of tries is read from it, and the delivery
// limit acts on it.
var counts = []scenario{
	{name: "delivery limit of minus one", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		q := s.queue(ch, "q", amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(-1)})
		s.publish(conn, "", q, "poison")
		ds := s.consume(ch, q, "c")
		s.next("c", ds).Reject(true)
		s.next("c", ds)
	}},
	{name: "another delivery limit", script: func(s *script) {
		conn := s.dial()
		declare := func(what, name string, args amqp.Table) {
			_, err := s.open(conn, 0).QueueDeclare(s.prefix+name, true, false, false, false, args)
			s.fails(what, err)
		}
		unlimited := amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(-1)}
		limited := amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(5)}
		declare("none", "q", quorum)
		declare("none, then -1", "q", unlimited)
		declare("-1", "q2", unlimited)
		declare("-1, then -1", "q2", unlimited)
		declare("-1, then none", "q2", quorum)
		declare("-1, then long -1", "q2", amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int64(-1)})
		declare("5", "dead", limited)
		declare("5, then none", "dead", quorum)
		declare("5, then -1", "dead", unlimited)
		declare("5, then -1 and a time to live", "dead", amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(-1), "x-message-ttl": int32(1)})
		declare("classic", "classic", nil)
		declare("classic, then quorum with -1", "classic", unlimited)
	}},
	{name: "counts of requeues", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind})
			s.publish(conn, "", q, kind)
			ds := s.consume(s.open(conn, 1), q, "c")
			for range 3 {
				s.counted(ds).Reject(true)
			}
		}
	}},
	{name: "counts of a retry loop", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": s.prefix + kind + "-later"})
			s.queue(ch, kind+"-later", amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": q, "x-message-ttl": int32(20)})
			s.publish(conn, "", q, kind)
			ds := s.consume(s.open(conn, 1), q, "c")
			for range 3 {
				s.counted(ds).Reject(false)
			}
			s.counted(ds).Reject(true)
			s.counted(ds).Reject(false)
			s.counted(ds).Ack(false)
		}
	}},
	{name: "counts of dead letters", script: func(s *script) {
		conn := s.dial()
		for _, from := range kinds {
			for _, to := range kinds {
				s.moved(conn, from, to, nil, func(ds <-chan amqp.Delivery) { s.next0(ds).Reject(false) })
				s.moved(conn, from, to, nil, func(ds <-chan amqp.Delivery) {
					s.next0(ds).Reject(true)
					s.next0(ds).Reject(true)
					s.next0(ds).Reject(false)
				})
			}
		}
	}},
	{name: "counts of dead letters of the limit", script: func(s *script) {
		conn := s.dial()
		for _, to := range kinds {
			s.moved(conn, "quorum", to, amqp.Table{"x-delivery-limit": int32(1)}, func(ds <-chan amqp.Delivery) {
				s.next0(ds).Reject(true)
				s.next0(ds).Reject(true)
			})
		}
	}},
	{name: "counts of expired dead letters", script: func(s *script) {
		conn := s.dial()
		expiring := amqp.Table{"x-message-ttl": int32(300)}
		for _, from := range kinds {
			for _, to := range kinds {
				s.moved(conn, from, to, expiring, nil)
				s.moved(conn, from, to, expiring, func(ds <-chan amqp.Delivery) {
					s.next0(ds).Reject(true)
					s.next0(ds) // and goes back with its channel
				})
			}
		}
	}},
	{name: "the limit and counts of an old life", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		dead := s.queue(ch, "dead", amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(2)})
		q := s.queue(ch, "q", amqp.Table{"x-queue-type": "quorum", "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
		s.publish(conn, "", q, "m")
		ds := s.consume(s.open(conn, 1), q, "c")
		for range 4 {
			s.next0(ds).Reject(true)
		}
		s.next0(ds).Reject(false)
		s.ready(conn, dead, 1)
		ds = s.consume(s.open(conn, 1), dead, "d")
		s.counted(ds).Reject(true)
		s.counted(ds).Reject(true)
	}},
	{name: "counts published again", script: func(s *script) {
		conn := s.dial()
		ch := s.open(conn, 1)
		for _, kind := range kinds {
			q := s.queue(ch, kind, amqp.Table{"x-queue-type": kind})
			death := amqp.Table{"queue": q, "reason": "rejected", "count": int64(3), "exchange": "", "routing-keys": []any{q}, "time": time.Unix(1, 0)}
			require.NoError(s.t, ch.PublishWithContext(s.t.Context(), "", q, false, false, amqp.Publishing{DeliveryMode: 2, Body: []byte(kind), Headers: amqp.Table{
				"x-delivery-count": int64(5), "x-acquired-count": int64(6), "x-death": []any{death},
				"x-first-death-queue": q, "x-first-death-reason": "rejected", "x-first-death-exchange": "",
				"x-last-death-queue": q, "x-last-death-reason": "rejected", "x-last-death-exchange": "",
			}}))
			ds := s.consume(s.open(conn, 1), q, "c")
			s.counted(ds).Reject(true)
			s.counted(ds).Reject(true)
			s.counted(ds).Ack(false)
		}
	}},
}

var kinds = []string{"classic", "quorum"}

// moved shows what becomes of a message that a queue of one kind sends to one of another, and then of its later deliveries there.
func (s *script) moved(conn *amqp.Connection, from, to string, args amqp.Table, handle func(<-chan amqp.Delivery)) {
	ch := s.open(conn, 1)
	s.moves++ // 3.10 mixes up a queue and the next one of its name
	dead := s.queue(ch, fmt.Sprint("dead-", s.moves), amqp.Table{"x-queue-type": to})
	all := amqp.Table{"x-queue-type": from, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
	maps.Copy(all, args)
	q := s.queue(ch, fmt.Sprint("q-", s.moves), all)
	s.publish(conn, "", q, from+" to "+to)
	if handle != nil {
		one := s.open(conn, 1)
		handle(s.consume(one, q, "c"))
		s.fails("close", one.Close())
	}
	s.ready(conn, dead, 1)
	ds := s.consume(s.open(conn, 1), dead, "d")
	s.counted(ds).Reject(true)
	s.counted(ds).Reject(true)
	s.counted(ds).Ack(false)
	_, err := ch.QueueDelete(q, false, false, false)
	_, err2 := ch.QueueDelete(dead, false, false, false)
	s.fails("delete", errors.Join(err, err2))
}

// counted writes down the next delivery with everything that counts.
func (s *script) counted(ds <-chan amqp.Delivery) amqp.Delivery {
	select {
	case d := <-ds:
		line := fmt.Sprintf("%q redelivered %t count %v acquired %v", d.Body, d.Redelivered, d.Headers["x-delivery-count"], d.Headers["x-acquired-count"])
		list, _ := d.Headers["x-death"].([]any)
		for _, entry := range list {
			death, _ := entry.(amqp.Table)
			line += fmt.Sprintf(" [%v %v %v %T]", death["queue"], death["reason"], death["count"], death["count"])
		}
		s.note("%s last %v first %v", line, d.Headers["x-last-death-queue"], d.Headers["x-first-death-queue"])
		return d
	case <-time.After(5 * time.Second):
		s.note("nothing in 5 s")
		return amqp.Delivery{Acknowledger: deaf{}}
	}
}

// deaf settles what never came.
type deaf struct{}

func (deaf) Ack(uint64, bool) error        { return nil }
func (deaf) Nack(uint64, bool, bool) error { return nil }
func (deaf) Reject(uint64, bool) error     { return nil }
