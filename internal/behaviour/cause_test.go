package behaviour_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/internal/wire"
	"github.com/steadymq/steadymq/steadymqtest"
)

// orderError is an error type of a user.
type orderError struct {
	order int
	err   error
}

func (e *orderError) Error() string { return fmt.Sprintf("order %d: %v", e.order, e.err) }
func (e *orderError) Unwrap() error { return e.err }

var errOfOrder = &orderError{7, errAway}

// holdsOrder tells whether errors.Is and errors.As come to the user's error.
func holdsOrder(t require.TestingT, err error) {
	var order *orderError
	if assert.ErrorAs(t, err, &order) {
		assert.Same(t, errOfOrder, order)
	}
	assert.ErrorIs(t, err, errAway)
}

// Errors of handlers.

func TestUsersErrorIsFoundThroughEveryWrapping(t *testing.T) {
	for name, c := range map[string]struct {
		fail    func() error
		outcome steadymq.Outcome
		held    bool
		text    string
	}{
		"itself":                       {func() error { return errOfOrder }, steadymq.Requeued, true, "order 7: the database is away"},
		"wrapped":                      {func() error { return fmt.Errorf("pay: %w", errOfOrder) }, steadymq.Requeued, true, "pay: order 7: the database is away"},
		"Discard":                      {func() error { return steadymq.Discard(errOfOrder) }, steadymq.Discarded, false, "order 7: the database is away"},
		"Requeue":                      {func() error { return steadymq.Requeue(errOfOrder) }, steadymq.Requeued, false, "order 7: the database is away"},
		"RequeueAfter":                 {func() error { return steadymq.RequeueAfter(errOfOrder, time.Minute) }, steadymq.Requeued, true, "order 7: the database is away"},
		"RequeueAfter, at once":        {func() error { return steadymq.RequeueAfter(errOfOrder, -time.Minute) }, steadymq.Requeued, false, "order 7: the database is away"},
		"Discard of a wrapped one":     {func() error { return steadymq.Discard(fmt.Errorf("pay: %w", errOfOrder)) }, steadymq.Discarded, false, "pay: order 7: the database is away"},
		"Discard that is wrapped":      {func() error { return fmt.Errorf("pay: %w", steadymq.Discard(errOfOrder)) }, steadymq.Discarded, false, "pay: order 7: the database is away"},
		"Requeue that is wrapped":      {func() error { return fmt.Errorf("pay: %w", steadymq.Requeue(errOfOrder)) }, steadymq.Requeued, false, "pay: order 7: the database is away"},
		"RequeueAfter that is wrapped": {func() error { return fmt.Errorf("pay: %w", steadymq.RequeueAfter(errOfOrder, time.Minute)) }, steadymq.Requeued, true, "pay: order 7: the database is away"},
		"Discard that is joined":       {func() error { return errors.Join(io.EOF, steadymq.Discard(errOfOrder)) }, steadymq.Discarded, false, "EOF; order 7: the database is away"},
		"Discard beside it":            {func() error { return fmt.Errorf("%w, %w", steadymq.Discard(nil), errOfOrder) }, steadymq.Discarded, false, "steadymq: message discarded, order 7: the database is away"},
		"the outer one decides":        {func() error { return steadymq.Discard(steadymq.Requeue(errOfOrder)) }, steadymq.Discarded, false, "order 7: the database is away"},
		"panic":                        {func() error { panic(errOfOrder) }, steadymq.Requeued, true, "steadymq: panic: order 7: the database is away"},
		"panic with a wrapped one":     {func() error { panic(fmt.Errorf("pay: %w", errOfOrder)) }, steadymq.Requeued, true, "steadymq: panic: pay: order 7: the database is away"},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				var got []error
				handle := func(_ context.Context, d *steadymq.Delivery) error {
					if d.Redelivered {
						return nil
					}
					return c.fail()
				}
				var passed error
				watch := func(next steadymq.Handler) steadymq.Handler {
					return func(ctx context.Context, d *steadymq.Delivery) error {
						err := next(ctx, d)
						passed = cmp.Or(passed, err) // the first
						return err
					}
				}
				r.Consuming(handle, steadymq.WithMiddleware(watch), steadymq.WithRequeueDelay(time.Minute, time.Minute), steadymq.WithHooks(steadymq.Hooks{
					HandlerFailed: func(d *steadymq.Delivery, err error) {
						got = append(got, err)
						want := c.outcome
						if c.held {
							want = steadymq.Unsettled
						}
						assert.Equal(r, want, d.Outcome(), "decided before it is told")
					},
				}))
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(time.Second)
				require.Len(r, got, 1)
				holdsOrder(r, got[0])
				assert.Equal(r, c.text, strings.ReplaceAll(got[0].Error(), "\n", "; "))
				if !strings.HasPrefix(name, "panic") {
					assert.Equal(r, passed, got[0], "as the handler returned it")
				}
				assert.NotEmpty(r, r.Log.Lines("error=\""+c.text+"\""))
				if stats := r.Consumer.Stats(); c.held {
					assert.Equal(r, 1, stats.Held)
				} else {
					assert.EqualValues(r, 1, map[steadymq.Outcome]uint64{steadymq.Discarded: stats.Discarded, steadymq.Requeued: stats.Requeued}[c.outcome])
				}

				o, err := steadymq.Invoke(r.Context(), handle, steadymq.NewDelivery(amqp.Delivery{}))
				assert.Equal(r, c.outcome, o)
				holdsOrder(r, err)
			})
		})
	}
}

func TestOutcomesWithoutAnErrorSayWhatTheyAre(t *testing.T) {
	for text, err := range map[string]error{
		"steadymq: message discarded": steadymq.Discard(nil),
		"steadymq: message requeued":  steadymq.Requeue(nil),
	} {
		assert.EqualError(t, err, text)
		assert.NoError(t, errors.Unwrap(err))
	}
	assert.EqualError(t, steadymq.RequeueAfter(nil, time.Second), "steadymq: message requeued")
}

// Ends of sessions.

// ending is an end of a session, and what errors.Is and errors.As find in its error.
type ending struct {
	happens func(r *rig.Rig)
	within  time.Duration
	holds   func(t require.TestingT, err error)
	text    string
}

func saidByServer(code int) func(t require.TestingT, err error) {
	return func(t require.TestingT, err error) {
		var said *amqp.Error
		if assert.ErrorAs(t, err, &said) {
			assert.Equal(t, code, said.Code)
			assert.True(t, said.Server)
		}
	}
}

func saidByPath(wants ...error) func(t require.TestingT, err error) {
	return func(t require.TestingT, err error) {
		for _, want := range wants {
			assert.ErrorIs(t, err, want)
		}
		assert.NotErrorAs(t, err, new(*amqp.Error), "the driver's own codes say nothing")
	}
}

var endings = map[string]ending{
	"channel.close":    {func(r *rig.Rig) { r.Broker.CloseChannels(406, "unknown delivery tag 9") }, time.Second, saidByServer(406), "406 PRECONDITION_FAILED - unknown delivery tag 9"},
	"connection.close": {func(r *rig.Rig) { r.Broker.CloseConnections(320, "bye") }, time.Second, saidByServer(320), "320 CONNECTION_FORCED - bye"},
	"basic.cancel":     {func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) }, 20 * time.Second, saidByPath(), wasCanceled},
	"reset":            {func(r *rig.Rig) { r.Broker.Reset() }, time.Second, saidByPath(wire.ErrPeerReset, syscall.ECONNRESET), "the peer reset the connection"},
	"FIN":              {func(r *rig.Rig) { r.Broker.FIN() }, time.Second, saidByPath(wire.ErrPeerClosed, io.EOF), "the peer closed the connection"},
	"silence":          {func(r *rig.Rig) { r.Broker.Silence() }, 26 * time.Second, saidByPath(wire.ErrReadTimeout), wire.ErrReadTimeout.Error()},
}

func TestCauseOfALostSessionIsOneAndTheSameWhereverItIsTold(t *testing.T) {
	for name, end := range endings {
		for _, fatal := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", fatal ", fatal), func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					causes := make(chan error, 9)
					options := rig.Options(steadymq.WithDrainTimeout(10 * time.Second))
					var asked []error
					if fatal {
						options = append(options, steadymq.WithFatal(func(err error) bool { asked = append(asked, err); return true }))
					}
					r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
						if !d.Redelivered {
							<-ctx.Done()
							causes <- context.Cause(ctx)
						}
						return nil
					}, options...)
					r.Broker.Publish(rig.Queue, "x")
					r.Wait(time.Second)
					end.happens(r)
					r.Wait(end.within)
					require.Len(r, causes, 1)
					cause := <-causes
					var at *steadymq.SessionError
					require.ErrorAs(r, cause, &at)
					assert.Equal(r, steadymq.SessionError{Queue: rig.Queue, Host: "mq1.test:5672", Op: "lost", Session: 1, Err: at.Err}, *at)
					assert.EqualError(r, cause, "steadymq: queue orders: session 1: lost mq1.test:5672: "+end.text)
					end.holds(r, cause)
					if !fatal {
						require.NotEmpty(r, r.Causes())
						assert.Same(r, at, r.Causes()[0], "the change of state has the same")
						return
					}
					assert.Equal(r, []error{cause}, asked)
					assert.Same(r, at, <-r.Result, "and Run's error")
					r.Result = nil
				})
			})
		}
	}
}

func TestCauseAtTheDrainLimitTellsHandlersAndLimit(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		causes := make(chan error, 9)
		r.Consuming(func(ctx context.Context, _ *steadymq.Delivery) error {
			<-ctx.Done()
			causes <- context.Cause(ctx)
			time.Sleep(time.Minute)
			return nil
		}, steadymq.WithConcurrency(3), steadymq.WithDrainTimeout(2*time.Second))
		r.PublishMany(2, "x")
		r.Wait(time.Second)
		err := r.Stop()
		for _, err := range []error{<-causes, <-causes, err} {
			var limit *steadymq.DrainError
			require.ErrorAs(r, err, &limit)
			assert.Equal(r, steadymq.DrainError{Handlers: 2, Limit: 2 * time.Second}, *limit)
			assert.ErrorIs(r, err, steadymq.ErrDrainTimeout)
			assert.NotErrorAs(r, err, new(*steadymq.SessionError))
		}
		r.Wait(time.Minute)
	})
}

// Set-ups that fail.

func TestErrorOfASetUpThatFailsHoldsItsReason(t *testing.T) {
	holdsUsers := func(option string) func(t require.TestingT, err error) {
		return func(t require.TestingT, err error) {
			holdsOrder(t, err)
			assert.ErrorContains(t, err, option)
		}
	}
	for name, c := range map[string]struct {
		fault   func(r *rig.Rig)
		options func(r *rig.Rig) []steadymq.Option
		op      string
		host    string
		holds   func(t require.TestingT, err error)
	}{
		"dials are refused":   {fault: func(r *rig.Rig) { r.Broker.Refuse(true) }, op: "dial", holds: saidByPath(syscall.ECONNREFUSED)},
		"no such name":        {fault: func(r *rig.Rig) { r.Broker.DNSFailure(true) }, op: "dial", holds: func(t require.TestingT, err error) { assert.ErrorAs(t, err, new(*net.DNSError)) }},
		"no answer to a dial": {fault: func(r *rig.Rig) { r.Broker.DropSYN(true) }, op: "dial", holds: saidByPath(context.DeadlineExceeded)},
		"the login is refused": {fault: func(r *rig.Rig) { r.Broker.RefuseLogin(true) }, op: "open", holds: func(t require.TestingT, err error) {
			saidByServer(403)(t, err)
			assert.ErrorIs(t, err, steadymq.ErrLoginRefused)
		}},
		"refused by silence":   {fault: func(r *rig.Rig) { r.Broker.RefuseLogin(true); r.Broker.SetLoginRefusal(steadymqtest.RefusalByFIN) }, op: "open", holds: saidByPath(steadymq.ErrLoginRefused)},
		"no such virtual host": {fault: func(r *rig.Rig) { r.Broker.RefuseVhost(530, "vhost / not found") }, op: "open", holds: saidByServer(530)},
		"a greeting cut off":   {fault: func(r *rig.Rig) { r.Broker.DropAt(steadymqtest.StageStart, true) }, op: "open", holds: saidByPath(io.EOF)},
		"a login cut off":      {fault: func(r *rig.Rig) { r.Broker.DropAt(steadymqtest.StageTune, true) }, op: "open", holds: saidByPath(io.EOF, wire.ErrPeerClosed)},
		"an open cut off":      {fault: func(r *rig.Rig) { r.Broker.DropAt(steadymqtest.StageOpen, true) }, op: "open", holds: saidByPath(io.EOF, wire.ErrPeerClosed)},
		"a channel cut off":    {fault: func(r *rig.Rig) { r.Broker.DropAt(steadymqtest.StageChannel, true) }, op: "channel", holds: saidByPath(io.EOF, wire.ErrPeerClosed)},
		"a qos cut off":        {fault: func(r *rig.Rig) { r.Broker.DropAt(steadymqtest.StageQos, true) }, op: "qos", holds: saidByPath(io.EOF, wire.ErrPeerClosed)},
		"a consume cut off":    {fault: func(r *rig.Rig) { r.Broker.DropAt(steadymqtest.StageConsume, true) }, op: "consume", holds: saidByPath(io.EOF, wire.ErrPeerClosed)},
		"no permission": {fault: func(r *rig.Rig) {
			r.Broker.RefuseConsume(403, "access to queue 'orders' in vhost '/' refused for user 'app'")
		}, op: "consume", holds: saidByServer(403)},
		"consume ends all":      {fault: func(r *rig.Rig) { r.Broker.RefuseConsume(530, "reached maximum (1) of consumers per channel") }, op: "consume", holds: saidByServer(530)},
		"a queue of other kind": {fault: func(*rig.Rig) {}, options: func(*rig.Rig) []steadymq.Option { return rig.Options(steadymq.WithQueue(steadymq.Queue{})) }, op: "topology", holds: saidByServer(406)},
		"a topology that fails": {fault: func(*rig.Rig) {}, options: func(*rig.Rig) []steadymq.Option {
			return rig.Options(steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return "", errOfOrder }))
		}, op: "topology", holds: holdsUsers("WithTopology: ")},
		"a URL that fails": {fault: func(*rig.Rig) {}, options: func(*rig.Rig) []steadymq.Option {
			return rig.Options(steadymq.WithURLFunc(func(context.Context) (string, error) { return "", errOfOrder }))
		}, op: "dial", host: "none", holds: holdsUsers("WithURLFunc: ")},
		"credentials that fail": {fault: func(*rig.Rig) {}, options: func(*rig.Rig) []steadymq.Option {
			return rig.Options(steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) { return steadymq.Credentials{}, errOfOrder }))
		}, op: "open", holds: holdsUsers("WithCredentials: ")},
		"a dialer that fails": {fault: func(*rig.Rig) {}, options: func(*rig.Rig) []steadymq.Option {
			return rig.Options(steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return nil, errOfOrder }))
		}, op: "dial", holds: holdsUsers("")},
		"a topology that panics": {fault: func(*rig.Rig) {}, options: func(*rig.Rig) []steadymq.Option {
			return rig.Options(steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { panic(errOfOrder) }))
		}, op: "topology", holds: holdsUsers("WithTopology: ")},
		"a set-up that hangs": {fault: func(r *rig.Rig) { r.Broker.HangAt(steadymqtest.StageQos, true) }, op: "qos", holds: func(t require.TestingT, err error) { assert.ErrorContains(t, err, "(WithSetupTimeout)") }},
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				c.fault(r)
				options := rig.Options(steadymq.WithFatal(func(err error) bool { return true }))
				if c.options != nil {
					options = append(options, c.options(r)...)
				}
				r.Run(rig.Ack, options...)
				r.Wait(20 * time.Second)
				require.Len(r, r.Result, 1)
				err := <-r.Result
				r.Result = nil
				var at *steadymq.SessionError
				require.ErrorAs(r, err, &at)
				host := "mq1.test:5672"
				if c.host == "none" {
					host = ""
				}
				assert.Equal(r, steadymq.SessionError{Queue: rig.Queue, Host: host, Op: c.op, Session: 1, Err: at.Err}, *at)
				c.holds(r, err)
				last := r.LastChange()
				assert.Equal(r, err, last.Cause)
				assert.NotContains(r, err.Error(), "\n")
			})
		})
	}
}

// Several signs of one end, ready at once. A path that ends at the same moment is not among them: the
// driver would hold a mutex while it writes its last answer, and that stops a bubble's clock.

func TestSeveralSignsOfAnEndAreOneCauseAndThatOfTheBroker(t *testing.T) {
	const said406, said320 = "406 PRECONDITION_FAILED - unknown delivery tag 9", "320 CONNECTION_FORCED - bye"
	cancel := func(r *rig.Rig) { r.Broker.CancelConsumers(rig.Queue) }
	channel := func(r *rig.Rig) { r.Broker.CloseChannels(406, "unknown delivery tag 9") }
	connection := func(r *rig.Rig) { r.Broker.CloseConnections(320, "bye") }
	for name, c := range map[string]struct {
		signs []func(r *rig.Rig)
		right []string // any of them: all are true
	}{
		"channel and connection":   {[]func(r *rig.Rig){channel, connection}, []string{said406, said320}},
		"cancel and channel":       {[]func(r *rig.Rig){cancel, channel}, []string{wasCanceled, said406}},
		"cancel and connection":    {[]func(r *rig.Rig){cancel, connection}, []string{wasCanceled, said320}},
		"channel and its delivery": {[]func(r *rig.Rig){func(r *rig.Rig) { r.Broker.StrayDelivery() }}, []string{"406 PRECONDITION_FAILED - unknown delivery tag 0"}},
		"all":                      {[]func(r *rig.Rig){cancel, channel, connection}, []string{wasCanceled, said406, said320}},
	} {
		t.Run(name, func(t *testing.T) {
			for range 100 {
				rig.Bubble(t, func(r *rig.Rig) {
					causes := make(chan error, 9)
					r.Consuming(func(ctx context.Context, d *steadymq.Delivery) error {
						if !d.Redelivered {
							<-ctx.Done()
							causes <- context.Cause(ctx)
						}
						return nil
					})
					r.Broker.Publish(rig.Queue, "x")
					r.Wait(time.Second)
					for _, sign := range c.signs {
						sign(r)
					}
					r.Wait(time.Second)
					require.Len(r, causes, 1)
					require.Len(r, r.Causes(), 1, "one end, one failure")
					require.Same(r, <-causes, r.Causes()[0])
					_, text, _ := strings.Cut(r.Causes()[0].Error(), "lost mq1.test:5672: ")
					require.True(r, slices.Contains(c.right, text), text)
					require.Equal(r, steadymq.Consuming, r.Consumer.State())
					assert.Equal(r, 1, r.OpenConnections())
				})
			}
		})
	}
}

// A hook that panics does not hide that handlers were left behind.
func TestFaultOfAHookHidesNoOtherErrorOfRun(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(time.Minute); return nil },
			steadymq.WithDrainTimeout(time.Second), steadymq.WithHooks(steadymq.Hooks{Unreadable: func(*steadymq.MessageError) { panic(errOfOrder) }}))
		r.Broker.Publish(rig.Queue, "x")
		r.Wait(time.Second)
		unreadableMessage(r)
		r.Wait(5 * time.Second)
		err := r.Stop()
		require.ErrorAs(r, err, new(*steadymq.OptionError))
		holdsOrder(r, err)
		assert.ErrorIs(r, err, steadymq.ErrDrainTimeout)
		r.Wait(time.Minute)
	})
}

func TestRequeueAfterHoldsAsLongAsItSays(t *testing.T) {
	for _, d := range []time.Duration{90 * time.Second, 2 * time.Hour} {
		rig.Bubble(t, func(r *rig.Rig) {
			var at []time.Time
			r.Consuming(func(_ context.Context, m *steadymq.Delivery) error {
				at = append(at, time.Now())
				return steadymq.RequeueAfter(nil, d)
			})
			r.Broker.Publish(rig.Queue, "x")
			r.Wait(d + time.Minute)
			require.Len(r, at, 2)
			assert.InDelta(r, d.Seconds(), at[1].Sub(at[0]).Seconds(), 0.1)
		})
	}
}
