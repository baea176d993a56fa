package steadymq

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/wire"
)

// openSocket dials address, shakes hands if tlsConfig is given, and returns
// the started socket. All of it ends with ctx, whose cause is then in the error.
// abandoned is told of a callback of the TLS configuration that has to be left behind.
func openSocket(ctx context.Context, dial wire.DialFunc, address string, tlsConfig *tls.Config, o wire.Options, abandoned func()) (*wire.Socket, error) {
	raw, err := dial(ctx, "tcp", address)
	if err != nil {
		return nil, withCause(ctx, err)
	}
	if tlsConfig == nil {
		return wire.NewSocket(raw, o), nil
	}
	conn := tls.Client(raw, clientTLS(tlsConfig, address))
	_, err = userCall[struct{}]{
		option: "WithTLSConfig",
		f:      func(ctx context.Context) (struct{}, error) { return struct{}{}, conn.HandshakeContext(ctx) },
		left:   abandoned,
		bare:   true,
	}.run(ctx)
	if err != nil {
		wire.Abort(raw)
		return nil, withCause(ctx, fmt.Errorf("tls handshake with %s: %w", address, explainTLS(err)))
	}
	return wire.NewSocket(conn, o), nil
}

// explainTLS says what to do about a peer that answers without TLS.
func explainTLS(err error) error {
	var record tls.RecordHeaderError
	if !errors.As(err, &record) {
		return err
	}
	if bytes.HasPrefix(record.RecordHeader[:], []byte("AMQP")) {
		return fmt.Errorf("%w: the peer speaks AMQP without TLS; use its port for TLS (5671), or an amqp URL where the path is safe", err)
	}
	return fmt.Errorf("%w; check host and port (5671 for AMQP over TLS)", err)
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

// clientTLS copies the caller's config: the name to verify differs per host,
// and writing it into a shared config verifies the next host as this one.
func clientTLS(c *tls.Config, address string) *tls.Config {
	c = c.Clone()
	if c.ServerName == "" {
		c.ServerName = address
		if host, _, err := net.SplitHostPort(address); err == nil {
			c.ServerName = host
		}
	}
	c.MinVersion = max(c.MinVersion, tls.VersionTLS12)
	return c
}

// withCause says why ctx ended where err only says that it did.
func withCause(ctx context.Context, err error) error {
	cause := causeOf(ctx)
	if cause == nil || errors.Is(err, cause) {
		return err
	}
	return errtext.Because(cause, err)
}

// dialer bounds the dial to e and notes that it succeeded.
func (c *config) dialer(e endpoint, step *step, abandoned func()) wire.DialFunc {
	limit := c.dialTimeoutOf(e)
	dial := wire.DefaultDial(limit, c.heartbeatOf(e)*3/2)
	if c.dial != nil {
		dial = c.guardedDial(abandoned)
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		conn, err := dial(ctx, network, address)
		if err == nil {
			step.at("open")
		}
		return conn, err
	}
}

var errNoConn = errors.New("WithDialer: the function returned neither a connection nor an error")

// guardedDial is the user's dial.
func (c *config) guardedDial(abandoned func()) wire.DialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return userCall[net.Conn]{
			option: "WithDialer",
			f: func(ctx context.Context) (net.Conn, error) {
				conn, err := c.dial(ctx, network, address)
				switch {
				case err == nil && isNil(conn):
					return nil, errNoConn
				case err != nil && !isNil(conn): // nobody would close it
					wire.Abort(conn)
				}
				return conn, err
			},
			left: abandoned,
			late: wire.Abort,
			bare: true,
		}.run(ctx)
	}
}
