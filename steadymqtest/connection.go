package steadymqtest

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"
)

// The states of a connection, in order.
const (
	stateHeader = iota // waits for the protocol header
	stateStart         // waits for start-ok
	stateTune          // waits for tune-ok
	stateVhost         // waits for connection.open
	stateOpen
	stateClosing // connection.close was sent: everything but close-ok is ignored
	stateEnded
)

// tlsAlert is what RabbitMQ answers to AMQP on its port for TLS: fatal, protocol_version.
const tlsAlert = "\x15\x03\x03\x00\x02\x02\x46"

// Times of RabbitMQ.
const (
	handshakeTimeout    = 10 * time.Second
	tlsHandshakeTimeout = 5 * time.Second
	closingTimeout      = 30 * time.Second
	loginSilence        = 3 * time.Second
)

// conn is the broker's side of one connection. One goroutine reads and, with TLS, one writes; everything but their blocking
// calls happens under the broker's mutex.
type conn struct {
	b      *Broker
	host   *Host
	link   *link
	record ConnectionRecord
	index  int // in the ledger, -1 without one

	state    int
	deaf     bool // a fault: nothing is answered or sent any more
	user     string
	frameMax int
	channels []*channel    // in the order they were opened
	cancels  bool          // the client knows basic.cancel from the server
	alarms   bool          // and connection.blocked
	resume   chan struct{} // not nil: blocked, closed when reading goes on

	out        []byte // not sent yet
	dirty      bool   // in the broker's list of flushes
	closeAfter bool   // close the socket once out is sent
	tls        *tls.Conn
	wakeUp     chan struct{} // for the writer of a TLS connection

	heartbeat   time.Duration
	beats       *time.Timer
	guard       *time.Timer // bounds handshake and closing
	sent, heard bool        // since the last look
	odd         bool        // every second beat looks at what was heard
	silent      int         // looks in a row at which nothing had been heard
}

// clientAddress is the address that the n-th client dials from.
func clientAddress(n int) string {
	return "10.0." + strconv.Itoa(n/50000) + ".1:" + strconv.Itoa(10000+n%50000)
}

// accept makes the broker's side of a link and starts to read from it.
func (b *Broker) accept(l *link) {
	b.lastConn++
	c := &conn{b: b, host: l.host, link: l, frameMax: frameMaxSize, index: -1}
	c.record = ConnectionRecord{ID: b.lastConn, Host: l.host.address, Dialed: b.now}
	if !b.ledger.off {
		c.index = len(b.ledger.connections)
		b.ledger.connections = append(b.ledger.connections, c.record)
	}
	b.conns = append(b.conns, c)
	l.host.conns = append(l.host.conns, c)
	c.guard = b.after(handshakeTimeout, func() {
		if c.state < stateOpen {
			c.lost("handshake timeout")
		}
	})
	c.stage(StageAccept)
	b.wg.Add(1)
	go c.serve()
}

// serve reads until the connection is over.
func (c *conn) serve() {
	defer c.b.wg.Done()
	nc, err := c.secure()
	if err == nil {
		err = c.readAll(nc)
	}
	c.b.lock()
	defer c.b.unlock()
	c.end(err.Error())
	c.closeAfter = true
	c.touch()
}

// secure does the TLS handshake, if the broker speaks TLS, and starts the writer.
func (c *conn) secure() (net.Conn, error) {
	if c.b.certs == nil {
		return c.link.broker, nil
	}
	c.b.lock()
	mute := c.deaf || c.stage(StageTLS)
	c.b.unlock()
	if mute {
		return c.link.broker, nil
	}
	t := tls.Server(c.link.broker, c.b.certs.server)
	ctx, cancel := context.WithTimeout(context.Background(), tlsHandshakeTimeout)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		if plain := (tls.RecordHeaderError{}); errors.As(err, &plain) && plain.Conn != nil {
			_, _ = plain.Conn.Write([]byte(tlsAlert)) // crypto/tls says nothing to what is no TLS, RabbitMQ does
		}
		return nil, fmt.Errorf("tls: %w", err)
	}
	c.b.lock()
	defer c.b.unlock()
	c.tls, c.wakeUp = t, make(chan struct{}, 1)
	c.b.wg.Add(1)
	go c.writeAll()
	return t, nil
}

func (c *conn) readAll(nc net.Conn) error {
	buf := make([]byte, 0, 16<<10)
	for {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, cap(buf))
		}
		n, err := nc.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		for more := n > 0; more; {
			done, resume := c.receive(buf)
			buf = buf[:copy(buf, buf[done:])]
			if more = resume != nil; more {
				<-resume
			}
		}
		if err != nil {
			return err
		}
	}
}

// writeAll sends what flush leaves in out. Only TLS needs it: a write to the network of the kit never blocks.
func (c *conn) writeAll() {
	defer c.b.wg.Done()
	var out []byte
	for range c.wakeUp {
		c.b.mu.Lock()
		out, c.out = c.out, out[:0]
		last := c.closeAfter
		c.b.mu.Unlock()
		if len(out) > 0 {
			c.tls.Write(out)
		}
		if last {
			c.tls.Close()
			return
		}
	}
}

// touch asks unlock to send what is in out.
func (c *conn) touch() {
	if !c.dirty {
		c.dirty = true
		c.b.flushes = append(c.b.flushes, c)
	}
}

// flush hands out to the network.
func (c *conn) flush() {
	c.dirty = false
	if c.tls != nil {
		select {
		case c.wakeUp <- struct{}{}:
		default:
		}
		return
	}
	if len(c.out) > 0 {
		c.link.broker.Write(c.out)
		c.out = c.out[:0]
		if cap(c.out) > 256<<10 {
			c.out = nil
		}
	}
	if c.closeAfter {
		c.link.broker.Close()
	}
}

// send appends to out with one of the append functions, unless the connection is past sending.
func (c *conn) send(write func(out []byte) []byte) {
	if c.deaf || c.state == stateEnded {
		return
	}
	c.out = write(c.out)
	c.sent = true
	c.touch()
}

func (c *conn) method(channel uint16, m method, args ...byte) {
	c.send(func(out []byte) []byte { return appendMethod(out, channel, m, args...) })
}

// receive handles every complete frame at the front of buf and says how much of it was used. A connection that is blocked
// gives a channel to wait for before the rest is handled.
func (c *conn) receive(buf []byte) (done int, resume chan struct{}) {
	c.b.lock()
	defer c.b.unlock()
	c.heard = true
	for c.resume == nil {
		if c.deaf || c.state == stateEnded {
			return len(buf), nil
		}
		if c.state == stateHeader {
			if len(buf)-done < len(protocolHeader) {
				return done, nil
			}
			c.header(buf[done : done+len(protocolHeader)])
			done += len(protocolHeader)
			continue
		}
		f, n, err := nextFrame(buf[done:], c.frameMax)
		if err != nil {
			c.fail(refuse(501, "%v", err), 0)
			return len(buf), nil
		}
		if n == 0 {
			return done, nil
		}
		done += n
		c.frame(f)
		c.b.deliver() // one frame at a time, so that the way the frames came in makes no difference
	}
	return done, c.resume
}

func (c *conn) header(p []byte) {
	if !bytes.Equal(p, protocolHeader) {
		c.send(func(out []byte) []byte { return append(out, protocolHeader...) })
		c.hangUp("bad protocol header")
		return
	}
	c.state = stateStart
	if c.stage(StageStart) {
		return
	}
	c.send(func(out []byte) []byte {
		out, mark := openMethod(out, 0, connectionStart)
		out = appendTable(append(out, 0, 9), c.b.serverProperties(c.host))
		out = appendLongstr(out, "PLAIN AMQPLAIN EXTERNAL")
		return closeFrame(appendLongstr(out, "en_US"), mark)
	})
}

func (b *Broker) serverProperties(h *Host) map[string]any {
	return map[string]any{
		"product":      "RabbitMQ",
		"version":      fmt.Sprintf("%d.%d.0", b.cfg.major, b.cfg.minor),
		"platform":     "steadymqtest",
		"cluster_name": "steadymqtest",
		"information":  "an in-process broker for tests",
		"node":         h.name,
		"capabilities": map[string]any{
			"publisher_confirms": true, "exchange_exchange_bindings": true, "basic.nack": true,
			"consumer_cancel_notify": true, "connection.blocked": true, "consumer_priorities": true,
			"authentication_failure_close": true, "per_consumer_qos": true, "direct_reply_to": false,
		},
	}
}

// frame handles one frame of any kind.
func (c *conn) frame(f frame) {
	if f.typ == frameHeartbeat {
		return
	}
	if f.channel == 0 {
		if f.typ != frameMethod {
			c.fail(refuse(505, "unexpected frame on channel 0"), 0)
			return
		}
		d := decoder{b: f.payload}
		c.control(method(d.long()), &d)
		return
	}
	if c.state != stateOpen {
		if c.state < stateOpen {
			c.fail(refuse(503, "channel %d used before the connection was open", f.channel), 0)
		}
		return
	}
	c.onChannel(f)
}

// control handles a method on channel 0.
func (c *conn) control(m method, d *decoder) {
	switch {
	case m == connectionClose:
		c.goodbye()
	case c.state == stateClosing:
		if m == connectionCloseOk {
			c.hangUp(c.record.Cause)
		}
	case m == connectionStartOk && c.state == stateStart:
		c.login(d)
	case m == connectionTuneOk && c.state == stateTune:
		c.tuned(d)
	case m == connectionOpen && c.state == stateVhost:
		c.open(d.shortstr())
	case m == connectionUpdateSecret && c.state == stateOpen:
		c.method(0, connectionUpdateSecretOk)
	default:
		c.fail(refuse(503, "method %d.%d not expected now", m.class(), m.id()), m)
	}
}

// goodbye answers the client's connection.close.
func (c *conn) goodbye() {
	c.release("closed by the client")
	c.state = stateClosing
	c.guard.Stop()
	c.guard = c.b.after(closingTimeout, func() { c.hangUp("closed by the client") }) // the client closes its socket first
	c.closeOk(func() { c.method(0, connectionCloseOk) })
}

// closeOk runs answer at once, late or never, as the host's faults say.
func (c *conn) closeOk(answer func()) {
	w := &c.host.wire
	switch {
	case w.noCloseOk:
	case w.closeOkDelay > 0:
		c.b.after(w.closeOkDelay, answer)
	default:
		answer()
	}
}

// login checks the credentials of start-ok.
func (c *conn) login(d *decoder) {
	properties := d.table()
	mechanism, response := d.shortstr(), d.longstr()
	if d.bad {
		c.fail(refuse(502, "start-ok cannot be read"), connectionStartOk)
		return
	}
	c.record.Name, _ = properties["connection_name"].(string)
	c.note()
	capabilities, _ := properties["capabilities"].(map[string]any)
	c.cancels, _ = capabilities["consumer_cancel_notify"].(bool)
	c.alarms, _ = capabilities["connection.blocked"].(bool)
	user, ok := c.b.authenticate(mechanism, response)
	if !ok || c.host.wire.refuseLogin {
		told, _ := capabilities["authentication_failure_close"].(bool)
		c.refuseLogin(mechanism, told)
		return
	}
	c.user = user
	c.state = stateTune
	if c.stage(StageTune) {
		return
	}
	heartbeat := uint16(c.b.cfg.heartbeat)
	c.method(0, connectionTune, 2047>>8, 2047&0xff, 0, frameMaxSize>>16, 0, 0, byte(heartbeat>>8), byte(heartbeat))
}

// refuseLogin tells clients that asked to be told, unless the host's way is another.
func (c *conn) refuseLogin(mechanism string, asked bool) {
	switch how := c.host.wire.loginRefusal; {
	case how == RefusalBy403, how == RefusalOfRabbitMQ && asked:
		c.fail(refuse(403, "Login was refused using authentication mechanism %s. For details see the broker logfile.", mechanism), 0)
	case how == RefusalByFIN:
		c.endLater("login refused", c.hangUp)
	case how == RefusalByReset:
		c.endLater("login refused", c.abort)
	default:
		c.distrust("login refused")
	}
}

// distrust is how RabbitMQ ends a connection it does not trust yet: its sockets are reset (linger {true, 0}), unless TLS ends them first.
func (c *conn) distrust(cause string) {
	if c.tls != nil {
		c.endLater(cause, c.hangUp)
		return
	}
	c.endLater(cause, c.abort)
}

// endLater keeps silent for three seconds, and then ends the socket.
func (c *conn) endLater(cause string, end func(cause string)) {
	c.state = stateClosing
	c.b.after(loginSilence, func() { end(cause) })
}

// authenticate returns the user that a response belongs to.
func (b *Broker) authenticate(mechanism, response string) (user string, ok bool) {
	var password string
	switch mechanism {
	case "EXTERNAL":
		return b.users[0], true
	case "PLAIN":
		if parts := bytes.Split([]byte(response), []byte{0}); len(parts) == 3 {
			user, password = string(parts[1]), string(parts[2])
		}
	case "AMQPLAIN":
		d := decoder{b: appendLongstr(nil, response)}
		t := d.table()
		user, _ = t["LOGIN"].(string)
		password, _ = t["PASSWORD"].(string)
	}
	want := b.cfg.users[user]
	return user, want != "" && want == password
}

func (c *conn) tuned(d *decoder) {
	d.short() // channel_max: not enforced
	if n := int(d.long()); n >= frameMinSize && n < frameMaxSize {
		c.frameMax = n
	}
	c.heartbeat = time.Duration(d.short()) * time.Second
	c.state = stateVhost
	c.startBeats()
	if minimum := 8192; c.frameMax < minimum && c.b.since(4, 1) {
		c.distrust("frame_max below 8192")
	}
}

func (c *conn) open(vhost string) {
	if r := c.host.wire.refuseOpen; r != nil {
		c.fail(r, connectionOpen)
		return
	}
	if vhost != "/" {
		c.fail(refuse(530, "vhost %s not found", vhost), connectionOpen)
		return
	}
	if c.stage(StageOpen) {
		return
	}
	c.state = stateOpen
	c.guard.Stop()
	c.record.Opened = c.b.now
	c.note()
	c.method(0, connectionOpenOk, 0)
	if call := c.b.cfg.hooks.Opened; call != nil {
		record := c.record
		c.b.events = append(c.b.events, func() { call(record) })
	}
	c.stage(StageOpened)
}

// since reports whether the broker behaves as this version of RabbitMQ or a later one.
func (b *Broker) since(major, minor int) bool { return b.cfg.since(major, minor) }

func (c *config) since(major, minor int) bool {
	return c.major > major || c.major == major && c.minor >= minor
}

// note copies the record into the ledger.
func (c *conn) note() {
	if c.index >= 0 {
		c.b.ledger.connections[c.index] = c.record
	}
}

// startBeats begins to send heartbeats and to look for the client's.
func (c *conn) startBeats() {
	if c.heartbeat > 0 {
		c.beats = c.b.after(c.heartbeat/2, c.beat)
	}
}

// beat runs twice per heartbeat, as RabbitMQ's sender does: it sends one if nothing else was sent. Every second time it looks
// whether anything came; twice in a row nothing is the end: two to three heartbeats after the client's last byte.
func (c *conn) beat() {
	if c.state == stateEnded {
		return
	}
	if !c.sent {
		c.send(appendHeartbeat)
	}
	c.sent = false
	if c.odd = !c.odd; !c.odd && c.resume == nil {
		c.silent++
		if c.heard {
			c.silent = 0
		}
		c.heard = false
		if c.silent > 1 {
			c.lost("missed heartbeats from client, timeout: " + c.heartbeat.String())
			return
		}
	}
	c.beats.Reset(c.heartbeat / 2)
}

// fail sends connection.close and waits for close-ok; everything that the connection held is free at once.
func (c *conn) fail(r *refusal, cause method) {
	if c.state >= stateClosing {
		return
	}
	text := replyText(r.code, r.text)
	c.send(func(out []byte) []byte { return appendClose(out, 0, connectionClose, r.code, text, cause) })
	c.release(fmt.Sprintf("%d %s", r.code, text))
	c.state = stateClosing
	c.guard.Stop()
	c.guard = c.b.after(closingTimeout, func() { c.hangUp(c.record.Cause) })
}

func appendClose(out []byte, channel uint16, m method, code int, text string, cause method) []byte {
	out, mark := openMethod(out, channel, m)
	out = append(out, byte(code>>8), byte(code))
	out = appendShortstr(out, text)
	out = append(out, byte(cause.class()>>8), byte(cause.class()), byte(cause.id()>>8), byte(cause.id()))
	return closeFrame(out, mark)
}

// hangUp closes the socket after everything was sent.
func (c *conn) hangUp(cause string) {
	c.end(cause)
	c.closeAfter = true
	c.touch()
}

// lost gives up a client that does not say anything any more; a connection that hangs does that without a word.
func (c *conn) lost(cause string) {
	if c.deaf {
		c.giveUp(cause)
		return
	}
	c.hangUp(cause)
}

// giveUp frees what the connection holds and counts it no more, but leaves the socket as it is.
func (c *conn) giveUp(cause string) {
	c.release(cause)
	c.state = max(c.state, stateClosing)
}

// abort closes the socket by an RST.
func (c *conn) abort(cause string) {
	c.link.reset()
	c.end(cause)
	c.out = c.out[:0]
	c.closeAfter = true
	c.touch()
}

// release gives back what the connection holds: unsettled messages, consumers, exclusive queues.
func (c *conn) release(cause string) {
	if c.record.Cause != "" {
		return
	}
	c.record.Cause, c.record.Ended = cause, c.b.now
	c.note()
	for _, ch := range slices.Clone(c.channels) {
		ch.end(cause)
	}
	for _, q := range c.b.sortedQueues() {
		if q.owner == c {
			q.delete("its connection ended")
		}
	}
	if call := c.b.cfg.hooks.Closed; call != nil && !c.record.Opened.IsZero() {
		record := c.record
		c.b.events = append(c.b.events, func() { call(record) })
	}
}

// end forgets the connection.
func (c *conn) end(cause string) {
	if c.state == stateEnded {
		return
	}
	c.release(cause)
	c.state = stateEnded
	c.guard.Stop()
	if c.beats != nil {
		c.beats.Stop()
	}
	if c.resume != nil {
		close(c.resume)
		c.resume = nil
	}
	same := func(other *conn) bool { return other == c }
	c.b.conns = slices.DeleteFunc(c.b.conns, same)
	c.host.conns = slices.DeleteFunc(c.host.conns, same)
}

// block stops reading from a connection that publishes, and tells it if it wants to be told.
func (c *conn) block(reason string) {
	if c.resume != nil || c.state != stateOpen {
		return
	}
	if c.alarms {
		c.send(func(out []byte) []byte {
			out, mark := openMethod(out, 0, connectionBlocked)
			return closeFrame(appendShortstr(out, reason), mark)
		})
	}
	c.resume = make(chan struct{})
}

func (c *conn) unblock() {
	if c.resume == nil {
		return
	}
	if c.alarms {
		c.method(0, connectionUnblocked)
	}
	close(c.resume)
	c.resume = nil
}
