package steadymq

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/amqpurl"
	"github.com/steadymq/steadymq/internal/wire"
)

// endpoint is one broker address and how to log in there.
type endpoint struct {
	uri       amqp.URI
	address   string        // host:port, the only part that is ever shown
	heartbeat time.Duration // the URL's parameter heartbeat, 0 for none

	dialTimeout time.Duration // the URL's parameter connection_timeout, 0 for none
}

// tlsConfig returns the TLS configuration of a dial to e, nil for plain amqp. openSocket clones it
// and sets the server's name.
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

// ownTLS returns the TLS configuration that the URL asks for.
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

// login returns the login mechanisms: the given ones, else those that the URL asks for, best first.
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

// maxDuration is the longest that an option may last, as what a parameter of the URL says.
const maxDuration = amqpurl.MaxDuration

// otherPorts are the ports on which RabbitMQ speaks something other than AMQP, unless it is
// configured otherwise (https://www.rabbitmq.com/docs/networking#ports).
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

// wrongPortError says that a peer did not answer as a broker does, on a port that is known to be
// for something else.
type wrongPortError struct {
	port, use string
	err       error // what the peer did
}

func (e *wrongPortError) Error() string {
	return fmt.Sprintf("port %s is RabbitMQ's %s; AMQP is 5672, or 5671 with TLS (%s)", e.port, e.use, e.answer())
}

// answer says what the peer did, without advice: the port has given that already.
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

// namePort adds to err what the port of e is for, if the peer did not answer as a broker does: it
// sent other bytes, ended the socket or did not answer at all.
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

// copyTLS copies a configuration that the user gives, so that later changes of it have no effect
// here.
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

// urlError says what a user has to change in a URL, or in a file that it names. The reason shows no
// part of the URL.
type urlError struct {
	reason string
	err    error // nil, or why a file cannot be read
}

func (e *urlError) Error() string {
	if e.err != nil {
		return e.reason + ": " + e.err.Error()
	}
	return e.reason
}

func (e *urlError) Unwrap() error { return e.err }

// parseEndpoint reads a URL. New and WithURLFunc call it.
func parseEndpoint(text string) (endpoint, error) {
	u, wrong := amqpurl.Parse(text)
	if wrong != "" {
		return endpoint{}, &urlError{reason: wrong}
	}
	return endpoint{
		uri:       u.URI,
		address:   net.JoinHostPort(u.Host, strconv.Itoa(u.Port)),
		heartbeat: u.Heartbeat, dialTimeout: u.DialTimeout,
	}, nil
}
