// Package rabbit gets a real RabbitMQ for tests, and breaks it on request.
//
// A broker comes from the first of these that works:
//
//  1. STEADYMQ_AMQP_URL: a broker somebody else runs. It can be used, not commanded.
//  2. Docker, through testcontainers-go: the official image, or, where no registry answers, an image built on the spot from
//     Debian's packages with debootstrap (the generations 3.10, 4.0 and 4.3).
//  3. A rabbitmq-server on this machine, with its own data directory, node name and ports.
//  4. Debian's rabbitmq-server package, installed.
//
// Nothing is installed on the machine unless STEADYMQ_REQUIRE_BROKER=1 or STEADYMQ_INSTALL=1 says so. Without a broker a test
// skips and says how to get one; with STEADYMQ_REQUIRE_BROKER=1 it fails instead. All traffic stays on loopback and inside the
// containers this package made, and everything it started it ends again, by its id.
package rabbit
