package behaviour_test

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// stuck is a connection of the user whose Close does not return.
type stuck struct {
	net.Conn
	release <-chan struct{}
}

func (s stuck) Close() error {
	<-s.release
	return s.Conn.Close()
}

// The session's own goroutine ends the connection when basic.cancel or channel.close is not
// answered. Stop has its limits whatever the Close of a user's connection does.
func TestStopKeepsItsLimitsThoughACloseOfTheUsersConnectionHangs(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		release := make(chan struct{})
		dial := r.Broker.Dialer()
		r.Consuming(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return stuck{c, release}, nil
		}), steadymq.WithCloseTimeout(2*time.Second), steadymq.WithDrainTimeout(10*time.Second))
		r.Broker.Stall()
		r.Cancel()
		r.Wait(13 * time.Second) // drain + close + 1 s
		select {
		case <-r.Result:
		default:
			assert.Fail(r, "Run has not returned within its limits")
			close(release)
			<-r.Result
			r.Result = nil
			return
		}
		close(release)
		r.Result = nil
	})
}

// A handler that forwards a message takes the broker's own headers out first.
func TestStreamGoesOnThoughAHandlerTakesTheOffsetOutOfTheHeaders(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		handled := make(map[string]bool)
		streaming(r, func(_ context.Context, d *steadymq.Delivery) error {
			delete(d.Headers, "x-stream-offset")
			if string(d.Body) == "3" && d.Attempt() == 1 {
				return errAway
			}
			handled[string(d.Body)] = true
			return nil
		}, steadymq.WithPrefetch(4), steadymq.WithConcurrency(1))
		for i := range 20 {
			r.Broker.Publish(rig.Queue, fmt.Sprint(i))
		}
		r.Wait(time.Hour)
		assert.Len(r, handled, 20)
	})
}

// What is held goes back when the consumer stops: once.
func TestHeldMessageComesBackOnceWhenTheConsumerStops(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		r.Consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.RequeueAfter(nil, time.Hour) })
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Minute)
		assert.NoError(r, r.Stop())
		assert.Len(r, r.Broker.Ledger().Deliveries, 1)
	}, steadymqtest.WithVersion(4, 0))
}
