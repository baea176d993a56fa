// Package behaviour_test shows what the library does, on the rig: each test is named after what it
// shows, each file after its subject.
package behaviour_test

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
