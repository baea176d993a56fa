package matrix_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

// TestQueuesOfAConnectionOnRealBrokers lets RabbitMQ close channels under consumers of queues that
// live as long as their connection.
func TestQueuesOfAConnectionOnRealBrokers(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	var configs []rabbit.Config
	for _, g := range rabbit.Generations() {
		configs = append(configs, rabbit.Config{Generation: g})
	}
	for _, broker := range rabbit.StartAll(t, configs...) {
		t.Run(broker.Version(), func(t *testing.T) {
			for name, test := range map[string]func(*listener){
				"named by the broker":    keptQueue,
				"named by us":            func(l *listener) { l.queue = l.exchange + "-mine"; keptQueue(l) },
				"deleted by an operator": deletedQueue,
				"auto-delete":            autoDeleteQueue,
				"named by a topology":    topologyQueue,
			} {
				t.Run(name, func(t *testing.T) { test(newListener(t, broker)) })
			}
		})
	}
}

// listener consumes what is published to a fanout exchange of its own.
type listener struct {
	*testing.T
	broker   *rabbit.Broker
	proxy    *faultproxy.Proxy
	exchange string
	queue    string // given to New
	q        steadymq.Queue
	publish  *amqp.Channel
	sent     int

	handled  atomic.Int64
	consumer *steadymq.Consumer
	stopRun  context.CancelFunc
	result   chan error

	mu     sync.Mutex
	queues []string // one for each session
	causes []error  // one for each failure
}

func newListener(t *testing.T, broker *rabbit.Broker) *listener {
	l := &listener{T: t, broker: broker, exchange: fmt.Sprintf("steadymq-test-%d", time.Now().UnixNano())}
	proxy, err := faultproxy.New(broker.Addr())
	require.NoError(t, err)
	l.proxy = proxy
	conn, err := amqp.Dial(broker.URL())
	require.NoError(t, err)
	l.publish, err = conn.Channel()
	require.NoError(t, err)
	require.NoError(t, l.publish.Confirm(false))
	require.NoError(t, l.publish.ExchangeDeclare(l.exchange, "fanout", true, false, false, false, nil))
	l.q = steadymq.Queue{Type: "classic", Exclusive: true, Bindings: []steadymq.Binding{{Exchange: l.exchange}}}
	t.Cleanup(func() {
		assert.NoError(t, l.publish.ExchangeDelete(l.exchange, false, false))
		scenario.CloseWithin(conn, time.Second)
		assert.NoError(t, proxy.Close())
	})
	return l
}

func (l *listener) start(opts ...steadymq.Option) {
	l.Helper()
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, l.proxy.Addr())
	}
	opts = append([]steadymq.Option{
		steadymq.WithDialer(dial), steadymq.WithBackoff(time.Millisecond, 50*time.Millisecond), steadymq.WithLogger(slog.New(slog.DiscardHandler)),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			l.mu.Lock()
			defer l.mu.Unlock()
			switch c.To {
			case steadymq.Consuming:
				l.queues = append(l.queues, c.Queue)
			case steadymq.Backoff:
				l.causes = append(l.causes, c.Cause)
			}
		}}),
	}, opts...)
	var err error
	l.consumer, err = steadymq.New(l.broker.URL(), l.queue, opts...)
	require.NoError(l, err)
	ctx, cancel := context.WithCancel(l.Context())
	l.stopRun, l.result = cancel, make(chan error, 1)
	go func() {
		l.result <- l.consumer.Run(ctx, func(context.Context, *steadymq.Delivery) error {
			l.handled.Add(1)
			return nil
		})
	}()
	l.await("the first session", func() bool { return len(l.sessions()) == 1 })
}

func (l *listener) sessions() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.queues)
}

func (l *listener) await(what string, done func() bool) {
	l.Helper()
	require.Eventually(l, done, 5*time.Second, 5*time.Millisecond, what)
}

func (l *listener) send(n int) {
	l.Helper()
	for range n {
		confirm, err := l.publish.PublishWithDeferredConfirm(l.exchange, "", false, false, amqp.Publishing{Body: []byte("x")})
		require.NoError(l, err)
		_, err = confirm.WaitContext(l.Context())
		require.NoError(l, err)
	}
	l.sent += n
}

func (l *listener) all() {
	l.Helper()
	l.await("every message is handled and settled", func() bool {
		return int(l.handled.Load()) >= l.sent && int(l.consumer.Stats().Acked) >= l.sent
	})
}

// fail makes the broker close the channel, and returns when there is another session.
func (l *listener) fail() {
	l.Helper()
	l.await("an ack on the wire", func() bool { return len(l.proxy.Log().Settlements()) >= l.sent })
	settled := l.proxy.Log().Settlements()
	before := len(l.sessions())
	require.Positive(l, l.proxy.Inject(faultproxy.ToBroker, faultproxy.AckFrame(settled[len(settled)-1].Channel, 1<<40, false)))
	l.await("another session", func() bool { return len(l.sessions()) == before+1 })
}

// stop ends Run, and then no queue of any session may be left.
func (l *listener) stop() {
	l.Helper()
	l.stopRun()
	require.NoError(l, <-l.result)
	for _, cause := range l.causes {
		assert.ErrorContains(l, cause, ": lost ", "no failure but those of the sessions")
	}
	l.await("the queues are gone", func() bool {
		return !slices.ContainsFunc(l.sessions(), l.exists)
	})
}

func (l *listener) exists(queue string) bool {
	_, err := l.broker.Queue(queue)
	var said *amqp.Error
	return !errors.As(err, &said) || said.Code != amqp.NotFound // 405 while it is another's
}

func keptQueue(l *listener) {
	l.start(steadymq.WithQueue(l.q))
	for range 5 {
		l.send(10)
		l.all()
		l.fail()
		l.send(1)
	}
	l.all()
	sessions := l.sessions()
	assert.Len(l, slices.Compact(sessions), 1, "all sessions have the same queue")
	assert.EqualValues(l, 1, l.consumer.Stats().Connections)
	l.stop()
}

func deletedQueue(l *listener) {
	l.start(steadymq.WithQueue(l.q))
	l.send(1)
	l.all()
	at := time.Now()
	require.NoError(l, l.broker.Do(l.Context(), `{ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"%s">>)), rabbit_amqqueue:delete(Q, false, false, <<"test">>)`, l.sessions()[0]))
	l.await("another session", func() bool { return len(l.sessions()) == 2 })
	assert.Less(l, time.Since(at), 2*time.Second, "the command takes most of it")
	l.send(10)
	l.all()
	assert.EqualValues(l, 1, l.consumer.Stats().Connections)
	assert.EqualValues(l, 2, l.consumer.Stats().Sessions)
	l.stop()
}

func autoDeleteQueue(l *listener) {
	l.q.AutoDelete = true
	l.start(steadymq.WithQueue(l.q))
	for range 20 {
		l.send(1)
		l.all()
		l.fail()
	}
	l.stop()
}

func topologyQueue(l *listener) {
	l.start(steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
		q, err := ch.QueueDeclare("", true, false, true, false, amqp.Table{"x-queue-type": "classic"})
		if err != nil {
			return "", err
		}
		return q.Name, ch.QueueBind(q.Name, "", l.exchange, false, nil)
	}))
	for i := range 3 {
		l.send(1)
		l.all()
		l.fail()
		assert.EqualValues(l, i+2, l.consumer.Stats().Connections)
		l.await("the queue of before is gone", func() bool { return !l.exists(l.sessions()[i]) })
	}
	l.stop()
}
