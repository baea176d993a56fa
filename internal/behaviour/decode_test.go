package behaviour_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

type cup struct {
	Of    string
	Price int
}

func delivery(body string) *steadymq.Delivery {
	return steadymq.NewDelivery(amqp.Delivery{MessageId: "m-7", Body: []byte(body)})
}

// given returns a handler that keeps what it is given.
func given[T any](kept *T) func(context.Context, *steadymq.Delivery, T) error {
	return func(_ context.Context, _ *steadymq.Delivery, v T) error {
		*kept = v
		return nil
	}
}

func decoded[T any](t *testing.T, body string) (T, error) {
	t.Helper()
	var kept T
	_, err := steadymq.Invoke(t.Context(), steadymq.Decode(json.Unmarshal, given(&kept)), delivery(body))
	return kept, err
}

func TestDecodeGivesTheHandlerAValueOfItsType(t *testing.T) {
	const body = `{"of":"tea","price":3}`
	tea := cup{"tea", 3}
	value, err := decoded[cup](t, body)
	require.NoError(t, err)
	assert.Equal(t, tea, value)

	pointer, err := decoded[*cup](t, body)
	require.NoError(t, err)
	assert.Equal(t, &tea, pointer)

	type order *cup
	named, err := decoded[order](t, body)
	require.NoError(t, err)
	assert.Equal(t, order(&tea), named)

	twice, err := decoded[**cup](t, body)
	require.NoError(t, err)
	assert.Equal(t, tea, **twice)

	all, err := decoded[any](t, body)
	require.NoError(t, err)
	assert.Equal(t, map[string]any{"of": "tea", "price": 3.0}, all)

	table, err := decoded[map[string]any](t, body)
	require.NoError(t, err)
	assert.Equal(t, all, table)
}

func TestDecodeOfNullIsAZeroValueAndNoNilPointer(t *testing.T) {
	pointer, err := decoded[*cup](t, "null")
	require.NoError(t, err)
	assert.Equal(t, new(cup), pointer)
	value, err := decoded[cup](t, "null")
	require.NoError(t, err)
	assert.Zero(t, value)
}

func TestDecodeMakesANewValueForEachMessage(t *testing.T) {
	var kept []*cup
	h := steadymq.Decode(json.Unmarshal, func(_ context.Context, _ *steadymq.Delivery, c *cup) error {
		kept = append(kept, c)
		return nil
	})
	for _, body := range []string{`{"of":"tea","price":3}`, `{"of":"milk"}`} {
		_, err := steadymq.Invoke(t.Context(), h, delivery(body))
		require.NoError(t, err)
	}
	assert.Equal(t, []*cup{{"tea", 3}, {"milk", 0}}, kept)
}

// A decoder for one kind of target, as that of protocol buffers is, is given it without a pointer
// around.
func TestDecodeGivesThePointerItselfToUnmarshal(t *testing.T) {
	unmarshal := func(body []byte, v any) error {
		v.(*cup).Of = string(body)
		return nil
	}
	var value cup
	_, err := steadymq.Invoke(t.Context(), steadymq.Decode(unmarshal, given(&value)), delivery("tea"))
	require.NoError(t, err)
	var pointer *cup
	_, err = steadymq.Invoke(t.Context(), steadymq.Decode(unmarshal, given(&pointer)), delivery("tea"))
	require.NoError(t, err)
	assert.Equal(t, value, *pointer)
}

func TestInterfaceIsFilledByADecoderThatKnowsIt(t *testing.T) {
	_, err := decoded[fmt.Stringer](t, `{}`)
	require.ErrorAs(t, err, new(*steadymq.DecodeError), "JSON does not say which type it is")
	var kept fmt.Stringer
	_, err = steadymq.Invoke(t.Context(), steadymq.Decode(func(_ []byte, v any) error {
		*v.(*fmt.Stringer) = time.Second
		return nil
	}, given(&kept)), delivery(""))
	require.NoError(t, err)
	assert.Equal(t, "1s", kept.String())
}

func TestBodyThatDoesNotDecodeReachesNoHandler(t *testing.T) {
	const secret = "hunter2"
	for _, body := range []string{
		"", secret, `{"of":"` + secret, `{"price":"` + secret + `"}`, `{"price":1` + secret + `}`,
		`{"of":` + secret + `}`, `{"price":77007.7}`, `["` + secret + `"]`, `{"price":{"` + secret + `":1}}`,
	} {
		called := false
		o, err := steadymq.Invoke(t.Context(), steadymq.Decode(json.Unmarshal, func(context.Context, *steadymq.Delivery, cup) error {
			called = true
			return nil
		}), delivery(body))
		assert.False(t, called, body)
		assert.Equal(t, steadymq.Requeued, o, body)
		_, explicit := steadymq.OutcomeOf(err)
		assert.False(t, explicit, body)
		var failed *steadymq.DecodeError
		require.ErrorAs(t, err, &failed, body)
		assert.Equal(t, steadymq.DecodeError{MessageID: "m-7", Size: len(body), Into: "behaviour_test.cup", Err: failed.Err}, *failed)
		require.Error(t, failed.Err, "what the decoder said is there for who asks")
		for _, text := range everyText(t, err) {
			assert.NotContains(t, text, secret[:1]+"unter", body)
			assert.NotContains(t, text, "77007", body)
			assert.NotContains(t, text, "'h'", body)
		}
		assert.Contains(t, err.Error(), fmt.Sprintf(`steadymq: the body of message "m-7" (%d bytes) does not decode into behaviour_test.cup: *json.`, len(body)))
	}
}

// everyText is all the ways in which an error is shown.
func everyText(t *testing.T, err error) []string {
	t.Helper()
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Error("failed", "error", err)
	slog.New(slog.NewTextHandler(&log, nil)).Error("failed", "error", err)
	bytes, jsonErr := json.Marshal(err)
	require.NoError(t, jsonErr)
	return []string{err.Error(), fmt.Sprintf("%v %+v %q", err, err, err), log.String(), string(bytes), steadymq.Discard(err).Error()}
}

func TestErrorOfADecoderIsToldByItsInnermostType(t *testing.T) {
	for want, cause := range map[string]error{
		"*errors.errorString":         errors.New("quotes the body"),
		"*amqp091.Error":              fmt.Errorf("quotes the body: %w", fmt.Errorf("and again: %w", amqp.ErrClosed)),
		"*json.SyntaxError at byte 3": fmt.Errorf("quotes the body: %w", &json.SyntaxError{Offset: 3}),
	} {
		h := steadymq.Decode(func([]byte, any) error { return cause }, given(new(cup)))
		_, err := steadymq.Invoke(t.Context(), h, steadymq.NewDelivery(amqp.Delivery{}))
		require.ErrorIs(t, err, cause)
		assert.EqualError(t, err, "steadymq: the body of a message (0 bytes) does not decode into behaviour_test.cup: "+want)
	}
}

// A schema that cannot be fetched says nothing about the body.
func TestOutcomeThatADecoderAsksForStays(t *testing.T) {
	away := errors.New("the registry is away")
	for want, asked := range map[steadymq.Outcome]error{
		steadymq.Requeued:  steadymq.RequeueAfter(away, time.Minute),
		steadymq.Discarded: fmt.Errorf("version 1: %w", steadymq.Discard(away)),
		steadymq.Parked:    steadymq.Park(away),
	} {
		h := steadymq.Decode(func([]byte, any) error { return asked }, given(new(cup)))
		o, err := steadymq.Invoke(t.Context(), h, delivery("x"))
		assert.Equal(t, want, o)
		assert.Equal(t, asked, err)
	}
}

func TestBugOfADecoderIsNotTheFaultOfTheBody(t *testing.T) {
	for name, unmarshal := range map[string]func([]byte, any) error{
		"panic":       func([]byte, any) error { panic("boom") },
		"nil pointer": func([]byte, any) error { return (*nilError)(nil) },
	} {
		o, err := steadymq.Invoke(t.Context(), steadymq.Decode(unmarshal, given(new(cup))), delivery("x"))
		assert.Equal(t, steadymq.Requeued, o, name)
		require.ErrorAs(t, err, new(*steadymq.PanicError), name)
		assert.NotErrorAs(t, err, new(*steadymq.DecodeError), name)
	}
}

func TestErrorOfTheHandlerOfADecodedBodyIsItsOwn(t *testing.T) {
	away := errors.New("away")
	h := steadymq.Decode(json.Unmarshal, func(context.Context, *steadymq.Delivery, cup) error { return away })
	_, err := steadymq.Invoke(t.Context(), h, delivery("{}"))
	assert.Equal(t, away, err)
}

func TestDecoderCannotChangeTheBody(t *testing.T) {
	var kept []byte
	unmarshal := func(body []byte, v any) error {
		clear(body)
		*v.(*[]byte) = body
		return nil
	}
	d := delivery("tea")
	_, err := steadymq.Invoke(t.Context(), steadymq.Decode(unmarshal, given(&kept)), d)
	require.NoError(t, err)
	assert.Equal(t, "tea", string(d.Body))
	assert.Equal(t, []byte{0, 0, 0}, kept)
}

func TestDecodeOfNothingIsRefusedByRun(t *testing.T) {
	c, err := steadymq.New("amqp://h/", "q")
	require.NoError(t, err)
	var noHandler func(context.Context, *steadymq.Delivery, cup) error
	for _, h := range []steadymq.Handler{steadymq.Decode(nil, given(new(cup))), steadymq.Decode(json.Unmarshal, noHandler)} {
		assert.ErrorAs(t, c.Run(t.Context(), h), new(*steadymq.OptionError))
	}
}

func TestMessageWhoseBodyDoesNotDecodeIsHeldLongerAndLonger(t *testing.T) {
	for name, unmarshal := range map[string]func([]byte, any) error{
		"error":  json.Unmarshal,
		"panic":  func([]byte, any) error { panic("boom") },
		"goexit": func([]byte, any) error { runtime.Goexit(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				r.RemakeQueue("quorum")
				r.Consuming(steadymq.Decode(unmarshal, given(new(cup))))
				r.Broker.Publish(rig.Queue, "swordfish")
				r.Wait(time.Hour)
				holds := holdsOf(r)
				require.GreaterOrEqual(r, len(holds), 9)
				assert.GreaterOrEqual(r, holds[8], time.Second<<8/2)
				assert.Equal(r, 1, r.Broker.QueueLen(rig.Queue)+r.Broker.Unsettled(rig.Queue))
				if name == "error" {
					assert.Contains(r, r.Log.Last("handler failed"), `queue orders: the body of message \"m1\" (9 bytes) does not decode`)
				}
				assert.NotContains(r, r.Log.String(), "swordfish")
			})
		})
	}
}
