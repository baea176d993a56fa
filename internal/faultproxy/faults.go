package faultproxy

import "time"

// Reset ends the open connections with RST, on both sides.
func (p *Proxy) Reset() { p.each((*link).reset) }

// FIN ends the open connections in the polite way, on both sides.
func (p *Proxy) FIN() { p.each((*link).fin) }

// BlackHole swallows what goes in the direction and keeps every socket open, also those a peer has closed. A connection that lost
// bytes this way stays dead after Heal; a later one is well.
func (p *Proxy) BlackHole(d Direction) { p.set(d, func(w *weather) { w.hole = true }) }

// Pause stops reading in the direction: bytes are late, none are lost, and the sender's window fills.
func (p *Proxy) Pause(d Direction) { p.set(d, func(w *weather) { w.paused = true }) }

// Latency delays every byte.
func (p *Proxy) Latency(d Direction, by time.Duration) { p.set(d, func(w *weather) { w.latency = by }) }

// Bandwidth limits the bytes a second on each connection.
func (p *Proxy) Bandwidth(d Direction, bytesPerSecond int) {
	p.set(d, func(w *weather) { w.bandwidth = bytesPerSecond })
}

// Slice writes at most n bytes at a time, gap apart.
func (p *Proxy) Slice(d Direction, n int, gap time.Duration) {
	p.set(d, func(w *weather) { w.slice, w.sliceGap = n, gap })
}

// CutAfter resets every connection after n more bytes in the direction; a connection to come counts from its first byte.
func (p *Proxy) CutAfter(d Direction, n int64) { p.cut(d, n, false) }

// FINAfter is CutAfter with the polite ending.
func (p *Proxy) FINAfter(d Direction, n int64) { p.cut(d, n, true) }

func (p *Proxy) cut(d Direction, n int64, fin bool) {
	p.set(d, func(w *weather) { w.cutAfter, w.cutFIN = n, fin })
	p.each(func(l *link) {
		for _, pipe := range []*pipe{l.up, l.down} {
			if d&pipe.dir != 0 {
				pipe.cutAt.Store(pipe.passed.Load() + n)
			}
		}
	})
}

// Refuse refuses connections to come; the open ones live.
func (p *Proxy) Refuse() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refusing = true
	p.stopListening()
}

// Heal ends every fault.
func (p *Proxy) Heal() {
	p.set(Both, func(w *weather) { *w = weather{} })
	p.each(func(l *link) {
		l.up.cutAt.Store(0)
		l.down.cutAt.Store(0)
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refusing = false
	p.listenAgain()
}

// Inject writes frames into every open connection, between two frames of its own, and says into how many.
func (p *Proxy) Inject(d Direction, frames []byte) int {
	n := 0
	p.each(func(l *link) {
		for _, pipe := range []*pipe{l.up, l.down} {
			if d&pipe.dir != 0 && pipe.inject(frames) {
				n++
			}
		}
	})
	return n
}

func (p *Proxy) set(d Direction, change func(*weather)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, one := range []Direction{ToBroker, ToClient} {
		if d&one != 0 {
			change(&p.weather[one.index()])
		}
	}
	close(p.changed)
	p.changed = make(chan struct{})
}

// each visits the open connections without the lock: what is done to them may need it.
func (p *Proxy) each(do func(*link)) {
	p.mu.Lock()
	links := make([]*link, 0, len(p.links))
	for l := range p.links {
		links = append(links, l)
	}
	p.mu.Unlock()
	for _, l := range links {
		do(l)
	}
}

// now is the weather of a direction and a channel that is closed when it changes.
func (p *Proxy) now(d Direction) (weather, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.weather[d.index()], p.changed
}
