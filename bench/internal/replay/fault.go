package replay

import (
	"fmt"
	"net"
	"time"
)

// The faults a server can play on all its connections.
const (
	FaultReset        = "rst"          // the path answers with a TCP reset
	FaultFIN          = "fin"          // the broker's process ends: the socket is closed
	FaultConnClose    = "conn-close"   // connection.close 320, an operator's stop
	FaultChannelClose = "chan-close"   // channel.close 406, an error of the channel
	FaultCancel       = "basic-cancel" // basic.cancel, the queue's leader moved
	FaultRestart      = "restart"      // reset, nobody listens for the outage, then back
)

// Faults lists them in the order of a report.
var Faults = []string{FaultReset, FaultFIN, FaultConnClose, FaultChannelClose, FaultCancel, FaultRestart}

// Inject plays the fault and returns once it is on the wire; for a restart,
// once the server listens again after the outage.
func (s *Server) Inject(fault string, outage time.Duration) error {
	if fault == FaultRestart {
		return s.restart(outage)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for c, tcp := range s.conns {
		if err := c.inject(fault, tcp); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) restart(outage time.Duration) error {
	s.Close()
	time.Sleep(outage)
	// Meanwhile the port may have become a client's own end of another connection.
	err := s.listen(s.addr)
	for end := time.Now().Add(outage); err != nil && time.Now().Before(end); err = s.listen(s.addr) {
		time.Sleep(time.Millisecond)
	}
	return err
}

func (c *conn) inject(fault string, tcp *net.TCPConn) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch fault {
	case FaultReset:
		reset(tcp)
	case FaultFIN:
		c.dead = true
		return tcp.CloseWrite()
	case FaultConnClose:
		c.reply(0, connectionClose, closeArgs(320, "CONNECTION_FORCED - broker forced connection closure"))
		c.flush()
		c.dead = true
	case FaultChannelClose, FaultCancel:
		for _, ch := range c.channels {
			c.injectChannel(fault, ch)
		}
		c.flush()
	default:
		return fmt.Errorf("replay: no fault %q", fault)
	}
	return nil
}

func (c *conn) injectChannel(fault string, ch *channel) {
	if ch.sub == nil {
		return
	}
	tag := ch.sub.tag
	ch.sub = nil
	if fault == FaultCancel {
		c.reply(ch.id, basicCancel, append(appendShortstr(nil, tag), 1))
		return
	}
	c.reply(ch.id, channelClose, closeArgs(406, "PRECONDITION_FAILED - delivery acknowledgement timed out"))
}

// reset makes the peer see a reset, not an orderly end.
func reset(tcp *net.TCPConn) {
	_ = tcp.SetLinger(0)
	_ = tcp.Close()
}
