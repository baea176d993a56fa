// Package matrix_test lets every fault happen to consumers on real brokers: in cells of fault,
// generation of RabbitMQ and kind of queue, to a herd of a thousand consumers, and at random for as
// long as a soak is told to last. What judges them is package scenario.
package matrix_test

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
