package faultproxy

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const soon = 5 * time.Second

// echo is a target that sends back what it gets.
type echo struct {
	lis net.Listener
	mu  sync.Mutex
	all []net.Conn
	wg  sync.WaitGroup
}

func newEcho(t *testing.T, addr string) *echo {
	t.Helper()
	lis, err := net.Listen("tcp", addr)
	require.NoError(t, err)
	e := &echo{lis: lis}
	e.wg.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			e.mu.Lock()
			e.all = append(e.all, conn)
			e.mu.Unlock()
			e.wg.Go(func() {
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			})
		}
	})
	t.Cleanup(e.stop)
	return e
}

func (e *echo) stop() {
	_ = e.lis.Close()
	e.mu.Lock()
	for _, c := range e.all {
		_ = c.Close()
	}
	e.mu.Unlock()
	e.wg.Wait()
}

func behind(t *testing.T, target string) *Proxy {
	t.Helper()
	p, err := New(target)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p
}

func newPath(t *testing.T) (*Proxy, *net.TCPConn) {
	t.Helper()
	p := behind(t, newEcho(t, "127.0.0.1:0").lis.Addr().String())
	return p, connect(t, p)
}

func connect(t *testing.T, p *Proxy) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", p.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.TCPConn)
}

func says(t *testing.T, c net.Conn, text string) {
	t.Helper()
	_, err := c.Write([]byte(text))
	require.NoError(t, err)
}

func hears(t *testing.T, c net.Conn, text string) {
	t.Helper()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(soon)))
	buf := make([]byte, len(text))
	_, err := io.ReadFull(c, buf)
	require.NoError(t, err)
	assert.Equal(t, text, string(buf))
}

func silence(t *testing.T, c net.Conn) {
	t.Helper()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(150*time.Millisecond)))
	_, err := c.Read(make([]byte, 1))
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	assert.True(t, timeout.Timeout(), "the socket stays open: %v", err)
}

func ending(t *testing.T, c net.Conn) error {
	t.Helper()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(soon)))
	_, err := c.Read(make([]byte, 1))
	return err
}

func TestBytesPassBothWays(t *testing.T) {
	p, c := newPath(t)
	says(t, c, "hello")
	hears(t, c, "hello")
	assert.Equal(t, Counts{Accepted: 1, Clients: 1, Brokers: 1}, p.Counts())
}

func TestAClosedClientClosesTheBrokerSide(t *testing.T) {
	p, c := newPath(t)
	says(t, c, "x")
	hears(t, c, "x")
	require.NoError(t, c.Close())
	assert.Eventually(t, func() bool { return p.Counts() == Counts{Accepted: 1} }, soon, time.Millisecond)
}

func TestResetIsSeenAsReset(t *testing.T) {
	p, c := newPath(t)
	says(t, c, "x")
	hears(t, c, "x")
	p.Reset()
	require.ErrorIs(t, ending(t, c), syscall.ECONNRESET)
	assert.Eventually(t, func() bool { return p.Counts() == Counts{Accepted: 1} }, soon, time.Millisecond)
}

func TestFINIsSeenAsEndOfStream(t *testing.T) {
	p, c := newPath(t)
	says(t, c, "x")
	hears(t, c, "x")
	p.FIN()
	require.ErrorIs(t, ending(t, c), io.EOF)
}

func TestABlackHoleSwallowsOneWayOnly(t *testing.T) {
	for _, d := range []Direction{ToBroker, ToClient, Both} {
		t.Run(d.String(), func(t *testing.T) {
			p, c := newPath(t)
			says(t, c, "a")
			hears(t, c, "a")
			p.BlackHole(d)
			says(t, c, "b")
			silence(t, c)
			assert.Equal(t, 1, p.Counts().Clients)
			later := connect(t, p)
			says(t, later, "c")
			silence(t, later)
			p.Heal()
			well := connect(t, p)
			says(t, well, "d")
			hears(t, well, "d")
		})
	}
}

func TestAHoleAlsoSwallowsTheEnd(t *testing.T) {
	p, c := newPath(t)
	says(t, c, "a")
	hears(t, c, "a")
	p.BlackHole(Both)
	require.NoError(t, c.Close())
	require.Eventually(t, func() bool { return p.Counts().Clients == 0 }, soon, time.Millisecond)
	assert.Never(t, func() bool { return p.Counts().Brokers != 1 }, 50*time.Millisecond, 5*time.Millisecond, "the broker does not hear of it")
	p.Heal()
	assert.Eventually(t, func() bool { return p.Counts().Brokers == 0 }, soon, time.Millisecond)
}

func TestAPauseDelaysAndLosesNothing(t *testing.T) {
	p, c := newPath(t)
	says(t, c, "a")
	hears(t, c, "a")
	p.Pause(ToClient)
	says(t, c, "b")
	silence(t, c)
	p.Heal()
	hears(t, c, "b")
}

func TestAPausedDirectionFillsTheSendersWindow(t *testing.T) {
	p, c := newPath(t)
	p.Pause(ToBroker)
	require.NoError(t, c.SetWriteDeadline(time.Now().Add(500*time.Millisecond)))
	_, err := c.Write(make([]byte, 64<<20))
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	assert.True(t, timeout.Timeout())
}

func TestRefusedMeansRefused(t *testing.T) {
	p, c := newPath(t)
	says(t, c, "a")
	hears(t, c, "a")
	p.Refuse()
	_, err := net.Dial("tcp", p.Addr())
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	says(t, c, "b")
	hears(t, c, "b")
	p.Heal()
	again := connect(t, p)
	says(t, again, "c")
	hears(t, again, "c")
}

func TestLatencyDelaysAndKeepsTheOrder(t *testing.T) {
	p, c := newPath(t)
	p.Latency(ToBroker, 60*time.Millisecond)
	p.Latency(ToClient, 60*time.Millisecond)
	start := time.Now()
	for _, s := range []string{"a", "b", "c"} {
		says(t, c, s)
	}
	hears(t, c, "abc")
	took := time.Since(start)
	assert.GreaterOrEqual(t, took, 120*time.Millisecond)
	assert.Less(t, took, soon)
}

func TestBandwidthLimitsTheRate(t *testing.T) {
	p, c := newPath(t)
	p.Bandwidth(ToBroker, 100_000)
	p.Slice(ToBroker, 1000, 0)
	start := time.Now()
	text := make([]byte, 20_000)
	says(t, c, string(text))
	hears(t, c, string(text))
	assert.GreaterOrEqual(t, time.Since(start), 190*time.Millisecond)
}

func TestSlicedBytesArriveWhole(t *testing.T) {
	p, c := newPath(t)
	p.Slice(Both, 1, 0)
	says(t, c, "one at a time")
	hears(t, c, "one at a time")
}

func TestCutAfterCountsEachConnectionsOwnBytes(t *testing.T) {
	p, c := newPath(t)
	says(t, c, "12345")
	hears(t, c, "12345")
	p.CutAfter(ToClient, 3)
	says(t, c, "abcdef")
	hears(t, c, "abc")
	require.Error(t, ending(t, c))
	next := connect(t, p)
	says(t, next, "xyz1")
	hears(t, next, "xyz")
	require.Error(t, ending(t, next))
	p.Heal()
	well := connect(t, p)
	says(t, well, "more than three")
	hears(t, well, "more than three")
}

func TestFINAfterEndsPolitely(t *testing.T) {
	p := behind(t, newEcho(t, "127.0.0.1:0").lis.Addr().String())
	p.FINAfter(ToClient, 2)
	c := connect(t, p)
	says(t, c, "ab")
	hears(t, c, "ab")
	require.ErrorIs(t, ending(t, c), io.EOF)
}

func TestTheProxyFollowsItsTarget(t *testing.T) {
	target := newEcho(t, "127.0.0.1:0")
	addr := target.lis.Addr().String()
	p := behind(t, addr)
	c := connect(t, p)
	says(t, c, "a")
	hears(t, c, "a")
	target.stop()
	require.Error(t, ending(t, c))
	refused := func() bool {
		conn, err := net.Dial("tcp", p.Addr())
		if err == nil {
			_ = conn.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	}
	require.Eventually(t, refused, soon, 5*time.Millisecond)
	newEcho(t, addr)
	require.Eventually(t, func() bool { return !refused() }, soon, 5*time.Millisecond)
	well := connect(t, p)
	says(t, well, "b")
	hears(t, well, "b")
}

func TestATargetThatWasNeverThereIsRefused(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := lis.Addr().String()
	require.NoError(t, lis.Close())
	p := behind(t, addr)
	if c, err := net.Dial("tcp", p.Addr()); err == nil { // the first one finds it out
		require.Error(t, ending(t, c))
		require.NoError(t, c.Close())
	}
	require.Eventually(t, func() bool {
		_, err := net.Dial("tcp", p.Addr())
		return errors.Is(err, syscall.ECONNREFUSED)
	}, soon, 5*time.Millisecond)
}

func TestURLKeepsAllButTheHost(t *testing.T) {
	p := behind(t, "127.0.0.1:1")
	assert.Equal(t, "amqp://u:p%40@"+p.Addr()+"/v%20w?heartbeat=1", p.URL("amqp://u:p%40@broker:5672/v%20w?heartbeat=1"))
	assert.NotContains(t, p.URL("amqp://u:canary%zz@h/"), "canary")
}

func TestCloseTwiceIsFine(t *testing.T) {
	p, c := newPath(t)
	require.NoError(t, p.Close())
	require.NoError(t, p.Close())
	require.Error(t, ending(t, c))
}
