package steadymq

import (
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

// phrase is a text of RabbitMQ by its code, how it starts and how it ends. Between the
// two stand the names of queues, virtual hosts and users.
type phrase struct {
	code       int
	start, end string
	class      class
}

// phrases are the texts that tell apart what RabbitMQ says under one code, as its
// releases 3.10 to 4.3 word them. No name decides, whatever it holds: the start ends
// where the first name begins, and a text that ends in a name ends in the quote behind
// it, which none of these ends has.
var phrases = []phrase{
	// A connection that the broker has not buried yet may fill the limit.
	{amqp.NotAllowed, "access to vhost '", ") is reached", classLocked}, // connection limit (n)
	{amqp.NotAllowed, "access to vhost '", ": connection limit cannot be queried, timeout", classLocked},
	{amqp.NotAllowed, "connection refused for user '", ") is reached", classLocked}, // user connection limit (n)
	{amqp.NotAllowed, "connection refused: node connection limit (", "", classLocked},
	{amqp.NotAllowed, "number of channels opened for user '", "", classLocked},
	{amqp.NotAllowed, "number of channels opened on node '", "", classLocked},
	{amqp.AccessRefused, "queue '", " in exclusive use", classLocked},

	// The queue is there and cannot be reached: its node is down, has just been
	// started or has no replica of the stream. Another host, or a moment, helps.
	{amqp.NotFound, "home node '", " is down or inaccessible", classNetwork},
	{amqp.NotFound, "queue '", " process is stopped by supervisor", classNetwork},
	{amqp.NotFound, "failed to perform operation on queue '", "", classNetwork}, // timeout, or the leader moves
	{amqp.PreconditionFailed, "stream queue '", " replica on the local node", classNetwork},
	{amqp.PreconditionFailed, "queue 'queue '", " replica on the local node", classNetwork}, // before 4.0

	// About deliveries: the consumer timeout, and a tag that is not known.
	{amqp.PreconditionFailed, "delivery acknowledgement on channel ", "", classChannel},
	{amqp.PreconditionFailed, "unknown delivery tag ", "", classChannel},
}

// is tells whether e says the phrase. A text so long that its end was cut off may say it,
// and is taken to: all phrases are about what passes by itself.
func (p phrase) is(e *amqp.Error) bool {
	text, cut := wording(e)
	return e.Code == p.code && strings.HasPrefix(text, p.start) && (cut || strings.HasSuffix(text, p.end))
}

// wording returns what the broker says in e behind the name of the code, and whether the
// text was too long for the protocol, which RabbitMQ marks by dots.
func wording(e *amqp.Error) (text string, cut bool) {
	const longest = 255
	text = strings.TrimPrefix(strings.TrimLeft(e.Reason, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_"), " - ")
	return text, len(e.Reason) >= longest && strings.HasSuffix(text, "...")
}

// class is a kind of failure, by what to do about it.
type class int

const (
	// classNetwork: the path or the peer is gone, or misbehaves. Everything
	// with Server=false is this: the driver reports every I/O failure as 501,
	// and a socket lost in the handshake as 403.
	classNetwork class = iota
	// classRefused: no TCP connection, so trying costs the broker nothing.
	classRefused
	// classForced: 320, the broker closes: a stop, a drain, an operator, an
	// expired token. Another host first.
	classForced
	// classChannel: channel.close or basic.cancel while the connection stands.
	classChannel
	// classLocked: another owner, most likely our own dead connection, still
	// holds an exclusive queue, the exclusive consumer or a connection slot.
	// It clears when the broker buries that connection, within 3 heartbeats.
	classLocked
	// classAbsent: a queue or an exchange is not there. Whoever declares it may do
	// so any moment, and asking takes a channel only.
	classAbsent
	// classOperator: someone has to change something: permissions, a virtual
	// host, arguments. It may happen any moment, so keep asking, slowly.
	classOperator
	// classPeer: the host is not the broker we want: its certificate is not
	// trusted, or it speaks another protocol. Another host first, and this one
	// as slowly as what an operator has to mend.
	classPeer
)

// classifySaid classifies a connection.close or channel.close by RabbitMQ's own phrases
// where it uses one code for several things, else by code.
func classifySaid(e *amqp.Error) class {
	for _, p := range phrases {
		if p.is(e) {
			return p.class
		}
	}
	switch e.Code {
	case amqp.ConnectionForced: // 320: stop, drain, close_connection, "credential expired"
		return classForced
	case amqp.ResourceLocked: // 405: exclusive queue of a connection the broker has not buried yet
		return classLocked
	case amqp.NotFound: // 404: queue not declared yet
		return classAbsent
	case amqp.AccessRefused, // 403: permissions
		amqp.NotAllowed,         // 530: virtual host
		amqp.PreconditionFailed, // 406: declared otherwise
		amqp.NotImplemented,     // 540: combination the queue type refuses
		amqp.InternalError:      // 541: virtual host down, quorum queue without leader, deprecated feature
		return classOperator
	}
	if e.Recover {
		return classChannel
	}
	return classNetwork // 501 to 505, 506: protocol errors end the connection
}
