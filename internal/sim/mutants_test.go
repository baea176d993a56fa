package sim_test

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

// The planted bugs show that the simulation can fail. Each is a change of the library's source that
// exists in a temporary overlay only.
//
//	go test -run 'TestMutants$' -mutants -timeout 60m -v ./internal/sim
var (
	mutantsRun   = flag.Bool("mutants", false, "plant each bug and see whether the simulation catches it")
	mutantsSeeds = flag.Int("mutantseeds", 200, "how many seeds may be needed to catch a planted bug")
	mutantsJudge = flag.String("mutantjudge", "", "plant only the bugs that sim or a test has to catch")
	mutantsBuild = flag.Bool("mutantbuild", false, "only build each planted bug, to see that its text still compiles")
	mutantsOnly  = flag.String("mutant", "", "plant only the bugs whose name contains this")
)

// mutant is a planted bug: texts that stand in the source exactly once, and what stands there
// instead.
type mutant struct {
	name  string
	edits []edit
	// test names the quick test that has to fail, of a slip where the simulation never goes; ""
	// leaves it to the simulation.
	test string
}

// edit changes a file, whose name is relative to the root of the repository.
type edit struct{ file, old, new string }

// inRoot is the path of a file or folder whose name is relative to the root of the repository.
func inRoot(name string) string { return filepath.Join("..", "..", filepath.FromSlash(name)) }

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
	change("every ack is sent twice", "internal/wire/subscription.go",
		"{ return sub.settle(basicAck, tag, 0) }",
		"{\n\t_ = sub.settle(basicAck, tag, 0)\n\treturn sub.settle(basicAck, tag, 0)\n}"),
	change("acks are multiple", "internal/wire/subscription.go",
		"sub.settle(basicAck, tag, 0)", "sub.settle(basicAck, tag, 1)"),
	change("a delivery may be settled twice", "ack.go",
		"if !f.outcome.CompareAndSwap(uint32(Unsettled), uint32(o)) {",
		"if f.outcome.Store(uint32(o)); false {"),
	inTest("TestCopiesOfADeliverySettleOnce", change("a copy of a delivery settles by itself", "ack.go",
		"\treturn d.fence.settle(d.fence.settler, o)\n",
		"\tcopied := &fence{origin: *d, tag: d.fence.tag, settler: d.fence.settler}\n\treturn copied.settle(copied.settler, o)\n")),
	{name: "late acks go to the newest session", edits: []edit{
		{
			"session.go", "func (s *session) settle(d *Delivery, o Outcome) error {",
			"var newest sync.Map\n\nfunc (s *session) settle(d *Delivery, o Outcome) error {\n\tif n, ok := newest.Load(s.config); ok && s.closed.Load() {\n\t\treturn n.(*session).send(d, o)\n\t}",
		},
		{"session.go", "\ts.since = time.Now()\n", "\ts.since = time.Now()\n\tnewest.Store(s.config, s)\n"},
	}},
	{name: "late acks are sent", edits: []edit{
		{"session.go", "\tif s.closed.Load() {\n\t\ts.stats.stale.Add(1)\n\t\treturn ErrStale", "\tif false {\n\t\treturn ErrStale"},
		{"internal/wire/outbound.go", "if sub.closed || o.closed", "if o.closed"},
	}},
	change("settlements go to channel 1", "internal/wire/subscription.go",
		"binary.BigEndian.PutUint16(frame[1:], sub.channel)", "binary.BigEndian.PutUint16(frame[1:], 1)"),
	change("acks before the handler has returned", "worker.go",
		"\terr = p.invoke(s, d, &err)", "\t_ = d.Ack()\n\terr = p.invoke(s, d, &err)"),
	change("a failed message is acked", "transfer.go",
		"\tcase asked == nil:\n\t\treturn verdict{outcome: Requeued, delay: holdFor(d.Attempt(), s.config)}", "\tcase asked == nil:\n\t\treturn verdict{outcome: Acked}"),
	change("a failed message goes back at once", "transfer.go",
		"\tcase asked == nil:\n\t\treturn verdict{outcome: Requeued, delay: holdFor(d.Attempt(), s.config)}", "\tcase asked == nil:\n\t\treturn verdict{outcome: Requeued}"),
	change("discard requeues", "ack.go",
		"func Discard(err error) error { return &outcomeError{outcome: Discarded,", "func Discard(err error) error { return &outcomeError{outcome: Requeued,"),
	change("forgets to settle after a panic", "worker.go",
		"\t\tbecame = s.conclude(d, err)\n", "\t\tif !errors.As(err, new(*PanicError)) {\n\t\t\tbecame = s.conclude(d, err)\n\t\t}\n"),
	{name: "handlers start for sessions that are over", edits: []edit{
		{"worker.go", "p.ctx.Err() != nil || !s.gate.enter() {", "s.gate.count.Add(2) < 0 {"},
	}},

	// Workers and contexts.
	change("a worker is lost after Goexit", "worker.go",
		"\t\t\tgo p.work()\n\t\t\treturn\n", "\t\t\treturn\n"),
	change("one worker too many", "worker.go", "p.alive.Load() >= int64(p.config.concurrency) }", "p.alive.Load() > int64(p.config.concurrency) }"),
	inTest("TestWorkerStartsForADeliveryThatNoneWaitsFor", change("the second delivery gets no worker", "worker.go",
		"\tif !p.full() && !p.stopped {\n", "\tif p.alive.Load() == 0 && !p.stopped {\n")),
	inTest("TestWorkerStartsForADeliveryThatNoneWaitsFor", change("every delivery gets a worker though one waits for it", "inbox.go",
		"!i.staffed.Load() && len(i.last.waiting) > 0", "!i.staffed.Load()")),
	inTest("TestStopBeforeAnyDeliveryIsPrompt", change("a stop waits for workers that have never started", "worker.go",
		"\tif p.alive.Load() == 0 {\n", "\tif false {\n")),
	change("handlers never learn of a lost session", "session.go",
		"\ts.takeNoMore()\n\ts.cancel(cause)\n", "\ts.takeNoMore()\n"),
	change("a stop cancels running handlers", "consumer.go",
		"handlers:  context.WithoutCancel(ctx)", "handlers:  ctx"),
	change("no handler timeout", "worker.go",
		"if p.config.handlerTimeout > 0 {", "if p.config.handlerTimeout < 0 {"),

	// Sessions.
	change("ignores basic.cancel", "session.go",
		"\t\tif cancelled {\n\t\t\treturn signCancelled\n\t\t}\n\tcase <-s.conn.end.Done():\n",
		"\t\tif cancelled {\n\t\t\tselect {\n\t\t\tcase said := <-s.channelEnd.closes:\n\t\t\t\ts.channelEnd.record(said)\n\t\t\tcase <-s.conn.end.Done():\n\t\t\tcase <-from.stop:\n\t\t\t\treturn signStop\n\t\t\t}\n\t\t}\n\tcase <-s.conn.end.Done():\n"),
	change("ignores the end of its channel", "session.go",
		"\tcase said := <-s.channelEnd.closes:\n\t\ts.channelEnd.record(said)\n\tcase _, cancelled := <-s.cancels:\n\t\tif cancelled {\n\t\t\treturn signCancelled\n\t\t}\n\tcase <-s.conn.end.Done():\n\tcase <-s.stall",
		"\tcase <-s.conn.end.Done():\n\tcase <-s.stall"),
	inTest("TestChangesOfStateAreToldInTheirOrderWithAllThatTheyHold", change("what the broker says of a channel is forgotten", "session.go",
		"\tcase c.cause != nil: // the first one stays\n", "\tcase false:\n")),
	change("a cancelled session gives its handlers no time", "session.go",
		"\t\ts.stream.doubt()\n\t\ts.retire(cause)\n", "\t\ts.stream.doubt()\n\t\ts.lose(cause)\n"),
	change("no prefetch", "session.go", "s.channel.Qos(s.config.prefetch, 0, false)", "s.channel.Qos(0, 0, false)"),
	change("the consumer tag is used again", "consumer.go",
		`tag := fmt.Sprintf("%s.%d-%d", s.tag, try, number)`, `tag := fmt.Sprint(s.tag, "-1")`),

	// Reconnecting.
	change("no setup limit", "consumer.go",
		"context.WithTimeoutCause(s.ctx, s.config.setupTimeout, s.config.setupPassed())", "context.WithCancel(s.ctx)"),
	change("the setup limit does not close the socket", "session.go",
		"unguard := context.AfterFunc(ctx, func() { lease.giveUp(causeOf(ctx)) })", "unguard := context.AfterFunc(ctx, func() {})"),
	change("gives up on a refusal after the first session", "reconnect.go",
		"if r.hadSession {", "if r.hadSession && false {"),
	inTest("TestBrokerAndQueueAbsentAtStartAreWaitedFor", change("gives up on 404", "reconnect.go",
		"return refused || permanent(err)", "return refused || permanent(err) || classify(err) == classAbsent")),
	change("retries in a hot loop", "reconnect.go",
		"\tr.failures++\n", "\tif r.failures++; r.failures > 0 {\n\t\treturn time.Millisecond\n\t}\n"),
	change("the backoff has no cap", "reconnect.go",
		"return p.floor + rand.N(top-p.floor+1)", "return p.floor + p.initial<<min(p.failures, 12)"),
	change("no cap while dials are refused", "reconnect.go",
		"r.pace(0, c.retryInitial, time.Second)", "r.pace(0, c.retryInitial, c.retryCap)"),
	inTest("TestMissingQueueIsConsumedWithin5500msOfItsReturn", change("a missing queue is asked for as seldom as an operator mends", "reconnect.go",
		"time.Second, absentCap)", "time.Second, operatorCap)")),
	inTest("TestNoWaitExceedsAGivenLimit", change("the limit of WithBackoff binds one class only", "reconnect.go",
		"limit = min(limit, r.limit)", "limit = min(limit, max(r.limit, time.Second))")),
	inTest("TestRefusedDialsDoNotQuickenThePaceOfWhatAnOperatorMends", change("a refused dial resets the pace of the operator's", "reconnect.go",
		"\trule.failures++\n", "\tif rule.failures++; kind == classRefused {\n\t\tr.rules[classOperator].failures, r.deferred = 0, nil\n\t}\n")),
	inTest("TestLockIsNoYoungerForWhatFailsMeanwhile", change("what fails beside a lock makes it young again", "reconnect.go",
		"\trule := r.rule(kind)\n", "\tif rule := classify(err); rule != classLocked {\n\t\tr.lockSeen = time.Time{}\n\t}\n\trule := r.rule(kind)\n")),
	inTest("TestNamesDecideNoClass", change("a word that a name may hold decides the class", "errors.go",
		"strings.HasPrefix(text, p.start) && (cut || strings.HasSuffix(text, p.end))", "(cut || strings.Contains(text, p.start) && strings.Contains(text, p.end))")),
	inTest("TestNamesDecideNoClass", change("a phrase is not held to its end", "errors.go",
		"(cut || strings.HasSuffix(text, p.end))", "(cut || strings.Contains(text, p.end))")),
	inTest("TestTextThatWasCutOffIsTakenForWhatPasses", change("a text that was cut off is none of the phrases", "errors.go",
		"(cut || strings.HasSuffix(text, p.end))", "(cut && false || strings.HasSuffix(text, p.end))")),
	inTest("TestStreamStartsOverOnlyIfItIsGoneItself", change("a stream starts over because of another queue", "errors.go",
		`want := "no queue '" + name + "' in vhost '"`, `want := "no queue '"`)),
	inTest("TestQuietStreamSkipsNothingThatIsPublishedWhileAway", change("no place in a stream is known before its first delivery", "session.go",
		`unclear && s.declaration.queue == ""`, `unclear && s.declaration.queue == "none"`)),
	inTest("TestQuietStreamSkipsNothingThatIsPublishedWhileAway", change("an interval is asked for anew", "stream.go",
		`return at != "first"`, `return at == "next" || at == "last"`)),
	inTest("TestQuietStreamSkipsNothingThatIsPublishedWhileAway", change("a time to come is asked for anew", "stream.go",
		"return at.After(now.Add(-clockMargin))", "return false")),
	inTest("TestEmptyStreamSkipsNothingThatIsPublishedWhileAway", change("an empty stream has no place", "stream.go",
		"\tp.from = since\n", "\tp.from = nil\n")),
	inTest("TestPlaceByTheClockAllowsForClocksThatDiffer", change("the clock of a broker is that of its client", "stream.go",
		"\tsince = since.Add(-clockMargin)\n", "")),
	inTest("TestPlaceThatIsCutOffAgainAndAgainIsTakenFromTheClock", change("a place is looked up until it is found", "stream.go",
		" && p.lookups < maxLookups", "")),
	inTest("TestStreamSetUpMayBeCutAnywhere", change("a place that was cut off is forgotten", "stream.go",
		"if errors.As(err, &brokerErr) && brokerErr.Server {\n\t\t\tp.mu", "if errors.As(err, &brokerErr) {\n\t\t\tp.mu")),
	inTest("TestLastMessageOfAStreamIsGivenAlsoIfTheSetUpWasCut", change("the last message is skipped where the look for it was cut off", "stream.go",
		`given == "last" && !p.known && !p.begun && p.lookups < maxLookups`, "false")),
	inTest("TestEmptyStreamMayCancelTheConsumerThatLooksForItsEnd", change("a consumer cancelled while its place is looked for has asked", "topology.go",
		"\t\ts.streamPosition().doubt()\n\t\treturn nil, errCancelled\n", "\t\treturn nil, nil\n")),
	inTest("TestStreamSetUpMayBeCutAnywhere", change("an interval by the clock is as short as can be", "topology.go",
		"since.Add(-interval(offset))", "since")),
	inTest("TestStreamSkipsNothingOnceTheBrokerShowsItsConsumer", change("what comes while the place is looked for is skipped", "topology.go",
		"if next, ok := <-behind; ok {", "if next, ok := <-behind; ok && next < 0 {")),
	inTest("TestNextIsThatOfTheFirstSubscriptionTheBrokerTook", change("a refused subscription has a place", "topology.go",
		"if answered(err) != nil {", "if _ = answered; err != nil {")),
	inTest("TestIntervalWithoutMessagesBeginsWithTheNext", change("the first session begins by the clock", "stream.go",
		"if !p.known && (asked || p.from == nil) {", "if !p.known && p.from == nil {")),
	inTest("TestQuietStreamThatIsMadeAnewIsReadFromItsBeginning", change("a quiet stream that is made anew keeps its place", "stream.go",
		"\tp.known, p.next = true, 0\n", "")),
	inTest("TestStreamMadeAnewIsReadFromItsBeginningAlsoByWhoWaitsForAMessageOfTheFuture", change("a number outlives its stream", "stream.go",
		"\tp.known, p.next = true, 0\n", "\tp.next = 0\n")),
	inTest("TestStreamHealsWithOneChannelPerConnection", change("the look for the stream takes a second channel", "topology.go",
		"_, err := s.channel.QueueDeclarePassive(queue, true, false, false, false, amqp.Table{})",
		"other, err := s.conn.amqp.Channel()\n\t\tif err == nil {\n\t\t\t_, err = other.QueueDeclarePassive(queue, true, false, false, false, amqp.Table{})\n\t\t\tdefer other.Close()\n\t\t}")),
	inTest("TestStreamConsumerAtAMessageOfTheFutureIsNoStall", change("a consumer at a message of the future is stalled", "probe.go",
		"return !p.session.stream.ahead(length)", "return true")),
	inTest("TestTryThatWasLeftBehindDoesNotTouchTheStreamsPlace", mutant{name: "a try that was left behind takes the place", edits: []edit{
		{"session.go", "if s.tries.Load() != s.try {", "if false {"},
		{"loan.go", "\tchannel.GiveUp(amqp.InternalError, \"given up: a call was not answered in time\")\n", ""}, // which ends it sooner
	}}),
	inTest("TestStreamGoesOnThoughAHandlerReplacesTheHeaders", change("a handler decides where a message stands", "stream.go",
		"if !kept.hasOffset || session != p.session {", "if _, ok := headerInt(d.Headers[offsetKey]); !ok || session != p.session {")),
	inTest("TestTryInPlaceGetsTheMessageAsItCame", change("a try in place gets what the last one made of it", "delivery.go",
		"next.Delivery = kept.original", "next.Delivery = d.Delivery")),
	inTest("TestAnotherStreamOfTheTopologyHasAPlaceOfItsOwn", change("another stream keeps the place of the first", "stream.go",
		"p.queue, p.from, p.known, p.begun, p.lookups = queue, nil, false, false, 0", "p.queue = queue")),
	inTest("TestAnotherStreamOfTheTopologyHasAPlaceOfItsOwn", change("the topology is declared twice where a place is looked for", "topology.go",
		"\tif s.declaration.queue != \"\" {\n\t\treturn s.declaration.queue, nil\n\t}\n", "")),
	inTest("TestHostThatSaidItClosesRefusedOrFellSilentGoesLastForAMinute", change("a host that fell silent is as good as any", "reconnect.go",
		"\treturn fellSilent(err)\n}", "\treturn false\n}")),
	inTest("TestLastGoodHostIsTriedAgainBeforeOneThatFellSilent", change("a host that fell silent is tried before the last good one", "reconnect.go",
		"return round + 1, until", "return round, until")),
	inTest("TestHostThatFellSilentBetweenSessionsGoesLast", change("a connection that dies in backoff leaves its host good", "consumer.go",
		"\t\ts.borrower.blame(s.conn.host, s.conn.end.Cause(), time.Now())\n", "")),
	inTest("TestEveryHostHasItsTurnHoweverTheOthersFail", change("a host that goes last has no turn", "reconnect.go",
		"return round + 1, until", "return round + 1000, until")),
	inTest("TestLimitsOfOneClassStandWithoutWithBackoff", change("a queue that its host cannot reach is asked for ever more slowly", "reconnect.go",
		"min(c.retryCap, absentCap)", "c.retryCap")),
	inTest("TestMissingQueueIsAskedForOnOneConnection", change("a missing queue replaces its connection", "consumer.go",
		"(kind == classAbsent || kind == classUnreachable) && !elsewhere", "kind == classUnreachable && !elsewhere")),
	inTest("TestCredentialsAreRefreshedOverTheWholeRangeOfTheirExpiry", change("the life of credentials overflows", "connection.go",
		"time.Until(expires) / 10 * 7", "time.Until(expires) * 7 / 10")),
	inTest("TestCredentialsAreRefreshedOverTheWholeRangeOfTheirExpiry", change("expired credentials are refreshed every second", "connection.go",
		"time.Until(expires) > minRefresh", "true")),
	inTest("TestIssuerThatFailsIsAskedEverMoreSlowly", change("a failing issuer is asked every second", "connection.go",
		"\t\tagain.failures++\n", "\t\tagain.failures = 1\n")),
	inTest("TestStopAfterHoursOfHealthTellsNoFailures", change("a stop tells of failures long past", "consumer.go",
		"\t\tcase signStop:\n\t\t\ts.recordHealth(s.session)\n", "\t\tcase signStop:\n")),
	inTest("TestChangesCutOffByTheEndAreCounted", change("changes cut off by the end are not counted", "notify.go",
		"\t\tr.dropped.Add(uint64(len(r.events)))\n", "")),
	inTest("TestTimesThatAMQPCannotCarryAreRefused", change("times before 1970 become those of the far future", "internal/table/table.go",
		"if v.Unix() < 0 {", "if false {")),
	change("consume-ok resets the backoff", "reconnect.go",
		"\tr.hadSession = true\n", "\tr.hadSession, r.failures = true, 0\n"),
	change("consume-ok makes all hosts untried", "reconnect.go",
		"\tdelete(h.avoid, address)\n}", "\tdelete(h.avoid, address)\n\tclear(h.tries)\n}"),
	change("hosts are not rotated", "reconnect.go",
		"order := slices.Clone(h.endpoints)", "order := h.endpoints[:1]"),

	// Sockets and connections.
	change("no inbound watchdog", "connection.go", "IdleTimeout:  2 * interval,", "IdleTimeout:  0,"),
	change("the driver does not hear of deliveries", "internal/wire/inbound.go", "in.deliveredSince && in.passThrough == 0 &&", "false && in.passThrough == 0 &&"),
	change("a channel closed by the broker still delivers", "internal/wire/subscription.go", "\tif sub.closedByBroker {\n\t\treturn\n\t}\n", ""),
	change("the old connection is not closed", "connection.go", "\t\tc.stop <- d\n", ""),
	change("the password is in an error", "connection.go",
		"return nil, &SessionError{Host: e.address, Op: op, Err: err}", `return nil, &SessionError{Op: op, Err: fmt.Errorf("%s: %w", e.uri, err)}`),

	// URLs, and what a newcomer is told.
	inTest("TestURLThatIsWrongIsToldWhatIsWrongWithIt", change("an @ after the host is believed", "internal/amqpurl/amqpurl.go",
		"case all > inside && inside == 0:", "case false:")),
	inTest("FuzzURL", change("a password with @ and / is dialled as a host", "internal/amqpurl/amqpurl.go",
		"\tinside, all := strings.Count(authority, \"@\"), strings.Count(rest, \"@\")", "\tinside, all := strings.Count(authority, \"@\"), strings.Count(authority, \"@\")")),
	inTest("FuzzURL", change("the parser's error is shown", "internal/amqpurl/amqpurl.go",
		"\t\treturn URL{}, reason\n", "\t\t_, err := url.Parse(text)\n\t\treturn URL{}, fmt.Sprint(reason, err)\n")),
	inTest("TestURLThatIsGoodIsDialledAtItsHost", change("a : in a password is refused", "internal/amqpurl/amqpurl.go",
		`"-._~!$&'()*+,;=:%"`, `"-._~!$&'()*+,;=%"`)),
	inTest("TestURLThatIsWrongIsToldWhatIsWrongWithIt", change("unknown parameters are ignored", "internal/amqpurl/parameters.go",
		"\t\treturn unknownParameter(name)\n", "\t\treturn \"\"\n")),
	inTest("TestURLThatIsWrongIsToldWhatIsWrongWithIt", change("TLS parameters are ignored without TLS", "internal/amqpurl/parameters.go",
		`case scheme == "amqp" && slices.Contains(`, `case scheme == "" && slices.Contains(`)),
	inTest("TestURLThatIsWrongIsToldWhatIsWrongWithIt", change("a certificate without its key is ignored", "internal/amqpurl/parameters.go",
		`if given.Has("certfile") != given.Has("keyfile") {`, "if false {")),
	inTest("TestURLsMechanismsCountInAnyCase", change("a mechanism in capitals becomes PLAIN", "internal/amqpurl/amqpurl.go",
		"\tu.AuthMechanism = mechanisms\n", "\t_ = mechanisms\n")),
	inTest("TestEachURLHasItsOwnHeartbeatAndDialTimeout", change("the heartbeat of a URL is ignored", "config.go",
		`if e.heartbeat != 0 && !c.set.heartbeat {`, "if false {")),
	inTest("TestConnectionTimeoutOfTheURLBoundsTheDial", change("connection_timeout is ignored", "config.go",
		`if e.dialTimeout != 0 && !c.set.dialTimeout {`, "if false {")),
	inTest("TestConnectionTimeoutOfTheURLBoundsTheDial", change("connection_timeout beats WithDialTimeout", "config.go",
		`if e.dialTimeout != 0 && !c.set.dialTimeout {`, "if e.dialTimeout != 0 {")),
	inTest("TestHeartbeatOfTheFuncsURLCounts", change("the driver is not told the heartbeat of the URL", "connection.go",
		"Heartbeat:  c.heartbeatOf(e),", "Heartbeat:  c.heartbeat,")),
	inTest("TestURLFuncMayNotSwitchTLSOff", change("a URL function may switch TLS off", "connections.go",
		"cs.config.endpointOf(text)", "parseEndpoint(text)")),
	inTest("TestURLOfTheFuncThatNewWouldRefuseIsNotDialled", change("a wrong URL is asked for at the pace of dials", "reconnect.go",
		", errors.As(err, new(*urlError)):", ":")),
	inTest("TestTryThatDialledNothingNamesNoHost", change("a try without a URL names the last host", "consumer.go",
		"offer.own, offer.own.address // \"\" until", "offer.own, cmp.Or(offer.own.address, s.host) // \"\" until")),
	inTest("TestTryThatDialledNothingNamesNoHost", change("a host that refused is not named", "consumer.go",
		"\t\t\ts.host = cmp.Or(s.host, at.Host)\n", "")),
	inTest("TestCACertFileOfTheURLIsTrustedAndNoOther", change("server_name_indication is ignored", "endpoint.go",
		"ServerName: e.uri.ServerName, ", "")),
	inTest("TestClientCertificateOfTheURLIsShown", change("certfile is ignored", "endpoint.go",
		"c.Certificates = []tls.Certificate{pair}", "_ = pair")),
	inTest("TestURLAndOptionsThatContradictAreRefused", change("parameters for TLS beside WithTLSConfig are ignored", "config.go",
		"if c.tls != nil && (u.CACertFile", "if false && (u.CACertFile")),
	inTest("TestNewcomersMistakesThatRunTells", change("a refusal comes without advice", "errors.go",
		"step, e.reason(), advice(e.Op, e.Err))", `step, e.Err, "")`)),
	inTest("TestLockIsWaitedForAsLongAsTheURLsHeartbeatSays", change("the heartbeat of a connection is forgotten", "consumer.go",
		"\t\ts.retry.heartbeat = max(s.retry.heartbeat, a.conn.heartbeat)\n", "")),
	inTest("TestALockIsWaitedForAsLongAsItsConnectionsHeartbeatsTake", change("a lock is waited for as long as the default heartbeat takes", "reconnect.go",
		"3*cmp.Or(r.heartbeat, r.config.heartbeat) + lockedExtra", "3*cmp.Or(r.config.heartbeat, r.heartbeat) + lockedExtra")),

	// Queues that live as long as their connection.
	inTest("TestServerNamedQueueIsConsumedAgainOnItsConnection", change("every session declares a queue for the broker to name", "loan.go",
		"\treturn l.ofSessions()\n", "\treturn \"\"\n")),
	inTest("TestServerNamedQueueIsConsumedAgainOnItsConnection", change("a queue that the broker has named is declared by its name", "topology.go",
		"\t\t_, err := s.channel.QueueDeclarePassive(s.declaration.owned, false, false, false,", "\t\t_, err := s.channel.QueueDeclare(s.declaration.owned, false, false, true,")),
	inTest("TestServerNamedQueueThatIsDeletedIsDeclaredAnewAtOnce", change("a queue of the broker's naming that is gone is asked for as an absent one", "topology.go",
		"return s.declaration.owned, gone(err, s.declaration.owned)", "return s.declaration.owned, err")),
	inTest("TestQueueThatGoesJustBeforeTheConsumeIsDeclaredAnewAtOnce", change("a queue that goes just before the consume is asked for as an absent one", "session.go",
		"\t\terr = gone(err, s.queue)\n", "")),
	change("every 404 makes a queue of the broker's naming anew", "topology.go",
		"if !noQueue(err, queue) {", "if err == nil {"),
	inTest("TestMissingExchangeLeavesOneQueue", change("a missing exchange makes the queue anew", "topology.go",
		"return \"\", fmt.Errorf(\"binding to exchange %q: %w\", b.Exchange, err)", "return \"\", &goneError{err}")),
	inTest("TestQueueThatCannotBeBoundYetIsDeclaredOnce", change("a queue is kept without its bindings", "topology.go",
		"\tfor _, b := range q.Bindings {\n", "\tfor _, b := range q.Bindings {\n\t\tif s.declaration.owned != \"\" {\n\t\t\tbreak\n\t\t}\n")),
	inTest("TestFailuresDoNotReplaceAConnectionThatOwnsItsQueue", change("failures take an exclusive queue away", "consumer.go",
		"s.owns() || s.blameless(classify(err)) ||", "s.blameless(classify(err)) ||")),
	inTest("TestQueuesThatCannotBeReachedKeepNoConsumerApart", change("a queue that cannot be reached keeps its consumer apart", "consumer.go",
		"(kind == classAbsent || kind == classUnreachable) && !elsewhere", "kind == classAbsent && !elsewhere")),
	inTest("TestFailuresReplaceAConnectionThatOwnsNothing", change("failures never replace a connection", "consumer.go",
		"(s.config.declaresOwned() ||", "(s.config.declare != nil ||")),
	inTest("TestTopologyThatNamesAnotherQueueGetsAnotherConnection", change("a topology's queue of before is left behind", "loan.go",
		"\tleft := was != queue\n", "\tleft := was != queue && false\n")),
	inTest("TestTopologyThatNamesAnotherQueueGetsAnotherConnection", change("another name of a topology is a failure", "consumer.go",
		"\tif s.replacedForOrphan(a.err) {\n\t\treturn s.connecting\n\t}\n", "\ts.replacedForOrphan(a.err)\n")),
	inTest("TestTopologyThatNamesAnotherQueueGetsAnotherConnection", change("another connection for the same try is told as a change", "consumer.go",
		"if s.consumer.State() != Connecting {", "if true {")),
	inTest("TestTopologyThatNamesAnotherQueueLeavesHandlersOfACancelledSessionAlone", change("another name of a topology cuts handlers off", "consumer.go",
		"\ts.dropConnection()\n\treturn true\n", "\ts.closeConnection(closeRequest{limit: s.config.closeTimeout})\n\treturn true\n")),
	inTest("TestTopologyThatNamesTheSameQueueStaysOnItsConnection", change("a topology that names none has named another", "topology.go",
		"s.conn.sameQueue(cmp.Or(queue, s.config.queue))", "s.conn.sameQueue(cmp.Or(queue, queue))")),
	inTest("TestTopologyThatFailsLeavesFewQueuesBehind", change("what failed topologies leave behind piles up", "loan.go",
		"return l.topologyFailures.Load() >= escalateAfter", "return false")),
	inTest("TestTopologyThatFailedFirstLeavesNoQueueBehind", change("what a failed topology has left behind stays", "loan.go",
		"left = l.topologyFailures.Load() > 0 &&", "left = false &&")),
	// Logging in.
	inTest("TestSocketThatHasEndedIsNotWatched", change("the watchdog outlives its socket", "internal/wire/socket.go",
		"\t\treturn\n\t}\n\ts.dogTimer.Stop()\n", "\t\treturn\n\t}\n")),
	inTest("TestSocketThatHasEndedIsNotWatched", change("the watchdog is let loose on a socket that has ended", "internal/wire/silence.go",
		"\tif s.end.closed.Load() {\n", "\tif false {\n")),
	change("the watchdog is never let loose", "connection.go", "\tsocket.WatchPeer()\n", ""),
	inTest("TestSilentRefusalIsRecognisedHoweverTheSocketEnds", change("the watchdog watches the handshake", "internal/wire/socket.go",
		"\ts.running.Go(s.out.writeLoop)\n", "\ts.running.Go(s.out.writeLoop)\n\ts.WatchPeer()\n")),
	inTest("TestSilentRefusalIsRecognisedHoweverTheSocketEnds", change("a silent refusal that ends by RST is a lost path", "dial.go",
		" || errors.Is(lost, wire.ErrPeerReset)\n", "\n")),
	inTest("TestSlowGreetingDoesNotMakeALostLoginARefusal", change("a slow greeting counts as silence after the login", "dial.go",
		"\tl.answered = time.Now()\n", "")),
	inTest("TestRefusedLoginIsToldAtOnce", change("does not ask to be told of a refused login", "dial.go",
		"capabilities[authFailureClose] = true", "capabilities[authFailureClose] = false")),
	inTest("TestRefusedLoginIsToldAtOnce", change("a refused login is not told from other refusals", "dial.go",
		"if brokerErr.Code != amqp.AccessRefused {", "if true {")),
	inTest("TestMechanismTheBrokerDoesNotOfferIsARefusedLogin", change("a mechanism that is not offered is retried", "reconnect.go",
		"return refused || permanent(err)", "return permanent(err)")),
	inTest("TestRefusedLoginIsToldAtOnce", change("credentials of a function get one try", "reconnect.go",
		" || r.config.asksForLogin()) {", ") {")),
	inTest("TestMechanismTheBrokerDoesNotOfferIsARefusedLogin", change("the broker's offer is not read", "internal/wire/inbound.go",
		"offer = mechanismsOf(b[:whole-1])", "")),
	inTest("TestRefusedGuestIsToldOfLoopback", change("guest is not told of loopback", "dial.go",
		`if l.user != "guest" {`, "if true {")),
	inTest("TestLoginMechanismOfAUserThatFails", change("a function of the user that panics ends the process", "guard.go",
		"if !returned { // after a runtime.Goexit", "if !returned && false { // after a runtime.Goexit")),
	inTest("TestLoginMechanismOfAUserThatFails", change("logs in with nothing where a mechanism failed", "dial.go",
		"\t\tl.abort(l.failed) // the driver has no other way to send nothing\n", "\t\tl.failed = nil\n")),
	inTest("TestPortThatIsNotForAMQPIsNamed", change("a wrong port that resets is not named", "endpoint.go",
		"wire.ErrPeerReset, syscall.ECONNRESET, ", "syscall.EPIPE, ")),
	inTest("TestPortThatIsNotForAMQPIsNamed", change("a wrong port that is silent is not named", "endpoint.go",
		", errSetupTimeout} {", "} {")),
	inTest("TestPortThatIsNotForAMQPIsNamed", change("a wrong port is asked quickly", "reconnect.go",
		"errors.As(err, &protocol) ||\n\t\terrors.As(err, &port)", "errors.As(err, &protocol) && errors.As(err, &port)")),
	inTest("TestBrokerOnAPortOfAnotherProtocolIsNotCalledWrong", change("a login that is lost is the port's fault", "connection.go",
		`fmt.Errorf("lost while logging in: %w", lost)`, `fmt.Errorf("lost while logging in: %w", namePort(e, lost))`)),

	// Stopping.
	change("a stop drops the session instead of draining it", "session.go",
		"\t\ts.drain()\n", "\t\ts.lose(errStopped)\n"),
	change("the drain does not wait for handlers", "session.go",
		"\tif s.drainErr == nil {\n\t\ts.drainErr = s.awaitHandlers(limit.C)\n\t}\n", ""),
	change("no drain limit", "session.go",
		"func (s *session) drain() {\n\tlimit := time.NewTimer(s.config.drainTimeout)", "func (s *session) drain() {\n\tlimit := time.NewTimer(24 * time.Hour)"),
	change("held messages are not released by the drain", "session.go",
		"\ts.releaseHeld() // after basic.cancel, or the broker would deliver them here again\n", ""),
	inTest("TestHeldMessageComesBackOnceWhenTheConsumerStops", change("held messages go back before the basic.cancel", "session.go",
		"\ts.end.notify(errStopped)\n\ts.drainErr = ", "\ts.end.notify(errStopped)\n\ts.releaseHeld()\n\ts.drainErr = ")),
	inTest("TestStopKeepsItsLimitsThoughACloseOfTheUsersConnectionHangs", change("a session waits for the close of a user's connection", "loan.go",
		"go l.conn.socket.Kill(cause)", "l.conn.socket.Kill(cause)")),
	inTest("TestStreamGoesOnThoughAHandlerTakesTheOffsetOutOfTheHeaders", change("a try in place reads its place anew", "stream.go",
		"if d.fence.tries == 0 {", "if true {")),
	inTest("TestPlaceIsThatOfTheFirstMessageThoughAFilterLeavesGaps", change("a gap of a filter moves the place", "stream.go",
		"if !p.known || p.guessed && at < p.next {", "if !p.known {")),
	inTest("TestPositionOfAnotherStreamIsComparedWithNothing", change("another stream is compared with the one before", "stream.go",
		"\t\tp.silent, p.comparing = 0, 0 // of the stream before\n", "")),
	inTest("TestStreamThatGrewForAMomentIsNotReadAnewAfterALaterStall", change("a stream that grew for a moment is read anew after a later stall", "probe.go",
		"\t\tp.grown = 0\n", "")),
	inTest("TestEndOfAStreamIsBehindTheWholeLastChunk", change("the end of a stream is within its last chunk", "topology.go",
		"end = max(end, offsetOf(d))", "end = min(end, offsetOf(d))")),
	inTest("TestStreamMadeAnewWhileTheConsumerWasAwayIsReadFromItsBeginningOnceItStalls", change("a stalled stream keeps a place past its end", "stream.go",
		"case offset == 0 && int64(p.comparing) < p.next:", "case offset < 0:")),
	inTest("TestPositionStartsOverOnlyInAStreamThatIsAnotherOne", change("a stream that has dropped messages is taken for another one", "stream.go",
		"case offset == 0 && int64(p.comparing) < p.next:", "case int64(p.comparing) < p.next:")),
	inTest("TestLateRefusalOfALookLeavesThePlaceOfALaterSession", change("a late refusal takes the place away", "stream.go",
		"if !p.begun && p.lookups == mine {", "if !p.begun || p.lookups == mine {")),
	change("messages that were not started are not handed back", "session.go",
		"\tcase err == nil:\n\t\ts.handBackRest()\n", "\tcase err == nil:\n"),
	{name: "close-ok is not awaited", edits: []edit{
		{"session.go", "\t\terr = s.call(over.C, s.channel.Close)\n", "\t\terr = nil\n\t\ts.givenUp = true\n"},
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
		"\t\ts.tryAgain(d)\n", "\t\tgo s.channel.Close()\n")),
	inTest("TestStreamMessageIsTriedAgainInPlaceAfterTheSameHolds", change("a failed message of a stream is skipped", "session.go",
		"\t\ts.tryAgain(d)\n\t\treturn nil\n", "")),
	inTest("TestStreamMessageIsTriedAgainInPlaceAfterTheSameHolds", change("tries in place are not counted", "delivery.go",
		"next.fence.tries = d.fence.tries + 1", "next.fence.tries = d.fence.tries")),
	inTest("TestHandlerOfAStreamSaysWhenItIsTriedAgain", change("a try in place spins", "session.go",
		"time.AfterFunc(againAfter, ", "time.AfterFunc(0, ")),
	inTest("TestErrorOfAHandlerThatWasCutOffIsNoFailure", change("a lost session is a failure of the handler", "worker.go",
		"failed = err != nil && !s.cutOff(err)", "failed = err != nil")),
	inTest("TestPanicOfAHandlerThatWasCutOffIsTold", change("a panic after the end of the session is not told", "session.go",
		" && !errors.As(err, new(*PanicError))", "")),
	inTest("TestHandlerThatStopsItsConsumerIsTheLast", change("handlers start after Run's context has ended", "worker.go",
		"p.ctx.Err() != nil || ", "")),
	inTest("TestStopCostsWhatWasNotStartedOneDelivery", change("a worker hands back before the basic.cancel", "session.go",
		"if !s.inbox.takeBack(d) {", "if true {")),
	inTest("TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn", change("held messages are not counted", "hold.go",
		"\th.session.stats.held.Add(1)\n", "")),
	inTest("TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn", change("released messages are held for ever", "hold.go",
		"\th.session.stats.held.Add(-int64(len(held)))\n", "")),
	inTest("TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn", change("held messages are not told", "hold.go",
		"case crowd && (", "case false && (")),
	inTest("TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn", change("held messages are told every two minutes", "hold.go",
		"max(lasts, warnAgainAfter)", "warnAgainAfter")),
	inTest("TestHeldMessagesAreCountedAndToldFromHalfOfThePrefetchOn", change("one held message of a stream is not told", "hold.go",
		"if taken > 0 && h.session.stream != nil {", "if false {")),
	inTest("TestHeldMessagesOfManySessionsAreToldOnceAMinute", change("each session tells of held messages", "hold.go",
		"s.notices.held.allow(time.Minute); !ok {", "s.notices.held.allow(time.Minute); !ok && false {")),
	inTest("TestHandlerPastItsTimeoutIsToldAndCounted", change("a handler past its timeout is not told", "worker.go",
		"\t\tdefer s.overdue(d)()\n", "")),
	inTest("TestHandlerPastItsTimeoutIsToldAndCounted", change("a handler that returns late is overdue for ever", "session.go",
		"\t\t\ts.stats.overdue.Add(-1)\n", "")),
	inTest("TestHandlerThatSettledAndThenFailedIsTold", change("an error after the settlement is a failure like others", "log.go",
		"\tcase f.contradicts():\n", "\tcase false:\n")),
	inTest("TestHandlersTooSlowForThePrefetchAreToldBeforeTheConsumerTimeout", change("slow handlers are not told", "session.go",
		"late := taken < p.arrived[0]", "late := false")),
	inTest("TestHandlersTooSlowForThePrefetchAreToldBeforeTheConsumerTimeout", change("busy handlers are slow ones", "session.go",
		"late := taken < p.arrived[0]", "late := taken < p.arrived[len(p.arrived)-1]")),
	// Messages that cannot be read.
	change("headers nest as deep as the driver allows", "internal/wire/frame.go", "const maxDepth = 32 << 10", "const maxDepth = 32"),
	inTest("TestHeadersThatRabbitMQAcceptsAreRead", change("a header frame above frame_max is the driver's", "internal/wire/inbound.go",
		"sub.wantsHeader() && whole <= math.MaxInt32:", "sub.wantsHeader() && whole <= min(FrameSize, math.MaxInt32):")),
	inTest("TestMessageThatCannotBeReadStopsNothing", change("a handler gets what cannot be read", "internal/wire/subscription.go",
		"\tif unfit != nil {\n\t\tsub.receiver.PutAside(d, size, unfit)\n\t\treturn\n\t}\n", "\t_, _ = unfit, size\n")),
	inTest("TestMessageThatCannotBeReadStopsNothing", change("what cannot be read is acked", "hold.go",
		"return p.wire.Requeue(d.fence.tag)", "return p.wire.Ack(d.fence.tag)")),
	inTest("TestMessageThatCannotBeReadStopsNothing", change("what cannot be read counts as a failure of a handler", "hold.go",
		"return p.wire.Requeue(d.fence.tag)", "return p.wire.Reject(d.fence.tag, true)")),
	inTest("TestMessageThatCannotBeReadStopsNothing", change("what cannot be read goes back at once", "hold.go",
		"s.holds.add(d, min(jitter(unreadableHold), unreadableHold), ", "s.holds.add(d, time.Millisecond, ")),
	inTest("TestManyUnreadableMessagesMakeOneLogLineASecond", change("each message that cannot be read is logged", "hold.go",
		"\tleftOut, ok := s.notices.unreadable.allow(time.Second)\n\tif !ok {\n\t\treturn\n\t}\n", "\tleftOut, _ := s.notices.unreadable.allow(time.Second)\n")),
	inTest("TestStreamStepsOverAMessageThatCannotBeRead", change("a stream waits for what cannot be read", "hold.go",
		"\t\t\tassignOffset(d)\n", "")),
	inTest("TestSkippedBodyTakesNoMemory", change("a body that is too large is read all the same", "internal/wire/subscription.go",
		"\tif sub.unfit == nil {\n\t\t// What", "\tif true {\n\t\t// What")),
	inTest("TestHeadersTakeMemoryAsTheyCome", change("room for large headers is never given back", "internal/wire/inbound.go",
		"\tcase size > readBuffer:\n", "\tcase false:\n")),
	inTest("TestReadBufferFollowsTheTraffic", change("a buffer that has grown stays large", "internal/wire/slack.go",
		"return at-s.busy >= slackAfter", "return false")),
	inTest("TestIdleConsumerIsSmall", change("an idle socket has a large buffer", "internal/wire/slack.go",
		"idleBuffer = 4 << 10", "idleBuffer = 64 << 10")),
	inTest("TestReadBufferFollowsTheTraffic", change("the read buffer stays small", "internal/wire/inbound.go",
		"in.full && size < readBuffer", "false")),
	inTest("TestReadBufferStaysLargeWhileBurstsCome", change("each burst lets the read buffer grow anew", "internal/wire/slack.go",
		"\tif used > idleBuffer {\n", "\tif false {\n")),
	inTest("TestWriteBuffersBecomeSmallOnAnIdleSocket", change("write buffers stay large", "internal/wire/outbound.go",
		"\t\to.spare = nil\n", "")),
	inTest("TestAcksArriveBeforeASessionIsEndedForGarbage", change("garbage takes acks along that were given", "internal/wire/inbound.go",
		"\t\t\tin.dismiss(err)\n", "\t\t\tin.socket.Kill(err)\n")),

	inTest("TestSocketWhosePeerIsSilentIsResetNotClosed", change("a silent peer is sent a FIN", "internal/wire/inbound.go",
		"s.disconnect(!errors.Is(err, io.EOF))", "s.disconnect(false)")),

	// Sessions that share a connection, and functions of the user.
	inTest("TestQuestionOfALostSessionLeavesTheNextOneAlone", change("a question that is not answered ends the others on its connection", "loan.go",
		"\tif l.lent > 0 || kept {\n\t\treturn nil\n", "\tif false {\n\t\treturn nil\n")),
	inTest("TestHandlersOfACancelledSessionFinishWhenItsConnectionIsReplaced", change("a connection that is replaced does not wait for its sessions", "connection.go",
		"\t\tlimit = c.awaitLeases(asked)\n", "\t\tlimit = asked.limit\n")),
	inTest("TestInboxGrowsWithWhatWaitsInIt", change("an inbox grows for ever", "inbox.go",
		"min(2*cap(full.waiting), i.most)", "2*cap(full.waiting)+0*i.most")),
	inTest("TestMoreThanThePrefetchIsKept", change("workers stop at the end of the first stretch", "inbox.go",
		"\t\tif s.next == nil {\n", "\t\tif true {\n")),
	inTest("TestMessageThatIsDoneWithIsNotKeptInMemory", mutant{name: "the last message is kept", edits: []edit{
		{"inbox.go", "\tconfig *config\n}\n", "\tconfig *config\n\tlast   *Delivery\n}\n"},
		{"inbox.go", "\td := newDelivery()\n", "\td := newDelivery()\n\tr.last = d\n"},
	}}),
	inTest("TestHandlerThatHangsKeepsNoLaterSessionsInMemory", change("all connections are kept", "consumer.go",
		"func (s *supervisor) forgetClosed() { s.closing = slices.DeleteFunc(s.closing, closer.isDone) }", "func (s *supervisor) forgetClosed() { slices.IndexFunc(s.closing, closer.isDone) }")),
	inTest("TestStopOnABusyPathLetsRunningHandlersFinish", change("the close limit counts while deliveries come", "session.go",
		"\tdefer s.conn.socket.AfterSilence(s.config.closeTimeout, maxDuration, func() { close(silent) })()\n",
		"\tdefer time.AfterFunc(s.config.closeTimeout, func() { close(silent) }).Stop()\n")),
	inTest("TestStopWithAStrayReplyOnABlockedPathKeepsItsLimits", change("a stray reply to basic.cancel is waited out", "session.go",
		"\tcase !s.channel.IsClosed(): // an unexpected reply", "\tcase false: // a reply")),
	inTest("TestStopHurriesAConnectionThatIsOnItsWayOut", change("a stop waits for a connection that takes its time", "consumer.go",
		"\ts.shortenCloses()\n", "")),
	inTest("TestEachTeardownThatOutlastsTheStopIsCounted", change("what closed in order behind a teardown that hangs counts as abandoned", "consumer.go",
		"\tfor _, l := range s.closing {\n\t\tswitch {\n\t\tcase !l.isDone():\n\t\t\ts.stats.abandoned.Add(1)\n",
		"\tfor i, l := range s.closing {\n\t\tswitch {\n\t\tcase !l.isDone():\n\t\t\ts.stats.abandoned.Add(uint64(len(s.closing) - i))\n\t\t\treturn\n")),
	inTest("TestTeardownThatHangsHidesNoAcksThatMayBeLost", change("a teardown that hangs hides what ended behind it", "consumer.go",
		"\t\tcase !l.isDone():\n\t\t\ts.stats.abandoned.Add(1)\n", "\t\tcase !l.isDone():\n\t\t\ts.stats.abandoned.Add(1)\n\t\t\treturn\n")),
	inTest("TestRunTellsOfAcksThatWereLostWhileDraining", change("a channel that has ended counts as closed in order", "session.go",
		"\t\tif !errors.Is(cause, errChannelEnded) {", "\t\tif cause == nil {")),
	inTest("TestRunTellsOfAcksThatACancelledSessionLostWhileDraining", change("what a cancelled session loses is read by nobody", "consumer.go",
		"\t\t\ts.addError(l.session.drainErr)\n", "\t\t\t\t_ = l.session.drainErr\n")),
	inTest("TestTopologyThatCallsGoexitLeaksNoConnection", change("a function of the user that ends its goroutine is waited for", "guard.go",
		"\t\tdone <- a\n", "\t\tif returned {\n\t\t\tdone <- a\n\t\t}\n")),
	inTest("TestDialerThatIgnoresItsContextIsLeftBehindAndWhatItOpensLateIsClosed", change("what a dialer opens late stays open", "dial.go",
		"\t\t\tlate: wire.Abort,\n", "")),
	inTest("TestMiddlewareThatMakesNoHandlerIsRefusedByRun", change("a nil handler of a middleware is found per message", "worker.go",
		"\t\tif made == nil {", "\t\tif false {")),
	inTest("TestDrainErrorCountsTheHandlersOfItsOwnRun", change("the drain counts the handlers of earlier Runs", "session.go",
		"Handlers: int(s.running())", "Handlers: int(s.stats.handling.Load())")),
	// The delivery limit, and what is counted.
	inTest("TestHandlerThatFailsForADayLosesNothing", change("the limit is switched off on 3.x, where that drops at once", "topology.go",
		"c.major() < 4 || q.deadLetters()", "c.major() < 3 || q.deadLetters()")),
	inTest("TestHandlerThatFailsForADayLosesNothing", change("the limit is not switched off on 4.x", "topology.go",
		"\treturn limitOff\n", "\treturn limitAsGiven\n")),
	inTest("TestDefaultLimitHoldsWhereThereIsADeadLetterTarget", change("the limit is switched off where there is a dead-letter target", "topology.go",
		"c.major() < 4 || q.deadLetters()", "c.major() < 4")),
	inTest("TestDeadLettersGoWhereTheQueueSays", change("a dead-letter queue has a limit", "topology.go",
		`if q.Type == "quorum" && s.conn.major() >= 4 {`, "if false {")),
	inTest("TestQueueWithALimitIsTakenAsItIs", change("a queue with a limit is refused", "session.go",
		"if err != nil && t.relax(err) {", "if false {")),
	inTest("TestQueueWithALimitIsTakenAsItIs", change("a queue with the default limit is taken, one with its own is not", "topology.go",
		"t.limit != limitOmitted && t.limit != limitOff ||", "t.limit != limitOff ||")),
	inTest("TestQueueWithALimitIsTakenAsItIs", change("a limit that stays is told in every session", "topology.go",
		"s.notices.limitKept.Swap(true)", "s.notices.limitKept.Load()")),
	inTest("TestOtherInequivalenceIsTheOperators", change("a queue is taken as it is whatever it is", "topology.go",
		" || !strings.HasPrefix(brokerErr.Reason, inequivalentLimit):", ":")),
	inTest("TestDeadLetterQueueOfAnotherKindIsTakenAsItIs", change("a dead-letter queue of another kind is refused", "topology.go",
		"\t\tt.deadKept = true\n", "\t\treturn false\n")),
	inTest("TestMessageNearTheLimitOfOthersIsTold", change("messages near the limit flood the log", "hold.go",
		"\tleft, ok := s.notices.limit.allow(time.Second)\n\tif !ok {\n\t\treturn\n\t}\n", "\tleft, _ := s.notices.limit.allow(time.Second)\n")),
	inTest("TestMessageNearTheLimitOfOthersIsTold", change("a message near the limit is not told", "session.go",
		"\ts.limit, s.limitKnown = s.deliveryLimit()\n", "")),
	inTest("TestDeadLetterThatArrivesBeyondTheLimitIsTold", change("a dead letter beyond the limit is not told", "hold.go",
		" && !d.arrivesCounted(n)", "")),
	inTest("TestAttemptIsThatOfThisQueue", change("rejections by another queue are tries", "delivery.go",
		"case mine && rejected && i > 0:", "case rejected && (i > 0 || !mine):")),
	inTest("TestAttemptIsThatOfThisQueue", change("rejections by a retry loop are no tries", "delivery.go",
		"\treturn max(n, here)\n", "\treturn n\n")),
	inTest("TestAttemptIsThatOfThisQueue", change("a message published again keeps its rejections", "delivery.go",
		"mine && rejected && i > 0", "mine && rejected && i >= 0")),
	inTest("TestMessageThatNoHandlerHasSeenIsAtItsFirstAttempt", change("what was only prefetched has been tried", "delivery.go",
		"if counted || acquired {", "if counted || acquired && false {")),
	inTest("TestAttemptIsThatOfThisQueue", change("a message published again keeps its count", "delivery.go",
		"\tcase !d.Redelivered:\n\t\tn = 0\n", "")),
	inTest("TestAttemptIsThatOfThisQueue", change("deliveries by another queue are tries", "delivery.go",
		"case known && n == acquired, !known && n == here+elsewhere:", "case false:")),
	change("a lost connection hides handlers left behind", "consumer.go", "\tcase err != nil:\n\t\ts.err = errtext.Join(s.err, err)\n", ""),
	change("a hook is called after Run", "notify.go", "\tif r.muted.Load() {\n", "\tif false {\n"),

	// The stall detector, and limits while deliveries come.
	inTest("TestStalledConsumerBehindOneURLGoesToAnotherNode", change("a stall gives the connection up only where there are several hosts", "consumer.go",
		"!leavesNode(err)", "!(leavesNode(err) && len(s.borrower.of.hosts.endpoints) > 1)")),
	inTest("TestMessageThatTakesLongToArriveIsNoStall", change("the detector counts messages, not bytes", "probe.go",
		"s.received.Load() + uint64(s.wire.Heard())", "s.received.Load()")),
	inTest("TestMessageThatTakesLongToArriveIsNoStall", change("only the beginning of a frame is progress", "internal/wire/inbound.go",
		"\tin.bodyLeft -= len(b)\n\tin.progress()\n", "\tin.bodyLeft -= len(b)\n")),
	inTest("TestHeadersThatTakeLongToArriveAreNoStall", change("headers are progress only once they are whole", "internal/wire/inbound.go",
		"\t\tin.progress() // on a slow path it takes a while until the rest is there\n", "")),
	inTest("TestAnswerToTheDetectorBehindALargeMessageIsNotLate", change("the limit of the detector's question counts time", "probe.go",
		"answered := s.conn.socket.AfterSilence(limit, wire.MostSilences*limit, ", "answered := s.conn.socket.AfterSilence(limit, min(limit, wire.MostSilences*limit), ")),
	inTest("TestFreshCredentialsMayBeTakenBehindALargeMessage", change("the limit of fresh credentials counts time", "connection.go",
		"c.socket.AfterSilence(time.Until(limit), maxDuration, ", "c.socket.AfterSilence(time.Until(limit), time.Until(limit), ")),
	inTest("TestLimitOfATryCountsTheSilenceOfAConnectionThatStands", change("the setup limit counts time while deliveries come", "consumer.go",
		"\tif s.conn != nil {\n\t\treturn s.conn.socket.WithSilence(", "\tif false {\n\t\treturn s.conn.socket.WithSilence(")),
	inTest("TestLimitIsOverInTheEndWhateverComes", change("deliveries put a limit off for ever", "internal/wire/silence.go",
		"left := min(l.limit-l.socket.in.sinceDelivery(), time.Until(l.latest))", "left := l.limit - l.socket.in.sinceDelivery()")),
	inTest("TestLimitThatIsCalledOffWhileItLooksStaysOff", change("a limit that was called off goes on", "internal/wire/silence.go",
		"\tl.timer.Stop()\n\tl.timer = nil\n", "\tl.timer.Stop()\n")),
	inTest("TestNodeThatDoesNotAnswerTheDetectorIsLeft", change("a queue that does not answer is no stall", "probe.go",
		"\t\treturn p.stall(\"and the queue does not answer\")\n", "\t\treturn nil\n")),
	inTest("TestQuestionThatIsNotAnsweredLeavesTheOtherSessionsAlone", change("a question that is not answered kills the connection", "probe.go",
		"\t\tif !s.conn.leases.shared() || !q.giveUp(s.conn) {\n", "\t\tif s.conn.socket.Kill(errUnanswered); false {\n")),
	inTest("TestConnectionWithAQuestionThatIsNotAnsweredTakesNoMoreSessions", change("a question that is not answered stays behind", "probe.go",
		"\t\ts.conn.retire(errUnanswered)\n", "")),
	inTest("TestDetectorThatMayNotAskSaysSoOnce", change("a detector that may not ask is silent", "probe.go",
		"\tcase brokerErr.Code == amqp.AccessRefused:\n", "\tcase brokerErr.Code == amqp.AccessRefused:\n\t\treturn\n")),
	inTest("TestDetectorThatMayNotAskSaysSoOnce", change("a detector that may not ask says so for every session", "probe.go",
		"p.session.notices.blind.CompareAndSwap(false, true)", "true")),
	inTest("TestDetectorThatMayNotAskIsRefusedOncePerSession", change("a detector that may not ask goes on asking", "probe.go",
		"p.refused = brokerErr != nil && brokerErr.Server", "p.refused = false")),
	inTest("TestDetectorWithoutAChannelSaysSoOnce", change("a detector without a channel is silent", "probe.go",
		"case errors.Is(err, amqp.ErrChannelMax):", "case false:")),

	// Where options meet.
	change("a stream skips a message after a lost session", "stream.go", "args[offsetKey] = p.next", "args[offsetKey] = p.next + 1"),
	change("every session of a stream begins where the first one did", "stream.go", "\t\targs[offsetKey] = p.next\n", "\t\targs[offsetKey] = p.from\n"),
	change("a stream's acks do not move its place", "stream.go", "\t\tp.next = d.offset + 1\n", "\t\t_ = d.offset\n"),
	inTest("TestStalledConsumerBehindOneURLGoesToAnotherNode", change("the stall detector never looks", "probe.go",
		"look := time.NewTimer(s.config.stallAfter)", "look := time.NewTimer(24 * time.Hour)")),
	change("any silence is a stall", "probe.go",
		"return q.Messages > 0 && q.Consumers <= 1 && !single", "return q.Consumers <= 1 && !single"),
	change("the renewal of credentials spins", "connection.go",
		"time.NewTimer(max(left, again.draw()))", "time.NewTimer(max(left, time.Millisecond))"),
	change("the renewal of credentials counts time while deliveries come", "connection.go",
		"c.socket.AfterSilence(time.Until(limit), maxDuration, func()", "c.socket.AfterSilence(time.Until(limit), time.Until(limit), func()"),
	change("credentials are those of the URL", "connection.go",
		"\tif c.credentials == nil {\n", "\tif true {\n"),
	change("every session leaves a channel behind", "session.go",
		"\tchannel, err := c.openChannel(ctx, lease.use, c.queues)\n", "\t_, _ = c.openChannel(ctx, lease.use, c.queues)\n\tchannel, err := c.openChannel(ctx, lease.use, c.queues)\n"),
	change("a queue is not bound", "topology.go", "range q.Bindings {\n\t\tif err", "range q.Bindings[:0] {\n\t\tif err"),
	change("a panic of a function of the user ends the process", "guard.go", "if !returned { // after a runtime.Goexit", "if false && returned { // after a runtime.Goexit"),
	change("a function of the user is waited for however long it takes", "guard.go",
		"\tcase <-grace.C:\n\t}\n\tc.left()\n", "\tcase a := <-done:\n\t\treturn a.value, c.returned(a.err)\n\t}\n\tc.left()\n"),
	change("what the broker has counted is no attempt", "delivery.go", "\treturn max(n, here)\n", "\treturn here\n"),
	change("a handler starts though the one before it has ended Run's context", "worker.go", "p.ctx.Err() != nil || ", ""),
	change("handlers get what cannot be read", "internal/wire/subscription.go",
		"\tif unfit != nil {\n\t\tsub.receiver.PutAside(d, size, unfit)\n\t\treturn\n\t}\n", "\t_, _ = unfit, size\n"),
	change("what cannot be read is discarded", "hold.go",
		"return p.wire.Requeue(d.fence.tag)", "return p.wire.Reject(d.fence.tag, false)"),
	change("the default limit drops what fails on a queue of WithQueue", "topology.go", "\treturn limitOff\n", "\treturn limitAsGiven\n"),
	change("a limit of -1 drops what fails on 3.x", "topology.go", "c.major() < 4 || q.deadLetters()", "c.major() < 3 || q.deadLetters()"),

	// Telling.
	inTest("TestHourOfOutageIsAtMost100Lines", change("repeated causes are all told", "log.go",
		"\tif s.count < s.next && !time {",
		"\tif false && !time {")),
	inTest("TestHourOfOutageIsAtMost100Lines", change("repeated causes are told no more", "log.go",
		"\tif s.count < s.next && !time {",
		"\tif s.count > 1 {")),
	inTest("TestHourOfOutageIsAtMost100Lines", change("outages that begin and end are told like those that go on", "log.go",
		"\tlevel, gap, lines := slog.LevelDebug, outageGap, 2\n",
		"\tlevel, gap, lines := slog.LevelDebug, longestSilence, 2\n")),
	inTest("TestHourOfOutageIsAtMost100Lines", change("the end of an outage is told whatever was told of it", "log.go",
		"\tdue := j.outageOpen || down",
		"\tdue := true || down")),
	inTest("TestHourOfOutageIsAtMost100Lines", change("short sessions make the log begin anew", "log.go",
		"c.Time.Sub(j.consumingSince) >= forgetAfter {",
		"c.Time.Sub(j.consumingSince) >= outageGap {")),
	inTest("TestHourOfOutageIsAtMost100Lines", change("the queue is missing in the log", "log.go",
		"slog.String(\"queue\", c.Queue))",
		"slog.String(\"name\", c.Queue))")),
	inTest("TestHourOfCausesThatAreAllDifferentIsAtMost100Lines", change("every cause is counted apart", "log.go",
		" || j.extra.spend(c.Time, lines)) {",
		" || j.extra.spend(c.Time, 0*lines)) {")),
	inTest("TestFailureOnTwoHostsIsOneCause", change("each host is a cause of its own", "log.go",
		"j.cause(causeKey(c), c.Time)",
		"j.cause(c.Host, c.Time)")),
	inTest("TestFailureThatWasToldIsNotTheLastWord", change("the end of an outage is told now and then", "log.go",
		"\tdue := j.outageOpen || down",
		"\tdue := j.lastLine.IsZero() || down")),
	inTest("TestFailureThatWasToldIsNotTheLastWord", change("a consuming that was put off is never told", "log.go",
		"\t\tj.stableTimer.set(stableAfter)\n",
		"")),
	inTest("TestSessionsThatEndAtOnceAreNotToldAsRecovered", change("a consuming is told before it has settled", "log.go",
		"\tif due && !j.flapping {\n",
		"\tif due {\n")),
	inTest("TestLongOutageIsToldAtItsEndAtLeast", change("a long outage may pass unseen", "log.go",
		"down >= longOutage && ",
		"down >= time.Hour && ")),
	inTest("TestRunThatGivesUpIsToldAsAnError", change("a Run that gives up is told as one that stops", "log.go",
		"\tcase j.gaveUp:\n",
		"\tcase false:\n")),
	inTest("TestRunThatGivesUpIsToldAsAnError", change("a Run without a session is told to drain", "log.go",
		"\t\tif c.Session == 0 { // there",
		"\t\tif false { // there")),
	inTest("TestDurationsAreTextsInJSON", change("durations are numbers in JSON", "log.go",
		"\treturn slog.String(key, d.String())\n",
		"\treturn slog.Duration(key, d)\n")),
	inTest("TestHandlersErrorIsToldWithItsMessage", change("a failure does not name its message", "log.go",
		"\t\tmessageID(d.MessageId), slog.Uint64",
		"\t\tslog.Uint64")),
	inTest("TestLinesNameTheLimitThatPassed", change("a handler's timeout is told without its value", "log.go",
		"ErrHandlerTimeout.Error(), limit, 1)",
		"limit, limit, 1)")),
	inTest("TestLinesNameTheLimitThatPassed", change("a handler past its timeout does not name its message", "session.go",
		"messageID(id), slog.Uint64",
		"messageID(id[:0]), slog.Uint64")),
	inTest("TestTryThatTakesItsTimeIsTold", change("a slow try is told in every try", "dial.go",
		"limit.allow(slowInterval)",
		"limit.allow(0)")),
	inTest("TestLogTellsOfASlowDialForAllWhoWaitForIt", change("each of a group that waits for a slow dial tells it", "connections.go",
		"if d == nil || d.over || !cs.tells(d.keeper) {",
		"if true {")),
	inTest("TestLogTellsOfEachOfSeveralConnectionsWhenItIsBack", change("the connections of a group share one count of failures", "connections.go",
		"	return cs.reporters[k.number]",
		"	return cs.reporters[1]")),
	inTest("TestPanicOfTheLogHandlerInALineOfTheGroupEndsItsRun", change("a panic in a line of the group does not end its run", "group.go",
		"r.fault, r.faulted = &run.fault, end",
		"r.fault, r.faulted = &run.fault, func() {}")),
	inTest("TestTryThatTakesItsTimeIsTold", change("a slow try stays at its dial", "dial.go",
		"\t\t\tstep.at(\"open\")\n",
		"")),
	inTest("TestDeadlineOfRunThatEndsADialIsNoFailure", change("a dial that ends by Run's deadline is a failure", "consumer.go",
		"s.ctx.Err() != nil || ok && !now.Before(limit)",
		"s.ctx.Err() != nil || ok && limit.IsZero()")),
	inTest("TestErrorsSayAThingOnce", change("the broker's full stop is before a colon", "internal/errtext/errtext.go",
		"strings.TrimSuffix(strings.TrimSpace",
		"strings.TrimPrefix(strings.TrimSpace")),
	inTest("TestAdviceOnCertificates", change("the log does not say what to do", "errors.go",
		" + advice(at.Op, at.Err)\n",
		"\n")),
	inTest("TestAdviceOnCertificates", change("nobody hears that a name differs", "errors.go",
		"new(x509.HostnameError)",
		"new(x509.SystemRootsError)")),
	inTest("TestInsecureSkipVerifySwitchesVerificationOff", change("WithInsecureSkipVerify has no effect", "endpoint.go",
		"\t\tc.InsecureSkipVerify = true\n",
		"")),
	inTest("TestInsecureSkipVerifySwitchesVerificationOff", change("WithInsecureSkipVerify is taken on amqp", "config.go",
		`if u.Scheme == "amqp" && c.insecure {`,
		"if false {")),
	inTest("TestWithQueueIsToldAsDeclare", change("what WithQueue does is called topology", "errors.go",
		"errors.As(e.Err, new(*declareError))",
		"false")),
	inTest("TestRunTellsThatLastAcksMayBeLost", change("a loss while stopping is told as any other", "session.go",
		"; this was while stopping: the last acks may be lost, and their messages come again",
		"")),
	inTest("TestMessageBeyondTheDefaultLimitIsNotTold", change("messages beyond the default limit are told", "hold.go",
		", n > s.limit+1 && !s.limitKnown:",
		":")),
	inTest("TestHandlerWhoseSettlementWasRefusedHasFailed", change("a refused settlement is overlooked", "worker.go",
		"\t\t\terr = d.overlooked()\n\t\t}\n\t\tfailed",
		"\t\t}\n\t\tfailed")),
	inTest("TestHandlerThatSettlesAfterARefusalIsRespected", change("a refusal counts after a settlement", "ack.go",
		"reason == nil || d.Outcome() != Unsettled",
		"reason == nil")),
	inTest("TestInvokeTellsOfASettlementThatWasRefused", change("Invoke overlooks a refused settlement", "worker.go",
		"\t\t\terr = d.overlooked()\n\t\t}\n\t\tif d.Outcome",
		"\t\t}\n\t\tif d.Outcome")),
	inTest("TestDeliveryPrintsShortly", change("a delivery prints with its content", "delivery.go",
		"func (d Delivery) String()",
		"func (d Delivery) Text()")),
	inTest("TestFailingHandlersDoNotFloodTheLog", change("handlers' errors are all told", "log.go",
		"\tif !due {\n\t\tf.suppressed++\n",
		"\tdue = true\n\tif !due {\n\t\tf.suppressed++\n")),
	inTest("TestFailuresThatWereLeftOutAreToldAtLast", change("what was left out of handlers' errors is never told", "log.go",
		"\tj.summaryTimer.set(longestSilence + failureGap)",
		"\tj.summaryTimer.set(24 * time.Hour)")),
	inTest("TestHandlersErrorIsToldWithItsMessage", change("handlers' errors are silent", "worker.go",
		"\tp.reporter.failed(failure{of: s, timeout: p.config.handlerTimeout, delivery: d, conclusion: became, err: err, panicked: panicked})\n", "\t_ = panicked\n")),
	inTest("TestHandlerCutOffByALostSessionIsNotToldAsFailed", change("a lost session is told as a handler's failure", "session.go",
		"return s.ctx.Err() != nil && !errors.As", "return s.ctx.Err() != nil && s == nil && !errors.As")),
	inTest("TestDefaultLoggerIsLookedUpWhenRunBegins", change("the default logger is looked up by New", "config.go",
		"\t\ttagPrefix:      \"steadymq\",\n",
		"\t\ttagPrefix:    \"steadymq\",\n\t\tlogger:       slog.Default(),\n")),
	inTest("TestSettledTellsEveryOutcomeOnce", change("a held message is told twice", "session.go",
		"\tcase v.delay == 0:\n",
		"\tcase v.delay > 0 && s.config.hooks.Settled != nil:\n\t\ts.reporter.settled(d, Requeued)\n\t\ts.holds.add(d, v.delay, func() { _ = d.Requeue() })\n\tcase v.delay == 0:\n")),
	inTest("TestRetiredSessionIsGivenUpThoughItsSuccessorIsBusy", change("a close waits as long as others are busy", "session.go",
		"err = s.call(over.C, s.channel.Close)", "err = s.call(nil, s.channel.Close)")),
	inTest("TestOneHeldMessageOfAStreamThatStopsItIsTold", change("what piles up behind a held message is not looked at", "hold.go",
		"\t\th.checkIn(warnAgainAfter/2, h.recheck)\n", "\t\t_ = h.recheck\n")),
	inTest("TestHeldMessageThatIsSettledByHandIsHeldNoMore", change("a held message that was settled by hand stays held", "hold.go",
		"\th.dropSettled()\n", "")),
	inTest("TestFailureAtTheDrainSaysWhatBecameOfTheMessage", change("a failure at the drain counts as held", "session.go",
		"\t\tbecame.held = 0\n", "")),
	inTest("TestWarningOfHeldMessagesSaysSinceWhenTheyAreTooMany", change("held messages are told since the first of long ago", "hold.go",
		"h.crowdedSince.IsZero() || h.easedLongEnough()", "h.crowdedSince.IsZero()")),
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
		"\t\t\tgo r.run()\n",
		"\t\t\tr.muted.Store(true)\n")),
	inTest("TestEventAfterAQuietTimeIsTold", change("an event after a quiet time is lost", "notify.go",
		"\tdefault:\n\t\tr.running, r.wake = false, nil\n", "\tdefault:\n")),
	inTest("TestFailuresThatWereLeftOutAreToldAtLast", change("the reporter ends though a line is owed", "notify.go",
		"\tcase r.journal.waiting():\n", "\tcase false:\n")),
	inTest("TestEventAfterAQuietTimeIsTold", change("an event is lost while the reporter ends", "notify.go",
		"\tdefault:\n\t\tr.running, r.wake = false, nil\n", "\tdefault:\n\t\tr.mu.Unlock()\n\t\ttime.Sleep(time.Millisecond)\n\t\tr.mu.Lock()\n\t\tr.running = false\n")),
	inTest("TestEventWaitsForTheOneBeforeIt", change("two goroutines report at the same time", "notify.go",
		"\tif !r.running {\n", "\tif true {\n")),
	inTest("TestEventAfterAQuietTimeIsTold", change("the reporter waits for events for ever", "notify.go",
		"\tcase r.journal.waiting():\n", "\tcase true:\n")),
	inTest("TestErrorsSayAThingOnce", change("a refused dial is told twice", "internal/errtext/errtext.go",
		"addressed && e.Err != nil",
		"false && e.Err != nil")),
	inTest("TestErrorsOfRunStayInOneLine", change("Run's errors are several lines", "internal/errtext/errtext.go",
		"\treturn strings.Join(texts, \"; \")",
		"\treturn strings.Join(texts, \"\\n\")")),
	inTest("TestCredentialsNeverShowThePassword", change("credentials are marshalled with their password", "config.go",
		"func (c Credentials) MarshalText()",
		"func (c Credentials) Text()")),
	inTest("TestDeliveryCanBeMarshalledAndLogged", change("a delivery cannot be marshalled", "delivery.go",
		"func (d Delivery) MarshalJSON()",
		"func (d Delivery) JSON()")),
	inTest("TestHostileMessageCanBeMarshalled", change("a hostile header cannot be marshalled", "delivery.go",
		"Headers:         tableJSON(d.Headers, shownDepth),",
		"Headers:         d.Headers,")),
	// Values and functions of the user.
	inTest("TestErrorOfAHandlerThatCannotBeReadIsAFailure", change("a handler's error is read unseen", "worker.go",
		"err = safeError(p.handler(ctx, d))", "err = p.handler(ctx, d)")),
	inTest("TestErrorOfAHandlerThatCannotBeReadIsAFailure", change("what a handler panics with is read unseen", "guard.go",
		"if new(reading).all(e) != nil {", "if false {")),
	inTest("TestErrorOfAHandlerThatCannotBeReadIsAFailure", change("Invoke reads an error unseen", "worker.go",
		"err = safeError(h(ctx, d))", "err = h(ctx, d)")),
	inTest("TestErrorThatCannotBeReadIsAFailureThatSaysSo", change("an error of a user's function is read unseen", "guard.go",
		"\ta.err = safeError(a.err)\n", "")),
	inTest("TestErrorThatCannotBeReadIsAFailureThatSaysSo", change("of errors side by side none is looked at", "guard.go",
		"for _, inner := range e.Unwrap() {", "for _, inner := range e.Unwrap()[:0] {")),
	inTest("TestOutcomeStaysThoughTheErrorInItCannotBeRead", change("a discard around a nil pointer is a failure", "guard.go",
		"if v := r.outcome; v != nil {", "if v := r.outcome; false {")),
	inTest("TestCauseOfRunsContextThatCannotBeReadEndsNoProcess", change("the cause of Run's context is read unseen", "guard.go",
		"return safeError(context.Cause(ctx))", "return context.Cause(ctx)")),
	inTest("TestDialerThatReturnsNoConnectionIsAFailureThatSaysSo", change("a dialer's nil pointer is a connection", "guard.go",
		" || v.Kind() == reflect.Pointer && v.IsNil()", "")),
	inTest("TestConnectionThatComesWithAnErrorIsClosed", change("a connection that comes with an error stays open", "dial.go",
		"\t\t\t\t\twire.Abort(conn)\n", "")),
	inTest("TestNewRefusesANilPointerForALoginMechanism", change("a nil pointer is a login mechanism", "options.go",
		"if isNil(m) {", "if m == nil {")),
	inTest("TestConnectionThatPanicsIsReplaced", change("a Read that ends its goroutine leaves the socket", "guard.go",
		"\t\t\tfault(err)\n", "")),
	inTest("TestConnectionThatPanicsIsReplaced", change("a Close that panics ends the process", "internal/wire/socket.go",
		"\tdefer func() { _ = recover() }()\n\t_ = conn.Close()\n", "\t_ = conn.Close()\n")),
	inTest("TestTLSCallbackThatFailsLeavesNoSocket", change("what panics while the driver reads ends the process", "internal/wire/inbound.go",
		"s.opts.transfer(s.conn.Read, in.buf[in.w:], s.Kill)", "s.conn.Read(in.buf[in.w:])")),
	{name: "a handshake that does not return is waited for", test: "TestTLSCallbackThatFailsLeavesNoSocket", edits: []edit{
		{
			"dial.go", "\t_, err = userCall[struct{}]{\n\t\toption: \"WithTLSConfig\",\n", "\t_, err = userCall[struct{}]{\n\t\toption: \"\",\n",
		},
		{"dial.go", "\t\tbare:   true,\n\t}.run(ctx)\n", "\t\tbare:   true,\n\t}.f(ctx)\n"},
	}},
	inTest("TestTLSCallbackThatHangsIsLeftBehindAndCounted", change("a callback that is left behind is not counted", "connection.go",
		"socketOptions(c, e), abandoned)", "socketOptions(c, e), func() {})")),
	inTest("TestFunctionThatHangsEndsRunAfterTheSetupLimit", change("WithFatal has no limit", "consumer.go",
		"\tctx, cancel := context.WithTimeoutCause(ctx, c.setupTimeout, errNoAnswer)\n\tdefer cancel()\n\treturn userCall[bool]{",
		"\treturn userCall[bool]{")),
	inTest("TestFunctionThatHangsEndsRunAfterTheSetupLimit", change("a middleware has no limit", "worker.go",
		"\tctx, cancel := context.WithTimeoutCause(ctx, c.setupTimeout, errNoAnswer)\n\tdefer cancel()\n\tvar refused",
		"\tvar refused")),
	inTest("TestLogHandlerThatPanicsEndsRunAndIsNamed", change("a log handler that panics is called a hook", "notify.go",
		`r.call(f, "WithLogger", "the log handler")`, `r.call(f, "WithHooks", "a hook")`)),
	inTest("TestLogHandlerThatPanicsForAFailedHandlerEndsRun", change("workers ask the log handler", "log.go",
		"\tif !due { // the reporter's", "\tif !due || !j.logger.Enabled(j.ctx, level) { // the reporter's")),
	inTest("TestEveryLineOfTheLogIsAsItWas", mutant{name: "what is left out is told of the session before", edits: []edit{
		{"log.go", "f.last, f.attrs = what.err, what.of.attrs()", "f.last = what.err"},
		{"log.go", "= 0, nil, now, nil\n", "= 0, nil, now, what.of.attrs()\n"},
	}}),
	inTest("TestEveryLineOfTheLogIsAsItWas", change("the last line keeps the panic of a hook to itself", "consumer.go",
		"s.enter(Stopped, s.result())", "s.enter(Stopped, s.err)")),
	inTest("TestNoHookIsCalledAfterOneHasPanicked", change("hooks are called after one has panicked", "notify.go",
		"\tif r.fault.Load() == nil {\n", "\tif true {\n")),

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
		"\tif a.used+lines > extraLines {\n", "\tif false {\n")),
	inTest("TestNameOfTheHostMakesNoCause", change("the name of a host makes a cause", "log.go",
		`key = strings.ReplaceAll(key, host, "")`, `_ = strings.ReplaceAll(key, host, "")`)),
	inTest("TestHoldOfAnUnreadableMessageIsItsOwn", change("what cannot be read is held like a failed message", "hold.go",
		"s.holds.add(d, min(jitter(unreadableHold), unreadableHold), ", "s.holds.add(d, s.config.requeueLongest, ")),
	inTest("TestSizeOfAnUnreadableMessageIsItsOwn", change("a size is that of the message before", "internal/wire/subscription.go",
		"\t\tsub.announcedSize = sub.size\n", "")),
	inTest("TestLongConsumerTimeoutIsNotTakenForTheDefault", change("a long consumer timeout is the default", "config.go",
		"ok && ms > 0 {", "ok && ms > 0 && ms <= maxDuration.Milliseconds() {")),
	inTest("TestQueueNamedLikeARefusalIsNotTakenAsItIs", change("the name of a queue decides", "topology.go",
		"!strings.HasPrefix(brokerErr.Reason, inequivalentLimit):", "!strings.Contains(brokerErr.Reason, inequivalentLimit):")),
	inTest("TestDeepHeadersAreShownDownToALevel", change("headers are shown as deep as they are", "delivery.go",
		"const shownDepth = 100", "const shownDepth = 1 << 30")),
	inTest("TestInvokeDecidesAsAConsumerDoes", change("Invoke lets a panic pass", "worker.go",
		"\t\t\terr = panicked(recover())",
		"\t\t\terr = nil")),
	// What New takes, and what a topology function may do.
	inTest("TestWhatNewWasGivenMayChangeAfterwards", change("arrays of a table are not copied", "internal/table/table.go",
		"return c.array(v, place+\", \", depth+1)", "_ = c.array(v, place+\", \", depth+1)\n\t\treturn v")),
	inTest("TestWhatNewWasGivenMayChangeAfterwards", change("bytes of a table are not copied", "internal/table/table.go",
		"return bytes.Clone(v)", "_ = bytes.Clone(v)\n\t\treturn v")),
	inTest("TestWhatNewWasGivenMayChangeAfterwards", change("the list of bindings is not copied", "config.go",
		"q.Bindings = slices.Clone(q.Bindings)", "q.Bindings = q.Bindings[:len(q.Bindings):len(q.Bindings)]")),
	inTest("TestWhatNewWasGivenMayChangeAfterwards", change("the list of mechanisms is not copied", "options.go",
		"c.sasl = slices.Clone(mechanisms)", "c.sasl = slices.Clip(mechanisms)")),
	inTest("TestTLSConfigurationMayChangeAfterwards", change("the TLS configuration is not copied", "options.go",
		"c.tls = copyTLS(t)", "c.tls = t")),
	inTest("TestNumbersArriveAsTheyWereGiven", change("an int is cut to 32 bits", "internal/table/table.go",
		"if int(int32(v)) != v {", "if false {")),
	inTest("TestWhatAMQPCannotCarryIsRefusedWithItsPlace", change("arguments of bindings are not looked at", "config.go",
		"b.Args = c.takeTable(\"WithQueue\", place+\".Args\", b.Args)", "")),
	inTest("TestWhatAMQPCannotCarryIsRefusedWithItsPlace", change("a table that holds itself is followed to its end", "internal/table/table.go",
		"if depth > maxNesting && !c.over {", "if false {")),
	inTest("TestWhatAMQPCannotCarryIsRefusedWithItsPlace", change("a table that no frame holds is taken", "internal/table/table.go",
		"c.size > maxSize && !c.over", "c.size > maxSize<<10 && !c.over")),
	inTest("TestWhatAMQPCannotCarryIsRefusedWithItsPlace", change("names that are no UTF-8 are sent", "internal/table/table.go",
		"case !utf8.ValidString(text):", "case false && !utf8.ValidString(text):")),
	inTest("TestQueueThatAMQPCannotCarryIsNotSent", change("the queue of a topology function is not looked at", "topology.go",
		"if problem := table.ShortString(queue); problem != \"\" {", "if problem := table.ShortString(queue); false {")),
	inTest("TestTopologyFunctionThatMakesTheChannelTransactionalIsRefused", change("a transactional channel is consumed from", "internal/wire/subscription.go",
		"\t\tall.misuseOf(channel).Transactions++\n", "")),
	inTest("TestTopologyFunctionThatConsumesIsToldOnce", change("a consumer of the topology function is told for every session", "topology.go",
		"s.notices.consumed.CompareAndSwap(false, true)", "true")),

	// When acks leave.
	inTest("TestDriverWhoseFramesCannotBeFollowedEndsTheSocket", change("a session without a place for acks goes on", "internal/wire/outbound.go",
		"if o.scanner.opaque {", "if false {")),
	inTest("TestDeadlineOfTheDriverLengthensNoWriteUnderWay", change("a deadline of the driver lengthens a write", "internal/wire/outbound.go",
		"return o.socket.setDeadline(net.Conn.SetWriteDeadline, earlier(t, o.limit))", "return o.socket.setDeadline(net.Conn.SetWriteDeadline, t)")),
	inTest("TestAcksLeaveAtOnceOrShareTheirWrite", change("a lone ack waits for company", "internal/wire/flush.go",
		"alone || starving", "alone && false || starving")),
	inTest("TestAcksLeaveAtOnceOrShareTheirWrite", change("acks wait until the broker has no window left", "internal/wire/flush.go",
		"2*f.batched >= prefetch", "f.batched >= prefetch")),
	inTest("TestAcksLeaveAtOnceOrShareTheirWrite", change("acks wait though the reader finds nothing more", "internal/wire/flush.go",
		"return f.batched > 0 && f.idle() && f.flushNow()", "return false")),
	inTest("TestAcksLeaveAtOnceOrShareTheirWrite", change("a wait that is over lets later acks go early", "internal/wire/flush.go",
		"if left := f.due - at; left > 0 {", "if left := f.due - at; left > f.delay {")),
	inTest("TestNoAckWaitsLongerThanTheWriteDelay", change("every ack makes those before it wait anew", "internal/wire/flush.go",
		"if f.batched == 1 {", "if f.batched >= 1 {")),
	inTest("TestNoAckWaitsLongerThanTheWriteDelay", change("a wait for nothing never ends", "internal/wire/flush.go",
		"\tf.timerRuns = false\n", "\tf.timerRuns = f.batched == 0\n")),
	inTest("TestCloseToASlowReaderIsBounded", change("a close waits as long as the peer takes something", "internal/wire/socket.go",
		"\t\tlimit = timer.C\n", "")),
	inTest("TestSocketDismissedUnderAFullPipeEndsWithinTheGrace", change("a socket that is dismissed waits for its peer", "internal/wire/inbound.go",
		"time.AfterFunc(drainGrace, func() { s.disconnect(true) })", "time.AfterFunc(10*drainGrace, func() { s.disconnect(true) })")),

	// Channels that are given up.
	inTest("TestNumberIsOpenedAgainOnceTheBrokerHasConfirmed", change("a number is opened again before the broker has let go of it", "internal/wire/channel.go",
		"\tn.held, n.opening = n.awaited, true\n", "\tn.held = false\n")),
	inTest("TestNumberIsOpenedAgainOnceTheBrokerHasConfirmed", change("a channel whose open waits is not opened", "internal/wire/channel.go",
		"\tif n.held {\n\t\tn.held = false\n\t\topen :=", "\tif false {\n\t\tn.held = false\n\t\topen :=")),
	inTest("TestChannelIsGivenUpWhileTheDriverClosesIt", change("a channel that the driver closes is closed twice", "internal/wire/channel.go",
		"\tcase n.closing: // the driver", "\tcase false: // the driver")),
	inTest("TestAcksLeaveAtOnceOrShareTheirWrite", change("a settlement beside one that leaves at once keeps the next one waiting", "internal/wire/flush.go",
		"\tif f.requested { // it goes along", "\tif false { // it goes along")),
	inTest("TestNothingThatComesLateReachesTheDriver", change("a close that crosses ours is not answered", "internal/wire/channel.go",
		"written = !n.answered", "written = false")),
	inTest("TestNothingThatComesLateReachesTheDriver", change("a close that crosses ours is answered twice", "internal/wire/channel.go",
		"written = !n.answered", "written = true")),
	inTest("TestDriverWritesNothingOnAGivenUpChannel", change("the driver goes on writing on a channel that was given up", "internal/wire/channel.go",
		"\t\treturn all.mute(channel, n, p)\n", "\t\treturn true\n")),
	inTest("TestGivenUpChannelIsClosedTowardsBothSides", change("a channel that was given up settles", "internal/wire/subscription.go",
		"\tall.close(channel)\n\tall.tombstones[channel] = newTombstone(s, channel)\n", "\tall.tombstones[channel] = newTombstone(s, channel)\n")),
	inTest("TestGivenUpChannelIsClosedTowardsBothSides", change("a Read that waits is not woken for a channel that was given up", "internal/wire/inbound.go",
		"\t_ = in.socket.setDeadline(net.Conn.SetReadDeadline, time.Unix(1, 0))\n", "")),
	inTest("TestWakingReadLeavesTheDriversDeadlineAlone", change("a Read that was woken forgets its deadline", "internal/wire/inbound.go",
		"\t_ = in.socket.setDeadline(net.Conn.SetReadDeadline, in.deadline)\n", "\t_ = in.socket.setDeadline(net.Conn.SetReadDeadline, time.Time{})\n")),
	inTest("TestDeadlineOfTheDriverCallsOffNoWake", change("a deadline of the driver calls off a wake", "internal/wire/inbound.go",
		"\tif in.waking.Load() {\n\t\treturn nil", "\tif false {\n\t\treturn nil")),
	inTest("TestCloseKeepsOutOfWhatTheDriverWrites", change("a channel is closed within a message of the driver", "internal/wire/channel.go",
		"\tcase n.left != 0:\n\t\tn.unsent = frame\n", "")),
	inTest("TestCloseKeepsOutOfWhatTheDriverWrites", change("a channel is closed within a frame of the driver", "internal/wire/channel.go",
		"\tif !o.scanner.withinFrame() {", "\tif true {")),
	inTest("TestChannelIsGivenUpWhileAMessageIsRead", change("a message of a channel that was given up is read to its end", "internal/wire/inbound.go",
		"\tif over {\n", "\tif over && false {\n")),
	inTest("TestGiveUpOfWhatHasEndedDoesNothing", change("a channel is given up though the driver is about to hear of its end", "internal/wire/channel.go",
		"\tall.end(n)\n\tn.closed = method == channelClose\n", "\tn.closed = method == channelClose\n")),
	inTest("TestBothSidesCloseAChannelAtOnce", change("the driver hears of the answer to a close that crossed the broker's", "internal/wire/channel.go",
		"\tif n.closed && n.closing {", "\tif false {")),
	inTest("TestBothSidesCloseAChannelAtOnce", change("the driver closes a channel that the broker has closed", "internal/wire/channel.go",
		"\treturn method != channelClose\n", "\treturn true\n")),
	inTest("TestChannelIsGivenUpBeforeItsOpen", change("a channel that was given up is opened all the same", "internal/wire/channel.go",
		"\tcase c.state == channelOver: // given up already", "\tcase false: // given up already")),

	// Paths that are seldom walked.
	inTest("TestDriversOwnSettlementsDecideOnce", change("the driver's Reject requeues what is to be dropped", "ack.go",
		"return f.claim(tag, false, rejected(requeue))", "return f.claim(tag, false, rejected(!requeue))")),
	inTest("TestTryThatComesBackTooLateIsClosed", change("the session of a late try lives on", "session.go",
		"\t\t\t\ta.discard()\n", "")),
	inTest("TestTryThatComesBackTooLateIsClosed", change("a late try leaves its connection open", "session.go",
		"if a.giveBack != nil {", "if false {")),
	inTest("TestLostSessionsLeaveNothingInMemory", change("what has left is remembered", "consumer.go",
		"func (s *supervisor) forgetClosed() { s.closing = slices.DeleteFunc(s.closing, closer.isDone) }", "func (s *supervisor) forgetClosed() { s.closing = slices.Clip(s.closing) }")),

	// Many consumers on few connections.
	change("who waits for a dial is not told that it ended", "connections.go",
		"\t\td.keeper.dial = nil\n\t\tclose(d.done)\n", "\t\td.keeper.dial = nil\n"),
	change("each who waits dials by itself", "connections.go",
		"case k.dial != nil:", "case k.dial != nil && false:"),
	change("isolation never ends", "consumer.go",
		"if s.borrower.isolated() {\n\t\tfrom.proven", "if false {\n\t\tfrom.proven"),
	change("an isolated consumer keeps the shared connection", "connections.go",
		"\town.own = true\n\tb.of.apart++\n\tb.move(own)\n", "\town.own = true\n"),
	change("who leaves a connection of its own counts as isolated", "connections.go",
		"\t\tcs.apart--\n", "\t\tcs.apart += 0\n"),
	change("the last one to leave does not close the connection", "connections.go",
		"\tc.close(d)\n\tcs.closing = append(", "\tcs.closing = append("),
	change("a stopped consumer stays in the group", "group.go",
		"g.consumers = slices.DeleteFunc(g.consumers,", "_ = slices.DeleteFunc(slices.Clone(g.consumers),"),
	change("no further connection where a limit on channels needs one", "connections.go",
		"\tif best == nil {\n\t\tbest = cs.addKeeper()\n\t\tbest.most = cs.channels\n\t}\n",
		"\tif best == nil {\n\t\tbest = cs.keepers[0]\n\t}\n"),
	change("a set-up for which the broker closes the connection is not counted", "consumer.go",
		"s.strikes, s.struck = s.strikes+1, time.Now()", "s.struck = time.Now()"),
	change("a consumer's error ends the group without a word", "group.go",
		"\t\tg.run.errs = append(g.run.errs, ofConsumer(err, c.config))\n", "\t\t_ = ofConsumer(err, c.config)\n"),
	change("a consumer that is stopped ends the group", "group.go",
		"\tif c.stopped.Load() {\n\t\tdelete", "\tif c.stopped.Load() {\n\t\tg.ruall.end(n)\n\t\tdelete"),
	inTest("TestConsumerFindsAConnectionWithAChannelAtOnce", change("nobody knows how many channels a connection has", "connections.go",
		"b.of.channels = int(c.amqp.Config.ChannelMax)", "b.of.channels = 0")),
	inTest("TestQueueOfItsConnectionGoesWithItsConsumer", change("a queue of the connection stays there after its consumer", "consumer.go",
		"|| !s.borrower.outlived(s.conn) {", "|| s.borrower.outlived(s.conn) {")),
	inTest("TestQueueOfItsConnectionIsNotLeftBehindLockedAfterAStall", change("a stall leaves a locked queue behind", "consumer.go",
		"\tif names := s.left(); names.any() {\n", "\tif names := s.left(); names.any() && false {\n")),
	inTest("TestWantOfChannelsIsToldOnceAndIsNoFailure", change("each further connection is told", "connections.go",
		" && !b.of.overflowed\n", "\n")),
	inTest("TestWantOfChannelsIsToldOnceAndIsNoFailure", change("want of channels is a failure", "consumer.go",
		"\tcase moved && errors.Is(err, amqp.ErrChannelMax):", "\tcase false:")),
	inTest("TestPanicInADeadlineOfAUsersConnectionEndsTheConnectionAndNoProcess", change("a panic of a deadline ends the process", "internal/wire/socket.go",
		"\terr = set(s.conn, t)\n", "\treturned = true\n\terr = set(s.conn, t)\n")),
	inTest("TestQueueThatIsLeftOnABusyConnectionDisturbsNobody", change("the delete of a queue counts time where data may be in the way", "consumer.go",
		"s.conn.socket.WithSilence(context.WithoutCancel(s.ctx), s.config.closeTimeout, errCloseTimeout)",
		"context.WithTimeoutCause(context.WithoutCancel(s.ctx), s.config.closeTimeout, errCloseTimeout)")),
	inTest("TestTopologyThatNamesAnotherQueueLeavesNoneOnASharedConnection", change("a topology leaves its queues behind on a shared connection", "topology.go",
		"\ts.dropOrphans(err)\n", "")),
	inTest("TestErrorOfAConsumerWithoutANameOfItsQueueNamesTheTag", change("the error of a queue without a name names nothing", "group.go",
		"\tif c.queue == \"\" && !errors.As(err, new(*SessionError)) {", "\tif false {")),
	inTest("TestStopOfOneConsumerLeavesTheHandlersOfThoseThatHaveMovedAlone", change("who closes a connection does not wait for those who have moved", "connections.go",
		"\td.grace = max(d.grace, left)\n", "")),
	inTest("TestStopOfOneConsumerLeavesTheHandlersOfThoseThatHaveMovedAlone", change("who leaves last waits for the sessions of others", "connections.go",
		"\tmine = left <= 0 || !c.leases.any()\n", "\tmine = true\n")),
	inTest("TestStopOfOneConsumerLeavesTheHandlersOfThoseThatHaveMovedAlone", change("a group does not wait for its connections", "group.go",
		"\trun.connections.await(g.config.closeTimeout)\n", "")),
	inTest("TestConsumerThatJoinsDuringAnOutageDoesNotEndTheGroup", change("a consumer that joins takes a refused login for final", "consumer.go",
		" && !(noConnection(err) && s.borrower.served())", "")),
	inTest("TestTurnOnADeadConnectionIsNotWaitedFor", change("a turn is waited for on a dead connection", "loan.go",
		"\t\tcase <-c.end.Done():\n\t\tcase <-c.retiring.Done():\n", "")),
	inTest("TestErrorOfAStopIsToldWhoeverAsksLater", change("the error of a Stop is lost with its caller", "consumer.go",
		"\tcase c.grouped: // nobody else is told\n", "\tcase c.grouped && false:\n")),
	inTest("TestFailureOfAConsumerThatSharesWithNobodyIsToldOnce", change("the group tells what is a consumer's own", "connections.go",
		"\tif concernsAll && !f.final {\n", "\tif !f.final {\n")),
	inTest("TestConsumerKeptApartDoesNotComeBackForWantOfAConnection", change("who ends connections comes back for want of one", "consumer.go",
		"\t\ts.strikes > 1 && now.Sub(s.struck) < trustedAfter,\n", "")),
	inTest("TestConsumerKeptApartDoesNotComeBackForWantOfAConnection", change("who ended connections is never let back", "consumer.go",
		"s.strikes > 1 && now.Sub(s.struck) < trustedAfter,", "s.strikes > 1,")),
	inTest("TestExclusiveQueueIsNotLockedOutByTheConnectionItsConsumerHasLeft", change("who is kept apart leaves its queue behind", "consumer.go",
		"\tif names := s.left(); names.any() {\n", "\tif names := s.left(); names.any() && false {\n")),
	inTest("TestExclusiveQueueOfATopologyFuncIsNotLockedOutByTheConnectionItsConsumerHasLeft", change("nobody knows that a function has declared an exclusive queue", "loan.go",
		"\t\tclaim.Report(queues)\n", "")),
	inTest("TestQueueOfATopologyFuncIsNotLeftBehindAfterAStall", change("who leaves a connection that is to go leaves its queue behind", "consumer.go",
		"!s.consumer.grouped || !s.conn.stands() ||", "!s.consumer.grouped || !s.conn.alive() ||")),
	inTest("TestQueueThatATopologyFuncCouldNotDeclareIsNotDeleted", change("what could not be declared is deleted", "internal/wire/queues.go",
		"\t\td.of.forget(name)\n", "\t\td.of.add(name, false)\n")),
	inTest("TestQueueOfATopologyFuncStaysWhileAnotherConsumesFromIt", change("a queue that another consumes from is deleted", "loan.go",
		"!isAlone(of, name), false, false", "false, false, false")),
	inTest("TestQueueOfItsConnectionGoesWithAConsumerWhoseChannelHasEnded", change("who has lost its channel leaves its queue behind", "consumer.go",
		"\tif !waits {\n\t\tlimit", "\tif !waits {\n\t\treturn\n\t}\n\tif !waits {\n\t\tlimit")),
	inTest("TestQueueThatTheBrokerNamesTooLateIsNotLeftBehind", change("a name that comes too late is lost", "internal/wire/channel.go",
		"\tn.declares, n.late = nil, n.declares\n", "\tn.declares = nil\n")),
	inTest("TestQueueOfItsConnectionGoesWithAConsumerThatIsStoppedBetweenSessions", change("a Stop between two sessions leaves the queue behind", "consumer.go",
		"\ts.leaveQueuesAtLast(left)\n", "")),
	inTest("TestConsumerThatIsLostAgainAndAgainDoesNotSlowTheOthersDown", change("all dial at the pace of who asks first", "connections.go",
		"\t\twait = k.wait(b.of.config, r, err, now)\n", "")),
	inTest("TestExclusiveQueueOutlivesAFailureOnAConnectionThatIsToGo", change("a connection that is to go ends with a session whose queue goes with it", "loan.go",
		"\tc.leases.kept = true\n", "")),
	inTest("TestExclusiveQueueOutlivesAFailureOnAConnectionThatIsToGo", change("a connection that is to go takes no session of the queue that goes with it", "consumer.go",
		"return s.conn.alive() || s.consumer.grouped && s.owns() && s.conn.stands()", "return s.conn.alive()")),
	inTest("TestConsumerThatIsLostAsItComesBackSharesAgain", change("who is lost as it comes back keeps its own connection", "consumer.go",
		"\tcase s.borrower.hasLeft(s.conn):", "\tcase false:")),
	inTest("TestConnectionForQuestionsIsClosedByWhoLeavesLast", change("a connection for questions outlives who waits for it in vain", "connections.go",
		"\tif last && i.conn != nil {\n", "\tif last && false {\n")),
	inTest("TestConsumerThatIsKeptApartComesBackToAConnectionThatStands", mutant{name: "who is kept apart waits for a connection that nobody uses", edits: []edit{
		{"connections.go", "\t\tif k.conn != nil && !k.full() && (best == nil ||", "\t\tif !k.full() && (best == nil ||"},
		{"connections.go", "\tif best == nil {\n\t\treturn false\n", "\tif best == nil || best.conn == nil {\n\t\treturn false\n"},
	}}),
	inTest("TestSetUpDoesNotWaitForTheCloseOfAChannelThatItHasUsedUp", change("a set-up waits for the close of a channel that it has used up", "session.go",
		"\tdefer s.conn.socket.AfterSilence(limit, max(limit, s.config.setupTimeout), giveUp)()\n", "\t_, _ = limit, giveUp\n")),
	inTest("TestConsumerMovesWhereAChannelThatWasGivenUpIsNotLetGo", change("a set-up waits for a channel that the broker does not let go", "loan.go",
		"if claim.Held() && c.leases.shared() {", "if claim.Held() && false {")),
	inTest("TestQueueThatCannotDelayIsRefusedByName", change("a stream is taken for the queue of a delay", "internal/retryqueue/retryqueue.go",
		`return strings.HasPrefix(reason, inequivalent+typeArg+"'") && strings.HasSuffix(reason, "is 'stream'")`, "return false")),
	inTest("TestQueueThatCannotDelayIsRefusedByName", change("a queue that expires is taken for that of a delay", "internal/retryqueue/retryqueue.go",
		"deadKeyArg, expiresArg}", "deadKeyArg}")),
	inTest("TestAttemptsAreCountedHoweverLittleRoomTheHeadersLeave", change("the header that attempts are counted by is left out of a copy", "transfer.go",
		"exchangeHeader, routingKeyHeader} {", "exchangeHeader, routingKeyHeader, queueHeader} {")),
	inTest("TestHeadersOfACopyLeaveRoomForThoseOfTheBroker", change("the headers of a copy fill the frame", "transfer.go",
		"fit(&p, frameMax-brokerRoom)", "fit(&p, frameMax)")),
	inTest("TestEveryLineOfTheLogIsAsItWas", change("nobody is told that a copy does not tell all", "publisher.go",
		"\tt.tellCut(cut)\n", "_ = cut\n")),
	inTest("TestHeadersWithoutRoomForThoseOfACopyHarmNoOtherMessage", change("a copy is sent in a frame that the broker does not take", "publisher.go",
		"frameMax > 0 && size > frameMax {", "frameMax > 0 && size > 2*frameMax {")),
	inTest("TestErrorThatAnswersDifferentlyEachTimeIsParkedLikeAnyOther", change("an error is asked twice what is inside", "transfer.go",
		"if all := joined.Unwrap(); len(all) > 0 {", "if all := joined.Unwrap(); len(joined.Unwrap()) > 0 {")),
	inTest("TestCopiesThatMayNotBePublishedKeepTheirConnection", change("a refused copy costs the connection of copies", "publisher.go",
		"\t\t\tp.rest(ctx)\n", "")),
	inTest("TestQuestionThatAnotherHostDoesNotAnswerLeavesNothingBehind", change("a question to another host has no limit", "connections.go",
		"defer context.AfterFunc(ctx, func() { c.socket.Kill(causeOf(ctx)) })()", "context.AfterFunc(ctx, func() { c.socket.Kill(causeOf(ctx)) })()")),
	inTest("TestQuestionsToAnotherHostShareAConnection", change("every question to another host dials", "connections.go",
		"defer context.AfterFunc(ctx, func() { c.socket.Kill(causeOf(ctx)) })()", "context.AfterFunc(ctx, func() { c.socket.Kill(causeOf(ctx)) })")),
	inTest("TestPolicyOfAGroupIsSwitchedOffForOneQueue", change("the policy of a group cannot be switched off for one queue", "options.go",
		"\t\t\tc.retry = nil\n", "")),
	inTest("TestQueueThatIsLeftBehindIsDeletedLater", change("a queue that could not be deleted stays, locked", "loan.go",
		"		if left.any() {", "		if left.any() && false {")),
	inTest("TestQueueThatIsLeftBehindIsDeletedLater", change("a queue whose declare was not answered is not left in order", "consumer.go",
		"queues.doubtful = s.config.queue", "queues.doubtful = \"\"")),
	inTest("TestQueueThatIsLockedElsewhereIsLeftAlone", change("a queue that is locked elsewhere costs the others their connection", "loan.go",
		"		if isOthers(err) {", "		if isOthers(err) && false {")),
	inTest("TestNumberOfAChannelWaitsForTheCloseOkBehindAStrayReply", change("a number is used again before its channel.close is confirmed", "internal/wire/channel.go",
		"before.awaited = before.awaited || before.closing && before.channel != nil", "")),
	inTest("TestAnswerOnAChannelThatIsNotOpenEndsTheSocket", change("an answer on a channel that is not open reaches the driver", "internal/wire/channel.go",
		"return method == channelOpenOk", "return true")),
	inTest("TestBusyStreamStaysOnAConnectionThatIsToGo", change("a busy stream leaves at once a connection that is to go", "consumer.go",
		"if !s.session.movesLate() || from.looks == mostLooks {", "if s.session.movesLate() || from.looks == mostLooks {")),
	inTest("TestStreamMovesWithoutADuplicate", change("a busy stream never leaves a connection that is to go", "consumer.go",
		"if !s.session.movesLate() || from.looks == mostLooks {", "if !s.session.movesLate() {")),
	inTest("TestStreamMovesWithoutADuplicate", change("a stream moves under its handlers", "session.go",
		"\tif s.stream == nil || !errors.Is(cause, errMoved) {\n", "\t{\n")),

	// Retry and park.
	change("a failed message is acked before its copy is confirmed", "publisher.go",
		"\tp.begun.Go(func() { p.await(on, t, id, confirmed) })", "\t_ = t.delivery.settle(t.outcome)\n\tp.begun.Go(func() { p.await(on, t, id, confirmed) })"),
	change("a returned copy is taken for safe", "publisher.go",
		"\tcase returned:\n", "\tcase returned && false:\n"),
	change("a negative confirm is taken for a positive one", "publisher.go",
		"\tcase confirmed.Acked():\n", "\tcase confirmed.Acked() || !on.channel.IsClosed():\n"),
	change("copies are not mandatory", "publisher.go",
		"PublishWithDeferredConfirm(\"\", t.to.Name, true,", "PublishWithDeferredConfirm(\"\", t.to.Name, false,"),
	change("copies are published on a connection that consumes", "publisher.go",
		"p.from = newConnections(&own, p.of.stats)", "p.from = p.of"),
	change("a copy that does not arrive puts its message back", "transfer.go",
		"\ts.holds.add(t.delivery, wait, t.again)\n", "\t_, _ = wait, s.holds.add(t.delivery, 0, t.again)\n"),
	inTest("TestConfirmThatIsLostCostsOneCopyMore", change("a confirm that is lost is waited for for ever", "publisher.go",
		"\t\t\ton.lease.giveUp(errNoConfirm)\n", "")),
	change("a queue beside that has gone is not declared again", "publisher.go",
		"\t\t\tp.missing(t.to)\n", ""),
	inTest("TestCopyThatIsReturnedAndCannotBeReadIsParkedAllTheSame", change("only a return that is read tells of a missing queue", "publisher.go",
		"\t\tif !errors.Is(err, errNacked) {\n", "\t\tif errors.As(err, new(*returnedError)) {\n")),
	inTest("TestStopWaitsForTheCopiesOfASessionThatTheBrokerHasCancelled", change("a stop does not wait for the copies of earlier sessions", "consumer.go",
		"\t\ts.awaitRetired(limit.C)\n", "")),
	inTest("TestAlarmThatOnlyCopiesUnderWayMeetIsTold", change("an alarm is not told while its copies are under way", "publisher.go",
		"\t\t\t\tp.tellAway(t, away)\n\t\t\t\tlimit", "\t\t\t\tlimit")),
	inTest("TestCopyThatHasFailedOftenWaitsForItsConfirmAsLongAsAnyOther", change("every failure lengthens the wait for a confirm", "publisher.go",
		"p.from.config.setupTimeout, t.unanswered)", "p.from.config.setupTimeout, t.failures)")),
	change("what waits is not refused when the path is away", "publisher.go",
		"\twaiting := p.waiting\n\tp.waiting = nil\n\tp.mu.Unlock()\n\tfor", "\tvar waiting []*transfer\n\tp.mu.Unlock()\n\tfor"),
	{name: "a stop does not wait for copies", edits: []edit{
		{"transfer.go", "\ts.gate.stay()\n", ""},
		{"transfer.go", "\tt.session.transfers.remove(t)\n\tt.session.gate.leave()\n", "\tt.session.transfers.remove(t)\n"},
		{"transfer.go", "\t\tt.session.gate.leave()\n\t\treturn\n", "\t\treturn\n"},
		{"transfer.go", "\t\t_ = t.delivery.Requeue()\n\t\treturn\n\t}\n\tt.start()\n", "\t\t_ = t.delivery.Requeue()\n\t\treturn\n\t}\n\tt.session.gate.leave()\n\tt.start()\n"},
	}},
	change("CC and BCC are kept", "transfer.go",
		"name != \"CC\" && name != \"BCC\" && !strings", "!strings"),
	inTest("TestParkedMessageKeepsItsContentAndItsCause", change("the headers of brokers are kept", "transfer.go",
		" && !strings.HasPrefix(name, \"x-\")", "")),
	inTest("TestParkedMessageOutlivesItsExpiration", change("the expiration is kept", "transfer.go",
		"\t\tReplyTo:         d.ReplyTo,\n", "\t\tReplyTo:         d.ReplyTo,\n\t\tExpiration:      d.Expiration,\n")),
	change("the user is kept", "transfer.go",
		"\t\tReplyTo:         d.ReplyTo,\n", "\t\tReplyTo:         d.ReplyTo,\n\t\tUserId:          d.UserId,\n"),
	change("an attempt is not counted", "transfer.go",
		"headers[attemptHeader] = int32(failed)", "headers[attemptHeader] = int32(failed - 1)"),
	change("an attempt counts twice", "transfer.go",
		"headers[attemptHeader] = int32(failed)", "headers[attemptHeader] = int32(failed + 1)"),
	change("one attempt more than the policy says", "transfer.go",
		"\tif failed < r.Attempts &&", "\tif failed <= r.Attempts && len(r.Delays) > 0 &&"),
	change("every retry waits for the first delay", "transfer.go",
		"i := min(failed, len(r.Delays)) - 1", "i := min(failed, 1) - 1"),
	change("a delay counts seconds for milliseconds", "internal/retryqueue/retryqueue.go",
		"ttlArg: d.Milliseconds()", "ttlArg: int64(d.Seconds())"),
	change("a message that is given up is discarded though it can be parked", "transfer.go",
		"\t\treturn verdict{outcome: Discarded, last: true}\n\t}\n\treturn verdict{outcome: Parked, to: s.destinations.park, last: true}", "\t\treturn verdict{outcome: Discarded, last: true}\n\t}\n\treturn verdict{outcome: Discarded, last: true}"),
	change("what a handler asks for does not count under a policy", "transfer.go",
		"\tcase !explicit:\n", "\tcase !explicit || asked.outcome == Requeued:\n"),
	change("a delayed message counts as acked, too", "session.go",
		"\ts.stats.outcomes[o].Add(1)\n", "\ts.stats.outcomes[o].Add(1)\n\tif o == Delayed {\n\t\ts.stats.outcomes[Acked].Add(1)\n\t}\n"),
	change("every copy that does not arrive is told", "transfer.go",
		"t.session.notices.transfer.allow(tellAgain)", "t.session.notices.transfer.allow(0)"),
	inTest("TestNothingIsAckedBeforeItsCopyIsConfirmed", change("an alarm is not heard", "publisher.go",
		"\t\tif p.conn == c {\n", "\t\tif false {\n")),
	inTest("TestFailedMessageComesBackAfterItsDelays", change("a message comes back as from the default exchange", "transfer.go",
		"\t\t\t\td.Exchange = exchange\n", "\t\t\t\t_ = exchange\n")),
	inTest("TestNoMoreCopiesAreInFlightThanTheirAnswersHaveRoomFor", change("any number of copies is in flight", "publisher.go",
		"p.inFlight >= mostInFlight, p.inFlight > 0", "p.inFlight > 0")),
	inTest("TestParkQueueThatSomebodyElseDeclaresMeanwhileIsUsed", change("a park queue that somebody else declares meanwhile is refused", "internal/retryqueue/retryqueue.go",
		"{args: args}, {passive: true}}}", "{args: args}}}")),
	inTest("TestCopyOfASessionThatIsLostIsNotSent", change("copies of a lost session are sent", "publisher.go",
		"\tif t.session.closed.Load() { // the broker delivers it again", "\tif false { // the broker delivers it again")),
	inTest("TestErrorThatCannotBeReadLaterEndsNoProcess", mutant{name: "the error of a failed message is read when its copy is sent", edits: []edit{
		{"transfer.go", "\tkind       string ", "\tcause      error\n\tkind       string "},
		{"transfer.go", "to: v.to, at: time.Now(),", "to: v.to, at: time.Now(), cause: cause,"},
		{"transfer.go", "headers[errorHeader] = t.text", "headers[errorHeader] = t.cause.Error()"},
	}}),
	inTest("TestCopyHasTheBodyAsItCameThoughTheHandlerReturnedNil", change("a refused settlement by hand changes the copy", "transfer.go",
		"failed = err != nil || d.overlooked() != nil", "failed = err != nil")),
	inTest("TestMessageThatIsSettledByHandWhileItsCopyWaitsIsNotCopied", change("a message settled by hand is copied all the same", "publisher.go",
		"\tif t.delivery.Outcome() != Unsettled { // by hand, meanwhile", "\tif false {")),
	inTest("TestLostConfirmsGiveOneChannelUp", change("each confirm that is lost counts a channel given up", "publisher.go",
		"if !on.givenUp.Swap(true) { // others may wait as long", "if true {")),
	inTest("TestParkQueueThatIsFullForHoursCostsNoSession", change("a copy is tried until the consumer timeout ends the session", "transfer.go",
		"time.Since(t.at)+wait > s.config.consumerTimeout()/2", "time.Since(t.at)+wait < 0")),
	inTest("TestLinesOfAnHourOfParkingInVain", change("lines about copies come as often as those about handlers", "transfer.go",
		"const tellAgain = 5 * time.Minute", "const tellAgain = time.Minute")),
	inTest("TestStopIsInTimeThoughTheConnectionOfCopiesHangs", change("a stop waits for the connection of copies as long as for others", "publisher.go",
		"p.from.await(0)", "p.from.await(p.from.config.closeTimeout)")),
	inTest("TestQueueThatCannotBeDeclaredAgainDisturbsNoOther", change("a queue that may not be declared ends the channel of copies", "publisher.go",
		"\tif err = p.asking.Declare(channel, d); err == nil {", "\tif err = p.asking.Declare(on.channel, d); err == nil {")),
	inTest("TestQueueThatConfirmsNothingDelaysNoOther", change("a queue that confirms nothing takes all places in flight", "publisher.go",
		"\tmostToOne = 32", "\tmostToOne = mostInFlight")),
	inTest("TestOutcomeOfACopyThatAStopLeavesBehindIsTold", change("a copy that is under way as its session is lost is told by nobody", "session.go",
		"\tif s.closed.Load() {\n\t\ts.transfers.release(held)\n\t}\n", "")),
	inTest("TestMessageWhoseCopyCannotBeSentGoesBackUncounted", change("what goes back because its copy cannot be sent is counted", "transfer.go",
		"\t\tk.copied.Store(true)\n", "\t\t_ = k\n")),
}

// TestMutantsMatchTheSource keeps the table from rotting.
func TestMutantsMatchTheSource(t *testing.T) {
	folders := foldersOfTests(t)
	for _, m := range mutants {
		if m.test != "" {
			assert.NotEmpty(t, folders[m.test], "planted bug %q: no package has the test %s, change the table", m.name, m.test)
		}
		for _, e := range m.edits {
			source, err := os.ReadFile(inRoot(e.file))
			require.NoError(t, err)
			assert.Equal(t, 1, strings.Count(string(source), e.old),
				"planted bug %q: this text must be in %s exactly once, change the table:\n%s", m.name, e.file, e.old)
		}
	}
}

var testDeclared = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Z]\w*)\(`)

// foldersOfTests tells in which folder of the module each test is.
func foldersOfTests(t *testing.T) map[string]string {
	folders := make(map[string]string)
	var files []string
	for _, pattern := range []string{"*_test.go", "*/*_test.go", "*/*/*_test.go", "*/*/*/*_test.go"} {
		found, err := filepath.Glob(inRoot(pattern))
		require.NoError(t, err)
		files = append(files, found...)
	}
	for _, path := range files {
		source, err := os.ReadFile(path)
		require.NoError(t, err)
		for _, found := range testDeclared.FindAllSubmatch(source, -1) {
			folders[string(found[1])] = filepath.Dir(path)
		}
	}
	return folders
}

// TestMutants prints a table: which invariant caught which planted bug, and how many seeds that
// took.
func TestMutants(t *testing.T) {
	if *mutantsBuild {
		for _, m := range mutants {
			m.build(t)
		}
		return
	}
	if !*mutantsRun {
		t.Skip("takes minutes; ask for it by -mutants")
	}
	caught, all := 0, 0
	for _, m := range mutants {
		if !strings.Contains(m.name, *mutantsOnly) || *mutantsJudge == "sim" && m.test != "" || *mutantsJudge == "test" && m.test == "" {
			continue
		}
		all++
		r := m.try(t)
		if r.by != "" {
			caught++
		}
		fmt.Printf("| %-55s | %-28s | %5d | %4.0fs |\n", m.name, cmp.Or(r.by, "NOT CAUGHT"), r.seeds, r.took.Seconds())
	}
	require.NotZero(t, all, "no planted bug is called that")
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
	folder := foldersOfTests(t)[cmp.Or(m.test, "TestSim")]
	if folder == "" {
		t.Errorf("planted bug %q: there is no test %s", m.name, m.test)
		return mutantResult{}
	}
	build := exec.Command("go", "test", "-vet=off", "-overlay", m.overlay(t, dir), "-c", "-o", program, ".")
	build.Dir = folder
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
	run.Dir, run.Stdout, run.Stderr = folder, &out, &out
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

// build only builds the library with the bug in it.
func (m *mutant) build(t *testing.T) {
	build := exec.Command("go", "build", "-overlay", m.overlay(t, t.TempDir()), ".", "./internal/wire")
	build.Dir = inRoot(".")
	out, err := build.CombinedOutput()
	assert.NoError(t, err, "planted bug %q does not compile, change the table:\n%s", m.name, out)
}

// overlay writes the changed files and the list of them for the compiler.
func (m *mutant) overlay(t *testing.T, dir string) string {
	files := make(map[string]string)
	for _, e := range m.edits {
		if files[e.file] == "" {
			source, err := os.ReadFile(inRoot(e.file))
			require.NoError(t, err)
			files[e.file] = string(source)
		}
		require.Equal(t, 1, strings.Count(files[e.file], e.old), "%s: %s", m.name, e.old)
		files[e.file] = strings.Replace(files[e.file], e.old, e.new, 1)
	}
	replace := make(map[string]string)
	for name, text := range files {
		original, err := filepath.Abs(inRoot(name))
		require.NoError(t, err)
		replace[original] = filepath.Join(dir, strings.ReplaceAll(name, "/", "+")) // files of two folders may have one name
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
