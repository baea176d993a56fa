package steadymq_test

import (
	"github.com/steadymq/steadymq"
	"github.com/steadymq/steadymq/internal/rig"
)

// What the tests on real brokers share with the rig, under the names they know.

type logBuffer = rig.LogBuffer

const password = rig.Password

var (
	ack        = rig.Ack
	ofType     = rig.OfType
	queueTypes = rig.QueueTypes
)

// beginning is a rig.Beginning.
type beginning struct {
	rig.Beginning
	name   string
	offset func() any
}

func (g beginning) options() []steadymq.Option { return g.Options() }

var beginnings = func() (all []beginning) {
	for _, g := range rig.Beginnings {
		all = append(all, beginning{Beginning: g, name: g.Name, offset: g.Offset})
	}
	return all
}()
