package steadymq

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func said(code int, text string) error {
	return &amqp.Error{Code: code, Reason: text, Server: true}
}

func at(op string, err error) error { return &SessionError{Op: op, Session: 1, Err: err} }

// One row for each row of docs/FAULTS.md that a consumer can meet; the number is that row's.
func TestEveryFailureHasItsClass(t *testing.T) {
	rows := []struct {
		row  string
		err  error
		want class
	}{
		{"1 node stop", at("lost", said(320, "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'")), classForced},
		{"2 operator closes", at("lost", said(320, "CONNECTION_FORCED - closed")), classForced},
		{"3 maintenance", at("lost", said(320, "CONNECTION_FORCED - Node was put into maintenance mode")), classForced},
		{"3 refused dial", at("dial", &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}), classRefused},
		{"4 kill -9", at("lost", fmt.Errorf("%w: %w", wire.ErrPeerReset, syscall.ECONNRESET)), classNetwork},
		{"5 wrong password", at("open", errSilentRefusal), classOperator},
		{"6 no vhost", at("open", said(530, "NOT_ALLOWED - vhost x not found")), classOperator},
		{"6 no permission on vhost", at("open", said(530, "NOT_ALLOWED - access to vhost '/' refused for user 'u'")), classOperator},
		{"7 vhost limit", at("open", said(530, "NOT_ALLOWED - access to vhost '/' refused for user 'u': connection limit (3) is reached")), classLocked},
		{"7 user limit", at("open", said(530, "NOT_ALLOWED - connection refused for user 'u': user connection limit (1) is reached")), classLocked},
		{"8 vhost down", at("open", said(541, "INTERNAL_ERROR - access to vhost '/' refused: vhost '/' is down")), classOperator},
		{"9 frame size", at("open", said(530, "NOT_ALLOWED - negotiated frame_max = 4096 is lower than the minimum allowed value (8192)")), classOperator},
		{"10 slow handshake", at("open", errSetupTimeout), classNetwork},
		{"11 lost at login", at("open", fmt.Errorf("lost while logging in: %w", wire.ErrPeerClosed)), classNetwork},
		{"11 the driver's made-up 403", at("open", amqp.ErrCredentials), classNetwork},
		{"11 the driver's made-up vhost", at("open", amqp.ErrVhost), classNetwork},
		{"12 black hole", at("lost", wire.ErrReadTimeout), classNetwork},
		{"15, 16 watchdog", at("lost", wire.ErrWatchdog), classNetwork},
		{"18 zero window", at("lost", wire.ErrWriteTimeout), classNetwork},
		{"20 frame error", at("lost", said(501, "FRAME_ERROR - cannot decode")), classNetwork},
		{"20 unexpected frame", at("lost", said(505, "UNEXPECTED_FRAME - expected content header")), classNetwork},
		{"21 stream coordinator", at("lost", said(506, "RESOURCE_ERROR")), classNetwork},
		{"22 not implemented", at("consume", said(540, "NOT_IMPLEMENTED - consume mode auto-ack")), classOperator},
		{"23 no leader", at("lost", said(541, "INTERNAL_ERROR - timed out consuming from quorum queue")), classOperator},
		{"24 token expired", at("lost", said(320, "CONNECTION_FORCED - credential expired")), classForced},
		{"26 unknown authority", at("open", &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}), classPeer},
		{"27 plain AMQP on a TLS port", at("open", &wire.NotAMQPError{First: 0x15}), classPeer},
		{"27 TLS on a plain port", at("open", tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}), classPeer},
		{"28 proxy cuts", at("lost", wire.ErrPeerClosed), classNetwork},
		{"30 no such host", at("dial", &net.DNSError{Err: "no such host", IsNotFound: true}), classRefused},
		{"30 SYN dropped", at("dial", errors.New("i/o timeout")), classRefused},
		{"31 channel_max, local", at("channel", amqp.ErrChannelMax), classNetwork},
		{"32 no queue", at("consume", said(404, "NOT_FOUND - no queue 'q' in vhost '/'")), classAbsent},
		{"33 queue's node down", at("consume", said(404, "NOT_FOUND - home node 'x' of durable queue 'q' in vhost '/' is down or inaccessible")), classUnreachable},
		{"33 queue's node just started", at("consume", said(404, "NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor")), classUnreachable},
		{"34, 40 cancelled", at("lost", errCancelled), classChannel},
		{"39 consumer timeout", at("lost", said(406, "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 1800000 ms")), classChannel},
		{"41 unknown tag", at("lost", said(406, "PRECONDITION_FAILED - unknown delivery tag 5")), classChannel},
		{"43 no read permission", at("consume", said(403, "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'")), classOperator},
		{"44 exclusive consumer", at("consume", said(403, "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use")), classLocked},
		{"45 exclusive queue", at("topology", said(405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q'")), classLocked},
		{"47 inequivalent", at("topology", fmt.Errorf("declare: %w", said(406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q'"))), classOperator},
		{"48 transient queue on 4.3", at("topology", said(541, "INTERNAL_ERROR - deprecated feature transient_nonexcl_queues")), classOperator},
		{"51 consumers per channel", at("consume", said(530, "NOT_ALLOWED - reached maximum (1) of consumers per channel")), classOperator},
		{"59 stream needs qos", at("consume", said(406, "PRECONDITION_FAILED - consumer prefetch count is not set for stream queue")), classOperator},
		{"60 no local replica", at("consume", said(406, "PRECONDITION_FAILED - stream queue 'q' in vhost '/' does not have a running replica on the local node")), classUnreachable},
		{"60 replica not there yet", at("consume", said(406, "PRECONDITION_FAILED - queue 'queue 'q' in vhost '/'' does not have a replica on the local node")), classUnreachable},
	}
	for _, r := range rows {
		t.Run(r.row, func(t *testing.T) { assert.Equal(t, r.want, classify(r.err)) })
	}
}

func newTestRetry() *retry { return newRetry(defaults("amqp://h/", "q")) }

// longest returns the longest of many waits for the nth failure in a row.
func longest(err error, n int) (least, most time.Duration) {
	least = time.Hour
	for range 2000 {
		r := newTestRetry()
		var wait time.Duration
		for range n {
			wait = r.wait(err, time.Time{}, false)
		}
		least, most = min(least, wait), max(most, wait)
	}
	return least, most
}

func TestPaceFollowsWhatAFailedTryCosts(t *testing.T) {
	refused := at("dial", syscall.ECONNREFUSED)
	lost := at("lost", wire.ErrPeerReset)
	handshake := at("open", wire.ErrPeerClosed)
	missing := at("consume", said(404, "NOT_FOUND"))
	forbidden := at("consume", said(403, "ACCESS_REFUSED"))
	cases := []struct {
		name        string
		err         error
		n           int
		least, most time.Duration
	}{
		{"first retry of a healthy session", lost, 1, 0, 20 * time.Millisecond},
		{"first retry of a cancelled one", at("lost", errCancelled), 1, 0, 20 * time.Millisecond},
		{"second", lost, 2, 0, 250 * time.Millisecond},
		{"third", lost, 3, 0, 500 * time.Millisecond},
		{"lost again and again", lost, 30, 0, 10 * time.Second},
		{"dials refused", refused, 30, 0, time.Second},
		{"handshakes fail", handshake, 30, 0, 10 * time.Second},
		{"queue absent, first", missing, 1, time.Second, time.Second},
		{"queue absent, later", missing, 30, time.Second, 5 * time.Second},
		{"operator, first", forbidden, 1, time.Second, time.Second},
		{"operator, later", forbidden, 30, time.Second, 30 * time.Second},
		{"locked", at("consume", said(405, "RESOURCE_LOCKED")), 5, 500 * time.Millisecond, time.Second},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			least, most := longest(c.err, c.n)
			assert.GreaterOrEqual(t, least, c.least)
			assert.LessOrEqual(t, most, c.most)
			assert.Greater(t, most, c.most*9/10-time.Nanosecond, "the whole range is used")
		})
	}
}

func TestRefusedDialsDoNotSlowDownWhatComesAfterThem(t *testing.T) {
	for range 100 {
		r := newTestRetry()
		r.wait(at("lost", wire.ErrPeerReset), time.Time{}, false)
		for range 100 { // a long outage
			r.wait(at("dial", syscall.ECONNREFUSED), time.Time{}, false)
		}
		assert.LessOrEqual(t, r.wait(at("consume", said(404, "NOT_FOUND - no queue")), time.Time{}, false), time.Second)
		assert.LessOrEqual(t, r.wait(at("open", wire.ErrPeerClosed), time.Time{}, false), 500*time.Millisecond, "the third failure that costs")
	}
}

func TestLockIsWaitedForAsLongAsABrokerNeedsToBuryAConnection(t *testing.T) {
	r := newTestRetry()
	locked := at("consume", said(405, "RESOURCE_LOCKED"))
	now := time.Now()
	for end := now.Add(35 * time.Second); now.Before(end); {
		wait := r.wait(locked, now, false)
		assert.LessOrEqual(t, wait, time.Second)
		now = now.Add(wait)
	}
	var most time.Duration
	for range 100 {
		most = max(most, r.wait(locked, now, false))
	}
	assert.Greater(t, most, 10*time.Second, "then it is the operator's")
}

func TestOnlyAHealthySessionResetsTheBackoff(t *testing.T) {
	r := newTestRetry()
	lost := at("lost", wire.ErrPeerReset)
	for range 20 {
		r.wait(lost, time.Now(), false)
		r.consuming()
	}
	assert.Equal(t, 20, r.failures, "consume-ok proves nothing")
	r.healthy()
	assert.LessOrEqual(t, r.wait(lost, time.Now(), false), firstRetry)

	s := &session{since: time.Now()}
	assert.False(t, s.healthy(s.since.Add(69*time.Second)))
	assert.True(t, s.healthy(s.since.Add(70*time.Second)))
	s.settled.Store(true)
	assert.False(t, s.healthy(s.since.Add(9*time.Second)))
	assert.True(t, s.healthy(s.since.Add(10*time.Second)))
}

func TestOperatorsPaceStartsFromItsOwnStart(t *testing.T) {
	for range 100 {
		r := newTestRetry()
		for range 10 {
			r.wait(at("lost", wire.ErrPeerReset), time.Now(), false)
		}
		assert.Equal(t, time.Second, r.wait(at("consume", said(404, "NOT_FOUND")), time.Now(), false))
	}
}

func TestARefusingHostDoesNotQuickenThePaceOfOneThatFlaps(t *testing.T) {
	lost, refused := at("lost", wire.ErrPeerReset), at("dial", syscall.ECONNREFUSED)
	var total time.Duration
	for range 100 {
		r := newTestRetry()
		for n := range 10 {
			r.wait(lost, time.Now(), true)
			if wait := r.wait(refused, time.Now(), false); n == 9 {
				total += wait
			}
		}
	}
	assert.Greater(t, total/100, 3*time.Second, "half of the cap of what costs the broker something, on average")
}

func TestAnUntriedHostIsTriedAtOnceButNotWhenTheBrokerRefuses(t *testing.T) {
	r := newTestRetry()
	for range 100 {
		assert.LessOrEqual(t, r.wait(at("dial", syscall.ECONNREFUSED), time.Now(), true), firstRetry)
	}
	assert.GreaterOrEqual(t, r.wait(at("open", said(530, "vhost")), time.Now(), true), time.Second)

	wrong := at("open", &wire.NotAMQPError{First: 'H'})
	assert.LessOrEqual(t, r.wait(wrong, time.Now(), true), firstRetry, "the next host may be the right one")
	assert.GreaterOrEqual(t, r.wait(wrong, time.Now(), false), time.Second)
}

// Which failures say nothing about the other hosts: there the next one is tried at once.
func TestAnotherHostIsTriedAtOnceWhereItMayDoBetter(t *testing.T) {
	another := map[class]bool{
		classNetwork: true, classForced: true, classChannel: true, classRefused: true, classUnreachable: true, classPeer: true,
		classAbsent: false, classLocked: false, classOperator: false,
	}
	for kind, err := range oneOfEach {
		t.Run(fmt.Sprint(kind), func(t *testing.T) {
			r := newTestRetry()
			var most time.Duration
			for range 30 {
				most = max(most, r.wait(err, time.Now(), true))
			}
			assert.Equal(t, another[kind], most <= firstRetry, "waits up to %v", most)
		})
	}
}

// A wait that was put off to the end of a round belongs to that round alone, and to no session that
// has proved itself since.
func TestDeferredWaitEndsWithItsRound(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(r *retry)
		most time.Duration
	}{
		"round":   {func(r *retry) { r.wait(oneOfEach[classRefused], time.Now(), false) }, time.Second},
		"healthy": {(*retry).healthy, 250 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			for range 100 {
				r := newTestRetry()
				for range 10 {
					r.wait(oneOfEach[classPeer], time.Now(), true)
				}
				c.end(r)
				assert.LessOrEqual(t, r.wait(oneOfEach[classRefused], time.Now(), false), c.most)
			}
		})
	}
}

func TestEscalationCountsChannelFailuresOfHalfAMinute(t *testing.T) {
	c, now := new(loan), time.Now()
	assert.False(t, c.tooManyChannelFailures(now))
	assert.False(t, c.tooManyChannelFailures(now.Add(29*time.Second)))
	assert.False(t, c.tooManyChannelFailures(now.Add(31*time.Second)))
	assert.True(t, c.tooManyChannelFailures(now.Add(32*time.Second)))
}

func FuzzHeaderIntTakesAnyHeader(f *testing.F) {
	f.Add(int64(3), "x")
	f.Fuzz(func(t *testing.T, n int64, s string) {
		for _, v := range []any{n, int32(n), int16(n), int8(n), int(n), uint8(n), uint16(n), uint32(n), s, nil, []byte(s), amqp.Table{s: n}} {
			d := NewDelivery(amqp.Delivery{Headers: amqp.Table{"x-delivery-count": v}})
			assert.GreaterOrEqual(t, d.Attempt(), 1)
		}
	})
}

func threeHosts() *hosts {
	c := defaults("amqp://a/", "q")
	c.urls = append(c.urls, "amqp://b/", "amqp://c/")
	return newHosts(c)
}

// turns returns the next n hosts, and how many of them are fresh.
func (h *hosts) turns(n int, now time.Time) (addresses []string, fresh int) {
	for range n {
		e, f := h.next(now)
		addresses = append(addresses, e.address)
		if f {
			fresh++
		}
	}
	return addresses, fresh
}

func TestHostsAreTriedLastGoodFirstThenShuffled(t *testing.T) {
	now := time.Now()
	second := make(map[string]bool)
	for range 200 {
		h := threeHosts()
		h.connected("b:5672")
		first, _ := h.turns(1, now)
		assert.Equal(t, []string{"b:5672"}, first)
		h.failed("b:5672", at("lost", wire.ErrPeerReset), now)
		others, fresh := h.turns(2, now)
		second[others[0]] = true
		assert.NotEqual(t, others[0], others[1])
		assert.Equal(t, 2, fresh, "both have their turn at once")
		again, fresh := h.turns(1, now)
		assert.Equal(t, []string{"b:5672"}, again, "a new round starts with the last good one")
		assert.Zero(t, fresh)
	}
	assert.Len(t, second, 2, "the others in random order")
}

// reasonsToGoLast are failures after which a host goes last for a minute.
var reasonsToGoLast = map[string]error{
	"it drains":                 at("lost", said(320, "CONNECTION_FORCED")),
	"it refuses":                at("dial", syscall.ECONNREFUSED),
	"it is no broker":           at("open", &wire.NotAMQPError{First: 'H'}),
	"it fell silent":            at("lost", wire.ErrReadTimeout),
	"it does not finish set-up": at("open", errSetupTimeout),
	"it serves nothing":         at("lost", errStalled),
}

func TestHostThatSaidItClosesRefusedOrFellSilentGoesLastForAMinute(t *testing.T) {
	for reason, err := range reasonsToGoLast {
		t.Run(reason, func(t *testing.T) {
			now := time.Now()
			h := threeHosts()
			h.connected("b:5672")
			h.failed("b:5672", err, now)
			others, _ := h.turns(4, now)
			assert.NotContains(t, others, "b:5672", "those tried before it have another turn")
			last, fresh := h.turns(1, now)
			assert.Equal(t, []string{"b:5672"}, last, "it has a turn all the same: the others may be worse")
			assert.Equal(t, 1, fresh)

			h = threeHosts()
			h.connected("b:5672")
			h.failed("b:5672", err, now)
			first, _ := h.turns(1, now.Add(avoidFor))
			assert.Equal(t, []string{"b:5672"}, first, "after the minute it is as good as any")
		})
	}
}

func TestLastGoodHostIsTriedAgainBeforeOneThatFellSilentBeforeIt(t *testing.T) {
	now := time.Now()
	for range 50 {
		c := defaults("amqp://a/", "q")
		c.urls = append(c.urls, "amqp://b/")
		h := newHosts(c)
		h.failed("a:5672", at("lost", wire.ErrWatchdog), now)
		h.turns(1, now)
		h.connected("b:5672")
		h.failed("b:5672", at("lost", wire.ErrPeerReset), now)
		order, fresh := h.turns(2, now)
		assert.Equal(t, []string{"b:5672", "a:5672"}, order)
		assert.Equal(t, 1, fresh, "the second turn of a host is no fresh one")
	}
}

func TestOfHostsThatGoLastTheOneThatFailedFirstHasItsTurnFirst(t *testing.T) {
	now := time.Now()
	h := threeHosts()
	h.connected("b:5672")
	for i, address := range []string{"c:5672", "a:5672", "b:5672"} {
		h.failed(address, at("lost", said(320, "CONNECTION_FORCED")), now.Add(time.Duration(i)*time.Second))
	}
	order, _ := h.turns(3, now.Add(3*time.Second))
	assert.Equal(t, []string{"c:5672", "a:5672", "b:5672"}, order)
}

func TestEveryHostHasItsTurnHoweverTheOthersFail(t *testing.T) {
	now := time.Now()
	h := threeHosts()
	h.failed("a:5672", at("lost", wire.ErrReadTimeout), now)
	turns := make(map[string]int)
	for range 30 {
		order, _ := h.turns(1, now)
		turns[order[0]]++
		if order[0] == "a:5672" {
			h.failed("a:5672", at("dial", syscall.ETIMEDOUT), now)
		}
		now = now.Add(time.Second)
	}
	assert.GreaterOrEqual(t, turns["a:5672"], 9)
	assert.GreaterOrEqual(t, turns["b:5672"], 9)
	assert.GreaterOrEqual(t, turns["c:5672"], 9)
}

// oneOfEach is a failure of every class.
var oneOfEach = map[class]error{
	classNetwork:     at("open", wire.ErrPeerClosed),
	classRefused:     at("dial", syscall.ECONNREFUSED),
	classForced:      at("open", said(320, "CONNECTION_FORCED - closed")),
	classChannel:     at("consume", said(406, "PRECONDITION_FAILED - unknown delivery tag 5")),
	classAbsent:      at("consume", said(404, "NOT_FOUND - no queue 'q' in vhost '/'")),
	classUnreachable: at("consume", said(406, "PRECONDITION_FAILED - stream queue 'q' in vhost '/' does not have a running replica on the local node")),
	classLocked:      at("consume", said(405, "RESOURCE_LOCKED - locked")),
	classOperator:    at("consume", said(403, "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'")),
	classPeer:        at("open", &wire.NotAMQPError{First: 'H'}),
}

func TestEveryClassHasAPace(t *testing.T) {
	r := newTestRetry()
	for kind := classNetwork; kind <= classPeer; kind++ {
		assert.NotNil(t, r.rule(kind).pace, "class %d", kind)
		assert.Equal(t, kind, classify(oneOfEach[kind]))
	}
}

func TestNoWaitExceedsAGivenLimit(t *testing.T) {
	for _, limits := range [][2]time.Duration{
		{minDuration, minDuration},
		{minDuration, 100 * time.Millisecond},
		{100 * time.Millisecond, 100 * time.Millisecond},
		{minDuration, 700 * time.Millisecond},
		{2 * time.Second, 3 * time.Second},
		{time.Second, 20 * time.Second},
		{minDuration, maxDuration},
		{maxDuration, maxDuration},
	} {
		initial, limit := limits[0], limits[1]
		for kind, err := range oneOfEach {
			c := defaults("amqp://h/", "q")
			WithBackoff(initial, limit)(c)
			assert.Empty(t, c.problems)
			r := newRetry(c)
			now := time.Now()
			for range 200 {
				for _, fresh := range []bool{true, false} {
					wait := r.wait(err, now, fresh)
					assert.GreaterOrEqual(t, wait, time.Duration(0))
					assert.LessOrEqual(t, wait, limit, "class %d with %v", kind, limits)
					now = now.Add(wait)
				}
			}
			r.healthy()
			assert.LessOrEqual(t, r.wait(at("lost", wire.ErrPeerReset), now, false), limit)
		}
	}
}

func TestLimitsOfOneClassStandWithoutWithBackoff(t *testing.T) {
	for kind, limit := range map[class]time.Duration{
		classNetwork: 10 * time.Second, classForced: 10 * time.Second, classChannel: 10 * time.Second,
		classRefused: time.Second, classAbsent: 5 * time.Second, classUnreachable: 5 * time.Second, classOperator: 30 * time.Second, classPeer: 30 * time.Second,
	} {
		_, most := longest(oneOfEach[kind], 40)
		assert.LessOrEqual(t, most, limit, "class %d", kind)
		assert.Greater(t, most, limit*8/10, "class %d", kind)
	}
}

func TestPaceIsDrawnWithoutOverflow(t *testing.T) {
	for _, p := range []pace{
		{0, 0, 0, 0},
		{0, 1, math.MaxInt64 - 1, math.MaxInt},
		{0, math.MaxInt64 - 1, math.MaxInt64 - 1, math.MaxInt},
		{time.Second, time.Second, math.MaxInt64, math.MaxInt},
		{0, maxDuration, maxDuration, 1 << 40},
	} {
		for range 100 {
			wait := p.draw()
			assert.GreaterOrEqual(t, wait, p.floor)
			assert.LessOrEqual(t, wait, p.limit)
		}
	}
}

func TestRefusedDialsDoNotQuickenThePaceOfWhatAnOperatorMends(t *testing.T) {
	for _, kind := range []class{classOperator, classPeer} {
		var total time.Duration
		for range 100 {
			r := newTestRetry()
			for n := range 10 {
				wait := r.wait(oneOfEach[kind], time.Now(), true) // the next host refuses
				wait += r.wait(oneOfEach[classRefused], time.Now(), false)
				if n == 9 {
					total += wait
				}
			}
		}
		assert.Greater(t, total/100, 10*time.Second, "class %d: about half of its limit", kind)
	}
}

func TestWhatConsumeOkProvesStartsAnew(t *testing.T) {
	for _, kind := range []class{classAbsent, classOperator} {
		r := newTestRetry()
		for range 10 {
			r.wait(oneOfEach[kind], time.Now(), false)
		}
		r.consuming()
		assert.Equal(t, time.Second, r.wait(oneOfEach[kind], time.Now(), false))
	}
}

func TestLockIsNoYoungerForWhatFailsMeanwhile(t *testing.T) {
	r := newTestRetry()
	now := time.Now()
	var most time.Duration
	for range 200 { // of two hosts one refuses dials
		now = now.Add(r.wait(oneOfEach[classRefused], now, false))
		wait := r.wait(oneOfEach[classLocked], now, false)
		now, most = now.Add(wait), max(most, wait)
	}
	assert.Greater(t, most, 10*time.Second, "it is the operator's in the end")

	now = now.Add(time.Hour)
	assert.LessOrEqual(t, r.wait(oneOfEach[classLocked], now, false), time.Second, "another lock, an hour later")
}

// A lock that a session has ended is over: the next one may be that of a dead connection again.
func TestLockAfterASessionIsAnotherLock(t *testing.T) {
	r := newTestRetry()
	now := time.Now()
	for end := now.Add(time.Minute); now.Before(end); {
		now = now.Add(r.wait(oneOfEach[classLocked], now, false))
	}
	r.consuming()
	for end := now.Add(30 * time.Second); now.Before(end); {
		wait := r.wait(oneOfEach[classLocked], now, false)
		assert.LessOrEqual(t, wait, time.Second)
		now = now.Add(wait)
	}
}

func TestALockIsWaitedForAsLongAsItsConnectionsHeartbeatsTake(t *testing.T) {
	r, now := newTestRetry(), time.Now()
	r.heartbeat = time.Minute
	assert.True(t, r.lockIsFresh(now))
	assert.True(t, r.lockIsFresh(now.Add(3*time.Minute)))
	assert.False(t, r.lockIsFresh(now.Add(3*time.Minute+lockedExtra)))
}

func TestLockOfShortHeartbeatsIsTheOperatorsForGood(t *testing.T) {
	c := defaults("amqp://h/", "q")
	c.heartbeat = time.Second
	r := newRetry(c)
	now := time.Now()
	for r.rule(classOperator).failures < 8 {
		now = now.Add(r.wait(oneOfEach[classLocked], now, false))
	}
	for range 100 {
		wait := r.wait(oneOfEach[classLocked], now, false)
		assert.GreaterOrEqual(t, wait, time.Second)
		now = now.Add(wait)
	}
}

// receiving returns a supervisor with a connection on which bytes of deliveries arrive every
// second, for as long as given.
func receiving(t *testing.T, during time.Duration) *supervisor {
	near, far := net.Pipe()
	s := wire.NewSocket(near, wire.Options{})
	stop := make(chan struct{})
	t.Cleanup(func() {
		close(stop)
		s.Kill(nil)
		s.Wait()
		_ = far.Close()
	})
	s.Subscribe("t", 1, &receiver{inbox: newInbox(1, hireNobody), aside: newAside(), config: defaults("amqp://h/", "q")})
	go func() { _, _ = io.Copy(io.Discard, far) }()
	go func() { _, _ = io.Copy(io.Discard, s) }()
	_, err := s.Write(methodOf(1, 60, 20, 0, 0, 1, 'q', 1, 't', 0, 0, 0, 0, 0))
	require.NoError(t, err)
	began := time.Now()
	go func() {
		every := time.NewTicker(time.Second)
		defer every.Stop()
		for time.Since(began) < during {
			select {
			case <-every.C:
				_, _ = far.Write(deliveryOf(1, nil))
			case <-stop:
				return
			}
		}
	}()
	c := defaults("amqp://h/", "q")
	c.setupTimeout = 10 * time.Second
	return &supervisor{config: c, ctx: t.Context(), conn: &loan{connection: &connection{socket: s}}}
}

// took returns how long a try may take.
func (s *supervisor) took() (time.Duration, error) {
	since := time.Now()
	ctx, cancel := s.tryContext()
	defer cancel()
	<-ctx.Done()
	return time.Since(since), context.Cause(ctx)
}

func TestLimitOfATryCountsTheSilenceOfAConnectionThatStands(t *testing.T) {
	for during, want := range map[time.Duration]time.Duration{
		0:                10 * time.Second,
		35 * time.Second: 45 * time.Second,
		time.Hour:        100 * time.Second, // others' deliveries come for ever
	} {
		synctest.Test(t, func(t *testing.T) {
			took, cause := receiving(t, during).took()
			assert.Equal(t, want, took, "deliveries for %v", during)
			assert.ErrorIs(t, cause, errSetupTimeout)
		})
	}
}

func TestLimitOfATryOnANewConnectionCountsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := receiving(t, time.Hour)
		s.conn = nil
		took, cause := s.took()
		assert.Equal(t, 10*time.Second, took)
		assert.ErrorIs(t, cause, errSetupTimeout)
	})
}

func TestLimitThatIsCalledOffDoesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := receiving(t, 15*time.Second)
		stop := s.conn.socket.AfterSilence(10*time.Second, time.Hour, func() { t.Error("called") })
		time.Sleep(20 * time.Second) // it has looked once
		stop()
		stop()
		time.Sleep(time.Hour)
	})
}

func TestLimitIsOverInTheEndWhateverComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := receiving(t, time.Hour)
		over := make(chan struct{})
		defer s.conn.socket.AfterSilence(10*time.Second, time.Minute, func() { close(over) })()
		since := time.Now()
		select {
		case <-over:
		case <-time.After(2 * time.Hour):
		}
		assert.Equal(t, time.Minute, time.Since(since))
	})
}

// hostile are names of queues, virtual hosts and users that contain what RabbitMQ says, with the
// quotes and ends of its sentences.
var hostile = []string{
	"unlimited",
	"connection limit (5) is reached",
	"x': connection limit (5) is reached",
	"connection refused: node connection limit (5) is reached",
	"x' refused for user 'y': connection limit (5) is reached",
	"in exclusive use", "x in exclusive use", "x' in vhost '/' in exclusive use", "queue 'x' in exclusive use",
	"is down or inaccessible", "x is down or inaccessible", "home node 'x' is down or inaccessible",
	"x process is stopped by supervisor", "x' in vhost '/' process is stopped by supervisor",
	"failed to perform operation on queue 'x'",
	"x does not have a running replica on the local node", "stream queue 'x' does not have a replica on the local node",
	"timed out", "delivery acknowledgement on channel 1 timed out", "delivery tag", "unknown delivery tag 5",
	"no queue 'y'", "no queue 'y' in vhost '/'", "x' has crashed and failed to restart", "...", "x - y", "NOT_FOUND - x", "'", "''",
}

func TestNamesDecideNoClass(t *testing.T) {
	rows := []struct {
		code int
		text string
		want class
	}{
		{403, "ACCESS_REFUSED - access to queue 'QUEUE' in vhost 'VHOST' refused for user 'USER'", classOperator},
		{403, "ACCESS_REFUSED - read access to queue 'QUEUE' in vhost 'VHOST' refused for user 'USER'", classOperator},
		{403, "ACCESS_REFUSED - queue name 'QUEUE' contains reserved prefix 'amq.*'", classOperator},
		{403, "ACCESS_REFUSED - queue 'QUEUE' in vhost 'VHOST' in exclusive use", classLocked},
		{404, "NOT_FOUND - no queue 'QUEUE' in vhost 'VHOST'", classAbsent},
		{404, "NOT_FOUND - no exchange 'QUEUE' in vhost 'VHOST'", classAbsent},
		{404, "NOT_FOUND - home node 'rabbit@a' of durable queue 'QUEUE' in vhost 'VHOST' is down or inaccessible", classUnreachable},
		{404, "NOT_FOUND - queue 'QUEUE' in vhost 'VHOST' process is stopped by supervisor", classUnreachable},
		{404, "NOT_FOUND - queue 'QUEUE' in vhost 'VHOST' has crashed and failed to restart", classAbsent},
		{404, "NOT_FOUND - failed to perform operation on queue 'QUEUE' in vhost 'VHOST' due to timeout", classUnreachable},
		{405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'QUEUE' in vhost 'VHOST'", classLocked},
		{406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'QUEUE' in vhost 'VHOST': received 'false' but current is 'true'", classOperator},
		{406, "PRECONDITION_FAILED - inequivalent arg 'x-dead-letter-exchange' for queue 'q' in vhost 'VHOST': received none but current is the value 'QUEUE' of type 'longstr'", classOperator},
		{406, "PRECONDITION_FAILED - queue 'QUEUE' in vhost 'VHOST' in use", classOperator},
		{406, "PRECONDITION_FAILED - cannot declare queue 'QUEUE': queue limit in vhost 'VHOST' (5) is reached", classOperator},
		{406, "PRECONDITION_FAILED - consumer prefetch count is not set for stream queue 'QUEUE' in vhost 'VHOST'", classOperator},
		{406, "PRECONDITION_FAILED - stream queue 'QUEUE' in vhost 'VHOST' does not have a running replica on the local node", classUnreachable},
		{406, "PRECONDITION_FAILED - queue 'queue 'QUEUE' in vhost 'VHOST'' does not have a running replica on the local node", classUnreachable},
		{406, "PRECONDITION_FAILED - queue 'queue 'QUEUE' in vhost 'VHOST'' does not have a replica on the local node", classUnreachable},
		{530, "NOT_ALLOWED - vhost VHOST not found", classOperator},
		{530, "NOT_ALLOWED - access to vhost 'VHOST' refused for user 'USER'", classOperator},
		{530, "NOT_ALLOWED - access to vhost 'VHOST' refused for user 'USER': connection limit (5) is reached", classLocked},
		{530, "NOT_ALLOWED - access to vhost 'VHOST' refused for user 'USER': connection limit cannot be queried, timeout", classLocked},
		{530, "NOT_ALLOWED - connection refused for user 'USER': user connection limit (5) is reached", classLocked},
		{530, "NOT_ALLOWED - connection refused: node connection limit (5) is reached", classLocked},
		{530, "NOT_ALLOWED - number of channels opened for user 'USER' has reached the maximum allowed user limit of (5)", classLocked},
		{530, "NOT_ALLOWED - number of channels opened on node 'QUEUE' has reached the maximum allowed limit of 5", classLocked},
		{530, "NOT_ALLOWED - number of channels opened (5) has reached the negotiated channel_max (5)", classOperator},
		{530, "NOT_ALLOWED - attempt to reuse consumer tag 'QUEUE'", classOperator},
		{541, "INTERNAL_ERROR - access to vhost 'VHOST' refused for user 'USER': vhost 'VHOST' is down", classOperator},
		{541, "INTERNAL_ERROR - timed out consuming from quorum queue 'QUEUE' in vhost 'VHOST': {x,y}", classOperator},
		{320, "CONNECTION_FORCED - QUEUE", classForced},
	}
	for _, r := range rows {
		for _, name := range append(hostile, "orders") {
			for _, names := range [][3]string{{name, "/", "app"}, {"orders", name, "app"}, {"orders", "/", name}, {name, name, name}} {
				text := strings.NewReplacer("QUEUE", names[0], "VHOST", names[1], "USER", names[2]).Replace(r.text)
				if len(text) >= 255 { // RabbitMQ would cut it
					continue
				}
				assert.Equal(t, r.want, classify(at("open", said(r.code, text))), "%s", text)
			}
		}
	}
}

// cut shortens a text as RabbitMQ does.
func cut(text string) string { return text[:252] + "..." }

func TestTextThatWasCutOffIsTakenForWhatPasses(t *testing.T) {
	long := strings.Repeat("n", 250)
	rows := []struct {
		code int
		text string
		want class
	}{
		{403, "ACCESS_REFUSED - queue '" + long, classLocked},
		{403, "ACCESS_REFUSED - access to queue '" + long, classOperator},
		{404, "NOT_FOUND - no queue '" + long, classAbsent},
		{404, "NOT_FOUND - home node 'rabbit@a' of durable queue '" + long, classUnreachable},
		{406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue '" + long, classOperator},
		{406, "PRECONDITION_FAILED - stream queue '" + long, classUnreachable},
		{530, "NOT_ALLOWED - vhost " + long, classOperator},
		{530, "NOT_ALLOWED - access to vhost '" + long, classLocked},
	}
	for _, r := range rows {
		assert.Equal(t, r.want, classify(at("open", said(r.code, cut(r.text)))), "%s", r.text)
	}
}

func TestStreamStartsOverOnlyIfItIsGoneItself(t *testing.T) {
	long := strings.Repeat("n", 255)
	rows := []struct {
		stream, text string
		gone         bool
	}{
		{"events", "NOT_FOUND - no queue 'events' in vhost '/'", true},
		{"it's", "NOT_FOUND - no queue 'it's' in vhost '/'", true},
		{long, cut("NOT_FOUND - no queue '" + long), true},
		{"events", "NOT_FOUND - no queue 'other' in vhost '/'", false},
		{"events", "NOT_FOUND - no queue 'events2' in vhost '/'", false},
		{"events", "NOT_FOUND - no exchange 'no queue 'events' in vhost '' in vhost '/'", false},
		{"events", "NOT_FOUND - queue 'no queue 'events'' in vhost '/' has crashed and failed to restart", false},
		{"events", cut("NOT_FOUND - no queue '" + long), false},
	}
	for _, r := range rows {
		p := &position{queue: r.stream, known: true, next: 7}
		p.setupFailed(at("topology", said(404, r.text)))
		assert.Equal(t, r.gone, p.next == 0, "%s", r.text)
	}
	p := &position{queue: "events", known: true, next: 7}
	p.setupFailed(at("topology", said(403, "NOT_FOUND - no queue 'events' in vhost '/'")))
	p.setupFailed(at("topology", wire.ErrPeerReset))
	assert.EqualValues(t, 7, p.next)
}
