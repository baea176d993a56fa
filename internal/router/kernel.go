//go:build linux

package router

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"
)

// enter calls f on a thread in a namespace of that name. The sockets f makes stay there, whoever uses them. The thread ends with the call.
func enter(ns string, f func() error) error {
	number, ok := map[string]uintptr{"amd64": 308, "arm64": 268}[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("router: the number of setns is not known for %s", runtime.GOARCH)
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: nobody else shall run on this thread
		file, err := os.Open("/run/netns/" + ns)
		if err != nil {
			result <- err
			return
		}
		defer func() { _ = file.Close() }()
		if _, _, errno := syscall.RawSyscall(number, file.Fd(), syscall.CLONE_NEWNET, 0); errno != 0 {
			result <- fmt.Errorf("router: setns to %s: %w", ns, errno)
			return
		}
		result <- f()
	}()
	return <-result
}

func setUserTimeout(c syscall.RawConn, d time.Duration) (err error) {
	const tcpUserTimeout = 0x12 // of tcp(7)
	errControl := c.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(d.Milliseconds()))
	})
	return errors.Join(err, errControl)
}

// flushConnections empties the table of connections of this thread's namespace, as conntrack -F does.
func flushConnections() error {
	const (
		subsystemConntrack = 1
		deleteConntrack    = 2
		headerLen, msgLen  = 16, 20 // of nlmsghdr, and with the nfgenmsg that follows
	)
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("router: netlink: %w", err)
	}
	defer func() { _ = syscall.Close(fd) }()
	e := binary.NativeEndian
	msg := make([]byte, msgLen)
	e.PutUint32(msg, msgLen)
	e.PutUint16(msg[4:], subsystemConntrack<<8|deleteConntrack)
	e.PutUint16(msg[6:], syscall.NLM_F_REQUEST|syscall.NLM_F_ACK)
	if err := syscall.Sendto(fd, msg, 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
		return fmt.Errorf("router: flush: %w", err)
	}
	reply := make([]byte, 4096)
	n, _, err := syscall.Recvfrom(fd, reply, 0)
	if err != nil || n < headerLen+4 {
		return fmt.Errorf("router: flush: answer of %d bytes: %w", n, err)
	}
	if code := int32(e.Uint32(reply[headerLen:])); code != 0 {
		return fmt.Errorf("router: flush: %w", syscall.Errno(-code))
	}
	return nil
}
