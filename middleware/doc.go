// Package middleware has ready-made policies and tools for handlers of steadymq.
//
//	steadymq.WithMiddleware(
//		middleware.Correlation,                  // outermost: what is inside can log the ids
//		middleware.Log(logger),                  // sees what the policies have decided
//		middleware.ParkAfter(5),                 // gives up on what has failed five times
//		middleware.Permanent(ErrNoSuchCustomer), // gives up at once on what cannot get better
//	)
//
// What is parked needs a queue to be parked in: [steadymq.WithRetry] names it, as in
// WithRetry(Retry{Park: "orders.parked"}). Without it such a message is held and put back.
//
// The first middleware is the outermost: it is called first and sees the error last. So what looks
// at the outcome stands before what decides it, and what adds to the context before what reads it.
// Where two policies apply the inner one decides, since none changes what another has decided.
//
// # Policies
//
// A policy rewrites a plain error, which would put the message back, into one that asks for another
// outcome. What the handler asks for itself by [steadymq.Discard], [steadymq.Park],
// [steadymq.Requeue], [steadymq.RequeueAfter] or [steadymq.Later] stays, wrapped or not, and so does what it has
// settled by hand. A panic of the handler counts as a plain error; whatever stands outside sees it
// as a [*steadymq.PanicError]. An error that the handler returned because its session was lost or
// the drain limit has passed stays as it is: it is no failure, and the broker has the message back.
// A handler that ends its goroutine by [runtime.Goexit] passes all policies, and its message is put
// back.
//
// Delayed retries need the broker, so they are an option of the consumer (WithRetry) and no
// middleware, which could stand in the wrong place. It acts on what the outermost middleware
// returns: on plain errors only. So [Log] does not know of it, and says "requeued" of what it delays
// or parks in the end; [steadymq.Hooks].Settled and the consumer's own log tell that.
//
// # How often a message was tried
//
// [DiscardAfter] and [ParkAfter] go by [steadymq.Delivery.Attempt], the number of the try as far as
// the broker tells:
//
//   - A quorum queue counts. Up to RabbitMQ 4.2 it counts every return, so one for each lost
//     session too, also of messages that no handler has seen: leave room above the tries that you
//     mean.
//   - A classic queue does not count, it only tells that a message was delivered before. There
//     Attempt is at most 2: a limit of 3 or more is never reached, and one of 2 gives up at the
//     first failure after any redelivery, such as that of a lost session. WithRetry counts by
//     itself, on queues of all kinds.
//   - Where a dead-letter exchange leads back to the queue by way of a queue that waits, each round
//     counts, on queues of all kinds. A Discard is one more round there: only ParkAfter gives up.
//   - On a stream each try in place counts, from 1 in each session.
//
// Publishers can forge the count.
//
// # Wrong arguments
//
// A function that is given wrong arguments (n below 1, a nil logger) returns a middleware that
// [steadymq.Consumer.Run] refuses before it dials, with a [*steadymq.OptionError] for each. To that
// end the middleware panics with that error when it is called, which a test that calls it by hand
// sees.
//
// # What is not here
//
// A time limit is [steadymq.WithHandlerTimeout], which also tells of handlers that take no notice of
// it. Panics are recovered by the library. Deduplication needs a store that commits with the work
// of the handler, so it belongs there.
package middleware
