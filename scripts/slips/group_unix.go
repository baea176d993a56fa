//go:build unix

package main

import (
	"context"
	"os/exec"
	"syscall"
)

// ownGroup puts the process into a group of its own, all of which ends with the command's context:
// the compiler and some tests start processes themselves.
func ownGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
}

// withMemoryLimit ends a program whose slip makes it collect without end before the machine suffers,
// where the system can.
func withMemoryLimit(ctx context.Context, program string, args ...string) *exec.Cmd {
	const script = `ulimit -v 8000000 2>/dev/null; exec "$0" "$@"`
	return exec.CommandContext(ctx, "sh", append([]string{"-c", script, program}, args...)...)
}
