// Unpark moves parked messages back to the queue that they came from, by the cause for which they
// were parked. First look what there is, then move what is mended:
//
//	export AMQP_URL=amqp://guest:guest@localhost:5672/
//	go run github.com/steadymq/steadymq/examples/unpark -park orders.parked -dry-run
//	go run github.com/steadymq/steadymq/examples/unpark -park orders.parked -error "connection refused" -limit 100
//
// A message is acked in the park queue only after the broker has confirmed it in the other one, so
// none is lost, whatever happens; if the connection is lost in between, one may be in both. What does
// not match stays where it is. The handler sees exchange and routing key as they were at first, and
// attempts count anew.
//
// Messages that stay have been taken and given back, which up to RabbitMQ 4.2 counts towards the
// delivery limit of a quorum queue. A park queue that WithRetry has declared has none from 4.0 on; for
// others a warning is printed while there is still time.
//
// It needs read permission on the park queue and write permission on amq.default, which is how
// permissions call the default exchange. The exit status is 0 if all that matches was moved, or -dry-run
// was given, 1 if not, 2 if the flags are wrong.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends it at once, which loses nothing, either
	os.Exit(run(ctx, os.Args[1:], os.Getenv("AMQP_URL"), os.Stdout, os.Stderr, amqp.Config{}))
}

// run is the program; how is how it connects.
func run(ctx context.Context, args []string, url string, out, complaints io.Writer, how amqp.Config) int {
	w, err := wanted(args, &url, complaints)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(complaints, "unpark:", err)
		return 2
	}
	conn, err := connect(url, how)
	if err != nil {
		fmt.Fprintln(complaints, "unpark:", err)
		return 1
	}
	found, err := unpark(ctx, conn, w)
	if err == nil || found.looked > 0 {
		found.print(out, w)
	}
	if err != nil {
		fmt.Fprintln(complaints, "unpark:", err)
	}
	if err != nil || found.failed() > 0 {
		return 1
	}
	return 0
}

// wanted reads the flags. A URL among them takes the place of the one given.
func wanted(args []string, url *string, complaints io.Writer) (wish, error) {
	var w wish
	flags := flag.NewFlagSet("unpark", flag.ContinueOnError)
	flags.SetOutput(complaints)
	given := flags.String("url", "", "the broker; better in AMQP_URL, since others see the arguments of programs")
	flags.StringVar(&w.park, "park", "", "the queue of parked messages")
	flags.StringVar(&w.queue, "queue", "", "only what came from this queue; default: each message goes back to its own")
	flags.StringVar(&w.text, "error", "", "only errors that contain this")
	flags.StringVar(&w.kind, "error-type", "", "only errors of this Go type, the innermost one, such as syscall.Errno")
	flags.IntVar(&w.limit, "limit", 0, "move so many at most; 0: no limit")
	flags.DurationVar(&w.older, "older", 0, "only what failed longer ago than this, such as 1h30m")
	flags.BoolVar(&w.dryRun, "dry-run", false, "only list what there is")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return w, err
	} else if err != nil {
		return w, errors.New("see -help") // the flags have said what is wrong
	}
	if *given != "" {
		*url = *given
	}
	switch {
	case flags.NArg() > 0:
		return w, fmt.Errorf("%q is no flag; see -help", flags.Arg(0))
	case *url == "":
		return w, errors.New("set AMQP_URL, or give -url, such as amqp://user:password@host:5672/vhost")
	case w.park == "":
		return w, errors.New("give the queue of parked messages by -park")
	case w.queue == w.park:
		return w, errors.New("-queue and -park are the same queue")
	case w.limit < 0, w.older < 0:
		return w, errors.New("-limit and -older must not be negative")
	}
	return w, nil
}

// connect never tells the URL, because there is a password in it.
func connect(url string, how amqp.Config) (*amqp.Connection, error) {
	if _, err := amqp.ParseURI(url); err != nil {
		return nil, errors.New("the URL cannot be read; it is like amqp://user:password@host:5672/vhost, with what is special in user, password and vhost percent-encoded")
	}
	how.Heartbeat, how.Locale = 10*time.Second, "en_US"
	how.Properties = amqp.NewConnectionProperties()
	how.Properties.SetClientConnectionName("unpark")
	conn, err := amqp.DialConfig(url, how)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	return conn, nil
}
