package house

var _ = limit
