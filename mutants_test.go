package steadymq_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The planted bugs show that the simulation can fail. Each is a change of the
// library's source that exists in a temporary overlay only.
//
//	go test -run 'TestMutants$' -mutants -timeout 60m -v .
var (
	mutantsRun   = flag.Bool("mutants", false, "plant each bug and see whether the simulation catches it")
	mutantsSeeds = flag.Int("mutantseeds", 200, "how many seeds may be needed to catch a planted bug")
	mutantsOnly  = flag.String("mutant", "", "plant only the bugs whose name contains this")
)

// mutant is a planted bug: texts that stand in the source exactly once, and what
// stands there instead.
type mutant struct {
	name  string
	edits []edit
	// test names the quick test that has to fail, of a slip where the simulation
	// never goes; "" leaves it to the simulation.
	test string
}

type edit struct{ file, old, new string }

func change(name, file, before, after string) mutant {
	return mutant{name: name, edits: []edit{{file, before, after}}}
}

// inTest is a planted bug that the test has to catch, not the simulation.
func inTest(test string, m mutant) mutant {
	m.test = test
	return m
}

var mutants = []mutant{
	// Settling.
	change("every ack is sent twice", "session.go",
		"{ return s.lane.settle(basicAck, tag, 0) }",
		"{\n\t_ = s.lane.settle(basicAck, tag, 0)\n\treturn s.lane.settle(basicAck, tag, 0)\n}"),
	change("acks are multiple", "session.go",
		"s.lane.settle(basicAck, tag, 0)", "s.lane.settle(basicAck, tag, 1)"),
	change("a delivery may be settled twice", "ack.go",
		"if !f.outcome.CompareAndSwap(uint32(Unsettled), uint32(o)) {",
		"if f.outcome.Store(uint32(o)); false {"),
	inTest("TestCopiesOfADeliverySettleOnce", change("a copy of a delivery settles by itself", "ack.go",
		"\treturn d.fence.settle(d.fence.settler, o)\n",
		"\tcopied := &fence{origin: *d, tag: d.fence.tag, settler: d.fence.settler}\n\treturn copied.settle(copied.settler, o)\n")),
	{name: "late acks go to the newest session", edits: []edit{
		{
			"session.go", "func (s *session) settle(d *Delivery, o Outcome) error {",
			"var newest sync.Map\n\nfunc (s *session) settle(d *Delivery, o Outcome) error {\n\tif n, ok := newest.Load(s.config); ok && s.over.Load() {\n\t\treturn n.(*session).send(d, o)\n\t}",
		},
		{"session.go", "\ts.since = time.Now()\n", "\ts.since = time.Now()\n\tnewest.Store(s.config, s)\n"},
	}},
	{name: "late acks are sent", edits: []edit{
		{"session.go", "\tif s.over.Load() {\n\t\ts.stats.stale.Add(1)\n\t\treturn ErrStale", "\tif false {\n\t\treturn ErrStale"},
		{"lane.go", "if l.closed || s.out.off", "if s.out.off"},
	}},
	change("settlements go to channel 1", "lane.go",
		"binary.BigEndian.PutUint16(frame[1:], l.channel)", "binary.BigEndian.PutUint16(frame[1:], 1)"),
	change("acks before the handler has returned", "worker.go",
		"\terr = p.invoke(s, d, &err)", "\t_ = d.Ack()\n\terr = p.invoke(s, d, &err)"),
	change("a failed message is acked", "ack.go",
		"return Requeued, c.hold(d.Attempt())", "return Acked, 0"),
	change("a failed message goes back at once", "ack.go",
		"return Requeued, c.hold(d.Attempt())", "return Requeued, 0"),
	change("discard requeues", "ack.go",
		"func Discard(err error) error { return &verdict{outcome: Discarded,", "func Discard(err error) error { return &verdict{outcome: Requeued,"),
	change("forgets to settle after a panic", "worker.go",
		"\t\theld = s.conclude(d, err)\n", "\t\tif !errors.As(err, new(*PanicError)) {\n\t\t\theld = s.conclude(d, err)\n\t\t}\n"),
	{name: "handlers start for sessions that are over", edits: []edit{
		{"worker.go", "p.ctx.Err() != nil || !s.gate.enter() {", "s.gate.count.Add(2) < 0 {"},
	}},

	// Workers and contexts.
	change("a worker is lost after Goexit", "worker.go",
		"\t\t\tgo p.work()\n\t\t\treturn\n", "\t\t\treturn\n"),
	change("one worker too many", "worker.go", "for range n {", "for range n + 1 {"),
	change("handlers never learn of a lost session", "session.go",
		"\ts.shut()\n\ts.cancel(cause)\n", "\ts.shut()\n"),
	change("a stop cancels running handlers", "consumer.go",
		"handlers: context.WithoutCancel(ctx)", "handlers: ctx"),
	change("no handler timeout", "worker.go",
		"if p.config.handlerTimeout > 0 {", "if p.config.handlerTimeout < 0 {"),

	// Sessions.
	change("ignores basic.cancel", "session.go",
		"\t\t\tif cancelled {\n\t\t\t\treturn s.lost(errCancelled)\n\t\t\t}\n\t\tcase <-s.conn.end.ended:\n",
		"\t\tif cancelled {\n\t\t\tselect {\n\t\t\tcase <-s.channelEnd.ended:\n\t\t\t\treturn s.lost(s.diagnose())\n\t\t\tcase <-s.conn.end.ended:\n\t\t\t\treturn s.lost(s.diagnose())\n\t\t\tcase <-s.stop:\n\t\t\t\treturn nil\n\t\t\t}\n\t\t}\n\tcase <-s.conn.end.ended:\n"),
	change("ignores the end of its channel", "session.go",
		"\t\tcase <-s.channelEnd.ended:\n\t\tcase _, cancelled := <-s.cancels:\n\t\t\tif cancelled {\n\t\t\t\treturn s.lost(errCancelled)\n\t\t\t}\n\t\tcase <-s.conn.end.ended:\n",
		"\tcase <-s.conn.end.ended:\n"),
	change("a cancelled session gives its handlers no time", "session.go",
		"\t\ts.retire(cause)\n", "\t\ts.lose(cause)\n"),
	change("no prefetch", "session.go", "s.channel.Qos(s.config.prefetch, 0, false)", "s.channel.Qos(0, 0, false)"),
	change("the consumer tag is used again", "consumer.go",
		`tag := fmt.Sprintf("%s.%d-%d", s.tag, s.tries.Add(1), number)`, `tag := s.tag + "-1"`),

	// Reconnecting.
	change("no setup limit", "consumer.go",
		"context.WithTimeoutCause(s.ctx, s.config.setupTimeout, errSetupTimeout)", "context.WithCancel(s.ctx)"),
	change("the setup limit does not close the socket", "session.go",
		"unguard := context.AfterFunc(ctx, func() { tenancy.giveUp(causeOf(ctx)) })", "unguard := context.AfterFunc(ctx, func() {})"),
	change("gives up on a refusal after the first session", "reconnect.go",
		"if r.proven {", "if r.proven && false {"),
	change("gives up on 404", "reconnect.go",
		"case amqp.NotAllowed, amqp.AccessRefused, amqp.PreconditionFailed,", "case amqp.NotFound, amqp.NotAllowed, amqp.AccessRefused, amqp.PreconditionFailed,"),
	change("retries in a hot loop", "reconnect.go",
		"\tr.failures++\n", "\tif r.failures++; r.failures > 0 {\n\t\treturn time.Millisecond\n\t}\n"),
	change("the backoff has no cap", "reconnect.go",
		"return p.floor + rand.N(top-p.floor+1)", "return p.floor + p.initial<<min(p.failures, 12)"),
	change("no cap while dials are refused", "reconnect.go",
		"r.pace(0, c.retryInitial, time.Second)", "r.pace(0, c.retryInitial, c.retryCap)"),
	inTest("TestMissingQueueIsConsumedWithin5500msOfItsReturn", change("a missing queue is asked for as seldom as an operator mends", "reconnect.go",
		"time.Second, 5*time.Second)", "time.Second, operatorCap)")),
	inTest("TestNoWaitExceedsAGivenLimit", change("the limit of WithBackoff binds one class only", "reconnect.go",
		"limit = min(limit, r.limit)", "limit = min(limit, max(r.limit, time.Second))")),
	inTest("TestRefusedDialsDoNotQuickenThePaceOfWhatAnOperatorMends", change("a refused dial resets the pace of the operator's", "reconnect.go",
		"\trule.failures++\n", "\tif rule.failures++; kind == classRefused {\n\t\tr.rules[classOperator].failures, r.passed = 0, nil\n\t}\n")),
	inTest("TestLockIsNoYoungerForWhatFailsMeanwhile", change("what fails beside a lock makes it young again", "reconnect.go",
		"\trule := r.rules[kind]\n", "\tif rule := classify(err); rule != classLocked {\n\t\tr.lockSeen = time.Time{}\n\t}\n\trule := r.rules[kind]\n")),
	inTest("TestNamesDecideNoClass", change("a word that a name may hold decides the class", "phrases.go",
		"strings.HasPrefix(text, p.start) && (cut || strings.HasSuffix(text, p.end))", "(cut || strings.Contains(text, p.start) && strings.Contains(text, p.end))")),
	inTest("TestNamesDecideNoClass", change("a phrase is not held to its end", "phrases.go",
		"(cut || strings.HasSuffix(text, p.end))", "(cut || strings.Contains(text, p.end))")),
	inTest("TestTextThatWasCutOffIsTakenForWhatPasses", change("a text that was cut off is none of the phrases", "phrases.go",
		"(cut || strings.HasSuffix(text, p.end))", "(cut && false || strings.HasSuffix(text, p.end))")),
	inTest("TestStreamStartsOverOnlyIfItIsGoneItself", change("a stream starts over because of another queue", "stream.go",
		`want := "no queue '" + name + "' in vhost '"`, `want := "no queue '"`)),
	inTest("TestHostThatSaidItClosesRefusedOrFellSilentGoesLastForAMinute", change("a host that fell silent is as good as any", "hosts.go",
		"\treturn fellSilent(err)\n}", "\treturn false\n}")),
	inTest("TestLastGoodHostIsTriedAgainBeforeOneThatFellSilent", change("a host that fell silent is tried before the last good one", "hosts.go",
		"return round + 1, until", "return round, until")),
	inTest("TestHostThatFellSilentBetweenSessionsGoesLast", change("a connection that dies in backoff leaves its host good", "consumer.go",
		"\t\ts.hosts.failed(s.conn.host, s.conn.end.cause(), time.Now())\n", "")),
	inTest("TestEveryHostHasItsTurnHoweverTheOthersFail", change("a host that goes last has no turn", "hosts.go",
		"return round + 1, until", "return round + 1000, until")),
	inTest("TestMissingQueueIsAskedForOnOneConnection", change("a missing queue replaces its connection", "consumer.go",
		"|| kind == classAbsent && len(s.hosts.endpoints) < 2", "")),
	inTest("TestCredentialsAreRefreshedOverTheWholeRangeOfTheirExpiry", change("the life of credentials overflows", "connection.go",
		"time.Until(expires) / 10 * 7", "time.Until(expires) * 7 / 10")),
	inTest("TestCredentialsAreRefreshedOverTheWholeRangeOfTheirExpiry", change("expired credentials are refreshed every second", "connection.go",
		"time.Until(expires) > minRefresh", "true")),
	inTest("TestIssuerThatFailsIsAskedEverMoreSlowly", change("a failing issuer is asked every second", "connection.go",
		"\t\tagain.failures++\n", "\t\tagain.failures = 1\n")),
	inTest("TestStopAfterHoursOfHealthTellsNoFailures", change("a stop tells of failures long past", "consumer.go",
		"\tcase <-s.ctx.Done():\n\t\ts.proved(s.session)\n", "\tcase <-s.ctx.Done():\n")),
	inTest("TestChangesCutOffByTheEndAreCounted", change("changes cut off by the end are not counted", "notify.go",
		"\t\tr.dropped.Add(uint64(len(r.events)))\n", "")),
	inTest("TestTimesThatAMQPCannotCarryAreRefused", change("times before 1970 become those of the far future", "options.go",
		"return v.Unix() < 0", "return false")),
	change("consume-ok resets the backoff", "reconnect.go",
		"\tr.proven = true\n", "\tr.proven, r.failures = true, 0\n"),
	change("consume-ok makes all hosts untried", "hosts.go",
		"\tdelete(h.avoid, address)\n}", "\tdelete(h.avoid, address)\n\tclear(h.tries)\n}"),
	change("hosts are not rotated", "hosts.go",
		"order := slices.Clone(h.endpoints)", "order := h.endpoints[:1]"),

	// Sockets and connections.
	change("no inbound watchdog", "connection.go", "idleTimeout:  2 * interval,", "idleTimeout:  0,"),
	change("the driver does not hear of deliveries", "inbound.go", "if in.took && in.pass == 0 &&", "if false && in.pass == 0 &&"),
	change("a channel closed by the broker still delivers", "lane.go", "\tif l.refused {\n\t\treturn\n\t}\n", ""),
	change("the old connection is not closed", "connection.go", "\t\tc.leave <- d\n", ""),
	change("the password is in an error", "connection.go",
		"return nil, &SessionError{Host: e.address, Op: op, Err: err}", `return nil, &SessionError{Op: op, Err: fmt.Errorf("%s: %w", e.uri, err)}`),

	// URLs, and what a newcomer is told.
	inTest("TestURLThatIsWrongIsToldWhatIsWrongWithIt", change("an @ after the host is believed", "url.go",
		"case all > inside && inside == 0:", "case false:")),
	inTest("FuzzURL", change("a password with @ and / is dialled as a host", "url.go",
		"\tinside, all := strings.Count(authority, \"@\"), strings.Count(rest, \"@\")", "\tinside, all := strings.Count(authority, \"@\"), strings.Count(authority, \"@\")")),
	inTest("FuzzURL", change("the parser's error is shown", "url.go",
		"\t\treturn endpoint{}, &urlError{reason: reason}\n", "\t\t_, err := url.Parse(text)\n\t\treturn endpoint{}, &urlError{reason: reason, err: err}\n")),
	inTest("TestURLThatIsGoodIsDialledAtItsHost", change("a : in a password is refused", "url.go",
		`"-._~!$&'()*+,;=:%"`, `"-._~!$&'()*+,;=%"`)),
	inTest("TestURLThatIsWrongIsToldWhatIsWrongWithIt", change("unknown parameters are ignored", "url.go",
		"\t\treturn unknownParameter(name)\n", "\t\treturn \"\"\n")),
	inTest("TestURLThatIsWrongIsToldWhatIsWrongWithIt", change("TLS parameters are ignored without TLS", "url.go",
		`case scheme == "amqp" && slices.Contains(`, `case scheme == "" && slices.Contains(`)),
	inTest("TestURLThatIsWrongIsToldWhatIsWrongWithIt", change("a certificate without its key is ignored", "url.go",
		`if given.Has("certfile") != given.Has("keyfile") {`, "if false {")),
	inTest("TestURLsMechanismsCountInAnyCase", change("a mechanism in capitals becomes PLAIN", "url.go",
		"\te.uri.AuthMechanism = mechanisms\n", "\t_ = mechanisms\n")),
	inTest("TestEachURLHasItsOwnHeartbeatAndDialTimeout", change("the heartbeat of a URL is ignored", "options.go",
		`if e.heartbeat != 0 && !c.set["WithHeartbeat"] {`, "if false {")),
	inTest("TestConnectionTimeoutOfTheURLBoundsTheDial", change("connection_timeout is ignored", "options.go",
		`if e.dialTimeout != 0 && !c.set["WithDialTimeout"] {`, "if false {")),
	inTest("TestConnectionTimeoutOfTheURLBoundsTheDial", change("connection_timeout beats WithDialTimeout", "options.go",
		`if e.dialTimeout != 0 && !c.set["WithDialTimeout"] {`, "if e.dialTimeout != 0 {")),
	inTest("TestHeartbeatOfTheFuncsURLCounts", change("the driver is not told the heartbeat of the URL", "connection.go",
		"Heartbeat:  c.heartbeatOf(e),", "Heartbeat:  c.heartbeat,")),
	inTest("TestURLFuncMayNotSwitchTLSOff", change("a URL function may switch TLS off", "consumer.go",
		"s.config.endpointOf(text)", "parseEndpoint(text)")),
	inTest("TestURLOfTheFuncThatNewWouldRefuseIsNotDialled", change("a wrong URL is asked for at the pace of dials", "reconnect.go",
		", errors.As(err, new(*urlError)):", ":")),
	inTest("TestTryThatDialledNothingNamesNoHost", change("a try without a URL names the last host", "consumer.go",
		"\t\ts.host = e.address // \"\" until", "\t\ts.host = cmp.Or(e.address, s.host) // \"\" until")),
	inTest("TestTryThatDialledNothingNamesNoHost", change("a host that refused is not named", "consumer.go",
		"\t\t\ts.host = cmp.Or(s.host, at.Host)\n", "")),
	inTest("TestCACertFileOfTheURLIsTrustedAndNoOther", change("server_name_indication is ignored", "endpoint.go",
		"ServerName: e.uri.ServerName, ", "")),
	inTest("TestClientCertificateOfTheURLIsShown", change("certfile is ignored", "endpoint.go",
		"c.Certificates = []tls.Certificate{pair}", "_ = pair")),
	inTest("TestURLAndOptionsThatContradictAreRefused", change("parameters for TLS beside WithTLSConfig are ignored", "options.go",
		"if c.tls != nil && (u.CACertFile", "if false && (u.CACertFile")),
	inTest("TestNewcomersMistakesThatRunTells", change("a refusal comes without advice", "errors.go",
		"step, e.reason(), advice(e.Op, e.Err))", `step, e.Err, "")`)),
	inTest("TestLockIsWaitedForAsLongAsTheURLsHeartbeatSays", change("the heartbeat of a connection is forgotten", "consumer.go",
		"\t\ts.retry.heartbeat = max(s.retry.heartbeat, a.conn.heartbeat)\n", "")),
	inTest("TestALockIsWaitedForAsLongAsItsConnectionsHeartbeatsTake", change("a lock is waited for as long as the default heartbeat takes", "reconnect.go",
		"3*cmp.Or(r.heartbeat, r.config.heartbeat) + lockedExtra", "3*cmp.Or(r.config.heartbeat, r.heartbeat) + lockedExtra")),
	// Logging in.
	change("the watchdog is never let loose", "connection.go", "\tsocket.watchPeer()\n", ""),
	inTest("TestSilentRefusalIsRecognisedHoweverTheSocketEnds", change("the watchdog bites in the handshake", "socket.go",
		"\ts.running.Go(s.writeLoop)\n", "\ts.running.Go(s.writeLoop)\n\ts.watchPeer()\n")),
	inTest("TestSilentRefusalIsRecognisedHoweverTheSocketEnds", change("a silent refusal that ends by RST is a lost path", "login.go",
		" || errors.Is(lost, errPeerReset)\n", "\n")),
	inTest("TestSlowGreetingDoesNotMakeALostLoginARefusal", change("a slow greeting counts as silence after the login", "login.go",
		"\tl.answered = time.Now()\n", "")),
	inTest("TestRefusedLoginIsToldAtOnce", change("does not ask to be told of a refused login", "login.go",
		"capabilities[toldOfRefusals] = true", "capabilities[toldOfRefusals] = false")),
	inTest("TestRefusedLoginIsToldAtOnce", change("a refused login is not told from other refusals", "login.go",
		"if said.Code != amqp.AccessRefused {", "if true {")),
	inTest("TestMechanismTheBrokerDoesNotOfferIsARefusedLogin", change("a mechanism that is not offered is retried", "reconnect.go",
		"return refused || stated(err)", "return stated(err)")),
	inTest("TestRefusedLoginIsToldAtOnce", change("credentials of a function get one try", "reconnect.go",
		" || r.config.asksForLogin()) {", ") {")),
	inTest("TestMechanismTheBrokerDoesNotOfferIsARefusedLogin", change("the broker's offer is not read", "inbound.go",
		"offer = mechanismsOf(b[:whole-1])", "")),
	inTest("TestRefusedGuestIsToldOfLoopback", change("guest is not told of loopback", "login.go",
		`if l.user != "guest" {`, "if true {")),
	inTest("TestLoginMechanismOfAUserThatFails", change("a function of the user that panics ends the process", "guard.go",
		"if !returned { // recover", "if !returned && false { // recover")),
	inTest("TestLoginMechanismOfAUserThatFails", change("logs in with nothing where a mechanism failed", "login.go",
		"\t\tl.abort(l.failed) // the driver knows no other way to send nothing\n", "\t\tl.failed = nil\n")),
	inTest("TestPortThatIsNotForAMQPIsNamed", change("a wrong port that resets is not named", "ports.go",
		"errPeerReset, syscall.ECONNRESET, ", "syscall.EPIPE, ")),
	inTest("TestPortThatIsNotForAMQPIsNamed", change("a wrong port that is silent is not named", "ports.go",
		", errSetupTimeout} {", "} {")),
	inTest("TestPortThatIsNotForAMQPIsNamed", change("a wrong port is asked quickly", "reconnect.go",
		"errors.As(err, &protocol) ||\n\t\terrors.As(err, &port)", "errors.As(err, &protocol) && errors.As(err, &port)")),
	inTest("TestBrokerOnAPortOfAnotherProtocolIsNotCalledWrong", change("a login that is lost is the port's fault", "connection.go",
		`fmt.Errorf("lost while logging in: %w", lost)`, `fmt.Errorf("lost while logging in: %w", namePort(e, lost))`)),

	// Stopping.
	change("a stop drops the session instead of draining it", "session.go",
		"\t\ts.drain()\n", "\t\ts.lose(errStopped)\n"),
	change("the drain does not wait for handlers", "session.go",
		"\tif s.drained == nil {\n\t\ts.drained = s.awaitHandlers(limit.C)\n\t}\n", ""),
	change("no drain limit", "session.go",
		"func (s *session) drain() {\n\tlimit := time.NewTimer(s.config.drainTimeout)", "func (s *session) drain() {\n\tlimit := time.NewTimer(24 * time.Hour)"),
	change("held messages are not released by the drain", "session.go",
		"\ts.ended.notify(errStopped)\n\ts.releaseHeld()\n", "\ts.ended.notify(errStopped)\n"),
	change("messages that were not started are not handed back", "session.go",
		"\tcase err == nil:\n\t\ts.handBackRest()\n", "\tcase err == nil:\n"),
	{name: "close-ok is not awaited", edits: []edit{
		{"session.go", "\t\terr = s.call(nil, s.channel.Close)\n", "\t\terr = nil\n\t\ts.givenUp = true\n"},
		{"connection.go", "\t\t_ = c.amqp.CloseDeadline(time.Now().Add(limit))\n", "\t\tgo func() { _ = c.amqp.CloseDeadline(time.Now().Add(limit)) }()\n"},
	}},
	// Failing handlers.
	inTest("TestFailedMessageIsHeldTwiceAsLongEachTime", change("a hold does not grow", "hold.go",
		"for ; n > 1 && d < c.requeueLongest; n-- {", "for ; n < 0; n-- {")),
	inTest("TestHoldsStayWithinWhatWasAsked", change("a hold outgrows the longest", "hold.go",
		"return min(jitter(min(d, c.requeueLongest)), c.requeueLongest)", "return jitter(d)")),
	inTest("TestHoldsStayWithinWhatWasAsked", change("a longest hold below the first is taken", "options.go",
		"if longest < first {", "if false {")),
	inTest("TestStreamMessageIsTriedAgainInPlaceAfterTheSameHolds", change("a failed message of a stream ends the session", "session.go",
		"\t\ts.tryAgain(d)\n", "\t\ts.broken.notify(errCancelled)\n")),
	inTest("TestStreamMessageIsTriedAgainInPlaceAfterTheSameHolds", change("a failed message of a stream is skipped", "session.go",
		"\t\ts.tryAgain(d)\n\t\treturn nil\n", "")),
	inTest("TestStreamMessageIsTriedAgainInPlaceAfterTheSameHolds", change("a try in place settles what the handler made of the tag", "ack.go",
		"\tnext.DeliveryTag = d.fence.tag\n", "")),
	inTest("TestStreamMessageIsTriedAgainInPlaceAfterTheSameHolds", change("tries in place are not counted", "ack.go",
		"next.fence.tries = d.fence.tries + 1", "next.fence.tries = d.fence.tries")),
	inTest("TestHandlerOfAStreamSaysWhenItIsTriedAgain", change("a try in place spins", "session.go",
		"time.AfterFunc(againAfter, ", "time.AfterFunc(0, ")),
	inTest("TestErrorOfAHandlerThatWasCutOffIsNoFailure", change("a lost session is a failure of the handler", "worker.go",
		"failed = err != nil && !s.cutOff(err)", "failed = err != nil")),
	inTest("TestPanicOfAHandlerThatWasCutOffIsTold", change("a panic after the end of the session is not told", "worker.go",
		" && !errors.As(err, new(*PanicError))", "")),
	inTest("TestHandlerThatStopsItsConsumerIsTheLast", change("handlers start after Run's context has ended", "worker.go",
		"p.ctx.Err() != nil || ", "")),
	inTest("TestStopCostsWhatWasNotStartedOneDelivery", change("a worker hands back before the basic.cancel", "session.go",
		"if !s.lane.takeBack(d) {", "if true {")),
	inTest("TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn", change("held messages are not counted", "hold.go",
		"\th.session.stats.held.Add(1)\n", "")),
	inTest("TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn", change("released messages are held for ever", "hold.go",
		"\th.session.stats.held.Add(-int64(len(held)))\n", "")),
	inTest("TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn", change("held messages are not told", "hold.go",
		"if h.crowded.IsZero() && h.crowd() {", "if false {")),
	inTest("TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn", change("held messages are told every two minutes", "hold.go",
		"max(lasts, heldAgain)", "heldAgain")),
	inTest("TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn", change("one held message of a stream is not told", "hold.go",
		"if taken > 0 && h.session.stream != nil {", "if false {")),
	inTest("TestHeldMessagesOfManySessionsAreToldOnceAMinute", change("each session tells of held messages", "hold.go",
		"s.told.held.pass(time.Minute); !ok {", "s.told.held.pass(time.Minute); !ok && false {")),
	inTest("TestHandlerPastItsTimeoutIsToldAndCounted", change("a handler past its timeout is not told", "worker.go",
		"\t\tdefer s.overdue(d)()\n", "")),
	inTest("TestHandlerPastItsTimeoutIsToldAndCounted", change("a handler that returns late is overdue for ever", "late.go",
		"\t\t\ts.stats.overdue.Add(-1)\n", "")),
	inTest("TestHandlerThatSettledAndThenFailedIsTold", change("an error after the settlement is a failure like others", "log.go",
		"\tcase f.contradicts():\n", "\tcase false:\n")),
	inTest("TestHandlersTooSlowForThePrefetchAreToldBeforeTheConsumerTimeout", change("slow handlers are not told", "late.go",
		"late := taken < p.arrived[0]", "late := false")),
	inTest("TestHandlersTooSlowForThePrefetchAreToldBeforeTheConsumerTimeout", change("busy handlers are slow ones", "late.go",
		"late := taken < p.arrived[0]", "late := taken < p.arrived[len(p.arrived)-1]")),
	// Messages that cannot be read.
	change("headers nest as deep as the driver allows", "frame.go", "const maxDepth = 32 << 10", "const maxDepth = 32"),
	inTest("TestHeadersThatRabbitMQAcceptsAreRead", change("a header frame above frame_max is the driver's", "inbound.go",
		"l.begun() && whole <= math.MaxInt32:", "l.begun() && whole <= min(frameSize, math.MaxInt32):")),
	inTest("TestMessageThatCannotBeReadStopsNothing", change("a handler gets what cannot be read", "lane.go",
		"\tif unfit != nil {\n\t\tl.aside.put(d, unfit)\n\t\treturn\n\t}\n", "\t_ = unfit\n")),
	inTest("TestMessageThatCannotBeReadStopsNothing", change("what cannot be read is acked", "unreadable.go",
		"return p.lane.settle(basicNack, d.fence.tag, nackRequeue)", "return p.lane.settle(basicAck, d.fence.tag, 0)")),
	inTest("TestMessageThatCannotBeReadStopsNothing", change("what cannot be read counts as a failure of a handler", "unreadable.go",
		"return p.lane.settle(basicNack, d.fence.tag, nackRequeue)", "return p.lane.settle(basicReject, d.fence.tag, rejectRequeue)")),
	inTest("TestMessageThatCannotBeReadStopsNothing", change("what cannot be read goes back at once", "unreadable.go",
		"s.holds.add(d, min(jitter(unreadableHold), unreadableHold))", "s.holds.add(d, time.Millisecond)")),
	inTest("TestManyUnreadableMessagesMakeOneLogLineASecond", change("each message that cannot be read is logged", "unreadable.go",
		"\tif !ok {\n\t\treturn\n\t}\n", "\t_ = ok\n")),
	inTest("TestStreamStepsOverAMessageThatCannotBeRead", change("a stream waits for what cannot be read", "unreadable.go",
		"\t\t\tplaced(d)\n", "")),
	inTest("TestSkippedBodyTakesNoMemory", change("a body that is too large is read all the same", "lane.go",
		"\tif l.unfit == nil {\n\t\t// What", "\tif true {\n\t\t// What")),
	inTest("TestHeadersTakeMemoryAsTheyCome", change("room for large headers is never given back", "inbound.go",
		"case size > readBuffer && in.w == 0:", "case false:")),
	inTest("TestAcksArriveBeforeASessionIsEndedForGarbage", change("garbage takes acks along that were given", "inbound.go",
		"\t\t\ts.dismiss(err)\n", "\t\t\ts.kill(err)\n")),

	inTest("TestSocketWhosePeerIsSilentIsResetNotClosed", change("a silent peer is sent a FIN", "socket.go",
		"s.end(!errors.Is(err, io.EOF))", "s.end(false)")),

	// Sessions that share a connection, and functions of the user.
	inTest("TestHandlersOfACancelledSessionFinishWhateverBecomesOfItsSuccessor", change("a set-up that ends ends the others on its connection", "tenancy.go",
		"\tif t.count > 0 {\n\t\treturn nil\n\t}\n", "")),
	inTest("TestHandlersOfACancelledSessionFinishWhenItsConnectionIsReplaced", change("a connection that is replaced does not wait for its sessions", "connection.go",
		"\t\tlimit = c.awaitTenants(asked)\n", "\t\tlimit = asked.limit\n")),
	inTest("TestRefusedTriesLeaveNothingInMemory", change("a refused try keeps its inbox", "session.go", "\t\ts.lane.forget()\n", "")),
	inTest("TestHandlerThatHangsKeepsNoLaterSessionsInMemory", change("all connections are kept", "consumer.go",
		"func (s *supervisor) sweep() { s.leaving = slices.DeleteFunc(s.leaving, leaver.left) }", "func (s *supervisor) sweep() { slices.IndexFunc(s.leaving, leaver.left) }")),
	inTest("TestStopOnABusyPathLetsRunningHandlersFinish", change("the close limit counts while deliveries come", "session.go",
		"left := s.config.closeTimeout - s.conn.socket.sinceDelivery(); left > 0", "left := time.Duration(0); left > 0")),
	inTest("TestStopWithAStrayReplyOnABlockedPathKeepsItsLimits", change("a stray reply to basic.cancel is waited out", "session.go",
		"\tcase !s.channel.IsClosed(): // a reply", "\tcase false: // a reply")),
	inTest("TestStopHurriesAConnectionThatIsOnItsWayOut", change("a stop waits for a connection that takes its time", "consumer.go",
		"\ts.hurryLeaving()\n", "")),
	inTest("TestRunTellsOfAcksThatWereLostWhileDraining", change("a channel that has ended counts as closed in order", "session.go",
		"if cause := s.channelEnd.cause(); !errors.Is(cause, errChannelEnded) {", "if cause := s.channelEnd.cause(); cause == nil {")),
	inTest("TestRunTellsOfAcksThatACancelledSessionLostWhileDraining", change("what a cancelled session loses is read by nobody", "consumer.go",
		"\t\t\t\ts.note(l.session.drained)\n", "\t\t\t\t_ = l.session.drained\n")),
	inTest("TestTopologyThatCallsGoexitLeaksNoConnection", change("a function of the user that ends its goroutine is waited for", "guard.go",
		"\t\tdone <- a\n", "\t\tif returned {\n\t\t\tdone <- a\n\t\t}\n")),
	inTest("TestDialerThatIgnoresItsContextIsLeftBehindAndWhatItOpensLateIsClosed", change("what a dialer opens late stays open", "connection.go",
		"\t\t\tlate: abort,\n", "")),
	inTest("TestMiddlewareThatMakesNoHandlerIsRefusedByRun", change("a nil handler of a middleware is found per message", "guard.go",
		"\t\tif made == nil {", "\t\tif false {")),
	inTest("TestDrainErrorCountsTheHandlersOfItsOwnRun", change("the drain counts the handlers of earlier Runs", "session.go",
		"Handlers: int(s.running())", "Handlers: int(s.stats.handling.Load())")),
	// The delivery limit, and what is counted.
	inTest("TestHandlerThatFailsForADayLosesNothing", change("the limit is switched off on 3.x, where that drops at once", "limit.go",
		"c.major() < 4 || q.deadLetters()", "c.major() < 3 || q.deadLetters()")),
	inTest("TestHandlerThatFailsForADayLosesNothing", change("the limit is not switched off on 4.x", "limit.go",
		"\treturn limitOff\n", "\treturn limitTheirs\n")),
	inTest("TestDefaultLimitHoldsWhereThereIsADeadLetterTarget", change("the limit is switched off where there is a dead-letter target", "limit.go",
		"c.major() < 4 || q.deadLetters()", "c.major() < 4")),
	inTest("TestDeadLettersGoWhereTheQueueSays", change("a dead-letter queue has a limit", "topology.go",
		`if q.Type == "quorum" && s.conn.major() >= 4 {`, "if false {")),
	inTest("TestQueueWithALimitIsTakenAsItIs", change("a queue with a limit is refused", "session.go",
		"if err != nil && t.concede(err) {", "if false {")),
	inTest("TestQueueWithALimitIsTakenAsItIs", change("a queue with the default limit is taken, one with its own is not", "topology.go",
		"t.limit != limitUnsaid && t.limit != limitOff ||", "t.limit != limitOff ||")),
	inTest("TestQueueWithALimitIsTakenAsItIs", change("a limit that stays is told in every session", "limit.go",
		"s.told.limitKept.Swap(true)", "s.told.limitKept.Load()")),
	inTest("TestOtherInequivalenceIsTheOperators", change("a queue is taken as it is whatever it is", "topology.go",
		" || !strings.HasPrefix(said.Reason, inequivalentLimit):", ":")),
	inTest("TestDeadLetterQueueOfAnotherKindIsTakenAsItIs", change("a dead-letter queue of another kind is refused", "topology.go",
		"\t\tt.deadKept = true\n", "\t\treturn false\n")),
	inTest("TestMessageNearTheLimitOfOthersIsTold", change("messages near the limit flood the log", "limit.go",
		"\tif !ok {\n\t\treturn\n\t}\n", "\t_ = ok\n")),
	inTest("TestMessageNearTheLimitOfOthersIsTold", change("a message near the limit is not told", "session.go",
		"\ts.limit = s.deliveryLimit()\n", "")),
	inTest("TestDeadLetterThatArrivesBeyondTheLimitIsTold", change("a dead letter beyond the limit is not told", "limit.go",
		" && !d.arrivesCounted(n)", "")),
	inTest("TestAttemptIsThatOfThisQueue", change("rejections by another queue are tries", "attempt.go",
		"case mine && rejected && i > 0:", "case rejected && (i > 0 || !mine):")),
	inTest("TestAttemptIsThatOfThisQueue", change("rejections by a retry loop are no tries", "attempt.go",
		"\treturn max(n, here)\n", "\treturn n\n")),
	inTest("TestAttemptIsThatOfThisQueue", change("a message published again keeps its rejections", "attempt.go",
		"mine && rejected && i > 0", "mine && rejected && i >= 0")),
	inTest("TestAttemptIsThatOfThisQueue", change("a message published again keeps its count", "attempt.go",
		"\tcase !d.Redelivered:\n\t\tn = 0\n", "")),
	inTest("TestAttemptIsThatOfThisQueue", change("deliveries by another queue are tries", "attempt.go",
		"case known && n == acquired, !known && n == here+elsewhere:", "case false:")),
	change("a lost connection hides handlers left behind", "consumer.go", "\tcase err != nil:\n\t\ts.err = join(s.err, err)\n", ""),
	change("a hook is called after Run", "notify.go", "\tif r.muted.Load() {\n", "\tif false {\n"),

	// Telling.
	inTest("TestHourOfOutageIsAtMost100Lines", change("repeated causes are all told", "log.go",
		"\tif s.count < s.next && !time {",
		"\tif false && !time {")),
	inTest("TestHourOfOutageIsAtMost100Lines", change("repeated causes are told no more", "log.go",
		"\tif s.count < s.next && !time {",
		"\tif s.count > 1 {")),
	inTest("TestHourOfOutageIsAtMost100Lines", change("a consumer that flaps is told each time", "log.go",
		"\tif !j.again.step(false) {",
		"\tif false {")),
	inTest("TestHourOfOutageIsAtMost100Lines", change("short sessions make the log begin anew", "log.go",
		"now.Sub(j.since) < calm {",
		"now.Sub(j.since) < calm/10 {")),
	inTest("TestHourOfOutageIsAtMost100Lines", change("the queue is missing in the log", "log.go",
		"slog.String(\"queue\", c.Queue)}",
		"slog.String(\"name\", c.Queue)}")),
	inTest("TestHourOfCausesThatAreAllDifferentIsAtMost100Lines", change("every cause is counted apart", "log.go",
		" || j.news.spend(c.Time)) {",
		" || true) {")),
	inTest("TestFailureOnTwoHostsIsOneCause", change("each host is a cause of its own", "log.go",
		"j.cause(causeKey(c), c.Time)",
		"j.cause(c.Host, c.Time)")),
	inTest("TestConsumingThatWasLeftOutIsToldOnceItLasts", change("a consuming that was left out is never told", "log.go",
		"\t\tj.write(*j.owed)\n",
		"")),
	inTest("TestFailingHandlersDoNotFloodTheLog", change("handlers' errors are all told", "log.go",
		"\tif !due {\n\t\tf.left++\n",
		"\tdue = true\n\tif !due {\n\t\tf.left++\n")),
	inTest("TestFailuresThatWereLeftOutAreToldAtLast", change("what was left out of handlers' errors is never told", "log.go",
		"\tj.quiet.Reset(silence + failureGap)",
		"\tj.quiet.Reset(24 * time.Hour)")),
	inTest("TestHandlersErrorIsToldWithItsMessage", change("handlers' errors are silent", "worker.go",
		"\tp.reporter.failed(failure{session: s, delivery: d, held: held, err: err, panicked: panicked})\n", "\t_ = panicked\n")),
	inTest("TestHandlerCutOffByALostSessionIsNotToldAsFailed", change("a lost session is told as a handler's failure", "worker.go",
		"return s.ctx.Err() != nil && !errors.As", "return s.ctx.Err() != nil && s == nil && !errors.As")),
	inTest("TestDefaultLoggerIsLookedUpWhenRunBegins", change("the default logger is looked up by New", "options.go",
		"\t\ttagPrefix:      \"steadymq\",\n",
		"\t\ttagPrefix:    \"steadymq\",\n\t\tlogger:       slog.Default(),\n")),
	inTest("TestSettledTellsEveryOutcomeOnce", change("a held message is told twice", "session.go",
		"\t\ts.holds.add(d, delay)\n",
		"\t\ts.holds.add(d, delay)\n\t\tif s.config.hooks.Settled != nil {\n\t\t\ts.reporter.settled(d, Requeued)\n\t\t}\n")),
	inTest("TestSettledTellsHeldMessagesWhenTheirSessionEnds", change("held messages are not told when their session ends", "session.go",
		"\ts.reporter.released(held.deliveries)\n",
		"")),
	inTest("TestSettledTellsOfASettlementThatCameTooLate", change("a stale settlement is told as sent", "session.go",
		"\t\to = Stale\n\t\td.fence",
		"\t\td.fence")),
	inTest("TestSettledThatPanicsOrExitsEndsRunInOrder", change("a hook that exits leaves its handler inside", "worker.go",
		"\tdefer s.gate.leave() // even",
		"\tdefer func() {\n\t\tif held >= 0 && d.Outcome() != Acked {\n\t\t\ts.gate.leave()\n\t\t}\n\t}() // even")),
	inTest("TestStateChangedThatExitsEndsRunInOrder", change("a hook that exits silences the log", "notify.go",
		"\t\t\tgo r.run()\n\t\t\treturn\n",
		"\t\t\tclose(r.done)\n\t\t\treturn\n")),
	inTest("TestErrorsSayAThingOnce", change("a refused dial is told twice", "reason.go",
		"addressed && e.Err != nil",
		"false && e.Err != nil")),
	inTest("TestErrorsOfRunStayInOneLine", change("Run's errors are several lines", "reason.go",
		"\treturn strings.Join(texts, \"; \")",
		"\treturn strings.Join(texts, \"\\n\")")),
	inTest("TestCredentialsNeverShowThePassword", change("credentials are marshalled with their password", "connection.go",
		"func (c Credentials) MarshalText()",
		"func (c Credentials) Text()")),
	inTest("TestDeliveryCanBeMarshalledAndLogged", change("a delivery cannot be marshalled", "show.go",
		"func (d Delivery) MarshalJSON()",
		"func (d Delivery) JSON()")),
	inTest("TestHostileMessageCanBeMarshalled", change("a hostile header cannot be marshalled", "show.go",
		"Headers:         tableJSON(d.Headers, shownDepth),",
		"Headers:         d.Headers,")),
	// Values and functions of the user.
	inTest("TestErrorOfAHandlerThatCannotBeReadIsAFailure", change("a handler's error is read unseen", "worker.go",
		"err = sound(p.handler(ctx, d))", "err = p.handler(ctx, d)")),
	inTest("TestErrorOfAHandlerThatCannotBeReadIsAFailure", change("what a handler panics with is read unseen", "sound.go",
		"if new(reading).all(e) != nil {", "if false {")),
	inTest("TestErrorOfAHandlerThatCannotBeReadIsAFailure", change("Invoke reads an error unseen", "ack.go",
		"err = sound(h(ctx, d))", "err = h(ctx, d)")),
	inTest("TestErrorThatCannotBeReadIsAFailureThatSaysSo", change("an error of a user's function is read unseen", "guard.go",
		"\ta.err = sound(a.err)\n", "")),
	inTest("TestErrorThatCannotBeReadIsAFailureThatSaysSo", change("of errors side by side none is looked at", "sound.go",
		"for _, inner := range e.Unwrap() {", "for _, inner := range e.Unwrap()[:0] {")),
	inTest("TestOutcomeStaysThoughTheErrorInItCannotBeRead", change("a discard around a nil pointer is a failure", "sound.go",
		"if v := r.verdict; v != nil {", "if v := r.verdict; false {")),
	inTest("TestCauseOfRunsContextThatCannotBeReadEndsNoProcess", change("the cause of Run's context is read unseen", "sound.go",
		"return sound(context.Cause(ctx))", "return context.Cause(ctx)")),
	inTest("TestDialerThatReturnsNoConnectionIsAFailureThatSaysSo", change("a dialer's nil pointer is a connection", "guard.go",
		" || v.Kind() == reflect.Pointer && v.IsNil()", "")),
	inTest("TestConnectionThatComesWithAnErrorIsClosed", change("a connection that comes with an error stays open", "connection.go",
		"\t\t\t\t\tabort(conn)\n", "")),
	inTest("TestNewRefusesANilPointerForALoginMechanism", change("a nil pointer is a login mechanism", "options.go",
		"if isNil(m) {", "if m == nil {")),
	inTest("TestConnectionThatPanicsIsReplaced", change("a Read that ends its goroutine leaves the socket", "guard.go",
		"\t\t\tbroken(err)\n", "")),
	inTest("TestConnectionThatPanicsIsReplaced", change("a Close that panics ends the process", "socket.go",
		"\tdefer func() { _ = recover() }()\n\t_ = conn.Close()\n", "\t_ = conn.Close()\n")),
	inTest("TestTLSCallbackThatFailsLeavesNoSocket", change("what panics while the driver reads ends the process", "inbound.go",
		"transfer(s.conn.Read, in.buf[in.w:], s.kill)", "s.conn.Read(in.buf[in.w:])")),
	{name: "a handshake that does not return is waited for", test: "TestTLSCallbackThatFailsLeavesNoSocket", edits: []edit{
		{
			"socket.go", "\t_, err = userCall[struct{}]{\n\t\toption: \"WithTLSConfig\",\n", "\t_, err = userCall[struct{}]{\n\t\toption: \"\",\n",
		},
		{"socket.go", "\t\tbare:   true,\n\t}.run(ctx)\n", "\t\tbare:   true,\n\t}.f(ctx)\n"},
	}},
	inTest("TestTLSCallbackThatHangsIsLeftBehindAndCounted", change("a callback that is left behind is not counted", "connection.go",
		"c.socketOptions(e), abandoned)", "c.socketOptions(e), func() {})")),
	inTest("TestFunctionThatHangsEndsRunAfterTheSetupLimit", change("WithFatal has no limit", "guard.go",
		"\tctx, cancel := context.WithTimeoutCause(ctx, c.setupTimeout, errNoAnswer)\n\tdefer cancel()\n\treturn userCall[bool]{",
		"\treturn userCall[bool]{")),
	inTest("TestFunctionThatHangsEndsRunAfterTheSetupLimit", change("a middleware has no limit", "guard.go",
		"\tctx, cancel := context.WithTimeoutCause(ctx, c.setupTimeout, errNoAnswer)\n\tdefer cancel()\n\tfor i",
		"\tfor i")),
	inTest("TestLogHandlerThatPanicsEndsRunAndIsNamed", change("a log handler that panics is called a hook", "notify.go",
		`r.call(f, "WithLogger", "the log handler")`, `r.call(f, "WithHooks", "a hook")`)),
	inTest("TestLogHandlerThatPanicsForAFailedHandlerEndsRun", change("workers ask the log handler", "log.go",
		"\tif !due { // whether", "\tif !due || !j.logger.Enabled(j.ctx, level) { // whether")),
	inTest("TestNoHookIsCalledAfterOneHasPanicked", change("hooks are called after one has panicked", "notify.go",
		"\tif r.broken.cause() == nil {\n", "\tif true {\n")),

	// What was told wrongly.
	inTest("TestNewCauseThatDiffersByAShortNumberIsToldAtOnce", change("a status makes no cause", "log.go",
		`|\d{4,}`+"`)", `|\d+`+"`)")),
	inTest("TestCauseThatDiffersInAddressOrLongNumberIsTheSame", change("a port makes a cause", "log.go",
		`|\d{4,}`+"`)", "`)")),
	inTest("TestCauseThatDiffersInAddressOrLongNumberIsTheSame", change("an address makes a cause", "log.go",
		`\d+\.\d+\.\d+\.\d+|`, "")),
	inTest("TestEachNewCauseIsToldAtOnce", change("new causes share a row", "log.go",
		"\t\tdelete(j.causes, oldest)\n", "\t\t_, key = oldest, \"\"\n")),
	inTest("TestHourOfCausesInAnyOrderIsAtMost100Lines", change("news are never short", "log.go",
		"\tif a.used == newsKept {\n", "\tif false {\n")),
	inTest("TestNameOfTheHostMakesNoCause", change("the name of a host makes a cause", "log.go",
		`key = strings.ReplaceAll(key, host, "")`, `_ = strings.ReplaceAll(key, host, "")`)),
	inTest("TestHoldOfAnUnreadableMessageIsItsOwn", change("what cannot be read is held like a failed message", "unreadable.go",
		"s.holds.add(d, min(jitter(unreadableHold), unreadableHold))", "s.holds.add(d, s.config.requeueLongest)")),
	inTest("TestSizeOfAnUnreadableMessageIsItsOwn", change("a size is that of the message before", "lane.go",
		"\t\tl.unfit.Size = l.size\n", "")),
	inTest("TestLongConsumerTimeoutIsNotTakenForTheDefault", change("a long consumer timeout is the default", "late.go",
		"ok && ms > 0 {", "ok && ms > 0 && ms <= maxDuration.Milliseconds() {")),
	inTest("TestQueueNamedLikeARefusalIsNotTakenAsItIs", change("the name of a queue decides", "topology.go",
		"!strings.HasPrefix(said.Reason, inequivalentLimit):", "!strings.Contains(said.Reason, inequivalentLimit):")),
	inTest("TestDeepHeadersAreShownDownToALevel", change("headers are shown as deep as they are", "show.go",
		"const shownDepth = 100", "const shownDepth = 1 << 30")),
	inTest("TestInvokeDecidesAsAConsumerDoes", change("Invoke lets a panic pass", "ack.go",
		"err = panicked(recover())",
		"err = panicked(nil)")),
}

// TestMutantsMatchTheSource keeps the table from rotting.
func TestMutantsMatchTheSource(t *testing.T) {
	for _, m := range mutants {
		for _, e := range m.edits {
			source, err := os.ReadFile(e.file)
			require.NoError(t, err)
			assert.Equal(t, 1, strings.Count(string(source), e.old),
				"planted bug %q: this text must be in %s exactly once, change the table:\n%s", m.name, e.file, e.old)
		}
	}
}

// TestMutants prints a table: which invariant caught which planted bug, and how
// many seeds that took.
func TestMutants(t *testing.T) {
	if !*mutantsRun {
		t.Skip("takes minutes; ask for it by -mutants")
	}
	caught, all := 0, 0
	for _, m := range mutants {
		if !strings.Contains(m.name, *mutantsOnly) {
			continue
		}
		all++
		r := m.try(t)
		if r.by != "" {
			caught++
		}
		fmt.Printf("| %-55s | %-28s | %5d | %4.0fs |\n", m.name, cmp.Or(r.by, "NOT CAUGHT"), r.seeds, r.took.Seconds())
	}
	fmt.Printf("%d of %d planted bugs caught within %d seeds\n", caught, all, *mutantsSeeds)
	assert.GreaterOrEqual(t, float64(caught), 0.95*float64(all))
}

type mutantResult struct {
	by    string // the invariant, empty if it was not caught
	seeds int
	took  time.Duration
}

// try plants the bug, builds the tests and lets the simulation run.
func (m *mutant) try(t *testing.T) mutantResult {
	start := time.Now()
	dir := t.TempDir()
	program := filepath.Join(dir, "mutant.test")
	build := exec.Command("go", "test", "-vet=off", "-overlay", m.overlay(t, dir), "-c", "-o", program, ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Errorf("planted bug %q does not compile, change the table: %v\n%s", m.name, err, out)
		return mutantResult{}
	}
	run := exec.Command(program, "-test.run", "TestSim$", "-test.timeout", "10m", "-seeds", strconv.Itoa(*mutantsSeeds),
		"-failures", "1", "-shrink=false", "-stuck", "20s", "-progress")
	if m.test != "" {
		run = exec.Command(program, "-test.run", "^"+m.test+"$", "-test.timeout", "2m", "-test.v")
	}
	var out bytes.Buffer
	run.Stdout, run.Stderr = &out, &out
	err := run.Run()
	r := mutantResult{seeds: strings.Count(out.String(), "sim: seed "), took: time.Since(start)}
	switch {
	case m.test != "" && !strings.Contains(out.String(), "=== RUN   "+m.test):
		t.Errorf("planted bug %q: there is no test %s", m.name, m.test)
	case err != nil && m.test != "":
		r.by = m.test
	case err != nil:
		r.by = invariantOf(out.String())
	}
	return r
}

// overlay writes the changed files and the list of them for the compiler.
func (m *mutant) overlay(t *testing.T, dir string) string {
	files := make(map[string]string)
	for _, e := range m.edits {
		if files[e.file] == "" {
			source, err := os.ReadFile(e.file)
			require.NoError(t, err)
			files[e.file] = string(source)
		}
		require.Equal(t, 1, strings.Count(files[e.file], e.old), "%s: %s", m.name, e.old)
		files[e.file] = strings.Replace(files[e.file], e.old, e.new, 1)
	}
	replace := make(map[string]string)
	for name, text := range files {
		original, err := filepath.Abs(name)
		require.NoError(t, err)
		replace[original] = filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(replace[original], []byte(text), 0o600))
	}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	require.NoError(t, err)
	path := filepath.Join(dir, "overlay.json")
	require.NoError(t, os.WriteFile(path, list, 0o600))
	return path
}

var invariantLine = regexp.MustCompile(`(?m)^\s*([A-Za-z0-9]+) at [0-9a-z.]+: `)

// invariantOf finds out what the simulation complained about.
func invariantOf(out string) string {
	if found := invariantLine.FindStringSubmatch(out); found != nil {
		return found[1]
	}
	switch {
	case strings.Contains(out, "time stands still"):
		return "I8 (time stands still)"
	case strings.Contains(out, "blocked goroutines remain"):
		return "I8 (goroutines left)"
	case strings.Contains(out, "panic: "):
		_, text, _ := strings.Cut(out, "panic: ")
		text, _, _ = strings.Cut(text, "\n")
		return "panic: " + text[:min(len(text), 20)]
	}
	return "failed"
}
