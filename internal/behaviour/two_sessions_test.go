package behaviour_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"slices"
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

// staged is a consumer of a stream whose handlers end when the test says so. A handler is named by
// its session and its message: "2:m0".
type staged struct {
	*rig.Rig
	mu      sync.Mutex
	begun   []string
	gates   map[string]chan error
	free    uint64 // from this session on handlers end by themselves
	running map[string]bool
}

func newStaged(r *rig.Rig, free uint64) *staged {
	r.RemakeQueue("stream")
	return &staged{Rig: r, gates: make(map[string]chan error), free: free, running: make(map[string]bool)}
}

func (s *staged) gate(name string) chan error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gates[name] == nil {
		s.gates[name] = make(chan error, 1)
	}
	return s.gates[name]
}

func (s *staged) handle(ctx context.Context, d *steadymq.Delivery) error {
	name := fmt.Sprintf("%d:%s", d.Session(), d.Body)
	gate := s.gate(name)
	s.mu.Lock()
	s.begun = append(s.begun, name)
	s.running[name] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.running, name)
	}()
	if d.Session() >= s.free {
		return nil
	}
	select {
	case err := <-gate:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// finish lets a handler end.
func (s *staged) finish(name string, err error) {
	s.gate(name) <- err
	s.Wait(20 * time.Millisecond)
}

// started are all handlers so far, by name: workers begin in any order.
func (s *staged) started() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(slices.Values(s.begun))
}

func (s *staged) atWork() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.running))
}

// acked are the settlements so far, each as its consumer, counted from 1, and its tag: "2:1". All of
// them have to be acks in force.
func (s *staged) acked() (all []string) {
	s.Helper()
	ledger := s.Broker.Ledger()
	for _, settled := range ledger.Settlements {
		assert.Equal(s, steadymqtest.Ack, settled.Kind)
		assert.Equal(s, steadymqtest.Valid, settled.Verdict)
		consumer := slices.IndexFunc(ledger.Consumers, func(c steadymqtest.ConsumerRecord) bool { return c.Session == settled.Session })
		all = append(all, fmt.Sprintf("%d:%d", consumer+1, settled.Tag))
	}
	return all
}

// publish puts m0, m1 and so on into the stream.
func (s *staged) publish(from, to int) {
	for i := from; i < to; i++ {
		s.Broker.Publish(rig.Queue, fmt.Sprint("m", i))
	}
	s.Wait(20 * time.Millisecond)
}

// names are those of a session's handlers.
func names(session, from, to int) (all []string) {
	for i := from; i < to; i++ {
		all = append(all, fmt.Sprintf("%d:m%d", session, i))
	}
	return all
}

// tags are those of a consumer.
func tags(consumer, from, to int) (all []string) {
	for i := from; i <= to; i++ {
		all = append(all, fmt.Sprintf("%d:%d", consumer, i))
	}
	return all
}

var fromFirst = steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"})

// orders are all orders of 0, 1, 2 and 3.
func orders() (all [][]int) {
	for n := range 256 {
		order := []int{n & 3, n >> 2 & 3, n >> 4 & 3, n >> 6 & 3}
		if len(slices.Compact(slices.Sorted(slices.Values(order)))) == 4 {
			all = append(all, order)
		}
	}
	return all
}

// Handlers may end in any order and the session at any moment: acks go out in the order of the
// stream, and the next session begins at the first that was not acked.
func TestStreamResumesExactlyBehindWhatWasAckedInOrder(t *testing.T) {
	ends := map[string]error{"ack": nil, "discard": steadymq.Discard(nil)}
	for name, end := range ends {
		for _, order := range orders() {
			for done := range len(order) + 1 {
				t.Run(fmt.Sprint(name, " ", order[:done], " of ", order), func(t *testing.T) {
					rig.Bubble(t, func(r *rig.Rig) {
						s := newStaged(r, 2)
						r.Consuming(s.handle, fromFirst, steadymq.WithConcurrency(4), steadymq.WithPrefetch(4))
						s.publish(0, 4)
						require.Equal(r, names(1, 0, 4), s.started())
						prefix := 0
						for i, m := range order[:done] {
							s.finish(fmt.Sprint("1:m", m), end)
							for slices.Contains(order[:i+1], prefix) {
								prefix++
							}
							require.Equal(r, tags(1, 1, prefix), s.acked())
						}
						r.Broker.Refuse(true)
						r.Broker.Reset()
						s.publish(4, 6)
						r.Broker.Refuse(false)
						r.Wait(5 * time.Second)
						assert.Equal(r, append(names(1, 0, 4), names(2, prefix, 6)...), s.started())
						assert.ElementsMatch(r, append(tags(1, 1, prefix), tags(2, 1, 6-prefix)...), s.acked())
					})
				})
			}
		}
	}
}

// Two workers, one of them slow: no more is given than the prefetch, and nothing overtakes.
func TestStreamWaitsForItsSlowWorker(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		s := newStaged(r, 2)
		r.Consuming(s.handle, fromFirst, steadymq.WithConcurrency(2), steadymq.WithPrefetch(4))
		s.publish(0, 10)
		for _, m := range []int{1, 2, 3} {
			s.finish(fmt.Sprint("1:m", m), nil)
		}
		assert.Equal(r, names(1, 0, 4), s.started())
		assert.Empty(r, s.acked())
		s.finish("1:m0", nil)
		assert.Equal(r, tags(1, 1, 4), s.acked())
		assert.Equal(r, names(1, 0, 6), s.started())
		s.finish("1:m5", nil) // the second worker goes on alone
		s.finish("1:m6", nil)
		assert.Equal(r, tags(1, 1, 4), s.acked())
		s.finish("1:m4", nil)
		assert.Equal(r, tags(1, 1, 7), s.acked())
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Equal(r, append(names(1, 0, 9), names(2, 7, 10)...), s.started())
		assert.ElementsMatch(r, append(tags(1, 1, 7), tags(2, 1, 3)...), s.acked())
	})
}

// What is tried again in place holds its place.
func TestStreamHoldsThePlaceOfWhatIsTriedAgain(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		s := newStaged(r, 2)
		r.Consuming(s.handle, fromFirst, steadymq.WithConcurrency(2), steadymq.WithPrefetch(4))
		s.publish(0, 4)
		s.finish("1:m0", steadymq.RequeueAfter(errAway, time.Minute))
		s.finish("1:m1", nil)
		s.finish("1:m2", nil)
		assert.Empty(r, s.acked())
		r.Wait(59 * time.Second)
		assert.Equal(r, []string{"1:m3"}, s.atWork())
		r.Wait(2 * time.Second)
		assert.Equal(r, []string{"1:m0", "1:m3"}, s.atWork())
		s.finish("1:m0", nil)
		assert.Equal(r, tags(1, 1, 3), s.acked())
		assert.EqualValues(r, 3, r.Consumer.Stats().Acked)
	})
}

// After a basic.cancel the old session settles while its successor consumes: what it settles late
// is acked on its own channel and moves nobody's place.
func TestLateSettlementsOfTheOldSessionMoveNoPlace(t *testing.T) {
	for name, late := range map[string][]string{
		"in order": {"1:m1", "1:m2"}, "out of order": {"1:m2", "1:m1"},
		"the first only": {"1:m1"}, "the second only": {"1:m2"}, "none": nil,
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				s := newStaged(r, 3)
				r.Consuming(s.handle, fromFirst, steadymq.WithConcurrency(4), steadymq.WithPrefetch(4), steadymq.WithDrainTimeout(time.Hour))
				s.publish(0, 6)
				s.finish("1:m0", nil)
				require.Equal(r, names(1, 0, 5), s.started())
				s.finish("1:m3", nil) // done, and not acked: it comes again
				r.Broker.CancelConsumers(rig.Queue)
				r.Wait(5 * time.Second)
				require.EqualValues(r, 2, r.Consumer.Stats().Sessions)
				require.Equal(r, append(names(1, 0, 5), names(2, 1, 2)...), s.started(), "three workers are with the old session still")

				want := tags(1, 1, 1)
				acked := make(map[string][]string) // of which tags follow
				acked["1:m1"], acked["1:m2"] = []string{"1:2"}, []string{"1:3"}
				for _, handler := range late {
					s.finish(handler, nil)
					want = append(want, acked[handler]...)
					require.Equal(r, want, s.acked())
				}
				r.Broker.Reset() // and with the connection both sessions go
				r.Wait(5 * time.Second)
				begun := s.started()
				assert.Equal(r, names(3, 1, 6), begun[len(begun)-5:], "nothing of the successor was settled")
				assert.ElementsMatch(r, append(want, tags(3, 1, 5)...), s.acked())
				s.publish(6, 7)
				assert.Equal(r, "3:m6", s.started()[len(begun)])
			})
		})
	}
}

// Nor do they where both sessions count from the same tag.
func TestLateSettlementsWithTheTagsOfTheSuccessorMoveNoPlace(t *testing.T) {
	for _, late := range [][]string{{"1:m2"}, {"1:m3"}, {"1:m2", "1:m3"}, {"1:m3", "1:m2"}} {
		t.Run(fmt.Sprint(late), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				s := newStaged(r, 3)
				s.publish(0, 6)
				r.Consuming(s.handle, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": 2}),
					steadymq.WithConcurrency(2), steadymq.WithPrefetch(4), steadymq.WithDrainTimeout(time.Hour))
				r.Broker.CancelConsumers(rig.Queue)
				r.Wait(5 * time.Second)
				for _, handler := range late {
					s.finish(handler, nil)
				}
				begun := append(names(1, 2, 4), names(2, 2, 2+len(late))...)
				require.Equal(r, begun, s.started())
				r.Broker.Reset()
				r.Wait(5 * time.Second)
				again := slices.DeleteFunc(s.started()[len(begun):], func(handler string) bool {
					return strings.HasPrefix(handler, "2:") // a worker that the reset has set free may start one more
				})
				assert.Equal(r, names(3, 2, 6), again)
			})
		})
	}
}

// The same, but the successor gets ahead of the old session before it is lost.
func TestSuccessorsPlaceStandsWhateverTheOldSessionSettles(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		s := newStaged(r, 2)
		r.Consuming(s.handle, fromFirst, steadymq.WithConcurrency(2), steadymq.WithPrefetch(4), steadymq.WithDrainTimeout(time.Hour))
		s.publish(0, 8)
		s.finish("1:m0", nil)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(5 * time.Second)
		require.Equal(r, names(1, 0, 3), s.started(), "both workers are with the old session")
		s.finish("1:m2", nil) // one of them reads all of the rest
		r.Wait(time.Second)
		require.Equal(r, append(names(1, 0, 3), names(2, 1, 8)...), s.started())
		require.Equal(r, append([]string{"1:1", "1:3"}, tags(2, 1, 7)...), s.acked())
		s.finish("1:m1", nil) // far behind
		require.Equal(r, "1:2", s.acked()[9])
		r.Broker.Reset()
		s.publish(8, 10)
		r.Wait(5 * time.Second)
		assert.Equal(r, append(append(names(1, 0, 3), names(2, 1, 8)...), names(3, 8, 10)...), s.started(), "nothing again")
	})
}

// What handlers settle of a stream that is gone says nothing of the one that has its name next.
func TestLateSettlementsOfAStreamThatIsGoneMoveNoPlace(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		s := newStaged(r, 2)
		r.Consuming(s.handle, fromFirst, steadymq.WithConcurrency(2), steadymq.WithPrefetch(4), steadymq.WithDrainTimeout(time.Hour))
		s.publish(0, 4)
		s.finish("1:m0", nil)
		require.Equal(r, []string{"1:m1", "1:m2"}, s.atWork())
		r.Broker.DeleteQueue(rig.Queue)
		r.Wait(10 * time.Second) // the broker has said that there is none
		s.finish("1:m1", nil)
		s.finish("1:m2", nil)
		r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "stream"})
		s.publish(5, 9)
		r.Wait(10 * time.Second)
		assert.Equal(r, append(names(1, 0, 3), names(2, 5, 9)...), s.started())
	})
}

// Nor while its successor is being declared, at whichever moment.
func TestLateSettlementsWhileAStreamIsMadeAnewMoveNoPlace(t *testing.T) {
	for late := time.Duration(0); late < 1500*time.Millisecond; late += 50 * time.Millisecond {
		t.Run(late.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				s := newStaged(r, 2)
				r.Consuming(s.handle, fromFirst, steadymq.WithPrefetch(4), steadymq.WithDrainTimeout(time.Hour), steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
				s.publish(0, 1)
				r.Broker.SetLatency(100 * time.Millisecond)
				r.Broker.DeleteQueue(rig.Queue)
				r.Wait(late + time.Millisecond)
				s.gate("1:m0") <- nil
				r.Wait(30 * time.Second)
				s.publish(5, 8)
				r.Wait(10 * time.Second)
				assert.Equal(r, append(names(1, 0, 1), names(2, 5, 8)...), s.started())
			})
		})
	}
}

// A message in hand holds the place before anything is settled: not one before it, and not one less.
func TestFirstMessageInHandIsWhereTheNextSessionBegins(t *testing.T) {
	for _, workers := range []int{1, 2, 4} {
		for from := range 4 {
			t.Run(fmt.Sprint("from ", from, " with ", workers), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					s := newStaged(r, 2)
					s.publish(0, 8)
					r.Consuming(s.handle, steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": from}), steadymq.WithConcurrency(workers), steadymq.WithPrefetch(4))
					require.Equal(r, names(1, from, from+workers), s.started())
					r.Broker.Reset()
					r.Wait(5 * time.Second)
					assert.Equal(r, append(names(1, from, from+workers), names(2, from, 8)...), s.started())
				})
			})
		}
	}
}

// What the old session held for its next try does not come back to it.
func TestTriesOfTheOldSessionEndWithItsConsumer(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		s := newStaged(r, 2)
		r.Consuming(s.handle, fromFirst, steadymq.WithConcurrency(2), steadymq.WithPrefetch(4), steadymq.WithDrainTimeout(time.Hour))
		s.publish(0, 2)
		s.finish("1:m0", steadymq.RequeueAfter(errAway, time.Minute))
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(5 * time.Second)
		assert.Equal(r, []string{"1:m0", "1:m1", "2:m0", "2:m1"}, s.started())
		s.finish("1:m1", steadymq.Requeue(errAway))
		r.Wait(5 * time.Minute)
		assert.Equal(r, []string{"1:m0", "1:m1", "2:m0", "2:m1"}, s.started())
		assert.ElementsMatch(r, tags(2, 1, 2), s.acked())
		assert.Zero(r, r.Consumer.Stats().Held)
	})
}

// A topology function may name another stream while the session of the first still settles.
func TestAnotherStreamOfTheTopologyWithTwoSessionsAlive(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		s := newStaged(r, 4)
		name := rig.Queue
		r.Broker.DeclareQueue("other", steadymqtest.QueueOptions{Type: "stream"})
		r.Broker.Publish("other", "m100", "m101", "m102")
		r.Consuming(s.handle, fromFirst, steadymq.WithConcurrency(3), steadymq.WithPrefetch(4), steadymq.WithDrainTimeout(time.Hour),
			steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return name, nil }))
		s.publish(0, 4)
		s.finish("1:m0", nil)
		name = "other"
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(5 * time.Second)
		require.EqualValues(r, 2, r.Consumer.Stats().Sessions)
		require.Equal(r, []string{"1:m1", "1:m2", "1:m3"}, s.atWork(), "all workers are with the old session")
		s.finish("1:m1", nil)
		s.finish("1:m2", nil)
		require.Equal(r, []string{"1:m3", "2:m100", "2:m101"}, s.atWork())
		s.finish("2:m100", nil)
		s.finish("1:m3", nil)
		require.Equal(r, []string{"1:1", "1:2", "1:3", "2:1", "1:4"}, s.acked())
		r.Broker.Reset() // the second goes, with m101 and m102 in hand
		r.Wait(5 * time.Second)
		require.Equal(r, []string{"3:m101", "3:m102"}, s.atWork(), "behind the one that was acked")
		s.finish("3:m101", nil)
		name = rig.Queue
		r.Broker.Reset()
		r.Wait(5 * time.Second)
		begun := s.started()
		assert.Equal(r, names(4, 0, 4), begun[len(begun)-4:], "the place in the first is not kept: it is read as at first")
		r.Broker.Publish("other", "m103")
		s.publish(4, 5)
		r.Wait(5 * time.Second)
		assert.Equal(r, "4:m4", s.started()[len(begun)])
	}, steadymqtest.WithLatency(time.Millisecond))
}

// Whatever becomes of the successor's set-up, and at whichever step: it resumes at its place.
func TestSuccessorResumesAtItsPlaceWhereverItsSetUpIsCut(t *testing.T) {
	cuts := make(map[string]func(r *rig.Rig))
	for _, stage := range []steadymqtest.Stage{
		steadymqtest.StageStart, steadymqtest.StageTune, steadymqtest.StageOpen, steadymqtest.StageOpened,
		steadymqtest.StageChannel, steadymqtest.StageDeclare, steadymqtest.StageQos, steadymqtest.StageConsume,
	} {
		cuts["hangs at "+stage.String()] = func(r *rig.Rig) { r.Broker.HangAt(stage, true) }
		cuts["is lost at "+stage.String()] = func(r *rig.Rig) { r.Broker.DropAt(stage, true) }
	}
	for n := 0; n < 900; n += 60 {
		cuts[fmt.Sprint("is cut after ", n, " bytes of the broker")] = func(r *rig.Rig) { r.Broker.CutAfter(n) }
		cuts[fmt.Sprint("is cut after ", n, " bytes of the client")] = func(r *rig.Rig) { r.Broker.CutClientAfter(n) }
	}
	cuts["is refused"] = func(r *rig.Rig) { r.Broker.RefuseConsume(403, "access to queue 'orders' refused") }
	cuts["is refused for its node"] = func(r *rig.Rig) {
		r.Broker.RefuseConsume(404, "home node 'a' of durable queue 'orders' in vhost '/' is down or inaccessible")
	}
	cuts["is refused for another queue"] = func(r *rig.Rig) { r.Broker.RefuseConsume(404, "no queue 'other' in vhost '/'") }
	cuts["may not look"] = func(r *rig.Rig) {
		r.Broker.RefuseDeclare(403, "access to queue 'orders' in vhost '/' refused for user 'app'")
	}
	ends := map[string]func(r *rig.Rig){
		"reset":  func(r *rig.Rig) { r.Broker.Reset() },
		"cancel": func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) },
	}
	kinds := map[string][]steadymq.Option{
		"first":           {fromFirst},
		"next, declared":  {steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "next"}), steadymq.WithQueue(steadymq.Queue{Type: "stream"})},
		"first, declared": {fromFirst, steadymq.WithQueue(steadymq.Queue{Type: "stream"})},
	}
	for cutName, cut := range cuts {
		for endName, end := range ends {
			for kindName, kind := range kinds {
				t.Run(fmt.Sprint(kindName, ", after a ", endName, " it ", cutName), func(t *testing.T) {
					rig.Bubble(t, func(r *rig.Rig) {
						s := newStaged(r, 1)
						r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
							s.mu.Lock()
							s.begun = append(s.begun, string(d.Body))
							s.mu.Unlock()
							return nil
						}, append(kind, steadymq.WithConcurrency(2), steadymq.WithPrefetch(3), steadymq.WithSetupTimeout(3*time.Second))...)
						s.publish(0, 4)
						require.Len(r, s.started(), 4)
						cut(r)
						end(r)
						r.Wait(2 * time.Second)
						if !strings.Contains(cutName, "bytes") { // what comes before the cut, without its ack, would come again
							s.publish(4, 6)
						}
						r.Wait(10 * time.Second)
						r.Broker.Heal()
						r.Wait(2 * time.Minute)
						s.publish(len(s.started()), 8)
						r.Wait(10 * time.Second)
						assert.Equal(r, []string{"m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7"}, s.started(), "each once")
					})
				})
			}
		}
	}
}

// countingLooks counts the queue.declare of all connections, passive or not.
func countingLooks(r *rig.Rig) (option steadymq.Option, looks func() int) {
	times, dial := new(atomic.Int32), r.Broker.Dialer()
	option = steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return asked{c, times}, nil
	})
	return option, func() int { return int(times.Load()) }
}

// After a cancel the stream is looked for as long as it may still be on its way out, but no longer
// than half of the set-up limit; otherwise once where we declare it, and else never.
func TestDoubtAfterACancelTakesItsTimeAndNoMore(t *testing.T) {
	for limit, doubt := range map[time.Duration]time.Duration{
		100 * time.Millisecond:  50 * time.Millisecond,
		time.Second:             500 * time.Millisecond,
		3900 * time.Millisecond: 1950 * time.Millisecond,
		4 * time.Second:         2 * time.Second,
		15 * time.Second:        2 * time.Second,
		time.Minute:             2 * time.Second,
	} {
		for _, declares := range []bool{false, true} {
			t.Run(fmt.Sprint(limit, ", declared by us: ", declares), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					s := newStaged(r, 1)
					options := rig.Options(fromFirst, steadymq.WithSetupTimeout(limit))
					extra := 0
					if declares {
						options, extra = append(options, steadymq.WithQueue(steadymq.Queue{Type: "stream"})), 1
					}
					counting, looks := countingLooks(r)
					r.Consuming(s.handle, append(options, counting)...)
					s.publish(0, 2)
					require.Equal(r, extra, looks(), "the first session looks for nothing")
					r.Broker.CancelConsumers(rig.Queue)
					r.Wait(3 * time.Second)
					assert.GreaterOrEqual(r, r.Outage(), doubt)
					assert.LessOrEqual(r, r.Outage(), doubt+70*time.Millisecond)
					assert.InDelta(r, float64(doubt/(22*time.Millisecond)), looks()-2*extra, 2+float64(doubt/(200*time.Millisecond)))
					before := looks()
					for range 2 { // the doubt is over
						r.Wait(time.Minute)
						r.Broker.Reset()
						r.Wait(3 * time.Second)
					}
					assert.Equal(r, 4*extra, looks()-before, "once where we declare")
					s.publish(2, 4)
					assert.Equal(r, []string{"1:m0", "1:m1", "4:m2", "4:m3"}, s.started())
				})
			})
		}
	}
}

// A try whose doubt outlasts the set-up limit leaves the doubt to the next.
func TestDoubtThatOutlastsTheSetupLimitIsTheNextTrys(t *testing.T) {
	for _, declares := range []bool{false, true} {
		for _, gone := range []bool{false, true} {
			t.Run(fmt.Sprint("declared by us: ", declares, ", gone: ", gone), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					s := newStaged(r, 1)
					options := rig.Options(fromFirst, steadymq.WithSetupTimeout(3*time.Second))
					if declares {
						options = append(options, steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
					}
					r.Consuming(s.handle, options...)
					s.publish(0, 3)
					r.Broker.HangAt(steadymqtest.StageDeclare, true)
					r.Broker.CancelConsumers(rig.Queue)
					r.Wait(10 * time.Second) // some tries
					require.NotEqual(r, steadymq.Consuming, r.Consumer.State())
					require.Greater(r, len(r.Causes()), 1)
					if gone {
						r.Broker.DeleteQueue(rig.Queue)
					}
					r.Broker.Heal()
					r.Wait(40 * time.Second)
					if gone && !declares {
						r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "stream"})
					}
					s.publish(3, 5)
					r.Wait(time.Minute)
					session := r.LastChange().Session
					want := append(names(1, 0, 3), fmt.Sprint(session, ":m3"), fmt.Sprint(session, ":m4"))
					assert.Equal(r, want, s.started(), "none is skipped, and none comes again")
				})
			})
		}
	}
}

// The stream may go later than the doubt has lasted: then the next cancel says so.
func TestStreamThatGoesAfterTheDoubtIsReadFromItsBeginning(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		s := newStaged(r, 1)
		r.Consuming(s.handle, fromFirst, steadymq.WithSetupTimeout(time.Second), steadymq.WithQueue(steadymq.Queue{Type: "stream"}))
		s.publish(0, 3)
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(700 * time.Millisecond)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		r.Broker.DeleteQueue(rig.Queue)
		r.Wait(5 * time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		s.publish(3, 5)
		session := r.LastChange().Session
		assert.Equal(r, append(names(1, 0, 3), fmt.Sprint(session, ":m3"), fmt.Sprint(session, ":m4")), s.started())
	})
}

// A broker that says there is no such stream is believed, at whichever step it says so.
func TestStreamOfWhichTheBrokerSaysItIsGoneIsReadFromItsBeginning(t *testing.T) {
	for name, fault := range map[string]func(r *rig.Rig){
		"at the consume": func(r *rig.Rig) { r.Broker.RefuseConsume(404, "NOT_FOUND - no queue 'orders' in vhost '/'") },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				s := newStaged(r, 1)
				r.Consuming(s.handle, fromFirst)
				s.publish(0, 3)
				fault(r)
				r.Broker.Reset()
				r.Wait(10 * time.Second)
				r.Broker.Heal()
				r.Wait(10 * time.Second)
				s.publish(3, 4)
				assert.Equal(r, append(names(1, 0, 3), names(2, 0, 4)...), s.started())
			})
		})
	}
}

// rawFrame is a frame as a broker writes it.
func rawFrame(typ byte, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{typ, 0, 1}, uint32(len(payload)))
	return append(append(b, payload...), 0xCE)
}

// rawDelivery is a message with a body on the first channel.
func rawDelivery(consumer string, tag uint64, body string) []byte {
	method := append([]byte{0, 60, 0, 60, byte(len(consumer))}, consumer...)
	method = append(binary.BigEndian.AppendUint64(method, tag), 0, 0, 0)
	header := binary.BigEndian.AppendUint64([]byte{0, 60, 0, 0}, uint64(len(body)))
	return slices.Concat(rawFrame(1, method...), rawFrame(2, append(header, 0, 0)...), rawFrame(3, []byte(body)...))
}

// A broker may send more than the prefetch: a chunk of a stream. All of it is kept, in order, and
// workers are woken for each.
func TestInboxThatOverflowsIsHandledInOrderAtOnce(t *testing.T) {
	for _, workers := range []int{1, 2, 4} {
		t.Run(fmt.Sprint(workers, " workers"), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				release := make(chan struct{})
				var mu sync.Mutex
				var handled []string
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					mu.Lock()
					handled = append(handled, string(d.Body))
					mu.Unlock()
					if string(d.Body) == "hold" {
						<-release
					}
					return nil
				}, steadymq.WithConcurrency(workers), steadymq.WithPrefetch(4))
				r.Broker.BlackHole(true, false) // it has given no such tags, and shall not see their acks
				tag, n := r.LastChange().ConsumerTag, uint64(0)
				hold := slices.Repeat([]string{"hold"}, workers)
				var want []string
				for round := range 3 { // it overflows, is empty, and overflows once more
					many := make([]string, 100)
					for i := range many {
						many[i] = fmt.Sprint("m", i)
					}
					var b []byte
					for _, body := range append(slices.Clone(hold), many...) {
						n++
						b = append(b, rawDelivery(tag, n, body)...)
					}
					r.Broker.Garbage(b...)
					r.Wait(time.Second)
					require.Len(r, handled, len(want)+workers, "round %d: the workers are busy", round)
					began := time.Now()
					for range workers {
						release <- struct{}{}
					}
					r.Wait(0)
					assert.Zero(r, time.Since(began))
					want = append(append(want, hold...), many...)
					if workers == 1 {
						require.Equal(r, want, handled)
					} else {
						require.ElementsMatch(r, want, handled)
					}
				}
			})
		})
	}
}
