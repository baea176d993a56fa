// Package wire is everything between a net.Conn and the messages of a consumer: it takes bytes from
// a broker and gives deliveries, takes settlements and gives bytes. Everything else that AMQP needs
// (the handshake, channels, answers to calls) is the work of the driver, which talks through a
// [Socket] as if that were the connection.
//
// In: bytes of the broker come through Read, which parts them. The deliveries of a [Subscription]
// are decoded and given to its [Receiver]; all other frames are what Read returns.
//
// Out: the driver's frames come through Write, settlements through [Subscription.Ack] and its like.
// Both wait in one buffer until the writer puts them on the connection, many with one system call.
//
// Channels: a [Channel] is given up by itself where a call on it hangs. The wire then plays each
// side to the other: it closes the channel towards the broker, tells the driver that the broker has
// closed it, and lets nothing more through before both have answered.
//
// End: [Socket.Kill], [Socket.Close], or what is found on the way (an error of the connection, a
// silent peer, frames that make no sense). [Socket.Cause] keeps the first reason, [Socket.Done]
// tells of it, and [Socket.Wait] returns when nothing is left.
//
// # Goroutines
//
//	goroutine          lives          calls and owns
//	driver's reader    a connection   Read: all of inbound, the Receiver, the message being read
//	driver's callers   one call       Write
//	workers            a Run          Ack, Reject, Requeue
//	whoever gives up   one call       GiveUp: wakes the driver's reader by a read deadline
//	writer             a Socket       writeLoop: Write of the connection, the buffer it has taken
//	a timer            a moment       watch, from WatchPeer on: only looks at when Read last read
//	whoever ends it    one call       Kill, Close, Wait
//
// # Locks
//
// The mutex of outbound guards what waits for the writer, the subscriptions and channels of the
// socket, and what is known of the frame that the driver is writing. It is held for memory only,
// never across a call that may block, and no other lock of the library is taken under it.
// silenceLimit has a mutex of its own for its timer, and inbound one for the read deadline. All
// else that goroutines share is atomic: when bytes came, how many deliveries are unsettled, why the
// socket ends.
package wire
