package main

import (
	"encoding/xml"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestRatiosCompareNeighbours(t *testing.T) {
	second := func(n uint64) measurement { return measurement{Messages: n, Elapsed: time.Second, User: time.Second} }
	// The machine is ten times slower in the last two rounds: the medians of
	// the rates alone would say 20, the rounds say 2.
	base := []measurement{second(100), second(10), second(10)}
	o := summarize(variant{}, []measurement{second(200), second(200), second(20)}, base)
	if o.rateRatio != 2 || o.rateMin != 2 || o.rateMax != 20 {
		t.Errorf("ratio %v (%v to %v), want 2 (2 to 20)", o.rateRatio, o.rateMin, o.rateMax)
	}
	if o.cpuRatio != 0.5 {
		t.Errorf("CPU ratio %v, want 0.5", o.cpuRatio)
	}
}

func TestMedian(t *testing.T) {
	for want, vs := range map[float64][]float64{0: nil, 3: {3}, 2: {3, 1, 2}, 2.5: {4, 1, 2, 3}} {
		if got := median(vs); got != want {
			t.Errorf("median(%v) = %v, want %v", vs, got, want)
		}
	}
}

func TestWorkloadFlags(t *testing.T) {
	ws, err := workloads("16,256", "", "1,64", "tls", false, false)
	if err != nil {
		t.Fatal(err)
	}
	want := []workload{
		{Prefetch: 16, Body: 100, Workers: 1, TLS: true},
		{Prefetch: 256, Body: 100, Workers: 1, TLS: true},
		{Prefetch: 256, Body: 100, Workers: 64, TLS: true},
	}
	if !slices.Equal(ws, want) {
		t.Errorf("got %v, want %v", ws, want)
	}
	for _, bad := range []string{"0", "-1", "many", "1,,2"} {
		if _, err := workloads(bad, "", "", "", false, false); err == nil {
			t.Errorf("prefetch %q passed", bad)
		}
	}
	if _, err := pick(throughputVariants, "driver,nobody"); err == nil {
		t.Error("an unknown variant passed")
	}
}

func TestGrouped(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := grouped(v); got != want {
			t.Errorf("grouped(%v) = %q, want %q", v, got, want)
		}
	}
}

func TestChartIsWellFormed(t *testing.T) {
	o := outcome{variant: throughputVariants[1], rate: 123456, rateRatio: 3.2}
	svg := chart([]comparison{{workload: workload{Prefetch: 64, Body: 100, Workers: 1}, outcomes: []outcome{o}}})
	dec := xml.NewDecoder(strings.NewReader(svg))
	for {
		_, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"3.2×", "123,456", "prefers-color-scheme: dark"} {
		if !strings.Contains(svg, want) {
			t.Errorf("the chart lacks %q", want)
		}
	}
}
