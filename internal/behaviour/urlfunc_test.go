package behaviour_test

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
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// runAsking starts a consumer that asks f for its URL.
func runAsking(r *rig.Rig, f func() (string, error), opts ...steadymq.Option) {
	r.Helper()
	r.Run(rig.Ack, append(opts, steadymq.WithURLFunc(func(context.Context) (string, error) { return f() }))...)
}

func TestURLFuncMayNotSwitchTLSOff(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var dialled atomic.Int64
		runAsking(r, func() (string, error) { return r.Broker.URL, nil }, steadymq.WithTLSConfig(new(tls.Config)), dialler(func() (net.Conn, error) {
			dialled.Add(1)
			return nil, errors.New("no dial is expected")
		}))
		r.Wait(10 * time.Second)
		require.NotEmpty(r, r.Causes())
		assert.EqualError(r, r.Causes()[0],
			"steadymq: queue orders: session 1: dial: WithURLFunc: WithTLSConfig: the URL has the scheme amqp, which is not encrypted; use amqps")
		assert.Zero(r, dialled.Load())
		assert.Zero(r, r.Consumer.Stats().Dials)
		assert.GreaterOrEqual(r, r.ShortestWait(), time.Second, "at the pace of what someone has to mend")
	})
}

func dialler(f func() (net.Conn, error)) steadymq.Option {
	return steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return f() })
}

func TestURLOfTheFuncThatNewWouldRefuseIsNotDialled(t *testing.T) {
	for url, want := range map[string]string{
		"": "WithURLFunc: the URL is empty",
		"amqp://app:x/" + rig.Password + "@mq1.test/":                  "WithURLFunc: the URL seems to have an unescaped / in user or password: percent-encode it as %2F",
		"amqp://app:" + rig.Password + "@mq1.test/?auth_mechanism=gss": "WithURLFunc: the parameter auth_mechanism of the URL must be plain, amqplain or external",
	} {
		rig.Bubble(t, func(r *rig.Rig) {
			var mended atomic.Bool
			runAsking(r, func() (string, error) {
				if mended.Load() {
					return r.Broker.URL, nil
				}
				return url, nil
			})
			r.Wait(time.Minute)
			require.NotEmpty(r, r.Causes())
			require.ErrorContains(r, r.Causes()[0], want)
			assert.NotContains(r, r.Causes()[0].Error(), rig.Password)
			assert.Zero(r, r.Consumer.Stats().Dials)
			assert.GreaterOrEqual(r, r.ShortestWait(), time.Second)
			require.Len(r, r.Result, 0, "Run goes on: the function may say something else any moment")
			mended.Store(true)
			r.Wait(31 * time.Second)
			assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		})
	}
}

func TestHeartbeatOfTheFuncsURLCounts(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		runAsking(r, func() (string, error) { return r.Broker.URL + "?heartbeat=2", nil })
		r.Wait(10 * time.Second)
		require.Empty(r, r.Causes())
		r.Broker.Silence()
		r.Wait(3500 * time.Millisecond)
		assert.NotEmpty(r, r.Causes(), "a silent peer is noticed within 1.5 heartbeats")
	})
}

func TestLockIsWaitedForAsLongAsTheURLsHeartbeatSays(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.RefuseConsume(405, "cannot obtain exclusive access to locked queue 'orders' in vhost '/'")
		runAsking(r, func() (string, error) { return r.Broker.URL + "?heartbeat=60", nil })
		r.Wait(3 * time.Minute) // as long as the broker may take to bury the connection that holds the lock
		require.Greater(r, len(r.Causes()), 180)
		for _, c := range r.Changes() {
			assert.LessOrEqual(r, c.RetryIn, time.Second)
		}
	})
}

func TestConnectionTimeoutOfTheURLBoundsTheDial(t *testing.T) {
	for parameter, opts := range map[string][]steadymq.Option{
		"?connection_timeout=700": nil,
		"?connection_timeout=1":   rig.Options(steadymq.WithDialTimeout(700 * time.Millisecond)),
	} {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Broker.DropSYN(true)
			runAsking(r, func() (string, error) { return r.Broker.URL + parameter, nil }, opts...)
			r.Wait(699 * time.Millisecond)
			assert.Empty(r, r.Causes())
			r.Wait(2 * time.Millisecond)
			assert.Len(r, r.Causes(), 1)
		})
	}
}

func TestTryThatDialledNothingNamesNoHost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var fail atomic.Bool
		runAsking(r, func() (string, error) {
			if fail.Load() {
				return "", errors.New("service discovery is down")
			}
			return r.Broker.URL, nil
		})
		r.Wait(10 * time.Second)
		fail.Store(true)
		r.Broker.Reset()
		r.Wait(10 * time.Second)
		changes := r.Changes()
		for i, c := range changes {
			if c.Cause == nil || !strings.Contains(c.Cause.Error(), "service discovery") {
				continue
			}
			var at *steadymq.SessionError
			require.ErrorAs(r, c.Cause, &at)
			assert.Empty(r, at.Host)
			assert.Empty(r, c.Host)
			assert.Empty(r, changes[i-1].Host, "nor is one being dialled")
			fail.Store(false)
		}
		require.False(r, fail.Load(), "one was told")
		r.Wait(10 * time.Second)
		assert.Equal(r, "mq1.test:5672", r.LastChange().Host)
		r.Broker.Refuse(true)
		r.Broker.Reset()
		r.Wait(10 * time.Second)
		assert.Equal(r, "mq1.test:5672", r.LastChange().Host, "one that refused the dial was dialled")
	})
}

// TLS by the parameters of the URL.

func TestCACertFileOfTheURLIsTrustedAndNoOther(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		file := filepath.Join(r.TempDir(), "ca.pem")
		require.NoError(r, os.WriteFile(file, certificateOf(r), 0o600))
		runAsking(r, func() (string, error) { return r.Broker.URL + "?cacertfile=" + file, nil })
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		require.NoError(r, r.Stop())

		runAsking(r, func() (string, error) {
			return r.Broker.URL + "?server_name_indication=other.example&cacertfile=" + file, nil
		})
		r.Wait(time.Second)
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "not other.example")
	}, steadymqtest.WithTLS())
}

// certificateOf fetches that of the broker, in PEM.
func certificateOf(r *rig.Rig) []byte {
	raw, err := r.Broker.Dial("tcp", r.Broker.Host(0).Addr())
	require.NoError(r, err)
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true}) // it is fetched to be trusted
	require.NoError(r, conn.Handshake())
	defer conn.Close()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: conn.ConnectionState().PeerCertificates[0].Raw})
}

func TestFileOfTheURLThatCannotBeReadIsForTheOperator(t *testing.T) {
	for parameters, want := range map[string]string{
		"?cacertfile=/none":               "read the URL's cacertfile: open /none: no such file",
		"?cacertfile=urlfunc_test.go":     "the URL's cacertfile urlfunc_test.go holds no PEM certificate",
		"?certfile=/none&keyfile=/nokey/": "load the URL's certfile and keyfile: open /none: no such file",
	} {
		rig.Bubble(t, func(r *rig.Rig) {
			c, err := steadymq.New(r.Broker.URL+parameters, rig.Queue, steadymq.WithDialer(r.Broker.Dialer()), steadymq.WithHooks(steadymq.Hooks{StateChanged: r.Changed}))
			require.NoError(r, err)
			r.Consumer = c
			r.Start(rig.Ack)
			r.Wait(10 * time.Second)
			require.NotEmpty(r, r.Causes())
			require.ErrorContains(r, r.Causes()[0], want)
			assert.GreaterOrEqual(r, r.ShortestWait(), time.Second)
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
	rig.Bubble(t, func(r *rig.Rig) {
		shown := make(chan int, 1)
		near, far := net.Pipe()
		go func() {
			server := tls.Server(far, &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca, MinVersion: tls.VersionTLS12})
			_ = server.HandshakeContext(r.Context())
			shown <- len(server.ConnectionState().VerifiedChains)
			_ = far.Close()
		}()
		c, err := steadymq.New("amqps://mq.example?cacertfile="+dir+"/cert.pem&certfile="+dir+"/cert.pem&keyfile="+dir+"/key.pem", rig.Queue,
			dialler(func() (net.Conn, error) { return near, nil }), steadymq.WithFatal(func(error) bool { return true }))
		require.NoError(r, err)
		r.Consumer = c
		r.Start(rig.Ack)
		assert.Equal(r, 1, <-shown)
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
