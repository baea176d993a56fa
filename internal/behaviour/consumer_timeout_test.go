package behaviour_test

import (
	"context"
	"math"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

func TestLongConsumerTimeoutIsNotTakenForTheDefault(t *testing.T) {
	for _, ms := range []int64{48 * time.Hour.Milliseconds(), math.MaxInt64} {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(2 * time.Minute); return nil },
				steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": ms}), steadymq.WithDrainTimeout(time.Hour))
			r.PublishMany(100, "slow")
			r.Wait(3 * time.Hour)
			assert.Zero(r, r.TimesLogged("handlers are so slow"))
		})
	}
}
