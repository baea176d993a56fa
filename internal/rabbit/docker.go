package rabbit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/testcontainers/testcontainers-go"
	tcexec "github.com/testcontainers/testcontainers-go/exec"
	tclog "github.com/testcontainers/testcontainers-go/log"
)

const (
	amqpPort  = 5672
	amqpsPort = 5671
	// cookie is the shared secret of cluster nodes; commands use it too. It guards nothing: the nodes live on loopback for one test.
	cookie = "steadymq-test-cookie"
	// ownerLabel names the process a container belongs to, so that a later run can remove what a killed one left behind.
	ownerLabel = "io.steadymq.test.owner"
)

// containerNode is a broker in a container. Its published ports are fixed, so that they are the same after a restart.
type containerNode struct {
	c       testcontainers.Container
	host    string
	port    int
	portTLS int // 0 without Config.TLS

	// ip is the container's own address, "" while it is down: the engine may give the address to another container then, and a client
	// that dials it would log in at a broker that is not its own. It may be another after a start.
	ip atomic.Value
}

// nodeSpec is what differs between a single node and a node of a cluster.
type nodeSpec struct {
	cfg      Config
	image    string
	name     string // the host part of the node's name
	networks []string
	aliases  map[string][]string
}

// findDocker runs one node in a container.
func findDocker(ctx context.Context, cfg Config) (*Broker, error) {
	if err := dockerReady(ctx); err != nil {
		return nil, err
	}
	image, err := imageFor(ctx, cfg.Generation)
	if err != nil {
		return nil, err
	}
	return runNode(ctx, nodeSpec{cfg: cfg, image: image, name: "steadymq"})
}

// runNode starts a container and waits for its broker. A port can be lost to another process between choosing and using it: try again.
func runNode(ctx context.Context, spec nodeSpec) (*Broker, error) {
	var errs []error
	for range 3 {
		node, err := createNode(ctx, spec)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		b := &Broker{Source: "Docker image " + spec.image, node: node, base: url.URL{
			Scheme: "amqp", User: url.UserPassword("guest", "guest"), Host: node.addr(), Path: "/",
		}}
		if err := b.WaitReady(ctx); err != nil {
			text, _ := node.logs(ctx)
			return nil, errors.Join(err, errors.New(tail(text, 2000)), node.close())
		}
		return b, nil
	}
	return nil, errors.Join(errs...)
}

func createNode(ctx context.Context, spec nodeSpec) (*containerNode, error) {
	host, bind := publishedHost()
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	portTLS := 0
	if spec.cfg.TLS != nil {
		if portTLS, err = freePort(); err != nil {
			return nil, err
		}
	}
	req := testcontainers.GenericContainerRequest{
		ContainerRequest: spec.request(bind, port, portTLS),
		Started:          true,
		Logger:           tclog.NewNoopLogger(),
	}
	start := time.Now()
	c, err := testcontainers.GenericContainer(ctx, req)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("rabbit: container: %w", err), terminate(c))
	}
	logf("%s:%d: container of %s up after %v", host, port, spec.image, time.Since(start).Round(time.Millisecond))
	node := &containerNode{c: c, host: host, port: port, portTLS: portTLS}
	node.findIP(ctx)
	return node, nil
}

func (s nodeSpec) request(bind netip.Addr, port, portTLS int) testcontainers.ContainerRequest {
	file := func(path, text string, mode int64) testcontainers.ContainerFile {
		return testcontainers.ContainerFile{Reader: strings.NewReader(text), ContainerFilePath: path, FileMode: mode}
	}
	ports := map[string]any{}
	publish := func(port, at int) {
		ports[fmt.Sprintf("%d/tcp", port)] = []map[string]string{{"HostIp": bind.String(), "HostPort": strconv.Itoa(at)}}
	}
	publish(amqpPort, port)
	if portTLS != 0 {
		publish(amqpsPort, portTLS)
	}
	req := testcontainers.ContainerRequest{
		Image:          s.image,
		Labels:         map[string]string{ownerLabel: owner()},
		Env:            map[string]string{"RABBITMQ_NODENAME": "rabbit@" + s.name},
		ExposedPorts:   slices.Collect(maps.Keys(ports)),
		Networks:       s.networks,
		NetworkAliases: s.aliases,
		Files: []testcontainers.ContainerFile{
			file("/etc/rabbitmq/conf.d/90-steadymq.conf", s.cfg.rabbitConf(strconv.Itoa(amqpPort), strconv.Itoa(amqpsPort), "/etc/rabbitmq"), 0o644),
			file("/etc/rabbitmq/advanced.config", s.cfg.advancedConf(), 0o644),
			file("/var/lib/rabbitmq/.erlang.cookie", cookie, 0o400),
		},
	}
	if len(s.cfg.Plugins) > 0 {
		req.Files = append(req.Files, file("/etc/rabbitmq/enabled_plugins", s.cfg.enabledPlugins(), 0o644))
	}
	for name, text := range s.cfg.tlsFiles() {
		req.Files = append(req.Files, file("/etc/rabbitmq/"+name, string(text), 0o644))
	}
	// The engine makes the host name known on every network of the container. The node's name must be known on the network of the
	// nodes only, where it is an alias, or a cut one would be reached by the other way; its own commands find it on loopback.
	engineConfig(&req.ConfigModifier, map[string]any{"Hostname": s.name + "-host"})
	engineConfig(&req.HostConfigModifier, map[string]any{
		"ExtraHosts":   []string{s.name + ":127.0.0.1"},
		"PortBindings": ports,
		// Erlang sizes tables by this limit: with a container's default of a thousand million a node takes gigabytes.
		"Ulimits": []map[string]any{{"Name": "nofile", "Soft": 8192, "Hard": 8192}},
	})
	return req
}

func (n *containerNode) addr() string    { return net.JoinHostPort(n.host, strconv.Itoa(n.port)) }
func (n *containerNode) addrTLS() string { return net.JoinHostPort(n.host, strconv.Itoa(n.portTLS)) }

func (n *containerNode) direct(_ context.Context, port int) (string, error) {
	ip, _ := n.ip.Load().(string)
	if ip == "" {
		return "", errors.New("the container has none")
	}
	return net.JoinHostPort(ip, strconv.Itoa(port)), nil
}

// findIP asks for the container's address. Where the engine tells none there is no direct way.
func (n *containerNode) findIP(ctx context.Context) {
	ip := ""
	if all, err := n.c.ContainerIPs(ctx); err == nil && len(all) > 0 {
		ip = all[0]
	}
	n.ip.Store(ip)
}

func (n *containerNode) exec(ctx context.Context, args ...string) (string, error) {
	code, out, err := n.c.Exec(ctx, args, tcexec.Multiplexed())
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(out)
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d", code)
	}
	return string(text), err
}

func (n *containerNode) logs(ctx context.Context) (string, error) {
	r, err := n.c.Logs(ctx)
	if err != nil {
		return "", err
	}
	defer func() { _ = r.Close() }()
	text, err := io.ReadAll(r)
	return string(text), err
}

func (n *containerNode) stop(ctx context.Context) error {
	n.ip.Store("")
	// 30 seconds until the engine kills it
	return withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		_, err := engineCall(ctx, cli.ContainerStop, n.c.GetContainerID(), `{"Timeout": 30}`)
		return err
	})
}

func (n *containerNode) start(ctx context.Context) error {
	defer n.findIP(ctx)
	return withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		_, err := engineCall(ctx, cli.ContainerStart, n.c.GetContainerID(), `{}`)
		return err
	})
}

func (n *containerNode) kill(ctx context.Context) error {
	n.ip.Store("")
	return withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		_, err := engineCall(ctx, cli.ContainerKill, n.c.GetContainerID(), `{"Signal": "KILL"}`)
		return err
	})
}

func (n *containerNode) pause(ctx context.Context) error {
	return withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		_, err := engineCall(ctx, cli.ContainerPause, n.c.GetContainerID(), `{}`)
		return err
	})
}

func (n *containerNode) unpause(ctx context.Context) error {
	return withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		_, err := engineCall(ctx, cli.ContainerUnpause, n.c.GetContainerID(), `{}`)
		return err
	})
}

// pid is that of the container's first process, on the machine of the engine.
func (n *containerNode) pid(ctx context.Context) (int, error) {
	state, err := n.c.State(ctx)
	if err != nil {
		return 0, err
	}
	return state.Pid, nil
}

func (n *containerNode) close() error { return terminate(n.c) }

func terminate(c testcontainers.Container) error {
	if c == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return testcontainers.TerminateContainer(c, testcontainers.StopContext(ctx), testcontainers.StopTimeout(0))
}

// dockerReady says whether an engine answers, and prepares this process for it once.
var dockerReady = func() func(context.Context) error {
	var once sync.Once
	var result error
	return func(ctx context.Context) error {
		once.Do(func() { result = prepareDocker(ctx) })
		return result
	}
}()

func prepareDocker(ctx context.Context) (err error) {
	defer func() {
		if r := recover(); r != nil { // testcontainers-go panics where it finds no engine
			err = fmt.Errorf("no Docker engine: %v", r)
		}
	}()
	tclog.SetDefault(tclog.NewNoopLogger())
	disableReaper()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	err = withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		if _, err := engineAsk(ctx, cli.Ping, `{"NegotiateAPIVersion": true}`); err != nil {
			return err
		}
		hostIsHere(cli.DaemonHost())
		removeOrphans(ctx, cli)
		return nil
	})
	if err != nil {
		return fmt.Errorf("no Docker engine: %w", err)
	}
	return nil
}

// disableReaper: testcontainers-go starts a second container, of an image that no local build can stand in for, to remove the first
// when this process dies. Close and removeOrphans do that work here. It reads its settings once, so this comes before its first call.
func disableReaper() {
	if os.Getenv("TESTCONTAINERS_RYUK_DISABLED") == "" {
		_ = os.Setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
	}
}

// hostIsHere corrects testcontainers-go where it takes a sandbox with an engine of its own for a container beside the engine. The
// engine's bridge in our own network namespace tells them apart: then published ports are on loopback.
func hostIsHere(engine string) {
	if os.Getenv("TESTCONTAINERS_HOST_OVERRIDE") != "" || !strings.HasPrefix(engine, "unix:") {
		return
	}
	if _, err := os.Stat("/.dockerenv"); err != nil {
		return
	}
	if _, err := net.InterfaceByName("docker0"); err == nil {
		_ = os.Setenv("TESTCONTAINERS_HOST_OVERRIDE", "127.0.0.1")
	}
}

// publishedHost is where published ports are reached, and the address to bind them to: loopback unless the engine is on another host.
func publishedHost() (string, netip.Addr) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	loopback := netip.MustParseAddr("127.0.0.1")
	provider, err := testcontainers.NewDockerProvider(testcontainers.WithLogger(tclog.NewNoopLogger()))
	if err != nil {
		return loopback.String(), loopback
	}
	defer func() { _ = provider.Close() }()
	host, err := provider.DaemonHost(ctx)
	if err != nil || host == "localhost" || host == loopback.String() {
		return loopback.String(), loopback
	}
	return host, netip.IPv4Unspecified()
}
