package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"

	"github.com/steadymq/steadymq/bench/internal/replay"
)

// workload is one line of the comparison: what is consumed, and how.
type workload struct {
	Prefetch, Body, Workers int
	TLS                     bool
	Consumers               int // on one connection; 0 is one alone
}

func (w workload) String() string {
	if w.Consumers > 0 {
		return fmt.Sprintf("%s on one connection, prefetch %d, %s", count(w.Consumers, "consumer"), w.Prefetch, bytesText(w.Body))
	}
	return fmt.Sprintf("prefetch %d, %s, %s, %s", w.Prefetch, bytesText(w.Body), count(w.Workers, "worker"), w.transport())
}

func (w workload) transport() string {
	if w.TLS {
		return "TLS"
	}
	return "plain"
}

// standard is the set that RESULTS.md shows: one thing varied at a time.
func standard() []workload {
	var ws []workload
	for _, p := range []int{1, 16, 64, 256, 1000} {
		ws = append(ws, workload{Prefetch: p, Body: 100, Workers: 1})
	}
	for _, n := range []int{16, 64} {
		ws = append(ws, workload{Prefetch: 256, Body: 100, Workers: n})
	}
	for _, b := range []int{1 << 10, 64 << 10} {
		ws = append(ws, workload{Prefetch: 256, Body: b, Workers: 1})
	}
	for _, p := range []int{1, 64, 256} {
		ws = append(ws, workload{Prefetch: p, Body: 100, Workers: 1, TLS: true})
	}
	return ws
}

func quick() []workload {
	var ws []workload
	for _, p := range []int{1, 16, 64, 256} {
		ws = append(ws, workload{Prefetch: p, Body: 100, Workers: 1})
	}
	return ws
}

// cross is every combination that makes sense: more workers than prefetch
// would only idle.
func cross(prefetch, bodies, workers []int, tls []bool) []workload {
	var ws []workload
	for _, secure := range tls {
		for _, b := range bodies {
			for _, n := range workers {
				for _, p := range prefetch {
					if n <= p {
						ws = append(ws, workload{Prefetch: p, Body: b, Workers: n, TLS: secure})
					}
				}
			}
		}
	}
	return ws
}

// outcome is one variant under one workload: the medians over the rounds.
// Ratios are taken within a round, between neighbours in time, so that what
// else the machine does cancels out.
type outcome struct {
	variant             variant
	rate, user, system  float64 // messages/s; microseconds per message
	mallocs, bytes      float64 // per message
	rateRatio, cpuRatio float64 // against the first variant
	rateMin, rateMax    float64 // of rateRatio
	server              float64 // the server's CPU, microseconds per message
	reads               float64 // the server's, per message
	ofOne               float64 // the rate against the variant with one consumer, if there is one
}

type comparison struct {
	workload workload
	outcomes []outcome
}

// runner starts the client processes of one benchmark and knows where they
// connect to.
type runner struct {
	opts     options
	variants []variant
	// place prepares one run and returns what cleans up after it.
	place func(ctx context.Context, w workload, c *clientConfig) (done func() error, err error)
}

// replayRunner measures on the replay server, a fresh one for each run.
func replayRunner(o options, vs []variant, p *replay.Process) *runner {
	place := func(_ context.Context, w workload, c *clientConfig) (func() error, error) {
		control, err := replay.Dial(p.Control)
		if err != nil {
			return nil, err
		}
		addr, err := control.Open(w.TLS)
		if err != nil {
			return nil, err
		}
		c.Control, c.Addr = p.Control, addr
		c.URL = "amqp://guest:guest@" + addr
		if w.TLS {
			c.URL, c.CA = "amqps://guest:guest@"+addr, p.CA
		}
		c.Queue = fmt.Sprintf("size=%d", w.Body)
		c.Warmup, c.Window = o.warmup, o.window
		if w.Consumers > 0 {
			if err := control.Stop(addr); err != nil { // until all are set up
				return nil, err
			}
		}
		return func() error {
			defer control.Close()
			return control.CloseServer(addr)
		}, nil
	}
	return &runner{opts: o, variants: vs, place: place}
}

func (r *runner) compare(ctx context.Context, w workload) (comparison, error) {
	rounds := make([][]measurement, len(r.variants))
	for n := range r.opts.rounds {
		for i, v := range r.variants {
			m, err := r.run(ctx, w, v)
			if err != nil {
				return comparison{}, fmt.Errorf("%s, %s: %w", w, v.name, err)
			}
			rounds[i] = append(rounds[i], m)
			logf("%s round %d %-9s %9.0f/s  %.2f+%.2f µs  %.1f allocs", w, n+1, v.name,
				m.rate(), m.per(micros(m.User)), m.per(micros(m.System)), m.per(float64(m.Mallocs)))
		}
	}
	c := comparison{workload: w}
	one := slices.IndexFunc(r.variants, func(v variant) bool { return v.one })
	for i, v := range r.variants {
		o := summarize(v, rounds[i], rounds[0])
		if one >= 0 {
			o.ofOne = summarize(v, rounds[i], rounds[one]).rateRatio
		}
		c.outcomes = append(c.outcomes, o)
	}
	return c, nil
}

func (r *runner) run(ctx context.Context, w workload, v variant) (m measurement, err error) {
	c := clientConfig{Variant: v.name, Prefetch: w.Prefetch, Workers: w.Workers, Consumers: w.Consumers, Profile: r.opts.profile}
	if v.one {
		c.Consumers = min(c.Consumers, 1)
	}
	done, err := r.place(ctx, w, &c)
	if err != nil {
		return m, err
	}
	defer func() {
		if cleanErr := done(); err == nil {
			err = cleanErr
		}
	}()
	err = reexec(ctx, "client", c, &m)
	return m, err
}

// reexec runs this program again in a role, with config as its argument, and
// decodes what it prints.
func reexec(ctx context.Context, role string, config, result any) error {
	arg, err := json.Marshal(config)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, role, string(arg))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return err
	}
	return json.Unmarshal(out, result)
}

func summarize(v variant, ms, base []measurement) outcome {
	o := outcome{variant: v}
	of := func(f func(i int, m measurement) float64) float64 {
		vs := make([]float64, len(ms))
		for i, m := range ms {
			vs[i] = f(i, m)
		}
		return median(vs)
	}
	cpu := func(m measurement) float64 { return m.per(micros(m.User + m.System)) }
	o.rate = of(func(_ int, m measurement) float64 { return m.rate() })
	o.user = of(func(_ int, m measurement) float64 { return m.per(micros(m.User)) })
	o.system = of(func(_ int, m measurement) float64 { return m.per(micros(m.System)) })
	o.mallocs = of(func(_ int, m measurement) float64 { return m.per(float64(m.Mallocs)) })
	o.bytes = of(func(_ int, m measurement) float64 { return m.per(float64(m.Bytes)) })
	o.server = of(func(_ int, m measurement) float64 { return m.per(micros(m.Server)) })
	o.reads = of(func(_ int, m measurement) float64 { return m.per(float64(m.Reads)) })
	o.cpuRatio = of(func(i int, m measurement) float64 { return cpu(m) / cpu(base[i]) })
	ratio := func(i int, m measurement) float64 { return m.rate() / base[i].rate() }
	o.rateRatio = of(ratio)
	o.rateMin, o.rateMax = ratio(0, ms[0]), ratio(0, ms[0])
	for i, m := range ms {
		o.rateMin, o.rateMax = min(o.rateMin, ratio(i, m)), max(o.rateMax, ratio(i, m))
	}
	return o
}

func median(vs []float64) float64 {
	vs = slices.Sorted(slices.Values(vs))
	n := len(vs)
	if n == 0 {
		return 0
	}
	return (vs[(n-1)/2] + vs[n/2]) / 2
}
