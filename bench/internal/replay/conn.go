package replay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// conn is one client. One goroutine reads, and answers what it read in as few
// writes as it can; faults, heartbeats and timed deliveries come from others,
// so mu guards everything below it and every write.
type conn struct {
	stats *counters
	io    net.Conn // what the frames go through: TCP, TLS or a pipe

	mu       sync.Mutex
	out      []byte // replies of the batch being read
	channels map[uint16]*channel
	due      []*channel // those whose window may have room since the last fill
	dead     bool       // the server says nothing more on this connection
	done     chan struct{}
}

type channel struct {
	id       uint16
	prefetch int
	tags     *ledger
	sub      *subscription
	due      bool // it is in the connection's list
}

type subscription struct {
	tag   string
	noAck bool
	load  load
	tmpl  template
}

var errClosed = errors.New("replay: connection closed in good order")

// serve speaks AMQP on nc until either side ends it.
func serve(nc net.Conn, stats *counters, track func(*conn) (untrack func())) error {
	c := &conn{stats: stats, io: nc, channels: map[uint16]*channel{}, done: make(chan struct{})}
	defer nc.Close()
	defer close(c.done)
	defer track(c)()
	if err := c.greet(); err != nil {
		return err
	}
	err := c.read()
	if errors.Is(err, errClosed) || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (c *conn) greet() error {
	var header [8]byte
	if _, err := io.ReadFull(c.io, header[:]); err != nil {
		return err
	}
	if string(header[:]) != "AMQP\x00\x00\x09\x01" {
		return fmt.Errorf("replay: protocol header %q", header)
	}
	_, err := c.io.Write(appendMethod(nil, 0, connectionStart, startArgs()))
	return err
}

// read takes whatever has arrived, handles every whole frame of it, and then
// writes once: replies first, then as many deliveries as the windows allow.
func (c *conn) read() error {
	buf := make([]byte, 256<<10)
	held := 0
	for {
		n, err := c.io.Read(buf[held:])
		if err != nil {
			return err
		}
		held += n
		c.stats.reads.Add(1)
		used, err := c.batch(buf[:held])
		if err != nil {
			return err
		}
		if used == 0 && held == len(buf) {
			return errors.New("replay: frame larger than the buffer")
		}
		held = copy(buf, buf[used:held])
	}
}

func (c *conn) batch(b []byte) (used int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(b)-used >= frameOverhead {
		f := b[used:]
		size := int(binary.BigEndian.Uint32(f[3:]))
		if len(f) < size+frameOverhead {
			break
		}
		used += size + frameOverhead
		if f[0] != frameMethod {
			continue // a heartbeat
		}
		id := binary.BigEndian.Uint16(f[1:])
		m := method(binary.BigEndian.Uint32(f[7:]))
		if err = c.handle(id, m, &args{b: f[11 : 7+size]}); err != nil {
			break
		}
	}
	c.flush()
	if err == nil {
		c.fill()
	}
	return used, err
}

// flush sends the replies. Its error is not looked at: the next read ends the
// connection for the same reason.
func (c *conn) flush() {
	if len(c.out) > 0 && !c.dead {
		_, _ = c.io.Write(c.out)
	}
	c.out = c.out[:0]
}

func (c *conn) reply(id uint16, m method, args []byte) {
	c.out = appendMethod(c.out, id, m, args)
}

func (c *conn) handle(id uint16, m method, a *args) error {
	switch m {
	case basicAck:
		c.settle(id, a.u64(), a.u8()&1 != 0)
	case basicNack:
		c.settle(id, a.u64(), a.u8()&1 != 0)
	case basicReject:
		c.settle(id, a.u64(), false)
	case connectionStartOk, connectionTuneOk, connectionOpen, connectionClose, connectionCloseOk:
		return c.handleConnection(m, a)
	case channelOpen:
		c.channels[id] = &channel{id: id, prefetch: 65535, tags: newLedger()}
		c.reply(id, channelOpenOk, []byte{0, 0, 0, 0})
	case channelClose:
		c.forget(id)
		c.reply(id, channelCloseOk, nil)
	case channelCloseOk:
		c.forget(id)
	default:
		return c.handleChannel(id, m, a)
	}
	return a.err
}

// forget ends a channel, which may be due.
func (c *conn) forget(id uint16) {
	if ch := c.channels[id]; ch != nil {
		ch.sub = nil
		delete(c.channels, id)
	}
}

func (c *conn) handleConnection(m method, a *args) error {
	switch m {
	case connectionStartOk:
		c.reply(0, connectionTune, tuneArgs())
	case connectionTuneOk:
		a.take(6)
		go c.heartbeat(time.Duration(a.u16()) * time.Second / 2)
	case connectionOpen:
		c.reply(0, connectionOpenOk, []byte{0})
	case connectionClose:
		c.reply(0, connectionCloseOk, nil)
		c.flush()
		return errClosed
	case connectionCloseOk:
		return errClosed
	}
	return a.err
}

func (c *conn) handleChannel(id uint16, m method, a *args) error {
	ch := c.channels[id]
	if ch == nil {
		return fmt.Errorf("replay: method %d.%d on channel %d, which is not open", m>>16, m&0xffff, id)
	}
	switch m {
	case basicQos:
		a.take(4)
		if n := int(a.u16()); n > 0 {
			ch.prefetch = n
		}
		c.reply(id, basicQosOk, nil)
	case queueDeclare:
		a.take(2)
		name := appendShortstr(nil, a.shortstr())
		c.reply(id, queueDeclareOk, append(name, 0, 0, 0, 0, 0, 0, 0, 0))
	case basicConsume:
		return c.consume(ch, a)
	case basicCancel:
		tag := a.shortstr()
		ch.sub = nil
		if a.u8()&1 == 0 {
			c.reply(id, basicCancelOk, appendShortstr(nil, tag))
		}
	case basicCancelOk:
	default:
		return fmt.Errorf("replay: method %d.%d is not played", m>>16, m&0xffff)
	}
	return a.err
}

func (c *conn) consume(ch *channel, a *args) (err error) {
	a.take(2)
	queue, tag, bits := a.shortstr(), a.shortstr(), a.u8()
	sub := &subscription{tag: tag, noAck: bits&2 != 0}
	if sub.load, err = parseLoad(queue); err != nil {
		return err
	}
	generation := c.stats.subscriptions.Add(1)
	most := ch.prefetch
	if sub.noAck {
		most = templateCopies
	}
	sub.tmpl = newTemplate(ch.id, tag, queue, sub.load.size, generation, most)
	ch.sub = sub
	c.mayFill(ch)
	if bits&8 == 0 {
		c.reply(ch.id, basicConsumeOk, appendShortstr(nil, tag))
	}
	if sub.noAck || sub.load.every > 0 {
		c.flush() // consume-ok goes before what the pump sends
		go c.pump(ch, sub)
	}
	return a.err
}

func (c *conn) settle(id uint16, tag uint64, multiple bool) {
	ch := c.channels[id]
	if ch == nil {
		c.stats.wrong.Add(1)
		return
	}
	n := ch.tags.settle(tag, multiple)
	if n == 0 {
		c.stats.wrong.Add(1)
	}
	if multiple {
		c.stats.multiple.Add(1)
	}
	c.stats.settled.Add(uint64(n))
	c.mayFill(ch)
}

// mayFill has the next fill look at the channel. It looks at no others: with a thousand channels on
// the connection that would be most of what the server does.
func (c *conn) mayFill(ch *channel) {
	if !ch.due {
		ch.due = true
		c.due = append(c.due, ch)
	}
}

// fill keeps every window full. What several channels get is sent in one write, as long as it is
// not much.
func (c *conn) fill() {
	for _, ch := range c.due {
		ch.due = false
		for ch.sub != nil && !ch.sub.noAck && ch.sub.load.every == 0 {
			if c.deliver(ch, ch.prefetch-ch.tags.outstanding, len(c.due) > 1) == 0 {
				break
			}
		}
	}
	c.due = c.due[:0]
	c.flush()
}

// refill fills the windows of all channels.
func (c *conn) refill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ch := range c.channels {
		c.mayFill(ch)
	}
	c.fill()
}

// deliver sends up to n messages in one write, or the next flush does if they are to be collected,
// and returns how many.
func (c *conn) deliver(ch *channel, n int, collected bool) int {
	n = min(n, ch.sub.tmpl.copies)
	if n <= 0 || c.dead || c.stats.stopped.Load() {
		return 0
	}
	first := ch.tags.deliver(n)
	if ch.sub.noAck {
		ch.tags.settle(first+uint64(n)-1, true)
	}
	if ch.sub.load.every > 0 {
		ch.sub.tmpl.stampTime(time.Now())
	}
	c.stats.delivered.Add(uint64(n))
	messages := ch.sub.tmpl.stamp(first, n)
	if collected {
		if c.out = append(c.out, messages...); len(c.out) >= templateBytes {
			c.flush()
		}
		return n
	}
	if _, err := c.io.Write(messages); err != nil {
		c.dead = true
	}
	return n
}

// pump sends what no ack triggers: without acks as fast as the socket takes
// it, else one message per tick within the window.
func (c *conn) pump(ch *channel, sub *subscription) {
	for c.pumpOnce(ch, sub) {
		if sub.load.every == 0 {
			continue
		}
		select {
		case <-time.After(sub.load.every):
		case <-c.done:
			return
		}
	}
}

func (c *conn) pumpOnce(ch *channel, sub *subscription) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ch.sub != sub || c.dead || c.channels[ch.id] != ch || c.stats.stopped.Load() {
		return false
	}
	n := 1
	if sub.noAck && sub.load.every == 0 {
		n = sub.tmpl.copies
	} else if ch.tags.outstanding >= ch.prefetch {
		n = 0
	}
	c.deliver(ch, n, false)
	return true
}

func (c *conn) heartbeat(every time.Duration) {
	if every <= 0 {
		return
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			c.mu.Lock()
			c.out = appendHeartbeat(c.out)
			c.flush()
			c.mu.Unlock()
		case <-c.done:
			return
		}
	}
}
