//go:build linux

package router

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestForgottenConnectionIsSwallowedAndANewOnePasses(t *testing.T) {
	n := New(t, Host{})
	lis, err := n.Listen(0)
	require.NoError(t, err)
	defer func() { _ = lis.Close() }()
	seen, err := n.Capture()
	require.NoError(t, err)
	defer seen.Close()

	dial := n.Dialer(3, 0)
	old, err := dial(t.Context(), "tcp", n.Addr(0))
	require.NoError(t, err)
	defer func() { _ = old.Close() }()
	host, err := lis.Accept()
	require.NoError(t, err)
	defer func() { _ = host.Close() }()
	exchange := func(limit time.Duration) error {
		_, err := old.Write([]byte("x"))
		require.NoError(t, err)
		require.NoError(t, host.SetReadDeadline(time.Now().Add(limit)))
		_, err = host.Read(make([]byte, 1))
		return err
	}
	require.NoError(t, exchange(5*time.Second))

	require.NoError(t, n.Forget())
	cut := time.Now().Add(100 * time.Millisecond) // what was on its way is past
	require.ErrorContains(t, exchange(time.Second), "timeout")
	_, err = host.Write([]byte("y"))
	require.NoError(t, err)
	require.NoError(t, old.SetReadDeadline(time.Now().Add(time.Second)))
	_, err = old.Read(make([]byte, 1))
	require.ErrorContains(t, err, "timeout")

	fresh, err := dial(t.Context(), "tcp", n.Addr(0))
	require.NoError(t, err)
	defer func() { _ = fresh.Close() }()
	for _, p := range seen.Of(old.LocalAddr().String(), cut) {
		assert.True(t, p.Out, "nothing reaches the client: %v", p)
	}
	counts, err := n.Counts()
	require.NoError(t, err)
	assert.Zero(t, counts.Resets)
	assert.Positive(t, counts.Swallowed)
	sockets, err := n.Sockets(3)
	require.NoError(t, err)
	assert.Len(t, sockets, 2)
}

func TestNetLeavesNothing(t *testing.T) {
	var name string
	t.Run("a net", func(t *testing.T) { name = New(t, Host{}, Host{}).name })
	if name == "" {
		t.Skip(Missing())
	}
	out, err := exec.Command("ip", "netns", "list").Output()
	require.NoError(t, err)
	assert.NotContains(t, string(out), name)
}

func TestNetOfADeadProcessIsRemoved(t *testing.T) {
	if why := Missing(); why != "" {
		t.Skip(why)
	}
	const dead = prefix + "1-never-client" // no process has such a start time
	s := script{}
	s.run("ip", "netns", "add", dead)
	require.NoError(t, s.err)
	removeOrphans()
	out, err := exec.Command("ip", "netns", "list").Output()
	require.NoError(t, err)
	assert.False(t, strings.Contains(string(out), dead))
}
