// Package retryqueue knows the queues beside a consumer's own that failed messages go to: one for
// each delay, and the one in which they are parked. It says what they are called and how they are
// declared, and what to ask for instead if a broker refuses.
package retryqueue

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Queue is one of them.
type Queue struct {
	Name  string
	forms []form // in which it may be found or declared, best first
}

// form is one way to ask for a queue.
type form struct {
	passive bool // it is only looked for
	args    amqp.Table
}

// DelayName returns the name of the queue in which messages of another one wait for d.
func DelayName(queue string, d time.Duration) string { return queue + ".retry." + short(d) }

// short is d as Go writes it, without the parts that are zero: 1m, not 1m0s.
func short(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// The arguments of queues that are used here.
const (
	typeArg     = "x-queue-type"
	ttlArg      = "x-message-ttl"
	deadArg     = "x-dead-letter-exchange"
	deadKeyArg  = "x-dead-letter-routing-key"
	strategyArg = "x-dead-letter-strategy"
	overflowArg = "x-overflow"
	limitArg    = "x-delivery-limit"
	expiresArg  = "x-expires"
)

// Delay returns the queue in which messages of another one wait for d. What decides in all of its
// forms is that they expire after d, and lead back then. It is a classic queue where that one is,
// else a quorum queue.
func Delay(queue string, d time.Duration, classic bool) *Queue {
	with := func(more amqp.Table) form {
		args := amqp.Table{ttlArg: d.Milliseconds(), deadArg: "", deadKeyArg: queue}
		maps.Copy(args, more)
		return form{args: args}
	}
	plain := with(amqp.Table{typeArg: "classic"})
	quorum := []form{
		// A message leaves such a queue only once its own queue has confirmed that it has it
		// (https://www.rabbitmq.com/docs/quorum-queues#dead-lettering).
		with(amqp.Table{typeArg: "quorum", strategyArg: "at-least-once", overflowArg: "reject-publish"}),
		with(amqp.Table{typeArg: "quorum"}),
	}
	forms := append(quorum, plain)
	if classic {
		forms = append([]form{plain}, quorum...)
	}
	return &Queue{DelayName(queue, d), append(forms, form{passive: true})}
}

// Park returns the queue in which messages are parked. If it exists, in whatever form, it is used
// as it is. Else it is a classic queue if the queue of the messages is one, or a quorum queue. From
// RabbitMQ 4.0 on that is unlimited: nobody wants it to drop what somebody has looked at 20 times.
func Park(name string, classic, unlimited bool) *Queue {
	args := amqp.Table{typeArg: "quorum"}
	switch {
	case classic:
		args[typeArg] = "classic"
	case unlimited:
		args[limitArg] = int32(-1)
	}
	return &Queue{name, []form{{passive: true}, {args: args}, {passive: true}}} // somebody may be faster
}

// Refused is a refusal of one of these queues, not of the consumer's own.
type Refused struct {
	Queue *Queue
	Err   error
}

// Error names the queue.
func (e *Refused) Error() string {
	return fmt.Sprintf("queue %q of WithRetry: %v", e.Queue.Name, e.Err)
}

// Unwrap returns what the broker said.
func (e *Refused) Unwrap() error { return e.Err }

// Asking is how far the forms of queues have been gone through, by name. A refusal closes the
// channel, so this outlives channels. Its zero value is ready. One goroutine at a time uses it.
type Asking struct {
	next    map[string]int   // number of the form
	refused map[string]error // to declare it at all
}

// Declare declares q on a channel, or finds it there, in the form that is next. Its error is a
// *Refused.
func (a *Asking) Declare(channel *amqp.Channel, q *Queue) error {
	f := q.forms[a.form(q)]
	declare := channel.QueueDeclare
	if f.passive {
		declare = channel.QueueDeclarePassive
	}
	if _, err := declare(q.Name, true, false, false, false, f.args); err != nil {
		return &Refused{q, err}
	}
	return nil
}

// form returns the number of the form of q that is next. Another queue of the same name may have had
// more forms.
func (a *Asking) form(q *Queue) int { return min(a.next[q.Name], len(q.forms)-1) }

// inequivalent is the beginning of RabbitMQ's refusals of a queue that exists in another form, up
// to the first name in them.
const inequivalent = "PRECONDITION_FAILED - inequivalent arg '"

// Relax chooses another form after a refusal. It returns false if there is none: then the refusal
// is final, and its Err says what counts.
func (a *Asking) Relax(e *Refused) bool {
	var said *amqp.Error
	if !errors.As(e.Err, &said) || !said.Server {
		return false
	}
	if a.next == nil {
		a.next, a.refused = make(map[string]int), make(map[string]error)
	}
	name, forms := e.Queue.Name, e.Queue.forms
	at, last := a.form(e.Queue), len(forms)-1
	switch passive := forms[at].passive; {
	case said.Code == amqp.AccessRefused && !passive && forms[last].passive:
		a.next[name], a.refused[name] = last, e.Err
	case said.Code == amqp.NotFound && passive && a.refused[name] != nil:
		e.Err = fmt.Errorf("it does not exist, and the user lacks a permission that its declaration needs: %w", a.refused[name])
		return false
	case at == last:
		return false
	case said.Code == amqp.NotFound && passive,
		said.Code == amqp.PreconditionFailed && strings.HasPrefix(said.Reason, inequivalent) && !decides(said.Reason):
		a.next[name] = at + 1
	default:
		return false
	}
	return true
}

// Forget begins with the first form of q again.
func (a *Asking) Forget(q *Queue) {
	delete(a.next, q.Name)
	delete(a.refused, q.Name)
}

// decides reports whether a refusal is about what a delay consists of: nothing ever leaves a
// stream, and a queue that expires takes its messages along. RabbitMQ compares the expiry first.
func decides(reason string) bool {
	for _, arg := range []string{ttlArg, deadArg, deadKeyArg, expiresArg} {
		if strings.HasPrefix(reason, inequivalent+arg+"'") {
			return true
		}
	}
	return strings.HasPrefix(reason, inequivalent+typeArg+"'") && strings.HasSuffix(reason, "is 'stream'")
}
