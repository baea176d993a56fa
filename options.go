package steadymq

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
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
// idempotent. ctx ends with the setup limit, which also closes the socket under
// the channel. An error is retried like any failure of the setup; wrap the
// *amqp.Error of the channel with %w so that it can be classified. The channel
// must not be used after the function has returned, nor be consumed from.
type TopologyFunc func(ctx context.Context, ch *amqp.Channel) (queue string, err error)

// Queue is the common declare, for WithQueue. The zero value is a durable quorum
// queue, RabbitMQ's default for messages that must not get lost.
type Queue struct {
	// Type is "quorum" (default), "classic" or "stream".
	Type string
	// Transient makes the queue not survive a broker restart. Only for
	// exclusive classic queues: RabbitMQ 4.3 refuses shared transient queues.
	Transient bool
	// Exclusive limits the queue to this connection; it is gone with it. Only
	// for classic queues.
	Exclusive bool
	// AutoDelete deletes the queue when its last consumer leaves. Only for
	// classic queues.
	AutoDelete bool
	// Bindings are made after the declare.
	Bindings []Binding
	// Args are further arguments of the declare, such as "x-delivery-limit"
	// or "x-dead-letter-exchange".
	Args amqp.Table
}

// Binding binds the queue to an exchange that exists already.
type Binding struct {
	// Exchange is the exchange's name.
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
	requeueDelay   time.Duration
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
	dial           dialFunc

	middleware []Middleware
	logger     *slog.Logger
	hooks      Hooks

	set      map[string]bool // options given, where a default depends on it
	problems []error
}

func defaults(url, queue string) *config {
	return &config{
		urls:         []string{url},
		queue:        queue,
		concurrency:  1,
		prefetch:     32,
		retryInitial: 250 * time.Millisecond,
		retryCap:     10 * time.Second,
		heartbeat:    10 * time.Second,
		dialTimeout:  5 * time.Second,
		setupTimeout: 15 * time.Second,
		closeTimeout: 5 * time.Second,
		drainTimeout: 30 * time.Second,
		requeueDelay: time.Second,
		writeDelay:   time.Millisecond,
		tagPrefix:    "steadymq",
		logger:       slog.Default(),
		set:          make(map[string]bool),
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
// Default 1, which also keeps the order of a session's messages. Range 1 to 65535.
func WithConcurrency(n int) Option {
	return func(c *config) { c.concurrency = n; c.count("WithConcurrency", n) }
}

// WithPrefetch sets how many unsettled messages the broker may send ahead
// (basic.qos, per consumer). Default 32, or the concurrency where that is
// higher. Range: from the concurrency to 65535. 0 would mean "no limit" to a
// broker and the whole queue in memory here, and is refused.
//
// It is also the most messages that can be delivered twice when a session is
// lost, and each of them counts towards a quorum queue's delivery limit (20
// since RabbitMQ 4.0): keep it small. The last prefetched message waits
// prefetch/concurrency handlers long; keep that below half the broker's
// consumer timeout (https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout).
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
// included, and is called on Run's goroutine. Without it Run gives up only
// before the first session, see Run.
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
// Default 10 s, or the heartbeat parameter of the URL. A silent peer is noticed
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

// WithDialTimeout bounds one TCP connect, name resolution included. Default 5 s,
// range 1 ms to 24 h. WithSetupTimeout bounds it as well.
func WithDialTimeout(d time.Duration) Option {
	return func(c *config) { c.dialTimeout = d; c.duration("WithDialTimeout", d) }
}

// WithSetupTimeout bounds a whole try, from dial to the broker's consume-ok,
// topology included. Past it the socket is closed. Default 15 s, which leaves a
// broker its own 10 s of handshake and 3 s of silence after a wrong password;
// range 1 ms to 24 h.
func WithSetupTimeout(d time.Duration) Option {
	return func(c *config) { c.setupTimeout = d; c.duration("WithSetupTimeout", d) }
}

// WithCloseTimeout bounds the orderly end of a connection; past it the socket is
// closed under it. Default 5 s, range 1 ms to 24 h.
func WithCloseTimeout(d time.Duration) Option {
	return func(c *config) { c.closeTimeout = d; c.duration("WithCloseTimeout", d) }
}

// WithDrainTimeout bounds how long running handlers may take to finish once the
// consumer stops, or once the broker has cancelled it and handlers still hold
// deliveries of the old channel. Default 30 s, range 1 ms to 24 h.
func WithDrainTimeout(d time.Duration) Option {
	return func(c *config) { c.drainTimeout = d; c.duration("WithDrainTimeout", d) }
}

// WithHandlerTimeout ends a handler's context after d with the cause
// ErrHandlerTimeout; what the handler then returns decides the outcome as ever.
// Off by default; range 1 ms to 24 h. Keep it below half the broker's consumer
// timeout (30 minutes by default), which would otherwise end the session.
func WithHandlerTimeout(d time.Duration) Option {
	return func(c *config) { c.handlerTimeout = d; c.duration("WithHandlerTimeout", d) }
}

// WithRequeueDelay sets how long a message whose handler returned a plain error
// is held, unsettled, before it goes back to the queue; each hold is drawn from
// [d/2, 3d/2). It keeps a failing message from spinning between broker and
// consumer. Default 1 s, range 1 ms to 24 h. A held message occupies one place
// of the prefetch but no worker.
func WithRequeueDelay(d time.Duration) Option {
	return func(c *config) { c.requeueDelay = d; c.duration("WithRequeueDelay", d) }
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

// WithMaxMessageSize refuses messages with a larger body, in bytes, at their
// header and before any of the body is buffered: the session ends with an error
// that names the size. The message stays in the queue and will come again, so
// set it well above what publishers may send and treat the error as an alarm.
// Off by default (the broker's own max_message_size, 16 MiB since RabbitMQ 4.0,
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

// WithQueue declares the queue given to New, and its bindings, before every
// session. Without WithQueue or WithTopology the queue must exist, and is waited
// for while it does not.
func WithQueue(q Queue) Option {
	return func(c *config) { c.declare = &q }
}

// WithConsumeArgs sets arguments of basic.consume, such as "x-priority",
// "x-consumer-timeout" or "x-stream-offset". The table is copied.
//
// A stream is consumed like any queue, but must be named as one, by
// "x-stream-offset" here (first, last, next, a number or a time) or by WithQueue:
// later sessions of the same Run then resume at the first message not yet
// settled, instead of skipping what was published while away. A stream has no
// requeue: a message put back ends the session, which resumes at that message.
// Where the stream itself is found to be gone, the next one of its name is read
// from its beginning; one that others delete and declare anew within a moment, or
// while the consumer is away, looks like the old one: give it a new name.
func WithConsumeArgs(args amqp.Table) Option {
	return func(c *config) {
		c.consumeArgs = cloneTable(args)
		if err := args.Validate(); err != nil {
			c.refuse("WithConsumeArgs", "holds a value AMQP cannot carry: %v", err)
		}
		if early(args) {
			c.refuse("WithConsumeArgs", "holds a time before 1970, which AMQP cannot carry")
		}
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
		}
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
// and must not hold a secret, for it is logged.
func WithURLFunc(f func(ctx context.Context) (string, error)) Option {
	return func(c *config) {
		c.urlFunc = f
		if f == nil {
			c.refuse("WithURLFunc", "must not be nil")
		}
	}
}

// WithTLSConfig sets the TLS configuration of amqps URLs. It is cloned for every
// dial, and its ServerName filled per host if empty. TLS below 1.2 is refused.
// Without it the system's roots and the URL's own parameters (cacertfile,
// certfile, keyfile, server_name_indication) are used.
func WithTLSConfig(t *tls.Config) Option {
	return func(c *config) {
		c.tls = t
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
// password: for example &amqp.ExternalAuth{} with client certificates.
func WithSASL(mechanisms ...amqp.Authentication) Option {
	return func(c *config) {
		c.sasl = mechanisms
		if len(mechanisms) == 0 {
			c.refuse("WithSASL", "needs at least one mechanism")
		}
		for _, m := range mechanisms {
			if m == nil {
				c.refuse("WithSASL", "a mechanism is nil")
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
// time nothing was delivered and nothing settled, although the prefetch is not
// full. It then asks the queue, by a passive declare on a channel of its own, which
// needs the configure permission on RabbitMQ 4.3. The silence is a stall if one of
// these is so, and is so still up to 5 s later:
//
//   - The queue has messages and this consumer is its only one (a quorum queue
//     without majority), or it knows of no consumer at all (a forgotten one).
//   - It is a stream, and has grown since the last look.
//   - Most of all hosts, three or more being given, say that messages wait for this
//     consumer, or that the stream is longer (this host is cut off). They are asked
//     over a connection for one question each, not counted in [Stats].
//
// Then the session is lost with a cause that says so, and replaced, on another host
// if there is one. So it is when the queue does not answer within the setup limit.
// From the start of the silence that takes at most twice the given time and 5 s, on
// a stream three times, plus the time the answers take.
//
// With other consumers on the queue silence is normal (single active consumer,
// priorities) and nothing is done. A quorum queue counts only its active consumer:
// where x-single-active-consumer is set, declare the queue by WithQueue so that this
// is known, or leave the detector out. Nor is it for a stream that the consumer does
// not know to be one, by WithQueue or x-stream-offset.
//
// What it cannot see: a leader that lost its majority answers from what it knew
// before. What is published through it since is in no queue and not confirmed until
// the majority is back (seen on RabbitMQ 4.0 and 4.3: "0 messages, 1 consumer"), so
// the consumer of a queue that was empty waits for that, and nothing tells. With one
// or two hosts nothing tells what the other side of a partition has, either. No
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

// WithInsecureSkipVerify allows a TLS configuration with InsecureSkipVerify, which
// New refuses otherwise: anyone on the path can then read the password. For tests.
func WithInsecureSkipVerify() Option {
	return func(c *config) { c.insecure = true }
}

// WithDialer replaces the TCP dial, with net.Dialer.DialContext's signature: for
// proxies, tunnels and tests (steadymqtest.Broker.Dialer). TLS is done on top of
// what it returns. The default dialer sets keep-alive and, on Linux,
// TCP_USER_TIMEOUT; a dialer of your own should too.
func WithDialer(dial func(ctx context.Context, network, address string) (net.Conn, error)) Option {
	return func(c *config) {
		c.dial = dial
		if dial == nil {
			c.refuse("WithDialer", "must not be nil")
		}
	}
}

// WithMiddleware wraps the handler; given several times they add up.
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

// WithLogger sets where the library logs its state transitions. Default
// slog.Default(). For silence give slog.New(slog.DiscardHandler).
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
		if hooks.StateChanged == nil && hooks.HandlerFailed == nil {
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
		option := "New"
		if i > 0 {
			option = "WithURLs"
		}
		e, err := parseEndpoint(u)
		if err != nil {
			c.refuse(option, "%v", err)
			continue
		}
		if e.uri.Scheme == "amqp" && c.tls != nil {
			c.refuse("WithTLSConfig", "the URL of host %s has the scheme amqp, which is not encrypted; use amqps", e.address)
		}
		if e.heartbeat != 0 && !c.set["WithHeartbeat"] {
			c.heartbeat = e.heartbeat
		}
	}
}

func (c *config) checkQueue() {
	if c.topology != nil && c.declare != nil {
		c.refuse("WithQueue", "cannot be combined with WithTopology; declare the queue in the function")
	}
	q := c.declare
	if c.queue == "" && c.topology == nil && (q == nil || q.Type != "classic" || !q.Exclusive) {
		c.refuse("New", "the queue name is empty; give it, or WithTopology, or WithQueue with an exclusive classic queue, whose name the broker may choose")
	}
	if len(c.queue) > 255 {
		c.refuse("New", "the queue name has %d bytes, AMQP allows 255", len(c.queue))
	}
	if q == nil {
		return
	}
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
	if err := q.Args.Validate(); err != nil {
		c.refuse("WithQueue", "Args holds a value AMQP cannot carry: %v", err)
	}
	if early(q.Args) {
		c.refuse("WithQueue", "Args holds a time before 1970, which AMQP cannot carry")
	}
	q.Args = cloneTable(q.Args)
	if t, ok := q.Args["x-queue-type"]; ok && t != q.Type {
		c.refuse("WithQueue", "Args has x-queue-type %v, Type says %q", t, q.Type)
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
	if c.dial == nil {
		c.dial = defaultDial(c.dialTimeout, c.heartbeat*3/2)
	}
}

// stream tells whether the consumer reads a stream, as far as it was told.
func (c *config) stream() bool {
	_, offset := c.consumeArgs["x-stream-offset"]
	return offset || c.declare != nil && c.declare.Type == "stream"
}

// early finds a time that the driver would turn into one of the far future: AMQP counts
// seconds from 1970, unsigned.
func early(value any) bool {
	switch v := value.(type) {
	case time.Time:
		return v.Unix() < 0
	case amqp.Table:
		return slices.ContainsFunc(slices.Collect(maps.Values(v)), early)
	case []any:
		return slices.ContainsFunc(v, early)
	}
	return false
}

func cloneTable(t amqp.Table) amqp.Table {
	if t == nil {
		return nil
	}
	clone := make(amqp.Table, len(t))
	for k, v := range t {
		if inner, ok := v.(amqp.Table); ok {
			v = cloneTable(inner)
		}
		clone[k] = v
	}
	return clone
}
