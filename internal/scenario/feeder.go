package scenario

import (
	"context"
	"errors"
	"math"
	"strconv"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Feeder publishes numbered messages with confirms over a connection of its own. Each number is
// published once: if its confirm is lost it is given up, because publishing it again would make a
// duplicate that is not the consumer's.
type Feeder struct {
	URL, Queue string
	Gap        time.Duration // between the messages of Start
	ledger     *Ledger
	next       int // owned by whoever publishes
	quit       context.CancelFunc
	wg         sync.WaitGroup
}

// NewFeeder publishes to a queue, and notes in the ledger what was confirmed.
func NewFeeder(url, queue string, l *Ledger) *Feeder {
	return &Feeder{URL: url, Queue: queue, Gap: 20 * time.Millisecond, ledger: l}
}

// Start publishes until Stop, and dials again whenever the connection ends.
func (f *Feeder) Start() {
	f.Stop()
	ctx, cancel := context.WithCancel(context.Background())
	f.quit = cancel
	f.wg.Go(func() {
		for ctx.Err() == nil {
			_ = f.Publish(ctx, math.MaxInt, f.Gap)
			retry := time.NewTimer(100 * time.Millisecond)
			select {
			case <-retry.C:
			case <-ctx.Done():
				retry.Stop()
			}
		}
	})
}

// Stop ends what Start has begun.
func (f *Feeder) Stop() {
	if f.quit != nil {
		f.quit()
	}
	f.wg.Wait()
}

// Publish sends the next n messages, each confirmed before the next, gap apart.
func (f *Feeder) Publish(ctx context.Context, n int, gap time.Duration) error {
	conn, err := amqp.DialConfig(f.URL, amqp.Config{Heartbeat: Heartbeat, Dial: amqp.DefaultDial(2 * time.Second)})
	if err != nil {
		return err
	}
	defer CloseWithin(conn, time.Second)
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := ch.Confirm(false); err != nil {
		return err
	}
	returned := ch.NotifyReturn(make(chan amqp.Return, 1))
	for range n {
		if err := f.one(ctx, ch, returned); err != nil {
			return err
		}
		select {
		case <-time.After(gap):
		case <-ctx.Done():
		}
	}
	return nil
}

// NextNumber takes the number of the next message, for a caller who publishes it himself.
func (f *Feeder) NextNumber() int {
	n := f.next
	f.next++
	return n
}

func (f *Feeder) one(ctx context.Context, ch *amqp.Channel, returned <-chan amqp.Return) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	number := f.NextNumber()
	text := strconv.Itoa(number)
	confirm, err := ch.PublishWithDeferredConfirmWithContext(ctx, "", f.Queue, true, false, amqp.Publishing{
		MessageId: text, Body: []byte(text), DeliveryMode: amqp.Persistent,
	})
	if err != nil {
		return err
	}
	ok, err := confirm.WaitContext(ctx)
	if err != nil || !ok {
		return errors.Join(err, errors.New("not confirmed"))
	}
	select {
	case <-returned: // confirmed and in no queue
		return errors.New("returned")
	default:
	}
	f.ledger.Confirm(number)
	return nil
}

// CloseWithin closes a connection whose broker may not answer.
func CloseWithin(conn *amqp.Connection, d time.Duration) { _ = conn.CloseDeadline(time.Now().Add(d)) }
