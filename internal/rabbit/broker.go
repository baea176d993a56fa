package rabbit

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// ErrUnsupported is what a command answers on a broker that can be used but not commanded.
var ErrUnsupported = errors.New("rabbit: this broker cannot be commanded")

// backend is the way one node is run: a container or a process of this machine.
type backend interface {
	addr() string
	addrTLS() string
	direct(ctx context.Context, port int) (string, error)
	exec(ctx context.Context, args ...string) (string, error)
	stop(ctx context.Context) error
	start(ctx context.Context) error
	kill(ctx context.Context) error
	pause(ctx context.Context) error
	unpause(ctx context.Context) error
	logs(ctx context.Context) (string, error)
	close() error
}

// Broker is one RabbitMQ node.
type Broker struct {
	Source  string // where it came from, in words
	base    url.URL
	node    backend // nil where the broker is somebody else's
	version string
}

// URL is the address of the broker for its own user and virtual host.
func (b *Broker) URL() string { return b.base.String() }

// URLFor is the address for another user and virtual host.
func (b *Broker) URLFor(user, password, vhost string) string {
	u := b.base
	u.User = url.UserPassword(user, password)
	u.Path, u.RawPath = "/"+vhost, "/"+url.PathEscape(vhost)
	return u.String()
}

// Addr is the broker's host:port.
func (b *Broker) Addr() string {
	if b.base.Port() == "" {
		return net.JoinHostPort(b.base.Hostname(), "5672")
	}
	return b.base.Host
}

// TLSAddr is the host:port of the listener that Config.TLS asks for; without, nobody listens there.
func (b *Broker) TLSAddr() string {
	if b.node == nil {
		return ""
	}
	return b.node.addrTLS()
}

// Direct is the host:port of one of RabbitMQ's ports, such as 5672, at the broker's own address: nothing is in between, as behind a published
// port, whose proxy makes a FIN of the broker's RST. The address may be another after a restart,
// and there is none while the container is down, as with a name that has gone from the DNS.
func (b *Broker) Direct(ctx context.Context, port int) (string, error) {
	if b.node == nil {
		return "", ErrUnsupported
	}
	addr, err := b.node.direct(ctx, port)
	if err != nil {
		return "", fmt.Errorf("rabbit: port %d at the broker's own address: %w", port, err)
	}
	return addr, nil
}

// Version is what the broker said of itself when it was opened, for example 3.10.8.
func (b *Broker) Version() string { return b.version }

// Commandable says whether the commands below work.
func (b *Broker) Commandable() bool { return b.node != nil }

// atLeast compares the broker's version with a release line.
func (b *Broker) atLeast(major, minor int) bool {
	parts := strings.SplitN(b.version, ".", 3)
	if len(parts) < 2 {
		return false
	}
	gotMajor, _ := strconv.Atoi(parts[0])
	gotMinor, _ := strconv.Atoi(parts[1])
	return gotMajor > major || gotMajor == major && gotMinor >= minor
}

// HasQuorum says whether the broker knows quorum queues.
func (b *Broker) HasQuorum() bool { return b.atLeast(3, 8) }

// HasStreams says whether the broker knows streams.
func (b *Broker) HasStreams() bool { return b.atLeast(3, 9) }

// TimeoutClosesChannel says whether an overdue delivery closes the channel with 406 (up to 4.2), on any queue kind.
func (b *Broker) TimeoutClosesChannel() bool { return !b.atLeast(4, 3) }

// TimeoutCancelsConsumer says whether an overdue delivery of a quorum queue cancels its consumer (4.3 and later).
func (b *Broker) TimeoutCancelsConsumer() bool { return b.atLeast(4, 3) }

// PerQueueTimeout says whether a queue may carry x-consumer-timeout.
func (b *Broker) PerQueueTimeout() bool { return b.atLeast(3, 12) }

// HasDeliveryLimit says whether quorum queues drop a message after 20 deliveries by default.
func (b *Broker) HasDeliveryLimit() bool { return b.atLeast(4, 0) }

// HasMirroring says whether classic queues can be mirrored by policy.
func (b *Broker) HasMirroring() bool { return !b.atLeast(4, 0) }

// Stop ends the whole node in good order: SIGTERM, then the container or process is gone.
func (b *Broker) Stop(ctx context.Context) error {
	return b.bounded(ctx, time.Minute, "stop", backend.stop)
}

// Start starts a node that was stopped or killed, and waits until it accepts AMQP.
func (b *Broker) Start(ctx context.Context) error {
	if err := b.bounded(ctx, time.Minute, "start", backend.start); err != nil {
		return err
	}
	return b.WaitReady(ctx)
}

// Restart is Stop, the given time down, and Start.
func (b *Broker) Restart(ctx context.Context, down time.Duration) error {
	if err := b.Stop(ctx); err != nil {
		return err
	}
	if err := sleep(ctx, down); err != nil {
		return err
	}
	return b.Start(ctx)
}

// Kill ends the node with SIGKILL.
func (b *Broker) Kill(ctx context.Context) error {
	return b.bounded(ctx, 30*time.Second, "kill", backend.kill)
}

// Pause freezes the node: sockets stay, nothing answers.
func (b *Broker) Pause(ctx context.Context) error {
	return b.bounded(ctx, 30*time.Second, "pause", backend.pause)
}

// Unpause thaws it.
func (b *Broker) Unpause(ctx context.Context) error {
	return b.bounded(ctx, 30*time.Second, "unpause", backend.unpause)
}

// Logs is what the node has written on its console.
func (b *Broker) Logs(ctx context.Context) (string, error) {
	if b.node == nil {
		return "", ErrUnsupported
	}
	return b.node.logs(ctx)
}

// PID is the process whose network is the node's own: a container's. A node on this machine has none of its own.
func (b *Broker) PID(ctx context.Context) (int, error) {
	node, ok := b.node.(*containerNode)
	if !ok {
		return 0, fmt.Errorf("rabbit: the broker of %s has no network of its own: %w", b.Source, ErrUnsupported)
	}
	return node.pid(ctx)
}

// Close ends the broker and removes what it left. A broker that is somebody else's is left alone.
func (b *Broker) Close() error {
	if b.node == nil {
		return nil
	}
	return b.node.close()
}

func (b *Broker) bounded(ctx context.Context, limit time.Duration, what string, do func(backend, context.Context) error) error {
	if b.node == nil {
		return ErrUnsupported
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	start := time.Now()
	if err := do(b.node, ctx); err != nil {
		return fmt.Errorf("rabbit: %s: %w", what, err)
	}
	logf("%s: %s took %v", b.Addr(), what, time.Since(start).Round(time.Millisecond))
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
