package wire

import (
	"encoding/binary"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Subscription is one consumer on one channel, as the wire sees it: its deliveries go straight to
// the workers and its settlements straight to the connection, past the driver, which spends 37
// allocations, two locks and two goroutine hops on a message and its ack. It fences as the driver's
// own Channel does: it is closed for good with its channel, also if the channel's number is used
// again.
type Subscription struct {
	socket    *Socket
	receiver  Receiver
	tag       string // of the consumer
	prefetch  int64
	channel   uint16       // once basic.consume was written
	closed    bool         // nothing more is settled; outbound's mutex guards it and channel
	unsettled atomic.Int64 // deliveries that are not settled
	heard     atomic.Int64 // when bytes of a delivery last came, since the socket's start
	refuse    func(size uint64) error

	// The message that is being read, which only Read's caller touches. What the workers read for
	// every settlement fills the cache line before.
	message        *amqp.Delivery
	hasHeader      bool   // its content header was read
	size           uint64 // of its body; what is still to come of it, once unfit is set
	announcedSize  uint64 // of the body, once unfit is set
	unfit          error  // why no handler can be given it
	closedByBroker bool   // the broker has closed the channel
	givenUp        bool   // all that comes is dropped
	interner       interner
}

// Receiver takes the messages of one subscription, in their order, on the goroutine that reads from
// the broker. Its methods must not block. What that goroutine writes for every message belongs into
// a struct of its own: on a cache line that the workers read it costs half of the throughput.
type Receiver interface {
	// New returns memory for the message that begins. A message that is cut off by the end of its
	// channel is never completed.
	New() *amqp.Delivery
	// Put takes the message of the last New, which is complete.
	Put(*amqp.Delivery)
	// PutAside takes a complete message that no handler can be given, and why; size is that of its
	// body, which was not kept.
	PutAside(d *amqp.Delivery, size uint64, reason error)
}

// Refuser is a Receiver that says by itself why a body of so many bytes is not kept, nil if it is,
// in place of Options.Refuse.
type Refuser interface {
	Refuse(size uint64) error
}

// newMessage returns memory for the next message. One of a closed channel goes nowhere.
func (sub *Subscription) newMessage() *amqp.Delivery {
	if sub.closedByBroker {
		return new(amqp.Delivery)
	}
	return sub.receiver.New()
}

// wantsHeader tells whether a message's content header is next.
func (sub *Subscription) wantsHeader() bool { return sub.message != nil && !sub.hasHeader }

// drop forgets a message that is not complete, as the driver does.
func (sub *Subscription) drop() {
	sub.message, sub.hasHeader, sub.size, sub.unfit, sub.announcedSize = nil, false, 0, nil, 0
}

// method reads a basic.deliver. It returns false if that is another consumer's.
func (sub *Subscription) method(payload []byte) (mine bool, err error) {
	d := decoder{b: payload}
	sub.drop()
	if tag := d.shortstr(); string(tag) != sub.tag && !sub.closedByBroker {
		return false, nil
	}
	sub.message = sub.newMessage()
	sub.message.ConsumerTag = sub.tag
	sub.interner.deliver(&d, sub.message)
	switch {
	case d.err == nil:
	case sub.message.DeliveryTag == 0: // nobody could ever settle it
		return true, garbled(unread("delivery tag", d.err))
	default:
		sub.setUnfit(unread("exchange and routing key", d.err))
	}
	return true, nil
}

// header reads a content header from the body size on.
func (sub *Subscription) header(payload []byte) {
	d := decoder{b: payload}
	sub.size = d.longlong()
	sub.interner.properties(&d, sub.message)
	sub.hasHeader = true
	if err := sub.refuse(sub.size); err != nil {
		sub.setUnfit(err)
	}
	if d.err != nil {
		sub.setUnfit(unread("headers", d.err))
	}
	if sub.unfit == nil {
		// What is announced is not there yet: no more than one frame of it is believed.
		sub.message.Body = make([]byte, 0, min(sub.size, FrameSize))
	} else {
		sub.announcedSize = sub.size
	}
	sub.finish()
}

// oversizedHeader begins a content header that is too large to be read. It comes piece by piece, as
// a body does.
func (sub *Subscription) oversizedHeader(size uint64) {
	sub.size = size
	sub.setUnfit(errHeaderSize)
}

// body takes a part of the body. Only at the end of a frame can the message be whole.
func (sub *Subscription) body(part []byte, frameEnds bool) {
	if sub.message == nil {
		return // the channel was given up
	}
	if sub.unfit == nil {
		sub.message.Body = append(sub.message.Body, part...)
	} else {
		sub.skip(uint64(len(part)), frameEnds)
	}
	if frameEnds {
		sub.finish()
	}
}

// checkBody checks that a part of the body is not more than is still to come.
func (sub *Subscription) checkBody(part uint64) error {
	if part > sub.size-uint64(len(sub.message.Body)) {
		return garbled(errBodySize)
	}
	return nil
}

// setUnfit notes why no handler can be given the message that is being read. The first reason
// stays.
func (sub *Subscription) setUnfit(reason error) {
	if sub.unfit == nil {
		sub.unfit = reason
	}
	sub.announcedSize = sub.size
}

// skip goes over n bytes of a message that no handler can be given: of its header, if that is too
// large, and of its body.
func (sub *Subscription) skip(n uint64, frameEnds bool) {
	if sub.hasHeader {
		sub.size -= n
	}
	sub.hasHeader = sub.hasHeader || frameEnds
}

// finish hands over the message if it is whole.
func (sub *Subscription) finish() {
	if uint64(len(sub.message.Body)) < sub.size {
		return
	}
	d, unfit, size := sub.message, sub.unfit, sub.announcedSize
	sub.drop()
	if sub.closedByBroker {
		return
	}
	sub.unsettled.Add(1)
	if unfit != nil {
		sub.receiver.PutAside(d, size, unfit)
		return
	}
	sub.receiver.Put(d)
}

// Ack writes one basic.ack, with multiple=false. It returns an error, and writes nothing, once the
// channel is closed. It blocks as the socket's Write does.
func (sub *Subscription) Ack(tag uint64) error { return sub.settle(basicAck, tag, 0) }

// Reject writes one basic.reject: with requeue the message goes back to its queue. Otherwise as
// Ack.
func (sub *Subscription) Reject(tag uint64, requeue bool) error {
	var bits byte
	if requeue {
		bits = rejectRequeue
	}
	return sub.settle(basicReject, tag, bits)
}

// Requeue writes one basic.nack with requeue, which says that nobody has begun the message: up to
// RabbitMQ 4.2 it counts towards a delivery limit, from 4.3 on only Reject does. Otherwise as Ack.
func (sub *Subscription) Requeue(tag uint64) error { return sub.settle(basicNack, tag, nackRequeue) }

// The bits of a settlement that says requeue.
const (
	rejectRequeue = 1
	nackRequeue   = 2
)

// settle writes one basic.ack, basic.reject or basic.nack, all with multiple=false.
func (sub *Subscription) settle(method uint32, tag uint64, bits byte) error {
	var frame [settlementSize]byte
	frame[0] = frameMethod
	binary.BigEndian.PutUint16(frame[1:], sub.channel)
	binary.BigEndian.PutUint32(frame[3:], settlementSize-frameHead-1)
	binary.BigEndian.PutUint32(frame[frameHead:], method)
	binary.BigEndian.PutUint64(frame[methodHead:], tag)
	frame[settlementSize-2] = bits
	frame[settlementSize-1] = frameEnd
	return sub.socket.out.settle(sub, frame[:])
}

// Unsettled is how many of the deliveries so far are not settled.
func (sub *Subscription) Unsettled() int64 { return sub.unsettled.Load() }

// Heard is when bytes of a delivery last came, since the socket's start.
func (sub *Subscription) Heard() time.Duration { return time.Duration(sub.heard.Load()) }

// subscriptions are those of a socket. They learn from the frames that the driver writes. The mutex
// of outbound guards them.
type subscriptions struct {
	expected   map[string]*Subscription // by consumer tag, until its basic.consume is written
	open       map[uint16]*Subscription // by channel
	tombstones map[uint16]*Subscription // closed ones, until the channel is opened again
	misuse     map[uint16]*Misuse       // by channel, until that is opened again
}

func (all *subscriptions) init() {
	all.expected = make(map[string]*Subscription)
	all.open = make(map[uint16]*Subscription)
	all.tombstones = make(map[uint16]*Subscription)
	all.misuse = make(map[uint16]*Misuse)
}

// learn takes a frame that the driver writes, or at least its beginning.
func (all *subscriptions) learn(p []byte) {
	channel := binary.BigEndian.Uint16(p[1:])
	switch methodID(p) {
	case basicConsume:
		tag := consumerTag(p)
		if sub := all.expected[tag]; sub != nil {
			delete(all.expected, tag)
			sub.channel, sub.closed = channel, false
			all.open[channel] = sub
		} else {
			all.misuseOf(channel).Consumers++
		}
	case txSelect:
		all.misuseOf(channel).Transactions++
	case channelOpen:
		all.close(channel)
		delete(all.tombstones, channel)
		delete(all.misuse, channel)
	case channelClose, channelCloseOk:
		all.close(channel)
	case connectionClose, connectionCloseOk:
		for channel := range all.open {
			all.close(channel)
		}
	}
}

func (all *subscriptions) misuseOf(channel uint16) *Misuse {
	if all.misuse[channel] == nil {
		all.misuse[channel] = new(Misuse)
	}
	return all.misuse[channel]
}

func (all *subscriptions) close(channel uint16) {
	if sub := all.open[channel]; sub != nil {
		sub.closed = true
		delete(all.open, channel)
		all.tombstones[channel] = sub
	}
}

// giveUp ends the subscription of a channel, if it has one. All that comes on the channel is
// dropped until it is opened again.
func (all *subscriptions) giveUp(s *Socket, channel uint16) {
	all.close(channel)
	all.tombstones[channel] = newTombstone(s, channel)
	all.tombstones[channel].givenUp = true
}

// newTombstone returns what takes the place of a closed subscription: it drops late deliveries.
func newTombstone(s *Socket, channel uint16) *Subscription {
	return &Subscription{socket: s, channel: channel, closed: true, closedByBroker: true, refuse: s.opts.refuse}
}

func (all *subscriptions) isGivenUp(channel uint16) bool {
	sub := all.on(channel)
	return sub != nil && sub.givenUp
}

// on returns the subscription of a channel, nil if there is none.
func (all *subscriptions) on(channel uint16) *Subscription {
	if sub := all.open[channel]; sub != nil {
		return sub
	}
	return all.tombstones[channel]
}

// busy tells whether a settlement may be on its way.
func (all *subscriptions) busy() bool {
	for _, sub := range all.open {
		if sub.unsettled.Load() > 0 {
			return true
		}
	}
	return false
}

// consumerTag reads the tag from a basic.consume: a reserved short, the queue's name, the tag. All
// three are in p: nobody publishes on the channel at the same time, and the driver flushes after
// every group of frames, so its buffer was empty when this frame began.
func consumerTag(p []byte) string {
	d := decoder{b: p[methodHead:]}
	d.short()
	d.shortstr()
	return string(d.shortstr())
}

// Subscribe makes the subscription of a consumer that is about to be. It opens with the
// basic.consume of this tag, which the driver writes.
func (s *Socket) Subscribe(tag string, prefetch int, to Receiver) *Subscription {
	sub := &Subscription{socket: s, receiver: to, tag: tag, prefetch: int64(prefetch), closed: true, refuse: s.opts.refuse}
	if own, ok := to.(Refuser); ok {
		sub.refuse = own.Refuse
	}
	s.out.mu.Lock()
	defer s.out.mu.Unlock()
	s.out.subscriptions.expected[tag] = sub
	return sub
}

// Forget ends a subscription that the broker has not taken.
func (sub *Subscription) Forget() {
	sub.LeaveTombstone()
	out := &sub.socket.out
	out.mu.Lock()
	defer out.mu.Unlock()
	delete(out.subscriptions.expected, sub.tag)
}

// LeaveTombstone keeps of a finished subscription only what drops late deliveries: it may take long
// until its channel's number is used again.
func (sub *Subscription) LeaveTombstone() {
	out := &sub.socket.out
	out.mu.Lock()
	defer out.mu.Unlock()
	if out.subscriptions.tombstones[sub.channel] == sub {
		tombstone := newTombstone(sub.socket, sub.channel)
		tombstone.tag = sub.tag
		out.subscriptions.tombstones[sub.channel] = tombstone
	}
}

// Misuse counts what must not be done with the channel that a TopologyFunc is given, which only
// such a function does.
type Misuse struct {
	Transactions int
	Consumers    int
}

// Misuse is what was counted on the channel so far.
func (c *Channel) Misuse() Misuse {
	o := &c.socket.out
	o.mu.Lock()
	defer o.mu.Unlock()
	return *o.subscriptions.misuseOf(c.number)
}
