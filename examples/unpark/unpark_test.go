package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

const (
	park     = "parked"
	password = "canary-swordfish"
)

// bench is a broker with parked messages, in virtual time.
type bench struct {
	*testing.T
	*steadymqtest.Broker
}

func bubble(t *testing.T, test func(b *bench), options ...steadymqtest.Option) {
	synctest.Test(t, func(t *testing.T) {
		options = append(options, steadymqtest.WithUser("app", password), steadymqtest.WithLatency(time.Millisecond))
		b := &bench{t, steadymqtest.NewBroker(t, options...)}
		for _, queue := range []string{park, "orders", "invoices"} {
			b.DeclareQueue(queue, steadymqtest.QueueOptions{Type: "quorum"})
		}
		test(b)
		assert.Empty(t, b.Violations())
	})
}

// parked parks a message of a queue as WithRetry does.
func (b *bench) parked(queue, text string) {
	b.PublishMessage(park, steadymqtest.Message{Body: []byte(text), Headers: amqp.Table{
		"tenant":           "blue",
		"steadymq-attempt": int32(5), "steadymq-error": text, "steadymq-error-type": "*errors.errorString",
		"steadymq-queue": queue, "steadymq-exchange": "shop", "steadymq-routing-key": "new",
		"steadymq-time": time.Now().UTC().Truncate(time.Second), "steadymq-host": "mq1:5672",
		"steadymq-consumer": "c-1", "steadymq-copy": "a-1",
	}})
}

// unpark runs the program and returns its exit status and what it has printed.
func (b *bench) unpark(args ...string) (int, string) {
	return b.until(context.Background(), args...)
}

func (b *bench) until(ctx context.Context, args ...string) (int, string) {
	var out strings.Builder
	status := run(ctx, append([]string{"-park", park}, args...), b.URL, &out, &out, amqp.Config{Dial: b.Dial})
	time.Sleep(time.Second)
	assert.NotContains(b, out.String(), password)
	b.Unblocked() // until then a broker does not see that the connection has ended
	time.Sleep(time.Minute)
	assert.LessOrEqual(b, b.Unsettled(park), 0) // -1 if there is no such queue
	return status, out.String()
}

// lengths are those of the queues orders, invoices and parked.
func (b *bench) lengths() [3]int {
	return [3]int{b.QueueLen("orders"), b.QueueLen("invoices"), b.QueueLen(park)}
}

// taken returns all messages of a queue.
func (b *bench) taken(queue string) []amqp.Delivery {
	conn, err := amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial})
	require.NoError(b, err)
	defer conn.Close()
	ch, err := conn.Channel()
	require.NoError(b, err)
	var all []amqp.Delivery
	for {
		d, ok, err := ch.Get(queue, true)
		require.NoError(b, err)
		if !ok {
			return all
		}
		all = append(all, d)
	}
}

func TestMessagesGoBackByTheirCause(t *testing.T) {
	for name, row := range map[string]struct {
		args  []string
		moved [3]int
		says  string
	}{
		"all":                    {nil, [3]int{4, 1, 0}, "5 looked at, 5 match, 5 moved, 0 failed"},
		"of one queue":           {[]string{"-queue", "invoices"}, [3]int{0, 1, 4}, "1 match"},
		"by a part of the error": {[]string{"-error", "order"}, [3]int{3, 0, 2}, "3 match"},
		"by type":                {[]string{"-error-type", "*errors.errorString"}, [3]int{4, 1, 0}, "5 match"},
		"by another type":        {[]string{"-error-type", "*net.OpError"}, [3]int{0, 0, 5}, "0 match"},
		"so many":                {[]string{"-limit", "2"}, [3]int{2, 0, 3}, "2 looked at, 2 match"},
		"only what is old":       {[]string{"-older", "30m"}, [3]int{1, 0, 4}, "1 match"},
		"all conditions":         {[]string{"-queue", "orders", "-error", "timeout", "-older", "1s"}, [3]int{1, 0, 4}, "1 match"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.parked("orders", "timeout")
				time.Sleep(time.Hour)
				for _, text := range []string{"no order 7", "no order 8", "no order 9"} {
					b.parked("orders", text)
				}
				b.parked("invoices", "timeout")
				time.Sleep(2 * time.Second)
				status, out := b.unpark(row.args...)
				assert.Zero(b, status, out)
				assert.Equal(b, row.moved, b.lengths(), out)
				assert.Contains(b, out, row.says)
			})
		})
	}
}

func TestEachCauseHasALine(t *testing.T) {
	bubble(t, func(b *bench) {
		for i := range 12 {
			b.parked("orders", fmt.Sprintf("no order %d", i))
		}
		b.parked("orders", "timeout\x1b[2J")
		_, out := b.unpark("-dry-run")
		lines := strings.Split(out, "\n")
		require.Len(b, lines, 5, out)
		assert.Equal(b, `12       0      0       orders  *errors.errorString  "no order #"`, lines[1])
		assert.Equal(b, `1        0      0       orders  *errors.errorString  "timeout\x1b[#J"`, lines[2])
	})
}

func TestDryRunChangesNothing(t *testing.T) {
	bubble(t, func(b *bench) {
		for range 3 {
			b.parked("orders", "timeout")
		}
		before := b.taken(park)
		for range 3 {
			b.parked("orders", "timeout")
		}
		status, out := b.unpark("-dry-run")
		assert.Zero(b, status)
		assert.Contains(b, out, "3 looked at, 3 match, 0 moved, 0 failed")
		assert.Equal(b, [3]int{0, 0, 3}, b.lengths())
		after := b.taken(park)
		require.Len(b, after, 3)
		for i, d := range after {
			assert.Equal(b, before[i].Body, d.Body)
			assert.Equal(b, before[i].Headers["steadymq-error"], d.Headers["steadymq-error"])
		}
	})
}

func TestMessageOfAnotherMakerStays(t *testing.T) {
	bubble(t, func(b *bench) {
		b.Publish(park, "who knows from where")
		b.parked(park, "it would come back here")
		status, out := b.unpark()
		assert.Zero(b, status)
		assert.Contains(b, out, "2 looked at, 0 match")
		assert.Equal(b, [3]int{0, 0, 2}, b.lengths())
	})
}

func TestMessageIsReturnedWhenItsQueueIsGone(t *testing.T) {
	bubble(t, func(b *bench) {
		b.parked("orders", "timeout")
		b.parked("gone", "timeout")
		b.parked("invoices", "timeout")
		status, out := b.unpark()
		assert.Equal(b, 1, status)
		assert.Contains(b, out, `the queue "gone" does not exist`)
		assert.Equal(b, [3]int{1, 1, 1}, b.lengths(), "the others have been moved")
	})
}

func TestMessageStaysIfItsQueueIsFull(t *testing.T) {
	bubble(t, func(b *bench) {
		b.parked("orders", "timeout")
		b.parked("invoices", "timeout")
		b.FillQueue("orders", true)
		status, out := b.unpark()
		assert.Equal(b, 1, status)
		assert.Contains(b, out, "basic.nack")
		assert.Equal(b, [3]int{0, 1, 1}, b.lengths())
	})
}

// A confirm that does not come may have been lost on the way: the message must stay.
func TestNothingIsAckedWithoutItsConfirm(t *testing.T) {
	for name, fault := range map[string]func(b *bench){
		"lost":  func(b *bench) { b.Host(0).LoseConfirms(true) },
		"alarm": func(b *bench) { b.Blocked("low on disk") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				b.parked("orders", "timeout")
				b.parked("orders", "timeout")
				fault(b)
				began := time.Now()
				status, out := b.unpark()
				assert.Equal(b, 1, status)
				assert.LessOrEqual(b, time.Since(began), patience+patience/3+62*time.Second)
				assert.Contains(b, out, "may be in both queues")
				if name == "alarm" {
					assert.Contains(b, out, "low on disk")
				}
				assert.Equal(b, 2, b.QueueLen(park), "the one that was under way, and the one behind it")
			})
		})
	}
}

func TestNothingIsLostByACutInTheMiddle(t *testing.T) {
	for cut := time.Millisecond; cut < 60*time.Millisecond; cut += time.Millisecond / 2 {
		bubble(t, func(b *bench) {
			all := make(map[string]bool)
			for i := range 5 {
				text := fmt.Sprintf("order %d", i)
				all[text] = true
				b.parked("orders", text)
			}
			time.AfterFunc(cut, func() { b.Reset() })
			b.unpark()
			for _, queue := range []string{"orders", park} {
				for _, d := range b.taken(queue) {
					delete(all, string(d.Body))
				}
			}
			assert.Empty(b, all, "cut after %v", cut)
		})
	}
}

func TestInterruptEndsAfterTheMessageUnderWay(t *testing.T) {
	bubble(t, func(b *bench) {
		for range 100 {
			b.parked("orders", "timeout")
		}
		ctx, stop := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer stop()
		status, out := b.until(ctx)
		assert.Equal(b, 1, status)
		assert.Contains(b, out, "interrupted")
		moved := b.lengths()
		assert.Greater(b, moved[0], 5)
		assert.Equal(b, 100, moved[0]+moved[2], "each is in one queue")
	})
}

// One that is parked again while others are moved would be moved for ever.
func TestEachMessageIsMovedOnce(t *testing.T) {
	bubble(t, func(b *bench) {
		for i := range 20 {
			b.parked("orders", fmt.Sprint(i))
		}
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			ended <- steadymq.Consume(ctx, b.URL, "orders", func(context.Context, *steadymq.Delivery) error {
				return errors.New("still not")
			}, steadymq.WithDialer(b.Dialer()), steadymq.WithRetry(steadymq.Retry{Attempts: 1, Park: park}))
		}()
		time.Sleep(time.Second)
		status, out := b.unpark()
		assert.Zero(b, status)
		assert.Contains(b, out, "20 looked at, 20 match, 20 moved")
		time.Sleep(time.Second)
		assert.Equal(b, 20, b.QueueLen(park))
		stop()
		require.NoError(b, <-ended)
	})
}

func TestHandlerSeesWhatTheMessageWasPublishedWith(t *testing.T) {
	bubble(t, func(b *bench) {
		b.DeclareExchange("shop", "direct")
		b.Bind("orders", "shop", "new")
		b.PublishExchange("shop", "new", steadymqtest.Message{ID: "m-1", Body: []byte("tea"), Headers: amqp.Table{"tenant": "blue"}})
		var mended atomic.Bool
		var seen []string
		var headers amqp.Table
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			ended <- steadymq.Consume(ctx, b.URL, "orders", func(_ context.Context, d *steadymq.Delivery) error {
				seen = append(seen, fmt.Sprintf("%s %s %s %s %d", d.MessageId, d.Body, d.Exchange, d.RoutingKey, d.Attempt()))
				headers = d.Headers
				if !mended.Load() {
					return errors.New("not yet")
				}
				return nil
			}, steadymq.WithDialer(b.Dialer()), steadymq.WithRetry(steadymq.Retry{Attempts: 2, Delays: []time.Duration{time.Second}, Park: park}))
		}()
		time.Sleep(time.Minute)
		mended.Store(true)
		status, out := b.unpark("-error", "not yet")
		assert.Zero(b, status, out)
		stop()
		require.NoError(b, <-ended)
		assert.Equal(b, []string{"m-1 tea shop new 1", "m-1 tea shop new 2", "m-1 tea shop new 1"}, seen)
		assert.Equal(b, amqp.Table{
			"tenant": "blue", "steadymq-queue": "orders", "steadymq-exchange": "shop", "steadymq-routing-key": "new",
		}, withoutBrokers(headers))
		assert.Equal(b, [3]int{}, b.lengths())
	})
}

func withoutBrokers(headers amqp.Table) amqp.Table {
	rest := amqp.Table{}
	for name, value := range headers {
		if !strings.HasPrefix(name, "x-") {
			rest[name] = value
		}
	}
	return rest
}

func TestManyReturnsAreToldBeforeADeliveryLimitTakesTheMessages(t *testing.T) {
	bubble(t, func(b *bench) {
		b.parked("orders", "timeout")
		for i := range 11 {
			_, out := b.unpark("-dry-run")
			assert.Equal(b, i >= 10, strings.Contains(out, "delivery limit"), out)
		}
	}, steadymqtest.WithVersion(4, 0))
}

func TestWrongFlagsAreRefused(t *testing.T) {
	url := "amqp://app:" + password + "@mq1/"
	for name, row := range map[string]struct {
		args   []string
		url    string
		status int
		says   string
	}{
		"no URL":          {[]string{"-park", park}, "", 2, "set AMQP_URL"},
		"a URL in pieces": {[]string{"-park", park}, "amqp://app:" + password + "@mq1:port/", 1, "percent-encoded"},
		"no park queue":   {nil, url, 2, "-park"},
		"park is queue":   {[]string{"-park", park, "-queue", park}, url, 2, "same queue"},
		"a word too many": {[]string{"-park", park, "orders"}, url, 2, `"orders" is no flag`},
		"unknown":         {[]string{"-parc", park}, url, 2, "-parc"},
		"negative":        {[]string{"-park", park, "-limit", "-1"}, url, 2, "negative"},
		"help":            {[]string{"-url", url, "-help"}, url, 0, "-dry-run"},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			status := run(context.Background(), row.args, row.url, &out, &out, amqp.Config{})
			assert.Equal(t, row.status, status)
			assert.Contains(t, out.String(), row.says)
			assert.NotContains(t, out.String(), password)
		})
	}
}

func TestMissingParkQueueIsNamed(t *testing.T) {
	bubble(t, func(b *bench) {
		b.DeleteQueue(park)
		status, out := b.unpark()
		assert.Equal(b, 1, status)
		assert.Contains(b, out, `look for the queue "parked": Exception (404)`)
		assert.NotContains(b, out, "looked at")
	})
}
