// Package amqpurl reads the URL of a broker, and says what is wrong with one that is not as it has
// to be.
package amqpurl

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/table"
)

// URL is what a URL says.
type URL struct {
	amqp.URI
	Heartbeat   time.Duration // the parameter heartbeat, 0 for none
	DialTimeout time.Duration // the parameter connection_timeout, 0 for none
}

// MaxDuration is the longest that a parameter may say.
const MaxDuration = 24 * time.Hour

const (
	form   = "amqp:// or amqps://user:password@host:port/vhost"
	encode = "(net/url.UserPassword does it)"
)

// Parse reads a URL. It returns everything that a user has to change in it, "" if nothing is wrong.
// That shows no part of the URL: where an unescaped character cuts it in the wrong place, any part
// may belong to the password. So it never has a parser's error, whose text is the URL.
func Parse(text string) (u URL, wrong string) {
	if reason := misshapen(text); reason != "" {
		return URL{}, reason
	}
	parsed, err := url.Parse(text)
	if err != nil {
		return URL{}, "the URL does not parse (it is not shown, it may hold a password): want " + form
	}
	if reasons := u.readParameters(parsed); len(reasons) > 0 {
		return URL{}, strings.Join(reasons, "; ")
	}
	mechanisms := u.AuthMechanism
	if u.URI, err = amqp.ParseURI(text); err != nil {
		return URL{}, "the driver cannot read the URL (it is not shown, it may hold a password): want " + form
	}
	u.AuthMechanism = mechanisms
	return u, ""
}

// misshapen returns what is wrong with the URL's text, "" if it is certain where each part ends:
// then it has at most one @, which ends user and password, and the host follows.
func misshapen(text string) string {
	if reason := wrapped(text); reason != "" {
		return reason
	}
	if reason := wrongScheme(text); reason != "" {
		return reason
	}
	_, rest, _ := strings.Cut(text, "://")
	if reason := unescaped(rest); reason != "" {
		return reason
	}
	authority, tail := rest, ""
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority, tail = rest[:i], rest[i:]
	}
	if reason := wrongHost(authority[strings.Index(authority, "@")+1:]); reason != "" {
		return reason
	}
	path, _, _ := strings.Cut(tail, "?")
	return wrongVhost(path)
}

// wrapped finds what stands around the URL, and what should have been filled in.
func wrapped(text string) string {
	switch {
	case text == "":
		return "the URL is empty: want " + form + ", or WithURLFunc"
	case strings.TrimFunc(text, blank) != text:
		return "the URL begins or ends with a blank or line break, as a secret read from a file does: use strings.TrimSpace"
	case strings.ContainsAny(text[:1], "'\"`") || strings.HasSuffix(text, `"`):
		return "the URL has quotes around it: leave them out (some readers of env files keep them)"
	case strings.Contains(text, "${"), strings.Contains(text, "{{"), filledByKubernetes.MatchString(text):
		return "the URL holds a variable that was not filled in, such as ${NAME}, $(NAME) or {{ name }}: fill it in (os.ExpandEnv); in user or password percent-encode $ as %24 and { as %7B"
	}
	return ""
}

// filledByKubernetes matches a variable in the env of a pod, which Kubernetes leaves as it is if it
// is not set.
var filledByKubernetes = regexp.MustCompile(`\$\([A-Za-z_][A-Za-z0-9_.-]*\)`)

// blank reports whether r is white space, or the byte order mark that Windows writes before a text.
func blank(r rune) bool { return unicode.IsSpace(r) || r == '\ufeff' }

// notAMQP says, for some other schemes, what to use instead.
var notAMQP = map[string]string{
	"http":                "http is for RabbitMQ's HTTP API: AMQP has amqp:// (port 5672) and, for TLS, amqps:// (port 5671)",
	"https":               "https is for RabbitMQ's HTTP API: AMQP has amqp:// (port 5672) and, for TLS, amqps:// (port 5671)",
	"tcp":                 "tcp:// is what Kubernetes and Docker put into RABBITMQ_PORT: want " + form,
	"amqp+ssl":            "for TLS the scheme of the URL is amqps",
	"amqp+tls":            "for TLS the scheme of the URL is amqps",
	"amqps+ssl":           "for TLS the scheme of the URL is amqps",
	"ssl":                 "for TLS the scheme of the URL is amqps",
	"tls":                 "for TLS the scheme of the URL is amqps",
	"mqtt":                "the scheme of the URL is for MQTT: this is AMQP 0-9-1, amqp:// or amqps://",
	"mqtts":               "the scheme of the URL is for MQTT: this is AMQP 0-9-1, amqp:// or amqps://",
	"rabbitmq-stream":     "the scheme of the URL is for the stream protocol: this is AMQP 0-9-1, amqp:// or amqps://",
	"rabbitmq-stream+tls": "the scheme of the URL is for the stream protocol: this is AMQP 0-9-1, amqp:// or amqps://",
}

func wrongScheme(text string) string {
	before, _, found := strings.Cut(text, "://")
	before = strings.ToLower(before)
	switch {
	case found && (before == "amqp" || before == "amqps"):
		return ""
	case found && notAMQP[before] != "":
		return notAMQP[before]
	case found && only(before, "+-."):
		return "the scheme of the URL must be amqp or, for TLS, amqps"
	case strings.HasSuffix(before, "=amqp"), strings.HasSuffix(before, "=amqps"):
		return "the URL stands behind a name and =, as in an env file: give only what follows the ="
	case strings.HasPrefix(before, "amqp:"), strings.HasPrefix(before, "amqps:"):
		return "the URL lacks // after amqp: or amqps:, want " + form
	}
	return "the URL has no scheme: it must begin with amqp:// or, for TLS, amqps://"
}

// only reports whether text consists of ASCII letters, digits and the others given.
func only(text, others string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
		return !letter && (r < '0' || r > '9') && !strings.ContainsRune(others, r)
	})
}

// unescaped finds characters that should have been percent-encoded in the part after the scheme.
// The characters that end the host, / ? and #, can stand in a password only before its @. So a URL
// with an @ after its first / ? or # is refused.
func unescaped(rest string) string {
	beforeQuery, _, _ := strings.Cut(rest, "?")
	switch lower := strings.ToLower(rest); {
	case strings.Contains(lower, "amqp://"), strings.Contains(lower, "amqps://"):
		return "the URL holds several URLs: give the first to New and the others to WithURLs"
	case strings.Contains(lower, "tcp://"):
		return "the host or port is a URL of its own, tcp://...: Kubernetes sets RABBITMQ_PORT to that where a service is named rabbitmq; take the number from RABBITMQ_SERVICE_PORT, or give the variable another name"
	case strings.Contains(beforeQuery, "://"):
		return "the URL holds another URL in place of its host: want " + form
	case strings.Contains(rest, " "):
		return "the URL has an unescaped blank: percent-encode it as %20 " + encode
	case strings.ContainsFunc(rest, unicode.IsControl):
		return "the URL has a line break or another control character inside"
	}
	if reason := cutWrongly(rest); reason != "" {
		return reason
	}
	user, _, hasUser := strings.Cut(rest, "@")
	switch {
	case hasUser && badEscape(user):
		return "the URL has an unescaped % in user or password: percent-encode it as %25 " + encode
	case badEscape(rest):
		return "the URL has a % with no two hexadecimal digits after it: percent-encode it as %25"
	case strings.Contains(rest, "#"):
		return "the URL has an unescaped #: percent-encode it as %23; an AMQP URL has no fragment"
	case hasUser && !only(user, "-._~!$&'()*+,;=:%"):
		return "user or password of the URL has a character that must be percent-encoded " + encode
	}
	return ""
}

func cutWrongly(rest string) string {
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	authority := rest[:end]
	inside, all := strings.Count(authority, "@"), strings.Count(rest, "@")
	switch {
	case all > inside && inside == 0:
		c := rest[end]
		return fmt.Sprintf("the URL seems to have an unescaped %c in user or password: percent-encode it as %%%02X %s; an @ in the virtual host or a parameter is %%40", c, c, encode)
	case all > inside:
		c := rest[end]
		return fmt.Sprintf("the URL has several @, which seem to be in user or password, as does a %c: percent-encode them as %%40 and %%%02X %s; an @ in the virtual host or a parameter is %%40 as well", c, c, encode)
	case inside > 1 && strings.Contains(authority, ","):
		return "the URL has several @: give further hosts to WithURLs, each with a URL of its own; in user or password percent-encode @ as %40 " + encode
	case inside > 1:
		return "the URL has an unescaped @ in user or password: percent-encode it as %40 " + encode
	}
	return ""
}

// badEscape reports whether text has a % that begins no %XX.
func badEscape(text string) bool {
	for _, after := range strings.Split(text, "%")[1:] {
		if len(after) < 2 || strings.Trim(after[:2], "0123456789abcdefABCDEF") != "" {
			return true
		}
	}
	return false
}

// wrongHost checks host and port.
func wrongHost(text string) string {
	if strings.ContainsAny(text, ",;") {
		return "the URL names several hosts: give one URL to New and one for each further host to WithURLs"
	}
	host, port := text, ""
	v6, isV6 := strings.CutPrefix(text, "[")
	if isV6 {
		var closed bool
		if host, port, closed = strings.Cut(v6, "]"); !closed || port != "" && port[0] != ':' {
			return "the IPv6 address of the URL must be in brackets: [::1]:5672"
		}
		port = strings.TrimPrefix(port, ":")
	} else if host, port, _ = strings.Cut(text, ":"); strings.Contains(port, ":") {
		return "the URL has several colons in host and port: an IPv6 address needs brackets, [::1]:5672, and user:password needs an @ before the host"
	}
	number, err := strconv.ParseUint(cmp.Or(port, "1"), 10, 64)
	switch {
	case host == "":
		return "the URL has no host: want " + form
	case strings.Contains(text, "$"):
		return "the URL has a variable that was not filled in as host or port: fill it in (os.ExpandEnv)"
	case isV6 && net.ParseIP(zoneless(host)) == nil:
		return "the URL has brackets around what is no IPv6 address"
	case !isV6 && !hostName(host):
		return "the URL has a character in its host that no host name has"
	case err != nil && errors.Is(err, strconv.ErrSyntax):
		return "the port of the URL is no number (or the host is missing: user:password@host:port)"
	case err != nil, number < 1, number > 65535:
		return "the port of the URL must be 1 to 65535"
	}
	return ""
}

// zoneless cuts the zone off an IPv6 address, as in fe80::1%25eth0.
func zoneless(address string) string {
	address, _, _ = strings.Cut(address, "%25")
	return address
}

// hostName reports whether host may be a name. It allows the letters of other scripts, though a
// resolver may know none of them.
func hostName(host string) bool {
	return !strings.ContainsFunc(host, func(r rune) bool {
		return r < unicode.MaxASCII+1 && !only(string(r), "-._")
	})
}

// wrongVhost checks the path. It allows //, which some clients write for the virtual host /.
func wrongVhost(path string) string {
	raw := strings.TrimPrefix(path, "/")
	if raw == "/" {
		return ""
	}
	if strings.Contains(raw, "/") {
		return "the virtual host in the URL has a further /: percent-encode it as %2F, or leave it out at the end"
	}
	name, err := url.PathUnescape(raw)
	switch {
	case err != nil || len(name) > table.MaxShortString:
		return fmt.Sprintf("the virtual host in the URL has more than %d bytes", table.MaxShortString)
	case !utf8.ValidString(name):
		return "the virtual host in the URL is no UTF-8 once it is decoded"
	}
	return ""
}
