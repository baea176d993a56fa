package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// loop runs body over the deliveries on a goroutine of its own and returns what was yielded last,
// once the loop has ended.
func loop(ctx context.Context, c *steadymq.Consumer, body func(*steadymq.Delivery)) (result chan error) {
	result = make(chan error, 1)
	go func() {
		var last error
		defer func() { result <- last }()
		for d, err := range c.Deliveries(ctx) {
			if last = err; d != nil {
				body(d)
			}
		}
	}()
	return result
}

// looping begins a loop and waits for its first session.
func looping(r *rig.Rig, body func(*steadymq.Delivery), options ...steadymq.Option) (stop func() error) {
	r.Helper()
	r.Consumer = r.New(options...)
	ctx, cancel := context.WithCancel(r.Context())
	result := loop(ctx, r.Consumer, body)
	r.Wait(100 * time.Millisecond)
	require.Equal(r, steadymq.Consuming, r.Consumer.State())
	return func() error {
		cancel()
		return <-result
	}
}

func TestLoopIsGivenOneDeliveryAfterTheOther(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var bodies []string
		stop := looping(r, func(d *steadymq.Delivery) {
			bodies = append(bodies, string(d.Body))
			assert.Equal(r, 1, r.Consumer.Stats().Handling)
			assert.EqualValues(r, 1, d.Session())
			assert.NoError(r, d.Context().Err())
			assert.NoError(r, d.Ack())
		})
		for i := range 50 {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
		}
		r.Wait(time.Second)
		assert.Len(r, bodies, 50)
		assert.Equal(r, []string{"0", "1", "2"}, bodies[:3])
		stats := r.Consumer.Stats()
		assert.EqualValues(r, 50, stats.Delivered)
		assert.EqualValues(r, 50, stats.Acked)
		assert.Zero(r, stats.Later)
		assert.Zero(r, stats.Handling)
		assert.NoError(r, stop(), "after the end of ctx nothing is yielded")
		assert.Equal(r, steadymq.Stopped, r.Consumer.State())
		assert.Zero(r, r.OpenConnections())
	})
}

func TestNothingIsDialledBeforeALoopAndNothingTakenBeforeItAsks(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.PublishMany(10, "x")
		c := r.New(steadymq.WithPrefetch(4))
		deliveries := c.Deliveries(r.Context())
		r.Wait(time.Minute)
		assert.Zero(r, c.Stats().Dials)
		assert.Equal(r, steadymq.Idle, c.State())
		next, stop := iter.Pull2(deliveries)
		d, err, ok := next()
		require.True(r, ok)
		require.NoError(r, err)
		r.Wait(10 * time.Minute) // the body works for long: heartbeats go on
		assert.EqualValues(r, 1, c.Stats().Delivered)
		assert.EqualValues(r, 1, c.Stats().Sessions)
		assert.Equal(r, 4, r.Broker.Unsettled(rig.Queue))
		assert.NoError(r, d.Ack())
		stop()
		assert.Equal(r, 9, r.Broker.QueueLen(rig.Queue))
		assert.Equal(r, 9, len(ready(r)), "they go back as never started")
		assert.Equal(r, steadymq.Stopped, c.State())
	})
}

// ready are the messages that are in the queue, once everybody has left it.
func ready(r *rig.Rig) (bodies []string) {
	ctx, stop := context.WithTimeout(r.Context(), time.Second)
	defer stop()
	c := r.New()
	for d := range c.Deliveries(ctx) {
		bodies = append(bodies, string(d.Body))
		assert.NoError(r, d.Ack())
	}
	return bodies
}

// What the body neither acks nor puts back is held, and takes up the prefetch until it is settled
// by another goroutine.
func TestStepToTheNextDeliverySettlesNothing(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var all []*steadymq.Delivery
		stop := looping(r, func(d *steadymq.Delivery) { all = append(all, d) }, steadymq.WithPrefetch(3))
		r.PublishMany(5, "x")
		r.Wait(time.Minute)
		require.Len(r, all, 3)
		assert.Equal(r, 3, r.Consumer.Stats().Later)
		assert.Empty(r, r.Broker.Ledger().Settlements)
		require.NoError(r, all[1].Ack())
		r.Wait(time.Second)
		require.Len(r, all, 4)
		for _, d := range slices.Clone(all) {
			_ = d.Ack()
		}
		r.Wait(time.Second)
		require.Len(r, all, 5)
		assert.NoError(r, all[4].Discard())
		assert.NoError(r, stop())
		assert.EqualValues(r, 4, r.Consumer.Stats().Acked)
		assert.EqualValues(r, 1, r.Consumer.Stats().Discarded)
	})
}

func TestLoopGoesOnOverLostSessionsAndWhatItHoldsIsStale(t *testing.T) {
	faults := map[string]func(*rig.Rig){
		"reset":   func(r *rig.Rig) { r.Broker.Reset() },
		"channel": func(r *rig.Rig) { r.Broker.CloseChannels(406, "x") },
		"cancel":  func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) },
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var held []*steadymq.Delivery
				stop := looping(r, func(d *steadymq.Delivery) {
					if d.Session() == 1 {
						held = append(held, d)
						return
					}
					assert.NoError(r, d.Ack())
				}, steadymq.WithDrainTimeout(10*time.Second))
				r.PublishMany(2, "x")
				r.Wait(time.Second)
				require.Len(r, held, 2)
				fault(r)
				r.Wait(time.Second)
				if name == "cancel" {
					assert.NoError(r, held[0].Ack(), "the channel is still there")
					r.Wait(10 * time.Second)
				} else {
					assert.ErrorIs(r, held[0].Ack(), steadymq.ErrStale)
				}
				assert.ErrorIs(r, held[1].Ack(), steadymq.ErrStale)
				assert.ErrorAs(r, context.Cause(held[1].Context()), new(*steadymq.SessionError))
				r.Wait(time.Second)
				assert.EqualValues(r, 2, r.Consumer.Stats().Acked)
				assert.Zero(r, r.Consumer.Stats().Later)
				assert.NoError(r, stop())
			})
		})
	}
}

// The session is lost while the body has the delivery.
func TestDeliveryOfALostSessionEndsItsContextInTheBody(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var late []error
		stop := looping(r, func(d *steadymq.Delivery) {
			if d.Redelivered {
				assert.NoError(r, d.Ack())
				return
			}
			<-d.Context().Done()
			late = append(late, d.Ack())
		})
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		r.Broker.Reset()
		r.Wait(time.Second)
		require.Len(r, late, 1)
		assert.ErrorIs(r, late[0], steadymq.ErrStale)
		assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
		assert.EqualValues(r, 1, r.Consumer.Stats().Stale)
		assert.NoError(r, stop())
	})
}

// However the body leaves, the rest goes back, what was acked is acked, and nothing is left.
func TestLoopDrainsHoweverItsBodyLeaves(t *testing.T) {
	ways := map[string]func(c *steadymq.Consumer, ctx context.Context){
		"break": func(c *steadymq.Consumer, ctx context.Context) {
			for d := range c.Deliveries(ctx) {
				_ = d.Ack()
				break
			}
		},
		"return": func(c *steadymq.Consumer, ctx context.Context) {
			for d := range c.Deliveries(ctx) {
				_ = d.Ack()
				return
			}
		},
		"goto": func(c *steadymq.Consumer, ctx context.Context) {
			for range 3 {
				for d := range c.Deliveries(ctx) {
					_ = d.Ack()
					goto out
				}
			}
		out:
		},
		"panic": func(c *steadymq.Consumer, ctx context.Context) {
			defer func() {
				if value := recover(); value != "boom" {
					panic(fmt.Sprint("recovered ", value))
				}
				if c.State() != steadymq.Stopped {
					panic("it goes on before the drain is over")
				}
			}()
			for d := range c.Deliveries(ctx) {
				_ = d.Ack()
				panic("boom")
			}
		},
		"Goexit": func(c *steadymq.Consumer, ctx context.Context) {
			for d := range c.Deliveries(ctx) {
				_ = d.Ack()
				runtime.Goexit()
			}
		},
		"stop of Pull": func(c *steadymq.Consumer, ctx context.Context) {
			next, stop := iter.Pull2(c.Deliveries(ctx))
			d, _, _ := next()
			_ = d.Ack()
			stop()
		},
	}
	for name, leave := range ways {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.PublishMany(10, "x")
				c := r.New()
				done := make(chan struct{})
				go func() {
					defer close(done)
					leave(c, r.Context())
				}()
				<-done
				assert.Equal(r, steadymq.Stopped, c.State())
				assert.Zero(r, r.OpenConnections())
				assert.EqualValues(r, 1, c.Stats().Delivered)
				assert.EqualValues(r, 1, c.Stats().Acked)
				assert.Equal(r, 9, r.Broker.QueueLen(rig.Queue))
				assert.Zero(r, r.Broker.Unsettled(rig.Queue))
				assert.NotContains(r, r.Log.String(), "WARN")
			})
		})
	}
}

func TestLeavingALoopWaitsForWhatIsNotSettled(t *testing.T) {
	for _, settled := range []bool{true, false} {
		t.Run(fmt.Sprint("settled ", settled), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.PublishMany(3, "x")
				c := r.New(steadymq.WithDrainTimeout(5 * time.Second))
				var began time.Time
				for d, err := range c.Deliveries(r.Context()) {
					require.NoError(r, err)
					if settled {
						time.AfterFunc(3*time.Second, func() { assert.NoError(r, d.Ack()) })
					}
					began = time.Now()
					if d.DeliveryTag == 2 {
						break
					}
				}
				want, left := 3*time.Second, 1
				if !settled {
					want, left = 5*time.Second, 3
				}
				assert.InDelta(r, want, time.Since(began), float64(200*time.Millisecond))
				r.Wait(time.Second)
				assert.Equal(r, left, r.Broker.QueueLen(rig.Queue))
				assert.Zero(r, c.Stats().Later)
				if !settled { // it is in the log, and nowhere else
					assert.ErrorIs(r, r.LastChange().Cause, steadymq.ErrDrainTimeout)
					assert.Contains(r, r.Log.Last("stopped"), "2 deliveries kept for later and not settled")
				}
			})
		})
	}
}

// The body works on after the end of ctx, beyond the drain limit: the Run under it ends without it.
func TestDrainErrorIsYieldedLastToABodyThatIsLate(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.PublishMany(2, "x")
		c := r.New(steadymq.WithDrainTimeout(2 * time.Second))
		ctx, stop := context.WithCancel(r.Context())
		defer stop()
		turns, errs := 0, []error{}
		for d, err := range c.Deliveries(ctx) {
			turns++
			if err != nil {
				assert.Nil(r, d)
				errs = append(errs, err)
				continue // there is no further turn
			}
			stop()
			r.Wait(10 * time.Second)
			assert.Equal(r, steadymq.Stopped, c.State())
			assert.ErrorIs(r, d.Ack(), steadymq.ErrStale)
			assert.ErrorIs(r, context.Cause(d.Context()), steadymq.ErrDrainTimeout)
		}
		assert.Equal(r, 2, turns)
		require.Len(r, errs, 1)
		var drain *steadymq.DrainError
		require.ErrorAs(r, errs[0], &drain)
		assert.Equal(r, steadymq.DrainError{Handlers: 1, Limit: 2 * time.Second}, *drain)
		assert.Equal(r, 2, r.Broker.QueueLen(rig.Queue))
	})
}

func TestLoopYieldsWhatRunWouldReturn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c, err := steadymq.New("amqp://app:wrong@mq1.test:5672/", rig.Queue, steadymq.WithDialer(r.Broker.Dialer()))
		require.NoError(r, err)
		var errs []error
		for d, err := range c.Deliveries(r.Context()) {
			assert.Nil(r, d)
			errs = append(errs, err)
		}
		require.Len(r, errs, 1)
		assert.ErrorIs(r, errs[0], steadymq.ErrLoginRefused)
	})
}

func TestLoopWithAContextThatHasEndedYieldsNothing(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		ctx, stop := context.WithCancel(r.Context())
		stop()
		c := r.New()
		for d, err := range c.Deliveries(ctx) {
			assert.Fail(r, "a turn", "%v %v", d, err)
		}
		assert.Zero(r, c.Stats().Dials)
		assert.Equal(r, steadymq.Stopped, c.State())
	})
}

func TestPanicOfAHookIsYielded(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		c := r.New(steadymq.WithHooks(steadymq.Hooks{StateChanged: func(s steadymq.StateChange) {
			if s.To == steadymq.Consuming {
				panic("boom")
			}
		}}))
		for range 2 {
			err := <-loop(r.Context(), c, func(*steadymq.Delivery) {})
			assert.ErrorAs(r, err, new(*steadymq.PanicError))
			assert.EqualValues(r, 1, c.Stats().Dials, "no later loop begins")
		}
	})
}

func TestIteratorIsReusableAndEachLoopIsARun(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.PublishMany(6, "x")
		c := r.New()
		deliveries := c.Deliveries(r.Context())
		var earlier *steadymq.Delivery
		for range 3 {
			n := 0
			for d, err := range deliveries {
				require.NoError(r, err)
				if earlier != nil {
					assert.ErrorIs(r, earlier.Ack(), steadymq.ErrSettled, "of another Run")
				}
				require.NoError(r, d.Ack())
				earlier = d
				assert.EqualValues(r, 1, d.Session(), "counted in each Run")
				for _, err := range deliveries {
					assert.ErrorIs(r, err, steadymq.ErrRunning)
				}
				assert.ErrorIs(r, c.Run(r.Context(), rig.Ack), steadymq.ErrRunning)
				if n++; n == 2 {
					break
				}
			}
		}
		assert.EqualValues(r, 6, c.Stats().Acked)
		assert.EqualValues(r, 3, c.Stats().Connections)
		ctx, stop := context.WithCancel(r.Context()) // and a Run after it
		r.Broker.Publish(rig.Queue, "x")
		assert.NoError(r, c.Run(ctx, func(context.Context, *steadymq.Delivery) error { stop(); return nil }))
		assert.EqualValues(r, 7, c.Stats().Acked)
	})
}

func TestStopEndsALoop(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consumer = r.New()
		result := loop(r.Context(), r.Consumer, func(*steadymq.Delivery) {})
		r.Wait(time.Second)
		assert.NoError(r, r.Consumer.Stop(r.Context()))
		assert.NoError(r, <-result)
	})
}

func TestLoopRefusesWhatIsAboutHandlers(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		same := func(h steadymq.Handler) steadymq.Handler { return h }
		options := map[string]steadymq.Option{
			"WithConcurrency":    steadymq.WithConcurrency(1),
			"WithMiddleware":     steadymq.WithMiddleware(same),
			"WithHandlerTimeout": steadymq.WithHandlerTimeout(time.Second),
			"WithRequeueDelay":   steadymq.WithRequeueDelay(time.Second, time.Minute),
			"WithRetry":          steadymq.WithRetry(steadymq.Retry{Park: "parked"}),
		}
		var all []steadymq.Option
		for name, option := range options {
			err := <-loop(r.Context(), r.New(option), nil)
			var refused *steadymq.OptionError
			require.ErrorAs(r, err, &refused)
			assert.Equal(r, name, refused.Option)
			assert.Contains(r, refused.Reason, "leave it out")
			all = append(all, option)
		}
		c := r.New(all...)
		var none context.Context
		err := <-loop(none, c, nil)
		for name := range options {
			assert.ErrorContains(r, err, name)
		}
		assert.ErrorContains(r, err, "Deliveries: the context must not be nil")
		assert.Zero(r, c.Stats().Dials)
		assert.Equal(r, steadymq.Idle, c.State())
		member := grouped(r, 1, steadymq.WithConcurrency(2)).consumers[0]
		err = <-loop(r.Context(), member, nil)
		assert.ErrorContains(r, err, "Group")
		assert.NotContains(r, err.Error(), "leave it out", "the options are the group's")
	})
}

// On a stream no ack overtakes what is not settled, and the next loop begins anew.
func TestLoopOverAStream(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		var first *steadymq.Delivery
		var bodies []string
		stop := looping(r, func(d *steadymq.Delivery) {
			bodies = append(bodies, string(d.Body))
			if first == nil {
				first = d
				return
			}
			assert.NoError(r, d.Ack())
		}, rig.OfType("stream")...)
		for i := range 3 {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
		}
		r.Wait(time.Second)
		assert.Empty(r, r.Broker.Ledger().Settlements)
		require.NoError(r, first.Requeue())
		r.Wait(time.Second)
		assert.Equal(r, []string{"0", "1", "2", "0"}, bodies)
		assert.Len(r, r.Broker.Ledger().Settlements, 3)
		assert.NoError(r, stop())
	})
}

func TestBodiesGoroutinesSettle(t *testing.T) {
	b := steadymqtest.NewBroker(t)
	b.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
	const messages = 2000
	for range messages {
		b.Publish(rig.Queue, "x")
	}
	c, err := steadymq.New(b.URL, rig.Queue, steadymq.WithDialer(b.Dialer()), steadymq.WithPrefetch(64))
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var acked atomic.Int64
	for d, err := range c.Deliveries(ctx) {
		require.NoError(t, err)
		go func() {
			assert.NoError(t, d.Ack())
			if acked.Add(1) == messages {
				stop()
			}
		}()
	}
	assert.EqualValues(t, messages, c.Stats().Acked)
	assert.Zero(t, c.Stats().Later)
	assert.Zero(t, b.QueueLen(rig.Queue))
	assert.Empty(t, b.Violations())
}

// Loops follow one another, each left at a moment of its own and in a way of its own, while faults
// come. No message is lost, none settled twice, nothing is left.
func TestLoopsSurviveRandomFaults(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				random := rand.New(rand.NewPCG(seed, 2))
				r.PublishMany(60, "x")
				c := r.New(steadymq.WithPrefetch(1+random.IntN(8)), steadymq.WithDrainTimeout(4*time.Second))
				faults := time.NewTicker(700 * time.Millisecond)
				over := make(chan struct{})
				seeds := rand.New(rand.NewPCG(seed, 3))
				go func() {
					for {
						select {
						case <-faults.C:
						case <-over:
							return
						}
						switch seeds.IntN(8) {
						case 0:
							r.Broker.Reset()
						case 1:
							r.Broker.CancelConsumers(rig.Queue)
						case 2:
							r.Broker.CloseChannels(406, "x")
						}
					}
				}()
				for range 30 {
					randomLoop(r, c, random)
				}
				close(over)
				faults.Stop()
				r.Wait(time.Minute)
				acked := int(c.Stats().Acked) + len(ready(r))
				assert.GreaterOrEqual(r, acked, 60)
				assert.Zero(r, r.Broker.QueueLen(rig.Queue))
				stats := c.Stats()
				assert.Zero(r, stats.Later)
				assert.Zero(r, stats.Handling)
				assert.Equal(r, stats.Delivered, stats.Acked+stats.Requeued+stats.Stale)
				assert.Zero(r, r.OpenConnections())
			})
		})
	}
}

// randomLoop takes some deliveries, settles them now, later or never, and leaves.
func randomLoop(r *rig.Rig, c *steadymq.Consumer, random *rand.Rand) {
	ctx, stop := context.WithTimeout(r.Context(), time.Duration(100+random.IntN(3000))*time.Millisecond)
	defer stop()
	defer func() { _ = recover() }()
	for d, err := range c.Deliveries(ctx) {
		if err != nil {
			assert.True(r, errors.Is(err, steadymq.ErrDrainTimeout) || errors.As(err, new(*steadymq.SessionError)), "%v", err)
			continue
		}
		settle := d.Ack
		if random.IntN(4) == 0 {
			settle = d.Requeue
		}
		switch random.IntN(8) {
		case 0: // never
		case 1, 2:
			time.AfterFunc(time.Duration(random.IntN(3000))*time.Millisecond, func() { _ = settle() })
		default:
			_ = settle()
		}
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
		switch random.IntN(16) {
		case 0:
			return
		case 1:
			panic("boom")
		}
	}
}
