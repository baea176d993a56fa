package rabbit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/testcontainers/testcontainers-go"
	tcnetwork "github.com/testcontainers/testcontainers-go/network"
)

const clusterLimit = 8 * time.Minute

// Cluster is a few nodes on one machine. Clients reach each node through a published port; the nodes reach each other over a second
// network that can be cut without the first. The other way round takes a faultproxy in front of each node: the engine moves a published
// port to whatever network a container has left.
type Cluster struct {
	Nodes   []*Broker
	clients *testcontainers.DockerNetwork
	peers   *testcontainers.DockerNetwork
}

// NewCluster starts a cluster for the test and ends it with the test. It needs Docker: no other source has three nodes.
func NewCluster(t testing.TB, size int, cfg Config) *Cluster {
	t.Helper()
	c, err := findCluster(t.Context(), size, cfg)
	if err != nil {
		missing(t, fmt.Errorf("%w of %d nodes: start Docker: %w", ErrNoBroker, size, err))
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, b := range c.Nodes {
				dumpLogs(t, b)
			}
		}
		if err := c.close(); err != nil {
			t.Errorf("cluster: %v", err)
		}
	})
	return c
}

func findCluster(ctx context.Context, size int, cfg Config) (*Cluster, error) {
	ctx, cancel := context.WithTimeout(ctx, clusterLimit)
	defer cancel()
	if !mayInstall() {
		return nil, errNotAsked
	}
	if err := dockerReady(ctx); err != nil {
		return nil, err
	}
	image, err := imageFor(ctx, cfg.Generation)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	c := &Cluster{}
	if err := c.begin(ctx, size, cfg, image); err != nil {
		return nil, errors.Join(err, c.close())
	}
	logf("cluster of %d nodes of %s after %v", size, image, time.Since(start).Round(time.Millisecond))
	return c, nil
}

func (c *Cluster) begin(ctx context.Context, size int, cfg Config, image string) (err error) {
	labels := tcnetwork.WithLabels(map[string]string{ownerLabel: owner()})
	if c.clients, err = tcnetwork.New(ctx, labels); err != nil {
		return fmt.Errorf("network of the clients: %w", err)
	}
	// Internal: while there is another network it never carries the published ports.
	if c.peers, err = tcnetwork.New(ctx, labels, tcnetwork.WithInternal()); err != nil {
		return fmt.Errorf("network of the peers: %w", err)
	}
	if err := c.boot(ctx, size, cfg, image); err != nil {
		return err
	}
	for _, b := range c.Nodes[1:] {
		if err := joinFirst(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

// boot starts the nodes side by side.
func (c *Cluster) boot(ctx context.Context, size int, cfg Config, image string) error {
	nodes, errs := make([]*Broker, size), make([]error, size)
	var wg sync.WaitGroup
	for i := range size {
		wg.Go(func() {
			nodes[i], errs[i] = runNode(ctx, nodeSpec{
				cfg: cfg, image: image, name: nodeName(i),
				networks: []string{c.clients.Name, c.peers.Name},
				aliases:  map[string][]string{c.peers.Name: {nodeName(i)}},
			})
		})
	}
	wg.Wait()
	for _, b := range nodes {
		if b != nil {
			c.Nodes = append(c.Nodes, b)
		}
	}
	return errors.Join(errs...)
}

func nodeName(i int) string { return fmt.Sprintf("n%d", i+1) }

func joinFirst(ctx context.Context, b *Broker) error {
	for _, args := range [][]string{{"stop_app"}, {"join_cluster", "rabbit@" + nodeName(0)}, {"start_app"}} {
		if err := b.run(ctx, args...); err != nil {
			return err
		}
	}
	return b.WaitReady(ctx)
}

// URLs are the addresses of all nodes.
func (c *Cluster) URLs() []string {
	var urls []string
	for _, b := range c.Nodes {
		urls = append(urls, b.URL())
	}
	return urls
}

// CutPeers takes a node off the network of the nodes. Its clients still reach it. The others notice after Config.NetTick.
func (c *Cluster) CutPeers(ctx context.Context, i int) error {
	id, err := c.containerID(i)
	if err != nil {
		return err
	}
	return withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		_, err := engineCall(ctx, cli.NetworkDisconnect, c.peers.ID, fmt.Sprintf(`{"Container": %q}`, id))
		return err
	})
}

// JoinPeers puts it back.
func (c *Cluster) JoinPeers(ctx context.Context, i int) error {
	id, err := c.containerID(i)
	if err != nil {
		return err
	}
	return withDocker(ctx, func(cli *testcontainers.DockerClient) error {
		_, err := engineCall(ctx, cli.NetworkConnect, c.peers.ID,
			fmt.Sprintf(`{"Container": %q, "EndpointConfig": {"Aliases": [%q]}}`, id, nodeName(i)))
		return err
	})
}

// DeleteReplica takes the replica of a stream off node i of the cluster the broker is part of.
func (b *Broker) DeleteReplica(ctx context.Context, stream string, i int) error {
	_, err := b.command(ctx, "rabbitmq-streams", "delete_replica", stream, "rabbit@"+nodeName(i))
	return err
}

// Running is the names of the nodes that node i believes to be up.
func (c *Cluster) Running(ctx context.Context, i int) (string, error) {
	return c.Nodes[i].Eval(ctx, "lists:sort(rabbit_nodes:list_running()).")
}

// Leader is the index of the node that leads a quorum queue, or hosts a classic one.
func (c *Cluster) Leader(ctx context.Context, via int, vhost, queue string) (int, error) {
	out, err := c.Nodes[via].Eval(ctx, fmt.Sprintf(
		`{ok, Q} = rabbit_amqqueue:lookup(rabbit_misc:r(<<%s>>, queue, <<%s>>)),`+
			`case amqqueue:get_pid(Q) of {_, N} -> N; P -> node(P) end.`, quoteErlang(vhost), quoteErlang(queue)))
	if err != nil {
		return 0, err
	}
	for i := range c.Nodes {
		if out == "rabbit@"+nodeName(i)+"\n" {
			return i, nil
		}
	}
	return 0, fmt.Errorf("rabbit: leader of %q: answer %q", queue, out)
}

func (c *Cluster) containerID(i int) (string, error) {
	node, ok := c.Nodes[i].node.(*containerNode)
	if !ok {
		return "", ErrUnsupported
	}
	return node.c.GetContainerID(), nil
}

func (c *Cluster) close() error {
	var errs []error
	for _, b := range c.Nodes {
		errs = append(errs, b.Close())
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, nw := range []*testcontainers.DockerNetwork{c.clients, c.peers} {
		if nw != nil {
			errs = append(errs, nw.Remove(ctx))
		}
	}
	return errors.Join(errs...)
}
