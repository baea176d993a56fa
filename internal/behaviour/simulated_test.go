package behaviour_test

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// Tests of what the simulation has found, reduced.

func TestSessionsLostRightAfterConsumeOkBackOffOnSeveralHostsToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b *steadymqtest.Broker
		b = steadymqtest.NewBroker(t, steadymqtest.WithHosts(2), steadymqtest.WithHooks(steadymqtest.Hooks{
			Consuming: func(steadymqtest.ConsumerRecord) {
				time.AfterFunc(10*time.Millisecond, func() { b.CloseConnections(320, "flaps") })
			},
		}))
		b.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
		c, err := steadymq.New(b.URLs()[0], rig.Queue, steadymq.WithURLs(b.URLs()[1:]...), steadymq.WithDialer(b.Dialer()))
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		require.NoError(t, c.Run(ctx, rig.Ack))
		assert.Less(t, len(b.Ledger().Dials), 60, "no hot loop")
	})
}

// leftBehind runs a consumer whose only handler outlasts the drain limit, does
// something to the broker while it drains, and returns how often
// HandlerFailed was called by the end of the handler, and the error of Run.
func leftBehind(t *testing.T, meanwhile func(*steadymqtest.Broker)) (failed int, err error) {
	b := steadymqtest.NewBroker(t)
	b.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
	b.Publish(rig.Queue, "work")
	done := make(chan struct{})
	c, err := steadymq.New(b.URL, rig.Queue, steadymq.WithDialer(b.Dialer()), steadymq.WithDrainTimeout(2*time.Second),
		steadymq.WithHooks(steadymq.Hooks{HandlerFailed: func(*steadymq.Delivery, error) { failed++ }}))
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Second, cancel)
	time.AfterFunc(11*time.Second, func() { meanwhile(b) })
	err = c.Run(ctx, func(context.Context, *steadymq.Delivery) error {
		defer close(done)
		time.Sleep(time.Minute)
		return assert.AnError
	})
	<-done
	synctest.Wait()
	return failed, err
}

func TestHandlerLeftBehindAtTheDrainLimitCallsNoHookAfterRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed, err := leftBehind(t, func(*steadymqtest.Broker) {})
		require.ErrorIs(t, err, steadymq.ErrDrainTimeout)
		assert.Zero(t, failed)
	})
}

func TestConnectionLostWhileDrainingDoesNotHideHandlersLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, err := leftBehind(t, func(b *steadymqtest.Broker) { b.Reset() })
		require.ErrorIs(t, err, steadymq.ErrDrainTimeout)
		var lost *steadymq.SessionError
		require.ErrorAs(t, err, &lost)
		assert.Equal(t, "lost", lost.Op)
	})
}

// slowlyClosed dials connections whose Close takes a while. The real one is quick,
// but so may be Run: what ends a socket must have closed it before Run returns.
type slowlyClosed struct {
	dial  func(ctx context.Context, network, address string) (net.Conn, error)
	close func() // what Close waits for
	open  atomic.Int64
}

func (d *slowlyClosed) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := d.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	d.open.Add(1)
	return &rig.CountedConn{Conn: conn, Closed: sync.OnceFunc(func() {
		d.close()
		d.open.Add(-1)
	})}, nil
}

func TestRunReturnsAfterItsSocketsHaveClosedWhoeverClosesThem(t *testing.T) {
	// What happens before the stop, and what ends the socket then.
	stops := map[string]func(r *rig.Rig){
		"close": func(*rig.Rig) {},
		"read deadline": func(r *rig.Rig) { // seed 5365
			r.Wait(5 * time.Second)
			r.Broker.Stall()
			r.Wait(9 * time.Second) // it passes 15 s after the last byte
		},
		"reset":         func(r *rig.Rig) { time.AfterFunc(time.Millisecond, func() { r.Broker.Reset() }) },
		"fin":           func(r *rig.Rig) { time.AfterFunc(time.Millisecond, func() { r.Broker.FIN() }) },
		"close limit":   func(r *rig.Rig) { r.Broker.NoCloseOk(true) },
		"parked reader": func(r *rig.Rig) { r.Broker.StrayReply(true) },
		"setup given up": func(r *rig.Rig) {
			r.Broker.HangAt(steadymqtest.StageTune, true)
			r.Broker.Reset()
			r.Wait(time.Second)
		},
		"session given up": func(r *rig.Rig) {
			r.Broker.HangAt(steadymqtest.StageConsume, true)
			r.Broker.CancelConsumers(rig.Queue)
			r.Wait(time.Second)
		},
	}
	for name, before := range stops {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				sockets := &slowlyClosed{dial: r.Broker.Dialer(), close: func() { time.Sleep(100 * time.Millisecond) }}
				r.Consuming(rig.Ack, steadymq.WithDialer(sockets.DialContext))
				before(r)
				_ = r.Stop()
				assert.Zero(r, sockets.open.Load(), "no socket is open once Run has returned")
				assert.Zero(r, r.Consumer.Stats().Abandoned)
				r.Wait(time.Second)
			})
		})
	}
}

func TestConnectionThatNeverClosesHoldsUpNeitherHealingNorStop(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stuck := make(chan struct{})
		sockets := &slowlyClosed{dial: r.Broker.Dialer(), close: func() { <-stuck }}
		r.Consuming(rig.Ack, steadymq.WithDialer(sockets.DialContext))
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		since := time.Now()
		_ = r.Stop()
		assert.LessOrEqual(r, time.Since(since), 6*time.Second)
		assert.NotZero(r, r.Consumer.Stats().Abandoned)
		close(stuck)
		r.Wait(time.Second)
		assert.Zero(r, sockets.open.Load())
	})
}

func TestConsumeOkThatIsLostOnTheWayIsNoSession(t *testing.T) {
	var broker *steadymqtest.Broker
	confirmed := 0
	rig.Bubble(t, func(r *rig.Rig) {
		broker = r.Broker
		r.Run(rig.Ack)
		err := <-r.Result // a plain refusal before the first session
		r.Result = nil
		var at *steadymq.SessionError
		require.ErrorAs(r, err, &at)
		assert.Equal(r, "consume", at.Op)
		assert.ErrorContains(r, err, "406")
		assert.Zero(r, r.Consumer.Stats().Sessions)
		assert.Equal(r, 3, confirmed)
	}, steadymqtest.WithHooks(steadymqtest.Hooks{Consuming: func(steadymqtest.ConsumerRecord) {
		if confirmed++; confirmed == 3 {
			broker.RefuseConsume(406, "inequivalent arg")
		}
		broker.Reset() // consume-ok is still under way
	}}))
}

func TestQueueOfTheBrokersNamingIsKeptWhateverElseIsMissing(t *testing.T) { // seed 174
	rig.Bubble(t, func(r *rig.Rig) {
		subscribed(r, rig.Ack, steadymq.WithQueue(events))
		before := namedByBroker(r)
		r.Broker.RefuseConsume(404, "home node 'rabbit@a' of queue '"+before[0]+"' in vhost '/' is down or inaccessible")
		failChannels(r, 1, 0)
		r.Wait(time.Minute)
		assert.Equal(r, before, namedByBroker(r))
		r.Broker.RefuseConsume(0, "")
		r.Wait(10 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Equal(r, before, namedByBroker(r))
	})
}
