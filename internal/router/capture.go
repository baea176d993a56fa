//go:build linux

package router

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Packet is a TCP segment that passed the clients' interface.
type Packet struct {
	At       time.Time
	Out      bool // the client sent it
	Src, Dst string
	Flags    string // of SYN, ACK, FIN, RST; PSH and others are left out
	Payload  int
}

func (p Packet) String() string {
	return fmt.Sprintf("%s > %s %s %d bytes", p.Src, p.Dst, p.Flags, p.Payload)
}

// Capture reads what passes between the clients and the router.
type Capture struct {
	file *os.File
	done chan struct{}

	mu      sync.Mutex
	packets []Packet
}

// Capture begins to read; Close ends it.
func (n *Net) Capture() (*Capture, error) {
	c := &Capture{done: make(chan struct{})}
	err := enter(n.client(), func() (err error) {
		c.file, err = packetSocket("router")
		return err
	})
	if err != nil {
		return nil, err
	}
	go c.read()
	return c, nil
}

func packetSocket(device string) (*os.File, error) {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return nil, err
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, syscall.ETH_P_ALL))
	fd, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("router: packet socket: %w", err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}); err != nil {
		_ = syscall.Close(fd)
		return nil, fmt.Errorf("router: packet socket on %s: %w", device, err)
	}
	if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TIMESTAMP, 1); err != nil {
		_ = syscall.Close(fd)
		return nil, fmt.Errorf("router: timestamps: %w", err)
	}
	return os.NewFile(uintptr(fd), "packets of "+device), nil
}

func (c *Capture) read() {
	defer close(c.done)
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	buf, oob := make([]byte, 1<<16), make([]byte, 64)
	for {
		var n, control int
		errWait := raw.Read(func(fd uintptr) bool {
			n, control, _, _, err = syscall.Recvmsg(int(fd), buf, oob, syscall.MSG_DONTWAIT)
			return !errors.Is(err, syscall.EAGAIN)
		})
		if errWait != nil || err != nil {
			return
		}
		if p, ok := parse(buf[:n]); ok {
			p.At = stamp(oob[:control])
			c.mu.Lock()
			c.packets = append(c.packets, p)
			c.mu.Unlock()
		}
	}
}

// stamp is when the kernel had the packet, which may be long before this process got to read it.
func stamp(control []byte) time.Time {
	all, err := syscall.ParseSocketControlMessage(control)
	if err != nil || len(all) == 0 || len(all[0].Data) < 16 {
		return time.Now()
	}
	data, e := all[0].Data, binary.NativeEndian
	return time.Unix(int64(e.Uint64(data)), int64(e.Uint64(data[8:]))*int64(time.Microsecond))
}

// parse reads an IPv4 packet that holds a TCP segment.
func parse(b []byte) (p Packet, ok bool) {
	const minIP, minTCP, tcp = 20, 20, 6
	if len(b) < minIP || b[0]>>4 != 4 || b[9] != tcp {
		return p, false
	}
	head, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if total > len(b) || total < head+minTCP {
		return p, false
	}
	seg := b[head:total]
	end := func(ip []byte, port []byte) string {
		return fmt.Sprintf("%s:%d", net.IP(ip), binary.BigEndian.Uint16(port))
	}
	p = Packet{
		Src: end(b[12:16], seg[0:]), Dst: end(b[16:20], seg[2:]),
		Payload: len(seg) - int(seg[12]>>4)*4,
	}
	p.Out = strings.HasPrefix(p.Src, clientNet)
	var flags []string
	for _, f := range []struct {
		bit  byte
		name string
	}{{2, "SYN"}, {1, "FIN"}, {4, "RST"}, {16, "ACK"}} {
		if seg[13]&f.bit != 0 {
			flags = append(flags, f.name)
		}
	}
	p.Flags = strings.Join(flags, " ")
	return p, true
}

// Of are the packets of one client socket since a moment, in order.
func (c *Capture) Of(local string, since time.Time) []Packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(c.packets), func(p Packet) bool {
		return p.Src != local && p.Dst != local || p.At.Before(since)
	})
}

// Close ends the capture.
func (c *Capture) Close() {
	_ = c.file.Close()
	<-c.done
}
