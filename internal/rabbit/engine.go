package rabbit

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"reflect"

	"github.com/testcontainers/testcontainers-go"
)

// The engine is reached through testcontainers-go. The types of its requests belong to modules that this one does not require, and shall
// not: so they are inferred here, and their values come as JSON.

// withDocker opens a client for one call and closes it: idle connections of a kept one would look like a leak to the tests.
func withDocker(ctx context.Context, do func(*testcontainers.DockerClient) error) error {
	cli, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = cli.Close() }()
	return do(cli)
}

// engineCall is a call about one thing: a container, a network, an image.
func engineCall[O, R any](ctx context.Context, call func(context.Context, string, O) (R, error), name, options string) (result R, err error) {
	var o O
	if err := json.Unmarshal([]byte(options), &o); err != nil {
		return result, fmt.Errorf("rabbit: options %s: %w", options, err)
	}
	return call(ctx, name, o)
}

// engineAsk is a call about no thing in particular.
func engineAsk[O, R any](ctx context.Context, call func(context.Context, O) (R, error), options string) (result R, err error) {
	return engineCall(ctx, func(ctx context.Context, _ string, o O) (R, error) { return call(ctx, o) }, "", options)
}

// engineImport makes an image of a tar stream.
func engineImport[S, O, R any](ctx context.Context, call func(context.Context, S, string, O) (R, error), tar io.Reader, tag, options string) (result R, err error) {
	source := reflect.New(reflect.TypeFor[S]()).Elem()
	source.FieldByName("Source").Set(reflect.ValueOf(tar))
	source.FieldByName("SourceName").SetString("-")
	return engineCall(ctx, func(ctx context.Context, tag string, o O) (R, error) {
		return call(ctx, source.Interface().(S), tag, o)
	}, tag, options)
}

// engineConfig makes *modifier fill in what it is given, with the values of a JSON object.
func engineConfig[T any](modifier *func(*T), values any) {
	text, err := json.Marshal(values)
	*modifier = func(t *T) {
		if err == nil {
			err = json.Unmarshal(text, t)
		}
		if err != nil {
			panic(fmt.Sprintf("rabbit: container settings %s: %v", text, err)) // a slip in this package, not of a machine
		}
	}
}
