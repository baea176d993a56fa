package behaviour_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// failingWith runs a consumer whose credentials fail every second with what cause says of the
// n-th try.
func failingWith(r *rig.Rig, cause func(n int) string) {
	n := 0
	r.Run(rig.Ack, steadymq.WithBackoff(time.Second, time.Second), steadymq.WithCredentials(func(context.Context) (steadymq.Credentials, error) {
		n++
		return steadymq.Credentials{}, errors.New(cause(n - 1))
	}))
}

func TestNewCauseThatDiffersByAShortNumberIsToldAtOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		var status atomic.Int32
		status.Store(503)
		failingWith(r, func(int) string { return fmt.Sprintf("the vault answered with status %d", status.Load()) })
		r.Wait(40 * time.Second)
		status.Store(401)
		r.Wait(5 * time.Second)
		assert.NotEmpty(r, r.Warnings("status 401"), "a new cause, five seconds later")
	})
}

func TestEachNewCauseIsToldAtOnce(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		words := []string{"one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"}
		failingWith(r, func(n int) string { return "cause " + words[min(n, len(words)-1)] })
		r.Wait(20 * time.Second)
		for _, word := range words {
			assert.NotEmpty(r, r.Warnings("cause "+word), word)
		}
	})
}

func TestCauseThatDiffersInAddressOrLongNumberIsTheSame(t *testing.T) {
	for name, cause := range map[string]func(n int) string{
		"port":    func(n int) string { return fmt.Sprintf("read 10.0.0.7:%d: away", 40000+n) },
		"address": func(n int) string { return fmt.Sprintf("dial 10.0.%d.%d:5672: away", n%200, n%250) },
		"IPv6":    func(n int) string { return fmt.Sprintf("dial [fe80::%x%%eth0]:5672: away", n) },
		"request": func(n int) string { return fmt.Sprintf("request %d: away", 1_000_000+n*1000) },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				failingWith(r, func(n int) string { return cause(n) })
				r.Wait(50 * time.Second)
				assert.LessOrEqual(r, len(r.Warnings("away")), 8, "1st, 2nd, 4th ... of some 100")
			})
		})
	}
}

// What comes in turns is forgotten and new again, in any order.
func TestHourOfCausesInAnyOrderIsAtMost100Lines(t *testing.T) {
	for name, cause := range map[string]func(n int) string{
		"always new":      func(n int) string { return fmt.Sprintf("cause %d", n%1000) },
		"each twice":      func(n int) string { return fmt.Sprintf("cause %d", n/2%1000) },
		"many in turns":   func(n int) string { return fmt.Sprintf("cause %d", n%20) },
		"some in turns":   func(n int) string { return fmt.Sprintf("cause %d", n%5) },
		"each four times": func(n int) string { return fmt.Sprintf("cause %d", n/4%100) },
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				failingWith(r, cause)
				r.Wait(time.Hour)
				assert.LessOrEqual(r, len(r.Log.Lines()), 100)
				assert.Greater(r, len(r.Log.Lines()), 58, "at least one a minute")
			})
		})
	}
}

// Hosts have names that differ in a digit, which is no new cause.
func TestNameOfTheHostMakesNoCause(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		r.Run(rig.Ack, steadymq.WithBackoff(time.Second, time.Second), steadymq.WithDialer(func(_ context.Context, _, address string) (net.Conn, error) {
			host, _, _ := net.SplitHostPort(address)
			return nil, fmt.Errorf("lookup %s: away", host)
		}))
		r.Wait(3 * time.Second)
		assert.Greater(r, len(r.Causes()), 20)
		assert.LessOrEqual(r, len(r.Warnings("away")), 8, "1st, 2nd, 4th ... of some 50")
	}, steadymqtest.WithHosts(8))
}
