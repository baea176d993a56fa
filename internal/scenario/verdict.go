package scenario

import (
	"bytes"
	"maps"
	"regexp"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
)

// What a scenario is held to at its end. Verify is the whole of it; a test that ends otherwise,
// such as one whose queue is gone by then, calls the parts that apply.

// Verify ends the scenario and judges it.
func (s *Scenario) Verify() {
	s.Helper()
	s.Feeder.Stop()
	s.AwaitFinished()
	s.OneConsumer()
	s.Cancel()
	s.Stopped(DrainTimeout + CloseTimeout + time.Second)
	s.NothingLeft()
	s.QueueEmpty()
	s.AcksAreRight()
	s.StatsAddUp()
	s.AddRow(s.Duplicates())
}

// OneConsumer waits until the broker holds one consumer, which it may have to learn by noticing
// that another is dead, and this process one socket.
func (s *Scenario) OneConsumer() {
	s.Helper()
	var q rabbit.Queue
	var err error
	s.Holds(HalfOpen+CloseTimeout, func() bool {
		q, err = s.Broker.Queue(s.Queue)
		return err == nil && q.Consumers == 1 && s.Sockets.Open() == 1
	})
	assert.NoError(s, err)
	assert.Equal(s, 1, q.Consumers, "consumers on the queue")
	assert.Equal(s, 1, s.Sockets.Open(), "open sockets")
}

// Stopped waits until Run returns, without an error.
func (s *Scenario) Stopped(limit time.Duration) {
	s.Helper()
	select {
	case err := <-s.Result:
		assert.NoError(s, err)
	case <-time.After(limit):
		require.FailNow(s, "Run does not return")
	}
	assert.Equal(s, steadymq.Stopped, s.Consumer.State())
}

// NothingLeft looks for what Run left behind. The runtime needs a moment to end a goroutine that
// has returned.
func (s *Scenario) NothingLeft() {
	s.Helper()
	var left string
	s.Holds(time.Second, func() bool { left = labelled(s.label); return left == "" })
	assert.Empty(s, left, "goroutines")
	assert.Zero(s, s.Sockets.Open(), "open sockets")
	assert.Zero(s, s.Consumer.Stats().Abandoned, "what outlasted its limit")
}

var profileEntry = regexp.MustCompile(`(?m)^\d+ @ .*\n# labels: (.*)\n(?:#.*\n)*`)

// labelled is the stacks of the goroutines that carry the label, "" if there are none.
func labelled(label string) string {
	var profile bytes.Buffer
	_ = pprof.Lookup("goroutine").WriteTo(&profile, 1)
	var found []string
	for _, m := range profileEntry.FindAllStringSubmatch(profile.String(), -1) {
		if strings.Contains(m[1], `"`+label+`"`) {
			found = append(found, m[0])
		}
	}
	return strings.Join(found, "\n")
}

// QueueEmpty waits until the queue has no message and no consumer.
func (s *Scenario) QueueEmpty() {
	s.Helper()
	var q rabbit.Queue
	s.Holds(5*time.Second, func() bool {
		var err error
		q, err = s.Broker.Queue(s.Queue)
		return err == nil && q == rabbit.Queue{}
	})
	assert.Equal(s, rabbit.Queue{}, q, "the queue is empty and free")
}

// AcksAreRight holds what the wire shows against what the handlers did: an ack settles one
// delivery, once, after the handler of the same session has finished it.
func (s *Scenario) AcksAreRight() {
	s.Helper()
	if !s.ReadsTheWire() {
		return // StatsAddUp holds the consumer's own account against the handlers'
	}
	if s.Ledger.Counts().Finished > 0 {
		assert.NotEmpty(s, s.settlements(), "the wire was read")
	}
	delivered := map[faultproxy.Ref]faultproxy.Delivery{}
	for _, d := range s.deliveries() {
		delivered[d.Ref] = d
	}
	seen := map[faultproxy.Ref]bool{}
	for _, settled := range s.settlements() {
		d, known := delivered[settled.Ref]
		assert.True(s, known, "settled what was never delivered: %+v", settled)
		assert.False(s, seen[settled.Ref], "settled twice: %+v", settled)
		assert.False(s, settled.Multiple, "multiple: %+v", settled)
		seen[settled.Ref] = true
		if settled.Verb == faultproxy.Ack {
			at, finished := s.Ledger.finishedAt(d)
			assert.True(s, finished && !at.After(settled.At), "acked, but no handler had finished it: %+v of %+v", settled, d)
		}
	}
}

// AckedMessages are the numbers of the messages whose ack reached the broker.
func (s *Scenario) AckedMessages() []int {
	if !s.ReadsTheWire() {
		return s.messagesToldAcked()
	}
	id := map[faultproxy.Ref]string{}
	for _, d := range s.deliveries() {
		id[d.Ref] = d.MessageID
	}
	acked := map[int]bool{}
	for _, settled := range s.settlements() {
		if settled.Verb == faultproxy.Ack && !settled.Swallowed {
			n, err := strconv.Atoi(id[settled.Ref])
			require.NoError(s, err)
			acked[n] = true
		}
	}
	return slices.Sorted(maps.Keys(acked))
}

// messagesToldAcked are the finished messages, as soon as the consumer's statistics have as many
// acks as there were handlings that could be acked.
func (s *Scenario) messagesToldAcked() []int {
	stats := s.Consumer.Stats()
	if stats.Acked+stats.Stale < uint64(s.Ledger.Handlings()) {
		return nil
	}
	return s.Ledger.Finished()
}

// Duplicates counts second handlings, and holds them and the broker's redeliveries against the
// number of lost sessions.
func (s *Scenario) Duplicates() int {
	s.Helper()
	requeued := 0
	for _, settled := range s.settlements() {
		if settled.Requeue {
			requeued++
		}
	}
	deliveries := map[string]int{}
	again := 0
	for _, d := range s.deliveries() {
		if deliveries[d.MessageID]++; deliveries[d.MessageID] > 1 {
			again++
		}
	}
	limit := s.Prefetch * s.LostSessions()
	assert.LessOrEqual(s, again, limit+requeued, "delivered again: prefetch per lost session at most")
	twice := s.Ledger.Counts().Twice
	assert.LessOrEqual(s, twice, limit, "handled again: prefetch per lost session at most")
	return twice
}

// StatsAddUp holds the library's own account against itself and against what the handlers did.
func (s *Scenario) StatsAddUp() {
	s.Helper()
	stats := s.Consumer.Stats()
	assert.Equal(s, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Stale, "%+v", stats)
	assert.EqualValues(s, s.LostSessions()+1, stats.Sessions, "%+v", stats)
	assert.LessOrEqual(s, stats.Acked, uint64(s.Ledger.Handlings()), "no ack that no handler had earned")
	assert.Zero(s, stats.Handling)
	assert.Zero(s, stats.EventsDropped)
}

// OverdueIsStale holds a consumer whose channel a consumer timeout has closed to this: the ack of
// the overdue handler was not sent, nor were those of messages that other workers had at hand then.
func (s *Scenario) OverdueIsStale() {
	s.Helper()
	stale := s.Consumer.Stats().Stale
	assert.GreaterOrEqual(s, stale, uint64(1), "the overdue handler's ack was not sent")
	assert.LessOrEqual(s, stale, uint64(s.Workers), "one for each worker at most")
}

// KeptConnection holds a consumer whose channel has failed to having lost only that, even where
// RabbitMQ 3.10 delivers on a channel that it has closed, or closes it twice.
func (s *Scenario) KeptConnection() {
	s.Helper()
	if !assert.EqualValues(s, 1, s.Consumer.Stats().Connections, "a channel's failure does not cost the connection") {
		s.Log(s.wire())
	}
}

// TakeAll takes what is left on a queue, and returns the numbers of the messages.
func (s *Scenario) TakeAll(queue string) []int {
	s.Helper()
	conn, err := amqp.Dial(s.Broker.URL())
	require.NoError(s, err)
	defer CloseWithin(conn, 2*time.Second)
	ch, err := conn.Channel()
	require.NoError(s, err)
	var numbers []int
	for empty := 0; empty < 5; { // what was put back a moment ago may not be ready yet
		d, ok, err := ch.Get(queue, true)
		require.NoError(s, err)
		if !ok {
			empty++
			s.Pause(50 * time.Millisecond)
			continue
		}
		n, err := strconv.Atoi(d.MessageId)
		require.NoError(s, err)
		numbers = append(numbers, n)
	}
	return numbers
}

// AddRow puts the scenario into its table, under the name of its test.
func (s *Scenario) AddRow(duplicates int) {
	_, name, _ := strings.Cut(s.Name(), "/")
	if s.Proxy == nil && !strings.HasSuffix(name, "direct") {
		name += ", direct"
	}
	s.table.Add(Result{
		Fault:      name,
		Broker:     s.Broker.Version(),
		Resumed:    s.ResumedAfter,
		Lost:       s.LostSessions(),
		Duplicates: duplicates,
		Messages:   s.Ledger.Counts().Confirmed,
		Note:       strings.Join(s.notes, "; "),
	})
}
