package behaviour_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
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

func TestMessageWhoseCopyCannotBeSentGoesBackUncounted(t *testing.T) {
	for minor, lost := range map[int]bool{0: true, 3: false} {
		t.Run(fmt.Sprintf("4.%d", minor), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("quorum") // with the default limit of 20
				r.Consuming(park, parking())
				r.Broker.FillQueue(parked, true)
				r.Broker.Publish(rig.Queue, "1")
				r.Wait(6 * time.Hour)
				assert.Equal(r, uint64(1), r.Consumer.Stats().Sessions)
				r.Broker.FillQueue(parked, false)
				r.Wait(2 * time.Minute)
				if lost { // as the contract of WithRetry says
					assert.Zero(r, r.Broker.QueueLen(parked)+r.Broker.QueueLen(rig.Queue))
					assert.NotEmpty(r, r.Warnings("default delivery limit of 20"))
					return
				}
				assert.Equal(r, 1, r.Broker.QueueLen(parked))
				assert.Empty(r, r.Warnings("default delivery limit of 20"))
			}, steadymqtest.WithVersion(4, minor))
		})
	}
}

func TestMessageWhoseCopyIsUnderWayAtAStopGoesBackUncounted(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		r.Consuming(park, parking())
		r.Broker.FillQueue(parked, true)
		r.Broker.Publish(rig.Queue, "1")
		r.Wait(time.Minute)
		require.NoError(r, r.Stop())
		var back []steadymqtest.SettlementRecord
		for _, s := range r.Broker.Ledger().Settlements {
			if s.Requeue {
				back = append(back, s)
			}
		}
		require.Len(r, back, 1)
		assert.Equal(r, steadymqtest.Nack, back[0].Kind)
	})
}
