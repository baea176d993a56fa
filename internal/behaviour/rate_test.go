package behaviour_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

// mostWithin returns the most starts in any time of that length.
func mostWithin(starts []time.Time, length time.Duration) (most int) {
	first := 0
	for i, at := range starts {
		for at.Sub(starts[first]) >= length {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}

func TestRateIsKeptInEveryWindow(t *testing.T) {
	for _, rate := range []struct {
		n           int
		per         time.Duration
		concurrency int
	}{
		{1, time.Second, 1},
		{3, time.Second, 1},
		{7, 100 * time.Millisecond, 8},
		{10, time.Second, 4},
		{100, time.Minute, 32},
		{1000, time.Second, 64},
		{7, time.Hour, 2},
	} {
		t.Run(fmt.Sprint(rate), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				burst := max(1, rate.n/10)
				many := min(5*rate.n+burst, 3000)
				r.PublishMany(many, "tea")
				var l diary
				r.Consuming(l.does(rig.Ack), steadymq.WithRate(rate.n, rate.per), steadymq.WithConcurrency(rate.concurrency))
				r.Wait(6*rate.per + time.Second)
				require.Equal(r, many, l.started())
				starts := l.times()
				for k := 1; k <= 5; k++ {
					assert.LessOrEqual(r, mostWithin(starts, time.Duration(k)*rate.per), k*rate.n+burst-1)
				}
				took := starts[many-1].Sub(starts[0])
				want := time.Duration(float64(many-burst) / float64(rate.n) * float64(rate.per))
				assert.InDelta(r, want.Seconds(), took.Seconds(), 0.01*want.Seconds()+0.005, "and used up")

				idle := l.started()
				r.PublishMany(3*burst, "tea")
				r.Wait(5 * time.Millisecond)
				assert.GreaterOrEqual(r, l.started()-idle, burst, "what was saved up")
			})
		})
	}
}

func TestRateIsOneForAllSessionsPausesAndRuns(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.PublishMany(400, "tea")
		var l diary
		r.Consuming(l.does(rig.Ack), steadymq.WithRate(10, time.Second), steadymq.WithConcurrency(16))
		for i := range 12 {
			r.Wait(2*time.Second + time.Duration(i)*37*time.Millisecond)
			switch i % 4 {
			case 0:
				r.Broker.Reset()
			case 1:
				r.Broker.CancelConsumers(rig.Queue)
			case 2:
				require.NoError(r, r.Stop())
				r.Start(l.does(rig.Ack))
			case 3:
				r.Consumer.Pause()
				r.Wait(5 * time.Second)
				r.Consumer.Resume()
			}
		}
		for k := 1; k <= 10; k++ {
			assert.LessOrEqual(r, mostWithin(l.times(), time.Duration(k)*time.Second), 10*k+1)
		}
		assert.Greater(r, l.started(), 200)
	})
}

func TestWaitForTheRateCostsNoDrainNoTimeoutAndShows(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.PublishMany(20, "tea")
		r.Consuming(rig.Ack, steadymq.WithRate(1, time.Minute), steadymq.WithConcurrency(4), steadymq.WithHandlerTimeout(time.Second))
		r.Wait(90 * time.Second)
		n := r.Consumer.Stats()
		assert.Equal(r, 4, n.Throttled)
		assert.EqualValues(r, 2, n.Acked)
		assert.Zero(r, n.Failed)
		assert.Zero(r, n.Handling)
		began := time.Now()
		require.NoError(r, r.Stop())
		assert.Less(r, time.Since(began), 50*time.Millisecond)
		assert.Equal(r, 18, r.Broker.QueueLen(rig.Queue))
		assert.Zero(r, r.Consumer.Stats().Throttled)
	})
}

func TestRateOfAGroupIsThatOfEachConsumer(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 0, steadymq.WithRate(1, time.Second))
		all := make([]diary, 3)
		for i := range all {
			options := rig.Options()
			if i == 2 {
				options = rig.Options(steadymq.WithRate(5, time.Second))
			}
			p.add(all[i].does(rig.Ack), options...)
			for range 100 {
				r.Broker.Publish(p.name(i), "tea")
			}
		}
		p.start()
		r.Wait(10*time.Second - 200*time.Millisecond)
		for i, want := range []int{10, 10, 50} {
			assert.InDelta(r, want, all[i].started(), 1)
		}
		require.NoError(r, p.stop())
	})
}

func TestRateBoundsThePrefetchThatWasNotGiven(t *testing.T) {
	for _, row := range []struct {
		want    int
		options []steadymq.Option
	}{
		{32, rig.Options(steadymq.WithRate(100, time.Second))},
		{7, rig.Options(steadymq.WithRate(1, time.Minute))},
		{1, rig.Options(steadymq.WithRate(4, time.Hour))},
		{5, rig.Options(steadymq.WithRate(4, time.Hour), steadymq.WithConcurrency(5))},
		{20, rig.Options(steadymq.WithRate(4, time.Hour), steadymq.WithPrefetch(20))},
	} {
		rig.Bubble(t, func(r *rig.Rig) {
			r.PublishMany(100, "tea")
			r.Consuming(func(ctx context.Context, _ *steadymq.Delivery) error { <-ctx.Done(); return nil }, append(row.options, steadymq.WithDrainTimeout(time.Second))...)
			assert.Equal(r, row.want, r.Broker.Unsettled(rig.Queue))
		})
	}
}

func TestRatesAndBreakersThatCannotBeAreRefused(t *testing.T) {
	good := steadymq.Breaker{Failures: 3, Wait: time.Second}
	for name, row := range map[string]struct {
		option steadymq.Option
		says   string
	}{
		"no messages":          {steadymq.WithRate(0, time.Second), "WithRate: n must be between 1 and 1000000, got 0"},
		"too many":             {steadymq.WithRate(1_000_001, time.Second), "WithRate: n must be between 1 and 1000000, got 1000001"},
		"no unit":              {steadymq.WithRate(1, 60), "WithRate: per must be between 1ms and 24h0m0s, got 60ns"},
		"too long":             {steadymq.WithRate(100_000, 25*time.Hour), "WithRate: per must be between"},
		"slower than a broker": {steadymq.WithRate(3, time.Hour), "WithRate: one message in 20m0s is slower than half of the broker's consumer timeout (30m0s)"},
		"no failures":          {steadymq.WithBreaker(steadymq.Breaker{Wait: time.Second}), "WithBreaker: Failures must be between 1 and 1000000, got 0"},
		"no wait":              {steadymq.WithBreaker(steadymq.Breaker{Failures: 1}), "WithBreaker: Wait must be between 1ms and 24h0m0s, got 0s"},
		"wait too long":        {steadymq.WithBreaker(steadymq.Breaker{Failures: 1, Wait: 25 * time.Hour}), "WithBreaker: Wait must be between"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := steadymq.New("amqp://app:x@host", "orders", row.option, steadymq.WithBreaker(good))
			var refused *steadymq.OptionError
			if assert.ErrorAs(t, err, &refused) {
				assert.Contains(t, refused.Error(), row.says)
			}
			_, err = steadymq.NewGroup("amqp://app:x@host", row.option)
			assert.Error(t, err)
		})
	}
}
