package wire

import (
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestUnconfirmedDataIsBoundedByTheKernel(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	for want, given := range map[int]time.Duration{15_000: 15 * time.Second, 0: 0} {
		conn, err := DefaultDial(5*time.Second, given)(t.Context(), "tcp", listener.Addr().String())
		require.NoError(t, err)
		raw, err := conn.(*net.TCPConn).SyscallConn()
		require.NoError(t, err)
		var got int
		var failed error
		require.NoError(t, raw.Control(func(fd uintptr) {
			got, failed = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout)
		}))
		require.NoError(t, failed)
		assert.Equal(t, want, got)
		require.NoError(t, conn.Close())
	}
}
