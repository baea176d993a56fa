package steadymq_test

import (
	"context"
	"math"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
)

func TestLongConsumerTimeoutIsNotTakenForTheDefault(t *testing.T) {
	for _, ms := range []int64{48 * time.Hour.Milliseconds(), math.MaxInt64} {
		bubble(t, func(b *bench) {
			b.consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(2 * time.Minute); return nil },
				steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": ms}), steadymq.WithDrainTimeout(time.Hour))
			b.publish(100, "slow")
			b.wait(3 * time.Hour)
			assert.Zero(b, b.told("handlers are so slow"))
		})
	}
}
