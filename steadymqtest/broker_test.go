package steadymqtest_test

import (
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/steadymqtest"
)

func TestDeliversInOrderAndSettles(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("orders", steadymqtest.QueueOptions{})
		ids := b.Publish("orders", "a", "b", "c")
		ds := consume(t, open(t, dial(t, b), 10), "orders", "c1")
		for i, body := range []string{"a", "b", "c"} {
			d := next(t, ds)
			require.Equal(t, body, string(d.Body))
			require.Equal(t, ids[i], d.MessageId)
			require.Equal(t, uint64(i+1), d.DeliveryTag)
			require.False(t, d.Redelivered)
			require.NoError(t, d.Ack(false))
		}
		require.NoError(t, b.WaitSettled(soon(t), "orders"))
		require.Equal(t, 3, b.Ledger().Count("orders", steadymqtest.Acked))
		require.Empty(t, b.Violations())
	})
}

func TestPrefetchBoundsWhatIsUnsettled(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1", "2", "3")
		ds := consume(t, open(t, dial(t, b), 2), "q", "")
		first := next(t, ds)
		next(t, ds)
		none(t, ds, time.Second)
		require.Equal(t, 2, b.Unsettled("q"))
		require.Equal(t, 1, b.QueueLen("q"))
		require.NoError(t, first.Ack(false))
		require.Equal(t, "3", string(next(t, ds).Body))
	})
}

func TestRequeuePutsAMessageBackInItsPlace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1", "2", "3", "4")
		ch := open(t, dial(t, b), 3)
		ds := consume(t, ch, "q", "c")
		one, two, three := next(t, ds), next(t, ds), next(t, ds)
		require.NoError(t, ch.Cancel("c", false))
		require.NoError(t, three.Nack(false, true))
		require.NoError(t, one.Reject(true))
		require.NoError(t, two.Ack(false))
		ds = consume(t, ch, "q", "c2")
		for _, want := range []struct {
			body        string
			redelivered bool
		}{{"1", true}, {"3", true}, {"4", false}} {
			d := next(t, ds)
			require.Equal(t, want.body, string(d.Body))
			require.Equal(t, want.redelivered, d.Redelivered)
		}
	})
}

func TestALostConnectionRequeuesWhatItHeld(t *testing.T) {
	faults := map[string]func(b *steadymqtest.Broker){
		"connection.close": func(b *steadymqtest.Broker) { b.CloseConnections(320, "shutdown") },
		"channel.close":    func(b *steadymqtest.Broker) { b.CloseChannels(406, "timed out") },
		"RST":              func(b *steadymqtest.Broker) { b.Reset() },
		"FIN":              func(b *steadymqtest.Broker) { b.FIN() },
		"kill":             func(b *steadymqtest.Broker) { b.Kill(); b.Restart() },
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				b := steadymqtest.NewBroker(t)
				b.DeclareQueue("q", steadymqtest.QueueOptions{})
				b.Publish("q", "1", "2")
				ch := open(t, dial(t, b), 5)
				closed := ch.NotifyClose(make(chan *amqp.Error, 1))
				ds := consume(t, ch, "q", "")
				next(t, ds)
				next(t, ds)
				fault(b)
				require.Equal(t, 2, b.QueueLen("q"))
				require.Zero(t, b.Unsettled("q"))
				require.NotNil(t, <-closed)

				ds = consume(t, open(t, dial(t, b), 5), "q", "")
				d := next(t, ds)
				require.Equal(t, "1", string(d.Body))
				require.True(t, d.Redelivered)
			})
		})
	}
}

func TestCancelledConsumersMayStillSettle(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1")
		ch := open(t, dial(t, b), 5)
		cancelled := ch.NotifyCancel(make(chan string, 1))
		ds := consume(t, ch, "q", "mine")
		d := next(t, ds)
		require.Equal(t, 1, b.CancelConsumers("q"))
		require.Equal(t, "mine", <-cancelled)
		_, more := <-ds
		require.False(t, more)
		require.NoError(t, d.Ack(false))
		require.NoError(t, b.WaitSettled(soon(t), "q"))
		require.Empty(t, b.Violations())
	})
}

func TestASecondAckIsAViolation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1", "2")
		ch := open(t, dial(t, b), 5)
		closed := ch.NotifyClose(make(chan *amqp.Error, 1))
		ds := consume(t, ch, "q", "")
		d := next(t, ds)
		require.NoError(t, d.Ack(false))
		require.NoError(t, d.Ack(false))
		err := <-closed
		require.Equal(t, 406, err.Code)
		require.Equal(t, "PRECONDITION_FAILED - unknown delivery tag 1", err.Reason)
		require.Len(t, b.Violations(), 1)
		l := b.Ledger()
		require.Equal(t, steadymqtest.Double, l.Settlements[1].Verdict)
		require.Equal(t, steadymqtest.Ready, l.Messages[1].Fate, "what was unacked on the channel is requeued")
	})
}

func TestMultipleIsAViolation(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1", "2")
		ds := consume(t, open(t, dial(t, b), 5), "q", "")
		next(t, ds)
		d := next(t, ds)
		require.NoError(t, d.Ack(true))
		require.NoError(t, b.WaitSettled(soon(t), "q"))
		require.Len(t, b.Violations(), 1)
	})
}

func TestABlackHoleIsNoticedByBothSidesInTheirTime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1")
		conn := dial(t, b)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		next(t, consume(t, open(t, conn, 5), "q", ""))
		time.Sleep(30 * time.Second)
		b.BlackHole(true, true)
		start := time.Now()
		err := <-closed
		require.Equal(t, 501, err.Code)
		require.InDelta(t, 12.5, time.Since(start).Seconds(), 2.6, "the driver gives up after 1 to 1.5 heartbeats")
		require.NoError(t, b.WaitConnections(soon(t), 0))
		require.InDelta(t, 25, time.Since(start).Seconds(), 5.1, "the broker after 2 to 3")
		require.Equal(t, 1, b.QueueLen("q"))
	})
}

func TestRefusedDials(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.Refuse(true)
		_, err := tryDial(b, 0, time.Second)
		require.ErrorContains(t, err, "connect: connection refused")
		b.Refuse(false)
		dial(t, b)
	})
}
