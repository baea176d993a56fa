package steadymq

import (
	"cmp"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/steadymq/steadymq/internal/wire"
)

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

// worked notes that a session was set up on address. It does not make the hosts
// untried again: an untried one is dialled at once, so sessions that are lost
// right after their consume-ok would go round in a hot loop.
func (h *hosts) worked(address string) {
	h.good = address
	delete(h.avoid, address)
}

// lasted notes that the session that just ended was up for a while.
func (h *hosts) lasted() {
	clear(h.tries)
}

// failed notes a failure of address.
func (h *hosts) failed(address string, err error, now time.Time) {
	if goesLast(err) {
		h.avoid[address] = now.Add(lastFor)
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
