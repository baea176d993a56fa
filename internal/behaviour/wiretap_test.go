package behaviour_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// wiretap is a dialer that keeps what the client asks for and what it writes.
type wiretap struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu    sync.Mutex
	dials []tappedDial
	conns []*tappedConn
}

// tappedDial is one call of the dialer.
type tappedDial struct {
	network, address string
	limit            time.Duration // until the deadline of its context; 0 for none
}

func (t *wiretap) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	asked := tappedDial{network: network, address: address}
	if at, ok := ctx.Deadline(); ok {
		asked.limit = time.Until(at)
	}
	t.mu.Lock()
	t.dials = append(t.dials, asked)
	t.mu.Unlock()
	conn, err := t.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c := &tappedConn{Conn: conn, tap: t}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conns = append(t.conns, c)
	return c, nil
}

// asked returns the calls of the dialer so far.
func (t *wiretap) asked() []tappedDial {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.dials)
}

// written returns the writes on the n-th connection, counted from 0.
func (t *wiretap) written(n int) []tappedWrite {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n >= len(t.conns) {
		return nil
	}
	return slices.Clone(t.conns[n].writes)
}

// bytes returns all that was written on the n-th connection.
func (t *wiretap) bytes(n int) (all []byte) {
	for _, w := range t.written(n) {
		all = append(all, w.bytes...)
	}
	return all
}

// methods returns the methods on the n-th connection, each as a line of text.
func (t *wiretap) methods(n int) []string { return methodsIn(t.bytes(n)) }

// tappedWrite is one call of Write.
type tappedWrite struct {
	bytes []byte
	at    time.Time
}

type tappedConn struct {
	net.Conn
	tap    *wiretap
	writes []tappedWrite // guarded by the mutex of tap
}

func (c *tappedConn) Write(p []byte) (int, error) {
	c.tap.mu.Lock()
	c.writes = append(c.writes, tappedWrite{slices.Clone(p), time.Now()})
	c.tap.mu.Unlock()
	return c.Conn.Write(p)
}

// methodsIn reads the frames of a client, from its protocol header on or from a frame on.
func methodsIn(b []byte) (lines []string) {
	b = []byte(strings.TrimPrefix(string(b), "AMQP\x00\x00\x09\x01"))
	for len(b) >= 8 {
		end := 8 + int(binary.BigEndian.Uint32(b[3:]))
		if end > len(b) {
			break
		}
		if b[0] == 1 {
			lines = append(lines, methodText(arguments(b[7:end-1])))
		}
		b = b[end:]
	}
	return lines
}

// only returns the lines whose first word is one of kinds.
func only(lines []string, kinds ...string) (found []string) {
	for _, line := range lines {
		kind, _, _ := strings.Cut(line, " ")
		if slices.Contains(kinds, kind) {
			found = append(found, line)
		}
	}
	return found
}

// methodText writes a method as one line: its name and its arguments, of the flags those that are
// set.
func methodText(a arguments) string {
	class, method := a.short(), a.short()
	switch [2]int{class, method} {
	case [2]int{10, 11}:
		properties, mechanism, response := a.table(), a.text(), a.longText()
		if mechanism == "AMQPLAIN" { // a table without its length
			response = tableIn(response)
		} else {
			response = fmt.Sprintf("%q", response)
		}
		return fmt.Sprintf("start-ok properties=%s mechanism=%s response=%s locale=%s", properties, mechanism, response, a.text())
	case [2]int{10, 31}:
		return fmt.Sprintf("tune-ok channel_max=%d frame_max=%d heartbeat=%d", a.short(), a.long(), a.short())
	case [2]int{10, 40}:
		return fmt.Sprintf("open %q", a.text())
	case [2]int{10, 70}:
		return fmt.Sprintf("update-secret %q", a.longText())
	case [2]int{40, 10}:
		a.short()
		return fmt.Sprintf("exchange.declare %q %s", a.text(), a.text()) +
			a.flags("passive", "durable", "auto-delete", "internal", "no-wait") + a.arguments()
	case [2]int{50, 10}:
		a.short()
		return fmt.Sprintf("queue.declare %q", a.text()) +
			a.flags("passive", "durable", "exclusive", "auto-delete", "no-wait") + a.arguments()
	case [2]int{50, 20}:
		a.short()
		return fmt.Sprintf("queue.bind %q to %q key=%q", a.text(), a.text(), a.text()) + a.flags("no-wait") + a.arguments()
	case [2]int{60, 10}:
		return fmt.Sprintf("qos size=%d count=%d", a.long(), a.short()) + a.flags("global")
	case [2]int{60, 20}:
		a.short()
		return fmt.Sprintf("consume %q tag=%s", a.text(), a.text()) +
			a.flags("no-local", "no-ack", "exclusive", "no-wait") + a.arguments()
	case [2]int{60, 80}:
		a.long()
		return fmt.Sprintf("ack %d", a.long()) + a.flags("multiple")
	}
	return fmt.Sprintf("%d.%d", class, method)
}

// arguments reads the arguments of a method, which are taken off its front.
type arguments []byte

func (a *arguments) take(n int) []byte {
	taken := (*a)[:n]
	*a = (*a)[n:]
	return taken
}

func (a *arguments) octet() int       { return int(a.take(1)[0]) }
func (a *arguments) short() int       { return int(binary.BigEndian.Uint16(a.take(2))) }
func (a *arguments) long() int        { return int(binary.BigEndian.Uint32(a.take(4))) }
func (a *arguments) text() string     { return string(a.take(a.octet())) }
func (a *arguments) longText() string { return string(a.take(a.long())) }

func (a *arguments) flags(names ...string) (set string) {
	bits := a.octet()
	for i, name := range names {
		if bits&(1<<i) != 0 {
			set += " " + name
		}
	}
	return set
}

// arguments is the table at the end of many methods, "" if it is empty.
func (a *arguments) arguments() string {
	if t := a.table(); t != "{}" {
		return " " + t
	}
	return ""
}

// table writes a table in the order of its keys, numbers with their type.
func (a *arguments) table() string { return tableIn(a.longText()) }

func tableIn(b string) string {
	inside := arguments(b)
	var all []string
	for len(inside) > 0 {
		all = append(all, inside.text()+"="+inside.value())
	}
	slices.Sort(all)
	return "{" + strings.Join(all, " ") + "}"
}

func (a *arguments) value() string {
	switch kind := a.octet(); kind {
	case 't':
		return fmt.Sprint(a.octet() != 0)
	case 'S':
		return fmt.Sprintf("%q", a.longText())
	case 'F':
		return a.table()
	case 'I':
		return fmt.Sprintf("int32(%d)", int32(a.long()))
	case 'l':
		return fmt.Sprintf("int64(%d)", int64(binary.BigEndian.Uint64(a.take(8))))
	default:
		panic(fmt.Sprintf("a value of type %c", kind))
	}
}
