package behaviour_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

func TestOutcomeOfACopyThatAStopLeavesBehindIsTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var stale, others atomic.Int32
		hooks := steadymq.Hooks{Settled: func(_ *steadymq.Delivery, o steadymq.Outcome) {
			if o == steadymq.Stale {
				stale.Add(1)
				return
			}
			others.Add(1)
		}}
		p := grouped(r, 1)
		c := p.add(park, parking(), steadymq.WithHooks(hooks), steadymq.WithDrainTimeout(2*time.Second))
		p.start()
		r.Broker.LoseConfirms(true)
		r.Broker.Publish(p.name(1), "1", "2", "3")
		r.Wait(time.Second)
		require.Equal(r, 3, c.Stats().Held)
		require.Error(r, c.Stop(r.Context()), "their copies are not confirmed")
		assert.Equal(r, int32(3), stale.Load())
		assert.Zero(r, others.Load())
		assert.Equal(r, uint64(3), c.Stats().Stale)
		assert.Zero(r, c.Stats().Held)
		r.Wait(10 * time.Minute)
		assert.Equal(r, int32(3), stale.Load(), "no hook once Run has returned")
		assert.Equal(r, uint64(3), c.Stats().Stale)
		require.NoError(r, p.stop())
	})
}
