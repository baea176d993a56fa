package matrix_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

// loginCells are the faults of certificates and tokens.
func loginCells(a *scenario.Authority) []cell {
	overTLS := func(test func(*trial)) func(*trial) {
		return func(r *trial) {
			r.TLS = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: a.Pool()}
			if r.Proxy != nil {
				r.Proxy.SetTarget(r.Broker.TLSAddr())
			}
			r.Must(20*time.Second, "the listener for TLS, which comes up last", func() bool {
				conn, err := tls.Dial("tcp", r.Broker.TLSAddr(), r.TLS.Clone())
				if err == nil {
					_ = conn.Close()
				}
				return err == nil
			})
			test(r)
		}
	}
	return []cell{
		{fault: "TLS: connection reset", rows: "4, 28", test: overTLS(func(r *trial) { r.suffers(r.Proxy.Reset) })},
		{fault: "TLS: broker aborts the connection", rows: "4", by: bothWay, test: overTLS(func(r *trial) { r.suffers(r.Abort) })},
		{fault: "TLS: path swallows both ways", rows: "12", test: overTLS(func(r *trial) { r.silenced(faultproxy.Both, scenario.SilentPeer) })},
		{fault: "TLS: handshake cut after n bytes", rows: "11, 26", test: overTLS(handshakeCut)},
		{fault: "TLS: certificate of a stranger", rows: "26", by: bothWay, test: overTLS(func(r *trial) {
			r.deceived(scenario.NewAuthority(r).Sign(r), "unknown authority")
		})},
		{fault: "TLS: certificate that has expired", rows: "26", by: bothWay, test: overTLS(func(r *trial) {
			r.deceived(a.Sign(r, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "expired")
		})},
		{fault: "TLS: certificate of another host", rows: "26", by: bothWay, test: overTLS(func(r *trial) {
			r.deceived(a.Sign(r, func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(192, 0, 2, 1)} }), "not 127.0.0.1")
		})},
		{fault: "TLS spoken to a port without", rows: "27", by: bothWay, test: overTLS(func(r *trial) {
			r.misled(r.PlainAddr(), r.TLSAddr(), "AMQP without TLS")
		})},
		{fault: "plain AMQP spoken to a TLS port", rows: "27", by: bothWay, test: func(r *trial) {
			r.misled(r.TLSAddr(), r.PlainAddr(), "use an amqps URL")
		}},
		{fault: "token expires, a new one per dial", rows: "24", by: bothWay, test: tokenExpires},
		{fault: "token renewed before it expires", rows: "24", by: bothWay, test: tokenRenewed},
		{fault: "token whose renewal is refused", rows: "24", by: bothWay, test: renewalRefused},
		{
			fault: "renewed token may not read", rows: "25", by: bothWay, test: renewedWithLess,
			not: func(g rabbit.Generation, _ kind) string {
				if g == rabbit.Gen43 {
					return ""
				}
				return "up to 4.2 a consumer that is there is not asked again for its permission"
			},
		},
	}
}

// ---- certificates ----

// deceived leads the consumer to a server with such a certificate for two seconds after it was
// refused.
func (r *trial) deceived(shown rabbit.TLS, reason string) {
	r.Helper()
	r.misled(impostor(r.T, shown), r.TLSAddr(), reason)
}

// misled leads the consumer to a wrong address for two seconds after that was noticed.
func (r *trial) misled(wrong, right, reason string) {
	r.Helper()
	r.begin()
	r.Lead(wrong)
	lost := time.Now()
	r.Cut()
	r.told(reason, 5*time.Second)
	r.Pause(2 * time.Second)
	assert.False(r, r.consumesSince(lost), "a session with the wrong peer")
	for _, c := range r.History() {
		var failed *steadymq.SessionError
		if c.Time.After(lost) && errors.As(c.Cause, &failed) && failed.Op == "open" {
			assert.GreaterOrEqual(r, c.RetryIn, time.Second, "it is asked slowly")
		}
	}
	at := time.Now()
	r.Lead(right)
	r.atNextTry(at, time.Now())
	r.judge()
}

// impostor is a server that only shows its certificate. It lets the client hang up.
func impostor(t *testing.T, shown rabbit.TLS) (addr string) {
	t.Helper()
	pair, err := tls.X509KeyPair(shown.Certificate, shown.Key)
	require.NoError(t, err)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
	var all sync.WaitGroup
	t.Cleanup(func() {
		assert.NoError(t, lis.Close())
		all.Wait()
	})
	all.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer func() { _ = conn.Close() }()
				_ = tls.Server(conn, config).Handshake()
				_, _ = io.Copy(io.Discard, conn)
			})
		}
	})
	return lis.Addr().String()
}

// ---- tokens ----

// tokenKey signs the tokens of the tests; the brokers are given it as the key of an OAuth 2
// provider.
const tokenKey = "a key that is not secret, for the tokens of a test"

// withTokens is the config of a broker that takes tokens, too.
func withTokens(cfg rabbit.Config) rabbit.Config {
	key := base64.RawURLEncoding.EncodeToString([]byte(tokenKey))
	cfg.Plugins = append(cfg.Plugins, "rabbitmq_auth_backend_oauth2")
	cfg.Conf = append(cfg.Conf, "auth_backends.1 = internal", "auth_backends.2 = rabbit_auth_backend_oauth2")
	cfg.Advanced = append(cfg.Advanced, `{rabbitmq_auth_backend_oauth2, [
  {resource_server_id, <<"rabbitmq">>},
  {key_config, [{default_key, <<"test">>}, {signing_keys, #{<<"test">> => {map, #{
    <<"kty">> => <<"oct">>, <<"alg">> => <<"HS256">>, <<"use">> => <<"sig">>,
    <<"kid">> => <<"test">>, <<"value">> => <<"test">>, <<"k">> => <<"`+key+`">>}}}}]}]}`)
	return cfg
}

// token is a signed token (RFC 7519) that is valid for so long and grants the rights, such as
// "read".
func token(valid time.Duration, rights ...string) (text string, expires time.Time) {
	expires = time.Now().Add(valid).Truncate(time.Second)
	scopes := []string{}
	for _, right := range rights {
		scopes = append(scopes, "rabbitmq."+right+":*/*")
	}
	part := func(claims map[string]any) string {
		text, err := json.Marshal(claims)
		if err != nil {
			panic(err)
		}
		return base64.RawURLEncoding.EncodeToString(text)
	}
	text = part(map[string]any{"alg": "HS256", "typ": "JWT", "kid": "test"}) + "." + part(map[string]any{
		"aud": []string{"rabbitmq"}, "sub": "a-service", "client_id": "a-service", "iss": "test", "scope": scopes, "exp": expires.Unix(),
	})
	mac := hmac.New(sha256.New, []byte(tokenKey))
	mac.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil)), expires
}

// granting gives the consumer credentials whose token is made when they are asked for, and counts
// how often that is. Without rights the token is none. If known is false the consumer is not told
// when the token expires.
func (r *trial) granting(valid func(asked int64) time.Duration, known bool, rights func(asked int64) []string) *atomic.Int64 {
	asked := new(atomic.Int64)
	r.Options = append(r.Options, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
		n := asked.Add(1)
		granted := rights(n)
		text, expires := token(valid(n), granted...)
		if granted == nil {
			text = "this is no token"
		}
		if !known {
			expires = time.Time{}
		}
		return steadymq.Credentials{Username: "a-service", Password: text, Expires: expires}, nil
	}))
	return asked
}

func sixSeconds(int64) time.Duration { return 6 * time.Second }

// secrets counts the tokens that were sent on a standing connection (connection.update-secret).
func (r *trial) secrets() int {
	const classConnection, updateSecret = 10, 70
	return r.passed(faultproxy.ToBroker, classConnection, updateSecret)
}

func allRights(int64) []string { return []string{"configure", "write", "read"} }

// tokenExpires: the consumer was not told when. If the broker does not look either, the token
// matters only at the next login.
func tokenExpires(r *trial) {
	asked := r.granting(func(asked int64) time.Duration {
		if asked == 1 {
			return 6 * time.Second
		}
		return time.Hour
	}, false, allRights)
	r.begin()
	at := time.Now()
	if r.gen == rabbit.Gen43 {
		change := r.AwaitLost(0, at, 7*time.Second)
		assert.ErrorContains(r, change.Cause, "credential expired")
		at = change.Time
	} else {
		r.Pause(8 * time.Second)
		assert.Zero(r, r.LostSessions())
		r.Note("the broker keeps a connection whose token has expired")
		at = time.Now()
		r.Cut()
	}
	r.ResumedSince(at, time.Now(), scenario.AtOnce)
	assert.EqualValues(r, 2, asked.Load(), "asked once per dial")
	r.judge()
}

func tokenRenewed(r *trial) {
	r.granting(sixSeconds, true, allRights)
	r.begin()
	r.Pause(13 * time.Second)
	assert.Zero(r, r.LostSessions(), "the session lives longer than its token")
	if r.ReadsTheWire() {
		assert.GreaterOrEqual(r, r.secrets(), 2, "renewed")
	}
	r.judge()
}

// renewalRefused: the second token, which is to replace the first, is not valid. The broker closes
// the connection, and the third is good.
func renewalRefused(r *trial) {
	r.granting(sixSeconds, true, func(asked int64) []string {
		if asked == 2 {
			return nil
		}
		return allRights(asked)
	})
	r.begin()
	change := r.AwaitLost(0, time.Now(), 6*time.Second)
	var said *amqp.Error
	require.ErrorAs(r, change.Cause, &said)
	assert.Equal(r, amqp.NotAllowed, said.Code)
	r.Resumed(change.Time, scenario.AtOnce)
	r.Pause(6 * time.Second) // over the next renewal
	r.judge()
	assert.EqualValues(r, 1, r.LostSessions())
	if r.ReadsTheWire() {
		assert.GreaterOrEqual(r, r.secrets(), 2, "the good token is renewed, too")
	}
}

// renewedWithLess: the broker cancels the consumer that may not read any more, and refuses the next
// one until a token allows it.
func renewedWithLess(r *trial) {
	var less atomic.Bool
	r.granting(sixSeconds, true, func(int64) []string {
		if less.Load() {
			return []string{"configure", "write"}
		}
		return allRights(0)
	})
	r.begin()
	less.Store(true)
	change := r.AwaitLost(0, time.Now(), 6*time.Second)
	assert.ErrorContains(r, change.Cause, "cancelled")
	r.told("refused for user", 5*time.Second)
	r.Pause(2 * time.Second)
	at := time.Now()
	less.Store(false)
	r.Resumed(at, operatorCap+scenario.AtOnce)
	r.judge()
}
