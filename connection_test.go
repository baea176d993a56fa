package steadymq

import (
	"context"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The driver tells of the broker's connection.close before its close-ok is on the
// wire, and holds its mutex until then. Whoever closed the socket at once would
// lose the close-ok, and whoever waited for the mutex would stand still with the
// time of this test.
func TestBrokersCloseIsAnsweredHoweverSlowlyItReads(t *testing.T) {
	still := time.AfterFunc(20*time.Second, func() { panic("time stands still: a goroutine waits for the driver's mutex") })
	defer still.Stop()
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		c := defaults("amqp://guest:guest@mq.example/", "q")
		c.dial = func(context.Context, string, string) (net.Conn, error) { return near, nil }
		e, err := parseEndpoint(c.urls[0])
		require.NoError(t, err)
		played := make(chan error, 1)
		go func() { played <- broker(far) }()
		conn, err := openConnection(t.Context(), c, e, newStep("dial"), func() {})
		require.NoError(t, err)
		require.NoError(t, <-played)

		_, err = far.Write(methodOf(0, 10, 50, 1, 0x40, 3, 'b', 'y', 'e', 0, 0, 0, 0))
		require.NoError(t, err)
		time.Sleep(time.Second)
		said, err := io.ReadAll(far)
		require.NoError(t, err)
		<-conn.gone

		assert.Equal(t, methodOf(0, 10, 51), said)
		assert.ErrorContains(t, conn.end.cause(), "bye")
	})
}
