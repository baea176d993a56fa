package steadymq

import (
	"crypto/x509"
	"errors"

	amqp "github.com/rabbitmq/amqp091-go"
)

// advice says what to do about a refusal of the broker, whose own text says only what it refuses.
// Code and step decide, never the text: it repeats names of queues and users.
func advice(op string, err error) string {
	var said *amqp.Error
	if !errors.As(err, &said) || !said.Server {
		return adviceTLS(err)
	}
	switch kind := classifySaid(said); {
	case kind == classAbsent:
		return "; it is asked for again until someone has declared it, which WithQueue or WithTopology can do"
	case kind != classOperator:
		return ""
	case op == "open" && said.Code == amqp.NotAllowed:
		return "; the path of the URL names the virtual host: it must exist, and the user needs permissions on it"
	case op == "open":
		return ""
	case said.Code == amqp.AccessRefused:
		return "; give the user the permission (rabbitmqctl set_permissions)"
	case op == "topology" && said.Code == amqp.PreconditionFailed:
		return "; what exists was declared otherwise: declare it alike, or delete it (its messages go with it)"
	}
	return ""
}

// adviceTLS says what to do about a certificate that is not trusted.
func adviceTLS(err error) string {
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return "; trust its CA by cacertfile in the URL or by WithTLSConfig (RootCAs)"
	case errors.As(err, new(x509.HostnameError)):
		return "; use a host name of the certificate in the URL, or name one by server_name_indication in the URL or by WithTLSConfig (ServerName)"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "; renew the broker's certificate, or set the clock of this host"
	}
	return ""
}
