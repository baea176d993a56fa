// Package steadymqtest is a RabbitMQ for tests: an AMQP 0-9-1 broker inside the test process, with faults.
//
// It does for consumers what net/http/httptest does for clients of HTTP:
//
//	b := steadymqtest.NewBroker(t)
//	b.DeclareQueue("orders", steadymqtest.QueueOptions{})
//	b.Publish("orders", "one coffee")
//
//	c, err := steadymq.New(b.URL, "orders", steadymq.WithDialer(b.Dialer()))
//	// or, with the plain driver: amqp.DialConfig(b.URL, amqp.Config{Dial: b.Dial})
//
//	b.CloseConnections(320, "shutdown")  // one of forty faults
//	err = b.WaitSettled(ctx, "orders")   // everything published has been acked
//	b.Violations()                       // no tag settled twice, unknown, or with multiple=true
//
// It is for tests and demos. It keeps everything in memory and is not meant to be fast for its own sake (about 150,000 messages a second through the plain driver). It uses the standard
// library only.
//
// # Virtual time
//
// Everything works inside a testing/synctest bubble, where ten minutes of outage take a millisecond; make the broker inside the
// bubble. The network is in memory, so no goroutine of the broker ever waits for a socket; a Write never blocks (but under
// [Faults.ZeroWindow]); no mutex is held while a goroutine blocks. A goroutine that waits for a sync.Mutex is not durably
// blocked: if the code under test holds one while it waits, the bubble's clock stops. [Broker.Listen] serves real TCP, outside of bubbles.
//
// # Faults
//
// Those of [Broker] strike everywhere, those of [Broker.Host] one address, those of [Faults.Named] some connections:
//
//	the broker says so   CloseConnections CloseChannels CancelConsumers ReleaseConsumers RefuseVhost RefuseConsume RefuseDeclare
//	                     RefuseLogin SetLoginRefusal Broker.SetPermissions Broker.DeleteQueue Broker.Blocked
//	to a publisher       LateConfirms LoseConfirms NackConfirms Unroutable RefusePublish Broker.FillQueue Broker.Blocked Broker.BlockedFor
//	the broker is ill    HangAt DropAt SilentAfterOpen Silence Late541 SlowCloseOk NoCloseOk StrayReply StrayDelivery Garbage
//	                     Broker.QuorumStall CutOff Kill PowerOff Restart
//	the network          Refuse DropSYN DNSFailure Reset FIN BlackHole Stall ZeroWindow SetLatency CutAfter CutClientAfter
//	the end of it        Heal
//
// # What it is true to, and what not
//
// TestConformance runs one script against this broker and against RabbitMQ 3.10, 4.0 and 4.3, and compares codes, texts, order,
// flags and counters; docs/CONFORMANCE.md has the table of scripts and versions. The behaviour is that of RabbitMQ 4.3 unless
// [WithVersion] asks for an older one. Where it differs on purpose:
//
//	what                        RabbitMQ                                   here
//	vhosts                      many                                       "/" only
//	topic permissions           by routing key                             none; for the others see [Broker.SetPermissions]
//	exchange types              also headers, plugins                      direct, fanout, topic
//	queue arguments             many                                       those that [QueueOptions] lists; others are kept, not acted on
//	queue expiry                x-expires deletes an unused queue          kept, not acted on
//	exchange auto-delete        goes with its last binding                 kept, not acted on
//	priority queues             x-max-priority                             plain order
//	transactions                tx.select, tx.commit, tx.rollback          tx.select, after which settlements have
//	                                                                       no effect; 540 for the others
//	consumer timeout, 406 form  looked for once a minute                   on time
//	consumer timeout of 4.3     the consumer is counted until its channel  gone at once; its tag stays taken as there
//	                            ends, and is served again, unseen by the
//	                            client, once the overdue ones are settled
//	transient shared queues     4.3.0 to 4.3.5 refuse them by 541; the     refused by 541 from 4.3 on
//	                            4.3.6 of Debian does not
//	x-stream-offset=last        the last chunk                             the last message
//	streams                     retention, single active consumer          kept for ever, all consumers active
//	memory and disk alarms      by themselves                              [Broker.Blocked]
//	quorum queue before 4.0     returned messages may come after new ones  returned messages come first
//	single active consumer      3.10: a classic queue may forget to go on  goes on with the next at once
//	server-named things         random                                     counted, so that runs repeat
//	dead-lettering              at most once or at least once              exactly once; at least once keeps what has no target
//	x-max-length-bytes          a limit                                    kept, not acted on
//	confirms                    several in one when they are due together  each alone, but under [Faults.LateConfirms]
//	channel_max                 enforced                                   not enforced
//	one connection's frames     channels work side by side                 strictly in order
//
// The last row means that a fault here strikes between two frames, never inside the handling of one.
//
// # Order of things
//
// The broker's answer to a frame is complete before it looks at the next one; deliveries that follow from a settlement go out with it.
// A call such as [Broker.Publish] or a fault has done its work when it returns: what it sends is on the network, and what the
// client sends next finds the broker as it left it.
package steadymqtest
