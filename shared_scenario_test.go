package steadymq_test

import (
	"crypto/x509"
	"slices"

	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/rabbit"
	"github.com/steadymq/steadymq/internal/scenario"
)

// authority is an Authority under the names that refusal_test.go uses.
type authority struct{ *scenario.Authority }

func newAuthority(t require.TestingT) authority { return authority{scenario.NewAuthority(t)} }

func (a authority) sign(t require.TestingT) rabbit.TLS { return a.Sign(t) }

func (a authority) pool() *x509.CertPool { return a.Pool() }

// firsts are the messages in the order in which each was handled first.
func firsts(handled []string) (all []string) {
	for _, body := range handled {
		if !slices.Contains(all, body) {
			all = append(all, body)
		}
	}
	return all
}
