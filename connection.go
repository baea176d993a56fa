package steadymq

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/steadymq/steadymq/internal/errtext"
	"github.com/steadymq/steadymq/internal/wire"
)

// connection is one socket with one *amqp.Connection on it. It is never
// repaired, only replaced. One goroutine, watch, owns its end.
type connection struct {
	host         string
	heartbeat    time.Duration // asked for
	socket       *wire.Socket
	amqp         *amqp.Connection
	closeTimeout time.Duration

	closed  chan *amqp.Error  // the driver's NotifyClose
	end     *notifier         // the first cause of its end
	leases  leases            // the sessions on it
	stop    chan closeRequest // asks for an orderly close
	stopped bool              // leave was asked; its owner's
	done    chan struct{}     // closed when nothing of it is left

	channelFailures  []time.Time  // recent ones, for the escalation; the supervisor's
	served           bool         // it has had a session; the supervisor's
	queue            string       // of its sessions, once it has a name; of the try on it
	failedTopologies atomic.Int32 // how often a TopologyFunc has failed on it

	stopRefresh context.CancelFunc
	refreshed   chan struct{} // closed when the credentials are no longer refreshed
}

// openConnection dials e and opens an AMQP connection there, all within ctx.
// The error is a *SessionError without its number.
// step tells how far it has come, abandoned is told of each function of the user that had to be
// left behind.
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
			_ = conn.Close() // the socket is dead: it only frees the driver's goroutines
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
		done:         make(chan struct{}),
		refreshed:    make(chan struct{}),
	}
	// The refresh lives as long as the connection, not as this try.
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	opened.stopRefresh = stop
	go opened.refresh(life, c, expires, abandoned)
	go opened.watch()
	return opened, nil
}

// mechanisms returns the mechanisms for this dial and, if they expire, when.
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

// refresh hands the broker fresh credentials before the old ones expire, at 70 %
// of their life (connection.update-secret). Where it fails it tries again in 70 %
// of what is left; in the end the broker closes the connection and the next dial
// asks afresh. One that does not close it gets what is asked for ever more slowly,
// as does an issuer whose credentials have expired when they come.
func (c *connection) refresh(life context.Context, cfg *config, expires time.Time, abandoned func()) {
	defer close(c.refreshed)
	again := pace{floor: minRefresh, initial: minRefresh, limit: operatorCap}
	for !expires.IsZero() {
		again.failures++
		left := time.Until(expires) / 10 * 7 // far in the future it is the longest Duration there is
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

// updateSecret is an RPC, so its limit, which counts silence, closes the socket. The end of the
// connection does not: the answer is on its way, and close-ok after it. As long as deliveries
// come there is nothing to gain: a broker that did not take the secret closes by itself.
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
		Transfer:     transfer,
	}
}

// amqpConfig is made anew for every dial: the driver writes into its maps.
// Recovery stays nil, always: it reuses the channel, so that a late ack settles
// another message.
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

// handshakeCause tells why Open failed. The driver reports a socket lost in the
// handshake as "403 username or password" or "403 vhost" without having heard
// that from the broker, so only what the broker itself said is believed.
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
	return fmt.Errorf("lost in the handshake: %w", namePort(e, lost)) // at the greeting
}

// explain prefers what the broker said, and to what, then what the socket saw, to
// the driver's catch-all "501".
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

// watch waits for the end of the connection and then sees to it that nothing of
// it stays: driver, socket and goroutines.
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

// awaitLeases lets the sessions that the connection is still lent to go first. It returns the limit
// of the close that follows.
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

// endOfSocket explains a socket that ended before the driver said why. The
// driver closes it too, right after it has reported what the broker said.
func (c *connection) endOfSocket() error {
	select {
	case err := <-c.closed:
		return c.explain(errorOrNil(err))
	default:
		return c.explain(nil)
	}
}

// errorOrNil keeps a nil *amqp.Error from becoming an error that is not nil.
func errorOrNil(err *amqp.Error) error {
	if err == nil {
		return nil
	}
	return err
}

// teardown closes in an orderly way within the close limit, then by closing the
// socket, which frees every goroutine of the driver that waits for it. The limit counts time
// although deliveries may be in the way of close-ok: the sessions have had theirs, so these
// deliveries are of no use, and the sooner they go back the better.
func (c *connection) teardown(limit time.Duration) {
	kill := time.AfterFunc(limit, func() { c.socket.Kill(errCloseTimeout) })
	c.stopRefresh()
	<-c.refreshed // its RPC and the close would take each other's answer
	// A driver that is closing by itself holds its mutex until the socket has
	// closed, and a goroutine that waits for a mutex stops a synctest bubble.
	if !c.amqp.IsClosed() {
		_ = c.amqp.CloseDeadline(time.Now().Add(limit))
	}
	// The driver tells of the broker's close before it closes the socket, so the
	// close-ok may still be on its way.
	_ = c.socket.Close()
	kill.Stop()
	c.socket.Kill(nil)
	drain(c.closed)
	c.socket.Wait()
}

// closeRequest is how a connection is asked to close.
type closeRequest struct {
	grace time.Duration // how long sessions may stay on it
	limit time.Duration // how long the close may take after that
}

// close asks for an orderly close and returns at once; gone tells the end. Only the owner of
// the connection calls it.
func (c *connection) close(d closeRequest) {
	if !c.stopped {
		c.stopped = true
		c.stop <- d
	}
}

// hurry shortens a departure that has been asked for, unless it is the first one still.
func (c *connection) hurry(d closeRequest) {
	select {
	case <-c.stop: // the first one, which watch has not seen yet
	default:
	}
	c.stop <- d
}

// alive tells whether a new session may be opened on it.
func (c *connection) alive() bool {
	return !c.stopped && c.end.Cause() == nil && !c.amqp.IsClosed() && !c.leases.isRetired()
}

// tooManyChannelFailures notes a channel-level failure on c and tells whether the connection
// is to be replaced too.
func (c *connection) tooManyChannelFailures(now time.Time) bool {
	recent := c.channelFailures[:0]
	for _, t := range c.channelFailures {
		if now.Sub(t) < escalateWithin {
			recent = append(recent, t)
		}
	}
	c.channelFailures = append(recent, now)
	return len(c.channelFailures) >= escalateAfter
}

// major is the first number of the server's version, 0 if that cannot be read.
func (c *connection) major() int {
	version, _ := c.amqp.Properties["version"].(string)
	first, _, _ := strings.Cut(version, ".")
	major, _ := strconv.Atoi(first)
	return major
}

// own notes the queue of the sessions of c. The tries on c come one after the other.
func (c *connection) own(queue string) { c.queue = queue }

// owned is the queue that the broker has named for an earlier session of c, "" if there is none.
func (c *connection) owned(of *config) string {
	if of.declare == nil || of.queue != "" {
		return ""
	}
	return c.queue
}

// sameQueue refuses the queue of a TopologyFunc if that has left another one behind on this
// connection: as a rule one that the broker has named, which would live on, bound and unread.
func (c *connection) sameQueue(queue string) error {
	left := c.queue != queue
	if c.queue == "" {
		left = c.failedTopologies.Load() > 0 && strings.HasPrefix(queue, "amq.") // which only a broker names
	}
	if left {
		return &leftBehindError{was: c.queue, is: queue}
	}
	c.own(queue)
	return nil
}

// topologyFails tells whether a TopologyFunc has failed so often on the connection that the queues it
// may have left behind, one each time, have to go with it.
func (c *connection) topologyFails() bool { return c.failedTopologies.Load() >= escalateAfter }

// leftBehindError is a TopologyFunc that has left a queue behind on the connection.
type leftBehindError struct{ was, is string }

func (e *leftBehindError) Error() string {
	return fmt.Sprintf("the topology function returned the queue %q, and has left another one behind on the same connection", e.is)
}
