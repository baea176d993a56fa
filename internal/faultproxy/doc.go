// Package faultproxy stands between an AMQP client and its broker, breaks the path at any moment, and reads what passes.
//
// A fault applies to the connections that are open and to those that come later, until Heal. What an in-process proxy cannot do is
// keep the kernel from acknowledging bytes: a swallowed byte was received as far as the sender's TCP is concerned.
//
// The proxy follows its target: while that refuses connections the proxy refuses them too, so a client sees a stopped broker as it is.
package faultproxy
