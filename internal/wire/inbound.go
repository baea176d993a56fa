package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/steadymq/steadymq/internal/errtext"
)

// inbound is the read side of a socket. It parts the broker's frames: the deliveries of a
// subscription go there, all others to the driver, which would spend 27 allocations and two
// goroutine hops on a delivery (37 allocations with its ack).
//
// It runs on the goroutine of Read's caller, the driver's reader. What is not atomic is that
// goroutine's alone.
type inbound struct {
	socket *Socket

	heard     atomic.Int64           // when Read last read bytes, since the socket's start
	delivered atomic.Int64           // when bytes of a delivery last came, likewise
	offer     atomic.Pointer[string] // the mechanisms of the broker's first frame, nil before it

	buf   []byte
	r, w  int
	full  bool  // the last read has filled buf
	slack slack // when buf becomes small again

	greeted     bool  // the broker's first frame has come
	passThrough int64 // bytes of the current frame that the driver still gets
	opaque      bool  // the stream holds no frames any more; the driver gets it all and judges it

	current  *Subscription // whose message is being read
	bodyLeft int           // bytes of its frame still to come, with the frame's end

	told           []byte        // for the driver, by the wire and not by the broker
	lastPassed     time.Duration // when the driver last got a frame, since the socket's start
	deliveredSince bool          // a subscription got bytes after lastPassed
	deliveredNow   bool          // a subscription got bytes of what was read last

	untold     atomic.Bool // the wire has something to tell the driver
	waking     atomic.Bool // and a read deadline in the past ends the wait for the broker
	deadlineMu sync.Mutex  // guards both deadlines, for memory only
	deadline   time.Time   // the driver's own
}

const (
	// readBuffer makes one read of the socket serve many small frames. The buffer grows to that
	// while reads fill it, and beyond it only for a frame that is larger.
	readBuffer = 64 << 10

	// maxHeader is how large the frame with the headers of a message may be. It may be larger than
	// agreed: RabbitMQ adds headers to what a publisher sent, x-death above all, and cuts only
	// bodies into frames.
	maxHeader = 1 << 20

	// beatEvery is how often the driver hears that the broker lives while the broker sends nothing
	// but deliveries, which the driver does not see. The shortest silence it allows is 1.5 s, at a
	// heartbeat of 1 s.
	beatEvery = 250 * time.Millisecond

	// firstFrame is the longest frame before both sides have agreed on a length (AMQP 0-9-1,
	// 4.2.3).
	firstFrame = 4096
)

func (in *inbound) init(s *Socket) {
	in.socket = s
	in.buf = make([]byte, idleBuffer)
}

// Read hands out what the broker sent for the driver.
func (s *Socket) Read(p []byte) (int, error) { return s.in.read(p) }

func (in *inbound) read(p []byte) (int, error) {
	for len(p) > 0 && !in.socket.end.closed.Load() {
		if in.untold.Load() && in.passThrough == 0 && !in.opaque {
			in.hear()
		}
		n, err := in.demux(p)
		if err != nil {
			in.dismiss(err)
			break
		}
		if n > 0 {
			return n, nil
		}
		if err := in.fill(); err != nil {
			return 0, err
		}
	}
	if len(p) == 0 {
		return 0, nil
	}
	return 0, in.socket.err()
}

// fill waits for more from the broker.
func (in *inbound) fill() error {
	s := in.socket
	if heard := in.lastHeard(); in.deliveredSince && in.passThrough == 0 && heard-in.lastPassed >= beatEvery {
		in.told, in.deliveredSince, in.lastPassed = heartbeat, false, heard
		return nil
	}
	in.makeRoom()
	if in.deliveredNow {
		in.deliveredNow = false
		in.delivered.Store(in.heard.Load())
		in.current.heard.Store(in.heard.Load())
	}
	s.out.flushIfIdle()
	n, err := s.opts.transfer(s.conn.Read, in.buf[in.w:], s.Kill)
	s.out.readerIdle.Store(false)
	woken := in.waking.Load()
	if woken {
		in.sleep()
	}
	if n == 0 && woken && errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if n == 0 {
		return in.readFailed(err)
	}
	in.w += n
	in.full = in.w == len(in.buf)
	in.heard.Store(int64(time.Since(s.start)))
	return nil
}

// hear takes what the wire has to tell the driver, between two frames of the broker. It ends a
// message whose channel was given up.
func (in *inbound) hear() {
	in.untold.Store(false)
	out := &in.socket.out
	out.mu.Lock()
	in.told = slices.Concat(in.told, out.channels.toDriver)
	out.channels.toDriver = nil
	current := in.current
	over := current != nil && out.subscriptions.isGivenUp(current.channel)
	out.mu.Unlock()
	if over {
		current.drop()
	}
}

// wake makes Read look for what the wire has to tell the driver, on any goroutine. A connection
// without read deadlines is woken by the broker's next bytes.
func (in *inbound) wake() {
	in.untold.Store(true)
	in.deadlineMu.Lock()
	defer in.deadlineMu.Unlock()
	in.waking.Store(true)
	_ = in.socket.setDeadline(net.Conn.SetReadDeadline, time.Unix(1, 0))
}

// sleep lets Read wait for the broker again, up to the driver's own deadline.
func (in *inbound) sleep() {
	in.deadlineMu.Lock()
	defer in.deadlineMu.Unlock()
	in.waking.Store(false)
	_ = in.socket.setDeadline(net.Conn.SetReadDeadline, in.deadline)
}

// setDeadline takes the driver's own read deadline.
func (in *inbound) setDeadline(t time.Time) error {
	in.deadlineMu.Lock()
	defer in.deadlineMu.Unlock()
	in.deadline = t
	if in.waking.Load() {
		return nil // sleep will set it
	}
	return in.socket.setDeadline(net.Conn.SetReadDeadline, t)
}

func (in *inbound) lastHeard() time.Duration { return time.Duration(in.heard.Load()) }

// sinceDelivery returns how long ago bytes of a delivery last came, on any goroutine.
func (in *inbound) sinceDelivery() time.Duration {
	return time.Since(in.socket.start) - time.Duration(in.delivered.Load())
}

// makeRoom lets the buffer grow with what comes, whatever is announced, and shrink again after a
// large frame, and when there is little to read for a while.
func (in *inbound) makeRoom() {
	used := in.w
	if in.r > 0 {
		in.w = copy(in.buf, in.buf[in.r:in.w])
		in.r = 0
	}
	size := len(in.buf)
	idle := in.slack.over(used, in.lastHeard())
	switch {
	case in.w == size, in.full && size < readBuffer:
		size *= 2
	case in.w > 0:
		return
	case size > readBuffer:
		size = readBuffer
	case idle && size > idleBuffer:
		size = idleBuffer
	default:
		return
	}
	in.full = false
	in.buf = append(make([]byte, 0, size), in.buf[:in.w]...)[:size]
}

// demux goes over what was read. It gives the subscriptions what is theirs and returns as soon as
// it has copied something to p, for the driver; 0 means that more has to be read first.
func (in *inbound) demux(p []byte) (int, error) {
	for {
		var err error
		complete := true
		switch {
		case len(in.told) > 0:
			n := copy(p, in.told)
			in.told = in.told[n:]
			return n, nil
		case in.r == in.w:
			return 0, nil
		case in.passThrough > 0 || in.opaque:
			return in.copyToDriver(p), nil
		case in.bodyLeft > 0:
			err = in.takeBody()
		default:
			complete, err = in.next()
		}
		if err != nil || !complete {
			return 0, err
		}
	}
}

// copyToDriver copies to p from a frame that is the driver's.
func (in *inbound) copyToDriver(p []byte) int {
	b := in.buf[in.r:in.w]
	if !in.opaque {
		b = b[:min(in.passThrough, int64(len(b)))]
	}
	n := copy(p, b)
	in.r += n
	if !in.opaque {
		in.passThrough -= int64(n)
	}
	in.lastPassed, in.deliveredSince = in.lastHeard(), false
	return n
}

// next decides who gets the next frame, a subscription or the driver. It returns false if it has to
// see more of the frame first.
func (in *inbound) next() (complete bool, err error) {
	b := in.buf[in.r:in.w]
	need := needed(b[0])
	if need == 0 && !in.greeted {
		return false, &NotAMQPError{First: b[0]}
	}
	if need == 0 {
		in.opaque = true
		return true, nil
	}
	if len(b) < need {
		return false, nil
	}
	whole := uint64(binary.BigEndian.Uint32(b[3:])) + frameHead + 1
	if whole <= uint64(need) {
		in.opaque = true
		return true, nil
	}
	if !in.greeted && !in.greet(b, whole) {
		return false, nil
	}
	sub := in.subscriptionOn(binary.BigEndian.Uint16(b[1:]), b[0])
	switch {
	case sub == nil:
		return in.leaveToDriver(b, whole)
	case sub.givenUp:
		return in.late(sub, b, whole)
	case b[0] == frameHeader && sub.wantsHeader() && whole <= math.MaxInt32:
		return in.header(sub, b, int(whole))
	case whole > FrameSize: // the driver refuses what is longer than agreed
		return in.leaveToDriver(b, whole)
	case b[0] == frameMethod:
		return in.method(sub, b, int(whole))
	case b[0] == frameBody && sub.hasHeader:
		return in.takePiecemeal(sub, int(whole)), sub.checkBody(whole - frameHead - 1)
	default:
		sub.drop()
		return in.leaveToDriver(b, whole)
	}
}

// late drops a frame of a channel that was given up, piece by piece.
func (in *inbound) late(tombstone *Subscription, b []byte, whole uint64) (complete bool, err error) {
	if whole > FrameSize && b[0] != frameHeader || whole > math.MaxInt32 {
		return in.leaveToDriver(b, whole)
	}
	if !in.answers(b, whole, true) {
		return false, nil
	}
	if id := methodID(b); endsChannel(id) {
		in.socket.out.ends(tombstone.channel, id)
	}
	return in.takePiecemeal(tombstone, int(whole)), nil
}

func endsChannel(method uint32) bool { return method == channelClose || method == channelCloseOk }

// leaveToDriver leaves a frame to the driver. The driver cannot skip a body, and allocates as much
// as its header announces.
func (in *inbound) leaveToDriver(b []byte, whole uint64) (complete bool, err error) {
	if !in.answers(b, whole, false) {
		return false, nil
	}
	if !in.socket.out.opened(binary.BigEndian.Uint16(b[1:]), methodID(b)) {
		return false, garbled(errNotOpen)
	}
	if id := methodID(b); endsChannel(id) && whole <= FrameSize {
		channel := binary.BigEndian.Uint16(b[1:])
		if in.socket.out.ends(channel, id) { // it was given up this very moment
			return in.takePiecemeal(newTombstone(in.socket, channel), int(whole)), nil
		}
	}
	if b[0] == frameHeader {
		size := binary.BigEndian.Uint64(b[frameHead+4:])
		if err := in.socket.opts.refuse(size); err != nil {
			return false, fmt.Errorf("a message of %d bytes, not for this consumer but for what WithTopology does: %w", size, err)
		}
	}
	in.passThrough = int64(whole)
	return true, nil
}

// takePiecemeal makes takeBody give sub the payload of a frame as it comes.
func (in *inbound) takePiecemeal(sub *Subscription, whole int) (complete bool) {
	in.current, in.bodyLeft = sub, whole-frameHead
	in.r += frameHead
	in.progress()
	return true
}

// greet notes what the broker's first frame offers. It returns false if it has to see more of the
// frame; one that is too long for a first frame is left to the driver, which refuses it.
func (in *inbound) greet(b []byte, whole uint64) bool {
	if whole <= firstFrame && uint64(len(b)) < whole {
		return false
	}
	in.greeted = true
	offer := ""
	if whole <= firstFrame {
		offer = mechanismsOf(b[:whole-1])
	}
	in.offer.Store(&offer)
	return true
}

// subscriptionOn returns the subscription of a channel, nil if there is none. It spares the lock
// while a message is being read.
func (in *inbound) subscriptionOn(channel uint16, frame byte) *Subscription {
	if sub := in.current; sub != nil && sub.channel == channel && sub.message != nil && frame != frameMethod {
		return sub
	}
	out := &in.socket.out
	out.mu.Lock()
	defer out.mu.Unlock()
	return out.subscriptions.on(channel)
}

// method takes a delivery of the subscription. RabbitMQ 3.10 may deliver on a channel that it has
// closed, or close it once more; the driver would close the connection for that, so it is not told.
func (in *inbound) method(sub *Subscription, b []byte, whole int) (complete bool, err error) {
	id := methodID(b)
	again := id == channelClose && sub.closedByBroker
	if id != basicDeliver && !again {
		sub.drop()
		sub.closedByBroker = sub.closedByBroker || id == channelClose
		return in.leaveToDriver(b, uint64(whole))
	}
	if len(b) < whole {
		return false, nil
	}
	if again {
		in.r += whole
		return true, nil
	}
	mine, err := sub.method(b[methodHead : whole-1])
	if !mine {
		in.passThrough = int64(whole)
		return true, err
	}
	in.current = sub
	if err == nil {
		err = in.takeFrame(b, whole)
	}
	return true, err
}

// header takes the content header of the subscription's message.
func (in *inbound) header(sub *Subscription, b []byte, whole int) (complete bool, err error) {
	if whole > maxHeader {
		sub.oversizedHeader(binary.BigEndian.Uint64(b[frameHead+4:]))
		return in.takePiecemeal(sub, whole), nil
	}
	if len(b) < whole {
		in.progress() // on a slow path it takes a while until the rest is there
		return false, nil
	}
	if err := in.takeFrame(b, whole); err != nil { // first: the header may complete the message
		return true, err
	}
	sub.header(b[frameHead+4 : whole-1])
	return true, nil
}

// progress notes bytes of a delivery.
func (in *inbound) progress() { in.deliveredSince, in.deliveredNow = true, true }

// takeFrame moves past a whole frame that a subscription takes.
func (in *inbound) takeFrame(b []byte, whole int) error {
	in.r += whole
	in.progress()
	if b[whole-1] != frameEnd {
		return garbled(errEnd)
	}
	return nil
}

// takeBody gives the subscription what is there of a frame that it takes piece by piece.
func (in *inbound) takeBody() error {
	b := in.buf[in.r:min(in.w, in.r+in.bodyLeft)]
	in.r += len(b)
	in.bodyLeft -= len(b)
	in.progress()
	if in.bodyLeft > 0 {
		in.current.body(b, false)
		return nil
	}
	end := len(b) - 1
	if b[end] != frameEnd {
		return garbled(errEnd)
	}
	in.current.body(b[:end], true)
	return nil
}

// dismiss ends the socket for what the broker sent. The acks that handlers have given go out first,
// within drainGrace: a reset would take them along, and so would a plain close while there is more
// to read.
func (in *inbound) dismiss(cause error) {
	s := in.socket
	s.end.blame(cause)
	limit := time.AfterFunc(drainGrace, func() { s.disconnect(true) })
	defer limit.Stop()
	s.out.stop()
	select {
	case <-s.out.done:
	case <-s.end.done:
	}
	if c, ok := s.raw.(interface{ CloseWrite() error }); ok && in.greeted {
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, s.raw)
	}
	s.disconnect(false)
}

// readFailed ends the socket because a read failed.
func (in *inbound) readFailed(err error) error {
	if err == nil {
		return nil
	}
	s := in.socket
	s.end.blame(readCause(err))
	s.disconnect(!errors.Is(err, io.EOF)) // the kernel would go on sending a FIN to a silent peer
	return s.err()
}

func readCause(err error) error {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return ErrPeerClosed
	case errors.Is(err, syscall.ECONNRESET):
		return errtext.Because(ErrPeerReset, err)
	case errors.Is(err, syscall.ETIMEDOUT):
		return errtext.Because(ErrUnconfirmed, err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errtext.Because(ErrReadTimeout, err)
	}
	return err
}
