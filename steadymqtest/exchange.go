package steadymqtest

import (
	"slices"
	"strings"
	"time"
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
func (b *Broker) route(m *message, headers map[string]any) []*queue {
	if m.exchange == "" {
		if q := b.queues[m.key]; q != nil && headers == nil {
			return []*queue{q}
		}
	}
	keys := append([]string{m.key}, extraKeys(headers)...)
	var found []*queue
	for _, key := range keys {
		found = b.routeKey(m.exchange, key, found, nil)
	}
	return found
}

// extraKeys are the routing keys in the headers CC and BCC.
func extraKeys(headers map[string]any) []string {
	var keys []string
	for _, name := range []string{"CC", "BCC"} {
		values, _ := headers[name].([]any)
		for _, v := range values {
			if key, ok := v.(string); ok {
				keys = append(keys, key)
			}
		}
	}
	return keys
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

// publishDead sends a message to the dead-letter exchange of the queue it was in. A message that comes back to a queue without
// ever having been rejected is dropped: RabbitMQ breaks such cycles.
func (b *Broker) publishDead(e *entry, reason string) {
	q := e.q
	props, _ := decodeProperties(e.msg.props)
	props.Body = e.msg.body
	props.Headers = deathHeaders(props.Headers, e, reason, b.now)
	if reason == "expired" {
		props.Expiration = ""
	}
	key := e.msg.key
	if q.deadKey != "" {
		key = q.deadKey
	}
	id := e.msg.id
	m := newMessage(&props, q.deadExchange, key)
	m.id = id
	m.delivered, m.acquired = e.carried(reason)
	for _, target := range b.route(m, nil) {
		if !cycles(props.Headers["x-death"], target.name) {
			target.publish(m)
		}
	}
}

// carried is what a dead-lettered message takes along: the deliveries that quorum queues have counted, which stay with it, and since
// 4.3 those of a classic queue, which the next queue is told.
func (e *entry) carried(reason string) (delivered, acquired int) {
	rejected := 0
	if reason == "rejected" {
		rejected = 1
	}
	old := e.msg.delivered
	switch b := e.q.b; {
	case !b.since(4, 0):
		return 0, 0
	case e.q.kind == kindClassic && !b.since(4, 3):
		return old, 0
	case e.q.kind == kindClassic:
		return old, e.acquired + rejected
	case b.since(4, 3):
		return e.failures + rejected, 0
	case reason == "expired" && e.acquired > 0: // one for each queue that it was taken from
		return old + 1, 0
	}
	return old + rejected, 0
}

// cycles reports whether the message has been in this queue before and was never rejected since.
func cycles(deaths any, queue string) bool {
	list, _ := deaths.([]any)
	for _, d := range list {
		death, _ := d.(map[string]any)
		if death["reason"] == "rejected" {
			return false
		}
		if death["queue"] == queue {
			return true
		}
	}
	return false
}

// deathHeaders adds a death to x-death: the latest first, one entry for each queue and reason.
func deathHeaders(headers map[string]any, e *entry, reason string, now time.Time) map[string]any {
	next := make(map[string]any, len(headers)+4)
	for k, v := range headers {
		next[k] = v
	}
	old, _ := headers["x-death"].([]any)
	death := map[string]any{
		"count": int64(1), "reason": reason, "queue": e.q.name, "time": now,
		"exchange": e.msg.exchange, "routing-keys": []any{e.msg.key},
	}
	list := []any{death}
	for _, d := range old {
		before, _ := d.(map[string]any)
		if before["queue"] == e.q.name && before["reason"] == reason {
			n, _ := integer(before["count"])
			death["count"] = int64(n + 1)
			continue
		}
		list = append(list, d)
	}
	next["x-death"] = list
	if _, ok := next["x-first-death-queue"]; !ok {
		next["x-first-death-queue"], next["x-first-death-reason"], next["x-first-death-exchange"] = e.q.name, reason, e.msg.exchange
	}
	if e.q.b.since(3, 13) {
		next["x-last-death-queue"], next["x-last-death-reason"], next["x-last-death-exchange"] = e.q.name, reason, e.msg.exchange
	}
	return next
}

// The methods of AMQP on exchanges.

func (ch *channel) exchangeDeclare(d *decoder) *refusal {
	d.short()
	x := &exchange{name: d.shortstr(), kind: d.shortstr()}
	bits := d.octet()
	passive, noWait := bits&1 != 0, bits&16 != 0
	x.durable, x.autoDelete, x.internal = bits&2 != 0, bits&4 != 0, bits&8 != 0
	x.args = d.table()
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
	q, r := ch.find(name)
	if r != nil {
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
