package house

const limit = 3

type roof struct {
	wall
	height int
}

func (r *roof) raise() {
	r.height += low(r)
	r.count = r.wall.count
}

func (b base) astray() int { return b.count }
