package steadymq

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Option configures a Consumer. Options are checked by New; a later option
// overrides an earlier one of the same name.
type Option func(*config)

// WithConcurrency sets how many handlers run at once, across reconnects too.
// Default 1, which also starts handlers in the order of a session's deliveries; a
// message that failed comes later than those behind it. Range 1 to 65535.
func WithConcurrency(n int) Option {
	return func(c *config) { c.concurrency = n; c.count("WithConcurrency", n) }
}

// WithPrefetch sets how many unsettled messages the broker may send ahead
// (basic.qos, per consumer). Default 32, or the concurrency where that is
// higher. Range: from the concurrency to 65535. 0 would mean "no limit" to a
// broker and the whole queue in memory here, and is refused.
//
// It is also the most messages that can be delivered twice when a session is
// lost. Up to RabbitMQ 4.2 each of them counts towards a quorum queue's delivery
// limit (20 since RabbitMQ 4.0), also those no handler has seen, and so it is when a
// consumer stops in order: 21 restarts while the same messages are prefetched, and
// the broker drops them. Keep it small there, or set x-delivery-limit. Since 4.3 only
// failures count.
//
// What is prefetched here no other consumer gets: two consumers with slow work share
// the queue prefetch by prefetch, and one may be idle while the other has a prefetch
// to do. The last prefetched message waits prefetch/concurrency handlers long; keep
// that below half the broker's consumer timeout
// (https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout), or it is logged,
// once in a Run.
func WithPrefetch(n int) Option {
	return func(c *config) { c.prefetch = n; c.set["WithPrefetch"] = true; c.count("WithPrefetch", n) }
}

// WithBackoff sets the pace of retries: the wait before try n of a row of
// failures is drawn from [0, min(limit, initial*2^n)]. Default 250 ms and 10 s.
// The first retry of a healthy session is always at once (within 20 ms), and so is
// the first try of another host. Some failures have a pace of their own: while dials
// are refused, which costs the broker nothing, the limit is at most 1 s; a queue that
// does not exist is asked for after 1 s, then up to 5 s; what an operator has to mend
// is tried again after 1 s, then up to 30 s; what is locked every 0.5 to 1 s, for as
// long as the broker may need to notice that its owner is gone. No wait exceeds a limit
// given here. initial: 1 ms to limit; limit: up to 24 h. For fleets choose a limit
// of at least (number of consumers)/100 seconds.
func WithBackoff(initial, limit time.Duration) Option {
	return func(c *config) {
		c.retryInitial, c.retryCap = initial, limit
		c.set["WithBackoff"] = true
		c.duration("WithBackoff", initial)
		c.duration("WithBackoff", limit)
		if limit < initial {
			c.refuse("WithBackoff", "the limit must not be below the initial wait, got %v and %v", initial, limit)
		}
	}
}

// WithFatal lets Run give up: it ends with the error for which fatal returns
// true, and with no other. fatal sees every *SessionError, the first connection
// included. It is called on a goroutine of its own, once at a time, and Run does not go
// on before it has returned; one that panics, or does not return within the setup limit,
// ends Run with an error that says so. Without it Run gives up only before the first
// session, see Run.
func WithFatal(fatal func(error) bool) Option {
	return func(c *config) {
		c.fatal = fatal
		if fatal == nil {
			c.refuse("WithFatal", "must not be nil; leave it out to retry for ever")
		}
	}
}

// WithHeartbeat sets the heartbeat interval asked of the broker, in whole
// seconds from 1 s to 10 min; the lower of the broker's and this one is used.
// Default 10 s, or the heartbeat parameter of the URL dialled. A silent peer is noticed
// within 1.5 intervals. Below 5 s a busy network raises false alarms
// (https://www.rabbitmq.com/docs/heartbeats#false-positives).
func WithHeartbeat(d time.Duration) Option {
	return func(c *config) {
		c.heartbeat = d
		c.set["WithHeartbeat"] = true
		if d < time.Second || d > 10*time.Minute || d%time.Second != 0 {
			c.refuse("WithHeartbeat", "must be whole seconds between 1s and 10m, got %v", d)
		}
	}
}

// WithDialTimeout bounds one TCP connect, name resolution included. Default 5 s, or the
// connection_timeout parameter of the URL dialled, in milliseconds; range 1 ms to 24 h.
// WithSetupTimeout bounds it as well.
func WithDialTimeout(d time.Duration) Option {
	return func(c *config) { c.dialTimeout = d; c.set["WithDialTimeout"] = true; c.duration("WithDialTimeout", d) }
}

// WithSetupTimeout bounds a whole try, from dial to the broker's consume-ok,
// topology included. Past it the socket is closed, once no other session lives there.
// Default 15 s, which leaves a broker its own 10 s of handshake and 3 s of silence after
// a wrong password; range 1 ms to 24 h.
//
// A try for a session on a connection that stands already may find deliveries in its
// way, which on a slow path take minutes: there the limit counts the silence after the
// last bytes of a delivery, and the try takes ten times the limit at most.
func WithSetupTimeout(d time.Duration) Option {
	return func(c *config) { c.setupTimeout = d; c.duration("WithSetupTimeout", d) }
}

// WithCloseTimeout bounds the orderly end of a session, and of its connection; past it
// the socket is closed under it. Default 5 s, range 1 ms to 24 h. For a session it counts
// the silence after the last bytes of a delivery, which may be in the way of the broker's
// answer, as long as the drain limit allows.
func WithCloseTimeout(d time.Duration) Option {
	return func(c *config) { c.closeTimeout = d; c.duration("WithCloseTimeout", d) }
}

// WithDrainTimeout bounds how long running handlers may take to finish once the
// consumer stops, or once the broker has cancelled it and handlers still hold
// deliveries of the old channel. Default 20 s, which with the close limit and a
// second more is less than the 30 s Kubernetes gives (terminationGracePeriodSeconds);
// range 1 ms to 24 h.
func WithDrainTimeout(d time.Duration) Option {
	return func(c *config) { c.drainTimeout = d; c.duration("WithDrainTimeout", d) }
}

// WithHandlerTimeout ends a handler's context after d with the cause
// ErrHandlerTimeout; what the handler then returns decides the outcome as ever. One
// that goes on all the same keeps its worker: it is logged, at most once a minute,
// and counted in Stats.Overdue.
// Off by default; range 1 ms to 24 h. Keep it below half the broker's consumer
// timeout (30 minutes by default), which would otherwise end the session.
func WithHandlerTimeout(d time.Duration) Option {
	return func(c *config) { c.handlerTimeout = d; c.duration("WithHandlerTimeout", d) }
}

// WithRequeueDelay sets how long a message whose handler returned a plain error is
// held, unsettled, before it goes back to the queue: first, then twice as long for
// every delivery the broker has counted (Delivery.Attempt), up to longest. Each hold
// is drawn from half to one and a half of that, and is never above longest. Default 1 s
// and 15 min, half of RabbitMQ's consumer timeout; range 1 ms to 24 h, and longest not
// below first. Classic queues count nothing, so there a hold is at most 3 times first.
// On a stream the message is not put back but tried again in place, with the same
// holds.
//
// It keeps a failing message from spinning between broker and consumer, and the
// default delivery limit of RabbitMQ (20 since 4.0) from being used up while a
// dependency is away: that takes two to three hours instead of 25 s.
//
// A held message occupies one place of the prefetch but no worker. Fewer failing
// messages than the prefetch do not stop the others; as many as the prefetch do, and
// one is enough on a stream, where nothing behind it is acked. From half of the
// prefetch on this is logged, and Stats.Held tells it. Return Discard for messages that
// can never succeed.
func WithRequeueDelay(first, longest time.Duration) Option {
	return func(c *config) {
		c.requeueFirst, c.requeueLongest = first, longest
		c.duration("WithRequeueDelay", first)
		c.duration("WithRequeueDelay", longest)
		if longest < first {
			c.refuse("WithRequeueDelay", "the longest hold must not be below the first, got %v and %v", longest, first)
		}
	}
}

// WithWriteDelay is the upper bound on how long an ack may wait for others to
// share its system call with. It waits only while more deliveries are at hand
// whose acks will follow and the broker has prefetch left; a lone ack leaves at
// once. Default 1 ms, range 0 to 100 ms; 0 shares only what piles up during
// another write.
func WithWriteDelay(d time.Duration) Option {
	return func(c *config) {
		c.writeDelay = d
		if d < 0 || d > maxWriteDelay {
			c.refuse("WithWriteDelay", "must be between 0 and %v, got %v", maxWriteDelay, d)
		}
	}
}

// WithMaxMessageSize gives no handler a message with a larger body, in bytes. None of
// the body is kept in memory, but all of it crosses the network. The session goes on;
// Hooks.Unreadable and a log line tell, and MessageError says what becomes of the
// message. It will come again, so set the limit well above what publishers may send and
// treat the hook as an alarm. A larger message that a TopologyFunc fetches (basic.get)
// ends the connection. Off by default (the broker's own max_message_size, 16 MiB since RabbitMQ 4.0,
// applies to publishers). Range: 1 and up.
func WithMaxMessageSize(bytes int64) Option {
	return func(c *config) {
		if bytes < 1 {
			c.refuse("WithMaxMessageSize", "must be at least 1 byte, got %d; leave it out for no limit", bytes)
			return
		}
		c.maxMessage = uint64(bytes)
	}
}

// WithTopology sets the function that declares what a session needs; see
// TopologyFunc. It takes the place of WithQueue.
func WithTopology(declare TopologyFunc) Option {
	return func(c *config) {
		c.topology = declare
		if declare == nil {
			c.refuse("WithTopology", "must not be nil; leave it out when the queue exists already")
		}
	}
}

// WithQueue declares the queue given to New, and what goes with it, before every
// session. Without WithQueue or WithTopology the queue must exist, and is waited
// for while it does not. q is copied, with all that it holds.
func WithQueue(q Queue) Option {
	return func(c *config) {
		own := q // New completes it
		c.declare = &own
	}
}

// WithConsumeArgs sets arguments of basic.consume, such as "x-priority",
// "x-consumer-timeout" or "x-stream-offset". The table is copied, with all that it
// holds.
//
// A stream is consumed like any queue, but must be named as one, by
// "x-stream-offset" here (first, last, next, a number, a time or an interval such as
// "1h") or by WithQueue: later sessions of the same Run then resume at the first
// message not yet settled, instead of skipping what was published while away. A
// stream has no requeue: a message put back is given to a handler again, see
// WithRequeueDelay. A number that the stream has not come to is waited for.
//
// The place is known before the first delivery, too: what is published once the
// consumer has said that it is consuming is not skipped, however its session ends.
// What next, last, an interval and a time of the last five minutes or to come stand
// for is therefore looked up before the first session of a Run, by consumers that the
// broker shows for a moment, that settle nothing and read the last chunk of the
// stream. RabbitMQ answers from its messages at once; where none has come after some
// 30 ms, as in an empty stream, or the look is cut off, the place is a time, five
// minutes earlier than it was here. Then a session that is lost before its first
// delivery is followed by one that may be given messages from five minutes before,
// and none is skipped as long as the clock here is at most five minutes fast. All of
// that is so on RabbitMQ 3.10, 4.0 and 4.3. Last is the last chunk, as RabbitMQ has it.
//
// Where the stream itself is found to be gone, the next one of its name is read
// from its beginning; one that others delete and declare anew within a moment, or
// while the consumer is away, looks like the old one: give it a new name. It is looked
// for where this consumer would declare it, by a passive declare, which needs the
// configure permission on RabbitMQ 4.3: without it, a new one looks like the old one.
func WithConsumeArgs(args amqp.Table) Option {
	return func(c *config) {
		c.consumeArgs = c.takeTable("WithConsumeArgs", "", args)
	}
}

// WithExclusive asks to be the queue's only consumer. While another one is
// there the broker refuses (403 "in exclusive use") and the library keeps trying.
func WithExclusive() Option {
	return func(c *config) { c.exclusive = true }
}

// WithConsumerTag sets the prefix of the consumer tags, which are what the
// broker's management page lists. Every subscription gets a tag of its own: the
// prefix, a random part, the number of the try and that of the session. Default "steadymq"; 1 to 200
// bytes.
func WithConsumerTag(prefix string) Option {
	return func(c *config) {
		c.tagPrefix = prefix
		if prefix == "" || len(prefix) > maxTagPrefix {
			c.refuse("WithConsumerTag", "must have 1 to %d bytes, got %d", maxTagPrefix, len(prefix))
			return
		}
		c.shortString("WithConsumerTag", "the tag", prefix)
	}
}

// WithConnectionName sets the name the broker's management page and logs show
// for the connection. Default: none. 1 to 255 bytes.
func WithConnectionName(name string) Option {
	return func(c *config) {
		c.connectionName = name
		if name == "" || len(name) > 255 {
			c.refuse("WithConnectionName", "must have 1 to 255 bytes, got %d", len(name))
		}
	}
}

// WithURLs adds hosts of the same cluster to the URL given to New. The last good
// one is tried first, then the others in random order; one that refused, fell
// silent, said that it shuts down, showed a certificate that is not trusted or
// does not speak AMQP goes last for a minute.
func WithURLs(urls ...string) Option {
	return func(c *config) {
		c.urls = append(c.urls[:1:1], urls...)
		if len(urls) == 0 {
			c.refuse("WithURLs", "needs at least one URL")
		}
	}
}

// WithURLFunc asks f for the URL before every dial, for credentials that rotate
// or hosts that move. It takes the place of the URL given to New, which may then
// be "". ctx ends with the setup limit; an error is retried like a failed dial
// and must not hold a secret, for it is logged. A URL that New would refuse is not
// dialled: so is amqp where WithTLSConfig is given. It is retried as slowly as what
// someone has to mend, every 1 to 30 s.
func WithURLFunc(f func(ctx context.Context) (string, error)) Option {
	return func(c *config) {
		c.urlFunc = f
		if f == nil {
			c.refuse("WithURLFunc", "must not be nil")
		}
	}
}

// WithTLSConfig sets the TLS configuration of amqps URLs. It is copied, with its root and
// own certificates: for those that change set GetClientCertificate or VerifyConnection. Its
// ServerName is filled per host if empty. TLS below 1.2 is refused.
// Without it the system's roots and the URL's own parameters (cacertfile,
// certfile, keyfile, server_name_indication) are used.
func WithTLSConfig(t *tls.Config) Option {
	return func(c *config) {
		c.tls = copyTLS(t)
		switch {
		case t == nil:
			c.refuse("WithTLSConfig", "must not be nil; leave it out for the system's roots")
		case t.MinVersion != 0 && t.MinVersion < tls.VersionTLS12,
			t.MaxVersion != 0 && t.MaxVersion < tls.VersionTLS12:
			c.refuse("WithTLSConfig", "TLS below 1.2 is refused; raise MinVersion and MaxVersion")
		}
	}
}

// WithSASL sets the login mechanisms, best first, in place of the URL's user and
// password: for example &amqp.ExternalAuth{} with client certificates. A mechanism is
// asked for its name and its response at every dial, concurrently by consumers
// that share it; one that panics or does not answer within the set-up limit is a
// failed try.
func WithSASL(mechanisms ...amqp.Authentication) Option {
	return func(c *config) {
		c.sasl = slices.Clone(mechanisms)
		if len(mechanisms) == 0 {
			c.refuse("WithSASL", "needs at least one mechanism")
		}
		for _, m := range mechanisms {
			if isNil(m) {
				c.refuse("WithSASL", "a mechanism is nil, or a nil pointer")
			}
		}
	}
}

// WithCredentials asks f for user name and password before every dial, in place
// of those in the URL: for passwords that rotate and tokens that expire. If they
// expire, f is asked again at 70 % of their life and the broker is told
// (connection.update-secret, https://www.rabbitmq.com/docs/oauth2#token-expiration),
// so the connection stays up; where that fails, again in 70 % of what is left, later
// after 1 s and up to 30 s. ctx ends with the setup limit; an error is retried
// like a failed login and must not hold a secret, for it is logged. f is called by
// one goroutine at a time per connection.
func WithCredentials(f func(ctx context.Context) (Credentials, error)) Option {
	return func(c *config) {
		c.credentials = f
		if f == nil {
			c.refuse("WithCredentials", "must not be nil")
		}
	}
}

// WithStallDetector looks for a consumer that is alive on paper only: for the given
// time no byte of a delivery came and nothing was settled, although the prefetch is not
// full. It then asks the queue, by a passive declare on a channel of its own, which
// needs the configure permission on RabbitMQ 4.3. The silence is a stall if one of
// these is so, and is so still up to 5 s later:
//
//   - The queue has messages and this consumer is its only one (a quorum queue
//     without majority), or it knows of no consumer at all (a forgotten one).
//   - It is a stream, and has grown since the last look; not as long as it may be
//     shorter than a number that x-stream-offset begins at.
//   - Most of all hosts, three or more being given, say that messages wait for this
//     consumer, or that the stream is longer (this host is cut off). They are asked
//     over a connection for one question each, not counted in [Stats].
//   - The queue does not answer within the setup limit. Here that counts the silence
//     after the last bytes of a delivery, which may be in the way of the answer, and is
//     over after ten times as long in any case.
//
// Then the session is lost with a cause that says so, and its connection is given up:
// the next one is opened to another host if there is one, and behind one URL (a load
// balancer) or WithURLFunc wherever that leads. From the start of the silence that
// takes at most twice the given time and 5 s, on a stream three times, plus the time
// the answers take.
//
// If the broker does not let it ask, or the connection has no channel left (channel_max),
// it notices nothing; a warning says so, once in a Run.
//
// With other consumers on the queue silence is normal (single active consumer,
// priorities) and nothing is done. A quorum queue counts only its active consumer:
// where x-single-active-consumer is set, declare the queue by WithQueue so that this
// is known, or leave the detector out. Nor is it for a stream that the consumer does
// not know to be one, by WithQueue or x-stream-offset, or as long as that offset is
// ahead of the stream.
//
// What it cannot see: a leader that lost its majority answers from what it knew
// before. What is published through it since is in no queue and not confirmed until
// the majority is back (seen on RabbitMQ 4.0 and 4.3: "0 messages, 1 consumer"), so
// the consumer of a queue that was empty waits for that, and nothing tells. With one
// or two hosts nothing tells what the other side of a partition has, either, nor with
// one URL of a load balancer or WithURLFunc: whom to ask is not known. No
// session, old or new, gets messages from a queue without majority: replacing it
// helps where another host has one.
//
// Off by default; a good value is 1 minute, range 1 s to 24 h.
func WithStallDetector(after time.Duration) Option {
	return func(c *config) {
		c.stallAfter = after
		if after < time.Second || after > maxDuration {
			c.refuse("WithStallDetector", "must be between 1s and %v, got %v", maxDuration, after)
		}
	}
}

// WithInsecureSkipVerify switches the verification of the broker's certificate off, as
// InsecureSkipVerify of a tls.Config does, which New refuses without this option: anyone on the
// path can then read the password. For tests. New refuses it for amqp URLs, which have no TLS.
func WithInsecureSkipVerify() Option {
	return func(c *config) { c.insecure = true }
}

// WithDialer replaces the TCP dial, with net.Dialer.DialContext's signature: for
// proxies, tunnels and tests (steadymqtest.Broker.Dialer). TLS is done on top of
// what it returns. A connection that it returns together with an error is closed. The default dialer sets keep-alive and, on Linux,
// TCP_USER_TIMEOUT; a dialer of your own should too.
func WithDialer(dial func(ctx context.Context, network, address string) (net.Conn, error)) Option {
	return func(c *config) {
		c.dial = dial
		if dial == nil {
			c.refuse("WithDialer", "must not be nil")
		}
	}
}

// WithMiddleware wraps the handler; given several times they add up. The wrapping is done at the
// beginning of Run, within the setup limit.
func WithMiddleware(m ...Middleware) Option {
	return func(c *config) {
		for _, f := range m {
			if f == nil {
				c.refuse("WithMiddleware", "must not be nil")
			}
		}
		c.middleware = append(c.middleware, m...)
	}
}

// WithLogger sets where the library logs. Default slog.Default(), as it is when Run
// begins. For silence give slog.New(slog.DiscardHandler).
//
// Each change of state is one line, with queue and consumer tag: WARN for a failure,
// ERROR when Run gives up, else INFO. A failure whose cause repeats is told at its 1st, 2nd,
// 4th, 8th ... time and at least every minute, with the count (repeated), every 90 s where it
// ends sessions that have just begun to consume. Once such a failure was told, "consuming" is told
// as well, with how long the consumer was away (down): at once, or after 2 s (up) where the session
// before had not lasted that long. A new cause is told at once; where causes change all the
// time, the log tells 12 of them and then one every 5 minutes, beside the one a minute. Causes
// that differ in the host, an IP address or a number of more than three digits are one. What is
// left out, and the tries, are DEBUG. Counting starts anew once a session has lasted 10 minutes. An
// hour of any outage is at most 100 lines of INFO and above.
//
// What handlers return is told at WARN, a panic with its stack at ERROR: at most one
// line a second, less often if it goes on and at least every minute, with the count of
// those left out (suppressed). Hooks.HandlerFailed is told of all. Durations are texts, as 1.5s.
func WithLogger(logger *slog.Logger) Option {
	return func(c *config) {
		c.logger = logger
		if logger == nil {
			c.refuse("WithLogger", "must not be nil; use slog.New(slog.DiscardHandler) for silence")
		}
	}
}

// WithHooks sets the functions that are told what happens; see Hooks.
func WithHooks(hooks Hooks) Option {
	return func(c *config) {
		c.hooks = hooks
		if hooks.StateChanged == nil && hooks.HandlerFailed == nil && hooks.Unreadable == nil && hooks.Settled == nil {
			c.refuse("WithHooks", "all hooks are nil; set at least one or leave the option out")
		}
	}
}

// build applies the options and checks what they say together.
func build(url, queue string, opts []Option) (*config, error) {
	c := defaults(url, queue)
	for i, opt := range opts {
		if opt == nil {
			c.refuse("New", "option %d is nil", i+1)
			continue
		}
		opt(c)
	}
	c.checkURLs()
	c.checkQueue()
	c.checkTogether()
	return c, errors.Join(c.problems...)
}
