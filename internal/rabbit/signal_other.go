//go:build !unix

package rabbit

import "os/exec"

const (
	sigTerm = iota
	sigKill
	sigStop
	sigCont
)

func ownGroup(*exec.Cmd) {}

// signalGroup can only end the process here: other systems have no groups to freeze.
func signalGroup(cmd *exec.Cmd, sig int) error {
	if sig != sigTerm && sig != sigKill {
		return ErrUnsupported
	}
	return cmd.Process.Kill()
}
