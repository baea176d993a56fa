package steadymqtest

import (
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// windowSize is how much a client can write once the broker has stopped reading: about what two socket buffers hold.
const windowSize = 64 << 10

// stream is one direction of a connection of the in-memory network.
//
// Its mutex is a leaf: nothing else is locked under it but the other direction of the same connection never is, and
// it is never held while a goroutine blocks. That is what makes the network usable in a synctest bubble, where a goroutine that
// waits for a mutex stops the clock.
type stream struct {
	mu   sync.Mutex
	cond sync.Cond // signalled when readers or writers may go on

	buf  []byte // arrived, not read yet
	off  int    // where reading goes on in buf
	fin  atomic.Bool
	late []segment // under way: not due yet, or held back
	wake *time.Timer

	latency time.Duration
	stalled bool // late grows until the stall is over
	hole    bool // what is written now vanishes
	lost    bool // something has vanished: nothing can arrive any more
	zero    bool // the reading end does not read, so the writing end blocks once windowSize is full
	cut     int  // bytes that may still pass before the connection breaks; negative: no limit
	onCut   func()

	readErr, writeErr error // after a reset
	readClosed        bool
	writeClosed       bool
	readLimit         deadline
	writeLimit        deadline
}

// segment is what was written at one time, or the end of the stream.
type segment struct {
	data []byte
	fin  bool
	due  time.Time
}

func newStream(latency time.Duration) *stream {
	s := &stream{latency: latency, cut: -1}
	s.cond.L = &s.mu
	s.readLimit.s, s.writeLimit.s = s, s
	return s
}

func (s *stream) read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.readClosed:
			return 0, net.ErrClosed
		case s.readErr != nil:
			return 0, s.readErr
		case s.readLimit.passed():
			return 0, os.ErrDeadlineExceeded
		case s.zero:
		case s.off < len(s.buf):
			return s.take(p), nil
		case s.fin.Load():
			return 0, io.EOF
		case len(p) == 0:
			return 0, nil
		}
		s.cond.Wait()
	}
}

// take moves what has arrived into p and lets a blocked writer go on.
func (s *stream) take(p []byte) int {
	n := copy(p, s.buf[s.off:])
	s.off += n
	if s.off == len(s.buf) {
		s.off = 0
		if cap(s.buf) > 256<<10 {
			s.buf = nil // do not keep the memory of one burst for ever
		}
		s.buf = s.buf[:0]
	}
	return n
}

func (s *stream) write(p []byte) (int, error) {
	done := 0
	s.mu.Lock()
	for {
		switch {
		case s.writeClosed:
			s.mu.Unlock()
			return done, net.ErrClosed
		case s.writeErr != nil:
			s.mu.Unlock()
			return done, s.writeErr
		case s.writeLimit.passed():
			s.mu.Unlock()
			return done, os.ErrDeadlineExceeded
		case s.readClosed && s.zero && !s.hole && !s.lost: // closed with bytes unread: an RST
			s.mu.Unlock()
			return done, os.NewSyscallError("write", syscall.ECONNRESET)
		}
		n := len(p)
		if s.zero {
			n = min(n, max(0, windowSize-s.pending()))
		}
		hit := s.push(p[:n])
		done, p = done+n, p[n:]
		if len(p) == 0 || hit {
			s.mu.Unlock()
			if hit {
				s.onCut()
			}
			return done, nil
		}
		s.cond.Wait()
	}
}

func (s *stream) pending() int {
	n := len(s.buf) - s.off
	for _, seg := range s.late {
		n += len(seg.data)
	}
	return n
}

// push sends p on its way and reports whether that used up the cut.
func (s *stream) push(p []byte) (hit bool) {
	if len(p) == 0 {
		return false
	}
	if s.hole || s.lost || s.readClosed {
		s.lost = true
		return false
	}
	if s.cut >= 0 {
		if len(p) >= s.cut {
			p, hit = p[:s.cut], true
		}
		s.cut -= len(p)
	}
	if s.direct() {
		s.arrive(p)
		return hit
	}
	s.late = append(s.late, segment{data: append([]byte(nil), p...), due: time.Now().Add(s.latency)})
	s.schedule()
	return hit
}

func (s *stream) direct() bool { return s.latency == 0 && !s.stalled && len(s.late) == 0 }

func (s *stream) arrive(p []byte) {
	if s.off > 0 && len(s.buf)+len(p) > cap(s.buf) {
		s.buf = s.buf[:copy(s.buf, s.buf[s.off:])]
		s.off = 0
	}
	s.buf = append(s.buf, p...)
	s.cond.Broadcast()
}

// closeWrite ends the stream after what was written so far.
func (s *stream) closeWrite() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writeClosed {
		return
	}
	s.writeClosed = true
	s.writeLimit.stop()
	s.cond.Broadcast()
	s.pushFin()
}

func (s *stream) pushFin() {
	switch {
	case s.hole || s.lost:
		s.lost = true
	case s.direct():
		s.fin.Store(true)
		s.cond.Broadcast()
	default:
		s.late = append(s.late, segment{fin: true, due: time.Now().Add(s.latency)})
		s.schedule()
	}
}

func (s *stream) closeRead() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readClosed = true
	s.buf, s.off, s.late = nil, 0, nil
	s.readLimit.stop()
	s.stopWake()
	s.cond.Broadcast()
}

// schedule sets the timer that makes the first late segment arrive.
func (s *stream) schedule() {
	if s.stalled || len(s.late) == 0 || s.readClosed {
		return
	}
	wait := time.Until(s.late[0].due)
	if s.wake == nil {
		s.wake = time.AfterFunc(wait, s.due)
		return
	}
	s.wake.Reset(wait)
}

func (s *stream) stopWake() {
	if s.wake != nil {
		s.wake.Stop()
	}
}

// due lets everything arrive whose time has come.
func (s *stream) due() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stalled {
		return
	}
	now := time.Now()
	for len(s.late) > 0 && !s.late[0].due.After(now) {
		seg := s.late[0]
		s.late = s.late[1:]
		if seg.fin {
			s.fin.Store(true)
			s.cond.Broadcast()
			continue
		}
		s.arrive(seg.data)
	}
	s.schedule()
}

// update changes the state of the network between the two ends.
func (s *stream) update(change func(*stream)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
	if s.hole && len(s.late) > 0 {
		s.late, s.lost = nil, true
	}
	s.schedule()
	s.cond.Broadcast()
}

// reset is what both ends see after an RST; whatever was under way is gone.
func (s *stream) reset(reader, writer bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	reset := func(op string) error { return os.NewSyscallError(op, syscall.ECONNRESET) }
	if reader && !s.readClosed {
		s.readErr = reset("read")
		s.buf, s.off, s.late = nil, 0, nil
	}
	if writer && !s.writeClosed {
		s.writeErr = reset("write")
	}
	s.cond.Broadcast()
}

// deadline is a point in time after which reads or writes of a stream fail. The driver moves its read deadline with every
// frame, so moving it later costs nothing: the timer finds out when it fires.
type deadline struct {
	s     *stream
	at    time.Time
	armed time.Time // when the timer will fire; zero: it will not
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func (d *deadline) set(at time.Time) {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	d.at = at
	if at.IsZero() {
		return
	}
	if d.passed() {
		d.s.cond.Broadcast()
		return
	}
	if d.armed.IsZero() || at.Before(d.armed) {
		d.arm()
	}
}

func (d *deadline) arm() {
	d.armed = d.at
	wait := time.Until(d.at)
	if d.timer == nil {
		d.timer = time.AfterFunc(wait, d.fire)
		return
	}
	d.timer.Reset(wait)
}

func (d *deadline) fire() {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	d.armed = time.Time{}
	switch {
	case d.at.IsZero():
	case d.passed():
		d.s.cond.Broadcast()
	default:
		d.arm()
	}
}

func (d *deadline) stop() {
	d.at = time.Time{}
	if d.timer != nil {
		d.timer.Stop()
		d.armed = time.Time{}
	}
}
