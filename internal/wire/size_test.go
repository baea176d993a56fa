package wire

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A basic.deliver that is cut off in its exchange is refused before the size is known.
func TestSizeOfAnUnreadableMessageIsItsOwn(t *testing.T) {
	deliver := methodOf(1, 60, 60, append([]byte{1, 't'}, 0, 0, 0, 0, 0, 0, 0, 2, 1, 200, 'x')...)
	header := frameOf(frameHeader, 1, 0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0)
	stream := messageOf(1, 1, []byte{0, 0}, strings.Repeat("x", 1000)) // the one before
	for _, frame := range [][]byte{deliver, header, frameOf(frameBody, 1, 'a', 'b', 'c')} {
		stream = append(stream, frame...)
	}
	_, _, unfit, _ := sortedAll(t, stream, 0, func(left int) int { return left })
	require.Len(t, unfit, 1)
	assert.EqualValues(t, 3, unfit[0].size)
}
