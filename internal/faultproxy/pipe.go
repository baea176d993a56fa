package faultproxy

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// pipe carries one direction of a link.
type pipe struct {
	l       *link
	dir     Direction
	passed  atomic.Int64
	cutAt   atomic.Int64 // 0 is never
	swallow bool         // bytes were lost: the stream cannot be continued

	mu      sync.Mutex // held while dst is written to
	dst     *net.TCPConn
	frames  *parser
	pending []byte // to be injected at the end of the frame that is under way
}

func newPipe(l *link, dir Direction, conv *conversation) *pipe {
	pipe := &pipe{l: l, dir: dir}
	pipe.frames = &parser{client: dir == ToBroker, frame: func(f frame) { conv.frame(dir, f, pipe.swallow) }}
	return pipe
}

type chunk struct {
	data []byte
	at   time.Time
}

// pump reads, holds for the latency, and writes, until the source ends. The queue lets latency delay bytes without limiting their rate.
func (p *pipe) pump(src, dst *net.TCPConn, gone *atomic.Bool) {
	p.mu.Lock()
	p.dst = dst
	p.mu.Unlock()
	queue := make(chan chunk, 64)
	var end error
	go func() {
		defer close(queue)
		end = p.read(src, queue)
		if !errors.Is(end, errCut) {
			gone.Store(true)
		}
	}()
	var failed error
	for c := range queue {
		if failed == nil {
			failed = p.carry(c)
		}
		if failed != nil {
			p.l.reset() // ends the reader, too
		}
	}
	if failed == nil {
		p.finish(end)
	}
}

// read fills the queue. While the direction is paused it does not even read, so that the sender's window fills.
func (p *pipe) read(src *net.TCPConn, queue chan<- chunk) error {
	for {
		if !p.l.settled(p.dir, func(w weather) bool { return w.paused }) {
			return errCut
		}
		buf := make([]byte, 32<<10)
		n, err := src.Read(buf)
		if n > 0 {
			select {
			case queue <- chunk{buf[:n], time.Now()}:
			case <-p.l.ended:
				return errCut
			}
		}
		if err != nil {
			return err
		}
	}
}

// carry brings one chunk to the other side as the weather allows.
func (p *pipe) carry(c chunk) error {
	w, _ := p.l.p.now(p.dir)
	if !p.l.wait(time.Until(c.at.Add(w.latency))) || !p.l.settled(p.dir, func(w weather) bool { return w.paused }) {
		return errCut
	}
	if w, _ = p.l.p.now(p.dir); w.hole || p.swallow {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.swallow = true
		p.frames.feed(c.data)
		return nil
	}
	for len(c.data) > 0 {
		piece, cut := p.piece(c.data, w)
		if err := p.write(piece); err != nil {
			return err
		}
		if cut {
			return p.sever(w)
		}
		c.data = c.data[len(piece):]
		if w.slice > 0 && !p.l.wait(w.sliceGap) || w.bandwidth > 0 && !p.l.wait(transit(len(piece), w.bandwidth)) {
			return errCut
		}
	}
	return nil
}

func transit(n, bytesPerSecond int) time.Duration {
	return time.Duration(n) * time.Second / time.Duration(bytesPerSecond)
}

// piece is what may be written at once, and whether the connection is cut after it.
func (p *pipe) piece(data []byte, w weather) ([]byte, bool) {
	if w.slice > 0 && len(data) > w.slice {
		data = data[:w.slice]
	}
	at := p.cutAt.Load()
	if at == 0 {
		return data, false
	}
	left := max(at-p.passed.Load(), 0)
	if int64(len(data)) < left {
		return data, false
	}
	return data[:left], true
}

func (p *pipe) sever(w weather) error {
	if w.cutFIN {
		p.l.fin()
	} else {
		p.l.reset()
	}
	return errCut
}

// write passes bytes on, and what is to be injected at the first end of a frame in them.
func (p *pipe) write(data []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	first := p.frames.feed(data)
	p.passed.Add(int64(len(data)))
	if len(p.pending) > 0 && first >= 0 {
		data = append(append(append([]byte(nil), data[:first]...), p.pending...), data[first:]...)
		p.pending = nil
	}
	_, err := p.dst.Write(data)
	return err
}

// inject writes frames between two frames of the stream: now, or when the one under way ends.
func (p *pipe) inject(frames []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dst == nil || p.swallow || p.frames.opaque {
		return false
	}
	if !p.frames.between() {
		p.pending = append(p.pending, frames...)
		return true
	}
	_, err := p.dst.Write(frames)
	return err == nil
}

// finish passes the end of the source on, unless the direction swallows it: then the other side hears nothing until Heal.
func (p *pipe) finish(end error) {
	if !p.l.settled(p.dir, func(w weather) bool { return w.hole || w.paused }) {
		return
	}
	if p.dir == ToClient && !p.l.clientGone.Load() {
		defer p.l.p.probe() // the broker hung up first: it may be going down
	}
	if !errors.Is(end, io.EOF) || p.swallow {
		p.l.reset()
		return
	}
	_ = p.dst.CloseWrite()
}
