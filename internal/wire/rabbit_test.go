package wire

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// rabbit is RabbitMQ as its rabbit_reader and rabbit_channel treat channels: a process for each, which
// takes one method after the other and may hang in any; and an error of the connection for what
// stands in their way. It keeps those instead.
type rabbit struct {
	far        net.Conn
	channelMax uint16
	hangs      func(method uint32) time.Duration // how long a channel hangs in it; a minus closes the channel instead
	deliveries int                               // after each consume-ok

	mu       sync.Mutex
	channels map[uint16]*process
	errors   []string
	acked    int
	all      sync.WaitGroup
}

// process is one channel of rabbit.
type process struct {
	broker  *rabbit
	number  uint16
	inbox   chan []byte
	closing bool // the broker has closed it, and waits for close-ok
	tag     uint64
	unacked []uint64
}

// the methods that a channel of these tests calls
const (
	basicQos    = 60<<16 | 10
	basicCancel = 60<<16 | 30
)

func (r *rabbit) refuse(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

func (r *rabbit) write(b ...[]byte) { _, _ = r.far.Write(slicesOf(b...)) }

// run plays until far is closed.
func (r *rabbit) run() {
	in := bufio.NewReader(r.far)
	_, _ = io.ReadFull(in, make([]byte, 8))
	long := func(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }
	r.write(methodOf(0, 10, 10, append([]byte{0, 9, 0, 0, 0, 0}, append(long("PLAIN"), long("en_US")...)...)...))
	for {
		head := make([]byte, frameHead)
		if _, err := io.ReadFull(in, head); err != nil {
			break
		}
		frame := append(head, make([]byte, binary.BigEndian.Uint32(head[3:])+1)...)
		if _, err := io.ReadFull(in, frame[frameHead:]); err != nil {
			break
		}
		r.take(frame)
	}
	r.mu.Lock()
	for _, p := range r.channels {
		close(p.inbox)
	}
	clear(r.channels)
	r.mu.Unlock()
	r.all.Wait()
}

// take is what rabbit_reader does with a frame.
func (r *rabbit) take(frame []byte) {
	id, number := methodID(frame), binary.BigEndian.Uint16(frame[1:])
	if number == 0 {
		switch id {
		case 10<<16 | 11:
			r.write(methodOf(0, 10, 30, byte(r.channelMax>>8), byte(r.channelMax), 0, 2, 0, 0, 0, 60))
		case 10<<16 | 40:
			r.write(methodOf(0, 10, 41, 0))
		case connectionClose:
			r.write(methodOf(0, 10, 51))
		}
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.channels[number]
	switch {
	case p == nil && id != channelOpen:
		r.refuse("504: expected channel.open on %d, got %#x", number, id)
		return
	case p == nil:
		p = &process{broker: r, number: number, inbox: make(chan []byte, 1000)}
		r.channels[number] = p
		r.all.Go(p.run)
	case id == channelOpen:
		r.refuse("504: second channel.open on %d", number)
		return
	}
	if id == channelCloseOk && !p.closing {
		r.refuse("close-ok to nothing on %d", number)
	}
	p.inbox <- frame
	if id == channelCloseOk {
		p.forget()
	}
}

// forget makes the number free. The caller holds mu.
func (p *process) forget() {
	if p.broker.channels[p.number] == p {
		delete(p.broker.channels, p.number)
		close(p.inbox)
	}
}

func (p *process) run() {
	for frame := range p.inbox {
		p.handle(methodID(frame), frame)
	}
}

func (p *process) handle(id uint32, frame []byte) {
	r, n := p.broker, p.number
	hang := r.hangs(id)
	if hang > 0 {
		time.Sleep(hang)
	}
	r.mu.Lock()
	closing := p.closing
	if hang < 0 && !closing && id != channelClose {
		p.closing = true
		r.mu.Unlock()
		r.write(methodOf(n, 20, 40, 1, 0x94, 4, 'g', 'o', 'n', 'e', 0, 0, 0, 0))
		return
	}
	if id == channelClose && !closing {
		p.forget() // before the answer, as rabbit_channel sees to
	}
	if id == basicAck {
		tag := binary.BigEndian.Uint64(frame[methodHead:])
		if i := slices.Index(p.unacked, tag); i >= 0 {
			p.unacked = slices.Delete(p.unacked, i, i+1)
			r.acked++
		} else if !closing {
			r.refuse("406: unknown delivery tag %d on %d", tag, n)
		}
	}
	r.mu.Unlock()
	switch {
	case id == channelClose:
		r.write(closeOkOf(n))
	case closing:
	case id == channelOpen:
		r.write(openOkOf(n))
	case id == queueDeclare:
		r.write(methodOf(n, 50, 11, 1, 'q', 0, 0, 0, 0, 0, 0, 0, 0))
	case id == basicQos:
		r.write(methodOf(n, 60, 11))
	case id == basicCancel:
		r.write(methodOf(n, 60, 31, frame[methodHead:methodHead+1+int(frame[methodHead])]...))
	case id == basicConsume:
		p.consume([]byte(consumerTag(frame)))
	}
}

func (p *process) consume(tag []byte) {
	tag = append([]byte{byte(len(tag))}, tag...)
	p.broker.write(methodOf(p.number, 60, 21, tag...))
	for range p.broker.deliveries {
		p.tag++
		p.broker.mu.Lock()
		p.unacked = append(p.unacked, p.tag)
		p.broker.mu.Unlock()
		args := binary.BigEndian.AppendUint64(slices.Clone(tag), p.tag)
		header := append(binary.BigEndian.AppendUint64([]byte{0, 60, 0, 0}, 8), 0, 0)
		p.broker.write(methodOf(p.number, 60, 60, append(args, 0, 0, 1, 'q')...), frameOf(frameHeader, p.number, header...))
		p.broker.write(frameOf(frameBody, p.number, 1, 2, 3, 4, 5))
		p.broker.write(frameOf(frameBody, p.number, 6, 7, 8))
	}
}

// with plays r to a driver on a socket, and ends both after test.
func (r *rabbit) with(t *testing.T, test func(s *Socket, conn *amqp.Connection)) {
	t.Helper()
	r.channels = make(map[uint16]*process)
	s, _, far := pipe(t, socketLimits)
	r.far = far
	played := make(chan struct{})
	go func() {
		defer close(played)
		r.run()
	}()
	go beat(s, far)
	conn, err := amqp.Open(s, amqp.Config{SASL: []amqp.Authentication{&amqp.PlainAuth{}}, Vhost: "/", Heartbeat: 10 * time.Second})
	require.NoError(t, err)
	test(s, conn)
	_ = conn.Close()
	s.Kill(nil)
	s.Wait()
	_ = far.Close()
	<-played
	assert.Empty(t, r.errors)
}

// opened is a channel that is claimed, and given up after limit if it does not open by then.
func opened(s *Socket, conn *amqp.Connection, limit time.Duration) (*Channel, *amqp.Channel, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	c, err := s.ClaimChannel(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer c.Release()
	defer time.AfterFunc(limit, func() { c.GiveUp(late.code, late.reason) }).Stop()
	channel, err := conn.Channel()
	return c, channel, err
}

// Whatever call hangs, its channel can be given up: the call returns what GiveUp says, the number is
// used again, and the other channel never notices.
func TestCallThatHangsEndsWithItsChannel(t *testing.T) {
	calls := map[string]struct {
		method uint32
		call   func(c *amqp.Channel) error
	}{
		"channel.open": {channelOpen, nil},
		"queue.declare": {queueDeclare, func(c *amqp.Channel) error {
			_, err := c.QueueDeclarePassive("q", true, false, false, false, nil)
			return err
		}},
		"basic.qos": {basicQos, func(c *amqp.Channel) error { return c.Qos(10, 0, false) }},
		"basic.consume": {basicConsume, func(c *amqp.Channel) error {
			_, err := c.Consume("q", "u", false, false, false, false, nil)
			return err
		}},
		"basic.cancel":  {basicCancel, func(c *amqp.Channel) error { return c.Cancel("t", false) }},
		"channel.close": {channelClose, func(c *amqp.Channel) error { return c.Close() }},
	}
	for name, c := range calls {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				hang := atomic.Int64{}
				r := &rabbit{channelMax: 2, deliveries: 3}
				r.hangs = func(method uint32) time.Duration {
					if method == c.method {
						return time.Duration(hang.Load())
					}
					return 0
				}
				r.with(t, func(s *Socket, conn *amqp.Connection) {
					_, other, err := opened(s, conn, time.Second)
					require.NoError(t, err)
					if c.call == nil {
						hang.Store(int64(time.Minute))
					}
					wire, channel, err := opened(s, conn, time.Second)
					if c.call != nil {
						require.NoError(t, err)
						hang.Store(int64(time.Minute))
						time.AfterFunc(time.Second, func() { wire.GiveUp(late.code, late.reason) })
						err = c.call(channel)
					}
					said := &amqp.Error{}
					require.ErrorAs(t, err, &said)
					assert.Equal(t, late, closeMethod{uint16(said.Code), said.Reason})
					assert.Equal(t, 1, s.GivenUp())
					hang.Store(0)

					_, err = other.QueueDeclarePassive("q", true, false, false, false, nil)
					require.NoError(t, err)
					_, again, err := opened(s, conn, 2*time.Minute) // the same number: there is no other
					require.NoError(t, err)
					assert.Zero(t, s.GivenUp())
					k := &kept{more: make(chan struct{}, 1)}
					sub := s.Subscribe("v", 10, k)
					_, err = again.Consume("q", "v", false, false, false, false, nil)
					require.NoError(t, err)
					for range 3 {
						require.NoError(t, sub.Ack(k.take().DeliveryTag))
					}
					require.NoError(t, again.Close())
					require.NoError(t, other.Close())
					require.False(t, conn.IsClosed())
				})
				assert.Equal(t, 3, r.acked)
			})
		})
	}
}

// Everything at random: what hangs, what the broker closes, and when a channel is given up, with
// fewer numbers than there are who want one. The broker takes nothing amiss, nothing is acked that
// is not the channel's own, and nothing is left in the end.
func TestChannelsAreGivenUpAtAnyTime(t *testing.T) {
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				chance := &dice{r: mathrand.New(mathrand.NewPCG(seed, 0))}
				r := &rabbit{channelMax: uint16(1 + seed%4), deliveries: 3}
				r.hangs = func(uint32) time.Duration {
					switch n := chance.upTo(20); n {
					case 0:
						return -1
					case 1, 2:
						return time.Duration(chance.upTo(20_000)) * time.Millisecond
					default:
						return time.Duration(n) * time.Millisecond
					}
				}
				r.with(t, func(s *Socket, conn *amqp.Connection) {
					var users sync.WaitGroup
					for user := range 4 {
						users.Go(func() {
							for round := range 15 {
								use(s, conn, fmt.Sprintf("%d-%d", user, round), chance)
							}
						})
					}
					users.Wait()
					time.Sleep(time.Hour)
					require.False(t, conn.IsClosed(), "%v", s.Cause())
					assert.Zero(t, s.GivenUp())
					assert.Empty(t, s.out.channels.numbers)
					r.mu.Lock()
					defer r.mu.Unlock()
					assert.Empty(t, r.channels)
				})
			})
		})
	}
}

// dice is chance for several goroutines.
type dice struct {
	mu sync.Mutex
	r  *mathrand.Rand
}

func (d *dice) upTo(n int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.r.IntN(n)
}

// use opens a channel, consumes, acks and closes, with limits that are too short at times.
func use(s *Socket, conn *amqp.Connection, tag string, chance *dice) {
	limit := func(c *Channel) *time.Timer {
		return time.AfterFunc(time.Duration(chance.upTo(5000))*time.Millisecond, func() { c.GiveUp(late.code, late.reason) })
	}
	c, channel, err := opened(s, conn, time.Duration(chance.upTo(3000))*time.Millisecond)
	if err != nil {
		time.Sleep(time.Duration(chance.upTo(100)) * time.Millisecond)
		return
	}
	k := &acker{}
	k.sub = s.Subscribe(tag, 10, k)
	defer k.sub.Forget()
	for _, call := range []func() error{
		func() error { return channel.Qos(10, 0, false) },
		func() error { _, err := channel.QueueDeclarePassive("q", true, false, false, false, nil); return err },
		func() error { _, err := channel.Consume("q", tag, false, false, false, false, nil); return err },
		func() error { time.Sleep(time.Duration(chance.upTo(50)) * time.Millisecond); return nil },
		func() error { return channel.Cancel(tag, false) },
		channel.Close,
	} {
		timer := limit(c)
		err := call()
		timer.Stop()
		if err != nil {
			break
		}
	}
	defer limit(c).Stop()
	_ = channel.Close()
}

// acker acks what it is given, on a goroutine of its own.
type acker struct{ sub *Subscription }

func (*acker) New() *amqp.Delivery                    { return new(amqp.Delivery) }
func (a *acker) Put(d *amqp.Delivery)                 { go func() { _ = a.sub.Ack(d.DeliveryTag) }() }
func (*acker) PutAside(*amqp.Delivery, uint64, error) {}
