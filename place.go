package steadymq

import (
	"context"
	"math"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// What a stream holds is there within a few milliseconds after consume-ok, and one that holds
// nothing says nothing. It is waited for so long, and as many times as long as consume-ok took.
const (
	locateWait  = 25 * time.Millisecond
	locateTrips = 4
)

// locate finds out before the first subscription which message an offset that shifts stands for.
// No method of AMQP 0-9-1 tells: what a passive declare counts is up to 5 s old (RabbitMQ 3.10, 4.0
// and 4.3), and does not tell what a stream has given up. But each message of a stream has its
// offset, and stays where it is when the channel that has consumed it is closed. From the first
// basic.consume on there is a place to resume at; until the messages tell, it is one by the clock.
func (s *session) locate(ctx context.Context, offset any) error {
	s.forget() // these consumers are none of the session's, and are told apart by their tags
	s.tag += looker
	s.receive()
	if _, text := offset.(string); offset == "next" || !text && shifts(offset, time.Now()) {
		return s.locateEnd(ctx, offset)
	}
	if err := s.channel.Qos(1, 0, false); err != nil {
		return err
	}
	since := time.Now()
	answered := s.place().assume(since.Add(-interval(offset)))
	if err := answered(s.sample(offset)); err != nil {
		return err
	}
	first, err := s.awaitSample(ctx, time.Since(since))
	if first != nil {
		s.place().locate(offsetOf(first))
	}
	return err
}

// locateEnd finds the place behind the last message: what a consumer of that offset is given, or
// else what follows the messages that are there already.
func (s *session) locateEnd(ctx context.Context, offset any) error {
	if err := s.channel.Qos(math.MaxUint16, 0, false); err != nil {
		return err
	}
	since := time.Now()
	answered := s.place().assume(since)
	behind, err := s.listen(offset)
	if answered(err) != nil {
		return err
	}
	since = time.Now()
	if err := s.sample("last"); err != nil {
		return err
	}
	first, err := s.awaitSample(ctx, time.Since(since))
	if err != nil {
		return err
	}
	// In this order: whatever the sample has that came after the consumer of the end began, that
	// one has too. What the broker has sent is here before it answers.
	_ = s.channel.Cancel(s.tag, true)
	if err := s.channel.Cancel(s.tag+listener, false); err != nil {
		return err
	}
	if s.cancelled() {
		return errCancelled
	}
	s.inbox.close()
	end := int64(unknownOffset)
	if first != nil {
		end = offsetOf(first)
	}
	for _, d := range s.inbox.clear() {
		end = max(end, offsetOf(d))
	}
	if next, ok := <-behind; ok {
		s.place().locate(next)
	} else if end != unknownOffset {
		s.place().locate(end + 1)
	}
	return nil
}

// sample consumes messages to see where they stand; they come by the lane, which reads whatever a
// broker may send.
func (s *session) sample(offset any) error {
	args := amqp.Table{offsetKey: offset}
	_, err := s.channel.Consume(s.queue, s.tag, false, false, false, false, args)
	return err
}

// awaitSample returns the first message of the sample, nil if none comes.
func (s *session) awaitSample(ctx context.Context, trip time.Duration) (*Delivery, error) {
	limit := time.NewTimer(locateWait + locateTrips*trip)
	defer limit.Stop()
	select {
	case d := <-s.inbox.next:
		return d, nil
	case <-s.aside.more: // one that cannot be read
	case <-limit.C:
	case <-s.cancels:
		s.place().doubt()
		return nil, errCancelled
	case <-s.channelEnd.Done():
		return nil, amqp.ErrClosed
	case <-s.conn.end.Done():
		return nil, amqp.ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return nil, nil
}

// cancelled tells whether the broker has cancelled one of the two consumers by itself.
func (s *session) cancelled() bool {
	select {
	case <-s.cancels:
		s.place().doubt()
		return true
	default:
		return false
	}
}

// What the consumers of a look add to the tag: all of them, and the second on its channel.
const (
	looker   = ".look"
	listener = ".next"
)

// listen consumes from an offset at the end of the stream, and returns that of the first message
// once the consumer has been cancelled. There is none if nothing came.
func (s *session) listen(offset any) (first <-chan int64, err error) {
	args := amqp.Table{}
	if offset != nil {
		args[offsetKey] = offset
	}
	deliveries, err := s.channel.Consume(s.queue, s.tag+listener, false, false, false, false, args)
	if err != nil {
		return nil, err
	}
	got := make(chan int64, 1)
	go func() {
		defer close(got)
		for d := range deliveries {
			if at, ok := headerInt(d.Headers[offsetKey]); ok && len(got) == 0 {
				got <- at
			}
		}
	}()
	return got, nil
}

// A busy broker may cancel the consumers of a stream that is deleted a moment
// before it forgets the stream, so after a cancel it is looked for again and
// again: as long as streamDoubt, at most half of the setup limit.
const (
	streamDoubt = 2 * time.Second
	streamLook  = 20 * time.Millisecond
)

// checkStream looks whether the stream is there still, before it is declared:
// afterwards a new one looks like the old one. The broker closes the channel if it is
// not, or if the question is not allowed: then the session needs another one.
func (s *session) checkStream(ctx context.Context) error {
	if s.place() == nil || s.terms.looked {
		return nil
	}
	s.stream.mu.Lock()
	queue, fresh, doubted := s.stream.queue, s.stream.fresh(), s.stream.doubted
	s.stream.mu.Unlock()
	declares := s.config.topology != nil || s.config.declare != nil
	if fresh || !declares && !doubted {
		return nil
	}
	for since := time.Now(); ; {
		_, err := s.channel.QueueDeclarePassive(queue, true, false, false, false, amqp.Table{})
		switch {
		case err != nil:
			if noQueue(s.saidByBroker(err), queue) {
				s.place().startOver()
			}
			return &freshChannelError{looked: true}
		case !doubted, time.Since(since) >= min(streamDoubt, s.config.setupTimeout/2):
			return nil
		}
		if err := sleep(ctx, streamLook); err != nil {
			return err
		}
	}
}

// sleep waits, or returns why ctx has ended.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return causeOf(ctx)
	}
}
