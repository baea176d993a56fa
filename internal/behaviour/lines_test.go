package behaviour_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// recorder is a slog.Handler that keeps each line with the kinds of its attributes.
type recorder struct {
	least slog.Level // what it wants

	mu      sync.Mutex
	lines   []string
	times   []time.Time
	asked   []slog.Level
	wrong   []string // what a slog.Handler may rely on and did not get
	context []any    // what the contexts hold under contextKey{}
	inside  atomic.Int32
}

type contextKey struct{}

func (l *recorder) Enabled(ctx context.Context, level slog.Level) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked = append(l.asked, level)
	l.check(ctx)
	return level >= l.least
}

func (l *recorder) Handle(ctx context.Context, record slog.Record) error {
	defer l.inside.Add(-1)
	inside := l.inside.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.check(ctx)
	if inside > 1 {
		l.wrong = append(l.wrong, "two lines at a time")
	}
	if len(l.asked) == 0 || l.asked[len(l.asked)-1] != record.Level {
		l.wrong = append(l.wrong, "not asked before: "+record.Message)
	}
	if record.PC != 0 { // a place in the library is of no use to whoever reads the log
		l.wrong = append(l.wrong, "a source: "+record.Message)
	}
	if record.Level < l.least {
		l.wrong = append(l.wrong, "not wanted: "+record.Message)
	}
	var line strings.Builder
	fmt.Fprintf(&line, "%v %s", record.Level, record.Message)
	record.Attrs(func(a slog.Attr) bool {
		fmt.Fprintf(&line, "; %v %s=%s", a.Value.Kind(), a.Key, shown(a.Value))
		return true
	})
	l.lines, l.times = append(l.lines, line.String()), append(l.times, record.Time)
	return nil
}

// check looks at a context that a slog.Handler is given. It is called with mu held.
func (l *recorder) check(ctx context.Context) {
	if ctx.Err() != nil {
		l.wrong = append(l.wrong, "a context that has ended")
	}
	l.context = append(l.context, ctx.Value(contextKey{}))
}

func (l *recorder) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l *recorder) WithGroup(string) slog.Handler      { return l }

func shown(v slog.Value) string {
	if v.Kind() == slog.KindTime {
		return v.Time().UTC().Format(time.RFC3339Nano)
	}
	return v.String()
}

func (l *recorder) option() steadymq.Option { return steadymq.WithLogger(slog.New(l)) }

// Placeholders of a golden line: <tag 2-1> is the consumer tag of the second try, for the first
// session; <1s..2s> is a duration or a number within; <since 5s> is a time so long before the line; <stack> is
// a stack with a function of this file.
var placeholder = regexp.MustCompile(`<[^<>]+>`)

// matches compares a line with a golden one, and says what is wrong with it.
func matches(golden, line string, at time.Time) string {
	var places []string
	pattern := placeholder.ReplaceAllStringFunc(regexp.QuoteMeta(golden), func(place string) string {
		place = strings.NewReplacer(`\.`, `.`, `\-`, `-`).Replace(strings.Trim(place, "<>"))
		places = append(places, place)
		if number, ok := strings.CutPrefix(place, "tag "); ok {
			return `(steadymq-[0-9a-f]{8}\.` + number + `)`
		}
		if place == "stack" {
			return `((?s:goroutine \d+.*lines_test\.go.*))`
		}
		return `([^;]+)`
	})
	found := regexp.MustCompile(`^` + pattern + `$`).FindStringSubmatch(line)
	if found == nil {
		return "differs"
	}
	for i, place := range places {
		value := found[i+1]
		if since, ok := strings.CutPrefix(place, "since "); ok {
			if then, err := time.Parse(time.RFC3339Nano, value); err != nil || at.Sub(then).String() != since {
				return fmt.Sprintf("%s is %v before the line", value, at.Sub(then))
			}
		}
		low, high, ok := strings.Cut(place, "..")
		if !ok {
			continue
		}
		if !within(value, low, high) {
			return value + " is not within " + place
		}
	}
	return ""
}

// within compares durations, or numbers.
func within(value, low, high string) bool {
	read := func(text string) float64 {
		if n, err := strconv.ParseFloat(text, 64); err == nil {
			return n
		}
		d, err := time.ParseDuration(text)
		if err != nil || d > 10*time.Millisecond && d%time.Millisecond != 0 { // nobody reads nanoseconds
			return math.NaN()
		}
		return d.Seconds()
	}
	return read(low) <= read(value) && read(value) <= read(high)
}

// golden compares all lines that hold the text with those wanted, in order.
func (l *recorder) golden(t require.TestingT, text string, want []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for i, line := range l.lines {
		if !strings.Contains(line, text) {
			continue
		}
		if n < len(want) {
			if wrong := matches(want[n], line, l.times[i]); wrong != "" {
				assert.Fail(t, "line "+strconv.Itoa(n)+" "+wrong, "got:\n%s\nwant:\n%s", line, want[n])
			}
		} else {
			assert.Fail(t, "one line more", line)
		}
		n++
	}
	assert.GreaterOrEqual(t, n, len(want), "lines with %q", text)
	assert.Empty(t, l.wrong)
}

// goldenRow is a message of the log, how it comes about, and all lines with it.
type goldenRow struct {
	name    string
	message string // as it stands in the source
	broker  []steadymqtest.Option
	provoke func(r *rig.Rig, l *recorder)
	want    []string
}

// atFirst is what the lines of the first session say of it, in the rig.
const atFirst = "String queue=orders; String consumer=<tag 1-1>; Uint64 session=1; String host=mq1.test:5672"

// failWith is a handler that does with a message what its body says.
func failWith(_ context.Context, d *steadymq.Delivery) error {
	if d.Redelivered {
		return nil
	}
	what, text, _ := strings.Cut(string(d.Body), ":")
	switch what {
	case "discard":
		return steadymq.Discard(errors.New(text))
	case "requeue":
		return steadymq.Requeue(errors.New(text))
	case "later":
		return steadymq.RequeueAfter(errors.New(text), 90*time.Second)
	case "panic":
		panic(text)
	case "exit":
		panic(fmt.Errorf("wrapped: %w", fs.ErrExist))
	case "acked":
		_ = d.Ack()
		return errors.New(text)
	}
	return errors.New(text)
}

func anonymous(r *rig.Rig, bodies ...string) {
	for _, body := range bodies {
		r.Broker.PublishExchange("shop", "order.new", steadymqtest.Message{ID: "m-" + body[:1], Body: []byte(body)})
		r.Wait(1100 * time.Millisecond) // one line a second
	}
}

var goldenRows = []goldenRow{
	{
		name: "from the first connect to the stop", message: "connecting",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(rig.Ack, l.option())
			require.NoError(r, r.Stop())
		},
		want: []string{"INFO steadymq: connecting; String queue=orders; Uint64 session=0; String host=mq1.test:5672"},
	},
	{
		name: "the first session", message: "consuming",
		provoke: func(r *rig.Rig, l *recorder) { r.Consuming(rig.Ack, l.option()) },
		want:    []string{"INFO steadymq: consuming; " + atFirst},
	},
	{
		name: "a reset", message: "backoff",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(rig.Ack, l.option())
			r.Wait(20 * time.Second)
			r.Broker.Reset()
			r.Wait(time.Second)
			l.golden(r, "connecting", []string{
				"INFO steadymq: connecting; String queue=orders; Uint64 session=0; String host=mq1.test:5672",
				"DEBUG steadymq: connecting; String queue=orders; Uint64 session=1; String host=mq1.test:5672; Int64 attempt=1",
			})
			l.golden(r, "consuming", []string{
				"INFO steadymq: consuming; " + atFirst,
				"INFO steadymq: consuming; String queue=orders; String consumer=<tag 2-2>; Uint64 session=2; String host=mq1.test:5672; Int64 attempt=1; String down=<6ms..40ms>",
			})
		},
		want: []string{
			"WARN steadymq: backoff; String queue=orders; Uint64 session=1; String host=mq1.test:5672; Int64 attempt=1; String retry_in=<0s..20ms>; " +
				"String up=<20s..20.2s>; String cause=lost: the peer reset the connection",
		},
	},
	{
		name: "dials that fail", message: "backoff",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Broker.Refuse(true)
			dials := 0
			r.Run(rig.Ack, l.option(), steadymq.WithBackoff(time.Second, time.Second),
				steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
					if dials++; dials > 4 {
						<-ctx.Done() // waits are drawn, and no fifth failure is to follow
					}
					return r.Broker.Dialer()(ctx, network, address)
				}))
			for len(r.Causes()) < 4 {
				r.Wait(100 * time.Millisecond)
			}
		},
		want: []string{
			"WARN steadymq: backoff; String queue=orders; Uint64 session=0; String host=mq1.test:5672; Int64 attempt=1; String retry_in=<0s..1s>; String cause=dial: connection refused",
			"WARN steadymq: backoff; String queue=orders; Uint64 session=0; String host=mq1.test:5672; Int64 attempt=2; String retry_in=<0s..1s>; Uint64 repeated=2; String cause=dial: connection refused",
			"DEBUG steadymq: backoff; String queue=orders; Uint64 session=0; String host=mq1.test:5672; Int64 attempt=3; String retry_in=<0s..1s>; Uint64 repeated=3; String cause=dial: connection refused",
			"WARN steadymq: backoff; String queue=orders; Uint64 session=0; String host=mq1.test:5672; Int64 attempt=4; String retry_in=<0s..1s>; Uint64 repeated=4; String cause=dial: connection refused",
		},
	},
	{
		name: "a queue that is not there", message: "backoff",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Broker.DeleteQueue(rig.Queue)
			r.Run(rig.Ack, l.option())
			r.Wait(500 * time.Millisecond)
		},
		want: []string{
			"WARN steadymq: backoff; String queue=orders; Uint64 session=0; String host=mq1.test:5672; Int64 attempt=1; String retry_in=<1s..2s>; " +
				"String cause=consume: 404 NOT_FOUND - no queue 'orders' in vhost '/'; it is asked for again until someone has declared it, which WithQueue or WithTopology can do",
		},
	},
	{
		name: "a stop", message: "draining",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(rig.Ack, l.option())
			require.NoError(r, r.Stop())
			l.golden(r, "stopped", []string{"INFO steadymq: stopped; " + atFirst})
		},
		want: []string{"INFO steadymq: draining; " + atFirst},
	},
	{
		name: "a pause", message: "paused",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(rig.Ack, l.option())
			r.Wait(20 * time.Second)
			r.Consumer.Pause()
			r.Wait(2 * time.Minute)
			r.Consumer.Resume()
			r.Wait(time.Second)
			l.golden(r, "consuming", []string{
				"INFO steadymq: consuming; " + atFirst,
				"INFO steadymq: consuming; String queue=orders; String consumer=<tag 2-2>; Uint64 session=2; String host=mq1.test:5672",
			})
		},
		want: []string{"INFO steadymq: paused; " + atFirst + "; String up=<20s..21s>"},
	},
	{
		name: "a breaker that opens", message: "paused",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(failWith, l.option(), steadymq.WithBreaker(steadymq.Breaker{Failures: 2, Wait: time.Minute}))
			r.Broker.Publish(rig.Queue, "plain:no", "plain:no way")
			r.Wait(time.Second)
		},
		want: []string{"WARN steadymq: paused; " + atFirst + "; String up=<0s..1s>; String cause=steadymq: breaker open for <30s..1m0s>, handlers in a row that failed: 2, the last: no way"},
	},
	{
		name:    "a function that says what counts panics",
		message: "the function of WithBreaker that says which errors count has failed, so this one counts, as will all for which it fails",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(failWith, l.option(), steadymq.WithBreaker(steadymq.Breaker{Failures: 2, Wait: time.Minute, Counts: func(error) bool { panic("boom") }}))
			r.Broker.Publish(rig.Queue, "plain:no", "plain:no")
			r.Wait(time.Second)
		},
		want: []string{"WARN steadymq: <message>; " + atFirst + "; String error=WithBreaker: steadymq: panic: boom"},
	},
	{
		name: "a group", message: "connected",
		provoke: func(r *rig.Rig, l *recorder) {
			p := grouped(r, 2, l.option()).start()
			require.NoError(r, p.stop())
		},
		want: []string{"INFO steadymq: connected; Int64 consumers=2; String host=mq1.test:5672"},
	},
	{
		name: "a group", message: "the connection has no channel left for all consumers, so a further connection is opened: raise channel_max, or set WithConnections",
		provoke: func(r *rig.Rig, l *recorder) {
			g, err := steadymq.NewGroup(r.Broker.URLs()[0]+"?channel_max=1", steadymq.WithDialer(r.Broker.Dialer()), l.option())
			require.NoError(r, err)
			p := &party{Rig: r, group: g}
			p.add(rig.Ack)
			p.add(rig.Ack)
			require.NoError(r, p.start().stop())
		},
		want: []string{
			"WARN steadymq: the connection has no channel left for all consumers, so a further connection is opened: raise channel_max, or set WithConnections; " +
				"String queue=<queue>; String host=mq1.test:5672",
		},
	},
	{
		name: "a group", message: "the consumer cannot keep a session, so it goes on on a connection of its own, where it disturbs no other",
		provoke: keptApart,
		want:    []string{"WARN steadymq: <message>; String queue=q1; String host=mq1.test:5672"},
	},
	{
		name: "a group", message: "the consumer has been healthy on a connection of its own, so it shares one again",
		provoke: keptApart,
		want:    []string{"INFO steadymq: <message>; String queue=q1; String host=mq1.test:5672"},
	},
	{
		name: "a refused login", message: "stopped",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Broker.RefuseLogin(true)
			r.Run(rig.Ack, l.option())
			require.Error(r, <-r.Result)
			r.Result = nil
			l.golden(r, "draining", []string{"DEBUG steadymq: draining; String queue=orders; Uint64 session=0; String host=mq1.test:5672; Int64 attempt=1"})
		},
		want: []string{
			"ERROR steadymq: stopped; String queue=orders; Uint64 session=0; String host=mq1.test:5672; Int64 attempt=1; " +
				"String cause=open: login refused: 403 ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile: check user name, password and mechanism",
		},
	},
	{
		name: "a queue that was declared otherwise", message: "stopped",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Run(rig.Ack, l.option(), steadymq.WithQueue(steadymq.Queue{}))
			require.Error(r, <-r.Result)
			r.Result = nil
		},
		want: []string{
			"ERROR steadymq: stopped; String queue=orders; Uint64 session=0; String host=mq1.test:5672; Int64 attempt=1; " +
				"String cause=declare: 406 PRECONDITION_FAILED - inequivalent arg 'x-queue-type' <the broker's words>; what exists was declared otherwise: declare it alike, or delete it (its messages go with it)",
		},
	},
	{
		name: "a hook that panics", message: "stopped",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Run(rig.Ack, l.option(), steadymq.WithHooks(steadymq.Hooks{Settled: func(*steadymq.Delivery, steadymq.Outcome) { panic("boom") }}))
			r.Broker.Publish(rig.Queue, "x")
			require.Error(r, <-r.Result)
			r.Result = nil
		},
		want: []string{
			"ERROR steadymq: stopped; " + atFirst + "; String cause=steadymq: WithHooks: a hook panicked, mend it and make a new Consumer: steadymq: panic: boom",
		},
	},
	{
		name: "handlers left behind", message: "stopped",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(time.Minute); return nil },
				l.option(), steadymq.WithDrainTimeout(time.Second))
			r.Broker.Publish(rig.Queue, "x")
			r.Wait(time.Second)
			require.Error(r, r.Stop())
			r.Wait(time.Minute)
		},
		want: []string{
			"WARN steadymq: stopped; " + atFirst + "; String cause=steadymq: drain limit passed: 1 handler still running after 1s; " +
				"what is unsettled goes back to the queue (let handlers end when their context does, or raise WithDrainTimeout)",
		},
	},
	{
		name: "a host that is silent", message: "still connecting",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Broker.HangAt(steadymqtest.StageTune, true)
			r.Run(rig.Ack, l.option(), steadymq.WithSetupTimeout(5*time.Second), steadymq.WithBackoff(time.Second, time.Second))
			r.Wait(11 * time.Minute)
		},
		want: []string{
			"INFO steadymq: still connecting; String queue=orders; String step=open; String for=2s; String host=mq1.test:5672",
			"INFO steadymq: still connecting; String queue=orders; String step=open; String for=2s; Uint64 suppressed=<100..130>; String host=mq1.test:5672",
		},
	},
	{
		name: "a function that names the URL is slow", message: "still connecting",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Run(rig.Ack, l.option(), steadymq.WithURLFunc(func(context.Context) (string, error) {
				time.Sleep(3 * time.Second)
				return r.Broker.URLs()[0], nil
			}))
			r.Wait(4 * time.Second)
		},
		want: []string{"INFO steadymq: still connecting; String queue=orders; String step=dial; String for=2s"},
	},
	{
		name:    "another queue for every session",
		message: "the topology function names another queue for every session, so every session gets a connection of its own; what is in a queue that the broker has named is lost with the session. WithQueue keeps such a queue as long as the connection lives",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Broker.DeclareQueue("orders.2", steadymqtest.QueueOptions{})
			var calls atomic.Int32
			r.Consuming(rig.Ack, l.option(), steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
				return []string{rig.Queue, "orders.2"}[int(calls.Add(1)-1)%2], nil
			}))
			for range 3 {
				r.Broker.CloseChannels(406, "PRECONDITION_FAILED - unknown delivery tag 1")
				r.Wait(time.Second)
			}
		},
		want: []string{"WARN steadymq: <message>; String queue=orders.2; String before=orders; String host=mq1.test:5672"},
	},
	{
		name:    "failed messages take up the prefetch",
		message: "failed messages are held and take up the prefetch, what stands behind them waits: mend what fails, let it wait at the broker by WithRetry, return Discard for what never can succeed, take what cannot be read out of the queue with another client, or raise WithPrefetch",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.RequeueAfter(nil, time.Hour) }, l.option(), steadymq.WithPrefetch(4))
			r.PublishMany(2, "x")
			r.Wait(time.Minute)
			r.PublishMany(2, "x")
			r.Wait(8 * time.Minute)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; Int64 held=2; Int64 prefetch=4; Time since=<since 0s>",
			"WARN steadymq: <message>; " + atFirst + "; Int64 held=4; Int64 prefetch=4; Time since=<since 2m0s>",
			"WARN steadymq: <message>; " + atFirst + "; Int64 held=4; Int64 prefetch=4; Time since=<since 4m0s>",
			"WARN steadymq: <message>; " + atFirst + "; Int64 held=4; Int64 prefetch=4; Time since=<since 8m0s>",
		},
	},
	{
		name:    "kept deliveries take up the prefetch",
		message: "deliveries that are kept to be settled later take up the prefetch, and none was settled for a while: nothing else is delivered; settle them, or raise WithPrefetch",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(func(context.Context, *steadymq.Delivery) error { return steadymq.Later }, l.option(), steadymq.WithPrefetch(2), steadymq.WithDrainTimeout(time.Second))
			r.PublishMany(2, "x")
			r.Wait(8 * time.Minute)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; Int64 kept=2; Int64 prefetch=2",
			"WARN steadymq: <message>; " + atFirst + "; Int64 kept=2; Int64 prefetch=2; Uint64 suppressed=4",
		},
	},
	{
		name:    "a queue that was declared before",
		message: "the queue was declared before with a delivery limit, which stays: a message that comes back more often is dropped. Switch it off by a policy with delivery-limit -1, or delete the queue so that it is declared anew; or say what is meant by Queue.DeadLetter or x-delivery-limit in Queue.Args",
		provoke: func(r *rig.Rig, l *recorder) {
			r.RemakeQueue("quorum")
			r.Consuming(rig.Ack, l.option(), steadymq.WithQueue(steadymq.Queue{}))
			r.Broker.Reset()
			r.Wait(time.Second)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; String broker=Exception (406) Reason: \"PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'orders' in vhost '/': " +
				"received the value '-1' of type 'signedint' but current is none\"",
		},
	},
	{
		name:    "a message near the limit",
		message: "a message has come back so often that the queue's delivery limit will soon take it: it is then dropped, or dead-lettered. See why its handler fails; Queue.DeadLetter or a policy with delivery-limit -1 keeps it",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Broker.DeleteQueue(rig.Queue)
			r.Consuming(failEvery(10*time.Second), l.option(), steadymq.WithQueue(steadymq.Queue{Args: amqp.Table{"x-delivery-limit": 4}}))
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m7"})
			r.Wait(50 * time.Millisecond)
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m8"})
			r.Wait(time.Hour)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; Int64 returns=3; Int64 limit=4; String exchange=; String routing_key=orders; String message_id=m7",
			"WARN steadymq: <message>; " + atFirst + "; Int64 returns=4; Int64 limit=4; String exchange=; String routing_key=orders; String message_id=m7; Uint64 suppressed=1",
		},
	},
	{
		name:    "a message near the limit that others may have set",
		message: "a message has come back often: if this queue has RabbitMQ's default delivery limit of 20, it is soon dropped, or dead-lettered. See why its handler fails; Queue.DeadLetter or a policy with delivery-limit -1 keeps it",
		provoke: func(r *rig.Rig, l *recorder) {
			r.RemakeQueue("quorum")
			r.Consuming(failEvery(10*time.Second), l.option())
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m7"})
			r.Wait(161 * time.Second)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; Int64 returns=15; String exchange=; String routing_key=orders; String message_id=m7",
			"WARN steadymq: <message>; " + atFirst + "; Int64 returns=16; String exchange=; String routing_key=orders; String message_id=m7",
		},
	},
	{
		name:    "a message that cannot be read",
		message: "a message cannot be read: no handler gets it, it is held and then put back into its queue",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(rig.Ack, l.option())
			for range 3 {
				r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{RawHeaders: rig.HeaderTable('?', 1), Body: []byte("tea")})
			}
			for range 2 {
				r.Wait(1100 * time.Millisecond)
				r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{RawHeaders: rig.HeaderTable('?', 1), Body: []byte("tea")})
			}
			r.Wait(time.Second)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; String exchange=; String routing_key=orders; Uint64 delivery_tag=1; Uint64 size=3; String reason=its headers cannot be read: a field is of the unknown type '?'",
			"WARN steadymq: <message>; " + atFirst + "; String exchange=; String routing_key=orders; Uint64 delivery_tag=4; Uint64 size=3; String reason=its headers cannot be read: a field is of the unknown type '?'; Uint64 suppressed=2",
			"WARN steadymq: <message>; " + atFirst + "; String exchange=; String routing_key=orders; Uint64 delivery_tag=5; Uint64 size=3; String reason=its headers cannot be read: a field is of the unknown type '?'",
		},
	},
	{
		name:    "a message of a stream that is too large",
		message: "a message cannot be read: no handler gets it, it is stepped over",
		provoke: func(r *rig.Rig, l *recorder) {
			r.RemakeQueue("stream")
			r.Broker.Publish(rig.Queue, "too large")
			r.Consuming(rig.Ack, append(rig.OfType("stream"), l.option(), steadymq.WithMaxMessageSize(4))...)
			r.Wait(time.Second)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; String exchange=; String routing_key=orders; Uint64 delivery_tag=1; Uint64 size=9; String reason=the message is larger than the limit (WithMaxMessageSize) of 4 bytes: raise it, or take the message out of the queue",
		},
	},
	{
		name:    "a place that cannot be saved",
		message: "the place in the stream cannot be saved: after a restart, messages that were handled since come again",
		provoke: func(r *rig.Rig, l *recorder) {
			r.RemakeQueue("stream")
			store := newShelf()
			store.fail(nil, away)
			r.Consuming(rig.Ack, keeping(store, l.option())...)
			r.Broker.Publish(rig.Queue, "tea")
			r.Wait(63 * time.Second)
			store.fail(nil, nil)
			r.Wait(2 * time.Second)
		},
		want: []string{
			"WARN steadymq: <message>; String queue=orders; Int64 offset=1; String failing=0s; String error=WithStreamOffsets: Save: the shelf is away",
			"WARN steadymq: <message>; String queue=orders; Int64 offset=1; String failing=1m0s; String error=WithStreamOffsets: Save: the shelf is away; Uint64 suppressed=59",
		},
	},
	{
		name:    "a place that is saved again",
		message: "the place in the stream is saved again",
		provoke: func(r *rig.Rig, l *recorder) {
			r.RemakeQueue("stream")
			store := newShelf()
			store.fail(nil, away)
			r.Consuming(rig.Ack, keeping(store, l.option())...)
			r.Broker.Publish(rig.Queue, "tea")
			r.Wait(63 * time.Second)
			store.fail(nil, nil)
			r.Wait(2 * time.Second)
		},
		want: []string{"INFO steadymq: <message>; String queue=orders; Int64 offset=1; String failed=1m3s"},
	},
	{
		name:    "a place that the stream does not reach",
		message: "the stream ends before the place that was saved, so it was made anew, and is read from its beginning",
		provoke: func(r *rig.Rig, l *recorder) {
			r.RemakeQueue("stream")
			store := newShelf()
			store.places[rig.Queue] = 7
			r.Run(rig.Ack, keeping(store, l.option())...)
			r.Wait(30 * time.Second)
		},
		want: []string{"WARN steadymq: <message>; String queue=orders; String host=mq1.test:5672; Int64 offset=7"},
	},
	{
		name:    "a failed message whose copy the broker refuses",
		message: "a failed message does not get into the queue that it is to go to, so it is held and tried again",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(park, l.option(), parking())
			r.Broker.NackConfirms(true)
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m7"})
			r.Wait(30 * time.Second)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; String to=orders.parked; String message_id=m7; Int64 tried=1; String cause=the broker has refused the copy (basic.nack): the queue is full, or cannot store it",
		},
	},
	{
		name:    "a failed message whose headers fill the frame",
		message: "the headers of a failed message leave no room in their frame (frame_max) for all that its copy is to tell, so that is shortened or left out",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(park, l.option(), parking())
			for range 2 {
				r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m7", Headers: amqp.Table{"h": strings.Repeat("h", 130_700)}})
			}
			r.Wait(30 * time.Second)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; String headers=steadymq-error steadymq-error-type steadymq-consumer steadymq-host; String to=orders.parked; String message_id=m7",
		},
	},
	{
		name:    "a message to be parked where there is no queue for that",
		message: "a handler asks to park its message, and there is no queue for that, so the message is held and put back: name one by WithRetry",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(park, l.option())
			r.Broker.Publish(rig.Queue, "1")
			r.Wait(time.Second)
		},
		want: []string{"WARN steadymq: <message>; " + atFirst},
	},
	{
		name:    "a BatchError that is too short",
		message: "a handler of batches returned a BatchError that has not one entry for each message: those without one have failed, entries beyond the batch mean nothing",
		provoke: func(r *rig.Rig, l *recorder) {
			inBatches(r, func(context.Context, []*steadymq.Delivery) error {
				return &steadymq.BatchError{Errs: []error{nil}}
			}, l.option(), steadymq.WithBatch(2, time.Second))
			r.Broker.Publish(rig.Queue, "1", "2")
			r.Wait(500 * time.Millisecond)
		},
		want: []string{"WARN steadymq: <message>; " + atFirst + "; Int64 entries=1; Int64 messages=2"},
	},
	{
		name:    "failed messages during an alarm",
		message: "failed messages cannot be parked or delayed now, so they are held and tried again",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(park, l.option(), parking())
			r.Broker.Publish(rig.Queue, "1")
			r.Wait(time.Second)
			r.Broker.Blocked("low on memory")
			for _, body := range []string{"2", "3"} { // the first one meets the alarm
				r.Broker.Publish(rig.Queue, body)
				r.Wait(45 * time.Second)
			}
			r.Broker.Unblocked()
			r.Wait(10 * time.Second)
		},
		want: []string{"WARN steadymq: <message>; " + atFirst + "; String retry_in=2s; String cause=the broker takes no messages now (connection.blocked: low on memory)"},
	},
	{
		name: "the end of failed messages during an alarm", message: "failed messages can be parked and delayed again",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(park, l.option(), parking())
			r.Broker.Publish(rig.Queue, "1")
			r.Wait(time.Second)
			r.Broker.Blocked("low on memory")
			for _, body := range []string{"2", "3"} { // the first one meets the alarm
				r.Broker.Publish(rig.Queue, body)
				r.Wait(45 * time.Second)
			}
			r.Broker.Unblocked()
			r.Wait(10 * time.Second)
		},
		want: []string{"INFO steadymq: <message>; String queue=orders"},
	},
	{
		name: "a message that has used up its attempts", message: "handler failed, and its message is given up",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(fail, l.option(), steadymq.WithRetry(steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Minute}}))
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m7"})
			r.Wait(2 * time.Minute)
		},
		want: []string{"WARN steadymq: <message>; " + atFirst + "; String exchange=; String routing_key=orders; String message_id=m7; Uint64 delivery_tag=2; Int64 attempt=2; " +
			"Bool redelivered=false; String outcome=discarded; String error=the database is away"},
	},
	{
		name: "messages given up one soon after the other", message: "more messages are given up",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(park, l.option(), parking())
			for range 4 {
				r.Broker.Publish(rig.Queue, "x")
				r.Wait(10 * time.Millisecond)
			}
			r.Wait(2 * time.Minute)
		},
		want: []string{"WARN steadymq: <message>; " + atFirst + "; Uint64 suppressed=3; String error=order 7: unexpected EOF"},
	},
	{
		name:    "a broker that cannot delay what comes back",
		broker:  []steadymqtest.Option{steadymqtest.WithVersion(4, 2)},
		message: "this broker cannot delay what comes back to a queue (RabbitMQ can since 4.3), so Queue.RetryMin has no effect and failed messages are held here",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Broker.DeleteQueue(rig.Queue)
			r.Consuming(rig.Ack, l.option(), steadymq.WithQueue(steadymq.Queue{RetryMin: time.Second, RetryMax: time.Minute}))
			r.Broker.Reset()
			r.Wait(time.Second)
		},
		want: []string{"WARN steadymq: <message>; " + atFirst},
	},
	{
		name: "handlers that fail", message: "handler failed",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Broker.DeclareExchange("shop", "topic")
			r.Broker.Bind(rig.Queue, "shop", "#")
			r.Consuming(failWith, l.option())
			anonymous(r, "discard:no order", "plain:a\nb", "later:not yet", "requeue:not here")
			r.Broker.Publish(rig.Queue, "x:x")
			r.Wait(time.Second)
			l.golden(r, "more handlers failed", nil)
		},
		want: []string{
			"WARN steadymq: handler failed; " + atFirst + "; String exchange=shop; String routing_key=order.new; String message_id=m-d; Uint64 delivery_tag=1; Int64 attempt=1; Bool redelivered=false; String outcome=discarded; String error=no order",
			"WARN steadymq: handler failed; " + atFirst + "; String exchange=shop; String routing_key=order.new; String message_id=m-p; Uint64 delivery_tag=2; Int64 attempt=1; Bool redelivered=false; String retry_in=<500ms..1.5s>; String error=a; b",
			"WARN steadymq: handler failed; " + atFirst + "; String exchange=shop; String routing_key=order.new; String message_id=m-r; Uint64 delivery_tag=<4..5>; Int64 attempt=1; Bool redelivered=false; String outcome=requeued; Uint64 suppressed=1; String error=not here",
		},
	},
	{
		name: "what was left out", message: "more handlers failed",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(failWith, l.option())
			r.Broker.Publish(rig.Queue, "discard:1", "discard:2", "discard:3")
			r.Wait(2 * time.Minute)
		},
		want: []string{"WARN steadymq: more handlers failed; " + atFirst + "; Uint64 suppressed=2; String error=3"},
	},
	{
		name: "what was left out of a later session", message: "more handlers failed",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(failWith, l.option())
			r.Broker.Publish(rig.Queue, "discard:1")
			r.Wait(500 * time.Millisecond)
			r.Broker.Reset()
			r.Wait(100 * time.Millisecond)
			r.Broker.Publish(rig.Queue, "discard:2")
			r.Wait(2 * time.Minute)
		},
		want: []string{"WARN steadymq: more handlers failed; String queue=orders; String consumer=<tag 2-2>; Uint64 session=2; String host=mq1.test:5672; Uint64 suppressed=1; String error=2"},
	},
	{
		name: "a handler that panics", message: "handler panicked",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(failWith, l.option(), steadymq.WithRequeueDelay(time.Hour, time.Hour))
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m7", Body: []byte("panic:nil map")})
			r.Wait(1100 * time.Millisecond)
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m8", Body: []byte("exit:")})
			r.Wait(1100 * time.Millisecond)
		},
		want: []string{
			"ERROR steadymq: handler panicked; " + atFirst + "; String exchange=; String routing_key=orders; String message_id=m7; Uint64 delivery_tag=1; Int64 attempt=1; Bool redelivered=false; " +
				"String retry_in=<30m..1h>; String error=steadymq: panic: nil map; String stack=<stack>",
			"ERROR steadymq: handler panicked; " + atFirst + "; String exchange=; String routing_key=orders; String message_id=m8; Uint64 delivery_tag=2; Int64 attempt=1; Bool redelivered=false; " +
				"String retry_in=<30m..1h>; String error=steadymq: panic: wrapped: file already exists; String stack=<stack>",
		},
	},
	{
		name: "panics that were left out", message: "more handlers panicked",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(failWith, l.option(), steadymq.WithRequeueDelay(time.Hour, time.Hour))
			r.Broker.Publish(rig.Queue, "panic:1", "panic:2", "panic:3")
			r.Wait(time.Second)
			require.NoError(r, r.Stop())
		},
		want: []string{"ERROR steadymq: more handlers panicked; " + atFirst + "; Uint64 suppressed=2; String error=steadymq: panic: 3"},
	},
	{
		name: "a handler that settles and fails", message: "handler settled its message by itself and then failed",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(failWith, l.option())
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m7", Body: []byte("acked:too late")})
			r.Wait(time.Second)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; String exchange=; String routing_key=orders; String message_id=m7; Uint64 delivery_tag=1; Int64 attempt=1; Bool redelivered=false; String outcome=acked; String error=too late",
		},
	},
	{
		name: "a handler past its timeout", message: "a handler is running past its timeout, it ignores the end of its context",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(90 * time.Second); return nil },
				l.option(), steadymq.WithHandlerTimeout(1500*time.Millisecond), steadymq.WithConcurrency(3))
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m7"})
			r.Wait(100 * time.Millisecond)
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m8"})
			r.Wait(time.Minute)
			r.Broker.PublishMessage(rig.Queue, steadymqtest.Message{ID: "m9"})
			r.Wait(2 * time.Minute)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; String timeout=1.5s; String message_id=m7; Uint64 delivery_tag=1; Int64 overdue=1",
			"WARN steadymq: <message>; " + atFirst + "; String timeout=1.5s; String message_id=m9; Uint64 delivery_tag=3; Int64 overdue=3; Uint64 suppressed=1",
		},
	},
	{
		name:    "a key that is not found",
		message: "the function of WithOrderingKey has not returned for a second: later messages no longer wait for its message, which keeps a worker and then fails",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(rig.Ack, l.option(), steadymq.WithConcurrency(2), steadymq.WithOrderingKey(func(d *steadymq.Delivery) string {
				if d.DeliveryTag == 1 {
					time.Sleep(3 * time.Second)
				}
				return ""
			}))
			r.PublishMany(2, "x")
			r.Wait(2 * time.Second)
		},
		want: []string{"WARN steadymq: <message>; " + atFirst},
	},
	{
		name:    "handlers too slow for the prefetch",
		message: "handlers are so slow that deliveries wait for them longer than half of the consumer timeout, after which the broker takes them back: lower WithPrefetch, or raise WithConcurrency",
		provoke: func(r *rig.Rig, l *recorder) {
			r.RemakeQueue("classic")
			r.Consuming(func(context.Context, *steadymq.Delivery) error { time.Sleep(time.Minute); return nil }, l.option(), steadymq.WithConcurrency(2), steadymq.WithPrefetch(100))
			r.PublishMany(200, "x")
			r.Wait(2 * time.Hour)
			require.Zero(r, r.Consumer.Stats().Handling)
		},
		want: []string{"WARN steadymq: <message>; " + atFirst + "; String consumer_timeout=30m0s; Int64 prefetch=100; Int64 concurrency=2"},
	},
	{
		name: "a topology function that consumes", message: "the topology function has consumed on the session's channel: what is delivered to that consumer waits until the session ends",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(rig.Ack, l.option(), steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
				_, err := ch.Consume(rig.Queue, "", false, false, false, false, nil)
				return "", err
			}))
		},
		want: []string{"WARN steadymq: <message>; " + atFirst},
	},
	{
		name: "a detector without the permission", message: "the stall detector cannot ask for the queue, so it notices no stall",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(rig.Ack, l.option(), steadymq.WithStallDetector(10*time.Second))
			r.Broker.RefuseDeclare(403, "access to queue 'orders' in vhost '/' refused for user 'app'")
			r.Wait(time.Minute)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; String advice=the user needs the configure permission for a passive declare; " +
				"String error=Exception (403) Reason: \"ACCESS_REFUSED - access to queue 'orders' in vhost '/' refused for user 'app'\"",
		},
	},
	{
		name: "a detector that is refused otherwise", message: "the stall detector cannot ask for the queue, so it notices no stall",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(rig.Ack, l.option(), steadymq.WithStallDetector(10*time.Second))
			r.Broker.RefuseDeclare(405, "locked")
			r.Wait(time.Minute)
		},
		want: []string{"WARN steadymq: <message>; " + atFirst + "; String advice=; String error=Exception (405) Reason: \"RESOURCE_LOCKED - locked\""},
	},
	{
		name: "a detector without a channel", message: "the stall detector cannot ask for the queue, so it notices no stall",
		provoke: func(r *rig.Rig, l *recorder) {
			r.Consuming(rig.Ack, l.option(), steadymq.WithStallDetector(10*time.Second), steadymq.WithURLFunc(func(context.Context) (string, error) {
				return r.Broker.URLs()[0] + "?channel_max=1", nil
			}))
			r.Wait(time.Minute)
		},
		want: []string{
			"WARN steadymq: <message>; " + atFirst + "; String advice=the connection has no channel left for it: raise channel_max; String error=<the driver's words>",
		},
	},
}

// keptApart lets a consumer of a group fail until it is kept apart, and heal.
func keptApart(r *rig.Rig, l *recorder) {
	var failing atomic.Bool
	failing.Store(true)
	p := grouped(r, 1, l.option())
	p.add(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
		if failing.Load() {
			return "", errors.New("not yet")
		}
		return "", nil
	}))
	p.start()
	r.Wait(30 * time.Second)
	failing.Store(false)
	r.Wait(2 * time.Minute)
	require.NoError(r, p.stop())
}

func TestEveryLineOfTheLogIsAsItWas(t *testing.T) {
	for _, row := range goldenRows {
		t.Run(row.message[:min(len(row.message), 30)]+", "+row.name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				l := &recorder{least: slog.LevelDebug}
				row.provoke(r, l)
				r.Wait(time.Millisecond)
				for i := range row.want {
					row.want[i] = strings.ReplaceAll(row.want[i], "<message>", row.message)
				}
				l.golden(r, " steadymq: "+row.message, row.want)
				require.NotEmpty(r, row.want)
			}, row.broker...)
		})
	}
}

// sources are the files of the library's own package.
func sources(t *testing.T) (files []*ast.File) {
	names, err := filepath.Glob(filepath.Join("..", "..", "*.go"))
	require.NoError(t, err)
	set := token.NewFileSet()
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(set, name, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		files = append(files, file)
	}
	return files
}

// messageReader reads the texts that the source gives to parameters named message: those of the
// functions that write the log.
type messageReader struct {
	takes  map[string]int      // function -> which of its arguments is a message
	consts map[string][]string // constant -> its text
	vars   map[string][]string // variable of the function that is read -> its texts
	texts  map[string]bool     // all messages
	other  []string            // messages that are neither texts nor states
}

func (m *messageReader) declared(d *ast.FuncDecl) {
	n := 0
	for _, field := range d.Type.Params.List {
		for _, name := range field.Names {
			if typ, ok := field.Type.(*ast.Ident); ok && typ.Name == "string" && name.Name == "message" {
				m.takes[d.Name.Name] = n
			}
			n++
		}
	}
}

// text returns what an expression may be, nil if that is not known.
func (m *messageReader) text(e ast.Expr) []string {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		if err != nil {
			return nil
		}
		return []string{text}
	case *ast.Ident:
		if all := m.vars[e.Name]; all != nil {
			return all
		}
		return m.consts[e.Name]
	case *ast.BinaryExpr:
		var all []string
		for _, first := range m.text(e.X) {
			for _, second := range m.text(e.Y) {
				all = append(all, first+second)
			}
		}
		return all
	}
	return nil
}

func (m *messageReader) function(d *ast.FuncDecl) {
	m.vars = make(map[string][]string)
	ast.Inspect(d, func(n ast.Node) bool {
		if assign, ok := n.(*ast.AssignStmt); ok && len(assign.Lhs) == len(assign.Rhs) {
			for i := range assign.Lhs {
				if name, ok := assign.Lhs[i].(*ast.Ident); ok {
					m.vars[name.Name] = append(m.vars[name.Name], m.text(assign.Rhs[i])...)
				}
			}
		}
		return true
	})
	ast.Inspect(d, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		name := ""
		switch f := call.Fun.(type) {
		case *ast.Ident:
			name = f.Name
		case *ast.SelectorExpr:
			name = f.Sel.Name
		}
		at, ok := m.takes[name]
		if !ok || len(call.Args) <= at {
			return true
		}
		if given, ok := call.Args[at].(*ast.Ident); ok && given.Name == "message" && len(m.vars["message"]) == 0 {
			return true // it is passed on
		}
		texts := m.text(call.Args[at])
		if len(texts) == 0 && !isState(call.Args[at]) {
			m.other = append(m.other, fmt.Sprintf("%T in %s", call.Args[at], d.Name.Name))
		}
		for _, text := range texts {
			m.texts[text] = true
		}
		return true
	})
}

// isState tells a call of String: a state is the message of its line.
func isState(e ast.Expr) bool {
	call, ok := e.(*ast.CallExpr)
	if !ok {
		return false
	}
	f, ok := call.Fun.(*ast.SelectorExpr)
	return ok && f.Sel.Name == "String"
}

func TestEveryMessageOfTheLogHasAGoldenLine(t *testing.T) {
	m := messageReader{takes: map[string]int{}, consts: map[string][]string{}, texts: map[string]bool{}}
	var functions []*ast.FuncDecl
	for _, file := range sources(t) {
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				functions = append(functions, d)
				m.declared(d)
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					if v, ok := spec.(*ast.ValueSpec); ok && d.Tok == token.CONST && len(v.Values) == len(v.Names) {
						for i := range v.Names {
							m.consts[v.Names[i].Name] = m.text(v.Values[i])
						}
					}
				}
			}
		}
	}
	for _, d := range functions {
		m.function(d)
	}
	states := []steadymq.State{steadymq.Connecting, steadymq.Consuming, steadymq.Backoff, steadymq.Draining, steadymq.Stopped, steadymq.Paused}
	for _, s := range states {
		m.texts[s.String()] = true
	}
	require.Greater(t, len(m.texts), len(states)+10, "the messages are not where this test looks")
	assert.Empty(t, m.other, "messages that this test cannot read")
	rows := make(map[string]bool)
	for _, row := range goldenRows {
		rows[row.message] = true
	}
	assert.Equal(t, slices.Sorted(maps.Keys(m.texts)), slices.Sorted(maps.Keys(rows)), "messages of the source, and of the golden lines")
}

// The logger.

// runOnce has a session with failures of every level, a reset and a stop.
func runOnce(r *rig.Rig, options ...steadymq.Option) {
	r.Consuming(failWith, options...)
	r.Broker.Publish(rig.Queue, "discard:x")
	r.Wait(2 * time.Second)
	r.Broker.Publish(rig.Queue, "panic:x")
	r.Wait(2 * time.Second)
	r.Broker.Reset()
	r.Wait(3 * time.Second)
	require.NoError(r, r.Stop())
}

func TestLoggerIsGivenWhatItsLevelWantsAndNothingElse(t *testing.T) {
	for level, want := range map[slog.Level][]string{
		slog.LevelDebug:     {"INFO connecting", "INFO consuming", "WARN handler failed", "ERROR handler panicked", "WARN backoff", "DEBUG connecting", "INFO consuming", "INFO draining", "INFO stopped"},
		slog.LevelInfo:      {"INFO connecting", "INFO consuming", "WARN handler failed", "ERROR handler panicked", "WARN backoff", "INFO consuming", "INFO draining", "INFO stopped"},
		slog.LevelWarn:      {"WARN handler failed", "ERROR handler panicked", "WARN backoff"},
		slog.LevelError:     {"ERROR handler panicked"},
		slog.LevelError + 1: nil,
	} {
		t.Run(level.String(), func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				l := &recorder{least: level}
				runOnce(r, l.option())
				var got []string
				for _, line := range l.lines {
					line, _, _ = strings.Cut(line, ";")
					got = append(got, strings.Replace(line, "steadymq: ", "", 1))
				}
				assert.Equal(r, want, got)
				assert.Empty(r, l.wrong)
				assert.Len(r, l.asked, 9, "for each line once")
			})
		})
	}
}

func TestLogHandlerGetsTheValuesOfRunsContextAndNotItsEnd(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		l := &recorder{least: slog.LevelDebug}
		c := r.New(l.option())
		ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), contextKey{}, "value"), time.Second)
		defer cancel()
		require.NoError(r, c.Run(ctx, rig.Ack))
		require.Len(r, l.context, 8, "asked and given, four times")
		for _, value := range l.context {
			assert.Equal(r, "value", value)
		}
		assert.Empty(r, l.wrong)
	})
}

func TestLinesCarryTheTimeOfWhatTheyTell(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		l := &recorder{least: slog.LevelDebug}
		runOnce(r, l.option())
		var changes, lines []time.Time
		for _, c := range r.Changes() {
			changes = append(changes, c.Time)
		}
		for i, line := range l.lines {
			if !strings.Contains(line, "handler") {
				lines = append(lines, l.times[i])
			}
		}
		assert.Equal(r, changes, lines)
	})
}

func TestAttributesAndGroupsOfTheLoggerAreKept(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var log bytes.Buffer
		runOnce(r, steadymq.WithLogger(slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{AddSource: true})).With("app", "shop").WithGroup("mq").With("team", "tea")))
		n := 0
		for line := range strings.Lines(log.String()) {
			var got struct {
				Time, Level, Msg, App string
				Source                any
				MQ                    map[string]any
				Queue                 any
			}
			require.NoError(r, json.Unmarshal([]byte(line), &got))
			assert.Equal(r, "shop", got.App)
			assert.Equal(r, "tea", got.MQ["team"])
			assert.Equal(r, rig.Queue, got.MQ["queue"])
			assert.Nil(r, got.Queue, "outside of the group")
			assert.True(r, strings.HasPrefix(got.Msg, "steadymq: "), got.Msg)
			n++
		}
		assert.Equal(r, 8, n)
	})
}

// What waits for its time when Run returns, as a warning of held messages or of a handler past its
// timeout, is not told any more.
func TestNothingIsLoggedOnceRunHasReturned(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		l := &recorder{least: slog.LevelDebug}
		r.Consuming(func(_ context.Context, d *steadymq.Delivery) error {
			switch string(d.Body) {
			case "hangs":
				time.Sleep(time.Hour)
			case "held":
				return steadymq.RequeueAfter(errAway, 2*time.Hour)
			}
			return steadymq.Discard(errAway)
		}, l.option(), steadymq.WithConcurrency(2), steadymq.WithPrefetch(4), steadymq.WithHandlerTimeout(10*time.Second), steadymq.WithDrainTimeout(time.Second))
		r.Broker.Publish(rig.Queue, "held", "held", "hangs", "x", "x", "x")
		r.Wait(5 * time.Second)
		require.ErrorIs(r, r.Stop(), steadymq.ErrDrainTimeout)
		lines := len(l.lines)
		assert.Contains(r, l.lines[lines-1], "stopped")
		r.Wait(3 * time.Hour)
		assert.Len(r, l.lines, lines)
		assert.Len(r, l.asked, lines)
	})
}
