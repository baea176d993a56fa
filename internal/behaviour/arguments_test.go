package behaviour_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
	"github.com/steadymq/steadymq/steadymqtest"
)

// named is a type that the driver does not know, though it knows what it is made of.
type named string

func TestWhatAMQPCannotCarryIsRefusedWithItsPlace(t *testing.T) {
	long, cut := strings.Repeat("k", 256), "a\xffb"
	bound := func(b ...steadymq.Binding) steadymq.Option { return steadymq.WithQueue(steadymq.Queue{Bindings: b}) }
	cyclic, row := amqp.Table{}, make([]any, 2)
	cyclic["a"], cyclic["b"] = cyclic, cyclic
	row[0], row[1] = row, row
	for reason, option := range map[string]steadymq.Option{
		`WithQueue: Bindings[1].Args: key "x" holds a value of type chan int`: bound(
			steadymq.Binding{Exchange: "e"}, steadymq.Binding{Exchange: "e", Args: amqp.Table{"x": make(chan int)}}),
		`WithQueue: Args: key "a", key "b", element 1 holds a value of type uint64`: steadymq.WithQueue(steadymq.Queue{
			Args: amqp.Table{"a": amqp.Table{"b": []any{1, uint64(1)}}},
		}),
		`WithQueue: Exchange.Args: key "x" holds a value of type map[string]interface {}`: steadymq.WithQueue(steadymq.Queue{
			Exchange: &steadymq.Exchange{Name: "e", Args: amqp.Table{"x": map[string]any{}}}, Bindings: []steadymq.Binding{{}},
		}),
		`WithConsumeArgs: key "x" holds a value of type []string`:             steadymq.WithConsumeArgs(amqp.Table{"x": []string{"a"}}),
		`WithConsumeArgs: key "x" holds a value of type behaviour_test.named`: steadymq.WithConsumeArgs(amqp.Table{"x": named("a")}),
		`WithConsumeArgs: key "x" holds a value of type time.Duration`:        steadymq.WithConsumeArgs(amqp.Table{"x": time.Second}),
		`WithConsumeArgs: key "x", element 0 holds a time before 1970`:        steadymq.WithConsumeArgs(amqp.Table{"x": []any{time.Unix(-1, 0)}}),
		`WithConsumeArgs: key "x", key "kkkkkkkkkkkkkkkkkkkk"... has 256`:     steadymq.WithConsumeArgs(amqp.Table{"x": amqp.Table{long: 1}}),
		`WithConsumeArgs: has more than`:                                      steadymq.WithConsumeArgs(amqp.Table{"x": strings.Repeat("x", 128<<10)}),
		`WithConsumeArgs: nests tables and arrays`:                            steadymq.WithConsumeArgs(cyclic),
		`WithQueue: Bindings[0].Args: nests tables and arrays`:                bound(steadymq.Binding{Exchange: "e", Args: amqp.Table{"x": row}}),
		`WithQueue: Bindings[0].Key has 256 bytes`:                            bound(steadymq.Binding{Exchange: "e", Key: long}),
		`WithQueue: Bindings[0].Exchange has 256 bytes`:                       bound(steadymq.Binding{Exchange: long}),
		`WithQueue: Bindings[0].Key is no UTF-8`:                              bound(steadymq.Binding{Exchange: "e", Key: cut}),
		`WithQueue: DeadLetter.Queue is no UTF-8`:                             steadymq.WithQueue(steadymq.Queue{DeadLetter: &steadymq.DeadLetter{Queue: cut}}),
		`WithConsumerTag: the tag is no UTF-8`:                                steadymq.WithConsumerTag(cut),
	} {
		_, err := steadymq.New("amqp://h/", rig.Queue, option)
		if assert.ErrorContains(t, err, reason) {
			assert.Equal(t, 1, strings.Count(err.Error(), "steadymq: "), "said once: %v", err)
			assert.NotContains(t, err.Error(), "\n")
		}
	}
	for reason, name := range map[string]string{
		"the queue name has 256 bytes": long,
		"the queue name is no UTF-8":   cut,
		"has a line break":             "orders\r\n", // as it is read from a file
	} {
		_, err := steadymq.New("amqp://h/", name)
		assert.ErrorContains(t, err, reason)
	}
	_, err := steadymq.New("amqp://h/%ff", rig.Queue)
	assert.ErrorContains(t, err, "virtual host in the URL is no UTF-8")
}

func TestEveryProblemOfATableIsTold(t *testing.T) {
	_, err := steadymq.New("amqp://h/", rig.Queue, steadymq.WithQueue(steadymq.Queue{
		Args:     amqp.Table{"a": uint(1), "b": amqp.Table{"c": struct{}{}}, "good": 1},
		Bindings: []steadymq.Binding{{Exchange: "e", Args: amqp.Table{"d": []any{new(int)}}}},
	}))
	for _, place := range []string{`Args: key "a"`, `Args: key "b", key "c"`, `Bindings[0].Args: key "d", element 0`} {
		assert.ErrorContains(t, err, place)
	}
	assert.NotContains(t, err.Error(), "good")
}

func TestWhatAMQPCarriesIsTaken(t *testing.T) {
	all := amqp.Table{
		"nil": nil, "bool": true, "byte": byte(1), "int8": int8(-1), "int16": int16(-1), "int32": int32(-1), "int64": int64(-1), "int": -1,
		"uint16": uint16(1), "uint32": uint32(1), "float32": float32(1), "float64": 1.0, "decimal": amqp.Decimal{Scale: 1, Value: 1},
		"string": "a\x00\xff", "bytes": []byte{0}, "time": time.Now(), "nil table": amqp.Table(nil), "nil array": []any(nil), "": "",
		strings.Repeat("k", 255): strings.Repeat("v", 100_000), "deep": []any{amqp.Table{"a": []any{amqp.Table{}}}},
	}
	_, err := steadymq.New("amqp://h/", strings.Repeat("q", 255), steadymq.WithConsumeArgs(all), steadymq.WithQueue(steadymq.Queue{
		Args: all, Bindings: []steadymq.Binding{{Exchange: "e\x00\n", Key: strings.Repeat("ä", 127), Args: all}},
	}))
	assert.NoError(t, err)
}

// sent is a dialer that keeps all that the client writes, and where it dials.
type sent struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu        sync.Mutex
	bytes     bytes.Buffer
	addresses []string
}

func (s *sent) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	s.mu.Lock()
	s.addresses = append(s.addresses, address)
	s.mu.Unlock()
	conn, err := s.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &sentConn{conn, s}, nil
}

func (s *sent) all() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes.String()
}

type sentConn struct {
	net.Conn
	to *sent
}

func (c *sentConn) Write(p []byte) (int, error) {
	c.to.mu.Lock()
	c.to.bytes.Write(p)
	c.to.mu.Unlock()
	return c.Conn.Write(p)
}

func TestWhatNewWasGivenMayChangeAfterwards(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		table := func(n int) amqp.Table {
			return amqp.Table{
				fmt.Sprintf("given-text-%d", n): "given-value", "t": amqp.Table{"t": amqp.Table{"t": fmt.Sprintf("given-deep-%d", n)}},
				"a": []any{[]any{fmt.Sprintf("given-element-%d", n)}, amqp.Table{"t": fmt.Sprintf("given-inner-%d", n)}, []byte("given-bytes")},
				"b": []byte(fmt.Sprintf("given-bytes-%d", n)),
			}
		}
		spoil := func(t amqp.Table) {
			t["changed"] = "changed"
			t["t"].(amqp.Table)["t"].(amqp.Table)["t"] = "changed"
			array := t["a"].([]any)
			array[0].([]any)[0], array[1].(amqp.Table)["t"] = "changed", "changed"
			copy(array[2].([]byte), "changed")
			array[2] = "changed"
			copy(t["b"].([]byte), "changed")
		}
		tables := []amqp.Table{table(1), table(2), table(3), table(4)}
		exchange := &steadymq.Exchange{Name: "given-exchange", Args: tables[1]}
		bindings := []steadymq.Binding{{Key: "given-key", Args: tables[2]}}
		dead := &steadymq.DeadLetter{Queue: "given-dead"}
		logins := []amqp.Authentication{&amqp.PlainAuth{Username: "app", Password: rig.Password}}
		passed := false
		middleware := []steadymq.Middleware{func(next steadymq.Handler) steadymq.Handler {
			passed = true
			return next
		}}
		wire := &sent{dial: r.Broker.Dialer()}
		r.Consumer = r.New(
			steadymq.WithDialer(wire.DialContext), steadymq.WithConsumeArgs(tables[3]), steadymq.WithSASL(logins...), steadymq.WithMiddleware(middleware...),
			steadymq.WithQueue(steadymq.Queue{Type: "classic", Args: tables[0], Exchange: exchange, Bindings: bindings, DeadLetter: dead}))

		for _, t := range tables {
			spoil(t)
		}
		exchange.Name, dead.Queue = "changed", "changed"
		bindings[0] = steadymq.Binding{Key: "changed", Exchange: "changed"}
		logins[0] = &amqp.PlainAuth{Username: "changed", Password: "changed"}
		middleware[0] = nil

		r.Broker.DeleteQueue(rig.Queue)
		r.Start(rig.Ack)
		r.Wait(time.Second)
		require.Equal(r, steadymq.Consuming, r.Consumer.State())
		assert.True(r, passed)
		assert.NotContains(r, wire.all(), "changed")
		for n := 1; n <= 4; n++ {
			for _, what := range []string{"text", "deep", "element", "inner", "bytes"} {
				assert.Contains(r, wire.all(), fmt.Sprintf("given-%s-%d", what, n))
			}
		}
		for _, what := range []string{"given-exchange", "given-key", "given-dead"} {
			assert.Contains(r, wire.all(), what)
		}
	})
}

func TestListOfURLsMayChangeAfterwards(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		wire := &sent{dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("nobody is there") }}
		urls := []string{"amqp://given/"}
		r.Consumer = r.New(steadymq.WithDialer(wire.DialContext), steadymq.WithURLs(urls...))
		urls[0] = "amqp://changed/"
		r.Start(rig.Ack)
		r.Wait(time.Minute)
		assert.Contains(r, wire.addresses, "given:5672")
		assert.NotContains(r, wire.addresses, "changed:5672")
	})
}

func TestTLSConfigurationMayChangeAfterwards(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		config := r.Broker.TLSConfig()
		config.Certificates = make([]tls.Certificate, 1)
		config.RootCAs = config.RootCAs.Clone()
		r.Consumer = r.New(steadymq.WithTLSConfig(config))
		config.Certificates[0].Certificate = [][]byte{{1}}
		*config.RootCAs = *x509.NewCertPool()
		config.RootCAs, config.ServerName = x509.NewCertPool(), "changed.example"
		r.Start(rig.Ack)
		r.Wait(time.Second)
		assert.Equal(r, steadymq.Consuming, r.Consumer.State())
	}, steadymqtest.WithTLS())
}

// The driver sends the lower half of an int, and says nothing.
func TestNumbersArriveAsTheyWereGiven(t *testing.T) {
	rig.Bubble(t, func(r *rig.Rig) {
		wire := &sent{dial: r.Broker.Dialer()}
		r.Consuming(rig.Ack, steadymq.WithDialer(wire.DialContext), steadymq.WithConsumeArgs(amqp.Table{
			"x-large": 5_000_000_000, "x-small": -7, "x-in": []any{-5_000_000_000},
		}))
		for _, field := range []string{
			"\x07x-largel\x00\x00\x00\x01\x2a\x05\xf2\x00", "\x07x-smallI\xff\xff\xff\xf9", "\x04x-inA\x00\x00\x00\x09l\xff\xff\xff\xfe\xd5\xfa\x0e\x00",
		} {
			assert.Contains(r, wire.all(), field)
		}
	})
}
