package steadymq

import (
	"context"
	"errors"
	"time"
)

// attempt is one try to get a session.
type attempt struct {
	conn    *connection // that the session is on
	own     bool        // this try has opened the connection
	session *session
	err     error
}

var errNoResult = errors.New("the try ended without a result: did a function of yours call runtime.Goexit?")

// tryGrace is how long a try may outlive its context: a moment longer than the user's
// function in it may.
const tryGrace = abandonGrace + 100*time.Millisecond

// runBounded runs try and returns its result, or an error once ctx has ended and try does not
// come back: a call of the driver that hangs returns with the end of its connection, which
// waits until no other session lives there. A result that comes too late is closed. step
// tells how far the try has come.
func runBounded(ctx context.Context, try func() attempt, step *step) attempt {
	result := make(chan attempt)
	give := make(chan struct{})
	go func() {
		a := attempt{err: &SessionError{Op: step.String(), Err: errNoResult}} // of a runtime.Goexit
		defer func() {
			select {
			case result <- a:
			case <-give:
				a.discard()
			}
		}()
		a = try()
	}()
	select {
	case a := <-result:
		return a
	case <-ctx.Done():
	}
	grace := time.NewTimer(tryGrace)
	defer grace.Stop()
	select {
	case a := <-result:
		return a
	case <-grace.C:
		close(give)
		return attempt{err: &SessionError{Op: step.String(), Err: causeOf(ctx)}}
	}
}

// discard closes what a late try has opened. The connection it was given belongs to another.
func (a attempt) discard() {
	if a.session != nil {
		close(a.session.stop)
		<-a.session.done
	}
	if a.own && a.conn != nil {
		a.conn.close(closeRequest{limit: a.conn.closeTimeout})
	}
}
