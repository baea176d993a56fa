package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/bench/internal/replay"
)

// What it costs or saves that handlers take a hundred messages at once.

const (
	batchSize = 100
	batchWait = 100 * time.Millisecond
)

// The variants of the benchmark of batches. All have the same prefetch.
var batchVariants = []variant{
	{name: "single", label: "steadymq, Run", run: steady, settles: true},
	{name: "batch", label: "steadymq, RunBatch", run: steadyBatch, settles: true},
	{name: "batcher", label: "amqp091-go, batches by hand", run: driverBatch, settles: true},
}

func steadyBatch(ctx context.Context, t target, each func([]byte)) error {
	return steadyBatchWith(ctx, t, each)
}

func steadyBatchWith(ctx context.Context, t target, each func([]byte), opts ...steadymq.Option) error {
	opts = append(opts, steadymq.WithBatch(min(batchSize, t.Prefetch/t.Workers), batchWait))
	c, err := steadymq.New(t.URL, t.Queue, steadyOptions(t, opts...)...)
	if err != nil {
		return err
	}
	return c.RunBatch(ctx, func(_ context.Context, batch []*steadymq.Delivery) error {
		for _, d := range batch {
			each(d.Body)
		}
		return nil
	})
}

// driverBatch is the batcher that one writes on the driver's channel of deliveries, with a timer that
// the first message starts, and an ack for each message.
func driverBatch(ctx context.Context, t target, each func([]byte)) error {
	conn, err := amqp.DialConfig(t.URL, amqp.Config{TLSClientConfig: t.TLS, Locale: "en_US"})
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	deliveries, err := subscribe(conn, t, false)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for range t.Workers {
		wg.Go(func() {
			for batch := range batchesOf(deliveries) {
				for _, d := range batch {
					each(d.Body)
				}
				for _, d := range batch {
					_ = d.Ack(false)
				}
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return errors.New("the driver's deliveries ended")
}

// batchesOf collects deliveries until there are no more.
func batchesOf(deliveries <-chan amqp.Delivery) func(yield func([]amqp.Delivery) bool) {
	return func(yield func([]amqp.Delivery) bool) {
		timer := time.NewTimer(batchWait)
		defer timer.Stop()
		for d := range deliveries {
			batch := append(make([]amqp.Delivery, 0, batchSize), d)
			timer.Reset(batchWait)
		collect:
			for len(batch) < batchSize {
				select {
				case d, ok := <-deliveries:
					if !ok {
						break collect
					}
					batch = append(batch, d)
				case <-timer.C:
					break collect
				}
			}
			if !yield(batch) {
				return
			}
		}
	}
}

func benchBatches(ctx context.Context, o options, server *replay.Process) (cs []comparison, err error) {
	if !o.batches || o.amqp != "" {
		return nil, nil
	}
	r := replayRunner(o, batchVariants, server)
	for _, w := range []workload{{Prefetch: 200, Body: 100, Workers: 1}, {Prefetch: 1000, Body: 100, Workers: 1}, {Prefetch: 3200, Body: 100, Workers: 16}} {
		c, err := r.compare(ctx, w)
		if err != nil {
			return nil, err
		}
		cs = append(cs, c)
	}
	return cs, nil
}

func (r report) batchesMarkdown(w io.Writer) {
	fmt.Fprintf(w, "\n## Batches\n\nA handler takes up to %d messages at once. Against the replay server of the throughput, in medians of %d alternating rounds "+
		"of %v; a ratio compares neighbours in one round with the first line. All of them send one acknowledgement per message.\n",
		batchSize, r.opts.rounds, r.opts.window)
	for _, c := range r.batches {
		fmt.Fprintf(w, "\n### %s\n\n", c.workload)
		table(w, throughputHead, func(yield func([]string)) {
			for _, o := range c.outcomes {
				yield(o.cells())
			}
		})
	}
}
