package wire

import (
	"errors"
	"fmt"
	"io"

	"github.com/steadymq/steadymq/internal/errtext"
)

// Why a socket ends, as Cause says it.
var (
	ErrPeerClosed   = errtext.Because(errors.New("the peer closed the connection"), io.EOF)
	ErrPeerReset    = errors.New("the peer reset the connection")
	ErrUnconfirmed  = errors.New("the path to the peer is dead: nothing sent is confirmed")
	ErrReadTimeout  = errors.New("the peer went silent: read deadline passed")
	ErrWatchdog     = errors.New("no byte from the broker")
	ErrWriteTimeout = errors.New("the peer takes no more data: write deadline passed")

	// Settlements go between the driver's frames. Where those cannot be followed, a session must
	// end instead of going on without settling.
	errDriverGarbled = errors.New("the driver has written what is no AMQP frame: there is no place left for an ack")

	// Where the next frame begins, or which message is meant, is anybody's guess.
	errGarbled = errors.New("the broker sent frames that cannot be read")
)

// What is wrong with a frame, or with a message that no handler can be given.
var (
	errDepth      = fmt.Errorf("tables nest deeper than %d levels", maxDepth)
	errSize       = errors.New("a size is negative")
	errEnd        = errors.New("no end of the frame where it should be")
	errBodySize   = errors.New("a body longer than announced")
	errNotOpen    = errors.New("an answer on a channel that is not open yet")
	errHeaderSize = fmt.Errorf("its headers are larger than %d bytes", maxHeader)
)

func garbled(err error) error { return fmt.Errorf("%w: %w", errGarbled, err) }

// unread says what of a message cannot be read, and why.
func unread(what string, why error) error {
	if errors.Is(why, io.EOF) || errors.Is(why, io.ErrUnexpectedEOF) {
		return fmt.Errorf("its %s cannot be read: something is cut off", what)
	}
	return fmt.Errorf("its %s cannot be read: %w", what, why)
}

// NotAMQPError is a peer whose first octet begins no frame: a wrong port, mostly.
type NotAMQPError struct{ First byte }

func (e *NotAMQPError) Error() string {
	const text = "the peer does not speak AMQP 0-9-1"
	switch e.First {
	case 0x15: // the record of a TLS alert (RFC 8446, 5.1)
		return text + ": it answers with TLS; use an amqps URL, or the port for AMQP without TLS (5672)"
	case 'A': // a protocol header, the answer to a greeting that is not understood (AMQP 0-9-1, 4.2.2)
		return text + ", or did not understand our greeting; is there a proxy that puts bytes before it (PROXY protocol)?"
	case 'H':
		return text + ": it answers with HTTP; use the port for AMQP (5672, over TLS 5671)"
	}
	return fmt.Sprintf("%s: its first octet is %#x; check host and port", text, e.First)
}
