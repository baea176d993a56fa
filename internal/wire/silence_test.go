package wire

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// Its timer may have fired already when it is called off.
func TestLimitThatIsCalledOffWhileItLooksStaysOff(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, _, _ := pipe(t, Options{})
		l := &silenceLimit{
			socket: s, limit: time.Second, latest: time.Now().Add(time.Hour),
			over: func() { t.Error("called") },
		}
		l.timer = time.AfterFunc(time.Second, l.look)
		assert.True(t, l.stop())
		l.again(time.Second) // by a look that was under way
		assert.False(t, l.stop())
		l.again(time.Second)
		time.Sleep(time.Minute)
	})
}
