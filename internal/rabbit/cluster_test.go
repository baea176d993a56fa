package rabbit

import (
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestAClusterIsCutAndJoined(t *testing.T) {
	if testing.Short() {
		t.Skip("starts three brokers")
	}
	c := NewCluster(t, 3, Config{NetTick: 5 * time.Second})
	ctx := t.Context()
	running := func(via int) int {
		out, err := c.Running(ctx, via)
		require.NoError(t, err)
		return strings.Count(out, "rabbit@")
	}
	require.Equal(t, 3, running(0))
	require.NoError(t, c.Nodes[1].DeclareQueue("q", amqp.Table{"x-queue-type": "quorum"}))
	leader, err := c.Leader(ctx, 0, "/", "q")
	require.NoError(t, err)
	assert.Contains(t, []int{0, 1, 2}, leader)

	require.NoError(t, c.CutPeers(ctx, 2))
	require.Eventually(t, func() bool { return running(0) == 2 }, time.Minute, 2*time.Second)
	_, err = probe(c.Nodes[2].URL())
	require.NoError(t, err, "its clients still reach it")
	require.NoError(t, c.JoinPeers(ctx, 2))
	require.Eventually(t, func() bool { return running(0) == 3 }, time.Minute, 2*time.Second)

	require.NoError(t, c.Nodes[0].Drain(ctx))
	_, err = probe(c.Nodes[0].URL())
	require.Error(t, err, "a drained node takes nobody")
	require.NoError(t, c.Nodes[0].Revive(ctx))
	require.NoError(t, c.Nodes[0].WaitReady(ctx))
	_, err = c.Nodes[0].QueuesCtl(ctx, "rebalance", "quorum")
	require.NoError(t, err)
}
