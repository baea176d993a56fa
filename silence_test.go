package steadymq

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

// receiving is a supervisor with a connection where bytes of deliveries come every second for as
// long as given.
func receiving(t *testing.T, during time.Duration) *supervisor {
	near, far := net.Pipe()
	s := newSocket(near, socketOptions{})
	stop := make(chan struct{})
	t.Cleanup(func() {
		close(stop)
		s.kill(nil)
		s.wait()
		_ = far.Close()
	})
	go func() {
		every := time.NewTicker(time.Second)
		defer every.Stop()
		for time.Since(s.start) < during {
			select {
			case <-every.C:
				s.delivered.Store(int64(time.Since(s.start)))
			case <-stop:
				return
			}
		}
	}()
	c := defaults("amqp://h/", "q")
	c.setupTimeout = 10 * time.Second
	return &supervisor{config: c, ctx: t.Context(), conn: &connection{socket: s}}
}

// took is how long a try may take.
func (s *supervisor) took() (time.Duration, error) {
	since := time.Now()
	ctx, cancel := s.bounded()
	defer cancel()
	<-ctx.Done()
	return time.Since(since), context.Cause(ctx)
}

func TestLimitOfATryCountsTheSilenceOfAConnectionThatStands(t *testing.T) {
	for during, want := range map[time.Duration]time.Duration{
		0:                10 * time.Second,
		35 * time.Second: 45 * time.Second,
		time.Hour:        100 * time.Second, // others' deliveries come for ever
	} {
		synctest.Test(t, func(t *testing.T) {
			took, cause := receiving(t, during).took()
			assert.Equal(t, want, took, "deliveries for %v", during)
			assert.ErrorIs(t, cause, errSetupTimeout)
		})
	}
}

func TestLimitOfATryOnANewConnectionCountsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := receiving(t, time.Hour)
		s.conn = nil
		took, cause := s.took()
		assert.Equal(t, 10*time.Second, took)
		assert.ErrorIs(t, cause, errSetupTimeout)
	})
}

func TestLimitThatIsCalledOffDoesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := receiving(t, 15*time.Second)
		stop := s.conn.socket.afterSilence(10*time.Second, time.Hour, func() { t.Error("called") })
		time.Sleep(20 * time.Second) // it has looked once
		stop()
		stop()
		time.Sleep(time.Hour)
	})
}

func TestLimitIsOverInTheEndWhateverComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := receiving(t, time.Hour)
		over := make(chan struct{})
		defer s.conn.socket.afterSilence(10*time.Second, time.Minute, func() { close(over) })()
		since := time.Now()
		select {
		case <-over:
		case <-time.After(2 * time.Hour):
		}
		assert.Equal(t, time.Minute, time.Since(since))
	})
}
