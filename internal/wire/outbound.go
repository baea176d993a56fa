package wire

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/steadymq/steadymq/internal/errtext"
)

// Write takes p for the wire. It blocks only while the buffer is full: the
// driver holds its locks meanwhile, so the wire must not.
func (s *Socket) Write(p []byte) (int, error) {
	s.mu.Lock()
	s.await(func() bool { return s.full(len(p)) })
	if s.closing || s.over.Load() {
		s.mu.Unlock()
		return 0, s.err()
	}
	s.follow(p)
	if s.out.off {
		s.mu.Unlock()
		s.Kill(errAstray)
		return 0, s.err()
	}
	s.pending = append(s.pending, p...)
	if !s.out.within() {
		s.letGo() // who waits for the end of a long frame
	}
	tell := s.flush.now()
	s.mu.Unlock()
	if tell {
		s.nudge()
	}
	return len(p), nil
}

// await returns once nothing is in the way of a frame, or the socket ends. It is
// called with mu held and gives it back while it waits.
func (s *Socket) await(blocked func() bool) {
	for blocked() && !s.closing && !s.over.Load() {
		if s.room == nil {
			s.room = make(chan struct{})
		}
		room := s.room
		s.mu.Unlock()
		select {
		case <-room:
		case <-s.ended:
		}
		s.mu.Lock()
	}
}

// idle tells whether no settlement can follow for now. It is called with mu held.
func (s *Socket) idle() bool { return s.resting.Load() && !s.lanes.busy() }

// rest is called before Read waits for the broker.
func (s *Socket) rest() {
	s.resting.Store(true)
	s.mu.Lock()
	tell := s.flush.rested()
	s.mu.Unlock()
	if tell {
		s.nudge()
	}
}

// follow looks at what the driver writes, except for its very first words,
// which are no frame.
func (s *Socket) follow(p []byte) {
	if s.out.between() && bytes.HasPrefix(p, []byte("AMQP")) {
		return
	}
	s.out.next(p)
}

func (s *Socket) full(n int) bool {
	return len(s.pending) > 0 && len(s.pending)+n > maxPending
}

// letGo lets those look again who wait in await.
func (s *Socket) letGo() {
	if s.room != nil {
		close(s.room)
		s.room = nil
	}
}

// nudge wakes the writer.
func (s *Socket) nudge() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// writeLoop puts what is pending on the wire until the socket ends, or is
// closing and nothing is left.
func (s *Socket) writeLoop() {
	defer close(s.writer)
	defer s.delay.Stop()
	for {
		batch, closing := s.take()
		if len(batch) > 0 {
			if err := s.writeOut(batch); err != nil {
				s.writeFailed(err)
				return
			}
			continue
		}
		if closing {
			s.farewell()
			return
		}
		select {
		case <-s.wake:
		case <-s.delay.C:
			s.expire()
		case <-s.ended:
			return
		}
	}
}

// farewell tells a TLS peer that nothing was cut off. Close bounds it.
func (s *Socket) farewell() {
	if c, ok := s.conn.(*tls.Conn); ok {
		_ = c.CloseWrite()
	}
}

// expire lets go out what has waited long enough.
func (s *Socket) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if wait := s.flush.expired(time.Since(s.start)); wait > 0 {
		s.delay.Reset(wait)
	}
}

// take swaps the buffers: what is pending goes out, the other fills up.
func (s *Socket) take() (batch []byte, closing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.flush.urgent && !s.closing {
		return nil, false
	}
	batch = s.pending
	s.pending, s.spare = s.spare[:0], batch
	s.flush.taken()
	s.letGo()
	return batch, s.closing
}

// writeOut writes in chunks, each under its own deadline.
func (s *Socket) writeOut(b []byte) error {
	for len(b) > 0 {
		s.armWrite()
		n, err := s.opts.transfer(s.conn.Write, b[:min(len(b), writeChunk)], s.Kill)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// armWrite begins the time of one write.
func (s *Socket) armWrite() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opts.WriteTimeout > 0 {
		s.limit = time.Now().Add(s.opts.WriteTimeout)
	}
	_ = s.conn.SetWriteDeadline(earlier(s.deadline, s.limit))
}

// earlier returns the earlier deadline; zero is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// writeFailed ends the socket for the reason of a failed write, after the
// reader had the chance to find the broker's own words for it.
func (s *Socket) writeFailed(err error) {
	s.blame(s.writeCause(err))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		grace := time.NewTimer(drainGrace)
		defer grace.Stop()
		select {
		case <-s.ended:
		case <-grace.C:
		}
	}
	s.end(true)
}

func (s *Socket) writeCause(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errtext.Because(fmt.Errorf("%w after %v", ErrWriteTimeout, s.opts.WriteTimeout), err)
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return errtext.Because(ErrPeerReset, err)
	case errors.Is(err, syscall.ETIMEDOUT):
		return errtext.Because(ErrUnconfirmed, err)
	}
	return err
}

// SetWriteDeadline shortens the deadline of the write under way and of those that
// follow; it never lengthens the write timeout.
func (s *Socket) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deadline = t
	return s.conn.SetWriteDeadline(earlier(t, s.limit))
}
