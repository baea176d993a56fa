package behaviour_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// slowlyClosed dials connections whose Close takes a while. The real one is quick, but so may be
// Run: what ends a socket must have closed it before Run returns.
type slowlyClosed struct {
	dial  func(ctx context.Context, network, address string) (net.Conn, error)
	close func() // what Close waits for
	open  atomic.Int64
}

func (d *slowlyClosed) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := d.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	d.open.Add(1)
	return &rig.CountedConn{Conn: conn, Closed: sync.OnceFunc(func() {
		d.close()
		d.open.Add(-1)
	})}, nil
}

func TestRunReturnsAfterItsSocketsHaveClosedWhoeverClosesThem(t *testing.T) {
	// What happens before the stop, and what ends the socket then.
	stops := map[string]func(r *rig.Rig){
		"close": func(*rig.Rig) {},
		"read deadline": func(r *rig.Rig) { // seed 5365
			r.Wait(5 * time.Second)
			r.Broker.Stall()
			r.Wait(9 * time.Second) // it passes 15 s after the last byte
		},
		"reset":         func(r *rig.Rig) { time.AfterFunc(time.Millisecond, func() { r.Broker.Reset() }) },
		"fin":           func(r *rig.Rig) { time.AfterFunc(time.Millisecond, func() { r.Broker.FIN() }) },
		"close limit":   func(r *rig.Rig) { r.Broker.NoCloseOk(true) },
		"parked reader": func(r *rig.Rig) { r.Broker.StrayReply(true) },
		"setup given up": func(r *rig.Rig) {
			r.Broker.HangAt(steadymqtest.StageTune, true)
			r.Broker.Reset()
			r.Wait(time.Second)
		},
		"session given up": func(r *rig.Rig) {
			r.Broker.HangAt(steadymqtest.StageConsume, true)
			r.Broker.CancelConsumers(rig.Queue)
			r.Wait(time.Second)
		},
	}
	for name, before := range stops {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				sockets := &slowlyClosed{dial: r.Broker.Dialer(), close: func() { time.Sleep(100 * time.Millisecond) }}
				r.Consuming(rig.Ack, steadymq.WithDialer(sockets.DialContext))
				before(r)
				_ = r.Stop()
				assert.Zero(r, sockets.open.Load(), "no socket is open once Run has returned")
				assert.Zero(r, r.Consumer.Stats().Abandoned)
				r.Wait(time.Second)
			})
		})
	}
}

func TestConnectionThatNeverClosesHoldsUpNeitherHealingNorStop(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stuck := make(chan struct{})
		sockets := &slowlyClosed{dial: r.Broker.Dialer(), close: func() { <-stuck }}
		r.Consuming(rig.Ack, steadymq.WithDialer(sockets.DialContext))
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		since := time.Now()
		_ = r.Stop()
		assert.LessOrEqual(r, time.Since(since), 6*time.Second)
		assert.NotZero(r, r.Consumer.Stats().Abandoned)
		close(stuck)
		r.Wait(time.Second)
		assert.Zero(r, sockets.open.Load())
	})
}

// parkedWrites is a connection whose writes wait for its end once they are told to.
type parkedWrites struct {
	net.Conn
	park   atomic.Bool
	closed chan struct{}
	once   sync.Once
}

func (c *parkedWrites) Write(p []byte) (int, error) {
	if c.park.Load() {
		<-c.closed
	}
	return c.Conn.Write(p)
}

func (c *parkedWrites) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// The answer to a close of the broker may be stuck, and the write timeout is a heartbeat. A socket
// that is of no more use does not stay so long.
func TestConnectionThatTheBrokerClosesIsGoneAtTheCloseLimit(t *testing.T) {
	for _, limit := range []time.Duration{2 * time.Second, 5 * time.Second} {
		rig.Bubble(t, func(r *rig.Rig) {
			var first *parkedWrites
			r.Consuming(rig.Ack, steadymq.WithHeartbeat(time.Minute), steadymq.WithCloseTimeout(limit),
				steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
					conn, err := r.Broker.Dialer()(ctx, network, address)
					if err != nil || first != nil {
						return conn, err
					}
					first = &parkedWrites{Conn: conn, closed: make(chan struct{})}
					return first, nil
				}))
			first.park.Store(true)
			since := time.Now()
			r.Broker.CloseConnections(320, "CONNECTION_FORCED - shutdown")
			<-first.closed
			assert.InDelta(r, limit, time.Since(since), float64(50*time.Millisecond))
			r.Wait(time.Second)
			assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		})
	}
}

// What outlasts the limit of a stop is counted one by one, and nothing else: neither the connection
// that has closed in order, nor the prober, though both began to close after what hangs.
func TestEachTeardownThatOutlastsTheStopIsCounted(t *testing.T) {
	for hanging := range uint64(4) {
		t.Run(fmt.Sprint(hanging), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				stuck := make(chan struct{})
				var sockets, left atomic.Int64
				dial := func(ctx context.Context, network, address string) (net.Conn, error) {
					conn, err := r.Broker.Dialer()(ctx, network, address)
					if err != nil || sockets.Add(1) > int64(hanging) {
						return conn, err
					}
					return &rig.CountedConn{Conn: conn, Closed: sync.OnceFunc(func() { left.Add(1); <-stuck })}, nil
				}
				r.Consuming(rig.Ack, steadymq.WithDialer(dial), steadymq.WithStallDetector(time.Minute))
				for range hanging {
					r.Broker.Reset()
					r.Wait(20 * time.Second)
					require.Equal(r, steadymq.Consuming, r.Consumer.State())
				}
				require.EqualValues(r, hanging, left.Load())
				require.NoError(r, r.Stop())
				assert.Equal(r, hanging, r.Consumer.Stats().Abandoned)
				close(stuck)
				r.Wait(time.Second)
			})
		})
	}
}

// A connection that hangs in its Close hides nothing of a session that ended behind it.
func TestTeardownThatHangsHidesNoAcksThatMayBeLost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		stuck := make(chan struct{})
		var sockets atomic.Int64
		dial := func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := r.Broker.Dialer()(ctx, network, address)
			if err != nil || sockets.Add(1) > 1 {
				return conn, err
			}
			return &rig.CountedConn{Conn: conn, Closed: func() { <-stuck }}, nil
		}
		started, release := make(chan *steadymq.Delivery, 1), make(chan struct{})
		r.Consuming(rig.Hold(started, release), steadymq.WithDialer(dial), steadymq.WithConcurrency(2))
		r.Broker.Reset() // the first connection hangs from now on
		r.Wait(20 * time.Second)
		r.Broker.Publish(rig.Queue, "tea")
		<-started
		r.Broker.CancelConsumers(rig.Queue) // its handler may still settle, and does so while stopping
		r.Wait(time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		r.Broker.NoCloseOk(true) // what it acks is never confirmed
		r.Cancel()
		r.Wait(time.Second)
		close(release)
		err := r.Stop()
		assert.ErrorContains(r, err, "the last acks may be lost")
		assert.ErrorContains(r, err, "session 2", "also of the session that was cancelled")
		close(stuck)
		r.Wait(time.Second)
	})
}

func TestDialerThatReturnsNoConnectionIsAFailureThatSaysSo(t *testing.T) {
	for name, conn := range map[string]net.Conn{"nil": nil, "a nil pointer": (*net.TCPConn)(nil)} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Run(rig.Ack, steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return conn, nil }))
				r.Wait(time.Minute)
				require.Greater(r, len(r.Causes()), 1)
				assert.ErrorContains(r, r.Causes()[0], "WithDialer: the function returned neither a connection nor an error")
			})
		})
	}
}

func TestConnectionThatComesWithAnErrorIsClosed(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		sockets := &rig.CountingDialer{Dial: r.Broker.Dialer()}
		r.Run(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, _ := sockets.DialContext(ctx, network, address)
			var err *net.OpError
			return conn, err
		}))
		r.Wait(time.Minute)
		assert.Zero(r, sockets.Open.Load())
	})
}

// Functions of a connection.

// brittle is a connection whose methods do what a user's may.
type brittle struct {
	net.Conn
	read, write, shut func()
}

func (c *brittle) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.read()
	return n, err
}

func (c *brittle) Write(p []byte) (int, error) { c.write(); return c.Conn.Write(p) }

func (c *brittle) Close() error { defer c.shut(); return c.Conn.Close() }

func TestConnectionThatPanicsIsReplaced(t *testing.T) {
	for what, fault := range map[string]func(){"panic": func() { panic("user") }, "exit": runtime.Goexit} {
		for _, where := range []string{"Read", "Write", "Close"} {
			if where+what == "Closeexit" {
				continue
			}
			t.Run(where+", "+what, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					dials := 0
					r.Run(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
						dials++
						conn, err := r.Broker.Dialer()(ctx, network, address)
						if dials > 1 || err != nil {
							return conn, err
						}
						c := &brittle{conn, func() {}, func() {}, func() {}}
						map[string]func(){"Read": func() { c.read = fault }, "Write": func() { c.write = fault }, "Close": func() { c.shut = fault }}[where]()
						return c, nil
					}))
					r.Wait(5 * time.Second)
					r.Broker.Reset()
					r.Wait(time.Minute)
					assert.Equal(r, steadymq.Consuming, r.Consumer.State())
					assert.GreaterOrEqual(r, dials, 2)
					if where != "Close" {
						assert.ErrorAs(r, r.Causes()[0], new(*steadymq.PanicError))
					}
				})
			})
		}
	}
}

// TLS callbacks run in the handshake, and later while the driver reads.

// sessions is a cache that is asked in the handshake, and told after it.
type sessions struct{ put func() }

func (sessions) Get(string) (*tls.ClientSessionState, bool) { return nil, false }

func (s sessions) Put(string, *tls.ClientSessionState) { s.put() }

func TestTLSCallbackThatFailsLeavesNoSocket(t *testing.T) {
	for what, fault := range map[string]func(){"panics": func() { panic("user") }, "exits": runtime.Goexit} {
		for where, plant := range map[string]func(*tls.Config){
			"in the handshake": func(c *tls.Config) {
				c.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { fault(); return nil }
			},
			"later": func(c *tls.Config) { c.ClientSessionCache = sessions{fault} },
		} {
			t.Run(what+" "+where, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					sockets := &rig.CountingDialer{Dial: r.Broker.Dialer()}
					config := r.Broker.TLSConfig()
					plant(config)
					r.Run(rig.Ack, steadymq.WithDialer(sockets.DialContext), steadymq.WithTLSConfig(config))
					r.Wait(5 * time.Minute)
					require.Greater(r, len(r.Causes()), 1, "it goes on")
					var panicked *steadymq.PanicError
					require.ErrorAs(r, r.Causes()[0], &panicked)
					assert.ErrorContains(r, r.Causes()[0], "TLS")
					assert.LessOrEqual(r, sockets.Open.Load(), int64(1))
					r.Stop()
					assert.Zero(r, sockets.Open.Load(), "open sockets after Run")
				}, steadymqtest.WithTLS())
			})
		}
	}
}

func TestTLSCallbackThatHangsIsLeftBehindAndCounted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		var calls atomic.Int32 // no sync.Once: a second try that waited for its mutex would stop the clock
		hang := func() {
			if calls.Add(1) == 1 {
				<-release
			}
		}
		config := r.Broker.TLSConfig()
		config.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { hang(); return nil }
		r.Run(rig.Ack, steadymq.WithTLSConfig(config), steadymq.WithSetupTimeout(2*time.Second))
		r.Wait(2*time.Second + 450*time.Millisecond)
		assert.EqualValues(r, 1, r.Consumer.Stats().Abandoned)
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "WithTLSConfig")
		close(release)
		r.Wait(time.Minute)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	}, steadymqtest.WithTLS())
}
