package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

// What it costs that one message in a hundred fails once and comes back after a
// delay. The replay server takes no messages, so the server is the kit's broker,
// over TCP in a process of its own, and its CPU is part of what is measured.

const (
	retryQueue = "orders"
	failEvery  = 100
	retryDelay = 100 * time.Millisecond
	// retryMessages are enough for a run that is long against the delay: most of what fails comes
	// back within what is measured.
	retryMessages = 400_000
)

// The variants of the benchmark of retries. All consume the same messages.
var retryVariants = []variant{
	{name: "healthy", label: "steadymq, WithRetry, none fails", run: retrying(false)},
	{name: "failing", label: "steadymq, WithRetry, 1 % fails once", run: retrying(true)},
	{name: "without", label: "steadymq, without WithRetry, none fails", run: steady},
}

var errFirstTry = errors.New("fails the first time")

func retrying(fails bool) consumeFunc {
	return func(ctx context.Context, t target, each func([]byte)) error {
		c, err := steadymq.New(t.URL, t.Queue, steadyOptions(t, steadymq.WithRetry(steadymq.Retry{
			Attempts: 3, Delays: []time.Duration{retryDelay}, Park: retryQueue + ".parked",
		}))...)
		if err != nil {
			return err
		}
		return c.Run(ctx, func(_ context.Context, d *steadymq.Delivery) error {
			if fails && d.Body[0] == 1 && d.Attempt() == 1 {
				return errFirstTry
			}
			each(d.Body)
			return nil
		})
	}
}

func benchRetries(ctx context.Context, o options) ([]comparison, error) {
	if !o.retries || o.amqp != "" {
		return nil, nil
	}
	r := &runner{opts: o, variants: retryVariants, place: placeOnKit}
	c, err := r.compare(ctx, workload{Prefetch: 256, Body: 100, Workers: 16})
	return []comparison{c}, err
}

// kitConfig tells a server process what to hold ready.
type kitConfig struct{ Messages, Body int }

// placeOnKit starts the kit's broker for one run, full of messages.
func placeOnKit(ctx context.Context, w workload, c *clientConfig) (func() error, error) {
	arg, err := json.Marshal(kitConfig{Messages: retryMessages, Body: w.Body})
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "kit", string(arg))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c.Queue, c.Messages = retryQueue, retryMessages
	if err := json.NewDecoder(out).Decode(&c.URL); err != nil {
		return nil, errors.Join(fmt.Errorf("the kit's broker: %w", err), in.Close(), cmd.Wait())
	}
	return func() error { return errors.Join(in.Close(), cmd.Wait()) }, nil
}

// kitMain serves until its standard input ends.
func kitMain(arg string) error {
	var c kitConfig
	if err := json.Unmarshal([]byte(arg), &c); err != nil {
		return err
	}
	b := steadymqtest.NewBroker(nil, steadymqtest.WithoutLedger())
	defer b.Close()
	b.DeclareQueue(retryQueue, steadymqtest.QueueOptions{})
	for n := range c.Messages {
		b.PublishMessage(retryQueue, steadymqtest.Message{Body: c.body(n)})
	}
	if err := json.NewEncoder(os.Stdout).Encode(b.Listen()); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// body is that of the message of a number: the first byte says which fail once.
func (c kitConfig) body(n int) []byte {
	body := make([]byte, c.Body)
	if n%failEvery == 0 {
		body[0] = 1
	}
	return body
}
