package steadymq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/steadymq/steadymq/internal/errtext"
)

// How far a stream was handled, over restarts of the process: the store of WithStreamOffsets, what
// is loaded from it before a Run consumes, and the goroutine that saves.

// saver keeps the place of one Run in the store. Its goroutine, which lives as long as the Run,
// uses the fields below and saves; tries for a session load. A nil saver does nothing.
type saver struct {
	*scope
	store  OffsetStore
	ctx    context.Context // of all saves
	cancel context.CancelCauseFunc
	moves  chan struct{} // has a value once the place has moved
	ending chan struct{} // closed when the last save is asked for
	done   chan struct{} // closed after it

	at      place
	pending bool          // the store does not have it yet
	last    time.Time     // when the last save began
	running chan struct{} // closed when the last save has returned; nil before the first
	failing time.Time     // since when saves have failed; zero if the last has not
	told    rateLimited
	warned  bool // since failing
}

// saveEvery is the shortest time from one save to the next.
const saveEvery = time.Second

// newSaver starts the saver of a Run, if there is a store.
func newSaver(ctx context.Context, of *scope) *saver {
	if of.config.offsets == nil || of.stream == nil {
		return nil
	}
	s := &saver{
		scope: of, store: of.config.offsets,
		moves: make(chan struct{}, 1), ending: make(chan struct{}), done: make(chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	of.stream.moves = s.moves
	go s.run()
	return s
}

// run saves the place until the end of the Run.
func (s *saver) run() {
	defer close(s.done)
	for s.due() {
		s.save()
	}
	s.save()
}

// due waits until the place has moved, and for the pace. It returns false once the last save is
// asked for.
func (s *saver) due() bool {
	select {
	case <-s.moves:
	case <-s.ending:
		return false
	}
	pace := time.NewTimer(saveEvery - time.Since(s.last))
	defer pace.Stop()
	select {
	case <-pace.C:
		return true
	case <-s.ending:
		return false
	}
}

// save saves the newest place, if the store does not have it.
func (s *saver) save() {
	if at, moved := s.stream.moved(); moved {
		s.at, s.pending = at, true
	}
	if !s.pending {
		return
	}
	s.last = time.Now()
	if err := s.call(); err != nil {
		s.failed(err)
		s.stream.again() // a second later
		return
	}
	s.pending = false
	s.recovered()
}

var (
	errStoreLimit  = errors.New("the store did not answer in time (WithCloseTimeout)")
	errLoadLimit   = errors.New("the store did not answer within half of the setup limit (WithSetupTimeout)")
	errStillSaving = errors.New("WithStreamOffsets: an earlier Save was left behind and has not returned, so nothing is saved")
)

// call calls Save, unless an earlier call still runs: it might overwrite what a later one has saved.
func (s *saver) call() error {
	switch {
	case s.running != nil && !isClosed(s.running):
		return errStillSaving
	case s.ctx.Err() != nil: // a save that hung has taken the time of the stop
		return errStoreLimit
	}
	ctx, cancel := context.WithTimeoutCause(s.ctx, s.config.closeTimeout, errStoreLimit)
	defer cancel()
	returned, at := make(chan struct{}), s.at
	s.running = returned
	_, err := userCall[struct{}]{
		option: "WithStreamOffsets: Save",
		f: func(ctx context.Context) (struct{}, error) {
			defer close(returned)
			return struct{}{}, s.store.Save(ctx, at.stream, at.next)
		},
		left: s.abandoned,
	}.run(ctx)
	err = limitOf(ctx, err)
	if err != nil {
		s.stats.offsetsFailed.Add(1)
	}
	return err
}

// limitOf adds to an error of a context which limit has passed.
func limitOf(ctx context.Context, err error) error {
	if ctx.Err() == nil || !errors.Is(err, ctx.Err()) {
		return err
	}
	return fmt.Errorf("%w: %w", err, causeOf(ctx))
}

// failed tells that saves fail, and for how long.
func (s *saver) failed(err error) {
	if s.failing.IsZero() {
		s.failing = s.last
	}
	left, ok := s.told.allow(time.Minute)
	if !ok && !s.over() {
		return
	}
	s.warned = true
	s.reporter.warn("the place in the stream cannot be saved: after a restart, messages that were handled since come again",
		slog.String("queue", s.at.stream), slog.Int64("offset", s.at.next), durationAttr("failing", time.Since(s.failing)),
		slog.String("error", errtext.Brief(err)), suppressed(left))
}

// over reports whether the last save was asked for.
func (s *saver) over() bool { return isClosed(s.ending) }

// recovered tells that saves succeed again.
func (s *saver) recovered() {
	if s.warned {
		s.reporter.info("the place in the stream is saved again", slog.String("queue", s.at.stream),
			slog.Int64("offset", s.at.next), durationAttr("failed", time.Since(s.failing)))
	}
	s.failing, s.warned = time.Time{}, false
}

// end asks for the last save, and bounds it with one that may be under way. The function that it
// returns waits for the end of both, for the limit at most or little longer than abandonGrace.
func (s *saver) end(limit time.Duration) (await func()) {
	if s == nil {
		return func() {}
	}
	timer := time.AfterFunc(max(limit-abandonGrace, limit/2), func() { s.cancel(errStoreLimit) })
	close(s.ending)
	return func() {
		<-s.done
		timer.Stop()
		s.cancel(nil)
	}
}

// restore asks the store where the stream was left, once for each stream of a Run.
func (s *session) restore(ctx context.Context) error {
	if s.saver == nil || s.streamPosition().isRestored(s.queue) {
		return nil
	}
	next, found, err := s.saver.load(ctx, s.queue)
	if err == nil {
		s.streamPosition().restore(s.queue, next, found)
	}
	return err
}

// load calls Load. A store that hangs must not take all of the setup limit, whose end would cost
// the channel, and maybe others their connection.
func (s *saver) load(ctx context.Context, stream string) (next int64, found bool, err error) {
	limited, cancel := context.WithTimeoutCause(ctx, s.config.setupTimeout/2, errLoadLimit)
	defer cancel()
	next, err = userCall[int64]{
		option: "WithStreamOffsets: Load",
		f: func(ctx context.Context) (next int64, err error) {
			next, has, err := s.store.Load(ctx, stream)
			if err == nil && has && next < 0 {
				err = fmt.Errorf("returned the offset %d, and must not return less than 0", next)
			}
			if !has {
				next = unknownOffset
			}
			return next, err
		},
		left: s.abandoned,
	}.run(limited)
	if err = limitOf(limited, err); err != nil {
		if ctx.Err() == nil {
			s.stats.offsetsFailed.Add(1)
		}
		return 0, false, &storeError{err}
	}
	return next, next != unknownOffset, nil
}

// verify looks for the message before the place that the store had. If there is none, there or
// later, the stream does not reach the place: it was made anew, or the broker's copy of it is
// behind, or it is slow. So it is looked for a few times, a little longer each time.
func (s *session) verify(ctx context.Context, before int64) error {
	if err := s.channel.Qos(1, 0, false); err != nil {
		return err
	}
	since := time.Now()
	if err := s.sample(before); err != nil {
		return err
	}
	looks := s.streamPosition().lookedFor()
	patience := time.Duration(looks-1) * min(lookLonger, s.config.setupTimeout/64)
	trip := time.Since(since) + patience
	first, err := s.awaitSample(ctx, trip, s.config.setupTimeout/4)
	switch {
	case err != nil:
		return err
	case first != nil || len(s.aside.take()) > 0: // one that cannot be read is there, too
		s.streamPosition().verified()
		return nil
	case looks < mostPlaceLooks:
		return &storeError{fmt.Errorf("WithStreamOffsets: the stream has no message at or behind offset %d, which was handled: it was made anew, or the broker's copy of it is behind; it is looked for again", before)}
	}
	if silent, err := s.silent(ctx, before, trip); silent || err != nil {
		return cmp.Or[error](err, &storeError{errors.New("WithStreamOffsets: the stream has messages, and the broker gives none of them in time; it is looked for again")})
	}
	s.reporter.warn("the stream ends before the place that was saved, so it was made anew, and is read from its beginning",
		slog.String("queue", s.queue), slog.String("host", s.conn.host), slog.Int64("offset", before+1))
	s.streamPosition().startOver()
	return nil
}

// silent reports whether the stream has messages and yet not even the first one comes, as on a broker
// that is stuck or slow: that says nothing about the place.
func (s *session) silent(ctx context.Context, before int64, trip time.Duration) (bool, error) {
	is, err := s.channel.QueueDeclarePassive(s.queue, true, false, false, false, nil)
	if err != nil || is.Messages == 0 { // it is empty, or that may not be asked
		return false, nil
	}
	if err := s.channel.Cancel(s.tag, false); err != nil {
		return false, err
	}
	if err := s.sample("first"); err != nil {
		return false, err
	}
	first, err := s.awaitSample(ctx, trip, s.config.setupTimeout/4)
	if err != nil || first == nil && len(s.aside.take()) == 0 {
		return err == nil, err
	}
	// It may have been stuck until now.
	if err := s.channel.Cancel(s.tag, false); err != nil {
		return false, err
	}
	if err := s.sample(before); err != nil {
		return false, err
	}
	first, err = s.awaitSample(ctx, trip, s.config.setupTimeout/4)
	return err == nil && (len(s.aside.take()) > 0 || first != nil), err
}

const (
	mostPlaceLooks = 3
	lookLonger     = 250 * time.Millisecond // times locateTrips
)
