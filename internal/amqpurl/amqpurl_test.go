package amqpurl

import (
	"net"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Every piece of user and password in these URLs contains this, or is part of it.
const secretPiece = "Xq9z"

func TestURLThatIsGoodIsDialledAtItsHost(t *testing.T) {
	for text, want := range map[string]string{
		"amqp://host":                             "host:5672 guest guest /",
		"amqps://host":                            "host:5671 guest guest /",
		"AMQP://host/":                            "host:5672 guest guest /",
		"amqp://host:":                            "host:5672 guest guest /",
		"amqp://user:pass@host:10000/vhost":       "host:10000 user pass vhost",
		"amqp://u%61er:%61ss@host:65535/v%2fhost": "host:65535 uaer ass v/host",
		"amqp://user@host/%2f":                    "host:5672 user guest /",
		"amqp://user:@host":                       "host:5672 user  /",
		"amqp://guest@host//":                     "host:5672 guest guest /",
		"amqp://user:p%40a%2Fs%3Fs%23%25@host":    "host:5672 user p@a/s?s#% /",
		"amqp://user:a:b$c!d+e,f;g='h'*(i)~@host": "host:5672 user a:b$c!d+e,f;g='h'*(i)~ /",
		"amqp://u:p@[::1]":                        "[::1]:5672 u p /",
		"amqps://u:p@[2001:db8::1]:5673/v":        "[2001:db8::1]:5673 u p v",
		"amqp://u:p@[fe80::1%25eth0]:5672/v":      "[fe80::1%eth0]:5672 u p v",
		"amqp://u:p@10.0.0.1/a.b-c_d:e,f":         "10.0.0.1:5672 u p a.b-c_d:e,f",
		"amqp://u:p@my_rabbit.svc.cluster.local":  "my_rabbit.svc.cluster.local:5672 u p /",
		"amqp://u:p@xn--bcher-kva.example./v%20w": "xn--bcher-kva.example.:5672 u p v w",
		"amqp://u:p@bücher.example":               "bücher.example:5672 u p /",
		"amqp://u:p@host?heartbeat=5":             "host:5672 u p /",
		"amqp://u:p@host/?heartbeat=600&connection_timeout=10000&channel_max=2047&auth_mechanism=PLAIN": "host:5672 u p /",
		"amqps://u:p@host/v?cacertfile=%2Fca.pem&certfile=/c.pem&keyfile=/k.pem&verify=verify_peer":     "host:5671 u p v",
		"amqps://u:p@host/v?server_name_indication=mq.example&auth_mechanism=external":                  "host:5671 u p v",
	} {
		u, wrong := Parse(text)
		assert.Empty(t, wrong, text)
		assert.Equal(t, want, strings.Join([]string{net.JoinHostPort(u.Host, strconv.Itoa(u.Port)), u.Username, u.Password, u.Vhost}, " "), text)
	}
}

func TestURLThatIsWrongIsToldWhatIsWrongWithIt(t *testing.T) {
	const (
		escape  = " (net/url.UserPassword does it)"
		atIs    = "; an @ in the virtual host or a parameter is %40"
		noPort  = "the port of the URL is no number (or the host is missing: user:password@host:port)"
		ports   = "the port of the URL must be 1 to 65535"
		colons  = "the URL has several colons in host and port: an IPv6 address needs brackets, [::1]:5672, and user:password needs an @ before the host"
		several = "the URL names several hosts: give one URL to New and one for each further host to WithURLs"
		tlsOnly = "for TLS the scheme of the URL is amqps"
		unset   = "the URL holds a variable that was not filled in"
		slash   = "the virtual host in the URL has a further /: percent-encode it as %2F"
	)
	for text, want := range map[string]string{
		// Cut wrongly.
		"amqp://user:Xq9z@Xq9z@host":                  "the URL has an unescaped @ in user or password: percent-encode it as %40" + escape,
		"amqp://me@corp.example:Xq9z@host":            "the URL has an unescaped @ in user or password: percent-encode it as %40" + escape,
		"amqp://user:Xq9z#Xq9z@host:5672/":            "the URL seems to have an unescaped # in user or password: percent-encode it as %23" + escape + atIs,
		"amqp://user:Xq9z?Xq9z@host/":                 "the URL seems to have an unescaped ? in user or password: percent-encode it as %3F" + escape + atIs,
		"amqp://user:Xq9z/Xq9z@host/":                 "the URL seems to have an unescaped / in user or password: percent-encode it as %2F" + escape + atIs,
		"amqp://user:12/Xq9z@host/":                   "the URL seems to have an unescaped / in user or password: percent-encode it as %2F" + escape + atIs,
		"amqp://Xq9z/Xq9z:Xq9z@host/":                 "the URL seems to have an unescaped / in user or password: percent-encode it as %2F" + escape + atIs,
		"amqp://user:Xq9z@Xq9z/Xq9z@host/":            "the URL has several @, which seem to be in user or password, as does a /: percent-encode them as %40 and %2F" + escape + atIs,
		"amqp://user:Xq9z@Xq9z?heartbeat=5@host/":     "the URL has several @, which seem to be in user or password, as does a ?: percent-encode them as %40 and %3F" + escape + atIs,
		"amqp://user:Xq9z%Xq9z@host":                  "the URL has an unescaped % in user or password: percent-encode it as %25" + escape,
		"amqp://user:Xq9z%@host":                      "the URL has an unescaped % in user or password: percent-encode it as %25" + escape,
		"amqp://user:Xq9z Xq9z@host":                  "the URL has an unescaped blank: percent-encode it as %20" + escape,
		"amqp://user:Xq9z\nXq9z@host":                 "the URL has a line break or another control character inside",
		"amqp://user:Xq9z[^Xq9z@host":                 "user or password of the URL has a character that must be percent-encoded" + escape,
		"amqp://user:Xq9zä@host":                      "user or password of the URL has a character that must be percent-encoded" + escape,
		"amqp://host/v%zz":                            "the URL has a % with no two hexadecimal digits after it: percent-encode it as %25",
		"amqp://u:p@host/#Xq9z":                       "the URL has an unescaped #: percent-encode it as %23; an AMQP URL has no fragment",
		"amqp://u:p@a.example,u:p@b.example/":         "the URL has several @: give further hosts to WithURLs",
		"amqp://u:p@a,b/":                             several,
		"amqp://u:p@a:5672,b:5672/":                   several,
		"amqp://u:p@a;b/":                             several,
		"amqp://u:p@a/,amqp://u:p@b/":                 "the URL holds several URLs: give the first to New and the others to WithURLs",
		"amqp://u:p@host:tcp://10.0.0.1:5672":         "the host or port is a URL of its own, tcp://...: Kubernetes sets RABBITMQ_PORT to that where a service is named rabbitmq",
		"amqp://u:p@http://host/":                     "the URL holds another URL in place of its host",
		"amqp://user:Xq9z":                            noPort,
		"amqp://u:p@host:amqp":                        noPort,
		"amqp://u:p@host:-1":                          noPort,
		"amqp://u:p@host:0":                           ports,
		"amqp://u:p@host:65536":                       ports,
		"amqp://u:p@host:99999999999999999999":        ports,
		"amqp://u:p@::1:5672":                         colons,
		"amqp://u:p@host:5672:5672":                   colons,
		"amqp://u:p@[::1:5672":                        "the IPv6 address of the URL must be in brackets: [::1]:5672",
		"amqp://u:p@[host]:5672":                      "the URL has brackets around what is no IPv6 address",
		"amqp://u:p@ho<st>/":                          "the URL has a character in its host that no host name has",
		"amqp://u:p@/v":                               "the URL has no host: want " + form,
		"amqp://u:p@:5672/v":                          "the URL has no host: want " + form,
		"amqp:///v":                                   "the URL has no host: want " + form,
		"amqp://":                                     "the URL has no host: want " + form,
		"amqp://u:p@host/a/b":                         slash,
		"amqp://u:p@host/a/":                          slash,
		"amqp://u:p@host///":                          slash,
		"amqp://u:p@host/" + strings.Repeat("v", 256): "the virtual host in the URL has more than 255 bytes",

		// Around it, in place of it.
		"":                                   "the URL is empty: want " + form + ", or WithURLFunc",
		" amqp://u:Xq9z@host":                "the URL begins or ends with a blank or line break, as a secret read from a file does: use strings.TrimSpace",
		"amqp://u:Xq9z@host/\n":              "the URL begins or ends with a blank or line break",
		"\ufeffamqp://u:Xq9z@host/":          "the URL begins or ends with a blank or line break",
		`"amqp://u:Xq9z@host/"`:              "the URL has quotes around it: leave them out",
		"'amqp://u:Xq9z@host/'":              "the URL has quotes around it: leave them out",
		"AMQP_URL=amqp://u:Xq9z@host/":       "the URL stands behind a name and =, as in an env file: give only what follows the =",
		"amqp://u:${RABBIT_PASSWORD}@host/":  unset,
		"amqp://u:$(RABBIT_PASSWORD)@host/":  unset,
		"amqp://u:p@{{ .Values.host }}/":     unset,
		"amqp://u:p@$HOST:5672/":             "the URL has a variable that was not filled in as host or port",
		"amqp://u:p@host:$PORT":              "the URL has a variable that was not filled in as host or port",
		"host:5672":                          "the URL has no scheme: it must begin with amqp:// or, for TLS, amqps://",
		"u:Xq9z@host":                        "the URL has no scheme",
		"//u:Xq9z@host":                      "the URL has no scheme",
		"u:Xq9z@host:tcp://10.0.0.1":         "the URL has no scheme",
		"amqp:u:Xq9z@host":                   "the URL lacks // after amqp: or amqps:",
		"amqps:/u:Xq9z@host":                 "the URL lacks // after amqp: or amqps:",
		"http://u:Xq9z@host:15672/":          "http is for RabbitMQ's HTTP API: AMQP has amqp:// (port 5672) and, for TLS, amqps:// (port 5671)",
		"https://u:Xq9z@host/":               "https is for RabbitMQ's HTTP API",
		"tcp://10.0.0.1:5672":                "tcp:// is what Kubernetes and Docker put into RABBITMQ_PORT: want " + form,
		"amqp+ssl://u:Xq9z@host":             tlsOnly,
		"mqtt://u:Xq9z@host":                 "the scheme of the URL is for MQTT",
		"rabbitmq-stream://u:Xq9z@host:5552": "the scheme of the URL is for the stream protocol",
		"rabbit://u:Xq9z@host":               "the scheme of the URL must be amqp or, for TLS, amqps",

		// Parameters.
		"amqp://host?heartbeat=0":                               "the parameter heartbeat of the URL must be 1 to 600, in seconds; a consumer without heartbeats never notices a dead path",
		"amqp://host?heartbeat=10s":                             "the parameter heartbeat of the URL must be 1 to 600, in seconds",
		"amqp://host?heartbeat=601":                             "the parameter heartbeat of the URL must be 1 to 600, in seconds",
		"amqp://host?heartbeat=":                                "the parameter heartbeat of the URL has no value",
		"amqp://host?heartbeat":                                 "the parameter heartbeat of the URL has no value",
		"amqp://host?heartbeat=5&heartbeat=6":                   "the parameter heartbeat of the URL is given several times",
		"amqp://host?connection_timeout=0":                      "the parameter connection_timeout of the URL must be 1 to 86400000, in milliseconds",
		"amqp://host?connection_timeout=5s":                     "the parameter connection_timeout of the URL must be 1 to 86400000, in milliseconds",
		"amqp://host?channel_max=65536":                         "the parameter channel_max of the URL must be 0 to 65535",
		"amqp://host?auth_mechanism=scram":                      "the parameter auth_mechanism of the URL must be plain, amqplain or external, given once for each",
		"amqp://host?auth_mechanism=plain,external":             "the parameter auth_mechanism of the URL must be plain, amqplain or external, given once for each",
		"amqp://host?auth_mechanism=plain&auth_mechanism=scram": "the parameter auth_mechanism of the URL must be plain, amqplain or external, given once for each",
		"amqp://host?heartbeats=5":                              "a parameter of the URL is unknown: is heartbeat meant?",
		"amqp://host?Heartbeat=5":                               "a parameter of the URL is unknown: is heartbeat meant?",
		"amqp://host?connect_timeout=5":                         "a parameter of the URL is unknown: is connection_timeout meant?",
		"amqps://host?cacertFile=/x":                            "a parameter of the URL is unknown: is cacertfile meant?",
		"amqp://host?Xq9z=5":                                    "a parameter of the URL is unknown (not shown, it may be of a password): known are auth_mechanism, cacertfile, certfile, channel_max, connection_timeout, heartbeat, keyfile, server_name_indication, verify",
		"amqp://host?frame_max=4096":                            "the parameter frame_max of the URL has no effect here",
		"amqp://host?prefetch=4096":                             "the parameter prefetch of the URL has no effect: use WithPrefetch",
		"amqp://host?heartbeat=5;channel_max=7":                 "the parameters of the URL are malformed",
		"amqps://host?certfile=/c":                              "certfile and keyfile of the URL go together: a client certificate needs its key",
		"amqps://host?keyfile=/k":                               "certfile and keyfile of the URL go together",
		"amqp://host?cacertfile=/c":                             "the parameter cacertfile of the URL has no effect without TLS: use amqps",
		"amqp://host?verify=verify_peer":                        "the parameter verify of the URL has no effect without TLS: use amqps",
		"amqps://host?verify=verify_none":                       "the parameter verify of the URL must be verify_peer, which is always so here",
		"amqp://host?heartbeat=0&channel_max=x":                 "the parameter channel_max of the URL must be 0 to 65535; the parameter heartbeat of the URL must be 1 to 600",
	} {
		u, wrong := Parse(text)
		assert.Zero(t, u, text)
		assert.Contains(t, wrong, want, text)
		assert.NotContains(t, wrong, secretPiece, text)
		assert.NotContains(t, wrong, "\n", text)
	}
}

// FuzzURL puts a secret into a URL, percent-encoded or not. A URL that is refused shows no piece of
// it, and one that is accepted is dialled at its host, with its user and password.
func FuzzURL(f *testing.F) {
	for _, password := range []string{"", "@", "#", "?", "/", "%", ":", " ", "@/", "@a?heartbeat=", "/@b:1", "%40", "%2", "a@b,", ",amqp://", "$(X)", "[::1]/", "\\", "\x00", "ä"} {
		f.Add(password, "mq.example:5672", "/vhost?heartbeat=5")
	}
	f.Add("@a/", "mq.example", "")
	f.Add("x", "[::1]", "?certfile=@")
	f.Add("x", "a,b", "/@")
	f.Add("?", "u@h", "//")
	f.Fuzz(func(t *testing.T, piece, host, tail string) {
		const mark = "Xq9canaryZ7"
		password := mark + piece + mark
		for _, written := range []string{password, url.QueryEscape(password)} {
			u, wrong := Parse("amqp://" + mark + ":" + written + "@" + host + tail)
			if wrong != "" {
				assert.NotContains(t, wrong, mark)
				continue
			}
			assert.NotContains(t, u.Host, mark)
			decoded, err := url.PathUnescape(written)
			require.NoError(t, err)
			assert.Equal(t, mark, u.Username)
			assert.Equal(t, decoded, u.Password)
			if name := strings.TrimSuffix(host, ":5672"); name != "" && only(name, "-.") && (tail == "" || tail[0] == '/' || tail[0] == '?') {
				assert.Equal(t, name, u.Host)
				assert.Equal(t, 5672, u.Port)
			}
		}
	})
}
