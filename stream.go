package steadymq

import (
	"errors"
	"strings"
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"
)

const offsetKey = "x-stream-offset"

// position remembers how far a stream has been handled, over the sessions of one
// Run: a stream keeps its messages and starts a consumer where the consumer says,
// so without it the successor of a lost session would skip what was published
// meanwhile. A nil position is that of a queue: it does nothing.
type position struct {
	mu      sync.Mutex
	queue   string // the stream it is about
	known   bool   // there has been a delivery, next is set
	next    int64  // offset of the first message not settled for good
	session uint64 // the one that low and done are about
	low     uint64 // every delivery tag up to it is settled
	done    map[uint64]int64
}

func newPosition(c *config) *position {
	if !c.stream() {
		return nil
	}
	return &position{done: make(map[uint64]int64)}
}

// resume returns the arguments of the basic.consume of a new session.
func (p *position) resume(session uint64, queue string, args amqp.Table) amqp.Table {
	args = cloneTable(args)
	if p == nil {
		return args
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.queue != queue {
		p.queue, p.known = queue, false
	}
	p.session, p.low = session, 0
	clear(p.done)
	if !p.known {
		return args
	}
	if args == nil {
		args = amqp.Table{}
	}
	args[offsetKey] = p.next
	return args
}

// startOver notes that the stream is gone. The one that will have its name
// counts from 0 again: asked for the old place, a broker would wait until it has
// that many messages and skip them all.
func (p *position) startOver() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next, p.session = 0, 0 // what late handlers of the old one settle counts no more
}

// checkStream looks whether the stream is there still, before it is declared:
// afterwards a new one looks like the old one. It takes a channel of its own,
// which the broker closes if not.
func (s *session) checkStream() error {
	if s.stream == nil {
		return nil
	}
	s.stream.mu.Lock()
	queue, known := s.stream.queue, s.stream.known
	s.stream.mu.Unlock()
	if !known {
		return nil
	}
	channel, err := s.conn.amqp.Channel()
	if err != nil {
		return err
	}
	defer channel.Close() //nolint:errcheck // a failed declare has closed it already
	if _, err = channel.QueueDeclarePassive(queue, true, false, false, false, amqp.Table{}); noQueue(err) {
		s.stream.startOver()
	}
	return nil
}

// noQueue tells that there is none, from one whose node is down.
func noQueue(err error) bool {
	var said *amqp.Error
	return errors.As(err, &said) && said.Server && said.Code == amqp.NotFound && strings.Contains(said.Reason, "no queue")
}

// began notes a delivery that a handler is given: even if none is ever settled,
// the next session must not start behind it.
func (p *position) began(session uint64, d *amqp.Delivery) {
	if p == nil {
		return
	}
	offset, ok := headerInt(d.Headers[offsetKey])
	p.mu.Lock()
	defer p.mu.Unlock()
	if ok && !p.known && session == p.session {
		// Tags count from 1: a worker with an earlier one may not be here yet.
		p.known, p.next = true, max(offset-int64(d.DeliveryTag)+1, 0)
	}
}

// settled notes that a delivery is done for good. Only an unbroken row of them
// moves the place to resume at.
func (p *position) settled(session uint64, d *Delivery) {
	if p == nil {
		return
	}
	offset, ok := headerInt(d.Headers[offsetKey])
	p.mu.Lock()
	defer p.mu.Unlock()
	if !ok || session != p.session {
		return
	}
	p.done[d.tag] = offset
	for {
		at, ok := p.done[p.low+1]
		if !ok {
			return
		}
		p.low++
		delete(p.done, p.low)
		p.next = at + 1
	}
}
