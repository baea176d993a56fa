package steadymq

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
)

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

// asksForLogin tells whether a function of the user gives the credentials: they may change on the
// way, so the next try may have better ones.
func (c *config) asksForLogin() bool { return c.urlFunc != nil || c.credentials != nil }

// loginSilence is what a refused login looks like to a client that is not told: RabbitMQ
// waits 3 s and ends the socket without a word, while a lost socket ends whenever it is lost.
const loginSilence = 2500 * time.Millisecond

// errSilentRefusal is what the end of the socket after 3 s most probably means.
var errSilentRefusal = fmt.Errorf("%w: the broker ended the socket after 3s of silence, which is how RabbitMQ refuses a login without saying so: check user name, password and mechanism (a cut network path can look the same)", ErrLoginRefused)

// refusal tells a refused login from any other failure of the handshake; nil if it is none.
// The driver calls every loss of the socket at this step a wrong password, without having
// heard that from the broker.
func (l *login) refusal(err error, s *wire.Socket) error {
	var said *amqp.Error
	if errors.As(err, &said) && said.Server {
		if said.Code != amqp.AccessRefused {
			return nil
		}
		return fmt.Errorf("%w: %w: check user name, password and mechanism%s", ErrLoginRefused, said, l.hint())
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
