package wire

import (
	"encoding/binary"
	"slices"
	"sync"
)

// Queues are those that were declared on the channels of one user of a connection and live as long
// as that does: whoever leaves a connection that lives on has to delete them. Its methods are safe
// for concurrent use.
type Queues struct {
	mu       sync.Mutex // for memory only
	names    []string
	orphaned func(name string)
}

// OnOrphan lets f be told of a queue that the broker has named when its channel had been given up,
// so that nobody has learnt the name. It runs on the goroutine that reads the socket, so it must not
// block.
func (q *Queues) OnOrphan(f func(name string)) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.orphaned = f
}

// Names are those of the queues.
func (q *Queues) Names() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.names)
}

// Any reports whether there is a queue.
func (q *Queues) Any() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.names) > 0
}

func (q *Queues) forget(name string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.names = slices.DeleteFunc(q.names, func(one string) bool { return one == name })
}

// add takes a queue that the broker has confirmed.
func (q *Queues) add(name string, orphan bool) {
	q.mu.Lock()
	if !slices.Contains(q.names, name) {
		q.names = append(q.names, name)
	}
	tell := q.orphaned
	q.mu.Unlock()
	if orphan && tell != nil {
		tell(name)
	}
}

// Report makes the channel add to q what is declared on it. It is called before the channel is
// opened.
func (c *Channel) Report(q *Queues) {
	o := &c.socket.out
	o.mu.Lock()
	defer o.mu.Unlock()
	c.queues = q
}

// declares are the queue.declares of a channel that the broker has not answered, in their order,
// which is that of the answers.
type declares struct {
	of      *Queues
	waiting []declared
}

type declared struct {
	exclusive bool // it makes a queue that lives as long as the connection
	unnamed   bool // the broker is to name it
}

// learn takes a queue.declare that the driver writes: a reserved short and the queue's name stand
// before the bits. All of it is in p: nobody publishes on the channel at the same time.
func (d *declares) learn(p []byte) {
	const passive, exclusive, noWait = 1, 4, 16
	in := decoder{b: p[methodHead:]}
	in.short()
	name := string(in.shortstr())
	bits := in.octet()
	one := declared{exclusive: bits&(passive|exclusive) == exclusive, unnamed: name == ""}
	if one.exclusive { // unless the broker says so once more it is another's by now
		d.of.forget(name)
	}
	if bits&noWait == 0 {
		d.waiting = append(d.waiting, one)
	}
}

// answered takes the broker's queue.declare-ok on a channel, which may have been given up.
func (o *outbound) answered(channel uint16, p []byte, givenUp bool) {
	o.mu.Lock()
	n := o.channels.numbers[channel]
	var d *declares
	switch {
	case n == nil:
	case givenUp || n.declares == nil && n.late != nil: // or it was given up this very moment
		d, givenUp = n.late, true
	default:
		d = n.declares
	}
	if d == nil || len(d.waiting) == 0 {
		o.mu.Unlock()
		return
	}
	one := d.waiting[0]
	d.waiting = d.waiting[1:]
	o.mu.Unlock()
	if !one.exclusive {
		return
	}
	in := decoder{b: p[methodHead:]}
	d.of.add(string(in.shortstr()), givenUp && one.unnamed)
}

// answers reports whether a frame is a queue.declare-ok, which is to be seen whole.
func (in *inbound) answers(b []byte, whole uint64, givenUp bool) (complete bool) {
	if methodID(b) != queueDeclareOk || whole > firstFrame {
		return true
	}
	if uint64(len(b)) < whole {
		return false
	}
	in.socket.out.answered(binary.BigEndian.Uint16(b[1:]), b[:whole-1], givenUp)
	return true
}
