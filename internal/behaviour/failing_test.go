package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

var errAway = errors.New("the database is away")

// generations are the versions of RabbitMQ that count deliveries differently.
var generations = [][2]int{{3, 10}, {4, 0}, {4, 3}}

// holdsOf returns how long each delivery was held before it went back.
func holdsOf(r *rig.Rig) (all []time.Duration) {
	for _, d := range r.Broker.Ledger().Deliveries {
		if d.Kind == steadymqtest.Reject && d.Requeue {
			all = append(all, d.Settled.Sub(d.Time))
		}
	}
	return all
}

func TestFailedMessageIsHeldTwiceAsLongEachTime(t *testing.T) {
	for _, v := range generations {
		t.Run(fmt.Sprint(v), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("quorum")
				r.Consuming(func(context.Context, *steadymq.Delivery) error { return errAway })
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(2 * time.Hour)
				holds := holdsOf(r)
				require.GreaterOrEqual(r, len(holds), 12)
				for i, hold := range holds {
					want := min(time.Second<<i, 15*time.Minute)
					assert.GreaterOrEqual(r, hold, want/2, "hold %d", i+1)
					assert.LessOrEqual(r, hold, min(want*3/2, 15*time.Minute)+10*time.Millisecond, "hold %d", i+1)
				}
				assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue), "it is there after two hours")
			}, steadymqtest.WithVersion(v[0], v[1]))
		})
	}
}

// Nothing is lost, and no dead-letter exchange gets what was to be looked at.
func TestMessageToBeParkedIsHeldWhereThereIsNoPlaceForIt(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.Park(errAway) })
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Minute)
		holds := holdsOf(r)
		require.GreaterOrEqual(r, len(holds), 4)
		for i, hold := range holds {
			assert.GreaterOrEqual(r, hold, time.Second<<i/2, "hold %d", i+1)
		}
		assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
		assert.Zero(r, r.Consumer.Stats().Acked+r.Consumer.Stats().Discarded)
	})
}

func TestHoldsStayWithinWhatWasAsked(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return errAway },
			steadymq.WithRequeueDelay(10*time.Second, 40*time.Second))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(5 * time.Minute)
		for i, hold := range holdsOf(r) {
			want := min(10*time.Second<<i, 40*time.Second)
			assert.GreaterOrEqual(r, hold, want/2)
			assert.LessOrEqual(r, hold, 40*time.Second+10*time.Millisecond)
		}
	})
	for _, bad := range [][2]time.Duration{{0, time.Second}, {time.Second, 25 * time.Hour}, {2 * time.Second, time.Second}} {
		_, err := steadymq.New("amqp://h/", "q", steadymq.WithRequeueDelay(bad[0], bad[1]))
		var refused *steadymq.OptionError
		require.ErrorAs(t, err, &refused)
		assert.Equal(t, "WithRequeueDelay", refused.Option)
	}
}

func TestHoldsStayShortWhereNothingIsCounted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return errAway })
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(10 * time.Minute)
		assert.GreaterOrEqual(r, len(holdsOf(r)), 200)
		for _, hold := range holdsOf(r) {
			assert.LessOrEqual(r, hold, 3*time.Second+10*time.Millisecond)
		}
	})
}

func TestOutageOfADependencyLosesNothing(t *testing.T) {
	for _, v := range generations {
		for _, outage := range []time.Duration{45 * time.Second, time.Hour} {
			t.Run(fmt.Sprint(v, outage), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.RemakeQueue("quorum") // with RabbitMQ's own limit, 20 since 4.0
					back := time.Now().Add(outage)
					r.Consuming(func(context.Context, *steadymq.Delivery) error {
						if time.Now().Before(back) {
							return errAway
						}
						return nil
					})
					r.PublishMany(50, "m")
					r.Wait(outage + time.Hour)
					assert.EqualValues(r, 50, r.Consumer.Stats().Acked)
					assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
				}, steadymqtest.WithVersion(v[0], v[1]))
			})
		}
	}
}

// Up to RabbitMQ 4.2 every way back to the queue counts towards the delivery limit.
func TestStopCostsWhatWasNotStartedOneDelivery(t *testing.T) {
	for range 20 {
		rig.Bubble(t, func(r *rig.Rig) {
			r.RemakeQueue("quorum")
			r.PublishMany(20, "job")
			r.Run(func(context.Context, *steadymq.Delivery) error { r.Cancel(); return nil })
			require.NoError(r, <-r.Result)
			r.Result = nil
			for _, m := range r.Broker.Ledger().Messages {
				assert.Equal(r, 1, m.Deliveries)
			}
		}, steadymqtest.WithVersion(4, 0))
	}
}

func TestMessageIsHeldForAnyDuration(t *testing.T) {
	for _, c := range []struct {
		hold      time.Duration
		deliverer int // deliveries in a minute, at the least
	}{{math.MinInt64, 100}, {-1, 100}, {0, 100}, {1, 100}, {10 * time.Second, 6}, {math.MaxInt64, 1}} {
		t.Run(c.hold.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.Publish(rig.Queue, "again")
				r.Consuming(func(context.Context, *steadymq.Delivery) error {
					time.Sleep(10 * time.Millisecond)
					return steadymq.RequeueAfter(nil, c.hold)
				})
				r.Wait(time.Minute)
				assert.GreaterOrEqual(r, r.Consumer.Stats().Delivered, uint64(c.deliverer))
				assert.LessOrEqual(r, r.Consumer.Stats().Delivered, uint64(c.deliverer*60))
				require.NoError(r, r.Stop(), "the held message goes back at once")
				assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue))
			})
		})
	}
}

func TestHeldMessagesOccupyNoWorkerAndGoBackWhenTheConsumerStops(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "bad" {
				return steadymq.RequeueAfter(nil, time.Hour)
			}
			return nil
		})
		r.Broker.Publish(rig.Queue, "bad", "good")
		r.Wait(time.Second)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
		assert.Equal(r, 1, r.Broker.Unsettled(rig.Queue))
		since := time.Now()
		require.NoError(r, r.Stop())
		assert.Less(r, time.Since(since), time.Second)
		assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue))
	})
}

// What is told.

func TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn(t *testing.T) {
	cases := []struct {
		kind       string
		bad, acked int
		told       int // within an hour
	}{
		{"classic", 15, 100, 0},
		{"classic", 31, 100, 6}, // at 0, 2, 4, 8, 16 and 32 minutes
		{"classic", 32, 0, 6},
		{"quorum", 32, 0, 6},
		{"stream", 1, 31, 6}, // done, but behind one that is not
	}
	for _, c := range cases {
		t.Run(fmt.Sprint(c.kind, c.bad), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue(c.kind)
				r.PublishMany(c.bad, "bad")
				r.PublishMany(100, "good")
				h := func(_ context.Context, d *steadymq.Delivery) error {
					if string(d.Body) == "bad" {
						return errAway
					}
					return nil
				}
				if c.kind == "stream" {
					r.Consuming(h, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
				} else {
					r.Consuming(h)
				}
				r.Wait(59 * time.Minute)
				stats := r.Consumer.Stats()
				assert.InDelta(r, c.bad, stats.Held, 5, "but for those on their way there and back")
				assert.EqualValues(r, c.acked, stats.Acked)
				assert.Equal(r, c.told, r.TimesLogged("failed messages are held"), r.Log)
				require.NoError(r, r.Stop())
				assert.Zero(r, r.Consumer.Stats().Held)
			})
		})
	}
}

func TestHeldMessagesOfManySessionsAreToldOnceAMinute(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.PublishMany(32, "bad")
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return errAway })
		for range 10 {
			r.Wait(12 * time.Second)
			r.Broker.Reset()
		}
		assert.Equal(r, 2, r.TimesLogged("failed messages are held"))
	})
}

func TestHeldMessageThatIsSettledByHandIsHeldNoMore(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		got := make(chan *steadymq.Delivery, 1)
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			got <- d
			return steadymq.RequeueAfter(nil, time.Hour)
		}, steadymq.WithPrefetch(1))
		r.Broker.Publish(rig.Queue, "tea")
		require.NoError(r, (<-got).Ack())
		r.Wait(10 * time.Minute)
		assert.Zero(r, r.Consumer.Stats().Held)
		assert.LessOrEqual(r, r.TimesLogged("failed messages are held"), 1, "it is told for hours")
	})
}

func TestFailureAtTheDrainSaysWhatBecameOfTheMessage(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			_ = rig.Hold(started, release)(ctx, d)
			return errAway
		})
		r.Broker.Publish(rig.Queue, "tea")
		<-started
		r.Cancel()
		r.Wait(time.Second)
		close(release)
		r.Stop()
		line := r.Warnings("handler failed")
		require.Len(r, line, 1)
		assert.NotContains(r, line[0], "held=", "it went back at once")
		assert.Contains(r, line[0], "outcome=requeued")
	})
}

func TestWarningOfHeldMessagesSaysSinceWhenTheyAreTooMany(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			switch {
			case string(d.Body) == "bad":
				return steadymq.RequeueAfter(errAway, time.Hour)
			case !d.Redelivered:
				return steadymq.RequeueAfter(errAway, 5*time.Second)
			}
			return nil
		}, steadymq.WithPrefetch(4))
		r.PublishMany(2, "soon well")
		r.Wait(110 * time.Second)
		require.Zero(r, r.Consumer.Stats().Held)
		again := time.Now()
		r.PublishMany(2, "bad")
		r.Wait(5 * time.Minute)
		lines := r.Warnings("failed messages are held")
		require.Greater(r, len(lines), 1)
		_, since, _ := strings.Cut(lines[len(lines)-1], "since=")
		at, err := time.Parse(time.RFC3339, strings.TrimSpace(since))
		require.NoError(r, err)
		assert.WithinRange(r, at, again, again.Add(time.Second), "for 105 s nothing was held")
	})
}
