package behaviour_test

import (
	"context"
	"errors"
	"fmt"
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

func streamOptions(offset any) []steadymq.Option {
	return rig.Options(
		steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": offset}),
		steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "log", nil }),
	)
}

func TestStreamResumesAtTheFirstUnsettledMessage(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		finished := make(map[string]int)
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "m5" && d.Session() == 1 {
				<-ctx.Done()
				return ctx.Err()
			}
			finished[string(d.Body)]++
			return nil
		}, streamOptions("next")...)
		for i := range 10 {
			r.Broker.Publish("log", fmt.Sprint("m", i))
		}
		r.Wait(time.Second)
		require.Len(r, finished, 5)
		r.Broker.Reset()
		r.Broker.Publish("log", "m10") // while away: "next" would skip it
		r.Wait(time.Second)
		assert.Len(r, finished, 11)
		for body, n := range finished {
			assert.Equal(r, 1, n, body)
		}
	})
}

func TestStreamMessageThatFailsIsDeliveredAgainNotSkipped(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		var order []string
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			order = append(order, string(d.Body))
			switch {
			case string(d.Body) == "b" && d.Attempt() == 1:
				return errors.New("not yet")
			case string(d.Body) == "c":
				return steadymq.Discard(nil)
			}
			return nil
		}, append(streamOptions("first"), steadymq.WithPrefetch(1))...)
		r.Broker.Publish("log", "a", "b", "c", "d")
		r.Wait(10 * time.Second)
		assert.Equal(r, []string{"a", "b", "b", "c", "d"}, order)
		assert.Empty(r, r.Causes(), "it is tried again in place")
	})
}

func TestSlowHandlerOfAStreamCostsNoMoreDuplicatesThanThePrefetch(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
		var mu sync.Mutex
		finished := make(map[string]int)
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "m2" && d.Session() == 1 {
				<-ctx.Done()
				return ctx.Err()
			}
			mu.Lock()
			defer mu.Unlock()
			finished[string(d.Body)]++
			return nil
		}, append(streamOptions("first"), steadymq.WithPrefetch(5), steadymq.WithConcurrency(2))...)
		for i := range 100 {
			r.Broker.Publish("log", fmt.Sprint("m", i))
		}
		r.Wait(time.Second)
		assert.Len(r, finished, 6, "m0, m1 and the four that fit beside m2")
		r.Broker.Reset()
		r.Wait(time.Second)
		require.Len(r, finished, 100)
		again := 0
		for _, n := range finished {
			again += n - 1
		}
		assert.LessOrEqual(r, again, 5)
	})
}

// reading consumes a stream of the queue's name and returns what was finished.
func reading(r *rig.Rig, opts ...steadymq.Option) *[]string {
	r.Helper()
	r.Broker.DeleteQueue(rig.Queue)
	r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "stream"})
	finished := new([]string)
	r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
		*finished = append(*finished, string(d.Body))
		return nil
	}, opts...)
	return finished
}

func TestStreamMadeAnewIsReadFromItsBeginning(t *testing.T) {
	for name, options := range map[string][]steadymq.Option{
		"declared by us":      rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}), steadymq.WithQueue(steadymq.Queue{Type: "stream"})),
		"declared by another": rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"})),
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				finished := reading(r, options...)
				r.Broker.Publish(rig.Queue, "old 0", "old 1", "old 2")
				r.Wait(time.Second)
				r.Broker.DeleteQueue(rig.Queue)
				if name == "declared by another" {
					r.Wait(2 * time.Second)
					r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "stream"})
				}
				r.Wait(10 * time.Second)
				r.Broker.Publish(rig.Queue, "new 0", "new 1")
				r.Wait(10 * time.Second)
				assert.Equal(r, []string{"old 0", "old 1", "old 2", "new 0", "new 1"}, *finished)
				r.Broker.Reset() // and resumes at its place in the new one
				r.Broker.Publish(rig.Queue, "new 2")
				r.Wait(10 * time.Second)
				assert.Equal(r, []string{"old 0", "old 1", "old 2", "new 0", "new 1", "new 2"}, *finished)
			})
		})
	}
}

// A busy broker may cancel the consumers of a stream before it forgets the stream.
func TestStreamThatIsGoneSoonAfterTheCancelIsReadFromItsBeginning(t *testing.T) {
	for late := time.Duration(0); late < 60*time.Millisecond; late += time.Millisecond { // some hit the moment between look and declare
		t.Run(late.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				finished := reading(r, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}), steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
				r.Broker.Publish(rig.Queue, "old 0", "old 1", "old 2")
				r.Wait(time.Second)
				r.Broker.SetLatency(2 * time.Millisecond)
				r.Broker.CancelConsumers(rig.Queue)
				r.Wait(late)
				r.Broker.DeleteQueue(rig.Queue)
				r.Wait(10 * time.Second)
				r.Broker.Publish(rig.Queue, "new 0", "new 1")
				r.Wait(10 * time.Second)
				assert.Equal(r, []string{"old 0", "old 1", "old 2", "new 0", "new 1"}, *finished)
			})
		})
	}
}

// streaming consumes a stream of the queue's name.
func streaming(r *rig.Rig, h steadymq.Handler, options ...steadymq.Option) {
	r.RemakeQueue("stream")
	r.Consuming(h, append(rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"})), options...)...)
}

func TestStreamMessageIsTriedAgainInPlaceAfterTheSameHolds(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var tries []time.Time
		streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) != "bad" {
				return nil
			}
			tries = append(tries, time.Now())
			assert.Equal(r, len(tries), d.Attempt())
			d.DeliveryTag = 99 // it is the handler's to change
			if len(tries) < 7 {
				return errAway
			}
			return nil
		})
		r.Broker.Publish(rig.Queue, "good", "bad", "good", "good")
		r.Wait(2 * time.Second)
		assert.Equal(r, 1, len(r.Broker.Ledger().Settlements), "no ack overtakes it")
		r.Wait(5 * time.Minute)
		require.Len(r, tries, 7)
		for i := 1; i < len(tries); i++ {
			hold, want := tries[i].Sub(tries[i-1]), time.Second<<(i-1)
			assert.GreaterOrEqual(r, hold, want/2)
			assert.LessOrEqual(r, hold, want*3/2+20*time.Millisecond)
		}
		assert.Len(r, r.Broker.Ledger().Deliveries, 4, "the broker delivered each once")
		require.Len(r, r.Broker.Ledger().Settlements, 4)
		for i, s := range r.Broker.Ledger().Settlements {
			assert.EqualValues(r, i+1, s.Tag, "in the order of the stream")
		}
		stats := r.Consumer.Stats()
		assert.EqualValues(r, 4, stats.Acked)
		assert.EqualValues(r, 6, stats.Failed)
		assert.EqualValues(r, 1, stats.Sessions)
		assert.Equal(r, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale)
	})
}

func TestHandlerOfAStreamSaysWhenItIsTriedAgain(t *testing.T) {
	cases := []struct {
		name   string
		handle func(d *steadymq.Delivery) error
		tries  int
		after  time.Duration
	}{
		{"Requeue", func(*steadymq.Delivery) error { return steadymq.Requeue(errAway) }, 2, 10 * time.Millisecond},
		{"RequeueAfter", func(*steadymq.Delivery) error { return steadymq.RequeueAfter(errAway, time.Minute) }, 2, time.Minute + 10*time.Millisecond},
		{"Discard", func(*steadymq.Delivery) error { return steadymq.Discard(errAway) }, 1, 0},
		{"by hand", func(d *steadymq.Delivery) error { return d.Requeue() }, 2, 10 * time.Millisecond},
		{"by the driver's own Nack", func(d *steadymq.Delivery) error { return d.Nack(false, true) }, 2, 10 * time.Millisecond},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var tries []time.Time
				var kept *steadymq.Delivery
				streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
					if tries = append(tries, time.Now()); len(tries) == 1 {
						kept = d
						return c.handle(d)
					}
					assert.ErrorIs(r, kept.Ack(), steadymq.ErrSettled, "the try before cannot settle this one")
					return nil
				})
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(2 * time.Minute)
				require.Len(r, tries, c.tries)
				if c.tries > 1 {
					assert.InDelta(r, c.after, tries[1].Sub(tries[0]), float64(time.Millisecond))
				}
				assert.Len(r, r.Broker.Ledger().Settlements, 1)
				assert.Empty(r, r.Causes())
			})
		})
	}
}

func TestTriesInPlaceOccupyNoWorkerAndHonourTheConcurrency(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var running, most atomic.Int64
		streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
			n := running.Add(1)
			defer running.Add(-1)
			most.Store(max(most.Load(), n))
			time.Sleep(time.Second)
			if d.Attempt() < 3 {
				return errAway
			}
			return nil
		}, steadymq.WithConcurrency(2))
		r.PublishMany(20, "x")
		r.Wait(40 * time.Second)
		assert.EqualValues(r, 20, r.Consumer.Stats().Acked, "60 tries of a second by two workers, the holds cost them nothing")
		assert.EqualValues(r, 2, most.Load())
	})
}

func TestTriesInPlaceEndWithTheirSession(t *testing.T) {
	cases := map[string]func(r *rig.Rig){
		"lost":    func(r *rig.Rig) { r.Broker.Reset() },
		"stopped": func(r *rig.Rig) { require.NoError(r, r.Stop()) },
	}
	for name, end := range cases {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var sessions []uint64
				streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
					sessions = append(sessions, d.Session())
					if d.Session() > 1 {
						assert.Equal(r, 1, d.Attempt())
						return nil
					}
					return errAway
				}, steadymq.WithRequeueDelay(time.Minute, time.Hour))
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(time.Second)
				assert.Equal(r, 1, r.Consumer.Stats().Held)
				end(r)
				r.Wait(time.Hour)
				want := []uint64{1}
				if name == "lost" {
					want = []uint64{1, 2}
				}
				assert.Equal(r, want, sessions)
				stats := r.Consumer.Stats()
				assert.Zero(r, stats.Held)
				assert.Equal(r, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale)
				assert.EqualValues(r, len(want)-1, stats.Acked)
			})
		})
	}
}

func TestOneHeldMessageOfAStreamThatStopsItIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "bad" {
				return steadymq.RequeueAfter(errAway, 2*time.Hour)
			}
			return nil
		})
		r.Broker.Publish(rig.Queue, "bad")
		r.Wait(time.Second)
		r.PublishMany(100, "good")
		r.Wait(70 * time.Second)
		require.EqualValues(r, 32, r.Consumer.Stats().Delivered, "the stream stands still")
		assert.Equal(r, 1, r.TimesLogged("failed messages are held"), "a minute after it was held")
		r.Wait(time.Hour)
		assert.EqualValues(r, 32, r.Consumer.Stats().Delivered)
	})
}
