package behaviour_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// A queue that others may not consume from belongs to the connection that has declared it. That one
// lives on for the others.
func TestExclusiveQueueIsNotLockedOutByTheConnectionItsConsumerHasLeft(t *testing.T) {
	for name, fault := range map[string]func(*rig.Rig){
		"set-up hangs":   func(r *rig.Rig) { r.Broker.HangAt(steadymqtest.StageConsume, true) },
		"set-up refused": func(r *rig.Rig) { r.Broker.RefuseConsume(406, "not now") },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				p := grouped(r, 3).start()
				fault(r)
				c, err := p.group.Handle("mine", rig.Ack, steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true}),
					steadymq.WithFatal(func(error) bool { return false }))
				require.NoError(t, err)
				r.Wait(50 * time.Second)
				r.Broker.Heal()
				r.Wait(2 * time.Minute)
				assert.Equal(t, steadymq.Consuming, c.State())
				for _, other := range p.consumers {
					assert.EqualValues(t, 1, other.Stats().Sessions, "it is not disturbed")
				}
				require.NoError(t, p.stop())
			})
		})
	}
}

// exclusive is a queue that ends with its connection, which holds its consumer there.
var exclusive = steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true})

// The same for one that a topology function declares: the connection is not to end for that, and
// cannot where others own queues on it.
func TestExclusiveQueueOfATopologyFuncIsNotLockedOutByTheConnectionItsConsumerHasLeft(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var failing atomic.Bool
		failing.Store(true)
		p := grouped(r, 3).start()
		pinned, err := p.group.Handle("pinned", rig.Ack, exclusive)
		require.NoError(t, err)
		c, err := p.group.Handle("mine", rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			_, err := ch.QueueDeclare("mine", false, false, true, false, nil)
			if err == nil && failing.Load() {
				err = errors.New("not yet")
			}
			return "", err
		}))
		require.NoError(t, err)
		r.Wait(50 * time.Second)
		failing.Store(false)
		r.Wait(2 * time.Minute)
		assert.Equal(t, steadymq.Consuming, c.State())
		for _, other := range append(p.consumers, pinned) {
			assert.EqualValues(t, 1, other.Stats().Sessions, "it is not disturbed")
		}
		require.NoError(t, p.stop())
	})
}

// The connection that its consumer leaves goes on for one that owns a queue there.
func TestQueueOfATopologyFuncIsNotLeftBehindAfterAStall(t *testing.T) { // seed 1860
	for name, before := range map[string]func(*party){
		"on a connection that takes sessions": func(*party) {},
		"on one that is to go":                (*party).retireConnection,
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeclareExchange("events", "fanout")
				p := grouped(r, 2)
				pinned, err := p.group.Handle("pinned", rig.Ack, exclusive)
				require.NoError(t, err)
				var calls atomic.Int32
				c, err := p.group.Handle("", rig.Ack, serverNames(&calls), steadymq.WithStallDetector(5*time.Second))
				require.NoError(t, err)
				p.start()
				before(p)
				stalled := namedByBroker(r)
				require.Len(t, stalled, 1)
				r.Broker.QuorumStall(stalled[0], true)
				publishEvents(r, 1)
				r.Wait(30 * time.Second)
				require.EqualValues(t, 2, c.Stats().Sessions)
				r.Wait(2 * time.Minute)
				assert.Equal(t, steadymq.Consuming, c.State())
				assert.Len(t, namedByBroker(r), 1, "the one that is consumed")
				assert.EqualValues(t, 1, pinned.Stats().Sessions, "it is not disturbed")
				require.NoError(t, p.stop())
			})
		})
	}
}

func TestQueueOfATopologyFuncGoesWithItsConsumer(t *testing.T) {
	for name, queue := range map[string]string{"named by the broker": "", "named by us": "mine"} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				p := grouped(r, 2).start()
				count := len(r.Broker.Queues())
				c, err := p.group.Handle(queue, rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
					q, err := ch.QueueDeclare(queue, false, false, true, false, nil)
					return q.Name, err
				}))
				require.NoError(t, err)
				r.Wait(time.Second)
				require.Len(t, r.Broker.Queues(), count+1)
				require.NoError(t, c.Stop(r.Context()))
				assert.Len(t, r.Broker.Queues(), count)
				assert.Equal(t, 2, p.consuming())
				require.NoError(t, p.stop())
			})
		})
	}
}

// What the broker refuses to declare is another's, and stays.
func TestQueueThatATopologyFuncCouldNotDeclareIsNotDeleted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("theirs", steadymqtest.QueueOptions{})
		r.Broker.Publish("theirs", "m")
		p := grouped(r, 2).start()
		c, err := p.group.Handle("theirs", rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			q, err := ch.QueueDeclare("theirs", false, false, true, false, nil)
			return q.Name, err
		}), steadymq.WithFatal(func(error) bool { return false }))
		require.NoError(t, err)
		r.Wait(time.Minute)
		require.NoError(t, c.Stop(r.Context()))
		assert.Equal(t, 1, r.Broker.QueueLen("theirs"))
		require.NoError(t, p.stop())
	})
}

// Two consumers may share a queue of their connection.
func TestQueueOfATopologyFuncStaysWhileAnotherConsumesFromIt(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1).start()
		both := make([]*steadymq.Consumer, 2)
		for i := range both {
			var err error
			both[i], err = p.group.Handle("both", rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
				q, err := ch.QueueDeclare("both", false, false, true, false, nil)
				return q.Name, err
			}))
			require.NoError(t, err)
		}
		r.Wait(time.Second)
		require.NoError(t, both[0].Stop(r.Context()))
		r.Wait(10 * time.Second)
		assert.Equal(t, steadymq.Consuming, both[1].State())
		assert.EqualValues(t, 1, both[1].Stats().Sessions)
		require.NoError(t, p.stop())
	})
}

// The delete on the session's own channel would never reach the broker.
func TestQueueOfItsConnectionGoesWithAConsumerWhoseChannelHasEnded(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2).start()
		started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
		c, err := p.group.Handle("mine", rig.Hold(started, release), exclusive)
		require.NoError(t, err)
		r.Wait(time.Second)
		r.Broker.Publish("mine", "m")
		<-started
		stopped := make(chan error, 1)
		go func() { stopped <- c.Stop(r.Context()) }()
		r.Wait(time.Second)
		r.Broker.CloseChannels(406, "delivery acknowledgement timed out")
		r.Wait(time.Second)
		close(release)
		require.Error(t, <-stopped, "the ack is lost")
		r.Wait(time.Second)
		assert.NotContains(t, r.Broker.Queues(), "mine")
		require.NoError(t, p.stop())
	})
}

// heldUp is a connection on which nothing more comes from a queue.declare on, if armed, while hold
// lasts.
type heldUp struct {
	net.Conn
	armed, hold *atomic.Bool
}

func (c heldUp) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte{0, 50, 0, 10}) && c.armed.Swap(false) {
		c.hold.Store(true)
	}
	return c.Conn.Write(p)
}

func (c heldUp) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	for c.hold.Load() {
		time.Sleep(10 * time.Millisecond)
	}
	return n, err
}

// Its name comes when its try has been given up, and nobody would ever know of it.
func TestQueueThatTheBrokerNamesTooLateIsNotLeftBehind(t *testing.T) {
	for name, option := range map[string]steadymq.Option{
		"WithQueue":    steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true, Bindings: events.Bindings}),
		"WithTopology": serverNames(new(atomic.Int32)),
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var armed, hold atomic.Bool
				dial := func(ctx context.Context, network, address string) (net.Conn, error) {
					c, err := r.Broker.Dialer()(ctx, network, address)
					return heldUp{c, &armed, &hold}, err
				}
				r.Broker.DeclareExchange("events", "fanout")
				p := grouped(r, 2, steadymq.WithDialer(dial)).start()
				armed.Store(true)
				c, err := p.group.Handle("", rig.Ack, option, steadymq.WithSetupTimeout(2*time.Second))
				require.NoError(t, err)
				r.Wait(4 * time.Second)
				hold.Store(false)
				r.Wait(20 * time.Second)
				assert.Equal(t, steadymq.Consuming, c.State())
				assert.Len(t, namedByBroker(r), 1)
				require.NoError(t, p.stop())
			})
		})
	}
}

// Nobody would read it, and no other connection could have it.
func TestQueueOfItsConnectionGoesWithAConsumerThatIsStoppedBetweenSessions(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2).start()
		c, err := p.group.Handle("mine", rig.Ack, steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true}))
		require.NoError(t, err)
		r.Wait(time.Second)
		require.Contains(t, r.Broker.Queues(), "mine")
		r.Broker.RefuseConsume(403, "queue 'mine' in vhost '/' in exclusive use")
		r.Broker.CancelConsumers("mine")
		r.Wait(10 * time.Second)
		require.NotEqual(t, steadymq.Consuming, c.State())
		require.NoError(t, c.Stop(r.Context()))
		assert.NotContains(t, r.Broker.Queues(), "mine")
		assert.Equal(t, 2, p.consuming())
		require.NoError(t, p.stop())
	})
}

// A server-named queue that a failed set-up has left on a connection that lives on for others would
// be bound and unread as long as that.
func TestServerNamedQueueIsNotLeftOnTheConnectionItsConsumerHasLeft(t *testing.T) {
	for kind, option := range map[string]steadymq.Option{
		"WithQueue": steadymq.WithQueue(events),
		"WithTopology": steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			q, err := ch.QueueDeclare("", false, false, true, false, nil)
			return q.Name, err
		}),
	} {
		t.Run(kind, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.DeclareExchange("events", "fanout")
				p := grouped(r, 3).start()
				r.Broker.RefuseConsume(406, "not now")
				c, err := p.group.Handle("", rig.Ack, option, steadymq.WithFatal(func(error) bool { return false }))
				require.NoError(t, err)
				r.Wait(50 * time.Second)
				r.Broker.Heal()
				r.Wait(2 * time.Minute)
				assert.Equal(t, steadymq.Consuming, c.State(), c.Stats())
				assert.Len(t, namedByBroker(r), 1)
				require.NoError(t, p.stop())
			})
		})
	}
}

// Whoever stays on a retired connection until it is stopped closes that, but not under the others.
func TestStopOfOneConsumerLeavesTheHandlersOfThoseThatHaveMovedAlone(t *testing.T) {
	for name, stop := range map[string]func(*party, *steadymq.Consumer) error{
		"one": func(p *party, c *steadymq.Consumer) error { return c.Stop(p.Context()) },
		"all": func(p *party, _ *steadymq.Consumer) error { return p.stop() },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				p := grouped(r, 0)
				started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
				slow := p.add(rig.Hold(started, release))
				pinned, err := p.group.Handle("mine", rig.Ack, steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true}))
				require.NoError(t, err)
				p.consumers = append(p.consumers, pinned)
				p.start()
				require.Equal(t, 2, p.consuming())
				r.Broker.Publish(p.name(0), "m")
				<-started
				p.retireConnection()
				r.Wait(2 * time.Second)
				require.EqualValues(t, 2, slow.Stats().Sessions, "it has moved")
				stopped := make(chan error, 1)
				go func() { stopped <- stop(p, pinned) }()
				r.Wait(10 * time.Second)
				close(release)
				require.NoError(t, <-stopped)
				if r.Wait(0); name == "all" {
					assert.Zero(t, rig.DriverGoroutines(), "Run waits for the connections")
				}
				r.Wait(time.Second)
				assert.EqualValues(t, 1, slow.Stats().Acked)
				assert.Zero(t, slow.Stats().Stale)
				assert.Zero(t, r.Broker.QueueLen(p.name(0)))
				if name == "one" {
					require.NoError(t, p.stop())
				}
				assert.Zero(t, r.OpenConnections())
				assert.Zero(t, pinned.Stats().Abandoned)
			})
		})
	}
}

// The others have consumed with that login, so it is not wrong.
func TestConsumerThatJoinsDuringAnOutageDoesNotEndTheGroup(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2).start()
		r.Broker.RefuseLogin(true)
		r.Broker.Reset()
		r.Wait(time.Second)
		p.add(rig.Ack)
		r.Wait(20 * time.Second)
		require.Empty(t, p.result, "Run goes on")
		r.Broker.RefuseLogin(false)
		r.Wait(40 * time.Second)
		require.Equal(t, 3, p.consuming())
		require.NoError(t, p.stop())
	})
}

// Those who wait for their turn on a connection that has ended wait for nothing.
func TestTurnOnADeadConnectionIsNotWaitedFor(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1).start()
		release := make(chan struct{})
		for range 32 {
			p.add(rig.Ack, steadymq.WithTopology(func(ctx context.Context, _ *amqp.Channel) (string, error) {
				select {
				case <-release:
				case <-ctx.Done():
				}
				return "", ctx.Err()
			}))
		}
		r.Wait(time.Second)
		late := p.add(rig.Ack)
		r.Wait(time.Second)
		require.Equal(t, steadymq.Connecting, late.State())
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Equal(t, steadymq.Consuming, late.State())
		close(release)
		r.Wait(time.Minute)
		require.Equal(t, 34, p.consuming())
		require.NoError(t, p.stop())
	})
}

func TestErrorOfAStopIsToldWhoeverAsksLater(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1)
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		c := p.add(rig.Hold(started, release), steadymq.WithDrainTimeout(2*time.Second))
		p.start()
		r.Broker.Publish(p.name(1), "m")
		<-started
		soon, cancel := context.WithTimeout(r.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, c.Stop(soon), context.DeadlineExceeded)
		r.Wait(10 * time.Second)
		require.ErrorIs(t, c.Stop(r.Context()), steadymq.ErrDrainTimeout)
		close(release)
		require.NoError(t, p.stop())
	})
}

func TestFailureOfAConsumerThatSharesWithNobodyIsToldOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			return "", errors.New("not yet")
		})).start()
		r.Wait(20 * time.Second)
		for _, line := range p.told() {
			if strings.Contains(line, "not yet") {
				assert.Contains(t, line, "queue=q0", "its own event")
			}
		}
		require.NoError(t, p.stop())
	})
}

// Where there may be no further connection, who ends the shared one by its set-up waits.
func TestConsumerKeptApartDoesNotComeBackForWantOfAConnection(t *testing.T) {
	open, refused := 0, func() {}
	count := func(by int) func(steadymqtest.ConnectionRecord) {
		return func(steadymqtest.ConnectionRecord) { open += by; refused() }
	}
	rig.Bubble(t, func(r *rig.Rig) {
		refused = func() {
			code := 0
			if open > 0 {
				code = amqp.NotAllowed
			}
			r.Broker.RefuseVhost(code, "access to vhost '/' refused for user 'app': connection limit (1) is reached")
		}
		p := grouped(r, 3)
		var failing atomic.Bool
		failing.Store(true)
		p.add(rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			if failing.Load() {
				return "", ch.Qos(1, 1, false) // 540, which closes the connection
			}
			return "", nil
		}), steadymq.WithFatal(func(error) bool { return false }))
		p.start()
		r.Wait(time.Minute)
		require.Equal(t, 3, p.consuming())
		sessions := p.consumers[0].Stats().Sessions
		r.Wait(8 * time.Minute)
		require.Equal(t, sessions, p.consumers[0].Stats().Sessions, "the others are left alone")
		failing.Store(false)
		r.Wait(5 * time.Minute)
		require.Equal(t, 4, p.consuming(), "it is not forgotten")
		require.NoError(t, p.stop())
	}, steadymqtest.WithHooks(steadymqtest.Hooks{Opened: count(1), Closed: count(-1)}))
}

// The pace of a connection is not that of the consumer which happens to ask for it first.
func TestConsumerThatIsLostAgainAndAgainDoesNotSlowTheOthersDown(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 3).start()
		for range 10 {
			r.Wait(35 * time.Second)
			for range 8 { // never often enough to be kept apart
				r.Broker.CancelConsumers("q0")
				r.Wait(20 * time.Second)
			}
			r.Broker.Reset()
			r.Wait(100 * time.Millisecond)
			require.GreaterOrEqual(t, p.consuming(), 2, "the others are back at once")
		}
		require.NoError(t, p.stop())
	})
}

// A queue that would end with its connection keeps its consumer there, also on one that is to go.
func TestExclusiveQueueOutlivesAFailureOnAConnectionThatIsToGo(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2)
		var handled atomic.Int32
		release := make(chan struct{})
		pinned, err := p.group.Handle("mine", func(ctx context.Context, _ *steadymq.Delivery) error {
			select {
			case <-release:
				handled.Add(1)
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}, steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true}))
		require.NoError(t, err)
		p.start()
		p.retireConnection()
		r.Wait(10 * time.Second)
		require.Equal(t, 5, p.consuming())
		require.Equal(t, 2, r.OpenConnections())
		r.Broker.Publish("mine", "1", "2", "3")
		r.Broker.CancelConsumers("mine")
		r.Wait(time.Second)
		r.Broker.CloseChannels(406, "delivery acknowledgement timed out")
		r.Wait(5 * time.Second)
		close(release)
		r.Wait(time.Minute)
		assert.Equal(t, steadymq.Consuming, pinned.State())
		assert.EqualValues(t, 3, handled.Load())
		require.NoError(t, p.stop())
	})
}

// The end of a session may come at the moment at which it would have moved.
func TestConsumerThatIsLostAsItComesBackSharesAgain(t *testing.T) {
	for range 20 { // for either of the two may be seen first
		rig.Bubble(t, func(r *rig.Rig) {
			p := grouped(r, 2)
			var failing atomic.Bool
			failing.Store(true)
			p.add(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
				if failing.Load() {
					return "", errors.New("not yet")
				}
				return "", nil
			}), steadymq.WithHooks(steadymq.Hooks{StateChanged: r.Changed}))
			p.start()
			r.Wait(30 * time.Second)
			require.Equal(t, 1, p.group.Stats().Isolated)
			failing.Store(false)
			r.Wait(11 * time.Second)
			last := r.LastChange()
			require.Equal(t, steadymq.Consuming, last.To)
			time.Sleep(time.Until(last.Time.Add(70*time.Second - time.Millisecond)))
			r.Broker.CancelConsumers("q2") // it hears of that a millisecond later
			r.Wait(3 * time.Minute)
			require.Equal(t, 3, p.consuming())
			require.Equal(t, 1, r.OpenConnections())
			require.NoError(t, p.stop())
		})
	}
}

// A connection that nobody uses any more is none to wait for.
func TestConsumerThatIsKeptApartComesBackToAConnectionThatStands(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2, steadymq.WithConnections(2))
		var failing atomic.Bool
		failing.Store(true)
		p.add(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			if failing.Load() {
				return "", errors.New("not yet")
			}
			return "", nil
		}))
		p.start()
		r.Wait(30 * time.Second)
		require.Equal(t, 1, p.group.Stats().Isolated)
		require.NoError(t, p.consumers[1].Stop(r.Context()))
		failing.Store(false)
		r.Wait(90 * time.Second)
		require.Equal(t, 2, p.consuming())
		require.Zero(t, p.group.Stats().Isolated)
		require.Equal(t, 1, r.OpenConnections())
		require.NoError(t, p.stop())
	})
}

// The other workers of a stream do not wait for a slow one only because somebody else has spoilt the
// connection.
func TestBusyStreamStaysOnAConnectionThatIsToGo(t *testing.T) { // seed 5175
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1)
		r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		c, err := p.group.Handle("log", rig.Hold(started, release), append(rig.OfType("stream"), steadymq.WithConcurrency(2))...)
		require.NoError(t, err)
		p.start()
		r.Broker.Publish("log", "1")
		<-started
		p.retireConnection()
		r.Wait(10 * time.Second)
		r.Broker.Publish("log", "2")
		r.Wait(time.Second)
		assert.Len(t, started, 1, "the second worker goes on")
		close(release)
		r.Wait(6 * time.Second)
		assert.EqualValues(t, 2, c.Stats().Sessions, "it has moved")
		assert.EqualValues(t, 2, c.Stats().Delivered, "each message once")
		require.NoError(t, p.stop())
	})
}

// A stream that is never idle moves in the end. It begins for the successor where the handlers are,
// so they finish first.
func TestStreamMovesWithoutADuplicate(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1)
		r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		started, release := make(chan *steadymq.Delivery, 8), make(chan struct{})
		c, err := p.group.Handle("log", rig.Hold(started, release), rig.OfType("stream")...)
		require.NoError(t, err)
		p.start()
		r.Broker.Publish("log", "1", "2", "3")
		<-started
		p.retireConnection()
		r.Wait(65 * time.Second)
		close(release)
		r.Wait(time.Second)
		assert.EqualValues(t, 2, c.Stats().Sessions, "it has moved")
		assert.EqualValues(t, 3, c.Stats().Delivered, "each message once")
		require.NoError(t, p.stop())
	})
}

// The answer to the delete of the queue that is left stands behind what another consumer is being sent.
func TestQueueThatIsLeftOnABusyConnectionDisturbsNobody(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2, slowly(r, 1_000_000)).start()
		r.Wait(5 * time.Second)
		r.Broker.RefuseConsume(406, "not now")
		c, err := p.group.Handle("mine", rig.Ack, steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true}),
			steadymq.WithFatal(func(error) bool { return false }), steadymq.WithCloseTimeout(time.Second))
		require.NoError(t, err)
		r.Wait(2500 * time.Millisecond) // its first two failures
		r.Broker.Publish(p.name(0), strings.Repeat("x", 1_500_000))
		for range 300 { // answers are behind by a second and a half
			r.Broker.Publish(p.name(0), strings.Repeat("x", 95_000))
			r.Wait(100 * time.Millisecond)
		}
		require.Equal(t, 1, p.group.Stats().Isolated)
		r.Broker.Heal()
		r.Wait(5 * time.Minute)
		assert.Equal(t, steadymq.Consuming, c.State())
		for _, other := range p.consumers {
			assert.EqualValues(t, 1, other.Stats().Sessions, "it is not disturbed")
		}
		require.NoError(t, p.stop())
	})
}

// The connection lives on for another exclusive queue, and the first try to delete fails.
func TestQueueThatIsLeftBehindIsDeletedLater(t *testing.T) { // seed 3940
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 0)
		pinned, err := p.group.Handle("pinned", rig.Ack, exclusive)
		require.NoError(t, err)
		p.start()
		r.Broker.RefuseConsume(406, "not now")
		c, err := p.group.Handle("mine", rig.Ack, exclusive, steadymq.WithFatal(func(error) bool { return false }))
		require.NoError(t, err)
		r.Wait(1500 * time.Millisecond) // it has been declared
		require.Contains(t, r.Broker.Queues(), "mine")
		r.Broker.SetPermissions("app", "^$", ".*", ".*")
		r.Wait(10 * time.Second)
		require.Equal(t, 1, p.group.Stats().Isolated)
		r.Broker.Heal()
		r.Broker.SetPermissions("app", ".*", ".*", ".*")
		r.Wait(time.Minute)
		assert.Equal(t, steadymq.Consuming, c.State())
		assert.EqualValues(t, 1, pinned.Stats().Sessions, "it is not disturbed")
		require.NoError(t, p.stop())
	})
}

func TestQueueThatIsLockedElsewhereIsLeftAlone(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		owner := grouped(r, 0)
		_, err := owner.group.Handle("mine", rig.Ack, exclusive)
		require.NoError(t, err)
		owner.start()
		p := grouped(r, 2).start()
		c, err := p.group.Handle("mine", rig.Ack, exclusive)
		require.NoError(t, err)
		r.Wait(5 * time.Second)
		require.NoError(t, c.Stop(r.Context()))
		r.Wait(time.Minute)
		for _, other := range p.consumers {
			assert.EqualValues(t, 1, other.Stats().Sessions, "it is not disturbed")
		}
		require.NoError(t, p.stop())
		require.NoError(t, owner.stop())
	})
}

// A broker that has just started says for a while that it cannot reach its queues.
func TestQueuesThatCannotBeReachedKeepNoConsumerApart(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 3).start()
		r.Broker.RefuseConsume(404, "home node 'rabbit@a' of durable queue 'q' in vhost '/' is down or inaccessible")
		r.Broker.Reset()
		r.Wait(10 * time.Second)
		r.Broker.Heal()
		r.Wait(5 * time.Second)
		require.Equal(t, 3, p.consuming())
		assert.Zero(t, p.group.Stats().Isolated)
		assert.Equal(t, 1, r.OpenConnections())
		require.NoError(t, p.stop())
	})
}

// The close of the channel on which it has asked for the stream is of no use to it.
func TestSetUpDoesNotWaitForTheCloseOfAChannelThatItHasUsedUp(t *testing.T) { // seed 3157
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 3, steadymq.WithCloseTimeout(time.Second)).start()
		r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		r.Broker.Publish("log", "1", "2", "3")
		r.Broker.NoCloseOk(true)
		c, err := p.group.Handle("log", rig.Ack, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "next"}))
		require.NoError(t, err)
		r.Wait(4 * time.Second)
		assert.Equal(t, steadymq.Consuming, c.State())
		for _, other := range p.consumers {
			assert.EqualValues(t, 1, other.Stats().Sessions, "it is not disturbed")
		}
		r.Broker.NoCloseOk(false)
		require.NoError(t, p.stop())
	})
}

// The broker never says that it has closed the channel of the one that has left.
func TestConsumerMovesWhereAChannelThatWasGivenUpIsNotLetGo(t *testing.T) { // seeds 2551, 3971
	for name, option := range map[string]steadymq.Option{
		"a queue of others": steadymq.WithPrefetch(1),
		"one of its own": steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			q, err := ch.QueueDeclare("mine", false, false, true, false, nil)
			return q.Name, err
		}),
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				g, err := steadymq.NewGroup(r.Broker.URLs()[0]+"?channel_max=2", steadymq.WithDialer(r.Broker.Dialer()),
					steadymq.WithLogger(slog.New(slog.NewTextHandler(r.Log, nil))), steadymq.WithCloseTimeout(time.Second))
				require.NoError(t, err)
				p := &party{Rig: r, group: g}
				p.add(rig.Ack)
				p.add(rig.Ack)
				p.start()
				r.Broker.NoCloseOk(true)
				require.Error(t, p.consumers[1].Stop(r.Context()), "its channel is given up")
				r.Broker.NoCloseOk(false)
				r.Wait(time.Second)
				c := p.add(rig.Ack, option)
				r.Wait(2 * time.Second)
				assert.Equal(t, steadymq.Consuming, c.State())
				assert.EqualValues(t, 1, p.consumers[0].Stats().Sessions, "it is not disturbed")
				require.NoError(t, p.stop())
			})
		})
	}
}

// Each connection has its turn at the other host after its own failure, however many there are.
func TestNoConnectionOfAGroupTriesAHostThatIsAwayTwice(t *testing.T) { // seed 1416
	for range 20 {
		rig.Bubble(t, func(r *rig.Rig) {
			p := grouped(r, 6, steadymq.WithConnections(3), steadymq.WithDialTimeout(5*time.Second)).start()
			r.Wait(2 * time.Minute)
			require.Equal(t, 6, p.consuming())
			for i := range 2 {
				r.Broker.Host(i).DropSYN(true)
				r.Broker.Host(i).FIN()
				r.Wait(6 * time.Second)
				require.Equal(t, 6, p.consuming())
				r.Broker.Host(i).DropSYN(false)
				r.Wait(2 * time.Minute)
			}
			require.NoError(t, p.stop())
		}, steadymqtest.WithHosts(2))
	}
}
