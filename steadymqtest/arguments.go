package steadymqtest

import "fmt"

// checkedArguments are the arguments of a queue that a declaration must repeat, in the order in which RabbitMQ looks at them.
func checkedArguments(kind queueKind) []string {
	switch kind {
	case kindQuorum:
		return []string{
			"x-dead-letter-exchange", "x-dead-letter-routing-key", "x-dead-letter-strategy", "x-expires", "x-max-length", "x-max-length-bytes",
			"x-max-in-memory-length", "x-max-in-memory-bytes", "x-overflow", "x-single-active-consumer", "x-queue-type",
			"x-quorum-initial-group-size", "x-delivery-limit", "x-message-ttl", "x-queue-leader-locator", "x-consumer-timeout",
			"x-delayed-retry-type", "x-delayed-retry-min", "x-delayed-retry-max",
		}
	case kindStream:
		return []string{"x-max-length-bytes", "x-queue-type", "x-max-age", "x-stream-max-segment-size-bytes", "x-initial-cluster-size", "x-queue-leader-locator"}
	}
	return []string{
		"x-expires", "x-message-ttl", "x-dead-letter-exchange", "x-dead-letter-routing-key", "x-max-length", "x-max-length-bytes",
		"x-max-priority", "x-overflow", "x-queue-mode", "x-queue-version", "x-single-active-consumer", "x-queue-type",
	}
}

// kindOf reads the kind of a queue that is to be declared.
func kindOf(name string, args map[string]any) (queueKind, *refusal) {
	v, ok := args["x-queue-type"]
	if !ok {
		return kindClassic, nil
	}
	s, isText := v.(string)
	if !isText {
		return "", invalid("x-queue-type", name, unacceptable(v))
	}
	kind := queueKind(s)
	if kind != kindClassic && kind != kindQuorum && kind != kindStream {
		return "", invalid("x-queue-type", name, fmt.Sprintf("\"unsupported queue type '%s'\"", s))
	}
	return kind, nil
}

func invalid(key, queue, why string) *refusal {
	return refuse(406, "invalid arg '%s' for queue '%s' in vhost '/': %s", key, queue, why)
}

func unacceptable(v any) string { return fmt.Sprintf("{unacceptable_type,%s}", typeName(v)) }

// argumentCheck says what is wrong with the value of an argument; empty for nothing.
type argumentCheck struct {
	key   string
	wrong func(v any, args map[string]any) string
}

// argumentChecks are those of RabbitMQ, in its order. What is not among them is not looked at.
var argumentChecks = []argumentCheck{
	{"x-expires", func(v any, _ map[string]any) string {
		n, wrong := wholeNumber(v)
		if wrong == "" && n == 0 {
			return "{value_zero,0}"
		}
		return orElse(wrong, badTime(n))
	}},
	{"x-message-ttl", func(v any, _ map[string]any) string {
		n, wrong := wholeNumber(v)
		return orElse(wrong, badTime(n))
	}},
	{"x-dead-letter-routing-key", func(v any, args map[string]any) string {
		if _, ok := v.(string); !ok {
			return unacceptable(v)
		}
		if args["x-dead-letter-exchange"] == nil {
			return "routing_key_but_no_dlx_defined"
		}
		return ""
	}},
	{"x-dead-letter-strategy", oneOf("invalid_dlx_strategy", "at-most-once", "at-least-once")},
	{"x-max-length", notNegative},
	{"x-max-length-bytes", notNegative},
	{"x-max-priority", notNegative},
	{"x-overflow", oneOf("invalid_overflow", "drop-head", "reject-publish", "reject-publish-dlx")},
	{"x-single-active-consumer", func(v any, _ map[string]any) string {
		if _, ok := v.(bool); !ok {
			return unacceptable(v)
		}
		return ""
	}},
}

// foreignArguments are those that a kind of queue refuses because only others know them. Of what all kinds refuse nobody asks.
func (b *Broker) foreignArguments(kind queueKind) []string {
	switch kind {
	case kindQuorum:
		return []string{"x-max-priority", "x-queue-mode", "x-max-age"}
	case kindClassic:
		foreign := []string{"x-dead-letter-strategy", "x-delivery-limit", "x-quorum-initial-group-size", "x-max-age"}
		if b.since(4, 3) {
			foreign = append(foreign, "x-delayed-retry-type", "x-delayed-retry-min", "x-delayed-retry-max")
		}
		return foreign
	}
	return nil // a stream refuses most, which nobody has written down here
}

// badArgument refuses a new queue for one of its arguments: first for their values, then for what the kind does not know.
func (b *Broker) badArgument(name string, kind queueKind, args map[string]any) *refusal {
	if v, ok := args["x-dead-letter-exchange"]; ok {
		if _, isText := v.(string); !isText {
			return refuse(406, "invalid type '%s' for arg 'x-dead-letter-exchange' in queue '%s' in vhost '/'", typeName(v), name)
		}
	}
	foreign := b.foreignArguments(kind)
	isForeign := make(map[string]bool, len(foreign))
	for _, key := range foreign {
		isForeign[key] = true
	}
	for _, c := range argumentChecks {
		v, ok := args[c.key]
		if !ok || isForeign[c.key] {
			continue
		}
		if why := c.wrong(v, args); why != "" {
			return invalid(c.key, name, why)
		}
	}
	for _, key := range foreign {
		if _, ok := args[key]; ok {
			return refuse(406, "invalid arg '%s' for queue '%s' in vhost '/' of queue type rabbit_%s_queue", key, name, kind)
		}
	}
	return nil
}

// wholeNumber reads a number, or says what is wrong.
func wholeNumber(v any) (n int, wrong string) {
	n, ok := integer(v)
	if !ok {
		wrong = fmt.Sprintf("\"expected integer, got %s\"", typeName(v))
	}
	return n, wrong
}

func notNegative(v any, _ map[string]any) string {
	n, wrong := wholeNumber(v)
	if wrong == "" && n < 0 {
		return fmt.Sprintf("{value_negative,%d}", n)
	}
	return wrong
}

func oneOf(otherwise string, known ...string) func(any, map[string]any) string {
	return func(v any, _ map[string]any) string {
		s, ok := v.(string)
		if !ok {
			return unacceptable(v)
		}
		for _, k := range known {
			if s == k {
				return ""
			}
		}
		return otherwise
	}
}

func orElse(wrong, other string) string {
	if wrong != "" {
		return wrong
	}
	return other
}
