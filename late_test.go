package steadymq

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A try that comes back after it was given up has a session that nobody would ever end.
func TestTryThatComesBackTooLateIsClosed(t *testing.T) {
	for name, own := range map[string]bool{"on a connection of its own": true, "on the supervisor's connection": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				reason := errors.New("set-up limit")
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, reason)
				defer cancel()
				late := &session{stop: make(chan struct{}), gone: make(chan struct{})}
				conn := &connection{leave: make(chan departure, 1), closeTimeout: time.Second}
				began := time.Now()
				step := newStep("dial")
				step.at("consume")

				a := within(ctx, func() attempt {
					time.Sleep(time.Minute)
					return attempt{conn: conn, own: own, session: late}
				}, step)

				assert.Equal(t, time.Second+tryGrace, time.Since(began))
				require.ErrorIs(t, a.err, reason)
				assert.ErrorContains(t, a.err, "consume")
				assert.Nil(t, a.session)
				time.Sleep(time.Minute)
				synctest.Wait()
				<-late.stop
				assert.Empty(t, conn.leave, "not before its session has gone")
				close(late.gone)
				synctest.Wait()
				assert.Len(t, conn.leave, map[bool]int{true: 1, false: 0}[own])
			})
		})
	}
}

func TestTryThatExitsIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := within(t.Context(), func() attempt {
			runtime.Goexit()
			return attempt{}
		}, newStep("dial"))
		assert.ErrorIs(t, a.err, errNoResult)
	})
}
