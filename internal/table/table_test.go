package table_test

import (
	"encoding/binary"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/table"
)

// every has a value of every type that AMQP carries.
func every() amqp.Table {
	return amqp.Table{
		"nil": nil, "true": true, "false": false, "byte": byte(1), "int8": int8(-1), "int16": int16(-1), "uint16": uint16(1),
		"int": -1, "int32": int32(-1), "uint32": uint32(1), "int64": int64(-1), "float32": float32(1), "float64": 1.0,
		"decimal": amqp.Decimal{Scale: 1, Value: 1}, "time": time.Now(), "string": "text ä\x00", "bytes": []byte{0, 1}, "no bytes": []byte(nil),
		"nil table": amqp.Table(nil), "nil array": []any(nil), "": "", strings.Repeat("k", table.MaxShortString): strings.Repeat("v", 1000),
		"deep": []any{amqp.Table{"a": []any{amqp.Table{}, 1, "b", nil}, "c": int64(1)}, []any{[]byte{1}, []any{}}},
	}
}

// encoded returns how many bytes the driver writes for t. It logs in with t among its properties,
// and adds capabilities to it.
func encoded(t *testing.T, properties amqp.Table) int {
	near, far := net.Pipe()
	size := make(chan int, 1)
	go func() {
		defer close(size)
		defer far.Close()
		const startOK = 7 + 4 // the head of a frame, and which method it is
		start := "\x00\x0a\x00\x0a\x00\x09\x00\x00\x00\x00\x00\x00\x00\x05PLAIN\x00\x00\x00\x05en_US"
		head := make([]byte, len("AMQP")+4)
		if _, err := io.ReadFull(far, head); err != nil {
			return
		}
		_, _ = io.WriteString(far, "\x01\x00\x00\x00\x00\x00"+string(rune(len(start)))+start+"\xce")
		answer := make([]byte, startOK+4)
		if _, err := io.ReadFull(far, answer); err == nil {
			size <- 4 + int(binary.BigEndian.Uint32(answer[startOK:]))
		}
	}()
	_, err := amqp.Open(near, amqp.Config{Properties: properties, SASL: []amqp.Authentication{&amqp.PlainAuth{}}})
	require.Error(t, err, "the peer leaves in the middle of the login")
	n, ok := <-size
	require.True(t, ok, "the login has not been read")
	return n
}

func TestSizeIsWhatTheDriverWrites(t *testing.T) {
	for key, value := range every() {
		properties := amqp.Table{key: value}
		assert.Equal(t, encoded(t, properties), table.Size(properties), "%.20q", key)
	}
	properties, problems := table.Copy(every())
	assert.Empty(t, problems)
	assert.Equal(t, encoded(t, properties), table.Size(properties))
	assert.Equal(t, 4, table.Size(nil))
}

func TestCopyIsEqualAndSharesNothing(t *testing.T) {
	given := amqp.Table{"bytes": []byte{1}, "array": []any{1, []byte{1}}, "table": amqp.Table{"a": 1}, "text": "a", "large": 5_000_000_000}
	copied, problems := table.Copy(given)
	want := amqp.Table{"bytes": []byte{1}, "array": []any{1, []byte{1}}, "table": amqp.Table{"a": 1}, "text": "a", "large": int64(5_000_000_000)}
	assert.Empty(t, problems)
	assert.Equal(t, want, copied)

	given["bytes"].([]byte)[0] = 2
	given["array"].([]any)[1].([]byte)[0] = 2
	given["array"].([]any)[0] = 2
	given["table"].(amqp.Table)["a"] = 2
	given["text"] = "b"
	assert.Equal(t, want, copied)
}

func TestProblemsAreToldWithTheirPlace(t *testing.T) {
	_, problems := table.Copy(amqp.Table{"a": uint(1), "b": []any{1, amqp.Table{"c": time.Unix(-1, 0)}}, "good": 1})
	require.Len(t, problems, 2)
	assert.True(t, strings.HasPrefix(problems[0], `key "a" holds a value of type uint, which AMQP cannot carry; `), problems[0])
	assert.Equal(t, `key "b", element 1, key "c" holds a time before 1970, which AMQP cannot carry`, problems[1])
}

func TestShortStringIsShortAndUTF8(t *testing.T) {
	assert.Empty(t, table.ShortString(""))
	assert.Empty(t, table.ShortString(strings.Repeat("k", 255)))
	assert.Equal(t, "has 256 bytes, AMQP allows 255", table.ShortString(strings.Repeat("k", 256)))
	assert.Equal(t, `is no UTF-8, which RabbitMQ refuses: "a\xff"`, table.ShortString("a\xff"))
}
