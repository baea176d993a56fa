package steadymq

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/wire"
)

// connection is one socket with one *amqp.Connection on it. It is never repaired, only replaced. It
// has an owner, connections or for one question the prober, which opens it and asks it to close.
// Its goroutine watch waits for the end, writes end and closes done. Sessions borrow it by a lease
// and read host, socket, amqp and end.
type connection struct {
	host         string
	heartbeat    time.Duration // the interval that was asked for
	socket       *wire.Socket
	amqp         *amqp.Connection
	closeTimeout time.Duration

	closed  chan *amqp.Error  // the driver's NotifyClose; only watch reads it
	end     *notifier         // why it ended; written by watch, read by owner and sessions
	leases  leases            // the sessions it is lent to
	stop    chan closeRequest // asks for an orderly close; the owner writes, watch reads
	loans   map[*loan]bool    // to consumers; guarded by the mutex of connections
	shared  bool              // there have been several loans at a time; guarded by the same
	turns   *turns            // of the consumers that are set up on it
	keptTo  time.Time         // how long sessions of ended loans may keep their leases; guarded by the same
	stopped bool              // close was called, after the last loan
	done    chan struct{}     // closed when nothing of it is left

	retiring    *notifier // set when the sessions are to move to another connection
	stopRefresh context.CancelFunc
	refreshed   chan struct{} // closed when the refresh of credentials has ended
}

// openConnection dials e and opens an AMQP connection there, all within ctx. Its error is a
// *SessionError without the number of the session. It sets step to how far it has come, and calls
// abandoned for each function of the user that had to be left behind.
func openConnection(ctx context.Context, c *config, e endpoint, step *step, abandoned func()) (*connection, error) {
	tlsConfig, err := e.tlsConfig(c.tls, c.insecure)
	if err != nil {
		return nil, &SessionError{Host: e.address, Op: "open", Err: err}
	}
	mechanisms, expires, err := mechanisms(ctx, c, e, abandoned)
	if err != nil {
		return nil, &SessionError{Host: e.address, Op: "open", Err: err}
	}
	config := amqpConfig(c, e)
	login, err := newLogin(ctx, mechanisms, config.Properties, abandoned)
	if err != nil {
		return nil, &SessionError{Host: e.address, Op: "open", Err: err}
	}
	config.SASL = login.mechanisms
	socket, err := openSocket(ctx, dialer(c, e, step, abandoned), e.address, tlsConfig, socketOptions(c, e), abandoned)
	if err != nil {
		// A TCP connect that fails costs the broker nothing; a TLS handshake does.
		op := step.String()
		if op != "dial" {
			err = namePort(e, err)
		}
		return nil, &SessionError{Host: e.address, Op: op, Err: err}
	}
	unguard := context.AfterFunc(ctx, func() { socket.Kill(causeOf(ctx)) })
	defer unguard()

	login.abort = socket.Kill
	conn, err := amqp.Open(socket, config)
	if err != nil {
		err = handshakeCause(err, socket, login, e)
		socket.Kill(err)
		if conn != nil {
			_ = conn.Close() // the socket is dead: this only frees the goroutines of the driver
		}
		socket.Wait()
		return nil, &SessionError{Host: e.address, Op: "open", Err: err}
	}
	socket.WatchPeer()
	opened := &connection{
		host:         e.address,
		heartbeat:    c.heartbeatOf(e),
		socket:       socket,
		amqp:         conn,
		closeTimeout: c.closeTimeout,
		closed:       conn.NotifyClose(make(chan *amqp.Error, 1)),
		end:          newNotifier(),
		stop:         make(chan closeRequest, 1),
		loans:        make(map[*loan]bool),
		turns:        newTurns(),
		retiring:     newNotifier(),
		done:         make(chan struct{}),
		refreshed:    make(chan struct{}),
	}
	// The refresh outlives this try: it lasts as long as the connection.
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	opened.stopRefresh = stop
	go opened.refresh(life, c, expires, abandoned)
	go opened.watch()
	return opened, nil
}

// mechanisms returns the login mechanisms for this dial, and when their credentials expire, zero
// for never.
func mechanisms(ctx context.Context, c *config, e endpoint, abandoned func()) ([]amqp.Authentication, time.Time, error) {
	if c.credentials == nil {
		return e.login(c.sasl), time.Time{}, nil
	}
	fresh, err := askCredentials(ctx, c, abandoned)
	if err != nil {
		return nil, time.Time{}, err
	}
	return []amqp.Authentication{&amqp.PlainAuth{Username: fresh.Username, Password: fresh.Password}}, fresh.Expires, nil
}

func askCredentials(ctx context.Context, c *config, abandoned func()) (Credentials, error) {
	return userCall[Credentials]{option: "WithCredentials", f: c.credentials, left: abandoned}.run(ctx)
}

const minRefresh = time.Second

// refresh hands the broker fresh credentials when 70 % of the life of the old ones has passed
// (connection.update-secret). Where that fails it tries again after 70 % of the time that is left.
// In the end the broker closes the connection, and the next dial asks for credentials again. A
// broker that does not close it is asked ever more slowly, and so is an issuer whose credentials
// have expired when they arrive.
func (c *connection) refresh(life context.Context, cfg *config, expires time.Time, abandoned func()) {
	defer close(c.refreshed)
	again := pace{floor: minRefresh, initial: minRefresh, limit: operatorCap}
	for !expires.IsZero() {
		again.failures++
		// For a date far in the future, time.Until returns the longest Duration there is.
		left := time.Until(expires) / 10 * 7
		timer := time.NewTimer(max(left, again.draw()))
		select {
		case <-timer.C:
		case <-life.Done():
			timer.Stop()
			return
		}
		ctx, cancel := context.WithTimeoutCause(life, cfg.setupTimeout, cfg.setupPassed())
		if fresh, err := askCredentials(ctx, cfg, abandoned); err == nil && c.updateSecret(ctx, fresh.Password) == nil {
			if expires = fresh.Expires; time.Until(expires) > minRefresh {
				again.failures = 0
			}
		}
		cancel()
	}
}

var errSecretTimeout = errtext.Because(errors.New("setup limit passed before the broker took the new credentials (WithSetupTimeout)"), errSetupTimeout)

// updateSecret is an RPC, so passing its limit, which counts silence, closes the socket. A stop
// does not interrupt it: its answer is on the way, and close-ok comes after that. While deliveries
// arrive, closing the socket would gain nothing: a broker that has not taken the secret closes the
// connection by itself.
func (c *connection) updateSecret(ctx context.Context, secret string) error {
	limit, ok := ctx.Deadline()
	if !ok {
		return nil
	}
	defer c.socket.AfterSilence(time.Until(limit), maxDuration, func() { c.socket.Kill(errSecretTimeout) })()
	return c.amqp.UpdateSecret(secret, "the old one expires")
}

func socketOptions(c *config, e endpoint) wire.Options {
	interval := c.heartbeatOf(e)
	return wire.Options{
		IdleTimeout:  2 * interval,
		WriteTimeout: interval,
		WriteDelay:   c.writeDelay,
		Refuse:       c.tooLarge,
		Transfer:     guardedIO,
	}
}

// amqpConfig returns a new configuration for every dial, because the driver writes into its maps.
// Recovery always stays nil: it reuses the channel, so that a late ack settles another message.
func amqpConfig(c *config, e endpoint) amqp.Config {
	properties := maps.Clone(amqp.NewConnectionProperties())
	properties["product"] = "steadymq"
	if c.connectionName != "" {
		properties.SetClientConnectionName(c.connectionName)
	}
	return amqp.Config{
		Vhost:      e.uri.Vhost,
		Heartbeat:  c.heartbeatOf(e),
		Locale:     "en_US",
		Properties: properties,
		ChannelMax: e.uri.ChannelMax,
		FrameSize:  wire.FrameSize,
	}
}

// handshakeCause returns why Open failed. The driver reports a socket lost in the handshake as "403
// username or password" or "403 vhost" although the broker has not said so. Therefore only what the
// broker itself said is believed.
func handshakeCause(err error, s *wire.Socket, l *login, e endpoint) error {
	if l.failed != nil {
		return l.failed
	}
	if refused := l.refusal(err, s); refused != nil {
		return refused
	}
	var brokerErr *amqp.Error
	if errors.As(err, &brokerErr) && brokerErr.Server {
		return brokerErr
	}
	lost := s.Cause()
	switch {
	case lost == nil:
		return err
	case errors.Is(err, amqp.ErrCredentials):
		return fmt.Errorf("lost while logging in: %w", lost)
	case errors.Is(err, amqp.ErrVhost):
		return fmt.Errorf("lost while opening the virtual host: %w", lost)
	}
	return fmt.Errorf("lost in the handshake: %w", namePort(e, lost)) // at the greeting, before any login
}

// explain returns the best reason known for err, which may be nil: what the broker said, else why
// the socket ended. The driver's own "501" stands for any failure.
func (c *connection) explain(err error) error {
	var brokerErr *amqp.Error
	if errors.As(err, &brokerErr) && brokerErr.Server {
		return err
	}
	if cause := c.socket.Cause(); cause != nil {
		return cause
	}
	if err == nil {
		return errStopped
	}
	return err
}

// watch waits for the end of the connection and then frees all of it: driver, socket and
// goroutines.
func (c *connection) watch() {
	defer close(c.done)
	limit := c.closeTimeout
	select {
	case err := <-c.closed:
		c.end.notify(c.explain(errorOrNil(err)))
	case <-c.socket.Done():
		c.end.notify(c.endOfSocket())
	case asked := <-c.stop:
		limit = c.awaitLeases(asked)
	}
	c.teardown(limit)
	c.end.notify(errStopped)
}

// awaitLeases waits until the connection is lent to no session any more, for the grace of the
// request at most. It returns the limit of the close that follows.
func (c *connection) awaitLeases(asked closeRequest) time.Duration {
	returned := c.leases.allReturned()
	over := time.NewTimer(asked.grace)
	defer over.Stop()
	for {
		select {
		case asked = <-c.stop:
			over.Reset(asked.grace)
			continue
		case <-returned:
		case err := <-c.closed:
			c.end.notify(c.explain(errorOrNil(err)))
		case <-c.socket.Done():
			c.end.notify(c.endOfSocket())
		case <-over.C:
		}
		return asked.limit
	}
}

// endOfSocket explains a socket that ended before the driver said why. The driver, too, closes the
// socket, right after it has reported what the broker said.
func (c *connection) endOfSocket() error {
	select {
	case err := <-c.closed:
		return c.explain(errorOrNil(err))
	default:
		return c.explain(nil)
	}
}

// errorOrNil returns nil for a nil *amqp.Error, which as an error would not be nil.
func errorOrNil(err *amqp.Error) error {
	if err == nil {
		return nil
	}
	return err
}

// teardown closes the connection in order within the close limit. After that it closes the socket,
// which frees every goroutine of the driver that waits for an answer. The limit counts time, not
// silence, although deliveries may hold up close-ok: the sessions have had their close-ok, so these
// deliveries are of no use, and the sooner they go back the better.
func (c *connection) teardown(limit time.Duration) {
	kill := time.AfterFunc(limit, func() { c.socket.Kill(errCloseTimeout) })
	c.stopRefresh()
	<-c.refreshed // its RPC and the close must not overlap: each would take the other's answer
	// A driver that is closing by itself holds its mutex until the socket has closed, and a
	// goroutine that waits for a mutex keeps the clock of a synctest bubble from moving.
	if !c.amqp.IsClosed() {
		_ = c.amqp.CloseDeadline(time.Now().Add(limit))
	}
	// The driver reports the broker's close before it closes the socket, so the close-ok may still
	// be on its way.
	_ = c.socket.Close()
	kill.Stop()
	c.socket.Kill(nil)
	drain(c.closed)
	c.socket.Wait()
}

// teardownGrace is how long a teardown may take beyond its limits before it counts as abandoned.
const teardownGrace = 500 * time.Millisecond

// closeRequest says how a connection is to close.
type closeRequest struct {
	grace time.Duration // how long sessions may keep their leases
	limit time.Duration // how long the close may take after that
}

// close asks for an orderly close and returns at once; done is closed at its end. Only the owner of
// the connection calls it.
func (c *connection) close(d closeRequest) {
	if !c.stopped {
		c.stopped = true
		c.stop <- d
	}
}

// shortenClose replaces the limits of a close that was asked for. It has no effect if the
// connection no longer waits for its leases. Only the owner calls it.
func (c *connection) shortenClose(d closeRequest) {
	select {
	case <-c.stop: // an earlier request that watch has not read yet
	default:
	}
	c.stop <- d
}

// isOver reports whether nothing of the connection is left.
func (c *connection) isOver() bool { return isClosed(c.done) }

func isClosed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// awaitTeardowns waits until all that is ending is done, for the close limit and a moment. One that
// hangs keeps nobody from seeing that the others are done.
func awaitTeardowns[T any](limit time.Duration, all []T, done func(T) <-chan struct{}) {
	passed := time.NewTimer(limit + teardownGrace)
	defer passed.Stop()
	for _, one := range all {
		select {
		case <-done(one):
		case <-passed.C:
			return
		}
	}
}

// alive reports whether a new session may be opened on the connection. connections calls it, and
// who has been lent the connection.
func (c *connection) alive() bool { return c.stands() && !c.leases.isRetired() }

// stands reports whether the connection has not ended, and nobody has asked it to close.
func (c *connection) stands() bool { return !c.stopped && c.end.Cause() == nil && !c.amqp.IsClosed() }

// major returns the first number of the broker's version, 0 if that cannot be read.
func (c *connection) major() int {
	major, _ := c.version()
	return major
}

// version returns the first two numbers of the broker's version, 0 for what cannot be read.
func (c *connection) version() (major, minor int) {
	text, _ := c.amqp.Properties["version"].(string)
	first, rest, _ := strings.Cut(text, ".")
	second, _, _ := strings.Cut(rest, ".")
	major, _ = strconv.Atoi(first)
	minor, _ = strconv.Atoi(second)
	return major, minor
}

// delaysRetries reports whether the broker has delayed retries of quorum queues, as RabbitMQ has
// since 4.3. Earlier ones take their arguments and ignore them.
func (c *connection) delaysRetries() bool {
	major, minor := c.version()
	return major > 4 || major == 4 && minor >= 3
}
