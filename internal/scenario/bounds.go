package scenario

import "time"

// The limits that a scenario's consumer is given, and the bounds that follow from them, which are
// those of docs/FAULTS.md. The heartbeat is short because detection scales with it.
const (
	Heartbeat    = 2 * time.Second
	SetupTimeout = 3 * time.Second
	CloseTimeout = 5 * time.Second // the default: a busy broker needs more than one second
	DrainTimeout = 20 * time.Second

	// AtOnce bounds healing from what the broker or the kernel tells us about. The figure to reach
	// is half of it; the machine is shared.
	AtOnce = time.Second
	// SilentPeer bounds noticing that nothing arrives any more, DeadReader that the driver reads
	// nothing any more, not even heartbeats, and HalfOpen that nothing of ours arrives. The last is
	// the broker's to notice, in 2 to 3 heartbeats, because a proxy in this process acknowledges
	// our bytes to the kernel.
	SilentPeer = 3*Heartbeat/2 + 500*time.Millisecond
	DeadReader = 5*Heartbeat/2 + 500*time.Millisecond
	HalfOpen   = 3*Heartbeat + time.Second
	// AfterRefusals bounds resuming once a broker that refused accepts, AfterSilence once one that
	// swallowed everything answers. The proxy, too, needs a moment to see that the broker accepts.
	AfterRefusals = 1200*time.Millisecond + 300*time.Millisecond
	AfterSilence  = SetupTimeout + 10*time.Second + time.Second
	// OperatorPace bounds the next try after two seconds of a missing queue.
	OperatorPace = 5 * time.Second
)
