// Package errtext makes the texts of errors: plain, in one line, and each thing once.
package errtext

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

// meant is an error with a text of its own.
type meant struct{ what, err error }

// Because returns an error of the system in plain words: its text is that of what, the chain has
// both.
func Because(what, err error) error { return &meant{what, err} }

func (m *meant) Error() string   { return m.what.Error() }
func (m *meant) Unwrap() []error { return []error{m.what, m.err} }

type joined struct{ errs []error }

// Join is errors.Join in one line.
func Join(errs ...error) error {
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
		texts[i] = OneLine(fmt.Sprint(err))
	}
	return strings.Join(texts, "; ")
}

func (j *joined) Unwrap() []error { return j.errs }

// Plain replaces in text what errors of err's tree say in a roundabout way. Where
// the host is said already, so are the addresses of a net.OpError.
func Plain(text string, err error, addressed bool) string {
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
			text = strings.ReplaceAll(text, e.Error(), BrokerText(e))
		}
	}
	switch e := err.(type) { //nolint:errorlint // as above
	case interface{ Unwrap() error }:
		text = Plain(text, e.Unwrap(), addressed)
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			text = Plain(text, err, addressed)
		}
	}
	return text
}

// BrokerText is what the broker said, with the code it said it by. The codes that
// the driver makes up say nothing, and its reasons may be errors of its own.
func BrokerText(e *amqp.Error) string {
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

// OneLine keeps a text from breaking up a log: errors.Join puts line breaks in.
func OneLine(text string) string {
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

// Brief is the text of an error of the user, for a log line. fmt recovers the panic
// of an Error method.
func Brief(err error) string {
	text := OneLine(fmt.Sprint(err))
	if len(text) <= textLimit {
		return text
	}
	return strings.ToValidUTF8(text[:textLimit], "") + "..."
}
