// Package steadymq keeps RabbitMQ consumers consuming.
//
//	err := steadymq.Consume(ctx, url, "orders", func(ctx context.Context, d *steadymq.Delivery) error {
//		return process(ctx, d.Body) // nil acks, an error puts the message back
//	})
//
// It is built on github.com/rabbitmq/amqp091-go and heals from every failure a
// broker, a network or a handler can produce: lost connections, closed channels,
// cancelled consumers, deleted queues, silent paths, hung set-ups.
//
// # Promises
//
//  1. Every delivery is settled at most once, with multiple=false, only on the
//     channel that delivered it. A late ack returns [ErrStale] and puts nothing
//     on the wire. A copy of a [Delivery] is the same delivery.
//  2. Connection lost, channel closed, consumer cancelled, queue deleted, path
//     gone silent, set-up hung: the consumer is consuming again within a stated
//     bound, for ever, until its context ends.
//  3. Nothing of a dead session stays behind: socket, goroutines and timers are
//     gone within a stated bound, also when the path swallows packets.
//  4. Stopping drains: no handler starts once Run's context has ended, running
//     handlers finish within the drain limit, their acks are confirmed by close-ok,
//     everything else goes back.
//  5. At-least-once, with numbers: at most prefetch duplicates per lost session,
//     none on a clean stop.
//  6. With the defaults no message of a queue that [WithQueue] declares is lost because
//     a handler fails, however long: not by RabbitMQ's delivery limit, not by a message
//     that cannot be read.
//
// What it does not do: publish, AMQP 1.0, order across sessions, exactly-once,
// deduplication. Make handlers idempotent.
//
// # How a delivery flows
//
//	broker -> socket -> lane of the session -> worker -> middleware -> Handler
//	broker <- socket (shared writes) <- the same session's lane <- fence <- outcome
//
// The driver does all else on the same connection: handshake, heartbeats, set-up,
// cancel and close. It sees neither deliveries nor settlements.
//
// A session ([Delivery.Session]) is one channel with one subscription. It is never
// repaired, only replaced, on a fresh channel: that is what makes it impossible
// for a late ack to settle another message, because the channel it belongs to is
// closed for good. The handler's error decides the outcome: nil acks, [Discard]
// drops or dead-letters, [Requeue] and [RequeueAfter] put back, any other error and
// a panic put back after a hold that grows with every failure. On a stream a message
// is tried again in place instead.
//
// # How a failure flows
//
//	socket, connection.close, channel.close, basic.cancel -> notifier -> session ends with a cause
//	  handlers of that session: context cancelled with the cause, later settlements are stale
//	  supervisor: Consuming -> Backoff -> Connecting -> Consuming; one log line and one hook call each
//	  deliveries no handler has started are dropped: the broker delivers them again
//
// A failure of the channel replaces the session on the same connection at once; a
// third one within 30 s, or any failure of the connection, replaces both. After a
// basic.cancel the old channel stays open until its running handlers have settled,
// while the new session consumes already.
//
// # Decisions that look odd
//
//   - The driver's own amqp.Config.Recovery is never used. It reuses the channel,
//     and delivery tags start at 1 again: a handler that outlives a reconnect acks
//     another message and is told nothing.
//   - Every try runs on a goroutine of its own, because a user's dialer, topology or
//     credentials function may ignore its context. One that does is left behind,
//     counted in [Stats], and what it still opens is closed.
//   - Hooks and log lines have a goroutine of their own, because a blocked hook or a
//     full log pipe must not stop the healing.
//   - Deliveries and settlements go past the driver, which spends 37 allocations,
//     two locks and two goroutine hops on a message, where two allocations do.
//     It is the same connection and channel, and the values have the same types: a
//     fuzz test compares them with the driver's. Deliveries on a channel that the
//     broker has closed, and a second channel.close, are dropped on the way; the
//     driver would close the connection for them.
//   - Headers are read that the driver refuses, because RabbitMQ accepts them: any
//     number of them, tables nested 32,768 deep, a frame of 1 MiB where less was agreed.
//     What still cannot be read, or is larger than WithMaxMessageSize, ends no session,
//     for the next one would be given it again: see [MessageError].
//   - A failed handler is basic.reject, a delivery never started basic.nack: since
//     RabbitMQ 4.3 only the former counts towards a quorum queue's delivery limit.
//   - A message that is put back after a hold keeps its place in the prefetch but
//     not its worker: fewer poison messages than the prefetch cannot stop the others.
//     As many can, which is logged from half of the prefetch on ([Stats], Held).
//   - A message of a stream that is tried again is another [Delivery] each time, so
//     that nothing left over of an earlier try can settle it.
//
// docs/DESIGN.md in the repository has the rest.
//
// # Concurrency
//
// All exported methods may be called by any number of goroutines. No goroutine runs
// before Run and, but for handlers and functions that ignore their context, none
// after it.
package steadymq
