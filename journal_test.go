package steadymq

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
)

func TestHourOfFailuresIsAtMost100Lines(t *testing.T) {
	for _, every := range []time.Duration{10 * time.Millisecond, 400 * time.Millisecond, 1100 * time.Millisecond, 30 * time.Second, 61 * time.Second} {
		t.Run(every.String(), func(t *testing.T) {
			var f failures
			what := failure{session: &session{conn: &connection{}}, err: errors.New("away")}
			told, left := 0, uint64(0)
			start := time.Now()
			for passed := time.Duration(0); passed <= time.Hour; passed += every {
				if n, due := f.step(start.Add(passed), what); due {
					told++
					left += n
				}
			}
			assert.LessOrEqual(t, told, 100)
			assert.GreaterOrEqual(t, told, 58)
			assert.EqualValues(t, time.Hour/every+1, uint64(told)+left+f.left, "all are counted")
		})
	}
}

// What a user has switched off costs no line.
func TestFailureBelowTheLevelOfTheLoggerMakesNoLine(t *testing.T) {
	lines := 0
	j := newJournal(t.Context(), slog.New(levelHandler{slog.LevelError, &lines}))
	defer j.stop()
	record, due := j.failed(failure{session: &session{conn: &connection{}}, delivery: NewDelivery(amqp.Delivery{}), err: errors.New("away")})
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
