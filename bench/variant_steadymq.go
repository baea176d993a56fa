package main

import (
	"context"
	"log/slog"

	"github.com/steadymq/steadymq"
)

// steady is the library with its defaults; only what the workload varies is
// set, and the log goes nowhere.
func steady(ctx context.Context, t target, each func([]byte)) error {
	return steadyWith(ctx, t, each)
}

func steadyWith(ctx context.Context, t target, each func([]byte), opts ...steadymq.Option) error {
	c, err := steadymq.New(t.URL, t.Queue, steadyOptions(t, opts...)...)
	if err != nil {
		return err
	}
	return c.Run(ctx, func(_ context.Context, d *steadymq.Delivery) error {
		each(d.Body)
		return nil
	})
}

func steadyOptions(t target, opts ...steadymq.Option) []steadymq.Option {
	opts = append(opts,
		steadymq.WithConcurrency(t.Workers),
		steadymq.WithPrefetch(t.Prefetch),
		steadymq.WithLogger(slog.New(slog.DiscardHandler)),
	)
	if t.TLS != nil {
		opts = append(opts, steadymq.WithTLSConfig(t.TLS))
	}
	return opts
}
