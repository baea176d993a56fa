package behaviour_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// What the options measure in time, in turn: left out, given, given twice, and where they meet
// others.

// untilFailure runs the consumer and returns how long it takes until its first failure.
func untilFailure(r *rig.Rig, tail string, options ...steadymq.Option) time.Duration {
	r.Helper()
	began := time.Now()
	tapped(r, brokerURL(r, tail), rig.Queue, options...)
	r.Start(rig.Ack)
	return firstFailure(r, began)
}

// firstFailure returns when the consumer has failed first, counted from began.
func firstFailure(r *rig.Rig, began time.Time) time.Duration {
	r.Helper()
	r.Wait(time.Hour)
	for _, c := range r.Changes() {
		if c.To == steadymq.Backoff {
			return c.Time.Sub(began)
		}
	}
	return 0
}

// took runs the consumer with this handler for one message and returns how long its stop takes.
func took(r *rig.Rig, h steadymq.Handler, options ...steadymq.Option) time.Duration {
	r.Helper()
	r.Consuming(h, options...)
	r.Broker.Publish(rig.Queue, "tea")
	r.Wait(time.Second)
	began := time.Now()
	_ = r.Stop()
	return time.Since(began)
}

// endless is a handler that takes no notice of its context for an hour.
func endless(context.Context, *steadymq.Delivery) error {
	time.Sleep(time.Hour)
	return nil
}

func TestLimitsLastAsLongAsTheySay(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	dial := func(tail string, options ...steadymq.Option) func(r *rig.Rig) time.Duration {
		return func(r *rig.Rig) time.Duration {
			r.Broker.DropSYN(true)
			return untilFailure(r, tail, options...)
		}
	}
	setUp := func(stage steadymqtest.Stage, options ...steadymq.Option) func(r *rig.Rig) time.Duration {
		return func(r *rig.Rig) time.Duration {
			r.Broker.HangAt(stage, true)
			return untilFailure(r, "", options...)
		}
	}
	closing := func(options ...steadymq.Option) func(r *rig.Rig) time.Duration {
		return func(r *rig.Rig) time.Duration {
			r.Broker.NoCloseOk(true)
			return took(r, rig.Ack, options...)
		}
	}
	draining := func(options ...steadymq.Option) func(r *rig.Rig) time.Duration {
		return func(r *rig.Rig) time.Duration {
			defer r.Wait(time.Hour) // until the handler is back
			return took(r, endless, options...)
		}
	}
	silence := func(tail string, options ...steadymq.Option) func(r *rig.Rig) time.Duration {
		return func(r *rig.Rig) time.Duration {
			tapped(r, brokerURL(r, tail), rig.Queue, options...)
			r.Start(rig.Ack)
			r.Wait(100 * time.Millisecond)
			r.Broker.Silence()
			return firstFailure(r, time.Now())
		}
	}
	fullPath := func(tail string, options ...steadymq.Option) func(r *rig.Rig) time.Duration {
		return func(r *rig.Rig) time.Duration {
			tapped(r, brokerURL(r, tail), rig.Queue, append(options, steadymq.WithPrefetch(10_000))...)
			r.Start(rig.Ack)
			r.Wait(100 * time.Millisecond)
			r.Broker.ZeroWindow(true)
			began := time.Now()
			r.PublishMany(5000, "") // whose acks are more than the path takes
			return firstFailure(r, began)
		}
	}
	stalled := func(options ...steadymq.Option) func(r *rig.Rig) time.Duration {
		return func(r *rig.Rig) time.Duration {
			r.RemakeQueue("quorum")
			r.Consuming(rig.Ack, options...)
			r.Broker.QuorumStall(rig.Queue, true)
			r.Broker.Publish(rig.Queue, "tea")
			return firstFailure(r, time.Now())
		}
	}
	timeout := func(options ...steadymq.Option) func(r *rig.Rig) time.Duration {
		return func(r *rig.Rig) time.Duration {
			var lasted atomic.Int64
			r.Consuming(func(ctx context.Context, _ *steadymq.Delivery) error {
				began := time.Now()
				select {
				case <-ctx.Done():
					lasted.Store(int64(time.Since(began)))
					assert.ErrorIs(r, context.Cause(ctx), steadymq.ErrHandlerTimeout)
				case <-time.After(2 * time.Hour):
				}
				return nil
			}, options...)
			r.Broker.Publish(rig.Queue, "tea")
			r.Wait(3 * time.Hour)
			return time.Duration(lasted.Load())
		}
	}
	dialLimit, setUpLimit, closeLimit, drainLimit := steadymq.WithDialTimeout, steadymq.WithSetupTimeout, steadymq.WithCloseTimeout, steadymq.WithDrainTimeout
	for name, c := range map[string]struct {
		measure     func(r *rig.Rig) time.Duration
		least, most time.Duration
	}{
		"dial":                                    {dial(""), 5 * s, 5 * s},
		"dial, given":                             {dial("", dialLimit(7*s)), 7 * s, 7 * s},
		"dial, given twice":                       {dial("", dialLimit(7*s), dialLimit(2*s)), 2 * s, 2 * s},
		"dial, connection_timeout":                {dial("?connection_timeout=900"), 900 * ms, 900 * ms},
		"dial, above the set-up limit":            {dial("", dialLimit(7*s), setUpLimit(3*s)), 3 * s, 3 * s},
		"dial, given as the default":              {dial("?connection_timeout=900", dialLimit(5*s)), 5 * s, 5 * s},
		"dial, beside a longer set-up limit":      {dial("", setUpLimit(20*s)), 5 * s, 5 * s},
		"dial, below the set-up limit":            {dial("", dialLimit(2*s), setUpLimit(9*s)), 2 * s, 2 * s},
		"set-up":                                  {setUp(steadymqtest.StageTune), 15 * s, 15 * s},
		"set-up, given":                           {setUp(steadymqtest.StageTune, setUpLimit(2*s)), 2 * s, 2 * s},
		"set-up, given twice":                     {setUp(steadymqtest.StageTune, setUpLimit(2*s), setUpLimit(3*s)), 3 * s, 3 * s},
		"set-up, at the consume":                  {setUp(steadymqtest.StageConsume), 15 * s, 15 * s},
		"set-up, not the dial's":                  {setUp(steadymqtest.StageTune, dialLimit(s)), 15 * s, 15 * s},
		"close":                                   {closing(), 5 * s, 6 * s},
		"close, given":                            {closing(closeLimit(3 * s)), 3 * s, 4 * s},
		"close, given twice":                      {closing(closeLimit(3*s), closeLimit(8*s)), 8 * s, 9 * s},
		"drain":                                   {draining(), 20 * s, 20*s + 600*ms},
		"drain, given":                            {draining(drainLimit(7 * s)), 7 * s, 7*s + 600*ms},
		"drain, given twice":                      {draining(drainLimit(7*s), drainLimit(30*s)), 30 * s, 30*s + 600*ms},
		"drain, not the close's":                  {draining(drainLimit(7*s), closeLimit(s)), 7 * s, 7*s + 600*ms},
		"drain, beside a longer close":            {draining(closeLimit(40 * s)), 20 * s, 20*s + 600*ms},
		"drain, beside a longer handler timeout":  {draining(steadymq.WithHandlerTimeout(40 * s)), 20 * s, 20*s + 600*ms},
		"close, beside other limits":              {closing(drainLimit(s), dialLimit(s), setUpLimit(s)), 5 * s, 6 * s},
		"heartbeat":                               {silence(""), 10 * s, 15 * s},
		"heartbeat, given":                        {silence("", steadymq.WithHeartbeat(30*s)), 30 * s, 45 * s},
		"heartbeat, of the URL":                   {silence("?heartbeat=2"), 2 * s, 3 * s},
		"heartbeat, of both":                      {silence("?heartbeat=2", steadymq.WithHeartbeat(20*s)), 20 * s, 30 * s},
		"heartbeat, full path":                    {fullPath(""), 10 * s, 10*s + 100*ms},
		"heartbeat, full path, given":             {fullPath("", steadymq.WithHeartbeat(4*s)), 4 * s, 4*s + 100*ms},
		"heartbeat, full path, of the URL":        {fullPath("?heartbeat=3"), 3 * s, 3*s + 100*ms},
		"stall detector":                          {stalled(), 0, 0},
		"stall detector, given":                   {stalled(steadymq.WithStallDetector(30 * s)), 30 * s, 65*s + 100*ms},
		"stall detector, given twice":             {stalled(steadymq.WithStallDetector(30*s), steadymq.WithStallDetector(5*time.Minute)), 5 * time.Minute, 10*time.Minute + 5*s + 100*ms},
		"handler timeout":                         {timeout(), 0, 0},
		"handler timeout, given":                  {timeout(steadymq.WithHandlerTimeout(7 * s)), 7 * s, 7 * s},
		"handler timeout, given twice":            {timeout(steadymq.WithHandlerTimeout(7*s), steadymq.WithHandlerTimeout(9*s)), 9 * s, 9 * s},
		"handler timeout, above the drain's":      {timeout(steadymq.WithHandlerTimeout(50*s), drainLimit(s)), 50 * s, 50 * s},
		"handler timeout, the only one of others": {timeout(dialLimit(s), setUpLimit(s), closeLimit(s), drainLimit(s)), 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				got := c.measure(r)
				assert.GreaterOrEqual(r, got, c.least)
				assert.LessOrEqual(r, got, c.most)
			})
		})
	}
}

// A dialer of the user's knows nothing of limits but what its context says.
func TestDialerIsToldItsLimit(t *testing.T) {
	for name, c := range map[string]struct {
		tail    string
		options []steadymq.Option
		want    time.Duration
	}{
		"default":                         {"", nil, 5 * time.Second},
		"WithDialTimeout":                 {"", rig.Options(steadymq.WithDialTimeout(time.Second)), time.Second},
		"connection_timeout":              {"?connection_timeout=70", nil, 70 * time.Millisecond},
		"WithSetupTimeout, shorter":       {"", rig.Options(steadymq.WithSetupTimeout(3 * time.Second)), 3 * time.Second},
		"connection_timeout, the longest": {"?connection_timeout=86400000", rig.Options(steadymq.WithSetupTimeout(24 * time.Hour)), 24 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				tap := tapped(r, brokerURL(r, c.tail), rig.Queue, c.options...)
				r.Start(rig.Ack)
				r.Wait(10 * time.Millisecond)
				require.Len(r, tap.asked(), 1)
				assert.Equal(r, tappedDial{"tcp", "mq1.test:5672", c.want}, tap.asked()[0])
			})
		})
	}
}

func TestEachURLIsDialledAsItSays(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.Refuse(true)
		tap := tapped(r, "amqp://a.test?connection_timeout=700", rig.Queue, steadymq.WithURLs("amqp://never.test"),
			steadymq.WithURLs("amqp://b.test:1234", "amqp://[2001:db8::1]:77/v?connection_timeout=300"))
		r.Start(rig.Ack)
		r.Wait(time.Minute)
		limits := make(map[string]time.Duration)
		for _, d := range tap.asked() {
			limits[d.address] = d.limit
		}
		assert.Equal(r, map[string]time.Duration{
			"a.test:5672": 700 * time.Millisecond, "b.test:1234": 5 * time.Second, "[2001:db8::1]:77": 300 * time.Millisecond,
		}, limits, "the second WithURLs takes the place of the first, not of the URL given to New")
	})
}

// The URLs differ in all that a URL says, and each connection follows its own.
func TestEachURLIsLoggedInToAsItSays(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		tap := tapped(r, "amqp://one:"+rig.Password+"@mq1.test/v1?heartbeat=3&channel_max=11", rig.Queue,
			steadymq.WithURLs("amqp://two:"+rig.Password+"@mq2.test/v2?auth_mechanism=amqplain", "amqp://app:"+rig.Password+"@mq3.test"))
		r.Broker.SetPassword("one", rig.Password)
		r.Broker.SetPassword("two", rig.Password)
		for i := range 3 {
			r.Broker.Host(i).RefuseVhost(320, "CONNECTION_FORCED - not today") // which every try survives
		}
		r.Start(rig.Ack)
		r.Wait(time.Minute)
		said := make(map[string]string)
		for i, d := range tap.asked() {
			said[d.address] = strings.Join(only(wireText(tap.methods(i)), "login", "tune-ok", "open"), "\n")
		}
		assert.Equal(r, map[string]string{
			"mq1.test:5672": `login mechanism=PLAIN response="\x00one\x00canary-swordfish" locale=en_US` + "\n" +
				"tune-ok channel_max=11 frame_max=131072 heartbeat=3\n" + `open "v1"`,
			"mq2.test:5672": `login mechanism=AMQPLAIN response={LOGIN="two" PASSWORD="canary-swordfish"} locale=en_US` + "\n" +
				"tune-ok channel_max=2047 frame_max=131072 heartbeat=10\n" + `open "v2"`,
			"mq3.test:5672": `login mechanism=PLAIN response="\x00app\x00canary-swordfish" locale=en_US` + "\n" +
				"tune-ok channel_max=2047 frame_max=131072 heartbeat=10\n" + `open "/"`,
		}, said)
	}, steadymqtest.WithHosts(3))
}

func TestDialerGivenTwiceIsTheLaterOne(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		never := dialler(func() (net.Conn, error) { return nil, errors.New("the earlier dialer") })
		r.Consuming(rig.Ack, never, steadymq.WithDialer(r.Broker.Dialer()))
		assert.Empty(r, r.Causes())
	})
}

func TestHandlersAreAsManyAsWithConcurrencySays(t *testing.T) {
	for name, c := range map[string]struct {
		options []steadymq.Option
		want    int
	}{
		"default":        {nil, 1},
		"given":          {rig.Options(steadymq.WithConcurrency(3)), 3},
		"given twice":    {rig.Options(steadymq.WithConcurrency(3), steadymq.WithConcurrency(2)), 2},
		"with prefetch":  {rig.Options(steadymq.WithPrefetch(7)), 1},
		"above prefetch": {rig.Options(steadymq.WithConcurrency(40)), 40},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				started, release := make(chan *steadymq.Delivery, 50), make(chan struct{})
				r.Consuming(rig.Hold(started, release), c.options...)
				r.PublishMany(50, "tea")
				r.Wait(time.Second)
				assert.Len(r, started, c.want)
				close(release)
			})
		})
	}
}

func TestMessagesAreSentAheadAsWithPrefetchSays(t *testing.T) {
	for want, options := range map[int][]steadymq.Option{
		32: nil,
		5:  rig.Options(steadymq.WithPrefetch(5)),
		40: rig.Options(steadymq.WithConcurrency(40)),
	} {
		rig.Bubble(t, func(r *rig.Rig) {
			started, release := make(chan *steadymq.Delivery, 50), make(chan struct{})
			r.Consuming(rig.Hold(started, release), options...)
			r.PublishMany(50, "tea")
			r.Wait(time.Second)
			assert.Equal(r, want, r.Broker.Unsettled(rig.Queue))
			close(release)
		})
	}
}

func TestBodiesAreKeptUpToWithMaxMessageSize(t *testing.T) {
	size := steadymq.WithMaxMessageSize
	for name, c := range map[string]struct {
		options []steadymq.Option
		fits    int
		not     int // 0: all do
	}{
		"default":          {nil, 17 << 20, 0},
		"given":            {rig.Options(size(10)), 10, 11},
		"given twice":      {rig.Options(size(10), size(20)), 20, 21},
		"the least":        {rig.Options(size(1)), 1, 2},
		"as large as ever": {rig.Options(size(1<<63 - 1)), 100, 0},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var unreadable atomic.Int64
				options := append(slices.Clone(c.options), steadymq.WithHooks(steadymq.Hooks{Unreadable: func(*steadymq.MessageError) { unreadable.Add(1) }}))
				r.Consuming(rig.Ack, options...)
				r.Broker.Publish(rig.Queue, strings.Repeat("x", c.fits))
				r.Wait(time.Second)
				assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
				assert.Zero(r, unreadable.Load())
				if c.not > 0 {
					r.Broker.Publish(rig.Queue, strings.Repeat("x", c.not))
					r.Wait(time.Second)
					assert.EqualValues(r, 1, r.Consumer.Stats().Acked)
					assert.EqualValues(r, 1, unreadable.Load())
				}
			})
		})
	}
}

// The first ack of a burst leaves at once, those after it share writes.
func TestAcksWaitForOthersAsLongAsWithWriteDelaySays(t *testing.T) {
	delay := steadymq.WithWriteDelay
	for name, c := range map[string]struct {
		options []steadymq.Option
		want    time.Duration
	}{
		"default":       {nil, time.Millisecond},
		"given":         {rig.Options(delay(20 * time.Millisecond)), 20 * time.Millisecond},
		"given twice":   {rig.Options(delay(20*time.Millisecond), delay(3*time.Millisecond)), 3 * time.Millisecond},
		"the longest":   {rig.Options(delay(100 * time.Millisecond)), 100 * time.Millisecond},
		"none":          {rig.Options(delay(0)), 0},
		"none at last":  {rig.Options(delay(time.Second/20), delay(0)), 0},
		"of 1 ns":       {rig.Options(delay(1)), 0},
		"by a consumer": {rig.Options(steadymq.WithCloseTimeout(time.Second), steadymq.WithPrefetch(40)), time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				work := max(c.want/4, 10*time.Microsecond)
				tap := &wiretap{dial: r.Broker.Dialer()}
				r.Consuming(func(context.Context, *steadymq.Delivery) error {
					time.Sleep(work)
					return nil
				}, append(c.options, steadymq.WithDialer(tap.DialContext))...)
				r.PublishMany(20, "tea")
				r.Wait(10 * time.Second)
				var acks []time.Time
				for _, w := range tap.written(0) {
					if lines := methodsIn(w.bytes); len(lines) > 0 && strings.HasPrefix(lines[0], "ack ") {
						acks = append(acks, w.at)
					}
				}
				require.Greater(r, len(acks), 2)
				gap := acks[2].Sub(acks[1])
				assert.GreaterOrEqual(r, gap, c.want)
				assert.LessOrEqual(r, gap, c.want+work)
				if c.want == 0 {
					assert.Len(r, acks, 20)
				}
			})
		})
	}
}

func TestHoldsAreSpreadOverWhatWithRequeueDelaySays(t *testing.T) {
	delay := steadymq.WithRequeueDelay
	const s = time.Second
	for name, c := range map[string]struct {
		options      []steadymq.Option
		first, least time.Duration
	}{
		"default":            {nil, s, s / 2},
		"given":              {rig.Options(delay(8*s, 100*s)), 8 * s, 4 * s},
		"given twice":        {rig.Options(delay(8*s, 100*s), delay(2*s, 100*s)), 2 * s, s},
		"longest is a bound": {rig.Options(delay(8*s, 8*s)), 16 * s / 3, 4 * s},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
					if d.Redelivered {
						return nil
					}
					return errAway
				}, append(c.options, steadymq.WithPrefetch(1000))...)
				r.PublishMany(500, "tea")
				r.Wait(time.Hour)
				holds := holdsOf(r)
				require.Len(r, holds, 500)
				span := c.first * 3 / 2
				assert.GreaterOrEqual(r, slices.Min(holds), c.least)
				assert.Less(r, slices.Min(holds), c.least+span/10)
				assert.LessOrEqual(r, slices.Max(holds), span+100*time.Millisecond)
				assert.Greater(r, slices.Max(holds), span-span/10)
			})
		})
	}
}

// The longest hold is as likely as all shorter ones together, once twice as long would be more.
func TestLongestHoldIsWhatWithRequeueDelaySays(t *testing.T) {
	for name, c := range map[string]struct {
		options []steadymq.Option
		longest time.Duration
	}{
		"default":     {nil, 15 * time.Minute},
		"given":       {rig.Options(steadymq.WithRequeueDelay(time.Second, time.Minute)), time.Minute},
		"given twice": {rig.Options(steadymq.WithRequeueDelay(time.Second, time.Minute), steadymq.WithRequeueDelay(time.Second, 5*time.Minute)), 5 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("quorum")
				r.Consuming(func(context.Context, *steadymq.Delivery) error { return errAway }, c.options...)
				r.PublishMany(10, "tea")
				r.Wait(2 * time.Hour)
				longest := slices.Max(holdsOf(r))
				assert.GreaterOrEqual(r, longest, c.longest)
				assert.LessOrEqual(r, longest, c.longest+10*time.Millisecond)
			})
		})
	}
}

func TestWaitsAreDrawnFromWhatWithBackoffSays(t *testing.T) {
	backoff := steadymq.WithBackoff
	const s, ms = time.Second, time.Millisecond
	for name, c := range map[string]struct {
		options        []steadymq.Option
		initial, limit time.Duration
	}{
		"default":     {nil, 250 * ms, 10 * s},
		"given":       {rig.Options(backoff(2*s, 40*s)), 2 * s, 40 * s},
		"given twice": {rig.Options(backoff(2*s, 40*s), backoff(s, 3*s)), s, 3 * s},
		"of one pace": {rig.Options(backoff(4*s, 4*s)), 4 * s, 4 * s},
	} {
		t.Run(name, func(t *testing.T) {
			var first, all []time.Duration
			for n := range 100 {
				rig.Bubble(t, func(r *rig.Rig) {
					r.Broker.DropAt(steadymqtest.StageTune, true)
					tapped(r, r.Broker.URL, rig.Queue, c.options...)
					r.Start(rig.Ack)
					r.Wait(2 * c.initial)
					if n%5 == 0 {
						r.Wait(10 * c.limit)
					}
					waits := waitsOf(r)
					first, all = append(first, waits[0]), append(all, waits...)
				})
			}
			assert.LessOrEqual(t, slices.Max(first), c.initial)
			assert.Greater(t, slices.Max(first), c.initial*17/20)
			assert.Less(t, slices.Min(first), c.initial/4)
			assert.LessOrEqual(t, slices.Max(all), c.limit)
			assert.Greater(t, slices.Max(all), c.limit*9/10)
		})
	}
}

// Whatever the failure: without WithBackoff a missing queue is asked for after 1 s at the earliest.
func TestNoWaitIsAboveTheLimitOfWithBackoff(t *testing.T) {
	for name, fail := range map[string]func(r *rig.Rig){
		"no queue":   func(r *rig.Rig) { r.Broker.DeleteQueue(rig.Queue) },
		"no vhost":   func(r *rig.Rig) { r.Broker.RefuseVhost(530, "vhost / not found") },
		"refused":    func(r *rig.Rig) { r.Broker.Refuse(true) },
		"no network": func(r *rig.Rig) { r.Broker.DropAt(steadymqtest.StageTune, true) },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				fail(r)
				r.Run(rig.Ack, steadymq.WithBackoff(20*time.Millisecond, 300*time.Millisecond), steadymq.WithFatal(func(error) bool { return false }))
				r.Wait(time.Minute)
				assert.Greater(r, len(r.Causes()), 100)
				assert.LessOrEqual(r, r.LongestWait(), 300*time.Millisecond)
			})
		})
	}
}

// What is declared is what the option says, whatever an earlier session had to add to it.
func TestQueueThatIsMadeAnewWithALimitIsTakenAsItIs(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DeleteQueue(rig.Queue)
		r.Consuming(rig.Ack, steadymq.WithQueue(steadymq.Queue{}))
		r.Broker.DeleteQueue(rig.Queue)
		r.Broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{Type: "quorum", DeliveryLimit: 5})
		r.Broker.Reset()
		r.Wait(time.Minute)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.Contains(r, r.Broker.Queues(), rig.Queue)
	})
}

// waitsOf are the waits of the consumer's backoffs, in order.
func waitsOf(r *rig.Rig) (waits []time.Duration) {
	for _, c := range r.Changes() {
		if c.To == steadymq.Backoff {
			waits = append(waits, c.RetryIn)
		}
	}
	return waits
}

func TestMiddlewareAddsUpTheFirstOutermost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var mu sync.Mutex
		var order []string
		pass := func(name string) steadymq.Middleware {
			return func(next steadymq.Handler) steadymq.Handler {
				return func(ctx context.Context, d *steadymq.Delivery) error {
					mu.Lock()
					order = append(order, name)
					mu.Unlock()
					return next(ctx, d)
				}
			}
		}
		r.Consuming(pass("handler")(rig.Ack), steadymq.WithMiddleware(pass("1"), pass("2")),
			steadymq.WithMiddleware(), steadymq.WithMiddleware(pass("3")))
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		assert.Equal(r, []string{"1", "2", "3", "handler"}, order)
	})
}

func TestFatalTakesThePlaceOfTheRule(t *testing.T) {
	always := steadymq.WithFatal(func(error) bool { return true })
	never := steadymq.WithFatal(func(error) bool { return false })
	for name, c := range map[string]struct {
		options       []steadymq.Option
		before, after bool // whether Run ends at what the broker states plainly, first and later
	}{
		"default":            {nil, true, false},
		"always":             {rig.Options(always), true, true},
		"never":              {rig.Options(never), false, false},
		"twice, never last":  {rig.Options(always, never), false, false},
		"twice, always last": {rig.Options(never, always), true, true},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Broker.RefuseConsume(403, "ACCESS_REFUSED - read access to queue 'orders' in vhost '/' refused for user 'app'")
				r.Run(rig.Ack, c.options...)
				r.Wait(time.Minute)
				assert.Equal(r, c.before, len(r.Result) == 1)
				r.Stop()
			})
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(rig.Ack, c.options...)
				r.Broker.RefuseConsume(403, "ACCESS_REFUSED - read access to queue 'orders' in vhost '/' refused for user 'app'")
				r.Broker.CloseConnections(320, "CONNECTION_FORCED - bye")
				r.Wait(time.Minute)
				assert.Equal(r, c.after, len(r.Result) == 1)
				r.Stop()
			})
		})
	}
}

func TestHooksAndLoggerGivenTwiceAreTheLaterOnes(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var earlier, later atomic.Int64
		var before, after bytes.Buffer
		text := func(b *bytes.Buffer) steadymq.Option {
			return steadymq.WithLogger(slog.New(slog.NewTextHandler(b, nil)))
		}
		r.Consuming(rig.Ack, text(&before), text(&after),
			steadymq.WithHooks(steadymq.Hooks{
				StateChanged: r.Changed, Settled: func(*steadymq.Delivery, steadymq.Outcome) { earlier.Add(1) },
			}), steadymq.WithHooks(steadymq.Hooks{StateChanged: func(steadymq.StateChange) { later.Add(1) }}))
		r.Broker.Publish(rig.Queue, "tea")
		r.Wait(time.Second)
		r.Stop()
		assert.Zero(r, earlier.Load(), "not even those that the later ones leave out")
		assert.NotZero(r, later.Load())
		assert.Empty(r, r.Changes())
		assert.Empty(r, before.String())
		assert.Contains(r, after.String(), "consuming")
	})
}

// What is the consumer's own must not be the option's: an option may be given to several.
func TestOptionsMayBeGivenToSeveralConsumers(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var wrapped atomic.Int64
		options := rig.Options(
			steadymq.WithQueue(steadymq.Queue{
				Type: "classic", Args: amqp.Table{"x-a": 1}, Exchange: &steadymq.Exchange{Name: "shop"},
				Bindings: []steadymq.Binding{{Key: "k"}}, DeadLetter: &steadymq.DeadLetter{Queue: "dead"},
			}),
			steadymq.WithConsumeArgs(amqp.Table{"x-b": 2}),
			steadymq.WithMiddleware(func(next steadymq.Handler) steadymq.Handler {
				wrapped.Add(1)
				return next
			}),
		)
		for n := range 3 {
			tap := tapped(r, r.Broker.URL, fmt.Sprint("new ", n), options...)
			r.Start(rig.Ack)
			r.Wait(100 * time.Millisecond)
			assert.Equal(r, []string{
				`exchange.declare "shop" direct durable`, `queue.declare "dead" durable {x-queue-type="classic"}`,
				fmt.Sprintf(`queue.declare "new %d" durable {x-a=int32(1) x-dead-letter-exchange="" x-dead-letter-routing-key="dead" x-queue-type="classic"}`, n),
				fmt.Sprintf(`queue.bind "new %d" to "shop" key="k"`, n),
				fmt.Sprintf(`consume "new %d" tag=steadymq-R.1-1 {x-b=int32(2)}`, n),
			}, only(wireText(tap.methods(0)), "exchange.declare", "queue.declare", "queue.bind", "consume"))
			r.Stop()
			assert.EqualValues(r, n+1, wrapped.Load())
		}
	})
}
