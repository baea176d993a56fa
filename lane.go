package steadymq

import (
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// lane is the way of one session's deliveries and settlements between the wire
// and the workers, past the driver, which spends 37 allocations, two locks and
// two goroutine hops on each message. It fences as the driver's own Channel does:
// it belongs to one subscription on one channel and is closed for good once that
// channel is closed, also if its number is used again.
type lane struct {
	*inbox
	socket   *socket
	tag      string // of the consumer
	prefetch int64
	channel  uint16       // once basic.consume was written
	closed   bool         // under the socket's mutex, as is channel
	owed     atomic.Int64 // deliveries that are not settled
	heard    atomic.Int64 // when bytes of a delivery last came, since the socket's start

	aside aside // what no handler can be given

	// The message that is being read; touched by the socket's Read only.
	message *Delivery
	headed  bool          // its content header was read
	size    uint64        // of its body; of what is still to come of it, where unfit is set
	unfit   *MessageError // why no handler can be given it
	refused bool          // the broker has closed the channel
	memos   memos
}

var errBodySize = errors.New("a body longer than announced")

// begun tells whether a message's content header is next.
func (l *lane) begun() bool { return l.message != nil && !l.headed }

// interrupt drops a message that is not complete, as the driver does.
func (l *lane) interrupt() { l.message, l.headed, l.size, l.unfit = nil, false, 0, nil }

// begin reads a basic.deliver. It returns false if that is another consumer's.
func (l *lane) begin(payload []byte) (mine bool, err error) {
	f := fields{b: payload}
	l.interrupt()
	if tag := f.shortstr(); string(tag) != l.tag && !l.refused {
		return false, nil
	}
	l.message = newDelivery()
	l.message.ConsumerTag = l.tag
	l.memos.deliver(&f, &l.message.Delivery)
	switch {
	case f.err == nil:
	case l.message.DeliveryTag == 0: // nobody could ever settle it
		return true, garbled(unread("delivery tag", f.err))
	default:
		l.refuse(unread("exchange and routing key", f.err))
	}
	return true, nil
}

// head reads a content header from the body size on.
func (l *lane) head(payload []byte) {
	f := fields{b: payload}
	l.size = f.longlong()
	l.memos.properties(&f, &l.message.Delivery)
	l.headed = true
	if err := l.socket.opts.tooLarge(l.size); err != nil {
		l.refuse(err)
	}
	if f.err != nil {
		l.refuse(unread("headers", f.err))
	}
	if l.unfit == nil {
		// What is announced is not there yet: no more than one frame is believed.
		l.message.Body = make([]byte, 0, min(l.size, frameSize))
	} else {
		l.unfit.Size = l.size
	}
	l.finish()
}

// add takes a part of the body. Only at the end of a frame a message is whole.
func (l *lane) add(part []byte, end bool) {
	if l.unfit == nil {
		l.message.Body = append(l.message.Body, part...)
	} else {
		l.skip(uint64(len(part)), end)
	}
	if end {
		l.finish()
	}
}

// announced checks that a part of the body is not more than is still to come.
func (l *lane) announced(part uint64) error {
	if part > l.size-uint64(len(l.message.Body)) {
		return garbled(errBodySize)
	}
	return nil
}

// finish hands over the message if it is whole.
func (l *lane) finish() {
	if uint64(len(l.message.Body)) < l.size {
		return
	}
	d, unfit := l.message, l.unfit
	l.interrupt()
	if l.refused {
		return
	}
	l.owed.Add(1)
	if unfit != nil {
		l.aside.put(d, unfit)
		return
	}
	l.put(d)
}

// settle writes one basic.ack, basic.reject or basic.nack, all with
// multiple=false. It returns an error, and writes nothing, once the channel is
// closed. It blocks as the socket's Write does.
func (l *lane) settle(method uint32, tag uint64, bits byte) error {
	var frame [settlementSize]byte
	frame[0] = frameMethod
	binary.BigEndian.PutUint16(frame[1:], l.channel)
	binary.BigEndian.PutUint32(frame[3:], settlementSize-frameHead-1)
	binary.BigEndian.PutUint32(frame[frameHead:], method)
	binary.BigEndian.PutUint64(frame[methodHead:], tag)
	frame[settlementSize-2] = bits
	frame[settlementSize-1] = frameEnd

	s := l.socket
	s.mu.Lock()
	s.await(func() bool { return s.full(len(frame)) || s.out.within() })
	if l.closed || s.closing || s.over.Load() {
		s.mu.Unlock()
		return s.err()
	}
	l.owed.Add(-1)
	s.pending = append(s.pending, frame[:]...)
	tell, wait := s.flush.settled(time.Since(s.start), l.prefetch)
	if wait > 0 {
		s.delay.Reset(wait)
	}
	s.mu.Unlock()
	if tell {
		s.nudge()
	}
	return nil
}

// The bits of a settlement that says requeue.
const (
	rejectRequeue = 1
	nackRequeue   = 2
)

// lanes are those of a socket. They learn from the frames that the driver
// writes, under the socket's mutex.
type lanes struct {
	expected map[string]*lane // by consumer tag, until its basic.consume is written
	open     map[uint16]*lane // by channel
	past     map[uint16]*lane // closed ones, until the channel is opened again
	misuse   misuse
}

// learn takes a frame that the driver writes, or at least its beginning.
func (ls *lanes) learn(p []byte) {
	channel := binary.BigEndian.Uint16(p[1:])
	switch methodID(p) {
	case basicConsume:
		tag := consumerTag(p)
		if l := ls.expected[tag]; l != nil {
			delete(ls.expected, tag)
			l.channel, l.closed = channel, false
			ls.open[channel] = l
		} else {
			ls.misuse.consumers++
		}
	case txSelect:
		ls.misuse.transactions++
	case channelOpen:
		ls.end(channel)
		delete(ls.past, channel)
	case channelClose, channelCloseOk:
		ls.end(channel)
	case connectionClose, connectionCloseOk:
		for channel := range ls.open {
			ls.end(channel)
		}
	}
}

func (ls *lanes) end(channel uint16) {
	if l := ls.open[channel]; l != nil {
		l.closed = true
		delete(ls.open, channel)
		ls.past[channel] = l
	}
}

// on returns the lane of a channel, nil if there is none.
func (ls *lanes) on(channel uint16) *lane {
	if l := ls.open[channel]; l != nil {
		return l
	}
	return ls.past[channel]
}

// busy tells whether a settlement may be on its way.
func (ls *lanes) busy() bool {
	for _, l := range ls.open {
		if l.owed.Load() > 0 {
			return true
		}
	}
	return false
}

// lane makes the way for a consumer that is about to subscribe. It opens with
// the basic.consume that has the tag.
func (s *socket) lane(tag string, prefetch int) *lane {
	l := &lane{inbox: newInbox(prefetch), aside: newAside(), socket: s, tag: tag, prefetch: int64(prefetch), closed: true}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lanes.expected[tag] = l
	return l
}

// forget ends a lane whose subscription has failed.
func (l *lane) forget() {
	l.inbox.close()
	l.bury()
	l.socket.mu.Lock()
	defer l.socket.mu.Unlock()
	delete(l.socket.lanes.expected, l.tag)
}

// clear empties a closed lane.
func (l *lane) clear() []*Delivery {
	all := l.inbox.clear()
	for _, m := range l.aside.take() {
		all = append(all, m.delivery)
	}
	return all
}

// bury leaves of a lane that is done with only what drops late deliveries: its
// channel's number may not come up again for long.
func (l *lane) bury() {
	l.clear()
	s := l.socket
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lanes.past[l.channel] == l {
		s.lanes.past[l.channel] = &lane{socket: s, tag: l.tag, channel: l.channel, closed: true, refused: true}
	}
}

// consumerTag reads the tag from a basic.consume: a reserved short, the queue's
// name, the tag. That all of it is in the driver's first write of the frame takes
// that nobody publishes on the channel before, which TopologyFunc forbids.
func consumerTag(p []byte) string {
	f := fields{b: p[methodHead:]}
	f.short()
	f.shortstr()
	return string(f.shortstr())
}

// inbox is what the broker has delivered and no worker has taken yet.
type inbox struct {
	next chan *Delivery

	mu   sync.Mutex
	shut bool
	rest []*Delivery // more than the prefetch, or after the inbox was shut
	done bool        // it was cleared
	more atomic.Bool // rest is not empty
}

func newInbox(size int) *inbox {
	return &inbox{next: make(chan *Delivery, size)}
}

// put never blocks. Stream queues deliver whole chunks, so the prefetch is no bound.
func (i *inbox) put(d *Delivery) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.shut && len(i.rest) == 0 {
		select {
		case i.next <- d:
			return
		default:
		}
	}
	i.rest = append(i.rest, d)
	i.more.Store(true)
	i.refill() // a worker may have made room before it could see that there is more
}

// take waits for a delivery. It returns false once the inbox is shut and empty.
func (i *inbox) take() (*Delivery, bool) {
	d, ok := <-i.next
	if ok && i.more.Load() {
		i.mu.Lock()
		i.refill()
		i.mu.Unlock()
	}
	return d, ok
}

// refill is called with mu held.
func (i *inbox) refill() {
	for len(i.rest) > 0 && !i.shut {
		select {
		case i.next <- i.rest[0]:
			i.rest[0] = nil // the array outlives it
			i.rest = i.rest[1:]
		default:
			return
		}
	}
	if len(i.rest) == 0 {
		i.rest = nil
	}
	i.more.Store(len(i.rest) > 0)
}

// takeBack takes what a worker does not start. It returns false if that is too late
// for clear.
func (i *inbox) takeBack(d *Delivery) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.done {
		return false
	}
	i.rest = append(i.rest, d)
	i.more.Store(true)
	return true
}

// waiting returns how many deliveries no worker has taken.
func (i *inbox) waiting() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.next) + len(i.rest)
}

// close lets waiting workers go. What is left, and what still comes, is for clear.
func (i *inbox) close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.shut {
		i.shut = true
		close(i.next)
	}
}

// clear empties a closed inbox.
func (i *inbox) clear() []*Delivery {
	i.mu.Lock()
	defer i.mu.Unlock()
	var all []*Delivery
	for d := range i.next {
		all = append(all, d)
	}
	all, i.rest, i.done = append(all, i.rest...), nil, true
	return all
}
