package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/steadymq/steadymq"
)

// FileStore keeps the place of each stream in a file of its own. Dir must exist, on a disk that
// outlives the process, and belong to one consumer of each stream.
type FileStore struct{ Dir string }

var _ steadymq.OffsetStore = FileStore{}

func (f FileStore) path(stream string) string {
	return filepath.Join(f.Dir, url.PathEscape(stream)+".offset")
}

// Load implements [steadymq.OffsetStore]. What is no number is an error: to begin elsewhere in its
// stead would skip messages, or repeat all of them.
func (f FileStore) Load(_ context.Context, stream string) (next int64, found bool, err error) {
	text, err := os.ReadFile(f.path(stream))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	next, err = strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, false, fmt.Errorf("%s: %w", f.path(stream), err)
	}
	return next, true, nil
}

// Save implements [steadymq.OffsetStore]. Whenever the process or the machine ends, the file has the
// old place or the new one.
func (f FileStore) Save(_ context.Context, stream string, next int64) error {
	file, err := os.CreateTemp(f.Dir, "saving-*")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name()) // once it is renamed there is nothing to remove
	_, err = fmt.Fprintln(file, next)
	err = errors.Join(err, file.Sync(), file.Close())
	if err != nil {
		return err
	}
	return os.Rename(file.Name(), f.path(stream))
}
