package steadymqtest_test

import (
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/steadymqtest"
)

// sender publishes on a channel with confirms.
type sender struct {
	t       *testing.T
	ch      *amqp.Channel
	returns chan amqp.Return
	closed  chan *amqp.Error
}

func publisher(t *testing.T, conn *amqp.Connection) *sender {
	t.Helper()
	ch := open(t, conn, 0)
	require.NoError(t, ch.Confirm(false))
	return &sender{t: t, ch: ch, returns: ch.NotifyReturn(make(chan amqp.Return, 10)), closed: notifyClose(ch)}
}

// send publishes one mandatory message and waits for nothing.
func (s *sender) send(exchange, key, body string) *amqp.DeferredConfirmation {
	s.t.Helper()
	return s.sendMessage(exchange, key, amqp.Publishing{MessageId: body, Body: []byte(body)})
}

func (s *sender) sendMessage(exchange, key string, p amqp.Publishing) *amqp.DeferredConfirmation {
	s.t.Helper()
	c, err := s.ch.PublishWithDeferredConfirmWithContext(s.t.Context(), exchange, key, true, false, p)
	require.NoError(s.t, err)
	return c
}

// publish sends and says what became of it: "ack", "nack", "returned", or the error that closed the channel.
func (s *sender) publish(exchange, key, body string) string {
	s.t.Helper()
	return s.outcome(s.send(exchange, key, body))
}

func (s *sender) outcome(c *amqp.DeferredConfirmation) string {
	s.t.Helper()
	select {
	case <-c.Done():
	case err := <-s.closed:
		return err.Reason
	case <-time.After(time.Hour):
		return "no answer in an hour"
	}
	select {
	case err := <-s.closed: // which ends the wait for all confirms
		return err.Reason
	case <-s.returns:
		return "returned"
	default:
	}
	if c.Acked() {
		return "ack"
	}
	return "nack"
}

// past sleeps until all that happens within d has happened.
func past(d time.Duration) { time.Sleep(d + time.Millisecond) }

func answered(c *amqp.DeferredConfirmation) bool {
	select {
	case <-c.Done():
		return true
	default:
		return false
	}
}

func declare(b *steadymqtest.Broker, queue, kind string, args map[string]any) {
	b.DeclareQueue(queue, steadymqtest.QueueOptions{Type: kind, Args: args})
}

// safely is a queue that dead-letters into the queue "dead", at least once.
var safely = map[string]any{
	"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead", "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish",
	"x-message-ttl": int32(1000),
}

func TestDeadLettersWaitForTheirTarget(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		declare(b, "q", "quorum", safely)
		b.Publish("q", "1")
		past(time.Second)
		require.Zero(t, b.QueueLen("q"), "neither ready")
		require.Equal(t, 1, b.Ledger().Count("q", steadymqtest.AwaitsTarget), "nor gone")
		require.Error(t, b.WaitSettled(soon(t), "q"))
		declare(b, "dead", "", map[string]any{"x-max-length": 1, "x-overflow": "reject-publish"})
		b.Publish("dead", "in the way")
		past(3 * time.Minute)
		require.Equal(t, 1, b.Ledger().Count("q", steadymqtest.AwaitsTarget), "its target is full")
		require.Equal(t, 1, b.PurgeQueue("dead"))
		start := time.Now()
		require.NoError(t, b.WaitSettled(t.Context(), "q"))
		require.Less(t, time.Since(start), 3*time.Minute)
		require.Equal(t, 1, b.QueueLen("dead"))
		records := b.Ledger().WithBody("1")
		require.Len(t, records, 2)
		require.Equal(t, steadymqtest.DeadLettered, records[0].Fate)
		require.Equal(t, "expired", records[0].Death)
		require.Equal(t, 0, records[1].From)
	})
}

func TestDeadLettersOfOtherStrategiesDoNotWait(t *testing.T) {
	for name, change := range map[string]map[string]any{
		"at most once": {"x-dead-letter-strategy": "at-most-once"},
		"drop-head":    {"x-overflow": "drop-head"},
		"classic":      {"x-queue-type": "classic"},
	} {
		bubble(t, func(t *testing.T) {
			b := steadymqtest.NewBroker(t)
			args := map[string]any{"x-queue-type": "quorum"}
			for _, m := range []map[string]any{safely, change} {
				for k, v := range m {
					args[k] = v
				}
			}
			declare(b, "q", "", args)
			b.Publish("q", "1")
			past(time.Second)
			require.Equal(t, 1, b.Ledger().Count("q", steadymqtest.DeadLettered), name)
			require.Len(t, b.Ledger().Messages, 1, name)
			require.NoError(t, b.WaitSettled(soon(t), "q"))
		})
	}
}

func TestOnlyADeletionDropsWhatAwaitsItsTarget(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		declare(b, "q", "quorum", safely)
		b.Publish("q", "1")
		past(time.Second)
		require.Equal(t, 1, b.PurgeQueue("q"), "counted, and not gone")
		declare(b, "dead", "", nil)
		require.NoError(t, b.WaitSettled(t.Context(), "q"))
		require.Equal(t, 1, b.PurgeQueue("dead"))
		require.True(t, b.DeleteQueue("dead"))
		b.Publish("q", "2")
		past(time.Second)
		require.True(t, b.DeleteQueue("q"))
		declare(b, "dead", "", nil)
		time.Sleep(10 * time.Minute)
		require.Zero(t, b.QueueLen("dead"))
		require.Equal(t, steadymqtest.Dropped, b.Ledger().With("m2")[0].Fate)
	})
}

func TestReturnedMessagesAreDelayedFrom43On(t *testing.T) {
	for _, c := range []struct {
		version  [2]int
		kind     string
		retry    string
		settle   func(amqp.Delivery) error
		waits    []time.Duration
		sessions bool
	}{
		{version: [2]int{4, 3}, kind: "quorum", retry: "failed", settle: rejectAgain, waits: []time.Duration{500, 1000, 1200, 1200}},
		{version: [2]int{4, 3}, kind: "quorum", retry: "failed", settle: nackAgain, waits: []time.Duration{0, 0}},
		{version: [2]int{4, 3}, kind: "quorum", retry: "returned", settle: nackAgain, waits: []time.Duration{500, 500}},
		{version: [2]int{4, 3}, kind: "quorum", retry: "returned", settle: rejectAgain, waits: []time.Duration{0, 0}},
		{version: [2]int{4, 3}, kind: "quorum", retry: "all", settle: nackAgain, waits: []time.Duration{500, 500}},
		{version: [2]int{4, 3}, kind: "quorum", retry: "disabled", settle: rejectAgain, waits: []time.Duration{0}},
		{version: [2]int{4, 3}, kind: "classic", retry: "failed", settle: rejectAgain, waits: []time.Duration{0}},
		{version: [2]int{4, 0}, kind: "quorum", retry: "failed", settle: rejectAgain, waits: []time.Duration{0}},
	} {
		bubble(t, func(t *testing.T) {
			b := steadymqtest.NewBroker(t, steadymqtest.WithVersion(c.version[0], c.version[1]))
			declare(b, "q", c.kind, map[string]any{"x-delayed-retry-type": c.retry, "x-delayed-retry-min": 500, "x-delayed-retry-max": int64(1200)})
			b.Publish("q", "1")
			ds := consume(t, open(t, dial(t, b), 1), "q", "")
			d := next(t, ds)
			for _, wait := range c.waits {
				start := time.Now()
				require.NoError(t, c.settle(d))
				d = next(t, ds)
				require.Equal(t, wait*time.Millisecond, time.Since(start), "%+v", c)
			}
		})
	}
}

func rejectAgain(d amqp.Delivery) error { return d.Reject(true) }
func nackAgain(d amqp.Delivery) error   { return d.Nack(false, true) }

func TestDelayedMessagesAreNotReadyAndNotGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		declare(b, "q", "quorum", map[string]any{"x-delayed-retry-type": "failed", "x-delayed-retry-min": 1000})
		b.Publish("q", "1", "2")
		ch := open(t, dial(t, b), 5)
		ds := consume(t, ch, "q", "")
		require.NoError(t, next(t, ds).Reject(true))
		require.NoError(t, next(t, ds).Ack(false))
		q, err := ch.QueueDeclarePassive("q", true, false, false, false, nil)
		require.NoError(t, err)
		require.Equal(t, 0, q.Messages)
		require.Equal(t, 1, b.Ledger().Count("q", steadymqtest.Delayed))
		require.Equal(t, 1, b.PurgeQueue("q"))
		none(t, ds, time.Minute)
		require.NoError(t, b.WaitSettled(soon(t), "q"))
	})
}

func TestAFullQuorumQueueTakesOneMoreAndWaitsForRoom(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		declare(b, "q", "quorum", map[string]any{"x-max-length": 10, "x-overflow": "reject-publish"})
		conn := dial(t, b)
		p := publisher(t, conn)
		for range 11 {
			require.Equal(t, "ack", p.publish("", "q", "1"))
		}
		require.Equal(t, "nack", p.publish("", "q", "1"))
		ch := open(t, conn, 0)
		get := func() {
			_, ok, err := ch.Get("q", true)
			require.NoError(t, err)
			require.True(t, ok)
		}
		get()
		get()
		require.Equal(t, 9, b.QueueLen("q"))
		require.Equal(t, "nack", p.publish("", "q", "1"), "until four fifths are left")
		require.Equal(t, "ack", publisher(t, conn).publish("", "q", "1"), "which a new channel does not know")
		get()
		get()
		require.Equal(t, "ack", p.publish("", "q", "1"))
	})
}

func TestLengthLimitsRejectAndDeadLetter(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("dead", steadymqtest.QueueOptions{})
		b.DeclareQueue("q", steadymqtest.QueueOptions{DeadLetter: "dead", Args: map[string]any{"x-max-length": 1, "x-overflow": "reject-publish-dlx"}})
		p := publisher(t, dial(t, b))
		require.Equal(t, "ack", p.publish("", "q", "1"))
		require.Equal(t, "nack", p.publish("", "q", "2"))
		require.Equal(t, 1, b.QueueLen("dead"))
		require.Equal(t, "maxlen", b.Ledger().With("2")[0].Death)
		b.FillQueue("dead", true)
		require.Equal(t, "nack", p.publish("", "q", "3"))
		require.Equal(t, "nack", p.publish("", "dead", "4"))
		require.Empty(t, b.Publish("dead", "5")[0])
		b.FillQueue("dead", false)
		require.Equal(t, "ack", p.publish("", "dead", "4"))
		require.Equal(t, 2, b.QueueLen("dead"))
	})
}

func TestRepeatedDeathsKeepWhatTheFirstOneWrote(t *testing.T) {
	for _, version := range [][2]int{{3, 10}, {4, 3}} {
		bubble(t, func(t *testing.T) {
			b := steadymqtest.NewBroker(t, steadymqtest.WithVersion(version[0], version[1]))
			b.DeclareExchange("in", "fanout")
			b.DeclareQueue("q", steadymqtest.QueueOptions{DeadLetter: "wait"})
			b.DeclareQueue("wait", steadymqtest.QueueOptions{DeadLetter: "q", Args: map[string]any{"x-message-ttl": 30_000}})
			require.True(t, b.Bind("q", "in", ""))
			b.PublishExchange("in", "key", steadymqtest.Message{Body: []byte("1"), Expiration: "3600000"})
			first := time.Now().Unix()
			ds := consume(t, open(t, dial(t, b), 1), "q", "")
			require.NoError(t, next(t, ds).Reject(false))
			require.NoError(t, next(t, ds).Reject(false))
			d := next(t, ds)
			require.Empty(t, d.Expiration)
			deaths := d.Headers["x-death"].([]any)
			require.Len(t, deaths, 2)
			rejected := deaths[1].(amqp.Table)
			require.Equal(t, int64(2), rejected["count"])
			require.Equal(t, "in", rejected["exchange"])
			require.Equal(t, []any{"key"}, rejected["routing-keys"])
			require.Equal(t, "3600000", rejected["original-expiration"])
			require.Equal(t, first, rejected["time"].(time.Time).Unix())
		})
	}
}

func TestAClientsDeathsDoNotCountFrom40On(t *testing.T) {
	for _, c := range []struct {
		version [2]int
		count   int64
	}{{[2]int{3, 10}, 4}, {[2]int{4, 0}, 1}, {[2]int{4, 3}, 1}} {
		bubble(t, func(t *testing.T) {
			b := steadymqtest.NewBroker(t, steadymqtest.WithVersion(c.version[0], c.version[1]))
			b.DeclareQueue("dead", steadymqtest.QueueOptions{})
			b.DeclareQueue("q", steadymqtest.QueueOptions{DeadLetter: "dead"})
			ch := open(t, dial(t, b), 1)
			death := amqp.Table{"queue": "q", "reason": "rejected", "count": int64(3), "exchange": "", "routing-keys": []any{"q"}, "time": time.Unix(1, 0)}
			require.NoError(t, ch.PublishWithContext(t.Context(), "", "q", false, false, amqp.Publishing{Headers: amqp.Table{"x-death": []any{death}}}))
			require.NoError(t, next(t, consume(t, ch, "q", "")).Reject(false))
			d := next(t, consume(t, open(t, dial(t, b), 1), "dead", ""))
			require.Equal(t, c.count, d.Headers["x-death"].([]any)[0].(amqp.Table)["count"])
		})
	}
}

func TestCopiesGoToTheirQueues(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		for _, q := range []string{"q", "copy", "blind"} {
			b.DeclareQueue(q, steadymqtest.QueueOptions{})
		}
		conn := dial(t, b)
		p := publisher(t, conn)
		headers := amqp.Table{"CC": []any{"copy", "nowhere"}, "BCC": []any{"blind"}, "n": int32(1)}
		require.Equal(t, "ack", p.outcome(p.sendMessage("", "q", amqp.Publishing{Headers: headers})))
		for _, q := range []string{"q", "copy", "blind"} {
			d := next(t, consume(t, open(t, conn, 1), q, ""))
			require.Equal(t, amqp.Table{"CC": []any{"copy", "nowhere"}, "n": int32(1)}, d.Headers, q)
		}
		require.Equal(t, 3, b.Ledger().Publications[0].Queues)
	})
}

func TestWhatNoMessageMayBe(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		conn := dial(t, b)
		for _, c := range []struct {
			p    amqp.Publishing
			want string
		}{
			{amqp.Publishing{UserId: "other"}, "PRECONDITION_FAILED - user_id property set to 'other' but authenticated user was 'guest'"},
			{amqp.Publishing{UserId: "guest"}, "ack"},
			{amqp.Publishing{Expiration: "soon"}, "PRECONDITION_FAILED - invalid expiration 'soon': no_integer"},
			{amqp.Publishing{Expiration: "-1"}, "PRECONDITION_FAILED - invalid expiration '-1': {value_negative,-1}"},
			{amqp.Publishing{Headers: amqp.Table{"CC": "q"}}, `PRECONDITION_FAILED - invalid message: {unacceptable_type_in_header,"CC",longstr}`},
		} {
			p := publisher(t, conn)
			require.Equal(t, c.want, p.outcome(p.sendMessage("", "q", c.p)))
		}
		require.Equal(t, 406, b.Ledger().Publications[0].Refused)
		ch := open(t, conn, 0)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		require.NoError(t, ch.PublishWithContext(t.Context(), "", "q", false, true, amqp.Publishing{}))
		require.Equal(t, "NOT_IMPLEMENTED - immediate=true", (<-closed).Reason)
	})
}

func TestConfirmsAreLateLostOrNegative(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		p := publisher(t, dial(t, b))
		b.LateConfirms(time.Second)
		start := time.Now()
		one, two := p.send("", "q", "1"), p.send("", "nowhere", "2")
		require.True(t, one.Wait())
		require.Equal(t, time.Second, time.Since(start))
		require.Equal(t, "returned", p.outcome(two))
		b.LateConfirms(0)
		b.LoseConfirms(true)
		lost := p.send("", "q", "3")
		time.Sleep(time.Hour)
		require.False(t, answered(lost))
		b.LoseConfirms(false)
		require.Equal(t, "ack", p.publish("", "q", "4"), "a later one does not tell of it")
		b.LateConfirms(time.Second)
		require.Equal(t, "ack", p.publish("", "q", "5"))
		require.False(t, answered(lost))
		b.Heal()
		b.NackConfirms(true)
		require.Equal(t, "nack", p.publish("", "q", "6"))
		b.Heal()
		require.Equal(t, 5, b.QueueLen("q"), "all were taken")
		l := b.Ledger()
		require.Equal(t, time.Second, l.Published("1")[0].Confirmed.Sub(l.Published("1")[0].Time))
		require.True(t, l.Published("2")[0].Returned)
		require.True(t, l.Published("3")[0].Confirmed.IsZero())
		require.True(t, l.Published("6")[0].Nacked)
		require.Equal(t, uint64(6), l.Published("6")[0].Sequence)
	})
}

func TestConfirmsThatAreDueTogetherComeInOne(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		seen := countFrames(b)
		conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: seen.dial, Heartbeat: time.Hour})
		require.NoError(t, err)
		defer conn.Close()
		p := publisher(t, conn)
		b.LateConfirms(10 * time.Second)
		for range 9 {
			p.send("", "q", "1")
		}
		last := p.send("", "q", "1")
		past(5 * time.Second) // all are published
		seen.bytes.Store(0)
		require.Equal(t, "ack", p.outcome(last))
		require.Equal(t, int64(21), seen.bytes.Load(), "one basic.ack")
	})
}

func TestFaultsStrikeConnectionsByName(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		for what, strike := range map[string]func(*steadymqtest.NamedFaults) int{
			"close":  func(f *steadymqtest.NamedFaults) int { return f.CloseConnections(320, "shutdown") },
			"reset":  func(f *steadymqtest.NamedFaults) int { return f.Reset() },
			"fin":    func(f *steadymqtest.NamedFaults) int { return f.FIN() },
			"freeze": func(f *steadymqtest.NamedFaults) int { f.Silence(); return 1 },
		} {
			named := func(name string) *amqp.Connection {
				conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial, Heartbeat: 2 * time.Second, Properties: amqp.Table{"connection_name": name}})
				require.NoError(t, err)
				t.Cleanup(func() { conn.CloseDeadline(time.Now().Add(time.Second)) })
				return conn
			}
			consumes, publishes := named("app"), named("app retry")
			past(5 * time.Second) // the driver watches nothing until it has read something
			require.Equal(t, 1, strike(b.Named("app retry")), what)
			past(time.Minute)
			require.True(t, publishes.IsClosed(), what)
			require.False(t, consumes.IsClosed(), what)
			p := publisher(t, consumes)
			require.Equal(t, 0, b.Named("other").CloseChannels(406, "why"))
			require.Equal(t, 1, b.Named("app").CloseChannels(406, "why"))
			require.Contains(t, (<-p.closed).Reason, "why")
			require.NoError(t, consumes.Close())
		}
	})
}

func TestAConfirmIsLostWithItsConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		conn := dial(t, b)
		p := publisher(t, conn)
		b.LateConfirms(time.Second)
		c := p.send("", "q", "1")
		past(500 * time.Millisecond)
		require.Equal(t, 1, b.QueueLen("q"))
		require.Equal(t, 1, b.Reset())
		past(time.Minute)
		require.False(t, c.Acked())
		require.True(t, b.Ledger().Published("1")[0].Confirmed.IsZero())
	})
}

func TestWhatIsUnroutableIsReturnedOrLost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		p := publisher(t, dial(t, b))
		b.Unroutable(true)
		require.Equal(t, "returned", p.publish("", "q", "1"))
		b.Unroutable(false)
		require.Equal(t, "ack", p.publish("", "q", "1"))
		b.RefusePublish(403, "write access to exchange 'amq.default' in vhost '/' refused for user 'guest'")
		require.Contains(t, p.publish("", "q", "1"), "ACCESS_REFUSED - write access")
		require.Equal(t, 403, b.Ledger().Publications[2].Refused)
	})
}

func TestPermissionsAreOfAUserAndAName(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.DeclareExchange("x", "fanout")
		b.SetPermissions("guest", `^mine`, `^(mine|amq\.default$)`, `^mine`)
		conn := dial(t, b)
		try := func(what string, allowed bool, do func(*amqp.Channel) error) {
			err := do(open(t, conn, 1))
			if allowed {
				require.NoError(t, err, what)
				return
			}
			require.ErrorContains(t, err, "ACCESS_REFUSED", what)
		}
		table := map[string]func(ch *amqp.Channel, name string) error{
			"declare": func(ch *amqp.Channel, q string) error {
				_, err := ch.QueueDeclare(q, true, false, false, false, nil)
				return err
			},
			"passive": func(ch *amqp.Channel, q string) error {
				_, err := ch.QueueDeclarePassive(q, true, false, false, false, nil)
				return err
			},
			"consume": func(ch *amqp.Channel, q string) error {
				_, err := ch.Consume(q, "", false, false, false, false, nil)
				return err
			},
			"get":    func(ch *amqp.Channel, q string) error { _, _, err := ch.Get(q, true); return err },
			"purge":  func(ch *amqp.Channel, q string) error { _, err := ch.QueuePurge(q, false); return err },
			"delete": func(ch *amqp.Channel, q string) error { _, err := ch.QueueDelete(q, false, false, false); return err },
		}
		for what, do := range table {
			if what != "declare" {
				b.DeclareQueue("mine", steadymqtest.QueueOptions{})
			}
			try(what, true, func(ch *amqp.Channel) error { return do(ch, "mine") })
			try(what, false, func(ch *amqp.Channel) error { return do(ch, "q") })
		}
		b.DeclareQueue("mine", steadymqtest.QueueOptions{})
		try("bind", false, func(ch *amqp.Channel) error { return ch.QueueBind("mine", "", "x", false, nil) })
		try("exchange", false, func(ch *amqp.Channel) error {
			return ch.ExchangeDeclare("y", "fanout", true, false, false, false, nil)
		})
		try("dead letters", false, func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclare("mine2", true, false, false, false, amqp.Table{"x-dead-letter-exchange": "x"})
			return err
		})
		p := publisher(t, conn)
		require.Equal(t, "ack", p.publish("", "q", "1"))
		require.Contains(t, p.publish("x", "", "1"), "write access to exchange 'x' in vhost '/' refused for user 'guest'")
		p = publisher(t, conn)
		require.Equal(t, "ack", p.publish("", "q", "1"))
		b.SetPermissions("guest", "", "", "")
		require.Equal(t, "ack", p.publish("", "q", "1"), "a channel remembers")
		require.Contains(t, publisher(t, conn).publish("", "q", "1"), "exchange 'amq.default'")
	})
}

func TestTheLedgerFollowsAMessage(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		declare(b, "wait", "quorum", map[string]any{"x-message-ttl": 1000, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "q"})
		conn := dial(t, b)
		p := publisher(t, conn)
		ds := consume(t, open(t, conn, 1), "q", "")
		require.Equal(t, "ack", p.outcome(p.sendMessage("", "q", amqp.Publishing{Body: []byte("body")})))
		d := next(t, ds)
		require.Equal(t, "ack", p.outcome(p.sendMessage("", "wait", amqp.Publishing{Body: d.Body})))
		require.NoError(t, d.Ack(false))
		require.NoError(t, next(t, ds).Ack(false))
		require.NoError(t, b.WaitSettled(soon(t), "q"))
		l := b.Ledger()
		trail := l.WithBody("body")
		require.Len(t, trail, 3)
		require.Empty(t, l.WithBody("another"))
		queues, fates := []string{}, []steadymqtest.Fate{}
		for _, r := range trail {
			queues, fates = append(queues, r.Queue), append(fates, r.Fate)
		}
		require.Equal(t, []string{"q", "wait", "q"}, queues)
		require.Equal(t, []steadymqtest.Fate{steadymqtest.Acked, steadymqtest.DeadLettered, steadymqtest.Acked}, fates)
		require.Equal(t, []int{0, 1, -1}, []int{trail[0].Publication, trail[1].Publication, trail[2].Publication})
		require.Equal(t, []int{-1, -1, 1}, []int{trail[0].From, trail[1].From, trail[2].From})
		require.Equal(t, "expired", trail[1].Death)
		require.Equal(t, time.Second, trail[2].Published.Sub(trail[1].Published))
		require.Equal(t, "guest", l.Publications[0].User)
		require.False(t, l.Publications[1].Confirmed.IsZero())
	})
}

func TestHooksTellOfPublications(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var seen []steadymqtest.PublicationRecord
		b := steadymqtest.NewBroker(t, steadymqtest.WithoutLedger(), steadymqtest.WithHooks(steadymqtest.Hooks{
			Published: func(r steadymqtest.PublicationRecord) { seen = append(seen, r) },
		}))
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		p := publisher(t, dial(t, b))
		require.Equal(t, "ack", p.publish("", "q", "1"))
		require.Equal(t, "returned", p.publish("", "nowhere", "2"))
		require.Contains(t, p.publish("absent", "", "3"), "NOT_FOUND")
		synctest.Wait()
		require.Len(t, seen, 3)
		require.Equal(t, []int{1, 0, 0}, []int{seen[0].Queues, seen[1].Queues, seen[2].Queues})
		require.True(t, seen[1].Returned)
		require.Equal(t, 404, seen[2].Refused)
	})
}

func TestWithoutALedgerNothingIsKept(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t, steadymqtest.WithoutLedger())
		declare(b, "q", "quorum", safely)
		p := publisher(t, dial(t, b))
		require.Equal(t, "ack", p.publish("", "q", "1"))
		require.Equal(t, "returned", p.publish("", "nowhere", "1"))
		b.LateConfirms(time.Second)
		require.Equal(t, "ack", p.publish("", "q", "1"))
		declare(b, "dead", "", nil)
		require.NoError(t, b.WaitSettled(t.Context(), "q"))
		require.Empty(t, b.Ledger().Messages)
		require.Empty(t, b.Ledger().Publications)
	})
}
