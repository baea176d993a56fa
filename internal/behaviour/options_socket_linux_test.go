package behaviour_test

import (
	"context"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// Heartbeats of the broker keep coming where only what is sent gets lost: the kernel notices.
func TestSocketsAreWatchedByTheKernel(t *testing.T) {
	for name, c := range map[string]struct {
		parameters string
		options    []steadymq.Option
		want       int // milliseconds
	}{
		"default":              {"", nil, 15_000},
		"WithHeartbeat":        {"", rig.Options(steadymq.WithHeartbeat(7 * time.Second)), 10_500},
		"heartbeat of the URL": {"?heartbeat=3", nil, 4_500},
		"both":                 {"?heartbeat=3", rig.Options(steadymq.WithHeartbeat(4 * time.Second)), 6_000},
	} {
		t.Run(name, func(t *testing.T) {
			broker := steadymqtest.NewBroker(t)
			broker.DeclareQueue(rig.Queue, steadymqtest.QueueOptions{})
			at := broker.Listen()
			consumer, err := steadymq.New(at+c.parameters, rig.Queue, append(c.options, steadymq.WithLogger(slog.New(slog.DiscardHandler)))...)
			require.NoError(t, err)
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- consumer.Run(ctx, rig.Ack) }()
			limited, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			require.NoError(t, broker.WaitConsumers(limited, rig.Queue, 1))
			fd := socketTo(t, at)
			userTimeout, err := syscall.GetsockoptInt(fd, syscall.IPPROTO_TCP, 0x12) // TCP_USER_TIMEOUT
			require.NoError(t, err)
			assert.Equal(t, c.want, userTimeout)
			keepAlive, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_KEEPALIVE)
			require.NoError(t, err)
			assert.Equal(t, 1, keepAlive)
			stop()
			require.NoError(t, <-done)
		})
	}
}

// socketTo finds the socket of this process that has been dialled to the broker at the URL.
func socketTo(t *testing.T, at string) int {
	t.Helper()
	u, err := url.Parse(at)
	require.NoError(t, err)
	_, want, err := net.SplitHostPort(u.Host)
	require.NoError(t, err)
	all, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, entry := range all {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if peer, err := syscall.Getpeername(fd); err == nil {
			if v4, ok := peer.(*syscall.SockaddrInet4); ok && strconv.Itoa(v4.Port) == want {
				return fd
			}
		}
	}
	require.Fail(t, "there is no socket to "+at)
	return -1
}
