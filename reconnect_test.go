package steadymq

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/wire"
	"github.com/stretchr/testify/assert"
)

func said(code int, text string) error {
	return &amqp.Error{Code: code, Reason: text, Server: true}
}

func at(op string, err error) error { return &SessionError{Op: op, Session: 1, Err: err} }

// One row per row of docs/FAULTS.md that a consumer can meet; the number is that row's.
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
		{"33 queue's node down", at("consume", said(404, "NOT_FOUND - home node 'x' of durable queue 'q' in vhost '/' is down or inaccessible")), classNetwork},
		{"33 queue's node just started", at("consume", said(404, "NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor")), classNetwork},
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
		{"60 no local replica", at("consume", said(406, "PRECONDITION_FAILED - stream queue 'q' in vhost '/' does not have a running replica on the local node")), classNetwork},
		{"60 replica not there yet", at("consume", said(406, "PRECONDITION_FAILED - queue 'queue 'q' in vhost '/'' does not have a replica on the local node")), classNetwork},
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
	assert.LessOrEqual(t, r.wait(lost, time.Now(), false), atOnce)

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
		assert.LessOrEqual(t, r.wait(at("dial", syscall.ECONNREFUSED), time.Now(), true), atOnce)
	}
	assert.GreaterOrEqual(t, r.wait(at("open", said(530, "vhost")), time.Now(), true), time.Second)

	wrong := at("open", &wire.NotAMQPError{First: 'H'})
	assert.LessOrEqual(t, r.wait(wrong, time.Now(), true), atOnce, "the next host may be the right one")
	assert.GreaterOrEqual(t, r.wait(wrong, time.Now(), false), time.Second)
}

func TestEscalationCountsChannelFailuresOfHalfAMinute(t *testing.T) {
	c, now := new(connection), time.Now()
	assert.False(t, c.escalates(now))
	assert.False(t, c.escalates(now.Add(29*time.Second)))
	assert.False(t, c.escalates(now.Add(31*time.Second)))
	assert.True(t, c.escalates(now.Add(32*time.Second)))
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
