// Package steadymqtest is a RabbitMQ for tests: an AMQP 0-9-1 broker inside the test process, with faults.
package steadymqtest
