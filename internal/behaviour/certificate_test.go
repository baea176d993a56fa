package behaviour_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestAdviceOnCertificates(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*tls.Config)
		says   string
	}{
		"unknown authority": {func(c *tls.Config) { c.RootCAs = x509.NewCertPool() }, "trust its CA by cacertfile in the URL"},
		"another name":      {func(c *tls.Config) { c.ServerName = "other.test" }, "use a host name of the certificate in the URL"},
		"expired": {
			func(c *tls.Config) { c.Time = func() time.Time { return time.Now().AddDate(100, 0, 0) } },
			"renew the broker's certificate, or set the clock",
		},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				config := r.Broker.TLSConfig()
				c.change(config)
				r.Run(rig.Ack, steadymq.WithTLSConfig(config))
				r.Wait(time.Second)
				require.NotEmpty(r, r.Causes())
				assert.ErrorContains(r, r.Causes()[0], c.says)
				assert.Contains(r, r.Log.Last("level=WARN"), c.says)
			}, steadymqtest.WithTLS())
		})
	}
}

func TestInsecureSkipVerifySwitchesVerificationOff(t *testing.T) {
	for name, with := range map[string][]steadymq.Option{
		"alone":                    nil,
		"with a TLS configuration": rig.Options(steadymq.WithTLSConfig(&tls.Config{MinVersion: tls.VersionTLS12})),
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack, append(with, steadymq.WithInsecureSkipVerify())...)
			}, steadymqtest.WithTLS())
		})
	}
	t.Run("refused without TLS", func(t *testing.T) {
		_, err := steadymq.New("amqp://h/", rig.Queue, steadymq.WithInsecureSkipVerify())
		require.ErrorContains(t, err, "WithInsecureSkipVerify: the URL has the scheme amqp")
		require.ErrorAs(t, err, new(*steadymq.OptionError))
	})
	t.Run("refused without TLS, from WithURLFunc", func(t *testing.T) {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Run(rig.Ack, steadymq.WithInsecureSkipVerify(), steadymq.WithURLFunc(func(context.Context) (string, error) { return r.Broker.URL, nil }))
			r.Wait(time.Second)
			require.NotEmpty(r, r.Causes())
			assert.ErrorContains(r, r.Causes()[0], "WithInsecureSkipVerify")
		})
	})
}

func TestTLSIsVerifiedPerHost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		config := r.Broker.TLSConfig()
		r.Consuming(rig.Ack, steadymq.WithTLSConfig(config))
		for i := range 2 {
			r.Wait(time.Minute)
			r.Broker.Host(i).Kill()
			r.Wait(5 * time.Second)
			assert.Equal(r, steadymq.Consuming, r.Consumer.State())
			r.Broker.Host(i).Restart()
		}
		assert.Empty(r, config.ServerName, "the caller's config is untouched")
		for _, cause := range r.Causes() {
			assert.NotContains(r, cause.Error(), "certificate")
		}
	}, steadymqtest.WithTLS(), steadymqtest.WithHosts(2))
}

func TestUntrustedCertificateIsNamedAndRetried(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack)
		r.Wait(10 * time.Second)
		require.Empty(r, r.Result)
		require.NotEmpty(r, r.Causes())
		assert.ErrorContains(r, r.Causes()[0], "certificate")
		assert.GreaterOrEqual(r, r.ShortestWait(), time.Second)
	}, steadymqtest.WithTLS())
}
