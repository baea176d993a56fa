package steadymq

import "sync"

// tenants are the sessions that live on a connection. After a basic.cancel there are two for a
// while: the old one, whose handlers may still settle, and its successor. What one of them does
// to the connection has to wait until the other has moved out.
type tenants struct {
	mu    sync.Mutex
	count int
	worn  error         // why the connection is to end with its last tenant; nil if it is not
	empty chan struct{} // closed when the last one has moved out; nil until somebody waits
}

// wear notes that c does not answer a call that is nobody's stay. It takes no more sessions, and
// ends now unless one lives there.
func (c *connection) wear(cause error) {
	if end := c.tenants.wear(cause); end != nil {
		c.socket.Kill(end)
	}
}

func (t *tenants) wear(cause error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.spend(cause)
}

// spend is called with mu held.
func (t *tenants) spend(cause error) error {
	if t.worn == nil {
		t.worn = cause
	}
	if t.count > 0 {
		return nil
	}
	return t.worn
}

// tenancy is the stay of one session, or of the try for one. Its methods are safe for
// concurrent use.
type tenancy struct {
	conn *connection
	left bool // under the mutex of the connection's tenants
}

// moveIn notes that somebody lives on c from now on.
func (c *connection) moveIn() *tenancy {
	c.tenants.mu.Lock()
	defer c.tenants.mu.Unlock()
	c.tenants.count++
	return &tenancy{conn: c}
}

// moveOut ends the stay. A connection that is worn ends with its last tenant.
func (t *tenancy) moveOut() { t.leave(nil) }

// giveUp ends the stay of a tenant one of whose calls has outlasted its limit. The driver's
// calls take no context, and only the end of the connection ends them; so it takes no more
// sessions, and ends now unless somebody else lives there.
func (t *tenancy) giveUp(cause error) { t.leave(cause) }

func (t *tenancy) leave(cause error) {
	if end := t.conn.tenants.remove(t, cause); end != nil {
		go t.conn.socket.Kill(end) // a user's connection may hang in its Close
	}
}

// remove takes a tenant away, once. It returns why the connection has to end now, nil if it has
// not.
func (t *tenants) remove(one *tenancy, cause error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if one.left {
		return nil
	}
	one.left = true
	t.count--
	if t.count == 0 && t.empty != nil {
		close(t.empty)
		t.empty = nil
	}
	return t.spend(cause)
}

// vacated closes when nobody lives on the connection any more. Only its owner asks, once, after
// the last has moved in.
func (t *tenants) vacated() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	empty := make(chan struct{})
	if t.count == 0 {
		close(empty)
		return empty
	}
	t.empty = empty
	return empty
}

func (t *tenants) wornOut() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.worn != nil
}
