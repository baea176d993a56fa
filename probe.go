package steadymq

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/wire"
)

// stallConfirm is how long a suspicion has to hold. For a moment a queue may have
// messages that are on their way to us, and RabbitMQ answers "no messages, no
// consumers" for a quorum queue whose leader it does not reach within 250 ms, as
// in every election.
const stallConfirm = 5 * time.Second

// prober looks for the consumer that is alive on paper: heartbeats pass,
// consume-ok was said, and nothing comes although the queue has messages. It runs
// as long as its session.
type prober struct {
	s         *session
	moves     uint64    // at the last look
	length    int       // of a stream at the last look, -1 if it is not known
	suspected bool      // by the last look
	question  *question // that is not answered yet, nil if there is none
	refused   bool      // the broker does not let it ask
}

// probe watches s for as long as it consumes, if the consumer has a stall detector. done closes
// when nobody watches it any more.
func probe(s *session) (done <-chan struct{}) {
	over := make(chan struct{})
	if s.config.stallAfter <= 0 {
		close(over)
		return over
	}
	go func() {
		defer close(over)
		newProber(s).run()
	}()
	return over
}

func newProber(s *session) *prober {
	p := &prober{s: s, length: -1}
	p.moves = p.moved()
	return p
}

func (p *prober) run() {
	s := p.s
	defer p.finish()
	look := time.NewTimer(s.config.stallAfter)
	defer look.Stop()
	for {
		select {
		case <-look.C:
		case <-s.end.Done():
			return
		}
		err := p.look()
		if err != nil && p.suspected {
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

// look returns why the session seems to be stalled. As long as something moves,
// or may not move because the prefetch is full, nobody is asked.
func (p *prober) look() error {
	if moves := p.moved(); moves != p.moves || p.full() {
		p.moves, p.length = moves, -1
		return nil
	}
	if p.refused {
		return nil
	}
	err := p.ask()
	if p.moved() != p.moves {
		return nil
	}
	return err
}

// moved changes with every byte of a delivery, with what was given to handlers and with
// what was settled: a settlement makes room, so the silence that counts begins after the
// last one. A message may take long to arrive.
func (p *prober) moved() uint64 {
	s := p.s
	n := s.received.Load() + uint64(s.wire.Heard())
	for o := range s.stats.outcomes {
		n += s.stats.outcomes[o].Load()
	}
	return n
}

// full tells whether the broker may give no more: what it gave waits for a worker,
// is with one, or waits for its requeue or, of a stream, for its turn to be acked.
func (p *prober) full() bool { return p.s.wire.Unsettled() >= int64(p.s.config.prefetch) }

// ask returns why what the queue says makes the silence a stall. Behind a single
// active consumer, or one of higher priority, silence is normal.
func (p *prober) ask() error {
	s := p.s
	q, err := p.inspect()
	switch {
	case errors.Is(err, errUnanswered):
		return p.stall("and the queue does not answer")
	case err != nil:
		p.cannotAsk(err)
		return nil
	case s.stream != nil && p.grew(q.Messages):
		return p.stall("though the stream has grown")
	case s.stream == nil && q.Consumers == 0:
		return p.stall("and the queue knows of no consumer")
	case s.stream == nil && p.waits(q):
		return p.stall("though the queue has %d messages and this is its only consumer", q.Messages)
	}
	return p.elsewhere(q)
}

// grew tells whether the stream is longer than at the first look at this silence.
// That it has messages says nothing: it keeps them.
func (p *prober) grew(length int) bool {
	if p.length >= 0 && length > p.length {
		return !p.s.stream.ahead(length)
	}
	p.length = length
	return false
}

// waits tells whether the queue has messages for nobody but us. A quorum queue
// counts of single active consumers only the active one, so we may be behind it.
func (p *prober) waits(q amqp.Queue) bool {
	declared := p.s.config.declare
	single := declared != nil && declared.Args["x-single-active-consumer"] == true
	return q.Messages > 0 && q.Consumers <= 1 && !single
}

// elsewhere asks the other hosts. A leader that lost its majority goes on answering
// from what it knew, while the others elect a new one, and so does every host that
// is cut off: so most of all hosts have to say that messages wait for us, and it
// takes three.
func (p *prober) elsewhere(here amqp.Queue) error {
	s := p.s
	hosts := newHosts(s.config).endpoints
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

// contradicts compares what two hosts say. All of a cluster ask the same leader,
// so a stream is as long wherever one asks.
func (p *prober) contradicts(here, there amqp.Queue) bool {
	if p.s.stream != nil {
		return there.Messages > here.Messages
	}
	return p.waits(there)
}

// inspectAt opens a connection for one question, within the setup limit.
func (p *prober) inspectAt(e endpoint) (amqp.Queue, error) {
	s := p.s
	ctx, cancel := context.WithTimeoutCause(s.ctx, s.config.setupTimeout, s.config.setupPassed())
	defer cancel()
	step := newStep("dial")
	a := runBounded(ctx, func() attempt {
		c, err := openConnection(ctx, s.config, e, step, s.abandoned)
		return attempt{conn: c, own: true, err: err}
	}, step)
	if a.err != nil {
		return amqp.Queue{}, a.err
	}
	unguard := context.AfterFunc(ctx, func() { a.conn.socket.Kill(causeOf(ctx)) })
	defer func() {
		a.conn.close(closeRequest{limit: s.config.closeTimeout})
		<-a.conn.done
		unguard()
	}()
	return inspect(a.conn, s.queue)
}

// inspect asks for the queue, on a channel of its own, which the broker closes if it
// refuses.
func inspect(c *connection, queue string) (amqp.Queue, error) {
	channel, err := c.amqp.Channel()
	if err != nil {
		return amqp.Queue{}, err
	}
	defer channel.Close() //nolint:errcheck // a failed declare has closed it already
	return channel.QueueDeclarePassive(queue, true, false, false, false, amqp.Table{})
}

// errUnanswered ends a connection on which a question was not answered in time.
var errUnanswered = errors.New("the stall detector's question was not answered within the setup limit")

// question is one about the queue that has been put to the session's own host. It may
// outlast the session: its answer stands behind all deliveries of the connection, and if
// there is none only the end of the connection ends it. That waits until no session
// lives there.
type question struct {
	overdue chan struct{} // closed when the limit has passed
	done    chan struct{} // closed when there is an answer
	queue   amqp.Queue    // read after done, as err
	err     error
}

func ask(s *session) *question {
	q := &question{overdue: make(chan struct{}), done: make(chan struct{})}
	limit := s.config.setupTimeout
	answered := s.conn.socket.AfterSilence(limit, wire.MostSilences*limit, func() {
		close(q.overdue)
		s.conn.retire(errUnanswered)
	})
	go func() {
		defer close(q.done)
		defer answered()
		q.queue, q.err = inspect(s.conn, s.queue)
	}()
	return q
}

// inspect asks the session's own host, one question at a time. One that is overdue
// counts as unanswered until there is an answer after all.
func (p *prober) inspect() (amqp.Queue, error) {
	if p.question == nil {
		p.question = ask(p.s)
	}
	q := p.question
	select {
	case <-q.done:
	case <-q.overdue:
	case <-p.s.end.Done():
	}
	select {
	case <-q.done:
		p.question = nil
		return q.queue, q.err
	default:
		return amqp.Queue{}, errUnanswered
	}
}

// finish leaves nothing behind.
func (p *prober) finish() {
	if p.question != nil {
		<-p.question.done
	}
}

// cannotAsk tells, once in a Run, that the detector notices nothing: that must not look
// like health. A broker that refuses is not asked again by this session, for its log has
// a line of every refusal. That the queue is gone is told by basic.cancel.
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
	if p.s.told.blind.CompareAndSwap(false, true) {
		p.s.warn("the stall detector cannot ask for the queue, so it notices no stall",
			slog.String("advice", why), slog.String("error", errtext.Brief(err)))
	}
}

func (p *prober) stall(format string, args ...any) error {
	return fmt.Errorf("%w: nothing delivered for %v "+format, append([]any{errStalled, p.s.config.stallAfter}, args...)...)
}
