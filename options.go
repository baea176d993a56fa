package steadymq

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
)

// Option configures a Consumer. Options are checked by New; a later option
// overrides an earlier one of the same name.
type Option func(*config)

// Middleware wraps a handler. The first one given is the outermost. It may look
// at and replace the error, and with it the outcome.
type Middleware func(next Handler) Handler

// TopologyFunc declares what a session needs on the session's own channel and
// returns the queue to consume from; "" means the queue given to New. It runs
// for every session, on its fresh channel, so everything in it must be
// idempotent. ctx ends with the setup limit, which also ends what the function waits for
// on the channel, by closing the socket; while a cancelled session still lives on that
// connection, it closes with the last of its handlers. An error is retried like any failure of the setup; wrap the
// *amqp.Error of the channel with %w so that it can be classified.
//
// The channel is the session's: it must not be used after the function has returned, nor be
// consumed from, for nobody settles what is delivered there. A function that makes it
// transactional (Tx), which would keep every ack from taking effect, is refused, and so is the
// name of a queue that AMQP cannot carry. Confirm mode does no harm. Publish on a connection of
// your own: RabbitMQ stops reading one that has published while memory or disk run low, acks
// included.
//
// A queue that is exclusive, or that the broker names, lives as long as the
// connection, and a connection has many sessions: the next one is on the same
// connection unless that was lost. Let the function return the same name again, which
// a declare of an exclusive queue by name does. If it returns another name than before
// on the same connection, as one does that lets the broker name the queue, then the
// connection is replaced and the function called once more, on the new one: the queue
// from before would stay behind, bound and unread. What was in it is lost. Nor can it
// be known what a function has declared: a connection on which it has failed three
// times is replaced, for each time it may have left a queue behind, and so is one whose
// sessions fail three times within 30 s. [WithQueue] keeps an exclusive queue over all
// that, whoever names it.
type TopologyFunc func(ctx context.Context, ch *amqp.Channel) (queue string, err error)

// Queue is the common declare, for WithQueue. The zero value is a durable quorum
// queue, RabbitMQ's default for messages that must not get lost.
type Queue struct {
	// Type is "quorum" (default), "classic" or "stream".
	Type string
	// Transient makes the queue not survive a broker restart. Only for
	// exclusive classic queues: RabbitMQ 4.3 refuses shared transient queues.
	Transient bool
	// Exclusive limits the queue to this connection. It is gone with it, and what
	// is in it is lost. Only for classic queues. If New was given no name, the
	// broker names it.
	//
	// As long as the connection lives the next session consumes from the same
	// queue, under the same name, and misses nothing; if it is gone it is declared
	// anew at once. Failures of sessions do not replace the connection then. What
	// does is that it ends, that a set-up on it outlasts its limit, or a stall on it
	// (WithStallDetector): a queue that delivers nothing is given up, messages and all.
	Exclusive bool
	// AutoDelete deletes the queue when its last consumer leaves, and a session
	// that is lost is one: what is in it is lost then. Only for classic queues.
	AutoDelete bool
	// Exchange is declared before the queue, for Bindings that name no other.
	// nil: they name exchanges that exist already.
	Exchange *Exchange
	// Bindings are made after the declare.
	Bindings []Binding
	// DeadLetter is where messages go that the queue gives up: discarded ones,
	// those that expire or overflow, and those that the delivery limit takes.
	// nil: Args says so, or nowhere: they are gone. Not for streams.
	DeadLetter *DeadLetter
	// Args are further arguments of the declare, such as "x-delivery-limit"
	// or "x-message-ttl".
	//
	// Since 4.0 RabbitMQ drops a message of a quorum queue that has come back
	// more than 20 times. So a quorum queue that has no dead-letter exchange,
	// and no x-delivery-limit here, is declared with x-delivery-limit=-1 there:
	// no limit. Everybody else who declares that queue has to say the same, or
	// gets 406. A queue that was declared before with a limit is taken as it
	// is, with one warning per Run. Before 4.0 nothing is said, for there is no
	// limit, and -1 would drop a message at its first return.
	Args amqp.Table
}

// Exchange is the common declare of an exchange, for Queue.Exchange.
type Exchange struct {
	// Name of the exchange, 1 to 255 bytes.
	Name string
	// Kind is "direct" (default), "fanout", "topic", "headers" or that of a
	// plugin, which begins with "x-".
	Kind string
	// Transient makes the exchange not survive a broker restart.
	Transient bool
	// Args are further arguments of the declare, such as "alternate-exchange".
	Args amqp.Table
}

// DeadLetter is where a queue sends what it gives up: to a queue, or to an exchange.
type DeadLetter struct {
	// Queue is the name of a queue, reached through the default exchange. It is
	// declared before the queue itself: durable, a quorum queue without a
	// delivery limit where the queue is a quorum queue, else a classic one. If
	// it exists in another form it is taken as it is. Nothing consumes it
	// unless you do.
	//
	// A quorum queue that you declare yourself for dead letters should have
	// x-delivery-limit=-1 from RabbitMQ 4.0 on: since 4.3 a message arrives there
	// with the count of its old life, and beyond the limit its first return
	// drops it.
	Queue string
	// Exchange, in place of Queue, is an exchange that exists. "" is the default
	// exchange, which leads to the queue that Key names.
	Exchange string
	// Key is the routing key to it, in place of the message's own.
	Key string
}

// Binding binds the queue to an exchange.
type Binding struct {
	// Exchange is the name of an exchange that exists; "" is Queue.Exchange.
	Exchange string
	// Key is the routing key, or pattern on a topic exchange.
	Key string
	// Args are the arguments of the binding, for headers exchanges.
	Args amqp.Table
}

const (
	minDuration = time.Millisecond // below it a unit was forgotten
	maxDuration = 24 * time.Hour

	maxWriteDelay = 100 * time.Millisecond
	maxTagPrefix  = 200 // a consumer tag holds 255 bytes, the rest makes it unique
)

// config is everything New was told, checked and completed. It is behind a
// pointer wherever it is kept, so that no %+v prints its URLs.
type config struct {
	urls  []string
	queue string

	concurrency int
	prefetch    int

	retryInitial, retryCap time.Duration
	fatal                  func(error) bool

	heartbeat      time.Duration
	dialTimeout    time.Duration
	setupTimeout   time.Duration
	closeTimeout   time.Duration
	drainTimeout   time.Duration
	handlerTimeout time.Duration
	requeueFirst   time.Duration
	requeueLongest time.Duration
	writeDelay     time.Duration
	maxMessage     uint64
	stallAfter     time.Duration
	insecure       bool

	topology    TopologyFunc
	declare     *Queue
	consumeArgs amqp.Table
	exclusive   bool
	tagPrefix   string

	connectionName string
	urlFunc        func(context.Context) (string, error)
	tls            *tls.Config
	sasl           []amqp.Authentication
	credentials    func(context.Context) (Credentials, error)
	dial           wire.DialFunc

	middleware []Middleware
	logger     *slog.Logger
	hooks      Hooks

	set      map[string]bool // options given, where a default depends on it
	problems []error
}

func defaults(url, queue string) *config {
	return &config{
		urls:           []string{url},
		queue:          queue,
		concurrency:    1,
		prefetch:       32,
		retryInitial:   250 * time.Millisecond,
		retryCap:       10 * time.Second,
		heartbeat:      10 * time.Second,
		dialTimeout:    5 * time.Second,
		setupTimeout:   15 * time.Second,
		closeTimeout:   5 * time.Second,
		drainTimeout:   20 * time.Second,
		requeueFirst:   time.Second,
		requeueLongest: 15 * time.Minute,
		writeDelay:     time.Millisecond,
		tagPrefix:      "steadymq",
		set:            make(map[string]bool),
	}
}

func (c *config) refuse(option, format string, args ...any) {
	c.problems = append(c.problems, &OptionError{Option: option, Reason: fmt.Sprintf(format, args...)})
}

// duration checks that d lies in [minDuration, maxDuration].
func (c *config) duration(option string, d time.Duration) {
	if d < minDuration || d > maxDuration {
		c.refuse(option, "must be between %v and %v, got %v (a bare number counts nanoseconds: write 30*time.Second)", minDuration, maxDuration, d)
	}
}

func (c *config) count(option string, n int) {
	if n < 1 || n > 65535 {
		c.refuse(option, "must be between 1 and 65535, got %d", n)
	}
}

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

func (c *config) checkURLs() {
	if c.urlFunc != nil {
		if len(c.urls) > 1 {
			c.refuse("WithURLFunc", "cannot be combined with WithURLs; let the function choose the host")
		}
		return
	}
	for i, u := range c.urls {
		e, err := parseEndpoint(u)
		switch {
		case err != nil && i == 0:
			c.refuse("New", "%v", err)
			continue
		case err != nil:
			c.refuse("WithURLs", "URL %d: %v", i, err)
			continue
		}
		which := "the URL"
		if i > 0 {
			which = fmt.Sprintf("URL %d of WithURLs", i)
		}
		for _, problem := range c.contradicts(e, which) {
			c.problems = append(c.problems, problem)
		}
	}
}

// contradicts returns what the options make of a URL that is fine in itself. It shows none of it.
func (c *config) contradicts(e endpoint, which string) (problems []*OptionError) {
	refuse := func(option, reason string) {
		problems = append(problems, &OptionError{option, fmt.Sprintf(reason, which)})
	}
	u := e.uri
	if u.Scheme == "amqp" && c.tls != nil {
		refuse("WithTLSConfig", "%s has the scheme amqp, which is not encrypted; use amqps")
	}
	if u.Scheme == "amqp" && c.insecure {
		refuse("WithInsecureSkipVerify", "%s has the scheme amqp, which has no TLS and no certificate to verify; leave the option out, or use amqps")
	}
	if c.tls != nil && (u.CACertFile != "" || u.CertFile != "" || u.ServerName != "") {
		refuse("WithTLSConfig", "takes the place of cacertfile, certfile, keyfile and server_name_indication, but %s has some; use RootCAs, Certificates and ServerName of the configuration in their place")
	}
	if u.AuthMechanism != nil && c.sasl != nil {
		refuse("WithSASL", "takes the place of auth_mechanism, but %s has it; leave one of them out")
	}
	if u.AuthMechanism != nil && c.credentials != nil {
		refuse("WithCredentials", "logs in by the mechanism PLAIN, but %s has an auth_mechanism; leave that out")
	}
	return problems
}

// endpointOf reads a URL that WithURLFunc returned as New would.
func (c *config) endpointOf(text string) (endpoint, error) {
	e, err := parseEndpoint(text)
	if err != nil {
		return endpoint{}, err
	}
	for _, problem := range c.contradicts(e, "the URL") {
		return endpoint{}, &urlError{reason: problem.Option + ": " + problem.Reason}
	}
	return e, nil
}

// heartbeatOf returns the heartbeat to ask for at e: that of its own URL, unless WithHeartbeat is
// given.
func (c *config) heartbeatOf(e endpoint) time.Duration {
	if e.heartbeat != 0 && !c.set["WithHeartbeat"] {
		return e.heartbeat
	}
	return c.heartbeat
}

// dialTimeoutOf is to connection_timeout and WithDialTimeout what heartbeatOf is to heartbeats.
func (c *config) dialTimeoutOf(e endpoint) time.Duration {
	if e.dialTimeout != 0 && !c.set["WithDialTimeout"] {
		return e.dialTimeout
	}
	return c.dialTimeout
}

func (c *config) checkQueue() {
	if c.topology != nil && c.declare != nil {
		c.refuse("WithQueue", "cannot be combined with WithTopology; declare the queue in the function")
	}
	q := c.declare
	if c.queue == "" && c.topology == nil && (q == nil || q.Type != "classic" || !q.Exclusive) {
		c.refuse("New", "the queue name is empty; give it, or WithTopology, or WithQueue with an exclusive classic queue, whose name the broker may choose")
	}
	c.shortString("New", "the queue name", c.queue)
	if strings.ContainsAny(c.queue, "\r\n") {
		c.refuse("New", "the queue name %q has a line break, and RabbitMQ takes those out of the names of queues: none has this one", c.queue)
	}
	if q != nil {
		c.checkDeclare(q)
		c.checkExchange(q)
		c.checkDeadLetter(q)
	}
}

// checkDeclare also completes q.
func (c *config) checkDeclare(q *Queue) {
	switch q.Type {
	case "":
		q.Type = "quorum"
	case "quorum", "classic", "stream":
	default:
		c.refuse("WithQueue", `Type must be "quorum", "classic" or "stream", got %q`, q.Type)
	}
	if q.Type != "classic" && c.exclusive {
		c.refuse("WithExclusive", "a %s queue takes no notice of an exclusive consumer; declare it with Args x-single-active-consumer instead", q.Type)
	}
	if q.Type != "classic" && (q.Exclusive || q.AutoDelete || q.Transient) {
		c.refuse("WithQueue", "a %s queue can be neither exclusive, auto-delete nor transient; use a classic queue", q.Type)
	}
	if q.Transient && !q.Exclusive {
		c.refuse("WithQueue", "a transient queue must be exclusive: RabbitMQ 4.3 refuses shared transient queues (541)")
	}
	if q.Args = c.takeTable("WithQueue", "Args", q.Args); q.Args == nil {
		q.Args = amqp.Table{}
	}
	if t, ok := q.Args["x-queue-type"]; ok && t != q.Type {
		c.refuse("WithQueue", "Args has x-queue-type %v, Type says %q", t, q.Type)
	}
}

// checkExchange also gives the bindings their exchange.
func (c *config) checkExchange(q *Queue) {
	own := ""
	if q.Exchange != nil {
		x := *q.Exchange
		x.Args = c.takeTable("WithQueue", "Exchange.Args", x.Args)
		if x.Kind == "" {
			x.Kind = "direct"
		}
		c.checkKind(&x)
		own, q.Exchange = x.Name, &x
	}
	q.Bindings = slices.Clone(q.Bindings)
	used := false
	for i := range q.Bindings {
		b := &q.Bindings[i]
		place := fmt.Sprintf("Bindings[%d]", i)
		b.Args = c.takeTable("WithQueue", place+".Args", b.Args)
		c.shortString("WithQueue", place+".Key", b.Key)
		c.shortString("WithQueue", place+".Exchange", b.Exchange)
		if b.Exchange == "" && q.Exchange == nil {
			c.refuse("WithQueue", "%s names no exchange; the default exchange leads to every queue by its name already, and takes no bindings", place)
			continue
		}
		b.Exchange = cmp.Or(b.Exchange, own)
		used = used || b.Exchange == own
	}
	if q.Exchange != nil && !used {
		c.refuse("WithQueue", "Exchange %q is declared, and none of Bindings uses it; add Binding{Key: ...}, which is bound to it", own)
	}
}

func (c *config) checkKind(x *Exchange) {
	switch {
	case x.Name == "":
		c.refuse("WithQueue", "Exchange needs a Name")
	case !slices.Contains([]string{"direct", "fanout", "topic", "headers"}, x.Kind) && !strings.HasPrefix(x.Kind, "x-"):
		c.refuse("WithQueue", `Exchange.Kind must be "direct", "fanout", "topic", "headers" or begin with "x-", got %q`, x.Kind)
	}
	c.shortString("WithQueue", "Exchange.Name", x.Name)
	c.shortString("WithQueue", "Exchange.Kind", x.Kind)
}

// checkDeadLetter also turns it into arguments.
func (c *config) checkDeadLetter(q *Queue) {
	if q.DeadLetter == nil {
		return
	}
	dead := *q.DeadLetter
	q.DeadLetter = &dead
	_, exchange := q.Args["x-dead-letter-exchange"]
	_, key := q.Args["x-dead-letter-routing-key"]
	switch {
	case q.Type == "stream":
		c.refuse("WithQueue", "DeadLetter is not for streams: they keep all messages and give up none")
	case exchange || key:
		c.refuse("WithQueue", "DeadLetter and x-dead-letter-exchange or x-dead-letter-routing-key in Args say the same; leave one out")
	case dead.Queue != "" && (dead.Exchange != "" || dead.Key != ""):
		c.refuse("WithQueue", "DeadLetter takes either Queue, which is declared, or Exchange and Key, which exist already")
	case dead == DeadLetter{}:
		c.refuse("WithQueue", "DeadLetter is empty; give it a Queue, or an Exchange, or leave it out")
	case dead.Queue != "" && dead.Queue == c.queue, dead.Exchange == "" && dead.Key != "" && dead.Key == c.queue:
		c.refuse("WithQueue", "DeadLetter leads back into the queue %q itself, at once and for ever", c.queue)
	}
	c.shortString("WithQueue", "DeadLetter.Queue", dead.Queue)
	c.shortString("WithQueue", "DeadLetter.Exchange", dead.Exchange)
	c.shortString("WithQueue", "DeadLetter.Key", dead.Key)
	q.Args["x-dead-letter-exchange"] = dead.Exchange
	if to := cmp.Or(dead.Queue, dead.Key); to != "" {
		q.Args["x-dead-letter-routing-key"] = to
	}
}

func (c *config) checkTogether() {
	if !c.set["WithPrefetch"] {
		c.prefetch = max(c.prefetch, c.concurrency)
	} else if c.prefetch < c.concurrency && c.prefetch > 0 {
		c.refuse("WithPrefetch", "must be at least the concurrency (%d), got %d: workers would wait for nothing", c.concurrency, c.prefetch)
	}
	if c.credentials != nil && c.sasl != nil {
		c.refuse("WithCredentials", "cannot be combined with WithSASL, which has credentials of its own")
	}
	if _, filtered := c.consumeArgs["x-stream-filter"]; filtered && c.stallAfter > 0 {
		c.refuse("WithStallDetector", "is not for filtered streams: they grow by what the filter leaves out, so silence means nothing")
	}
	if c.tls != nil && c.tls.InsecureSkipVerify && c.tls.VerifyConnection == nil && c.tls.VerifyPeerCertificate == nil && !c.insecure {
		c.refuse("WithTLSConfig", "InsecureSkipVerify lets anyone on the path read the password; set RootCAs instead, or add WithInsecureSkipVerify in tests")
	}
}

// stream tells whether the consumer reads a stream, as far as it was told.
func (c *config) stream() bool {
	_, offset := c.consumeArgs["x-stream-offset"]
	return offset || c.declare != nil && c.declare.Type == "stream"
}
