package behaviour_test

import (
	"crypto/tls"
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq/internal/rig"
)

// The roots of the system are read once in a process, so this takes a process of its own.
func TestRootsOfTheSystemAreTrustedUnlessTheURLHasItsOwn(t *testing.T) {
	const certificateOfChild, keyOfChild = "STEADYMQ_TEST_CERTIFICATE", "STEADYMQ_TEST_KEY"
	if os.Getenv(certificateOfChild) == "" {
		_, pair := clientCertificate(t)
		certificate, key := certificateFiles(t, pair)
		child := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
		child.Env = append(os.Environ(), "SSL_CERT_FILE="+certificate, "SSL_CERT_DIR="+t.TempDir(), certificateOfChild+"="+certificate, keyOfChild+"="+key)
		output, err := child.CombinedOutput()
		require.NoError(t, err, "%s", output)
		assert.Contains(t, string(output), "PASS")
		return
	}
	pair, err := tls.LoadX509KeyPair(os.Getenv(certificateOfChild), os.Getenv(keyOfChild))
	require.NoError(t, err)
	_, other := clientCertificate(t)
	own, _ := certificateFiles(t, other)
	for parameters, trusted := range map[string]bool{
		"": true,
		"?cacertfile=" + os.Getenv(certificateOfChild): true,
		"?cacertfile=" + own:                           false,
	} {
		rig.Bubble(t, func(r *rig.Rig) {
			assert.Equal(r, trusted, heardBy(r, pair, "amqps://mq.example"+parameters)["mq.example:5671"].done, parameters)
		})
	}
}
