package steadymq

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
)

// The errors that users meet, with the advice in their texts, the reasons for which the library
// itself ends something, and what the broker's own errors mean. Every other file uses them.

// Errors of settling a [Delivery]. All of them leave the wire untouched. Match them by [errors.Is].
var (
	// ErrStale is returned by a settlement that comes too late: the session that delivered the
	// message is over, the broker has put the message back and will deliver it again. Nothing was
	// sent. A handler that sees it has done work that will be done once more; make the work
	// idempotent. It may be wrapped: use [errors.Is].
	ErrStale = errors.New("steadymq: stale delivery: its session is over and the broker delivers the message again; nothing was sent")

	// ErrSettled is returned by the second and every later settlement of one [Delivery], whatever
	// the outcomes. Nothing was sent.
	ErrSettled = errors.New("steadymq: this delivery is already settled; nothing was sent")

	// ErrMultiple is returned by a settlement with multiple=true: it would settle the deliveries of
	// other handlers that are still at work. Nothing was sent and the delivery is still unsettled.
	// A handler that leaves it so and returns nil has failed with this error.
	ErrMultiple = errors.New("steadymq: multiple=true is refused, it would settle deliveries that other handlers still work on; settle each delivery on its own")
)

// Errors of [Consumer.Run], of its sessions and of the contexts of handlers. Match them by
// [errors.Is].
var (
	// ErrRunning is returned by [Consumer.Run], and yielded by [Consumer.Deliveries], of a
	// [Consumer] that is running already. Make another Consumer for a second subscription. It is
	// inside the error of [Group.Run] if that was called before.
	ErrRunning = errors.New("steadymq: this Consumer is already running; make another Consumer with New for a second subscription")

	// ErrDrainTimeout is returned by [Consumer.Run] if handlers were still running, or deliveries
	// that they kept by [Later] unsettled, when the limit of [WithDrainTimeout] had passed.
	// [errors.As] with [*DrainError] tells how many.
	ErrDrainTimeout = errors.New("steadymq: drain limit passed")

	// ErrLoginRefused is inside a [*SessionError] with Op "open" when the broker did not let the
	// consumer in: it said so (403; an *amqp.Error is inside, too), it offers none of the login
	// mechanisms, or it ended the socket after 3 s of silence, which is how RabbitMQ refuses
	// clients that do not want to be told, and how other brokers may refuse all
	// (https://www.rabbitmq.com/docs/auth-notification).
	//
	// Before the first session it ends [Consumer.Run]: at once, or at the third refusal in a row if
	// the refusal was silence or if [WithURLFunc] or [WithCredentials] give the login.
	ErrLoginRefused = errors.New("login refused")

	// ErrHandlerTimeout is the cause ([context.Cause]) of a handler's context that ended by the
	// limit of [WithHandlerTimeout].
	ErrHandlerTimeout = errors.New("steadymq: handler timeout")
)

// ErrMessageTooLarge is inside a [*MessageError] about a message with a larger body than
// [WithMaxMessageSize] accepts.
var ErrMessageTooLarge = errors.New("the message is larger than the limit (WithMaxMessageSize)")

// Reasons for which the library itself ends something. They appear as causes inside a SessionError.
var (
	errSetupTimeout = errors.New("setup limit passed")
	errCloseTimeout = errors.New("close limit passed without an answer (WithCloseTimeout)")
	errDrainLimit   = errors.New("drain limit passed before the broker answered")
	errCancelled    = errors.New("the broker cancelled the consumer (basic.cancel): the queue was deleted or moved, or a delivery was held longer than the consumer timeout")
	errChannelEnded = errors.New("the channel ended without a reason from the broker")
	errStopped      = errors.New("the consumer was stopped")
	errStalled      = errors.New("stalled") // by WithStallDetector
	errMoved        = errors.New("the consumer goes on on another connection")
	errPaused       = errors.New("the consumer is paused, so what it was sent goes back to the queue")
	errUnconfirmed  = errors.New("drain limit passed before the broker had confirmed the copies of all messages that were to be parked or delayed: those messages go back to the queue, and a copy may exist (WithDrainTimeout)")

	// errSilentRefusal is what the end of the socket after 3 s of silence most probably means.
	errSilentRefusal = fmt.Errorf("%w: the broker ended the socket after 3s of silence, which is how RabbitMQ refuses a login without saying so: check user name, password and mechanism (a cut network path can look the same)", ErrLoginRefused)
)

// SessionError says at which step a session failed and why. It is the error of [Consumer.Run] when
// it gives up, the cause ([context.Cause]) of a handler's context whose session was lost, and what
// hooks and log lines carry. Get it by [errors.As].
//
// Unwrap returns the reason: one that holds an *amqp.Error with Server set if the broker said it,
// else [ErrLoginRefused], the error of the network ([net.Error], [io.EOF],
// [*tls.CertificateVerificationError]) or one of the library's limits. It never holds a password.
type SessionError struct {
	// Queue is the queue consumed from, "" as long as the broker or a [TopologyFunc] has not named
	// it.
	Queue string
	// Host is the broker's address, "" if no host was involved.
	Host string
	// Op is the step: "dial" (TCP, DNS), "open" (TLS, login, virtual host), "channel", "qos",
	// "topology" (the text says "declare" if it is [WithQueue] that failed), "offsets" (the store of
	// [WithStreamOffsets]), "consume", or "lost"
	// for a session that was consuming.
	Op string
	// Session is the number of the session, counted from 1 in each Run. If the try failed before
	// consuming it is the number that the session would have got.
	Session uint64
	// Err is the reason.
	Err error
}

// Error tells queue, session, step, host, reason and, if the broker refuses, what to do, in one
// line and each once: errors of the network are quoted without their addresses, those of the broker
// as "403 ACCESS_REFUSED - ...".
func (e *SessionError) Error() string {
	where := ""
	if e.Queue != "" {
		where = "queue " + e.Queue + ": "
	}
	step := e.step()
	if e.Host != "" {
		step += " " + e.Host
	}
	if e.Session > 0 { // a connection that only publishes has none
		where += fmt.Sprintf("session %d: ", e.Session)
	}
	return fmt.Sprintf("steadymq: %s%s: %s%s", where, step, e.reason(), advice(e.Op, e.Err))
}

// step returns the word for Op in a text. Users do not call the declarations of WithQueue a
// topology.
func (e *SessionError) step() string {
	if e.Op == "topology" && errors.As(e.Err, new(*declareError)) {
		return "declare"
	}
	return e.Op
}

// Unwrap returns the reason.
func (e *SessionError) Unwrap() error { return e.Err }

// MessageError tells of a message that no handler can be given: its headers cannot be read, or its
// body is larger than [WithMaxMessageSize] accepts. It is given to [Hooks].Unreadable and ends no
// session.
//
// The message is kept unsettled for 7.5 to 15 min, whatever [WithRequeueDelay] says, and occupies
// one place of the prefetch. Then it is put back into its queue (basic.nack with requeue, which
// counts towards a quorum queue's delivery limit up to RabbitMQ 4.2 only); a stop puts it back at
// once. So another consumer may get it, and it is told again when it comes back here. To get rid of
// it, take it out of the queue with a client that can read it. As many of them as the prefetch stop
// everything behind them. A stream keeps its messages, so there it is stepped over as if a handler
// had acked it.
type MessageError struct {
	// Queue is the queue that the message came from, Host the address of the broker, Session the
	// number of the session.
	Queue, Host string
	Session     uint64
	// Exchange and RoutingKey are what it was published with, "" if they cannot be read.
	Exchange, RoutingKey string
	// DeliveryTag is the broker's number for this delivery in its session.
	DeliveryTag uint64
	// Redelivered tells whether the broker has delivered it before, to any consumer.
	Redelivered bool
	// Size is the number of bytes that the broker announced for the body. None of them were kept.
	Size uint64
	// Err is the reason; it is [ErrMessageTooLarge], by [errors.Is], for a large body.
	Err error
}

// Error tells in one line which message it is, and the reason.
func (e *MessageError) Error() string {
	return fmt.Sprintf("steadymq: queue %s: the message with delivery tag %d (exchange %q, routing key %q, %d bytes) is given to no handler: %v",
		e.Queue, e.DeliveryTag, e.Exchange, e.RoutingKey, e.Size, e.Err)
}

// Unwrap returns the reason.
func (e *MessageError) Unwrap() error { return e.Err }

// OptionError is one refused argument of [New], of an option, of [Consumer.Run] or of
// [Consumer.Deliveries]. New joins all of them ([errors.Join]), so that one call shows every
// problem; [errors.As] finds the first.
type OptionError struct {
	// Option is the name of the option, or that of the function, such as "New", "Handle" or "Run",
	// for one of its own arguments.
	Option string
	// Reason says what was wrong and what is allowed.
	Reason string
}

// Error names the option and says what is allowed.
func (e *OptionError) Error() string {
	return "steadymq: " + e.Option + ": " + e.Reason
}

// PanicError is a panic of a function that the user has given, turned into an error, so that one
// bad message does not end the process. An error of the user that panics when it is read, as a nil
// pointer in an error does, becomes one too.
type PanicError struct {
	// Value is what the function panicked with, or a text in its place if that panics when it is
	// read. It is nil for a function that ended its goroutine by [runtime.Goexit], as
	// [testing.T.FailNow] does.
	Value any
	// Stack is the stack of the goroutine at the panic.
	Stack []byte
}

// Error tells the value; the stack is in Stack.
func (e *PanicError) Error() string {
	if e.Value == nil {
		return "steadymq: panic: runtime.Goexit was called"
	}
	return errtext.OneLine(fmt.Sprintf("steadymq: panic: %v", e.Value))
}

// Unwrap returns the value if it was an error.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// DrainError tells what was not done when the limit of [WithDrainTimeout] had passed. It is an
// [ErrDrainTimeout], by [errors.Is].
type DrainError struct {
	// Handlers is the number of handlers left. Their contexts are cancelled and their deliveries
	// unsettled: the broker delivers them again.
	Handlers int
	// Unsettled is the number of deliveries left that handlers kept by [Later]: the broker delivers
	// them again.
	Unsettled int
	// Limit is the drain limit that has passed.
	Limit time.Duration
}

// Error tells the numbers, the limit and what to do.
func (e *DrainError) Error() string {
	left, advice := number(e.Handlers, "handler", "handlers")+" still running", "let handlers end when their context does"
	kept := number(e.Unsettled, "delivery", "deliveries") + " kept for later and not settled"
	switch {
	case e.Unsettled > 0 && e.Handlers > 0:
		left += " and " + kept
	case e.Unsettled > 0:
		left, advice = kept, "settle what is kept before you stop"
	}
	return fmt.Sprintf("%v: %s after %v; what is unsettled goes back to the queue (%s, or raise WithDrainTimeout)", ErrDrainTimeout, left, e.Limit, advice)
}

func number(n int, one, more string) string {
	if n == 1 {
		more = one
	}
	return fmt.Sprintf("%d %s", n, more)
}

// Unwrap returns [ErrDrainTimeout].
func (e *DrainError) Unwrap() error { return ErrDrainTimeout }

// unprovenError is the broker's reason for closing a connection that several consumers share. It is
// that of one of them at most.
type unprovenError struct{ error }

func (e *unprovenError) Error() string {
	return e.error.Error() + "; another consumer of the connection may be the reason"
}

func (e *unprovenError) Unwrap() error { return e.error }

// advice says what to do about a refusal of the broker, whose own text says only what it refuses.
// Code and step decide, never the text, which repeats names of queues and users.
func advice(op string, err error) string {
	var brokerErr *amqp.Error
	switch {
	case errors.As(err, new(*storeError)):
		return ""
	case !errors.As(err, &brokerErr) || !brokerErr.Server:
		return adviceTLS(err)
	}
	switch kind := classifyBroker(brokerErr); {
	case kind == classAbsent:
		return "; it is asked for again until someone has declared it, which WithQueue or WithTopology can do"
	case kind != classOperator:
		return ""
	case op == "open" && brokerErr.Code == amqp.NotAllowed:
		return "; the path of the URL names the virtual host: it must exist, and the user needs permissions on it"
	case op == "open":
		return ""
	case brokerErr.Code == amqp.AccessRefused:
		return "; give the user the permission (rabbitmqctl set_permissions)"
	case op == "topology" && brokerErr.Code == amqp.PreconditionFailed:
		return "; what exists was declared otherwise: declare it alike, or delete it (its messages go with it)"
	}
	return ""
}

// adviceTLS says what to do about a certificate that is not trusted.
func adviceTLS(err error) string {
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return "; trust its CA by cacertfile in the URL or by WithTLSConfig (RootCAs)"
	case errors.As(err, new(x509.HostnameError)):
		return "; use a host name of the certificate in the URL, or name one by server_name_indication in the URL or by WithTLSConfig (ServerName)"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "; renew the broker's certificate, or set the clock of this host"
	}
	return ""
}

// reason returns the text of Err without what the rest of the sentence says: step and host, which
// the errors of net repeat, and the name of the library.
func (e *SessionError) reason() string {
	text := errtext.Plain(fmt.Sprint(e.Err), e.Err, e.Host != "")
	if e.Host != "" {
		text = strings.NewReplacer("dial "+e.Host+": ", "", " with "+e.Host, "").Replace(text)
	}
	return errtext.OneLine(strings.ReplaceAll(text, "steadymq: ", ""))
}

// reasonOf returns the text of a cause for a log line that has queue, session and host as
// attributes.
func reasonOf(cause error) string {
	at, ok := cause.(*SessionError) //nolint:errorlint // an error around it has a text of its own
	if !ok {
		return errtext.Brief(cause)
	}
	return errtext.Brief(errors.New(at.step()+": "+at.reason())) + advice(at.Op, at.Err)
}

// declareError is a failure of the declarations that WithQueue asks for.
type declareError struct{ err error }

func (e *declareError) Error() string { return e.err.Error() }

func (e *declareError) Unwrap() error { return e.err }

// storeError is a failure of the store of WithStreamOffsets. What it wraps is not about the broker,
// so an error of the driver is told and not shown.
type storeError struct{ err error }

func (e *storeError) Error() string { return e.err.Error() }

func (e *storeError) Unwrap() error {
	if errors.As(e.err, new(*amqp.Error)) || errors.Is(e.err, ErrLoginRefused) {
		return nil
	}
	return e.err
}

// named returns err with the queue that it is about, which a SessionError tells by itself.
func named(err error, queue string) error {
	if queue == "" || errors.As(err, new(*SessionError)) {
		return err
	}
	return fmt.Errorf("queue %s: %w", queue, err)
}

// What the broker's own words mean. The advice in an error follows that, and so does what Run does
// about a failure.

// class is a kind of failure, by what to do about it. Here it is read from what the broker says;
// classify in reconnect.go, which knows the other failures, too, begins with that. The table of
// retry says there how each class is retried.
type class int

const (
	// classNetwork: the path or the peer is gone, or misbehaves. Every error with Server=false
	// belongs here: the driver reports every failure of I/O as 501, and a socket lost in the
	// handshake as 403.
	classNetwork class = iota
	// classRefused: there was no TCP connection, so a try costs the broker nothing.
	classRefused
	// classForced: 320, the broker closes the connection: a stop, a drain, an operator, an expired
	// token. Another host is tried first.
	classForced
	// classChannel: channel.close or basic.cancel while the connection stands.
	classChannel
	// classLocked: another owner, most likely our own dead connection, still holds an exclusive
	// queue, the exclusive consumer or a connection slot. The lock goes when the broker closes that
	// connection, within 3 heartbeats.
	classLocked
	// classAbsent: a queue or an exchange does not exist. Somebody may declare it at any moment,
	// and asking again takes only a channel.
	classAbsent
	// classUnreachable: the queue exists, but this host cannot reach it: its node is down, has just
	// started, or has no replica of the stream. Another host helps, or a moment, and asking again
	// takes only a channel.
	classUnreachable
	// classOperator: someone has to change something: permissions, a virtual host, arguments. This
	// may happen at any moment, so the library keeps trying, slowly.
	classOperator
	// classPeer: the host is not the broker we want, because its certificate is not trusted or it
	// speaks another protocol. Another host is tried first, and this one as slowly as what an
	// operator has to change.
	classPeer
	// classStore: the store of WithStreamOffsets has failed, or its place is not in the stream. That
	// says nothing about any host.
	classStore
)

// phrase is a text of RabbitMQ: its reply code, how the text starts and how it ends. The names of
// queues, virtual hosts and users stand between the two.
type phrase struct {
	code       int
	start, end string
	class      class
}

// phrases distinguish what RabbitMQ says under one reply code, worded as in its releases 3.10 to
// 4.3. A name cannot decide, whatever it contains: start ends where the first name begins, and a
// text that ends in a name ends in the quote after it, while no end here ends in a quote.
var phrases = []phrase{
	// A connection that is dead but not yet closed by the broker may use up the limit.
	{amqp.NotAllowed, "access to vhost '", ") is reached", classLocked}, // connection limit (n)
	{amqp.NotAllowed, "access to vhost '", ": connection limit cannot be queried, timeout", classLocked},
	{amqp.NotAllowed, "connection refused for user '", ") is reached", classLocked}, // user connection limit (n)
	{amqp.NotAllowed, "connection refused: node connection limit (", "", classLocked},
	{amqp.NotAllowed, "number of channels opened for user '", "", classLocked},
	{amqp.NotAllowed, "number of channels opened on node '", "", classLocked},
	{amqp.AccessRefused, "queue '", " in exclusive use", classLocked},

	// The queue exists, but cannot be reached on this host.
	{amqp.NotFound, "home node '", " is down or inaccessible", classUnreachable},
	{amqp.NotFound, "queue '", " process is stopped by supervisor", classUnreachable},
	{amqp.NotFound, "failed to perform operation on queue '", "", classUnreachable}, // timeout, or the leader moves
	{amqp.PreconditionFailed, "stream queue '", " replica on the local node", classUnreachable},
	{amqp.PreconditionFailed, "queue 'queue '", " replica on the local node", classUnreachable}, // before 4.0

	// These are about deliveries: the consumer timeout, and an unknown tag.
	{amqp.PreconditionFailed, "delivery acknowledgement on channel ", "", classChannel},
	{amqp.PreconditionFailed, "unknown delivery tag ", "", classChannel},
}

// is reports whether e has the phrase. A text whose end was cut off for its length may have it, and
// counts as if it had: all phrases are about failures that pass by themselves.
func (p phrase) is(e *amqp.Error) bool {
	text, cut := wording(e)
	return e.Code == p.code && strings.HasPrefix(text, p.start) && (cut || strings.HasSuffix(text, p.end))
}

// wording returns what the broker says in e after the name of the code, and whether the text was
// too long for the protocol, which RabbitMQ marks by dots at its end.
func wording(e *amqp.Error) (text string, cut bool) {
	const longest = 255
	text = strings.TrimPrefix(strings.TrimLeft(e.Reason, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_"), " - ")
	return text, len(e.Reason) >= longest && strings.HasSuffix(text, "...")
}

// classifyBroker classifies a connection.close or channel.close of the broker: by the phrase where
// RabbitMQ uses one code for several failures, else by the code.
func classifyBroker(e *amqp.Error) class {
	for _, p := range phrases {
		if p.is(e) {
			return p.class
		}
	}
	switch e.Code {
	case amqp.ConnectionForced: // 320: stop, drain, close_connection, "credential expired"
		return classForced
	case amqp.ResourceLocked: // 405: exclusive queue of a connection not closed yet
		return classLocked
	case amqp.NotFound: // 404: queue not declared yet
		return classAbsent
	case amqp.AccessRefused, // 403: no permission
		amqp.NotAllowed,         // 530: no such virtual host
		amqp.PreconditionFailed, // 406: declared otherwise
		amqp.NotImplemented,     // 540: a combination that the type of the queue refuses
		amqp.InternalError:      // 541: virtual host down, quorum queue without leader, deprecated feature
		return classOperator
	}
	if e.Recover {
		return classChannel
	}
	return classNetwork // 501 to 505, 506: protocol errors end the connection
}

// noQueue reports whether err says that no queue of that name exists. A queue whose node is down
// exists, although its error has the same code.
func noQueue(err error, name string) bool {
	var brokerErr *amqp.Error
	if !errors.As(err, &brokerErr) || !brokerErr.Server || brokerErr.Code != amqp.NotFound {
		return false
	}
	text, cut := wording(brokerErr)
	want := "no queue '" + name + "' in vhost '"
	if cut {
		text = strings.TrimSuffix(text, "...")
		want = want[:min(len(want), len(text))]
	}
	return strings.HasPrefix(text, want)
}
