package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"syscall"
	"time"

	"github.com/steadymq/steadymq/internal/errtext"
)

const (
	// readBuffer makes one read of the socket serve many small frames.
	readBuffer = 64 << 10

	// maxHeader is how large the frame with the headers of a message may be. It may be
	// larger than agreed: RabbitMQ adds headers to what a publisher sent, x-death above
	// all, and cuts only bodies into frames.
	maxHeader = 1 << 20

	// beatEvery is how often the driver hears that the broker lives while the
	// broker sends nothing but deliveries, which the driver does not see. The
	// shortest silence it allows is 1.5 s, at a heartbeat of 1 s.
	beatEvery = 250 * time.Millisecond

	// firstFrame is the longest frame before both sides have agreed on a length
	// (AMQP 0-9-1, 4.2.3).
	firstFrame = 4096
)

// inbound is the read side of a socket, and Read's caller is the only one to
// touch it. It sorts the broker's frames: the deliveries of a lane go there, all
// others to the driver, which spends 27 allocations and two goroutine hops on a
// delivery.
type inbound struct {
	buf  []byte
	r, w int

	begun bool  // the broker has said its first word
	pass  int64 // bytes of a frame that the driver still gets
	all   bool  // these are no frames any more: judging that is the driver's work

	lane *Subscription // whose message is being read
	body int           // bytes of its frame still to come, with the frame's end

	beat  []byte        // for the driver, in place of what it does not see
	given time.Duration // when the driver last got a frame, since the socket's start
	took  bool          // a lane got bytes since
	fed   bool          // a lane got bytes of what was read last
}

// Read hands out what came from the broker for the driver.
func (s *Socket) Read(p []byte) (int, error) {
	for len(p) > 0 && !s.over.Load() {
		n, err := s.sift(p)
		if err != nil {
			s.dismiss(err)
			break
		}
		if n > 0 {
			return n, nil
		}
		if err := s.fill(); err != nil {
			return 0, err
		}
	}
	if len(p) == 0 {
		return 0, nil
	}
	return 0, s.err()
}

// fill waits for more from the broker.
func (s *Socket) fill() error {
	in := &s.in
	if in.took && in.pass == 0 && time.Duration(s.heard.Load())-in.given >= beatEvery {
		in.beat, in.took = heartbeat, false
		in.given = time.Duration(s.heard.Load())
		return nil
	}
	in.makeRoom()
	if in.fed {
		in.fed = false
		s.delivered.Store(s.heard.Load())
		in.lane.heard.Store(s.heard.Load())
	}
	s.rest()
	n, err := s.opts.transfer(s.conn.Read, in.buf[in.w:], s.Kill)
	s.resting.Store(false)
	if n == 0 {
		return s.readFailed(err)
	}
	in.w += n
	s.heard.Store(int64(time.Since(s.start)))
	return nil
}

// makeRoom lets the buffer grow with what comes, whatever is announced, and shrink
// again behind a large frame.
func (in *inbound) makeRoom() {
	if in.r > 0 {
		in.w = copy(in.buf, in.buf[in.r:in.w])
		in.r = 0
	}
	size := len(in.buf)
	switch {
	case in.w == size:
		size *= 2
	case size > readBuffer && in.w == 0:
		size = readBuffer
	default:
		return
	}
	in.buf = append(make([]byte, 0, size), in.buf[:in.w]...)[:size]
}

// sift goes over what was read. It copies to p what is for the driver and
// returns 0 where more has to be read first.
func (s *Socket) sift(p []byte) (int, error) {
	in := &s.in
	for {
		var err error
		complete := true
		switch {
		case len(in.beat) > 0:
			n := copy(p, in.beat)
			in.beat = in.beat[n:]
			return n, nil
		case in.r == in.w:
			return 0, nil
		case in.pass > 0 || in.all:
			return s.give(p), nil
		case in.body > 0:
			err = in.takeBody()
		default:
			complete, err = s.next()
		}
		if err != nil || !complete {
			return 0, err
		}
	}
}

// give copies to p from the frame that is the driver's.
func (s *Socket) give(p []byte) int {
	in := &s.in
	b := in.buf[in.r:in.w]
	if !in.all {
		b = b[:min(in.pass, int64(len(b)))]
	}
	n := copy(p, b)
	in.r += n
	if !in.all {
		in.pass -= int64(n)
	}
	in.given, in.took = time.Duration(s.heard.Load()), false
	return n
}

// next decides whose the next frame is. It returns false if it has to see more
// of it first.
func (s *Socket) next() (complete bool, err error) {
	in := &s.in
	b := in.buf[in.r:in.w]
	need := needed(b[0])
	if need == 0 && !in.begun {
		return false, &NotAMQPError{First: b[0]}
	}
	if need == 0 {
		in.all = true
		return true, nil
	}
	if len(b) < need {
		return false, nil
	}
	whole := uint64(binary.BigEndian.Uint32(b[3:])) + frameHead + 1
	if whole <= uint64(need) {
		in.all = true
		return true, nil
	}
	if !in.begun && !s.greet(b, whole) {
		return false, nil
	}
	l := s.reading(binary.BigEndian.Uint16(b[1:]))
	switch {
	case l == nil:
		return s.theirs(b, whole)
	case b[0] == frameHeader && l.begun() && whole <= math.MaxInt32:
		return in.header(l, b, int(whole))
	case whole > FrameSize: // the driver refuses what is longer than agreed
		return s.theirs(b, whole)
	case b[0] == frameMethod:
		return in.method(l, b, int(whole))
	case b[0] == frameBody && l.headed:
		return in.piecemeal(l, int(whole)), l.announced(whole - frameHead - 1)
	default:
		l.interrupt()
		return s.theirs(b, whole)
	}
}

// theirs leaves a frame to the driver. It has no way to skip a body, and makes room
// for one as large as announced.
func (s *Socket) theirs(b []byte, whole uint64) (complete bool, err error) {
	if b[0] == frameHeader {
		size := binary.BigEndian.Uint64(b[frameHead+4:])
		if err := s.opts.refuse(size); err != nil {
			return false, fmt.Errorf("a message of %d bytes, not for this consumer but for what WithTopology does: %w", size, err)
		}
	}
	s.in.pass = int64(whole)
	return true, nil
}

// piecemeal has a lane take a frame as it comes.
func (in *inbound) piecemeal(l *Subscription, whole int) (complete bool) {
	in.lane, in.body = l, whole-frameHead
	in.r += frameHead
	in.progress()
	return true
}

// greet notes what the broker's first frame offers. It returns false if it has to
// see more of it; a frame that is too long for this is the driver's to refuse.
func (s *Socket) greet(b []byte, whole uint64) bool {
	if whole <= firstFrame && uint64(len(b)) < whole {
		return false
	}
	s.in.begun = true
	offer := ""
	if whole <= firstFrame {
		offer = mechanismsOf(b[:whole-1])
	}
	s.offer.Store(&offer)
	return true
}

// reading returns the lane of a channel, nil if there is none.
func (s *Socket) reading(channel uint16) *Subscription {
	if l := s.in.lane; l != nil && l.channel == channel && l.message != nil {
		return l
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lanes.on(channel)
}

// method takes a delivery of the lane. RabbitMQ 3.10 may deliver on a channel it
// has closed, or close it once more; the driver would close the connection for
// that, so it is not told.
func (in *inbound) method(l *Subscription, b []byte, whole int) (complete bool, err error) {
	id := methodID(b)
	again := id == channelClose && l.refused
	if id != basicDeliver && !again {
		l.interrupt()
		l.refused = l.refused || id == channelClose
		in.pass = int64(whole)
		return true, nil
	}
	if len(b) < whole {
		return false, nil
	}
	if again {
		in.r += whole
		return true, nil
	}
	mine, err := l.begin(b[methodHead : whole-1])
	if !mine {
		in.pass = int64(whole)
		return true, err
	}
	in.lane = l
	if err == nil {
		err = in.skip(b, whole)
	}
	return true, err
}

// header takes the content header of the lane's message.
func (in *inbound) header(l *Subscription, b []byte, whole int) (complete bool, err error) {
	if whole > maxHeader {
		l.skipHead(binary.BigEndian.Uint64(b[frameHead+4:]))
		return in.piecemeal(l, whole), nil
	}
	if len(b) < whole {
		in.progress() // on a slow path it is a while until the rest is there
		return false, nil
	}
	if err := in.skip(b, whole); err != nil { // first: the header may complete the message
		return true, err
	}
	l.head(b[frameHead+4 : whole-1])
	return true, nil
}

// progress notes bytes of a delivery.
func (in *inbound) progress() { in.took, in.fed = true, true }

// skip goes behind a frame that a lane took.
func (in *inbound) skip(b []byte, whole int) error {
	in.r += whole
	in.progress()
	if b[whole-1] != frameEnd {
		return garbled(errEnd)
	}
	return nil
}

// takeBody gives the lane what is there of a frame that it takes as it comes.
func (in *inbound) takeBody() error {
	b := in.buf[in.r:min(in.w, in.r+in.body)]
	in.r += len(b)
	in.body -= len(b)
	in.progress()
	if in.body > 0 {
		in.lane.add(b, false)
		return nil
	}
	end := len(b) - 1
	if b[end] != frameEnd {
		return garbled(errEnd)
	}
	in.lane.add(b[:end], true)
	return nil
}

// dismiss ends the socket for what the broker sent. The acks that handlers have
// given go out before, within drainGrace: a reset would take them along, and so would
// a plain close while there is more to read. Read's caller calls it.
func (s *Socket) dismiss(cause error) {
	s.blame(cause)
	limit := time.AfterFunc(drainGrace, func() { s.end(true) })
	defer limit.Stop()
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.nudge()
	select {
	case <-s.writer:
	case <-s.ended:
	}
	if c, ok := s.raw.(interface{ CloseWrite() error }); ok && s.in.begun {
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, s.raw)
	}
	s.end(false)
}

// readFailed ends the socket for the reason of a failed read.
func (s *Socket) readFailed(err error) error {
	if err == nil {
		return nil
	}
	s.blame(readCause(err))
	s.end(!errors.Is(err, io.EOF)) // a peer that is silent takes no FIN: the kernel would go on sending it
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
