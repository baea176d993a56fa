package faultproxy

import "sync/atomic"

// besideStep keeps the numbers of connections apart that several proxies write into one log.
const besideStep = 1_000_000

var besides atomic.Int64

// Beside is another proxy that writes into the same log: for a client that knows several addresses. Its connections count from a higher
// number, and so does its Counts().Accepted.
func (p *Proxy) Beside(target string) (*Proxy, error) {
	other, err := New(target)
	if err != nil {
		return nil, err
	}
	other.mu.Lock()
	defer other.mu.Unlock()
	other.log, other.accepted = p.log, int(besides.Add(1))*besideStep
	return other, nil
}

// Up says whether an AMQP broker answers at addr.
func Up(addr string) bool { return targetUp(addr) }
