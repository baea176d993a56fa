package steadymq

import (
	"context"
	"math"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// How a session finds its position in a stream that it has not consumed from yet: what offsets such
// as next, last or 1h stand for, and whether the stream still exists. subscribe and topology call
// it, within the set-up of a session; stream.go remembers the result.

// locate finds out, before the first subscription, which message a shifting offset stands for. No
// method of AMQP 0-9-1 says so: the count of a passive declare is up to 5 s old (RabbitMQ 3.10, 4.0
// and 4.3), and does not count what the stream has dropped. But each message of a stream carries
// its offset, and stays in place when the channel that has consumed it is closed. From the first
// basic.consume on there is a position to resume at; until a message gives it, it is a time.
func (s *session) locate(ctx context.Context, offset any) error {
	s.forget() // the consumers of a lookup are not the session's, and have tags of their own
	s.tag += lookupSuffix
	s.receive()
	if _, text := offset.(string); offset == "next" || !text && shifts(offset, time.Now()) {
		return s.locateEnd(ctx, offset)
	}
	if err := s.channel.Qos(1, 0, false); err != nil {
		return err
	}
	since := time.Now()
	answered := s.streamPosition().assume(since.Add(-interval(offset)))
	if err := answered(s.sample(offset)); err != nil {
		return err
	}
	first, err := s.awaitSample(ctx, time.Since(since))
	if first != nil {
		s.streamPosition().locate(offsetOf(first))
	}
	return err
}

// What a stream holds arrives within a few milliseconds after consume-ok, and a broker does not say
// that a stream holds nothing. So the wait for a first message is this long, plus this many times
// as long as consume-ok took.
const (
	locateWait  = 25 * time.Millisecond
	locateTrips = 4
)

// locateEnd finds the position after the last message: the offset of the first message that a
// consumer of that offset is given or, if none comes, the offset after the messages that exist
// already.
func (s *session) locateEnd(ctx context.Context, offset any) error {
	if err := s.channel.Qos(math.MaxUint16, 0, false); err != nil {
		return err
	}
	since := time.Now()
	answered := s.streamPosition().assume(since)
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
	// The order matters: a message that the sample has, and that came after the other consumer
	// began, was delivered to that consumer, too. What the broker has sent is here before its
	// answer.
	_ = s.channel.Cancel(s.tag, true)
	if err := s.channel.Cancel(s.tag+listenerSuffix, false); err != nil {
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
		s.streamPosition().locate(next)
	} else if end != unknownOffset {
		s.streamPosition().locate(end + 1)
	}
	return nil
}

// sample consumes messages to learn their offsets. They come by the session's subscription, which
// can read whatever a broker sends.
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
	case d := <-s.inbox.next():
		return d, nil
	case <-s.aside.more: // a message that cannot be read
	case <-limit.C:
	case <-s.cancels:
		s.streamPosition().doubt()
		return nil, errCancelled
	case said := <-s.channelEnd.closes:
		s.channelEnd.record(said)
		return nil, amqp.ErrClosed
	case <-s.conn.end.Done():
		return nil, amqp.ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return nil, nil
}

// cancelled reports whether the broker has cancelled one of the two consumers.
func (s *session) cancelled() bool {
	select {
	case <-s.cancels:
		s.streamPosition().doubt()
		return true
	default:
		return false
	}
}

// The consumers of a lookup add these to the tag of the session: all of them the first, and the
// second consumer on the same channel the other one, too.
const (
	lookupSuffix   = ".look"
	listenerSuffix = ".next"
)

// listen consumes from an offset at the end of the stream. It returns the offset of the first
// message, on a channel that is closed without a value if nothing came before the consumer was
// cancelled.
func (s *session) listen(offset any) (first <-chan int64, err error) {
	args := amqp.Table{}
	if offset != nil {
		args[offsetKey] = offset
	}
	deliveries, err := s.channel.Consume(s.queue, s.tag+listenerSuffix, false, false, false, false, args)
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

// A busy broker may cancel the consumers of a stream that is deleted a moment before the stream is
// gone. So after a cancel checkStream asks again and again: for streamDoubt, and for half of the
// setup limit at most.
const (
	streamDoubt   = 2 * time.Second
	streamRecheck = 20 * time.Millisecond
)

// checkStream asks whether the stream still exists, before it is declared: after that a new stream
// looks like the old one. If it does not exist, or if the question is not allowed, the broker
// closes the channel, and the session needs another one.
func (s *session) checkStream(ctx context.Context) error {
	if s.streamPosition() == nil || s.declaration.streamChecked {
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
			if noQueue(s.channelCause(err), queue) {
				s.streamPosition().startOver()
			}
			return &freshChannelError{streamChecked: true}
		case !doubted, time.Since(since) >= min(streamDoubt, s.config.setupTimeout/2):
			return nil
		}
		if err := sleep(ctx, streamRecheck); err != nil {
			return err
		}
	}
}

// sleep waits for d, or returns why ctx has ended.
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
