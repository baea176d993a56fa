package main

import (
	"context"
	"errors"
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"
)

// What the plain driver does with many consumers on one connection.

// driverChannels is the plain driver with a channel for each consumer, on one
// connection.
func driverChannels(ctx context.Context, t target, each func([]byte)) error {
	conn, err := amqp.DialConfig(t.URL, amqp.Config{TLSClientConfig: t.TLS, Locale: "en_US"})
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	var all sync.WaitGroup
	for range t.Consumers {
		deliveries, err := subscribe(conn, t, false)
		if err != nil {
			return err
		}
		all.Go(func() { work(deliveries, t.Workers, acknowledge(ackEach, t.Prefetch), each) })
	}
	all.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return errors.New("the driver's deliveries ended")
}

// driverCrowd is the same, for consumers that come later.
type driverCrowd struct {
	conn *amqp.Connection
	each func([]byte)
}

func openDriverCrowd(url string, each func([]byte)) (crowd, error) {
	conn, err := amqp.DialConfig(url, amqp.Config{Locale: "en_US"})
	if err != nil {
		return nil, err
	}
	return &driverCrowd{conn: conn, each: each}, nil
}

func (d *driverCrowd) add(_ context.Context, queue string, n int) error {
	for range n {
		deliveries, err := subscribe(d.conn, target{Queue: queue, Prefetch: groupPrefetch}, false)
		if err != nil {
			return err
		}
		go work(deliveries, 1, acknowledge(ackEach, groupPrefetch), d.each)
	}
	return nil
}

func (d *driverCrowd) close() { _ = d.conn.Close() }
