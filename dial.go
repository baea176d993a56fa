package steadymq

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/wire"
)

// The way to a broker: TCP, TLS and the login, each with the function of the user that may take
// part in it. openConnection calls all of it.

// openSocket dials address, does the TLS handshake if tlsConfig is given, and returns the started
// socket. All of it ends with ctx, whose cause is then in the error. It calls abandoned for a
// callback of the TLS configuration that had to be left behind.
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

// clientTLS copies the caller's config, because the name to verify differs per host: written into a
// shared config it would be the name of the next host, too.
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

// withCause adds why ctx ended to an err that says only that it ended.
func withCause(ctx context.Context, err error) error {
	cause := causeOf(ctx)
	if cause == nil || errors.Is(err, cause) {
		return err
	}
	return errtext.Because(cause, err)
}

// dialer returns the function that dials e, within the limit for a dial. The function sets step
// once it has a connection.
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

// guardedDial calls the user's dial function as a userCall.
func guardedDial(c *config, abandoned func()) wire.DialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return userCall[net.Conn]{
			option: "WithDialer",
			f: func(ctx context.Context) (net.Conn, error) {
				conn, err := c.dial(ctx, network, address)
				switch {
				case err == nil && isNil(conn):
					return nil, errNoConn
				case err != nil && !isNil(conn): // nobody else closes it
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

// step is how far a try has come. The goroutine of the try writes it, and others may read it at any
// time.
type step struct{ name atomic.Value }

func newStep(name string) *step {
	s := new(step)
	s.at(name)
	return s
}

func (s *step) at(name string) { s.name.Store(name) }

func (s *step) String() string { return s.name.Load().(string) }

// authFailureClose is the capability of a client that wants to be told of a refused login: then
// RabbitMQ says 403 at once. Without it the broker keeps silent for 3 s and ends the socket without
// a word (https://www.rabbitmq.com/docs/auth-notification).
const authFailureClose = "authentication_failure_close"

// login is one try to log in. One goroutine at a time uses it: that of the try, which waits in
// amqp.Open meanwhile.
type login struct {
	ctx        context.Context   // of the try
	properties amqp.Table        // of the client; the same map as the driver's
	abort      func(cause error) // ends the socket
	abandoned  func()
	mechanisms []amqp.Authentication // a mechanism around each one given
	asked      []string              // the names of the mechanisms
	user       string                // the user name, if it is known
	failed     error                 // of a mechanism of the user's that failed
	answered   time.Time             // when the response went out
}

// newLogin wraps the mechanisms for a dial with these properties. The caller sets abort before it
// opens the connection.
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

// mechanism is an amqp.Authentication around another one, which learns when the driver asks for the
// response.
type mechanism struct {
	given amqp.Authentication
	name  string
	login *login
}

// Mechanism implements amqp.Authentication.
func (m *mechanism) Mechanism() string { return m.name }

// Response implements amqp.Authentication. The driver overwrites the capabilities, asks for the
// response and then sends both: so this is the moment to add a capability.
func (m *mechanism) Response() string {
	l := m.login
	l.user = userOf(m.given)
	capabilities, _ := l.properties["capabilities"].(amqp.Table)
	if capabilities == nil {
		capabilities = make(amqp.Table)
		l.properties["capabilities"] = capabilities
	}
	capabilities[authFailureClose] = true
	response, err := l.ask(m.given.Response)
	if err != nil {
		l.failed = fmt.Errorf("the response of the login mechanism %s: %w", m.name, err)
		l.abort(l.failed) // the driver has no other way to send nothing
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

// loginSilence is the shortest silence before the end of the socket that counts as a refused login.
// RabbitMQ waits 3 s before it ends the socket of a client that it does not tell, while a lost
// socket may end at any time.
const loginSilence = 2500 * time.Millisecond

// refusal returns the error of a refused login, or nil if the handshake failed for another reason.
// The driver calls every loss of the socket at this step a wrong password, although the broker has
// not said so.
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

// hint says what a user can hardly find out alone: the limits of the user guest.
func (l *login) hint() string {
	if l.user != "guest" {
		return ""
	}
	return "; RabbitMQ lets the user guest in from its own host only, so make another user (https://www.rabbitmq.com/docs/access-control#loopback-users)"
}

const (
	slowConnect  = 2 * time.Second  // the longest that a try takes without a line about it
	slowInterval = 10 * time.Minute // the shortest time between two such lines
)

// slowTry is a try for a session that takes longer than slowConnect.
type slowTry struct {
	host string // "" until WithURLFunc has named it
	step *step
}

// tell writes the line about it, with those whom it concerns.
func (t slowTry) tell(r *reporter, limit *rateLimited, whom ...slog.Attr) {
	left, ok := limit.allow(slowInterval)
	if !ok {
		return
	}
	attrs := append(whom, slog.String("step", t.step.String()), durationAttr("for", slowConnect), suppressed(left))
	if t.host != "" {
		attrs = append(attrs, slog.String("host", t.host))
	}
	r.info("still connecting", attrs...)
}
