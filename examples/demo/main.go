// Demo shows a consumer healing: a publisher, a consumer with slow handlers, and
// faults one after the other, with what happened in plain words and numbers.
//
//	go run ./examples/demo
//	AMQP_URL=amqp://guest:guest@localhost:5672/ go run ./examples/demo
//
// Without AMQP_URL the broker is one of this process and really is restarted;
// with AMQP_URL the network in front of that broker is cut instead. Ctrl-C and SIGTERM
// stop it in order.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

const (
	queue   = "steadymq-demo"
	workers = 4
	rate    = 2 * time.Millisecond // a message every ...
	outage  = 3 * time.Second
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run() error {
	d := &demo{url: os.Getenv("AMQP_URL"), done: make(map[string]int)}
	if d.url == "" {
		d.broker = steadymqtest.NewBroker(nil)
		defer d.broker.Close()
		d.url = d.broker.Listen()
		fmt.Println("Broker: one inside this process. Set AMQP_URL to use yours.")
	} else {
		fmt.Println("Broker: the one of AMQP_URL.")
	}
	consumer, err := d.consumer()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	stopped := make(chan error, 1)
	go func() { stopped <- consumer.Run(ctx, d.handle) }()

	publisher, err := d.publisher()
	if err != nil {
		return err
	}
	fmt.Printf("Publishing %d messages a second, %d handlers at work.\n\n", time.Second/rate, workers)
	go publisher.run()
	pause(ctx, 2*time.Second)
	for _, f := range d.faults() {
		if ctx.Err() == nil {
			d.show(ctx, f, consumer)
		}
	}
	published := publisher.stop()
	d.await(ctx, published)
	interrupted := ctx.Err() != nil
	fmt.Println("\nStop: no new messages, running handlers finish, their acks are confirmed.")
	stop()
	if err := <-stopped; err != nil {
		return err
	}
	if interrupted {
		return nil // what is not handled yet is in the queue
	}
	return d.sum(published, consumer.Stats())
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// demo counts what the handlers did and knows how to break things.
type demo struct {
	url    string
	broker *steadymqtest.Broker // nil with AMQP_URL
	wire   wire

	mu       sync.Mutex
	done     map[string]int // message -> how often a handler finished it
	channel  *amqp.Channel  // of the current session, for the first fault
	lostAt   time.Time
	healedIn time.Duration
	healed   chan struct{}
	cause    error
}

func (d *demo) consumer() (*steadymq.Consumer, error) {
	return steadymq.New(d.url, queue,
		steadymq.WithConcurrency(workers),
		steadymq.WithPrefetch(16),
		steadymq.WithDialer(d.wire.DialContext),
		steadymq.WithTopology(d.topology),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: d.changed}),
		steadymq.WithLogger(slog.New(slog.DiscardHandler)))
}

// topology declares the queue, as usual, and keeps the channel so that the demo
// can misuse it: nothing else would make a real broker close it on command.
func (d *demo) topology(_ context.Context, ch *amqp.Channel) (string, error) {
	d.mu.Lock()
	d.channel = ch
	d.mu.Unlock()
	q, err := ch.QueueDeclare(queue, true, false, false, false, amqp.Table{"x-queue-type": "classic"})
	return q.Name, err
}

func (d *demo) handle(_ context.Context, m *steadymq.Delivery) error {
	time.Sleep(time.Millisecond)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done[m.MessageId]++
	return nil
}

// changed times how long the consumer was away.
func (d *demo) changed(c steadymq.StateChange) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case c.From == steadymq.Consuming && c.To == steadymq.Backoff:
		d.lostAt, d.cause = c.Time, c.Cause
	case c.To == steadymq.Consuming && d.healed != nil && !d.lostAt.IsZero():
		d.healedIn = c.Time.Sub(d.lostAt)
		close(d.healed)
		d.healed = nil
	}
}

type fault struct {
	name string
	do   func()
}

func (d *demo) faults() []fault {
	return []fault{
		{"The channel is killed: an ack of an unknown tag, the broker answers 406 and closes only the channel.", func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			_ = d.channel.Ack(1<<40, false)
		}},
		{"The connection is killed: a reset by the network.", d.wire.reset},
		{fmt.Sprintf("The broker is restarted: gone for %v.", outage), d.restart},
	}
}

func (d *demo) restart() {
	if d.broker != nil {
		d.broker.Kill()
		time.AfterFunc(outage, d.broker.Restart)
	}
	d.wire.cut() // as the system does for a port that nobody listens on: dials are refused
	time.AfterFunc(outage, d.wire.mend)
}

// show strikes once and tells what came of it.
func (d *demo) show(ctx context.Context, f fault, c *steadymq.Consumer) {
	before := c.Stats()
	healed := make(chan struct{})
	d.mu.Lock()
	d.healed, d.lostAt = healed, time.Time{}
	d.mu.Unlock()
	fmt.Println(f.name)
	f.do()
	select {
	case <-healed:
	case <-ctx.Done():
		return
	case <-time.After(time.Minute):
		fmt.Println("  not healed within a minute")
		return
	}
	pause(ctx, time.Second)
	after := c.Stats()
	d.mu.Lock()
	defer d.mu.Unlock()
	fmt.Printf("  noticed as: %v\n", d.cause)
	fmt.Printf("  consuming again after %v; new sessions: %d, new connections: %d, acks too late and held back: %d\n",
		d.healedIn.Round(time.Millisecond), after.Sessions-before.Sessions, after.Connections-before.Connections, after.Stale-before.Stale)
}

// await waits until every published message was handled.
func (d *demo) await(ctx context.Context, published int) {
	for deadline := time.Now().Add(30 * time.Second); ctx.Err() == nil && time.Now().Before(deadline); pause(ctx, 10*time.Millisecond) {
		d.mu.Lock()
		n := len(d.done)
		d.mu.Unlock()
		if n >= published {
			return
		}
	}
}

func (d *demo) sum(published int, s steadymq.Stats) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	again := 0
	for _, n := range d.done {
		again += n - 1
	}
	fmt.Printf("\nPublished and confirmed: %d. Handled: %d. Lost: %d. Handled twice: %d (at most the prefetch per lost session).\n",
		published, len(d.done), published-len(d.done), again)
	fmt.Printf("Sessions: %d. Connections: %d. Acks sent: %d, each on its own. Acks held back because their session was over: %d.\n",
		s.Sessions, s.Connections, s.Acked, s.Stale)
	if lost := published - len(d.done); lost > 0 {
		return fmt.Errorf("%d messages lost", lost)
	}
	return nil
}
