package behaviour_test

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/middleware"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestPolicyWithWrongArgumentsIsRefusedByRun(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithMiddleware(
			middleware.Log(nil), middleware.Correlation, middleware.DiscardAfter(0), middleware.ParkAfter(3)))
		r.Wait(time.Second)
		require.Len(r, r.Result, 1)
		err := <-r.Result
		r.Result = nil
		require.ErrorAs(r, err, new(*steadymq.OptionError))
		require.EqualError(r, err, "steadymq: middleware.Log: the logger must not be nil; leave the middleware out for silence\n"+
			"steadymq: middleware.DiscardAfter: n must be at least 1, got 0", "all at once, in their order")
		assert.Empty(r, r.Broker.Ledger().Dials)
	})
}

func TestPolicyWithWrongArgumentsIsRefusedByTheRunOfItsGroup(t *testing.T) {
	g, err := steadymq.NewGroup("amqp://h/")
	require.NoError(t, err)
	_, err = g.Handle("orders", rig.Ack, steadymq.WithMiddleware(middleware.Permanent()))
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	err = g.Run(ctx)
	var refused *steadymq.OptionError
	require.ErrorAs(t, err, &refused)
	assert.Equal(t, "middleware.Permanent", refused.Option)
	assert.ErrorContains(t, err, "queue orders", "which of the consumers")
}

// poison fails in the way that its name says, for ever.
func poison() map[string]steadymq.Handler {
	return map[string]steadymq.Handler{
		"error":       func(context.Context, *steadymq.Delivery) error { return errAway },
		"panic":       func(context.Context, *steadymq.Delivery) error { panic("boom") },
		"nil pointer": func(context.Context, *steadymq.Delivery) error { return (*nilError)(nil) },
	}
}

func TestDiscardAfterGivesUpAtThatTryOnAQuorumQueue(t *testing.T) {
	for _, v := range generations {
		for name, h := range poison() {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("quorum")
				tries := 0
				count := func(next steadymq.Handler) steadymq.Handler {
					return func(ctx context.Context, d *steadymq.Delivery) error {
						tries++
						return next(ctx, d)
					}
				}
				r.Consuming(h, steadymq.WithMiddleware(count, middleware.DiscardAfter(3)))
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(time.Hour)
				assert.Equal(r, 3, tries, "%s %v", name, v)
				assert.EqualValues(r, 1, r.Consumer.Stats().Discarded, "%s %v", name, v)
			}, steadymqtest.WithVersion(v[0], v[1]))
		}
	}
}

// A classic queue does not count: the contract says so, and what helps.
func TestDiscardAfterThreeNeverFiresOnAClassicQueue(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		highest := 0
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			highest = max(highest, d.Attempt())
			return errAway
		}, steadymq.WithMiddleware(middleware.DiscardAfter(3)))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Hour)
		assert.Greater(r, len(holdsOf(r)), 1000)
		assert.Equal(r, 2, highest)
		assert.Zero(r, r.Consumer.Stats().Discarded)
	})
}

func TestDiscardOfADeadLetterLoopIsOneMoreRound(t *testing.T) {
	for name, v := range map[string]struct {
		policy steadymq.Middleware
		rounds int
	}{
		"DiscardAfter": {middleware.DiscardAfter(3), 10},
		"ParkAfter":    {middleware.ParkAfter(3), 3},
	} {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Broker.DeleteQueue(rig.Queue)
			r.Broker.DeclareQueue("wait", steadymqtest.QueueOptions{DeadLetter: rig.Queue, Args: map[string]any{"x-message-ttl": int32(60_000)}})
			r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{DeadLetter: "wait"})
			attempt := 0
			r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
				attempt = d.Attempt()
				return errAway
			}, steadymq.WithMiddleware(func(next steadymq.Handler) steadymq.Handler {
				return func(ctx context.Context, d *steadymq.Delivery) error {
					err := next(ctx, d)
					if _, explicit := steadymq.OutcomeOf(err); !explicit {
						return steadymq.Discard(err) // by way of the queue that waits
					}
					return err
				}
			}, v.policy))
			r.Broker.Publish(rig.Queue, "x")
			r.Wait(9*time.Minute + 30*time.Second)
			assert.Equal(r, v.rounds, attempt, name)
		})
	}
}

func TestHandlerThatIsCutOffIsNotGivenUpOn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		log := new(rig.LogBuffer)
		r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
			<-ctx.Done()
			return errors.New("given up")
		}, steadymq.WithMiddleware(
			middleware.Log(slog.New(slog.NewTextHandler(log, nil))),
			middleware.PermanentFunc(func(error) bool { return true }), middleware.DiscardAfter(1)))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		r.Broker.Reset() // the session is lost
		r.Wait(10 * time.Second)
		require.ErrorIs(r, r.Stop(), steadymq.ErrDrainTimeout)
		r.Wait(time.Minute)
		assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue))
		assert.Zero(r, r.Consumer.Stats().Discarded)
		assert.Empty(r, log.String(), "it is no failure")
	})
}

// The end of the goroutine passes the policies, and the message is not lost.
func TestHandlerThatEndsItsGoroutineIsPutBackUnderAPolicy(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		r.Consuming(func(context.Context, *steadymq.Delivery) error {
			runtime.Goexit()
			return nil
		}, steadymq.WithMiddleware(middleware.Correlation, middleware.Log(slog.New(slog.DiscardHandler)), middleware.DiscardAfter(1)))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Minute)
		assert.Greater(r, len(holdsOf(r)), 3)
		assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
	})
}
