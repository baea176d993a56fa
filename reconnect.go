package steadymq

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
)

// classify is the one place that decides what a failure means. What the broker
// said itself counts first; the driver's own codes say nothing: it has 501 for every failure of
// I/O, and 403 for a socket lost in the handshake.
func classify(err error) class {
	var brokerErr *amqp.Error
	if errors.As(err, &brokerErr) && brokerErr.Server {
		return classifySaid(brokerErr)
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

// permanent tells whether the broker stated plainly, before the first session, that
// the configuration cannot work.
func permanent(err error) bool {
	var brokerErr *amqp.Error
	if !errors.As(err, &brokerErr) || !brokerErr.Server || classifySaid(brokerErr) != classOperator {
		return false
	}
	switch brokerErr.Code {
	case amqp.NotAllowed, amqp.AccessRefused, amqp.PreconditionFailed, amqp.NotImplemented:
		return true
	}
	return false
}

const (
	firstRetry  = 20 * time.Millisecond // the first retry of a healthy session; another host
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

	failures   int       // in a row, since the last healthy session
	passed     []*pace   // of hosts that failed in this round and are not waited for yet
	locked     time.Time // since when the resource has been locked
	lockSeen   time.Time // when it was found locked, the last time
	refusals   int       // logins refused in a row
	hadSession bool      // there has been a session

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
	r.hadSession = true
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
	if r.hadSession {
		return false
	}
	if refused && (errors.Is(err, errSilentRefusal) || r.config.asksForLogin()) {
		return r.refusals >= givenUpLogins // a cut path looks like silence, and what is asked for may be stale
	}
	return refused || permanent(err)
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
			return r.retryNow()
		}
	}
	if kind == classLocked && !r.lockIsFresh(now) {
		kind = classOperator
	}
	rule := r.rules[kind]
	rule.failures++
	if fresh && rule.another {
		r.pass(rule.pace)
		return r.retryNow()
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

func (r *retry) retryNow() time.Duration { return rand.N(min(firstRetry, r.limit)) }

// lockIsFresh tells whether a lock is young enough to be that of a connection the broker
// has yet to bury. What else fails meanwhile makes it no younger.
func (r *retry) lockIsFresh(now time.Time) bool {
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

const (
	avoidFor    = time.Minute
	provenAfter = 10 * time.Second // a session this long makes all hosts untried
)

// hosts is the order in which hosts are tried: the last good one, then the others
// at random, and last those that refused, said they close, fell silent or are not the
// broker, for a minute.
type hosts struct {
	endpoints []endpoint
	avoid     map[string]time.Time // address -> until when it goes last
	tries     map[string]int       // address -> of this row of failures
	good      string
}

func newHosts(c *config) *hosts {
	h := &hosts{avoid: make(map[string]time.Time), tries: make(map[string]int)}
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

// next picks the host of the next try. It is fresh if it is one of several and has not
// been tried in this row of failures, or not as often as others: their failures say
// nothing about it. Without endpoints, where a function of the user names the host,
// there is none to pick.
func (h *hosts) next(now time.Time) (e endpoint, fresh bool) {
	if len(h.endpoints) == 0 {
		return endpoint{}, false
	}
	order := slices.Clone(h.endpoints)
	rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	most := 0
	for _, other := range order {
		most = max(most, h.tries[other.address])
	}
	e = slices.MinFunc(order, func(a, b endpoint) int { return h.compare(a.address, b.address, now) })
	tries := h.tries[e.address]
	fresh = len(order) > 1 && (tries == 0 || tries < most)
	h.tries[e.address]++
	return e, fresh
}

// compare tells which of two hosts has its turn first. One that goes last is a round
// behind the others, so that those tried before it have another turn, and it still has
// one when all of them fail.
func (h *hosts) compare(a, b string, now time.Time) int {
	roundA, untilA := h.turn(a, now)
	roundB, untilB := h.turn(b, now)
	return cmp.Or(
		cmp.Compare(roundA, roundB),
		untilA.Compare(untilB),
		cmp.Compare(h.rank(a), h.rank(b)),
	)
}

// turn returns the round a host is due in, and until when it goes last, if it does.
func (h *hosts) turn(address string, now time.Time) (round int, until time.Time) {
	round = h.tries[address]
	if until = h.avoid[address]; now.Before(until) {
		return round + 1, until
	}
	return round, time.Time{}
}

func (h *hosts) rank(address string) int {
	if address == h.good {
		return 0
	}
	return 1
}

// connected notes that a session was set up on address. It does not make the hosts
// untried again: an untried one is dialled at once, so sessions that are lost
// right after their consume-ok would go round in a hot loop.
func (h *hosts) connected(address string) {
	h.good = address
	delete(h.avoid, address)
}

// outlived notes that the session that just ended was up for a while.
func (h *hosts) outlived() {
	clear(h.tries)
}

// failed notes a failure of address.
func (h *hosts) failed(address string, err error, now time.Time) {
	if goesLast(err) {
		h.avoid[address] = now.Add(avoidFor)
	}
}

// goesLast tells that the host had better be left alone for a while. One that fell
// silent may still accept, and then a dial there costs the whole set-up limit before
// another host has a turn.
func goesLast(err error) bool {
	switch classify(err) {
	case classForced, classRefused, classPeer:
		return true
	}
	return fellSilent(err)
}

// fellSilent tells a peer or a path that is dead without having said so, and a
// node that serves nothing.
func fellSilent(err error) bool {
	for _, silence := range []error{wire.ErrReadTimeout, wire.ErrWatchdog, wire.ErrUnconfirmed, wire.ErrWriteTimeout, errSetupTimeout, errStalled} {
		if errors.Is(err, silence) {
			return true
		}
	}
	return false
}
