package steadymq

import (
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// inbox is what the broker has delivered and no worker has taken yet. The goroutine that reads from
// the socket puts, workers take, and the session closes and clears it.
type inbox struct {
	first atomic.Pointer[stretch] // where workers take
	front atomic.Pointer[putBack] // what was taken and comes next all the same; only of batches
	most  int                     // the longest stretch
	hire  func() (all bool)       // called for a delivery that no worker was waiting for

	staffed atomic.Bool // there are no more workers to be hired

	mu      sync.Mutex
	last    *stretch    // where put puts
	closed  bool        // nothing is put into last any more
	late    []*Delivery // what came, or came back, after that
	cleared bool        // clear was called
}

// stretch is a part of the queue in an inbox. A queue begins with a short one, because a consumer
// may be idle for hours. Where a stretch is full a longer one follows it, up to the prefetch; there
// may be several of these, for stream queues deliver whole chunks.
type stretch struct {
	waiting chan *Delivery // closed once another stretch follows, or the inbox is closed
	next    *stretch       // set before waiting is closed
}

func newStretch(size int) *stretch { return &stretch{waiting: make(chan *Delivery, size)} }

// shortStretch is how many deliveries an inbox has room for in the beginning.
const shortStretch = 4

func newInbox(prefetch int, hire func() (all bool)) *inbox {
	i := &inbox{most: max(prefetch, shortStretch), hire: hire, last: newStretch(shortStretch)}
	i.first.Store(i.last)
	return i
}

// put never blocks.
func (i *inbox) put(d *Delivery) {
	if i.add(d) && i.hire() {
		i.staffed.Store(true)
	}
}

// add reports whether d, or another delivery, waits for a worker that may still start.
func (i *inbox) add(d *Delivery) (waits bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		i.late = append(i.late, d)
		return false
	}
	select {
	case i.last.waiting <- d:
	default:
		i.lengthen()
		i.last.waiting <- d
	}
	return !i.staffed.Load() && len(i.last.waiting) > 0 // a worker that waits takes it at once
}

// lengthen adds a stretch behind the last one, which is full. It is called with mu held.
func (i *inbox) lengthen() {
	full := i.last
	i.last = newStretch(min(2*cap(full.waiting), i.most))
	full.next = i.last
	close(full.waiting)
}

// take waits for a delivery. It returns false once the inbox is closed and empty.
func (i *inbox) take() (*Delivery, bool) {
	for {
		s := i.first.Load()
		if d, ok := <-s.waiting; ok {
			return d, true
		}
		if !i.advance(s) {
			return nil, false
		}
	}
}

// advance goes on from a stretch that is closed and empty. It returns false if none follows.
func (i *inbox) advance(s *stretch) bool {
	if s.next == nil {
		return false
	}
	i.first.CompareAndSwap(s, s.next) // nobody takes from a later one before this one is empty
	return true
}

// takeBefore is take with a limit: once that has a value it returns nil. It is for one worker at a
// time.
func (i *inbox) takeBefore(limit <-chan time.Time) (d *Delivery, open bool) {
	if first := i.front.Load(); first != nil && i.front.CompareAndSwap(first, first.next) {
		return first.delivery, true
	}
	for {
		s := i.first.Load()
		select {
		case d, open = <-s.waiting: // the usual case, and faster without the limit
		default:
			select {
			case d, open = <-s.waiting:
			case <-limit:
				return nil, true
			}
		}
		if open {
			return d, true
		}
		if !i.advance(s) {
			return nil, false
		}
	}
}

// putBack is a delivery that was taken, and what comes behind it.
type putBack struct {
	delivery *Delivery
	next     *putBack
}

// putFirst takes back what was taken last, to be taken next. It returns false if clear has been
// called already. Only who would take calls it, so nobody takes meanwhile.
func (i *inbox) putFirst(d *Delivery) bool {
	i.mu.Lock()
	cleared := i.cleared
	if !cleared {
		i.front.Store(&putBack{d, i.front.Load()})
	}
	i.mu.Unlock()
	if !cleared && i.hire() { // for a worker that has nothing to do
		i.staffed.Store(true)
	}
	return !cleared
}

// next returns the channel that the next delivery comes from. Only the try for a session uses it,
// before any worker takes.
func (i *inbox) next() <-chan *Delivery { return i.first.Load().waiting }

// takeBack takes a delivery back that a worker does not start. It returns false if clear has been
// called already.
func (i *inbox) takeBack(d *Delivery) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.cleared {
		return false
	}
	i.late = append(i.late, d)
	return true
}

// waiting returns how many deliveries no worker has taken.
func (i *inbox) waiting() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	n := len(i.late)
	for back := i.front.Load(); back != nil; back = back.next {
		n++
	}
	for s := i.first.Load(); s != nil; s = s.next {
		n += len(s.waiting)
	}
	return n
}

// close ends the wait of workers. clear returns what is left, and what still arrives.
func (i *inbox) close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.closed {
		i.closed = true
		close(i.last.waiting)
	}
}

// clear empties a closed inbox.
func (i *inbox) clear() []*Delivery {
	i.mu.Lock()
	defer i.mu.Unlock()
	var all []*Delivery
	for back := i.front.Swap(nil); back != nil; back = back.next {
		all = append(all, back.delivery)
	}
	for s := i.first.Load(); s != nil; s = s.next {
		for d := range s.waiting {
			all = append(all, d)
		}
	}
	all, i.late, i.cleared = append(all, i.late...), nil, true
	return all
}

// unreadable is a message that no handler can be given, and why.
type unreadable struct {
	delivery *Delivery
	err      *MessageError
}

// aside is where the goroutine that reads from the socket puts unreadable messages. They go to the
// session and not to the workers, who may all be busy.
type aside struct {
	more chan struct{} // has a value once all is not empty

	mu  sync.Mutex
	all []unreadable
}

func newAside() *aside { return &aside{more: make(chan struct{}, 1)} }

// put never blocks.
func (a *aside) put(d *Delivery, err *MessageError) {
	a.mu.Lock()
	a.all = append(a.all, unreadable{d, err})
	a.mu.Unlock()
	select {
	case a.more <- struct{}{}:
	default:
	}
}

func (a *aside) take() []unreadable {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := a.all
	a.all = nil
	return all
}

// arrivals note when a delivery arrives, and count it.
type arrivals interface {
	arrive(d *Delivery, count *uint64)
}

// receiver is where the wire gives the messages of one subscription. It does not remember the
// message that is being read: a consumer may be idle for hours, and would keep its last message as
// long.
type receiver struct {
	inbox   *inbox
	aside   *aside
	config  *config
	order   arrivals
	arrived uint64 // deliveries that were put, where there is an order
}

// Refuse implements wire.Refuser.
func (r *receiver) Refuse(size uint64) error { return r.config.tooLarge(size) }

// New implements wire.Receiver.
func (r *receiver) New() *amqp.Delivery {
	d := newDelivery()
	d.Acknowledger = d.fence // leads back to all of it, see wholeOf
	return &d.Delivery
}

// wholeOf returns the delivery whose message New has returned.
func wholeOf(message *amqp.Delivery) *Delivery { return &message.Acknowledger.(*fence).origin }

// Put implements wire.Receiver.
func (r *receiver) Put(d *amqp.Delivery) {
	if r.order != nil {
		r.order.arrive(wholeOf(d), &r.arrived)
	}
	r.inbox.put(wholeOf(d))
}

// PutAside implements wire.Receiver.
func (r *receiver) PutAside(d *amqp.Delivery, size uint64, reason error) {
	r.aside.put(wholeOf(d), &MessageError{
		Exchange: d.Exchange, RoutingKey: d.RoutingKey, DeliveryTag: d.DeliveryTag, Redelivered: d.Redelivered,
		Size: size, Err: reason,
	})
}
