package steadymq

import "sync"

// leases are the sessions to which a connection is lent. After a basic.cancel there are two for a
// while: the old one, whose handlers may still settle, and its successor. What one of them does to
// the connection waits until the other has given it back. A connection is retired when it must take
// no more sessions; it then ends with its last lease.
type leases struct {
	mu       sync.Mutex
	lent     int
	retired  error         // why the connection takes no more sessions; nil as long as it does
	returned chan struct{} // closed when the last lease has ended; nil until somebody waits for that
}

// retire is called for a call that no answer came to and that belongs to no lease. The connection
// takes no more sessions, and ends now if it is lent to none.
func (c *connection) retire(cause error) {
	if end := c.leases.retire(cause); end != nil {
		c.socket.Kill(end)
	}
}

func (l *leases) retire(cause error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.due(cause)
}

// due retires the connection if there is a cause, and returns why it has to end now, nil if it has
// not. It is called with mu held.
func (l *leases) due(cause error) error {
	if l.retired == nil {
		l.retired = cause
	}
	if l.lent > 0 {
		return nil
	}
	return l.retired
}

// lease is the use of a connection by one session, or by the try for one. Its methods are safe for
// concurrent use, and the first one called ends it.
type lease struct {
	conn  *connection
	ended bool // guarded by the mutex of the connection's leases
}

// lend lends the connection to one more session.
func (c *connection) lend() *lease {
	c.leases.mu.Lock()
	defer c.leases.mu.Unlock()
	c.leases.lent++
	return &lease{conn: c}
}

// giveBack ends the lease. A retired connection ends with its last one.
func (l *lease) giveBack() { l.end(nil) }

// giveUp ends the lease of a session one of whose calls has outlasted its limit, and retires the
// connection: the driver's calls take no context, so only the end of the connection ends them.
func (l *lease) giveUp(cause error) { l.end(cause) }

func (l *lease) end(cause error) {
	if end := l.conn.leases.take(l, cause); end != nil {
		go l.conn.socket.Kill(end) // a user's connection may hang in its Close
	}
}

// take takes a lease back, once. It returns why the connection has to end now, nil if it has not.
func (l *leases) take(one *lease, cause error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if one.ended {
		return nil
	}
	one.ended = true
	l.lent--
	if l.lent == 0 && l.returned != nil {
		close(l.returned)
		l.returned = nil
	}
	return l.due(cause)
}

// allReturned closes when the connection is lent to nobody any more. Only its owner asks, once,
// after it has been lent for the last time.
func (l *leases) allReturned() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	returned := make(chan struct{})
	if l.lent == 0 {
		close(returned)
		return returned
	}
	l.returned = returned
	return returned
}

// isRetired tells whether the connection takes no more sessions.
func (l *leases) isRetired() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.retired != nil
}
