package steadymq

import (
	"sync/atomic"
	"time"
)

// What a Consumer shows of itself to its user: State, Hooks, StateChange and Stats, and the
// counters behind them.

// State is what a [Consumer] is doing, see [Consumer.State].
type State int32

const (
	// Idle: [Consumer.Run] has not been called yet.
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
	// Paused: no handler starts, because of [Consumer.Pause] or of [WithBreaker].
	Paused
)

// String returns the state in lower case.
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
	case Paused:
		return "paused"
	}
	return "unknown"
}

// Hooks are told what happens, see [WithHooks]. Any of them may be nil. No hook is called any more
// once [Consumer.Run] has returned; a hook must not call Run. Those that the consumers of a [Group]
// share are called for several of them at once: the order is that of each consumer.
//
// A panic in a hook is a fault of the program, not of the path to the broker. It is recovered, no
// hook is called any more, and Run drains and returns an [*OptionError] for WithHooks with the
// [*PanicError] inside, as does every later Run of that [Consumer]. A panic in the handler of
// [WithLogger] ends Run likewise.
type Hooks struct {
	// StateChanged is called for every change of state, in order and never concurrently, on a
	// goroutine of its own: a slow hook delays no recovery. It does delay the log lines, which wait
	// behind it: where a hook hangs, the log ends with the change that it was told of. If hooks and
	// log fall 1,024 events behind, further ones are dropped and counted in [Stats].EventsDropped.
	// The last call, with To == [Stopped], is made before Run returns, unless a hook or the logger
	// keeps it waiting for more than 0.5 s.
	StateChanged func(StateChange)

	// HandlerFailed is called when a handler has returned an error or panicked ([*PanicError]), or
	// has returned nil though its settlement by hand was refused ([ErrMultiple]). An error after
	// its session was lost, or after the drain limit has passed, is not told; a panic always is. It
	// is called after the outcome was decided, on the goroutine of the worker, which it delays,
	// concurrently with other workers.
	HandlerFailed func(d *Delivery, err error)

	// Unreadable is called for every delivery of a message that no handler can be given, because
	// its headers cannot be read or its body is too large ([WithMaxMessageSize]). It is called
	// where StateChanged is, with the same limits. [MessageError] says what becomes of the message.
	// One that comes while its session ends goes back untold, and is told when it comes again.
	Unreadable func(*MessageError)

	// Settled is called once for every delivery that a handler was given, when its outcome is
	// decided: [Acked], [Requeued] or [Discarded] when it is sent, by the handler's error or by
	// hand; [Parked] or [Delayed] when its copy was confirmed and its ack is sent; [Stale] when it
	// came too late and was not sent. A held message ([WithRequeueDelay], [RequeueAfter]) is told
	// when it goes back, one that was kept by [Later] when it is settled, and either as Stale if its
	// session has ended first. d is the delivery that the
	// handler got, also if a copy of it was settled.
	//
	// On a stream Acked and Discarded tell that the handler is done with the message, not yet that
	// it was sent: acks go in the order of the stream, so the ack waits for the messages before it,
	// and if the session is lost meanwhile the message comes again. Requeued tells of a try in
	// place that follows, and nothing is sent; if the consumer stops first, a later one starts at
	// that message.
	//
	// It is called on the goroutine that settles, which it delays, concurrently with others; for
	// messages that were held or kept when their session ended, on that of StateChanged and with
	// its limit. A delivery whose handler is still running when Run returns is not told.
	Settled func(d *Delivery, o Outcome)
}

// StateChange is one change of the [State] of a [Consumer], for [Hooks].StateChanged.
type StateChange struct {
	// Time is when it happened.
	Time time.Time
	// From and To are the states.
	From, To State
	// Queue is the queue consumed from: the one given to [New] until the broker or a [TopologyFunc]
	// has named another.
	Queue string
	// ConsumerTag is the tag of the current session's subscription, which the broker's management
	// page lists; "" if there is no session.
	ConsumerTag string
	// Session is the number of the current or last session, 0 before the first.
	Session uint64
	// Host is the address of the broker, "" if no host is involved.
	Host string
	// Attempt counts the failures in a row, 0 while all is well. A row ends with a session that
	// proves itself: by a settlement and 10 s, or by 70 s.
	Attempt int
	// RetryIn is the wait before the next try, in [Backoff] only.
	RetryIn time.Duration
	// Cause is why: a [*SessionError] in [Backoff]; in [Draining] why Run gives up, nil if its
	// context has ended; in [Stopped] Run's error; in [Paused] a [*BreakerError] if the breaker of
	// [WithBreaker] has opened, nil for [Consumer.Pause].
	Cause error

	consumers  int  // whose connection it is about, in the log of a Group; 0 in that of a consumer
	connection int  // its number, if there are several; else 0
	shared     bool // it is about a connection that others share, for which the Group's log has a line
}

// Stats is a snapshot of the counters of a [Consumer], over all its Runs; see [Consumer.Stats].
type Stats struct {
	// State is what the [Consumer] is doing.
	State State
	// Sessions counts the sessions that reached [Consuming], Connections the connections opened,
	// Dials the tries to open one; that of [WithRetry] counts. Of a Consumer of a [Group] the last
	// two are 0: see [GroupStats].
	Sessions, Connections, Dials uint64
	// Handling is the number of handlers running now; of a [BatchHandler] that of the messages that
	// they are given.
	Handling int
	// Held is the number of messages that failed, or that cannot be read, and wait unsettled until
	// they go back to the queue, until their copy is parked or delayed ([WithRetry]) or, on a
	// stream, until they are tried again. They take up the prefetch: once all of it is held nothing
	// else is delivered.
	Held int
	// Later is the number of deliveries that handlers have kept by [Later], or that a loop over
	// [Consumer.Deliveries] has gone on from, and that nobody has settled yet. They take up the
	// prefetch as those in Held do.
	Later int
	// Overdue is the number of handlers that are still running a second or more after the limit of
	// [WithHandlerTimeout].
	Overdue int
	// Delivered counts deliveries given to a handler, each try in place included. It is the sum of
	// Acked, Requeued, Discarded, Parked, Delayed and Stale, and of the deliveries not settled yet.
	Delivered uint64
	// Acked, Requeued and Discarded count settlements that were sent. Of a stream they count what
	// was decided: the ack of a message that was acked or discarded waits for those before it, and
	// Requeued counts the tries in place, which send nothing.
	Acked, Requeued, Discarded uint64
	// Parked and Delayed count messages whose copy the broker has confirmed in the park queue, or
	// in the queue of a delay, and which were then acked; see [WithRetry].
	Parked, Delayed uint64
	// Stale counts settlements that came after the end of their session and were not sent; the
	// broker delivers those messages again.
	Stale uint64
	// Failed counts failed handlers, of a [BatchHandler] the messages that failed, as
	// [Hooks].HandlerFailed is told of them: errors and panics. An error after the end of the
	// handler's session, or after the drain limit, is not counted: it cost nothing, since the
	// broker has the message back.
	Failed uint64
	// Unreadable counts deliveries that no handler could be given, see [MessageError]. Of the
	// numbers above only Held counts them, for as long as they are held.
	Unreadable uint64
	// GivenUp counts channels that were given up because their set-up, or a call on them, outlasted
	// its limit, also where the connection ended with them.
	GivenUp uint64
	// Abandoned counts what could not be ended in time: a user's function that ignored the end of
	// its context, or a teardown that outlasted its limit.
	Abandoned uint64
	// OffsetsFailed counts the calls of the store of [WithStreamOffsets] that failed, Load and Save.
	OffsetsFailed uint64
	// EventsDropped counts the events (changes of state, log lines, calls of hooks) that were not
	// told, because a hook or the logger was too slow.
	EventsDropped uint64
	// Throttled is the number of messages that workers have taken and that wait for the rate of
	// [WithRate]; during a pause they wait for its end, too.
	Throttled int
	// BreakerOpen tells whether the breaker of [WithBreaker] is open now, BreakerOpened counts how
	// often it has opened.
	BreakerOpen   bool
	BreakerOpened uint64
}

// counters are what Stats shows, over all Runs of a Consumer. Every goroutine of a Run counts in
// them.
type counters struct {
	sessions, connections, dials atomic.Uint64
	handling, held, overdue      atomic.Int64
	later                        atomic.Int64
	delivered, failed, stale     atomic.Uint64
	unreadable                   atomic.Uint64
	outcomes                     [outcomes]atomic.Uint64 // indexed by Outcome; stale ones count in stale
	abandoned, eventsDropped     atomic.Uint64
	givenUp, offsetsFailed       atomic.Uint64
}
