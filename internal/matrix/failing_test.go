package matrix_test

import (
	"context"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

// failingCells are messages that fail or cannot be read, stops that the broker counts, and a URL
// with the port of another protocol.
func failingCells() []cell {
	return []cell{
		{fault: "handler fails for long, queue declared by us", rows: "66", by: bothWay, test: failsForLong},
		{fault: "prefetch full of failing messages", rows: "67", test: prefetchFullOfFailures},
		{fault: "headers that the driver does not read, then a reset", rows: "68, 69", test: strangeHeadersOverAReset},
		{fault: "message that no handler can be given", rows: "68", test: tooLargeToBeGiven},
		{fault: "URL that leads to the port of the other nodes", rows: "72", by: direct, test: portOfTheNodes},
		{
			fault: "stops with a prefetch that was not started", rows: "73", by: bothWay, test: stopsAreCounted,
			not: only("only quorum queues count deliveries", quorum),
		},
	}
}

// tried counts the tries of each message.
type tried struct {
	mu sync.Mutex
	of map[int]int
}

func (t *tried) again(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.of == nil {
		t.of = map[int]int{}
	}
	t.of[n]++
}

// least are the fewest tries of the first messages.
func (t *tried) least(messages int) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	least := t.of[0]
	for n := range messages {
		least = min(least, t.of[n])
	}
	return least
}

// failsForLong: a dependency is away for more tries than the default delivery limit allows. A
// connection is lost meanwhile, so that the queue is declared again.
func failsForLong(r *trial) {
	const failing, beyondTheLimit = 6, 25
	r.ok(r.Broker.DeleteQueue(r.Queue))
	r.Options = append(r.Options,
		steadymq.WithQueue(steadymq.Queue{Type: string(r.kind)}), steadymq.WithRequeueDelay(20*time.Millisecond, 60*time.Millisecond))
	var tries tried
	var well atomic.Bool
	r.Handle = func(_ context.Context, _ *steadymq.Delivery, n int) error {
		if n < failing && !well.Load() {
			tries.again(n)
			return errors.New("the database is away")
		}
		return nil
	}
	r.begin()
	r.Must(30*time.Second, "more returns than the default limit allows", func() bool { return tries.least(failing) >= beyondTheLimit })
	lost, done := r.Timed(r.Cut)
	r.ResumedSince(lost, done, scenario.AtOnce)
	again := tries.least(failing)
	r.Must(10*time.Second, "further returns", func() bool { return tries.least(failing) >= again+3 })
	well.Store(true)
	r.judge()
}

// prefetchFullOfFailures: as long as they fail, the messages behind them wait, and the log says so.
func prefetchFullOfFailures(r *trial) {
	r.Options = append(r.Options, steadymq.WithRequeueDelay(3*time.Second, 3*time.Second))
	var well atomic.Bool
	r.Handle = func(_ context.Context, _ *steadymq.Delivery, n int) error {
		if n < r.Prefetch && !well.Load() {
			return errors.New("not yet")
		}
		return nil
	}
	r.Start()
	r.consuming()
	r.Publish(2 * r.Prefetch)
	r.Must(5*time.Second, "all of them are held", func() bool { return r.Consumer.Stats().Held == r.Prefetch })
	r.Must(time.Second, "it is told", func() bool { return strings.Contains(r.ConsumerLog.String(), "failed messages are held") })
	// A quorum queue of 3.10 delivers what was returned after what was not delivered yet.
	if r.gen != rabbit.Gen310 || r.kind != quorum {
		r.Pause(4 * time.Second) // they come back, once at least
	}
	assert.Zero(r, r.Ledger.Counts().Finished, "nothing passes them")
	well.Store(true)
	r.judge()
	assert.Zero(r, r.LostSessions())
	assert.Zero(r, r.Consumer.Stats().Held)
	assert.Equal(r, 1, strings.Count(r.ConsumerLog.String(), "failed messages are held"))
}

// strangeHeadersOverAReset: each of these messages would end the plain driver's connection, and be
// the first message of the next one.
func strangeHeadersOverAReset(r *trial) {
	many, deep := amqp.Table{}, amqp.Table{}
	for i := range 9000 {
		many[strconv.Itoa(i)] = true
	}
	for range 40 {
		deep = amqp.Table{"t": deep}
	}
	strange := []amqp.Publishing{
		// The last is of type L, see oldIntegers.
		{Headers: many}, {Headers: deep}, {Headers: amqp.Table{"marker": int64(-2)}},
	}
	release := make(chan struct{})
	var seen tried
	r.Handle = func(_ context.Context, d *steadymq.Delivery, n int) error {
		if len(d.Headers) > 0 {
			seen.again(n)
			<-release
		}
		return nil
	}
	r.Start()
	r.consuming()
	for _, m := range strange {
		r.send(r.Queue, m)
	}
	if r.kind != stream || r.gen != rabbit.Gen310 { // there no stream gets dead letters
		before := r.Queue + "-before"
		r.ok(r.Broker.DeclareQueue(before, amqp.Table{
			"x-dead-letter-exchange": "", "x-dead-letter-routing-key": r.Queue, "x-message-ttl": int32(1),
		}))
		r.Cleanup(func() { _ = r.Broker.DeleteQueue(before) })
		r.send(before, amqp.Publishing{Headers: amqp.Table{"large": strings.Repeat("x", largeHeaders)}})
		strange = append(strange, amqp.Publishing{})
	}
	r.Must(10*time.Second, "each is at its handler", func() bool { return seen.least(len(strange)) == 1 })
	r.Feed()
	lost, done := r.Timed(r.Cut)
	close(release)
	r.ResumedSince(lost, done, scenario.AtOnce)
	if r.kind != stream { // which is resumed after what was handled, late or not
		r.Must(10*time.Second, "each comes again", func() bool { return seen.least(len(strange)) == 2 })
	}
	r.judge()
	assert.EqualValues(r, 1, r.LostSessions(), "by the reset")
	assert.Zero(r, r.Consumer.Stats().Unreadable)
}

// send publishes one message, as the next of the feeder, which must not run.
func (r *trial) send(queue string, m amqp.Publishing) (number int) {
	r.Helper()
	conn, err := amqp.DialConfig(r.Broker.URL(), amqp.Config{Dial: func(network, address string) (net.Conn, error) {
		c, err := net.DialTimeout(network, address, 5*time.Second)
		return oldIntegers{c}, err
	}})
	r.ok(err)
	defer scenario.CloseWithin(conn, time.Second)
	ch, err := conn.Channel()
	r.ok(err)
	r.ok(ch.Confirm(false))
	number = r.Feeder.NextNumber()
	m.MessageId, m.DeliveryMode = strconv.Itoa(number), amqp.Persistent
	confirm, err := ch.PublishWithDeferredConfirm("", queue, true, false, m)
	r.ok(err)
	confirmed, err := confirm.WaitContext(r.Context())
	r.ok(err)
	assert.True(r, confirmed)
	r.Ledger.Confirm(number)
	return number
}

// tooLargeToBeGiven: the consumer's own limit stands for everything that makes a message
// unreadable, because no broker sends a header of more than 1 MiB. The message is named and held,
// and is in no other's way; a stream steps over it.
func tooLargeToBeGiven(r *trial) {
	var named atomic.Pointer[steadymq.MessageError]
	r.Options = append(r.Options, steadymq.WithMaxMessageSize(1000), steadymq.WithHooks(steadymq.Hooks{
		StateChanged: r.Changed, Unreadable: func(err *steadymq.MessageError) { named.Store(err) },
	}))
	r.Start()
	r.consuming()
	r.Publish(5)
	large := r.send(r.Queue, amqp.Publishing{Body: make([]byte, 200_000)}) // two frames
	r.Feed()
	r.Must(5*time.Second, "it is told", func() bool { return named.Load() != nil })
	assert.Equal(r, r.Queue, named.Load().Queue)
	assert.EqualValues(r, 200_000, named.Load().Size)
	r.Must(time.Second, "it is logged", func() bool { return strings.Contains(r.ConsumerLog.String(), "cannot be read") })
	r.Pause(time.Second)
	r.Feeder.Stop()
	r.Ledger.Forget(large)
	r.AwaitFinished()
	r.quiet() // the feeder's last message may have been cut off from its confirm
	assert.Zero(r, r.LostSessions())
	assert.EqualValues(r, 1, r.Consumer.Stats().Unreadable)
	r.Cancel()
	r.Stopped(scenario.DrainTimeout + scenario.CloseTimeout + time.Second)
	r.NothingLeft()
	r.StatsAddUp()
	if r.kind != stream {
		assert.Equal(r, []int{large}, r.TakeAll(r.Queue), "it is there, and nothing else")
	}
	r.AddRow(r.Duplicates())
}

// portOfTheNodes: a URL that changes to a wrong port between two sessions.
func portOfTheNodes(r *trial) {
	var wrong atomic.Bool
	right, err := r.Broker.Direct(r.Context(), 5672)
	r.ok(err)
	nodes, err := r.Broker.Direct(r.Context(), 25672)
	r.ok(err)
	r.Options = append(r.Options,
		steadymq.WithDialer(r.Sockets.Dial), steadymq.WithURLFunc(func(context.Context) (string, error) {
			if wrong.Load() {
				return "amqp://guest:guest@" + nodes + "/", nil
			}
			return "amqp://guest:guest@" + right + "/", nil
		}))
	r.begin()
	wrong.Store(true)
	lost := time.Now()
	r.Cut()
	r.told("port 25672 is RabbitMQ's port for other nodes", scenario.SetupTimeout+2*time.Second)
	r.Pause(2 * time.Second)
	assert.False(r, r.consumesSince(lost))
	wrong.Store(false)
	healed := time.Now()
	r.atNextTry(healed, healed)
	r.judge()
}

// stopsAreCounted: up to 4.2 a quorum queue counts a stop as a return of every message that was
// prefetched, even of those that no handler has seen. Since 4.3 it counts failures only.
func stopsAreCounted(r *trial) {
	const stops = 3
	var begun atomic.Int64
	var mu sync.Mutex
	attempt := 0 // the highest of those of the last round
	var release chan struct{}
	r.Handle = func(_ context.Context, d *steadymq.Delivery, _ int) error {
		begun.Add(1)
		mu.Lock()
		attempt = max(attempt, d.Attempt())
		mu.Unlock()
		<-release
		return nil
	}
	r.Publish(r.Prefetch)
	for n := range stops + 1 {
		release = make(chan struct{})
		begun.Store(0)
		attempt = 0
		r.Start()
		r.consuming()
		r.Must(5*time.Second, "all workers are busy", func() bool { return begun.Load() == int64(r.Workers) })
		r.Must(5*time.Second, "the rest is prefetched", func() bool {
			q, err := r.Broker.Queue(r.Queue)
			return err == nil && q.Ready == 0
		})
		r.Cancel()
		r.Pause(100 * time.Millisecond)
		close(release)
		r.Stopped(scenario.DrainTimeout + scenario.CloseTimeout + time.Second)
		r.NothingLeft()
		r.StatsAddUp()
		assert.EqualValues(r, r.Workers, r.Consumer.Stats().Acked, "stop %d", n+1)
	}
	r.QueueEmpty()
	r.AcksAreRight()
	assert.Zero(r, r.LostSessions())
	assert.Zero(r, r.Ledger.Counts().Twice, "a clean stop costs no duplicate")
	r.Note("Attempt() of a message that no handler had seen: %d", attempt)
	if r.gen == rabbit.Gen43 {
		assert.Equal(r, 1, attempt, "what was given back unseen has not been tried")
	} else {
		assert.Equal(r, 1+stops, attempt)
	}
	r.AddRow(0)
}
