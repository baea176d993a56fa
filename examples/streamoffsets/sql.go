package main

import (
	"context"
	"database/sql"
	"errors"

	"github.com/steadymq/steadymq"
)

// SQLStore keeps the places in a database, in the dialect of PostgreSQL and SQLite:
//
//	CREATE TABLE places  (stream TEXT PRIMARY KEY, next BIGINT NOT NULL);
//	CREATE TABLE handled (stream TEXT, message TEXT, at BIGINT NOT NULL, PRIMARY KEY (stream, message));
//
// The first table is all that an OffsetStore needs. As any store does, it lags behind the work by up
// to a second, so a process that is killed gets some messages again. The second table is for those
// who want each message to take effect once, see Once.
type SQLStore struct{ DB *sql.DB }

var _ steadymq.OffsetStore = SQLStore{}

// Load implements [steadymq.OffsetStore].
func (s SQLStore) Load(ctx context.Context, stream string) (next int64, found bool, err error) {
	err = s.DB.QueryRowContext(ctx, "SELECT next FROM places WHERE stream = $1", stream).Scan(&next)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, false, nil
	}
	return next, err == nil, err
}

// Save implements [steadymq.OffsetStore]. Messages before the place never come again, so what Once
// has noted of them goes.
func (s SQLStore) Save(ctx context.Context, stream string, next int64) error {
	return s.within(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "INSERT INTO places (stream, next) VALUES ($1, $2) ON CONFLICT (stream) DO UPDATE SET next = excluded.next", stream, next)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "DELETE FROM handled WHERE stream = $1 AND at < $2", stream, next)
		return err
	})
}

// Once returns a handler whose work takes effect once for each message, whatever ends in between:
// in the transaction of the work it notes the message, and one that is noted already is a duplicate.
// The place alone cannot be saved in that transaction. It would have to be that of the slowest
// message under way, and with it a failed message that is tried again later would be left out.
//
// It goes by the id that the publisher gives each message, and not by its offset, since a stream
// that is made anew counts from 0 again.
func (s SQLStore) Once(work func(ctx context.Context, tx *sql.Tx, d *steadymq.Delivery) error) steadymq.Handler {
	return func(ctx context.Context, d *steadymq.Delivery) error {
		at, ok := d.Headers["x-stream-offset"].(int64)
		if !ok || d.MessageId == "" {
			return errors.New("the message has no id or is of no stream")
		}
		return s.within(ctx, func(tx *sql.Tx) error {
			noted, err := tx.ExecContext(ctx, "INSERT INTO handled (stream, message, at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", d.Queue(), d.MessageId, at)
			if err != nil {
				return err
			}
			if n, err := noted.RowsAffected(); err != nil || n == 0 {
				return err // of a duplicate: nil, which acks
			}
			return work(ctx, tx, d)
		})
	}
}

// within calls f in a transaction, and commits that unless f fails.
func (s SQLStore) within(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := s.DB.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // after a commit it does nothing
	if err := f(tx); err != nil {
		return err
	}
	return tx.Commit()
}
