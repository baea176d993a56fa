package steadymq

import (
	"errors"
	"fmt"
	"strings"

	"github.com/steadymq/steadymq/internal/errtext"
)

// reason is the text of Err without what the rest of the sentence says: step and
// host, which the errors of net repeat, and whose error it is.
func (e *SessionError) reason() string {
	text := errtext.Plain(fmt.Sprint(e.Err), e.Err, e.Host != "")
	if e.Host != "" {
		text = strings.NewReplacer("dial "+e.Host+": ", "", " with "+e.Host, "").Replace(text)
	}
	return errtext.OneLine(strings.ReplaceAll(text, "steadymq: ", ""))
}

// reasonOf is the text of a cause for a log line that names queue, session and host
// by itself.
func reasonOf(cause error) string {
	at, ok := cause.(*SessionError) //nolint:errorlint // what wraps it has a text of its own
	if !ok {
		return errtext.Brief(cause)
	}
	return errtext.Brief(errors.New(at.step()+": "+at.reason())) + advice(at.Op, at.Err)
}
