package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// diary notes when handlers start.
type diary struct {
	mu     sync.Mutex
	starts []time.Time
	bodies []string
}

func (l *diary) note(d *steadymq.Delivery) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.starts, l.bodies = append(l.starts, time.Now()), append(l.bodies, string(d.Body))
}

// does is a handler that notes its start.
func (l *diary) does(h steadymq.Handler) steadymq.Handler {
	return func(ctx context.Context, d *steadymq.Delivery) error {
		l.note(d)
		return h(ctx, d)
	}
}

func (l *diary) started() int { return len(l.times()) }

func (l *diary) times() []time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.starts)
}

func (l *diary) read() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.bodies)
}

// takes is a handler that takes so long, whatever its context says.
func takes(d time.Duration) steadymq.Handler {
	return func(context.Context, *steadymq.Delivery) error {
		time.Sleep(d)
		return nil
	}
}

// states are those that the consumer has gone through.
func states(r *rig.Rig) (all []steadymq.State) {
	for _, c := range r.Changes() {
		all = append(all, c.To)
	}
	return all
}

// consumers returns how many consumers the queue has.
func consumers(r *rig.Rig, queue string) (n int) {
	for _, c := range r.Broker.Consumers(queue) {
		if c.Ended.IsZero() {
			n++
		}
	}
	return n
}

func TestPauseHoldsWhatWasPrefetchedAndResumeGoesOn(t *testing.T) {
	for _, kind := range rig.QueueTypes {
		t.Run(kind, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue(kind)
				var l diary
				r.Consuming(l.does(rig.Ack), append(rig.OfType(kind), steadymq.WithConcurrency(3))...)
				r.Broker.Publish(rig.Queue, "a", "b")
				r.Wait(time.Second)
				r.Consumer.Pause()
				assert.Equal(r, steadymq.Paused, r.Consumer.State(), "at once")
				r.Consumer.Pause()
				r.Broker.Publish(rig.Queue, "c", "d", "e", "f", "g")
				r.Wait(30 * time.Second)
				assert.Equal(r, 2, l.started())
				assert.Equal(r, 5, r.Broker.Unsettled(rig.Queue), "held")
				r.Consumer.Resume()
				r.Consumer.Resume()
				r.Wait(10 * time.Millisecond)
				assert.ElementsMatch(r, []string{"a", "b", "c", "d", "e", "f", "g"}, l.read())
				assert.Equal(r, steadymq.Consuming, r.Consumer.State())
				assert.EqualValues(r, 1, r.Consumer.Stats().Sessions)
				assert.Zero(r, r.Broker.Ledger().Redelivered(rig.Queue))
				want := []steadymq.State{steadymq.Connecting, steadymq.Consuming, steadymq.Paused, steadymq.Consuming}
				assert.Equal(r, want, states(r))
				assert.NoError(r, r.Changes()[2].Cause)
				assert.Equal(r, "paused", steadymq.Paused.String())
			})
		})
	}
}

func TestPauseGivesBackAfterAMinuteAndResumeSubscribesAnew(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		var l diary
		r.Consuming(l.does(rig.Ack))
		r.Consumer.Pause()
		r.PublishMany(5, "tea")
		r.Wait(59 * time.Second)
		assert.Equal(r, 5, r.Broker.Unsettled(rig.Queue))
		assert.Equal(r, 1, consumers(r, rig.Queue))
		r.Wait(2 * time.Second)
		assert.Zero(r, r.Broker.Unsettled(rig.Queue))
		assert.Zero(r, consumers(r, rig.Queue))
		assert.Equal(r, 5, r.Broker.QueueLen(rig.Queue))
		r.Wait(5 * time.Hour)
		assert.Equal(r, steadymq.Paused, r.Consumer.State())
		assert.Zero(r, l.started())
		r.Consumer.Resume()
		r.Wait(20 * time.Millisecond)
		assert.Equal(r, 5, l.started())
		n := r.Consumer.Stats()
		assert.EqualValues(r, 2, n.Sessions)
		assert.EqualValues(r, 1, n.Connections)
		want := []steadymq.State{steadymq.Connecting, steadymq.Consuming, steadymq.Paused, steadymq.Connecting, steadymq.Consuming}
		assert.Equal(r, want, states(r))
		for _, m := range r.Broker.Ledger().Settlements {
			assert.NotEqual(r, steadymqtest.Reject, m.Kind, "what was never started counts towards no limit")
		}
	})
}

func TestPauseLetsRunningHandlersFinishAndSettle(t *testing.T) {
	for _, kind := range rig.QueueTypes {
		t.Run(kind, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue(kind)
				var l diary
				var mu sync.Mutex
				var ended []error
				r.Consuming(l.does(func(ctx context.Context, _ *steadymq.Delivery) error {
					time.Sleep(5 * time.Minute)
					mu.Lock()
					defer mu.Unlock()
					ended = append(ended, context.Cause(ctx))
					return nil
				}), append(rig.OfType(kind), steadymq.WithConcurrency(2))...)
				r.PublishMany(6, "tea")
				r.Wait(time.Second)
				r.Consumer.Pause()
				r.Wait(4 * time.Minute)
				assert.Equal(r, 1, consumers(r, rig.Queue), "its channel is that of the handlers")
				r.Wait(2 * time.Minute)
				assert.Zero(r, consumers(r, rig.Queue))
				assert.Equal(r, 2, l.started())
				assert.EqualValues(r, 2, r.Consumer.Stats().Acked)
				assert.Equal(r, []error{nil, nil}, ended)
				r.Consumer.Resume()
				r.Wait(16 * time.Minute)
				assert.EqualValues(r, 6, r.Consumer.Stats().Acked)
				assert.Equal(r, 6, l.started(), "nothing is done twice")
			})
		})
	}
}

func TestPauseFromHandlersHooksAndManyGoroutines(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var l diary
		var told []steadymq.State
		r.Consuming(l.does(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "stop" {
				r.Consumer.Pause()
				told = append(told, r.Consumer.State())
			}
			return nil
		}), steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			r.Changed(c)
			if c.To == steadymq.Paused {
				time.AfterFunc(10*time.Second, r.Consumer.Resume)
			}
			if c.From == steadymq.Paused && l.started() < 3 {
				r.Consumer.Pause()
			}
		}}))
		r.Broker.Publish(rig.Queue, "a", "stop", "b", "c")
		r.Wait(5 * time.Second)
		assert.Equal(r, []string{"a", "stop"}, l.read())
		assert.Equal(r, []steadymq.State{steadymq.Paused}, told)
		r.Wait(5 * time.Minute)
		assert.Equal(r, []string{"a", "stop", "b", "c"}, l.read())
		var all sync.WaitGroup
		for i := range 40 {
			all.Go(func() {
				if i%2 == 0 {
					r.Consumer.Pause()
				} else {
					r.Consumer.Resume()
				}
			})
		}
		all.Wait()
		r.Consumer.Resume()
		r.Wait(time.Minute)
		r.Broker.Publish(rig.Queue, "d")
		r.Wait(5 * time.Minute)
		assert.Equal(r, 5, l.started())
	})
}

func TestConnectionLostDuringAPauseIsHealedWithoutASession(t *testing.T) {
	for _, held := range []bool{true, false} {
		t.Run(fmt.Sprintf("held %v", held), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var l diary
				r.Consuming(l.does(rig.Ack))
				r.Consumer.Pause()
				r.PublishMany(3, "tea")
				r.Wait(10 * time.Second)
				if !held {
					r.Wait(2 * time.Minute)
				}
				r.Broker.Reset()
				r.Wait(time.Second)
				assert.Equal(r, steadymq.Paused, r.Consumer.State())
				assert.Equal(r, 1, r.OpenConnections())
				assert.Zero(r, consumers(r, rig.Queue))
				assert.Equal(r, 3, r.Broker.QueueLen(rig.Queue), "nothing is prefetched")
				r.Broker.Reset()
				r.Broker.Refuse(true)
				r.Wait(30 * time.Minute)
				assert.NotEqual(r, steadymq.Consuming, r.Consumer.State())
				r.Broker.Heal()
				r.Wait(10 * time.Second)
				assert.Equal(r, steadymq.Paused, r.Consumer.State())
				r.Broker.BlackHole(true, true)
				r.Wait(time.Minute)
				r.Broker.Heal()
				r.Wait(time.Minute)
				assert.Equal(r, steadymq.Paused, r.Consumer.State(), "the watchdog looks at it")
				assert.Zero(r, l.started())
				r.Consumer.Resume()
				r.Wait(50 * time.Millisecond)
				assert.Equal(r, 3, l.started())
				assert.EqualValues(r, 2, r.Consumer.Stats().Sessions)
			})
		})
	}
}

func TestLossAfterALongPauseIsRetriedAtOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Consumer.Pause()
		for range 20 {
			r.Wait(10 * time.Minute)
			r.Broker.Reset()
			r.Wait(time.Second)
			require.Equal(r, steadymq.Paused, r.Consumer.State())
		}
		for _, c := range r.Changes() {
			assert.LessOrEqual(r, c.Attempt, 1)
		}
		assert.LessOrEqual(r, r.LongestWait(), 20*time.Millisecond)
	})
}

func TestBrokerCancelAndOtherEndsDuringAPause(t *testing.T) {
	ends := map[string]func(r *rig.Rig){
		"cancel":        func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) },
		"channel close": func(r *rig.Rig) { r.Broker.CloseChannels(406, "timed out") },
		"320":           func(r *rig.Rig) { r.Broker.CloseConnections(320, "shutdown") },
		"530":           func(r *rig.Rig) { r.Broker.CloseConnections(530, "no more") },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var l diary
				r.Consuming(l.does(rig.Ack))
				r.Consumer.Pause()
				r.PublishMany(3, "tea")
				r.Wait(10 * time.Second)
				end(r)
				r.Wait(5 * time.Second)
				assert.Equal(r, steadymq.Paused, r.Consumer.State())
				assert.Zero(r, consumers(r, rig.Queue))
				end(r) // now there is no session
				r.Wait(5 * time.Second)
				assert.Equal(r, steadymq.Paused, r.Consumer.State())
				assert.Zero(r, l.started())
				r.Consumer.Resume()
				r.Wait(time.Second)
				assert.Equal(r, 3, l.started())
			})
		})
	}
}

func TestStopDuringAPauseIsPrompt(t *testing.T) {
	moments := map[string]func(r *rig.Rig){
		"held":        func(r *rig.Rig) { r.Wait(10 * time.Second) },
		"at once":     func(*rig.Rig) {},
		"handed back": func(r *rig.Rig) { r.Wait(2 * time.Minute) },
		"healed":      func(r *rig.Rig) { r.Broker.Reset(); r.Wait(time.Second) },
		"away":        func(r *rig.Rig) { r.Broker.Reset(); r.Broker.Refuse(true); r.Wait(time.Minute) },
		"resumed":     func(r *rig.Rig) { r.Wait(2 * time.Minute); r.Consumer.Resume() },
	}
	for name, until := range moments {
		for _, kind := range rig.QueueTypes {
			t.Run(name+" "+kind, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.RemakeQueue(kind)
					r.Consuming(rig.Ack, append(rig.OfType(kind), steadymq.WithConcurrency(4))...)
					r.Consumer.Pause()
					r.PublishMany(50, "tea")
					until(r)
					began := time.Now()
					require.NoError(r, r.Stop())
					assert.Less(r, time.Since(began), 50*time.Millisecond)
					assert.Equal(r, 50-int(r.Consumer.Stats().Acked), r.Broker.QueueLen(rig.Queue)-map[bool]int{true: int(r.Consumer.Stats().Acked)}[kind == "stream"])
					assert.Equal(r, steadymq.Stopped, r.Consumer.State())
				})
			})
		}
	}
}

func TestPauseBeforeRunAndOverRuns(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var l diary
		r.Consumer = r.New()
		r.Consumer.Pause()
		assert.Equal(r, steadymq.Idle, r.Consumer.State())
		r.PublishMany(3, "tea")
		for range 2 {
			r.Start(l.does(rig.Ack))
			r.Wait(time.Second)
			assert.Equal(r, steadymq.Paused, r.Consumer.State())
			assert.Equal(r, 1, r.OpenConnections())
			assert.Zero(r, consumers(r, rig.Queue))
			require.NoError(r, r.Stop())
			assert.Equal(r, steadymq.Stopped, r.Consumer.State())
		}
		r.Start(l.does(rig.Ack))
		r.Wait(time.Second)
		r.Broker.CloseConnections(530, "no more") // no refusal of this Run
		r.Wait(time.Second)
		assert.Zero(r, l.started())
		r.Consumer.Resume()
		r.Wait(time.Second)
		assert.Equal(r, 3, l.started())
	})
}

func TestRunThatBeginsPausedLearnsOfARefusalAfterResume(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consumer = r.New(steadymq.WithQueue(steadymq.Queue{})) // the queue is a classic one
		r.Consumer.Pause()
		r.Start(rig.Ack)
		r.Wait(time.Minute)
		require.Equal(r, steadymq.Paused, r.Consumer.State())
		r.Consumer.Resume()
		var refused *amqp.Error
		require.ErrorAs(r, <-r.Result, &refused)
		r.Result = nil
		assert.Equal(r, 406, refused.Code)
	})
}

func TestPauseDuringASetUp(t *testing.T) {
	for _, after := range []time.Duration{0, 1, 3, 5, 7, 9, 11, 13, 15, 17} {
		t.Run(fmt.Sprint(after), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var l diary
				r.PublishMany(3, "tea")
				r.Run(l.does(rig.Ack))
				r.Wait(after * time.Millisecond)
				r.Consumer.Pause()
				before := l.started()
				r.Wait(time.Second)
				assert.Equal(r, before, l.started())
				assert.Equal(r, steadymq.Paused, r.Consumer.State())
				r.Consumer.Resume()
				r.Wait(20 * time.Millisecond)
				assert.Equal(r, 3, l.started())
			})
		})
	}
}

func TestPauseOfOneConsumerOfAGroup(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 0)
		var paused, other diary
		one := p.add(paused.does(rig.Ack))
		p.add(other.does(rig.Ack))
		late := p.add(rig.Ack)
		late.Pause()
		p.start()
		one.Pause()
		for i := range 20 {
			r.Broker.Publish(p.name(0), "tea")
			r.Broker.Publish(p.name(1), "tea")
			r.Wait(10 * time.Second)
			if i == 10 {
				r.Broker.Reset()
			}
		}
		assert.Equal(r, 20, other.started())
		assert.Zero(r, paused.started())
		assert.Equal(r, []steadymq.State{steadymq.Paused, steadymq.Consuming, steadymq.Paused},
			[]steadymq.State{one.State(), p.consumers[1].State(), late.State()})
		assert.Equal(r, 1, r.OpenConnections(), "shared as before")
		one.Resume()
		r.Wait(20 * time.Millisecond)
		assert.Equal(r, 20, paused.started())
		late.Resume()
		r.Wait(20 * time.Millisecond)
		assert.Equal(r, steadymq.Consuming, late.State())
		one.Pause()
		require.NoError(r, one.Stop(r.Context()))
		late.Pause()
		r.Wait(2 * time.Minute)
		require.NoError(r, p.stop())
	})
}

func TestPausedConsumersLeaveAConnectionThatIsToGo(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 3).start()
		for _, c := range p.consumers {
			c.Pause()
		}
		r.Wait(2 * time.Minute)
		p.consumers[0].Resume()
		r.Wait(time.Second)
		p.retireConnection()
		r.Wait(10 * time.Second)
		assert.Equal(r, 1, r.OpenConnections())
		for i, c := range p.consumers {
			c.Resume()
			r.Wait(time.Second)
			assert.Equal(r, steadymq.Consuming, c.State(), "consumer %d", i)
		}
		r.Wait(time.Minute)
		require.NoError(r, p.stop())
	})
}

func TestPauseOfAStreamKeepsItsPlace(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("stream")
		var l diary
		r.Consuming(l.does(rig.Ack), rig.OfType("stream")...)
		for i := range 10 {
			r.Broker.Publish(rig.Queue, fmt.Sprint("m", i))
			r.Wait(20 * time.Second)
			if i == 2 {
				r.Consumer.Pause()
			}
			if i == 7 {
				r.Broker.Reset()
			}
		}
		r.Consumer.Resume()
		r.Wait(time.Second)
		assert.Equal(r, []string{"m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "m9"}, l.read())
		assert.NotContains(r, r.Log.String(), "failed messages are held")
	})
}

func TestPauseKeepsQueuesThatWouldEndWithIt(t *testing.T) {
	exclusive := steadymq.Queue{Type: "classic", Exclusive: true}
	kinds := map[string]struct {
		name   string
		option steadymq.Option
		stays  bool // the subscription does
	}{
		"auto-delete":       {"auto", steadymq.WithQueue(steadymq.Queue{Type: "classic", AutoDelete: true}), true},
		"exclusive":         {"own", steadymq.WithQueue(exclusive), false},
		"named by a broker": {"", steadymq.WithQueue(exclusive), false},
		"named for a function": {"", steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			q, err := ch.QueueDeclare("", false, false, true, false, nil)
			return q.Name, err
		}), true},
	}
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var l diary
				r.Consumer = r.NewFor(kind.name, kind.option)
				r.Start(l.does(rig.Ack))
				r.Wait(time.Second)
				queue := r.LastChange().Queue
				r.Consumer.Pause()
				r.Broker.Publish(queue, "a")
				r.Wait(10 * time.Minute)
				r.Broker.Publish(queue, "b")
				assert.Equal(r, kind.stays, consumers(r, queue) == 1)
				r.Consumer.Resume()
				r.Wait(time.Second)
				assert.Equal(r, []string{"a", "b"}, l.read())
			})
		})
	}
}

func TestPauseIsNoStallAndNoBacklog(t *testing.T) {
	for _, kind := range rig.QueueTypes {
		t.Run(kind, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue(kind)
				var once sync.Once
				failing := func(_ context.Context, d *steadymq.Delivery) (err error) {
					once.Do(func() { err = errors.New("no") })
					return err
				}
				r.Consuming(failing, append(rig.OfType(kind), steadymq.WithStallDetector(time.Second), steadymq.WithPrefetch(4))...)
				r.Broker.Publish(rig.Queue, "fails")
				r.Wait(100 * time.Millisecond)
				r.Consumer.Pause() // what has failed is held
				r.PublishMany(40, "tea")
				for range 60 {
					r.Wait(30 * time.Second)
					r.Consumer.Resume()
					r.Consumer.Pause()
				}
				r.Consumer.Resume()
				r.Wait(time.Minute)
				assert.Len(r, r.Warnings(""), 1, "of the handler that failed")
				assert.Empty(r, r.Causes())
				assert.EqualValues(r, 41, r.Consumer.Stats().Acked)
			})
		})
	}
}

// A broker takes back what is unsettled for too long, and closes the channel or cancels the consumer.
func TestManyShortPausesAreOneLongForTheConsumerTimeout(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var l diary
		r.Consuming(l.does(takes(time.Second)))
		r.PublishMany(32, "tea")
		for range 60 {
			r.Consumer.Pause()
			r.Wait(59 * time.Second)
			r.Consumer.Resume()
			r.Wait(500 * time.Millisecond)
		}
		r.Wait(2 * time.Minute)
		assert.Empty(r, r.Causes())
		assert.GreaterOrEqual(r, r.Consumer.Stats().Acked, uint64(32))
	}, steadymqtest.WithConsumerTimeout(30*time.Minute, steadymqtest.Form406))
}

func TestRunThatBeginsPausedSaysSoInTheLog(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consumer = r.New()
		r.Consumer.Pause()
		for run := range 2 {
			r.Start(rig.Ack)
			r.Wait(time.Second)
			assert.Len(r, r.Log.Lines("steadymq: paused"), run+1)
			require.NoError(r, r.Stop())
		}
	})
}

func TestLogOfPausesIsBounded(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Wait(10 * time.Second)
		r.Consumer.Pause()
		r.Wait(time.Minute)
		r.Consumer.Resume()
		r.Wait(time.Minute)
		assert.Len(r, r.Log.Lines("steadymq: paused"), 1)
		assert.Len(r, r.Log.Lines("steadymq: consuming"), 2)
		for range 1000 {
			r.Consumer.Pause()
			r.Wait(500 * time.Millisecond)
			r.Consumer.Resume()
			r.Wait(500 * time.Millisecond)
		}
		assert.Less(r, len(r.Log.Lines("steadymq:")), 60)
		r.Wait(time.Minute)
		assert.Contains(r, r.Log.Last("steadymq:"), "consuming")
		r.Consumer.Pause()
		before := len(r.Log.Lines("steadymq:"))
		for range 200 {
			r.Wait(10 * time.Second)
			r.Broker.Reset()
		}
		assert.Less(r, len(r.Log.Lines("steadymq:"))-before, 80)
	})
}

// pauseTrial is a consumer that a random plan pauses, resumes, strikes and stops.
type pauseTrial struct {
	*rig.Rig
	random *rand.Rand
	seed   uint64
	diary  diary
	paused bool
	since  time.Time // of the last Pause or Resume
	before int       // handlers that had started then
}

func (t *pauseTrial) handle(ctx context.Context, d *steadymq.Delivery) error {
	t.diary.note(d)
	time.Sleep(time.Duration(len(d.Body)) * 7 * time.Millisecond)
	if d.DeliveryTag%5 == 0 && d.Attempt() == 1 {
		return steadymq.RequeueAfter(errDown, time.Second)
	}
	return nil
}

// strike is a fault, or none.
func (t *pauseTrial) strike() {
	switch t.random.IntN(12) {
	case 0, 1:
		t.Broker.Reset()
	case 2:
		t.Broker.CancelConsumers(rig.Queue)
	case 3:
		t.Broker.CloseChannels(406, "delivery acknowledgement on channel 1 timed out")
	case 4:
		t.Broker.Refuse(true)
		t.Broker.FIN()
	case 5:
		t.Broker.HangAt(steadymqtest.StageConsume, true)
		t.Broker.FIN()
	case 6:
		t.Broker.BlackHole(true, true)
	case 7:
		if err := t.Stop(); err != nil {
			t.Log.Write([]byte(err.Error()))
		}
		t.Start(t.handle)
	}
}

// turn pauses or resumes, and judges what was before.
func (t *pauseTrial) turn() {
	t.judge()
	if t.paused = !t.paused; t.paused {
		t.Consumer.Pause()
	} else {
		t.Consumer.Resume()
	}
	t.since, t.before = time.Now(), t.diary.started()
}

// judge looks for a start between Pause and Resume, but for those in the instant of the Pause.
func (t *pauseTrial) judge() {
	if !t.paused {
		return
	}
	for _, at := range t.diary.times()[t.before:] {
		assert.False(t, at.After(t.since), "seed %d: a handler has started %v after Pause", t.seed, at.Sub(t.since))
	}
}

func TestRandomPausesUnderFaults(t *testing.T) {
	for seed := range uint64(30) {
		rig.Bubble(t, func(r *rig.Rig) {
			l := &pauseTrial{Rig: r, random: rand.New(rand.NewPCG(seed, 16)), seed: seed}
			kind := rig.QueueTypes[seed%3]
			r.RemakeQueue(kind)
			options := append(rig.OfType(kind), steadymq.WithConcurrency(1+l.random.IntN(4)), steadymq.WithPrefetch(8),
				steadymq.WithBackoff(100*time.Millisecond, time.Second), steadymq.WithStallDetector(time.Minute))
			if seed%2 == 0 {
				options = append(options, steadymq.WithRate(50, time.Second), breaker(3, time.Second))
			}
			r.Consumer = r.New(options...)
			r.Start(l.handle)
			for range 30 {
				r.PublishMany(l.random.IntN(6), "tea")
				if l.random.IntN(2) == 0 {
					l.turn()
				}
				l.strike()
				r.Wait(time.Duration(l.random.Int64N(int64(40 * time.Second))))
				r.Broker.Heal()
			}
			if !l.paused {
				l.turn()
			}
			r.Wait(2 * time.Minute)
			require.Equal(r, steadymq.Paused, r.Consumer.State(), "seed %d", seed)
			l.turn()
			r.Wait(100 * time.Millisecond) // a set-up takes 12 ms
			if kind == "stream" {
				r.Wait(3 * time.Second) // it may have to be looked at again
			}
			if seed%2 == 1 {
				assert.Equal(r, steadymq.Consuming, r.Consumer.State(), "seed %d: not consuming after Resume", seed)
			}
			r.Wait(10 * time.Minute)
			assert.Equal(r, steadymq.Consuming, r.Consumer.State(), "seed %d", seed)
			assert.Zero(r, r.Broker.Unsettled(rig.Queue), "seed %d: everything is settled", seed)
			if kind != "stream" {
				assert.Zero(r, r.Broker.QueueLen(rig.Queue), "seed %d", seed)
			}
			require.NoError(r, r.Stop())
		})
	}
}
