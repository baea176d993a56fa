package matrix_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/faultproxy"
	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

const (
	// lockStep bounds the next try while something is locked.
	lockStep = time.Second + scenario.AtOnce
	// operatorCap is the longest wait for what an operator has to mend.
	operatorCap = 30 * time.Second
	// buried bounds when the broker notices that a client is dead: three heartbeats after the last
	// byte.
	buried = 3*scenario.Heartbeat + time.Second
	// setupPace bounds resuming once a path is back that has swallowed tries for a few seconds.
	setupPace = scenario.SetupTimeout + 2*time.Second
)

// nodeCells are the faults on one node that do not disturb other queues on it.
func nodeCells() []cell {
	notStream := func(reason string) func(rabbit.Generation, kind) string { return only(reason, classic, quorum) }
	return []cell{
		{fault: "connection reset", rows: "4, 28", test: func(r *trial) { r.suffers(r.Proxy.Reset) }},
		{fault: "broker aborts the connection", rows: "4", by: bothWay, test: func(r *trial) { r.suffers(r.Abort) }},
		{fault: "connection ended politely (FIN)", rows: "11, 28", test: func(r *trial) { r.suffers(r.Proxy.FIN) }},
		{fault: "path swallows both ways", rows: "12", test: func(r *trial) { r.silenced(faultproxy.Both, scenario.SilentPeer) }},
		{fault: "path swallows what the broker sends", rows: "13", test: func(r *trial) { r.silenced(faultproxy.ToClient, scenario.SilentPeer) }},
		{fault: "path swallows what we send", rows: "14", test: func(r *trial) { r.silenced(faultproxy.ToBroker, scenario.HalfOpen) }},
		{fault: "50 ms of latency each way, then a reset", rows: "29", test: func(r *trial) {
			r.weather(func() { r.Proxy.Latency(faultproxy.Both, 50*time.Millisecond) }, time.Second+scenario.AtOnce)
		}},
		{fault: "20 kB/s, then a reset", rows: "29", test: func(r *trial) {
			r.weather(func() { r.Proxy.Bandwidth(faultproxy.Both, 20_000) }, time.Second+scenario.AtOnce)
		}},
		{fault: "slices of 7 bytes, then a reset", rows: "29", test: func(r *trial) {
			r.weather(func() { r.Proxy.Slice(faultproxy.Both, 7, 100*time.Microsecond) }, time.Second+scenario.AtOnce)
		}},
		{fault: "stall of one heartbeat that heals", rows: "29", test: stallThatHeals},
		{fault: "path swallows both ways after open-ok", rows: "15", test: deadFromTheStart},
		{fault: "reply nobody asked for", rows: "16", test: strayReply},
		{fault: "frame the protocol forbids", rows: "20", test: forbiddenFrame},
		{fault: "dials refused", rows: "30", test: dialsRefused},
		{fault: "handshake stalls until the broker hangs up", rows: "10", test: handshakeStalls},
		{fault: "handshake cut after n bytes", rows: "11", test: handshakeCut},
		{fault: "operator closes the connection", rows: "2", by: bothWay, test: operatorClosesIt},
		{fault: "channel's process crashes", rows: "23", by: bothWay, test: channelCrashes},
		{fault: "ack sent twice behind our back", rows: "41", test: ackedBehindOurBack},
		{fault: "queue absent at the start", rows: "32", by: bothWay, test: absentAtStart},
		{fault: "queue deleted, declared by us", rows: "34", by: bothWay, test: deletedAndOurs},
		{fault: "queue deleted, declared by another", rows: "34", by: bothWay, test: deletedAndTheirs},
		{fault: "read permission taken and given back", rows: "43", by: bothWay, test: readForbidden},
		{fault: "vhost permission taken and given back", rows: "6", by: bothWay, test: vhostForbidden},
		{fault: "password changed, new one per dial", rows: "5", by: bothWay, test: passwordChanged},
		{fault: "password changed, URL known 2 s later", rows: "5", by: bothWay, test: urlRotatesLate},
		{fault: "user's connection limit reached and lifted", rows: "7", by: bothWay, test: userLimited},
		{fault: "vhost's connection limit reached and lifted", rows: "7", by: bothWay, vhost: true, test: vhostLimited},
		{fault: "vhost deleted and made again", rows: "6, 8", by: bothWay, vhost: true, test: vhostDeleted},
		{fault: "vhost down and restarted", rows: "8", by: bothWay, vhost: true, test: vhostDown},
		{fault: "policy set and removed", rows: "38", vhost: true, test: policyChanged},
		{
			fault: "exclusive consumer of another", rows: "44", by: bothWay, test: exclusiveConflict,
			not: only("quorum queues and streams take no notice of an exclusive consumer (seen on 3.10, 4.0 and 4.3)", classic),
		},
		{
			fault: "exclusive consumer, our own ghost", rows: "44", test: exclusiveGhost,
			not: only("quorum queues and streams take no notice of an exclusive consumer (seen on 3.10, 4.0 and 4.3)", classic),
		},
		{
			fault: "exclusive queue, our own ghost", rows: "45", test: exclusiveQueueGhost,
			not: only("only a classic queue can be exclusive", classic),
		},
		{
			fault: "server-named queue", rows: "46", by: bothWay, test: serverNamed,
			not: only("only a classic queue can be named by the server", classic),
		},
		{
			fault: "auto-delete queue", rows: "46", test: autoDeleted,
			not: only("only a classic queue can delete itself", classic),
		},
		{fault: "declared with other arguments", rows: "47", by: bothWay, test: inequivalent},
		{
			fault: "consumer timeout per consumer", rows: "40", by: bothWay, test: consumerTimeoutCancels,
			not: func(g rabbit.Generation, k kind) string {
				if g == rabbit.Gen43 && k == quorum {
					return ""
				}
				return "x-consumer-timeout of a consumer is for quorum queues since 4.3"
			},
		},
		{
			fault: "delivery limit", rows: "55", args: amqp.Table{"x-delivery-limit": 3}, test: deliveryLimit,
			not: only("only quorum queues count deliveries", quorum),
		},
		{
			fault: "message that fails again and again", rows: "58", test: requeuePace,
			not: notStream("a stream has no requeue"),
		},
		{fault: "reset between messages resumes exactly", rows: "59", test: resumesExactly},
		{
			fault: "stream message put back", rows: "59", test: streamPutBack,
			not: only("what a queue does with it is the row of the message that fails again and again", stream),
		},
		{
			fault: "single active consumer waits its turn", rows: "53", args: amqp.Table{"x-single-active-consumer": true}, test: singleActive,
			not: notStream("a stream has no single active consumer over AMQP 0-9-1"),
		},
		{
			fault: "consumer of lower priority waits its turn", rows: "54", test: lowerPriority,
			not: notStream("a stream has no priorities"),
		},
		{fault: "stuck handlers and a handler timeout", rows: "63", test: stuckHandlers},
		{
			fault: "dead letters over a reset", rows: "56", vhost: true, args: amqp.Table{"x-dead-letter-exchange": "amq.fanout"}, test: deadLetters,
			not: notStream("a stream has no dead letters"),
		},
		{
			fault: "delayed retry of the broker", rows: "57", test: delayedRetry,
			args: amqp.Table{"x-delayed-retry-type": "all", "x-delayed-retry-min": 1500, "x-delayed-retry-max": 3000},
			not: func(g rabbit.Generation, k kind) string {
				if g == rabbit.Gen43 && k == quorum {
					return ""
				}
				return "delayed retry is for quorum queues since 4.3"
			},
		},
	}
}

// allCells are those of one node, and those that need somebody to sign certificates.
func allCells(ca *scenario.Authority) (all []cell) {
	for _, c := range slices.Concat(nodeCells(), loginCells(ca), startCells(), failingCells()) {
		if c.by != bothWay {
			all = append(all, c)
			continue
		}
		again := c
		c.by, again.by = proxied, direct
		again.fault += ", direct"
		all = append(all, c, again)
	}
	return all
}

// runCells runs them on one node per generation, many at a time.
func (m *matrix) runCells(t *testing.T, gens []rabbit.Generation) {
	ca := scenario.NewAuthority(t)
	shown := ca.Sign(t)
	var cfgs []rabbit.Config
	for _, g := range gens {
		cfgs = append(cfgs, withTokens(rabbit.Config{Generation: g, ChannelTick: time.Second, TLS: &shown}))
	}
	brokers := rabbit.StartAll(t, cfgs...)
	for _, b := range brokers {
		rabbit.NeedCommands(t, b)
	}
	var all sync.WaitGroup
	for n, c := range allCells(ca) {
		for i, g := range gens {
			for _, k := range m.kindsOf(c, g, n) {
				all.Go(func() {
					m.slots <- struct{}{}
					defer func() { <-m.slots }()
					t.Run(fmt.Sprintf("%s/%s %s", c.fault, g, k), func(t *testing.T) { m.runCell(t, g, k, brokers[i], c) })
				})
			}
		}
	}
	all.Wait()
}

// kindsOf are the kinds that a cell runs on: all that exist, or one of them in the short form.
func (m *matrix) kindsOf(c cell, g rabbit.Generation, n int) []kind {
	var possible []kind
	for _, k := range kinds() {
		if reason := c.impossible(g, k); reason != "" {
			m.set(c.fault, c.rows, string(g), k, entry{note: reason})
			continue
		}
		possible = append(possible, k)
	}
	if m.parts != "" || len(possible) == 0 {
		return possible
	}
	return possible[n%len(possible) : n%len(possible)+1]
}

func (m *matrix) runCell(t *testing.T, g rabbit.Generation, k kind, b *rabbit.Broker, c cell) {
	var r *trial
	defer func() { m.record(r, t, c.fault, c.rows, string(g), k) }()
	r = m.newTrial(t, g, k, b, c)
	c.test(r)
}

// ---- the path ----

// suffers is a fault that both sides hear of at once.
func (r *trial) suffers(fault func()) {
	r.begin()
	lost, done := r.Timed(fault)
	r.ResumedSince(lost, done, scenario.AtOnce)
	r.judge()
}

// silenced swallows until two seconds after it was noticed.
func (r *trial) silenced(d faultproxy.Direction, limit time.Duration) {
	r.begin()
	at := time.Now()
	r.Proxy.BlackHole(d)
	change := r.AwaitLost(0, at, limit)
	r.Note("noticed after %s", inWords(change.Time.Sub(at)))
	r.Pause(2 * time.Second)
	healed := time.Now()
	r.Proxy.Heal()
	r.Resumed(healed, setupPace)
	r.judge()
}

// weather is a slow path, which must not be taken for a dead one. A reset has to heal over it, too.
func (r *trial) weather(begin func(), limit time.Duration) {
	r.begin()
	begin()
	r.Pause(2 * scenario.Heartbeat)
	assert.Zero(r, r.LostSessions(), "slow is not dead")
	at := time.Now()
	r.Proxy.Reset()
	r.Resumed(at, limit)
	r.judge()
}

func stallThatHeals(r *trial) {
	r.begin()
	r.Proxy.Pause(faultproxy.Both)
	r.Pause(scenario.Heartbeat)
	r.Proxy.Heal()
	r.judge()
	assert.Zero(r, r.LostSessions(), "bytes were late, none were lost")
}

// handshakeCut cuts the first dials at every stage, from the greeting to consume-ok. The driver
// reports that as wrong passwords and virtual hosts; Run must not give up.
func handshakeCut(r *trial) {
	r.Proxy.CutAfter(faultproxy.ToClient, 8)
	r.Start()
	cuts := []int64{200, 480, 510, 530, 545, 560}
	if r.TLS != nil {
		cuts = append(cuts, 800, 1100, 1400) // its handshake comes first
	}
	for _, n := range cuts {
		r.Pause(300 * time.Millisecond)
		r.Proxy.Heal()
		r.Proxy.CutAfter(faultproxy.ToClient, n)
		r.Proxy.Reset()
	}
	r.Pause(300 * time.Millisecond)
	at := time.Now()
	r.Proxy.Heal()
	r.Resumed(at, 11*time.Second) // the cap of the backoff and a second
	assert.Greater(r, r.Consumer.Stats().Dials, uint64(3), "dials that were cut")
	r.Feed()
	r.judge()
}

// deadFromTheStart: the peer says nothing after open-ok. The driver by itself would wait for ever.
func deadFromTheStart(r *trial) {
	const classConnection, openOK = 10, 41
	r.Proxy.Latency(faultproxy.Both, 200*time.Millisecond) // between open-ok and what follows
	r.Start()
	r.Must(10*time.Second, "open-ok", func() bool { return r.passed(faultproxy.ToClient, classConnection, openOK) > 0 })
	at := time.Now()
	r.Proxy.BlackHole(faultproxy.Both)
	change := r.told("setup limit", scenario.SetupTimeout+2*time.Second)
	r.Note("noticed after %s", inWords(change.Time.Sub(at)))
	healed := time.Now()
	r.Proxy.Heal()
	r.Resumed(healed, setupPace)
	r.Feed()
	r.judge()
}

// passed counts methods on the wire.
func (r *trial) passed(d faultproxy.Direction, class, method uint16) (n int) {
	for _, m := range r.Proxy.Log().Methods() {
		if m.Dir == d && m.Class == class && m.Method == method {
			n++
		}
	}
	return n
}

// strayReply is a reply too many, which blocks the driver's reader for ever.
func strayReply(r *trial) {
	const classBasic, qosOK = 60, 11
	r.begin()
	r.Must(5*time.Second, "a delivery", func() bool { return len(r.Proxy.Log().Deliveries()) > 0 })
	channel := r.Proxy.Log().Deliveries()[0].Channel
	at := time.Now()
	require.Equal(r, 1, r.Proxy.Inject(faultproxy.ToClient, faultproxy.MethodFrame(channel, classBasic, qosOK, nil)))
	change := r.AwaitLost(0, at, scenario.DeadReader)
	r.Note("noticed after %s", inWords(change.Time.Sub(at)))
	r.Resumed(change.Time, scenario.AtOnce)
	r.judge()
}

// forbiddenFrame is an ack on a channel that was never opened.
func forbiddenFrame(r *trial) {
	r.begin()
	at := time.Now()
	require.Equal(r, 1, r.Proxy.Inject(faultproxy.ToBroker, faultproxy.AckFrame(99, 1, false)))
	change := r.AwaitLost(0, at, scenario.AtOnce)
	var said *amqp.Error
	require.ErrorAs(r, change.Cause, &said)
	assert.True(r, said.Server)
	assert.Equal(r, amqp.ChannelError, said.Code)
	r.Resumed(change.Time, scenario.AtOnce)
	r.judge()
}

func dialsRefused(r *trial) {
	r.begin()
	r.Proxy.Refuse()
	r.Proxy.Reset()
	r.told("refused", 2*time.Second)
	r.Pause(4 * time.Second)
	at := time.Now()
	r.Proxy.Heal()
	r.Resumed(at, scenario.AfterRefusals)
	r.judge()
}

// handshakeStalls: nothing of ours arrives. With limits as long as here the broker gives up first,
// after the 10 s of its handshake_timeout.
func handshakeStalls(r *trial) {
	r.Options = append(r.Options, steadymq.WithSetupTimeout(15*time.Second), steadymq.WithHeartbeat(10*time.Second))
	r.begin()
	r.Proxy.Pause(faultproxy.ToBroker)
	r.Proxy.Reset()
	at := time.Now()
	r.Must(14*time.Second, "the broker hangs up", func() bool { return r.Consumer.Stats().Dials > 2 })
	assert.Greater(r, time.Since(at), 8*time.Second, "it was not us")
	r.Note("the broker hung up after %s", inWords(time.Since(at)))
	healed := time.Now()
	r.Proxy.Heal()
	r.Resumed(healed, setupPace)
	r.judge()
}

// ---- the broker's own doing ----

func operatorClosesIt(r *trial) {
	r.begin()
	n, err := r.Broker.CloseNamed(r.Context(), r.Queue, "an operator's reason")
	r.ok(err)
	require.Equal(r, "1", n)
	change := r.AwaitLost(0, time.Now(), scenario.AtOnce)
	assert.ErrorContains(r, change.Cause, "an operator's reason")
	r.Resumed(change.Time, scenario.AtOnce)
	r.judge()
}

func channelCrashes(r *trial) {
	r.begin()
	n, err := r.Broker.CrashChannels(r.Context(), r.Queue)
	r.ok(err)
	require.Equal(r, "1", n)
	change := r.AwaitLost(0, time.Now(), scenario.AtOnce)
	var said *amqp.Error
	require.ErrorAs(r, change.Cause, &said)
	assert.Equal(r, amqp.InternalError, said.Code)
	r.Resumed(change.Time, scenario.AtOnce)
	r.judge()
}

func ackedBehindOurBack(r *trial) {
	r.begin()
	r.Must(10*time.Second, "ten acks", func() bool { return len(r.Proxy.Log().Settlements()) > 10 })
	done := r.Proxy.Log().Settlements()[5]
	at := time.Now()
	require.Equal(r, 1, r.Proxy.Inject(faultproxy.ToBroker, faultproxy.AckFrame(done.Channel, done.Tag, false)))
	change := r.AwaitLost(0, at, scenario.AtOnce)
	assert.ErrorContains(r, change.Cause, "unknown delivery tag")
	r.Resumed(at, scenario.AtOnce)
	r.KeptConnection()
	r.judge()
}

// ---- the queue ----

func (r *trial) declareArgs() amqp.Table { return amqp.Table{"x-queue-type": string(r.kind)} }

func absentAtStart(r *trial) {
	r.ok(r.Broker.DeleteQueue(r.Queue))
	r.Start()
	r.told("no queue", 5*time.Second)
	r.Pause(2 * time.Second)
	at := time.Now()
	r.ok(r.Broker.DeclareQueue(r.Queue, r.declareArgs()))
	r.atNextTry(at, time.Now())
	r.Feed()
	r.judge()
}

func deletedAndOurs(r *trial) {
	r.Options = append(r.Options, steadymq.WithQueue(steadymq.Queue{Type: string(r.kind)}))
	r.begin()
	r.Feeder.Stop()
	r.SettledAll()
	at := time.Now()
	r.ok(r.Broker.DeleteQueue(r.Queue))
	deleted := time.Now()
	r.ResumedSince(at, deleted, scenario.AtOnce+r.declaring())
	r.Feed()
	r.judge()
}

// declaring is twice what the broker needs now to make such a queue: a quorum queue holds an
// election and writes to its disk.
func (r *trial) declaring() time.Duration {
	start := time.Now()
	r.ok(r.Broker.DeclareQueue(r.Queue+"-another", r.declareArgs()))
	took := time.Since(start)
	r.ok(r.Broker.DeleteQueue(r.Queue + "-another"))
	return 2 * took
}

func deletedAndTheirs(r *trial) {
	r.begin()
	r.Feeder.Stop()
	r.SettledAll()
	r.ok(r.Broker.DeleteQueue(r.Queue))
	r.AwaitLost(0, time.Now(), scenario.AtOnce)
	r.Pause(2 * time.Second)
	at := time.Now()
	r.ok(r.Broker.DeclareQueue(r.Queue, r.declareArgs()))
	r.atNextTry(at, time.Now())
	r.Feed()
	r.judge()
}

func resumesExactly(r *trial) {
	r.Start()
	r.consuming()
	r.Publish(30)
	r.SettledAll()
	r.Pause(100 * time.Millisecond) // the broker has them, too
	at := time.Now()
	r.Proxy.Reset()
	r.Publish(30)
	r.Resumed(at, scenario.AtOnce)
	r.SettledAll()
	r.judge()
	assert.Len(r, r.Proxy.Log().Deliveries(), 60, "every message once, none skipped")
}

func streamPutBack(r *trial) {
	var failed atomic.Bool
	r.Options = append(r.Options, steadymq.WithRequeueDelay(50*time.Millisecond, time.Second))
	r.Handle = func(_ context.Context, _ *steadymq.Delivery, n int) error {
		if n == 15 && failed.CompareAndSwap(false, true) {
			return errors.New("not now")
		}
		return nil
	}
	r.begin()
	r.Pause(time.Second)
	assert.True(r, failed.Load())
	assert.Zero(r, r.LostSessions(), "it is tried again in place")
	r.judge()
}

func requeuePace(r *trial) {
	var mu sync.Mutex
	var tries []time.Time
	var well atomic.Bool
	r.Handle = func(_ context.Context, _ *steadymq.Delivery, n int) error {
		if n == 0 && !well.Load() {
			mu.Lock()
			defer mu.Unlock()
			tries = append(tries, time.Now())
			return errors.New("not yet")
		}
		return nil
	}
	r.begin()
	r.Pause(5 * time.Second)
	well.Store(true)
	assert.Zero(r, r.LostSessions())
	mu.Lock()
	assert.GreaterOrEqual(r, len(tries), 3, "it is tried again")
	for i := 1; i < len(tries); i++ {
		assert.GreaterOrEqual(r, tries[i].Sub(tries[i-1]), 500*time.Millisecond, "held for half the delay at least")
	}
	mu.Unlock()
	r.judge()
}

func deliveryLimit(r *trial) {
	var mu sync.Mutex
	var attempts, dropped []int
	r.Options = append(r.Options, steadymq.WithRequeueDelay(20*time.Millisecond, 20*time.Millisecond))
	r.Handle = func(_ context.Context, d *steadymq.Delivery, n int) error {
		mu.Lock()
		defer mu.Unlock()
		switch n {
		case 0: // succeeds at its last chance
			if attempts = append(attempts, d.Attempt()); len(attempts) == 4 {
				return nil
			}
			return errors.New("fails three times")
		case 1: // never does
			dropped = append(dropped, d.Attempt())
			return errors.New("fails for ever")
		}
		return nil
	}
	r.begin()
	r.Pause(2 * time.Second)
	mu.Lock()
	assert.Equal(r, []int{1, 2, 3, 4}, attempts)
	assert.Equal(r, []int{1, 2, 3, 4}, dropped, "and then the broker drops it")
	mu.Unlock()
	r.Ledger.Forget(1) // it was the broker's to drop
	r.judge()
}

// delayedRetry: the broker holds back what was put back, on top of what the consumer does.
func delayedRetry(r *trial) {
	var mu sync.Mutex
	var tries []time.Time
	r.Options = append(r.Options, steadymq.WithRequeueDelay(20*time.Millisecond, 20*time.Millisecond))
	r.Handle = func(_ context.Context, _ *steadymq.Delivery, n int) error {
		mu.Lock()
		defer mu.Unlock()
		if n != 0 {
			return nil
		}
		if tries = append(tries, time.Now()); len(tries) < 3 {
			return errors.New("not yet")
		}
		return nil
	}
	r.begin()
	r.Feeder.Stop()
	r.SettledAll()
	mu.Lock()
	assert.Len(r, tries, 3)
	for i := 1; i < len(tries); i++ {
		assert.GreaterOrEqual(r, tries[i].Sub(tries[i-1]), 1500*time.Millisecond, "held back by the broker")
	}
	mu.Unlock()
	r.judge()
	assert.Zero(r, r.LostSessions())
}

// deadLetters: what the handler gives up goes where the queue says, even if the connection is lost
// before the reject.
func deadLetters(r *trial) {
	const dead = "dead"
	hopeless := func(n int) bool { return n%5 == 0 }
	r.ok(r.Broker.DeclareQueue(dead, nil))
	r.ok(r.Broker.Bind(dead, "amq.fanout"))
	var mu sync.Mutex
	tries, again := map[int]int{}, false
	r.Handle = func(_ context.Context, d *steadymq.Delivery, n int) error {
		if !hopeless(n) {
			return nil
		}
		r.Pause(50 * time.Millisecond)
		r.Ledger.Finish(n, d)
		mu.Lock()
		defer mu.Unlock()
		tries[n]++
		again = again || tries[n] > 1
		return steadymq.Discard(errors.New("cannot be handled"))
	}
	r.begin()
	r.Must(20*time.Second, "one was given up twice", func() bool {
		lost := r.LostSessions()
		r.Proxy.Reset()
		r.Must(5*time.Second, "consuming again", func() bool { return r.LostSessions() > lost && r.Consumer.State() == steadymq.Consuming })
		r.Pause(200 * time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		return again
	})
	r.judge()
	left := map[int]bool{}
	for _, n := range r.TakeAll(dead) {
		assert.True(r, hopeless(n), "message %d was handled well", n)
		left[n] = true
	}
	for _, n := range r.Ledger.Confirmed() {
		assert.Equal(r, hopeless(n), left[n], "message %d among the dead letters", n)
	}
}

// stuckHandlers fill the prefetch until their limit; then everything goes on.
func stuckHandlers(r *trial) {
	var stuck, told atomic.Int64
	r.Options = append(r.Options, steadymq.WithHandlerTimeout(2*time.Second))
	r.Handle = func(ctx context.Context, _ *steadymq.Delivery, _ int) error {
		if stuck.Add(1) <= int64(r.Workers) {
			<-ctx.Done()
			if errors.Is(context.Cause(ctx), steadymq.ErrHandlerTimeout) {
				told.Add(1)
			}
		}
		return nil
	}
	r.begin()
	r.Must(5*time.Second, "the limit", func() bool { return told.Load() == int64(r.Workers) })
	r.judge()
	assert.Zero(r, r.LostSessions())
}

func inequivalent(r *trial) {
	other := quorum
	if r.kind == quorum {
		other = classic
	}
	r.Options = append([]steadymq.Option{steadymq.WithQueue(steadymq.Queue{Type: string(other)})}, r.Options...)
	r.Start()
	select {
	case err := <-r.Result:
		var said *amqp.Error
		require.ErrorAs(r, err, &said)
		assert.Equal(r, amqp.PreconditionFailed, said.Code)
	case <-time.After(5 * time.Second):
		require.FailNow(r, "Run does not give up")
	}
	r.NothingLeft()
	r.Note("Run returns the broker's 406")
	r.AddRow(0)
}

// policyChanged: a session lives on when a policy of its queue changes. Up to 3.13 mirroring is one
// of the things a policy changes.
func policyChanged(r *trial) {
	r.begin()
	lower := `{"max-length-bytes": 100000000}`
	if r.gen == rabbit.Gen310 && r.kind == classic {
		lower = `{"ha-mode": "all"}`
	}
	r.ok(r.Broker.PolicyOn(r.Context(), r.vhost, "test", ".*", lower))
	r.Pause(time.Second)
	r.ok(r.Broker.PolicyOff(r.Context(), r.vhost, "test"))
	r.Pause(time.Second)
	r.judge()
	assert.Zero(r, r.LostSessions())
}

// ---- who may ----

// atNextTry holds healing against the pace for what an operator has to mend: the first try after
// healed comes within the longest wait of that pace, and succeeds at once.
func (r *trial) atNextTry(at, healed time.Time) {
	r.Helper()
	slow := r.pulse()
	r.ResumedSince(at, healed, operatorCap+scenario.AtOnce)
	load := 3 * slow()
	for _, c := range r.History() {
		switch {
		case c.Time.Before(healed):
		case c.To == steadymq.Connecting:
			wait := max(c.Time.Sub(healed), 0)
			r.InTime(r.ResumedAfter-wait, scenario.AtOnce+load, "time from the first try to consuming")
			return
		case c.To == steadymq.Consuming:
			return // by a try that was on its way
		}
	}
}

// pulse has the plain driver set up consumers beside ours, until it is asked for the longest time
// that one of them took. That is how busy the machine was meanwhile, which a measurement afterwards
// would miss.
func (r *trial) pulse() (longest func() time.Duration) {
	var most time.Duration
	quit, done := make(chan struct{}), make(chan struct{})
	stop := sync.OnceFunc(func() { close(quit) })
	r.Cleanup(stop)
	go func() {
		defer close(done)
		for {
			most = max(most, r.PlainSetup())
			select {
			case <-quit:
				return
			case <-time.After(200 * time.Millisecond):
			}
		}
	}()
	return func() time.Duration {
		stop()
		<-done
		return most
	}
}

// longestWait is the longest time that the consumer said it would wait.
func (r *trial) longestWait() (longest time.Duration) {
	for _, c := range r.History() {
		longest = max(longest, c.RetryIn)
	}
	return longest
}

// userOf makes a user for the consumer; the publisher stays guest.
func (r *trial) userOf() (user string) {
	r.Helper()
	user = "user-of-" + r.Queue
	r.ok(r.Broker.NewUser(r.Context(), user, "first"))
	r.Cleanup(func() { _ = r.Broker.DropUser(context.Background(), user) })
	r.ok(r.Broker.Permit(r.Context(), user, r.vhost, ".*", ".*", ".*"))
	return user
}

func (r *trial) asUser(user string, password func() string) {
	r.Options = append(r.Options, steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
		return steadymq.Credentials{Username: user, Password: password()}, nil
	}))
}

func firstPassword() string { return "first" }

// refused takes something away, makes the consumer dial again, and gives it back two seconds after
// the consumer was refused.
func (r *trial) refused(take, giveBack func() error, reason string) {
	r.Helper()
	r.begin()
	r.ok(take())
	r.Cut()
	r.told(reason, 5*time.Second)
	r.Pause(2 * time.Second)
	assert.NotEqual(r, steadymq.Consuming, r.Consumer.State())
	at := time.Now()
	r.ok(giveBack())
	r.atNextTry(at, time.Now())
	r.judge()
}

func readForbidden(r *trial) {
	user := r.userOf()
	r.asUser(user, firstPassword)
	r.refused(
		func() error { return r.Broker.Permit(r.Context(), user, r.vhost, ".*", ".*", "^$") },
		func() error { return r.Broker.Permit(r.Context(), user, r.vhost, ".*", ".*", ".*") },
		"refused for user")
}

func vhostForbidden(r *trial) {
	user := r.userOf()
	r.asUser(user, firstPassword)
	r.refused(
		func() error { return r.Broker.Forbid(r.Context(), user, r.vhost) },
		func() error { return r.Broker.Permit(r.Context(), user, r.vhost, ".*", ".*", ".*") },
		"access to vhost")
}

func userLimited(r *trial) {
	user := r.userOf()
	r.asUser(user, firstPassword)
	r.refused(
		func() error { return r.Broker.LimitUser(r.Context(), user, 0) },
		func() error { return r.Broker.LimitUser(r.Context(), user, -1) },
		"limit")
	assert.LessOrEqual(r, r.longestWait(), time.Second, "a limit may be our own dead connection's: asked again every second")
}

func vhostLimited(r *trial) {
	r.refused(
		func() error { return r.Broker.LimitVhost(r.Context(), r.vhost, 0) },
		func() error { return r.Broker.LimitVhost(r.Context(), r.vhost, -1) },
		"limit")
	assert.LessOrEqual(r, r.longestWait(), time.Second, "a limit may be our own dead connection's: asked again every second")
}

func passwordChanged(r *trial) {
	user := r.userOf()
	var password atomic.Value
	password.Store("first")
	r.asUser(user, func() string { return password.Load().(string) })
	r.begin()
	r.ok(r.Broker.NewPassword(r.Context(), user, "second"))
	password.Store("second")
	lost, done := r.Timed(r.Cut)
	r.ResumedSince(lost, done, scenario.AtOnce)
	r.judge()
}

// urlRotatesLate: the application learns the new password two seconds after the broker, so the
// first tries are refused.
func urlRotatesLate(r *trial) {
	user := r.userOf()
	var password atomic.Value
	password.Store("first")
	r.Options = append(r.Options, steadymq.WithURLFunc(func(context.Context) (string, error) {
		return r.By(r.Broker.URLFor(user, password.Load().(string), strings.TrimPrefix(r.vhost, "/"))), nil
	}))
	r.begin()
	r.ok(r.Broker.NewPassword(r.Context(), user, "second"))
	lost := time.Now()
	r.Cut()
	r.Pause(2 * time.Second)
	at := time.Now()
	password.Store("second")
	r.Resumed(at, scenario.OperatorPace)
	r.toldOfLogin(lost, time.Second)
	r.judge()
}

func vhostDeleted(r *trial) {
	r.Options = append(r.Options, steadymq.WithQueue(steadymq.Queue{Type: string(r.kind)}))
	r.withoutVhost(r.Broker.DropVhost, "not found", r.Broker.NewVhost)
}

func vhostDown(r *trial) { r.withoutVhost(r.Broker.StopVhost, "is down", r.Broker.StartVhost) }

// withoutVhost takes the virtual host away until two seconds after the consumer was told.
func (r *trial) withoutVhost(take func(context.Context, string) error, reason string, giveBack func(context.Context, string) error) {
	r.Helper()
	r.begin()
	r.Feeder.Stop()
	r.SettledAll()
	lost := time.Now()
	r.ok(take(r.Context(), r.vhost))
	r.told(reason, 10*time.Second)
	r.Pause(2 * time.Second)
	r.ok(giveBack(r.Context(), r.vhost))
	r.atNextTry(lost, time.Now())
	r.Feed()
	r.judge()
}

// ---- whose it is ----

// another is a plain consumer beside ours.
func (r *trial) another(exclusive bool) *amqp.Connection {
	r.Helper()
	conn, err := amqp.DialConfig(r.Broker.URL(), amqp.Config{Heartbeat: scenario.Heartbeat})
	r.ok(err)
	r.Cleanup(func() { scenario.CloseWithin(conn, time.Second) })
	ch, err := conn.Channel()
	r.ok(err)
	r.ok(ch.Qos(100, 0, false))
	deliveries, err := ch.Consume(r.Queue, "another", false, exclusive, false, false, nil)
	r.ok(err)
	go func() {
		for range deliveries { // never settled: it goes back when the connection ends
		}
	}()
	return conn
}

func exclusiveConflict(r *trial) {
	r.Options = append(r.Options, steadymq.WithExclusive())
	other := r.another(true)
	r.Start()
	r.told("in exclusive use", 5*time.Second)
	r.Pause(2 * time.Second)
	at := time.Now()
	scenario.CloseWithin(other, time.Second)
	r.Resumed(at, lockStep)
	r.Feed()
	r.judge()
}

func singleActive(r *trial) {
	r.Options = append(r.Options, steadymq.WithStallDetector(time.Second), steadymq.WithQueue(steadymq.Queue{
		Type: string(r.kind), Args: amqp.Table{"x-single-active-consumer": true},
	}))
	other := r.another(false)
	r.Start()
	r.consuming()
	r.Feed()
	r.Pause(4 * time.Second)
	r.waitsFor(other)
}

// lowerPriority: the broker delivers everything to the consumer of a higher priority, as long as
// its prefetch allows.
func lowerPriority(r *trial) {
	r.Options = append(r.Options, steadymq.WithConsumeArgs(amqp.Table{"x-priority": -10}))
	other := r.another(false)
	r.Start()
	r.consuming()
	r.Publish(30)
	r.Pause(4 * time.Second)
	r.waitsFor(other)
}

// waitsFor is the end of a consumer that had nothing to do while another had everything.
func (r *trial) waitsFor(other *amqp.Connection) {
	r.Helper()
	assert.Zero(r, r.LostSessions(), "waiting its turn is no stall")
	assert.Zero(r, r.Ledger.Counts().Finished)
	scenario.CloseWithin(other, time.Second)
	r.judge()
	assert.Zero(r, r.LostSessions())
}

// detour sends the next dials past the proxy that holds a dead connection. Both proxies write to
// one log.
func (r *trial) detour() (turn func()) {
	r.Helper()
	other, err := r.Proxy.Beside(r.Broker.Addr())
	r.ok(err)
	r.Cleanup(func() { assert.NoError(r, other.Close()) })
	var turned atomic.Bool
	r.Options = append(r.Options, steadymq.WithDialer(func(ctx context.Context, network, address string) (net.Conn, error) {
		if turned.Load() {
			address = other.Addr()
		}
		return r.Sockets.Dial(ctx, network, address)
	}))
	return func() { turned.Store(true) }
}

// haunted leaves a dead connection behind that the broker takes for a live one.
func (r *trial) haunted(turn func(), reason string) {
	r.Helper()
	at := time.Now()
	turn()
	r.Proxy.BlackHole(faultproxy.Both)
	r.AwaitLost(0, at, scenario.SilentPeer)
	r.told(reason, scenario.AtOnce+time.Second)
	r.Resumed(at, buried+lockStep)
	r.Note("from the fault on: the broker buries the old connection after 2 to 3 heartbeats")
}

func exclusiveGhost(r *trial) {
	turn := r.detour()
	r.Options = append(r.Options, steadymq.WithExclusive())
	r.begin()
	r.haunted(turn, "in exclusive use")
	r.judge()
}

// exclusiveQueueGhost: the queue ends with its connection, and so does everything in it. Until then
// it is locked for everybody else.
func exclusiveQueueGhost(r *trial) {
	turn := r.detour()
	r.ok(r.Broker.DeleteQueue(r.Queue))
	r.Options = append(r.Options, steadymq.WithQueue(steadymq.Queue{Type: "classic", Exclusive: true}))
	r.Start()
	r.consuming()
	r.Publish(30)
	r.SettledAll()
	r.haunted(turn, "RESOURCE_LOCKED")
	r.publishAndFinish()
}

// publishAndFinish judges a consumer whose queue ends with it.
func (r *trial) publishAndFinish() {
	r.Helper()
	r.Publish(30)
	r.SettledAll()
	r.Cancel()
	r.Stopped(scenario.DrainTimeout + scenario.CloseTimeout + time.Second)
	r.NothingLeft()
	r.AcksAreRight()
	r.StatsAddUp()
	r.AddRow(r.Duplicates())
}

func serverNamed(r *trial) {
	var name atomic.Value
	r.Options = append(r.Options, steadymq.WithTopology(func(_ context.Context, ch *amqp.Channel) (string, error) {
		q, err := ch.QueueDeclare("", false, true, true, false, nil)
		name.Store(q.Name)
		return q.Name, err
	}))
	r.Start()
	r.consuming()
	first := name.Load().(string)
	r.Feeder.Queue = first
	r.Publish(30)
	r.SettledAll()
	lost, done := r.Timed(r.Cut)
	r.ResumedSince(lost, done, scenario.AtOnce)
	r.Feeder.Queue = name.Load().(string)
	assert.NotEqual(r, first, r.Feeder.Queue, "a new queue has a new name")
	r.publishAndFinish()
}

// autoDeleted: the queue ends with its consumer, and the next session makes it anew.
func autoDeleted(r *trial) {
	r.ok(r.Broker.DeleteQueue(r.Queue))
	r.Options = append(r.Options, steadymq.WithQueue(steadymq.Queue{Type: "classic", AutoDelete: true}))
	r.Start()
	r.consuming()
	r.Publish(30)
	r.SettledAll()
	r.Proxy.Refuse()
	r.Proxy.Reset()
	gone := func() bool { _, err := r.Broker.Queue(r.Queue); return err != nil }
	r.Must(5*time.Second, "the queue deletes itself", gone)
	at := time.Now()
	r.Proxy.Heal()
	r.Resumed(at, scenario.AfterRefusals)
	r.publishAndFinish()
	r.Must(5*time.Second, "the queue deletes itself at the end, too", gone)
}

// ---- consumer timeouts ----

// dawdler holds message 0 for so long the first time, and does not look at its context.
func (r *trial) dawdler(d time.Duration) {
	var first atomic.Bool
	r.Handle = func(_ context.Context, _ *steadymq.Delivery, n int) error {
		if n == 0 && first.CompareAndSwap(false, true) {
			r.Pause(d)
		}
		return nil
	}
}

func consumerTimeoutCancels(r *trial) {
	r.Options = append(r.Options, steadymq.WithConsumeArgs(amqp.Table{"x-consumer-timeout": 2000}))
	r.dawdler(6 * time.Second)
	r.begin()
	change := r.AwaitLost(0, time.Now(), 4*time.Second)
	assert.ErrorContains(r, change.Cause, "cancelled")
	r.Resumed(change.Time, scenario.AtOnce)
	r.KeptConnection()
	r.Pause(time.Second)
	r.judge()
}
