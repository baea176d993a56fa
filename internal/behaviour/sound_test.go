package behaviour_test

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

// brokenErrors cannot be read without a panic. The first is the trap of
// `var err *fs.PathError; return err`.
func brokenErrors() map[string]error {
	return map[string]error{
		"a nil pointer":                    (*fs.PathError)(nil),
		"a nil pointer of the net":         (*net.OpError)(nil),
		"a wrapped nil pointer":            fmt.Errorf("away: %w", (*fs.PathError)(nil)),
		"a nil pointer beside another one": fmt.Errorf("%w, %w", errAway, (*fs.PathError)(nil)),
		"an empty error of the system":     fmt.Errorf("away: %w", &os.SyscallError{Syscall: "read"}),
		"one that panics with itself":      selfish{},
		"one whose Is panics":              picky{},
		"one that wraps itself":            circular{},
		"a nil pointer without any Unwrap": (*nilError)(nil),
	}
}

type selfish struct{}

func (s selfish) Error() string { panic(s) }

type picky struct{}

func (picky) Error() string { return "picky" }
func (picky) Is(error) bool { panic("user") }

type circular struct{}

func (circular) Error() string   { return "circular" }
func (c circular) Unwrap() error { return c }

func TestErrorThatCannotBeReadIsAFailureThatSaysSo(t *testing.T) {
	for name, broken := range brokenErrors() {
		fail := func() error { return broken }
		for where, option := range map[string]steadymq.Option{
			"WithTopology":    steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) { return rig.Queue, fail() }),
			"WithURLFunc":     steadymq.WithURLFunc(func(context.Context) (string, error) { return "", fail() }),
			"WithCredentials": steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) { return steadymq.Credentials{}, fail() }),
			"WithDialer":      steadymq.WithDialer(func(context.Context, string, string) (net.Conn, error) { return nil, fail() }),
		} {
			t.Run(where+", "+name, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					r.Run(rig.Ack, option)
					r.Wait(time.Minute)
					require.Greater(r, len(r.Causes()), 1, "it goes on")
					var panicked *steadymq.PanicError
					require.ErrorAs(r, r.Causes()[0], &panicked)
					assert.NotEmpty(r, panicked.Stack)
					assert.ErrorContains(r, r.Causes()[0], where)
					assert.ErrorContains(r, r.Causes()[0], "panics when it is read; is it a nil pointer")
				})
			})
		}
	}
}

func TestErrorOfAHandlerThatCannotBeReadIsAFailure(t *testing.T) {
	for name, broken := range brokenErrors() {
		for how, h := range map[string]steadymq.Handler{
			"returned":      func(context.Context, *steadymq.Delivery) error { return broken },
			"panicked with": func(context.Context, *steadymq.Delivery) error { panic(broken) },
		} {
			t.Run(how+" "+name, func(t *testing.T) {
				rig.Bubble(t, func(r *rig.Rig) {
					var told []error
					r.Consuming(h, steadymq.WithHooks(steadymq.Hooks{
						HandlerFailed: func(_ *steadymq.Delivery, err error) { told = append(told, err) },
					}))
					r.Broker.Publish(rig.Queue, "tea")
					r.Wait(10 * time.Second)
					require.Greater(r, len(told), 1, "the message comes again")
					require.ErrorAs(r, told[0], new(*steadymq.PanicError))
					assert.ErrorContains(r, told[0], "panics when it is read")
					assert.NotEmpty(r, r.Log.Lines("handler panicked"))

					o, err := steadymq.Invoke(r.Context(), h, steadymq.NewDelivery(amqp.Delivery{}))
					assert.Equal(r, steadymq.Requeued, o)
					assert.ErrorAs(r, err, new(*steadymq.PanicError))
				})
			})
		}
	}
}

// A message that is to be dropped must not come back for ever.
func TestOutcomeStaysThoughTheErrorInItCannotBeRead(t *testing.T) {
	for name, broken := range brokenErrors() {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.Consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.Discard(broken) })
				r.Broker.Publish(rig.Queue, "tea")
				r.Wait(time.Second)
				assert.EqualValues(r, 1, r.Consumer.Stats().Discarded)
				assert.EqualValues(r, 1, r.Consumer.Stats().Failed)
			})
		})
	}
}

func TestCauseOfRunsContextThatCannotBeReadEndsNoProcess(t *testing.T) {
	for name, broken := range brokenErrors() {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				ctx, stop := context.WithCancelCause(r.Context())
				ended := make(chan error, 1)
				c := r.New(steadymq.WithTopology(func(ctx context.Context, _ *amqp.Channel) (string, error) {
					<-ctx.Done()
					time.Sleep(50 * time.Millisecond) // the connection has ended for that cause
					return "", errAway
				}))
				go func() { ended <- c.Run(ctx, rig.Ack) }()
				r.Wait(time.Second)
				stop(broken)
				assert.NoError(r, <-ended)
			})
		})
	}
}

func TestNewRefusesANilPointerForALoginMechanism(t *testing.T) {
	_, err := steadymq.New("amqp://h/", rig.Queue, steadymq.WithSASL((*amqp.PlainAuth)(nil)))
	var refused *steadymq.OptionError
	require.ErrorAs(t, err, &refused)
	assert.Equal(t, "WithSASL", refused.Option)
}
