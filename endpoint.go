package steadymq

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/table"
	"github.com/steadymq/steadymq/internal/wire"
)

// endpoint is one broker address and how to log in there.
type endpoint struct {
	uri       amqp.URI
	address   string        // host:port, the only part that is ever shown
	heartbeat time.Duration // the URL's parameter heartbeat, 0 for none

	dialTimeout time.Duration // the URL's parameter connection_timeout, 0 for none
}

// tlsConfig returns the TLS configuration of a dial to e, nil for plain amqp. openSocket clones it
// and sets the server's name.
func (e endpoint) tlsConfig(given *tls.Config, insecure bool) (*tls.Config, error) {
	if e.uri.Scheme != "amqps" {
		return nil, nil
	}
	c, err := given, error(nil)
	if given == nil {
		c, err = e.ownTLS()
	}
	if insecure && err == nil {
		c = c.Clone()
		c.InsecureSkipVerify = true
	}
	return c, err
}

// ownTLS returns the TLS configuration that the URL asks for.
func (e endpoint) ownTLS() (*tls.Config, error) {
	c := &tls.Config{ServerName: e.uri.ServerName, MinVersion: tls.VersionTLS12}
	if file := e.uri.CACertFile; file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, &urlError{"read the URL's cacertfile", err}
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, &urlError{reason: fmt.Sprintf("the URL's cacertfile %s holds no PEM certificate", file)}
		}
	}
	if e.uri.CertFile != "" {
		pair, err := tls.LoadX509KeyPair(e.uri.CertFile, e.uri.KeyFile)
		if err != nil {
			return nil, &urlError{"load the URL's certfile and keyfile", err}
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// login returns the login mechanisms: the given ones, else those that the URL asks for, best first.
func (e endpoint) login(given []amqp.Authentication) []amqp.Authentication {
	if given != nil {
		return given
	}
	var auth []amqp.Authentication
	for _, name := range e.uri.AuthMechanism {
		switch name {
		case "external":
			auth = append(auth, &amqp.ExternalAuth{})
		case "amqplain":
			auth = append(auth, e.uri.AMQPlainAuth())
		case "plain":
			auth = append(auth, e.uri.PlainAuth())
		}
	}
	if auth == nil {
		auth = append(auth, e.uri.PlainAuth())
	}
	return auth
}

// maxDuration is the longest that an option, or a parameter of the URL, may last.
const maxDuration = 24 * time.Hour

// otherPorts are the ports on which RabbitMQ speaks something other than AMQP, unless it is
// configured otherwise (https://www.rabbitmq.com/docs/networking#ports).
var otherPorts = map[string]string{
	"15672": "port for HTTP (management)",
	"15671": "port for HTTPS (management)",
	"5552":  "port for streams, which have a protocol of their own",
	"5551":  "port for streams over TLS, which have a protocol of their own",
	"1883":  "port for MQTT",
	"8883":  "port for MQTT over TLS",
	"61613": "port for STOMP",
	"61614": "port for STOMP over TLS",
	"25672": "port for other nodes of the cluster",
	"4369":  "port of epmd, where nodes of a cluster look for each other",
}

// wrongPortError says that a peer did not answer as a broker does, on a port that is known to be
// for something else.
type wrongPortError struct {
	port, use string
	err       error // what the peer did
}

func (e *wrongPortError) Error() string {
	return fmt.Sprintf("port %s is RabbitMQ's %s; AMQP is 5672, or 5671 with TLS (%s)", e.port, e.use, e.answer())
}

// answer says what the peer did, without advice: the port has given that already.
func (e *wrongPortError) answer() string {
	switch {
	case errors.As(e.err, new(*wire.NotAMQPError)):
		return "the peer does not speak AMQP 0-9-1"
	case errors.As(e.err, new(tls.RecordHeaderError)):
		return "the peer does not speak TLS"
	}
	return e.err.Error()
}

func (e *wrongPortError) Unwrap() error { return e.err }

// namePort adds to err what the port of e is for, if the peer did not answer as a broker does: it
// sent other bytes, ended the socket or did not answer at all.
func namePort(e endpoint, err error) error {
	port := strconv.Itoa(e.uri.Port)
	use := otherPorts[port]
	if port == "5671" && e.uri.Scheme == "amqp" {
		use = "port for AMQP over TLS, which takes an amqps URL"
	}
	if use == "" || !unlikeABroker(err) {
		return err
	}
	return &wrongPortError{port, use, err}
}

func unlikeABroker(err error) bool {
	for _, end := range []error{io.EOF, io.ErrUnexpectedEOF, wire.ErrPeerReset, syscall.ECONNRESET, errSetupTimeout} {
		if errors.Is(err, end) {
			return true
		}
	}
	return errors.As(err, new(*wire.NotAMQPError)) || errors.As(err, new(tls.RecordHeaderError))
}

// copyTLS copies a configuration that the user gives, so that later changes of it have no effect
// here.
func copyTLS(c *tls.Config) *tls.Config {
	if c == nil {
		return nil
	}
	c = c.Clone()
	c.Certificates = slices.Clone(c.Certificates)
	if c.RootCAs != nil {
		c.RootCAs = c.RootCAs.Clone()
	}
	return c
}

// How a URL is read, and what is said about one that is wrong. New and WithURLFunc call
// parseEndpoint, the rest serves that.

// urlError says what a user has to change in a URL, or in a file that it names. The reason shows no
// part of the URL: where an unescaped character cuts it in the wrong place, any part may belong to
// the password.
type urlError struct {
	reason string
	err    error // nil, or why a file cannot be read
}

func (e *urlError) Error() string {
	if e.err != nil {
		return e.reason + ": " + e.err.Error()
	}
	return e.reason
}

func (e *urlError) Unwrap() error { return e.err }

const (
	urlForm   = "amqp:// or amqps://user:password@host:port/vhost"
	urlEncode = "(net/url.UserPassword does it)"
)

// parseEndpoint reads a URL. It never wraps a parser's error, whose text is the URL with its
// password.
func parseEndpoint(text string) (endpoint, error) {
	if reason := misshapen(text); reason != "" {
		return endpoint{}, &urlError{reason: reason}
	}
	u, err := url.Parse(text)
	if err != nil {
		return endpoint{}, &urlError{reason: "the URL does not parse (it is not shown, it may hold a password): want " + urlForm}
	}
	e := endpoint{}
	if reasons := e.readParameters(u); len(reasons) > 0 {
		return endpoint{}, &urlError{reason: strings.Join(reasons, "; ")}
	}
	mechanisms := e.uri.AuthMechanism
	if e.uri, err = amqp.ParseURI(text); err != nil {
		return endpoint{}, &urlError{reason: "the driver cannot read the URL (it is not shown, it may hold a password): want " + urlForm}
	}
	e.uri.AuthMechanism = mechanisms
	e.address = net.JoinHostPort(e.uri.Host, strconv.Itoa(e.uri.Port))
	return e, nil
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
		return "the URL is empty: want " + urlForm + ", or WithURLFunc"
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
	"tcp":                 "tcp:// is what Kubernetes and Docker put into RABBITMQ_PORT: want " + urlForm,
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
		return "the URL lacks // after amqp: or amqps:, want " + urlForm
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
		return "the URL holds another URL in place of its host: want " + urlForm
	case strings.Contains(rest, " "):
		return "the URL has an unescaped blank: percent-encode it as %20 " + urlEncode
	case strings.ContainsFunc(rest, unicode.IsControl):
		return "the URL has a line break or another control character inside"
	}
	if reason := cutWrongly(rest); reason != "" {
		return reason
	}
	user, _, hasUser := strings.Cut(rest, "@")
	switch {
	case hasUser && badEscape(user):
		return "the URL has an unescaped % in user or password: percent-encode it as %25 " + urlEncode
	case badEscape(rest):
		return "the URL has a % with no two hexadecimal digits after it: percent-encode it as %25"
	case strings.Contains(rest, "#"):
		return "the URL has an unescaped #: percent-encode it as %23; an AMQP URL has no fragment"
	case hasUser && !only(user, "-._~!$&'()*+,;=:%"):
		return "user or password of the URL has a character that must be percent-encoded " + urlEncode
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
		return fmt.Sprintf("the URL seems to have an unescaped %c in user or password: percent-encode it as %%%02X %s; an @ in the virtual host or a parameter is %%40", c, c, urlEncode)
	case all > inside:
		c := rest[end]
		return fmt.Sprintf("the URL has several @, which seem to be in user or password, as does a %c: percent-encode them as %%40 and %%%02X %s; an @ in the virtual host or a parameter is %%40 as well", c, c, urlEncode)
	case inside > 1 && strings.Contains(authority, ","):
		return "the URL has several @: give further hosts to WithURLs, each with a URL of its own; in user or password percent-encode @ as %40 " + urlEncode
	case inside > 1:
		return "the URL has an unescaped @ in user or password: percent-encode it as %40 " + urlEncode
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
		return "the URL has no host: want " + urlForm
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

// tlsParameters are parameters that have no effect without TLS.
var tlsParameters = []string{"cacertfile", "certfile", "keyfile", "server_name_indication", "verify"}

// parameters has a function for each known parameter. It returns what is wrong with a value, "" if
// nothing is, and keeps the values that the driver does not.
var parameters = map[string]func(e *endpoint, value string) string{
	"cacertfile":             anyValue,
	"certfile":               anyValue,
	"keyfile":                anyValue,
	"server_name_indication": anyValue,
	"verify":                 (*endpoint).setVerify,
	"auth_mechanism":         (*endpoint).addMechanism,
	"heartbeat":              (*endpoint).setHeartbeat,
	"connection_timeout":     (*endpoint).setDialTimeout,
	"channel_max":            (*endpoint).checkChannelMax,
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
func (e *endpoint) readParameters(u *url.URL) (problems []string) {
	given, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return []string{"the parameters of the URL are malformed: want ?name=value&name=value, with special characters percent-encoded"}
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if problem := e.readParameter(u.Scheme, name, given[name]); problem != "" {
			problems = append(problems, problem)
		}
	}
	if given.Has("certfile") != given.Has("keyfile") {
		problems = append(problems, "certfile and keyfile of the URL go together: a client certificate needs its key")
	}
	return problems
}

func (e *endpoint) readParameter(scheme, name string, values []string) string {
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
		if problem := read(e, value); problem != "" {
			return problem
		}
	}
	return ""
}

func anyValue(*endpoint, string) string { return "" }

func (e *endpoint) setVerify(value string) string {
	if value != "verify_peer" {
		return "the parameter verify of the URL must be verify_peer, which is always so here: without it anyone on the path can read the password (for tests: WithInsecureSkipVerify)"
	}
	return ""
}

func (e *endpoint) addMechanism(value string) string {
	name := strings.ToLower(value)
	if name != "plain" && name != "amqplain" && name != "external" {
		return "the parameter auth_mechanism of the URL must be plain, amqplain or external, given once for each; for another one use WithSASL"
	}
	e.uri.AuthMechanism = append(e.uri.AuthMechanism, name)
	return ""
}

func (e *endpoint) setHeartbeat(value string) string {
	seconds, err := strconv.Atoi(value)
	if err != nil || seconds < 1 || seconds > 600 {
		return "the parameter heartbeat of the URL must be 1 to 600, in seconds; a consumer without heartbeats never notices a dead path"
	}
	e.heartbeat = time.Duration(seconds) * time.Second
	return ""
}

func (e *endpoint) setDialTimeout(value string) string {
	ms, err := strconv.Atoi(value)
	if err != nil || ms < 1 || ms > int(maxDuration/time.Millisecond) {
		return "the parameter connection_timeout of the URL must be 1 to 86400000, in milliseconds"
	}
	e.dialTimeout = time.Duration(ms) * time.Millisecond
	return ""
}

func (e *endpoint) checkChannelMax(value string) string {
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
