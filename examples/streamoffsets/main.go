// Streamoffsets consumes a stream and goes on where it was when it is started again. Stop it by
// Ctrl-C, or kill it, and start it again:
//
//	AMQP_URL=amqp://guest:guest@localhost:5672/ go run ./examples/streamoffsets
//
// Its place is in a file of the working directory, or of that which -dir names. After a Ctrl-C the
// next number follows; after a kill some numbers come once more, those of the last second. SQLStore in
// this folder keeps the place in a database in its stead, and lets the work and the place agree to the
// message. Copy what you need.
//
// Without AMQP_URL it brings its own broker, in this process: then each start has a new stream, which
// is noticed after a few seconds and read from its beginning.
package main

import (
	"context"
	"flag"
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

const stream = "steadymq-streamoffsets"

func main() {
	dir := flag.String("dir", ".", "where the place is kept")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	url := os.Getenv("AMQP_URL")
	if url == "" {
		broker := steadymqtest.NewBroker(nil)
		defer broker.Close()
		url = broker.Listen()
	}
	go publish(ctx, url)
	err := steadymq.Consume(ctx, url, stream, func(_ context.Context, d *steadymq.Delivery) error {
		fmt.Printf("%s at offset %v\n", d.Body, d.Headers["x-stream-offset"])
		return nil
	},
		steadymq.WithQueue(steadymq.Queue{Type: "stream"}),
		steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}), // the first time ever
		steadymq.WithStreamOffsets(FileStore{Dir: *dir}))
	if err != nil {
		log.Print(err)
	}
}

// publish appends the time to the stream, ten times a second, on a connection of its own.
func publish(ctx context.Context, url string) {
	for ctx.Err() == nil {
		if err := publishOn(ctx, url); err != nil {
			log.Print("publish: ", err)
		}
		time.Sleep(time.Second)
	}
}

func publishOn(ctx context.Context, url string) error {
	conn, err := amqp.Dial(url)
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	for tick := time.Tick(100 * time.Millisecond); ; {
		select {
		case now := <-tick:
			err := ch.PublishWithContext(ctx, "", stream, false, false, amqp.Publishing{
				MessageId: fmt.Sprint(now.UnixNano()), Body: []byte(now.Format(time.TimeOnly + ".000")),
			})
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
}
