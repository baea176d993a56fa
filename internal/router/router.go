//go:build linux

package router

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The addresses are from the range for benchmarks (RFC 2544), which no network has: every client and every host is the second address and
// up of a net of its own, and the router is the first.
const (
	clientNet = "198.18.1."
	hostNets  = 2 // the first host's net is 198.18.2.0
	port      = "5672"
	prefix    = "steadymq-test-"
)

// rules are the router's: a connection begins with a SYN of a client, and what belongs to none it remembers is swallowed without a word.
// The chain of faults comes first.
const rules = `
table ip steadymq {
	counter swallowed { }
	counter resets { }
	chain faults { }
	chain forward {
		type filter hook forward priority 0; policy drop;
		jump faults
		ct state established tcp flags & rst == rst oifname "clients" counter name resets
		ct state established accept
		ct state new iifname "clients" tcp flags & (fin | syn | rst | ack) == syn accept
		counter name swallowed drop
	}
	chain output {
		type filter hook output priority 0; policy accept;
		ip protocol icmp drop
	}
}`

// Host is what stands behind the router.
type Host struct {
	PID int // of a process whose network the router is connected to; 0 makes a namespace for the test to listen in
}

// Net is the clients' network, the router and the hosts.
type Net struct {
	name  string
	hosts int
}

// Missing says why there can be no Net on this machine, "" if there can.
var Missing = sync.OnceValue(func() string {
	if os.Geteuid() != 0 {
		return "network namespaces need root"
	}
	for _, program := range []string{"ip", "nft", "ss"} {
		if _, err := exec.LookPath(program); err != nil {
			return "no " + program + " on this machine: install iproute2 and nftables"
		}
	}
	removeOrphans()
	n := newNet(0)
	defer n.close()
	if err := errors.Join(n.begin(nil), n.Forget()); err != nil {
		return "this machine has no network namespaces with a packet filter: " + err.Error()
	}
	return ""
})

// New makes a network that ends with the test; where there can be none it skips the test.
func New(t testing.TB, hosts ...Host) *Net {
	t.Helper()
	if why := Missing(); why != "" {
		t.Skip(why)
	}
	n := newNet(len(hosts))
	t.Cleanup(n.close)
	if err := n.begin(hosts); err != nil {
		t.Fatal(err)
	}
	return n
}

// newNet names the process, so that others know when it has ended, and how many nets it has made.
func newNet(hosts int) *Net {
	return &Net{name: fmt.Sprintf("%s%d-%s-%04x", prefix, os.Getpid(), startTime(os.Getpid()), rand.IntN(1<<16)), hosts: hosts}
}

func (n *Net) client() string    { return n.name + "-client" }
func (n *Net) router() string    { return n.name + "-router" }
func (n *Net) host(i int) string { return fmt.Sprintf("%s-host%d", n.name, i) }

func hostNet(i int) string { return fmt.Sprintf("198.18.%d.", hostNets+i) }

// HostOf is the host that listens at an address, -1 if none does.
func (n *Net) HostOf(addr string) int {
	for i := range n.hosts {
		if n.Addr(i) == addr {
			return i
		}
	}
	return -1
}

// Addr is where a host listens.
func (n *Net) Addr(host int) string { return net.JoinHostPort(hostNet(host)+"2", port) }

// clientIP tells the clients of the one namespace apart.
func clientIP(client int) string { return clientNet + strconv.Itoa(2+client) }

// clients is how many there may be.
const clients = 8

func (n *Net) begin(hosts []Host) error {
	s := script{}
	s.run("ip", "netns", "add", n.router())
	s.run("ip", "netns", "add", n.client())
	s.run("ip", "-n", n.client(), "link", "set", "lo", "up")
	s.wire(n, "clients", n.client(), "router")
	s.run("ip", "-n", n.router(), "addr", "add", clientNet+"1/24", "dev", "clients")
	for i := range clients {
		s.run("ip", "-n", n.client(), "addr", "add", clientIP(i)+"/24", "dev", "router")
	}
	s.run("ip", "-n", n.client(), "route", "add", "198.18.0.0/15", "via", clientNet+"1")
	for i, h := range hosts {
		if h.PID != 0 {
			s.run("ip", "netns", "attach", n.host(i), strconv.Itoa(h.PID))
		} else {
			s.run("ip", "netns", "add", n.host(i))
			s.run("ip", "-n", n.host(i), "link", "set", "lo", "up")
		}
		link := fmt.Sprintf("host%d", i)
		s.wire(n, link, n.host(i), "router")
		s.run("ip", "-n", n.router(), "addr", "add", hostNet(i)+"1/24", "dev", link)
		s.run("ip", "-n", n.host(i), "addr", "add", hostNet(i)+"2/24", "dev", "router")
		s.route(n, i)
	}
	s.nft(n, rules)
	return errors.Join(s.err, enter(n.router(), func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) // of the namespace that asks
	}))
}

// close removes everything: with the router's namespace go its ends of all links, and with them the other ends.
func (n *Net) close() {
	_ = n.Heal()
	for i := range n.hosts {
		_ = exec.Command("ip", "netns", "del", n.host(i)).Run()
	}
	_ = exec.Command("ip", "netns", "del", n.client()).Run()
	_ = exec.Command("ip", "netns", "del", n.router()).Run()
}

// removeOrphans removes what test processes left that were killed.
func removeOrphans() {
	left, _ := filepath.Glob("/run/netns/" + prefix + "*")
	for _, path := range left {
		name := filepath.Base(path)
		owner := strings.Split(strings.TrimPrefix(name, prefix), "-")
		pid, err := strconv.Atoi(owner[0])
		if err != nil || len(owner) < 2 || startTime(pid) == owner[1] {
			continue
		}
		_ = exec.Command("ip", "netns", "del", name).Run()
	}
}

// startTime is field 22 of /proc/<pid>/stat: it keeps a reused process id from looking alive.
func startTime(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	f := strings.Fields(rest)
	if len(f) < 20 {
		return ""
	}
	return f[19]
}

// ---- what the network does ----

// Dialer dials as a client: its sockets are the client's namespace's, and have the client's own address. A userTimeout is the kernel's limit
// on what it sends without an answer (TCP_USER_TIMEOUT); 0 leaves it at the kernel's own, which is a quarter of an hour.
func (n *Net) Dialer(client int, userTimeout time.Duration) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		d := net.Dialer{
			LocalAddr: &net.TCPAddr{IP: net.ParseIP(clientIP(client))},
			Control:   func(_, _ string, c syscall.RawConn) error { return setUserTimeout(c, userTimeout) },
		}
		err = enter(n.client(), func() error {
			conn, err = d.DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
}

// Listen is a host's address, for a broker of this process.
func (n *Net) Listen(host int) (lis net.Listener, err error) {
	err = enter(n.host(host), func() error {
		lis, err = net.Listen("tcp", n.Addr(host))
		return err
	})
	return lis, err
}

// ---- faults ----

// Forget makes the router forget every connection it carries, as after a restart, a failover or a full table: from now on their packets
// are swallowed, in both directions and without a word, while new connections pass.
func (n *Net) Forget() error { return enter(n.router(), flushConnections) }

// DropSYN swallows new connections to a host until Heal.
func (n *Net) DropSYN(host int) error {
	s := script{}
	s.in(n.router(), "nft", "add", "rule", "ip", "steadymq", "faults", "ip", "daddr", hostNet(host)+"2",
		"tcp", "flags", "&", "(syn|ack)", "==", "syn", "counter", "drop")
	return s.err
}

// Vanish takes a host off the network: nothing comes from there any more, no RST, no FIN and no ICMP.
func (n *Net) Vanish(host int) error {
	s := script{}
	s.run("ip", "-n", n.host(host), "link", "set", "router", "down")
	return s.err
}

// Return puts it back.
func (n *Net) Return(host int) error {
	s := script{}
	s.run("ip", "-n", n.host(host), "link", "set", "router", "up")
	s.route(n, host)
	return s.err
}

// Heal ends DropSYN.
func (n *Net) Heal() error {
	s := script{}
	s.in(n.router(), "nft", "flush", "chain", "ip", "steadymq", "faults")
	return s.err
}

// Counts are packets at the router.
type Counts struct {
	Swallowed int // belonged to no connection it remembers
	Resets    int // RSTs it carried to a client
}

// Counts reads the router's counters.
func (n *Net) Counts() (c Counts, err error) {
	for name, into := range map[string]*int{"swallowed": &c.Swallowed, "resets": &c.Resets} {
		s := script{}
		text := s.in(n.router(), "nft", "list", "counter", "ip", "steadymq", name)
		_, rest, _ := strings.Cut(text, "packets ")
		if _, errScan := fmt.Sscan(rest, into); errScan != nil {
			err = errors.Join(err, s.err, fmt.Errorf("router: counter %s: %q", name, text))
		}
	}
	return c, err
}

// ---- what the kernel has ----

// Socket is a line of ss: a TCP socket in the clients' namespace, also one that no process has any more.
type Socket struct {
	State       string // such as ESTAB or FIN-WAIT-1
	Unsent      int    // bytes the peer has not acknowledged
	Local, Peer string
	Owned       bool // by a process
}

// Sockets are a client's, those that listen or wait after a good end (TIME-WAIT) not included.
func (n *Net) Sockets(client int) ([]Socket, error) {
	s := script{}
	text := s.in(n.client(), "ss", "-tnpH", "src", clientIP(client))
	var all []Socket
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		socket := Socket{State: f[0], Local: f[3], Peer: f[4], Owned: strings.Contains(line, "users:")}
		socket.Unsent, _ = strconv.Atoi(f[2])
		all = append(all, socket)
	}
	return all, s.err
}

// ---- commands ----

// script runs commands until the first that fails.
type script struct{ err error }

func (s *script) run(name string, args ...string) string { return s.feed("", name, args...) }

func (s *script) in(ns string, args ...string) string {
	return s.run("ip", append([]string{"netns", "exec", ns}, args...)...)
}

func (s *script) nft(n *Net, text string) {
	s.feed(text, "ip", "netns", "exec", n.router(), "nft", "-f", "-")
}

func (s *script) feed(text, name string, args ...string) string {
	if s.err != nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(text)
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.err = fmt.Errorf("router: %s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out)
}

// wire connects the router's interface link with an interface of another namespace.
func (s *script) wire(n *Net, link, ns, name string) {
	s.run("ip", "-n", n.router(), "link", "add", link, "type", "veth", "peer", "name", name, "netns", ns)
	s.run("ip", "-n", n.router(), "link", "set", link, "up")
	s.run("ip", "-n", ns, "link", "set", name, "up")
}

// route tells a host the way to the clients.
func (s *script) route(n *Net, host int) {
	s.run("ip", "-n", n.host(host), "route", "add", clientNet+"0/24", "via", hostNet(host)+"1")
}
