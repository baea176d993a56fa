package rabbit

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"
)

// findLimit bounds everything up to a broker that answers; an image is pulled or built within it.
const findLimit = 10 * time.Minute

// ErrNoBroker says that no broker could be had; its text says what was tried and how to get one.
var ErrNoBroker = errors.New("rabbit: no broker")

const howToGetOne = "run `make test`, which gets brokers through Docker, a rabbitmq-server of the machine or Debian's package, " +
	"or set STEADYMQ_AMQP_URL to a broker you may use"

var logger = log.New(os.Stderr, "rabbit: ", log.Ltime)

func logf(format string, args ...any) { logger.Printf(format, args...) }

// Required says whether tests must fail where they would skip.
func Required() bool { return os.Getenv("STEADYMQ_REQUIRE_BROKER") == "1" }

// errNotAsked keeps a plain `go test ./...` quick, and the machine it runs on as it is, also where Docker could start brokers.
var errNotAsked = fmt.Errorf("%w was asked for: %s", ErrNoBroker, howToGetOne)

// mayInstall says whether brokers may be started and packages installed.
func mayInstall() bool { return Required() || os.Getenv("STEADYMQ_INSTALL") == "1" }

// Find returns a running broker, from the first source that has one. The caller closes it.
func Find(ctx context.Context, cfg Config) (*Broker, error) {
	ctx, cancel := context.WithTimeout(ctx, findLimit)
	defer cancel()
	if raw := os.Getenv("STEADYMQ_AMQP_URL"); raw != "" {
		return external(ctx, raw)
	}
	if !mayInstall() {
		return nil, errNotAsked
	}
	b, errDocker := findDocker(ctx, cfg)
	if errDocker == nil {
		return b, nil
	}
	logf("no broker through Docker: %v", errDocker)
	b, errLocal := findLocal(ctx, cfg)
	if errLocal == nil {
		return b, nil
	}
	logf("no broker on this machine: %v", errLocal)
	return nil, fmt.Errorf("%w: %s (Docker: %w; this machine: %w)", ErrNoBroker, howToGetOne, errDocker, errLocal)
}

// external takes a broker somebody else runs. The URL may hold a password, so a parse error is not passed on.
func external(ctx context.Context, raw string) (*Broker, error) {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" {
		return nil, errors.New("rabbit: STEADYMQ_AMQP_URL is no AMQP URL")
	}
	b := &Broker{Source: "STEADYMQ_AMQP_URL", base: *u}
	return b, b.WaitReady(ctx)
}

// Start gives the test a fresh broker of its own, ended with the test. The broker of STEADYMQ_AMQP_URL is the exception: it is shared.
func Start(t testing.TB, cfg Config) *Broker {
	t.Helper()
	return StartAll(t, cfg)[0]
}

// StartAll is Start for several brokers, side by side.
func StartAll(t testing.TB, cfgs ...Config) []*Broker {
	t.Helper()
	brokers, errs := make([]*Broker, len(cfgs)), make([]error, len(cfgs))
	var all sync.WaitGroup
	for i, cfg := range cfgs {
		all.Go(func() { brokers[i], errs[i] = Find(t.Context(), cfg) })
	}
	all.Wait()
	for _, b := range brokers {
		if b != nil {
			t.Cleanup(func() { finish(t, b) })
		}
	}
	if err := errors.Join(errs...); err != nil {
		missing(t, err)
	}
	return brokers
}

// finish ends a test's broker, with its last words if the test has failed.
func finish(t testing.TB, b *Broker) {
	if t.Failed() {
		dumpLogs(t, b)
	}
	if err := b.Close(); err != nil {
		t.Errorf("broker %s: %v", b.Addr(), err)
	}
}

// missing ends a test that has no broker.
func missing(t testing.TB, err error) {
	t.Helper()
	if Required() {
		t.Fatalf("STEADYMQ_REQUIRE_BROKER=1 and %v", err)
	}
	t.Skip(err)
}

// NeedCommands skips a test, also where a broker is required, when its broker can only be used: the owner of STEADYMQ_AMQP_URL did not
// ask us to stop it.
func NeedCommands(t testing.TB, b *Broker) {
	t.Helper()
	if !b.Commandable() {
		t.Skipf("the broker of %s cannot be commanded: this test stops or changes it", b.Source)
	}
}

// NoDirectWay says why the broker's own socket cannot be reached from here, "" if it can.
func NoDirectWay(ctx context.Context, b *Broker) string {
	addr, err := b.Direct(ctx, amqpPort)
	if err != nil {
		return err.Error()
	}
	conn, err := net.DialTimeout("tcp", addr, 2*time.Second)
	if err != nil {
		return "the broker's own address cannot be reached from here: " + err.Error()
	}
	_ = conn.Close()
	return ""
}

func dumpLogs(t testing.TB, b *Broker) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if text, err := b.Logs(ctx); err == nil {
		t.Logf("broker %s, end of its log:\n%s", b.Addr(), tail(text, 4000))
	}
}

func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return "..." + s[len(s)-n:]
}

var shared struct {
	sync.Mutex
	broker *Broker
	err    error
}

// Shared is one broker for the whole test process: for tests that disturb nothing but their own queue and connections. TestMain calls
// CloseShared.
func Shared(t testing.TB) *Broker {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.broker == nil && shared.err == nil {
		shared.broker, shared.err = Find(context.WithoutCancel(t.Context()), Config{ChannelTick: time.Second})
	}
	if shared.err != nil {
		missing(t, shared.err)
	}
	return shared.broker
}

// CloseShared ends the shared broker, if there is one.
func CloseShared() {
	shared.Lock()
	defer shared.Unlock()
	if shared.broker == nil {
		return
	}
	if err := shared.broker.Close(); err != nil {
		logf("shared broker: %v", err)
	}
	shared.broker = nil
}
