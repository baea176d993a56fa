package steadymqtest_test

import (
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/steadymq/steadymq/steadymqtest"
)

// BenchmarkDeliverAck is a message published, delivered to the plain driver and acknowledged, in real CPU time.
func BenchmarkDeliverAck(b *testing.B) {
	b.Run("real time", func(b *testing.B) { deliverAck(b, b.N) })
	b.Run("bubble", func(b *testing.B) {
		b.ReportAllocs()
		synctestRun(b, func() { deliverAck(b, b.N) })
	})
}

// synctestRun runs f in a bubble; testing/synctest wants a *testing.T, which a benchmark does not have.
func synctestRun(b *testing.B, f func()) {
	ok := testing.RunTests(func(string, string) (bool, error) { return true, nil }, []testing.InternalTest{{
		Name: "bubble", F: func(t *testing.T) { synctest.Test(t, func(*testing.T) { f() }) },
	}})
	if !ok {
		b.Fatal("bubble failed")
	}
}

func deliverAck(tb testing.TB, n int) {
	broker := steadymqtest.NewBroker(nil)
	defer broker.Close()
	broker.DeclareQueue("q", steadymqtest.QueueOptions{})
	conn, err := amqp.DialConfig(broker.URL, amqp.Config{Dial: broker.Dial, Heartbeat: 10 * time.Second})
	if err != nil {
		tb.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		tb.Fatal(err)
	}
	if err := ch.Qos(64, 0, false); err != nil {
		tb.Fatal(err)
	}
	ds, err := ch.Consume("q", "", false, false, false, false, nil)
	if err != nil {
		tb.Fatal(err)
	}
	body := string(make([]byte, 100))
	bodies := make([]string, 100)
	for i := range bodies {
		bodies[i] = body
	}
	for done := 0; done < n; {
		batch := min(len(bodies), n-done)
		broker.Publish("q", bodies[:batch]...)
		for range batch {
			d := <-ds
			if err := d.Ack(false); err != nil {
				tb.Fatal(err)
			}
		}
		done += batch
	}
}
