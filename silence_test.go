package steadymq

import (
	"context"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/steadymq/steadymq/internal/wire"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// receiving is a supervisor with a connection where bytes of deliveries come every second for as
// long as given.
func receiving(t *testing.T, during time.Duration) *supervisor {
	near, far := net.Pipe()
	s := wire.NewSocket(near, wire.Options{})
	stop := make(chan struct{})
	t.Cleanup(func() {
		close(stop)
		s.Kill(nil)
		s.Wait()
		_ = far.Close()
	})
	s.Subscribe("t", 1, &receiver{inbox: newInbox(1), aside: newAside()})
	go func() { _, _ = io.Copy(io.Discard, far) }()
	go func() { _, _ = io.Copy(io.Discard, s) }()
	_, err := s.Write(methodOf(1, 60, 20, 0, 0, 1, 'q', 1, 't', 0, 0, 0, 0, 0))
	require.NoError(t, err)
	began := time.Now()
	go func() {
		every := time.NewTicker(time.Second)
		defer every.Stop()
		for time.Since(began) < during {
			select {
			case <-every.C:
				_, _ = far.Write(deliveryOf(1, nil))
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
		stop := s.conn.socket.AfterSilence(10*time.Second, time.Hour, func() { t.Error("called") })
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
		defer s.conn.socket.AfterSilence(10*time.Second, time.Minute, func() { close(over) })()
		since := time.Now()
		select {
		case <-over:
		case <-time.After(2 * time.Hour):
		}
		assert.Equal(t, time.Minute, time.Since(since))
	})
}
