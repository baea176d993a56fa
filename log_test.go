package steadymq

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/wire"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

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

// A reason does not repeat what stands around it, and is one line; the chain of errors is
// unchanged.
func TestErrorsSayAThingOnce(t *testing.T) {
	address := &net.TCPAddr{IP: net.IPv4(10, 0, 0, 7), Port: 5672}
	refused := &net.OpError{Op: "dial", Net: "tcp", Addr: address, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	reset := &net.OpError{Op: "read", Net: "tcp", Source: address, Addr: address, Err: os.NewSyscallError("read", syscall.ECONNRESET)}
	driver := &amqp.Error{Code: 501, Reason: (&amqp.Error{Code: 501, Reason: `frame "x" could not be parsed`}).Error()}
	for _, c := range []struct {
		op   string
		err  error
		want string
	}{
		{"dial", refused, "dial mq1:5672: connection refused"},
		{"dial", errtext.Because(errSetupTimeout, refused), "dial mq1:5672: " + errSetupTimeout.Error()},
		{"dial", fmt.Errorf("dial mq1:5672: %w", context.DeadlineExceeded), "dial mq1:5672: context deadline exceeded"},
		{"dial", errors.Join(refused, errIgnoresContext), "dial mq1:5672: connection refused; " + errIgnoresContext.Error()},
		{"dial", &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "mq1"}}, "dial mq1:5672: lookup mq1: no such host"},
		{"open", fmt.Errorf("tls handshake with mq1:5672: %w", io.EOF), "open mq1:5672: tls handshake: EOF"},
		{"open", &net.OpError{Op: "remote error", Err: tls.AlertError(42)}, "open mq1:5672: remote error: tls: bad certificate"},
		{"open", fmt.Errorf("lost while logging in: %w", errtext.Because(wire.ErrPeerReset, reset)), "open mq1:5672: lost while logging in: the peer reset the connection"},
		{"lost", wire.ErrPeerClosed, "lost mq1:5672: the peer closed the connection"},
		{"lost", driver, `lost mq1:5672: frame "x" could not be parsed`},
		{"channel", amqp.ErrClosed, "channel mq1:5672: channel/connection is not open"},
		{"consume", said(404, "NOT_FOUND - no queue 'orders' in vhost '/'"), "consume mq1:5672: 404 NOT_FOUND - no queue 'orders' in vhost '/'; it is asked for again until someone has declared it, which WithQueue or WithTopology can do"},
		{"open", fmt.Errorf("%w: %w: check it", ErrLoginRefused, said(403, "ACCESS_REFUSED - see the logfile.")), "open mq1:5672: login refused: 403 ACCESS_REFUSED - see the logfile: check it"},
		{"topology", fmt.Errorf("bind: %w", said(403, "ACCESS_REFUSED - no")), "topology mq1:5672: bind: 403 ACCESS_REFUSED - no; give the user the permission (rabbitmqctl set_permissions)"},
		{"topology", &PanicError{Value: "a\nb"}, "topology mq1:5672: panic: a; b"},
		{"lost", nil, "lost mq1:5672: <nil>"},
	} {
		err := &SessionError{Queue: "orders", Host: "mq1:5672", Op: c.op, Session: 7, Err: c.err}
		assert.Equal(t, "steadymq: queue orders: session 7: "+c.want, err.Error())
		assert.Equal(t, c.err, err.Unwrap())
	}
}

// The addresses of a user's own calls are kept.
func TestErrorsOfOtherPlacesKeepTheirAddresses(t *testing.T) {
	vault := &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 9), Port: 8200}, Err: syscall.ECONNREFUSED}
	err := &SessionError{Op: "dial", Err: fmt.Errorf("WithURLFunc: %w", vault)}
	assert.Contains(t, err.Error(), "WithURLFunc: dial tcp 10.0.0.9:8200: connection refused")
}

func TestErrorsOfRunStayInOneLine(t *testing.T) {
	drain := &DrainError{Handlers: 2, Limit: 1}
	lost := &SessionError{Op: "lost", Err: wire.ErrPeerClosed}
	err := errtext.Join(drain, nil, lost)
	assert.NotContains(t, err.Error(), "\n")
	assert.ErrorIs(t, err, ErrDrainTimeout)
	assert.ErrorIs(t, err, wire.ErrPeerClosed)
	assert.Equal(t, error(lost), errtext.Join(nil, lost))
	assert.NoError(t, errtext.Join(nil, nil))
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
