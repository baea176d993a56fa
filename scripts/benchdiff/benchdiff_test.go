package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const printed = `goos: linux
BenchmarkDispatch/workers=1/consumer=driver-2     	   20000	      3000 ns/op	      5000.0 cpu-ns/op	    1337 B/op
BenchmarkDispatch/workers=1/consumer=steadymq-2   	   20000	       400 ns/op	       700.5 cpu-ns/op	     464 B/op
PASS
`

func TestValuesOfOneUnitAreRead(t *testing.T) {
	v := make(samples)
	for range 2 {
		require.NoError(t, v.read(strings.NewReader(printed), "cpu-ns/op"))
	}
	assert.Equal(t, samples{
		"BenchmarkDispatch/workers=1/consumer=driver-2":   {5000, 5000},
		"BenchmarkDispatch/workers=1/consumer=steadymq-2": {700.5, 700.5},
	}, v)
}

func TestLossOfTheMedianIsJudged(t *testing.T) {
	o := options{unit: "ns", judged: "steady", limit: 10}
	base := samples{"steady": {90, 100, 500}, "driver": {100}}
	for _, c := range []struct {
		head    samples
		err     error
		printed string
	}{
		{samples{"steady": {1, 110, 200}}, nil, "steady: 100.0 -> 110.0 ns, +10.0 %, ok\ndriver: 100.0 ns, gone\n"},
		{samples{"steady": {50}}, nil, "steady: 100.0 -> 50.0 ns, -50.0 %, ok\ndriver: 100.0 ns, gone\n"},
		{samples{"steady": {110, 112}}, errLoss, "steady: 100.0 -> 111.0 ns, +11.0 %, FAIL: more than 10 %\ndriver: 100.0 ns, gone\n"},
		{samples{"steady": {100}, "driver": {300}}, nil, "driver: 100.0 -> 300.0 ns, +200.0 %, not judged\nsteady: 100.0 -> 100.0 ns, +0.0 %, ok\n"},
		{samples{"steady": {100}, "steady too": {300}}, nil, "steady: 100.0 -> 100.0 ns, +0.0 %, ok\nsteady too: 300.0 ns, new\ndriver: 100.0 ns, gone\n"},
	} {
		var out strings.Builder
		assert.Equal(t, c.err, o.compare(&out, base, c.head))
		assert.Equal(t, c.printed, out.String())
	}
}

func TestNothingToCompareIsAnError(t *testing.T) {
	o := options{unit: "ns", judged: "steady", limit: 10}
	require.ErrorContains(t, o.compare(&strings.Builder{}, samples{}, samples{"steady": {1}}), "nothing to compare")
}
