// Package router is a network of namespaces for tests on Linux: a client, a stateful router in the middle, and the hosts of a broker behind
// it. The packets are real and so is the kernel that forwards, forgets and swallows them, which no proxy can do: a proxy ends a connection
// where a router only stops carrying it.
//
// Nothing leaves the namespaces. They end with the test; those of a test process that was killed are removed by the next.
package router
