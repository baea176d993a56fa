package steadymq_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
)

func TestFunctionThatHangsEndsRunAfterTheSetupLimit(t *testing.T) {
	release := make(chan struct{})
	for name, option := range map[string]steadymq.Option{
		"WithFatal":      steadymq.WithFatal(func(error) bool { <-release; return false }),
		"WithMiddleware": steadymq.WithMiddleware(func(h steadymq.Handler) steadymq.Handler { <-release; return h }),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(b *bench) {
				release = make(chan struct{}) // of this bubble
				b.run(ack, option, steadymq.WithSetupTimeout(2*time.Second))
				b.wait(time.Second)
				b.broker.Reset()
				b.wait(5 * time.Second)
				require.Len(b, b.result, 1, "Run has returned")
				err := <-b.result
				b.result = nil
				assert.ErrorContains(b, err, name+": no answer within the setup limit (WithSetupTimeout)")
				assert.EqualValues(b, 1, b.consumer.Stats().Abandoned)
				close(release)
			})
		})
	}
}
