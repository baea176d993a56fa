package steadymq_test

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
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
	bubble(t, func(b *bench) {
		release := make(chan struct{})
		dial := b.broker.Dialer()
		b.consuming(ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return stuck{c, release}, nil
		}), steadymq.WithCloseTimeout(2*time.Second), steadymq.WithDrainTimeout(10*time.Second))
		b.broker.Stall()
		b.stopRun()
		b.wait(13 * time.Second) // drain + close + 1 s
		select {
		case <-b.result:
		default:
			assert.Fail(b, "Run has not returned within its limits")
			close(release)
			<-b.result
			b.result = nil
			return
		}
		close(release)
		b.result = nil
	})
}

// A handler that forwards a message takes the broker's own headers out first.
func TestStreamGoesOnThoughAHandlerTakesTheOffsetOutOfTheHeaders(t *testing.T) {
	bubble(t, func(b *bench) {
		handled := make(map[string]bool)
		b.streaming(func(_ context.Context, d *steadymq.Delivery) error {
			delete(d.Headers, "x-stream-offset")
			if string(d.Body) == "3" && d.Attempt() == 1 {
				return errAway
			}
			handled[string(d.Body)] = true
			return nil
		}, steadymq.WithPrefetch(4), steadymq.WithConcurrency(1))
		for i := range 20 {
			b.broker.Publish(queue, fmt.Sprint(i))
		}
		b.wait(time.Hour)
		assert.Len(b, handled, 20)
	})
}

// What is held goes back when the consumer stops: once.
func TestHeldMessageComesBackOnceWhenTheConsumerStops(t *testing.T) {
	bubble(t, func(b *bench) {
		b.of("quorum")
		b.consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.RequeueAfter(nil, time.Hour) })
		b.broker.Publish(queue, "tea")
		b.wait(time.Minute)
		assert.NoError(b, b.stop())
		assert.Len(b, b.broker.Ledger().Deliveries, 1)
	}, steadymqtest.WithVersion(4, 0))
}
