package main

import (
	"fmt"
	"os"
	"strings"
)

// equivalents are the slips that change nothing, each with the reason.
type equivalents map[string]string

// readEquivalents reads the file: a line that names a slip, as the list of survivors does, and
// below it, indented, the reason. A line that begins with # is a comment.
func readEquivalents(path string) (equivalents, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	all := make(equivalents)
	last := ""
	for line := range strings.Lines(string(text)) {
		trimmed := strings.TrimSpace(line)
		switch {
		case trimmed == "" || strings.HasPrefix(line, "#"):
		case line[0] != '\t' && line[0] != ' ':
			if _, twice := all[trimmed]; twice {
				return nil, fmt.Errorf("%s names this slip twice: %s", path, trimmed)
			}
			last = trimmed
			all[last] = ""
		case last == "":
			return nil, fmt.Errorf("%s: this reason belongs to no slip: %s", path, trimmed)
		default:
			all[last] = strings.TrimSpace(all[last] + " " + trimmed)
		}
	}
	for name, reason := range all {
		if reason == "" {
			return nil, fmt.Errorf("%s: no reason for this slip: %s", path, name)
		}
	}
	return all, nil
}

// match refuses names of slips that cannot be made any more: the source is another one now.
func (e equivalents) match(all map[*source][]*slip) error {
	if len(e) == 0 {
		return nil
	}
	there := make(map[string]bool)
	for _, slips := range all {
		for _, s := range slips {
			there[s.String()] = true
		}
	}
	for name := range e {
		if !there[name] {
			return fmt.Errorf("%s names a slip that the source does not offer any more; take it out: %s", equivalentFile, name)
		}
	}
	return nil
}
