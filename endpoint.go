package steadymq

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// endpoint is one broker address and how to log in there.
type endpoint struct {
	uri       amqp.URI
	address   string        // host:port, all that is ever shown
	heartbeat time.Duration // of the URL's heartbeat parameter, 0 for none

	dialTimeout time.Duration // of the URL's connection_timeout parameter, 0 for none
}

// tlsConfig returns the TLS configuration of a dial to e, nil for plain amqp.
// openSocket clones it and fills in the server's name.
func (e endpoint) tlsConfig(given *tls.Config, insecure bool) (*tls.Config, error) {
	if e.uri.Scheme != "amqps" {
		return nil, nil
	}
	c, err := given, error(nil)
	if given == nil {
		c, err = e.ownTLS()
	}
	if insecure && err == nil {
		c = c.Clone()
		c.InsecureSkipVerify = true
	}
	return c, err
}

// ownTLS is what the URL asks for.
func (e endpoint) ownTLS() (*tls.Config, error) {
	c := &tls.Config{ServerName: e.uri.ServerName, MinVersion: tls.VersionTLS12}
	if file := e.uri.CACertFile; file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, &urlError{"read the URL's cacertfile", err}
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, &urlError{reason: fmt.Sprintf("the URL's cacertfile %s holds no PEM certificate", file)}
		}
	}
	if e.uri.CertFile != "" {
		pair, err := tls.LoadX509KeyPair(e.uri.CertFile, e.uri.KeyFile)
		if err != nil {
			return nil, &urlError{"load the URL's certfile and keyfile", err}
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
