package sim_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"time"

	"github.com/steadymq/steadymq"
)

// simFunc is a function of the user's that the library calls.
type simFunc int

const (
	funcDial simFunc = iota
	funcURL
	funcLogin
	funcTopology
	numFuncs
)

// simStray is how it goes wrong.
type simStray int32

const (
	strayNot   simStray = iota
	strayFails          // returns an error
	strayPanics
	strayExits   // runtime.Goexit
	strayHangs   // until its context ends
	strayIgnores // does not look at its context, and does at last what it should
	numStrays
)

var errSimStray = errors.New("a function of the user failed")

// simMoreKinds are faults that most plans have not had from the beginning.
var simMoreKinds = []simKind{
	{
		// One that is cut off when messages wait may be asked itself; else it takes two others.
		name: "cut off", longest: 90 * time.Second, harmless: true, stalls: true,
		on: func(s *sim, f simFault, at faultsOf) {
			if f.dice%2 == 0 {
				s.backlog(f)
			}
			at.CutOff(true)
		},
		off: func(s *sim, f simFault, at faultsOf) { at.CutOff(false) },
	},
	{
		name: "a dependency is away", longest: 3 * time.Minute, common: true, harmless: true,
		on:  func(s *sim, f simFault, at faultsOf) { s.away.Add(1) },
		off: func(s *sim, f simFault, at faultsOf) { s.away.Add(-1) },
	},
	{
		name: "functions go astray", longest: 20 * time.Second, common: true, kick: true, pace: paceHang,
		on: func(s *sim, f simFault, at faultsOf) {
			s.strays[simFunc(f.dice/8)%numFuncs].Store(int32(1 + f.dice%(uint64(numStrays)-1)))
		},
		off: func(s *sim, f simFault, at faultsOf) { s.strays[simFunc(f.dice/8)%numFuncs].Store(0) },
	},
	{
		name: "the issuer fails", longest: time.Minute, common: true, harmless: true, hinders: true,
		needs: (*simPlan).renews,
		on: func(s *sim, f simFault, at faultsOf) {
			s.strays[funcLogin].Store(int32(1 + f.dice%(uint64(numStrays)-1)))
		},
		off: func(s *sim, f simFault, at faultsOf) { s.strays[funcLogin].Store(0) },
	},
}

// stray goes wrong in the way that is in fashion, and is called first in every function of the
// user.
func (c *simPath) stray(ctx context.Context, f simFunc) error {
	switch simStray(c.s.strays[f].Load()) {
	case strayFails:
		return errSimStray
	case strayPanics:
		panic("a function of the user panics")
	case strayExits:
		runtime.Goexit()
	case strayHangs:
		<-ctx.Done()
		return ctx.Err()
	case strayIgnores:
		time.Sleep(c.plan.setup + 2*time.Second)
	}
	return nil
}

// nextURL is what WithURLFunc asks.
func (c *simPath) nextURL(ctx context.Context) (string, error) {
	c.s.work.Add(1)
	defer c.s.work.Done()
	if err := c.stray(ctx, funcURL); err != nil {
		return "", err
	}
	urls := c.s.urls()
	return urls[c.s.rotation.Add(1)%uint64(len(urls))], nil
}

// credentials is what WithCredentials asks. It may not be asked in a hot loop: a minute has
// renewals of the shortest life there is, and those of each connection.
func (c *simPath) credentials(ctx context.Context) (steadymq.Credentials, error) {
	c.s.work.Add(1)
	defer c.s.work.Done()
	most := c.connections()
	tries := most*c.s.plan.hosts*c.plan.connects() + 8*c.tries.recent(c.s.now(), time.Minute)
	if n := c.asks.add(c.s.now(), time.Minute); n > 45*most+tries {
		c.s.judge.violate("I7", "%s asked for credentials %d times within a minute", c.plan.name, n)
	}
	if err := c.stray(ctx, funcLogin); err != nil {
		return steadymq.Credentials{}, err
	}
	fresh := steadymq.Credentials{Username: "sim", Password: c.s.password.Load().(string)}
	switch c.s.plan.login {
	case loginExpires:
		fresh.Expires = time.Now().Add(3*time.Second + time.Duration(c.asks.count()%4)*9*time.Second)
	case loginExpired:
		fresh.Expires = time.Now().Add(-time.Hour)
	case loginFarAway:
		fresh.Expires = time.Now().AddDate(400, 0, 0)
	}
	return fresh, nil
}

// wrap is a middleware: it wraps errors, or panics when a handler is made.
func (c *simConsumer) wrap(next steadymq.Handler) steadymq.Handler {
	if c.breaks.Swap(false) {
		panic("the middleware panics")
	}
	return func(ctx context.Context, d *steadymq.Delivery) error {
		if err := next(ctx, d); err != nil {
			return fmt.Errorf("wrapped: %w", err)
		}
		return nil
	}
}

// brokenRun judges a Run whose middleware has panicked: it ends at once, with the panic.
func (c *simConsumer) brokenRun(run *simRun, err error, now time.Duration) {
	var panicked *steadymq.PanicError
	if !errors.As(err, &panicked) || !strings.Contains(err.Error(), "WithMiddleware") || now != run.start {
		c.s.judge.note("I9", "a middleware of %s panicked, Run returned %v after %v", c.plan.name, err, now-run.start)
	}
}
