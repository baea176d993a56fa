package scenario

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rabbit"
)

// Retries is a scenario whose consumer delays what fails, and parks it in the end. A message fails
// in each attempt or in none, and has to end either handled or parked.
type Retries struct {
	*Scenario
	Policy steadymq.Retry
	Poison func(n int) bool // which messages fail
	Cuts   int              // how often copies in flight were lost, beside lost sessions

	mu     sync.Mutex
	most   int         // the highest attempt that a handler was shown
	parked map[int]int // copies that were in the park queue, by message
}

// NewRetries makes a scenario on a queue with arguments, see [NewOn].
func NewRetries(t *testing.T, b *rabbit.Broker, table *Results, args amqp.Table) *Retries {
	t.Helper()
	r := &Retries{Scenario: NewOn(t, b, table, args), Poison: func(n int) bool { return n%5 == 0 }, parked: map[int]int{}}
	r.Policy = steadymq.Retry{Attempts: 3, Delays: []time.Duration{time.Second, 2 * time.Second}, Park: r.Queue + ".parked"}
	r.Handle = r.Fail
	t.Cleanup(func() {
		for _, queue := range r.beside() {
			_ = b.DeleteQueue(queue)
		}
	})
	return r
}

// beside are the queues of the policy.
func (r *Retries) beside() []string {
	all := []string{r.Policy.Park}
	for _, d := range r.Policy.Delays {
		all = append(all, r.Queue+".retry."+d.String())
	}
	return all
}

// Fail is the handler.
func (r *Retries) Fail(_ context.Context, d *steadymq.Delivery, n int) error {
	r.mu.Lock()
	r.most = max(r.most, d.Attempt())
	r.mu.Unlock()
	if r.Poison(n) {
		return errors.New("poison")
	}
	return nil
}

// Begin starts the consumer.
func (r *Retries) Begin() {
	r.Helper()
	r.Options = append(r.Options, steadymq.WithRetry(r.Policy))
	r.Start()
	r.Must(20*time.Second, "consuming", func() bool { return r.Consumer.State() == steadymq.Consuming })
}

// Fill publishes messages of somebody else to the park queue, as many as it takes.
func (r *Retries) Fill(n int) {
	r.Helper()
	conn, err := amqp.Dial(r.Broker.URL())
	require.NoError(r, err)
	defer CloseWithin(conn, 2*time.Second)
	ch, err := conn.Channel()
	require.NoError(r, err)
	require.NoError(r, ch.Confirm(false))
	for range n {
		confirm, err := ch.PublishWithDeferredConfirm("", r.Policy.Park, true, false, amqp.Publishing{Type: filler})
		require.NoError(r, err)
		_, err = confirm.WaitContext(r.Context())
		require.NoError(r, err)
	}
}

const filler = "filler"

// Take empties the park queue.
func (r *Retries) Take() {
	r.Helper()
	conn, err := amqp.Dial(r.Broker.URL())
	require.NoError(r, err)
	defer CloseWithin(conn, 2*time.Second)
	ch, err := conn.Channel()
	require.NoError(r, err)
	for {
		d, ok, err := ch.Get(r.Policy.Park, true)
		if err != nil || !ok { // it may have been deleted
			return
		}
		if d.Type == filler {
			continue
		}
		n, err := strconv.Atoi(d.MessageId)
		require.NoError(r, err)
		assert.EqualValues(r, r.Policy.Attempts, d.Headers["steadymq-attempt"])
		r.mu.Lock()
		r.parked[n]++
		r.mu.Unlock()
	}
}

// Passed says whether the messages that do not fail are handled.
func (r *Retries) Passed() bool {
	return !slices.ContainsFunc(r.Ledger.Missing(), func(n int) bool { return !r.Poison(n) })
}

// Lacking counts the confirmed messages that are neither handled nor known to be parked.
func (r *Retries) Lacking() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(slices.DeleteFunc(r.Ledger.Missing(), func(n int) bool { return r.parked[n] > 0 }))
}

// deadLettersAgain is after how long a quorum queue tries again to dead-letter a message whose queue
// it could not reach, as while a broker starts (RabbitMQ's default, for at-least-once).
const deadLettersAgain = 3 * time.Minute

// AwaitEnds waits until every confirmed message is handled or parked.
func (r *Retries) AwaitEnds() {
	r.Helper()
	r.Must(90*time.Second+deadLettersAgain, "every message is handled or parked", func() bool {
		r.Take()
		return r.Lacking() == 0
	})
}

// VerifyRetries ends the scenario and judges it from the broker's side.
func (r *Retries) VerifyRetries() {
	r.Helper()
	r.Feeder.Stop()
	r.AwaitEnds()
	quiet := time.Now() // messages whose confirm the feeder has missed are on their way, too
	r.Must(60*time.Second, "the queues are empty", func() bool {
		if stats := r.Consumer.Stats(); stats.Held+stats.Handling > 0 || !r.empty() {
			quiet = time.Now()
		}
		return time.Since(quiet) > time.Second
	})
	q, err := r.Broker.Queue(r.Queue)
	assert.NoError(r, err)
	assert.Equal(r, 1, q.Consumers, "consumers on the queue")
	r.Cancel()
	r.Stopped(DrainTimeout + CloseTimeout + time.Second)
	r.NothingLeft()
	r.QueueEmpty()
	r.endsAreRight()
}

// empty takes what is parked, and says whether nothing waits anywhere.
func (r *Retries) empty() bool {
	r.Helper()
	r.Take()
	for _, queue := range append(r.beside(), r.Queue) {
		if q, err := r.Broker.Queue(queue); err != nil || q.Ready > 0 {
			return false
		}
	}
	return true
}

func (r *Retries) endsAreRight() {
	r.Helper()
	copies := 0
	for n, times := range r.parked {
		assert.True(r, r.Poison(n), "parked though it does not fail: %d", n)
		copies += times - 1
	}
	for _, n := range r.Ledger.Finished() {
		assert.False(r, r.Poison(n), "handled though it fails: %d", n)
	}
	assert.LessOrEqual(r, r.most, r.Policy.Attempts, "attempts")
	stats := r.Consumer.Stats()
	assert.Equal(r, stats.Delivered, stats.Acked+stats.Requeued+stats.Discarded+stats.Parked+stats.Delayed+stats.Stale, "%+v", stats)
	assert.Zero(r, stats.Handling+stats.Held, "%+v", stats)
	assert.Zero(r, stats.Discarded)
	twice := r.Ledger.Counts().Twice
	// Each copy in flight holds a place of the prefetch. A message whose copy was stored and whose
	// ack was lost goes two ways from then on.
	lost := r.LostSessions() + r.Cuts
	assert.LessOrEqual(r, twice, r.Prefetch*r.LostSessions(), "handled again: prefetch per lost session at most")
	assert.LessOrEqual(r, copies, r.Prefetch*lost, "parked again: prefetch per lost connection at most")
	r.Note("%d parked, %d of them twice", len(slices.Collect(maps.Keys(r.parked))), copies)
	r.AddRow(twice + copies)
}
