package steadymqtest

import "time"

// Option changes how [NewBroker] makes a broker.
type Option func(*config)

type config struct {
	hosts           int
	latency         time.Duration
	tls             bool
	users           map[string]string
	heartbeat       int
	consumerTimeout time.Duration
	timeoutForm     TimeoutForm
	deadRetry       time.Duration
	noLedger        bool
	hooks           Hooks
	major, minor    int
}

// WithHosts gives the broker n addresses, mq1.test:5672 to mqN.test:5672: a cluster as its clients see it. Queues and messages are
// common to all; connections and faults belong to one, see [Broker.Host]. The default is 1.
func WithHosts(n int) Option { return func(c *config) { c.hosts = n } }

// WithLatency makes every byte take d from one end to the other, so a round trip takes 2d. The default is 0.
// [Faults.SetLatency] changes it later.
func WithLatency(d time.Duration) Option { return func(c *config) { c.latency = d } }

// WithTLS makes the broker speak TLS: URLs begin with amqps, port 5671, and clients need [Broker.TLSConfig].
func WithTLS() Option { return func(c *config) { c.tls = true } }

// WithUser adds a user; the first one replaces guest in the URLs. The default is the user guest with the password guest.
func WithUser(name, password string) Option {
	return func(c *config) { c.users[name] = password }
}

// WithHeartbeat sets the heartbeat in seconds that the broker suggests in connection.tune; a client may ask for a shorter one. The
// default is 60, as RabbitMQ's; 0 suggests none.
func WithHeartbeat(seconds int) Option { return func(c *config) { c.heartbeat = seconds } }

// TimeoutForm is what the broker does to a consumer that does not settle a delivery in time.
type TimeoutForm int

const (
	// Form406 is that of RabbitMQ up to 4.2: the channel is closed by 406 and everything unacked on it is requeued.
	Form406 TimeoutForm = iota
	// FormCancel is that of RabbitMQ 4.3 for quorum queues: the consumer is cancelled by basic.cancel and its overdue messages are
	// requeued, which the delivery limit does not count; what is not overdue may still be settled. The channel stays open, late
	// settlements have no effect, and the consumer tag is not free on this channel. Classic queues and streams have no timeout.
	FormCancel
	// FormOfVersion is FormCancel for 4.3 and later, Form406 before, see [WithVersion]. It is the form where a queue or a consumer
	// has a timeout of its own and WithConsumerTimeout was not used.
	FormOfVersion
)

// WithConsumerTimeout bounds how long a delivery may stay unsettled. The default is none (RabbitMQ: 30 minutes). A consumer or a
// queue may carry its own in the argument x-consumer-timeout, in milliseconds; it is then used with the form given here. Without
// this option that form is FormOfVersion. A consumer's own is for FormCancel only, a queue's for 3.12 and later, as in RabbitMQ.
//
// RabbitMQ looks for overdue deliveries once a minute in the 406 form; this broker acts on time in both.
func WithConsumerTimeout(d time.Duration, form TimeoutForm) Option {
	return func(c *config) { c.consumerTimeout, c.timeoutForm = d, form }
}

// WithDeadLetterRetry sets how long a quorum queue that dead-letters at least once waits before it tries again to give a dead
// message to a target that is not there or has refused it. The default is RabbitMQ's 3 minutes
// (dead_letter_worker_publisher_confirm_timeout).
func WithDeadLetterRetry(d time.Duration) Option { return func(c *config) { c.deadRetry = d } }

// WithVersion makes the broker behave as an older RabbitMQ where the generations differ, and say so in its server properties.
// The default is 4.3. Before 4.3 a nack counts towards x-delivery-limit as a reject does, and global qos is honoured; before 4.0
// quorum queues have no delivery limit unless one is set, and a nack from a stream consumer ends the connection by 540. See also
// docs/CONFORMANCE.md and, for the consumer timeout, [FormOfVersion].
func WithVersion(major, minor int) Option {
	return func(c *config) { c.major, c.minor = major, minor }
}

// WithoutLedger keeps no records, so that a broker that runs for hours does not grow.
func WithoutLedger() Option { return func(c *config) { c.noLedger = true } }

// WithHooks tells the test what happens as it happens, see [Hooks].
func WithHooks(h Hooks) Option { return func(c *config) { c.hooks = h } }

// Hooks are called after each event, in the order of the events, never two at a time and never while the broker is locked: a
// hook may call any method of the broker but Close. Any of them may be nil. A hook that blocks holds up the connection that
// caused the event.
type Hooks struct {
	Opened    func(ConnectionRecord)  // open-ok was sent
	Closed    func(ConnectionRecord)  // the broker has given up a connection that it had accepted
	Consuming func(ConsumerRecord)    // consume-ok was sent
	Cancelled func(ConsumerRecord)    // a consumer is gone, for whatever reason
	Published func(PublicationRecord) // a client's message is in its queues, returned or refused; Confirmed is still to come
	Delivered func(DeliveryRecord)
	Settled   func(SettlementRecord)
}
