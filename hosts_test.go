package steadymq

import (
	"syscall"
	"testing"
	"time"

	"github.com/steadymq/steadymq/internal/wire"
	"github.com/stretchr/testify/assert"
)

func threeHosts() *hosts {
	c := defaults("amqp://a/", "q")
	c.urls = append(c.urls, "amqp://b/", "amqp://c/")
	return newHosts(c)
}

// turns returns the next n hosts, and how many of them are fresh.
func (h *hosts) turns(n int, now time.Time) (addresses []string, fresh int) {
	for range n {
		e, f := h.next(now)
		addresses = append(addresses, e.address)
		if f {
			fresh++
		}
	}
	return addresses, fresh
}

func TestHostsAreTriedLastGoodFirstThenShuffled(t *testing.T) {
	now := time.Now()
	second := make(map[string]bool)
	for range 200 {
		h := threeHosts()
		h.worked("b:5672")
		first, _ := h.turns(1, now)
		assert.Equal(t, []string{"b:5672"}, first)
		h.failed("b:5672", at("lost", wire.ErrPeerReset), now)
		others, fresh := h.turns(2, now)
		second[others[0]] = true
		assert.NotEqual(t, others[0], others[1])
		assert.Equal(t, 2, fresh, "both have their turn at once")
		again, fresh := h.turns(1, now)
		assert.Equal(t, []string{"b:5672"}, again, "a new round starts with the last good one")
		assert.Zero(t, fresh)
	}
	assert.Len(t, second, 2, "the others in random order")
}

// reasonsToGoLast are failures after which a host is left alone for a minute.
var reasonsToGoLast = map[string]error{
	"it drains":                 at("lost", said(320, "CONNECTION_FORCED")),
	"it refuses":                at("dial", syscall.ECONNREFUSED),
	"it is no broker":           at("open", &wire.NotAMQPError{First: 'H'}),
	"it fell silent":            at("lost", wire.ErrReadTimeout),
	"it does not finish set-up": at("open", errSetupTimeout),
	"it serves nothing":         at("lost", errStalled),
}

func TestHostThatSaidItClosesRefusedOrFellSilentGoesLastForAMinute(t *testing.T) {
	for reason, err := range reasonsToGoLast {
		t.Run(reason, func(t *testing.T) {
			now := time.Now()
			h := threeHosts()
			h.worked("b:5672")
			h.failed("b:5672", err, now)
			others, _ := h.turns(4, now)
			assert.NotContains(t, others, "b:5672", "those tried before it have another turn")
			last, fresh := h.turns(1, now)
			assert.Equal(t, []string{"b:5672"}, last, "it has a turn all the same: the others may be worse")
			assert.Equal(t, 1, fresh)

			h = threeHosts()
			h.worked("b:5672")
			h.failed("b:5672", err, now)
			first, _ := h.turns(1, now.Add(lastFor))
			assert.Equal(t, []string{"b:5672"}, first, "after the minute it is as good as any")
		})
	}
}

func TestLastGoodHostIsTriedAgainBeforeOneThatFellSilentBeforeIt(t *testing.T) {
	now := time.Now()
	for range 50 {
		c := defaults("amqp://a/", "q")
		c.urls = append(c.urls, "amqp://b/")
		h := newHosts(c)
		h.failed("a:5672", at("lost", wire.ErrWatchdog), now)
		h.turns(1, now)
		h.worked("b:5672")
		h.failed("b:5672", at("lost", wire.ErrPeerReset), now)
		order, fresh := h.turns(2, now)
		assert.Equal(t, []string{"b:5672", "a:5672"}, order)
		assert.Equal(t, 1, fresh, "the second turn of a host is no fresh one")
	}
}

func TestOfHostsThatGoLastTheOneThatFailedFirstHasItsTurnFirst(t *testing.T) {
	now := time.Now()
	h := threeHosts()
	h.worked("b:5672")
	for i, address := range []string{"c:5672", "a:5672", "b:5672"} {
		h.failed(address, at("lost", said(320, "CONNECTION_FORCED")), now.Add(time.Duration(i)*time.Second))
	}
	order, _ := h.turns(3, now.Add(3*time.Second))
	assert.Equal(t, []string{"c:5672", "a:5672", "b:5672"}, order)
}

func TestEveryHostHasItsTurnHoweverTheOthersFail(t *testing.T) {
	now := time.Now()
	h := threeHosts()
	h.failed("a:5672", at("lost", wire.ErrReadTimeout), now)
	turns := make(map[string]int)
	for range 30 {
		order, _ := h.turns(1, now)
		turns[order[0]]++
		if order[0] == "a:5672" {
			h.failed("a:5672", at("dial", syscall.ETIMEDOUT), now)
		}
		now = now.Add(time.Second)
	}
	assert.GreaterOrEqual(t, turns["a:5672"], 9)
	assert.GreaterOrEqual(t, turns["b:5672"], 9)
	assert.GreaterOrEqual(t, turns["c:5672"], 9)
}
