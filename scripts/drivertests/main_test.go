package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestIntegrationTestsAreThoseOfTaggedFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	write("a_test.go", "//go:build integration\n\npackage p\n\nfunc TestA(t *testing.T) {}\nfunc helper(t *testing.T) {}\nfunc TestMain(m *testing.M) {}\n")
	write("b_test.go", "package p\n\nfunc TestB(t *testing.T) {}\n")
	names, err := integrationTests(dir)
	require.NoError(t, err)
	require.Equal(t, []string{"TestA"}, names)
}

func TestWhatIsLeftOutMustExist(t *testing.T) {
	chosen, err := choose([]string{"TestA", "TestBOne", "TestC"}, map[string]string{"TestB.*": "why", "TestC": "why"})
	require.NoError(t, err)
	require.Equal(t, []string{"TestA"}, chosen)
	_, err = choose([]string{"TestA"}, map[string]string{"TestB": "no reason any more"})
	require.ErrorContains(t, err, "TestB is left out (no reason any more) and does not exist")
	_, err = choose(nil, nil)
	require.Error(t, err)
}

func TestEveryChosenTestHasToPass(t *testing.T) {
	const out = "--- PASS: TestA (0.00s)\n--- SKIP: TestB (0.00s)\n"
	var w bytes.Buffer
	require.NoError(t, judge(&w, out, nil, []string{"TestA"}))
	require.Contains(t, w.String(), "1 integration tests")
	require.ErrorContains(t, judge(&w, out, nil, []string{"TestA", "TestB"}), "not passed: TestB")
	require.Error(t, judge(&w, out, errors.New("exit status 1"), []string{"TestA"}))
}
