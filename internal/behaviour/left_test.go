package behaviour_test

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// channelCounter counts what is open: sockets, and on them channels, by the frames that pass.
type channelCounter struct {
	rig.CountingDialer

	mu    sync.Mutex
	conns []*countedFrames
}

// watch has the consumers of r dial through the counter.
func watch(r *rig.Rig) *channelCounter {
	return &channelCounter{CountingDialer: rig.CountingDialer{Dial: r.Broker.Dialer()}}
}

func (c *channelCounter) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := c.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	counted := &countedFrames{Conn: conn, channels: make(map[uint16]bool)}
	counted.sent.skip = 8 // the protocol header
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns = append(c.conns, counted)
	return counted, nil
}

// open returns the open channels of each connection that has some.
func (c *channelCounter) open() (channels []int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		if n := conn.open(); n > 0 {
			channels = append(channels, n)
		}
	}
	return channels
}

type countedFrames struct {
	net.Conn

	mu         sync.Mutex
	sent, got  frames
	channels   map[uint16]bool
	closed     bool
	mostAtOnce int
}

func (c *countedFrames) open() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return 0
	}
	return len(c.channels)
}

func (c *countedFrames) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.got.add(p[:n], func(channel uint16, method uint32) {
		if method == 20<<16|41 { // channel.close-ok
			delete(c.channels, channel)
		}
	})
	return n, err
}

func (c *countedFrames) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.sent.add(p, func(channel uint16, method uint32) {
		switch method {
		case 20<<16 | 10: // channel.open
			c.channels[channel] = true
			c.mostAtOnce = max(c.mostAtOnce, len(c.channels))
		case 20<<16 | 41: // channel.close-ok
			delete(c.channels, channel)
		}
	})
	c.mu.Unlock()
	return c.Conn.Write(p)
}

func (c *countedFrames) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	return c.Conn.Close()
}

// frames reads the methods out of the bytes of one direction.
type frames struct {
	skip int
	rest []byte
}

func (f *frames) add(p []byte, method func(channel uint16, method uint32)) {
	n := min(f.skip, len(p))
	f.skip -= n
	f.rest = append(f.rest, p[n:]...)
	for len(f.rest) >= 7 {
		size := int(binary.BigEndian.Uint32(f.rest[3:])) + 8
		if len(f.rest) < size {
			return
		}
		if f.rest[0] == 1 {
			method(binary.BigEndian.Uint16(f.rest[1:]), binary.BigEndian.Uint32(f.rest[7:]))
		}
		f.rest = f.rest[size:]
	}
}

// nothingIsLeft stops the consumer and sees that nothing of it is left.
func nothingIsLeft(r *rig.Rig, c *channelCounter) {
	_ = r.Stop()
	assert.Empty(r, c.open(), "channels after Run")
	assert.Zero(r, c.Open.Load(), "sockets after Run")
	r.Wait(time.Minute)
	assert.Zero(r, r.OpenConnections(), "connections after Run")
	assert.Zero(r, rig.DriverGoroutines(), "goroutines after Run")
	assert.Zero(r, r.Broker.Unsettled(rig.Queue))
}

func TestSetUpsThatFailLeaveNothingOpen(t *testing.T) {
	for name, c := range map[string]struct {
		fault   func(r *rig.Rig, on bool)
		options []steadymq.Option
	}{
		"consume, no queue": {fault: func(r *rig.Rig, on bool) { refuseIf(on, r.Broker.RefuseConsume, 404, "no queue 'orders' in vhost '/'") }},
		"consume, no right": {fault: func(r *rig.Rig, on bool) {
			refuseIf(on, r.Broker.RefuseConsume, 403, "access to queue 'orders' in vhost '/' refused")
		}},
		"consume, locked":   {fault: func(r *rig.Rig, on bool) { refuseIf(on, r.Broker.RefuseConsume, 405, "locked") }},
		"consume, all ends": {fault: func(r *rig.Rig, on bool) { refuseIf(on, r.Broker.RefuseConsume, 530, "reached maximum") }},
		"virtual host": {fault: func(r *rig.Rig, on bool) {
			refuseIf(on, r.Broker.RefuseVhost, 530, "vhost / not found")
			r.Broker.Reset()
		}},
		"login": {fault: func(r *rig.Rig, on bool) { r.Broker.RefuseLogin(on); r.Broker.Reset() }},
		"declare": {fault: func(r *rig.Rig, on bool) {
			refuseIf(on, r.Broker.RefuseDeclare, 403, "access to queue 'orders' in vhost '/' refused")
		}, options: rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "classic"}))},
		"channel hangs":         {fault: func(r *rig.Rig, on bool) { r.Broker.HangAt(steadymqtest.StageChannel, on) }},
		"declare hangs":         {fault: func(r *rig.Rig, on bool) { r.Broker.HangAt(steadymqtest.StageDeclare, on) }, options: rig.Options(steadymq.WithQueue(steadymq.Queue{Type: "classic"}))},
		"qos hangs":             {fault: func(r *rig.Rig, on bool) { r.Broker.HangAt(steadymqtest.StageQos, on) }},
		"consume hangs":         {fault: func(r *rig.Rig, on bool) { r.Broker.HangAt(steadymqtest.StageConsume, on) }},
		"open hangs":            {fault: func(r *rig.Rig, on bool) { r.Broker.HangAt(steadymqtest.StageOpen, on); r.Broker.Reset() }},
		"channel is cut":        {fault: func(r *rig.Rig, on bool) { r.Broker.DropAt(steadymqtest.StageChannel, on) }},
		"qos is cut":            {fault: func(r *rig.Rig, on bool) { r.Broker.DropAt(steadymqtest.StageQos, on) }},
		"consume is cut":        {fault: func(r *rig.Rig, on bool) { r.Broker.DropAt(steadymqtest.StageConsume, on) }},
		"tune is cut":           {fault: func(r *rig.Rig, on bool) { r.Broker.DropAt(steadymqtest.StageTune, on); r.Broker.Reset() }},
		"the topology function": {fault: func(*rig.Rig, bool) {}, options: rig.Options(failingTopology())},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				counter := watch(r)
				r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
				r.Run(rig.Ack, append(c.options, steadymq.WithDialer(counter.dial), steadymq.WithSetupTimeout(2*time.Second))...)
				r.Wait(time.Second)
				c.fault(r, true)
				r.Broker.CancelConsumers(rig.Queue)
				for range 60 {
					r.Wait(time.Second)
					assert.LessOrEqual(r, len(counter.open()), 1)
					assert.LessOrEqual(r, counter.Open.Load(), int64(2), "one may be on its way out")
				}
				require.Greater(r, len(r.Causes()), 2)
				c.fault(r, false)
				r.Wait(time.Minute)
				require.Equal(r, steadymq.Consuming, r.Consumer.State())
				assert.Equal(r, []int{1}, counter.open(), "one channel on one connection")
				assert.EqualValues(r, 1, counter.Open.Load(), "sockets")
				for _, conn := range counter.conns {
					assert.LessOrEqual(r, conn.mostAtOnce, 2, "that of the cancelled session, and one more")
				}
				nothingIsLeft(r, counter)
			})
		})
	}
}

func refuseIf(on bool, refuse func(code int, text string), code int, text string) {
	if !on {
		code = 0
	}
	refuse(code, text)
}

// failingTopology fails from its second to its 20th call.
func failingTopology() steadymq.Option {
	var calls atomic.Int32
	return steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
		if n := calls.Add(1); n > 1 && n < 8 {
			return "", errors.New("not yet")
		}
		return rig.Queue, nil
	})
}

func TestQuestionsOfTheDetectorLeaveNothingOpen(t *testing.T) {
	for name, fault := range map[string]func(r *rig.Rig){
		"answered": func(*rig.Rig) {},
		"refused":  func(r *rig.Rig) { r.Broker.RefuseDeclare(403, "access to queue 'orders' in vhost '/' refused") },
		"of others, which are away": func(r *rig.Rig) {
			for i := range 3 {
				if i != r.HostInUse() {
					r.Broker.Host(i).Refuse(true)
				}
			}
		},
		"of others, which refuse": func(r *rig.Rig) {
			for i := range 3 {
				if i != r.HostInUse() {
					r.Broker.Host(i).RefuseDeclare(403, "access to queue 'orders' in vhost '/' refused")
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				counter := watch(r)
				r.Consuming(rig.Ack, steadymq.WithDialer(counter.dial), steadymq.WithStallDetector(10*time.Second))
				fault(r)
				for range 30 {
					r.Wait(10 * time.Second) // half way between two looks
					r.Wait(time.Second)
					require.Equal(r, []int{1}, counter.open())
					require.EqualValues(r, 1, counter.Open.Load())
					require.Equal(r, 1, r.OpenConnections())
				}
				assert.Empty(r, r.Causes())
				assert.EqualValues(r, 1, r.Consumer.Stats().Connections, "those of questions are not counted")
				nothingIsLeft(r, counter)
			}, steadymqtest.WithHosts(3))
		})
	}
}

// What a session that the broker has cancelled gives back, and when: what no handler has at once,
// what is held at once, what a handler has when it is done, or at the drain limit.
func TestRetiredSessionGivesBackAtOnceWhatNoHandlerHas(t *testing.T) {
	for name, takes := range map[string]time.Duration{"within the drain limit": 3 * time.Second, "beyond it": time.Minute} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				counter := watch(r)
				r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
					switch {
					case string(d.Body) == "held" && !d.Redelivered:
						return steadymq.RequeueAfter(nil, time.Hour)
					case d.Session() == 1:
						select {
						case <-time.After(takes):
						case <-ctx.Done():
						}
					}
					return nil
				}, steadymq.WithDialer(counter.dial), steadymq.WithDrainTimeout(5*time.Second), steadymq.WithConcurrency(1), steadymq.WithPrefetch(8))
				r.Broker.Publish(rig.Queue, "held", "runs", "waits 1", "waits 2")
				r.Wait(time.Second)
				require.Equal(r, 4, r.Broker.Unsettled(rig.Queue))
				r.Broker.RefuseConsume(404, "no queue 'orders' in vhost '/'") // nobody takes them
				r.Broker.CancelConsumers(rig.Queue)
				r.Wait(10 * time.Millisecond)
				assert.Equal(r, 3, r.Broker.QueueLen(rig.Queue), "held and waiting")
				assert.Equal(r, 1, r.Broker.Unsettled(rig.Queue), "with a handler")
				assert.Zero(r, r.Consumer.Stats().Held)
				rejects, nacks := 0, 0
				for _, s := range r.Broker.Ledger().Settlements {
					switch s.Kind {
					case steadymqtest.Reject:
						rejects++
					case steadymqtest.Nack:
						nacks++
					}
				}
				assert.Equal(r, []int{1, 2}, []int{rejects, nacks}, "failed, and never started")
				r.Wait(2 * time.Second)
				done := min(takes, 5*time.Second)
				if takes < 5*time.Second {
					assert.Equal(r, 1, r.Broker.Ledger().Count(rig.Queue, steadymqtest.Acked))
				} else {
					assert.Equal(r, 1, r.Broker.Unsettled(rig.Queue))
					r.Wait(done - 2*time.Second + 100*time.Millisecond)
					assert.Equal(r, 4, r.Broker.QueueLen(rig.Queue), "at the drain limit it goes back")
				}
				r.Broker.RefuseConsume(0, "")
				r.Wait(10 * time.Second)
				assert.Zero(r, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
				assert.Equal(r, []int{1}, counter.open())
				assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
				nothingIsLeft(r, counter)
			})
		})
	}
}

// A try that was left behind comes back late, with a session of its own.
func TestLateTryLeavesNothingOpen(t *testing.T) {
	for name, end := range map[string]func(r *rig.Rig){
		"on a connection of its own":     func(r *rig.Rig) { r.Broker.Reset() },
		"on that of the cancelled first": func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				counter := watch(r)
				release := make(chan struct{})
				var calls atomic.Int32
				r.Consuming(rig.Ack, steadymq.WithDialer(counter.dial), steadymq.WithSetupTimeout(2*time.Second), quick,
					steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
						if n := calls.Add(1); n == 2 || n == 3 {
							<-release
						}
						return rig.Queue, nil
					}))
				end(r)
				r.Wait(20 * time.Second)
				require.Equal(r, steadymq.Consuming, r.Consumer.State())
				assert.EqualValues(r, 2, r.Consumer.Stats().Abandoned)
				close(release)
				r.Wait(20 * time.Second)
				assert.Equal(r, []int{1}, counter.open())
				assert.EqualValues(r, 1, counter.Open.Load())
				assert.Len(r, r.Broker.Consumers(rig.Queue), 1)
				assert.EqualValues(r, 2, r.Consumer.Stats().Sessions)
				nothingIsLeft(r, counter)
			})
		})
	}
}
