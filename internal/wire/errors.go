package wire

import (
	"errors"
	"io"

	"github.com/steadymq/steadymq/internal/errtext"
)

var (
	ErrPeerClosed   = errtext.Because(errors.New("the peer closed the connection"), io.EOF)
	ErrPeerReset    = errors.New("the peer reset the connection")
	ErrUnconfirmed  = errors.New("the path to the peer is dead: nothing sent is confirmed")
	ErrReadTimeout  = errors.New("the peer went silent: read deadline passed")
	ErrWatchdog     = errors.New("no byte from the broker")
	ErrWriteTimeout = errors.New("the peer takes no more data: write deadline passed")
	errAstray       = errors.New("the driver has written what is no AMQP frame: there is no place left for an ack")
)
