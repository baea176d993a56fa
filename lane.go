package steadymq

import (
	"encoding/binary"
	"net"
)

// lane is the way of one session's settlements to the wire, past the driver,
// which spends ten allocations and two locks on each. It fences as the driver's
// own Channel does: it belongs to one subscription on one channel and is closed
// for good once that channel is closed, also if its number is used again.
type lane struct {
	socket  *socket
	channel uint16
	tag     string // of the consumer
	closed  bool   // under the socket's mutex
}

// settle writes one basic.ack, basic.reject or basic.nack, all with
// multiple=false. It returns net.ErrClosed, and writes nothing, once the channel
// is closed. It blocks as the socket's Write does.
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
	s.awaitRoom(len(frame))
	if l.closed || s.out.off || s.closing || s.over.Load() {
		s.mu.Unlock()
		return net.ErrClosed
	}
	if !s.out.between() { // the rest of a long frame of the driver is still to come
		s.late = append(s.late, frame[:]...)
		s.mu.Unlock()
		return nil
	}
	s.pending = append(s.pending, frame[:]...)
	now := s.pace(true)
	s.mu.Unlock()
	if now {
		s.nudge()
	}
	return nil
}

// The bits of a settlement that says requeue.
const (
	rejectRequeue = 1
	nackRequeue   = 2
)

// lanes are the open ones of a socket, by channel. They learn from the frames
// that the driver writes, under the socket's mutex.
type lanes struct {
	open map[uint16]*lane
}

// learn takes a frame that the driver writes, or at least its beginning.
func (ls *lanes) learn(s *socket, id uint32, p []byte) {
	channel := binary.BigEndian.Uint16(p[1:])
	switch id {
	case basicConsume:
		if tag, ok := consumerTag(p); ok {
			ls.open[channel] = &lane{socket: s, channel: channel, tag: tag}
		}
	case channelOpen, channelClose, channelCloseOk:
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
	}
}

// lane returns the way for the settlements of the consumer tag, nil if there is
// none and the driver has to send them.
func (s *socket) lane(tag string) *lane {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.lanes.open {
		if l.tag == tag {
			return l
		}
	}
	return nil
}

// consumerTag reads the tag from a basic.consume: a reserved short, the queue's
// name, the tag.
func consumerTag(p []byte) (string, bool) {
	at := methodHead + 2
	if len(p) <= at {
		return "", false
	}
	at += 1 + int(p[at])
	if len(p) <= at || len(p) < at+1+int(p[at]) {
		return "", false
	}
	return string(p[at+1 : at+1+int(p[at])]), true
}
