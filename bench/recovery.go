package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/steadymq/steadymq/bench/internal/replay"
)

// patience is how long a consumer gets to consume again.
const patience = 30 * time.Second

// outage is how long the server of a restart does not listen.
const outage = 3 * time.Second

// recoverConfig tells a client process which samples to take: all of one
// variant and one fault, each with a server and a consumer of its own.
type recoverConfig struct {
	Variant, Fault string
	Control        string
	Samples        int
	Patience       time.Duration
}

// recovered is what it reports: times to the first new delivery, and how
// many consumers never saw one.
type recovered struct {
	Times []time.Duration
	Never int
}

// healing is the result for one variant and fault.
type healing struct {
	variant variant
	fault   string
	times   []time.Duration // sorted
	never   int
}

func (h healing) quantile(q float64) time.Duration {
	return h.times[int(q*float64(len(h.times)-1)+0.5)]
}

func recovery(ctx context.Context, o options, server *replay.Process) ([]healing, error) {
	var hs []healing
	for _, fault := range o.faults {
		for _, v := range o.recovery {
			var r recovered
			c := recoverConfig{Variant: v.name, Fault: fault, Control: server.Control, Samples: o.samples, Patience: patience}
			if err := reexec(ctx, "recover", c, &r); err != nil {
				return nil, fmt.Errorf("recovery from %s, %s: %w", fault, v.name, err)
			}
			slices.Sort(r.Times)
			h := healing{variant: v, fault: fault, times: r.Times, never: r.Never}
			logf("recovery from %-12s %-9s %s", fault, v.name, h)
			hs = append(hs, h)
		}
	}
	return hs, nil
}

func (h healing) String() string {
	switch {
	case len(h.times) == 0:
		return "never"
	case h.never > 0:
		return fmt.Sprintf("p50 %v max %v, %d never", h.quantile(0.5), h.quantile(1), h.never)
	default:
		return fmt.Sprintf("p50 %v p99 %v max %v", h.quantile(0.5), h.quantile(0.99), h.quantile(1))
	}
}

func recoverMain(arg string) error {
	var c recoverConfig
	if err := json.Unmarshal([]byte(arg), &c); err != nil {
		return err
	}
	v, ok := findVariant(recoveryVariants, c.Variant)
	if !ok {
		return fmt.Errorf("no variant %q", c.Variant)
	}
	r, err := c.sampleAll(v)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// stagger keeps the samples of quick consumers from meeting each other.
const stagger = 50 * time.Millisecond

func (c *recoverConfig) sampleAll(v variant) (r recovered, err error) {
	var (
		wg sync.WaitGroup
		mu sync.Mutex
	)
	for n := range c.Samples {
		wg.Go(func() {
			time.Sleep(time.Duration(n) * stagger)
			took, sampleErr := c.sample(v)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case sampleErr == nil:
				r.Times = append(r.Times, took)
			case errors.Is(sampleErr, errNever):
				r.Never++
			default:
				err = errors.Join(err, sampleErr)
			}
		})
	}
	wg.Wait()
	return r, err
}

var errNever = errors.New("no new delivery")

// sample starts a consumer, plays one fault once it is well under way, and
// waits for the first delivery of a later subscription.
func (c *recoverConfig) sample(v variant) (took time.Duration, err error) {
	control, err := replay.Dial(c.Control)
	if err != nil {
		return 0, err
	}
	defer control.Close()
	addr, err := control.Open(false)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, control.CloseServer(addr)) }()
	ctx, cancel := context.WithCancel(context.Background())
	w := newWatch()
	ended := make(chan error, 1)
	go func() {
		ended <- v.run(ctx, target{URL: "amqp://guest:guest@" + addr, Queue: "size=100,every=5ms", Prefetch: 16, Workers: 1}, w.each)
	}()
	defer func() { cancel(); <-ended }()
	if err := w.underWay(c.Patience); err != nil {
		return 0, err
	}
	since := time.Now()
	if err := control.Fault(addr, c.Fault, outage); err != nil {
		return 0, err
	}
	if c.Fault == replay.FaultRestart {
		since = time.Now() // nobody can be back before the server is
	}
	return w.back(since, c.Patience)
}

// watch sees the generation of the subscription in each delivery.
type watch struct {
	seen    atomic.Int64
	started chan struct{} // the first subscription has delivered enough
	resumed chan time.Time
	again   atomic.Bool
}

// enough deliveries before the fault make the consumer a healthy one.
const enough = 40

func newWatch() *watch {
	return &watch{started: make(chan struct{}), resumed: make(chan time.Time, 1)}
}

func (w *watch) each(body []byte) {
	if binary.BigEndian.Uint64(body) > 1 {
		if w.again.CompareAndSwap(false, true) {
			w.resumed <- time.Now()
		}
		return
	}
	if w.seen.Add(1) == enough {
		close(w.started)
	}
}

func (w *watch) underWay(patience time.Duration) error {
	select {
	case <-w.started:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("only %d deliveries before the fault", w.seen.Load())
	}
}

func (w *watch) back(since time.Time, patience time.Duration) (time.Duration, error) {
	select {
	case at := <-w.resumed:
		return max(0, at.Sub(since)), nil
	case <-time.After(patience):
		return 0, errNever
	}
}
