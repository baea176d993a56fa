package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/steadymq/steadymq/bench/internal/replay"
)

// idleConsumers are enough for what a process has only once to vanish in the average.
const idleConsumers = 200

const (
	burst = 500 * time.Millisecond
	// settleDown is how long consumers are left alone after a burst: at least two heartbeats of the
	// server pass, at which buffers may shrink.
	settleDown = 12 * time.Second
)

// lull is what consumers that are idle have done before.
type lull struct {
	Name              string
	Prefetch, Workers int
	Burst             bool // deliveries came, and come no more; else none ever came
}

var lulls = []lull{
	{Name: "no delivery yet, prefetch 32, 1 worker", Prefetch: 32, Workers: 1},
	{Name: "no delivery yet, prefetch 1000, 16 workers", Prefetch: 1000, Workers: 16},
	{Name: "after a burst, prefetch 1000, 1 worker", Prefetch: 1000, Workers: 1, Burst: true},
}

// idleConfig tells a client process which consumers to keep, each with a connection of its own.
type idleConfig struct {
	Variant   string
	Lull      lull
	Control   string
	Consumers int
}

// footprint is what a client process takes: of its heap what is in use after a collection, and the
// stacks of its goroutines. The server has a process of its own, and what the kernel keeps for a
// socket does not count.
type footprint struct {
	Heap, Stacks, Goroutines float64
}

func takeFootprint() footprint {
	var m runtime.MemStats
	for range 3 { // the first may only end what an earlier one began, and each halves the stacks
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return footprint{Heap: float64(m.HeapAlloc), Stacks: float64(m.StackInuse), Goroutines: float64(runtime.NumGoroutine())}
}

// each returns the share of one of n consumers in what f is more than before.
func (f footprint) each(before footprint, n int) footprint {
	by := float64(n)
	return footprint{
		Heap:       (f.Heap - before.Heap) / by,
		Stacks:     (f.Stacks - before.Stacks) / by,
		Goroutines: (f.Goroutines - before.Goroutines) / by,
	}
}

// idling is the footprint of each consumer of one variant.
type idling struct {
	variant variant
	lull    lull
	footprint
}

func idle(ctx context.Context, o options, server *replay.Process) ([]idling, error) {
	var all []idling
	for _, l := range lulls {
		for _, v := range o.idle {
			i := idling{variant: v, lull: l}
			c := idleConfig{Variant: v.name, Lull: l, Control: server.Control, Consumers: idleConsumers}
			if err := reexec(ctx, "idle", c, &i.footprint); err != nil {
				return nil, fmt.Errorf("idle, %s, %s: %w", l.Name, v.name, err)
			}
			logf("idle, %s %-9s %.1f KiB %.2f goroutines", l.Name, v.name, (i.Heap+i.Stacks)/1024, i.Goroutines)
			all = append(all, i)
		}
	}
	return all, nil
}

func idleMain(arg string) error {
	var c idleConfig
	if err := json.Unmarshal([]byte(arg), &c); err != nil {
		return err
	}
	v, ok := findVariant(throughputVariants, c.Variant)
	if !ok {
		return fmt.Errorf("no variant %q", c.Variant)
	}
	f, err := c.measure(v)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(f)
}

func (c *idleConfig) measure(v variant) (f footprint, err error) {
	control, err := replay.Dial(c.Control)
	if err != nil {
		return f, err
	}
	defer control.Close()
	addr, err := control.Open(false)
	if err != nil {
		return f, err
	}
	defer func() { _ = control.CloseServer(addr) }()
	if !c.Lull.Burst {
		if err := control.Stop(addr); err != nil {
			return f, err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	ended := make(chan error, c.Consumers)
	before := takeFootprint()
	for range c.Consumers {
		go func() {
			t := target{URL: "amqp://guest:guest@" + addr, Queue: "size=100", Prefetch: c.Lull.Prefetch, Workers: c.Lull.Workers}
			ended <- v.run(ctx, t, func([]byte) {})
		}()
	}
	if err := c.lull(ctx, control, addr, v, ended); err != nil {
		return f, err
	}
	return takeFootprint().each(before, c.Consumers), nil
}

// lull returns once all consumers have subscribed and are idle.
func (c *idleConfig) lull(ctx context.Context, control *replay.Control, addr string, v variant, ended <-chan error) error {
	for subscribed := 0; subscribed < c.Consumers; {
		if err := pause(ctx, 20*time.Millisecond, ended); err != nil {
			return err
		}
		s, err := control.Stats(addr)
		if err != nil {
			return err
		}
		subscribed = int(s.Subscriptions)
	}
	if !c.Lull.Burst {
		return pause(ctx, time.Second, ended) // until the goroutines of the set-up have ended
	}
	if err := pause(ctx, burst, ended); err != nil {
		return err
	}
	if err := drain(ctx, control, addr, v.settles, ended); err != nil {
		return err
	}
	return pause(ctx, settleDown, ended)
}
