package house

type wall struct{ base }

func build() *wall {
	w := &wall{}
	w.add()
	return w
}
