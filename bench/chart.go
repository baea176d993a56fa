package main

import (
	"fmt"
	"strings"
)

// The chart's geometry, in SVG units.
const (
	chartWidth  = 760
	chartLeft   = 56
	chartTop    = 74
	chartHeight = 230
	chartBottom = chartTop + chartHeight
)

// chart draws messages/s by prefetch for 100-byte messages and one worker over
// plain TCP: a group of bars per prefetch, one bar per variant. Colours come
// from the reader's theme.
func chart(cs []comparison) string {
	groups := chartGroups(cs)
	if len(groups) == 0 {
		return ""
	}
	top := niceTop(groups)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" aria-labelledby="title desc">`+"\n", chartWidth, chartBottom+62)
	fmt.Fprintf(&b, "<title id=\"title\">Messages per second by prefetch</title>\n<desc id=\"desc\">%s</desc>\n", chartText(groups))
	b.WriteString(chartStyle)
	fmt.Fprintf(&b, `<text x="%d" y="24" class="head">Messages per second, each acknowledged on its own</text>`+"\n", chartLeft)
	chartLegend(&b, groups[0].outcomes)
	chartGrid(&b, top)
	width := float64(chartWidth-chartLeft-8) / float64(len(groups))
	for i, g := range groups {
		chartGroup(&b, g, float64(chartLeft)+float64(i)*width, width, top)
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" class="axis mid">prefetch (100-byte messages, one worker, plain TCP, replay server)</text>`+"\n",
		(chartLeft+chartWidth)/2, chartBottom+46)
	b.WriteString("</svg>\n")
	return b.String()
}

const chartStyle = `<style>
  text { font: 12px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .head { font-size: 15px; font-weight: 600; }
  .axis { fill: #59636e; } .mid { text-anchor: middle; } .end { text-anchor: end; }
  .times { font-size: 11px; font-weight: 600; text-anchor: middle; }
  .grid { stroke: #d1d9e0; stroke-width: 1; }
  .driver { fill: #8c959f; } .steadymq { fill: #1f7a4d; } .multiple { fill: #9ec5fe; } .auto { fill: #d8cfee; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; } .axis { fill: #9198a1; } .grid { stroke: #3d444d; }
    .driver { fill: #6e7681; } .steadymq { fill: #3fb950; } .multiple { fill: #264f87; } .auto { fill: #4b3f72; }
  }
</style>
`

func chartGroups(cs []comparison) []comparison {
	var groups []comparison
	for _, c := range cs {
		if w := c.workload; w.Body == 100 && w.Workers == 1 && !w.TLS {
			groups = append(groups, c)
		}
	}
	return groups
}

// niceTop is the first of 1, 2, 5 times a power of ten above every bar.
func niceTop(groups []comparison) float64 {
	highest := 1.0
	for _, g := range groups {
		for _, o := range g.outcomes {
			highest = max(highest, o.rate)
		}
	}
	for step := 1.0; ; step *= 10 {
		for _, m := range []float64{1, 2, 3, 4, 5, 6, 8} {
			if m*step >= highest*1.05 {
				return m * step
			}
		}
	}
}

func chartLegend(b *strings.Builder, os []outcome) {
	x := chartLeft
	for _, o := range os {
		fmt.Fprintf(b, `<rect x="%d" y="40" width="12" height="12" rx="2" class="%s"/><text x="%d" y="50">%s</text>`+"\n",
			x, o.variant.name, x+18, o.variant.label)
		x += 40 + 7*len(o.variant.label)
	}
}

func chartGrid(b *strings.Builder, top float64) {
	for i := range 5 {
		v := top * float64(i) / 4
		y := chartY(v, top)
		fmt.Fprintf(b, `<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" class="grid"/>`, chartLeft, y, chartWidth-8, y)
		fmt.Fprintf(b, `<text x="%d" y="%.1f" class="axis end">%s</text>`+"\n", chartLeft-6, y+4, thousands(v))
	}
}

func chartGroup(b *strings.Builder, g comparison, x, width, top float64) {
	gap := width * 0.14
	bar := (width - 2*gap) / float64(len(g.outcomes))
	for i, o := range g.outcomes {
		left, y := x+gap+float64(i)*bar, chartY(o.rate, top)
		fmt.Fprintf(b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="2" class="%s"><title>%s: %s messages/s</title></rect>`+"\n",
			left+1, y, bar-2, chartBottom-y, o.variant.name, o.variant.label, grouped(o.rate))
		if o.variant.name == "steadymq" {
			fmt.Fprintf(b, `<text x="%.1f" y="%.1f" class="times">%.1f×</text>`+"\n", left+bar/2, y-5, o.rateRatio)
		}
	}
	fmt.Fprintf(b, `<text x="%.1f" y="%d" class="mid">%d</text>`+"\n", x+width/2, chartBottom+20, g.workload.Prefetch)
}

func chartY(v, top float64) float64 { return chartBottom - v/top*chartHeight }

func thousands(v float64) string {
	if v == 0 {
		return "0"
	}
	return fmt.Sprintf("%gk", v/1000)
}

// chartText says in words what the chart shows, for those who do not see it.
func chartText(groups []comparison) string {
	var parts []string
	for _, g := range groups {
		for _, o := range g.outcomes {
			if o.variant.name == "steadymq" {
				parts = append(parts, fmt.Sprintf("prefetch %d: steadymq %s, %.1f times the plain driver",
					g.workload.Prefetch, grouped(o.rate), o.rateRatio))
			}
		}
	}
	return strings.Join(parts, "; ")
}
