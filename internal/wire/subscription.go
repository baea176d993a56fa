package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Subscription is the way of one session's deliveries and settlements between the wire
// and the workers, past the driver, which spends 37 allocations, two locks and
// two goroutine hops on each message. It fences as the driver's own Channel does:
// it belongs to one subscription on one channel and is closed for good once that
// channel is closed, also if its number is used again.
type Subscription struct {
	socket   *Socket
	receiver Receiver
	tag      string // of the consumer
	prefetch int64
	channel  uint16       // once basic.consume was written
	closed   bool         // under the socket's mutex, as is channel
	owed     atomic.Int64 // deliveries that are not settled
	heard    atomic.Int64 // when bytes of a delivery last came, since the socket's start

	// The message that is being read; touched by the socket's Read only.
	message       *amqp.Delivery
	headed        bool   // its content header was read
	size          uint64 // of its body; of what is still to come of it, where unfit is set
	announcedSize uint64 // of the body, where unfit is set
	unfit         error  // why no handler can be given it
	refused       bool   // the broker has closed the channel
	memos         memos
}

var errBodySize = errors.New("a body longer than announced")

// Receiver takes the messages of one subscription, in their order, on the goroutine that reads
// from the broker. Its methods must not block. What Read's goroutine writes to on the way of every
// message belongs into a struct of its own: on a cache line that the workers read it costs half of
// the throughput.
type Receiver interface {
	// New returns memory for the message that begins. A message that is cut off by the end of its
	// channel is never completed.
	New() *amqp.Delivery
	// Put takes the message of the last New, which is complete.
	Put(*amqp.Delivery)
	// PutAside takes it where no handler can be given it, and why; size is that of its body, which
	// was not kept.
	PutAside(d *amqp.Delivery, size uint64, reason error)
}

// memory is that of the next message. One of a closed channel goes nowhere.
func (l *Subscription) memory() *amqp.Delivery {
	if l.refused {
		return new(amqp.Delivery)
	}
	return l.receiver.New()
}

// begun tells whether a message's content header is next.
func (l *Subscription) begun() bool { return l.message != nil && !l.headed }

// interrupt drops a message that is not complete, as the driver does.
func (l *Subscription) interrupt() {
	l.message, l.headed, l.size, l.unfit, l.announcedSize = nil, false, 0, nil, 0
}

// begin reads a basic.deliver. It returns false if that is another consumer's.
func (l *Subscription) begin(payload []byte) (mine bool, err error) {
	f := fields{b: payload}
	l.interrupt()
	if tag := f.shortstr(); string(tag) != l.tag && !l.refused {
		return false, nil
	}
	l.message = l.memory()
	l.message.ConsumerTag = l.tag
	l.memos.deliver(&f, l.message)
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
func (l *Subscription) head(payload []byte) {
	f := fields{b: payload}
	l.size = f.longlong()
	l.memos.properties(&f, l.message)
	l.headed = true
	if err := l.socket.opts.refuse(l.size); err != nil {
		l.refuse(err)
	}
	if f.err != nil {
		l.refuse(unread("headers", f.err))
	}
	if l.unfit == nil {
		// What is announced is not there yet: no more than one frame is believed.
		l.message.Body = make([]byte, 0, min(l.size, FrameSize))
	} else {
		l.announcedSize = l.size
	}
	l.finish()
}

// add takes a part of the body. Only at the end of a frame a message is whole.
func (l *Subscription) add(part []byte, end bool) {
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
func (l *Subscription) announced(part uint64) error {
	if part > l.size-uint64(len(l.message.Body)) {
		return garbled(errBodySize)
	}
	return nil
}

// finish hands over the message if it is whole.
func (l *Subscription) finish() {
	if uint64(len(l.message.Body)) < l.size {
		return
	}
	d, unfit, size := l.message, l.unfit, l.announcedSize
	l.interrupt()
	if l.refused {
		return
	}
	l.owed.Add(1)
	if unfit != nil {
		l.receiver.PutAside(d, size, unfit)
		return
	}
	l.receiver.Put(d)
}

// Ack writes one basic.ack, with multiple=false. It returns an error, and writes nothing, once the
// channel is closed. It blocks as the socket's Write does.
func (l *Subscription) Ack(tag uint64) error { return l.settle(basicAck, tag, 0) }

// Reject writes one basic.reject: with requeue the message goes back to its queue. Otherwise as Ack.
func (l *Subscription) Reject(tag uint64, requeue bool) error {
	var bits byte
	if requeue {
		bits = rejectRequeue
	}
	return l.settle(basicReject, tag, bits)
}

// Requeue writes one basic.nack with requeue, which says that nobody has begun the message: up to
// RabbitMQ 4.2 it counts towards a delivery limit, from 4.3 on only Reject does. Otherwise as Ack.
func (l *Subscription) Requeue(tag uint64) error { return l.settle(basicNack, tag, nackRequeue) }

// Unsettled is how many of the deliveries so far are not settled.
func (l *Subscription) Unsettled() int64 { return l.owed.Load() }

// Heard is when bytes of a delivery last came, since the socket's start.
func (l *Subscription) Heard() time.Duration { return time.Duration(l.heard.Load()) }

// settle writes one basic.ack, basic.reject or basic.nack, all with
// multiple=false. It returns an error, and writes nothing, once the channel is
// closed. It blocks as the socket's Write does.
func (l *Subscription) settle(method uint32, tag uint64, bits byte) error {
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
	expected map[string]*Subscription // by consumer tag, until its basic.consume is written
	open     map[uint16]*Subscription // by channel
	past     map[uint16]*Subscription // closed ones, until the channel is opened again
	misuse   Misuse
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
			ls.misuse.Consumers++
		}
	case txSelect:
		ls.misuse.Transactions++
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
func (ls *lanes) on(channel uint16) *Subscription {
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

// Subscribe makes the way for a consumer that is about to subscribe. It opens with
// the basic.consume that has the tag.
func (s *Socket) Subscribe(tag string, prefetch int, to Receiver) *Subscription {
	l := &Subscription{socket: s, receiver: to, tag: tag, prefetch: int64(prefetch), closed: true}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lanes.expected[tag] = l
	return l
}

// Forget ends a subscription that the broker has not taken.
func (l *Subscription) Forget() {
	l.LeaveTombstone()
	l.socket.mu.Lock()
	defer l.socket.mu.Unlock()
	delete(l.socket.lanes.expected, l.tag)
}

// LeaveTombstone leaves of a subscription that is done with only what drops late deliveries: its
// channel's number may not come up again for long.
func (l *Subscription) LeaveTombstone() {
	s := l.socket
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lanes.past[l.channel] == l {
		s.lanes.past[l.channel] = &Subscription{socket: s, tag: l.tag, channel: l.channel, closed: true, refused: true}
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

// refuse notes why no handler can be given the message that is being read. The first
// reason stays.
func (l *Subscription) refuse(reason error) {
	if l.unfit == nil {
		l.unfit = reason
	}
	l.announcedSize = l.size
}

var errHeaderSize = fmt.Errorf("its headers are larger than %d bytes", maxHeader)

// skipHead begins a message whose content header is too large to be read. It comes
// piece by piece.
func (l *Subscription) skipHead(size uint64) {
	l.size = size
	l.refuse(errHeaderSize)
}

// skip goes over n bytes of a message that no handler can be given: of its header, if
// that is too large, and of its body.
func (l *Subscription) skip(n uint64, end bool) {
	if l.headed {
		l.size -= n
	}
	l.headed = l.headed || end
}

// Misuse counts what must not be done with the channel that a TopologyFunc is given. Only such
// a function does it, and none runs beside it on its connection.
type Misuse struct {
	Transactions int
	Consumers    int
}

func (s *Socket) Misuse() Misuse {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lanes.misuse
}
