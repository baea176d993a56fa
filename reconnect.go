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

// What follows a failure: whether Run gives up, how long it waits, and which host is next. The
// supervisor calls it. The refresh of credentials uses pace, too, and the prober takes the list of
// hosts.

// retry decides whether Run goes on after a failure, and how long it waits. Only the supervisor
// uses it, and it knows no clock except the times that it is given.
type retry struct {
	config *config
	rules  []rule        // by class; nil before the first failure, which may never come
	limit  time.Duration // the longest wait, if WithBackoff is given

	failures   int       // in a row, since the last healthy session
	deferred   []*pace   // of hosts that failed in this round; their waits come at its end
	locked     time.Time // since when the resource has been locked; zero if it is not
	lockSeen   time.Time // when it was last found locked
	refusals   int       // logins refused in a row
	hadSession bool      // there has been a session

	heartbeat time.Duration // the longest of all connections so far, 0 before the first
}

// rule is how failures of one class are retried.
type rule struct {
	*pace
	another bool // another host may do better, and is tried at once
}

func newRetry(c *config) *retry {
	r := &retry{config: c, limit: math.MaxInt64}
	if c.set.backoff {
		r.limit = c.retryCap
	}
	return r
}

// rule returns how failures of a class are retried.
func (r *retry) rule(kind class) rule {
	if r.rules == nil {
		r.rules = r.makeRules()
	}
	return r.rules[kind]
}

func (r *retry) makeRules() []rule {
	c := r.config
	costly := r.pace(0, c.retryInitial, c.retryCap)
	refused := r.pace(0, c.retryInitial, time.Second) // costs the broker nothing
	absent := r.pace(time.Second, time.Second, absentCap)
	unreachable := r.pace(0, c.retryInitial, min(c.retryCap, absentCap))
	locked := r.pace(time.Second/2, time.Second, time.Second)
	store := r.pace(min(c.retryInitial, time.Second), time.Second, c.retryCap)
	operator := r.pace(time.Second, time.Second, operatorCap)
	return []rule{
		classNetwork:     {costly, true},
		classForced:      {costly, true},
		classChannel:     {costly, true},
		classRefused:     {refused, true},
		classAbsent:      {absent, false},
		classUnreachable: {unreachable, true},
		classLocked:      {locked, false},
		classOperator:    {operator, false},
		classPeer:        {operator, true},
		classStore:       {store, false},
	}
}

const (
	// firstRetry is the longest wait before the first retry after a session, and before another
	// host is tried.
	firstRetry  = 20 * time.Millisecond
	absentCap   = 5 * time.Second
	operatorCap = 30 * time.Second
	lockedExtra = 5 * time.Second

	escalateAfter  = 3 // channel failures within escalateWithin replace the connection
	escalateWithin = 30 * time.Second

	maxRefusals = 3

	healthyAfter = 70 * time.Second // that long a session, or a connection, proves that the broker works
)

// consuming records that a session has been set up. It forgets only the failures that an operator
// or another owner had to end, because they are over: consume-ok proves neither a queue's leader
// nor a path.
func (r *retry) consuming() {
	r.hadSession = true
	r.refusals = 0
	r.locked, r.lockSeen = time.Time{}, time.Time{}
	if r.rules != nil {
		r.rules[classAbsent].failures = 0
		r.rules[classOperator].failures = 0
	}
}

// healthy records that a session has proved that the broker works.
func (r *retry) healthy() {
	r.failures, r.deferred = 0, nil
	for _, rule := range r.rules {
		rule.failures = 0
	}
}

// givesUp reports whether err ends Run, unless WithFatal decides that.
func (r *retry) givesUp(err error) bool {
	refused := errors.Is(err, ErrLoginRefused)
	if refused {
		r.refusals++
	} else {
		r.refusals = 0
	}
	var at *SessionError
	if r.hadSession || errors.As(err, &at) && at.Op == "lost" { // as the connection of a Run that began paused
		return false
	}
	if refused && (errors.Is(err, errSilentRefusal) || r.config.asksForLogin()) {
		// A cut path looks like silence, and what a function gave may be outdated.
		return r.refusals >= maxRefusals
	}
	return refused || permanent(err)
}

// wait returns how long to wait after err. fresh says that the next try goes to a host that has not
// been tried yet in this round. If another host is tried at once, the wait for this one is deferred
// to the end of the round; else a host that refuses dials would quicken the pace of the one beside
// it.
func (r *retry) wait(err error, now time.Time, fresh bool) time.Duration {
	r.failures++
	kind := classify(err)
	var at *SessionError
	if errors.As(err, &at) && at.Op == "lost" {
		kind = classNetwork // whatever ended the session, it had been set up
		if r.failures == 1 {
			return r.shortDelay()
		}
	}
	if kind == classLocked && !r.lockIsFresh(now) {
		kind = classOperator
	}
	rule := r.rule(kind)
	rule.failures++
	if fresh && rule.another {
		r.deferPace(rule.pace)
		return r.shortDelay()
	}
	wait := rule.draw()
	for _, p := range r.deferred {
		if p != rule.pace {
			wait = max(wait, p.draw())
		}
	}
	r.deferred = r.deferred[:0]
	return wait
}

func (r *retry) deferPace(p *pace) {
	if !slices.Contains(r.deferred, p) {
		r.deferred = append(r.deferred, p)
	}
}

func (r *retry) shortDelay() time.Duration { return rand.N(min(firstRetry, r.limit)) }

// lockIsFresh reports whether a lock is so young that its owner may be a dead connection that the
// broker has not closed yet. Other failures in between make the lock no younger.
func (r *retry) lockIsFresh(now time.Time) bool {
	buried := 3*cmp.Or(r.heartbeat, r.config.heartbeat) + lockedExtra
	if now.Sub(r.lockSeen) > buried+operatorCap {
		r.locked = now // a new lock
	}
	r.lockSeen = now
	return now.Sub(r.locked) < buried
}

// pace is how quickly failures of one kind are retried: exponential backoff with full jitter above
// a floor.
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

// classify is the one place that decides what a failure means. What the broker itself said counts
// first. The driver's own codes mean nothing: it has 501 for every failure of I/O, and 403 for a
// socket lost in the handshake.
func classify(err error) class {
	switch {
	case errors.As(err, new(*unprovenError)):
		return classNetwork
	case errors.As(err, new(*storeError)):
		return classStore
	}
	var brokerErr *amqp.Error
	if errors.As(err, &brokerErr) && brokerErr.Server {
		return classifyBroker(brokerErr)
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

// wrongPeer reports whether the peer will be no better at the next try: its certificate is not
// trusted, or it speaks another protocol.
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

// permanent reports whether err is a statement of the broker that the configuration cannot work. It
// counts before the first session only.
func permanent(err error) bool {
	var brokerErr *amqp.Error
	if !errors.As(err, &brokerErr) || !brokerErr.Server || classify(err) != classOperator {
		return false
	}
	switch brokerErr.Code {
	case amqp.NotAllowed, amqp.AccessRefused, amqp.PreconditionFailed, amqp.NotImplemented:
		return true
	}
	return false
}

const (
	avoidFor    = time.Minute
	provenAfter = 10 * time.Second // after a session this long no host counts as tried
)

// hosts is the order in which hosts are tried: the last good one, then the others at random. For a
// minute those go last that refused, announced their end, fell silent or are not the broker. That is
// known to all connections of a Group. The tries are those of one connection: it has its turn at
// another host after its own failure, however often others have tried that. The mutex of connections
// guards it.
type hosts struct {
	*reputation
	endpoints []endpoint
	tries     map[string]int // address -> tries since the last session that lasted
}

// reputation is what is known of hosts.
type reputation struct {
	avoid map[string]time.Time // address -> until when it goes last
	good  string               // address of the last session
}

// ofAnother returns the order for another connection.
func (h *hosts) ofAnother() *hosts { return &hosts{h.reputation, h.endpoints, make(map[string]int)} }

func newHosts(c *config) *hosts {
	h := &hosts{reputation: &reputation{avoid: make(map[string]time.Time)}, tries: make(map[string]int)}
	if c.urlFunc != nil {
		return h
	}
	for _, u := range c.urls {
		e, err := parseEndpoint(u)
		if err == nil { // New has refused any other URL
			h.endpoints = append(h.endpoints, e)
		}
	}
	return h
}

// next picks the host of the next try. It is fresh if it is one of several and has not been tried
// since the last good session, or less often than another one: the failures of the others say
// nothing about it. If a function of the user names the host, there are no endpoints and none is
// picked.
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

// compare orders two hosts by whose turn is first. A host that goes last is one round behind the
// others. So the others are tried once more before it, and it still has its turn when all of them
// fail.
func (h *hosts) compare(a, b string, now time.Time) int {
	roundA, untilA := h.turn(a, now)
	roundB, untilB := h.turn(b, now)
	return cmp.Or(
		cmp.Compare(roundA, roundB),
		untilA.Compare(untilB),
		cmp.Compare(h.rank(a), h.rank(b)),
	)
}

// turn returns the round in which a host has its turn, and until when it goes last, if it does.
func (h *hosts) turn(address string, now time.Time) (round int, until time.Time) {
	round = h.tries[address]
	if until = h.avoid[address]; now.Before(until) {
		return round + 1, until
	}
	return round, time.Time{}
}

func (h *reputation) rank(address string) int {
	if address == h.good {
		return 0
	}
	return 1
}

// connected records that a session was set up on address. It does not forget the tries: an untried
// host is dialled at once, so sessions that are lost right after their consume-ok would alternate
// between hosts in a hot loop.
func (h *reputation) connected(address string) {
	h.good = address
	delete(h.avoid, address)
}

// outlived records that the session that just ended was up for a while.
func (h *hosts) outlived() {
	clear(h.tries)
}

// failed records a failure of address.
func (h *reputation) failed(address string, err error, now time.Time) {
	if goesLast(err) {
		h.avoid[address] = now.Add(avoidFor)
	}
}

// goesLast reports whether it is better not to try the host for a while. A host that fell silent
// may still accept connections, and then a dial there takes the whole setup limit before another
// host has its turn.
func goesLast(err error) bool {
	switch classify(err) {
	case classForced, classRefused, classPeer:
		return true
	}
	return fellSilent(err)
}

// fellSilent reports whether a peer or a path is dead without having said so, or a node serves
// nothing.
func fellSilent(err error) bool {
	for _, silence := range []error{wire.ErrReadTimeout, wire.ErrWatchdog, wire.ErrUnconfirmed, wire.ErrWriteTimeout, errSetupTimeout, errStalled} {
		if errors.Is(err, silence) {
			return true
		}
	}
	return false
}
