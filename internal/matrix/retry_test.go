package matrix_test

import (
	"context"
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

// retrySlots bounds how many consumers with a policy share the machine.
const retrySlots = 8

// retryCell is one fault of a consumer that delays and parks. What its publisher suffers must lose
// nothing, and cost no session.
type retryCell struct {
	fault string
	by    way
	quick bool // part of the short matrix
	test  func(*retrying)
}

// retrying is the trial of a consumer that delays and parks.
type retrying struct {
	*scenario.Retries
	kind kind
}

func retryCells() []retryCell {
	return []retryCell{
		{fault: "500 poison messages ahead", by: bothWay, quick: true, test: poisonAhead},
		{fault: "both connections cut", by: bothWay, test: bothCut},
		{fault: "connection of the consumer cut", by: bothWay, test: consumerCut},
		{fault: "connection of the publisher cut", by: bothWay, quick: true, test: publisherCut},
		{fault: "operator closes the connection of the publisher", by: bothWay, test: publisherClosed},
		{fault: "park queue deleted", by: bothWay, test: parkQueueDeleted},
		{fault: "park queue full, then emptied", by: bothWay, test: parkQueueFull},
	}
}

// runRetries runs the faults on one node per generation, several at a time, and then those of the
// whole node.
func (m *matrix) runRetries(t *testing.T, gens []rabbit.Generation) {
	var cfgs []rabbit.Config
	for _, g := range gens {
		cfgs = append(cfgs, rabbit.Config{Generation: g, ChannelTick: time.Second})
	}
	brokers := rabbit.StartAll(t, cfgs...)
	for _, b := range brokers {
		rabbit.NeedCommands(t, b)
	}
	slots := make(chan struct{}, retrySlots)
	var all sync.WaitGroup
	for n, c := range m.retriesToRun(retryCells()) {
		for i, g := range gens {
			for _, k := range m.retryKinds(n) {
				all.Go(func() {
					slots <- struct{}{}
					defer func() { <-slots }()
					t.Run(fmt.Sprintf("%s/%s %s", c.fault, g, k)+c.by.suffix(), func(t *testing.T) { c.test(m.newRetrying(t, brokers[i], k, c.by)) })
				})
			}
		}
	}
	all.Wait()
	if m.parts == "" {
		return
	}
	for i, g := range gens {
		b := brokers[i]
		all.Go(func() {
			t.Run(fmt.Sprintf("alarm about memory/%s", g), func(t *testing.T) { m.retriesOutlive(t, b, alarmFor(b, 10*time.Second)) })
			t.Run(fmt.Sprintf("broker stopped and started/%s", g), func(t *testing.T) { m.retriesOutlive(t, b, restarted(b)) })
		})
	}
	all.Wait()
}

// suffix ends the name of a cell.
func (w way) suffix() string {
	if w == direct {
		return ", direct"
	}
	return ""
}

// retriesToRun leaves out what is not part of the short form, and takes apart what runs in both
// ways.
func (m *matrix) retriesToRun(cells []retryCell) (all []retryCell) {
	for _, c := range cells {
		if m.parts == "" && !c.quick {
			continue
		}
		again := c
		c.by, again.by = proxied, direct
		if all = append(all, c); m.parts != "" {
			all = append(all, again)
		}
	}
	return all
}

// retryKinds are the kinds of queues that a cell runs on, one of them in the short form.
func (m *matrix) retryKinds(n int) []kind {
	possible := []kind{quorum, classic}
	if m.parts != "" {
		return possible
	}
	return possible[n%len(possible):][:1]
}

func (m *matrix) newRetrying(t *testing.T, b *rabbit.Broker, k kind, by way) *retrying {
	t.Helper()
	args := amqp.Table{"x-queue-type": string(k)}
	if k == quorum { // it must never count
		args["x-delivery-limit"] = int32(5)
	}
	r := &retrying{scenario.NewRetries(t, b, &m.retries, args), k}
	if by == direct {
		r.Directly()
	}
	return r
}

// publisher begins the name of the connection that copies are published on.
func (r *retrying) publisher() string { return r.Queue + " (retry)" }

func (r *retrying) ok(err error) {
	r.Helper()
	require.NoError(r, err)
}

// poisonAhead: messages that do not fail pass those that do within the first delay.
func poisonAhead(r *retrying) {
	const poison, first = 500, 5 * time.Second
	r.Policy.Attempts, r.Policy.Delays = 2, []time.Duration{first}
	r.Poison = func(n int) bool { return n < poison }
	r.Publish(poison + 50)
	since := time.Now()
	r.Begin()
	r.Must(2*first, "healthy messages are handled", r.Passed)
	took := time.Since(since)
	r.InTime(took, first, "time until the healthy messages have passed")
	r.Note("the healthy messages had passed after %s", inWords(took))
	r.VerifyRetries()
	assert.Zero(r, r.LostSessions())
}

// suffer lets a fault happen several times while messages fail.
func (r *retrying) suffer(times int, fault func()) {
	r.Helper()
	r.Begin()
	r.Feed()
	for range times {
		r.Pause(700 * time.Millisecond)
		fault()
	}
	r.VerifyRetries()
}

func bothCut(r *retrying) {
	r.suffer(3, func() { r.Cuts++; r.Cut() })
	assert.NotZero(r, r.LostSessions())
}

func consumerCut(r *retrying) {
	r.suffer(3, func() {
		_, err := r.Broker.AbortOnly(r.Context(), r.Queue)
		r.ok(err)
	})
	assert.NotZero(r, r.LostSessions())
}

func publisherCut(r *retrying) {
	r.losePublisher(func() (string, error) { return r.Broker.AbortNamed(r.Context(), r.publisher()) })
}

func publisherClosed(r *retrying) {
	r.losePublisher(func() (string, error) { return r.Broker.CloseNamed(r.Context(), r.publisher(), "an operator's reason") })
}

// losePublisher: the consumer does not notice.
func (r *retrying) losePublisher(fault func() (string, error)) {
	r.Helper()
	hits := 0
	r.suffer(4, func() {
		n, err := fault()
		r.ok(err)
		if n != "0" {
			hits, r.Cuts = hits+1, r.Cuts+1
		}
	})
	assert.NotZero(r, hits, "connections that were cut")
	assert.Zero(r, r.LostSessions())
}

// parkQueueDeleted: it is declared anew.
func parkQueueDeleted(r *retrying) {
	r.Begin()
	for range 2 {
		r.ok(r.Broker.DeleteQueue(r.Policy.Park))
		r.Publish(50)
		r.AwaitEnds()
	}
	r.VerifyRetries()
	assert.Zero(r, r.LostSessions())
}

// parkQueueFull: what does not fit is held, and the messages that do not fail go on. The queue is
// full before, because a quorum queue refuses only a moment after it is.
func parkQueueFull(r *retrying) {
	r.ok(r.Broker.DeclareQueue(r.Policy.Park, amqp.Table{
		"x-queue-type": string(r.kind), "x-max-length": int32(3), "x-overflow": "reject-publish",
	}))
	r.Fill(10)
	r.Publish(70) // 14 of them fail: fewer than the prefetch
	r.Begin()
	r.Must(20*time.Second, "the queue is full", func() bool {
		return r.Consumer.Stats().Held == 14 && strings.Contains(r.ConsumerLog.String(), "basic.nack")
	})
	r.Publish(4)
	r.Must(10*time.Second, "healthy messages are handled", r.Passed)
	assert.NotZero(r, r.Consumer.Stats().Held)
	r.VerifyRetries()
	assert.Zero(r, r.LostSessions())
}

// retryEvent is a fault of the whole node, under trials.
type retryEvent struct {
	apply func(context.Context) (times, error)
	check func(*retrying, times)
}

func alarmFor(b *rabbit.Broker, lasts time.Duration) retryEvent {
	watermark := func(part string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := b.Ctl(ctx, "set_vm_memory_high_watermark", part)
			return err
		}
	}
	begin := func(ctx context.Context) error {
		if err := watermark("0.00001")(ctx); err != nil {
			return err
		}
		return alarmed(ctx, b, "memory")
	}
	return retryEvent{
		apply: during(begin, lasts, watermark("0.6")),
		check: func(r *retrying, _ times) { assert.Zero(r, r.LostSessions()) },
	}
}

func restarted(b *rabbit.Broker) retryEvent {
	return retryEvent{
		apply: during(b.Stop, time.Second, b.Start),
		check: func(r *retrying, _ times) { assert.NotZero(r, r.LostSessions()) },
	}
}

// retriesOutlive lets an event happen to a consumer of each kind, in both ways.
func (m *matrix) retriesOutlive(t *testing.T, b *rabbit.Broker, e retryEvent) {
	ways := []way{proxied, direct}
	if rabbit.NoDirectWay(t.Context(), b) != "" {
		ways = ways[:1]
	}
	var trials []*retrying
	for _, k := range []kind{quorum, classic} {
		for _, by := range ways {
			trials = append(trials, m.newRetrying(t, b, k, by))
		}
	}
	for _, r := range trials {
		r.Begin()
		r.Feed()
	}
	when, err := e.apply(t.Context())
	require.NoError(t, err)
	for _, r := range trials {
		r.Must(serves+scenario.AfterRefusals, "consuming", func() bool { return r.Consumer.State() == steadymq.Consuming })
		r.Cuts++ // its publisher's, too
		r.Note("%s", r.kind)
	}
	for _, r := range slices.Backward(trials) {
		r.VerifyRetries()
		e.check(r, when)
	}
}
