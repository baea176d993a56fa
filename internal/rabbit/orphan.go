package rabbit

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/testcontainers/testcontainers-go"
)

// owner names this process on this boot of this machine. The start time keeps a reused process id from looking alive.
func owner() string {
	host, _ := os.Hostname()
	return fmt.Sprintf("%s/%d/%s", host, os.Getpid(), startTime(os.Getpid()))
}

// startTime is field 22 of /proc/<pid>/stat, "" where there is none.
func startTime(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	f := strings.Fields(rest)
	if len(f) < 20 {
		return ""
	}
	return f[19]
}

// orphaned says whether the process that made something on this machine has ended. Where that cannot be known, it has not.
func orphaned(label string) bool {
	var pid int
	host, rest, _ := strings.Cut(label, "/")
	id, started, _ := strings.Cut(rest, "/")
	here, _ := os.Hostname()
	if _, err := fmt.Sscan(id, &pid); err != nil || host != here || started == "" {
		return false
	}
	return startTime(pid) != started
}

// removeOrphans removes containers and networks of test processes that were killed: without the reaper nobody else does.
func removeOrphans(ctx context.Context, cli *testcontainers.DockerClient) {
	list, err := engineAsk(ctx, cli.ContainerList, `{"All": true, "Filters": {"label": {"`+ownerLabel+`": true}}}`)
	if err != nil {
		return
	}
	for _, c := range list.Items {
		if orphaned(c.Labels[ownerLabel]) {
			logf("removing the container %.12s that an ended test process left", c.ID)
			_, _ = engineCall(ctx, cli.ContainerRemove, c.ID, `{"Force": true, "RemoveVolumes": true}`)
		}
	}
	nets, err := engineAsk(ctx, cli.NetworkList, `{"Filters": {"label": {"`+ownerLabel+`": true}}}`)
	if err != nil {
		return
	}
	for _, n := range nets.Items {
		if orphaned(n.Labels[ownerLabel]) {
			_, _ = engineCall(ctx, cli.NetworkRemove, n.ID, `{}`)
		}
	}
}
