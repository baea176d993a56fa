package rabbit

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
)

// freePort finds a port below the range from which the system takes ports by itself. A stopped broker's port must stay free until it is
// started again, and a dial to a refused port in that range can even connect to itself.
func freePort() (int, error) {
	for range 200 {
		port := 20000 + rand.IntN(12000)
		lis, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		return port, lis.Close()
	}
	return 0, errors.New("rabbit: no free port")
}
