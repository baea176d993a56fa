package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

func TestCredentialsAreFreshForEveryDial(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		current := atomic.Pointer[string]{}
		set := func(p string) { current.Store(&p); r.Broker.SetPassword("app", p) }
		set("one")
		r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			return steadymq.Credentials{Username: "app", Password: *current.Load()}, nil
		}))
		set("two")
		r.Broker.Reset()
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.NotContains(r, fmt.Sprintf("%v %+v %#v", steadymq.Credentials{Password: "two"}, &steadymq.Credentials{Password: "two"}, steadymq.Credentials{Password: "two"}), "two")
	})
}

func TestExpiringCredentialsAreRenewedOnTheStandingConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var asked atomic.Int32
		r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			if n := asked.Add(1); n%3 == 2 {
				return steadymq.Credentials{}, errors.New("token service is down")
			}
			return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: time.Now().Add(time.Hour)}, nil
		}))
		r.Wait(5 * time.Hour)
		assert.EqualValues(r, 1, r.Consumer.Stats().Connections, "never out of date")
		assert.Greater(r, asked.Load(), int32(6))
		assert.Less(r, asked.Load(), int32(30))
	})
}

func TestCredentialsAreRefreshedOverTheWholeRangeOfTheirExpiry(t *testing.T) {
	const day = 24 * time.Hour
	for _, c := range []struct {
		name        string
		expires     func(now time.Time) time.Time
		least, most int32 // questions in three hours, that of the dial included
	}{
		{"never", func(time.Time) time.Time { return time.Time{} }, 1, 1},
		{"the farthest time", func(time.Time) time.Time { return time.Unix(1<<62, 0) }, 1, 1},
		{"the year 9999", func(time.Time) time.Time { return time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) }, 1, 1},
		{"in 292 years", func(now time.Time) time.Time { return now.Add(math.MaxInt64) }, 1, 1},
		{"in 60 years", func(now time.Time) time.Time { return now.Add(60 * 365 * day) }, 1, 1},
		{"in 100 years", func(now time.Time) time.Time { return now.Add(100 * 365 * day) }, 1, 1},
		{"in an hour", func(now time.Time) time.Time { return now.Add(time.Hour) }, 5, 5},
		{"in a minute", func(now time.Time) time.Time { return now.Add(time.Minute) }, 255, 259},
		{"in 10 s", func(now time.Time) time.Time { return now.Add(10 * time.Second) }, 1530, 1545},
		{"now", func(now time.Time) time.Time { return now }, 250, 2500},
		{"a nanosecond ago", func(now time.Time) time.Time { return now.Add(-1) }, 250, 2500},
		{"an hour ago", func(now time.Time) time.Time { return now.Add(-time.Hour) }, 250, 2500},
		{"in 1970", func(time.Time) time.Time { return time.Unix(0, 0) }, 250, 2500},
		{"before all times", func(time.Time) time.Time { return time.Unix(-1<<62, 0) }, 250, 2500},
	} {
		t.Run(c.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var asked atomic.Int32
				r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
					asked.Add(1)
					return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: c.expires(time.Now())}, nil
				}))
				r.Wait(3 * time.Hour)
				assert.EqualValues(r, 1, r.Consumer.Stats().Connections)
				assert.GreaterOrEqual(r, asked.Load(), c.least)
				assert.LessOrEqual(r, asked.Load(), c.most)
			})
		})
	}
}

func TestIssuerThatFailsIsAskedEverMoreSlowly(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var asked atomic.Int32
		var works atomic.Bool
		works.Store(true)
		r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			asked.Add(1)
			if !works.Load() {
				return steadymq.Credentials{}, errors.New("token service is down")
			}
			return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: time.Now().Add(time.Hour)}, nil
		}))
		works.Store(false)
		r.Wait(time.Hour)
		assert.Less(r, asked.Load(), int32(15), "in 70 % of what is left")
		asked.Store(0)
		r.Wait(10 * time.Hour)
		assert.Less(r, asked.Load(), int32(3600), "then every 15 s on average")
		assert.Greater(r, asked.Load(), int32(1200), "but at least every 30 s")

		works.Store(true)
		r.Wait(31 * time.Second)
		asked.Store(0)
		r.Wait(10 * time.Hour)
		assert.LessOrEqual(r, asked.Load(), int32(15), "every 42 minutes again")
	})
}

func TestExpiredCredentialsAtTheDialAreLeftToTheBroker(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var asked atomic.Int32
		r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			asked.Add(1)
			return steadymq.Credentials{Username: "app", Password: rig.Password, Expires: time.Now().Add(-time.Hour)}, nil
		}))
		r.Broker.RefuseLogin(true)
		r.Broker.Reset()
		asked.Store(0)
		r.Wait(2 * time.Hour)
		assert.Less(r, asked.Load(), int32(720))
		r.Broker.Heal()
		r.Wait(35 * time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	})
}
