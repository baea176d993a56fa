package house

// It is in one room with middle.go.
func (w *wall) twice() *wall { return build() }
