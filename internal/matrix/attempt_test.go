package matrix_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// attempts is what became of a message before the consumer's queue has it, what its handler does each time, and the attempts it is shown by
// 3.10, by 4.0 and by 4.3.
type attempts struct {
	name     string
	kind     string // of the consumer's queue
	from     string // of the queue that it was in before, "" for none
	args     amqp.Table
	before   []bool // how it was rejected there: with requeue?
	headers  func(queue string) amqp.Table
	loop     bool // a rejected message comes back by a queue that waits
	outcomes []steadymq.Outcome
	want     [3][]int
}

func all(n ...int) [3][]int { return [3][]int{n, n, n} }

var (
	putBack  = []steadymq.Outcome{steadymq.Requeued, steadymq.Requeued, steadymq.Acked}
	loops    = []steadymq.Outcome{steadymq.Discarded, steadymq.Discarded, steadymq.Requeued, steadymq.Discarded, steadymq.Acked}
	straight = []bool{false}
	later    = []bool{true, true, false}
)

var attemptTable = []attempts{
	{name: "put back", kind: "classic", outcomes: putBack, want: all(1, 2, 2)},
	{name: "put back", kind: "quorum", outcomes: putBack, want: all(1, 2, 3)},
	{name: "retry loop", kind: "classic", loop: true, outcomes: loops, want: all(1, 2, 3, 3, 4)},
	{name: "retry loop", kind: "quorum", loop: true, outcomes: loops, want: [3][]int{{1, 2, 3, 3, 4}, {1, 2, 3, 3, 4}, {1, 2, 3, 4, 5}}},
	{name: "rejected elsewhere at once", kind: "classic", from: "classic", before: straight, outcomes: putBack, want: [3][]int{{1, 2, 2}, {1, 2, 2}, {2, 2, 2}}},
	{name: "rejected elsewhere at once", kind: "classic", from: "quorum", before: straight, outcomes: putBack, want: [3][]int{{1, 2, 2}, {1, 2, 2}, {2, 2, 2}}},
	{name: "rejected elsewhere at once", kind: "quorum", from: "classic", before: straight, outcomes: putBack, want: [3][]int{{1, 2, 3}, {1, 1, 3}, {1, 2, 3}}},
	{name: "rejected elsewhere at once", kind: "quorum", from: "quorum", before: straight, outcomes: putBack, want: [3][]int{{1, 2, 3}, {1, 1, 3}, {1, 2, 3}}},
	{name: "rejected elsewhere later", kind: "quorum", from: "classic", before: later, outcomes: putBack, want: [3][]int{{1, 2, 3}, {1, 1, 3}, {1, 2, 3}}},
	{name: "rejected elsewhere later", kind: "quorum", from: "quorum", before: later, outcomes: putBack, want: [3][]int{{1, 2, 3}, {1, 1, 3}, {1, 2, 3}}},
	{name: "rejected elsewhere, then in a loop", kind: "quorum", from: "quorum", before: straight, loop: true, outcomes: loops, want: [3][]int{{1, 2, 3, 3, 4}, {1, 2, 3, 3, 4}, {1, 2, 3, 3, 4}}},
	{name: "past the limit elsewhere", kind: "quorum", from: "quorum", args: amqp.Table{"x-delivery-limit": int32(1)}, before: []bool{true, true}, outcomes: putBack, want: [3][]int{{1, 2, 3}, {1, 1, 3}, {1, 2, 3}}},
	{name: "past the limit elsewhere", kind: "classic", from: "quorum", args: amqp.Table{"x-delivery-limit": int32(1)}, before: []bool{true, true}, outcomes: putBack, want: [3][]int{{1, 2, 2}, {1, 2, 2}, {2, 2, 2}}},
	{name: "waited elsewhere", kind: "classic", from: "classic", args: amqp.Table{"x-message-ttl": int32(20)}, outcomes: putBack, want: all(1, 2, 2)},
	{name: "waited elsewhere", kind: "quorum", from: "classic", args: amqp.Table{"x-message-ttl": int32(20)}, outcomes: putBack, want: all(1, 2, 3)},
	{name: "waited elsewhere", kind: "quorum", from: "quorum", args: amqp.Table{"x-message-ttl": int32(20)}, outcomes: putBack, want: all(1, 2, 3)},
	{name: "published again", kind: "quorum", headers: oldLife, outcomes: putBack, want: all(1, 2, 3)},
	{name: "published again", kind: "classic", headers: oldLife, outcomes: putBack, want: all(1, 6, 6)}, // nothing takes the count out
}

// oldLife is what a message of a queue brings along when it is moved back into it.
func oldLife(queue string) amqp.Table {
	death := amqp.Table{"queue": queue, "reason": "rejected", "count": int64(3), "exchange": "", "routing-keys": []any{queue}, "time": time.Unix(1, 0)}
	return amqp.Table{
		"x-delivery-count": int64(5), "x-acquired-count": int64(6), "x-death": []any{death},
		"x-first-death-queue": queue, "x-last-death-queue": queue, "x-last-death-reason": "rejected",
	}
}

func TestAttemptIsThatOfThisQueue(t *testing.T) {
	for i, v := range [][2]int{{3, 10}, {4, 0}, {4, 3}} {
		for n, a := range attemptTable {
			t.Run(fmt.Sprintf("%d.%d/%s/%s to %s", v[0], v[1], a.name, a.from, a.kind), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					a.check(r.T, r.Broker.URL, r.Broker.Dialer(), fmt.Sprintf("attempt-%d-", n), a.want[i])
				}, steadymqtest.WithVersion(v[0], v[1]))
			})
		}
	}
}

func TestAttemptOnRealBrokers(t *testing.T) {
	if testing.Short() {
		t.Skip("starts brokers")
	}
	var configs []rabbit.Config
	for _, g := range rabbit.Generations() {
		configs = append(configs, rabbit.Config{Generation: g})
	}
	for i, broker := range rabbit.StartAll(t, configs...) {
		for n, a := range attemptTable {
			t.Run(fmt.Sprintf("%s/%s/%s to %s", broker.Version(), a.name, a.from, a.kind), func(t *testing.T) {
				a.check(t, broker.URL(), new(net.Dialer).DialContext, fmt.Sprintf("attempt-%d-%d-", i, n), a.want[i])
			})
		}
	}
}

// check leads a message through its lives. prefix makes the names of its queues.
func (a *attempts) check(t *testing.T, url string, dial func(ctx context.Context, network, addr string) (net.Conn, error), prefix string, want []int) {
	conn, err := amqp.DialConfig(url, amqp.Config{Dial: func(network, addr string) (net.Conn, error) { return dial(t.Context(), network, addr) }})
	require.NoError(t, err)
	defer conn.Close()
	ch, err := conn.Channel()
	require.NoError(t, err)
	declare := func(name, kind string, args amqp.Table) string {
		args["x-queue-type"] = kind
		q, err := ch.QueueDeclare(prefix+name, true, false, false, false, args)
		require.NoError(t, err)
		return q.Name
	}
	defer func() {
		for _, name := range []string{"q", "before", "wait"} {
			_, _ = ch.QueueDelete(prefix+name, false, false, false)
		}
	}()
	args := amqp.Table{}
	if a.loop {
		args = deadLetterTo(prefix + "wait")
		wait := deadLetterTo(prefix + "q")
		wait["x-message-ttl"] = int32(20)
		declare("wait", "classic", wait)
	}
	queue := declare("q", a.kind, args)
	enter := queue
	if a.from != "" {
		args := deadLetterTo(queue)
		for k, v := range a.args {
			args[k] = v
		}
		enter = declare("before", a.from, args)
	}
	m := amqp.Publishing{DeliveryMode: amqp.Persistent, Body: []byte("m")}
	if a.headers != nil {
		m.Headers = a.headers(queue)
	}
	require.NoError(t, ch.PublishWithContext(t.Context(), "", enter, false, false, m))
	a.live(t, conn, enter)

	var got []int
	ctx, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	require.NoError(t, steadymq.Consume(ctx, url, queue, func(_ context.Context, d *steadymq.Delivery) error {
		got = append(got, d.Attempt())
		switch a.outcomes[min(len(got), len(a.outcomes))-1] {
		case steadymq.Requeued:
			return steadymq.Requeue(nil)
		case steadymq.Discarded:
			return steadymq.Discard(nil)
		default:
			stop()
			return nil
		}
	}, steadymq.WithDialer(dial), steadymq.WithLogger(slog.New(slog.DiscardHandler))))
	assert.Equal(t, want, got)
}

// live is the life in the queue before.
func (a *attempts) live(t *testing.T, conn *amqp.Connection, queue string) {
	if a.before == nil {
		return
	}
	ch, err := conn.Channel()
	require.NoError(t, err)
	require.NoError(t, ch.Qos(1, 0, false))
	ds, err := ch.Consume(queue, "", false, false, false, false, nil)
	require.NoError(t, err)
	for _, requeue := range a.before {
		d := <-ds
		require.NoError(t, d.Reject(requeue))
	}
	require.NoError(t, ch.Close())
}

func deadLetterTo(queue string) amqp.Table {
	return amqp.Table{"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}
}
