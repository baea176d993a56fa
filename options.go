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

// Option configures a [Consumer]. [New] checks all options and returns every problem at once. A
// later option overrides an earlier one of the same name; only [WithMiddleware] adds up. A value
// that is out of its range is told even if a later option overrides it; of queues, URLs and TLS
// configurations only the last is looked at. The package comment lists the options by concern.
type Option func(*config)

// ofConnection is an option of the connection. In a Group all consumers share that, so only the
// group can be given it.
func ofConnection(name string, o Option) Option {
	return func(c *config) {
		c.ofConnection = append(c.ofConnection, name)
		o(c)
	}
}

// Connection: where the broker is, how to log in there, and when a path counts as dead.

// WithURLs adds hosts of the same cluster to the URL given to [New]. The host that worked last is
// tried first, then the others in random order. A host that refused, fell silent, said that it
// shuts down, showed a certificate that is not trusted or does not speak AMQP goes last for a
// minute.
//
// Default: only the URL of [New]. New refuses an empty list, a URL that it would refuse itself, and
// [WithURLFunc] beside it.
func WithURLs(urls ...string) Option {
	return ofConnection("WithURLs", func(c *config) {
		c.urls = append(c.urls[:1:1], urls...)
		if len(urls) == 0 {
			c.refuse("WithURLs", "needs at least one URL")
		}
	})
}

// WithURLFunc asks f for the URL before every dial: for credentials that rotate or hosts that move.
// It takes the place of the URL given to [New], which is then not looked at and may be "".
//
// ctx ends with the limit of [WithSetupTimeout]. An error of f is retried like a refused dial, see
// [WithBackoff]; it must not hold a secret, for it is logged. A URL that [New] would refuse, or
// that contradicts an option (amqp beside [WithTLSConfig]), is not dialled: f is asked again after
// 1 s, then up to 30 s. f is called by one goroutine at a time for each connection
// ([WithConnections], and the one of [WithRetry]), unless a call that ignored the end of its ctx
// was left behind.
//
// Default: none. New refuses nil, and [WithURLs] beside it.
func WithURLFunc(f func(ctx context.Context) (string, error)) Option {
	return ofConnection("WithURLFunc", func(c *config) {
		c.urlFunc = f
		if f == nil {
			c.refuse("WithURLFunc", "must not be nil")
		}
	})
}

// WithCredentials asks f for user name and password before every dial, in place of those in the
// URL: for passwords that rotate and tokens that expire. The login mechanism is PLAIN.
//
// If they expire ([Credentials]), f is asked again at 70 % of their life, and the broker is given
// the new password on the connection that stands (connection.update-secret,
// https://www.rabbitmq.com/docs/oauth2#token-expiration); another user name counts from the next
// dial. Where that fails it is tried again in 70 % of what is left of their life, then after 1 s
// and up to 30 s.
//
// ctx ends with the limit of [WithSetupTimeout]. An error of f is retried at the pace of
// [WithBackoff], with the next host if there is one; it must not hold a secret, for it is logged.
// Each connection calls f from one goroutine at a time; several connections, as for a moment after
// a reconnect or under [WithRetry], may call it at once.
//
// Default: none. New refuses nil, [WithSASL] beside it, and a URL with auth_mechanism.
func WithCredentials(f func(ctx context.Context) (Credentials, error)) Option {
	return ofConnection("WithCredentials", func(c *config) {
		c.credentials = f
		if f == nil {
			c.refuse("WithCredentials", "must not be nil")
		}
	})
}

// WithSASL sets the login mechanisms (https://www.rabbitmq.com/docs/access-control#mechanisms),
// best first, in place of the URL's user and password: for example &amqp.ExternalAuth{} with a
// client certificate. The first one that the broker offers is used.
//
// A mechanism is asked for its name and its response at every dial, concurrently by consumers that
// share it. One that panics, or does not answer within the limit of [WithSetupTimeout], is a failed
// try. Default: PLAIN, or the auth_mechanism of the URL. New refuses an empty list, a mechanism
// that is nil, [WithCredentials] beside it, and a URL with auth_mechanism.
func WithSASL(mechanisms ...amqp.Authentication) Option {
	return ofConnection("WithSASL", func(c *config) {
		c.sasl = slices.Clone(mechanisms)
		if len(mechanisms) == 0 {
			c.refuse("WithSASL", "needs at least one mechanism")
		}
		for _, m := range mechanisms {
			if isNil(m) {
				c.refuse("WithSASL", "a mechanism is nil, or a nil pointer")
			}
		}
	})
}

// WithTLSConfig sets the TLS configuration of amqps URLs (https://www.rabbitmq.com/docs/ssl). It is
// copied, with its RootCAs and Certificates: for certificates that change set GetClientCertificate
// or VerifyConnection, which are called at every dial. ServerName, if it is empty, is that of the
// host dialled. MinVersion is at least TLS 1.2.
//
// Default: the roots of the system and the URL's own cacertfile, certfile, keyfile and
// server_name_indication. New refuses nil, TLS below 1.2, a URL with the scheme amqp or with one of
// those parameters, and InsecureSkipVerify without VerifyConnection or VerifyPeerCertificate,
// unless [WithInsecureSkipVerify] is given as well.
func WithTLSConfig(t *tls.Config) Option {
	return ofConnection("WithTLSConfig", func(c *config) {
		c.tls = copyTLS(t)
		switch {
		case t == nil:
			c.refuse("WithTLSConfig", "must not be nil; leave it out for the system's roots")
		case t.MinVersion != 0 && t.MinVersion < tls.VersionTLS12,
			t.MaxVersion != 0 && t.MaxVersion < tls.VersionTLS12:
			c.refuse("WithTLSConfig", "TLS below 1.2 is refused; raise MinVersion and MaxVersion")
		}
	})
}

// WithInsecureSkipVerify does not verify the broker's certificate, as InsecureSkipVerify of a
// [tls.Config] does: anyone on the path can then read the password. For tests only. Off by default.
// New refuses it for URLs with the scheme amqp, which have no TLS.
func WithInsecureSkipVerify() Option {
	return ofConnection("WithInsecureSkipVerify", func(c *config) { c.insecure = true })
}

// WithDialer replaces the TCP dial: for proxies, tunnels and tests (Broker.Dialer of package
// steadymqtest). dial has the signature of [net.Dialer.DialContext]; TLS is done on top of what it
// returns. ctx ends with the limits of [WithDialTimeout] and [WithSetupTimeout]. It may be called
// by several goroutines at once. A connection that it returns together with an error is closed.
//
// Default: a [net.Dialer] with TCP keep-alive and, on Linux, TCP_USER_TIMEOUT at 1.5 heartbeats,
// which notices a path that loses only what is sent; a dialer of your own should set both. New
// refuses nil.
func WithDialer(dial func(ctx context.Context, network, address string) (net.Conn, error)) Option {
	return ofConnection("WithDialer", func(c *config) {
		c.dial = dial
		if dial == nil {
			c.refuse("WithDialer", "must not be nil")
		}
	})
}

// WithHeartbeat sets the heartbeat that is asked for when a connection is opened (connection.tune,
// https://www.rabbitmq.com/docs/heartbeats). The lower of the broker's and this one is used. A
// silent peer is noticed within 1.5 heartbeats.
//
// Default 10 s, or the heartbeat parameter of the URL dialled. Range: whole seconds, 1 s to 10 min;
// New refuses anything else. Below 5 s a busy network raises false alarms.
func WithHeartbeat(d time.Duration) Option {
	return ofConnection("WithHeartbeat", func(c *config) {
		c.heartbeat = d
		c.set.heartbeat = true
		if d < time.Second || d > 10*time.Minute || d%time.Second != 0 {
			c.refuse("WithHeartbeat", "must be whole seconds between 1s and 10m, got %v", d)
		}
	})
}

// WithDialTimeout bounds one TCP connect, name resolution included. [WithSetupTimeout] bounds it as
// well. Default 5 s, or the connection_timeout parameter of the URL dialled, in milliseconds. Range
// 1 ms to 24 h.
func WithDialTimeout(d time.Duration) Option {
	return ofConnection("WithDialTimeout", func(c *config) { c.dialTimeout = d; c.set.dialTimeout = true; c.duration("WithDialTimeout", d) })
}

// WithConnectionName sets the name that the broker's management page and log show for the
// connection (the client property connection_name,
// https://www.rabbitmq.com/docs/connections#client-provided-names). Default: none. 1 to 255 bytes.
func WithConnectionName(name string) Option {
	return ofConnection("WithConnectionName", func(c *config) {
		c.connectionName = name
		if name == "" || len(name) > 255 {
			c.refuse("WithConnectionName", "must have 1 to 255 bytes, got %d", len(name))
		}
	})
}

// WithConnections sets how many connections the consumers of a [Group] share. The next consumer is
// lent the one with the fewest. A connection whose channels are used up (channel_max) opens a
// further one by itself. Where there are several, log lines about one of them tell its number
// (connection). Default 1. Range 1 to 65535. [New] refuses it: a Consumer alone has one.
func WithConnections(n int) Option {
	return ofConnection("WithConnections", func(c *config) { c.connections = n; c.count("WithConnections", n) })
}

// Queue: what is consumed, what is declared before, and the arguments of the subscription.

// WithQueue declares the queue given to [New], and what goes with it, before every session (see
// [Queue]): exchange, dead-letter queue, queue, bindings. q is copied, with all that it holds.
//
// Default: the queue must exist; as long as it does not, it is asked for again. New refuses a q
// that contradicts itself or that RabbitMQ is known to refuse, and [WithTopology] beside it.
func WithQueue(q Queue) Option {
	return func(c *config) {
		own := q // New completes it
		c.declare = &own
	}
}

// WithTopology sets the function that declares what a session needs, where [WithQueue] cannot say
// it; see [TopologyFunc] for what it may do. Default: none. New refuses nil, and [WithQueue] beside
// it.
func WithTopology(declare TopologyFunc) Option {
	return func(c *config) {
		c.topology = declare
		if declare == nil {
			c.refuse("WithTopology", "must not be nil; leave it out when the queue exists already")
		}
	}
}

// WithConsumeArgs sets the arguments of basic.consume, such as "x-priority"
// (https://www.rabbitmq.com/docs/consumer-priority), "x-consumer-timeout" or "x-stream-offset". The
// table is copied, with all that it holds. Default: none. New refuses what AMQP cannot carry.
//
// A stream (https://www.rabbitmq.com/docs/streams) is consumed like any queue, but the consumer has
// to know that it is one: by "x-stream-offset" here ("first", "last", "next", a number, a
// [time.Time] or an interval such as "1h"), or by [WithQueue]. Then later sessions of the same Run
// resume at the first message not yet settled, and skip nothing that was published meanwhile. A
// stream has no requeue: a message put back is given to a handler again, see [WithRequeueDelay].
// "last" is the last chunk, as RabbitMQ has it. A number that the stream has not reached yet is
// waited for.
//
// Without an offset, and for "next", "last", an interval, and a time in the future or of the last
// five minutes, the place is looked up before the first session of a Run, so that a session lost
// before its first delivery skips nothing either. The look takes consumers that the broker shows
// for a moment; they settle nothing and read about a chunk of the stream. RabbitMQ answers from its
// messages at once. Where none comes within some 30 ms, as in an empty stream, or where the look is
// cut off, the place is a time by the clock here, less five minutes: a session that follows one
// without a delivery may then be given messages from up to five minutes earlier, and skips none as
// long as the clock here is at most five minutes fast. This was checked on RabbitMQ 3.10, 4.0 and
// 4.3.
//
// If the stream itself was deleted, the next one of its name is read from its beginning. A stream
// that others delete and declare anew within a moment, or while the consumer is away, looks like
// the old one until it is as long: give it a new name. [WithStallDetector] notices one that grows,
// and reads it from its beginning. Where the consumer declares the stream it looks for it first, by
// a passive declare, which needs the configure permission on RabbitMQ 4.3; without that, a new
// stream looks like the old one.
func WithConsumeArgs(args amqp.Table) Option {
	return func(c *config) {
		c.consumeArgs = c.takeTable("WithConsumeArgs", "", args)
	}
}

// WithExclusive asks to be the only consumer of the queue (the exclusive flag of basic.consume,
// https://www.rabbitmq.com/docs/consumers). As long as the queue has another consumer the broker
// refuses (403 "in exclusive use"), and the try is repeated. Off by default. New refuses it beside
// a [WithQueue] of a type other than "classic": quorum queues and streams ignore it, use
// x-single-active-consumer in [Queue].Args.
func WithExclusive() Option {
	return func(c *config) { c.exclusive = true }
}

// WithConsumerTag sets the prefix of the consumer tags, which the broker's management page lists
// and log lines show. Every subscription has a tag of its own: the prefix, a random part, the
// number of the try and that of the session. Default "steadymq". 1 to 200 bytes of UTF-8.
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

// Work: how many handlers run, what is sent ahead to them, and how acks leave.

// WithConcurrency sets how many handlers run at once. It holds across reconnects: a handler that is
// still busy with a delivery of a lost session counts. Default 1, which also starts handlers in the
// order in which a session's messages are delivered; a message that failed comes later than those
// behind it. A goroutine of a handler starts with the first delivery that finds none waiting. Range
// 1 to 65535.
func WithConcurrency(n int) Option {
	return func(c *config) { c.concurrency, c.set.concurrency = n, true; c.count("WithConcurrency", n) }
}

// WithPrefetch sets how many unsettled messages the broker may send ahead (basic.qos
// prefetch_count, per consumer, https://www.rabbitmq.com/docs/consumer-prefetch). Default 32, or
// the concurrency where that is higher; for batches what [WithBatch] says. Range: the concurrency
// to 65535; New refuses 0, which would mean "no limit" to the broker and the whole queue in memory
// here.
//
// It is also the most messages that can be delivered twice when a session is lost. Up to RabbitMQ
// 4.2 each of them counts towards a quorum queue's delivery limit (20 by default since 4.0), also
// those that no handler has seen, and also when a consumer stops in order: after 21 restarts with
// the same messages prefetched the broker drops them. Keep the prefetch small there, or set
// x-delivery-limit. Since 4.3 only failures count.
//
// No other consumer gets what is prefetched here: two consumers with slow handlers share the queue
// prefetch by prefetch, and one may be idle while the other has a whole prefetch to do. The last
// prefetched message waits for prefetch/concurrency handlers. Keep that below half of the broker's
// consumer timeout (https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout); more is
// logged, once in a Run.
func WithPrefetch(n int) Option {
	return func(c *config) { c.prefetch = n; c.set.prefetch = true; c.count("WithPrefetch", n) }
}

// WithBatch sets how many deliveries [Consumer.RunBatch] and [Group.HandleBatch] give to a
// [BatchHandler] at once: up to size, and fewer once wait has passed since the first of them was
// taken. A further message does not start the wait again.
//
// Default: 100 and 100 ms. Range: size 1 to 65535, and at most that many times [WithConcurrency],
// which is how many batches are handled at once; wait 1 ms to 15 min, half of RabbitMQ's consumer
// timeout, or half of an x-consumer-timeout that is given. The prefetch, unless [WithPrefetch] is
// given, is then twice size times the concurrency, so that the next batches are on their way while
// some are handled, but at least 32 and at most 65535. What is refused: a WithPrefetch below size
// times the concurrency, with which no batch fills; [WithMiddleware], which wraps single
// deliveries, and [WithOrderingKey], which orders them; and WithBatch itself by [Consumer.Run],
// [Consumer.Deliveries] and [Group.Handle]. Given to [NewGroup] it is for the consumers of
// HandleBatch.
func WithBatch(size int, wait time.Duration) Option {
	return func(c *config) {
		c.batches, c.batchSize, c.batchWait = true, size, wait
		if !inRange(size) {
			c.refuse("WithBatch", "size must be between 1 and 65535, got %d", size)
		}
		if wait < minDuration || wait > maxBatchWait {
			c.refuse("WithBatch", "wait must be between %v and %v, got %v (a bare number counts nanoseconds: write 100*time.Millisecond)", minDuration, maxBatchWait, wait)
		}
	}
}

// WithOrderingKey handles messages that have the same key one at a time, in the order of the queue,
// and those of other keys side by side, by up to [WithConcurrency] handlers. "" means no order for
// this message. A message that waits for an earlier one of its key occupies one place of the
// prefetch, and no worker.
//
// The next message of a key starts once the one before it is settled and its handler has returned:
// that of a lost session, too, which may still be at work. What becomes of a message decides about
// those behind it:
//
//   - A plain error, and a panic, hold the key. The message is tried again in place, after the hold
//     of [WithRequeueDelay], with [Delivery.Attempt] one higher, as another [Delivery]; the broker
//     does not count that. Other keys go on.
//   - An ack, [Discard] and [Park] let the key go on; Park once the broker has confirmed the copy.
//   - [Requeue], [RequeueAfter] and a message that has been here for half of the consumer timeout
//     (15 min by default) put it back into the queue, and behind it all later ones of its key that
//     are here or on their way, so that they come again in order. Up to RabbitMQ 4.2 each way back
//     counts towards a delivery limit. A quorum queue without a delivery limit puts back at its
//     end up to RabbitMQ 3.13; the order of the key survives that for 5 minutes. Messages of one key
//     with the same id and body may change places then.
//
// After a lost session the broker delivers again what was not acked, in order: a key may step back,
// never jump. Where the broker cancels the consumer, or the connection is to go, the next session
// begins when the handlers have finished, after the drain limit at the latest. What a stop finds
// unstarted goes back when they have finished, too.
//
// The order is that within this consumer, and two things can break it. Other consumers of the
// queue, in this process or another, get messages of the same keys; and a broker that has not
// noticed the end of a connection yet keeps what that was given, and delivers what comes after it.
// Declare the queue with x-single-active-consumer against both: one consumer gets all, the others
// stand by. To share the work, use several such queues behind an exchange that hashes the key
// (x-consistent-hash), and consume from all of them. Priorities, and a message that comes back from
// a dead-letter queue, are no order of a queue either.
//
// key is called once for each delivery, by several goroutines at once, before the handler, and must
// not settle the delivery. A message whose key it does not find, because it panics, fails in no
// order, as if its handler had ([*PanicError]), and is put back after its hold. It should return at
// once, and [WithHandlerTimeout] does not count for it: later messages wait for its answer, for a
// second at most; then they go on without that message, which keeps its worker until the function
// returns, and fails.
//
// With it the default of [WithPrefetch] is 10 times the concurrency, 32 at least. On a stream acks
// go in the order of the stream, as ever. New refuses nil, the Delays of [WithRetry] and
// Queue.RetryMin, by which messages would be overtaken. Default: none, messages are handled side by
// side in no order.
func WithOrderingKey(key func(*Delivery) string) Option {
	return func(c *config) {
		c.orderingKey = key
		if key == nil {
			c.refuse("WithOrderingKey", "must not be nil; leave it out for no order")
		}
	}
}

// WithMiddleware wraps the handler. The first [Middleware] is the outermost. Given several times,
// the options add up. The wrapping is done at the beginning of every Run and bounded by
// [WithSetupTimeout]. Default: none. New refuses nil; [Consumer.Run] refuses a middleware that
// returns a nil handler.
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

// WithHandlerTimeout ends a handler's context after d, with the cause [ErrHandlerTimeout]. What the
// handler then returns decides the outcome as usual. A handler that does not return keeps its
// worker: it is logged, at most once a minute, and counted in [Stats].Overdue.
//
// Off by default. Range 1 ms to 24 h. Keep it below half of the broker's consumer timeout (30 min
// by default), which would otherwise end the session.
func WithHandlerTimeout(d time.Duration) Option {
	return func(c *config) { c.handlerTimeout = d; c.duration("WithHandlerTimeout", d) }
}

// WithWriteDelay sets the longest that an ack may wait for others, to share a system call with
// them. It waits only while more deliveries are at hand whose acks will follow, and the broker has
// prefetch left; a lone ack leaves at once. Each message still has an ack of its own
// (multiple=false). Default 1 ms. Range 0 to 100 ms; 0 shares only what piles up during another
// write.
func WithWriteDelay(d time.Duration) Option {
	return ofConnection("WithWriteDelay", func(c *config) {
		c.writeDelay = d
		if d < 0 || d > maxWriteDelay {
			c.refuse("WithWriteDelay", "must be between 0 and %v, got %v", maxWriteDelay, d)
		}
	})
}

// WithMaxMessageSize keeps messages with a body of more bytes from the handlers. None of such a
// body is kept in memory, but all of it crosses the network. The session goes on;
// [Hooks].Unreadable and a log line tell of the message, and [MessageError] says what becomes of
// it. It will come again: set the limit well above what publishers may send, and treat the hook as
// an alarm. A larger message that a [TopologyFunc] fetches (basic.get) ends the connection.
//
// Default: no limit (the broker's max_message_size, 16 MiB since RabbitMQ 4.0, applies to
// publishers). Range: 1 and up.
func WithMaxMessageSize(bytes int64) Option {
	return func(c *config) {
		if bytes < 1 {
			c.refuse("WithMaxMessageSize", "must be at least 1 byte, got %d; leave it out for no limit", bytes)
			return
		}
		c.maxMessage = uint64(bytes)
	}
}

// Failure: what follows when a handler fails, a session is lost or the queue goes silent.

// WithRequeueDelay sets how long a message whose handler returned a plain error, or panicked, is
// held before it goes back to the queue (basic.reject with requeue). The hold is first, and twice
// as long for every delivery that the broker has counted ([Delivery.Attempt]), up to longest. Each
// hold is drawn from half to one and a half of that, and is never above longest. Classic queues do
// not count, so there a hold is at most 3 times first. On a stream the message is not put back but
// tried again in place, after the same holds.
//
// Default 1 s and 15 min, half of RabbitMQ's consumer timeout. Range 1 ms to 24 h; New refuses a
// longest below first.
//
// The holds keep a failing message from spinning between broker and consumer. They also make the
// default delivery limit of quorum queues (20 since RabbitMQ 4.0) last two to three hours while a
// dependency is away, instead of 25 s.
//
// A held message is unsettled: it occupies one place of the prefetch, but no worker. Fewer failing
// messages than the prefetch do not stop the others; as many do, and on a stream one is enough,
// since nothing behind it is acked. From half of the prefetch on this is logged, and [Stats].Held
// shows it. Where that may happen, [WithRetry] lets failed messages wait in queues of their own
// instead, or Queue.RetryMin, from RabbitMQ 4.3 on, in their own. Return [Discard] or [Park] for
// messages that can never succeed.
//
// With WithRetry these holds are left for a message whose handler asks for [Park] where the policy
// has no Park queue.
func WithRequeueDelay(first, longest time.Duration) Option {
	return func(c *config) {
		c.requeueFirst, c.requeueLongest, c.set.requeueDelay = first, longest, true
		c.duration("WithRequeueDelay", first)
		c.duration("WithRequeueDelay", longest)
		if longest < first {
			c.refuse("WithRequeueDelay", "the longest hold must not be below the first, got %v and %v", longest, first)
		}
	}
}

// WithRetry sets what becomes of a message whose handler returned a plain error or panicked: it
// leaves the queue, comes back after a delay, and is parked or discarded when it has failed
// r.Attempts times. What a handler asks for, by [Discard], [Requeue], [RequeueAfter] or [Park],
// comes before the policy; a [*DecodeError] gives the message up at once.
//
// A failed message is published to the queue of its delay or to the park queue, mandatory and with
// a confirm, on a connection that consumes nothing; only once the broker has confirmed the copy is
// the message acked. So it is always in some queue, and may be in two if a connection is lost in
// between: duplicates, never losses. While copies are not confirmed (a queue that is full or
// missing, an alarm, no connection) their messages are held, count in [Stats].Held, and are tried
// again, after 1 s and up to 30 s; the consumer goes on within its prefetch. After half of the
// consumer timeout (15 min by default) such a message goes back to its queue, and a handler gets it
// once more. It goes back by basic.nack, which no delivery limit counts from RabbitMQ 4.3 on.
// Before that every way back counts: where a quorum queue has a limit (20 by default since 4.0,
// that is 5 h of a park queue that stays full; each restart counts, too), its messages are dropped
// or dead-lettered then, and a line warns before. So give the queue none (x-delivery-limit -1,
// which [WithQueue] asks for by itself), or Queue.DeadLetter. A stop waits for the confirms of
// copies under way, within its drain limit; what is not confirmed by then goes back to the queue.
//
// That connection is opened with the first failed message, to the same hosts with the same options,
// and closed when no message has failed for a minute. A Consumer alone has its own and the
// consumers of a [Group] share one, beside those of [WithConnections]. So [WithDialer],
// [WithURLFunc] and [WithCredentials] are called for it, too, maybe while the other connection
// calls them. Its name is that of [WithConnectionName] with " (retry)" behind it, and
// [Stats].Connections and Dials count it, or [GroupStats] do.
//
// The copy has body and properties as they came, but for CC, BCC, user_id, expiration and the
// headers that begin with x-. These headers are added: steadymq-attempt (how many attempts have
// failed), -error (1 KiB at most), -error-type, -queue, -exchange, -routing-key, -time, -host,
// -consumer and -copy (an id of the copy). A message whose own headers leave no room for these in a
// frame is held, and told. The policy counts by steadymq-attempt alone, so over restarts, and no
// lost session counts; [Delivery.Attempt] may be higher, since the broker's count is looked at
// there, too, and falls back to the policy's with each copy. The handler sees exchange and routing
// key as they were at first. Messages that wait do not keep their order.
//
// The queue of a delay is <queue>.retry.<delay>, as in orders.retry.1m30s: durable, a quorum queue
// unless [WithQueue] declares a classic one, with x-message-ttl, and it dead-letters back to the
// queue (x-dead-letter-exchange "", x-dead-letter-routing-key <queue>), as a quorum queue with
// x-dead-letter-strategy at-least-once and x-overflow reject-publish: where the queue cannot be
// reached as the delay ends, RabbitMQ tries again after 3 minutes. All consumers of a queue share
// them. They, and the park queue (durable, with no arguments but its type and, from RabbitMQ
// 4.0 on, x-delivery-limit -1 of a quorum queue), are declared before the first session consumes,
// if they do not exist in this or another form; a queue whose delay or way back differs, that
// expires, or that is a stream, is refused as that of a delay, and that, before the first session,
// is Run's error. A park queue that drops its head when it is full loses what is parked. Queues of
// delays that a policy no longer names go on leading back.
//
// The user needs write permission on the default exchange, which permissions call amq.default; to
// declare the queues, configure permission on them, and read permission on those of delays. Without
// these they have to be declared by hand, as described here; from RabbitMQ 4.3 on the user needs
// some permission on each, be it read or write, to find it.
//
// With it, do not write into the bytes of d.Body or the entries of d.Headers: the copy has the same
// ones. New refuses it on streams, as far as the options say that the queue is one (on another it
// would append failed messages to the stream), on exclusive and auto-delete queues and on those
// that the broker names; [Retry] says the ranges. Default: none, a failed message is held and put
// back, see [WithRequeueDelay]. For one queue of a Group whose others have a policy,
// WithRetry(Retry{}) given to [Group.Handle] is none, too.
func WithRetry(r Retry) Option {
	return func(c *config) {
		r.Delays = slices.Clone(r.Delays)
		c.retry = &r
		if c.by == "Handle" && r.Attempts == 0 && r.Delays == nil && r.Park == "" {
			c.retry = nil
		}
	}
}

// WithStreamOffsets keeps the place in the stream in a store of yours, so that a later Run goes on
// exactly behind what was handled, also in another process. The offset that [WithConsumeArgs] gives
// is then for the first time ever: it counts as long as the store has no place for the stream.
//
// The place is loaded before a Run subscribes, once for each stream, by the name of the stream. It
// is saved at most once a second, if it has moved, and once more at the end of the Run, when the
// handlers are done. It moves over messages that were acked or discarded, in the order of the
// stream, after the ack was sent: one slow or failing message keeps it from moving, however much
// behind that is done. So it is never ahead of what was handled: a process that ends without a last
// save gets some messages again, and none is left out. Where a look has found the place for offsets
// such as "next" and "last" (see WithConsumeArgs), that is saved before the first message comes.
//
// A store that fails costs duplicates after a restart, never a message. A Load that fails, or takes
// longer than half of the limit of [WithSetupTimeout], is a failure of the set-up (a
// [*SessionError] with Op "offsets"): nothing is consumed, it is tried again after up to 10 s
// ([WithBackoff]), and Run never ends because of it, unless [WithFatal] says so. A Save may take as
// long as [WithCloseTimeout] says; if it fails, the newest place is saved a second later. Nothing
// waits for it but the end of Run, within that same limit for all saves together. No other Save is
// begun while one that was left behind has not returned. Failed calls count in
// [Stats].OffsetsFailed, and a line in the log tells of saves, once a minute, with how long they
// have failed.
//
// A stream that was deleted counts from 0 again, and so does the place. At the start the message
// before the place is looked for: if three looks, some seconds apart, find none there or behind it,
// and the stream is empty or gives an earlier message, it was made anew, and is read from its
// beginning; one that gives nothing at all is looked at again. One that has grown beyond the place by
// then looks like the old one: give it a new name. Where the stream has dropped what it held at the
// place, it is read from the first message that is left.
//
// One consumer at a time may keep the place of a stream: of two, the faster one would take the
// other's messages for handled. [Group.Handle] refuses a second consumer of the same stream with
// the same store. For two readers of a stream, give each a store of its own, or one that adds a
// name to the key. The same holds where an x-stream-filter changes: what the old one left out lies
// before the place.
//
// New refuses nil, and a queue that is no stream as far as the options say; name it one by
// "x-stream-offset" in WithConsumeArgs, or by [WithQueue]. Default: none, a Run begins where
// WithConsumeArgs says.
func WithStreamOffsets(s OffsetStore) Option {
	return func(c *config) {
		c.offsets = s
		if isNil(s) {
			c.refuse("WithStreamOffsets", "the store must not be nil; leave the option out for none")
			c.offsets = nil
		}
	}
}

// WithBreaker lets no handler start while handlers only fail, because what they depend on is down.
// After b.Failures handlers in a row have failed (returned an error or panicked) the breaker opens:
// running handlers finish, no other starts, and what was prefetched waits, unsettled, so that no
// delivery limit counts it. After b.Wait one message is let through, one in all, whatever
// [WithConcurrency] says and whatever becomes of the session. If its handler succeeds the breaker
// closes; if it fails the breaker waits twice as long, up to the longer of b.Wait and a minute. What
// handlers return that began before the breaker opened changes nothing then, and an error that does
// not count lets another message through at once.
//
// A batch ([Consumer.RunBatch]) counts as one, by the error of its handler or, in a [BatchError],
// by the first one of a message. The one that is let through has a single message.
//
// Failures are what handlers return, see [Breaker]; errors of a handler whose session was lost do
// not count. While the breaker is open the state is [Paused], and its StateChange has a
// [*BreakerError] as its Cause; [Stats] has BreakerOpen and BreakerOpened. [Consumer.Pause] comes
// first, and [Consumer.Resume] leaves the breaker as it is. It survives sessions and Runs. A handler
// that never returns, of the one message let through, keeps it open: set [WithHandlerTimeout], and
// heed the context.
//
// What waits goes back to the queue when the breaker has been open for half of the consumer timeout
// during one session (15 min by default), since the broker would take it back with the session
// later. With a b.Wait of more than a minute it goes back after a minute, as in a pause, and the
// consumer subscribes again for the next message. Each time it goes back RabbitMQ up to 4.2 counts
// it, see [Consumer.Pause]: prefer a Wait of up to a minute.
//
// Each try is a failure of its message, which a delivery limit counts: on a queue of others with 20
// tries (RabbitMQ's default since 4.0) an outage of five to ten hours takes what was prefetched
// there. Give that queue no limit, see [WithQueue].
//
// In a [Group] each consumer has a breaker of its own. Default: none.
func WithBreaker(b Breaker) Option {
	return func(c *config) {
		c.breaker = &b
		c.checkBreaker(&b)
	}
}

// WithRate lets no more than n handlers start in each per: a token bucket that holds n/10 tokens, at
// least one, and gets them one by one, n in each per. So in any time of k times per no more than
// k*n + n/10 handlers start (k*n + 1 if n is below 10). Messages wait for it before they are given to
// a handler: that costs no [WithHandlerTimeout], and a stop puts them back at once. Stats.Throttled
// tells how many wait.
//
// Of batches ([Consumer.RunBatch]) it counts each as one.
//
// The rate is that of one Consumer, with all its workers and over all its sessions and Runs; in a
// [Group] each consumer has its own. Other processes do not know of it. Tries in place, on a stream,
// count.
//
// Unless [WithPrefetch] is given, the prefetch is no more than what starts within a quarter of the
// consumer timeout (7.5 min by default), and at least the concurrency. Default: no limit. Range: n 1
// to 1,000,000, per 1 ms to 24 h; New refuses a rate at which one message takes longer than half of
// the consumer timeout.
func WithRate(n int, per time.Duration) Option {
	return func(c *config) {
		c.rate = &rate{n, per}
		c.checkRateItself(c.rate)
	}
}

// WithBackoff sets the pace of retries: the n-th wait in a row for the same kind of failure is
// drawn from 0 to initial*2^(n-1), at most limit. Default 250 ms and 10 s. Range: 1 ms to 24 h
// each; New refuses a limit below initial. For a fleet choose a limit of at least (number of
// consumers)/100 seconds.
//
// When a healthy session is lost the first retry is at once (within 20 ms), and so is the first try
// of another host. No wait exceeds a limit given here, but some failures have a pace of their own:
//
//   - A refused dial costs the broker nothing, so its waits are at most 1 s.
//   - A queue or an exchange that does not exist is asked for after 1 s, then up to 5 s.
//   - What an operator has to mend (permissions, arguments, certificates) is tried again after 1 s,
//     then up to 30 s.
//   - What is locked by another connection is tried every 0.5 to 1 s, for as long as the broker may
//     need to notice that its owner is gone (3 heartbeats and 5 s), then as what an operator has to
//     mend.
func WithBackoff(initial, limit time.Duration) Option {
	return ofConnection("WithBackoff", func(c *config) {
		c.retryInitial, c.retryCap = initial, limit
		c.set.backoff = true
		c.duration("WithBackoff", initial)
		c.duration("WithBackoff", limit)
		if limit < initial {
			c.refuse("WithBackoff", "the limit must not be below the initial wait, got %v and %v", initial, limit)
		}
	})
}

// WithFatal decides which failures end [Consumer.Run]: Run returns the error for which fatal
// returns true. fatal is given every failure, a [*SessionError], those before the first session
// included. It takes the place of the rule that Run follows by default: to give up on what the
// broker states plainly before the first session, and never after it.
//
// fatal is called on a goroutine of its own, one call at a time, and Run waits for its answer. If
// it panics, or does not return within the limit of [WithSetupTimeout], Run ends with an error that
// says so. Default: none. New refuses nil.
func WithFatal(fatal func(error) bool) Option {
	return func(c *config) {
		c.fatal = fatal
		if fatal == nil {
			c.refuse("WithFatal", "must not be nil; leave it out to retry for ever")
		}
	}
}

// WithStallDetector replaces a session that is alive on paper only: heartbeats pass, and messages
// do not. It acts when for the given time no byte of a delivery came and nothing was settled,
// although the prefetch is not full. Then it asks for the queue, by a passive declare on a channel
// of its own. The silence is a stall if one of these holds, and still holds up to 5 s later:
//
//   - The queue has messages and this consumer is its only one (a quorum queue without majority),
//     or the queue has no consumer at all (a forgotten one).
//   - It is a stream, and has grown since the last look.
//   - A majority of the hosts, of three or more, say that messages wait for this consumer, or that
//     the stream is longer than here: this host is cut off. They are asked over connections for one
//     question each, which [Stats] does not count.
//   - The queue does not answer within the limit of [WithSetupTimeout], which here counts the
//     silence after the last bytes of a delivery, and at most ten times as long.
//
// The session then ends with a cause that says so, and its connection with it. The next one is
// opened to another host if there is one; behind one URL of a load balancer, or with [WithURLFunc],
// wherever that leads. From the beginning of the silence this takes at most twice the given time
// and 5 s, on a stream three times, plus the time of the answers.
//
// It cannot see a stall in these cases:
//
//   - The queue has other consumers, for then silence is normal (single active consumer,
//     priorities).
//   - It is a stream that the consumer does not know to be one, see [WithConsumeArgs], or whose
//     x-stream-offset is a number ahead of it.
//   - The broker does not let it ask (RabbitMQ 4.3 wants the configure permission), or the
//     connection has no channel left (channel_max). A warning says so, once in a Run.
//   - The queue was empty when its leader lost the majority: what is published since is in no queue
//     before the majority is back (seen on RabbitMQ 4.0 and 4.3: "0 messages, 1 consumer").
//   - There are only one or two hosts, or one URL of a load balancer, or [WithURLFunc], and the
//     node is on the wrong side of a partition: there is nobody else to ask.
//
// It may take a consumer that waits for its turn for a stalled one if x-single-active-consumer is
// set, since a quorum queue counts only the active consumer. Declare such a queue by [WithQueue],
// so that this is known, or leave the detector out.
//
// No session gets messages from a queue without majority. Replacing it helps where another host has
// one.
//
// Off by default; 1 minute is a good value. Range 1 s to 24 h. New refuses it beside
// x-stream-filter, which makes silence normal.
func WithStallDetector(after time.Duration) Option {
	return func(c *config) {
		c.stallAfter = after
		if after < time.Second || after > maxDuration {
			c.refuse("WithStallDetector", "must be between 1s and %v, got %v", maxDuration, after)
		}
	}
}

// Limits: how long setting up and ending may take.

// WithSetupTimeout bounds a whole try, from the dial to the broker's consume-ok, [WithQueue] and
// [WithTopology] included. When it has passed the socket is closed or, where another session lives
// on it, the channel (channel.close). Of a connection that others have dialled it bounds the part
// of this consumer, from its turn on: at most 32 of a [Group] are set up at the same time. Default
// 15 s, which leaves a broker its own 10 s of handshake (handshake_timeout) and 3 s of silence
// after a wrong password. Range 1 ms to 24 h.
//
// On a connection that stands already, deliveries may be in the way of the broker's answers, on a
// slow path for minutes. There the limit counts the silence after the last bytes of a delivery, and
// a try takes ten times the limit at most.
func WithSetupTimeout(d time.Duration) Option {
	return func(c *config) { c.setupTimeout = d; c.duration("WithSetupTimeout", d) }
}

// WithCloseTimeout bounds the orderly end of a session (basic.cancel, channel.close) and that of
// its connection (connection.close). When it has passed the socket is closed or, where another
// session lives on it, the channel. Default 5 s. Range 1 ms to 24 h. For a session it counts the
// silence after the last bytes of a delivery, which may be in the way of the broker's answer, as
// long as the limit of [WithDrainTimeout] allows.
func WithCloseTimeout(d time.Duration) Option {
	return func(c *config) { c.closeTimeout = d; c.duration("WithCloseTimeout", d) }
}

// WithDrainTimeout bounds how long running handlers may take to finish once the consumer stops, or
// once the broker has cancelled it (https://www.rabbitmq.com/docs/consumer-cancel) and handlers
// still work on its deliveries. When it has passed their contexts end, with a [*DrainError] as the
// cause if the consumer stops, and the broker delivers their messages again.
//
// Default 20 s: with [WithCloseTimeout] and a second more that is less than the 30 s that
// Kubernetes gives by default (terminationGracePeriodSeconds). Range 1 ms to 24 h.
func WithDrainTimeout(d time.Duration) Option {
	return func(c *config) { c.drainTimeout = d; c.duration("WithDrainTimeout", d) }
}

// Observation: log and hooks.

// WithLogger sets the logger. Default: [slog.Default], as it is when Run begins. For silence give
// slog.New(slog.DiscardHandler). New refuses nil. Its [slog.Handler] is called on a goroutine of
// its own, one line at a time, so that a slow one delays no recovery; what it cannot keep up with
// is dropped and counted in [Stats].EventsDropped. In a [Group] each consumer has such a goroutine,
// and each connection. There is no line for each message. A panic of the [slog.Handler] ends Run,
// see [Hooks].
//
// A change of state is one line, with queue and consumer tag: WARN for a failure, ERROR when Run
// gives up, else INFO; tries, and what is left out, are DEBUG. An hour of any outage is at most 100
// lines of INFO and above:
//
//   - A failure whose cause repeats is told at its 1st, 2nd, 4th, 8th ... time and at least every
//     minute, with the count (repeated); where it ends sessions that have just begun to consume, at
//     least every 90 s. Counting starts anew once a session has lasted 10 minutes.
//   - A new cause is told at once. Where causes change all the time, at most 12 are told and then
//     one every 5 minutes, beside the one a minute. Causes that differ only in the host, an IP
//     address or a number of more than three digits are the same.
//   - After a failure that was told, "consuming" is told too, with how long the consumer was away
//     (down): at once, or after 2 s (up) where the session before had not lasted that long.
//
// What handlers return is told at WARN, a panic with its stack at ERROR: at most one line a second,
// fewer if it goes on, and at least one a minute, with the count of those left out (suppressed).
// [Hooks].HandlerFailed is told of every one. Durations are texts, such as "1.5s".
func WithLogger(logger *slog.Logger) Option {
	return func(c *config) {
		c.logger = logger
		if logger == nil {
			c.refuse("WithLogger", "must not be nil; use slog.New(slog.DiscardHandler) for silence")
		}
	}
}

// WithHooks sets the functions that are told what happens, see [Hooks]. Default: none. New refuses
// hooks of which all are nil. Given again, or to one consumer of a [Group], it replaces all that
// were set before.
func WithHooks(hooks Hooks) Option {
	return func(c *config) {
		c.hooks = hooks
		if hooks.StateChanged == nil && hooks.HandlerFailed == nil && hooks.Unreadable == nil && hooks.Settled == nil {
			c.refuse("WithHooks", "all hooks are nil; set at least one or leave the option out")
		}
	}
}

// build applies the options of a Consumer and checks what they say together.
func build(url, queue string, opts []Option) (*config, error) {
	c := defaults(url, queue)
	apply(c, opts)
	if slices.Contains(c.ofConnection, "WithConnections") {
		c.refuse("WithConnections", "is for NewGroup, whose consumers share connections; a Consumer alone has one")
	}
	c.checkURLs()
	c.checkQueue()
	c.checkTogether()
	c.checkBatches()
	c.checkRate()
	c.checkRetry()
	c.checkOffsets()
	c.checkOrder()
	return c, errors.Join(c.problems...)
}

// buildGroup applies the options that the consumers of a Group share. What only a queue can show to
// be wrong is checked with the queue, by buildMember.
func buildGroup(url string, opts []Option) (*config, error) {
	c := defaults(url, "")
	c.by = "NewGroup"
	apply(c, opts)
	c.checkURLs()
	c.checkTogether()
	c.checkRate()
	c.checkRetry()
	c.checkOrder()
	if c.declare != nil {
		c.declare = c.takeQueue(c.declare)
	}
	return c, errors.Join(c.problems...)
}

// buildMember applies the options of one consumer of a Group, after those of the group.
func buildMember(of *config, queue string, batches bool, opts []Option) (*config, error) {
	c := of.clone(queue)
	if batches {
		c.by = "HandleBatch"
	}
	apply(c, opts)
	if c.batches && !batches {
		c.refuse("WithBatch", "has no effect on Handle, whose handler takes one delivery; leave it out, or call HandleBatch")
	}
	c.batches = batches
	for _, name := range c.ofConnection {
		c.refuse(name, "belongs to the connection, which all consumers of a Group share: give it to NewGroup")
	}
	c.checkQueue()
	c.checkTogether()
	c.checkBatches()
	c.checkRate()
	c.checkRetry()
	c.checkOffsets()
	c.checkOrder()
	for i, problem := range c.problems {
		c.problems[i] = named(problem, queue)
	}
	return c, errors.Join(c.problems...)
}

func apply(c *config, opts []Option) {
	for i, opt := range opts {
		if opt == nil {
			c.refuse(c.by, "option %d is nil", i+1)
			continue
		}
		opt(c)
	}
}
