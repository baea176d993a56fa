package steadymq

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/steadymq/steadymq/internal/wire"
)

// Who owns connections. A Consumer alone and all consumers of a Group borrow them here: one dials
// for all who wait, those who share a connection lose it together, and the last one to give it back
// closes it. What they are lent is in loan.go.

// connections are those of one Run, of a Consumer or of a Group. Supervisors and their tries use
// them, under mu, which is held for memory only.
type connections struct {
	config *config
	stats  *counters        // counts dials, connections and what had to be left behind
	report func() *reporter // makes one for what all who share a connection have in common; nil for a Consumer alone

	mu         sync.Mutex
	hosts      *hosts
	keepers    []*keeper           // that lend to everybody; the first ones stay
	asked      int                 // how many of them stay
	apart      int                 // borrowers with a keeper of their own
	open       int                 // connections that are lent
	served     bool                // there has been a session
	overflowed bool                // a further connection was opened for want of channels, and told
	channels   int                 // that the last connection had room for, 0 before the first
	closing    []*connection       // that were lent, and have not ended yet
	inquiries  map[string]*inquiry // the questions of stall detectors, by the address of the host
	reporters  map[int]*reporter   // by the number of the keeper: each outage has its own beginning and end
}

func newConnections(c *config, stats *counters) *connections {
	cs := &connections{
		config: c, stats: stats, hosts: newHosts(c), asked: c.connections,
		inquiries: make(map[string]*inquiry), reporters: make(map[int]*reporter),
	}
	for range cs.asked {
		cs.addKeeper()
	}
	return cs
}

// addKeeper adds a keeper that lends to everybody, under the smallest number that is free.
func (cs *connections) addKeeper() *keeper {
	k := cs.newKeeper()
	for k.number = 1; slices.ContainsFunc(cs.keepers, func(other *keeper) bool { return other.number == k.number }); {
		k.number++
	}
	cs.keepers = append(cs.keepers, k)
	return k
}

// abandoned counts a user's function that did not return and was left running.
func (cs *connections) abandoned() { cs.stats.abandoned.Add(1) }

// keeper keeps one connection for those who share it. It knows the one that stands, else who dials,
// or until when nobody does, so that many who wait are no more of a burden to a broker than one.
type keeper struct {
	number   int // of the connection, for the log
	members  map[*borrower]bool
	hosts    *hosts       // in the order for its connection
	own      bool         // it lends to one borrower that is kept apart
	most     int          // borrowers that its connection has channels for, 0 if that is not known
	conn     *connection  // that is lent; nil if there is none
	dial     *dial        // under way
	failed   *dialFailure // why the last dial failed; nil if it is not the reason for the wait
	until    time.Time    // nobody dials before
	attempts int          // failures in a row, for the log
	retry    *retry       // the pace at which those who share it dial, whoever does; nil before the first wait
	since    time.Time    // when conn was opened; zero once that counts no more
	next     endpoint     // of the next dial, once it is chosen
	fresh    bool         // next has not been tried in this round
	slow     rateLimited  // lines about dials that take long
}

func (cs *connections) newKeeper() *keeper {
	return &keeper{members: make(map[*borrower]bool), hosts: cs.hosts.ofAnother()}
}

// dial is a try to open a connection, which others may wait for.
type dial struct {
	endpoint
	keeper *keeper
	done   chan struct{} // closed when it is over
	over   bool
}

// dialFailure is what those who wait for a dial are told of its failure.
type dialFailure struct {
	err   error
	host  string
	fresh bool // the next dial goes to a host that has not been tried in this round
	final bool // it ends the Run of who has dialled
}

// borrower is one consumer that is lent connections, one after the other. Its supervisor uses it,
// and the goroutine of a try that dials.
type borrower struct {
	of     *connections
	keeper *keeper
}

// tell writes a line for all who share the connection of k, in place of one for each of them. It is
// called with mu held.
func (cs *connections) tell(k *keeper, c StateChange) {
	if !cs.tells(k) {
		return
	}
	c.Time, c.consumers, c.connection = time.Now(), len(k.members), cs.numberOf(k)
	cs.reporter(k).changed(c)
}

// tells reports whether the log of the Group tells of the connection of k.
func (cs *connections) tells(k *keeper) bool { return cs.report != nil && !k.own }

// numberOf returns what tells the connection of k from the others in the log, 0 if there are none.
func (cs *connections) numberOf(k *keeper) int {
	if len(cs.keepers) == 1 {
		return 0
	}
	return k.number
}

func (cs *connections) reporter(k *keeper) *reporter {
	if cs.reporters[k.number] == nil {
		cs.reporters[k.number] = cs.report()
	}
	return cs.reporters[k.number]
}

// tellsSlow writes the line about a dial of b that takes long, for all who wait for it. It returns
// false if that is for b to tell: it waits alone, or the dial is over and the broker is slow with
// its own session.
func (b *borrower) tellsSlow(d *dial, t slowTry) bool {
	cs := b.of
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if d == nil || d.over || !cs.tells(d.keeper) {
		return false
	}
	t.tell(cs.reporter(d.keeper), &d.keeper.slow, sharers(len(d.keeper.members), cs.numberOf(d.keeper))...)
	return true
}

// stopTelling writes what is still to be told, and nothing after that: nobody borrows any more, but
// the timer of a try may have fired just before its end.
func (cs *connections) stopTelling() {
	cs.mu.Lock()
	cs.report = nil
	reporters := slices.Collect(maps.Values(cs.reporters))
	cs.mu.Unlock()
	var stopping sync.WaitGroup
	for _, r := range reporters {
		stopping.Go(r.stop)
	}
	stopping.Wait()
}

// join makes a borrower.
func (cs *connections) join() *borrower {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	b := &borrower{of: cs}
	b.move(cs.emptiest())
	return b
}

// leave ends the membership of a borrower that borrows no more.
func (b *borrower) leave() {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	b.move(nil)
}

// emptiest returns the keeper with the fewest members, a further one if all are full. It is called
// with mu held.
func (cs *connections) emptiest() *keeper {
	var best *keeper
	for _, k := range cs.keepers {
		if !k.full() && (best == nil || len(k.members) < len(best.members)) {
			best = k
		}
	}
	if best == nil {
		best = cs.addKeeper()
		best.most = cs.channels
	}
	return best
}

func (k *keeper) full() bool { return k.most > 0 && len(k.members) >= k.most }

// move makes b a member of k, or of none. A keeper that was added goes with its last member. It is
// called with mu held.
func (b *borrower) move(k *keeper) {
	cs, from := b.of, b.keeper
	if b.keeper = k; k != nil {
		k.members[b] = true
	}
	if from == nil || from == k {
		return
	}
	delete(from.members, b)
	if len(from.members) > 0 {
		return
	}
	if at := slices.Index(cs.keepers, from); at >= cs.asked {
		cs.keepers = slices.Delete(cs.keepers, at, at+1)
	}
	if from.own {
		cs.apart--
	}
}

// mostApart is how many consumers may be kept apart at the same time: where that many fail, it is
// not their doing.
const mostApart = 32

// isolate gives b a keeper of its own from the next connection on, so that what it does to that
// disturbs nobody. Who shares with nobody keeps its keeper, then it returns false.
func (b *borrower) isolate() (leaves bool) {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	if len(b.keeper.members) == 1 || b.of.apart >= mostApart {
		return false
	}
	own := b.of.newKeeper()
	own.own = true
	b.of.apart++
	b.move(own)
	return true
}

// isolated reports whether b is kept apart from others.
func (b *borrower) isolated() bool {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	return b.keeper.own
}

// share moves b to a keeper whose connection stands and has room, and reports whether there is one:
// b is kept apart and healthy, or cannot have a connection of its own because of a limit.
func (b *borrower) share() bool {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	var best *keeper
	for _, k := range b.of.keepers {
		k.forgetDead()
		if k.conn != nil && !k.full() && (best == nil || len(k.members) < len(best.members)) {
			best = k
		}
	}
	if best == nil {
		return false
	}
	b.move(best)
	return true
}

// overflow moves b to another keeper, because the connection has no channel left for it. further
// reports whether that is the first additional one, which is worth telling; moved is false if b is
// alone on its connection.
func (b *borrower) overflow() (moved, further bool) {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	k := b.keeper
	if len(k.members) == 1 {
		return false, false
	}
	if fewer := len(k.members) - 1; !k.full() || fewer < k.most { // of the old session a channel may be left
		k.most = fewer
	}
	before := len(b.of.keepers)
	b.move(b.of.emptiest())
	further = len(b.of.keepers) > before && !b.of.overflowed
	b.of.overflowed = b.of.overflowed || further
	return true, further
}

// count returns how many connections there are, and how many of those who use them are kept apart.
func (cs *connections) count() (open, apart int) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.open, cs.apart
}

// offer is the answer to a borrower that asks for a connection. One of its parts is set.
type offer struct {
	loan   *loan         // a connection that stands
	own    *dial         // the borrower is to dial
	others *dial         // somebody else dials
	failed *dialFailure  // with wait: why the last dial failed, nil if that is not the reason
	wait   time.Duration // nobody dials for so long
}

// borrow asks for a connection.
func (b *borrower) borrow(now time.Time) offer {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	k := b.keeper
	k.forgetDead()
	switch {
	case k.conn != nil:
		return offer{loan: k.lend()}
	case k.dial != nil:
		return offer{others: k.dial}
	case now.Before(k.until):
		return offer{failed: k.failed, wait: k.until.Sub(now)}
	}
	k.choose(now)
	k.dial = &dial{endpoint: k.next, keeper: k, done: make(chan struct{})}
	k.next, k.failed = endpoint{}, nil
	return offer{own: k.dial}
}

// choose picks the host of the next dial, once.
func (k *keeper) choose(now time.Time) {
	if k.next.address == "" {
		k.next, k.fresh = k.hosts.next(now)
	}
}

// forgetDead forgets a connection that takes no more sessions.
func (k *keeper) forgetDead() {
	if k.conn != nil && !k.conn.alive() {
		k.conn = nil
	}
}

func (k *keeper) lend() *loan {
	l := &loan{connection: k.conn, keeper: k, queues: new(wire.Queues)}
	k.conn.loans[l] = true
	if len(k.conn.loans) > 1 {
		k.conn.shared = true
	}
	return l
}

// opened hands over the connection that b's dial has opened: it is lent, first to b. opened returns
// nil if the dial has been given up meanwhile. Then nobody waits for the connection.
func (b *borrower) opened(d *dial, c *connection) *loan {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	if d.over {
		return nil
	}
	d.end()
	d.keeper.conn, d.keeper.since = c, time.Now()
	b.of.open++
	b.of.channels = int(c.amqp.Config.ChannelMax)
	d.keeper.most = b.of.channels
	b.of.tell(d.keeper, StateChange{To: Consuming, Host: c.host, Attempt: d.keeper.attempts})
	d.keeper.attempts = 0
	return d.keeper.lend()
}

// end tells all who wait that the dial is over. It is called with mu held.
func (d *dial) end() {
	if !d.over {
		d.over = true
		d.keeper.dial = nil
		close(d.done)
	}
}

// withdraw ends a dial without an outcome: one of those who wait dials in its place.
func (b *borrower) withdraw(d *dial) {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	if d != nil {
		d.end()
	}
}

// giveBack ends a loan. The last one closes the connection, which then waits for the sessions of
// all who had it, as long as each of them has asked for. It reports whether b has to wait for the
// close: it has not where sessions of others may put that off.
func (b *borrower) giveBack(l *loan, d closeRequest) (mine bool) {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	c := l.connection
	delete(c.loans, l)
	now := time.Now()
	if len(c.loans) > 0 {
		if until := now.Add(d.grace); until.After(c.keptTo) {
			c.keptTo = until
		}
		return false
	}
	if l.keeper.conn == c {
		l.keeper.conn = nil
	}
	b.of.open--
	left := c.keptTo.Sub(now)
	mine = left <= 0 || !c.leases.any()
	d.grace = max(d.grace, left)
	b.of.letGo(c, d)
	return mine
}

// letGo asks a connection that nobody is lent any more to close. It is called with mu held.
func (cs *connections) letGo(c *connection, d closeRequest) {
	c.close(d)
	cs.closing = append(slices.DeleteFunc(cs.closing, (*connection).isOver), c)
}

// abort ends the sockets of connections that are closing.
func (cs *connections) abort(cause error) {
	cs.mu.Lock()
	closing := slices.Clone(cs.closing)
	cs.mu.Unlock()
	for _, c := range closing {
		c.socket.Kill(cause)
	}
}

// await waits until all connections have closed, once nobody borrows any more, for the limit and a
// moment. It counts those that outlast it.
func (cs *connections) await(limit time.Duration) {
	cs.mu.Lock()
	closing := slices.Clone(cs.closing)
	cs.mu.Unlock()
	awaitTeardowns(limit, closing, func(c *connection) <-chan struct{} { return c.done })
	for _, c := range closing {
		if !c.isOver() {
			cs.abandoned()
		}
	}
}

// sharing reports whether others borrow from the same keeper, too, or have borrowed the connection:
// who has ended it may have left already.
func (b *borrower) sharing(l *loan) bool {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	return l.shared || len(l.keeper.members) > 1
}

// hasLeft reports whether b's next connection is another keeper's.
func (b *borrower) hasLeft(l *loan) bool {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	return b.keeper != l.keeper
}

// outlived reports whether the connection goes on without b, because others borrow it, too.
func (b *borrower) outlived(l *loan) bool {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	return len(l.loans) > 1
}

// blame records a failure of the host at address.
func (b *borrower) blame(address string, err error, now time.Time) {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	b.of.hosts.failed(address, err, now)
}

// praise records that a session was set up on the host at address.
func (b *borrower) praise(address string) {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	b.of.served = true
	b.of.hosts.connected(address)
	if r := b.keeper.retry; r != nil {
		r.consuming()
	}
}

// served reports whether there has been a session of anybody on the connections.
func (b *borrower) served() bool {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	return b.of.served
}

// proved records that the session that just ended has proved that the broker works, and that it was
// up for a while.
func (b *borrower) proved(healthy, lasted bool) {
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	if r := b.keeper.retry; r != nil && healthy {
		r.healthy()
	}
	// Once the next host is chosen that try counts already: another has lost its session with this
	// one.
	if k := b.keeper; lasted && k.next.address == "" && k.dial == nil {
		k.hosts.outlived()
	}
}

// wait returns how long b, which has no connection any more, waits after err before it asks for
// one. All who share a connection wait for the same time: the first that asks after a failure draws
// it. It ends the dial d, if that has failed; else d is nil. concernsAll says that f is the
// connection's end, of which one line tells for all.
func (b *borrower) wait(r *retry, f dialFailure, d *dial, concernsAll bool, now time.Time) time.Duration {
	err := f.err
	b.of.mu.Lock()
	defer b.of.mu.Unlock()
	k := b.keeper
	k.forgetDead()
	if k.conn != nil || k.dial != nil && k.dial != d { // another one was quicker
		return r.wait(err, now, true)
	}
	k.choose(now)
	wait := r.wait(err, now, k.fresh)
	if k.until.After(now) {
		return k.until.Sub(now)
	}
	if concernsAll && b.of.report != nil { // not at the pace of one that has failures of its own
		wait = k.wait(b.of.config, r, err, now)
	}
	k.until, k.failed = now.Add(wait), nil
	if concernsAll {
		k.attempts++
	}
	if concernsAll && !f.final {
		b.of.tell(k, StateChange{To: Backoff, Host: f.host, Attempt: k.attempts, RetryIn: wait, Cause: err})
	}
	if d != nil {
		f.fresh = k.fresh
		k.failed = &f
		d.end()
	}
	return wait
}

// wait returns how long those who share k wait after err. A connection that was up for long forgets
// the failures before it.
func (k *keeper) wait(c *config, r *retry, err error, now time.Time) time.Duration {
	if k.retry == nil {
		k.retry = newRetry(c)
	}
	if !k.since.IsZero() && now.Sub(k.since) >= healthyAfter {
		k.retry.healthy()
	}
	k.since = time.Time{}
	k.retry.heartbeat = max(k.retry.heartbeat, r.heartbeat)
	return k.retry.wait(err, now, k.fresh)
}

// connect makes the dial d and returns the loan of its connection, with the first turn on it. Its
// error is that of openConnection.
func (b *borrower) connect(ctx context.Context, d *dial, suspect bool, step *step) (*loan, turn, error) {
	cs := b.of
	e := d.endpoint
	if cs.config.urlFunc != nil {
		var err error
		if e, err = cs.askURL(ctx); err != nil {
			return nil, nil, &SessionError{Op: "dial", Err: err}
		}
	}
	cs.stats.dials.Add(1)
	c, err := openConnection(ctx, cs.config, e, step, cs.abandoned)
	if err != nil {
		return nil, nil, err
	}
	cs.stats.connections.Add(1)
	turn := c.takeTurn(ctx, suspect)
	l := b.opened(d, c)
	if l == nil {
		cs.mu.Lock()
		defer cs.mu.Unlock()
		cs.letGo(c, closeRequest{limit: c.closeTimeout})
		return nil, nil, &SessionError{Host: e.address, Op: "open", Err: causeOf(ctx)}
	}
	return l, turn, nil
}

func (cs *connections) askURL(ctx context.Context) (e endpoint, err error) {
	text, err := userCall[string]{option: "WithURLFunc", f: cs.config.urlFunc, left: cs.abandoned}.run(ctx)
	if err != nil {
		return endpoint{}, err
	}
	if e, err = cs.config.endpointOf(text); err != nil {
		return endpoint{}, &urlError{"WithURLFunc", err}
	}
	return e, nil
}

// inquiry is a connection to another host for the questions of stall detectors. Those of all
// consumers take turns on it, and the last one closes it.
type inquiry struct {
	turn  chan struct{} // has room for one; who has put something there may use conn
	conn  *connection   // nil if there is none
	users int           // who ask or wait; guarded by the mutex of connections
}

// inquire opens a connection to a host for a question, unless there is one from the last question,
// and lets ask ask it, all within ctx.
func (cs *connections) inquire(ctx context.Context, e endpoint, ask func(*connection) error) error {
	i := cs.inquiry(e.address)
	defer cs.forget(e.address, i)
	select {
	case i.turn <- struct{}{}:
		defer func() { <-i.turn }()
	case <-ctx.Done():
		return causeOf(ctx)
	}
	defer i.closeIfDead()
	if i.conn == nil {
		c, err := openConnection(ctx, cs.config, e, newStep("dial"), cs.abandoned)
		if err != nil {
			return err
		}
		i.conn = c
	}
	c := i.conn
	defer context.AfterFunc(ctx, func() { c.socket.Kill(causeOf(ctx)) })()
	return ask(c)
}

func (cs *connections) inquiry(address string) *inquiry {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	i := cs.inquiries[address]
	if i == nil {
		i = &inquiry{turn: make(chan struct{}, 1)}
		cs.inquiries[address] = i
	}
	i.users++
	return i
}

// closeIfDead closes the connection if it is of no use to those who wait. Who has the turn calls
// it.
func (i *inquiry) closeIfDead() {
	if i.conn != nil && !i.conn.alive() {
		i.close()
	}
}

func (i *inquiry) close() {
	i.conn.close(closeRequest{limit: i.conn.closeTimeout})
	<-i.conn.done
	i.conn = nil
}

// forget is called by all who have asked, or have given up waiting. The last one closes the
// connection, whichever that is.
func (cs *connections) forget(address string, i *inquiry) {
	cs.mu.Lock()
	i.users--
	last := i.users == 0
	if last {
		delete(cs.inquiries, address)
	}
	cs.mu.Unlock()
	if last && i.conn != nil {
		i.close()
	}
}
