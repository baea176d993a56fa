package scenario

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/steadymq/steadymq/internal/faultproxy"
)

// What the proxy has read on the wire, and what stands in for it where there is none.

// ReadsTheWire says whether the proxy sees acks and deliveries.
func (s *Scenario) ReadsTheWire() bool { return s.Proxy != nil && s.TLS == nil }

// settlements are those of the scenario's consumer, which may share its connection with others.
func (s *Scenario) settlements() []faultproxy.Settlement {
	if s.Proxy == nil {
		return nil
	}
	all := s.Proxy.Log().Settlements()
	if s.group == nil {
		return all
	}
	own := map[faultproxy.Ref]bool{}
	for _, d := range s.deliveries() {
		own[d.Ref] = true
	}
	return slices.DeleteFunc(all, func(x faultproxy.Settlement) bool { return !own[x.Ref] })
}

// deliveries are those of the scenario's queue.
func (s *Scenario) deliveries() []faultproxy.Delivery {
	if s.Proxy == nil {
		return nil
	}
	all := s.Proxy.Log().Deliveries()
	if s.group == nil {
		return all
	}
	return slices.DeleteFunc(all, func(d faultproxy.Delivery) bool { return d.RoutingKey != s.Queue })
}

// Delivered counts what has come from the broker.
func (s *Scenario) Delivered() int {
	if s.ReadsTheWire() {
		return len(s.deliveries())
	}
	return int(s.Consumer.Stats().Delivered)
}

// wire is a line for everything that has passed, but for publishing, in order.
func (s *Scenario) wire() string {
	if s.Proxy == nil {
		return ""
	}
	type line struct {
		at   time.Time
		text string
	}
	var lines []line
	log := s.Proxy.Log()
	for _, m := range log.Methods() {
		lines = append(lines, line{m.At, fmt.Sprintf("%v %d/%d method %d.%d", m.Dir, m.Conn, m.Channel, m.Class, m.Method)})
	}
	for _, d := range log.Deliveries() {
		lines = append(lines, line{d.At, fmt.Sprintf("to client %d/%d delivery %d of %s", d.Conn, d.Channel, d.Tag, d.MessageID)})
	}
	for _, x := range log.Settlements() {
		lines = append(lines, line{x.At, fmt.Sprintf("to broker %d/%d %s %d", x.Conn, x.Channel, x.Verb, x.Tag)})
	}
	slices.SortStableFunc(lines, func(a, b line) int { return a.at.Compare(b.at) })
	var b strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&b, "%s %s\n", l.at.Format("05.000000"), l.text)
	}
	return b.String()
}
