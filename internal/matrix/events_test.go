package matrix_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

// event is a fault of a whole broker: it happens once, to several trials together.
type event struct {
	fault, rows string
	not         func(rabbit.Generation, kind) string
	before      func(context.Context) error // before the trials begin
	prepare     func(*trial)
	apply       func(context.Context) (times, error)
	check       func(*trial, times)
}

// times are when a fault began and when it was over.
type times struct{ at, healed time.Time }

// party is one of the trials an event happens to.
type party struct {
	name, label string
	suffix      string // of the fault's name
	kind        kind
	make        func(*testing.T) *trial
	check       func(*trial, times)
}

// happens begins the trials, lets the fault happen to all of them, and judges each.
func (m *matrix) happens(t *testing.T, label string, e event, parties []party) {
	ctx := t.Context()
	if e.before != nil {
		require.NoError(t, e.before(ctx))
	}
	var ready, all sync.WaitGroup
	over := make(chan struct{})
	var when times
	var failed error
	for _, p := range parties {
		ready.Add(1)
		all.Go(func() {
			begun := sync.OnceFunc(ready.Done)
			defer begun()
			t.Run(p.name, func(t *testing.T) {
				var r *trial
				defer func() { m.record(r, t, e.fault+p.suffix, e.rows, cmp.Or(p.label, label), p.kind) }()
				defer begun()
				r = p.make(t)
				if e.prepare != nil {
					e.prepare(r)
				}
				r.begin()
				begun()
				<-over
				require.NoError(t, failed, "the fault")
				if p.check != nil {
					p.check(r, when)
					return
				}
				e.check(r, when)
			})
		})
	}
	ready.Wait()
	when, failed = e.apply(ctx)
	close(over)
	all.Wait()
}

// serves bounds how long a broker that accepts connections may need until it serves its queues.
const serves = 20 * time.Second

// back is the check after faults that end with a broker that accepts again. It accepts before it
// can serve its queues: the limit begins when it no longer says that it cannot.
func back(limit time.Duration) func(*trial, times) {
	return func(r *trial, when times) {
		r.Must(serves+limit, "consuming again", func() bool { return r.consumesSince(when.at) })
		ready := when.healed
		for _, c := range r.History() {
			var said *amqp.Error
			if c.Time.After(ready) && errors.As(c.Cause, &said) && said.Server {
				ready = c.Time
			}
		}
		r.ResumedSince(when.at, ready, limit)
		if late := ready.Sub(when.healed); late > 0 {
			r.Note("the broker needed %s more for the queue", inWords(late))
		}
		r.judge()
	}
}

func (r *trial) consumesSince(at time.Time) bool {
	return slices.ContainsFunc(r.History(), func(c steadymq.StateChange) bool { return c.To == steadymq.Consuming && c.Time.After(at) })
}

// unimpressed is the check after faults that must not cost a consumer its session.
func unimpressed(r *trial, _ times) {
	r.judge()
	assert.Zero(r, r.LostSessions())
}

// alarm is an event that stops publishers and must not stop consumers. Handlers wait for it, so
// that messages are left to be handled.
func alarm(b *rabbit.Broker, resource string, begin, end func(context.Context) error) event {
	const lasts = 3 * time.Second
	up := make(chan struct{})
	return event{
		fault: "alarm about " + resource, rows: "19",
		prepare: func(r *trial) {
			r.Handle = func(context.Context, *steadymq.Delivery, int) error { <-up; r.Pause(20 * time.Millisecond); return nil }
			r.Publish(100)
		},
		apply: during(func(ctx context.Context) error {
			defer close(up)
			return errors.Join(begin(ctx), alarmed(ctx, b, resource))
		}, lasts, end),
		check: func(r *trial, when times) {
			assert.True(r, r.handledDuring(when.healed.Add(-lasts), when.healed), "messages are handled during the alarm")
			unimpressed(r, when)
		},
	}
}

// alarmed waits until the broker tells of the alarm.
func alarmed(ctx context.Context, b *rabbit.Broker, resource string) (err error) {
	var alarms string
	for range 50 {
		if alarms, err = b.Call(ctx, "rabbit_alarm:get_alarms()"); err == nil && strings.Contains(alarms, resource) {
			return nil
		}
		rest(ctx, 100*time.Millisecond)
	}
	return errors.Join(err, fmt.Errorf("no alarm about %s: %q", resource, alarms))
}

// during runs what begins a fault, waits, and runs what ends it.
func during(begin func(context.Context) error, d time.Duration, end func(context.Context) error) func(context.Context) (times, error) {
	return func(ctx context.Context) (times, error) {
		when := times{at: time.Now()}
		if err := begin(ctx); err != nil {
			return when, errors.Join(err, end(ctx))
		}
		rest(ctx, d)
		err := end(ctx)
		when.healed = time.Now()
		return when, err
	}
}

// freeze is Pause, tried several times: an engine on a busy machine sometimes cannot do it at once
// ("unable to freeze").
func freeze(b *rabbit.Broker) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		for range 5 {
			if err = b.Pause(ctx); err == nil {
				break
			}
			rest(ctx, 500*time.Millisecond)
		}
		return err
	}
}

// wholeNode are the faults that hit everything on a node.
func wholeNode(b *rabbit.Broker) []event {
	watermark := func(fraction string) func(context.Context) error {
		return func(ctx context.Context) error {
			return b.Do(ctx, "vm_memory_monitor:set_vm_memory_high_watermark(%s)", fraction)
		}
	}
	diskLimit := func(free string) func(context.Context) error {
		return func(ctx context.Context) error { return b.Do(ctx, "rabbit_disk_monitor:set_disk_free_limit(%s)", free) }
	}
	return []event{
		{
			fault: "rabbitmqctl stop_app, start_app", rows: "1",
			apply: during(b.StopApp, 2*time.Second, b.StartApp), check: back(scenario.AfterRefusals),
		},
		{
			fault: "rabbitmq-upgrade drain, revive", rows: "3",
			apply: during(b.Drain, 2*time.Second, b.Revive), check: back(scenario.AfterRefusals),
		},
		{
			fault: "rabbitmqctl close_all_connections", rows: "2",
			apply: func(ctx context.Context) (times, error) {
				err := b.CloseAllConnections(ctx, "maintenance")
				return times{at: time.Now()}, err
			},
			check: func(r *trial, when times) {
				change := r.AwaitLost(0, when.at, scenario.AtOnce)
				assert.ErrorContains(r, change.Cause, "maintenance")
				r.Resumed(change.Time, scenario.AtOnce)
				r.judge()
			},
		},
		alarm(b, "memory", watermark("0.00001"), watermark("0.6")),
		alarm(b, "disk", diskLimit("1000000000000000"), diskLimit("50000000")),
		{
			fault: "consumer timeout of the broker", rows: "39", not: timeoutClosesNothing,
			before:  func(ctx context.Context) error { return b.DefaultTimeout(ctx, 2000) },
			prepare: func(r *trial) { r.dawdler(6 * time.Second) },
			apply: func(ctx context.Context) (times, error) {
				// It holds for channels that are opened from now on.
				return times{at: time.Now()}, b.DefaultTimeout(ctx, 1_800_000)
			},
			check: timedOut,
		},
		{
			fault: "frozen (SIGSTOP) and thawed", rows: "17",
			apply: during(freeze(b), 8*time.Second, b.Unpause), check: back(setupPace),
		},
		{
			fault: "killed (SIGKILL) and started", rows: "4",
			apply: during(b.Kill, time.Second, b.Start), check: back(scenario.AfterRefusals),
		},
		{
			fault: "stopped (SIGTERM) and started", rows: "1",
			apply: during(b.Stop, time.Second, b.Start), check: back(scenario.AfterRefusals),
		},
	}
}

func timeoutClosesNothing(g rabbit.Generation, _ kind) string {
	if g == rabbit.Gen43 {
		return "since 4.3 only consumers of quorum queues have a timeout, and it cancels: see the row of x-consumer-timeout"
	}
	return ""
}

func timedOut(r *trial, when times) {
	change := r.AwaitLost(0, when.at, 5*time.Second)
	var said *amqp.Error
	require.ErrorAs(r, change.Cause, &said)
	assert.Equal(r, amqp.PreconditionFailed, said.Code)
	r.Resumed(change.Time, scenario.AtOnce)
	r.KeptConnection()
	r.Pause(time.Second) // the late handler's ack is not sent
	r.judge()
	r.OverdueIsStale()
}

func (m *matrix) runEvents(t *testing.T, g rabbit.Generation) {
	b := rabbit.Start(t, rabbit.Config{Generation: g, ChannelTick: time.Second})
	rabbit.NeedCommands(t, b)
	for n, e := range wholeNode(b) {
		var parties []party
		for _, k := range m.kindsOf(cell{fault: e.fault, rows: e.rows, not: e.not}, g, n) {
			parties = append(parties, party{
				name: fmt.Sprintf("%s %s", g, k), kind: k,
				make: func(t *testing.T) *trial { return m.newTrial(t, g, k, b, cell{}) },
			}, party{
				name: fmt.Sprintf("%s %s, direct", g, k), suffix: ", direct", kind: k,
				make: func(t *testing.T) *trial { return m.newTrial(t, g, k, b, cell{by: direct}) },
			})
		}
		if len(parties) > 0 {
			t.Run(e.fault, func(t *testing.T) { m.happens(t, string(g), e, parties) })
		}
	}
}
