package wire

import "time"

// flushing decides when what is pending goes out to the broker. All but settlements goes at
// once, and takes along what waits; a settlement may wait, for nobody waits for an answer to it:
// while more are to come that can share its system call, and the broker has window left.
//
// It is only told what happens, and when; its times count from the start of the socket, whose
// mutex guards it.
type flushing struct {
	delay time.Duration // the longest wait of a settlement; none waits at 0
	idle  func() bool   // no further settlement can be on its way

	urgent  bool          // what is pending goes out now, as the writer knows
	batched int64         // settlements in it
	last    time.Duration // when the last settlement came
	due     time.Duration // when those that wait go out at the latest
	timed   bool          // somebody comes back when that is over
}

// now makes what is pending go out. It returns true if the writer does not know yet.
func (f *flushing) now() (tell bool) {
	tell = !f.urgent
	f.urgent = true
	return tell
}

// settled adds a settlement of a consumer with this prefetch. It returns true if the writer
// has to be told, and else how long to wait before expired is called, if that is not 0.
func (f *flushing) settled(at time.Duration, prefetch int64) (tell bool, wait time.Duration) {
	alone := at-f.last > f.delay
	f.last = at
	f.batched++
	starving := 2*f.batched >= prefetch // the broker is about to have no window left
	if f.delay <= 0 || alone || starving || f.idle() {
		return f.now(), 0
	}
	if f.batched == 1 {
		f.due = at + f.delay
	}
	if f.timed {
		return false, 0
	}
	f.timed = true
	return false, f.due - at
}

// rested is called when nothing more comes from the broker for now: settlements that wait for
// company go out if none can follow.
func (f *flushing) rested() (tell bool) {
	return f.batched > 0 && f.idle() && f.now()
}

// expired is called when the wait is over. It returns how much longer it takes: those that it
// began with may have left early.
func (f *flushing) expired(at time.Duration) (wait time.Duration) {
	f.timed = false
	if f.batched == 0 {
		return 0
	}
	if left := f.due - at; left > 0 {
		f.timed = true
		return left
	}
	f.urgent = true
	return 0
}

// taken is called when all that was pending goes out.
func (f *flushing) taken() { f.urgent, f.batched = false, 0 }
