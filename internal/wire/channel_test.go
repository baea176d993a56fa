package wire

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// late is what GiveUp is called with here.
var late = closeMethod{504, "the call took too long"}

// sides are a socket and all that its two sides get.
type sides struct {
	t      *testing.T
	s      *Socket
	far    net.Conn
	broker *sink // gets what was written
	driver *sink // gets what Read returns
}

func bothSides(t *testing.T) *sides {
	t.Helper()
	o := socketLimits
	o.Refuse = atMost(1000)
	s, _, far := pipe(t, o)
	return &sides{t, s, far, collect(far), collect(readsOnly{s})}
}

// readsOnly is a Socket as its driver reads it.
type readsOnly struct{ *Socket }

// drives writes what the driver writes, in pieces of so many bytes at most.
func (b *sides) drives(piece int, frames ...[]byte) {
	b.t.Helper()
	for p := slicesOf(frames...); len(p) > 0; {
		n := min(piece, len(p))
		_, err := b.s.Write(p[:n])
		require.NoError(b.t, err)
		p = p[n:]
	}
	synctest.Wait()
}

// sends writes what the broker sends, likewise.
func (b *sides) sends(piece int, frames ...[]byte) {
	b.t.Helper()
	for p := slicesOf(frames...); len(p) > 0; {
		n := min(piece, len(p))
		_, err := b.far.Write(p[:n])
		require.NoError(b.t, err)
		p = p[n:]
	}
	synctest.Wait()
}

// opens is a channel whose channel.open the driver has written.
func (b *sides) opens(number uint16) *Channel {
	b.t.Helper()
	c, err := b.s.ClaimChannel(b.t.Context())
	require.NoError(b.t, err)
	b.drives(1000, openOf(number))
	return c
}

func (b *sides) gives(c *Channel) {
	b.t.Helper()
	require.True(b.t, c.GiveUp(late.code, late.reason))
	synctest.Wait()
}

// brokerGot and driverGot check all that arrived at one side so far.
func (b *sides) brokerGot(frames ...[]byte) {
	b.t.Helper()
	require.Equal(b.t, string(slicesOf(frames...)), string(b.broker.bytes()), "at the broker")
}

func (b *sides) driverGot(frames ...[]byte) {
	b.t.Helper()
	require.Equal(b.t, string(slicesOf(frames...)), string(b.driver.bytes()), "at the driver")
}

func openOf(channel uint16) []byte    { return methodOf(channel, 20, 10, 0) }
func openOkOf(channel uint16) []byte  { return methodOf(channel, 20, 11, 0, 0, 0, 0) }
func closeOkOf(channel uint16) []byte { return methodOf(channel, 20, 41) }

// closedOf is the channel.close of a given-up channel.
func closedOf(channel uint16) []byte {
	args := append([]byte{504 >> 8, 504 & 0xff, byte(len(late.reason))}, late.reason...)
	return methodOf(channel, 20, 40, append(args, 0, 0, 0, 0)...)
}

func otherCloseOf(channel uint16) []byte { return methodOf(channel, 20, 40, 1, 0x94, 0, 0, 0, 0, 0) }

func TestGivenUpChannelIsClosedTowardsBothSides(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := bothSides(t)
		c := b.opens(1)
		sub := openSubscription(b.s, 1, 10)
		b.sends(1000, deliveryOf(1, nil), deliveryOf(2, nil))
		require.NoError(t, sub.Ack(1))
		began := time.Now()
		b.gives(c)
		assert.Zero(t, time.Since(began), "a Read that waits for the broker is woken")
		b.brokerGot(openOf(1), ackOf(1), closedOf(1))
		b.driverGot(closedOf(1))
		assert.Equal(t, 1, b.s.GivenUp())
		require.Error(t, sub.Ack(2), "it is fenced")

		b.drives(1000, closeOkOf(1))
		b.sends(1000, closeOkOf(1))
		assert.Zero(t, b.s.GivenUp())
		b.brokerGot(openOf(1), ackOf(1), closedOf(1))
		b.driverGot(closedOf(1))
		assert.Empty(t, b.s.out.channels.numbers, "nothing is left of it")
	})
}

// orders calls try with every order of n things.
func orders(n int, try func(order []int)) {
	var next func(order []int)
	next = func(order []int) {
		if len(order) == n {
			try(order)
			return
		}
	candidates:
		for i := range n {
			for _, used := range order {
				if used == i {
					continue candidates
				}
			}
			next(append(order[:len(order):len(order)], i))
		}
	}
	next(nil)
}

// Whatever the broker still sends on the channel, before its close-ok, is nobody's. What the other
// channels get stands between.
func TestNothingThatComesLateReachesTheDriver(t *testing.T) {
	late := [][]byte{
		// open-ok, consume-ok, basic.cancel and cancel-ok
		slicesOf(openOkOf(1), methodOf(1, 60, 21, 1, 't'), methodOf(1, 60, 30, 1, 't', 0), methodOf(1, 60, 31, 1, 't')),
		messageOf(1, 7, []byte{0, 0}, "a", "bcd"),
		slicesOf(methodOf(1, 60, 60, 1, 't', 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 1, 'q'), headerOf(5000), frameOf(frameBody, 1, make([]byte, 5000)...)),
		otherCloseOf(1), // it has closed the channel before it saw our close
		otherCloseOf(1), // and RabbitMQ 3.10 may do that twice
	}
	orders(len(late), func(order []int) {
		inBubble(t, func(t *testing.T) {
			b := bothSides(t)
			c := b.opens(1)
			sub := openSubscription(b.s, 1, 10)
			second := openSubscription(b.s, 2, 10)
			b.gives(c)
			var frames [][]byte
			for _, i := range order {
				frames = append(frames, late[i], messageOf(2, uint64(i+1), []byte{0, 0}, "body"))
			}
			b.sends(1+17*order[0], append(frames, methodOf(2, 60, 11))...)
			assert.Equal(t, 1, b.s.GivenUp())
			b.sends(1+order[0], closeOkOf(1), heartbeatFrame)

			assert.Zero(t, b.s.GivenUp())
			assert.Zero(t, sub.count()+len(sub.aside))
			assert.Equal(t, len(late), second.count())
			b.driverGot(closedOf(1), methodOf(2, 60, 11), heartbeatFrame)
			b.brokerGot(openOf(1), closedOf(1), closeOkOf(1)) // the broker's own close is answered, once
		})
	})
}

// A channel that has no claim is none the less the broker's to end.
func TestEndOfAnotherChannelIsTheDrivers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := bothSides(t)
		b.gives(b.opens(1))
		b.sends(1, closeOkOf(2), otherCloseOf(3))
		b.driverGot(closedOf(1), closeOkOf(2), otherCloseOf(3))
		b.brokerGot(openOf(1), closedOf(1))
	})
}

// What the driver writes on the channel until it has heard of its end goes nowhere.
func TestDriverWritesNothingOnAGivenUpChannel(t *testing.T) {
	muted := slicesOf(methodOf(1, 60, 10, 0, 0, 0, 0, 0, 1, 0), methodOf(1, 60, 40, 0, 0, 0, 1, 'q', 0), headerOf(5),
		frameOf(frameBody, 1, 1, 2, 3, 4, 5), frameOf(frameBody, 1), methodOf(1, 20, 40, 0, 200, 0, 0, 0, 0, 0), closeOkOf(1))
	others := [][]byte{methodOf(2, 60, 10, 0, 0, 0, 0, 0, 1, 0), heartbeatFrame}
	for piece := 1; piece < len(muted); piece++ {
		inBubble(t, func(t *testing.T) {
			b := bothSides(t)
			b.gives(b.opens(1))
			b.drives(piece, others[0], muted, others[1])
			b.brokerGot(openOf(1), closedOf(1), others[0], others[1])
		})
	}
}

// The broker takes a channel.open before its close-ok for an error of the connection.
func TestNumberIsOpenedAgainOnceTheBrokerHasConfirmed(t *testing.T) {
	for piece := 1; piece <= len(openOf(1)); piece++ {
		inBubble(t, func(t *testing.T) {
			b := bothSides(t)
			first := b.opens(1)
			openSubscription(b.s, 1, 10)
			b.gives(first)
			second, err := b.s.ClaimChannel(t.Context())
			require.NoError(t, err)
			b.drives(piece, closeOkOf(1), openOf(1), heartbeatFrame)
			b.brokerGot(openOf(1), closedOf(1), heartbeatFrame)
			b.sends(1, deliveryOf(1, []byte("late")), openOkOf(1), closeOkOf(1))
			b.brokerGot(openOf(1), closedOf(1), heartbeatFrame, openOf(1))
			b.sends(1, openOkOf(1))
			b.driverGot(closedOf(1), openOkOf(1))

			require.False(t, first.GiveUp(504, "again"), "the number is another's")
			sub := openSubscription(b.s, 1, 10)
			b.sends(1, deliveryOf(1, []byte("new")))
			require.Equal(t, "new", string(sub.take().Body))
			require.NoError(t, sub.Ack(1))
			b.gives(second)
			require.Error(t, sub.Ack(1))
			assert.Equal(t, 1, b.s.GivenUp())
		})
	}
}

func TestNumberThatTheBrokerHasConfirmedIsOpenedAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := bothSides(t)
		b.gives(b.opens(1))
		b.sends(1, closeOkOf(1))
		b.drives(1, closeOkOf(1))
		b.opens(1)
		b.brokerGot(openOf(1), closedOf(1), openOf(1))
		b.sends(1, openOkOf(1))
		b.driverGot(closedOf(1), openOkOf(1))
	})
}

// The broker never heard of a channel whose open waits: it hears of its end as little.
func TestChannelWhoseOpenWaitsIsGivenUp(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := bothSides(t)
		b.gives(b.opens(1))
		b.drives(1, closeOkOf(1))
		b.gives(b.opens(1))
		assert.Equal(t, 1, b.s.GivenUp())
		b.driverGot(closedOf(1), closedOf(1))
		b.drives(1, closeOkOf(1))
		b.opens(1)
		b.brokerGot(openOf(1), closedOf(1))
		b.sends(1, closeOkOf(1))
		b.brokerGot(openOf(1), closedOf(1), openOf(1))
		assert.Zero(t, b.s.GivenUp())
		b.driverGot(closedOf(1), closedOf(1))
	})
}

func TestChannelIsGivenUpBeforeItsOpen(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := bothSides(t)
		c, err := b.s.ClaimChannel(t.Context())
		require.NoError(t, err)
		b.gives(c)
		require.False(t, c.GiveUp(1, "again"))
		b.driverGot()
		b.drives(1, openOf(1))
		b.driverGot(closedOf(1))
		b.drives(1, closeOkOf(1))
		b.brokerGot()
		assert.Zero(t, b.s.GivenUp())
		b.opens(1)
		b.brokerGot(openOf(1))
	})
}

func TestGiveUpOfWhatHasEndedDoesNothing(t *testing.T) {
	for name, end := range map[string]func(b *sides, c *Channel){
		"the driver is about to hear that the broker closed it": func(b *sides, c *Channel) { b.sends(1, otherCloseOf(1)) },
		"the driver is about to hear that its close is done": func(b *sides, c *Channel) {
			b.drives(1, methodOf(1, 20, 40, 0, 200, 0, 0, 0, 0, 0))
			b.sends(1, closeOkOf(1))
		},
		"it was given up":                                func(b *sides, c *Channel) { b.gives(c) },
		"the number is another's":                        func(b *sides, c *Channel) { b.opens(1) },
		"somebody has opened the number without a claim": func(b *sides, c *Channel) { b.drives(1, openOf(1)) },
		"the connection closes":                          func(b *sides, c *Channel) { b.drives(1, methodFrame(0, connectionClose)) },
		"the broker closes the connection":               func(b *sides, c *Channel) { b.drives(1, methodFrame(0, connectionCloseOk)) },
		"the socket is closed": func(b *sides, c *Channel) {
			_ = b.s.Close()
			synctest.Wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				b := bothSides(t)
				c := b.opens(1)
				end(b, c)
				broker, driver := b.broker.bytes(), b.driver.bytes()
				require.False(t, c.GiveUp(1, "once more"))
				synctest.Wait()
				b.brokerGot(broker)
				b.driverGot(driver)
			})
		})
	}
}

// RabbitMQ answers a second channel.close, or takes it for one to a channel that was never opened.
func TestChannelIsGivenUpWhileTheDriverClosesIt(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := bothSides(t)
		c := b.opens(1)
		closing := methodOf(1, 20, 40, 0, 200, 0, 0, 0, 0, 0)
		b.drives(1, closing)
		b.gives(c)
		assert.Equal(t, 1, b.s.GivenUp())
		b.drives(1, closeOkOf(1))
		b.sends(1, closeOkOf(1))
		assert.Zero(t, b.s.GivenUp())
		b.brokerGot(openOf(1), closing)
		b.driverGot(closedOf(1))
	})
}

// However much of a message has been read, its rest is dropped.
func TestChannelIsGivenUpWhileAMessageIsRead(t *testing.T) {
	oversized := frameOf(frameHeader, 1, append([]byte{0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4}, make([]byte, maxHeader)...)...)
	for name, message := range map[string][]byte{
		"one that is read":    messageOf(1, 1, []byte{0, 0}, "some", "more"),
		"one that is skipped": messageOf(1, 1, []byte{0, 0}, string(make([]byte, 1500))),
		"large headers":       slicesOf(methodOf(1, 60, 60, 1, 't', 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 'q'), oversized, frameOf(frameBody, 1, []byte("body")...)),
	} {
		t.Run(name, func(t *testing.T) {
			step := max(1, len(message)/100)
			for cut := 0; cut < len(message); cut += step {
				inBubble(t, func(t *testing.T) {
					b := bothSides(t)
					c := b.opens(1)
					sub := openSubscription(b.s, 1, 10)
					b.sends(1<<20, message[:cut])
					b.gives(c)
					b.driverGot(closedOf(1))
					b.sends(1<<20, message[cut:], methodOf(1, 60, 21, 1, 't'), closeOkOf(1), heartbeatFrame)
					require.Zero(t, sub.count()+len(sub.aside), "cut after %d", cut)
					b.driverGot(closedOf(1), heartbeatFrame)
				})
			}
		})
	}
}

// A close-ok in the middle of a message is the close-ok all the same.
func TestMessageMayBeCutOffByTheEnd(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := bothSides(t)
		c := b.opens(1)
		openSubscription(b.s, 1, 10)
		cut := messageOf(1, 1, []byte{0, 0}, "some", "more")
		b.sends(1, cut[:len(cut)-12])
		b.gives(c)
		b.sends(1, closeOkOf(1))
		assert.Zero(t, b.s.GivenUp())
		b.driverGot(closedOf(1))
	})
}

// The close of a channel keeps out of the frames of the driver, and out of a message on its own
// channel: RabbitMQ takes anything but the rest of that for an error of the connection.
func TestCloseKeepsOutOfWhatTheDriverWrites(t *testing.T) {
	message := slicesOf(methodOf(1, 60, 40, 0, 0, 0, 1, 'q', 0), headerOf(5), frameOf(frameBody, 1, 1, 2, 3), frameOf(frameBody, 1, 4, 5))
	other := methodOf(2, 60, 10, 0, 0, 0, 0, 0, 1, 0)
	ignored := methodOf(1, 60, 10, 0, 0, 0, 0, 0, 1, 0)
	for cut := 1; cut < len(message); cut++ {
		inBubble(t, func(t *testing.T) {
			b := bothSides(t)
			c := b.opens(1)
			b.drives(1000, message[:cut])
			b.gives(c)
			b.driverGot(closedOf(1))
			b.drives(1000, message[cut:], ignored, other)
			if cut < methodHead { // it has not begun, for all the broker knows
				b.brokerGot(openOf(1), other, closedOf(1))
				return
			}
			b.brokerGot(openOf(1), message, other, closedOf(1))
		})
	}
	for cut := 1; cut < len(other); cut++ {
		inBubble(t, func(t *testing.T) {
			b := bothSides(t)
			c := b.opens(1)
			b.drives(1000, other[:cut])
			b.gives(c)
			b.drives(1000, other[cut:], heartbeatFrame)
			b.brokerGot(openOf(1), other, heartbeatFrame, closedOf(1))
		})
	}
}

// A message that has gone out whole keeps nothing back.
func TestCloseFollowsAMessageThatIsWhole(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := bothSides(t)
		c := b.opens(1)
		message := slicesOf(methodOf(1, 60, 40, 0, 0, 0, 1, 'q', 0), headerOf(5), frameOf(frameBody, 1, 1, 2, 3), frameOf(frameBody, 1, 4, 5))
		empty := slicesOf(methodOf(1, 60, 40, 0, 0, 0, 1, 'q', 0), headerOf(0))
		b.drives(1, message, empty)
		b.gives(c)
		b.brokerGot(openOf(1), message, empty, closedOf(1))
	})
}

func TestWakingReadLeavesTheDriversDeadlineAlone(t *testing.T) {
	for name, early := range map[string]bool{"set before": true, "set while it is woken": false} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				s, _, far := pipe(t, Options{})
				collect(far)
				c, err := s.ClaimChannel(t.Context())
				require.NoError(t, err)
				_, err = s.Write(openOf(1))
				require.NoError(t, err)
				deadline := time.Now().Add(10 * time.Second)
				if early {
					require.NoError(t, s.SetReadDeadline(deadline))
				}
				require.True(t, c.GiveUp(1, "")) // Read comes later, and is not to fail
				if !early {
					require.NoError(t, s.SetReadDeadline(deadline))
				}
				n, err := s.Read(make([]byte, 100))
				require.NoError(t, err)
				require.Equal(t, len(methodOf(1, 20, 40, 0, 1, 0, 0, 0, 0, 0)), n)
				_, err = s.Read(make([]byte, 100))
				require.ErrorIs(t, err, ErrReadTimeout)
				assert.Equal(t, deadline, time.Now())
			})
		})
	}
}

// deadlineConn keeps what its read deadline is set to.
type deadlineConn struct {
	net.Conn
	set []time.Time
}

func (c *deadlineConn) SetReadDeadline(t time.Time) error {
	c.set = append(c.set, t)
	return c.Conn.SetReadDeadline(t)
}

// The kernel's Read forgets that it was to end, if its deadline is put off before it has looked.
func TestDeadlineOfTheDriverCallsOffNoWake(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		conn := &deadlineConn{Conn: near}
		s := NewSocket(conn, Options{})
		defer s.Wait()
		defer s.Kill(nil)
		collect(far)
		c, err := s.ClaimChannel(t.Context())
		require.NoError(t, err)
		_, err = s.Write(openOf(1))
		require.NoError(t, err)
		require.True(t, c.GiveUp(late.code, late.reason))
		deadline := time.Now().Add(time.Second)
		require.NoError(t, s.SetReadDeadline(deadline))
		require.Len(t, conn.set, 1)
		require.True(t, conn.set[0].Before(time.Now()))
		buf := make([]byte, 100)
		n, err := s.Read(buf)
		require.NoError(t, err)
		require.Equal(t, closedOf(1), buf[:n])
		_, err = s.Read(buf)
		require.ErrorIs(t, err, ErrReadTimeout)
		require.True(t, conn.set[len(conn.set)-1].Equal(deadline))
	})
}

// Over a real kernel, and over TLS, which remembers most errors of a connection for good.
func TestReadIsWokenAndLosesNothing(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS %v", secure), func(t *testing.T) {
			near, far := tcpPair(t)
			if secure {
				server, client := certificates(t)
				client.ServerName = "127.0.0.1"
				ours, theirs := tls.Client(near, client), tls.Server(far, server)
				shaken := make(chan error, 1)
				go func() { shaken <- theirs.Handshake() }()
				require.NoError(t, ours.Handshake())
				require.NoError(t, <-shaken)
				near, far = ours, theirs
			}
			s := NewSocket(near, Options{})
			defer s.Wait()
			defer s.Kill(nil)
			collect(far)
			read := make(chan []byte)
			go func() {
				for {
					buf := make([]byte, 1000)
					n, err := s.Read(buf)
					if err != nil {
						close(read)
						return
					}
					read <- buf[:n]
				}
			}()
			for range 100 {
				c, err := s.ClaimChannel(t.Context())
				require.NoError(t, err)
				_, err = s.Write(openOf(1))
				require.NoError(t, err)
				cut := slicesOf(heartbeatFrame, methodOf(2, 60, 11))
				_, err = far.Write(cut[:len(heartbeatFrame)+3])
				require.NoError(t, err)
				require.Equal(t, heartbeatFrame, <-read)
				require.True(t, c.GiveUp(late.code, late.reason))
				require.Equal(t, closedOf(1), <-read)
				_, err = s.Write(closeOkOf(1))
				require.NoError(t, err)
				_, err = far.Write(slicesOf(cut[len(heartbeatFrame)+3:], closeOkOf(1)))
				require.NoError(t, err)
				require.Equal(t, methodOf(2, 60, 11), <-read)
			}
			s.Kill(nil)
			_, more := <-read
			assert.False(t, more)
		})
	}
}

func TestClaimsComeInTurn(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := bothSides(t)
		first, err := b.s.ClaimChannel(t.Context())
		require.NoError(t, err)
		claimed := make(chan *Channel)
		go func() {
			c, _ := b.s.ClaimChannel(t.Context())
			claimed <- c
		}()
		ctx, cancel := context.WithCancelCause(t.Context())
		refused := make(chan error, 1)
		go func() {
			_, err := b.s.ClaimChannel(ctx)
			refused <- err
		}()
		synctest.Wait()
		require.Empty(t, claimed)
		cancel(io.ErrNoProgress)
		require.ErrorIs(t, <-refused, io.ErrNoProgress)
		first.Release()
		second := <-claimed
		require.False(t, first.GiveUp(1, "released"))
		first.Release()
		b.drives(1000, openOf(7))
		b.gives(second)
		b.driverGot(closedOf(7))
		second.Release() // it was opened: the next claim is not its own
		third, err := b.s.ClaimChannel(t.Context())
		require.NoError(t, err)
		second.Release()
		waits := make(chan error, 1)
		go func() {
			_, err := b.s.ClaimChannel(t.Context())
			waits <- err
		}()
		synctest.Wait()
		require.Empty(t, waits, "it is third's turn")
		b.s.Kill(io.ErrShortWrite)
		require.ErrorIs(t, <-waits, io.ErrShortWrite)
		third.Release()
		_, err = b.s.ClaimChannel(ctx)
		require.ErrorIs(t, err, io.ErrNoProgress)
	})
}

func TestReasonIsCutWhereTheFrameEnds(t *testing.T) {
	long := ""
	for len(long) < 300 {
		long += "\u00e4"
	}
	frame := closeMethod{504, long}.frame(1)
	d := decoder{b: frame[methodHead : len(frame)-1]}
	assert.EqualValues(t, 504, d.short())
	assert.Equal(t, long[:254], string(d.shortstr()))
	assert.Zero(t, d.long())
	assert.Empty(t, d.b)
	assert.NoError(t, d.err)
}

// Driver and broker may close a channel at the same time. The broker then answers the driver, which
// has forgotten by then that it asked, and may have opened the number again.
func TestBothSidesCloseAChannelAtOnce(t *testing.T) {
	closing := methodOf(1, 20, 40, 0, 200, 0, 0, 0, 0, 0)
	t.Run("the driver first", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			b := bothSides(t)
			c := b.opens(1)
			openSubscription(b.s, 1, 10)
			b.drives(1, closing)
			b.sends(1, otherCloseOf(1))
			require.False(t, c.GiveUp(1, "it has ended"))
			b.drives(1, closeOkOf(1), openOf(1))
			b.brokerGot(openOf(1), closing, closeOkOf(1))
			assert.Zero(t, b.s.GivenUp(), "nobody gave it up")
			b.sends(1, closeOkOf(1), openOkOf(1))
			b.brokerGot(openOf(1), closing, closeOkOf(1), openOf(1))
			b.driverGot(otherCloseOf(1), openOkOf(1))
		})
	})
	t.Run("the broker first", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			b := bothSides(t)
			b.opens(1)
			b.sends(1, otherCloseOf(1))
			b.drives(1, closing, closeOkOf(1))
			assert.Empty(t, b.s.out.channels.numbers)
			b.opens(1)
			b.brokerGot(openOf(1), closeOkOf(1), openOf(1))
			b.sends(1, openOkOf(1))
			b.driverGot(otherCloseOf(1), openOkOf(1))
		})
	})
}
