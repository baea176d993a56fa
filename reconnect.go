package steadymq

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
)

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

// classify is the one place that decides what a failure means. What the broker
// said itself counts first; the driver's own codes say nothing: it has 501 for every failure of
// I/O, and 403 for a socket lost in the handshake.
func classify(err error) class {
	var said *amqp.Error
	if errors.As(err, &said) && said.Server {
		return classifySaid(said)
	}
	switch {
	case errors.Is(err, errCancelled), errors.Is(err, errChannelEnded):
		return classChannel
	case errors.Is(err, ErrLoginRefused), errors.As(err, new(*urlError)):
		return classOperator
	case wrongPeer(err):
		return classPeer
	}
	var at *SessionError
	if errors.As(err, &at) && at.Op == "dial" {
		return classRefused // refused, no route, no answer to SYN, no such name
	}
	return classNetwork
}

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

// wrongPeer tells one that will be no better on the next try: a certificate nobody
// trusts, another protocol.
func wrongPeer(err error) bool {
	var verify *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	var record tls.RecordHeaderError
	var protocol *wire.NotAMQPError
	var port *wrongPortError
	return errors.As(err, &verify) || errors.As(err, &authority) || errors.As(err, &name) ||
		errors.As(err, &invalid) || errors.As(err, &record) || errors.As(err, &protocol) ||
		errors.As(err, &port)
}

// stated tells whether the broker stated plainly, before the first session, that
// the configuration cannot work.
func stated(err error) bool {
	var said *amqp.Error
	if !errors.As(err, &said) || !said.Server || classifySaid(said) != classOperator {
		return false
	}
	switch said.Code {
	case amqp.NotAllowed, amqp.AccessRefused, amqp.PreconditionFailed, amqp.NotImplemented:
		return true
	}
	return false
}

const (
	atOnce      = 20 * time.Millisecond // the first retry of a healthy session; another host
	operatorCap = 30 * time.Second
	lockedExtra = 5 * time.Second

	escalateAfter  = 3 // channel failures ...
	escalateWithin = 30 * time.Second

	givenUpLogins = 3
)

// retry decides whether to go on after a failure, and how long to wait. It
// belongs to the supervisor and knows no clock but the times it is given.
type retry struct {
	config *config
	rules  map[class]rule
	limit  time.Duration // given by WithBackoff: no wait is longer; else none

	failures int       // in a row, since the last healthy session
	passed   []*pace   // of hosts that failed in this round and are not waited for yet
	locked   time.Time // since when the resource has been locked
	lockSeen time.Time // when it was found locked, the last time
	refusals int       // logins refused in a row
	proven   bool      // there has been a session

	heartbeat time.Duration // the longest of the connections so far, 0 before the first
}

// rule is what follows a failure.
type rule struct {
	*pace
	another bool // another host may be better, and is tried at once
}

func newRetry(c *config) *retry {
	r := &retry{config: c, limit: math.MaxInt64}
	if c.set["WithBackoff"] {
		r.limit = c.retryCap
	}
	costly := r.pace(0, c.retryInitial, c.retryCap)
	refused := r.pace(0, c.retryInitial, time.Second) // costs the broker nothing
	absent := r.pace(time.Second, time.Second, 5*time.Second)
	locked := r.pace(time.Second/2, time.Second, time.Second)
	operator := r.pace(time.Second, time.Second, operatorCap)
	r.rules = map[class]rule{
		classNetwork:  {costly, true},
		classForced:   {costly, true},
		classChannel:  {costly, true},
		classRefused:  {refused, true},
		classAbsent:   {absent, false},
		classLocked:   {locked, false},
		classOperator: {operator, false},
		classPeer:     {operator, true},
	}
	return r
}

// consuming notes that a session has been set up. It resets only what an operator or
// another owner has to do, for that is done: consume-ok proves neither a queue's
// leader nor a path.
func (r *retry) consuming() {
	r.proven = true
	r.refusals = 0
	r.locked, r.lockSeen = time.Time{}, time.Time{}
	r.rules[classAbsent].failures = 0
	r.rules[classOperator].failures = 0
}

// healthy notes that the session had proved itself.
func (r *retry) healthy() {
	r.failures, r.passed = 0, nil
	for _, rule := range r.rules {
		rule.failures = 0
	}
}

// givesUp tells whether err ends Run, unless WithFatal decides that.
func (r *retry) givesUp(err error) bool {
	refused := errors.Is(err, ErrLoginRefused)
	if refused {
		r.refusals++
	} else {
		r.refusals = 0
	}
	if r.proven {
		return false
	}
	if refused && (errors.Is(err, errSilentRefusal) || r.config.asksForLogin()) {
		return r.refusals >= givenUpLogins // a cut path looks like silence, and what is asked for may be stale
	}
	return refused || stated(err)
}

// wait returns how long to wait after err. fresh tells that the next try goes to a
// host that has not had its turn in this round. One that another host follows at once
// is waited for at the end of the round, or a host that refuses dials beside it would
// quicken its pace.
func (r *retry) wait(err error, now time.Time, fresh bool) time.Duration {
	r.failures++
	kind := classify(err)
	var at *SessionError
	if errors.As(err, &at) && at.Op == "lost" {
		kind = classNetwork // whatever ended it, it had been set up
		if r.failures == 1 {
			return r.atOnce()
		}
	}
	if kind == classLocked && !r.patient(now) {
		kind = classOperator
	}
	rule := r.rules[kind]
	rule.failures++
	if fresh && rule.another {
		r.pass(rule.pace)
		return r.atOnce()
	}
	wait := rule.draw()
	for _, p := range r.passed {
		if p != rule.pace {
			wait = max(wait, p.draw())
		}
	}
	r.passed = r.passed[:0]
	return wait
}

func (r *retry) pass(p *pace) {
	if !slices.Contains(r.passed, p) {
		r.passed = append(r.passed, p)
	}
}

func (r *retry) atOnce() time.Duration { return rand.N(min(atOnce, r.limit)) }

// patient tells whether a lock is young enough to be that of a connection the broker
// has yet to bury. What else fails meanwhile makes it no younger.
func (r *retry) patient(now time.Time) bool {
	buried := 3*cmp.Or(r.heartbeat, r.config.heartbeat) + lockedExtra
	if now.Sub(r.lockSeen) > buried+operatorCap {
		r.locked = now // another one
	}
	r.lockSeen = now
	return now.Sub(r.locked) < buried
}

// pace is how quickly failures of one kind are retried: exponential backoff with full
// jitter above a floor.
type pace struct {
	floor, initial, limit time.Duration
	failures              int // of this kind in a row
}

// pace makes a pace whose waits are no longer than the limit of WithBackoff.
func (r *retry) pace(floor, initial, limit time.Duration) *pace {
	limit = min(limit, r.limit)
	return &pace{floor: min(floor, limit/2), initial: min(initial, limit), limit: limit}
}

// draw draws the wait after as many failures as have been counted.
func (p *pace) draw() time.Duration {
	top := p.initial
	for n := 1; n < p.failures && top < p.limit; n++ {
		top += min(top, p.limit-top)
	}
	return p.floor + rand.N(top-p.floor+1)
}

// escalates notes a channel-level failure on c and tells whether the connection
// is to be replaced too.
func (c *connection) escalates(now time.Time) bool {
	recent := c.channelFailures[:0]
	for _, t := range c.channelFailures {
		if now.Sub(t) < escalateWithin {
			recent = append(recent, t)
		}
	}
	c.channelFailures = append(recent, now)
	return len(c.channelFailures) >= escalateAfter
}

// attempt is one try to get a session.
type attempt struct {
	conn    *connection // that the session is on
	own     bool        // this try has opened the connection
	session *session
	err     error
}

var errNoResult = errors.New("the try ended without a result: did a function of yours call runtime.Goexit?")

// step is how far a try has come. It may be read while the try goes on.
type step struct{ name atomic.Value }

func newStep(name string) *step {
	s := new(step)
	s.at(name)
	return s
}

func (s *step) at(name string) { s.name.Store(name) }
func (s *step) String() string { return s.name.Load().(string) }

// tryGrace is how long a try may outlive its context: a moment longer than the user's
// function in it may.
const tryGrace = abandonGrace + 100*time.Millisecond

// within runs try and returns its result, or an error once ctx has ended and try does not
// come back: a call of the driver that hangs returns with the end of its connection, which
// waits until no other session lives there. A result that comes too late is closed. step
// tells how far the try has come.
func within(ctx context.Context, try func() attempt, step *step) attempt {
	result := make(chan attempt)
	give := make(chan struct{})
	go func() {
		a := attempt{err: &SessionError{Op: step.String(), Err: errNoResult}} // of a runtime.Goexit
		defer func() {
			select {
			case result <- a:
			case <-give:
				a.discard()
			}
		}()
		a = try()
	}()
	select {
	case a := <-result:
		return a
	case <-ctx.Done():
	}
	grace := time.NewTimer(tryGrace)
	defer grace.Stop()
	select {
	case a := <-result:
		return a
	case <-grace.C:
		close(give)
		return attempt{err: &SessionError{Op: step.String(), Err: causeOf(ctx)}}
	}
}

// discard closes what a late try has opened. The connection it was given belongs to another.
func (a attempt) discard() {
	if a.session != nil {
		close(a.session.stop)
		<-a.session.gone
	}
	if a.own && a.conn != nil {
		a.conn.close(departure{limit: a.conn.closeTimeout})
	}
}
