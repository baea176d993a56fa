package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"sync/atomic"
	"time"

	"github.com/steadymq/steadymq/bench/internal/replay"
)

// clientConfig is all a client process is told, as JSON in its arguments.
type clientConfig struct {
	Variant  string
	URL      string
	Queue    string
	Prefetch int
	Workers  int
	CA       string // PEM; empty: plain

	Consumers int // on one connection; 0 is one alone

	// On the replay server the measurement is a stretch of time.
	Control        string
	Addr           string
	Warmup, Window time.Duration

	// On a broker it is the stretch between the tenth and the ninth tenth of
	// the messages that are there.
	Messages uint64

	Profile string // folder for cpu and allocation profiles
}

// measurement is what a client process reports.
type measurement struct {
	Messages       uint64
	Elapsed        time.Duration
	User, System   time.Duration
	Mallocs, Bytes uint64
	Server         time.Duration // CPU of the replay server in the window
	Reads          uint64        // of the replay server in the window
}

func (m measurement) rate() float64 { return float64(m.Messages) / m.Elapsed.Seconds() }

func (m measurement) per(v float64) float64 { return v / float64(m.Messages) }

// limit bounds one client process: a benchmark that hangs is a finding, not a
// reason to wait.
const limit = 2 * time.Minute

// child is the main function of a process that is given a configuration and prints what it has measured.
func child[C, R any](measure func(C) (R, error)) func(arg string) error {
	return func(arg string) error {
		var c C
		if err := json.Unmarshal([]byte(arg), &c); err != nil {
			return err
		}
		r, err := measure(c)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(r)
	}
}

func clientMain(arg string) error {
	var c clientConfig
	if err := json.Unmarshal([]byte(arg), &c); err != nil {
		return err
	}
	v, ok := findVariant(slices.Concat(throughputVariants, groupVariants, retryVariants, batchVariants), c.Variant)
	if !ok {
		return fmt.Errorf("no variant %q", c.Variant)
	}
	m, err := c.measure(v)
	if err != nil {
		return fmt.Errorf("%s: %w", c.Variant, err)
	}
	return json.NewEncoder(os.Stdout).Encode(m)
}

func (c *clientConfig) target() (target, error) {
	t := target{URL: c.URL, Queue: c.Queue, Prefetch: c.Prefetch, Workers: c.Workers, Consumers: c.Consumers}
	if c.CA != "" {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM([]byte(c.CA)) {
			return t, errors.New("the CA is no PEM certificate")
		}
		t.TLS = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return t, nil
}

func (c *clientConfig) measure(v variant) (m measurement, err error) {
	t, err := c.target()
	if err != nil {
		return m, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	meter := newMeter(c.Messages)
	ended := make(chan error, 1)
	go func() { ended <- v.run(ctx, t, meter.each) }()
	if c.Messages > 0 {
		m, err = meter.between(ctx, ended)
	} else {
		m, err = c.window(ctx, v, meter, ended)
	}
	cancel()
	if err != nil {
		return m, err
	}
	return m, <-ended
}

// window measures a stretch of time on the replay server, and then has the
// server check that everything it delivered was settled once.
func (c *clientConfig) window(ctx context.Context, v variant, meter *meter, ended <-chan error) (m measurement, err error) {
	control, err := replay.Dial(c.Control)
	if err != nil {
		return m, err
	}
	defer control.Close()
	if err := c.allSubscribed(ctx, control, ended); err != nil {
		return m, err
	}
	if err := pause(ctx, c.Warmup, ended); err != nil {
		return m, err
	}
	stop, err := startProfile(c.Profile, c.Variant)
	if err != nil {
		return m, err
	}
	before, err := control.Stats(c.Addr)
	if err != nil {
		return m, err
	}
	from := meter.sample()
	if err := pause(ctx, c.Window, ended); err != nil {
		return m, err
	}
	m = meter.sample().since(from)
	after, err := control.Stats(c.Addr)
	if err != nil {
		return m, err
	}
	m.Server, m.Reads = after.CPU-before.CPU, after.Reads-before.Reads
	return m, errors.Join(drain(ctx, control, c.Addr, v.settles, ended), stop())
}

// allSubscribed waits until all of many consumers are set up, and has the server
// begin to deliver only then: a set-up behind the traffic of the earlier ones
// would take minutes.
func (c *clientConfig) allSubscribed(ctx context.Context, control *replay.Control, ended <-chan error) error {
	if c.Consumers == 0 {
		return nil
	}
	for {
		s, err := control.Stats(c.Addr)
		if err != nil {
			return err
		}
		if s.Subscriptions >= uint64(c.Consumers) {
			return control.Resume(c.Addr)
		}
		if err := pause(ctx, 10*time.Millisecond, ended); err != nil {
			return err
		}
	}
}

// drain stops the deliveries and waits until what was delivered is settled.
func drain(ctx context.Context, control *replay.Control, addr string, settles bool, ended <-chan error) error {
	if err := control.Stop(addr); err != nil {
		return err
	}
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		if err := pause(ctx, 20*time.Millisecond, ended); err != nil {
			return err
		}
		s, err := control.Stats(addr)
		if err != nil {
			return err
		}
		if s.Wrong > 0 || settles && s.Multiple > 0 {
			return fmt.Errorf("%d tags settled twice or unknown, %d with multiple", s.Wrong, s.Multiple)
		}
		if !settles || s.Settled == s.Delivered {
			return nil
		}
	}
	return errors.New("what was delivered was not all settled within 5 s")
}

// pause waits, unless the consumer ends before its time.
func pause(ctx context.Context, d time.Duration, ended <-chan error) error {
	select {
	case <-time.After(d):
		return nil
	case err := <-ended:
		return fmt.Errorf("the consumer ended: %w", err)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// meter counts messages. One shared counter costs every variant the same.
type meter struct {
	count    atomic.Uint64
	from, to uint64 // counts at which a broker run is sampled; 0: none
	samples  chan sample
}

func newMeter(messages uint64) *meter {
	return &meter{from: messages / 10, to: messages - messages/10, samples: make(chan sample, 2)}
}

func (m *meter) each([]byte) {
	n := m.count.Add(1)
	if n == m.from || n == m.to {
		m.samples <- m.sample()
	}
}

func (m *meter) between(ctx context.Context, ended <-chan error) (r measurement, err error) {
	var got [2]sample
	for i := range got {
		select {
		case got[i] = <-m.samples:
		case err := <-ended:
			return r, fmt.Errorf("the consumer ended: %w", err)
		case <-ctx.Done():
			return r, fmt.Errorf("after %d messages: %w", m.count.Load(), ctx.Err())
		}
	}
	return got[1].since(got[0]), nil
}

// sample is the state of the process at one moment.
type sample struct {
	at           time.Time
	messages     uint64
	user, system time.Duration
	mem          runtime.MemStats
}

func (m *meter) sample() sample {
	var s sample
	runtime.ReadMemStats(&s.mem)
	s.user, s.system = replay.CPUTime()
	s.messages = m.count.Load()
	s.at = time.Now()
	return s
}

func (s sample) since(from sample) measurement {
	return measurement{
		Messages: s.messages - from.messages,
		Elapsed:  s.at.Sub(from.at),
		User:     s.user - from.user, System: s.system - from.system,
		Mallocs: s.mem.Mallocs - from.mem.Mallocs,
		Bytes:   s.mem.TotalAlloc - from.mem.TotalAlloc,
	}
}

// startProfile writes <folder>/<variant>.cpu.prof and .mem.prof, if asked to.
func startProfile(folder, variant string) (stop func() error, err error) {
	if folder == "" {
		return func() error { return nil }, nil
	}
	cpu, err := os.Create(filepath.Join(folder, variant+".cpu.prof"))
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(cpu); err != nil {
		return nil, err
	}
	return func() error {
		pprof.StopCPUProfile()
		mem, err := os.Create(filepath.Join(folder, variant+".mem.prof"))
		if err != nil {
			return err
		}
		return errors.Join(cpu.Close(), pprof.Lookup("allocs").WriteTo(mem, 0), mem.Close())
	}, nil
}
