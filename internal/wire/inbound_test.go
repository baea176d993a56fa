package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestTooLargeMessageOfNoSubscriptionNeverReachesTheDriver(t *testing.T) {
	o := socketLimits
	o.Refuse = atMost(1000)
	good := deliveryOf(1, make([]byte, 1000))
	bad := slicesOf(methodOf(1, 60, 60, 1, 't', 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 1, 'q'), headerOf(1<<63))
	stream := slicesOf(good, heartbeatFrame, bad)
	allowed := len(stream) - len(headerOf(0))

	for cut := 1; cut < len(stream); cut++ {
		inBubble(t, func(t *testing.T) {
			s, _, far := pipe(t, o)
			go func() {
				_, _ = far.Write(stream[:cut])
				_, _ = far.Write(stream[cut:])
			}()
			got, err := io.ReadAll(s)

			require.ErrorIs(t, err, errTooLarge)
			require.ErrorContains(t, err, "message of 9223372036854775808 bytes")
			require.GreaterOrEqual(t, len(got), allowed, "what came before is not lost")
			require.Less(t, len(got), allowed+headerHead, "the header is not complete")
			require.Equal(t, stream[:len(got)], got)
			assert.ErrorIs(t, s.Cause(), err)
		})
	}
}

func TestSizeLimitOffLetsEverythingPass(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, far := pipe(t, socketLimits)
		b := headerOf(1 << 63)
		go func() { _, _ = far.Write(b) }()
		_, err := io.ReadFull(s, make([]byte, len(b)))
		require.NoError(t, err)
	})
}

func TestCauseOfAReadIsInTheChainOfWhatItMeans(t *testing.T) {
	reset := &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ECONNRESET)}
	assert.ErrorIs(t, readCause(reset), syscall.ECONNRESET)
	assert.ErrorIs(t, readCause(reset), ErrPeerReset)
	assert.ErrorIs(t, ErrPeerClosed, io.EOF)
}

// BenchmarkSubscriptionDeliver is one delivery made of its three frames and taken.
func BenchmarkSubscriptionDeliver(b *testing.B) {
	near, far := net.Pipe()
	defer far.Close()
	s := NewSocket(near, socketLimits)
	defer s.Wait()
	defer s.Kill(nil)
	sub := openSubscription(s, 1, 1)
	delivery := deliveryOf(1, make([]byte, 100))
	b.ReportAllocs()
	for b.Loop() {
		s.in.r, s.in.w = 0, copy(s.in.buf, delivery)
		if _, err := s.in.demux(nil); err != nil {
			b.Fatal(err)
		}
		if d := sub.take(); len(d.Body) != 100 {
			b.Fatal("not the delivery")
		}
	}
}

// lingering is a connection whose read deadline passes, and which notes how it is closed.
type lingering struct {
	net.Conn
	err   error
	reset *atomic.Bool
}

func (l lingering) Read([]byte) (int, error) { return 0, l.err }

func (l lingering) SetLinger(sec int) error {
	l.reset.Store(sec == 0)
	return nil
}

// The kernel goes on sending a FIN to a peer that confirms nothing, for minutes.
func TestSocketWhosePeerIsSilentIsResetNotClosed(t *testing.T) {
	for name, c := range map[string]struct {
		err   error
		reset bool
	}{
		"silent":      {os.ErrDeadlineExceeded, true},
		"unconfirmed": {syscall.ETIMEDOUT, true},
		"closed":      {io.EOF, false},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := net.Pipe()
			defer far.Close()
			s := NewSocket(lingering{near, c.err, new(atomic.Bool)}, Options{})
			_, err := s.Read(make([]byte, 1))
			require.Error(t, err)
			s.Kill(nil)
			s.Wait()
			assert.Equal(t, c.reset, s.raw.(lingering).reset.Load())
		})
	}
}

// Acks are given a moment where the broker's frames make no sense, and no more.
func TestSocketDismissedUnderAFullPipeEndsWithinTheGrace(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 1) // its peer takes nothing
		deliver(t, far, 1)
		require.NoError(t, sub.settle(basicAck, 1, 0))
		began := time.Now()
		bad := deliveryOf(2, []byte("body"))
		bad[len(bad)-1] = 0
		_, err := far.Write(bad)
		require.NoError(t, err)
		<-sub.socket.Done()
		assert.ErrorIs(t, sub.socket.Cause(), errGarbled)
		assert.Equal(t, drainGrace, time.Since(began))
	})
}

func TestSubscriptionTakesItsDeliveriesAndTheDriverAllElse(t *testing.T) {
	others := bytes.Replace(messageOf(1, 7, []byte{0, 0}, "theirs"), []byte{1, 't'}, []byte{1, 'u'}, 1)
	got := methodOf(1, 60, 71, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 'q', 0, 0, 0, 0)
	reply := headerOf(3)
	body := frameOf(frameBody, 1, 'g', 'e', 't')
	flow := methodOf(1, 20, 20, 1)
	driver, deliveries, _ := sorted(t, slicesOf(
		messageOf(1, 1, []byte{0, 0}, "one"), heartbeatFrame,
		messageOf(2, 5, []byte{0, 0}, "channel 2"),
		messageOf(1, 2, []byte{0, 0}), others, got, reply, body, flow,
		messageOf(1, 3, []byte{0, 0}, "th", "", "ree"),
	), 0, whole)
	assert.Equal(t, slicesOf(heartbeatFrame, messageOf(2, 5, []byte{0, 0}, "channel 2"), others, got, reply, body, flow), driver)
	require.Len(t, deliveries, 3)
	for i, want := range []string{"one", "", "three"} {
		d := deliveries[i]
		assert.Equal(t, uint64(i+1), d.DeliveryTag)
		assert.Equal(t, []byte(want), d.Body)
		assert.Equal(t, "t", d.ConsumerTag)
		assert.Equal(t, "x", d.Exchange)
		assert.Equal(t, "key", d.RoutingKey)
		assert.True(t, d.Redelivered)
	}
}

// On two channels of one connection frames of two messages may alternate.
func TestSubscriptionsOfTwoChannelsReadInterleavedMessages(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		first, _, far := consumer(t, socketLimits, 1)
		second := openSubscription(first.socket, 2, 1)
		a, b := messageOf(1, 1, []byte{0, 0}, "first"), messageOf(2, 1, []byte{0, 0}, "second")
		for len(a)+len(b) > 0 {
			for _, stream := range []*[]byte{&a, &b} {
				if len(*stream) == 0 {
					continue
				}
				n := frameHead + int(binary.BigEndian.Uint32((*stream)[3:])) + 1
				_, err := far.Write((*stream)[:n])
				require.NoError(t, err)
				*stream = (*stream)[n:]
			}
		}
		d := first.take()
		assert.Equal(t, "first", string(d.Body))
		d = second.take()
		assert.Equal(t, "second", string(d.Body))
	})
}

func TestBrokenFramesEndTheSocketOrAreTheDrivers(t *testing.T) {
	message := messageOf(1, 1, []byte{0, 0}, "body")
	at := func(i int, b byte) []byte {
		p := bytes.Clone(message)
		if i < 0 {
			i += len(p)
		}
		p[i] = b
		return p
	}
	method := len(methodOf(1, 60, 60, make([]byte, 17)...))
	for name, stream := range map[string][]byte{
		"no end of the method":       at(method-1, 0),
		"no end of the header":       at(method+headerHead+2, 0),
		"no end of the body":         at(-1, 0),
		"no end, and no body":        append(messageOf(1, 1, []byte{0, 0})[:method+headerHead+2:method+headerHead+2], 0),
		"a body longer than it said": at(method+headerHead-1, 3),
		"a delivery without its tag": frameOf(frameMethod, 1, 0, 60, 0, 60, 1, 't'),
	} {
		t.Run(name, func(t *testing.T) {
			driver, deliveries, cause := sorted(t, stream, 0, whole)
			assert.ErrorIs(t, cause, errGarbled)
			assert.Empty(t, deliveries)
			assert.Empty(t, driver)
		})
	}
	for name, stream := range map[string][]byte{
		"an unknown frame":      slicesOf(heartbeatFrame, []byte{7}, message),
		"a short method":        slicesOf(frameOf(frameMethod, 1, 1), message),
		"a short header":        slicesOf(frameOf(frameHeader, 1, 1, 2, 3), message),
		"a header by itself":    headerOf(4),
		"a body by itself":      frameOf(frameBody, 1, 1, 2, 3),
		"longer than agreed":    frameOf(frameMethod, 1, append([]byte{0, 60, 0, 60, 1, 't'}, make([]byte, FrameSize)...)...),
		"a method in between":   slicesOf(methodOf(1, 60, 30, 1, 't', 0), headerOf(4)),
		"heartbeat with a body": frameOf(frameBeat, 0, 1, 2),
	} {
		t.Run(name, func(t *testing.T) {
			driver, deliveries, cause := sorted(t, stream, 0, whole)
			assert.ErrorIs(t, cause, ErrPeerClosed)
			assert.Empty(t, deliveries)
			assert.Equal(t, stream, driver)
		})
	}
}

func TestAnotherProtocolEndsTheSocketAndIsNamed(t *testing.T) {
	for first, says := range map[string]string{
		"\x15\x03\x03\x00\x02\x02\x46": "amqps URL",
		"AMQP\x00\x00\x09\x01":         "PROXY protocol",
		"HTTP/1.1 400 Bad Request":     "answers with HTTP",
		"\x00":                         "first octet is 0x0",
	} {
		driver, deliveries, cause := sorted(t, []byte(first), 0, whole)
		assert.ErrorContains(t, cause, says)
		assert.ErrorContains(t, cause, "does not speak AMQP 0-9-1")
		assert.Empty(t, deliveries)
		assert.Empty(t, driver)
	}
}

// A method of the same channel ends a message that is not complete, as it does in the driver.
func TestMethodInterruptsAMessage(t *testing.T) {
	cut := messageOf(1, 1, []byte{0, 0}, "one")
	method := methodOf(1, 60, 30, 1, 't', 0)
	driver, deliveries, _ := sorted(t, slicesOf(cut[:len(cut)-len("one")-frameHead-1], method, messageOf(1, 2, []byte{0, 0}, "two")), 0, whole)
	assert.Equal(t, method, driver)
	require.Len(t, deliveries, 1)
	assert.Equal(t, "two", string(deliveries[0].Body))
}

func TestNothingOfAClosedChannelReachesTheDriver(t *testing.T) {
	closed := methodOf(1, 20, 40, 1, 0x96, 0, 0, 60, 0, 80)
	foreign := bytes.Replace(messageOf(1, 7, []byte{0, 0}, "theirs"), []byte{1, 't'}, []byte{1, 'u'}, 1)
	driver, deliveries, _ := sorted(t, slicesOf(closed, messageOf(1, 1, []byte{0, 0}, "late"), foreign, closed, heartbeatFrame), 0, whole)
	assert.Equal(t, slicesOf(closed, heartbeatFrame), driver)
	assert.Empty(t, deliveries)
}

func TestChannelOpenedAgainIsAnotherChannel(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		first, _, far := consumer(t, socketLimits, 1)
		collect(far)
		closed := methodOf(1, 20, 40, 1, 0x96, 0, 0, 60, 0, 80)
		_, err := far.Write(closed)
		require.NoError(t, err)
		synctest.Wait()
		_, err = first.socket.Write(slicesOf(methodOf(1, 20, 41), methodOf(1, 20, 10, 0)))
		require.NoError(t, err)
		s := first.socket
		s.out.mu.Lock()
		assert.Nil(t, s.out.subscriptions.on(1), "a channel.close of the broker is the driver's again")
		s.out.mu.Unlock()
		second := openSubscription(s, 1, 1)
		deliver(t, far, 1)
		d := second.take()
		assert.EqualValues(t, 1, d.DeliveryTag)
		assert.Zero(t, first.count())
	})
}

// driven is a subscription on a connection of the driver, with heartbeats of 10 s.
func driven(t *testing.T) (*consumed, *amqp.Connection, net.Conn) {
	t.Helper()
	s, _, far := pipe(t, socketLimits)
	conn := open(t, s, far)
	sub := openSubscription(s, 1, 1)
	collect(far)
	return sub, conn, far
}

// The driver ends a connection that is silent for 1.5 heartbeats, and does not see the deliveries:
// it must hear from them all the same, and no longer than they come.
func TestDeliveriesAreASignOfLifeForTheDriver(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, conn, far := driven(t)
		for tag := range uint64(300) {
			time.Sleep(time.Second)
			deliver(t, far, 1)
			_ = sub.take()
			require.NoError(t, sub.settle(basicAck, tag+1, 0))
		}
		require.False(t, conn.IsClosed())
		began := time.Now()
		<-sub.socket.Done()
		assert.LessOrEqual(t, time.Since(began), 15*time.Second+beatEvery, "1.5 heartbeats")
		_ = conn.Close()
	})
}

// FuzzInbound checks that where reads cut the stream changes nothing.
func FuzzInbound(f *testing.F) {
	f.Add(deliveryOf(1, []byte("body")), uint64(1))
	f.Add(slicesOf(deliveryOf(1, nil), heartbeatFrame, deliveryOf(2, make([]byte, 300))), uint64(2))
	f.Add(slicesOf(headerOf(101), ackOf(1)), uint64(3))
	f.Add([]byte("AMQP\x00\x00\x09\x01"), uint64(4))
	f.Add(slicesOf(messageOf(1, 1, []byte{0, 0}, "a", "bc"), methodOf(1, 20, 40, 1, 0x96, 0, 0, 0, 0, 0), messageOf(1, 2, []byte{0, 0}, "late")), uint64(5))
	f.Add(slicesOf(messageOf(1, 1, []byte{0x80, 0, 1, 'a'}, "a"), messageOf(2, 2, []byte{0, 0}, "other")), uint64(6))
	f.Add(slicesOf(messageOf(1, 1, []byte{0x80, 0, 9, 'a'}, "cut", "off"), messageOf(1, 2, []byte{0, 0}, "next")), uint64(7))
	f.Add(slicesOf(messageOf(1, 1, []byte{0, 0}, string(make([]byte, 60)), string(make([]byte, 60))), messageOf(1, 2, []byte{0, 0}, "next")), uint64(8))
	f.Fuzz(func(t *testing.T, stream []byte, seed uint64) {
		driver, deliveries, unfit, cause := sortedAll(t, stream, 100, whole)
		r := mathrand.New(mathrand.NewPCG(seed, seed))
		cutDriver, cutDeliveries, cutUnfit, cutCause := sortedAll(t, stream, 100, func(left int) int { return 1 + r.IntN(left) })
		require.Equal(t, deliveries, cutDeliveries)
		require.Equal(t, unfit, cutUnfit)
		require.Equal(t, fmt.Sprint(cause), fmt.Sprint(cutCause))
		require.Equal(t, driver, cutDriver)
	})
}

// FuzzMessage checks that what the driver can read is read alike, and that what nobody can read
// costs no other message.
func FuzzMessage(f *testing.F) {
	table := func(fields ...byte) []byte {
		return append(binary.BigEndian.AppendUint32([]byte{0x20, 0}, uint32(len(fields))), fields...)
	}
	f.Add([]byte{0, 0}, "body")
	f.Add([]byte{
		0xFF, 0xFC,
		1, 'c', 1, 'e', 0, 0, 0, 4, 1, 'k', 't', 1, 2, 9, 1, 'i', 1, 'r', 1, '7', 1, 'm',
		0, 0, 0, 0, 0x60, 0, 0, 0, 1, 't', 1, 'u', 1, 'a', 1, 'z',
	}, "all of them")
	f.Add(table(1, 'B', 'B', 200, 1, 'b', 'b', 200, 1, 's', 's', 0xFF, 1, 1, 'u', 'u', 0xFF, 1), "integers")
	f.Add(table(1, 'I', 'I', 0xFF, 0, 0, 1, 1, 'i', 'i', 0xFF, 0, 0, 1, 1, 'l', 'l', 0xFF, 0, 0, 0, 0, 0, 0, 1), "more")
	f.Add(table(1, 'f', 'f', 0x40, 0x49, 0x0F, 0xDB, 1, 'd', 'd', 0x40, 9, 0x21, 0xFB, 0x54, 0x44, 0x2D, 0x18, 1, 'D', 'D', 2, 0, 0, 1, 0), "numbers")
	f.Add(table(1, 'T', 'T', 0, 0, 0, 0, 0x60, 0, 0, 0, 1, 'V', 'V', 1, 'x', 'x', 0, 0, 0, 2, 1, 2, 1, 'S', 'S', 0, 0, 0, 1, 'a'), "others")
	f.Add(table(1, 'A', 'A', 0, 0, 0, 4, 't', 1, 'V', 'V', 1, 'F', 'F', 0, 0, 0, 4, 1, 'a', 't', 0), "nested")
	f.Add(table(1, 'A', 'A', 0, 0, 0, 2, 'I', 0), "an array cut off in a value")
	f.Add(table(1, 'A', 'A', 0, 0, 0, 1, 'I'), "and before one")
	f.Add(table(1, 'A', 'A', 0, 0, 0, 9, 't'), "and shorter than it says")
	f.Add(table(1, 'x', 'x', 0x80, 0, 0, 0), "negative")
	f.Add(table(slicesOf([]byte{1, 'A', 'A', 0, 0, 0, 9}, []byte{'F', 0, 0, 0, 3, 1, 'k', 'I'}, []byte{'V', 1, 'z', 't', 1})...), "an array cut off in a table")
	f.Fuzz(func(t *testing.T, properties []byte, body string) {
		if len(properties) > 4000 || len(body) > 1000 {
			return
		}
		message := messageOf(1, 1, properties, body)
		_, ours, unfit, cause := sortedAll(t, slicesOf(message, messageOf(1, 2, []byte{0, 0}, "next")), 0, whole)
		require.ErrorIs(t, cause, ErrPeerClosed, "nothing in a message ends the socket")
		require.Equal(t, 2, len(ours)+len(unfit), "%v", unfit)
		require.Equal(t, "next", string(ours[len(ours)-1].Body))
		theirs, ok := driverReads(t, message)
		if !ok {
			return // it refuses more than we do, see the headers that only RabbitMQ accepts
		}
		require.Len(t, ours, 2, "%v", unfit)
		theirs.Acknowledger = nil
		require.Equal(t, fmt.Sprintf("%#v", theirs), fmt.Sprintf("%#v", ours[0])) // NaN is not equal to itself
	})
}

func TestAnnouncedSizeIsNotBelieved(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 1)
		announced := messageOf(1, 1, []byte{0, 0})
		binary.BigEndian.PutUint64(announced[len(announced)-11:], 1<<40)
		_, err := far.Write(announced)
		require.NoError(t, err)
		synctest.Wait()
		assert.LessOrEqual(t, cap(sub.message.Body), FrameSize)
	})
}

// A body in many frames may take longer than the driver allows silence.
func TestMessageThatTricklesInIsASignOfLifeForTheDriver(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, conn, far := driven(t)
		parts := make([]string, 60)
		for i := range parts {
			parts[i] = "part"
		}
		b := messageOf(1, 1, []byte{0, 0}, parts...)
		head := len(b) - len(parts)*(frameHead+len("part")+1)
		_, err := far.Write(b[:head])
		require.NoError(t, err)
		for b = b[head:]; len(b) > 0; b = b[frameHead+len("part")+1:] {
			time.Sleep(time.Second)
			_, err := far.Write(b[:frameHead+len("part")+1])
			require.NoError(t, err)
		}
		d := sub.take()
		assert.Len(t, d.Body, 240)
		assert.False(t, conn.IsClosed())
		sub.socket.Kill(nil)
		_ = conn.Close()
	})
}

func TestDeliveryOfAnotherConsumerInterruptsAMessage(t *testing.T) {
	method := len(methodOf(1, 60, 60, make([]byte, 17)...))
	ours := messageOf(1, 1, []byte{0, 0}, "ours")[:method]
	theirs := bytes.Replace(messageOf(1, 2, []byte{0, 0}, "theirs"), []byte{1, 't'}, []byte{1, 'u'}, 1)
	driver, deliveries, _ := sorted(t, slicesOf(ours, theirs), 0, whole)
	assert.Equal(t, theirs, driver)
	assert.Empty(t, deliveries)
}

func TestSubscriptionThatIsDoneWithKeepsNothing(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		sub, _, far := consumer(t, socketLimits, 10)
		s := sub.socket
		collect(far)
		deliver(t, far, 5)
		_, err := s.Write(methodOf(1, 20, 40, 0, 200, 0, 0, 0, 0, 0))
		require.NoError(t, err)
		sub.LeaveTombstone()
		s.out.mu.Lock()
		assert.NotSame(t, sub.Subscription, s.out.subscriptions.on(1))
		assert.Nil(t, s.out.subscriptions.on(1).receiver)
		s.out.mu.Unlock()
		deliver(t, far, 5)
		assert.Equal(t, 5, sub.count(), "dropped")
	})
}

// driverReads has the plain driver receive message for consumer t on channel 1.
func driverReads(t *testing.T, message []byte) (amqp.Delivery, bool) {
	near, far := net.Pipe()
	played := make(chan error, 1)
	go func() { played <- playConsume(far, message) }()
	conn, err := amqp.Open(near, amqp.Config{SASL: []amqp.Authentication{&amqp.PlainAuth{}}, Vhost: "/"})
	require.NoError(t, err)
	defer func() {
		_ = far.Close()
		_ = conn.Close()
	}()
	channel, err := conn.Channel()
	require.NoError(t, err)
	deliveries, err := channel.Consume("q", "t", false, false, false, false, nil)
	require.NoError(t, err)
	d, ok := <-deliveries
	return d, ok
}

// playConsume is a broker up to one message behind a consume-ok; then it only reads.
func playConsume(far net.Conn, message []byte) error {
	if err := broker(far); err != nil {
		return err
	}
	for _, reply := range [][]byte{methodOf(1, 20, 11, 0, 0, 0, 0), slicesOf(methodOf(1, 60, 21, 1, 't'), message, heartbeatFrame)} {
		if _, err := readMethod(far); err != nil {
			return err
		}
		if _, err := far.Write(reply); err != nil {
			return err
		}
	}
	_, err := io.Copy(io.Discard, far)
	if errors.Is(err, io.ErrClosedPipe) {
		return nil
	}
	return err
}
