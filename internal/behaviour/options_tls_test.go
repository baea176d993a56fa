package behaviour_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

// greeting is what a peer hears first on a socket: the TLS handshake of a client, or its plain text.
type greeting struct {
	plain        string // its first bytes, if they are no TLS
	serverName   string
	oldest       uint16 // version that the client would speak
	newest       uint16
	certificates int // of the client
	done         bool
}

// tlsPeer is a dialer of which every host speaks TLS, or hears that its client does not.
type tlsPeer struct {
	pair tls.Certificate

	mu    sync.Mutex
	heard map[string]greeting // by the address dialled
	group sync.WaitGroup
}

// heardBy returns what peers with this certificate hear of a consumer, by the addresses it dials.
func heardBy(r *rig.Rig, pair tls.Certificate, url string, options ...steadymq.Option) map[string]greeting {
	r.Helper()
	peer := &tlsPeer{pair: pair, heard: make(map[string]greeting)}
	tapped(r, url, rig.Queue, append(options, steadymq.WithDialer(peer.DialContext))...)
	r.Start(rig.Ack)
	r.Wait(time.Minute)
	r.Stop()
	peer.group.Wait()
	return peer.heard
}

func (p *tlsPeer) DialContext(_ context.Context, _, address string) (net.Conn, error) {
	near, far := net.Pipe()
	p.group.Go(func() {
		defer far.Close()
		g := p.greet(far)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.heard[address] = g
	})
	return near, nil
}

func (p *tlsPeer) greet(far net.Conn) (g greeting) {
	first := make([]byte, 8)
	n, _ := far.Read(first)
	if n > 0 && first[0] != 0x16 { // of a TLS record
		g.plain = string(first[:n])
		return g
	}
	server := tls.Server(&resumed{far, first[:n]}, &tls.Config{
		Certificates: []tls.Certificate{p.pair}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS10, // to see what is refused
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			g.serverName = hello.ServerName
			g.oldest, g.newest = slices.Min(hello.SupportedVersions), slices.Max(hello.SupportedVersions)
			return nil, nil
		},
	})
	g.done = server.Handshake() == nil
	g.certificates = len(server.ConnectionState().PeerCertificates)
	if g.done { // a client that refuses the certificate says so now
		_, err := server.Read(first)
		g.done = err == nil
	}
	return g
}

// resumed is a connection whose first bytes have been read already.
type resumed struct {
	net.Conn
	first []byte
}

func (r *resumed) Read(p []byte) (int, error) {
	if len(r.first) > 0 {
		n := copy(p, r.first)
		r.first = r.first[n:]
		return n, nil
	}
	return r.Conn.Read(p)
}

// certificateFiles writes the certificate and its key into files.
func certificateFiles(t *testing.T, pair tls.Certificate) (certificate, key string) {
	t.Helper()
	dir := t.TempDir()
	private, err := x509.MarshalECPrivateKey(pair.PrivateKey.(*ecdsa.PrivateKey))
	require.NoError(t, err)
	certificate, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	require.NoError(t, os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]}), 0o600))
	require.NoError(t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}), 0o600))
	return certificate, key
}

func TestTLSIsSpokenAsURLsAndOptionsSay(t *testing.T) {
	const (
		v12, v13 = tls.VersionTLS12, tls.VersionTLS13
		amqp     = "AMQP\x00\x00\x09\x01"
	)
	ca, pair := clientCertificate(t)
	certificate, key := certificateFiles(t, pair)
	trusted := func(c *tls.Config) steadymq.Option {
		c.RootCAs = ca
		return steadymq.WithTLSConfig(c)
	}
	file, shown := "cacertfile="+certificate, "&certfile="+certificate+"&keyfile="+key
	given := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	unverified := tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { return nil }} // it has a check of its own

	for name, c := range map[string]struct {
		url     string
		options []steadymq.Option
		want    map[string]greeting
	}{
		"plain":                     {"amqp://mq.example", nil, map[string]greeting{"mq.example:5672": {plain: amqp}}},
		"plain, on the port of TLS": {"amqp://mq.example:5671", nil, map[string]greeting{"mq.example:5671": {plain: amqp}}},
		"system's roots":            {"amqps://mq.example", nil, map[string]greeting{"mq.example:5671": {serverName: "mq.example", oldest: v12, newest: v13}}},
		"cacertfile":                {"amqps://mq.example?" + file, nil, map[string]greeting{"mq.example:5671": {serverName: "mq.example", oldest: v12, newest: v13, done: true}}},
		"on the plain port":         {"amqps://mq.example:5672?" + file, nil, map[string]greeting{"mq.example:5672": {serverName: "mq.example", oldest: v12, newest: v13, done: true}}},
		"server_name_indication": {
			"amqps://10.0.0.1?server_name_indication=mq.example&" + file, nil,
			map[string]greeting{"10.0.0.1:5671": {serverName: "mq.example", oldest: v12, newest: v13, done: true}},
		},
		"server_name_indication that is not the peer's": {
			"amqps://mq.example?server_name_indication=else.example&" + file, nil,
			map[string]greeting{"mq.example:5671": {serverName: "else.example", oldest: v12, newest: v13}},
		},
		"certfile and keyfile": {
			"amqps://mq.example?" + file + shown, nil,
			map[string]greeting{"mq.example:5671": {serverName: "mq.example", oldest: v12, newest: v13, certificates: 1, done: true}},
		},
		"WithTLSConfig": {"amqps://mq.example", rig.Options(trusted(&tls.Config{})), map[string]greeting{"mq.example:5671": {serverName: "mq.example", oldest: v12, newest: v13, done: true}}},
		"WithTLSConfig twice": {
			"amqps://mq.example", rig.Options(steadymq.WithTLSConfig(&tls.Config{ServerName: "else.example"}), trusted(&tls.Config{})),
			map[string]greeting{"mq.example:5671": {serverName: "mq.example", oldest: v12, newest: v13, done: true}},
		},
		"WithTLSConfig, ServerName": {
			"amqps://10.0.0.1", rig.Options(trusted(&tls.Config{ServerName: "mq.example"})),
			map[string]greeting{"10.0.0.1:5671": {serverName: "mq.example", oldest: v12, newest: v13, done: true}},
		},
		"WithTLSConfig, MinVersion": {
			"amqps://mq.example", rig.Options(trusted(&tls.Config{MinVersion: v13})),
			map[string]greeting{"mq.example:5671": {serverName: "mq.example", oldest: v13, newest: v13, done: true}},
		},
		"WithTLSConfig, MaxVersion": {
			"amqps://mq.example", rig.Options(trusted(&tls.Config{MaxVersion: v12})),
			map[string]greeting{"mq.example:5671": {serverName: "mq.example", oldest: v12, newest: v12, done: true}},
		},
		"WithTLSConfig, Certificates": {
			"amqps://mq.example", rig.Options(trusted(&tls.Config{Certificates: []tls.Certificate{pair}})),
			map[string]greeting{"mq.example:5671": {serverName: "mq.example", oldest: v12, newest: v13, certificates: 1, done: true}},
		},
		"WithTLSConfig, GetClientCertificate": {
			"amqps://mq.example", rig.Options(trusted(&tls.Config{GetClientCertificate: given})),
			map[string]greeting{"mq.example:5671": {serverName: "mq.example", oldest: v12, newest: v13, certificates: 1, done: true}},
		},
		"WithTLSConfig, VerifyConnection": {
			"amqps://else.example", rig.Options(steadymq.WithTLSConfig(&unverified)),
			map[string]greeting{"else.example:5671": {serverName: "else.example", oldest: v12, newest: v13, done: true}},
		},
		"WithInsecureSkipVerify": {
			"amqps://else.example", rig.Options(steadymq.WithInsecureSkipVerify()),
			map[string]greeting{"else.example:5671": {serverName: "else.example", oldest: v12, newest: v13, done: true}},
		},
		"WithInsecureSkipVerify keeps the rest": {
			"amqps://else.example?server_name_indication=other.example&" + file + shown, rig.Options(steadymq.WithInsecureSkipVerify()),
			map[string]greeting{"else.example:5671": {serverName: "other.example", oldest: v12, newest: v13, certificates: 1, done: true}},
		},
		"WithURLs, the second plain": {
			"amqps://mq.example?" + file, rig.Options(steadymq.WithURLs("amqp://b.example")),
			map[string]greeting{"mq.example:5671": {serverName: "mq.example", oldest: v12, newest: v13, done: true}, "b.example:5672": {plain: amqp}},
		},
		"WithURLs, the first plain": {
			"amqp://b.example", rig.Options(steadymq.WithURLs("amqps://mq.example?"+file+shown, "amqps://c.example")),
			map[string]greeting{
				"b.example:5672":  {plain: amqp},
				"mq.example:5671": {serverName: "mq.example", oldest: v12, newest: v13, certificates: 1, done: true},
				"c.example:5671":  {serverName: "c.example", oldest: v12, newest: v13},
			},
		},
		"WithURLs, one configuration": {
			"amqps://else.example", rig.Options(steadymq.WithURLs("amqps://mq.example:1"), trusted(&tls.Config{})),
			map[string]greeting{
				"else.example:5671": {serverName: "else.example", oldest: v12, newest: v13},
				"mq.example:1":      {serverName: "mq.example", oldest: v12, newest: v13, done: true},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				assert.Equal(r, c.want, heardBy(r, pair, c.url, c.options...))
			})
		})
	}
}
