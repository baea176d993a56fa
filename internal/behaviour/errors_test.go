package behaviour_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/wire"
)

// A reason does not repeat what stands around it, and is one line; the chain of errors is
// unchanged.
func TestErrorsSayAThingOnce(t *testing.T) {
	errTooLate := errors.New("too late")
	said := func(code int, text string) error { return &amqp.Error{Code: code, Reason: text, Server: true} }
	address := &net.TCPAddr{IP: net.IPv4(10, 0, 0, 7), Port: 5672}
	refused := &net.OpError{Op: "dial", Net: "tcp", Addr: address, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	reset := &net.OpError{Op: "read", Net: "tcp", Source: address, Addr: address, Err: os.NewSyscallError("read", syscall.ECONNRESET)}
	driver := &amqp.Error{Code: 501, Reason: (&amqp.Error{Code: 501, Reason: `frame "x" could not be parsed`}).Error()}
	for _, c := range []struct {
		op   string
		err  error
		want string
	}{
		{"dial", refused, "dial mq1:5672: connection refused"},
		{"dial", errtext.Because(errTooLate, refused), "dial mq1:5672: too late"},
		{"dial", fmt.Errorf("dial mq1:5672: %w", context.DeadlineExceeded), "dial mq1:5672: context deadline exceeded"},
		{"dial", errors.Join(refused, errTooLate), "dial mq1:5672: connection refused; too late"},
		{"dial", &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "mq1"}}, "dial mq1:5672: lookup mq1: no such host"},
		{"open", fmt.Errorf("tls handshake with mq1:5672: %w", io.EOF), "open mq1:5672: tls handshake: EOF"},
		{"open", &net.OpError{Op: "remote error", Err: tls.AlertError(42)}, "open mq1:5672: remote error: tls: bad certificate"},
		{"open", fmt.Errorf("lost while logging in: %w", errtext.Because(wire.ErrPeerReset, reset)), "open mq1:5672: lost while logging in: the peer reset the connection"},
		{"lost", wire.ErrPeerClosed, "lost mq1:5672: the peer closed the connection"},
		{"lost", driver, `lost mq1:5672: frame "x" could not be parsed`},
		{"channel", amqp.ErrClosed, "channel mq1:5672: channel/connection is not open"},
		{"consume", said(404, "NOT_FOUND - no queue 'orders' in vhost '/'"), "consume mq1:5672: 404 NOT_FOUND - no queue 'orders' in vhost '/'; it is asked for again until someone has declared it, which WithQueue or WithTopology can do"},
		{"open", fmt.Errorf("%w: %w: check it", steadymq.ErrLoginRefused, said(403, "ACCESS_REFUSED - see the logfile.")), "open mq1:5672: login refused: 403 ACCESS_REFUSED - see the logfile: check it"},
		{"topology", fmt.Errorf("bind: %w", said(403, "ACCESS_REFUSED - no")), "topology mq1:5672: bind: 403 ACCESS_REFUSED - no; give the user the permission (rabbitmqctl set_permissions)"},
		{"topology", &steadymq.PanicError{Value: "a\nb"}, "topology mq1:5672: panic: a; b"},
		{"lost", nil, "lost mq1:5672: <nil>"},
	} {
		err := &steadymq.SessionError{Queue: "orders", Host: "mq1:5672", Op: c.op, Session: 7, Err: c.err}
		assert.Equal(t, "steadymq: queue orders: session 7: "+c.want, err.Error())
		assert.Equal(t, c.err, err.Unwrap())
	}
}

// The addresses of a user's own calls are kept.
func TestErrorsOfOtherPlacesKeepTheirAddresses(t *testing.T) {
	vault := &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 9), Port: 8200}, Err: syscall.ECONNREFUSED}
	err := &steadymq.SessionError{Op: "dial", Err: fmt.Errorf("WithURLFunc: %w", vault)}
	assert.Contains(t, err.Error(), "WithURLFunc: dial tcp 10.0.0.9:8200: connection refused")
}

func TestErrorsOfRunStayInOneLine(t *testing.T) {
	drain := &steadymq.DrainError{Handlers: 2, Limit: 1}
	lost := &steadymq.SessionError{Op: "lost", Err: wire.ErrPeerClosed}
	err := errtext.Join(drain, nil, lost)
	assert.NotContains(t, err.Error(), "\n")
	assert.ErrorIs(t, err, steadymq.ErrDrainTimeout)
	assert.ErrorIs(t, err, wire.ErrPeerClosed)
	assert.Equal(t, error(lost), errtext.Join(nil, lost))
	assert.NoError(t, errtext.Join(nil, nil))
}
