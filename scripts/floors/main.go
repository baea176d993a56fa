// Command floors checks that use goes one way, down: from each room of the house to the rooms
// below it, and never back up. It counts by types, not by words: who names a function, a type, a
// variable, a field or a method that stands in another file, uses that file.
//
//	go run ./scripts/floors          # what breaks the order; exit status 1 if anything does
//	go run ./scripts/floors -v       # and every arrow between two rooms, with how much rides on it
//	go run ./scripts/floors -order   # an order of today's rooms with few arrows up
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
)

const module = "github.com/steadymq/steadymq"

// A room is one file, or several that are one thing and may use each other as they like.
type room []string

// rooms are the floors of the root package, the lowest first. A file may use those of its own
// room and of the rooms above it in this list, which stand below it in the house.
var rooms = []room{
	{"doc.go"},
	{"errors.go"},
	{"ack.go", "delivery.go", "guard.go"},
	{"endpoint.go"},
	{"stats.go"},
	{"config.go", "valve.go"},
	{"options.go"},
	{"reconnect.go"},
	{"notify.go", "log.go"},
	{"dial.go"},
	{"connection.go", "loan.go", "connections.go"},
	{"inbox.go"},
	{"stream.go"},
	{"session.go", "topology.go", "hold.go", "order.go", "transfer.go", "publisher.go", "offsets.go"},
	{"probe.go"},
	{"worker.go"},
	{"batch.go"},
	{"consumer.go", "pull.go"},
	{"group.go"},
}

// A rule says what the packages that match must not import, tests apart.
type rule struct {
	packages, not patterns
	why           string
}

var (
	// harness are the packages that hold tests, or what only tests need.
	harness = patterns{"internal/scenario/...", "internal/sim/...", "internal/matrix/...", "internal/rig/..."}

	notHarness = patterns{"./...", "!internal/scenario/...", "!internal/sim/...", "!internal/matrix/...", "!internal/rig/..."}
)

var rules = []rule{
	{patterns{"internal/wire/..."}, patterns{"./...", "!internal/wire/...", "!internal/errtext"}, "the wire names nothing above it"},
	{patterns{"steadymqtest/..."}, patterns{"."}, "the root's tests import the kit"},
	{patterns{"middleware/..."}, patterns{"./...", "!."}, "what the policies do, any user could do: they use what is exported"},
	{patterns{"internal/rabbit/..."}, patterns{"."}, "what starts brokers does not know who consumes from them"},
	{patterns{"internal/faultproxy/..."}, patterns{"."}, "a proxy that used the library could not judge it"},
	{patterns{"internal/router/..."}, patterns{"."}, "a router that used the library could not judge it"},
	{notHarness, harness, "a program must not link what only tests need"},
}

func main() {
	var o options
	flag.BoolVar(&o.all, "v", false, "print every arrow between two rooms")
	flag.BoolVar(&o.order, "order", false, "print an order of the rooms with few arrows up")
	flag.Parse()
	switch err := run(os.Stdout, o); {
	case errors.Is(err, errBroken):
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "floors:", err)
		os.Exit(2)
	}
}

type options struct{ all, order bool }

// errBroken says that the order is broken; what breaks it has been printed.
var errBroken = errors.New("use goes up")

func run(w io.Writer, o options) error {
	l, err := load(".", module+"/...")
	if err != nil {
		return err
	}
	h, err := l.survey(module, rooms)
	if err != nil {
		return err
	}
	if o.all {
		h.printAll(w)
	}
	if o.order {
		h.printOrder(w)
		return nil
	}
	broken := h.report(w)
	wrong, err := l.imports(module, rules)
	if err != nil {
		return err
	}
	wrong = append(wrong, l.idle(module, rules)...)
	for _, s := range wrong {
		fmt.Fprintln(w, s)
	}
	if broken || len(wrong) > 0 {
		return errBroken
	}
	return nil
}
