package rabbit

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// localNode is a broker process of this machine, with its own port mapper, data directory, cookie and ports on loopback.
type localNode struct {
	programs string // where rabbitmq-server and rabbitmqctl are
	dir      string
	port     int
	portTLS  int
	env      []string
	epmd     *exec.Cmd
	server   *exec.Cmd
	exited   chan struct{}
}

// findLocal runs one node as a process. There is one generation on a machine at most, so it may not be the one asked for.
func findLocal(ctx context.Context, cfg Config) (*Broker, error) {
	programs, err := localPrograms(ctx)
	if err != nil {
		return nil, err
	}
	node, err := newLocalNode(programs, cfg)
	if err != nil {
		return nil, err
	}
	b := &Broker{Source: "rabbitmq-server of this machine", node: node, base: url.URL{
		Scheme: "amqp", User: url.UserPassword("guest", "guest"), Host: node.addr(), Path: "/",
	}}
	if err := node.begin(ctx); err != nil {
		return nil, errors.Join(err, node.close())
	}
	if err := b.WaitReady(ctx); err != nil {
		text, _ := node.logs(ctx)
		return nil, errors.Join(err, errors.New(tail(text, 2000)), node.close())
	}
	if g := cfg.Generation; g != Any && !strings.HasPrefix(b.version, string(g)+".") {
		return nil, errors.Join(fmt.Errorf("this machine has RabbitMQ %s, not %s", b.version, g), node.close())
	}
	return b, nil
}

// localPrograms finds the broker's own scripts. Debian's wrappers of the same names insist on root and on the system's one broker.
func localPrograms(ctx context.Context) (string, error) {
	if dir := lookPrograms(); dir != "" {
		return dir, nil
	}
	if err := installPackage(ctx, "rabbitmq-server"); err != nil {
		return "", err
	}
	if dir := lookPrograms(); dir != "" {
		return dir, nil
	}
	return "", errors.New("rabbitmq-server is installed but not found")
}

func lookPrograms() string {
	dirs := []string{"/usr/lib/rabbitmq/bin", "/opt/homebrew/sbin", "/usr/local/sbin"}
	if path, err := exec.LookPath("rabbitmq-server"); err == nil {
		dirs = append(dirs, filepath.Dir(path))
	}
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(dir, "rabbitmq-server")); err == nil {
			return dir
		}
	}
	return ""
}

func newLocalNode(programs string, cfg Config) (*localNode, error) {
	ports := make([]int, 4)
	for i := range ports {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		ports[i] = port
	}
	dir, err := os.MkdirTemp("", "steadymq-broker-")
	if err != nil {
		return nil, err
	}
	n := &localNode{programs: programs, dir: dir, port: ports[0], portTLS: ports[3]}
	n.env = append(os.Environ(), n.settings(ports[1], ports[2])...)
	err = errors.Join(
		os.WriteFile(filepath.Join(dir, "rabbitmq.conf"), []byte(cfg.rabbitConf(n.addr(), n.addrTLS(), dir)), 0o600),
		os.WriteFile(filepath.Join(dir, "advanced.config"), []byte(cfg.advancedConf()), 0o600),
		os.WriteFile(filepath.Join(dir, "enabled_plugins"), []byte(cfg.enabledPlugins()), 0o600),
		os.WriteFile(filepath.Join(dir, ".erlang.cookie"), []byte(cookie), 0o400),
	)
	for name, text := range cfg.tlsFiles() {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), text, 0o600))
	}
	return n, err
}

func (n *localNode) settings(epmdPort, distPort int) []string {
	in := func(name string) string { return filepath.Join(n.dir, name) }
	return []string{
		"HOME=" + n.dir,
		fmt.Sprintf("RABBITMQ_NODENAME=steadymq-%d@localhost", n.port),
		"RABBITMQ_MNESIA_BASE=" + in("data"),
		"RABBITMQ_LOG_BASE=" + in("log"),
		"RABBITMQ_CONFIG_FILE=" + in("rabbitmq.conf"),
		"RABBITMQ_ADVANCED_CONFIG_FILE=" + in("advanced.config"),
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + in("enabled_plugins"),
		"RABBITMQ_CONF_ENV_FILE=" + in("none"),
		fmt.Sprintf("RABBITMQ_NODE_PORT=%d", n.port),
		fmt.Sprintf("RABBITMQ_DIST_PORT=%d", distPort),
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}",
		fmt.Sprintf("ERL_EPMD_PORT=%d", epmdPort),
		"ERL_EPMD_ADDRESS=127.0.0.1",
	}
}

// begin starts a port mapper of our own before the node: Erlang would start one as a daemon that nobody ends.
func (n *localNode) begin(ctx context.Context) error {
	n.epmd = exec.Command("epmd")
	n.epmd.Env = n.env
	if err := n.epmd.Start(); err != nil {
		return fmt.Errorf("epmd: %w", err)
	}
	if err := sleep(ctx, 300*time.Millisecond); err != nil {
		return err
	}
	return n.start(ctx)
}

func (n *localNode) addr() string    { return fmt.Sprintf("127.0.0.1:%d", n.port) }
func (n *localNode) addrTLS() string { return fmt.Sprintf("127.0.0.1:%d", n.portTLS) }

func (n *localNode) direct(_ context.Context, port int) (string, error) {
	switch port {
	case amqpPort:
		return n.addr(), nil
	case amqpsPort:
		return n.addrTLS(), nil
	}
	return "", errors.New("it is not open")
}

func (n *localNode) exec(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(n.programs, args[0]), args[1:]...)
	cmd.Env = n.env
	cmd.Dir = n.dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (n *localNode) start(context.Context) error {
	console, err := os.OpenFile(filepath.Join(n.dir, "console"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = console.Close() }()
	n.server = exec.Command(filepath.Join(n.programs, "rabbitmq-server"))
	n.server.Env, n.server.Dir = n.env, n.dir
	n.server.Stdout, n.server.Stderr = console, console
	ownGroup(n.server)
	if err := n.server.Start(); err != nil {
		return err
	}
	n.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		defer close(exited)
		_ = cmd.Wait()
	}(n.server, n.exited)
	return nil
}

func (n *localNode) stop(ctx context.Context) error {
	if err := signalGroup(n.server, sigTerm); err != nil {
		return err
	}
	return n.waitExit(ctx)
}

func (n *localNode) kill(ctx context.Context) error {
	if err := signalGroup(n.server, sigKill); err != nil {
		return err
	}
	return n.waitExit(ctx)
}

func (n *localNode) waitExit(ctx context.Context) error {
	select {
	case <-n.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (n *localNode) pause(context.Context) error   { return signalGroup(n.server, sigStop) }
func (n *localNode) unpause(context.Context) error { return signalGroup(n.server, sigCont) }

func (n *localNode) logs(context.Context) (string, error) {
	text, err := os.ReadFile(filepath.Join(n.dir, "console"))
	return string(text), err
}

func (n *localNode) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var errs []error
	if n.exited != nil {
		select {
		case <-n.exited:
		default:
			errs = append(errs, n.kill(ctx))
		}
	}
	if n.epmd != nil && n.epmd.Process != nil {
		_ = n.epmd.Process.Kill()
		_ = n.epmd.Wait()
	}
	return errors.Join(append(errs, os.RemoveAll(n.dir))...)
}
