package matrix_test

import (
	"context"
	"strings"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/scenario"
)

// startCells are logins that the broker refuses, from the first or after a while.
func startCells() []cell {
	return []cell{
		{fault: "wrong password at the start", rows: "5", by: bothWay, test: wrongPassword},
		{fault: "vhost missing at the start", rows: "6", by: bothWay, test: vhostMissing},
		{fault: "vhost forbidden at the start", rows: "6", by: bothWay, test: vhostForbiddenAtStart},
		{fault: "read forbidden at the start", rows: "43", by: bothWay, test: readForbiddenAtStart},
		{fault: "user deleted and made again", rows: "5, 76", by: bothWay, test: userDeleted},
	}
}

// patient is a set-up limit beyond the 3 s after which RabbitMQ ends a refused login in silence.
const patient = 8 * time.Second

// refusedAtOnce holds Run to what a consumer that cannot work has to do: return an error at once
// that says what the broker said.
func (r *trial) refusedAtOnce(reason string) {
	r.Helper()
	r.refusedWithin(scenario.AtOnce, reason)
}

func (r *trial) refusedWithin(limit time.Duration, reason string) {
	r.Helper()
	r.Options = append(r.Options, steadymq.WithSetupTimeout(patient))
	began := time.Now()
	r.Start()
	var err error
	select {
	case err = <-r.Result:
	case <-time.After(5 * patient):
		require.FailNow(r, "Run does not give up")
	}
	took := time.Since(began)
	require.Error(r, err)
	assert.Contains(r, strings.ToLower(err.Error()), reason)
	assert.Contains(r, err.Error(), r.Queue, "the error names the queue")
	r.InTime(took, limit, "time until it is told")
	r.Note("Run tells after %s", inWords(took))
	assert.Zero(r, r.Consumer.Stats().Sessions)
	r.NothingLeft()
	r.AddRow(0)
}

// wrongPassword: a password that a function returns may be about to change, so it is asked for
// three times, 1 s and up to 2 s apart. That of a URL is tried once, see TestRefusedByARealBroker.
func wrongPassword(r *trial) {
	asked := 0
	r.asUser(r.userOf(), func() string { asked++; return "wrong" })
	r.refusedWithin(3*time.Second+scenario.AtOnce, "login")
	assert.Equal(r, 3, asked)
}

func vhostMissing(r *trial) {
	r.Options = append(r.Options, steadymq.WithURLFunc(func(context.Context) (string, error) {
		return r.By(r.Broker.URLFor("guest", "guest", "missing")), nil
	}))
	r.refusedAtOnce("not found")
}

func vhostForbiddenAtStart(r *trial) {
	user := r.userOf()
	r.ok(r.Broker.Forbid(r.Context(), user, r.vhost))
	r.asUser(user, firstPassword)
	r.refusedAtOnce("access to vhost")
}

func readForbiddenAtStart(r *trial) {
	user := r.userOf()
	r.ok(r.Broker.Permit(r.Context(), user, r.vhost, ".*", ".*", "^$"))
	r.asUser(user, firstPassword)
	r.refusedAtOnce("refused for user")
}

// userDeleted: the credentials come from a store that replaces users. The broker ends the
// connections of the old one.
func userDeleted(r *trial) {
	user := r.userOf()
	r.asUser(user, firstPassword)
	r.Options = append(r.Options, steadymq.WithSetupTimeout(patient))
	r.begin()
	at := time.Now()
	r.ok(r.Broker.DropUser(r.Context(), user))
	change := r.AwaitLost(0, at, time.Since(at)+scenario.AtOnce)
	assert.ErrorContains(r, change.Cause, "is deleted")
	r.toldOfLogin(at, 5*time.Second)
	healed := time.Now()
	r.ok(r.Broker.NewUser(r.Context(), user, firstPassword()))
	r.ok(r.Broker.Permit(r.Context(), user, r.vhost, ".*", ".*", ".*"))
	// A refusal may take 3 s, and the next try is the third.
	r.ResumedSince(healed, time.Now(), 4*time.Second+scenario.OperatorPace)
	r.judge()
}

// toldOfLogin waits until a refused login was reported.
func (r *trial) toldOfLogin(since time.Time, limit time.Duration) {
	r.Helper()
	began := time.Now()
	var told time.Time
	r.Must(limit+10*time.Second, "a refused login", func() bool {
		for _, c := range r.History() {
			if c.Cause != nil && c.Time.After(since) && strings.Contains(strings.ToLower(c.Cause.Error()), "login") {
				told = c.Time
				return true
			}
		}
		return false
	})
	r.InTime(told.Sub(began), limit, "time until a refused login is told")
}
