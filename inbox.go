package steadymq

import (
	"sync"
	"sync/atomic"

	amqp "github.com/rabbitmq/amqp091-go"
)

// inbox is what the broker has delivered and no worker has taken yet.
type inbox struct {
	next chan *Delivery

	mu      sync.Mutex
	closed  bool
	rest    []*Delivery // more than the prefetch, or after the inbox was shut
	cleared bool        // it was cleared
	more    atomic.Bool // rest is not empty
}

// receiver is what the wire gives the messages of one subscription to. Only the goroutine that
// reads touches it, so it is no part of what the workers read: on one cache line with that it
// would cost half of the throughput.
type receiver struct {
	inbox   *inbox
	aside   *aside
	message *Delivery // the one that is being read
}

// New implements wire.Receiver.
func (r *receiver) New() *amqp.Delivery {
	r.message = newDelivery()
	return &r.message.Delivery
}

// Put implements wire.Receiver.
func (r *receiver) Put(*amqp.Delivery) { r.inbox.put(r.message) }

// PutAside implements wire.Receiver.
func (r *receiver) PutAside(d *amqp.Delivery, size uint64, reason error) {
	r.aside.put(r.message, &MessageError{
		Exchange: d.Exchange, RoutingKey: d.RoutingKey, DeliveryTag: d.DeliveryTag, Redelivered: d.Redelivered,
		Size: size, Err: reason,
	})
}

func newInbox(size int) *inbox {
	return &inbox{next: make(chan *Delivery, size)}
}

// put never blocks. Stream queues deliver whole chunks, so the prefetch is no bound.
func (i *inbox) put(d *Delivery) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.closed && len(i.rest) == 0 {
		select {
		case i.next <- d:
			return
		default:
		}
	}
	i.rest = append(i.rest, d)
	i.more.Store(true)
	i.refill() // a worker may have made room before it could see that there is more
}

// take waits for a delivery. It returns false once the inbox is shut and empty.
func (i *inbox) take() (*Delivery, bool) {
	d, ok := <-i.next
	if ok && i.more.Load() {
		i.mu.Lock()
		i.refill()
		i.mu.Unlock()
	}
	return d, ok
}

// refill is called with mu held.
func (i *inbox) refill() {
	for len(i.rest) > 0 && !i.closed {
		select {
		case i.next <- i.rest[0]:
			i.rest[0] = nil // the array outlives it
			i.rest = i.rest[1:]
		default:
			return
		}
	}
	if len(i.rest) == 0 {
		i.rest = nil
	}
	i.more.Store(len(i.rest) > 0)
}

// takeBack takes what a worker does not start. It returns false if that is too late
// for clear.
func (i *inbox) takeBack(d *Delivery) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.cleared {
		return false
	}
	i.rest = append(i.rest, d)
	i.more.Store(true)
	return true
}

// waiting returns how many deliveries no worker has taken.
func (i *inbox) waiting() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.next) + len(i.rest)
}

// close lets waiting workers go. What is left, and what still comes, is for clear.
func (i *inbox) close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.closed {
		i.closed = true
		close(i.next)
	}
}

// clear empties a closed inbox.
func (i *inbox) clear() []*Delivery {
	i.mu.Lock()
	defer i.mu.Unlock()
	var all []*Delivery
	for d := range i.next {
		all = append(all, d)
	}
	all, i.rest, i.cleared = append(all, i.rest...), nil, true
	return all
}

// unreadable is a message that no handler can be given, and why.
type unreadable struct {
	delivery *Delivery
	err      *MessageError
}

// aside is where the socket's Read puts what is unreadable. It goes past the workers,
// who may all be busy, to the session.
type aside struct {
	more chan struct{} // has a value once there is something

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
