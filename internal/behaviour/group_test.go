package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// party is a group on the rig's broker, with a queue q0, q1, ... for each consumer.
type party struct {
	*rig.Rig
	group     *steadymq.Group
	consumers []*steadymq.Consumer
	cancel    context.CancelFunc
	read      int // of the log
	result    chan error
}

// grouped makes a group of n consumers that ack. options are those of the group.
func grouped(r *rig.Rig, n int, options ...steadymq.Option) *party {
	r.Helper()
	urls := r.Broker.URLs()
	all := []steadymq.Option{
		steadymq.WithDialer(r.Broker.Dialer()),
		steadymq.WithLogger(slog.New(slog.NewTextHandler(r.Log, &slog.HandlerOptions{Level: slog.LevelDebug}))),
	}
	if len(urls) > 1 {
		all = append(all, steadymq.WithURLs(urls[1:]...))
	}
	g, err := steadymq.NewGroup(urls[0], append(all, options...)...)
	require.NoError(r, err)
	p := &party{Rig: r, group: g}
	for range n {
		p.add(rig.Ack)
	}
	return p
}

func (p *party) name(i int) string { return fmt.Sprintf("q%d", i) }

// add gives the group one more consumer, of a queue of its own.
func (p *party) add(h steadymq.Handler, options ...steadymq.Option) *steadymq.Consumer {
	p.Helper()
	name := p.name(len(p.consumers))
	p.Broker.DeclareQueue(name, steadymqtest.QueueOptions{})
	c, err := p.group.Handle(name, h, options...)
	require.NoError(p, err)
	p.consumers = append(p.consumers, c)
	return c
}

// start runs the group.
func (p *party) start() *party {
	ctx, cancel := context.WithCancel(p.Context())
	p.cancel, p.result = cancel, make(chan error, 1)
	go func() {
		err := p.group.Run(ctx)
		cancel()
		p.result <- err
	}()
	p.Wait(200 * time.Millisecond)
	return p
}

func (p *party) stop() error {
	p.cancel()
	return <-p.result
}

// retireConnection lets channels be given up without an answer until the connection is replaced for
// that. It takes three consumers more.
func (p *party) retireConnection() {
	p.Helper()
	p.Broker.HangAt(steadymqtest.StageConsume, true)
	for range 3 {
		p.add(rig.Ack)
	}
	p.Wait(14 * time.Second)
	p.Broker.HangAt(steadymqtest.StageConsume, false)
}

// consuming tells how many of the consumers are consuming.
func (p *party) consuming() (n int) {
	for _, c := range p.consumers {
		if c.State() == steadymq.Consuming {
			n++
		}
	}
	return n
}

func TestGroupConsumesManyQueuesOnOneConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 10).start()
		require.Equal(t, 10, p.consuming())
		require.Equal(t, 1, r.OpenConnections())
		for i := range p.consumers {
			r.Broker.Publish(p.name(i), "1", "2")
		}
		r.Wait(time.Second)
		for i, c := range p.consumers {
			assert.Zero(t, r.Broker.QueueLen(p.name(i)))
			assert.Equal(t, uint64(2), c.Stats().Acked)
		}
		require.NoError(t, p.stop())
		require.Zero(t, r.OpenConnections())
		assert.Equal(t, steadymq.GroupStats{Connections: 1, Dials: 1}, p.group.Stats())
	})
}

func TestGroupDialsOnceForAllWhoLostTheConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 20).start()
		for n := range 5 {
			r.Broker.Reset()
			r.Wait(200 * time.Millisecond)
			require.Equal(t, 20, p.consuming())
			require.Equal(t, 1, r.OpenConnections())
			require.Equal(t, uint64(n+2), p.group.Stats().Dials)
			r.Wait(71 * time.Second)
		}
		require.NoError(t, p.stop())
	})
}

func TestGroupIsNoMoreOfABurdenToAHostThatRefusesThanOneConsumer(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 50).start()
		before := p.group.Stats().Dials
		r.Broker.Refuse(true)
		r.Broker.Reset()
		r.Wait(time.Minute)
		dials := p.group.Stats().Dials - before
		assert.Less(t, dials, uint64(200), "one a half second on average")
		assert.Greater(t, dials, uint64(60))
		r.Broker.Refuse(false)
		r.Wait(1100 * time.Millisecond)
		require.Equal(t, 50, p.consuming())
		require.Equal(t, 1, r.OpenConnections())
		require.NoError(t, p.stop())
	})
}

func TestConsumerThatKeepsFailingGoesOnOnAConnectionOfItsOwn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 5)
		var failing atomic.Bool
		failing.Store(true)
		bad := p.add(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			if failing.Load() {
				return "", errors.New("not yet")
			}
			return "", nil
		}))
		p.start()
		r.Wait(time.Minute)
		require.Equal(t, 5, p.consuming())
		for _, c := range p.consumers[:5] {
			require.Equal(t, uint64(1), c.Stats().Sessions, "it is not disturbed")
		}
		require.Equal(t, 1, p.group.Stats().Isolated)
		require.LessOrEqual(t, r.OpenConnections(), 2)

		failing.Store(false)
		r.Wait(11 * time.Second)
		require.Equal(t, steadymq.Consuming, bad.State())
		require.Equal(t, 2, r.OpenConnections())
		r.Wait(71 * time.Second)
		require.Equal(t, steadymq.Consuming, bad.State())
		require.Equal(t, 1, r.OpenConnections(), "it shares the connection again")
		require.Zero(t, p.group.Stats().Isolated)
		require.NoError(t, p.stop())
	})
}

func TestSetUpThatMakesTheBrokerCloseTheConnectionDisturbsTheOthersTwice(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 10)
		bad := p.add(rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			return "", ch.Qos(1, 1, false) // 540, which closes the connection
		}), steadymq.WithFatal(func(error) bool { return false }))
		p.start()
		r.Wait(time.Minute)
		if p.consuming() != 10 {
			t.Log(r.Log.String())
		}
		require.Equal(t, 10, p.consuming())
		for _, c := range p.consumers[:10] {
			require.LessOrEqual(t, c.Stats().Sessions, uint64(3))
		}
		require.Equal(t, 1, p.group.Stats().Isolated)
		require.Equal(t, steadymq.Backoff, bad.State())
		before := p.consumers[0].Stats().Sessions
		r.Wait(10 * time.Minute)
		require.Equal(t, before, p.consumers[0].Stats().Sessions)
		require.NoError(t, p.stop())
	})
}

func TestSetUpThatHangsCostsAChannelAndNotTheConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 3).start()
		r.Broker.HangAt(steadymqtest.StageConsume, true)
		late := p.add(rig.Ack)
		r.Wait(16 * time.Second)
		require.Equal(t, steadymq.Connecting, late.State())
		require.EqualValues(t, 1, late.Stats().GivenUp)
		require.Equal(t, 1, r.OpenConnections())
		r.Wait(20 * time.Second)
		require.Equal(t, 1, p.group.Stats().Isolated, "once it is plain that the others live")
		for i := range 3 {
			r.Broker.Publish(p.name(i), "m")
		}
		r.Wait(time.Second)
		for _, c := range p.consumers[:3] {
			require.EqualValues(t, 1, c.Stats().Sessions)
			require.EqualValues(t, 1, c.Stats().Acked)
		}
		r.Broker.HangAt(steadymqtest.StageConsume, false)
		r.Wait(30 * time.Second)
		require.Equal(t, steadymq.Consuming, late.State())
		r.Wait(75 * time.Second)
		require.Equal(t, steadymq.Consuming, late.State())
		require.Equal(t, 1, r.OpenConnections(), "it shares the connection again")
		r.Broker.Publish(p.name(3), "m", "n")
		r.Wait(time.Second)
		require.EqualValues(t, 2, late.Stats().Acked)
		require.NoError(t, p.stop())
	})
}

func TestMoreConsumersThanChannelsOpenAFurtherConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		urls := r.Broker.URLs()
		g, err := steadymq.NewGroup(urls[0]+"?channel_max=4", steadymq.WithDialer(r.Broker.Dialer()),
			steadymq.WithLogger(slog.New(slog.NewTextHandler(r.Log, nil))))
		require.NoError(t, err)
		p := &party{Rig: r, group: g}
		for range 10 {
			p.add(rig.Ack)
		}
		p.start()
		r.Wait(time.Second)
		require.Equal(t, 10, p.consuming())
		require.Equal(t, 3, r.OpenConnections())
		require.NoError(t, p.stop())
	})
}

func TestConsumerFindsAConnectionWithAChannelAtOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		g, err := steadymq.NewGroup(r.Broker.URLs()[0]+"?channel_max=1", steadymq.WithDialer(r.Broker.Dialer()),
			steadymq.WithLogger(slog.New(slog.NewTextHandler(r.Log, nil))))
		require.NoError(t, err)
		p := &party{Rig: r, group: g}
		for range 20 {
			p.add(rig.Ack)
		}
		p.start()
		require.Equal(t, 20, p.consuming(), "200 ms after the start")
		require.Equal(t, 20, r.OpenConnections())
		late := p.add(rig.Ack)
		r.Wait(100 * time.Millisecond)
		require.Equal(t, steadymq.Consuming, late.State())
		require.NoError(t, p.stop())
	})
}

func TestConsumerOfAGroupStartsAndStopsAlone(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2).start()
		late := p.add(rig.Ack)
		r.Wait(100 * time.Millisecond)
		require.Equal(t, 3, p.consuming())
		require.Equal(t, []*steadymq.Consumer{p.consumers[0], p.consumers[1], late}, p.group.Consumers())

		require.NoError(t, p.consumers[0].Stop(r.Context()))
		require.Equal(t, steadymq.Stopped, p.consumers[0].State())
		require.Equal(t, 2, p.consuming())
		require.Equal(t, p.consumers[1:], p.group.Consumers())
		require.Equal(t, 1, r.OpenConnections())
		require.ErrorContains(t, late.Run(r.Context(), rig.Ack), "belongs to a Group")
		require.NoError(t, p.stop())
		_, err := p.group.Handle("q0", rig.Ack)
		require.ErrorContains(t, err, "has ended")
		require.ErrorIs(t, p.group.Run(r.Context()), steadymq.ErrRunning)
	})
}

func TestQueueOfItsConnectionGoesWithItsConsumer(t *testing.T) {
	for _, queue := range []string{"mine", ""} {
		rig.Bubble(t, func(r *rig.Rig) {
			p := grouped(r, 4, steadymq.WithConnections(2)).start()
			for range 5 {
				own := steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true})
				c, err := p.group.Handle(queue, rig.Ack, own)
				require.NoError(t, err)
				p.consumers = append(p.consumers, c)
				r.Wait(time.Second)
				require.Equal(t, steadymq.Consuming, c.State())
				require.NoError(t, c.Stop(r.Context()))
				require.Len(t, r.Broker.Queues(), 5, "four of the others, and that of the rig")
				p.add(rig.Ack) // makes the other connection the one for the next
				r.Broker.DeleteQueue(p.name(len(p.consumers) - 1))
				require.NoError(t, p.consumers[len(p.consumers)-1].Stop(r.Context()))
			}
			require.NoError(t, p.stop())
		})
	}
}

func TestQueueOfItsConnectionIsNotLeftBehindLockedAfterAStall(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2)
		c, err := p.group.Handle("mine", rig.Ack, steadymq.WithStallDetector(5*time.Second),
			steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true}))
		require.NoError(t, err)
		p.start()
		r.Broker.QuorumStall("mine", true)
		r.Broker.Publish("mine", "never delivered")
		r.Wait(16 * time.Second)
		r.Broker.QuorumStall("mine", false)
		r.Wait(time.Second)
		require.Equal(t, steadymq.Consuming, c.State())
		require.Greater(t, c.Stats().Sessions, uint64(1), "a stall was found")
		require.Equal(t, 2, p.consuming(), "the others are where they were")
		require.NoError(t, p.stop())
	})
}

func TestTopologyThatNamesAnotherQueueLeavesNoneOnASharedConnection(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2)
		c, err := p.group.Handle("", rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			q, err := ch.QueueDeclare("", false, false, true, false, nil)
			return q.Name, err
		}))
		require.NoError(t, err)
		p.start()
		for range 4 {
			r.Broker.CancelConsumers("")
			r.Wait(75 * time.Second)
			require.Equal(t, steadymq.Consuming, c.State())
			require.Len(t, r.Broker.Queues(), 4, "two of the others, that of the rig and one that the broker has named")
		}
		require.LessOrEqual(t, r.OpenConnections(), 2)
		require.NoError(t, p.stop())
	})
}

func TestErrorOfAConsumerWithoutANameOfItsQueueNamesTheTag(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1)
		release := make(chan struct{})
		_, err := p.group.Handle("", rig.Hold(make(chan *steadymq.Delivery, 1), release), steadymq.WithConsumerTag("news"),
			steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true, Bindings: []steadymq.Binding{{Exchange: "amq.fanout"}}}))
		require.NoError(t, err)
		p.start()
		r.Broker.PublishExchange("amq.fanout", "", steadymqtest.Message{})
		r.Wait(time.Second)
		err = p.stop()
		close(release)
		require.ErrorIs(t, err, steadymq.ErrDrainTimeout)
		require.ErrorContains(t, err, "consumer news: ")
	})
}

func TestRefusedSetUpOfOneConsumerEndsTheGroupAfterADrain(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2)
		_, err := p.group.Handle(rig.Queue, rig.Ack, steadymq.WithQueue(steadymq.Queue{}))
		require.NoError(t, err)
		p.start()
		err = <-p.result
		require.ErrorContains(t, err, "queue orders")
		require.ErrorContains(t, err, "inequivalent")
		require.Zero(t, r.OpenConnections())
	})
}

func TestRefusedLoginOfAGroupIsToldOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.RefuseLogin(true)
		p := grouped(r, 5).start()
		err := <-p.result
		require.ErrorIs(t, err, steadymq.ErrLoginRefused)
		require.Len(t, errorsOf(err), 1)
		require.NotContains(t, err.Error(), "queue", "it is about no queue alone")
	})
}

func errorsOf(err error) []error {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		return all.Unwrap()
	}
	return []error{err}
}

// told returns the lines of the log at INFO and above since the last call.
func (p *party) told() []string {
	var lines []string
	for line := range strings.Lines(p.Log.String()[p.read:]) {
		if !strings.Contains(line, "level=DEBUG") {
			_, line, _ = strings.Cut(strings.TrimSpace(line), "level=")
			lines = append(lines, variable.ReplaceAllString(line, "$1=..."))
		}
	}
	p.read = len(p.Log.String())
	return lines
}

var variable = regexp.MustCompile(`(retry_in|down|consumer)=\S+`)

func TestLogTellsOnceOfAConnectionThatManyHaveLost(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 3).start()
		require.ElementsMatch(t, []string{
			`INFO msg="steadymq: connected" consumers=3 host=mq1.test:5672`,
			`INFO msg="steadymq: consuming" queue=q0 consumer=... session=1 host=mq1.test:5672`,
			`INFO msg="steadymq: consuming" queue=q1 consumer=... session=1 host=mq1.test:5672`,
			`INFO msg="steadymq: consuming" queue=q2 consumer=... session=1 host=mq1.test:5672`,
		}, p.told())
		r.Wait(2 * time.Minute)
		r.Broker.FIN()
		r.Wait(5 * time.Second) // what lasts for 2 s is told then, unless the group has told it
		require.Equal(t, 3, p.consuming())
		require.Equal(t, []string{
			`WARN msg="steadymq: backoff" consumers=3 host=mq1.test:5672 attempt=1 retry_in=... up=2m0.193s cause="lost: the peer closed the connection"`,
			`INFO msg="steadymq: connected" consumers=3 host=mq1.test:5672 attempt=1 down=...`,
		}, p.told())

		r.Broker.DeleteQueue("q1")
		r.Wait(2 * time.Second)
		r.Broker.DeclareQueue("q1", steadymqtest.QueueOptions{})
		r.Wait(6 * time.Second)
		lines := p.told()
		require.NotEmpty(t, lines)
		for _, line := range lines {
			require.Contains(t, line, "queue=q1", "its own event")
		}
		require.Contains(t, lines[len(lines)-1], "consuming")
		require.NoError(t, p.stop())
	})
}

func TestLogTellsOfEachOfSeveralConnectionsWhenItIsBack(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 4, steadymq.WithConnections(2)).start()
		r.Wait(2 * time.Minute)
		p.told()
		r.Broker.FIN()
		r.Wait(5 * time.Second)
		require.Equal(t, 4, p.consuming())
		require.ElementsMatch(t, []string{
			`WARN msg="steadymq: backoff" consumers=2 connection=1 host=mq1.test:5672 attempt=1 retry_in=... up=2m0.193s cause="lost: the peer closed the connection"`,
			`WARN msg="steadymq: backoff" consumers=2 connection=2 host=mq1.test:5672 attempt=1 retry_in=... up=2m0.193s cause="lost: the peer closed the connection"`,
			`INFO msg="steadymq: connected" consumers=2 connection=1 host=mq1.test:5672 attempt=1 down=...`,
			`INFO msg="steadymq: connected" consumers=2 connection=2 host=mq1.test:5672 attempt=1 down=...`,
		}, p.told())
		require.NoError(t, p.stop())
	})
}

func TestLogTellsOfASlowDialForAllWhoWaitForIt(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.DropSYN(true)
		p := grouped(r, 3).start()
		r.Wait(3 * time.Second)
		require.Equal(t, []string{`INFO msg="steadymq: still connecting" consumers=3 step=dial for=2s host=mq1.test:5672`}, p.told())
		r.Wait(30 * time.Second)
		for _, line := range p.told() {
			require.NotContains(t, line, "still connecting", "not again by each of them")
		}
		require.NoError(t, p.stop())
	})
}

func TestLogCountsAllWhoWaitFromTheFirstLineOn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.Refuse(true)
		p := grouped(r, 50).start()
		require.Contains(t, p.told()[0], "consumers=50")
		require.NoError(t, p.stop())
	})
}

func TestPanicOfTheLogHandlerInALineOfTheGroupEndsItsRun(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2, steadymq.WithLogger(slog.New(panicsAt{slog.DiscardHandler, "connected"}))).start()
		err := <-p.result
		var option *steadymq.OptionError
		require.ErrorAs(t, err, &option)
		require.Equal(t, "WithLogger", option.Option)
		require.ErrorAs(t, err, new(*steadymq.PanicError))
		require.Zero(t, r.OpenConnections())
	})
}

// panicsAt is a log handler with a fault in the lines that contain a text.
type panicsAt struct {
	slog.Handler
	text string
}

func (p panicsAt) Enabled(context.Context, slog.Level) bool { return true }

func (p panicsAt) Handle(_ context.Context, record slog.Record) error {
	if strings.Contains(record.Message, p.text) {
		panic("the disk is full")
	}
	return nil
}

func TestGroupRunsOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1).start()
		again := func() {
			err := p.group.Run(t.Context())
			require.ErrorIs(t, err, steadymq.ErrRunning)
			require.EqualError(t, err, "steadymq: this Group runs already or has run; make another group with NewGroup")
		}
		again()
		require.NoError(t, p.stop())
		again()
	})
}

func TestConsumerStoppedBeforeTheGroupRunsIsNoneOfItsConsumers(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 2)
		require.NoError(t, p.consumers[0].Stop(t.Context()))
		require.Equal(t, p.consumers[1:], p.group.Consumers())
		p.start()
		require.Equal(t, 1, p.consuming())
		require.Equal(t, p.consumers[1:], p.group.Consumers())
		require.NoError(t, p.stop())
	})
}

func TestGroupRefusesWhatIsWrongAndSaysWhatToDo(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var none context.Context
		url := r.Broker.URLs()[0]
		g, err := steadymq.NewGroup(url)
		require.NoError(t, err)
		rows := map[string]struct {
			err  error
			says []string
		}{
			"no handler and no queue":   {second(g.Handle("", nil)), []string{"Handle: the queue name is empty", "Handle: the handler must not be nil"}},
			"options of the connection": {second(g.Handle("q", rig.Ack, steadymq.WithHeartbeat(time.Second), steadymq.WithBackoff(time.Second, time.Minute))), []string{"queue q: steadymq: WithHeartbeat: belongs to the connection", "queue q: steadymq: WithBackoff: belongs to the connection", "NewGroup"}},
			"no handler of a queue":     {second(g.Handle("q", nil)), []string{"queue q: steadymq: Handle: the handler must not be nil"}},

			"connections of one consumer":   {second(steadymq.New(url, "q", steadymq.WithConnections(2))), []string{"WithConnections: is for NewGroup"}},
			"connections of one in a group": {second(g.Handle("q", rig.Ack, steadymq.WithConnections(2))), []string{"WithConnections: belongs to the connection"}},
			"no connections":                {second(steadymq.NewGroup(url, steadymq.WithConnections(0))), []string{"WithConnections: must be between 1 and 65535, got 0"}},
			"too many connections":          {second(steadymq.NewGroup(url, steadymq.WithConnections(65536))), []string{"must be between 1 and 65535"}},
			"a wrong URL":                   {second(steadymq.NewGroup("http://h/")), []string{"NewGroup: "}},
			"a nil option":                  {second(steadymq.NewGroup(url, nil)), []string{"NewGroup: option 1 is nil"}},
			"a nil option of a consumer":    {second(g.Handle("q", rig.Ack, nil)), []string{"Handle: option 1 is nil"}},
			"no context":                    {g.Run(none), []string{"Run: the context must not be nil"}},
			"no context for a stop":         {new(steadymq.Consumer).Stop(none), []string{"Stop: the context must not be nil"}},
		}
		for name, row := range rows {
			for _, says := range row.says {
				require.ErrorContains(t, row.err, says, name)
			}
			require.ErrorAs(t, row.err, new(*steadymq.OptionError), name)
		}
		_, err = steadymq.NewGroup(url, steadymq.WithConnections(65535))
		require.NoError(t, err)
	})
}

func second[T any](_ T, err error) error { return err }

func TestOptionsOfAConsumerComeAfterThoseOfItsGroup(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		block := make(chan struct{})
		wait := func(context.Context, *steadymq.Delivery) error { <-block; return nil }
		queue := steadymq.Queue{Type: "classic", Args: amqp.Table{"x-message-ttl": 60_000}}
		p := grouped(r, 0, steadymq.WithQueue(queue), steadymq.WithConcurrency(3))
		queue.Args["x-message-ttl"] = "too late, and refused"
		_, err := p.group.Handle("first", wait)
		require.NoError(t, err)
		_, err = p.group.Handle("second", wait, steadymq.WithQueue(steadymq.Queue{}), steadymq.WithPrefetch(5), steadymq.WithConcurrency(1))
		require.NoError(t, err)
		p.start()
		for _, c := range p.group.Consumers() {
			require.Equal(t, steadymq.Consuming, c.State())
			for range 50 {
				r.Broker.Publish(c.Queue(), "m")
			}
		}
		r.Wait(time.Second)
		handling := [2]int{}
		for i, c := range p.group.Consumers() {
			handling[i] = c.Stats().Handling
		}
		assert.Equal(t, [2]int{3, 1}, handling)
		assert.Equal(t, 32, r.Broker.Unsettled("first"))
		assert.Equal(t, 5, r.Broker.Unsettled("second"))
		close(block)
		require.NoError(t, p.stop())
	})
}

func TestEachConsumerOfAGroupHasItsOwnLimitOfAMessage(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 0, steadymq.WithMaxMessageSize(10))
		small, large := p.add(rig.Ack), p.add(rig.Ack, steadymq.WithMaxMessageSize(20))
		p.start()
		for i := range 2 {
			r.Broker.Publish(p.name(i), "fifteen bytes!!")
		}
		r.Wait(time.Second)
		assert.EqualValues(t, 1, small.Stats().Unreadable)
		assert.Zero(t, large.Stats().Unreadable)
		assert.EqualValues(t, 1, large.Stats().Acked)
		require.NoError(t, p.stop())
	})
}

func TestMisuseOfOneChannelIsNotThatOfAnother(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 0)
		inside := make(chan struct{})
		good := p.add(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			<-inside
			return "", nil
		}))
		bad := p.add(rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			err := ch.Tx()
			select {
			case <-inside:
			default:
				close(inside)
			}
			return "", err
		}))
		p.start()
		r.Wait(10 * time.Second)
		assert.Equal(t, steadymq.Consuming, good.State())
		assert.EqualValues(t, 1, good.Stats().Sessions)
		assert.NotEqual(t, steadymq.Consuming, bad.State())
		require.NoError(t, p.stop())
	})
}

func TestDetectorsOfAGroupShareTheConnectionTheyAskAnotherHostOn(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 10, steadymq.WithStallDetector(10*time.Second)).start()
		require.Equal(t, 10, p.consuming())
		before := len(r.Broker.Connections())
		r.Wait(11 * time.Second) // each of them looks once, at the same time
		assert.LessOrEqual(t, len(r.Broker.Connections())-before, 4, "ten consumers, two other hosts")
		assert.Equal(t, 1, r.OpenConnections())
		for i := range p.consumers {
			require.EqualValues(t, 1, p.consumers[i].Stats().Sessions)
		}
		require.NoError(t, p.stop())
	}, steadymqtest.WithHosts(3))
}

func TestStalledConsumerMovesAndLeavesTheOthersAlone(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 3, steadymq.WithStallDetector(10*time.Second)).start()
		r.Broker.QuorumStall("q1", true)
		r.Broker.Publish("q1", "m")
		r.Wait(time.Minute)
		require.NotZero(t, p.group.Stats().Isolated)
		for _, c := range []*steadymq.Consumer{p.consumers[0], p.consumers[2]} {
			assert.EqualValues(t, 1, c.Stats().Sessions)
		}
		r.Broker.QuorumStall("q1", false)
		r.Wait(3 * time.Minute)
		assert.EqualValues(t, 1, p.consumers[1].Stats().Acked)
		assert.Zero(t, p.group.Stats().Isolated)
		require.NoError(t, p.stop())
	})
}

func TestConsumerThatIsKeptApartStaysThereWhileThereIsNothingToShare(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var failing atomic.Bool
		failing.Store(true)
		var conns []net.Conn // the first one is shared
		p := grouped(r, 2, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := r.Broker.Dialer()(ctx, network, address)
			if err == nil {
				conns = append(conns, c)
			}
			return c, err
		}))
		apart := p.add(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			if failing.Load() {
				return "", errors.New("not yet")
			}
			return "", nil
		}))
		p.start()
		r.Wait(30 * time.Second)
		require.Equal(t, 1, p.group.Stats().Isolated)
		failing.Store(false)
		r.Wait(11 * time.Second)
		require.Equal(t, steadymq.Consuming, apart.State())
		sessions := apart.Stats().Sessions
		r.Broker.Refuse(true)
		require.NoError(t, conns[0].Close())
		r.Wait(5 * time.Minute)
		require.Equal(t, steadymq.Consuming, apart.State())
		require.Equal(t, sessions, apart.Stats().Sessions)
		r.Broker.Refuse(false)
		r.Wait(3 * time.Minute)
		require.Equal(t, 3, p.consuming())
		require.Equal(t, 1, r.OpenConnections())
		require.NoError(t, p.stop())
	})
}

// The one that dials takes its turn as the others do: a suspect is set up beside no other.
func TestConsumerThatDialsIsNotTakenForTheReasonOfAnothersFailure(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 0)
		p.add(rig.Ack, steadymq.WithTopology(func(ctx context.Context, _ *amqp.Channel) (string, error) {
			select { // it would still be under way when the other fails
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			return "", ctx.Err()
		}))
		p.add(rig.Ack, steadymq.WithTopology(func(ctx context.Context, ch *amqp.Channel) (string, error) {
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
			return "", ch.Qos(1, 1, false) // 540, which closes the connection
		}), steadymq.WithFatal(func(error) bool { return false }))
		p.start()
		r.Wait(time.Minute)
		assert.Equal(t, steadymq.Consuming, p.consumers[0].State())
		assert.Equal(t, 1, p.group.Stats().Isolated)
		require.NoError(t, p.stop())
	})
}

// Whoever is to blame may have left the connection before the other one has heard of its end, which
// a topology function that takes its time does late.
func TestEndOfAConnectionIsNobodysOwnRefusalOnceTheOneToBlameHasLeft(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1, steadymq.WithBackoff(2*time.Second, 2*time.Second))
		again := make(chan struct{})
		tries := 0
		p.add(rig.Ack, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
			if tries++; tries == 2 {
				close(again)
			}
			time.Sleep(20 * time.Millisecond)
			return "", ch.Qos(1, 1, false) // 540, which closes the connection
		}), steadymq.WithFatal(func(error) bool { return false }))
		p.start()
		require.NoError(t, p.consumers[0].Stop(r.Context()))
		newcomer := p.add(rig.Ack, steadymq.WithTopology(func(context.Context, *amqp.Channel) (string, error) {
			<-again
			time.Sleep(time.Second)
			return "", nil
		}))
		r.Wait(time.Minute)
		assert.Equal(t, steadymq.Consuming, newcomer.State())
		require.NoError(t, p.stop())
	})
}

// What flows to others is in nobody's way for ever.
func TestSetUpThatHangsIsGivenUpThoughOthersAreBusy(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		p := grouped(r, 1, steadymq.WithSetupTimeout(3*time.Second))
		bad := p.add(rig.Ack, steadymq.WithTopology(func(ctx context.Context, _ *amqp.Channel) (string, error) {
			<-ctx.Done()
			return "", context.Cause(ctx)
		}))
		p.start()
		for range 900 { // twice ten times the limit, and the waits between
			r.Broker.Publish(p.name(0), "x")
			r.Wait(100 * time.Millisecond)
		}
		assert.EqualValues(t, 900, p.consumers[0].Stats().Acked)
		assert.EqualValues(t, 1, p.consumers[0].Stats().Sessions)
		assert.Equal(t, 1, p.group.Stats().Isolated, "its set-ups have outlasted their limit again and again")
		assert.NotEqual(t, steadymq.Consuming, bad.State())
		require.NoError(t, p.stop())
	})
}

func TestRefusedLoginOfAGroupIsNoBackoff(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Broker.RefuseLogin(true)
		p := grouped(r, 5).start()
		require.Error(t, <-p.result)
		require.NotContains(t, r.Log.String(), "backoff", "nothing is tried again")
		require.EqualValues(t, 1, p.group.Stats().Dials, "and nobody dials once more")
	})
}

func TestWantOfChannelsIsToldOnceAndIsNoFailure(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		g, err := steadymq.NewGroup(r.Broker.URLs()[0]+"?channel_max=2", steadymq.WithDialer(r.Broker.Dialer()),
			steadymq.WithLogger(slog.New(slog.NewTextHandler(r.Log, nil))))
		require.NoError(t, err)
		p := &party{Rig: r, group: g}
		for range 7 {
			p.add(rig.Ack)
		}
		p.start()
		require.Equal(t, 7, p.consuming())
		require.Equal(t, 4, r.OpenConnections())
		assert.Equal(t, 1, strings.Count(r.Log.String(), "no channel left"))
		assert.NotContains(t, r.Log.String(), "backoff")
		require.NoError(t, p.stop())
	})
}

// One of them dials, and all of them say why they wait.
func TestAllConsumersOfAGroupAreToldWhyADialHasFailed(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var mu sync.Mutex
		causes := make(map[string][]error)
		p := grouped(r, 3, steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			mu.Lock()
			defer mu.Unlock()
			if c.To == steadymq.Backoff {
				causes[c.Queue] = append(causes[c.Queue], c.Cause)
			}
		}}))
		r.Broker.Refuse(true)
		p.start()
		r.Wait(10 * time.Second)
		r.Broker.Refuse(false)
		r.Wait(10 * time.Second)
		require.NoError(r, p.stop())
		for i := range 3 {
			told := causes[p.name(i)]
			require.NotEmpty(r, told, p.name(i))
			assert.ErrorIs(r, told[0], syscall.ECONNREFUSED, p.name(i))
			assert.Len(r, told, len(causes[p.name(0)]), "whoever has dialled")
		}
	})
}
