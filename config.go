package steadymq

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/retryqueue"
	"github.com/steadymq/steadymq/internal/table"
	"github.com/steadymq/steadymq/internal/wire"
)

// config is everything that New was given, checked and completed. New and its options write it, and
// after that nobody does, so every goroutine may read it. It is kept behind a pointer everywhere,
// so that no %+v prints its URLs.
type config struct {
	urls  []string
	queue string

	by           string   // the function that was given the queue, for refusals
	connections  int      // that the consumers of a Group share
	ofConnection []string // names of the options given that belong to the connection

	concurrency int
	prefetch    int
	batches     bool // handlers take several deliveries at once
	batchSize   int
	batchWait   time.Duration

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

	retry   *Retry      // nil without WithRetry
	offsets OffsetStore // nil without WithStreamOffsets

	breaker *Breaker // nil without WithBreaker
	rate    *rate    // nil without WithRate

	orderingKey func(*Delivery) string // nil without WithOrderingKey

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

	set      given // for defaults that depend on it
	problems []error
}

// given says which options were given whose values do not show it.
type given struct{ heartbeat, dialTimeout, prefetch, backoff, concurrency, requeueDelay bool }

func defaults(url, queue string) *config {
	return &config{
		by:             "New",
		urls:           []string{url},
		queue:          queue,
		connections:    1,
		concurrency:    1,
		prefetch:       32,
		batchSize:      100,
		batchWait:      100 * time.Millisecond,
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
	}
}

// TopologyFunc declares what a session needs, on the session's own channel, and returns the queue
// to consume from; "" means the queue given to [New]. See [WithTopology]. It runs for every
// session, on its fresh channel, so everything in it must be idempotent. It is called by one
// goroutine at a time, unless a call that ignored the end of its ctx was left behind.
//
// ctx ends with the limit of [WithSetupTimeout]. So does what the function waits for on the
// channel, since that is closed then, with its socket unless another session lives on it. An error
// is retried like any failure of the set-up. Wrap the *amqp.Error of the channel with %w so that it
// can be classified.
//
// The channel is the session's. It must not be used after the function has returned, nor be
// consumed from: nobody settles what is delivered there. A function that makes the channel
// transactional (Tx), which would keep every ack from taking effect, is refused, and so is a queue
// name that AMQP cannot carry. Confirm mode does no harm. Publish on a connection of your own:
// RabbitMQ stops reading a connection that has published while memory or disk run low, acks
// included.
//
// A queue that is exclusive, or that the broker names, lives as long as its connection, and a
// connection has many sessions: the next session is on the same connection unless that was lost. So
// return the same name again, as a declare of an exclusive queue by name does. If the function
// returns another name than before on the same connection, as it does when the broker names the
// queue, then the connection is replaced and the function is called once more, on the new one: the
// earlier queue would stay behind, bound and unread. What was in it is lost. The library does not
// know what a function has declared, so a connection on which the function has failed three times
// is replaced, since each failure may have left a queue behind; and so is a connection whose
// sessions fail three times within 30 s. [WithQueue] keeps an exclusive queue over all that,
// whoever names it.
type TopologyFunc func(ctx context.Context, ch *amqp.Channel) (queue string, err error)

// Queue is the common declare, for [WithQueue] (queue.declare,
// https://www.rabbitmq.com/docs/queues). The zero value is a durable quorum queue, RabbitMQ's
// choice for messages that must not get lost.
type Queue struct {
	// Type is "quorum" (default), "classic" or "stream" (x-queue-type).
	Type string
	// Transient makes the queue not survive a restart of the broker. New refuses it but for
	// exclusive classic queues: RabbitMQ 4.3 refuses shared transient queues.
	Transient bool
	// Exclusive limits the queue to this connection. It is gone with the connection, and what is in
	// it is lost. Only for classic queues. If New was given no name, the broker names it.
	//
	// As long as the connection lives, the next session consumes from the same queue, under the
	// same name, and misses nothing; a queue that is gone is declared anew at once. Failures of
	// sessions do not replace the connection then. It is replaced when it ends, when a set-up on it
	// outlasts its limit, or when [WithStallDetector] finds a stall: a queue that delivers nothing
	// is given up, messages and all.
	Exclusive bool
	// AutoDelete deletes the queue when its last consumer leaves. A session that is lost is such a
	// consumer: what is in the queue is lost then. Only for classic queues.
	AutoDelete bool
	// Exchange is declared before the queue, for those Bindings that name no other. New refuses one
	// that none of them uses. nil: they name exchanges that exist already.
	Exchange *Exchange
	// Bindings are made after the queue is declared (queue.bind). A binding that is taken out here
	// stays at the broker.
	Bindings []Binding
	// DeadLetter is where the queue sends the messages that it gives up: discarded ones, those that
	// expire or overflow, and those that the delivery limit takes. nil: Args says so, or they are
	// gone. Not for streams.
	DeadLetter *DeadLetter
	// RetryMin and RetryMax let the broker itself delay what a quorum queue gets back from a
	// handler that has failed: RetryMin after the first failure, twice that after the second and so
	// on, up to RetryMax (https://www.rabbitmq.com/docs/quorum-queues). What waits occupies no
	// prefetch, and [WithRequeueDelay] then holds nothing. RabbitMQ has that since 4.3: on an
	// earlier broker the queue is declared without it, messages are held as ever, and one line in
	// the log says so. In whole milliseconds, 1 ms to 24 h; both or none. Zero: no delay.
	RetryMin, RetryMax time.Duration
	// Args are further arguments of the declare, such as "x-delivery-limit" or "x-message-ttl". New
	// refuses what AMQP cannot carry.
	//
	// Since 4.0 RabbitMQ drops a message of a quorum queue that has come back more than 20 times.
	// So from 4.0 on a quorum queue that has no dead-letter exchange, and no x-delivery-limit here,
	// is declared with x-delivery-limit=-1: no limit. Everybody else who declares that queue has to
	// say the same, or gets 406. A queue that was declared before with a limit is taken as it is,
	// with one warning per Run. Before 4.0 nothing is said, since there is no limit, and -1 would
	// drop a message at its first return.
	Args amqp.Table
}

// Exchange is the common declare of an exchange, for [Queue].Exchange (exchange.declare,
// https://www.rabbitmq.com/docs/exchanges).
type Exchange struct {
	// Name is the name of the exchange, 1 to 255 bytes.
	Name string
	// Kind is "direct" (default), "fanout", "topic", "headers", or that of a plugin, which begins
	// with "x-".
	Kind string
	// Transient makes the exchange not survive a restart of the broker.
	Transient bool
	// Args are further arguments of the declare, such as "alternate-exchange".
	Args amqp.Table
}

// DeadLetter is where a [Queue] sends what it gives up: to a queue, or to an exchange
// (https://www.rabbitmq.com/docs/dlx). New refuses one that leads back into the queue itself.
type DeadLetter struct {
	// Queue is the name of a queue, reached through the default exchange. It is declared before the
	// queue itself and durable: a quorum queue without a delivery limit for a quorum queue, else a
	// classic one. If it exists in another form it is taken as it is. Nothing consumes it unless
	// you do.
	//
	// A quorum queue for dead letters that you declare yourself should have x-delivery-limit=-1
	// from RabbitMQ 4.0 on: since 4.3 a message arrives there with the count of its old life, and
	// beyond the limit its first return drops it.
	Queue string
	// Exchange, in place of Queue, is an exchange that exists. "" is the default exchange, which
	// leads to the queue that Key names.
	Exchange string
	// Key is the routing key to it, in place of the message's own.
	Key string
}

// Binding binds a [Queue] to an exchange.
type Binding struct {
	// Exchange is the name of an exchange that exists; "" is [Queue].Exchange.
	Exchange string
	// Key is the routing key, or the pattern on a topic exchange.
	Key string
	// Args are the arguments of the binding, for headers exchanges.
	Args amqp.Table
}

// clone returns a copy of what the consumers of a Group share, for the consumer of one queue.
func (c *config) clone(queue string) *config {
	own := *c
	own.queue, own.by, own.batches = queue, "Handle", false
	own.middleware = slices.Clip(c.middleware)
	own.ofConnection, own.problems = nil, nil
	if c.declare != nil {
		declare := *c.declare // what it points to is copied before it is completed
		own.declare = &declare
	}
	return &own
}

// takeQueue copies q with all that it holds and that a user may change.
func (c *config) takeQueue(q *Queue) *Queue {
	own := *q
	own.Args = c.takeTable("WithQueue", "Args", q.Args)
	own.Bindings = slices.Clone(q.Bindings)
	for i := range own.Bindings {
		own.Bindings[i].Args = c.takeTable("WithQueue", fmt.Sprintf("Bindings[%d].Args", i), q.Bindings[i].Args)
	}
	if q.Exchange != nil {
		x := *q.Exchange
		x.Args = c.takeTable("WithQueue", "Exchange.Args", x.Args)
		own.Exchange = &x
	}
	if q.DeadLetter != nil {
		dead := *q.DeadLetter
		own.DeadLetter = &dead
	}
	return &own
}

func (q *Queue) args() amqp.Table {
	args := maps.Clone(q.Args)
	args["x-queue-type"] = q.Type
	return args
}

// declaresOwned reports whether WithQueue declares a queue that ends with its connection.
func (c *config) declaresOwned() bool { return c.declare != nil && c.declare.Exclusive }

// declareExclusive declares WithQueue's exclusive queue.
func (c *config) declareExclusive(channel *amqp.Channel) (amqp.Queue, error) {
	q := c.declare
	return channel.QueueDeclare(c.queue, !q.Transient, q.AutoDelete, true, false, q.args())
}

func (c *config) refuse(option, format string, args ...any) {
	c.problems = append(c.problems, &OptionError{Option: option, Reason: fmt.Sprintf(format, args...)})
}

const (
	minDuration = time.Millisecond // what is shorter lacks its unit

	maxWriteDelay = 100 * time.Millisecond
	maxTagPrefix  = 200 // bytes: a consumer tag has 255 at most, and the rest makes it unique
)

// duration refuses a d outside of [minDuration, maxDuration].
func (c *config) duration(option string, d time.Duration) {
	if d < minDuration || d > maxDuration {
		c.refuse(option, "must be between %v and %v, got %v (a bare number counts nanoseconds: write 30*time.Second)", minDuration, maxDuration, d)
	}
}

func (c *config) count(option string, n int) {
	if !inRange(n) {
		c.refuse(option, "must be between 1 and 65535, got %d", n)
	}
}

func inRange(n int) bool { return n >= 1 && n <= 65535 }

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
			c.refuse(c.by, "%v", err)
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

// contradicts returns which options contradict a URL that is valid in itself. It shows no part of
// the URL.
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

// endpointOf reads a URL that WithURLFunc returned, as New reads one.
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

// heartbeatOf returns the heartbeat to ask for at e: that of the URL, unless WithHeartbeat is
// given.
func (c *config) heartbeatOf(e endpoint) time.Duration {
	if e.heartbeat != 0 && !c.set.heartbeat {
		return e.heartbeat
	}
	return c.heartbeat
}

// dialTimeoutOf returns the limit of a dial to e: that of the URL, unless WithDialTimeout is given.
func (c *config) dialTimeoutOf(e endpoint) time.Duration {
	if e.dialTimeout != 0 && !c.set.dialTimeout {
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
		c.refuse(c.by, "the queue name is empty; give it, or WithTopology, or WithQueue with an exclusive classic queue, whose name the broker may choose")
	}
	c.shortString(c.by, "the queue name", c.queue)
	if strings.ContainsAny(c.queue, "\r\n") {
		c.refuse(c.by, "the queue name %q has a line break, and RabbitMQ takes those out of the names of queues: none has this one", c.queue)
	}
	if q != nil {
		c.checkDeclare(q)
		c.checkExchange(q)
		c.checkDeadLetter(q)
		c.checkDelayedRetry(q)
	}
}

// namedByBroker reports whether a queue has a prefix that only a broker may use.
func namedByBroker(queue string) bool { return strings.HasPrefix(queue, "amq.") }

// delayedRetryArg is what the arguments of a quorum queue begin with that delay what comes back.
const delayedRetryArg = "x-delayed-retry-"

// checkDelayedRetry checks the delays of the broker's own.
func (c *config) checkDelayedRetry(q *Queue) {
	if q.RetryMin == 0 && q.RetryMax == 0 {
		return
	}
	for name := range q.Args {
		if strings.HasPrefix(name, delayedRetryArg) {
			c.refuse("WithQueue", "RetryMin and %s in Args say the same; leave one out", name)
		}
	}
	whole := q.RetryMin%time.Millisecond == 0 && q.RetryMax%time.Millisecond == 0
	switch {
	case q.Type != "quorum":
		c.refuse("WithQueue", "RetryMin and RetryMax are for quorum queues, not for %s ones; WithRetry delays messages of classic queues", q.Type)
	case q.RetryMin < minDuration, q.RetryMax > maxDuration, q.RetryMin > q.RetryMax, !whole:
		c.refuse("WithQueue", "RetryMin and RetryMax must be from %v to %v in whole milliseconds, and RetryMin no longer than RetryMax; got %v and %v", minDuration, maxDuration, q.RetryMin, q.RetryMax)
	}
}

// checkDeclare checks the declaration of the queue, and completes q.
func (c *config) checkDeclare(q *Queue) {
	c.checkType(q)
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

// checkType checks what a queue of a type cannot be.
func (c *config) checkType(q *Queue) {
	switch q.Type {
	case "":
		q.Type = "quorum"
	case "quorum", "classic", "stream":
	default:
		c.refuse("WithQueue", `Type must be "quorum", "classic" or "stream", got %q`, q.Type)
		return // "Classic" would be told to be a classic queue
	}
	if q.Type != "classic" && c.exclusive {
		c.refuse("WithExclusive", "a %s queue takes no notice of an exclusive consumer; declare it with Args x-single-active-consumer instead", q.Type)
	}
	if q.Type != "classic" && (q.Exclusive || q.AutoDelete || q.Transient) {
		c.refuse("WithQueue", "a %s queue can be neither exclusive, auto-delete nor transient; use a classic queue", q.Type)
	}
}

// checkExchange checks exchange and bindings, and gives the bindings their exchange.
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

// checkDeadLetter checks DeadLetter and turns it into arguments.
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
	if !c.set.prefetch {
		c.prefetch = max(c.prefetch, c.concurrency, c.prefetchForKeys())
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

// maxBatchWait is the longest that a batch may be collected, half of RabbitMQ's consumer timeout.
const maxBatchWait = 15 * time.Minute

// checkBatches checks what handlers of batches need, and completes the prefetch: while some batches
// are handled the next ones are on their way.
func (c *config) checkBatches() {
	if !c.batches {
		return
	}
	if len(c.middleware) > 0 {
		c.refuse("WithMiddleware", "wraps a Handler, which takes one delivery, so batches would pass it by; leave it out, and call what it does from the BatchHandler")
	}
	if c.orderingKey != nil {
		c.refuse("WithOrderingKey", "orders single deliveries, so batches would pass it by; leave it out, and group the batch by key in the BatchHandler, or use Run, in a Group Handle")
	}
	if limit := c.consumerTimeout() / 2; c.batchWait > limit && c.batchWait <= maxBatchWait {
		c.refuse("WithBatch", "wait must be at most half of x-consumer-timeout, here %v, got %v: the broker would take back what is collected", limit, c.batchWait)
	}
	if !inRange(c.batchSize) || !inRange(c.concurrency) {
		return // which is told
	}
	switch most := int64(c.batchSize) * int64(c.concurrency); {
	case most > 65535:
		c.refuse("WithBatch", "size times concurrency (%d) must be at most 65535, as many messages as a broker sends ahead, got %d; lower one of them", c.concurrency, most)
	case !c.set.prefetch:
		c.prefetch = max(c.prefetch, int(min(2*most, 65535)))
	case int64(c.prefetch) < most && c.prefetch > 0:
		c.refuse("WithPrefetch", "must be at least size times concurrency (%d) of batches, got %d: no batch would fill before its wait is over; raise it, leave it out, or lower the size (WithBatch)", most, c.prefetch)
	}
}

// inBatches returns the configuration for handlers of batches: all that is given for them must be
// given for no other.
func (c *config) inBatches() (*config, error) {
	own := *c
	own.batches, own.problems = true, nil
	own.checkBatches()
	return &own, errors.Join(own.problems...)
}

// stream reports whether the consumer reads a stream, as far as its options say so.
func (c *config) stream() bool {
	_, offset := c.consumeArgs["x-stream-offset"]
	return offset || c.declare != nil && c.declare.Type == "stream"
}

// OffsetStore keeps how far a stream was handled, over restarts of the process, see
// [WithStreamOffsets]. The place that it keeps is the offset to go on at: all messages of the
// stream before it are handled. A file or a row of a database will do, with the name of the stream
// as its key; the program in examples/streamoffsets has both.
//
// The methods are called on goroutines of the library, Load and Save maybe at the same time, and one
// of them twice at the same time only if the first call was left behind. ctx carries the values of
// Run's context and ends with the limit of the call, that of Load also with Run's context. A method
// that is still running 0.4 s later is left behind and counted in [Stats].Abandoned. A panic is a
// failure of the call.
type OffsetStore interface {
	// Load returns the offset to go on at, as Save was last given it for that stream; found is
	// false if it never was. next must be 0 or more.
	Load(ctx context.Context, stream string) (next int64, found bool, err error)

	// Save keeps next, the offset to go on at, for that stream. It must replace the old place as a
	// whole or not at all. next may be lower than before: a stream that was deleted and made anew
	// counts from 0.
	Save(ctx context.Context, stream string, next int64) error
}

// checkOffsets checks the store with its queue.
func (c *config) checkOffsets() {
	if c.offsets != nil && !c.stream() {
		c.refuse("WithStreamOffsets", `is for streams, and the options do not say that this queue is one: add x-stream-offset to WithConsumeArgs ("first" reads all of it), or WithQueue with the Type "stream"; in a Group, give it to Handle of the streams`)
	}
}

// sharesPlace reports whether both keep the place of one stream in one store.
func (c *config) sharesPlace(other *config) bool {
	return c.offsets != nil && other.offsets != nil && c.queue != "" && c.queue == other.queue &&
		reflect.ValueOf(c.offsets).Comparable() && reflect.ValueOf(other.offsets).Comparable() && c.offsets == other.offsets
}

// Credentials log in to the broker, see [WithCredentials]. They print without the password.
type Credentials struct {
	// Username and Password are for the login mechanism PLAIN. For OAuth 2 the password is the
	// token, and the broker does not look at the user name.
	Username, Password string
	// Expires is when the password stops being valid; zero for never. A password whose time has
	// passed is used all the same: the broker decides, by its own clock.
	Expires time.Time
}

// String returns the user name and the expiry.
func (c Credentials) String() string {
	expires := "never"
	if !c.Expires.IsZero() {
		expires = c.Expires.Format(time.RFC3339)
	}
	return fmt.Sprintf("%s (password not shown, expires %s)", c.Username, expires)
}

// Format implements [fmt.Formatter]: no verb prints the password.
func (c Credentials) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.String()) }

// MarshalText implements [encoding.TextMarshaler], for encoding/json, log/slog and others: none of
// them shows the password.
func (c Credentials) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// setupPassed returns errSetupTimeout with the length of the limit and what to do.
func (c *config) setupPassed() error {
	return errtext.Because(fmt.Errorf("setup limit of %v passed before the broker confirmed the consumer; is it reachable and not overloaded? (WithSetupTimeout)", c.setupTimeout), errSetupTimeout)
}

// deadLetters reports whether the queue passes messages on that it would drop otherwise, as far as
// its arguments say so.
func (q *Queue) deadLetters() bool {
	_, leads := q.Args["x-dead-letter-exchange"]
	return leads
}

// defaultConsumerTimeout is how long RabbitMQ lets a delivery be unsettled by default.
const defaultConsumerTimeout = 30 * time.Minute

// consumerTimeout returns how long the broker lets a delivery be unsettled, as far as the options
// say so, and a day at most.
func (c *config) consumerTimeout() time.Duration {
	limit := c.consumeArgs["x-consumer-timeout"]
	if limit == nil && c.declare != nil {
		limit = c.declare.Args["x-consumer-timeout"]
	}
	if ms, ok := headerInt(limit); ok && ms > 0 {
		return time.Duration(min(ms, maxDuration.Milliseconds())) * time.Millisecond
	}
	return defaultConsumerTimeout
}

// asksForLogin reports whether a function of the user gives the credentials. They may change
// between two tries, so the next try may succeed where this one was refused.
func (c *config) asksForLogin() bool { return c.urlFunc != nil || c.credentials != nil }

// tooLarge returns why a body of that size is not kept, nil if it is.
func (c *config) tooLarge(size uint64) error {
	if c.maxMessage == 0 || size <= c.maxMessage {
		return nil
	}
	return fmt.Errorf("%w of %d bytes: raise it, or take the message out of the queue", ErrMessageTooLarge, c.maxMessage)
}

// takeTable returns a copy of t and refuses what AMQP cannot carry in it. place says where in the
// option t was given; it is "" if t is the option itself.
func (c *config) takeTable(option, place string, t amqp.Table) amqp.Table {
	if t == nil {
		return nil
	}
	copied, problems := table.Copy(t)
	for _, problem := range problems {
		if place != "" {
			problem = place + ": " + problem
		}
		c.refuse(option, "%s", problem)
	}
	return copied
}

// shortString refuses a text that is too long for a short string or is not UTF-8.
func (c *config) shortString(option, what, text string) {
	if problem := table.ShortString(text); problem != "" {
		c.refuse(option, "%s %s", what, problem)
	}
}

// prefetchForKeys is the default prefetch where deliveries wait for others.
func (c *config) prefetchForKeys() int {
	if c.orderingKey == nil {
		return 0
	}
	return min(10*c.concurrency, 65535)
}

// checkOrder checks what WithOrderingKey cannot be combined with.
func (c *config) checkOrder() {
	if c.orderingKey == nil {
		return
	}
	refuse := func(format string, args ...any) { c.refuse("WithOrderingKey", format, args...) }
	if c.retry != nil && len(c.retry.Delays) > 0 {
		refuse("cannot be combined with the Delays of WithRetry, since a message that comes back later has been overtaken; leave Delays out (Attempts 0 or 1 with a Park queue): a failed message is tried again in place")
	}
	if q := c.declare; q != nil && (q.RetryMin > 0 || q.RetryMax > 0) {
		refuse("cannot be combined with Queue.RetryMin, since a message that the broker delays has been overtaken; leave it out: a failed message is tried again in place")
	}
}

// The policy of WithRetry, and what New refuses of it. What it makes of a failed delivery is in
// transfer.go.

// Retry is the policy of [WithRetry].
type Retry struct {
	// Attempts is how often a handler is given a message before the message is given up, the first
	// time included. Range 1 to 1,000; 1 retries nothing. 0, with a Park queue and no Delays, gives
	// nothing up by itself: a plain error is held as without a policy ([WithRequeueDelay]), and only
	// [Park] and a [*DecodeError] park.
	Attempts int
	// Delays are the waits before the second attempt, the third and so on; the last one repeats.
	// Each has a queue of its own. From 100 ms to 24 h in whole milliseconds, each longer than the
	// one before, 16 at most and no more than there are retries.
	Delays []time.Duration
	// Park is the queue that keeps messages which are given up, with their cause. "" discards them:
	// they are dropped, or dead-lettered if the queue has a dead-letter exchange.
	Park string
}

const (
	maxAttempts = 1000
	maxDelays   = 16
	minDelay    = 100 * time.Millisecond
)

// checkRetry checks the policy with what it meets.
func (c *config) checkRetry() {
	r := c.retry
	if r == nil {
		return
	}
	refuse := func(format string, args ...any) { c.refuse("WithRetry", format, args...) }
	if !r.onlyParks() && (r.Attempts < 1 || r.Attempts > maxAttempts) {
		refuse("Attempts must be between 1 and %d, got %d (or 0 beside nothing but Park, which then takes what a handler wants to be parked)", maxAttempts, r.Attempts)
	}
	c.checkDelays(r)
	c.shortString("WithRetry", "Park", r.Park)
	switch {
	case strings.ContainsAny(r.Park, "\r\n"):
		refuse("Park %q has a line break, and RabbitMQ takes those out of the names of queues", r.Park)
	case namedByBroker(r.Park):
		refuse("Park %q begins with amq., which RabbitMQ keeps for names of its own", r.Park)
	case r.Attempts == 1 && r.Park == "":
		refuse("Attempts is 1 and Park is empty, so every message that fails once would be discarded; name a Park queue, or return Discard from the handler")
	}
	if c.by != "NewGroup" { // there the queue is not known yet
		c.checkRetryOf(c.queue, r)
	}
}

// onlyParks reports whether the policy is for what a handler wants to be parked, and nothing else.
func (r *Retry) onlyParks() bool { return r.Attempts == 0 && len(r.Delays) == 0 && r.Park != "" }

func (c *config) checkDelays(r *Retry) {
	refuse := func(format string, args ...any) { c.refuse("WithRetry", format, args...) }
	switch {
	case len(r.Delays) == 0 && r.Attempts > 1 && c.orderingKey != nil:
		refuse("Attempts must be 0 or 1 beside WithOrderingKey, which excludes Delays, got %d: a failed message is tried again in place", r.Attempts)
	case len(r.Delays) == 0 && r.Attempts > 1:
		refuse("Delays is empty, and a message that failed needs one to come back after, such as []time.Duration{time.Second, time.Minute}")
	case len(r.Delays) > maxDelays:
		refuse("Delays may be %d at most, each has a queue; got %d", maxDelays, len(r.Delays))
	case r.Attempts >= 1 && len(r.Delays) > r.Attempts-1:
		refuse("Delays may be %d at most, one before each further attempt of %d; got %d", r.Attempts-1, r.Attempts, len(r.Delays))
	}
	for i, d := range r.Delays {
		switch {
		case d < minDelay, d > maxDuration, d%time.Millisecond != 0:
			refuse("Delays[%d] must be between %v and %v in whole milliseconds, got %v (a bare number counts nanoseconds: write 30*time.Second)", i, minDelay, maxDuration, d)
		case i > 0 && d <= r.Delays[i-1]:
			refuse("Delays must grow, but Delays[%d] is %v after %v", i, d, r.Delays[i-1])
		}
	}
}

// checkRetryOf checks the policy with its queue.
func (c *config) checkRetryOf(queue string, r *Retry) {
	refuse := func(format string, args ...any) { c.refuse("WithRetry", format, args...) }
	q := c.declare
	switch {
	case c.stream():
		refuse("is not for streams: nothing can be taken out of one. A failed message of a stream is tried again in place")
	case q != nil && (q.Exclusive || q.AutoDelete), queue == "" && c.topology == nil:
		refuse("is not for exclusive and auto-delete queues, nor for those that the broker names: the delayed messages would have nowhere to come back to")
	case queue != "" && r.Park == queue:
		refuse("Park is the queue %q itself", queue)
	}
	for _, d := range r.Delays {
		name := retryqueue.DelayName(queue, d)
		if name == r.Park {
			refuse("Park is %q, the queue of a delay", name)
		}
		if q != nil && q.DeadLetter != nil && q.DeadLetter.Queue == name {
			refuse("%q is the queue of a delay and cannot be the dead-letter queue", name)
		}
		c.shortString("WithRetry", "the name of the delay queue "+name, name)
	}
	if q != nil && !r.onlyParks() && (q.RetryMin > 0 || q.RetryMax > 0) {
		refuse("Attempts and Queue.RetryMin say in two ways what follows a failure; leave one out")
	}
}
