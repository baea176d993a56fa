package behaviour_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

func TestFunctionThatHangsEndsRunAfterTheSetupLimit(t *testing.T) {
	release := make(chan struct{})
	for name, option := range map[string]steadymq.Option{
		"WithFatal":      steadymq.WithFatal(func(error) bool { <-release; return false }),
		"WithMiddleware": steadymq.WithMiddleware(func(h steadymq.Handler) steadymq.Handler { <-release; return h }),
	} {
		t.Run(name, func(t *testing.T) {
			rig.Bubble(t, func(r *rig.Rig) {
				release = make(chan struct{}) // of this bubble
				r.Run(rig.Ack, option, steadymq.WithSetupTimeout(2*time.Second))
				r.Wait(time.Second)
				r.Broker.Reset()
				r.Wait(5 * time.Second)
				require.Len(r, r.Result, 1, "Run has returned")
				err := <-r.Result
				r.Result = nil
				assert.ErrorContains(r, err, name+": no answer within the setup limit (WithSetupTimeout)")
				assert.EqualValues(r, 1, r.Consumer.Stats().Abandoned)
				close(release)
			})
		})
	}
}
