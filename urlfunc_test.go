package steadymq_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// asked starts a consumer that asks f for its URL.
func (b *bench) asked(f func() (string, error), opts ...steadymq.Option) {
	b.Helper()
	b.run(ack, append(opts, steadymq.WithURLFunc(func(context.Context) (string, error) { return f() }))...)
}

// history returns the changes of state so far.
func (b *bench) history() []steadymq.StateChange {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.changes)
}

func (b *bench) lastChange() steadymq.StateChange {
	all := b.history()
	return all[len(all)-1]
}

func TestURLFuncMayNotSwitchTLSOff(t *testing.T) {
	bubble(t, func(b *bench) {
		var dialled atomic.Int64
		b.asked(func() (string, error) { return b.broker.URL, nil }, steadymq.WithTLSConfig(new(tls.Config)), dialler(func() (net.Conn, error) {
			dialled.Add(1)
			return nil, errors.New("no dial is expected")
		}))
		b.wait(10 * time.Second)
		require.NotEmpty(b, b.causes())
		assert.EqualError(b, b.causes()[0],
			"steadymq: queue orders: session 1: dial: WithURLFunc: WithTLSConfig: the URL has the scheme amqp, which is not encrypted; use amqps")
		assert.Zero(b, dialled.Load())
		assert.Zero(b, b.consumer.Stats().Dials)
		assert.GreaterOrEqual(b, b.shortestWait(), time.Second, "at the pace of what someone has to mend")
	})
}

func dialler(f func() (net.Conn, error)) steadymq.Option {
	return steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return f() })
}

func TestURLOfTheFuncThatNewWouldRefuseIsNotDialled(t *testing.T) {
	for url, want := range map[string]string{
		"": "WithURLFunc: the URL is empty",
		"amqp://app:x/" + password + "@mq1.test/":                  "WithURLFunc: the URL seems to have an unescaped / in user or password: percent-encode it as %2F",
		"amqp://app:" + password + "@mq1.test/?auth_mechanism=gss": "WithURLFunc: the parameter auth_mechanism of the URL must be plain, amqplain or external",
	} {
		bubble(t, func(b *bench) {
			var mended atomic.Bool
			b.asked(func() (string, error) {
				if mended.Load() {
					return b.broker.URL, nil
				}
				return url, nil
			})
			b.wait(time.Minute)
			require.NotEmpty(b, b.causes())
			require.ErrorContains(b, b.causes()[0], want)
			assert.NotContains(b, b.causes()[0].Error(), password)
			assert.Zero(b, b.consumer.Stats().Dials)
			assert.GreaterOrEqual(b, b.shortestWait(), time.Second)
			require.Len(b, b.result, 0, "Run goes on: the function may say something else any moment")
			mended.Store(true)
			b.wait(31 * time.Second)
			assert.Equal(b, steadymq.Consuming, b.consumer.State())
		})
	}
}

func TestHeartbeatOfTheFuncsURLCounts(t *testing.T) {
	bubble(t, func(b *bench) {
		b.asked(func() (string, error) { return b.broker.URL + "?heartbeat=2", nil })
		b.wait(10 * time.Second)
		require.Empty(b, b.causes())
		b.broker.Silence()
		b.wait(3500 * time.Millisecond)
		assert.NotEmpty(b, b.causes(), "a silent peer is noticed within 1.5 heartbeats")
	})
}

func TestLockIsWaitedForAsLongAsTheURLsHeartbeatSays(t *testing.T) {
	bubble(t, func(b *bench) {
		b.broker.RefuseConsume(405, "cannot obtain exclusive access to locked queue 'orders' in vhost '/'")
		b.asked(func() (string, error) { return b.broker.URL + "?heartbeat=60", nil })
		b.wait(3 * time.Minute) // as long as the broker may take to bury the connection that holds the lock
		require.Greater(b, len(b.causes()), 180)
		for _, c := range b.history() {
			assert.LessOrEqual(b, c.RetryIn, time.Second)
		}
	})
}

func TestConnectionTimeoutOfTheURLBoundsTheDial(t *testing.T) {
	for parameter, opts := range map[string][]steadymq.Option{
		"?connection_timeout=700": nil,
		"?connection_timeout=1":   opts(steadymq.WithDialTimeout(700 * time.Millisecond)),
	} {
		bubble(t, func(b *bench) {
			b.broker.DropSYN(true)
			b.asked(func() (string, error) { return b.broker.URL + parameter, nil }, opts...)
			b.wait(699 * time.Millisecond)
			assert.Empty(b, b.causes())
			b.wait(2 * time.Millisecond)
			assert.Len(b, b.causes(), 1)
		})
	}
}

func TestTryThatDialledNothingNamesNoHost(t *testing.T) {
	bubble(t, func(b *bench) {
		var fail atomic.Bool
		b.asked(func() (string, error) {
			if fail.Load() {
				return "", errors.New("service discovery is down")
			}
			return b.broker.URL, nil
		})
		b.wait(10 * time.Second)
		fail.Store(true)
		b.broker.Reset()
		b.wait(10 * time.Second)
		changes := b.history()
		for i, c := range changes {
			if c.Cause == nil || !strings.Contains(c.Cause.Error(), "service discovery") {
				continue
			}
			var at *steadymq.SessionError
			require.ErrorAs(b, c.Cause, &at)
			assert.Empty(b, at.Host)
			assert.Empty(b, c.Host)
			assert.Empty(b, changes[i-1].Host, "nor is one being dialled")
			fail.Store(false)
		}
		require.False(b, fail.Load(), "one was told")
		b.wait(10 * time.Second)
		assert.Equal(b, "mq1.test:5672", b.lastChange().Host)
		b.broker.Refuse(true)
		b.broker.Reset()
		b.wait(10 * time.Second)
		assert.Equal(b, "mq1.test:5672", b.lastChange().Host, "one that refused the dial was dialled")
	})
}

// TLS by the parameters of the URL.

func TestCACertFileOfTheURLIsTrustedAndNoOther(t *testing.T) {
	bubble(t, func(b *bench) {
		file := filepath.Join(b.TempDir(), "ca.pem")
		require.NoError(b, os.WriteFile(file, b.certificate(), 0o600))
		b.asked(func() (string, error) { return b.broker.URL + "?cacertfile=" + file, nil })
		b.wait(time.Second)
		assert.Equal(b, steadymq.Consuming, b.consumer.State())
		require.NoError(b, b.stop())

		b.asked(func() (string, error) {
			return b.broker.URL + "?server_name_indication=other.example&cacertfile=" + file, nil
		})
		b.wait(time.Second)
		require.NotEmpty(b, b.causes())
		assert.ErrorContains(b, b.causes()[0], "not other.example")
	}, steadymqtest.WithTLS())
}

// certificate fetches that of the broker, in PEM.
func (b *bench) certificate() []byte {
	raw, err := b.broker.Dial("tcp", b.broker.Host(0).Addr())
	require.NoError(b, err)
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true}) // it is fetched to be trusted
	require.NoError(b, conn.Handshake())
	defer conn.Close()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: conn.ConnectionState().PeerCertificates[0].Raw})
}

func TestFileOfTheURLThatCannotBeReadIsForTheOperator(t *testing.T) {
	for parameters, want := range map[string]string{
		"?cacertfile=/none":               "read the URL's cacertfile: open /none: no such file",
		"?cacertfile=urlfunc_test.go":     "the URL's cacertfile urlfunc_test.go holds no PEM certificate",
		"?certfile=/none&keyfile=/nokey/": "load the URL's certfile and keyfile: open /none: no such file",
	} {
		bubble(t, func(b *bench) {
			c, err := steadymq.New(b.broker.URL+parameters, queue, steadymq.WithDialer(b.broker.Dialer()), steadymq.WithHooks(steadymq.Hooks{StateChanged: b.changed}))
			require.NoError(b, err)
			b.consumer = c
			b.start(ack)
			b.wait(10 * time.Second)
			require.NotEmpty(b, b.causes())
			require.ErrorContains(b, b.causes()[0], want)
			assert.GreaterOrEqual(b, b.shortestWait(), time.Second)
		}, steadymqtest.WithTLS())
	}
}

func TestClientCertificateOfTheURLIsShown(t *testing.T) {
	ca, pair := clientCertificate(t)
	dir := t.TempDir()
	key, err := x509.MarshalECPrivateKey(pair.PrivateKey.(*ecdsa.PrivateKey))
	require.NoError(t, err)
	for name, block := range map[string]*pem.Block{
		"cert.pem": {Type: "CERTIFICATE", Bytes: pair.Certificate[0]},
		"key.pem":  {Type: "EC PRIVATE KEY", Bytes: key},
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600))
	}
	bubble(t, func(b *bench) {
		shown := make(chan int, 1)
		near, far := net.Pipe()
		go func() {
			server := tls.Server(far, &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca, MinVersion: tls.VersionTLS12})
			_ = server.HandshakeContext(b.Context())
			shown <- len(server.ConnectionState().VerifiedChains)
			_ = far.Close()
		}()
		c, err := steadymq.New("amqps://mq.example?cacertfile="+dir+"/cert.pem&certfile="+dir+"/cert.pem&keyfile="+dir+"/key.pem", queue,
			dialler(func() (net.Conn, error) { return near, nil }), steadymq.WithFatal(func(error) bool { return true }))
		require.NoError(b, err)
		b.consumer = c
		b.start(ack)
		assert.Equal(b, 1, <-shown)
	})
}

// clientCertificate is a self-signed one of mq.example, for both sides.
func clientCertificate(t *testing.T) (*x509.CertPool, tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"mq.example"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	leaf, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return pool, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
