package steadymq

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/big"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/wire"
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
		classAbsent: false, classLocked: false, classOperator: false, classStore: false,
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
	classStore:       at("offsets", &storeError{said(404, "NOT_FOUND - no queue 'q' in vhost '/'")}),
}

func TestEveryClassHasAPace(t *testing.T) {
	r := newTestRetry()
	for kind := classNetwork; kind <= classStore; kind++ {
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
		classRefused: time.Second, classAbsent: 5 * time.Second, classUnreachable: 5 * time.Second, classOperator: 30 * time.Second, classPeer: 30 * time.Second, classStore: 10 * time.Second,
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

// The driver reports the broker's connection.close before its close-ok is on the wire, and holds
// its mutex until then. Closing the socket at once would lose the close-ok. Waiting for the mutex
// would stop the clock of the bubble.
func TestBrokersCloseIsAnsweredHoweverSlowlyItReads(t *testing.T) {
	still := time.AfterFunc(20*time.Second, func() { panic("time stands still: a goroutine waits for the driver's mutex") })
	defer still.Stop()
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		c := defaults("amqp://guest:guest@mq.example/", "q")
		c.dial = func(context.Context, string, string) (net.Conn, error) { return near, nil }
		e, err := parseEndpoint(c.urls[0])
		require.NoError(t, err)
		played := make(chan error, 1)
		go func() { played <- broker(far) }()
		conn, err := openConnection(t.Context(), c, e, newStep("dial"), func() {})
		require.NoError(t, err)
		require.NoError(t, <-played)

		_, err = far.Write(methodOf(0, 10, 50, 1, 0x40, 3, 'b', 'y', 'e', 0, 0, 0, 0))
		require.NoError(t, err)
		time.Sleep(time.Second)
		brokerErr, err := io.ReadAll(far)
		require.NoError(t, err)
		<-conn.done

		assert.Equal(t, methodOf(0, 10, 51), brokerErr)
		assert.ErrorContains(t, conn.end.Cause(), "bye")
	})
}

// The frames of AMQP 0-9-1 are built and read here by other code than the library's.

func frameOf(typ byte, channel uint16, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{typ}, channel)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(append(b, payload...), 0xCE)
}

func methodOf(channel, class, method uint16, args ...byte) []byte {
	id := binary.BigEndian.AppendUint16(nil, class)
	id = binary.BigEndian.AppendUint16(id, method)
	return frameOf(1, channel, append(id, args...)...)
}

func deliveryOf(tag uint64, body []byte) []byte {
	args := binary.BigEndian.AppendUint64([]byte{1, 't'}, tag)
	b := methodOf(1, 60, 60, append(args, 0, 0, 1, 'q')...)
	b = append(b, frameOf(2, 1, append(binary.BigEndian.AppendUint64([]byte{0, 60, 0, 0}, uint64(len(body))), 0, 0)...)...)
	if len(body) > 0 {
		b = append(b, frameOf(3, 1, body...)...)
	}
	return b
}

// broker plays the broker's half of the driver's handshake on far, answers what a consumer asks,
// and then hands over the stream.
func broker(far net.Conn) error {
	if _, err := io.ReadFull(far, make([]byte, 8)); err != nil {
		return err
	}
	long := func(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }
	start := append([]byte{0, 9, 0, 0, 0, 0}, append(long("PLAIN"), long("en_US")...)...)
	if _, err := far.Write(methodOf(0, 10, 10, start...)); err != nil {
		return err
	}
	replies := map[uint32][]byte{
		10<<16 | 11: methodOf(0, 10, 30, 0x07, 0xff, 0, 2, 0, 0, 0, 60),
		10<<16 | 40: methodOf(0, 10, 41, 0),
		20<<16 | 10: methodOf(1, 20, 11, 0, 0, 0, 0),
	}
	for {
		id, err := readMethod(far)
		if err != nil {
			return err
		}
		if _, err := far.Write(replies[id]); err != nil {
			return err
		}
		if id == 10<<16|40 {
			return nil
		}
	}
}

// readMethod returns the class and method of the next frame, 0 of a heartbeat.
func readMethod(r io.Reader) (uint32, error) {
	head := make([]byte, 7)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, err
	}
	payload := make([]byte, binary.BigEndian.Uint32(head[3:])+1)
	if _, err := io.ReadFull(r, payload); err != nil || head[0] != 1 {
		return 0, err
	}
	return binary.BigEndian.Uint32(payload), nil
}

var socketLimits = wire.Options{
	IdleTimeout:  20 * time.Second,
	WriteTimeout: 10 * time.Second,
	WriteDelay:   time.Millisecond,
}

// heartbeat is a whole heartbeat frame (AMQP 0-9-1, 4.2.7).
var heartbeat = []byte{8, 0, 0, 0, 0, 0, 0, 0xCE}

func TestOpenSocketEndsWithItsContext(t *testing.T) {
	reason := errors.New("setup limit")
	limited := func(t *testing.T) context.Context {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 15*time.Second, reason)
		t.Cleanup(cancel)
		return ctx
	}
	t.Run("TLS peer that stops in its handshake", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			near, far := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, far) }()
			began := time.Now()
			_, err := openSocket(limited(t), dialTo(near), "mq.example:5671", &tls.Config{}, socketLimits, func() {})
			assert.ErrorIs(t, err, reason)
			assert.Equal(t, 15*time.Second, time.Since(began))
			_, err = near.Write([]byte{0})
			assert.ErrorIs(t, err, io.ErrClosedPipe, "nothing stays open")
		})
	})
	t.Run("dial that hangs", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			began := time.Now()
			_, err := openSocket(limited(t), dial, "mq.example:5672", nil, socketLimits, func() {})
			assert.ErrorIs(t, err, reason)
			assert.Equal(t, 15*time.Second, time.Since(began))
		})
	})
	t.Run("dial that fails", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			refused := errors.New("connection refused")
			dial := func(context.Context, string, string) (net.Conn, error) { return nil, refused }
			_, err := openSocket(limited(t), dial, "mq.example:5672", nil, socketLimits, func() {})
			assert.Equal(t, refused, err, "ctx has nothing to do with it")
		})
	})
}

func dialTo(conn net.Conn) wire.DialFunc {
	return func(context.Context, string, string) (net.Conn, error) { return conn, nil }
}

func TestTLSOnARealSocket(t *testing.T) {
	server, client := certificates(t)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", server)
	require.NoError(t, err)
	defer listener.Close()
	echoed := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			echoed <- err
			return
		}
		defer conn.Close()
		_, err = io.Copy(conn, conn) // nil only if the client says goodbye
		echoed <- err
	}()

	s, err := openSocket(t.Context(), wire.DefaultDial(5*time.Second, 15*time.Second), listener.Addr().String(), client, socketLimits, func() {})
	require.NoError(t, err)
	assert.Empty(t, client.ServerName, "the caller's config is not touched")
	sent := bytes.Repeat(heartbeat, 20_000)
	go func() { _, _ = s.Write(sent) }()
	got := make([]byte, len(sent))
	_, err = io.ReadFull(s, got)
	require.NoError(t, err)
	assert.True(t, bytes.Equal(sent, got))
	require.NoError(t, s.Close())
	require.NoError(t, <-echoed)
	s.Wait()
}

func TestTLSRefusedSaysWhy(t *testing.T) {
	server, client := certificates(t)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", server)
	require.NoError(t, err)
	defer listener.Close()
	refused := make(chan struct{})
	go func() {
		defer close(refused)
		if conn, err := listener.Accept(); err == nil {
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}
	}()
	client.ServerName = "another.example"
	_, err = openSocket(t.Context(), wire.DefaultDial(5*time.Second, 0), listener.Addr().String(), client, socketLimits, func() {})
	var invalid *tls.CertificateVerificationError
	assert.ErrorAs(t, err, &invalid)
	<-refused
}

func TestTLSSpokenToAPortWithoutItSaysSo(t *testing.T) {
	for answer, says := range map[string]string{
		"AMQP\x00\x00\x09\x01":     "AMQP without TLS",
		"HTTP/1.1 400 Bad Request": "check host and port",
	} {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			if conn, err := listener.Accept(); err == nil {
				_, _ = conn.Write([]byte(answer))
				_, _ = io.Copy(io.Discard, conn)
				_ = conn.Close()
			}
		}()
		_, err = openSocket(t.Context(), wire.DefaultDial(5*time.Second, 0), listener.Addr().String(), &tls.Config{}, socketLimits, func() {})
		var record tls.RecordHeaderError
		assert.ErrorAs(t, err, &record)
		assert.ErrorContains(t, err, says)
		<-answered
		require.NoError(t, listener.Close())
	}
}

// certificates returns the configs of a server at 127.0.0.1 and of its client.
func certificates(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: roots}
}

func TestURLThatIsReadIsDialledAtItsHost(t *testing.T) {
	for text, want := range map[string]string{"amqp://host": "host:5672", "amqps://u:p@[2001:db8::1]/v": "[2001:db8::1]:5671"} {
		e, err := parseEndpoint(text)
		require.NoError(t, err)
		assert.Equal(t, want, e.address)
	}
}

// An operator may mend what a function gives, and New says which URL is wrong.
func TestURLThatIsRefusedIsForAnOperator(t *testing.T) {
	for text, want := range map[string]string{
		"amqp://user:Xq9z@Xq9z@host": "the URL has an unescaped @ in user or password",
		"amqp://host?heartbeat=0":    "the parameter heartbeat of the URL must be 1 to 600",
		"amqp://host?channel_max=x":  "the parameter channel_max of the URL must be 0 to 65535",
		"":                           "the URL is empty: want amqp:// or amqps://user:password@host:port/vhost, or WithURLFunc",
	} {
		e, err := parseEndpoint(text)
		require.Error(t, err, text)
		assert.Zero(t, e, text)
		assert.Equal(t, classOperator, classify(&SessionError{Op: "dial", Err: err}), text)
		_, err = New("amqp://host", "q", WithURLs("amqp://other", text))
		assert.ErrorContains(t, err, "steadymq: WithURLs: URL 2: "+want, text)
	}
}

func TestURLsMechanismsCountInAnyCase(t *testing.T) {
	e, err := parseEndpoint("amqps://u:p@h?auth_mechanism=External&auth_mechanism=AMQPLAIN&auth_mechanism=plain")
	require.NoError(t, err)
	var names []string
	for _, a := range e.login(nil) {
		names = append(names, a.Mechanism())
	}
	assert.Equal(t, []string{"EXTERNAL", "AMQPLAIN", "PLAIN"}, names)
}

func TestEachURLHasItsOwnHeartbeatAndDialTimeout(t *testing.T) {
	urls := []string{"amqp://a?heartbeat=2&connection_timeout=1500", "amqp://b?heartbeat=60", "amqp://c"}
	limits := func(opts ...Option) (all [][2]time.Duration) {
		c, err := build(urls[0], "q", append(opts, WithURLs(urls[1:]...)))
		require.NoError(t, err)
		for _, e := range newHosts(c).endpoints {
			assert.Equal(t, 2*c.heartbeatOf(e), socketOptions(c, e).IdleTimeout)
			all = append(all, [2]time.Duration{amqpConfig(c, e).Heartbeat, c.dialTimeoutOf(e)})
		}
		return all
	}
	const s = time.Second
	assert.Equal(t, [][2]time.Duration{{2 * s, 3 * s / 2}, {60 * s, 5 * s}, {10 * s, 5 * s}}, limits())
	assert.Equal(t, [][2]time.Duration{{7 * s, s}, {7 * s, s}, {7 * s, s}}, limits(WithHeartbeat(7*s), WithDialTimeout(s)), "the options come first")
}

func TestURLAndOptionsThatContradictAreRefused(t *testing.T) {
	secure := "amqps://u:p@h?"
	for _, c := range []struct {
		url, want string
		opt       Option
	}{
		{"amqp://u:p@h", "WithTLSConfig: the URL has the scheme amqp, which is not encrypted; use amqps", WithTLSConfig(new(tls.Config))},
		{secure + "cacertfile=/ca", "WithTLSConfig: takes the place of cacertfile", WithTLSConfig(new(tls.Config))},
		{secure + "certfile=/c&keyfile=/k", "WithTLSConfig: takes the place of cacertfile", WithTLSConfig(new(tls.Config))},
		{secure + "server_name_indication=x", "WithTLSConfig: takes the place of cacertfile", WithTLSConfig(new(tls.Config))},
		{secure + "auth_mechanism=plain", "WithSASL: takes the place of auth_mechanism", WithSASL(&amqp.ExternalAuth{})},
		{secure + "auth_mechanism=plain", "WithCredentials: logs in by the mechanism PLAIN", WithCredentials(func(context.Context) (Credentials, error) { return Credentials{}, nil })},
	} {
		_, err := New(c.url, "q", c.opt)
		assert.ErrorContains(t, err, c.want, c.url)
		_, err = New("amqps://h", "q", c.opt, WithURLs(c.url))
		assert.ErrorContains(t, err, "URL 1 of WithURLs", c.url)
	}
}

func TestPortIsNamedHoweverThePeerEnds(t *testing.T) {
	e := endpoint{uri: amqp.URI{Scheme: "amqp", Port: 15672}}
	for _, end := range []error{
		io.EOF, io.ErrUnexpectedEOF, wire.ErrPeerReset, syscall.ECONNRESET, errSetupTimeout,
		&wire.NotAMQPError{First: 'H'},
		tls.RecordHeaderError{},
	} {
		assert.ErrorAs(t, namePort(e, end), new(*wrongPortError), "%v", end)
	}
	assert.NotErrorAs(t, namePort(e, syscall.ECONNREFUSED), new(*wrongPortError))
}

// The one that has asked leaves the connection to one that waits, and that may give up at that moment.
func TestConnectionForQuestionsIsClosedByWhoLeavesLast(t *testing.T) {
	cs := newConnections(new(config), new(counters))
	c := &connection{amqp: new(amqp.Connection), end: newNotifier(), stop: make(chan closeRequest, 1), done: make(chan struct{})}
	close(c.done)
	i := cs.inquiry("host")
	require.Same(t, i, cs.inquiry("host"))
	i.conn = c
	i.closeIfDead()
	cs.forget("host", i)
	require.False(t, c.stopped)
	cs.forget("host", i)
	require.True(t, c.stopped)
	require.Empty(t, cs.inquiries)
}

func TestPlaceByTheClockAllowsForClocksThatDiffer(t *testing.T) {
	since := time.Unix(1_700_000_000, 0)
	for name, test := range map[string]struct {
		since time.Time
		want  time.Time
	}{
		"now":              {since, since.Add(-5 * time.Minute)},
		"before 1970":      {since.Add(-math.MaxInt64), time.Unix(0, 0)}, // AMQP has no such time
		"soon after 1970":  {time.Unix(60, 0), time.Unix(0, 0)},
		"an hour earlier":  {since.Add(-interval("1h")), since.Add(-65 * time.Minute)},
		"as last stands":   {since.Add(-interval("last")), since.Add(-5 * time.Minute)},
		"an age too large": {since.Add(-interval("99999999Y")), time.Unix(0, 0)},
	} {
		p := new(position)
		p.assume(test.since)
		assert.Equal(t, amqp.Table{offsetKey: test.want}, p.resume(1, nil, false), name)
		assert.NoError(t, p.resume(1, nil, false).Validate())
	}
}

func TestIntervalsAreThoseOfRabbitMQ(t *testing.T) {
	const day = 24 * time.Hour
	for text, want := range map[any]time.Duration{
		"1s": time.Second, "90s": 90 * time.Second, "2m": 2 * time.Minute, "1h": time.Hour, "3D": 3 * day, "1M": 30 * day, "1Y": 365 * day,
		"0h": 0, "": 0, "h": 0, "last": 0, "1": 0, "1H": 0, "1.5h": 0, "-1h": 0, "+1h": 0, nil: 0, 5: 0,
		"99999999999999999999h": 0, // no broker takes it
	} {
		assert.Equal(t, want, interval(text), text)
	}
	assert.GreaterOrEqual(t, interval("9000Y"), 290*365*day)
}

// A stream may hold more than a slow path carries within the setup limit.
func TestPlaceThatIsCutOffAgainAndAgainIsTakenFromTheClock(t *testing.T) {
	for given, want := range map[any]int{"last": maxLookups, "next": 1, "1h": 1, nil: 1, "first": 0, 5: 0} {
		p, looks := new(position), 0
		for range 5 {
			if _, unclear := p.needsLookup("log", given); unclear {
				looks++
				_ = p.assume(time.Now())
			}
		}
		assert.Equal(t, want, looks, given)
	}
}

func streamAt(tag uint64, offset int64) *Delivery {
	d := newDelivery()
	d.DeliveryTag, d.Headers = tag, amqp.Table{offsetKey: offset}
	d.fence.tag = tag
	return d
}

// With x-stream-filter the offsets of the deliveries have gaps. Workers begin in any order.
func TestPlaceIsThatOfTheFirstMessageThoughAFilterLeavesGaps(t *testing.T) {
	p := &position{settled: newWatermark(), acked: newWatermark()}
	p.resume(1, amqp.Table{offsetKey: "first"}, false)
	p.subscribed("first")
	p.began(1, streamAt(2, 100))
	p.began(1, streamAt(1, 0))
	assert.LessOrEqual(t, p.resume(2, nil, false)[offsetKey], int64(0))
}

// The answer to the lookup of an abandoned try may arrive when its successor has subscribed.
func TestLateRefusalOfALookLeavesThePlaceOfALaterSession(t *testing.T) {
	p := &position{settled: newWatermark(), acked: newWatermark()}
	p.needsLookup("s", "next")
	answered := p.assume(time.Now())
	p.needsLookup("s", "next")
	from := p.resume(2, nil, false)[offsetKey]
	p.subscribed(from)
	_ = answered(&amqp.Error{Code: 541, Server: true})
	assert.Equal(t, from, p.resume(3, nil, false)[offsetKey])
}

// hireNobody is for an inbox whose workers are there already.
func hireNobody() bool { return true }

func TestMoreThanThePrefetchIsKept(t *testing.T) {
	box := newInbox(2, hireNobody)
	to := &receiver{inbox: box, aside: newAside(), config: defaults("amqp://h/", "q")}
	for tag := range uint64(100) { // a stream's chunk
		d := to.New()
		d.DeliveryTag = tag + 1
		to.Put(d)
	}
	for tag := range uint64(100) {
		d, ok := box.take()
		require.True(t, ok)
		require.Equal(t, tag+1, d.DeliveryTag, "in order")
	}
}

// An inbox has room for what has come so far, not for all that the prefetch lets come.
func TestInboxGrowsWithWhatWaitsInIt(t *testing.T) {
	const prefetch = 1000
	box := newInbox(prefetch, hireNobody)
	assert.LessOrEqual(t, cap(box.last.waiting), 32, "an idle one is small")
	var last *stretch
	for burst := range 4 {
		for range prefetch {
			box.put(&Delivery{})
		}
		assert.Equal(t, prefetch, box.waiting())
		for range prefetch {
			_, _ = box.take()
		}
		box.put(&Delivery{})
		_, _ = box.take()
		assert.Zero(t, box.waiting())
		assert.Same(t, box.last, box.first.Load(), "those before the last one are gone")
		assert.LessOrEqual(t, cap(box.last.waiting), prefetch)
		if burst > 1 {
			assert.Same(t, last, box.last, "it is long enough, and grows no more")
		}
		last = box.last
	}
}

func TestOneWorkerTakesInOrderWhileTheInboxGrows(t *testing.T) {
	box := newInbox(64, hireNobody)
	go func() {
		for tag := range uint64(20_000) {
			d := &Delivery{}
			d.DeliveryTag = tag
			box.put(d)
		}
		box.close()
	}()
	want := uint64(0)
	for d, ok := box.take(); ok; d, ok = box.take() {
		require.Equal(t, want, d.DeliveryTag)
		want++
	}
	assert.EqualValues(t, 20_000, want)
}

func TestInboxUnderManyHands(t *testing.T) {
	const workers, messages = 4, 20_000
	for _, size := range []int{1, 3, 256} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			box := newInbox(size, hireNobody)
			var mu sync.Mutex
			seen := make(map[uint64]int)
			var working sync.WaitGroup
			for range workers {
				working.Go(func() {
					for {
						d, ok := box.take()
						if !ok {
							return
						}
						mu.Lock()
						seen[d.DeliveryTag]++
						if d.DeliveryTag == messages/2 {
							box.close()
						}
						mu.Unlock()
					}
				})
			}
			for tag := range uint64(messages) {
				d := &Delivery{}
				d.DeliveryTag = tag
				box.put(d)
			}
			working.Wait()
			for _, d := range box.clear() {
				seen[d.DeliveryTag]++
			}
			assert.Len(t, seen, messages)
			for tag, n := range seen {
				require.Equal(t, 1, n, tag)
			}
		})
	}
}

// What waited beyond the prefetch is not kept after it was taken.
func TestInboxForgetsWhatWasTaken(t *testing.T) {
	box := newInbox(1, hireNobody)
	freed := make(chan struct{}, 100)
	for range 100 {
		d := &Delivery{}
		runtime.AddCleanup(d, func(ended chan struct{}) { ended <- struct{}{} }, freed)
		box.put(d)
	}
	for range 50 {
		_, _ = box.take()
	}
	runtime.GC()
	for range 40 { // what is still in the channel and on the stack aside
		select {
		case <-freed:
		case <-time.After(10 * time.Second):
			t.Fatal("taken deliveries are kept")
		}
	}
	runtime.KeepAlive(box)
}

func TestWaitingCountsWhatDoesNotFit(t *testing.T) {
	box := newInbox(2, func() bool { return true })
	for n := range 5 {
		assert.Equal(t, n, box.waiting())
		box.put(&Delivery{})
	}
	_, _ = box.take()
	assert.Equal(t, 4, box.waiting())
}

// A host that was cut off may know of no consumer at all, ours included.
func TestMessagesWaitForUsWhereNobodyElseConsumes(t *testing.T) {
	c := defaults("amqp://h/", "q")
	p := &prober{session: &session{scope: &scope{config: c}}}
	assert.True(t, p.waits(amqp.Queue{Messages: 1, Consumers: 0}))
	assert.True(t, p.waits(amqp.Queue{Messages: 1, Consumers: 1}))
	assert.False(t, p.waits(amqp.Queue{Messages: 1, Consumers: 2}))
	assert.False(t, p.waits(amqp.Queue{Messages: 0, Consumers: 1}))
	c.declare = &Queue{Args: amqp.Table{"x-single-active-consumer": true}}
	assert.False(t, p.waits(amqp.Queue{Messages: 1, Consumers: 1}), "the active one may be another")
}

// Whatever a peer does that is no broker, its port is named.
func TestInboxThatIsClearedKeepsNothing(t *testing.T) {
	box := newInbox(10, hireNobody)
	for range 50 {
		box.put(&Delivery{})
	}
	box.close()
	assert.Len(t, box.clear(), 50)
	assert.Empty(t, box.last.waiting)
	assert.Zero(t, box.waiting())
}

// A lookup that compares is cut off, and the topology function names another stream: what is found
// there is a position of that stream, compared with nothing.
func TestPositionOfAnotherStreamIsComparedWithNothing(t *testing.T) {
	for name, cut := range map[string]bool{"before the lookup": false, "in the lookup": true} {
		t.Run(name, func(t *testing.T) {
			p := &position{settled: newWatermark(), acked: newWatermark()}
			p.needsLookup("a", "next")
			p.resume(1, nil, true)
			p.subscribed("next")
			p.locate(100)
			p.fallSilent(60)
			if cut {
				offset, _ := p.needsLookup("a", "next")
				require.Equal(t, "first", offset)
			}
			offset, needed := p.needsLookup("b", "next")
			assert.Equal(t, "next", offset)
			assert.True(t, needed)
			p.locate(7)
			assert.EqualValues(t, 7, p.resume(2, nil, true)[offsetKey])
		})
	}
}

// Only a stream that has dropped nothing tells by its length that it is another one.
func TestPositionStartsOverOnlyInAStreamThatIsAnotherOne(t *testing.T) {
	for name, c := range map[string]struct {
		first  int64
		length int
		want   int64
	}{
		"shorter, from its beginning":        {0, 60, 0},
		"as long":                            {0, 100, 100},
		"shorter, for it has dropped some":   {50, 60, 100},
		"not known where the stream begins":  {unknownOffset, 60, 100},
		"nothing is wrong":                   {0, 0, 100},
		"longer, so the position is in it":   {0, 160, 100},
		"shorter by one message than it was": {0, 99, 0},
	} {
		t.Run(name, func(t *testing.T) {
			p := &position{settled: newWatermark(), acked: newWatermark()}
			p.needsLookup("s", "first")
			p.resume(1, nil, false)
			p.subscribed("first")
			p.locate(100)
			p.fallSilent(c.length)
			offset, needed := p.needsLookup("s", "first")
			assert.Equal(t, c.length > 0, needed)
			if needed {
				assert.Equal(t, "first", offset)
				p.locate(c.first)
			}
			assert.Equal(t, c.want, p.resume(2, nil, true)[offsetKey])
			_, needed = p.needsLookup("s", "first")
			assert.False(t, needed, "once")
		})
	}
}

// A try that returns after it was abandoned has a session that nobody else would end.
func TestTryThatComesBackTooLateIsClosed(t *testing.T) {
	for name, own := range map[string]bool{"on a connection of its own": true, "on the supervisor's connection": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				reason := errors.New("set-up limit")
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, reason)
				defer cancel()
				late := &session{finishing: true, done: make(chan struct{})}
				conn := &connection{stop: make(chan closeRequest, 1), closeTimeout: time.Second}
				var giveBack func()
				if own {
					giveBack = func() { conn.close(closeRequest{limit: conn.closeTimeout}) }
				}
				began := time.Now()
				step := newStep("dial")
				step.at("consume")

				a := runBounded(ctx, func() attempt {
					time.Sleep(time.Minute)
					return attempt{conn: &loan{connection: conn}, giveBack: giveBack, session: late}
				}, step)

				assert.Equal(t, time.Second+tryGrace, time.Since(began))
				require.ErrorIs(t, a.err, reason)
				assert.ErrorContains(t, a.err, "consume")
				assert.Nil(t, a.session)
				time.Sleep(time.Minute)
				synctest.Wait()
				assert.Empty(t, conn.stop, "not before its session has gone")
				close(late.done)
				synctest.Wait()
				assert.Len(t, conn.stop, map[bool]int{true: 1, false: 0}[own])
			})
		})
	}
}

func TestTryThatExitsIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := runBounded(t.Context(), func() attempt {
			runtime.Goexit()
			return attempt{}
		}, newStep("dial"))
		assert.ErrorIs(t, a.err, errNoResult)
	})
}

func TestHourOfFailuresIsAtMost100Lines(t *testing.T) {
	for _, every := range []time.Duration{10 * time.Millisecond, 400 * time.Millisecond, 1100 * time.Millisecond, 30 * time.Second, 61 * time.Second} {
		t.Run(every.String(), func(t *testing.T) {
			var f failures
			what := failure{of: &session{conn: &loan{connection: &connection{}}}, err: errors.New("away")}
			told, left := 0, uint64(0)
			start := time.Now()
			for passed := time.Duration(0); passed <= time.Hour; passed += every {
				if n, due := f.add(start.Add(passed), what); due {
					told++
					left += n
				}
			}
			assert.LessOrEqual(t, told, 100)
			assert.GreaterOrEqual(t, told, 58)
			assert.EqualValues(t, time.Hour/every+1, uint64(told)+left+f.suppressed, "all are counted")
		})
	}
}

// newTestReporter returns a reporter that logs nothing, and what it has dropped.
func newTestReporter() (*reporter, *atomic.Uint64) {
	dropped := new(atomic.Uint64)
	return newReporter(context.Background(), &config{logger: slog.New(slog.DiscardHandler)}, dropped), dropped
}

// reports tells whether there is a goroutine that reports.
func (r *reporter) reports() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running
}

func TestEventAfterAQuietTimeIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newTestReporter()
		assert.False(t, r.reports(), "nothing to report yet")
		for n := range 20 { // the second one comes sooner or later after the first
			told := 0
			r.tell(func() { told++ })
			time.Sleep(time.Duration(n) * 100 * time.Microsecond)
			r.tell(func() { told++ })
			time.Sleep(time.Second)
			synctest.Wait()
			assert.Equal(t, 2, told)
			assert.False(t, r.reports(), "an idle consumer keeps no goroutine for it")
		}
		r.stop()
	})
}

func TestEventWaitsForTheOneBeforeIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, dropped := newTestReporter()
		block := make(chan struct{})
		var told []int
		r.tell(func() { <-block })
		for n := range reportBacklog {
			r.tell(func() { told = append(told, n) })
			synctest.Wait() // while the first one hangs
			require.Empty(t, told)
		}
		assert.Zero(t, dropped.Load())
		r.tell(func() { t.Error("one too many") })
		assert.EqualValues(t, 1, dropped.Load())
		close(block)
		synctest.Wait()
		require.Len(t, told, reportBacklog)
		for n := range told {
			require.Equal(t, n, told[n])
		}
		r.stop()
	})
}

// A goroutine that ends must not miss the event that comes at the same time, nor two of them use
// the journal.
func TestEventsUnderManyHandsAreToldOnce(t *testing.T) {
	const hands, events = 4, 20_000
	r, dropped := newTestReporter()
	var told int // without a lock: one goroutine follows the other
	var working sync.WaitGroup
	for range hands {
		working.Go(func() {
			for range events {
				r.tell(func() { told++ })
				runtime.Gosched()
			}
		})
	}
	working.Wait()
	r.stop()
	assert.EqualValues(t, hands*events, uint64(told)+dropped.Load())
}

// What a user has switched off costs no line.
func TestFailureBelowTheLevelOfTheLoggerMakesNoLine(t *testing.T) {
	lines := 0
	j := newJournal(t.Context(), slog.New(levelHandler{slog.LevelError, &lines}))
	defer j.stop()
	record, due := j.failed(failure{of: &session{conn: &loan{connection: &connection{}}}, delivery: NewDelivery(amqp.Delivery{}), err: errors.New("away")})
	assert.True(t, due)
	j.writeFailure(record)
	assert.Zero(t, lines)
}

type levelHandler struct {
	level slog.Level
	lines *int
}

func (h levelHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }
func (h levelHandler) Handle(context.Context, slog.Record) error        { *h.lines++; return nil }
func (h levelHandler) WithAttrs([]slog.Attr) slog.Handler               { return h }
func (h levelHandler) WithGroup(string) slog.Handler                    { return h }
