package rabbit

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
)

// As is the same broker seen by another user in another virtual host. The node has one owner still: end it with the first Broker.
func (b *Broker) As(user, password, vhost string) *Broker {
	view := *b
	u, err := url.Parse(b.URLFor(user, password, vhost))
	if err != nil {
		panic("rabbit: an address made here does not parse") // without err: it may hold the password
	}
	view.base = *u
	return &view
}

// Call is Eval for hundreds of commands: rabbitmqctl needs a second or two of processor time each, erl_call, which comes with Erlang, a
// few milliseconds. Where there is no erl_call it is Eval.
func (b *Broker) Call(ctx context.Context, expr string) (string, error) {
	node, ok := b.node.(*containerNode)
	if !ok {
		return b.Eval(ctx, expr)
	}
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	out, err := node.erlCall(ctx, guarded(expr))
	if err != nil && strings.Contains(err.Error(), "127") {
		return b.Eval(ctx, expr)
	}
	result, found := strings.CutPrefix(strings.TrimSpace(out), "{ok, ")
	if err != nil || !found {
		return out, fmt.Errorf("rabbit: call %s: %w: %s", expr, errors.Join(err, errors.New("no answer")), out)
	}
	result = strings.TrimSuffix(result, "}")
	if strings.HasPrefix(result, "{error,") || strings.HasPrefix(result, "{failed,") || strings.HasPrefix(result, "{error_string,") {
		return result, fmt.Errorf("rabbit: call %s: %s", expr, result)
	}
	return result, nil
}

// erlCall gives every call a node name of its own, and tries again: a node refuses a name that another call had a moment ago.
func (n *containerNode) erlCall(ctx context.Context, expr string) (out string, err error) {
	const script = `command -v erl_call >/dev/null || exit 127
printf '%s\n' "$1" | erl_call -h "call$$" -c ` + cookie + ` -sname "$RABBITMQ_NODENAME" -e 2>&1`
	for range 5 {
		out, err = n.exec(ctx, "sh", "-c", script, "sh", expr)
		if !strings.Contains(out, "failed to connect") || sleep(ctx, 200*time.Millisecond) != nil {
			break
		}
	}
	return out, err
}

// guarded turns an exception into a value.
func guarded(expr string) string {
	return "try " + strings.TrimSuffix(strings.TrimSpace(expr), ".") + " catch C:R:S -> {failed, C, R, S} end."
}

// Do is Call where the answer does not matter.
func (b *Broker) Do(ctx context.Context, format string, args ...any) error {
	_, err := b.Call(ctx, fmt.Sprintf(format, args...))
	return err
}

const actor = `<<"test">>`

func binary(s string) string { return "<<" + quoteErlang(s) + ">>" }

// The following are rabbitmqctl commands of the same names, by the functions those call on the node.

// NewVhost makes a virtual host that guest may use.
func (b *Broker) NewVhost(ctx context.Context, vhost string) error {
	err := b.Do(ctx, "rabbit_vhost:add(%s, %s)", binary(vhost), actor)
	if err != nil {
		return err
	}
	return b.Permit(ctx, "guest", vhost, ".*", ".*", ".*")
}

// DropVhost removes it with all that is in it.
func (b *Broker) DropVhost(ctx context.Context, vhost string) error {
	return b.Do(ctx, "rabbit_vhost:delete(%s, %s)", binary(vhost), actor)
}

// StopVhost ends the processes of a virtual host and leaves what is in it, as a fault of its message store does.
func (b *Broker) StopVhost(ctx context.Context, vhost string) error {
	return b.Do(ctx, `[Processes] = ets:lookup(rabbit_vhost_sup_sup, %s),
ok = supervisor:terminate_child(rabbit_vhost_sup_sup, element(4, Processes))`, binary(vhost))
}

// StartVhost is restart_vhost. Since 4.0 a broker looks for virtual hosts that are down every half minute, and may be first.
func (b *Broker) StartVhost(ctx context.Context, vhost string) error {
	return b.Do(ctx, `ok = case rabbit_vhost_sup_sup:start_vhost(%s) of
  {ok, _} -> ok;
  {error, {already_started, _}} -> ok;
  Failed -> Failed
end`, binary(vhost))
}

// NewUser makes a user without permissions.
func (b *Broker) NewUser(ctx context.Context, user, password string) error {
	return b.Do(ctx, "rabbit_auth_backend_internal:add_user(%s, %s, %s)", binary(user), binary(password), actor)
}

// DropUser removes it.
func (b *Broker) DropUser(ctx context.Context, user string) error {
	return b.Do(ctx, "rabbit_auth_backend_internal:delete_user(%s, %s)", binary(user), actor)
}

// NewPassword changes a user's password.
func (b *Broker) NewPassword(ctx context.Context, user, password string) error {
	return b.Do(ctx, "rabbit_auth_backend_internal:change_password(%s, %s, %s)", binary(user), binary(password), actor)
}

// Permit sets permissions by regular expressions.
func (b *Broker) Permit(ctx context.Context, user, vhost, configure, write, read string) error {
	return b.Do(ctx, "rabbit_auth_backend_internal:set_permissions(%s, %s, %s, %s, %s, %s)",
		binary(user), binary(vhost), binary(configure), binary(write), binary(read), actor)
}

// Forbid takes the virtual host away from the user.
func (b *Broker) Forbid(ctx context.Context, user, vhost string) error {
	return b.Do(ctx, "rabbit_auth_backend_internal:clear_permissions(%s, %s, %s)", binary(user), binary(vhost), actor)
}

// LimitVhost sets the number of connections a virtual host may have; -1 lifts the limit.
func (b *Broker) LimitVhost(ctx context.Context, vhost string, connections int) error {
	return b.Do(ctx, "rabbit_vhost_limit:parse_set(%s, %s, %s)", binary(vhost), binary(maxConnections(connections)), actor)
}

// LimitUser sets the number of connections a user may have; -1 lifts the limit.
func (b *Broker) LimitUser(ctx context.Context, user string, connections int) error {
	return b.Do(ctx, "rabbit_auth_backend_internal:set_user_limits(%s, %s, %s)", binary(user), binary(maxConnections(connections)), actor)
}

func maxConnections(n int) string { return fmt.Sprintf(`{"max-connections": %d}`, n) }

// PolicyOn sets a policy on the queues whose name matches.
func (b *Broker) PolicyOn(ctx context.Context, vhost, name, pattern, json string) error {
	return b.Do(ctx, "rabbit_policy:parse_set(%s, %s, %s, %s, 0, %s, %s)",
		binary(vhost), binary(name), binary(pattern), binary(json), binary("queues"), actor)
}

// PolicyOff removes it.
func (b *Broker) PolicyOff(ctx context.Context, vhost, name string) error {
	return b.Do(ctx, "rabbit_policy:delete(%s, %s, %s)", binary(vhost), binary(name), actor)
}

// DefaultTimeout changes the consumer timeout for the channels that are opened from now on.
func (b *Broker) DefaultTimeout(ctx context.Context, ms int) error {
	return b.Do(ctx, "application:set_env(rabbit, consumer_timeout, %d)", ms)
}

// CloseNamed closes the connections whose client-provided name begins with prefix, as an operator does, and returns how many.
func (b *Broker) CloseNamed(ctx context.Context, prefix, reason string) (string, error) {
	return b.Call(ctx, fmt.Sprintf(ofConnections+`
[catch rabbit_networking:close_connection(P, %s) || P <- Mine],
length(Mine)`, binary(prefix), quoteErlang(reason)))
}

// AbortNamed makes the processes of such connections fail, as a bug of the broker would, and returns how many there were. They close their
// sockets without a word, and RabbitMQ's sockets linger for no time: the client is sent a RST. A message they do not know does that; to kill
// them would leave the rest of the broker ill (on 4.3 classic queues told no consumer of their deletion any more).
func (b *Broker) AbortNamed(ctx context.Context, prefix string) (string, error) {
	return b.Call(ctx, fmt.Sprintf(ofConnections+`
[P ! a_bug_of_the_broker || P <- Mine],
length(Mine)`, binary(prefix)))
}

// AbortOnly is AbortNamed for the connections whose whole name this is.
func (b *Broker) AbortOnly(ctx context.Context, name string) (string, error) {
	return b.Call(ctx, fmt.Sprintf(ofConnections+`
Only = [P || P <- Mine, [{client_properties, Props}] <- [rabbit_reader:info(P, [client_properties])],
  element(3, lists:keyfind(<<"connection_name">>, 1, Props)) =:= Prefix],
[P ! a_bug_of_the_broker || P <- Only],
length(Only)`, binary(name)))
}

// CrashChannels ends the channel processes of the connections whose client-provided name begins with prefix, as a bug of the broker would.
func (b *Broker) CrashChannels(ctx context.Context, prefix string) (string, error) {
	return b.Call(ctx, fmt.Sprintf(crashChannels, binary(prefix)))
}

const crashChannels = ofConnections + `
[exit(C, a_bug_of_the_broker) || C <- Channels],
length(Channels)`

// ConsumersOf counts the consumers on the node's own connections whose client-provided name begins with prefix, of any kind of queue: a
// passive declare knows no consumers of streams.
func (b *Broker) ConsumersOf(ctx context.Context, prefix string) (string, error) {
	return b.Call(ctx, fmt.Sprintf(ofConnections+`
lists:sum([try [{consumer_count, N}] = rabbit_channel:info(C, [consumer_count]), N catch _:_ -> 0 end || C <- Channels])`, binary(prefix)))
}

// ofConnections finds the channels of connections by name. What ends while it is asked is not there, and makes the lists fail.
const ofConnections = named + `
Again = fun F(List) -> try List() catch error:badarg -> F(List) end end,
Mine = [P || P <- Again(fun rabbit_networking:local_connections/0), Named(P)],
IsMine = fun(C) ->
  try [{connection, P}] = rabbit_channel:info(C, [connection]), lists:member(P, Mine) catch _:_ -> false end
end,
Channels = [C || C <- Again(fun rabbit_channel:list_local/0), IsMine(C)],`
