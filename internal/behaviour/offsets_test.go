package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
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

// shelf is a store that a test looks into, and that may fail.
type shelf struct {
	mu     sync.Mutex
	places map[string]int64
	saves  []saved // that succeeded
	loads  int
	calls  int // of Save

	loading, saving func(ctx context.Context) error // run first, without the lock
}

// saved is one Save.
type saved struct {
	at     time.Time
	stream string
	next   int64
}

func newShelf() *shelf { return &shelf{places: make(map[string]int64)} }

func (s *shelf) Load(ctx context.Context, stream string) (int64, bool, error) {
	s.mu.Lock()
	s.loads++
	fault := s.loading
	s.mu.Unlock()
	if fault != nil {
		if err := fault(ctx); err != nil {
			return 0, false, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	next, found := s.places[stream]
	return next, found, nil
}

func (s *shelf) Save(ctx context.Context, stream string, next int64) error {
	s.mu.Lock()
	s.calls++
	fault := s.saving
	s.mu.Unlock()
	if fault != nil {
		if err := fault(ctx); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.places[stream] = next
	s.saves = append(s.saves, saved{time.Now(), stream, next})
	return nil
}

func (s *shelf) fail(loading, saving func(context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loading, s.saving = loading, saving
}

func (s *shelf) place() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if next, ok := s.places[rig.Queue]; ok {
		return next
	}
	return -1
}

func (s *shelf) all() []saved {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.saves)
}

func (s *shelf) asked() (loads, calls int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.loads, s.calls
}

var errShelf = errors.New("the shelf is away")

func away(context.Context) error { return errShelf }

func obeys(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

// keeping are the options of a consumer that keeps its place, of a stream whose first time is "first".
func keeping(s steadymq.OffsetStore, more ...steadymq.Option) []steadymq.Option {
	return append(rig.OfType("stream"), append(more, steadymq.WithStreamOffsets(s))...)
}

// noting is a handler that notes what it is given.
func noting(handled *[]string) steadymq.Handler {
	return func(_ context.Context, d *steadymq.Delivery) error {
		*handled = append(*handled, string(d.Body))
		return nil
	}
}

// stored makes the queue a stream with n messages, named by their offsets.
func stored(r *rig.Rig, n int) {
	r.RemakeQueue("stream")
	more(r, 0, n)
}

func more(r *rig.Rig, from, to int) {
	for i := from; i < to; i++ {
		r.Broker.Publish(rig.Queue, fmt.Sprint(i))
	}
}

func numbers(from, to int) (all []string) {
	for i := from; i < to; i++ {
		all = append(all, fmt.Sprint(i))
	}
	return all
}

func TestRestartGoesOnExactlyBehindWhatWasHandled(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 5)
		store, handled := newShelf(), []string{}
		r.Consuming(noting(&handled), keeping(store)...)
		r.Wait(1100 * time.Millisecond) // the first save may have come before the last message
		require.Equal(r, int64(5), store.place())
		more(r, 5, 10)
		r.Wait(100 * time.Millisecond)
		require.NoError(r, r.Stop())
		assert.Equal(r, int64(10), store.place(), "saved at the end, less than a second after the first save")
		more(r, 10, 15)           // while away
		r.Start(noting(&handled)) // the same Consumer again
		r.Wait(time.Second)
		require.NoError(r, r.Stop())
		more(r, 15, 20)
		r.Consuming(noting(&handled), keeping(store)...) // and another process
		r.Wait(time.Second)
		assert.Equal(r, numbers(0, 20), handled)
		loads, _ := store.asked()
		assert.Equal(r, 3, loads)
	})
}

func TestOffsetsOfAFirstRunThatGotNothingSkipNothing(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 3)
		store, handled := newShelf(), []string{}
		next := rig.Options(steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "next"}), steadymq.WithStreamOffsets(store))
		r.Consuming(noting(&handled), next...)
		require.NoError(r, r.Stop())
		assert.Equal(r, int64(3), store.place(), "where the look has found the end")
		more(r, 3, 5) // while away: "next" would skip it
		r.Consuming(noting(&handled), next...)
		r.Wait(time.Second)
		assert.Equal(r, numbers(3, 5), handled)
	})
}

func TestOffsetsAreSavedAtMostOnceASecondAndNotAtAllWithoutAMove(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 0)
		store, handled := newShelf(), []string{}
		began := time.Now()
		r.Consuming(noting(&handled), keeping(store)...)
		r.Wait(10 * time.Second)
		_, calls := store.asked()
		assert.Zero(r, calls, "nothing has moved")
		for i := range 100 {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
			r.Wait(50 * time.Millisecond)
		}
		r.Wait(3 * time.Second)
		saves := store.all()
		assert.InDelta(r, 6, len(saves), 1, "in 5 s and one behind")
		for i := 1; i < len(saves); i++ {
			assert.GreaterOrEqual(r, saves[i].at.Sub(saves[i-1].at), time.Second)
			assert.Greater(r, saves[i].next, saves[i-1].next)
		}
		assert.Less(r, saves[0].at.Sub(began), 11*time.Second, "the first is saved at once")
		r.Wait(time.Minute)
		require.NoError(r, r.Stop())
		assert.Len(r, store.all(), len(saves), "nothing moved since")
		r.Consuming(noting(&handled), keeping(store)...)
		require.NoError(r, r.Stop())
		assert.Len(r, store.all(), len(saves), "a Run that only loaded saves nothing")
	})
}

func TestCrashWithoutALastSaveGivesDuplicatesOnly(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 0)
		store, handled := newShelf(), []string{}
		r.Consuming(noting(&handled), keeping(store)...)
		more(r, 0, 3)
		r.Wait(500 * time.Millisecond)
		before := store.place()
		require.GreaterOrEqual(r, before, int64(0))
		more(r, 3, 8)
		r.Wait(100 * time.Millisecond)
		store.fail(nil, away) // the process is gone before the next save
		require.NoError(r, r.Stop())
		store.fail(nil, nil)
		require.Equal(r, before, store.place())
		r.Consuming(noting(&handled), keeping(store)...)
		r.Wait(time.Second)
		assert.Equal(r, append(numbers(0, 8), numbers(int(before), 8)...), handled)
	})
}

func TestOffsetsAreNeverSavedAheadOfASlowHandler(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 30)
		store, release := newShelf(), make(chan struct{})
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			switch {
			case string(d.Body) == "5":
				<-release
			case string(d.Body) == "3" && d.Attempt() == 1:
				return errAway // tried again in place
			}
			return nil
		}, keeping(store, steadymq.WithConcurrency(4))...)
		r.Wait(200 * time.Millisecond)
		assert.LessOrEqual(r, store.place(), int64(3), "3 is held, and what is done behind it does not count") // the first save may come sooner
		r.Wait(10 * time.Second)
		assert.Equal(r, int64(5), store.place())
		close(release)
		r.Wait(2 * time.Second)
		assert.Equal(r, int64(30), store.place())
	})
}

func TestOffsetsOfAMessageThatOutlivesTheDrainLimit(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 10)
		store := newShelf()
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			if string(d.Body) == "4" {
				<-ctx.Done()
			}
			return nil // too late for 4
		}, keeping(store, steadymq.WithDrainTimeout(time.Second), steadymq.WithConcurrency(2))...)
		require.ErrorIs(r, r.Stop(), steadymq.ErrDrainTimeout)
		assert.Equal(r, int64(4), store.place())
	})
}

func TestLoadThatFailsIsTriedAgainAndNothingIsConsumedMeanwhile(t *testing.T) {
	for name, fault := range map[string]func(context.Context) error{
		"error":  away,
		"panic":  func(context.Context) error { panic("shelf") },
		"goexit": func(context.Context) error { runtime.Goexit(); return nil },
		"hangs":  obeys,
		"an error of AMQP": func(context.Context) error {
			return &amqp.Error{Code: 404, Reason: "NOT_FOUND - no queue 'orders' in vhost '/'", Server: true}
		},
		"permission": func(context.Context) error {
			return &amqp.Error{Code: 403, Reason: "ACCESS_REFUSED - no", Server: true}
		},
		"the driver's closed": func(context.Context) error { return amqp.ErrClosed },
		"login refused":       func(context.Context) error { return steadymq.ErrLoginRefused },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				stored(r, 10)
				store, handled := newShelf(), []string{}
				store.places[rig.Queue] = 6
				store.fail(fault, nil)
				r.Run(noting(&handled), keeping(store)...)
				r.Wait(2 * time.Minute)
				assert.Empty(r, handled, "it must not begin elsewhere")
				causes := r.Causes()
				require.GreaterOrEqual(r, len(causes), 6)
				assert.LessOrEqual(r, len(causes), 60, "it backs off")
				var at *steadymq.SessionError
				require.ErrorAs(r, causes[0], &at)
				assert.Equal(r, "offsets", at.Op)
				assert.Contains(r, at.Error(), "WithStreamOffsets: Load")
				assert.Equal(r, uint64(len(causes)), r.Consumer.Stats().OffsetsFailed)
				assert.Equal(r, uint64(1), r.Consumer.Stats().Connections, "the connection is not to blame")
				assert.Zero(r, r.Consumer.Stats().GivenUp)
				store.fail(nil, nil)
				r.Wait(20 * time.Second)
				assert.Equal(r, numbers(6, 10), handled)
			})
		})
	}
}

func TestLoadThatIgnoresItsContextIsLeftBehind(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 4)
		store, handled, free := newShelf(), []string{}, make(chan struct{})
		store.fail(func(context.Context) error { <-free; return nil }, nil)
		r.Run(noting(&handled), keeping(store)...)
		r.Wait(9 * time.Second)
		assert.Equal(r, uint64(1), r.Consumer.Stats().Abandoned)
		began := time.Now()
		require.NoError(r, r.Stop())
		assert.Less(r, time.Since(began), time.Second)
		store.fail(nil, nil)
		close(free)
		r.Consuming(noting(&handled), keeping(store)...)
		r.Wait(time.Second)
		assert.Equal(r, numbers(0, 4), handled)
	})
}

func TestLoadThatReturnsANegativeOffsetIsRefused(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 4)
		store, handled := newShelf(), []string{}
		store.places[rig.Queue] = -3
		r.Run(noting(&handled), keeping(store)...)
		r.Wait(time.Minute)
		assert.Empty(r, handled)
		assert.ErrorContains(r, r.Causes()[0], "returned the offset -3")
	})
}

func TestWithFatalMayEndRunBecauseOfTheStore(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 4)
		store := newShelf()
		store.fail(away, nil)
		r.Run(rig.Ack, keeping(store, steadymq.WithFatal(func(err error) bool { return errors.Is(err, errShelf) }))...)
		err := <-r.Result
		r.Result = nil
		require.ErrorIs(r, err, errShelf)
	})
}

func TestSaveThatFailsStopsNothingAndIsTold(t *testing.T) {
	for name, fault := range map[string]func(context.Context) error{
		"error":  away,
		"panic":  func(context.Context) error { panic("shelf") },
		"goexit": func(context.Context) error { runtime.Goexit(); return nil },
		"hangs":  obeys,
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				stored(r, 0)
				store, handled := newShelf(), []string{}
				store.fail(nil, fault)
				r.Consuming(noting(&handled), keeping(store)...)
				for i := range 300 {
					r.Broker.Publish(rig.Queue, fmt.Sprint(i))
					r.Wait(time.Second)
				}
				assert.Equal(r, numbers(0, 300), handled)
				assert.Equal(r, uint64(1), r.Consumer.Stats().Sessions)
				assert.GreaterOrEqual(r, r.Consumer.Stats().OffsetsFailed, uint64(50))
				lines := r.Warnings("cannot be saved")
				assert.InDelta(r, 5, len(lines), 1, "one a minute")
				assert.Regexp(r, `failing=4m\d`, lines[len(lines)-1])
				store.fail(nil, nil)
				r.Wait(10 * time.Second)
				assert.Equal(r, int64(300), store.place(), "saved though nothing moves any more")
				assert.Equal(r, 1, r.TimesLogged("saved again"))
				require.NoError(r, r.Stop())
				r.Consuming(noting(&handled), keeping(store)...)
				r.Wait(time.Second)
				assert.Len(r, handled, 300)
			})
		})
	}
}

func TestNoOtherSaveBeginsWhileOneThatWasLeftBehindRuns(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 0)
		store, handled, free := newShelf(), []string{}, make(chan struct{})
		store.fail(nil, func(context.Context) error { <-free; return nil })
		r.Consuming(noting(&handled), keeping(store)...)
		for i := range 60 {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
			r.Wait(time.Second)
		}
		_, calls := store.asked()
		assert.Equal(r, 1, calls, "a late end must not overwrite what came later")
		assert.Equal(r, uint64(1), r.Consumer.Stats().Abandoned)
		store.fail(nil, nil)
		close(free)
		r.Wait(3 * time.Second)
		assert.Equal(r, int64(60), store.place())
		assert.Equal(r, []int64{1, 60}, []int64{store.all()[0].next, store.all()[1].next})
	})
}

func TestStopWithASaveThatHangsKeepsToTheCloseLimit(t *testing.T) {
	for name, obedient := range map[string]bool{"ignores its context": false, "ends with its context": true} {
		for _, under := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, under way %v", name, under), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					stored(r, 0)
					store, handled, free := newShelf(), []string{}, make(chan struct{})
					hang := func(context.Context) error { <-free; return errShelf }
					if obedient {
						hang = obeys
					}
					r.Consuming(noting(&handled), keeping(store)...)
					more(r, 0, 1)
					r.Wait(100 * time.Millisecond)
					store.fail(nil, hang)
					more(r, 1, 2)
					r.Wait(100 * time.Millisecond)
					if under {
						r.Wait(2 * time.Second)
					}
					began := time.Now()
					require.NoError(r, r.Stop())
					took := time.Since(began)
					assert.LessOrEqual(r, took, 5*time.Second+100*time.Millisecond)
					if !under {
						assert.GreaterOrEqual(r, took, 4*time.Second, "it has the limit")
					}
					want := uint64(1)
					if obedient {
						want = 0
					}
					assert.Equal(r, want, r.Consumer.Stats().Abandoned)
					assert.NotEmpty(r, r.Warnings("cannot be saved"))
					close(free)
					r.Wait(time.Second)
					assert.Equal(r, int64(1), store.place())
				})
			})
		}
	}
}

func TestOffsetsOverLostSessions(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 0)
		store, handled := newShelf(), []string{}
		r.Consuming(noting(&handled), keeping(store)...)
		for i := range 20 {
			more(r, 10*i, 10*i+10)
			switch i % 4 {
			case 0:
				r.Broker.Reset()
			case 1:
				r.Broker.CancelConsumers(rig.Queue)
			}
			r.Wait(15 * time.Second)
			assert.Equal(r, int64(10*i+10), store.place())
		}
		assert.Equal(r, numbers(0, 200), rig.Firsts(handled))
		loads, _ := store.asked()
		assert.Equal(r, 1, loads, "a later session knows the place")
	})
}

func TestOffsetsOfAStreamMadeAnewWhileAwayBeginAtItsBeginning(t *testing.T) {
	for name, options := range map[string][]steadymq.Option{
		"declared by us":      rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "stream"})),
		"declared by another": rig.OfType("stream"),
	} {
		for _, length := range []int{0, 1, 5, 9} {
			t.Run(fmt.Sprint(name, length), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					stored(r, length)
					store, handled := newShelf(), []string{}
					store.places[rig.Queue] = 10
					r.Run(noting(&handled), append(options, steadymq.WithStreamOffsets(store))...)
					r.Wait(30 * time.Second)
					assert.Equal(r, steadymq.Consuming, r.Consumer.State())
					assert.Equal(r, int64(length), store.place(), "the place follows")
					more(r, length, 30)
					r.Wait(3 * time.Second)
					assert.Equal(r, numbers(0, 30), handled)
					assert.Len(r, r.Warnings("made anew, and is read from its beginning"), 1)
					assert.Equal(r, int64(30), store.place())
				})
			})
		}
	}
}

func TestOffsetsOfAStreamThatDoesNotExistAtTheStart(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeleteQueue(rig.Queue)
		store, handled := newShelf(), []string{}
		store.places[rig.Queue] = 10
		r.Run(noting(&handled), keeping(store)...)
		r.Wait(10 * time.Second)
		assert.Equal(r, int64(0), store.place(), "who is away next must not ask for 10")
		stored(r, 20)
		r.Wait(20 * time.Second)
		assert.Equal(r, numbers(0, 20), handled)
	})
}

func TestOffsetsOfAStreamMadeAnewWhileRunning(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 10)
		store, handled := newShelf(), []string{}
		r.Consuming(noting(&handled), keeping(store)...)
		r.Wait(2 * time.Second)
		require.Equal(r, int64(10), store.place())
		r.Broker.DeleteQueue(rig.Queue)
		r.Wait(3 * time.Second)
		assert.Equal(r, int64(0), store.place())
		stored(r, 5)
		r.Wait(10 * time.Second)
		assert.Equal(r, append(numbers(0, 10), numbers(0, 5)...), handled)
		require.NoError(r, r.Stop())
		assert.Equal(r, int64(5), store.place())
		more(r, 5, 7)
		r.Consuming(noting(&handled), keeping(store)...)
		r.Wait(time.Second)
		assert.Equal(r, append(numbers(0, 10), numbers(0, 7)...), handled)
	})
}

// What the look gives to the consumer is one message of the stream, which is not the handler's.
func TestOffsetsAreVerifiedByALookThatReadsNoMoreThanAMessage(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 100)
		store, handled := newShelf(), []string{}
		store.places[rig.Queue] = 100
		began := time.Now()
		r.Run(noting(&handled), keeping(store)...)
		for r.Consumer.State() != steadymq.Consuming {
			r.Wait(time.Millisecond)
		}
		assert.Less(r, time.Since(began), 100*time.Millisecond, "a stream that is as it was costs no wait")
		r.Wait(time.Second)
		assert.Empty(r, handled)
		assert.Len(r, r.Broker.Ledger().Deliveries, 1)
		assert.Empty(r, r.Causes())
		more(r, 100, 103)
		r.Wait(time.Second)
		assert.Equal(r, numbers(100, 103), handled)
	})
}

// A replica that the consumer is led to may be behind, and everything would come again.
func TestStreamThatReachesItsPlaceALittleLaterIsNotReadAgain(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 9)
		store, handled := newShelf(), []string{}
		store.places[rig.Queue] = 10
		r.Run(noting(&handled), keeping(store)...)
		r.Wait(220 * time.Millisecond)
		require.Len(r, r.Causes(), 1)
		assert.ErrorContains(r, r.Causes()[0], "no message at or behind offset 9")
		more(r, 9, 12)
		r.Wait(5 * time.Second)
		assert.Equal(r, numbers(10, 12), handled)
	})
}

// A stream that is stuck is not one that was made anew, and must not come again as a whole.
func TestStreamThatGivesNothingForAWhileIsNotReadAgain(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 10)
		store, handled := newShelf(), []string{}
		store.places[rig.Queue] = 10
		r.Broker.QuorumStall(rig.Queue, true)
		r.Run(noting(&handled), keeping(store)...)
		r.Wait(time.Minute)
		assert.Empty(r, r.Warnings("is read from its beginning"))
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[len(r.Causes())-1], "the broker gives none of them in time")
		assert.Equal(r, int64(10), store.place())
		r.Broker.QuorumStall(rig.Queue, false)
		more(r, 10, 12)
		r.Wait(12 * time.Second)
		assert.Equal(r, numbers(10, 12), handled)
	})
}

func TestMessageBeforeThePlaceThatCannotBeReadIsThere(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 9)
		r.Broker.Publish(rig.Queue, strings.Repeat("9", 100))
		store, handled := newShelf(), []string{}
		store.places[rig.Queue] = 10
		r.Consuming(noting(&handled), keeping(store, steadymq.WithMaxMessageSize(50))...)
		more(r, 10, 12)
		r.Wait(5 * time.Second)
		assert.Equal(r, numbers(10, 12), handled)
		assert.Empty(r, r.Causes())
	})
}

func TestOffsetsMoveOverMessagesThatCannotBeRead(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 2)
		store, handled := newShelf(), []string{}
		r.Consuming(noting(&handled), keeping(store)...)
		r.Wait(2 * time.Second)
		r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{RawHeaders: rig.HeaderTable('?', 1), Body: []byte("no offset")})
		r.Wait(2 * time.Second)
		assert.Equal(r, int64(3), store.place())
		assert.Equal(r, numbers(0, 2), handled)
	})
}

func TestGroupKeepsThePlaceOfEachStream(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 10)
		r.Broker.DeclareQueue("other", steadymqtest.QueueOptions{Type: "stream"})
		r.Broker.Publish("other", "a", "b", "c")
		store := newShelf()
		run := func() (all []string) {
			g, err := steadymq.NewGroup(r.Broker.URLs()[0], append(keeping(store), steadymq.WithDialer(r.Broker.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler)))...)
			require.NoError(r, err)
			var mu sync.Mutex
			h := func(_ context.Context, d *steadymq.Delivery) error {
				mu.Lock()
				defer mu.Unlock()
				all = append(all, string(d.Body))
				return nil
			}
			for _, queue := range []string{rig.Queue, "other"} {
				_, err = g.Handle(queue, h)
				require.NoError(r, err)
			}
			_, err = g.Handle("other", h)
			require.ErrorContains(r, err, "WithStreamOffsets", "the same place twice")
			_, err = g.Handle("other", h, steadymq.WithStreamOffsets(newShelf()))
			require.NoError(r, err)
			_, err = g.Handle("plain", h, steadymq.WithConsumeArgs(nil))
			require.ErrorContains(r, err, "WithStreamOffsets", "no stream")
			ctx, stop := context.WithCancel(r.Context())
			result := make(chan error)
			go func() { result <- g.Run(ctx) }()
			r.Wait(2 * time.Second)
			stop()
			require.NoError(r, <-result)
			return all
		}
		assert.Len(r, run(), 10+3+3)
		assert.Equal(r, int64(10), store.place())
		assert.Equal(r, int64(3), store.places["other"])
		more(r, 10, 11)
		assert.ElementsMatch(r, []string{"10", "a", "b", "c"}, run())
	})
}

// A store that hangs must not cost the others of the group their connection.
func TestGroupWhoseStoreHangsConsumesTheOtherQueues(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 10)
		r.Broker.DeclareQueue("plain", steadymqtest.QueueOptions{})
		store := newShelf()
		store.fail(obeys, nil)
		g, err := steadymq.NewGroup(r.Broker.URLs()[0], steadymq.WithDialer(r.Broker.Dialer()), steadymq.WithLogger(slog.New(slog.DiscardHandler)))
		require.NoError(r, err)
		_, err = g.Handle(rig.Queue, rig.Ack, keeping(store)...)
		require.NoError(r, err)
		plain, err := g.Handle("plain", rig.Ack)
		require.NoError(r, err)
		ctx, stop := context.WithCancel(r.Context())
		result := make(chan error)
		go func() { result <- g.Run(ctx) }()
		r.Wait(5 * time.Minute)
		assert.Equal(r, uint64(1), plain.Stats().Sessions)
		assert.Equal(r, uint64(1), g.Stats().Connections)
		stop()
		require.NoError(r, <-result)
	})
}

func TestOffsetsOfTheStreamThatATopologyNames(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stored(r, 4)
		r.Broker.DeclareQueue("second", steadymqtest.QueueOptions{Type: "stream"})
		r.Broker.Publish("second", "x", "y", "z")
		store, handled, name := newShelf(), []string{}, rig.Queue
		store.places["second"] = 1
		r.Consuming(noting(&handled), keeping(store, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return name, nil }))...)
		r.Wait(2 * time.Second)
		name = "second"
		r.Broker.Reset()
		r.Wait(5 * time.Second)
		assert.Equal(r, append(numbers(0, 4), "y", "z"), handled)
		assert.Equal(r, map[string]int64{rig.Queue: 4, "second": 3}, store.places)
	})
}

func TestWithStreamOffsetsRefuses(t *testing.T) {
	stream := rig.OfType("stream")
	var none *shelf
	for name, options := range map[string][]steadymq.Option{
		"nil":            append(stream, steadymq.WithStreamOffsets(nil)),
		"a nil pointer":  append(stream, steadymq.WithStreamOffsets(none)),
		"no stream":      rig.Options(steadymq.WithStreamOffsets(newShelf())),
		"a quorum queue": rig.Options(steadymq.WithStreamOffsets(newShelf()), steadymq.WithQueue(steadymq.Queue{})),
	} {
		_, err := steadymq.New("amqp://h/", "q", options...)
		var refused *steadymq.OptionError
		require.ErrorAs(t, err, &refused, name)
		assert.Equal(t, "WithStreamOffsets", refused.Option, name)
	}
	_, err := steadymq.New("amqp://h/", "q", steadymq.WithStreamOffsets(newShelf()), steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
	require.NoError(t, err)
}

// trial is one life of a stream with restarts and faults at random. Whatever happens, the place in
// the store is not ahead of what was handled, and in the end all was handled.
func trial(t *testing.T, seed uint64) {
	rig.Bubble(t, func(r *rig.Rig) {
		random := rand.New(rand.NewPCG(seed, 16))
		stored(r, 0)
		store := newShelf()
		var mu sync.Mutex
		ofHandlers := rand.New(rand.NewPCG(seed, 17)) // under mu
		done := make(map[string]bool)
		handler := func(ctx context.Context, d *steadymq.Delivery) error {
			mu.Lock()
			work, fails := time.Duration(ofHandlers.IntN(40))*time.Millisecond, ofHandlers.IntN(20) == 0
			mu.Unlock()
			select {
			case <-time.After(work):
			case <-ctx.Done():
				return ctx.Err()
			}
			if fails {
				return errAway
			}
			mu.Lock()
			defer mu.Unlock()
			done[string(d.Body)] = true
			return nil
		}
		check := func() {
			mu.Lock()
			defer mu.Unlock()
			for i := range store.place() {
				require.True(r, done[fmt.Sprint(i)], "%d is skipped: saved %d", i, store.place())
			}
		}
		faults := []func(context.Context) error{nil, nil, away, obeys, func(context.Context) error { panic("shelf") }}
		options := keeping(store, steadymq.WithConcurrency(1+random.IntN(6)), steadymq.WithPrefetch(6+random.IntN(30)), steadymq.WithDrainTimeout(time.Second))
		published := 0
		for range 8 { // lives of the process
			store.fail(faults[random.IntN(len(faults))], faults[random.IntN(len(faults))])
			r.Run(handler, options...)
			for range random.IntN(12) {
				n := random.IntN(40)
				more(r, published, published+n)
				published += n
				switch random.IntN(6) {
				case 0:
					r.Broker.Reset()
				case 1:
					r.Broker.CancelConsumers(rig.Queue)
				case 2:
					store.fail(faults[random.IntN(len(faults))], faults[random.IntN(len(faults))])
				}
				r.Wait(time.Duration(random.IntN(1500)) * time.Millisecond)
				check()
			}
			_ = r.Stop()
			check()
		}
		store.fail(nil, nil)
		r.Run(handler, options...)
		r.Wait(5 * time.Minute)
		require.NoError(r, r.Stop())
		assert.Equal(r, int64(published), store.place())
		check()
	})
}

func TestRestartsAtRandomSkipNothing(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { trial(t, seed) })
	}
}
