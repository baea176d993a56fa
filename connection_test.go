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
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
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

// Every piece of user and password in these URLs contains this, or is part of it.
const secretPiece = "Xq9z"

func TestURLThatIsGoodIsDialledAtItsHost(t *testing.T) {
	for text, want := range map[string]string{
		"amqp://host":                             "host:5672 guest guest /",
		"amqps://host":                            "host:5671 guest guest /",
		"AMQP://host/":                            "host:5672 guest guest /",
		"amqp://host:":                            "host:5672 guest guest /",
		"amqp://user:pass@host:10000/vhost":       "host:10000 user pass vhost",
		"amqp://u%61er:%61ss@host:65535/v%2fhost": "host:65535 uaer ass v/host",
		"amqp://user@host/%2f":                    "host:5672 user guest /",
		"amqp://user:@host":                       "host:5672 user  /",
		"amqp://guest@host//":                     "host:5672 guest guest /",
		"amqp://user:p%40a%2Fs%3Fs%23%25@host":    "host:5672 user p@a/s?s#% /",
		"amqp://user:a:b$c!d+e,f;g='h'*(i)~@host": "host:5672 user a:b$c!d+e,f;g='h'*(i)~ /",
		"amqp://u:p@[::1]":                        "[::1]:5672 u p /",
		"amqps://u:p@[2001:db8::1]:5673/v":        "[2001:db8::1]:5673 u p v",
		"amqp://u:p@[fe80::1%25eth0]:5672/v":      "[fe80::1%eth0]:5672 u p v",
		"amqp://u:p@10.0.0.1/a.b-c_d:e,f":         "10.0.0.1:5672 u p a.b-c_d:e,f",
		"amqp://u:p@my_rabbit.svc.cluster.local":  "my_rabbit.svc.cluster.local:5672 u p /",
		"amqp://u:p@xn--bcher-kva.example./v%20w": "xn--bcher-kva.example.:5672 u p v w",
		"amqp://u:p@bücher.example":               "bücher.example:5672 u p /",
		"amqp://u:p@host?heartbeat=5":             "host:5672 u p /",
		"amqp://u:p@host/?heartbeat=600&connection_timeout=10000&channel_max=2047&auth_mechanism=PLAIN": "host:5672 u p /",
		"amqps://u:p@host/v?cacertfile=%2Fca.pem&certfile=/c.pem&keyfile=/k.pem&verify=verify_peer":     "host:5671 u p v",
		"amqps://u:p@host/v?server_name_indication=mq.example&auth_mechanism=external":                  "host:5671 u p v",
	} {
		e, err := parseEndpoint(text)
		if assert.NoError(t, err, text) {
			assert.Equal(t, want, strings.Join([]string{e.address, e.uri.Username, e.uri.Password, e.uri.Vhost}, " "), text)
		}
	}
}

func TestURLThatIsWrongIsToldWhatIsWrongWithIt(t *testing.T) {
	const (
		encode  = " (net/url.UserPassword does it)"
		atIs    = "; an @ in the virtual host or a parameter is %40"
		noPort  = "the port of the URL is no number (or the host is missing: user:password@host:port)"
		ports   = "the port of the URL must be 1 to 65535"
		colons  = "the URL has several colons in host and port: an IPv6 address needs brackets, [::1]:5672, and user:password needs an @ before the host"
		several = "the URL names several hosts: give one URL to New and one for each further host to WithURLs"
		tlsOnly = "for TLS the scheme of the URL is amqps"
		unset   = "the URL holds a variable that was not filled in"
		slash   = "the virtual host in the URL has a further /: percent-encode it as %2F"
	)
	for text, want := range map[string]string{
		// Cut wrongly.
		"amqp://user:Xq9z@Xq9z@host":                  "the URL has an unescaped @ in user or password: percent-encode it as %40" + encode,
		"amqp://me@corp.example:Xq9z@host":            "the URL has an unescaped @ in user or password: percent-encode it as %40" + encode,
		"amqp://user:Xq9z#Xq9z@host:5672/":            "the URL seems to have an unescaped # in user or password: percent-encode it as %23" + encode + atIs,
		"amqp://user:Xq9z?Xq9z@host/":                 "the URL seems to have an unescaped ? in user or password: percent-encode it as %3F" + encode + atIs,
		"amqp://user:Xq9z/Xq9z@host/":                 "the URL seems to have an unescaped / in user or password: percent-encode it as %2F" + encode + atIs,
		"amqp://user:12/Xq9z@host/":                   "the URL seems to have an unescaped / in user or password: percent-encode it as %2F" + encode + atIs,
		"amqp://Xq9z/Xq9z:Xq9z@host/":                 "the URL seems to have an unescaped / in user or password: percent-encode it as %2F" + encode + atIs,
		"amqp://user:Xq9z@Xq9z/Xq9z@host/":            "the URL has several @, which seem to be in user or password, as does a /: percent-encode them as %40 and %2F" + encode + atIs,
		"amqp://user:Xq9z@Xq9z?heartbeat=5@host/":     "the URL has several @, which seem to be in user or password, as does a ?: percent-encode them as %40 and %3F" + encode + atIs,
		"amqp://user:Xq9z%Xq9z@host":                  "the URL has an unescaped % in user or password: percent-encode it as %25" + encode,
		"amqp://user:Xq9z%@host":                      "the URL has an unescaped % in user or password: percent-encode it as %25" + encode,
		"amqp://user:Xq9z Xq9z@host":                  "the URL has an unescaped blank: percent-encode it as %20" + encode,
		"amqp://user:Xq9z\nXq9z@host":                 "the URL has a line break or another control character inside",
		"amqp://user:Xq9z[^Xq9z@host":                 "user or password of the URL has a character that must be percent-encoded" + encode,
		"amqp://user:Xq9zä@host":                      "user or password of the URL has a character that must be percent-encoded" + encode,
		"amqp://host/v%zz":                            "the URL has a % with no two hexadecimal digits after it: percent-encode it as %25",
		"amqp://u:p@host/#Xq9z":                       "the URL has an unescaped #: percent-encode it as %23; an AMQP URL has no fragment",
		"amqp://u:p@a.example,u:p@b.example/":         "the URL has several @: give further hosts to WithURLs",
		"amqp://u:p@a,b/":                             several,
		"amqp://u:p@a:5672,b:5672/":                   several,
		"amqp://u:p@a;b/":                             several,
		"amqp://u:p@a/,amqp://u:p@b/":                 "the URL holds several URLs: give the first to New and the others to WithURLs",
		"amqp://u:p@host:tcp://10.0.0.1:5672":         "the host or port is a URL of its own, tcp://...: Kubernetes sets RABBITMQ_PORT to that where a service is named rabbitmq",
		"amqp://u:p@http://host/":                     "the URL holds another URL in place of its host",
		"amqp://user:Xq9z":                            noPort,
		"amqp://u:p@host:amqp":                        noPort,
		"amqp://u:p@host:-1":                          noPort,
		"amqp://u:p@host:0":                           ports,
		"amqp://u:p@host:65536":                       ports,
		"amqp://u:p@host:99999999999999999999":        ports,
		"amqp://u:p@::1:5672":                         colons,
		"amqp://u:p@host:5672:5672":                   colons,
		"amqp://u:p@[::1:5672":                        "the IPv6 address of the URL must be in brackets: [::1]:5672",
		"amqp://u:p@[host]:5672":                      "the URL has brackets around what is no IPv6 address",
		"amqp://u:p@ho<st>/":                          "the URL has a character in its host that no host name has",
		"amqp://u:p@/v":                               "the URL has no host: want " + urlForm,
		"amqp://u:p@:5672/v":                          "the URL has no host: want " + urlForm,
		"amqp:///v":                                   "the URL has no host: want " + urlForm,
		"amqp://":                                     "the URL has no host: want " + urlForm,
		"amqp://u:p@host/a/b":                         slash,
		"amqp://u:p@host/a/":                          slash,
		"amqp://u:p@host///":                          slash,
		"amqp://u:p@host/" + strings.Repeat("v", 256): "the virtual host in the URL has more than 255 bytes",

		// Around it, in place of it.
		"":                                   "the URL is empty: want " + urlForm + ", or WithURLFunc",
		" amqp://u:Xq9z@host":                "the URL begins or ends with a blank or line break, as a secret read from a file does: use strings.TrimSpace",
		"amqp://u:Xq9z@host/\n":              "the URL begins or ends with a blank or line break",
		"\ufeffamqp://u:Xq9z@host/":          "the URL begins or ends with a blank or line break",
		`"amqp://u:Xq9z@host/"`:              "the URL has quotes around it: leave them out",
		"'amqp://u:Xq9z@host/'":              "the URL has quotes around it: leave them out",
		"AMQP_URL=amqp://u:Xq9z@host/":       "the URL stands behind a name and =, as in an env file: give only what follows the =",
		"amqp://u:${RABBIT_PASSWORD}@host/":  unset,
		"amqp://u:$(RABBIT_PASSWORD)@host/":  unset,
		"amqp://u:p@{{ .Values.host }}/":     unset,
		"amqp://u:p@$HOST:5672/":             "the URL has a variable that was not filled in as host or port",
		"amqp://u:p@host:$PORT":              "the URL has a variable that was not filled in as host or port",
		"host:5672":                          "the URL has no scheme: it must begin with amqp:// or, for TLS, amqps://",
		"u:Xq9z@host":                        "the URL has no scheme",
		"//u:Xq9z@host":                      "the URL has no scheme",
		"u:Xq9z@host:tcp://10.0.0.1":         "the URL has no scheme",
		"amqp:u:Xq9z@host":                   "the URL lacks // after amqp: or amqps:",
		"amqps:/u:Xq9z@host":                 "the URL lacks // after amqp: or amqps:",
		"http://u:Xq9z@host:15672/":          "http is for RabbitMQ's HTTP API: AMQP has amqp:// (port 5672) and, for TLS, amqps:// (port 5671)",
		"https://u:Xq9z@host/":               "https is for RabbitMQ's HTTP API",
		"tcp://10.0.0.1:5672":                "tcp:// is what Kubernetes and Docker put into RABBITMQ_PORT: want " + urlForm,
		"amqp+ssl://u:Xq9z@host":             tlsOnly,
		"mqtt://u:Xq9z@host":                 "the scheme of the URL is for MQTT",
		"rabbitmq-stream://u:Xq9z@host:5552": "the scheme of the URL is for the stream protocol",
		"rabbit://u:Xq9z@host":               "the scheme of the URL must be amqp or, for TLS, amqps",

		// Parameters.
		"amqp://host?heartbeat=0":                               "the parameter heartbeat of the URL must be 1 to 600, in seconds; a consumer without heartbeats never notices a dead path",
		"amqp://host?heartbeat=10s":                             "the parameter heartbeat of the URL must be 1 to 600, in seconds",
		"amqp://host?heartbeat=601":                             "the parameter heartbeat of the URL must be 1 to 600, in seconds",
		"amqp://host?heartbeat=":                                "the parameter heartbeat of the URL has no value",
		"amqp://host?heartbeat":                                 "the parameter heartbeat of the URL has no value",
		"amqp://host?heartbeat=5&heartbeat=6":                   "the parameter heartbeat of the URL is given several times",
		"amqp://host?connection_timeout=0":                      "the parameter connection_timeout of the URL must be 1 to 86400000, in milliseconds",
		"amqp://host?connection_timeout=5s":                     "the parameter connection_timeout of the URL must be 1 to 86400000, in milliseconds",
		"amqp://host?channel_max=65536":                         "the parameter channel_max of the URL must be 0 to 65535",
		"amqp://host?auth_mechanism=scram":                      "the parameter auth_mechanism of the URL must be plain, amqplain or external, given once for each",
		"amqp://host?auth_mechanism=plain,external":             "the parameter auth_mechanism of the URL must be plain, amqplain or external, given once for each",
		"amqp://host?auth_mechanism=plain&auth_mechanism=scram": "the parameter auth_mechanism of the URL must be plain, amqplain or external, given once for each",
		"amqp://host?heartbeats=5":                              "a parameter of the URL is unknown: is heartbeat meant?",
		"amqp://host?Heartbeat=5":                               "a parameter of the URL is unknown: is heartbeat meant?",
		"amqp://host?connect_timeout=5":                         "a parameter of the URL is unknown: is connection_timeout meant?",
		"amqps://host?cacertFile=/x":                            "a parameter of the URL is unknown: is cacertfile meant?",
		"amqp://host?Xq9z=5":                                    "a parameter of the URL is unknown (not shown, it may be of a password): known are auth_mechanism, cacertfile, certfile, channel_max, connection_timeout, heartbeat, keyfile, server_name_indication, verify",
		"amqp://host?frame_max=4096":                            "the parameter frame_max of the URL has no effect here",
		"amqp://host?prefetch=4096":                             "the parameter prefetch of the URL has no effect: use WithPrefetch",
		"amqp://host?heartbeat=5;channel_max=7":                 "the parameters of the URL are malformed",
		"amqps://host?certfile=/c":                              "certfile and keyfile of the URL go together: a client certificate needs its key",
		"amqps://host?keyfile=/k":                               "certfile and keyfile of the URL go together",
		"amqp://host?cacertfile=/c":                             "the parameter cacertfile of the URL has no effect without TLS: use amqps",
		"amqp://host?verify=verify_peer":                        "the parameter verify of the URL has no effect without TLS: use amqps",
		"amqps://host?verify=verify_none":                       "the parameter verify of the URL must be verify_peer, which is always so here",
		"amqp://host?heartbeat=0&channel_max=x":                 "the parameter channel_max of the URL must be 0 to 65535; the parameter heartbeat of the URL must be 1 to 600",
	} {
		e, err := parseEndpoint(text)
		require.Error(t, err, text)
		assert.Zero(t, e, text)
		assert.Contains(t, err.Error(), want, text)
		assert.NotContains(t, err.Error(), secretPiece, text)
		assert.NotContains(t, err.Error(), "\n", text)
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

func TestALockIsWaitedForAsLongAsItsConnectionsHeartbeatsTake(t *testing.T) {
	r, now := newTestRetry(), time.Now()
	r.heartbeat = time.Minute
	assert.True(t, r.lockIsFresh(now))
	assert.True(t, r.lockIsFresh(now.Add(3*time.Minute)))
	assert.False(t, r.lockIsFresh(now.Add(3*time.Minute+lockedExtra)))
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

// FuzzURL puts a secret into a URL, percent-encoded or not. A URL that is refused shows no piece of
// it, and one that is accepted is dialled at its host, with its user and password.
func FuzzURL(f *testing.F) {
	for _, password := range []string{"", "@", "#", "?", "/", "%", ":", " ", "@/", "@a?heartbeat=", "/@b:1", "%40", "%2", "a@b,", ",amqp://", "$(X)", "[::1]/", "\\", "\x00", "ä"} {
		f.Add(password, "mq.example:5672", "/vhost?heartbeat=5")
	}
	f.Add("@a/", "mq.example", "")
	f.Add("x", "[::1]", "?certfile=@")
	f.Add("x", "a,b", "/@")
	f.Add("?", "u@h", "//")
	f.Fuzz(func(t *testing.T, piece, host, tail string) {
		const mark = "Xq9canaryZ7"
		password := mark + piece + mark
		for _, written := range []string{password, url.QueryEscape(password)} {
			e, err := parseEndpoint("amqp://" + mark + ":" + written + "@" + host + tail)
			if err != nil {
				assert.NotContains(t, err.Error(), mark)
				continue
			}
			assert.NotContains(t, e.address, mark)
			decoded, err := url.PathUnescape(written)
			require.NoError(t, err)
			assert.Equal(t, mark, e.uri.Username)
			assert.Equal(t, decoded, e.uri.Password)
			if name := strings.TrimSuffix(host, ":5672"); name != "" && only(name, "-.") && (tail == "" || tail[0] == '/' || tail[0] == '?') {
				assert.Equal(t, net.JoinHostPort(name, "5672"), e.address)
			}
		}
	})
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
