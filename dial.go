package steadymq

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

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
func dialer(c *config, e endpoint, step *step, abandoned func()) wire.DialFunc {
	limit := c.dialTimeoutOf(e)
	dial := wire.DefaultDial(limit, c.heartbeatOf(e)*3/2)
	if c.dial != nil {
		dial = guardedDial(c, abandoned)
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
func guardedDial(c *config, abandoned func()) wire.DialFunc {
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

// step is how far a try has come. It may be read while the try goes on.
type step struct{ name atomic.Value }

func newStep(name string) *step {
	s := new(step)
	s.at(name)
	return s
}

func (s *step) at(name string) { s.name.Store(name) }

func (s *step) String() string { return s.name.Load().(string) }

// toldOfRefusals is the capability of a client that wants to be told of a refused login:
// RabbitMQ then says 403 at once. Without it the broker keeps silent for 3 s and ends the
// socket without a word (https://www.rabbitmq.com/docs/auth-notification).
const toldOfRefusals = "authentication_failure_close"

// login is one try to log in.
type login struct {
	ctx        context.Context // of the try
	properties amqp.Table      // the client's, the same map as the driver's
	abort      func(cause error)
	abandoned  func()
	mechanisms []amqp.Authentication // ours, around those given
	asked      []string              // their names
	user       string                // who asked to be let in, where we know
	failed     error                 // a mechanism of the user's that failed
	answered   time.Time             // when the response went out
}

// newLogin wraps the mechanisms for a dial with these properties. abort ends its socket.
func newLogin(ctx context.Context, given []amqp.Authentication, properties amqp.Table, abandoned func()) (*login, error) {
	l := &login{ctx: ctx, properties: properties, abandoned: abandoned}
	for _, m := range given {
		name, err := l.ask(m.Mechanism)
		if err != nil {
			return nil, fmt.Errorf("the name of a login mechanism: %w", err)
		}
		l.asked = append(l.asked, name)
		l.mechanisms = append(l.mechanisms, &mechanism{given: m, name: name, login: l})
	}
	return l, nil
}

// mechanism is an amqp.Authentication around another one.
type mechanism struct {
	given amqp.Authentication
	name  string
	login *login
}

// Mechanism implements amqp.Authentication.
func (m *mechanism) Mechanism() string { return m.name }

// Response implements amqp.Authentication. The driver overwrites the capabilities, asks for
// the response and then sends both: this is the moment to add one.
func (m *mechanism) Response() string {
	l := m.login
	l.user = userOf(m.given)
	capabilities, _ := l.properties["capabilities"].(amqp.Table)
	if capabilities == nil {
		capabilities = make(amqp.Table)
		l.properties["capabilities"] = capabilities
	}
	capabilities[toldOfRefusals] = true
	response, err := l.ask(m.given.Response)
	if err != nil {
		l.failed = fmt.Errorf("the response of the login mechanism %s: %w", m.name, err)
		l.abort(l.failed) // the driver knows no other way to send nothing
	}
	l.answered = time.Now()
	return response
}

func userOf(a amqp.Authentication) string {
	switch a := a.(type) {
	case *amqp.PlainAuth:
		return a.Username
	case *amqp.AMQPlainAuth:
		return a.Username
	}
	return ""
}

// ask calls a function of a mechanism, which may be the user's.
func (l *login) ask(f func() string) (string, error) {
	return userCall[string]{
		option: "WithSASL",
		f:      func(context.Context) (string, error) { return f(), nil },
		left:   l.abandoned,
	}.run(l.ctx)
}

// loginSilence is what a refused login looks like to a client that is not told: RabbitMQ
// waits 3 s and ends the socket without a word, while a lost socket ends whenever it is lost.
const loginSilence = 2500 * time.Millisecond

// refusal tells a refused login from any other failure of the handshake; nil if it is none.
// The driver calls every loss of the socket at this step a wrong password, without having
// heard that from the broker.
func (l *login) refusal(err error, s *wire.Socket) error {
	var brokerErr *amqp.Error
	if errors.As(err, &brokerErr) && brokerErr.Server {
		if brokerErr.Code != amqp.AccessRefused {
			return nil
		}
		return fmt.Errorf("%w: %w: check user name, password and mechanism%s", ErrLoginRefused, brokerErr, l.hint())
	}
	if errors.Is(err, amqp.ErrSASL) {
		return fmt.Errorf("%w: the broker offers the login mechanisms %q and none of %q (WithSASL, or auth_mechanism in the URL)",
			ErrLoginRefused, s.Mechanisms(), strings.Join(l.asked, " "))
	}
	lost := s.Cause()
	ended := lost == nil || errors.Is(lost, wire.ErrPeerClosed) || errors.Is(lost, wire.ErrPeerReset)
	if errors.Is(err, amqp.ErrCredentials) && time.Since(l.answered) >= loginSilence && ended {
		return fmt.Errorf("%w%s", errSilentRefusal, l.hint())
	}
	return nil
}

// hint says what nobody finds out by himself.
func (l *login) hint() string {
	if l.user != "guest" {
		return ""
	}
	return "; RabbitMQ lets the user guest in from its own host only, so make another user (https://www.rabbitmq.com/docs/access-control#loopback-users)"
}
