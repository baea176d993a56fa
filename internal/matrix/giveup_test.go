package matrix_test

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/wire"
)

// TestChannelIsGivenUpOnRealBrokers gives up a channel whose basic.consume hangs at the queue, and
// one whose deliveries are under way, on a connection that has but one number for channels. All
// messages are then consumed on the next channel, which gets that number.
func TestChannelIsGivenUpOnRealBrokers(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	var configs []rabbit.Config
	for _, g := range rabbit.Generations() {
		configs = append(configs, rabbit.Config{Generation: g})
	}
	for _, broker := range rabbit.StartAll(t, configs...) {
		t.Run(broker.Version(), func(t *testing.T) {
			t.Run("basic.consume hangs", func(t *testing.T) { giveUp(t, broker, true) })
			t.Run("deliveries are under way", func(t *testing.T) { giveUp(t, broker, false) })
		})
	}
}

const messages = 1000

func giveUp(t *testing.T, broker *rabbit.Broker, hang bool) {
	if hang {
		rabbit.NeedCommands(t, broker)
	}
	queue := fmt.Sprintf("steadymq-test-%d", time.Now().UnixNano())
	fill(t, broker, queue)
	s, conn := onWire(t, broker)

	first, channel := claimed(t, s, conn)
	ended := channel.NotifyClose(make(chan *amqp.Error, 1))
	late := newTaker(s, "late", 100)
	require.NoError(t, channel.Qos(100, 0, false))
	if hang {
		suspended(t, broker, queue, "suspend")
	}
	consumed := make(chan error, 1)
	go func() {
		_, err := channel.Consume(queue, "late", false, false, false, false, nil)
		consumed <- err
	}()
	if hang {
		time.Sleep(500 * time.Millisecond)
		require.Empty(t, consumed, "the queue answers nobody")
	} else {
		require.NoError(t, <-consumed)
		<-late.more
	}
	require.True(t, first.GiveUp(504, "the call took too long"))
	require.Error(t, late.sub.Ack(1))
	assert.Equal(t, "the call took too long", (<-ended).Reason)
	if hang {
		require.ErrorContains(t, <-consumed, "the call took too long")
		require.Equal(t, 1, s.GivenUp())
		time.AfterFunc(500*time.Millisecond, func() { suspended(t, broker, queue, "resume") })
	}

	_, channel = claimed(t, s, conn)
	require.Zero(t, s.GivenUp(), "the number is used again once the broker has confirmed")
	next := newTaker(s, "next", 100)
	require.NoError(t, channel.Qos(100, 0, false))
	_, err := channel.Consume(queue, "next", false, false, false, false, nil)
	require.NoError(t, err)
	limit := time.After(30 * time.Second)
	seen := map[string]bool{}
	for len(seen) < messages {
		select {
		case d := <-next.more:
			require.False(t, seen[string(d.Body)], "%s came twice", d.Body)
			seen[string(d.Body)] = true
			require.NoError(t, next.sub.Ack(d.DeliveryTag))
		case <-limit:
			t.Fatalf("%d of %d messages came: the others are stuck", len(seen), messages)
		}
	}
	require.NoError(t, channel.Close()) // its close-ok is the proof of the acks
	left, err := broker.Queue(queue)
	require.NoError(t, err)
	assert.Zero(t, left, "everything is acked, and nobody consumes")
	assert.False(t, conn.IsClosed())
}

// fill declares a queue and publishes to it.
func fill(t *testing.T, broker *rabbit.Broker, queue string) {
	require.NoError(t, broker.DeclareQueue(queue, nil))
	conn, err := amqp.Dial(broker.URL())
	require.NoError(t, err)
	defer func() { _ = conn.Close() }()
	channel, err := conn.Channel()
	require.NoError(t, err)
	require.NoError(t, channel.Confirm(false))
	var last *amqp.DeferredConfirmation
	for i := range messages {
		last, err = channel.PublishWithDeferredConfirm("", queue, false, false, amqp.Publishing{Body: []byte(strconv.Itoa(i))})
		require.NoError(t, err)
	}
	require.True(t, last.Wait())
}

// suspended lets the process of a queue stand still, or go on.
func suspended(t *testing.T, broker *rabbit.Broker, queue, how string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err := broker.Eval(ctx, fmt.Sprintf(
		`{ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"%s">>)), sys:%s(amqqueue:get_pid(Q)).`, queue, how))
	assert.NoError(t, err)
}

// onWire is a connection of the driver on a wire.Socket, with room for one channel.
func onWire(t *testing.T, broker *rabbit.Broker) (*wire.Socket, *amqp.Connection) {
	raw, err := net.Dial("tcp", broker.Addr())
	require.NoError(t, err)
	s := wire.NewSocket(raw, wire.Options{WriteTimeout: 10 * time.Second, WriteDelay: time.Millisecond})
	conn, err := amqp.Open(s, amqp.Config{
		SASL:       []amqp.Authentication{&amqp.PlainAuth{Username: "guest", Password: "guest"}},
		Vhost:      "/",
		Heartbeat:  10 * time.Second,
		ChannelMax: 1,
	})
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = conn.CloseDeadline(time.Now().Add(5 * time.Second))
		s.Kill(nil)
		s.Wait()
	})
	return s, conn
}

func claimed(t *testing.T, s *wire.Socket, conn *amqp.Connection) (*wire.Channel, *amqp.Channel) {
	claim, err := s.ClaimChannel(t.Context())
	require.NoError(t, err)
	defer claim.Release()
	channel, err := conn.Channel()
	require.NoError(t, err)
	return claim, channel
}

// taker is a receiver with its subscription.
type taker struct {
	sub  *wire.Subscription
	more chan *amqp.Delivery
}

func newTaker(s *wire.Socket, tag string, prefetch int) *taker {
	k := &taker{more: make(chan *amqp.Delivery, 2*messages)}
	k.sub = s.Subscribe(tag, prefetch, k)
	return k
}

func (*taker) New() *amqp.Delivery                    { return new(amqp.Delivery) }
func (k *taker) Put(d *amqp.Delivery)                 { k.more <- d }
func (*taker) PutAside(*amqp.Delivery, uint64, error) {}
