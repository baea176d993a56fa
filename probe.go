package steadymq

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/wire"
)

// prober finds a consumer that only seems to be alive: heartbeats pass, consume-ok came, and
// nothing is delivered although the queue has messages. It has a goroutine of its own, which alone
// uses its fields and ends with the session.
type prober struct {
	session      *session
	lastProgress uint64    // progress at the last look
	length       int       // of the stream at the last look, -1 if it is not known
	grown        int       // length of the stream that has grown without a delivery, 0 if it has not
	suspected    bool      // the last look found signs of a stall
	question     *question // the one that is not answered yet, nil if there is none
	refused      bool      // the broker refuses the question
}

// probe watches s for as long as it consumes, if the consumer has a stall detector. done is closed
// when nobody watches it any more, and nil if nobody does.
func probe(s *session) (done <-chan struct{}) {
	if s.config.stallAfter <= 0 {
		return nil
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		newProber(s).run()
	}()
	return over
}

func newProber(s *session) *prober {
	p := &prober{session: s, length: -1}
	p.lastProgress = p.progress()
	return p
}

func (p *prober) run() {
	s := p.session
	defer p.finish()
	look := time.NewTimer(s.config.stallAfter)
	defer look.Stop()
	for {
		select {
		case <-look.C:
		case <-s.end.Done():
			return
		}
		p.grown = 0
		err := p.look()
		if err != nil && p.suspected {
			if p.grown > 0 {
				s.stream.fallSilent(p.grown)
			}
			s.stall.notify(err)
			return
		}
		p.suspected = err != nil
		if p.suspected {
			look.Reset(min(s.config.stallAfter, stallConfirm))
		} else {
			look.Reset(s.config.stallAfter)
		}
	}
}

// stallConfirm is how long a suspicion has to last. For a moment a queue may have messages that are
// on their way to us. And RabbitMQ answers "no messages, no consumers" for a quorum queue whose
// leader it does not reach within 250 ms, as in every election.
const stallConfirm = 5 * time.Second

// look returns why the session seems to be stalled, nil if it does not. As long as something moves,
// or cannot move because the prefetch is full, the broker is not asked.
func (p *prober) look() error {
	if moves := p.progress(); moves != p.lastProgress || p.full() {
		p.lastProgress, p.length = moves, -1
		if p.question != nil && p.question.givenUp.Load() {
			p.question = nil
		}
		return nil
	}
	if p.refused {
		return nil
	}
	err := p.ask()
	if p.progress() != p.lastProgress {
		return nil
	}
	return err
}

// progress returns a number that changes with every byte of a delivery, with every delivery given
// to a handler and with every settlement. A settlement makes room, so the silence that counts
// begins after the last one. Bytes count because a message may take long to arrive.
func (p *prober) progress() uint64 {
	s := p.session
	n := s.received.Load() + uint64(s.wire.Heard())
	for o := range s.stats.outcomes {
		n += s.stats.outcomes[o].Load()
	}
	return n
}

// full reports whether the broker cannot deliver more: all that it has delivered waits for a
// worker, is with one, is held or, on a stream, waits for its turn to be acked.
func (p *prober) full() bool { return p.session.wire.Unsettled() >= int64(p.session.config.prefetch) }

// ask asks the queue and returns why the silence is a stall, nil if it is not. Behind a single
// active consumer, or one of higher priority, silence is normal.
func (p *prober) ask() error {
	s := p.session
	q, err := p.inspect()
	switch {
	case errors.Is(err, errUnanswered):
		return p.stall("and the queue does not answer")
	case err != nil:
		p.cannotAsk(err)
		return nil
	case s.stream != nil && p.grew(q.Messages):
		p.grown = q.Messages
		return p.stall("though the stream has grown")
	case s.stream == nil && q.Consumers == 0:
		return p.stall("and the queue knows of no consumer")
	case s.stream == nil && p.waits(q):
		return p.stall("though the queue has %d messages and this is its only consumer", q.Messages)
	}
	return p.askOtherHosts(q)
}

// grew reports whether the stream is longer than at the first look during this silence. That it has
// messages means nothing, because a stream keeps them.
func (p *prober) grew(length int) bool {
	if p.length >= 0 && length > p.length {
		return !p.session.stream.ahead(length)
	}
	p.length = length
	return false
}

// waits reports whether the queue has messages that only we can be given. Of single active
// consumers a quorum queue counts only the active one, so there we may be waiting for that one.
func (p *prober) waits(q amqp.Queue) bool {
	declared := p.session.config.declare
	single := declared != nil && declared.Args["x-single-active-consumer"] == true
	return q.Messages > 0 && q.Consumers <= 1 && !single
}

// askOtherHosts asks the other hosts. A leader that has lost its majority goes on answering from
// what it knew, while the others elect a new one, and so does every host that is cut off. Therefore
// a majority of all hosts has to say that messages wait for us, which takes at least three hosts.
func (p *prober) askOtherHosts(here amqp.Queue) error {
	s := p.session
	hosts := s.from.hosts.endpoints // which nobody changes
	others := slices.DeleteFunc(slices.Clone(hosts), func(e endpoint) bool { return e.address == s.conn.host })
	rand.Shuffle(len(others), func(i, j int) { others[i], others[j] = others[j], others[i] })
	need := len(hosts)/2 + 1
	for left := len(others); need > 0; left-- {
		if left < need || s.end.Cause() != nil {
			return nil
		}
		if there, err := p.inspectAt(others[left-1]); err == nil && p.contradicts(here, there) {
			need--
		}
	}
	return p.stall("though the other hosts say that messages wait: this one seems to be cut off")
}

// contradicts reports whether the answer of another host makes the silence of this one a stall. All
// hosts of a cluster ask the same leader, so the length of a stream is the same wherever one asks.
func (p *prober) contradicts(here, there amqp.Queue) bool {
	if p.session.stream != nil {
		return there.Messages > here.Messages
	}
	return p.waits(there)
}

// inspectAt asks another host, within the setup limit.
func (p *prober) inspectAt(e endpoint) (q amqp.Queue, err error) {
	s := p.session
	ctx, cancel := context.WithTimeoutCause(s.ctx, s.config.setupTimeout, s.config.setupPassed())
	defer cancel()
	err = s.from.inquire(ctx, e, func(c *connection) (err error) {
		q, err = inspect(ctx, c, s.queue, func(*wire.Channel) {})
		return err
	})
	return q, err
}

// inspect asks for the queue, on a channel of its own, because the broker closes the channel if it
// refuses.
func inspect(ctx context.Context, c *connection, queue string, use func(*wire.Channel)) (amqp.Queue, error) {
	channel, err := c.openChannel(ctx, use, nil)
	if err != nil {
		return amqp.Queue{}, err
	}
	defer channel.Close() //nolint:errcheck // a failed declare has closed it already
	return channel.QueueDeclarePassive(queue, true, false, false, false, amqp.Table{})
}

// errUnanswered ends a connection on which a question was not answered in time.
var errUnanswered = errors.New("the stall detector's question was not answered within the setup limit")

// question is a question about the queue to the session's own host. It may outlast the session: the
// answer comes after all deliveries on the connection, and if there is none, only the end of the
// connection ends the question. That end waits until the connection is lent to no session. A
// goroutine of its own writes the answer; the prober reads it after done.
type question struct {
	overdue chan struct{} // closed when the limit has passed
	done    chan struct{} // closed when there is an answer
	cancel  func()        // ends the wait for a channel
	givenUp atomic.Bool   // there will be none
	channel atomic.Pointer[wire.Channel]
	queue   amqp.Queue // the answer, as err
	err     error
}

func ask(s *session) *question {
	ctx, cancel := context.WithCancel(context.WithoutCancel(s.ctx))
	q := &question{overdue: make(chan struct{}), done: make(chan struct{}), cancel: cancel}
	limit := s.config.setupTimeout
	answered := s.conn.socket.AfterSilence(limit, wire.MostSilences*limit, func() {
		close(q.overdue)
		cancel()
		if !s.conn.leases.shared() || !q.giveUp(s.conn) {
			s.conn.retire(errUnanswered)
		}
	})
	go func() {
		defer close(q.done)
		defer cancel()
		defer answered()
		q.queue, q.err = inspect(ctx, s.conn.connection, s.queue, q.channel.Store)
	}()
	return q
}

// inspect asks the session's own host, one question at a time. A question that is overdue counts as
// unanswered until there is an answer after all.
func (p *prober) inspect() (amqp.Queue, error) {
	if p.question == nil {
		p.question = ask(p.session)
	}
	q := p.question
	select {
	case <-q.done:
	case <-q.overdue:
	case <-p.session.end.Done():
	}
	select {
	case <-q.done:
		if q.givenUp.Load() { // it stays unanswered until something moves
			return amqp.Queue{}, errUnanswered
		}
		p.question = nil
		return q.queue, q.err
	default:
		return amqp.Queue{}, errUnanswered
	}
}

// finish waits for the answer that is due, so that no goroutine outlives the prober. In a Group it
// gives the question up: its answer may take longer than a stop may.
func (p *prober) finish() {
	q := p.question
	if q == nil {
		return
	}
	if p.session.grouped { // nobody waits for it, and the connection lives on
		q.cancel()
		q.giveUp(p.session.conn)
	}
	<-q.done
}

// giveUp ends the question by the end of its channel, and reports whether there is one.
func (q *question) giveUp(l *loan) bool {
	channel := q.channel.Load()
	if channel == nil {
		return false
	}
	q.givenUp.Store(true)
	l.giveUp(channel, errUnanswered)
	return true
}

// cannotAsk warns, once in a Run, that the detector finds nothing, because that must not look like
// health. A broker that refuses is not asked again by this session: each refusal makes a line in
// its log. A queue that does not exist any more is reported by basic.cancel.
func (p *prober) cannotAsk(err error) {
	var brokerErr *amqp.Error
	why := ""
	switch {
	case errors.Is(err, amqp.ErrChannelMax):
		why = "the connection has no channel left for it: raise channel_max"
	case !errors.As(err, &brokerErr) || !brokerErr.Server || !brokerErr.Recover || brokerErr.Code == amqp.NotFound:
		return
	case brokerErr.Code == amqp.AccessRefused:
		why = "the user needs the configure permission for a passive declare"
	}
	p.refused = brokerErr != nil && brokerErr.Server
	if p.session.notices.blind.CompareAndSwap(false, true) {
		p.session.warn("the stall detector cannot ask for the queue, so it notices no stall",
			slog.String("advice", why), slog.String("error", errtext.Brief(err)))
	}
}

func (p *prober) stall(format string, args ...any) error {
	return fmt.Errorf("%w: nothing delivered for %v "+format, append([]any{errStalled, p.session.config.stallAfter}, args...)...)
}
