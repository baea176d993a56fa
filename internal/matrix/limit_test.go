package matrix_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/rig"
)

// TestDeliveryLimitOnRealBrokers lets a message come back 25 times, to a queue that the consumer declares, and to one that exists with
// the default limit, and to such a one under the policy that the warning names.
func TestDeliveryLimitOnRealBrokers(t *testing.T) {
	if testing.Short() {
		t.Skip("starts brokers")
	}
	var configs []rabbit.Config
	for _, g := range rabbit.Generations() {
		configs = append(configs, rabbit.Config{Generation: g})
	}
	for _, b := range rabbit.StartAll(t, configs...) {
		old := strings.HasPrefix(b.Version(), "3.")
		for name, test := range map[string]struct {
			exists, policy bool
			kept           bool
		}{
			"declared":       {kept: true},
			"exists":         {exists: true, kept: old},
			"exists, policy": {exists: true, policy: true, kept: !old},
		} {
			t.Run(b.Version()+"/"+name, func(t *testing.T) {
				if test.policy && old {
					t.Skip("before 4.0 a policy cannot say so")
				}
				queue := "limit-" + strings.ReplaceAll(strings.ReplaceAll(name, ",", ""), " ", "-")
				if test.exists {
					require.NoError(t, b.DeclareQueue(queue, amqp.Table{"x-queue-type": "quorum"}))
				}
				if test.policy {
					rabbit.NeedCommands(t, b)
					require.NoError(t, b.PolicyOn(t.Context(), "/", "unlimited", "^"+queue+"$", `{"delivery-limit": -1}`))
				}
				log := new(rig.LogBuffer)
				assert.Equal(t, test.kept, comesBack(t, b, queue, 25, log))
				assert.Equal(t, test.exists && !old, strings.Contains(log.String(), "which stays"))
				require.NoError(t, b.DeleteQueue(queue))
			})
		}
	}
}

// comesBack tells whether a message is delivered again after n returns.
func comesBack(t *testing.T, b *rabbit.Broker, queue string, n int, log *rig.LogBuffer) bool {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	returned := make(chan int, n+1)
	seen := 0
	handle := func(context.Context, *steadymq.Delivery) error {
		if seen++; seen > n {
			returned <- seen
			return nil
		}
		return steadymq.Requeue(nil)
	}
	c, err := steadymq.New(b.URL(), queue, steadymq.WithQueue(steadymq.Queue{}), steadymq.WithLogger(slog.New(slog.NewTextHandler(log, nil))))
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, handle) }()
	require.Eventually(t, func() bool { return c.State() == steadymq.Consuming }, 20*time.Second, 10*time.Millisecond)
	conn, err := amqp.Dial(b.URL())
	require.NoError(t, err)
	defer conn.Close()
	ch, err := conn.Channel()
	require.NoError(t, err)
	require.NoError(t, ch.PublishWithContext(ctx, "", queue, false, false, amqp.Publishing{DeliveryMode: amqp.Persistent}))
	came := false
	select {
	case <-returned:
		came = true
	case <-time.After(5 * time.Second):
	}
	stop()
	require.NoError(t, <-done)
	return came
}
