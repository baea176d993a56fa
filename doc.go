// Package steadymq keeps RabbitMQ consumers consuming.
//
//	err := steadymq.Consume(ctx, url, "orders", func(ctx context.Context, d *steadymq.Delivery) error {
//		return process(ctx, d.Body) // nil acks, an error puts the message back
//	})
//
// It is built on github.com/rabbitmq/amqp091-go and heals from every failure that a broker, a
// network or a handler can produce: lost connections, closed channels, cancelled consumers, deleted
// queues, silent paths, set-ups that hang. [Consume] is the short form of [New] and [Consumer.Run].
//
// # Promises
//
//  1. Every delivery is settled at most once, with multiple=false, and only on the channel that
//     delivered it. A late ack returns [ErrStale] and puts nothing on the wire. A copy of a
//     [Delivery] is the same delivery.
//
//  2. Connection lost, channel closed, consumer cancelled, queue deleted, path gone silent, set-up
//     hung: the consumer is consuming again within a stated bound, for ever, until its context
//     ends. Only before the first session does [Consumer.Run] give up, on what cannot work.
//
//  3. Nothing of a dead session stays behind: socket, goroutines and timers are gone within a
//     stated bound, also when the path swallows packets.
//
//  4. Stopping drains: no handler starts once the context of Run has ended, running handlers finish
//     within the drain limit, the broker confirms their acks, everything else goes back.
//
//  5. At-least-once, with numbers: at most prefetch duplicates per lost session, none on a clean
//     stop.
//
//  6. With the defaults no message of a queue that [WithQueue] declares is lost because a handler
//     fails, however long: not by RabbitMQ's delivery limit, not by a message that cannot be read.
//
//  7. What one consumer of a [Group] does (406 again and again, a set-up that hangs or makes the
//     broker close the connection, a handler that never returns) does not disturb the others on its
//     connection beyond two reconnects.
//
// What it does not do: publish (but for the copies of failed messages, under [WithRetry]), AMQP
// 1.0, order across sessions, exactly-once, deduplication. Make handlers idempotent.
//
// # How a delivery flows
//
// The broker sends up to [WithPrefetch] messages ahead. Each becomes a [Delivery], waits for one of
// [WithConcurrency] workers, and passes the [Middleware] to the [Handler]. The handler's error
// decides the [Outcome]: nil acks; [Discard] drops the message, or dead-letters it; [Requeue] and
// [RequeueAfter] put it back; [Park] keeps it in another queue, with its cause; any other error,
// and a panic, put it back after a hold that grows with every failure ([WithRequeueDelay]), or are
// for the policy of [WithRetry]. On a stream a message is tried again in place instead. What no
// handler can be given goes to [Hooks].Unreadable, see [MessageError]. [Consumer.RunBatch] gives a
// [BatchHandler] several deliveries at once, each with an outcome of its own.
//
// # How a failure heals
//
// A session is one subscription on a channel of its own; [Delivery.Session] counts them. It is
// never repaired, only replaced: a new session has a new channel, so a late ack cannot settle a
// message of the next one. When a session is lost:
//
//   - the contexts of its running handlers end, with a [*SessionError] as [context.Cause], and what
//     they still settle is [Stale]: the broker delivers those messages again;
//   - messages that no handler has started are dropped here: the broker delivers them again, too;
//   - the [State] goes from [Consuming] to [Backoff], [Connecting] and [Consuming] again, each told
//     to log and [Hooks].
//
// A failure of the channel alone replaces the session on the same connection, at once. The third
// one within 30 s, like any failure of the connection, replaces the connection as well. When the
// broker cancels the consumer (basic.cancel), running handlers may still settle on the old channel
// while the next session consumes already.
//
// # Ways to take work
//
// [Consumer.Run] gives deliveries to a [Handler] one by one. [Consumer.RunBatch] gives several at
// once, [WithOrderingKey] keeps the order of those that belong together, [Consumer.Deliveries] is a
// loop in place of a handler, and [Later] leaves a delivery to be settled by somebody else.
// [Consumer.Pause], [WithBreaker] and [WithRate] let fewer handlers start, or none.
//
// # Many queues
//
// A [Group] runs the consumers of many queues on one connection, or on a few ([WithConnections]).
// Each has its own channel, workers, limits and healing, and its own [State], [Stats] and hooks.
// What concerns the connection happens once for all of them: the dial, the pace of retries, the
// line in the log, which says how many consumers it is about, and which connection if there are
// several. What a consumer suffers alone has the name of its queue. A consumer that cannot keep a
// session goes on on a connection of its own.
//
// # Options
//
// Defaults are in parentheses. [New] checks all options and returns every problem at once, each as
// an [*OptionError].
//
// Connection: where the broker is, how to log in there, and when a path counts as dead.
//
//   - [WithURLs] adds hosts of the same cluster (none)
//   - [WithURLFunc] asks a function for the URL before every dial (off)
//   - [WithCredentials] asks a function for user and password, and renews them (those of the URL)
//   - [WithSASL] sets the login mechanisms (PLAIN)
//   - [WithTLSConfig] sets certificates and roots for amqps (the roots of the system)
//   - [WithInsecureSkipVerify] trusts any certificate, for tests (off)
//   - [WithDialer] replaces the TCP dial: proxies, tunnels, tests ([net.Dialer])
//   - [WithHeartbeat] sets how soon a silent path is noticed (10 s)
//   - [WithDialTimeout] bounds a TCP connect (5 s)
//   - [WithConnectionName] names the connection for the management page (none)
//   - [WithConnections] sets how many connections the consumers of a [Group] share (1)
//
// Queue: what is consumed, what is declared before, and the arguments of the subscription.
//
//   - [WithQueue] declares the queue, its bindings, exchange and dead-letter queue (it must exist)
//   - [WithTopology] declares by a function of your own (none)
//   - [WithConsumeArgs] sets arguments such as x-priority and x-stream-offset (none)
//   - [WithStreamOffsets] keeps the place in a stream in a store of yours (none)
//   - [WithExclusive] asks to be the only consumer (off)
//   - [WithStreamOffsets] keeps the place in a stream over restarts (off)
//   - [WithConsumerTag] sets the prefix of the consumer tags (steadymq)
//
// Work: how many handlers run, what is sent ahead to them, and how acks leave.
//
//   - [WithConcurrency] sets how many handlers run at once (1)
//   - [WithPrefetch] sets how many unsettled messages are sent ahead (32, or the concurrency)
//   - [WithBatch] sets how many messages a [BatchHandler] gets, and how long they wait (100, 100 ms)
//   - [WithOrderingKey] handles messages of one key in the order of the queue (off)
//   - [WithOrderingKey] handles messages of the same key one at a time, in order (none)
//   - [WithMiddleware] wraps the handler, for policies and tracing (none)
//   - [WithHandlerTimeout] ends the context of a handler that takes too long (off)
//   - [WithWriteDelay] bounds how long acks wait to share a system call (1 ms)
//   - [WithRate] bounds how many handlers start in a time (no limit)
//   - [WithMaxMessageSize] keeps larger messages from the handlers (no limit)
//
// Failure: what follows when a handler fails, a session is lost or the queue goes silent.
//
//   - [WithRequeueDelay] sets how long a failed message is held (1 s, doubled up to 15 min)
//   - [WithRetry] lets it wait at the broker instead, and parks it in the end (off)
//   - [WithBreaker] lets no handler start while all fail (off)
//   - [WithBackoff] sets the pace of retries (250 ms, doubled up to 10 s)
//   - [WithFatal] decides which failures end Run (what cannot work, before the first session)
//   - [WithStallDetector] replaces sessions that are alive on paper only (off)
//
// Limits: how long setting up and ending may take.
//
//   - [WithSetupTimeout] bounds a try, from the dial to the subscription (15 s)
//   - [WithCloseTimeout] bounds the orderly close of session and connection (5 s)
//   - [WithDrainTimeout] bounds how long a stop waits for running handlers (20 s)
//
// Observation: log and hooks; [Consumer.State] and [Consumer.Stats] tell the rest at any time.
//
//   - [WithLogger] sets the logger ([slog.Default])
//   - [WithHooks] sets functions that are told what happens (none)
//
// # Decisions that look odd
//
//   - The driver's own recovery (Config.Recovery) is never used. It reuses the channel, on which
//     delivery tags start at 1 again: a handler that outlives a reconnect acks another message, and
//     is told nothing.
//   - A function of yours (dialer, topology, credentials, URL) that ignores the end of its context
//     is left behind and counted in [Stats].Abandoned. What it still opens is closed.
//   - Hooks and log lines have a goroutine of their own, since a blocked hook or a full log pipe
//     must not stop the healing.
//   - Deliveries and acks do not pass through the driver's buffers, though they use its connection
//     and channel. A message and its ack take two allocations that way, where the driver takes 37.
//   - Headers that the driver refuses and RabbitMQ accepts are read: any number of them, deeply
//     nested, larger than a frame. What still cannot be read ends no session, since the next one
//     would be given the same message again.
//   - A failed handler is basic.reject, a delivery that was never started basic.nack: since
//     RabbitMQ 4.3 only the former counts towards a quorum queue's delivery limit.
//   - A message of a stream that is tried again is another [Delivery] each time, so that nothing
//     left over from an earlier try can settle it.
//
// docs/DESIGN.md in the repository tells how it works inside.
//
// # Concurrency
//
// All exported functions and methods may be called by any number of goroutines. No goroutine runs
// before [Consumer.Run], and none after it but for handlers and functions of yours that ignore the
// end of their context. Package steadymqtest has a broker in the process, for tests.
package steadymq
