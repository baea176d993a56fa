package steadymq

import (
	"context"
	"errors"
	"time"
)

// attempt is the result of one try to set up a session, or only a connection. The supervisor and
// the prober make tries, by runBounded.
type attempt struct {
	conn    *connection // the connection of the session
	own     bool        // this try has opened conn
	session *session
	err     error
}

var errNoResult = errors.New("the try ended without a result: did a function of yours call runtime.Goexit?")

// tryGrace is how long a try may outlive its context: a little longer than a user's function in it
// may.
const tryGrace = abandonGrace + 100*time.Millisecond

// runBounded runs try and returns its result, or an error if try does not return after ctx has
// ended. A call of the driver that hangs returns at the end of its connection, which may wait until
// no other session has borrowed it. A result that comes too late is discarded. step says how far
// the try has come.
func runBounded(ctx context.Context, try func() attempt, step *step) attempt {
	result := make(chan attempt)
	give := make(chan struct{})
	go func() {
		a := attempt{err: &SessionError{Op: step.String(), Err: errNoResult}} // after a runtime.Goexit
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

// discard closes what a late try has opened. A connection that the try was given belongs to the
// supervisor.
func (a attempt) discard() {
	if a.session != nil {
		close(a.session.stop)
		<-a.session.done
	}
	if a.own && a.conn != nil {
		a.conn.close(closeRequest{limit: a.conn.closeTimeout})
	}
}
