package behaviour_test

import (
	"net"
	"strconv"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/internal/wire"
	"github.com/steadymq/steadymq/steadymqtest"
)

// The broker answers nothing on one channel, and its close only after a while. The connection has
// room for one more: that gets the same number, once it is free.
func TestChannelIsGivenUpAndItsConnectionLives(t *testing.T) {
	for _, stage := range []steadymqtest.Stage{
		steadymqtest.StageChannel, steadymqtest.StageDeclare, steadymqtest.StageQos, steadymqtest.StageConsume,
	} {
		t.Run(stage.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				s, conn := onWire(r)
				set := func(limit time.Duration) (*amqp.Channel, error) {
					claim, err := s.ClaimChannel(r.Context())
					require.NoError(r, err)
					defer claim.Release()
					defer time.AfterFunc(limit, func() { claim.GiveUp(504, "not set up in time") }).Stop()
					return setUp(conn)
				}
				r.Broker.Faults.HangAt(stage, true)
				r.Broker.Faults.SlowCloseOk(3 * time.Second)
				began := time.Now()
				_, err := set(time.Second)
				require.ErrorContains(r, err, "not set up in time")
				assert.Equal(r, time.Second, time.Since(began))
				assert.Equal(r, 1, s.GivenUp())
				r.Broker.Faults.HangAt(stage, false)

				channel, err := set(10 * time.Second)
				require.NoError(r, err)
				assert.InDelta(r, 4, time.Since(began).Seconds(), 0.1, "the number is free")
				assert.Zero(r, s.GivenUp())
				require.NoError(r, channel.Close())
				require.NoError(r, conn.Close())
				s.Wait()
			})
		})
	}
}

// Broker and client close a channel at the same time. The broker's answer to the client comes when
// the number is open again, and is not taken for an answer to that.
func TestChannelThatBothSidesCloseLeavesNothingForTheNext(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.SetLatency(10 * time.Millisecond)
		s, conn := onWire(r)
		for range 3 {
			claim, err := s.ClaimChannel(r.Context())
			require.NoError(r, err)
			channel, err := setUp(conn)
			require.NoError(r, err)
			require.Equal(r, 1, r.Broker.CloseChannels(406, "closed by the broker"))
			time.Sleep(5 * time.Millisecond) // it is under way
			require.ErrorContains(r, channel.Close(), "closed by the broker")
			claim.Release()
		}
		require.NoError(r, conn.Close())
		s.Wait()
	})
}

// onWire is a connection of the driver on a socket of the wire, with room for one channel.
func onWire(r *rig.Rig) (*wire.Socket, *amqp.Connection) {
	uri, err := amqp.ParseURI(r.Broker.URL)
	require.NoError(r, err)
	raw, err := r.Broker.Dial("tcp", net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port)))
	require.NoError(r, err)
	s := wire.NewSocket(raw, wire.Options{WriteTimeout: 10 * time.Second})
	conn, err := amqp.Open(s, amqp.Config{
		SASL:       []amqp.Authentication{&amqp.PlainAuth{Username: uri.Username, Password: uri.Password}},
		Vhost:      uri.Vhost,
		Heartbeat:  10 * time.Second,
		ChannelMax: 1,
	})
	require.NoError(r, err)
	return s, conn
}

// setUp is a channel that consumes.
func setUp(conn *amqp.Connection) (*amqp.Channel, error) {
	channel, err := conn.Channel()
	if err != nil {
		return nil, err
	}
	if err := channel.Qos(10, 0, false); err != nil {
		return nil, err
	}
	queue, err := channel.QueueDeclare("given-up", true, false, false, false, nil)
	if err != nil {
		return nil, err
	}
	_, err = channel.Consume(queue.Name, "tag", false, false, false, false, nil)
	return channel, err
}
