package steadymq_test

import (
	"context"
	"fmt"

	"github.com/steadymq/steadymq"
)

// Two queues on one connection, and a third that comes and goes while the group runs.
func ExampleGroup() {
	broker := exampleBroker("tea")
	defer broker.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	handled := make(chan string)
	handle := func(_ context.Context, d *steadymq.Delivery) error {
		handled <- fmt.Sprintf("%s: %s", d.Queue(), d.Body)
		return nil
	}

	// What all share.
	g, err := steadymq.NewGroup(broker.URL, steadymq.WithDialer(broker.Dialer()), steadymq.WithConcurrency(4))
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = g.Handle("orders", handle)
	fmt.Println("orders:", err)
	_, err = g.Handle("refunds", handle, steadymq.WithQueue(steadymq.Queue{}), steadymq.WithPrefetch(8))
	fmt.Println("refunds:", err)
	done := make(chan error)
	go func() { done <- g.Run(ctx) }()
	fmt.Println(<-handled)

	returns, err := g.Handle("returns", handle, steadymq.WithQueue(steadymq.Queue{}))
	fmt.Println("returns:", err)
	if err := broker.WaitConsumers(ctx, "returns", 1); err != nil {
		fmt.Println(err)
	}
	broker.Publish("returns", "kettle")
	fmt.Println(<-handled)
	fmt.Println("consumers:", len(g.Consumers()), "connections:", g.Stats().Open)

	fmt.Println("returns stopped:", returns.Stop(ctx))
	fmt.Println("consumers:", len(g.Consumers()))
	stop() // as at SIGTERM, see Consumer.Run
	fmt.Println("stopped:", <-done)
	// Output:
	// orders: <nil>
	// refunds: <nil>
	// orders: tea
	// returns: <nil>
	// returns: kettle
	// consumers: 3 connections: 1
	// returns stopped: <nil>
	// consumers: 2
	// stopped: <nil>
}

// All problems of one queue are told at once, with its name.
func ExampleGroup_Handle_refused() {
	g, err := steadymq.NewGroup("amqp://app:secret@mq1/", steadymq.WithConcurrency(16))
	fmt.Println(err)
	_, err = g.Handle("orders", nil,
		steadymq.WithPrefetch(8),
		steadymq.WithConnectionName("shop"))
	fmt.Println(err)
	// Output:
	// <nil>
	// queue orders: steadymq: WithConnectionName: belongs to the connection, which all consumers of a Group share: give it to NewGroup
	// queue orders: steadymq: WithPrefetch: must be at least the concurrency (16), got 8: workers would wait for nothing
	// queue orders: steadymq: Handle: the handler must not be nil
}
