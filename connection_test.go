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
	"testing"
	"testing/synctest"
	"time"

	"github.com/steadymq/steadymq/internal/wire"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The driver tells of the broker's connection.close before its close-ok is on the
// wire, and holds its mutex until then. Whoever closed the socket at once would
// lose the close-ok, and whoever waited for the mutex would stand still with the
// time of this test.
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

// The frames of AMQP 0-9-1 are put together here, and read, by other code than the library's.

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

// broker plays the broker's half of the driver's handshake on far, answers
// what a consumer asks, and hands over the stream then.
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
