//go:build !unix

package main

import (
	"context"
	"os/exec"
)

func ownGroup(*exec.Cmd) {}

func withMemoryLimit(ctx context.Context, program string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, program, args...)
}
