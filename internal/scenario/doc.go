// Package scenario judges a consumer on a real broker.
//
// A [Scenario] is one consumer on one queue, a publisher whose messages are confirmed, and a proxy
// that reads every ack on the wire, or none where the consumer dials the broker itself. A test
// starts it, lets something happen to it, and has it judged: no confirmed message is lost, no ack
// was sent that no handler had earned, and what was to heal has healed within its bound.
package scenario
