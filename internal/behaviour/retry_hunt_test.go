package behaviour_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
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

// What is easily overlooked when failed messages are delayed and parked.

// The handler has left something behind that reads the delivery. Only the race detector judges.
func TestDeliveryMayBeReadWhileItIsParked(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var reading sync.WaitGroup
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			reading.Go(func() {
				for range 100 {
					_ = d.Attempt()
				}
			})
			return errPoison
		}, parking())
		r.PublishMany(20, "1")
		r.Wait(10 * time.Second)
		reading.Wait()
		assert.Equal(r, 20, r.Broker.QueueLen(parked))
	})
}

// fickleError can be read for a while, and then panics.
type fickleError struct{ broken *atomic.Bool }

func (e fickleError) Error() string {
	if e.broken.Load() {
		panic("the buffer was given back to its pool")
	}
	return "fickle"
}

func TestErrorThatCannotBeReadLaterEndsNoProcess(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var broken atomic.Bool
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return fickleError{&broken} }, parking())
		r.Broker.FillQueue(parked, true)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(5 * time.Second)
		broken.Store(true)
		r.Broker.FillQueue(parked, false)
		r.Wait(time.Minute)
		all := taken(r, parked)
		require.Len(r, all, 1)
		assert.Equal(r, "fickle", all[0].Headers["steadymq-error"])
	})
}

func TestCopyHasTheBodyAsItCameThoughTheHandlerReturnedNil(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			d.Body = []byte("decrypted")
			_ = d.Delivery.Ack(true) // is refused
			return nil
		}, parking())
		r.Broker.Publish(rig.Queue, "sealed")
		r.Wait(10 * time.Second)
		all := taken(r, parked)
		require.Len(r, all, 1)
		assert.Equal(r, "sealed", string(all[0].Body))
	})
}

func TestMessageThatIsSettledByHandWhileItsCopyWaitsIsNotCopied(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var kept steadymq.Delivery
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			kept = *d
			return errPoison
		}, parking())
		r.Broker.FillQueue(parked, true)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(10 * time.Second)
		require.NoError(r, kept.Discard())
		r.Broker.FillQueue(parked, false)
		r.Wait(time.Minute)
		assert.Zero(r, r.Broker.QueueLen(parked), "nobody wants the copy of what is discarded")
		assert.Zero(r, r.Consumer.Stats().Held)
		assert.Equal(r, uint64(1), r.Consumer.Stats().Discarded)
	})
}

func TestLostConfirmsGiveOneChannelUp(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.Host(0).LoseConfirms(true)
		r.PublishMany(20, "1")
		r.Wait(time.Second)
		r.Broker.Host(0).LoseConfirms(false)
		r.Wait(5 * time.Minute)
		assert.Equal(r, uint64(20), r.Consumer.Stats().Parked)
		assert.Equal(r, uint64(1), r.Consumer.Stats().GivenUp)
	})
}

func TestParkQueueThatIsFullForHoursCostsNoSession(t *testing.T) {
	for name, form := range map[string]steadymqtest.TimeoutForm{"channel": steadymqtest.Form406, "cancel": steadymqtest.FormCancel} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("quorum")
				r.Consuming(park, parking())
				r.Broker.FillQueue(parked, true)
				r.Broker.Publish(rig.Queue, "1")
				r.Wait(2 * time.Hour)
				assert.Equal(r, uint64(1), r.Consumer.Stats().Sessions)
				r.Broker.FillQueue(parked, false)
				r.Wait(2 * time.Minute)
				assert.Equal(r, 1, r.Broker.QueueLen(parked))
			}, steadymqtest.WithConsumerTimeout(30*time.Minute, form))
		})
	}
}

func TestLinesOfAnHourOfParkingInVain(t *testing.T) {
	for name, options := range map[string][]steadymq.Option{
		"no park queue": {steadymq.WithPrefetch(10000)},
		"a full one":    {steadymq.WithPrefetch(10000), parking()},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(park, options...)
				r.Broker.FillQueue(parked, true)
				for range 180 {
					r.Broker.Publish(rig.Queue, "1", "2")
					r.Wait(20 * time.Second)
				}
				assert.LessOrEqual(r, len(r.Warnings("")), 100)
			})
		})
	}
}

// hangingConn is a connection of the user's whose Close does not return.
type hangingConn struct {
	net.Conn
	release chan struct{}
}

func (c hangingConn) Close() error {
	<-c.release
	return c.Conn.Close()
}

func TestStopIsInTimeThoughTheConnectionOfCopiesHangs(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		n := 0
		dial := func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := r.Broker.Dialer()(ctx, network, address)
			if n++; n > 1 && err == nil {
				c = hangingConn{c, release}
			}
			return c, err
		}
		var slow atomic.Bool
		r.Consuming(func(context.Context, *steadymq.Delivery) error {
			if slow.Load() {
				time.Sleep(20 * time.Second)
			}
			return steadymq.Park(errPoison)
		}, parking(), steadymq.WithDialer(dial))
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Second)
		require.Equal(r, uint64(1), r.Consumer.Stats().Parked)
		slow.Store(true)
		r.Broker.Publish(rig.Queue, "2")
		r.Wait(time.Second)
		r.Broker.Host(0).NoCloseOk(true)
		since := time.Now()
		require.Error(r, r.Stop())
		assert.LessOrEqual(r, time.Since(since), 26*time.Second, "drain + close + 1 s")
		close(release)
		r.Wait(time.Minute)
	})
}

func TestHeadersThatFillAFrameDisturbNoOtherCopy(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: []byte("large"), Headers: amqp.Table{"a": strings.Repeat("x", 131072-60)}})
		r.Wait(5 * time.Minute)
		ended := 0
		for _, c := range r.Broker.Ledger().Connections {
			if !c.Ended.IsZero() {
				ended++
			}
		}
		assert.Equal(r, 1, r.Broker.QueueLen(parked)+r.Broker.Unsettled(rig.Queue))
		assert.LessOrEqual(r, ended, 1, "none but that of the publisher, which is idle")
	})
}

func TestQueueThatCannotBeDeclaredAgainDisturbsNoOther(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 0)
		a := p.add(park, steadymq.WithRetry(steadymq.Retry{Attempts: 1, Park: "parked.a"}))
		b := p.add(park, steadymq.WithRetry(steadymq.Retry{Attempts: 1, Park: "parked.b"}))
		p.start()
		r.Broker.SetPermissions("app", "^$", ".*", ".*")
		r.Broker.DeleteQueue("parked.a")
		for range 30 {
			r.Broker.Publish(p.name(0), "1")
		}
		r.Wait(time.Minute)
		longest := time.Duration(0)
		for range 60 {
			before, since := b.Stats().Parked, time.Now()
			r.Broker.Publish(p.name(1), "1")
			for b.Stats().Parked == before && time.Since(since) < time.Minute {
				r.Wait(10 * time.Millisecond)
			}
			longest = max(longest, time.Since(since))
			r.Wait(time.Second)
		}
		assert.Less(r, longest, 200*time.Millisecond, "of the other consumer")
		assert.Equal(r, 60, r.Broker.QueueLen("parked.b"))
		assert.Equal(r, 30, a.Stats().Held)
		require.NoError(r, p.stop())
	})
}

func TestQueueThatConfirmsNothingDelaysNoOther(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 0)
		a := p.add(park, steadymq.WithPrefetch(300), steadymq.WithRetry(steadymq.Retry{Attempts: 1, Park: "parked.a"}))
		b := p.add(park, steadymq.WithRetry(steadymq.Retry{Attempts: 1, Park: "parked.b"}))
		p.start()
		r.Broker.Host(0).LoseConfirms(true)
		for range 300 {
			r.Broker.Publish(p.name(0), "1")
		}
		r.Wait(time.Second)
		require.Equal(r, 300, a.Stats().Held)
		r.Broker.Host(0).LoseConfirms(false) // for those of the other queue
		r.Broker.Publish(p.name(1), "1")
		r.Wait(10 * time.Second)
		assert.Equal(r, uint64(1), b.Stats().Parked)
		require.Error(r, p.stop(), "the others are not confirmed")
	})
}

// fickle is an error that has something inside only when it is asked for the first times.
type fickle struct{ asked *atomic.Int32 }

func (fickle) Error() string { return "fickle" }

func (e fickle) Unwrap() []error {
	if e.asked.Add(1)%2 == 1 {
		return []error{errPoison}
	}
	return nil
}

func TestErrorThatAnswersDifferentlyEachTimeIsParkedLikeAnyOther(t *testing.T) {
	for asked := range int32(4) {
		rig.Bubble(t, func(r *rig.Rig) {
			e := fickle{new(atomic.Int32)}
			r.Consuming(func(context.Context, *steadymq.Delivery) error { e.asked.Store(asked); return e }, parking())
			r.Broker.Publish(rig.Queue, "1")
			r.Wait(10 * time.Second)
			assert.Equal(r, 1, r.Broker.QueueLen(parked))
		})
	}
}

// A confirm that is lost is waited for as long as the first time, whatever else has failed before.
func TestCopyThatHasFailedOftenWaitsForItsConfirmAsLongAsAnyOther(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.FillQueue(parked, true)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(30 * time.Second) // some refusals
		r.Broker.Host(0).LoseConfirms(true)
		r.Broker.FillQueue(parked, false)
		r.Wait(40 * time.Second)
		require.Equal(r, 1, r.Broker.QueueLen(parked), "its confirm is lost")
		r.Broker.Host(0).LoseConfirms(false)
		r.Wait(2 * time.Minute)
		assert.Equal(r, uint64(1), r.Consumer.Stats().Parked)
	})
}

// The driver ends a connection on which it reads headers that nest more than 32 levels deep, and it
// reads those of a copy only if the broker returns that.
func TestCopyThatIsReturnedAndCannotBeReadIsParkedAllTheSame(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.DeleteQueue(parked)
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{Body: []byte("1"), RawHeaders: rig.NestedArrays(40)})
		r.Wait(time.Minute)
		assert.Equal(r, uint64(1), r.Consumer.Stats().Parked)
		assert.Equal(r, 1, r.Broker.QueueLen(parked))
	})
}

func TestStopWaitsForTheCopiesOfASessionThatTheBrokerHasCancelled(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking(), steadymq.WithCloseTimeout(time.Second))
		r.Broker.Host(0).LateConfirms(10 * time.Second)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Second)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(time.Second)
		require.Equal(r, uint64(2), r.Consumer.Stats().Sessions)
		require.NoError(r, r.Stop())
		assert.Equal(r, uint64(1), r.Consumer.Stats().Parked)
		assert.Zero(r, r.Consumer.Stats().Abandoned)
		assert.Zero(r, r.OpenConnections())
	})
}

func TestAlarmThatOnlyCopiesUnderWayMeetIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(park, parking())
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Second)
		r.Broker.Blocked("low on disk")
		r.Broker.Publish(rig.Queue, "2") // nobody knows of the alarm when its copy is sent
		r.Wait(4 * time.Minute)
		assert.Len(r, r.Warnings("low on disk"), 1)
		assert.Zero(r, r.Consumer.Stats().GivenUp)
		r.Broker.Unblocked()
		r.Wait(time.Minute)
		assert.Equal(r, uint64(2), r.Consumer.Stats().Parked)
	})
}

func TestOutcomeOfACopyThatAStopLeavesBehindIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var stale, others atomic.Int32
		hooks := steadymq.Hooks{Settled: func(_ *steadymq.Delivery, o steadymq.Outcome) {
			if o == steadymq.Stale {
				stale.Add(1)
				return
			}
			others.Add(1)
		}}
		p := grouped(r, 1)
		c := p.add(park, parking(), steadymq.WithHooks(hooks), steadymq.WithDrainTimeout(2*time.Second))
		p.start()
		r.Broker.LoseConfirms(true)
		r.Broker.Publish(p.name(1), "1", "2", "3")
		r.Wait(time.Second)
		require.Equal(r, 3, c.Stats().Held)
		require.Error(r, c.Stop(r.Context()), "their copies are not confirmed")
		assert.Equal(r, int32(3), stale.Load())
		assert.Zero(r, others.Load())
		assert.Equal(r, uint64(3), c.Stats().Stale)
		assert.Zero(r, c.Stats().Held)
		r.Wait(10 * time.Minute)
		assert.Equal(r, int32(3), stale.Load(), "no hook once Run has returned")
		assert.Equal(r, uint64(3), c.Stats().Stale)
		require.NoError(r, p.stop())
	})
}

func TestMessageWhoseCopyCannotBeSentGoesBackUncounted(t *testing.T) {
	for minor, lost := range map[int]bool{0: true, 3: false} {
		t.Run(fmt.Sprintf("4.%d", minor), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("quorum") // with the default limit of 20
				r.Consuming(park, parking())
				r.Broker.FillQueue(parked, true)
				r.Broker.Publish(rig.Queue, "1")
				r.Wait(6 * time.Hour)
				assert.Equal(r, uint64(1), r.Consumer.Stats().Sessions)
				r.Broker.FillQueue(parked, false)
				r.Wait(2 * time.Minute)
				if lost { // as the contract of WithRetry says
					assert.Zero(r, r.Broker.QueueLen(parked)+r.Broker.QueueLen(rig.Queue))
					assert.NotEmpty(r, r.Warnings("default delivery limit of 20"))
					return
				}
				assert.Equal(r, 1, r.Broker.QueueLen(parked))
				assert.Empty(r, r.Warnings("default delivery limit of 20"))
			}, steadymqtest.WithVersion(4, minor))
		})
	}
}

func TestMessageWhoseCopyIsUnderWayAtAStopGoesBackUncounted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		r.Consuming(park, parking())
		r.Broker.FillQueue(parked, true)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Minute)
		require.NoError(r, r.Stop())
		var back []steadymqtest.SettlementRecord
		for _, s := range r.Broker.Ledger().Settlements {
			if s.Requeue {
				back = append(back, s)
			}
		}
		require.Len(r, back, 1)
		assert.Equal(r, steadymqtest.Nack, back[0].Kind)
	})
}
