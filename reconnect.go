package steadymq

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
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
	// classOperator: someone has to change something: permissions, a virtual
	// host, a queue. It may happen any moment, so keep asking, slowly.
	classOperator
	// classPeer: the host is not the broker we want: its certificate is not
	// trusted, or it speaks another protocol. Another host first, and this one
	// as slowly as what an operator has to mend.
	classPeer
)

// classify is the one place that decides what a failure means. What the broker
// said itself counts first; the driver's own codes say nothing (DESIGN F4).
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

// classifySaid classifies a connection.close or channel.close by code and, where
// RabbitMQ uses one code for several things, by text.
func classifySaid(e *amqp.Error) class {
	switch e.Code {
	case amqp.ConnectionForced: // 320: stop, drain, close_connection, "credential expired"
		return classForced
	case amqp.ResourceLocked: // 405: exclusive queue of a connection the broker has not buried yet
		return classLocked
	case amqp.AccessRefused: // 403: permissions; or the exclusive consumer's place is taken
		if strings.Contains(e.Reason, "in exclusive use") {
			return classLocked
		}
		return classOperator
	case amqp.NotAllowed: // 530: virtual host; or a connection limit, which an old connection may fill
		if strings.Contains(e.Reason, "limit") {
			return classLocked
		}
		return classOperator
	case amqp.NotFound: // 404: queue not declared yet
		if awayWithItsNode(e) {
			return classNetwork
		}
		return classOperator
	case amqp.NotImplemented, // 540: combination the queue type refuses
		amqp.InternalError: // 541: virtual host down, quorum queue without leader, deprecated feature
		return classOperator
	case amqp.PreconditionFailed: // 406
		if awayWithItsNode(e) {
			return classNetwork
		}
		if configured(e) {
			return classOperator
		}
		return classChannel // consumer timeout ("delivery acknowledgement ... timed out"), unknown delivery tag
	}
	if e.Recover {
		return classChannel
	}
	return classNetwork // 501 to 505, 506: protocol errors end the connection
}

// awayWithItsNode tells a queue that is there and cannot be reached: its node is
// down, has just been started or has no replica of the stream. Another host, or a
// moment, helps.
func awayWithItsNode(e *amqp.Error) bool {
	for _, text := range []string{"is down or inaccessible", "is stopped by supervisor", "replica on the local node"} {
		if strings.Contains(e.Reason, text) {
			return true
		}
	}
	return false
}

// configured tells a 406 about declarations from one about deliveries.
func configured(e *amqp.Error) bool {
	return !strings.Contains(e.Reason, "timed out") && !strings.Contains(e.Reason, "delivery tag")
}

// wrongPeer tells one that will be no better on the next try: a certificate nobody
// trusts, another protocol.
func wrongPeer(err error) bool {
	var verify *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	var record tls.RecordHeaderError
	var protocol *notAMQPError
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
	atOnce          = 20 * time.Millisecond // first retry of a healthy session
	refusedCap      = time.Second
	operatorInitial = time.Second
	operatorCap     = 30 * time.Second
	lockedStep      = 500 * time.Millisecond
	lockedExtra     = 5 * time.Second

	escalateAfter  = 3 // channel failures ...
	escalateWithin = 30 * time.Second

	givenUpLogins = 3
)

// retry decides whether to go on after a failure, and how long to wait. It
// belongs to the supervisor and knows no clock but the times it is given.
type retry struct {
	config *config

	failures int       // in a row, since the last healthy session
	free     int       // of them, refused dials: they cost nobody anything
	asked    int       // failures of the operator's kind in a row, which have a pace of their own
	locked   time.Time // since when the resource has been locked; zero if it is not
	refusals int       // logins in a row refused without a word
	proven   bool      // there has been a session

	heartbeat time.Duration // the longest of the connections so far, 0 before the first
}

func newRetry(c *config) *retry { return &retry{config: c} }

// consuming notes that a session has been set up. It resets nothing but the
// lock: consume-ok proves neither a queue's leader nor a path.
func (r *retry) consuming() {
	r.proven = true
	r.refusals = 0
	r.locked = time.Time{}
}

// healthy notes that the session that just ended had proved itself.
func (r *retry) healthy() {
	r.failures, r.free = 0, 0
}

// givesUp tells whether err ends Run, unless WithFatal decides that.
func (r *retry) givesUp(err error) bool {
	silent := errors.Is(err, errSilentRefusal)
	if silent {
		r.refusals++
	} else {
		r.refusals = 0
	}
	if r.proven {
		return false
	}
	if silent {
		return r.refusals >= givenUpLogins
	}
	return errors.Is(err, ErrLoginRefused) || stated(err)
}

// wait returns how long to wait after err. anotherHost tells that the next try
// goes to a host that has not been tried in this row of failures.
func (r *retry) wait(err error, now time.Time, anotherHost bool) time.Duration {
	r.failures++
	kind := classify(err)
	if kind != classLocked {
		r.locked = time.Time{}
	}
	var at *SessionError
	lost := errors.As(err, &at) && at.Op == "lost"
	switch {
	case kind == classLocked && r.patient(now):
		return lockedStep + rand.N(lockedStep)
	case kind == classPeer && anotherHost:
		return rand.N(atOnce)
	case kind == classLocked, kind == classPeer, kind == classOperator && !lost:
		r.asked++
		return r.drawAt(r.asked, operatorInitial, operatorInitial, operatorCap)
	}
	r.asked = 0
	switch {
	case kind == classRefused:
		r.free++
		if anotherHost {
			return rand.N(atOnce)
		}
		wait := r.drawAt(r.free+1, 0, r.config.retryInitial, min(r.config.retryCap, refusedCap))
		if r.failures-r.free > 2 {
			// The next host has failed at its cost before: that one's pace holds, or
			// a refusing host beside it would turn its backoff into a quick one.
			wait = max(wait, r.draw(0, r.config.retryInitial, r.config.retryCap))
		}
		return wait
	case lost && r.failures == 1, anotherHost:
		return rand.N(atOnce)
	}
	return r.draw(0, r.config.retryInitial, r.config.retryCap)
}

// patient tells whether a lock is young enough to be that of a connection the
// broker has yet to bury.
func (r *retry) patient(now time.Time) bool {
	if r.locked.IsZero() {
		r.locked = now
	}
	return now.Sub(r.locked) < 3*cmp.Or(r.heartbeat, r.config.heartbeat)+lockedExtra
}

// draw is the pace of what costs the broker something. Refused dials do not count:
// the first hiccup of a broker that was down for long and has just been started
// must not be answered with the longest wait.
func (r *retry) draw(floor, initial, limit time.Duration) time.Duration {
	return r.drawAt(r.failures-r.free, floor, initial, limit)
}

// drawAt is exponential backoff with full jitter above a floor, for the nth failure
// of a row. The first has had its retry at once.
func (r *retry) drawAt(nth int, floor, initial, limit time.Duration) time.Duration {
	top := initial
	for n := 2; n < nth && top < limit; n++ {
		top *= 2
	}
	return floor + rand.N(min(top, limit)-floor+1)
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

const (
	lastFor   = time.Minute
	hostLasts = 10 * time.Second // a session this long makes all hosts untried
)

// hosts is the order in which hosts are tried: the last good one, then the others
// at random, and last those that refused, said they close, fell silent or are not the
// broker, for a minute.
type hosts struct {
	endpoints []endpoint
	avoid     map[string]time.Time // address -> until when it goes last
	good      string
	tried     map[string]bool // in this row of failures
}

func newHosts(c *config) *hosts {
	h := &hosts{avoid: make(map[string]time.Time), tried: make(map[string]bool)}
	if c.urlFunc != nil {
		return h
	}
	for _, u := range c.urls {
		e, err := parseEndpoint(u)
		if err == nil { // New has refused all others
			h.endpoints = append(h.endpoints, e)
		}
	}
	return h
}

// next picks the host of the next try.
func (h *hosts) next(now time.Time) endpoint {
	if h.allTried() {
		clear(h.tried)
	}
	best, rank := h.endpoints[0], -1
	for _, i := range rand.Perm(len(h.endpoints)) {
		e := h.endpoints[i]
		if r := h.rank(e, now); r > rank {
			best, rank = e, r
		}
	}
	h.tried[best.address] = true
	return best
}

func (h *hosts) rank(e endpoint, now time.Time) int {
	rank := 0
	if !h.tried[e.address] {
		rank += 4
	}
	if until, ok := h.avoid[e.address]; !ok || !now.Before(until) {
		rank += 2
	}
	if e.address == h.good {
		rank++
	}
	return rank
}

func (h *hosts) allTried() bool {
	for _, e := range h.endpoints {
		if !h.tried[e.address] {
			return false
		}
	}
	return true
}

// worked notes that a session was set up on address. It does not make the hosts
// untried again: an untried one is dialled at once, so sessions that are lost
// right after their consume-ok would go round in a hot loop.
func (h *hosts) worked(address string) {
	h.good = address
	delete(h.avoid, address)
}

// lasted notes that the session that just ended was up for a while.
func (h *hosts) lasted() {
	clear(h.tried)
}

// failed notes a failure of address.
func (h *hosts) failed(address string, kind class, now time.Time) {
	if kind == classForced || kind == classRefused || kind == classPeer {
		h.avoid[address] = now.Add(lastFor)
	}
}

// silent notes that address does not answer any more. It may still accept, and
// then a dial there costs the whole setup limit before another host has a turn.
func (h *hosts) silent(address string, now time.Time) {
	h.avoid[address] = now.Add(lastFor)
}

// fellSilent tells a peer or a path that is dead without having said so, and a
// node that serves nothing.
func fellSilent(err error) bool {
	for _, silence := range []error{errReadTimeout, errWatchdog, errUnconfirmed, errWriteTimeout, errSetupTimeout, errStalled} {
		if errors.Is(err, silence) {
			return true
		}
	}
	return false
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
		return attempt{err: &SessionError{Op: step.String(), Err: context.Cause(ctx)}}
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
