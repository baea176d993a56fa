package steadymq

import (
	"errors"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// errStalled is the cause of a session that WithStallDetector ended.
var errStalled = errors.New("stalled")

// probe looks for the consumer that is alive on paper: heartbeats pass, consume-ok
// was said, and nothing comes although the queue has messages. It runs as long as
// the session.
func (s *session) probe() {
	defer close(s.probed)
	tick := time.NewTicker(s.config.stallAfter)
	defer tick.Stop()
	seen := s.received.Load()
	for {
		select {
		case <-tick.C:
		case <-s.ended.ended:
			return
		}
		if now := s.received.Load(); now != seen || s.gate.inside() >= s.config.prefetch {
			seen = now
			continue
		}
		if err := s.stalled(); err != nil {
			s.broken.notify(err)
			return
		}
	}
}

// singleActive tells whether the queue is known to have a single active consumer.
// A quorum queue counts only that one, so we may be behind it.
func (c *config) singleActive() bool {
	return c.declare != nil && c.declare.Args["x-single-active-consumer"] == true
}

// stalled asks the queue. Only when it has messages and no consumer but this one,
// or does not know this one, is silence a stall: behind a single active consumer,
// or one of higher priority, it is normal.
func (s *session) stalled() error {
	kill := time.AfterFunc(s.config.setupTimeout, func() {
		s.conn.socket.kill(fmt.Errorf("%w: nothing delivered for %v and the queue does not answer", errStalled, s.config.stallAfter))
	})
	defer kill.Stop()
	channel, err := s.conn.amqp.Channel()
	if err != nil {
		return nil // the connection is ending, or full; its own end tells
	}
	defer channel.Close() //nolint:errcheck // a failed declare has closed it already
	q, err := channel.QueueDeclarePassive(s.queue, true, false, false, false, amqp.Table{})
	switch {
	case err != nil:
		return nil // not allowed, or gone: basic.cancel tells the latter
	case q.Consumers == 0:
		return fmt.Errorf("%w: nothing delivered for %v and the queue knows of no consumer", errStalled, s.config.stallAfter)
	case q.Consumers == 1 && q.Messages > 0 && !s.config.singleActive():
		return fmt.Errorf("%w: nothing delivered for %v though the queue has %d messages and this is its only consumer", errStalled, s.config.stallAfter, q.Messages)
	}
	return nil
}
