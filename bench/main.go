// Command bench compares steadymq with the plain driver: how fast it consumes,
// what that costs, how soon it consumes again after a fault, what it takes while
// it is idle, what many consumers on one connection do, and what it costs that
// messages fail and come back.
//
//	go run ./bench -quick                      a few minutes' impression
//	go run ./bench -write                      everything, into bench/RESULTS.md
//	go run ./bench -prefetch 256 -tls tls      one workload
//	go run ./bench -amqp amqp://localhost:5672 on a broker
//
// The server it measures against runs in a process of its own, and so does
// each client, so that the CPU it reports is the client's and nothing else.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/steadymq/steadymq/bench/internal/replay"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// roles are those of a client process, by its first argument; the second one is
// its configuration.
var roles = map[string]func(string) error{
	"client": clientMain, "recover": recoverMain, "idle": idleMain, "further": child(furtherConfig.measure), "herd": child(herdConfig.measure), "beside": child(besideConfig.measure),
	"kit": kitMain,
}

// run plays the role that a parent process asked for, or is the parent.
func run(args []string) error {
	if len(args) > 0 && args[0] == "replay" {
		return replay.Main()
	}
	if len(args) == 2 && roles[args[0]] != nil {
		return roles[args[0]](args[1])
	}
	o, err := parseOptions(args)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return benchmark(ctx, o)
}

// options is the command line.
type options struct {
	workloads  []workload
	throughput []variant
	recovery   []variant
	idle       []variant
	faults     []string
	consumers  []int // on one connection, of the group benchmark
	retries    bool
	batches    bool

	rounds         int
	warmup, window time.Duration
	samples        int

	amqp      string
	queueType string
	messages  int

	profile string
	write   bool
	command string // for the report
}

func parseOptions(args []string) (o options, err error) {
	f := flag.NewFlagSet("bench", flag.ExitOnError)
	only := f.String("only", "throughput,recovery,idle,groups,retry,batch", "which benchmarks: throughput, recovery, idle, groups, retry, batch")
	variants := f.String("variants", "driver,steadymq,multiple,auto", "throughput variants; the first is the base of the ratios")
	healers := f.String("healers", "steadymq,recovery,loop", "recovery variants")
	faults := f.String("faults", strings.Join(replay.Faults, ","), "faults of the recovery benchmark")
	consumers := f.String("consumers", "1,10,100,1000", "consumers on one connection, of the group benchmark")
	prefetch := f.String("prefetch", "", "prefetch values, as 1,16,64,256,1000")
	bodies := f.String("bodies", "", "body sizes in bytes, as 100,1024,65536")
	workers := f.String("workers", "", "worker counts, as 1,16,64")
	transport := f.String("tls", "", "transports, as plain,tls")
	full := f.Bool("full", false, "every combination of prefetch, body, workers and transport")
	short := f.Bool("quick", false, "few workloads, short rounds")
	f.IntVar(&o.rounds, "rounds", 9, "alternating rounds per workload")
	f.DurationVar(&o.warmup, "warmup", 200*time.Millisecond, "time before the measurement")
	f.DurationVar(&o.window, "window", 600*time.Millisecond, "time measured on the replay server")
	f.IntVar(&o.samples, "samples", 50, "samples per fault and variant of the recovery benchmark")
	f.StringVar(&o.amqp, "amqp", "", "URL of a broker to measure throughput on instead of the replay server")
	f.StringVar(&o.queueType, "queue-type", "classic", "type of the broker's queue: classic or quorum")
	f.IntVar(&o.messages, "messages", 50000, "messages per run on a broker")
	f.StringVar(&o.profile, "profile", "", "folder for CPU and allocation profiles of the clients")
	f.BoolVar(&o.write, "write", false, "write bench/RESULTS.md and bench/throughput.svg, or bench/BROKER.md with -amqp")
	_ = f.Parse(args) // ExitOnError
	o.command = strings.Join(append([]string{"go run ./bench"}, args...), " ")
	if o.amqp != "" { // it may hold a password
		o.command = strings.ReplaceAll(o.command, o.amqp, "URL")
	}
	if *short {
		o.rounds, o.window, o.samples = min(o.rounds, 3), min(o.window, 400*time.Millisecond), min(o.samples, 10)
	}
	if strings.Contains(*only, "throughput") {
		if o.throughput, err = pick(throughputVariants, *variants); err != nil {
			return o, err
		}
	}
	if strings.Contains(*only, "recovery") && o.amqp == "" {
		if o.recovery, err = pick(recoveryVariants, *healers); err != nil {
			return o, err
		}
	}
	if strings.Contains(*only, "idle") && o.amqp == "" {
		if o.idle, err = pick(throughputVariants, "driver,steadymq"); err != nil {
			return o, err
		}
	}
	if strings.Contains(*only, "groups") {
		if o.consumers, err = ints(*consumers); err != nil {
			return o, err
		}
	}
	o.retries = strings.Contains(*only, "retry")
	o.batches = strings.Contains(*only, "batch")
	o.faults = strings.Split(*faults, ",")
	o.workloads, err = workloads(*prefetch, *bodies, *workers, *transport, *full, *short)
	return o, err
}

// workloads are the standard ones unless a flag names some.
func workloads(prefetch, bodies, workers, transport string, full, short bool) ([]workload, error) {
	if prefetch+bodies+workers+transport == "" && !full {
		if short {
			return quick(), nil
		}
		return standard(), nil
	}
	every := func(list, all, one string) ([]int, error) {
		switch {
		case list != "":
			return ints(list)
		case full:
			return ints(all)
		default:
			return ints(one)
		}
	}
	ps, err := every(prefetch, "1,16,64,256,1000", "256")
	if err != nil {
		return nil, err
	}
	bs, err := every(bodies, "100,1024,65536", "100")
	if err != nil {
		return nil, err
	}
	ws, err := every(workers, "1,16,64", "1")
	if err != nil {
		return nil, err
	}
	var secure []bool
	if full && transport == "" || strings.Contains(transport, "plain") || transport == "" {
		secure = append(secure, false)
	}
	if full && transport == "" || strings.Contains(transport, "tls") {
		secure = append(secure, true)
	}
	return cross(ps, bs, ws, secure), nil
}

func ints(list string) ([]int, error) {
	var ns []int
	for part := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(part))
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%q is no positive number", part)
		}
		ns = append(ns, n)
	}
	return ns, nil
}

func pick(from []variant, list string) ([]variant, error) {
	var vs []variant
	for name := range strings.SplitSeq(list, ",") {
		v, ok := findVariant(from, strings.TrimSpace(name))
		if !ok {
			return nil, fmt.Errorf("no variant %q", name)
		}
		vs = append(vs, v)
	}
	return vs, nil
}

func benchmark(ctx context.Context, o options) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	server, err := replay.Start(exec.Command(self, "replay"))
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := server.Close(); err == nil {
			err = closeErr
		}
	}()
	rep := report{opts: o}
	if rep.throughput, err = throughput(ctx, o, server); err != nil {
		return err
	}
	if rep.recovery, err = recovery(ctx, o, server); err != nil {
		return err
	}
	if rep.idle, err = idle(ctx, o, server); err != nil {
		return err
	}
	if rep.groups, err = benchGroups(ctx, o, server); err != nil {
		return err
	}
	if rep.batches, err = benchBatches(ctx, o, server); err != nil {
		return err
	}
	if rep.retries, err = benchRetries(ctx, o); err != nil {
		return err
	}
	return rep.deliver()
}

func throughput(ctx context.Context, o options, server *replay.Process) ([]comparison, error) {
	if len(o.throughput) == 0 {
		return nil, nil
	}
	r := replayRunner(o, o.throughput, server)
	if o.amqp != "" {
		r = brokerRunner(o, o.throughput)
	}
	var cs []comparison
	for _, w := range o.workloads {
		c, err := r.compare(ctx, w)
		if err != nil {
			return nil, err
		}
		cs = append(cs, c)
	}
	return cs, nil
}
