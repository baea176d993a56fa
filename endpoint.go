package steadymq

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// endpoint is one broker address and how to log in there.
type endpoint struct {
	uri       amqp.URI
	address   string        // host:port, all that is ever shown
	heartbeat time.Duration // of the URL's heartbeat parameter, 0 for none
}

// errBadURL never wraps the parser's error, whose text is the URL with its password.
var errBadURL = errors.New("invalid AMQP URL (not shown, it may hold a password): want amqp:// or amqps://user:password@host:port/vhost, with special characters in user, password and vhost percent-encoded (net/url.UserPassword does it)")

var errNoURL = errors.New("the URL is empty: want amqp:// or amqps://user:password@host:port/vhost, or WithURLFunc")

func parseEndpoint(text string) (endpoint, error) {
	if text == "" {
		return endpoint{}, errNoURL
	}
	uri, err := amqp.ParseURI(text)
	if err != nil {
		return endpoint{}, errBadURL
	}
	e := endpoint{uri: uri, address: net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port))}
	if uri.Port < 1 || uri.Port > 65535 {
		return endpoint{}, errBadURL
	}
	u, err := url.Parse(text)
	if err != nil {
		return endpoint{}, errBadURL
	}
	if v := u.Query().Get("heartbeat"); v != "" {
		seconds, err := strconv.Atoi(v)
		if err != nil || seconds < 1 || seconds > 600 {
			return endpoint{}, fmt.Errorf("the heartbeat parameter of the URL of host %s must be 1 to 600 seconds; a consumer without heartbeats never notices a dead path", e.address)
		}
		e.heartbeat = time.Duration(seconds) * time.Second
	}
	return e, nil
}

// tlsConfig returns the TLS configuration of a dial to e, nil for plain amqp.
// openSocket clones it and fills in the server's name.
func (e endpoint) tlsConfig(given *tls.Config) (*tls.Config, error) {
	if e.uri.Scheme != "amqps" {
		return nil, nil
	}
	if given != nil {
		return given, nil
	}
	c := &tls.Config{ServerName: e.uri.ServerName, MinVersion: tls.VersionTLS12}
	if file := e.uri.CACertFile; file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read the URL's cacertfile: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("the URL's cacertfile %s holds no PEM certificate", file)
		}
	}
	if e.uri.CertFile != "" && e.uri.KeyFile != "" {
		pair, err := tls.LoadX509KeyPair(e.uri.CertFile, e.uri.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("load the URL's certfile and keyfile: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// login returns the mechanisms the URL asks for, best first.
func (e endpoint) login(given []amqp.Authentication) []amqp.Authentication {
	if given != nil {
		return given
	}
	var auth []amqp.Authentication
	for _, name := range e.uri.AuthMechanism {
		switch name {
		case "external":
			auth = append(auth, &amqp.ExternalAuth{})
		case "amqplain":
			auth = append(auth, e.uri.AMQPlainAuth())
		case "plain":
			auth = append(auth, e.uri.PlainAuth())
		}
	}
	if auth == nil {
		auth = append(auth, e.uri.PlainAuth())
	}
	return auth
}
