package wire

import (
	"context"
	"encoding/binary"
	"math"
	"strings"
	"sync/atomic"
)

// Channel is one channel of the driver, as the wire sees it: it can be given up by itself, where a
// call on it hangs, while the others of its socket live on.
//
// The driver hides the number of a channel. It writes channel.open on the goroutine that calls
// Channel of its Connection, so the number is learnt there: by the claim that was made before.
type Channel struct {
	socket *Socket
	number uint16 // once its channel.open was written; outbound's mutex guards all that follows
	state  channelState
	close  closeMethod // what the driver is told at its channel.open, if it was given up before
	queues *Queues     // that are declared on it; nil if nobody asks
}

type channelState int

const (
	channelClaimed channelState = iota // its channel.open is to come
	channelOpened
	channelOver // ended, given up or released
)

// ClaimChannel claims the next channel.open that the driver writes. The caller then calls Channel
// of the driver's Connection, and releases the claim when that has returned. There is one claim at
// a time, from here to the channel.open, and the wait for it ends with the socket and with ctx. All
// who open channels have to claim them: a channel.open without a claim is taken for that of
// another.
func (s *Socket) ClaimChannel(ctx context.Context) (*Channel, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	o := &s.out
	select {
	case o.channels.turn <- struct{}{}:
	case <-s.end.done:
		return nil, s.err()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	c := &Channel{socket: s}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.channels.claim = c
	o.channels.opening.Add(1)
	return c, nil
}

// Release lets the next one claim, if no channel.open was written: the driver had no number left,
// or its connection has ended. Otherwise it does nothing. It may be called again.
func (c *Channel) Release() {
	o := &c.socket.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.channels.claim == c {
		o.channels.claimed()
		c.state = channelOver
	}
}

// GiveUp ends the channel from here, whatever hangs on it. It does not block. It tells the driver
// that the broker has closed the channel with this code and reason: the call that hangs returns
// that, and the number is free for the driver. It closes the channel towards the broker, behind
// what was written so far. From then on nothing is settled on it any more, and nothing that either
// side still sends on it reaches the other one. The number is used again once the broker has
// confirmed the close: it takes a channel.open before that for an error of the connection, so that
// one waits here.
//
// A channel whose channel.open was not written, or waits, is not known to the broker, which then
// hears nothing of it. GiveUp does nothing, and returns false, if the channel has ended or was
// given up, if the driver is about to hear of its end from the broker, or if the connection is
// closing. A call that hangs because the peer takes no more data hangs on, until the write timeout.
func (c *Channel) GiveUp(code uint16, reason string) bool {
	o := &c.socket.out
	o.mu.Lock()
	done := o.giveUp(c, closeMethod{code, reason})
	wake, tell := done && o.flush.flushNow(), len(o.channels.toDriver) > 0
	o.mu.Unlock()
	if wake {
		o.wakeWriter()
	}
	if tell {
		c.socket.in.wake()
	}
	return done
}

// Held reports whether the channel.open waits for the broker to confirm the close of a channel of
// that number which was given up.
func (c *Channel) Held() bool {
	o := &c.socket.out
	o.mu.Lock()
	defer o.mu.Unlock()
	n := o.channels.numbers[c.number]
	return c.state == channelOpened && n != nil && n.held
}

// GivenUp is how many channels were given up and are still open for all that the broker has said.
func (s *Socket) GivenUp() int {
	s.out.mu.Lock()
	defer s.out.mu.Unlock()
	count := 0
	for _, n := range s.out.channels.numbers {
		if n.givenUp && n.awaited {
			count++
		}
	}
	return count
}

// closeMethod is a channel.close.
type closeMethod struct {
	code   uint16
	reason string
}

// frame is the channel.close of a channel: code and reason, and which method was to blame, 0 for
// none.
func (m closeMethod) frame(channel uint16) []byte {
	reason := m.reason
	if len(reason) > math.MaxUint8 {
		reason = strings.ToValidUTF8(reason[:math.MaxUint8], "")
	}
	args := binary.BigEndian.AppendUint16(nil, m.code)
	args = append(append(args, byte(len(reason))), reason...)
	return methodOn(channel, channelClose, append(args, 0, 0, 0, 0)...)
}

// methodOn is a method frame of the wire's own.
func methodOn(channel uint16, id uint32, args ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{frameMethod}, channel)
	b = binary.BigEndian.AppendUint32(b, uint32(methodHead-frameHead+len(args)))
	b = binary.BigEndian.AppendUint32(b, id)
	return append(append(b, args...), frameEnd)
}

// channels are those of a socket that were claimed, and what is left of those that were given up.
// The mutex of outbound guards all but turn.
type channels struct {
	turn    chan struct{} // has room for the one who may claim
	claim   *Channel      // whose channel.open is next; nil if nobody has claimed
	numbers map[uint16]*number
	closing bool // the driver closes the connection

	fromWire []byte // frames to the broker that wait for the end of a frame of the driver
	toDriver []byte // frames that the driver is to get from the wire

	opening atomic.Int32 // how many are claimed, or not opened by the broker yet
}

// number is what is known of a number of a channel. Two things of a channel have to end, in any
// order, before the number is as new: the driver answers what it is told, and the broker what it is
// told.
type number struct {
	channel *Channel // that lives; nil if none does
	closing bool     // the driver itself has written channel.close
	left    int64    // of the body of a message that the driver is writing; headerToCome before it
	closed  bool     // by the broker; the driver's channel.close-ok is to come
	opening bool     // the broker's channel.open-ok is to come

	givenUp  bool
	muted    bool   // what the driver writes goes nowhere, up to its channel.close-ok
	awaited  bool   // the broker's channel.close-ok is to come
	unsent   []byte // the channel.close that waits for the end of a message
	answered bool   // the channel.close that the broker has sent meanwhile
	held     bool   // the driver's channel.open waits for the broker's channel.close-ok

	declares *declares // of the channel; nil if nobody asks
	late     *declares // of the channel that was given up, as long as the broker may answer
}

const headerToCome = -1

func (all *channels) init() {
	all.turn = make(chan struct{}, 1)
	all.numbers = make(map[uint16]*number)
}

// claimed ends the claim.
func (all *channels) claimed() {
	all.claim = nil
	all.opening.Add(-1)
	<-all.turn // it is there: whoever claims has put it there
}

// learn takes a frame that the driver writes, or at least its beginning. It returns false if the
// broker must not get it.
func (all *channels) learn(p []byte) (pass bool) {
	channel := binary.BigEndian.Uint16(p[1:])
	switch methodID(p) {
	case channelOpen:
		return all.opens(channel)
	case connectionClose, connectionCloseOk:
		all.closing = true
		return true
	}
	n := all.numbers[channel]
	switch {
	case n == nil:
		return true
	case n.muted:
		return all.mute(channel, n, p)
	case n.closed:
		return all.answer(channel, n, methodID(p))
	}
	n.follow(p)
	n.closing = n.closing || methodID(p) == channelClose
	if methodID(p) == queueDeclare && n.declares != nil {
		n.declares.learn(p)
	}
	return true
}

// opens takes a channel.open of the driver.
func (all *channels) opens(channel uint16) (pass bool) {
	n := &number{}
	if before := all.numbers[channel]; before != nil {
		// A stray reply may have ended the driver's wait for the close-ok, which is to come.
		before.awaited = before.awaited || before.closing && before.channel != nil
		all.end(before)
		n.awaited, n.answered, n.givenUp, n.late = before.awaited, before.answered, before.givenUp, before.late
	}
	c := all.claim
	if c != nil {
		all.claimed()
		c.number = channel
	}
	switch {
	case c == nil:
	case c.state == channelOver: // given up already
		n.muted = true
		all.toDriver = append(all.toDriver, c.close.frame(channel)...)
		all.numbers[channel] = n
		return false
	default:
		c.state = channelOpened
		n.channel = c
		if c.queues != nil {
			n.declares = &declares{of: c.queues}
		}
	}
	n.held, n.opening = n.awaited, true
	all.opening.Add(1)
	all.numbers[channel] = n
	all.forget(channel, n)
	return !n.held
}

// mute takes a frame of the driver on a channel that was given up. The broker gets the rest of a
// message of which it has a part: it takes anything else for an error of the connection.
func (all *channels) mute(channel uint16, n *number, p []byte) (pass bool) {
	switch {
	case methodID(p) == channelCloseOk:
		n.muted = false
		all.forget(channel, n)
	case n.left != 0 && p[0] != frameMethod:
		n.follow(p)
		if n.left == 0 {
			all.fromWire = append(all.fromWire, n.unsent...)
			n.unsent = nil
		}
		return true
	}
	return false
}

// answer takes a frame of the driver on a channel that the broker has closed. A close of the
// driver's own comes too late: the broker would answer it, and the driver could take that for an
// answer to what it writes on the next channel of this number.
func (all *channels) answer(channel uint16, n *number, method uint32) (pass bool) {
	if method == channelCloseOk {
		n.closed = false
		all.forget(channel, n)
	}
	return method != channelClose
}

// forget drops a number of which nothing is left.
func (all *channels) forget(channel uint16, n *number) {
	if n.channel == nil && !n.muted && !n.closed && !n.awaited {
		delete(all.numbers, channel)
	}
}

// end marks the channel that lives as ended.
func (all *channels) end(n *number) {
	all.isOpen(n)
	if n.channel != nil {
		n.channel.state = channelOver
		n.channel = nil
	}
}

// isOpen notes that no channel.open-ok is to come.
func (all *channels) isOpen(n *number) {
	if n.opening {
		n.opening = false
		all.opening.Add(-1)
	}
}

// opened takes a method of the broker that the driver is to get. It returns false if the channel is
// not open, and one is being opened that may have its number: the driver forgets a channel whose open
// is answered with something else, without closing it, and its reader would wait for ever for somebody
// to take the next answer.
func (o *outbound) opened(channel uint16, method uint32) bool {
	if method == 0 || channel == 0 || o.channels.opening.Load() == 0 || endsChannel(method) {
		return true
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	n := o.channels.numbers[channel]
	switch {
	case n == nil:
		return o.channels.claim == nil
	case n.opening:
		o.channels.isOpen(n)
		return method == channelOpenOk
	}
	return true
}

// follow counts what is still to come of a message that the driver writes.
func (n *number) follow(p []byte) {
	switch {
	case methodID(p) == basicPublish:
		n.left = headerToCome
	case p[0] == frameHeader && n.left == headerToCome:
		n.left = int64(min(binary.BigEndian.Uint64(p[frameHead+4:]), math.MaxInt64))
	case p[0] == frameBody && n.left > 0:
		n.left -= min(n.left, int64(binary.BigEndian.Uint32(p[3:])))
	}
}

// giveUp reports whether there was something to give up. The caller holds mu.
func (o *outbound) giveUp(c *Channel, m closeMethod) bool {
	all := &o.channels
	if c.state == channelOver || all.closing || o.closed || o.socket.end.closed.Load() {
		return false
	}
	if c.state == channelClaimed {
		c.state, c.close = channelOver, m
		return true
	}
	n := all.numbers[c.number]
	all.end(n)
	n.muted = true
	frame := m.frame(c.number)
	all.toDriver = append(all.toDriver, frame...)
	if n.held {
		n.held = false
		return true
	}
	n.givenUp, n.awaited, n.answered = true, true, false
	n.declares, n.late = nil, n.declares
	o.subscriptions.giveUp(o.socket, c.number)
	switch {
	case n.closing: // the driver has asked already, and a second time is once too often
	case n.left != 0:
		n.unsent = frame
	default:
		o.insert(frame)
	}
	return true
}

// ends takes a channel.close or channel.close-ok of the broker. It returns false if the driver is
// to get it.
func (o *outbound) ends(channel uint16, method uint32) (kept bool) {
	o.mu.Lock()
	kept, wake := o.takeEnd(channel, method)
	wake = wake && o.flush.flushNow()
	o.mu.Unlock()
	if wake {
		o.wakeWriter()
	}
	return kept
}

func (o *outbound) takeEnd(channel uint16, method uint32) (kept, written bool) {
	all := &o.channels
	n := all.numbers[channel]
	switch {
	case n == nil:
		return false, false
	case n.awaited && method == channelCloseOk:
		return true, o.confirmed(channel, n)
	case n.awaited:
		// The broker has closed the channel before it saw our close. It answers that, and keeps the
		// channel until we have answered its own; a second answer would be one to no channel.
		written = !n.answered
		n.answered = true
		if written {
			o.insert(methodOn(channel, channelCloseOk))
		}
		return true, written
	case n.muted, n.closed && method == channelClose:
		return true, false
	}
	all.end(n)
	n.closed = method == channelClose
	if n.closed && n.closing {
		// Both have closed it, and the broker answers the driver, too: nobody waits for that.
		n.awaited, n.answered = true, true
		o.subscriptions.giveUp(o.socket, channel)
	}
	all.forget(channel, n)
	return false, false
}

// confirmed takes the broker's channel.close-ok to a channel that was given up, and opens the next
// one of this number, if the driver has asked for that.
func (o *outbound) confirmed(channel uint16, n *number) (written bool) {
	n.awaited, n.late = false, nil
	if n.held {
		n.held = false
		open := methodOn(channel, channelOpen, 0)
		o.subscriptions.learn(open)
		o.insert(open)
		written = true
	}
	o.channels.forget(channel, n)
	return written
}

// insert puts a frame of the wire behind what was written so far, and never into a frame of the
// driver. It does not wait for room: there are few of these, and the driver's reader must not be
// held up. The caller holds mu.
func (o *outbound) insert(frame []byte) {
	o.channels.fromWire = append(o.channels.fromWire, frame...)
	o.insertPending()
}

func (o *outbound) insertPending() {
	if !o.scanner.withinFrame() {
		o.pending = append(o.pending, o.channels.fromWire...)
		o.channels.fromWire = nil
	}
}
