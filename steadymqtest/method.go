package steadymqtest

import (
	"fmt"
	"strings"
)

// method is class and method id of AMQP 0-9-1 in one number.
type method uint32

const classBasic = 60

const (
	connectionStart          method = 10<<16 | 10
	connectionStartOk        method = 10<<16 | 11
	connectionTune           method = 10<<16 | 30
	connectionTuneOk         method = 10<<16 | 31
	connectionOpen           method = 10<<16 | 40
	connectionOpenOk         method = 10<<16 | 41
	connectionClose          method = 10<<16 | 50
	connectionCloseOk        method = 10<<16 | 51
	connectionBlocked        method = 10<<16 | 60
	connectionUnblocked      method = 10<<16 | 61
	connectionUpdateSecret   method = 10<<16 | 70
	connectionUpdateSecretOk method = 10<<16 | 71

	channelOpen    method = 20<<16 | 10
	channelOpenOk  method = 20<<16 | 11
	channelFlow    method = 20<<16 | 20
	channelFlowOk  method = 20<<16 | 21
	channelClose   method = 20<<16 | 40
	channelCloseOk method = 20<<16 | 41

	exchangeDeclare   method = 40<<16 | 10
	exchangeDeclareOk method = 40<<16 | 11
	exchangeDelete    method = 40<<16 | 20
	exchangeDeleteOk  method = 40<<16 | 21
	exchangeBind      method = 40<<16 | 30
	exchangeBindOk    method = 40<<16 | 31
	exchangeUnbind    method = 40<<16 | 40
	exchangeUnbindOk  method = 40<<16 | 51

	queueDeclare   method = 50<<16 | 10
	queueDeclareOk method = 50<<16 | 11
	queueBind      method = 50<<16 | 20
	queueBindOk    method = 50<<16 | 21
	queuePurge     method = 50<<16 | 30
	queuePurgeOk   method = 50<<16 | 31
	queueDelete    method = 50<<16 | 40
	queueDeleteOk  method = 50<<16 | 41
	queueUnbind    method = 50<<16 | 50
	queueUnbindOk  method = 50<<16 | 51

	basicQos          method = 60<<16 | 10
	basicQosOk        method = 60<<16 | 11
	basicConsume      method = 60<<16 | 20
	basicConsumeOk    method = 60<<16 | 21
	basicCancel       method = 60<<16 | 30
	basicCancelOk     method = 60<<16 | 31
	basicPublish      method = 60<<16 | 40
	basicReturn       method = 60<<16 | 50
	basicDeliver      method = 60<<16 | 60
	basicGet          method = 60<<16 | 70
	basicGetOk        method = 60<<16 | 71
	basicGetEmpty     method = 60<<16 | 72
	basicAck          method = 60<<16 | 80
	basicReject       method = 60<<16 | 90
	basicRecoverAsync method = 60<<16 | 100
	basicRecover      method = 60<<16 | 110
	basicRecoverOk    method = 60<<16 | 111
	basicNack         method = 60<<16 | 120

	confirmSelect   method = 85<<16 | 10
	confirmSelectOk method = 85<<16 | 11

	txSelect   method = 90<<16 | 10
	txSelectOk method = 90<<16 | 11
)

func (m method) class() uint16 { return uint16(m >> 16) }
func (m method) id() uint16    { return uint16(m) }

// refusal is what the broker answers instead of a reply: a connection.close or a channel.close with code and text.
type refusal struct {
	code int
	text string
}

func (r *refusal) hard() bool { return isHard(r.code) }

func refuse(code int, format string, args ...any) *refusal {
	return &refusal{code: code, text: fmt.Sprintf(format, args...)}
}

// isHard reports whether RabbitMQ ends the connection for this code, not only the channel.
func isHard(code int) bool {
	switch code {
	case 311, 312, 313, 403, 404, 405, 406:
		return false
	}
	return true
}

var replyNames = map[int]string{
	311: "CONTENT_TOO_LARGE", 312: "NO_ROUTE", 313: "NO_CONSUMERS", 320: "CONNECTION_FORCED", 402: "INVALID_PATH",
	403: "ACCESS_REFUSED", 404: "NOT_FOUND", 405: "RESOURCE_LOCKED", 406: "PRECONDITION_FAILED", 501: "FRAME_ERROR",
	502: "SYNTAX_ERROR", 503: "COMMAND_INVALID", 504: "CHANNEL_ERROR", 505: "UNEXPECTED_FRAME", 506: "RESOURCE_ERROR",
	530: "NOT_ALLOWED", 540: "NOT_IMPLEMENTED", 541: "INTERNAL_ERROR",
}

// replyText puts the name of the code before the text, as RabbitMQ does, unless the caller has done it.
func replyText(code int, text string) string {
	name, ok := replyNames[code]
	if !ok || strings.HasPrefix(text, name) {
		return text
	}
	if text == "" {
		return name
	}
	return name + " - " + text
}
