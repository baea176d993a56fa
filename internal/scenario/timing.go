package scenario

import (
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
)

// What a scenario takes the time of: noticing that a session is lost, and consuming again.

// AwaitLost waits for one more lost session than there were, holds the time since at against the
// limit, and returns the change of state that told of it.
func (s *Scenario) AwaitLost(were int, at time.Time, limit time.Duration) steadymq.StateChange {
	s.Helper()
	s.Must(limit+5*time.Second, "the loss is noticed", func() bool { return s.LostSessions() > were })
	change := s.losses()[were]
	s.InTime(change.Time.Sub(at), limit, "time to notice")
	return change
}

// Resumed waits until a session that began after at consumes, and holds the time since at against
// the limit.
func (s *Scenario) Resumed(at time.Time, limit time.Duration) {
	s.Helper()
	s.ResumedSince(at, at, limit)
}

// ResumedSince waits until a session that began after lost consumes, and holds the time since
// healed against the limit: a broker accepts before we hear that it does.
func (s *Scenario) ResumedSince(lost, healed time.Time, limit time.Duration) {
	s.Helper()
	var took time.Duration
	s.Must(limit+5*time.Second, "consuming again", func() bool {
		for _, c := range s.History() {
			if c.To == steadymq.Consuming && c.Time.After(lost) {
				took = max(c.Time.Sub(healed), 0)
				return true
			}
		}
		return false
	})
	s.InTime(took, limit, "time to resume")
	s.ResumedAfter = max(took, time.Nanosecond) // zero is "did not have to"
}

// InTime holds a time against its limit. The limit is for a machine that is idle. On a busy one it
// is extended by what the plain driver takes to set up a consumer, on the same path and at the same
// moment.
func (s *Scenario) InTime(took, limit time.Duration, what string) {
	s.Helper()
	if took > limit {
		slack := 3 * s.PlainSetup()
		s.Note("%s %v, limit %v and %v for the load of the machine", what, took.Round(time.Millisecond), limit, slack.Round(time.Millisecond))
		limit += slack
	}
	assert.LessOrEqual(s, took, limit, what)
}

// Timed is when a fault began and when it had happened: a command to the broker takes its time, and
// the fault strikes somewhere within.
func (s *Scenario) Timed(fault func()) (lost, done time.Time) {
	lost = time.Now()
	fault()
	return lost, time.Now()
}

// PlainSetup is how long the driver alone needs now from dial to consume-ok, 0 if it does not get
// there. If the scenario's path is broken, or so slow that it seems to be, the published port of
// the broker shows what the machine is like.
func (s *Scenario) PlainSetup() time.Duration {
	if took := setUpPlain(s.address(), amqp.Config{TLSClientConfig: s.TLS.Clone(), Dial: s.plainDial}); took > 0 {
		return took
	}
	return setUpPlain(s.Broker.URL(), amqp.Config{Dial: amqp.DefaultDial(10 * time.Second)})
}

func setUpPlain(address string, config amqp.Config) time.Duration {
	start := time.Now()
	conn, err := amqp.DialConfig(address, config)
	if err != nil {
		return 0
	}
	defer CloseWithin(conn, time.Second)
	ch, err := conn.Channel()
	if err != nil {
		return 0
	}
	q, err := ch.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		return 0
	}
	if _, err := ch.Consume(q.Name, "", true, true, false, false, nil); err != nil {
		return 0
	}
	return time.Since(start)
}
