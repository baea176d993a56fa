package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// wish is what the flags ask for.
type wish struct {
	park, queue, text, kind string
	limit                   int
	older                   time.Duration
	dryRun                  bool
}

// matches reports whether a parked message is one of those that are to go back.
func (w wish) matches(d amqp.Delivery) bool {
	queue, _ := d.Headers["steadymq-queue"].(string)
	text, _ := d.Headers["steadymq-error"].(string)
	kind, _ := d.Headers["steadymq-error-type"].(string)
	at, _ := d.Headers["steadymq-time"].(time.Time)
	return queue != "" && queue != w.park && (w.queue == "" || queue == w.queue) &&
		strings.Contains(text, w.text) &&
		(w.kind == "" || kind == w.kind) &&
		(w.older == 0 || !at.IsZero() && time.Since(at) > w.older)
}

// cause is why a message was parked. Numbers in the text are left out, or each order would be a cause
// of its own.
type cause struct{ queue, kind, text string }

var number = regexp.MustCompile(`[0-9]+`)

func causeOf(d amqp.Delivery) cause {
	var c cause
	c.queue, _ = d.Headers["steadymq-queue"].(string)
	c.kind, _ = d.Headers["steadymq-error-type"].(string)
	c.text, _ = d.Headers["steadymq-error"].(string)
	c.text = number.ReplaceAllString(c.text, "#")
	return c
}

// patience is how long a confirm may take.
const patience = 30 * time.Second

// mover takes messages out of one queue, and publishes them to others.
type mover struct {
	wish
	conn     *amqp.Connection
	channel  *amqp.Channel
	returned chan amqp.Return
	blocked  chan amqp.Blocking
	found    *findings
}

// unpark does what is wished for, and closes the connection. Messages that stay go back to their
// places with the end of the channel.
func unpark(ctx context.Context, conn *amqp.Connection, w wish) (*findings, error) {
	m := &mover{wish: w, conn: conn, found: newFindings(), blocked: conn.NotifyBlocked(make(chan amqp.Blocking, 8))}
	err := m.open()
	if err == nil {
		err = m.moveAll(ctx)
	}
	if unproved := m.close(); unproved != nil && err == nil && m.found.moved() > 0 {
		err = fmt.Errorf("the broker has not told that it has all acks, so the last messages may be in both queues: %w", unproved)
	}
	return m.found, err
}

// close returns nil if the broker has answered: then it has all acks. The driver's own limit is not
// enough, since every heartbeat of the broker puts it off.
func (m *mover) close() error {
	closed := make(chan error, 1)
	go func() { closed <- m.conn.Close() }()
	limit := time.NewTimer(patience / 3)
	defer limit.Stop()
	select {
	case err := <-closed:
		return err
	case <-limit.C:
		return fmt.Errorf("the connection has not closed within %v", patience/3)
	}
}

func (m *mover) open() (err error) {
	if m.channel, err = m.conn.Channel(); err != nil {
		return fmt.Errorf("open a channel: %w", err)
	}
	// One message at a time is under way, so there is never more than one return.
	m.returned = m.channel.NotifyReturn(make(chan amqp.Return, 1))
	if err := m.channel.Confirm(false); err != nil {
		return fmt.Errorf("ask for confirms: %w", err)
	}
	return nil
}

// moveAll takes each message once: as many as there are at first. So one that is moved, fails and is
// parked again meanwhile is not moved twice.
func (m *mover) moveAll(ctx context.Context) error {
	there, err := m.channel.QueueDeclarePassive(m.park, true, false, false, false, nil)
	if err != nil {
		return fmt.Errorf("look for the queue %q: %w", m.park, err)
	}
	for range there.Messages {
		if ctx.Err() != nil {
			return errors.New("interrupted; what was not moved stays parked")
		}
		d, ok, err := m.channel.Get(m.park, false)
		switch {
		case err != nil:
			return fmt.Errorf("take a message out of the queue %q: %w", m.park, err)
		case !ok:
			return nil
		}
		m.found.look(d)
		if !m.matches(d) {
			continue
		}
		if err := m.take(ctx, d); err != nil {
			return err
		}
		if m.limit > 0 && m.found.matched() == m.limit {
			return nil
		}
	}
	return nil
}

// take takes care of one message that matches. Its error ends the program.
func (m *mover) take(ctx context.Context, d amqp.Delivery) error {
	numbers := m.found.of(causeOf(d))
	numbers.matched++
	if m.dryRun {
		return nil
	}
	refused, err := m.move(d)
	switch {
	case err != nil:
		numbers.fail(err)
		return fmt.Errorf("%w; message %q may be in both queues", err, d.MessageId)
	case refused != nil:
		numbers.fail(refused)
		return nil
	}
	numbers.moved++
	return nil
}

// move publishes a message to its queue and acks it once it is there. refused says why it is not, and
// err why nobody knows.
func (m *mover) move(d amqp.Delivery) (refused, err error) {
	queue, _ := d.Headers["steadymq-queue"].(string)
	// The limit is not that of the context, since an interrupt does not cut a message in the middle.
	confirm, err := m.channel.PublishWithDeferredConfirm("", queue, true, false, message(d))
	if err != nil {
		return nil, fmt.Errorf("publish to the queue %q: %w", queue, err)
	}
	limit := time.NewTimer(patience)
	defer limit.Stop()
	select {
	case <-confirm.Done():
	case <-limit.C:
		return nil, m.unconfirmed(queue)
	}
	select {
	case r := <-m.returned: // the broker confirms what it returns, too, but after that
		return fmt.Errorf("%s: the queue %q does not exist", r.ReplyText, queue), nil
	default:
	}
	if !confirm.Acked() {
		if m.channel.IsClosed() {
			return nil, fmt.Errorf("the connection or channel was lost before the queue %q had confirmed", queue)
		}
		return fmt.Errorf("the queue %q takes no messages (basic.nack), it may be full", queue), nil
	}
	if err := d.Ack(false); err != nil {
		return nil, fmt.Errorf("ack in the queue %q: %w", m.park, err)
	}
	return nil, nil
}

func (m *mover) unconfirmed(queue string) error {
	alarm := ""
	for len(m.blocked) > 0 {
		if b := <-m.blocked; b.Active {
			alarm = b.Reason
		} else {
			alarm = ""
		}
	}
	if alarm != "" {
		return fmt.Errorf("the broker takes no messages now: %s", alarm)
	}
	return fmt.Errorf("the queue %q has not confirmed within %v", queue, patience)
}

// dropped are the headers that tell of the last failure. Queue, exchange and routing key stay: by
// them the handler sees what the message was published with.
var dropped = []string{"attempt", "error", "error-type", "time", "host", "consumer", "copy"}

// message is the parked message as it goes back. UserId and Expiration a parked message has not, and
// headers of brokers (x-delivery-count) would tell its consumer of the wrong queue.
func message(d amqp.Delivery) amqp.Publishing {
	headers := amqp.Table{}
	for name, value := range d.Headers {
		if !strings.HasPrefix(name, "x-") {
			headers[name] = value
		}
	}
	for _, name := range dropped {
		delete(headers, "steadymq-"+name)
	}
	return amqp.Publishing{
		Headers:         headers,
		ContentType:     d.ContentType,
		ContentEncoding: d.ContentEncoding,
		DeliveryMode:    d.DeliveryMode,
		Priority:        d.Priority,
		CorrelationId:   d.CorrelationId,
		ReplyTo:         d.ReplyTo,
		MessageId:       d.MessageId,
		Timestamp:       d.Timestamp,
		Type:            d.Type,
		AppId:           d.AppId,
		Body:            d.Body,
	}
}
