package wire

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"
)

var socketLimits = Options{
	IdleTimeout:  20 * time.Second,
	WriteTimeout: 10 * time.Second,
	WriteDelay:   time.Millisecond,
}

// faultyConn is the connection under a socket: it counts writes and can fail, cut and stop them.
type faultyConn struct {
	net.Conn
	mu     sync.Mutex
	sizes  []int
	broken error           // what the next writes return
	cut    *mathrand.Rand  // takes random parts of each write
	linger bool            // SetLinger(0) was called
	gate   <-chan struct{} // writes wait for it
}

func (w *faultyConn) Write(p []byte) (int, error) {
	w.mu.Lock()
	broken, gate := w.broken, w.gate
	w.sizes = append(w.sizes, len(p))
	if w.cut != nil && len(p) > 0 {
		p = p[:1+w.cut.IntN(len(p))]
	}
	w.mu.Unlock()
	if gate != nil {
		<-gate
	}
	if broken != nil {
		return 0, broken
	}
	return w.Conn.Write(p)
}

func (w *faultyConn) SetLinger(int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.linger = true
	return nil
}

func (w *faultyConn) writes() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.sizes)
}

// pipe returns a socket on an in-memory connection without buffers, and its peer's end: a peer that
// does not read is a zero window.
func pipe(t *testing.T, o Options) (*Socket, *faultyConn, net.Conn) {
	t.Helper()
	near, far := net.Pipe()
	w := &faultyConn{Conn: near}
	s := NewSocket(w, o)
	s.WatchPeer()
	t.Cleanup(func() {
		s.Kill(nil)
		s.Wait()
		_ = far.Close()
	})
	return s, w, far
}

// inBubble runs test in virtual time. The bubble fails if a goroutine stays.
func inBubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, test)
}

func frameOf(typ byte, channel uint16, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{typ}, channel)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(append(b, payload...), frameEnd)
}

func methodOf(channel, class, method uint16, args ...byte) []byte {
	id := binary.BigEndian.AppendUint16(nil, class)
	id = binary.BigEndian.AppendUint16(id, method)
	return frameOf(frameMethod, channel, append(id, args...)...)
}

func ackOf(tag uint64) []byte {
	return methodOf(1, 60, 80, append(binary.BigEndian.AppendUint64(nil, tag), 0)...)
}

func headerOf(size uint64) []byte {
	p := binary.BigEndian.AppendUint64([]byte{0, 60, 0, 0}, size)
	return frameOf(frameHeader, 1, append(p, 0, 0)...)
}

func deliveryOf(tag uint64, body []byte) []byte {
	args := binary.BigEndian.AppendUint64([]byte{1, 't'}, tag)
	b := methodOf(1, 60, 60, append(args, 0, 0, 1, 'q')...)
	b = append(b, headerOf(uint64(len(body)))...)
	if len(body) > 0 {
		b = append(b, frameOf(frameBody, 1, body...)...)
	}
	return b
}

var heartbeatFrame = frameOf(frameBeat, 0)

// consumed is a subscription and what came of it.
type consumed struct {
	*Subscription
	*kept
}

// kept is a Receiver that keeps all.
type kept struct {
	more chan struct{} // has a value once there is something

	mu    sync.Mutex
	all   []*amqp.Delivery
	aside []unfit
}

// unfit is a message that no handler can be given.
type unfit struct {
	delivery *amqp.Delivery
	size     uint64
	err      error
}

func (k *kept) New() *amqp.Delivery { return new(amqp.Delivery) }

func (k *kept) Put(d *amqp.Delivery) {
	k.mu.Lock()
	k.all = append(k.all, d)
	k.mu.Unlock()
	select {
	case k.more <- struct{}{}:
	default:
	}
}

func (k *kept) PutAside(d *amqp.Delivery, size uint64, reason error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.aside = append(k.aside, unfit{d, size, reason})
}

// take waits for the next one.
func (k *kept) take() *amqp.Delivery {
	for {
		k.mu.Lock()
		if len(k.all) > 0 {
			d := k.all[0]
			k.all = k.all[1:]
			k.mu.Unlock()
			return d
		}
		k.mu.Unlock()
		<-k.more
	}
}

// count is how many wait.
func (k *kept) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.all)
}

var errTooLarge = errors.New("too large")

// atMost refuses larger bodies.
func atMost(limit uint64) func(uint64) error {
	return func(size uint64) error {
		if size <= limit {
			return nil
		}
		return errTooLarge
	}
}

// openSubscription is the subscription of consumer t on a channel, as if the driver had just
// written its basic.consume.
func openSubscription(s *Socket, channel uint16, prefetch int) *consumed {
	k := &kept{more: make(chan struct{}, 1)}
	sub := &consumed{s.Subscribe("t", prefetch, k), k}
	s.out.mu.Lock()
	defer s.out.mu.Unlock()
	s.out.subscriptions.learn(consumeFrame(channel, "t"))
	return sub
}

// consumer is a socket with a driver that reads and a subscription on channel 1.
func consumer(t *testing.T, o Options, prefetch int) (*consumed, *faultyConn, net.Conn) {
	t.Helper()
	s, w, far := pipe(t, o)
	go func() { _, _ = io.Copy(io.Discard, s) }()
	return openSubscription(s, 1, prefetch), w, far
}

// deliver returns once n deliveries have reached their subscription, in a bubble.
func deliver(t *testing.T, far net.Conn, n int) {
	t.Helper()
	var b []byte
	for tag := range n {
		b = append(b, deliveryOf(uint64(tag+1), []byte("body"))...)
	}
	_, err := far.Write(b)
	require.NoError(t, err)
	synctest.Wait()
}

// collect reads all that arrives at far.
func collect(far net.Conn) *sink {
	k := &sink{ended: make(chan struct{})}
	go func() {
		defer close(k.ended)
		buf := make([]byte, 4096)
		for {
			n, err := far.Read(buf)
			k.mu.Lock()
			k.b = append(k.b, buf[:n]...)
			k.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return k
}

type sink struct {
	mu    sync.Mutex
	b     []byte
	ended chan struct{}
}

func (k *sink) bytes() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return bytes.Clone(k.b)
}

// broker plays the broker's half of the driver's handshake on far, answers what a consumer asks,
// and hands over the stream then.
func broker(far net.Conn) error {
	if _, err := io.ReadFull(far, make([]byte, 8)); err != nil {
		return err
	}
	long := func(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }
	start := append([]byte{0, 9, 0, 0, 0, 0}, append(long("PLAIN"), long("en_US")...)...)
	if _, err := far.Write(methodOf(0, 10, 10, start...)); err != nil {
		return err
	}
	replies := map[uint32][]byte{
		10<<16 | 11: methodOf(0, 10, 30, 0x07, 0xff, 0, 2, 0, 0, 0, 60),
		10<<16 | 40: methodOf(0, 10, 41, 0),
		20<<16 | 10: methodOf(1, 20, 11, 0, 0, 0, 0),
	}
	for {
		id, err := readMethod(far)
		if err != nil {
			return err
		}
		if _, err := far.Write(replies[id]); err != nil {
			return err
		}
		if id == 10<<16|40 {
			return nil
		}
	}
}

// readMethod returns the class and method of the next frame, 0 of a heartbeat.
func readMethod(r io.Reader) (uint32, error) {
	head := make([]byte, frameHead)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, err
	}
	payload := make([]byte, binary.BigEndian.Uint32(head[3:])+1)
	if _, err := io.ReadFull(r, payload); err != nil || head[0] != frameMethod {
		return 0, err
	}
	return binary.BigEndian.Uint32(payload), nil
}

// open opens the driver on s against broker.
func open(t *testing.T, s *Socket, far net.Conn) *amqp.Connection {
	t.Helper()
	return openWith(t, s, far, 0)
}

// openWith lets the driver use so many channels at a time, 0 for as many as it likes.
func openWith(t *testing.T, s *Socket, far net.Conn, channelMax uint16) *amqp.Connection {
	t.Helper()
	played := make(chan error, 1)
	go func() { played <- broker(far) }()
	conn, err := amqp.Open(s, amqp.Config{
		SASL:       []amqp.Authentication{&amqp.PlainAuth{Username: "guest", Password: "guest"}},
		Vhost:      "/",
		ChannelMax: channelMax,
		Heartbeat:  10 * time.Second,
	})
	require.NoError(t, err)
	require.NoError(t, <-played)
	return conn
}

// beat writes a heartbeat to w every 5 s until s ends.
func beat(s *Socket, w io.Writer) {
	ticker := time.NewTicker(5 * time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-s.Done():
			return
		case <-ticker.C:
			_, _ = w.Write(heartbeatFrame)
		}
	}
}

func slicesOf(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// tcpPair returns both ends of a real connection.
func tcpPair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	near, err = DefaultDial(5*time.Second, 0)(t.Context(), "tcp", listener.Addr().String())
	require.NoError(t, err)
	far, err = listener.Accept()
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = near.Close()
		_ = far.Close()
	})
	return near, far
}

// certificates returns the configs of a server at 127.0.0.1 and of its client.
func certificates(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: roots}
}

// messageOf is a delivery with the given properties, flags first, in the frames of its body.
func messageOf(channel uint16, tag uint64, properties []byte, bodies ...string) []byte {
	size := 0
	for _, b := range bodies {
		size += len(b)
	}
	args := binary.BigEndian.AppendUint64([]byte{1, 't'}, tag)
	args = append(args, 1, 1, 'x', 3, 'k', 'e', 'y') // redelivered, exchange x, routing key key
	frames := methodOf(channel, 60, 60, args...)
	header := binary.BigEndian.AppendUint64([]byte{0, 60, 0, 0}, uint64(size))
	frames = append(frames, frameOf(frameHeader, channel, append(header, properties...)...)...)
	for _, b := range bodies {
		frames = append(frames, frameOf(frameBody, channel, []byte(b)...)...)
	}
	return frames
}

// sorted lets a socket with a subscription of consumer t on channel 1 read stream in pieces. It
// returns what the driver gets, what the receiver gets, and why the socket ended.
func sorted(t testing.TB, stream []byte, limit uint64, piece func(left int) int) (driver []byte, deliveries []amqp.Delivery, cause error) {
	driver, deliveries, _, cause = sortedAll(t, stream, limit, piece)
	return driver, deliveries, cause
}

// sortedAll also returns what no handler could be given.
func sortedAll(t testing.TB, stream []byte, limit uint64, piece func(left int) int) (driver []byte, deliveries []amqp.Delivery, aside []unfit, cause error) {
	ours, theirs := net.Pipe()
	o := Options{}
	if limit > 0 {
		o.Refuse = atMost(limit)
	}
	s := NewSocket(ours, o)
	defer s.Wait()
	defer s.Kill(nil)
	sub := openSubscription(s, 1, 1)
	go func() {
		for len(stream) > 0 {
			n := piece(len(stream))
			if _, err := theirs.Write(stream[:n]); err != nil {
				return
			}
			stream = stream[n:]
		}
		_ = theirs.Close()
	}()
	buf := make([]byte, 100)
	for {
		n, err := s.Read(buf)
		driver = append(driver, buf[:n]...)
		if err != nil {
			break
		}
	}
	for _, d := range sub.all {
		deliveries = append(deliveries, *d)
	}
	return driver, deliveries, sub.aside, s.Cause()
}

func whole(left int) int { return left }

// methodFrame is a frame as the driver writes it.
func methodFrame(channel uint16, id uint32, payload ...byte) []byte {
	p := binary.BigEndian.AppendUint16([]byte{frameMethod}, channel)
	p = binary.BigEndian.AppendUint32(p, uint32(4+len(payload)))
	p = binary.BigEndian.AppendUint32(p, id)
	return append(append(p, payload...), frameEnd)
}

func consumeFrame(channel uint16, tag string) []byte {
	payload := append([]byte{0, 0, 1, 'q', byte(len(tag))}, tag...)
	return methodFrame(channel, basicConsume, append(payload, 0, 0, 0, 0, 0)...)
}

// onSocket runs test with a socket whose peer keeps what it reads.
func onSocket(t *testing.T, test func(s *Socket, written func() []byte)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		s := NewSocket(ours, Options{WriteTimeout: time.Second})
		got := make(chan []byte, 1)
		go func() {
			all, _ := io.ReadAll(theirs)
			got <- all
		}()
		test(s, func() []byte {
			_ = s.Close()
			s.Wait()
			return <-got
		})
	})
}
