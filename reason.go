package steadymq

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

// meant is an error of the system in plain words. Its text is what it means, the
// chain has both.
type meant struct{ what, err error }

func because(what, err error) error { return &meant{what, err} }

func (m *meant) Error() string   { return m.what.Error() }
func (m *meant) Unwrap() []error { return []error{m.what, m.err} }

// joined is what errors.Join makes, in one line.
type joined struct{ errs []error }

func join(errs ...error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return &joined{errs}
}

func (j *joined) Error() string {
	texts := make([]string, len(j.errs))
	for i, err := range j.errs {
		texts[i] = oneLine(fmt.Sprint(err))
	}
	return strings.Join(texts, "; ")
}

func (j *joined) Unwrap() []error { return j.errs }

// reason is the text of Err without what the rest of the sentence says: step and
// host, which the errors of net repeat, and whose error it is.
func (e *SessionError) reason() string {
	text := plain(fmt.Sprint(e.Err), e.Err, e.Host != "")
	if e.Host != "" {
		text = strings.NewReplacer("dial "+e.Host+": ", "", " with "+e.Host, "").Replace(text)
	}
	return oneLine(strings.ReplaceAll(text, "steadymq: ", ""))
}

// plain replaces in text what errors of err's tree say in a roundabout way. Where
// the host is said already, so are the addresses of a net.OpError.
func plain(text string, err error, addressed bool) string {
	switch e := err.(type) { //nolint:errorlint // every error of the tree is looked at
	case *net.OpError:
		told := e.Op == "remote error" || e.Op == "local error" // of TLS: whose it is, no address
		if addressed && e.Err != nil && !told {
			text = strings.ReplaceAll(text, e.Error(), e.Err.Error())
		}
	case *os.SyscallError:
		text = strings.ReplaceAll(text, e.Error(), e.Err.Error())
	case *amqp.Error:
		if e != nil {
			text = strings.ReplaceAll(text, e.Error(), brokerText(e))
		}
	}
	switch e := err.(type) { //nolint:errorlint // as above
	case interface{ Unwrap() error }:
		text = plain(text, e.Unwrap(), addressed)
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			text = plain(text, err, addressed)
		}
	}
	return text
}

// brokerText is what the broker said, with the code it said it by. The codes that
// the driver makes up say nothing, and its reasons may be errors of its own.
func brokerText(e *amqp.Error) string {
	reason := e.Reason
	for {
		_, quoted, nested := strings.Cut(reason, `) Reason: "`)
		if !nested || !strings.HasPrefix(reason, "Exception (") {
			break
		}
		inner, err := strconv.Unquote(`"` + quoted)
		if err != nil {
			break
		}
		reason = inner
	}
	if e.Server {
		return strings.TrimSuffix(strings.TrimSpace(strconv.Itoa(e.Code)+" "+reason), ".")
	}
	return reason
}

// oneLine keeps a text from breaking up a log: errors.Join puts line breaks in.
func oneLine(text string) string {
	if !strings.ContainsAny(text, "\r\n") {
		return text
	}
	lines := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' })
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, "; ")
}

// textLimit bounds what a log line quotes of an error, in bytes.
const textLimit = 500

// brief is the text of an error of the user, for a log line. fmt recovers the panic
// of an Error method.
func brief(err error) string {
	text := oneLine(fmt.Sprint(err))
	if len(text) <= textLimit {
		return text
	}
	return strings.ToValidUTF8(text[:textLimit], "") + "..."
}

// reasonOf is the text of a cause for a log line that names queue, session and host
// by itself.
func reasonOf(cause error) string {
	at, ok := cause.(*SessionError) //nolint:errorlint // what wraps it has a text of its own
	if !ok {
		return brief(cause)
	}
	return brief(errors.New(at.step()+": "+at.reason())) + advice(at.Op, at.Err)
}
