package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/bench/internal/replay"
)

// These give benchstat something to compare two commits by:
//
//	go test -run '^$' -bench . -count 10 ./bench | tee new.txt
//	benchstat old.txt new.txt
//
// The difference between the lines of one benchmark is what the library adds.

// deaf acknowledges nothing, at no cost.
type deaf struct{}

func (deaf) Ack(uint64, bool) error        { return nil }
func (deaf) Nack(uint64, bool, bool) error { return nil }
func (deaf) Reject(uint64, bool) error     { return nil }

// BenchmarkSettle is one delivery made and acknowledged, without a session.
func BenchmarkSettle(b *testing.B) {
	m := amqp.Delivery{Acknowledger: deaf{}, DeliveryTag: 1, Body: make([]byte, 100)}
	b.Run("consumer=driver", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := m.Ack(false); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("consumer=steadymq", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := steadymq.NewDelivery(m).Ack(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkFence is the refusal of a second settlement and of multiple=true.
func BenchmarkFence(b *testing.B) {
	d := steadymq.NewDelivery(amqp.Delivery{Acknowledger: deaf{}, DeliveryTag: 1})
	if err := d.Ack(); err != nil {
		b.Fatal(err)
	}
	b.Run("refuse=settled", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if d.Ack() == nil {
				b.Fatal("settled twice")
			}
		}
	})
	b.Run("refuse=multiple", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if d.Delivery.Ack(true) == nil {
				b.Fatal("multiple=true passed")
			}
		}
	})
}

// BenchmarkDispatch is a delivery's whole way, from the wire to the handler
// and its ack back to the wire, over a connection in memory: no system call
// hides what the code costs. The server's part is the same for all and
// allocates nothing. The work is spread over several goroutines, so cpu-ns/op,
// what all of them used, says more than ns/op.
func BenchmarkDispatch(b *testing.B) {
	for _, workers := range []int{1, 16} {
		b.Run(fmt.Sprintf("workers=%d/consumer=driver", workers), func(b *testing.B) {
			dispatch(b, driverOver, workers)
		})
		b.Run(fmt.Sprintf("workers=%d/consumer=steadymq", workers), func(b *testing.B) {
			dispatch(b, steadymqOver, workers)
		})
	}
}

// BenchmarkPolicy is BenchmarkDispatch under WithRetry, without a failure: what the policy costs the
// messages that do not need it.
func BenchmarkPolicy(b *testing.B) {
	policies := map[string][]steadymq.Option{
		"without": nil,
		"with":    {steadymq.WithRetry(steadymq.Retry{Attempts: 3, Delays: []time.Duration{time.Second}, Park: "parked"})},
	}
	for _, workers := range []int{1, 16} {
		for name, opts := range policies {
			b.Run(fmt.Sprintf("workers=%d/retry=%s", workers, name), func(b *testing.B) {
				dispatch(b, func(ctx context.Context, dial dialFunc, t target, each func([]byte)) error {
					t.URL = "amqp://guest:guest@memory"
					return steadyWith(ctx, t, each, append(slices.Clone(opts), steadymq.WithDialer(dial))...)
				}, workers)
			})
		}
	}
}

// BenchmarkBatch is BenchmarkDispatch with handlers of batches.
func BenchmarkBatch(b *testing.B) {
	for _, workers := range []int{1, 16} {
		b.Run(fmt.Sprintf("workers=%d/handler=single", workers), func(b *testing.B) { dispatch(b, steadymqOver, workers) })
		b.Run(fmt.Sprintf("workers=%d/handler=batch", workers), func(b *testing.B) {
			dispatch(b, func(ctx context.Context, dial dialFunc, t target, each func([]byte)) error {
				t.URL = "amqp://guest:guest@memory"
				return steadyBatchWith(ctx, t, each, steadymq.WithDialer(dial))
			}, workers)
		})
	}
}

type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// BenchmarkKeys is BenchmarkDispatch under WithOrderingKey, with keys that come equally often. The
// ratio of the two lines is what order costs.
func BenchmarkKeys(b *testing.B) {
	keys := make([]string, 1009)
	for i := range keys {
		keys[i] = fmt.Sprint("customer ", i)
	}
	orders := map[string][]steadymq.Option{
		"without": nil,
		"with": {steadymq.WithOrderingKey(func(d *steadymq.Delivery) string {
			return keys[d.DeliveryTag%uint64(len(keys))]
		})},
	}
	for name, opts := range orders {
		b.Run(fmt.Sprintf("workers=64/order=%s", name), func(b *testing.B) {
			dispatch(b, func(ctx context.Context, dial dialFunc, t target, each func([]byte)) error {
				t.URL = "amqp://guest:guest@memory"
				return steadyWith(ctx, t, each, append(slices.Clone(opts), steadymq.WithDialer(dial))...)
			}, 64)
		})
	}
}

// dispatch measures until the handler has seen b.N messages.
func dispatch(b *testing.B, consume func(context.Context, dialFunc, target, func([]byte)) error, workers int) {
	client, server := memoryPipe()
	go func() { _ = replay.ServeConn(server) }()
	dial := func(context.Context, string, string) (net.Conn, error) { return client, nil }

	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	var seen atomic.Int64
	reached := make(chan struct{})
	warm := make(chan struct{})
	total := int64(b.N) + 1000
	ended := make(chan error, 1)
	go func() {
		ended <- consume(ctx, dial, target{Queue: "size=100", Prefetch: 256, Workers: workers}, func([]byte) {
			switch seen.Add(1) {
			case 1000:
				close(warm)
			case total:
				close(reached)
			}
		})
	}()
	await(b, warm, ended)
	b.ReportAllocs()
	user, system := replay.CPUTime()
	b.ResetTimer()
	await(b, reached, ended)
	b.StopTimer()
	userAfter, systemAfter := replay.CPUTime()
	b.ReportMetric(float64(userAfter+systemAfter-user-system)/float64(b.N), "cpu-ns/op")
	cancel()
	if err := <-ended; err != nil {
		b.Fatal(err)
	}
}

func await(b *testing.B, reached <-chan struct{}, ended <-chan error) {
	select {
	case <-reached:
	case err := <-ended:
		b.Fatal("the consumer ended: ", err)
	}
}

func driverOver(ctx context.Context, dial dialFunc, t target, each func([]byte)) error {
	nc, err := dial(ctx, "", "")
	if err != nil {
		return err
	}
	conn, err := amqp.Open(nc, amqp.Config{SASL: []amqp.Authentication{&amqp.PlainAuth{}}, Locale: "en_US"})
	if err != nil {
		return err
	}
	deliveries, err := subscribe(conn, t, false)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	work(deliveries, t.Workers, acknowledge(ackEach, t.Prefetch), each)
	return nil
}

func steadymqOver(ctx context.Context, dial dialFunc, t target, each func([]byte)) error {
	t.URL = "amqp://guest:guest@memory"
	return steadyWith(ctx, t, each, steadymq.WithDialer(dial))
}

// memoryPipe is two ends of a connection whose writes never block.
func memoryPipe() (client, server net.Conn) {
	up, down := newStream(), newStream()
	return &end{in: down, out: up}, &end{in: up, out: down}
}

// stream carries the bytes of one direction.
type stream struct {
	mu     sync.Mutex
	some   sync.Cond
	buf    []byte
	read   int
	closed bool
}

func newStream() *stream {
	s := &stream{}
	s.some.L = &s.mu
	return s
}

func (s *stream) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.read == len(s.buf) {
		if s.closed {
			return 0, io.EOF
		}
		s.some.Wait()
	}
	n := copy(p, s.buf[s.read:])
	if s.read += n; s.read == len(s.buf) {
		s.buf, s.read = s.buf[:0], 0
	}
	return n, nil
}

func (s *stream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, io.ErrClosedPipe
	}
	s.buf = append(s.buf, p...)
	s.some.Signal()
	return len(p), nil
}

func (s *stream) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.some.Broadcast()
}

// end is one side of a memoryPipe. It has no deadlines: nothing here is late.
type end struct{ in, out *stream }

func (e *end) Read(p []byte) (int, error)  { return e.in.Read(p) }
func (e *end) Write(p []byte) (int, error) { return e.out.Write(p) }

func (e *end) Close() error {
	e.in.Close()
	e.out.Close()
	return nil
}

func (e *end) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (e *end) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (e *end) SetDeadline(time.Time) error      { return nil }
func (e *end) SetReadDeadline(time.Time) error  { return nil }
func (e *end) SetWriteDeadline(time.Time) error { return nil }
