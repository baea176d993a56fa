package rabbit

import (
	"context"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// WaitReady waits, a minute and a half at most, until the broker opens an AMQP connection, and notes its version.
func (b *Broker) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	start := time.Now()
	for {
		version, err := probe(b.URL())
		if err == nil {
			b.version = version
			logf("%s: RabbitMQ %s accepts AMQP after %v", b.Addr(), version, time.Since(start).Round(time.Millisecond))
			return nil
		}
		if sleep(ctx, 200*time.Millisecond) != nil {
			return fmt.Errorf("rabbit: %s accepts no AMQP: %w", b.Addr(), err)
		}
	}
}

// probe opens and closes one connection and returns the version the broker announces.
func probe(rawURL string) (string, error) {
	conn, err := dial(rawURL)
	if err != nil {
		return "", err
	}
	defer closeConn(conn)
	version, _ := conn.Properties["version"].(string)
	return version, nil
}

func dial(rawURL string) (*amqp.Connection, error) {
	return amqp.DialConfig(rawURL, amqp.Config{
		Heartbeat:  10 * time.Second,
		Dial:       amqp.DefaultDial(5 * time.Second),
		Properties: amqp.Table{"connection_name": "steadymq-test-probe"},
	})
}

func closeConn(conn *amqp.Connection) { _ = conn.CloseDeadline(time.Now().Add(2 * time.Second)) }

// Queue is what a passive declare says of a queue.
type Queue struct {
	Ready     int // messages waiting, not those that are delivered and unsettled
	Consumers int
}

// Queue asks the broker over AMQP, so it also works where there are no commands.
func (b *Broker) Queue(name string) (Queue, error) {
	var q Queue
	err := b.onChannel(func(ch *amqp.Channel) error {
		got, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
		q = Queue{Ready: got.Messages, Consumers: got.Consumers}
		return err
	})
	return q, err
}

// DeclareQueue makes a durable queue; args nil makes a classic one.
func (b *Broker) DeclareQueue(name string, args amqp.Table) error {
	return b.onChannel(func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclare(name, true, false, false, false, args)
		return err
	})
}

// Bind has the queue take what is published to the exchange.
func (b *Broker) Bind(queue, exchange string) error {
	return b.onChannel(func(ch *amqp.Channel) error { return ch.QueueBind(queue, "", exchange, false, nil) })
}

// DeleteQueue removes a queue with all that is in it.
func (b *Broker) DeleteQueue(name string) error {
	return b.onChannel(func(ch *amqp.Channel) error {
		_, err := ch.QueueDelete(name, false, false, false)
		return err
	})
}

func (b *Broker) onChannel(do func(*amqp.Channel) error) error {
	conn, err := dial(b.URL())
	if err != nil {
		return fmt.Errorf("rabbit: %s: %w", b.Addr(), err)
	}
	defer closeConn(conn)
	ch, err := conn.Channel()
	if err != nil {
		return fmt.Errorf("rabbit: channel: %w", err)
	}
	return do(ch)
}
