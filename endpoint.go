package steadymq

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
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

const (
	minDuration = time.Millisecond // below it a unit was forgotten
	maxDuration = 24 * time.Hour

	maxWriteDelay = 100 * time.Millisecond
	maxTagPrefix  = 200 // a consumer tag holds 255 bytes, the rest makes it unique
)

// otherPorts are those on which RabbitMQ speaks something else than AMQP, unless it is
// told otherwise (https://www.rabbitmq.com/docs/networking#ports).
var otherPorts = map[string]string{
	"15672": "port for HTTP (management)",
	"15671": "port for HTTPS (management)",
	"5552":  "port for streams, which have a protocol of their own",
	"5551":  "port for streams over TLS, which have a protocol of their own",
	"1883":  "port for MQTT",
	"8883":  "port for MQTT over TLS",
	"61613": "port for STOMP",
	"61614": "port for STOMP over TLS",
	"25672": "port for other nodes of the cluster",
	"4369":  "port of epmd, where nodes of a cluster look for each other",
}

// wrongPortError is a peer that gives no answer, or none of a broker, on a port known to be
// for something else.
type wrongPortError struct {
	port, use string
	err       error // what the peer did
}

func (e *wrongPortError) Error() string {
	return fmt.Sprintf("port %s is RabbitMQ's %s; AMQP is 5672, or 5671 with TLS (%s)", e.port, e.use, e.answer())
}

// answer is what the peer did, without the advice that the port has given already.
func (e *wrongPortError) answer() string {
	switch {
	case errors.As(e.err, new(*wire.NotAMQPError)):
		return "the peer does not speak AMQP 0-9-1"
	case errors.As(e.err, new(tls.RecordHeaderError)):
		return "the peer does not speak TLS"
	}
	return e.err.Error()
}

func (e *wrongPortError) Unwrap() error { return e.err }

// namePort says what the port of e is for, if the peer there did not answer as a broker
// does: by other bytes, by ending the socket, or not at all.
func namePort(e endpoint, err error) error {
	port := strconv.Itoa(e.uri.Port)
	use := otherPorts[port]
	if port == "5671" && e.uri.Scheme == "amqp" {
		use = "port for AMQP over TLS, which takes an amqps URL"
	}
	if use == "" || !unlikeABroker(err) {
		return err
	}
	return &wrongPortError{port, use, err}
}

func unlikeABroker(err error) bool {
	for _, end := range []error{io.EOF, io.ErrUnexpectedEOF, wire.ErrPeerReset, syscall.ECONNRESET, errSetupTimeout} {
		if errors.Is(err, end) {
			return true
		}
	}
	return errors.As(err, new(*wire.NotAMQPError)) || errors.As(err, new(tls.RecordHeaderError))
}

// copyTLS copies what a user gives, so that it can change afterwards.
func copyTLS(c *tls.Config) *tls.Config {
	if c == nil {
		return nil
	}
	c = c.Clone()
	c.Certificates = slices.Clone(c.Certificates)
	if c.RootCAs != nil {
		c.RootCAs = c.RootCAs.Clone()
	}
	return c
}
