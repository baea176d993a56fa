package main

import (
	"context"
	"log/slog"
	"sync"

	"github.com/steadymq/steadymq"
)

// steadyGroup is a Group with its defaults, see steady.
func steadyGroup(ctx context.Context, t target, each func([]byte)) error {
	opts := []steadymq.Option{
		steadymq.WithConcurrency(t.Workers), steadymq.WithPrefetch(t.Prefetch), steadymq.WithLogger(slog.New(slog.DiscardHandler)),
	}
	if t.TLS != nil {
		opts = append(opts, steadymq.WithTLSConfig(t.TLS))
	}
	g, err := steadymq.NewGroup(t.URL, opts...)
	if err != nil {
		return err
	}
	for range t.Consumers {
		if _, err := g.Handle(t.Queue, eachOf(each)); err != nil {
			return err
		}
	}
	return g.Run(ctx)
}

func eachOf(each func([]byte)) steadymq.Handler {
	return func(_ context.Context, d *steadymq.Delivery) error {
		each(d.Body)
		return nil
	}
}

// steadyCrowd is consumers of one Group, or with a connection each.
type steadyCrowd struct {
	url      string
	each     func([]byte)
	group    *steadymq.Group // nil: each has its own connection
	consumed arrivals
	running  sync.WaitGroup
	ctx      context.Context
	stop     context.CancelFunc
}

func openGroupCrowd(url string, each func([]byte)) (crowd, error) {
	return newSteadyCrowd(url, each, 1)
}

func openHerd(url string, connections int) (*steadyCrowd, error) {
	return newSteadyCrowd(url, func([]byte) {}, connections)
}

func newSteadyCrowd(url string, each func([]byte), connections int) (*steadyCrowd, error) {
	s := &steadyCrowd{url: url, each: each}
	s.ctx, s.stop = context.WithCancel(context.Background())
	if connections == 0 {
		return s, nil
	}
	var err error
	if s.group, err = steadymq.NewGroup(url, append(s.options(), steadymq.WithConnections(connections))...); err != nil {
		return nil, err
	}
	s.running.Go(func() { _ = s.group.Run(s.ctx) })
	return s, nil
}

func (s *steadyCrowd) options() []steadymq.Option {
	return []steadymq.Option{
		steadymq.WithPrefetch(groupPrefetch), steadymq.WithLogger(slog.New(slog.DiscardHandler)),
		steadymq.WithConcurrency(1),
		steadymq.WithHooks(steadymq.Hooks{StateChanged: func(c steadymq.StateChange) {
			if c.To == steadymq.Consuming {
				s.consumed.one()
			}
		}}),
	}
}

func (s *steadyCrowd) arrivals() *arrivals { return &s.consumed }

func (s *steadyCrowd) add(ctx context.Context, queue string, n int) error {
	all := s.consumed.more(n)
	for range n {
		if err := s.one(queue); err != nil {
			return err
		}
	}
	_, err := all.wait(ctx)
	return err
}

func (s *steadyCrowd) one(queue string) error {
	if s.group != nil {
		_, err := s.group.Handle(queue, eachOf(s.each))
		return err
	}
	c, err := steadymq.New(s.url, queue, s.options()...)
	if err != nil {
		return err
	}
	s.running.Go(func() { _ = c.Run(s.ctx, eachOf(s.each)) })
	return nil
}

func (s *steadyCrowd) close() {
	s.stop()
	s.running.Wait()
}
