package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/steadymqtest"
)

func TestStoresKeepWhatWasSavedLast(t *testing.T) {
	for name, store := range map[string]steadymq.OffsetStore{
		"file": FileStore{t.TempDir()},
		"sql":  SQLStore{newDatabase(t).open()},
	} {
		t.Run(name, func(t *testing.T) {
			for _, stream := range []string{"log", "../a/b", ".."} {
				_, found, err := store.Load(t.Context(), stream)
				require.NoError(t, err)
				assert.False(t, found)
				for _, next := range []int64{0, 7, 1 << 40, 3} { // lower: a stream made anew
					require.NoError(t, store.Save(t.Context(), stream, next))
					got, found, err := store.Load(t.Context(), stream)
					require.NoError(t, err)
					assert.True(t, found)
					assert.Equal(t, next, got)
				}
			}
		})
	}
}

func TestFileThatIsNoPlaceIsAnError(t *testing.T) {
	f := FileStore{t.TempDir()}
	require.NoError(t, os.WriteFile(f.path("log"), nil, 0o600))
	_, _, err := f.Load(t.Context(), "log")
	require.Error(t, err, "a file that was cut off is not the beginning of the stream")
	require.Error(t, FileStore{filepath.Join(f.Dir, "none")}.Save(t.Context(), "log", 1))
	require.NoError(t, f.Save(t.Context(), "log", 1))
	all, err := os.ReadDir(f.Dir)
	require.NoError(t, err)
	assert.Len(t, all, 1, "nothing is left of a save")
}

// A process that is killed before a save gets messages again, which take effect once.
func TestOnceTakesEffectOnceThoughTheLastSaveIsMissing(t *testing.T) {
	db := newDatabase(t)
	store := SQLStore{db.open()}
	broker := steadymqtest.NewBroker(t)
	broker.DeclareQueue("log", steadymqtest.QueueOptions{Type: "stream"})
	failing := broker.Publish("log", make([]string, 20)...)[7]
	effects, calls := map[string]int{}, 0
	for range 3 {
		ctx, stop := context.WithCancel(t.Context())
		seen := 0
		work := store.Once(func(_ context.Context, _ *sql.Tx, d *steadymq.Delivery) error {
			if d.MessageId == failing && d.Attempt() == 1 {
				return errors.New("not yet")
			}
			effects[d.MessageId]++
			return nil
		})
		require.NoError(t, steadymq.Consume(ctx, broker.URL, "log", func(ctx context.Context, d *steadymq.Delivery) error {
			err := work(ctx, d)
			if calls++; err == nil {
				seen++
			}
			if seen == 20 {
				stop()
			}
			return err
		}, steadymq.WithDialer(broker.Dialer()), steadymq.WithConsumeArgs(amqp.Table{"x-stream-offset": "first"}),
			steadymq.WithStreamOffsets(neverSaves{store})))
	}
	assert.Len(t, effects, 20)
	for id, n := range effects {
		assert.Equal(t, 1, n, id)
	}
	assert.GreaterOrEqual(t, calls, 60)
	require.NoError(t, store.Save(t.Context(), "log", 15))
	assert.Len(t, db.handled, 5, "what is before the place never comes again")
}

// neverSaves is a process that is killed in time.
type neverSaves struct{ SQLStore }

func (neverSaves) Save(context.Context, string, int64) error { return errors.New("killed") }

// database is as much of one as the statements of SQLStore need.
type database struct {
	t       *testing.T
	mu      sync.Mutex
	places  map[string]int64
	handled map[string]int64 // stream and message -> at
}

func newDatabase(t *testing.T) *database {
	return &database{t: t, places: map[string]int64{}, handled: map[string]int64{}}
}

func (b *database) open() *sql.DB {
	db := sql.OpenDB(b)
	b.t.Cleanup(func() { db.Close() })
	return db
}

func (b *database) Connect(context.Context) (driver.Conn, error) { return &session{database: b}, nil }
func (b *database) Driver() driver.Driver                        { return nil }

// session is a connection of the database; a transaction that is not committed is undone.
type session struct {
	*database
	undo func()
}

func (s *session) Prepare(string) (driver.Stmt, error) { return nil, errors.New("not prepared") }
func (s *session) Close() error                        { return nil }

func (s *session) Begin() (driver.Tx, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	places, handled := maps.Clone(s.places), maps.Clone(s.handled)
	s.undo = func() { s.places, s.handled = places, handled }
	return s, nil
}

func (s *session) Commit() error { s.undo = nil; return nil }

func (s *session) Rollback() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.undo()
	return nil
}

func (s *session) ExecContext(_ context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	stream := args[0].Value.(string)
	switch {
	case strings.HasPrefix(query, "INSERT INTO places"):
		s.places[stream] = args[1].Value.(int64)
	case strings.HasPrefix(query, "INSERT INTO handled"):
		key := stream + " " + args[1].Value.(string)
		if _, ok := s.handled[key]; ok {
			return driver.RowsAffected(0), nil
		}
		s.handled[key] = args[2].Value.(int64)
	case strings.HasPrefix(query, "DELETE FROM handled"):
		maps.DeleteFunc(s.handled, func(key string, at int64) bool {
			return strings.HasPrefix(key, stream+" ") && at < args[1].Value.(int64)
		})
	default:
		return nil, errors.New(query)
	}
	return driver.RowsAffected(1), nil
}

func (s *session) QueryContext(_ context.Context, _ string, args []driver.NamedValue) (driver.Rows, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next, ok := s.places[args[0].Value.(string)]
	return &row{next, !ok}, nil
}

// row is what a SELECT finds.
type row struct {
	next int64
	read bool
}

func (r *row) Columns() []string { return []string{"next"} }
func (r *row) Close() error      { return nil }

func (r *row) Next(to []driver.Value) error {
	if r.read {
		return io.EOF
	}
	to[0], r.read = r.next, true
	return nil
}
