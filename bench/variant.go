package main

import (
	"context"
	"crypto/tls"
	"errors"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// target is where a variant consumes from, and how.
type target struct {
	URL      string
	Queue    string
	Prefetch int
	Workers  int
	TLS      *tls.Config

	Consumers int // on one connection, of the variants that have several
}

// A consumeFunc consumes until ctx ends, calling each for every message before
// it settles it. It returns nil when ctx ended it.
type consumeFunc func(ctx context.Context, t target, each func(body []byte)) error

// variant is one way to write the consumer that a benchmark compares.
type variant struct {
	name  string
	label string // in tables and charts
	run   consumeFunc
	// settles says that each message is acknowledged on its own, so the server
	// must see every tag exactly once.
	settles bool
	// one says that there is one consumer, however many the others have.
	one bool
}

// The variants of the throughput benchmark. Their order is the order of the
// alternating runs; the first is what the others are compared with.
var throughputVariants = []variant{
	{name: "driver", label: "amqp091-go, ack each", run: plainDriver(ackEach), settles: true},
	{name: "steadymq", label: "steadymq", run: steady, settles: true},
	{name: "multiple", label: "amqp091-go, ack multiple", run: plainDriver(ackMultiple)},
	{name: "auto", label: "amqp091-go, automatic ack", run: plainDriver(ackAuto)},
}

// The variants of the throughput of many consumers.
var groupVariants = []variant{
	{name: "channels", label: "amqp091-go, a channel each", run: driverChannels, settles: true},
	{name: "group", label: "steadymq, a Group", run: steadyGroup, settles: true},
	{name: "one", label: "steadymq, one Consumer", run: steady, settles: true, one: true},
}

// The variants of the recovery benchmark.
var recoveryVariants = []variant{
	{name: "steadymq", label: "steadymq", run: steady},
	{name: "recovery", label: "amqp091-go, Config.Recovery", run: driverRecovery},
	{name: "loop", label: "reconnect loop on NotifyClose", run: reconnectLoop},
}

func findVariant(in []variant, name string) (variant, bool) {
	for _, v := range in {
		if v.name == name {
			return v, true
		}
	}
	return variant{}, false
}

type ackMode int

const (
	ackEach ackMode = iota
	ackMultiple
	ackAuto
)

// plainDriver is the consumer of the driver's own examples: workers range over
// the channel of deliveries.
func plainDriver(mode ackMode) consumeFunc {
	return func(ctx context.Context, t target, each func([]byte)) error {
		conn, err := amqp.DialConfig(t.URL, amqp.Config{TLSClientConfig: t.TLS, Locale: "en_US"})
		if err != nil {
			return err
		}
		defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
		deliveries, err := subscribe(conn, t, mode == ackAuto)
		if err != nil {
			return err
		}
		work(deliveries, t.Workers, acknowledge(mode, t.Prefetch), each)
		if ctx.Err() != nil {
			return nil
		}
		return errors.New("the driver's deliveries ended")
	}
}

func subscribe(conn *amqp.Connection, t target, autoAck bool) (<-chan amqp.Delivery, error) {
	ch, err := conn.Channel()
	if err != nil {
		return nil, err
	}
	if err := ch.Qos(t.Prefetch, 0, false); err != nil {
		return nil, err
	}
	return ch.Consume(t.Queue, "", autoAck, false, false, false, nil)
}

// work handles deliveries until their channel is closed. An ack that fails is
// not looked at: the channel of deliveries then closes.
func work(deliveries <-chan amqp.Delivery, workers int, ack func(amqp.Delivery), each func([]byte)) {
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for d := range deliveries {
				each(d.Body)
				ack(d)
			}
		})
	}
	wg.Wait()
}

func acknowledge(mode ackMode, prefetch int) func(amqp.Delivery) {
	switch mode {
	case ackMultiple:
		return ackEvery(min(100, max(1, prefetch/2)))
	case ackAuto:
		return func(amqp.Delivery) {}
	default:
		return func(d amqp.Delivery) { _ = d.Ack(false) }
	}
}

// ackEvery acknowledges n messages at a time. With more than one worker it
// also acknowledges what another worker still has in hand: no program should,
// but it is the upper bound of what sharing acks can bring.
func ackEvery(n int) func(amqp.Delivery) {
	var (
		mu     sync.Mutex
		count  int
		newest amqp.Delivery
	)
	return func(d amqp.Delivery) {
		mu.Lock()
		defer mu.Unlock()
		if d.DeliveryTag > newest.DeliveryTag {
			newest = d
		}
		if count++; count%n == 0 {
			_ = newest.Ack(true)
		}
	}
}

// driverRecovery is the driver healing itself, with its defaults.
func driverRecovery(ctx context.Context, t target, each func([]byte)) error {
	conn, err := amqp.DialConfig(t.URL, amqp.Config{Locale: "en_US", Recovery: &amqp.Recovery{}})
	if err != nil {
		return err
	}
	// Close can hang while the driver recovers; the process ends soon anyway.
	defer func() { go func() { _ = conn.Close() }() }()
	deliveries, err := subscribe(conn, t, false)
	if err != nil {
		return err
	}
	go work(deliveries, t.Workers, acknowledge(ackEach, t.Prefetch), each)
	<-ctx.Done()
	return nil
}

// loopDelay is how long the reconnect loop sleeps, as such loops commonly do.
const loopDelay = 5 * time.Second

// reconnectLoop is the consumer that many services run: it waits for the
// connection to close, sleeps, and dials again. It watches nothing else.
func reconnectLoop(ctx context.Context, t target, each func([]byte)) error {
	for ctx.Err() == nil {
		if err := consumeUntilClosed(ctx, t, each); err == nil {
			return nil
		}
		select {
		case <-time.After(loopDelay):
		case <-ctx.Done():
		}
	}
	return nil
}

func consumeUntilClosed(ctx context.Context, t target, each func([]byte)) error {
	conn, err := amqp.Dial(t.URL)
	if err != nil {
		return err
	}
	defer func() { go func() { _ = conn.Close() }() }()
	closed := conn.NotifyClose(make(chan *amqp.Error, 1))
	deliveries, err := subscribe(conn, t, false)
	if err != nil {
		return err
	}
	go work(deliveries, t.Workers, acknowledge(ackEach, t.Prefetch), each)
	select {
	case err := <-closed:
		if err == nil {
			return amqp.ErrClosed
		}
		return err
	case <-ctx.Done():
		return nil
	}
}
