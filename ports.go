package steadymq

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"strconv"
	"syscall"

	"github.com/steadymq/steadymq/internal/wire"
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
