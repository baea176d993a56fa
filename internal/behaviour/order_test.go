package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"strconv"
	"strings"
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

// byKey is the ordering key of a message "key:number".
func byKey(d *steadymq.Delivery) string {
	key, _, _ := strings.Cut(string(d.Body), ":")
	return key
}

// sequence judges the order of messages "key:number", whose numbers count from 0 for each key: one
// at a time, and none before all earlier ones of its key are done.
type sequence struct {
	t testing.TB

	mu      sync.Mutex
	running map[string]int
	done    map[string]map[int]bool
	starts  []string
	most    int // handlers at once
	now     int
}

func newSequence(t testing.TB) *sequence {
	return &sequence{t: t, running: make(map[string]int), done: make(map[string]map[int]bool)}
}

func (q *sequence) hooks() steadymq.Option {
	return steadymq.WithHooks(steadymq.Hooks{Settled: func(d *steadymq.Delivery, o steadymq.Outcome) {
		if o == steadymq.Acked || o == steadymq.Discarded || o == steadymq.Parked {
			q.finish(string(d.Body))
		}
	}})
}

func (q *sequence) finish(body string) {
	key, number, _ := strings.Cut(body, ":")
	n, _ := strconv.Atoi(number)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.done[key] == nil {
		q.done[key] = make(map[int]bool)
	}
	q.done[key][n] = true
}

// wrap is a handler around h that judges when it starts.
func (q *sequence) wrap(h steadymq.Handler) steadymq.Handler {
	return func(ctx context.Context, d *steadymq.Delivery) error {
		body := string(d.Body)
		key, number, _ := strings.Cut(body, ":")
		n, _ := strconv.Atoi(number)
		q.mu.Lock()
		q.starts = append(q.starts, body)
		if q.running[key]++; q.running[key] > 1 {
			q.t.Errorf("%s starts while another of its key is at work", body)
		}
		for i := n - 1; i >= 0; i-- {
			if !q.done[key][i] {
				q.t.Errorf("%s of session %d starts before %s:%d is done", body, d.Session(), key, i)
				break
			}
		}
		q.now++
		q.most = max(q.most, q.now)
		q.mu.Unlock()
		defer func() {
			q.mu.Lock()
			defer q.mu.Unlock()
			q.running[key]--
			q.now--
		}()
		return h(ctx, d)
	}
}

func (q *sequence) started() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return append([]string(nil), q.starts...)
}

func (q *sequence) finished() (n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, all := range q.done {
		n += len(all)
	}
	return n
}

// queueOf makes the rig's queue one of a kind, without a delivery limit, with these messages.
func queueOf(r *rig.Rig, kind string, messages ...string) []steadymq.Option {
	r.Broker.DeleteQueue(rig.Queue)
	args := map[string]any{}
	if kind == "quorum" {
		args["x-delivery-limit"] = -1
	}
	r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: kind, Args: args})
	r.Broker.Publish(rig.Queue, messages...)
	return append(rig.OfType(kind), steadymq.WithOrderingKey(byKey), steadymq.WithConcurrency(4))
}

func work(d time.Duration) steadymq.Handler {
	return func(context.Context, *steadymq.Delivery) error {
		time.Sleep(d)
		return nil
	}
}

func TestSameKeyIsHandledOneAtATimeAndOthersSideBySide(t *testing.T) {
	for _, kind := range rig.QueueTypes {
		t.Run(kind, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				q := newSequence(t)
				r.Run(q.wrap(work(time.Second)), append(queueOf(r, kind, "a:0", "a:1", "a:2", "b:0", "c:0", "d:0", "b:1"), q.hooks())...)
				r.Wait(500 * time.Millisecond)
				assert.ElementsMatch(t, []string{"a:0", "b:0", "c:0", "d:0"}, q.started(), "what waits takes no worker")
				r.Wait(time.Second)
				assert.ElementsMatch(t, []string{"a:1", "b:1"}, q.started()[4:])
				r.Wait(2 * time.Second)
				assert.Equal(t, 7, q.finished())
				assert.Equal(t, 4, q.most)
			})
		})
	}
}

func TestNoKeyIsNoOrder(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		started := make(chan *steadymq.Delivery, 4)
		release := make(chan struct{})
		r.Run(rig.Hold(started, release), queueOf(r, "classic", ":0", ":1", ":2", ":3")...)
		r.Wait(time.Second)
		assert.Len(t, started, 4)
		close(release)
	})
}

func TestFailureOfAKeyIsTriedAgainInPlaceAndHoldsItsKeyOnly(t *testing.T) {
	for _, kind := range rig.QueueTypes {
		for name, fail := range map[string]func() error{
			"an error":                  func() error { return errors.New("no") },
			"a panic":                   func() error { panic("no") },
			"a Goexit":                  func() error { runtime.Goexit(); return nil },
			"Park without a park queue": func() error { return steadymq.Park(nil) },
		} {
			t.Run(kind+"/"+name, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					q := newSequence(t)
					var attempts []int
					h := func(_ context.Context, d *steadymq.Delivery) error {
						if string(d.Body) != "a:0" {
							return nil
						}
						attempts = append(attempts, d.Attempt())
						d.Body = []byte("changed") // the next try has it as it came
						if len(attempts) < 4 {
							return fail()
						}
						d.Body = []byte("a:0") // for the hook
						return nil
					}
					r.Run(q.wrap(h), append(queueOf(r, kind, "a:0", "a:1", "b:0", "b:1"), q.hooks())...)
					r.Wait(400 * time.Millisecond)
					assert.ElementsMatch(t, []string{"a:0", "b:0", "b:1"}, q.started())
					r.Wait(30 * time.Second)
					assert.Equal(t, []int{1, 2, 3, 4}, attempts)
					assert.Equal(t, 4, q.finished())
					for _, s := range r.Broker.Ledger().Settlements {
						assert.False(t, s.Requeue, "nothing goes back")
					}
				})
			})
		}
	}
}

func TestDiscardLetsTheKeyGoOn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		q := newSequence(t)
		r.Run(q.wrap(func(_ context.Context, d *steadymq.Delivery) error {
			time.Sleep(10 * time.Millisecond)
			if string(d.Body) == "a:0" {
				return steadymq.Discard(nil)
			}
			return nil
		}), append(queueOf(r, "classic", "a:0", "a:1"), q.hooks())...)
		r.Wait(200 * time.Millisecond)
		assert.Equal(t, []string{"a:0", "a:1"}, q.started())
	})
}

func TestParkLetsTheKeyGoOnOnceItsCopyIsConfirmed(t *testing.T) {
	for name, retry := range map[string]steadymq.Retry{"Park": {Park: "parked"}, "the only attempt": {Attempts: 1, Park: "parked"}} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				q := newSequence(t)
				h := q.wrap(func(_ context.Context, d *steadymq.Delivery) error {
					switch {
					case string(d.Body) != "a:0":
						return nil
					case name == "Park":
						return steadymq.Park(nil)
					}
					return errors.New("no")
				})
				options := append(queueOf(r, "classic"), steadymq.WithRetry(retry), q.hooks())
				r.Consuming(h, options...)
				r.Broker.FillQueue("parked", true)
				r.Broker.Publish(rig.Queue, "a:0", "a:1", "b:0")
				r.Wait(5 * time.Second)
				assert.ElementsMatch(t, []string{"a:0", "b:0"}, q.started())
				r.Broker.FillQueue("parked", false)
				r.Wait(40 * time.Second)
				assert.ElementsMatch(t, []string{"a:0", "b:0", "a:1"}, q.started())
				assert.Equal(t, 3, q.finished())
			})
		})
	}
}

func TestRequeueHandsBackAllLaterOnesOfItsKey(t *testing.T) {
	for _, kind := range []string{"classic", "quorum"} {
		for name, back := range map[string]error{"Requeue": steadymq.Requeue(nil), "RequeueAfter": steadymq.RequeueAfter(nil, time.Second)} {
			t.Run(kind+"/"+name, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					q := newSequence(t)
					var tries int
					h := q.wrap(func(_ context.Context, d *steadymq.Delivery) error {
						time.Sleep(50 * time.Millisecond)
						if string(d.Body) == "a:2" {
							if tries++; tries < 4 {
								return back
							}
						}
						return nil
					})
					var all []string
					for i := range 50 {
						all = append(all, fmt.Sprint("a:", i))
						all = append(all, fmt.Sprint("b:", i))
					}
					r.Run(h, append(queueOf(r, kind, all...), q.hooks(), steadymq.WithPrefetch(20))...)
					r.Wait(30 * time.Second)
					assert.Equal(t, 100, q.finished())
					assert.Equal(t, 4, tries)
					assert.Equal(t, 103, len(q.started()))
				})
			})
		}
	}
}

func TestKeyGoesOnThoughWhatWentBackDoesNotCome(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeclareQueue("other", steadymqtest.QueueOptions{})
		args := map[string]any{"x-delivery-limit": 1}
		options := queueOf(r, "quorum")
		r.Broker.DeleteQueue(rig.Queue)
		r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "quorum", Args: args})
		var handled []string
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			handled = append(handled, string(d.Body))
			if string(d.Body) == "a:0" {
				return steadymq.Requeue(nil)
			}
			return nil
		}, options...)
		r.Broker.Publish(rig.Queue, "a:0")
		r.Wait(time.Second) // the limit drops it at its second return
		r.Broker.Publish(rig.Queue, "a:1")
		r.Wait(time.Second)
		r.Broker.Publish(rig.Queue, "a:2")
		r.Wait(time.Second)
		assert.Equal(t, []string{"a:0", "a:0", "a:1", "a:2"}, handled)
	})
}

func TestHandlerOfALostSessionHoldsItsKey(t *testing.T) {
	for name, fault := range map[string]func(b *steadymqtest.Broker){
		"reset":         func(b *steadymqtest.Broker) { b.Reset() },
		"channel error": func(b *steadymqtest.Broker) { b.CloseChannels(406, "timed out") },
		"cancel":        func(b *steadymqtest.Broker) { b.CancelConsumers(rig.Queue) },
	} {
		for _, kind := range rig.QueueTypes {
			t.Run(name+"/"+kind, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					q := newSequence(t)
					h := q.wrap(work(3 * time.Second)) // whatever its context says
					r.Run(h, append(queueOf(r, kind, "a:0", "a:1", "a:2", "b:0"), q.hooks())...)
					r.Wait(time.Second)
					fault(r.Broker)
					r.Wait(time.Second)
					for _, s := range q.started() {
						assert.NotEqual(t, "a:1", s)
					}
					r.Wait(20 * time.Second)
					assert.Equal(t, 4, q.finished())
				})
			})
		}
	}
}

func TestStopWithThousandsThatWaitForAKeyIsPrompt(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		options := append(queueOf(r, "classic"), steadymq.WithPrefetch(10_000))
		for i := range 8_000 {
			r.Broker.Publish(rig.Queue, fmt.Sprint("a:", i))
		}
		q := newSequence(t)
		r.Run(q.wrap(work(time.Second)), append(options, q.hooks())...)
		r.Wait(500 * time.Millisecond)
		since := time.Now()
		require.NoError(t, r.Stop())
		assert.Less(t, time.Since(since), 700*time.Millisecond, "the drain waits for the one that runs")
		assert.Equal(t, 1, len(q.started()))
		assert.Equal(t, 7_999, r.Broker.QueueLen(rig.Queue))
		r.Run(q.wrap(rig.Ack), append(options, q.hooks())...)
		r.Wait(20 * time.Second)
		assert.Equal(t, 8_000, q.finished())
	})
}

func TestOrderSurvivesAStopWhoseHandlerFails(t *testing.T) {
	for _, kind := range rig.QueueTypes {
		t.Run(kind, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				q := newSequence(t)
				options := append(queueOf(r, kind, "a:0", "b:0", "a:1", "a:2", "a:3"), q.hooks())
				r.Run(q.wrap(func(context.Context, *steadymq.Delivery) error {
					time.Sleep(time.Second)
					return errors.New("no")
				}), options...)
				r.Wait(500 * time.Millisecond)
				require.NoError(t, r.Stop())
				r.Run(q.wrap(rig.Ack), options...)
				r.Wait(5 * time.Second)
				assert.Equal(t, 5, q.finished())
			})
		})
	}
}

func TestKeyWaitsForASettlementByHand(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		q := newSequence(t)
		r.Run(q.wrap(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "a:0" {
				require.NoError(t, d.Ack()) // and is at work for a while
				time.Sleep(time.Second)
				return nil
			}
			if string(d.Body) == "a:1" { // held, and settled meanwhile by another goroutine
				go func() {
					time.Sleep(100 * time.Millisecond)
					assert.NoError(t, d.Ack())
				}()
				return errors.New("no")
			}
			return nil
		}), append(queueOf(r, "classic", "a:0", "a:1", "a:2"), q.hooks(), steadymq.WithRequeueDelay(time.Minute, time.Minute))...)
		r.Wait(900 * time.Millisecond)
		assert.Equal(t, []string{"a:0"}, q.started())
		r.Wait(180 * time.Millisecond)
		assert.Equal(t, []string{"a:0", "a:1"}, q.started())
		r.Wait(100 * time.Millisecond)
		assert.Equal(t, []string{"a:0", "a:1", "a:2"}, q.started())
	})
}

func TestHandRequeueOfAStreamWaitsForItsHandler(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		q := newSequence(t)
		tries := 0
		r.Run(q.wrap(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "a:0" {
				if tries++; tries == 1 {
					require.NoError(t, d.Requeue())
				}
				time.Sleep(time.Second)
			}
			return nil
		}), append(queueOf(r, "stream", "a:0", "a:1"), q.hooks())...)
		r.Wait(5 * time.Second)
		assert.Equal(t, []string{"a:0", "a:0", "a:1"}, q.started())
	})
}

func TestRetryInPlaceEndsBeforeTheConsumerTimeout(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		q := newSequence(t)
		var attempts []int
		begun := time.Now()
		r.Run(q.wrap(func(_ context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "a:0" && time.Since(begun) < 40*time.Minute {
				attempts = append(attempts, d.Attempt())
				return errors.New("no")
			}
			return nil
		}), append(queueOf(r, "quorum", "a:0", "a:1", "b:0"), q.hooks())...)
		r.Wait(90 * time.Minute)
		assert.Equal(t, 3, q.finished())
		returns := 0
		for _, d := range r.Broker.Ledger().Deliveries {
			assert.Less(t, d.Settled.Sub(d.Time), 16*time.Minute)
			if d.Requeue {
				returns++
			}
		}
		assert.GreaterOrEqual(t, returns, 2, "it goes back, and a:1 with it")
		assert.Greater(t, len(attempts), 10)
	})
}

func TestKeyFunctionThatPanicsFailsItsMessage(t *testing.T) {
	for name, fail := range map[string]func(){"panic": func() { panic("no key") }, "Goexit": runtime.Goexit} {
		for _, kind := range rig.QueueTypes {
			t.Run(name+"/"+kind, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					options := queueOf(r, kind, "bad", "a:0", "a:1", "b:0", "bad", "bad", "bad", "bad", "a:2")
					q := newSequence(t)
					var mu sync.Mutex
					failed, handled := 0, 0
					options = append(options, steadymq.WithOrderingKey(func(d *steadymq.Delivery) string {
						if string(d.Body) == "bad" {
							mu.Lock()
							defer mu.Unlock()
							if failed < 7 {
								fail()
							}
							return "" // it has been mended
						}
						return byKey(d)
					}), steadymq.WithHooks(steadymq.Hooks{
						HandlerFailed: func(d *steadymq.Delivery, err error) {
							assert.ErrorAs(t, err, new(*steadymq.PanicError))
							assert.Equal(t, "bad", string(d.Body))
							mu.Lock()
							defer mu.Unlock()
							failed++
						},
						Settled: func(d *steadymq.Delivery, o steadymq.Outcome) { q.finish(string(d.Body)) },
					}))
					judged := q.wrap(work(100 * time.Millisecond))
					r.Run(func(ctx context.Context, d *steadymq.Delivery) error {
						if string(d.Body) == "bad" {
							mu.Lock()
							defer mu.Unlock()
							handled++
							return nil
						}
						return judged(ctx, d)
					}, options...)
					r.Wait(time.Minute)
					assert.Equal(t, 5, handled)
					assert.GreaterOrEqual(t, failed, 7)
					assert.Len(t, q.started(), 4)
					if kind != "stream" {
						assert.Zero(t, r.Broker.QueueLen(rig.Queue))
					}
				})
			})
		}
	}
}

func TestKeyFunctionThatHangsKeepsOneWorker(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		hang := make(chan struct{})
		q := newSequence(t)
		var told []error
		r.Run(q.wrap(rig.Ack), append(queueOf(r, "classic", "a:0", "x:0", "a:1", "b:0", "a:2"),
			steadymq.WithOrderingKey(func(d *steadymq.Delivery) string {
				if string(d.Body) == "x:0" {
					<-hang
				}
				return byKey(d)
			}),
			steadymq.WithHooks(steadymq.Hooks{
				Settled:       func(d *steadymq.Delivery, _ steadymq.Outcome) { q.finish(string(d.Body)) },
				HandlerFailed: func(_ *steadymq.Delivery, err error) { told = append(told, err) },
			}))...)
		r.Wait(500 * time.Millisecond)
		assert.Equal(t, []string{"a:0"}, q.started(), "its key may be theirs")
		r.Wait(2 * time.Second)
		assert.ElementsMatch(t, []string{"a:0", "a:1", "b:0", "a:2"}, q.started())
		assert.Contains(t, r.Log.String(), "WithOrderingKey has not returned for a second")
		close(hang)
		r.Wait(5 * time.Second)
		require.Len(t, told, 1)
		assert.ErrorContains(t, told[0], "longer than a second")
		assert.ElementsMatch(t, []string{"a:0", "a:1", "b:0", "a:2", "x:0"}, q.started())
	})
}

func TestStopThoughAKeyFunctionHangs(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		hang := make(chan struct{})
		r.Run(rig.Ack, append(queueOf(r, "classic", "a:0", "a:1"), steadymq.WithOrderingKey(func(*steadymq.Delivery) string {
			<-hang
			return ""
		}))...)
		r.Wait(time.Second)
		since := time.Now()
		require.ErrorIs(t, r.Stop(), steadymq.ErrDrainTimeout)
		assert.Less(t, time.Since(since), 27*time.Second)
		close(hang)
		r.Wait(time.Second)
		assert.Equal(t, 2, r.Broker.QueueLen(rig.Queue))
	})
}

func TestKeysInAGroup(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		g, err := steadymq.NewGroup(r.Broker.URL, steadymq.WithDialer(r.Broker.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler)), steadymq.WithOrderingKey(byKey), steadymq.WithConcurrency(4))
		require.NoError(t, err)
		var all []*sequence
		for _, queue := range []string{"one", "two"} {
			r.Broker.DeclareQueue(queue, steadymqtest.QueueOptions{})
			q := newSequence(t)
			for i := range 20 {
				r.Broker.Publish(queue, fmt.Sprint("a:", i), fmt.Sprint("b:", i))
			}
			_, err := g.Handle(queue, q.wrap(work(100*time.Millisecond)), q.hooks())
			require.NoError(t, err)
			all = append(all, q)
		}
		ctx, cancel := context.WithCancel(r.Context())
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		r.Wait(500 * time.Millisecond)
		r.Broker.Reset()
		r.Wait(10 * time.Second)
		for _, q := range all {
			assert.Equal(t, 40, q.finished())
		}
		cancel()
		require.NoError(t, <-done)
	})
}

func TestOptionsThatKeysExclude(t *testing.T) {
	for name, test := range map[string]struct {
		options []steadymq.Option
		want    string
	}{
		"nil":      {rig.Options(steadymq.WithOrderingKey(nil)), "WithOrderingKey: must not be nil"},
		"delays":   {rig.Options(steadymq.WithOrderingKey(byKey), steadymq.WithRetry(steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Second}})), "cannot be combined with the Delays of WithRetry"},
		"attempts": {rig.Options(steadymq.WithOrderingKey(byKey), steadymq.WithRetry(steadymq.Retry{Attempts: 3, Park: "p"})), "Attempts must be 0 or 1 beside WithOrderingKey"},
		"RetryMin": {rig.Options(steadymq.WithOrderingKey(byKey), steadymq.WithQueue(steadymq.Queue{RetryMin: time.Second, RetryMax: time.Second})), "cannot be combined with Queue.RetryMin"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := steadymq.New("amqp://localhost", "q", test.options...)
			require.ErrorContains(t, err, test.want)
			require.ErrorAs(t, err, new(*steadymq.OptionError))
		})
	}
}

func TestPrefetchOfKeys(t *testing.T) {
	for name, test := range map[string]struct {
		options []steadymq.Option
		want    int
	}{
		"few workers":  {rig.Options(steadymq.WithConcurrency(2)), 32},
		"many workers": {rig.Options(steadymq.WithConcurrency(8)), 80},
		"as given":     {rig.Options(steadymq.WithConcurrency(8), steadymq.WithPrefetch(9)), 9},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				options := append(queueOf(r, "classic"), test.options...)
				r.PublishMany(100, "a:0")
				started, release := make(chan *steadymq.Delivery, 100), make(chan struct{})
				r.Run(rig.Hold(started, release), options...)
				r.Wait(time.Second)
				assert.Equal(t, 100-test.want, r.Broker.QueueLen(rig.Queue))
				assert.Len(t, started, 1)
				close(release)
			})
		})
	}
}

// faultsOfOrder are what a session meets in the trials.
func faultsOfOrder(b *steadymqtest.Broker) []func() {
	return []func(){
		func() { b.Reset() },
		func() { b.CancelConsumers(rig.Queue) },
		func() { b.CloseChannels(406, "timed out") },
		func() { b.CloseConnections(320, "shutdown") },
	}
}

func TestOrderOfTwentyThousandOverResets(t *testing.T) {
	const messages, keys = 20_000, 97
	rig.Bubble(t, func(r *rig.Rig) {
		options := queueOf(r, "quorum")
		for i := range messages {
			r.Broker.Publish(rig.Queue, fmt.Sprintf("k%d:%d", i%keys, i/keys))
		}
		q := newSequence(t)
		r.Run(q.wrap(func(context.Context, *steadymq.Delivery) error {
			time.Sleep(time.Duration(rand.N(2000)) * time.Microsecond)
			return nil
		}), append(options, steadymq.WithConcurrency(8), q.hooks())...)
		resets := 0
		for ; q.finished() < messages && resets < 1000; resets++ {
			r.Wait(200 * time.Millisecond)
			r.Broker.Reset()
		}
		assert.Equal(t, messages, q.finished())
		assert.Greater(t, resets, 5)
		assert.Equal(t, 8, q.most)
	})
}

func TestOrderHoldsWhateverHappens(t *testing.T) {
	seeds := 20
	if testing.Short() {
		seeds = 5
	}
	for seed := range seeds {
		kind := rig.QueueTypes[seed%3]
		t.Run(fmt.Sprint(seed, " ", kind), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) { orderTrial(r, kind, uint64(seed)) })
		})
	}
}

func orderTrial(r *rig.Rig, kind string, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 1))
	var mu sync.Mutex
	n := func(most int) int {
		mu.Lock()
		defer mu.Unlock()
		return random.IntN(most)
	}
	messages, keys := 300, 1+n(20)
	options := queueOf(r, kind)
	for i := range messages {
		r.Broker.Publish(rig.Queue, fmt.Sprintf("k%d:%d", i%keys, i/keys))
	}
	q := newSequence(r.T)
	h := q.wrap(func(_ context.Context, d *steadymq.Delivery) error {
		time.Sleep(time.Duration(n(50)) * time.Millisecond)
		switch n(20) {
		case 0:
			return errors.New("no")
		case 1:
			return steadymq.Requeue(nil)
		case 2:
			return steadymq.RequeueAfter(nil, time.Duration(n(300))*time.Millisecond)
		case 3:
			panic("no")
		case 4:
			runtime.Goexit()
		case 5:
			return steadymq.Discard(nil)
		case 6:
			_ = d.Ack()
			time.Sleep(time.Duration(n(50)) * time.Millisecond)
		case 7:
			go func() {
				time.Sleep(time.Duration(n(50)) * time.Millisecond)
				_ = d.Discard()
			}()
			return errors.New("settled later")
		case 8:
			_ = d.Requeue()
			time.Sleep(time.Duration(n(50)) * time.Millisecond)
		}
		return nil
	})
	options = append(options, q.hooks(), steadymq.WithConcurrency(8), steadymq.WithRequeueDelay(50*time.Millisecond, time.Second), steadymq.WithPrefetch(10+n(100)))
	if kind == "stream" {
		options = append(options, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}))
	}
	r.Run(h, options...)
	for range 40 {
		r.Wait(time.Duration(n(800)) * time.Millisecond)
		faults := faultsOfOrder(r.Broker)
		if i := n(len(faults) + 1); i < len(faults) {
			if r.Consumer.State() == steadymq.Consuming { // else some of them end Run
				faults[i]()
			}
			continue
		}
		_ = r.Stop()
		r.Start(h)
	}
	r.Wait(3 * time.Minute)
	assert.Equal(r, messages, q.finished())
}

func TestOneOfAKeyThatIsKeptForLaterMayTakeUpThePrefetchAndThatIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var kept keptOnes
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if d.DeliveryTag == 1 {
				return kept.keep(ctx, d)
			}
			return nil
		}, steadymq.WithOrderingKey(byKey), steadymq.WithPrefetch(4))
		r.PublishMany(10, "a:1")
		r.Wait(10 * time.Minute)
		assert.NotEmpty(r, r.Warnings("kept to be settled later take up the prefetch"))
		require.NoError(r, kept.kept(r, 1)[0].Ack())
		assert.NoError(r, r.Stop())
	})
}

func TestKeyThatIsKeptForLaterIsNotToldOfWhileOthersGoOn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var kept keptOnes
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if byKey(d) == "a" {
				return kept.keep(ctx, d)
			}
			time.Sleep(10 * time.Second)
			return nil
		}, steadymq.WithOrderingKey(byKey), steadymq.WithPrefetch(4))
		r.Broker.Publish(rig.Queue, "a:1", "a:2")
		r.PublishMany(60, "b:1")
		r.Wait(5 * time.Minute)
		assert.Empty(r, r.Warnings("kept to be settled later"))
		require.NoError(r, kept.kept(r, 1)[0].Ack())
		r.Wait(10 * time.Minute)
		require.NoError(r, kept.kept(r, 2)[1].Ack())
		assert.NoError(r, r.Stop())
	})
}
