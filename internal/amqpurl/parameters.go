package amqpurl

import (
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// tlsParameters are parameters that have no effect without TLS.
var tlsParameters = []string{"cacertfile", "certfile", "keyfile", "server_name_indication", "verify"}

// parameters has a function for each known parameter. It returns what is wrong with a value, "" if
// nothing is, and keeps the values that the driver does not.
var parameters = map[string]func(u *URL, value string) string{
	"cacertfile":             anyValue,
	"certfile":               anyValue,
	"keyfile":                anyValue,
	"server_name_indication": anyValue,
	"verify":                 (*URL).setVerify,
	"auth_mechanism":         (*URL).addMechanism,
	"heartbeat":              (*URL).setHeartbeat,
	"connection_timeout":     (*URL).setDialTimeout,
	"channel_max":            (*URL).checkChannelMax,
}

// unsupportedParameters are parameters that other clients know.
var unsupportedParameters = map[string]string{
	"frame_max":            "the parameter frame_max of the URL has no effect here: frames are up to 128 KiB, or what the broker allows",
	"password":             "the parameter password of the URL has no effect here: give an encrypted key by WithTLSConfig",
	"depth":                "the parameter depth of the URL has no effect here: use WithTLSConfig",
	"fail_if_no_peer_cert": "the parameter fail_if_no_peer_cert of the URL is for servers: leave it out",
	"vhost":                "the parameter vhost of the URL has no effect: the virtual host is the path, as in amqp://host/vhost",
	"prefetch":             "the parameter prefetch of the URL has no effect: use WithPrefetch",
	"name":                 "the parameter name of the URL has no effect: use WithConnectionName",
}

// readParameters reads what the driver does not know or does not check, and returns every problem.
// It names only parameters that it knows: anything else may be secret.
func (u *URL) readParameters(from *url.URL) (problems []string) {
	given, err := url.ParseQuery(from.RawQuery)
	if err != nil {
		return []string{"the parameters of the URL are malformed: want ?name=value&name=value, with special characters percent-encoded"}
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if problem := u.readParameter(from.Scheme, name, given[name]); problem != "" {
			problems = append(problems, problem)
		}
	}
	if given.Has("certfile") != given.Has("keyfile") {
		problems = append(problems, "certfile and keyfile of the URL go together: a client certificate needs its key")
	}
	return problems
}

func (u *URL) readParameter(scheme, name string, values []string) string {
	read := parameters[name]
	switch {
	case read == nil:
		return unknownParameter(name)
	case scheme == "amqp" && slices.Contains(tlsParameters, name):
		return fmt.Sprintf("the parameter %s of the URL has no effect without TLS: use amqps", name)
	case len(values) > 1 && name != "auth_mechanism":
		return fmt.Sprintf("the parameter %s of the URL is given several times", name)
	}
	for _, value := range values {
		if value == "" {
			return fmt.Sprintf("the parameter %s of the URL has no value", name)
		}
		if problem := read(u, value); problem != "" {
			return problem
		}
	}
	return ""
}

func anyValue(*URL, string) string { return "" }

func (u *URL) setVerify(value string) string {
	if value != "verify_peer" {
		return "the parameter verify of the URL must be verify_peer, which is always so here: without it anyone on the path can read the password (for tests: WithInsecureSkipVerify)"
	}
	return ""
}

func (u *URL) addMechanism(value string) string {
	name := strings.ToLower(value)
	if name != "plain" && name != "amqplain" && name != "external" {
		return "the parameter auth_mechanism of the URL must be plain, amqplain or external, given once for each; for another one use WithSASL"
	}
	u.AuthMechanism = append(u.AuthMechanism, name)
	return ""
}

func (u *URL) setHeartbeat(value string) string {
	seconds, err := strconv.Atoi(value)
	if err != nil || seconds < 1 || seconds > 600 {
		return "the parameter heartbeat of the URL must be 1 to 600, in seconds; a consumer without heartbeats never notices a dead path"
	}
	u.Heartbeat = time.Duration(seconds) * time.Second
	return ""
}

func (u *URL) setDialTimeout(value string) string {
	ms, err := strconv.Atoi(value)
	if err != nil || ms < 1 || ms > int(MaxDuration/time.Millisecond) {
		return "the parameter connection_timeout of the URL must be 1 to 86400000, in milliseconds"
	}
	u.DialTimeout = time.Duration(ms) * time.Millisecond
	return ""
}

func (u *URL) checkChannelMax(value string) string {
	if _, err := strconv.ParseUint(value, 10, 16); err != nil {
		return "the parameter channel_max of the URL must be 0 to 65535"
	}
	return ""
}

// unknownParameter suggests the known parameter with the nearest name.
func unknownParameter(name string) string {
	if text := unsupportedParameters[name]; text != "" {
		return text
	}
	name = strings.ReplaceAll(strings.ToLower(name), "-", "_")
	known := slices.Sorted(maps.Keys(parameters))
	near := slices.MinFunc(known, func(a, b string) int { return distance(name, a) - distance(name, b) })
	if distance(name, near) <= len(near)/4+1 {
		return "a parameter of the URL is unknown: is " + near + " meant?"
	}
	return "a parameter of the URL is unknown (not shown, it may be of a password): known are " + strings.Join(known, ", ")
}

// distance counts the insertions, removals and replacements that lead from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
