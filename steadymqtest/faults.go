package steadymqtest

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Stage is a step of a connection's life at which [Faults.HangAt] and [Faults.DropAt] strike: instead of the answer that the step
// would have had.
type Stage int

const (
	StageAccept  Stage = iota // TCP is connected; nothing more ever happens (a frozen broker, whose kernel still accepts)
	StageTLS                  // the TLS handshake is not answered
	StageStart                // the protocol header is not answered by connection.start
	StageTune                 // start-ok is not answered by connection.tune
	StageOpen                 // connection.open is not answered by open-ok
	StageOpened               // open-ok is sent, and then nothing more
	StageChannel              // channel.open is not answered
	StageDeclare              // queue.declare is not answered
	StageQos                  // basic.qos is not answered
	StageConsume              // basic.consume is not answered
	numStages
)

func (s Stage) String() string {
	names := [...]string{"accept", "tls", "start", "tune", "open", "opened", "channel", "declare", "qos", "consume"}
	if s < 0 || int(s) >= len(names) {
		return fmt.Sprintf("Stage(%d)", int(s))
	}
	return names[s]
}

// Stages returns all stages in order, for tests that go through them.
func Stages() []Stage {
	all := make([]Stage, numStages)
	for i := range all {
		all[i] = Stage(i)
	}
	return all
}

// wireFaults is what a host does wrong in the protocol.
type wireFaults struct {
	hang, drop    [numStages]bool
	refuseLogin   bool
	loginRefusal  LoginRefusal // no fault: it is not healed
	refuseOpen    *refusal
	refuseConsume *refusal
	refuseDeclare *refusal
	refusePublish *refusal
	unroutable    bool
	nackConfirms  bool
	loseConfirms  bool
	confirmDelay  time.Duration // 0: off
	lateConsume   time.Duration // 0: off
	closeOkDelay  time.Duration
	noCloseOk     bool
	down          bool
	cutOff        map[string][2]int // messages and consumers by queue, when the host was cut off; nil if it is not
}

// Faults are the failures that a broker, or the network before it, can be made to show. Those of [Broker] strike all hosts, those
// of a [Host] its own address and connections. Each takes effect before the call returns, for connections that are open and for
// those to come, unless its comment says otherwise. A fault lasts until it is taken back by its opposite or by [Faults.Heal]; several may be on at a
// time. All may be called by any number of goroutines; none blocks.
type Faults struct {
	b     *Broker
	hosts []*Host
	name  string // not empty: only connections whose name begins so, see Named
}

// each runs f for every host under the broker's lock.
func (f *Faults) each(do func(*Host)) {
	f.b.lock()
	defer f.b.unlock()
	for _, h := range f.hosts {
		do(h)
	}
}

// eachConn runs f for every connection under the broker's lock.
func (f *Faults) eachConn(do func(*conn)) (n int) {
	f.each(func(h *Host) {
		for _, c := range slices.Clone(h.conns) {
			if strings.HasPrefix(c.record.Name, f.name) {
				do(c)
				n++
			}
		}
	})
	return n
}

// NamedFaults are the faults of some connections only, see [Faults.Named]. They strike those that are open, once.
type NamedFaults struct{ f Faults }

// Named gives the faults of those connections whose name (the client's connection_name) begins with prefix: so a test can strike the
// connection that publishes and not the one that consumes.
func (f *Faults) Named(prefix string) *NamedFaults {
	return &NamedFaults{Faults{b: f.b, hosts: f.hosts, name: prefix}}
}

// CloseConnections is [Faults.CloseConnections].
func (n *NamedFaults) CloseConnections(code int, text string) int {
	return n.f.CloseConnections(code, text)
}

// CloseChannels is [Faults.CloseChannels].
func (n *NamedFaults) CloseChannels(code int, text string) int { return n.f.CloseChannels(code, text) }

// Silence is [Faults.Silence].
func (n *NamedFaults) Silence() { n.f.Silence() }

// Reset is [Faults.Reset].
func (n *NamedFaults) Reset() int { return n.f.Reset() }

// FIN is [Faults.FIN].
func (n *NamedFaults) FIN() int { return n.f.FIN() }

// stage reports whether a fault strikes here, in place of an answer.
func (c *conn) stage(s Stage) bool {
	w := &c.host.wire
	if w.drop[s] {
		c.hangUp("dropped at " + s.String())
		return true
	}
	if w.hang[s] {
		c.deaf = true
		return true
	}
	return false
}

// stage is that of a channel: only the channel hangs, the connection goes on with its heartbeats.
func (ch *channel) stage(s Stage) bool {
	w := &ch.c.host.wire
	if w.drop[s] {
		ch.c.hangUp("dropped at " + s.String())
		return true
	}
	if w.hang[s] {
		ch.deaf = true
	}
	return w.hang[s]
}

// Faults of the broker.

// CloseConnections sends connection.close with a code and a text to every open connection and returns how many that were. The
// name of the code is put before the text, as RabbitMQ does. What the connections held is requeued at once.
//
// Real: (320, "broker forced connection closure with reason 'shutdown'") is a node that stops, (320, "Closed via management
// plugin") an operator, (320, "Node was put into maintenance mode") a drain, (320, "credential expired") a token, (541, "vhost '/' is down").
// A node that stops also refuses: see [Faults.Refuse].
func (f *Faults) CloseConnections(code int, text string) int {
	n := 0
	f.eachConn(func(c *conn) {
		if c.state == stateOpen {
			c.fail(refuse(code, "%s", text), 0)
			n++
		}
	})
	return n
}

// CloseChannels sends channel.close with a code and a text on every open channel and returns how many that were. What the
// channels held is requeued at once; the connections stay.
//
// Real: (406, "delivery acknowledgement on channel 1 timed out...") is a consumer timeout up to RabbitMQ 4.2.
func (f *Faults) CloseChannels(code int, text string) int {
	n := 0
	f.eachConn(func(c *conn) {
		for _, ch := range slices.Clone(c.channels) {
			if !ch.closing && !ch.ended {
				ch.fail(refuse(code, "%s", text), 0)
				n++
			}
		}
	})
	return n
}

// CancelConsumers sends basic.cancel to every consumer of a queue, of all queues for the empty name, and returns how many that
// were. Their channels stay open, and what they hold stays theirs to settle.
//
// Real: a queue that failed over or moved, a removed stream replica, a permission that an update-secret took away.
func (f *Faults) CancelConsumers(queue string) int { return f.cancelConsumers(queue, false) }

// ReleaseConsumers is [Faults.CancelConsumers] that also takes back what the consumers hold: late settlements have no effect.
//
// Real: the consumer timeout of quorum queues in RabbitMQ 4.3.
func (f *Faults) ReleaseConsumers(queue string) int { return f.cancelConsumers(queue, true) }

func (f *Faults) cancelConsumers(queue string, release bool) int {
	n := 0
	f.eachConn(func(c *conn) {
		for _, ch := range c.channels {
			for _, cons := range slices.Clone(ch.consumers) {
				if queue != "" && cons.q.name != queue {
					continue
				}
				cons.cancel("cancelled by the broker")
				if release {
					ch.takeBack(!f.b.since(4, 3), func(o *outstanding) bool { return o.by == cons })
				}
				n++
			}
		}
	})
	return n
}

// HangAt makes the broker stop at a stage, see [Stage]: up to StageOpened the whole connection falls silent for ever, heartbeats
// included; from StageChannel on only the channel does. Connections that are past the stage go on. Taking the fault back does not wake those
// that hang. Nor are they closed: the broker forgets them without a word, those in the handshake after its 10 s, later ones two to
// three heartbeats after the client's last byte.
//
// Real: a frozen broker, an authentication backend that does not answer, a channel process that waits for a queue leader.
func (f *Faults) HangAt(s Stage, on bool) { f.each(func(h *Host) { h.wire.hang[s] = on }) }

// DropAt makes the broker close the socket at a stage, see [Stage].
//
// Real: a proxy that loses its backend; the driver reports a socket lost in the handshake as wrong credentials or a wrong vhost.
func (f *Faults) DropAt(s Stage, on bool) { f.each(func(h *Host) { h.wire.drop[s] = on }) }

// SilentAfterOpen is HangAt(StageOpened, on): the peer dies right after open-ok, at the moment where the driver watches nothing.
func (f *Faults) SilentAfterOpen(on bool) { f.HangAt(StageOpened, on) }

// Silence makes the broker's side of every connection that is open now fall silent for ever: it reads, answers nothing and sends
// nothing, not even a FIN, and requeues what the connection held after three heartbeats.
//
// Real: a broker that is frozen (SIGSTOP, a paused virtual machine), seen from one connection.
func (f *Faults) Silence() {
	f.eachConn(func(c *conn) {
		c.deaf = true
		if c.beats != nil {
			c.beats.Stop()
		}
		c.b.after(3*max(c.heartbeat, time.Second), func() { c.giveUp("frozen") })
	})
}

// RefuseLogin makes every login fail as one with a wrong password does, see [LoginRefusal].
func (f *Faults) RefuseLogin(on bool) { f.each(func(h *Host) { h.wire.refuseLogin = on }) }

// LoginRefusal is how a login is refused: by [Faults.RefuseLogin], and for a wrong user or password.
type LoginRefusal int

const (
	// RefusalOfRabbitMQ is the default. A client that advertises the capability authentication_failure_close is told 403 at
	// once. All others see three seconds of silence and then an RST, over TLS a FIN.
	RefusalOfRabbitMQ LoginRefusal = iota
	// RefusalByReset is three seconds of silence and an RST for all clients.
	RefusalByReset
	// RefusalByFIN is three seconds of silence and a FIN for all clients: RabbitMQ behind a proxy, which ends its sockets politely.
	RefusalByFIN
	// RefusalBy403 is told at once to all clients.
	RefusalBy403
)

// SetLoginRefusal changes how logins are refused from now on. [Faults.Heal] does not take it back.
func (f *Faults) SetLoginRefusal(how LoginRefusal) {
	f.each(func(h *Host) { h.wire.loginRefusal = how })
}

// RefuseVhost answers connection.open by connection.close with a code and a text; code 0 takes it back.
//
// Real: (530, "vhost / not found"), (530, "access to vhost '/' refused for user 'guest'"), (530, "access to vhost '/' refused for
// user 'guest': connection limit (1) is reached"), (541, "vhost '/' is down").
func (f *Faults) RefuseVhost(code int, text string) {
	f.each(func(h *Host) { h.wire.refuseOpen = refusalOf(code, text) })
}

// RefuseConsume answers basic.consume by a close with a code and a text; code 0 takes it back. The codes 403, 404, 405 and 406
// close the channel, all others the connection, as with RabbitMQ.
//
// Real: (403, "access to queue 'q' in vhost '/' refused for user 'guest'"), (403, "queue 'q' in vhost '/' in exclusive use"), (404, "home
// node 'rabbit@a' of durable queue 'q' in vhost '/' is down or inaccessible"), (405, "cannot obtain exclusive access to locked queue 'q' in vhost '/'"),
// (530, "reached maximum (1) of consumers per channel").
func (f *Faults) RefuseConsume(code int, text string) {
	f.each(func(h *Host) { h.wire.refuseConsume = refusalOf(code, text) })
}

// RefuseDeclare answers queue.declare, also a passive one, by a close with a code and a text; code 0 takes it back.
//
// Real: (403, "access to queue 'q' in vhost '/' refused for user 'guest'"), which since RabbitMQ 4.3 a passive one gets, too, without the
// configure permission.
func (f *Faults) RefuseDeclare(code int, text string) {
	f.each(func(h *Host) { h.wire.refuseDeclare = refusalOf(code, text) })
}

// RefusePublish answers basic.publish, once its content is complete, by a close with a code and a text; code 0 takes it back.
// The message goes nowhere. For one user, or one exchange, see [Broker.SetPermissions].
//
// Real: (403, "write access to exchange 'amq.default' in vhost '/' refused for user 'guest'"), (404, "no exchange 'x' in vhost '/'").
func (f *Faults) RefusePublish(code int, text string) {
	f.each(func(h *Host) { h.wire.refusePublish = refusalOf(code, text) })
}

// Unroutable makes every message go to no queue at all: with mandatory it is sent back by basic.return 312, which comes before
// its confirm, without it is lost; either way the confirm is an ack.
//
// Real: the queue is deleted, its binding is gone, the routing key is misspelt.
func (f *Faults) Unroutable(on bool) { f.each(func(h *Host) { h.wire.unroutable = on }) }

// LateConfirms makes confirms come only after d; 0 takes it back, and those that are late stay so. The messages are in their
// queues at once. As with RabbitMQ, acks that have become due together come as one with multiple=true.
//
// Real: a slow disk, a quorum queue that waits for its majority.
func (f *Faults) LateConfirms(d time.Duration) { f.each(func(h *Host) { h.wire.confirmDelay = d }) }

// LoseConfirms makes the confirms of what is published from now on never come, though the messages are in their queues.
//
// Real: a quorum queue that has lost its majority, seen until it is back. (For a connection that is lost before its confirms:
// [Faults.LateConfirms], then [Faults.Reset].)
func (f *Faults) LoseConfirms(on bool) { f.each(func(h *Host) { h.wire.loseConfirms = on }) }

// NackConfirms makes every confirm a basic.nack, though the messages are in their queues: a publisher that tries again makes a
// duplicate. For a nack of a message that is not see [Broker.FillQueue].
//
// Real: the process of a classic queue that ends after it has stored a message.
func (f *Faults) NackConfirms(on bool) { f.each(func(h *Host) { h.wire.nackConfirms = on }) }

func refusalOf(code int, text string) *refusal {
	if code == 0 {
		return nil
	}
	return refuse(code, "%s", text)
}

// Late541 makes every consume that follows end badly: consume-ok comes at once, then nothing, neither messages nor answers on
// that channel, and after 65 seconds connection.close 541.
//
// Real: consuming from a quorum queue that has no leader.
func (f *Faults) Late541(on bool) {
	f.each(func(h *Host) {
		h.wire.lateConsume = 0
		if on {
			h.wire.lateConsume = 65 * time.Second
		}
	})
}

// leaderless does to a new consumer what Late541 says.
func (ch *channel) leaderless(cons *consumer) {
	d := ch.c.host.wire.lateConsume
	if d == 0 {
		return
	}
	cons.mute, ch.deaf = true, true
	ch.c.b.after(d, func() {
		if !ch.ended {
			ch.c.fail(refuse(541, "timed out consuming from quorum queue '%s' in vhost '/'", cons.q.name), basicConsume)
		}
	})
}

// SlowCloseOk makes the broker answer channel.close and connection.close only after d; 0 takes it back.
func (f *Faults) SlowCloseOk(d time.Duration) { f.each(func(h *Host) { h.wire.closeOkDelay = d }) }

// NoCloseOk makes the broker never answer channel.close and connection.close. What they held is requeued all the same.
func (f *Faults) NoCloseOk(on bool) { f.each(func(h *Host) { h.wire.noCloseOk = on }) }

// StrayReply sends a synchronous reply that nobody asked for on every open connection: basic.qos-ok on its first channel, or
// connection.update-secret-ok on channel 0 if onConnection or if it has no channel. The driver's reader parks on it for ever.
//
// Real: a bug in a broker or a proxy.
func (f *Faults) StrayReply(onConnection bool) {
	f.eachConn(func(c *conn) {
		switch {
		case c.state != stateOpen:
		case onConnection || len(c.channels) == 0:
			c.method(0, connectionUpdateSecretOk)
		default:
			c.method(c.channels[0].id, basicQosOk)
		}
	})
}

// StrayDelivery closes every open channel by channel.close 406 and then sends one more delivery on it; it returns how many
// channels that were. The driver answers a delivery on a closed channel by closing the connection, with its own 504.
//
// Real: RabbitMQ does that when a delivery is on its way inside the broker while the channel fails (seen on 3.10).
func (f *Faults) StrayDelivery() int {
	n := 0
	f.eachConn(func(c *conn) {
		for _, ch := range slices.Clone(c.channels) {
			if ch.closing || ch.ended {
				continue
			}
			ch.fail(refuse(406, "unknown delivery tag 0"), basicAck)
			c.send(func(out []byte) []byte {
				out, mark := openMethod(out, ch.id, basicDeliver)
				out = append(appendShortstr(out, "stray"), 0, 0, 0, 0, 0, 0, 0, 1, 0)
				out = closeFrame(appendShortstr(appendShortstr(out, ""), ""), mark)
				return appendContent(out, ch.id, []byte{0, 0}, nil, c.frameMax)
			})
			n++
		}
	})
	return n
}

// Garbage sends bytes that are no frame on every open connection; without p it sends some of its own.
//
// Real: a proxy that corrupts, an HTTP server or a TLS listener on the port.
func (f *Faults) Garbage(p ...byte) {
	if len(p) == 0 {
		p = []byte("HTTP/1.1 400 Bad Request\r\n\r\n")
	}
	f.eachConn(func(c *conn) { c.send(func(out []byte) []byte { return append(out, p...) }) })
}

// Kill ends the process of the hosts: their connections are reset, dials are refused until [Faults.Restart]. What the connections
// held is requeued, exclusive queues are gone. When it is the whole broker, or the last host, transient queues and transient messages are lost too.
//
// Real: kill -9, or the out-of-memory killer. For a machine that loses its power see [Faults.PowerOff].
func (f *Faults) Kill() { f.die(false) }

// PowerOff is [Faults.Kill] without a word: no RST, no FIN, and dials are not answered. (In a real cluster the surviving nodes
// requeue only when they have noticed, after a minute or so.)
func (f *Faults) PowerOff() { f.die(true) }

func (f *Faults) die(silent bool) {
	f.each(func(h *Host) {
		h.wire.down, h.net.refuse = true, true
		h.net.dropSYN = h.net.dropSYN || silent
		for _, c := range slices.Clone(h.conns) {
			if silent {
				c.link.hole(true, true)
			}
			c.abort("broker killed")
		}
		if !slices.ContainsFunc(h.b.all, func(h *Host) bool { return !h.wire.down }) {
			h.b.loseTransient()
		}
	})
}

// Restart brings hosts back that were killed or powered off.
func (f *Faults) Restart() {
	f.each(func(h *Host) {
		if h.wire.down {
			h.wire.down, h.net.refuse, h.net.dropSYN = false, false, false
		}
	})
}

// loseTransient is what a restart of the whole broker does to what was not on disk.
func (b *Broker) loseTransient() {
	for _, q := range b.sortedQueues() {
		if !q.durable {
			q.delete("broker killed")
			continue
		}
		if q.kind == kindClassic {
			q.loseTransient()
		}
	}
}

func (q *queue) loseTransient() {
	lost := func(e *entry) bool {
		if e.msg.transient {
			q.b.ledger.setFate(e.record, Dropped)
		}
		return e.msg.transient
	}
	q.fresh = slices.DeleteFunc(q.fresh, lost)
	q.returned = slices.DeleteFunc(q.returned, lost)
	slices.SortFunc(q.returned, func(x, y *entry) int { return int(x.key) - int(y.key) }) // a sorted slice is a heap
}

// CutOff takes hosts off the other hosts of their cluster but not from their clients, or puts them back: their consumers get nothing,
// and a passive declare there answers what was so when they were cut off. Publishing and settling there count, unlike with a real broker,
// which would do neither until the host is back.
//
// Real: a network partition between brokers, seen on the minority's side.
func (f *Faults) CutOff(on bool) {
	f.each(func(h *Host) {
		h.wire.cutOff = nil
		if on {
			h.wire.cutOff = make(map[string][2]int)
		}
		for name, q := range f.b.queues {
			if on {
				h.wire.cutOff[name] = [2]int{q.length(), len(q.consumers)}
			}
			q.touch()
		}
	})
}

// Faults of the broker as a whole, not of one host.

// QuorumStall stops all deliveries from a queue, or lets them go on. Everything else works: heartbeats, consume-ok, settling.
//
// Real: a quorum queue without a majority, a single active consumer or one of low priority that has to wait.
func (b *Broker) QuorumStall(queue string, on bool) {
	b.lock()
	defer b.unlock()
	if q := b.queues[queue]; q != nil {
		q.stalled = on
		q.touch()
	}
}

// Blocked raises an alarm: a connection that publishes gets connection.blocked, and from then on nothing is read from it,
// neither the body of that message nor acknowledgements nor heartbeats; it is not missed for that, and still gets deliveries and
// heartbeats. Connections that only consume notice nothing. Unblocked ends it, and what was held up goes on.
//
// Real: a memory or disk alarm.
func (b *Broker) Blocked(reason string) {
	b.lock()
	defer b.unlock()
	b.blockReason = reason
	b.alarms++
}

// BlockedFor is [Broker.Blocked] for a while: the alarm ends after d, unless another one has begun meanwhile.
func (b *Broker) BlockedFor(reason string, d time.Duration) {
	b.Blocked(reason)
	b.lock()
	defer b.unlock()
	this := b.alarms
	b.after(d, func() {
		if b.alarms == this {
			b.endAlarm()
		}
	})
}

// Unblocked ends the alarm of [Broker.Blocked].
func (b *Broker) Unblocked() {
	b.lock()
	defer b.unlock()
	b.endAlarm()
}

func (b *Broker) endAlarm() {
	b.blockReason = ""
	for _, c := range b.conns {
		c.unblock()
	}
}

// FillQueue makes a queue refuse every message as a full one does, or take them again: a publisher that waits for confirms gets
// basic.nack, one that does not loses the message, and what a queue would dead-letter into it stays there if that dead-letters
// at least once.
//
// Real: a queue with x-max-length and x-overflow=reject-publish.
func (b *Broker) FillQueue(queue string, on bool) {
	b.lock()
	defer b.unlock()
	if q := b.queues[queue]; q != nil {
		q.jammed = on
	}
}

// PurgeQueue drops what waits in a queue and returns how many messages that were; what is delivered stays.
func (b *Broker) PurgeQueue(queue string) int {
	b.lock()
	defer b.unlock()
	if q := b.queues[queue]; q != nil {
		return q.purge()
	}
	return 0
}

// Faults of the network.

// Refuse makes dials fail at once by ECONNREFUSED. Open connections stay.
//
// Real: nothing listens: the broker is stopped, or suspended its listeners for maintenance.
func (f *Faults) Refuse(on bool) { f.each(func(h *Host) { h.net.refuse = on }) }

// DropSYN makes dials hang until their context ends, or until 127 s have passed (ETIMEDOUT). SYNs are sent again after 1, 3, 7,
// 15... s: a dial that is under way when the fault is taken back succeeds then.
//
// Real: a firewall, a host that is off, a full accept queue.
func (f *Faults) DropSYN(on bool) { f.each(func(h *Host) { h.net.dropSYN = on }) }

// DNSFailure makes dials fail by a temporary *net.DNSError.
func (f *Faults) DNSFailure(on bool) { f.each(func(h *Host) { h.net.dns = on }) }

// Reset aborts every connection by an RST and returns how many that were: reads and writes of the client fail by ECONNRESET,
// bytes under way are lost, the broker requeues at once.
//
// Real: a broker process that dies, a firewall or load balancer that rejects.
func (f *Faults) Reset() int { return f.eachConn(func(c *conn) { c.abort("connection reset") }) }

// FIN closes every connection without connection.close and returns how many that were: the client reads what was sent, then EOF.
//
// Real: a proxy or load balancer that closes an idle connection.
func (f *Faults) FIN() int { return f.eachConn(func(c *conn) { c.hangUp("socket closed") }) }

// BlackHole makes the network swallow what clients send, what the broker sends, or both, and SYNs in any case. A connection that
// has lost a byte, or a FIN, is silent in that direction for ever, also after [Faults.Heal]: as when a firewall or NAT has
// forgotten it. Both false is no black hole for new bytes. For a partition that heals without loss see [Faults.Stall].
//
// Swallowing only what the client sends is the half-open connection that no client notices: heartbeats still arrive, until the broker
// gives up after two to three heartbeats.
func (f *Faults) BlackHole(clientToBroker, brokerToClient bool) {
	f.each(func(h *Host) {
		h.net.holeToBroker, h.net.holeToClient = clientToBroker, brokerToClient
		for _, c := range h.conns {
			c.link.hole(clientToBroker, brokerToClient)
		}
	})
}

// Stall holds back every byte in both directions, and SYNs: late, none lost. Unstall lets them arrive.
//
// Real: packet loss, a partition shorter than the heartbeats, a paused container.
func (f *Faults) Stall() { f.stall(true) }

// Unstall ends [Faults.Stall].
func (f *Faults) Unstall() { f.stall(false) }

func (f *Faults) stall(on bool) {
	f.each(func(h *Host) {
		h.net.stalled = on
		for _, c := range h.conns {
			c.link.toBroker.update(func(s *stream) { s.stalled = on })
			c.link.toClient.update(func(s *stream) { s.stalled = on })
		}
	})
}

// ZeroWindow makes the broker stop reading: clients can write 64 KiB more on each connection, then Write blocks until its deadline.
// Heartbeats still arrive from the broker, which gives up the connection when it has read nothing for two to three heartbeats.
//
// In a synctest bubble a blocked Write that holds a mutex (as the driver's does) stops the clock when another goroutine wants
// that mutex.
//
// Real: a memory alarm on a connection that publishes, a proxy that is stuck.
func (f *Faults) ZeroWindow(on bool) {
	f.each(func(h *Host) {
		h.net.zeroWindow = on
		for _, c := range h.conns {
			c.link.toBroker.update(func(s *stream) { s.zero = on })
		}
	})
}

// SetLatency changes how long a byte takes from one end to the other, for open connections too.
func (f *Faults) SetLatency(d time.Duration) {
	f.each(func(h *Host) {
		h.net.latency = d
		for _, c := range h.conns {
			c.link.toBroker.update(func(s *stream) { s.latency = d })
			c.link.toClient.update(func(s *stream) { s.latency = d })
		}
	})
}

// CutAfter lets every connection, open or to come, carry n bytes more from the broker to the client and then ends it: the client
// reads the n bytes, then EOF. A negative n takes it back. It cuts frames in the middle.
//
// Real: a proxy or a broker that dies while it writes.
func (f *Faults) CutAfter(n int) {
	f.each(func(h *Host) {
		h.net.cutToClient = n
		for _, c := range h.conns {
			c.link.toClient.update(func(s *stream) { s.cut = n })
		}
	})
}

// CutClientAfter is [Faults.CutAfter] for the bytes from the client to the broker: what was written beyond n is lost, though its
// Write succeeded.
func (f *Faults) CutClientAfter(n int) {
	f.each(func(h *Host) {
		h.net.cutToBroker = n
		for _, c := range h.conns {
			c.link.toBroker.update(func(s *stream) { s.cut = n })
		}
	})
}

// Heal takes back every lasting fault of these hosts, of the network and of the broker, but for [Faults.Kill], [Faults.PowerOff],
// [Faults.SetLatency] and [Faults.SetLoginRefusal]. [Broker.QuorumStall], [Broker.FillQueue] and [Broker.Blocked] are no host's, and
// have an end of their own: QuorumStall(queue, false), FillQueue(queue, false), Unblocked. What was lost stays lost, what hangs goes on hanging.
func (f *Faults) Heal() {
	f.BlackHole(false, false)
	f.CutOff(false)
	f.Unstall()
	f.ZeroWindow(false)
	f.CutAfter(-1)
	f.CutClientAfter(-1)
	f.each(func(h *Host) {
		h.net.dns = false
		if !h.wire.down {
			h.net.refuse, h.net.dropSYN = false, false
		}
		h.wire = wireFaults{down: h.wire.down, loginRefusal: h.wire.loginRefusal}
	})
}

// hole starts or ends a black hole for one connection.
func (l *link) hole(toBroker, toClient bool) {
	l.toBroker.update(func(s *stream) { s.hole = toBroker })
	l.toClient.update(func(s *stream) { s.hole = toClient })
}
