package steadymq

import (
	"errors"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

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
