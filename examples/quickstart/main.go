// Quickstart consumes a queue and keeps consuming it. Without AMQP_URL it brings
// its own broker, in this process; with AMQP_URL it uses that one:
//
//	go run ./examples/quickstart
//	AMQP_URL=amqp://guest:guest@localhost:5672/ go run ./examples/quickstart
//
// Restart the broker, kill the connection, delete the queue: it heals, and says so.
// Ctrl-C, or SIGTERM as an orchestrator sends it, stops it in order. That takes at
// most the drain limit, the close limit and a second more: 20 s + 5 s + 1 s, so
// Kubernetes' terminationGracePeriodSeconds of 30 is enough. Raise it with the limits.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

const queue = "steadymq-quickstart"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	url := os.Getenv("AMQP_URL")
	if url == "" {
		broker := steadymqtest.NewBroker(nil)
		defer broker.Close()
		url = broker.Listen()
		fmt.Println("no AMQP_URL: using a broker of this process at", url)
	}
	go publish(ctx, url)

	// All a service needs: a nil error acks, any other puts the message back.
	err := steadymq.Consume(ctx, url, queue, func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s (session %d, attempt %d)\n", d.Body, d.Session(), d.Attempt())
		return nil
	}, steadymq.WithQueue(steadymq.Queue{}))
	if err != nil {
		log.Print(err)
	}
}

// publish sends a message a second. It is as simple as a publisher can be: when
// anything fails it starts again.
func publish(ctx context.Context, url string) {
	for n := 1; ctx.Err() == nil; {
		conn, err := amqp.Dial(url)
		if err == nil {
			n = publishOn(ctx, conn, n)
			_ = conn.Close()
		}
		pause(ctx, time.Second)
	}
}

// publishOn returns the number of the next message once the connection fails.
func publishOn(ctx context.Context, conn *amqp.Connection, n int) int {
	channel, err := conn.Channel()
	if err != nil {
		return n
	}
	for ctx.Err() == nil {
		body := fmt.Appendf(nil, "message %d", n)
		err := channel.PublishWithContext(ctx, "", queue, false, false, amqp.Publishing{Body: body, DeliveryMode: amqp.Persistent})
		if err != nil {
			return n
		}
		n++
		pause(ctx, time.Second)
	}
	return n
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
