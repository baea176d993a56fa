package rabbit

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// commandLimit bounds one rabbitmqctl: its Erlang needs a second or two on a busy machine.
const commandLimit = 90 * time.Second

// Ctl runs rabbitmqctl against the node.
func (b *Broker) Ctl(ctx context.Context, args ...string) (string, error) {
	return b.command(ctx, append([]string{"rabbitmqctl"}, args...)...)
}

// QueuesCtl runs rabbitmq-queues against the node.
func (b *Broker) QueuesCtl(ctx context.Context, args ...string) (string, error) {
	return b.command(ctx, append([]string{"rabbitmq-queues"}, args...)...)
}

// Eval runs an Erlang expression on the node. It is the only command that can do several things a fixed time apart.
func (b *Broker) Eval(ctx context.Context, expr string) (string, error) {
	return b.Ctl(ctx, "eval", expr)
}

func (b *Broker) command(ctx context.Context, args ...string) (string, error) {
	if b.node == nil {
		return "", ErrUnsupported
	}
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	out, err := b.node.exec(ctx, args...)
	if err != nil {
		return out, fmt.Errorf("rabbit: %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(out))
	}
	return out, nil
}

func (b *Broker) run(ctx context.Context, args ...string) error {
	_, err := b.Ctl(ctx, args...)
	return err
}

// StopApp stops RabbitMQ and leaves its Erlang node up: clients are told 320, then refused.
func (b *Broker) StopApp(ctx context.Context) error { return b.run(ctx, "stop_app") }

// StartApp starts RabbitMQ again and waits until it accepts AMQP.
func (b *Broker) StartApp(ctx context.Context) error {
	if err := b.run(ctx, "start_app"); err != nil {
		return err
	}
	return b.WaitReady(ctx)
}

// Drain puts the node into maintenance: clients are told 320 and every later dial is refused until Revive.
func (b *Broker) Drain(ctx context.Context) error {
	_, err := b.command(ctx, "rabbitmq-upgrade", "drain")
	return err
}

// Revive ends maintenance.
func (b *Broker) Revive(ctx context.Context) error {
	_, err := b.command(ctx, "rabbitmq-upgrade", "revive")
	return err
}

// CloseAllConnections closes every client connection of the node as an operator does.
func (b *Broker) CloseAllConnections(ctx context.Context, reason string) error {
	return b.run(ctx, "close_all_connections", reason)
}

// CloseConnectionsNamed closes the connections whose client-provided name begins with prefix, times times, gap apart, all in one
// command, and returns how many were closed.
func (b *Broker) CloseConnectionsNamed(ctx context.Context, prefix, reason string, times int, gap time.Duration) (int, error) {
	out, err := b.Eval(ctx, fmt.Sprintf(closeNamed, binary(prefix), quoteErlang(reason), gap.Milliseconds(), times))
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		return 0, fmt.Errorf("rabbit: close connections: answer %q", out)
	}
	return n, nil
}

const closeNamed = named + `
Round = fun(_) ->
  Pids = [P || P <- rabbit_networking:local_connections(), Named(P)],
  [catch rabbit_networking:close_connection(P, %s) || P <- Pids],
  timer:sleep(%d),
  Pids
end,
length(lists:usort(lists:append([Round(I) || I <- lists:seq(1, %d)]))).` // one that is slow to end counts once

// named is a function of a connection's process: is the name its client gave it of this prefix? It asks the process, because the table of
// connections does not hold the name on 3.x. A connection that has not said its name yet, or ends while it is asked, is not meant.
const named = `
Prefix = %s,
Named = fun(Pid) ->
  try rabbit_reader:info(Pid, [client_properties]) of
    [{client_properties, Props}] when is_list(Props) ->
      case lists:keyfind(<<"connection_name">>, 1, Props) of
        {_, _, Name} -> binary:longest_common_prefix([Name, Prefix]) =:= byte_size(Prefix);
        false -> false
      end;
    _ -> false
  catch _:_ -> false
  end
end,`

func quoteErlang(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// QueueCounts is what the broker itself says of a queue.
type QueueCounts struct{ Ready, Unacked, Consumers int }

// QueueCounts asks with rabbitmqctl; unlike Queue it also counts what is delivered and unsettled.
func (b *Broker) QueueCounts(ctx context.Context, vhost, queue string) (QueueCounts, error) {
	out, err := b.Ctl(ctx, "-q", "--no-table-headers", "list_queues", "-p", vhost,
		"name", "messages_ready", "messages_unacknowledged", "consumers")
	if err != nil {
		return QueueCounts{}, err
	}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) == 4 && f[0] == queue {
			ready, _ := strconv.Atoi(f[1])
			unacked, _ := strconv.Atoi(f[2])
			consumers, _ := strconv.Atoi(f[3])
			return QueueCounts{Ready: ready, Unacked: unacked, Consumers: consumers}, nil
		}
	}
	return QueueCounts{}, fmt.Errorf("rabbit: no queue %q in %q: %s", queue, vhost, out)
}

// AddUser makes a user, or changes the password of one that is there.
func (b *Broker) AddUser(ctx context.Context, user, password string) error {
	if err := b.run(ctx, "add_user", user, password); err == nil {
		return nil
	}
	return b.run(ctx, "change_password", user, password)
}

// SetPermissions grants by regular expressions; three empty ones take everything away but the right to connect.
func (b *Broker) SetPermissions(ctx context.Context, vhost, user, configure, write, read string) error {
	return b.run(ctx, "set_permissions", "-p", vhost, user, configure, write, read)
}

// ClearPermissions takes the whole virtual host away from the user.
func (b *Broker) ClearPermissions(ctx context.Context, vhost, user string) error {
	return b.run(ctx, "clear_permissions", "-p", vhost, user)
}

// AddVhost makes a virtual host and opens it to the user.
func (b *Broker) AddVhost(ctx context.Context, vhost, user string) error {
	if err := b.run(ctx, "add_vhost", vhost); err != nil {
		return err
	}
	return b.SetPermissions(ctx, vhost, user, ".*", ".*", ".*")
}

// DeleteVhost removes a virtual host and everything in it.
func (b *Broker) DeleteVhost(ctx context.Context, vhost string) error {
	return b.run(ctx, "delete_vhost", vhost)
}

// SetVhostLimits sets limits by their JSON, for example {"max-connections": 0}.
func (b *Broker) SetVhostLimits(ctx context.Context, vhost, json string) error {
	return b.run(ctx, "set_vhost_limits", "-p", vhost, json)
}

// SetUserLimits sets limits by their JSON, for example {"max-connections": 0}.
func (b *Broker) SetUserLimits(ctx context.Context, user, json string) error {
	return b.run(ctx, "set_user_limits", user, json)
}

// SetPolicy sets a policy on queues.
func (b *Broker) SetPolicy(ctx context.Context, vhost, name, pattern, json string) error {
	return b.run(ctx, "set_policy", "-p", vhost, name, pattern, json, "--apply-to", "queues")
}

// ClearPolicy removes it.
func (b *Broker) ClearPolicy(ctx context.Context, vhost, name string) error {
	return b.run(ctx, "clear_policy", "-p", vhost, name)
}

// SetMemoryWatermark sets the fraction of memory above which publishers are blocked: 0.0001 raises the alarm, 0.6 clears it.
func (b *Broker) SetMemoryWatermark(ctx context.Context, fraction float64) error {
	return b.run(ctx, "set_vm_memory_high_watermark", strconv.FormatFloat(fraction, 'f', -1, 64))
}
