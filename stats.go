package steadymq

import (
	"sync/atomic"
	"time"
)

// State is what a Consumer is doing.
type State int32

const (
	// Idle: Run has not been called yet.
	Idle State = iota
	// Connecting: dialling, logging in, or setting up a session.
	Connecting
	// Consuming: the broker has confirmed the consumer (consume-ok).
	Consuming
	// Backoff: waiting before the next try.
	Backoff
	// Draining: stopping; running handlers finish.
	Draining
	// Stopped: Run has returned, or is about to.
	Stopped
)

// String gives the state in lower case.
func (s State) String() string {
	switch s {
	case Idle:
		return "idle"
	case Connecting:
		return "connecting"
	case Consuming:
		return "consuming"
	case Backoff:
		return "backoff"
	case Draining:
		return "draining"
	case Stopped:
		return "stopped"
	}
	return "unknown"
}

// Hooks are told what happens. Any of them may be nil. A hook must not call Run, and
// none is called any more once Run has returned.
//
// A panic in a hook is a fault of the program, not of the path to the broker: it
// is recovered, no hook is called any more, Run drains and returns an *OptionError for
// WithHooks with the *PanicError inside, and so does every later Run of that Consumer.
// A panic in the handler of WithLogger ends Run likewise.
type Hooks struct {
	// StateChanged is called for every change of state, in order and never
	// concurrently, on a goroutine of its own: a slow hook delays no
	// recovery. If it falls 1,024 changes behind, further ones are dropped
	// and counted in Stats.EventsDropped. The last call, with To == Stopped,
	// is made before Run returns; none comes after.
	StateChanged func(StateChange)

	// HandlerFailed is called when a handler returned an error or panicked
	// (*PanicError), but not for an error after its session was lost or the drain
	// limit had passed. It is called on the goroutine of its worker, concurrently
	// with other workers, after the outcome was decided. It delays that worker.
	HandlerFailed func(d *Delivery, err error)

	// Unreadable is called for every delivery of a message that no handler can be
	// given, because its headers cannot be read or its body is too large. It is called
	// where StateChanged is, with the same limits. See MessageError for what becomes of
	// the message.
	Unreadable func(*MessageError)

	// Settled is called once for every delivery given to a handler, when its
	// outcome is decided: Acked, Requeued and Discarded when it is sent, by the
	// handler's error or by hand; Stale when it came too late and was not sent. A
	// held message (WithRequeueDelay, RequeueAfter) is told when it goes back, or as
	// Stale if its session ended first. d is the delivery that the handler got, also
	// where a copy of it was settled.
	//
	// On a stream Acked and Discarded tell that the handler is done with the message,
	// not yet that it was sent: acks go in the order of the stream, so the ack waits for
	// the messages before it, and if the session is lost meanwhile the message comes
	// again. Requeued tells of a try in place that follows, and nothing is sent;
	// where the consumer stops first, a later one starts at that message.
	//
	// It is called on the goroutine that settles, which it delays, concurrently
	// with others; for messages that were held when their session ended on that of
	// StateChanged, and with its limit. A delivery whose handler is still running
	// when Run returns is not told.
	Settled func(d *Delivery, o Outcome)
}

// StateChange is one change of a Consumer's state.
type StateChange struct {
	// Time is when it happened.
	Time time.Time
	// From and To are the states.
	From, To State
	// Queue is the queue consumed from: the one given to New until a session
	// knows better.
	Queue string
	// ConsumerTag is the tag of the current session's subscription, which the
	// broker's management page lists; "" where there is no session.
	ConsumerTag string
	// Session is the number of the current or last session, 0 before the first.
	Session uint64
	// Host is the broker's address, "" where none is involved.
	Host string
	// Attempt counts the failures in a row, 0 while all is well. A row ends with a
	// session that proves itself: by a settlement and 10 s, or by 70 s.
	Attempt int
	// RetryIn is the wait before the next try, in Backoff only.
	RetryIn time.Duration
	// Cause is why: a *SessionError in Backoff, why Run gives up in Draining (nil if its context
	// has ended), Run's error in Stopped.
	Cause error
}

// Stats is a snapshot of a Consumer's counters, over all its Runs.
type Stats struct {
	// State is what the Consumer is doing.
	State State
	// Sessions counts sessions that reached consuming, Connections the
	// connections opened, Dials the tries.
	Sessions, Connections, Dials uint64
	// Handling is the number of handlers running now.
	Handling int
	// Held is the number of messages that failed, or that cannot be read, and wait,
	// unsettled, until they go back to the queue or, of a stream, are tried again. They take up the
	// prefetch: once all of it is held nothing else is delivered.
	Held int
	// Overdue is the number of handlers that are still running a second or more
	// after their timeout (WithHandlerTimeout).
	Overdue int
	// Delivered counts deliveries given to a handler, each try in place included.
	// It is the sum of Acked, Requeued, Discarded and Stale plus those not settled yet.
	Delivered uint64
	// Acked, Requeued and Discarded count settlements that were sent. Of a stream they
	// count what was decided: the ack of a message that was acked or discarded waits for
	// those before it, and Requeued counts the tries in place, which send nothing.
	Acked, Requeued, Discarded uint64
	// Stale counts settlements that came after the end of their session and
	// were not sent; the broker delivers those messages again.
	Stale uint64
	// Failed counts handlers that returned an error or panicked. An error after the
	// end of the handler's session, or after the drain limit, is none: it cost
	// nothing, for the broker has the message back.
	Failed uint64
	// Unreadable counts deliveries that no handler could be given, see MessageError.
	// Of the numbers above only Held counts them, for as long as they are held.
	Unreadable uint64
	// Abandoned counts what could not be ended in time: a user's function
	// that ignored its context, or a teardown that outlasted its limit.
	Abandoned uint64
	// EventsDropped counts changes of state no hook or log line told, because
	// the hook or the logger was too slow.
	EventsDropped uint64
}

type counters struct {
	sessions, connections, dials atomic.Uint64
	handling, held, overdue      atomic.Int64
	delivered, failed, stale     atomic.Uint64
	unreadable                   atomic.Uint64
	outcomes                     [Stale]atomic.Uint64 // by Outcome
	abandoned, eventsDropped     atomic.Uint64
}
