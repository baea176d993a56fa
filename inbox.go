package steadymq

import (
	"sync"
	"sync/atomic"

	amqp "github.com/rabbitmq/amqp091-go"
)

// inbox is what the broker has delivered and no worker has taken yet. The goroutine that reads from
// the socket puts, workers take, and the session closes and clears it.
type inbox struct {
	next chan *Delivery

	mu      sync.Mutex
	closed  bool
	rest    []*Delivery // what does not fit into next, or came after close
	cleared bool        // clear was called
	more    atomic.Bool // rest is not empty
}

func newInbox(size int) *inbox {
	return &inbox{next: make(chan *Delivery, size)}
}

// put never blocks. Stream queues deliver whole chunks, so there may be more than the prefetch.
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
	i.refill() // a worker may have made room before more was set
}

// take waits for a delivery. It returns false once the inbox is closed and empty.
func (i *inbox) take() (*Delivery, bool) {
	d, ok := <-i.next
	if ok && i.more.Load() {
		i.mu.Lock()
		i.refill()
		i.mu.Unlock()
	}
	return d, ok
}

// refill moves deliveries from rest to next. It is called with mu held.
func (i *inbox) refill() {
	for len(i.rest) > 0 && !i.closed {
		select {
		case i.next <- i.rest[0]:
			i.rest[0] = nil // the array outlives the delivery
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

// takeBack takes a delivery back that a worker does not start. It returns false if clear has been
// called already.
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

// close ends the wait of workers. clear returns what is left, and what still arrives.
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

// receiver is where the wire gives the messages of one subscription. It does not remember the message
// that is being read: a consumer may be idle for hours, and would keep its last message as long.
type receiver struct {
	inbox *inbox
	aside *aside
}

// New implements wire.Receiver.
func (r *receiver) New() *amqp.Delivery {
	d := newDelivery()
	d.Acknowledger = d.fence // leads back to all of it, see wholeOf
	return &d.Delivery
}

// wholeOf returns the delivery whose message New has returned.
func wholeOf(message *amqp.Delivery) *Delivery { return &message.Acknowledger.(*fence).origin }

// Put implements wire.Receiver.
func (r *receiver) Put(d *amqp.Delivery) { r.inbox.put(wholeOf(d)) }

// PutAside implements wire.Receiver.
func (r *receiver) PutAside(d *amqp.Delivery, size uint64, reason error) {
	r.aside.put(wholeOf(d), &MessageError{
		Exchange: d.Exchange, RoutingKey: d.RoutingKey, DeliveryTag: d.DeliveryTag, Redelivered: d.Redelivered,
		Size: size, Err: reason,
	})
}
