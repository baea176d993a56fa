package replay

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"sync"
	"time"
)

// request and response are one line of JSON each on the control connection.
type request struct {
	Op     string // open, stop, resume, stats, fault, close
	Addr   string
	TLS    bool
	Fault  string
	Outage time.Duration
}

type response struct {
	Addr  string
	Stats Stats
	Err   string
}

// hello is the first line a replay process prints.
type hello struct {
	Control string
	CA      string
}

// Main is the replay process: it serves control connections until its standard
// input ends, so it never outlives whoever started it.
func Main() error {
	config, ca, err := selfSigned()
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	h := &host{config: config, servers: map[string]*Server{}}
	go h.accept(ln)
	if err := json.NewEncoder(os.Stdout).Encode(hello{Control: ln.Addr().String(), CA: ca}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// host keeps the servers of one process by their address.
type host struct {
	config *tls.Config

	mu      sync.Mutex
	servers map[string]*Server
}

func (h *host) accept(ln net.Listener) {
	for {
		nc, err := ln.Accept()
		if err != nil {
			return
		}
		go h.control(nc)
	}
}

func (h *host) control(nc net.Conn) {
	defer nc.Close()
	in, out := json.NewDecoder(bufio.NewReader(nc)), json.NewEncoder(nc)
	for {
		var req request
		if in.Decode(&req) != nil {
			return
		}
		res, err := h.do(req)
		if err != nil {
			res.Err = err.Error()
		}
		if out.Encode(res) != nil {
			return
		}
	}
}

func (h *host) do(req request) (res response, err error) {
	if req.Op == "open" {
		return h.open(req.TLS)
	}
	h.mu.Lock()
	s := h.servers[req.Addr]
	h.mu.Unlock()
	if s == nil {
		return res, fmt.Errorf("replay: no server at %q", req.Addr)
	}
	switch req.Op {
	case "stop":
		s.Stop()
	case "resume":
		s.Resume()
	case "stats":
		res.Stats = s.Stats()
	case "fault":
		err = s.Inject(req.Fault, req.Outage)
	case "close":
		s.Close()
		h.mu.Lock()
		delete(h.servers, req.Addr)
		h.mu.Unlock()
	default:
		err = fmt.Errorf("replay: no operation %q", req.Op)
	}
	return res, err
}

func (h *host) open(secure bool) (res response, err error) {
	var config *tls.Config
	if secure {
		config = h.config
	}
	s, err := Listen(config)
	if err != nil {
		return res, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.servers[s.Addr()] = s
	res.Addr = s.Addr()
	return res, nil
}

// selfSigned makes the certificate of one run; the client gets it as its CA.
func selfSigned() (config *tls.Config, ca string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, "", err
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		return nil, "", err
	}
	ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	pair := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}, ca, nil
}

// Process is a replay server in a process of its own.
type Process struct {
	Control string // address of its control port
	CA      string // PEM certificate of its TLS servers

	cmd   *exec.Cmd
	stdin io.Closer
}

// Start runs the command, whose program must call Main.
func Start(cmd *exec.Cmd) (*Process, error) {
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var h hello
	if err := json.NewDecoder(stdout).Decode(&h); err != nil {
		return nil, errors.Join(fmt.Errorf("replay: no hello: %w", err), stdin.Close(), cmd.Wait())
	}
	return &Process{Control: h.Control, CA: h.CA, cmd: cmd, stdin: stdin}, nil
}

// Close ends the process and waits for it.
func (p *Process) Close() error {
	return errors.Join(p.stdin.Close(), p.cmd.Wait())
}

// Control speaks to a replay process; it belongs to one goroutine.
type Control struct {
	nc  net.Conn
	in  *json.Decoder
	out *json.Encoder
}

// Dial connects to the control port of a replay process.
func Dial(addr string) (*Control, error) {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	return &Control{nc: nc, in: json.NewDecoder(nc), out: json.NewEncoder(nc)}, nil
}

func (c *Control) call(req request) (res response, err error) {
	if err = c.out.Encode(req); err != nil {
		return res, err
	}
	if err = c.in.Decode(&res); err != nil {
		return res, err
	}
	if res.Err != "" {
		err = errors.New(res.Err)
	}
	return res, err
}

// Open starts a server and returns its address.
func (c *Control) Open(secure bool) (addr string, err error) {
	res, err := c.call(request{Op: "open", TLS: secure})
	return res.Addr, err
}

// Stop ends the deliveries of the server; settles are still taken.
func (c *Control) Stop(addr string) error {
	_, err := c.call(request{Op: "stop", Addr: addr})
	return err
}

// Resume begins the deliveries again, to the consumers that are there.
func (c *Control) Resume(addr string) error {
	_, err := c.call(request{Op: "resume", Addr: addr})
	return err
}

// Stats asks what the server has seen.
func (c *Control) Stats(addr string) (Stats, error) {
	res, err := c.call(request{Op: "stats", Addr: addr})
	return res.Stats, err
}

// Fault plays a fault; see Server.Inject for when it returns.
func (c *Control) Fault(addr, fault string, outage time.Duration) error {
	_, err := c.call(request{Op: "fault", Addr: addr, Fault: fault, Outage: outage})
	return err
}

// CloseServer resets the server's connections and forgets it.
func (c *Control) CloseServer(addr string) error {
	_, err := c.call(request{Op: "close", Addr: addr})
	return err
}

// Close ends the control connection; the servers stay.
func (c *Control) Close() error { return c.nc.Close() }
