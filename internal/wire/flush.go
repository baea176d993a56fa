package wire

import "time"

// flushPolicy decides when what is pending goes out to the broker. Everything but a settlement goes
// out at once, and takes along what waits. Nobody waits for an answer to a settlement, so it may
// wait while others that can share its system call are on their way, and the broker has window
// left.
//
// It is only told what happens, and when; its times count from the start of the socket. The mutex
// of outbound guards it.
type flushPolicy struct {
	delay time.Duration // the longest wait of a settlement; none waits at 0
	idle  func() bool   // no further settlement can be on its way

	requested bool          // what is pending goes out now, and the writer knows
	batched   int64         // settlements in it
	last      time.Duration // when the last settlement came
	due       time.Duration // when those that wait go out at the latest
	timerRuns bool          // expired will be called
}

// flushNow makes what is pending go out. It returns true if the writer has to be woken for it.
func (f *flushPolicy) flushNow() (wake bool) {
	wake = !f.requested
	f.requested = true
	return wake
}

// settled adds a settlement of a consumer with this prefetch. It returns true if the writer has to
// be woken. Otherwise wait, unless it is 0, is how long the caller has to wait before it calls
// expired.
func (f *flushPolicy) settled(at time.Duration, prefetch int64) (wake bool, wait time.Duration) {
	alone := at-f.last > f.delay
	f.last = at
	f.batched++
	starving := 2*f.batched >= prefetch // the broker is about to have no window left
	if f.delay <= 0 || alone || starving || f.idle() {
		return f.flushNow(), 0
	}
	if f.requested { // it goes along, so there is nothing to wait for
		return false, 0
	}
	if f.batched == 1 {
		f.due = at + f.delay
	}
	if f.timerRuns {
		return false, 0
	}
	f.timerRuns = true
	return false, f.due - at
}

// flushIfIdle is called when nothing more comes from the broker for now: settlements that wait for
// company go out if none can follow.
func (f *flushPolicy) flushIfIdle() (wake bool) {
	return f.batched > 0 && f.idle() && f.flushNow()
}

// expired is called when the wait is over. It returns how much longer it takes: the settlements for
// which the wait began may have left early.
func (f *flushPolicy) expired(at time.Duration) (wait time.Duration) {
	f.timerRuns = false
	if f.batched == 0 {
		return 0
	}
	if left := f.due - at; left > 0 {
		f.timerRuns = true
		return left
	}
	f.requested = true
	return 0
}

// taken is called when everything pending goes out.
func (f *flushPolicy) taken() { f.requested, f.batched = false, 0 }
