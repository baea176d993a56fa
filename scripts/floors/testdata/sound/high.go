package sound

type roof struct{ base }

func (r *roof) raise() { r.count++ }

var _ = (*roof).raise
