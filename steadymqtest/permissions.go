package steadymqtest

import (
	"fmt"
	"regexp"
)

// The permissions of RabbitMQ.
const (
	accessConfigure = iota
	accessWrite
	accessRead
)

// permissions are patterns of names, as in rabbitmqctl set_permissions.
type permissions [3]*regexp.Regexp

// access is a permission on a queue or an exchange.
type access struct {
	permission int
	kind, name string
}

// cachedPermissions is how many answers a channel of RabbitMQ remembers.
const cachedPermissions = 12

// SetPermissions says which queues and exchanges a user may configure (declare, delete), write (publish to an exchange, bind a
// queue) and read (consume, get, purge, bind to an exchange): the regular expressions of rabbitmqctl set_permissions, which
// match a part of a name unless they are anchored. "" is nothing, ".*" everything, as before the first call. What a user may not
// do is refused by 403, which closes the channel. The default exchange is called amq.default.
//
// As with RabbitMQ a channel remembers what it was allowed (twelve things): what it has been doing it may go on doing. It panics
// on a pattern that is none.
func (b *Broker) SetPermissions(user, configure, write, read string) {
	var p permissions
	for i, pattern := range []string{configure, write, read} {
		if pattern == "" {
			pattern = "^$"
		}
		compiled, err := regexp.Compile(pattern)
		if err != nil {
			panic(fmt.Sprintf("steadymqtest: SetPermissions: %v", err))
		}
		p[i] = compiled
	}
	b.lock()
	defer b.unlock()
	if b.permissions == nil {
		b.permissions = make(map[string]permissions)
	}
	b.permissions[user] = p
}

// may refuses what the user of the connection has no permission for.
func (ch *channel) may(permission int, kind, name string) *refusal {
	b := ch.c.b
	p, limited := b.permissions[ch.c.user]
	if !limited {
		return nil
	}
	if kind == "exchange" && name == "" {
		name = "amq.default"
	}
	wanted := access{permission, kind, name}
	for _, a := range ch.permitted {
		if a == wanted {
			return nil
		}
	}
	if !p[permission].MatchString(name) {
		word := ""
		if b.since(4, 0) {
			word = [...]string{"configure ", "write ", "read "}[permission]
		}
		return refuse(403, "%saccess to %s '%s' in vhost '/' refused for user '%s'", word, kind, name, ch.c.user)
	}
	if ch.permitted = append(ch.permitted, wanted); len(ch.permitted) > cachedPermissions {
		ch.permitted = ch.permitted[1:]
	}
	return nil
}

// mayDeclare is what queue.declare needs; a passive one needs any permission since 4.3, and none before.
func (ch *channel) mayDeclare(name string, passive bool) *refusal {
	switch {
	case !passive:
		return ch.may(accessConfigure, "queue", name)
	case !ch.c.b.since(4, 3), ch.may(accessRead, "queue", name) == nil, ch.may(accessWrite, "queue", name) == nil:
		return nil
	}
	return ch.may(accessConfigure, "queue", name)
}

// mayDeadLetter is what a new queue with a dead-letter exchange needs besides.
func (ch *channel) mayDeadLetter(name string, args map[string]any) *refusal {
	exchange, ok := args["x-dead-letter-exchange"].(string)
	if !ok {
		return nil
	}
	if r := ch.may(accessRead, "queue", name); r != nil {
		return r
	}
	return ch.may(accessWrite, "exchange", exchange)
}
