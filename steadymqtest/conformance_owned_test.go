package steadymqtest_test

import (
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"
)

// owned is about queues that live and die with their connection.
var owned = []scenario{
	{name: "server-named queue again", script: func(s *script) {
		conn := s.dial()
		q := s.serverNamed(conn, false)
		s.publish(conn, "", q, "m")
		_, err := s.open(conn, 1).QueueDeclare(q, false, false, true, false, nil)
		s.unnamed(q, "declare again", err)
		passive, err := s.open(conn, 1).QueueDeclarePassive(q, true, false, false, false, nil)
		s.unnamed(q, "passive", err)
		s.note("%d messages, %d consumers", passive.Messages, passive.Consumers)
		ch := s.open(conn, 1)
		s.unnamed(q, "bind", ch.QueueBind(q, "key", "amq.direct", false, nil))
		s.unnamed(q, "bind again", ch.QueueBind(q, "key", "amq.direct", false, nil))
		ds, err := ch.Consume(q, "c", false, false, false, false, nil)
		s.unnamed(q, "consume", err)
		s.next("c", ds)
		s.fails("fail the channel", s.failed(ch))
		s.next("on another channel", s.consume(s.open(conn, 1), q, "d"))
	}},
	{name: "server-named queue deleted", script: func(s *script) {
		conn := s.dial()
		q := s.serverNamed(conn, false)
		ch := s.open(conn, 1)
		cancels := ch.NotifyCancel(make(chan string, 1))
		s.consume(ch, q, "c")
		_, err := s.open(conn, 1).QueueDelete(q, false, false, false)
		s.unnamed(q, "delete", err)
		select {
		case tag := <-cancels:
			s.note("cancel of %q", tag)
		case <-time.After(5 * time.Second):
			s.note("no cancel")
		}
		_, err = s.open(conn, 1).QueueDeclarePassive(q, true, false, false, false, nil)
		s.unnamed(q, "passive", err)
		_, err = s.open(conn, 1).QueueDeclare(q, false, false, true, false, nil)
		s.unnamed(q, "declare again", err)
		s.unnamed(q, "bind", s.open(conn, 1).QueueBind(q, "key", "amq.direct", false, nil))
		_, err = s.open(conn, 1).Consume(q, "c", false, false, false, false, nil)
		s.unnamed(q, "consume", err)
	}},
	{name: "server-named queue of another connection", script: func(s *script) {
		conn, other := s.dial(), s.dial()
		q := s.serverNamed(conn, false)
		_, err := s.open(other, 1).QueueDeclarePassive(q, true, false, false, false, nil)
		s.unnamed(q, "passive", err)
		_, err = s.open(other, 1).Consume(q, "c", false, false, false, false, nil)
		s.unnamed(q, "consume", err)
		conn.Close()
		s.gone(other, q)
		_, err = s.open(other, 1).Consume(q, "c", false, false, false, false, nil)
		s.unnamed(q, "consume when the owner is gone", err)
	}},
	{name: "server-named auto-delete queue", script: func(s *script) {
		conn := s.dial()
		q := s.serverNamed(conn, true)
		ch := s.open(conn, 1)
		s.consume(ch, q, "c")
		s.fails("fail the channel", s.failed(ch))
		s.gone(conn, q)
		_, err := s.open(conn, 1).Consume(q, "c", false, false, false, false, nil)
		s.unnamed(q, "consume", err)
	}},
	{name: "exclusive queue again", script: func(s *script) {
		conn := s.dial()
		name := s.prefix + "mine"
		declare := func(what string, durable, autoDelete bool) {
			_, err := s.open(conn, 1).QueueDeclare(name, durable, autoDelete, true, false, nil)
			s.fails(what, err)
		}
		declare("declare", true, false)
		s.publish(conn, "", name, "m")
		declare("again", true, false)
		declare("not durable", false, false)
		declare("auto-delete", true, true)
		s.ready(conn, name, 1)
	}},
}

// serverNamed declares an exclusive queue that the broker names.
func (s *script) serverNamed(conn *amqp.Connection, autoDelete bool) string {
	q, err := s.open(conn, 0).QueueDeclare("", true, autoDelete, true, false, amqp.Table{"x-queue-type": "classic"})
	require.NoError(s.t, err)
	return q.Name
}

// unnamed is fails without the name that the broker has chosen.
func (s *script) unnamed(q, what string, err error) {
	s.fails(what, err)
	last := &s.lines[len(s.lines)-1]
	*last = strings.ReplaceAll(*last, q, "amq.gen-*")
}

// failed makes the broker close the channel, and returns what it said.
func (s *script) failed(ch *amqp.Channel) error {
	closed := notifyClose(ch)
	if err := ch.Ack(99, false); err != nil {
		return err
	}
	return <-closed
}

// gone waits until a queue is deleted, for which a broker may need a moment.
func (s *script) gone(conn *amqp.Connection, q string) {
	for range 100 {
		if _, err := s.open(conn, 1).QueueDeclarePassive(q, true, false, false, false, nil); err != nil && strings.Contains(err.Error(), "404") {
			s.note("gone")
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	s.note("still there")
}
