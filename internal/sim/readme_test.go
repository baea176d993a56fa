package sim_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestNumbersOfTheREADMEAreThoseOfTheTests(t *testing.T) {
	text, err := os.ReadFile(inRoot("README.md"))
	require.NoError(t, err)
	scripts, err := filepath.Glob(inRoot("steadymqtest/testdata/rabbitmq-4.3/*.txt"))
	require.NoError(t, err)
	for _, number := range []string{
		fmt.Sprintf("faults of %d kinds", len(simKinds)),
		fmt.Sprintf("| %d slips", len(mutants)),
		fmt.Sprintf("| %d scripts", len(scripts)),
	} {
		assert.True(t, strings.Contains(string(text), number), "the README does not say %q", number)
	}
}
