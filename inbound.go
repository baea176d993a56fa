package steadymq

import (
	"encoding/binary"
	"time"
)

const (
	// readBuffer makes one read of the socket serve many small frames.
	readBuffer = 64 << 10

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
	want int // a frame of that size has to fit into buf

	begun bool  // the broker has said its first word
	pass  int64 // bytes of a frame that the driver still gets
	all   bool  // these are no frames any more: judging that is the driver's work

	lane *lane // whose message is being read
	body int   // bytes of its body frame still to come, with the frame's end

	beat  []byte        // for the driver, in place of what it does not see
	given time.Duration // when the driver last got a frame, since the socket's start
	took  bool          // a lane got one since
}

// Read hands out what came from the broker for the driver.
func (s *socket) Read(p []byte) (int, error) {
	for len(p) > 0 && !s.over.Load() {
		n, err := s.sift(p)
		if err != nil {
			s.kill(err)
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
func (s *socket) fill() error {
	in := &s.in
	if in.took && in.pass == 0 && time.Duration(s.heard.Load())-in.given >= beatEvery {
		in.beat, in.took = heartbeat, false
		in.given = time.Duration(s.heard.Load())
		return nil
	}
	in.w = copy(in.buf, in.buf[in.r:in.w])
	in.r = 0
	if in.want > len(in.buf) {
		in.buf = append(make([]byte, 0, in.want), in.buf[:in.w]...)[:in.want]
	}
	s.rest()
	n, err := s.conn.Read(in.buf[in.w:])
	s.resting.Store(false)
	if n == 0 {
		return s.readFailed(err)
	}
	in.w += n
	s.heard.Store(int64(time.Since(s.start)))
	return nil
}

// sift goes over what was read. It copies to p what is for the driver and
// returns 0 where more has to be read first.
func (s *socket) sift(p []byte) (int, error) {
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
func (s *socket) give(p []byte) int {
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
func (s *socket) next() (complete bool, err error) {
	in := &s.in
	b := in.buf[in.r:in.w]
	need := needed(b[0])
	if need == 0 && !in.begun {
		return false, &notAMQPError{first: b[0]}
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
	if b[0] == frameHeader {
		if size := binary.BigEndian.Uint64(b[frameHead+4:]); s.opts.maxMessage > 0 && size > s.opts.maxMessage {
			return false, &errMessageTooLarge{size: size, limit: s.opts.maxMessage}
		}
	}
	l := s.reading(binary.BigEndian.Uint16(b[1:]))
	if l == nil || whole > frameSize { // the driver refuses what is longer than agreed
		in.pass = int64(whole)
		return true, nil
	}
	switch {
	case b[0] == frameMethod:
		return in.method(l, b, int(whole))
	case b[0] == frameHeader && l.begun():
		return in.header(l, b, int(whole))
	case b[0] == frameBody && l.headed:
		in.lane, in.body, in.took = l, int(whole)-frameHead, true
		in.r += frameHead
	default:
		l.interrupt()
		in.pass = int64(whole)
	}
	return true, nil
}

// greet notes what the broker's first frame offers. It returns false if it has to
// see more of it; a frame that is too long for this is the driver's to refuse.
func (s *socket) greet(b []byte, whole uint64) bool {
	if whole <= firstFrame && s.in.missing(b, int(whole)) {
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
func (s *socket) reading(channel uint16) *lane {
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
func (in *inbound) method(l *lane, b []byte, whole int) (complete bool, err error) {
	id := methodID(b)
	again := id == channelClose && l.refused
	if id != basicDeliver && !again {
		l.interrupt()
		l.refused = l.refused || id == channelClose
		in.pass = int64(whole)
		return true, nil
	}
	if in.missing(b, whole) {
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
func (in *inbound) header(l *lane, b []byte, whole int) (complete bool, err error) {
	if in.missing(b, whole) {
		return false, nil
	}
	if err := in.skip(b, whole); err != nil { // first: the header may complete the message
		return true, err
	}
	return true, l.head(b[frameHead+4 : whole-1])
}

// missing tells whether a frame is still incomplete, and makes room for it.
func (in *inbound) missing(b []byte, whole int) bool {
	in.want = whole
	return len(b) < whole
}

// skip goes behind a frame that a lane took.
func (in *inbound) skip(b []byte, whole int) error {
	in.r += whole
	in.took = true
	if b[whole-1] != frameEnd {
		return garbled(errSyntax)
	}
	return nil
}

// takeBody gives the lane what is there of a body frame.
func (in *inbound) takeBody() error {
	b := in.buf[in.r:min(in.w, in.r+in.body)]
	in.r += len(b)
	in.body -= len(b)
	if in.body > 0 {
		return in.lane.add(b, false)
	}
	end := len(b) - 1
	if b[end] != frameEnd {
		return garbled(errSyntax)
	}
	return in.lane.add(b[:end], true)
}
