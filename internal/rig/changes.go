package rig

import (
	"slices"
	"sync"
	"time"

	"github.com/steadymq/steadymq"
)

// changes are those of a consumer's state so far.
type changes struct {
	mu  sync.Mutex
	all []steadymq.StateChange
}

// Changed notes a change of state; the consumers of the rig have it as their hook.
func (r *Rig) Changed(c steadymq.StateChange) {
	r.changes.mu.Lock()
	defer r.changes.mu.Unlock()
	r.changes.all = append(r.changes.all, c)
}

// Changes returns the changes of state so far.
func (r *Rig) Changes() []steadymq.StateChange {
	r.changes.mu.Lock()
	defer r.changes.mu.Unlock()
	return slices.Clone(r.changes.all)
}

// LastChange returns the last change of state.
func (r *Rig) LastChange() steadymq.StateChange {
	all := r.Changes()
	return all[len(all)-1]
}

// Causes returns why the consumer went into backoff, in order.
func (r *Rig) Causes() (causes []error) {
	for _, c := range r.Changes() {
		if c.To == steadymq.Backoff {
			causes = append(causes, c.Cause)
		}
	}
	return causes
}

// ShortestWait returns the shortest time the consumer has waited in backoff.
func (r *Rig) ShortestWait() time.Duration {
	shortest := time.Hour
	for _, c := range r.Changes() {
		if c.To == steadymq.Backoff {
			shortest = min(shortest, c.RetryIn)
		}
	}
	return shortest
}

// LongestWait returns the longest time the consumer has waited in backoff.
func (r *Rig) LongestWait() (longest time.Duration) {
	for _, c := range r.Changes() {
		longest = max(longest, c.RetryIn)
	}
	return longest
}

// LastWait returns the wait of the last backoff.
func (r *Rig) LastWait() (wait time.Duration) {
	for _, c := range r.Changes() {
		if c.To == steadymq.Backoff {
			wait = c.RetryIn
		}
	}
	return wait
}

// Outage returns how long the consumer was not consuming, the last time.
func (r *Rig) Outage() time.Duration {
	var lost, back time.Time
	for _, c := range r.Changes() {
		if c.From == steadymq.Consuming {
			lost = c.Time
		}
		if c.To == steadymq.Consuming {
			back = c.Time
		}
	}
	return back.Sub(lost)
}

// HostInUse returns the index of the host the consumer said it consumes from.
func (r *Rig) HostInUse() int {
	last := r.LastChange().Host
	for i := range len(r.Broker.URLs()) {
		if r.Broker.Host(i).Addr() == last {
			return i
		}
	}
	return -1
}
