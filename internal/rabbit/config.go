package rabbit

import (
	"fmt"
	"strings"
	"time"
)

// Generation names a RabbitMQ release line that signals failures in its own way.
type Generation string

// The generations that can be asked for. Any takes whatever is at hand first.
const (
	Any    Generation = ""
	Gen310 Generation = "3.10"
	Gen40  Generation = "4.0"
	Gen43  Generation = "4.3"
)

// Config is what a test may ask of its broker. The zero value takes any generation with its own defaults.
type Config struct {
	Generation Generation
	// ConsumerTimeout is the broker-wide limit on an unsettled delivery.
	ConsumerTimeout time.Duration
	// ChannelTick is how often a channel looks for deliveries past that limit: 60 s if left out, too long for a test.
	ChannelTick time.Duration
	// Heartbeat is what the broker proposes.
	Heartbeat time.Duration
	// NetTick is how long a cluster node waits before it calls a silent peer down: 60 s if left out.
	NetTick time.Duration
	// Plugins are enabled before the node starts.
	Plugins []string
	// TLS gives the node a second listener, see Broker.TLSAddr.
	TLS *TLS
	// Conf holds more lines for rabbitmq.conf.
	Conf []string
	// Advanced holds more `{app, [...]}` terms for advanced.config.
	Advanced []string
}

// TLS is what a broker shows its clients, as PEM.
type TLS struct{ Authority, Certificate, Key []byte }

// tlsFiles are the names of the parts of TLS in the node's directory.
func (c Config) tlsFiles() map[string][]byte {
	if c.TLS == nil {
		return nil
	}
	return map[string][]byte{"authority.pem": c.TLS.Authority, "certificate.pem": c.TLS.Certificate, "key.pem": c.TLS.Key}
}

// rabbitConf writes rabbitmq.conf. The guest user may come from anywhere because a container sees its host as a stranger.
func (c Config) rabbitConf(listen, listenTLS, dir string) string {
	lines := []string{
		"listeners.tcp.default = " + listen,
		"loopback_users.guest = false",
		"log.console = true",
		"log.console.level = info",
	}
	if c.ConsumerTimeout > 0 {
		lines = append(lines, fmt.Sprintf("consumer_timeout = %d", c.ConsumerTimeout.Milliseconds()))
	}
	if c.Heartbeat > 0 {
		lines = append(lines, fmt.Sprintf("heartbeat = %d", int(c.Heartbeat.Seconds())))
	}
	if c.TLS != nil {
		lines = append(lines,
			"listeners.ssl.default = "+listenTLS,
			"ssl_options.cacertfile = "+dir+"/authority.pem",
			"ssl_options.certfile = "+dir+"/certificate.pem",
			"ssl_options.keyfile = "+dir+"/key.pem",
			"ssl_options.verify = verify_none", // of clients
			"ssl_options.fail_if_no_peer_cert = false")
	}
	return strings.Join(append(lines, c.Conf...), "\n") + "\n"
}

// enabledPlugins writes the file of that name.
func (c Config) enabledPlugins() string { return "[" + strings.Join(c.Plugins, ",") + "].\n" }

// advancedConf writes advanced.config, the only place for settings rabbitmq.conf has no name for.
func (c Config) advancedConf() string {
	terms := append([]string(nil), c.Advanced...)
	if c.ChannelTick > 0 {
		terms = append(terms, fmt.Sprintf("{rabbit, [{channel_tick_interval, %d}]}", c.ChannelTick.Milliseconds()))
	}
	if c.NetTick > 0 {
		terms = append(terms, fmt.Sprintf("{kernel, [{net_ticktime, %d}]}", int(c.NetTick.Seconds())))
	}
	return "[" + strings.Join(terms, ",\n ") + "].\n"
}
