package steadymqtest_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/steadymqtest"
)

// within fails unless f returns after about d of virtual time.
func within(t *testing.T, d, tolerance time.Duration, f func()) {
	t.Helper()
	start := time.Now()
	f()
	require.InDelta(t, d.Seconds(), time.Since(start).Seconds(), tolerance.Seconds())
}

func TestDialFailsAsARealDialDoes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		dialer, addr := b.Dialer(), b.Host(0).Addr()

		b.Refuse(true)
		_, err := dialer(t.Context(), "tcp", addr)
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		require.EqualError(t, err, "dial tcp mq1.test:5672: connect: connection refused")
		b.Heal()

		b.DNSFailure(true)
		_, err = dialer(t.Context(), "tcp", addr)
		var dns *net.DNSError
		require.ErrorAs(t, err, &dns)
		b.Heal()

		_, err = dialer(t.Context(), "tcp", "elsewhere:5672")
		require.ErrorAs(t, err, &dns)
		require.True(t, dns.IsNotFound)

		b.DropSYN(true)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		within(t, 5*time.Second, 0, func() { _, err = dialer(ctx, "tcp", addr) })
		var timeout net.Error
		require.ErrorAs(t, err, &timeout)
		require.True(t, timeout.Timeout())
		require.ErrorIs(t, err, context.DeadlineExceeded)
		within(t, 127*time.Second, 0, func() { _, err = dialer(t.Context(), "tcp", addr) })
		require.ErrorIs(t, err, syscall.ETIMEDOUT)

		time.AfterFunc(5*time.Second, func() { b.DropSYN(false) })
		within(t, 7*time.Second, 0, func() { _, err = dialer(t.Context(), "tcp", addr) })
		require.NoError(t, err, "the SYN that is sent again after 7 s gets through")

		require.Len(t, b.Ledger().Dials, 6)
	})
}

func TestResetAndFINLookDifferentToTheClient(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		connect := func() net.Conn {
			nc, err := b.Dial("tcp", b.Host(0).Addr())
			require.NoError(t, err)
			return nc
		}
		p := make([]byte, 10)

		nc := connect()
		require.Equal(t, 1, b.Reset())
		_, err := nc.Read(p)
		require.ErrorIs(t, err, syscall.ECONNRESET)
		_, err = nc.Write(p)
		require.ErrorIs(t, err, syscall.ECONNRESET)

		nc = connect()
		require.Equal(t, 1, b.FIN())
		_, err = nc.Read(p)
		require.Equal(t, io.EOF, err)
		_, err = nc.Write(p)
		require.ErrorIs(t, err, syscall.EPIPE)

		nc = connect()
		require.NoError(t, nc.SetReadDeadline(time.Now().Add(time.Second)))
		within(t, time.Second, 0, func() { _, err = nc.Read(p) })
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.NoError(t, nc.Close())
		_, err = nc.Read(p)
		require.ErrorIs(t, err, net.ErrClosed)
		require.ErrorIs(t, nc.Close(), net.ErrClosed)
	})
}

func TestAHalfOpenConnectionIsSeenByTheBrokerOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		conn := dial(t, b)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		time.Sleep(20 * time.Second)
		b.BlackHole(true, false)
		within(t, 25*time.Second, 6*time.Second, func() { require.Equal(t, 501, (<-closed).Code) })
		require.Contains(t, b.Ledger().Connections[0].Cause, "missed heartbeats")
	})
}

func TestAHoleTowardsTheClientIsSeenByTheClient(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		conn := dial(t, b)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		time.Sleep(20 * time.Second)
		b.BlackHole(false, true)
		within(t, 12500*time.Millisecond, 2600*time.Millisecond, func() { require.Equal(t, 501, (<-closed).Code) })
		require.NoError(t, b.WaitConnections(soon(t), 0))
	})
}

func TestWhatABlackHoleSwallowedStaysLost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		idle, busy := dial(t, b), dial(t, b)
		gone := busy.NotifyClose(make(chan *amqp.Error, 1))
		b.BlackHole(true, true)
		go busy.Channel()
		time.Sleep(time.Second)
		b.Heal()
		open(t, idle, 1)
		require.Equal(t, 501, (<-gone).Code)
	})
}

func TestAStallLosesNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		ds := consume(t, open(t, dial(t, b), 5), "q", "")
		b.Stall()
		b.Publish("q", "1", "2")
		none(t, ds, 9*time.Second)
		b.Unstall()
		require.Equal(t, "1", string(next(t, ds).Body))
		require.Equal(t, "2", string(next(t, ds).Body))
		time.Sleep(time.Minute)
		require.Len(t, b.Connections(), 1)
	})
}

func TestLatencyIsPaidPerWay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t, steadymqtest.WithLatency(50*time.Millisecond))
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1")
		within(t, 700*time.Millisecond, 10*time.Millisecond, func() { // 7 round trips: TCP, start, tune, open-ok, channel, qos, consume
			next(t, consume(t, open(t, dial(t, b), 5), "q", ""))
		})
	})
}

func TestHandshakesHangAndDropAtEachStage(t *testing.T) {
	for _, stage := range steadymqtest.Stages() {
		if stage == steadymqtest.StageTLS || stage == steadymqtest.StageDeclare {
			continue // tests of their own
		}
		t.Run(stage.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				b := steadymqtest.NewBroker(t)
				b.DeclareQueue("q", steadymqtest.QueueOptions{})
				session := func() error {
					conn, err := tryDial(b, 0, 10*time.Second)
					if err != nil {
						return err
					}
					defer conn.CloseDeadline(time.Now().Add(time.Second))
					ch, err := conn.Channel()
					if err == nil {
						err = ch.Qos(1, 0, false)
					}
					if err == nil {
						_, err = ch.Consume("q", "", false, false, false, false, nil)
					}
					return err
				}
				b.DropAt(stage, true)
				within(t, 0, 0, func() { require.Error(t, session()) })
				b.Heal()
				require.NoError(t, session())

				b.HangAt(stage, true)
				done := make(chan error, 1)
				go func() { done <- session() }()
				select {
				case <-done:
					require.Fail(t, "the session did not hang")
				case <-time.After(10 * time.Second):
				}
				b.Heal()
				require.NoError(t, session())
				b.Reset() // wakes the one that hangs
				require.Error(t, <-done)
			})
		})
	}
}

func TestTLS(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t, steadymqtest.WithTLS(), steadymqtest.WithHosts(2), steadymqtest.WithLatency(time.Millisecond))
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1")
		conn := dialHost(t, b, 1)
		d := next(t, consume(t, open(t, conn, 5), "q", ""))
		require.NoError(t, d.Ack(false))
		require.NoError(t, b.WaitSettled(soon(t), "q"))

		_, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial})
		require.ErrorContains(t, err, "certificate")

		b.DropAt(steadymqtest.StageTLS, true)
		_, err = tryDial(b, 0, time.Second)
		require.Error(t, err)
		b.Heal()
		b.CloseConnections(320, "bye")
		require.NoError(t, b.WaitConnections(soon(t), 0))
	})
}

func TestHostsFailOneByOne(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t, steadymqtest.WithHosts(3))
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		one, two := dialHost(t, b, 0), dialHost(t, b, 1)
		b.Publish("q", "1")
		next(t, consume(t, open(t, one, 5), "q", ""))
		b.Host(0).Kill()
		require.Equal(t, 1, b.QueueLen("q"))
		_, err := tryDial(b, 0, time.Second)
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		d := next(t, consume(t, open(t, two, 5), "q", ""))
		require.True(t, d.Redelivered)
		b.Heal()
		_, err = tryDial(b, 0, time.Second)
		require.Error(t, err, "healing does not start a process")
		b.Host(0).Restart()
		dialHost(t, b, 0)
	})
}

func TestRestartOfTheWholeBrokerKeepsWhatIsDurable(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("durable", steadymqtest.QueueOptions{})
		b.DeclareQueue("transient", steadymqtest.QueueOptions{Transient: true})
		b.PublishMessage("durable", steadymqtest.Message{Body: []byte("t"), Transient: true})
		b.Publish("durable", "p1", "p2")
		b.Kill()
		b.Restart()
		require.Equal(t, []string{"durable"}, b.Queues())
		ds := consume(t, open(t, dial(t, b), 5), "durable", "")
		require.Equal(t, "p1", string(next(t, ds).Body))
		require.Equal(t, "p2", string(next(t, ds).Body))
	})
}

func TestPowerOffIsSilent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		closed := dial(t, b).NotifyClose(make(chan *amqp.Error, 1))
		time.Sleep(20 * time.Second)
		b.PowerOff()
		within(t, 12500*time.Millisecond, 2600*time.Millisecond, func() { <-closed })
	})
}

func TestLoginIsRefusedAfterSilence(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t, steadymqtest.WithUser("app", "secret"))
		require.Equal(t, "amqp://app:secret@mq1.test:5672/", b.URL)
		dial(t, b)
		b.SetPassword("app", "rotated")
		within(t, 3*time.Second, 0, func() {
			_, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial})
			require.ErrorIs(t, err, amqp.ErrCredentials)
		})
		b.SetPassword("app", "secret")
		b.RefuseLogin(true)
		within(t, 3*time.Second, 0, func() {
			_, err := tryDial(b, 0, time.Second)
			require.ErrorIs(t, err, amqp.ErrCredentials)
		})
		b.Heal()
		for _, auth := range []amqp.Authentication{&amqp.AMQPlainAuth{Username: "app", Password: "secret"}, &amqp.ExternalAuth{}} {
			conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial, SASL: []amqp.Authentication{auth}})
			require.NoError(t, err)
			require.NoError(t, conn.Close())
		}
	})
}

func TestLoginIsRefusedInTheWayThatIsSet(t *testing.T) {
	for name, c := range map[string]struct {
		how         steadymqtest.LoginRefusal
		asks        bool
		after       time.Duration
		said, reset bool
	}{
		"RabbitMQ, client asks":   {steadymqtest.RefusalOfRabbitMQ, true, 0, true, false},
		"RabbitMQ, client is old": {steadymqtest.RefusalOfRabbitMQ, false, 3 * time.Second, false, true},
		"RST":                     {steadymqtest.RefusalByReset, true, 3 * time.Second, false, true},
		"FIN":                     {steadymqtest.RefusalByFIN, true, 3 * time.Second, false, false},
		"403":                     {steadymqtest.RefusalBy403, false, 0, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				b := steadymqtest.NewBroker(t)
				b.SetLoginRefusal(c.how)
				b.Heal()
				end := &endOfSocket{}
				config := amqp.Config{
					Properties: amqp.NewConnectionProperties(), SASL: []amqp.Authentication{&amqp.PlainAuth{Username: "guest", Password: "wrong"}},
					Dial: func(network, addr string) (net.Conn, error) {
						nc, err := b.Dial(network, addr)
						end.Conn = nc
						return end, err
					},
				}
				if c.asks {
					config.SASL[0] = asksToBeTold{config.SASL[0], config.Properties}
				}
				within(t, c.after, 0, func() {
					_, err := amqp.DialConfig(b.URL, config)
					number, _, server := code(t, err)
					require.Equal(t, 403, number)
					require.Equal(t, c.said, server)
				})
				require.Equal(t, c.reset, end.reset.Load())
			})
		})
	}
}

// code takes an error of the driver apart.
func code(t *testing.T, err error) (int, string, bool) {
	t.Helper()
	var e *amqp.Error
	require.True(t, errors.As(err, &e), "%v", err)
	return e.Code, e.Reason, e.Server
}

func TestRefusedVhostAndConsume(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.RefuseVhost(530, "vhost / not found")
		_, err := tryDial(b, 0, time.Second)
		c, text, server := code(t, err)
		require.Equal(t, 530, c)
		require.Equal(t, "NOT_ALLOWED - vhost / not found", text)
		require.True(t, server)
		b.RefuseVhost(0, "")

		conn := dial(t, b)
		for _, want := range []int{403, 404, 405, 406} {
			b.RefuseConsume(want, "no")
			_, err := open(t, conn, 1).Consume("q", "", false, false, false, false, nil)
			c, _, _ := code(t, err)
			require.Equal(t, want, c)
			require.False(t, conn.IsClosed())
		}
		b.RefuseConsume(0, "")
		b.RefuseDeclare(403, "no")
		_, err = open(t, conn, 1).QueueDeclarePassive("q", true, false, false, false, nil)
		refused, _, _ := code(t, err)
		require.Equal(t, 403, refused)
		b.RefuseDeclare(0, "")
		b.RefuseConsume(541, "no")
		_, err = open(t, conn, 1).Consume("q", "", false, false, false, false, nil)
		require.Error(t, err)
		require.True(t, conn.IsClosed())
	})
}

func TestLate541(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{Type: "quorum"})
		b.Publish("q", "1")
		b.Late541(true)
		conn := dial(t, b)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		consume(t, open(t, conn, 1), "q", "")
		within(t, 65*time.Second, 0, func() {
			err := <-closed
			require.Equal(t, 541, err.Code)
			require.True(t, err.Server)
		})
		require.Equal(t, 1, b.QueueLen("q"))
	})
}

func TestQuorumStall(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{Type: "quorum"})
		b.QuorumStall("q", true)
		b.Publish("q", "1")
		ds := consume(t, open(t, dial(t, b), 1), "q", "")
		none(t, ds, 10*time.Minute)
		b.QuorumStall("q", false)
		next(t, ds)
	})
}

func TestCloseOkMayBeSlowOrMissing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		conn := dial(t, b)
		b.SlowCloseOk(3 * time.Second)
		within(t, 3*time.Second, 0, func() { require.NoError(t, open(t, conn, 1).Close()) })
		synctest.Wait() // the driver moves its read deadline after the reply, in a goroutine of its own
		b.NoCloseOk(true)
		within(t, 2*time.Second, 0, func() { require.Error(t, conn.CloseDeadline(time.Now().Add(2*time.Second))) })
	})
}

func TestAStrayReplyParksTheDriver(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		conn := dial(t, b)
		ch := open(t, conn, 1)
		b.StrayReply(false)
		time.Sleep(time.Second)
		b.CloseConnections(320, "nobody hears this")
		time.Sleep(5 * time.Second)
		require.False(t, conn.IsClosed(), "the reader is parked")
		_ = ch.Qos(1, 0, false) // takes the stray reply and so wakes the reader
		require.NoError(t, b.WaitConnections(soon(t), 0))
	})
}

func TestAStrayDeliveryEndsTheDriversConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		conn := dial(t, b)
		open(t, conn, 1)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		require.Equal(t, 1, b.StrayDelivery())
		require.Equal(t, 504, (<-closed).Code)
		require.NoError(t, b.WaitConnections(soon(t), 0))
	})
}

func TestGarbageEndsTheConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		closed := dial(t, b).NotifyClose(make(chan *amqp.Error, 1))
		b.Garbage()
		require.NotNil(t, <-closed)
	})
}

func TestZeroWindowBlocksTheWriter(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		nc, err := b.Dial("tcp", b.Host(0).Addr())
		require.NoError(t, err)
		b.ZeroWindow(true)
		require.NoError(t, nc.SetWriteDeadline(time.Now().Add(5*time.Second)))
		var n int
		within(t, 5*time.Second, 0, func() { n, err = nc.Write(make([]byte, 1<<20)) })
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.Equal(t, 64<<10, n)
		require.NoError(t, nc.SetWriteDeadline(time.Time{}))
		time.AfterFunc(time.Second, func() { b.FIN() })
		within(t, time.Second, 0, func() { _, err = nc.Write(make([]byte, 10)) })
		require.ErrorIs(t, err, syscall.ECONNRESET, "the broker has closed with bytes unread")
		nc.Close()
	})
}

func TestCutsBreakAConnectionInTheMiddle(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		for n := 0; n < 600; n += 7 {
			b.CutAfter(n)
			if conn, err := tryDial(b, 0, time.Second); err == nil {
				<-conn.NotifyClose(make(chan *amqp.Error, 1)) // a heartbeat uses the bytes up
			}
			b.CutAfter(-1)
			b.CutClientAfter(n)
			if conn, err := tryDial(b, 0, time.Second); err == nil {
				<-conn.NotifyClose(make(chan *amqp.Error, 1))
			}
			b.CutClientAfter(-1)
		}
		require.NoError(t, b.WaitConnections(soon(t), 0))
		dial(t, b)
	})
}

func TestBlockedStopsPublishersOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		conn := dial(t, b)
		ds := consume(t, open(t, dial(t, b), 5), "q", "")
		blocked := conn.NotifyBlocked(make(chan amqp.Blocking, 2))
		pub := open(t, conn, 0)
		publish := func(body string) {
			require.NoError(t, pub.PublishWithContext(t.Context(), "", "q", false, false, amqp.Publishing{Body: []byte(body)}))
		}
		publish("1")
		next(t, ds)
		b.Blocked("low on memory")
		require.NoError(t, pub.Qos(1, 0, false), "until it publishes")
		publish("2")
		require.Equal(t, amqp.Blocking{Active: true, Reason: "low on memory"}, <-blocked)
		publish("3")
		none(t, ds, time.Minute)
		require.False(t, conn.IsClosed(), "heartbeats are not read and not missed")
		b.Unblocked()
		require.False(t, (<-blocked).Active)
		require.Equal(t, "2", string(next(t, ds).Body))
		require.Equal(t, "3", string(next(t, ds).Body))
	})
}

func TestAnAlarmEndsByItself(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		p := publisher(t, dial(t, b))
		b.BlockedFor("low on memory", time.Minute)
		start := time.Now()
		require.Equal(t, "ack", p.publish("", "q", "1"))
		require.Equal(t, time.Minute, time.Since(start))
		b.BlockedFor("low on memory", time.Minute)
		b.Blocked("low on disk")
		c := p.send("", "q", "2")
		time.Sleep(2 * time.Minute)
		require.False(t, answered(c), "another alarm is on")
		b.Unblocked()
		require.True(t, c.Wait())
	})
}

func TestListenServesRealTCP(t *testing.T) {
	b := steadymqtest.NewBroker(t)
	url := b.Listen()
	b.DeclareQueue("q", steadymqtest.QueueOptions{})
	b.Publish("q", "1")
	conn, err := amqp.Dial(url)
	require.NoError(t, err)
	d := next(t, consume(t, open(t, conn, 5), "q", ""))
	require.NoError(t, d.Ack(false))
	require.NoError(t, b.WaitSettled(soon(t), "q"))
	closed := conn.NotifyClose(make(chan *amqp.Error, 1))
	b.Reset()
	require.Contains(t, (<-closed).Reason, "connection reset by peer")
	b.Refuse(true)
	_, err = amqp.Dial(url)
	require.Error(t, err)
	b.Refuse(false)
	conn, err = amqp.Dial(url)
	require.NoError(t, err)
	closed = conn.NotifyClose(make(chan *amqp.Error, 1))
	b.FIN()
	require.Contains(t, (<-closed).Reason, "EOF")
}

func TestReleasedConsumersLoseWhatTheyHold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{Type: "quorum"})
		b.Publish("q", "1")
		ch := open(t, dial(t, b), 5)
		d := next(t, consume(t, ch, "q", "c"))
		consumers := b.Consumers("q")
		require.Len(t, consumers, 1)
		require.Equal(t, "c", consumers[0].Tag)
		require.Equal(t, 1, b.ReleaseConsumers(""))
		require.Empty(t, b.Consumers("q"))
		require.Equal(t, 1, b.QueueLen("q"))
		require.NoError(t, d.Ack(false))
		require.NoError(t, ch.Qos(1, 0, false))
		require.Equal(t, 1, b.PurgeQueue("q"), "the late ack took nothing")
		require.Zero(t, b.QueueLen("q"))
	})
}

func TestASilentBrokerIsNoticedByTheClientOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.DeclareQueue("q", steadymqtest.QueueOptions{})
		b.Publish("q", "1")
		conn := dial(t, b)
		closed := conn.NotifyClose(make(chan *amqp.Error, 1))
		next(t, consume(t, open(t, conn, 1), "q", ""))
		time.Sleep(20 * time.Second)
		b.Silence()
		within(t, 12500*time.Millisecond, 2600*time.Millisecond, func() { <-closed })
		time.Sleep(31 * time.Second)
		require.Equal(t, 1, b.QueueLen("q"))
		require.Empty(t, b.Connections())
	})
}

func TestSilenceAfterOpen(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.SilentAfterOpen(true)
		conn := dial(t, b) // the driver has its open-ok; whether it ever notices the rest is a race inside it
		done := make(chan error, 1)
		go func() {
			_, err := conn.Channel()
			done <- err
		}()
		time.Sleep(10 * time.Second)
		require.Empty(t, done)
		b.Heal()
		b.Reset()
		require.Error(t, <-done)
	})
}

func TestTheServersHeartbeatIsASuggestion(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t, steadymqtest.WithHeartbeat(5))
		conn, err := tryDial(b, 0, 10*time.Second)
		require.NoError(t, err)
		require.Equal(t, 5*time.Second, conn.Config.Heartbeat)
		time.Sleep(time.Hour)
		require.Len(t, b.Connections(), 1)
		require.Equal(t, "mq1.test:5672", b.Connections()[0].Host)
		require.NoError(t, conn.Close())
	})
}

func TestLatencyChangesForOpenConnections(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		ch := open(t, dial(t, b), 1)
		b.SetLatency(time.Second)
		within(t, 2*time.Second, 0, func() { require.NoError(t, ch.Qos(1, 0, false)) })
		b.SetLatency(0)
		within(t, 0, 0, func() { require.NoError(t, ch.Qos(1, 0, false)) })
		b.Refuse(true)
		b.SetLatency(time.Second)
		within(t, 2*time.Second, 0, func() {
			_, err := b.Dial("tcp", b.Host(0).Addr())
			require.ErrorIs(t, err, syscall.ECONNREFUSED)
		})
	})
}

func TestTLSHandshakesHang(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t, steadymqtest.WithTLS())
		b.HangAt(steadymqtest.StageTLS, true)
		done := make(chan error, 1)
		go func() {
			_, err := tryDial(b, 0, time.Second)
			done <- err
		}()
		time.Sleep(time.Minute)
		require.Empty(t, done)
		b.Reset()
		require.Error(t, <-done)
	})
}

func TestAClientThatIsTooSlowInTheHandshakeIsHungUpOn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		nc, err := b.Dial("tcp", b.Host(0).Addr())
		require.NoError(t, err)
		within(t, 10*time.Second, 0, func() {
			_, err := nc.Read(make([]byte, 1))
			require.Equal(t, io.EOF, err)
		})
	})
}

func TestAClientThatVanishesInTheHandshakeIsForgotten(t *testing.T) {
	bubble(t, func(t *testing.T) {
		for _, hangs := range []bool{false, true} {
			b := steadymqtest.NewBroker(t)
			b.HangAt(steadymqtest.StageAccept, hangs)
			nc, err := b.Dial("tcp", b.Host(0).Addr())
			require.NoError(t, err)
			b.BlackHole(true, true)
			require.NoError(t, nc.Close()) // the FIN is lost
			b.Heal()
			time.Sleep(11 * time.Second)
			record := b.Ledger().Connections[0]
			require.Equal(t, "handshake timeout", record.Cause)
			require.Equal(t, 10*time.Second, record.Ended.Sub(record.Dialed))
		}
	})
}

func TestAClientThatVanishesFromAHungBrokerIsForgotten(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.SilentAfterOpen(true)
		opened := time.Now()
		conn := dial(t, b)
		b.BlackHole(true, true)
		require.Error(t, conn.CloseDeadline(time.Now().Add(time.Second))) // neither it nor the FIN arrives
		b.Heal()
		time.Sleep(time.Until(opened.Add(29 * time.Second)))
		require.Len(t, b.Connections(), 1)
		time.Sleep(2 * time.Second)
		require.Empty(t, b.Connections(), "three heartbeats after its last byte")
	})
}

func TestAHungBrokerKeepsAClientThatIsThere(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t)
		b.SilentAfterOpen(true)
		nc, err := b.Dial("tcp", b.Host(0).Addr())
		require.NoError(t, err)
		login := []amqp.Authentication{&amqp.PlainAuth{Username: "guest", Password: "guest"}}
		conn, err := amqp.Open(patientConn{nc}, amqp.Config{SASL: login, Vhost: "/", Heartbeat: 10 * time.Second})
		require.NoError(t, err)
		time.Sleep(10 * time.Minute)
		require.Len(t, b.Connections(), 1, "its heartbeats arrive")
		b.Reset()
		time.Sleep(time.Second)
		require.True(t, conn.IsClosed())
		require.Empty(t, b.Connections())
	})
}

// patientConn waits for ever for the other side's heartbeats.
type patientConn struct{ net.Conn }

func (patientConn) SetReadDeadline(time.Time) error { return nil }

func TestAHostCutOffSaysWhatWasSoBefore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		b := steadymqtest.NewBroker(t, steadymqtest.WithHosts(2))
		b.DeclareQueue("q", steadymqtest.QueueOptions{Type: "quorum"})
		says := func(host, messages, consumers int) {
			t.Helper()
			q, err := open(t, dialHost(t, b, host), 0).QueueDeclarePassive("q", true, false, false, false, nil)
			require.NoError(t, err)
			require.Equal(t, [2]int{messages, consumers}, [2]int{q.Messages, q.Consumers})
		}
		ds := consume(t, open(t, dial(t, b), 1), "q", "")
		b.Host(0).CutOff(true)
		b.Publish("q", "1", "2")
		none(t, ds, 10*time.Minute)
		says(0, 0, 1)
		says(1, 2, 1)
		b.Host(0).CutOff(false)
		next(t, ds)
		says(0, 1, 1)
	})
}
