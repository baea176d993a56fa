package matrix_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

const (
	herdSize   = 1000
	herdQueues = 10
	herdLimit  = 25 * time.Second
)

// TestHerd restarts a broker under a thousand consumers: all of them lose their connection at the
// same moment, and all dial again as soon as they can. It is part of the full matrix only, because
// it needs the machine for itself.
func TestHerd(t *testing.T) {
	if os.Getenv("STEADYMQ_MATRIX") != "full" && os.Getenv("STEADYMQ_MATRIX") != "herd" {
		t.Skip("needs the machine for itself: STEADYMQ_MATRIX=herd")
	}
	for _, h := range herds {
		t.Log(h.run(t))
	}
}

// herd is a thousand consumers: of a Group on so many connections, or with one each if that is 0.
type herd struct{ connections int }

var herds = []herd{{0}, {1}, {10}}

func (h herd) String() string {
	switch h.connections {
	case 0:
		return fmt.Sprintf("%d consumers with a connection each", herdSize)
	case 1:
		return fmt.Sprintf("a Group of %d consumers on one connection", herdSize)
	}
	return fmt.Sprintf("a Group of %d consumers on %d connections", herdSize, h.connections)
}

// start runs the consumers, with default options, until ctx ends.
func (h herd) start(t *testing.T, ctx context.Context, all *sync.WaitGroup, url string, members []*member, handle steadymq.Handler) {
	t.Helper()
	quiet := steadymq.WithLogger(slog.New(slog.DiscardHandler))
	options := func(m *member) []steadymq.Option {
		return []steadymq.Option{quiet, steadymq.WithHooks(steadymq.Hooks{StateChanged: m.changed})}
	}
	if h.connections == 0 {
		for i, m := range members {
			c, err := steadymq.New(url, herdQueue(i%herdQueues), options(m)...)
			require.NoError(t, err)
			all.Go(func() { assert.NoError(t, c.Run(ctx, handle)) })
		}
		return
	}
	g, err := steadymq.NewGroup(url, quiet, steadymq.WithConnections(h.connections))
	require.NoError(t, err)
	for i, m := range members {
		_, err := g.Handle(herdQueue(i%herdQueues), handle, options(m)...)
		require.NoError(t, err)
	}
	all.Go(func() { assert.NoError(t, g.Run(ctx)) })
}

// member is one consumer of the herd.
type member struct {
	mu        sync.Mutex
	consuming []time.Time
}

func (m *member) changed(c steadymq.StateChange) {
	if c.To == steadymq.Consuming {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.consuming = append(m.consuming, c.Time)
	}
}

// since is when it first consumed after at, zero if it has not yet.
func (m *member) since(at time.Time) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, when := range m.consuming {
		if when.After(at) {
			return when
		}
	}
	return time.Time{}
}

// run returns what it has seen, in a sentence. The options are the defaults: what is on trial is
// the pace of retries.
func (h herd) run(t *testing.T) string {
	b := rabbit.Start(t, rabbit.Config{Generation: rabbit.Gen43})
	rabbit.NeedCommands(t, b)
	// A proxy refuses while the broker is down; a port that a container engine publishes does not.
	proxy, err := faultproxy.New(b.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, proxy.Close()) })
	for i := range herdQueues {
		require.NoError(t, b.DeclareQueue(herdQueue(i), nil))
	}
	members := make([]*member, herdSize)
	var handled atomic.Int64
	ctx, stop := context.WithCancel(context.Background())
	var all sync.WaitGroup
	t.Cleanup(func() {
		stop()
		all.Wait()
	})
	for i := range members {
		members[i] = new(member)
	}
	h.start(t, ctx, &all, proxy.URL(b.URL()), members, func(context.Context, *steadymq.Delivery) error { handled.Add(1); return nil })
	awaitHerd(t, members, time.Time{}, 2*time.Minute)

	down := time.Now()
	require.NoError(t, b.Stop(ctx))
	accepts := make(chan time.Time, 1)
	go func() { accepts <- firstAccept(ctx, b.Addr()) }()
	require.NoError(t, b.Start(ctx))
	accepted := <-accepts
	awaitHerd(t, members, down, time.Minute)
	text, last := spread(members, down, accepted)
	text = fmt.Sprintf("Herd: %s, %s", h, text)
	assert.LessOrEqual(t, last, herdLimit, "until all are consuming")

	for i := range herdQueues {
		f := scenario.NewFeeder(b.URL(), herdQueue(i), scenario.NewLedger())
		require.NoError(t, f.Publish(ctx, 20, 0))
	}
	assert.Eventually(t, func() bool { return handled.Load() >= 20*herdQueues }, 20*time.Second, 50*time.Millisecond, "messages are handled")
	stopping := time.Now()
	stop()
	all.Wait()
	return fmt.Sprintf("%s All stopped within %s.", text, inWords(time.Since(stopping)))
}

func herdQueue(i int) string { return fmt.Sprintf("herd-%d", i) }

func awaitHerd(t *testing.T, members []*member, since time.Time, limit time.Duration) {
	t.Helper()
	assert.Eventually(t, func() bool {
		return !slices.ContainsFunc(members, func(m *member) bool { return m.since(since).IsZero() })
	}, limit, 100*time.Millisecond, "all are consuming")
}

// firstAccept is when the broker's own probe, dialling ten times a second, gets an AMQP connection.
func firstAccept(ctx context.Context, addr string) time.Time {
	for ctx.Err() == nil {
		if faultproxy.Up(addr) {
			return time.Now()
		}
		rest(ctx, 100*time.Millisecond)
	}
	return time.Now()
}

// spread says when how many were back.
func spread(members []*member, down, accepted time.Time) (text string, last time.Duration) {
	var took []time.Duration
	for _, m := range members {
		took = append(took, max(m.since(down).Sub(accepted), 0))
	}
	slices.Sort(took)
	at := func(share float64) string { return inWords(took[int(share*float64(len(took)-1))]) }
	last = took[len(took)-1]
	return fmt.Sprintf("default options, one broker restarted after %.1f s: consuming again after it accepts, "+
		"the first after %s, half after %s, 90 %% after %s, 99 %% after %s, all after %s.",
		accepted.Sub(down).Seconds(), at(0), at(0.5), at(0.9), at(0.99), at(1)), last
}
