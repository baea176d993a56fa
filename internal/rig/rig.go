// Package rig is the fixture of the tests that show a behaviour of the library: one consumer on the
// kit's broker, in virtual time.
//
// A time.Sleep in it, as in the tests that use it, is virtual: it costs nothing and is exact.
package rig

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// What every rig has.
const (
	Queue     = "orders"
	Password  = "canary-swordfish" // of the user app
	Heartbeat = 10 * time.Second
)

// Rig is one consumer on one in-process broker inside a bubble.
type Rig struct {
	*testing.T
	Broker   *steadymqtest.Broker
	Consumer *steadymq.Consumer
	Cancel   context.CancelFunc // ends the context of Run
	Result   chan error         // of Run; nil while it does not run
	Log      *LogBuffer

	changes changes
}

// Bubble runs test in virtual time with a broker that has the queue, and judges what every test
// must keep: no delivery is settled twice, and no password is in the log.
func Bubble(t *testing.T, test func(r *Rig), options ...steadymqtest.Option) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		options = append([]steadymqtest.Option{
			steadymqtest.WithUser("app", Password), steadymqtest.WithLatency(time.Millisecond),
		}, options...)
		r := &Rig{T: t, Broker: steadymqtest.NewBroker(t, options...), Log: new(LogBuffer)}
		r.Broker.DeclareQueue(Queue, steadymqtest.QueueOptions{})
		test(r)
		r.Stop()
		assert.Empty(t, r.Broker.Violations(), "no tag settled twice, unknown or multiple")
		assert.NotContains(t, r.Log.String(), Password, "no password in the log")
	})
}

// Run starts the consumer; options come after those every test needs.
func (r *Rig) Run(h steadymq.Handler, options ...steadymq.Option) {
	r.Helper()
	r.Consumer = r.New(options...)
	r.Start(h)
}

// New makes a consumer of the queue.
func (r *Rig) New(options ...steadymq.Option) *steadymq.Consumer {
	r.Helper()
	return r.NewFor(Queue, options...)
}

// NewFor makes a consumer of another queue.
func (r *Rig) NewFor(queue string, options ...steadymq.Option) *steadymq.Consumer {
	r.Helper()
	urls := r.Broker.URLs()
	all := []steadymq.Option{
		steadymq.WithDialer(r.Broker.Dialer()),
		steadymq.WithLogger(slog.New(slog.NewTextHandler(r.Log, &slog.HandlerOptions{Level: slog.LevelDebug}))),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: r.Changed}),
	}
	if len(urls) > 1 {
		all = append(all, steadymq.WithURLs(urls[1:]...))
	}
	c, err := steadymq.New(urls[0], queue, append(all, options...)...)
	require.NoError(r, err)
	return c
}

// Start runs the consumer that is there.
func (r *Rig) Start(h steadymq.Handler) {
	ctx, cancel := context.WithCancel(r.Context())
	r.Cancel = cancel
	r.Result = make(chan error, 1)
	go func() { r.Result <- r.Consumer.Run(ctx, h) }()
}

// Consuming runs the consumer and waits for its first session.
func (r *Rig) Consuming(h steadymq.Handler, options ...steadymq.Option) {
	r.Helper()
	r.Run(h, options...)
	r.Wait(100 * time.Millisecond)
	require.Equal(r, steadymq.Consuming, r.Consumer.State())
}

// Wait lets virtual time pass.
func (r *Rig) Wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// Stop ends Run, if it runs, and returns its error.
func (r *Rig) Stop() error {
	if r.Result == nil {
		return nil
	}
	r.Cancel()
	err := <-r.Result
	r.Result = nil
	return err
}

// OpenConnections returns how many connections the broker has not seen the end of.
func (r *Rig) OpenConnections() (n int) {
	for _, c := range r.Broker.Connections() {
		if c.Ended.IsZero() {
			n++
		}
	}
	return n
}

// RemakeQueue makes the queue anew, as one of another kind.
func (r *Rig) RemakeQueue(kind string) {
	r.Broker.DeleteQueue(Queue)
	r.Broker.DeclareQueue(Queue, steadymqtest.QueueOptions{Type: kind})
}

// PublishMany puts n messages into the queue.
func (r *Rig) PublishMany(n int, body string) {
	for range n {
		r.Broker.Publish(Queue, body)
	}
}
