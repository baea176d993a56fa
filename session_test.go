package steadymq

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/big"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/wire"
)

// The driver reports the broker's connection.close before its close-ok is on the wire, and holds
// its mutex until then. Closing the socket at once would lose the close-ok. Waiting for the mutex
// would stop the clock of the bubble.
func TestBrokersCloseIsAnsweredHoweverSlowlyItReads(t *testing.T) {
	still := time.AfterFunc(20*time.Second, func() { panic("time stands still: a goroutine waits for the driver's mutex") })
	defer still.Stop()
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		c := defaults("amqp://guest:guest@mq.example/", "q")
		c.dial = func(context.Context, string, string) (net.Conn, error) { return near, nil }
		e, err := parseEndpoint(c.urls[0])
		require.NoError(t, err)
		played := make(chan error, 1)
		go func() { played <- broker(far) }()
		conn, err := openConnection(t.Context(), c, e, newStep("dial"), func() {})
		require.NoError(t, err)
		require.NoError(t, <-played)

		_, err = far.Write(methodOf(0, 10, 50, 1, 0x40, 3, 'b', 'y', 'e', 0, 0, 0, 0))
		require.NoError(t, err)
		time.Sleep(time.Second)
		brokerErr, err := io.ReadAll(far)
		require.NoError(t, err)
		<-conn.done

		assert.Equal(t, methodOf(0, 10, 51), brokerErr)
		assert.ErrorContains(t, conn.end.Cause(), "bye")
	})
}

// The frames of AMQP 0-9-1 are built and read here by other code than the library's.

func frameOf(typ byte, channel uint16, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{typ}, channel)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(append(b, payload...), 0xCE)
}

func methodOf(channel, class, method uint16, args ...byte) []byte {
	id := binary.BigEndian.AppendUint16(nil, class)
	id = binary.BigEndian.AppendUint16(id, method)
	return frameOf(1, channel, append(id, args...)...)
}

func deliveryOf(tag uint64, body []byte) []byte {
	args := binary.BigEndian.AppendUint64([]byte{1, 't'}, tag)
	b := methodOf(1, 60, 60, append(args, 0, 0, 1, 'q')...)
	b = append(b, frameOf(2, 1, append(binary.BigEndian.AppendUint64([]byte{0, 60, 0, 0}, uint64(len(body))), 0, 0)...)...)
	if len(body) > 0 {
		b = append(b, frameOf(3, 1, body...)...)
	}
	return b
}

// broker plays the broker's half of the driver's handshake on far, answers what a consumer asks,
// and then hands over the stream.
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
	head := make([]byte, 7)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, err
	}
	payload := make([]byte, binary.BigEndian.Uint32(head[3:])+1)
	if _, err := io.ReadFull(r, payload); err != nil || head[0] != 1 {
		return 0, err
	}
	return binary.BigEndian.Uint32(payload), nil
}

var socketLimits = wire.Options{
	IdleTimeout:  20 * time.Second,
	WriteTimeout: 10 * time.Second,
	WriteDelay:   time.Millisecond,
}

// heartbeat is a whole heartbeat frame (AMQP 0-9-1, 4.2.7).
var heartbeat = []byte{8, 0, 0, 0, 0, 0, 0, 0xCE}

func TestOpenSocketEndsWithItsContext(t *testing.T) {
	reason := errors.New("setup limit")
	limited := func(t *testing.T) context.Context {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 15*time.Second, reason)
		t.Cleanup(cancel)
		return ctx
	}
	t.Run("TLS peer that stops in its handshake", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			near, far := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, far) }()
			began := time.Now()
			_, err := openSocket(limited(t), dialTo(near), "mq.example:5671", &tls.Config{}, socketLimits, func() {})
			assert.ErrorIs(t, err, reason)
			assert.Equal(t, 15*time.Second, time.Since(began))
			_, err = near.Write([]byte{0})
			assert.ErrorIs(t, err, io.ErrClosedPipe, "nothing stays open")
		})
	})
	t.Run("dial that hangs", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			began := time.Now()
			_, err := openSocket(limited(t), dial, "mq.example:5672", nil, socketLimits, func() {})
			assert.ErrorIs(t, err, reason)
			assert.Equal(t, 15*time.Second, time.Since(began))
		})
	})
	t.Run("dial that fails", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			refused := errors.New("connection refused")
			dial := func(context.Context, string, string) (net.Conn, error) { return nil, refused }
			_, err := openSocket(limited(t), dial, "mq.example:5672", nil, socketLimits, func() {})
			assert.Equal(t, refused, err, "ctx has nothing to do with it")
		})
	})
}

func dialTo(conn net.Conn) wire.DialFunc {
	return func(context.Context, string, string) (net.Conn, error) { return conn, nil }
}

func TestTLSOnARealSocket(t *testing.T) {
	server, client := certificates(t)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", server)
	require.NoError(t, err)
	defer listener.Close()
	echoed := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			echoed <- err
			return
		}
		defer conn.Close()
		_, err = io.Copy(conn, conn) // nil only if the client says goodbye
		echoed <- err
	}()

	s, err := openSocket(t.Context(), wire.DefaultDial(5*time.Second, 15*time.Second), listener.Addr().String(), client, socketLimits, func() {})
	require.NoError(t, err)
	assert.Empty(t, client.ServerName, "the caller's config is not touched")
	sent := bytes.Repeat(heartbeat, 20_000)
	go func() { _, _ = s.Write(sent) }()
	got := make([]byte, len(sent))
	_, err = io.ReadFull(s, got)
	require.NoError(t, err)
	assert.True(t, bytes.Equal(sent, got))
	require.NoError(t, s.Close())
	require.NoError(t, <-echoed)
	s.Wait()
}

func TestTLSRefusedSaysWhy(t *testing.T) {
	server, client := certificates(t)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", server)
	require.NoError(t, err)
	defer listener.Close()
	refused := make(chan struct{})
	go func() {
		defer close(refused)
		if conn, err := listener.Accept(); err == nil {
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}
	}()
	client.ServerName = "another.example"
	_, err = openSocket(t.Context(), wire.DefaultDial(5*time.Second, 0), listener.Addr().String(), client, socketLimits, func() {})
	var invalid *tls.CertificateVerificationError
	assert.ErrorAs(t, err, &invalid)
	<-refused
}

func TestTLSSpokenToAPortWithoutItSaysSo(t *testing.T) {
	for answer, says := range map[string]string{
		"AMQP\x00\x00\x09\x01":     "AMQP without TLS",
		"HTTP/1.1 400 Bad Request": "check host and port",
	} {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			if conn, err := listener.Accept(); err == nil {
				_, _ = conn.Write([]byte(answer))
				_, _ = io.Copy(io.Discard, conn)
				_ = conn.Close()
			}
		}()
		_, err = openSocket(t.Context(), wire.DefaultDial(5*time.Second, 0), listener.Addr().String(), &tls.Config{}, socketLimits, func() {})
		var record tls.RecordHeaderError
		assert.ErrorAs(t, err, &record)
		assert.ErrorContains(t, err, says)
		<-answered
		require.NoError(t, listener.Close())
	}
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

func TestURLThatIsReadIsDialledAtItsHost(t *testing.T) {
	for text, want := range map[string]string{"amqp://host": "host:5672", "amqps://u:p@[2001:db8::1]/v": "[2001:db8::1]:5671"} {
		e, err := parseEndpoint(text)
		require.NoError(t, err)
		assert.Equal(t, want, e.address)
	}
}

// An operator may mend what a function gives, and New says which URL is wrong.
func TestURLThatIsRefusedIsForAnOperator(t *testing.T) {
	for text, want := range map[string]string{
		"amqp://user:Xq9z@Xq9z@host": "the URL has an unescaped @ in user or password",
		"amqp://host?heartbeat=0":    "the parameter heartbeat of the URL must be 1 to 600",
		"amqp://host?channel_max=x":  "the parameter channel_max of the URL must be 0 to 65535",
		"":                           "the URL is empty: want amqp:// or amqps://user:password@host:port/vhost, or WithURLFunc",
	} {
		e, err := parseEndpoint(text)
		require.Error(t, err, text)
		assert.Zero(t, e, text)
		assert.Equal(t, classOperator, classify(&SessionError{Op: "dial", Err: err}), text)
		_, err = New("amqp://host", "q", WithURLs("amqp://other", text))
		assert.ErrorContains(t, err, "steadymq: WithURLs: URL 2: "+want, text)
	}
}

func TestURLsMechanismsCountInAnyCase(t *testing.T) {
	e, err := parseEndpoint("amqps://u:p@h?auth_mechanism=External&auth_mechanism=AMQPLAIN&auth_mechanism=plain")
	require.NoError(t, err)
	var names []string
	for _, a := range e.login(nil) {
		names = append(names, a.Mechanism())
	}
	assert.Equal(t, []string{"EXTERNAL", "AMQPLAIN", "PLAIN"}, names)
}

func TestEachURLHasItsOwnHeartbeatAndDialTimeout(t *testing.T) {
	urls := []string{"amqp://a?heartbeat=2&connection_timeout=1500", "amqp://b?heartbeat=60", "amqp://c"}
	limits := func(opts ...Option) (all [][2]time.Duration) {
		c, err := build(urls[0], "q", append(opts, WithURLs(urls[1:]...)))
		require.NoError(t, err)
		for _, e := range newHosts(c).endpoints {
			assert.Equal(t, 2*c.heartbeatOf(e), socketOptions(c, e).IdleTimeout)
			all = append(all, [2]time.Duration{amqpConfig(c, e).Heartbeat, c.dialTimeoutOf(e)})
		}
		return all
	}
	const s = time.Second
	assert.Equal(t, [][2]time.Duration{{2 * s, 3 * s / 2}, {60 * s, 5 * s}, {10 * s, 5 * s}}, limits())
	assert.Equal(t, [][2]time.Duration{{7 * s, s}, {7 * s, s}, {7 * s, s}}, limits(WithHeartbeat(7*s), WithDialTimeout(s)), "the options come first")
}

func TestURLAndOptionsThatContradictAreRefused(t *testing.T) {
	secure := "amqps://u:p@h?"
	for _, c := range []struct {
		url, want string
		opt       Option
	}{
		{"amqp://u:p@h", "WithTLSConfig: the URL has the scheme amqp, which is not encrypted; use amqps", WithTLSConfig(new(tls.Config))},
		{secure + "cacertfile=/ca", "WithTLSConfig: takes the place of cacertfile", WithTLSConfig(new(tls.Config))},
		{secure + "certfile=/c&keyfile=/k", "WithTLSConfig: takes the place of cacertfile", WithTLSConfig(new(tls.Config))},
		{secure + "server_name_indication=x", "WithTLSConfig: takes the place of cacertfile", WithTLSConfig(new(tls.Config))},
		{secure + "auth_mechanism=plain", "WithSASL: takes the place of auth_mechanism", WithSASL(&amqp.ExternalAuth{})},
		{secure + "auth_mechanism=plain", "WithCredentials: logs in by the mechanism PLAIN", WithCredentials(func(context.Context) (Credentials, error) { return Credentials{}, nil })},
	} {
		_, err := New(c.url, "q", c.opt)
		assert.ErrorContains(t, err, c.want, c.url)
		_, err = New("amqps://h", "q", c.opt, WithURLs(c.url))
		assert.ErrorContains(t, err, "URL 1 of WithURLs", c.url)
	}
}

func TestPortIsNamedHoweverThePeerEnds(t *testing.T) {
	e := endpoint{uri: amqp.URI{Scheme: "amqp", Port: 15672}}
	for _, end := range []error{
		io.EOF, io.ErrUnexpectedEOF, wire.ErrPeerReset, syscall.ECONNRESET, errSetupTimeout,
		&wire.NotAMQPError{First: 'H'},
		tls.RecordHeaderError{},
	} {
		assert.ErrorAs(t, namePort(e, end), new(*wrongPortError), "%v", end)
	}
	assert.NotErrorAs(t, namePort(e, syscall.ECONNREFUSED), new(*wrongPortError))
}

// The one that has asked leaves the connection to one that waits, and that may give up at that moment.
func TestConnectionForQuestionsIsClosedByWhoLeavesLast(t *testing.T) {
	cs := newConnections(new(config), new(counters))
	c := &connection{amqp: new(amqp.Connection), end: newNotifier(), stop: make(chan closeRequest, 1), done: make(chan struct{})}
	close(c.done)
	i := cs.inquiry("host")
	require.Same(t, i, cs.inquiry("host"))
	i.conn = c
	i.closeIfDead()
	cs.forget("host", i)
	require.False(t, c.stopped)
	cs.forget("host", i)
	require.True(t, c.stopped)
	require.Empty(t, cs.inquiries)
}

func TestPlaceByTheClockAllowsForClocksThatDiffer(t *testing.T) {
	since := time.Unix(1_700_000_000, 0)
	for name, test := range map[string]struct {
		since time.Time
		want  time.Time
	}{
		"now":              {since, since.Add(-5 * time.Minute)},
		"before 1970":      {since.Add(-math.MaxInt64), time.Unix(0, 0)}, // AMQP has no such time
		"soon after 1970":  {time.Unix(60, 0), time.Unix(0, 0)},
		"an hour earlier":  {since.Add(-interval("1h")), since.Add(-65 * time.Minute)},
		"as last stands":   {since.Add(-interval("last")), since.Add(-5 * time.Minute)},
		"an age too large": {since.Add(-interval("99999999Y")), time.Unix(0, 0)},
	} {
		p := new(position)
		p.assume(test.since)
		assert.Equal(t, amqp.Table{offsetKey: test.want}, p.resume(1, nil, false), name)
		assert.NoError(t, p.resume(1, nil, false).Validate())
	}
}

func TestIntervalsAreThoseOfRabbitMQ(t *testing.T) {
	const day = 24 * time.Hour
	for text, want := range map[any]time.Duration{
		"1s": time.Second, "90s": 90 * time.Second, "2m": 2 * time.Minute, "1h": time.Hour, "3D": 3 * day, "1M": 30 * day, "1Y": 365 * day,
		"0h": 0, "": 0, "h": 0, "last": 0, "1": 0, "1H": 0, "1.5h": 0, "-1h": 0, "+1h": 0, nil: 0, 5: 0,
		"99999999999999999999h": 0, // no broker takes it
	} {
		assert.Equal(t, want, interval(text), text)
	}
	assert.GreaterOrEqual(t, interval("9000Y"), 290*365*day)
}

// A stream may hold more than a slow path carries within the setup limit.
func TestPlaceThatIsCutOffAgainAndAgainIsTakenFromTheClock(t *testing.T) {
	for given, want := range map[any]int{"last": maxLookups, "next": 1, "1h": 1, nil: 1, "first": 0, 5: 0} {
		p, looks := new(position), 0
		for range 5 {
			if _, unclear := p.needsLookup("log", given); unclear {
				looks++
				_ = p.assume(time.Now())
			}
		}
		assert.Equal(t, want, looks, given)
	}
}

func streamAt(tag uint64, offset int64) *Delivery {
	d := newDelivery()
	d.DeliveryTag, d.Headers = tag, amqp.Table{offsetKey: offset}
	d.fence.tag = tag
	return d
}

// With x-stream-filter the offsets of the deliveries have gaps. Workers begin in any order.
func TestPlaceIsThatOfTheFirstMessageThoughAFilterLeavesGaps(t *testing.T) {
	p := &position{settled: newWatermark(), acked: newWatermark()}
	p.resume(1, amqp.Table{offsetKey: "first"}, false)
	p.subscribed("first")
	p.began(1, streamAt(2, 100))
	p.began(1, streamAt(1, 0))
	assert.LessOrEqual(t, p.resume(2, nil, false)[offsetKey], int64(0))
}

// The answer to the lookup of an abandoned try may arrive when its successor has subscribed.
func TestLateRefusalOfALookLeavesThePlaceOfALaterSession(t *testing.T) {
	p := &position{settled: newWatermark(), acked: newWatermark()}
	p.needsLookup("s", "next")
	answered := p.assume(time.Now())
	p.needsLookup("s", "next")
	from := p.resume(2, nil, false)[offsetKey]
	p.subscribed(from)
	_ = answered(&amqp.Error{Code: 541, Server: true})
	assert.Equal(t, from, p.resume(3, nil, false)[offsetKey])
}

// hireNobody is for an inbox whose workers are there already.
func hireNobody() bool { return true }

func TestMoreThanThePrefetchIsKept(t *testing.T) {
	box := newInbox(2, hireNobody)
	to := &receiver{inbox: box, aside: newAside(), config: defaults("amqp://h/", "q")}
	for tag := range uint64(100) { // a stream's chunk
		d := to.New()
		d.DeliveryTag = tag + 1
		to.Put(d)
	}
	for tag := range uint64(100) {
		d, ok := box.take()
		require.True(t, ok)
		require.Equal(t, tag+1, d.DeliveryTag, "in order")
	}
}

// An inbox has room for what has come so far, not for all that the prefetch lets come.
func TestInboxGrowsWithWhatWaitsInIt(t *testing.T) {
	const prefetch = 1000
	box := newInbox(prefetch, hireNobody)
	assert.LessOrEqual(t, cap(box.last.waiting), 32, "an idle one is small")
	var last *stretch
	for burst := range 4 {
		for range prefetch {
			box.put(&Delivery{})
		}
		assert.Equal(t, prefetch, box.waiting())
		for range prefetch {
			_, _ = box.take()
		}
		box.put(&Delivery{})
		_, _ = box.take()
		assert.Zero(t, box.waiting())
		assert.Same(t, box.last, box.first.Load(), "those before the last one are gone")
		assert.LessOrEqual(t, cap(box.last.waiting), prefetch)
		if burst > 1 {
			assert.Same(t, last, box.last, "it is long enough, and grows no more")
		}
		last = box.last
	}
}

func TestOneWorkerTakesInOrderWhileTheInboxGrows(t *testing.T) {
	box := newInbox(64, hireNobody)
	go func() {
		for tag := range uint64(20_000) {
			d := &Delivery{}
			d.DeliveryTag = tag
			box.put(d)
		}
		box.close()
	}()
	want := uint64(0)
	for d, ok := box.take(); ok; d, ok = box.take() {
		require.Equal(t, want, d.DeliveryTag)
		want++
	}
	assert.EqualValues(t, 20_000, want)
}

func TestInboxUnderManyHands(t *testing.T) {
	const workers, messages = 4, 20_000
	for _, size := range []int{1, 3, 256} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			box := newInbox(size, hireNobody)
			var mu sync.Mutex
			seen := make(map[uint64]int)
			var working sync.WaitGroup
			for range workers {
				working.Go(func() {
					for {
						d, ok := box.take()
						if !ok {
							return
						}
						mu.Lock()
						seen[d.DeliveryTag]++
						if d.DeliveryTag == messages/2 {
							box.close()
						}
						mu.Unlock()
					}
				})
			}
			for tag := range uint64(messages) {
				d := &Delivery{}
				d.DeliveryTag = tag
				box.put(d)
			}
			working.Wait()
			for _, d := range box.clear() {
				seen[d.DeliveryTag]++
			}
			assert.Len(t, seen, messages)
			for tag, n := range seen {
				require.Equal(t, 1, n, tag)
			}
		})
	}
}

// What waited beyond the prefetch is not kept after it was taken.
func TestInboxForgetsWhatWasTaken(t *testing.T) {
	box := newInbox(1, hireNobody)
	freed := make(chan struct{}, 100)
	for range 100 {
		d := &Delivery{}
		runtime.AddCleanup(d, func(ended chan struct{}) { ended <- struct{}{} }, freed)
		box.put(d)
	}
	for range 50 {
		_, _ = box.take()
	}
	runtime.GC()
	for range 40 { // what is still in the channel and on the stack aside
		select {
		case <-freed:
		case <-time.After(10 * time.Second):
			t.Fatal("taken deliveries are kept")
		}
	}
	runtime.KeepAlive(box)
}

func TestWaitingCountsWhatDoesNotFit(t *testing.T) {
	box := newInbox(2, func() bool { return true })
	for n := range 5 {
		assert.Equal(t, n, box.waiting())
		box.put(&Delivery{})
	}
	_, _ = box.take()
	assert.Equal(t, 4, box.waiting())
}

// A host that was cut off may know of no consumer at all, ours included.
func TestMessagesWaitForUsWhereNobodyElseConsumes(t *testing.T) {
	c := defaults("amqp://h/", "q")
	p := &prober{session: &session{scope: &scope{config: c}}}
	assert.True(t, p.waits(amqp.Queue{Messages: 1, Consumers: 0}))
	assert.True(t, p.waits(amqp.Queue{Messages: 1, Consumers: 1}))
	assert.False(t, p.waits(amqp.Queue{Messages: 1, Consumers: 2}))
	assert.False(t, p.waits(amqp.Queue{Messages: 0, Consumers: 1}))
	c.declare = &Queue{Args: amqp.Table{"x-single-active-consumer": true}}
	assert.False(t, p.waits(amqp.Queue{Messages: 1, Consumers: 1}), "the active one may be another")
}

// Whatever a peer does that is no broker, its port is named.
func TestInboxThatIsClearedKeepsNothing(t *testing.T) {
	box := newInbox(10, hireNobody)
	for range 50 {
		box.put(&Delivery{})
	}
	box.close()
	assert.Len(t, box.clear(), 50)
	assert.Empty(t, box.last.waiting)
	assert.Zero(t, box.waiting())
}

// A lookup that compares is cut off, and the topology function names another stream: what is found
// there is a position of that stream, compared with nothing.
func TestPositionOfAnotherStreamIsComparedWithNothing(t *testing.T) {
	for name, cut := range map[string]bool{"before the lookup": false, "in the lookup": true} {
		t.Run(name, func(t *testing.T) {
			p := &position{settled: newWatermark(), acked: newWatermark()}
			p.needsLookup("a", "next")
			p.resume(1, nil, true)
			p.subscribed("next")
			p.locate(100)
			p.fallSilent(60)
			if cut {
				offset, _ := p.needsLookup("a", "next")
				require.Equal(t, "first", offset)
			}
			offset, needed := p.needsLookup("b", "next")
			assert.Equal(t, "next", offset)
			assert.True(t, needed)
			p.locate(7)
			assert.EqualValues(t, 7, p.resume(2, nil, true)[offsetKey])
		})
	}
}

// Only a stream that has dropped nothing tells by its length that it is another one.
func TestPositionStartsOverOnlyInAStreamThatIsAnotherOne(t *testing.T) {
	for name, c := range map[string]struct {
		first  int64
		length int
		want   int64
	}{
		"shorter, from its beginning":        {0, 60, 0},
		"as long":                            {0, 100, 100},
		"shorter, for it has dropped some":   {50, 60, 100},
		"not known where the stream begins":  {unknownOffset, 60, 100},
		"nothing is wrong":                   {0, 0, 100},
		"longer, so the position is in it":   {0, 160, 100},
		"shorter by one message than it was": {0, 99, 0},
	} {
		t.Run(name, func(t *testing.T) {
			p := &position{settled: newWatermark(), acked: newWatermark()}
			p.needsLookup("s", "first")
			p.resume(1, nil, false)
			p.subscribed("first")
			p.locate(100)
			p.fallSilent(c.length)
			offset, needed := p.needsLookup("s", "first")
			assert.Equal(t, c.length > 0, needed)
			if needed {
				assert.Equal(t, "first", offset)
				p.locate(c.first)
			}
			assert.Equal(t, c.want, p.resume(2, nil, true)[offsetKey])
			_, needed = p.needsLookup("s", "first")
			assert.False(t, needed, "once")
		})
	}
}

// A try that returns after it was abandoned has a session that nobody else would end.
func TestTryThatComesBackTooLateIsClosed(t *testing.T) {
	for name, own := range map[string]bool{"on a connection of its own": true, "on the supervisor's connection": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				reason := errors.New("set-up limit")
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, reason)
				defer cancel()
				late := &session{finishing: true, done: make(chan struct{})}
				conn := &connection{stop: make(chan closeRequest, 1), closeTimeout: time.Second}
				var giveBack func()
				if own {
					giveBack = func() { conn.close(closeRequest{limit: conn.closeTimeout}) }
				}
				began := time.Now()
				step := newStep("dial")
				step.at("consume")

				a := runBounded(ctx, func() attempt {
					time.Sleep(time.Minute)
					return attempt{conn: &loan{connection: conn}, giveBack: giveBack, session: late}
				}, step)

				assert.Equal(t, time.Second+tryGrace, time.Since(began))
				require.ErrorIs(t, a.err, reason)
				assert.ErrorContains(t, a.err, "consume")
				assert.Nil(t, a.session)
				time.Sleep(time.Minute)
				synctest.Wait()
				assert.Empty(t, conn.stop, "not before its session has gone")
				close(late.done)
				synctest.Wait()
				assert.Len(t, conn.stop, map[bool]int{true: 1, false: 0}[own])
			})
		})
	}
}

func TestTryThatExitsIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := runBounded(t.Context(), func() attempt {
			runtime.Goexit()
			return attempt{}
		}, newStep("dial"))
		assert.ErrorIs(t, a.err, errNoResult)
	})
}

func TestHourOfFailuresIsAtMost100Lines(t *testing.T) {
	for _, every := range []time.Duration{10 * time.Millisecond, 400 * time.Millisecond, 1100 * time.Millisecond, 30 * time.Second, 61 * time.Second} {
		t.Run(every.String(), func(t *testing.T) {
			var f failures
			what := failure{of: &session{conn: &loan{connection: &connection{}}}, err: errors.New("away")}
			told, left := 0, uint64(0)
			start := time.Now()
			for passed := time.Duration(0); passed <= time.Hour; passed += every {
				if n, due := f.add(start.Add(passed), what); due {
					told++
					left += n
				}
			}
			assert.LessOrEqual(t, told, 100)
			assert.GreaterOrEqual(t, told, 58)
			assert.EqualValues(t, time.Hour/every+1, uint64(told)+left+f.suppressed, "all are counted")
		})
	}
}

// newTestReporter returns a reporter that logs nothing, and what it has dropped.
func newTestReporter() (*reporter, *atomic.Uint64) {
	dropped := new(atomic.Uint64)
	return newReporter(context.Background(), &config{logger: slog.New(slog.DiscardHandler)}, dropped), dropped
}

// reports tells whether there is a goroutine that reports.
func (r *reporter) reports() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running
}

func TestEventAfterAQuietTimeIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newTestReporter()
		assert.False(t, r.reports(), "nothing to report yet")
		for n := range 20 { // the second one comes sooner or later after the first
			told := 0
			r.tell(func() { told++ })
			time.Sleep(time.Duration(n) * 100 * time.Microsecond)
			r.tell(func() { told++ })
			time.Sleep(time.Second)
			synctest.Wait()
			assert.Equal(t, 2, told)
			assert.False(t, r.reports(), "an idle consumer keeps no goroutine for it")
		}
		r.stop()
	})
}

func TestEventWaitsForTheOneBeforeIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, dropped := newTestReporter()
		block := make(chan struct{})
		var told []int
		r.tell(func() { <-block })
		for n := range reportBacklog {
			r.tell(func() { told = append(told, n) })
			synctest.Wait() // while the first one hangs
			require.Empty(t, told)
		}
		assert.Zero(t, dropped.Load())
		r.tell(func() { t.Error("one too many") })
		assert.EqualValues(t, 1, dropped.Load())
		close(block)
		synctest.Wait()
		require.Len(t, told, reportBacklog)
		for n := range told {
			require.Equal(t, n, told[n])
		}
		r.stop()
	})
}

// A goroutine that ends must not miss the event that comes at the same time, nor two of them use
// the journal.
func TestEventsUnderManyHandsAreToldOnce(t *testing.T) {
	const hands, events = 4, 20_000
	r, dropped := newTestReporter()
	var told int // without a lock: one goroutine follows the other
	var working sync.WaitGroup
	for range hands {
		working.Go(func() {
			for range events {
				r.tell(func() { told++ })
				runtime.Gosched()
			}
		})
	}
	working.Wait()
	r.stop()
	assert.EqualValues(t, hands*events, uint64(told)+dropped.Load())
}

// What a user has switched off costs no line.
func TestFailureBelowTheLevelOfTheLoggerMakesNoLine(t *testing.T) {
	lines := 0
	j := newJournal(t.Context(), slog.New(levelHandler{slog.LevelError, &lines}))
	defer j.stop()
	record, due := j.failed(failure{of: &session{conn: &loan{connection: &connection{}}}, delivery: NewDelivery(amqp.Delivery{}), err: errors.New("away")})
	assert.True(t, due)
	j.writeFailure(record)
	assert.Zero(t, lines)
}

type levelHandler struct {
	level slog.Level
	lines *int
}

func (h levelHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }
func (h levelHandler) Handle(context.Context, slog.Record) error        { *h.lines++; return nil }
func (h levelHandler) WithAttrs([]slog.Attr) slog.Handler               { return h }
func (h levelHandler) WithGroup(string) slog.Handler                    { return h }
