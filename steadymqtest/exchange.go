package steadymqtest

import (
	"maps"
	"slices"
	"strings"
)

// exchange routes messages to queues and to other exchanges.
type exchange struct {
	name, kind          string
	durable, autoDelete bool
	internal            bool
	args                map[string]any
	bindings            []binding
}

// binding leads to a queue or to an exchange.
type binding struct {
	key      string
	queue    *queue
	exchange *exchange
	args     string // encoded, for comparison
}

func (b *Broker) addExchanges() {
	for name, kind := range map[string]string{"": "direct", "amq.direct": "direct", "amq.fanout": "fanout", "amq.topic": "topic"} {
		b.exchanges[name] = &exchange{name: name, kind: kind, durable: true}
	}
}

func (x *exchange) unbindAll(q *queue) {
	x.bindings = slices.DeleteFunc(x.bindings, func(b binding) bool { return b.queue == q })
}

// matches reports whether a binding takes a routing key.
func (x *exchange) matches(bound, key string) bool {
	switch x.kind {
	case "fanout":
		return true
	case "topic":
		return topicMatches(topicWords(bound), topicWords(key))
	}
	return bound == key
}

// topicWords cuts a key at its dots; the empty key has no word at all.
func topicWords(key string) []string {
	if key == "" {
		return nil
	}
	return strings.Split(key, ".")
}

// topicMatches: * is one word, # is any number of words.
func topicMatches(pattern, words []string) bool {
	switch {
	case len(pattern) == 0:
		return len(words) == 0
	case pattern[0] == "#":
		return topicMatches(pattern[1:], words) || len(words) > 0 && topicMatches(pattern, words[1:])
	case len(words) == 0:
		return false
	}
	return (pattern[0] == "*" || pattern[0] == words[0]) && topicMatches(pattern[1:], words[1:])
}

// route returns the queues that a message goes to, each once.
func (b *Broker) route(m *message) []*queue {
	if m.exchange == "" && len(m.extra) == 0 {
		if q := b.queues[m.key]; q != nil {
			return []*queue{q}
		}
		return nil
	}
	found := b.routeKey(m.exchange, m.key, nil, nil)
	for _, key := range m.extra {
		found = b.routeKey(m.exchange, key, found, nil)
	}
	return found
}

// takeCopies reads the routing keys in the headers CC and BCC. Nobody may see the latter.
func (m *message) takeCopies(p *Message) *refusal {
	if len(p.Headers) == 0 {
		return nil
	}
	for _, name := range []string{"CC", "BCC"} {
		v, ok := p.Headers[name]
		values, isArray := v.([]any)
		if ok && !isArray {
			return refuse(406, "invalid message: {unacceptable_type_in_header,\"%s\",%s}", name, typeName(v))
		}
		m.blind = len(m.extra)
		for _, v := range values {
			if key, ok := v.(string); ok {
				m.extra = append(m.extra, key)
			}
		}
	}
	m.blind = len(m.extra) - m.blind
	if _, ok := p.Headers["BCC"]; ok {
		m.dropHeader(p, "BCC")
	}
	return nil
}

func (m *message) dropHeader(p *Message, name string) {
	p.Headers = maps.Clone(p.Headers)
	delete(p.Headers, name)
	m.props = appendProperties(nil, p)
}

func (b *Broker) routeKey(name, key string, found []*queue, seen []*exchange) []*queue {
	x := b.exchanges[name]
	if x == nil || slices.Contains(seen, x) {
		return found
	}
	if name == "" {
		if q := b.queues[key]; q != nil && !slices.Contains(found, q) {
			found = append(found, q)
		}
		return found
	}
	seen = append(seen, x)
	for _, to := range x.bindings {
		switch {
		case !x.matches(to.key, key):
		case to.exchange != nil:
			found = b.routeKey(to.exchange.name, key, found, seen)
		case !slices.Contains(found, to.queue):
			found = append(found, to.queue)
		}
	}
	return found
}

// The methods of AMQP on exchanges.

func (ch *channel) exchangeDeclare(d *decoder) *refusal {
	d.short()
	x := &exchange{name: d.shortstr(), kind: d.shortstr()}
	bits := d.octet()
	passive, noWait := bits&1 != 0, bits&16 != 0
	x.durable, x.autoDelete, x.internal = bits&2 != 0, bits&4 != 0, bits&8 != 0
	x.args = d.table()
	if !passive && !d.bad {
		if r := ch.may(accessConfigure, "exchange", x.name); r != nil {
			return r
		}
	}
	old := ch.c.b.exchanges[x.name]
	switch {
	case d.bad:
		return nil // reported by the caller
	case passive && old == nil:
		return refuse(404, "no exchange '%s' in vhost '/'", x.name)
	case passive:
	case old != nil:
		if r := old.equivalent(x); r != nil {
			return r
		}
	case strings.HasPrefix(x.name, "amq."):
		return refuse(403, "exchange name '%s' contains reserved prefix 'amq.*'", x.name)
	case x.kind != "direct" && x.kind != "fanout" && x.kind != "topic":
		code := 503
		if ch.c.b.since(4, 0) {
			code = 406
		}
		return refuse(code, "unknown exchange type '%s'", x.kind)
	default:
		ch.c.b.exchanges[x.name] = x
	}
	ch.reply(noWait, exchangeDeclareOk)
	return nil
}

func (x *exchange) equivalent(y *exchange) *refusal {
	differ := func(what string, is, was any) *refusal {
		return refuse(406, "inequivalent arg '%s' for exchange '%s' in vhost '/': received '%v' but current is '%v'", what, x.name, is, was)
	}
	switch {
	case x.kind != y.kind:
		return differ("type", y.kind, x.kind)
	case x.durable != y.durable:
		return differ("durable", y.durable, x.durable)
	case x.autoDelete != y.autoDelete:
		return differ("auto_delete", y.autoDelete, x.autoDelete)
	case x.internal != y.internal:
		return differ("internal", y.internal, x.internal)
	}
	return nil
}

func (ch *channel) exchangeDelete(d *decoder) *refusal {
	d.short()
	name, bits := d.shortstr(), d.octet()
	x := ch.c.b.exchanges[name]
	switch {
	case name == "":
		return refuse(403, "operation not permitted on the default exchange")
	case strings.HasPrefix(name, "amq."):
		return refuse(403, "deletion of system exchange '%s' in vhost '/' not allowed", name)
	case ch.may(accessConfigure, "exchange", name) != nil:
		return ch.may(accessConfigure, "exchange", name)
	case x != nil && bits&1 != 0 && len(x.bindings) > 0:
		return refuse(406, "exchange '%s' in vhost '/' in use", name)
	case x != nil:
		ch.c.b.deleteExchange(x)
	}
	ch.reply(bits&2 != 0, exchangeDeleteOk)
	return nil
}

func (b *Broker) deleteExchange(x *exchange) {
	delete(b.exchanges, x.name)
	for _, other := range b.exchanges {
		other.bindings = slices.DeleteFunc(other.bindings, func(to binding) bool { return to.exchange == x })
	}
}

func (ch *channel) exchangeBind(m method, d *decoder) *refusal {
	d.short()
	destination, source, key := d.shortstr(), d.shortstr(), d.shortstr()
	noWait := d.octet()&1 != 0
	args := string(appendTable(nil, d.table()))
	if r := ch.may(accessWrite, "exchange", destination); r != nil {
		return r
	}
	if r := ch.may(accessRead, "exchange", source); r != nil {
		return r
	}
	from, to := ch.c.b.exchanges[source], ch.c.b.exchanges[destination]
	if from == nil || to == nil {
		name := source
		if from != nil {
			name = destination
		}
		return refuse(404, "no exchange '%s' in vhost '/'", name)
	}
	if m == exchangeUnbind {
		from.unbind(binding{key: key, exchange: to, args: args})
		ch.reply(noWait, exchangeUnbindOk)
		return nil
	}
	from.bind(binding{key: key, exchange: to, args: args})
	ch.reply(noWait, exchangeBindOk)
	return nil
}

func (ch *channel) queueBind(m method, d *decoder) *refusal {
	d.short()
	name, source, key := d.shortstr(), d.shortstr(), d.shortstr()
	noWait := false
	if m == queueBind { // queue.unbind has no such bit
		noWait = d.octet()&1 != 0
	}
	args := string(appendTable(nil, d.table()))
	q, r := ch.findFor(accessWrite, name)
	if r != nil {
		return r
	}
	if r := ch.may(accessRead, "exchange", source); r != nil {
		return r
	}
	x := ch.c.b.exchanges[source]
	switch {
	case x == nil:
		return refuse(404, "no exchange '%s' in vhost '/'", source)
	case source == "":
		return refuse(403, "operation not permitted on the default exchange")
	case m == queueUnbind:
		x.unbind(binding{key: key, queue: q, args: args})
		ch.reply(false, queueUnbindOk)
		return nil
	}
	x.bind(binding{key: key, queue: q, args: args})
	ch.reply(noWait, queueBindOk)
	return nil
}

func (x *exchange) bind(b binding) {
	if !slices.Contains(x.bindings, b) {
		x.bindings = append(x.bindings, b)
	}
}

func (x *exchange) unbind(b binding) {
	x.bindings = slices.DeleteFunc(x.bindings, func(other binding) bool { return other == b })
}

// DeclareExchange makes a durable exchange of kind direct, fanout or topic, at once. One that exists stays as it is.
func (b *Broker) DeclareExchange(name, kind string) {
	b.lock()
	defer b.unlock()
	if b.exchanges[name] == nil {
		b.exchanges[name] = &exchange{name: name, kind: kind, durable: true}
	}
}

// Bind binds a queue to an exchange and reports whether both exist.
func (b *Broker) Bind(queue, exchange, key string) bool {
	b.lock()
	defer b.unlock()
	q, x := b.queues[queue], b.exchanges[exchange]
	if q == nil || x == nil {
		return false
	}
	x.bind(binding{key: key, queue: q, args: string(appendTable(nil, nil))})
	return true
}
