// Package steadymq provides self-healing RabbitMQ consumers on
// github.com/rabbitmq/amqp091-go.
package steadymq
