package wire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// ackAll acks tags, in a row.
func ackAll(t *testing.T, sub *consumed, tags ...uint64) {
	t.Helper()
	for _, tag := range tags {
		require.NoError(t, sub.Ack(tag))
	}
}

// acksOf are the frames of acks.
func acksOf(tags ...uint64) (all []byte) {
	for _, tag := range tags {
		all = append(all, ackOf(tag)...)
	}
	return all
}

// upTo counts from 1.
func upTo(n uint64) (all []uint64) {
	for i := range n {
		all = append(all, i+1)
	}
	return all
}

func TestHeldAcksLeaveTheMomentTheReaderFindsNothingMore(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		o := socketLimits
		o.WriteDelay = time.Minute
		s, _, far := pipe(t, o)
		sub := openSubscription(s, 1, 100)
		arrived := collect(far)
		go func() { _, _ = far.Write(slicesOf(deliveryOf(1, nil), deliveryOf(2, nil), heartbeatFrame)) }()
		n, err := s.Read(make([]byte, 100)) // the driver has got its frame, and is busy with it
		require.NoError(t, err)
		require.Equal(t, len(heartbeatFrame), n)
		ackAll(t, sub, 1, 2)
		time.Sleep(10 * time.Second)
		require.Empty(t, arrived.bytes(), "more may be on its way, for all the wire knows")
		began := time.Now()
		go func() { _, _ = s.Read(make([]byte, 100)) }()
		synctest.Wait()
		assert.Equal(t, acksOf(1, 2), arrived.bytes())
		assert.Zero(t, time.Since(began))
	})
}

func TestHeldAcksLeaveWithTheLastThatCanFollow(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		o := socketLimits
		o.WriteDelay = time.Minute
		sub, _, far := consumer(t, o, 100)
		second := openSubscription(sub.socket, 2, 100)
		arrived := collect(far)
		deliver(t, far, 3)
		_, err := far.Write(messageOf(2, 1, []byte{0, 0}))
		require.NoError(t, err)
		synctest.Wait()
		ackAll(t, sub, 1, 2, 3)
		time.Sleep(10 * time.Second)
		require.Empty(t, arrived.bytes(), "the other consumer's may follow")
		began := time.Now()
		require.NoError(t, second.Ack(1))
		synctest.Wait()
		assert.Len(t, arrived.bytes(), 4*settlementSize)
		assert.Zero(t, time.Since(began))
		assert.Zero(t, sub.Unsettled()+second.Unsettled())
	})
}

// The broker is about to have no window left.
func TestHeldAcksLeaveAtHalfOfThePrefetch(t *testing.T) {
	for prefetch, half := range map[int]uint64{1: 1, 2: 1, 3: 2, 4: 2, 7: 4, 10: 5, 11: 6, 256: 128, 1000: 500} {
		t.Run(fmt.Sprint(prefetch), func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				o := socketLimits
				o.WriteDelay = time.Minute
				sub, w, far := consumer(t, o, prefetch)
				arrived := collect(far)
				deliver(t, far, 2*prefetch)
				for round := range uint64(2) {
					first := round * half
					for tag := first + 1; tag < first+half; tag++ {
						ackAll(t, sub, tag)
					}
					synctest.Wait()
					require.Len(t, arrived.bytes(), int(first)*settlementSize, "round %d", round)
					ackAll(t, sub, first+half)
					synctest.Wait()
					require.Equal(t, acksOf(upTo(first+half)...), arrived.bytes(), "round %d", round)
				}
				assert.Equal(t, 2, w.writes(), "with one write each")
			})
		})
	}
}

// The first that waits decides how long all wait, in every round anew.
func TestHeldAcksLeaveAtTheWriteDelay(t *testing.T) {
	for _, delay := range []time.Duration{time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond} {
		t.Run(delay.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				o := socketLimits
				o.WriteDelay = delay
				sub, w, far := consumer(t, o, 100)
				arrived := collect(far)
				deliver(t, far, 100)
				for round := range uint64(5) {
					first := 3 * round
					time.Sleep(2 * time.Nanosecond) // the last of the round before is company still
					ackAll(t, sub, first+1)
					time.Sleep(delay / 2)
					ackAll(t, sub, first+2)
					time.Sleep(delay/2 - 1)
					ackAll(t, sub, first+3)
					synctest.Wait()
					require.Len(t, arrived.bytes(), int(first)*settlementSize, "round %d: not a moment before", round)
					time.Sleep(time.Nanosecond)
					synctest.Wait()
					require.Equal(t, acksOf(upTo(first+3)...), arrived.bytes(), "round %d: nor later", round)
				}
				assert.Equal(t, 5, w.writes())
				began := time.Now()
				time.Sleep(delay + 1)
				ackAll(t, sub, 16)
				synctest.Wait()
				assert.Equal(t, acksOf(upTo(16)...), arrived.bytes(), "one alone waits for nobody")
				assert.Equal(t, delay+1, time.Since(began))
			})
		})
	}
}

// One that has waited exactly as long as the write delay allows is in company still.
func TestAckAtExactlyTheWriteDelayHasCompany(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 100)
		arrived := collect(far)
		deliver(t, far, 100)
		time.Sleep(time.Second)
		ackAll(t, sub, 1)
		synctest.Wait()
		require.Equal(t, acksOf(1), arrived.bytes())
		time.Sleep(socketLimits.WriteDelay)
		ackAll(t, sub, 2)
		synctest.Wait()
		require.Equal(t, acksOf(1), arrived.bytes())
		time.Sleep(socketLimits.WriteDelay)
		synctest.Wait()
		assert.Equal(t, acksOf(1, 2), arrived.bytes())
	})
}

// All kinds of settlement wait alike.
func TestRejectsAndRequeuesWaitAsAcksDo(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 100)
		arrived := collect(far)
		deliver(t, far, 100)
		require.NoError(t, sub.Reject(1, true))
		require.NoError(t, sub.Requeue(2))
		require.NoError(t, sub.Reject(3, false))
		assert.EqualValues(t, 97, sub.Unsettled())
		time.Sleep(socketLimits.WriteDelay - 1)
		synctest.Wait()
		require.Empty(t, arrived.bytes())
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		assert.Len(t, arrived.bytes(), 3*settlementSize)
	})
}

// stuffed is a socket whose writer is busy with one frame that the peer does not take, and whose
// buffer has room for so many bytes more.
func stuffed(t *testing.T, room int) (s *Socket, far net.Conn, sent []byte) {
	t.Helper()
	s, _, far = pipe(t, Options{})
	for _, b := range [][]byte{heartbeatFrame, frameOf(frameBody, 3, make([]byte, maxPending-room-frameHead-1)...)} {
		_, err := s.Write(b)
		require.NoError(t, err)
		synctest.Wait() // the writer has taken the first
		sent = append(sent, b...)
	}
	s.out.mu.Lock()
	defer s.out.mu.Unlock()
	require.Len(t, s.out.pending, maxPending-room)
	return s, far, sent
}

func TestWriteWaitsForRoomAndNoLonger(t *testing.T) {
	for name, c := range map[string]struct {
		room  int
		waits bool
	}{
		"it fits to the byte":      {len(heartbeatFrame), false},
		"it is a byte too long":    {len(heartbeatFrame) - 1, true},
		"nothing more fits":        {0, true},
		"there is room to spare":   {1000, false},
		"more than full already":   {-1, true},
		"far more than full":       {-maxPending, true},
		"nearly all of it is left": {maxPending - 100, false},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				s, far, sent := stuffed(t, c.room)
				written := make(chan error, 1)
				go func() {
					_, err := s.Write(heartbeatFrame)
					written <- err
				}()
				time.Sleep(time.Hour)
				require.Equal(t, c.waits, len(written) == 0)
				began := time.Now()
				// The writer is done with the first frame, and takes all that waits.
				_, err := io.ReadFull(far, make([]byte, len(heartbeatFrame)))
				require.NoError(t, err)
				synctest.Wait()
				require.Len(t, written, 1, "it is woken as soon as there is room")
				require.NoError(t, <-written)
				arrived := collect(far)
				synctest.Wait()
				assert.Zero(t, time.Since(began))
				assert.True(t, bytes.Equal(slicesOf(sent[len(heartbeatFrame):], heartbeatFrame), arrived.bytes()), "in order")
			})
		})
	}
}

// One frame that is longer than the buffer is taken, or it would wait for ever.
func TestFrameLongerThanTheBufferIsTakenOnceNothingWaits(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, Options{})
		arrived := collect(far)
		long := frameOf(frameBody, 3, make([]byte, 3*maxPending)...)
		_, err := s.Write(long)
		require.NoError(t, err)
		synctest.Wait()
		assert.True(t, bytes.Equal(long, arrived.bytes()))
	})
}

// However many wait: all are woken, those that still find no room wait once more, and none is left.
func TestAllWhoWaitForRoomAreWoken(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, far, sent := stuffed(t, 0)
		sub := openSubscription(s, 1, 1)
		const workers = 50
		long := frameOf(frameBody, 3, make([]byte, maxPending/3)...)
		var done sync.WaitGroup
		for tag := range uint64(workers) {
			done.Go(func() { assert.NoError(t, sub.Ack(tag+1)) })
			done.Go(func() {
				_, err := s.Write(long)
				assert.NoError(t, err)
			})
		}
		synctest.Wait()
		s.out.mu.Lock()
		assert.Len(t, s.out.pending, maxPending)
		s.out.mu.Unlock()
		began := time.Now()
		arrived := collect(far)
		done.Wait()
		synctest.Wait()
		assert.Zero(t, time.Since(began))
		assert.Len(t, arrived.bytes(), len(sent)+workers*(settlementSize+len(long)))
	})
}

func TestWhoWaitsForRoomIsWokenByTheEnd(t *testing.T) {
	reason := errors.New("the end")
	for name, c := range map[string]struct {
		end  func(s *Socket)
		want error
	}{
		"killed": {func(s *Socket) { s.Kill(reason) }, reason},
		"closed": {func(s *Socket) { go func() { _ = s.Close() }() }, net.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				s, far, sent := stuffed(t, 0)
				sub := openSubscription(s, 1, 1)
				settled, written := make(chan error, 1), make(chan error, 1)
				go func() { settled <- sub.Ack(1) }()
				go func() {
					_, err := s.Write(heartbeatFrame)
					written <- err
				}()
				time.Sleep(time.Minute)
				require.Empty(t, settled)
				require.Empty(t, written)
				c.end(s)
				synctest.Wait()
				arrived := collect(far)
				synctest.Wait()
				require.ErrorIs(t, <-settled, c.want)
				require.ErrorIs(t, <-written, c.want)
				if name == "closed" {
					assert.True(t, bytes.Equal(sent, arrived.bytes()), "what was taken before goes out")
				}
			})
		})
	}
}

// A chunk is written again from where the last write has ended, and its deadline is its own. How
// much it is decides who counts as dead: a peer that takes 64 KiB in a heartbeat does not.
func TestLongWriteGoesOutInChunksWithADeadlineEach(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		const chunk = 64 << 10
		o := socketLimits
		o.IdleTimeout = 0
		s, w, far := pipe(t, o)
		body := []byte(patterned(5*chunk + 100))
		sent := frameOf(frameBody, 3, body...)
		_, err := s.Write(sent)
		require.NoError(t, err)
		var got bytes.Buffer
		for range 5 {
			time.Sleep(o.WriteTimeout - 1)
			_, err := io.CopyN(&got, far, chunk)
			require.NoError(t, err)
		}
		_, err = io.CopyN(&got, far, int64(len(sent)-got.Len()))
		require.NoError(t, err)
		assert.True(t, bytes.Equal(sent, got.Bytes()))
		synctest.Wait()
		w.mu.Lock()
		assert.Equal(t, []int{chunk, chunk, chunk, chunk, chunk, len(sent) - 5*chunk}, w.sizes)
		w.mu.Unlock()
		assert.NoError(t, s.Cause())

		began := time.Now()
		_, err = s.Write(heartbeatFrame) // and nobody reads
		require.NoError(t, err)
		<-s.Done()
		assert.Equal(t, o.WriteTimeout, time.Since(began))
		assert.ErrorIs(t, s.Cause(), ErrWriteTimeout)
	})
}

// The driver hears of deliveries, which it does not see, no more often than it has to.
func TestDriverHearsOfDeliveriesEveryQuarterOfASecond(t *testing.T) {
	const quarter = 250 * time.Millisecond
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		sub := openSubscription(s, 1, 1)
		var mu sync.Mutex
		var heard []time.Duration
		began := time.Now()
		go func() {
			buf := make([]byte, 100)
			for {
				n, err := s.Read(buf)
				if err != nil {
					return
				}
				mu.Lock()
				assert.Equal(t, heartbeatFrame, buf[:n])
				heard = append(heard, time.Since(began))
				mu.Unlock()
			}
		}()
		for range 100 {
			time.Sleep(100 * time.Millisecond)
			_, err := far.Write(deliveryOf(1, nil))
			require.NoError(t, err)
			sub.take()
		}
		synctest.Wait()
		mu.Lock()
		require.NotEmpty(t, heard)
		assert.LessOrEqual(t, heard[0], quarter+100*time.Millisecond)
		for i := 1; i < len(heard); i++ {
			assert.GreaterOrEqual(t, heard[i]-heard[i-1], quarter)
			assert.LessOrEqual(t, heard[i]-heard[i-1], quarter+100*time.Millisecond)
		}
		n := len(heard)
		mu.Unlock()
		time.Sleep(10 * time.Second)
		mu.Lock()
		assert.Len(t, heard, n, "nothing comes, and nothing is told")
		mu.Unlock()
	})
}

// What the driver reads of its own is a sign of life as well: it needs no other.
func TestDriverThatHasItsOwnFramesIsToldNothingBeside(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		openSubscription(s, 1, 1)
		var mu sync.Mutex
		var got []byte
		go func() {
			buf := make([]byte, 5) // a frame takes several calls
			for {
				n, err := s.Read(buf)
				mu.Lock()
				got = append(got, buf[:n]...)
				mu.Unlock()
				if err != nil {
					return
				}
			}
		}()
		flow := methodOf(1, 20, 20, 1)
		var want []byte
		for range 50 {
			time.Sleep(200 * time.Millisecond)
			_, err := far.Write(slicesOf(deliveryOf(1, nil), flow, deliveryOf(2, nil)))
			require.NoError(t, err)
			want = append(want, flow...)
		}
		// Nor is it told in the middle of a frame, however long that takes.
		_, err := far.Write(slicesOf(deliveryOf(1, nil), flow[:5]))
		require.NoError(t, err)
		time.Sleep(10 * time.Second)
		_, err = far.Write(flow[5:])
		require.NoError(t, err)
		synctest.Wait()
		mu.Lock()
		assert.Equal(t, append(want, flow...), got)
		mu.Unlock()
	})
}

// A subscription knows when bytes of its deliveries last came, and of no other's.
func TestSubscriptionHearsItsOwnDeliveries(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		first, _, far := consumer(t, socketLimits, 1)
		second := openSubscription(first.socket, 2, 1)
		send := func(b []byte) {
			t.Helper()
			time.Sleep(time.Second)
			_, err := far.Write(b)
			require.NoError(t, err)
			synctest.Wait()
		}
		heard := func() []time.Duration { return []time.Duration{first.Heard(), second.Heard()} }
		assert.Equal(t, []time.Duration{0, 0}, heard())
		send(heartbeatFrame)
		assert.Equal(t, []time.Duration{0, 0}, heard(), "what is no delivery does not count")
		send(messageOf(1, 1, []byte{0, 0}, "body"))
		assert.Equal(t, []time.Duration{2 * time.Second, 0}, heard())
		long := messageOf(2, 1, []byte{0, 0}, "0123456789")
		send(long[:len(long)-5])
		assert.Equal(t, []time.Duration{2 * time.Second, 3 * time.Second}, heard())
		send(long[len(long)-5:])
		assert.Equal(t, []time.Duration{2 * time.Second, 4 * time.Second}, heard(), "a part of a body counts")
		send(heartbeatFrame)
		assert.Equal(t, []time.Duration{2 * time.Second, 4 * time.Second}, heard())
		assert.EqualValues(t, 1, first.Unsettled())
		assert.EqualValues(t, 1, second.Unsettled())
	})
}

// Limits that count the silence after a delivery: neither early nor late, and called once.
func TestLimitOfACallCountsTheSilenceAfterDeliveries(t *testing.T) {
	const limit = 10 * time.Second
	for name, c := range map[string]struct {
		deliveries []time.Duration // when they come
		beats      bool            // heartbeats come all the time
		most       time.Duration
		want       time.Duration
	}{
		"none":                     {nil, false, time.Hour, limit},
		"none but heartbeats":      {nil, true, time.Hour, limit},
		"one":                      {[]time.Duration{3 * time.Second}, false, time.Hour, 13 * time.Second},
		"one at the last moment":   {[]time.Duration{limit - 1}, true, time.Hour, 2*limit - 1},
		"one a moment too late":    {[]time.Duration{limit + 1}, false, time.Hour, limit},
		"some":                     {[]time.Duration{9 * time.Second, 18 * time.Second, 27 * time.Second}, false, time.Hour, 37 * time.Second},
		"more than are waited for": {[]time.Duration{9 * time.Second, 18 * time.Second, 27 * time.Second}, true, 20 * time.Second, 20 * time.Second},
		"the most is less":         {nil, false, 4 * time.Second, 4 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				sub, _, far := consumer(t, Options{}, 1)
				s := sub.socket
				collect(far)
				time.Sleep(time.Minute) // the socket's age does not count
				began := time.Now()
				for _, at := range c.deliveries {
					time.AfterFunc(at, func() { _, _ = far.Write(deliveryOf(1, nil)) })
				}
				if c.beats {
					go beat(s, far)
				}
				var over []time.Duration
				s.AfterSilence(limit, c.most, func() { over = append(over, time.Since(began)) })
				cause := errors.New("too long")
				calledOff := s.AfterSilence(limit, c.most, func() { t.Error("called") })
				time.Sleep(min(limit, c.most) - 2)
				calledOff()
				time.Sleep(time.Hour)
				synctest.Wait()
				assert.Equal(t, []time.Duration{c.want}, over)

				since := time.Now()
				ctx, cancel := s.WithSilence(t.Context(), limit, cause)
				defer cancel()
				<-ctx.Done()
				assert.Equal(t, limit, time.Since(since))
				assert.Equal(t, cause, context.Cause(ctx))
				ctx, cancel = s.WithSilence(t.Context(), limit, cause)
				deadline, ok := ctx.Deadline()
				assert.True(t, ok)
				assert.Equal(t, MostSilences*limit, time.Until(deadline))
				cancel()
				assert.Equal(t, context.Canceled, context.Cause(ctx))
				s.Kill(nil)
			})
		})
	}
}

// Memory is the receiver's for each message, and a message is put once, when all of it is there.
func TestMessageIsPutOnceItIsWhole(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 10)
		message := messageOf(1, 1, []byte{0, 0}, "bo", "", "dy")
		for _, b := range message[:len(message)-1] {
			_, err := far.Write([]byte{b})
			require.NoError(t, err)
			synctest.Wait()
			require.Zero(t, sub.count())
			require.Zero(t, sub.Unsettled())
		}
		_, err := far.Write(message[len(message)-1:])
		require.NoError(t, err)
		synctest.Wait()
		require.Equal(t, 1, sub.count())
		require.EqualValues(t, 1, sub.Unsettled())
		assert.Equal(t, "body", string(sub.take().Body))
	})
}

// The end of the driver's frame wakes who waits for it, though the peer takes nothing meanwhile.
func TestEndOfAFrameWakesThoughTheWriterIsBusy(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, _ := pipe(t, Options{})
		sub := openSubscription(s, 1, 1)
		_, err := s.Write(heartbeatFrame)
		require.NoError(t, err)
		synctest.Wait() // the writer waits for the peer
		frame := frameOf(frameBody, 3, 1, 2, 3)
		_, err = s.Write(frame[:9])
		require.NoError(t, err)
		settled := make(chan error, 1)
		go func() { settled <- sub.Ack(1) }()
		time.Sleep(time.Minute)
		require.Empty(t, settled)
		_, err = s.Write(frame[9:])
		require.NoError(t, err)
		synctest.Wait()
		require.Len(t, settled, 1)
		assert.NoError(t, <-settled)
	})
}

// A message that no handler can be given is to be settled as any other.
func TestUnreadableMessageCountsAsUnsettled(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 100)
		arrived := collect(far)
		_, err := far.Write(slicesOf(deliveryOf(1, nil), messageOf(1, 2, []byte{0x80, 0, 9}, "body")))
		require.NoError(t, err)
		synctest.Wait()
		require.EqualValues(t, 2, sub.Unsettled())
		ackAll(t, sub, 1)
		synctest.Wait()
		require.Empty(t, arrived.bytes(), "another settlement may follow")
		require.NoError(t, sub.Requeue(2))
		synctest.Wait()
		assert.Len(t, arrived.bytes(), 2*settlementSize)
		assert.Zero(t, sub.Unsettled())
	})
}

// A closed subscription settles nothing, and counts nothing as settled.
func TestSettlementThatIsRefusedCountsNothing(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 10)
		arrived := collect(far)
		deliver(t, far, 3)
		ackAll(t, sub, 1)
		closing := methodOf(1, 20, 40, 0, 200, 0, 0, 0, 0, 0)
		_, err := sub.socket.Write(closing)
		require.NoError(t, err)
		for tag := range uint64(2) {
			require.ErrorIs(t, sub.Ack(tag+2), net.ErrClosed)
		}
		synctest.Wait()
		assert.EqualValues(t, 2, sub.Unsettled())
		assert.Equal(t, slicesOf(ackOf(1), closing), arrived.bytes())
	})
}

// A flush that was asked for is asked for once, and takes all with it that is there by then.
func TestWriterTakesWhatHasGatheredWhileItWrote(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, w, far := consumer(t, socketLimits, 1000)
		deliver(t, far, 1000)
		gate := make(chan struct{})
		w.mu.Lock()
		w.gate = gate
		w.mu.Unlock()
		arrived := collect(far)
		_, err := sub.socket.Write(heartbeatFrame)
		require.NoError(t, err)
		synctest.Wait() // the writer is at the gate
		ackAll(t, sub, upTo(10)...)
		_, err = sub.socket.Write(heartbeatFrame)
		require.NoError(t, err)
		ackAll(t, sub, 11)
		time.Sleep(time.Second) // the write delay is over
		close(gate)
		synctest.Wait()
		assert.Equal(t, slicesOf(heartbeatFrame, acksOf(upTo(10)...), heartbeatFrame, acksOf(11)), arrived.bytes())
		w.mu.Lock()
		assert.True(t, slices.Equal([]int{len(heartbeatFrame), 11*settlementSize + len(heartbeatFrame)}, w.sizes))
		w.mu.Unlock()
	})
}
