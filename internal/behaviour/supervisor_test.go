package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// dialled are the hosts that were dialled so far, in order.
func dialled(r *rig.Rig) (all []string) {
	for _, d := range r.Broker.Ledger().Dials {
		all = append(all, d.Addr)
	}
	return all
}

// losing makes the hosts lose every handshake, which makes none of them a host that goes last.
func losing(r *rig.Rig, on bool, hosts ...int) {
	for _, i := range hosts {
		r.Broker.Host(i).DropAt(steadymqtest.StageTune, on)
	}
}

// except are the hosts of three but for one.
func except(host int) []int {
	return slices.DeleteFunc([]int{0, 1, 2}, func(i int) bool { return i == host })
}

// spread looks at many draws between two bounds: none is outside, both ends come, and the mean is
// that of draws of which each is as likely as any other.
func spread(r *rig.Rig, draws []time.Duration, least, most time.Duration) {
	r.Helper()
	require.GreaterOrEqual(r, len(draws), 1000)
	var sum float64
	for _, d := range draws {
		sum += float64(d)
	}
	span := most - least
	assert.GreaterOrEqual(r, slices.Min(draws), least)
	assert.LessOrEqual(r, slices.Max(draws), most)
	assert.Less(r, slices.Min(draws), least+span/50)
	assert.Greater(r, slices.Max(draws), most-span/50)
	assert.InDelta(r, float64(least)+float64(span)/2, sum/float64(len(draws)), float64(span)/20)
}

// Hosts.

func TestLastGoodHostIsDialledFirstEveryTime(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		for round := range 20 {
			r.Wait(11 * time.Second)
			good, before := r.HostInUse(), len(dialled(r))
			if round%5 == 4 { // it changes now and then
				losing(r, true, good)
				r.Broker.Reset()
				r.Wait(10 * time.Second)
				losing(r, false, good)
				require.NotEqual(r, good, r.HostInUse())
				require.Equal(r, r.Broker.Host(good).Addr(), dialled(r)[before], "round %d", round)
				continue
			}
			r.Broker.Reset()
			r.Wait(time.Second)
			require.Equal(r, []string{r.Broker.Host(good).Addr()}, dialled(r)[before:], "round %d", round)
		}
	}, steadymqtest.WithHosts(3))
}

func TestSilentHostIsDialledLastAndInItsTurn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack, steadymq.WithDialTimeout(time.Second))
		r.Wait(11 * time.Second)
		silent := r.HostInUse()
		before := len(dialled(r))
		r.Broker.Host(silent).BlackHole(true, true)
		losing(r, true, except(silent)...)
		r.Wait(40 * time.Second)
		order := dialled(r)[before:]
		require.GreaterOrEqual(r, len(order), 5)
		address := r.Broker.Host(silent).Addr()
		assert.NotContains(r, order[:4], address, "the others have two turns each before it")
		for _, round := range [][]string{order[:2], order[2:4]} {
			assert.NotEqual(r, round[0], round[1], "each of them once in a round: %v", order)
		}
		assert.Equal(r, address, order[4], "it has its turn all the same")
	}, steadymqtest.WithHosts(3))
}

// After a minute it is as good as any other that is not the last good one.
func TestSilentHostGoesLastForAMinuteAndNoLonger(t *testing.T) {
	for later, last := range map[time.Duration]bool{58 * time.Second: true, 62 * time.Second: false} {
		t.Run(later.String(), func(t *testing.T) {
			second := make(map[bool]int) // whether it was the silent one
			for range 40 {
				rig.Bubble(t, func(r *rig.Rig) {
					r.Consuming(rig.Ack)
					r.Wait(11 * time.Second)
					silent := r.HostInUse()
					r.Broker.Host(silent).BlackHole(true, true)
					for len(r.Causes()) == 0 {
						r.Wait(100 * time.Millisecond)
					}
					noticed := time.Now()
					r.Broker.Host(silent).BlackHole(false, false)
					r.Wait(time.Until(noticed.Add(later)))
					require.Len(r, r.Causes(), 1)
					good, before := r.HostInUse(), len(dialled(r))
					losing(r, true, good)
					r.Broker.Reset()
					r.Wait(time.Second)
					order := dialled(r)[before:]
					require.Len(r, order, 2)
					require.Equal(r, r.Broker.Host(good).Addr(), order[0], "the last good one first")
					second[order[1] == r.Broker.Host(silent).Addr()]++
				}, steadymqtest.WithHosts(3))
			}
			if last {
				assert.Equal(t, map[bool]int{false: 40}, second)
				return
			}
			assert.Greater(t, second[true], 5)
			assert.Greater(t, second[false], 5)
		})
	}
}

func TestEveryRoundDialsEveryHostOnceInAnyOrder(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		losing(r, true, 0, 1, 2)
		r.Run(rig.Ack, steadymq.WithBackoff(10*time.Millisecond, 100*time.Millisecond))
		r.Wait(time.Minute)
		order := dialled(r)
		require.Greater(r, len(order), 900)
		seen := make(map[string]int)
		for i := 0; i+3 <= 900; i += 3 {
			round := order[i : i+3]
			seen[strings.Join(round, " ")]++
			require.Len(r, slices.Compact(slices.Sorted(slices.Values(round))), 3, "round %d: %v", i/3, round)
		}
		require.Len(r, seen, 6, "every order comes")
		for round, n := range seen {
			assert.InDelta(r, 300/6, n, 35, round)
		}
	}, steadymqtest.WithHosts(3))
}

// Where no host is good yet, and all consumers start at once, they spread over the hosts.
func TestFirstHostOfARunIsAnyOfThem(t *testing.T) {
	first := make(map[string]int)
	for range 120 {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Consuming(rig.Ack)
			first[dialled(r)[0]]++
		}, steadymqtest.WithHosts(3))
	}
	require.Len(t, first, 3)
	for host, n := range first {
		assert.InDelta(t, 40, n, 25, host)
	}
}

// A session this long makes all hosts untried, a shorter one does not.
func TestHostsAreUntriedAgainAfterASessionOfTenSeconds(t *testing.T) {
	for up, want := range map[time.Duration]bool{9900 * time.Millisecond: false, 10100 * time.Millisecond: true} {
		t.Run(up.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack) // 100 ms
				r.Wait(time.Minute)
				r.Broker.Reset()
				r.Wait(60 * time.Millisecond)
				for r.Consumer.State() != steadymq.Consuming {
					r.Wait(time.Millisecond)
				}
				r.Wait(up)
				good, before := r.HostInUse(), len(dialled(r))
				r.Broker.Reset() // the good one was tried once in this row, unless that is forgotten
				r.Wait(time.Second)
				order := dialled(r)[before:]
				require.Len(r, order, 1)
				assert.Equal(r, want, order[0] == r.Broker.Host(good).Addr())
			}, steadymqtest.WithHosts(3))
		})
	}
}

// Pace.

// failings are faults of each class, from the start on, and the bounds of the nth wait in a row.
var failings = map[string]struct {
	fault       func(r *rig.Rig)
	options     []steadymqtest.Option
	least, most func(n int) time.Duration
}{
	"the path is lost": {
		fault: func(r *rig.Rig) { losing(r, true, 0) },
		least: always(0), most: doubled(250*time.Millisecond, 10*time.Second),
	},
	"the broker closes": {
		fault: func(r *rig.Rig) { r.Broker.RefuseVhost(320, "CONNECTION_FORCED - shutdown") },
		least: always(0), most: doubled(250*time.Millisecond, 10*time.Second),
	},
	"a channel is closed": {
		fault: func(r *rig.Rig) {
			r.Broker.RefuseConsume(406, "PRECONDITION_FAILED - unknown delivery tag 1")
		},
		least: always(0), most: doubled(250*time.Millisecond, 10*time.Second),
	},
	"the dial is refused": {
		fault: func(r *rig.Rig) { r.Broker.Refuse(true) },
		least: always(0), most: doubled(250*time.Millisecond, time.Second),
	},
	"the queue is missing": {
		fault: func(r *rig.Rig) { r.Broker.DeleteQueue(rig.Queue) },
		least: always(time.Second), most: above(time.Second, doubled(time.Second, 5*time.Second)),
	},
	"the queue is locked": {
		fault: func(r *rig.Rig) { r.Broker.RefuseConsume(405, "RESOURCE_LOCKED - locked") },
		least: always(500 * time.Millisecond), most: always(time.Second),
	},
	"it is forbidden": {
		fault: func(r *rig.Rig) {
			r.Broker.RefuseConsume(403, "ACCESS_REFUSED - access to queue 'orders' in vhost '/' refused for user 'app'")
		},
		least: always(time.Second), most: above(time.Second, doubled(time.Second, 30*time.Second)),
	},
	"the certificate is not trusted": {
		fault: func(*rig.Rig) {}, options: []steadymqtest.Option{steadymqtest.WithTLS()},
		least: always(time.Second), most: above(time.Second, doubled(time.Second, 30*time.Second)),
	},
}

func always(d time.Duration) func(int) time.Duration { return func(int) time.Duration { return d } }

// doubled doubles from the first wait to the longest.
func doubled(first, longest time.Duration) func(int) time.Duration {
	return func(n int) time.Duration { return min(first<<(n-1), longest) }
}

// above is never less.
func above(least time.Duration, f func(int) time.Duration) func(int) time.Duration {
	return func(n int) time.Duration { return max(least, f(n)) }
}

func TestWaitsOfEachFailureGrowWithinTheirBounds(t *testing.T) {
	const rounds, runs = 8, 60
	for name, c := range failings {
		t.Run(name, func(t *testing.T) {
			waits := make([][]time.Duration, rounds)
			for range runs {
				rig.Bubble(t, func(r *rig.Rig) {
					c.fault(r)
					r.Run(rig.Ack, steadymq.WithFatal(func(error) bool { return false }))
					for len(r.Causes()) < rounds {
						r.Wait(time.Second)
					}
					var all []steadymq.StateChange
					for _, change := range r.Changes() {
						if change.To == steadymq.Backoff {
							all = append(all, change)
						}
					}
					for i := range rounds {
						waits[i] = append(waits[i], all[i].RetryIn)
						assert.Equal(r, i+1, all[i].Attempt)
					}
				}, c.options...)
			}
			for i, draws := range waits {
				least, most := c.least(i+1), c.most(i+1)
				assert.GreaterOrEqual(t, slices.Min(draws), least, "wait %d", i+1)
				assert.LessOrEqual(t, slices.Max(draws), most, "wait %d", i+1)
				// Of so many draws the chance that none comes near an end is below one in a million.
				assert.LessOrEqual(t, slices.Min(draws), least+(most-least)/4, "wait %d: the whole range", i+1)
				assert.GreaterOrEqual(t, slices.Max(draws), most-(most-least)/4, "wait %d: the whole range", i+1)
			}
		})
	}
}

// What is told is what is waited.
func TestNextTryComesWhenItWasTold(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		losing(r, true, 0)
		r.Run(rig.Ack)
		r.Wait(5 * time.Minute)
		changes := r.Changes()
		require.Greater(r, len(changes), 60)
		for i, c := range changes[:len(changes)-1] {
			if c.To == steadymq.Backoff {
				assert.Equal(r, c.Time.Add(c.RetryIn), changes[i+1].Time)
			} else {
				assert.Zero(r, c.RetryIn)
			}
		}
	})
}

func TestJitterOfAThousandFirstRetries(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		for range 1000 {
			r.Wait(71 * time.Second) // a healthy session
			r.Broker.Reset()
		}
		r.Wait(time.Second)
		var draws []time.Duration
		for _, c := range r.Changes() {
			if c.To == steadymq.Backoff {
				draws = append(draws, c.RetryIn)
				require.Equal(r, 1, c.Attempt)
			}
		}
		spread(r, draws, 0, 20*time.Millisecond)
	})
}

func TestJitterOfAThousandWaits(t *testing.T) {
	for name, c := range failings {
		if len(c.options) > 0 {
			continue // a thousand TLS handshakes take seconds, and it has the pace of what is forbidden
		}
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				c.fault(r)
				options := rig.Options(steadymq.WithFatal(func(error) bool { return false }))
				if strings.Contains(name, "locked") { // or it would be the operator's soon
					options = append(options, steadymq.WithHeartbeat(10*time.Minute))
				}
				r.Run(rig.Ack, options...)
				enough := 1010
				for len(r.Causes()) < enough {
					r.Wait(time.Minute)
				}
				var draws []time.Duration
				for _, change := range r.Changes() {
					if change.To == steadymq.Backoff && change.Attempt > 10 {
						draws = append(draws, change.RetryIn)
					}
				}
				spread(r, draws[:1000], c.least(10), c.most(10))
			}, c.options...)
		})
	}
}

func TestJitterOfAThousandHolds(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.RemakeQueue("quorum")
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			if d.Attempt() == 1 {
				return errAway
			}
			return nil
		}, steadymq.WithPrefetch(1000))
		r.PublishMany(1000, "x")
		r.Wait(time.Minute)
		var holds []time.Duration
		for _, hold := range holdsOf(r) {
			holds = append(holds, hold-2*time.Millisecond) // there and back
		}
		spread(r, holds, time.Second/2-2*time.Millisecond, time.Second*3/2+2*time.Millisecond)
		assert.EqualValues(r, 1000, r.Consumer.Stats().Acked)
	}, steadymqtest.WithVersion(4, 3))
}

// A session that proves itself begins the row anew: by 70 s, or by 10 s and a settlement.
func TestSessionThatProvesItselfBeginsTheRowAnew(t *testing.T) {
	for name, c := range map[string]struct {
		up      time.Duration
		settles bool
		anew    bool
	}{
		"69.9 s":           {69900 * time.Millisecond, false, false},
		"70.1 s":           {70100 * time.Millisecond, false, true},
		"9.9 s and an ack": {9900 * time.Millisecond, true, false},
		"10.1 s and one":   {10100 * time.Millisecond, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack)
				r.Broker.Reset()
				r.Wait(20 * time.Millisecond)
				for range 3 {
					for r.Consumer.State() != steadymq.Consuming {
						r.Wait(time.Millisecond)
					}
					r.Broker.Reset()
					r.Wait(20 * time.Millisecond)
				}
				for r.Consumer.State() != steadymq.Consuming {
					r.Wait(time.Millisecond)
				}
				require.Equal(r, 4, r.LastChange().Attempt)
				if c.settles {
					r.Broker.Publish(rig.Queue, "x")
				}
				r.Wait(c.up)
				r.Broker.Reset()
				r.Wait(15 * time.Second)
				want := 5
				if c.anew {
					want = 1
				}
				for _, change := range slices.Backward(r.Changes()) {
					if change.To == steadymq.Backoff {
						assert.Equal(r, want, change.Attempt)
						break
					}
				}
			})
		})
	}
}

// Logins.

// The letters are what becomes of each try before the first session: r is a login that is refused,
// f any other failure, s a session that is lost again.
func TestRefusedLoginsAreCountedInARowOnly(t *testing.T) {
	for tries, ends := range map[string]bool{
		"rrr": true, "rrfrrr": true, "frrr": true, "rfrfrfrrr": true, "rrfrrfrrr": true,
		"rr": false, "rrfrr": false, "rfrfrfrfrfrf": false, "rrfrrfrrfrr": false,
		"srrrrrrrr": false, "rrsrrrrrrrrr": false,
	} {
		t.Run(tries, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				asked := 0
				r.Run(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
					try := byte('f')
					if asked < len(tries) {
						try = tries[asked]
					}
					asked++
					switch try {
					case 'r':
						return steadymq.Credentials{Username: "app", Password: "wrong"}, nil
					case 's':
						time.AfterFunc(time.Second, func() { r.Broker.Reset() })
						return steadymq.Credentials{Username: "app", Password: rig.Password}, nil
					}
					return steadymq.Credentials{}, errors.New("the issuer is down")
				}))
				r.Wait(20 * time.Minute)
				if !ends {
					assert.Greater(r, asked, len(tries))
					assert.Empty(r, r.Result, "it goes on")
					return
				}
				assert.Equal(r, len(tries), asked)
				require.Len(r, r.Result, 1)
				err := <-r.Result
				r.Result = nil
				assert.ErrorIs(r, err, steadymq.ErrLoginRefused)
			})
		})
	}
}

// A path that is cut in the login looks like a refusal that is not told.
func TestSilentRefusalsAreCountedInARowOnly(t *testing.T) {
	for tries, ends := range map[string]bool{"rrr": true, "rrfrrr": true, "rrfrr": false} {
		t.Run(tries, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.SetLoginRefusal(steadymqtest.RefusalByReset)
				asked := 0
				dial := r.Broker.Dialer()
				r.Run(rig.Ack, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
					refuses := asked < len(tries) && tries[asked] == 'r'
					asked++
					r.Broker.RefuseLogin(refuses)
					if !refuses {
						return nil, errors.New("no route")
					}
					return dial(ctx, network, address)
				}))
				r.Wait(5 * time.Minute)
				if !ends {
					assert.Greater(r, asked, len(tries))
					assert.Empty(r, r.Result, "it goes on")
					return
				}
				assert.Equal(r, len(tries), asked)
				require.Len(r, r.Result, 1)
				err := <-r.Result
				r.Result = nil
				assert.ErrorIs(r, err, steadymq.ErrLoginRefused)
			})
		})
	}
}

func TestCredentialsAreAskedForOncePerDial(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		asked := 0
		r.Consuming(rig.Ack, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
			asked++
			password := fmt.Sprint("secret ", asked)
			r.Broker.SetPassword("app", password) // none of before is of use
			return steadymq.Credentials{Username: "app", Password: password}, nil
		}))
		for n := range 20 {
			require.Equal(r, steadymq.Consuming, r.Consumer.State())
			require.Equal(r, n+1, asked)
			require.Len(r, dialled(r), n+1)
			r.Wait(31 * time.Second)
			r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 1")
			r.Wait(5 * time.Second)
			require.Equal(r, n+1, asked, "another session needs no login")
			r.Wait(11 * time.Second)
			r.Broker.Reset()
			r.Wait(5 * time.Second)
		}
	}, steadymqtest.WithHosts(2))
}

// Locks.

// A lock is waited for as long as a broker needs to bury a connection of this heartbeat.
func TestLockIsWaitedForAsLongAsItsHeartbeatSays(t *testing.T) {
	for _, c := range []struct {
		options []steadymq.Option
		patient time.Duration
	}{
		{nil, 35 * time.Second},
		{rig.Options(steadymq.WithHeartbeat(time.Second)), 8 * time.Second},
		{rig.Options(steadymq.WithHeartbeat(4 * time.Second)), 17 * time.Second},
		{rig.Options(steadymq.WithHeartbeat(40 * time.Second)), 125 * time.Second},
	} {
		t.Run(c.patient.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.RefuseConsume(405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'orders' in vhost '/'")
				r.Run(rig.Ack, c.options...)
				r.Wait(c.patient + 5*time.Minute)
				var first time.Time
				var later []time.Duration
				quick := 0
				for _, change := range r.Changes() {
					if change.To != steadymq.Backoff {
						continue
					}
					if first.IsZero() {
						first = change.Time
					}
					if change.Time.Sub(first) < c.patient {
						quick++
						assert.GreaterOrEqual(r, change.RetryIn, time.Second/2)
						assert.LessOrEqual(r, change.RetryIn, time.Second)
					} else {
						later = append(later, change.RetryIn)
					}
				}
				assert.InDelta(r, c.patient.Seconds()/0.75, quick, c.patient.Seconds()/0.75/5+2)
				require.NotEmpty(r, later)
				assert.Equal(r, time.Second, later[0], "the first wait of what an operator has to mend")
				assert.Greater(r, slices.Max(later), 5*time.Second)
				assert.GreaterOrEqual(r, slices.Min(later), time.Second)
			})
		})
	}
}

// Escalation.

// The third failure of a channel within 30 s replaces the connection, counted on each connection
// anew.
func TestThirdChannelFailureWithin30sReplacesTheConnection(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	for name, c := range map[string]struct {
		at   []time.Duration // when a channel fails
		want []uint64        // connections after each
	}{
		"at once":             {[]time.Duration{0, s, 2 * s}, []uint64{1, 1, 2}},
		"just within":         {[]time.Duration{0, 15 * s, 29*s + 900*ms}, []uint64{1, 1, 2}},
		"just not within":     {[]time.Duration{0, 15 * s, 30*s + 100*ms}, []uint64{1, 1, 1}},
		"the window moves":    {[]time.Duration{0, 15 * s, 31 * s, 44 * s}, []uint64{1, 1, 1, 2}},
		"every 15.1 s":        {[]time.Duration{0, 15100 * ms, 30200 * ms, 45300 * ms, 60400 * ms}, []uint64{1, 1, 1, 1, 1}},
		"on each of them":     {[]time.Duration{0, 3 * s, 6 * s, 9 * s, 14 * s, 17 * s}, []uint64{1, 1, 2, 2, 2, 3}},
		"two only, long away": {[]time.Duration{0, s, 60 * s, 61 * s}, []uint64{1, 1, 1, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack, steadymq.WithBackoff(10*ms, 20*ms))
				r.Wait(time.Minute)
				began := time.Now()
				for i, at := range c.at {
					r.Wait(time.Until(began.Add(at)))
					require.Equal(r, steadymq.Consuming, r.Consumer.State())
					require.Equal(r, 1, r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 1"))
					r.Wait(90 * ms)
					require.Equal(r, c.want[i], r.Consumer.Stats().Connections, "failure %d", i+1)
				}
			})
		})
	}
}

// What another connection would meet, too, replaces none; a stall replaces it at once.
func TestFailuresOfNoConnectionReplaceNone(t *testing.T) {
	for name, fault := range map[string]func(r *rig.Rig){
		"locked":  func(r *rig.Rig) { r.Broker.RefuseConsume(405, "RESOURCE_LOCKED - locked") },
		"missing": func(r *rig.Rig) { r.Broker.DeleteQueue(rig.Queue) },
	} {
		rig.Bubble(t, func(r *rig.Rig) {
			r.Consuming(rig.Ack)
			fault(r)
			r.Broker.CancelConsumers(rig.Queue)
			r.Wait(25 * time.Second)
			assert.Greater(r, len(r.Causes()), 3, name)
			assert.EqualValues(r, 1, r.Consumer.Stats().Connections, name)
		})
	}
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(rig.Ack)
		r.Broker.RefuseConsume(403, "ACCESS_REFUSED - access to queue 'orders' in vhost '/' refused for user 'app'")
		r.Broker.CancelConsumers(rig.Queue)
		r.Wait(25 * time.Second)
		assert.Greater(r, r.Consumer.Stats().Connections, uint64(1), "what is forbidden here may be allowed elsewhere")
	})
}
