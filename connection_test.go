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
	"io"
	"math/big"
	"net"
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
