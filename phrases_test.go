package steadymq

import (
	"strings"
	"testing"

	"github.com/steadymq/steadymq/internal/wire"
	"github.com/stretchr/testify/assert"
)

// hostile are names of queues, virtual hosts and users that hold what RabbitMQ says, with
// the quotes and ends of its sentences.
var hostile = []string{
	"unlimited",
	"connection limit (5) is reached",
	"x': connection limit (5) is reached",
	"connection refused: node connection limit (5) is reached",
	"x' refused for user 'y': connection limit (5) is reached",
	"in exclusive use", "x in exclusive use", "x' in vhost '/' in exclusive use", "queue 'x' in exclusive use",
	"is down or inaccessible", "x is down or inaccessible", "home node 'x' is down or inaccessible",
	"x process is stopped by supervisor", "x' in vhost '/' process is stopped by supervisor",
	"failed to perform operation on queue 'x'",
	"x does not have a running replica on the local node", "stream queue 'x' does not have a replica on the local node",
	"timed out", "delivery acknowledgement on channel 1 timed out", "delivery tag", "unknown delivery tag 5",
	"no queue 'y'", "no queue 'y' in vhost '/'", "x' has crashed and failed to restart", "...", "x - y", "NOT_FOUND - x", "'", "''",
}

func TestNamesDecideNoClass(t *testing.T) {
	rows := []struct {
		code int
		text string
		want class
	}{
		{403, "ACCESS_REFUSED - access to queue 'QUEUE' in vhost 'VHOST' refused for user 'USER'", classOperator},
		{403, "ACCESS_REFUSED - read access to queue 'QUEUE' in vhost 'VHOST' refused for user 'USER'", classOperator},
		{403, "ACCESS_REFUSED - queue name 'QUEUE' contains reserved prefix 'amq.*'", classOperator},
		{403, "ACCESS_REFUSED - queue 'QUEUE' in vhost 'VHOST' in exclusive use", classLocked},
		{404, "NOT_FOUND - no queue 'QUEUE' in vhost 'VHOST'", classAbsent},
		{404, "NOT_FOUND - no exchange 'QUEUE' in vhost 'VHOST'", classAbsent},
		{404, "NOT_FOUND - home node 'rabbit@a' of durable queue 'QUEUE' in vhost 'VHOST' is down or inaccessible", classNetwork},
		{404, "NOT_FOUND - queue 'QUEUE' in vhost 'VHOST' process is stopped by supervisor", classNetwork},
		{404, "NOT_FOUND - queue 'QUEUE' in vhost 'VHOST' has crashed and failed to restart", classAbsent},
		{404, "NOT_FOUND - failed to perform operation on queue 'QUEUE' in vhost 'VHOST' due to timeout", classNetwork},
		{405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'QUEUE' in vhost 'VHOST'", classLocked},
		{406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'QUEUE' in vhost 'VHOST': received 'false' but current is 'true'", classOperator},
		{406, "PRECONDITION_FAILED - inequivalent arg 'x-dead-letter-exchange' for queue 'q' in vhost 'VHOST': received none but current is the value 'QUEUE' of type 'longstr'", classOperator},
		{406, "PRECONDITION_FAILED - queue 'QUEUE' in vhost 'VHOST' in use", classOperator},
		{406, "PRECONDITION_FAILED - cannot declare queue 'QUEUE': queue limit in vhost 'VHOST' (5) is reached", classOperator},
		{406, "PRECONDITION_FAILED - consumer prefetch count is not set for stream queue 'QUEUE' in vhost 'VHOST'", classOperator},
		{406, "PRECONDITION_FAILED - stream queue 'QUEUE' in vhost 'VHOST' does not have a running replica on the local node", classNetwork},
		{406, "PRECONDITION_FAILED - queue 'queue 'QUEUE' in vhost 'VHOST'' does not have a running replica on the local node", classNetwork},
		{406, "PRECONDITION_FAILED - queue 'queue 'QUEUE' in vhost 'VHOST'' does not have a replica on the local node", classNetwork},
		{530, "NOT_ALLOWED - vhost VHOST not found", classOperator},
		{530, "NOT_ALLOWED - access to vhost 'VHOST' refused for user 'USER'", classOperator},
		{530, "NOT_ALLOWED - access to vhost 'VHOST' refused for user 'USER': connection limit (5) is reached", classLocked},
		{530, "NOT_ALLOWED - access to vhost 'VHOST' refused for user 'USER': connection limit cannot be queried, timeout", classLocked},
		{530, "NOT_ALLOWED - connection refused for user 'USER': user connection limit (5) is reached", classLocked},
		{530, "NOT_ALLOWED - connection refused: node connection limit (5) is reached", classLocked},
		{530, "NOT_ALLOWED - number of channels opened for user 'USER' has reached the maximum allowed user limit of (5)", classLocked},
		{530, "NOT_ALLOWED - number of channels opened on node 'QUEUE' has reached the maximum allowed limit of 5", classLocked},
		{530, "NOT_ALLOWED - number of channels opened (5) has reached the negotiated channel_max (5)", classOperator},
		{530, "NOT_ALLOWED - attempt to reuse consumer tag 'QUEUE'", classOperator},
		{541, "INTERNAL_ERROR - access to vhost 'VHOST' refused for user 'USER': vhost 'VHOST' is down", classOperator},
		{541, "INTERNAL_ERROR - timed out consuming from quorum queue 'QUEUE' in vhost 'VHOST': {x,y}", classOperator},
		{320, "CONNECTION_FORCED - QUEUE", classForced},
	}
	for _, r := range rows {
		for _, name := range append(hostile, "orders") {
			for _, names := range [][3]string{{name, "/", "app"}, {"orders", name, "app"}, {"orders", "/", name}, {name, name, name}} {
				text := strings.NewReplacer("QUEUE", names[0], "VHOST", names[1], "USER", names[2]).Replace(r.text)
				if len(text) >= 255 { // RabbitMQ would cut it
					continue
				}
				assert.Equal(t, r.want, classify(at("open", said(r.code, text))), "%s", text)
			}
		}
	}
}

// cut shortens a text as RabbitMQ does.
func cut(text string) string { return text[:252] + "..." }

func TestTextThatWasCutOffIsTakenForWhatPasses(t *testing.T) {
	long := strings.Repeat("n", 250)
	rows := []struct {
		code int
		text string
		want class
	}{
		{403, "ACCESS_REFUSED - queue '" + long, classLocked},
		{403, "ACCESS_REFUSED - access to queue '" + long, classOperator},
		{404, "NOT_FOUND - no queue '" + long, classAbsent},
		{404, "NOT_FOUND - home node 'rabbit@a' of durable queue '" + long, classNetwork},
		{406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue '" + long, classOperator},
		{406, "PRECONDITION_FAILED - stream queue '" + long, classNetwork},
		{530, "NOT_ALLOWED - vhost " + long, classOperator},
		{530, "NOT_ALLOWED - access to vhost '" + long, classLocked},
	}
	for _, r := range rows {
		assert.Equal(t, r.want, classify(at("open", said(r.code, cut(r.text)))), "%s", r.text)
	}
}

func TestStreamStartsOverOnlyIfItIsGoneItself(t *testing.T) {
	long := strings.Repeat("n", 255)
	rows := []struct {
		stream, text string
		gone         bool
	}{
		{"events", "NOT_FOUND - no queue 'events' in vhost '/'", true},
		{"it's", "NOT_FOUND - no queue 'it's' in vhost '/'", true},
		{long, cut("NOT_FOUND - no queue '" + long), true},
		{"events", "NOT_FOUND - no queue 'other' in vhost '/'", false},
		{"events", "NOT_FOUND - no queue 'events2' in vhost '/'", false},
		{"events", "NOT_FOUND - no exchange 'no queue 'events' in vhost '' in vhost '/'", false},
		{"events", "NOT_FOUND - queue 'no queue 'events'' in vhost '/' has crashed and failed to restart", false},
		{"events", cut("NOT_FOUND - no queue '" + long), false},
	}
	for _, r := range rows {
		p := &position{queue: r.stream, known: true, next: 7}
		p.gone(at("topology", said(404, r.text)))
		assert.Equal(t, r.gone, p.next == 0, "%s", r.text)
	}
	p := &position{queue: "events", known: true, next: 7}
	p.gone(at("topology", said(403, "NOT_FOUND - no queue 'events' in vhost '/'")))
	p.gone(at("topology", wire.ErrPeerReset))
	assert.EqualValues(t, 7, p.next)
}
