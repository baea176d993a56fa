package main

import (
	"context"
	"strconv"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// publisher sends numbered messages, each confirmed by the broker before the
// next, and sends again what was not.
type publisher struct {
	url     string
	conn    *amqp.Connection
	channel *amqp.Channel
	quit    chan struct{}
	done    chan int
}

func (d *demo) publisher() (*publisher, error) {
	p := &publisher{url: d.url, quit: make(chan struct{}), done: make(chan int, 1)}
	return p, p.connect()
}

func (p *publisher) connect() error {
	conn, err := amqp.Dial(p.url)
	if err != nil {
		return err
	}
	p.conn = conn
	if p.channel, err = p.conn.Channel(); err != nil {
		return err
	}
	if _, err = p.channel.QueueDeclare(queue, true, false, false, false, amqp.Table{"x-queue-type": "classic"}); err != nil {
		return err
	}
	return p.channel.Confirm(false)
}

// run publishes until stop.
func (p *publisher) run() {
	tick := time.NewTicker(rate)
	defer tick.Stop()
	for n := 0; ; {
		select {
		case <-p.quit:
			_ = p.conn.Close()
			p.done <- n
			return
		case <-tick.C:
		}
		if p.publish(n) {
			n++
			continue
		}
		_ = p.conn.Close()
		_ = p.connect() // the next tick tries again
	}
}

func (p *publisher) publish(n int) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	confirm, err := p.channel.PublishWithDeferredConfirmWithContext(ctx, "", queue, true, false,
		amqp.Publishing{MessageId: strconv.Itoa(n), DeliveryMode: amqp.Persistent, Body: []byte("demo")})
	if err != nil {
		return false
	}
	acked, err := confirm.WaitContext(ctx)
	return err == nil && acked
}

// stop returns how many messages the broker has confirmed.
func (p *publisher) stop() int {
	close(p.quit)
	return <-p.done
}
